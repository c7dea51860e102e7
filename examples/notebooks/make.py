"""Write each notebook's .ipynb from its text, which is what is edited. python examples/notebooks/make.py

The text is in the percent format, as jupytext, VS Code and Spyder read it: `# %%` begins a cell.
"""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TEXTS = sorted(path for path in HERE.glob("*.py") if path.name != Path(__file__).name)


def cells(text: str) -> list[dict[str, Any]]:
    """The cells of a text in the percent format, as .ipynb has them."""
    made = []
    for number, part in enumerate(text.split("# %%")[1:]):
        head, _, body = part.partition("\n")
        lines = body.strip("\n").splitlines(keepends=True)
        kind = "markdown" if "[markdown]" in head else "code"
        if kind == "markdown":
            lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": lines}
        made.append(cell if kind == "markdown" else cell | {"execution_count": None, "outputs": []})
    return made


def notebook(text: str) -> str:
    """The .ipynb of a text; outputs are left out, so that the same text gives the same file."""
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    whole = {"cells": cells(text), "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for path in TEXTS:
        path.with_suffix(".ipynb").write_text(notebook(path.read_text(encoding="utf-8")), encoding="utf-8")
