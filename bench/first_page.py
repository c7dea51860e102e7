"""What does README show of a plan? Its text and its picture, as edgeft makes them: make first-page writes both."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from collections.abc import Sequence

from run import ROOT

from edgeft.machines.limits import usable_cores
from edgeft.machines.profile import load_profile
from edgeft.reporting.bars import Bar
from edgeft.reporting.card import Card
from edgeft.reporting.matrix import TrainingCell, find_profiles, make_matrix
from edgeft.reporting.palette import FAMILIES, Family
from edgeft.reporting.words import show_pace, symbol
from edgeft.settings import other_names
from edgeft.units import show_bytes, show_count

SHOWN = ("smollm2-135m", "qwen2.5-0.5b", "llama-3.2-1b", "qwen2.5-1.5b", "llama-3.2-3b", "qwen2.5-7b", "llama-3.1-8b",
         "qwen2.5-14b")  # fmt: skip
MACHINES = ("cpu-8gb", "rtx4060-8gb", "t4", "rtx4090-24gb")
MODEL, PROFILE, DEVICE = "examples/configs/qwen2.5-1.5b", "t4", "raspberrypi5-8gb"
PLAN = ["plan", MODEL, "--on", PROFILE, "--for", DEVICE]

WIDTH, LEFT, TOP, STEP = 780, 16, 178, 66  # of the picture, in pixels
STYLE = """
text { font: 13px "DejaVu Sans", "Segoe UI", Roboto, Helvetica, Arial, sans-serif; fill: #1c2430; }
.page { fill: #fff; } .title { font-size: 22px; font-weight: 700; fill: #00704f; } .muted { fill: #55606e; }
.tag { font-size: 11px; text-anchor: middle; } .small { font-size: 11px; } .piece { stroke: #fff; stroke-width: 1; }
.track { fill: #e3e7ec; } .uses { fill: #8fc3e3; } .needs { fill: #0072b2; } .edge { fill: #b3261e; }
.high { fill: #1c2430; }
@media (prefers-color-scheme: dark) { text, .high { fill: #e6e9ee; } .page { fill: #14181f; } .title { fill: #4fd0a5; }
.muted { fill: #a7b1be; } .piece { stroke: #14181f; } .track { fill: #2b323d; } .uses { fill: #2a5d80; }
.needs { fill: #56b4e9; } .edge { fill: #ff8f85; } }
"""
HATCH = """<defs><pattern id="hatch" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">
<rect width="3" height="7" fill="#e8bfd6"/></pattern></defs>"""


def output() -> str:
    """What the command of the first page prints."""
    done = subprocess.run(
        [sys.executable, "-m", "edgeft", *PLAN, "--out", "-"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def machines() -> str:
    """Which machine trains which model, and what it needs there, as a table."""
    profiles = find_profiles(",".join(MACHINES))
    folders = [(name, str(ROOT / "examples" / "configs" / name)) for name in SHOWN]
    made = make_matrix(folders, profiles, workers=usable_cores())
    lines = [["model", *(f"{each.name}, {show_bytes(each.budget_bytes)}" for each in profiles)], ["---"] * 5]
    lines += [[f"{row.name}, {show_count(row.parameters or 0)}", *map(cell, row.training)] for row in made.models]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(found: TrainingCell) -> str:
    need = "" if found.need_bytes is None else show_bytes(found.need_bytes)
    pace = f", {show_pace(found.seconds_per_million_tokens)}" if found.fits else ""
    return f"{symbol(found)} {need}{pace}"


def picture() -> str:
    """The verdict on that plan and the memory of its phases, as SVG for light and dark pages."""
    import edgeft
    from edgeft.reporting import bars
    from edgeft.reporting.read_run import Run
    from edgeft.reporting.summary import summarise

    made = edgeft.plan(model=str(ROOT / MODEL), profile=PROFILE, device=DEVICE)
    summary = summarise(Run(made), [load_profile(DEVICE)])
    [group] = bars.groups(summary.stages, {})
    parts = [*verdict(summary.card)]
    for row, bar in enumerate(group.bars):
        parts += phase(bar, TOP + STEP * row)
    height = TOP + STEP * len(group.bars) + 40
    parts += legend(group.families, height - 52)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img">'
    page = f'<rect class="page" width="{WIDTH}" height="{height}"/>'
    return "\n".join([head, f"<style>{STYLE}</style>", HATCH, page, *parts, "</svg>\n"])


def verdict(card: Card) -> list[str]:
    """The card: its title, what was said, the bar of needs, uses and limit, and what you get."""
    need, uses, whole = card.need_bytes or 0, card.uses_bytes or 0, max(card.limit_bytes, card.uses_bytes or 0)
    across = WIDTH - 2 * LEFT
    drawn = [f'<rect class="{kind}" x="{LEFT}" y="76" width="{across * size / whole:.1f}" height="20"/>'
             for kind, size in (("track", whole), ("uses", uses), ("needs", need))]  # fmt: skip
    drawn.append(
        f'<rect class="edge" x="{LEFT + across * card.limit_bytes / whole - 3:.1f}" y="71" width="3" height="30"/>'
    )
    keys = f"needs {show_bytes(need)} ({card.need_note}), uses {show_bytes(uses)}, limit {show_bytes(card.limit_bytes)}"
    facts = "; ".join(f"{fact.name}: {fact.value}" for fact in card.facts)
    return [write(32, f"{card.mark} {card.title}", "title"), write(58, card.said), *drawn, write(118, keys),
            write(138, facts[:1].upper() + facts[1:], "muted")]  # fmt: skip


def phase(bar: Bar, top: int) -> list[str]:
    """A phase's bar, with its name and numbers above it."""
    across = (WIDTH - 2 * LEFT) / 100
    drawn = [write(top - 6, f"{bar.title}: {bar.said}")]
    for piece in bar.pieces:
        look = FAMILIES[piece.family]
        box = f'x="{LEFT + across * piece.left:.1f}" y="{top}" width="{across * piece.width:.1f}" height="32"'
        hatch = f'<rect {box} fill="url(#hatch)"/>' if piece.family == "temporary" else ""
        said = f"<title>{html.escape(piece.name)}: {piece.size}</title>"
        drawn.append(f'<rect class="piece" {box} fill="{look.colour}">{said}</rect>{hatch}')
        if piece.room:
            middle = LEFT + across * (piece.left + piece.width / 2)
            place = f'x="{middle:.1f}" style="fill: {look.text}"'
            drawn += [f'<text class="tag" {place} y="{top + y}">{html.escape(text)}</text>'
                      for y, text in ((14, piece.name), (27, piece.size))]  # fmt: skip
    drawn.append(f'<rect class="high" x="{LEFT + across * bar.expected:.1f}" y="{top + 15}" '
                 f'width="{across * (bar.high - bar.expected):.1f}" height="2"/>')  # fmt: skip
    if bar.limit is not None:
        drawn.append(
            f'<rect class="edge" x="{LEFT + across * bar.limit - 1:.1f}" y="{top - 4}" width="3" height="40"/>'
        )
    return drawn


def legend(families: Sequence[Family], top: int) -> list[str]:
    """A swatch for each family of terms."""
    drawn, left = [], float(LEFT)
    for name in families:
        look = FAMILIES[name]
        wide = 34 + 6.1 * len(look.title)
        if left + wide > WIDTH:
            left, top = float(LEFT), top + 20
        drawn.append(f'<rect x="{left:.0f}" y="{top}" width="12" height="12" fill="{look.colour}"/>')
        drawn.append(f'<text class="small" x="{left + 17:.0f}" y="{top + 11}">{look.title}</text>')
        left += wide
    return drawn


def write(top: int, text: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{LEFT}" y="{top}">{html.escape(text)}</text>'


def main() -> None:
    page, plan, table, drawn = ROOT / "README.md", output(), machines(), picture()
    shown = page.read_text(encoding="utf-8")
    shown = re.sub(r"```\nverdict .*?```", lambda _: f"```\n{plan}\n```", shown, flags=re.S)
    shown = re.sub(r"^\| model \| cpu-8gb.*(\n\|.*)+", lambda _: table, shown, count=1, flags=re.M)
    page.write_text(shown, encoding="utf-8")
    (ROOT / "docs" / "plan.svg").write_text(drawn, encoding="utf-8")
    names = ROOT / "docs" / "other-trainers.md"
    theirs = r"^\| elsewhere \| here.*(\n\|.*)+\n"
    said = re.sub(theirs, lambda _: other_names.table(), names.read_text(encoding="utf-8"), count=1, flags=re.M)
    names.write_text(said, encoding="utf-8")


if __name__ == "__main__":
    main()
