"""A live model under `wise` is the checkpoint merged at that share; nothing is copied, all comes back bit for bit."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import IDS, OTHERS, TUNERS, logits, peft_model, shaken

import edgeft
from edgeft.errors import BadInput
from edgeft.machines.meter import LiveBytes
from edgeft.merging.merge import merge
from edgeft.merging.peft_folder import HADAMARD_KIND
from edgeft.merging.wise import LINEAR, wise
from edgeft.models.checkpoint import Checkpoint, load_plain
from edgeft.progress import silent

Bases = dict[str, Path]


def needs_base(case: str) -> bool:
    return case.startswith("biases")


def state(model: Any) -> list[Any]:
    """Everything a block may touch: where each parameter lies, scales, hooks, and what the model says."""
    hooks = [len(module._forward_hooks) for module in model.modules()]
    scales = [copy.copy(module.scaling) for module in model.modules() if hasattr(module, "scaling")]
    places = [(name, parameter.data_ptr()) for name, parameter in model.named_parameters()]
    return [hooks, scales, places, logits(model)]


def same(one: list[Any], other: list[Any]) -> bool:
    return one[:3] == other[:3] and torch.equal(one[3], other[3])


@pytest.mark.parametrize("inject", [False, True], ids=["PeftModel", "injected"])
@pytest.mark.parametrize("case", TUNERS)
def test_wise_is_the_merged_checkpoint(case: str, inject: bool, bases: Bases, tmp_path: Path) -> None:
    folder = bases[TUNERS[case][0]]
    model = peft_model(case, folder, inject)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if inject:
            from peft import get_peft_model_state_dict
            from safetensors.torch import save_file

            tensors = {name: t.clone().contiguous() for name, t in get_peft_model_state_dict(model).items()}
            (tmp_path / "adapter").mkdir()
            config = model.peft_config["default"].to_dict()
            text = json.dumps({k: sorted(v) if isinstance(v, set) else v for k, v in config.items()})
            (tmp_path / "adapter" / "adapter_config.json").write_text(text)
            save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
        else:
            model.save_pretrained(tmp_path / "adapter")
    before = state(model)
    options: dict[str, Any] = {"base": folder} if needs_base(case) else {}
    for alpha in (0.0, 0.35, 1.0):
        merge(tmp_path / "adapter", tmp_path / "merged", wise_alpha=alpha, progress=silent, base=str(folder))
        with wise(model, alpha, **options) as scaled:
            assert scaled is model
            torch.testing.assert_close(logits(model), logits(load_plain(tmp_path / "merged")), rtol=1e-4, atol=1e-4)
            if alpha == 1.0:
                assert torch.equal(logits(model), before[3])
        assert same(state(model), before)
    if not needs_base(case):  # the base itself, bit for bit, not only nearly
        with wise(model, 0.0):
            assert torch.equal(logits(model), logits(load_plain(folder)))


def test_every_kind_that_counts_as_linear_is_tested() -> None:
    assert set(OTHERS) | {"LORA", "ADALORA", "IA3", "TRAINABLE_TOKENS", HADAMARD_KIND} == set(LINEAR)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_of_adapters_against_peft(kind: str, bases: Bases) -> None:
    """Half way is the model whose weights lie half way between the base's and PEFT's merged ones."""
    import peft

    name, options = OTHERS[kind]
    config = getattr(peft, name)(**{"target_modules": ["q_proj", "o_proj"], **options})
    assert config.peft_type.value == kind
    base = load_plain(bases["llama"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = peft.get_peft_model(load_plain(bases["llama"]), config)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        shaken(model, lambda name: name in trained, by=0.1)
        model.eval()
        before = state(model)
        assert (before[3] - logits(base)).abs().max() > 1e-3, "the case must change something"
        with wise(model, 0.5):
            half = logits(model)
        assert same(state(model), before)
        folded = model.merge_and_unload()
    with torch.no_grad():
        for (_, parameter), (_, other) in zip(base.named_parameters(), folded.named_parameters(), strict=True):
            parameter.lerp_(other, 0.5)
    torch.testing.assert_close(half, logits(base), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2"])
def test_weights_that_trained_themselves(kind: str, bases: Bases, tmp_path: Path) -> None:
    model = load_plain(bases[kind])
    shaken(model, lambda name: "layers.1" in name or "h.0" in name or "embed" in name or "wte" in name)
    model.save_pretrained(tmp_path / "tuned")
    before = state(model)
    merge(tmp_path / "tuned", tmp_path / "merged", wise_alpha=0.6, progress=silent, base=str(bases[kind]))
    for base in (bases[kind], str(bases[kind]), Checkpoint(bases[kind])):
        with wise(model, 0.6, base=base):
            assert torch.equal(logits(model), logits(load_plain(tmp_path / "merged")))
        assert same(state(model), before)
    with wise(model, 0.0, base=bases[kind]):
        assert torch.equal(logits(model), logits(load_plain(bases[kind])))
    assert same(state(model), before)
    with wise(load_plain(bases[kind]), 0.5, base=bases[kind]) as untrained:  # no change yet: nothing to scale
        assert torch.equal(logits(untrained), logits(load_plain(bases[kind])))


def test_a_model_that_trains_on_afterwards(bases: Bases) -> None:
    """Gradients and optimizer keep to the same parameters: a step after a block is the step without it."""
    ends = []
    for blocks in (0, 2):
        model = load_plain(bases["llama"]).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            model(input_ids=IDS, labels=IDS).loss.backward()
            for _ in range(blocks):
                with wise(model, 0.5, base=bases["llama"]):
                    logits(model)
            optimizer.step()
            optimizer.zero_grad()
        ends.append(logits(model))
    assert torch.equal(*ends)


@pytest.mark.parametrize("case", ["lora", "dora", "modules saved", "ia3", "tokens"])
def test_nothing_is_copied(case: str, bases: Bases) -> None:
    model = peft_model(case, bases[TUNERS[case][0]])
    where = [parameter.data_ptr() for parameter in model.parameters()]
    with LiveBytes() as live:
        live.count(list(model.parameters()))
        held = live.live_bytes
        with wise(model, 0.5):
            assert live.live_bytes == live.peak_bytes == held
            assert [parameter.data_ptr() for parameter in model.parameters()] == where


def test_half_the_change_is_not_half_the_magnitude(bases: Bases) -> None:
    """PEFT's rescale_adapter_scale scales only LoRA's part: DoRA's magnitudes and saved modules stay as they are."""
    from peft.helpers import rescale_adapter_scale

    model = peft_model("modules saved", bases["llama"])
    with rescale_adapter_scale(model, 0.0):
        theirs = logits(model)
    with wise(model, 0.0):
        ours = logits(model)
    base = logits(load_plain(bases["llama"]))
    assert torch.equal(ours, base) and (theirs - base).abs().max() > 0.1


@pytest.mark.parametrize("case", ["lora", "dora", "modules saved", "full"])
def test_a_block_in_a_block_counts_from_the_fine_tuned_model(case: str, bases: Bases) -> None:
    options: dict[str, Any] = {}
    if case == "full":
        model = load_plain(bases["llama"])
        shaken(model)
        options = {"base": bases["llama"]}
    else:
        model = peft_model(case, bases["llama"])
    before = state(model)
    said = {}
    for alpha in (0.2, 0.8):
        with wise(model, alpha, **options):
            said[alpha] = logits(model)
    with wise(model, 0.8, **options):
        with wise(model, 0.0, **options), wise(model, 0.2, **options):
            assert torch.equal(logits(model), said[0.2])
        assert torch.equal(logits(model), said[0.8])
        with pytest.raises(KeyError), wise(model, 0.2, **options):
            raise KeyError("inside")
        assert torch.equal(logits(model), said[0.8])
    assert same(state(model), before)

    def answers(alpha: float) -> Iterator[torch.Tensor]:
        with wise(model, alpha, **options):
            while True:
                yield logits(model)

    first, second = answers(0.2), answers(0.8)  # blocks that end in the order in which they began
    assert torch.equal(next(first), said[0.2]) and torch.equal(next(second), said[0.8])
    first.close()  # type: ignore[attr-defined]
    assert torch.equal(next(second), said[0.8])
    second.close()  # type: ignore[attr-defined]
    assert same(state(model), before)


def test_generate_and_exceptions(bases: Bases) -> None:
    model = peft_model("dora", bases["llama"])
    before = state(model)
    with pytest.raises(RuntimeError, match="inside"), wise(model, 0.4):
        model.generate(input_ids=IDS[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
        raise RuntimeError("inside")
    assert same(state(model), before)


def test_gradients_are_those_of_the_merged_model(bases: Bases) -> None:
    model = peft_model("dora", bases["llama"])
    embedded = model.get_input_embeddings()(IDS).detach()
    folded = copy.deepcopy(model).merge_and_unload()
    with torch.no_grad():
        base = dict(load_plain(bases["llama"]).named_parameters())
        for name, parameter in folded.named_parameters():
            parameter.copy_(torch.lerp(base[name], parameter, 0.3))
    gradients = []
    for each in (model, folded):
        inputs = embedded.clone().requires_grad_(True)
        with wise(each, 0.3) if each is model else torch.enable_grad():
            each(inputs_embeds=inputs, use_cache=False).logits.square().mean().backward()
        gradients.append(inputs.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["lora", "dora", "modules saved", "tied: tokens", "biases of all"])
def test_on_a_gpu(case: str, bases: Bases) -> None:
    folder = bases[TUNERS[case][0]]
    here, there = peft_model(case, folder), peft_model(case, folder).to("cuda")
    options: dict[str, Any] = {"base": folder} if needs_base(case) else {}
    with torch.no_grad():
        before = there(input_ids=IDS.cuda(), use_cache=False).logits
        for alpha in (0.0, 0.35, 1.0):
            with wise(here, alpha, **options), wise(there, alpha, **options):
                on_gpu = there(input_ids=IDS.cuda(), use_cache=False).logits.cpu()
                torch.testing.assert_close(on_gpu, logits(here), rtol=1e-3, atol=1e-3)
        assert torch.equal(there(input_ids=IDS.cuda(), use_cache=False).logits, before)


def test_exported_from_the_package() -> None:
    assert edgeft.wise is wise and "wise" in edgeft.__all__


def refused(model: Any, message: str, alpha: float = 0.5, **options: Any) -> None:
    before = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(BadInput, match=message), wise(model, alpha, **options):
        raise AssertionError("the block must not run")
    assert before == [p.data_ptr() for p in model.parameters()]


def test_what_cannot_be_scaled_says_why(bases: Bases, tmp_path: Path) -> None:
    import peft

    llama = bases["llama"]
    refused(peft_model("lora", llama), "wise_alpha: must be from 0", alpha=1.01)
    refused(load_plain(llama), "has no adapters\n\nhint: give the checkpoint it began with")
    refused(load_plain(llama), r"does not fit the base:\nmodel\.embed_tokens\.weight: not in the", base=bases["gpt2"])
    refused(peft_model("biases of all", llama), "trains, and nothing says what it was before")
    merged = peft_model("lora", llama)
    merged.merge_adapter()
    refused(merged, r"its adapter is merged into its weights\n\nhint: call model.unmerge_adapter")
    prefix = peft.get_peft_model(
        load_plain(llama), peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    refused(prefix, "its change cannot be scaled: prefix tuning puts keys and values")
    pissa = peft.get_peft_model(
        load_plain(llama), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    )
    refused(pissa, "pissa began by changing the base's own weights")
    beneath = peft_model("dora", llama)
    shaken(beneath, lambda name: name.endswith("layers.0.self_attn.q_proj.base_layer.weight"))
    refused(beneath, "q_proj.weight: trained beneath an adapter that multiplies it", base=llama)
    loaded = load_plain(llama)
    loaded.lm_head = torch.nn.Linear(32, 97, bias=False)
    refused(loaded, r"lm_head.weight: \(97, 32\) in the model, \(96, 32\) in the base", base=llama)
