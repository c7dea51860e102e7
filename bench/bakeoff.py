"""Which way to four bits keeps most of a fine-tune? The policies of the field on one grid, on one set of test rows.

    make bench-bakeoff [rows=1000] [model=example|smollm2]

LoRA on three bases: as it is stored, in NF4, and seen through the grid that is shipped (quantize_aware). What each
becomes in the 4 bits of ort-int4 (blocks of 32, 8-bit head), or in NF4, which no on-device runtime here reads, is
simulated in PyTorch with fp32 activations: the weights are those of the artifact, code for code. "Calibrated" is GPTQ
alone; "scales too" what an export does, ranges and scales chosen with it. AutoRound is left out where its package is
not installed. Differences are to the merged model of the first run, paired, with 95% intervals. What is done is kept in
build/bakeoff.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import smollm2
import torch
from run import BASE, ROOT, SECTIONS, Kept, pins, record, verb
from transformers import AutoTokenizer

from edgeft.data.rows import read_rows
from edgeft.data.samples import to_samples
from edgeft.data.tokenizer import TextTokenizer
from edgeft.errors import EdgeftError, MissingExtra
from edgeft.exporting.calibrate import calibrate, put_codes
from edgeft.exporting.compensation import RANGES, Rule, gptq_alone, least_change, lesser, solve_scales
from edgeft.exporting.layer_walk import chosen_rows
from edgeft.models.checkpoint import load_plain
from edgeft.models.parts import find_parts, is_linear
from edgeft.planning.plan import Plan
from edgeft.targets.grid import Encoded, Fitted, Grid
from edgeft.targets.rounding import grids_of, round_, round_as_target
from edgeft.targets.target import load_target
from edgeft.training.job_data import Data

FOLDER = ROOT / "build" / "bakeoff"
PIECE = 256  # tokens of training rows that auto-round sees at once
AUTOROUND_STEPS = {"example": 200, "smollm2": 50}  # of each layer; 200 are auto-round's own default
NEAREST, CALIBRATED = "ort-int4", "ort-int4-calibrated"
RUNS: dict[str, dict[str, Any]] = {
    "plain": {}, "nf4": {"base_precision": "nf4"}, "aware": {"quantize_aware": "true", "target": NEAREST},
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "example": {"tuner": "lora", "rank": 64, "max_steps": 400, "batch_size": 16, "eval_rows": 200},
    "smollm2": smollm2.SETTINGS,
}


def inputs(model: str) -> tuple[Path, list[str], Path]:
    """(base, arguments that name its training and validation data, test rows) of one of the two models."""
    if model == "example":
        files = ["--data", str(SECTIONS / "train.jsonl"), "--valid", str(SECTIONS / "valid.jsonl")]
        return BASE, files, SECTIONS / "test.jsonl"
    smollm2.FOLDER.mkdir(parents=True, exist_ok=True)
    place = FOLDER / model
    for name, count in (*smollm2.ROWS.items(), ("test", 10_000)):
        smollm2.chats("sections", name, count, place / f"{name}.jsonl")
    files = ["--data", str(place / "train.jsonl"), "--valid", str(place / "valid.jsonl")]
    return smollm2.base_model(smollm2.FOLDER), files, place / "test.jsonl"


def trained(model: str, name: str, base: Path, files: list[str]) -> Path:
    """One run, merged, as far as it is not done; its merged folder."""
    place = FOLDER / model / name
    settings = pins({**SETTINGS[model], **RUNS[name]})
    verb("plan", "--model", str(base), "--profile", "cpu", *files, *settings, "--out", str(place / "plan.json"))
    verb("train", str(place / "plan.json"), "--out", str(place / "train"), "--no-rehearsal")
    verb("merge", str(place / "train"), "--out", str(place / "merged"))
    return place / "merged"


def nearest(merged: Path) -> Any:
    """A merged model on the grid, each weight to its nearest value."""
    model = load_plain(merged)
    round_as_target(model, load_target(NEAREST))
    return model


def by_calibration(merged: Path, rule: Rule = gptq_alone) -> Any:
    """A merged model on the grid, by a rule on its training rows."""
    plan, target = Plan.read(merged.parent / "plan.json"), load_target(CALIBRATED)
    codes = merged.parent / "codes"
    codes.mkdir(exist_ok=True)
    made = calibrate(merged, target, Data.read(plan).train, codes, rule=rule)
    model = load_plain(merged)
    put_codes(model, target, made)
    return model


def scales_alone(weight: torch.Tensor, gram: torch.Tensor, factor: torch.Tensor, grid: Grid) -> Encoded:
    """Nearest codes in the range of each block whose own outputs change least, then scales solved; no compensation."""
    shape = (len(weight), -1, grid.block_size)  # blocks are full in both models
    own = torch.stack([gram[at : at + shape[2], at : at + shape[2]] for at in range(0, len(gram), shape[2])])
    tried = [nearest_in(weight, grid, share) for share in RANGES]
    moved = torch.stack([(weight - each.weight()).view(shape) for each in tried])
    best = (torch.einsum("tnbi,bij->tnbj", moved, own) * moved).sum(dim=-1).argmin(dim=0)

    def pick(parts: list[torch.Tensor]) -> torch.Tensor:
        each = torch.stack(parts).view(len(parts), *best.shape, -1)
        return each.gather(0, best[None, ..., None].expand(1, *each.shape[1:]))[0].view(parts[0].shape)

    codes, scale, zero = (pick([getattr(each, of) for each in tried]) for of in ("codes", "scale", "zero"))
    made = solve_scales(weight, replace(tried[0], codes=codes, scale=scale, zero=zero), gram, grid)
    return lesser(weight, gram, made, grid.encode(weight))


def nearest_in(weight: torch.Tensor, grid: Grid, share: float) -> Encoded:
    """Nearest codes where each block's range is a share of its whole one."""
    ranges = grid.encode(weight * share)
    fitted = Fitted(ranges.scale, ranges.zero).wide()
    blocks = weight.view(len(weight), -1, grid.block_size)
    return replace(ranges, codes=grid.codes(blocks, fitted).view(weight.shape))


def as_nf4(weight: torch.Tensor) -> torch.Tensor:
    """A matrix in NF4 with double quantisation and back, as QLoRA keeps it."""
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)
    return functional.dequantize_4bit(codes, state)


def on_nf4(base: Path, merged: Path, again: bool) -> Any:
    """What training changed, added to the base as NF4 holds it; `again`: and brought to NF4, else to the grid."""
    model, original = load_plain(merged), load_plain(base)
    layers = {id(each.weight) for layer in find_parts(model).layers for each in layer.modules() if is_linear(each)}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if id(weight) in layers:
                before = original.get_parameter(name)
                whole = as_nf4(before.data) + (weight - before)
                weight.copy_(as_nf4(whole) if again else whole)
    if not again:
        round_as_target(model, load_target(NEAREST))
    return model


def by_autoround(merged: Path, model: str) -> Any:
    """A merged model on the grid, by auto-round on the same rows, laid end to end. Raises MissingExtra without it."""
    try:
        from auto_round import AutoRound
    except ImportError as problem:
        raise MissingExtra("auto-round", f"cannot be imported: {problem}", 'pip install "edgeft[autoround]"') from None
    plan, target = Plan.read(merged.parent / "plan.json"), load_target(NEAREST)
    ids = [token for row in chosen_rows(Data.read(plan).train) for token in row.ids]
    pieces = [torch.tensor([ids[first : first + PIECE]]) for first in range(0, len(ids) - PIECE + 1, PIECE)]
    made = AutoRound(
        load_plain(merged), AutoTokenizer.from_pretrained(merged), bits=target.weight_bits, sym=target.symmetric,
        group_size=target.block_size, scale_dtype="fp32", dataset=pieces, seqlen=PIECE, nsamples=len(pieces),
        iters=AUTOROUND_STEPS[model], batch_size=4, device_map="cpu", amp=False, enable_torch_compile=False, seed=0,
    ).quantize()[0]  # fmt: skip
    for name, grid in grids_of(made, target).items():
        weight = made.get_parameter(name).data
        if "layers." not in name:
            round_(weight, grid)
        elif any(len(block.unique()) > 2**grid.bits for block in weight[:32].reshape(-1, grid.block_size)):
            raise EdgeftError(name, "is not on the target's grid")
    return made


def policies(base: Path, merged: dict[str, Path], model: str) -> dict[str, Callable[[], Any]]:
    """The model that each policy makes, by what it is called in the table."""
    return {
        "base": lambda: load_plain(base),
        "merged, not rounded": lambda: load_plain(merged["plain"]),
        "merged, nearest": lambda: nearest(merged["plain"]),
        "merged, calibrated": lambda: by_calibration(merged["plain"]),
        "merged, scales alone": lambda: by_calibration(merged["plain"], scales_alone),
        "merged, calibrated, scales too": lambda: by_calibration(merged["plain"], least_change),
        "merged, AutoRound": lambda: by_autoround(merged["plain"], model),
        "NF4 run on the original base, not rounded": lambda: load_plain(merged["nf4"]),
        "NF4 run on the original base, nearest": lambda: nearest(merged["nf4"]),
        "NF4 run on the original base, calibrated": lambda: by_calibration(merged["nf4"]),
        "NF4 run on the dequantised base, nearest": lambda: on_nf4(base, merged["nf4"], again=False),
        "NF4 run on the dequantised base, NF4 again": lambda: on_nf4(base, merged["nf4"], again=True),
        "quantize_aware, nearest": lambda: nearest(merged["aware"]),
        "quantize_aware, not rounded": lambda: load_plain(merged["aware"]),
    }


def bench(model: str, rows: int) -> dict[str, Any]:
    """The table of one model."""
    (FOLDER / model).mkdir(parents=True, exist_ok=True)
    base, files, test = inputs(model)
    merged = {name: trained(model, name, base, files) for name in RUNS}
    tokenizer = TextTokenizer(base)
    samples = to_samples(read_rows(str(test), tokenizer)[:rows], tokenizer, None)
    kept, forms = Kept(f"bakeoff-{model}-{len(samples)}"), policies(base, merged, model)
    for name, make in list(forms.items()):
        if name in kept.rows:
            continue
        print(f"{model}, {name}: {len(samples)} rows", file=sys.stderr, flush=True)
        try:
            made = make()
        except MissingExtra as problem:
            print(f"{model}, {name}: left out: {problem}", file=sys.stderr, flush=True)
            del forms[name]
            continue
        kept.add({"run": name, "scores": smollm2.score(samples, tokenizer.stop_ids, smollm2.by_torch(made))})
    return {
        "model": model, "rows": len(samples), "settings": SETTINGS[model], "runs": RUNS,
        "policies": {name: smollm2.to_merged(kept.rows["merged, not rounded"], kept.rows[name]) for name in forms},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=list(SETTINGS), help="which of the two models")
    parser.add_argument("--rows", type=int, default=1000, help="test rows")
    given = parser.parse_args()
    try:
        found = bench(given.model, given.rows)
    except EdgeftError as problem:
        print(problem, file=sys.stderr)
        sys.exit(problem.exit_code)
    for name, form in found["policies"].items():
        points, loss = form["exact_match_points_to_merged"], form["row_loss_to_merged"]
        print(f"{name:44} {100 * form['exact_match']:5.1f}%  {points['difference']:+5.1f} "
              f"[{points['low']:+.1f}, {points['high']:+.1f}]  loss {loss['difference']:+.3f} "
              f"[{loss['low']:+.3f}, {loss['high']:+.3f}]")  # fmt: skip
    path = ROOT / "bench" / "results" / "bakeoff.json"
    models = json.loads(path.read_text())["models"] if path.is_file() else {}
    record("bakeoff", {"models": models | {given.model: found}})


if __name__ == "__main__":
    main()
