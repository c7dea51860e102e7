"""How does a merged checkpoint become a proven bundle: built, compared rung by rung, scored, written whole?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgeft import disk, stages
from edgeft.artifacts import sha256_file
from edgeft.build import ArtifactModel, build_bundle
from edgeft.bundle import Bundle, GoldenInput
from edgeft.checkpoint import load_plain
from edgeft.data import Row, TextTokenizer, read_rows
from edgeft.errors import BadInput
from edgeft.footprint import bundle_weights
from edgeft.memory import Workload
from edgeft.merge import MergedCheckpoint
from edgeft.parity import climb, score_artifact, score_model
from edgeft.sbom import BASE, Component, model_licence
from edgeft.scores import Metrics, Proof
from edgeft.stages import PARITY_PROMPTS, target_device
from edgeft.target import Target
from edgeft.train import Data

GOLDEN_PROMPTS = 4

Progress = Callable[[str, int, int, dict[str, float]], None]


def export(merged_folder: Path, target: Target, out: Path, *, device: str | None, progress: Progress) -> Bundle:
    """Build, prove and write the bundle of a merged checkpoint; `device` names the profile it must fit.

    Raises ParityFailed (exit 4), and then writes nothing, when the artifact is not the model that was trained;
    DoesNotFit when the device, this machine or its disk has no room; BadInput for an unknown device or a missing merge.
    """
    merged = MergedCheckpoint.read(merged_folder / "merged.json")
    trained = trained_folder(merged_folder, merged)
    profile = target_device(device)
    plan = merged.train.plan
    has, longest = stages.processes(plan.profile), plan.training.max_length
    work = Workload(longest, min(longest, plan.lengths.longest_trained if plan.lengths else longest))
    phases = (
        stages.build(plan.spec, target, has, plan.stages.data_bytes),
        stages.prove(plan.spec, plan.training, target, has, work, plan.stages.data_bytes),
    )
    for phase in phases:
        stages.check_host(phase.name, phase.low_bytes - stages.file_bytes(phase))
    disk.require(disk.export_disk(bundle_weights(plan.spec, target).stored_bytes), out)
    data = Data.read(merged.train.plan)
    tokenizer = TextTokenizer(merged_folder)
    prompts = data.valid[:PARITY_PROMPTS]
    # without test data: the validation rows that training scored
    eval_rows = merged.train.plan.training.eval_rows
    source, rows = ("test", data.test) if data.test else ("validation", data.valid[:eval_rows])

    def prove(artifact: ArtifactModel) -> Proof:
        rungs = climb(trained, merged_folder, artifact, prompts, tokenizer, target.parity, progress)
        scores = _scores_of_training(merged, bool(data.test))
        scores["merged"] = score_model(
            load_plain(merged_folder),
            rows,
            tokenizer,
            lambda done, total: progress("score merged", done, total, {}),
        )
        scores[target.name] = score_artifact(
            artifact, rows, tokenizer, lambda done, total: progress("score bundle", done, total, {})
        )
        positions = sum(sample.trained_tokens for sample in prompts)
        return Proof(prompts=len(prompts), positions=positions, rungs=rungs, scored_on=source, scores=scores)

    progress("build", 0, 1, {})
    golden, chat = golden_inputs(merged, tokenizer)
    return build_bundle(
        merged_folder,
        target,
        out,
        prompts=golden,
        prompt_format="chat" if chat else "plain",
        device_memory_bytes=profile.budget_bytes if profile else None,
        device_bandwidth_bytes_per_second=profile.bandwidth_gb_per_second * 1e9 if profile else None,
        input_sha256=sha256_file(merged_folder / "merged.json"),
        provenance={
            "merged.json": sha256_file(merged_folder / "merged.json"),
            "train.json": merged.input_sha256,
            "plan.json": merged.train.input_sha256,
            "base weights": merged.train.base_sha256,
            "training data": merged.train.plan.lengths.sha256 if merged.train.plan.lengths else "",
            "device": profile.name if profile else "",
        },
        prove=prove,
        predicted_peak_bytes=max(phase.expected_bytes for phase in phases),
        sources=made_from(merged, merged_folder),
    )


def made_from(merged: MergedCheckpoint, merged_folder: Path) -> list[Component]:
    """What a merge was made from: base model and data by name and hash, never a path or content."""
    job = merged.train.plan.job
    licence = model_licence(Path(job.model)) or model_licence(merged_folder)
    name = Path(job.model).resolve().name if Path(job.model).is_dir() else job.model
    found = [Component("machine-learning-model", name, BASE, weights_sha256=merged.train.base_sha256, licence=licence)]
    lengths = merged.train.plan.lengths
    for role, source in (("training data", job.data), ("validation data", job.valid), ("test data", job.test)):
        if source is None:
            continue
        path = Path(source)
        digest = lengths.sha256 if lengths and source == job.data else sha256_file(path) if path.is_file() else ""
        found.append(Component("data", path.name if path.is_file() else source, role, sha256=digest))
    return found


def trained_folder(merged_folder: Path, merged: MergedCheckpoint) -> Path:
    """The training result a merge was made from, beside it. Raises BadInput when it is gone or another one."""
    folder = merged_folder.parent / "train"
    if not (folder / "train.json").is_file() or sha256_file(folder / "train.json") != merged.input_sha256:
        hint = "keep train/ and merged/ in one folder, or run edgeft merge again"
        raise BadInput(folder, "does not hold the training result this merge was made from", hint)
    return folder


def _scores_of_training(merged: MergedCheckpoint, test: bool) -> dict[str, Metrics]:
    result = merged.train
    base, tuned = (result.base_test, result.test) if test else (result.base_valid, result.valid)
    return {name: scores for name, scores in (("base", base), ("fine-tuned", tuned)) if scores is not None}


def golden_inputs(merged: MergedCheckpoint, tokenizer: TextTokenizer) -> tuple[list[GoldenInput], bool]:
    """(prompts whose answers the bundle records, whether they are chats): the first rows of the validation data."""
    job = merged.train.plan.job
    source = job.valid or job.data
    assert source is not None  # Data.read has refused a plan without data
    rows = read_rows(source, tokenizer)[:GOLDEN_PROMPTS]
    chat = rows[0].format == "chat"
    # a chat's pieces are rendered already: its last prompt is replayed as the text the device must reproduce
    return [GoldenInput(text=_prompt_text(row)) if not chat else _chat_input(row) for row in rows], chat


def _prompt_text(row: Row) -> str:
    return row.pieces[0][0] if row.has_prompt else row.pieces[0][0][:64]


def _chat_input(row: Row) -> GoldenInput:
    assert row.messages is not None
    return GoldenInput(messages=list(row.messages))
