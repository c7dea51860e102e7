"""What is a setting of another trainer called here, and what has none?

Names of LLaMA-Factory, ms-swift, PEFT, transformers' Trainer, TRL, Unsloth and axolotl, by what they do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from edgeft.errors import did_you_mean


class Row(NamedTuple):
    """One thing that other trainers set."""

    names: tuple[str, ...]  # theirs
    here: str  # what is typed here instead; nothing where edgeft has none of it
    said: str  # how it differs; why there is none


ROWS = (
    Row(("finetuning_type", "train_type", "tuner_type", "peft_type"), "tuner=", "lora, dora, adalora ..., or full"),
    Row(("lora_rank", "lora_r", "r"), "rank=", ""),
    Row(("lora_alpha",), "lora_alpha=", "divided by the root of the rank; lora_scale=plain divides by the rank, as the "
        "others do"),
    Row(("use_rslora",), "lora_scale=rslora", "which is the default"),
    Row(("use_dora",), "tuner=dora", ""),
    Row(("pissa_init", "init_lora_weights", "init_weights"), "init=pissa", ""),
    Row(("loraplus_lr_ratio", "lorap_lr_ratio"), "lora_plus=", ""),
    Row(("lora_target", "lora_target_modules", "lora_target_linear"), "target_modules=", "all, attention, mlp, names"),
    Row(("lora_dropout",), "", "adapters train without dropout: what a step computes is planned and repeated bit for "
        "bit"),
    Row(("freeze_trainable_layers", "unfrozen_parameters", "layers_to_transform"), "layers=sparse",
        "with trained_layers=28-31, or active_layers=4 and layer_score=gradient"),
    Row(("lisa_activated_layers", "lisa_n_layers"), "active_layers=", "with layers=lisa"),
    Row(("lisa_step_interval", "lisa_interval_steps"), "lisa_interval=", "with layers=lisa"),
    Row(("quantization_bit", "quant_bits", "load_in_4bit"), "base_precision=nf4", ""),
    Row(("torch_dtype",), "base_precision=", "the plan chooses what the machine computes"),
    Row(("bf16", "fp16", "pure_bf16", "tf32"), "", "not needed here: the plan takes what the machine computes fastest; "
        "base_precision= is what the base is kept in"),
    Row(("do_train", "do_eval", "do_predict", "stage", "overwrite_output_dir", "overwrite_cache"), "",
        "not needed here: plan, train, merge and export are the stages, and what is up to date is not made again"),
    Row(("plot_loss", "logging_dir", "disable_tqdm"), "", "not needed here: the curve is shown when training ends and "
        "stands in the report; --track tells trackers"),
    Row(("dataloader_num_workers", "preprocessing_num_workers", "dataset_num_proc", "dataloader_pin_memory",
         "remove_unused_columns", "group_by_length", "ddp_timeout"), "", "not needed here: rows are read once, and "
        "passes are filled by length"),
    Row(("save_total_limit", "save_only_model", "save_safetensors"), "", "not needed here: the last checkpoint is kept "
        "until the run ends, the result as safetensors"),
    Row(("trust_remote_code",), "", "not needed here: no code of a model's folder is run"),
    Row(("max_samples", "max_train_samples"), "", "--data FILE#500 reads 500 of its rows"),
    Row(("cutoff_len", "max_seq_length", "max_seq_len", "model_max_length", "sequence_len"), "max_length=", ""),
    Row(("per_device_train_batch_size", "micro_batch"), "micro_batch_size=", "the plan chooses it; batch_size is what "
        "a step takes in all"),
    Row(("gradient_accumulation_steps", "grad_accum"), "batch_size=", "samples of a step in all; how many passes "
        "that is follows from the memory"),
    Row(("num_train_epochs", "num_epochs"), "epochs=", ""),
    Row(("lr",), "learning_rate=", ""),
    Row(("warmup_ratio", "warmup_steps"), "warmup_fraction=", "of all steps"),
    Row(("lr_scheduler_type", "lr_scheduler"), "", "the rate rises over warmup_fraction and falls in a line to zero"),
    Row(("optim",), "optimizer=", ""),
    Row(("gradient_checkpointing", "use_gradient_checkpointing"), "checkpointing=", "the plan chooses it, by layers"),
    Row(("early_stopping_patience", "early_stopping_steps"), "patience=", "with valid_steps"),
    Row(("eval_steps", "evaluation_strategy", "eval_strategy"), "valid_steps=", "with patience"),
    Row(("val_size", "split_dataset_ratio"), "", "5% of the rows are held out, 500 at most; --valid FILE says which"),
    Row(("save_steps", "save_strategy"), "checkpoint_steps=", ""),
    Row(("resume_from_checkpoint",), "", "the same command goes on where it was stopped"),
    Row(("dataset", "dataset_dir", "datasets"), "", "--data FILE: docs/data.md says which formats are read"),
    Row(("template", "chat_template"), "", "the model's own chat template is used"),
    Row(("output_dir",), "", "--out FOLDER"),
    Row(("logging_steps", "logging_strategy"), "", "every step is in train/steps.jsonl"),
    Row(("train_on_prompt", "completion_only_loss", "train_on_inputs"), "", "only answers train"),
    Row(("report_to", "track"), "", "it is an option of train and build: --track tensorboard, wandb, trackio ..."),
    Row(("adapter_name_or_path", "adapters"), "", "a fine-tuned folder is the MODEL of the next run; an adapter is "
        "merged first"),
    Row(("ddp",), "processes=", "data parallel under torchrun"),
    Row(("deepspeed", "fsdp"), "processes=", "data parallel under torchrun; with shard_base=true each process holds a "
        "part of the base"),
    Row(("packing", "sample_packing"), "", "rows are not joined: a pass takes more of them where they are short"),
    Row(("neftune_noise_alpha", "noisy_embedding_alpha"), "", "there is no noise on embeddings"),
    Row(("flash_attn", "attn_implementation", "attn_impl"), "", "the fused kernel that the machine has is taken"),
    Row(("load_in_8bit",), "", "bases are held in fp32, bf16, fp16 or nf4"),
)  # fmt: skip
BY_NAME = {name: row for row in ROWS for name in row.names}


def hint_for(asked: str, known: Iterable[str]) -> str:
    """What to type for a setting that edgeft does not know: by another trainer's name for it, else the nearest one."""
    row = BY_NAME.get(asked.replace("-", "_"))
    if row is None:
        return did_you_mean(asked, known, "edgeft show settings")
    return (f"it is {row.here} here" + (f": {row.said}" if row.said else "")) if row.here else row.said


def table() -> str:
    """The rows as Markdown, as docs/other-trainers.md has them."""
    lines = ["| elsewhere | here | |", "|---|---|---|"]
    for row in ROWS:
        theirs = ", ".join(f"`{name}`" for name in row.names)
        cells = [theirs, f"`{row.here}`" if row.here else "", row.said]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(re.sub(" +", " ", line) for line in lines) + "\n"
