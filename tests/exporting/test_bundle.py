"""Does a bundle hold the model that was merged, in all three shipped targets, and say what it needs?"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from bundles import PROMPTS, bundle, checkpoint, reference, save_tokenizer, some_ids, torch_logits
from tiny import CHAT_TEMPLATE, ROOT
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from edgeft.data.dataset import TextTokenizer
from edgeft.documents import sha256_file
from edgeft.errors import BadInput, DoesNotFit, ParityFailed
from edgeft.exporting.artifact import ArtifactModel
from edgeft.exporting.build import build_bundle
from edgeft.exporting.bundle import (
    Bundle,
    GoldenInput,
    Measurement,
    measurement_path,
)
from edgeft.exporting.golden import record
from edgeft.machines.runner import runner_module
from edgeft.models.spec import read_model_spec
from edgeft.targets.footprint import bundle_weights, choose_context, kv_cache_bytes_per_token, predict
from edgeft.targets.ort import read_weights
from edgeft.targets.target import Target, load_target


def mean_kl(ids: list[int], name: str) -> float:
    """Mean KL(torch || artifact) in nats per position."""
    expected = torch.log_softmax(torch.tensor(torch_logits(ids)), -1)
    given = torch.log_softmax(torch.tensor(ArtifactModel(bundle(name)).logits(ids)), -1)
    return float((expected.exp() * (expected - given)).sum(-1).mean())


@pytest.mark.parametrize("name", ["ort-int4", "ort-int4-mixed", "ort-int8", "ort-fp16", "ort-fp32"])
def test_a_bundle_of_each_target_verifies_and_says_where_it_comes_from(name: str) -> None:
    made = Bundle.read(bundle(name) / "bundle.json")
    assert runner_module().verify(bundle(name)) == []
    assert made.target == load_target(name)
    assert (made.input_sha256, made.provenance) == ("ab" * 32, {"merged": "cd" * 32})
    assert set(made.files) == {
        "run.py", "README.md", "model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "sbom.cdx.json",
    }  # fmt: skip
    assert {path.name for path in bundle(name).iterdir()} == {*made.files, "bundle.json"}
    for file in ("tokenizer.json", "chat_template.jinja"):
        assert made.files[file].sha256 == sha256_file(checkpoint() / file)
    assert (bundle(name) / "run.py").read_bytes() == (ROOT / "export/run.py").read_bytes()
    assert made.size_bytes == sum(path.stat().st_size for path in bundle(name).iterdir() if path.name in made.files)
    assert (made.context_tokens, made.context_limited_by) == (512, "model")
    assert made.predicted.kv_cache_bytes == 2 * 2 * 1 * 32 * 4 * 512  # K and V, layers, heads, head_dim, fp32
    assert made.predicted.tokens_per_second_bound == 1e9 / made.weight_bytes_per_token
    here = Measurement.read(measurement_path(bundle(name)))
    assert here.input_sha256 == sha256_file(bundle(name) / "bundle.json")
    assert here.predicted_here_bytes == pytest.approx(here.measured.peak_memory_bytes, rel=0.25)
    assert made.versions["onnxruntime-genai"]


def test_fp32_artifact_gives_the_logits_of_torch() -> None:
    ids = some_ids(300)  # more than one prefill pass
    assert runner_module().PREFILL_TOKENS < 300
    model = ArtifactModel(bundle("ort-fp32"))
    given = model.logits(ids)
    assert given.dtype == np.float32 and given.shape == (300, reference().config.vocab_size)
    assert np.abs(given - torch_logits(ids)).max() < 1e-3
    assert np.abs(model.logits(ids[:1]) - torch_logits(ids[:1])).max() < 1e-3


def test_fp32_artifact_continues_as_torch_does_and_stops_at_any_end_token() -> None:
    model, prompt = ArtifactModel(bundle("ort-fp32")), some_ids(20)
    expected = list(prompt)
    for _ in range(12):
        expected.append(int(torch_logits(expected)[-1].argmax()))
    made = model.greedy(prompt, 12, [])
    assert made == expected[20:]
    assert model.greedy(prompt, 12, [made[3]]) == made[: made.index(made[3])]
    assert model.greedy(prompt, 1, []) == made[:1]


def test_more_bits_are_closer_to_torch_and_take_more_room() -> None:
    ids = some_ids(200)
    int4, int8, fp32 = (mean_kl(ids, name) for name in ("ort-int4", "ort-int8", "ort-fp32"))
    # activations of 8 bits on random weights: a trained model's KL is a thousandth of it (export/*.toml)
    assert abs(fp32) < 1e-6 < int8 < int4 / 2
    sizes = [Bundle.read(bundle(name) / "bundle.json").weight_bytes_per_token for name in
             ("ort-int4", "ort-int8", "ort-fp32")]  # fmt: skip
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("name", ["ort-int4", "ort-int4-mixed", "ort-int8", "ort-fp16", "ort-fp32"])
def test_what_a_bundle_will_weigh_is_known_before_it_is_built(name: str) -> None:
    assert read_weights(bundle(name)) == bundle_weights(read_model_spec(str(checkpoint())), load_target(name))


def test_an_export_says_what_its_two_processes_took() -> None:
    made = Measurement.read(measurement_path(bundle("ort-fp32")))
    assert made.measured_peak_bytes is not None and made.measured_peak_bytes > 400_000_000  # two Pythons with torch


@pytest.mark.parametrize("name", ["ort-int4", "ort-int8"])
def test_tied_embeddings_are_stored_once_with_eight_bits(name: str) -> None:
    weights = read_weights(bundle(name))
    values = reference().config.vocab_size * 64
    # a byte each, and per block of 32 an fp32 scale and a zero point of a byte
    assert weights.head_bytes == values + values // 32 * (4 + 1)
    rotary = 2 * 512 * 16 * 4  # cosines and sines: positions x half a head in fp32
    assert weights.stored_bytes - weights.bytes_per_token == rotary  # and no embedding of its own


def test_embeddings_that_are_not_tied_get_four_bits_and_are_not_read_per_token(tmp_path: Path) -> None:
    made = build_bundle(
        checkpoint(tied=False), load_target("ort-int4"), tmp_path / "b", prompts=PROMPTS[:1], measure=False
    )
    assert runner_module().verify(tmp_path / "b") == []
    weights = read_weights(tmp_path / "b")
    assert weights == bundle_weights(read_model_spec(str(checkpoint(tied=False))), load_target("ort-int4"))
    values = reference().config.vocab_size * 64
    embedding = values // 2 + values // 32 * 4 + values // 32 // 2  # half a byte each, fp32 scales, 4-bit zero points
    rotary = 2 * 512 * 16 * 4
    assert made.weight_bytes_per_token == weights.bytes_per_token == weights.stored_bytes - embedding - rotary


def bits_of_matmuls(folder: Path) -> dict[str, int]:
    import onnx

    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    found = {}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            bits = next(attribute.i for attribute in node.attribute if attribute.name == "bits")
            found[node.name.rpartition("/MatMul")[0].removeprefix("/").removeprefix("model/")] = bits
    return found  # layers.0/attn/q_proj, and lm_head


def test_named_layers_and_the_mix_get_eight_bits_and_nothing_else(tmp_path: Path) -> None:
    mixed = bits_of_matmuls(bundle("ort-int4-mixed"))
    sensitive = ("v_proj", "down_proj", "lm_head")  # of two layers both are outer ones
    assert len(mixed) == 15
    assert mixed == {name: 8 if name.endswith(sensitive) else 4 for name in mixed}
    chosen = load_target("ort-int4").model_copy(update={"eight_bit": ("model.layers.1.self_attn.q_proj", "layers.0")})
    build_bundle(checkpoint(), chosen, tmp_path / "b", prompts=PROMPTS[:1], measure=False)
    named = bits_of_matmuls(tmp_path / "b")
    assert named == {
        name: 8 if name.startswith("layers.0/") or name in ("layers.1/attn/q_proj", "lm_head") else 4 for name in named
    }
    assert mean_kl(some_ids(200), "ort-int4-mixed") < mean_kl(some_ids(200), "ort-int4")


def test_fp16_stores_half_and_computes_in_fp32(tmp_path: Path) -> None:
    sizes = {name: (bundle(name) / "model.onnx.data").stat().st_size for name in ("ort-fp16", "ort-fp32")}
    assert sizes["ort-fp16"] < 0.75 * sizes["ort-fp32"]  # norms and rotary tables stay
    assert read_weights(bundle("ort-fp16")) == read_weights(bundle("ort-fp32"))
    rounded = AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in rounded.parameters():
            if parameter.ndim == 2:
                parameter.copy_(parameter.half())
        expected = rounded(torch.tensor([some_ids(100)])).logits[0].numpy()
    assert np.abs(ArtifactModel(bundle("ort-fp16")).logits(some_ids(100)) - expected).max() < 1e-3


def test_weights_beyond_fp16_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "large"
    shutil.copytree(checkpoint(), folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 7e4
    model.save_pretrained(folder)
    with pytest.raises(
        BadInput, match=r"up_proj.*has values beyond the range of fp16\n\nhint: export with --target ort-"
    ):
        build_bundle(folder, load_target("ort-fp16"), tmp_path / "out", prompts=[])


def test_golden_vectors_are_what_training_would_feed_and_the_artifact_answers() -> None:
    made = Bundle.read(bundle("ort-int4") / "bundle.json")
    tokenizer = TextTokenizer(checkpoint())
    assert [golden.plain for golden in made.golden] == [True, True, False]
    assert made.golden[2].text == tokenizer.render(PROMPTS[2].messages or [], add_generation_prompt=True)
    model = ArtifactModel(bundle("ort-int4"))
    for golden in made.golden:
        assert golden.ids == tokenizer.encode([golden.text])[0]
        last = model.logits(golden.ids)[-1]
        assert golden.top_ids[0] == int(last.argmax())
        assert golden.top_logits == pytest.approx([last[token] for token in golden.top_ids], abs=1e-5)
        assert golden.greedy_ids == model.greedy(golden.ids, len(golden.greedy_ids), [])
    assert any(golden.greedy_ids for golden in made.golden)


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
def test_the_runtime_gets_the_template_as_training_read_it(name: str, tmp_path: Path) -> None:
    """Wherever the checkpoint keeps it, with other line ends or comments: not every runtime trims around them."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint(), folder)
    (folder / "chat_template.jinja").unlink()
    text = "{# a note\n of two lines #}\n" + CHAT_TEMPLATE
    text = json.dumps({"chat_template": text}) if name.endswith(".json") else text.replace("\n", "\r\n")
    (folder / name).write_bytes(text.encode())
    messages = [{"role": "user", "content": "one?"}]
    made = build_bundle(
        folder, load_target("ort-fp32"), tmp_path / "bundle", prompts=[GoldenInput(messages=messages)],
        prompt_format="chat", measure=False,
    )  # fmt: skip
    assert (
        made.golden[0].text
        == TextTokenizer(folder).render(messages, True)
        == TextTokenizer(checkpoint()).render(messages, True)
    )
    assert runner_module().verify(tmp_path / "bundle") == []


def test_tools_reach_the_template_on_the_device_as_in_training(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint(), folder)
    template = "{% if tools %}TOOLS {{ tools | length }} {{ tools[0].function.name }}\n{% endif %}" + CHAT_TEMPLATE
    template += "{% if documents %}{{ documents[0].text }}{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    messages = [{"role": "user", "content": "how warm?"}]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    build_bundle(folder, load_target("ort-fp32"), tmp_path / "bundle", prompts=[], measure=False)
    runner = runner_module().Runner(tmp_path / "bundle")
    expected = TextTokenizer(folder).render(messages, True, tools=tools)
    assert runner.render(messages, tools) == expected and expected.startswith("TOOLS 1 weather")
    assert not runner.render(messages).startswith("TOOLS")
    assert runner.render(messages, documents=[{"text": "12 C"}]) == runner.render(messages) + "12 C"


def test_answers_end_where_the_chat_template_ends_them() -> None:
    tokenizer = TextTokenizer(checkpoint())
    assert tokenizer.eos_ids == [0]
    assert tokenizer.stop_ids == [0, 2]  # <|im_end|>, though no config names it
    config = json.loads((bundle("ort-int4") / "genai_config.json").read_text(encoding="utf-8"))
    assert config["model"]["eos_token_id"] == [0, 2]
    assert config["model"]["context_length"] == config["search"]["max_length"] == 512


def test_another_tokenizer_or_template_than_in_training_stops_the_export(tmp_path: Path) -> None:
    runner = ArtifactModel(bundle("ort-int4"))._runner
    shutil.copytree(checkpoint(), tmp_path / "other")
    save_tokenizer(tmp_path / "other", words=400)
    with pytest.raises(ParityFailed, match=r"^tokenizer: the runtime encodes .*training used \[") as caught:
        record(runner, TextTokenizer(tmp_path / "other"), PROMPTS[:1])
    assert caught.value.exit_code == 4
    shutil.copyfile(checkpoint() / "tokenizer.json", tmp_path / "other" / "tokenizer.json")
    (tmp_path / "other" / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("\n", "\n\n"), encoding="utf-8")
    with pytest.raises(ParityFailed, match=r"^chat template: the runtime renders '<\|im_start\|>system"):
        record(runner, TextTokenizer(tmp_path / "other"), PROMPTS[2:])


def test_building_twice_gives_the_same_bytes_and_replaces_the_old_folder(tmp_path: Path) -> None:
    out = tmp_path / "b"
    out.mkdir()
    (out / "stale").write_text("x", encoding="utf-8")
    measurement_path(out).write_text("of what was here before", encoding="utf-8")
    elsewhere = tmp_path / "another place"
    shutil.copytree(checkpoint(), elsewhere)
    build_bundle(
        elsewhere, load_target("ort-int4"), out, prompts=PROMPTS, device_memory_bytes=2**30, measure=False,
        device_bandwidth_bytes_per_second=1e9, input_sha256="ab" * 32, provenance={"merged": "cd" * 32},
    )  # fmt: skip
    shutil.rmtree(elsewhere)
    first = {path.name: path.read_bytes() for path in bundle("ort-int4").iterdir()}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_an_architecture_the_runtime_does_not_know_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    folder.mkdir()
    words = save_tokenizer(folder)
    config = GPT2Config(
        vocab_size=words, n_embd=32, n_layer=1, n_head=2, n_positions=64, eos_token_id=0, bos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    with pytest.raises(BadInput, match=r"gpt2: onnxruntime-genai cannot build this architecture: .*\n\nhint: it knows"):
        build_bundle(folder, load_target("ort-fp32"), tmp_path / "out", prompts=[])
    assert [path.name for path in tmp_path.iterdir()] == ["gpt2"]


def test_chat_needs_a_template(tmp_path: Path) -> None:
    shutil.copytree(checkpoint(), tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    with pytest.raises(BadInput, match=r"plain: there is no chat template"):
        build_bundle(tmp_path / "plain", load_target("ort-int4"), tmp_path / "out", prompts=[], prompt_format="chat")


def test_a_golden_input_is_text_or_messages() -> None:
    with pytest.raises(ValueError, match="give either text or messages"):
        GoldenInput()
    with pytest.raises(ValueError, match="give either text or messages"):
        GoldenInput(text="x", messages=[])


def test_the_context_is_the_smallest_of_model_target_and_device_memory() -> None:
    spec, target = read_model_spec(str(checkpoint())), load_target("ort-int4")
    weights = read_weights(bundle("ort-int4"))
    shorter = Target.model_validate(target.model_dump() | {"context_tokens": 256})
    assert choose_context(spec, target, weights, None) == (512, "model")
    assert choose_context(spec, shorter, weights, None) == (256, "target")
    per_token = kv_cache_bytes_per_token(spec, target)
    for context in (300, 400):
        room = predict(spec, target, weights, context).memory_bytes
        assert choose_context(spec, target, weights, room) == (context, "device memory")
        assert choose_context(spec, target, weights, room + per_token - 1) == (context, "device memory")
    assert choose_context(spec, target, weights, 2**30) == (512, "model")


def test_a_device_without_room_is_refused_with_the_bytes_it_would_take() -> None:
    spec, target = read_model_spec(str(checkpoint())), load_target("ort-int4")
    weights = read_weights(bundle("ort-int4"))
    with pytest.raises(
        DoesNotFit, match=r"bundle: needs 73\.\d MiB for a context of 128 tokens, the device has 64\.0 MiB"
    ):
        choose_context(spec, target, weights, 64 * 2**20)


def test_a_model_given_too_much_says_so() -> None:
    model = ArtifactModel(bundle("ort-int4"))
    with pytest.raises(BadInput, match=r"513 tokens and an answer do not fit the context of 512 tokens"):
        model.logits(some_ids(513))
    assert model.logits(some_ids(512)).shape[0] == 512
    with pytest.raises(BadInput, match="is empty"):
        model.greedy([], 4, [])
    with pytest.raises(BadInput, match=r"bundle\.json: no such file"):
        ArtifactModel(checkpoint())
