"""How good are base, merged checkpoint and bundle on rows of a user's own, from Python?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgeft.api.results import Evaluation, OnDisk
from edgeft.errors import BadInput
from edgeft.machines.extras import need
from edgeft.progress import Progress, silent


def evaluate(
    *forms: OnDisk | str | Path, data: str | Path | None = None, max_length: int | None = None,
    tasks: Sequence[str] = (), task_folder: str | Path | None = None, limit: int | None = None,
    out: str | Path | None = None, progress: Progress = silent,
) -> Evaluation:  # fmt: skip
    """Scores of several forms of a model on all rows of `data`, with paired 95% intervals; or on lm-eval's `tasks`.

    A form is a checkpoint folder (a hub id, a merge) or a bundle; the folder of a run stands for its base, merge and
    bundle. Checkpoints answer in PyTorch, bundles by run.py, as in an export's proof. `limit` rows of each task are
    asked. Raises BadInput for forms that cannot be compared, MissingExtra.
    """
    from edgeft.exporting.evaluation import evaluate as score
    from edgeft.exporting.evaluation import evaluate_tasks

    if (data is None) == (not tasks):
        raise BadInput("eval", "needs rows or tasks, one of them", "--data FILE, or --tasks NAME,... of lm-eval")
    need("export")
    folders = [form.folder if isinstance(form, OnDisk) else form for form in forms]
    if data is not None:
        made = score(folders, str(data), max_length=max_length, progress=progress)
    else:
        place = Path(task_folder) if task_folder is not None else None
        made = evaluate_tasks(folders, tasks, task_folder=place, limit=limit, progress=progress)
    path = Path(out) if out is not None else None
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        made.write(path)
    return Evaluation.at(path, made)
