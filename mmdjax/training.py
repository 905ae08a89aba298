"""Training a small diffusion model of one's own.

The denoising loss at noise level (α, σ), x_t = α x_0 + σ ε, is

    L = E_{t, x_0, ε}  w(α, σ) ‖x̂0(x_t) − x_0‖² / d,

and every usual loss is a choice of the weight w, all predictions being linear in x̂0 at a level:

    "x0"      1
    "eps"     α²/σ² = SNR                        ‖ε̂ − ε‖²        Ho et al. 2020, eq. 14
    "v"       (α² + σ²)²/σ², SNR + 1 for VP      ‖v̂ − v‖²        Salimans & Ho 2022, section 4
    "flow"    (α + σ)²/σ²                        ‖û − (ε − x_0)‖²  Lipman et al. 2023
    MinSNR    min(SNR, γ)                                        Hang et al. 2023, eq. 8
    EDMLoss   SNR + 1/σ_data²                                    Karras et al. 2022, table 1, over σ/α
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mmdjax._core.progress import progress_bar
from mmdjax._files.atomic import written_whole
from mmdjax._files.fingerprint import as_used, describe, differences
from mmdjax._points.particles import Particles, as_particles, check_points
from mmdjax.calls import check_key
from mmdjax.denoisers import DiffusionModel
from mmdjax.schedules import Level, diffuse
from mmdjax.tree import pytree

Weighting = Callable[[Level], Array]
SECONDS = 120  # between two checkpoints


def snr(level: Level) -> Array:
    """α²/σ², in the shape of the level's numbers; ∞ at the clean level."""
    return (jnp.asarray(level.alpha) / jnp.asarray(level.sigma)) ** 2


WEIGHTINGS: dict[str, Weighting] = {
    "x0": lambda level: jnp.ones_like(level.alpha),
    "eps": snr,
    "v": lambda level: ((level.alpha**2 + level.sigma**2) / level.sigma) ** 2,
    "flow": lambda level: ((level.alpha + level.sigma) / level.sigma) ** 2,
}


@pytree
class MinSNR:
    """w = min(SNR, γ): the eps loss without its emphasis on the nearly clean levels.  Hang et al. 2023, eq. 8.

    Example:
      >>> MinSNR(5.0)(Level(0.5, jnp.array([0.6, 1.0]), jnp.array([0.8, 0.1]))).tolist()
      [0.5625, 5.0]
    """

    gamma: Any = 5.0

    def __call__(self, level: Level) -> Array:
        return jnp.minimum(snr(level), self.gamma)


@pytree
class EDMLoss:
    """w = (s² + σ_data²)/(s σ_data)² with s = σ/α, which is σ when α = 1.  Karras et al. 2022, table 1.

    Only the weight: the paper also draws log σ from a normal, which is `denoising_loss(times=...)` here.

    Args:
      sigma_data: standard deviation of the data, in its units.
    """

    sigma_data: Any = 0.5

    def __call__(self, level: Level) -> Array:
        return snr(level) + 1 / self.sigma_data**2


@pytree
class UniformTimes:
    """t_i = t_min + (1 − t_min) (i + u) / n mod 1, one u a batch: uniform on [t_min, 1], evenly spread over the batch.

    Kingma et al. 2021, appendix I.1.  t_min keeps SNR finite.
    """

    t_min: Any = 1e-3

    def __call__(self, key: Array, n: int) -> Float[Array, " n"]:
        u = (jnp.arange(n) / n + jax.random.uniform(key)) % 1
        return self.t_min + (1 - self.t_min) * u


def denoising_loss(
    params: Any,
    key: Array,
    x0: Array,
    cond: Any = None,
    *,
    model: DiffusionModel,
    weighting: str | Weighting = "v",
    times: Callable[[Array, int], Array] | None = None,
    null_cond: Any = None,
    drop_cond: float = 0.0,
) -> Float[Array, ""]:
    """E w(α, σ) ‖x̂0(α x_0 + σ ε) − x_0‖² / d over a batch, one time and one noise a sample. Differentiable in params.

    Args:
      params: the denoiser's parameters.
      key: a typed PRNG key.
      x0: clean samples [n, *model.shape].
      cond: a pytree of [n, ...], or None.
      model: any denoiser and schedule; the schedule is called with t [n].
      weighting: the prediction whose squared error is averaged ("eps", "x0", "v", "flow"), or a function of the Level,
        [n], such as `MinSNR(5.0)` or `EDMLoss(0.5)`. It need not be what the network predicts.
      times: (key, n) -> t [n] in (0, 1]; default `UniformTimes()`.
      null_cond: the empty condition of one sample (no batch axis), of cond's structure.
      drop_cond: probability that a sample's cond becomes null_cond, for classifier-free guidance.  Ho & Salimans 2022.
    Returns:
      Scalar.
    Raises:
      ValueError: x0 does not have the model's shape, another weighting, a probability outside [0, 1], or dropping
        without cond and null_cond.

    Example:
      >>> from mmdjax import from_model
      >>> from mmdjax.schedules import VPLinear
      >>> model = DiffusionModel(from_model(lambda params, x, t, cond: params * x, "x0"), VPLinear(), (2,))
      >>> float(denoising_loss(0.0, jax.random.key(0), jnp.full((8, 2), 3.0), model=model, weighting="x0"))
      9.0
    """
    weight = _as_weighting(weighting)
    _check_batch(x0, cond, model, null_cond, drop_cond)
    n = x0.shape[0]
    key_t, key_eps, key_drop = jax.random.split(key, 3)
    level = jax.vmap(model.schedule)((UniformTimes() if times is None else times)(key_t, n))
    if drop_cond:
        cond = _dropped(key_drop, cond, null_cond, drop_cond, n)
    x0_hat = model.denoiser(params, diffuse(key_eps, x0, level), level, cond)
    error = jnp.mean((x0_hat - x0).reshape(n, -1) ** 2, axis=1)
    return jnp.mean(weight(level) * error)


class Fitted(NamedTuple):
    """What `fit` returns.

    Args:
      params: after the last step.
      ema_params: their exponential moving average, the ones to sample with.
      losses: [num_steps].
    """

    params: Any
    ema_params: Any
    losses: Float[np.ndarray, " num_steps"]


def fit(
    params: Any,
    key: Array,
    data: Any,
    *,
    model: DiffusionModel,
    num_steps: int,
    optimizer: Any = None,
    batch_size: int = 128,
    ema: float = 0.999,
    weighting: str | Weighting = "v",
    times: Callable[[Array, int], Array] | None = None,
    null_cond: Any = None,
    drop_cond: float = 0.0,
    augment: Callable[[Array, Particles], Particles] | None = None,
    chunk: int = 100,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Fitted:
    """Minimise `denoising_loss` over minibatches drawn with replacement, `chunk` steps to a compiled call.

    Step k draws from fold_in(key, k), so the first steps of a longer run are those of a shorter one. The average is
    ema_k = ema · ema_{k−1} + (1 − ema) params_k from ema_0 = params_0: let num_steps be several times 1/(1 − ema).

    Args:
      params: a pytree of float arrays to start from.
      key: a typed PRNG key.
      data: an array [m, *model.shape], or Particles, with cond to condition on and weight to draw by.
      model: what is trained.
      num_steps: optimizer steps.
      optimizer: an `optax.GradientTransformation`; default Adam at 1e-3 with the gradient's norm clipped to 1.
      batch_size: samples a step; more than m is fine.
      ema: decay of the average, in [0, 1); 0 is no average.
      weighting, times, null_cond, drop_cond: as for `denoising_loss`.
      augment: (key, batch: Particles) -> Particles, inside jit; may change x and cond.
      chunk: steps a compiled call; the bar moves once a call. Give 1 for convolutions on a CPU: inside a loop XLA
        computes the gradients of their weights tens of times slower.
      checkpoint: a file to keep the training in, written every two minutes and at the end. If the training stops,
        repeat the call to resume it from there: the result is that of a training that never stopped, bit for bit on the
        same devices. With more steps the call trains on. A call with other settings fails and lists the differences.
      progress: show a bar.
    Returns:
      Fitted(params, ema_params, losses), a named tuple.
    Raises:
      FileExistsError: `checkpoint` is of a training with other settings, or not one at all.
      TypeError: data that are not floats, a key that is not typed.
      ValueError: data that do not fit the model or are not finite, numbers out of range, params without float arrays.
      FloatingPointError: the loss is not finite, naming the step.

    Example:
      >>> import optax
      >>> from mmdjax import from_model
      >>> from mmdjax.schedules import RectifiedFlow
      >>> model = DiffusionModel(from_model(lambda params, x, t, cond: params + 0 * x, "x0"), RectifiedFlow(), (1,))
      >>> data = jnp.full((16, 1), 2.0)  # one point: x̂0 is that point at every level
      >>> fitted = fit(jnp.zeros(()), jax.random.key(0), data, model=model, num_steps=300, weighting="x0",
      ...     optimizer=optax.adam(0.05), progress=False)
      >>> round(float(fitted.params), 2)
      2.0
    """
    import optax

    data = as_particles(data)
    _check_fit(params, key, data, model, num_steps=num_steps, batch_size=batch_size, chunk=chunk, ema=ema)
    _as_weighting(weighting)
    _check_batch(data.x, data.cond, model, null_cond, drop_cond)
    if optimizer is None:
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    settings = {"weighting": weighting, "times": times, "null_cond": null_cond, "drop_cond": drop_cond}

    def one_step(carry, key, data, model):
        params, average, state = carry
        key_batch, key_augment, key_loss = jax.random.split(key, 3)
        batch = _draw(key_batch, data, batch_size)
        batch = batch if augment is None else augment(key_augment, batch)
        loss, gradient = jax.value_and_grad(denoising_loss)(
            params, key_loss, batch.x, batch.cond, model=model, **settings
        )
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, optax.incremental_update(params, average, 1 - ema), state), loss

    @jax.jit
    def steps(carry, indices, key, data, model):
        def step(carry, i):
            return one_step(carry, jax.random.fold_in(key, i), data, model)

        if len(indices) > 1:
            return jax.lax.scan(step, carry, indices)
        carry, loss = step(carry, indices[0])  # no loop, see `chunk`
        return carry, loss[None]

    saved = None
    if checkpoint is not None:
        told = {"params": params, "key": jax.random.key_data(key), "data": data, "model": model, "optimizer": optimizer}
        told |= {"batch_size": batch_size, "ema": ema, "augment": augment, **settings}
        saved = _Saved(Path(checkpoint), told)
    params = jax.tree.map(jnp.asarray, params)
    carry, losses = (params, params, optimizer.init(params)), [np.zeros(0, np.float32)]
    if saved is not None:
        carry, losses = saved.resume(carry, losses)
    first = len(losses[0])
    if first > num_steps:
        raise FileExistsError(f"{checkpoint} has {first} steps, num_steps is {num_steps}; give at least {first}")
    with progress_bar(total=num_steps, initial=first, desc="training", disable=not progress) as bar:
        for start in range(first, num_steps, chunk):
            indices = jnp.arange(start, min(start + chunk, num_steps))
            carry, loss = steps(carry, indices, key, data, model)
            losses.append(np.asarray(loss))
            if not np.isfinite(losses[-1]).all():
                step = start + int(np.argmin(np.isfinite(losses[-1])))
                raise FloatingPointError(
                    f"the loss is {losses[-1][step - start]} at step {step}; lower the learning rate or clip"
                )
            bar.update(len(loss))
            bar.set_postfix(loss=f"{losses[-1].mean():.4f}")
            if saved is not None:
                saved.keep(carry, losses, last=start + chunk >= num_steps)
    return Fitted(carry[0], carry[1], np.concatenate(losses))


class _Saved:
    """A training in a safetensors file: the leaves of the carry by number, the losses, the settings in the metadata."""

    def __init__(self, path: Path, told: dict[str, Any]):
        self.path, self.written = path, time.monotonic()
        self.told = {name: describe(as_used(value)) for name, value in told.items()}

    def resume(self, carry: Any, losses: list) -> tuple[Any, list]:
        """What the file holds, in place of the beginning that is given; that beginning where there is no file."""
        from safetensors import SafetensorError, safe_open

        if not self.path.exists():
            return carry, losses
        try:
            with safe_open(self.path, "numpy") as file:
                told = json.loads((file.metadata() or {}).get("training", "null"))
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
        except (SafetensorError, ValueError):
            told = None
        if told is None:
            raise FileExistsError(f"{self.path} holds no training of mmdjax; remove it, or give another checkpoint")
        if changed := differences(told, self.told):
            raise FileExistsError(
                f"{self.path} is of another training: {'; '.join(changed)}; repeat its call or give another file"
            )
        leaves, structure = jax.tree.flatten(carry)
        return structure.unflatten([jnp.asarray(arrays[str(i)]) for i in range(len(leaves))]), [arrays["losses"]]

    def keep(self, carry: Any, losses: list, *, last: bool) -> None:
        """Write the file if it is time to."""
        from safetensors.numpy import save_file

        if not last and time.monotonic() - self.written < SECONDS:
            return
        arrays = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(carry))}
        with written_whole(self.path) as partial:
            save_file(arrays | {"losses": np.concatenate(losses)}, partial, {"training": json.dumps(self.told)})
        self.written = time.monotonic()


def _as_weighting(weighting: str | Weighting) -> Weighting:
    if not isinstance(weighting, str):
        return weighting
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting is {weighting!r}; choose of {tuple(WEIGHTINGS)}, or give a function of the Level")
    return WEIGHTINGS[weighting]


def _dropped(key, cond, null_cond, probability, n):
    drop = jax.random.bernoulli(key, probability, (n,))

    def leaf(c, null):
        return jnp.where(drop.reshape((n,) + (1,) * (jnp.ndim(c) - 1)), jnp.asarray(null, jnp.result_type(c)), c)

    return jax.tree.map(leaf, cond, null_cond)


def _draw(key, data, batch_size):
    if data.weight is None:
        rows = jax.random.randint(key, (batch_size,), 0, data.n)
    else:
        rows = jax.random.choice(key, data.n, (batch_size,), p=data.probabilities())
    return Particles(*jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], (data.x, data.cond)))


def _check_batch(x0, cond, model, null_cond, drop_cond):
    if np.ndim(x0) == 0 or np.shape(x0)[1:] != model.shape:
        raise ValueError(
            f"data has shape {np.shape(x0)} but the model is of shape {model.shape}; give [n, {model.shape}]"
        )
    for leaf in jax.tree.leaves(cond):
        if np.shape(leaf)[:1] != np.shape(x0)[:1]:
            raise ValueError(
                f"cond has shape {np.shape(leaf)}; it needs one row for each of the {np.shape(x0)[0]} samples"
            )
    if not 0 <= drop_cond <= 1:
        raise ValueError(f"drop_cond is {drop_cond}; it is a probability, in [0, 1]")
    if drop_cond and (cond is None or jax.tree.structure(cond) != jax.tree.structure(null_cond)):
        raise ValueError(
            f"drop_cond is {drop_cond}, which replaces cond by null_cond, but cond is {_kind(cond)} and null_cond "
            f"{_kind(null_cond)}; give both of one structure, or drop_cond=0"
        )


def _kind(tree):
    return "None" if tree is None else str(jax.tree.structure(tree))


def _check_fit(params, key, data, model, *, ema, **counts):
    check_key(key)
    check_points("data", data, floats=True)
    for name, value in counts.items():
        if not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"{name} is {value}; give an integer of at least 1")
    if not 0 <= ema < 1:
        raise ValueError(f"ema is {ema}; give a decay in [0, 1), such as 0.999")
    leaves = jax.tree.leaves(params)
    if not leaves or not all(jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves):
        raise ValueError(
            f"params must be a pytree of float arrays; the dtypes are {[str(jnp.result_type(v)) for v in leaves[:5]]}"
        )
