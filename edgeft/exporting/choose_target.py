"""Which of all targets should be shipped to a device: what does each weigh, lose, hold and give there?"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from edgeft.documents import Artifact, Strict, saving, sha256_file
from edgeft.errors import BadInput, EdgeftError, MissingExtra
from edgeft.models.metrics import Metrics
from edgeft.targets.target import Target, list_targets

if TYPE_CHECKING:
    from edgeft.exporting.bundle import Bundle

COMPARISON = "comparison.json"
# The rule: of those that pass their parity and fit, all whose loss and exact match are this near to the best one's are
# as good; of these the one whose decoding reads the fewest bytes per token (a device's memory bounds its speed), then
# the smallest. 0.01 nats are 1% of perplexity; exact match may be a point less, or more where the same rows show no
# difference from the best.
AS_GOOD_LOSS_NATS, AS_GOOD_EXACT_MATCH_POINTS = 0.01, 1.0


class Candidate(Strict):
    """One target's bundle in numbers, or why there is none."""

    name: str
    runtime: str
    problem: str = Field(default="", description="why it was not built: does not fit, fails parity, no runtime")
    size_bytes: int = 0
    scores: Metrics | None = None
    mean_kl_nats: float = 0.0
    memory_bytes: int = Field(default=0, description="predicted on the device, full context")
    bytes_per_token: int = 0
    tokens_per_second_bound: float | None = Field(default=None, description="on the device, by its memory's bandwidth")
    tokens_per_second_here: float | None = Field(default=None, description="measured on the machine that exported")


class Comparison(Artifact):
    """comparison.json: every target side by side, and the one to ship."""

    device: str
    candidates: tuple[Candidate, ...]
    ship: str
    reason: str


def compare_targets(
    merged_folder: Path,
    out: Path,
    *,
    device: str | None,
    build: Callable[[Target, Path], Bundle],
    targets: list[Target] | None = None,
) -> Comparison:
    """Build every target into out/<name> and choose; `build` is `export` for one. Targets that fail leave a reason.

    Raises BadInput (nothing is left to ship) naming every reason.
    """
    candidates = []
    for target in targets or list_targets():
        try:
            candidates.append(_measured(target, build(target, out / target.name), out / target.name))
        except EdgeftError as problem:
            said = f"{problem.where} {problem.problem}" if isinstance(problem, MissingExtra) else str(problem.problem)
            candidates.append(Candidate(name=target.name, runtime=target.runtime, problem=said))
            shutil.rmtree(out / target.name, ignore_errors=True)  # of an earlier run, that passed
    ship, reason = choose(candidates)
    made = Comparison(
        input_sha256=sha256_file(merged_folder / "merged.json"),
        device=device or "",
        candidates=tuple(candidates),
        ship=ship,
        reason=reason,
    )
    with saving(out):
        out.mkdir(parents=True, exist_ok=True)
    made.write(out / COMPARISON)
    return made


def _measured(target: Target, bundle: Bundle, folder: Path) -> Candidate:
    from edgeft.exporting.bundle import measurement_of

    here = measurement_of(folder)
    assert bundle.proof is not None
    return Candidate(
        name=target.name,
        runtime=target.runtime,
        size_bytes=bundle.size_bytes,
        scores=bundle.proof.scores[target.name],
        mean_kl_nats=bundle.proof.rungs[-1].mean_kl_nats or 0.0,
        memory_bytes=bundle.predicted.memory_bytes,
        bytes_per_token=bundle.weight_bytes_per_token,
        tokens_per_second_bound=bundle.predicted.tokens_per_second_bound,
        tokens_per_second_here=here.measured.decode_tokens_per_second if here else None,
    )


def choose(candidates: list[Candidate]) -> tuple[str, str]:
    """(the target to ship, why). Raises BadInput when none was built."""
    built = [(candidate, candidate.scores) for candidate in candidates if candidate.scores is not None]
    if not built:
        reasons = "\n".join(f"{candidate.name}: {candidate.problem}" for candidate in candidates)
        raise BadInput("targets", f"none can be shipped\n{reasons}", "choose a larger device or a smaller model")
    loss = min(scores.loss for _, scores in built)
    best_match = max((scores for _, scores in built), key=lambda scores: scores.exact_match or 0.0)
    exact = best_match.exact_match or 0.0
    rounding = 1e-9  # 0.90 - 0.89 is more than 0.01
    good = [
        candidate
        for candidate, scores in built
        if scores.loss - loss <= AS_GOOD_LOSS_NATS + rounding
        and (
            100 * (exact - (scores.exact_match or 0.0)) <= AS_GOOD_EXACT_MATCH_POINTS + rounding
            or scores.as_exact_as(best_match)
        )
    ] or [min(built, key=lambda pair: pair[1].loss)[0]]
    best = min(good, key=lambda candidate: (candidate.bytes_per_token, candidate.size_bytes))
    limits = f"{AS_GOOD_LOSS_NATS:g} nats and {AS_GOOD_EXACT_MATCH_POINTS:g} point of the best"
    shown = "or shown no worse by the same rows"
    return best.name, f"of {len(good)} targets within {limits}, {shown}, it reads the fewest bytes per token"
