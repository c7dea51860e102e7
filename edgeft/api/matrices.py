"""Which model fits which machine, from Python: a table that a notebook shows."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from edgeft.api.results import OnDisk
from edgeft.machines.limits import usable_cores
from edgeft.progress import Progress, silent
from edgeft.reporting import matrix as matrices
from edgeft.reporting.matrix import DeviceCell, TrainingCell, find_models, find_profiles, make_matrix
from edgeft.reporting.words import cell_text, symbol
from edgeft.settings.job import AUTO


class Matrix(OnDisk, matrices.Matrix):
    """matrix.json: every model on every machine."""

    def text(self) -> Any:
        head, *rows = self._cells()
        table = Table(*head, box=None)
        for row in rows:
            table.add_row(*row)
        return table

    def _repr_html_(self) -> str:
        head, *rows = ([html.escape(cell) for cell in row] for row in self._cells())
        lines = ["".join(f"<th>{cell}</th>" for cell in head)]
        lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
        return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"

    def _cells(self) -> list[list[str]]:
        """A row for each model, a column for each machine that trains, then for each device."""
        machines = [machine.name for machine in (*self.training_machines, *self.devices)]
        rows = []
        for model in self.models:
            cells: list[TrainingCell | DeviceCell] = [*model.training, *model.devices]
            rows.append([model.name, *(f"{symbol(cell)} {cell_text(cell)}" for cell in cells)])
        return [["model", *machines], *rows]


def matrix(
    models: str | Path | Sequence[str | Path], machines: Sequence[str] = ("all",), *, target: str = AUTO,
    progress: Progress = silent, **settings: object,
) -> Matrix:  # fmt: skip
    """Every model (a folder of them, or several) planned on every machine: which fits where, how, in what time.

    `settings` are pinned as in `edgeft.plan`. Raises BadInput.
    """
    folders = [models] if isinstance(models, str | Path) else models
    found = [each for folder in folders for each in find_models(Path(folder))]
    values = {name: str(value) for name, value in settings.items()}
    made = make_matrix(
        found, find_profiles(",".join(machines)), target=target, settings=values, workers=usable_cores(),
        progress=progress,
    )  # fmt: skip
    return Matrix.at(None, made)
