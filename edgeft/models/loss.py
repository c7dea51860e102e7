"""How large is the loss, and its gradient, when the full logits must never exist?"""

from __future__ import annotations

from typing import Any

import torch


def head_transform(config: Any) -> tuple[float, float]:
    """(scale, softcap) that a model applies to its logits after the head; (1, 0) for most.

    Gemma-2 caps at softcap * tanh(z / softcap); Granite divides by logits_scaling; Cohere multiplies by logit_scale.
    """
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return scale, float(getattr(config, "final_logit_softcapping", None) or 0.0)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross entropies of `hidden @ weight.T`, its gradients made chunk by chunk during the forward pass.

    One chunk's logits (chunk_tokens x V, fp32) are the only thing of vocabulary size that ever exists, and they are
    turned into their own gradient in place. The gradient of a trained head is summed by hand: autograd's own sum over
    chunks would hold three copies of it.
    """

    @staticmethod
    def forward(
        context: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        chunk_tokens: int,
        scale: float,
        softcap: float,
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        wants_hidden, wants_weight = hidden.requires_grad, weight.requires_grad
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        for start in range(0, hidden.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits = hidden[part] @ weight.T.to(hidden.dtype)
            if bias is not None:
                logits += bias
            logits = logits.float()
            if scale != 1.0:
                logits *= scale
            slope = None
            if softcap:
                logits.div_(softcap).tanh_().mul_(softcap)
                slope = 1 - (logits / softcap) ** 2 if wants_hidden or wants_weight else None
            index = targets[part, None]
            highest = logits.amax(dim=-1, keepdim=True)
            chosen = logits.gather(1, index)
            logits.sub_(highest).exp_()
            norm = logits.sum(dim=-1, keepdim=True)
            total += (norm.log() + highest - chosen).sum()
            if not (wants_hidden or wants_weight):
                continue
            logits.div_(norm).scatter_add_(1, index, torch.full_like(chosen, -1.0))
            if slope is not None:
                logits *= slope
            # the gradient of the sum, not of a mean: in fp16 a mean's would underflow
            grad_logits = logits.mul_(scale).to(hidden.dtype)
            del logits
            if grad_hidden is not None:
                torch.mm(grad_logits, weight.to(hidden.dtype), out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.T.to(weight.dtype), hidden[part].to(weight.dtype))
            del grad_logits
        context.grads = (grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(context: Any, upstream: torch.Tensor) -> tuple[Any, ...]:
        grad_hidden, grad_weight = context.grads
        context.grads = None
        for grad in (grad_hidden, grad_weight):
            if grad is not None:
                grad.mul_(upstream)
        return grad_hidden, grad_weight, None, None, None, None, None


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    chunk_tokens: int,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Sum over N tokens of -log softmax(cap(scale * (hidden @ weight.T + bias)))[target], in nats, as an fp32 scalar.

    hidden (N, h) in the compute dtype, weight (V, h), bias (V) or None, targets (N) int64. Exact up to the order of
    summation: equal to torch's cross_entropy over the full logits to fp32 rounding. A head bias is never trained.
    """
    if not torch.is_grad_enabled():  # a Function does not see it: scoring would make gradients that nobody takes
        hidden, weight = hidden.detach(), weight.detach()
    args = (hidden, weight, bias, targets, chunk_tokens, scale, softcap)
    loss: torch.Tensor = _ChunkedCrossEntropy.apply(*args)  # type: ignore[no-untyped-call]
    return loss
