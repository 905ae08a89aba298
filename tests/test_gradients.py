"""Gradients through the guidance: finite wherever the value is, and those of finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import neighbours

from mmdjax import IMQ, RBF, Laplacian, Level, MMDGuidance, Particles
from mmdjax.guidance.bound import bind, fit_kernel
from mmdjax.kernels import Scaled
from mmdjax.tree import pytree

LEVEL = Level(0.5, 0.7, 0.714)


def moved(z, y, scale, bandwidth, kernel, rule):
    """A sum over x̂0 after two inner steps."""
    guidance = MMDGuidance(kernel(bandwidth), scale, precondition=rule, inner_steps=2)
    refs = Particles(y)
    bound = bind(guidance, fit_kernel(guidance, refs), refs, reused=False)
    return jnp.sum(jnp.sin(bound.denoised(z, bound.init(z), 0.5, LEVEL)[0]))


of_all = jax.jit(jax.value_and_grad(moved, argnums=(0, 1, 2, 3)), static_argnums=(4, 5))


def in_turn(*quick):
    """Every kernel with every rule, the quick ones of them where the slow ones are left out."""
    pairs = [(kernel, rule) for kernel in (RBF, Laplacian, IMQ) for rule in ("field", "mass")]
    return pytest.mark.parametrize(
        ("kernel", "rule"), [pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow) for pair in pairs]
    )


@in_turn((RBF, "field"), (Laplacian, "mass"))
def test_gradients_are_finite_where_the_value_is(kernel, rule):
    """From kernels that see nothing to wide ones; all samples near, one of them far, two of them equal, none moving."""
    z = 0.1 * jax.random.normal(jax.random.key(0), (5, 8))
    y = jax.random.normal(jax.random.key(1), (6, 8))
    for far in (0.0, 4.0, 11.0, 45.0, 1e6):
        for bandwidth in (1e-2, 0.1, 0.3, 1.0, 8.0, 1e3):
            for points in (z.at[0, 0].set(far), z.at[0].set(z[1] + far), z + far):
                value, gradients = of_all(points, y, 1.0, bandwidth, kernel, rule)
                assert bool(jnp.isfinite(value))
                assert all(bool(jnp.isfinite(g).all()) for g in gradients), (far, bandwidth, gradients)


@in_turn((RBF, "field"))
def test_gradients_are_finite_where_equal_samples_see_nothing_else(kernel, rule):
    """Of kernels so narrow that the weights of a pair outnumber all others by more than float32 holds."""
    y = jax.random.normal(jax.random.key(1), (6, 8))
    for points in (jnp.full((5, 8), 2.0), jnp.full((5, 8), 2.0).at[4].set(-1.0)):
        for bandwidth in (1e-3, 1e-4, 1e-6):
            value, gradients = of_all(points, y, 1.0, bandwidth, kernel, rule)
            assert bool(jnp.isfinite(value))
            assert all(bool(jnp.isfinite(g).all()) for g in gradients), (bandwidth, gradients)


@in_turn((RBF, "mass"))
def test_gradients_are_those_of_finite_differences(kernel, rule):
    """Also where the kernel has nearly faded: a sample 11 bandwidths away."""
    with jax.enable_x64(True):
        z = 0.5 * jax.random.normal(jax.random.key(0), (5, 3), float)
        z, y = z.at[0, 0].set(11.0), jax.random.normal(jax.random.key(1), (6, 3), float)
        along = jax.random.normal(jax.random.key(2), z.shape, float)
        _, gradients = of_all(z, y, 1.0, 1.0, kernel, rule)
        step, at = 1e-5, lambda s: of_all(z + s * along, y, 1.0, 1.0, kernel, rule)[0]
        expected = (at(step) - at(-step)) / (2 * step)
        # central differences are off by step² times a third derivative, which is some 100 at the far sample
        np.testing.assert_allclose(jnp.sum(gradients[0] * along), expected, rtol=1e-5, atol=1e-7)


@pytree
class Pointed(Scaled):
    """exp(−d/h), its weight infinite at distance 0."""

    bandwidth: float = 1.0

    def value(self, d2, h):
        return jnp.exp(-jnp.sqrt(d2) / h)

    def value_weight(self, d2, h):
        return self.value(d2, h) / (h * jnp.sqrt(d2))


def test_a_weight_that_is_infinite_at_distance_0_counts_as_the_largest_other():
    z = np.asarray(jax.random.normal(jax.random.key(0), (6, 3)), np.float64)
    y = jnp.asarray(np.concatenate([z, z + 0.1, z - 0.1]), jnp.float32)  # in reach of all, and in balance
    distance = np.linalg.norm(z[:, None] - z[None], axis=-1)
    with np.errstate(divide="ignore"):
        weight = np.exp(-distance) / distance
    np.fill_diagonal(weight, 0.0)
    np.fill_diagonal(weight, weight.max(1))
    average = np.asarray(neighbours(Pointed(), Particles(jnp.asarray(z, jnp.float32)), Particles(y)))
    off = ~np.eye(6, dtype=bool)
    share = average[off].reshape(6, 5).sum(1) / (weight / weight.sum(1, keepdims=True))[off].reshape(6, 5).sum(1)
    expected = share[:, None] * weight / weight.sum(1, keepdims=True)
    np.testing.assert_allclose(average[off], expected[off], rtol=1e-5)  # float32
    assert (share > 0.1).all()
