"""Which ways of training are compared by bench/methods.py, on what, with how many rows and seeds?"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from run import BASE, ROOT, SECTIONS

from edgeft.settings.tuners import TUNERS

FOLDER = ROOT / "build" / "methods"
RANK = 16
RANKED: dict[str, Any] = {"rank": RANK}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"tuner": "full"},
    "lora": {"tuner": "lora", **RANKED},
    "lora_plus": {"tuner": "lora", "lora_plus": 16, **RANKED},
    "dora": {"tuner": "dora", **RANKED},
    "adalora": {"tuner": "adalora", **RANKED},
    "ia3": {"tuner": "ia3"},
    "h-adapter": {"tuner": "h-adapter"},
    "adapter": {"tuner": "adapter", **RANKED},
    "prefix": {"tuner": "prefix"},
    "prompt": {"tuner": "prompt"},
}
LAYERS: dict[str, dict[str, Any]] = {
    "all": {"layers": "all"},
    "sparse": {"layers": "sparse", "layer_score": "gradient"},
    "lisa": {"layers": "lisa"},
    "random": {"layers": "sparse", "layer_score": "random"},
}
CONTROLLED = ("lora", "dora", "adapter")  # in random layers too, and where layers are few with three seeds
REFERENCE = "lora, all"
FIRST = ("full, all", REFERENCE)  # what the others are compared with
EPOCHS = {100: 10, 1000: 2, 6000: 1}
CHOSEN_AT, LARGE, BEST = 1000, 6000, 5


def split(way: str) -> tuple[str, str]:
    """(method, layers) of a way."""
    method, _, layers = way.partition(", ")
    return method, layers


def seeds(way: str, rows: int) -> range:
    """The seeds that a way runs with: three where a run is short, others are compared with it, or it with random."""
    method, layers = split(way)
    controlled = way in FIRST or (method in CONTROLLED and layers in ("sparse", "random"))
    return range(3 if (controlled and rows == CHOSEN_AT) or (layers == "all" and rows < CHOSEN_AT) else 1)


class Setting(NamedTuple):
    """A model and a task: what ways are compared on."""

    name: str
    base: Path
    train: Path
    valid: Path
    test: Path
    epochs: dict[int, int]  # by the rows that are trained on
    active: dict[str, int]  # layers that train at a time, where not all do
    eval_rows: int
    folder: Path
    seeds: Callable[[str, int], range] = seeds  # of a way and so many rows
    more: Mapping[str, Any] = {}  # settings that all ways share

    def data(self, rows: int, seed: int) -> Path:
        """A file with so many training rows: the first, where a seed's rows are few those behind the last seed's."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = self.train.read_text(encoding="utf-8").splitlines(keepends=True)
        first = seed * rows % len(lines)
        out = self.folder / f"train-{rows}-{first}.jsonl"
        if not out.is_file():  # whole or not at all: another run may read it meanwhile
            part = out.with_name(f".{out.name}-{threading.get_ident()}")
            part.write_text("".join(lines[first : first + rows]), encoding="utf-8")
            part.replace(out)
        return out


EXAMPLE = Setting(
    name="example", base=BASE, train=SECTIONS / "train.jsonl", valid=SECTIONS / "valid.jsonl",
    test=SECTIONS / "test.jsonl", epochs=EPOCHS, active={"sparse": 2, "lisa": 2, "random": 2}, eval_rows=500,
    folder=FOLDER,
)  # fmt: skip


class Case(NamedTuple):
    """One run."""

    way: str  # "tuner, layers"
    rows: int
    seed: int = 0
    factor: float = 1.0  # of the learning rate
    of: Setting = EXAMPLE

    @property
    def name(self) -> str:
        return f"{self.way}, {self.rows} rows, seed {self.seed}, rate x {self.factor:.3g}"

    @property
    def folder(self) -> Path:
        return self.of.folder / self.name.replace(", ", "-").replace(" ", "_")

    @property
    def settings(self) -> dict[str, Any]:
        tuner, layers = split(self.way)
        row = TUNERS[METHODS[tuner]["tuner"]]
        rate = row.rate(json.loads((self.of.base / "config.json").read_text())["hidden_size"]) * self.factor
        more = {"learning_rate": float(f"{rate:.3g}"), "seed": self.seed, "epochs": self.of.epochs[self.rows]}
        few = {} if layers == "all" else {"active_layers": self.of.active[layers]}
        shared = {"eval_rows": self.of.eval_rows, "sample_answers": 0, "prefix_cache": "false"}
        return {**METHODS[tuner], **LAYERS[layers], **few, **more, **shared, **self.of.more}


def ways() -> Iterator[str]:
    """Every tuner that there is in the layers that it goes with, those that others are compared with first."""
    for layers in LAYERS:
        for method, settings in METHODS.items():
            there = settings["tuner"] in TUNERS and (layers == "all" or method != "prompt")
            if there and (layers != "random" or method in CONTROLLED):
                yield f"{method}, {layers}"


def named(way: str, only: str) -> bool:
    """Whether `--only` names a way: `lora` in any layers, or `lora:sparse`."""
    method, layers = split(way)
    return not only or any(each.strip() in (method, f"{method}:{layers}") for each in only.split(","))
