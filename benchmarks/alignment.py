"""Alignment: how close samples come to the target, by guidance and by what a user would do without it.

For each task of `tasks.py`: 100 references; 200 samples in 50 network calls each, of faces 100 samples in 25. Each
method of `methods.py` is scored by `scores.py` on seeds that nothing was chosen on; what a method leaves open is chosen
on others. `targets.py` adds other numbers of references, fewer steps and small batches with a memory, and holds all of
it against thresholds.

    python benchmarks/alignment.py                       # the core: four tasks, no trained methods, into out/
    python benchmarks/alignment.py --all                 # everything: results/alignment.json and the pictures
    python benchmarks/alignment.py --only ring grid      # these tasks anew, the others kept
    python benchmarks/alignment.py --quick               # one seed, few methods, two tasks, into out/
    python benchmarks/alignment.py --tables              # the tables of benchmarks/README.md from the JSON

The JSON is written after each task.

benchmarks/README.md has the tables and, under "Tried and dropped", what was tried in place of the default rule and why
it went. Read it before trying anything new.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from alignment_tables import error, share_left, tables, target_table
from common import write_json
from methods import DEFAULT, PLAIN, RULE, TUNED, Method, methods
from pictures import picture
from scores import COPIES, fresh_energy, judge, redraw_excess, redraw_tv
from targets import PAIRED, targets, variations
from task import CHOOSING, NUM_REFS, REPORTING, Task
from tasks import CORE, TASKS

from mmdjax.provenance import provenance

RESULTS = Path(__file__).parent / "results"
QUICK_TASKS = ("ring", "digits_prompted")
CHOOSE_BY = {"all": None, "network": 1, "few": 1}  # seeds for choosing: a costly task has fewer
CORE_METHODS = (
    "fresh sample", "references", "unguided", RULE, DEFAULT, "follow the mean", "SDEdit from references",
    "references with noise",
)  # fmt: skip
QUICK_METHODS = ("fresh sample", "references", "unguided", RULE, DEFAULT, PLAIN, TUNED, "references with noise")


def measure(task: Task, method: Method, choosing: Any, reporting: Any) -> dict[str, Any]:
    """A method's scores by name, a list with one number a seed; under "tried" the mean ones of each setting."""
    tried: dict[str, Any] = {}
    choosing = choosing[: CHOOSE_BY[task.methods]]
    if len(method.settings) > 1:
        for label, setting in method.settings.items():
            found = [judge(task, seed).brief(method.run(task, seed, setting)) for seed in choosing]
            tried[label] = {name: _round(np.mean([each[name] for each in found])) for name in found[0]}
    label = best(tried) if tried else next(iter(method.settings))
    rows = []
    for seed in reporting:
        start = time.perf_counter()
        x = jax.block_until_ready(method.run(task, seed, method.settings[label]))
        seconds = time.perf_counter() - start
        rows.append({**judge(task, seed).scores(x), "seconds": seconds})
    record = {name: [_round(row[name]) for row in rows] for name in rows[0]}
    return {**record, "setting": label, "tried": tried} if tried else record


def best(tried: dict[str, dict[str, float]]) -> str:
    """The setting with the smallest energy of those that do not copy; where all do, the one that does least."""
    honest = [label for label, row in tried.items() if row["ratio"] >= COPIES]
    if honest:
        return min(honest, key=lambda label: tried[label]["energy"])
    return max(tried, key=lambda label: tried[label]["ratio"])


def run(task: Task, quick: bool, core: bool, choosing: Any, reporting: Any) -> dict[str, Any]:
    """A task's record in the JSON; of the core few methods and no variations, and quickly few settings, too."""
    few = QUICK_METHODS if quick else CORE_METHODS if core else None
    found, seconds = {}, {}
    for name, method in methods(task).items():
        if few is not None and name not in few:
            continue
        start = time.perf_counter()
        if quick:
            method = method.thinned(3)
        found[name] = measure(task, method, choosing, reporting)
        seconds[name] = _round(time.perf_counter() - start)
        print(f"{seconds[name]:8.1f} s  {name}", flush=True)
    start = time.perf_counter()
    record = {
        "as_it_is": task.as_it_is,
        "fresh_energy": _round(fresh_energy(task)),
        "redraw_excess": _round(redraw_excess(task)),
        "redraw_tv": None if task.proportions is None else _round(redraw_tv(task.proportions)),
        "samples": task.num_samples,
        "steps": task.num_steps,
        "methods": found,
        "variations": {} if few is not None else variations(task, reporting, PAIRED),
    }
    seconds["variations"] = _round(time.perf_counter() - start)
    print(f"{seconds['variations']:8.1f} s  variations", flush=True)
    return {**record, "seconds": seconds, **provenance()}


def show(name: str, record: dict[str, Any]) -> None:
    """A task's table in the terminal."""
    columns = ("ratio", "share", "identity", "kid", "in_mode", "tv", "precision", "recall", "density", "coverage")
    print(f"\n{name}\n{'':42}{'energy':>10}{'± s.e.':>9}{'% left':>8}" + "".join(f"{c:>10}" for c in columns))
    for method, row in record["methods"].items():
        cells = [f"{np.mean(row[c]):10.3f}" if c in row else f"{'':10}" for c in columns]
        left = 100 * share_left(record, method).mean()
        print(
            f"{method:42}{np.mean(row['energy']):10.4f}{error(row['energy']):9.4f}{left:8.1f}{''.join(cells)}"
            f"  {np.median(row['seconds']):7.2f} s  {row.get('setting', '')}"
        )
    print(flush=True)


def _round(value):
    return float(f"{float(value):.5g}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    makers = {make.__name__: make for make in TASKS}
    parser.add_argument("--quick", action="store_true", help="one seed, few methods, two tasks, into out/")
    parser.add_argument("--all", action="store_true", help="all tasks, in place of the core")
    parser.add_argument("--only", nargs="+", choices=makers, metavar="TASK", help=f"of {', '.join(makers)}")
    parser.add_argument("--tables", action="store_true", help="print the tables from the JSON, run nothing")
    parser.add_argument("--out", type=Path, help="folder for the JSON and the pictures")
    args = parser.parse_args()
    core = not (args.quick or args.all or args.only)
    folder = args.out or (Path("out") if args.quick or core else RESULTS)
    path = folder / "alignment.json"
    if args.tables:
        print("\n\n".join(tables(json.loads(((args.out or RESULTS) / "alignment.json").read_text()))))
        return

    if args.quick:
        jax.config.update("jax_disable_most_optimizations", True)  # compilation is most of the time
    settings = {
        "references": NUM_REFS,
        "choosing": list(CHOOSING)[: 1 if args.quick else None],
        "reporting": list(REPORTING)[: 1 if args.quick else None],
    }
    old = {} if args.quick or core or not path.exists() else json.loads(path.read_text())  # tasks that are not run stay
    found = old.get("tasks", {})
    names = args.only or (QUICK_TASKS if args.quick else makers if args.all else [make.__name__ for make in CORE])
    start = time.perf_counter()
    for name in names:
        jax.clear_caches()  # thousands of programs in one process exhaust its memory mappings
        task = makers[name]()
        print(f"\n{task.name}")
        record = found[task.name] = run(task, args.quick, core, settings["choosing"], settings["reporting"])
        order = [make().name for make in TASKS]  # the tasks' own, whatever was run last
        found = {key: found[key] for key in order if key in found}
        results = {**settings, "tasks": found, "targets": [dataclasses.asdict(row) for row in targets(found)]}
        write_json(path, results)
        picture(folder / f"{name}.png", task, record, settings["reporting"][0])
        show(task.name, record)
    print(target_table(targets(found)))
    print(f"\n{path}   ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
