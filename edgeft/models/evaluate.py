"""How good is a model on rows of data: loss per trained token, perplexity, exact match of its greedy answers?

One pass over prompt and answer gives both: a greedy answer is the row's own exactly where each of its tokens, and the
end token behind them, is the model's most likely one after those before it. Nothing is generated for such a row, nor
for one whose first other token rules the answer out; what is left is one that may spell the same text in other tokens.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from edgeft.data import scoring_groups
from edgeft.data.batches import Batch, make_batch
from edgeft.data.samples import Sample
from edgeft.data.scoring_groups import EVAL_TOKENS, MAX_ANSWER_TOKENS
from edgeft.data.tokenizer import TextTokenizer
from edgeft.models.beginning import NONE, Beginning, read_beginning
from edgeft.models.loss import chunked_cross_entropy, head_transform
from edgeft.models.metrics import Metrics
from edgeft.models.parts import Parts, find_parts


@contextlib.contextmanager
def autocast(device: torch.device, compute: torch.dtype) -> Iterator[None]:
    """Half-precision products where the plan computes in half; nothing at all in fp32."""
    if compute == torch.float32:
        yield
    else:
        with torch.autocast(device.type, dtype=compute):
            yield


def trained_states(
    parts: Parts, samples: Sequence[Sample], batch: Batch, compute: torch.dtype, behind: Beginning = NONE
) -> torch.Tensor:
    """Hidden states (N, h) from which the trained tokens of samples, as one batch, are predicted; in compute dtype."""
    with parts.starting(samples):
        hidden = behind.read(parts, batch.ids)
    # CUDA's autocast leaves a LayerNorm's result in fp32: the head would be copied to fp32 for it, chunk by chunk
    return hidden.reshape(-1, hidden.shape[-1])[batch.positions].to(compute)  # type: ignore[no-any-return]


def token_losses(
    model: Any,
    parts: Parts,
    samples: Sequence[Sample],
    device: torch.device,
    compute: torch.dtype,
    chunk_tokens: int,
) -> torch.Tensor:
    """Scalar sum of cross entropies, in nats, over the trained tokens of `samples` as one batch; keeps the graph."""
    batch = make_batch(samples).to(device)
    scale, softcap = head_transform(model.config.get_text_config(decoder=True))
    with autocast(device, compute):
        head: Any = parts.head
        return chunked_cross_entropy(
            trained_states(parts, samples, batch, compute),
            parts.head_weight(),
            head.bias,
            batch.targets,
            chunk_tokens=chunk_tokens,
            scale=scale,
            softcap=softcap,
        )


@torch.no_grad()
def score_group(
    model: Any, parts: Parts, samples: Sequence[Sample], device: torch.device, compute: torch.dtype, chunk_tokens: int,
    look: Callable[[int, torch.Tensor], None] | None = None, behind: Beginning = NONE,
) -> tuple[list[float], list[list[int]]]:  # fmt: skip
    """(sum of cross entropies in nats, the most likely token at each trained one) of each sample, in one pass.

    `look` sees the logits of each chunk of trained tokens, and the number of its first. `behind` is what the samples
    begin with, where that has been read.
    """
    batch = behind.batch(samples).to(device)
    scale, softcap = head_transform(model.config.get_text_config(decoder=True))
    head: Any = parts.head
    losses, likely = list[float](), list[int]()
    with autocast(device, compute):
        hidden, weight = trained_states(parts, samples, batch, compute, behind), parts.head_weight()
        for start in range(0, len(hidden), chunk_tokens):
            logits = hidden[start : start + chunk_tokens] @ weight.T.to(hidden.dtype)
            if head.bias is not None:
                logits += head.bias
            logits = logits.float().mul_(scale)
            if softcap:
                logits.div_(softcap).tanh_().mul_(softcap)
            if look is not None:
                look(start, logits)
            chosen = logits.gather(1, batch.targets[start : start + chunk_tokens, None])
            highest, best = logits.max(dim=-1, keepdim=True)
            norm = logits.sub_(highest).exp_().sum(dim=-1, keepdim=True)
            losses += (norm.log() + highest - chosen)[:, 0].tolist()
            likely += best[:, 0].tolist()
            del logits
    ends = list(itertools.accumulate((sample.trained_tokens for sample in samples), initial=0))
    rows = [slice(start, end) for start, end in itertools.pairwise(ends)]
    return [math.fsum(losses[row]) for row in rows], [likely[row] for row in rows]


def by_length(samples: Sequence[Sample], tokens: int = EVAL_TOKENS) -> Iterator[list[Sample]]:
    """Samples in groups of similar length, at most `tokens` padded tokens each (one sample at least)."""
    for group in scoring_groups.by_length([sample.size for sample in samples], tokens):
        yield [samples[i] for i in group]


def answer_tokens(samples: Sequence[Sample]) -> int:
    """Tokens that are enough to give the longest completion of `samples` and its end, at most MAX_ANSWER_TOKENS."""
    return min(MAX_ANSWER_TOKENS, max(len(sample) - sample.prompt_tokens for sample in samples) + 1)


def by_answer(samples: Sequence[Sample], tokens: int = EVAL_TOKENS) -> Iterator[list[Sample]]:
    """Samples to be answered together: see `edgeft.data.scoring_groups`, by which a plan prices them."""
    for group in scoring_groups.by_answer([sample.size for sample in samples], tokens):
        yield [samples[i] for i in group]


@torch.no_grad()
def greedy(model: Any, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], max_new_tokens: int,
           device: torch.device, allowed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> list[list[int]]:  # fmt: skip
    """The likeliest continuation of each prompt, in order, cut before its first stop id; padded on the left.

    Nothing but the likeliest token: no setting of the checkpoint's generation_config (penalties, forbidden or forced
    tokens, least lengths, beams) takes part, as none does in run.py. Ends as soon as every row has stopped. `allowed`
    gives scores (rows, V) without those of tokens that may not follow ids (rows, n).
    """
    width = max(map(len, prompts))
    pad = stop_ids[0]
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    with plain_generation(model, stop_ids, max_new_tokens) as settings, one_product(model):
        held = {} if allowed is None else {"logits_processor": [allowed]}
        made = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, **held)[:, width:]
        made = made.tolist()
    return [cut_at(row, stop_ids) for row in made]


@contextlib.contextmanager
def one_product(model: Any) -> Iterator[None]:
    """Let the head multiply the last states of all rows at once.

    They are a slice of all positions, for which PyTorch takes a batch of products: on a CPU in half precision each one
    copies the head, the largest matrix there is. So it does for one row, whose strides alone are those of a slice.
    """

    def side_by_side(_: Any, given: Any) -> Any:
        states = given[0]
        return states.contiguous().view(-1, states.shape[-1]).view(states.shape), *given[1:]

    hook = find_parts(model).head.register_forward_pre_hook(side_by_side)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def plain_generation(model: Any, stop_ids: Sequence[int], max_new_tokens: int) -> Iterator[Any]:
    """Settings of generation that hold lengths and end tokens alone, also in place of the model's own.

    transformers fills what a given configuration leaves open from that of the model.
    """
    from transformers import GenerationConfig

    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, use_cache=True, eos_token_id=list(stop_ids),
        pad_token_id=stop_ids[0],
    )  # type: ignore[no-untyped-call]  # fmt: skip
    own, model.generation_config = model.generation_config, settings
    try:
        yield settings
    finally:
        model.generation_config = own


def cut_at(ids: Sequence[int], stop_ids: Sequence[int]) -> list[int]:
    """The ids before the first stop id."""
    return list(ids[: next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))])


def asked_for(sample: Sample, stop_ids: Sequence[int]) -> tuple[list[int], bool]:
    """(the ids that an answer must give, whether it must end there).

    An answer that was cut, or is longer than MAX_ANSWER_TOKENS, is asked for up to where it is cut.
    """
    whole = sample.ids[sample.prompt_tokens :][:MAX_ANSWER_TOKENS]
    wanted = cut_at(whole, stop_ids)
    return wanted, len(wanted) < len(whole)


def is_exact(tokenizer: TextTokenizer, sample: Sample, answer: Sequence[int]) -> bool:
    """Whether an answer is what the row asks for: the same ids up to a stop id, or the same text.

    White space around both is left out where other text remains; special tokens must be the same ones.
    """
    wanted, ends = asked_for(sample, tokenizer.stop_ids)
    if not wanted and not ends:  # all of the answer was cut
        return False
    given = cut_at(answer, tokenizer.stop_ids)
    return _same(tokenizer, wanted, given if ends else given[: len(wanted)])


def _same(tokenizer: TextTokenizer, wanted: list[int], given: list[int]) -> bool:
    if wanted == given:
        return True
    if _specials(tokenizer, wanted) != _specials(tokenizer, given):
        return False
    text = tokenizer.spell(wanted).strip()
    return bool(text) and text == tokenizer.spell(given).strip()


def _specials(tokenizer: TextTokenizer, ids: Sequence[int]) -> list[int]:
    return [token for token in ids if token in tokenizer.special_ids]


def judge(tokenizer: TextTokenizer, sample: Sample, likely: Sequence[int]) -> bool | None:
    """Whether the greedy answer is exact, by the most likely token at each trained one; None: it must be generated.

    Up to its first other token the greedy answer is the row's own. It is then exact only if it spells the same text.
    """
    stops = tokenizer.stop_ids
    wanted, ends = asked_for(sample, stops)
    expected = [*wanted, *([sample.ids[sample.prompt_tokens + len(wanted)]] if ends else [])]
    given = list(likely[len(likely) - (len(sample) - sample.prompt_tokens) :])[: len(expected)]
    wrong = next((i for i, (a, b) in enumerate(zip(given, expected, strict=True)) if a != b), None)
    if wrong is None:
        return bool(expected)
    if given[wrong] in stops:
        return _same(tokenizer, wanted, wanted[:wrong])
    return None if may_become(tokenizer, wanted, [*wanted[:wrong], given[wrong]]) else False


def may_become(tokenizer: TextTokenizer, wanted: list[int], begun: list[int]) -> bool:
    """Whether an answer that began so may still spell what was asked for."""
    if _specials(tokenizer, wanted)[: len(_specials(tokenizer, begun))] != _specials(tokenizer, begun):
        return False
    return tokenizer.spell(wanted).strip().startswith(tokenizer.spell(begun).strip().rstrip("\ufffd"))


class Held(Protocol):
    """Answers that are held to labels or a grammar (`edgeft.engine`): found from the same passes, and few more."""

    def look(self, group: Sequence[Sample]) -> Callable[[int, torch.Tensor], None]: ...
    def settle(
        self, model: Any, parts: Parts, device: torch.device, compute: torch.dtype, chunk_tokens: int, group_tokens: int
    ) -> None: ...
    def is_exact(self, row: Sample) -> bool: ...


@torch.no_grad()
def evaluate(
    model: Any,
    parts: Parts,
    samples: Sequence[Sample],
    tokenizer: TextTokenizer,
    *,
    device: torch.device,
    compute: torch.dtype = torch.float32,
    chunk_tokens: int = 1024,
    group_tokens: int = EVAL_TOKENS,
    held: Held | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    whole: Callable[[], None] = lambda: None,
) -> Metrics:
    """Metrics over all of `samples`, in groups of similar length; each row's own are kept with them.

    An answer is what `held` finds, where it is given; else what the model would write. `whole` is called before the
    model reads tokens that are no row's own.
    """
    losses: dict[int, float] = {}
    judged: dict[int, bool | None] = {}
    free = held is None and samples[0].has_prompt
    with autocast(device, compute):
        behind = read_beginning(model, parts, samples, device, compute)
    for group in by_length(samples, group_tokens):
        look = None if held is None else held.look(group)
        nats, likely = score_group(model, parts, group, device, compute, chunk_tokens, look, behind)
        losses |= zip(map(id, group), nats, strict=True)
        judged |= {
            id(sample): judge(tokenizer, sample, best) if free else False
            for sample, best in zip(group, likely, strict=True)
        }
        progress(len(losses), len(samples))
    del behind
    if held is not None or None in judged.values():
        whole()
    if held is None:
        answer_open(model, samples, tokenizer, judged, device, compute, group_tokens)
    else:
        held.settle(model, parts, device, compute, chunk_tokens, group_tokens)
        judged = {id(sample): held.is_exact(sample) for sample in samples}
    order = [id(sample) for sample in samples]
    return metrics(samples, tokenizer, [losses[row] for row in order], [bool(judged[row]) for row in order])


def answer_open(
    model: Any, samples: Sequence[Sample], tokenizer: TextTokenizer, judged: dict[int, bool | None],
    device: torch.device, compute: torch.dtype, group_tokens: int,
) -> None:  # fmt: skip
    """Generate the answers that are judged None, by the sample's identity, and judge them."""
    for group in by_answer([sample for sample in samples if judged.get(id(sample), False) is None], group_tokens):
        with autocast(device, compute):
            prompts = [sample.prompt for sample in group]
            answers = greedy(model, prompts, tokenizer.stop_ids, answer_tokens(group), device)
        judged |= {id(s): is_exact(tokenizer, s, answer) for s, answer in zip(group, answers, strict=True)}


def metrics(
    samples: Sequence[Sample], tokenizer: TextTokenizer, losses: Sequence[float], exact: Sequence[bool]
) -> Metrics:
    """Metrics of each row's summed loss in nats and whether its answer is exact; the perplexity is capped."""
    rows, tokens = len(samples), tuple(sample.trained_tokens for sample in samples)
    loss = math.fsum(losses) / max(1, sum(tokens))
    asked = samples[0].has_prompt
    long = sum(
        len(sample) - sample.prompt_tokens > MAX_ANSWER_TOKENS and not asked_for(sample, tokenizer.stop_ids)[1]
        for sample in samples
        if asked
    )
    perplexity = math.exp(min(loss, 700.0))  # where a float ends
    return Metrics(
        rows=rows,
        loss=loss,
        perplexity=perplexity,
        exact_match=sum(exact) / rows if asked else None,
        long_answers=long,
        row_losses=tuple(round(each, 6) for each in losses),
        row_tokens=tokens,
        row_exact="".join("01"[right] for right in exact) if asked else "",
    )
