"""How do people write the same job with PEFT and transformers' Trainer? Its rows in one order, its learning rates."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from edgeft.engine.loop import learning_rate
from edgeft.settings.job import Training


class Noted(transformers.TrainerCallback):  # type: ignore[misc]
    """When each step ended, by the wall's clock and the process's, and each loss; `wait` lets a device finish first."""

    def __init__(self, wait: Callable[[], None] = lambda: None) -> None:
        self.wait = wait
        self.ends: list[float] = []
        self.busy: list[float] = []
        self.losses: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.wait()
        self.ends.append(time.perf_counter())
        self.busy.append(time.process_time())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


class InOrder(transformers.Trainer):  # type: ignore[misc]
    """Trainer with the batches of a plan, `steps` of rows, in its order, and its learning rates."""

    def __init__(self, training: Training, steps: list[list[dict[str, Any]]], **options: Any) -> None:
        self.plan, self.steps = training, steps
        super().__init__(train_dataset=[row for step in steps for row in step], **options)
        self.remove_callback(transformers.PrinterCallback)

    def get_train_dataloader(self) -> Any:
        order, first = [], 0
        for step in self.steps:
            order.append(list(range(first, first + len(step))))
            first += len(step)
        data = torch.utils.data.DataLoader(self.train_dataset, batch_sampler=order, collate_fn=self.data_collator)
        return self.accelerator.prepare(data)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        training = self.plan
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer,
            lambda step: learning_rate(training, min(step, training.steps)) / training.learning_rate,
        )
        return self.lr_scheduler


def adapted(model: Any, training: Training, first: dict[str, torch.Tensor]) -> Any:
    """The model with PEFT's LoRA as planned, starting from the adapters `first`."""
    import peft

    model = peft.get_peft_model(model, peft.LoraConfig(
        r=training.rank, lora_alpha=training.lora_alpha, use_rslora=True, lora_dropout=0.0, task_type="CAUSAL_LM",
        target_modules=list(training.target_modules),
    ))  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(first[name.removeprefix("base_model.model.")])
    return model


def arguments(training: Training, folder: str, **options: Any) -> Any:
    """Trainer's settings of the same job; nothing is saved or reported."""
    return transformers.TrainingArguments(
        output_dir=folder, max_steps=training.steps, learning_rate=training.learning_rate,
        weight_decay=training.weight_decay, max_grad_norm=training.max_grad_norm,
        gradient_checkpointing=training.checkpointing, logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, remove_unused_columns=False, seed=training.seed, **options,
    )  # fmt: skip
