"""How fast is a bundle on this CPU beside llama.cpp and PyTorch, on the same weights?

    make bench-decode [shape=135m|0.5b|1b]

A published shape with random weights, a prompt of 512 tokens and 128 more after it (PyTorch: 32 more, on one thread
alone). Each form is a process of its own, loaded once and then asked in turn, a round at a time, so that other work on
the machine meets all of them. After that, one form at a time, 512 to 4,096 tokens in the cache: what a longer context
costs in memory and speed. Calibrated codes run in the kernels of ort-int4 and are no form of their own; what `export`
repairs by promoting matrices lies between ort-int4 and ort-int4-mixed.

Figures of a CPU without AVX-512 stand beside those of one that has it. Nothing is recorded where other work took more
than a tenth of a core. It needs pip install "edgeft[gguf,llama]".
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy

PROMPT, NEW, NEW_TORCH = 512, 128, 32
NEW_IN_CONTEXT = 32
MOST_BY_OTHERS = 0.1  # cores
ROOT = Path(__file__).resolve().parent.parent
CACHE_OF_8 = "ort-int4, cache of 8 bits"
REFERENCE = "gguf-q4_0"
TORCH = "torch-fp32"
IN_CONTEXT = ("ort-int4", CACHE_OF_8, REFERENCE)


class Shape(NamedTuple):
    """What is measured of one shape, so that it takes minutes."""

    config: str
    rounds: int
    forms: tuple[str, ...]
    contexts: tuple[int, ...]


SHAPES = {
    "135m": Shape("smollm2-135m", 4, (*IN_CONTEXT, "ort-int4-mixed", "gguf-q4_k_m"), (512, 1024, 2048, 4096)),
    "0.5b": Shape("qwen2.5-0.5b", 3, (*IN_CONTEXT, "ort-int4-mixed", "gguf-q4_k_m"), (512, 4096)),
    "1b": Shape("llama-3.2-1b", 2, IN_CONTEXT, (512, 2048)),
}


def busy_ticks() -> float:
    """CPU seconds of the whole machine so far; 0 where no /proc tells them."""
    try:
        fields = [int(text) for text in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    except OSError:
        return 0.0
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def work_of_others(seconds: float = 3.0) -> float:
    """Cores that are busy while this process waits."""
    before = busy_ticks()
    time.sleep(seconds)
    return (busy_ticks() - before) / seconds


def serve(form: str, path: str) -> None:
    """Answer each line of standard input, "prompt new", with one sample as JSON, as a process of its own."""
    sys.path.insert(0, str(ROOT / "export"))
    import run

    load = time.perf_counter()
    start, step = torch_model(path) if form == TORCH else bundle_model(run, Path(path))
    print(json.dumps({"load_seconds": round(time.perf_counter() - load, 2)}), flush=True)
    for line in sys.stdin:
        prompt, new = map(int, line.split())
        ids = [(7 * i) % 4000 + 3 for i in range(prompt)]
        marks = [(time.perf_counter(), time.process_time(), busy_ticks())]
        token = start(ids, new)
        marks.append((time.perf_counter(), time.process_time(), busy_ticks()))
        for _ in range(new):
            token = step(token)
        marks.append((time.perf_counter(), time.process_time(), busy_ticks()))
        sample: dict[str, Any] = {"peak_bytes": run.peak_memory_bytes(), "load_average": os.getloadavg()[0]}
        for name, tokens, before, after in (
            ("prefill", prompt, marks[0], marks[1]), ("decode", new, marks[1], marks[2])
        ):  # fmt: skip
            wall, cpu, machine = (after[i] - before[i] for i in range(3))
            sample[f"{name}_per_second"] = tokens / wall
            sample[f"{name}_per_cpu_second"] = tokens / cpu
            sample[f"{name}_cores_others"] = round(max(0.0, machine - cpu) / wall, 2)
        print(json.dumps(sample), flush=True)


Start, Step = Callable[[list[int], int], int], Callable[[int], int]


def bundle_model(run: Any, bundle: Path) -> tuple[Start, Step]:
    """(ids to the first token, token to the next) of a bundle, by the session of its own run.py."""
    runner = run.Runner(bundle)
    session: list[Any] = []

    def start(ids: list[int], new: int) -> int:
        session[:] = []
        session[:] = [runner.engine.start(len(ids) + new + 1)]
        for part in run.passes(ids):
            last = session[0].append(part)
        return int(last.argmax())

    return start, lambda token: int(session[0].append([token]).argmax())


def torch_model(folder: str) -> tuple[Start, Step]:
    """The same of transformers' model in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    from edgeft.models.cache_names import cache_argument, cache_of

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cache: list[Any] = [None]

    @torch.no_grad()
    def forward(ids: list[int], past: Any) -> int:
        held = {cache_argument(model): past}
        made = model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1, **held)
        cache[0] = cache_of(made)
        return int(made.logits[0, -1].argmax())

    return lambda ids, new: forward(ids, None), lambda token: forward([token], cache[0])


def read_bandwidth() -> float:
    """Bytes that one thread reads per second of its own CPU time: the best of eight sums of 256 MiB."""
    array, best = numpy.ones(2**25), 0.0
    for _ in range(8):
        start = time.process_time()
        array.sum()
        best = max(best, array.nbytes / (time.process_time() - start))
    return best


def model_of(shape: str, folder: Path) -> int:
    """Write a shape with random weights and the example's tokenizer; the bytes of its weights in fp32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(ROOT / "examples" / "configs" / SHAPES[shape].config)
    config.eos_token_id = config.bos_token_id = 0
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    made.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(ROOT / "examples" / "debian-tiny" / name, folder / name)
    return 4 * sum(parameter.numel() for parameter in made.parameters())


def build(shape: str, scratch: Path, names: Sequence[str]) -> dict[str, tuple[Path, int]]:
    """(what is loaded, weight bytes that a token reads) of these forms, and of PyTorch's."""
    from edgeft.data.rows import read_rows
    from edgeft.data.samples import to_samples
    from edgeft.data.tokenizer import TextTokenizer
    from edgeft.exporting.build import build_bundle
    from edgeft.exporting.kv_scales import find_scales, rows_for_scales
    from edgeft.models.spec import read_model_spec
    from edgeft.targets.footprint import with_kv_bits
    from edgeft.targets.target import load_target

    model = scratch / "model"
    forms = {TORCH: (model, model_of(shape, model))}
    spec, tokenizer = read_model_spec(str(model)), TextTokenizer(model)
    for form in names:
        target, given = load_target(form.partition(",")[0]), dict[str, Any]()
        if form == CACHE_OF_8:
            rows = read_rows(str(ROOT / "examples" / "debian-sections" / "train.jsonl"), tokenizer)[:128]
            target = with_kv_bits(target, spec, 8)
            scales = find_scales(model, target, rows_for_scales(to_samples(rows, tokenizer, None), spec))
            given = {"scales": lambda codes: scales}  # noqa: B023
        bundle = build_bundle(model, target, scratch / form, prompts=[], measure=False, **given)
        forms[form] = (scratch / form, bundle.weight_bytes_per_token)
        print(f"built {form}, {bundle.size_bytes / 1e6:.1f} MB", flush=True)
    return forms


def started(form: str, path: Path, threads: int) -> subprocess.Popen[str]:
    """A process that has loaded a form and waits to be asked."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-u", __file__, "--serve", form, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    answer(process)
    return process


def ask(process: subprocess.Popen[str], prompt: int, new: int) -> dict[str, Any]:
    """One sample."""
    assert process.stdin is not None
    process.stdin.write(f"{prompt} {new}\n")
    process.stdin.flush()
    return answer(process)


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{process.args} ended with {process.wait()}")
    return json.loads(line)  # type: ignore[no-any-return]


def compare(
    forms: dict[str, tuple[Path, int]], names: Sequence[str], threads: int, rounds: int
) -> list[dict[str, Any]]:
    """The samples of every form in every round, in turn; each round begins with another form."""
    processes = {form: started(form, forms[form][0], threads) for form in names}
    samples = []
    for number in range(rounds + 1):
        first = number % len(processes)
        for form in [*processes][first:] + [*processes][:first]:
            new = (NEW_TORCH if form == TORCH else NEW) if number else 8
            sample = {"form": form, "threads": threads, "round": number, **ask(processes[form], PROMPT, new)}
            if number > 0:  # the first one warms up
                samples.append(sample)
        print(f"{threads} threads, round {number} of {rounds}, load {os.getloadavg()[0]:.1f}", flush=True)
    for process in processes.values():
        process.communicate("")
    return samples


def in_context(forms: dict[str, tuple[Path, int]], contexts: Sequence[int], threads: int) -> list[dict[str, Any]]:
    """Each form with each number of tokens in its cache, in a fresh process: its peak is that of one context."""
    found = []
    for tokens in contexts:
        for form in IN_CONTEXT:
            process = started(form, forms[form][0], threads)
            found.append({"form": form, "threads": threads, "tokens": tokens,
                          **ask(process, tokens - NEW_IN_CONTEXT - 1, NEW_IN_CONTEXT)})  # fmt: skip
            process.communicate("")
    return found


def median_and_range(values: list[float]) -> dict[str, float]:
    return {key: float(f"{value:.4g}") for key, value in
            (("median", statistics.median(values)), ("lowest", min(values)), ("highest", max(values)))}  # fmt: skip


def summarise(
    samples: list[dict[str, Any]], forms: dict[str, tuple[Path, int]], bandwidth: float
) -> list[dict[str, Any]]:
    """A row per form: medians, spread, and the ratio to llama.cpp's Q4_0 within each round."""
    rows = []
    rounds = {(each["form"], each["round"]): each for each in samples}
    for form in [name for name in forms if any(each["form"] == name for each in samples)]:
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
    """By wall time, which a quiet machine allows."""
    lines = ["| threads | | prefill/s | decode/s | of Q4_0: prefill | decode | peak |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        numbers = [f"{row[f'{phase}_per_second']['median']:.1f}" for phase in ("prefill", "decode")]
        numbers += [f"{row[f'{phase}_per_second_of_{REFERENCE}']['median']:.2f}" for phase in ("prefill", "decode")]
        lines.append(
            f"| {row['threads']} | {row['form']} | " + " | ".join(numbers) + f" | {row['peak_bytes'] >> 20} MiB |"
        )
    return "\n".join(lines)


def context_table(found: list[dict[str, Any]]) -> str:
    lines = ["| tokens | | prefill/s | decode/s | peak |", "|---|---|---|---|---|"]
    for each in found:
        speeds = f"{each['prefill_per_second']:.1f} | {each['decode_per_second']:.1f}"
        lines.append(f"| {each['tokens']:,} | {each['form']} | {speeds} | {each['peak_bytes'] >> 20} MiB |")
    return "\n".join(lines)


def bench(shape: str, scratch: Path) -> dict[str, Any]:
    """The tables of one shape."""
    from edgeft.machines.limits import usable_cores

    rows, samples, bandwidth, given = [], [], read_bandwidth(), SHAPES[shape]
    forms = build(shape, scratch, given.forms)
    for threads in (1, 2)[: usable_cores()]:
        names = (*given.forms, TORCH) if threads == 1 and shape == "135m" else given.forms
        found = compare(forms, names, threads, given.rounds)
        samples += found
        rows += summarise(found, forms, bandwidth)
    return {"rounds": given.rounds, "read_bandwidth_bytes_per_second": bandwidth, "rows": rows,
            "contexts": in_context(forms, given.contexts, 1), "samples": samples}  # fmt: skip


def key_of(shape: str, features: Sequence[str]) -> str:
    """What a shape's figures are kept under: on a CPU without AVX-512 both runtimes take other kernels."""
    return shape if "avx512f" in features else f"{shape}, AVX2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=list(SHAPES), nargs="?", default="135m")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(*given.serve)
        return
    import llama_cpp
    from run import AT_START, record

    if (others := work_of_others()) > MOST_BY_OTHERS:
        raise SystemExit(f"other work takes {others:.2f} of a core: wait until it takes less than {MOST_BY_OTHERS}")
    with tempfile.TemporaryDirectory() as scratch:
        found = bench(given.shape, Path(scratch))
    print(table(found["rows"]), context_table(found["contexts"]), sep="\n\n")
    if (others := statistics.median(each["decode_cores_others"] for each in found["samples"])) > MOST_BY_OTHERS:
        raise SystemExit(f"not recorded: other work took {others:.2f} of a core meanwhile")
    path = ROOT / "bench" / "results" / "decode.json"
    before = json.loads(path.read_text()).get("shapes", {}) if path.is_file() else {}
    found = {"cpu": {name: AT_START[name] for name in ("cpu", "features")}, **found}
    record("decode", {
        "prompt_tokens": PROMPT, "new_tokens": NEW, "new_tokens_torch": NEW_TORCH,
        "llama_cpp": {"version": llama_cpp.__version__, "system": llama_cpp.llama_print_system_info().decode()},
        "shapes": before | {key_of(given.shape, AT_START["features"]): found},
    })  # fmt: skip


if __name__ == "__main__":
    main()
