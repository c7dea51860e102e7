"""What does the planning page answer? The real planner's verdict on a model and a machine, as a piece of HTML.

The page runs this in the browser (bench/planner_page.py puts both into one file), the tests also without one.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from pydantic import Field

from edgeft.documents import Strict
from edgeft.errors import BadInput, DoesNotFit, EdgeftError
from edgeft.machines.profile import Profile, list_profiles, load_profile
from edgeft.machines.sized import machine_name
from edgeft.models.spec import read_model_spec
from edgeft.planning.plan import Plan, make_plan
from edgeft.reporting.card import Card, plan_card, refusal_card
from edgeft.reporting.matrix import device_cell
from edgeft.settings.job import make_job
from edgeft.settings.tuners import TUNERS
from edgeft.units import show_bytes

PASTED = "your-model"  # folder of a config that was pasted
LONGEST_CONFIG = 2**20  # letters


class Request(Strict):
    """What was chosen on the page."""

    model: str = Field(default="", pattern=r"^(\w[\w.-]*)?$", description="one of the shapes; empty: `config`")
    config: str = Field(default="", description="text of a config.json")
    machine: str = Field(default="", description="a training profile; empty: a graphics card of `gib`")
    gib: float | None = Field(default=None, gt=0, lt=1e6, description="the machine's memory; its own when absent")
    length: int | None = Field(default=None, ge=8, le=1_000_000, description="tokens of the longest sample")
    tuner: str = ""
    base_precision: str = ""
    device: str = ""


class Answer(Strict):
    """What the page shows, and the numbers behind it."""

    html: str
    command: str
    state: str
    numbers: dict[str, Any]


def choices(configs: Path) -> dict[str, list[dict[str, str]]]:
    """What can be chosen: models by size, machines by memory, ways to train, devices."""
    machines = [profile for profile in list_profiles() if profile.detected]
    train = sorted((p for p in machines if "train" in p.roles), key=lambda p: p.budget_bytes)
    deploy = sorted((p for p in machines if "deploy" in p.roles), key=lambda p: p.budget_bytes)
    specs = [(path.parent.name, read_model_spec(str(path.parent))) for path in configs.glob("*/config.json")]
    models = sorted(specs, key=lambda found: (found[1].total_parameters, found[0]))
    return {
        "models": [{"value": name, "text": f"{name} ({spec.total_parameters / 1e9:.3g}B)"} for name, spec in models],
        "machines": [_machine(profile) for profile in train],
        "devices": [_machine(profile) for profile in deploy],
        "tuners": [{"value": name, "text": tuning.title} for name, tuning in TUNERS.items()],
    }


def _machine(profile: Profile) -> dict[str, str]:
    return {"value": profile.name, "text": f"{profile.name}, {show_bytes(profile.budget_bytes)}: {profile.description}"}


def settings(request: Request, folder: str) -> dict[str, Any]:
    """The request as the planner takes it."""
    found = {
        "model": folder, "profile": _machine_of(request), "max_length": request.length, "tuner": request.tuner,
        "base_precision": request.base_precision, "device": request.device,
    }  # fmt: skip
    return {name: value for name, value in found.items() if value}


def _machine_of(request: Request) -> str:
    """The machine's name. Raises BadInput where neither machine nor memory was chosen."""
    if not request.machine and request.gib is None:
        raise BadInput("machine", "none was chosen", "choose one, or say how many GiB")
    return machine_name(request.machine or None, _size(request), "")


def _size(request: Request) -> str | None:
    return None if request.gib is None else f"{request.gib:g}GiB"


def command(request: Request) -> str:
    """The same on the command line."""
    words = ["edgeft", "plan", f"examples/configs/{request.model}" if request.model else PASTED]
    options = {"--on": request.machine, "--memory": _size(request), "--for": request.device}
    words += [word for option, value in options.items() if value for word in (option, value)]
    pinned = {"max_length": request.length, "tuner": request.tuner, "base_precision": request.base_precision}
    return shlex.join(
        [*words, *(word for name, value in pinned.items() if value for word in ("--set", f"{name}={value}"))]
    )


def answer(text: str, configs: Path) -> str:
    """A request's JSON to an answer's; what is wrong with it is an answer too."""
    try:
        request = Request.model_validate_json(text)
    except ValueError as problem:
        return _problem(BadInput("page", str(problem).splitlines()[0]), "").model_dump_json()
    try:
        folder = configs / request.model if request.model else _pasted(request.config, configs.parent / PASTED)
        return _answer(request, folder).model_dump_json()
    except (EdgeftError, ImportError) as problem:
        return _problem(problem, command(request)).model_dump_json()


def _pasted(text: str, folder: Path) -> Path:
    """A folder with that config alone. Raises BadInput for what is none."""
    if len(text) > LONGEST_CONFIG:
        raise BadInput("config.json", f"has {len(text):,} letters, more than any config", "paste the file's text alone")
    try:
        found = json.loads(text)
    except ValueError as problem:
        raise BadInput("config.json", f"is not JSON: {problem}", "paste the whole file, from { to }") from None
    if not isinstance(found, dict):
        raise BadInput("config.json", "is no object", "paste the whole file, from { to }")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


def _answer(request: Request, folder: Path) -> Answer:
    job = make_job(**settings(request, str(folder)))
    spec = read_model_spec(str(folder))
    try:
        plan = make_plan(job, spec=spec)
    except DoesNotFit as problem:
        limit = load_profile(job.profile).budget_bytes
        card = refusal_card(problem, folder.name, spec.total_parameters, job.profile, limit)
        refused = {"need_bytes": problem.need_bytes, "budget_bytes": limit}
        return Answer(html=_html(card, None), command=command(request), state="no", numbers=refused)
    devices = [p for p in list_profiles() if "deploy" in p.roles and p.detected]
    cells = [device_cell(spec, plan.stages.target, profile) for profile in devices]
    card = plan_card(plan, cells)
    numbers = {"need_bytes": plan.need_bytes, "peak_bytes": plan.peak_bytes, "budget_bytes": plan.budget_bytes,
               "seconds": plan.seconds, "seconds_per_step": plan.seconds_per_step, "gave_up": plan.gave_up,
               "training": plan.training.model_dump(mode="json"),
               "phases": {phase.name: phase.high_bytes for phase in (*plan.phases, *plan.stages.phases)},
               "context_tokens": plan.stages.context_tokens}  # fmt: skip
    return Answer(html=_html(card, plan), command=command(request), state=card.state, numbers=numbers)


def _html(card: Card, plan: Plan | None) -> str:
    """The card, and below it the memory of each phase."""
    from edgeft.reporting.pages import environment, memories_of
    from edgeft.reporting.palette import FAMILIES
    from edgeft.reporting.summary import stages_of

    groups: dict[str, Any] = {"bars": [], "later": []}
    if plan is not None:
        from edgeft.reporting import bars

        names = memories_of(plan.profile)
        during, around = stages_of(plan)
        groups = {"bars": bars.groups(during, names), "later": bars.groups(around, names)}
    return environment().get_template("answer.html.j2").render(card=card, looks=FAMILIES, **groups)


def _problem(problem: Exception, line: str) -> Answer:
    """What cannot be planned, in words, with the way out."""
    if isinstance(problem, EdgeftError):
        said, hint = f"{problem.where}: {problem.problem}", problem.hint
    else:
        said, hint = (
            f"this architecture is counted by a package that the page does not have ({problem})",
            "run the command",
        )
    from edgeft.reporting.pages import environment

    html = environment().get_template("problem.html.j2").render(said=said, hint=hint)
    return Answer(html=html, command=line, state="problem", numbers={"problem": said, "hint": hint})
