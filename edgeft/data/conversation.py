"""What is one row of data as text, and which characters of it train? A chat is rendered whole, by its own template."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from edgeft.data.formats import SHAPES, as_known
from edgeft.data.json_values import parse_json
from edgeft.data.tokenizer import TextTokenizer
from edgeft.machines.runner import runner_module

COLUMNS = (*("{" + ", ".join(map(repr, shape.columns)) + "}" for shape in SHAPES), "{'text'}")
PromptFormat = Literal["plain", "chat"]
ANSWER_KEYS = {"answer", "category", "class", "intent", "label", "labels", "output", "section", "sentiment", "target"}

MARKS = ("loss", "train", "training", "weight")  # keys of a message that say whether it trains
KEPT_NEW = "the template writes them otherwise once the chat goes on"
OPENED = re.compile(r"<(\w+)>\s*\Z")  # a block that a generation prompt leaves open, such as <think>

Message = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One row of data as one text. `trained` are spans of its characters, the rest is only read.

    The text before `border` is what a device is asked with (0: nothing is asked); there the last trained answer starts.
    `remarks` say what of the row is not used or does not train, and why.
    """

    text: str
    trained: tuple[tuple[int, int], ...]
    border: int
    format: PromptFormat
    messages: tuple[Message, ...] | None = None  # a chat up to its last answer
    remarks: tuple[str, ...] = ()

    @property
    def has_prompt(self) -> bool:
        return self.border > 0

    @property
    def prompt(self) -> str:
        return self.text[: self.border]


def to_row(value: Any, tokenizer: TextTokenizer, columns: Mapping[str, str] | None = None) -> Row:
    """A row of a file as text and trained spans; `columns` names its own columns by those of a known shape.

    Raises ValueError for one that cannot be decided, BadInput (where: TEMPLATE) for what the chat template refuses.
    """
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    value, shape = as_known(value, columns)
    if "messages" in value:
        row, used = _chat(value, tokenizer), {"messages", "tools", "documents"}
    elif "prompt" in value or "completion" in value:
        row, used = _asked(_text(value, "prompt"), _text(value, "completion"), tokenizer), {"prompt", "completion"}
    elif "text" in value:
        text = _text(value, "text")
        _refuse_begin("text", text, tokenizer)
        row, used = Row(text, ((0, len(text)),), 0, "plain"), {"text"}
    else:
        raise ValueError(f"has none of the known columns, got {sorted(map(str, value))}")
    try:
        row.text.encode()
    except UnicodeEncodeError as problem:
        raise ValueError(
            f"holds half of a surrogate pair, {problem.object[problem.start]!r}, which is no text"
        ) from None
    unused = [key for key in value if key not in used and value[key] not in (None, "")]
    read = [f"read as {shape}"] if shape else []
    asks = row.format == "chat" or row.has_prompt
    said = (f"the key {key!r} is not used{'' if asks else _as_answer(key)}" for key in unused)
    return replace(row, remarks=(*read, *row.remarks, *said))


def _as_answer(key: str) -> str:
    """What to do about a key beside a text that is called as answers are."""
    known = key.lower() in ANSWER_KEYS
    return f": --columns prompt=text,completion={key} trains it as the answer to the text" if known else ""


def _text(value: Message, key: str) -> str:
    if key not in value:
        raise ValueError(f"{key!r} is missing")
    if not isinstance(value[key], str) or not value[key]:
        raise ValueError(f"{key!r} must be a non-empty text, got {value[key]!r:.60}")
    return str(value[key])


def _asked(prompt: str, completion: str, tokenizer: TextTokenizer) -> Row:
    _refuse_begin("prompt", prompt, tokenizer)
    return Row(prompt + completion, ((len(prompt), len(prompt + completion)),), len(prompt), "plain")


def _refuse_begin(key: str, text: str, tokenizer: TextTokenizer) -> None:
    begin = tokenizer.prefix_text
    if begin and text.startswith(begin):
        raise ValueError(f"{key!r} starts with {begin!r}, which the tokenizer puts before every text: leave it out")


def _chat(value: Message, tokenizer: TextTokenizer) -> Row:
    messages = _messages(value["messages"])
    tools, documents = (_listed(name, value.get(name)) for name in ("tools", "documents"))
    if not all(isinstance(each, dict) for each in documents or ()):
        raise ValueError(f"'documents' must be a list of objects, as {{'title', 'text'}}, got {documents!r:.60}")
    marked = [message["role"] == "assistant" and _trains(message) for message in messages]
    if messages[-1]["role"] != "assistant":
        raise ValueError("the last message must be the assistant's")
    if not any(marked):
        raise ValueError("no answer of it is trained: each is marked as context")
    last = max(turn for turn, trains in enumerate(marked) if trains)
    render = functools.partial(tokenizer.render, tools=tools, documents=documents)
    shown, remarks = _as_rendered(messages[: last + 1], tools, documents, tokenizer)
    whole = render(shown, False)
    spans: list[tuple[int, int]] = []
    for turn in range(last + 1):
        if not marked[turn]:
            continue
        before = render(shown[:turn], True)
        after = whole if turn == last else render(shown[: turn + 1], False)
        if not after.startswith(before) and turn == last:
            raise ValueError("the chat template does not keep its own generation prompt before an answer")
        if not after.startswith(before) or not whole.startswith(after):
            remarks.append(f"earlier answers are not trained: {KEPT_NEW}")
            continue
        spans.append((len(before), len(after)))
        remarks += _of_answer(shown[turn], after[len(before) :])
    skipped = sum(m["role"] == "assistant" for m in messages) - sum(marked)
    remarks += ["answers marked as context are not trained"] * skipped
    remarks += ["what tools return is read, not trained"] * sum(m["role"] in ("tool", "function") for m in messages)
    return Row(whole, tuple(spans), spans[-1][0], "chat", tuple(shown[:-1]), tuple(remarks))


def _messages(messages: Any) -> list[Message]:
    """The messages of a row, checked, without keys that hold nothing (a table has every key in every row)."""
    if not messages:
        raise ValueError(f"'messages' must be a list of {{'role', 'content'}}, got {messages!r:.60}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"a message must be {{'role', 'content'}}, got {message!r:.60}")
        content = message.get("content")
        if not isinstance(content, str) and (content is not None or not message.get("tool_calls")):
            raise ValueError(f"a message must be {{'role', 'content'}}, got {message!r:.60}")
    return [{k: v for k, v in message.items() if v is not None or k == "content"} for message in messages]


def _listed(name: str, value: Any) -> Any:
    """Tools, or documents, of a row; None without any."""
    if isinstance(value, str) and value:  # csv holds it as JSON text
        value = parse_json(value)
    if isinstance(value, Exception) or not isinstance(value, list | None | str) or (isinstance(value, str) and value):
        raise ValueError(f"{name!r} must be a list, got {value!r:.60}")
    return value or None


def _trains(message: Message) -> bool:
    """Whether an answer trains, by its own mark."""
    said = {key: message[key] for key in MARKS if key in message}
    wrong = {key: mark for key, mark in said.items() if mark not in (True, False)}  # 1 and 0 are equal to them
    if wrong:
        raise ValueError(f"a message is marked {wrong}: a mark must be true or false (a weight: 1 or 0)")
    if len(set(map(bool, said.values()))) > 1:
        raise ValueError(f"a message is marked {said}: which of them holds?")
    return all(said.values())


def _as_rendered(
    messages: Sequence[Message], tools: Any, documents: Any, tokenizer: TextTokenizer
) -> tuple[list[Message], list[str]]:
    """(messages as the template gets them, remarks on what it does not look at).

    An answer that goes on from a block which the generation prompt leaves open, and closes it, gets its beginning:
    template and device then see one block. Raises ValueError for a call that the template would lose.
    """
    shown: list[Message] = []
    remarks = []
    for message in messages:
        kept = {key: value for key, value in message.items() if key not in MARKS}
        if kept.get("tool_calls") and not tokenizer.uses("tool_calls"):
            raise ValueError("a message calls tools ('tool_calls'), which the chat template does not write")
        unused = [key for key in kept if key not in ("role", "content") and not any(map(tokenizer.uses, _names(key)))]
        remarks += [f"the key {key!r} of a message is not used by the chat template" for key in unused]
        content = kept.get("content") or ""
        if kept["role"] == "assistant" and "</" in content:
            opened = OPENED.search(tokenizer.render(shown, True, tools, documents))
            if opened and f"</{opened[1]}>" in content and f"<{opened[1]}>" not in content:
                kept["content"] = opened[0] + content
        shown.append(kept)
    for name, given in (("tools", tools), ("documents", documents)):
        if given and not tokenizer.uses(name):
            remarks.append(f"the key {name!r} is not used by the chat template")
    return shown, remarks


def _names(key: str) -> tuple[str, ...]:
    """What templates may call a key of a message."""
    thoughts: tuple[str, ...] = runner_module().REASONING
    return thoughts if key in thoughts else (key,)


def _of_answer(message: Message, written: str) -> list[str]:
    """What the template makes of an answer that its row does not say."""
    content = (message.get("content") or "").strip()
    if not content:
        return []
    if content not in written:
        return ["the chat template changes an answer: trained is what it writes"]
    added = written[: written.index(content)].strip()
    return [f"the chat template puts {added!r} before an answer, and it is trained"] if added else []
