"""Which random jobs does bench/planner.py run? Families, shapes, rows and settings, drawn by a seed and a number."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from run import with_tokenizer

KINDS = ("prompt", "chat", "text")
# of each family what its config is made from: keys of its own for the shape's width, layers, heads, groups, MLP
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {"sliding_window": 96}, "qwen2": {}, "qwen3": {}, "gemma": {}, "gemma2": {},
    "gemma3_text": {"sliding_window": 64}, "phi3": {"pad_token_id": 0}, "granite": {}, "gpt2": {}, "gpt_neox": {},
    "opt": {"pad_token_id": 3},
}  # fmt: skip
OTHERS = ("bloom", "xglm", "mpt", "gpt_neo", "gptj", "falcon", "olmo2", "cohere", "starcoder2", "stablelm", "mixtral")


@dataclass(frozen=True)
class Case:
    """One job: the model's config, what its files hold, and its settings."""

    name: str
    family: str
    config: dict[str, Any]
    rows: dict[str, dict[str, Any]]  # file: kind, how many, words of a prompt and of an answer, whose writing
    settings: dict[str, Any]
    resumed: bool = False

    def write(self, folder: Path) -> dict[str, str]:
        """The model's folder and its files, as `make_job` takes them."""
        folder.mkdir(parents=True)
        draw = random.Random(f"write {self.name}")
        found = {"model": str(write_model(folder / "model", self.family, self.config))}
        for name, kind in self.rows.items():
            path = folder / f"{name}.jsonl"
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in write_rows(draw, **kind)))
            found[name] = str(path)
        return found


def write_model(folder: Path, family: str, config: dict[str, Any]) -> Path:
    """A model of that config with random weights, and the example's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    made: Any = AutoConfig.for_model(family, **config)
    auto: Any = AutoModelForCausalLM
    auto.from_config(made).save_pretrained(folder)
    return with_tokenizer(folder, config["vocab_size"])


def config_of(family: str, draw: random.Random) -> dict[str, Any]:
    """A random shape of a family."""
    heads, size = draw.choice([2, 4, 6, 6, 8]), 64
    hidden, groups = heads * size, draw.choice([n for n in (1, 2, 3, heads) if heads % n == 0])
    inner, layers = draw.choice([2, 3, 4]) * hidden, draw.randint(2, 8)
    vocabulary = 4096 * draw.choice([1, 1, 2, 4, 8])
    shared = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    if family in ("gpt2", "gptj"):
        own = {"n_embd": hidden, "n_layer": layers, "n_head": heads, "n_positions": 1024}
        own |= {"rotary_dim": 32} if family == "gptj" else {}
    elif family == "bloom":
        own = {"hidden_size": hidden, "n_layer": layers, "n_head": heads}
    elif family == "mpt":
        own = {"d_model": hidden, "n_layers": layers, "n_heads": heads, "max_seq_len": 1024}
    elif family == "gpt_neo":
        own = {"hidden_size": hidden, "num_layers": layers, "num_heads": heads, "max_position_embeddings": 1024,
               "attention_types": [[["global"], layers]]}  # fmt: skip
    elif family == "xglm":
        own = {"d_model": hidden, "ffn_dim": inner, "num_layers": layers, "attention_heads": heads,
               "max_position_embeddings": 1024}  # fmt: skip
    elif family == "falcon":
        own = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "multi_query": True,
               "parallel_attn": True, "bias": False, "alibi": False, "max_position_embeddings": 1024}  # fmt: skip
    elif family == "opt":
        own = {"hidden_size": hidden, "ffn_dim": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
               "word_embed_proj_dim": hidden, "max_position_embeddings": 1024}  # fmt: skip
    else:
        own = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
               "num_attention_heads": heads, "max_position_embeddings": 1024,
               "tie_word_embeddings": draw.random() < 0.5}  # fmt: skip
        own |= {} if family in ("gpt_neox",) else {"num_key_value_heads": groups}
        own |= {"head_dim": size} if family in ("llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3_text") else {}
        own |= {"num_local_experts": 4, "num_experts_per_tok": 2} if family == "mixtral" else {}
    return {**shared, **own, **FAMILIES.get(family, {})}


def words(draw: random.Random, count: int, script: str) -> str:
    """Text of so many words; some scripts take more bytes and tokens a word than others."""
    if script == "emoji":
        return " ".join(draw.choice(["package", "library", "tool", "\U0001f680", "data"]) for _ in range(count))
    if script == "cjk":
        return "".join(chr(0x4E00 + draw.randrange(2000)) for _ in range(max(1, count // 4)))
    short = ["the", "library", "tools", "for", "data", "package", "of", "files", "and", "a", "network", "server"]
    return " ".join(draw.choice(short) for _ in range(count))


def write_rows(
    draw: random.Random, kind: str, count: int, prompt: int, answer: int, script: str, one_long: int = 0
) -> list[dict[str, Any]]:
    """Rows of one kind; `one_long` words in the last one's answer."""
    found: list[dict[str, Any]] = []
    for number in range(count):
        ask, say = max(1, round(prompt * draw.uniform(0.3, 1))), max(1, round(answer * draw.uniform(0.3, 1)))
        if one_long and number == count // 2:
            say = one_long
        asked, said = words(draw, ask, "latin" if script == "emoji" else script), words(draw, say, script)
        if kind == "prompt":
            found.append({"prompt": asked, "completion": " " + said})
        elif kind == "chat":
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            found.append({"messages": turns})
        else:
            found.append({"text": f"{asked} {said}"})
    return found


def rows_of(draw: random.Random, most: int) -> dict[str, Any]:
    """How the rows of one file look; none has more than about `most` words."""
    prompt = draw.choice([5, 20, 100, most])
    answer = draw.choice([1, 3, 20, 100]) if prompt < most else draw.choice([1, 8])
    found = {"kind": draw.choice(KINDS), "prompt": prompt, "answer": answer}
    found["script"] = draw.choice(["latin", "latin", "latin", "emoji", "cjk"])
    found["one_long"] = draw.choice([0, 0, min(most, 250)])
    return found


def settings_of(draw: random.Random, layers: int) -> dict[str, Any]:
    """How one job trains."""
    batch = draw.choice([1, 2, 4, 8])
    found: dict[str, Any] = {
        "batch_size": batch,
        "micro_batch_size": draw.choice([b for b in (1, 2, 4, 8) if b <= batch]),
    }
    found |= {"checkpointing": draw.random() < 0.6, "loss_chunk_tokens": draw.choice([64, 256, 1024])}
    found |= {"eval_rows": draw.choice([8, 50, 200]), "max_steps": 3, "seed": draw.randrange(100)}
    way = draw.choice(["LoRA", "LoRA", "LoRA", "NF4", "full", "sparse", "LISA", "LISA on NF4"])
    if way in ("LoRA", "NF4"):
        found |= {
            "tuner": "lora",
            "rank": draw.choice([4, 16, 64]),
            "base_precision": "nf4" if way == "NF4" else "fp32",
        }
        if draw.random() < 0.4:
            found |= {"layers": "sparse", "active_layers": draw.randint(1, layers)}
    elif way == "full":
        found |= {"tuner": "full", "layers": "all"}
    elif way == "sparse":
        found |= {"tuner": "full", "layers": "sparse", "active_layers": draw.randint(1, layers),
                  "base_precision": "fp32"}  # fmt: skip
    else:
        active = draw.randint(1, min(3, layers))
        found |= {"tuner": "full", "layers": "lisa", "active_layers": active, "lisa_interval": 1,
                  "base_precision": "nf4" if way.endswith("NF4") else "fp32",
                  "max_steps": max(3, -(-layers // active)) + 1}  # fmt: skip
    if found["checkpointing"] and draw.random() < 0.3:
        found["kept_layers"] = draw.randint(0, layers - 1)
    return found


def random_case(seed: int, number: int, families: tuple[str, ...] = (*FAMILIES, *OTHERS)) -> Case:
    """One job; the same seed and number give the same one."""
    draw = random.Random(f"job {seed} {number}")
    family = families[number % len(families)]
    config = config_of(family, draw)
    layers = next(config[k] for k in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if k in config)
    settings = settings_of(draw, layers)
    most = draw.choice([100, 250, 500])
    settings["max_length"] = draw.choice([min(1000, 2 * most), 128, 300, 700])
    files = {"data": {**rows_of(draw, most), "count": draw.choice([30, 100, 100, 3000])}}
    for name in ("valid", "test") if draw.random() < 0.3 else ("valid",):
        files[name] = rows_of(draw, most)
        # an answer takes as many passes as it has tokens, and a group of long rows has few of them
        quick = files[name]["prompt"] <= 20 and files[name]["answer"] <= 3
        files[name]["count"] = draw.choice([30, 100, 250]) if quick else 5
    return Case(f"{seed}-{number}", family, config, files, settings, draw.random() < 0.15)


def broken_once() -> list[Case]:
    """The jobs on which an earlier planner promised too little, one of each kind."""
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
             "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 4096, "max_position_embeddings": 1024,
             "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
    lora = {"tuner": "lora", "rank": 8, "base_precision": "fp32", "batch_size": 4, "micro_batch_size": 1,
            "checkpointing": True, "loss_chunk_tokens": 64, "max_steps": 3}  # fmt: skip
    short = {"kind": "prompt", "count": 43, "prompt": 8, "answer": 2, "script": "latin"}
    bloom = {"hidden_size": 256, "n_layer": 4, "n_head": 4, "vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 0}
    return [
        Case("one long answer beside short ones", "llama", shape,
             {"data": short, "valid": {**short, "one_long": 250}}, {**lora, "eval_rows": 200}),
        Case("answers with emoji", "llama", shape,
             {"data": {**short, "count": 6000, "answer": 150, "script": "emoji"}, "valid": short}, lora),
        Case("long prompts", "llama", shape,
             {"data": {**short, "count": 3000, "prompt": 800}, "valid": {**short, "prompt": 800}}, lora),
        Case("scores of every pair of tokens", "bloom", bloom,
             {"data": {**short, "prompt": 700}, "valid": {**short, "prompt": 700}}, {**lora, "micro_batch_size": 4}),
        Case("going on from a checkpoint of LISA", "llama", {**shape, "num_hidden_layers": 16},
             {"data": short, "valid": short},
             {"tuner": "full", "layers": "lisa", "active_layers": 2, "lisa_interval": 1, "base_precision": "fp32",
              "batch_size": 2, "micro_batch_size": 1, "checkpointing": True, "max_steps": 12}, resumed=True),
    ]  # fmt: skip
