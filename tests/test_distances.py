"""Distances and kernels in float32 against float64, where matrix products cancel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdjax import IMQ, RBF, Cosine, Energy, Laplacian, Particles, Polynomial, RationalQuadratic, mmd2
from mmdjax._points.distances import (
    SUBSET,
    middle,
    nearest_distance,
    neighbour_distance,
    pairwise_median,
    spread2,
    squared_distance,
    subset,
    with_derivative,
)

LARGE = 65_536
BLOCK = 2**22 // LARGE  # pairs that the recomputation takes at a time


def exact(x, y):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return np.stack([((row - y) ** 2).sum(1) for row in x])


def near_pairs(relative, n=6, m=5, d=LARGE, offset=0.0, seed=0):
    """x, y of norm √d about `offset`, |x_i − y_i| = relative · √d; the other pairs are √2d apart."""
    rng = np.random.default_rng(seed)
    y = rng.normal(size=(m, d))
    x = rng.normal(size=(n, d))
    k = min(n, m)
    x[:k] = y[:k] + relative * rng.normal(size=(k, d))
    return (x + offset).astype(np.float32), (y + offset).astype(np.float32)


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("relative", [1e-1, 4e-2, 2e-2, 1e-2, 1e-3])  # both sides of the threshold √(2e-3) = .045
def test_distance_at_every_scale(relative, offset):
    x, y = near_pairs(relative, offset=offset)
    d2 = squared_distance(jnp.asarray(x), jnp.asarray(y), accurate=True)
    np.testing.assert_allclose(d2, exact(x, y), rtol=1e-3)  # float32 products: 1e-6 of the norm² over 1e-3 of it


def test_matrix_products_alone_would_not_do():
    x, y = near_pairs(1e-3)
    d2 = squared_distance(jnp.asarray(x), jnp.asarray(y))
    assert np.abs(np.diag(d2[:5]) / np.diag(exact(x, y)[:5]) - 1).max() > 0.01  # so the test above has teeth


H = 1e-3 * LARGE**0.5  # a bandwidth of the size of the closest pairs
GRAMS = [  # float64 Gram from distances; tolerance: the contract's, the kernels that see short distances and the others
    (RBF(LARGE**0.5), lambda d2: np.exp(-d2 / (2 * LARGE)), 1e-4),
    (RationalQuadratic(LARGE**0.5, 2.0), lambda d2: (1 + d2 / (4 * LARGE)) ** -2.0, 1e-4),
    (Energy(), lambda d2: -np.sqrt(d2), 1e-2),
    (Laplacian(H), lambda d2: np.exp(-np.sqrt(d2) / H), 1e-2),
    (IMQ(H), lambda d2: (1 + d2 / H**2) ** -0.5, 1e-2),
    (RBF(H), lambda d2: np.exp(-d2 / (2 * H**2)), 1e-2),
    (RationalQuadratic(H), lambda d2: 1 / (1 + d2 / (2 * H**2)), 1e-2),
]
each_gram = pytest.mark.parametrize(
    ("kernel", "profile", "rtol"), GRAMS, ids=lambda v: getattr(type(v), "__name__", "")
)


@each_gram
@pytest.mark.parametrize("relative", [3e-3, 1e-3])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_gram_in_65536_dimensions(kernel, profile, rtol, relative, offset):
    x, y = near_pairs(relative, offset=offset)
    gram = kernel(Particles(x), Particles(y))
    np.testing.assert_allclose(gram, profile(exact(x, y)), rtol=rtol, atol=1e-30)  # far pairs of a narrow kernel: 0


def test_median_bandwidth_rbf_in_65536_dimensions():
    x, y = near_pairs(1.0)
    kernel = RBF().fit(Particles(y))
    h = np.median(np.sqrt(exact(y, y))[np.triu_indices(5, 1)])
    np.testing.assert_allclose(kernel.bandwidth, h, rtol=1e-6)
    np.testing.assert_allclose(kernel(Particles(x), Particles(y)), np.exp(-exact(x, y) / (2 * h**2)), rtol=1e-4)


def test_inner_product_kernels_in_65536_dimensions():
    x, y = near_pairs(1e-3)
    inner = x.astype(float) @ y.T.astype(float)
    np.testing.assert_allclose(Polynomial()(Particles(x), Particles(y)), (inner / LARGE + 1) ** 3, rtol=1e-4)
    cosine = inner / np.linalg.norm(x.astype(float), axis=1)[:, None] / np.linalg.norm(y.astype(float), axis=1)
    np.testing.assert_allclose(Cosine()(Particles(x), Particles(y)), cosine, atol=1e-6)  # of 1, a cosine's scale


@each_gram
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_gradient_in_65536_dimensions(kernel, profile, rtol, offset):
    x, y = near_pairs(1e-3, offset=offset)
    coef = np.linspace(0.5, 1.5, 5)
    with jax.enable_x64(True):
        weight = kernel.weight(jnp.asarray(exact(x, y)))
    pull = coef * np.asarray(weight)
    expected = np.stack([p @ (y.astype(float) - row) for p, row in zip(pull, x.astype(float), strict=True)])
    gradient, mass = kernel.gradient(Particles(x), Particles(y), jnp.asarray(coef, jnp.float32), precondition="mass")
    size = np.linalg.norm(expected, axis=1)
    assert (np.linalg.norm(gradient - expected, axis=1) <= rtol * size + 1e-30).all()
    np.testing.assert_allclose(mass, pull.sum(1), rtol=2 * rtol, atol=1e-30)
    by_gram = jax.grad(lambda x: (coef * kernel(Particles(x), Particles(y))).sum())(jnp.asarray(x))
    assert (np.linalg.norm(by_gram - expected, axis=1) <= rtol * size + 1e-30).all()


def test_narrow_kernels_see_clusters_that_lie_far_apart():
    # two clusters of spread 1 at a distance of 1000: the norm is 1000 times the bandwidth
    rng = np.random.default_rng(0)
    y = rng.normal(size=(20, 16)) / 4 + 1000 * (np.arange(20) < 10)[:, None] * np.eye(16)[0]
    y = y.astype(np.float32)
    x = (y + rng.normal(size=y.shape) / 10).astype(np.float32)
    d2 = exact(x, y)
    for kernel, gram in ((RBF(0.5), np.exp(-2 * d2)), (RationalQuadratic(0.5), 1 / (1 + 2 * d2))):
        np.testing.assert_allclose(kernel(Particles(x), Particles(y)), gram, atol=1e-3)  # inputs round at 1000 · 6e-8


# --- the recomputation --------------------------------------------------------------------------------------------


def cluster(n, m, seed=0, d=LARGE):
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=d)
    x, y = (centre + 1e-3 * rng.normal(size=(k, d)) for k in (n, m))
    y[-1] = -centre  # so that the mean is not the cluster's
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)


@pytest.mark.parametrize(("n", "m"), [(12, 11), (5, 14), (1, 2)])
def test_more_close_pairs_than_a_block(n, m):
    x, y = cluster(n, m)
    assert (n, m) == (1, 2) or n * (m - 1) > BLOCK or m == 14
    d2 = jax.jit(lambda x, y: squared_distance(x, y, accurate=True))(x, y)
    np.testing.assert_allclose(d2, exact(x, y), rtol=1e-4)  # differences of float32 numbers near 1, relative 1e-3


def test_close_pairs_among_the_same_points():
    _, y = cluster(1, 13)
    d2 = squared_distance(y, y, same=True, accurate=True)
    assert np.diag(d2).tolist() == [0.0] * 13
    np.testing.assert_allclose(d2, exact(y, y), rtol=1e-4)
    np.testing.assert_array_equal(squared_distance(y, y, same=True).diagonal(), np.zeros(13))


def test_recomputation_under_vmap():
    x, y = (jnp.stack(v) for v in zip(cluster(12, 11, 0), cluster(12, 11, 1), strict=True))
    x = x.at[1].multiply(2.0)  # the second has no close pair
    d2 = jax.vmap(lambda x, y: squared_distance(x, y, accurate=True))(x, y)
    for i in range(2):
        np.testing.assert_allclose(d2[i], exact(x[i], y[i]), rtol=1e-4)


@pytest.mark.slow
def test_derivatives_of_the_recomputation():
    x, y = cluster(7, 6, d=64)

    def total(x):
        return jnp.sum(jnp.sqrt(1 + squared_distance(x, y, accurate=True)))

    def reference(x):
        return jnp.sum(jnp.sqrt(1 + ((x[:, None] - y[None]) ** 2).sum(-1)))

    v = jax.random.normal(jax.random.key(0), x.shape)
    for derivative in (jax.grad, lambda f: jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), v))):
        expected = jax.jit(derivative(reference))(x)
        np.testing.assert_allclose(jax.jit(derivative(total))(x), expected, atol=1e-5 * jnp.abs(expected).max())
    swept = jax.jit(jax.vmap(jax.grad(total)))(jnp.stack([x, x + 1]))
    np.testing.assert_allclose(swept[0], jax.grad(reference)(x), atol=1e-5)
    forward = jax.jvp(total, (x,), (v,))[1]
    np.testing.assert_allclose(forward, jnp.vdot(jax.grad(reference)(x), v), rtol=1e-4)


@pytest.mark.parametrize("d", [3, 40])
@pytest.mark.parametrize("accurate", [False, True])
def test_distance_is_never_negative_and_its_derivative_is_right_at_the_clip(d, accurate):
    y = jax.random.normal(jax.random.key(0), (30, d)) + 10
    x = y * (1 + 1e-7)
    d2 = squared_distance(x, y, accurate=accurate)
    assert (d2 >= 0).all()
    jacobian = jax.jacobian(lambda x: squared_distance(x, y, accurate=accurate).diagonal())(x)
    expected = 2 * (x - y)
    own = jacobian[jnp.arange(30), jnp.arange(30)]
    np.testing.assert_allclose(own, expected, atol=1e-5)  # float32 rounding of 2x − 2y about the mean


def test_few_dimensions_lose_nothing_to_a_far_point():
    """About the mean, 5e7, float32 would see neither 0.5 nor 0.25."""
    x, y = jnp.array([[0.5], [0.25]]), jnp.array([[0.0], [1e8]])
    assert squared_distance(x, y)[:, 0].tolist() == [0.25, 0.0625]
    _, mass = RBF(0.25).gradient(Particles(x), Particles(y), jnp.ones(2), precondition="mass")
    np.testing.assert_allclose(mass, 16 * np.exp([-2.0, -0.5]), rtol=1e-5)


def test_integer_distances_are_exact():
    x = np.random.default_rng(0).integers(-8, 9, (8, 7)).astype(np.float32)
    for accurate in (False, True):
        d2 = squared_distance(jnp.asarray(x[:5]), jnp.asarray(x), accurate=accurate)
        np.testing.assert_array_equal(d2, exact(x[:5], x))


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("far", [0.0, 1e4, 1e8])  # in spreads, of one reference in eight
@pytest.mark.parametrize("relative", [1e-2, 1e-5])
def test_points_far_from_all_others_cost_these_no_digits(offset, far, relative):
    rng = np.random.default_rng(0)
    y = rng.normal(size=(40, 50))
    x = y[:20] + relative * rng.normal(size=(20, 50))
    y[::8] += far * rng.normal(size=(5, 50))
    x, y = (x + offset).astype(np.float32), (y + offset).astype(np.float32)
    others, close = np.arange(40) % 8 > 0, np.eye(20, 40, dtype=bool)
    error = np.abs(squared_distance(jnp.asarray(x), jnp.asarray(y), accurate=True) - exact(x, y))
    pairs = close & others & (exact(x, y) > 0)  # about 1e4, points 1e-5 apart are the same in float32
    assert (error[pairs] <= 1e-6 * exact(x, y)[pairs]).all()  # rounding of squares and of a sum of 50
    assert (error[close & others & ~pairs] == 0).all()
    apart = ~close & others
    assert (error[apart] <= 4e-6 * exact(x, y)[apart]).all()  # products of numbers of the size of the spread
    if offset:
        return
    coef = np.linspace(0.5, 1.5, 40) * others
    pull = coef * (1 + exact(x, y) / 0.01**2) ** -1.5 / 0.01**2
    expected = np.stack([p @ (y.astype(float) - row) for p, row in zip(pull, x.astype(float), strict=True)])
    gradient, mass = IMQ(0.01).gradient(Particles(x), Particles(y), jnp.asarray(coef, jnp.float32), precondition="mass")
    np.testing.assert_allclose(mass[others[:20]], pull.sum(1)[others[:20]], rtol=1e-5)
    rounding = 1e-6 * pull.sum(1) * np.sqrt(50)  # of points about their middle, times what pulls at them
    assert (np.linalg.norm(gradient - expected, axis=1) <= rounding)[others[:20]].all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_close_pairs_of_half_precision_references(dtype):
    rng = np.random.default_rng(0)
    y = jnp.asarray(10 + rng.normal(size=(20, 50)), dtype)
    x = np.asarray(y, np.float32) + 1e-3 * rng.normal(size=(20, 50)).astype(np.float32)
    d2 = squared_distance(jnp.asarray(x), y, accurate=True)
    np.testing.assert_allclose(np.diag(d2), np.diag(exact(x, np.asarray(y, np.float32))), rtol=1e-6)


def test_a_detached_value_keeps_its_digits_and_takes_another_derivative():
    value, slope = jax.jvp(lambda v: with_derivative(jnp.float32(1e-9), v**2), (jnp.float32(3.0),), (jnp.float32(1.0),))
    assert (value, slope) == (np.float32(1e-9), 6.0)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 100])
def test_middle_is_the_median_of_rows_spread_evenly(m):
    y = np.random.default_rng(m).normal(size=(m, 6)).astype(np.float32)
    count = min(5, m if m % 2 else m - 1)
    rows = [m // count // 2 + i * (m // count) for i in range(count)]
    assert rows[-1] < m
    np.testing.assert_array_equal(middle(jnp.asarray(y)), np.median(y[rows], axis=0))


# --- what bandwidths are taken from -------------------------------------------------------------------------------


@pytest.mark.slow
def test_rules_look_at_a_subset_spread_over_the_rows():
    rows = np.asarray(subset(3 * SUBSET))
    assert rows.size == SUBSET == np.unique(rows).size
    assert (rows[0], rows[-1]) == (0, 3 * SUBSET - 1)
    assert subset(SUBSET) == slice(None)
    # two classes stored one after the other: half of the pairs are across, at 1; the first 2000 rows alone would give 0
    y = jnp.where(jnp.arange(4 * SUBSET) < 2 * SUBSET, 0.0, 1.0)[:, None]
    assert pairwise_median(y, jnp.ones(4 * SUBSET)) == 1.0


def test_rules_leave_out_duplicates_and_empty_slots():
    y = jnp.array([[0.0], [0.0], [1.0], [3.0], [100.0]])
    weight = jnp.array([1.0, 1.0, 1.0, 1.0, 0.0])
    assert nearest_distance(y, weight) == 1.0  # of 1, 1, 1, 2
    assert pairwise_median(y, weight) == 1.5  # of 0, 1, 1, 2, 3, 3
    assert jnp.isnan(pairwise_median(y[:2], weight[:2]))
    assert jnp.isnan(nearest_distance(y, weight.at[1:].set(0.0)))
    assert spread2(y, weight) == 16.0  # of 1, 1, 1, 4: four times beyond half, and as far beyond 90%
    assert spread2(y[:2], weight[:2]) == spread2(y[:1], weight[:1]) == jnp.inf


def test_a_bandwidth_of_references_near_one_point():
    _, y = cluster(1, 9)
    y = y[:-1] + 100  # far from the origin, close together
    d = np.sqrt(exact(y, y))
    np.testing.assert_allclose(pairwise_median(y, jnp.ones(8)), np.median(d[np.triu_indices(8, 1)]), rtol=1e-4)
    nearest = np.where(np.eye(8, dtype=bool), np.inf, d).min(1)
    np.testing.assert_allclose(nearest_distance(y, jnp.ones(8)), np.median(nearest), rtol=1e-4)


def test_mmd2_of_close_sets_in_65536_dimensions():
    x, y = near_pairs(1e-3, n=5)
    x, y = x[:5], y[:5]
    exact_energy = 2 * np.sqrt(exact(x, y)).mean() - np.sqrt(exact(x, x)).mean() - np.sqrt(exact(y, y)).mean()
    # the terms are of the size of 300 and cancel: float32 keeps 300 · 1e-6
    assert mmd2(Energy(), x, y) == pytest.approx(exact_energy, abs=1e-3)


def test_neighbour_distance_is_that_of_the_root_m_th():
    """By sorting; an empty slot and a copy are no neighbours; a row with fewer neighbours counts to its last."""
    y = jax.random.normal(jax.random.key(3), (30, 6))
    d = np.sort(np.linalg.norm(np.asarray(y)[:, None] - np.asarray(y)[None], axis=-1), axis=1)
    found = jax.jit(neighbour_distance)
    np.testing.assert_allclose(found(y, jnp.ones(30)), np.median(d[:, 5]), rtol=1e-5)  # √30 → 5
    padded = jnp.concatenate([y, jnp.zeros((9, 6))])
    weight = jnp.concatenate([jnp.ones(30), jnp.zeros(9)])
    np.testing.assert_allclose(found(padded, weight), np.median(d[:, 5]), rtol=1e-5)
    line = jnp.array([[0.0], [0.0], [0.0], [0.0], [1.0]])
    assert found(line, jnp.ones(5)) == 1.0
    assert jnp.isnan(found(line[:4], jnp.ones(4)))
