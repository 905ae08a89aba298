"""Distances between two sets of samples, with standard errors and a test.

References:
  Székely & Rizzo 2013 (energy distance), Gretton et al. 2012 (MMD and its permutation test), Bińkowski et al. 2018
  (KID), Heusel et al. 2017 (Fréchet distance), Efron & Stein 1981 (the jackknife).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmdjax._core.modes import in_own_modes
from mmdjax._core.numerics import product
from mmdjax._points.blocks import sum_across, sum_within, triangle
from mmdjax._points.particles import flat, wide_dtype
from mmdjax.calls import check_key
from mmdjax.fit import as_sets, with_kernel
from mmdjax.kernels import Energy, Polynomial
from mmdjax.mmd import Estimator, check_estimator, distinct_pairs, estimate, if_known, pair_norm, per_pair, quotient


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: Float[Array, ""]
    error: Float[Array, ""]


class TwoSampleTest(NamedTuple):
    """A test's statistic, and the probability of one at least as large if both sets have the same distribution."""

    statistic: Float[Array, ""]
    p_value: Float[Array, ""]


@in_own_modes
def energy_distance(x: Any, y: Any, *, estimator: Estimator = "u") -> Float[Array, ""]:
    """2 E|x − y| − E|x − x'| − E|y − y'|, in the data's units.

    Differentiable. Its standard error: `mmd2_with_error(Energy(), x, y)`.

    Args:
      x: n samples [n, ...].
      y: m samples [m, ...].
      estimator: "u": unbiased, may be slightly negative, needs two samples in each set. "v": biased, never negative.
    Raises:
      ValueError: the samples' shapes differ; "u", and one sample has all the weight of a set (NaN inside `jit`).

    Example:
      >>> round(float(energy_distance(jnp.zeros((3, 2)), jnp.array([[3.0, 4.0]] * 3))), 4)
      10.0

    Source: Székely & Rizzo 2013, eq. 2.
    """
    check_estimator(estimator)
    x, y = as_sets(estimator=estimator, x=x, y=y)
    return _estimate(Energy(), x, y, estimator=estimator)


@in_own_modes
def mmd2_with_error(kernel: Any, x: Any, y: Any, *, num_blocks: int = 50) -> Estimate:
    """The unbiased MMD² of all samples, with its standard error by jackknife over blocks of samples.

        error² = Σ_b (1 − w_b)² (θ_{−b} − θ)² B/(B − 1), over the blocks of x and, added to it, over those of y,

    with θ_{−b} the estimate without block b and w_b its weight. The error is right if the distributions differ, and
    about √2 too large if they are the same (Efron & Stein 1981). Its own relative error is about 1/√(2B).

    Args:
      kernel: a kernel; a bandwidth of None is taken from y and counts as a constant.
      x, y: [n, ...] and [m, ...]. Blocks are consecutive rows: shuffle rows that are sorted, but keep samples that were
        made together and depend on each other in one block.
      num_blocks: B; at most n and m.
    Raises:
      ValueError: the samples' shapes differ, fewer than 4 samples (of weight above 0) or 2 blocks.

    Example:
      >>> from mmdjax import RBF
      >>> x = jax.random.normal(jax.random.key(0), (200, 2))
      >>> far, near = mmd2_with_error(RBF(1.0), x[:100] + 1, x[100:]), mmd2_with_error(RBF(1.0), x[:100], x[100:])
      >>> bool(far.value > 4 * far.error), bool(abs(near.value) < 4 * near.error)
      (True, True)
    """
    if num_blocks < 2:
        raise ValueError(f"num_blocks is {num_blocks}; at least 2 are needed")
    return _jackknife(*with_kernel(kernel, at_least=4, x=x, y=y), num_blocks)


def kid(x: Any, y: Any, *, num_blocks: int = 50) -> Estimate:
    """Kernel inception distance: the unbiased MMD² of features under (xᵀy/D + 1)³, with its standard error.

    It uses all samples at once. The usual mean over random subsets of 1,000 estimates the same number, less precisely.

    Args:
      x, y: features [n, D] and [m, D]; see `mmd2_with_error` for their order.
      num_blocks: of the jackknife.
    Raises:
      ValueError: the samples' shapes differ, fewer than 4 samples or 2 blocks.

    Example:
      >>> x, y = jnp.zeros((4, 3)), jnp.ones((4, 3))
      >>> float(kid(x, y).value)  # 1 − 2·1 + 2³
      7.0

    Source: Bińkowski et al. 2018, section 4.
    """
    return mmd2_with_error(Polynomial(), x, y, num_blocks=num_blocks)


@in_own_modes
def frechet_distance(x: Any, y: Any) -> Float[Array, ""]:
    """|μ_x − μ_y|² + tr(Σ_x + Σ_y − 2 (Σ_x Σ_y)^½): Fréchet's distance between the Gaussians of x and y, squared.

    With means and unbiased covariances; of Inception features it is FID. It decreases with the number of samples, so
    compare only values at equal numbers. With Σ_x = AᵀA and Σ_y = BᵀB the last trace is the sum of ABᵀ's singular
    values. Nothing is squared, so float32 has an error of about 1e-6 of the traces, also with fewer samples than
    dimensions. Differentiable if n ≤ D or Σ has full rank.

    Args:
      x, y: features [n, D] and [m, D].
    Raises:
      ValueError: the samples' shapes differ, or fewer than 2 samples.

    Example:
      >>> x = jnp.array([[0.0], [2.0], [4.0]])  # mean 2, variance 4
      >>> round(float(frechet_distance(x, 2 * x + 1)), 4)  # (2 − 5)² + (2 − 4)²
      13.0

    Source: Dowson & Landau 1982; Heusel et al. 2017, eq. 6.
    """
    return _frechet(*as_sets(at_least=2, x=x, y=y))


@in_own_modes
def permutation_test(kernel: Any, x: Any, y: Any, key: Any, *, num_permutations: int = 999) -> TwoSampleTest:
    """Test whether x and y have one distribution: the unbiased MMD² T, and T_b on B random splits of all samples.

        p = (1 + #{b: T_b ≥ T}) / (1 + B),

    which is exact: if they have, P(p ≤ α) ≤ α for every n and m. The Gram is computed once, in blocks.

    Args:
      kernel: `Energy()` tests the energy distance. A bandwidth of None is taken from x and y together.
      x, y: [n, ...] and [m, ...], independent samples.
      key: of the permutations.
      num_permutations: B; the smallest p is 1/(1 + B).
    Raises:
      ValueError: the samples' shapes differ, fewer than 2 samples, or weights.
      TypeError: key is not a typed key, as `jax.random.key` makes.

    Example:
      >>> from mmdjax import RBF
      >>> x = jax.random.normal(jax.random.key(0), (40, 2))
      >>> round(float(permutation_test(RBF(1.0), x[:20] + 3, x[20:], jax.random.key(1)).p_value), 6)
      0.001

    Source: Gretton et al. 2012; Phipson & Smyth 2010 (the p-value).
    """
    check_key(key)
    if num_permutations < 1:
        raise ValueError(f"num_permutations is {num_permutations}; at least 1 is needed")
    fitted = with_kernel(kernel, fit_to_all=True, weighted=False, at_least=2, x=x, y=y)
    return _permute(*fitted, key, num_permutations)


def _form(k, u, v):
    return product(product(u.T, k), v)


_estimate = jax.jit(estimate, static_argnames="estimator")


def _root(x):
    # with derivative 0 at 0; NaN stays NaN
    return jnp.where(x == 0, 0.0, jnp.sqrt(jnp.where(x == 0, 1.0, x)))


@functools.partial(jax.jit, static_argnames="num_blocks")
def _jackknife(kernel, p, q, num_blocks):
    def by_block(r):  # [n, B]: the weights of each block's rows
        u, count = r.probabilities(), min(num_blocks, r.n)
        rank, present = jnp.cumsum(u > 0) - 1, (u > 0).sum()
        block = jnp.maximum(rank, 0) * jnp.minimum(count, present) // jnp.maximum(present, 1)
        return u[:, None] * jax.nn.one_hot(block, count, dtype=wide_dtype(r.x))

    u, v = by_block(p), by_block(q)
    own = [sum_within(kernel.gram, _form, r, w, self_pairs=False) for r, w in ((p, u), (q, v))]
    cross = sum_across(kernel.gram, _form, p, q, u, v)

    def without(weight, own, cross):
        # the set's own term and the cross term, once with all blocks and once without each, whose share of the weight
        # may be all of it: the sums are over the others, not the whole less the block
        share = weight.sum(0)
        others = 1 - jnp.eye(len(share), dtype=share.dtype)
        left = product(others, share)
        pairs = jnp.outer(share, share) * others + jnp.diag(jax.vmap(distinct_pairs, 1)(weight))
        left_own, left_pairs = (jnp.sum(product(others, table) * others, axis=1) for table in (own, pairs))
        some = (
            left > jnp.finfo(left.dtype).eps
        )  # else the block's term is 0, being the weight left times what is bounded
        changed = quotient(left_own, jnp.where(some, left_pairs, 1.0))
        changed -= 2 * product(others, cross.sum(1)) / jnp.where(some, left, 1.0)
        whole = per_pair(own.sum(), weight, "u") - 2 * cross.sum()
        count = (share > 0).sum()
        return jnp.sum(jnp.where(some, left * (changed - whole), 0.0) ** 2) * count / (count - 1)

    terms = [per_pair(table.sum(), w, "u") for table, w in zip(own, (u, v), strict=True)]
    error2 = without(u, own[0], cross) + without(v, own[1], cross.T)
    return Estimate(if_known(terms[0] - 2 * cross.sum() + terms[1], "u", u, v), _root(error2))


@jax.jit
def _frechet(p, q):
    def moments(r):  # the mean, and R with RᵀR = Σ
        x, u = flat(r.x), r.probabilities()
        mean = product(u, x)
        scale = jnp.sqrt(u / pair_norm(u, "u"))
        return mean, triangle(lambda i: scale[i, None] * (x[i] - mean), *x.shape)

    (mean_x, r_x), (mean_y, r_y) = moments(p), moments(q)
    coupling = jnp.linalg.svd(product(r_x, r_y.T), compute_uv=False).sum()
    return jnp.sum((mean_x - mean_y) ** 2) + jnp.sum(r_x**2) + jnp.sum(r_y**2) - 2 * coupling


@functools.partial(jax.jit, static_argnames="num_permutations")
def _permute(kernel, p, q, key, num_permutations):
    n, m = p.n, q.n

    def draw(key):
        return jax.random.permutation(key, n + m) < n

    # who is in the first set: as given, in each permutation, and everybody
    drawn = jax.lax.map(draw, jax.random.split(key, num_permutations), batch_size=max(1, 2**22 // (n + m)))
    member = jnp.concatenate([jnp.arange(n + m)[None] < n, drawn, jnp.ones((1, n + m), bool)]).T
    a, b = member[:n], member[n:]

    def forms(k, a, b):
        to_each = product(k, b.astype(k.dtype))  # [size, B + 2]
        return jnp.sum(a * to_each, axis=0), product(a.T.astype(k.dtype), to_each[:, -1])

    def both_ways(k, a, b):
        return jax.tree.map(jnp.add, forms(k, a, b), forms(k.T, b, a))

    parts = [
        sum_within(kernel.gram, forms, p, a, self_pairs=False),
        sum_across(kernel.gram, both_ways, p, q, a, b),
        sum_within(kernel.gram, forms, q, b, self_pairs=False),
    ]
    xx, x_all = jax.tree.map(lambda *part: sum(part), *parts)  # aᵀKa and aᵀK1 of each column
    total = xx[-1]
    xy, yy = x_all - xx, total - 2 * x_all + xx
    statistic = (xx / n / (n - 1) - 2 * xy / n / m + yy / m / (m - 1))[:-1]
    rounding = 16 * jnp.finfo(total.dtype).eps * jnp.abs(total) / float(n + m) ** 2  # equal splits count as equal
    exceeding = jnp.sum(statistic[1:] >= statistic[0] - rounding)
    return TwoSampleTest(statistic[0], (1 + exceeding) / (1 + num_permutations))
