"""What rows begin with is read once, and changes no score; a model that does not take it reads its rows whole."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import plan_of, save_model

from edgeft.data.beginning import MOST_TOKENS, shared_tokens
from edgeft.data.dataset import TextTokenizer, measure, read_samples
from edgeft.data.samples import IGNORED, Sample
from edgeft.data.scoring_groups import scoring
from edgeft.engine import streaming
from edgeft.exporting.row_logits import row_logits
from edgeft.models import beginning, streamed
from edgeft.models.beginning import NONE, read_beginning
from edgeft.models.checkpoint import load_plain
from edgeft.models.evaluate import by_length, score_group
from edgeft.models.parts import find_parts

CPU, FP32 = torch.device("cpu"), torch.float32
# Those that cannot go on from keys and values alone read their rows whole: other layers, or a cache of their own kind.
WHOLE = {"lfm2": {"layer_types": ["conv", "full_attention"]}, "mamba": {"state_size": 4}}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen3": {}, "gemma2": {"sliding_window": 8}, "gemma3_text": {"sliding_window": 8}, "phi3": {},
    "mistral": {"sliding_window": 8}, "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32}, "granite": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}, "gpt_neox": {}, "bloom": {"n_head": 4},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
}  # fmt: skip


def rows_of(count: int = 40, shared: int = 20, seed: int = 0) -> list[Sample]:
    """Rows of 26 to 44 tokens that begin alike, whose last ones train."""
    draw = random.Random(seed)
    start, rows = [draw.randrange(3, 500) for _ in range(shared)], list[Sample]()
    for number in range(count):
        asked = [3 + number, *(draw.randrange(3, 500) for _ in range(draw.randrange(3, 20)))]
        answer = [draw.randrange(3, 500) for _ in range(draw.randrange(1, 4))]
        ids = [*start, *asked, *answer]
        rows.append(Sample(ids, [IGNORED] * (shared + len(asked)) + answer, shared + len(asked)))
    return rows


def scored(model: Any, rows: list[Sample], shares: bool) -> tuple[list[float], list[list[int]], int]:
    """(losses, likeliest tokens, tokens of the beginning) of rows in order."""
    parts, found = find_parts(model), dict[int, tuple[float, list[int]]]()
    behind = read_beginning(model, parts, rows, CPU, FP32) if shares else NONE
    for group in by_length(rows, 256):
        nats, likely = score_group(model, parts, group, CPU, FP32, 64, behind=behind)
        found |= {id(row): both for row, *both in zip(group, nats, likely, strict=True)}  # type: ignore[misc]
    losses, likely = zip(*(found[id(row)] for row in rows), strict=True)
    return list(losses), list(likely), behind.tokens


@pytest.mark.parametrize("kind", FAMILIES)
def test_scores_behind_a_beginning_are_those_of_whole_rows(kind: str, tmp_path: Path) -> None:
    save_model(tmp_path, kind, **FAMILIES[kind])
    model, rows = load_plain(tmp_path), rows_of()
    whole, likely, _ = scored(model, rows, shares=False)
    behind, same, tokens = scored(model, rows, shares=True)
    assert tokens == 20, "it was not taken"
    assert behind == pytest.approx(whole, rel=1e-5) and same == likely


@pytest.mark.parametrize("kind", WHOLE)
def test_other_families_read_rows_whole(kind: str, tmp_path: Path) -> None:
    save_model(tmp_path, kind, **WHOLE[kind])
    model = load_plain(tmp_path)
    assert read_beginning(model, find_parts(model), rows_of(), CPU, FP32) == NONE


@pytest.mark.parametrize("costly", ["a proof's", "a run's"])
def test_where_each_pass_reads_all_layers_rows_are_read_whole(costly: str, tmp_path: Path) -> None:
    training = plan_of(save_model(tmp_path), range(2), stream_layers=True)
    model = streamed.load_streamed(tmp_path)
    if costly == "a run's":
        model = streaming.load_streamed(tmp_path, training, FP32, CPU)
    assert read_beginning(model, find_parts(model), rows_of(), CPU, FP32) == NONE


@pytest.mark.parametrize("fault", ["positions", "keys of another text", "an error"])
def test_a_model_that_says_other_things_behind_a_cache_reads_rows_whole(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path)
    model, kept = load_plain(tmp_path), beginning._keys_and_values

    def wrong(parts: Any, ids: torch.Tensor) -> Any:
        made = kept(parts, ids.flip(1) if fault == "keys of another text" else ids)
        for layer in made.layers if fault == "positions" else ():
            layer.get_seq_length = lambda: 0
        if fault == "an error":
            made.layers.pop()
        return made

    monkeypatch.setattr(beginning, "_keys_and_values", wrong)
    assert read_beginning(model, find_parts(model), rows_of(), CPU, FP32) == NONE


def test_a_proof_reads_the_same_logits_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path)
    model, rows = load_plain(tmp_path), rows_of()
    parts, read = find_parts(model), list[int]()
    parts.body.register_forward_pre_hook(lambda _, __, given: read.append(given["input_ids"].numel()), with_kwargs=True)
    behind = {row: (logits, targets) for row, logits, targets in row_logits(model, parts, rows, FP32, 256)}
    tokens = [sum(read), read.clear()][0]
    monkeypatch.setattr("edgeft.exporting.row_logits.read_beginning", lambda *_: NONE)
    whole = {row: (logits, targets) for row, logits, targets in row_logits(model, parts, rows, FP32, 256)}
    assert behind.keys() == whole.keys() == set(range(len(rows)))
    for row, (logits, targets) in whole.items():
        assert torch.equal(targets, behind[row][1])
        assert torch.allclose(logits, behind[row][0], atol=1e-5)
    assert tokens < 0.75 * sum(read)  # 20 of some 33 a row, less what looking at it takes
    planned = scoring([[row.size._replace(begun=shared_tokens(rows)) for row in rows]], 256)
    looking = 2 * max(map(len, rows)) - 20  # the longest row whole, and behind it once more
    assert planned.tokens == sum(read) and planned.tokens - planned.saved_tokens + looking == tokens


def test_a_plan_counts_what_rows_begin_with_once(checkpoint_folder: Path, tmp_path: Path, write_rows: Any) -> None:
    """Unless a row is cut, whose beginning goes first, or nothing is saved by it."""
    rows = [{"prompt": "The same words stand before each question here. " * 2 + word * 3, "completion": word}
            for word in ("one ", "two ", "three ", "four ") * 8]  # fmt: skip
    tokenizer = TextTokenizer(checkpoint_folder)
    found = measure(str(write_rows("rows.jsonl", rows)), tokenizer)
    [begun] = {size.begun for size in found.sizes}
    samples = read_samples(str(tmp_path / "rows.jsonl"), tokenizer, None)
    assert begun == shared_tokens(samples) > 8
    assert scoring([found.sizes], 256).saved_tokens == begun * 31
    cut = [size.cut(max(each.tokens for each in found.sizes) - 1) for size in found.sizes]
    assert scoring([cut], 256).saved_tokens == 0 and scoring([found.sizes[:3]], 256).saved_tokens == 0


def test_what_rows_share_ends_before_what_an_answer_is_predicted_from() -> None:
    rows = rows_of()
    assert shared_tokens(rows) == 20
    assert shared_tokens([*rows, Sample([1, *rows[0].ids], [IGNORED, *rows[0].labels], 21)]) == 0
    assert shared_tokens(rows[:5]) == 0, "not worth reading a row twice"
    ids = list(range(3, 40))
    trained = [Sample([*ids, last], [IGNORED] * 15 + [*ids[15:], last], 15) for last in range(60, 99)]
    assert shared_tokens(trained) == 14  # the 15th token predicts the first one that trains
    every = [Sample([*ids, last], [*ids, last], 0) for last in range(60, 99)]
    assert shared_tokens(every) == 0
    assert shared_tokens(rows_of(shared=400)) == MOST_TOKENS
