"""Sweeps: how alignment changes with the references, the batch, the steps and the dimension.

Energy distance of the untouched default to the target, as the share of the unguided excess that is left, and the
memorisation ratio; 100 references, 200 samples and 50 steps where nothing else is said.

    references   10 to 500
    batch        1,024 samples in batches of 4 to 1,024, each guided around those before it, or each on its own
    steps        10 to 1,000
    dimension    2 to 1,024: 12 Gaussians to 3 of them, shifted

    python benchmarks/sweeps.py                       # results/sweeps.json and sweeps.png
    python benchmarks/sweeps.py --only steps          # this one anew, the others kept
    python benchmarks/sweeps.py --tables              # the tables of benchmarks/README.md from the JSON
    python benchmarks/sweeps.py --quick               # one seed and the two smallest values of each, into out/
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from alignment import RESULTS
from common import table, write_json
from digit_tasks import digits_thick
from gaussian_tasks import mixture_16d, mixture_of_dimension, ring
from methods import batches, default, guided, unguided
from scores import fresh_energy, judge
from task import NUM_REFS, REPORTING, Task

from mmdjax.provenance import provenance

PLACEMENTS = ("denoised", "sample")
TOTAL = 1024  # samples of the batch sweep


class Point(NamedTuple):
    """One value on one curve."""

    task: Task
    value: int
    curve: str
    run: Callable[[int, Any], Any]  # (seed, refs) -> samples
    num_refs: int = NUM_REFS


task_of = functools.cache(lambda make, *arguments: make(*arguments))


def references() -> Iterator[Point]:
    for task, values in ((ring, (10, 20, 50, 100, 200, 500)), (mixture_16d, (10, 20, 50, 100, 200, 500)),
                         (digits_thick, (10, 20, 50, 100, 200, 350))):  # fmt: skip
        for m in values:
            for at in PLACEMENTS:
                task_ = task_of(task)
                run = lambda seed, refs, task_=task_, at=at: guided(task_, seed, refs, default(task_, at))
                yield Point(task_, m, at, run, m)


def batch() -> Iterator[Point]:
    for task in map(task_of, (ring, digits_thick)):
        for size in (4, 16, 64, 256, 1024):
            for remember in (True, False) if size < TOTAL else (False,):
                curve = "with memory" if remember else "without"
                yield Point(
                    task, size, curve, lambda seed, refs, task=task, size=size, remember=remember: batches(
                        task, seed, refs, size, TOTAL // size, remember=remember
                    ),
                )  # fmt: skip


def steps() -> Iterator[Point]:
    for task in map(task_of, (ring, digits_thick)):
        for n in (10, 20, 50, 100, 200, 500, 1000):
            for at in PLACEMENTS:
                run = lambda seed, refs, task=task, n=n, at=at: guided(task, seed, refs, default(task, at), num_steps=n)
                yield Point(task, n, at, run)
            yield Point(task, n, "unguided", lambda seed, refs, task=task, n=n: guided(task, seed, None, num_steps=n))


def dimension() -> Iterator[Point]:
    for d in (2, 4, 8, 16, 64, 256, 1024):
        task = task_of(mixture_of_dimension, d)
        for at in PLACEMENTS:
            run = lambda seed, refs, task=task, at=at: guided(task, seed, refs, default(task, at))
            yield Point(task, d, at, run)


SWEEPS = {sweep.__name__: sweep for sweep in (references, batch, steps, dimension)}


@functools.cache
def _unguided_excess(task, seeds):
    energies = [judge(task, seed).brief(unguided(task, seed))["energy"] for seed in seeds]
    return np.mean(energies) - fresh_energy(task)


def measure(point: Point, seeds: tuple[int, ...]) -> dict[str, Any]:
    """A row of the JSON: lists with one number a seed."""
    start = time.perf_counter()
    rows = []
    for seed in seeds:
        found = judge(point.task, seed, point.num_refs)
        x = point.run(seed, found.draw.refs)
        row = found.brief(x)
        if point.task.centres is not None:
            row["in_mode"] = float((point.task.off_centre(x.x) < 1).mean())
        row["left"] = (row["energy"] - fresh_energy(point.task)) / _unguided_excess(point.task, seeds)
        rows.append(row)
    record = {name: [float(f"{row[name]:.5g}") for row in rows] for name in rows[0]}
    named = {"task": point.task.name, "value": point.value, "curve": point.curve}
    return {**named, **record, "seconds": round(time.perf_counter() - start, 2)}


def show(row: dict[str, Any]) -> str:
    """A line in the terminal."""
    left = 100 * np.array(row["left"])
    error = left.std(ddof=1) / np.sqrt(len(left)) if len(left) > 1 else np.nan
    in_mode = f"   in mode {np.mean(row['in_mode']):.3f}" if "in_mode" in row else ""
    return (
        f"{row['task']:34}{row['value']:6}  {row['curve']:12}{left.mean():8.1f} ± {error:4.1f} % left"
        f"   ratio {np.mean(row['ratio']):.2f}{in_mode}   {row['seconds']:.1f} s"
    )


def tables(results: dict[str, Any]) -> dict[str, str]:
    """A table a sweep: % of the unguided excess left ± standard error (memorisation ratio)."""
    found = {}
    for name, record in results.items():
        curves: dict[str, dict[int, str]] = {}
        for row in record["rows"]:
            label = row["curve"] if name == "dimension" else f"{row['task']}, {row['curve']}"
            left = 100 * np.array(row["left"])
            error = left.std(ddof=1) / np.sqrt(len(left))
            text = f"{left.mean():.1f} ± {error:.1f} ({np.mean(row['ratio']):.2f})"
            curves.setdefault(label, {})[row["value"]] = text
        values = sorted({row["value"] for row in record["rows"]})
        rows = [[label, *(cells.get(value, "") for value in values)] for label, cells in curves.items()]
        found[name] = table([name, *map(str, values)], rows)
    return found


def picture(path: Path, results: dict[str, Any]) -> None:
    """The share left against the value, a panel a sweep."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(results), 3.2), layout="constrained")
    for axes, (name, record) in zip(
        figure.subplots(1, len(results), squeeze=False, sharey=True)[0], results.items(), strict=True
    ):
        by_dimension = name == "dimension"  # each value is a task of its own
        curves: dict[str, list] = {}
        for row in record["rows"]:
            label = row["curve"] if by_dimension else f"{row['task'].split(':')[0]}, {row['curve']}"
            curves.setdefault(label, []).append((row["value"], 100 * np.mean(row["left"])))
        for label, points in curves.items():
            axes.plot(*zip(*points, strict=True), marker=".", label=label)
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=1)
        axes.set(xlabel=name, ylabel="% of the unguided excess left")
        axes.legend(fontsize=6)
    figure.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, the two smallest values, into out/")
    parser.add_argument("--only", nargs="+", choices=SWEEPS, metavar="SWEEP", help=f"of {', '.join(SWEEPS)}")
    parser.add_argument("--tables", action="store_true", help="print the tables from the JSON, run nothing")
    parser.add_argument("--out", type=Path, help="folder for the JSON and the picture")
    args = parser.parse_args()
    folder = args.out or (Path("out") if args.quick else RESULTS)
    path = folder / "sweeps.json"
    if args.tables:
        print("\n\n".join(tables(json.loads(path.read_text())).values()))
        return
    results = json.loads(path.read_text()) if args.only and path.exists() else {}
    seeds = tuple(REPORTING)[: 1 if args.quick else None]
    start = time.perf_counter()
    for name in args.only or SWEEPS:
        print(f"\n{name}")
        points = list(SWEEPS[name]())
        if args.quick:
            smallest = sorted({point.value for point in points})[:2]
            points = [point for point in points if point.value in smallest]
        results[name] = {**provenance(), "seeds": list(seeds), "rows": []}
        for point in points:
            results[name]["rows"].append(measure(point, seeds))
            print(show(results[name]["rows"][-1]), flush=True)
            write_json(path, results)
    picture(path.with_suffix(".png"), results)
    print(f"\n{path}   ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
