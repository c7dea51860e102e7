"""Does a GGUF file hold the checkpoint, tensor for tensor and token for token, and does llama.cpp compute the same?"""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import MODELS, PROMPTS, ROWS, SHAPE, checkpoint, model_folder, save_tokenizer, workplace
from runtimes import PARTS, dequantised, tensors
from tiny import EXAMPLE
from transformers import AutoConfig, AutoModelForCausalLM

from edgeft.data.dataset import TextTokenizer
from edgeft.errors import BadInput, MissingExtra
from edgeft.exporting.build import build_bundle
from edgeft.exporting.bundle import Bundle, GoldenInput, Measurement, measurement_path
from edgeft.exporting.sign import keygen, sign
from edgeft.machines.runner import runner_module
from edgeft.models.spec import read_model_spec
from edgeft.targets.footprint import bundle_weights
from edgeft.targets.target import Target, load_target

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed: pip install edgeft[gguf]")

from edgeft.targets.gguf_file import build_model, read_weights, write_limits  # noqa: E402 - needs what was just asked for
from edgeft.targets.gguf_tokenizer import name_of_cut  # noqa: E402

try:
    import llama_cpp
except ImportError:
    llama_cpp = None
needs_llama = pytest.mark.skipif(
    llama_cpp is None, reason="llama-cpp-python is not installed: pip install edgeft[llama]"
)

FULL = Target.model_validate(
    load_target("gguf-f16").model_dump() | {"weight_bits": 32, "head_bits": 32, "embedding_bits": 32}
)


@functools.cache
def torch_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@functools.cache
def written(kind: str, name: str = "full") -> tuple[Path, Any]:
    """(folder with model.gguf, what it weighs) for one of MODELS and a shipped target, or FULL."""
    folder = workplace() / f"written {kind} {name}"
    folder.mkdir()
    target = FULL if name == "full" else load_target(name)
    source = model_folder(kind)
    build_model(source, target, read_model_spec(str(source)), folder)
    return folder, read_weights(folder)


def keys(folder: Path) -> dict[str, Any]:
    reader = gguf.GGUFReader(str(folder / "model.gguf"))
    return {name: field.contents() for name, field in reader.fields.items()}


def expected_tensors(kind: str) -> dict[str, np.ndarray]:
    """The checkpoint's tensors under llama.cpp's names, by a table and index arithmetic of this test's own."""
    state = {name: value.float().numpy() for name, value in torch_model(model_folder(kind)).state_dict().items()}
    gemma, found = kind.startswith("gemma"), {}
    after = {"post_attention_layernorm": "post_attention_norm" if kind in ("gemma2", "gemma3") else "ffn_norm",
             "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm"}  # fmt: skip
    for name, value in state.items():
        if name == "lm_head.weight" and (gemma or MODELS[kind].get("tie_word_embeddings")):
            continue
        value = value + 1 if gemma and name.endswith("norm.weight") else value
        if name.startswith("model.layers."):
            _, _, layer, *middle, end = name.split(".")
            own = (PARTS | after)[".".join(middle)]
            if kind in ("llama", "llama3", "mistral") and own in ("attn_q", "attn_k"):
                heads = 4 if own == "attn_q" else 2
                rows = [h * 32 + half * 16 + i for h in range(heads) for i in range(16) for half in (0, 1)]
                value = value[rows]
            found[f"blk.{layer}.{own}.{end}"] = value
        else:
            plain = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
            found[f"{plain[name.removesuffix('.weight')]}.weight"] = value
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_every_tensor_is_the_checkpoints(kind: str) -> None:
    folder, weights = written(kind)
    given, expected = tensors(folder), expected_tensors(kind)
    factors = given.pop("rope_freqs.weight", None)
    assert (factors is not None) == (kind == "llama3")
    assert set(given) == set(expected)
    for name, value in expected.items():
        assert np.array_equal(given[name], value), name
    # in fp32: four bytes for each parameter, counted from the config by other code
    own = 0 if factors is None else factors.nbytes
    assert weights.stored_bytes == 4 * read_model_spec(str(model_folder(kind))).total_parameters + own


@pytest.mark.parametrize("kind", MODELS)
def test_the_keys_say_what_the_config_says(kind: str) -> None:
    found, config = keys(written(kind)[0]), torch_model(model_folder(kind)).config
    name = {"llama3": "llama", "mistral": "llama", "qwen2 yarn": "qwen2"}.get(kind, kind)
    assert found["general.architecture"] == name
    expected = {
        "context_length": 512, "embedding_length": 64, "block_count": 3, "feed_forward_length": 96,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": read_model_spec(
            str(model_folder(kind))).head_dim, "vocab_size": config.vocab_size,
    }  # fmt: skip
    assert {key: found[f"{name}.{key}"] for key in expected} == expected
    assert found[f"{name}.attention.layer_norm_rms_epsilon"] == pytest.approx(config.rms_norm_eps)
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    tokenizer = TextTokenizer(model_folder(kind))
    assert found["tokenizer.ggml.tokens"] == [tokenizer.backend.id_to_token(i) for i in range(config.vocab_size)]
    assert found["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]  # three special tokens
    assert (found["tokenizer.ggml.eos_token_id"], found["tokenizer.ggml.eot_token_id"]) == (0, 2)
    assert found["tokenizer.chat_template"] == tokenizer.template_text
    if kind in ("gemma2", "gemma3"):
        assert found[f"{name}.attention.sliding_window"] == 16
        pattern = [True, False, True] if kind == "gemma2" else [True, True, False]
        assert found[f"{name}.attention.sliding_window_pattern"] == pattern


LEVELS = {"Q4_0": 8, "Q8_0": 127, "F16": 2**10}  # the largest value of a block in steps


@pytest.mark.parametrize("name", ["gguf-q4_0", "gguf-q8_0", "gguf-f16"])
def test_quantised_tensors_are_the_checkpoints_within_half_a_step(name: str) -> None:
    folder, weights = written("qwen3", name)
    reader = gguf.GGUFReader(str(folder / "model.gguf"))
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    body = {"gguf-q4_0": "Q4_0", "gguf-q8_0": "Q8_0", "gguf-f16": "F16"}[name]
    given = tensors(folder)
    for tensor, value in expected_tensors("qwen3").items():
        if value.ndim == 1:
            assert types[tensor] == "F32" and np.array_equal(given[tensor], value)
            continue
        kind = "Q8_0" if tensor in ("output.weight", "token_embd.weight") and body == "Q4_0" else body
        assert types[tensor] == kind, tensor
        blocks = value.reshape(-1, 32)
        largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[:, None], -1)
        steps = np.abs(given[tensor].reshape(-1, 32) - blocks) / np.maximum(np.abs(largest) / LEVELS[kind], 1e-12)
        rounded = LEVELS[kind] * 2**-11  # the scale itself is fp16
        # Q4_0 counts from -8 to 7, the largest value being -8: up to one step is cut off the other end
        cut = (blocks / np.where(largest == 0, 1, largest) < -7.5 / 8) & (kind == "Q4_0")
        assert (steps <= np.where(cut, 1, 0.5) + rounded).all(), tensor
    block = {"Q4_0": 18 / 32, "Q8_0": 34 / 32, "F16": 2}
    spec = read_model_spec(str(model_folder("qwen3")))
    tables = 2 * spec.embedding_parameters * (block["Q8_0"] if body == "Q4_0" else block[body])
    layers = sum(linear.parameters for linear in spec.linears) * 3 * block[body]
    norms = 4 * (3 * spec.norm_parameters_per_layer + 64)
    assert weights.stored_bytes == tables + layers + norms
    assert weights.head_bytes == tables / 2 == weights.stored_bytes - weights.bytes_per_token


def test_promoted_modules_get_eight_bits(tmp_path: Path) -> None:
    source = model_folder("phi3")
    target = load_target("gguf-q4_0").model_copy(update={"eight_bit": ("model.layers.1.mlp.gate_up_proj", "layers.2")})
    build_model(source, target, read_model_spec(str(source)), tmp_path)
    found = {t.name: t.tensor_type.name for t in gguf.GGUFReader(str(tmp_path / "model.gguf")).tensors}
    eight = {name for name, kind in found.items() if kind == "Q8_0" and name.startswith("blk.")}
    parts = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
    assert eight == {"blk.1.ffn_up.weight", *(f"blk.2.{part}.weight" for part in parts)}


def test_the_context_limit_is_written_into_the_file(tmp_path: Path) -> None:
    shutil.copyfile(written("llama")[0] / "model.gguf", tmp_path / "model.gguf")
    before = tensors(tmp_path)
    write_limits(tmp_path, 200, [0, 2])
    assert keys(tmp_path)["llama.context_length"] == 200
    assert all(np.array_equal(value, before[name]) for name, value in tensors(tmp_path).items())


def logits(folder: Path, kind: str, ids: list[int]) -> Any:
    """llama.cpp's logits of a bare file, by the runner's own engine."""
    runner = runner_module()
    engine = runner.LlamaCpp(folder, {"context_tokens": 512, "stop_ids": [0]})
    return engine.start(len(ids)).append(ids, every=True)


@needs_llama
@pytest.mark.parametrize("kind", MODELS)
def test_llama_cpp_computes_what_torch_does(kind: str) -> None:
    ids = TextTokenizer(model_folder(kind)).encode([" ".join(ROWS[:10])])[0][:150]  # beyond windows and scalings
    with torch.no_grad():
        expected = torch_model(model_folder(kind))(torch.tensor([ids])).logits[0].numpy()
    given = logits(written(kind)[0], kind, ids)
    # keys and values are kept in fp16: 2^-11 of each, through three layers of large weights; 0.2% and 3% measured
    assert np.sqrt(np.mean((given - expected) ** 2)) < 0.01 * expected.std()
    assert np.abs(given - expected).max() < 0.1 * expected.std()
    assert (given.argmax(-1) == expected.argmax(-1)).mean() > 0.98


# -- the tokenizer ----------------------------------------------------------------------------------------------------

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "naïve?  12.5%\n\n→ 日本語 🙂"}]
TEXTS = [
    *ROWS[:40],
    MESSAGES[1]["content"],
    "<|im_start|>user\n x<|im_end|>",
    "  a\tb\r\n 12345 it's I'LL",
    "\n\n\n",
    "e\u0301",
]


def cut(**changes: Any) -> dict[str, Any]:
    held: dict[str, Any] = {
        "model": {"type": "BPE", "ignore_merges": False}, "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    }  # fmt: skip
    return held | changes


def split(expression: str) -> dict[str, Any]:
    behaviour = {"behavior": "Isolated", "invert": False}
    steps = [
        {"type": "Split", "pattern": {"Regex": expression}, **behaviour},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]
    return {"type": "Sequence", "pretokenizers": steps}


LLAMA3_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_CUT = LLAMA3_CUT.replace("{1,3}", "")


def test_cuts_are_known_by_what_they_do() -> None:
    path = Path("tokenizer.json")
    digits = {"type": "Digits", "individual_digits": True}
    words = cut()["pre_tokenizer"]
    assert name_of_cut(path, cut()) == "gpt-2"
    both = {"type": "Sequence", "pretokenizers": [digits, words]}
    assert name_of_cut(path, cut(pre_tokenizer=both)) == "smollm"
    assert name_of_cut(path, cut(pre_tokenizer=split(QWEN_CUT), normalizer={"type": "NFC"})) == "qwen2"
    assert name_of_cut(path, cut(pre_tokenizer=split(LLAMA3_CUT))) == "dbrx"
    whole = {"type": "BPE", "ignore_merges": True}
    assert name_of_cut(path, cut(pre_tokenizer=split(LLAMA3_CUT), model=whole)) == "llama-bpe"
    for changes, message in (
        ({"pre_tokenizer": split(r"\d+")}, r"llama\.cpp's way to cut text like .* is not known here"),
        ({"pre_tokenizer": words | {"add_prefix_space": True}}, r"way to cut text like \['ByteLevel'\]"),
        ({"normalizer": {"type": "Lowercase"}}, r"llama\.cpp has no normalizer Lowercase"),
        ({"model": whole}, r"knows ignore_merges not with the cut 'gpt-2'"),
    ):
        with pytest.raises(BadInput, match=message):
            name_of_cut(path, cut(**changes))


@functools.cache
def with_tokenizer(kind: str) -> Path:
    """The Llama of MODELS with another tokenizer: byte-level with other cuts, or one like sentencepiece's."""
    folder = workplace() / f"tokenizer {kind}"
    shutil.copytree(model_folder("llama"), folder)
    path = folder / "tokenizer.json"
    held = json.loads(path.read_text(encoding="utf-8"))
    if kind in ("llama-bpe", "qwen2", "smollm"):
        digits = {"type": "Digits", "individual_digits": True}
        held["pre_tokenizer"] = {
            "llama-bpe": split(LLAMA3_CUT), "qwen2": split(QWEN_CUT),
            "smollm": {"type": "Sequence", "pretokenizers": [digits, held["pre_tokenizer"]]},
        }[kind]  # fmt: skip
        held["model"]["ignore_merges"] = kind == "llama-bpe"
    else:
        space = kind == "spm"  # Llama 2 puts a space in front, Gemma does not
        words = sorted({"▁" + word for row in ROWS[:200] for word in row.split()}, key=lambda word: (len(word), word))
        pieces: dict[str, None] = {}
        for word in words[:60]:
            pieces |= {word[:end]: None for end in range(2, len(word) + 1)}
        letters = sorted({letter for row in ROWS for letter in row if letter.isascii() and letter != " "} | {"▁"})
        names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
        vocabulary = {name: i + 3 for i, name in enumerate(dict.fromkeys([*names, *list(pieces)[:150]]))}
        known = list(pieces)[:150]
        merges = [
            [piece[:at], piece[at:]] for piece in known for at in range(1, len(piece))
            if piece[:at] in vocabulary and piece[at:] in vocabulary
        ]  # fmt: skip
        specials = {token["content"]: token["id"] for token in held["added_tokens"]}
        held["model"] |= {"vocab": specials | vocabulary, "merges": merges, "byte_fallback": True, "fuse_unk": True,
                          "unk_token": "<unk>"}  # fmt: skip
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        held["normalizer"] = replace
        held["pre_tokenizer"] = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
                                 "invert": False}  # fmt: skip
        if space:
            held["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
            held["pre_tokenizer"] = None
        fallback = [{"type": "ByteFallback"}, {"type": "Fuse"}]
        held["decoder"] = {"type": "Sequence", "decoders": [replace | {"pattern": {"String": "▁"}, "content": " "},
                                                            *fallback]}  # fmt: skip
    path.write_text(json.dumps(held), encoding="utf-8")
    return folder


KINDS = ["smollm", "qwen2", "llama-bpe", "spm", "gemma spm"]


@functools.cache
def written_tokenizer(kind: str) -> Path:
    folder = workplace() / f"vocabulary {kind}"
    folder.mkdir()
    source = with_tokenizer(kind)
    build_model(source, load_target("gguf-q8_0"), read_model_spec(str(source)), folder)
    return folder


@needs_llama
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_encodes_and_renders_as_the_checkpoints_tokenizer(kind: str) -> None:
    tokenizer = TextTokenizer(with_tokenizer(kind))
    engine = runner_module().LlamaCpp(written_tokenizer(kind), {"context_tokens": 512, "stop_ids": [0]})
    # composed and not: llama.cpp leaves NFC out, which none of these has
    for text, ids in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        assert engine.encode(text) == ids, text
    assert engine.render(MESSAGES) == tokenizer.render(MESSAGES, add_generation_prompt=True)
    piece = engine.decoder()
    text = "Größe: naïve → 12.5%\n 🙂"
    assert "".join(piece(token) for token in engine.encode(text)).lstrip(" ") == text


def test_sentencepiece_scores_follow_the_merges() -> None:
    found = keys(written_tokenizer("spm"))
    model = json.loads((with_tokenizer("spm") / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens, scores, types = (found[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    made = {"".join(pair): rank for rank, pair in reversed(list(enumerate(model["merges"])))}
    assert {token: -score for token, score in zip(tokens, scores, strict=True) if token in made} == made
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.add_space_prefix"] is True
    assert keys(written_tokenizer("gemma spm"))["tokenizer.ggml.add_space_prefix"] is False
    by_token = dict(zip(tokens, types, strict=True))
    assert (by_token["<unk>"], by_token["<0x41>"], by_token["<|im_end|>"], by_token["▁"]) == (2, 6, 3, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda held: held["model"].update(type="Unigram", vocab=[["<unk>", 0.0], ["x", -1.0]], unk_id=0),
            "a Unigram tokenizer is not written to GGUF here",
        ),
        (
            lambda held: held["model"].update(byte_fallback=True),
            "a byte-fallback BPE that was not made by sentencepiece",
        ),
        (lambda held: held["added_tokens"][1].update(rstrip=True), "does not strip the text around <|im_start|>"),
        (lambda held: held["model"]["vocab"].update(new=5000), "token 5000 has no row in the embedding of 600 rows"),
    ],
)
def test_a_tokenizer_llama_cpp_would_not_reproduce_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    shutil.copytree(model_folder("llama"), tmp_path / "m")
    path = tmp_path / "m" / "tokenizer.json"
    held = json.loads(path.read_text(encoding="utf-8"))
    change(held)
    path.write_text(json.dumps(held), encoding="utf-8")
    with pytest.raises(BadInput, match=message.replace("|", r"\|")):
        build_model(tmp_path / "m", load_target("gguf-q8_0"), read_model_spec(str(tmp_path / "m")), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2"}, "does not hold the model of its config.json"),  # Qwen3's norms are left over
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rotary scaling 'dynamic'"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 99}, "query_pre_attn_scalar 99, llama.cpp computes with 32"),
    ],
)
def test_a_model_llama_cpp_would_not_reproduce_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = tmp_path / "m"
    shutil.copytree(model_folder("gemma2" if "gemma2" in change.values() else "qwen3"), folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
    with pytest.raises(BadInput, match=message):
        build_model(folder, load_target("gguf-q8_0"), read_model_spec(str(folder)), tmp_path)


def test_a_family_that_the_writer_does_not_know_is_refused(tmp_path: Path) -> None:
    given = SHAPE | {"vocab_size": save_tokenizer(tmp_path), "model_type": "olmo2"}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**given)).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="the GGUF writer does not know the model type 'olmo2'"):
        build_model(tmp_path, load_target("gguf-q8_0"), read_model_spec(str(tmp_path)), tmp_path)


def test_heads_wider_than_llama_cpp_assumes_are_refused(tmp_path: Path) -> None:
    given = SHAPE | {"vocab_size": save_tokenizer(tmp_path)} | MODELS["qwen2"] | {"head_dim": 32}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**given)).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=r"4 heads of 32 are not the hidden size, 64, as llama\.cpp assumes for qwen2"):
        build_model(tmp_path, load_target("gguf-q8_0"), read_model_spec(str(tmp_path)), tmp_path)


# -- the bundle -------------------------------------------------------------------------------------------------------


@functools.cache
def gguf_bundle(name: str) -> Path:
    out = workplace() / f"bundle of {name}"
    build_bundle(checkpoint(), load_target(name), out, prompts=PROMPTS, device_memory_bytes=2**30)
    return out


@needs_llama
@pytest.mark.parametrize("name", ["gguf-f16", "gguf-q8_0", "gguf-q4_0", "gguf-q4_k_m"])
def test_a_gguf_bundle_verifies_and_its_predicted_memory_holds(name: str) -> None:
    made = Bundle.read(gguf_bundle(name) / "bundle.json")
    assert runner_module().verify(gguf_bundle(name)) == []
    assert set(made.files) == {"run.py", "model.gguf", "sbom.cdx.json"}
    assert made.predicted.kv_cache_bytes == 2 * 2 * 1 * 32 * 2 * 512  # K and V, layers, heads, head_dim, fp16
    here = Measurement.read(measurement_path(gguf_bundle(name)))
    assert here.predicted_here_bytes == pytest.approx(here.measured.peak_memory_bytes, rel=0.25)
    assert made.versions["gguf"] and made.versions["llama-cpp-python"]
    assert (made.stop_ids, keys(gguf_bundle(name))["llama.context_length"]) == ([0, 2], 512)
    assert [len(golden.top_ids) for golden in made.golden] == [8, 8, 8]


def test_gemma_3_is_refused_where_its_builder_fails(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"cannot build Gemma 3: .*\n\nhint: choose an onnx-portable- or a gguf- target"):
        build_bundle(model_folder("gemma3"), load_target("ort-int4"), tmp_path / "b", prompts=[])


@needs_llama
@pytest.mark.parametrize("name", ["gguf-q8_0", "gguf-q4_k_m"])
def test_the_same_checkpoint_gives_the_same_bytes_and_they_can_be_signed(tmp_path: Path, name: str) -> None:
    again = tmp_path / "again"
    build_bundle(checkpoint(), load_target(name), again, prompts=PROMPTS, device_memory_bytes=2**30, measure=False)
    first = {path.name: path.read_bytes() for path in gguf_bundle(name).iterdir()}
    assert {path.name: path.read_bytes() for path in again.iterdir()} == first
    pytest.importorskip("cryptography")
    keygen(tmp_path / "mine.key")
    sign(again, tmp_path / "mine.key")
    runner = runner_module()
    key = runner.read_public_key(tmp_path / "mine.key.pub")
    assert runner.verify(again, key) == []
    (again / "model.gguf").write_bytes(first["model.gguf"][:-1] + bytes([first["model.gguf"][-1] ^ 1]))
    assert runner.verify(again, key)[0] == "model.gguf: changed since the export"


@needs_llama
def test_a_changed_weight_or_another_tokenizer_is_found(tmp_path: Path) -> None:
    shutil.copytree(gguf_bundle("gguf-q8_0"), tmp_path / "b")
    path = tmp_path / "b" / "model.gguf"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 64
    path.write_bytes(data)
    assert runner_module().verify(tmp_path / "b") == [
        "model.gguf: changed since the export", "golden vectors: not replayed, the files above come first",
    ]  # fmt: skip


@needs_llama
@pytest.mark.parametrize(("name", "share", "nats"), [("full", 0.999, 0.01), ("gguf-q8_0", 0.99, 0.1)])
def test_greedy_answers_are_those_of_torch_on_the_dequantised_weights(
    tmp_path: Path, name: str, share: float, nats: float
) -> None:
    """64 tokens for each of 20 prompts on the example's model.

    A step may differ where torch has two tokens nearly level: llama.cpp keeps keys and values in fp16 (one step of
    1,280 measured in fp32, 0.003 nats), and with 8-bit weights rounds activations to 8 bits too (5 steps, 0.05 nats).
    """
    target = FULL if name == "full" else load_target(name)
    build_model(EXAMPLE, target, read_model_spec(str(EXAMPLE)), tmp_path)
    model = dequantised(tmp_path)
    engine = runner_module().LlamaCpp(tmp_path, {"context_tokens": 512, "stop_ids": [0]})
    equal = 0
    for ids in TextTokenizer(EXAMPLE).encode([row[:200] for row in ROWS[:20]]):
        session, made = engine.start(len(ids) + 64), []
        last = session.append(ids)
        for _ in range(64):
            made.append(int(last.argmax()))
            last = session.append(made[-1:])
        with torch.no_grad():
            steps = torch.log_softmax(model(torch.tensor([ids + made])).logits[0, len(ids) - 1 : -1], -1)
        behind = steps.amax(-1) - steps.gather(1, torch.tensor(made)[:, None])[:, 0]
        equal += int((behind == 0).sum())
        assert float(behind.max()) < nats
    assert equal >= share * 20 * 64


def test_a_missing_runtime_is_named_before_anything_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "llama_cpp" else found(name))
    with pytest.raises(
        MissingExtra, match=r"llama-cpp-python: is not installed, and target gguf-q8_0 runs in it"
    ) as why:
        build_bundle(checkpoint(), load_target("gguf-q8_0"), tmp_path / "b", prompts=[GoldenInput(text="x")])
    assert why.value.exit_code == 5 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["gguf-f16", "gguf-q4_0", "gguf-q8_0", "gguf-q4_k_m"])
def test_what_a_file_will_weigh_is_known_before_it_is_written(name: str, tmp_path: Path) -> None:
    target, spec = load_target(name), read_model_spec(str(EXAMPLE))
    if target.method == "k_quant" and llama_cpp is None:
        pytest.skip("llama-cpp-python is not installed: pip install edgeft[llama]")
    build_model(EXAMPLE, target, spec, tmp_path)
    assert read_weights(tmp_path) == bundle_weights(spec, target)
