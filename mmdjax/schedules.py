"""Noise schedules t → Level and time grids.

A schedule says how noisy x_t is: p(x_t | x_0) = N(α_t x_0, σ_t² I) for t from 0, clean (α 1, σ 0), to 1, noisiest. It
is any callable `(t) -> Level`; those here are frozen pytrees whose numbers are leaves.

References:
  Ho et al. 2020 (linear β), Nichol & Dhariwal 2021 (cosine), Song et al. 2021 (VP and VE SDEs, eq. 29–33),
  Karras et al. 2022 (EDM, eq. 5), Lipman et al. 2023 (flow matching), Kingma et al. 2021 (log-SNR).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mmdjax._core.numerics import safe_sqrt
from mmdjax._points.particles import per_sample
from mmdjax.tree import is_concrete, pytree, static


@pytree
class Level:
    """A noise level: p(x_t | x_0) = N(alpha x_0, sigma² I). Scalars in sampling, arrays [n] in training.

    Args:
      t: time, 0 clean to 1 noisiest.
      alpha: signal scale.
      sigma: noise standard deviation, in the data's units.
    """

    t: Any
    alpha: Any
    sigma: Any

    def log_snr(self) -> Array:
        """log(α²/σ²); +∞ at the clean level, −∞ where α is 0."""
        return 2 * (jnp.log(self.alpha) - jnp.log(self.sigma))


Schedule = Callable[[Any], Level]


@pytree
class VPLinear:
    """β(t) = β_min + t (β_max − β_min), α_t² = exp(−∫β), σ_t² = 1 − α_t².  Song et al. 2021, eq. 33.

    Example:
      >>> level = VPLinear()(0.0)
      >>> float(level.alpha), float(level.sigma)
      (1.0, 0.0)
    """

    beta_min: Any = 0.1
    beta_max: Any = 20.0

    def __call__(self, t) -> Level:
        t = jnp.asarray(t, float)
        integral = t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))
        return Level(t, jnp.exp(-0.5 * integral), safe_sqrt(-jnp.expm1(-integral)))


@pytree
class Cosine:
    """α_t = cos φ_t / cos φ_0 with φ linear in t, φ_0 = πs/2(1 + s), up to α_1 = `alpha_min`.

    Nichol & Dhariwal 2021, eq. 17. The paper clips β at 0.999 near t = 1; here φ ends at α = `alpha_min`, so that
    log-SNR decreases strictly.
    """

    offset: Any = 0.008
    alpha_min: Any = 1e-3

    def __call__(self, t) -> Level:
        t = jnp.asarray(t, float)
        phi_0 = 0.5 * math.pi * self.offset / (1 + self.offset)
        whole = jnp.arccos(self.alpha_min * jnp.cos(phi_0)) - phi_0
        turn = t * whole  # φ − φ_0
        # 1 − α² = sin(φ − φ_0) sin(φ + φ_0) / cos² φ_0, without cancellation near t = 0
        sigma2 = jnp.sin(turn) * jnp.sin(turn + 2 * phi_0) / jnp.cos(phi_0) ** 2
        # cos φ from what φ lacks of π/2, where that is small
        lack = jnp.arcsin(self.alpha_min * jnp.cos(phi_0)) + (1 - t) * whole
        alpha = jnp.where(t < 0.5, jnp.cos(phi_0 + turn), jnp.sin(lack)) / jnp.cos(phi_0)
        return Level(t, alpha, safe_sqrt(sigma2))


@pytree
class VE:
    """α = 1, σ_t² = σ_min² ((σ_max/σ_min)^{2t} − 1): the VE-SDE started from clean data.  Song et al. 2021, eq. 30.

    σ in the data's units.
    """

    sigma_min: Any = 0.01
    sigma_max: Any = 50.0

    def __call__(self, t) -> Level:
        t = jnp.asarray(t, float)
        sigma2 = self.sigma_min**2 * jnp.expm1(2 * t * jnp.log(self.sigma_max / self.sigma_min))
        return Level(t, jnp.ones_like(t), safe_sqrt(sigma2))


@pytree
class EDM:
    """α = 1, σ_t = (σ_min^{1/ρ} + t (σ_max^{1/ρ} − σ_min^{1/ρ}))^ρ − (1 − t) σ_min.  Karras et al. 2022, eq. 5.

    The paper's grid ends at σ_min and then jumps to 0; the last term joins the two, so that σ_0 = 0. σ in the data's
    units.
    """

    sigma_min: Any = 0.002
    sigma_max: Any = 80.0
    rho: Any = 7.0

    def __call__(self, t) -> Level:
        t = jnp.asarray(t, float)
        root_ratio = jnp.power(self.sigma_max / self.sigma_min, 1 / self.rho)
        # the first two terms over σ_min, less 1, without cancellation near t = 0
        growth = jnp.expm1(self.rho * jnp.log1p(t * (root_ratio - 1)))
        return Level(t, jnp.ones_like(t), self.sigma_min * (growth + t))


@pytree
class RectifiedFlow:
    """α = 1 − u, σ = u with u = shift · t / (1 + (shift − 1) t).

    Lipman et al. 2023; the shift is Esser et al. 2024, eq. 23.
    """

    shift: Any = 1.0

    def __call__(self, t) -> Level:
        t = jnp.asarray(t, float)
        total = 1 + (self.shift - 1) * t
        return Level(t, (1 - t) / total, self.shift * t / total)


@pytree
class Discrete:
    """A trained table ᾱ_0 > … > ᾱ_{T−1}: index i sits at t = (i + 1)/T with α² = ᾱ_i, σ² = 1 − ᾱ_i.

    Between two indices log-SNR is linear in t. It is infinite at the clean end, so σ²/α² is linear in the first
    interval. With zero terminal SNR (ᾱ_{T−1} = 0) α²/σ² is linear in the last one.

    Args:
      alphas_cumprod: [T], decreasing, in (0, 1); the last may be 0.
      rounding: computed: the table minus its float32 values. Without it 1 − ᾱ near 1 would have three digits.
    Raises:
      ValueError: the table is not decreasing in [0, 1).

    Example:
      >>> schedule = Discrete(np.array([0.9, 0.5, 0.1]))
      >>> round(float(schedule(2 / 3).alpha) ** 2, 6)
      0.5
    """

    alphas_cumprod: Any
    rounding: Any = dataclasses.field(init=False, repr=False, compare=False, metadata={"derived": True})

    def __post_init__(self):
        rounding = np.zeros(np.shape(self.alphas_cumprod), np.float32)
        if is_concrete(self.alphas_cumprod):
            table = np.asarray(self.alphas_cumprod)
            ok = table.ndim == 1 and table.size and np.isfinite(table).all() and table[-1] >= 0 and table[0] < 1
            if not (ok and (np.diff(table) < 0).all()):
                raise ValueError(f"alphas_cumprod must be decreasing in [0, 1), shape [T]; it is {table}")
            rounding = (table.astype(np.float64) - table.astype(np.float32)).astype(np.float32)
        object.__setattr__(self, "rounding", rounding)

    def __call__(self, t) -> Level:
        t = jnp.asarray(t, float)
        table = jnp.asarray(self.alphas_cumprod)
        rest = 1 - table  # 1 − ᾱ
        if table.dtype == jnp.float32:  # float64, under `jax_enable_x64`, holds the table as it is
            rest = rest - self.rounding
        num_steps = table.shape[0]
        position = _position(t, num_steps)
        lower = jnp.clip(jnp.floor(position), 0, num_steps - 1).astype(int)
        fraction = jnp.clip(position - lower, 0.0, 1.0)
        before, ends_clean = jnp.maximum(lower - 1, 0), lower == 0
        first, first_rest, last, last_rest = table[before], rest[before], table[lower], rest[lower]
        ends_pure = last <= 0
        # odds = α²/σ²; each case computes only with numbers that are finite in it, for the gradient's sake
        odds_first = jnp.where(ends_clean, 1.0, first) / jnp.where(ends_clean, 1.0, first_rest)
        odds_last = jnp.where(ends_pure, 1.0, last) / jnp.where(ends_pure, 1.0, last_rest)
        log_linear = jnp.exp((1 - fraction) * jnp.log(odds_first) + fraction * jnp.log(odds_last))
        left = jnp.clip((1 - t) * num_steps, 0.0, 1.0)  # 1 − fraction in the last interval, not from t T near T
        signal = jnp.where(ends_clean, 1.0, jnp.where(ends_pure, left * odds_first, log_linear))
        noise = jnp.where(ends_clean, jnp.where(ends_pure, fraction, fraction / odds_last), 1.0)
        total = signal + noise
        at_first, at_last = (fraction == 0) & ~ends_clean, fraction == 1
        alpha2 = jnp.where(at_last, last, jnp.where(at_first, first, signal / total))
        sigma2 = jnp.where(at_last, last_rest, jnp.where(at_first, first_rest, noise / total))
        return Level(t, safe_sqrt(alpha2), safe_sqrt(sigma2))


def ScaledLinear(beta_start: float = 0.00085, beta_end: float = 0.012, num_train_steps: int = 1000) -> Discrete:
    """The table of latent diffusion: √β linear.  β = linspace(√beta_start, √beta_end, T)², ᾱ = Π(1 − β), in float64.

    The defaults are those of Stable Diffusion; the unconditional latent models use .0015 and .0195.

    Example:
      >>> schedule = ScaledLinear()
      >>> round(float(schedule(1.0).alpha) ** 2, 6)
      0.00466
    """
    beta = np.linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_train_steps, dtype=np.float64) ** 2
    return Discrete(np.cumprod(1 - beta))


@pytree
class DiscreteTime:
    """t → t T − 1: the index of a discrete model's table, for `from_model(time=...)`.

    Args:
      num_train_steps: T, the length of the table.
    """

    num_train_steps: int = static(default=1000)

    def __call__(self, t):
        return _position(jnp.asarray(t, float), self.num_train_steps) - 1


def _position(t, num_train_steps):
    # t T: 0 is clean, i + 1 is index i. Within rounding of an integer it is that integer: trained levels are met
    # exactly, and a network that looks its time up finds its row
    position = t * num_train_steps
    nearest = jnp.round(position)
    close = jnp.abs(position - nearest) < 4 * num_train_steps * jnp.finfo(position.dtype).eps
    return jnp.where(close & (nearest > 0), nearest, position)


def diffuse(key: Array, x0: Array, level: Level) -> Array:
    """x_t = α x_0 + σ ε, [n, ...]: clean samples with the noise of a level, such as `guided_sample(x_init=...)`.

    Example:
      >>> diffuse(jax.random.key(0), jnp.ones((2, 3)), Level(0.0, 1.0, 0.0)).tolist()
      [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    noise = jax.random.normal(key, x0.shape, x0.dtype)
    return per_sample(level.alpha, x0) * x0 + per_sample(level.sigma, x0) * noise


# Time grids: decreasing t [num_steps + 1], for guided_sample(times=...).


def uniform_times(num_steps: int, *, t_max: float = 1.0, t_min: float = 0.0) -> Float[np.ndarray, " times"]:
    """Uniform in t, the default of `guided_sample`."""
    return np.linspace(t_max, t_min, num_steps + 1)


def log_snr_times(
    schedule: Schedule, num_steps: int, *, t_max: float = 1.0, t_min: float = 1e-3, final: bool = True
) -> Float[Array, " times"]:
    """Uniform in log-SNR between t_max and t_min, then, with `final`, one last step to t = 0.

    If α(t_max) = 0, where log-SNR is infinite (rectified flow), the grid is uniform only from .999 t_max on.
    """

    def spacing(fraction, first, last):
        return first + fraction * (last - first)

    return _times(schedule, num_steps, t_max, t_min, final, spacing)


def karras_times(
    schedule: Schedule, num_steps: int, *, rho: float = 7.0, t_max: float = 1.0, t_min: float = 1e-3, final: bool = True
) -> Float[Array, " times"]:
    """(σ/α)^{1/ρ} uniform between t_max and t_min, then, with `final`, one last step to t = 0.

    Karras et al. 2022, eq. 5. Their grid ends at σ_min: t_min=time_of_log_snr(schedule, −2 log σ_min).
    """

    def spacing(fraction, first, last):
        roots = jnp.exp(-first / (2 * rho)), jnp.exp(-last / (2 * rho))
        return -2 * rho * jnp.log(roots[0] + fraction * (roots[1] - roots[0]))

    return _times(schedule, num_steps, t_max, t_min, final, spacing)


def discrete_times(
    num_train_steps: int, num_steps: int, *, spacing: str = "leading", offset: int = 0
) -> Float[np.ndarray, " times"]:
    """The grids of models of T levels: the indices i that diffusers' DDIM and DDPM visit, as t = (i + 1)/T, then 0.

    Args:
      num_train_steps: T.
      num_steps: number of network calls, at most T.
      spacing: "leading" (i = k ⌊T/N⌋), "trailing" (i = T − k T/N − 1) or "linspace" (0 … T − 1, rounded).
        Lin et al. 2024, table 2.
      offset: `steps_offset` of the scheduler's config, added to "leading" indices (1 for Stable Diffusion).
    Raises:
      ValueError: another spacing, more steps than levels, or an index outside of the table.

    Example:
      >>> (discrete_times(1000, 4, offset=1) * 1000 - 1).round().astype(int).tolist()
      [751, 501, 251, 1, -1]
    """
    if not 1 <= num_steps <= num_train_steps:
        raise ValueError(f"num_steps is {num_steps}; the table allows 1 to {num_train_steps}")
    if spacing == "leading":
        index = np.arange(num_steps)[::-1] * (num_train_steps // num_steps) + offset
    elif spacing == "trailing":
        index = np.round(np.arange(num_train_steps, 0, -num_train_steps / num_steps))[:num_steps] - 1
    elif spacing == "linspace":
        index = np.linspace(0, num_train_steps - 1, num_steps).round()[::-1]
    else:
        raise ValueError(f'spacing is {spacing!r}; choose "leading", "trailing" or "linspace"')
    if index[0] >= num_train_steps or index[-1] < 0:
        raise ValueError(f"offset {offset} leaves the table: indices {index[0]} to {index[-1]} of {num_train_steps}")
    return np.append((index + 1.0) / num_train_steps, 0.0)


def time_of_log_snr(schedule: Schedule, log_snr: Any) -> Array:
    """The t at which a schedule has this log(α²/σ²), by bisection on any decreasing schedule. Not differentiable."""
    log_snr = jax.lax.stop_gradient(jnp.asarray(log_snr, float))

    def halve(_, bounds):
        low, high = bounds
        mid = 0.5 * (low + high)
        noisier = schedule(mid).log_snr() < log_snr  # then the time sought is below mid
        return jnp.where(noisier, low, mid), jnp.where(noisier, mid, high)

    bits = jnp.finfo(log_snr.dtype).nmant + 8
    low, high = jax.lax.fori_loop(0, bits, halve, (jnp.zeros_like(log_snr), jnp.ones_like(log_snr)))
    return jax.lax.stop_gradient(0.5 * (low + high))


def _times(schedule, num_steps, t_max, t_min, final, spacing):
    if not 0 < t_min < t_max <= 1:
        raise ValueError(f"t_max {t_max} and t_min {t_min} must satisfy 0 < t_min < t_max <= 1")
    pure = not bool(jnp.isfinite(schedule(t_max).log_snr()))
    ends = [schedule(t).log_snr() for t in (0.999 * t_max if pure else t_max, t_min)]
    intervals = num_steps - int(final) - int(pure)
    if intervals < 1:
        raise ValueError(f"num_steps is {num_steps}; this grid needs at least {1 + int(final) + int(pure)}")
    inner = time_of_log_snr(schedule, spacing(jnp.linspace(0.0, 1.0, intervals + 1), *ends))
    inner = inner.at[0].set(0.999 * t_max if pure else t_max).at[-1].set(t_min)
    head, tail = ([t_max] if pure else []), ([0.0] if final else [])
    return jnp.concatenate([jnp.array(head), inner, jnp.array(tail)])
