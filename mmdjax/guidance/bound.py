"""The guidance bound to its references: all that a step needs but the moving particles."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from mmdjax._points.blocks import PLAIN, row_size
from mmdjax._points.distances import SUBSET, subset_of
from mmdjax._points.mesh import HERE, Layout, Shards
from mmdjax._points.particles import Particles, fill_empty, wide_dtype, widen
from mmdjax._points.streaming import HostReferences
from mmdjax.guidance import MMDGuidance
from mmdjax.guidance.coordinates import combinations, fixed_distances, pays
from mmdjax.guidance.sides import Sides
from mmdjax.kernels import Kernel, check_fitted
from mmdjax.memory import Memory
from mmdjax.mmd import pair_norm, pair_sum
from mmdjax.schedules import Level
from mmdjax.tree import pytree, replace, shown, static


@pytree
class GuidanceState:
    """What the guidance carries from step to step.

    Args:
      transform: the optax state of each sample; () without a transform.
      mmd2: MMD² after the last shift (the trace).
      shift_norm: mean L2 norm of the last shift, in the data's units (the trace).
      unshifted: x before the last shift where the placement's memory wants it, else ().
    """

    transform: Any
    mmd2: Any
    shift_norm: Any
    unshifted: Any


@pytree
class BoundGuidance:
    """An `MMDGuidance` with its references and its fitted kernel; made by `bind`.

    Args:
      refs_term: E k(y, y') over the references, for MMD² in the trace; 0 where they are noisy.
      seen: what the rule computed from the references; see `see`.
      cond: conditions of the samples, on the devices that hold these.
      distances: squared distances among references and memory, if inner steps use them; else None.
    """

    guidance: MMDGuidance
    kernel: Kernel
    refs: Particles
    refs_term: Any = dataclasses.field(repr=False)
    seen: Any = dataclasses.field(repr=False)
    cond: Any
    memory: Particles | None
    distances: Any = dataclasses.field(default=None, repr=False)
    layout: Layout = static(default=HERE, repr=False)

    def init(self, x: Array) -> GuidanceState:
        """The state before the first step for a batch shaped like x."""
        transform = self.guidance.transform
        wide = wide_dtype(x)
        per_sample_state = () if transform is None else jax.vmap(transform.init)(x.astype(wide))
        zero = jnp.zeros((), wide)
        return GuidanceState(per_sample_state, zero, zero, x if self.guidance.placement.keeps_unshifted else ())

    def active(self, fraction: Any) -> Any:
        """Whether a fraction of the steps lies in the window."""
        start, end = self.guidance.window
        return (fraction >= start) & (fraction < end)

    def denoised(
        self, x0: Array, state: GuidanceState, fraction: Any, level: Level | None = None
    ) -> tuple[Array, GuidanceState]:
        """x̂0 [n, ...] of points at a level, moved against clean references; `fraction` of the steps is done."""
        return self._guide(x0, state, fraction, level, (self.kernel, self.refs, self.memory), None)

    def after_step(
        self, key: Array, x: Array, state: GuidanceState, fraction: Any, t: Level, s: Level
    ) -> tuple[Array, GuidanceState]:
        """x_s [n, ...], just made by a step from t, moved at level s."""
        placement = self.guidance.placement
        met = placement.meet(self.layout.first(key), self.kernel, self.refs, self.memory, s)
        if not (isinstance(met, tuple) and len(met) == 3):
            raise TypeError(f"{type(placement).__name__}.meet returned {shown(met)}; give (kernel, refs, memory)")
        kernel, refs, memory = met
        if not placement.clean:
            refs = replace(refs, x=self.layout.references(refs.x))
        length = None if self.guidance.inner_steps else placement.length(t, s)
        return self._guide(x, state, fraction, s, (kernel, refs, memory), length)

    def _guide(self, x, state, fraction, level, compared, length):
        """Inner steps of x; with a `length` that many unit shifts in ceil(length) equal parts."""
        guidance, placement, layout = self.guidance, self.guidance.placement, self.layout
        layout.num_calls()  # raises outside of the caller's axes
        fraction, _ = layout.same((fraction, level))
        for name, number in (("scale", guidance.scale), ("window", guidance.window[0]), ("window", guidance.window[1])):
            if jnp.ndim(number) > 0:  # would broadcast over the samples' axes
                raise ValueError(f"{name} has shape {jnp.shape(number)}; give one number, and jax.vmap over several")
        scale = guidance.scale if length is None else guidance.scale * length / jnp.maximum(jnp.ceil(length), 1.0)
        scale = scale * placement.acts(self.memory)

        wide = wide_dtype(x)  # of levels and references x takes no precision
        seen = self.seen if placement.clean else None
        numbers = {"scale": scale, "length": length, "level": level, "reach": self.kernel.reach(), "seen": seen}
        numbers = jax.tree.map(lambda v: jnp.asarray(v, wide), numbers) | {"active": self.active(fraction)}
        batch, on_refs = P(layout.shards.batch), P(layout.shards.refs)
        kernel, refs, memory = compared
        z, transform_state, norm, mmd2 = layout.split(
            self._guide_rows,
            (*layout.join((x.astype(wide), self.cond, state.transform)), kernel, refs, memory, numbers),
            specs=(batch, batch, batch, P(), on_refs, P(), P()),
            out=(batch, batch, P(), P()),
        )
        z, transform_state = layout.own((z, transform_state), x.shape[0])
        mmd2, norm = (mmd2 + self.refs_term).astype(wide), norm.astype(wide)
        transform_state = jax.tree.map(lambda new, old: new.astype(old.dtype), transform_state, state.transform)
        return z.astype(x.dtype), GuidanceState(transform_state, mmd2, norm, x if placement.keeps_unshifted else ())

    def _guide_rows(self, shards: Shards, x, cond, transform_state, kernel, refs, memory, numbers):
        """`_guide` for the rows of one device: moved x, state of the transform, mean norm of the shifts, MMD²."""
        guidance, rule, steps, length = self.guidance, self.guidance.rule, self.guidance.steps, numbers["length"]
        all_cond = shards.everyone(cond)
        first, points = x, lambda z: z
        if self.distances is not None and not shards.batch and pays(x.shape[0], self.distances.shape[0], row_size(x)):
            kernel, z, refs, memory, points = combinations(kernel, Particles(x, cond), refs, memory, self.distances)
            first = z.x

        def gather(z):
            return shards.everyone(z) if shards.batch else ()  # to be carried along, and not twice on one device

        def sides(z, gathered):
            everyone = Particles(gathered, all_cond) if shards.batch else None
            rows = Particles(z, cond)
            return Sides(kernel, rows, refs, memory, guidance.estimator, numbers["reach"], everyone, shards)

        def move(plan, z, gathered, state):
            direction = rule.direction(sides(z, gathered), plan)
            if jnp.shape(direction) != z.shape:
                raise ValueError(
                    f"{type(rule).__name__}.direction returned shape {jnp.shape(direction)} for particles of shape "
                    f"{z.shape}; it must be that of sides.rows.x"
                )
            if guidance.transform is not None:
                direction, state = jax.vmap(guidance.transform.update)(direction, state, z)
            z = (z - numbers["scale"] * direction).astype(z.dtype)
            return z, gather(z), state

        def guided(*carry):
            plan = rule.prepare(sides(*carry[:2]), numbers["level"], numbers["seen"])

            def inner(carry, index):
                if length is None:
                    return move(plan, *carry), None
                return jax.lax.cond(index < jnp.ceil(length), lambda c: move(plan, *c), lambda c: c, carry), None

            moved = inner(carry, 0)[0] if steps == 1 else jax.lax.scan(inner, carry, jnp.arange(steps))[0]
            there = points(moved[0]).astype(x.dtype)
            moved_by = jax.lax.stop_gradient(there - x)  # here: √ has no derivative where a sample stays
            norms = jnp.sqrt(jnp.sum((moved_by**2).reshape(x.shape[0], -1), axis=1))
            return *moved, there, shards.total(norms.sum()) / sides(*moved[:2]).everyone.n

        def left(*carry):
            return *carry, x, jnp.zeros((), x.dtype)

        carry = first, gather(first), transform_state
        z, gathered, transform_state, there, norm = jax.lax.cond(numbers["active"], guided, left, *carry)
        kernel, refs, memory, z, gathered = jax.lax.stop_gradient((kernel, refs, memory, z, gathered))
        return there, transform_state, norm, sides(z, gathered).mmd2()


def fit_kernel(guidance: MMDGuidance, refs: Particles, layout: Layout = HERE) -> Kernel:
    """The guidance's kernel, its bandwidths taken from the references where they are None.

    Raises:
      ValueError: the references are all equal and would give a bandwidth of 0. Inside `jit` it is NaN instead.
    """
    kernel = _fit(guidance.base_kernel, refs, layout=layout)
    check_fitted(kernel)
    return kernel


@functools.partial(jax.jit, static_argnames="layout")
def _fit(kernel, refs, *, layout):
    def fit(kernel, refs):
        return kernel.fit(layout.known_to(layout.whole(refs) if refs.n <= SUBSET else layout.references(refs)))

    return layout.run(fit, kernel, refs, out=P())


def bind(
    guidance: MMDGuidance,
    kernel: Kernel,
    refs: Particles,
    cond: Any = None,
    memory: Memory | None = None,
    layout: Layout = HERE,
    reused: bool = True,
    seen: Any = None,
) -> BoundGuidance:
    """The guidance bound to its references (in at least float32), conditions and memory; `kernel` from `fit_kernel`.

    Args:
      reused: the result serves many network calls, which pays for distances among all references.
      seen: the result of `see` for these references, if it is known.
    """
    placement = guidance.placement
    if not kernel.sees_cond:  # carried along they would have to match in structure for nothing
        cond, refs = None, replace(refs, cond=None)
    in_blocks = placement.clean and refs.n * row_size(refs.x) > PLAIN
    refs = fill_empty(refs) if in_blocks else widen(refs)  # blocks are cast as they are read: no copy of all references
    refs = layout.references(refs)
    refs_term = 0.0
    if placement.clean:
        looked_at = layout.whole(jax.lax.stop_gradient(subset_of(refs)))
        refs_term = layout.split(
            functools.partial(_refs_term, guidance.estimator), (kernel, looked_at), specs=(P(), P()), out=P()
        )
        refs_term = jax.lax.stop_gradient(refs_term)
    held = None
    if memory is not None:
        held = widen(layout.whole(placement.begin(memory).particles))
        held = held if kernel.sees_cond else replace(held, cond=None)
    fixed, distances = refs.n + (0 if held is None else held.n), None
    few = pays(0, fixed, row_size(refs.x)) and not isinstance(refs.x, HostReferences) and layout.mesh is None
    # a transform sees points, not their coefficients, and so do some rules
    plain = guidance.transform is None and kernel.is_radial and not guidance.rule.reads_points
    if reused and few and plain and placement.clean and guidance.steps > 2:
        distances = fixed_distances(refs, held)
    seen = see(guidance, refs, layout) if seen is None else seen
    return BoundGuidance(guidance, kernel, refs, refs_term, seen, cond, held, distances, layout)


def see(guidance: MMDGuidance, refs: Particles, layout: Layout = HERE) -> Any:
    """What the guidance's rule computes from clean references, from at most 16 MB of them; detached. None: nothing."""
    if not (guidance.placement.clean and guidance.rule.looks):
        return None
    most = max(64, min(SUBSET, PLAIN // row_size(refs.x)))
    looked_at = layout.whole(widen(jax.lax.stop_gradient(subset_of(refs, most))))
    return guidance.rule.from_refs(looked_at, layout.by_rows)


def _refs_term(estimator, shards, kernel, refs):
    # `self_term`, each device having its part of the rows
    share, whole = shards.share(refs)
    total = jnp.where(whole.weight.sum() > 0, whole.weight.sum(), 1.0)
    u, v = share.weight / total, whole.weight / total
    own = pair_sum(kernel, share, u, whole, v, same=True, self_pairs=estimator == "v")
    return shards.total(own) / pair_norm(v, estimator)
