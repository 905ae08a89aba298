"""Thresholds for alignment, and what was measured beside them; benchmarks/README.md says where each comes from.

Each quantity has two: "goal" is the stricter, "must" the other. Some are made of other methods' figures on the same
task. A share counts only where the memorisation ratio is at least .8.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from methods import DEFAULT, PLAIN, RULE, TUNED, batches, default, guided
from scipy.stats import t as student
from scores import COPIES, judge
from tasks import NUM_REFS, Task

PAIRED = range(100, 120)  # seeds for small batches against a large one
FEW, SHORT = 20, 20  # references, steps
BATCH, NUM_BATCHES = 16, 20
FEW_NAME, SHORT_NAME = f"{FEW} references", f"{SHORT} steps"
SMALL_NAME = f"{NUM_BATCHES} batches of {BATCH} with memory"
LARGE_NAME = f"one batch of {BATCH * NUM_BATCHES}"
BEYOND = 0.3  # of precision between unguided and fresh samples: the style lies outside the source's support


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
    """Energy and memorisation ratio of the default with fewer references, fewer steps, and in small batches."""
    found = {}

    def score(name, seeds, run, num_refs=NUM_REFS):
        rows = [judge(task, seed, num_refs).brief(run(seed, judge(task, seed, num_refs).draw.refs)) for seed in seeds]
        found[name] = {key: [float(f"{row[key]:.5g}") for row in rows] for key in rows[0]}

    score(FEW_NAME, reporting, lambda seed, refs: guided(task, seed, refs, default(task)), FEW)
    score(SHORT_NAME, reporting, lambda seed, refs: guided(task, seed, refs, default(task), num_steps=SHORT))
    score(SMALL_NAME, paired, lambda seed, refs: batches(task, seed, refs, BATCH, NUM_BATCHES))
    score(
        LARGE_NAME, paired, lambda seed, refs: guided(task, seed, refs, default(task), num_samples=BATCH * NUM_BATCHES)
    )
    return found


def targets(tasks: dict[str, Any]) -> list[Target]:
    """All targets for which the JSON's "tasks" have figures."""
    rows = []

    def add(name, task, measured, must, goal, *, above=False, counts=True, digits=3):
        def meets(threshold):
            return counts and (measured >= threshold if above else measured <= threshold)

        if must is not None:
            must, goal = sorted((must, goal), reverse=not above)
        sign = "≥" if above else "≤"
        texts = [f"{sign} {threshold:.{digits}f}" if threshold is not None else "–" for threshold in (must, goal)]
        met = "goal" if meets(goal) else "must" if must is not None and meets(must) else "no"
        rows.append(Target(name, task, f"{measured:.{digits}f}", *texts, met))

    for task, record in tasks.items():
        made, varied, fresh = record["methods"], record["variations"], record["fresh_energy"]
        mean = {
            method: {key: np.mean(v) for key, v in row.items() if isinstance(v, list)} for method, row in made.items()
        }
        unguided = mean["unguided"]["energy"] - fresh
        share = {method: (row["energy"] - fresh) / unguided for method, row in mean.items()}
        ours, honest = mean[DEFAULT], mean[DEFAULT]["ratio"] >= COPIES
        rivals = [share[method] for method in (RULE, TUNED) if mean[method]["ratio"] >= COPIES]
        redraw = record["redraw_excess"] / unguided
        must = min([0.15, *rivals])
        add("share of the unguided excess left", task, share[DEFAULT], must, max(0.03, redraw), counts=honest)
        if "in_mode" in ours:
            add("in a mode's neighbourhood", task, ours["in_mode"], 0.95, 0.98, above=True)
        if "tv" in ours:
            add("total variation of proportions", task, ours["tv"], 0.5 * mean[RULE]["tv"], 1.2 * record["redraw_tv"])
        if "digits" in task:
            fresh_precision, before = mean["fresh sample"]["precision"], mean["unguided"]["precision"]
            outside = fresh_precision - before > BEYOND
            add(
                "precision against the target", task, ours["precision"], before + 0.3 if outside else None,
                fresh_precision - 0.05, above=True,
            )  # fmt: skip
        add(f"memorisation ratio, {NUM_REFS} references", task, ours["ratio"], COPIES, 0.95, above=True, digits=2)
        if PLAIN in made:
            plain = mean[PLAIN]["energy"] - fresh
            add("per-class excess, product kernel", task, ours["energy"] - fresh, 0.5 * plain, 0.1 * unguided)
        if varied:
            few = np.mean(varied[FEW_NAME]["ratio"])
            add(f"memorisation ratio, {FEW} references", task, few, 0.7, 0.9, above=True, digits=2)
            for name, new, old in (
                (f"{SHORT_NAME} against 50", varied[SHORT_NAME], made[DEFAULT]),
                (f"{SMALL_NAME} against {LARGE_NAME}", varied[SMALL_NAME], varied[LARGE_NAME]),
            ):
                rows.append(_paired(name, task, new["energy"], old["energy"], fresh, record["redraw_excess"]))
    return rows


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
