"""Does one pass tell which greedy answers are exact, and does nothing but the model decide what is greedy?"""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from edgeft.data.dataset import IGNORED, Sample, TextTokenizer
from edgeft.data.scoring_groups import MAX_ANSWER_TOKENS
from edgeft.models import evaluate as module
from edgeft.models.checkpoint import load_plain
from edgeft.models.evaluate import (
    answer_tokens,
    asked_for,
    by_answer,
    evaluate,
    greedy,
    is_exact,
    judge,
    score_group,
    token_losses,
)
from edgeft.models.parts import find_parts

CPU = torch.device("cpu")
STOPS = [0, 2]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> TextTokenizer:
    made = TextTokenizer(tokenizer_folder)
    assert made.stop_ids == STOPS
    return made


@pytest.fixture(scope="module")
def model(checkpoint_folder: Path) -> Any:
    return load_plain(checkpoint_folder)


def asked(prompt: list[int], answer: list[int]) -> Sample:
    return Sample([*prompt, *answer], [IGNORED] * len(prompt) + answer, len(prompt))


def argmax_of(model: Any, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens one by one, each from a pass over the whole text: no cache, no padding, no settings."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


# greedy


HIDDEN = {
    "repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 2, "min_length": 40,
    "min_new_tokens": 20, "suppress_tokens": list(range(100, 200)), "begin_suppress_tokens": list(range(4, 100)),
    "bad_words_ids": [[n] for n in range(200, 260)], "forced_bos_token_id": 7, "forced_eos_token_id": 9,
    "sequence_bias": [[[11], 50.0]], "exponential_decay_length_penalty": [1, 3.0], "max_length": 30,
    "do_sample": True, "temperature": 5.0, "top_k": 3, "top_p": 0.5, "min_p": 0.2, "typical_p": 0.3, "num_beams": 3,
    "num_return_sequences": 3, "length_penalty": 2.0, "guidance_scale": 2.0, "stop_strings": ["e"],
    "renormalize_logits": True, "diversity_penalty": 1.0, "num_beam_groups": 3, "watermarking_config": None,
    "eos_token_id": [5], "pad_token_id": 3, "bos_token_id": 6, "use_cache": False, "max_time": 0.0001,
    "prompt_lookup_num_tokens": 3, "remove_invalid_values": True, "output_scores": True,
    "return_dict_in_generate": True, "cache_implementation": "static",
}  # fmt: skip


@pytest.mark.parametrize("hidden", [{}, HIDDEN, *({key: value} for key, value in HIDDEN.items())], ids=str)
def test_no_setting_of_the_checkpoint_takes_part(hidden: dict[str, Any], model: Any) -> None:
    prompts = [[40, 41, 42], [50, 51, 52, 53, 54], [60]]
    expected = [argmax_of(model, prompt, 8) for prompt in prompts]
    own = model.generation_config
    settings = type(own)()
    for key, value in hidden.items():
        setattr(settings, key, value)
    model.generation_config = settings
    try:
        assert greedy(model, prompts, [399], 8, CPU) == expected
        assert model.generation_config is settings
    finally:
        model.generation_config = own


def test_a_setting_that_did_leak_would_be_seen(model: Any) -> None:
    """The planted fault: transformers fills a configuration's open fields from the model's own."""
    from transformers import GenerationConfig

    prompt, own = [40, 41, 42], model.generation_config
    free = argmax_of(model, prompt, 4)
    model.generation_config = GenerationConfig(suppress_tokens=free[:1])
    try:
        given = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=[399], pad_token_id=0)
        made = model.generate(torch.tensor([prompt]), generation_config=given)[0, 3:].tolist()
        assert made[0] != free[0] and greedy(model, [prompt], [399], 4, CPU) == [free]
    finally:
        model.generation_config = own


@pytest.mark.parametrize("prompts", [[[40, 41, 42]], [[40, 41, 42], [50, 51, 52, 53, 54]]], ids=["one", "two"])
def test_the_head_is_copied_for_no_row_of_a_prompt(prompts: list[list[int]], model: Any) -> None:
    """In half precision a CPU copies a matrix for each product with states that have not the strides of rows."""
    given, plain = list[bool](), list[bool]()

    def in_rows(states: torch.Tensor) -> bool:
        return states.stride() == torch.empty(states.shape).stride()

    head = find_parts(model).head
    before = head.register_forward_pre_hook(lambda _, states: plain.append(in_rows(states[0])))
    after = head.register_forward_hook(lambda _, states, __: given.append(in_rows(states[0])))
    greedy(model, prompts, [399], 3, CPU)
    before.remove()
    after.remove()
    assert not plain[0] and all(given) and len(given) == 3
    assert not head._forward_pre_hooks


def test_generation_ends_when_every_row_has_stopped(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[40, 41, 42], [50, 51, 52, 53, 54]]
    free = [argmax_of(model, prompt, 12) for prompt in prompts]
    stops = [free[0][2], free[1][4]]
    passes = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **named: passes.append(1) or forward(*args, **named))
    made = greedy(model, prompts, stops, 200, CPU)
    ends = [next(i for i, token in enumerate(row) if token in stops) for row in free]
    assert made == [row[:end] for row, end in zip(free, ends, strict=True)]
    assert len(passes) == max(ends) + 1


# exact match


def variants(model: Any, tokenizer: TextTokenizer) -> list[Sample]:
    """Rows whose answers are greedy ones, and nearly so: other spellings, white space, ends, wrong tokens."""
    draw = random.Random(0)
    space, end = tokenizer.encode([" "])[0], [2]
    rows = []
    for _ in range(12):
        prompt = [draw.randrange(4, 396) for _ in range(draw.randint(2, 9))]
        free = argmax_of(model, prompt, 6)
        for answer in (
            [*free[:4]], [*free[:4], *end], [*free[:3], free[3] ^ 1, *end], [*space, *free[:3], *end],
            [*tokenizer.encode([tokenizer.decode(free[:4])])[0]], [*free[:4], *space],
        ):  # fmt: skip
            rows.append(asked(prompt, answer))
    return rows


def test_one_pass_gives_the_verdict_of_generation(model: Any, tokenizer: TextTokenizer) -> None:
    rows = variants(model, tokenizer)
    exact = [is_exact(tokenizer, row, greedy(model, [row.prompt], STOPS, answer_tokens([row]), CPU)[0]) for row in rows]
    assert 5 < sum(exact) < len(rows) - 5
    _, likely = score_group(model, find_parts(model), rows, CPU, torch.float32, 7)
    judged = [judge(tokenizer, *pair) for pair in zip(rows, likely, strict=True)]
    assert all(verdict in (None, said) for verdict, said in zip(judged, exact, strict=True))
    assert judged.count(None) < len(rows) / 2
    metrics = evaluate(model, find_parts(model), rows, tokenizer, device=CPU, group_tokens=200)
    assert metrics.exact_match == sum(exact) / len(rows)


def test_nothing_is_generated_where_the_pass_decides(
    model: Any, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = [40, 41, 42]
    free = argmax_of(model, prompt, 4)
    other = tokenizer.encode(["zebra"])[0]
    assert tokenizer.spell(free[:1]).strip() != "zebra"
    monkeypatch.setattr(module, "greedy", lambda *_: pytest.fail("generated"))
    rows = [asked(prompt, free), asked(prompt, [*other, 0])]
    assert evaluate(model, find_parts(model), rows, tokenizer, device=CPU).exact_match == 0.5


def test_the_loss_of_a_scored_group_is_that_of_training(model: Any, tokenizer: TextTokenizer) -> None:
    rows, parts = variants(model, tokenizer)[:9], find_parts(model)
    with torch.no_grad():
        expected = float(token_losses(model, parts, rows, CPU, torch.float32, 16))
    for chunk in (1, 5, 1000):
        losses, _ = score_group(model, parts, rows, CPU, torch.float32, chunk)
        assert len(losses) == len(rows) and math.fsum(losses) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("wanted", "given", "exact"),
    [
        (" utils", " utils", True), (" utils", "utils ", True), (" utils\n", " utils", True),
        (" utils", " util", False),
        (" ", "\n", False), (" ", " ", True), ("<|im_start|>", "<|pad|>", False), ("<|im_start|>", "", False),
        ("<|im_start|>", "<|im_start|>", True), ("<|pad|>a", "<|im_start|>a", False), ("a", "a<|endoftext|>b", True),
        ("a<|im_end|>\n", "a", True), ("a", "a<|pad|>", False),
    ],
)  # fmt: skip
def test_what_is_exact(wanted: str, given: str, exact: bool, tokenizer: TextTokenizer) -> None:
    answer = tokenizer.encode([wanted])[0]
    row = asked([40], answer if 2 in answer else [*answer, 0])
    assert is_exact(tokenizer, row, tokenizer.encode([given])[0]) is exact


def test_an_answer_that_stops_at_the_templates_closing_token_is_right(model: Any, tokenizer: TextTokenizer) -> None:
    """Its token is no end token of the checkpoint: a base model with a chat template."""
    prompt = [40, 41, 42]
    free = argmax_of(model, prompt, 3)
    saved = model.lm_head.weight.detach().clone()
    with torch.no_grad():  # from the third token on the model says <|im_end|>
        *before, last = model.model(input_ids=torch.tensor([prompt + free[:2]])).last_hidden_state[0, -3:]
        basis = torch.linalg.qr(torch.stack(before).T).Q
        apart = last - basis @ (basis.T @ last)
        model.lm_head.weight[2] = 100 * apart / (apart @ last)
    try:
        row = asked(prompt, [*free[:2], 2, 202])
        assert tokenizer.eos_ids == [0] and argmax_of(model, prompt, 3)[2] == 2
        found = evaluate(model, find_parts(model), [row], tokenizer, device=CPU)
        assert found.exact_match == 1.0
    finally:
        with torch.no_grad():
            model.lm_head.weight.copy_(saved)


def test_a_long_answer_is_compared_on_its_first_tokens_and_counted(tokenizer: TextTokenizer) -> None:
    gold = [10 + i % 300 for i in range(MAX_ANSWER_TOKENS + 40)]
    row = asked([40], [*gold, 0])
    assert asked_for(row, STOPS) == (gold[:MAX_ANSWER_TOKENS], False)
    assert is_exact(tokenizer, row, gold[: answer_tokens([row])])
    assert not is_exact(tokenizer, row, [*gold[: MAX_ANSWER_TOKENS - 1], 9])
    assert judge(tokenizer, row, [*gold, 0]) is True
    short = asked([40], [*gold[: MAX_ANSWER_TOKENS - 1], 0])
    assert asked_for(short, STOPS) == (gold[: MAX_ANSWER_TOKENS - 1], True)
    found = module.metrics([row, short, asked([40], [11, 0])], tokenizer, [1.0, 2.0, 3.0], [True, True, False])
    assert (found.long_answers, found.exact_match) == (1, 2 / 3)


def test_an_answer_cut_by_max_length_is_asked_for_as_far_as_it_goes(tokenizer: TextTokenizer) -> None:
    row = asked([40], [11, 12, 13])  # without an end: cut
    assert is_exact(tokenizer, row, [11, 12, 13, 14]) and not is_exact(tokenizer, row, [11, 12])
    nothing = Sample([40, 41], [IGNORED, IGNORED], 2)
    assert not is_exact(tokenizer, nothing, []) and judge(tokenizer, nothing, []) is False


# groups


@pytest.mark.parametrize("tokens", [50, 300, 1024])
def test_groups_of_answers_hold_prompt_and_new_tokens(tokens: int) -> None:
    draw = random.Random(tokens)
    rows = [asked([9] * draw.randint(1, 60), [8] * draw.randint(1, 12)) for _ in range(60)] + [
        asked([9] * 30, [8] * 250)
    ]
    groups = list(by_answer(rows, tokens))
    assert sorted(id(row) for group in groups for row in group) == sorted(map(id, rows))
    for group in groups:
        width = max(row.prompt_tokens for row in group) + answer_tokens(group) + 1
        assert len(group) == 1 or width * len(group) <= tokens
    assert next(group for group in groups if rows[-1] in group) == [rows[-1]] or tokens == 1024
    assert list(by_answer([], tokens)) == []


def test_a_penalty_in_a_checkpoints_folder_changes_no_answer(checkpoint_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "penalised"
    shutil.copytree(checkpoint_folder, folder)
    held = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(held | {"repetition_penalty": 1.7}))
    penalised = load_plain(folder)
    assert penalised.generation_config.repetition_penalty == 1.7
    assert greedy(penalised, [[40, 41, 42]], [399], 8, CPU) == [argmax_of(penalised, [40, 41, 42], 8)]
