"""Is the chunked loss torch's cross entropy, in value and gradients, without the logits ever being there?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from edgeft.machines.meter import LiveBytes
from edgeft.models.loss import chunked_cross_entropy, head_transform
from edgeft.models.parts import find_parts

TOKENS, HIDDEN, WORDS = 37, 24, 151
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.0625},
    "softcap": {"softcap": 3.0},
    "everything": {"bias": True, "scale": 2.5, "softcap": 4.0},
}


def inputs(
    dtype: torch.dtype = torch.float32, bias: bool = False, tokens: int = TOKENS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    weight = (torch.randn(WORDS, HIDDEN, generator=generator) / 2).to(dtype)
    offset = torch.randn(WORDS, generator=generator).to(dtype) if bias else None
    return hidden, weight, offset, torch.randint(WORDS, (tokens,), generator=generator)


def reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and both gradients over the full logits, in double precision."""
    hidden, weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logits = torch.nn.functional.linear(hidden, weight, None if bias is None else bias.double()) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    loss = cross_entropy(logits, targets, reduction="sum")
    return (loss, *torch.autograd.grad(loss, (hidden, weight)))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(found.double() - expected) / torch.linalg.vector_norm(expected))


@pytest.mark.parametrize("chunk_tokens", [1, 7, TOKENS - 1, TOKENS, 1000])
@pytest.mark.parametrize("form", FORMS)
def test_it_is_cross_entropy(form: str, chunk_tokens: int) -> None:
    options = dict(FORMS[form])
    hidden, weight, bias, targets = inputs(bias=options.pop("bias", False))
    expected = reference(hidden, weight, bias, targets, **options)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = chunked_cross_entropy(hidden, weight, bias, targets, chunk_tokens=chunk_tokens, **options)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert hidden.grad is not None and weight.grad is not None
    found = (loss.detach(), hidden.grad, weight.grad)
    assert [relative(a, b.detach()) for a, b in zip(found, expected, strict=True)] == pytest.approx([0, 0, 0], abs=2e-6)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_rounds_once(form: str) -> None:
    """Against double precision on the same bf16 numbers: a few of bf16's 2^-8 steps, not more."""
    options = dict(FORMS[form])
    hidden, weight, bias, targets = inputs(torch.bfloat16, options.pop("bias", False))
    expected = reference(hidden, weight, bias, targets, **options)
    hidden.requires_grad_()
    loss = chunked_cross_entropy(hidden, weight, bias, targets, chunk_tokens=8, **options)
    loss.backward()
    assert loss.dtype == torch.float32 and hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
    assert relative(loss.detach(), expected[0].detach()) < 2**-8
    assert relative(hidden.grad, expected[1]) < 2**-6


def test_an_fp32_head_is_trained_from_bf16_states() -> None:
    hidden, weight, _, targets = inputs()
    hidden = hidden.bfloat16()
    expected = reference(hidden, weight, None, targets)
    weight.requires_grad_()
    chunked_cross_entropy(hidden, weight, None, targets, chunk_tokens=8).backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert relative(weight.grad, expected[2]) < 2**-6


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_only_what_trains_gets_a_gradient(trained: str) -> None:
    hidden, weight, _, targets = inputs()
    expected = reference(hidden, weight, None, targets)
    leaf, other = (hidden, weight) if trained == "hidden" else (weight, hidden)
    leaf.requires_grad_()
    chunked_cross_entropy(hidden, weight, None, targets, chunk_tokens=10).backward()
    assert other.grad is None and leaf.grad is not None
    assert relative(leaf.grad, expected[1 if trained == "hidden" else 2]) < 2e-6


@pytest.mark.parametrize("upstream", [1.0, -0.25, 1024.0])
def test_gradients_follow_what_is_done_with_the_loss(upstream: float) -> None:
    """Powers of two: scaling is exact, so the gradients are equal to the bit."""
    hidden, weight, _, targets = inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    one = torch.autograd.grad(chunked_cross_entropy(hidden, weight, None, targets, chunk_tokens=8), (hidden, weight))
    loss = chunked_cross_entropy(hidden, weight, None, targets, chunk_tokens=8)
    scaled = torch.autograd.grad(loss * upstream, (hidden, weight))
    assert all(torch.equal(a, b * upstream) for a, b in zip(scaled, one, strict=True))


def test_gradients_are_the_slope_of_the_loss() -> None:
    """A central difference along a random direction, for hidden states and weight at once."""
    hidden, weight, bias, targets = inputs(bias=True)
    generator = torch.Generator().manual_seed(2)
    directions = [torch.randn(x.shape, generator=generator) for x in (hidden, weight)]

    def loss(step: float) -> torch.Tensor:
        moved = [x + step * direction for x, direction in zip((hidden, weight), directions, strict=True)]
        return chunked_cross_entropy(moved[0], moved[1], bias, targets, chunk_tokens=5, softcap=6.0)

    hidden.requires_grad_()
    weight.requires_grad_()
    grads = torch.autograd.grad(loss(0.0), (hidden, weight))
    slope = sum(float((grad * direction).sum()) for grad, direction in zip(grads, directions, strict=True))
    with torch.no_grad():
        difference = float(loss(1e-3) - loss(-1e-3)) / 2e-3
    assert slope == pytest.approx(difference, rel=2e-3)


def test_extreme_logits_do_not_overflow() -> None:
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]])
    loss = chunked_cross_entropy(hidden, weight, None, torch.tensor([0, 0]), chunk_tokens=2)
    loss.backward()
    assert float(loss.detach()) == 2e4  # right with certainty, and wrong by 20,000 nats
    assert torch.equal(hidden.grad, torch.tensor([[0.0], [-2.0]]))  # type: ignore[arg-type]


def test_no_tokens_give_no_loss_and_no_gradient() -> None:
    hidden, weight, _, targets = inputs(tokens=0)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = chunked_cross_entropy(hidden, weight, None, targets, chunk_tokens=8)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert hidden.grad is not None and hidden.grad.shape == (0, HIDDEN)
    assert weight.grad is not None and not weight.grad.any()


# memory


def peak_bytes(call: Any) -> int:
    with LiveBytes() as live:
        result = call()
        if result.requires_grad:
            result.backward()
    return live.peak_bytes


@pytest.mark.parametrize("trains_head", [False, True])
def test_the_full_logits_never_exist(trains_head: bool) -> None:
    tokens, words, width, chunk = 1024, 4096, 16, 32
    full, one_chunk, head = 4 * tokens * words, 4 * chunk * words, 4 * words * width
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(words, width, requires_grad=trains_head)
    targets = torch.randint(words, (tokens,))
    assert peak_bytes(lambda: cross_entropy(hidden @ weight.T, targets, reduction="sum")) >= full
    found = peak_bytes(lambda: chunked_cross_entropy(hidden, weight, None, targets, chunk_tokens=chunk))
    small = 4 * hidden.numel() * 2 + 64 * tokens
    assert found < 2 * one_chunk + head * (2 if trains_head else 1) + small < full / 8
    smaller = peak_bytes(lambda: chunked_cross_entropy(hidden, weight, None, targets, chunk_tokens=8))
    assert smaller < found


def test_scoring_makes_no_gradients() -> None:
    """A trained head under no_grad: its gradient, as large as the head, must not be made."""
    words, width = 4096, 256
    hidden, weight = torch.randn(8, width), torch.randn(words, width, requires_grad=True)
    targets = torch.randint(words, (8,))
    head, states = (tensor.untyped_storage().nbytes() for tensor in (weight, hidden))
    with torch.no_grad():
        found = peak_bytes(lambda: chunked_cross_entropy(hidden, weight, None, targets, chunk_tokens=2))
        value = chunked_cross_entropy(hidden, weight, None, targets, chunk_tokens=2)
    assert not value.requires_grad
    assert float(value) == pytest.approx(float(reference(hidden, weight, None, targets)[0].detach()), rel=1e-5)
    assert found < head + states + 3 * 4 * 2 * words  # what was there, and two tokens' logits


# what models do to their logits


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Granite", "Cohere", "Phi"])
def test_it_is_the_loss_of_models_that_change_their_logits(name: str) -> None:
    """From the body's hidden states to the loss of the model's own logits: Phi has a bias on its head."""
    import transformers

    special: dict[str, dict[str, Any]] = {
        "Gemma2": {"head_dim": 8, "final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
        "Granite": {"logits_scaling": 4.0},
        "Cohere": {"logit_scale": 0.25},
    }
    config = getattr(transformers, name + "Config")(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        **special.get(name, {}),
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    parts: Any = find_parts(model)
    with torch.no_grad():
        parts.head.weight.mul_(40)  # so that scale and cap matter
        if parts.head.bias is not None:
            parts.head.bias.normal_()
        ids = torch.randint(3, 97, (1, 20))
        logits = model(input_ids=ids).logits[0, :-1]
        hidden = parts.body(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
        scale, softcap = head_transform(model.config)
        arguments = (hidden, parts.head.weight, parts.head.bias, ids[0, 1:])
        found = chunked_cross_entropy(*arguments, chunk_tokens=6, scale=scale, softcap=softcap)
        raw = chunked_cross_entropy(*arguments, chunk_tokens=6)
    expected = float(cross_entropy(logits.double(), ids[0, 1:], reduction="sum"))
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert (scale, softcap) == {"Gemma2": (1.0, 0.5), "Granite": (0.25, 0.0), "Cohere": (0.25, 0.0)}.get(
        name, (1.0, 0.0)
    )
    assert (float(raw) != pytest.approx(expected, rel=1e-3)) == (name in special)
    assert (parts.head.bias is not None) == (name == "Phi")
