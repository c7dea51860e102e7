"""Is what runs on the device what was trained? A ladder; its first failing rung names the culprit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from edgeft import ledger
from edgeft.architectures import find_parts
from edgeft.checkpoint import load_plain, local_folder
from edgeft.data import IGNORED, Sample, TextTokenizer
from edgeft.errors import ParityFailed
from edgeft.evaluate import answer_tokens, evaluate, greedy, is_exact, metrics
from edgeft.host import LOGIT_BYTES
from edgeft.merge import MergedCheckpoint
from edgeft.model_spec import read_model_spec
from edgeft.scores import Metrics, Rung
from edgeft.settings import Training
from edgeft.shares import Shares, layer_of
from edgeft.target import Tolerance
from edgeft.train import TrainResult
from edgeft.tuners import apply_tuner

WHOLE = Shares()
TIE_NATS = 0.1  # two tokens whose log-probabilities differ by less are a tie
# the same weights in another order of operations: fp32 rounding only
SAME = Tolerance(
    min_top1_agreement=0.995,
    max_mean_kl_nats=1e-5,
    max_loss_increase_nats=1e-3,
    max_exact_match_drop_points=0.5,
)
# the merged weights rounded to what the checkpoint stores: relative 2^-24, 2^-11, 2^-8
ROUNDED = {
    "float32": SAME,
    "float16": Tolerance(
        min_top1_agreement=0.99,
        max_mean_kl_nats=1e-3,
        max_loss_increase_nats=5e-3,
        max_exact_match_drop_points=1.0,
    ),
    "bfloat16": Tolerance(
        min_top1_agreement=0.95,
        max_mean_kl_nats=1e-2,
        max_loss_increase_nats=2e-2,
        max_exact_match_drop_points=2.0,
    ),
}


class Artifact(Protocol):
    """What a target's runtime must offer to be compared."""

    def logits(self, ids: list[int]) -> Any: ...
    def greedy(self, ids: list[int], max_new_tokens: int, eos_ids: Sequence[int]) -> list[int]: ...


@dataclass
class Form:
    """What one form of the model says: log-probabilities (N, V) at the answers' positions, greedy answers."""

    name: str
    log_probabilities: torch.Tensor
    loss: float
    answers: list[list[int]]
    exact_match: float | None


def observe(name: str, prompts: Sequence[Sample], tokenizer: TextTokenizer, logits: Callable[[list[int]], torch.Tensor],
            answer: Callable[[list[int]], list[int]]) -> Form:  # fmt: skip
    """One form's log-probabilities and greedy answers on the prompts."""
    rows, targets, answers = [], [], []
    kept = 0
    for sample in prompts:
        trained = [i for i in range(len(sample.ids) - 1) if sample.labels[i + 1] != IGNORED]
        output = torch.log_softmax(logits(sample.ids).float(), dim=-1)
        most = max(1, LOGIT_BYTES // 4 // output.shape[-1] // len(prompts))
        trained = trained[:most]
        rows.append(output[trained].clone())
        targets += [sample.ids[i + 1] for i in trained]
        kept += len(trained)
        answers.append(answer(sample.prompt) if sample.has_prompt else [])
    table = torch.cat(rows)
    loss = -float(table.gather(1, torch.tensor(targets)[:, None]).mean())
    exact = None
    if prompts[0].has_prompt:
        exact = sum(is_exact(tokenizer, s, a) for s, a in zip(prompts, answers, strict=True)) / len(prompts)
    return Form(name, table, loss, answers, exact)


def observe_model(name: str, model: Any, prompts: Sequence[Sample], tokenizer: TextTokenizer) -> Form:
    """`observe` of a torch model on the CPU in fp32."""
    longest = answer_tokens(prompts)

    def logits(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]  # type: ignore[no-any-return]

    def answer(ids: list[int]) -> list[int]:
        return greedy(model, [ids], tokenizer.stop_ids, longest, torch.device("cpu"))[0]

    return observe(name, prompts, tokenizer, logits, answer)


def observe_artifact(name: str, artifact: Artifact, prompts: Sequence[Sample], tokenizer: TextTokenizer) -> Form:
    """`observe` of a bundle in its own runtime."""
    longest = answer_tokens(prompts)
    return observe(
        name, prompts, tokenizer,
        lambda ids: torch.from_numpy(artifact.logits(ids)),
        lambda ids: artifact.greedy(ids, longest, tokenizer.stop_ids),
    )  # fmt: skip


def compare(before: Form, form: Form, tolerance: Tolerance) -> Rung:
    """The rung between two forms; `problems` holds a line for each tolerance that does not hold."""
    p, q = before.log_probabilities, form.log_probabilities
    kl = float((p.exp() * (p - q)).sum(dim=-1).mean())
    # a near tie has no right answer: the choice counts as another one only where the first form clearly prefers its own
    preferred = p.amax(dim=-1) - p.gather(1, q.argmax(dim=-1, keepdim=True))[:, 0]
    agreement = float((preferred <= TIE_NATS).float().mean())
    shares = [
        next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        / max(1, len(a), len(b))
        for a, b in zip(before.answers, form.answers, strict=True)
        if a or b
    ]
    drop = 100 * ((before.exact_match or 0.0) - (form.exact_match or 0.0))
    checks = (
        (
            agreement < tolerance.min_top1_agreement,
            f"top-1 agreement {agreement:.4f}, at least {tolerance.min_top1_agreement}",
        ),
        (
            not kl <= tolerance.max_mean_kl_nats,
            f"mean KL {kl:.2e} nats, at most {tolerance.max_mean_kl_nats:.0e}",
        ),
        (
            not form.loss - before.loss <= tolerance.max_loss_increase_nats,
            f"loss {before.loss:.4f} to {form.loss:.4f} nats, at most {tolerance.max_loss_increase_nats} more",
        ),
        (
            # one prompt more or less is no evidence on a small sample
            drop > max(tolerance.max_exact_match_drop_points, 100 / max(1, len(form.answers))),
            f"exact match falls by {drop:.1f} points, at most {tolerance.max_exact_match_drop_points}",
        ),
    )
    return Rung(
        name=form.name,
        against=before.name,
        top1_agreement=agreement,
        mean_kl_nats=kl,
        loss=form.loss,
        loss_before=before.loss,
        exact_match=form.exact_match,
        exact_match_before=before.exact_match,
        greedy_prefix=sum(shares) / len(shares) if shares else 1.0,
        problems=tuple(text for failed, text in checks if failed),
    )


def load_trained(trained: Path, merged: MergedCheckpoint) -> Any:
    """The model as trained, on the CPU in fp32, its change scaled by wise_alpha: adapters live, nothing merged."""
    return load_tuned(trained, merged.train, merged.shares)


def load_tuned(trained: Path, result: TrainResult, shares: Shares = WHOLE) -> Any:
    """Base and change of a training result, nothing merged, the change scaled by its shares; on the CPU in fp32."""
    return load_changed(local_folder(result.plan.job.model), trained, result.plan.training, shares)


def load_changed(base: Path, trained: Path, training: Training, shares: Shares = WHOLE) -> Any:
    """A base and what training left in `trained`, nothing merged, the change scaled by its shares; fp32, on the CPU."""
    ledger.import_all()
    from peft.tuners.lora import LoraLayer
    from safetensors.torch import load_file

    model = load_plain(base)
    training = training.model_copy(update={"compute_dtype": "fp32"})
    if training.tuner == "lora":
        if shares.nothing:
            return model
        chosen = apply_tuner(model, find_parts(model), training)
        weights = load_file(trained / "adapter_model.safetensors")
        with torch.no_grad():
            for name, parameter in chosen:
                parameter.copy_(weights["base_model.model." + name.replace(".default.", ".")])
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                for adapter in module.scaling:
                    module.scaling[adapter] *= shares.of(layer_of(name + "."))
        return model
    changed = load_file(trained / "changed.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in changed:
                share = shares.of(layer_of(name))
                parameter.copy_(parameter + share * (changed[name] - parameter) if share < 1 else changed[name])
    return model


def fold(model: Any) -> Any:
    """The same model with its adapters folded into its weights in memory, by PEFT."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    return model


def climb(
    trained: Path, merged_folder: Path, artifact: Artifact, prompts: Sequence[Sample], tokenizer: TextTokenizer,
    tolerance: Tolerance, progress: Callable[[str, int, int, dict[str, float]], None],
) -> tuple[Rung, ...]:  # fmt: skip
    """The rungs from trained over merged (folded in memory) and reloaded (from disk) to artifact, one at a time.

    Raises ParityFailed (exit 4) naming the first rung that fails and every tolerance it breaks.
    """
    merged = MergedCheckpoint.read(merged_folder / "merged.json")
    return climb_from(
        lambda: load_trained(trained, merged), merged_folder, artifact, prompts, tokenizer, tolerance, progress
    )


def climb_from(
    load: Callable[[], Any], merged_folder: Path, artifact: Artifact, prompts: Sequence[Sample],
    tokenizer: TextTokenizer, tolerance: Tolerance, progress: Callable[[str, int, int, dict[str, float]], None],
) -> tuple[Rung, ...]:  # fmt: skip
    """`climb` with the model as trained given by a function, so that nobody else holds it when it is folded."""
    progress("parity: trained", 0, 4, {})
    model = load()
    form = observe_model("trained", model, prompts, tokenizer)
    progress("parity: merged", 1, 4, {})
    rungs = []
    following = observe_model("merged", fold(model), prompts, tokenizer)
    rungs.append(compare(form, following, SAME))
    del model
    ledger.give_back()
    form = following
    progress("parity: reloaded", 2, 4, {})
    following = observe_model("reloaded", load_plain(merged_folder), prompts, tokenizer)
    rungs.append(compare(form, following, ROUNDED.get(read_model_spec(str(merged_folder)).dtype, SAME)))
    ledger.give_back()
    form = following
    progress("parity: artifact", 3, 4, {})
    rungs.append(compare(form, observe_artifact("artifact", artifact, prompts, tokenizer), tolerance))
    progress("parity: artifact", 4, 4, {})
    for rung in rungs:
        if rung.problems:
            where = f"parity ladder, rung {rung.name!r} against {rung.against!r}"
            raise ParityFailed(where, "\n".join(rung.problems), HINTS[rung.name])
    return tuple(rungs)


HINTS = {
    "merged": "report this: folding the adapters must not change the model",
    "reloaded": "the checkpoint's storage precision loses the fine-tune: store the base in fp32 and run again",
    "artifact": "quantisation loses too much: try --target ort-int8 or gguf-q8_0, or loosen [parity] in a target file",
}


def score_model(model: Any, samples: Sequence[Sample], tokenizer: TextTokenizer,
                progress: Callable[[int, int], None]) -> Metrics:  # fmt: skip
    """Metrics of a torch model on the CPU in fp32."""
    cpu = torch.device("cpu")
    return evaluate(model, find_parts(model), samples, tokenizer, device=cpu, progress=progress)


def score_artifact(artifact: Artifact, samples: Sequence[Sample], tokenizer: TextTokenizer,
                   progress: Callable[[int, int], None]) -> Metrics:  # fmt: skip
    """Metrics of a bundle in its own runtime, one row at a time as a device would."""
    total, tokens, right = 0.0, 0, 0
    longest = answer_tokens(samples)
    for done, sample in enumerate(samples, start=1):
        output = torch.log_softmax(torch.from_numpy(artifact.logits(sample.ids)), dim=-1)
        positions = [i for i in range(len(sample.ids) - 1) if sample.labels[i + 1] != IGNORED]
        targets = torch.tensor([sample.ids[i + 1] for i in positions])
        total -= float(output[positions].gather(1, targets[:, None]).sum())
        tokens += len(positions)
        if sample.has_prompt:
            answer = artifact.greedy(sample.prompt, longest, tokenizer.stop_ids)
            right += is_exact(tokenizer, sample, answer)
        progress(done, len(samples))
    return metrics(samples, tokenizer, total / max(1, tokens), right)
