"""How is the config of an adapter written that PEFT has none of: its fields, under PEFT's name of the file?"""

from __future__ import annotations

import json
from pathlib import Path


class OwnConfig:
    """What its dataclasses have in common with PEFT's configs."""

    def save_pretrained(self, out: Path) -> None:
        """Write it into a folder."""
        (out / "adapter_config.json").write_text(json.dumps(vars(self), indent=2) + "\n", encoding="utf-8")
