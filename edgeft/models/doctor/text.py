"""Do tokenizer, template and end tokens go with the weights they lie beside? (no torch)"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.data.tokenizer import SPECIALS, TextTokenizer, find_template, read_json
from edgeft.errors import BadInput
from edgeft.models.doctor.findings import Finding
from edgeft.models.doctor.kinds import Listing, is_pointer

TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
              "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json")  # fmt: skip
SLOW = (("tokenizer.model",), ("vocab.json", "merges.txt"), ("spiece.model",))


@dataclass(frozen=True)
class Text:
    """What a folder says of text: the highest id and one, how answers end, whether there is a template."""

    tokens: int = 0
    end_ids: tuple[int, ...] = ()
    template: bool = False
    source: str = ""  # "own", "base", or "slow": what has to be made from older files; "" where there is none


def look_at_text(listing: Listing, rows: int, base: Path | None) -> tuple[Text, list[Finding]]:
    """What there is, and what is wrong with it beside an embedding of so many rows (0: not known)."""
    folder = listing.folder
    if is_pointer(folder / "tokenizer.json"):
        hint = f"fetch it: git lfs pull in {folder}, or hf download"
        return Text(), [Finding(code="pointer", problem="tokenizer.json is a pointer of Git LFS", hint=hint)]
    if not (folder / "tokenizer.json").is_file():
        return _without(listing, rows, base)
    try:
        tokenizer = TextTokenizer(folder)
    except BadInput as problem:
        again = "the base's tokenizer" if "cannot be read" in problem.problem else ""
        return Text(), [Finding(code="tokenizer", problem=f"{problem.where}: {problem.problem}", hint=problem.hint,
                                repair=again, from_base=bool(again))]  # fmt: skip
    text = Text(_highest(tokenizer) + 1, tuple(tokenizer.stop_ids), tokenizer.template_text is not None, "own")
    found = [*_rows(tokenizer, text, rows, base), *_ends(tokenizer, rows), *_template(tokenizer, base)]
    return text, found


def _without(listing: Listing, rows: int, base: Path | None) -> tuple[Text, list[Finding]]:
    """A folder without tokenizer.json: older files of one, or none at all."""
    slow = next((names for names in SLOW if all(name in listing.names for name in names)), None)
    if slow:
        problem = f"there is no tokenizer.json, only {' and '.join(slow)}"
        return Text(source="slow"), [Finding(code="tokenizer", problem=problem, repair="tokenizer.json made from them")]
    text, problem = Text(), "there is no tokenizer"
    repair = "the base's tokenizer and template"
    if base is not None:
        own = TextTokenizer(base)
        text = Text(_highest(own) + 1, tuple(own.stop_ids), own.template_text is not None, "base")
        if rows and text.tokens > rows and _needed(own, rows):
            problem, repair = f"there is no tokenizer, and the base's has {text.tokens} ids for {rows} rows", ""
    return text, [Finding(code="tokenizer", problem=problem, repair=repair, from_base=True)]


def _highest(tokenizer: TextTokenizer) -> int:
    return max(tokenizer.backend.get_vocab(with_added_tokens=True).values(), default=-1)


def _needed(tokenizer: TextTokenizer, rows: int) -> list[str]:
    """Tokens without a row that text cannot do without: of the vocabulary proper, special by role, in the template."""
    beyond = {token for token, id in tokenizer.backend.get_vocab(with_added_tokens=True).items() if id >= rows}
    plain = tokenizer.backend.get_vocab(with_added_tokens=False)
    roles = {tokenizer.special(name) for name in SPECIALS}
    return sorted(
        token for token in beyond if token in plain or token in roles or token in (tokenizer.template_text or "")
    )


def _rows(tokenizer: TextTokenizer, text: Text, rows: int, base: Path | None) -> Iterator[Finding]:
    """Ids that the embedding has no row for."""
    if not rows or text.tokens <= rows:
        return
    problem = f"the tokenizer has ids up to {text.tokens - 1}, the embedding has {rows} rows"
    if needed := _needed(tokenizer, rows):
        fits = base is not None and (base / "tokenizer.json").is_file() and _highest(TextTokenizer(base)) < rows
        hint = "" if fits else "give them rows where it was trained: model.resize_token_embeddings"
        yield Finding(code="rows", problem=problem, names=tuple(needed), from_base=fits, hint=hint,
                      repair="the base's tokenizer, which has no id beyond them" if fits else "")  # fmt: skip
    else:
        hint = "nothing needs them; data that holds one is refused"
        yield Finding(code="rows", level="note", problem=problem, hint=hint)


def _ends(tokenizer: TextTokenizer, rows: int) -> Iterator[Finding]:
    """How an answer ends: ids that there are, and the one that the template closes an answer with."""
    strange = [id for id in tokenizer.eos_ids if tokenizer.backend.id_to_token(id) is None or (rows and id >= rows)]
    if strange:
        own = tokenizer.backend.token_to_id(tokenizer.special("eos_token")) if tokenizer.special("eos_token") else None
        problem = f"the end token {strange[0]} is no id of the tokenizer"
        repair = f"eos_token_id: {own}, the tokenizer's own" if own is not None else ""
        yield Finding(code="end tokens", problem=problem, repair=repair, hint="" if repair else "set eos_token_id")
    more = [id for id in tokenizer.stop_ids if id not in tokenizer.eos_ids]
    if more and not strange:
        token, told = tokenizer.backend.id_to_token(more[0]), ", ".join(map(str, tokenizer.eos_ids))
        problem = f"the template ends an answer with {token!r} ({more[0]}), the end tokens are {told}"
        yield Finding(code="end tokens", level="note", problem=problem, repair="generation_config.json names it too",
                      hint="edgeft ends an answer at either, other tools run on")  # fmt: skip


def _template(tokenizer: TextTokenizer, base: Path | None) -> Iterator[Finding]:
    if tokenizer.template_text is not None:
        return
    repair, problem = "", "there is no chat template: data of {'messages'} rows is refused"
    if base is not None and find_template(base) is not None and same_vocabulary(tokenizer, base):
        repair = "the base's chat template"
    yield Finding(code="template", level="note", problem=problem, repair=repair, from_base=bool(repair))


def same_vocabulary(tokenizer: TextTokenizer, base: Path) -> bool:
    """Whether every token of a base is the same id here: then its template can be said in these tokens."""
    if not (base / "tokenizer.json").is_file():
        return False
    ours, theirs = tokenizer.backend.get_vocab(), TextTokenizer(base).backend.get_vocab()
    return all(ours.get(token) == id for token, id in theirs.items())


def end_ids(folder: Path) -> dict[str, Any]:
    """The generation settings of a folder with every id at which its answers end."""
    tokenizer = TextTokenizer(folder)
    known = [id for id in tokenizer.stop_ids if tokenizer.backend.id_to_token(id) is not None]
    own = tokenizer.backend.token_to_id(tokenizer.special("eos_token")) if tokenizer.special("eos_token") else None
    ids = known or ([own] if own is not None else [])
    return read_json(folder / "generation_config.json") | {"eos_token_id": ids[0] if len(ids) == 1 else ids}


def write_ends(folder: Path) -> None:
    """Let generation_config.json name the end tokens that there are."""
    (folder / "generation_config.json").write_text(json.dumps(end_ids(folder), indent=2) + "\n", encoding="utf-8")
