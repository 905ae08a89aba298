"""Checks of point sets, and kernels fitted to them: what `mmd2`, `witness` and every metric begin with."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmdjax._points.distances import subset
from mmdjax._points.particles import Particles, as_particles, check_points, num_present, whole, widen
from mmdjax._points.streaming import HostReferences
from mmdjax.kernels import as_kernel, check_fitted


def check_comparable(name_p: str, p: Particles, name_q: str, q: Particles, kernel_uses_cond: bool = True) -> None:
    """Raise ValueError if the samples of two point sets, or their conditions, differ in structure or shape."""
    for part in ("x", "cond"):
        left, right = getattr(p, part), getattr(q, part)
        if part == "cond" and (left is None or right is None or not kernel_uses_cond):
            continue
        left, right = (_one_leaf(v) for v in (left, right))
        if jax.tree.structure(left) != jax.tree.structure(right) or any(
            np.shape(a)[1:] != np.shape(b)[1:]
            for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
        ):
            shapes = [jax.tree.map(np.shape, tree) for tree in (left, right)]
            raise ValueError(
                f"{name_p}.{part} has shape {shapes[0]} but {name_q}.{part} has {shapes[1]}; samples must match"
            )


def _one_leaf(v):
    # references on the host have the shape of one array
    return np.broadcast_to(np.float32(0), v.shape) if isinstance(v, HostReferences) else v


def as_sets(
    *, weighted: bool = True, at_least: int = 1, estimator: str = "v", uses_cond: bool = False, **sets: Any
) -> list[Particles]:
    """The named sets as Particles in at least float32, empty slots filled, whole on every device of Explicit axes.

    Args:
      at_least: the fewest samples of a set, counting those of weight above 0 if weights are concrete; at least 2 with
        the estimator "u".
    Raises:
      TypeError: a set does not hold arrays.
      ValueError: a set is empty, too small or not finite; its samples have another shape than the last set's; it has
        weights, and the metric has no meaning for them.
    """
    particles = {name: as_particles(points, name) for name, points in sets.items()}
    last = list(particles)[-1]
    if estimator == "u":
        at_least = max(2, at_least)
    for name, points in particles.items():
        check_points(name, points)
        check_comparable(name, points, last, particles[last], kernel_uses_cond=uses_cond)
        count = num_present(points)
        if count < at_least:
            why = "" if count == points.n else " of weight above 0 (in its precision)"
            remedy = ' by the unbiased estimator; give more, or take estimator="v"' if estimator == "u" else ""
            raise ValueError(f"{name} has {count} samples{why}; at least {at_least} are needed{remedy}")
        if not weighted and points.weight is not None:
            raise ValueError(f"{name} has weights, which this metric does not take; draw rows in proportion to them")
    return [widen(points) for points in whole(list(particles.values()))]


def with_kernel(kernel: Any, *, fit_to_all: bool = False, **settings: Any) -> tuple[Any, ...]:
    """The fitted kernel, then the sets of `as_sets`. Its bandwidths are taken from the last set, or from all.

    Raises:
      TypeError: the kernel is not callable, or as `as_sets`.
      ValueError: as `as_sets`, or a bandwidth comes out as 0.
    """
    kernel = as_kernel(kernel)
    sets = as_sets(uses_cond=kernel.uses_cond, **settings)
    kernel = kernel.fit(_pooled(sets, kernel.uses_cond) if fit_to_all else sets[-1])
    check_fitted(kernel)
    return kernel, *sets


def _pooled(sets: list[Particles], with_cond: bool) -> Particles:
    # as many rows of each as bandwidths are taken from; the whole sets would be copied
    parts = [(r.x, r.cond if with_cond else None) for r in sets]
    some = [jax.tree.map(lambda v, n=r.n: v[subset(n)], part) for r, part in zip(sets, parts, strict=True)]
    return Particles(*jax.tree.map(lambda *v: jnp.concatenate(v), *some))
