"""`guided_sample`: the one place where model, references, guidance and sampler meet.

x ~ prior;  for t, s in the time grid:  x ← sampler.step(x, denoise, t, s), guided in x̂0 or after the step.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from mmdjax._core.modes import in_own_modes
from mmdjax._core.numerics import all_finite
from mmdjax._core.progress import Bar
from mmdjax._points.mesh import HERE, layout_of, spread_over
from mmdjax._points.particles import Particles, as_particles, widen
from mmdjax.calls import as_memory, as_times, check_call
from mmdjax.denoisers import DiffusionModel
from mmdjax.guidance import MMDGuidance
from mmdjax.guidance.advice import JOIN, REMEMBER, Advisor
from mmdjax.guidance.avoid import as_avoid
from mmdjax.guidance.bound import bind, fit
from mmdjax.guidance.wrappers import GuidedSampler
from mmdjax.memory import Memory
from mmdjax.samplers import DDIM, Sampler, as_sampler, take_step
from mmdjax.tree import as_arrays, is_concrete, is_traced, pytree, shown, strong


@pytree
class Trace:
    """What happened at each step.

    Args:
      mmd2: [num_steps] MMD² to the references after the step's shift, of x̂0 ("denoised") or x_s ("clean"), without
        what is avoided. For "sample" and "diffused", whose references are noisy, it lacks the references' own term. NaN
        without references. With a `Product` kernel it is that of the samples alone at each condition
        (`mmdjax.conditional`), which a mismatch of the conditions does not raise; NaN if no two samples, or no two
        references, share one.
      shift_norm: [num_steps] mean L2 norm of the samples' shifts, in the data's units. 0 without guidance.
      path: [num_steps, num_samples, *shape] the batch after each step, with `keep_path`; else None.
      relative_shift: [num_steps] that norm over the length of the model's own move, a mean over the samples too. Where
        x_s is moved, of the sampler's step x_s − x_t. Where x̂0 is moved, of x̂0 − x_t/α, from where a sample is to where
        the network sends it: a sampler goes the same part of both. Well below 1 the model decides, well above 1 the
        guidance. 0 without guidance.
    """

    mmd2: Float[Array, " num_steps"]
    shift_norm: Float[Array, " num_steps"]
    path: Any = None
    relative_shift: Any = None


@pytree
class Samples:
    """What `guided_sample` returns.

    Args:
      x: [num_samples, *shape], in the model's units, often [−1, 1].
      memory: the memory with these samples added, for the next call; None without memory.
      trace: MMD², and the size of the shifts, at each step.
    """

    x: Array
    memory: Memory | None
    trace: Trace


@in_own_modes
def guided_sample(
    params: Any,
    key: Array,
    refs: Any,
    *,
    model: DiffusionModel,
    num_samples: int,
    cond: Any = None,
    guidance: MMDGuidance = MMDGuidance(),
    sampler: Sampler = DDIM(eta=1.0),
    num_steps: int = 50,
    times: Any = None,
    x_init: Any = None,
    memory: int | Memory | None = None,
    progress: bool = False,
    sharding: Any = None,
    checks: bool = False,
    remat: bool = False,
    keep_path: bool = False,
    avoid: Any = None,
    axis_name: Any = None,
) -> Samples:
    """Sample a diffusion model, guided towards references by the gradient of MMD².

    The batch starts as noise at t = 1, and the sampler takes it to the clean end, t = 0. At each step the guidance
    moves all samples together, so that they take on the distribution of the references.

    The call is jitted. It compiles anew for another shape or type, another num_samples or num_steps, another choice
    (kind of kernel, `at`, kind of sampler, …), and another function or optax transformation. It compiles nothing for
    other values: of params, key, refs, cond, times, x_init, memory, and the numbers in model, guidance and sampler.
    Functions are compared by identity. So make functions, and your own classes, in a notebook cell that runs once.

    It may be called inside `jit`, `vmap` (over keys, scale, …) and `grad` (with respect to scale, bandwidth, refs,
    params, …). A bandwidth taken from the references counts as a constant there. So does what "shrunk" leaves out, the
    default with fewer than 100 references: take precondition="field" for exact gradients. Inside `jit` values cannot be
    checked: NaN in the references, or equal references and a bandwidth taken from them, give NaN samples.

    Args:
      params: the model's parameters.
      key: a typed PRNG key, `jax.random.key(seed)`.
      refs: references, an array [m, *model.shape] of floats, scaled as the model's training data was. Or Particles:
        with `cond` for guidance by labels or prompts, with `weight` for unequal weights. None: no guidance, or only
        away from what is to be avoided.
      model: a `DiffusionModel(denoiser, schedule, shape)`; `load_digits()` gives a small one with its parameters.
      num_samples: n, the size of the batch, all guided together.
      cond: the samples' conditions (labels, embeddings), a pytree of [n, ...], or None.
      guidance: an `MMDGuidance`. The default needs no tuning.
      sampler: the reverse process, of `mmdjax.samplers` or your own. The default, DDIM(eta=1.0), is the same as
        `DDPM()`. `DDIM()` is deterministic.
      num_steps: steps, uniform in t from 1 to 0.
      times: in place of num_steps: decreasing t [num_steps + 1] in [0, 1]; `mmdjax.schedules` has grids.
      x_init: x at times[0], [n, *model.shape]; None: noise. `schedules.diffuse` makes it from pictures.
      memory: for small batches: finished samples, which count as particles but do not move. A number N: a new memory of
        the last N samples. Then `samples.memory` of that call, for the next one. None: the batch alone.
      progress: show a bar, also inside `jit`. JAX's persistent compilation cache (`jax_compilation_cache_dir`) does not
        keep programs with a bar.
      sharding: `NamedSharding(mesh, PartitionSpec(axis))`: splits the batch over that axis of the mesh
        (`mmdjax.distributed` makes both). All samples are still guided together, and do not depend on the number of
        devices. Parameters and references may be split or not. References split by rows stay where they are, except
        inside your own `jit` on Auto axes, which hides how they are split.
      checks: raise if params, cond or the memory hold NaN or infinity, or at the first step whose x̂0, x, shift or mmd2
        is not finite.
      keep_path: keep x after each step as `trace.path`, for pictures; it takes the memory of num_steps batches.
      remat: recompute each step in the backward pass, so that `grad` holds the intermediates of only one step.
      avoid: samples to keep away from, an array [m, *model.shape], Particles, or an `Avoid` with a strength, a window
        or a radius. None: nothing.
      axis_name: for a call under `jax.vmap(sample_one, axis_name="batch")` or `shard_map`, that name, or a tuple of
        names: the samples of all calls along the axis are guided together, as one call with all of them would. Each
        call has a key, cond and x_init of its own; the rest is the same in all. So are the trace and the memory that
        they return, which holds the samples of all calls: with `return made.x[0], made.memory` give `vmap`
        out_axes=(0, None). Noise for the references
        ("sample") is drawn from the first call's key. In a `shard_map` with check_vma=False devices share the work of
        the guidance; with JAX's default, True, each does all of it.
    Returns:
      Samples: `x` [n, *model.shape], `memory`, and the `trace` of each step.
    Raises:
      TypeError: a key that is not typed, references that are not floats, components of the wrong type.
      ValueError: shapes that do not fit the model; references that are empty or not finite, or with a bandwidth taken
        from them all equal or only one; conditions missing on one side of a Product kernel; times that do not decrease
        in [0, 1]; a num_samples that the mesh axis does not divide; an axis_name that no `vmap` or `shard_map` has.
      FloatingPointError: with `checks`; the message names the quantity and the step.
    Warns:
      GuidanceWarning: guidance is given, but no references, or few for the samples, or some in [0, 1] or [0, 255] where
        the model makes pictures in [−1, 1]; one sample is guided alone, without axis_name and memory; a condition that
        no reference has; a scale below 0 or above 3; a kernel that reaches no reference; references that may be like
        what the model makes, and are hardly followed. Once a call, and only of one sample inside `jit`, where values
        are not seen.

    Example:
      >>> from mmdjax.denoisers import from_model
      >>> from mmdjax.schedules import RectifiedFlow
      >>> shrink = from_model(lambda params, x, t, cond: params * x, "x0")
      >>> model = DiffusionModel(shrink, RectifiedFlow(), (2,))
      >>> refs = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
      >>> guided_sample(0.5, jax.random.key(0), refs, model=model, num_samples=4, num_steps=5).x.shape
      (4, 2)

    Source: arXiv 2601.08379.
    """
    settings = {
        "model": model, "num_samples": num_samples, "cond": cond, "guidance": guidance, "sampler": sampler,
        "num_steps": num_steps, "times": times, "x_init": x_init, "memory": memory, "progress": progress,
        "sharding": sharding, "checks": checks, "remat": remat, "keep_path": keep_path, "avoid": avoid,
        "axis_name": axis_name,
    }  # fmt: skip
    return sample_with(Advisor(), params, key, refs, **settings)


def sample_with(
    advisor: Advisor | None, params, key, refs, *, model, num_samples, cond=None, guidance, sampler, num_steps,
    times=None, x_init=None, memory=None, progress=False, sharding=None, checks=False, remat=False, keep_path=False,
    avoid=None, axis_name=None,
) -> Samples:  # fmt: skip
    """`guided_sample`, whose warnings the advisor says; None: nobody says them."""
    refs, avoid = None if refs is None else as_particles(refs), as_avoid(avoid)
    cond, x_init = as_arrays("cond", cond), as_arrays("x_init", x_init)
    check_call(key, refs, model, num_samples, cond, guidance, sampler, x_init, avoid)
    num_samples = int(num_samples)
    times = as_times(as_arrays("times", times), num_steps)
    avoid = avoid if avoid is None or avoid.effective() else None  # the very program of a call without it
    if refs is None and avoid is None and advisor is not None and not _is_default(guidance):
        advisor.say("refs", "guidance does nothing without references; give refs, or leave guidance out")
    memory = as_memory(memory, model, cond)
    if checks and is_traced((params, key, refs, model, cond, guidance, sampler, times, x_init, memory, avoid)):
        raise ValueError(
            "checks=True reads values, and there are none inside jit, vmap or grad; call it outside of them"
        )

    placed = spread_over(axis_name)
    avoid_over = ()
    if not placed.calls:
        placed = layout_of(sharding, num_samples, refs, (params, cond, x_init, memory))
        avoid_over = () if avoid is None else layout_of(sharding, num_samples, avoid.points).shards.refs
        if refs is not None and memory is None and advisor is not None:
            advisor.alone(num_samples, JOIN, REMEMBER)
    elif sharding is not None:
        raise ValueError(
            f"sharding and axis_name={axis_name!r} both split the batch; give axis_name inside a shard_map or vmap of "
            "your own, and sharding elsewhere"
        )
    placed.num_calls()  # raises where there is no such axis
    params, refs, guidance, model, sampler, cond, avoid = strong(
        (params, refs, guidance, model, as_sampler(sampler), cond, avoid)
    )
    kernel, avoid = fit(guidance, refs, avoid, placed)
    if advisor is not None and not is_traced((params, key, refs, cond, x_init)):
        advisor.before(guidance, kernel, refs, cond, num_samples * placed.num_calls(), memory, avoid)
    if checks:
        held = None if memory is None else widen(memory.particles)  # empty slots may hold anything
        _raise_at_leaf({"params": params, "cond": cond, "model": model, "sampler": sampler, "memory": held})
    samples, notes = _sample(
        params,
        key,
        refs,
        kernel,
        model,
        guidance,
        sampler,
        cond,
        strong(times),
        x_init,
        memory,
        avoid,
        num_samples=num_samples,
        progress=progress,
        placed=placed,
        avoid_over=avoid_over,
        checks=checks,
        remat=remat,
        keep_path=keep_path,
    )
    if checks:
        _raise_at_first(notes, samples.trace, times)
    if advisor is not None and is_concrete(notes):
        if kernel is not None:
            advisor.reach(guidance, kernel, notes["moved"])
        if refs is not None and "part" in notes:
            advisor.part(guidance, refs, notes["part"])
        for name, points in (("refs", refs), ("avoid", avoid and avoid.points)):
            if points is not None and "low" in notes and is_concrete(points):
                advisor.range(name, points, notes["low"], notes["high"])
    return samples


def _is_default(guidance: MMDGuidance) -> bool:
    trees = guidance, MMDGuidance()
    leaves, structures = zip(*map(jax.tree.flatten, trees), strict=True)
    return structures[0] == structures[1] and (is_traced(leaves) or all(map(np.array_equal, *leaves)))


CHOICES = ("num_samples", "progress", "placed", "avoid_over", "checks", "remat", "keep_path")


@functools.partial(jax.jit, static_argnames=CHOICES)
def _sample(*operands, placed, **choices):
    batch = P(placed.shards.batch)
    x, memory, mmd2, shift_norm, path, relative, notes = placed.run(
        functools.partial(_run, placed, **choices),
        *operands,
        out=(batch, P(), P(), P(), P(None, *batch), P(), P()),
    )
    return Samples(x, memory, Trace(mmd2, shift_norm, path, relative)), notes


def _run(
    placed, params, key, refs, kernel, model, guidance, sampler, cond, times, x_init, memory, avoid,
    *, num_samples, progress, avoid_over, checks, remat, keep_path,
):  # fmt: skip
    levels = jax.vmap(model.schedule)(times)
    if not all(hasattr(levels, name) for name in ("t", "alpha", "sigma", "log_snr")):
        raise TypeError(f"the schedule returned {shown(levels)}; it must return Level(t, alpha, sigma)")
    num_steps = times.shape[0] - 1
    key_init, key_steps = jax.random.split(key)

    if x_init is None:
        first = jax.tree.map(lambda v: v[0], levels)
        noise = placed.batch(jax.random.normal(key_init, (num_samples, *model.shape)))
        x = jnp.sqrt(first.alpha**2 + first.sigma**2) * noise
    else:
        x = jnp.asarray(x_init, jnp.promote_types(jnp.result_type(x_init), levels.alpha.dtype))
    x, cond = placed.batch((x, cond))

    guided = refs is not None or avoid is not None
    if checks and (not guided or guidance.placement.moves != "x0_hat"):
        sampler = _Watched(sampler)
    if guided:
        bound = bind(guidance, kernel, refs, cond, memory, placed, avoid=avoid, avoid_over=avoid_over)
        sampler = GuidedSampler(sampler, bound, num_steps)

    # what is noted of each step: whether all is finite, and, on one device, between what x̂0 lies before it is guided
    first_notes = dict.fromkeys(("x0_hat", "x"), jnp.ones((), bool)) if checks else {}
    if guided and placed == HERE and len(model.shape) == 3:
        first_notes |= {"low": jnp.full((), jnp.inf, x.dtype), "high": jnp.full((), -jnp.inf, x.dtype)}

    def denoise(x, level, notes):
        x0 = placed.batch(model.denoise(params, placed.batch(x), level, cond))
        if checks:
            notes = notes | {"x0_hat": notes["x0_hat"] & jnp.isfinite(x0).all()}
        if "low" in notes:
            here = jax.lax.stop_gradient(x0).astype(notes["low"].dtype)
            notes = notes | {
                "low": jnp.minimum(notes["low"], here.min()),
                "high": jnp.maximum(notes["high"], here.max()),
            }
        return x0, notes

    bar = Bar(num_steps, "sampling")

    def one_step(carry, inputs):
        x, sampler_carry = carry
        index, t, s = inputs
        x, sampler_carry, notes = take_step(
            sampler, jax.random.fold_in(key_steps, index), x, sampler_carry, first_notes, denoise, t, s
        )
        x, sampler_carry = placed.rows((x, sampler_carry), num_samples)
        if progress:
            jax.debug.callback(bar, index)
        path = x if keep_path else None
        if not guided:
            trace = jnp.full((), jnp.nan), jnp.zeros(()), path, jnp.zeros(())
        else:
            state = sampler_carry.guidance
            trace, notes = (state.mmd2, state.shift_norm, path, state.relative), notes | {"moved": state.moved}
            notes |= {"part": state.part[0]} if state.part else {}
        return (x, sampler_carry), (trace, notes | {"end": jnp.isfinite(x).all()} if checks else notes)

    steps = (
        jnp.arange(num_steps),
        jax.tree.map(lambda v: v[:-1], levels),
        jax.tree.map(lambda v: v[1:], levels),
    )
    body = jax.checkpoint(one_step) if remat else one_step
    init = sampler.start if isinstance(sampler, GuidedSampler) else sampler.init
    start = x, placed.rows(init(x), num_samples)
    (x, sampler_carry), (trace, notes) = jax.lax.scan(body, start, steps)

    if memory is not None:
        made = x
        if guided:
            memory = guidance.placement.begin(memory)
            made = sampler_carry.guidance.unshifted if guidance.placement.keeps_unshifted else x
        made, of_made = placed.whole(placed.join_all((made, cond)))
        memory = memory.push(Particles(made, of_made))
    return x, memory, *trace, notes


@pytree
class _Watched:
    """A sampler that notes whether its own step, before any guidance after it, was finite."""

    sampler: Any

    def init(self, x):
        return self.sampler.init(x)

    def step(self, key, x, carry, state, denoise, t, s):
        x, carry, notes = take_step(self.sampler, key, x, carry, state, denoise, t, s)
        return x, carry, notes | {"x": jnp.isfinite(x).all()}


def _raise_at_leaf(parts: dict[str, Any]) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(parts):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) and not all_finite(leaf):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise FloatingPointError(f"{name} (shape {jnp.shape(leaf)}) is not finite, before the first step")


def _raise_at_first(finite: dict[str, Array], trace: Trace, times: Any) -> None:
    """Raise for the first step and, within it, the quantity that is computed first."""
    within = (  # in their order; all of mmd2 is NaN where there is none: without references, or without a closed form
        ("x0_hat", finite["x0_hat"]),
        ("x", finite["x"]),
        ("the guidance's shift", jnp.isfinite(trace.shift_norm)),
        ("x", finite["end"]),
        ("mmd2", jnp.isfinite(trace.mmd2) | jnp.isnan(trace.mmd2).all()),
    )
    ok = np.stack([np.asarray(flags) for _, flags in within], axis=1)
    if not ok.all():
        step, column = np.argwhere(~ok)[0]
        raise FloatingPointError(
            f"{within[column][0]} is not finite at step {step} of {len(ok)} (t = {float(np.asarray(times)[step]):.4g})"
        )
