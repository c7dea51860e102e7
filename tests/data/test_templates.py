"""Chat templates in the manner of twenty families say here, and on a device, what transformers makes of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeft.data.tokenizer import TextTokenizer
from edgeft.errors import BadInput
from edgeft.machines.runner import runner_module

TEMPLATES = sorted((Path(__file__).parent / "templates").glob("*.jinja"))
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather", "description": "Weather <now> & \"soon\" in a caf\u00e9's town",
        "parameters": {
            "type": "object", "required": ["city"],
            "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["C", "F"]}},
        },
    },
}  # fmt: skip
TIME = {
    "type": "function",
    "function": {"name": "time", "description": "", "parameters": {"type": "object", "properties": {}}},
}
USER, ANSWER = (
    {"role": "user", "content": "How are\n\n you <b>?  "},
    {"role": "assistant", "content": " Fine \u732b.\n"},
)
SYSTEM = {"role": "system", "content": "  Be {{ brief }}.\nAlways.\n"}
CALLED = {"name": "get_weather", "arguments": {"city": "Bod\u00f8"}}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "id": "abcdefgh1", "function": CALLED}],
}
RESULT = {"role": "tool", "name": "get_weather", "content": '{"c": -4}', "tool_call_id": "abcdefgh1"}
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}
DOCUMENTS = [{"title": "Oslo <guide>", "text": "Cold \u732b.\n"}, {"title": "Bod\u00f8", "text": "Colder."}]
CHATS: dict[str, tuple[list[dict[str, Any]], Any]] = {
    "one turn": ([USER, ANSWER], None),
    "a system message": ([SYSTEM, USER, ANSWER], None),
    "several turns": (
        [SYSTEM, USER, ANSWER, {"role": "user", "content": "And?\ttab"}, {"role": "assistant", "content": "x"}],
        None,
    ),
    "an empty answer": ([USER, {"role": "assistant", "content": ""}], None),
    "thoughts in the text": ([USER, THOUGHT, USER, THOUGHT], None),
    "thoughts of their own": ([USER, ANSWER | {"reasoning_content": "because"}], None),
    "thoughts by another name": ([USER, ANSWER | {"reasoning": "because"}], None),
    "tools": ([SYSTEM, USER, CALL, RESULT, ANSWER], [WEATHER, TIME]),
    "tools that are not called": ([USER, ANSWER], [WEATHER]),
    "calls without tools": ([USER, CALL, RESULT, RESULT, ANSWER], None),
    "two questions": ([USER, USER, ANSWER], None),
    "a role that nobody knows": ([{"role": "critic", "content": "no"}, USER, ANSWER], None),
}


@pytest.fixture(scope="module", params=TEMPLATES, ids=lambda path: path.stem)
def folder(request: pytest.FixtureRequest, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with one of the templates, and a begin token for it to name."""
    made = tmp_path_factory.mktemp("template") / "model"
    shutil.copytree(tokenizer_folder, made)
    config = json.loads((made / "tokenizer_config.json").read_text())
    (made / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<|im_start|>"}))
    shutil.copy(request.param, made / "chat_template.jinja")
    return made


def outcome(render: Callable[..., str], *values: Any, **named: Any) -> str:
    """What a template says, or the words in which it refuses the chat."""
    try:
        return "said: " + render(*values, **named)
    except Exception as problem:  # of jinja2, or ours with the same words
        return f"refused: {problem.problem if isinstance(problem, BadInput) else problem}"


def test_training_and_device_say_what_transformers_does(folder: Path) -> None:
    from transformers import AutoTokenizer

    reference, own, runner = AutoTokenizer.from_pretrained(folder), TextTokenizer(folder), runner_module()
    template, special = runner.read_template(folder)
    seen = []
    for number, (name, (messages, tools)) in enumerate(CHATS.items()):
        documents = DOCUMENTS if number % 2 else None
        for turns, prompt in ((messages, False), (messages[:-1], True)):
            beside = {"tools": tools, "documents": documents}
            named = {"add_generation_prompt": prompt, "tokenize": False, **beside}
            expected = outcome(reference.apply_chat_template, turns, **named)
            assert outcome(own.render, turns, prompt, **beside) == expected, name
            if prompt:
                assert outcome(runner.apply_template, template, turns, special, **beside) == expected, name
            seen.append(expected)
    assert len([text for text in seen if text.startswith("said: ")]) >= 6 and len(set(seen)) >= 6


def test_there_are_twenty_templates_and_each_is_another() -> None:
    assert len(TEMPLATES) >= 20 and len({path.read_text(encoding="utf-8") for path in TEMPLATES}) == len(TEMPLATES)
