"""How do others get an adapter, a merged checkpoint or a bundle? On the hub, with its card, and never what failed.

No record that holds paths of this machine goes along (train.json, merged.json): the card says what is in them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgeft.api.deploying import verify
from edgeft.api.results import OnDisk
from edgeft.documents import sha256_file
from edgeft.errors import BadInput, EdgeftError, ParityFailed
from edgeft.exporting.bundle import MANIFEST, Bundle, failed_path
from edgeft.machines.runner import runner_module
from edgeft.merging.result import Merged, MergedCheckpoint, MergedForeign
from edgeft.models.hub import reachable
from edgeft.models.identity import changed_files, check_files
from edgeft.reporting.model_card import CARD, adapter_card, is_hub_id, is_sealed, merged_card
from edgeft.training.result import TrainResult

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
BASE_HINT = "name it as others find it: --base ORG/NAME"


@dataclass(frozen=True)
class Parcel:
    """What goes to the hub: files by the path that they get there, as they lie here or as text made for it."""

    kind: Literal["adapter", "merged checkpoint", "bundle"]
    files: Mapping[str, Path | bytes]

    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {name: len(it) if isinstance(it, bytes) else it.stat().st_size for name, it in self.files.items()}


def push(
    result: OnDisk | str | Path, repository: str, *, base: str | None = None, private: bool = False,
    token: str | None = None,
) -> str:  # fmt: skip
    """The address of the commit that an adapter, merged checkpoint or bundle was uploaded in; the repository is made.

    `base` is the base model's name on the hub, for one that lies in a folder here. Raises ParityFailed for what failed
    its proof or has none, BadInput for files that were changed afterwards, and without a token.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    parcel = pack(result, base=base)
    if (token := token or get_token()) is None:
        raise BadInput("push", "there is no token for the hub", "hf auth login, or set HF_TOKEN to one that may write")
    if not reachable():
        raise EdgeftError(repository, "the hub cannot be reached", "go online, then run the same command again")
    api = HfApi(token=token)
    added = [CommitOperationAdd(name, it if isinstance(it, bytes) else str(it)) for name, it in parcel.files.items()]
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.create_commit(repository, added, commit_message=f"{parcel.kind}, by edgeft")
    except Exception as problem:  # huggingface_hub raises many kinds, and those of its client
        said = "; ".join(_words(each) for each in (problem, problem.__cause__) if each is not None)
        raise BadInput(repository, f"was not uploaded: {said}", "check its name, and what the token may do") from None
    return str(done.commit_url)


def _words(problem: BaseException) -> str:
    """What the hub says of a request, or else the client."""
    told = getattr(problem, "server_message", None) or str(problem).strip() or type(problem).__name__
    return str(told).splitlines()[0]


def pack(result: OnDisk | str | Path, *, base: str | None = None) -> Parcel:
    """What of a folder goes to the hub. Raises as `push`."""
    folder = result.folder if isinstance(result, OnDisk) else Path(result)
    if (folder / MANIFEST).is_file():
        return _bundle(folder)
    if (folder / "merged.json").is_file():
        return _merged(folder, base)
    if (folder / "train.json").is_file():
        return _adapter(folder, base)
    hint = "give what edgeft train, edgeft merge or edgeft export wrote"
    raise BadInput(folder, f"holds no train.json, merged.json or {MANIFEST}", hint)


def _bundle(folder: Path) -> Parcel:
    manifest = Bundle.read(folder / MANIFEST)
    if manifest.failed:
        raise ParityFailed(folder, f"failed its proof: {manifest.failed}", "export again, and push what passes")
    proofs = [manifest.proof, manifest.encoder_proof, *(each.proof for each in manifest.adapters.values())]
    if not any(proofs):
        raise ParityFailed(folder, "was never proven", "push a bundle that edgeft export wrote")
    verify(folder, replay=False)
    signature = runner_module().SIGNATURE
    own = [MANIFEST, *([signature] if (folder / signature).is_file() else [])]
    return Parcel("bundle", {name: folder / name for name in (*own, *manifest.files)})


def _merged(folder: Path, base: str | None) -> Parcel:
    record = folder / "merged.json"
    own = "train" in json.loads(record.read_text(encoding="utf-8"))
    merged: Merged = MergedCheckpoint.read(record) if own else MergedForeign.read(record)
    check_files(merged.files, folder, "edgeft merge")
    failed = failed_path(folder.parent / "bundle") / MANIFEST
    if failed.is_file() and _belongs(failed, folder) and "rung 'artifact'" not in Bundle.read(failed).failed:
        hint = "train or merge again, and export it"
        raise ParityFailed(folder, f"failed the proof of its export: {Bundle.read(failed).failed}", hint)
    card = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else ""
    if not card or is_sealed(card):
        card = merged_card(folder, merged, bundle_of(folder), base=base)
    files: dict[str, Path | bytes] = {name: folder / name for name in merged.files if name != CARD}
    return Parcel("merged checkpoint", {CARD: card.encode(), **files})


def _adapter(folder: Path, base: str | None) -> Parcel:
    result = TrainResult.read(folder / "train.json")
    if missing := [name for name in ADAPTER if not (folder / name).is_file()]:
        problem = f"holds no {missing[0]}: what was trained in place has no form of its own"
        raise BadInput(folder, problem, "merge it, and push the merged folder")
    if lines := changed_files(result.files, folder):
        raise BadInput(folder, "is not as it was written\n" + "\n".join(lines), "train again, or put the files back")
    config = json.loads((folder / ADAPTER[0]).read_text(encoding="utf-8"))
    named = base or result.plan.job.model
    if base is None and not is_hub_id(named):
        raise BadInput(folder, f"its base is a folder of this machine, {named}: nobody else has it", BASE_HINT)
    config["base_model_name_or_path"] = named
    files: dict[str, Path | bytes] = {name: folder / name for name in result.files if name not in (*ADAPTER, CARD)}
    files |= {ADAPTER[0]: (json.dumps(config, indent=2) + "\n").encode(), ADAPTER[1]: folder / ADAPTER[1]}
    return Parcel("adapter", {CARD: adapter_card(result, named).encode(), **files})


def bundle_of(merged: Path) -> Bundle | None:
    """The proven bundle beside a merged checkpoint that was made from it, if there is one."""
    path = merged.parent / "bundle" / MANIFEST
    if not path.is_file() or not _belongs(path, merged):
        return None
    found = Bundle.read(path)
    return None if found.failed or found.proof is None else found


def _belongs(manifest: Path, merged: Path) -> bool:
    return Bundle.read(manifest).input_sha256 == sha256_file(merged / "merged.json")
