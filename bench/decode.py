"""How fast is the bundle on this CPU beside llama.cpp and PyTorch, on the same weights?

    make bench-decode

SmolLM2-135M's shape with random weights (30 layers, hidden 576, vocabulary 49,152, tied), a prompt of 512 tokens and
128 more after it (PyTorch: 32 more, and one thread alone: it takes minutes). Each runtime is a process of its own,
loaded once for the memory it takes and then asked in turn, a round at a time, so that other work on the machine meets
all of them. Wall time says what a user sees; tokens per second of the process's own CPU time is what can be compared on
a busy machine, for one thread (waiting threads spin). It needs pip install "edgeft[gguf,llama]".
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy

PROMPT, NEW, NEW_TORCH = 512, 128, 32
ROUNDS = 4
ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("ort-int4", "gguf-q4_0", "gguf-q4_k_m")
FORMS = {1: (*TARGETS, "torch-fp32"), 2: TARGETS}  # threads: what is compared
REFERENCE = "gguf-q4_0"


def busy_ticks() -> float:
    """CPU seconds of the whole machine so far; 0 where no /proc tells them."""
    try:
        fields = [int(text) for text in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    except OSError:
        return 0.0
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def serve(form: str, path: str) -> None:
    """Answer each line of standard input with one sample as JSON, as a process of its own."""
    sys.path.insert(0, str(ROOT / "export"))
    import run

    load = time.perf_counter()
    ids = [(7 * i) % 4000 + 3 for i in range(PROMPT)]
    start, step = torch_model(path) if form == "torch-fp32" else bundle_model(run, Path(path))
    load = time.perf_counter() - load
    print(json.dumps({"load_seconds": round(load, 2)}), flush=True)
    for line in sys.stdin:
        count = int(line)
        marks = [(time.perf_counter(), time.process_time(), busy_ticks())]
        token = start(ids)
        marks.append((time.perf_counter(), time.process_time(), busy_ticks()))
        for _ in range(count):
            token = step(token)
        marks.append((time.perf_counter(), time.process_time(), busy_ticks()))
        sample: dict[str, Any] = {"peak_bytes": run.peak_memory_bytes(), "load_average": os.getloadavg()[0]}
        for name, tokens, before, after in (
            ("prefill", PROMPT, marks[0], marks[1]), ("decode", count, marks[1], marks[2])
        ):  # fmt: skip
            wall, cpu, machine = (after[i] - before[i] for i in range(3))
            sample[f"{name}_per_second"] = tokens / wall
            sample[f"{name}_per_cpu_second"] = tokens / cpu
            sample[f"{name}_cores_others"] = round(max(0.0, machine - cpu) / wall, 2)
        print(json.dumps(sample), flush=True)


def bundle_model(run: Any, bundle: Path) -> tuple[Any, Any]:
    """(ids to the first token, token to the next) of a bundle, by the session of its own run.py."""
    runner = run.Runner(bundle)
    session: list[Any] = []

    def start(ids: list[int]) -> int:
        session[:] = []
        session[:] = [runner.engine.start(PROMPT + NEW + 1)]
        for at in range(0, len(ids), run.PREFILL_TOKENS):
            last = session[0].append(ids[at : at + run.PREFILL_TOKENS])
        return int(last.argmax())

    return start, lambda token: int(session[0].append([token]).argmax())


def torch_model(folder: str) -> tuple[Any, Any]:
    """The same of transformers' model in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cache: list[Any] = [None]

    @torch.no_grad()
    def forward(ids: list[int], past: Any) -> int:
        made = model(input_ids=torch.tensor([ids]), past_key_values=past, use_cache=True, logits_to_keep=1)
        cache[0] = made.past_key_values
        return int(made.logits[0, -1].argmax())

    return lambda ids: forward(ids, None), lambda token: forward([token], cache[0])


def read_bandwidth() -> float:
    """Bytes that one thread reads per second of its own CPU time: the best of eight sums of 256 MiB."""
    array, best = numpy.ones(2**25), 0.0
    for _ in range(8):
        start = time.process_time()
        array.sum()
        best = max(best, array.nbytes / (time.process_time() - start))
    return best


def build(scratch: Path) -> dict[str, tuple[Path, int]]:
    """(what is loaded, weight bytes that a token reads) of every form."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from edgeft.exporting.build import build_bundle
    from edgeft.targets.target import load_target

    model = scratch / "model"
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(ROOT / "examples" / "configs" / "smollm2-135m")
    config.eos_token_id = config.bos_token_id = 0
    made = AutoModelForCausalLM.from_config(config)
    made.save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(ROOT / "examples" / "debian-tiny" / name, model / name)
    forms = {"torch-fp32": (model, 4 * sum(parameter.numel() for parameter in made.parameters()))}
    for name in TARGETS:
        target = load_target(name)
        bundle = build_bundle(model, target, scratch / name, prompts=[], measure=False)
        forms[name] = (scratch / name, bundle.weight_bytes_per_token)
        print(f"built {name}, {bundle.size_bytes / 1e6:.1f} MB", flush=True)
    return forms


def compare(forms: dict[str, tuple[Path, int]], threads: int) -> list[dict[str, Any]]:
    """The samples of every form in every round, in turn; each round begins with another form."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    processes, samples = {}, []
    for form in FORMS[threads]:
        command = [sys.executable, "-u", __file__, form, str(forms[form][0])]
        processes[form] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        ask(processes[form])  # loaded
    for number in range(ROUNDS + 1):
        first = number % len(processes)
        for form in [*processes][first:] + [*processes][:first]:
            pipe = processes[form].stdin
            assert pipe is not None
            count = NEW_TORCH if form == "torch-fp32" else NEW
            pipe.write(f"{count if number else 8}\n")
            pipe.flush()
            sample = {"form": form, "threads": threads, "round": number, **ask(processes[form])}
            if number > 0:  # the first one warms up
                samples.append(sample)
        print(f"{threads} threads, round {number} of {ROUNDS}, load {os.getloadavg()[0]:.1f}", flush=True)
    for process in processes.values():
        process.communicate("")
    return samples


def ask(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{process.args} ended with {process.wait()}")
    return json.loads(line)  # type: ignore[no-any-return]


def median_and_range(values: list[float]) -> dict[str, float]:
    return {key: float(f"{value:.4g}") for key, value in
            (("median", statistics.median(values)), ("lowest", min(values)), ("highest", max(values)))}  # fmt: skip


def summarise(
    samples: list[dict[str, Any]], forms: dict[str, tuple[Path, int]], bandwidth: float
) -> list[dict[str, Any]]:
    """A row per form: medians, spread, and the ratio to llama.cpp's Q4_0 within each round."""
    rows = []
    rounds = {(each["form"], each["round"]): each for each in samples}
    for form in dict.fromkeys(each["form"] for each in samples):
        mine = [each for each in samples if each["form"] == form]
        row: dict[str, Any] = {"form": form, "threads": mine[0]["threads"], "weight_bytes_per_token": forms[form][1],
                               "peak_bytes": max(each["peak_bytes"] for each in mine)}  # fmt: skip
        keys = [f"{phase}_per_{unit}" for phase in ("prefill", "decode") for unit in ("second", "cpu_second")]
        for key in keys:
            row[key] = median_and_range([each[key] for each in mine])
            ratios = [each[key] / rounds[REFERENCE, each["round"]][key] for each in mine]
            row[f"{key}_of_{REFERENCE}"] = median_and_range(ratios)
        row["cores_others"] = statistics.median(each["decode_cores_others"] for each in mine)
        if row["threads"] == 1:
            row["fraction_of_bandwidth"] = round(row["decode_per_cpu_second"]["median"] * forms[form][1] / bandwidth, 3)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| threads | | prefill/s | decode/s | prefill/CPU s | decode/CPU s | of Q4_0: prefill | decode | peak |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        clock = "cpu_second" if row["threads"] == 1 else "second"
        cells = [
            row[f"{phase}_per_{unit}"]["median"] for unit in ("second", "cpu_second") for phase in ("prefill", "decode")
        ]
        ratios = [row[f"{phase}_per_{clock}_of_{REFERENCE}"]["median"] for phase in ("prefill", "decode")]
        numbers = [f"{cell:.0f}" if cell > 99 else f"{cell:.1f}" for cell in cells] + [
            f"{ratio:.2f}" for ratio in ratios
        ]
        lines.append(
            f"| {row['threads']} | {row['form']} | " + " | ".join(numbers) + f" | {row['peak_bytes'] >> 20} MiB |"
        )
    return "\n".join(lines)


def main() -> None:
    import llama_cpp
    from run import record

    from edgeft.machines.limits import usable_cores

    rows, samples, bandwidth = [], [], read_bandwidth()
    with tempfile.TemporaryDirectory() as scratch:
        forms = build(Path(scratch))
        for threads in (1, 2)[: usable_cores()]:
            found = compare(forms, threads)
            samples += found
            rows += summarise(found, forms, bandwidth)
            result = {
                "prompt_tokens": PROMPT, "new_tokens": NEW, "new_tokens_torch": NEW_TORCH, "rounds": ROUNDS,
                "llama_cpp": {"version": llama_cpp.__version__, "system": llama_cpp.llama_print_system_info().decode()},
                "read_bandwidth_bytes_per_second": bandwidth, "rows": rows, "samples": samples,
            }  # fmt: skip
            record("decode", result)
    print(table(rows))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        serve(sys.argv[1], sys.argv[2])
    else:
        main()
