"""Metrics against closed forms and dense NumPy, in one block of rows and in several."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from mmdjax import IMQ, RBF, Cosine, Delta, Energy, Linear, Particles, Polynomial, Product, mmd2
from mmdjax._points import blocks
from mmdjax.metrics import (
    density_coverage,
    energy_distance,
    frechet_distance,
    kid,
    mmd2_with_error,
    nearest_distance,
    nearest_neighbour_accuracy,
    nearest_ratio,
    permutation_test,
    precision_recall,
    rke,
    vendi,
)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


BLOCK = 128  # rows in a block where a test asks for small ones


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks without thousands of rows; for shapes that no other test has, as `jit` keeps what it compiled."""
    monkeypatch.setattr(blocks, "BLOCK", BLOCK)


def two_sets(n, m, d=6, shift=0.4, seed=0):
    rng = np.random.default_rng(seed)
    return 1.2 * rng.normal(size=(n, d)).astype(np.float32) + shift, rng.normal(size=(m, d)).astype(np.float32)


SEVERAL = two_sets(BLOCK + 50, 2 * BLOCK + 301)  # two and three blocks
ONE = two_sets(60, 45, d=3)
one_or_several = pytest.mark.parametrize("sets", [ONE, SEVERAL], ids=["one block", "several blocks"])


def distances(x, y):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return np.sqrt(np.maximum((x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T, 0))


def dense_mmd2(gram, x, y, estimator="u"):
    """From whole Grams in float64."""

    def own(k):
        n = len(k)
        return k.mean() if estimator == "v" else (k.sum() - np.trace(k)) / (n * (n - 1))

    return own(gram(x, x)) - 2 * gram(x, y).mean() + own(gram(y, y))


# --- distances between sets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sets", "estimator"), [(ONE, "u"), (ONE, "v"), (SEVERAL, "u")])
def test_energy_distance_is_the_dense_one(sets, estimator, small_blocks):
    x, y = sets
    expected = dense_mmd2(lambda a, b: -distances(a, b), x, y, estimator)
    # float32 distances of 4, 1e-6 of each, mostly averaged out
    assert float(energy_distance(x, y, estimator=estimator)) == pytest.approx(expected, abs=2e-6)


def mean_gap(mean, std):
    """E|z| for z ~ N(mean, std²)."""
    return std * math.sqrt(2 / math.pi) * math.exp(-(mean**2) / (2 * std**2)) + mean * math.erf(
        mean / (std * math.sqrt(2))
    )


def test_energy_distance_of_gaussians():
    # N(0.5, 1) against N(0, 0.7²)
    exact = 2 * mean_gap(0.5, math.hypot(1, 0.7)) - mean_gap(0, math.sqrt(2)) - mean_gap(0, 0.7 * math.sqrt(2))

    def draw(key):
        key_x, key_y = jax.random.split(key)
        return energy_distance(0.5 + jax.random.normal(key_x, (20, 1)), 0.7 * jax.random.normal(key_y, (15, 1)))

    values = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 2000)), np.float64)
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean() - exact) < 4 * error < exact / 5  # the second, so that the first could fail


def test_energy_distance_resolves_close_pairs():
    rng = np.random.default_rng(0)
    y = rng.normal(size=(5, 500)) + 10
    x = y + 1e-4 * rng.normal(size=y.shape)
    x, y = x.astype(np.float32), y.astype(np.float32)
    gaps = np.linalg.norm(np.float64(x)[:, None] - np.float64(y), axis=-1)
    own = [np.linalg.norm(np.float64(a)[:, None] - np.float64(a), axis=-1) for a in (x, y)]
    assert np.diag(gaps).max() < 1e-3 * np.linalg.norm(x - x.mean(0), axis=1).min()
    expected = 2 * gaps.mean() - own[0].mean() - own[1].mean()  # 9e-4, all of it from the close pairs
    assert float(energy_distance(x, y, estimator="v")) == pytest.approx(expected, abs=2e-5)  # of distances of 30


@pytest.mark.slow
def test_derivative_of_energy_distance_in_blocks_is_the_dense_one(x64, small_blocks):
    x, y = (jnp.asarray(v[: BLOCK + 20, :5], float) for v in SEVERAL)

    def dense(x):
        def gaps(a, b):
            d2 = ((a[:, None] - b[None]) ** 2).sum(-1)
            return jnp.where(d2 > 0, jnp.sqrt(jnp.where(d2 > 0, d2, 1)), 0).sum()

        n, m = len(x), len(y)
        return 2 * gaps(x, y) / (n * m) - gaps(x, x) / (n * (n - 1))

    blocked, exact = (jax.jit(jax.grad(f))(x) for f in (lambda x: energy_distance(x, y), dense))
    np.testing.assert_allclose(blocked, exact, rtol=1e-9, atol=1e-14)


KERNELS = {
    "median rbf": RBF(None),
    "polynomial": Polynomial(),
    "product": Product(x=IMQ(1.5), cond=Delta()),
}


@pytest.mark.parametrize(
    "kernel",
    [pytest.param(k, id=name, marks=pytest.mark.slow if name == "median rbf" else ()) for name, k in KERNELS.items()],
)
def test_estimate_is_the_unbiased_mmd2(kernel, x64):
    rng = np.random.default_rng(3)
    p, q = (Particles(v.astype(float), cond=rng.integers(0, 2, len(v)), weight=rng.uniform(0, 2, len(v))) for v in ONE)
    estimate = mmd2_with_error(kernel, p, q, num_blocks=7)
    assert float(estimate.value) == pytest.approx(float(mmd2(kernel, p, q, estimator="u")), rel=1e-10)


def test_standard_error_where_a_block_has_all_the_weight():
    rng = np.random.default_rng(0)
    x, y = (Particles(rng.normal(size=(n, 2)).astype(np.float32)) for n in (9, 8))
    for small in (1e-6, 1e-12, 1e-30):
        weight = np.float32([1] + [small] * 8)
        found = mmd2_with_error(RBF(1.0), Particles(x.x, weight=weight), y, num_blocks=3)
        u = weight.astype(float) / weight.astype(float).sum()
        k = np.exp(-(distances(x.x, x.x) ** 2) / 2), np.exp(-(distances(x.x, y.x) ** 2) / 2)

        def theta(rows, u=u, k=k):  # what depends on x, of these rows
            pairs = [(i, j) for i in rows for j in rows if i != j]
            own = sum(u[i] * u[j] * k[0][i, j] for i, j in pairs) / sum(u[i] * u[j] for i, j in pairs)
            return own - 2 * sum(u[i] * k[1][i].mean() for i in rows) / sum(u[i] for i in rows)

        left = [np.delete(np.arange(9), block) for block in np.arange(9).reshape(3, 3)]
        of_x = sum((u[rows].sum() * (theta(rows) - theta(range(9)))) ** 2 for rows in left) * 3 / 2
        of_y = []  # what depends on y: its blocks of 3, 3 and 2 rows
        k_yy = np.exp(-(distances(y.x, y.x) ** 2) / 2) * (1 - np.eye(8))
        to_y = u @ k[1]
        value = lambda rows, k_yy=k_yy, to_y=to_y: (
            k_yy[np.ix_(rows, rows)].sum() / (len(rows) * (len(rows) - 1)) - 2 * to_y[rows].mean()
        )
        for block in range(3):
            rows = np.flatnonzero(np.arange(8) * 3 // 8 != block)
            of_y.append((len(rows) / 8 * (value(rows) - value(np.arange(8)))) ** 2 * 3 / 2)
        assert jnp.isfinite(found.value)
        assert float(found.error) == pytest.approx(math.sqrt(of_x + sum(of_y)), rel=1e-5)
        slope = jax.grad(lambda v, w=weight: mmd2_with_error(RBF(1.0), Particles(v, weight=w), y, num_blocks=3).error)
        assert jnp.isfinite(slope(x.x)).all()


@pytest.mark.slow
def test_standard_error_of_constant_data_and_of_empty_slots():
    x, y = np.ones((6, 2), np.float32), np.ones((5, 2), np.float32)
    estimate = mmd2_with_error(RBF(1.0), x, y)
    assert estimate == (pytest.approx(0, abs=1e-6), pytest.approx(0, abs=5e-6))  # sums of 6 × 1/6 in float32
    for value in (0.0, 1.0):  # the kernel is Linear: exact zeros at 0
        slope = jax.grad(lambda x: mmd2_with_error(Linear(), x, y * 0).error)(x * value)
        assert jnp.isfinite(slope).all()
    x, y = (v[:24] for v in ONE)
    padded = Particles(np.insert(x, [0, 5, 5, 5], np.nan, axis=0), weight=np.insert(np.ones(24), [0, 5, 5, 5], 0))
    for a, b in zip(
        mmd2_with_error(RBF(2.0), padded, y, num_blocks=7), mmd2_with_error(RBF(2.0), x, y, num_blocks=7), strict=True
    ):
        assert float(a) == pytest.approx(float(b), rel=1e-5)


@pytest.mark.slow
def test_kid_in_blocks_is_the_dense_one(small_blocks):
    x, y = SEVERAL
    expected = dense_mmd2(lambda a, b: (np.float64(a) @ np.float64(b).T / 6 + 1) ** 3, x, y)
    assert float(kid(x, y).value) == pytest.approx(expected, abs=2e-6)  # of kernel values of 1 to 10
    x, y = two_sets(1000, 1000)
    subset_errors = [float(kid(x, y, num_blocks=num).error) for num in (20, 1000)]
    assert subset_errors[0] == pytest.approx(subset_errors[1], rel=0.5)  # 3 of the 16% that 20 blocks are good to


@pytest.mark.slow
def test_jackknife_is_the_loop_over_blocks(x64):
    x, y = (jnp.asarray(v, float) for v in ONE)
    kernel, theta = RBF(2.0), float(mmd2(RBF(2.0), x, y, estimator="u"))
    total = 0.0
    for side, block in itertools.product((0, 1), range(5)):
        sets = [x, y]
        kept = np.arange(len(sets[side])) * 5 // len(sets[side]) != block
        sets[side] = sets[side][kept]
        total += (kept.mean() * (float(mmd2(kernel, *sets, estimator="u")) - theta)) ** 2 * 5 / 4
    assert float(mmd2_with_error(kernel, x, y, num_blocks=5).error) == pytest.approx(math.sqrt(total), rel=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(("shift", "lowest", "highest"), [(1.0, 0.93, 1.07), (0.0, 1.0, 1.6)])
def test_standard_error_is_the_spread_over_seeds(shift, lowest, highest):
    """Right where the sets differ (3% is one standard error of this test); √2 too large, and no smaller, where not."""

    def draw(key):
        key_x, key_y = jax.random.split(key)
        x, y = shift + jax.random.normal(key_x, (60, 2)), jax.random.normal(key_y, (80, 2))
        return mmd2_with_error(RBF(1.0), x, y, num_blocks=20)

    value, error = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 500))
    assert lowest < float(jnp.sqrt((error**2).mean()) / value.std()) < highest


def random_spd(rng, d):
    a = rng.normal(size=(d, d))
    return a @ a.T / d + 0.3 * np.eye(d)


@pytest.mark.parametrize(("n", "d"), [(100, 12), (9, 12), (2 * BLOCK + 7, 12)], ids=["tall", "fewer than d", "blocks"])
def test_frechet_distance_of_a_linear_image(n, d, small_blocks):
    """y = A x + b with A symmetric and positive: A is the optimal map, so the distance is E|x − y|² about the means."""
    rng = np.random.default_rng(0)
    x, a, b = rng.normal(size=(n, d)) @ random_spd(rng, d), random_spd(rng, d), rng.normal(size=d)
    y = x @ a + b
    gap = y - x
    expected = (gap.mean(0) ** 2).sum() + ((gap - gap.mean(0)) ** 2).sum() / (n - 1)
    traces = x.var(0).sum() + y.var(0).sum()
    value = frechet_distance(x.astype(np.float32), y.astype(np.float32))
    assert float(value) == pytest.approx(expected, abs=2e-6 * traces)


def test_frechet_distance_of_equal_sets():
    x, _ = two_sets(100, 1, 256)
    scale = float(x.var(0).sum())
    assert abs(float(frechet_distance(x, x[::-1]))) < 2e-6 * scale  # by eigenvalues of Σ in float32 it is 7e-4


def test_frechet_distance_ignores_dead_features():
    x, y = (np.concatenate([v, np.zeros((len(v), 5), np.float32)], axis=1) for v in ONE)
    scale = float(x.var(0).sum())
    assert float(frechet_distance(x, y)) == pytest.approx(float(frechet_distance(*ONE)), abs=2e-6 * scale)


@pytest.mark.parametrize("d", [4, 80], ids=["tall", "fewer than d"])
def test_derivative_of_frechet_distance(d, x64):
    x, y = (jnp.asarray(v, float) for v in two_sets(60, 45, d))
    v = jax.random.normal(jax.random.key(0), x.shape, float)

    def f(step):
        return frechet_distance(x + step * v, y)

    # error: 1e-10 of the third derivative and 1e-13/1e-5 of rounding; with fewer than d, singular values that are 0
    # have no derivative, their sum over ±step cancels
    difference = (f(1e-5) - f(-1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(f)(0.0), difference, rtol=1e-6)


# --- the permutation test -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_permutation_test_is_the_enumeration(x64):
    kernel = Energy()
    x, y = (jnp.asarray(v, float) for v in two_sets(4, 3, shift=1.0))
    pooled = jnp.concatenate([x, y])
    splits = [(list(c), sorted(set(range(7)) - set(c))) for c in itertools.combinations(range(7), 4)]
    firsts, seconds = (pooled[np.array(part)] for part in zip(*splits, strict=True))
    statistics = np.asarray(jax.jit(jax.vmap(lambda a, b: mmd2(kernel, a, b, estimator="u")))(firsts, seconds))
    exact = np.mean(statistics >= statistics[0] - 1e-12)
    result = permutation_test(kernel, x, y, jax.random.key(0), num_permutations=4000)
    assert float(result.statistic) == pytest.approx(statistics[0], rel=1e-10)
    assert float(result.p_value) == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 4000))


def p_values(shift, seeds=1000):
    def draw(key):
        key_x, key_y, key = jax.random.split(key, 3)
        x, y = shift + jax.random.normal(key_x, (12, 2)), jax.random.normal(key_y, (17, 2))
        return permutation_test(RBF(None), x, y, key, num_permutations=19).p_value

    return np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(1), seeds)))


def test_p_values_are_uniform_under_the_hypothesis():
    counts = np.bincount(np.rint(p_values(0.0) * 20).astype(int), minlength=21)[1:]
    assert counts.sum() == 1000
    chi2 = ((counts - 50) ** 2 / 50).sum()
    assert chi2 < 43.8  # the 99.9% quantile of χ² with 19 degrees of freedom


def test_a_shift_is_found():
    assert (p_values(1.5) <= 0.05).mean() > 0.9


def test_permutation_test_in_blocks(small_blocks):
    x, y = SEVERAL
    result = permutation_test(Polynomial(), x, y, jax.random.key(0), num_permutations=9)
    assert float(result.statistic) == pytest.approx(float(kid(x, y).value), abs=1e-5)  # of kernel values of 1 to 10
    assert float(result.p_value) == pytest.approx(0.1)  # the smallest that nine permutations can give


@pytest.mark.slow
def test_equal_samples_say_nothing():
    result = permutation_test(Energy(), jnp.ones((5, 3)), jnp.ones((4, 3)), jax.random.key(0), num_permutations=9)
    assert float(result.p_value) == 1


# --- neighbours ---------------------------------------------------------------------------------------------------


def dense_balls(x, y, k):
    """Precision, recall, density and coverage by whole matrices."""
    d_xy = distances(x, y)
    radius_x, radius_y = (np.sort(distances(v, v) + np.diag([np.inf] * len(v)), axis=1)[:, k - 1] for v in (x, y))
    in_y, in_x = d_xy < radius_y, d_xy < radius_x[:, None]
    return in_y.any(1).mean(), in_x.any(0).mean(), in_y.sum(1).mean() / k, (d_xy.min(0) < radius_y).mean()


@pytest.mark.parametrize(("sets", "k"), [(ONE, 1), (SEVERAL, 5)], ids=["one block", "several blocks"])
def test_balls_are_the_dense_ones(sets, k, small_blocks):
    expected = dense_balls(*sets, k)
    assert 0 < min(expected) < 1
    found = (*precision_recall(*sets, k=k), *density_coverage(*sets, k=k))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(("n", "d"), [(60, 3), pytest.param(BLOCK + 301, 40, marks=pytest.mark.slow)])
def test_a_set_against_itself(n, d, small_blocks):
    """The k-th neighbour lies on the ball, in whatever block its distance is computed, and does not count."""
    x, _ = two_sets(n, 1, d, shift=3.0)
    assert precision_recall(x, x) == (1, 1)
    assert density_coverage(x, x) == (pytest.approx(1, abs=1e-4), 1)  # pairs a rounding error from the edge
    copies = x[: n // 3]
    by_difference = [((np.float64(c) - np.float64(x)) ** 2).sum(1) for c in x]
    radius2 = np.sort(by_difference, axis=1)[:, 5]
    inside = np.array(by_difference[: n // 3]) < radius2
    assert float(density_coverage(copies, x).density) == pytest.approx(inside.sum(1).mean() / 5, rel=1e-6)


def test_sets_apart():
    x, y = ONE
    assert precision_recall(x + 100, y) == (0, 0)
    assert density_coverage(x + 100, y) == (0, 0)
    assert nearest_neighbour_accuracy(x + 100, y) == 1


@one_or_several
def test_nearest_neighbour_accuracy_is_the_dense_one(sets, small_blocks):
    pooled, first = np.concatenate(sets), np.arange(len(sets[0]) + len(sets[1])) < len(sets[0])
    gaps = distances(pooled, pooled)
    np.fill_diagonal(gaps, np.inf)
    right = first[gaps.argmin(1)] == first
    expected = 0.5 * (right[first].mean() + right[~first].mean())
    assert float(nearest_neighbour_accuracy(*sets)) == pytest.approx(expected, rel=1e-6)


def test_nearest_neighbour_accuracy_of_one_distribution():
    # each other sample is equally likely to be the nearest: ½ (n − 1)/(N − 1) + ½ (m − 1)/(N − 1)
    def draw(key):
        z = jax.random.normal(key, (50, 2))
        return nearest_neighbour_accuracy(z[:20], z[20:])

    values = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 1000)))
    assert abs(values.mean() - 24 / 49) < 4 * values.std() / math.sqrt(1000) < 0.02


def test_copies_and_ties():
    x, y = ONE
    assert nearest_neighbour_accuracy(x[:45], x[:45]) == 0
    assert nearest_neighbour_accuracy(jnp.ones((3, 2)), jnp.ones((5, 2))) == 0.5
    ties = jnp.array([[0.0], [2.0]]), jnp.array([[-2.0], [4.0]])  # both of x as near to y, none of y to y
    assert nearest_neighbour_accuracy(*ties) == 0.25
    assert nearest_ratio(y[:20], y, x) == 0


@one_or_several
def test_nearest_ratio_is_the_dense_one(sets, small_blocks):
    x, y = sets
    made, fresh = x[::2], x[1::2] + 0.2
    expected = distances(made, y).min(1).mean() / distances(fresh, y).min(1).mean()
    assert float(nearest_ratio(made, y, fresh)) == pytest.approx(expected, rel=1e-5)


def test_nearest_distance_leaves_out_weight_zero():
    x, y = ONE
    found = nearest_distance(x, Particles(y, weight=jnp.arange(len(y)) >= 5))
    np.testing.assert_allclose(found, distances(x, y[5:]).min(1), rtol=1e-5)


def test_derivative_of_nearest_ratio(x64):
    x, y = (jnp.asarray(v, float) for v in ONE)
    gradient = jax.grad(lambda x: nearest_ratio(x, y[:20], y[20:]))(x)
    nearest = np.asarray(y[:20])[distances(x, y[:20]).argmin(1)]
    unit = (x - nearest) / np.linalg.norm(x - nearest, axis=1, keepdims=True)
    expected = unit / len(x) / distances(y[20:], y[:20]).min(1).mean()
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-14)


# --- diversity ----------------------------------------------------------------------------------------------------

ORDERS = (0.5, 1.0, 2.0, math.inf)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel", [Cosine(), Linear(), RBF(0.05)], ids=["cosine", "linear", "rbf"])
def test_vendi_of_distinct_and_of_equal_samples(kernel, order):
    assert float(vendi(kernel, jnp.eye(7), order=order)) == pytest.approx(7, rel=1e-5)
    assert float(vendi(kernel, jnp.ones((7, 3)), order=order)) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel", [Cosine(), RBF(0.05)], ids=["cosine", "rbf"])
def test_vendi_of_modes_is_their_proportions_entropy(kernel, order):
    sizes = np.array([1, 2, 5, 8])
    p = sizes / sizes.sum()
    expected = {1.0: np.exp(-(p * np.log(p)).sum()), math.inf: 1 / p.max()}.get(order)
    expected = (p**order).sum() ** (1 / (1 - order)) if expected is None else expected
    assert float(vendi(kernel, np.repeat(np.eye(4), sizes, axis=0), order=order)) == pytest.approx(expected, rel=1e-5)
    assert float(vendi(kernel, Particles(np.eye(4), weight=sizes), order=order)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("n", [30, 2 * BLOCK + 9])
def test_vendi_by_features_is_vendi_by_gram(n, small_blocks):
    x, _ = two_sets(n, 1, d=40)
    unit = np.float64(x) / np.linalg.norm(np.float64(x), axis=1, keepdims=True)
    spectrum = np.linalg.eigvalsh(unit @ unit.T if n < 40 else unit.T @ unit) / n
    spectrum = spectrum[spectrum > 1e-12]
    assert float(vendi(Cosine(), x)) == pytest.approx(np.exp(-(spectrum * np.log(spectrum)).sum()), rel=1e-5)


def test_vendi_in_many_dimensions_has_no_rounding_noise():
    x = jnp.ones((300, 1000)) * jax.random.normal(jax.random.key(0), (1000,))
    assert float(vendi(Cosine(), x)) == pytest.approx(1, abs=1e-5)  # by eigenvalues of XᵀX in float32 1.0003


@one_or_several
def test_rke_is_the_dense_one(sets, small_blocks):
    x, _ = sets
    gram = np.exp(-(distances(x, x) ** 2) / 8)
    n = len(x)
    assert float(rke(RBF(2.0), x)) == pytest.approx(n**2 / (gram**2).sum(), rel=1e-5)
    unbiased = ((gram**2).sum() - n) / (n * (n - 1))
    assert float(rke(RBF(2.0), x, estimator="u")) == pytest.approx(1 / unbiased, rel=1e-5)


@pytest.mark.slow
def test_rke_is_vendi_of_order_2():
    points = Particles(ONE[0], weight=np.random.default_rng(0).uniform(0, 2, 60).astype(np.float32))
    for kernel in (RBF(2.0), RBF(None), Cosine(), Linear()):
        assert float(rke(kernel, points)) == pytest.approx(float(vendi(kernel, points, order=2.0)), rel=1e-5)


@pytest.mark.parametrize("score", [vendi, rke])
def test_derivatives_of_diversity(score, x64):
    x, v = (jnp.asarray(a[:45], float) for a in ONE)
    for kernel in (RBF(2.0), Cosine()):

        def f(step, kernel=kernel):
            return score(kernel, x + step * v)

        difference = (f(1e-5) - f(-1e-5)) / 2e-5  # as above
        np.testing.assert_allclose(jax.grad(f)(0.0), difference, rtol=1e-6)


@pytest.mark.parametrize("order", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("copies", [1, 40, 400])
@pytest.mark.parametrize("kernel", [RBF(1.0), Cosine()], ids=["rbf", "cosine"])
def test_small_orders_do_not_count_rounding(kernel, copies, order):
    points = np.float32([[30, 0, 0], [0, 30, 0], [0, 0, 30]])
    assert float(vendi(kernel, np.repeat(points, copies, axis=0), order=order)) == pytest.approx(3, rel=1e-5)


def test_small_orders_of_overlapping_copies():
    """Against the eigenvalues in float64 of the distinct points alone."""
    rng = np.random.default_rng(0)
    points, which = 2 * rng.normal(size=(5, 2)).astype(np.float32), rng.integers(0, 5, 400)
    share = np.bincount(which, minlength=5) / 400
    gram = np.exp(-(distances(points, points) ** 2) / 2) * np.sqrt(share[:, None] * share)
    spectrum = np.linalg.eigvalsh(gram)
    assert spectrum.min() > 0.01 * spectrum.max()  # far above rounding
    expected = (spectrum**0.1).sum() ** (1 / 0.9)
    assert float(vendi(RBF(1.0), points[which], order=0.1)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("order", [0.999, 0.9999999, 1.0000001, 1.001, 50.0, 200.0])
def test_orders_near_one_and_large_ones(order):
    x, _ = ONE
    spectrum = np.linalg.eigvalsh(np.exp(-(distances(x, x) ** 2) / 2) / len(x))
    entropy = np.log(np.sum((spectrum / spectrum.max()) ** order)) + order * np.log(spectrum.max())
    # in float64 the sum near 1 is good to 1e-16/1e-7; eigenvalues of 60 samples in float32 to some 1e-6
    assert float(vendi(RBF(1.0), x, order=order)) == pytest.approx(np.exp(entropy / (1 - order)), rel=1e-5)
    assert jnp.isfinite(jax.grad(lambda x: vendi(RBF(1.0), x, order=order))(x)).all()


def integer_metrics(x, y, k):
    """By whole matrices of int64: precision, recall, density, coverage, accuracy."""
    xx, yy, xy = (((a[:, None] - b[None]) ** 2).sum(-1) for a, b in ((x, x), (y, y), (x, y)))
    xx, yy = (d2 + 2**40 * np.eye(len(d2), dtype=np.int64) for d2 in (xx, yy))
    radius_x, radius_y = (np.sort(d2, axis=1)[:, k - 1] for d2 in (xx, yy))
    in_y, in_x = xy < radius_y, xy < radius_x[:, None]
    rates = [
        ((own < other) / 2 + (own <= other) / 2).mean()
        for own, other in ((xx.min(1), xy.min(1)), (yy.min(1), xy.min(0)))
    ]
    return in_y.any(1).mean(), in_x.any(0).mean(), in_y.sum(1).mean() / k, in_y.any(0).mean(), np.mean(rates)


@pytest.mark.parametrize("d", [64, *(pytest.param(d, marks=pytest.mark.slow) for d in (3, 5, 16))])
def test_equal_distances_are_equal(d):
    """Features on a grid, far from the origin and in any unit: exact, with ties in most rows."""
    rng = np.random.default_rng(d)
    for values, offset, unit in ((2, 0, 1.0), (4, 1000, 1.0), (11, -77, 2.0**-6), (256, 0, 4.0)):
        x, y = rng.integers(0, values, (40, d)) + offset, rng.integers(0, values, (50, d)) + offset
        made, target = (np.float32(unit * v) for v in (x, y))
        found = (
            *precision_recall(made, target, k=3),
            *density_coverage(made, target, k=3),
            nearest_neighbour_accuracy(made, target),
        )
        np.testing.assert_allclose(found, integer_metrics(x, y, 3), rtol=3e-7)  # means of exact counts, in float32


def test_copies_of_a_neighbour_tie():
    """Each sample's nearest other one in its own set is also in the other set: features of any value."""
    near = two_sets(30, 1, 40, shift=3.0)[0]
    x = np.concatenate([near, near + 0.01])  # pairs
    y = np.concatenate([near[:15] + 0.01, near[15:], near[:15] + 0.01, near[15:]])  # each twice
    # a pair of x has one of itself in y, at 0, and so for that one the copy counts; its partner is as near to it and to
    # its copy: ½. Each of y lies on its own copy and on a sample of x: ½
    assert float(nearest_neighbour_accuracy(x, y)) == pytest.approx((0.5 * 0.5 + 0.5) / 2)


# --- all of them --------------------------------------------------------------------------------------------------

KEY = functools.partial(jax.random.key, 0)
METRICS = {
    "energy_distance": energy_distance,
    "kid": kid,
    "frechet_distance": frechet_distance,
    "permutation_test": lambda x, y: permutation_test(RBF(2.0), x, y, KEY(), num_permutations=9),
    "precision_recall": precision_recall,
    "density_coverage": density_coverage,
    "nearest_neighbour_accuracy": nearest_neighbour_accuracy,
    "nearest_ratio": lambda x, y: nearest_ratio(x, y[:20], y[20:]),
    "vendi": lambda x, y: vendi(RBF(2.0), x),
    "vendi by features": lambda x, y: vendi(Cosine(), x),
    "rke": lambda x, y: rke(RBF(None), x),
}
WEIGHTED = ("energy_distance", "kid", "frechet_distance", "vendi", "vendi by features", "rke")
SMALL = two_sets(24, 30, 3)
each_metric = pytest.mark.parametrize("name", METRICS)
# one of each way to compute: sums over pairs, neighbours, features, a Gram
some_metrics = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("energy_distance", "precision_recall", "vendi") else pytest.mark.slow)
        for name in METRICS
    ],
)


@some_metrics
def test_under_jit_and_vmap(name):
    metric = METRICS[name]
    sets = [SMALL, two_sets(24, 30, 3, seed=1)]
    x, y = (jnp.stack(v) for v in zip(*sets, strict=True))
    together = jax.jit(jax.vmap(metric))(x, y)
    for i, pair in enumerate(sets):
        for mapped, alone in zip(jax.tree.leaves(together), jax.tree.leaves(metric(*pair)), strict=True):
            assert float(mapped[i]) == pytest.approx(float(alone), rel=2e-5, abs=1e-6)


def with_empty_slots(x):
    x = np.concatenate([x, np.full((3, x.shape[1]), np.nan, np.float32)])
    return Particles(x, weight=np.array([2.0] * (len(x) - 3) + [0.0] * 3))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METRICS if name != "vendi"])  # that one makes the Gram whole
def test_large_sets_fit_in_2_gb(name):
    """50,000 × 2,048 in float32, by what the compiled program allocates; `benchmarks/metrics.py` runs it."""
    features = jax.ShapeDtypeStruct((50_000, 2048), jnp.float32)
    memory = jax.jit(METRICS[name]).lower(features, features).compile().memory_analysis()
    assert memory.argument_size_in_bytes in (50_000 * 2048 * 4, 2 * 50_000 * 2048 * 4)
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 1.4e9  # a whole Gram is 10 GB


@pytest.mark.parametrize("name", WEIGHTED)
def test_empty_slots_change_nothing(name):
    def first(value):  # the blocks of a standard error count empty slots
        return float(jax.tree.leaves(value)[0])

    assert first(METRICS[name](*map(with_empty_slots, SMALL))) == pytest.approx(first(METRICS[name](*SMALL)), rel=1e-5)


def test_empty_slots_are_no_references():
    x, y = SMALL
    sets = x, y[:20], y[20:]
    assert float(nearest_ratio(*map(with_empty_slots, sets))) == pytest.approx(float(nearest_ratio(*sets)), rel=1e-6)


@pytest.mark.parametrize("metric", [frechet_distance, functools.partial(energy_distance, estimator="v")])
def test_weights_are_weights(metric):
    rng = np.random.default_rng(0)
    x, y = ONE
    weight = rng.integers(1, 4, len(x))
    weighted, repeated = Particles(x, weight=weight.astype(np.float32)), np.repeat(x, weight, axis=0)
    if metric is frechet_distance:  # the covariance over 1 − Σu², as np.cov's aweights
        u = weight / weight.sum()
        centred = x - u @ x
        covariance = centred.T @ (u[:, None] * centred) / (1 - (u**2).sum())
        one_point = frechet_distance(weighted, np.zeros((2, 3), np.float32))
        assert float(one_point) == pytest.approx(((u @ x) ** 2).sum() + np.trace(covariance), rel=1e-5)
    else:
        assert float(metric(weighted, y)) == pytest.approx(float(metric(repeated, y)), abs=2e-6)


@some_metrics
def test_pictures_and_half_precision(name):
    x, y = (v.astype(jnp.bfloat16) for v in two_sets(24, 30, 4))
    flat = METRICS[name](*(v.astype(np.float32) for v in (x, y)))
    pictures = METRICS[name](*(v.reshape(-1, 2, 2) for v in (x, y)))
    for a, b in zip(jax.tree.leaves(pictures), jax.tree.leaves(flat), strict=True):
        assert a.dtype == jnp.float32
        assert float(a) == pytest.approx(float(b), rel=1e-6)


X, Y = two_sets(6, 5)
WEIGHTS = Particles(X, weight=np.ones(6))
MISTAKES = {
    "shapes": (ValueError, r"x.x has shape \(6, 6\) but y.x has \(5, 3\)", lambda: energy_distance(X, Y[:, :3])),
    "NaN": (ValueError, "y is NaN or infinite in rows", lambda: frechet_distance(X, Y * np.nan)),
    "estimator": (ValueError, "estimator is 'w'", lambda: energy_distance(X, Y, estimator="w")),
    "one sample": (ValueError, "x has 1 samples; at least 2", lambda: frechet_distance(X[:1], Y)),
    "few samples": (ValueError, "y has 3 samples; at least 4", lambda: kid(X, Y[:3])),
    "one sample, unbiased": (
        ValueError,
        'x has 1 samples; at least 2 .*estimator="v"',
        lambda: energy_distance(X[:1], Y),
    ),
    "one mode": (
        ValueError,
        'x has 1 samples; at least 2 .*estimator="v"',
        lambda: rke(RBF(1.0), X[:1], estimator="u"),
    ),
    "one weight": (
        ValueError,
        "x has 1 samples of weight above 0",
        lambda: energy_distance(Particles(X, weight=np.eye(6)[2]), Y),
    ),
    "few weights": (
        ValueError,
        "x has 2 samples of weight above 0.*at least 4",
        lambda: kid(Particles(X, weight=np.arange(6) < 2), Y),
    ),
    "one weighted covariance": (
        ValueError,
        "x has 1 samples of weight above 0",
        lambda: frechet_distance(Particles(X, weight=np.eye(6)[2]), Y),
    ),
    "no numbers": (TypeError, "y holds the number 3", lambda: energy_distance(X, [3] * 6)),
    "out of range": (
        ValueError,
        r"x has values up to 1e\+20 .*scale the data",
        lambda: kid(X * np.float32(1e20 / abs(X).max()), X),
    ),
    "one block": (ValueError, "num_blocks is 1", lambda: kid(X, Y, num_blocks=1)),
    "no permutation": (
        ValueError,
        "num_permutations is 0",
        lambda: permutation_test(RBF(1.0), X, Y, KEY(), num_permutations=0),
    ),
    "a seed": (TypeError, "jax.random.key", lambda: permutation_test(RBF(1.0), X, Y, 0)),
    "k": (ValueError, "k is 5 but y has 5 samples; k goes from 1 to 4", lambda: precision_recall(X, Y, k=5)),
    "k of zero": (ValueError, "k is 0", lambda: density_coverage(X, Y, k=0)),
    "weights in precision": (
        ValueError,
        "x has weights, which this metric does not take",
        lambda: precision_recall(WEIGHTS, Y),
    ),
    "weights in density": (ValueError, "x has weights", lambda: density_coverage(WEIGHTS, Y)),
    "weights in 1-NN": (ValueError, "x has weights", lambda: nearest_neighbour_accuracy(WEIGHTS, Y)),
    "weights in the test": (ValueError, "x has weights", lambda: permutation_test(RBF(1.0), WEIGHTS, Y, KEY())),
    "order": (ValueError, "order is 0", lambda: vendi(Cosine(), X, order=0)),
    "no similarity": (ValueError, "Energy is 0 between a sample and itself", lambda: rke(Energy(), X)),
    "nor for vendi": (ValueError, "Energy is 0 between a sample and itself", lambda: vendi(Energy(), X)),
    "too many for a Gram": (ValueError, "at most 16384; use rke", lambda: vendi(RBF(1.0), np.zeros((16385, 1)))),
    "all equal": (ValueError, "a bandwidth of 0", lambda: mmd2_with_error(RBF(None), X, np.ones((5, 6)))),
    "no kernel": (TypeError, "a kernel is a callable", lambda: rke(3.0, X)),
}


@pytest.fixture
def without_type_checks():
    """The errors are those that a user sees, not those of the type checker that only the tests have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_named(name):
    error, message, call = MISTAKES[name]
    with pytest.raises(error, match=message):
        call()
