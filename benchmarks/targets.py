"""Thresholds for alignment, and what was measured beside them; benchmarks/README.md says where each comes from.

Each quantity has two: "goal" is the stricter, "must" the other. Some are made of other methods' figures on the same
task. A share counts only where the memorisation ratio is at least .8.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from methods import ALTERNATIVES, DEFAULT, PLAIN, RULE, TUNED, batches, default, guided
from scipy.stats import t as student
from scores import COPIES, Judge, judge
from task import NUM_REFS, Task

from mmdjax.tree import replace

PAIRED = range(100, 120)  # seeds for small batches against a large one
FEW, SHORT, OTHER_REFS = 20, 20, (20, 50, 300)  # references, steps
BATCH, NUM_BATCHES = 16, 20
REFS_NAME = "{} references"
FIELD_REFS, FIELD_NAME = (20, 50), '{} references, "field"'
FEW_NAME, SHORT_NAME = REFS_NAME.format(FEW), f"{SHORT} steps"
SMALL_NAME = f"{NUM_BATCHES} batches of {BATCH} with memory"
LARGE_NAME = f"one batch of {BATCH * NUM_BATCHES}"


@dataclass(frozen=True)
class Target:
    """A row of the table; met is "goal" (and so "must"), "must" or "no"."""

    name: str
    task: str
    measured: str
    must: str
    goal: str
    met: str


def variations(task: Task, reporting: Any, paired: Any) -> dict[str, dict[str, list[float]]]:
    """The default's scores with other numbers of references; its energy and ratio in fewer steps, in small batches."""
    found = {}

    def score(name, seeds, run, num_refs=NUM_REFS, how=Judge.brief):
        rows = [how(each := judge(task, seed, num_refs), run(seed, each.draw.refs)) for seed in seeds]
        found[name] = {key: [float(f"{row[key]:.5g}") for row in rows] for key in rows[0]}

    for m in OTHER_REFS:
        try:
            run = lambda seed, refs: guided(task, seed, refs, default(task))
            score(REFS_NAME.format(m), reporting, run, m, Judge.scores)
        except ValueError as error:  # the pool has no more
            print(f"{m} references: {error}")
    field = replace(default(task), precondition="field")
    for m in FIELD_REFS:
        score(FIELD_NAME.format(m), reporting, lambda seed, refs: guided(task, seed, refs, field), m, Judge.scores)
    if task.methods == "all":
        score(SHORT_NAME, reporting, lambda seed, refs: guided(task, seed, refs, default(task), num_steps=SHORT))
        size = BATCH * NUM_BATCHES
        score(SMALL_NAME, paired, lambda seed, refs: batches(task, seed, refs, BATCH, NUM_BATCHES))
        score(LARGE_NAME, paired, lambda seed, refs: guided(task, seed, refs, default(task), num_samples=size))
    return found


def targets(tasks: dict[str, Any]) -> list[Target]:
    """All targets for which the JSON's "tasks" have figures."""
    rows = []

    def add(name, task, measured, must, goal, *, above=False, counts=True, digits=3):
        def meets(threshold):
            return counts and (measured >= threshold if above else measured <= threshold)

        must, goal = sorted((must, goal), reverse=not above)
        texts = [f"{'≥' if above else '≤'} {threshold:.{digits}f}" for threshold in (must, goal)]
        met = "goal" if meets(goal) else "must" if meets(must) else "no"
        rows.append(Target(name, task, f"{measured:.{digits}f}", *texts, met))

    for task, record in tasks.items():
        made, varied, fresh = record["methods"], record["variations"], record["fresh_energy"]
        mean = {
            method: {key: np.mean(v) for key, v in row.items() if isinstance(v, list)} for method, row in made.items()
        }
        ours = mean[DEFAULT]
        if record["as_it_is"]:
            for m in (NUM_REFS, *OTHER_REFS):
                row = made[DEFAULT] if m == NUM_REFS else varied.get(REFS_NAME.format(m))
                if row is not None:
                    harm = np.mean(row["energy"]) - mean["unguided"]["energy"]
                    add(f"energy above the unguided samples', {m} references", task, harm, 0.1, 0.02)
            continue
        unguided = mean["unguided"]["energy"] - fresh
        share = {method: (row["energy"] - fresh) / unguided for method, row in mean.items()}
        honest = ours["ratio"] >= COPIES
        rivals = [share[method] for method in (RULE, TUNED) if method in mean and mean[method]["ratio"] >= COPIES]
        must, goal = min([0.15, *rivals]), max(0.03, record["redraw_excess"] / unguided)
        add(
            "share of the unguided excess left",
            task,
            share[DEFAULT],
            must,
            0.05 if "share" in ours else goal,
            counts=honest,
        )
        if "share" in ours:
            reached = ours["share"] / mean["fresh sample"]["share"]
            add("share with the attribute, over fresh samples'", task, reached, 0.9, 0.95, above=True, digits=2)
        if "in_mode" in ours:
            add("in a mode's neighbourhood", task, ours["in_mode"], 0.95, 0.98, above=True)
        if "tv" in ours:
            add("total variation of proportions", task, ours["tv"], 0.5 * mean[RULE]["tv"], 1.2 * record["redraw_tv"])
        add(f"memorisation ratio, {NUM_REFS} references", task, ours["ratio"], COPIES, 0.95, above=True, digits=2)
        if FEW_NAME in varied:
            few = np.mean(varied[FEW_NAME]["ratio"])
            add(f"memorisation ratio, {FEW} references", task, few, 0.7, 0.9, above=True, digits=2)
        better = _better(made)
        add("alternatives that leave less and copy less", task, len(better), 1, 0, digits=0)
        if PLAIN in made:
            plain = mean[PLAIN]["energy"] - fresh
            add("excess by condition, product kernel", task, ours["energy"] - fresh, 0.5 * plain, 0.1 * unguided)
        for name, new, old in (
            (f"{SHORT_NAME} against 50", varied.get(SHORT_NAME), made[DEFAULT]),
            (f"{SMALL_NAME} against {LARGE_NAME}", varied.get(SMALL_NAME), varied.get(LARGE_NAME)),
        ):
            if new is not None:
                rows.append(_paired(name, task, new["energy"], old["energy"], fresh, record["redraw_excess"]))
    return rows


def _better(made: dict[str, Any]) -> list[str]:
    """Methods that leave less, by more than a standard error over the seeds, with a ratio that is no smaller."""
    found = []
    for name in ALTERNATIVES:
        if name in made:
            less = np.subtract(made[DEFAULT]["energy"], made[name]["energy"])
            clear = less.mean() > np.std(less, ddof=1) / np.sqrt(len(less))
            if clear and np.mean(made[name]["ratio"]) >= np.mean(made[DEFAULT]["ratio"]):
                found.append(name)
    return found


def _paired(name, task, new, old, fresh, redraw):
    """The mean difference by seed, with its 95% interval, over the old excess.

    The old excess counts as no less than that of redrawing as many target samples as there are references: below it is
    chance, which a ratio would blow up.
    """
    difference = np.subtract(new, old) / max(np.mean(old) - fresh, redraw)
    half = student.ppf(0.975, len(difference) - 1) * np.std(difference, ddof=1) / np.sqrt(len(difference))
    mean = difference.mean()
    met = "no" if mean > 0.25 else "must" if mean > half else "goal"  # less is no fault
    return Target(name, task, f"{mean:+.2f} ± {half:.2f}", "≤ 0.25", "≤ 0.25, interval reaches 0", met)
