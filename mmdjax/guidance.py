"""MMD guidance: moving generated particles down the gradient of MMD² to the references.

    shift_i = −scale · T(P_i · ∂MMD²/∂z_i / u_i)

with the gradient and the precondition P_i of `mmdjax.direction`. Where the particles are (`at`):

    "denoised"   x̂0, against clean references
    "sample"     x_s after the step, against references (and memory) brought to level s by fresh noise
    "clean"      x_s after the step, against clean references: the published placement
    "diffused"   as "sample", the noise on the references integrated in closed form

References:
  MMD Guidance, arXiv 2601.08379.
"""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from mmdjax.barycentric import combinations, fixed_distances, of_distance, pays
from mmdjax.blocks import PLAIN, row_size
from mmdjax.direction import balance_at, diffused_pair, neighbours, shift_direction
from mmdjax.distances import SUBSET, spread2, subset_of
from mmdjax.host import HostReferences
from mmdjax.kernels import IMQ, RBF, Kernel, NearestNeighbour, Neighbourhood, Polynomial, as_kernel, check_fitted
from mmdjax.memory import Memory
from mmdjax.mmd import check_estimator, embedding, pair_norm, pair_sum
from mmdjax.numerics import product
from mmdjax.particles import Particles, check_points, fill_empty, flat, wide_dtype, widen
from mmdjax.placement import HERE, Placement, fitted_in
from mmdjax.schedules import Level, diffuse
from mmdjax.tree import are_numbers, check_instance, check_number, is_concrete, pytree, replace, shown, static

PLACEMENTS = ("denoised", "sample", "clean", "diffused")
PRECONDITIONS = ("field", "mass", "length", "none", "raw")
DENOISED_STEPS = 8  # inner steps a network call
SAMPLE_RATE, SAMPLE_CAP = 20.0, 0.575  # inner steps per unit of log σ²/α², and the most of it that one step counts


@pytree
class MMDGuidance:
    """How to guide: the kernel, the placement and the size of the move.

    Args:
      kernel: on samples, or a `Product` on samples and conditions. None: `IMQ`, its bandwidth `Neighbourhood()` of the
        references ("denoised", "clean") or 2.5 times their median nearest-neighbour distance ("sample"); "diffused":
        `RBF` at their median distance.
      scale: multiplies the shift. 0 is plain sampling.
      at: "denoised", "sample", "clean" or "diffused"; see the top of this module.
      estimator: "u" leaves the self-pair out, "v" keeps it.
      inner_steps: shifts a network call. None: 8 ("denoised"); 20 × the decrease in log σ²/α² over the step, that
        capped at .575, in equal parts ("sample", "diffused"); 1 ("clean").
      precondition: P_i. "mass" and "field": see `mmdjax.direction`; "length": ℓ², the kernel's length squared, by
        component in a sum; "none": 1; "raw": u_i, the gradient itself. None: "field" ("denoised"), "mass" (elsewhere).
      transform: T, an `optax.GradientTransformation` vmapped over samples, the guided point being its `params`. Static:
        make it once. Its numbers may follow the count of updates (a schedule). The shift is *minus* what it returns, so
        give a `scale_by_…` transformation, such as `optax.scale_by_adam()`, not an optimizer, which turns the sign
        itself.
      window: (start, end), fractions of the steps done between which guidance acts; 0 is pure noise, 1 is clean.
      published: keep the memory as the published code does; see `paper`.
    Raises:
      ValueError: a choice that does not exist, or that the kernel cannot serve ("mass" and "field" need a kernel of the
        distance, "diffused" an RBF); a window out of order or range; a scale that is not finite; inner_steps below 1.

    Example:
      >>> MMDGuidance(kernel=RBF(1.0), at="sample").at
      'sample'

    Source: arXiv 2601.08379.
    """

    kernel: Any = None
    scale: Any = 1.0
    at: Literal["denoised", "sample", "clean", "diffused"] = static(default="denoised")
    estimator: Literal["u", "v"] = static(default="u")
    inner_steps: int | None = static(default=None)
    precondition: Literal["field", "mass", "length", "none", "raw"] | None = static(default=None)
    transform: Any = static(default=None)
    window: tuple[Any, Any] = (0.0, 1.0)
    published: bool = static(default=False)

    def __post_init__(self):
        if self.at not in PLACEMENTS:
            raise ValueError(f"at is {self.at!r}; choose one of {PLACEMENTS}")
        check_estimator(self.estimator)
        if self.precondition not in (None, *PRECONDITIONS):
            raise ValueError(f"precondition is {self.precondition!r}; choose one of {PRECONDITIONS}")
        if self.inner_steps is not None and (not isinstance(self.inner_steps, int) or self.inner_steps < 1):
            raise ValueError(f"inner_steps is {self.inner_steps!r}; give an integer of at least 1, or None")
        check_number("scale", self.scale)
        if is_concrete(self.scale) and not np.isfinite(self.scale).all():
            raise ValueError(f"scale is {self.scale}; give a finite number (0 is plain sampling)")
        if isinstance(self.window, list):
            object.__setattr__(self, "window", tuple(self.window))
        if not isinstance(self.window, tuple) or len(self.window) != 2 or not are_numbers(self.window):
            raise ValueError(f"window is {self.window}; give (start, end), fractions of the steps between 0 and 1")
        if self.transform is not None and not all(hasattr(self.transform, name) for name in ("init", "update")):
            raise TypeError(
                f"transform is {shown(self.transform)}; give an optax transformation, such as optax.scale_by_adam()"
            )
        if is_concrete(self.window) and np.ndim(self.window[0]) == np.ndim(self.window[1]) == 0:
            start, end = map(float, self.window)
            if not 0 <= start < end <= 1:
                raise ValueError(
                    f"window is ({start:g}, {end:g}); it needs 0 <= start < end <= 1, fractions of the steps"
                )
        if self.kernel is not None:
            object.__setattr__(self, "kernel", as_kernel(self.kernel))
            serves = self.kernel.has_length if self.rule == "length" else self.kernel.has_mass
            if self.rule in ("field", "mass", "length") and not serves:
                raise ValueError(self.kernel.without(self.rule))
            if self.at == "diffused":
                diffused_pair(self.kernel, None)

    @property
    def rule(self) -> str:
        """The precondition, None filled in."""
        return self.precondition or ("field" if self.at == "denoised" else "mass")

    @property
    def num_moves(self) -> int:
        """Inner steps among references that stay where they are; 0 where each network call brings other ones."""
        if self.at == "denoised":
            return self.inner_steps or DENOISED_STEPS
        return self.inner_steps or 1 if self.at == "clean" else 0

    @classmethod
    def paper(cls, alpha: Any = 0.002) -> "MMDGuidance":
        """The authors' rule: x_s − α ‖x_s‖ g/(‖g‖ + 1e-5), g the raw gradient of the biased MMD² with (xᵀy/D + 1)³.

        Clean references against x_s. Without memory the joint batch is guided, each sample's norms its own. With a
        memory and num_samples=1 it is the published loop: nothing moves until one sample is remembered, samples are
        remembered as they were before the last shift, and a full memory keeps only its last sample.

        Args:
          alpha: the relative size of a move, the `scale` leaf. The paper's images use .002.

        Example:
          >>> MMDGuidance.paper(alpha=0.01).scale
          0.01

        Source: arXiv 2601.08379.
        """
        return cls(
            kernel=Polynomial(),
            scale=alpha,
            at="clean",
            estimator="v",
            inner_steps=1,
            precondition="raw",
            transform=_trust_ratio(),
            published=True,
        )


@functools.cache
def _trust_ratio():
    # one object for all calls, or each would compile anew
    import optax

    return optax.scale_by_trust_ratio(eps=1e-5)


@pytree
class GuidanceState:
    """What the guidance carries from step to step.

    Args:
      transform: the optax state, one a sample; () without a transform.
      mmd2: MMD² after the last shift (the trace).
      shift_norm: mean L2 norm of the last shift, in the data's units (the trace).
      unshifted: x before the last shift where the published memory wants it, else ().
    """

    transform: Any
    mmd2: Any
    shift_norm: Any
    unshifted: Any


@pytree
class BoundGuidance:
    """An `MMDGuidance` with its references, kernel fitted: everything but the moving particles. Made by `bind`.

    Args:
      refs_term: E k(y, y') over the references, of MMD² in the trace; 0 where they are noisy.
      spread2: `spread_of` the references.
      cond: the samples', placed as the batch is.
      distances: squared, among references and memory, where inner steps make use of them; else None.
    """

    guidance: MMDGuidance
    kernel: Kernel
    refs: Particles
    refs_term: Any
    spread2: Any
    cond: Any
    memory: Particles | None
    distances: Any = None
    placement: Placement = static(default=HERE)

    def init(self, x: Array) -> GuidanceState:
        """The state before the first step for a batch shaped like x."""
        transform = self.guidance.transform
        wide = wide_dtype(x)
        per_sample_state = () if transform is None else jax.vmap(transform.init)(x.astype(wide))
        zero = jnp.zeros((), wide)
        return GuidanceState(per_sample_state, zero, zero, x if self.guidance.published else ())

    def active(self, fraction: Any) -> Any:
        """Whether a fraction of the steps lies in the window."""
        start, end = self.guidance.window
        return (fraction >= start) & (fraction < end)

    def denoised(
        self, x0: Array, state: GuidanceState, fraction: Any, level: Level | None = None
    ) -> tuple[Array, GuidanceState]:
        """x̂0 [n, ...] of points at a level, moved against clean references; `fraction` of the steps is done."""
        steps = self.guidance.num_moves
        return self._guide(x0, state, fraction, level, self.kernel, self.refs, self.memory, steps, None, self.refs_term)

    def after_step(
        self, key: Array, x: Array, state: GuidanceState, fraction: Any, t: Level, s: Level
    ) -> tuple[Array, GuidanceState]:
        """x_s [n, ...], just made by a step from t, moved at level s."""
        guidance, refs, memory = self.guidance, self.refs, self.memory
        steps, length = guidance.inner_steps or 1, None
        if guidance.at == "clean":
            return self._guide(x, state, fraction, s, self.kernel, refs, memory, steps, None, self.refs_term)
        if guidance.inner_steps is None:
            decrease = jnp.minimum(jax.lax.stop_gradient(s.log_snr() - t.log_snr()), SAMPLE_CAP)
            steps, length = math.ceil(SAMPLE_RATE * SAMPLE_CAP), SAMPLE_RATE * decrease
        if guidance.at == "sample":
            kernel: Any = self.kernel.at_level(s)
            key_refs, key_memory = jax.random.split(key)
            refs = replace(refs, x=self.placement.references(diffuse(key_refs, refs.x, s)))
            if memory is not None:
                memory = replace(memory, x=diffuse(key_memory, memory.x, s))
        else:
            kernel = diffused_pair(self.kernel, s, math.prod(refs.x.shape[1:]))
            refs = replace(refs, x=s.alpha * refs.x)
            if memory is not None:
                memory = replace(memory, x=s.alpha * memory.x)
        return self._guide(x, state, fraction, s, kernel, refs, memory, steps, length, 0.0)

    def _guide(self, x, state, fraction, level, kernel, refs, memory, steps, length, refs_term):
        """`steps` shifts of x; with a `length` that many unit shifts in ceil(length) ≤ steps equal parts."""
        guidance, rule = self.guidance, self.guidance.rule
        for name, number in (("scale", guidance.scale), ("window", guidance.window[0]), ("window", guidance.window[1])):
            if jnp.ndim(number) > 0:  # would broadcast over the samples' axes
                raise ValueError(f"{name} has shape {jnp.shape(number)}; give one number, and jax.vmap over several")
        scale = guidance.scale if length is None else guidance.scale * length / jnp.maximum(jnp.ceil(length), 1.0)
        if guidance.published and memory is not None:
            scale = scale * (memory.weight.sum() > 0)  # the published loop leaves the first sample alone

        balance = balance_at(self.kernel, level) if rule == "field" else 0.0
        wide = wide_dtype(x)  # of levels and references x takes no precision
        numbers = {"scale": scale, "balance": balance, "length": length, "spread2": self.spread2}
        numbers = jax.tree.map(lambda v: jnp.asarray(v, wide), numbers) | {"active": self.active(fraction)}
        batch, on_refs = P(self.placement.shards.batch), P(self.placement.shards.refs)
        z, transform_state, norm, mmd2 = self.placement.split(
            functools.partial(self._guide_rows, steps),
            (x.astype(wide), self.cond, state.transform, kernel, refs, memory, numbers),
            specs=(batch, batch, batch, P(), on_refs, P(), P()),
            out=(batch, batch, P(), P()),
        )
        mmd2, norm = (mmd2 + refs_term).astype(wide), norm.astype(wide)
        transform_state = jax.tree.map(lambda new, old: new.astype(old.dtype), transform_state, state.transform)
        return z.astype(x.dtype), GuidanceState(transform_state, mmd2, norm, x if guidance.published else ())

    def _guide_rows(self, steps, shards, x, cond, transform_state, kernel, refs, memory, numbers):
        """`_guide` for the rows of one device: moved x, state of the transform, mean norm of the shifts, MMD²."""
        guidance, rule, length = self.guidance, self.guidance.rule, numbers["length"]
        all_cond = shards.everyone(cond)
        first, points = x, lambda z: z
        if self.distances is not None and pays(x.shape[0], self.distances.shape[0], row_size(x)):
            kernel, z, refs, memory, points = combinations(kernel, Particles(x, cond), refs, memory, self.distances)
            first = z.x

        def gather(z):
            return shards.everyone(z) if shards.batch else ()  # to be carried along, and not twice on one device

        def particles(z, gathered):
            rows = Particles(z, cond)
            return rows, Particles(gathered, all_cond) if shards.batch else rows

        def move(average, z, gathered, state):
            rows, whole = particles(z, gathered)
            direction = shift_direction(
                kernel,
                rows,
                refs,
                memory,
                estimator=guidance.estimator,
                precondition=rule,
                balance=numbers["balance"],
                everyone=whole,
                shards=shards,
            )
            if average is not None:
                direction = product(average, flat(shards.everyone(direction))).reshape(z.shape)
            if guidance.transform is not None:
                direction, state = jax.vmap(guidance.transform.update)(direction, state, z)
            z = (z - numbers["scale"] * direction).astype(z.dtype)
            return z, gather(z), state

        def guided(z, gathered, state):
            average = None
            if rule == "field":  # of the points as they come: once a call, not at each inner step
                rows, whole = particles(z, gathered)
                average = neighbours(
                    kernel, rows, refs, memory, spread2=numbers["spread2"], everyone=whole, shards=shards
                )

            def inner(carry, index):
                if length is None:
                    return move(average, *carry), None
                return jax.lax.cond(index < jnp.ceil(length), lambda c: move(average, *c), lambda c: c, carry), None

            carry = (z, gathered, state)
            moved = inner(carry, 0)[0] if steps == 1 else jax.lax.scan(inner, carry, jnp.arange(steps))[0]
            there = points(moved[0]).astype(x.dtype)
            moved_by = jax.lax.stop_gradient(there - x)  # here: √ has no derivative where a sample stays
            norms = jnp.sqrt(jnp.sum((moved_by**2).reshape(x.shape[0], -1), axis=1))
            return *moved, there, shards.total(norms.sum()) / particles(z, gathered)[1].n

        def left(z, gathered, state):
            return z, gathered, state, x, jnp.zeros((), x.dtype)

        carry = first, gather(first), transform_state
        z, gathered, transform_state, there, norm = jax.lax.cond(numbers["active"], guided, left, *carry)
        traced = jax.lax.stop_gradient((kernel, *particles(z, gathered), refs, memory))
        return there, transform_state, norm, self._mmd2(*traced, shards)

    def _mmd2(self, kernel, z, everyone, refs, memory, shards):
        """MMD² without the references' own term; each device sums over its own rows, and its part of the memory's."""
        among, fixed = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        if memory is not None and among is not fixed:
            return jnp.full((), jnp.nan, wide_dtype(z.x))  # memory is in closed form, the batch is not: no one Gram
        count = everyone.n if memory is None else everyone.n + memory.weight.sum()
        u = jnp.full(z.n, 1.0 / count, wide_dtype(z.x))
        all_u = jnp.full(everyone.n, 1.0 / count, wide_dtype(z.x))
        self_pairs = self.guidance.estimator == "v"
        own = pair_sum(among, z, u, everyone, all_u, same=True, self_pairs=self_pairs)
        p = shards.probabilities(refs)
        to_refs = u * shards.pull(lambda rows: embedding(fixed, refs, p, rows), z, everyone)
        across = shards.total(to_refs.sum())
        if memory is not None:
            share, past = shards.share(memory)
            all_v = past.weight / count
            own += 2 * pair_sum(among, z, u, past, all_v)
            own += pair_sum(among, share, share.weight / count, past, all_v, same=True, self_pairs=self_pairs)
            all_u = jnp.concatenate([all_u, all_v])
            share, _ = shards.share(memory, shards.without_refs)
            across += shards.total_with_refs(pair_sum(fixed, share, share.weight / count, refs, p))
        return shards.total(own) / pair_norm(all_u, self.guidance.estimator) - 2 * across


def default_kernel(at: str) -> Kernel:
    """The kernel of `MMDGuidance()` at a placement."""
    if at == "diffused":
        return RBF()
    return IMQ(NearestNeighbour(2.5) if at == "sample" else Neighbourhood())


def fit_kernel(guidance: MMDGuidance, refs: Particles, placement: Placement = HERE) -> Kernel:
    """The guidance's kernel with all that it takes from the references filled in.

    Raises:
      ValueError: a bandwidth comes out as 0, the references being all equal. Inside `jit`, where that is not seen, it
        is NaN.
    """
    kernel = default_kernel(guidance.at) if guidance.kernel is None else guidance.kernel
    kernel = _fit(kernel, refs, placement=placement)
    check_fitted(kernel)
    return kernel


@functools.partial(jax.jit, static_argnames="placement")
def _fit(kernel, refs, *, placement):
    def fit(kernel, refs):
        with fitted_in(placement):
            return kernel.fit(placement.whole(refs) if refs.n <= SUBSET else placement.references(refs))

    return placement.run(fit, kernel, refs, out=P())


def check_kind(guidance: Any) -> None:
    """Raise TypeError unless this is an MMDGuidance."""
    check_instance("guidance", guidance)
    if not isinstance(guidance, MMDGuidance):
        raise TypeError(
            f"guidance is {type(guidance).__name__}; give MMDGuidance(...), or refs=None for plain sampling"
        )


def check_guidance(guidance: Any, refs: Particles, cond: Any) -> None:
    """Raise for references and conditions that the guidance cannot use.

    Raises:
      TypeError: not an MMDGuidance; references that are not floats.
      ValueError: see `check_points`; a Product kernel and only one of cond and refs.cond, or of other shapes.
    """
    check_kind(guidance)
    check_points("refs", refs, floats=True)
    if isinstance(refs.x, HostReferences) and guidance.at in ("sample", "diffused"):
        raise ValueError(f'at="{guidance.at}" brings references to each noise level; HostReferences need at="denoised"')
    if guidance.kernel is None or not guidance.kernel.uses_cond:
        return
    if refs.cond is None:
        raise ValueError("the kernel compares conditions but refs have none; give refs=Particles(x, cond=...)")
    if cond is None:
        raise ValueError(
            "the kernel compares conditions but cond is None; give cond, one row a sample, or a kernel on x alone"
        )
    shapes = [jax.tree.map(lambda leaf: np.shape(leaf)[1:], tree) for tree in (refs.cond, cond)]
    if shapes[0] != shapes[1] or jax.tree.structure(refs.cond) != jax.tree.structure(cond):
        shapes = [jax.tree.map(np.shape, tree) for tree in (refs.cond, cond)]
        raise ValueError(f"refs.cond has shape {shapes[0]} but cond has {shapes[1]}; conditions must match")


def bind(
    guidance: MMDGuidance,
    kernel: Kernel,
    refs: Particles,
    cond: Any = None,
    memory: Memory | None = None,
    placement: Placement = HERE,
    reused: bool = True,
    spread: Any = None,
) -> BoundGuidance:
    """The guidance bound to its references (in at least float32), conditions and memory; `kernel` from `fit_kernel`.

    Args:
      reused: for many network calls, so that distances among all references are worth their time.
      spread: `spread_of` these references where that is known.
    """

    if not kernel.sees_cond:  # carried along they would have to match in structure for nothing
        cond, refs = None, replace(refs, cond=None)
    in_blocks = guidance.at in ("denoised", "clean") and refs.n * row_size(refs.x) > PLAIN
    refs = fill_empty(refs) if in_blocks else widen(refs)  # blocks are cast as they are read: no copy of all references
    refs = placement.references(refs)
    refs_term = 0.0
    if guidance.at in ("denoised", "clean"):
        looked_at = placement.whole(jax.lax.stop_gradient(subset_of(refs)))
        refs_term = placement.split(
            functools.partial(_refs_term, guidance.estimator), (kernel, looked_at), specs=(P(), P()), out=P()
        )
        refs_term = jax.lax.stop_gradient(refs_term)
    held = None
    if memory is not None:
        memory = memory.reset_when_full() if guidance.published else memory
        held = widen(placement.whole(memory.particles))
        held = held if kernel.sees_cond else replace(held, cond=None)
    fixed, distances = refs.n + (0 if held is None else held.n), None
    few = pays(0, fixed, row_size(refs.x)) and not isinstance(refs.x, HostReferences) and placement == HERE
    if reused and few and guidance.num_moves > 2 and guidance.transform is None and of_distance(kernel):
        distances = fixed_distances(refs, held)
    spread = spread_of(guidance, refs, placement) if spread is None else spread
    return BoundGuidance(guidance, kernel, refs, refs_term, spread, cond, held, distances, placement)


def spread_of(guidance: MMDGuidance, refs: Particles, placement: Placement = HERE) -> Any:
    """`spread2` of clean references, or of some 16 MB of them, for a guidance that asks for it, else ∞; detached."""
    if guidance.rule != "field" or guidance.at not in ("denoised", "clean"):
        return jnp.inf
    most = max(64, min(SUBSET, PLAIN // row_size(refs.x)))
    looked_at = placement.whole(widen(jax.lax.stop_gradient(subset_of(refs, most))))
    with fitted_in(placement):
        return spread2(flat(looked_at.x), looked_at.probabilities())


def _refs_term(estimator, shards, kernel, refs):
    # `self_term`, each device having its part of the rows
    share, whole = shards.share(refs)
    total = jnp.where(whole.weight.sum() > 0, whole.weight.sum(), 1.0)
    u, v = share.weight / total, whole.weight / total
    own = pair_sum(kernel, share, u, whole, v, same=True, self_pairs=estimator == "v")
    return shards.total(own) / pair_norm(v, estimator)
