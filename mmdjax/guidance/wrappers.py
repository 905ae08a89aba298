"""Guidance for your own pipeline: around a denoiser, or around a sampler's step.

`guide_denoiser` moves x̂0 at every network call, for any solver. `guide_sampler` takes every placement, in a loop that
calls `init` and `step`. `guided_sample` uses the second.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmdjax._core.modes import in_own_modes
from mmdjax._points.mesh import HERE, Layout, spread_over
from mmdjax._points.particles import Particles, as_particles
from mmdjax.denoisers import FORM, Denoiser
from mmdjax.fit import check_comparable
from mmdjax.guidance import MMDGuidance, check_guidance, check_kind
from mmdjax.guidance.advice import JOIN, REMEMBER, Advisor
from mmdjax.guidance.avoid import Avoid, as_avoid, check_avoid
from mmdjax.guidance.bound import BoundGuidance, GuidanceState, bind, fit, see
from mmdjax.memory import Memory
from mmdjax.samplers import Sampler, as_sampler, take_step
from mmdjax.schedules import Level
from mmdjax.tree import as_arrays, as_component, check_function, is_concrete, is_traced, pytree, static

ROUNDING = 1e-5  # added to a fraction of steps: k/N may fall short of a window's edge at k/N by its last digit


def steps_done(fraction: Any) -> Any:
    """A fraction of the steps, corrected so that rounding does not decide on which side of a window's edge it lies.

    It is below 1: a window that ends at 1 includes the clean end.
    """
    fraction = jnp.asarray(fraction, float)
    return jnp.minimum(fraction + ROUNDING, np.nextafter(fraction.dtype.type(1), fraction.dtype.type(0)))


@pytree
class GuidedDenoiser:
    """A denoiser whose x̂0 is guided; see `guide_denoiser`."""

    denoiser: Any
    guidance: MMDGuidance
    kernel: Any
    refs: Particles | None
    seen: Any = dataclasses.field(repr=False)
    avoid: Avoid | None = None
    layout: Layout = static(default=HERE, repr=False)

    @in_own_modes
    def __call__(self, params, x, level, cond):
        of_all, alike = _one_level(level)
        if self.refs is not None and not self.layout.calls:
            Advisor().alone(x.shape[0], JOIN)
        sets = [p for p in (self.refs, self.avoid and self.avoid.points) if p is not None]
        # distances among all of them pay if many samples share them: here all is made anew at each call
        reused = sum(p.n for p in sets) <= 8 * x.shape[0] * self.layout.num_calls()
        bound = bind(
            self.guidance, self.kernel, self.refs, cond, None, self.layout, reused, self.seen, avoid=self.avoid
        )
        _check_shapes(x, bound)
        x0 = self.denoiser(params, x, level, cond)
        moved = bound.denoised(x0, bound.init(x0), steps_done(1 - of_all.t), of_all, x)[0]
        return moved if alike is True else jnp.where(alike, moved, jnp.nan)


@in_own_modes
def guide_denoiser(
    denoiser: Denoiser, guidance: MMDGuidance, refs: Any, *, avoid: Any = None, axis_name: Any = None
) -> GuidedDenoiser:
    """A denoiser whose x̂0 is moved towards the references: "denoised" guidance for your own loop or solver.

    It keeps no state: the transform's state starts anew at each call. With fewer than 100 references "shrunk", the
    default, judges each call by itself, and moves nothing once the rest of the distance may be chance; `guided_sample`
    and `guide_sampler` remember how far the model was, and go on. It compares x too: give the network's input x_t, or
    take precondition="field". The window is compared with 1 − t.

    Args:
      denoiser: (params, x, level, cond) -> x0_hat. The level's fields are scalars, or [n, ...] with equal numbers.
      guidance: with at="denoised".
      refs: an array [m, ...] or Particles, scaled and shaped like the denoiser's samples. None: only avoid something.
      avoid: samples to keep away from, an array, Particles or `Avoid`; None: nothing.
      axis_name: for a loop under `jax.vmap(..., axis_name="batch")` or `shard_map`, that name: the rows of all calls
        are guided together. The steps must be the same for all. References are whole in each call.
    Returns:
      A denoiser of the same form, a pytree.
    Raises:
      ValueError: another placement, as it moves x after a step (use `guide_sampler`); references that cannot be used.
        When it is called: no such axis; samples or calls at different levels, such as those of an adaptive solver under
        `vmap`. Inside `jit` samples of one call that are at different levels give NaN instead.
    Warns:
      GuidanceWarning: of the scale; when it is called, that x has one row and there is no axis_name.

    Example:
      >>> from mmdjax import RBF
      >>> from mmdjax.schedules import VPLinear
      >>> flat_prior = lambda params, x, level, cond: level.alpha * x
      >>> guided = guide_denoiser(flat_prior, MMDGuidance(kernel=RBF(1.0)), jnp.ones((4, 2)))
      >>> guided(None, jnp.zeros((3, 2)), VPLinear()(0.5), None).shape
      (3, 2)
    """
    refs, avoid = _as_sets(refs, avoid)
    check_function("denoiser", denoiser, FORM)
    cond = refs.cond if refs is not None else avoid.cond
    _check(guidance, refs, avoid, cond)
    if not guidance.placement.inside:
        raise ValueError(
            f'{guidance.where} moves x after a step, which a denoiser never sees; use guide_sampler, or at="denoised"'
        )
    kernel, avoid = fit(guidance, refs, avoid)
    Advisor().before(guidance, kernel, refs, None, None)
    seen = None if refs is None else see(guidance, refs)
    return GuidedDenoiser(as_component(denoiser), guidance, kernel, refs, seen, avoid, spread_over(axis_name))


def _one_level(level: Level) -> tuple[Level, Any]:
    """The level of the whole batch, from fields that are scalars or [n, ...]; and whether all samples are at it."""
    if not any(map(jnp.ndim, (level.t, level.alpha, level.sigma))):
        return level, True
    rows = jax.tree.map(lambda v: jnp.reshape(v, -1), level)
    first = jax.tree.map(lambda v: v[0], rows)
    alike = jnp.stack([(a == b).all() for a, b in zip(*map(jax.tree.leaves, (rows, first)), strict=True)]).all()
    if is_concrete(alike) and not alike:
        raise ValueError(
            f"level.t has values from {rows.t.min():.4g} to {rows.t.max():.4g}; guidance moves a batch together, at "
            "one level for the batch"
        )
    return first, alike


def _as_sets(refs: Any, avoid: Any) -> tuple[Particles | None, Avoid | None]:
    avoid = as_avoid(avoid)
    if refs is None and avoid is None:
        raise ValueError("refs is None and so is avoid; give references, samples to avoid, or both")
    return None if refs is None else as_particles(refs), avoid


def _check(guidance: MMDGuidance, refs: Particles | None, avoid: Avoid | None, cond: Any) -> None:
    """The checks of references and of what is avoided; `cond` of the samples."""
    check_kind(guidance)
    if refs is not None:
        check_guidance(guidance, refs, cond)
    if avoid is not None:
        check_avoid(avoid, guidance, cond, None if refs is None else np.shape(refs.x)[1:], refs)


def _check_shapes(x: Any, bound: BoundGuidance) -> None:
    for name, held in (("refs have", bound.refs), ("avoid has", bound.avoid and bound.avoid.points)):
        if held is not None and x.shape[1:] != held.x.shape[1:]:
            raise ValueError(f"{name} shape {held.x.shape} but the samples have {x.shape}; samples must match")


class GuidedCarry(NamedTuple):
    """The carry of a `GuidedSampler`: the inner sampler's carry, the guidance's state, the number of steps done."""

    sampler: Any
    guidance: GuidanceState
    done: Any


@pytree
class GuidedSampler:
    """A sampler with guidance in or after each step; see `guide_sampler`."""

    sampler: Any
    bound: BoundGuidance
    num_steps: int | None = static(default=None)

    @in_own_modes
    def init(self, x):
        """The first `GuidedCarry`."""
        if self.bound.refs is not None and self.bound.memory is None and not self.bound.layout.calls:
            Advisor().alone(x.shape[0], JOIN, REMEMBER)
        bound = self.bound
        if bound.refs is not None and bound.kernel is not None and not is_traced((x, bound)):
            Advisor().number(bound.guidance, bound.kernel, bound.refs, x.shape[0], bound.memory, bound.avoid)
        return self.start(x)

    def start(self, x):
        """As `init`, without a warning."""
        _check_shapes(x, self.bound)
        return GuidedCarry(self.sampler.init(x), self.bound.init(x), jnp.zeros((), jnp.int32))

    @in_own_modes
    def step(self, key, x, carry, state, denoise, t, s):
        """The inner sampler's step, guided."""
        inner, guidance, done = carry
        fraction = steps_done(1 - t.t if self.num_steps is None else done / self.num_steps)
        placement, noise_key = self.bound.guidance.placement, jax.random.fold_in(key, 1)  # `key` is the sampler's
        if placement.moves == "x0_hat":
            settles = placement.settles

            def guided(x, level, states):
                x0, outer = denoise(x, level, states[0])
                moved, guidance = self.bound.denoised(x0, states[1], fraction, level, x)
                guidance = self.bound.beside(guidance, level.alpha, x - level.alpha * x0)
                return moved, (outer, guidance, moved if settles else ())

            states = state, guidance, jnp.zeros_like(x) if settles else ()
            x, inner, (state, guidance, x0) = take_step(self.sampler, key, x, inner, states, guided, t, s)
            if settles:
                settled = placement.settle(noise_key, x, x0, t, s)
                if jnp.shape(settled) != x.shape:
                    raise ValueError(
                        f"{type(placement).__name__}.settle returned shape {jnp.shape(settled)} for x of shape "
                        f"{x.shape}; it must keep it"
                    )
                x = settled.astype(x.dtype)
        else:
            before = x
            x, inner, state = take_step(self.sampler, key, x, inner, state, denoise, t, s)
            own = x - before
            x, guidance = self.bound.after_step(noise_key, x, guidance, fraction, t, s)
            guidance = self.bound.beside(guidance, 1.0, own)
        return x, GuidedCarry(inner, guidance, done + 1), state


@in_own_modes
def guide_sampler(
    sampler: Sampler,
    guidance: MMDGuidance,
    refs: Any,
    *,
    cond: Any = None,
    memory: Memory | None = None,
    num_steps: int | None = None,
    avoid: Any = None,
    axis_name: Any = None,
) -> GuidedSampler:
    """A sampler that guides each step, for your own loop; for every placement.

    Args:
      sampler: anything with `init` and `step` (see `mmdjax.samplers`).
      guidance: an `MMDGuidance`.
      refs: an array [m, ...] or Particles, scaled and shaped like the samples. None: only avoid something.
      cond: conditions of the batch, a pytree of [n, ...], if the kernel compares them.
      memory: finished samples, which count as particles but do not move.
      num_steps: steps of the loop; the window is compared with the fraction of them that is done. None: with 1 − t.
      avoid: samples to keep away from, an array, Particles or `Avoid`; None: nothing.
      axis_name: for a loop under `jax.vmap(..., axis_name="batch")` or `shard_map`, that name: the rows of all calls
        are guided together. The steps must be the same for all; `refs` and `memory` are whole in each call.
    Returns:
      A sampler, a pytree.
    Raises:
      ValueError, TypeError: references, conditions or a guidance that cannot be used. When it steps: no such axis.
    Warns:
      GuidanceWarning: of the scale, and of conditions that no reference has; from `init`, of few references for the
        rows of x, and of one row without an axis_name or a memory.

    Example:
      >>> from mmdjax import DDIM, RBF
      >>> sampler = guide_sampler(DDIM(), MMDGuidance(kernel=RBF(1.0)), jnp.ones((4, 2)))
      >>> carry = sampler.init(jnp.zeros((3, 2)))
    """
    (refs, avoid), cond = _as_sets(refs, avoid), as_arrays("cond", cond)
    _check(guidance, refs, avoid, cond)
    if memory is not None:
        if not isinstance(memory, Memory):
            raise TypeError(f"memory is {type(memory).__name__}; give Memory.empty(capacity, shape) or one from before")
        beside = ("refs", refs) if refs is not None else ("avoid", avoid.points)
        if beside[1] is not None:
            check_comparable("memory", memory.particles, *beside, kernel_uses_cond=False)
        if guidance.kernel is not None and guidance.kernel.uses_cond and memory.particles.cond is None:
            raise ValueError("the kernel compares conditions but memory has none: Memory.empty(capacity, shape, cond)")
    kernel, avoid = fit(guidance, refs, avoid)
    Advisor().before(guidance, kernel, refs, cond, None)
    bound = bind(guidance, kernel, refs, cond, memory, spread_over(axis_name), avoid=avoid)
    return GuidedSampler(as_sampler(sampler), bound, num_steps)
