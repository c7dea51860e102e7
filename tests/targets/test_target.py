"""Do the shipped targets load, and does a wrong one say what is wrong with it?"""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT

from edgeft.errors import BadInput
from edgeft.targets.target import eight_bit_modules, list_targets, load_target, promoted


def test_shipped_targets_are_those_of_the_readme_and_tighten_with_their_bits() -> None:
    targets = {target.name: target for target in list_targets()}
    gguf = ["gguf-f16", "gguf-q4_0", "gguf-q4_k_m", "gguf-q8_0", "onnx-portable-fp32", "onnx-portable-int8"]
    assert list(targets) == [
        *gguf,
        "ort-fp16",
        "ort-fp32",
        "ort-int4",
        "ort-int4-calibrated",
        "ort-int4-mixed",
        "ort-int8",
    ]
    assert {name.partition("-")[0] for name in targets} == {"gguf", "onnx", "ort"}
    assert {target.runtime for name, target in targets.items() if name.startswith("gguf")} == {"llama.cpp"}
    portable = [target for name, target in targets.items() if name.startswith("onnx-portable")]
    assert {(target.runtime, target.opset) for target in portable} == {("onnxruntime", 18)}
    int4, int8, fp32 = targets["ort-int4"], targets["ort-int8"], targets["ort-fp32"]
    assert (int4.weight_bits, int4.block_size, int4.head_bits) == (4, 32, 8)
    for loose, tight in ((int4, int8), (int8, fp32)):
        assert loose.parity.min_top1_agreement < tight.parity.min_top1_agreement
        assert loose.parity.max_mean_kl_nats > tight.parity.max_mean_kl_nats
        assert loose.parity.max_loss_increase_nats > tight.parity.max_loss_increase_nats
        assert loose.parity.max_exact_match_drop_points > tight.parity.max_exact_match_drop_points
    assert int4.parity.max_exact_match_drop_points == 2.0  # the promise of the project's main line


def own(tmp_path: Path, change: tuple[str, str]) -> str:
    path = tmp_path / "my own.toml"
    text = (ROOT / "export" / "ort-int4.toml").read_text(encoding="utf-8")
    assert change[0] in text
    path.write_text(text.replace(*change), encoding="utf-8")
    return str(path)


def test_a_users_own_file_is_named_after_the_file(tmp_path: Path) -> None:
    target = load_target(own(tmp_path, ("block_size = 32", "block_size = 64")))
    assert (target.name, target.block_size) == ("my own", 64)


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(BadInput, match=r"^target: unknown target 'ort-int5'\n\nhint: did you mean 'ort-int[48]'\?$"):
        load_target("ort-int5")


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"nothing\.toml: no such file\n\nhint: give a file that exists"):
        load_target(str(tmp_path / "nothing.toml"))
    with pytest.raises(BadInput, match=r"cannot be read: Is a directory"):
        load_target(f"{tmp_path}/")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("block_size =", "block_sise ="), r"unknown key 'block_sise'"),
        (("head_bits", "head_bit"), r"head_bits: field required\nunknown key 'head_bit'"),
        (("min_top1_agreement", "min_top_agreement"), r"unknown key 'parity\.min_top_agreement'"),
        (("weight_bits = 4", "weight_bits = 7"), r"weight_bits: input should be 4, 5, 6, 8, 16 or 32, got 7"),
        (
            ("block_size = 32\n", "block_size = 33\n"),
            r"block_size: input should be 0, 16, 32, 64, 128 or 256, got 33",
        ),
        (("weight_bits = 4", "weight_bits = 8"), r"embedding_bits must be 32 where weight_bits is 8"),
        (
            ("head_bits = 8", "head_bits = 32"),
            r"head_bits must equal weight_bits, or be 8 where weight_bits is 4",
        ),
        (("weight_bits = 4", 'weight_bits = 4\nmethod = "k_quant"'), r"method k_quant exists for llama\.cpp only"),
        (("weight_bits = 4", "weight_bits = "), r"not valid TOML: .*line \d+"),
        (("weight_bits = 4", 'name = "x"\nweight_bits = 4'), r"key 'name' cannot be set"),
    ],
)
def test_a_wrong_file_names_itself_and_the_key(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        load_target(own(tmp_path, change))
    assert str(caught.value).startswith(str(tmp_path / "my own.toml") + ": ")
    assert "description" not in str(caught.value) and "value error" not in str(caught.value)  # nor the whole document


def test_an_unknown_key_gets_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        load_target(own(tmp_path, ("accuracy_level", "acuracy_level")))
    assert caught.value.hint == "did you mean 'accuracy_level'?"
    with pytest.raises(BadInput) as caught:
        load_target(own(tmp_path, ("min_top1_agreement", "min_top_agreement")))
    assert caught.value.hint == "did you mean 'min_top1_agreement'?"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("block_size = 32", "block_size = 64"), "block_size must be 32: llama.cpp has no other block"),
        (("weight_bits = 4", "weight_bits = 6"), "weight_bits 6 needs method k_quant"),
        (("weight_bits = 4\nmethod = \"rtn\"\nblock_size = 32\nsymmetric = true", "weight_bits = 8\nblock_size = 32\n"
          "symmetric = false"), "8 bits of llama.cpp are symmetric"),
        (('method = "rtn"', 'method = "k_quant"'), "k_quant of llama.cpp has weight_bits 4, 5 or 6 and block_size 256"),
        (('method = "rtn"\nblock_size = 32', 'method = "k_quant"\nblock_size = 256\nmixed_layers = true'),
         "k_quant of llama.cpp mixes layers itself"),
        (('runtime = "llama.cpp"', 'runtime = "ort-genai"'), "embedding_bits must be 4 or 32 where weight_bits is 4"),
    ],
)  # fmt: skip
def test_what_llama_cpp_cannot_hold_is_refused(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "mine.toml"
    text = (ROOT / "export" / "gguf-q4_0.toml").read_text(encoding="utf-8")
    assert change[0] in text
    path.write_text(text.replace(*change), encoding="utf-8")
    with pytest.raises(BadInput, match=message.replace(".", r"\.")):
        load_target(str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("weight_bits = 8", "weight_bits = 4"), "runtime onnxruntime has weight_bits and head_bits 32 or 8"),
        (("block_size = 0", "block_size = 32"), "rounds each output to nearest with a zero point: block_size 0"),
        (("opset = 18", "opset = 17"), "runtime onnxruntime needs an opset of at least 18"),
        (
            ('runtime = "onnxruntime"', 'runtime = "ort-genai"'),
            "block_size 0 and opset are for the runtime onnxruntime",
        ),
    ],
)
def test_what_portable_onnx_cannot_hold_is_refused(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "mine.toml"
    text = (ROOT / "export" / "onnx-portable-int8.toml").read_text(encoding="utf-8")
    assert change[0] in text
    path.write_text(text.replace(*change), encoding="utf-8")
    with pytest.raises(BadInput, match=message):
        load_target(str(path))


NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_promoted_modules_are_named_as_in_a_checkpoint_or_by_their_layer() -> None:
    int4 = load_target("ort-int4")
    chosen = promoted(int4, ["model.layers.1.self_attn.v_proj", "layers.0"])
    assert eight_bit_modules(chosen, 2, NAMES) == ("layers.1.v_proj", *(f"layers.0.{name}" for name in NAMES))
    assert promoted(int4, []) == int4 and eight_bit_modules(int4, 2, NAMES) == ()
    for wrong in ("layers.2.v_proj", "layers.1.w_proj", "v_proj", "layers.x"):
        with pytest.raises(BadInput, match=rf"^eight_bit: no such module: {wrong}\n\nhint: "):
            eight_bit_modules(promoted(int4, [wrong]), 2, NAMES)
    with pytest.raises(BadInput, match=r"^target ort-int8: .*promote to 8 bits: weight_bits must be less"):
        promoted(load_target("ort-int8"), ["layers.0"])


def test_the_mix_is_the_outer_eighths_and_every_third_layer() -> None:
    found = eight_bit_modules(load_target("ort-int4-mixed"), 16, NAMES)
    layers = sorted({int(name.split(".")[1]) for name in found})
    assert layers == [0, 1, 4, 7, 10, 13, 14, 15]
    assert {name.split(".")[2] for name in found} == {"v_proj", "down_proj"} and len(found) == 16


def test_targets_load_without_torch_or_a_runtime() -> None:
    code = (
        "import sys, edgeft.targets.target; edgeft.targets.target.list_targets(); "
        "print(sorted({'torch', 'transformers', 'onnxruntime_genai', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
