"""Gaussian mixtures: density, samples and the exact denoiser."""

import jax
import jax.numpy as jnp
import numpy as np

from mmdjax import DDIM, guided_sample
from mmdjax.mixtures import Mixture, mixture, mixture_denoiser, mixture_model
from mmdjax.schedules import Level

MIXED = Mixture(np.array([[0.0, 0.0, 1.0], [3.0, -1.0, 0.0]]), np.log([0.5, 1.5]), np.log([0.7, 0.3]))


def test_density_and_samples():
    x = MIXED.sample(jax.random.key(0), 20_000)
    np.testing.assert_allclose(x.mean(0), 0.7 * MIXED.means[0] + 0.3 * MIXED.means[1], atol=4 * 1.8 / 20_000**0.5)
    points = np.array([[0.0, 0.0, 1.0], [1.0, 2.0, 3.0]])
    terms = [
        share * np.exp(-((points - mean) ** 2).sum(1) / (2 * s**2)) / (2 * np.pi * s**2) ** 1.5
        for share, mean, s in zip((0.7, 0.3), MIXED.means, (0.5, 1.5), strict=True)
    ]
    np.testing.assert_allclose(MIXED.log_density(points), np.log(sum(terms)), rtol=1e-5)


def test_denoiser_is_the_score_of_the_noisy_mixture():
    # Tweedie: E[x_0 | x_t] = (x_t + σ² ∇ log p_t(x_t)) / α, p_t a mixture again
    level = Level(0.5, 0.8, 0.6)
    stds = np.sqrt((level.alpha * np.array([0.5, 1.5])) ** 2 + level.sigma**2)
    noisy = Mixture(level.alpha * MIXED.means, np.log(stds), MIXED.logits)
    x = jax.random.normal(jax.random.key(1), (6, 3))
    score = jax.jit(jax.vmap(jax.grad(lambda point: noisy.log_density(point[None])[0])))(x)
    np.testing.assert_allclose(
        mixture_denoiser(MIXED, x, level), (x + level.sigma**2 * score) / level.alpha, rtol=2e-4, atol=2e-5
    )


def test_a_common_offset_moves_nothing_else():
    far = Mixture(MIXED.means + 1000.0, MIXED.log_stds, MIXED.logits)
    x, level = jax.random.normal(jax.random.key(1), (6, 3)), Level(0.5, 0.8, 0.6)
    moved = mixture_denoiser(far, x + level.alpha * 1000.0, level) - 1000.0
    np.testing.assert_allclose(moved, mixture_denoiser(MIXED, x, level), atol=2e-3)  # float32 at 1000


def test_sampling_finds_the_modes():
    ring = mixture([[4.0, 0.0], [-4.0, 0.0], [0.0, 4.0]], 0.3)
    x = guided_sample(ring, jax.random.key(0), None, model=mixture_model(2), num_samples=200, sampler=DDIM()).x
    distance = jnp.linalg.norm(x[:, None] - ring.means, axis=-1)
    assert float((distance.min(1) < 0.3 * 3.03).mean()) > 0.97  # 99% lie in that radius
    counts = np.bincount(np.asarray(distance.argmin(1)), minlength=3)
    assert (np.abs(counts - 200 / 3) < 4 * (200 * 2 / 9) ** 0.5).all()
