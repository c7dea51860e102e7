"""Eight bits go where they are worth most, no further than needed, never beyond the size: and the bundle proves it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import job_data

from edgeft.errors import BadInput, DoesNotFit
from edgeft.exporting.export import export
from edgeft.exporting.outputs import observe_model
from edgeft.exporting.parity import compare
from edgeft.exporting.promotion import Rounding, answers, choose, file_bytes, mean_kl, measure, tightened
from edgeft.merging.survival import survival
from edgeft.models.checkpoint import Checkpoint, load_plain
from edgeft.progress import silent
from edgeft.targets.rounding import round_model
from edgeft.targets.target import Target, load_target, promoted
from edgeft.training.result import TrainResult

INT4 = load_target("ort-int4")
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def strict(target: Target, kl: float) -> Target:
    parity = target.parity.model_copy(update={"max_mean_kl_nats": kl, "min_top1_agreement": 0.0})
    return target.model_copy(update={"parity": parity})


def kl_of(merged_folder: Path, modules: set[str]) -> float:
    """The gate's mean KL of the simulated bundle."""
    data = job_data(merged_folder)
    model = Rounding(merged_folder, INT4, TrainResult.read(merged_folder.parent / "train" / "train.json").plan.spec)
    exact = observe_model("exact", model.model, data.valid)
    model.as_bundle(modules)
    kl = compare(exact, observe_model("simulated", model.model, data.valid), INT4.parity).mean_kl_nats
    assert kl is not None
    return kl


def test_without_promotions_the_simulation_is_the_targets_rounding(merged_folder: Path) -> None:
    spec = TrainResult.read(merged_folder.parent / "train" / "train.json").plan.spec
    model, plain = Rounding(merged_folder, INT4, spec), load_plain(merged_folder)
    assert {tensor.module for tensor in model.tensors} == {f"layers.{i}.{name}" for i in range(2) for name in MODULES}
    model.as_bundle(set())
    round_model(plain, INT4)
    for name, parameter in plain.named_parameters():
        assert torch.equal(model.parameters[name], parameter), name
    for tensor in (*model.tensors, *model.others):
        model.exact(tensor)
    stored = Checkpoint(merged_folder)
    assert all(torch.equal(p, stored.read(name)) for name, p in model.parameters.items())


def test_a_tensors_cost_is_that_of_it_alone_in_four_bits(merged_folder: Path) -> None:
    data = job_data(merged_folder)
    rows = data.train[:6]
    found = measure(merged_folder, INT4, rows, "six rows")
    assert len(found.order) == 14 and found.calibration == "six rows"
    worst = found.order[0]
    model, exact = load_plain(merged_folder), load_plain(merged_folder)
    reference = list(answers(exact, rows))
    alone = load_plain(merged_folder)
    round_model(alone, INT4)
    rounded = dict(alone.named_parameters())[worst.tensor]
    with torch.no_grad():
        dict(model.named_parameters())[worst.tensor].copy_(rounded)
    assert worst.mean_kl_nats == pytest.approx(mean_kl(reference, model, rows), rel=1e-6) and worst.mean_kl_nats > 0
    per_byte = [each.mean_kl_nats / each.extra_bytes for each in found.order if each.why == "sensitive"]
    assert per_byte == sorted(per_byte, reverse=True)
    survives = {tensor.name: tensor for tensor in survival(merged_folder, INT4).tensors}
    assert all(each.cosine == survives[each.tensor].cosine for each in found.order)


def test_what_would_be_lost_goes_first(merged_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cosines = sorted(tensor.cosine for tensor in survival(merged_folder, INT4).tensors if tensor.bits == 4)
    monkeypatch.setattr("edgeft.exporting.promotion.LOST_COSINE", cosines[3])  # three lie below
    order = measure(merged_folder, INT4, job_data(merged_folder).train[:2], "").order
    assert [each.why for each in order] == ["lost"] * 3 + ["sensitive"] * 11
    assert {each.cosine for each in order[:3]} == set(cosines[:3])


def test_no_more_is_promoted_than_the_gate_needs(merged_folder: Path) -> None:
    none, every = (
        kl_of(merged_folder, set()),
        kl_of(merged_folder, {f"layers.{i}.{n}" for i in range(2) for n in MODULES}),
    )
    data = job_data(merged_folder)
    wanted = strict(INT4, (none + every) / 2)
    found = measure(merged_folder, wanted, data.train[:8], "")
    chosen = choose(found, data.valid, used=1.0)
    count = len(chosen.promoted)
    assert 0 < count < 14 and chosen.ended == "the simulated bundle passes" and not chosen.simulated.problems
    assert chosen.simulated.mean_kl_nats == pytest.approx(
        kl_of(merged_folder, {e.module for e in chosen.promoted}), rel=1e-6
    )
    assert chosen.simulated_before.mean_kl_nats == pytest.approx(none, rel=1e-6)
    fewer = {each.module for each in chosen.promoted[:-1]}
    assert kl_of(merged_folder, fewer) > wanted.parity.max_mean_kl_nats  # one less would not do
    loose = measure(merged_folder, strict(INT4, 2 * none), data.train[:2], "")
    assert choose(loose, data.valid).promoted == ()
    impossible = choose(measure(merged_folder, strict(INT4, 1e-12), data.train[:2], ""), data.valid)
    assert impossible.ended == "every tensor has 8 bits" and len(impossible.promoted) == 14


def test_a_size_ends_it_and_too_little_is_refused(merged_folder: Path) -> None:
    data = job_data(merged_folder)
    found = measure(merged_folder, strict(INT4, 1e-12), data.train[:2], "")
    smallest = file_bytes(found.spec, INT4, merged_folder)
    some = choose(found, data.valid, size_budget_bytes=smallest + 9000)
    assert 0 < len(some.promoted) < 14 and some.ended == "the size budget ends"
    assert some.predicted_bytes <= smallest + 9000
    following = [each.module for each in found.order[: len(some.promoted) + 1]]
    assert file_bytes(found.spec, promoted(INT4, following), merged_folder) > smallest + 9000
    with pytest.raises(DoesNotFit, match=r"^--size-budget: a bundle for ort-int4 takes .*, the budget is 10.0 KiB"):
        choose(found, data.valid, size_budget_bytes=10240)


def test_a_bundle_over_its_size_is_not_written(merged_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    with pytest.raises(DoesNotFit, match=r"^--size-budget: the bundle for ort-int4 is .*, the budget 50.0 KiB"):
        export(merged_folder, INT4, out, device=None, progress=silent, size_budget_bytes=51200)
    assert not out.exists()


def test_a_rounding_that_torch_does_not_know_is_refused(merged_folder: Path) -> None:
    with pytest.raises(BadInput, match="rounds in a way that is not computed here"):
        measure(merged_folder, INT4.model_copy(update={"method": "k_quant"}), [], "")


def test_a_tightened_tolerance_leaves_a_share() -> None:
    half = tightened(INT4.parity, 0.5)
    assert half.min_top1_agreement == pytest.approx(1 - 0.5 * (1 - INT4.parity.min_top1_agreement))
    assert half.max_mean_kl_nats == 0.5 * INT4.parity.max_mean_kl_nats
