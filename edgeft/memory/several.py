"""What do several processes take that one does not: bytes to add gradients up in, and seconds to do it?"""

from __future__ import annotations

from edgeft.memory import train_step
from edgeft.models.spec import ModelSpec
from edgeft.settings.job import Training
from edgeft.units import MIB

# Resident bytes of gloo's threads, connections and the two pieces it adds up at a time: 5.0 to 5.4 MB of two and of
# four processes, the same for 1 MiB as for 400 (bench/ranks.py). NCCL's lie outside of PyTorch's allocator: a guess.
GLOO_BYTES, NCCL_BYTES = 5_400_000, 512 * MIB
# Bytes a second that one process sends while gradients are added up or layers gathered, on the safe side: a CPU's to
# another on the same machine, a GPU's over PCIe, any over 1 Gbit/s of network. None is measured of your machines.
GLOO_RATE, PCIE_RATE, NETWORK_RATE = 0.2e9, 4e9, 0.1e9
SECONDS_PER_MEETING = 2e-3  # of a step's few numbers: loss, norm, whether to stop


def added_up(spec: ModelSpec, training: Training) -> int:
    """Bytes of the one buffer that gradients are added up in: all that trains at a time, in fp32; 0 of one process."""
    return 4 * train_step.trained_parameters(spec, training) if training.processes > 1 else 0


def threads(training: Training, cores: int) -> int:
    """Threads of one process on a CPU, where the processes of a machine share its cores."""
    return max(1, cores // training.neighbours)


def adding_seconds(training: Training, buffer_bytes: float) -> float:
    """Seconds of a step in which gradients are added up: each process sends 2 (n - 1) / n of the buffer.

    Processes of one machine share its network.
    """
    count = training.processes
    if count == 1:
        return 0.0
    return 2 * (count - 1) / count * buffer_bytes / rate(training) + SECONDS_PER_MEETING


def gathering_seconds(training: Training, layer_bytes: float) -> float:
    """Seconds in which so many bytes of layers in parts are gathered: each process gets (n - 1) / n of them."""
    return (training.processes - 1) / training.processes * layer_bytes / rate(training)


def rate(training: Training) -> float:
    """Bytes a second that one process sends to another."""
    here = PCIE_RATE if training.device == "cuda" else GLOO_RATE
    return min(here, NETWORK_RATE) if training.machines > 1 else here
