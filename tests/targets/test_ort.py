"""Is what the export changes in the runtime's graph exactly the graph before, where it has to be?"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

# One session's bundles are shared with test_bundle.
from bundles import bundle, reseal, some_ids

from edgeft.exporting.artifact import ArtifactModel
from edgeft.machines.runner import runner_module
from edgeft.targets.onnx_file import MODEL
from edgeft.targets.ort import LAST, _prune_head, every_position

TARGETS = ["ort-int4", "ort-int8", "ort-fp16", "ort-fp32"]


def graph_of(raw: bytes) -> Any:
    return onnx.load_from_string(raw).graph


def logits_shape(graph: Any) -> list[int | str]:
    found = next(output for output in graph.output if output.name == "logits")
    return [each.dim_param or each.dim_value for each in found.type.tensor_type.shape.dim]


@pytest.mark.parametrize("name", TARGETS)
def test_the_last_logits_are_those_of_the_graph_of_every_position(name: str) -> None:
    ids = some_ids(300)  # more than one pass
    every = ArtifactModel(bundle(name)).logits(ids)
    shipped = runner_module().Runner(bundle(name))
    for length in (1, 2, 20, 300):
        assert np.abs(shipped.last_logits(ids[:length]) - every[length - 1]).max() < 1e-4  # of logits up to 30
    assert shipped.greedy(ids[:20], 12, ()) == ArtifactModel(bundle(name)).greedy(ids[:20], 12, ())


@pytest.mark.parametrize("name", TARGETS)
def test_every_position_is_the_graph_before_pruning(name: str, tmp_path: Path) -> None:
    shipped = graph_of((bundle(name) / MODEL).read_bytes())
    assert logits_shape(shipped)[1] == 1
    assert [node.op_type for node in shipped.node if node.name.startswith(LAST)] == ["Slice", "Gather"]
    shutil.copytree(bundle(name), tmp_path / "b")
    (tmp_path / "b" / MODEL).write_bytes(every_position(bundle(name)))
    before = graph_of((tmp_path / "b" / MODEL).read_bytes())
    assert logits_shape(before)[1] == "sequence_length"
    assert [node for node in before.node if node.name.startswith(LAST)] == []
    _prune_head(tmp_path / "b")
    assert (tmp_path / "b" / MODEL).read_bytes() == (bundle(name) / MODEL).read_bytes()


def test_a_bundle_of_0_2_whose_head_sees_the_last_position_alone_is_read_too(tmp_path: Path) -> None:
    shutil.copytree(bundle("ort-int4"), tmp_path / "b")
    whole = every_position(bundle("ort-int4"))
    model = onnx.load_from_string(whole)
    graph = model.graph
    head = next(node for node in graph.node if node.name.startswith("/lm_head"))
    take = onnx.helper.make_node(
        "Gather", [head.input[0], f"{LAST}/index"], [f"{LAST}/output"], f"{LAST}/Gather", axis=1
    )
    head.input[0] = take.output[0]
    graph.node.insert(list(graph.node).index(head), take)
    graph.initializer.append(onnx.helper.make_tensor(f"{LAST}/index", onnx.TensorProto.INT64, [1], [-1]))
    graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
    (tmp_path / "b" / MODEL).write_bytes(model.SerializeToString(deterministic=True))
    assert every_position(tmp_path / "b") == whole
    reseal(tmp_path / "b", lambda manifest: None)
    runner = runner_module().Runner(tmp_path / "b")
    assert runner.greedy(some_ids(20), 8, ()) == runner_module().Runner(bundle("ort-int4")).greedy(some_ids(20), 8, ())
    with pytest.raises(runner_module().RunError, match="this graph gives those of a pass's last token alone"):
        runner.logits(some_ids(3))


def test_a_graph_without_a_known_head_stays_as_it_is(tmp_path: Path) -> None:
    shutil.copytree(bundle("ort-fp32"), tmp_path / "b")
    model = onnx.load_from_string(every_position(bundle("ort-fp32")))
    for node in model.graph.node:
        node.name = node.name.replace("/lm_head", "/other")
    raw = model.SerializeToString(deterministic=True)
    (tmp_path / "b" / MODEL).write_bytes(raw)
    reseal(tmp_path / "b", lambda manifest: None)
    _prune_head(tmp_path / "b")
    assert (tmp_path / "b" / MODEL).read_bytes() == raw == every_position(tmp_path / "b")
    ids = some_ids(9)  # and the runner takes the last of its logits
    expected = ArtifactModel(bundle("ort-fp32")).logits(ids)[-1]
    assert np.abs(runner_module().Runner(tmp_path / "b").last_logits(ids) - expected).max() < 1e-4


def test_a_bundles_own_graph_does_not_pass_for_one_of_every_position() -> None:
    runner = runner_module().Runner(bundle("ort-fp32"))
    most = runner_module().LAST_POSITIONS
    with pytest.raises(runner_module().RunError, match=r"^logits: this graph gives those of a pass's last 8 tokens"):
        runner.logits(some_ids(most + 1))
    assert runner.logits(some_ids(1)).shape[0] == 1


@pytest.mark.parametrize("name", TARGETS)
def test_the_shipped_graph_gives_the_logits_of_a_passs_last_few_tokens(name: str) -> None:
    ids, most = some_ids(30), runner_module().LAST_POSITIONS
    every = ArtifactModel(bundle(name)).logits(ids)
    runner = runner_module().Runner(bundle(name))
    session = runner.engine.start(40)
    session.append(ids[:-most])
    assert np.abs(session.append(ids[-most:], every=True) - every[-most:]).max() < 1e-4


def test_threads_are_those_asked_for_or_one_per_core(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_module()
    for given, expected in (("3", 3), ("0", runner.usable_cores()), ("x", runner.usable_cores())):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert runner.usable_threads() == expected
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert runner.usable_threads() == runner.usable_cores()


def test_rearranged_weights_are_left_out_only_where_llama_cpp_would_use_amx(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Build:
        def __init__(self, info: bytes) -> None:
            self.info = info

        def llama_print_system_info(self) -> bytes:
            return self.info

    runner = runner_module()
    with_amx, without = Build(b"CPU : AVX512_VNNI = 1 | AMX_INT8 = 1 | REPACK = 1 | "), Build(b"CPU : REPACK = 1 | ")
    for flags, expected in (("avx512f amx_tile amx_int8 avx512_fp16", True), ("avx2 fma", False)):
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : fpu {flags}\n")
        monkeypatch.setattr(runner, "Path", lambda path: tmp_path / "cpuinfo")
        assert runner._uses_amx(with_amx) is expected and runner._uses_amx(without) is False


def test_the_graph_bears_the_builders_version_and_no_commit_of_the_users_repository() -> None:
    """The builder asks git in the folder that its environment stands in, which is a user's project."""
    import onnx
    import onnxruntime_genai

    commit = getattr(onnxruntime_genai, "__commit__", "") or ""
    expected = onnxruntime_genai.__version__ + (f"+{commit[:7]}" if commit else "")
    graph = onnx.load(str(bundle("ort-int4") / "model.onnx"), load_external_data=False)
    assert (graph.producer_name, graph.producer_version) == ("onnxruntime-genai", expected)


@pytest.mark.parametrize(
    ("asked", "threads", "cores", "loadavg", "spins"),
    [
        ("", 2, 2, "0.01 0.1 0.1 1/99 7", True),
        ("", 2, 2, "0.01 0.1 0.1 2/99 7", False),  # somebody else runs now
        ("", 2, 4, "3.00 0.1 0.1 3/99 7", True),
        ("", 1, 4, "0.00 0.0 0.0 1/99 7", False),  # alone there is nobody to wait for
        ("", 4, 2, "0.00 0.0 0.0 1/99 7", False),
        ("", 2, 2, "", False),  # nothing tells
        ("1", 2, 2, "9.00 9.0 9.0 9/99 7", True),
        ("0", 2, 2, "0.00 0.0 0.0 1/99 7", False),
    ],
)
def test_threads_spin_where_each_has_a_core(
    asked: str, threads: int, cores: int, loadavg: str, spins: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_module()
    monkeypatch.setenv("EDGEFT_SPIN", asked)
    monkeypatch.setattr(runner, "usable_cores", lambda: cores)
    if loadavg:
        (tmp_path / "loadavg").write_text(loadavg)
    found = runner.spinning(threads, tmp_path, cores)
    assert found["session.intra_op.allow_spinning"] == ("1" if spins else "0")


def test_a_quota_forbids_spinning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_module()
    monkeypatch.delenv("EDGEFT_SPIN", raising=False)
    monkeypatch.setattr(runner, "usable_cores", lambda: 2)  # of four
    (tmp_path / "loadavg").write_text("0.00 0.0 0.0 1/99 7")
    assert runner.spinning(2, tmp_path, 4)["session.intra_op.allow_spinning"] == "0"
    assert runner.spinning(2, tmp_path, 2)["session.intra_op.allow_spinning"] == "1"
