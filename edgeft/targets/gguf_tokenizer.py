"""How does a checkpoint's tokenizer.json become the vocabulary of a GGUF file, and which tokenizers does that hold?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgeft.data.dataset import TextTokenizer
from edgeft.errors import BadInput

_ENDING = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = r"[^\r\n\p{L}\p{N}]?"
# llama.cpp knows the ways to cut a text before merging by name; here by what the steps of tokenizer.json do.
GPT2 = "words"  # the expression that ByteLevel itself holds
CUTS: dict[tuple[str, ...], str] = {
    (GPT2,): "gpt-2",
    ("digits", GPT2): "smollm",
    (_CONTRACTIONS + r"|\p{N}{1,3}" + _ENDING,): "dbrx",
    (_CONTRACTIONS + r"|\p{N}" + _ENDING,): "qwen2",
    (
        f"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ): "tekken",
}
WHOLE_WORDS_FIRST = {"dbrx": "llama-bpe"}  # the same cut where a word of the vocabulary is never merged together
FEW = "export with an ort- target: ONNX Runtime reads tokenizer.json itself"


def write_vocabulary(writer: Any, folder: Path, rows: int) -> None:
    """Tokens, merges or scores, special tokens and chat template of a checkpoint, as keys of a gguf.GGUFWriter.

    `rows` of the embedding beyond the tokenizer's become unused tokens. Raises BadInput for a tokenizer that llama.cpp
    would not reproduce.
    """
    tokenizer = TextTokenizer(folder)
    path = folder / "tokenizer.json"
    held = json.loads(path.read_text(encoding="utf-8"))
    model = held["model"]
    if model.get("type") != "BPE" or isinstance(model["vocab"], list):
        raise BadInput(path, f"a {model.get('type')} tokenizer is not written to GGUF here", FEW)
    tokens = [f"[PAD{index}]" for index in range(rows)]
    types = [UNUSED] * rows
    beyond = max((*model["vocab"].values(), *(added["id"] for added in held["added_tokens"])), default=-1)
    if beyond >= rows:
        raise BadInput(path, f"token {beyond} has no row in the embedding of {rows} rows", "copy the checkpoint again")
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, NORMAL
    for added in held["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    pairs = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        _sentencepiece(writer, path, held, pairs, tokens, types)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name_of_cut(path, held))
        writer.add_token_merges([" ".join(pair) for pair in pairs])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_name(_name(path, held["added_tokens"], tokens))
    _specials(writer, tokenizer)


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # gguf.TokenType, as numbers


def name_of_cut(path: Path, held: dict[str, Any]) -> str:
    """llama.cpp's name of a byte-level tokenizer's pre-tokenizer. Raises BadInput for one it does not know."""
    normalizer = held.get("normalizer")
    if normalizer is not None and normalizer["type"] != "NFC":  # llama.cpp leaves NFC out; composed text is the rule
        raise BadInput(path, f"llama.cpp has no normalizer {normalizer['type']}", FEW)
    cut = held.get("pre_tokenizer") or {"type": "nothing"}
    steps: list[str] = []
    for step in cut["pretokenizers"] if cut["type"] == "Sequence" else [cut]:
        if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            steps += [GPT2] if step.get("use_regex", True) else []
        elif step["type"] == "Digits" and step["individual_digits"]:
            steps.append("digits")
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            steps.append(step["pattern"].get("Regex", ""))
        else:
            steps.append(step["type"])
    name = CUTS.get(tuple(steps))
    if name is None:
        raise BadInput(path, f"llama.cpp's way to cut text like {steps} is not known here", FEW)
    if held["model"].get("ignore_merges"):
        if name not in WHOLE_WORDS_FIRST:
            raise BadInput(path, f"llama.cpp knows ignore_merges not with the cut {name!r}", FEW)
        name = WHOLE_WORDS_FIRST[name]
    return name


def _sentencepiece(
    writer: Any, path: Path, held: dict[str, Any], pairs: list[tuple[str, ...]], tokens: list[str], types: list[int]
) -> None:
    """The keys of a sentencepiece vocabulary: llama.cpp merges whichever neighbours give the token of the best score.

    Scores follow the order of the merges. That is the same tokenizer only where every way to cut a token in two tokens
    is a merge, and all of a token's merges stand together, as in those converted from sentencepiece.
    """
    model = held["model"]
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    merges, vocabulary = set(pairs), model["vocab"]
    ahead = sum(
        (word[:cut], word[cut:]) not in merges
        for word in ranks
        for cut in range(1, len(word))
        if word[:cut] in vocabulary and word[cut:] in vocabulary
    )
    order = [ranks[left + right] for left, right in pairs]
    if ahead or order != sorted(order):
        raise BadInput(path, "a byte-fallback BPE that was not made by sentencepiece: llama.cpp merges otherwise", FEW)
    for token, index in vocabulary.items():
        if types[index] == NORMAL and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[index] = BYTE
    if model.get("unk_token") in vocabulary:
        types[vocabulary[model["unk_token"]]] = UNKNOWN
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    # below every merge: tokens that no merge makes, such as single characters
    writer.add_token_scores([float(-ranks.get(token, len(pairs))) for token in tokens])
    writer.add_add_space_prefix(_adds_space(path, held))


def _adds_space(path: Path, held: dict[str, Any]) -> bool:
    """Whether a text gets a space in front. Raises BadInput for a normalizer llama.cpp does not have."""
    normalizer, cut = held.get("normalizer"), held.get("pre_tokenizer")
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    known = {"Prepend", "Replace"}
    if {step["type"] for step in steps} <= known and cut is None:
        return any(step["type"] == "Prepend" for step in steps)
    if {step["type"] for step in steps} <= {"Replace"} and cut is not None and cut["type"] == "Split":
        return False  # Gemma: splits where the normalizer left no space
    if not steps and cut is not None and cut["type"] == "Metaspace" and not cut.get("split", True):
        return bool(cut.get("prepend_scheme", "always") != "never")
    raise BadInput(path, "llama.cpp does not normalize text as this tokenizer does", FEW)


def _name(path: Path, added: list[dict[str, Any]], tokens: list[str]) -> str:
    """The model's name, by which llama.cpp knows whether special tokens take the space behind them along: Phi-3's do.

    Never the user's own name for it: "phi3" in that would change, or even crash, llama.cpp's tokenizer.
    """
    stripped = {token["content"] for token in added if token["rstrip"]}
    if not stripped and not any(token["lstrip"] for token in added):
        return "fine-tuned"
    kept = {"<unk>", "<s>", "<|endoftext|>"}
    if stripped == {token["content"] for token in added} - kept and {"</s>", *kept} <= set(tokens):
        return "fine-tuned phi-3"
    raise BadInput(path, f"llama.cpp does not strip the text around {', '.join(sorted(stripped))}", FEW)


def _specials(writer: Any, tokenizer: TextTokenizer) -> None:
    stops = tokenizer.stop_ids
    writer.add_eos_token_id(tokenizer.eos_id)
    others = [token for token in stops if token != tokenizer.eos_id]
    if others:  # llama.cpp ends an answer at any of the three; a fourth is in bundle.json alone
        writer.add_eot_token_id(others[-1])
    if len(others) > 1:
        writer.add_eom_token_id(others[0])
    named = {name: _id_of(tokenizer, name) for name in ("bos_token", "pad_token", "unk_token")}
    begins = len(tokenizer.prefix_ids) == 1  # more than one is for run.py, which takes them from bundle.json
    begin = tokenizer.prefix_ids[0] if begins else named["bos_token"]
    for token, add in (
        (begin, writer.add_bos_token_id),
        (named["pad_token"], writer.add_pad_token_id),
        (named["unk_token"], writer.add_unk_token_id),
    ):
        if token is not None:
            add(token)
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(False)
    if tokenizer.template_text is not None:
        writer.add_chat_template(tokenizer.template_text)


def _id_of(tokenizer: TextTokenizer, name: str) -> int | None:
    found: int | None = tokenizer.backend.token_to_id(tokenizer.special(name))
    return found
