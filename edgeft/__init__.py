"""edgeft: fine-tune a language model inside a memory budget and ship it to a small device, proven equal.

    plan = edgeft.plan(model="folder", data="rows.jsonl", profile="t4", rank=16)   # print(plan) is the table
    trained = edgeft.train(plan, "build/t4/train")
    merged = edgeft.merge(trained, wise_alpha=0.6)
    bundle = edgeft.export(merged, device="raspberrypi5-8gb")
    with edgeft.wise(model, 0.5):  # a live model, half way between base and fine-tuned
        model.generate(...)

Each function of `edgeft.api` says what it takes, gives and raises.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# Packages that call home unless told before they are imported: onnxruntime since 1.29 and onnxruntime-genai since 0.18
# write a device id into the home folder. What a user has set stays; processes that edgeft starts inherit it.
for _name in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
    os.environ.setdefault(_name, "1")

if TYPE_CHECKING:
    from edgeft.api.deploying import export, run, verify
    from edgeft.api.doctoring import doctor
    from edgeft.api.evaluating import evaluate
    from edgeft.api.example import example
    from edgeft.api.matrices import Matrix, matrix
    from edgeft.api.merging import SweepOptions, merge
    from edgeft.api.plan_and_train import plan, train
    from edgeft.api.reports import report
    from edgeft.api.results import Bundle, Evaluation, Merged, MergedForeign, Plan, TrainResult
    from edgeft.api.sharing import push
    from edgeft.merging.wise import wise
    from edgeft.planning.plan import make_plan
    from edgeft.settings.job import Job, make_job

__version__ = "0.2.0"
__all__ = ["Bundle", "Evaluation", "Job", "Matrix", "Merged", "MergedForeign", "Plan", "SweepOptions",
           "TrainResult", "doctor", "evaluate", "example", "export", "make_job", "make_plan", "matrix",
           "merge", "plan", "push", "report", "run", "train", "verify", "wise"]  # fmt: skip
HOMES = {
    "api.deploying": ("export", "run", "verify"),
    "api.doctoring": ("doctor",),
    "api.evaluating": ("evaluate",),
    "api.example": ("example",),
    "api.matrices": ("Matrix", "matrix"),
    "api.merging": ("SweepOptions", "merge"),
    "api.plan_and_train": ("plan", "train"),
    "api.reports": ("report",),
    "api.results": ("Bundle", "Evaluation", "Merged", "MergedForeign", "Plan", "TrainResult"),
    "api.sharing": ("push",),
    "merging.wise": ("wise",),
    "planning.plan": ("make_plan",),
    "settings.job": ("Job", "make_job"),
}


def __getattr__(name: str) -> Any:
    """Import what is named on first use only: importing edgeft costs nothing."""
    import importlib

    for home, names in HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"edgeft.{home}"), name)
    raise AttributeError(f"module 'edgeft' has no attribute {name!r}")
