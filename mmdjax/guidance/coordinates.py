"""Points as combinations of known ones: inner steps of guidance whose cost does not depend on the dimensions.

Guidance moves particles along differences of points. After any number of shifts a particle is z_i = Σ_k c_ik p_k with
Σ_k c_ik = 1, the p_k being the batch as it came, the references, the memory and what is avoided; with
D_kl = |p_k − p_l|²,

    |z_i − z_j|² = (C D Cᵀ)_ij − q_i − q_j,   q_i = (C D Cᵀ)_ii / 2.

So D is computed once, the shifts change C alone, and the points themselves are made once, at the end. Where z_i and z_j
lie so close that this cancels, −½ (c_i − c_j) D (c_i − c_j)ᵀ takes its place.

If the gap e between the batch and the references is many times their spread, |p_k − p_l|² between the two would lose
digits. D is then taken with the batch moved by the gap, p'_k = p_k − e. With β_i = 1 − Σ_k c_ik over the points that
were not moved, and L_i = e · Σ_k c_ik p'_k,

    |z_i − z_j|² = |z'_i − z'_j|² + (β_i − β_j) (2 (L_i − L_j) + (β_i − β_j) |e|²).

References:
  Schoenberg 1935 (distances of combinations from distances).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmdjax._core.numerics import product
from mmdjax._points.blocks import block_beside, columns_of, sum_over
from mmdjax._points.distances import (
    CANCELLATION,
    Unfinished,
    distances_together,
    finished,
    middle,
    squared_distance,
    squares,
    width2,
)
from mmdjax._points.particles import Particles, flat
from mmdjax.kernels import Kernel
from mmdjax.kernels.radial import Radial
from mmdjax.tree import pytree, replace

APART = 4  # spreads of batch and references together, from which on the gap between them is taken out


@pytree
class Barycentric(Radial, autodiff=True):
    """A kernel of the distance between combinations of N known points.

    A set's x is [n, N], a combination in each row; or [m], the numbers of consecutive known points. These are floats,
    so that weights have the precision of the distances.

    Args:
      kernel: a kernel of the distance.
      distances: D, the squared distances between known points, the batch moved by the gap [N, N].
      aside: −1 for the points that were not moved and 0 for others, which sums to β − 1; and e · p'_k. [N, 2].
      gap2: |e|².
    """

    kernel: Any
    distances: Any
    aside: Any
    gap2: Any

    @property
    def from_distances(self):
        return True

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

    def drawn(self, a, b, pulls):
        if b.x.ndim == 1:
            nowhere = jnp.zeros_like(a.x, pulls.dtype)
            towards = jax.lax.dynamic_update_slice_in_dim(nowhere, pulls, b.x[0].astype(int), 1)
        else:
            towards = product(pulls, b.x)
        return towards - pulls.sum(1, keepdims=True) * a.x

    def gradient(self, a, b, coef, *, same=False, precondition="none"):
        return self.known_gradient(a, b, coef, self.distance2(a, b, same=same), precondition)

    def distance2(self, a, b, *, same=False):
        return finished([self._unfinished(a.x, b.x, self._to_known(a.x), same)])[0]

    def distances2(self, a, *sets):
        to_known = self._to_known(a.x)
        return finished([self._unfinished(a.x, b.x, to_known, b is sets[0]) for b in sets])

    def _unfinished(self, a, b, of_a, same):
        to_known, half = of_a
        if b.ndim == 1:
            first = b[0].astype(int)
            there, its_half = jax.lax.dynamic_slice_in_dim(to_known, first, b.shape[0], 1), 0.0
            its_aside = jax.lax.dynamic_slice_in_dim(self.aside, first, b.shape[0])
        else:
            b_to_known, its_half = of_a if b is a else self._to_known(b)
            there, its_aside = product(to_known, b.T), product(b, self.aside)
        moved = there - half[:, None] - its_half
        share, along = jnp.moveaxis(product(a, self.aside)[:, None] - its_aside, 2, 0)
        value, c, e = jax.lax.stop_gradient((moved, a, to_known))
        terms = jnp.maximum(there, half[:, None] + its_half) * jnp.abs(a).sum(1, keepdims=True)
        close = value < CANCELLATION * jax.lax.stop_gradient(terms)
        diagonal = jnp.eye(*value.shape, dtype=bool) if same else None

        def of_pairs(row, column):
            if b.ndim == 1:
                known = b[column].astype(int)
                apart = c[row].at[jnp.arange(row.size), known].add(-1.0)
                along = e[row] - jax.lax.stop_gradient(self.distances)[known]
            else:
                c_b, e_b = jax.lax.stop_gradient((b, b_to_known))
                apart, along = c[row] - c_b[column], e[row] - e_b[column]
            return -0.5 * jnp.sum(apart * along, axis=1)

        by_gap = share * (2 * along + share * self.gap2)
        return Unfinished(moved, close, of_pairs, a.shape[1], diagonal, by_gap)

    def _to_known(self, c):
        """Σ_k c_ik D_kl and half of Σ_kl c_ik c_il D_kl."""
        to_known = product(c, self.distances)
        return to_known, 0.5 * jnp.sum(to_known * c, axis=1)


def fixed_distances(*sets: Particles | None) -> Float[Array, "k k"]:
    """Squared distances among references, memory and what is avoided, in this order, without those that are None."""
    points = [flat(p.x) for p in sets if p is not None]
    rows = []
    for i, x in enumerate(points):
        own = squared_distance(x, x, same=True, accurate=True)
        rows.append([*(squared_distance(x, y, accurate=True) for y in points[:i]), own])
    blocks = [[rows[i][j] if j <= i else rows[j][i].T for j in range(len(rows))] for i in range(len(rows))]
    return blocks[0][0] if len(blocks) == 1 else jnp.block(blocks)


def pays(n: int, fixed: int, d: int) -> bool:
    """Whether n moving and some fixed points are few beside their d dimensions."""
    return 2 * (n + fixed) <= d and 3 * fixed <= d


def combinations(
    z: Particles,
    refs: Particles | None,
    memory: Particles | None,
    avoid: Particles | None,
    fixed: Float[Array, "k k"],
) -> tuple[Callable, Particles, list[Particles | None], Callable]:
    """Kernels, batch and fixed sets in terms of known points, and what makes points of the batch again.

    Args:
      refs, memory, avoid: the fixed sets; the first of them that is there is what the gap is measured to.
      fixed: `fixed_distances`.
    Returns:
      A function of a kernel that `is_radial`; the batch; the fixed sets; a function from coefficients to points.
    """
    n, total = z.n, z.n + fixed.shape[0]
    x = flat(z.x)
    fixed_sets = [p.x for p in (refs, memory, avoid) if p is not None]
    first = fixed_sets[0]
    centre = middle(first)
    gap, far = _gap(x, first)
    at_refs = x - gap
    own, *to_each = distances_together((x, x, True), *((at_refs, y, False) for y in fixed_sets))
    to_fixed = jnp.concatenate(to_each, axis=1)
    distances = jnp.block([[own, to_fixed], [to_fixed.T, fixed]])
    along = jax.lax.cond(
        far,
        lambda: jnp.concatenate([_along(gap, y, centre) for y in (at_refs, *fixed_sets)]),
        lambda: jnp.zeros(total, at_refs.dtype),
    )
    aside = jnp.stack([-(jnp.arange(total) >= n).astype(at_refs.dtype), along], axis=1)
    known = jnp.eye(n, total, dtype=x.dtype)

    def points(c: Array) -> Array:
        m = n + first.shape[0]
        moved = product(c[:, :n] - known[:, :n], at_refs - centre) + _combine(c[:, n:m], first, centre)
        moved -= c[:, n:].sum(1, keepdims=True) * gap
        for y in fixed_sets[1:]:
            moved += _combine(c[:, m : m + y.shape[0]], y, centre)
            m += y.shape[0]
        return z.x + moved.reshape(z.x.shape)

    start, corners = n, []
    for held in (refs, memory, avoid):
        if held is None:
            corners.append(None)
        elif held is memory:
            corners.append(replace(held, x=jnp.eye(held.n, total, k=start, dtype=x.dtype)))
        else:
            corners.append(replace(held, x=start + jnp.arange(held.n, dtype=x.dtype)))
        start += 0 if held is None else held.n
    gap2 = squares(gap[None])[0]

    def between(kernel: Kernel) -> Kernel:
        return kernel.map_radial(lambda part: Barycentric(part, distances, aside, gap2))

    return between, replace(z, x=known), corners, points


def _gap(x: Float[Array, "n d"], refs: Any) -> tuple[Float[Array, " d"], Array]:
    """From the middle of the references to that of the batch, where that is far; else 0. Detached."""
    gap = middle(x) - middle(refs)
    far = squares(gap[None])[0] > APART**2 * (width2(x) + width2(refs))
    return jnp.where(far, gap, 0.0), far


def _along(gap: Array, x: Any, centre: Array) -> Float[Array, " n"]:
    def of_rows(rows):
        return product(flat(rows.of(x)) - centre, gap)[None]

    return columns_of(of_rows, jax.tree.leaves(x)[0].shape[0], block_beside(1, x))[0]


def _combine(c: Array, x: Any, centre: Array) -> Array:
    n, m = c.shape
    return sum_over(lambda rows: product(rows.weights(c.T).T, flat(rows.of(x)) - centre), m, block_beside(n, x))
