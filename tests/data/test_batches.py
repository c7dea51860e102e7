"""Does every sample come once per epoch, in an order that needs no state, and does no sample see another?"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from edgeft.data.batches import GROUP_STEPS, epoch_order, make_batch, micro_batches, steps_per_epoch
from edgeft.data.dataset import IGNORED, Sample
from edgeft.models.checkpoint import load_plain
from edgeft.models.parts import find_parts


def samples_of(lengths: list[int], words: int = 300, seed: int = 0) -> list[Sample]:
    """Random samples whose first half is prompt."""
    generator = random.Random(seed)
    made = []
    for length in lengths:
        ids = [generator.randrange(4, words) for _ in range(length)]
        made.append(Sample(ids, [IGNORED] * (length // 2) + ids[length // 2 :], length // 2))
    return made


# order


@pytest.mark.parametrize("epoch", [0, 1, 7])
@pytest.mark.parametrize(
    ("rows", "batch_size"), [(1, 1), (1, 16), (15, 16), (16, 16), (17, 16), (500, 16), (803, 4), (1601, 32)]
)
def test_every_sample_comes_exactly_once_per_epoch(rows: int, batch_size: int, epoch: int) -> None:
    lengths = [random.Random(i).randrange(1, 200) for i in range(rows)]
    steps = epoch_order(lengths, batch_size, seed=5, epoch=epoch)
    assert sorted(index for step in steps for index in step) == list(range(rows))
    assert len(steps) == steps_per_epoch(rows, batch_size) == (rows + batch_size - 1) // batch_size
    assert sorted(map(len, steps))[1:] == [batch_size] * (len(steps) - 1)  # at most one is incomplete


def test_the_order_is_a_pure_function_of_seed_and_epoch() -> None:
    lengths = [i % 37 + 1 for i in range(400)]
    first = epoch_order(lengths, 8, seed=1, epoch=2)
    random.seed(99)  # the global generator plays no part
    torch.manual_seed(99)
    assert epoch_order(lengths, 8, seed=1, epoch=2) == first
    others = [epoch_order(lengths, 8, seed, epoch) for seed, epoch in [(1, 3), (2, 2), (1, 0), (12, 2)]]
    assert all(other != first for other in others)
    assert epoch_order(lengths, 8, seed=1, epoch=12) != epoch_order(lengths, 8, seed=11, epoch=2)
    assert {tuple(sorted(step)) for step in others[0]} != {tuple(sorted(step)) for step in first}


@pytest.mark.parametrize("rows", [5, 16, 100, 500, 2000])
@pytest.mark.parametrize("seed", range(3))
def test_the_second_step_holds_the_longest_sample(rows: int, seed: int) -> None:
    """And it is a whole one where there are enough rows: memory runs out at once or never, beside optimizer states."""
    batch_size = 16
    lengths = [random.Random(f"{seed} {i}").randrange(1, 1000) for i in range(rows)]
    steps = epoch_order(lengths, batch_size, seed, epoch=0)
    first = steps[min(1, len(steps) - 1)]
    assert max(lengths[i] for i in first) == max(lengths)
    if rows <= batch_size * GROUP_STEPS:
        assert len(first) == min(rows, batch_size)
        assert sorted(lengths[i] for i in first) == sorted(lengths)[-len(first) :]


def test_samples_of_like_length_share_a_step() -> None:
    lengths = [random.Random(i).randrange(10, 500) for i in range(3000)]
    shuffled = random.Random(0).sample(range(3000), 3000)
    plain = [shuffled[i : i + 8] for i in range(0, 3000, 8)]

    def padded(steps: list[list[int]]) -> float:
        return sum(len(step) * max(lengths[i] for i in step) for step in steps) / sum(lengths)

    assert padded(epoch_order(lengths, 8, 0, 1)) < 1.05 < 1.5 < padded(plain)


# batches


def test_padding_positions_and_targets() -> None:
    samples = [
        Sample([11, 12, 13], [IGNORED, IGNORED, 13], 2),
        Sample([21, 22, 23, 24, 25], [IGNORED, 22, 23, IGNORED, 25], 4),
        Sample([31], [31], 0),
    ]
    batch = make_batch(samples)
    assert batch.ids.tolist() == [[11, 12, 13, 0, 0], [21, 22, 23, 24, 25], [31, 0, 0, 0, 0]]
    assert batch.positions.tolist() == [1, 5, 6, 8]
    assert batch.targets.tolist() == [13, 22, 23, 25]
    assert batch.ids.dtype == batch.positions.dtype == batch.targets.dtype == torch.long
    moved = batch.to(torch.device("meta"))
    assert {moved.ids.device.type, moved.positions.device.type, moved.targets.device.type} == {"meta"}


@pytest.mark.parametrize("lengths", [[1], [7], [3, 9, 1, 30, 8], [5, 5, 5]])
def test_targets_are_the_next_tokens_that_are_trained(lengths: list[int]) -> None:
    samples = samples_of(lengths)
    batch = make_batch(samples)
    assert batch.ids.shape == (len(lengths), max(lengths))
    assert torch.equal(batch.ids.view(-1)[batch.positions + 1], batch.targets)
    assert len(batch.targets) == sum(sample.trained_tokens for sample in samples)
    expected = [label for sample in samples for label in sample.labels[1:] if label != IGNORED]
    assert batch.targets.tolist() == expected


@pytest.fixture(scope="module")
def model(checkpoint_folder: Path) -> Any:
    return load_plain(checkpoint_folder)


def losses(model: Any, samples: list[Sample], padding: int = 0) -> torch.Tensor:
    """Losses of each trained token of `samples` as one batch, with `padding` as the id of padding."""
    batch, parts = make_batch(samples), find_parts(model)
    ids = batch.ids.clone()
    for row, sample in enumerate(samples):
        ids[row, len(sample.ids) :] = padding
    with torch.no_grad():
        hidden = parts.body(input_ids=ids, use_cache=False).last_hidden_state
        logits = parts.head(hidden.reshape(-1, hidden.shape[-1])[batch.positions])
    return cross_entropy(logits.double(), batch.targets, reduction="none")


@pytest.mark.parametrize("lengths", [[4, 40, 17, 2], [25, 25], [1, 9]])
def test_no_sample_sees_another(lengths: list[int], model: Any) -> None:
    samples = samples_of(lengths)
    together = losses(model, samples)
    alone = torch.cat([losses(model, [sample]) for sample in samples])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert len(together) == sum(sample.trained_tokens for sample in samples) > 0
    exchanged = [samples[0], *samples_of(lengths[1:], seed=1)]  # other neighbours, the same first sample
    count = samples[0].trained_tokens
    torch.testing.assert_close(losses(model, exchanged)[:count], together[:count], rtol=1e-5, atol=1e-6)


def test_what_stands_in_the_padding_does_not_matter(model: Any) -> None:
    samples = samples_of([4, 40, 17])
    assert torch.equal(losses(model, samples, padding=0), losses(model, samples, padding=77))


def test_single_samples_give_transformers_own_loss(model: Any) -> None:
    (sample,) = samples_of([30])
    with torch.no_grad():
        own = model(input_ids=torch.tensor([sample.ids]), labels=torch.tensor([sample.labels])).loss
    assert float(losses(model, [sample]).mean()) == pytest.approx(float(own), rel=1e-5)


# micro-batches


@pytest.mark.parametrize("size", [1, 2, 3, 16])
@pytest.mark.parametrize("seed", range(5))
def test_short_samples_fill_a_micro_batch_up_to_the_planned_tokens(size: int, seed: int) -> None:
    draw = random.Random(seed)
    samples = samples_of([draw.randint(2, 200) for _ in range(16)], seed=seed)
    tokens, trained = size * 200, size * draw.randint(100, 120)
    groups = list(micro_batches(samples, size, tokens, trained))
    assert sorted(id(sample) for group in groups for sample in group) == sorted(map(id, samples))
    widths = [[len(sample.ids) for sample in group] for group in groups]
    assert [width for group in widths for width in group] == sorted((len(s.ids) for s in samples), reverse=True)
    for group, width in zip(groups, widths, strict=True):
        assert max(width) * len(width) <= tokens
        assert len(group) == size or sum(sample.trained_tokens for sample in group) <= trained
    for group, width, following in zip(groups, widths, groups[1:], strict=False):  # none could have taken one more
        padded = max(width) * (len(width) + 1)
        both = sum(sample.trained_tokens for sample in group) + following[0].trained_tokens
        assert len(group) >= size and (padded > tokens or both > trained)


def test_equally_long_samples_come_by_the_planned_number() -> None:
    groups = micro_batches(samples_of([48] * 9), 2, 96, 48)
    assert [len(group) for group in groups] == [2, 2, 2, 2, 1]
