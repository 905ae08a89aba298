"""Gaussian mixtures as diffusion models. The denoiser is exact, so that nothing but the guidance has an error.

For p = Σ_k π_k N(μ_k, s_k² I) and x_t = α x_0 + σ ε,

    E[x_0 | x_t] = Σ_k r_k [μ_k + g_k (x_t − α μ_k)],   g_k = α s_k² / (α² s_k² + σ²),

where r_k is the share of component k in the density of x_t.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mmdjax._core.numerics import product
from mmdjax.denoisers import DiffusionModel
from mmdjax.schedules import Level, VPLinear
from mmdjax.tree import pytree


@pytree
class Mixture:
    """Σ_k softmax(logits)_k N(means_k, exp(2 log_stds_k) I): the parameters of `mixture_denoiser`, all differentiable.

    Args:
      means: [k, d].
      log_stds: [k].
      logits: [k].

    Example:
      >>> ring = mixture([[4.0, 0.0], [-4.0, 0.0]], 0.5)
      >>> ring.log_density(jnp.array([[4.0, 0.0]])).round(3).tolist()
      [-1.145...]
    """

    means: Any
    log_stds: Any
    logits: Any

    def sample(self, key: Array, n: int) -> Float[Array, "n d"]:
        """n independent draws."""
        key_mode, key_noise = jax.random.split(key)
        mode = jax.random.categorical(key_mode, jnp.asarray(self.logits), shape=(n,))
        noise = jax.random.normal(key_noise, (n, jnp.shape(self.means)[1]))
        return jnp.asarray(self.means)[mode] + jnp.exp(jnp.asarray(self.log_stds)[mode])[:, None] * noise

    def log_density(self, x: Float[Array | np.ndarray, "n d"]) -> Float[Array, " n"]:
        """log p(x)."""
        variance = jnp.exp(2 * jnp.asarray(self.log_stds))
        return jax.nn.logsumexp(self._log_joint(jnp.asarray(x), 1.0, variance), axis=1)

    def _log_joint(self, x: Array, alpha: Any, variance: Array) -> Array:
        # log π_k N(x; α μ_k, variance_k I), [n, k]; about the mean of the means: a common offset costs no digits
        means = jnp.asarray(self.means)
        centre = jax.lax.stop_gradient(means.mean(0))
        x, means = x - alpha * centre, means - centre
        d2 = (x**2).sum(1)[:, None] + alpha**2 * (means**2).sum(1) - 2 * alpha * product(x, means.T)
        normaliser = x.shape[1] / 2 * jnp.log(2 * jnp.pi * variance)
        return jax.nn.log_softmax(jnp.asarray(self.logits)) - jnp.maximum(d2, 0) / (2 * variance) - normaliser


def mixture(means: Any, std: float) -> Mixture:
    """Gaussians of equal weight and standard deviation at `means` [k, d]."""
    means = np.asarray(means, np.float32)
    k = len(means)
    return Mixture(means, np.full(k, np.log(std), np.float32), np.zeros(k, np.float32))


def mixture_denoiser(params: Mixture, x: Float[Array, "n d"], level: Level, cond: Any = None) -> Float[Array, "n d"]:
    """E[x_0 | x_t = x] of a `Mixture`: a Denoiser whose parameters are the mixture."""
    alpha, sigma = (jnp.reshape(number, (-1, 1)) for number in (level.alpha, level.sigma))  # one, or [n] in training
    variance = jnp.exp(2 * jnp.asarray(params.log_stds))
    noisy = alpha**2 * variance + sigma**2
    share = jax.nn.softmax(params._log_joint(x, alpha, noisy), axis=1)
    gain = alpha * variance / noisy
    of_x = jnp.sum(share * gain, axis=1, keepdims=True)
    return product(share * (1 - gain * alpha), jnp.asarray(params.means)) + of_x * x


def mixture_model(d: int, schedule: Any = None) -> DiffusionModel:
    """The model of mixtures in d dimensions, whose parameters are a `Mixture`; on `VPLinear()` by default.

    Example:
      >>> from mmdjax import guided_sample
      >>> ring = mixture([[4.0, 0.0], [-4.0, 0.0]], 0.5)
      >>> guided_sample(ring, jax.random.key(0), None, model=mixture_model(2), num_samples=3, num_steps=5).x.shape
      (3, 2)
    """
    return DiffusionModel(mixture_denoiser, VPLinear() if schedule is None else schedule, (d,))
