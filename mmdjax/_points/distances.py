"""Squared distances between rows, right to the last digits that matter.

By matrix products, |x|² + |y|² − 2 xᵀy about a point amid y, in at least float32 at full precision. That cancels for
pairs much closer than their norm: 15% off at 1e-3 of it in float32. Where a kernel resolves such distances they are
computed again by difference, of the points as they are given; the derivative is that of the polynomial throughout, so
it is exact there and at the clip at zero, to any order.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mmdjax._core.numerics import inline_jit, product
from mmdjax._points.blocks import Rows, block_beside, columns_of
from mmdjax._points.particles import Particles, flat
from mmdjax._points.streaming import HostReferences
from mmdjax.tree import is_traced

CANCELLATION = 1e-3  # of |x|² + |y|²; there a float32 product is off by about 1e-4
DIRECT = 4  # dimensions up to which distances are sums of squared differences, which lose nothing
MIDDLE = 5  # rows whose median is the origin: two of them may lie anywhere, and squared norms grow by .3
SUBSET = 2000  # references that a bandwidth or a constant is taken from


class About(NamedTuple):
    """Points and where they lie about a centre: what `centred_distance` is taken from.

    Args:
      points: as they are given.
      centre: [d], or 0.
      moved: points − centre.
      squares: |points − centre|².
    """

    points: Float[Array, "n d"]
    centre: Any
    moved: Float[Array, "n d"]
    squares: Float[Array, " n"]


def about(points: Float[Array, "n d"], centre: Any) -> About:
    """Points about a centre; in few dimensions about 0, as their distances are taken by difference."""
    centre = 0.0 if points.shape[1] <= DIRECT else centre
    moved = points - centre
    return About(points, centre, moved, squares(moved))


@functools.partial(jax.jit, static_argnames=("same", "accurate"))
def squared_distance(
    x: Float[Array, "n d"], y: Any, *, same: bool = False, accurate: bool = False
) -> Float[Array, "n m"]:
    """|x_i − y_j|², never negative.

    Args:
      y: an array or pytree [m, ...], d numbers a row.
      same: x and y are the same points in the same order: the diagonal is exactly 0.
      accurate: recompute pairs that cancellation would spoil.

    Example:
      >>> squared_distance(jnp.array([[0.0, 0.0]]), jnp.array([[3.0, 4.0]])).tolist()
      [[25.0]]
    """
    left = about(x, middle(y))

    def block(columns):
        diagonal = columns.index == jnp.arange(x.shape[0])[:, None] if same else None
        rows, given, index = read(y, columns)
        return centred_distance(left, rows - left.centre, given, index, diagonal=diagonal, accurate=accurate)

    return columns_of(block, jax.tree.leaves(y)[0].shape[0], block_beside(x.shape[0], y))


def read(y: Any, columns: Rows) -> tuple[Float[Array, "k d"], Any, Int[Array, " k"]]:
    """Some rows of y as a matrix; and an array or pytree of which they are rows, with which ones.

    The latter are y and the block's; where y is on the host, the matrix itself, so that no row is read twice.
    """
    rows = flat(columns.of(y))
    return (rows, rows, jnp.arange(rows.shape[0])) if isinstance(y, HostReferences) else (rows, y, columns.index)


def middle(y: Any) -> Float[Array, " d"]:
    """A point amid the rows of an array or pytree [m, ...], detached: by coordinate, the median of a few of them.

    Rows far from all others do not move it, as they would a mean. Of an odd number of rows it takes its coordinates
    from theirs, so that differences of integers are integers.
    """
    return median_row(some_rows(y))


def width2(y: Any) -> Float[Array, ""]:
    """The median squared distance of a few rows from their `middle`, detached."""
    rows = some_rows(y)
    return median_row(squares(rows - median_row(rows))[:, None])[0]


def some_rows(y: Any) -> Float[Array, "k d"]:
    """An odd number of rows, at most `MIDDLE`, spread evenly; detached."""
    m = jax.tree.leaves(y)[0].shape[0]
    count = min(MIDDLE, m - 1 + m % 2)
    step = m // count
    return flat(jax.lax.stop_gradient(jax.tree.map(lambda leaf: leaf[step // 2 : count * step : step], y)))


def median_row(y: Float[Array, "k d"]) -> Float[Array, " d"]:
    """The median of an odd number of rows, by coordinate, by odd-even exchanges: so few are slower in `jnp.sort`.

    In a loop, as XLA would else compute the exchanges again for each row from which the median is subtracted.
    """

    def exchange(_, rows):
        rows = list(rows)
        for j in (*range(0, len(rows) - 1, 2), *range(1, len(rows) - 1, 2)):
            rows[j], rows[j + 1] = jnp.minimum(rows[j], rows[j + 1]), jnp.maximum(rows[j], rows[j + 1])
        return tuple(rows)

    return jax.lax.fori_loop(0, (len(y) + 1) // 2, exchange, tuple(y))[len(y) // 2]


def squares(x: Float[Array, "n d"]) -> Float[Array, " n"]:
    """|x_i|²."""
    return jnp.sum(x * x, axis=1)


@functools.partial(jax.jit, static_argnames=("accurate",))  # outside jit, `cond` would compile at each call
def centred_distance(
    x: About,
    moved: Float[Array, "k d"],
    y: Any,
    index: Int[Array, " k"],
    *,
    diagonal: Bool[Array, "n k"] | None = None,
    accurate: bool = False,
) -> Float[Array, "n k"]:
    """`squared_distance` between x and some rows of y.

    Args:
      x: n points about a centre, by `about`.
      moved: those rows of y less the centre.
      y: an array or pytree [m, ...] of which the rows come: close pairs are computed from it, as it is given.
      index: which rows.
    """
    if x.points.shape[1] <= DIRECT:
        return jnp.sum((x.moved[:, None] - moved[None]) ** 2, axis=-1)
    return finished([_by_products(x, moved, y, index, diagonal)], accurate)[0]


class Unfinished(NamedTuple):
    """Squared distances that cancellation may have spoilt; what `finished` needs to mend them.

    Args:
      d2: [n, m], with the derivative that the distances shall have.
      close: which pairs cancel.
      of_pairs: (row [k], column [k]) -> d2 [k] without cancellation, detached.
      width: how many numbers this takes for a pair.
      diagonal: where distances are 0; None: nowhere.
      more: what is to be added to `d2`, [n, m]; None: nothing.
    """

    d2: Float[Array, "n m"]
    close: Bool[Array, "n m"]
    of_pairs: Callable
    width: int
    diagonal: Bool[Array, "n m"] | None = None
    more: Any = None


def _by_products(x, moved, y, index, diagonal):
    norms = x.squares[:, None] + squares(moved)[None, :]
    d2 = norms - 2 * product(x.moved, moved.T)
    close = jax.lax.stop_gradient(d2) < CANCELLATION * jax.lax.stop_gradient(norms)
    points, given, near = jax.lax.stop_gradient((x.points, y, moved))
    # of half precision, XLA would cast all rows before the loop over their blocks; but there the difference from
    # `middle`, whose coordinates are such rows', is exact
    half = any(jnp.result_type(leaf).itemsize < 4 for leaf in jax.tree.leaves(y))

    def of_pairs(row, column):
        other = near[column] + x.centre if half else flat(jax.tree.map(lambda leaf: leaf[index[column]], given))
        return jnp.sum((points[row] - other) ** 2, axis=1)

    return Unfinished(d2, close, of_pairs, x.points.shape[1], diagonal)


def finished(parts: list[Unfinished], accurate: bool = True) -> list[Array]:
    """Squared distances, never negative; with `accurate`, close pairs of all parts computed anew in one loop."""
    values = [jax.lax.stop_gradient(part.d2) for part in parts]
    if accurate:
        close = [part.close if part.diagonal is None else part.close & ~part.diagonal for part in parts]
        values = by_difference([part.of_pairs for part in parts], values, close, max(part.width for part in parts))
    done = []
    for part, value in zip(parts, values, strict=True):
        value, d2 = jnp.maximum(value, 0.0), part.d2
        if part.more is not None:
            value, d2 = jnp.maximum(value + jax.lax.stop_gradient(part.more), 0.0), d2 + part.more
        done.append(with_derivative(value if part.diagonal is None else jnp.where(part.diagonal, 0.0, value), d2))
    return done


def distances_together(*pairs: tuple[Float[Array, "n d"], Any, bool]) -> list[Array]:
    """Accurate `squared_distance`s of several pairs (x [n, d], y, same), all x of one shape, in one program.

    Those for which y is read in blocks are apart.
    """
    parts: list[Any] = []
    for x, y, same in pairs:
        m = jax.tree.leaves(y)[0].shape[0]
        if x.shape[1] <= DIRECT or block_beside(x.shape[0], y) < m:
            parts.append(squared_distance(x, y, same=same, accurate=True))
            continue
        left, rows = about(x, middle(y)), flat(y)
        diagonal = jnp.eye(x.shape[0], m, dtype=bool) if same else None
        parts.append(_by_products(left, rows - left.centre, y, jnp.arange(m), diagonal))
    open_parts = [part for part in parts if isinstance(part, Unfinished)]
    done = iter(finished(open_parts) if open_parts else [])
    return [next(done) if isinstance(part, Unfinished) else part for part in parts]


def with_derivative(value: Array, of: Array) -> Array:
    """A detached value with the derivative of another, to any order; not a digit of the value is lost.

    By arithmetic: a `custom_jvp` that returns its argument loses its rule at the second order in a checkpointed scan.
    """
    return value + (of - jax.lax.stop_gradient(of))


def by_difference(of_pairs: list[Callable], d2: list[Array], close: list[Array], width: int) -> list[Array]:
    """Matrices of squared distances with the pairs in `close` computed anew; costs nothing when there are none.

    The pairs of all matrices stand in one row, which is gone through in stretches; those without a close pair are left
    out. These are few operations, as a sampler has many copies of them to compile.

    Args:
      of_pairs: for each matrix, (row [k], column [k]) -> d2 [k].
      d2, close: matrices of n rows.
      width: how many numbers a pair takes.
    """
    firsts = np.cumsum([0, *(part.shape[1] for part in d2)])
    n, columns = d2[0].shape[0], int(firsts[-1])
    total = n * columns
    size = max(1, min(-(-total // 16), 2**16 // width))
    count = -(-total // size)

    def stretches(parts):
        row = jnp.concatenate(parts, axis=1).reshape(-1)
        return jnp.pad(row, (0, count * size - total)).reshape(count, size)

    def computed(row, column):
        found = of_pairs[0](row, jnp.minimum(column, d2[0].shape[1] - 1))
        for first, part, one in zip(firsts[1:], d2[1:], of_pairs[1:], strict=False):
            there = one(row, jnp.clip(column - first, 0, part.shape[1] - 1))
            found = jnp.where(column >= first, there, found)
        return found

    def recompute(d2):
        marked = stretches(close)
        some = marked.any(axis=1)
        order = jnp.argsort(~some)

        def next_stretch(state):
            i, values = state
            here = order[i]
            pair = jnp.minimum(here * size + jnp.arange(size), total - 1)
            row = jax.lax.div(pair, jnp.full_like(pair, columns))
            there = jnp.where(marked[here], computed(row, pair - columns * row), values[here])
            return i + 1, jax.lax.dynamic_update_index_in_dim(values, there, here, 0)

        _, values = jax.lax.while_loop(lambda state: state[0] < some.sum(), next_stretch, (0, stretches(d2)))
        parts = jnp.split(values.reshape(-1)[:total].reshape(n, columns), firsts[1:-1], axis=1)
        return [part.astype(before.dtype) for part, before in zip(parts, d2, strict=True)]

    any_close = functools.reduce(jnp.logical_or, (part.any() for part in close))
    return jax.lax.cond(any_close, recompute, lambda d2: d2, d2)


def subset(m: int, weight: Any = None, most: int = SUBSET) -> Any:
    """Indices of at most so many of m rows, spread evenly over those of positive weight.

    Where fewer have one, all of these come first, and rows of weight 0 fill up.

    Args:
      weight: [m], or None: every row counts.

    Example:
      >>> subset(6, jnp.array([0, 1, 0, 1, 1, 0]), most=2).tolist()
      [1, 4]
    """
    if m <= most:
        return slice(None)
    if weight is None:
        return np.linspace(0, m - 1, most).round().astype(int)
    counts = jnp.asarray(weight) > 0
    present, k = counts.sum(), jnp.arange(most)
    whole, rest = jnp.divmod(present - 1, most - 1)  # k (present − 1) alone could exceed an int32
    even = k * whole + (2 * k * rest + most - 1) // (2 * (most - 1))
    return jnp.argsort(~counts, stable=True)[jnp.where(present <= most, k, even)]


def subset_of(points: Particles, most: int = SUBSET) -> Particles:
    """The rows of a point set that `subset` picks; all of it where it has no more."""
    rows = subset(points.n, points.weight, most)
    return jax.tree.map(lambda leaf: (jnp.asarray(leaf) if is_traced(rows) else leaf)[rows], points)


def here(function: Callable, y: Array) -> Array:
    """function(y, y), the rows of a matrix of distances all made here; `mesh.distances_of` shares them out."""
    return function(y, y)


def pairwise_median(
    y: Float[Array, "m d"], weight: Float[Array, " m"], distances: Callable = here, *, above: float = -1.0
) -> Float[Array, ""]:
    """The median distance between two rows of positive weight, on at most `SUBSET` rows; detached. NaN if it is 0.

    Args:
      distances: (function, y) -> function(y, y).
      above: count distances above this one only; below 0: all.
    """
    d2, valid = _valid_pairs(y, weight, "median distance", distances)
    valid = valid & (d2 > above**2) if above >= 0 else valid
    upper = jnp.arange(valid.shape[0])[:, None] < jnp.arange(valid.shape[0])[None, :]
    return _median_distance(d2, valid & upper)


def nearest_distance(
    y: Float[Array, "m d"], weight: Float[Array, " m"], distances: Callable = here
) -> Float[Array, ""]:
    """The median distance of a row of positive weight to its nearest distinct other one; NaN if all are equal.

    Detached, on at most `SUBSET` rows.
    """
    d2, valid = _valid_pairs(y, weight, "nearest-neighbour distance", distances)
    nearest = jnp.min(jnp.where(valid & (d2 > 0), d2, jnp.inf), axis=1)
    return _median_distance(nearest, jnp.isfinite(nearest))


def neighbour_distance(
    y: Float[Array, "m d"], weight: Float[Array, " m"], distances: Callable = here
) -> Float[Array, ""]:
    """The median distance of a row of positive weight to its k-th nearest distinct other one; NaN if all are equal.

    k = √m rounded, m the number of rows of positive weight; a row with fewer distinct others counts to the last.
    Detached, on at most `SUBSET` rows.
    """
    d2, valid = _valid_pairs(y, weight, "neighbour distance", distances)
    valid &= d2 > 0
    most = max(1, round(math.sqrt(d2.shape[0])))
    nearest = -jax.lax.top_k(jnp.where(valid, -d2, -jnp.inf), min(most, d2.shape[0]))[0]
    present = jnp.minimum((weight > 0).sum(), SUBSET)
    k = jnp.minimum(jnp.round(jnp.sqrt(present)).astype(int), valid.sum(1))
    chosen = jnp.take_along_axis(nearest, jnp.maximum(k - 1, 0)[:, None], axis=1)
    return _median_distance(chosen, jnp.isfinite(chosen))


def spread2(y: Float[Array, "m d"], weight: Float[Array, " m"], distances: Callable = here) -> Float[Array, ""]:
    """The squared distance within which nearly all rows have their nearest distinct other one; ∞ if all are equal.

    q₉₀²/q₅₀, with q the quantiles of squared nearest distances: as far beyond nine in ten as these are beyond half. In
    the plane, where nearest distances vary much, some 4 q₉₀, in 64 dimensions 1.7. Of rows of positive weight;
    detached, on at most `SUBSET` rows.
    """
    if y.shape[0] < 2:
        return jnp.full((), jnp.inf, y.dtype)
    d2, valid = _valid_pairs(y, weight, "spread", distances)
    ordered = jnp.sort(jnp.min(jnp.where(valid & (d2 > 0), d2, jnp.inf), axis=1))
    count = jnp.isfinite(ordered).sum()

    def within(share):
        return ordered[jnp.maximum(jnp.ceil(share * count).astype(int) - 1, 0)]

    return jnp.where(count > 0, within(0.9) * (within(0.9) / within(0.5)), jnp.inf)


def _valid_pairs(y: Array, weight: Array, what: str, distances: Callable) -> tuple[Array, Array]:
    if y.shape[0] < 2:
        raise ValueError(
            f"one reference has no {what}; give the kernel's bandwidth as a number, such as IMQ(1.0), or more refs"
        )
    rows = subset(y.shape[0], weight)
    y, present = jax.lax.stop_gradient(y[rows]), weight[rows] > 0
    y = jnp.where(present[:, None], y, y[jnp.argmax(present)])  # what lies in an empty slot must not move the centre
    d2 = distances(functools.partial(squared_distance, same=True, accurate=True), y)
    return d2, present[:, None] & present[None, :] & ~jnp.eye(d2.shape[0], dtype=bool)


@inline_jit
def _median_distance(d2: Array, valid: Array) -> Array:
    ordered = jnp.sort(jnp.where(valid, d2, jnp.inf).reshape(-1))
    count = valid.sum()
    middle = jnp.sqrt(ordered[jnp.maximum(count - 1, 0) // 2]), jnp.sqrt(ordered[count // 2])
    median = 0.5 * (middle[0] + middle[1])
    return jnp.where((count > 0) & (median > 0), median, jnp.nan)
