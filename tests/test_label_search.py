"""Is the label that run.py answers with the most probable one, with its right probability, in few passes?"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from label_trees import END, PROMPT, WORDS, Session, brute_force, random_labels, run, runner_of


def shares(scores: np.ndarray, temperature: float) -> np.ndarray:
    weights = np.exp((scores - scores.max()) / temperature)
    return weights / weights.sum()


def test_best_first_is_brute_force_on_a_thousand_random_trees() -> None:
    passes = nodes = 0
    for seed in range(1000):
        random = np.random.default_rng(seed)
        labels, session = random_labels(random), Session(seed, float(random.uniform(0.1, 6)))
        expected = brute_force(session, labels)
        found = runner_of(session, labels).choose(PROMPT)
        score, best = found.found[0]
        assert best == int(expected.argmax()) and score == pytest.approx(expected.max())
        passes, nodes = passes + found.passes, nodes + len(labels.children) - 1
    assert passes < nodes / 2


def test_probabilities_lie_where_the_search_says_and_sum_to_one() -> None:
    for seed in range(200):
        random = np.random.default_rng(seed)
        temperature = float(random.choice([0.3, 1.0, 2.5]))
        labels, session = random_labels(random), Session(seed, float(random.uniform(0.1, 6)))
        expected = shares(brute_force(session, labels), temperature)
        some = runner_of(session, labels, temperature).choose(PROMPT, lambda search: search.decided(2))
        for place, (_, number) in enumerate(some.found[:2]):
            least, most = some.probability(place)
            assert least - 1e-9 <= expected[number] <= most + 1e-9
        exact = runner_of(session, labels, temperature).choose(PROMPT, lambda search: search.known_within(0.01))
        assert exact.probability(0)[0] == pytest.approx(expected.max(), abs=0.0101)
        whole = runner_of(session, labels, temperature).choose(PROMPT, lambda search: False)
        every = [whole.probability(place) for place in range(len(whole.found))]
        assert all(least == most for least, most in every)
        assert sum(least for least, _ in every) == pytest.approx(1.0)


def test_a_search_that_stops_too_early_is_caught() -> None:
    """The fault that brute force has to find: the first whole label is taken, whatever open prefixes may still have."""
    wrong = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        labels, session = random_labels(random), Session(seed, float(random.uniform(0.1, 6)))
        early = runner_of(session, labels).choose(PROMPT, lambda search: bool(search.found))
        wrong += early.found[0][1] != int(brute_force(session, labels).argmax())
    assert wrong > 10


class Told(Session):
    """Logits by what was read behind the prompt; tokens that are not named get none to speak of."""

    def __init__(self, table: dict[tuple[int, ...], dict[int, float]]) -> None:
        super().__init__(0, 1.0)
        self.table = table

    def logits(self, ids: tuple[int, ...]) -> Any:
        made = np.full(WORDS, -30.0)
        for token, share in self.table[ids[len(PROMPT) :]].items():
            made[token] = math.log(share)
        return made


@pytest.mark.parametrize(("end", "best"), [(0.9, "lib"), (0.2, "libdevel")])
def test_the_end_decides_between_a_label_and_one_that_begins_with_it(end: float, best: str) -> None:
    labels = run.Labels(["lib", "libdevel", "doc"], [[1, END], [1, 2, END], [3, END]])
    session = Told({(): {1: 0.9, 3: 0.1}, (1,): {END: end, 2: 1 - end}, (1, 2): {END: 1.0}, (3,): {END: 1.0}})
    found = runner_of(session, labels).choose(PROMPT, lambda search: False)
    assert labels.texts[found.found[0][1]] == best
    assert found.probability(0)[0] == pytest.approx(0.9 * max(end, 1 - end), abs=1e-6)


def test_the_prompt_is_read_once_and_common_beginnings_too() -> None:
    labels = run.Labels(["a", "b", "c"], [[1, 2, 3, END], [1, 2, 4, END], [5, END]])
    table = {(): {1: 0.9, 5: 0.1}, (1,): {2: 1.0}, (1, 2): {3: 0.6, 4: 0.4}, (1, 2, 3): {END: 1.0}}
    session = Told({**table, (1, 2, 4): {END: 1.0}, (5,): {END: 1.0}})
    found = runner_of(session, labels).choose(PROMPT, lambda search: False)
    assert found.passes == 5 and session.read == len(PROMPT) + 5


def test_a_prompt_that_leaves_no_room_for_the_longest_label_is_refused() -> None:
    labels = run.Labels(["a", "b"], [[1, 2, 3, END], [5, END]])
    assert runner_of(Session(0, 1.0), labels, context=6).choose(PROMPT).found
    with pytest.raises(run.RunError, match="do not fit the context of 5 tokens"):
        runner_of(Session(0, 1.0), labels, context=5).choose(PROMPT)


@pytest.mark.parametrize(
    "paths",
    [
        [[1, 0]],
        [[1, 0], [1, 0]],
        [[1, 0], [2]],
        [[1, 0], [0, 2, 0]],
        [[1, 0], []],
        [[1, 0], [-2, 0]],
        [[1, 0], ["2", 0]],
    ],
)
def test_a_file_of_labels_that_nobody_exports_is_refused(paths: Any, tmp_path: Path) -> None:
    entries = [{"text": str(number), "ids": ids} for number, ids in enumerate(paths)]
    (tmp_path / "labels.json").write_text(json.dumps({"labels": entries}))
    with pytest.raises(run.NotAsExported, match=r"labels\.json: holds no labels that can be told apart"):
        run.Labels.read(tmp_path, "labels.json", [0])


@pytest.mark.parametrize("text", ["{}", '{"labels": 3}', '{"labels": [{"text": "a"}]}', "[]"])
def test_a_file_that_holds_no_labels_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(run.RunError, match="cannot be read"):
        run.Labels.read(tmp_path, "labels.json", [0])


class Remembers:
    """A graph whose cache is the tokens themselves, and whose logits say what it has read: every token, in order."""

    def run_with_ort_values(self, outputs: list[str], feeds: dict[str, Any]) -> list[Any]:
        import onnxruntime

        past = feeds["past_key_values.0.key"].numpy()
        new = feeds["input_ids"].numpy()[0].astype(np.float32)[None, None, :, None]
        cache = np.concatenate([past, new], axis=2)
        assert feeds["position_ids"].numpy()[0, -1] == cache.shape[2] - 1 == feeds["attention_mask"].shape()[1] - 1
        logits = np.zeros((1, new.shape[2], 20), dtype=np.float32)
        logits[0, -1, : cache.shape[2]] = cache[0, 0, :, 0]
        return [onnxruntime.OrtValue.ortvalue_from_numpy(each) for each in (logits, cache)]


def test_portable_sessions_forget_what_was_rewound() -> None:
    import onnxruntime

    shapes = {"input_ids": None, "attention_mask": None, "position_ids": None, "past_key_values.0.key": (1, 1, 0, 1)}
    inputs = {name: SimpleNamespace(shape=shape) for name, shape in shapes.items()}
    engine = SimpleNamespace(
        inputs=inputs, outputs=["logits", "present.0.key"], ort=onnxruntime, model=Remembers(), before=0, given={},
        past={"past_key_values.0.key": np.zeros((1, 1, 0, 1), dtype=np.float32)},
    )  # fmt: skip
    session = run.OnnxRuntimeSession(engine)
    session.append([5, 6, 7])
    session.append([8, 9])
    session.rewind(3)
    assert session.append([4])[:5].tolist() == [5, 6, 7, 4, 0]
    session.rewind(1)
    assert session.append([2, 3])[:4].tolist() == [5, 2, 3, 0]


@pytest.mark.parametrize("able", [True, False])
def test_llama_sessions_forget_what_was_rewound_or_say_that_they_cannot(able: bool) -> None:
    asked = []

    def remove(memory: object, sequence: int, first: int, last: int) -> bool:
        asked.append((memory, sequence, first, last))
        return able

    session = object.__new__(run.LlamaSession)
    session.api = SimpleNamespace(llama_get_memory=lambda context: f"of {context}", llama_memory_seq_rm=remove)
    session.context, session.done = None, 9
    if able:
        session.rewind(4)
        assert session.done == 4
    else:
        with pytest.raises(run.RunError, match="cannot forget the last tokens of this model"):
            session.rewind(4)
    assert asked == [("of None", 0, 4, -1)]
