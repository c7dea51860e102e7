"""Does a row in a format of the field become the chat that its own tools make of it, and is a wrong one refused?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import WriteRows

from edgeft.data.conversation import to_row
from edgeft.data.dataset import IGNORED, TextTokenizer, measure, read_rows, to_samples
from edgeft.data.formats import SPACED, as_known
from edgeft.data.sources import Part, by_role, digest, files, parts
from edgeft.documents import sha256_file, sha256_json
from edgeft.errors import BadInput

# ChatML that writes tools and calls, with transformers' mark around what the assistant says
TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>tools\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}{{ call['function'] | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "size", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"type": "function", "function": {"name": "size", "arguments": {"of": "grep"}}}


def said(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": text} for role, text in turns]


ASKED = said(("user", "Which section?"), ("assistant", "utils"))
TOLD = said(("system", "You sort."))
HISTORY = said(("user", "And grep?"), ("assistant", "text"))
CALLED = [
    *said(("user", "How large?")), {"role": "assistant", "content": None, "tool_calls": [CALL]},
    *said(("tool", "9"), ("assistant", "nine")),
]  # fmt: skip
# a row, the messages that the format's own tool makes of it, its tools, how many of its answers train
FORMATS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], Any, int]] = {
    "openai": ({"messages": ASKED}, ASKED, None, 1),
    "openai, typed parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Which "}, {"type": "text", "text":
                      "section?"}]}, ASKED[1]]}, ASKED, None, 1,
    ),
    "openai, tools and null content": ({"messages": CALLED, "tools": TOOLS}, CALLED, TOOLS, 2),
    "system beside messages": ({"system": "You sort.", "messages": ASKED}, TOLD + ASKED, None, 1),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Which section?"}, {"from": "gpt", "value": "utils"}]},
        ASKED, None, 1,
    ),
    "sharegpt, system, several turns": (
        {"conversations": [{"from": "human", "value": "And grep?"}, {"from": "gpt", "value": "text"},
                           {"from": "human", "value": "Which section?"}, {"from": "gpt", "value": "utils"}],
         "system": "You sort."}, TOLD + HISTORY + ASKED, None, 2,
    ),
    "sharegpt, a call and what it observed": (
        {"conversations": [{"from": "human", "value": "How large?"},
                           {"from": "function_call", "value": '{"name": "size", "arguments": {"of": "grep"}}'},
                           {"from": "observation", "value": "9"}, {"from": "gpt", "value": "nine"}],
         "tools": json.dumps(TOOLS)}, CALLED, TOOLS, 2,
    ),
    "conversations of roles": ({"conversations": ASKED}, ASKED, None, 1),
    "alpaca": ({"instruction": "Which section?", "input": "", "output": "utils"}, ASKED, None, 1),
    "alpaca, input": (
        {"instruction": "Which", "input": "section?", "output": "utils"},
        said(("user", "Which\nsection?"), ("assistant", "utils")), None, 1,
    ),
    "alpaca, system and history": (
        {"instruction": "Which section?", "output": "utils", "system": "You sort.", "history": [["And grep?", "text"]]},
        TOLD + HISTORY + ASKED, None, 2,
    ),
    "dolly": (
        {"instruction": "Which", "context": "section?", "response": "utils"},
        said(("user", "Which\nsection?"), ("assistant", "utils")), None, 1,
    ),
    "ms-swift": ({"query": "Which section?", "response": "utils", "history": [["And grep?", "text"]]},
                 HISTORY + ASKED, None, 2),
    "question and answer": ({"question": "Which section?", "answer": "utils"}, ASKED, None, 1),
    "trl, lists of messages": (
        {"prompt": HISTORY + ASKED[:1], "completion": ASKED[1:]}, HISTORY + ASKED, None, 1,
    ),
    "prompt and completion with a system": (
        {"system": "You sort.", "prompt": "Which section?", "completion": "utils"}, TOLD + ASKED, None, 1,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("formats") / "a model"
    shutil.copytree(tokenizer_folder, made)
    (made / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> TextTokenizer:
    return TextTokenizer(folder)


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_has_the_ids_and_the_trained_tokens_of_its_chat(
    name: str, tokenizer: TextTokenizer, write_rows: WriteRows
) -> None:
    """transformers renders, encodes and marks; the rows are read as lines, and as an array of them."""
    from transformers import AutoTokenizer

    row, messages, tools, trained = FORMATS[name]
    own: Any = AutoTokenizer.from_pretrained(tokenizer.folder)
    expected = own.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    array = write_rows("lines.jsonl", [row]).with_name("array.json")
    array.write_text(json.dumps([row, row], indent=1), encoding="utf-8")
    rows = [*read_rows(str(array.with_name("lines.jsonl")), tokenizer), *read_rows(str(array), tokenizer)]
    for sample, read in zip(to_samples(rows, tokenizer, None), rows, strict=True):
        mask = expected["assistant_masks"]
        assert sample.ids == expected["input_ids"]
        assert [label != IGNORED for label in sample.labels] == [bool(each) for each in _last(mask, trained)]
        assert len(read.trained) == trained
        assert not [remark for remark in read.remarks if "not used" in remark]
    assert len(rows) == 3


def _last(mask: list[int], runs: int) -> list[int]:
    """A mask with its last runs of ones alone."""
    starts = [i for i, one in enumerate(mask) if one and not (i and mask[i - 1])]
    return [one * (i >= starts[-runs]) for i, one in enumerate(mask)]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "holds 'chosen' and 'rejected': pairs of answers"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "the last message must be the assistant's"),
        ({"conversations": "x"}, "'conversations' is not JSON"),
        ({"conversations": [{"from": "gpt"}]}, "a message must be {'role', 'content'}, got {'role': 'assistant', 'c"),
        ({"conversations": [{"from": "function_call", "value": "size()"}, ASKED[1]]},
         "a call must be {'name', 'arguments'} as JSON"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ASKED[1]]},
         "a content has a part of type 'image_url': text alone is trained"),
        ({"messages": [{"role": "user", "content": []}, ASKED[1]]}, "a message must be {'role', 'content'}"),
        ({"system": "a", "messages": TOLD + ASKED}, "has a 'system' and a first message of that role"),
        ({"instruction": "x", "output": None}, "a message must be {'role', 'content'}"),
        ({"instruction": "x"}, "has none of the known columns, got ['instruction']"),
        ({"query": "x", "response": "y", "history": [["a"]]}, "'history' must be a list of [question, answer]"),
        ({"prompt": ASKED[:1], "completion": "utils"}, "of 'prompt' and 'completion' one is a list of messages"),
        ({"prompt": ASKED[:1], "completion": []}, "the last message must be the assistant's"),
        ({"messages": {"role": "user"}}, "'messages' must be a list of {'role', 'content'}, got {'role': 'user'}"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_refused_by_its_line(
    row: dict[str, Any], problem: str, tokenizer: TextTokenizer, write_rows: WriteRows
) -> None:
    path = write_rows("data.jsonl", [{"messages": ASKED}, row])
    with pytest.raises(BadInput) as caught:
        read_rows(str(path), tokenizer)
    assert caught.value.problem.startswith(f"1 of 2 rows cannot be used\nline 2: {problem}")
    assert caught.value.hint.startswith("a row is one of {'messages'}, {'conversations'}, ")


def test_what_a_row_was_and_what_of_it_is_not_used_is_counted(tokenizer: TextTokenizer, write_rows: WriteRows) -> None:
    rows = [{"instruction": "a", "output": "b", "id": n} for n in range(3)]
    found = measure(str(write_rows("data.jsonl", rows)), tokenizer).lengths
    assert found.remarks == {"read as Alpaca": 3, "the key 'id' is not used": 3}


def test_own_columns_are_read_by_the_known_names(tokenizer: TextTokenizer, write_rows: WriteRows) -> None:
    path = str(write_rows("data.jsonl", [{"q": "1+1=", "a": " 2", "text": "not this"}]))
    row = read_rows(f"{path}[prompt=q,completion=a]", tokenizer)[0]
    assert (row.text, row.border, row.remarks) == ("1+1= 2", 4, ("the key 'text' is not used",))
    with pytest.raises(BadInput, match=r"line 1: has no column 'question', got \['a', 'q', 'text'\]"):
        read_rows(f"{path}[prompt=question,completion=a]", tokenizer)
    for wrong, hint in (
        ("promt=q", "did you mean 'prompt'?"), ("prompt=", "as in prompt=question,completion=answer"),
        ("text=a,text=q", "name each once"),
    ):  # fmt: skip
        with pytest.raises(BadInput) as caught:
            parts(f"{path}[{wrong}]")
        assert caught.value.problem.startswith("columns: ") and caught.value.hint == hint


# several files


def test_several_files_are_read_in_their_order(tokenizer: TextTokenizer, write_rows: WriteRows) -> None:
    first = write_rows("a b.jsonl", [{"text": f"a{n}"} for n in range(6)])
    second = write_rows("c[1].jsonl", [{"body": f"c{n}"} for n in range(2)])

    def texts(source: str) -> list[str]:
        return [row.text for row in read_rows(source, tokenizer)]

    assert texts(f"{first}#3 + {second}[text=body]") == ["a0", "a2", "a4", "c0", "c1"]
    assert texts(f"{first}#99 + {second}[text=body]#2x") == [f"a{n}" for n in range(6)] + ["c0", "c1"] * 2
    assert texts(f"{first.parent}/a*.jsonl") == [f"a{n}" for n in range(6)]
    assert files(f"{first} + {second}") == [first, second]
    assert digest(str(first)) == sha256_file(first) and digest("nobody/nothing") == ""
    assert digest(f"{first} + {second}") == sha256_json([sha256_file(first), sha256_file(second)])
    found = measure(f"{first} + {second}[text=body]", tokenizer).lengths
    second.write_text('{"body": "another one"}\n', encoding="utf-8")
    after = measure(f"{first} + {second}[text=body]", tokenizer).lengths
    assert (found.rows, after.rows) == (8, 7) and found.sha256 != after.sha256
    second.write_text('{"bod": "another one"}\n', encoding="utf-8")
    with pytest.raises(BadInput, match=r"1 of 7 rows cannot be used\nc\[1\]\.jsonl, line 1: has no column 'body'"):
        texts(f"{first} + {second}[text=body]")


def test_a_file_that_is_there_is_no_pattern_and_no_sum(tmp_path: Path) -> None:
    for name in ("a + b.jsonl", "c*.jsonl", "d#5", "e[text=x]"):
        path = tmp_path / name
        path.touch()
        assert parts(str(path)) == [Part(str(path))]


@pytest.mark.parametrize(
    ("source", "problem"),
    [("none/*.jsonl", "no file matches none/"), ("a.jsonl + ", "names no file"), ("a.jsonl#0", "asks for 0 rows")],
)
def test_a_source_of_nothing_is_refused(source: str, problem: str) -> None:
    with pytest.raises(BadInput) as caught:
        parts(source)
    assert problem in caught.value.problem and caught.value.where == source


def test_a_folder_stands_for_its_files(tmp_path: Path) -> None:
    assert by_role([], [], []) == {"data": None, "valid": None, "test": None}
    with pytest.raises(BadInput, match=r"is a folder without train\.jsonl"):
        by_role([str(tmp_path)])
    for name in ("train.jsonl", "val.csv", "test.json"):
        (tmp_path / name).touch()
    role = {"data": "train.jsonl", "valid": "val.csv", "test": "test.json"}
    assert by_role([str(tmp_path)]) == {name: str(tmp_path / file) for name, file in role.items()}
    named = by_role([str(tmp_path)], ["mine.csv", "too.csv"], columns="text=body")
    assert named["valid"] == "mine.csv[text=body] + too.csv[text=body]"
    assert named["data"] == f"{tmp_path / 'train.jsonl'}[text=body]"
    assert by_role(["a.jsonl[text=x] + b.jsonl#5"], columns="text=y")["data"] == "a.jsonl[text=x] + b.jsonl[text=y]#5"
    (tmp_path / "valid.jsonl").touch()
    with pytest.raises(BadInput, match=r"holds valid\.jsonl and val\.csv"):
        by_role([str(tmp_path)])


@pytest.mark.parametrize(
    ("row", "columns", "text"),
    [({"text": "kitchen", "label": "network"}, {"prompt": "text", "completion": "label"}, "kitchen network"),
     ({"text": "kitchen: ", "label": "network"}, {"prompt": "text", "completion": "label"}, "kitchen: network"),
     ({"text": "kitchen", "label": " network"}, {"prompt": "text", "completion": "label"}, "kitchen network"),
     ({"text": "\u53a8\u623f", "label": "\u7f51"}, {"prompt": "text", "completion": "label"}, "\u53a8\u623f\u7f51"),
     ({"text": "kit", "completion": "chen"}, {"prompt": "text"}, "kitchen"),
     ({"prompt": "kit", "completion": "chen"}, None, "kitchen")],
)  # fmt: skip
def test_columns_of_ones_own_do_not_run_into_one_word(
    row: dict[str, str], columns: dict[str, str] | None, text: str
) -> None:
    known, said = as_known(row, columns)
    assert known["prompt"] + known["completion"] == text and set(known) == {"prompt", "completion"}
    assert said == (SPACED if row.get("label") == "network" and ": " not in row["text"] else "")


def test_a_space_that_is_put_in_is_said(tokenizer: TextTokenizer) -> None:
    row = to_row({"text": "kitchen", "label": "network"}, tokenizer, {"prompt": "text", "completion": "label"})
    assert row.prompt == "kitchen" and row.text == "kitchen network"
    assert row.remarks == ("read as prompt and completion with a space between them",)


def test_columns_the_wrong_way_round_are_turned() -> None:
    with pytest.raises(BadInput, match="does not name one of") as problem:
        list(parts("a.jsonl[log=prompt]"))
    assert problem.value.hint == "the known name comes first, your own behind it: prompt=log"
    with pytest.raises(ValueError, match=r"has no column 'prompt', got .*; the known name comes first: prompt=text"):
        as_known({"text": "a", "label": "b"}, {"text": "prompt"})
