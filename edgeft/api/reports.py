"""How is a page on a run made from Python?"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from edgeft.api.results import OnDisk
from edgeft.errors import BadInput

if TYPE_CHECKING:
    from edgeft.reporting.summary import Summary


def report(run: OnDisk | str | Path, out: str | Path | None = None) -> list[Path]:
    """One page on a plan and the stages after it: the paths of HTML, Markdown and JSON that were written."""
    from edgeft.reporting.pages import write_report

    source = run.path if isinstance(run, OnDisk) else Path(run)
    source = source / "plan.json" if source.is_dir() else source
    return write_report(summary(source), Path(out) if out is not None else source.parent / "report.html")


def summary(plan_file: Path, devices: str | None = None) -> Summary:
    """What a report on a plan and the stages after it says, beside devices: `a,b`, or all that edgeft knows."""
    from edgeft.reporting.matrix import devices_of, find_devices
    from edgeft.reporting.read_run import read_run
    from edgeft.reporting.summary import summarise

    run, found = read_run(plan_file), find_devices(devices or "all")
    own = run.plan.job.device
    if own is not None and devices is None:  # one of its own memory, or of a file, is in no list
        with contextlib.suppress(BadInput):  # whose file may be gone
            names = {each.name for each in found}
            found = devices_of([*found, *(each for each in find_devices(own) if each.name not in names)])
    return summarise(run, found)
