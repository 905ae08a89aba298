"""Adaptive solvers: the probability flow and the reverse SDE through diffrax.

With x̄ = x/α, σ̄ = σ/α and time λ = log(α/σ), half the log-SNR, which increases from noise to clean (σ̄ = e^{−λ}), the
forward process adds noise of size σ̄ to x_0, and runs backwards by

    dx̄ = (x̂0 − x̄) dλ                       probability flow
    dx̄ = 2 (x̂0 − x̄) dλ + √2 σ̄ dw           reverse SDE.

x̄ grows without bound towards noise, so what is integrated is y = x/√(α² + σ²) = c x̄, with c² = 1/(1 + e^{−2λ}) and
s² = 1 − c², hence dc/dλ = c s²:

    dy = c (x̂0 − c y) dλ
    dy = [2c (x̂0 − c y) − s² y] dλ + √2 s dw.

Where noise dominates, y is the noise itself, of unit variance; at the clean end it is the sample, in the data's units.
So a tolerance rtol |y| + atol has a meaning at both ends: atol is a fraction of the noise at first, and in the data's
units at last. The right sides stay bounded (dσ/dt is infinite at t = 0 for many schedules), and the SDE's noise is
additive.

Guidance couples the samples, so the state is the whole batch, with one step length, chosen for the worst sample.

References:
  Song et al. 2021 (eq. 6 and 13), Karras et al. 2022 (eq. 1 to 4), Kingma et al. 2021 (log-SNR as time), Kidger 2021
  (diffrax), Foster et al. 2023 (ShARK, the SDE's solver), Jelinčič et al. 2024 (virtual Brownian tree). Guidance: arXiv
  2601.08379.
"""

import functools
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
from jaxtyping import Array

from mmdjax._core.modes import in_own_modes
from mmdjax._core.numerics import safe_sqrt
from mmdjax._points.particles import Particles, as_particles
from mmdjax.calls import as_memory, check_call, check_count
from mmdjax.denoisers import DiffusionModel
from mmdjax.guidance import MMDGuidance
from mmdjax.guidance.advice import REMEMBER, Advisor
from mmdjax.guidance.avoid import as_avoid
from mmdjax.guidance.bound import bind, fit
from mmdjax.memory import Memory
from mmdjax.samplers import DDIM
from mmdjax.schedules import Level, Schedule, time_of_log_snr
from mmdjax.tree import as_arrays, is_concrete, is_traced, pytree, replace, strong

FIRST_STEP = 0.1  # in λ; a step too long is rejected, a short one grows tenfold
LONGEST_STEP = 2.0  # in λ: where noise dominates nothing happens, and a longer step would leap over the data unseen
ODE_CONTROL = {"pcoeff": 0.3, "icoeff": 0.3}  # PI: errors near the tolerance and few rejections where the flow sets in
SDE_CONTROL = {"pcoeff": 0.1, "icoeff": 0.3}  # what diffrax advises for SDEs
PURE_START = 1e-3  # where λ(t_max) = −∞: the part of the interval that one DDIM step covers first
BROWNIAN_CELLS = 4096  # the SDE's shortest step is the interval's length over this


@pytree
class AdaptiveSamples:
    """What `probability_flow` and `reverse_sde` return.

    Args:
      x: [num_samples, *shape].
      memory: with these samples added, for the next call; None without memory.
      num_steps: steps tried, of one length for the whole batch.
      num_rejected: how many of these were too long.
      num_evaluations: network calls on the whole batch; None for a solver without a Runge–Kutta tableau.
      succeeded: whether the end was reached; if not (with throw=False), x is where the solver stopped.
    """

    x: Array
    memory: Memory | None
    num_steps: Any
    num_rejected: Any
    num_evaluations: Any
    succeeded: Any


@in_own_modes
def probability_flow(
    params: Any,
    key: Array,
    refs: Any,
    *,
    model: DiffusionModel,
    num_samples: int,
    cond: Any = None,
    guidance: MMDGuidance = MMDGuidance(),
    solver: Any = None,
    rtol: Any = 1e-3,
    atol: Any = 1e-3,
    t_max: Any = 1.0,
    t_min: Any = 1e-3,
    final: bool = True,
    x_init: Any = None,
    memory: int | Memory | None = None,
    max_steps: int = 1024,
    adjoint: Any = None,
    throw: bool = True,
    avoid: Any = None,
) -> AdaptiveSamples:
    """Sample by the probability flow dx̄/dλ = x̂0 − x̄ with an adaptive solver: deterministic given x at t_max.

    The call is jitted, and may be made inside `jit`, `vmap` and reverse-mode `grad` (with respect to params, refs,
    x_init and the numbers in guidance and denoiser; the schedule, t_max, t_min and the tolerances count as constants).
    The gradient is that of the steps taken, their lengths and what "shrunk" leaves out held fixed; it is as near to the
    flow's as the tolerance.

    Guidance moves x̂0 at every network call and keeps no state between calls: the transform's state starts anew, so that
    a momentum acts only within the inner steps, and "shrunk" acts as in `guide_denoiser`. The windows of `guidance` and
    `avoid` are compared with 1 − t; the solver steps to their edges and starts afresh there.

    JAX's persistent compilation cache (`jax_compilation_cache_dir`) does not keep the program, because diffrax's checks
    of values call back from it, even with throw=False. With EQX_ON_ERROR=nan in the environment it is kept, and errors
    give NaN.

    Args:
      params: the model's parameters.
      key: a typed PRNG key; the same key starts from the same noise as in `guided_sample`.
      refs: references, an array [m, *model.shape], Particles, or None: the plain flow.
      model: the diffusion model.
      num_samples: n, the size of the batch.
      cond: the samples' conditions, a pytree of [n, ...], or None.
      guidance: at="denoised" only.
      solver: an adaptive diffrax ODE solver, default `diffrax.Tsit5()`.
      rtol: relative tolerance of a step on y = x/√(α² + σ²).
      atol: absolute tolerance; y has the data's units at the clean end. The error is the largest of the samples' RMS
        errors.
      t_max: where x starts, in (t_min, 1]. If α(t_max) = 0 (rectified flow from t = 1), log-SNR is −∞ there, and the
        first thousandth of the interval is one step of DDIM.
      t_min: where the flow ends, above 0, as log-SNR is +∞ at the clean end.
      final: return x̂0 (guided) at t_min, else x at t_min.
      x_init: x at t_max, [n, *model.shape]; default prior noise.
      memory: None, the capacity of a new memory, or the memory of an earlier call.
      max_steps: give up after so many; with the default adjoint the backward pass keeps about √(2 max_steps) states.
      adjoint: default `diffrax.RecursiveCheckpointAdjoint()`; for forward mode `diffrax.ForwardMode()`.
      throw: raise if the end is not reached; else see `AdaptiveSamples.succeeded`.
      avoid: samples to keep away from, as in `guided_sample`.
    Returns:
      AdaptiveSamples.
    Raises:
      TypeError, ValueError: as `guided_sample`; another placement than "denoised"; t_max, t_min, tolerances or
        max_steps out of range; solver or adjoint not from diffrax.
      RuntimeError: the end is not reached in max_steps, or a value is NaN.
    Warns:
      GuidanceWarning: as `guided_sample`, of what its arguments tell.

    Example:
      >>> from mmdjax.denoisers import from_model
      >>> from mmdjax.schedules import VPLinear
      >>> centred = lambda params, x, level, cond: level.alpha / (level.alpha**2 + level.sigma**2) * x  # data N(0, 1)
      >>> model = DiffusionModel(centred, VPLinear(), (2,))
      >>> x_init = jnp.array([[1.0, -2.0]])
      >>> flow = probability_flow(None, jax.random.key(0), None, model=model, num_samples=1, x_init=x_init, final=False)
      >>> flow.x.round(2).tolist(), bool(flow.succeeded)  # that flow moves nothing
      ([[1.0, -2.0]], True)

    Source: Song et al. 2021, eq. 13; guidance arXiv 2601.08379.
    """
    return _call(
        params,
        key,
        refs,
        model,
        num_samples,
        cond,
        guidance,
        diffrax.Tsit5() if solver is None else solver,
        (rtol, atol, t_max, t_min),
        x_init,
        memory,
        adjoint,
        avoid,
        stochastic=False,
        final=final,
        max_steps=max_steps,
        throw=throw,
    )


@in_own_modes
def reverse_sde(
    params: Any,
    key: Array,
    refs: Any,
    *,
    model: DiffusionModel,
    num_samples: int,
    cond: Any = None,
    guidance: MMDGuidance = MMDGuidance(),
    solver: Any = None,
    rtol: Any = 5e-2,
    atol: Any = 5e-2,
    t_max: Any = 1.0,
    t_min: Any = 1e-3,
    final: bool = True,
    x_init: Any = None,
    memory: int | Memory | None = None,
    max_steps: int = 4096,
    adjoint: Any = None,
    throw: bool = True,
    avoid: Any = None,
) -> AdaptiveSamples:
    """Sample by the reverse SDE dx̄ = 2 (x̂0 − x̄) dλ + √2 σ̄ dw with an adaptive solver for additive noise.

    The Brownian path depends only on the key (`diffrax.VirtualBrownianTree`): one key gives one path for all
    tolerances. The tolerance is on the path, not only on its distribution, so that samples cost more network calls than
    with `guided_sample`. No step is shorter than a 4096th of the interval in log-SNR, whatever the tolerance.

    All else is as for `probability_flow`.

    Args:
      params: the model's parameters.
      key: of the noise at t_max and of the Brownian path.
      refs: references or None.
      model: the diffusion model.
      num_samples: the size of the batch.
      cond: conditions.
      guidance: at="denoised" only.
      solver: an adaptive diffrax SDE solver that serves additive noise, default `diffrax.ShARK()` (strong order 1.5).
      rtol: relative tolerance of a step, on the path of y = x/√(α² + σ²).
      atol: absolute tolerance, likewise.
      t_max: where x starts.
      t_min: where the SDE ends.
      final: return x̂0 at t_min, else x at t_min.
      x_init: x at t_max.
      memory: as in `guided_sample`.
      max_steps: give up after this number.
      adjoint: a diffrax adjoint.
      throw: raise if the end is not reached.
      avoid: samples to keep away from.
    Returns:
      AdaptiveSamples.
    Raises:
      TypeError, ValueError, RuntimeError: as `probability_flow`.

    Example:
      >>> from mmdjax.schedules import VPLinear
      >>> centred = lambda params, x, level, cond: level.alpha / (level.alpha**2 + level.sigma**2) * x  # data N(0, 1)
      >>> model = DiffusionModel(centred, VPLinear(), (2,))
      >>> reverse_sde(None, jax.random.key(0), None, model=model, num_samples=8).x.shape
      (8, 2)

    Source: Song et al. 2021, eq. 6; Foster et al. 2023, eq. 6.1.
    """
    return _call(
        params,
        key,
        refs,
        model,
        num_samples,
        cond,
        guidance,
        diffrax.ShARK() if solver is None else solver,
        (rtol, atol, t_max, t_min),
        x_init,
        memory,
        adjoint,
        avoid,
        stochastic=True,
        final=final,
        max_steps=max_steps,
        throw=throw,
    )


def _call(
    params, key, refs, model, num_samples, cond, guidance, solver, numbers, x_init, memory, adjoint, avoid,
    *, stochastic, final, max_steps, throw,
):  # fmt: skip
    refs, avoid = None if refs is None else as_particles(refs), as_avoid(avoid)
    cond, x_init = as_arrays("cond", cond), as_arrays("x_init", x_init)
    check_call(key, refs, model, num_samples, cond, guidance, DDIM(), x_init, avoid)
    avoid = avoid if avoid is None or avoid.effective() else None
    if (refs is not None or avoid is not None) and not guidance.placement.inside:
        raise ValueError(
            f"{guidance.where} moves x after a step, but an adaptive solver may reject steps; use guided_sample, or "
            'at="denoised"'
        )
    _check_numbers(*numbers)
    check_count("max_steps", max_steps)
    memory = as_memory(memory, model, cond)
    advisor = Advisor()
    if refs is not None and memory is None:
        under_vmap = "; so under vmap too, where samples that choose their own steps cannot be joined"
        advisor.alone(num_samples, REMEMBER + under_vmap)
    if not isinstance(solver, diffrax.AbstractSolver):
        raise TypeError(f"solver is {solver!r}; give a solver from diffrax, such as diffrax.Tsit5()")
    adjoint = diffrax.RecursiveCheckpointAdjoint() if adjoint is None else adjoint
    if not isinstance(adjoint, diffrax.AbstractAdjoint):
        raise TypeError(f"adjoint is {adjoint!r}; give an adjoint from diffrax, such as diffrax.DirectAdjoint()")

    refs, guidance, model, cond, numbers, avoid = strong((refs, guidance, model, cond, numbers, avoid))
    kernel, avoid = fit(guidance, refs, avoid)
    if not is_traced((params, key, refs, cond, x_init)):
        advisor.before(guidance, kernel, refs, cond, num_samples, memory, avoid)
    arrays, choices = eqx.partition((solver, adjoint), eqx.is_array)  # what is left of a diffrax object can be hashed
    return _solve(
        params,
        key,
        refs,
        kernel,
        model,
        guidance,
        cond,
        numbers,
        x_init,
        memory,
        avoid,
        arrays,
        choices=choices,
        num_samples=num_samples,
        stochastic=stochastic,
        final=final,
        max_steps=max_steps,
        throw=throw,
    )


def _check_numbers(rtol: Any, atol: Any, t_max: Any, t_min: Any) -> None:
    if is_concrete((t_max, t_min)) and not 0 < t_min < t_max <= 1:
        raise ValueError(f"t_max {t_max} and t_min {t_min} must satisfy 0 < t_min < t_max <= 1")
    if is_concrete((rtol, atol)) and not (rtol >= 0 and atol >= 0 and rtol + atol > 0):
        raise ValueError(f"rtol {rtol} and atol {atol} must not be negative, nor both 0")


@functools.partial(jax.jit, static_argnames=("choices", "num_samples", "stochastic", "final", "max_steps", "throw"))
def _solve(
    params, key, refs, kernel, model, guidance, cond, numbers, x_init, memory, avoid, arrays,
    *, choices, num_samples, stochastic, final, max_steps, throw,
):  # fmt: skip
    solver, adjoint = eqx.combine(arrays, choices)
    model = replace(model, schedule=jax.lax.stop_gradient(model.schedule))
    rtol, atol, t_max, t_min = jax.lax.stop_gradient(numbers)
    key_init, key_steps = jax.random.split(key)
    key_leave, key_path = jax.random.split(key_steps)

    top, bottom = model.schedule(t_max), model.schedule(t_min)
    if x_init is None:
        x = _size(top) * jax.random.normal(key_init, (num_samples, *model.shape))
    else:
        x = jnp.asarray(x_init, jnp.promote_types(jnp.result_type(x_init), jnp.float32))
    bound, edges, num_jumps = None, (), 0
    if refs is not None:
        edges = jax.lax.stop_gradient(_window_on_log_snr(guidance.window, model.schedule))
        guidance = replace(guidance, window=edges)
    if avoid is not None:
        span = jax.lax.stop_gradient(_window_on_log_snr(avoid.span, model.schedule))
        avoid, edges = replace(avoid, window=span), edges + span
    if edges:
        bound = bind(guidance, kernel, refs, cond, memory, avoid=avoid)
    args = (params, model, bound, cond)

    # from log-SNR −∞ no solver can start: one DDIM step leaves it
    pure = top.alpha <= 0
    start = model.schedule(jnp.where(pure, t_max - PURE_START * (t_max - t_min), t_max))

    def leave(x):
        def denoise(x, level, state):
            return _x0_hat(args, x, level, -jnp.inf), state

        return DDIM(float(stochastic)).step(key_leave, x, (), (), denoise, top, start)[0].astype(x.dtype)

    x = jax.lax.cond(pure, leave, lambda x: x, x)

    first, last = _half_log_snr(start), _half_log_snr(bottom)
    shortest = (last - first) / BROWNIAN_CELLS
    if stochastic:
        like = jax.ShapeDtypeStruct(x.shape, x.dtype)
        path = diffrax.VirtualBrownianTree(first, last, shortest / 2, like, key_path, diffrax.SpaceTimeLevyArea)
        terms = diffrax.MultiTerm(diffrax.ODETerm(_reverse_drift), diffrax.ControlTerm(_diffusion, path))
    else:
        terms = diffrax.ODETerm(_flow)
    control: dict[str, Any] = {**SDE_CONTROL, "dtmin": shortest} if stochastic else {**ODE_CONTROL}
    controller = diffrax.PIDController(rtol, atol, norm=_worst_rms, dtmax=LONGEST_STEP, **control)
    if edges:
        jumps = jnp.stack(edges)
        inside = (jumps > first) & (jumps < last)
        num_jumps = inside.sum()
        jumps = jnp.where(inside, jumps, last + 1)  # beyond the end it is never met
        controller = diffrax.ClipStepSizeController(controller, jump_ts=jumps)
    solution = diffrax.diffeqsolve(
        terms,
        solver,
        first,
        last,
        FIRST_STEP,
        x / _size(start).astype(x.dtype),
        args,
        stepsize_controller=controller,
        adjoint=adjoint,
        max_steps=max_steps,
        throw=throw,
    )
    ys: Any = solution.ys
    x = _size(bottom).astype(x.dtype) * ys[0]
    if final:
        x = _x0_hat(args, x, bottom, last)
    if memory is not None:
        memory = memory.push(Particles(x, cond))
    num_steps, num_rejected = solution.stats["num_steps"], solution.stats["num_rejected_steps"]
    evaluations = _evaluations(solver, num_steps, num_jumps)
    if evaluations is not None:
        evaluations = evaluations + pure + int(final)
    return AdaptiveSamples(x, memory, num_steps, num_rejected, evaluations, diffrax.is_successful(solution.result))


# --- the right sides --------------------------------------------------------------------------------------------------


def _flow(lam, y, args):
    """dy/dλ = c (x̂0 − c y)."""
    c = _signal(lam)
    return (c * (_x0_hat_of(lam, y, args) - c * y)).astype(y.dtype)


def _reverse_drift(lam, y, args):
    """2c (x̂0 − c y) − s² y."""
    c, s = _signal(lam), _signal(-lam)
    return (2 * c * (_x0_hat_of(lam, y, args) - c * y) - s**2 * y).astype(y.dtype)


def _diffusion(lam, y, args):
    """√2 s, the same for every coordinate."""
    return lineax.DiagonalLinearOperator(jnp.broadcast_to((jnp.sqrt(2.0) * _signal(-lam)).astype(y.dtype), y.shape))


def _x0_hat_of(lam, y, args):
    schedule = args[1].schedule
    level = schedule(time_of_log_snr(schedule, 2 * lam))
    return _x0_hat(args, _size(level).astype(y.dtype) * y, level, lam)


def _x0_hat(args, x, level, lam):
    params, model, bound, cond = args
    x0 = model.denoise(params, x, level, cond)
    return x0 if bound is None else bound.denoised(x0, bound.init(x0), lam, level, x)[0]


def _signal(lam):
    """The c of λ, α/√(α² + σ²); s is c at −λ."""
    return jnp.sqrt(jax.nn.sigmoid(2 * lam))


def _size(level: Level) -> Array:
    """√(α² + σ²): x over y."""
    return jnp.sqrt(level.alpha**2 + level.sigma**2)


def _half_log_snr(level: Level) -> Array:
    """λ = log(α/σ)."""
    return 0.5 * level.log_snr()


def _window_on_log_snr(window: tuple[Any, Any], schedule: Schedule) -> tuple[Array, Array]:
    # read on λ itself, not on the time found from it, an edge is on the same side for guidance and solver
    start, end = window
    first = jnp.where(start > 0, _half_log_snr(schedule(1 - start)), -jnp.inf)
    return first, jnp.where(end < 1, _half_log_snr(schedule(1 - end)), jnp.inf)


def _worst_rms(scaled_error: Any) -> Array:
    """The largest RMS of a sample: hard samples must not be averaged with easy ones."""
    rows = scaled_error.reshape(scaled_error.shape[0], -1)
    return safe_sqrt(jnp.mean(rows**2, axis=1)).max()


def _evaluations(solver: Any, num_steps: Array, num_jumps: Any) -> Any:
    if not isinstance(solver, (diffrax.AbstractERK, diffrax.AbstractSRK)):
        return None
    tableau: Any = solver.tableau
    if not getattr(tableau, "fsal", False):
        return num_steps * len(tableau.b_sol)
    # the last stage is the next step's first, except over a jump
    return num_steps * (len(tableau.b_sol) - 1) + 1 + num_jumps
