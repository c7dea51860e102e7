"""Which projections get an adapter: by part or by name, on any family, planned to the byte, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import CONFIGS, HALF, NF4, plan_of, run, save_model

from edgeft.errors import BadInput
from edgeft.memory import train_step
from edgeft.memory.train_step import Workload
from edgeft.merging.merge import merge
from edgeft.models.checkpoint import Checkpoint, load_plain
from edgeft.models.spec import ModelSpec, read_model_spec
from edgeft.planning.plan import make_plan
from edgeft.planning.projections import target_modules
from edgeft.progress import silent
from edgeft.reporting.words import method_text
from edgeft.settings.job import make_job
from edgeft.simulation.simulate import simulate

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
CHOICES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    # what: config, setting, projections
    "all": ("llama-3.2-1b", "all", (*ATTENTION, *MLP)),
    "attention": ("llama-3.2-1b", "attention", ATTENTION),
    "mlp": ("llama-3.2-1b", "mlp", MLP),
    "names, in any order": ("llama-3.2-1b", "v_proj, q_proj", ("q_proj", "v_proj")),
    "a part and a name": ("llama-3.2-1b", "attention,down_proj", (*ATTENTION, "down_proj")),
    "twice the same": ("llama-3.2-1b", "mlp,up_proj", MLP),
    "a name of two": ("gpt2", "c_proj", ("attn.c_proj", "mlp.c_proj")),
    "one of the two": ("gpt2", "mlp.c_proj", ("mlp.c_proj",)),
    "one projection of all that ask": ("gpt2", "attention", ("c_attn", "attn.c_proj")),
}


def spec_of(name: str) -> ModelSpec:
    return read_model_spec(str(CONFIGS / name))


@pytest.mark.parametrize("name", CHOICES)
def test_a_job_chooses_by_part_or_name(name: str) -> None:
    config, setting, expected = CHOICES[name]
    made = make_plan(make_job(model=str(CONFIGS / config), profile="cpu-16gb", target_modules=setting))
    assert made.training.target_modules == expected and made.training.tuner == "lora"
    counted = sum(made.training.rank * (linear.in_features + linear.out_features)
                  for linear in made.spec.linears if linear.name in expected)  # fmt: skip
    assert train_step.trained_parameters(made.spec, made.training) == counted * made.spec.num_hidden_layers


def test_a_plan_names_them_where_they_are_not_all() -> None:
    few, every = (
        make_plan(make_job(model=str(CONFIGS / "llama-3.2-1b"), profile="t4", **more))
        for more in ({"target_modules": "q_proj,v_proj"}, {})
    )
    assert "q_proj, v_proj alone" in method_text(few) and "alone" not in method_text(every)
    assert few.need_bytes < every.need_bytes


def test_other_tuners_are_compared_in_the_same_projections_where_they_can_have_them() -> None:
    same = {"model": str(CONFIGS / "llama-3.2-1b"), "profile": "t4", "tuner": "lora", "micro_batch_size": 1,
            "checkpointing": True, "kept_layers": 0}  # fmt: skip
    made, every = (make_plan(make_job(**same, **more), compare_tuners=True) for more in ({"target_modules": "mlp"}, {}))
    assert not [row for row in made.tuners if "target_modules" in row.refused]
    here, there = ({row.tuner: row for row in plan.tuners if not row.refused} for plan in (made, every))
    assert {"dora", "adalora", "ia3", "adapter"} <= here.keys()
    assert here["dora"].high_bytes < there["dora"].high_bytes


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_modules": "q_porj"}, r"target_modules: a layer of this model has no projection 'q_porj'"
                                       r"\n\nhint: did you mean 'q_proj'\?; it has q_proj, k_proj, v_proj, o_proj, "),
        ({"target_modules": "lm_head"}, "no projection 'lm_head'"),
        ({"target_modules": "q_proj,,"}, "expected names with commas between them"),
        ({"target_modules": ""}, "expected names with commas between them"),
        ({"target_modules": ()}, "target_modules: .*at least 1"),
        ({"target_modules": "mlp", "tuner": "ia3"}, "target_modules: chooses the projections of lora, dora, adalora; "
                                                    "where ia3 lies is part of what it is"),
        ({"target_modules": "mlp", "tuner": "full"}, "target_modules: chooses the projections of"),
        ({"target_modules": "mlp", "tuner": "prefix"}, "target_modules: chooses the projections of"),
        ({"target_modules": "mlp", "tuner": "adapter"}, "target_modules: chooses the projections of"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        make_plan(make_job(model=str(CONFIGS / "llama-3.2-1b"), profile="t4", **settings))


STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    # family and what is changed of a LoRA plan in fp32
    "MLP": ("llama", {"target_modules": MLP}),
    "MLP, recomputed": ("llama", {"target_modules": MLP, "checkpointing": True, "batch_size": 4}),
    "last of attention": ("llama", {"target_modules": ("o_proj",)}),
    "second of the MLP": ("llama", {"target_modules": ("up_proj",)}),
    "first of the MLP, bf16": ("llama", {"target_modules": ("gate_proj",), **HALF}),
    "queries and values on NF4": ("llama", {"target_modules": ("q_proj", "v_proj"), **NF4}),
    "DoRA, attention, NF4, recomputed": (
        "llama", {"tuner": "dora", "target_modules": ATTENTION, **NF4, "checkpointing": True}
    ),
    "AdaLoRA, MLP": ("llama", {"tuner": "adalora", "target_modules": MLP}),
    "PiSSA, last of the MLP": ("llama", {"init": "pissa", "target_modules": ("down_proj",)}),
    "GPT-2, both last ones": ("gpt2", {"target_modules": ("attn.c_proj", "mlp.c_proj")}),
    "Qwen3, keys": ("qwen3", {"target_modules": ("k_proj",)}),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_closed_form_equals_the_simulated_step(name: str, tmp_path: Path) -> None:
    kind, changes = STEPS[name]
    spec, work = save_model(tmp_path, kind), Workload(48, 47)
    training = plan_of(spec, range(2), **changes)
    closed = sum(term.bytes for term in train_step.step_terms(spec, training, work))
    assert closed == pytest.approx(simulate(spec, training, work).live_peak_bytes, rel=0.01)


@pytest.mark.parametrize("tuner", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_a_run_changes_these_alone_and_peft_reads_it(
    tuner: str, plan_file: Callable[..., Path], checkpoint_folder: Path, tmp_path: Path
) -> None:
    run(plan_file(tuner=tuner, target_modules="mlp", rank=4, max_steps=3), tmp_path / "train")
    config = json.loads((tmp_path / "train" / "adapter_config.json").read_text())
    assert {name.rsplit(".", 1)[1] for name in config["target_modules"]} == set(MLP)
    saved = load_file(tmp_path / "train" / "adapter_model.safetensors")
    assert all(any(f".{name}." in key for name in MLP) for key in saved)
    merge(tmp_path / "train", tmp_path / "merged", wise_alpha=1.0, progress=silent)
    before, after = Checkpoint(checkpoint_folder), Checkpoint(tmp_path / "merged")
    changed = {name for name in before.owner if not torch.equal(before.read(name), after.read(name))}
    layers = spec_layers(checkpoint_folder)
    assert changed == {f"model.layers.{i}.mlp.{name}.weight" for i in range(layers) for name in MLP}
    theirs = PeftModel.from_pretrained(load_plain(checkpoint_folder), tmp_path / "train").eval()
    ids = torch.tensor([[3, 9, 4, 7]])
    with torch.no_grad():
        expected = theirs(input_ids=ids, use_cache=False).logits
        merged = load_plain(tmp_path / "merged")(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


def spec_layers(folder: Path) -> int:
    return read_model_spec(str(folder)).num_hidden_layers


def test_a_tuners_own_places_are_as_before() -> None:
    spec = spec_of("llama-3.2-1b")
    assert target_modules(spec, "lora") == (*ATTENTION, *MLP) and target_modules(spec, "full") == ()
    assert target_modules(spec, "ia3") == ("k_proj", "v_proj", "down_proj")
