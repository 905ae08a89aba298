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
from mmdjax._points.particles import Particles, as_particles
from mmdjax.denoisers import FORM, Denoiser
from mmdjax.fit import check_comparable
from mmdjax.guidance import MMDGuidance, check_guidance, check_kind
from mmdjax.guidance.avoid import Avoid, as_avoid, check_avoid
from mmdjax.guidance.bound import BoundGuidance, GuidanceState, bind, fit_avoid, fit_kernel, see
from mmdjax.memory import Memory
from mmdjax.samplers import Sampler, as_sampler, take_step
from mmdjax.tree import as_arrays, as_component, check_function, pytree, static

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

    @in_own_modes
    def __call__(self, params, x, level, cond):
        if jnp.ndim(level.t) > 0:
            raise ValueError(f"level.t has shape {jnp.shape(level.t)}; a guided denoiser takes one level for the batch")
        sets = [p for p in (self.refs, self.avoid and self.avoid.points) if p is not None]
        reused = sum(p.n for p in sets) <= 8 * x.shape[0]  # at once: here all of it is made anew at each call
        bound = bind(self.guidance, self.kernel, self.refs, cond, reused=reused, seen=self.seen, avoid=self.avoid)
        _check_shapes(x, bound)
        x0 = self.denoiser(params, x, level, cond)
        return bound.denoised(x0, bound.init(x0), steps_done(1 - level.t), level)[0]


@in_own_modes
def guide_denoiser(denoiser: Denoiser, guidance: MMDGuidance, refs: Any, *, avoid: Any = None) -> GuidedDenoiser:
    """A denoiser whose x̂0 is moved towards the references: "denoised" guidance for your own loop or solver.

    It keeps no state: the transform's state starts anew at each call. The window is compared with 1 − t.

    Args:
      denoiser: (params, x, level, cond) -> x0_hat; level's fields are scalars.
      guidance: with at="denoised".
      refs: an array [m, ...] or Particles, scaled and shaped like the denoiser's samples. None: only avoid something.
      avoid: samples to keep away from, an array, Particles or `Avoid`; None: nothing.
    Returns:
      A denoiser of the same form, a pytree.
    Raises:
      ValueError: another placement, as it moves x after a step (use `guide_sampler`); references that cannot be used.

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
    kernel = None if refs is None else fit_kernel(guidance, refs)
    seen = None if refs is None else see(guidance, refs)
    avoid = None if avoid is None else fit_avoid(guidance, kernel, avoid)
    return GuidedDenoiser(as_component(denoiser), guidance, kernel, refs, seen, avoid)


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
                x0, guidance = self.bound.denoised(x0, states[1], fraction, level)
                return x0, (outer, guidance, x0 if settles else ())

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
            x, inner, state = take_step(self.sampler, key, x, inner, state, denoise, t, s)
            x, guidance = self.bound.after_step(noise_key, x, guidance, fraction, t, s)
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
    Returns:
      A sampler, a pytree.
    Raises:
      ValueError, TypeError: references, conditions or a guidance that cannot be used.

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
    kernel = None if refs is None else fit_kernel(guidance, refs)
    avoid = None if avoid is None else fit_avoid(guidance, kernel, avoid)
    bound = bind(guidance, kernel, refs, cond, memory, avoid=avoid)
    return GuidedSampler(as_sampler(sampler), bound, num_steps)
