"""A task: a pretrained model, and a target distribution of which few references are given.

`draw(seed, num_refs)` gives references, fresh samples of the target and the rest, a large set that all methods are
compared with. The three are disjoint. `CHOOSING` are the seeds that a default may be chosen on, `REPORTING` those that
are only reported.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.stats import chi2

from mmdjax import DiffusionModel

NUM_REFS, NUM_SAMPLES, NUM_STEPS = 100, 200, 50
CHOOSING, REPORTING = range(5), range(100, 105)
NUM_REST = 2000  # where the target can be drawn from without end


class Draw(NamedTuple):
    """Arrays, or Particles where they have conditions or weights."""

    refs: Any
    fresh: Any
    rest: Any


@dataclass(frozen=True, eq=False)
class Task:
    """A prior and a target.

    Args:
      name: of the table's column.
      model, params: the prior.
      draw: (seed, num_refs=100) -> Draw; ValueError where a finite pool has too few references.
      num_samples, num_steps: of each method; fewer where a network call is costly.
      methods: "all" of them; "network" leaves out kernels and widths, "few" leaves out training as well.
      as_it_is: the target is the prior's own distribution or near it, so that changing much is wrong.
      classify: samples -> the target's class or mode of each, the nearest one; None where the target has none.
      proportions: of these classes in the target; 0 for a class of the prior that the target leaves out.
      wanted: (samples, groups) -> which samples have the attribute that the references have in common.
      identity: samples -> a number for all else that each shows; the target's share of each is the prior's.
      features: samples -> features [n, k], for KID, precision and recall; None: the samples themselves.
      centres, std: a Gaussian mixture's modes in the target [k, d], and their standard deviation in each coordinate.
      cond: the conditions to sample, num_samples of them, or None.
      group_of: conditions -> the group of each, an integer; groups are compared each with its own.
      kernel: the default one times one of the conditions, where there are some; None otherwise.
      show: samples -> images, where they are none.
    """

    name: str
    model: DiffusionModel
    params: Any
    draw: Callable[..., Draw]
    num_samples: int = NUM_SAMPLES
    num_steps: int = NUM_STEPS
    methods: Literal["all", "network", "few"] = "all"
    as_it_is: bool = False
    classify: Callable[[Any], np.ndarray] | None = None
    proportions: np.ndarray | None = None
    wanted: Callable[[Any, Any], np.ndarray] | None = None
    identity: Callable[[Any], np.ndarray] | None = None
    features: Callable[[Any], np.ndarray] | None = None
    centres: np.ndarray | None = None
    std: float | None = None
    cond: Any = None
    group_of: Callable[[Any], np.ndarray] = np.asarray
    kernel: Any = None
    show: Callable[[Any], np.ndarray] | None = None

    def groups(self, cond: Any) -> np.ndarray | None:
        """The group of each condition; None where the task has no conditions."""
        return None if self.cond is None else np.asarray(self.group_of(cond))

    def off_centre(self, x: Any) -> np.ndarray:
        """Distance of each sample to its nearest mode, over the radius that holds 99% of that mode."""
        distance, _ = nearest(x, self.centres)
        return distance / (self.std * np.sqrt(chi2.ppf(0.99, self.centres.shape[1])))


def nearest(x: Any, places: Any) -> tuple[np.ndarray, np.ndarray]:
    """The distance of each sample to its nearest place, and which that is."""
    x, places = (np.asarray(v, np.float64).reshape(len(v), -1) for v in (x, places))
    d2 = (x**2).sum(1)[:, None] + (places**2).sum(1) - 2 * x @ places.T
    index = d2.argmin(1)
    return np.linalg.norm(x - places[index], axis=1), index


def split(points: Any, num_refs: int, num_fresh: int = NUM_SAMPLES) -> Draw:
    """References, fresh samples and the rest, in this order."""
    if num_refs + num_fresh >= len(points):
        raise ValueError(f"num_refs is {num_refs}; of {len(points)} samples {num_fresh} are fresh, and some the rest")
    return Draw(points[:num_refs], points[num_refs : num_refs + num_fresh], points[num_refs + num_fresh :])


def split_pool(pool: np.ndarray, seed: int, num_refs: int = NUM_REFS, num_fresh: int = NUM_SAMPLES) -> Draw:
    """The same, in a random order."""
    return split(pool[np.random.default_rng(seed).permutation(len(pool))], num_refs, num_fresh)
