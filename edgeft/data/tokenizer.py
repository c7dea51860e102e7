"""Which ids is a text, what does a chat look like as text, and which ids end an answer? (no torch, no transformers)"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from edgeft.documents import saving
from edgeft.errors import BadInput
from edgeft.machines.runner import runner_module

TEMPLATE = "chat template"  # where an error is that a template itself raised
ENCODE_TEXTS = 32  # at a time: an encoding takes a hundred times the bytes of the ids that are kept of it
ANCHORS = ("\n", "a", "0", "=", "\u4e00")  # a text after one of these is encoded as one that goes on
SPECIALS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class TextTokenizer:
    """A checkpoint folder's tokenizer and chat template, without transformers.

    Chat templates are jinja programs from strangers: they run in jinja2's sandbox, as in transformers.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        if not (folder / "tokenizer.json").is_file():
            hint = "take it from the model this was made from: edgeft doctor FOLDER --base MODEL --repair OUT"
            raise BadInput(folder, "there is no tokenizer.json", hint)
        try:
            self.backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as problem:  # tokenizers raises bare Exception for any malformed file
            raise BadInput(folder / "tokenizer.json", f"cannot be read: {problem}") from None
        self.backend.no_truncation()
        self.backend.no_padding()
        self.folder = folder
        self.config = read_json(folder / "tokenizer_config.json")
        self.template_text = find_template(folder)
        self.eos_ids = self._find_eos()
        self.prefix_ids = self._find_prefix()
        # what it adds is prefix_ids; ByteLevel's would also move the offsets of tokens that start with a space
        self.backend.post_processor = None

    def _find_eos(self) -> list[int]:
        for source in ("generation_config.json", "config.json"):
            value = read_json(self.folder / source).get("eos_token_id")
            if value is None:
                continue
            ids = value if isinstance(value, list) else [value]
            if not ids or not all(type(id) is int and 0 <= id < 2**31 for id in ids):
                raise BadInput(
                    self.folder / source, f"eos_token_id: expected an id or a list of them, got {value!r:.80}"
                )
            return list(ids)
        token = self.special("eos_token")
        found = self.backend.token_to_id(token) if token else None
        if found is None:
            hint = "set eos_token_id in config.json: without an end token a model never stops"
            raise BadInput(self.folder, "no end-of-text token is defined", hint)
        return [found]

    def _find_prefix(self) -> list[int]:
        """Ids the tokenizer puts before every text, such as Llama's begin-of-text token."""
        try:
            bare, full = (self.backend.encode("x", add_special_tokens=added).ids for added in (False, True))
        except Exception as problem:  # tokenizers raises bare Exception, as for a vocabulary without an unknown token
            raise BadInput(self.folder / "tokenizer.json", f"cannot encode a text: {problem}") from None
        starts = [i for i in range(len(full)) if full[i : i + len(bare)] == bare]
        return list(full[: starts[0]]) if starts else []

    @cached_property
    def _specials_map(self) -> dict[str, Any]:
        return read_json(self.folder / "special_tokens_map.json")  # where older tokenizers keep them

    def special(self, name: str) -> str:
        """The text of `bos_token`, `eos_token`, `pad_token` or `unk_token`; empty where there is none."""
        token = self.config.get(name) or self._specials_map.get(name) or ""
        return str(token.get("content") or "" if isinstance(token, dict) else token)

    @cached_property
    def prefix_text(self) -> str:
        """What `prefix_ids` are when a text spells them out."""
        return "".join(self.backend.id_to_token(token) or "" for token in self.prefix_ids)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that are no text."""
        return frozenset(id for id, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def eos_id(self) -> int:
        """The id that closes a training sample: the tokenizer's own end token when it is one of the model's."""
        own = self.backend.token_to_id(self.special("eos_token"))
        return own if own in self.eos_ids else self.eos_ids[0]

    @cached_property
    def stop_ids(self) -> list[int]:
        """Every id at which an answer ends: the checkpoint's end tokens, and what its template closes an answer with.

        The closing token is the first special one behind the assistant's words. Training's scores, the parity ladder,
        golden vectors and the bundle all end an answer at these.
        """
        closing = [token for token in self._closing_ids() if token in self.special_ids][:1]
        return [*self.eos_ids, *(token for token in closing if token not in self.eos_ids)]

    def _closing_ids(self) -> list[int]:
        if self.template_text is None:
            return []
        probe = "edgeft"
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": probe}]
        try:
            after = self.render(messages, add_generation_prompt=False).rpartition(probe)[2]
        except BadInput:  # a template of another kind of turn: the checkpoint's own end tokens have to do
            return []
        return self.encode([after])[0]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens added."""
        return [encoding.ids for encoding in self._encodings(texts)]

    def encodings(self, texts: Sequence[str]) -> list[Any]:
        """As `encode`, with the characters that each token covers; large: for a few texts at a time."""
        return list(self.backend.encode_batch(list(texts), add_special_tokens=False))

    def _encodings(self, texts: Sequence[str]) -> Iterator[Any]:
        for start in range(0, len(texts), ENCODE_TEXTS):
            part = list(texts[start : start + ENCODE_TEXTS])
            yield from self.backend.encode_batch_fast(part, add_special_tokens=False)

    def encode_after(self, text: str) -> tuple[Any, int, int]:
        """(encoding, its first tokens and characters that are not the text's) of a text that continues another one.

        Normalizers that put a space before a text put it before the anchor that stands in front here.
        """
        for anchor in ANCHORS:
            encoding = self.encodings([anchor + text])[0]
            first, split = token_at(encoding, len(anchor), len(anchor + text))
            if not split:
                return encoding, first, len(anchor)
        return self.encodings([text])[0], 0, 0

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return str(self.backend.decode(list(ids), skip_special_tokens=True))

    def spell(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens spelled out."""
        return str(self.backend.decode(list(ids), skip_special_tokens=False))

    def uses(self, name: str) -> bool:
        """Whether the chat template mentions a name, such as `tools`."""
        return re.search(rf"\b{re.escape(name)}\b", self.template_text or "") is not None

    def render(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool, tools: Any = None, documents: Any = None
    ) -> str:
        """The chat template's text for messages [{role, content}, ...]. Raises BadInput without a template."""
        if self.template_text is None:
            hint = "use {'prompt', 'completion'} rows, or add chat_template.jinja to the model folder"
            raise BadInput(self.folder, "the tokenizer has no chat template, so {'messages'} rows cannot be used", hint)
        specials = {name: token for name in SPECIALS if (token := self.special(name))}
        compiled = self._compiled
        try:
            text = compiled.render(
                messages=runner_module().as_seen(messages),
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                documents=documents,
                **specials,
            )
            return str(text)
        except Exception as problem:  # whatever a template raises is a statement about these messages
            raise BadInput(TEMPLATE, str(problem), "check the order of the roles in 'messages'") from None

    @cached_property
    def _compiled(self) -> Any:
        from jinja2.exceptions import TemplateSyntaxError

        try:
            return runner_module().compile_template(self.template_text or "")
        except TemplateSyntaxError as problem:
            raise BadInput(self.folder, f"the chat template is broken, line {problem.lineno}: {problem}") from None


def token_at(encoding: Any, character: int, length: int) -> tuple[int, bool]:
    """(index of the first token that ends behind a character's start, whether it starts before it).

    `length` is the text's. Characters that a normalizer removes belong to the token that follows.
    """
    for at in range(character, length):
        found = encoding.char_to_token(at)
        if found is not None:
            return int(found), encoding.token_to_chars(found)[0] < character
    return len(encoding), False


def find_template(folder: Path) -> str | None:
    """The chat template of a checkpoint, from wherever tools have kept it, with line ends as \\n."""
    own = folder / "chat_template.jinja"
    if own.is_file():
        try:
            return own.read_text(encoding="utf-8")
        except ValueError as problem:
            raise BadInput(own, f"is no text in UTF-8: {problem}") from None
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if template is None:  # a processor's way
        template = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, dict):
        template = template.get("default")
    if isinstance(template, list):  # several named templates: the default one
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
    return None if template is None else str(template).replace("\r\n", "\n").replace("\r", "\n")


def without_comments(template: str) -> str:
    """The same template without its comments, and without the white space that jinja2 takes away around them."""
    from jinja2 import Environment

    if "{#" not in template:
        return template
    tokens = Environment(trim_blocks=True, lstrip_blocks=True).lex(template)
    return "".join(text for _, kind, text in tokens if not kind.startswith("comment"))


def write_template(template: str | None, folder: Path) -> None:
    """A chat template as the file that every runtime reads, without comments: not all trim what stands around them."""
    with saving(folder):
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        if template is not None:
            (folder / "chat_template.jinja").write_text(without_comments(template), encoding="utf-8", newline="\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty where there is no such file or it holds something else. Raises BadInput."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as problem:
        raise BadInput(path, f"is not JSON: {problem}") from None
    return value if isinstance(value, dict) else {}
