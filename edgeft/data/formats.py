"""Which of the field's shapes has a row, and what is it as prompt and completion, messages or text? (no torch)

Sources: TRL's dataset formats; LLaMA-Factory's Alpaca and ShareGPT; OpenAI's fine-tuning format; ms-swift's query and
response. Whatever a shape does not name stays in the row, so that it is counted as not used.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from edgeft.data.json_values import parse_json

Message = dict[str, Any]

ROLES = {
    "human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "observation": "tool", "function_response": "tool", "tool_response": "tool",
}  # fmt: skip
CALLS = ("function_call", "tool_call")  # roles of a message that calls a tool, its content the call as JSON
PREFERENCES = ("chosen", "rejected")


class Shape(NamedTuple):
    """One shape: what it is called, the columns that tell it (all of them), how it becomes a known row."""

    name: str
    columns: tuple[str, ...]
    known: Callable[[Message], Message]


def as_known(value: Message, columns: Mapping[str, str] | None = None) -> tuple[Message, str]:
    """(a row as `{'messages'}`, `{'prompt', 'completion'}` or `{'text'}`, what it was before where it was neither).

    `columns` names its own by theirs.

    Raises ValueError for a row that cannot be decided.
    """
    apart = False
    if columns:
        value = _renamed(value, columns)
        apart = {"prompt", "completion"} <= columns.keys()
    if all(name in value for name in PREFERENCES):
        raise ValueError("holds 'chosen' and 'rejected': pairs of answers are not trained, one answer is")
    shape = next((each for each in SHAPES if all(name in value for name in each.columns)), None)
    if shape is None:
        return value, ""
    known = shape.known(dict(value))
    if apart and _touch(known.get("prompt"), known.get("completion")):
        return known | {"completion": f" {known['completion']}"}, SPACED
    return known, "" if all(name in known for name in shape.columns) else shape.name


SPACED = "prompt and completion with a space between them"


def _touch(prompt: Any, completion: Any) -> bool:
    """Whether a text and its answer, from columns of their own, would run into one word: `kitchennetwork`.

    Scripts that are written without spaces stay so; so do rows that have prompt and completion by these names.
    """
    if not (isinstance(prompt, str) and isinstance(completion, str) and prompt and completion):
        return False
    sides = prompt[-1], completion[0]
    return not any(side.isspace() or unicodedata.east_asian_width(side) in "WF" for side in sides)


def _renamed(value: Message, columns: Mapping[str, str]) -> Message:
    missing = [(name, own) for name, own in columns.items() if own not in value]
    if missing:
        name, own = missing[0]
        turned = f"; the known name comes first: {own}={name}" if name in value else ""
        raise ValueError(f"has no column {own!r}, got {sorted(map(str, value))}{turned}")
    taken = {own: name for name, own in columns.items()}
    kept = {name: value[name] for name in value if name not in taken and name not in columns}
    return {name: value[own] for own, name in taken.items()} | kept


def _openai(value: Message) -> Message:
    """OpenAI's and TRL's chats."""
    return _chat(value, value.pop("messages"), value.pop("system", None))


def _sharegpt(value: Message) -> Message:
    """Turns of {'from', 'value'}, or of {'role', 'content'} under the same name."""
    turns = _list("conversations", value.pop("conversations"), "{'from', 'value'}")
    return _chat(value, [_turn(each) for each in turns], value.pop("system", None))


def _turn(turn: Any) -> Any:
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    kept = dict(turn)
    role, content = kept.pop("from"), kept.pop("value", None)
    if role in CALLS:
        return {"role": "assistant", "content": None, "tool_calls": _calls(content), **kept}
    return {"role": role, "content": content, **kept}


def _calls(content: Any) -> list[Message]:
    found = parse_json(content) if isinstance(content, str) else content
    calls = found if isinstance(found, list) else [found]
    if not all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in calls):
        raise ValueError(f"a call must be {{'name', 'arguments'}} as JSON, got {content!r:.60}")
    return [{"type": "function", "function": call} for call in calls]


def _alpaca(value: Message) -> Message:
    asked, more = value.pop("instruction"), value.pop("input", None)
    return _asked(value, f"{asked}\n{more}" if more else asked, value.pop("output"))


def _dolly(value: Message) -> Message:
    asked, more = value.pop("instruction"), value.pop("context", None)
    return _asked(value, f"{asked}\n{more}" if more else asked, value.pop("response"))


def _query(value: Message) -> Message:
    return _asked(value, value.pop("query"), value.pop("response"))


def _question(value: Message) -> Message:
    return _asked(value, value.pop("question"), value.pop("answer"))


def _prompt(value: Message) -> Message:
    """TRL's prompt and completion: texts as they stand, or lists of messages, of which the completion trains."""
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        context = [{**each, "train": False} if isinstance(each, dict) else each for each in prompt]
        del value["prompt"], value["completion"]
        return _chat(value, [*context, *completion], value.pop("system", None))
    if isinstance(prompt, list) or isinstance(completion, list):
        raise ValueError("of 'prompt' and 'completion' one is a list of messages and the other is not")
    if not value.get("system"):
        return value
    del value["prompt"], value["completion"]
    return _asked(value, prompt, completion)


def _asked(value: Message, asked: Any, answer: Any) -> Message:
    """One question and its answer, behind the turns of `history` ([question, answer] each), as a chat."""
    turns = []
    of = "[question, answer]"
    for pair in _list("history", value.pop("history", None) or [], of):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"'history' must be a list of {of}, got {pair!r:.60}")
        turns += [("user", pair[0]), ("assistant", pair[1])]
    turns += [("user", asked), ("assistant", answer)]
    return _chat(value, [{"role": role, "content": text} for role, text in turns], value.pop("system", None))


def _chat(value: Message, messages: Any, system: Any) -> Message:
    """A row of messages in the field's own roles, contents as texts, beginning with what the system says."""
    messages = _list("messages", messages, "{'role', 'content'}")
    found = [_message(each) if isinstance(each, dict) else each for each in messages]
    if system:
        if found and isinstance(found[0], dict) and found[0].get("role") == "system":
            raise ValueError("has a 'system' and a first message of that role: which of them holds?")
        found.insert(0, {"role": "system", "content": system})
    return {"messages": found, **value}


def _message(message: Message) -> Message:
    role = message.get("role")
    named = {"role": ROLES[role]} if isinstance(role, str) and role in ROLES else {}
    return {**message, **named, **({"content": _content(message["content"])} if "content" in message else {})}


def _content(content: Any) -> Any:
    """Typed parts as one text; anything else as it stands."""
    if not isinstance(content, list) or not content:
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"a content has a part of type {kind!r:.40}: text alone is trained")
    return "".join(part["text"] for part in content)


def _list(name: str, value: Any, of: str) -> Any:
    """A list, or the one that a cell of a table holds as JSON text."""
    if isinstance(value, str):
        value = parse_json(value)
        if isinstance(value, Exception):
            raise ValueError(f"{name!r} is {value}")
    if not isinstance(value, list):
        raise ValueError(f"{name!r} must be a list of {of}, got {value!r:.60}")
    return value


SHAPES = (
    Shape("messages", ("messages",), _openai),
    Shape("ShareGPT", ("conversations",), _sharegpt),
    Shape("a chat of prompt and completion", ("prompt", "completion"), _prompt),
    Shape("Alpaca", ("instruction", "output"), _alpaca),
    Shape("instruction and response", ("instruction", "response"), _dolly),
    Shape("query and response", ("query", "response"), _query),
    Shape("question and answer", ("question", "answer"), _question),
)
