"""What of bench/results/methods.json does the planner go by? Written beside it, as edgeft/planning/evidence.json."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from run import ROOT

from compared.ways import REFERENCE, split
from edgeft.planning import evidence as read

POINTS = 100  # of exact match


def write_evidence(result: Mapping[str, Any], out: Path = read.FILE) -> None:
    """Write what the planner reads of a result; what it has read before is forgotten."""
    out.write_text(lines_of(evidence(result)) + "\n", encoding="utf-8")
    for kept in (read.evidence, read.nearest):
        kept.cache_clear()
    print(f"wrote {out.relative_to(ROOT)}")


def lines_of(value: Any, depth: int = 0, within: int = 4) -> str:
    """JSON with a line for what lies `within` levels down: a score, a comparison."""
    brackets = "{}" if isinstance(value, dict) else "[]"
    if depth == within or not isinstance(value, (dict, list)) or not value:
        return json.dumps(value)
    keys = [f"{json.dumps(key)}: " for key in value] if isinstance(value, dict) else [""] * len(value)
    each = value.values() if isinstance(value, dict) else value
    inside = [" " * (depth + 1) + key + lines_of(one, depth + 1, within) for key, one in zip(keys, each, strict=True)]
    return brackets[0] + "\n" + ",\n".join(inside) + "\n" + " " * depth + brackets[1]


def evidence(result: Mapping[str, Any]) -> dict[str, Any]:
    """The same differences as the record's, in points, with what they were measured on."""
    parts = [result, *([result["smollm2"]] if "smollm2" in result else [])]
    return {
        "source": "bench/results/methods.json, by make bench-methods",
        "commit": result["environment"]["git"]["commit"],
        "studies": [study(part) for part in parts],
    }


def study(part: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured on one model."""
    return {
        **part["measured_on"],
        "scores": [score(way, rows, own) for (way, rows), own in grouped(part["rows"]).items()],
        "comparisons": [in_points(each) for each in part["comparisons"] if gone_by(each)],
    }


def gone_by(comparison: Mapping[str, Any]) -> bool:
    """Whether the planner asks for this one: a tuner beside LoRA, or a tuner's few layers beside all of its own."""
    method, layers = split(comparison["way"])
    return layers != "random" and comparison["against"] in (REFERENCE, f"{method}, all")


def grouped(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], list[Mapping[str, Any]]]:
    """The runs of each way at each size, one a seed."""
    found: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["way"], row["rows"]), []).append(row)
    return found


def score(way: str, rows: int, own: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    points = statistics.fmean(POINTS * run["test"]["exact_match"] for run in own)
    return {"way": way, "rows": rows, "seeds": len(own), "points": round(points, 2)}


def in_points(comparison: Mapping[str, Any]) -> dict[str, Any]:
    points = {name: round(POINTS * value, 2) for name, value in comparison["exact_match"].items()}
    return {**{name: comparison[name] for name in ("way", "against", "rows", "seeds", "loss")}, "points": points}
