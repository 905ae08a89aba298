"""The particles of a device, and the particles, references and memory that they are compared with.

For particles z_i of weight u_i (batch and memory together) and references y_j of weight v_j,

    ∂MMD²/∂z_i / u_i = 2 [Σ_{j≠i} u_j ∂k(z_i, z_j)/∂z_i / (1 − Σu²) − Σ_j v_j ∂k(z_i, y_j)/∂z_i]        ("u")

is 2 (push − pull). Only `Sides.shards` knows how the batch and the references are split over devices: rules call
methods of `Sides` and never see a mesh axis.

References:
  Gretton et al. 2012, eq. 3 and 5.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmdjax import conditional
from mmdjax._core.numerics import product, reciprocal
from mmdjax._points.blocks import block_beside, sum_and_least
from mmdjax._points.mesh import WHOLE, Shards
from mmdjax._points.particles import Particles, flat, on_device, wide_dtype
from mmdjax._points.streaming import HostReferences
from mmdjax.kernels import Kernel
from mmdjax.kernels.radial import at_distances, radial_parts, weights_and_distance2
from mmdjax.mmd import pair_norm, pair_sum


@dataclasses.dataclass(frozen=True)
class Sides:
    """The particles of one device, and what they are compared with: what a `Rule` is given.

    Args:
      kernel: for all pairs; or two, among the batch and between the batch and fixed points (references, memory).
      rows: z, the n particles of this device. In many dimensions their `x` may be coefficients [n, N] of N known
        points: take distances from the methods here, not from `x`.
      refs: m references, `Particles`; None where samples only avoid each other.
      memory: past samples of weight 0 or 1, which count on the particles' side but do not move; or None.
      estimator: "u" leaves the self-pair out, "v" keeps it.
      reach: `Kernel.reach` of the kernel between clean points.
      everyone: the batch of all devices, this one's rows first; None: `rows` is the whole batch.
      shards: how batch and references are split over devices.
      known: what `distances` returned for these particles, not to be computed again; (): nothing.
    """

    kernel: Any  # a kernel, two of them, or none where nothing pulls
    rows: Particles
    refs: Any
    memory: Particles | None = None
    estimator: str = "u"
    reach: Any = 0.0
    everyone: Any = None
    shards: Shards = WHOLE
    known: tuple[Array, ...] = ()

    def __post_init__(self):
        if self.everyone is None:
            object.__setattr__(self, "everyone", self.rows)

    @property
    def among(self) -> Kernel:
        """The kernel between particles of the batch."""
        return self.kernel[0] if isinstance(self.kernel, tuple) else self.kernel

    @property
    def fixed(self) -> Kernel:
        """The kernel between the batch and references or memory."""
        return self.kernel[1] if isinstance(self.kernel, tuple) else self.kernel

    def distances(self) -> tuple[Array, ...]:
        """Squared distances [n, ·] to everyone, the references and the memory, in one pass, for `known`.

        (): the kernels need something else, or there are too many for one pass, or references on other devices.
        """
        refs, sets = self.refs, [self.everyone, self.refs, *([] if self.memory is None else [self.memory])]
        if refs is None or self.shards.refs or isinstance(refs.x, HostReferences):
            return ()
        among, fixed = radial_parts(self.among), radial_parts(self.fixed)
        alike = {type(part).distance2 for part in among + fixed}
        if not among or not fixed or len(alike) > 1 or any(block_beside(self.rows.n, s.x) < s.n for s in sets):
            return ()
        return tuple(fixed[0].distances2(self.rows, *sets))

    @property
    def _among(self) -> Kernel:
        return at_distances(self.among, self.known[0]) if self.known else self.among

    @property
    def _to_refs(self) -> Kernel:
        return at_distances(self.fixed, self.known[1]) if self.known else self.fixed

    @property
    def _to_memory(self) -> Kernel:
        return at_distances(self.fixed, self.known[2]) if self.known else self.fixed

    @functools.cached_property
    def weights(self) -> Float[Array, " all"]:
        """u_i of `everyone`, then of the memory; they sum to 1."""
        weights = jnp.ones(self.everyone.n, wide_dtype(self.rows.x))
        if self.memory is not None:
            weights = jnp.concatenate([weights, self.memory.weight.astype(weights.dtype)])
        return weights / weights.sum()

    @functools.cached_property
    def shares(self) -> tuple[Float[Array, "n all"], Float[Array, " k"]]:
        """Coefficients of the push for each row: of `everyone`, 0 for the particle itself, and of the memory.

        u_j/(1 − Σu²), or with estimator "v" u_j, the particle itself included.
        """
        coef = self.weights / pair_norm(self.weights, self.estimator)
        own = jnp.broadcast_to(coef[: self.everyone.n], (self.rows.n, self.everyone.n))
        if self.estimator == "u":
            own = jnp.where(jnp.eye(*own.shape, dtype=bool), 0.0, own)
        return own, coef[self.everyone.n :]

    def push(self, precondition: str = "none") -> tuple[Float[Array, "n ..."], Float[Array, " n"]]:
        """Σ_j u_j ∂k(z_i, z_j)/∂z_i/(1 − Σu²) over the other particles and the memory, and their kernel mass.

        Args:
          precondition: as in `Kernel.gradient`; the mass is 1 unless it is "mass".
        """
        own, of_memory = self.shares
        pushed, mass = self._among.gradient(self.rows, self.everyone, own, same=True, precondition=precondition)
        if self.memory is not None:
            by_memory, more = self._to_memory.gradient(
                self.rows, self.memory, of_memory, same=False, precondition=precondition
            )
            pushed, mass = pushed + by_memory, mass + more
        return pushed, mass

    def pull(self, precondition: str = "none") -> tuple[Float[Array, "n ..."], Float[Array, " n"]]:
        """Σ_j v_j ∂k(z_i, y_j)/∂z_i over the references, and their kernel mass; see `push`."""
        if isinstance(self.refs.x, HostReferences):
            (pulled, mass), _ = self._in_blocks(
                lambda kernel, z, refs, v: (kernel.gradient(z, refs, v, same=False, precondition=precondition), ())
            )
            return pulled, mass if precondition == "mass" else jnp.ones_like(mass)
        v = self.shards.probabilities(self.refs).astype(self.weights.dtype)

        def by_refs(rows):
            return self._to_refs.gradient(rows, self.refs, v, same=False, precondition=precondition)

        return self.shards.pull(by_refs, self.rows, self.everyone)

    def pair_weights(self) -> Float[Array, "n all"]:
        """w(z_i, z_j) = −2 ∂k/∂d² among the batch, for a kernel of the distance."""
        return self._among.pair_weights(self.rows, self.everyone, same=True)

    def memory_weights(self) -> Float[Array, "n k"]:
        """w(z_i, z_j) with the memory."""
        assert self.memory is not None
        return self._to_memory.pair_weights(self.rows, self.memory, same=False)

    def distance2(self) -> Float[Array, "n all"]:
        """|z_i − z_j|² among the batch, for a kernel of the distance."""
        return self._among.distance2(self.rows, self.everyone, same=True)

    def over_refs(self, term: Callable[[Array, Particles, Array], Any], *, nearest: bool = False) -> Any:
        """Σ_j over the references, in blocks: term(w(z_i, y_j), the references y_j, their weights) -> [n, ...].

        Args:
          nearest: find what `nearest2` returns in the same pass.
        """

        def of_block(kernel, z, refs, v):
            if not nearest:
                return term(kernel.pair_weights(z, refs, same=False), refs, v), ()
            weights, d2 = weights_and_distance2(kernel, z, refs)
            return term(weights, refs, v), _nearest(d2, v)

        sums, least = self._in_blocks(of_block)
        if nearest:
            self.__dict__["_nearest2"] = least
        return sums

    def nearest2(self) -> Float[Array, " n"]:
        """The squared distance of each particle to the nearest reference of positive weight; computed once."""
        return self._nearest2

    @functools.cached_property
    def _nearest2(self):
        return self._in_blocks(lambda kernel, z, refs, v: ((), _nearest(kernel.distance2(z, refs), v)))[1]

    def _in_blocks(self, of_block: Callable[..., tuple[Any, Any]]) -> tuple[Any, Any]:
        """Sums and least values over the references, read once: both by of_block(kernel, z, references, weights)."""
        v = self.shards.probabilities(self.refs).astype(self.weights.dtype)
        if self.known:
            return of_block(self._to_refs, self.rows, self.refs, v)

        def here(z):
            def of_rows(rows):
                return of_block(self.fixed, z, on_device(rows.of(self.refs)), rows.weights(v))

            return sum_and_least(of_rows, self.refs.n, block_beside(z.n, self.refs.x))

        return self.shards.meet(here, self.rows, self.everyone)

    def condition_ratio(self, own: Float[Array, "n all"], of_memory: Float[Array, " k"]) -> Array | None:
        """Density of each particle's condition among the references, over that among the other particles; detached.

        None if the kernel compares no conditions. The ratio is at most twice the one with the particle itself counted,
        which is reached where two particles share a condition. Otherwise a particle that is alone with its condition
        would be pushed by those with other conditions as if they had its own.

        Args:
          own, of_memory: the weights of the batch's and the memory's particles in the second density; rows sum to 1.
        """
        alike = self.fixed.cond_gram(self.rows, self.everyone)
        if alike is None:
            return None
        p = self.shards.probabilities(self.refs).astype(own.dtype)

        def by_refs(rows):
            return product(jnp.abs(self.fixed.cond_gram(rows, self.refs)), p)

        among_refs = self.shards.pull(by_refs, self.rows, self.everyone)
        alike = jnp.abs(alike)
        others, everybody = jnp.sum(own * alike, axis=1), alike.sum(1)
        count = jnp.asarray(self.everyone.n, own.dtype)
        if self.memory is not None:
            of_past = jnp.abs(self.fixed.cond_gram(self.rows, self.memory))
            others += product(of_past, of_memory)
            everybody += product(of_past, self.memory.weight.astype(own.dtype))
            count += self.memory.weight.sum()
        ratio = jnp.minimum(among_refs * reciprocal(others), 2 * among_refs * count * reciprocal(everybody))
        return jax.lax.stop_gradient(ratio)

    def averaged(self, average: Float[Array, "n all"], direction: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """Σ_j average_ij direction_j over `everyone`."""
        return product(average, flat(self.shards.everyone(direction))).reshape(self.rows.x.shape)

    def total(self, x: Any) -> Any:
        """The sum over the devices that hold the batch."""
        return self.shards.total(x)

    def mmd2(self, refs_own: Particles | None = None) -> Float[Array, ""]:
        """MMD² without the references' own term; that of x alone at each condition, if the kernel `splits_cond`.

        NaN if there is a memory and the kernel is a pair.

        Args:
          refs_own: `own_means` of the references, where the kernel `splits_cond`; None leaves them out.
        """
        z, everyone, refs, memory, shards = self.rows, self.everyone, self.refs, self.memory, self.shards
        if memory is not None and self.among is not self.fixed:
            return jnp.full((), jnp.nan, wide_dtype(z.x))
        if self.fixed.splits_cond:
            return self._mmd2_by_condition(refs_own)
        count = everyone.n if memory is None else everyone.n + memory.weight.sum()
        u = jnp.full(z.n, 1.0 / count, wide_dtype(z.x))
        all_u = jnp.full(everyone.n, 1.0 / count, wide_dtype(z.x))
        self_pairs = self.estimator == "v"
        among = dataclasses.replace(everyone) if self.known else everyone  # not z itself, which is read in blocks
        own = pair_sum(self._among, z, u, among, all_u, same=True, self_pairs=self_pairs)
        to_refs = self._in_blocks(lambda kernel, z, refs, v: (product(kernel.gram(z, refs), v), ()))[0]
        across = shards.total((u * to_refs).sum())
        if memory is not None:  # each device sums over its own rows, and its part of the memory's
            share, past = shards.share(memory)
            all_v = past.weight / count
            own += 2 * pair_sum(self.among, z, u, past, all_v)
            own += pair_sum(self.among, share, share.weight / count, past, all_v, same=True, self_pairs=self_pairs)
            all_u = jnp.concatenate([all_u, all_v])
            share, _ = shards.share(memory, shards.without_refs)
            p = shards.probabilities(refs)
            across += shards.total_with_refs(pair_sum(self.fixed, share, share.weight / count, refs, p))
        return shards.total(own) / pair_norm(all_u, self.estimator) - 2 * across

    def _mmd2_by_condition(self, refs_own):
        z, everyone, refs, memory, shards = self.rows, self.everyone, self.refs, self.memory, self.shards
        one = self.weights[0] if memory is None else 1 / (everyone.n + memory.weight.sum())
        each, p = jnp.full(everyone.n, one), shards.probabilities(refs)
        ones = one, shards.sum_over_refs(jnp.sum(p**2))
        within = {"same": True, "self_pairs": self.estimator == "v"}

        def terms(points, own, across):
            return conditional.differences(self.fixed, points, own, across, ones, refs_own)

        own = conditional.sums(self.among, z, everyone, each, **within)
        if memory is not None:
            own += conditional.sums(self.fixed, z, memory, one * memory.weight)
        across = shards.pull(lambda rows: conditional.sums(self.fixed, rows, refs, p), z, everyone)
        parts = [(*terms(z, own, across), each[: z.n], shards.total)]
        if memory is not None:  # split over the devices that hold the same references
            share, past = shards.share(memory, shards.without_refs)
            own = conditional.sums(self.among, share, past, one * past.weight, **within)
            own += conditional.sums(self.fixed, share, everyone, each)
            across = shards.sum_over_refs(conditional.sums(self.fixed, share, refs, p))
            parts.append((*terms(share, own, across), one * share.weight, shards.total_without_refs))
        return conditional.mean_of_known(*parts)


def _nearest(d2: Float[Array, "n m"], v: Float[Array, " m"]) -> Float[Array, " n"]:
    return jnp.min(jnp.where(v > 0, d2, jnp.inf), axis=1)
