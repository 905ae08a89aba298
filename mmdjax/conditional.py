"""MMD² of the samples alone at each condition, for a kernel k_x k_c on samples and conditions.

MMD² under such a kernel also counts how often each condition occurs in P and in Q, which guidance cannot change. What
it can change is, averaged over the conditions c_i of P = Σ u_i δ(x_i, c_i),

    Σ_i u_i [P(x_i, c_i) − 2 Q(x_i, c_i) + Σ_j v_j k_c(c_i, c_j) Q(y_j, c_j) / Σ_j v_j k_c(c_i, c_j)],

where Q(z, c) = Σ_j v_j k_c(c, c_j) k_x(z, y_j) / Σ_j v_j k_c(c, c_j) is how alike z is to Q at a condition c, on
average. P(z, c) is likewise of P. P(x_i, c_i) and Q(y_j, c_j) leave the pair of a point with itself out ("u"). For
labels this is the mean of the labels' MMD², each weighted by its share of P.

A sample counts if its condition is shared: "u" needs another sample of P there, and two of Q; half of one will do, such
as one whose condition is half as alike. Of a sample that is alone with its condition "u" knows nothing.

References:
  Gretton et al. 2012, eq. 3. Ren et al. 2016 (MMD of conditional distributions).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmdjax._core.modes import in_own_modes
from mmdjax._core.numerics import product, reciprocal
from mmdjax._points.blocks import block_beside, sum_over
from mmdjax._points.particles import Particles
from mmdjax.fit import with_kernel
from mmdjax.mmd import Estimator, check_estimator, estimate

LEAST = 0.5  # others at a condition


def sums(
    kernel: Any, points: Particles, others: Particles, weight: Array, *, same: bool = False, self_pairs: bool = True
) -> Float[Array, "n 3"]:
    """Σ_j w_j k(z_i, y_j) and Σ_j w_j |k_c(c_i, c_j)|, in blocks of the y_j; and with `same` |k_c(c_i, c_i)|, else 0.

    Args:
      kernel: one that `splits_cond`.
      same: the points are the first ones of the others; `self_pairs`: whether they count for themselves.
    """
    index = jnp.arange(points.n)[:, None]

    def term(rows):
        part, w = rows.of(others), rows.weights(weight)
        gram = kernel.gram(points, part, same=same and part.n == others.n)
        alike = jnp.abs(kernel.cond_gram(points, part))
        itself = (rows.index == index) & rows.fresh & same
        w = jnp.where(itself & (not self_pairs), 0.0, w)
        return jnp.stack([(w * gram).sum(1), (w * alike).sum(1), jnp.where(itself, alike, 0.0).sum(1)], axis=1)

    return sum_over(term, others.n, block_beside(points.n, others.x))


def own_means(found: Float[Array, "m 3"], weight: Float[Array, " m"], cond: Any) -> Particles:
    """Q(y_j, c_j) of a set's own points, as the x of points; their weight is how many points each stands for.

    Args:
      found: `sums` of the set with itself, by its normalised weights.
    """
    one = jnp.sum(weight**2)  # the weight of one point where all are equal
    mean, known = _mean(found, one, found[:, 2])
    return Particles(mean, cond, jnp.where(known, weight / one, 0.0))


def differences(
    kernel: Any, points: Particles, own: Array, across: Array, ones: tuple[Any, Any], others: Particles | None
) -> tuple[Float[Array, " n"], Bool[Array, " n"]]:
    """The terms [n] of the mean over P, and which of them are known.

    Args:
      own, across: `sums` [n, 3] with P and with Q.
      ones: the weight of one point in P and in Q.
      others: `own_means` of Q; None leaves Q's own term out.
    """
    itself = own[:, 2]
    (to_own, known), (to_others, met) = _mean(own, ones[0], itself), _mean(across, ones[1], itself)
    value, known = to_own - 2 * to_others, known & met
    if others is None:
        return value, known
    alike, count = jnp.abs(kernel.cond_gram(points, others)), jnp.asarray(others.weight)
    among, met = _mean(jnp.stack([product(alike, count * others.x), product(alike, count)], axis=1), 1.0, itself)
    return value + among, known & met


def _mean(found: Array, one: Any, itself: Array) -> tuple[Array, Array]:
    total = found[:, 1]
    return found[:, 0] * reciprocal(total), (total > 0) & (total >= LEAST * one * itself)


def mean_of_known(*parts: tuple[Array, Array, Array, Callable]) -> Float[Array, ""]:
    """Σ w_i value_i / Σ w_i over what is known of (values, known, weights, sum over devices); NaN if nothing is."""
    value = weight = 0.0
    for values, known, weights, total in parts:
        value += total(jnp.where(known, weights * values, 0.0).sum())
        weight += total(jnp.where(known, weights, 0.0).sum())
    return jnp.where(weight > 0, value / jnp.where(weight > 0, weight, 1.0), jnp.nan)


@in_own_modes
def mmd2_by_condition(kernel: Any, p: Any, q: Any, *, estimator: Estimator = "u") -> Float[Array, ""]:
    """MMD² of the samples alone at each condition, averaged over the conditions of p.

    It compares samples with references of which other conditions, or other shares of them, are asked for. For labels it
    is the mean of each label's `mmd2`. With a `Product` kernel the guidance's trace is this.

    Args:
      kernel: a `Product`; a bandwidth of None is taken from q. For any other kernel this is `mmd2`.
      p: n particles with conditions.
      q: m particles with conditions.
      estimator: "u": unbiased, may be negative. "v": self-pairs count.
    Returns:
      Scalar; NaN if no condition of p has two particles ("v": one) of p and as many of q.
    Raises:
      ValueError, TypeError: as `mmd2`.

    Example:
      >>> from mmdjax import RBF, Delta, Product
      >>> p = Particles(jnp.array([[0.0], [0.0], [9.0]]), cond=jnp.array([0, 0, 1]))  # label 1: one particle
      >>> q = Particles(jnp.array([[0.0], [0.0], [5.0]]), cond=jnp.array([0, 0, 2]))
      >>> float(mmd2_by_condition(Product(x=RBF(1.0), cond=Delta()), p, q))
      0.0

    Source: Gretton et al. 2012, eq. 3.
    """
    check_estimator(estimator)
    kernel, p, q = with_kernel(kernel, estimator=estimator, p=p, q=q)
    return _by_condition(kernel, p, q, estimator) if kernel.splits_cond else estimate(kernel, p, q, estimator)


@functools.partial(jax.jit, static_argnames="estimator")
def _by_condition(kernel, p, q, estimator):
    u, v = p.probabilities(), q.probabilities()
    within = {"same": True, "self_pairs": estimator == "v"}
    own, of_q = (sums(kernel, points, points, weight, **within) for points, weight in ((p, u), (q, v)))
    ones = jnp.sum(u**2), jnp.sum(v**2)
    found = differences(kernel, p, own, sums(kernel, p, q, v), ones, own_means(of_q, v, q.cond))
    return mean_of_known((*found, u, lambda x: x))
