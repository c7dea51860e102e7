"""How does a tracker (TensorBoard, W&B, Trackio, MLflow ...) see a run, and neither slow it down nor take its memory?

By accelerate's trackers in a process of their own, which is told each step through a thread: a tracker that hangs, is
killed or finds no network ends by itself, and training goes on.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeft.documents import saving
from edgeft.errors import BadInput, MissingExtra, did_you_mean
from edgeft.machines import processes
from edgeft.machines.launcher import alone
from edgeft.models.metrics import Metrics
from edgeft.planning.plan import Plan
from edgeft.progress import Say
from edgeft.training.result import TrainResult
from edgeft.training.step_log import StepRecord, Watch, unwatched

# accelerate's names, each with the modules that it needs one of; a package is called as its first module
TRACKERS = {
    "aim": ("aim",), "clearml": ("clearml",), "comet_ml": ("comet_ml",), "dvclive": ("dvclive",), "mlflow": ("mlflow",),
    "swanlab": ("swanlab",), "tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",),
    "wandb": ("wandb",),
}  # fmt: skip
PROJECT = "edgeft"
LOG = "tracker.log"  # what trackers print
SECONDS_TO_START = 120.0  # that trackers have to say that they are there: one may wait for a network, or for a login
SECONDS_TO_END = 60.0  # that a tracker has, behind the last step, to send what it holds
UNUSED = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}  # a tracker needs no GPU, nor a context on one


def check_trackers(names: Sequence[str]) -> None:
    """Raise BadInput for a name that no tracker has, MissingExtra (exit 5) for one whose package is not there."""
    for name in names:
        module, colon, _ = name.partition(":")
        if colon:
            if not _is_there(module):
                raise BadInput("--track", f"no module {module!r} for {name}", "give it by PYTHONPATH, or install it")
        elif name not in TRACKERS:
            hint = did_you_mean(name, TRACKERS) + "; or MODULE:CLASS, a GeneralTracker of accelerate of your own"
            raise BadInput("--track", f"unknown tracker {name!r}", hint)
        elif not any(map(_is_there, TRACKERS[name])):
            raise MissingExtra(f"--track {name}", "is not installed", f"pip install {TRACKERS[name][0]}")


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


class Tracker:
    """Trackers in a process of their own, which nothing waits for but its start and its end, and these not for ever."""

    def __init__(self, names: Sequence[str], place: Path, config: Mapping[str, Any]) -> None:
        """Start them, each writing below `place` where it writes files. Raises BadInput with what they say."""
        with saving(place):
            place.mkdir(parents=True, exist_ok=True)
            (place / LOG).write_text("", encoding="utf-8")
        with open(place / LOG, "a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                processes.command("from edgeft.training.tracking import main; main()"), env=alone() | UNUSED,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
            )  # fmt: skip
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.lines.put(json.dumps({"trackers": list(names), "place": str(place), "config": dict(config)}))
        self.thread = threading.Thread(target=self._write, daemon=True)
        self.thread.start()
        if problem := self._started():
            self.end()
            raise BadInput(f"--track {','.join(names)}", problem, f"what it said is in {place / LOG}")

    def _started(self) -> str:
        """Why the trackers are not there, or nothing; killed where they do not answer."""
        stream, answers = self.process.stdout, queue.Queue[str]()
        assert stream is not None
        threading.Thread(target=lambda: answers.put(stream.readline()), daemon=True).start()
        try:
            said = answers.get(timeout=SECONDS_TO_START)
        except queue.Empty:
            self.process.kill()
            answers.get()  # its end: nobody reads the stream any more
            return f"had not started after {SECONDS_TO_START:.0f} seconds"
        return str(json.loads(said).get("problem", "")) if said else "ended at once"

    def step(self, record: StepRecord) -> None:
        """One step of the run, or one that it had behind it when it was stopped."""
        values = record.model_dump(exclude_none=True)
        self.lines.put(json.dumps({"at": values.pop("step"), "values": values}))

    def scores(self, result: TrainResult) -> None:
        """What base and fine-tuned model score, at the last step."""
        self.lines.put(json.dumps({"at": result.steps, "values": scores_of(result)}))

    def end(self) -> str:
        """Let them send what they hold; what went wrong, or nothing."""
        self.lines.put(None)
        try:
            code = self.process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return f"had not ended after {SECONDS_TO_END:.0f} seconds"
        finally:
            self.thread.join()  # nobody reads any more: what it still writes fails
            for stream in (self.process.stdout, self.process.stdin):
                with contextlib.suppress(OSError):  # what is left in a pipe that nobody reads
                    if stream is not None:
                        stream.close()
        return processes.reason(code, "") if code else ""

    def _write(self) -> None:
        """What the thread does: hand lines on, as long as somebody reads them."""
        stream = self.process.stdin
        assert stream is not None
        with contextlib.suppress(OSError, ValueError):
            while (line := self.lines.get()) is not None:
                stream.write(line + "\n")
                stream.flush()
            stream.close()


@contextlib.contextmanager
def tracking(names: Sequence[str], plan: Plan, out: Path, say: Say) -> Iterator[Tracker | None]:
    """The trackers of a run in `out`, None where none are asked for; what goes wrong on their way is said."""
    if not names:
        yield None
        return
    place = out.with_name("tracking")
    tracker = Tracker(names, place, config_of(plan))
    say(f"tracking with {', '.join(names)} in {place}; what it says is in {place / LOG}")
    try:
        yield tracker
    finally:
        if problem := tracker.end():
            say(f"WARNING: tracking ended early, training was not touched: {problem}; see {place / LOG}")


def watch_of(tracker: Tracker | None) -> Watch:
    """What a run tells its steps to."""
    return tracker.step if tracker is not None else unwatched


def config_of(plan: Plan) -> dict[str, str | int | float | bool]:
    """How a run trains, as trackers take it."""
    values = {"model": plan.job.model, "profile": plan.profile.name, **plan.training.model_dump(mode="json")}
    return {name: value if isinstance(value, str | int | float | bool) else json.dumps(value)
            for name, value in values.items() if value is not None}  # fmt: skip


def scores_of(result: TrainResult) -> dict[str, float]:
    """Scores by names such as valid_loss_base."""
    named: dict[str, Metrics | None] = {
        "valid_{}_base": result.base_valid, "valid_{}_tuned": result.valid,
        "test_{}_base": result.base_test, "test_{}_tuned": result.test,
    }  # fmt: skip
    found = ((form.format(score), getattr(metrics, score)) for form, metrics in named.items() if metrics is not None
             for score in ("loss", "exact_match", "f1"))  # fmt: skip
    return {name: value for name, value in found if value is not None}


def main() -> None:
    """The trackers' process: what to start on the first line, a step on each further one, until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what trackers print is no answer
    asked = json.loads(sys.stdin.readline())
    try:
        trackers = [_start(name, Path(asked["place"]), asked["config"]) for name in asked["trackers"]]
    except Exception as problem:  # whatever a package raises
        print(json.dumps({"problem": f"{type(problem).__name__}: {problem}"}), file=answers, flush=True)
        raise SystemExit(1) from problem
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        told = json.loads(line)
        for tracker in trackers:
            tracker.log(told["values"], step=told["at"])
    for tracker in trackers:
        tracker.finish()


def _start(name: str, place: Path, config: dict[str, Any]) -> Any:
    """One of accelerate's trackers, begun. TensorBoard hides what an earlier run wrote there."""
    from accelerate import tracking as known

    module, colon, attribute = name.partition(":")
    kind = getattr(importlib.import_module(module), attribute) if colon else known.LOGGER_TYPE_TO_CLASS[name]
    given = (PROJECT, str(place)) if kind.requires_logging_directory else (PROJECT,)
    tracker = kind(*given, **({"purge_step": 0} if name == "tensorboard" else {}))
    tracker.start()
    tracker.store_init_configuration(config)
    return tracker
