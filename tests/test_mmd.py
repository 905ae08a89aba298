"""MMD² against double loops, closed forms and the authors' gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mmdjax import (
    IMQ,
    RBF,
    Cosine,
    Delta,
    Energy,
    Laplacian,
    Linear,
    Mapped,
    Matern32,
    Particles,
    Polynomial,
    Product,
    RationalQuadratic,
    Sum,
    mmd2,
    witness,
)
from mmdjax.kernels import as_kernel
from mmdjax.mmd import attribution, cross_term, self_term

KERNELS = {
    "rbf": RBF(1.3),
    "rbf mixture": RBF((0.5, 2.0)),
    "laplacian": Laplacian(1.3),
    "imq": IMQ(1.3),
    "rational quadratic": RationalQuadratic(1.3, 0.7),
    "energy": Energy(),
    "polynomial": Polynomial(),
    "linear": Linear(),
    "cosine": Cosine(),
    "sum": Sum(RBF(1.0), Energy(), weights=(0.5, 2.0)),
    "product": Product(x=Energy(), cond=Cosine()),
    "mapped": Mapped(jnp.tanh, IMQ(0.7)),
    "custom": as_kernel(lambda a, b: (a.x @ b.x.T) ** 2),
}
each_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
few = ("rbf", "imq", "energy", "polynomial", "product", "mapped")  # one of each way to compute a Gram
some_kernels = pytest.mark.parametrize("kernel", [KERNELS[name] for name in few], ids=few)
SLOW = pytest.mark.slow  # for kernels whose programs take long to compile where one of the same kind is quick
three = pytest.mark.parametrize(
    "kernel",
    [pytest.param(KERNELS[n], marks=() if n in ("energy", "polynomial") else SLOW) for n in few],
    ids=few,
)
each_estimator = pytest.mark.parametrize("estimator", ["v", "u"])


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def points(seed, n, d=6, shift=0.0):
    rng = np.random.default_rng(seed)
    return Particles(
        jnp.asarray(rng.normal(size=(n, d)) + shift),
        cond=jnp.asarray(rng.normal(size=(n, 3))),
        weight=jnp.asarray(rng.uniform(0.2, 2.0, n)),
    )


def double_loop(gram_pp, gram_pq, gram_qq, u, v, estimator):
    def own(gram, w):
        pairs = [(i, j) for i in range(len(w)) for j in range(len(w)) if estimator == "v" or i != j]
        total = sum(w[i] * w[j] * gram[i, j] for i, j in pairs)
        return total / sum(w[i] * w[j] for i, j in pairs) if pairs else 0.0

    cross = sum(u[i] * v[j] * gram_pq[i, j] for i in range(len(u)) for j in range(len(v)))
    return own(gram_pp, u) - 2 * cross + own(gram_qq, v)


@each_kernel
@each_estimator
def test_mmd2_is_the_double_loop(kernel, estimator, x64):
    p, q = points(0, 5), points(1, 4, shift=0.5)
    fitted = kernel.fit(q)
    grams = [np.asarray(fitted(a, b)) for a, b in ((p, p), (p, q), (q, q))]
    expected = double_loop(*grams, *(np.asarray(r.weight / r.weight.sum()) for r in (p, q)), estimator)
    # d² of a point to itself is 1e-16 off in `kernel(p, p)` at most; sums of order 10
    np.testing.assert_allclose(mmd2(kernel, p, q, estimator=estimator), expected, rtol=1e-11, atol=1e-12)


def expected_rbf(h, d, variance, gap2=0.0):
    """E exp(−|x − y|²/2h²) for x − y normal with this variance a dimension and mean² gap2."""
    return (h**2 / (h**2 + variance)) ** (d / 2) * np.exp(-gap2 / (2 * (h**2 + variance)))


def test_the_u_statistic_is_unbiased():
    # N(0, 1) against N(0.5, 0.7²) in three dimensions, h = 1.2
    h, d, gap, s, seeds = 1.2, 3, 0.5, 0.7, 4000

    def draw(key, estimator):
        key_p, key_q = jax.random.split(key)
        p, q = jax.random.normal(key_p, (8, d)), gap + s * jax.random.normal(key_q, (6, d))
        return mmd2(RBF(h), p, q, estimator=estimator)

    exact = expected_rbf(h, d, 2) - 2 * expected_rbf(h, d, 1 + s**2, d * gap**2) + expected_rbf(h, d, 2 * s**2)
    keys = jax.random.split(jax.random.key(0), seeds)
    for estimator, bias in (
        ("u", 0.0),
        ("v", (1 - expected_rbf(h, d, 2)) / 8 + (1 - expected_rbf(h, d, 2 * s**2)) / 6),
    ):
        values = np.asarray(jax.jit(jax.vmap(functools.partial(draw, estimator=estimator)))(keys), np.float64)
        error = values.std() / np.sqrt(seeds)
        assert abs(values.mean() - exact - bias) < 4 * error  # "v" is off by exactly its self-pairs
        assert error < exact / 50  # so that the test could fail


# --- the authors' gradients ---------------------------------------------------------------------------------------


def generated_and_references(d=12):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(5, d))), jnp.asarray(rng.normal(size=(7, d)) + 0.3)


def last_row_gradient(kernel, ys, xs):
    """∂ mmd2([Y; y], X)/∂y at y = the last row of Y."""
    return jax.jit(jax.grad(lambda y: mmd2(kernel, jnp.concatenate([ys[:-1], y[None]]), xs)))(ys[-1])


def test_polynomial_gradient_is_the_authors(x64):
    ys, xs = generated_and_references()
    n, m, d, y = len(ys), len(xs), ys.shape[1], ys[-1]
    expected = 2 / (n**2 * d) * (3 * (ys @ y / d + 1) ** 2) @ ys - 2 / (n * m * d) * (3 * (xs @ y / d + 1) ** 2) @ xs
    np.testing.assert_allclose(last_row_gradient(Polynomial(), ys, xs), expected, rtol=1e-12, atol=1e-14)


def test_rbf_gradient_is_the_closed_form(x64):
    ys, xs = generated_and_references()
    n, m, h, y = len(ys), len(xs), 2.5, ys[-1]

    def pull(points):
        return jnp.exp(-((points - y) ** 2).sum(1) / (2 * h**2)) @ (points - y) / h**2

    expected = 2 / n**2 * pull(ys) - 2 / (n * m) * pull(xs)
    np.testing.assert_allclose(last_row_gradient(RBF(h), ys, xs), expected, rtol=1e-12, atol=1e-14)


@three
@each_estimator
def test_gradient_from_kernel_gradients_is_autodiff(kernel, estimator, x64):
    p, q = points(0, 5), points(1, 4)
    kernel = kernel.fit(q)
    u, v = p.probabilities(), q.probabilities()
    coef = jnp.outer(u, u)
    if estimator == "u":
        coef = coef * (1 - jnp.eye(5)) / (1 - (u**2).sum())
    among, _ = kernel.gradient(p, p, 2 * coef, same=True)  # symmetric: each pair counts from both ends
    to_q, _ = kernel.gradient(p, q, -2 * jnp.outer(u, v))
    by_autodiff = jax.jit(jax.grad(lambda x: mmd2(kernel, Particles(x, p.cond, p.weight), q, estimator=estimator)))(p.x)
    np.testing.assert_allclose(among + to_q, by_autodiff, rtol=1e-10, atol=1e-12)


# --- symmetries ---------------------------------------------------------------------------------------------------


@some_kernels
def test_zero_when_the_sets_coincide(kernel, x64):
    p = points(0, 5)
    shuffled = jax.tree.map(lambda leaf: leaf[::-1], p)
    assert abs(mmd2(kernel, p, p)) < 1e-7  # √ of d² = 1e-15 is 3e-8
    assert abs(mmd2(kernel, p, shuffled)) < 1e-7
    gradient = jax.jit(jax.grad(lambda x: mmd2(kernel, Particles(x, p.cond, p.weight), p)))(p.x)
    assert jnp.abs(gradient).max() < 1e-7


def both(kernel, p, q):
    return mmd2(kernel, p, q, estimator="v") + 3 * mmd2(kernel, p, q, estimator="u")


@three
def test_zero_weight_rows_change_nothing(kernel, x64):
    p, q = points(0, 5), points(1, 4)

    def padded(r, x, rows):
        def pad(leaf, value):
            return jnp.concatenate([leaf, jnp.full((rows, *leaf.shape[1:]), value)])

        return Particles(pad(x, 3.0), pad(r.cond, 1.0), pad(r.weight, 0.0))

    def f(x, y, rows):
        return both(kernel, padded(p, x, rows), padded(q, y, rows))

    value_and_grad = jax.jit(jax.value_and_grad(f, argnums=(0, 1)), static_argnums=2)
    for mine, theirs in zip(
        *map(jax.tree.leaves, (value_and_grad(p.x, q.x, 2), value_and_grad(p.x, q.x, 0))), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, rtol=1e-10, atol=1e-12)


@three
def test_permuting_particles_permutes_the_gradient(kernel, x64):
    p, q = points(0, 5), points(1, 4)
    order = jnp.array([3, 0, 4, 1, 2])
    f = jax.jit(jax.value_and_grad(lambda x, cond, weight: both(kernel, Particles(x, cond, weight), q)))
    value, gradient = f(p.x, p.cond, p.weight)
    value_permuted, gradient_permuted = f(p.x[order], p.cond[order], p.weight[order])
    np.testing.assert_allclose(value, value_permuted, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(gradient[order], gradient_permuted, rtol=1e-11, atol=1e-12)


@settings(deadline=None, max_examples=10, derandomize=True, phases=[Phase.generate])
@given(seed=st.integers(0, 1000), shift=st.floats(-2, 2), estimator=st.sampled_from(["u", "v"]))
def test_mmd2_is_symmetric_and_v_is_a_squared_distance(seed, shift, estimator):
    with jax.enable_x64(True):
        p, q = points(seed, 5), points(seed + 1, 4, shift=shift)
        for kernel in (RBF(1.0), Energy()):
            value = mmd2(kernel, p, q, estimator=estimator)
            np.testing.assert_allclose(value, mmd2(kernel, q, p, estimator=estimator), rtol=1e-10, atol=1e-12)
            assert estimator == "u" or value >= 0


def test_linear_kernel_compares_means(x64):
    p, q = points(0, 5), points(1, 4)
    gap = p.probabilities() @ p.x - q.probabilities() @ q.x
    np.testing.assert_allclose(mmd2(Linear(), p, q), gap @ gap / 6, rtol=1e-11)


def test_labels_under_delta():
    p, q = jnp.array([0, 0, 1, 2]), jnp.array([0, 1, 1, 1])
    histogram_gap = np.array([0.5, 0.25, 0.25]) - np.array([0.25, 0.75, 0.0])
    assert mmd2(Delta(), p, q) == pytest.approx((histogram_gap**2).sum(), rel=1e-6)


def test_energy_as_a_factor_is_the_same_mmd(x64):
    p, q = (Particles(r.x, jnp.ones((r.n, 1)), r.weight) for r in (points(0, 5), points(1, 4)))
    np.testing.assert_allclose(mmd2(Product(Energy(), Linear()), p, q), mmd2(Energy(), p, q), rtol=1e-11)


@pytest.mark.slow
def test_single_points(x64):
    x, y = jnp.zeros((1, 2)), jnp.array([[3.0, 4.0]])
    assert mmd2(Energy(), x, y, estimator="v") == 10  # 2|x − y|
    assert mmd2(RBF(1.0), x, y) == pytest.approx(2 - 2 * np.exp(-25 / 2))
    one_left = Particles(jnp.ones((3, 2)), weight=jnp.array([0.0, 5.0, 0.0]))
    # what the guidance needs, which moves one particle by the references alone; an estimate is refused
    assert self_term(RBF(1.0), one_left, "u") == 0
    gradient = jax.grad(lambda w: self_term(RBF(1.0), Particles(one_left.x, weight=w), "u"))(one_left.weight)
    assert jnp.isfinite(gradient).all()


def test_unbiased_estimates_of_one_particle_are_refused():
    x, y = np.zeros((1, 2), np.float32), np.ones((4, 2), np.float32)
    for weight in ([0, 5, 0, 0], [1, 1e-39, 0, 0]):  # the second is no share that float32 can hold
        one_left = Particles(y, weight=np.array(weight))
        with pytest.raises(ValueError, match=r'q has 1 samples of weight above 0.*estimator="v"'):
            mmd2(RBF(1.0), y, one_left, estimator="u")
        assert jnp.isfinite(mmd2(RBF(1.0), y, one_left))
    with pytest.raises(ValueError, match=r'p has 1 samples; at least 2 .*give more, or take estimator="v"'):
        mmd2(RBF(1.0), x, y, estimator="u")
    with pytest.raises(ValueError, match="p has 1 samples"):  # shapes are seen inside jit too
        jax.jit(lambda x: mmd2(RBF(1.0), x, y, estimator="u"))(x)
    by_weight = jax.jit(lambda w: mmd2(RBF(1.0), y, Particles(y + 1, weight=w), estimator="u"))
    assert jnp.isnan(by_weight(jnp.array([0.0, 5.0, 0.0, 0.0])))
    assert jnp.isfinite(by_weight(jnp.array([0.0, 5.0, 1e-6, 0.0])))


@pytest.mark.parametrize("small", [1e-2, 1e-5, 1e-6, 1e-7, 1e-20])
def test_unequal_weights_keep_their_digits(small):
    """Of three particles, so that 1 − Σu² has other terms than one product; in float32 against loops in float64."""
    x, y = np.array([[0.0], [1.0], [3.0]], np.float32), np.array([[0.0], [0.5], [2.0]], np.float32)
    weight = np.array([1, small, small / 2], np.float32)
    gram = lambda a, b: np.exp(-((a.astype(float)[:, None] - b.astype(float)[None]) ** 2).sum(-1) / 2)
    p, q = (w.astype(float) / w.astype(float).sum() for w in (np.ones(3), weight))
    own = lambda k, w: (
        sum(w[i] * w[j] * k[i, j] for i in range(3) for j in range(3) if i != j)
        / sum(w[i] * w[j] for i in range(3) for j in range(3) if i != j)
    )
    expected = own(gram(x, x), p) - 2 * p @ gram(x, y) @ q + own(gram(y, y), q)
    value = mmd2(RBF(1.0), x, Particles(y, weight=weight), estimator="u")
    assert float(value) == pytest.approx(expected, abs=1e-6)  # of kernel values of 1, in float32
    slope = jax.grad(lambda w: mmd2(RBF(1.0), x, Particles(y, weight=w), estimator="u"))(jnp.asarray(weight))
    assert jnp.isfinite(slope).all()


@pytest.mark.parametrize("weight", [1e38, 3e38, 1e-37, np.float16(60_000)])
def test_equal_weights_of_any_size_are_equal_weights(weight):
    p, q = (Particles(jnp.asarray(points(i, 5).x, jnp.float32)) for i in (0, 1))
    weighted = Particles(p.x, weight=np.full(5, weight, np.asarray(weight).dtype if weight == 60_000 else np.float32))
    for estimator in ("u", "v"):
        value, equal = (mmd2(RBF(1.0), r, q, estimator=estimator) for r in (weighted, p))
        assert float(value) == pytest.approx(float(equal), abs=1e-6)  # 1/5 to rounding, of kernel values of 1


@pytest.mark.parametrize("kernel", [RBF, Laplacian, IMQ, RationalQuadratic])
def test_bandwidths_that_squares_cannot_hold_are_named(kernel):
    for h in (1e-30, 1e20, (1.0, 1e-25), np.float32(1e-20)):
        with pytest.raises(ValueError, match=r"bandwidth is .*, whose square overflows or underflows in float32"):
            kernel(h)
    with jax.enable_x64(True):
        kernel(1e-30)
    kernel(1.1e-19)  # its square is the least number of float32


FAR = {
    "rbf": (RBF(1.0), lambda d: -(d**2) / 2),
    "rbf mixture": (RBF((0.5, 1.0)), lambda d: np.logaddexp(-2 * d**2, -(d**2) / 2)),
    "laplacian": (Laplacian(0.01), lambda d: -100 * d),
    "matern": (Matern32(0.01), lambda d: np.log1p(100 * 3**0.5 * d) - 100 * 3**0.5 * d),
    "imq": (IMQ(1.0), lambda d: -0.5 * np.log1p(d**2)),
    "rational quadratic": (RationalQuadratic(1.0, 20.0), lambda d: -20 * np.log1p(d**2 / 40)),
    "sum": (Sum(RBF(1.0), Laplacian(0.01)), lambda d: np.logaddexp(-(d**2) / 2, -100 * d)),
    "mapped": (Mapped(lambda x: 2 * x, RBF(2.0)), lambda d: -(d**2) / 2),
}


@pytest.mark.parametrize("name", FAR)
def test_attribution_far_away_is_its_limit(name):
    kernel, log = FAR[name]
    z, y = np.array([[0.5, 0.0], [30.0, 1.0], [1e5, 3.0]], np.float32), np.eye(3, 2, dtype=np.float32)
    v = np.array([0.5, 0.3, 0.2])
    distance = np.linalg.norm(z.astype(float)[:, None] - y, axis=-1)
    logits = np.log(v) + log(distance)
    expected = np.exp(logits - logits.max(1, keepdims=True))
    expected /= expected.sum(1, keepdims=True)
    refs = Particles(y, weight=v.astype(np.float32))
    shares = np.asarray(attribution(kernel, z, refs))
    # 1e5 away float32 knows distances to .008 and their squares to 1e3: only which one is nearest
    np.testing.assert_allclose(shares[:2], expected[:2], rtol=1e-2 if name == "laplacian" else 2e-4, atol=1e-7)
    assert np.isfinite(shares).all()
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-6)
    slope = jax.grad(lambda z: (attribution(kernel, z, refs) ** 2).sum())(z)
    assert jnp.isfinite(slope).all()


def test_attribution_where_nothing_pulls():
    z = Particles(np.zeros((2, 2), np.float32) + 100, cond=np.array([1, 2]))
    refs = Particles(np.eye(3, 2, dtype=np.float32), cond=np.array([0, 1, 1]))
    shares = attribution(Product(RBF(1.0), Delta()), z, refs)
    np.testing.assert_allclose(shares, [[0, 1, 0], [0, 0, 0]], atol=1e-6)  # no reference has label 2


# --- derivatives where they are delicate --------------------------------------------------------------------------


def coincident(nudge):
    y = jax.random.normal(jax.random.key(0), (4, 40)) + 5
    x = jnp.concatenate(
        [y[:2] * (1 + nudge), y[:1], y[:1]]
    )  # on, or a rounding error beside, references and each other
    cond = jnp.ones((4, 3))
    return Particles(x, cond), Particles(y, cond)


@pytest.mark.parametrize(
    "kernel",
    [pytest.param(k, marks=() if name in ("energy", "cosine") else SLOW) for name, k in KERNELS.items()],
    ids=KERNELS,
)
def test_derivatives_are_finite_where_points_coincide(kernel):
    kernel = Product(Energy(), Linear()) if kernel is KERNELS["product"] else kernel
    cond = coincident(0.0)[0].cond

    @jax.jit
    def derivatives(x, y):
        gradient = jax.grad(lambda x, y: both(kernel, Particles(x, cond), Particles(y, cond)), argnums=(0, 1))
        return gradient(x, y), jax.jvp(gradient, (x, y), (jnp.ones_like(x), jnp.zeros_like(y)))

    for nudge in (0.0, 1e-7):  # 1e-7: d² by matrix products is negative for some, and clipped
        p, q = coincident(nudge)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(derivatives(p.x, q.x)))


def plain_rbf_mmd2(x, y, h):
    def mean(a, b):
        return jnp.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * h**2)).mean()

    return mean(x, x) - 2 * mean(x, y) + mean(y, y)


@pytest.mark.slow
def test_second_derivatives_of_rbf(x64):
    x, y = generated_and_references()
    x = x.at[1].set(x[0]).at[2].set(y[0])  # with coincident points
    v = jax.random.normal(jax.random.key(0), x.shape, float)
    f = functools.partial(mmd2, RBF(2.5))
    along = jax.jit(lambda x: jax.jvp(lambda x: jax.grad(f)(x, y), (x,), (v,)))
    gradient, product = along(x)
    plain = jax.jit(lambda x: jax.jvp(lambda x: jax.grad(plain_rbf_mmd2)(x, y, 2.5), (x,), (v,)))
    plain_gradient, plain_product = plain(x)
    np.testing.assert_allclose(gradient, plain_gradient, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(product, plain_product, rtol=1e-10, atol=1e-13)
    reverse = jax.jit(jax.grad(lambda x: jnp.vdot(jax.grad(f)(x, y), v)))(x)
    np.testing.assert_allclose(reverse, plain_product, rtol=1e-10, atol=1e-13)
    forward = jax.jit(lambda x: jax.jvp(lambda x: f(x, y), (x,), (v,))[1])(x)
    np.testing.assert_allclose(forward, jnp.vdot(plain_gradient, v), rtol=1e-10)


@some_kernels
def test_gradient_is_the_finite_difference(kernel, x64):
    p, q = points(0, 5), points(1, 4)
    v = jax.random.normal(jax.random.key(0), p.x.shape, float)

    def f(step):
        return mmd2(kernel, Particles(p.x + step * v, p.cond, p.weight), q)

    difference = (f(1e-5) - f(-1e-5)) / 2e-5  # error: 1e-10 of the third derivative and 1e-16/1e-5 of rounding
    np.testing.assert_allclose(jax.jvp(f, (0.0,), (1.0,))[1], difference, rtol=1e-7, atol=1e-8)


# --- types, precision, errors -------------------------------------------------------------------------------------


@jax.jit
def value_and_gradient(kernel, x, cond, q):
    return jax.value_and_grad(lambda x: mmd2(kernel, Particles(x, cond), q))(x)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=SLOW)])
@pytest.mark.parametrize(
    "kernel",
    [Polynomial(), Cosine(), *(pytest.param(k, marks=SLOW) for k in (RBF(1.3), Energy(), Product(RBF(), Cosine())))],
)
def test_half_precision_is_computed_in_float32(dtype, kernel):
    p, q = (Particles(r.x.astype(dtype), r.cond.astype(dtype)) for r in (points(0, 5), points(1, 4)))
    wide_p, wide_q = (Particles(r.x.astype("float32"), r.cond.astype("float32")) for r in (p, q))
    value, gradient = value_and_gradient(kernel, p.x, p.cond, q)
    wide_value, wide = value_and_gradient(kernel, wide_p.x, wide_p.cond, wide_q)
    assert value.dtype == jnp.float32
    assert value == wide_value
    assert gradient.dtype == dtype
    np.testing.assert_allclose(gradient.astype("float32"), wide, rtol=4e-3, atol=1e-7)  # rounded once, at the end: 2⁻⁸


@each_kernel
def test_every_product_is_in_full_precision(kernel):
    # accelerators multiply in bfloat16 or TF32 unless told not to; MMD² is a difference of near-equal sums
    if kernel is KERNELS["custom"]:
        pytest.skip("the user's product")
    p, q = points(0, 5), points(1, 4)
    kernel = kernel.fit(q)
    for f in (
        lambda x: mmd2(kernel, Particles(x, p.cond), q, estimator="u"),
        lambda x: witness(kernel, Particles(x, p.cond), q, q),
        lambda x: kernel.gradient(Particles(x, p.cond), q, jnp.ones(4))[0],
        jax.grad(lambda x: mmd2(kernel, Particles(x, p.cond), q)),
    ):
        program = str(jax.make_jaxpr(f)(p.x))
        assert 0 < program.count("dot_general[") == program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")


def test_shape_mistakes_name_both_shapes():
    with pytest.raises(ValueError, match=r"p\.x has shape \(5, 6\) but q\.x has \(4, 7\)"):
        mmd2(RBF(1.0), jnp.zeros((5, 6)), jnp.zeros((4, 7)))
    with pytest.raises(ValueError, match=r"p\.cond has shape \(5, 2\) but q\.cond has \(4, 3\)"):
        mmd2(
            Product(RBF(1.0), Cosine()), *(Particles(jnp.zeros((n, 6)), jnp.zeros((n, c))) for n, c in ((5, 2), (4, 3)))
        )
    with pytest.raises(ValueError, match=r"points\.x has shape \(3, 2\) but q\.x has \(4, 6\)"):
        witness(RBF(1.0), jnp.zeros((5, 6)), jnp.zeros((4, 6)), jnp.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"p\.x has shape .*'a'.*q\.x has"):
        mmd2(RBF(1.0), {"a": jnp.zeros((5, 6))}, {"b": jnp.zeros((4, 6))})
    with pytest.raises(ValueError, match="conditions"):
        mmd2(Product(RBF(1.0), Delta()), jnp.zeros((2, 2)), Particles(jnp.zeros((2, 2)), jnp.zeros(2)))
    with pytest.raises(TypeError, match="kernel"):
        mmd2(1.0, jnp.zeros((2, 2)), jnp.zeros((2, 2)))


def test_mmd2_under_jit_and_vmap_over_bandwidth():
    p, q = points(0, 5), points(1, 4)
    widths = jnp.array([0.5, 1.0, 2.0])
    swept = jax.jit(jax.vmap(lambda h: mmd2(RBF(h), p, q)))(widths)
    np.testing.assert_allclose(swept, [mmd2(RBF(float(h)), p, q) for h in widths], rtol=1e-5)  # float32 sums


# --- the witness --------------------------------------------------------------------------------------------------


def test_witness_is_positive_where_p_has_more():
    p, q = jnp.zeros((3, 2)), jnp.full((3, 2), 4.0)
    values = witness(RBF(1.0), p, q, jnp.array([[0.0, 0.0], [2.0, 2.0], [4.0, 4.0]]))
    np.testing.assert_allclose(values, [1, 0, -1], atol=1e-6)  # exp(−16) and rounding


@some_kernels
def test_witness_is_half_the_slope_in_mass(kernel, x64):
    p, q = points(0, 5), points(1, 4)
    kernel = kernel.fit(q)
    f = witness(kernel, p, q, p)
    u, v = p.probabilities(), q.probabilities()
    k_pp, k_pq = kernel.gram(p, p, same=True), kernel(p, q)
    slope = jax.grad(lambda u: u @ k_pp @ u - 2 * u @ k_pq @ v)(u)
    # √ of d² = 1e-15 on the diagonal, which `witness` cannot know to be 0
    np.testing.assert_allclose(slope, 2 * f, rtol=1e-7, atol=1e-7)
    # through the normalised weights: moving mass to particle i costs 2(f_i − Σ u f)
    by_weight = jax.grad(lambda w: mmd2(kernel, Particles(p.x, p.cond, w), q))(u)
    np.testing.assert_allclose(by_weight, 2 * (f - u @ f), rtol=1e-7, atol=1e-7)


def test_witness_slope_moves_the_particles(x64):
    # ∂MMD²/∂x_i = 2 u_i ∇f(x_i)
    p, q = points(0, 5), points(1, 4)
    gradient = jax.jit(jax.grad(lambda x: mmd2(RBF(1.3), Particles(x, weight=p.weight), q)))(p.x)
    slope = jax.jit(jax.grad(lambda z: witness(RBF(1.3), p, q, z).sum()))(p.x)
    np.testing.assert_allclose(gradient, 2 * p.probabilities()[:, None] * slope, rtol=1e-10, atol=1e-13)


def test_mmd2_is_the_witness_gap(x64):
    p, q = points(0, 5), points(1, 4)
    gap = p.probabilities() @ witness(RBF(1.0), p, q, p) - q.probabilities() @ witness(RBF(1.0), p, q, q)
    np.testing.assert_allclose(mmd2(RBF(1.0), p, q), gap, rtol=1e-11)
    np.testing.assert_allclose(cross_term(RBF(1.0), p, q), cross_term(RBF(1.0), q, p), rtol=1e-12)
