"""Times of several candidates in one run: interleaved, so that whatever else the machine does meets all of them alike;
of each the lower quartile, of few samples the least."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from gc import collect

import torch

Run = Callable[[], object]
LEAST = 0.02  # seconds of one sample: the clock of a process is coarse on some systems
SAMPLES = (3, 40)  # the fewest and the most of one candidate
LONG = 0.5  # seconds of a sample, of which one less will do


def seconds(runs: Mapping[str, Run], each: float, device: torch.device) -> dict[str, float]:
    """Seconds of one call of each candidate: CPU time of one thread, or between events on a GPU.

    Args:
        runs: the candidates.
        each: seconds to spend on each of them.
        device: on which they run.
    """
    clock = _between_events if device.type == "cuda" else _cpu_time
    collect()
    with _quiet():
        times = {}
        for name, run in runs.items():  # the first call settles much; a long one is not repeated for that
            times[name] = clock(run, 1)
            if times[name] < 10 * LEAST:
                times[name] = clock(run, 1)
        calls = {name: max(1, round(LEAST / max(took, 1e-7))) for name, took in times.items()}
        longest = max(calls[name] * took for name, took in times.items())
        fewest = SAMPLES[0] - (longest > LONG)
        rounds = max(fewest, min(SAMPLES[1], round(each / max(longest, 1e-7))))
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                samples[name].append(clock(run, calls[name]))
    return {name: sorted(found)[len(found) // 4] for name, found in samples.items()}


def _cpu_time(run: Run, calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        run()
    return (time.process_time() - start) / calls


def _between_events(run: Run, calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / calls


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the collector of cycles, whose time would be somebody's by chance."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def now(device: torch.device) -> float:
    """A clock for what runs once: of the process, or on the wall when a GPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def once(makes: Mapping[str, Callable[[], Run]], device: torch.device, samples: int = 3) -> dict[str, float]:
    """Seconds of calls that cannot be repeated: the least of some samples, the candidates in turns.

    Args:
        makes: candidate -> what prepares a call, whose own time does not count.
        device: on which they run.
        samples: of each.
    """
    found: dict[str, list[float]] = {name: [] for name in makes}
    for _ in range(samples):
        for name, make in makes.items():
            run = make()
            with _quiet():
                start = now(device)
                run()
                found[name].append(now(device) - start)
    return {name: min(times) for name, times in found.items()}
