"""Are the ids that train those that a device makes of the same text, with every kind of tokenizer?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import SECTIONS
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from edgeft.data.dataset import IGNORED, Row, Sample, TextTokenizer, to_samples
from edgeft.data.samples import SPLIT
from edgeft.machines.runner import runner_module

SPECIALS = ["<unk>", "<s>", "</s>", "[PAD]"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "Which section, caf\u00e9 \u732b?"},
    {"role": "assistant", "content": "libs"},
    {"role": "user", "content": "And  this?"},
    {"role": "assistant", "content": "doc \U0001f600 yes"},
]
PAIRS = [
    ("Section:", " libs"), ("Section: ", "libs"), ("Section:\n\n", "libs\n"), ("Sec", "tion"), ("a  ", "  b"),
    (" caf\u00e9", " \u732b\U0001f600"), ("Q:", "\n\nA"), ("0", "1"), ("[/INST]", "libs"), ("x \u00e9", "\u0301y"),
]  # fmt: skip


def texts() -> list[str]:
    with open(SECTIONS / "valid.jsonl", encoding="utf-8") as lines:
        return [json.loads(line)["prompt"] for line in lines]


def byte_level() -> tuple[Tokenizer, Any]:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=True)  # moves offsets behind a leading space
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return made, trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIALS, initial_alphabet=alphabet)


def sentencepiece(normalizer: Any = None, pre: Any = None) -> tuple[Tokenizer, Any]:
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if normalizer is not None:
        made.normalizer = normalizer
    if pre is not None:
        made.pre_tokenizer = pre
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    return made, trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIALS + byte_tokens)


def unigram() -> tuple[Tokenizer, Any]:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return made, trainers.UnigramTrainer(vocab_size=500, special_tokens=SPECIALS, unk_token="<unk>")


def word_piece() -> tuple[Tokenizer, Any]:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return made, trainers.WordPieceTrainer(vocab_size=500, special_tokens=SPECIALS)


PREPEND = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
KINDS = {
    "byte-level": byte_level,
    "prepend": lambda: sentencepiece(PREPEND),
    "metaspace first": lambda: sentencepiece(pre=pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "metaspace always": lambda: sentencepiece(pre=pre_tokenizers.Metaspace(prepend_scheme="always")),
    "unigram": unigram,
    "word piece": word_piece,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    made, trainer = KINDS[request.param]()
    trainer.show_progress = False
    made.train_from_iterator(texts(), trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"eos_token_id": 2}')
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return TextTokenizer(folder)


def device_ids(tokenizer: TextTokenizer, text: str) -> list[int]:
    """A text as run.py encodes it with the tokenizers library: from tokenizer.json, nothing added."""
    loaded = Tokenizer.from_file(str(tokenizer.folder / "tokenizer.json"))
    return list(loaded.encode(text, add_special_tokens=False).ids)


def chat_row(tokenizer: TextTokenizer, tmp_path: Path, messages: list[dict[str, str]]) -> Row:
    from edgeft.data.dataset import read_rows

    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    return read_rows(str(path), tokenizer)[0]


def test_a_chat_has_the_ids_of_its_whole_text_and_a_device_those_of_its_prompt(
    tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    row = chat_row(tokenizer, tmp_path, CHAT)
    (sample,) = to_samples([row], tokenizer, None)
    if SPLIT not in split_remarks(row, tokenizer):
        assert sample.ids == device_ids(tokenizer, tokenizer.render(CHAT, False))
    config = json.loads((tokenizer.folder / "tokenizer_config.json").read_text())
    asked = runner_module().apply_template(TEMPLATE, CHAT[:-1], {**config, "pad_token": "", "unk_token": ""})
    assert sample.prompt == device_ids(tokenizer, asked)
    trained = [i for i, label in enumerate(sample.labels) if label != IGNORED]
    assert trained[-1] == len(sample) - 1 and sample.ids[-1] == 2 and sample.labels[0] == IGNORED
    assert [i for i in trained if i < sample.prompt_tokens]  # the first answer too


def split_remarks(row: Row, tokenizer: TextTokenizer) -> list[str]:
    from collections import Counter

    from edgeft.data.samples import each_sample

    remarks: Counter[str] = Counter()
    list(each_sample([row], tokenizer, None, remarks))
    return list(remarks)


@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_a_prompt_trains_as_the_ids_that_a_device_encodes(
    prompt: str, completion: str, tokenizer: TextTokenizer
) -> None:
    row = Row(prompt + completion, ((len(prompt), len(prompt + completion)),), len(prompt), "plain")
    (sample,) = to_samples([row], tokenizer, None)
    assert sample.prompt == device_ids(tokenizer, prompt)
    answer = sample.ids[sample.prompt_tokens :]
    assert sample.labels == [IGNORED] * sample.prompt_tokens + answer and answer[-1] == 2
    whole = device_ids(tokenizer, prompt + completion)
    if whole[: sample.prompt_tokens] == sample.prompt and SPLIT not in split_remarks(row, tokenizer):
        assert sample.ids == [*whole, 2]
    if "<unk>" not in tokenizer.spell(whole) and tokenizer.spell([*whole]) == prompt + completion:
        assert tokenizer.spell(sample.ids[:-1]) == prompt + completion  # nothing doubled, nothing lost


def test_pieces_encoded_apart_would_be_other_tokens() -> None:
    """The fault that the tests above must catch: a space before every piece."""
    made, trainer = KINDS["prepend"]()
    trainer.show_progress = False
    made.train_from_iterator(texts(), trainer)
    apart = [*made.encode("Section:").ids, *made.encode(" libs").ids]
    assert made.encode("Section: libs").ids != apart


def test_a_space_before_an_answer_belongs_to_its_first_token_or_trains_not(tmp_path: Path) -> None:
    """ByteLevel's post-processor says that ' libs' covers 'libs' alone; the tokens of a row know better."""
    made, trainer = byte_level()
    trainer.show_progress = False
    made.train_from_iterator(texts(), trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    tokenizer = TextTokenizer(tmp_path)
    row = Row("Section: libs", ((9, 13),), 9, "plain")  # the space is the prompt's
    (sample,) = to_samples([row], tokenizer, None)
    assert sample.prompt == device_ids(tokenizer, "Section: ")
    assert tokenizer.spell(sample.ids[sample.prompt_tokens :]) == "libs</s>"
    assert split_remarks(row, tokenizer) == [SPLIT]


def test_an_answer_that_brings_its_end_token_gets_no_second_one(tokenizer: TextTokenizer) -> None:
    row = Row("Section:libs</s>", ((8, 16),), 8, "plain")
    (sample,) = to_samples([row], tokenizer, None)
    assert sample.ids.count(2) == 1 and sample.labels[-1] == 2


# in memory


def test_samples_take_eight_bytes_a_token() -> None:
    ids = list(range(1000, 5000))
    sample = Sample(ids, [IGNORED] * 1000 + ids[1000:], 1000)
    assert (sample.ids, sample.labels[:1001], len(sample)) == (ids, [IGNORED] * 1000 + [2000], 4000)
    assert sys.getsizeof(sample.packed_ids) + sys.getsizeof(sample.packed_labels) < 8 * len(ids) + 256
    text = Sample(ids, ids, 0)
    assert text.packed_labels is text.packed_ids and text.trained_tokens == len(ids) - 1
    assert sample == Sample(ids, [IGNORED] * 1000 + ids[1000:], 1000) != text


@pytest.mark.parametrize(
    ("labels", "trained"),
    [([], 0), ([IGNORED], 0), ([5], 0), ([5, 6], 1), ([IGNORED, 6, IGNORED, 8], 2), ([5, IGNORED, 7], 1)],
)
def test_trained_tokens_are_those_that_a_token_before_them_predicts(labels: list[int], trained: int) -> None:
    assert Sample([9] * len(labels), labels, 0).trained_tokens == trained
