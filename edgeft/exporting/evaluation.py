"""How good are several forms of a model on a user's own rows, each as it runs, and do the rows show a difference?

A checkpoint is scored in PyTorch, a bundle in its own runtime by run.py: the two that an export's proof compares.
"""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeft.data.dataset import Sample, TextTokenizer, read_samples
from edgeft.data.grammar import HeldTo
from edgeft.data.sources import digest, names
from edgeft.documents import sha256_file, versions
from edgeft.errors import BadInput
from edgeft.exporting.bundle import MANIFEST, Bundle
from edgeft.exporting.result import Evaluated, Evaluation
from edgeft.machines.extras import need
from edgeft.merging.result import MergedCheckpoint
from edgeft.models.headers import local_folder
from edgeft.models.identity import weights_sha256
from edgeft.models.metrics import Metrics, pair
from edgeft.models.spec import read_model_spec
from edgeft.planning.plan import Plan
from edgeft.progress import Progress

TEXT = "tokenizer.json"


@dataclass(frozen=True)
class Candidate:
    """One form of a model: a checkpoint folder, or a bundle's."""

    name: str
    folder: Path

    @property
    def is_bundle(self) -> bool:
        return (self.folder / MANIFEST).is_file()

    @property
    def sha256(self) -> str:
        """Of a bundle's manifest, or of all weights."""
        return sha256_file(self.folder / MANIFEST) if self.is_bundle else weights_sha256(self.folder)


def forms_of(folders: Sequence[str | Path]) -> list[Candidate]:
    """The forms that folders stand for: a run's is its base, merged checkpoint and bundle; any other one is itself.

    Raises BadInput for what is none, and for a bundle that failed its proof or is an encoder's.
    """
    found: list[Candidate] = []
    for given in folders:
        folder = Path(given)
        if (folder / "merged" / "merged.json").is_file():
            found += _of_run(folder)
        else:
            place = folder if folder.is_dir() else local_folder(str(given))
            found.append(Candidate(_unused(place.resolve().name or str(given), found), place))
    for form in found:
        _check(form)
    return found


def _of_run(folder: Path) -> list[Candidate]:
    merged = folder / "merged"
    base = local_folder(MergedCheckpoint.read(merged / "merged.json").train.plan.job.model)
    made = [Candidate("base", base), Candidate("merged", merged)]
    bundle = folder / "bundle"
    if (bundle / MANIFEST).is_file():
        made.append(Candidate(Bundle.read(bundle / MANIFEST).target.name, bundle))
    return made


def _unused(name: str, found: Sequence[Candidate]) -> str:
    taken = {form.name for form in found}
    return next(each for number in itertools.count(1)
                if (each := name if number == 1 else f"{name} {number}") not in taken)  # fmt: skip


def _check(form: Candidate) -> None:
    if not form.is_bundle:
        if not (form.folder / "config.json").is_file():
            hint = "give a checkpoint, a bundle, or the folder of a run that holds merged/ and bundle/"
            raise BadInput(form.folder, f"holds neither config.json nor {MANIFEST}", hint)
        return
    manifest = Bundle.read(form.folder / MANIFEST)
    if manifest.failed:
        raise BadInput(form.folder, f"failed its proof: {manifest.failed}", "score a bundle that is to be shipped")
    if manifest.task != "text-generation":
        raise BadInput(form.folder, f"is for {manifest.task}: it writes no text to score")


def plan_of(forms: Sequence[Candidate]) -> Plan | None:
    """The plan of the first merged checkpoint among them: its lengths and what answers are held to."""
    records = (form.folder / "merged.json" for form in forms if not form.is_bundle)
    own = [path for path in records if path.is_file() and "train" in json.loads(path.read_text(encoding="utf-8"))]
    return MergedCheckpoint.read(own[0]).train.plan if own else None


def evaluate(
    folders: Sequence[str | Path], data: str, *, max_length: int | None = None, progress: Progress
) -> Evaluation:
    """The scores of every form on all rows of `data`, and what each changes of the one before it.

    Answers are held to what the plan of a merged checkpoint holds them to; samples are cut to its length where
    `max_length` says nothing, and to a bundle's context. Raises BadInput for forms that read text in different ways:
    their losses are no pairs.
    """
    started = time.monotonic()
    forms = forms_of(folders)
    if not forms:
        raise BadInput("eval", "no model was given", "name checkpoints and bundles, or the folder of a run")
    plan, tokenizer = plan_of(forms), _tokenizer(forms)
    contexts = [Bundle.read(form.folder / MANIFEST).context_tokens for form in forms if form.is_bundle]
    asked = max_length or (plan.training.max_length if plan else None)
    longest = min([*contexts, *([asked] if asked else [])], default=None)
    samples = [sample for sample in read_samples(data, tokenizer, longest) if sample.trained_tokens]
    if not samples:
        raise BadInput(data, "no sample has a token to score", "raise --max-length")
    held_to: HeldTo = plan.held_to if plan else ()
    scores = {form.name: _score(form, samples, tokenizer, held_to, progress) for form in forms}
    ordered = list(scores)
    steps = [*itertools.pairwise(ordered), *([(ordered[0], ordered[-1])] if len(ordered) > 2 else [])]
    pairs = (pair(before, scores[before], after, scores[after]) for before, after in steps)
    return Evaluation(
        versions=versions(), data=names(data), data_sha256=digest(data),
        cut_rows=sum(sample.cut_tokens > 0 for sample in samples), forms=_records(forms), scores=scores,
        pairs=tuple(filter(None, pairs)), seconds=round(time.monotonic() - started, 2),
    )  # fmt: skip


def evaluate_tasks(
    folders: Sequence[str | Path], tasks: Sequence[str], *, task_folder: Path | None = None, limit: int | None = None,
    progress: Progress,
) -> Evaluation:  # fmt: skip
    """lm-eval's tasks, asked of every form in turn. Raises BadInput for unknown ones, MissingExtra without lm-eval."""
    need("lm-eval")
    from edgeft.exporting.artifact import ArtifactModel
    from edgeft.exporting.harness import InTorch, run_tasks
    from edgeft.machines import meter

    started, found = time.monotonic(), {}
    forms = forms_of(folders)
    tokenizer = _tokenizer(forms)
    for form in forms:
        model = ArtifactModel(form.folder) if form.is_bundle else InTorch(_load(form.folder))
        found[form.name] = run_tasks(
            model, tokenizer, tasks, folder=task_folder, limit=limit,
            told=functools.partial(_tell, progress, form.name),
        )  # fmt: skip
        del model
        meter.give_back()
    return Evaluation(
        versions=versions(), forms=_records(forms), tasks=found, seconds=round(time.monotonic() - started, 2)
    )


def _tell(progress: Progress, name: str, done: int, total: int) -> None:
    progress(f"eval: {name}", done, total, {})


def _records(forms: Sequence[Candidate]) -> tuple[Evaluated, ...]:
    return tuple(
        Evaluated(name=form.name, kind="bundle" if form.is_bundle else "checkpoint", sha256=form.sha256)
        for form in forms
    )


def _tokenizer(forms: Sequence[Candidate]) -> TextTokenizer:
    """The one that all forms read text with, of a checkpoint where there is one."""
    able = [form for form in forms if (form.folder / TEXT).is_file()]
    if not able:
        raise BadInput(forms[0].folder, f"holds no {TEXT}", "name the merged checkpoint that it was made from as well")
    first = min(able, key=lambda form: form.is_bundle)
    tokenizer = TextTokenizer(first.folder)
    for form in able:
        other = TextTokenizer(form.folder) if form is not first else tokenizer
        same = other.backend.get_vocab() == tokenizer.backend.get_vocab()
        if not same or other.template_text != tokenizer.template_text:
            what = "chat template" if same else "vocabulary"
            problem = f"has another {what} than {first.folder}: their losses cannot be compared row by row"
            raise BadInput(form.folder, problem, "score them one at a time")
    return tokenizer


def _score(
    form: Candidate, samples: Sequence[Sample], tokenizer: TextTokenizer, held_to: HeldTo, progress: Progress
) -> Metrics:
    """One form's scores, itself gone from memory before the next one is loaded."""
    from edgeft.exporting.artifact import ArtifactModel
    from edgeft.exporting.outputs import observe_artifact, observe_model
    from edgeft.machines import meter

    told = functools.partial(_tell, progress, form.name)
    told(0, len(samples))
    if form.is_bundle:
        seen = observe_artifact(
            form.name, ArtifactModel(form.folder), samples, tokenizer, answers=slice(None), held_to=held_to,
            progress=told,
        )  # fmt: skip
    else:
        model = _load(form.folder)
        seen = observe_model(
            form.name, model, samples, tokenizer, answers=slice(None), held_to=held_to, progress=told
        )  # fmt: skip
        del model
    meter.give_back()
    return seen.metrics(samples, tokenizer)


def _load(folder: Path) -> object:
    """A checkpoint in fp32: a layer at a time where memory has no room for all of them."""
    from edgeft.machines.limits import memory_limit
    from edgeft.models.checkpoint import load_plain
    from edgeft.models.streamed import load_streamed

    whole = 4 * read_model_spec(str(folder)).total_parameters
    return load_plain(folder) if 1.5 * whole < memory_limit().bytes else load_streamed(folder)
