"""Worlds with closed forms: Gaussian data and Gaussian mixtures, whose denoiser, score and flow are known exactly.

With x_0 ~ N(μ, v) (per coordinate) and x_t = α x_0 + σ ε:

    x_t ~ N(α μ, α² v + σ²)
    E[x_0 | x_t] = μ + α v/(α² v + σ²) (x_t − α μ)
    probability flow: x_s = α_s μ + √((α_s² v + σ_s²)/(α_t² v + σ_t²)) (x_t − α_t μ)
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmdjax import Level
from mmdjax.guidance import RULES, Field
from mmdjax.guidance.sides import Sides
from mmdjax.schedules import log_snr_times
from mmdjax.tree import as_component


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gaussian:
    """x_0 ~ N(mean, var) per coordinate; both scalars or [d]. The instance is the exact denoiser."""

    mean: Any = 0.0
    var: Any = 1.0

    def moments(self, level):
        """Mean and variance of x_t."""
        return level.alpha * self.mean, level.alpha**2 * self.var + level.sigma**2

    def __call__(self, params, x, level, cond=None):
        mean, var = self.moments(level)
        return self.mean + level.alpha * self.var / var * (x - mean)

    def score(self, x, level):
        mean, var = self.moments(level)
        return (mean - x) / var

    def flow(self, x, t, s):
        """The exact probability flow from level t to level s."""
        (mean_t, var_t), (mean_s, var_s) = self.moments(t), self.moments(s)
        return mean_s + (var_s / var_t) ** 0.5 * (x - mean_t)

    def sample(self, key, n, d, level=None):
        mean, var = self.moments(Level(0.0, 1.0, 0.0) if level is None else level)
        return mean + jnp.sqrt(var) * jax.random.normal(key, (n, d))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mixture:
    """x_0 ~ Σ_k weights_k N(centres_k, std²), centres [k, d]. The instance is the exact denoiser."""

    centres: Any
    std: float
    weights: Any = None

    def log_probabilities(self):
        k = len(self.centres)
        return jnp.log(jnp.full(k, 1.0 / k) if self.weights is None else jnp.asarray(self.weights))

    def log_joint(self, x, level):
        """log p(x_t, component), [n, k], without the constant (2π)^{d/2}."""
        var = level.alpha**2 * self.std**2 + level.sigma**2
        d2 = jnp.sum((x[:, None] - level.alpha * jnp.asarray(self.centres)) ** 2, axis=-1)
        return self.log_probabilities() - 0.5 * d2 / var - 0.5 * x.shape[1] * jnp.log(var)

    def log_density(self, x, level):
        return jax.nn.logsumexp(self.log_joint(x, level), axis=1)

    def __call__(self, params, x, level, cond=None):
        centres = jnp.asarray(self.centres)
        responsibility = jax.nn.softmax(self.log_joint(x, level), axis=1)
        gain = level.alpha * self.std**2 / (level.alpha**2 * self.std**2 + level.sigma**2)
        # Σ_k r_k (c_k + gain (x − α c_k)), Σ_k r_k = 1
        return gain * x + (1 - gain * level.alpha) * responsibility @ centres

    def sample(self, key, n):
        key_component, key_noise = jax.random.split(key)
        centres = jnp.asarray(self.centres)
        component = jax.random.categorical(key_component, self.log_probabilities(), shape=(n,))
        return centres[component] + self.std * jax.random.normal(key_noise, (n, centres.shape[1]))

    def keep(self, *components):
        """The target: some of the components, equally weighted."""
        return Mixture(np.asarray(self.centres)[list(components)], self.std)


def ring(modes=8, radius=4.0, std=0.35):
    """Equal Gaussians on a circle, 2-D. Targets: `ring().keep(0, 2, 3).sample(key, n)`."""
    angle = 2 * np.pi * np.arange(modes) / modes
    return Mixture(radius * np.stack([np.cos(angle), np.sin(angle)], axis=1), std)


def noise_prediction(x, index):
    """A network's ε̂ that is not linear and depends on time; for arrays and tensors alike."""
    return 0.8 * x / (1 + 0.1 * x * x) + 0.1 - index / 5000


@jax.jit
def levels_at(schedule, times):
    """The levels of a grid: one program for all schedules of a class."""
    return jax.vmap(schedule)(times)


def run(sampler, denoiser, schedule, times, x, key=None, params=None, cond=None):
    """x at times[0] brought to times[-1], one scan: what `guided_sample` does, without guidance."""
    key = jax.random.key(0) if key is None else key
    levels = levels_at(as_component(schedule), jnp.asarray(times))
    return _run(sampler, as_component(denoiser), levels, x, key, params, cond)


@jax.jit
def _run(sampler, denoiser, levels, x, key, params, cond):
    def denoise(x, level, state):
        return denoiser(params, x, level, cond), state

    def one_step(carry, inputs):
        x, memory = carry
        index, t, s = inputs
        x, memory, _ = sampler.step(jax.random.fold_in(key, index), x, memory, (), denoise, t, s)
        return (x, memory), None

    ends = jax.tree.map(lambda v: v[:-1], levels), jax.tree.map(lambda v: v[1:], levels)
    (x, _), _ = jax.lax.scan(one_step, (x, sampler.init(x)), (jnp.arange(len(levels.t) - 1), *ends))
    return x


def flow_error(sampler, schedule, num_steps, *, world=None, t_max=1.0, t_min=1e-3):
    """RMS error between two levels against the exact flow, on a grid uniform in log-SNR. For float64."""
    world = Gaussian(mean=np.array([0.7, -1.2]), var=np.array([0.3, 2.0])) if world is None else world
    times = log_snr_times(schedule, num_steps, t_max=t_max, t_min=t_min, final=False)
    t, s = schedule(times[0]), schedule(times[-1])
    x = world.sample(jax.random.key(1), 16, 2, t)
    x_s = run(sampler, world, schedule, times, x)
    return float(jnp.sqrt(jnp.mean((x_s - world.flow(x, t, s)) ** 2)))


def order(num_steps, errors):
    """−slope of log error against log steps, by least squares."""
    return -float(np.polyfit(np.log(num_steps), np.log(errors), 1)[0])


def shift_direction(kernel, z, refs, memory=None, *, estimator="u", precondition="mass", balance=0.0):
    """P_i ∂MMD²/∂z_i / u_i by a rule; of "field" the step before the average over neighbours."""
    sides, rule = Sides(kernel, z, refs, memory, estimator), RULES[precondition]
    return rule.step(sides, balance) if type(rule) is Field else rule.direction(sides, rule.prepare(sides, None, None))


def neighbours(kernel, z, refs, memory=None, *, spread2=None):
    """The average over neighbours of "field"."""
    return Field().average(Sides(kernel, z, refs, memory), spread2)
