"""How do base and fine-tune become one checkpoint from Python, with a share that is given or measured?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeft.api import current, folders
from edgeft.api.results import Merged, MergedForeign, OnDisk, TrainResult
from edgeft.documents import sha256_file, sha256_json
from edgeft.errors import BadInput
from edgeft.machines.extras import need
from edgeft.merging import result as merges
from edgeft.models.layer_shares import Shares, parse_shares
from edgeft.progress import Progress, Say, quiet, silent

if TYPE_CHECKING:
    from edgeft.models.metrics import Sweep


@dataclass(frozen=True)
class SweepOptions:
    """How a merge finds its share itself: see `edgeft.merging.sweep.sweep`."""

    select: Literal["best", "bounded", "fixed"] = "best"
    general: str | None = None
    max_general_increase_nats: float | None = None
    golden: bool = False
    target: str = "ort-int4"
    groups: int = 1


def merge(
    trained: TrainResult | str | Path, out: str | Path | None = None, *, wise_alpha: float | str = 1.0,
    base: str | None = None, sweep: SweepOptions | None = None, progress: Progress = silent, say: Say = quiet,
    swept: Any = None,
) -> Merged | MergedForeign:  # fmt: skip
    """Base and fine-tune as one standard checkpoint: W0 + wise_alpha (Wft - W0), tensor by tensor.

    `wise_alpha` may differ by layers ("0-3=0.5,rest=1"); with `sweep` it is measured and chosen. `base` is for an
    adapter or checkpoint that edgeft did not train. A result that is current is read. Raises as `merging.merge.merge`.
    """
    source = trained.folder if isinstance(trained, OnDisk) else Path(trained)
    folder = Path(out) if out is not None else source.parent / "merged"
    shares, digest = parse_shares(str(wise_alpha)), current.merge_digest(source, base)
    request = _sweep_request(digest, shares, sweep, base) if sweep else ""
    record = folder / "merged.json"
    old = current.held(record, digest)
    taken = Shares(rest=old.get("wise_alpha", -1.0), groups=tuple(old.get("groups", ())))
    same = (old.get("sweep") or {}).get("request_sha256") == request if sweep else taken == shares
    if old and same and current.same_merge(folder, old, say):
        say(f"{folder} is up to date")
        return _read_merged(record, "train" in old)
    current.replaceable(folder, "merged.json")
    folders.refuse_others_merge(folder, source, base)
    need("train")
    from edgeft.merging.merge import merge as blend_all

    found = _sweep(source, sweep, shares, request, progress) if sweep else None
    if found is not None and swept is not None:
        swept(found)
    alpha = Shares(rest=found.wise_alpha, groups=found.groups) if found else shares
    blend_all(source, folder, wise_alpha=alpha, progress=progress, base=base, input_sha256=digest, sweep=found)
    made = _read_merged(record, (source / "train.json").is_file() and base is None)
    from edgeft.reporting.model_card import merged_card, write_card

    write_card(folder, merged_card(folder, made))
    return made


def _read_merged(record: Path, own: bool) -> Merged | MergedForeign:
    if own:
        return Merged.at(record, merges.MergedCheckpoint.read(record))
    return MergedForeign.at(record, merges.MergedForeign.read(record))


def _sweep_request(digest: str, shares: Shares, sweep: SweepOptions, base: str | None) -> str:
    """One hash of what a sweep is asked. Raises BadInput for what cannot be swept."""
    if shares.groups:
        raise BadInput("--wise-alpha", "a sweep takes one share to measure as well", "search groups with --groups")
    if base is not None:
        raise BadInput("--sweep", "needs the validation rows of `edgeft train`", "leave out --base")
    if sweep.select not in ("best", "bounded", "fixed"):
        raise BadInput("--select", f"must be best, bounded or fixed, got {sweep.select!r}")
    general = sweep.general
    texts = sha256_file(Path(general)) if general and Path(general).is_file() else ""
    return sha256_json([digest, vars(sweep) | {"wise_alpha": shares.rest}, texts])


def _sweep(source: Path, sweep: SweepOptions, shares: Shares, request: str, progress: Progress) -> Sweep:
    from edgeft.merging.sweep import sweep as measure
    from edgeft.targets.target import load_target

    options = {name: value for name, value in vars(sweep).items() if name != "target"}
    return measure(
        source, load_target(sweep.target), **options, wise_alpha=shares.rest, request_sha256=request, progress=progress
    )
