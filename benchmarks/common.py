"""What several benchmarks need: drawn inputs, calls timed in turns, a process's memory, Markdown."""

import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def normal(seed: int, *shape: int) -> np.ndarray:
    """Standard normal numbers, float32."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def as_particles(points: Any) -> Any:
    """Particles unchanged; an array as particles of equal weight."""
    from mmdjax import Particles

    return points if isinstance(points, Particles) else Particles(points)


def write_json(path: str | Path, report: Mapping[str, Any]) -> None:
    """`mmdjax.provenance.write_report`, imported when it is called: some benchmarks set up JAX first."""
    from mmdjax.provenance import write_report

    write_report(path, report)


def in_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, `rounds` times, after one that does not count. A call may return its own, a float."""
    import jax

    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            said = jax.block_until_ready(call())
            if turn:
                times[name].append(said if isinstance(said, float) else time.perf_counter() - start)
    return times


def medians(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median seconds of each call, in turns."""
    return {name: statistics.median(seconds) for name, seconds in in_turns(calls, rounds).items()}


def memory(field: str, process: int | str = "self") -> int:
    """Bytes of a field of /proc/…/status, such as VmRSS; 0 once the process has ended."""
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(found[1]) * 1024 if found else 0


def reset_peak() -> None:
    """Begin VmHWM, the most that this process has held, anew."""
    Path("/proc/self/clear_refs").write_text("5")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
