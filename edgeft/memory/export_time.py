"""How long do a rehearsal and an export take, stage by stage: the build, and each pass that its proof makes over rows?

What is counted follows from the rows: how often each is read, of how many tokens. It is the most that can be: rows are
drawn until they decide (models/drawing.py), and all of them may be needed. What a pass takes is priced as one of
scoring, at the profile's own rates; a GPU's host is not known, so that nothing is said of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgeft.data.scoring_groups import EVAL_TOKENS, Size, scoring
from edgeft.documents import Strict
from edgeft.machines.profile import Profile
from edgeft.memory.proof import BENCH_TOKENS, keeps_original, scored_again
from edgeft.memory.stages import CALIBRATION_ROWS, CALIBRATION_TOKENS, PARITY_PROMPTS
from edgeft.memory.timing import forward_seconds
from edgeft.models.spec import ModelSpec
from edgeft.progress import in_words
from edgeft.settings.job import AUTO, Training
from edgeft.targets.footprint import bundle_weights
from edgeft.targets.target import Target

BUNDLE_STAGE = "parity: artifact"
# The runtime's own builder, a fresh process: 14 s at 135M and 30 to 82 s at 1.24B, by target and by what was in memory.
BUILD_SECONDS, BUILD_SECONDS_PER_PARAMETER = 6.0, 6e-8
START_SECONDS = 6.0  # of an export's own process until it computes; 10 to 13 s of one on a busy machine
# Two processes that import torch, and two layers with the embedding from merge to a bundle that answers, by their
# parameters: 26 s of 35M on a quiet machine (bench-proof).
REHEARSAL_SECONDS, REHEARSAL_SECONDS_PER_PARAMETER, REHEARSED_LAYERS = 14.0, 3.5e-7, 2
LOAD_BYTES_PER_SECOND = 1e9  # of a model in fp32, its pages in memory; a guess
# Codes of one weight from what its inputs are: 85 s of one core at 135M (bench/results/smollm2.json), less its passes.
CALIBRATION_SECONDS_PER_PARAMETER = 4e-7
# For all rows in a bundle's own runtime: then they are read, so that its scores are those of all of them.
SHORT_SECONDS = 20.0
TOKEN_BANDWIDTH = 0.35  # of the memory's, that a bundle's next token reaches: 0.30 at 135M, 0.43 at 6M (bench/results)


class Timed(Strict):
    """One stage of an export, by the name that its progress has."""

    stage: str
    seconds: float
    passes: str  # what is read, in words


def export_seconds(
    profile: Profile, spec: ModelSpec, training: Training, target: Target, asked: str, files: Sequence[Sequence[Size]]
) -> tuple[Timed, ...]:  # fmt: skip
    """Every stage of an export to a target, in its order; `asked` is what the job named, `files` the scored rows.

    The first file has the validation rows. Nothing without rows, and for a profile whose CPU is not known.
    """
    if not _known(profile, files):
        return ()
    cut = [[size.cut(training.max_length) for size in sizes] for sizes in files]
    valid, every = cut[0][: training.eval_rows], [size for sizes in cut for size in sizes]
    load = 4 * spec.total_parameters / LOAD_BYTES_PER_SECOND
    plain = training.model_copy(update={"compute_dtype": "fp32"})

    def read(rows: Sequence[Size], way: Training = plain) -> float:
        found = scoring([rows], EVAL_TOKENS)
        tokens = found.tokens - found.saved_tokens
        return load + forward_seconds(profile, spec, way, spec.num_hidden_layers, tokens, found.trained_tokens)

    made = list[Timed]()

    def add(stage: str, seconds: float, passes: str) -> None:
        made.append(Timed(stage=stage, seconds=round(seconds, 1), passes=passes))

    start = START_SECONDS
    if asked == AUTO:
        add("repair: merged", start + read(valid), f"{len(valid)} rows")
        start = 0.0
        add(f"repair: {target.name}", read(valid), f"at most {len(valid)} rows, as it will round")
    if target.calibration != "none":
        rows = min(CALIBRATION_TOKENS, sum(size.tokens for size in valid[:CALIBRATION_ROWS]))
        codes = CALIBRATION_SECONDS_PER_PARAMETER * spec.total_parameters / (profile.cores or 1)
        add("calibrate", codes + 2 * forward_seconds(profile, spec, plain, spec.num_hidden_layers, rows, 0),
            f"{CALIBRATION_ROWS} rows, layer by layer")  # fmt: skip
    add(
        "build",
        start + BUILD_SECONDS + BUILD_SECONDS_PER_PARAMETER * spec.total_parameters,
        "the runtime's own builder",
    )
    again = valid[: scored_again(training, len(valid))]
    add("parity: trained", read(again, training), f"{len(again)} rows")
    if not keeps_original(training):
        add("parity: original", read(valid), f"{len(valid)} rows")
    unseen = every[len(valid) :] if asked == AUTO else every
    rounded = 0.0 if asked == AUTO and target.calibration == "none" else read(valid[:PARITY_PROMPTS])
    add("parity: merged", (read(unseen) if unseen else 0.0) + rounded, f"{len(unseen)} rows, and the first as rounded")
    token = bundle_weights(spec, target).bytes_per_token / (TOKEN_BANDWIDTH * profile.bandwidth_gb_per_second * 1e9)
    add(BUNDLE_STAGE, read(every) + BENCH_TOKENS * token, f"at most {len(every)} rows in their runtime")
    return tuple(made)


def rehearsal_seconds(profile: Profile, spec: ModelSpec, files: Sequence[Sequence[Size]]) -> float:
    """Of letting a model's first layers go the whole way to a bundle, where an export's are known too; else 0."""
    if not _known(profile, files):
        return 0.0
    rest = spec.total_parameters - sum(spec.layer_parameters[REHEARSED_LAYERS:])
    return round(REHEARSAL_SECONDS + REHEARSAL_SECONDS_PER_PARAMETER * rest, 1)


def _known(profile: Profile, files: Sequence[Sequence[Size]]) -> bool:
    """Whether there are rows, and a CPU of known rates that would read them."""
    return profile.device == "cpu" and bool(files) and bool(profile.matmul_tflops)


def reads_all(stages: Sequence[Timed]) -> bool:
    """Whether a bundle reads every row, because that is planned to be a matter of seconds."""
    return any(each.stage == BUNDLE_STAGE and each.seconds <= SHORT_SECONDS for each in stages)


def plans_repair(stages: Sequence[Timed]) -> bool:
    """Whether the export looks for a target itself: the first that passes."""
    return any(each.stage.startswith("repair") for each in stages)


def total_seconds(stages: Sequence[Timed]) -> float:
    """Of the whole export, and none where nothing was planned."""
    return sum(each.seconds for each in stages)


def described(stages: Sequence[Timed]) -> str:
    """`checking the trained model 3 s`, a part each, of the longest ones."""
    longest = sorted(stages, key=lambda each: -each.seconds)[:3]
    return ", ".join(f"{in_words(each.stage)} {each.seconds:.0f} s" for each in longest)
