"""What does a stage give back in Python? Its JSON document, which knows its folder and reads as on a screen."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import PrivateAttr

from edgeft.documents import Artifact
from edgeft.errors import BadInput
from edgeft.exporting import bundle as bundles
from edgeft.exporting import result as evaluations
from edgeft.merging import result as merges
from edgeft.planning import plan as plans
from edgeft.training import result as trainings

if TYPE_CHECKING:
    from typing import Self


class OnDisk(Artifact):
    """A stage's document that knows where it lies, and reads as it does on a screen."""

    _path: Path | None = PrivateAttr(None)

    @classmethod
    def at(cls, path: Path | None, document: Artifact) -> Self:
        """The document as this type, lying in `path`."""
        made = cls.model_construct(document.model_fields_set, **dict(document))
        made._path = path
        return made

    @property
    def path(self) -> Path:
        """The JSON file. Raises BadInput for a plan that was not written."""
        if self._path is None:
            raise BadInput(type(self).__name__, "lies in no file", "give out= to the function that makes it")
        return self._path

    @property
    def folder(self) -> Path:
        """The folder of the stage, which holds the JSON file."""
        return self.path.parent

    @abstractmethod
    def text(self) -> Any:
        """What the command line prints, for a rich console."""

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, highlight=False)
        with console.capture() as shown:
            console.print(self.text())
        return shown.get()

    def _repr_html_(self) -> str:
        import html

        return f"<pre>{html.escape(str(self))}</pre>"


class Plan(OnDisk, plans.Plan):
    """plan.json: how a job runs on a profile, what that takes, and what else was looked at."""

    def text(self) -> Any:
        from edgeft.reporting.terminal import plan_text

        return plan_text(self)


class TrainResult(OnDisk, trainings.TrainResult):
    """train.json: what was trained, on what, how well, and how much memory it took."""

    def text(self) -> Any:
        from edgeft.reporting.terminal import train_text

        return train_text(self)


class _OfMerge(OnDisk, merges.Merged):
    def text(self) -> Any:
        from edgeft.reporting.terminal import merge_text

        return merge_text(self)


class Merged(_OfMerge, merges.MergedCheckpoint):
    """merged.json of what edgeft trained: which share of the change was taken, and what it did."""


class MergedForeign(_OfMerge, merges.MergedForeign):
    """merged.json of an adapter or checkpoint that edgeft did not train."""


class Bundle(OnDisk, bundles.Bundle):
    """bundle.json: what runs on the device, what it was made from, and its proof."""

    _merged: merges.MergedCheckpoint | None = PrivateAttr(None)

    def text(self) -> Any:
        from edgeft.reporting.bundle_tables import bundle_text

        return bundle_text(self, self._merged, bundles.measurement_of(self.folder))

    @property
    def learnt(self) -> bool:
        """Whether the rows that its training scored show that anything was learnt; True where nothing is known."""
        from edgeft.reporting.learnt import has_learnt

        return self._merged is None or has_learnt(self._merged.train)


class Evaluation(OnDisk, evaluations.Evaluation):
    """evaluation.json: forms of a model on the same rows, each as it runs, and what each changes."""

    def text(self) -> Any:
        from edgeft.reporting.bundle_tables import evaluation_text

        return evaluation_text(self)


def place(result: OnDisk | str | Path, document: str) -> Path:
    """The folder of a stage, of its result or of its name. Raises BadInput where the stage has not run."""
    folder = result.folder if isinstance(result, OnDisk) else Path(result)
    if folder.name == document:
        folder = folder.parent
    if not (folder / document).is_file():
        raise BadInput(folder / document, "no such file", "run the stage before this one first")
    return folder
