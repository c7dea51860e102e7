"""Is a grammar that no device can be held to refused when it is planned, each with its reason?"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import EXAMPLE

import edgeft
from edgeft.data.dataset import TextTokenizer
from edgeft.data.grammar import read_grammar
from edgeft.data.grammar_ends import endless_lark, endless_regex, endless_schema
from edgeft.errors import BadInput, MissingExtra
from edgeft.machines.extras import install_line
from edgeft.settings.job import make_job
from edgeft.targets.words import Words


@pytest.mark.parametrize(
    ("text", "operator"),
    [
        ("a*", "*"), ("[a-z]+", "+"), ("(ab){2,}", "{2,}"), (r"\d+", "+"), ("[]]+", "+"), ("[^]]*", "*"), ("b?+", "+"),
        ("a{2,}?", "{2,}"), ("(ab){2}+", "+"), (r"\p{L}+", "+"), ("([a-z]{1,3})+", "+"), ("x[[a-z]&&[^aeiou]]*", "*"),
        ("(a*|b)", "*"), (r"\\+", "+"),
    ],
)  # fmt: skip
def test_what_repeats_without_limit_is_found(text: str, operator: str) -> None:
    assert endless_regex(text).startswith(f"{operator} at ")


@pytest.mark.parametrize(
    "text",
    ["a{2,3}", r"\*\+", "[*+]{1,2}", "[]*]", r"[\]*]", r"\x{2B}{1,3}", r"\p{Lu}\p{Ll}{1,20}", "a?", "(a|b){1,4}?",
     r"\{2,\}", "[a{2,}]"],
)  # fmt: skip
def test_what_has_a_limit_is_not(text: str) -> None:
    assert endless_regex(text) == ""


WORD = {"type": "string", "maxLength": 9}


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "string"}, "$: a string without maxLength"),
        ({"type": "string", "pattern": "^[a-z]+$"}, "$: a string without maxLength"),
        ({"type": "string", "pattern": "[a-z]{3}"}, "$: a string without maxLength"),
        ({"type": "string", "format": "email"}, "$: a string without maxLength"),
        ({"type": "integer", "minimum": 0}, "$: integer without minimum and maximum"),
        ({"type": "number", "minimum": 0, "maximum": 1}, "$: a number without multipleOf, which limits its digits"),
        ({"type": ["null", "string"]}, "$: a string without maxLength"),
        ({"type": "array", "items": WORD}, "$: an array without maxItems"),
        ({"type": "array", "maxItems": 2}, "$.items: anything is allowed here"),
        ({"type": "object", "properties": {"a": WORD}}, '$: an object without "additionalProperties": false'),
        ({"type": "object", "additionalProperties": False, "properties": {"a": {}}}, "$.a: anything is allowed here"),
        ({"anyOf": [WORD, {"type": "string"}]}, "$.anyOf[1]: a string without maxLength"),
        (
            {"$defs": {"n": {"type": "array", "maxItems": 2, "items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"},
            "$.items: #/$defs/n holds itself, to any depth",
        ),
        ({"title": "x"}, "$: anything is allowed here"),
    ],
)
def test_a_schema_without_end_is_named_by_its_path(schema: dict[str, Any], reason: str) -> None:
    assert endless_schema(schema) == reason


@pytest.mark.parametrize(
    "schema",
    [
        WORD, {"enum": ["a", "b"]}, {"const": 3}, {"type": "boolean"}, {"type": ["null", "boolean"]},
        {"type": "string", "pattern": "^[a-z]{1,9}$"}, {"type": "string", "format": "date"},
        {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.01},
        {"type": "integer", "exclusiveMinimum": 0, "maximum": 9}, {"type": "array", "maxItems": 3, "items": WORD},
        {"type": "array", "prefixItems": [WORD, WORD], "items": False},
        {"$defs": {"w": WORD}, "type": "object", "additionalProperties": False,
         "properties": {"a": {"$ref": "#/$defs/w"}, "b": {"$ref": "#/$defs/w"}}},
    ],
)  # fmt: skip
def test_a_schema_with_an_end_is_not(schema: dict[str, Any], tmp_path: Path) -> None:
    assert endless_schema(schema) == ""
    pytest.importorskip("llguidance")
    (tmp_path / "s.json").write_text(json.dumps(schema))
    grammar = Words(TextTokenizer(EXAMPLE)).checked(read_grammar(str(tmp_path / "s.json"))[0])
    matcher = Words(TextTokenizer(EXAMPLE)).matcher(grammar)
    longest_walks_end(matcher)


def longest_walks_end(matcher: Any) -> None:
    """Answers that end only where nothing else is allowed: they do end, as it was said."""
    import numpy

    draw = numpy.random.default_rng(1)
    for _ in range(5):
        matcher.restart()
        for _ in range(400):
            allowed = matcher.allowed(4096).nonzero()[0]
            going_on = [token for token in allowed if token not in matcher.stops]
            if not going_on:
                break
            matcher.take(int(draw.choice(going_on)))
        assert matcher.stopped()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('start: "a"*', "* repeats as often as it likes in start"),
        ('start: word\nword: ("a"|"b"){2,}', "{2,} repeats as often as it likes in word"),
        ("start: /[a-z]+/ // +", "+ at 6 of '[a-z]+' repeats as often as it likes in start"),
        ('start: "a" start | "b"', "start holds itself, to any depth"),
        ('start: a\na: "(" b ")"\nb: a | "x"', "a holds itself, to any depth"),
        ('start: "a"\n%ignore " "', "%ignore, which edgeft does not look into, in start"),
        ("start: %json {}", "%json, which edgeft does not look into, in start"),
        ('start[max_tokens=5]: name\nname.2: "a"+', "+ repeats as often as it likes in name"),
    ],
)
def test_a_lark_grammar_without_end_is_named_by_its_rule(text: str, reason: str) -> None:
    assert endless_lark(text) == reason


def test_a_lark_grammar_with_an_end_is_not() -> None:
    assert endless_lark('// *\nstart: a ", " b? // +\na: "x*" | /[+*]{1,2}/\nb: a~2..3 | "\\"+"') == ""


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("s.json", "{}", "is an empty schema: it allows any JSON"),
        ("s.json", "true", "is an empty schema"),
        ("s.json", " ", "is empty"),
        ("s.json", "[1]", "is no JSON Schema, got"),
        ("s.json", "{", "is no JSON Schema: not JSON"),
        ("s.json", '{"type": "string"}', r"allows answers without end: \$: a string without maxLength"),
        ("s.lark", "", "is empty"),
        ("s.lark", 'start: "a"+', "allows answers without end"),
        ("s.json", None, "cannot be read"),
        ("regex:", None, "is empty"),
        ("regex:a+", None, r"allows answers without end: \+ at 2 of 'a\+'"),
    ],
)
def test_what_says_nothing_or_never_ends_is_refused(name: str, text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=message):
        read_grammar(name if name.startswith("regex:") else str(tmp_path / name))


def test_the_setting_is_one_of_its_forms() -> None:
    for answers in ("free", "labels", "regex:[ab]", "a/b.json", "x.lark"):
        assert make_job(model="m", answers=answers).answers == answers
    with pytest.raises(BadInput, match=r"expected free, labels, regex:EXPRESSION, a JSON Schema \(FILE\.json\)"):
        make_job(model="m", answers="label")


def data(path: Path, answers: list[str]) -> str:
    rows = [{"prompt": f"x{number}\n", "completion": answer} for number, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def plan(tmp_path: Path, answers: str, completions: list[str], model: Path = EXAMPLE) -> Any:
    rows = data(tmp_path / "rows.jsonl", completions * 10)
    return edgeft.plan(model=str(model), profile="cpu-8gb", answers=answers, data=rows, out=tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ("regex:(a", "unclosed group"),
        ("regex:a(?=b)", "look-around"),
        ("regex:[0-9]{3}", r"allows none of the 2 answers of .*, as 'ab'"),
    ],
)
def test_what_cannot_be_read_or_the_data_never_says_is_refused(answers: str, message: str, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    with pytest.raises(BadInput, match=message):
        plan(tmp_path, answers, ["ab", "cd"])


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string", "minLength": 5, "maxLength": 2}, "Unsatisfiable schema"),
        ({"type": "nonsense"}, "a type 'nonsense'"),
        ({**WORD, "unevaluatedItems": 1}, "Unimplemented keys"),
    ],
)
def test_a_schema_that_cannot_be_expressed_is_refused(schema: dict[str, Any], message: str, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    (tmp_path / "s.json").write_text(json.dumps(schema))
    with pytest.raises(BadInput, match=message):
        plan(tmp_path, str(tmp_path / "s.json"), ['"ab"'])


def test_what_the_tokenizer_has_no_token_for_is_refused(tmp_path: Path) -> None:
    """A tokenizer of letters alone: it cannot write a digit."""
    pytest.importorskip("llguidance")
    from tokenizers import Tokenizer, decoders, models

    letters = {"<|endoftext|>": 0, **{chr(97 + number): number + 1 for number in range(26)}}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
    backend.decoder = decoders.ByteLevel()
    fake = type("Letters", (), {"backend": backend, "stop_ids": [0], "spell": lambda self, ids: "?" * len(ids)})()
    assert Words(fake).checked(read_grammar("regex:[a-c]{2}")[0])
    with pytest.raises(BadInput, match="the tokenizer has no token for what must follow"):
        Words(fake).checked(read_grammar("regex:ab[0-9]")[0])


def test_without_llguidance_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtra, match=re.escape(install_line("grammars"))):
        plan(tmp_path, "regex:[a-d]{2}", ["ab", "cd"])


def test_a_grammar_needs_data(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="a grammar is checked with the model's tokenizer and data"):
        edgeft.plan(model=str(EXAMPLE), profile="cpu-8gb", answers="regex:[a-d]{2}", out=tmp_path / "plan.json")
