"""How was examples/debian-tiny made? A Llama-class model of 5.8M parameters, pretrained on Debian descriptions.

    python examples/pretrain.py --out build/debian-tiny        # the shipped model, an hour or two on two CPU cores
    python examples/pretrain.py --out build/quick --epochs 0.1 # a look at whether it works here

Everything comes from examples/debian-descriptions: a byte-level BPE of 4,096 tokens is trained on it, then the model,
in bf16 autocast with fp32 master weights, Muon (arXiv 2502.16982) on the matrices, AdamW on embeddings and norms.
The result is a standard Hugging Face folder with fp16 weights and `pretraining.json`: settings, curve, and the
held-out loss of the saved file.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
END, START_TURN, END_TURN, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTEXT_TOKENS = 512


def read_texts(path: Path) -> list[str]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: no unknown token exists; digits stand alone, so versions do not fill the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, START_TURN, END_TURN, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START_TURN, END_TURN],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def to_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one row of ids, each closed by the end token."""
    ids: list[int] = []
    for encoded in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        ids.extend(encoded)
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids, dtype=torch.int32)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: torch.Tensor) -> float:
    """Mean nats per token over windows of the full context."""
    model.eval()
    windows = stream[: len(stream) // CONTEXT_TOKENS * CONTEXT_TOKENS].view(-1, CONTEXT_TOKENS).long()
    losses = [model(input_ids=window, labels=window, use_cache=False).loss.item() for window in windows.split(8)]
    model.train()
    return sum(losses) / len(losses)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--epochs", type=float, default=3.5)
    arguments.add_argument("--batch", type=int, default=8, help="sequences of 512 tokens per step")
    arguments.add_argument("--muon-lr", type=float, default=4e-3)
    arguments.add_argument("--adam-lr", type=float, default=3e-3)
    arguments.add_argument("--weight-decay", type=float, default=0.1)
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train_texts = read_texts(HERE / "debian-descriptions" / "train.jsonl.gz")
    valid_texts = read_texts(HERE / "debian-descriptions" / "valid.jsonl")
    tokenizer = train_tokenizer(train_texts, vocab_size=4096)
    train_ids, valid_ids = to_stream(tokenizer, train_texts), to_stream(tokenizer, valid_texts).to(device)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True, rope_theta=10000.0, bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    model.config.use_cache = False
    forward = torch.compile(model)  # on CPU twice as fast: norms, rotary embedding and the loss are memory-bound
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=options.muon_lr, momentum=0.95, weight_decay=options.weight_decay,
                         adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=options.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]  # fmt: skip
    tokens_per_step = options.batch * CONTEXT_TOKENS
    steps = max(1, int(options.epochs * len(train_ids) / tokens_per_step))
    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} parameters, {len(train_ids):,} tokens, {steps} steps of {tokens_per_step}", flush=True)

    generator = torch.Generator().manual_seed(options.seed)
    curve, started, order = [], time.time(), torch.empty(0, dtype=torch.long)
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    for step in range(steps):
        if len(order) < options.batch:  # a new epoch: other window borders, other order
            offset = int(torch.randint(CONTEXT_TOKENS, (1,), generator=generator))
            starts = torch.arange(offset, len(train_ids) - CONTEXT_TOKENS, CONTEXT_TOKENS)
            order = starts[torch.randperm(len(starts), generator=generator)]
        batch, order = order[: options.batch], order[options.batch :]
        ids = torch.stack([train_ids[s : s + CONTEXT_TOKENS] for s in batch]).long().to(device)
        scale = min(1.0, (step + 1) / 100) * min(1.0, (steps - step) / (0.6 * steps))  # warm up, hold, down to 0
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = scale * peaks[optimizers.index(optimizer)]
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            spent = time.time() - started
            left = spent / (step + 1) * (steps - step - 1)
            print(f"step {step}/{steps} loss {loss.item():.3f} {tokens_per_step * (step + 1) / spent:,.0f} tok/s, "
                  f"{left / 60:.0f} min left", flush=True)  # fmt: skip
        if step % 500 == 499:
            with torch.autocast(device, dtype=torch.bfloat16):
                curve.append({"step": step + 1, "held_out_loss": round(held_out_loss(model, valid_ids), 4)})
            print(curve[-1], flush=True)
    model.config.use_cache = True
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_TURN)]
    model.to(torch.float16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    saved = AutoModelForCausalLM.from_pretrained(options.out, dtype=torch.float32).to(device)
    loss = held_out_loss(saved, valid_ids)
    text_bytes = sum(len(text.encode()) for text in valid_texts)
    record = {
        "parameters": count, "train_tokens_per_epoch": len(train_ids), "steps": steps,
        "tokens_per_step": tokens_per_step,
        "settings": {k: v for k, v in vars(options).items() if k not in ("out", "threads")},
        "held_out_loss_nats_per_token": round(loss, 4),
        "held_out_bits_per_byte": round(loss * len(valid_ids) / text_bytes / math.log(2), 4),
        "curve": curve, "seconds": round(time.time() - started), "device": device, "torch": torch.__version__,
    }  # fmt: skip
    (options.out / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
