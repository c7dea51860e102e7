"""How does lm-eval ask one form of a model? Its tasks, in PyTorch for a checkpoint, by run.py for a bundle."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy

from edgeft.data.tokenizer import TextTokenizer
from edgeft.errors import BadInput
from edgeft.exporting.result import TaskScore
from edgeft.models.evaluate import cut_at

MOST_NEW_TOKENS = 256  # of an answer, where a task sets no bound


class Form(Protocol):
    """What lm-eval's three kinds of requests come down to."""

    @property
    def context_tokens(self) -> int: ...
    def logits(self, ids: list[int], first: int = 0) -> Any: ...
    def greedy(self, ids: list[int], max_new_tokens: int, eos_ids: Sequence[int]) -> list[int]: ...


class InTorch:
    """A checkpoint's model as such a form."""

    def __init__(self, model: Any) -> None:
        import torch

        self.model, self.torch = model, torch
        self.context_tokens = int(model.config.get_text_config(decoder=True).max_position_embeddings)

    def logits(self, ids: list[int], first: int = 0) -> Any:
        """Logits after each token from `first` on."""
        with self.torch.no_grad():
            return self.model(self.torch.tensor([ids]), use_cache=False).logits[0, first:].float().numpy()

    def greedy(self, ids: list[int], max_new_tokens: int, eos_ids: Sequence[int]) -> list[int]:
        """The likeliest continuation, cut before its first end token."""
        from edgeft.models.evaluate import greedy

        [made] = greedy(self.model, [ids], eos_ids, max_new_tokens, self.torch.device("cpu"))
        return made


def scored(form: Form, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """(log-probability of the continuation in nats, whether it is the greedy one). A long context loses its start."""
    room = form.context_tokens - len(continuation)
    if room < 1:
        raise BadInput("lm-eval", f"a continuation of {len(continuation)} tokens is longer than the context")
    ids = [*context[-room:], *continuation]
    first = len(ids) - len(continuation) - 1
    rows = numpy.asarray(form.logits(ids[:-1], first), dtype=numpy.float64)
    highest = rows.max(axis=-1, keepdims=True)
    norms = numpy.log(numpy.exp(rows - highest).sum(axis=-1)) + highest[:, 0]
    chosen = rows[numpy.arange(len(continuation)), list(continuation)]
    return float((chosen - norms).sum()), bool((rows.argmax(axis=-1) == list(continuation)).all())


def harness_model(form: Form, tokenizer: TextTokenizer, told: Callable[[int, int], None]) -> Any:
    """An lm_eval.api.model.LM that asks `form`; texts begin with what the tokenizer puts before every text."""
    from lm_eval.api.model import LM

    class Asked(LM):  # type: ignore[misc]
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return self._each(
                requests, lambda context, continuation: scored(form, *split(tokenizer, context, continuation))
            )

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            return self._each(requests, self._rolling)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return self._each(requests, self._written)

        def _each(self, requests: list[Any], answer: Callable[..., Any]) -> list[Any]:
            made = []
            for number, request in enumerate(requests):
                made.append(answer(*request.args))
                told(number + 1, len(requests))
            return made

        def _rolling(self, text: str) -> float:
            ids, most = tokenizer.encode([text])[0], form.context_tokens - 1
            parts = [ids[start : start + most] for start in range(0, len(ids), most)]
            return sum(scored(form, begin(tokenizer), part)[0] for part in parts)

        def _written(self, context: str, settings: dict[str, Any]) -> str:
            if settings.get("do_sample") or settings.get("temperature", 0.0) not in (0, 0.0):
                raise BadInput("lm-eval", "a task asks for sampled answers", "choose tasks with greedy answers")
            most = int(settings.get("max_gen_toks", MOST_NEW_TOKENS))
            ids = [*tokenizer.prefix_ids, *tokenizer.encode([context])[0]][-max(1, form.context_tokens - most) :]
            text = tokenizer.decode(cut_at(form.greedy(ids, most, tokenizer.stop_ids), tokenizer.stop_ids))
            until = settings.get("until") or []
            ends = [text.find(stop) for stop in ([until] if isinstance(until, str) else until) if stop and stop in text]
            return text[: min(ends, default=len(text))]

    return Asked()


def begin(tokenizer: TextTokenizer) -> list[int]:
    """What stands before the first token of a text, whose probability needs something before it."""
    return tokenizer.prefix_ids or [tokenizer.eos_id]


def split(tokenizer: TextTokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """(ids of a context, ids of what follows), of the whole text: white space at the border belongs to what follows."""
    kept = context.rstrip()
    continuation, context = context[len(kept) :] + continuation, kept
    if not context:
        return begin(tokenizer), tokenizer.encode([continuation])[0]
    alone, whole = tokenizer.encode([context, context + continuation])
    return [*tokenizer.prefix_ids, *whole[: len(alone)]], whole[len(alone) :]


def run_tasks(
    form: Form, tokenizer: TextTokenizer, tasks: Sequence[str], *, folder: Path | None, limit: int | None,
    told: Callable[[int, int], None],
) -> tuple[TaskScore, ...]:  # fmt: skip
    """lm-eval's numbers for one form. `folder` holds tasks of the user's own. Raises BadInput for unknown tasks."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder) if folder else None)
    if unknown := [name for name in tasks if not manager.match_tasks([name])]:
        raise BadInput(
            "--tasks", f"lm-eval knows no {', '.join(unknown)}", "lm-eval ls tasks; --task-folder for your own"
        )
    found = lm_eval.simple_evaluate(
        model=harness_model(form, tokenizer, told), tasks=list(tasks), task_manager=manager, limit=limit,
        bootstrap_iters=1000, log_samples=False, verbosity="ERROR",
    )  # fmt: skip
    return tuple(
        score for task, numbers in found["results"].items()
        for score in _scores(task, numbers, found["n-samples"].get(task, {}).get("effective", 0))
    )  # fmt: skip


def _scores(task: str, numbers: dict[str, Any], samples: int) -> list[TaskScore]:
    made = []
    for key, value in numbers.items():
        name, _, how = key.partition(",")
        if isinstance(value, (int, float)) and how and not name.endswith("_stderr"):
            error = numbers.get(f"{name}_stderr,{how}")
            named = name if how == "none" else f"{name} ({how})"
            stderr = float(error) if isinstance(error, (int, float)) else None
            made.append(TaskScore(task=task, metric=named, value=float(value), stderr=stderr, samples=samples))
    return made
