"""Which prompts does a bundle carry with their answers, golden vectors, and what does the artifact answer to each?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from edgeft.data.dataset import Row, TextTokenizer, read_rows
from edgeft.data.rows import each_row
from edgeft.documents import versions
from edgeft.errors import ParityFailed
from edgeft.exporting.answers import GoldenAnswer, GoldenLabel
from edgeft.exporting.artifact import Logits
from edgeft.exporting.bundle import Environment, Golden, GoldenInput
from edgeft.machines.environment import cpu_model, cpuinfo
from edgeft.machines.runner import runner_module
from edgeft.settings.job import Job
from edgeft.targets.runtimes import Runtime
from edgeft.targets.words import Words

GOLDEN_PROMPTS = 4
SIMPLIFY = "simplify chat_template.jinja, or export plain prompts"
GOLDEN_ANSWER = 64  # tokens kept of an answer that is held to a grammar
ALONE = 1e9  # the margin of a token that no other is allowed beside
GOLDEN_TOKENS = 16  # greedy tokens kept per golden vector
GOLDEN_LOGITS = 8  # largest first logits kept per golden vector


def golden_inputs(job: Job, tokenizer: TextTokenizer) -> tuple[list[GoldenInput], bool]:
    """(prompts whose answers the bundle records, whether they are chats): the first rows of the validation data."""
    source = job.valid or job.data
    assert source is not None  # Data.read has refused a plan without data
    rows = read_rows(source, tokenizer, GOLDEN_PROMPTS)
    chat = rows[0].format == "chat"
    # a chat is rendered already: its last prompt is replayed as the text the device must reproduce
    return [GoldenInput(text=_prompt_text(row)) if not chat else _chat_input(row) for row in rows], chat


def shared_system(job: Job, prompts: Sequence[GoldenInput], tokenizer: TextTokenizer) -> str | None:
    """The system message of every training row, which the device gives too; None where they have not one in common."""
    found = {_system(prompt.messages) for prompt in prompts}
    if len(found) == 1 and None not in found and job.data is not None:
        found |= {_system(row.messages) for row in each_row(job.data, tokenizer)}
    return found.pop() if len(found) == 1 else None


def _system(messages: Sequence[Mapping[str, Any]] | None) -> str | None:
    first = messages[0] if messages else {}
    content = first.get("content") if first.get("role") == "system" else None
    return content if isinstance(content, str) and content else None


def _prompt_text(row: Row) -> str:
    return row.prompt if row.has_prompt else row.text[:64]


def _chat_input(row: Row) -> GoldenInput:
    assert row.messages is not None
    return GoldenInput(messages=list(row.messages))


def record(model: Any, tokenizer: TextTokenizer, prompts: Sequence[GoldenInput]) -> list[Golden]:
    """Golden vectors, made by the artifact. Raises ParityFailed if text, ids or ends are not what training used."""
    if (wanted := tokenizer.stop_ids) != list(model.eos_ids):
        problem = f"the bundle ends answers at {list(model.eos_ids)}, scores at {wanted}"
        raise ParityFailed("stop ids", problem, "report this: the builder did not store what was merged")
    made = []
    for prompt in prompts:
        plain = prompt.messages is None
        text = prompt.text or ""
        if prompt.messages is not None:
            text = tokenizer.render(prompt.messages, add_generation_prompt=True)
        expected = (tokenizer.prefix_ids if plain else []) + tokenizer.encode([text])[0]
        dated = "strftime" in (tokenizer.template_text or "")
        if prompt.messages is not None and not dated and (given := _rendered(model, prompt.messages)) != text:
            problem = f"the runtime renders {given!r}, training used {text!r}"
            raise ParityFailed("chat template", problem, SIMPLIFY)
        ids = model.encode(text, plain=plain)
        if ids != expected:
            problem = f"the runtime encodes {text!r:.200} as {ids[:20]}, training used {expected[:20]}"
            raise ParityFailed("tokenizer", problem, "the runtime does not know this kind of tokenizer.json")
        steps, margins, first = _continue(model, ids)
        top = numpy.argsort(-first, kind="stable")[:GOLDEN_LOGITS]
        made.append(
            Golden(
                messages=None if dated else prompt.messages,
                text=text,
                plain=plain,
                ids=ids,
                greedy_ids=steps,
                margins=margins,
                top_ids=[int(token) for token in top],
                top_logits=[float(first[token]) for token in top],
                label=_golden_label(model, ids),
                held=_golden_answer(model, tokenizer, ids),
            )
        )
    return made


def _golden_label(model: Any, ids: list[int]) -> GoldenLabel | None:
    """The best two labels, where answers are held to labels."""
    if model.labels is None:
        return None
    (score, best), (next_score, second) = model.choose(ids, lambda search: search.decided(2)).found[:2]
    texts = model.labels.texts
    return GoldenLabel(label=texts[best], score=score, runner_up=texts[second], runner_up_score=next_score)


def _golden_answer(model: Any, tokenizer: TextTokenizer, ids: list[int]) -> GoldenAnswer | None:
    """What the runtime writes under the bundle's grammar. Raises ParityFailed where that is not what was planned.

    llguidance says here which tokens are allowed, the runtime has a reader of its own.
    """
    if model.grammar is None:
        return None
    matcher, stops = Words(tokenizer).reader(model.grammar), tokenizer.stop_ids
    made, margins = list[int](), list[float]()
    most = min(GOLDEN_ANSWER, model.context_tokens - len(ids))
    with model.cache(len(ids) + most, model.grammar) as cache:
        last = numpy.asarray(cache.read(ids), dtype=numpy.float32)
        while len(made) < most:
            masked = numpy.where(matcher.allowed(len(last)), last, -numpy.inf)
            masked[stops[0]], masked[stops[1:]] = masked[stops].max(), -numpy.inf  # any end is one
            expected, token = int(masked.argmax()), cache.pick(last)
            token = stops[0] if token in stops else token
            if token != expected:
                problem = f"the runtime goes on with token {token} behind {made}, where {expected} was to come"
                raise ParityFailed(
                    "answers", problem, "report this: it reads the grammar otherwise than llguidance here"
                )
            second, best = numpy.sort(masked)[-2:]
            made.append(token)
            margins.append(float(min(best - second, ALONE)))
            if token in stops or len(made) == most:
                break
            matcher.take(token)
            last = numpy.asarray(cache.session.following(), dtype=numpy.float32)
    return GoldenAnswer(ids=made, margins=margins)


def _continue(model: Any, ids: list[int]) -> tuple[list[int], list[float], Logits]:
    """(greedy tokens, by how much each led the next best, logits after the prompt), by one cache."""
    count = min(GOLDEN_TOKENS, model.context_tokens - len(ids))
    model.fit(ids, 0)
    cache = runner_module().Cache(model.engine, len(ids) + max(0, count))
    first = last = numpy.array(cache.read(ids), dtype=numpy.float32)
    steps: list[int] = []
    margins: list[float] = []
    while len(steps) < count:
        second, best = numpy.sort(last)[-2:]
        steps.append(int(last.argmax()))
        margins.append(float(best - second))
        if len(steps) < count:
            last = numpy.asarray(cache.append(steps[-1:]), dtype=numpy.float32)
    return steps, margins, first


def _rendered(model: Any, messages: list[dict[str, Any]]) -> str:
    """What the runtime makes of a chat. Raises ParityFailed where it cannot read the template at all."""
    try:
        return str(model.render(messages))
    except runner_module().RunError as problem:
        why = next((line for line in str(problem).splitlines() if line.strip()), "")
        raise ParityFailed("chat template", f"the runtime cannot render it: {why}", SIMPLIFY) from None


def environment(runtime: Runtime) -> Environment:
    """Where golden vectors are recorded: another processor or runtime may round otherwise."""
    flags = cpuinfo("flags", "Features").split()
    features = sorted(flag for flag in flags if flag.startswith(runner_module().FEATURES))
    found = versions(runtime.packages)
    runtimes = " ".join(f"{name} {found.get(name, '')}".strip() for name in runtime.packages)
    return Environment(cpu=cpu_model(), features=features, runtime=runtimes)
