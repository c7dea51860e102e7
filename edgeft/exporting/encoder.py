"""How does an encoder (labels or embeddings, no text) become a bundle, and does that give what PyTorch gives?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from edgeft.documents import saving, sha256_file, shipped_folder, staging, versions
from edgeft.errors import BadInput, DoesNotFit, ParityFailed
from edgeft.exporting.build import hash_files, need_runtime
from edgeft.exporting.bundle import MANIFEST, README, SBOM, Bundle, Golden, Task, readme
from edgeft.exporting.sbom import BASE, Component, bill_of_materials, model_licence
from edgeft.machines.runner import RUNNER, runner_module
from edgeft.models.checkpoint import check_loaded, quiet_transformers
from edgeft.models.families import ENCODERS
from edgeft.models.identity import weights_sha256
from edgeft.models.metrics import EncoderProof
from edgeft.planning.stage_checks import target_device
from edgeft.targets.footprint import LimitedBy, Predicted
from edgeft.targets.portable_onnx import read_weights, write_graph, write_tokenizer
from edgeft.targets.runtimes import Runtime, runtime_of
from edgeft.targets.target import Target
from edgeft.units import show_bytes

TEXTS, GOLDEN = 64, 4  # compared with PyTorch, and recorded
VALUES = 8  # of an answer, kept per golden vector
LARGEST_COSINE_LOSS = {32: 1e-5, 8: 0.02}  # by the target's bits, for embeddings
OFFSET = ("camembert", "roberta", "xlm-roberta")  # their positions begin behind the padding token's id


class Encoder(NamedTuple):
    """What config.json says of an encoder."""

    model_type: str
    task: Task
    labels: tuple[str, ...]
    heads: int
    layers: int
    widest: int
    context_tokens: int


def is_encoder(folder: Path) -> bool:
    """Whether a checkpoint folder holds an encoder that can be exported."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") in ENCODERS


def read_encoder(folder: Path) -> Encoder:
    """The encoder of a checkpoint folder. Raises BadInput for another head than one that classifies texts."""
    from transformers import AutoConfig

    with quiet_transformers():
        config = AutoConfig.from_pretrained(folder)
    architecture = next(iter(config.architectures or ()), "")
    if architecture.endswith("ForSequenceClassification"):
        task: Task = "text-classification"
        labels = tuple(str(config.id2label[number]) for number in range(config.num_labels))
    elif architecture.endswith("Model"):
        task, labels = "feature-extraction", ()
    else:
        hint = "give a ...ForSequenceClassification, or a bare ...Model whose mean output is the embedding"
        raise BadInput(folder / "config.json", f"{architecture or 'an unnamed architecture'} cannot be exported", hint)
    positions = config.max_position_embeddings
    if config.model_type in OFFSET:
        positions -= config.pad_token_id + 1
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    widest = getattr(config, "intermediate_size", getattr(config, "hidden_dim", 4 * config.hidden_size))
    return Encoder(config.model_type, task, labels, heads, layers, widest, positions)


def read_texts(path: Path) -> list[str]:
    """Up to 64 texts: the lines of a file, or of a .jsonl the `text` (else `prompt`) of its rows. Raises BadInput."""
    hint = "give a file with a text on each line, or .jsonl rows with a text"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in lines if line.strip()]
            lines = [str(row.get("text") or row.get("prompt") or "") for row in rows]
    except (OSError, ValueError, AttributeError) as problem:
        raise BadInput(path, f"cannot be read: {problem}", hint) from None
    found = [line for line in lines if line.strip()][:TEXTS]
    if not found:
        raise BadInput(path, "there are no texts in it", hint)
    return found


def export_encoder(folder: Path, target: Target, out: Path, *, texts: list[str], device: str | None = None) -> Bundle:
    """Build, prove and write the bundle of an encoder, for one of optimum's portable targets.

    Raises BadInput (another target, an encoder with another head), DoesNotFit, MissingExtra, and ParityFailed if what
    the bundle gives for `texts` is not what PyTorch gives: then nothing is written.
    """
    if not runtime_of(target).encoders:
        problem = "is for models that write text; this is an encoder"
        raise BadInput(f"target {target.name}", problem, "choose onnx-portable-fp32 or onnx-portable-int8")
    need_runtime(target)
    encoder = read_encoder(folder)
    profile = target_device(device)
    with staging(out) as made:
        write_graph(folder, target, encoder.task, made)
        write_tokenizer(folder, made, None)
        with saving(out):
            shutil.copyfile(shipped_folder("export") / RUNNER, made / RUNNER)
            (made / README).write_text(readme(target, "plain", None), encoding="utf-8")
        weights = read_weights(made)
        context, limited_by = encoder.context_tokens, "model"
        if target.context_tokens < context:
            context, limited_by = target.context_tokens, "target"
        device_bytes = profile.budget_bytes if profile else None
        predicted = _predict(runtime_of(target), encoder, weights.stored_bytes, context, device_bytes)
        digest = weights_sha256(folder)
        source = Component(
            "machine-learning-model", folder.resolve().name, BASE, weights_sha256=digest, licence=model_licence(folder)
        )
        hashes = {name: file.sha256 for name, file in hash_files(made).items()}
        with saving(out):
            (made / SBOM).write_text(bill_of_materials(hashes, [source], target), encoding="utf-8")
        files = hash_files(made)
        limit: LimitedBy = "model" if limited_by == "model" else "target"
        bundle = Bundle(
            input_sha256=sha256_file(folder / "config.json"), versions=versions(), target=target, task=encoder.task,
            labels=list(encoder.labels), prompt_format="plain", prefix_ids=[], stop_ids=[], context_tokens=context,
            context_limited_by=limit, golden_logit_tolerance=target.golden_logit_tolerance,
            weight_bytes_per_token=weights.bytes_per_token,
            size_bytes=sum(file.size_bytes for file in files.values()), files=files, golden=[],
            provenance={"base weights": digest, "device": profile.name if profile else ""}, predicted=predicted,
        )  # fmt: skip
        bundle.write(made / MANIFEST)
        runner = runner_module().Runner(made)
        rows = [runner.encode(text, plain=True)[:context] for text in texts]
        given = [runner.logits(ids)[-1] for ids in rows]
        golden = [_golden(*entry) for entry in zip(texts[:GOLDEN], rows, given, strict=False)]
        kept = [
            entry for entry, text in zip(golden, texts, strict=False) if runner.encode(text, plain=True) == entry.ids
        ]
        proof = _prove(encoder, given, _by_torch(folder, encoder, rows), target)
        bundle.model_copy(update={"golden": kept, "encoder_proof": proof}).write(made / MANIFEST)
    return Bundle.read(out / MANIFEST)


def _predict(
    runtime: Runtime, encoder: Encoder, stored_bytes: int, context_tokens: int, device_bytes: int | None
) -> Predicted:
    """Weights, one layer's scores and widest activations at full context, the runtime. Raises DoesNotFit."""
    process = runtime.process_bytes + runtime.layer_bytes * encoder.layers
    scores = runtime.scores_at_once * 4 * context_tokens * (encoder.heads * context_tokens + encoder.widest)
    total = stored_bytes + scores + process
    if device_bytes is not None and total > device_bytes:
        problem = f"needs {show_bytes(total)}, the device has {show_bytes(device_bytes)}"
        raise DoesNotFit("bundle", problem, "choose onnx-portable-int8, or a smaller model")
    return Predicted(
        weights_bytes=stored_bytes, kv_cache_bytes=0, logits_bytes=0, scores_bytes=scores,
        runtime_bytes=process, memory_bytes=total, device_memory_bytes=device_bytes,
        tokens_per_second_bound=None,
    )  # fmt: skip


def _golden(text: str, ids: list[int], values: Any) -> Golden:
    top = numpy.argsort(-values, kind="stable")[:VALUES]
    return Golden(
        messages=None, text=text, plain=True, ids=ids, greedy_ids=[], top_ids=[int(place) for place in top],
        top_logits=[float(values[place]) for place in top],
    )  # fmt: skip


def _by_torch(folder: Path, encoder: Encoder, rows: list[list[int]]) -> list[Any]:
    """What PyTorch gives for the ids: a text's logits, or the mean of its tokens' last hidden states."""
    import torch
    from transformers import AutoModel, AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification if encoder.task == "text-classification" else AutoModel
    with quiet_transformers():
        loaded: Any = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, report = loaded
    unread = () if encoder.labels else ("pooler.",)  # an embedding is the mean of hidden states
    missing = [name for name in report["missing_keys"] if not name.startswith(unread)]
    check_loaded(folder, report | {"missing_keys": missing, "unexpected_keys": ()})  # heads of other tasks
    model.eval()
    found = []
    with torch.no_grad():
        for ids in rows:
            output = model(torch.tensor([ids]))
            values = output.logits[0] if encoder.labels else output.last_hidden_state[0].mean(0)
            found.append(values.numpy())
    return found


def _prove(encoder: Encoder, given: list[Any], expected: list[Any], target: Target) -> EncoderProof:
    """How far the bundle is from PyTorch. Raises ParityFailed naming every tolerance that does not hold."""
    ours, theirs = numpy.stack(given).astype(numpy.float64), numpy.stack(expected).astype(numpy.float64)
    furthest = float(numpy.abs(ours - theirs).max())
    lengths = numpy.linalg.norm(ours, axis=1) * numpy.linalg.norm(theirs, axis=1)
    cosine = float(((ours * theirs).sum(1) / lengths).min())
    agreement, problems = None, []
    if encoder.labels:
        agreement = float((ours.argmax(1) == theirs.argmax(1)).mean())
        least = target.parity.min_top1_agreement
        problems += [f"labels agree on {agreement:.4f}, at least {least}"] if agreement < least else []
    elif 1 - cosine > (most := LARGEST_COSINE_LOSS[target.weight_bits]):
        problems.append(f"cosine to PyTorch's embedding {cosine:.6f}, at least {1 - most}")
    if target.weight_bits == 32 and not furthest <= target.golden_logit_tolerance:
        problems.append(f"values differ by {furthest:.3g}, at most {target.golden_logit_tolerance}")
    if problems:
        raise ParityFailed("encoder against PyTorch", "\n".join(problems), "try onnx-portable-fp32")
    return EncoderProof(texts=len(given), max_difference=furthest, min_cosine=cosine, label_agreement=agreement)
