"""When does a run stop before its last step, and which of its steps is kept? Judged by validation rows of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from edgeft.data.dataset import Sample
from edgeft.documents import saving
from edgeft.engine.lisa import Named
from edgeft.engine.loop import Run
from edgeft.engine.ranks import ALONE, Ranks
from edgeft.engine.sharded import by_first
from edgeft.errors import BadInput, EdgeftError
from edgeft.models.checkpoint import TensorFile, write_tensors
from edgeft.models.evaluate import by_length, score_group
from edgeft.settings.job import Training


@dataclass
class Stopping:
    """Losses of validation rows as a run goes on, and the parameters of the lowest, kept in its work folder.

    Of several processes the first one measures and keeps, the others hear what it found. A run that goes on from a
    checkpoint takes up what that says: its best file is kept until another checkpoint is there, so that the same steps
    follow.
    """

    training: Training
    rows: Sequence[Sample]
    work: Path
    losses: list[tuple[int, float]] = field(default_factory=list)
    kept: int = 0  # the best step that the newest checkpoint knows of
    ranks: Ranks = ALONE

    def go_on(self, losses: Sequence[Sequence[float]]) -> None:
        """Take up what a checkpoint says. Raises BadInput where the best file it names is gone."""
        self.losses = [(int(step), loss) for step, loss in losses]
        self.kept = self.best
        if self.best and not self._file(self.best).is_file():
            hint = f"start over: remove {self.work} and run the same command again"
            raise BadInput(self._file(self.best), "is gone, and the checkpoint beside it needs it", hint)

    @property
    def best(self) -> int:
        """The step of the lowest loss so far, the first of equal ones; 0 where none was validated."""
        return min(self.losses, key=lambda entry: entry[1])[0] if self.losses else 0

    def newest(self) -> dict[str, float]:
        """The loss of the last validation, where there was one, among the numbers that a step is shown with."""
        return {"valid_loss": self.losses[-1][1]} if self.losses else {}

    @property
    def ends(self) -> bool:
        """Whether so many validations in a row, as the plan has patience for, were no better than one before."""
        behind = sum(step > self.best for step, _ in self.losses)
        return bool(self.training.patience) and behind >= self.training.patience

    def due(self, step: int) -> bool:
        """Whether a step is followed by a validation."""
        training = self.training
        return bool(training.patience) and (step % training.valid_steps == 0 or step == training.steps)

    def validate(self, run: Run, progress: Callable[[int, int], None]) -> None:
        """Measure the mean loss of the rows now, and keep the parameters where it is the lowest so far."""
        with by_first(run.model, self.ranks) as computes:
            found = self._measured(run, progress) if computes else 0.0
        self.losses.append((run.step, self.ranks.told(lambda: found)))
        if self.best == run.step and self.ranks.first:
            self._keep(run)

    def _measured(self, run: Run, progress: Callable[[int, int], None]) -> float:
        summed, tokens, done = 0.0, sum(sample.trained_tokens for sample in self.rows), 0
        for group in by_length(self.rows, self.training.group_tokens):
            found, _ = score_group(
                run.model, run.parts, group, run.device, run.compute, self.training.loss_chunk_tokens
            )
            summed, done = summed + math.fsum(found), done + len(group)
            progress(done, len(self.rows))
        loss = round(summed / tokens, 6)
        if not math.isfinite(loss):
            raise EdgeftError("training", f"the loss of validation rows is {loss} after step {run.step}", "")
        return loss

    def state(self) -> list[tuple[int, float]]:
        """What a checkpoint that is written now must say."""
        self.kept = self.best
        return self.losses

    @torch.no_grad()
    def take_best(self, run: Run) -> None:
        """Give the parameters back what they were at the best step."""
        if not self.best or self.best == run.step:
            return
        saved = TensorFile(self._file(self.best))
        for name, parameter in everything(run):
            parameter.copy_(saved.read(name))

    def _keep(self, run: Run) -> None:
        with saving(self.work):
            for old in self.work.glob("best-*"):
                if old != self._file(self.kept):
                    old.unlink()
            temporary = self.work / ".best.tmp"
            write_tensors(temporary, {name: p.detach() for name, p in everything(run)})
            temporary.replace(self._file(run.step))

    def _file(self, step: int) -> Path:
        return self.work / f"best-{step:08d}.safetensors"


def everything(run: Run) -> Named:
    """(name, parameter) of all that may train: under LISA also what has not had its turn."""
    if run.lisa is None:
        return run.chosen
    return [entry for entries in run.lisa.units.values() for entry in entries]


def facts(stopping: Stopping) -> dict[str, Any]:
    """The fields of the result that say what was validated, and which step was kept."""
    return {"validations": tuple(stopping.losses), "best_step": stopping.best}
