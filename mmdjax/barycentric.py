"""Points as combinations of known ones: inner steps of guidance whose cost does not depend on the dimensions.

Guidance moves particles along differences of points. After any number of shifts a particle is z_i = Σ_k c_ik p_k with
Σ_k c_ik = 1, the p_k being the batch as it came, the references and the memory; with D_kl = |p_k − p_l|²,

    |z_i − z_j|² = (C D Cᵀ)_ij − q_i − q_j,   q_i = (C D Cᵀ)_ii / 2.

So D is computed once, the shifts change C alone, and the points themselves are made once, at the end. Where z_i and z_j
lie so close that this cancels, −½ (c_i − c_j) D (c_i − c_j)ᵀ takes its place.

References:
  Schoenberg 1935 (distances of combinations from distances).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmdjax.blocks import block_beside, sum_over
from mmdjax.distances import CANCELLATION, by_difference, middle, squared_distance
from mmdjax.kernels import Energy, Kernel, Product, Scaled, Sum
from mmdjax.numerics import product
from mmdjax.particles import Particles, flat
from mmdjax.radial import Radial
from mmdjax.tree import pytree, replace


@pytree
class Barycentric(Radial):
    """A kernel of the distance between combinations of N known points.

    A set's x is [n, N], a row a combination; or [m], the numbers of consecutive known points, in floating point so that
    weights come out in the precision of the distances.

    Args:
      kernel: of the distance alone.
      distances: D, the squared distances between known points [N, N].
    """

    kernel: Any
    distances: Any

    def profile(self, d2):
        """As of the kernel."""
        return self.kernel.profile(d2)

    def weight(self, d2):
        """As of the kernel."""
        return self.kernel.weight(d2)

    def components(self):
        """As of the kernel."""
        return self.kernel.components()

    def reach(self):
        return self.kernel.reach()

    def gradient(self, a, b, coef, *, same=False, precondition="none"):
        weight = self.preconditioned_weight(a, self.distance2(a, b, same=same), precondition)
        pull = (coef * weight).astype(a.x.dtype)
        if b.x.ndim == 1:
            towards = jax.lax.dynamic_update_slice_in_dim(jnp.zeros_like(a.x), pull, b.x[0].astype(int), 1)
        else:
            towards = product(pull, b.x)
        mass = jnp.sum(jnp.abs(coef) * weight, axis=1) if precondition == "mass" else jnp.ones_like(pull[:, 0])
        return towards - pull.sum(1, keepdims=True) * a.x, mass

    def distance2(self, a, b, *, same=False):
        a, b = a.x, b.x
        to_known, half = self._to_known(a)
        if b.ndim == 1:
            there, its_half = jax.lax.dynamic_slice_in_dim(to_known, b[0].astype(int), b.shape[0], 1), 0.0
        else:
            b_to_known, its_half = self._to_known(b)
            there = product(to_known, b.T)
        d2 = there - half[:, None] - its_half
        value, c, e = jax.lax.stop_gradient((d2, a, to_known))
        terms = jnp.maximum(there, half[:, None] + its_half) * jnp.abs(a).sum(1, keepdims=True)
        close = value < CANCELLATION * jax.lax.stop_gradient(terms)
        diagonal = jnp.eye(*d2.shape, dtype=bool) if same else jnp.zeros(d2.shape, bool)

        def of_pairs(row, column):
            if b.ndim == 1:
                known = b[column].astype(int)
                apart = c[row].at[jnp.arange(row.size), known].add(-1.0)
                along = e[row] - jax.lax.stop_gradient(self.distances)[known]
            else:
                c_b, e_b = jax.lax.stop_gradient((b, b_to_known))
                apart, along = c[row] - c_b[column], e[row] - e_b[column]
            return -0.5 * jnp.sum(apart * along, axis=1)

        value = by_difference(of_pairs, value, close & ~diagonal, a.shape[1])
        value = jnp.where(diagonal, 0.0, jnp.maximum(value, 0.0))
        return d2 + jax.lax.stop_gradient(value - d2)

    def _to_known(self, c):
        """Σ_k c_ik D_kl and half of Σ_kl c_ik c_il D_kl."""
        to_known = product(c, self.distances)
        return to_known, 0.5 * jnp.sum(to_known * c, axis=1)


def of_distance(kernel: Kernel) -> bool:
    """Whether the kernel sees samples by their distances alone, so that `Barycentric` can take its place."""
    match kernel:
        case Sum(kernels=kernels):
            return all(map(of_distance, kernels))
        case Product(x=x):
            return of_distance(x)
        case Energy(origin=origin):
            return origin is None
    return isinstance(kernel, Scaled)


def fixed_distances(refs: Particles, memory: Particles | None) -> Float[Array, "k k"]:
    """Squared distances among references and memory, in this order."""
    x = flat(refs.x)
    among = squared_distance(x, x, same=True, accurate=True)
    if memory is None:
        return among
    z = flat(memory.x)
    across = squared_distance(z, x, accurate=True)
    return jnp.block([[among, across.T], [across, squared_distance(z, z, same=True, accurate=True)]])


def pays(n: int, fixed: int, d: int) -> bool:
    """Whether n moving and some fixed points are few beside their d dimensions."""
    return 2 * (n + fixed) <= d and 3 * fixed <= d


def combinations(
    kernel: Kernel, z: Particles, refs: Particles, memory: Particles | None, fixed: Float[Array, "k k"]
) -> tuple[Kernel, Particles, Particles, Particles | None, Callable]:
    """Kernel, batch, references and memory in terms of known points, and what makes points of the batch again.

    Args:
      kernel: one `of_distance`.
      fixed: `fixed_distances`.
    """
    n, m, total = z.n, refs.n, z.n + fixed.shape[0]
    x = flat(z.x)
    across = [squared_distance(x, p.x, accurate=True) for p in (refs, memory) if p is not None]
    own = squared_distance(x, x, same=True, accurate=True)
    to_fixed = jnp.concatenate(across, axis=1)
    distances = jnp.block([[own, to_fixed], [to_fixed.T, fixed]])
    known = jnp.eye(n, total, dtype=x.dtype)

    centre = middle(refs.x)  # of no consequence but for rounding

    def points(c: Array) -> Array:
        moved = product(c[:, :n] - known[:, :n], x - centre) + _combine(c[:, n : n + m], refs.x, centre)
        if memory is not None:
            moved += _combine(c[:, n + m :], memory.x, centre)
        return z.x + moved.reshape(z.x.shape)

    corners, remembered = replace(refs, x=n + jnp.arange(m, dtype=x.dtype)), None
    if memory is not None:
        memory_rows = jnp.eye(memory.n, total, k=n + m, dtype=x.dtype)
        remembered = replace(memory, x=memory_rows)
    return _known(kernel, distances), replace(z, x=known), corners, remembered, points


def _known(kernel: Kernel, distances: Array) -> Kernel:
    match kernel:
        case Sum(kernels=kernels):
            return replace(kernel, kernels=tuple(_known(k, distances) for k in kernels))
        case Product(x=x):
            return replace(kernel, x=_known(x, distances))
    return Barycentric(kernel, distances)


def _combine(c: Array, x: Any, centre: Array) -> Array:
    n, m = c.shape
    return sum_over(lambda rows: product(rows.weights(c.T).T, flat(rows.of(x)) - centre), m, block_beside(n, x))
