"""How good samples are, against one draw of a task.

    energy      U-statistic energy distance to `rest`, in the data's units
    ratio       memorisation: mean distance to the nearest reference over that of `rest`
    in_mode     share within the 99% radius of a mode of the target
    tv          total variation between the classes' or modes' proportions and the target's
    share       of samples that have the references' attribute
    identity    total variation between all else that samples show and what `rest` shows; what fresh samples have is
                chance
    kid         between features of the samples and of `rest`
    precision, recall, density, coverage    against at most 500 of `rest`, by features where the task has some

Where a task has conditions, all but share are means over their groups, each given its own.
"""

import functools
from typing import Any

import jax
import numpy as np
from common import as_particles
from task import NUM_REFS, Draw, Task

from mmdjax import Energy, Particles
from mmdjax.metrics import density_coverage, kid, nearest_ratio, precision_recall
from mmdjax.mmd import cross_term, self_term

AT_MOST = 500
COPIES = 0.8  # a method whose memorisation ratio is below does not count


class Judge:
    """One draw of a task, and the scores of samples against it. What does not depend on the samples is made once."""

    def __init__(self, task: Task, draw: Draw):
        self.task, self.draw = task, draw
        self.refs, self.rest = self.by_condition(draw.refs), self.by_condition(draw.rest)
        self.among = [_among(rest) for rest in self.rest]

    def by_condition(self, points: Any) -> list[Particles]:
        """The samples of each group of conditions, as many of each; all of them where the task has no conditions."""
        points = as_particles(points)
        labels = self.task.groups(points.cond)
        if labels is None:
            return [Particles(points.x, weight=points.weight)]
        weight = np.ones(points.n) if points.weight is None else np.asarray(points.weight)
        rows = [np.flatnonzero(labels == c) for c in np.unique(self.task.groups(self.task.cond))]
        rows = [row[: min(map(len, rows))] for row in rows]  # equal shapes: each is compiled for once
        return [Particles(points.x[row], weight=weight[row]) for row in rows]

    def energies(self, x: Any) -> list[float]:
        """Energy distance to `rest` by condition: `metrics.energy_distance`, the rest's own term made once."""
        parts = zip(self.by_condition(x), self.rest, self.among, strict=True)
        return [float(_energy(part, rest, among)) for part, rest, among in parts]

    def brief(self, x: Any) -> dict[str, float]:
        """What settings are chosen by: energy and ratio."""
        parts = zip(self.by_condition(x), self.refs, self.rest, strict=True)
        ratios = [float(nearest_ratio(part, refs, rest)) for part, refs, rest in parts]
        return {"energy": float(np.mean(self.energies(x))), "ratio": float(np.mean(ratios))}

    def scores(self, x: Any) -> dict[str, float]:
        """All that this module's docstring lists and the task has."""
        found, points = self.brief(x), as_particles(x)
        if self.task.centres is not None:
            found["in_mode"] = float((self.task.off_centre(points.x) < 1).mean())
        if self.task.proportions is not None:
            share = np.bincount(
                self.task.classify(points.x), np.asarray(points.probabilities()), len(self.task.proportions)
            )
            found["tv"] = float(0.5 * np.abs(share - self.task.proportions).sum())
        if self.task.wanted is not None:
            found["share"] = float(np.mean(self.task.wanted(points.x, self.task.groups(points.cond))))
        if self.task.identity is not None:
            pair = [self.task.identity(each.x) for each in (points, as_particles(self.draw.rest))]
            counts = [np.bincount(each, minlength=1 + max(map(np.max, pair))) / len(each) for each in pair]
            found["identity"] = float(0.5 * np.abs(counts[0] - counts[1]).sum())
        features = self.task.features or np.asarray
        parts = [
            [features(unweighted(each)) for each in pair] for pair in zip(self.by_condition(x), self.rest, strict=True)
        ]
        if self.task.features is not None:
            found["kid"] = float(np.mean([kid(*pair).value for pair in parts]))
        four = [[*precision_recall(*pair), *density_coverage(*pair)] for pair in parts]
        return found | dict(
            zip(("precision", "recall", "density", "coverage"), np.mean(four, axis=0).tolist(), strict=True)
        )


@functools.cache
def judge(task: Task, seed: int, num_refs: int = NUM_REFS) -> Judge:
    """The draw of a seed."""
    return Judge(task, task.draw(seed, num_refs))


def unweighted(points: Particles) -> np.ndarray:
    """At most 500 of the samples, no two the same, in proportion to their weights."""
    weight = np.asarray(points.probabilities(), np.float64)
    total = min(AT_MOST, 1 / weight.max())
    steps = np.floor(np.cumsum(np.append(0.5, weight * total)))  # rises by one where a row is taken
    return np.asarray(points.x)[np.diff(steps) > 0]


@jax.jit
def _among(points):
    return self_term(Energy(), points, "u")


@jax.jit
def _energy(x, rest, among):
    return self_term(Energy(), x, "u") - 2 * cross_term(Energy(), x, rest) + among


def fresh_energy(task: Task, draws: int = 200) -> float:
    """The mean energy of a fresh target sample, from which excess is counted.

    The U-statistic being unbiased, that is 0 for independent samples, and for random halves of a finite pool. Where the
    halves hold fixed numbers of each class (weights say so) it is a little below.
    """
    if as_particles(task.draw(0).rest).weight is None:
        return 0.0
    judges = (Judge(task, task.draw(seed)) for seed in range(1000, 1000 + draws))
    return float(np.mean([judge.energies(judge.draw.fresh) for judge in judges]))


def redraw_excess(task: Task, num_refs: int = NUM_REFS) -> float:
    """The excess of redrawing `num_refs` fresh target samples without end: E|x − x'| over their number.

    What is left of the excess of a method that does no better with its references than to repeat them.
    """
    judges = [judge(task, seed) for seed in range(5)]
    return float(np.mean([-np.mean(each.among) * len(each.rest) / num_refs for each in judges]))


def redraw_tv(proportions: np.ndarray, num_refs: int = NUM_REFS) -> float:
    """The mean total variation of so many fresh samples' classes."""
    counts = np.random.default_rng(0).multinomial(num_refs, proportions, size=10_000)
    return float(0.5 * np.abs(counts / num_refs - proportions).sum(1).mean())
