"""Does every kind of row become exactly the tokens and labels it should, and is every broken row named?"""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import CHAT_TEMPLATE, SECTIONS, WriteRows

from edgeft.data.dataset import (
    COLUMNS,
    IGNORED,
    Row,
    Sample,
    TextTokenizer,
    hold_out,
    measure_lengths,
    read_rows,
    to_samples,
)
from edgeft.documents import sha256_file
from edgeft.errors import BadInput, MissingExtra
from edgeft.machines.extras import install_line

KINDS = "a row is one of " + ", ".join(COLUMNS) + "; names of your own: --columns prompt=YOURS,completion=YOURS"
USER, ANSWER = {"role": "user", "content": "Which section?"}, {"role": "assistant", "content": "utils"}
SYSTEM = {"role": "system", "content": "You sort packages."}
CHATS = {
    "one turn": [USER, ANSWER],
    "system": [SYSTEM, USER, ANSWER],
    "several turns": [
        USER,
        ANSWER,
        {"role": "user", "content": "And grep?"},
        {"role": "assistant", "content": "text, \u00e9 \u732b"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "yes"},
    ],
}
# ChatML again, with transformers' own mark around what the assistant says
MARKED_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>\n' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHAPES: dict[str, tuple[list[Any], list[Row]]] = {
    "prompt": (
        [
            {"prompt": 'a "quoted",\nprompt', "completion": " yes"},
            {"prompt": "caf\u00e9", "completion": " no"},
        ],
        [
            Row('a "quoted",\nprompt yes', ((18, 22),), 18, "plain"),
            Row("caf\u00e9 no", ((4, 7),), 4, "plain"),
        ],
    ),
    "text": (
        [{"text": "one"}, {"text": "two\nlines"}],
        [Row("one", ((0, 3),), 0, "plain"), Row("two\nlines", ((0, 9),), 0, "plain")],
    ),
    "messages": (
        [{"messages": [USER, ANSWER]}],
        [
            Row(
                "<|im_start|>user\nWhich section?<|im_end|>\n<|im_start|>assistant\nutils<|im_end|>\n",
                ((64, 80),),
                64,
                "chat",
                (USER,),
            )
        ],
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> TextTokenizer:
    return TextTokenizer(tokenizer_folder)


@pytest.fixture
def variant(tokenizer_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tokenizer's folder with files exchanged: name=text, dots as `__`, None removes."""

    def make(**files: Any) -> Path:
        folder = tmp_path / "variant"
        shutil.copytree(tokenizer_folder, folder)
        for name, content in files.items():
            path = folder / name.replace("__", ".")
            if content is None:
                path.unlink()
            else:
                path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return folder

    return make


def reference(folder: Path) -> Any:
    """transformers' own tokenizer of a folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def only(rows: list[Row], tokenizer: TextTokenizer, max_length: int | None = None) -> Sample:
    (sample,) = to_samples(rows, tokenizer, max_length)
    return sample


def plain(prompt: str, completion: str) -> Row:
    whole = len(prompt + completion)
    return Row(prompt + completion, ((len(prompt), whole),), len(prompt), "plain")


def text_row(text: str) -> Row:
    return Row(text, ((0, len(text)),), 0, "plain")


# reading


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".csv"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_every_shape_and_file(shape: str, suffix: str, write_rows: WriteRows, tokenizer: TextTokenizer) -> None:
    rows, expected = SHAPES[shape]
    assert read_rows(str(write_rows("data" + suffix, rows)), tokenizer) == expected


def test_byte_order_mark_empty_lines_and_extra_columns_are_no_problem(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('\ufeff{"text": "a", "id": 7}\n\n  \r\n{"text": "b"}\r\n', encoding="utf-8")
    rows = read_rows(str(path), tokenizer)
    assert [(row.text, row.remarks) for row in rows] == [("a", ("the key 'id' is not used",)), ("b", ())]


def test_an_answer_beside_a_text_is_named_with_what_trains_it(write_rows: WriteRows, tokenizer: TextTokenizer) -> None:
    path = write_rows("data.jsonl", [{"text": "the pump is loud", "label": " pump"}])
    (row,) = read_rows(str(path), tokenizer)
    said = "the key 'label' is not used: --columns prompt=text,completion=label trains it as the answer to the text"
    assert row.remarks == (said,)
    (row,) = read_rows(f"{path}[prompt=text,completion=label]", tokenizer)  # and it does
    assert row.has_prompt and row.text == "the pump is loud pump" and row.remarks == ()
    (row,) = read_rows(str(write_rows("asked.jsonl", [{"prompt": "a", "completion": " b", "label": "c"}])), tokenizer)
    assert row.remarks == ("the key 'label' is not used",)


def test_a_csv_cell_may_be_longer_than_the_csv_module_allows(write_rows: WriteRows, tokenizer: TextTokenizer) -> None:
    long = "word " * 40_000
    (row,) = read_rows(str(write_rows("data.csv", [{"text": long}])), tokenizer)
    assert row == text_row(long)


def test_parquet_without_pyarrow_says_which_extra(
    tmp_path: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra) as caught:
        read_rows(str(path), tokenizer)
    assert str(caught.value) == f"{path}: reading parquet needs pyarrow\n\nhint: {install_line('data')}"
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("shape", SHAPES)
def test_parquet_rows(shape: str, tmp_path: Path, tokenizer: TextTokenizer) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows, expected = SHAPES[shape]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    assert read_rows(str(tmp_path / "data.parquet"), tokenizer) == expected
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(BadInput, match=r"bad\.parquet: cannot be read: "):
        read_rows(str(tmp_path / "bad.parquet"), tokenizer)


def test_a_hub_id_without_the_datasets_package(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra) as caught:
        read_rows("someone/something", tokenizer)
    assert str(caught.value) == (
        "someone/something: is no file; reading a hub dataset needs the package datasets\n\n"
        f"hint: {install_line('data')}, or give a file"
    )


def test_hub_rows_come_from_the_training_split(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Datasets:
        @staticmethod
        def load_dataset(name: str, split: str) -> list[dict[str, str]]:
            if (name, split) != ("someone/something", "train"):
                raise RuntimeError("Couldn't reach the Hub")
            return [{"text": "from the hub"}]

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    assert read_rows("someone/something", tokenizer)[0] == text_row("from the hub")
    with pytest.raises(BadInput) as caught:
        read_rows("someone/else", tokenizer)
    problem = "is no file and could not be loaded as a hub dataset: Couldn't reach the Hub"
    assert str(caught.value).startswith(
        f"someone/else: {problem}\n\nhint: a dataset of several is named ORG/NAME:CONFIG"
    )


def test_parts_of_a_hub_dataset_and_its_first_rows(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked, drawn = list[Any](), list[int]()

    def rows() -> Iterator[dict[str, str]]:
        for number in range(10**9):  # what is not asked for is not fetched
            drawn.append(number)
            yield {"text": f"row {number}"}

    def load_dataset(path: str, **options: Any) -> Iterator[dict[str, str]]:
        asked.append((path, options))
        return rows() if options.get("streaming") else itertools.islice(rows(), 3)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_rows("org/sum-1.5:main/test#2", tokenizer) == [text_row("row 0"), text_row("row 1")]
    assert len(drawn) <= 3 and asked == [("org/sum-1.5", {"name": "main", "split": "test", "streaming": True})]
    assert [row.text for row in read_rows("org/sum:/test#2x", tokenizer)] == [f"row {n}" for n in (0, 1, 2)] * 2
    assert asked[-1] == ("org/sum", {"split": "test"})
    read_rows("org/sum:socratic", tokenizer)
    assert asked[-1] == ("org/sum", {"name": "socratic", "split": "train"})
    for source in ("a/b/c", "folder/missing.jsonl", "nothing"):
        with pytest.raises(BadInput, match="no such data file"):
            read_rows(source, tokenizer)
    assert len(asked) == 3


# errors


def test_one_broken_line_in_six_thousand(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    lines = (SECTIONS / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 6000
    lines[4320] = lines[4320][:-1]  # the closing brace is lost
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(BadInput) as caught:
        read_rows(str(path), tokenizer)
    assert str(caught.value) == (
        f"{path}: 1 of 6000 rows cannot be used\n"
        f"line 4321: not JSON: Expecting ',' delimiter: line 2 column 1 (char {len(lines[4320]) + 1})\n\n"
        f"hint: {KINDS}"
    )


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("{", "not JSON: "),
        ("[1]", "expected an object, got list"),
        ("null", "expected an object, got NoneType"),
        ({"body": "a", "answer": "b"}, "has none of the known columns, got ['answer', 'body']"),
        ({}, "has none of the known columns, got []"),
        ({"prompt": "a"}, "'completion' is missing"),
        ({"completion": "a"}, "'prompt' is missing"),
        ({"prompt": "a", "completion": ""}, "'completion' must be a non-empty text, got ''"),
        ({"prompt": "", "completion": "a"}, "'prompt' must be a non-empty text, got ''"),
        ({"prompt": "a", "completion": 3}, "'completion' must be a non-empty text, got 3"),
        ({"text": None}, "'text' must be a non-empty text, got None"),
        ({"messages": []}, "'messages' must be a list of {'role', 'content'}, got []"),
        (
            {"messages": {"role": "user"}},
            "'messages' must be a list of {'role', 'content'}, got {'role': 'user'}",
        ),
        ({"messages": [{"role": "user"}]}, "a message must be {'role', 'content'}, got {'role': 'user'}"),
        ({"messages": [{"content": "x"}]}, "a message must be {'role', 'content'}, got {'content': 'x'}"),
        ({"messages": [USER]}, "the last message must be the assistant's"),
        ({"messages": [USER, ANSWER, USER]}, "the last message must be the assistant's"),
    ],
)
def test_every_broken_row_is_named(row: Any, problem: str, write_rows: WriteRows, tokenizer: TextTokenizer) -> None:
    kind = {"prompt": "p", "completion": "c"}
    path = write_rows("data.jsonl", [kind, row, kind])
    with pytest.raises(BadInput) as caught:
        read_rows(str(path), tokenizer)
    count, line = caught.value.problem.split("\n")
    assert (caught.value.where, count) == (str(path), "1 of 3 rows cannot be used")
    assert line.startswith(f"line 2: {problem}") and (line == f"line 2: {problem}" or problem == "not JSON: ")
    assert caught.value.hint == KINDS


def test_the_first_five_broken_rows_are_shown_and_all_are_counted(
    write_rows: WriteRows, tokenizer: TextTokenizer
) -> None:
    path = write_rows("data.jsonl", [{"text": "a"}, *[{"text": ""}] * 7, {"text": "b"}])
    with pytest.raises(BadInput) as caught:
        read_rows(str(path), tokenizer)
    shown = [f"line {n}: 'text' must be a non-empty text, got ''" for n in range(2, 7)]
    expected = "\n".join(["7 of 9 rows cannot be used", *shown, "... and 2 more"])
    assert caught.value.problem == expected


def test_csv_errors_count_the_header_and_physical_lines(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = tmp_path / "data.csv"
    path.write_text('prompt,completion\n"two\nlines",ok\nshort\n', encoding="utf-8")
    with pytest.raises(BadInput) as caught:
        read_rows(str(path), tokenizer)
    problem = "1 of 2 rows cannot be used\nline 4: 1 cells, the header names 2: quote a cell with commas"
    assert caught.value.problem == problem


@pytest.mark.parametrize("content", ["", "\n\n", "text\n"], ids=["nothing", "empty lines", "csv header only"])
def test_a_file_without_rows(content: str, tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = tmp_path / ("data.csv" if "text" in content else "data.jsonl")
    path.write_text(content)
    with pytest.raises(BadInput) as caught:
        read_rows(str(path), tokenizer)
    assert str(caught.value) == f"{path}: there are no rows in it\n\nhint: {KINDS}"


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": "a"}, {"prompt": "a", "completion": "b"}],
        [{"prompt": "a", "completion": "b"}, {"messages": [USER, ANSWER]}],
        [{"text": "a"}, {"messages": [USER, ANSWER]}],
    ],
)
def test_mixed_kinds(rows: list[Any], write_rows: WriteRows, tokenizer: TextTokenizer) -> None:
    path = write_rows("data.jsonl", rows)
    with pytest.raises(BadInput) as caught:
        read_rows(str(path), tokenizer)
    hint = "use chats, prompts with completions, or texts throughout; a system message makes a chat of a prompt"
    assert str(caught.value) == f"{path}: rows of different kinds are mixed\n\nhint: {hint}"


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.csv", "a/b/missing"])
def test_a_missing_file(name: str, tmp_path: Path, tokenizer: TextTokenizer) -> None:
    with pytest.raises(BadInput) as caught:
        read_rows(str(tmp_path / name), tokenizer)
    hint = "give a .jsonl, .csv or .parquet file, or a hub dataset id"
    assert str(caught.value) == f"{tmp_path / name}: no such data file\n\nhint: {hint}"


def test_a_folder_and_an_unknown_suffix(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    with pytest.raises(BadInput) as caught:
        read_rows(str(tmp_path), tokenizer)
    assert (
        str(caught.value)
        == f"{tmp_path}: is a folder\n\nhint: give one data file; as --data a folder with train.jsonl is one"
    )
    path = tmp_path / "data.xlsx"
    path.write_bytes(b"PK")
    with pytest.raises(BadInput) as caught:
        read_rows(str(path), tokenizer)
    hint = "use .jsonl, .jsonl.gz, .csv or .parquet"
    assert str(caught.value) == f"{path}: unknown kind of data file '.xlsx'\n\nhint: {hint}"


@pytest.mark.parametrize("name", ["data.jsonl", "data.csv", "data.jsonl.gz"])
def test_a_file_that_is_not_utf8(name: str, tmp_path: Path, tokenizer: TextTokenizer) -> None:
    data = 'text\n{"text": "caf\u00e9"}\n'.encode("latin-1")
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(BadInput) as caught:
        read_rows(str(path), tokenizer)
    assert str(caught.value).startswith(f"{path}: cannot be read: 'utf-8' codec can't decode byte 0xe9")
    assert caught.value.hint == "save it as UTF-8"


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b'{"text": "not zipped"}'])
def test_a_damaged_gzip_file(damage: Callable[[bytes], bytes], tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(damage(gzip.compress(b'{"text": "a"}\n' * 100)))
    with pytest.raises(BadInput, match=r"data\.jsonl\.gz: cannot be read: "):
        read_rows(str(path), tokenizer)


# chat


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_is_rendered_and_tokenised_as_transformers_does(
    name: str, tokenizer: TextTokenizer, write_rows: WriteRows
) -> None:
    rows = read_rows(str(write_rows("data.jsonl", [{"messages": CHATS[name]}])), tokenizer)
    own = reference(tokenizer.folder)
    text = own.apply_chat_template(CHATS[name], tokenize=False)
    assert rows[0].text == text == tokenizer.render(CHATS[name], False)
    ids = own.apply_chat_template(CHATS[name], tokenize=True, return_dict=True)["input_ids"]
    assert only(rows, tokenizer).ids == ids
    asked = own.apply_chat_template(CHATS[name][:-1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.render(CHATS[name][:-1], True) == asked == rows[0].prompt
    assert rows[0].messages == tuple(CHATS[name][:-1])


@pytest.mark.parametrize("name", CHATS)
def test_exactly_what_the_assistant_says_is_trained(
    name: str, variant: Callable[..., Path], write_rows: WriteRows
) -> None:
    """transformers marks the same tokens, from a template that marks the assistant's text itself."""
    folder = variant(chat_template__jinja=MARKED_TEMPLATE)
    tokenizer = TextTokenizer(folder)
    sample = only(read_rows(str(write_rows("d.jsonl", [{"messages": CHATS[name]}])), tokenizer), tokenizer)
    encoded = reference(folder).apply_chat_template(
        CHATS[name], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    mask = encoded["assistant_masks"]
    assert sample.ids == encoded["input_ids"] and 0 < sum(mask) < len(mask)
    assert sample.labels == [id if said else IGNORED for id, said in zip(sample.ids, mask, strict=True)]
    answers = [message["content"] for message in CHATS[name] if message["role"] == "assistant"]
    trained = [label for label in sample.labels if label != IGNORED]
    assert tokenizer.backend.decode(trained, skip_special_tokens=False) == "".join(
        answer + "<|im_end|>\n" for answer in answers
    )
    last = sample.ids[sample.prompt_tokens :]
    assert tokenizer.backend.decode(last, skip_special_tokens=False) == answers[-1] + "<|im_end|>\n"


def test_a_template_that_drops_earlier_thoughts_trains_only_the_last_answer(
    variant: Callable[..., Path], write_rows: WriteRows
) -> None:
    shortened = "(message['content'] if loop.last else message['content'].split('|')[-1])"
    tokenizer = TextTokenizer(variant(chat_template__jinja=CHAT_TEMPLATE.replace("message['content']", shortened)))
    answers = [{"role": "assistant", "content": f"thought{i}|answer{i}"} for i in range(2)]
    chat = [USER, answers[0], USER, answers[1]]
    (row,) = read_rows(str(write_rows("data.jsonl", [{"messages": chat}])), tokenizer)
    assert row.text == tokenizer.render(chat, False)
    assert [row.text[lo:hi] for lo, hi in row.trained] == ["thought1|answer1<|im_end|>\n"]
    assert "answer0" in row.prompt and "thought0" not in row.prompt
    assert row.remarks == ("earlier answers are not trained: the template writes them otherwise once the chat goes on",)


def test_a_template_that_forgets_its_generation_prompt(variant: Callable[..., Path], write_rows: WriteRows) -> None:
    template = CHAT_TEMPLATE.replace("assistant\n{% endif", "assistant\n<think>{% endif")
    tokenizer = TextTokenizer(variant(chat_template__jinja=template))
    with pytest.raises(BadInput) as caught:
        read_rows(str(write_rows("data.jsonl", [{"messages": [USER, ANSWER]}])), tokenizer)
    assert caught.value.problem == (
        "1 of 1 rows cannot be used\nline 1: the chat template does not keep its own generation prompt before an answer"
    )


def test_what_a_template_refuses_is_reported_with_its_line(variant: Callable[..., Path], write_rows: WriteRows) -> None:
    check = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('start with the user') }}{% endif %}"
    tokenizer = TextTokenizer(variant(chat_template__jinja=check + CHAT_TEMPLATE))
    good, bad = {"messages": [USER, ANSWER]}, {"messages": [SYSTEM, USER, ANSWER]}
    path = write_rows("data.jsonl", [good, bad, good])
    with pytest.raises(BadInput) as caught:
        read_rows(str(path), tokenizer)
    problem = "1 of 3 rows cannot be used\nline 2: the chat template says: start with the user"
    assert (caught.value.where, caught.value.problem) == (str(path), problem)


def test_a_tokenizer_without_template_refuses_chats(variant: Callable[..., Path], write_rows: WriteRows) -> None:
    tokenizer = TextTokenizer(variant(chat_template__jinja=None))
    with pytest.raises(BadInput) as caught:
        read_rows(str(write_rows("data.jsonl", [{"messages": [USER, ANSWER]}])), tokenizer)
    assert str(caught.value) == (
        f"{tokenizer.folder}: the tokenizer has no chat template, so {{'messages'}} rows cannot be used\n\n"
        "hint: use {'prompt', 'completion'} rows, or add chat_template.jinja to the model folder"
    )


def test_a_broken_template_names_its_line(variant: Callable[..., Path]) -> None:
    tokenizer = TextTokenizer(variant(chat_template__jinja="{% for m in messages %}\n{% endif %}"))
    with pytest.raises(BadInput, match=r"variant: the chat template is broken, line 2: "):
        tokenizer.render([USER], True)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | tojson }}",
        "{{ messages[0] | tojson(indent=2) }}",
        "{{ messages | tojson(ensure_ascii=True) }}",
        "{% if tools is not none %}tools{% else %}none{% endif %}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
        "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}",
        "{{ strftime_now('%Y') }}",
        "  {% if true %}\n  x\n  {% endif %}\ny\n",
    ],
)
def test_templates_have_what_transformers_gives_them(template: str, variant: Callable[..., Path]) -> None:
    folder = variant(chat_template__jinja=template)
    chat = [{"role": "user", "content": "caf\u00e9 <b>"}, ANSWER]
    expected = reference(folder).apply_chat_template(chat, tokenize=False)
    assert TextTokenizer(folder).render(chat, False) == expected


def test_a_template_cannot_leave_the_sandbox(variant: Callable[..., Path]) -> None:
    escape = "{{ messages.__class__.__base__.__subclasses__() }}"
    tokenizer = TextTokenizer(variant(chat_template__jinja=escape))
    with pytest.raises(BadInput, match=r"chat template: access to attribute '__class__'"):
        tokenizer.render([USER], True)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("inline", "inline"),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
    ],
)
def test_templates_inside_the_tokenizer_config(template: Any, expected: str, variant: Callable[..., Path]) -> None:
    config = {"eos_token": {"content": "<|endoftext|>"}, "chat_template": template}
    tokenizer = TextTokenizer(variant(chat_template__jinja=None, tokenizer_config__json=config))
    assert tokenizer.template_text == expected == tokenizer.render([USER], False)


# tokens


def test_prompt_and_completion_become_ids_labels_and_an_end(tokenizer: TextTokenizer) -> None:
    own = reference(tokenizer.folder)
    prompt, completion = own("Section of grep:").input_ids, own(" utils").input_ids
    end = own.eos_token_id
    sample = only([plain("Section of grep:", " utils")], tokenizer)
    assert sample == Sample([*prompt, *completion, end], [IGNORED] * len(prompt) + [*completion, end], len(prompt))
    assert sample.trained_tokens == len(completion) + 1


def test_a_text_is_trained_as_a_whole(tokenizer: TextTokenizer) -> None:
    ids = [*reference(tokenizer.folder)("some words").input_ids, tokenizer.eos_id]
    sample = only([text_row("some words")], tokenizer)
    assert sample == Sample(ids, ids, 0)
    assert sample.trained_tokens == len(ids) - 1  # nothing comes before the first token that could predict it


def test_samples_keep_the_order_of_rows(tokenizer: TextTokenizer) -> None:
    rows = [plain(f"prompt {i}:", f" answer {i}") for i in range(20)]
    together = to_samples(rows, tokenizer, None)
    assert together == [only([row], tokenizer) for row in rows]
    assert [tokenizer.decode(s.ids) for s in together] == [f"prompt {i}: answer {i}" for i in range(20)]


@pytest.fixture
def with_bos(variant: Callable[..., Path]) -> TextTokenizer:
    """A tokenizer whose post-processor puts a begin-of-text token first, and an end token last."""
    from tokenizers import Tokenizer, processors

    folder = variant()
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    start, end = (backend.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>"))
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|im_start|> $A <|im_end|>",
                pair=None,
                special_tokens=[("<|im_start|>", start), ("<|im_end|>", end)],
            ),
        ]
    )
    backend.save(str(folder / "tokenizer.json"))
    return TextTokenizer(folder)


def test_a_begin_of_text_token_comes_first_and_is_not_trained(with_bos: TextTokenizer) -> None:
    own = reference(with_bos.folder)
    bos = own.convert_tokens_to_ids("<|im_start|>")
    assert with_bos.prefix_ids == [bos] == own("anything").input_ids[:1]
    sample = only([plain("Section of grep:", " utils")], with_bos)
    bare = own(["Section of grep:", " utils"], add_special_tokens=False).input_ids
    assert sample.ids == [bos, *bare[0], *bare[1], with_bos.eos_id]
    assert sample.labels == [IGNORED] * (1 + len(bare[0])) + [*bare[1], with_bos.eos_id]
    assert sample.prompt_tokens == 1 + len(bare[0])
    text = only([text_row("words")], with_bos)
    assert (text.ids[0], text.labels[0], text.prompt_tokens) == (bos, IGNORED, 0)


def test_a_chat_gets_no_second_begin_of_text_token(with_bos: TextTokenizer, write_rows: WriteRows) -> None:
    rows = read_rows(str(write_rows("data.jsonl", [{"messages": [USER, ANSWER]}])), with_bos)
    ids = with_bos.encode([with_bos.render([USER, ANSWER], False)])[0]
    assert only(rows, with_bos).ids == ids


@pytest.mark.parametrize("bos", [False, True])
def test_cutting_takes_the_start_of_the_prompt_then_the_end_of_the_answer(
    bos: bool, tokenizer: TextTokenizer, with_bos: TextTokenizer
) -> None:
    used = with_bos if bos else tokenizer
    row = plain("Package: grep\nDescription: search text\nSection:", " utilities and more")
    whole = only([row], used)
    prefix = len(used.prefix_ids)
    answer = len(whole.ids) - whole.prompt_tokens
    assert whole.prompt_tokens > 12 and answer > 5 and prefix == bos
    for limit in range(8, len(whole.ids) + 3):
        cut = only([row], used, limit)
        excess = max(0, len(whole.ids) - limit)
        kept = max(1, whole.prompt_tokens - prefix - excess)  # of the prompt: at least its last token
        prompt = whole.ids[whole.prompt_tokens - kept : whole.prompt_tokens]
        expected = [*whole.ids[:prefix], *prompt, *whole.ids[whole.prompt_tokens :]][:limit]
        assert cut.ids == expected and len(cut.ids) == min(limit, len(whole.ids))
        assert cut.prompt_tokens == prefix + kept and cut.cut_tokens == excess
        assert cut.labels == [IGNORED] * cut.prompt_tokens + expected[cut.prompt_tokens :]
        assert cut.trained_tokens == min(answer, limit - prefix - kept)


def test_a_text_is_cut_at_its_end(tokenizer: TextTokenizer) -> None:
    row = text_row("a text of several words")
    whole, cut = only([row], tokenizer), only([row], tokenizer, 8)
    assert (cut.ids, cut.labels) == (whole.ids[:8], whole.ids[:8])
    assert cut.cut_tokens == len(whole.ids) - 8 > 0


def test_lengths_of_a_file(tokenizer: TextTokenizer, write_rows: WriteRows) -> None:
    words = ["a", "b c", "d e f", "g h i j k l m n o"]
    path = write_rows("data.jsonl", [{"prompt": "Q:", "completion": " " + word} for word in words])
    own = reference(tokenizer.folder)
    asked = len(own("Q:").input_ids)
    answers = [len(own(" " + word).input_ids) + 1 for word in words]  # and the end token
    lengths = sorted(asked + answer for answer in answers)
    found = measure_lengths(str(path), tokenizer)
    assert found.model_dump() == {
        "path": str(path),
        "sha256": sha256_file(path),
        "rows": 4,
        "longest": lengths[-1],
        "median": (lengths[1] + lengths[2]) // 2,
        "mean": round(sum(lengths) / 4, 2),
        "tokens": sum(lengths),
        "longest_trained": max(answers),
        "cut_rows": 0,
        "untrained_rows": 0,
        "answers": 4,
        "remarks": {},
        "highest_id": max(own("Q:").input_ids + own(" a b c d e f g h i j k l m n o").input_ids),
        "trained_tokens": sum(answers),
        "quantiles": {"0.5": lengths[1], "0.75": lengths[2], **dict.fromkeys(("0.9", "0.95", "0.99"), lengths[3])},
    }
    limited = measure_lengths(str(path), tokenizer, max_length=lengths[-1] - 1)
    assert (limited.longest, limited.cut_rows) == (lengths[-1] - 1, 1)


# the tokenizer's folder


@pytest.mark.parametrize("files", [{}, {"config__json": {"eos_token_id": 2}}])
def test_the_end_token_closes_samples(files: dict[str, Any], variant: Callable[..., Path]) -> None:
    tokenizer = TextTokenizer(variant(**files))
    assert (tokenizer.eos_ids, tokenizer.eos_id) == (([2], 2) if files else ([0], 0))


def test_all_end_tokens_of_the_generation_config_stop_and_the_tokenizers_own_closes(
    variant: Callable[..., Path],
) -> None:
    tokenizer = TextTokenizer(
        variant(generation_config__json={"eos_token_id": [2, 0]}, config__json={"eos_token_id": 1})
    )
    assert (tokenizer.eos_ids, tokenizer.eos_id) == ([2, 0], 0)


def test_an_end_token_is_needed(variant: Callable[..., Path]) -> None:
    folder = variant(tokenizer_config__json={})
    with pytest.raises(BadInput) as caught:
        TextTokenizer(folder)
    hint = "set eos_token_id in config.json: without an end token a model never stops"
    assert str(caught.value) == f"{folder}: no end-of-text token is defined\n\nhint: {hint}"


def test_a_folder_without_tokenizer_and_broken_ones(tmp_path: Path, variant: Callable[..., Path]) -> None:
    with pytest.raises(BadInput) as caught:
        TextTokenizer(tmp_path)
    hint = "take it from the model this was made from: edgeft doctor FOLDER --base MODEL --repair OUT"
    assert str(caught.value) == f"{tmp_path}: there is no tokenizer.json\n\nhint: {hint}"
    folder = variant(tokenizer_config__json="{")
    with pytest.raises(BadInput, match=r"tokenizer_config\.json: is not JSON: "):
        TextTokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match=r"tokenizer\.json: cannot be read: "):
        TextTokenizer(folder)


def test_padding_and_truncation_stored_in_a_tokenizer_are_ignored(variant: Callable[..., Path]) -> None:
    from tokenizers import Tokenizer

    folder = variant()
    long = "a long text of many words " * 5
    expected = TextTokenizer(folder).encode([long, "x"])
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(folder / "tokenizer.json"))
    assert TextTokenizer(folder).encode([long, "x"]) == expected and len(expected[0]) > 4


@pytest.mark.parametrize("text", ["plain words", "caf\u00e9 \u732b\n\ttabs", " leading and trailing "])
def test_encoding_is_transformers_and_decoding_is_its_inverse(text: str, tokenizer: TextTokenizer) -> None:
    (ids,) = tokenizer.encode([text])
    assert ids == reference(tokenizer.folder)(text, add_special_tokens=False).input_ids
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == text


# holding out


@pytest.mark.parametrize(
    ("rows", "share", "held"),
    [(2, 0.01, 1), (10, 0.1, 1), (100, 0.05, 5), (40, 0.5, 20), (20_000, 0.05, 500)],
)
def test_hold_out_is_disjoint_complete_ordered_and_repeatable(rows: int, share: float, held: int) -> None:
    samples = [Sample([i], [i], 0) for i in range(rows)]
    train, valid = hold_out(samples, share, seed=3)
    numbers = [[sample.ids[0] for sample in part] for part in (train, valid)]
    assert len(valid) == held
    assert sorted(numbers[0] + numbers[1]) == list(range(rows))
    assert all(part == sorted(part) for part in numbers)
    assert hold_out(samples, share, seed=3) == (train, valid)
    if held >= 5:
        assert hold_out(samples, share, seed=4)[1] != valid


def test_one_row_cannot_be_held_out() -> None:
    with pytest.raises(BadInput) as caught:
        hold_out([Sample([1], [1], 0)], 0.1, 0)
    assert str(caught.value) == (
        "data: one row cannot be split into training and validation\n\nhint: give --valid FILE or more rows"
    )


def test_reading_data_imports_no_torch(write_rows: WriteRows, tokenizer_folder: Path) -> None:
    """The planner reads data and answers in well under a second."""
    import subprocess

    path = write_rows("data.jsonl", [{"messages": [USER, ANSWER]}])
    code = (
        "import sys; from pathlib import Path; from edgeft.data.dataset import TextTokenizer, measure_lengths;"
        f"print(measure_lengths({str(path)!r}, TextTokenizer(Path({str(tokenizer_folder)!r}))).rows,"
        "'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False", "False"]
