"""Eight bits go where they are worth most, no further than needed, never beyond the size: and the bundle proves it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny import job_data

from edgeft.data.samples import IGNORED, Sample
from edgeft.errors import BadInput, DoesNotFit
from edgeft.exporting import sensitivity
from edgeft.exporting.export import export
from edgeft.exporting.form import Form
from edgeft.exporting.outputs import observe_model
from edgeft.exporting.parity import compare
from edgeft.exporting.promotion import Rounding, choose, file_bytes, measure, tightened
from edgeft.exporting.sensitivity import costs
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


def alone(merged_folder: Path, rows: Sequence[Sample]) -> dict[str, float]:
    """Mean KL in nats per trained token with each tensor of the decoder layers in 4 bits and all others exact."""
    spec = TrainResult.read(merged_folder.parent / "train" / "train.json").plan.spec
    model = Rounding(merged_folder, INT4, spec)

    def answers() -> torch.Tensor:
        found = []
        for row in rows:
            at = [i for i in range(len(row.ids) - 1) if row.labels[i + 1] != IGNORED]
            with torch.no_grad():
                found.append(model.model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, at].double())
        return torch.cat(found).log_softmax(-1)

    exact, found = answers(), {}
    for tensor in model.tensors:
        model.rounded(tensor, eight=False)
        found[tensor.stored] = float((exact.exp() * (exact - answers())).sum(-1).mean())
        model.exact(tensor)
    return found


def test_a_tensors_cost_is_that_of_it_alone_in_four_bits(merged_folder: Path) -> None:
    rows = job_data(merged_folder).train[:24]
    found = measure(merged_folder, INT4, rows, "some rows")
    assert len(found.order) == 14 and found.calibration == "some rows"
    referee = alone(merged_folder, rows)
    assert len(set(referee.values())) == 14 and min(referee.values()) > 0
    for each in found.order:  # a sum of 96 squares of random signs is off by a seventh, twice that seldom
        assert each.mean_kl_nats == pytest.approx(referee[each.tensor], rel=0.5), each.tensor
    assert sum(e.mean_kl_nats for e in found.order) == pytest.approx(sum(referee.values()), rel=0.15)
    per_byte = [each.mean_kl_nats / each.extra_bytes for each in found.order if each.why == "sensitive"]
    assert per_byte == sorted(per_byte, reverse=True)
    survives = {tensor.name: tensor for tensor in survival(merged_folder, INT4).tensors}
    assert all(each.cosine == survives[each.tensor].cosine for each in found.order)


def test_probes_spread_as_answers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "PROBES", 20_000)
    logits = torch.tensor([[4.0, 2.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    moves = torch.tensor([[5.0, 5.0, 5.0, 5.0], [6.0, 5.0, 4.0, 5.0]], dtype=torch.float64)  # the first is none
    seen = torch.cat([
        torch.autograd.grad(probe, logits)[0] for probe in sensitivity._probes(logits, torch.Generator().manual_seed(1))
    ])  # fmt: skip
    p = logits.detach()[0].softmax(-1)
    exact = moves @ (p.diag() - torch.outer(p, p)) @ moves.T
    found = (seen @ moves.T).square().mean(0)
    assert found[0] < 1e-20 and found[1] == pytest.approx(float(exact[1, 1]), rel=0.05)


def test_costs_leave_a_model_as_it_was(merged_folder: Path) -> None:
    rows = job_data(merged_folder).train[:2]
    model = load_plain(merged_folder)
    name, parameter = next((n, p) for n, p in model.named_parameters() if n.endswith("q_proj.weight"))
    trained, kept, ids = parameter.requires_grad, parameter.detach().clone(), torch.tensor([rows[0].ids])
    with torch.no_grad():
        before = model(input_ids=ids).logits
    still = costs(model, {name: torch.zeros_like(parameter)}, rows, lambda done, total: None)
    assert still == {name: 0.0}
    move = {name: torch.full_like(parameter, 1e-3)}
    once, again = (costs(model, move, rows, lambda done, total: None) for _ in range(2))
    assert once == again and once[name] > 0
    assert torch.equal(parameter, kept) and parameter.requires_grad == trained and parameter.grad is None
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)


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


def test_exact_answers_decide_too(merged_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight bits for the tensors that keep the answers, where the loss alone would let four bits pass."""
    rows, eight = 200, list[int]()

    def form(wrong: int) -> Form:
        exact = [row >= wrong for row in range(rows)]
        return Form("form", torch.zeros(1, 1), (0.1,) * rows, (1,) * rows, tuple(exact))

    monkeypatch.setattr(Rounding, "as_bundle", lambda self, modules: eight.append(len(modules)))
    found = measure(merged_folder, strict(INT4, 1e9), job_data(merged_folder).train[:2], "")
    chosen = choose(found, [], exact=form(0), observe=lambda model, tolerance: form(max(0, 9 - eight[-1])))
    assert len(chosen.promoted) == 6  # 3 wrong of 200 are 1.5 points, 4 are 2: more than nine tenths of 2
    assert chosen.simulated_before.problems == (
        "exact match falls by 4.5 points (95% interval 1.3 to 7.6), at most 1.8",
    )
    assert not chosen.simulated.problems and chosen.ended == "the simulated bundle passes"


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
