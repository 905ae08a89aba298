"""Metrics of nearest neighbours: fidelity, coverage, a classifier test, memorisation.

Distances that differ by no more than rounding count as equal. Features on a grid, such as integers, have no rounding,
unless their squared distances exceed the digits of a float.

References:
  Kynkäänniemi et al. 2019 (improved precision and recall), Naeem et al. 2020 (density and coverage), Lopez-Paz & Oquab
  2017 (classifier two-sample tests).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mmdjax._core.modes import in_own_modes
from mmdjax._core.numerics import product, safe_sqrt
from mmdjax._points.blocks import all_pairs, fold, own_pairs, upper_pairs
from mmdjax._points.distances import DIRECT, about, centred_distance, middle
from mmdjax._points.particles import Particles, flat
from mmdjax.fit import as_sets


class PrecisionRecall(NamedTuple):
    """The share of generated samples that are like the target, and of target samples that are like generated ones."""

    precision: Float[Array, ""]
    recall: Float[Array, ""]


class DensityCoverage(NamedTuple):
    """How densely target samples surround generated ones, and the share of target samples with a generated one near."""

    density: Float[Array, ""]
    coverage: Float[Array, ""]


@in_own_modes
def precision_recall(x: Any, y: Any, *, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall.

    A ball around each sample reaches to its k-th nearest neighbour in the same set. Precision is the share of x in some
    ball of y, recall that of y in some ball of x. Both depend on k, n and m: compare only at equal ones.

    Args:
      x: generated samples [n, ...].
      y: samples of the target [m, ...].
      k: which neighbour bounds the ball.
    Raises:
      ValueError: the samples' shapes differ, k is not below n and m, or weights.

    Example:
      >>> y = jnp.arange(10.0)[:, None]
      >>> precision_recall(y[:5] - 0.1, y, k=1)  # all of x lies in y, the half of y in x
      PrecisionRecall(precision=Array(1., dtype=float32), recall=Array(0.5, dtype=float32))

    Source: Kynkäänniemi et al. 2019; the ball is open, as in the package prdc.
    """
    x, y = as_sets(weighted=False, x=x, y=y)
    _check_k(k, x=x, y=y)
    return _precision_recall(x, y, k)


@in_own_modes
def density_coverage(x: Any, y: Any, *, k: int = 5) -> DensityCoverage:
    """Density and coverage: precision and recall that outliers do not fool.

    Density is the mean number of the target's balls that a generated sample is in, divided by k: 1 for the target
    itself, and it may be above 1. Coverage is the share of the target's balls with a generated sample inside.

    Args:
      x: generated samples [n, ...].
      y: samples of the target [m, ...].
      k: which neighbour bounds the ball around a sample of y.
    Raises:
      ValueError: the samples' shapes differ, k is not below m, or weights.

    Example:
      >>> y = jnp.arange(10.0)[:, None]
      >>> density_coverage(y[:5] + 0.1, y, k=1)
      DensityCoverage(density=Array(2., dtype=float32), coverage=Array(0.6, dtype=float32))

    Source: Naeem et al. 2020, as in the package prdc.
    """
    x, y = as_sets(weighted=False, x=x, y=y)
    _check_k(k, y=y)
    return _density_coverage(x, y, k)


@in_own_modes
def nearest_neighbour_accuracy(x: Any, y: Any) -> Float[Array, ""]:
    """How often a sample's nearest neighbour, among both sets, is of its own set: .5 for one distribution, 1 if apart.

    The mean of both sets' rates; with n = m it is the leave-one-out accuracy of the 1-nearest-neighbour classifier.
    Below .5, samples lie nearer to the other set than to their own: copies. Ties count half.

    Args:
      x, y: [n, ...] and [m, ...].
    Raises:
      ValueError: the samples' shapes differ, fewer than 2 samples, or weights.

    Example:
      >>> x = jnp.arange(4.0)[:, None]
      >>> float(nearest_neighbour_accuracy(x, x + 10)), float(nearest_neighbour_accuracy(x, x + 0.1))
      (1.0, 0.0)

    Source: Lopez-Paz & Oquab 2017; Xu et al. 2018.
    """
    return _accuracy(*as_sets(weighted=False, at_least=2, x=x, y=y))


@in_own_modes
def nearest_ratio(x: Any, refs: Any, fresh: Any) -> Float[Array, ""]:
    """The memorisation ratio: mean distance of x to the nearest reference, divided by that of fresh target samples.

    Below 1, x is nearer to the references than the target is: it copies them. Differentiable.

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
    x, fresh, refs = as_sets(x=x, fresh=fresh, refs=refs)
    return _nearest_ratio(x, refs, fresh)


@in_own_modes
def nearest_distance(x: Any, refs: Any) -> Float[Array, " n"]:
    """The distance of each sample to the nearest of `refs`, in the data's units (L2 norm). Differentiable.

    As `mmdjax.Avoid(radius=...)` counts it: of samples kept off by a radius none is nearer.

    Args:
      x: samples [n, ...].
      refs: [m, ...]; those of weight 0 do not count.
    Raises:
      ValueError: the samples' shapes differ.

    Example:
      >>> nearest_distance(jnp.array([[0.0, 3.0], [4.0, 0.0]]), jnp.array([[0.0, 0.0], [9.0, 0.0]])).tolist()
      [3.0, 4.0]
    """
    return _nearest(*as_sets(x=x, refs=refs))


def _check_k(k: int, **sets: Particles) -> None:
    for name, points in sets.items():
        if not 1 <= k < points.n:
            raise ValueError(f"k is {k} but {name} has {points.n} samples; k goes from 1 to {points.n - 1}")


class _Sets(NamedTuple):
    """Two sets about one centre, so that equal distances within and across them come out equal, or nearly so.

    Features on a grid, such as integers, have distances without any rounding as long as these, squared, take no more
    than the digits of a float (2²⁴ steps of the grid, squared, in float32): `rounding` is 0 then.

    Args:
      centre: [d], taken from all rows as they are read.
      rounding: by how much equal squared distances may differ, relative.
    """

    x: Array
    y: Array
    centre: Array
    rounding: Array

    def distance2(self, a: Array, b: Array) -> Array:
        """|a_i − b_j|² of rows of x or y."""
        left = about(a, self.centre)
        return centred_distance(left, b - left.centre, b, jnp.arange(len(b)), accurate=True)


def _sets(p, q):
    x, y = flat(p.x), flat(q.x)
    d, limits = x.shape[1], jnp.finfo(x.dtype)
    centre = 0.5 * (middle(x) + middle(y)) if d > DIRECT else jnp.zeros(d, x.dtype)
    fixed = jax.lax.stop_gradient((x, y))
    reach = jnp.maximum(*(jnp.abs(v - centre).max() for v in fixed))
    # the finest grid on which 4d (reach + a step)² is at most 1/eps steps squared
    step = 2 * math.sqrt(d) * reach / max(1.0, limits.eps**-0.5 - 2 * math.sqrt(d))
    step = jnp.exp2(jnp.ceil(jnp.log2(jnp.maximum(step, limits.tiny))))
    step = jax.lax.reduce_precision(step, limits.nexp, 0)
    on_grid = jnp.all(jnp.stack([jnp.all(v == step * jnp.round(v / step)) for v in fixed]))
    centre = jnp.where(on_grid, step * jnp.round(centre / step), centre)
    return _Sets(x, y, centre, jnp.where(on_grid, 0.0, 16 * limits.eps).astype(x.dtype))


class _Across(NamedTuple):
    """Of x against y; `in_balls` [n] is how many balls around y each x is in, for y those around x."""

    nearest_x: Array
    nearest_y: Array
    in_balls_x: Array
    in_balls_y: Array


def _own_nearest(sets, x, k):
    """d² of each row of x, one of the sets, to its k-th nearest other row."""

    def step(best, rows, columns):
        d2 = sets.distance2(rows.of(x), columns.of(x))
        counts = rows.fresh[:, None] & columns.fresh & (rows.index[:, None] < columns.index)  # each pair once
        d2 = jnp.where(counts, d2, jnp.inf)
        for block, more in ((rows, d2), (columns, d2.T)):
            best = block.put(best, _smallest(jnp.concatenate([block.of(best), more], axis=1), k))
        return best

    n = len(x)
    pairs = np.concatenate([own_pairs(n), upper_pairs(n)])
    return fold(step, jnp.full((n, k), jnp.inf, x.dtype), n, n, pairs)[:, -1]


def _radius2(sets, x, k):
    # less what rounding does to d²: the k-th neighbour lies on the open ball, so a copy of it is outside
    return _own_nearest(sets, x, k) * (1 - sets.rounding)


def _smallest(values, k):
    return values.min(1, keepdims=True) if k == 1 else -jax.lax.top_k(-values, k)[0]


def _across(sets, radius2_x=None, radius2_y=None):
    x, y = sets.x, sets.y
    n, m = len(x), len(y)
    radius2_x = jnp.zeros(n, x.dtype) if radius2_x is None else radius2_x
    radius2_y = jnp.zeros(m, x.dtype) if radius2_y is None else radius2_y

    def step(found, rows, columns):
        d2 = sets.distance2(rows.of(x), columns.of(y))
        fresh = rows.fresh[:, None] & columns.fresh
        in_y = (fresh & (d2 < columns.of(radius2_y))).sum(1)
        in_x = (fresh & (d2 < rows.of(radius2_x)[:, None])).sum(0)
        return _Across(
            rows.put(found.nearest_x, jnp.minimum(rows.of(found.nearest_x), d2.min(1))),
            columns.put(found.nearest_y, jnp.minimum(columns.of(found.nearest_y), d2.min(0))),
            rows.put(found.in_balls_x, rows.of(found.in_balls_x) + in_y),
            columns.put(found.in_balls_y, columns.of(found.in_balls_y) + in_x),
        )

    none = _Across(*(jnp.full(k, jnp.inf, x.dtype) for k in (n, m)), *(jnp.zeros(k, int) for k in (n, m)))
    return fold(step, none, n, m, all_pairs(n, m))


@functools.partial(jax.jit, static_argnames="k")
def _precision_recall(p, q, k):
    sets = _sets(p, q)
    found = _across(sets, _radius2(sets, sets.x, k), _radius2(sets, sets.y, k))
    return PrecisionRecall(*((count > 0).mean(dtype=sets.x.dtype) for count in (found.in_balls_x, found.in_balls_y)))


@functools.partial(jax.jit, static_argnames="k")
def _density_coverage(p, q, k):
    sets = _sets(p, q)
    radius2 = _radius2(sets, sets.y, k)
    found = _across(sets, radius2_y=radius2)
    dtype = sets.x.dtype
    return DensityCoverage(found.in_balls_x.mean(dtype=dtype) / k, (found.nearest_y < radius2).mean(dtype=dtype))


@jax.jit
def _accuracy(p, q):
    sets = _sets(p, q)
    found = _across(sets)

    def rate(points, other):
        own, slack = _own_nearest(sets, points, 1), 1 - sets.rounding
        return (0.5 * (own < slack * other) + 0.5 * (slack * own <= other)).mean(dtype=own.dtype)

    return 0.5 * (rate(sets.x, found.nearest_x) + rate(sets.y, found.nearest_y))


@jax.jit
def _nearest(points, refs):
    y = flat(refs.x)
    centre = middle(y) if y.shape[1] > DIRECT else jnp.zeros(y.shape[1], y.dtype)
    sets = _Sets(flat(points.x), y, centre, jnp.zeros((), y.dtype))
    return safe_sqrt(_across(sets).nearest_x)


@jax.jit
def _nearest_ratio(p, refs, fresh):
    near, of_fresh = (product(points.probabilities(), _nearest(points, refs)) for points in (p, fresh))
    return near / of_fresh
