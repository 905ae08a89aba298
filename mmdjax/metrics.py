"""Distances between sets of samples, for judging what guidance did.

Each takes arrays (or any pytree of arrays) [n, ...] and is jit-able.

References:
  Székely & Rizzo 2013 (energy distance).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmdjax.distances import squared_distance
from mmdjax.kernels import Energy
from mmdjax.mmd import Estimator, check_comparable, mmd2
from mmdjax.particles import as_particles, check_points, flat


def energy_distance(x: Any, y: Any, *, estimator: Estimator = "u") -> Float[Array, ""]:
    """2 E|x − y| − E|x − x'| − E|y − y'|, in the data's units.

    Args:
      x: n samples [n, ...].
      y: m samples [m, ...].
      estimator: "u", unbiased (may be slightly negative), or "v".
    Raises:
      ValueError: the samples' shapes differ.

    Example:
      >>> round(float(energy_distance(jnp.zeros((3, 2)), jnp.array([[3.0, 4.0]] * 3))), 4)
      10.0

    Source: Székely & Rizzo 2013, eq. 2.
    """
    return mmd2(Energy(), x, y, estimator=estimator)


def nearest_ratio(x: Any, refs: Any, fresh: Any) -> Float[Array, ""]:
    """Mean distance of x to its nearest reference, over that of fresh samples of the target: below 1, x copies.

    Args:
      x: generated samples [n, ...].
      refs: the references that guided them [m, ...].
      fresh: samples of the target that are not among the references [k, ...].
    Raises:
      ValueError: the samples' shapes differ.

    Example:
      >>> refs, fresh = jnp.array([[0.0]]), jnp.array([[2.0], [-2.0]])
      >>> float(nearest_ratio(jnp.array([[1.0]]), refs, fresh))
      0.5
    """
    x, refs, fresh = map(as_particles, (x, refs, fresh))
    for name, points in (("x", x), ("refs", refs), ("fresh", fresh)):
        check_points(name, points)
        check_comparable(name, points, "refs", refs)

    def nearest(points):
        d2 = jax.lax.map(lambda row: squared_distance(row[None], flat(refs.x), accurate=True).min(), flat(points.x))
        return points.probabilities() @ jnp.sqrt(d2)

    return nearest(x) / nearest(fresh)
