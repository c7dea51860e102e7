"""Does the comparison of targets ship what its rule says, and keep every reason why a target is out?"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgeft.errors import BadInput, DoesNotFit, MissingExtra
from edgeft.exporting.choose_target import COMPARISON, Candidate, Comparison, choose, compare_targets
from edgeft.models.metrics import Metrics
from edgeft.targets.target import Target, list_targets


def candidate(name: str, loss: float, exact: float | None, read: int, size: int = 0, rows: int = 10_000) -> Candidate:
    scores = Metrics(rows=rows, loss=loss, perplexity=1.0, exact_match=exact)
    return Candidate(name=name, runtime="ort-genai", scores=scores, bytes_per_token=read, size_bytes=size)


def test_of_those_as_good_as_the_best_the_one_that_reads_least_is_shipped() -> None:
    best, near, worse = candidate("a", 0.20, 0.90, 100), candidate("b", 0.21, 0.89, 50), candidate("c", 0.2101, 0.9, 10)
    assert choose([best, near, worse])[0] == "b"
    assert choose([best, worse])[0] == "a"
    assert choose([best, candidate("d", 0.2, 0.8899, 10)])[0] == "a"  # more than a point of exact match
    assert choose([best, candidate("e", 0.2, 0.9, 100, size=-1)])[0] == "e"  # equal reads: the smaller
    assert choose([candidate("f", 0.5, None, 9), candidate("g", 0.5, None, 8)])[0] == "g"
    # no target is within both limits: the loss decides
    assert choose([candidate("h", 0.1, 0.5, 9), candidate("i", 0.9, 0.9, 8)])[0] == "h"
    assert "of 2 targets within 0.01 nats and 1 point of the best" in choose([best, near, worse])[1]


def test_what_the_same_rows_show_no_difference_for_is_as_good() -> None:
    """Of 40 rows: three lost and one gained show nothing; ten lost and none gained do, also where the share is near."""

    def of_rows(name: str, marks: str, read: int) -> Candidate:
        made = candidate(name, 0.2, marks.count("1") / len(marks), read, rows=len(marks))
        assert made.scores is not None
        return made.model_copy(update={"scores": made.scores.model_copy(update={"row_exact": marks})})

    best = of_rows("best", "1" * 36 + "0" * 4, 9)
    near, worse = of_rows("near", "0" * 3 + "1" * 34 + "0" * 3, 8), of_rows("worse", "1" * 26 + "0" * 14, 7)
    assert choose([best, near, worse])[0] == "near"
    assert choose([best, worse])[0] == "best"
    without = near.model_copy(update={"scores": near.scores.bare if near.scores else None})
    assert choose([best, without])[0] == "best"  # five points less, and nothing says that they are chance


def bundle(target: Target, loss: float) -> Any:
    scores = {target.name: Metrics(rows=9, loss=loss, perplexity=1.0, exact_match=None)}
    return SimpleNamespace(
        proof=SimpleNamespace(scores=scores, rungs=[SimpleNamespace(mean_kl_nats=0.1)]), size_bytes=7, measured=None,
        weight_bytes_per_token=target.weight_bits + (target.runtime == "onnxruntime"),
        predicted=SimpleNamespace(memory_bytes=8, tokens_per_second_bound=3.0),
    )  # fmt: skip


def test_every_target_is_tried_and_each_failure_keeps_its_reason(tmp_path: Path) -> None:
    (tmp_path / "merged.json").write_text("{}")
    out = tmp_path / "out"
    (out / "gguf-f16").mkdir(parents=True)

    def build(target: Target, folder: Path) -> Any:
        assert folder == out / target.name
        if target.runtime == "llama.cpp":
            raise MissingExtra("llama-cpp-python", "is not installed")
        if target.weight_bits == 32:
            raise DoesNotFit("bundle", "needs 9 GiB")
        return bundle(target, 0.3 if target.weight_bits == 4 else 0.2)

    made = compare_targets(tmp_path, out, device="raspberrypi5-8gb", build=build)
    assert [row.name for row in made.candidates] == [target.name for target in list_targets()]
    problems = {row.name: row.problem for row in made.candidates if row.problem}
    assert (
        problems["ort-fp32"] == "needs 9 GiB"
        and problems["gguf-q8_0"] == "llama-cpp-python is not installed"
        and len(problems) == 6
    )
    assert made.ship == "ort-int8" and not (out / "gguf-f16").exists()
    assert Comparison.read(out / COMPARISON) == made


def test_nothing_to_ship_names_every_reason(tmp_path: Path) -> None:
    def build(target: Target, folder: Path) -> Any:
        raise DoesNotFit("bundle", f"{target.name} needs 9 GiB")

    with pytest.raises(BadInput, match=r"(?s)none can be shipped\ngguf-f16: gguf-f16 needs 9 GiB\n.*ort-int8 needs"):
        compare_targets(tmp_path, tmp_path / "out", device=None, build=build)
    assert not (tmp_path / "out").exists()
