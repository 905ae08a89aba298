"""Maximum mean discrepancy.

For P = Σ u_i δ(x_i), Q = Σ v_j δ(y_j) with weights summing to one,

    MMD²_v(P, Q) = uᵀ K_xx u − 2 uᵀ K_xy v + vᵀ K_yy v,

and MMD²_u leaves the self-pairs out: uᵀ K_xx u becomes Σ_{i≠j} u_i u_j k(x_i, x_j) / (1 − Σ u_i²). That is undefined
for one particle: `mmd2` raises an error, and the guidance, whose gradient does not depend on it, takes 0.

References:
  Gretton et al., A Kernel Two-Sample Test, JMLR 2012, eq. 3 ("u") and 5 ("v").
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmdjax._core.modes import in_own_modes
from mmdjax._core.numerics import product
from mmdjax._points.blocks import block_beside, sum_across, sum_over, sum_within
from mmdjax._points.particles import Particles, on_device
from mmdjax.fit import with_kernel

Estimator = Literal["u", "v"]


def check_estimator(estimator: str) -> None:
    """Raise ValueError unless the estimator is "u" or "v"."""
    if estimator not in ("u", "v"):
        raise ValueError(f'estimator is {estimator!r}; choose "u" (unbiased, without self-pairs) or "v"')


def distinct_pairs(u: Array) -> Array:
    """Σ_{i≠j} u_i u_j without cancellation, which (Σu)² − Σu² has if one u is nearly all of the sum."""
    u = u.reshape(-1)
    largest = jnp.arange(u.size) == jnp.argmax(u)
    top, others = jnp.where(largest, u, 0.0).sum(), jnp.where(largest, 0.0, u)
    return others.sum() * (2 * top + others.sum()) - jnp.sum(others**2)


def pair_norm(u: Array, estimator: str) -> Array:
    """The divisor of uᵀKu: 1 ("v"), or 1 − Σu² ("u"; ∞ for one particle, whose term is then 0)."""
    if estimator == "v":
        return jnp.ones((), u.dtype)
    rest = 1 - jnp.sum(u**2)
    rest = jnp.where(rest < 0.5, distinct_pairs(u), rest)  # equal weights give 0.5 or more
    return jnp.where(rest > 0, rest, jnp.inf)


def per_pair(total: Array, u: Array, estimator: str) -> Array:
    """total / `pair_norm`."""
    return quotient(total, pair_norm(u, estimator))


def quotient(x: Array, y: Array) -> Array:
    """x / y for y ≥ 0, with a finite derivative even if y² underflows."""
    scale = jax.lax.stop_gradient(jnp.where((y > 0) & (y < 1e-10), 1 / jnp.where(y > 0, y, 1.0), 1.0))
    return (x * scale) / (y * scale)


def if_known(value: Array, estimator: str, *weights: Array) -> Array:
    """The value, or NaN if one particle has all the weight, for which "u" is undefined."""
    known = [jnp.isfinite(pair_norm(jax.lax.stop_gradient(u), estimator)) for u in weights]
    return jnp.where(jnp.stack(known).all(), value, jnp.nan)


def pair_sum(
    kernel: Any, p: Particles, u: Array, q: Particles, v: Array, *, same: bool = False, self_pairs: bool = True
) -> Float[Array, ""]:
    """Σ_ij u_i v_j k(x_i, y_j); with `same`, x_i and y_i are one point, and self-pairs may be left out."""
    if not same:
        return sum_across(kernel.gram, _form, p, q, u, v)
    if p is q:
        return sum_within(kernel.gram, _form, p, u, self_pairs=self_pairs)
    gram = kernel.gram(p, q, same=True)
    return _form(gram if self_pairs else jnp.where(jnp.eye(*gram.shape, dtype=bool), 0.0, gram), u, v)


def embedding(kernel: Any, q: Particles, v: Array, points: Particles) -> Float[Array, " n"]:
    """Σ_j v_j k(z_i, y_j), in blocks of the y_j."""

    def term(rows):
        return product(kernel.gram(points, on_device(rows.of(q))), rows.weights(v))

    return sum_over(term, q.n, block_beside(points.n, q.x))


def _form(gram, u, v):
    return product(product(u, gram), v)


def self_term(kernel: Any, p: Particles, estimator: str) -> Float[Array, ""]:
    """E k(x, x') over a point set."""
    u = p.probabilities()
    return per_pair(pair_sum(kernel, p, u, p, u, same=True, self_pairs=estimator == "v"), u, estimator)


def cross_term(kernel: Any, p: Particles, q: Particles) -> Float[Array, ""]:
    """E k(x, y) between two point sets."""
    return pair_sum(kernel, p, p.probabilities(), q, q.probabilities())


def estimate(kernel: Any, p: Particles, q: Particles, estimator: str) -> Float[Array, ""]:
    """`mmd2` of checked sets with a fitted kernel."""
    value = self_term(kernel, p, estimator) - 2 * cross_term(kernel, p, q) + self_term(kernel, q, estimator)
    return value if estimator == "v" else if_known(value, estimator, p.probabilities(), q.probabilities())


@in_own_modes
def mmd2(kernel: Any, p: Any, q: Any, *, estimator: Estimator = "v") -> Float[Array, ""]:
    """Squared maximum mean discrepancy between two weighted point sets.

    Differentiable with respect to points, weights and the kernel's numbers, also where points coincide.

    Args:
      kernel: a kernel; a bandwidth of None is taken from q.
      p: n particles: an array or pytree of arrays [n, ...], or `Particles` with weights.
      q: m particles, likewise.
      estimator: "v": biased, zero if p and q coincide. "u": unbiased, may be negative, needs two particles in each set.
    Returns:
      Scalar, in the kernel's units.
    Raises:
      TypeError: p or q holds something other than numbers.
      ValueError: the samples' shapes differ; a Product kernel, but particles without cond; a bandwidth taken from q,
        whose points are all equal; "u", and one particle has all the weight of a set (NaN inside `jit`).

    Example:
      >>> from mmdjax import RBF
      >>> p = Particles(jnp.zeros((2, 3)))
      >>> float(mmd2(RBF(1.0), p, p))
      0.0

    Source: Gretton et al. 2012, eq. 3 and 5.
    """
    check_estimator(estimator)
    return estimate(*with_kernel(kernel, estimator=estimator, p=p, q=q), estimator=estimator)


@in_own_modes
def witness(kernel: Any, p: Any, q: Any, points: Any) -> Float[Array, " k"]:
    """The witness function f(z) = E k(z, x) − E k(z, y): positive where p has more mass, negative where q has more.

    It is half of MMD²'s functional derivative in p, so guidance moves particles of p down its gradient.  Gretton et al.
    2012, section 2.3.

    Args:
      kernel: a kernel; a bandwidth of None is taken from q.
      p: n particles or an array [n, ...].
      q: m particles or an array [m, ...].
      points: z, k particles or an array [k, ...].
    Raises:
      ValueError: the samples' shapes differ.

    Example:
      >>> from mmdjax import RBF
      >>> p, q = jnp.array([[0.0]]), jnp.array([[9.0]])
      >>> witness(RBF(1.0), p, q, jnp.array([[0.0], [9.0]])).tolist()
      [1.0, -1.0]
    """
    kernel, p, points, q = with_kernel(kernel, p=p, points=points, q=q)
    to_p = product(kernel.gram(points, p), p.probabilities())
    return to_p - product(kernel.gram(points, q), q.probabilities())


@in_own_modes
def attribution(kernel: Any, points: Any, refs: Any) -> Float[Array, "n m"]:
    """The share of each reference in the pull on each point: v_j k(z_i, y_j) / Σ_l v_l k(z_i, y_l); rows sum to 1.

    Far from all references, where the kernel underflows, the limit is returned: for an RBF the nearest reference has
    all. A row is 0 if no reference pulls, as for a label that none has.

    Args:
      kernel: a non-negative kernel, such as that of the guidance; a bandwidth of None is taken from refs.
      points: n particles or an array [n, ...].
      refs: m particles or an array [m, ...].
    Raises:
      ValueError: the samples' shapes differ.

    Example:
      >>> from mmdjax import IMQ
      >>> attribution(IMQ(1.0), jnp.array([[0.0]]), jnp.array([[0.0], [3.0**0.5]])).round(3).tolist()
      [[0.667..., 0.333...]]
    """
    kernel, points, refs = with_kernel(kernel, points=points, refs=refs)
    v = refs.probabilities()
    weighted = v * kernel.gram(points, refs)
    total = weighted.sum(1, keepdims=True)
    sees = jnp.abs(total) > jnp.finfo(weighted.dtype).eps ** 2  # below, terms and their derivatives underflow
    shares = weighted / jnp.where(sees, total, 1.0)
    log = jnp.where(v > 0, kernel.log_gram(points, refs), -jnp.inf)
    nearest = log.max(1, keepdims=True)
    pulled = jnp.isfinite(nearest)
    limit = v * jnp.exp(log - jax.lax.stop_gradient(jnp.where(pulled, nearest, 0.0)))
    return jnp.where(sees, shares, limit / jnp.where(pulled, limit.sum(1, keepdims=True), 1.0))
