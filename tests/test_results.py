"""Do the README's numbers lie in bench/results, and can every file there be made again by a Make target?"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny import BENCH, ROOT

RESULTS = BENCH / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
README = " ".join(" ".join(page.read_text(encoding="utf-8") for page in PAGES).split())
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
# made before a record named its commit; each leaves this list when it is made again
WITHOUT_COMMIT = {"closed_form", "cuda", "large", "lisa", "rates", "sparse", "stages", "sweep",
                  "time"}  # fmt: skip
# drawn from the results of another file
PICTURES = {"methods": "methods", "planner": "planner", "sparse": "sparse", "sweep": "sweep", "survival": "sweep"}
GPU_TRAINERS = ("PEFT", "LitGPT", "torchtune")


def result(name: str) -> dict[str, Any]:
    return dict(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))


def scripts() -> dict[str, str]:
    """Result: the Make target whose script records it."""
    found = {}
    for target, recipe in re.findall(r"^(bench-[a-z0-9-]+):[^\n]*\n((?:\t[^\n]*\n)+)", MAKEFILE, re.M):
        for script in re.findall(r"bench/\w+\.py", recipe):
            for name in re.findall(r'record\(\s*"(\w+)"', (ROOT / script).read_text(encoding="utf-8")):
                found[name] = target
    return found


@pytest.mark.parametrize("path", sorted(RESULTS.iterdir()), ids=lambda path: path.name)
def test_a_make_target_makes_every_result_again(path: Path) -> None:
    made_by = scripts()
    if path.suffix == ".svg":
        assert PICTURES[path.stem] in made_by
        assert any(f"{path.stem}.svg" in script.read_text() for script in (BENCH).glob("*.py"))
        return
    assert path.suffix == ".json" and made_by[path.stem] in MAKEFILE
    environment = result(path.stem)["environment"]
    assert environment["cpu"] and environment["cores"] and {"torch", "transformers"} <= environment["versions"].keys()
    if path.stem not in WITHOUT_COMMIT:
        assert re.fullmatch(r"[0-9a-f]{7,40}", environment["git"]["commit"])


def on_the_device() -> Iterator[str]:
    """What docs/device.md says of speed beside llama.cpp."""
    shapes, full, small = result("decode")["shapes"], "ort-int4", "ort-int4, cache of 8 bits"
    models = {"135m": "135M", "0.5b": "0.5B", "1b": "1.2B"}
    for key, found in shapes.items():
        shape, *narrow = key.split(", ")
        rows = {(row["form"], row["threads"]): row for row in found["rows"]}
        cells = [
            " / ".join(f"{rows[form, n][f'{kind}_per_second_of_gguf-q4_0']['median']:.2f}" for n in (1, 2))
            for kind in ("decode", "prefill")
            for form in (full, small)
        ]
        yield f"| {models[shape]}, {narrow[0] if narrow else 'AVX-512 VNNI'} | {' | '.join(cells)} |"
    contexts = shapes["135m"]["contexts"]
    peaks = {row["form"]: f"{row['peak_bytes'] / 2**20:.0f}" for row in contexts if row["tokens"] == 4096}
    yield f"takes {peaks[full]} MiB at 135M, {peaks[small]} with that cache, llama.cpp {peaks['gguf-q4_0']}"
    yield from in_a_token(full, small)


def in_a_token(full: str, small: str) -> Iterator[str]:
    """The table of what a token's time goes into, and what is said of products."""
    profile = result("decode_profile")
    forms = [profile["forms"][name] for name in (full, small, "gguf-q4_0")]
    for kind in forms[0]["kinds"]:
        cells = [f"{form['kinds'][kind]['milliseconds']:.2f}" for form in forms]
        yield f"| {kind} | {' | '.join(cells)} |"
    here, there = (form["layer_product"] for form in (forms[0], forms[-1]))
    yield f"{here['bytes_per_second'] / 1e9:.1f} and {there['bytes_per_second'] / 1e9:.1f} GB/s"
    yield f"core: {profile['read_bandwidth_bytes_per_second'] / 1e9:.1f})"
    yield f"costs {here['microseconds_each']:.0f} us whatever its size, llama.cpp's {there['microseconds_each']:.0f}"


def emulated() -> Iterator[str]:
    """The table of bundles on an emulated device: tokens that differ from here, at which margins, memory."""
    for name, found in result("emulated")["bundles"].items():
        rows, memory, binding = found["rows"], found["memory"], 2 * found["golden_logit_tolerance"]
        margins = [other["margin_here"] for other in rows["others"]]
        assert not found["problems"] and all(margin <= binding for margin in margins)
        assert not [key for key in found if "seconds" in key]  # those of an emulation under load are no times
        apart = f"{max(margins):.2f}" if margins else "none"
        counts = f"{rows['tokens']} in {rows['rows']} answers | {len(margins)} | {apart} | {rows['close_tokens']}"
        sizes = [memory["emulated_bytes"] - memory["emulator_bytes"], memory["here_bytes"]]
        there, here = (f"{size / 2**20:.0f} MiB" for size in sizes)
        yield f"| {name} | {counts} | {rows['logit_difference']:.2f} | {there} | {here} |"


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}%"


def spread(name: str, runs: int, mean: float, errors: Sequence[float], digits: int = 1) -> tuple[str, str]:
    """The row of the table of errors that begins with `name`."""
    least, most = f"{100 * min(errors):+.1f}%", f"{100 * max(errors):+.1f}%"
    return name, f"| {runs} | {percent(mean, digits)} | {least} | {most} |"


def rows() -> Iterator[tuple[str, str]]:
    """(words of a row of the README's table of errors, what stands behind them), from the records."""
    planner = result("planner")["summary"]["all"]
    ends = [planner["most_under"], planner["most_over"]]
    yield spread("make bench-planner`)", planner["runs"], planner["mean_absolute_error"], ends)
    stages = result("stages")
    errors = [row["error"] for row in stages["rows"]]
    yield spread("make bench-stages`)", len(errors), stages["summary"]["mean_absolute_error"], errors)
    form = result("closed_form")
    errors = [row["error"] for row in form["worst"]]
    yield spread(
        "make bench-closed-form`)", form["summary"]["plans"], form["summary"]["mean_absolute_error"], errors, 2
    )
    published = result("published")["summary"]
    cpu = published["125M on a CPU resident"]
    yield spread("make bench-published`)", cpu["rows"], cpu["mean_absolute_error"], [cpu["least"], cpu["most"]], 2)
    gpu = [published[name] for name in GPU_TRAINERS]
    count = sum(part["rows"] for part in gpu)
    mean = sum(part["rows"] * part["mean_absolute_error"] for part in gpu) / count
    yield spread("PEFT, LitGPT, torchtune", count, mean, [part[end] for part in gpu for end in ("least", "most")])


def on_a_gpu() -> Iterator[str]:
    """The table of a GPU's runs: edgeft beside PEFT + Trainer, and what was planned of steps beside what they took."""
    found = result("cuda")
    measured = {row["run"]: row for row in found["rows"]}
    for name, words in (("1B LoRA bf16", "1B, bf16, 16 x 512"), ("8B LoRA NF4", "8B, NF4, 4 x 1,024")):
        row = measured[f"{name}, beside PEFT + Trainer"]
        ratios = row["ratios"]["trainer"]
        reserved = row["reserved_bytes"] / 2**30
        yield (f"| {words} | {row['seconds_per_step']:.2f} s | {ratios['seconds_per_step']:.2f} | {reserved:.1f} GiB | "
               f"{ratios['reserved_bytes']:.2f} |")  # fmt: skip
    for name, words in (("all", "all"), ("unseen", "of them on which nothing was fitted")):
        part = found["summary"][name]
        yield (f"| {words} | {part['runs']} | {percent(part['mean_error_of_allocated'], 2)} | "
               f"{percent(part['mean_error_of_reserved'])} | {signed(part['worst_error_of_reserved'])} | "
               f"{part['typical_factor_of_seconds']:.2f} |")  # fmt: skip
        assert part["above_high"] == 0
    made = measured["1B made NF4 from its files"]
    assert made["codes_that_differ"] == made["scales_that_differ"] == 0
    yield f"1.24B parameters in {made['seconds_to_make']:.1f} s with {made['host_bytes_more'] / 2**30:.1f} GiB more"


def signed(share: float) -> str:
    return f"{100 * share:+.1f}%"


def real_model() -> Iterator[str]:
    """The table of the model from a package, and what calibration makes up for."""
    tasks = result("smollm2")["tasks"]
    for task, found in tasks.items():
        for name, form in found["forms"].items():
            if name in ("base", "auto"):
                continue
            points, loss = form["exact_match_points_to_merged"], form["row_loss_to_merged"]["difference"]
            moved = f"{points['difference']:+.1f} [{points['low']:+.1f}, {points['high']:+.1f}]"
            row = f"| {task} | {name} | {percent(form['exact_match'])} |"
            size = f" {moved} | {loss:+.3f} | {form['bundle_bytes'] / 2**20:.0f} MiB |" if name != "merged" else ""
            yield row + size
    shares = [percent(found["calibration_recovers_of_nearest_loss"], 0) for found in tasks.values()]
    yield f"Calibration makes up for {' and '.join(shares)} of what"
    assert tasks["sections"]["forms"]["auto"]["target"] == "ort-int4-calibrated"


def sentences() -> Iterator[str]:
    """What the README says in words and small tables, from the records."""
    example, mib = result("example"), 2**20
    for name, scores in example["scores"].items():
        yield f"| {name} | {scores['loss']:.4f} | {percent(scores['exact_match'])} |"
    for name, stage, measured in (
        ("training", "training", "measured_bytes"), ("merge", "merge", "measured_bytes"),
        ("bundle", "bundle", "peak_memory_bytes"),
    ):  # fmt: skip
        numbers = example[stage]["predicted_bytes"] / mib, example[stage][measured] / mib
        yield f"| {name}, peak memory | {numbers[0]:.0f} MiB | {numbers[1]:.0f} MiB |"
    rate = round(example["bundle"]["decode_tokens_per_second"], -3)
    yield f"The bundle is {example['bundle_bytes'] / mib:.1f} MiB and decodes about {rate:,.0f} tokens a second"
    held = {row["stage"]: row for row in result("large_stages")["rows"] if row["target"] == "ort-int4"}
    for name, stage in (("building takes", "export: build"), ("the proof", "export: prove")):
        took, planned = (held[stage][f"{kind}_bytes"] / 2**30 for kind in ("measured", "predicted"))
        yield f"{name} {took:.2f} GiB ({planned:.2f} planned)"
    planner = result("planner")
    cases = planner["summary"]["all"]["runs"] + sum(planner["not_run"].values())
    yield f"`make bench-planner` has {cases} cases"
    steps = result("time")["summary"]["all"]
    ends = f"{steps['lowest']:.2f} to {steps['highest']:.2f}"
    yield f"a factor of {steps['typical_factor']:.2f} in {steps['runs']} runs, {ends} (`make bench-time`)"
    yield from on_the_device()
    yield from emulated()
    swept = result("sweep")["sweep"]
    points = {point["wise_alpha"]: point["rounded_general"]["loss"] for point in swept["points"]}
    taken = swept["wise_alpha"]
    yield f"the sweep takes {taken:g}:"
    yield from real_model()
    yield from on_a_gpu()
    yield f"loss on other text is {points[taken]:.2f} instead of {points[1.0]:.2f} (base {points[0.0]:.2f})"


def not_found(readme: str) -> list[str]:
    """The records' sentences and rows that the README has not."""
    missing = [sentence for sentence in sentences() if sentence not in readme]
    return missing + [
        f"{name} {row}" for name, row in rows() if not re.search(re.escape(name) + r"[^|]*" + re.escape(row), readme)
    ]


def test_numbers_of_the_readme_are_the_recorded_ones() -> None:
    assert not_found(README) == []


def test_another_number_would_be_seen() -> None:
    for recorded in [*sentences(), *(row for _, row in rows())]:
        digits = [place for place, letter in enumerate(recorded) if letter.isdigit()]
        wrong = "".join("0123456789"[(int(c) + 1) % 10] if n == digits[-1] else c for n, c in enumerate(recorded))
        assert len(not_found(README.replace(recorded, wrong))) == 1, recorded
