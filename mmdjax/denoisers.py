"""What a diffusion model is: a denoiser E[x_0 | x_t], a schedule and a shape.

Every network, whatever it predicts, is used through one function

    Denoiser: (params, x [n, ...], level, cond) -> x0_hat [n, ...] = E[x_0 | x_t = x].

With x_t = α x_0 + σ ε:  eps: x̂0 = (x − σ ε̂)/α;  v = α ε − σ x_0: x̂0 = (α x − σ v̂)/(α² + σ²);  score = −ε/σ: x̂0 =
(x + σ² ŝ)/α; flow = ε − x_0: x̂0 = (x − σ û)/(α + σ).

References:
  Ho et al. 2020 (eps), Salimans & Ho 2022 (v), Lipman et al. 2023 (flow), Ho & Salimans 2022 (classifier-free
  guidance), Saharia et al. 2022, section 2.3 (dynamic thresholding).
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mmdjax._points.particles import per_sample, wide_dtype
from mmdjax.schedules import Level
from mmdjax.tree import as_component, by_value, check_function, check_number, pytree, shown, static

Denoiser = Callable[[Any, Array, Level, Any], Array]
Prediction = Literal["eps", "v", "x0", "score", "flow"]
PREDICTIONS = ("eps", "v", "x0", "score", "flow")
FORM = "(params, x, level, cond)"  # how a denoiser is called


@pytree
class FromModel:
    """The denoiser of a network; see `from_model`."""

    apply: Callable = static()
    prediction: str = static()
    time: Callable | None = static(default=None)

    def __call__(self, params, x, level, cond):
        t = level.t if self.time is None else self.time(level.t)
        output = self.apply(params, x, jnp.broadcast_to(jnp.asarray(t, wide_dtype(x)), x.shape[:1]), cond)
        return x0_from_prediction(self.prediction, x, output, level)


def from_model(apply: Callable, prediction: Prediction = "eps", time: Callable | None = None) -> FromModel:
    """A denoiser from a network and what it predicts.

    Args:
      apply: (params, x [n, ...], t [n], cond) -> [n, ...]; t is float32, or float64 if x is. Linen's `module.apply` is
        compared by the module's value, any other function by identity: make it once, as another one compiles anew.
      prediction: what the network predicts: "eps", "v" (α ε − σ x_0), "x0", "score" (∇ log p_t) or "flow" (ε − x_0).
      time: maps level.t in [0, 1] to the network's t; `DiscreteTime(T)` for a model of T levels. None: no change.
    Raises:
      ValueError: another prediction.
      TypeError: `apply` or `time` is not callable.

    Example:
      >>> denoiser = from_model(lambda params, x, t, cond: params * x, "x0")
      >>> denoiser(0.5, jnp.ones((2, 3)), Level(0.5, 0.7, 0.7), None).tolist()
      [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    """
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction is {prediction!r}; choose one of {PREDICTIONS}")
    for name, function, form in (("apply", apply, "(params, x, t, cond)"), ("time", time, "(t)")):
        if function is not None:
            if not callable(function):
                raise TypeError(f"{name} must be a function, not {type(function).__name__}")
            check_function(name, function, form)
    return FromModel(by_value(apply), prediction, None if time is None else by_value(time))


def x0_from_prediction(prediction: str, x: Array, output: Array, level: Level) -> Array:
    """x̂0 [n, ...] from a network's output, in x's dtype (at least float32): equations at the top of this module.

    Raises:
      ValueError: the output's shape is not that of x.
    """
    check_array("the network", output)
    if output.shape != x.shape:
        raise ValueError(
            f"the network returned shape {output.shape} for x of shape {x.shape}; it must return an output for each"
        )
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    x, output = x.astype(dtype), output.astype(dtype)
    alpha, sigma = per_sample(level.alpha, x), per_sample(level.sigma, x)
    match prediction:
        case "x0":
            return output
        case "eps":
            return (x - sigma * output) / _off_zero(alpha)
        case "score":
            return (x + sigma**2 * output) / _off_zero(alpha)
        case "v":
            return (alpha * x - sigma * output) / (alpha**2 + sigma**2)
        case "flow":
            return (x - sigma * output) / (alpha + sigma)
    raise ValueError(f"prediction is {prediction!r}; choose one of {PREDICTIONS}")


def prediction_from_x0(prediction: str, x: Array, x0: Array, level: Level) -> Array:
    """The inverse of `x0_from_prediction`: the output of a network whose x̂0 is x0. [n, ...]."""
    alpha, sigma = per_sample(level.alpha, x), per_sample(level.sigma, x)
    eps = (x - alpha * x0) / _off_zero(sigma)
    match prediction:
        case "x0":
            return x0
        case "eps":
            return eps
        case "score":
            return -eps / _off_zero(sigma)
        case "v":
            return alpha * eps - sigma * x0
        case "flow":
            return eps - x0
    raise ValueError(f"prediction is {prediction!r}; choose one of {PREDICTIONS}")


def score(denoiser: Denoiser, params: Any, x: Array, level: Level, cond: Any = None) -> Array:
    """∇_x log p_t(x) = (α x̂0 − x)/σ², [n, ...]. Tweedie's formula; Efron 2011."""
    return prediction_from_x0("score", x, denoiser(params, x, level, cond), level)


@pytree
class CFG:
    """Classifier-free guidance; see `cfg`. `null_cond` has one row [1, ...], so that a label stays an integer."""

    denoiser: Any
    scale: Any
    null_cond: Any

    def __call__(self, params, x, level, cond):
        n = x.shape[0]
        null = jax.tree.map(lambda c: jnp.broadcast_to(c, (n, *c.shape[1:])), self.null_cond)
        if cond is None:
            return self.denoiser(params, x, level, null)
        if jax.tree.map(lambda c: c.shape[1:], cond) != jax.tree.map(lambda c: c.shape[1:], null):
            shapes = [jax.tree.map(jnp.shape, tree) for tree in (cond, self.null_cond)]
            raise ValueError(
                f"cond has shape {shapes[0]} but null_cond {shapes[1]}; give the null_cond of one sample, no batch axis"
            )
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b.astype(a.dtype)]), cond, null)
        twice = jax.tree.map(lambda v: v if jnp.ndim(v) == 0 else jnp.concatenate([v, v]), level)
        with_cond, without = jnp.split(self.denoiser(params, jnp.concatenate([x, x]), twice, both), 2)
        return without + self.scale * (with_cond - without)


def cfg(denoiser: Denoiser, scale: Any, null_cond: Any) -> CFG:
    """Classifier-free guidance: x̂0 = x̂0(∅) + scale (x̂0(cond) − x̂0(∅)), both in one call of twice the batch.

    The rule is the same for x̂0, eps and v, as each is linear in the others at a level.  Ho & Salimans 2022, eq. 6.

    Args:
      denoiser: a conditional denoiser.
      scale: 1 is plain conditional sampling, 0 unconditional.
      null_cond: the empty condition of one sample, like one row of cond without the batch axis. With cond=None only
        this condition is used.

    Example:
      >>> toy = from_model(lambda params, x, t, cond: jnp.zeros_like(x) + cond[:, None], "x0")
      >>> guided = cfg(toy, scale=3.0, null_cond=1.0)
      >>> guided(None, jnp.zeros((1, 2)), Level(0.5, 0.7, 0.7), jnp.array([2.0])).tolist()
      [[4.0, 4.0]]
    """
    check_function("denoiser", denoiser, FORM)
    check_number("scale", scale)
    row = jax.tree.map(lambda c: (c if isinstance(c, jax.Array) else np.asarray(c))[None], null_cond)
    return CFG(as_component(denoiser), scale, row)


@pytree
class Clipped:
    """x̂0 clipped to [low, high]: a denoiser around a denoiser, for images in a fixed range. Ho et al. 2020."""

    denoiser: Any
    low: Any = -1.0
    high: Any = 1.0

    def __post_init__(self):
        check_function("denoiser", self.denoiser, FORM)
        object.__setattr__(self, "denoiser", as_component(self.denoiser))

    def __call__(self, params, x, level, cond):
        return jnp.clip(self.denoiser(params, x, level, cond), self.low, self.high)


@pytree
class Thresholded:
    """x̂0 clipped to ±s and divided by s, s = max(1, the quantile of |x̂0| of each sample).

    Saharia et al. 2022, section 2.3.
    """

    denoiser: Any
    quantile: Any = 0.995

    def __post_init__(self):
        check_function("denoiser", self.denoiser, FORM)
        object.__setattr__(self, "denoiser", as_component(self.denoiser))

    def __call__(self, params, x, level, cond):
        x0 = self.denoiser(params, x, level, cond)
        s = jnp.maximum(1.0, jnp.quantile(jnp.abs(x0).reshape(x0.shape[0], -1), self.quantile, axis=1))
        s = per_sample(s, x0)
        return jnp.clip(x0, -s, s) / s


@pytree
class DiffusionModel:
    """A pretrained diffusion model without its parameters, for `guided_sample`.

    A frozen pytree: functions, modules, prediction type and shape are static; cfg scale, null condition and schedule
    tables are leaves. `jit` may close over it or take it as an argument; new leaves in an argument compile nothing.

    Args:
      denoiser: `from_model(...)`, `cfg(...)` or any `(params, x, level, cond) -> x0_hat`.
      schedule: one of `mmdjax.schedules` or any `(t) -> Level`.
      shape: of one sample, without the batch axis.
    Raises:
      TypeError: denoiser or schedule is not callable, or shape is not made of integers.
      ValueError: shape has a size below 1.

    Example:
      >>> from mmdjax.schedules import VPLinear
      >>> model = DiffusionModel(from_model(lambda params, x, t, cond: x, "eps"), VPLinear(), (8, 8, 1))
      >>> model.shape
      (8, 8, 1)
    """

    denoiser: Any
    schedule: Any
    shape: tuple[int, ...] = static()

    def __post_init__(self):
        for name in ("denoiser", "schedule"):
            check_function(name, getattr(self, name), FORM if name == "denoiser" else "(t)")
            object.__setattr__(self, name, as_component(getattr(self, name)))
        shape: tuple[Any, ...] = tuple(self.shape) if hasattr(self.shape, "__iter__") else (self.shape,)
        if not all(hasattr(size, "__index__") for size in shape):
            raise TypeError(f"shape is {self.shape}; give the integer sizes of one sample, without the batch axis")
        if any(size < 1 for size in shape):
            raise ValueError(f"shape is {self.shape}; every size must be at least 1")
        object.__setattr__(self, "shape", tuple(int(size) for size in shape))

    def denoise(self, params: Any, x: Array, level: Level, cond: Any = None) -> Array:
        """E[x_0 | x_t = x], [n, ...], in x's dtype.

        Raises:
          ValueError: the denoiser returns another shape.
        """
        x0 = self.denoiser(params, x, level, cond)
        check_array("the denoiser", x0)
        if x0.shape != x.shape:
            raise ValueError(
                f"the denoiser returned shape {x0.shape} for x of shape {x.shape}; it must return an x0_hat for each"
            )
        return x0.astype(x.dtype)


def check_array(who: str, output: Any) -> None:
    """Raise TypeError for a model that returns something other than an array, such as a tuple with its state."""
    if not hasattr(output, "shape"):
        raise TypeError(f"{who} returned {shown(output)}; it must return one array, like x, and nothing else")


def _off_zero(x: Array) -> Array:
    # at zero terminal SNR α is 0 and eps or score say nothing of x_0: stay finite there
    return jnp.maximum(x, jnp.finfo(x.dtype).eps)
