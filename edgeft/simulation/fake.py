"""What does a model, and the device it is planned for, look like to a training step that must hold no memory?

Tensors are fake: a shape, a dtype, a storage of known size, no bytes. They say that they are on the CPU, since PyTorch
without CUDA cannot make fake CUDA ones; what CUDA does differently is chosen for them here.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from edgeft.data.batches import Batch, make_batch
from edgeft.data.dataset import Sample
from edgeft.engine import loop
from edgeft.engine.fp32_layers import make_dense
from edgeft.engine.nf4_base import compute_in
from edgeft.engine.nf4_codes import empty_nf4
from edgeft.engine.streaming import cast_on_use
from edgeft.memory.streamed import casts, table_streams
from edgeft.memory.train_step import PAGED_ELEMENTS
from edgeft.models import evaluate
from edgeft.models.checkpoint import DTYPES
from edgeft.models.parts import Parts, cap_scores, find_parts, is_linear, repeat_groups
from edgeft.models.spec import ModelSpec
from edgeft.settings.attention import repeats_groups
from edgeft.settings.job import Training
from edgeft.settings.tuners import is_adapter

CUDA_OPTIMIZER = loop.make_optimizer  # the true one, also while it is replaced


def build_meta(config: Any, spec: ModelSpec, training: Training, compute: torch.dtype) -> tuple[Any, Parts]:
    """The model of `config` as `load_base` would give it, on the meta device."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)  # how a prefix attends is written into it
    if training.base_precision == "nf4":
        model = empty_nf4(config, compute)
        compute_in(model, compute)
    else:
        auto: Any = AutoModelForCausalLM
        dense = DTYPES[training.base_precision] if compute.itemsize == 2 else compute
        with torch.device("meta"):
            model = auto.from_config(config, dtype=dense).eval()
        cap_scores(model)
    if training.densely:
        with torch.device("meta"):
            for index in training.trained_layers:
                make_dense(find_parts(model).layers[index], compute, _dense_shape)
    model.config.use_cache = False
    if repeats_groups(training, spec.head_dim):
        repeat_groups(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model, find_parts(model)


def _dense_shape(place: str, key: str, old: torch.Tensor, transposed: bool) -> torch.Tensor:
    return torch.empty(old.shape, dtype=torch.float32)


def make_fake(model: nn.Module) -> None:
    """Replace every tensor of a meta model by a fake CPU one, tied ones once; 4-bit matrices get their true storage."""
    made: dict[int, Any] = {}
    kept = []  # a meta tensor that goes away would leave its id to another
    for module in model.modules():
        quantised = type(module).__name__ == "Linear4bit" and not hasattr(module, "base_layer")
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                kept.append(old)
                if id(old) not in made and quantised and name == "weight":
                    made[id(old)] = _packed(module)
                elif id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                tensors[name] = made[id(old)]


def leave_in_files(model: nn.Module, parts: Parts, spec: ModelSpec, training: Training) -> list[nn.Parameter]:
    """The weights of a fake model that are pages of files, whose bytes are no tensors'; cast where the plan casts.

    And those of which a process has a part: that, and what is gathered, follow from no step.
    """
    if training.shard_base:
        return [p for layer in parts.layers for name, p in layer.named_parameters() if not is_adapter(name)]
    away: list[nn.Parameter] = []
    dense = set(training.trained_layers) if training.densely else set()
    stored: torch.dtype = getattr(torch, spec.dtype, torch.float32)
    for number, layer in enumerate(parts.layers) if training.stream_layers else ():
        for name, module in layer.named_modules() if number not in dense else ():
            if not is_linear(module) or is_adapter(f"{name}.weight"):
                continue
            if casts(spec, training):
                kept: Any = module.weight
                cast_on_use(module, torch.empty(kept.shape, dtype=stored), kept.dtype)
            away.append(cast(nn.Parameter, module.weight))
    table = cast(nn.Parameter, parts.embedding.weight)
    return [*away, table] if table_streams(spec, training) else away


def _packed(linear: Any) -> nn.Parameter:
    """A fake NF4 matrix with double quantisation: two codes a byte, and the scales that bitsandbytes keeps with it."""
    from bitsandbytes.functional import QuantState

    state: Any = QuantState
    elements = linear.out_features * linear.in_features
    blocks = -(-elements // 64)
    matrix: Any = nn.Parameter(torch.empty(-(-elements // 2), 1, dtype=torch.uint8), requires_grad=False)
    scales = state(absmax=torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32)
    matrix.quant_state = state(
        absmax=torch.empty(blocks, dtype=torch.uint8), shape=torch.Size((linear.out_features, linear.in_features)),
        code=torch.empty(16), blocksize=64, quant_type="nf4", dtype=linear.compute_dtype, offset=torch.empty(()),
        state2=scales,
    )  # fmt: skip
    return cast(nn.Parameter, matrix)


def quantisation_states(model: nn.Module) -> list[torch.Tensor]:
    """The tensors of a 4-bit model that are neither parameters nor buffers: scales and code books."""
    states: list[Any] = [getattr(parameter, "quant_state", None) for parameter in model.parameters()]
    parts = [part for state in states if state for part in (state, state.state2) if part]
    found = [tensor for part in parts for tensor in (part.absmax, part.code, part.offset)]
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


def cuda_attention(flash: bool) -> Callable[..., torch.Tensor]:
    """scaled_dot_product_attention by the kernel that PyTorch takes on CUDA.

    That is flash from compute capability 8.0 on (every device planned in bf16), for half precision without a mask; else
    the memory-efficient kernel, which does not know grouped queries: those then fall to the math one.
    """
    aten: Any = torch.ops.aten

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
                  dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
                  enable_gqa: bool = False) -> torch.Tensor:  # fmt: skip
        if torch.is_autocast_cpu_enabled():
            half = torch.get_autocast_dtype("cpu")
            query, key, value = query.to(half), key.to(half), value.to(half)
        size = query.shape[-1]
        if flash and attn_mask is None and _is_half(query) and size <= 256:
            if size % 8:
                query, key, value = (nn.functional.pad(x, (0, -size % 8)) for x in (query, key, value))
            options = {"scale": scale if scale is not None else size**-0.5}
            out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, **options)[0]
            return cast(torch.Tensor, out[..., :size])
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
        if enable_gqa and query.shape[1] != key.shape[1]:
            math = aten._scaled_dot_product_attention_math
            out = math(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=True)[0]
            return cast(torch.Tensor, out)
        if attn_mask is not None:
            attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        efficient = aten._scaled_dot_product_efficient_attention
        out = efficient(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
        return cast(torch.Tensor, out)

    return attention


def _in_fp32(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A function as CUDA's autocast runs it, which a CPU's leaves alone: on fp32 copies of half-precision inputs."""

    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.is_autocast_cpu_enabled() and kwargs.get("dtype") is None:
            args = tuple(a.float() if isinstance(a, torch.Tensor) and _is_half(a) else a for a in args)
        return function(*args, **kwargs)

    return run


def _is_half(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)


class _GroupedProduct(torch.autograd.Function):
    """torch's product of each expert's rows with its matrix, in sizes alone: torch's own takes bf16 alone.

    Rows are kept for the matrices' gradients only where those train.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, matrices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        wants_rows, wants_matrices, _ = ctx.needs_input_grad
        ctx.save_for_backward(rows if wants_matrices else None, matrices if wants_rows else None, offsets)
        ctx.shapes = rows.shape, matrices.shape, None
        return rows.new_empty(rows.shape[0], matrices.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        pairs = zip(ctx.needs_input_grad, ctx.shapes, strict=True)
        return tuple(gradients[0].new_empty(shape) if wanted else None for wanted, shape in pairs)


def _grouped_mm(rows: torch.Tensor, matrices: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, _GroupedProduct.apply(rows, matrices, offs))  # type: ignore[no-untyped-call]


def _experts(training: Training) -> Iterator[Any]:
    """What lets transformers' experts run on fake tensors, as they do on the planned device.

    CUDA before capability 8.0 has no grouped product: transformers' own takes its place, which keeps more. fp16 and
    fp32 do not say what the capability is, and are taken for that.
    """
    try:
        from transformers.integrations import moe
    except ImportError:  # before transformers 5 every model went through its experts one by one
        return
    if training.device == "cuda" and training.compute_dtype != "bf16":
        yield mock.patch.object(moe, "_can_use_grouped_mm", lambda *_: False)
    elif hasattr(nn.functional, "grouped_mm"):
        yield mock.patch.object(nn.functional, "grouped_mm", _grouped_mm)


def _eight_bit_optimizer(training: Training, device: torch.device, groups: Sequence[list[nn.Parameter]]) -> Any:
    """bitsandbytes' 8-bit AdamW making its states as on CUDA; its update, which holds nothing of its own, left out."""
    with _disable_current_modes():
        optimizer: Any = CUDA_OPTIMIZER(training, torch.device("cuda"), groups)
    optimizer.name2qmap = {"dynamic": torch.empty(256), "udynamic": torch.empty(256)}

    def state_buffer(parameter: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        paged = optimizer.is_paged and parameter.numel() >= PAGED_ELEMENTS
        return torch.zeros(0 if paged else parameter.shape, dtype=dtype)  # paged states live on the host

    optimizer.get_state_buffer = state_buffer
    optimizer.update_step = lambda group, parameter, *indices: None
    return optimizer


@contextlib.contextmanager
def as_planned(
    spec: ModelSpec, training: Training, fake: FakeTensorMode, started: Callable[[], None]
) -> Iterator[None]:
    """Everything that a training step asks its surroundings, answered as on the planned device."""

    def fake_batch(samples: Sequence[Sample]) -> Batch:
        started()
        with _disable_current_modes():  # which tokens train is data: a fake tensor cannot tell
            batch = make_batch(samples)
        return Batch(*(torch.empty_like(fake.from_tensor(t)) for t in (batch.ids, batch.positions, batch.targets)))

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(evaluate, "make_batch", fake_batch))
        # transformers takes fake tensors for the tracing of a graph and would make masks that it leaves out otherwise
        stack.enter_context(mock.patch("transformers.masking_utils.is_tracing", lambda tensor=None: False))
        for replaced in _experts(training):
            stack.enter_context(replaced)
        stack.enter_context(fake)
        if training.device == "cuda":
            flash = not repeats_groups(training, spec.head_dim)
            functional, on_cpu = nn.functional, torch.is_autocast_cpu_enabled
            for place, name, replacement in (
                (torch, "is_autocast_enabled", lambda device="cuda": on_cpu()),  # asked by PEFT's 4-bit layer
                (functional, "scaled_dot_product_attention", cuda_attention(flash)),
                *((place, name, _in_fp32(getattr(place, name))) for place, name in (
                    (functional, "layer_norm"), (functional, "softmax"), (torch, "pow"))),
            ):  # fmt: skip
                stack.enter_context(mock.patch.object(place, name, replacement))
        if training.optimizer != "adamw":
            stack.enter_context(mock.patch.object(loop, "make_optimizer", _eight_bit_optimizer))
        yield
