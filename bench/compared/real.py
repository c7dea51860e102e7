"""Do the best ways on the example hold on a real model? SmolLM2-135M-Instruct with 300 rows, as in bench/smollm2.py.

The same task as chats, each row twice, eight a step: five to seven runs of about seven minutes of one core, up to a
third of which is scoring. Learning rates are those that were chosen on the example, as far above or below each tuner's
default, which follows the width: none is tried here. Of one seed each; what seeds move is taken from the example.
"""

from __future__ import annotations

from smollm2 import FOLDER as PACKAGE
from smollm2 import base_model, chats

from compared.ways import FOLDER, Setting

ROWS, VALID_ROWS, TEST_ROWS = 300, 50, 500
TASK = "sections"


def smollm2() -> Setting:
    """The model and its rows. Raises MissingExtra where its package cannot be had."""
    folder = FOLDER / "smollm2"
    for each in (folder, PACKAGE):
        each.mkdir(parents=True, exist_ok=True)
    counts = {"train": ROWS, "valid": VALID_ROWS, "test": TEST_ROWS}
    files = {name: chats(TASK, name, count, folder / f"{name}.jsonl") for name, count in counts.items()}
    return Setting(
        name="smollm2", base=base_model(PACKAGE), **files, epochs={ROWS: 2}, eval_rows=VALID_ROWS, folder=folder,
        active={"sparse": 7, "random": 7, "lisa": 4}, seeds=lambda way, rows: range(1),
        more={"batch_size": 8},
    )  # fmt: skip
