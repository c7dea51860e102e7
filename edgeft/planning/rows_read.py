"""What does a plan read of its data: lengths, what the rows take in memory, and which of them are scored?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from edgeft.data.dataset import Lengths, Measured, TextTokenizer, hold_out, measure
from edgeft.data.labels import FEWEST_TO_CALIBRATE
from edgeft.data.samples import HELD_OUT_SHARE, held_out_count
from edgeft.data.scoring_groups import Size
from edgeft.errors import BadInput
from edgeft.models.headers import has_weights, local_folder
from edgeft.models.spec import ModelSpec
from edgeft.planning.early_stopping import rows_scored
from edgeft.settings.job import Job

DEFAULT_LENGTH, DEFAULT_ROWS = 2048, 1000  # planned for when no data is given
# Samples in memory: ids and labels in arrays of 4 bytes a token each, 300 bytes for the objects of a row; a tokenizer
# takes 340 for each entry of its vocabulary with its merge (16,000 to 150,000 entries, after freed memory was given
# back), and 3 MB whatever it holds. The text itself is read a few rows at a time.
DATA_BYTES, BYTES_PER_TOKEN, BYTES_PER_ROW, BYTES_PER_ENTRY = 3_000_000, 8, 300, 340
FEW = 50  # rows: the 95% interval of their exact match is some 28 points wide
Scored = tuple[tuple[Size, ...], ...]


class Read(NamedTuple):
    """What a plan has read of its data: each file once, training, validation and test data in this order."""

    tokenizer: TextTokenizer
    files: dict[str, Measured]


def read_data(job: Job, folder: Path | None) -> Read | None:
    """The job's data files; None where it has none. A hub model's tokenizer is fetched to measure them."""
    if job.data is None:
        return None
    if job.rows is not None:
        hint = f"leave it out: the data is counted; --data {job.data}#{job.rows} takes so many of its rows"
        raise BadInput("rows", "says how many are planned for where no data is given, and there is data", hint)
    folder = folder or local_folder(job.model)
    if not (folder / "tokenizer.json").is_file() and not has_weights(folder):
        hint = "leave --data out and say how long rows are and how many (--set max_length=64 --set rows=440; else "
        hint += f"{DEFAULT_ROWS:,} rows are assumed), or name the model itself"
        raise BadInput(folder, "is the shape of a model: it has no tokenizer to count data with", hint)
    tokenizer = TextTokenizer(folder)
    sources = filter(None, (job.data, job.valid, job.test))
    return Read(tokenizer, {source: measure(source, tokenizer, job.max_length) for source in sources})


def read_lengths(job: Job, spec: ModelSpec, read: Read | None) -> tuple[Lengths | None, int, Scored, list[str]]:
    """(training data's lengths, what all of it takes in memory, the sizes of what is scored, notes)."""
    if read is None:
        return None, 0, (), []
    sources = [source for source in (job.data, job.valid, job.test) if source]
    every, sizes = zip(*(read.files[source][:2] for source in sources), strict=True)
    notes = [f"{entry.path}: {entry.cut_rows} of {entry.rows} rows are cut to {job.max_length} tokens"
             for entry in every if entry.cut_rows]  # fmt: skip
    notes += [sentence for entry in every for sentence in entry.said]
    for entry in every:
        check_vocabulary(entry, spec)
    data_bytes = samples_bytes(every, read.tokenizer.backend.get_vocab_size())
    scored = _scored(job, sizes)
    return every[0], data_bytes, scored, [*notes, *few_rows(job, scored)]


def rows_of(job: Job, lengths: Lengths | None) -> int:
    """Rows that are there to train on; those that are assumed where no data is given."""
    return lengths.rows if lengths else job.rows or DEFAULT_ROWS


def steps_of(job: Job, lengths: Lengths | None) -> int:
    """Optimizer steps."""
    rows = rows_of(job, lengths)
    if lengths and job.valid is None:
        rows -= held_out_count(rows)
    steps = max(1, round(job.epochs * -(-max(1, rows) // job.batch_size)))
    return min(steps, job.max_steps or steps)


def assumed_rows(job: Job, length: int) -> list[str]:
    """What is planned for where no data is given, in a line."""
    often = f"{job.max_steps} steps at most" if job.max_steps else f"{job.epochs:g} epochs"
    return [f"no data given: {rows_of(job, None):,} rows of {length:,} tokens, all trained, {often}, are assumed"]


def _scored(job: Job, sizes: Sequence[list[Size]]) -> Scored:
    """The rows that a run scores before training and after it: of validation data the first, of test data all."""
    valid = sizes[1] if job.valid else hold_out(sizes[0], HELD_OUT_SHARE, job.seed)[1]
    return rows_scored(job, valid, sizes[-1] if job.test else None)


def few_rows(job: Job, scored: Scored) -> list[str]:
    """A line where so few rows are scored that their scores say little, and what to do about it."""
    files = scored[:-1] if job.patience else scored
    most, valid, lines = max(map(len, files)), len(files[0]), list[str]()
    where = "held out of the data are scored" if job.valid is None else "are there to validate"
    least, also = FEW, ""
    if job.patience:
        least, also = 2 * FEW, f", {len(scored[-1])} more say when the run stops"
    if most < FEW:
        lines.append(
            f"{most} rows {where}{also}: their scores tell only large differences from chance; --valid FILE with "
            f"{least} or more"
        )
    if job.answers == "labels" and valid < FEWEST_TO_CALIBRATE:
        lines.append(
            f"{valid} rows {where}{also}: too few to calibrate the labels' probabilities; --valid FILE with "
            f"{FEWEST_TO_CALIBRATE} or more"
        )
    return lines


def check_vocabulary(lengths: Lengths, spec: ModelSpec) -> None:
    """Raise BadInput for data with a token that the model's embedding has no row for."""
    if lengths.highest_id >= spec.vocab_size:
        problem = f"token {lengths.highest_id} is in it, the model's embedding has {spec.vocab_size} rows"
        hint = "the tokenizer has more tokens than the model: give it rows with model.resize_token_embeddings"
        raise BadInput(lengths.path, problem, hint)


def samples_bytes(files: Sequence[Lengths], vocabulary: int) -> int:
    """What the rows of all files and a tokenizer of so many entries take in a process that has read them."""
    rows = sum(BYTES_PER_TOKEN * file.tokens + BYTES_PER_ROW * file.rows for file in files)
    return DATA_BYTES + BYTES_PER_ENTRY * vocabulary + rows
