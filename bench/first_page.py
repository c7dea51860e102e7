"""What does README show of a plan? Its text and its picture, as edgeft makes them: make first-page writes both."""

from __future__ import annotations

import re
import subprocess
import sys

from run import ROOT

MODEL, PROFILE, DEVICE = "examples/configs/qwen2.5-1.5b", "t4", "raspberrypi5-8gb"
PLAN = ["plan", MODEL, "--on", PROFILE, "--for", DEVICE]


def output() -> str:
    """What the command of the first page prints."""
    done = subprocess.run(
        [sys.executable, "-m", "edgeft", *PLAN, "--out", "-"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def picture() -> str:
    """The memory of every phase of that plan, as SVG."""
    import edgeft
    from edgeft.reporting.charts import memory_bars
    from edgeft.reporting.read_run import Run
    from edgeft.reporting.summary import summarise

    made = edgeft.plan(model=str(ROOT / MODEL), profile=PROFILE, device=DEVICE)
    drawn = memory_bars(summarise(Run(made)).stages)
    return drawn.replace(
        "<svg ", '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" ', 1
    )


def main() -> None:
    page = ROOT / "README.md"
    shown = re.sub(
        r"```\nverdict .*?```", lambda _: f"```\n{output()}\n```", page.read_text(encoding="utf-8"), flags=re.S
    )
    page.write_text(shown, encoding="utf-8")
    (ROOT / "docs" / "plan.svg").write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
