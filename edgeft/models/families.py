"""What differs between the known families of models? Data only: a family is a row of FAMILIES.

How its parameters are laid out, what its code computes otherwise than Llama's (`memory.dataflow` follows it), what the
builders of bundles make of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

# attention_in projections share one saved input, the attention norm's output; mlp_in ones the MLP norm's.
Role = Literal["attention_in", "attention_out", "mlp_in", "mlp_out", "other"]

# Llama's, one whose weight is stored less one, LayerNorm with a bias
Norm = Literal["rms", "rms_from_one", "layer"]
# name, in, out, has_bias, role: widths as named in spec._from_family; has_bias is a config key or the answer.
Row = tuple[str, str, str, str | bool, Role]


@dataclass(frozen=True)
class Gguf:
    """What llama.cpp calls a family, and how its numbers differ from the checkpoint's."""

    name: str
    rotates_pairs: bool = False  # rotates neighbouring values of a head: the rows of query and key change places
    norms_from_one: bool = False  # the checkpoint stores a norm's weight less one
    windows: bool = False  # knows sliding windows
    no_window: bool = False  # has to be told that there is none
    rope_factors: bool = False  # reads a factor for each rotary frequency
    output_bias: bool = False  # adds a bias to what attention gives
    square: bool = False  # takes heads x head_dim for the hidden size
    widest: int = 0  # layers of the largest model, whose attention llama.cpp scales by another width


@dataclass(frozen=True)
class Family:
    """How one model_type lays out its parameters; keys and defaults as in its transformers config class.

    The defaults of what its code computes are Llama's.
    """

    architecture: str
    linears: tuple[Row, ...]
    optional: dict[str, Any]  # each optional key the family reads, and its default; others are ignored
    names: dict[str, str] = field(default_factory=dict)  # the family's own name of a standard key
    norms: int = 2
    norm: Norm = "rms"
    qk_norm: bool = False
    position_offset: int | None = None  # rows of the learned position table beyond max_position_embeddings
    assumes: dict[str, bool] = field(default_factory=dict)  # any other value: count on the meta device
    conv1d: bool = False  # projections are transformers.pytorch_utils.Conv1D, whose weight is in x out
    # what its code computes
    window_every: int | None = None  # every n-th layer sees everything, the others a window; 0: none does
    rotary_share: float = 1.0  # of a head's width that is rotated
    parallel: bool = False  # attention and MLP read the same input
    fused_as: Literal["views", "parts", "heads"] = "views"  # how one projection is cut into query, key and value
    scales_query: bool = False
    scales_residual: bool = False
    keeps_names: bool = False  # a layer's code has names of its own that hold on to what others let go
    inline_mlp: bool = False  # the MLP is in the layer's own code, on rows that are not in batches
    positions_of_rows: bool = False  # learned positions are looked up for each row of a batch
    overflows_fp16: bool = False  # a model of bf16 whose activations pass fp16's 65,504: NaN, or one token for ever
    # what builders make of it
    # Built with onnxruntime-genai 0.18's builder from tiny random models of each. It names Gemma 3 too, but reads one
    # rope type where transformers 5 keeps one for each kind of layer (KeyError: 'rope_type').
    ort_builds: bool = False
    ort_problem: str = ""
    gguf: Gguf | None = None

    @property
    def norm_bias(self) -> bool:
        return self.norm == "layer"

    @property
    def rotates(self) -> bool:
        """Whether positions are rotations of query and key: those of other families are learned."""
        return self.position_offset is None


def _separate(qkv: str | bool, output: str | bool, mlp: str | bool) -> tuple[Row, ...]:
    return (
        ("q_proj", "hidden", "query", qkv, "attention_in"),
        ("k_proj", "hidden", "key", qkv, "attention_in"),
        ("v_proj", "hidden", "key", qkv, "attention_in"),
        ("o_proj", "query", "hidden", output, "attention_out"),
        ("gate_proj", "hidden", "inner", mlp, "mlp_in"),
        ("up_proj", "hidden", "inner", mlp, "mlp_in"),
        ("down_proj", "inner", "hidden", mlp, "mlp_out"),
    )


def _fused(names: str, attention: str | bool, mlp: bool, mlp_in: str = "inner") -> tuple[Row, ...]:
    qkv, output, up, down = names.split()
    return (
        (qkv, "hidden", "qkv", attention, "attention_in"),
        (output, "query", "hidden", attention, "attention_out"),
        (up, "hidden", mlp_in, mlp, "mlp_in"),
        (down, "inner", "hidden", mlp, "mlp_out"),
    )


_LLAMA, _QWEN2 = _separate("attention_bias", "attention_bias", "mlp_bias"), _separate(True, False, False)
_PHI3 = _fused("qkv_proj o_proj gate_up_proj down_proj", False, False, mlp_in="gate_up")
# Two are called c_proj; PEFT matches the dotted end of a name, so their module's name tells them apart.
_GPT2 = _fused("c_attn attn.c_proj c_fc mlp.c_proj", True, True)
_NEOX = _fused("query_key_value dense dense_h_to_4h dense_4h_to_h", "attention_bias", True)
_OPT: tuple[Row, ...] = (
    *[(name, "hidden", "query", "enable_bias", "attention_in") for name in ("k_proj", "v_proj", "q_proj")],
    ("out_proj", "query", "hidden", "enable_bias", "attention_out"),
    ("fc1", "hidden", "inner", "enable_bias", "mlp_in"),
    ("fc2", "inner", "hidden", "enable_bias", "mlp_out"),
)

# fmt: off
_BASE: dict[str, Any] = {"max_position_embeddings": 2048, "hidden_act": "silu", "tie_word_embeddings": False}
_GROUPED = _BASE | {"num_key_value_heads": None, "head_dim": None}  # None: one per query head; hidden / heads
_BIASED = _GROUPED | {"attention_bias": False, "mlp_bias": False}
_QWEN = _GROUPED | {"max_position_embeddings": 32768, "num_key_value_heads": 32,
                    "sliding_window": 4096, "use_sliding_window": False}
_GEMMA = {"max_position_embeddings": 8192, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True,
          "num_key_value_heads": 16, "head_dim": 256, "attention_bias": False}
_GEMMA2 = _GEMMA | {"num_key_value_heads": 4, "sliding_window": 4096,
                    "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}
_GEMMA3 = _GEMMA2 | {"max_position_embeddings": 131072,
                     "final_logit_softcapping": None, "attn_logit_softcapping": None}
_GEMMA_NAMES = {"hidden_act": "hidden_activation"}
_GPT2_NAMES = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
               "intermediate_size": "n_inner", "max_position_embeddings": "n_positions",
               "hidden_act": "activation_function"}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _LLAMA, _BIASED, ort_builds=True,
        gguf=Gguf("llama", rotates_pairs=True, rope_factors=True, output_bias=True)),
    "mistral": Family("MistralForCausalLM", _LLAMA, _GROUPED | {
        "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        window_every=0, ort_builds=True, gguf=Gguf("llama", rotates_pairs=True, rope_factors=True)),
    "qwen2": Family("Qwen2ForCausalLM", _QWEN2, _QWEN, ort_builds=True, gguf=Gguf("qwen2", square=True)),
    "qwen3": Family("Qwen3ForCausalLM", _LLAMA, _QWEN | {
        "head_dim": 128, "attention_bias": False}, qk_norm=True, ort_builds=True, gguf=Gguf("qwen3")),
    "gemma": Family("GemmaForCausalLM", _LLAMA, _GEMMA, norm="rms_from_one", ort_builds=True,
        gguf=Gguf("gemma", norms_from_one=True)),
    "gemma2": Family("Gemma2ForCausalLM", _LLAMA, _GEMMA2, _GEMMA_NAMES, norms=4, norm="rms_from_one",
        window_every=2, ort_builds=True, gguf=Gguf("gemma2", norms_from_one=True, windows=True, widest=46)),
    "gemma3_text": Family("Gemma3ForCausalLM", _LLAMA, _GEMMA3, _GEMMA_NAMES, norms=4, norm="rms_from_one",
        qk_norm=True, window_every=6, overflows_fp16=True,
        ort_problem="onnxruntime-genai 0.18 cannot build Gemma 3: its builder looks for one kind of rotary positions, "
        "this model has two", gguf=Gguf("gemma3", norms_from_one=True, windows=True, widest=62)),
    "phi3": Family("Phi3ForCausalLM", _PHI3, _GROUPED | {
        "max_position_embeddings": 4096, "sliding_window": None},
        window_every=0, ort_builds=True, gguf=Gguf("phi3", square=True, no_window=True)),
    "smollm3": Family("SmolLM3ForCausalLM", _LLAMA, _BIASED | {
        "max_position_embeddings": 32768, "tie_word_embeddings": True, "num_key_value_heads": 4,
        "sliding_window": None, "use_sliding_window": False}, ort_builds=True),
    "granite": Family("GraniteForCausalLM", _LLAMA, _BIASED, scales_residual=True, ort_builds=True),
    "gpt2": Family("GPT2LMHeadModel", _GPT2, {
        "max_position_embeddings": 1024, "hidden_act": "gelu_new", "tie_word_embeddings": True,
        "intermediate_size": None},
        _GPT2_NAMES, norm="layer", position_offset=0, assumes={"add_cross_attention": False}, conv1d=True,
        fused_as="parts", keeps_names=True),
    "gpt_neox": Family("GPTNeoXForCausalLM", _NEOX, _BASE | {
        "hidden_act": "gelu", "attention_bias": True},
        norm="layer", rotary_share=0.25, parallel=True, fused_as="heads"),
    "opt": Family("OPTForCausalLM", _OPT, {
        "max_position_embeddings": 2048, "hidden_act": "relu", "tie_word_embeddings": True,
        "word_embed_proj_dim": None, "enable_bias": True, "do_layer_norm_before": True},
        {"intermediate_size": "ffn_dim", "hidden_act": "activation_function"},
        norm="layer", position_offset=2, positions_of_rows=True, scales_query=True, inline_mlp=True,
        assumes={"layer_norm_elementwise_affine": True, "_remove_final_layer_norm": False}),
}
# of other model types, whose parameters are counted on the meta device
UNKNOWN = Family("", (), {})
# of other model types those that onnxruntime-genai 0.18 has a builder for; nobody has tried them here
OTHERS_ORT_BUILDS = ("Ernie4_5ForCausalLM", "GptOssForCausalLM", "GraniteMoeHybridForCausalLM", "InternLM2ForCausalLM",
                     "Lfm2ForCausalLM", "NemotronForCausalLM", "OlmoForCausalLM", "PhiForCausalLM")  # fmt: skip
OTHERS_IN_CONV1D = ("openai-gpt", "imagegpt", "decision_transformer", "clvp")
OTHERS_OVERFLOW_FP16 = ("gemma3", "gemma3n", "gemma3n_text")
# their steps are within 5% of those of a Llama of their widths (tests/memory/test_families.py); the rest is simulated
LIKE_LLAMA = ("olmo", "olmo2", "cohere", "phi", "starcoder2", "stablelm")


def ort_builds(architecture: str) -> bool:
    """Whether onnxruntime-genai's builder knows an architecture by its name."""
    own = (family.architecture for family in FAMILIES.values() if family.ort_builds or family.ort_problem)
    return architecture in (*own, *OTHERS_ORT_BUILDS)


def family_of(model_type: str) -> Family:
    """A family's row; for a type that is not known one that computes as Llama does."""
    return FAMILIES.get(model_type, UNKNOWN)


def in_conv1d(model_type: str) -> bool:
    return family_of(model_type).conv1d or model_type in OTHERS_IN_CONV1D


def overflows_fp16(model_type: str) -> bool:
    return family_of(model_type).overflows_fp16 or model_type in OTHERS_OVERFLOW_FP16


ESSENTIAL = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
SIZES = (*ESSENTIAL, "max_position_embeddings", "num_key_value_heads", "head_dim", "sliding_window")
SHAPE = (*SIZES, "tie_word_embeddings", "final_logit_softcapping", "attn_logit_softcapping", "hidden_act")
COPY_AGAIN = "copy config.json again from where the model came from"
# Text and vision in one config: only text_config is read. It holds just what differs from its class defaults,
# so essential keys have defaults here and nowhere else: in a flat config a guess would be a wrong plan.
COMPOSITE: dict[str, dict[str, Any]] = {
    "gemma3": {"model_type": "gemma3_text", **dict(zip(ESSENTIAL, (2304, 9216, 26, 8, 262208), strict=True))}
}
# Encoders that AutoModelForCausalLM would load all the same, although they attend both ways.
ENCODERS = frozenset(("albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra",
                      "roberta", "xlm-roberta"))
# fmt: on
