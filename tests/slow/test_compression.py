"""Coresets and features: their errors are what they say, and guidance by them is guidance by the references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from mmdjax import (
    IMQ,
    RBF,
    Delta,
    DiffusionModel,
    Energy,
    Laplacian,
    Matern32,
    Matern52,
    MMDGuidance,
    Particles,
    Product,
    RationalQuadratic,
    from_model,
    guided_sample,
    mmd2,
)
from mmdjax.compression import coreset, embed, nystroem, random_features
from mmdjax.schedules import RectifiedFlow

M, D = 300, 6


@pytest.fixture(scope="module")
def refs():
    return jnp.asarray(np.random.default_rng(0).normal(size=(M, D)), jnp.float32)


@pytest.mark.parametrize("method", ["herding", "thinning"])
@pytest.mark.parametrize("kernel", [IMQ(2.0), RBF(2.0)])
def test_coreset_is_closer_than_a_sample_and_says_how_close(method, kernel, refs):
    equal = coreset(kernel, refs, 20, method=method, reweight=False)
    best = coreset(kernel, refs, 20, method=method)
    for found in (equal, best):
        np.testing.assert_allclose(found.mmd**2, mmd2(kernel, refs, found.particles), atol=1e-6)  # float32 sums near 1
    assert best.mmd <= equal.mmd + 1e-4
    drawn = np.random.default_rng(1)
    samples = [mmd2(kernel, refs, refs[drawn.choice(M, 20, replace=False)]) ** 0.5 for _ in range(5)]
    assert equal.mmd < 0.75 * min(samples)
    rows = np.asarray(best.particles.x)
    assert all((row == np.asarray(refs)).all(1).any() for row in rows)
    assert len(np.unique(rows, axis=0)) == 20


def test_coreset_of_all_is_all(refs):
    for method in ("herding", "thinning"):
        found = coreset(RBF(2.0), refs[:10], 10, method=method)
        assert found.mmd < 1e-3
        np.testing.assert_allclose(found.particles.probabilities(), 0.1, atol=1e-3)


def test_coreset_first_choice_is_the_best_single_point(refs):
    kernel = IMQ(2.0)
    found = coreset(kernel, refs[:50], 1)
    assert found.mmd**2 <= min(mmd2(kernel, refs[:50], row[None]) for row in refs[:50]) + 1e-6


def test_coreset_keeps_conditions_apart_and_leaves_out_empty_slots(refs):
    labels = jnp.arange(M) % 3
    weight = jnp.where(labels == 2, 0.0, 1.0)
    found = coreset(Product(IMQ(2.0), Delta()), Particles(refs, labels, weight), 12).particles
    assert np.bincount(found.cond, minlength=3)[2] == 0
    shares = [float(found.weight[found.cond == c].sum()) for c in (0, 1)]
    np.testing.assert_allclose(shares, 0.5, atol=0.05)  # each label's mass, which twelve points can nearly match


def values(kernel, x, y):
    """k in float64, from differences."""
    d2 = ((np.asarray(x, float)[:, None] - np.asarray(y, float)[None]) ** 2).sum(-1)
    if isinstance(kernel, Energy):
        return -np.sqrt(d2)
    return (1 + d2 / 4) ** -0.5 if isinstance(kernel, IMQ) else np.exp(-d2 / 8)


@pytest.mark.parametrize("method", ["herding", "thinning"])
@pytest.mark.parametrize("kernel", [IMQ(2.0), RBF(2.0), Energy()])
def test_weights_are_the_best(method, kernel, refs):
    """The Karush–Kuhn–Tucker conditions of the quadratic programme, and no better ones by another solver."""
    v = np.random.default_rng(5).uniform(0.2, 5.0, M)
    found = coreset(kernel, Particles(refs, weight=jnp.asarray(v, jnp.float32)), 25, method=method)
    x, w = np.asarray(found.particles.x), np.asarray(found.particles.weight, float)
    v = np.asarray(v, np.float32).astype(float)
    v /= v.sum()
    gram, mean, square = values(kernel, x, x), values(kernel, x, refs) @ v, v @ values(kernel, refs, refs) @ v

    def mmd2_of(w):
        return w @ gram @ w - 2 * w @ mean + square

    assert (w >= 0).all()
    np.testing.assert_allclose(w.sum(), 1.0, rtol=1e-6)
    slope = gram @ w - mean
    slope -= slope.min()
    assert (slope[w > 0] < 1e-6).all()  # weights are rounded to float32, and the kernel's values are near 1
    other = minimize(
        lambda w: 1e4 * mmd2_of(w),
        np.full(25, 1 / 25),
        jac=lambda w: 2e4 * (gram @ w - mean),
        method="SLSQP",
        bounds=[(0, 1)] * 25,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert mmd2_of(w) <= other.fun / 1e4 * (1 + 1e-4)
    np.testing.assert_allclose(found.mmd**2, mmd2_of(w), atol=2e-6)  # float32 sums near 1


def test_weights_are_the_best_where_they_are_hard_to_find():
    """Points side by side under a wide kernel, whose Gram is nearly singular: descent is slow there."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=(200, 2)).astype(np.float32)
    found = coreset(RBF(2.0), y, 30)
    x, w = np.asarray(found.particles.x), np.asarray(found.particles.weight, float)
    gram, mean, square = values(RBF(), x, x), values(RBF(), x, y).mean(1), values(RBF(), y, y).mean()

    def mmd2_of(w):
        return w @ gram @ w - 2 * w @ mean + square

    z = np.full(30, 1 / 30)  # Frank & Wolfe's steps with line search and away steps
    for _ in range(20_000):
        slope = gram @ z - mean
        best, worst = slope.argmin(), np.where(z > 0, slope, -np.inf).argmax()
        step = np.eye(30)[best] - np.eye(30)[worst]
        z += min(z[worst], (slope[worst] - slope[best]) / max(step @ gram @ step, 1e-300)) * step
    assert mmd2_of(w) <= mmd2_of(z) + 1e-9  # weights rounded to float32: their error squared, times some 30


@pytest.mark.parametrize("method", ["herding", "thinning"])
@pytest.mark.parametrize("reweight", [True, False])
def test_rows_of_weight_0_change_nothing(method, reweight, refs):
    y, w = refs[:40], np.random.default_rng(3).uniform(0.5, 2.0, 40).astype(np.float32)
    rows = np.random.default_rng(4).permutation(90)[:40]
    x, weight = np.full((90, D), np.nan, np.float32), np.zeros(90, np.float32)
    x[np.sort(rows)], weight[np.sort(rows)] = y, w
    plain = coreset(IMQ(2.0), Particles(y, weight=w), 10, method=method, reweight=reweight)
    padded = coreset(IMQ(2.0), Particles(x, weight=weight), 10, method=method, reweight=reweight)
    np.testing.assert_array_equal(padded.particles.x, plain.particles.x)
    np.testing.assert_allclose(padded.particles.weight, plain.particles.weight, rtol=1e-6)
    # more than there are: those that count, once
    few = Particles(x[:50], weight=weight[:50])
    count = int((weight[:50] > 0).sum())
    found = coreset(IMQ(2.0), few, 45, method=method, reweight=reweight).particles
    assert found.x.shape == (count, D)
    assert {row.tobytes() for row in np.asarray(found.x)} == {row.tobytes() for row in x[:50][weight[:50] > 0]}
    if reweight:
        order = [np.flatnonzero((np.asarray(found.x) == row).all(1))[0] for row in x[:50][weight[:50] > 0]]
        expected = weight[:50][weight[:50] > 0]
        np.testing.assert_allclose(np.asarray(found.weight)[order], expected / expected.sum(), rtol=1e-4)


@pytest.mark.parametrize("method", ["herding", "thinning"])
def test_coreset_inside_jit_has_its_size_and_weight_0_beyond_what_counts(method, refs):
    weight = jnp.where(jnp.arange(30) < 12, 1.0, 0.0)
    traced = jax.jit(lambda x, w: coreset(IMQ(2.0), Particles(x, weight=w), 20, method=method))
    found, plain = traced(refs[:30], weight), coreset(IMQ(2.0), refs[:12], 20 - 8, method=method)
    assert found.particles.x.shape == (20, D)
    np.testing.assert_array_equal(found.particles.x[:12], plain.particles.x)
    np.testing.assert_array_equal(found.particles.weight[12:], 0.0)
    np.testing.assert_allclose(found.particles.weight[:12], 1 / 12, rtol=1e-3)  # kernel values in float32


def test_thinning_keeps_what_weighs_most():
    """Greedily by the whole MMD² in float64, at each step, among references whose weights differ by 100."""
    rng = np.random.default_rng(7)
    y, v = rng.normal(size=(12, 3)).astype(np.float32), rng.choice([1.0, 10.0, 100.0], 12)
    v /= v.sum()
    gram = values(IMQ(), y, y)

    def mmd2_of(rows):
        w = np.zeros(12)
        w[rows] = v[rows] / v[rows].sum()
        return (w - v) @ gram @ (w - v)

    there = list(range(12))
    while len(there) > 4:
        there.remove(min(there, key=lambda j: mmd2_of([i for i in there if i != j])))
    found = coreset(IMQ(2.0), Particles(y, weight=jnp.asarray(v, jnp.float32)), 4, method="thinning")
    np.testing.assert_array_equal(found.particles.x, y[there])


@pytest.mark.parametrize(
    "kernel",
    [RBF(2.0), RBF((1.0, 3.0)), Laplacian(2.0), Matern32(2.0), Matern52(2.0), IMQ(2.0), RationalQuadratic(2.0, 1.5)],
)
def test_random_features_estimate_the_kernel_within_the_bound(kernel, refs):
    """All pairs at once, at a failure probability of 1e-3; the mean error is that of a mean of cosines."""
    phi = random_features(kernel, jax.random.key(0), refs, 2000)
    error = np.abs(phi.kernel()(Particles(refs), Particles(refs)) - kernel(Particles(refs), Particles(refs)))
    assert error.max() < phi.pair_bound(M * (M - 1) // 2, 1e-3)
    assert np.sqrt((error**2).mean()) < 1.5 / np.sqrt(2 * 2000)  # a cosine's variance is at most 1/2 … 1
    assert error.max() > 1e-3  # an estimate, so the test has teeth


def test_uniform_bound_solves_its_equation(refs):
    phi = random_features(RBF(2.0), jax.random.key(0), refs, 2000)
    diameter = float(jnp.sqrt(((refs[:, None] - refs[None]) ** 2).sum(-1).max()))
    e = phi.uniform_bound(diameter, 2.0, 0.05)
    assert 256 * D * (diameter / 2 / e) ** 2 * np.exp(-2000 * e**2 / (4 * (D + 2))) == pytest.approx(0.05, rel=1e-3)
    assert phi.pair_bound() < e < 2


def test_nystroem_error_bounds_the_mmd_it_loses(refs):
    kernel = RBF(3.0)
    few = coreset(kernel, refs, 40).particles
    phi = nystroem(kernel, refs, few)
    k, projected = (f(Particles(refs), Particles(refs)) for f in (kernel, phi.kernel()))
    v = np.full(M, 1 / M)
    lost = np.sqrt(max(v @ np.asarray(k - projected, float) @ v, 0.0))  # |μ − Pμ|: k − k̂ is positive semidefinite
    assert lost <= phi.error + 1e-4
    np.testing.assert_allclose(phi.error**2, np.diag(k - projected).mean(), atol=1e-5)
    assert phi.error < 0.5
    full = nystroem(kernel, refs[:30], refs[:30])
    np.testing.assert_allclose(full.kernel()(Particles(refs[:30]), Particles(refs[:30])), k[:30, :30], atol=1e-4)


@pytest.mark.parametrize("estimator", ["u", "v"])
def test_embedding_is_mmd2_and_its_gradient_under_the_features_kernel(estimator, refs):
    z = refs[:7] + 0.5
    phi = random_features(IMQ(2.0), jax.random.key(1), refs, 64)
    embedding = embed(phi, refs, estimator=estimator)

    def value(z):
        return mmd2(phi.kernel(), z, refs, estimator=estimator)

    np.testing.assert_allclose(embedding.mmd2(z), value(z), atol=1e-5)
    np.testing.assert_allclose(embedding.gradient(z), 7 * jax.grad(value)(z), atol=1e-5)


def test_guided_sampling_by_a_coreset_and_by_features():
    """Samples end where all references would have put them; unguided they do not."""
    rng = np.random.default_rng(2)
    refs = jnp.asarray(rng.normal(size=(400, 2)) * 0.3 + [2.0, 0.0], jnp.float32)
    model = DiffusionModel(from_model(lambda params, x, t, cond: params * x, "x0"), RectifiedFlow(), (2,))

    def made(refs, guidance=None):
        guidance = guidance or (MMDGuidance() if refs is None else MMDGuidance(IMQ(0.5)))
        return guided_sample(
            0.5, jax.random.key(0), refs, model=model, num_samples=64, num_steps=10, guidance=guidance
        ).x

    few = coreset(IMQ(0.5), refs, 30).particles
    full, compressed = made(refs), made(few)
    assert mmd2(Energy(), full, compressed) < 0.05 * mmd2(Energy(), full, made(None))
    phi = nystroem(IMQ(0.5), refs, few)
    by_features = made(few, MMDGuidance(phi.kernel(), precondition="none", scale=2.0))
    assert mmd2(Energy(), refs, by_features) < 0.5 * mmd2(Energy(), refs, made(None))


def test_errors_say_what_to_give(refs):
    with pytest.raises(ValueError, match="from 1 to 300"):
        coreset(RBF(1.0), refs, 301)
    with pytest.raises(ValueError, match="herding"):
        coreset(RBF(1.0), refs, 3, method="random")
    with pytest.raises(TypeError, match="spectrum"):
        random_features(Energy(), jax.random.key(0), refs, 8)
    with pytest.raises(ValueError, match="herding"):
        coreset(RBF(1.0), np.zeros((10_001, 1)), 3, method="thinning")
