"""How many triplets does AdaLoRA leave?"""

from __future__ import annotations

from edgeft.errors import BadInput
from edgeft.settings.job import Job
from edgeft.settings.tuners import Tuning


def target_rank(job: Job, row: Tuning, rank: int) -> int:
    """The rank that is left on average, of a first one; 0 where no rank goes. Raises BadInput where it would grow."""
    if not row.pruned:
        return 0
    if job.target_rank and job.target_rank > rank:
        raise BadInput("target_rank", f"{job.target_rank}, but ranks begin at {rank} and only go", f"at most {rank}")
    return job.target_rank or max(1, rank // 2)


def check_target_rank(job: Job, row: Tuning) -> None:
    """Raise BadInput for a rank that is left, of a tuner whose ranks stay, and for a scale of one that has its own."""
    if row.scale is not None and job.lora_scale != "rslora":
        raise BadInput("lora_scale", f"{job.tuner} divides lora_alpha by its first rank", "leave it out")
    if job.target_rank and not row.pruned:
        problem = f"{job.tuner or 'what is planned'} keeps every rank"
        raise BadInput("target_rank", problem, "use tuner=adalora, or leave it out")
