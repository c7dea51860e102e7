"""Does the planning page answer what the command line does, and say what is wrong with what was entered?"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from reports import plan_of
from tiny import CONFIGS, ROOT

from edgeft.machines.profile import list_profiles, load_profile
from edgeft.reporting.planning_page import Answer, Request, answer, choices, command
from edgeft.units import show_bytes


def ask(configs: Path = CONFIGS, **request: Any) -> Answer:
    return Answer.model_validate_json(answer(json.dumps(request), configs))


def test_an_answer_is_the_plans() -> None:
    found, plan = ask(model="llama-3.1-8b", machine="t4"), plan_of()
    assert found.state == "fits" and found.command == "edgeft plan examples/configs/llama-3.1-8b --on t4"
    assert found.numbers["need_bytes"] == plan.need_bytes and found.numbers["peak_bytes"] == plan.peak_bytes
    assert found.numbers["seconds"] == plan.seconds and tuple(found.numbers["gave_up"]) == plan.gave_up
    for said in ("FITS", show_bytes(plan.need_bytes), show_bytes(plan.budget_bytes), "Training"):
        assert said in found.html


def test_what_was_chosen_is_on_the_command_line() -> None:
    request = Request(model="gpt2", machine="t4", gib=6, length=512, tuner="lora", base_precision="nf4",
                      device="raspberrypi5-8gb")  # fmt: skip
    assert shlex.split(command(request)) == [
        "edgeft", "plan", "examples/configs/gpt2", "--on", "t4", "--memory", "6GiB", "--for", "raspberrypi5-8gb",
        "--set", "max_length=512", "--set", "tuner=lora", "--set", "base_precision=nf4",
    ]  # fmt: skip


def test_a_number_of_gib_is_a_machine() -> None:
    found = ask(model="qwen2.5-1.5b", gib=5.5)
    assert found.command == "edgeft plan examples/configs/qwen2.5-1.5b --memory 5.5GiB"
    assert found.numbers["budget_bytes"] == load_profile("5.5GiB").budget_bytes
    smaller = ask(model="qwen2.5-1.5b", machine="cpu-8gb", gib=6).numbers["budget_bytes"]
    assert smaller == load_profile("cpu-8gb:6GiB").budget_bytes < load_profile("cpu-8gb").budget_bytes


def test_what_does_not_fit_says_what_would() -> None:
    found = ask(model="llama-3.1-70b", gib=4)  # its head alone takes two
    assert found.state == "no" and found.numbers["need_bytes"] > found.numbers["budget_bytes"]
    assert "DOES NOT FIT" in found.html


def test_a_pasted_config_is_planned(tmp_path: Path) -> None:
    text = (CONFIGS / "gpt2" / "config.json").read_text()
    (tmp_path / "configs").mkdir()
    found = ask(tmp_path / "configs", config=text, machine="t4")
    assert found.numbers["need_bytes"] == ask(model="gpt2", machine="t4").numbers["need_bytes"]
    assert found.command == "edgeft plan your-model --on t4"


@pytest.mark.parametrize(("request_", "said"), [
    ({"config": "{", "machine": "t4"}, "config.json: is not JSON"),
    ({"config": "[1]", "machine": "t4"}, "config.json: is no object"),
    ({"config": "{}", "machine": "t4"}, "missing model_type"),
    ({"config": " " * (2**20 + 1), "machine": "t4"}, "more than any config"),
    ({"config": '{"model_type": "<img src=x>"}', "machine": "t4"}, "&lt;img"),
    ({"model": "../../etc", "machine": "t4"}, "page"),
    ({"model": "gpt2", "machine": "nothing"}, "unknown profile"),
    ({"model": "gpt2", "machine": "t4", "length": 4000}, "more than the model"),
    ({"model": "gpt2", "machine": "t4", "tuner": "no"}, "tuner"),
    ({"model": "gpt2", "machine": "t4", "gib": -1}, "page"),
    ({"model": "gpt2"}, "machine: none was chosen"),
    ({"model": "gpt2", "gib": 0.1}, "alone keeps"),
    ({"model": "gpt2", "machine": "t4", "nonsense": 1}, "page"),
])  # fmt: skip
def test_what_cannot_be_planned_is_said(request_: dict[str, Any], said: str, tmp_path: Path) -> None:
    configs = tmp_path / "configs"
    configs.symlink_to(CONFIGS)
    found = ask(configs, **request_)
    assert found.state == "problem" and said in found.html and "<img" not in found.html


def test_every_shape_and_machine_can_be_chosen() -> None:
    found = choices(CONFIGS)
    assert len(found["models"]) == len(list(CONFIGS.glob("*/config.json"))) and found["models"][0]["value"] == "gpt2"
    trained_on = {p.name for p in list_profiles() if "train" in p.roles and p.detected}
    assert {each["value"] for each in found["machines"]} == trained_on and "raspberrypi5-8gb" in {
        each["value"] for each in found["devices"]
    }
    assert all(re.fullmatch(r"[\w.-]+", each["value"]) for part in found.values() for each in part)


ALONE = """
import importlib.abc, re, sys
sys.path[:0] = [{root!r}]
named = re.findall(r"^([\\w-]+)==", open({wheels!r}).read(), re.MULTILINE)
there = {{name.replace("-", "_") for name in named}} | {{"edgeft"}} | set(sys.stdlib_module_names)

class Page(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in there and not name.startswith("_sysconfigdata"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Page())
from pathlib import Path
from edgeft.reporting.planning_page import answer
print(answer('{{"model": "smollm2-135m", "machine": "t4"}}', Path({configs!r})))
"""


def test_the_page_has_all_that_it_imports() -> None:
    """As in the browser, where no package is but those of bench/planner-wheels.txt."""
    code = ALONE.format(root=str(ROOT), wheels=str(ROOT / "bench" / "planner-wheels.txt"), configs=str(CONFIGS))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = Answer.model_validate_json(done.stdout)
    assert found.state == "fits" and "FITS" in found.html
