"""How does one more adapter come into a bundle that is out there, with nothing else of it changed?"""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

from edgeft.documents import nearest_folder, saving, sha256_file, staging
from edgeft.errors import BadInput, DoesNotFit
from edgeft.exporting.adapters import AdapterSource, Written, write_adapter
from edgeft.exporting.build import hash_files, prove_adapters, tokens_before, with_adapters
from edgeft.exporting.bundle import MANIFEST, README, SBOM, Bundle, adapters_digest, measurement_path, readme
from edgeft.exporting.export import adapter_source, made_from
from edgeft.exporting.golden import environment
from edgeft.exporting.portable_adapters import write_inputs
from edgeft.exporting.sbom import extended
from edgeft.machines.runner import runner_module
from edgeft.merging.merge import check_trained
from edgeft.models.headers import local_folder
from edgeft.progress import Progress
from edgeft.targets.footprint import predict
from edgeft.targets.runtimes import runtime_of
from edgeft.training.result import TrainResult
from edgeft.units import show_bytes

OWN = (MANIFEST, README, SBOM)  # what says which adapters there are
AGAIN = "export all of them again: edgeft adapters NAME=TRAIN ..."


def add_adapter(folder: Path, name: str, trained: Path, out: Path, progress: Progress) -> Bundle:
    """The bundle in `folder` with one more adapter or prefix, proven, in `out` (which may be `folder`), or not at all.

    Model, tokenizer, runner and the other adapters stay byte for byte; manifest, README and bill of materials name one
    more, and a signature is left out: sign it again. Raises BadInput where the contract does not hold (a bundle that
    is not as it was exported, or takes no adapters; another base; a weight that its graph has no input for; another
    processor or runtime than its golden vectors were recorded on), DoesNotFit for its device, ParityFailed.
    """
    bundle = _checked(folder, name)
    result = TrainResult.read(trained / "train.json")
    check_trained(trained, result)
    if (held := bundle.provenance.get("base weights")) != result.base_sha256:
        raise BadInput(trained, f"was trained on the base {result.base_sha256}, the bundle holds {held}", AGAIN)
    base = local_folder(result.plan.job.model)
    source = adapter_source(name, trained, result, base, bundle.target, progress)
    size, free = bundle.size_bytes, shutil.disk_usage(nearest_folder(out)).free
    if size > free:
        raise DoesNotFit(out, f"the bundle takes {show_bytes(size)} beside itself, {show_bytes(free)} are free here")
    with staging(out) as temporary:
        with saving(out):
            shutil.copytree(folder, temporary, dirs_exist_ok=True)
            (temporary / runner_module().SIGNATURE).unlink(missing_ok=True)
        progress("add", 0, 1, {})
        if source.tensors is not None:
            _room(result, bundle, source)
            written = write_inputs(temporary, source, bundle.adapter_inputs)
        else:
            written = write_adapter(temporary, result.plan.spec, source, bundle.adapter_inputs)
        made = _described(temporary, bundle, result, source, written, base)
        made.write(temporary / MANIFEST)
        _unchanged(folder, temporary, written)
    measurement_path(out.resolve()).unlink(missing_ok=True)  # of the bundle that it was
    return Bundle.read(out / MANIFEST)


def _checked(folder: Path, name: str) -> Bundle:
    """The manifest of a bundle that an adapter of that name may join. Raises BadInput."""
    bundle = Bundle.read(folder / MANIFEST)
    if problems := runner_module().verify(folder):
        raise BadInput(folder, "is not as it was exported\n" + "\n".join(problems), "copy the bundle again")
    if not bundle.adapter_inputs:
        raise BadInput(folder, "takes no adapters: it was built for one model", AGAIN)
    if name in bundle.adapters:
        raise BadInput(folder, f"has an adapter {name!r} already", "give the new one a name of its own")
    here = environment(runtime_of(bundle.target))
    if bundle.environment is not None and bundle.environment != here:
        told = f"{bundle.environment.cpu}, {bundle.environment.runtime}"
        problem = (
            f"was recorded on {told}; this is {here.cpu}, {here.runtime}: its golden vectors would be of two kinds"
        )
        raise BadInput(folder, problem, f"add it on such a machine, or {AGAIN}")
    return bundle


def _room(result: TrainResult, bundle: Bundle, source: AdapterSource) -> None:
    """Nothing. Raises DoesNotFit for a prefix that leaves a text fewer positions than the bundle promises it."""
    tokens, most = result.plan.training.prefix_tokens, result.plan.spec.max_position_embeddings
    if most is not None and tokens + bundle.context_tokens > most:
        problem = f"puts {tokens} tokens before a text: of {most} positions the bundle promises {bundle.context_tokens}"
        raise DoesNotFit(source.folder, problem, AGAIN)


def _described(
    folder: Path, bundle: Bundle, result: TrainResult, source: AdapterSource, written: Written, base: Path
) -> Bundle:
    """The manifest with the new adapter in it, after its proof; README and bill of materials beside it."""
    names = [*bundle.adapters, source.name]
    with saving(folder):
        page = readme(bundle.target, bundle.prompt_format, bundle.system, names)
        (folder / README).write_text(page, encoding="utf-8")
        hashes = {name: sha256_file(folder / name) for name in (README, written.file)}
        bill = extended((folder / SBOM).read_text(encoding="utf-8"), hashes, made_from(result, base))
        (folder / SBOM).write_text(bill, encoding="utf-8")
    files, sizes = hash_files(folder), _sizes(folder, bundle, result, written)
    digests = {name: each.train_sha256 for name, each in bundle.adapters.items()} | {source.name: source.train_sha256}
    made = bundle.model_copy(
        update=sizes | {
            "files": files, "size_bytes": sum(file.size_bytes for file in files.values()),
            "input_sha256": adapters_digest(digests),
            "provenance": bundle.provenance | {f"train.json of {source.name}": source.train_sha256},
        }
    )  # fmt: skip
    made.write(folder / MANIFEST)
    entries = prove_adapters(folder, made, [source], {source.name: written})
    return made.model_copy(update={"adapters": bundle.adapters | entries})


def _sizes(folder: Path, bundle: Bundle, result: TrainResult, written: Written) -> dict[str, Any]:
    """What the bundle needs with all its adapters loaded. Raises DoesNotFit where its device has not that much."""
    backend: Any = importlib.import_module(f"edgeft.targets.{runtime_of(bundle.target).builder}")
    every = {"": written} | {
        name: Written(each.file, each.rank, each.parameters, each.kv_prefix.tokens if each.kv_prefix else 0)
        for name, each in bundle.adapters.items()
    }
    weights, before = with_adapters(backend.read_weights(folder), every), tokens_before(None, every)
    device = bundle.predicted.device_memory_bytes
    predicted = predict(result.plan.spec, bundle.target, weights, bundle.context_tokens, device, before=before)
    if device is not None and predicted.memory_bytes > device:
        need = show_bytes(predicted.memory_bytes)
        raise DoesNotFit(folder, f"needs {need} with one more adapter, its device has {show_bytes(device)}", AGAIN)
    return {"predicted": predicted, "weight_bytes_per_token": weights.bytes_per_token}


def _unchanged(before: Path, after: Path, written: Written) -> None:
    """Nothing. Raises BadInput where a file other than the three that name adapters is not what it was."""
    was, now = hash_files(before), hash_files(after)
    mine = (*OWN, written.file, runner_module().SIGNATURE)
    other = [name for name in was.keys() | now.keys() if name not in mine and was.get(name) != now.get(name)]
    if other:
        raise BadInput(before, f"changed while an adapter was added: {', '.join(sorted(other))}", "run it again")
