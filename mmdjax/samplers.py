"""Samplers: one step from a level t to a less noisy level s.

A sampler is stateless; what it remembers is in its carry. The contract:

    init(x) -> carry
    step(key, x, carry, state, denoise, t, s) -> (x, carry, state)

with x [n, ...] at level t, `denoise(x, level, state) -> (x0_hat, state)` (params and condition bound, `state` passed
through every call), t and s `Level`s, and the x returned at level s. A step to the clean level (σ_s = 0) returns x̂0
without noise. Decorate your own sampler with `mmdjax.tree.pytree`, or make the object once: a sampler that is not a
pytree is compared by `==`, and another one compiles anew.

Notation: ε̂ = (x − α x̂0)/σ, and x_t given x_s is N(α_t/α_s x_s, σ_{t|s}²) with σ_{t|s}² = σ_t² − (α_t/α_s)² σ_s².
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from mmdjax._core.numerics import safe_sqrt
from mmdjax.tree import check_instance, check_number, pytree, shown, static


@runtime_checkable
class Denoise(Protocol):
    """(x, level, state) -> (x0_hat, state)."""

    def __call__(self, x: Any, level: Any, state: Any, /) -> tuple[Any, Any]: ...


@runtime_checkable
class Sampler(Protocol):
    """What `guided_sample` runs; see the top of this module."""

    def init(self, x: Any) -> Any: ...

    def step(
        self, key: Any, x: Any, carry: Any, state: Any, denoise: Denoise, t: Any, s: Any
    ) -> tuple[Any, Any, Any]: ...


@pytree
class Opaque:
    """A sampler that is not a pytree, as a static field: another one, by `==`, compiles anew."""

    sampler: Any = static()

    def init(self, x):
        """The sampler's own."""
        return self.sampler.init(x)

    def step(self, key, x, carry, state, denoise, t, s):
        """The sampler's own."""
        return self.sampler.step(key, x, carry, state, denoise, t, s)


def as_sampler(sampler: Sampler) -> Sampler:
    """A sampler that is a pytree, unchanged; any other object with `init` and `step`, wrapped in one.

    Raises:
      TypeError: a class, or something else without `init` and `step`.
    """
    check_instance("sampler", sampler)
    if not all(callable(getattr(sampler, name, None)) for name in ("init", "step")):
        raise TypeError(f"sampler is {shown(sampler)}; give one such as DDPM(), with init and step")
    return Opaque(sampler) if jax.tree_util.all_leaves([sampler]) else sampler


def take_step(sampler: Sampler, key, x, carry, state, denoise, t, s):
    """`sampler.step`, with checks of what it returns.

    Raises:
      TypeError: it does not return (x, carry, state).
      ValueError: x has another shape.
    """
    stepped = sampler.step(key, x, carry, state, denoise, t, s)
    if not (isinstance(stepped, tuple) and len(stepped) == 3 and hasattr(stepped[0], "shape")):
        raise TypeError(f"the sampler's step returned {shown(stepped)}; it must return (x, carry, state)")
    if stepped[0].shape != x.shape:
        raise ValueError(
            f"the sampler's step returned x of shape {stepped[0].shape} for x of shape {x.shape}; it must keep it"
        )
    return stepped


def added_variance(t, s):
    """σ_{t|s}² = σ_t² − (α_t/α_s)² σ_s²: the variance that the forward process adds from s to t."""
    return jnp.maximum(t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2, 0.0)


def noise_of(x, x0, level):
    """ε̂ = (x − α x̂0)/σ."""
    return (x - level.alpha * x0) / level.sigma


def noise_like(key, x, s):
    """Standard normal noise; 0 at the clean level."""
    return jnp.where(s.sigma > 0, 1.0, 0.0) * jax.random.normal(key, x.shape, x.dtype)


@pytree
class DDIM:
    """x_s = α_s x̂0 + √(σ_s² − v) ε̂ + √v z,  v = η² σ_s² σ_{t|s}² / σ_t².  Song et al. 2021a, eq. 12 and 16.

    `DDIM()` has η = 0: it is deterministic and of order 1. η = 1 is `DDPM()`, the default of `guided_sample`.

    Example:
      >>> DDIM(eta=0.0)
      DDIM(eta=0.0)
    """

    eta: Any = 0.0

    def __post_init__(self):
        check_number("eta", self.eta)

    def init(self, x):
        """No history."""
        return ()

    def step(self, key, x, carry, state, denoise, t, s):
        """One network call."""
        x0, state = denoise(x, t, state)
        v = self.eta**2 * s.sigma**2 * added_variance(t, s) / t.sigma**2
        mean = s.alpha * x0 + safe_sqrt(s.sigma**2 - v) * noise_of(x, x0, t)
        return mean + safe_sqrt(v) * noise_like(key, x, s), carry, state


@pytree
class DDPM:
    """x_s ~ N(E[x_s | x_t, x̂0], v): ancestral sampling.  Ho et al. 2020, eq. 7.

    E = (α_t/α_s) σ_s²/σ_t² x_t + α_s σ_{t|s}²/σ_t² x̂0,  v = σ_{t|s}² σ_s²/σ_t² ("small", the posterior's) or σ_{t|s}²
    ("large"). The default of `guided_sample`, written there as the equal DDIM(eta=1.0).
    """

    variance: str = static(default="small")

    def __post_init__(self):
        if self.variance not in ("small", "large"):
            raise ValueError(f'variance is {self.variance!r}; choose "small" (the posterior\'s) or "large" (β)')

    def init(self, x):
        """No history."""
        return ()

    def step(self, key, x, carry, state, denoise, t, s):
        """One network call."""
        x0, state = denoise(x, t, state)
        added = added_variance(t, s)
        mean = (t.alpha / s.alpha * s.sigma**2 * x + s.alpha * added * x0) / t.sigma**2
        v = added * s.sigma**2 / t.sigma**2 if self.variance == "small" else added
        return mean + safe_sqrt(v) * noise_like(key, x, s), carry, state


@pytree
class EulerMaruyama:
    """Euler–Maruyama on the reverse SDE of x̄ = x/α with time σ̄² = σ²/α²:  dx̄ = (x̂0 − x̄)/σ̄² |dσ̄²| + √|dσ̄²| dw.

    Song et al. 2021b, eq. 6, in the variable in which the forward process only adds noise, so that the linear part is
    exact. Weak order 1. It needs α > 0 at the start: times[0] < 1 for rectified flow.
    """

    def init(self, x):
        """No history."""
        return ()

    def step(self, key, x, carry, state, denoise, t, s):
        """One network call."""
        x0, state = denoise(x, t, state)
        added = added_variance(t, s)  # α_t² |Δσ̄²|
        drift = added / t.sigma**2 * (t.alpha * x0 - x)
        noise = safe_sqrt(added) * noise_like(key, x, s)
        return s.alpha / t.alpha * (x + drift + noise), carry, state


@pytree
class Heun:
    """The trapezoidal rule on dx = x̂0 dα + ε̂ dσ, the probability flow along a schedule.  Karras et al. 2022, alg. 1.

    x_s = x_t + (α_s − α_t)(x̂0_t + x̂0_s)/2 + (σ_s − σ_t)(ε̂_t + ε̂_s)/2, with x̂0_s and ε̂_s at a step of DDIM. For
    α = 1 it is the paper's step, for rectified flow Heun's step in t; α_t may be 0. Order 2, with two network calls a
    step, and one for the step to σ = 0.
    """

    def init(self, x):
        """No history."""
        return ()

    def step(self, key, x, carry, state, denoise, t, s):
        """Two network calls, one where s is clean."""
        x0_t, state = denoise(x, t, state)
        eps_t = noise_of(x, x0_t, t)
        euler = s.alpha * x0_t + s.sigma * eps_t

        def correct(state):
            x0_s, state = denoise(euler, s, state)
            x0, eps = 0.5 * (x0_t + x0_s), 0.5 * (eps_t + noise_of(euler, x0_s, s))
            return x + (s.alpha - t.alpha) * x0 + (s.sigma - t.sigma) * eps, state

        x, state = jax.lax.cond(s.sigma > 0, correct, lambda state: (euler, state), state)
        return x, carry, state


def no_history(x):
    """Before the first step: the last x̂0, the last h, and whether there was one."""
    return jnp.zeros_like(x), jnp.ones((), x.dtype), jnp.zeros((), bool)


def extrapolated(x0, carry, t, s):
    """D = x̂0_t + h/2h₋ (x̂0_t − x̂0₋), or x̂0_t without history or if h is infinite; e^{−h}; the new history."""
    last_x0, last_h, has_last = carry
    ratio = t.alpha * s.sigma / (s.alpha * t.sigma)  # e^{−h}; 0 where h is infinite: from α_t = 0 or to σ_s = 0
    finite = ratio > 0
    h = -jnp.log(jnp.where(finite, ratio, 1.0))
    extrapolation = jnp.where(finite & has_last, h / (2 * last_h), 0.0)
    direction = x0 + extrapolation * (x0 - last_x0)
    return direction, ratio, (x0, jnp.where(finite, h, 1.0).astype(x0.dtype), finite)


@pytree
class DPMSolverPP2M:
    """x_s = σ_s/σ_t x_t + α_s (1 − e^{−h}) D,  D = x̂0_t + h/2h₋ (x̂0_t − x̂0₋),  h = λ_s − λ_t,  λ = log(α/σ).

    Lu et al. 2022b, alg. 2; h₋ and x̂0₋ are those of the step before. Order 2 with one network call a step. The first
    step and the one to σ = 0 are of order 1 (D = x̂0_t).
    """

    def init(self, x):
        """The last x̂0, the last h, and whether there was one."""
        return no_history(x)

    def step(self, key, x, carry, state, denoise, t, s):
        """One network call."""
        x0, state = denoise(x, t, state)
        direction, ratio, carry = extrapolated(x0, carry, t, s)
        return s.sigma / t.sigma * x + s.alpha * (1 - ratio) * direction, carry, state


@pytree
class SDEDPMSolverPP2M:
    """x_s = σ_s/σ_t e^{−h} x_t + α_s (1 − e^{−2h}) D + σ_s √(1 − e^{−2h}) z,  D and h as in `DPMSolverPP2M`.

    Lu et al. 2022b, SDE-DPM-Solver++(2M), for the reverse SDE, whose linear part and noise are exact. Weak order 2 with
    one network call a step; the first step and the one to σ = 0 are `DDPM()`'s (D = x̂0_t).

    Example:
      >>> SDEDPMSolverPP2M()
      SDEDPMSolverPP2M()
    """

    def init(self, x):
        """The last x̂0, the last h, and whether there was one."""
        return no_history(x)

    def step(self, key, x, carry, state, denoise, t, s):
        """One network call."""
        x0, state = denoise(x, t, state)
        direction, ratio, carry = extrapolated(x0, carry, t, s)
        fresh = 1 - ratio**2  # 1 − e^{−2h}, the share of σ_s² that is new noise
        mean = s.sigma / t.sigma * ratio * x + s.alpha * fresh * direction
        return mean + s.sigma * safe_sqrt(fresh) * noise_like(key, x, s), carry, state
