"""The guidance bound to its references: all that a step needs but the moving particles."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from mmdjax import conditional
from mmdjax._core.numerics import product, reciprocal
from mmdjax._points.blocks import PLAIN, row_size
from mmdjax._points.distances import SUBSET, subset_of
from mmdjax._points.mesh import HERE, Axes, Layout, Shards
from mmdjax._points.particles import Particles, effective_number, fill_empty, flat, on_device, wide_dtype, widen
from mmdjax._points.streaming import HostReferences
from mmdjax.guidance import MMDGuidance
from mmdjax.guidance.avoid import Avoid, Negatives, weight_at_reach, widened
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
      moved: the share of the samples that the last shift moved at all; −1 outside of the window, or if none was to.
      relative: the length of the last shift beside the model's own move (the trace).
      part: how much of the last shift was made, −1 outside of the window, and the rule's number for the next
        (`Rule.part`); or ().
    """

    transform: Any
    mmd2: Any
    shift_norm: Any
    unshifted: Any
    moved: Any
    relative: Any
    part: Any


@pytree
class BoundGuidance:
    """An `MMDGuidance` with its references and its fitted kernel; made by `bind`.

    Args:
      kernel, refs: None where samples only avoid something.
      refs_term: E k(y, y') over the references, for MMD² in the trace; 0 where they are noisy or the kernel
        `splits_cond`, NaN where there are none.
      seen: what the rule computed from the references; see `see`.
      cond: conditions of the samples, on the devices that hold these.
      distances: squared distances among all fixed points, if inner steps use them; else None.
      avoid: what is avoided, its kernel fitted; or None.
      avoid_over: the mesh axes that it is split over.
      around: its mean, and the mean squared distance from it, if its kernel is widened at high noise; else None.
      refs_own: `refs_term` of each reference at its condition (`mmdjax.conditional`), if the kernel `splits_cond`.
    """

    guidance: MMDGuidance
    kernel: Kernel | None
    refs: Particles | None
    refs_term: Any = dataclasses.field(repr=False)
    seen: Any = dataclasses.field(repr=False)
    cond: Any
    memory: Particles | None
    distances: Any = dataclasses.field(default=None, repr=False)
    layout: Layout = static(default=HERE, repr=False)
    avoid: Avoid | None = None
    avoid_over: Axes = static(default=(), repr=False)
    around: Any = dataclasses.field(default=None, repr=False)
    refs_own: Any = dataclasses.field(default=None, repr=False)

    def init(self, x: Array) -> GuidanceState:
        """The state before the first step for a batch shaped like x."""
        transform = self.guidance.transform
        wide = wide_dtype(x)
        per_sample_state = () if transform is None else jax.vmap(transform.init)(x.astype(wide))
        zero = jnp.zeros((), wide)
        unshifted = x if self.guidance.placement.keeps_unshifted else ()
        return GuidanceState(per_sample_state, zero, zero, unshifted, zero, zero, (zero, zero) if self.weighs else ())

    @property
    def weighs(self) -> bool:
        """Whether the rule makes only a part of each shift.

        Not where samples are avoided, from which all moves, nor where the kernel compares conditions: the whole batch
        does not show how far samples are from the references of their condition.
        """
        if self.refs is None or self.kernel is None:
            return False
        return weighs(self.guidance, self.kernel, self.refs, self.avoid)

    def active(self, fraction: Any) -> Any:
        """Whether a fraction of the steps lies in the window."""
        start, end = self.guidance.window
        return (fraction >= start) & (fraction < end)

    def denoised(
        self, x0: Array, state: GuidanceState, fraction: Any, level: Level | None = None, x: Array | None = None
    ) -> tuple[Array, GuidanceState]:
        """x̂0 [n, ...] of points x at a level, moved against clean references; `fraction` of the steps is done.

        Where the rule makes a part of each shift, all of it is made without x.
        """
        if self.weighs:
            one = jnp.ones((), wide_dtype(x0))
            part, after = (one, one) if x is None else self._part(x, x0, level, state.part[1])
            state = replace(state, part=(jnp.where(self.active(fraction), part, -1.0).astype(part.dtype), after))
        compared = self.kernel, self.refs, self.memory
        return self._guide(x0, state, fraction, level, compared, self.avoid, None)

    def _part(self, x, x0, level, before):
        assert self.refs is not None
        wide = wide_dtype(x0)
        self.layout.num_calls()  # raises outside of the caller's axes
        level = self.layout.same(level)
        x, x0 = self.layout.join_all((x.astype(wide), x0.astype(wide)))
        given = self.guidance.rule, x, x0, level, self.seen, effective_number(self.refs), before
        rule, *given = jax.lax.stop_gradient(given)
        made = rule.part(*given)
        if not (isinstance(made, tuple) and len(made) == 2):
            raise TypeError(f"{type(rule).__name__}.part returned {shown(made)}; give (part, number for the next call)")
        part, after = (jnp.asarray(number, wide) for number in made)
        return part, after

    def after_step(
        self, key: Array, x: Array, state: GuidanceState, fraction: Any, t: Level, s: Level
    ) -> tuple[Array, GuidanceState]:
        """x_s [n, ...], just made by a step from t, moved at level s."""
        placement = self.guidance.placement
        compared, avoid = (None, None, self.memory), self.avoid
        key = self.layout.first(key)
        if self.refs is not None:
            kernel, refs, memory = self._meet(key, self.kernel, self.refs, self.memory, s)
            if not placement.clean:
                refs = replace(refs, x=self.layout.references(refs.x))
            compared = kernel, refs, memory
        if avoid is not None:
            key = jax.random.fold_in(key, 2)
            some = Particles(x[:1]) if avoid.x is None else avoid.points  # each other: only kernel and memory count
            kernel, points, memory = self._meet(key, avoid.kernel, some, self.memory, s)
            if not placement.clean:
                points = replace(points, x=self.layout.put(points.x, P(self.avoid_over)))
            avoid = replace(avoid, kernel=kernel, x=None if avoid.x is None else points.x)
            compared = compared if self.refs is not None else (None, None, memory)
        length = None if self.guidance.inner_steps else placement.length(t, s)
        return self._guide(x, state, fraction, s, compared, avoid, length)

    def _meet(self, key, kernel, refs, memory, s):
        placement = self.guidance.placement
        met = placement.meet(key, kernel, refs, memory, s)
        if not (isinstance(met, tuple) and len(met) == 3):
            raise TypeError(f"{type(placement).__name__}.meet returned {shown(met)}; give (kernel, refs, memory)")
        return met

    def _guide(self, x, state, fraction, level, compared, avoid, length):
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
        reach = 0.0 if self.kernel is None else self.kernel.reach()
        around = None if level is None else self.around
        numbers = {"scale": scale, "length": length, "level": level, "reach": reach, "seen": seen, "around": around}
        numbers = jax.tree.map(lambda v: jnp.asarray(v, wide), numbers) | {"active": self.active(fraction)}
        numbers |= {"refs_own": self.refs_own, "part": state.part[0] if self.weighs else None}
        numbers["avoiding"] = False if avoid is None else avoid.active(fraction)
        avoided, apart = None, avoid
        if avoid is not None:
            avoided, apart = avoid.points, replace(avoid, x=None, cond=None, weight=None)
        shards = layout.shards
        batch, on_refs, on_avoid = P(shards.batch), P(shards.refs), P(self.avoid_over)
        kernel, refs, memory = compared
        z, transform_state, norm, mmd2 = layout.split(
            self._guide_rows,
            (*layout.join((x.astype(wide), self.cond, state.transform)), kernel, refs, memory, numbers, apart, avoided),
            specs=(batch, batch, batch, P(), on_refs, P(), P(), P(), on_avoid),
            out=(batch, batch, P(), P()),
        )
        z, transform_state = layout.own((z, transform_state), x.shape[0])
        mmd2, norm = (mmd2 + self.refs_term).astype(wide), norm.astype(wide)
        moved = layout.join_all(jnp.any(flat(z) != flat(x), axis=1).astype(wide)).mean()
        pulled = numbers["active"] & (refs is not None)
        pulled = pulled if numbers["part"] is None else pulled & (numbers["part"] > 0)
        guides = pulled | numbers["avoiding"]
        moved = jnp.where(guides, moved, -1.0)
        transform_state = jax.tree.map(lambda new, old: new.astype(old.dtype), transform_state, state.transform)
        unshifted = x if placement.keeps_unshifted else ()
        made = {"transform": transform_state, "mmd2": mmd2, "shift_norm": norm, "unshifted": unshifted, "moved": moved}
        return z.astype(x.dtype), replace(state, **made)

    def beside(self, state: GuidanceState, weight: Any, own: Array) -> GuidanceState:
        """The state with the length of the last shift, times a weight, over that of the model's own moves [n, ...]."""
        norms = jnp.sqrt(jnp.sum(flat(jax.lax.stop_gradient(own)) ** 2, axis=1))
        length = self.layout.join_all(norms).mean()
        relative = jax.lax.stop_gradient(weight * state.shift_norm * reciprocal(length))
        return replace(state, relative=relative.astype(state.relative.dtype))

    def _guide_rows(self, shards: Shards, x, cond, transform_state, kernel, refs, memory, numbers, avoid: Any, avoided):
        """`_guide` for the rows of one device: moved x, state of the transform, mean norm of the shifts, MMD²."""
        guidance, rule, steps, length = self.guidance, self.guidance.rule, self.guidance.steps, numbers["length"]
        all_cond = shards.everyone(cond)
        first, points = x, lambda z: z
        pulled, avoiding, floor = numbers["active"] & (refs is not None), numbers["avoiding"], 0.0
        if avoid is not None:
            if numbers["around"] is not None:
                centre, spread = jax.lax.stop_gradient(numbers["around"])
                square = shards.total(jnp.sum((x - centre) ** 2)) / all_rows(shards, x) + spread
                avoid = replace(avoid, kernel=widened(avoid.kernel, square, numbers["level"], row_size(x)))
            if rule.needs == "mass":
                floor = weight_at_reach(avoid.kernel, Particles(x, cond))
        if self.distances is not None and not shards.batch and pays(x.shape[0], self.distances.shape[0], row_size(x)):
            sets = refs, memory, avoided
            between, z, (refs, memory, avoided), points = combinations(Particles(x, cond), *sets, self.distances)
            first, kernel = z.x, None if kernel is None else between(kernel)
            if avoid is not None:
                avoid = replace(avoid, kernel=between(avoid.kernel))

        def gather(z):
            return shards.everyone(z) if shards.batch else ()  # to be carried along, and not twice on one device

        def sides(z, gathered, known=(), *, kernel: Any = kernel, refs: Any = refs, shards: Shards = shards):
            everyone = Particles(gathered, all_cond) if shards.batch else None
            rows = Particles(z, cond)
            return Sides(kernel, rows, refs, memory, guidance.estimator, numbers["reach"], everyone, shards, known)

        def at(z):
            """The particles' coordinates, everyone's, and the distances that a step or the trace asks for next."""
            gathered = gather(z)
            return z, gathered, sides(z, gathered).distances()

        def away(z, gathered):
            assert avoid is not None
            of_avoided = dataclasses.replace(shards, refs=self.avoid_over)
            beside = sides(z, gathered, kernel=avoid.kernel, refs=avoided, shards=of_avoided)
            return (avoid.strength * rule.away(Negatives(beside, avoid, floor))).astype(z.dtype)

        def move(plan, z, gathered, known, state):
            direction = jnp.zeros_like(z) if refs is None else rule.direction(sides(z, gathered, known), plan)
            if jnp.shape(direction) != z.shape:
                raise ValueError(
                    f"{type(rule).__name__}.direction returned shape {jnp.shape(direction)} for particles of shape "
                    f"{z.shape}; it must be that of sides.rows.x"
                )
            if avoid is not None:
                direction = jnp.where(pulled, direction, 0.0)
                direction += jax.lax.cond(avoiding, away, lambda z, _: jnp.zeros_like(z), z, gathered)
            if guidance.transform is not None:
                direction, state = jax.vmap(guidance.transform.update)(direction, state, z)
            return *at((z - numbers["scale"] * direction).astype(z.dtype)), state

        def guided(*carry):
            plan = None
            if refs is not None:
                plan = rule.prepare(sides(*carry[:3]), numbers["level"], numbers["seen"])

            def inner(carry, index):
                if length is None:
                    return move(plan, *carry), None
                return jax.lax.cond(index < jnp.ceil(length), lambda c: move(plan, *c), lambda c: c, carry), None

            moved = inner(carry, 0)[0] if steps == 1 else jax.lax.scan(inner, carry, jnp.arange(steps))[0]
            if numbers["part"] is not None:
                between = carry[0] + numbers["part"] * (moved[0] - carry[0])
                moved = *at(between.astype(moved[0].dtype)), moved[-1]
            there = points(moved[0]).astype(x.dtype)
            moved_by = jax.lax.stop_gradient(there - x)  # here: √ has no derivative where a sample stays
            norms = jnp.sqrt(jnp.sum((moved_by**2).reshape(x.shape[0], -1), axis=1))
            return *moved, there, shards.total(norms.sum()) / all_rows(shards, x)

        def left(*carry):
            return *carry, x, jnp.zeros((), x.dtype)

        carry = *at(first), transform_state
        z, gathered, known, transform_state, there, norm = jax.lax.cond(pulled | avoiding, guided, left, *carry)
        if refs is None:
            return there, transform_state, norm, jnp.full((), jnp.nan, x.dtype)
        kernel, refs, memory, *z = jax.lax.stop_gradient((kernel, refs, memory, z, gathered, known))
        mmd2 = sides(*z, kernel=kernel, refs=refs).mmd2(numbers["refs_own"])
        return there, transform_state, norm, mmd2


def weighs(guidance: MMDGuidance, kernel: Kernel, refs: Particles, avoid: Avoid | None) -> bool:
    """See `BoundGuidance.weighs`."""
    rule = guidance.rule
    return rule.weighs and avoid is None and not kernel.uses_cond and rule.doubts(refs)


def all_rows(shards: Shards, x: Array) -> int:
    """How many rows there are on all devices that the batch is split over."""
    return x.shape[0] * (jax.lax.axis_size(shards.batch) if shards.batch else 1)


def fit_kernel(guidance: MMDGuidance, refs: Particles, layout: Layout = HERE) -> Kernel:
    """The guidance's kernel, its bandwidths taken from the references where they are None.

    Raises:
      ValueError: the references are all equal and would give a bandwidth of 0. Inside `jit` it is NaN instead.
    """
    kernel = _fit(guidance.base_kernel, refs, layout=layout)
    check_fitted(kernel)
    return kernel


def fit(
    guidance: MMDGuidance, refs: Particles | None, avoid: Avoid | None, layout: Layout = HERE
) -> tuple[Kernel | None, Avoid | None]:
    """`fit_kernel` and `fit_avoid` of what there is.

    Raises:
      ValueError: as these.
    """
    kernel = None if refs is None else fit_kernel(guidance, refs, layout)
    return kernel, None if avoid is None else fit_avoid(guidance, kernel, avoid, layout)


def fit_avoid(guidance: MMDGuidance, kernel: Kernel | None, avoid: Avoid, layout: Layout = HERE) -> Avoid:
    """What is avoided with its kernel: the guidance's, already fitted to the references, or fitted to what is avoided.

    Raises:
      ValueError: as `fit_kernel`; one sample, and a bandwidth taken from it; or samples avoid each other by a kernel
        without a bandwidth.
    """
    if avoid.kernel is None and avoid.radius is None and kernel is not None:
        return replace(avoid, kernel=kernel)
    own = avoid.kernel_for(guidance)
    if avoid.points is not None:
        try:
            own = _fit(own, avoid.points, layout=layout)
        except ValueError as error:
            if avoid.points.n > 1:
                raise
            raise ValueError(
                "avoid has one sample, and the kernel's bandwidth is a distance between samples; give a radius, "
                "Avoid(x, radius=r), or a bandwidth, Avoid(x, kernel=IMQ(1.0)), or more samples"
            ) from error
        check_fitted(own, "samples to avoid")
    return replace(avoid, kernel=own)


@functools.partial(jax.jit, static_argnames="layout")
def _fit(kernel, refs, *, layout):
    if isinstance(refs.x, HostReferences):
        refs = on_device(subset_of(refs))  # rules look at no more

    def fit(kernel, refs):
        return kernel.fit(layout.known_to(layout.whole(refs) if refs.n <= SUBSET else layout.references(refs)))

    return layout.run(fit, kernel, refs, out=P())


def bind(
    guidance: MMDGuidance,
    kernel: Kernel | None,
    refs: Particles | None,
    cond: Any = None,
    memory: Memory | None = None,
    layout: Layout = HERE,
    reused: bool = True,
    seen: Any = None,
    avoid: Avoid | None = None,
    avoid_over: Axes = (),
) -> BoundGuidance:
    """The guidance bound to its references (in at least float32), conditions and memory; `kernel` from `fit_kernel`.

    Args:
      kernel, refs: None where samples only avoid something.
      reused: the result serves many network calls, which pays for distances among all references.
      seen: the result of `see` for these references, if it is known.
      avoid: what is avoided, from `fit_avoid`.
      avoid_over: the mesh axes that it is split over.
    """
    placement = guidance.placement
    kernels = [k for k in (kernel, None if avoid is None else avoid.kernel) if k is not None]
    sees_cond = any(k.sees_cond for k in kernels)
    if not sees_cond:  # carried along they would have to match in structure for nothing
        cond = None

    def prepared(points, kernel):
        points = points if kernel.sees_cond else replace(points, cond=None)
        in_blocks = placement.clean and points.n * row_size(points.x) > PLAIN
        if in_blocks:
            return fill_empty(points)  # blocks are cast as they are read: no copy of all
        return on_device(widen(points))  # a block at most: read once for all inner steps

    around = None
    if avoid is not None and avoid.points is not None:
        points = layout.put(prepared(avoid.points, avoid.kernel), P(avoid_over))
        avoid = replace(avoid, x=points.x, cond=points.cond, weight=points.weight)
        if placement.moves == "x0_hat" and placement.clean and guidance.rule.needs == "mass" and not avoid.one_by_one:
            around = _around(layout.whole(widen(subset_of(points))))
    if refs is not None:
        refs = layout.references(prepared(refs, kernel))
    refs_term, refs_own = 0.0 if refs is not None else jnp.nan, None
    if placement.clean and refs is not None and kernel is not None:
        looked_at = layout.whole(jax.lax.stop_gradient(subset_of(refs)))
        term = functools.partial(_refs_own if kernel.splits_cond else _refs_term, guidance.estimator)
        term = jax.lax.stop_gradient(layout.split(term, (kernel, looked_at), specs=(P(), P()), out=P()))
        refs_term, refs_own = (0.0, term) if kernel.splits_cond else (term, None)
    held = None
    if memory is not None:
        held = widen(layout.whole(placement.begin(memory).particles))
        held = held if sees_cond else replace(held, cond=None)
    distances, sets = None, (refs, held, None if avoid is None else avoid.points)
    there = [points for points in sets if points is not None]
    few = layout.mesh is None and (refs is not None or sets[2] is not None)
    few = few and (avoid is None or avoid.radius is None)  # whose step needs the length of a sum
    few = few and not any(isinstance(points.x, HostReferences) for points in there)
    # a transform sees points themselves, and so do some rules
    plain = guidance.transform is None and all(k.is_radial for k in kernels) and not guidance.rule.reads_points
    if reused and few and plain and placement.clean and guidance.steps > 2:
        fixed = sum(points.n for points in there)
        distances = fixed_distances(*sets) if pays(0, fixed, row_size(there[0].x)) else None
    seen = see(guidance, refs, layout) if seen is None and refs is not None else seen
    apart = avoid, avoid_over, around, refs_own
    return BoundGuidance(guidance, kernel, refs, refs_term, seen, cond, held, distances, layout, *apart)


def _around(points: Particles) -> tuple[Array, Array]:
    p = points.probabilities()
    x = flat(points.x)
    mean = product(p, x)
    return mean.reshape(points.x.shape[1:]), product(p, jnp.sum((x - mean) ** 2, axis=1))


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


def _refs_own(estimator, shards, kernel, refs):
    # likewise, of each reference at its condition
    share, whole = shards.share(refs)
    total = jnp.where(whole.weight.sum() > 0, whole.weight.sum(), 1.0)
    found = conditional.sums(kernel, share, whole, whole.weight / total, same=True, self_pairs=estimator == "v")
    found, weight = shards.of_shares((found, share.weight / total), refs.n)
    return conditional.own_means(found, weight, refs.cond)
