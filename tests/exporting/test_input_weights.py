"""What each input of a matrix counts, and what llama.cpp's quantiser makes of it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import ROWS, checkpoint, workplace
from runtimes import dequantised
from tiny import EXAMPLE

from edgeft.data.samples import Sample
from edgeft.data.tokenizer import TextTokenizer
from edgeft.errors import EdgeftError
from edgeft.exporting.calibrate import calibrate
from edgeft.machines.profile import load_profile
from edgeft.memory.stages import calibrate_phases
from edgeft.memory.train_step import Workload
from edgeft.models.checkpoint import load_plain
from edgeft.models.parts import is_linear
from edgeft.models.spec import read_model_spec
from edgeft.planning.costs import Question
from edgeft.settings.job import make_job
from edgeft.targets import k_quants
from edgeft.targets.codes import Codes
from edgeft.targets.gguf_file import build_model
from edgeft.targets.target import Target, calibrated, climb, load_target

PLAIN = load_target("gguf-q4_k_m")
WEIGHTED = climb(PLAIN)[1]


def samples(folder: Path, count: int = 6) -> list[Sample]:
    encoded = TextTokenizer(folder).encode(ROWS[:count])
    return [Sample(ids[: 20 + at], ids[: 20 + at], 0) for at, ids in enumerate(encoded)]


def squares(source: Path, rows: list[Sample]) -> dict[str, torch.Tensor]:
    """Mean squares of inputs in the whole model in fp64, a row at a time."""
    model: Any = load_plain(source).double()
    sums, count = dict[str, torch.Tensor](), dict[str, int]()

    def see(name: str, arguments: Any) -> None:
        read = arguments[0].reshape(-1, arguments[0].shape[-1])
        sums[name] = sums.get(name, torch.zeros(read.shape[1], dtype=torch.float64)) + read.square().sum(dim=0)
        count[name] = count.get(name, 0) + len(read)

    for name, module in model.named_modules():
        if is_linear(module) and "layers." in name:
            module.register_forward_pre_hook(lambda _, given, name=f"{name}.weight": see(name, given))
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([list(row.ids)]), use_cache=False)
    return {name: total / count[name] for name, total in sums.items()}


@functools.cache
def weighed(source: Path) -> Codes:
    folder = workplace() / f"inputs of {source.name}"
    folder.mkdir()
    return calibrate(source, WEIGHTED, samples(source), folder)


def test_inputs_count_by_their_mean_square_in_the_model_as_it_is() -> None:
    found, expected = weighed(checkpoint()).input_weights(), squares(checkpoint(), samples(checkpoint()))
    assert found.keys() == expected.keys() and len(found) == 2 * 7 and not list(weighed(checkpoint()))
    for name, each in expected.items():
        torch.testing.assert_close(found[name].double(), each, rtol=1e-4, atol=1e-9)
    filled = [[*row.ids, *[0] * (25 - len(row))] for row in samples(checkpoint())]  # planted: padding counts
    other = squares(checkpoint(), [Sample(ids, ids, 0) for ids in filled])
    assert all((found[name] - each).abs().max() > 0.02 * each.max() for name, each in other.items())


def test_the_weighted_mix_is_the_next_step_of_a_climb_and_needs_its_quantiser() -> None:
    assert calibrated(PLAIN) == WEIGHTED and (WEIGHTED.name, WEIGHTED.calibration) == (
        "gguf-q4_k_m-calibrated",
        "imatrix",
    )
    assert [each.name for each in climb(PLAIN)] == ["gguf-q4_k_m", WEIGHTED.name, "gguf-q8_0", "gguf-f16"]
    assert calibrated(WEIGHTED) is None
    with pytest.raises(ValueError, match=r"calibration imatrix weighs inputs .* needs method k_quant"):
        Target.model_validate(load_target("gguf-q4_0").model_dump() | {"calibration": "imatrix"})
    with pytest.raises(ValueError, match="calibration needs method rtn"):
        Target.model_validate(PLAIN.model_dump() | {"calibration": "gptq"})


def test_a_quantiser_that_knows_no_weights_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "AttributeError: module 'llama_cpp' has no attribute 'llama_model_imatrix_data'"
    monkeypatch.setattr(k_quants, "QUANTISE", f"import sys; sys.exit({said!r})")
    with pytest.raises(EdgeftError, match="llama-cpp-python: is too old to weigh inputs") as why:
        k_quants.quantise(tmp_path / "a", tmp_path / "b", 4, {"x": torch.ones(2)})
    assert why.value.exit_code == 5 and list(tmp_path.iterdir()) == []


def built(target: Target, codes: Codes | None, out: Path) -> dict[str, torch.Tensor]:
    """What gguf decodes of a file that llama.cpp's quantiser wrote."""
    out.mkdir()
    build_model(EXAMPLE, target, read_model_spec(str(EXAMPLE)), out, codes)
    return dequantised(out).state_dict()  # type: ignore[no-any-return]


def test_the_quantiser_takes_each_tensors_own_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install edgeft[llama]")
    codes, exact = weighed(EXAMPLE), load_plain(EXAMPLE).state_dict()
    weights = codes.input_weights()
    plain, better = built(PLAIN, None, tmp_path / "plain"), built(WEIGHTED, codes, tmp_path / "better")

    def errors(made: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack([((made[name] - exact[name]).square() @ each).sum() for name, each in weights.items()])

    assert (errors(better) < errors(plain)).float().mean() > 0.9 and errors(better).sum() < 0.95 * errors(plain).sum()
    names = list(weights)
    shifted = {name: weights[names[at - 7]] for at, name in enumerate(names)}  # planted: another layer's
    monkeypatch.setattr(codes, "input_weights", lambda: shifted)
    other = built(WEIGHTED, codes, tmp_path / "other")
    assert all(not torch.equal(other[name], better[name]) for name in names)
    assert errors(other).sum() > errors(better).sum()


def test_what_weighing_holds_is_planned() -> None:
    """Measured on SmolLM2-135M in bf16, 128 rows of 59 tokens: 764 MiB at the highest."""
    spec = read_model_spec(str(EXAMPLE.parent / "configs" / "smollm2-135m")).model_copy(update={"dtype": "bfloat16"})
    job = make_job(model="smollm2-135m")
    question = Question(job, load_profile("cpu-8gb"), spec, None, Workload(59, 8), 20 * 2**20, 8 * 2**30)
    (phase,) = calibrate_phases(question, WEIGHTED)
    assert phase.expected_bytes / 2**20 == pytest.approx(764, rel=0.05)
    assert calibrate_phases(question, PLAIN) == ()
    (coded,) = calibrate_phases(question, load_target("ort-int4-calibrated"))
    assert coded.expected_bytes > phase.expected_bytes
