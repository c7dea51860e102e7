"""Does every answer that a grammar allows have an end? What may go on for ever in it is named. (no torch)

A model that is held to a grammar may still write for ever where that lets it: digits, blanks, the letters of a name.
What comes of it fits no context, and cut off it is no answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

# formats of strings whose length is bounded
BOUNDED_FORMATS = ("date", "uuid", "ipv4")
BOUNDS = (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum"))


def endless_regex(text: str) -> str:
    """The first of a regular expression's operators that has no limit, or nothing."""
    at = depth = 0  # depth: of character classes, which may hold others
    while at < len(text):
        sign = text[at]
        if sign == "\\":
            braces = re.match(r"\\[pPxuU]\{[^}]*\}", text[at:])
            at += braces.end() if braces else 2
            continue
        if sign == "[":
            start = re.match(r"\[\^?\]?", text[at:]) if depth == 0 else None  # a first ] is a sign like others
            depth, at = depth + 1, at + (start.end() if start else 1)
            continue
        if sign == "]" and depth:
            depth -= 1
        elif depth == 0:
            found = re.match(r"[*+]|\{\d+,\}", text[at:])
            if found:
                return f"{found[0]} at {at + 1} of {text!r:.60} repeats as often as it likes"
        at += 1
    return ""


def endless_schema(schema: dict[str, Any]) -> str:
    """The first part of a JSON Schema that has no limit, by its path and reason, or nothing."""
    return next((f"{path}: {reason}" for path, reason in _endless(schema, schema, "$", ())), "")


def _endless(part: Any, whole: dict[str, Any], path: str, seen: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Each part of a schema that has no limit, with the reason; `seen` are the references that led here."""
    if part is False or (isinstance(part, dict) and ("enum" in part or "const" in part)):
        return
    if not isinstance(part, dict):
        yield path, "anything is allowed here"
        return
    if "$ref" in part:
        yield from _referred(part["$ref"], whole, path, seen)
        return
    choices = [name for name in ("anyOf", "oneOf", "allOf") if name in part]
    for name in choices:
        for number, each in enumerate(part[name] if isinstance(part[name], list) else []):
            yield from _endless(each, whole, f"{path}.{name}[{number}]", seen)
    if choices and "type" not in part:
        return
    kinds = part.get("type", [])
    for kind in [kinds] if isinstance(kinds, str) else kinds or [""]:
        yield from _by_kind(kind, part, whole, path, seen)


def _referred(name: Any, whole: dict[str, Any], path: str, seen: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if name in seen:
        yield path, f"{name} holds itself, to any depth"
        return
    found: Any = whole
    for step in str(name).lstrip("#").strip("/").split("/"):
        found = found.get(step) if isinstance(found, dict) and step else found
    yield from _endless(found, whole, path, (*seen, name))


def _by_kind(
    kind: str, part: dict[str, Any], whole: dict[str, Any], path: str, seen: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    if kind == "string":
        bounded = "maxLength" in part or part.get("format") in BOUNDED_FORMATS
        bounded = bounded or ("pattern" in part and _whole(str(part["pattern"])))
        if not bounded:
            yield path, "a string without maxLength"
    elif kind in ("integer", "number"):
        if any(part.get(low) is None and part.get(high) is None for low, high in BOUNDS):
            yield path, f"{kind} without minimum and maximum"
        elif kind == "number" and "multipleOf" not in part:
            yield path, "a number without multipleOf, which limits its digits"
    elif kind == "array":
        if "maxItems" not in part and part.get("items") is not False:
            yield path, "an array without maxItems"
        for number, each in enumerate(part.get("prefixItems", [])):
            yield from _endless(each, whole, f"{path}.prefixItems[{number}]", seen)
        if part.get("maxItems") != 0 and "items" in part:
            yield from _endless(part["items"], whole, f"{path}.items", seen)
        elif part.get("maxItems", 0) > len(part.get("prefixItems", [])):
            yield f"{path}.items", "anything is allowed here"
    elif kind == "object":
        yield from _object(part, whole, path, seen)
    elif kind not in ("boolean", "null"):
        yield path, "anything is allowed here" if not kind else f"a type {kind!r}"


def _object(part: dict[str, Any], whole: dict[str, Any], path: str, seen: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if part.get("additionalProperties") is not False:
        yield path, 'an object without "additionalProperties": false'
    if part.get("patternProperties"):
        yield path, "an object with patternProperties"
    for name, each in (part.get("properties") or {}).items():
        yield from _endless(each, whole, f"{path}.{name}", seen)


def _whole(pattern: str) -> bool:
    """Whether a schema's pattern holds all of a text, and has an end."""
    return pattern.startswith("^") and pattern.endswith("$") and not endless_regex(pattern)


LARK = re.compile(
    r"""(?P<comment>//[^\n]*)|(?P<text>"(?:\\.|[^"\\])*"i?)|(?P<regex>/(?:\\.|[^/\\\n])+/[a-z]*)
    |(?P<special><[^>\n]*>)|(?P<limit>\{[^}\n]*\}|~\s*\d+(?:\s*\.\.\s*\d+)?)|(?P<directive>%\w+)|(?P<name>[A-Za-z_]\w*)
    |(?P<sign>\S)""",
    re.VERBOSE,
)


def endless_lark(text: str) -> str:
    """The first part of a Lark grammar that has no limit, or nothing."""
    parts = [(match.lastgroup or "", match[0]) for match in LARK.finditer(text) if match.lastgroup != "comment"]
    rules: dict[str, set[str]] = {}
    rule = ""
    for at, (kind, part) in enumerate(parts):
        if kind == "name" and _defines(parts, at):
            rule = part
            rules[rule] = set()
        elif kind == "name" and rule:
            rules[rule].add(part)
        elif reason := _no_limit(kind, part):
            return f"{reason} in {rule or 'its directives'}"
    return _circle(rules)


def _defines(parts: list[tuple[str, str]], at: int) -> bool:
    """Whether a name stands before the colon of its rule, with attributes or a priority between them or not."""
    after = at + 1
    if parts[after : after + 1] == [("sign", "[")]:
        after = next((i for i in range(after, len(parts)) if parts[i] == ("sign", "]")), len(parts)) + 1
    elif parts[after : after + 1] == [("sign", ".")]:
        after = next((i for i in range(after, len(parts)) if parts[i] == ("sign", ":")), len(parts))
    return parts[after : after + 1] == [("sign", ":")]


def _no_limit(kind: str, part: str) -> str:
    """Why one part of a Lark grammar has no limit, or nothing."""
    if kind == "sign" and part in "*+":
        return f"{part} repeats as often as it likes"
    if kind == "limit" and re.fullmatch(r"\{\s*\d+\s*,\s*\}", part):
        return f"{part} repeats as often as it likes"
    if kind == "regex":
        return endless_regex(part[1 : part.rindex("/")])
    return f"{part}, which edgeft does not look into," if kind == "directive" else ""


def _circle(rules: dict[str, set[str]]) -> str:
    """The first rule that holds itself, or nothing."""
    for name in rules:
        reached, waiting = set[str](), [name]
        while waiting:
            found = rules.get(waiting.pop(), set()) - reached
            if name in found:
                return f"{name} holds itself, to any depth"
            reached |= found
            waiting += found
    return ""
