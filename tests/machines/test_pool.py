"""Freed memory is kept for the tensors to come, and given back before a process would hold more than its limit."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from typing import Any

import pytest

from edgeft.machines.pool import Pool
from edgeft.units import MIB

glibc_only = pytest.mark.skipif(
    not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc", reason="glibc's malloc"
)
# Layers whose results are kept until the end of a step, as autograd keeps them: `count` tensors of a MiB each, beside
# as many that go at once, with something small between them that stays and divides the memory.
STEPS = """if True:
    import json, resource, sys
    import torch
    from edgeft.machines import meter
    from edgeft.machines.pool import Pool
    reserve, least, extra, layers, count = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    assert meter.control_malloc()
    start = meter.rss_bytes()
    pool = Pool(reserve, least)
    pool.limit = start + extra

    class Layer(torch.nn.Module):
        def forward(self, x, kept):
            for _ in range(count):
                gone = torch.ones(2**18)
                kept.append((torch.ones(2**18), torch.ones(4)))
                del gone
            return x

    body = torch.nn.Module()
    stack = [Layer() for _ in range(layers)]
    pool.watch(stack, body)

    def step():
        kept, x = [], torch.ones(1)
        for layer in stack:
            x = layer(x, kept)

    def faults():
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    step(), step(), step()
    meter.reset_peak(torch.device("cpu"))
    before = faults()
    step()
    seen = faults() - before
    peak = meter.peak_rss_bytes() - start
    meter.control_malloc()
    meter.give_back()
    print(json.dumps([seen, peak, meter.rss_bytes() - start, pool.times_given_back, pool.reserve]))
"""


def of(*arguments: int, before: str = "") -> list[int]:
    """(page faults of a fourth step, its peak, bytes held after the end, how often pages were given back, the heap)."""
    done = subprocess.run(
        [sys.executable, "-c", before + STEPS, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return [int(value) for value in json.loads(done.stdout.splitlines()[-1])]


@glibc_only
def test_a_pool_keeps_what_is_freed() -> None:
    faults, peak, after, *_ = of(256 * MIB, 0, 200 * MIB, 10, 4)
    assert faults < 40 * 256 / 4 and 40 * MIB < peak < 200 * MIB and after < 8 * MIB
    faults, peak, after, *_ = of(0, 0, 200 * MIB, 10, 4)
    assert faults > 80 * 256 * 0.9 and peak < 44 * MIB and after < 8 * MIB


@glibc_only
def test_a_pool_keeps_within_its_limit() -> None:
    _, free, *_ = of(256 * MIB, 0, 200 * MIB, 20, 4)
    assert free > 100 * MIB  # what is there when nothing limits it: 80 MiB are kept in a step
    faults, peak, _, times, _ = of(256 * MIB, 0, 110 * MIB, 20, 4)
    assert peak < 110 * MIB + 8 * MIB < free and times > 2  # a layer more at most
    assert faults < 160 * 256


@glibc_only
def test_a_process_that_is_above_its_limit_does_not_give_back_in_vain() -> None:
    *_, times, _ = of(256 * MIB, 0, -64 * MIB, 40, 1)
    assert 0 < times < 60  # of 161 looks: only where it took some MiB since


# One layer leaves 40 MiB free, the next takes 60 MiB at once and gives them back before anything looks again.
AT_ONCE = """if True:
    import torch
    from edgeft.machines import meter
    from edgeft.machines.pool import Pool
    torch.set_num_threads(1)
    assert meter.control_malloc()
    start = meter.rss_bytes()
    pool = Pool(48 * 2**20, 0)
    pool.limit = pool.most = start + 80 * 2**20

    class Leaves(torch.nn.Module):
        def forward(self, x):
            kept = [torch.ones(2**18) for _ in range(40)]
            return x

    class TakesAtOnce(torch.nn.Module):
        def forward(self, x):
            torch.ones(60 * 2**18 * x.numel() // 4)
            return x

    stack = [Leaves(), TakesAtOnce()]
    pool.watch(stack, torch.nn.Module())
    peaks = []
    for elements in (4, 4, 4, 5):
        meter.reset_peak(torch.device("cpu"))
        x = torch.ones(elements)
        for layer in stack:
            x = layer(x)
        peaks.append((meter.peak_rss_bytes() - start) // 2**20)
    print(*peaks)
"""


@glibc_only
def test_what_a_layer_takes_and_gives_back_before_the_next_look_counts() -> None:
    done = subprocess.run([sys.executable, "-c", AT_ONCE], capture_output=True, text=True, check=True)
    *all_equal, larger = map(int, done.stdout.split())
    assert all(55 < peak < 70 for peak in all_equal) and 70 < larger < 80  # never 40 beside 60


BACKWARD = """if True:
    import torch
    from edgeft.machines import meter
    from edgeft.machines.pool import Pool
    torch.set_num_threads(1)
    assert meter.control_malloc()
    pool = Pool(256 * 2**20, 0)
    pool.limit = pool.most = meter.rss_bytes() + 400 * 2**20
    stack = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(4)))
    pool.watch(list(stack), stack)
    times = []
    for _ in range(6):
        stack(torch.ones(8192, 256, requires_grad=True)).sum().backward()
        times.append(pool.times_given_back)
    print(*times)
"""


@glibc_only
def test_a_place_is_new_once() -> None:
    done = subprocess.run([sys.executable, "-c", BACKWARD], capture_output=True, text=True, check=True)
    first, second, *later = map(int, done.stdout.split())
    assert first > 2 and set(later) == {second}  # forward, backward and between two steps


# 40 MiB lie free when the gradients have passed; the optimizer's step then takes 60 MiB at once.
STEP = """if True:
    import torch
    from edgeft.machines import meter
    from edgeft.machines.pool import Pool
    torch.set_num_threads(1)
    assert meter.control_malloc()
    layer, x = torch.nn.Linear(4, 4), torch.ones(1, 4, requires_grad=True)
    layer(x).sum().backward()
    start = meter.rss_bytes()
    pool = Pool(48 * 2**20, 0)
    pool.limit = pool.most = start + 80 * 2**20
    pool.watch([layer], torch.nn.Module())
    peaks = []
    for _ in range(4):
        meter.reset_peak(torch.device("cpu"))
        out = layer(x)
        kept = [torch.ones(2**18) for _ in range(40)]
        del kept
        out.sum().backward()
        torch.ones(60 * 2**18)
        peaks.append((meter.peak_rss_bytes() - start) // 2**20)
    print(*peaks)
"""


@glibc_only
def test_what_the_optimizers_step_takes_counts() -> None:
    done = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, check=True)
    assert all(55 < int(peak) < 75 for peak in done.stdout.split()), done.stdout


@glibc_only
def test_less_is_reserved_where_address_space_is_limited() -> None:
    limited = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**36, resource.RLIM_INFINITY))\n"
    *_, reserve = of(256 * MIB, 16 * MIB, 200 * MIB, 10, 4, before=limited)
    assert reserve == 16 * MIB
    *_, reserve = of(256 * MIB, 16 * MIB, 200 * MIB, 10, 4)
    assert reserve == 256 * MIB


def test_nothing_is_watched_where_nothing_is_reserved() -> None:
    class Refusing:
        def register_forward_pre_hook(self, *_: Any, **__: Any) -> None:
            raise AssertionError

    pool = Pool(0, 0)
    pool.watch([Refusing()], Refusing())  # type: ignore[list-item, arg-type]
    pool.give_back()
    pool.look(0, 1)
    assert pool.times_given_back == 0
