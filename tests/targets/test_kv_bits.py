"""Bits of a device's KV cache: what a target may say, what a setting makes of it, and what each takes."""

from __future__ import annotations

import pytest
from tiny import CONFIGS

from edgeft.errors import BadInput
from edgeft.machines.profile import load_profile
from edgeft.models.spec import ModelSpec, read_model_spec
from edgeft.planning.plan import make_plan
from edgeft.settings.job import make_job
from edgeft.targets.footprint import bundle_weights, choose_cache, choose_context, kv_cache_bytes, predict
from edgeft.targets.target import Target, load_target
from edgeft.units import show_bytes

INT4, GGUF, PORTABLE = (load_target(name) for name in ("ort-int4", "gguf-q8_0", "onnx-portable-fp32"))


def spec_of(name: str) -> ModelSpec:
    return read_model_spec(str(CONFIGS / name))


def of_8(target: Target) -> Target:
    return Target.model_validate(target.model_dump() | {"kv_bits": 8})


def test_a_quarter_of_the_cache_or_half() -> None:
    spec = spec_of("smollm2-135m")
    elements = 2 * 30 * 3 * 64
    assert [kv_cache_bytes(spec, each, 4096) for each in (INT4, of_8(INT4), GGUF, of_8(GGUF))] == [
        4 * 4096 * elements, 4096 * elements, 2 * 4096 * elements, 4096 * elements * 34 // 32
    ]  # fmt: skip
    weights = bundle_weights(spec, INT4)
    less = predict(spec, INT4, weights, 4096).memory_bytes - predict(spec, of_8(INT4), weights, 4096).memory_bytes
    assert less == 3 * 4096 * elements


def test_windowed_layers_keep_their_window() -> None:
    """16 tokens more than it, as onnxruntime-genai does (tests/exporting/test_kv_cache.py reads them out of it)."""
    spec = spec_of("gemma-2-2b").model_copy(update={"sliding_window": 1024})
    layer = 2 * spec.num_key_value_heads * spec.head_dim * 4
    assert kv_cache_bytes(spec, INT4, 500) == 500 * layer * 26
    assert kv_cache_bytes(spec, INT4, 4000) == (4000 + 1040) * layer * 13
    assert kv_cache_bytes(spec, GGUF, 4000) == 4000 * layer * 13


def test_auto_takes_8_bits_where_the_device_would_hold_less_context_else() -> None:
    spec = spec_of("llama-3.1-8b")
    room = load_profile("raspberrypi5-8gb").budget_bytes
    chosen = choose_cache(INT4, spec, "auto", room)
    assert chosen == of_8(INT4) and choose_context(spec, chosen, bundle_weights(spec, chosen), room)[0] == 4096
    for target, memory in ((INT4, None), (INT4, 64 * 2**30), (PORTABLE, room), (of_8(INT4), 64 * 2**30)):
        assert choose_cache(target, spec, "auto", memory) == target
    assert choose_cache(INT4, spec, "auto", 2**30) == INT4  # neither fits
    assert choose_cache(of_8(INT4), spec, 32, room).kv_bits == 32


def test_the_longest_context_is_exact() -> None:
    spec, target = spec_of("llama-3.1-8b"), INT4.model_copy(update={"context_tokens": 100_000})
    for each in (target, of_8(target)):
        weights = bundle_weights(spec, each)
        for context in (129, 1000, 70_000):
            room = predict(spec, each, weights, context).memory_bytes
            assert choose_context(spec, each, weights, room) == (context, "device memory")
            assert choose_context(spec, each, weights, room - 1)[0] == context - 1


def test_a_plan_says_what_it_took() -> None:
    def stages(**settings: object) -> tuple[object, list[str]]:
        job = {"model": str(CONFIGS / "llama-3.1-8b"), "profile": "t4", "target": "ort-int4"} | settings
        made = make_plan(make_job(**job))
        return made.stages, [note for note in made.notes if "KV cache" in note]

    made, notes = stages(device="raspberrypi5-8gb")
    assert made.target.kv_bits == 8 and made.context_tokens == 4096  # type: ignore[attr-defined]
    (note,) = notes
    assert note.startswith("KV cache of 8 bits: the device holds a context of 4096 tokens instead of one of 1")
    assert "export: calibrate" in {phase.name for phase in made.phases}  # type: ignore[attr-defined]
    made, notes = stages()
    assert made.target.kv_bits is None and notes == []  # type: ignore[attr-defined]
    made, notes = stages(kv_bits="8")
    assert made.target.kv_bits == 8 and notes == []  # type: ignore[attr-defined]
    made, notes = stages(kv_bits="8", device="raspberrypi5-8gb", model=str(CONFIGS / "smollm2-135m"))
    own = stages(kv_bits="32", device="raspberrypi5-8gb", model=str(CONFIGS / "smollm2-135m"))[0]
    cached = [next(term.bytes for term in each.phases[-1].terms if term.name == "key-value cache")
              for each in (own, made)]  # type: ignore[attr-defined]  # fmt: skip
    saved = show_bytes(cached[0] - cached[1])
    assert notes == [f"KV cache of 8 bits: {saved} less; the context has 4096 tokens with it and without"]


@pytest.mark.parametrize(
    ("target", "bits", "said"),
    [
        (PORTABLE, 8, "target onnx-portable-fp32: kv_bits of runtime onnxruntime must be 32"),
        (INT4, 16, "target ort-int4: kv_bits of runtime ort-genai must be 8 or 32"),
        (GGUF, 32, r"target gguf-q8_0: kv_bits of runtime llama\.cpp must be 8 or 16"),
    ],
)
def test_bits_that_a_runtime_has_not_are_refused_by_name(target: Target, bits: int, said: str) -> None:
    with pytest.raises(BadInput, match=f"^{said}$"):
        choose_cache(target, spec_of("smollm2-135m"), bits, None)


def test_heads_that_blocks_of_32_do_not_fill_are_refused() -> None:
    spec = spec_of("smollm2-135m").model_copy(update={"head_dim": 80})
    with pytest.raises(BadInput, match=r"gguf-q8_0: kv_bits 8 are blocks of 32 there, this model's heads are of 80"):
        choose_cache(GGUF, spec, 8, None)
    with pytest.raises(BadInput, match="this model's heads are of 80"):
        choose_cache(of_8(GGUF), spec, "auto", None)
    assert choose_cache(INT4, spec, 8, None).kv_bits == 8


@pytest.mark.parametrize("value", ["4", "eight", "7"])
def test_other_values_of_the_setting_are_refused(value: str) -> None:
    with pytest.raises(BadInput, match="kv_bits: input should be 'auto', 8, 16 or 32, got"):
        make_job(model="m", kv_bits=value)
