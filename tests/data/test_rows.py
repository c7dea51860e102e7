"""Is nothing that a row says lost without a word, and is every file that cannot be read named with its place?"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import CHAT_TEMPLATE, WriteRows

from edgeft.data.conversation import parse_json
from edgeft.data.dataset import IGNORED, TextTokenizer, data_text, measure_lengths, read_rows, report_data
from edgeft.data.samples import ENDED, each_sample
from edgeft.data.tokenizer import without_comments
from edgeft.errors import BadInput

USER, ANSWER = {"role": "user", "content": "one?"}, {"role": "assistant", "content": "yes"}
PLAIN = {"prompt": "p", "completion": "c"}
TOOL_TEMPLATE = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content or '' }}{% if m.tool_calls %}CALL {{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Bonn"}}}


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> TextTokenizer:
    return TextTokenizer(tokenizer_folder)


@pytest.fixture
def templated(tokenizer_folder: Path, tmp_path: Path) -> Callable[[str], TextTokenizer]:
    """The tokenizer with another chat template."""

    def make(template: str) -> TextTokenizer:
        folder = tmp_path / "templated"
        shutil.copytree(tokenizer_folder, folder)
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        return TextTokenizer(folder)

    return make


def refusal(path: Path, tokenizer: TextTokenizer) -> str:
    with pytest.raises(BadInput) as caught:
        read_rows(str(path), tokenizer)
    return caught.value.problem


def trained(row: Any, tokenizer: TextTokenizer) -> list[str]:
    """The text of each run of trained tokens."""
    (sample, _), *_ = each_sample([row], tokenizer, None)
    runs: list[list[int]] = []
    for before, label in zip([IGNORED, *sample.labels], sample.labels, strict=False):
        if label != IGNORED:
            runs += [[]] if before == IGNORED else []
            runs[-1].append(label)
    return [tokenizer.spell(run) for run in runs]


# files


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_an_array_of_rows_is_read(name: str, indent: int | None, tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = tmp_path / name
    path.write_text("\n" + json.dumps([PLAIN, PLAIN], indent=indent))
    assert [row.text for row in read_rows(str(path), tokenizer)] == ["pc", "pc"]
    path.write_text(json.dumps([PLAIN, {"prompt": "p"}], indent=indent))
    assert refusal(path, tokenizer) == "1 of 2 rows cannot be used\nrow 2: 'completion' is missing"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[{"prompt": "a"},\n', "starts as one array of rows, and is not JSON: "),
        ('{\n "rows": []\n}\n', "holds an object on several lines"),
    ],
)
def test_a_document_that_is_no_rows_is_one_sentence(
    text: str, problem: str, tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    (tmp_path / "data.json").write_text(text)
    said = refusal(tmp_path / "data.json", tokenizer)
    assert said.startswith(problem) and "\n" not in said


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "a", "completion": "b", "completion": "c"}', "the key 'completion' is given twice"),
        ('{"messages": [{"role": "user", "role": "user", "content": "x"}]}', "the key 'role' is given twice"),
        ('{"prompt": "x", "completion": "ok \\ud83d"}', "holds half of a surrogate pair, '\\ud83d', which is no text"),
        ('{"text": ' + "[" * 100_000, "not JSON that can be read: it is nested too deeply"),
        ('{"text": ' + "9" * 5000 + "}", "Exceeds the limit"),
    ],
)
def test_hostile_lines_are_named(line: str, problem: str, write_rows: WriteRows, tokenizer: TextTokenizer) -> None:
    said = refusal(write_rows("data.jsonl", [PLAIN, line, PLAIN]), tokenizer)
    assert said.startswith(f"1 of 3 rows cannot be used\nline 2: {problem}")


def test_a_file_without_line_ends(tmp_path: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeft.data.rows.LONGEST_LINE", 2**20)
    (tmp_path / "data.jsonl").write_text('{"text": "' + "x" * 2**20 + '"}')
    assert refusal(tmp_path / "data.jsonl", tokenizer) == "line 1 is longer than 1 million characters"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "prompt,completion\nSort: red, green,color\n",
            "line 2: 3 cells, the header names 2: quote a cell with commas",
        ),
        ("prompt,completion\nred\n", "line 2: 1 cells, the header names 2: quote a cell with commas"),
        ("prompt,prompt\na,b\n", "line 1: the header names 'prompt' twice"),
        (
            'prompt,completion\na,b\nc,"d\ne,f\ng,h\n',
            "line 3: a quote is opened and not closed as it should be (unexpected end of data): "
            "double a quote inside a quoted cell",
        ),
        (
            'prompt,completion\nc,"d\ne,f\ng,"h"\n',
            "line 2: a quote is opened and not closed as it should be (',' expected after '\"'): "
            "double a quote inside a quoted cell",
        ),
    ],
)
def test_csv_cells_are_never_lost(text: str, problem: str, tmp_path: Path, tokenizer: TextTokenizer) -> None:
    (tmp_path / "data.csv").write_text(text)
    assert refusal(tmp_path / "data.csv", tokenizer).split("\n")[1] == problem


def test_quotes_and_empty_lines_of_a_csv(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    (tmp_path / "data.csv").write_text('prompt,completion\n"ok, ""quoted""",fine\n\n5\' 6",b\n')
    assert [row.text for row in read_rows(str(tmp_path / "data.csv"), tokenizer)] == ['ok, "quoted"fine', "5' 6\"b"]


# keys


def test_keys_that_are_not_used_are_counted(write_rows: WriteRows, tokenizer: TextTokenizer) -> None:
    rows = [{**PLAIN, "source": "mail", "weight": 0}, {**PLAIN, "source": "", "id": None}, PLAIN]
    found = measure_lengths(str(write_rows("data.jsonl", rows)), tokenizer)
    assert found.remarks == {"the key 'source' is not used": 1, "the key 'weight' is not used": 1}
    assert found.said[0].endswith("data.jsonl: 1 of 3 rows: the key 'source' is not used")


def test_keys_of_messages_that_a_template_does_not_look_at(write_rows: WriteRows, tokenizer: TextTokenizer) -> None:
    chat = [USER | {"name": "Ann"}, ANSWER | {"reasoning_content": "hm", "tool_calls": None}]
    (row,) = read_rows(str(write_rows("data.jsonl", [{"messages": chat, "tools": [{"name": "f"}]}])), tokenizer)
    assert row.remarks == (
        "the key 'name' of a message is not used by the chat template",
        "the key 'reasoning_content' of a message is not used by the chat template",
        "the key 'tools' is not used by the chat template",
    )


@pytest.mark.parametrize("mark", [{"loss": False}, {"weight": 0}, {"train": False}, {"training": False, "loss": False}])
def test_a_marked_answer_is_context(mark: dict[str, Any], write_rows: WriteRows, tokenizer: TextTokenizer) -> None:
    first = {"role": "assistant", "content": "FIRST", **mark}
    (row,) = read_rows(str(write_rows("data.jsonl", [{"messages": [USER, first, USER, ANSWER]}])), tokenizer)
    assert trained(row, tokenizer) == ["yes<|im_end|>\n"] and "FIRST" in row.prompt
    assert row.remarks == ("answers marked as context are not trained",)
    assert row.text == tokenizer.render([USER, {"role": "assistant", "content": "FIRST"}, USER, ANSWER], False)
    # what stands behind the last answer that trains teaches nothing
    (row,) = read_rows(str(write_rows("data.jsonl", [{"messages": [USER, ANSWER, USER, first]}])), tokenizer)
    assert trained(row, tokenizer) == ["yes<|im_end|>\n"] and "FIRST" not in row.text


@pytest.mark.parametrize(
    ("mark", "problem"),
    [
        ({"loss": "false"}, "a message is marked {'loss': 'false'}: a mark must be true or false (a weight: 1 or 0)"),
        ({"weight": 0.5}, "a message is marked {'weight': 0.5}: a mark must be true or false (a weight: 1 or 0)"),
        ({"loss": True, "train": False}, "a message is marked {'loss': True, 'train': False}: which of them holds?"),
        ({"loss": False}, "no answer of it is trained: each is marked as context"),
    ],
)
def test_marks_that_cannot_be_decided(
    mark: dict[str, Any], problem: str, write_rows: WriteRows, tokenizer: TextTokenizer
) -> None:
    path = write_rows("data.jsonl", [{"messages": [USER, ANSWER | mark]}])
    assert refusal(path, tokenizer) == f"1 of 1 rows cannot be used\nline 1: {problem}"


# tools


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_calls_reach_the_template(
    as_text: bool, templated: Callable[[str], TextTokenizer], write_rows: WriteRows
) -> None:
    tokenizer = templated(TOOL_TEMPLATE)
    chat = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "sun"}]
    row: dict[str, Any] = {"messages": [*chat, ANSWER], "tools": [{"name": "get_weather"}]}
    if as_text:
        row = {key: json.dumps(value) for key, value in row.items()}
    (made,) = read_rows(str(write_rows("data.jsonl", [row])), tokenizer)
    assert made.text.startswith('TOOLS [{"name": "get_weather"}]\n')
    called, said = trained(made, tokenizer)
    assert called.startswith("CALL [{") and "Bonn" in called and said == "yes<|im_end|>\n"
    assert made.remarks == ("what tools return is read, not trained",)


DOCUMENT_TEMPLATE = (
    "{% for d in documents or [] %}[{{ d.title }}] {{ d.text }}\n{% endfor %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_documents_reach_the_template(
    templated: Callable[[str], TextTokenizer], write_rows: WriteRows, tokenizer: TextTokenizer
) -> None:
    row: dict[str, Any] = {"messages": [USER, ANSWER], "documents": [{"title": "Bonn", "text": "sunny"}]}
    path = write_rows("data.jsonl", [row, {**row, "documents": json.dumps(row["documents"])}, {**row, "documents": []}])
    first, second, without = read_rows(str(path), templated(DOCUMENT_TEMPLATE))
    assert first == second and first.prompt.startswith("[Bonn] sunny\nuser: ") and not first.remarks
    assert without.text == first.text.removeprefix("[Bonn] sunny\n")
    assert read_rows(str(path), tokenizer)[0].remarks == ("the key 'documents' is not used by the chat template",)
    for wrong, problem in (
        ("Bonn", "'documents' must be a list, got"),
        (["Bonn"], "'documents' must be a list of objects"),
    ):
        said = refusal(write_rows("wrong.jsonl", [{**row, "documents": wrong}]), tokenizer)
        assert said.split("\n")[1].startswith(f"line 1: {problem}")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
            "a message calls tools ('tool_calls'), which the chat template does not write",
        ),
        ({"messages": [USER, ANSWER], "tools": "get_weather"}, "'tools' must be a list, got "),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "a message must be {'role', 'content'}, got "),
        ({"messages": "[{"}, "'messages' is not JSON: "),
    ],
)
def test_tools_that_would_be_lost(row: Any, problem: str, write_rows: WriteRows, tokenizer: TextTokenizer) -> None:
    assert refusal(write_rows("data.jsonl", [row]), tokenizer).split("\n")[1].startswith(f"line 1: {problem}")


# what templates do


def test_an_answer_without_an_end_token_gets_one(
    templated: Callable[[str], TextTokenizer], write_rows: WriteRows
) -> None:
    tokenizer = templated(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    path = write_rows("data.jsonl", [{"messages": [USER, ANSWER]}] * 3)
    (row, *_) = read_rows(str(path), tokenizer)
    assert trained(row, tokenizer) == ["yes\n<|endoftext|>"] and tokenizer.stop_ids == [0]
    assert measure_lengths(str(path), tokenizer).remarks[ENDED] == 3


def test_the_closing_token_of_the_template_ends_an_answer(tokenizer: TextTokenizer) -> None:
    assert (tokenizer.eos_ids, tokenizer.stop_ids) == ([0], [0, 2])  # <|im_end|>, though no config names it


THINKING = CHAT_TEMPLATE.replace("{{ message['content'] }}", "{% if message['role'] == 'assistant' and '<think>' not in"
    " message['content'] %}<think>\n\n</think>\n\n{% endif %}{{ message['content'] }}")  # fmt: skip


def test_an_answer_that_closes_the_block_of_the_generation_prompt(
    templated: Callable[[str], TextTokenizer], write_rows: WriteRows
) -> None:
    tokenizer = templated(THINKING.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"))
    chat = [USER, {"role": "assistant", "content": "two and two\n</think>\n\n4"}]
    (row,) = read_rows(str(write_rows("data.jsonl", [{"messages": chat}])), tokenizer)
    assert row.text.endswith("<|im_start|>assistant\n<think>\ntwo and two\n</think>\n\n4<|im_end|>\n")
    assert row.text.count("<think>") == row.text.count("</think>") == 1
    assert row.prompt == tokenizer.render([USER], True)
    assert trained(row, tokenizer) == ["two and two\n</think>\n\n4<|im_end|>\n"]


def test_what_a_template_puts_before_an_answer_is_said(
    templated: Callable[[str], TextTokenizer], write_rows: WriteRows
) -> None:
    tokenizer = templated(THINKING)
    (row,) = read_rows(str(write_rows("data.jsonl", [{"messages": [USER, ANSWER]}])), tokenizer)
    assert row.remarks == ("the chat template puts '<think>\\n\\n</think>' before an answer, and it is trained",)
    assert trained(row, tokenizer) == ["<think>\n\n</think>\n\nyes<|im_end|>\n"]


def test_an_answer_that_a_template_changes_is_said(
    templated: Callable[[str], TextTokenizer], write_rows: WriteRows
) -> None:
    tokenizer = templated(CHAT_TEMPLATE.replace("message['content']", "message['content'].split('|')[-1]"))
    (row,) = read_rows(
        str(write_rows("d.jsonl", [{"messages": [USER, {"role": "assistant", "content": "hm|yes"}]}])), tokenizer
    )
    assert row.remarks == ("the chat template changes an answer: trained is what it writes",)


# begin tokens, special tokens, templates: wherever they lie


def test_a_begin_token_is_never_doubled(tokenizer_folder: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    shutil.copytree(tokenizer_folder, tmp_path / "bos")
    path = tmp_path / "bos" / "tokenizer.json"
    held, token = json.loads(path.read_text()), "<|im_start|>"
    held["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [1], "tokens": [token]}},
    }
    path.write_text(json.dumps(held))
    tokenizer = TextTokenizer(tmp_path / "bos")
    assert tokenizer.prefix_ids == [1]
    for key, row in (("prompt", {"prompt": f"{token}a", "completion": "b"}), ("text", {"text": f"{token}a"})):
        said = refusal(write_rows("data.jsonl", [row]), tokenizer)
        assert said.endswith(f"{key!r} starts with {token!r}, which the tokenizer puts before every text: leave it out")


def test_special_tokens_of_older_folders(tokenizer_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "old"
    shutil.copytree(tokenizer_folder, folder)
    (folder / "special_tokens_map.json").write_text('{"bos_token": {"content": "<|endoftext|>"}}')
    (folder / "chat_template.jinja").write_text("{{ bos_token }}" + CHAT_TEMPLATE)
    own = AutoTokenizer.from_pretrained(folder).apply_chat_template([USER], tokenize=False)
    assert TextTokenizer(folder).render([USER], False) == own and own.startswith("<|endoftext|><|im_start|>")


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template.json": json.dumps({"chat_template": "A{{ messages[0].content }}"})},
        {"tokenizer_config.json": '{"eos_token": "<|pad|>", "chat_template": "A{{ messages[0].content }}"}'},
        {"chat_template.jinja": "{# note #}\r\nA{{ messages[0].content }}"},
    ],
)  # fmt: skip
def test_templates_wherever_they_lie(files: dict[str, str], tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tokenizer_folder, folder)
    (folder / "chat_template.jinja").unlink()
    for name, text in files.items():
        (folder / name).write_bytes(text.encode())
    assert TextTokenizer(folder).render([USER], False) == "Aone?"


@pytest.mark.parametrize(
    "template",
    [
        "{# a #}\nA",
        "x {# a #} B",
        "  {# a #}\n  C{# b\n c #}D",
        "{#- a -#}\n E",
        "x\n{# a -#}\n\n F",
        "{{ '{# no #}' }}G",
    ],
)
def test_a_template_without_comments_says_the_same(template: str) -> None:
    from jinja2 import Environment

    environment = Environment(trim_blocks=True, lstrip_blocks=True)
    bare = without_comments(template)
    assert environment.from_string(bare).render() == environment.from_string(template).render()
    assert "{#" not in bare.replace("'{# no #}'", "")


# the report


def test_the_report_marks_what_trains(write_rows: WriteRows, tokenizer: TextTokenizer) -> None:
    rows = [{"prompt": "Section of caf\u00e9:", "completion": " utils", "id": i} for i in range(4)]
    path = write_rows("data.jsonl", rows)
    found = report_data(str(path), tokenizer, rows=1)
    text = data_text(found)
    assert "\nSection of caf\u00e9:\u27e6 utils<|endoftext|>\u27e7" in text
    assert "4 rows: the key 'id' is not used" in text and f"{path}: 4 rows, " in text
    (row,) = found.rows
    assert "".join(token.text for token in row.tokens) == "Section of caf\u00e9: utils<|endoftext|>"
    assert [token.trained for token in row.tokens] == [False] * row.prompt_tokens + [True] * (
        len(row.tokens) - row.prompt_tokens
    )
    assert found.lengths.trained_tokens == 4 * (len(row.tokens) - row.prompt_tokens)


def test_the_verb(write_rows: WriteRows, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from edgeft.cli import data

    path = str(write_rows("data.jsonl", [{"prompt": "Which Section:", "completion": f" utils {i}"} for i in range(9)]))
    data([path], model=str(tokenizer_folder), rows=2, max_length=None, as_json=False)
    shown = capsys.readouterr().out
    assert shown.startswith(f"{path}: 9 rows, ") and "\nWhich Section:\u27e6 utils 0<|endoftext|>\u27e7\n" in shown
    assert "row 2, " in shown and "row 3, " not in shown
    data([path], model=str(tokenizer_folder), rows=3, max_length=8, as_json=True)
    made = json.loads(capsys.readouterr().out)
    assert (made["lengths"]["rows"], len(made["rows"]), made["stop_ids"]) == (9, 3, [0, 2])
    assert made["lengths"]["longest"] == 8 and made["lengths"]["cut_rows"] == 9
    broken = str(write_rows("broken.jsonl", [PLAIN, {"prompt": "a"}]))
    with pytest.raises(BadInput, match="line 2: 'completion' is missing"):
        data([broken], model=str(tokenizer_folder))


def test_a_plan_says_what_of_its_data_trains_and_what_is_not_used(
    write_rows: WriteRows, checkpoint_folder: Path
) -> None:
    from rich.console import Console

    from edgeft.planning.plan import make_plan
    from edgeft.reporting.terminal import plan_text
    from edgeft.settings.job import make_job

    path = write_rows("data.jsonl", [PLAIN | {"id": i} for i in range(40)])
    made = make_plan(make_job(model=str(checkpoint_folder), data=str(path), profile="cpu-8gb"))
    assert f"{path}: 40 of 40 rows: the key 'id' is not used" in made.notes
    assert made.lengths is not None and made.lengths.line == "40 rows, 80 of 120 tokens train in 40 answers"
    console = Console(width=200)
    with console.capture() as capture:
        console.print(plan_text(made))
    assert made.lengths.line in capture.get()


def test_remarks_are_counted_by_rows(write_rows: WriteRows, tokenizer: TextTokenizer) -> None:
    marked = ANSWER | {"loss": False}
    path = write_rows("data.jsonl", [{"messages": [USER, marked, USER, marked, USER, ANSWER]}] * 2)
    remarks: Counter[str] = Counter()
    list(each_sample(read_rows(str(path), tokenizer), tokenizer, None, remarks))
    assert remarks == {"answers marked as context are not trained": 2}


def test_lengths_are_measured_once_and_again_when_the_file_changes(
    write_rows: WriteRows, tokenizer: TextTokenizer
) -> None:
    path = write_rows("data.jsonl", [PLAIN] * 2)
    first = measure_lengths(str(path), tokenizer)
    assert measure_lengths(str(path), tokenizer) is first
    write_rows("data.jsonl", [PLAIN] * 3)
    assert measure_lengths(str(path), tokenizer).rows == 3


def test_parse_json_gives_the_error_instead_of_raising() -> None:
    assert parse_json('{"a": [1]}') == {"a": [1]}
    assert isinstance(parse_json("{"), ValueError)
