"""Keys and values before the text: what they begin as, what PEFT makes of them, and what reads and refuses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from beside import computes_as_trained, others_merge, peft_logits
from safetensors.torch import load_file, save_file
from tiny import plan_of, run, save_model, write_plan

from edgeft.data.batches import micro_batches
from edgeft.data.samples import Sample
from edgeft.engine.prefixes import start_ids
from edgeft.engine.trainable import apply_tuner, save_tuned
from edgeft.errors import BadInput
from edgeft.exporting.outputs import load_as_trained, load_tuned
from edgeft.merging.merge import merge
from edgeft.merging.merged_tensors import merged_rung
from edgeft.merging.result import MergedCheckpoint
from edgeft.merging.sweep import sweep
from edgeft.models.cache_names import cache_of
from edgeft.models.checkpoint import load_plain
from edgeft.models.evaluate import evaluate, greedy
from edgeft.models.headers import KV_PREFIX
from edgeft.models.layer_shares import Group, Shares
from edgeft.models.parts import find_parts
from edgeft.models.spec import ModelSpec, read_model_spec
from edgeft.models.tree_pass import Begun, TreeReader
from edgeft.planning.candidates import candidates
from edgeft.planning.job_checks import check_job
from edgeft.planning.plan import Plan, make_plan
from edgeft.planning.prefix_cache import obstacle
from edgeft.progress import silent
from edgeft.settings.job import make_job
from edgeft.targets.target import load_target
from edgeft.training.job_data import Data
from edgeft.training.result import TrainResult

IDS = torch.arange(5, 37).reshape(2, 16)
CPU = torch.device("cpu")
GROUPED, ALONE = {"num_key_value_heads": 2}, {"num_key_value_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED, "qwen3": GROUPED, "phi3": GROUPED, "gemma": GROUPED, "granite": GROUPED,
    "gpt2": {**ALONE, "n_inner": 192}, "gpt_neox": ALONE, "opt": {**ALONE, "ffn_dim": 192, "word_embed_proj_dim": 64},
}  # fmt: skip


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "llama")) for kind in FAMILIES]
)
def test_it_begins_as_tokens_before_the_text_and_goes_on_as_pefts(kind: str, tmp_path: Path) -> None:
    spec = save_model(tmp_path / "base", kind, num_hidden_layers=3, **FAMILIES[kind])
    training = plan_of(spec, range(3), tuner="prefix")
    model = load_plain(tmp_path / "base")
    before = logits(model, torch.cat([start_ids(spec.vocab_size, training).expand(2, -1), IDS], dim=1))[:, 3:]
    parts = find_parts(model)
    chosen = apply_tuner(model, parts, training)
    begun = logits(model)
    torch.testing.assert_close(begun, before, rtol=1e-5, atol=2e-6)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in chosen:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=random))
    (tmp_path / "adapter").mkdir()
    save_tuned(model, parts, training, chosen, str(tmp_path / "base"), tmp_path / "adapter")
    tuned = logits(model)
    assert (tuned - begun).abs().max() > 0.05
    torch.testing.assert_close(tuned, peft_logits(tmp_path / "base", tmp_path / "adapter", IDS), rtol=1e-5, atol=2e-6)
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5]]  # of other lengths: padded on the left, under a mask

    def alone(ids: list[int]) -> list[int]:
        for _ in range(6):
            ids = [*ids, int(logits(model, torch.tensor([ids]))[0, -1].argmax())]
        return ids[-6:]

    assert greedy(model, prompts, [511], 6, CPU) == [alone(prompt) for prompt in prompts]


def test_a_tree_of_answers_sees_it(tmp_path: Path) -> None:
    spec = save_model(tmp_path)
    model = load_plain(tmp_path)
    apply_tuner(model, find_parts(model), plan_of(spec, range(2), tuner="prefix"))
    reader, seen = TreeReader(model, find_parts(model), CPU, torch.float32, 64, 64), dict[Any, torch.Tensor]()
    begun = Begun((5, 6, 7, 8), ((9,), (10, 11), (10, 12)))
    reader.read([begun], lambda _, prefix, found: seen.update({prefix: found.clone()}))
    assert reader.packs  # the mask is taken, with the prefix before it
    for prefix in begun.prefixes:
        expected = logits(model, torch.tensor([[*begun.text, *prefix]]))[0, -1]
        torch.testing.assert_close(seen[prefix], expected, rtol=1e-5, atol=2e-6)


@pytest.fixture(scope="module")
def trained(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run. Not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    settings = {"tuner": "prefix", "rank": None, "prefix_tokens": 5, "layers": "all", "base_precision": "fp32"}
    run(write_plan(folder, checkpoint_folder, epochs=2.0, learning_rate=3e-2, **settings), folder / "train")
    return folder / "train"


def test_what_was_trained_is_pefts_own(trained: Path, checkpoint_folder: Path) -> None:
    result = TrainResult.read(trained / "train.json")
    assert result.valid.loss < result.base_valid.loss
    assert {unit.relative_change for unit in result.units} == {None}
    ours = logits(load_tuned(trained, result))
    torch.testing.assert_close(ours, peft_logits(checkpoint_folder, trained, IDS), rtol=1e-5, atol=2e-6)
    assert (ours - logits(load_plain(checkpoint_folder))).abs().max() > 0.02


def test_it_is_scored_as_it_was_trained(trained: Path) -> None:
    result = TrainResult.read(trained / "train.json")
    data = Data.read(result.plan)
    model, compute = load_as_trained(trained, result)
    scores = evaluate(model, find_parts(model), data.valid[:4], data.tokenizer, device=CPU, compute=compute)
    assert scores.loss == pytest.approx(result.valid.loss, rel=1e-6)


def test_layers_that_do_not_train_keep_what_theirs_began_as(checkpoint_folder: Path, tmp_path: Path) -> None:
    settings = {"tuner": "prefix", "rank": None, "prefix_tokens": 4, "layers": "sparse", "trained_layers": "1"}
    run(write_plan(tmp_path, checkpoint_folder, learning_rate=3e-2, **settings), tmp_path / "train")
    result = TrainResult.read(tmp_path / "train" / "train.json")
    assert result.training.resting_layers == (0,)
    base = load_plain(checkpoint_folder)
    ids = start_ids(read_model_spec(str(checkpoint_folder)).vocab_size, result.training)
    with torch.no_grad():
        begun = cache_of(find_parts(base).body(input_ids=ids, use_cache=True)).layers
    saved = load_file(tmp_path / "train" / "adapter_model.safetensors")["prompt_embeddings"]
    halves = saved.chunk(2, dim=1)  # of layers 0 and 1
    for half, layer, same in zip(halves, begun, (True, False), strict=True):
        wanted = torch.cat([each[0].transpose(0, 1).flatten(1) for each in (layer.keys, layer.values)], dim=1)
        assert torch.allclose(half, wanted, atol=1e-6) == same


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_merge_has_it_beside_the_bases_own_bytes(
    share: float, trained: Path, checkpoint_folder: Path, tmp_path: Path
) -> None:
    computes_as_trained(trained, checkpoint_folder, tmp_path / "merged", KV_PREFIX, share, logits)


def test_no_share_of_it_is_between(trained: Path, tmp_path: Path) -> None:
    for shares in (Shares(rest=0.5), Shares(rest=1.0, groups=(Group(first=0, last=0, wise_alpha=0.0),))):
        with pytest.raises(BadInput, match=r"--wise-alpha: a share of .* are there or not.*\n\nhint: use 1, or 0 for"):
            merge(trained, tmp_path / "merged", wise_alpha=shares, progress=silent)
    with pytest.raises(BadInput, match="--sweep: keys and values before the text are there or not"):
        sweep(trained, load_target("onnx-portable-fp32"), select="best")


def by_token(tensors: dict[str, torch.Tensor], change: Any) -> None:
    for name in tensors:
        tensors[name] = change(tensors[name]).contiguous()


def swap(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith(".key")]:
        other = name.replace(".key", ".value")
        tensors[name], tensors[other] = tensors[other], tensors[name]


FAULTS: dict[str, Any] = {
    "shifted by a token": lambda tensors: by_token(tensors, lambda tensor: tensor.roll(1, dims=2)),
    "a token short": lambda tensors: by_token(tensors, lambda tensor: tensor[:, :, 1:]),
    "keys swapped with values": swap,
    "a layer's dropped": lambda tensors: [tensors.pop(name) for name in list(tensors) if ".1." in name],
    "a value a little off": lambda tensors: next(iter(tensors.values()))[0, 0, 0, 0].mul_(1 + 2.0**-20),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_merge_that_is_a_little_off_is_no_merge(
    fault: str, trained: Path, checkpoint_folder: Path, tmp_path: Path
) -> None:
    result = TrainResult.read(trained / "train.json")
    merge(trained, tmp_path / "merged", wise_alpha=1.0, progress=silent)
    tensors = load_file(tmp_path / "merged" / KV_PREFIX)
    FAULTS[fault](tensors)
    save_file(tensors, tmp_path / "merged" / KV_PREFIX)
    assert merged_rung(checkpoint_folder, trained, tmp_path / "merged", result.training, Shares()).problems
    if fault == "a layer's dropped":
        with pytest.raises(BadInput, match="does not fit the model beside it"):
            load_plain(tmp_path / "merged")


def test_what_would_leave_it_out_refuses_the_folder(trained: Path, checkpoint_folder: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    merge(trained, merged, wise_alpha=1.0, progress=silent)
    told = MergedCheckpoint.read(merged / "merged.json").notes
    assert told == (f"other tools than edgeft read the base alone here: the adapters are in {KV_PREFIX}",)
    with pytest.raises(BadInput, match=rf"holds adapters beside its weights \({KV_PREFIX}\), which training would"):
        make_plan(make_job(model=str(merged), profile="cpu-8gb"))


def test_a_peft_prefix_of_others_merges_too(checkpoint_folder: Path, tmp_path: Path) -> None:
    from peft import PrefixTuningConfig

    wrong = r"does not fit the base:\nprompt_embeddings: .* in the fine-tune, the base's"
    others_merge(PrefixTuningConfig("CAUSAL_LM", num_virtual_tokens=4), checkpoint_folder, tmp_path, IDS, wrong)


def test_short_samples_fill_a_batch_with_their_prefixes() -> None:
    """More of them than planned must not have more tokens, those of each one's prefix included."""
    samples = [Sample([1] * 8, [1] * 8, 1) for _ in range(12)]
    groups = list(micro_batches(samples, 2, 2 * (32 + 16), 2 * 31, before=16))
    assert [len(group) for group in groups] == [4, 4, 4]


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "a window": ("mistral", {"sliding_window": 32}, {}, "tuner: layers that see a window of 32 tokens would lose"),
    "capped scores": (
        "gemma2",
        {"sliding_window": None, "query_pre_attn_scalar": 16},
        {},
        "tuner: (attention that caps its scores|layers that see)",
    ),
    "a family that is not known": ("stablelm", {}, {}, "tuner: .* is of no family whose attention is known"),
    "no prefix": ("llama", {}, {"tuner": "lora"}, "prefix_tokens: lora puts no tokens before the text"),
    "a rank": ("llama", {}, {"rank": 8}, "rank: prefix has no factors of a rank"),
    "rounding": ("llama", {}, {"quantize_aware": True, "target": "ort-int4"}, "quantize_aware: "),
    "kept outputs": (
        "llama",
        {},
        {"prefix_cache": True, "layers": "sparse", "active_layers": 1},
        "prefix_cache: .* every layer sees the keys and values of its own prefix",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_is_refused_by_name(why: str, tmp_path: Path) -> None:
    from edgeft.machines.profile import load_profile
    from edgeft.memory.train_step import Workload

    kind, shape, settings, message = REFUSED[why]
    spec: ModelSpec = save_model(tmp_path, kind, **shape)
    values = {"tuner": "prefix", "prefix_tokens": 5, "profile": "cpu-8gb", **settings}
    job = make_job(model=str(tmp_path), **values)
    with pytest.raises(BadInput, match=message) as problem:
        check_job(job, spec)
        list(candidates(job, load_profile("cpu-8gb"), spec, Workload(48, 47), 4, rows_tokens=100))
    assert problem.value.hint


def test_its_tokens_take_the_models_first_positions(checkpoint_folder: Path, tmp_path: Path) -> None:
    most = read_model_spec(str(checkpoint_folder)).max_position_embeddings or 0
    job = {"model": str(checkpoint_folder), "profile": "cpu-8gb", "tuner": "prefix", "layers": "all"}
    with pytest.raises(BadInput, match=rf"prefix_tokens: {most - 7} leave a text 7 of the model's {most} positions"):
        make_plan(make_job(**job, prefix_tokens=most - 7))
    with pytest.raises(
        BadInput, match=f"max_length: {most - 7} is more than the {most - 8} positions behind the prefix"
    ):
        make_plan(make_job(**job, prefix_tokens=8, max_length=most - 7))
    assert make_plan(make_job(**job, prefix_tokens=most - 32)).training.max_length == 32


def test_no_target_without_a_past_is_planned(checkpoint_folder: Path, tmp_path: Path) -> None:
    settings = {"tuner": "prefix", "rank": None}
    with pytest.raises(BadInput, match=r"target ort-int4: runs in ort-genai.*\n\nhint: name onnx-portable-int8 or"):
        write_plan(tmp_path, checkpoint_folder, target="ort-int4", **settings)
    longer = Plan.read(write_plan(tmp_path, checkpoint_folder, prefix_tokens=40, **settings)).stages
    plan = Plan.read(write_plan(tmp_path, checkpoint_folder, prefix_tokens=8, **settings))
    assert plan.stages.context_tokens - longer.context_tokens == 32 and plan.stages.context_limited_by == "model"
    assert plan.stages.context_tokens == (plan.spec.max_position_embeddings or 0) - 8
    cache = [next(term for phase in stages.phases if phase.name == "bundle" for term in phase.terms
                  if term.name == "key-value cache") for stages in (plan.stages, longer)]  # fmt: skip
    assert cache[0].bytes == cache[1].bytes  # of all positions, whoever has them
    assert obstacle(plan.spec, plan.training, 100)[0]
