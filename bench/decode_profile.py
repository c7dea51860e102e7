"""What does a decoded token's time go into, in ONNX Runtime and in llama.cpp, by kinds of operations on one thread?

    make bench-decode-profile

The forms of `make bench-decode` at 135M with random weights, and one that the runtime's builder would make: a layer's
gate and up as one product. A prompt of 512 tokens, 64 more behind it. ONNX Runtime's own profiler gives each
operation's time. llama.cpp has none; its scheduler calls back before and after each operation, and what that costs,
seen on operations that compute nothing, is taken off. Beside the time of each kind: the bytes of weights that it reads,
and how fast that is beside a plain read of memory by the same core. The products of the layers differ in size alone: a
line through their times tells what one costs whatever its size, and what its bytes cost.

Times under a profiler are longer; the whole of a token is measured without one too, in processes of their own.
Nothing is recorded where other work took more than a tenth of a core. It needs pip install "edgeft[gguf,llama]".
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import decode
import numpy
from decode import CACHE_OF_8, MOST_BY_OTHERS, PROMPT, REFERENCE, ROOT, work_of_others

NEW, ROUNDS = 64, 3
JOINED = "ort-int4, gate and up in one"
FORMS = ("ort-int4", CACHE_OF_8, JOINED, REFERENCE)
REST = "other"
# By kind: operator and name of its nodes in ONNX Runtime's graph and in llama.cpp's, tensors of a GGUF file that it
# reads. The first kind that fits is a node's.
KINDS: dict[str, tuple[str, str, str]] = {
    "query, key, value": (r"MatMulNBits .*/attn/(q|k|v|qkv)_proj/.*", r"MUL_MAT [QKV]cur-\d+", r"attn_(q|k|v)"),
    "attention's output": (r"MatMulNBits .*/attn/o_proj/.*", r"MUL_MAT attn_out-\d+", r"attn_output"),
    "gate, up": (r"MatMulNBits .*/mlp/(gate|up|gate_up)_proj/.*", r"MUL_MAT ffn_(gate|up)-\d+", r"ffn_(gate|up)"),
    "down": (r"MatMulNBits .*/mlp/down_proj/.*", r"MUL_MAT ffn_(down|out)-\d+", r"ffn_down"),
    "head": (r"MatMulNBits /lm_head/.*", r"MUL_MAT result_output", r"token_embd|output"),
    "attention, cache": (r"GroupQueryAttention .*", r"(FLASH_ATTN_EXT|ROPE|SET_ROWS|SOFT_MAX|CONT|CPY) .*"
                         r"|MUL_MAT kqv?-\d+", ""),
    "norms, residuals": (r"\w*LayerNormalization .*", r"(RMS_NORM|ADD) .*|MUL (\w*norm\b.*)", ""),
    "activation": (r"(?!MatMul)\w+ .*/mlp/.*", r"(SWIGLU|GEGLU|REGLU|SILU|GELU) .*", ""),
    REST: (r"(?!MatMul)\w+ .*", r"(?!MUL_MAT)\w+ .*", ""),
}  # fmt: skip
LAYER_PRODUCTS = ("query, key, value", "attention's output", "gate, up", "down")
NOTHING = ("NONE", "VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE")  # operations of llama.cpp that compute nothing

Timed = tuple[str, float]  # "operator name" of a node, microseconds


def kind_of(node: str, runtime: int) -> str:
    """A node's kind; `runtime`: 0 ONNX Runtime, 1 llama.cpp. Raises ValueError for a product that is of none."""
    for kind, patterns in KINDS.items():
        if re.fullmatch(patterns[runtime], node):
            return kind
    raise ValueError(f"{node} is of no kind: add it to KINDS")


def by_kind(tokens: Sequence[Sequence[Timed]], runtime: int) -> dict[str, dict[str, float]]:
    """Of each kind its nodes, and the sum of their medians over tokens in milliseconds.

    Raises ValueError where tokens have different nodes.
    """
    names = [[name for name, _ in token] for token in tokens]
    if any(each != names[0] for each in names):
        raise ValueError("tokens have different nodes")
    kinds = [kind_of(name, runtime) for name in names[0]]
    found = {}
    for kind in KINDS:
        at = [i for i, each in enumerate(kinds) if each == kind]
        if at:
            took = sum(statistics.median(token[i][1] for token in tokens) for i in at)
            found[kind] = {"nodes": len(at), "milliseconds": took / 1e3}
    return found


def ort_tokens(events: Iterable[dict[str, Any]], count: int) -> tuple[list[list[Timed]], float]:
    """(nodes of each of the last `count` passes, median milliseconds of a pass) of an ONNX Runtime profile."""
    events = list(events)
    passes = [each for each in events if each["name"] == "SequentialExecutor::Execute"][-count:]
    nodes = [each for each in events if each.get("cat") == "Node" and each["name"].endswith("_kernel_time")]
    nodes.sort(key=lambda each: each["ts"])
    found = []
    for one in passes:
        inside = [each for each in nodes if one["ts"] <= each["ts"] < one["ts"] + one["dur"]]
        named = [(f"{each['args']['op_name']} {each['name'].removesuffix('_kernel_time')}", each) for each in inside]
        found.append([(name, float(each["dur"])) for name, each in named])
    return found, statistics.median(each["dur"] for each in passes) / 1e3


def without_callback(tokens: Sequence[Sequence[Timed]]) -> tuple[list[list[Timed]], float]:
    """(nodes that compute, less what a call costs; that cost in microseconds) of what llama.cpp's callback timed."""
    empty = [time for token in tokens for name, time in token if name.split()[0] in NOTHING]
    cost = statistics.median(empty)
    kept = [[(n, max(0.0, t - cost)) for n, t in token if n.split()[0] not in NOTHING] for token in tokens]
    return kept, cost


def line_of(kinds: dict[str, dict[str, float]]) -> dict[str, float]:
    """What a product of the layers costs whatever its size, and its bytes a second beyond that: least squares."""
    sizes, times = zip(
        *((kinds[kind]["weight_bytes"] / kinds[kind]["nodes"], 1e3 * kinds[kind]["milliseconds"] / kinds[kind]["nodes"])
          for kind in LAYER_PRODUCTS),
        strict=True,
    )  # fmt: skip
    slope, fixed = numpy.polyfit(sizes, times, 1)
    off = max(abs(fixed + slope * size - time) / time for size, time in zip(sizes, times, strict=True))
    return {"microseconds_each": float(fixed), "bytes_per_second": float(1e6 / slope), "largest_error": float(off)}


def ort_bytes(bundle: Path) -> dict[str, int]:
    """Bytes of weights that each kind's products read: codes, scales, zero points."""
    import onnx

    graph = onnx.load(str(bundle / "model.onnx"), load_external_data=False).graph
    sizes = {
        each.name: int({e.key: e.value for e in each.external_data}.get("length", 0)) for each in graph.initializer
    }
    reshaped = {each.output[0]: each.input[0] for each in graph.node if each.op_type == "Reshape"}
    found: dict[str, int] = {}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            kind = kind_of(f"{node.op_type} {node.name}", 0)
            found[kind] = found.get(kind, 0) + sum(sizes.get(reshaped.get(name, name), 0) for name in node.input)
    return found


def gguf_bytes(bundle: Path) -> dict[str, int]:
    """The same of a GGUF file; a tied head is the embedding."""
    import gguf

    tensors = {
        each.name.removesuffix(".weight"): int(each.n_bytes) for each in gguf.GGUFReader(bundle / "model.gguf").tensors
    }
    if "output" in tensors:
        del tensors["token_embd"]
    found = {}
    for kind, (_, _, pattern) in KINDS.items():
        mine = [size for name, size in tensors.items() if pattern and re.fullmatch(rf"(blk\.\d+\.)?({pattern})", name)]
        found |= {kind: sum(mine)} if mine else {}
    return found


def run_ort(run: Any, bundle: Path) -> dict[str, Any]:
    """Decode with ONNX Runtime's profiler on; it writes its file into the working folder when the process ends."""
    spinning = run.spinning
    run.spinning = lambda threads: {**spinning(threads), "enable_profiling": "profile"}
    return {"profiled_milliseconds": decoded(*decode.bundle_model(run, bundle))}


def read_profile(folder: Path) -> dict[str, Any]:
    """Times by kind of the profile that `run_ort` left."""
    (path,) = folder.glob("profile*.json")
    tokens, whole = ort_tokens(json.loads(path.read_text()), NEW)
    found = by_kind(tokens, 0)
    inside = sum(each["milliseconds"] for each in found.values())
    return {"between_nodes_milliseconds": whole - inside, "kinds": found}


def profile_llama(run: Any, bundle: Path) -> dict[str, Any]:
    """Times by kind of a bundle for llama.cpp, in this process."""
    import llama_cpp
    from llama_cpp import _ggml

    library = _ggml.libggml
    for name in ("ggml_op_desc", "ggml_get_name"):
        getattr(library, name).argtypes, getattr(library, name).restype = [ctypes.c_void_p], ctypes.c_char_p
    timed: list[tuple[int, float]] = []
    began = [0.0]

    def called(tensor: int, before: bool, _: Any) -> bool:
        now = time.perf_counter()
        if not before:
            timed.append((tensor, 1e6 * (now - began[0])))
        began[0] = time.perf_counter()
        return True  # each by itself, and go on

    callback, default = llama_cpp.ggml_backend_sched_eval_callback(called), llama_cpp.llama_context_default_params

    def with_callback() -> Any:
        params = default()
        params.cb_eval = callback
        return params

    llama_cpp.llama_context_default_params = with_callback
    start, step = decode.bundle_model(run, bundle)
    tokens: list[list[Timed]] = []
    token = start(prompt(), NEW)
    begin = time.perf_counter()
    for _ in range(NEW):
        timed.clear()
        token = step(token)
        # names while the graph is the one that ran
        tokens.append(
            [(f"{library.ggml_op_desc(t).decode()} {library.ggml_get_name(t).decode()}", us) for t, us in timed]
        )
    wall = 1e3 * (time.perf_counter() - begin) / NEW
    kept, cost = without_callback(tokens)
    return {"profiled_milliseconds": wall, "microseconds_of_a_call": cost, "kinds": by_kind(kept, 1)}


def prompt() -> list[int]:
    return [(7 * i) % 4000 + 3 for i in range(PROMPT)]


def decoded(start: decode.Start, step: decode.Step) -> float:
    """Milliseconds of each of NEW tokens behind the prompt."""
    token = start(prompt(), NEW)
    begin = time.perf_counter()
    for _ in range(NEW):
        token = step(token)
    return 1e3 * (time.perf_counter() - begin) / NEW


def build_joined(model: Path, out: Path) -> tuple[Path, int]:
    """ort-int4 by an option of the runtime's builder that edgeft leaves alone: gate and up become one product."""
    from edgeft.exporting.build import build_bundle
    from edgeft.targets import ort
    from edgeft.targets.target import load_target

    run_builder = ort._run_builder

    def with_option(merged: Path, folder: Path, options: dict[str, Any]) -> int:
        return run_builder(merged, folder, options | {"optimizations": {"fuse_mlp_gate_up": True}})

    ort._run_builder = with_option
    try:
        made = build_bundle(model, load_target("ort-int4"), out, prompts=[], measure=False)
    finally:
        ort._run_builder = run_builder
    return out, made.weight_bytes_per_token


def profiled(form: str, path: Path, scratch: Path) -> dict[str, Any]:
    """What a process of its own finds of a form, with what others took meanwhile."""
    place = scratch / f"profile of {form}"
    place.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--profile", form, str(path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=place, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found if form == REFERENCE else found | read_profile(place)


def whole_tokens(forms: dict[str, tuple[Path, int]]) -> dict[str, list[dict[str, Any]]]:
    """Samples of each form without a profiler, a round at a time."""
    processes = {form: decode.started(form, forms[form][0], 1) for form in FORMS}
    samples: dict[str, list[dict[str, Any]]] = {form: [] for form in FORMS}
    for number in range(ROUNDS + 1):
        for form, process in processes.items():
            sample = decode.ask(process, PROMPT, NEW if number else 8)
            samples[form] += [sample] if number else []  # the first one warms up
    for process in processes.values():
        process.communicate("")
    return samples


def described(
    found: dict[str, Any], sizes: dict[str, int], samples: list[dict[str, Any]], read: float
) -> dict[str, Any]:
    """A form's record: shares of the profiled time, bytes and how fast they are read."""
    kinds = found["kinds"]
    inside = sum(each["milliseconds"] for each in kinds.values())
    for kind, each in kinds.items():
        each["share"] = each["milliseconds"] / inside
        if kind in sizes:
            rate = sizes[kind] / (each["milliseconds"] / 1e3)
            each |= {"weight_bytes": sizes[kind], "bytes_per_second": rate, "of_read_bandwidth": rate / read}
    rates = [sample["decode_per_second"] for sample in samples]
    peak = max(sample["peak_bytes"] for sample in samples)
    return {
        "token_milliseconds": 1e3 / statistics.median(rates),
        "peak_bytes": peak,
        **found,
        "layer_product": line_of(kinds),
    }


def bench(scratch: Path) -> tuple[dict[str, Any], float]:
    """(the record, cores that others took meanwhile)."""
    read = decode.read_bandwidth()
    forms = decode.build("135m", scratch, [form for form in FORMS if form != JOINED])
    forms[JOINED] = build_joined(forms[decode.TORCH][0], scratch / JOINED)
    samples, found = whole_tokens(forms), {}
    for form in FORMS:
        path = forms[form][0]
        sizes = gguf_bytes(path) if form == REFERENCE else ort_bytes(path)
        found[form] = described(profiled(form, path, scratch), sizes, samples[form], read)
    others = statistics.median(each["decode_cores_others"] for every in samples.values() for each in every)
    return {"shape": "135m", "prompt_tokens": PROMPT, "new_tokens": NEW, "threads": 1, "cores_others": others,
            "read_bandwidth_bytes_per_second": read, "forms": found}, others  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """Milliseconds of a token by kind, and the speed of reading."""
    lines = ["| ms of a token | " + " | ".join(found["forms"]) + " |", "|---" * (1 + len(FORMS)) + "|"]
    for kind in KINDS:
        cells = []
        for form in found["forms"].values():
            each = form["kinds"].get(kind)
            rate = f" ({each['bytes_per_second'] / 1e9:.1f} GB/s)" if each and "bytes_per_second" in each else ""
            cells.append(f"{each['milliseconds']:.2f}{rate}" if each else "")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    wholes = [f"{form['token_milliseconds']:.2f}" for form in found["forms"].values()]
    return "\n".join([*lines, "| a token, no profiler | " + " | ".join(wholes) + " |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.profile:
        sys.path.insert(0, str(ROOT / "export"))
        import run as runner

        form, path = given.profile
        print(json.dumps((profile_llama if form == REFERENCE else run_ort)(runner, Path(path))))
        return
    import llama_cpp
    from run import record

    if (others := work_of_others()) > MOST_BY_OTHERS:
        raise SystemExit(f"other work takes {others:.2f} of a core: wait until it takes less than {MOST_BY_OTHERS}")
    with tempfile.TemporaryDirectory() as scratch:
        found, others = bench(Path(scratch))
    print(table(found))
    if others > MOST_BY_OTHERS:
        raise SystemExit(f"not recorded: other work took {others:.2f} of a core meanwhile")
    record("decode_profile", {"llama_cpp": llama_cpp.__version__, **found})


if __name__ == "__main__":
    main()
