"""Any adapter that a weight can hold, folded as PEFT's own live model computes it; all others refused by name."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import OTHERS, TUNERS, logits, peft_model, shaken
from safetensors.torch import load_file, save_file

from edgeft.errors import BadInput
from edgeft.merging.change import Change
from edgeft.merging.merge import merge
from edgeft.merging.result import MergedForeign
from edgeft.models import headers
from edgeft.models.checkpoint import Checkpoint, load_plain
from edgeft.models.headers import blocks
from edgeft.progress import silent

UNTIED = {"tied: lora of embedding", "tied: lora of head", "tied: embedding saved", "tied: head saved",
          "gpt2: lora of head", "gpt2: embedding saved"}  # fmt: skip

# merge_and_unload adds to the one tensor that head and embedding share, so that each gets the other's change
PEFT_FOLDS_TWICE = {"tied: lora of embedding", "tied: lora of head", "tied: lora of both", "gpt2: lora of head"}


@pytest.mark.parametrize("case", TUNERS)
def test_folded_as_the_live_model_computes(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases[TUNERS[case][0]]
    model = peft_model(case, base)
    live = logits(model)
    assert (live - logits(load_plain(base))).abs().max() > 0.05, "the case must change something"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "adapter")
    weights = {}
    for alpha in (0.0, 0.5, 1.0):
        merged = merge(tmp_path / "adapter", tmp_path / f"{alpha}", wise_alpha=alpha, progress=silent, base=str(base))
        assert isinstance(merged, MergedForeign) and merged.base == str(base)
        assert merged.untied_head == (case in UNTIED and alpha > 0)
        weights[alpha] = load_file(tmp_path / f"{alpha}" / "model.safetensors")
        weights[alpha].setdefault(
            "lm_head.weight",
            next(v for n, v in weights[alpha].items() if n.endswith(("embed_tokens.weight", "wte.weight"))),
        )
    original = load_file(base / "model.safetensors")
    assert all(torch.equal(weights[0.0][name], tensor) for name, tensor in original.items())
    for name, tensor in weights[0.5].items():
        torch.testing.assert_close(tensor, (weights[0.0][name] + weights[1.0][name]) / 2, rtol=0, atol=1e-6)
    reloaded = load_plain(tmp_path / "1.0")
    torch.testing.assert_close(logits(reloaded), live, rtol=1e-4, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_peft = model.merge_and_unload().state_dict()
    if case in PEFT_FOLDS_TWICE:
        return
    mine = reloaded.state_dict()
    for name, tensor in by_peft.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", OTHERS)
def test_rarer_kinds_are_folded_by_peft_itself(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    import peft

    name, options = OTHERS[kind]
    config = getattr(peft, name)(**{"target_modules": ["q_proj", "o_proj"], **options})
    model = peft.get_peft_model(load_plain(bases["llama"]), config)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    shaken(model, lambda name: name in trained, by=0.1)
    model.save_pretrained(tmp_path / "adapter")
    live = logits(model.eval())
    merged = merge(tmp_path / "adapter", tmp_path / "1", wise_alpha=1.0, progress=silent, base=str(bases["llama"]))
    assert merged.kind == kind and merged.changed_tensors >= 3
    torch.testing.assert_close(logits(load_plain(tmp_path / "1")), live, rtol=1e-4, atol=1e-4)


def test_a_rarer_adapter_that_lost_a_tensor_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    """PEFT would leave what it does not find at its first values, with a warning."""
    import peft

    model = peft.get_peft_model(load_plain(bases["llama"]), peft.LoHaConfig(target_modules=["q_proj"], r=2))
    model.save_pretrained(str(tmp_path / "adapter"))
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[next(name for name in tensors if "hada_w1_a" in name)]
    save_file(tensors, path)
    with pytest.raises(BadInput, match=r"cannot be folded by PEFT: Found missing adapter keys .*hada_w1_a"):
        merge(tmp_path / "adapter", tmp_path / "1", wise_alpha=1.0, progress=silent, base=str(bases["llama"]))


def test_blocks_change_no_result(bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors computed a few rows at a time are those computed whole, norms over columns included."""
    for case in ("gpt2: dora", "dora of embedding", "tokens", "gpt2: ia3", "modules saved"):
        base = bases[TUNERS[case][0]]
        model = peft_model(case, base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(tmp_path / case)
        tensors = []
        for size in (8 * 2**20, 4 * 32 * 5):
            monkeypatch.setattr(headers, "BLOCK_BYTES", size)
            merge(tmp_path / case, tmp_path / "out", wise_alpha=0.7, progress=silent, base=str(base))
            tensors.append(load_file(tmp_path / "out" / "model.safetensors"))
        assert len(list(blocks((96, 32)))) > 10
        for name, tensor in tensors[0].items():
            torch.testing.assert_close(tensors[1][name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["dora", "modules saved", "biases of all"])
def test_half_precision_base_is_rounded_once(
    case: str, dtype: torch.dtype, bases: dict[str, Path], tmp_path: Path
) -> None:
    """Merging into a half base = merging into the same values in fp32, rounded to the base's dtype: bit for bit."""
    half = load_plain(bases["llama"]).to(dtype)
    half.save_pretrained(tmp_path / "half", max_shard_size="20KB")
    half.float().save_pretrained(tmp_path / "wide")
    model = peft_model(case, tmp_path / "wide")
    model.save_pretrained(tmp_path / "adapter")
    for alpha in (0.3, 1.0):
        merge(tmp_path / "adapter", tmp_path / "out", wise_alpha=alpha, progress=silent, base=str(tmp_path / "half"))
        merge(tmp_path / "adapter", tmp_path / "fp32", wise_alpha=alpha, progress=silent, base=str(tmp_path / "wide"))
        out, wide = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "fp32")
        assert len(out.files) > 2 and out.owner.keys() == wide.owner.keys()
        assert all(torch.equal(out.read(name), wide.read(name).to(dtype)) for name in out.owner)


def test_adalora_after_ranks_were_taken_away(bases: dict[str, Path], tmp_path: Path) -> None:
    from peft import PeftModel

    model = peft_model("adalora", bases["llama"])
    config = model.peft_config["default"]
    names = [name.removesuffix(".default") for name, _ in model.base_model.model.named_parameters() if "lora_E" in name]
    config.rank_pattern = {name: [True, False, i % 2 == 0, False] for i, name in enumerate(names)}
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_plain(bases["llama"]), tmp_path / "adapter").eval()
    merge(tmp_path / "adapter", tmp_path / "merged", wise_alpha=1.0, progress=silent, base=str(bases["llama"]))
    torch.testing.assert_close(logits(load_plain(tmp_path / "merged")), logits(again), rtol=1e-4, atol=1e-4)


def test_a_fine_tuned_checkpoint_of_another_tool(bases: dict[str, Path], tmp_path: Path) -> None:
    tuned = load_plain(bases["tied"])
    shaken(tuned)
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="30KB")
    merged = merge(tmp_path / "tuned", tmp_path / "merged", wise_alpha=1.0, progress=silent, base=str(bases["tied"]))
    assert merged.kind == "checkpoint" and not merged.untied_head
    mine, theirs = Checkpoint(tmp_path / "merged"), Checkpoint(tmp_path / "tuned")
    assert all(torch.equal(mine.read(name), theirs.read(name)) for name in theirs.owner)


def test_the_adapter_names_its_base(bases: dict[str, Path], tmp_path: Path) -> None:
    peft_model("lora", bases["llama"]).save_pretrained(tmp_path / "adapter")
    merged = merge(tmp_path / "adapter", tmp_path / "merged", wise_alpha=1.0, progress=silent)
    assert isinstance(merged, MergedForeign) and merged.base == str(bases["llama"])


def test_pickled_adapter_of_an_older_tool(bases: dict[str, Path], tmp_path: Path) -> None:
    peft_model("dora", bases["llama"]).save_pretrained(tmp_path / "adapter")
    for name in ("one", "two"):
        merge(tmp_path / "adapter", tmp_path / name, wise_alpha=0.4, progress=silent, base=str(bases["llama"]))
        if name == "one":
            file = tmp_path / "adapter" / "adapter_model.safetensors"
            torch.save(load_file(file), tmp_path / "adapter" / "adapter_model.bin")
            file.unlink()
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'echo'\ntR.")
    with pytest.raises(
        BadInput, match=r"adapter_model.bin: cannot be read: .*\n\nhint: save the adapter as safetensors"
    ):
        merge(tmp_path / "adapter", tmp_path / "two", wise_alpha=1.0, progress=silent, base=str(bases["llama"]))


def adapter(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


Q = "base_model.model.model.layers.0.self_attn.q_proj."
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
FACTORS = {Q + "lora_A.weight": torch.ones(2, 32), Q + "lora_B.weight": torch.ones(32, 2)}


@pytest.mark.parametrize(
    "config, reason",
    [
        ({"peft_type": "CARTRIDGE"}, "a cartridge is a key-value cache before the sequence, which no weight holds"),
        ({"peft_type": "P_TUNING"}, "p-tuning puts virtual tokens"),
        ({"peft_type": "XLORA"}, "X-LoRA mixes its adapters anew for every token\n\nhint: train LoRA, DoRA, IA3"),
        ({"config": {"non_linearity": "relu"}}, "a bottleneck adapter has a non-linearity between its layers"),
        ({"peft_type": "NEWEST"}, r"NEWEST is not known here\n\nhint: merge it with PEFT \(merge_and_unload"),
        ({**LORA, "init_lora_weights": "pissa_niter_4"}, "pissa_niter_4 begins by changing the base's own weights"),
        ({**LORA, "alora_invocation_tokens": [1]}, "activated LoRA works only after its invocation tokens"),
        (
            {**LORA, "target_parameters": ["experts"]},
            "the adapter changes single parameters of mixture-of-experts layers",
        ),
    ],
)
def test_what_no_weight_can_hold_is_refused_by_name(
    config: dict[str, Any], reason: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="is an adapter that cannot be merged: " + reason):
        Change(adapter(tmp_path / "adapter", config, FACTORS), Checkpoint(bases["llama"]), tied=False)


@pytest.mark.parametrize(
    "tensors, problem",
    [
        ({Q + "lora_A.weight": torch.ones(2, 32)}, "q_proj: tensors that make no known adapter: lora_A"),
        ({**FACTORS, Q + "lora_sampler.weight": torch.ones(1)}, "q_proj.lora_sampler.weight: not in the base"),
        ({Q + "lora_A.weight": torch.ones(2, 3, 1, 1), Q + "lora_B.weight": torch.ones(32, 2)}, "only matrices"),
        (
            {"base_model.model.model.embed_tokens.weight": torch.ones(99, 32)},
            r"\(99, 32\) in the fine-tune, \(96, 32\) in the base, 3 more rows\n\nhint: tokens were added",
        ),
        (
            {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 32)},
            r"embed_tokens.weight: \(98, 32\) in the fine-tune, \(96, 32\) in the base",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tensors: dict[str, torch.Tensor], problem: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = adapter(tmp_path / "adapter", {**LORA, "trainable_token_indices": [97]}, tensors)
    with pytest.raises(BadInput, match="does not fit the base:\n.*" + problem):
        Change(folder, Checkpoint(bases["llama"]), tied=False)


def test_dora_without_its_magnitudes(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", {**LORA, "use_dora": True}, FACTORS)
    with pytest.raises(BadInput, match="q_proj: DoRA's magnitudes are missing"):
        Change(folder, Checkpoint(bases["llama"]), tied=False)


def test_peft_says_why_it_cannot_fold(bases: dict[str, Path], tmp_path: Path) -> None:
    import peft

    config = peft.LoHaConfig(r=2, target_modules=["q_proj"])
    peft.get_peft_model(load_plain(bases["llama"]), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(BadInput, match=r"cannot be folded by PEFT: .*\n\nhint: was it trained on this very base"):
        Change(tmp_path / "adapter", Checkpoint(bases["gpt2"]), tied=True)


def test_what_is_no_adapter_at_all(bases: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("[1]")
    with pytest.raises(BadInput, match=r"adapter_config\.json: is no adapter's configuration"):
        Change(tmp_path / "adapter", Checkpoint(bases["llama"]), tied=False)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(LORA))
    with pytest.raises(BadInput, match=r"adapter_model\.safetensors is missing"):
        Change(tmp_path / "adapter", Checkpoint(bases["llama"]), tied=False)
    with pytest.raises(BadInput, match="names no base model"):
        merge(tmp_path / "adapter", tmp_path / "merged", wise_alpha=1.0, progress=silent)
    with pytest.raises(BadInput, match=r"train.json: no such file\n\nhint: run edgeft train PLAN first, or name"):
        merge(tmp_path, tmp_path / "merged", wise_alpha=1.0, progress=silent)
