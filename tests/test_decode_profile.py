"""The profile of a decoded token: kinds, passes and lines of which the numbers are known, and faults in them."""

from __future__ import annotations

import ctypes
import importlib
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from bundles import bundle
from tiny import BENCH, EXAMPLE

from edgeft.exporting.bundle import Bundle
from edgeft.models.spec import read_model_spec
from edgeft.targets import gguf_file
from edgeft.targets.target import load_target


@pytest.fixture
def profile(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("decode_profile")


GATE, UP = "MatMulNBits /model/layers.3/mlp/gate_proj/MatMul_Q4", "MatMulNBits /model/layers.3/mlp/up_proj/MatMul_Q4"
NORM = "SkipSimplifiedLayerNormalization /model/layers.3/post_attention_layernorm/SkipLayerNorm"


def test_nodes_are_summed_by_kind_and_the_median_token_counts(profile: Any) -> None:
    tokens = [[(GATE, 1000.0 * n), (NORM, 7.0), (UP, 500.0)] for n in (1, 2, 9)]
    found = profile.by_kind(tokens, 0)
    assert found == {
        "gate, up": {"nodes": 2, "milliseconds": 2.5},
        "norms, residuals": {"nodes": 1, "milliseconds": 0.007},
    }
    with pytest.raises(ValueError, match="tokens have different nodes"):
        profile.by_kind([tokens[0], tokens[1][:2]], 0)


@pytest.mark.parametrize(
    "node, runtime, kind",
    [
        ("MatMulNBits /model/layers.0/attn/qkv_proj/MatMul_Q4", 0, "query, key, value"),
        ("MatMulNBits /model/layers.0/mlp/gate_up_proj/MatMul_Q4", 0, "gate, up"),
        ("MatMulNBits /lm_head/MatMul_Q8", 0, "head"),
        ("GroupQueryAttention /model/layers.0/attn/GroupQueryAttention", 0, "attention, cache"),
        ("QuickGelu /model/layers.0/mlp/act_fn/Mul/QuickGeluFusion/", 0, "activation"),
        ("Split /model/layers.0/mlp/gate_up_proj/Split", 0, "activation"),
        ("GatherBlockQuantized /model/embed_tokens/GatherBlockQuantized", 0, "other"),
        ("MUL_MAT Kcur-11", 1, "query, key, value"),
        ("MUL_MAT attn_out-3", 1, "attention's output"),
        ("MUL_MAT kq-3", 1, "attention, cache"),
        ("FLASH_ATTN_EXT __fattn__-3", 1, "attention, cache"),
        ("MUL_MAT ffn_out-3", 1, "down"),
        ("MUL_MAT result_output", 1, "head"),
        ("MUL attn_norm-3", 1, "norms, residuals"),
        ("MUL result_norm", 1, "norms, residuals"),
        ("ADD ffn_inp-3", 1, "norms, residuals"),
        ("SWIGLU ffn_swiglu-3", 1, "activation"),
        ("GET_ROWS inp_embd", 1, "other"),
    ],
)
def test_each_node_is_of_one_kind(profile: Any, node: str, runtime: int, kind: str) -> None:
    assert profile.kind_of(node, runtime) == kind


@pytest.mark.parametrize("node, runtime", [("MatMulNBits /model/layers.0/new_proj/MatMul", 0), ("MUL_MAT new-3", 1)])
def test_a_product_that_is_of_no_kind_is_named(profile: Any, node: str, runtime: int) -> None:
    with pytest.raises(ValueError, match=r"is of no kind: add it to KINDS"):
        profile.kind_of(node, runtime)


def test_nodes_belong_to_the_pass_that_they_ran_in_and_a_prompts_passes_do_not_count(profile: Any) -> None:
    def event(name: str, at: int, took: int, operator: str = "") -> dict[str, Any]:
        kind = {"cat": "Node", "args": {"op_name": operator}} if operator else {"cat": "Session"}
        return {"name": name, "ts": at, "dur": took, **kind}

    events = []
    for start, slow in ((0, 100), (1000, 1), (2000, 3)):
        events += [event("b_kernel_time", start + 50, 4 * slow, "Mul"), event("a_kernel_time", start + 10, slow, "Add")]
        events += [event("SequentialExecutor::Execute", start, 900), event("model_run", start, 950)]
    tokens, whole = profile.ort_tokens(events, 2)
    assert tokens == [[("Add a", 1.0), ("Mul b", 4.0)], [("Add a", 3.0), ("Mul b", 12.0)]] and whole == 0.9


def test_what_a_call_costs_is_seen_on_operations_that_compute_nothing(profile: Any) -> None:
    token = [("VIEW a", 2.0), ("MUL_MAT ffn_up-0", 9.0), ("RESHAPE b", 2.0), ("ADD c", 1.0)]
    kept, cost = profile.without_callback([token, token])
    assert cost == 2.0 and kept == [[("MUL_MAT ffn_up-0", 7.0), ("ADD c", 0.0)]] * 2


def kinds_on_a_line(profile: Any, each: float, rate: float) -> dict[str, dict[str, float]]:
    """Products of four sizes, two of each, that cost so many microseconds and a second for `rate` bytes."""
    sizes = dict(zip(profile.LAYER_PRODUCTS, (350e3, 210e3, 1130e3, 565e3), strict=True))
    return {
        kind: {"nodes": 2, "weight_bytes": 2 * size, "milliseconds": 2 * (each + 1e6 * size / rate) / 1e3}
        for kind, size in sizes.items()
    }


def test_a_line_tells_a_products_own_cost_from_that_of_its_bytes(profile: Any) -> None:
    kinds = kinds_on_a_line(profile, 8.0, 12e9)
    found = profile.line_of(kinds)
    assert found["microseconds_each"] == pytest.approx(8) and found["bytes_per_second"] == pytest.approx(12e9)
    assert found["largest_error"] < 1e-9
    kinds["down"]["milliseconds"] *= 1.5  # planted: a product that is on no line with the others
    assert profile.line_of(kinds)["largest_error"] > 0.05


def test_llama_cpps_operations_are_timed_one_by_one_between_two_calls(
    profile: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library in its place that calls back as it does; `make bench-decode-profile` has the real one."""
    names = {1: (b"VIEW", b"cache_k_l0"), 2: (b"MUL_MAT", b"ffn_up-0"), 3: (b"MUL_MAT", b"result_output")}
    library = types.SimpleNamespace(
        ggml_op_desc=lambda tensor: names[tensor][0], ggml_get_name=lambda tensor: names[tensor][1]
    )
    fake = types.ModuleType("llama_cpp")
    kind = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
    fake.ggml_backend_sched_eval_callback = kind  # type: ignore[attr-defined]
    fake.llama_context_default_params = lambda: types.SimpleNamespace(cb_eval=None)  # type: ignore[attr-defined]
    fake._ggml = types.SimpleNamespace(libggml=library)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)

    clock = [0.0]
    monkeypatch.setattr(profile, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))

    def step(token: int) -> int:
        callback = fake.llama_context_default_params().cb_eval  # type: ignore[attr-defined]
        for tensor, microseconds in ((1, 2.0), (2, 9.0), (3, 5.0)):
            assert callback(tensor, True, None)
            clock[0] += 1e-6 * microseconds
            assert callback(tensor, False, None)
            clock[0] += 1e-3  # what lies between operations is none's
        return token

    monkeypatch.setattr(profile.decode, "bundle_model", lambda run, bundle: (lambda ids, new: len(ids), step))
    found = profile.profile_llama(None, bundle)
    assert {kind: each["nodes"] for kind, each in found["kinds"].items()} == {"gate, up": 1, "head": 1}
    assert found["kinds"]["gate, up"]["milliseconds"] == pytest.approx(0.007)
    assert found["kinds"]["head"]["milliseconds"] == pytest.approx(0.003)
    assert found["microseconds_of_a_call"] == pytest.approx(2)


def nearly_all(profile: Any, found: dict[str, int], whole: int) -> bool:
    """Whether each kind of product reads something, and together all that a token reads but its norms."""
    return set(found) == {*profile.LAYER_PRODUCTS, "head"} and 0.9 * whole < sum(found.values()) <= whole


@pytest.mark.slow
def test_products_read_nearly_all_bytes_that_a_token_reads(profile: Any) -> None:
    whole = Bundle.read(bundle("ort-int4") / "bundle.json").weight_bytes_per_token
    found = profile.ort_bytes(bundle("ort-int4"))
    assert nearly_all(profile, found, whole)
    assert not nearly_all(profile, found, whole // 2)  # planted: a count that takes too much


def test_they_do_so_in_a_gguf_file(profile: Any, tmp_path: Path) -> None:
    gguf_file.build_model(EXAMPLE, load_target("gguf-q4_0"), read_model_spec(str(EXAMPLE)), tmp_path)
    assert nearly_all(profile, profile.gguf_bytes(tmp_path), gguf_file.read_weights(tmp_path).bytes_per_token)
