"""What does a KV cache of 8 bits cost a real model, and what does it save?

    make bench-kv-cache [rows=200]

SmolLM2-135M-Instruct (bench/smollm2.py) as ort-int8 and ort-int4, each with the runtime's own cache and with one of 8
bits, whose scales are found on chats of debian-sections. Loss of unseen chats, paired; the ladder's two rungs, on rows
of 2,048 and 4,096 tokens; peak memory of a process of run.py's that holds 4,096 tokens, predicted beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TARGETS = ("ort-int8", "ort-int4")
TOKENS, NEW = 4096, 8
TUNING_ROWS = 128


def peak(bundle: str) -> None:
    """Hold TOKENS tokens in the cache of a bundle and print the most that this process held."""
    import run

    runner = run.Runner(Path(bundle))
    session = runner.engine.start(TOKENS)
    ids = [(7 * i) % 4000 + 3 for i in range(TOKENS - NEW)]
    for part in run.passes(ids):
        last = session.append(part)
    for _ in range(NEW):
        last = session.append([int(last.argmax())])
    print(run.peak_memory_bytes())


def bench_target(name: str, base: Path, folder: Path, rows: int) -> dict[str, Any]:
    """One target's bundles with both caches, compared."""
    from smollm2 import chats, score

    from edgeft.data.rows import read_rows
    from edgeft.data.samples import to_samples
    from edgeft.data.tokenizer import TextTokenizer
    from edgeft.exporting.artifact import ArtifactModel
    from edgeft.exporting.build import build_bundle
    from edgeft.exporting.kv_rung import CacheRows, cache_rungs, long_rows
    from edgeft.exporting.kv_scales import find_scales, rows_for_scales
    from edgeft.exporting.parity import CACHE
    from edgeft.models.spec import read_model_spec
    from edgeft.targets.footprint import bundle_weights, predict, with_kv_bits
    from edgeft.targets.target import load_target

    tokenizer, spec = TextTokenizer(base), read_model_spec(str(base))

    def samples(part: str, count: int) -> Any:
        return to_samples(
            read_rows(str(chats("sections", part, count, folder / f"{part}.jsonl")), tokenizer), tokenizer, None
        )

    target, tuned = load_target(name), rows_for_scales(samples("train", TUNING_ROWS), spec)
    of_8, found = with_kv_bits(target, spec, 8), dict[str, Any]()
    seconds = time.process_time()
    scales = find_scales(base, of_8, tuned)
    found["calibration_cpu_seconds"] = round(time.process_time() - seconds, 1)
    forms = {32: folder / f"{name}-32", 8: folder / f"{name}-8"}
    for bits, out in forms.items():
        if not (out / "bundle.json").is_file():
            given = {"scales": lambda codes: scales} if bits == 8 else {}
            build_bundle(base, of_8 if bits == 8 else target, out, prompts=[], measure=False, **given)
        predicted = predict(spec, of_8 if bits == 8 else target, bundle_weights(spec, target), TOKENS)
        found[f"cache of {bits} bits"] = {"peak_bytes": measured(out), "predicted_bytes": predicted.memory_bytes}
    full, made = ArtifactModel(forms[8], full_cache=True), ArtifactModel(forms[8])
    unseen = samples("test", rows)
    found["rungs"] = [
        rung.model_dump(mode="json")
        for rung in cache_rungs(full, made, CacheRows([each.ids for each in tuned], long_rows(unseen, TOKENS)), CACHE)
    ]
    scores = [score(unseen, tokenizer.stop_ids, logits_of(each)) for each in (full, made)]
    return found | compared(scores, [each.trained_tokens for each in unseen])


def measured(bundle: Path) -> int:
    """Peak bytes of a process of its own."""
    command = [sys.executable, __file__, "--peak", str(bundle)]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def logits_of(model: Any) -> Any:
    import torch

    return lambda ids, first: torch.from_numpy(model.logits(ids, first))


def compared(scores: Sequence[Sequence[tuple[float, bool]]], tokens: Sequence[int]) -> dict[str, Any]:
    """Loss of unseen rows with the full cache and with 8 bits, and the paired difference; the same of exact answers."""
    from edgeft.models.intervals import paired_losses, paired_rates

    (before, right), (after, exact) = (zip(*each, strict=True) for each in scores)
    return {
        "rows": len(tokens), "loss_full_cache": sum(before) / sum(tokens), "loss_8_bits": sum(after) / sum(tokens),
        "loss_change": paired_losses(before, after, tokens)._asdict(),
        "exact_change": paired_rates(right, exact)._asdict(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--base", type=Path, help="a folder of the model, where it is there already")
    parser.add_argument("--folder", type=Path, help="where bundles are built; build/kv-cache when absent")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--print", action="store_true", help="print the result and record nothing")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "export"))
        peak(options.peak)
        return
    from run import ROOT, record
    from smollm2 import FOLDER, base_model

    FOLDER.mkdir(parents=True, exist_ok=True)
    folder = options.folder or ROOT / "build" / "kv-cache"
    folder.mkdir(parents=True, exist_ok=True)
    base = options.base or base_model(FOLDER)
    found = {name: bench_target(name, base, folder, options.rows) for name in options.targets.split(",")}
    if options.print:
        print(json.dumps(found, indent=1))
    else:
        record("kv_cache", {"targets": found})


if __name__ == "__main__":
    main()
