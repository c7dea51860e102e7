"""How does what the doctor found read on a screen? The verdict comes first."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from edgeft.models.doctor.findings import VERDICTS, Diagnosis, Finding, Repaired
from edgeft.units import show_bytes, show_count

SHOWN = 8  # names of one finding


def diagnosis_text(found: Diagnosis) -> RenderableType:
    """One verdict, the command that leads on, what is wrong, what is only to be known, and the folder's facts."""
    lines = [
        Text.assemble((f"{found.folder}: {VERDICTS[found.verdict]}", "bold"), f": {found.reason}" * bool(found.reason))
    ]
    if found.command:
        lines.append(Text(f"  {found.command}"))
    lines += [line for finding in found.findings for line in _finding(finding)]
    return Group(*lines, Text(_facts(found)))


def _finding(finding: Finding) -> list[Text]:
    mark = "wrong" if finding.level == "wrong" else "note"
    lines = [Text(f"{mark}: {finding.problem}")]
    names = finding.names if len(finding.names) > 1 or finding.code in ("tensors", "quantised", "values") else ()
    lines += [Text(f"    {name}") for name in names[:SHOWN]]
    if len(names) > SHOWN:
        lines.append(Text(f"    ... and {len(names) - SHOWN} more"))
    if finding.repair:
        lines.append(Text(f"  repair{' (with --base)' if finding.from_base else ''}: {finding.repair}"))
    if finding.hint:
        lines.append(Text(f"  hint: {finding.hint}"))
    return lines


def _facts(found: Diagnosis) -> str:
    parts = [found.kind]
    if found.tensors:
        parts += [f"{found.model_type}, {show_count(found.parameters)} parameters in {found.dtype}",
                  f"{found.tensors} tensors in {found.files} {'file' if found.files == 1 else 'files'}, "
                  + show_bytes(found.size_bytes)]  # fmt: skip
    if found.vocabulary:
        head = "" if found.tied is None else ", head tied" if found.tied else ", a head of its own"
        parts.append(f"{found.vocabulary} rows for {found.tokens} tokens{head}")
    if found.end_ids:
        parts.append(
            f"ends at {', '.join(map(str, found.end_ids))}, {'a' if found.chat_template else 'no'} chat template"
        )
    return "; ".join(parts)


def repaired_text(made: Repaired, out: object) -> RenderableType:
    """What a repair has written and what it has done."""
    exact = "bit for bit" if made.exact else "unpacked: what was rounded stays rounded"
    first = Text(f"{out}: a model that trains, in {made.dtype}, {exact}", style="bold")
    return Group(
        first, *(Text(f"  - {line}") for line in made.done), Text("doctor.json there has the hashes of what was read")
    )
