"""Kernels against plain formulas, their gradients against autodiff, and what they take from references."""

import copy
import dataclasses
import functools
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mmdjax import (
    IMQ,
    RBF,
    Cosine,
    Delta,
    Energy,
    Laplacian,
    Level,
    Linear,
    Mapped,
    Matern32,
    Matern52,
    MMDGuidance,
    Particles,
    Polynomial,
    Product,
    RationalQuadratic,
    Sum,
    guide_denoiser,
    median_bandwidth,
    mmd2,
)
from mmdjax._files.fingerprint import describe
from mmdjax.kernels import Kernel, Median, NearestNeighbour, Radial, Scaled, as_kernel
from mmdjax.tree import pytree, replace, static

N, M, D = 6, 5, 6  # D above 4: distances by matrix products
EXACT = 1e-11  # float64 rounding of a handful of operations on numbers of order one


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def points(seed, n, d=D, conds=3):
    rng = np.random.default_rng(seed)
    return Particles(jnp.asarray(rng.normal(size=(n, d))), cond=jnp.asarray(rng.normal(size=(n, conds))))


def sine(a, b):
    return jnp.sin(a.x @ b.x.T)


# Each kernel with its formula k(np or jnp, x, y, cond of x, cond of y): no code of mmdjax in it.


def dist2(x, y):
    return ((x[:, None] - y[None]) ** 2).sum(-1)


def matern(xp, r, c):
    return (1 + r + c * r**2) * xp.exp(-r)


def cos(xp, x, y):
    return x @ y.T / xp.sqrt((x**2).sum(1))[:, None] / xp.sqrt((y**2).sum(1))[None]


ORIGIN = np.linspace(-1.0, 1.0, D)
RADIAL = {
    "rbf": (RBF(1.3), lambda xp, x, y, *_: xp.exp(-dist2(x, y) / (2 * 1.3**2))),
    "rbf mixture": (RBF((0.7, 2)), lambda xp, x, y, *_: (xp.exp(-dist2(x, y) / 0.98) + xp.exp(-dist2(x, y) / 8)) / 2),
    "laplacian": (Laplacian(1.3), lambda xp, x, y, *_: xp.exp(-xp.sqrt(dist2(x, y)) / 1.3)),
    "matern32": (Matern32(1.3), lambda xp, x, y, *_: matern(xp, xp.sqrt(3 * dist2(x, y)) / 1.3, 0)),
    "matern52": (Matern52(1.3), lambda xp, x, y, *_: matern(xp, xp.sqrt(5 * dist2(x, y)) / 1.3, 1 / 3)),
    "imq": (IMQ(0.8), lambda xp, x, y, *_: 1 / xp.sqrt(1 + dist2(x, y) / 0.64)),
    "imq mixture": (
        IMQ((0.5, 2)),
        lambda xp, x, y, *_: 0.5 / xp.sqrt(1 + dist2(x, y) / 0.25) + 0.5 / xp.sqrt(1 + dist2(x, y) / 4),
    ),
    "rational quadratic": (RationalQuadratic(1.3, 0.7), lambda xp, x, y, *_: (1 + dist2(x, y) / (1.4 * 1.69)) ** -0.7),
    "energy": (Energy(), lambda xp, x, y, *_: -xp.sqrt(dist2(x, y))),
}
OTHERS = {
    "polynomial": (Polynomial(), lambda xp, x, y, *_: (x @ y.T / x.shape[1] + 1) ** 3),
    "polynomial 2": (Polynomial(2, 0.5), lambda xp, x, y, *_: (x @ y.T / x.shape[1] + 0.5) ** 2),
    "linear": (Linear(), lambda xp, x, y, *_: x @ y.T / x.shape[1]),
    "cosine": (Cosine(), lambda xp, x, y, *_: cos(xp, x, y)),
}
COMPOSED = {
    "sum": (
        Sum(RBF(1.3), Energy(), Linear(), weights=(0.5, 2, -1)),
        lambda xp, x, y, *_: 0.5 * xp.exp(-dist2(x, y) / 3.38) - 2 * xp.sqrt(dist2(x, y)) - x @ y.T / x.shape[1],
    ),
    "product": (
        Product(x=IMQ(0.8), cond=Cosine()),
        lambda xp, x, y, c, e: cos(xp, c, e) / xp.sqrt(1 + dist2(x, y) / 0.64),
    ),
    "energy from an origin": (
        Energy(origin=ORIGIN),
        lambda xp, x, y, *_: xp.sqrt(dist2(x, ORIGIN[None])) + xp.sqrt(dist2(ORIGIN[None], y)) - xp.sqrt(dist2(x, y)),
    ),
    "mapped": (Mapped(jnp.tanh, RBF(0.9)), lambda xp, x, y, *_: xp.exp(-dist2(xp.tanh(x), xp.tanh(y)) / 1.62)),
    "mapped product": (
        Mapped(jnp.tanh, Product(RBF(0.9), Linear())),
        lambda xp, x, y, c, e: xp.exp(-dist2(xp.tanh(x), xp.tanh(y)) / 1.62) * (c @ e.T) / 3,
    ),
    "custom": (as_kernel(sine), lambda xp, x, y, *_: xp.sin(x @ y.T)),
}
ALL = RADIAL | OTHERS | COMPOSED
kernels = functools.partial(pytest.mark.parametrize, ("kernel", "formula"))


def named(table):
    return kernels(list(table.values()), ids=list(table))


def some(table, *quick):
    """As `named`; the kernels that are not of these are slow ones, each like one of these."""
    marks = {name: () if name in quick else pytest.mark.slow for name in table}
    return kernels([pytest.param(*row, marks=marks[name]) for name, row in table.items()], ids=list(table))


# --- Gram matrices ------------------------------------------------------------------------------------------------


def values(formula, a, b):
    return formula(np, *map(np.asarray, (a.x, b.x, a.cond, b.cond)))


@named(ALL)
def test_gram_is_the_formula(kernel, formula, x64):
    a, b = points(0, N), points(1, M)
    np.testing.assert_allclose(kernel(a, b), values(formula, a, b), rtol=EXACT, atol=EXACT)


@named(RADIAL)
def test_gram_is_the_formula_in_the_plane(kernel, formula, x64):
    a, b = points(0, N, 2), points(1, M, 2)  # distances without matrix products
    np.testing.assert_allclose(kernel(a, b), values(formula, a, b), rtol=EXACT, atol=EXACT)


@named(ALL)
def test_gram_is_symmetric(kernel, formula, x64):
    a, b = points(0, N), points(1, M)
    np.testing.assert_allclose(kernel(a, b), kernel(b, a).T, rtol=EXACT, atol=EXACT)
    np.testing.assert_allclose(kernel(a, a), values(formula, a, a), rtol=EXACT, atol=EXACT)


coordinates = st.floats(-4, 4, allow_subnormal=False, width=32) | st.sampled_from([0.0, 1.0])  # coincidences too
rows = arrays(np.float64, (N, D), elements=coordinates)
hypothesis = settings(deadline=None, max_examples=15, derandomize=True, phases=[Phase.generate])  # a failure ends soon


def smallest_eigenvalue(gram):
    return np.linalg.eigvalsh(np.asarray(gram)).min() / max(1.0, np.abs(gram).max())


@named({k: v for k, v in ALL.items() if k not in ("energy", "sum", "custom")})
@hypothesis
@given(x=rows, seed=st.integers(0, 5))
def test_gram_is_positive_semidefinite(kernel, formula, x, seed):
    with jax.enable_x64(True):
        gram = kernel(p := Particles(x, points(seed, N).cond), p)
        assert smallest_eigenvalue(gram) > -1e-7  # √ turns the 1e-15 of a cancelled d² into 3e-8


@hypothesis
@given(x=rows)
def test_energy_is_conditionally_positive_definite(x):
    with jax.enable_x64(True):
        gram = Energy()(p := Particles(x), p)
        centring = np.eye(N) - 1 / N
        assert smallest_eigenvalue(centring @ np.asarray(gram) @ centring) > -1e-7


@pytest.mark.slow
@hypothesis
@given(x=rows, weight=arrays(np.float64, N, elements=st.floats(0.125, 1)))
@pytest.mark.parametrize("x_kernel", [Energy(), Sum(Energy(), RBF(1.0)), Mapped(jnp.tanh, Energy())])
def test_energy_as_a_factor_is_positive_semidefinite(x_kernel, x, weight):
    with jax.enable_x64(True):
        p = Particles(x, np.arange(N) % 2, weight)
        kernel = Product(x=x_kernel, cond=Delta()).fit(p)
        assert smallest_eigenvalue(kernel(p, p)) > -1e-7


def test_energy_as_a_factor_has_the_reference_mean_as_origin(x64):
    refs = Particles(points(0, N).x, cond=jnp.zeros((N, 1)), weight=jnp.arange(N) + 0.5)
    mean = np.average(refs.x, axis=0, weights=refs.weight)
    np.testing.assert_allclose(Product(Energy(), Delta()).fit(refs).x.origin, mean, rtol=EXACT)
    assert Energy().fit(refs).origin is None  # alone it stays −|x − y|


@hypothesis
@given(x=rows, shift=arrays(np.float64, D, elements=st.floats(-100, 100)))
def test_rbf_is_translation_invariant(x, shift):
    with jax.enable_x64(True):
        p, q = Particles(x[:4]), Particles(x[4:])
        moved = RBF(1.5)(Particles(p.x + shift), Particles(q.x + shift))
        np.testing.assert_allclose(moved, RBF(1.5)(p, q), atol=1e-11)  # x + shift rounds at 1e-14, d² at 1e-12


@named({k: v for k, v in ALL.items() if k not in ("energy from an origin", "mapped", "mapped product", "custom")})
def test_a_pytree_is_its_flattened_array(kernel, formula, x64):
    a, b = points(0, N), points(1, M)
    np.testing.assert_allclose(kernel(tree(a), tree(b)), kernel(a, b), rtol=EXACT, atol=EXACT)
    gradient, _ = kernel.gradient(tree(a), tree(b), jnp.ones(M))
    expected, _ = kernel.gradient(a, b, jnp.ones(M))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=EXACT), gradient, tree(Particles(expected)).x)


def tree(p):
    return Particles({"a": p.x[:, :4].reshape(-1, 2, 2), "b": p.x[:, 4:]}, p.cond)


@pytest.mark.slow
def test_mapped_and_energy_take_pytrees(x64):
    a, b = points(0, N), points(1, M)
    flattened = Mapped(lambda x: jnp.concatenate([x["a"].reshape(-1, 4), x["b"]], 1), RBF(1.3))
    np.testing.assert_allclose(flattened(tree(a), tree(b)), RBF(1.3)(a, b), rtol=EXACT)
    split = Mapped(lambda x: {"a": x[:, :4], "b": x[:, 4:]}, RBF(1.3))
    np.testing.assert_allclose(split(a, b), RBF(1.3)(a, b), rtol=EXACT)
    np.testing.assert_allclose(split.gradient(a, b, jnp.ones(M))[0], RBF(1.3).gradient(a, b, jnp.ones(M))[0], rtol=1e-9)
    factor, plain = Energy().fit_factor(tree(b)), Energy().fit_factor(b)
    np.testing.assert_allclose(factor(tree(a), tree(b)), plain(a, b), rtol=EXACT)


def test_delta_is_exact_match():
    a, b = jnp.array([3, 0, 3]), jnp.array([0, 3])
    assert Delta()(Particles(a), Particles(b)).tolist() == [[0, 1], [1, 0], [0, 1]]
    a = Particles({"label": a, "view": jnp.array([[0.0, 1.0], [0.0, 1.0], [0.0, 2.0]])})
    assert Delta()(a, a).tolist() == np.eye(3).tolist()  # every entry of every leaf counts
    assert Delta()(a, a).dtype == jnp.float32
    strings_of_tokens = Particles(jnp.array([[1, 2], [1, 3]], jnp.uint8))
    assert Delta()(strings_of_tokens, strings_of_tokens).tolist() == [[1, 0], [0, 1]]


def test_a_product_keeps_labels_apart():
    p = Particles(jnp.zeros((3, 2)), jnp.array([0, 1, 0]))
    assert Product(RBF(1.0), Delta())(p, p).tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]


def test_sum_and_tuple_of_bandwidths_agree():
    a, b = points(0, N), points(1, M)
    for kernel in (RBF, Laplacian, IMQ, RationalQuadratic):
        mixture = Sum(kernel(0.5), kernel(2.0), kernel(3.0), weights=(1 / 3,) * 3)
        np.testing.assert_allclose(kernel((0.5, 2.0, 3.0))(a, b), mixture(a, b), rtol=1e-5)  # float32 rounding
    assert Sum(RBF(1.0), RBF(1.0)).weights == (1.0, 1.0)


def test_cosine_of_a_zero_vector_is_zero_with_finite_gradient():
    p = Particles(jnp.zeros((1, 5)))
    gradient, _ = Cosine().gradient(p, points(0, M, 5), jnp.ones(M), precondition="length")
    assert Cosine()(p, p).tolist() == [[0.0]]
    assert jnp.isfinite(gradient).all()


# --- gradients ----------------------------------------------------------------------------------------------------


@named(ALL)
@pytest.mark.parametrize("matrix", [False, True])
def test_gradient_is_that_of_the_formula(kernel, formula, matrix, x64):
    a, b = points(0, N), points(1, M)
    coef = jax.random.normal(jax.random.key(2), (N, M) if matrix else (M,), float)
    expected = jax.grad(lambda x: (coef * formula(jnp, x, b.x, a.cond, b.cond)).sum())(a.x)
    gradient, one = kernel.gradient(a, b, coef)
    np.testing.assert_allclose(gradient, expected, rtol=EXACT, atol=EXACT)
    np.testing.assert_allclose(
        jax.grad(lambda x: (coef * kernel(Particles(x, a.cond), b)).sum())(a.x), expected, atol=EXACT
    )
    assert one.tolist() == [1.0] * N


@some(ALL, "rbf", "energy", "polynomial", "cosine", "product", "energy from an origin")
def test_gradient_among_the_same_points(kernel, formula, x64):
    a = points(0, N)
    coef = jax.random.normal(jax.random.key(2), (N, N), float)

    def of_row(x, i):  # the pairs of row i with all others
        others = np.delete(np.arange(N), i)
        return coef[i, others] @ formula(jnp, x[None], a.x[others], a.cond[i][None], a.cond[others])[0]

    expected = jnp.stack([jax.grad(of_row)(a.x[i], i) for i in range(N)])
    off_diagonal, _ = kernel.gradient(a, a, coef * (1 - jnp.eye(N)), same=True)
    np.testing.assert_allclose(off_diagonal, expected, rtol=EXACT, atol=EXACT)
    gradient, _ = kernel.gradient(a, a, coef, same=True)  # the second argument is held on the diagonal also
    by_gram = jax.grad(lambda x: (coef * kernel.gram(Particles(x, a.cond), a, same=True)).sum())(a.x)
    np.testing.assert_allclose(gradient, by_gram, rtol=EXACT, atol=EXACT)


@named(RADIAL)
def test_a_point_does_not_pull_itself(kernel, formula):
    a = Particles(points(0, N).x.astype("float32") + 100)
    gradient, _ = kernel.gradient(a, a, jnp.eye(N), same=True)
    scale = kernel.weight(jnp.zeros(())) * jnp.abs(a.x - a.x.mean(0)).max()
    assert jnp.abs(gradient).max() <= 1e-6 * scale  # float32 rounding of (x − centre) − (x − centre)


LENGTHS = [  # kernel, its components (weight, kernel, ℓ² as a function of x)
    (RBF(1.3), [(1, RBF(1.3), 1.69)]),
    (Laplacian(1.3), [(1, Laplacian(1.3), 1.69)]),
    (RBF((0.7, 2.0)), [(0.5, RBF(0.7), 0.49), (0.5, RBF(2.0), 4)]),
    (IMQ((0.7, 2.0)), [(0.5, IMQ(0.7), 0.49), (0.5, IMQ(2.0), 4)]),
    (RationalQuadratic(1.3, 0.7), [(1, RationalQuadratic(1.3, 0.7), 1.69)]),
    (Energy(length=3.0), [(1, Energy(), 3)]),
    (Energy(origin=ORIGIN, length=3.0), [(1, Energy(origin=ORIGIN), 3)]),
    (Polynomial(), [(1, Polynomial(), D)]),
    (Linear(), [(1, Linear(), D)]),
    (Cosine(), [(1, Cosine(), lambda x: (x**2).sum(1, keepdims=True))]),
    (Sum(RBF(1.3), Polynomial(), weights=(2, -1)), [(2, RBF(1.3), 1.69), (-1, Polynomial(), D)]),
    (Product(IMQ(0.7), Cosine()), [(1, Product(IMQ(0.7), Cosine()), 0.49)]),
    (Mapped(lambda x: x[:, :4], Linear()), [(1, Mapped(lambda x: x[:, :4], Linear()), 4)]),
]


@pytest.mark.parametrize(("kernel", "components"), LENGTHS, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("matrix", [False, True])
def test_length_multiplies_each_component(kernel, components, matrix, x64):
    a, b = points(0, N), points(1, M)
    coef = jax.random.normal(jax.random.key(2), (N, M) if matrix else (M,), float)
    gradient, one = kernel.gradient(a, b, coef, precondition="length")
    expected = sum(
        weight * (length2(a.x) if callable(length2) else length2) * k.gradient(a, b, coef)[0]
        for weight, k, length2 in components
    )
    np.testing.assert_allclose(gradient, expected, rtol=EXACT, atol=EXACT)
    assert one.tolist() == [1.0] * N


def test_length_is_refused_where_there_is_none():
    a = points(0, N)
    with pytest.raises(ValueError, match=r"a function \(a, b\) -> Gram has no length"):
        as_kernel(sine).gradient(a, a, jnp.ones(N), precondition="length")
    with pytest.raises(ValueError, match="fit"):
        Energy().gradient(a, a, jnp.ones(N), precondition="length")


@named(RADIAL)
def test_mass_is_minus_two_profile_slopes(kernel, formula, x64):
    a, b = points(0, N), points(1, M)
    slope = jax.vmap(jax.vmap(jax.grad(kernel.profile)))(dist2(a.x, b.x))
    for coef in (jax.random.normal(jax.random.key(2), (M,)), jax.random.normal(jax.random.key(2), (N, M))):
        _, mass = kernel.gradient(a, b, coef, precondition="mass")
        np.testing.assert_allclose(mass, (jnp.abs(coef) * -2 * slope).sum(1), rtol=EXACT)
    c = jnp.array(-0.3)
    two = Sum(kernel, RBF(1.0), weights=(2.0, -0.5))  # what pushes and what pulls both weigh
    _, mass = two.gradient(a, b, c * jnp.ones(M), precondition="mass")
    own = -2 * slope.sum(1) * 0.6 + 0.15 * jnp.exp(-dist2(a.x, b.x) / 2).sum(1)
    np.testing.assert_allclose(mass, own, rtol=EXACT)
    product = Product(kernel, Cosine())
    if isinstance(kernel, Energy):  # not positive definite on its own
        with pytest.raises(ValueError, match="Energy inside Product needs an origin"):
            product.gradient(a, b, jnp.ones(M), precondition="mass")
        return
    _, mass = product.gradient(a, b, jnp.ones(M), precondition="mass")
    np.testing.assert_allclose(mass, (jnp.abs(cos(jnp, a.cond, b.cond)) * -2 * slope).sum(1), rtol=EXACT)


def test_an_origin_weighs_as_one_more_point(x64):
    a, b = points(0, N), points(1, M)
    coef = jnp.linspace(-1, 2, M)
    _, mass = Energy(origin=ORIGIN).gradient(a, b, coef, precondition="mass")
    expected = (jnp.abs(coef) / jnp.sqrt(dist2(a.x, b.x))).sum(1) + jnp.abs(coef.sum()) / jnp.linalg.norm(
        a.x - ORIGIN, axis=1
    )
    np.testing.assert_allclose(mass, expected, rtol=EXACT)


WITHOUT_MASS = {
    **OTHERS,
    "delta": (Delta(), None),
    "mapped": (Mapped(jnp.tanh, RBF(1.0)), None),
    "custom": (as_kernel(sine), None),
    "sum": (Sum(RBF(1.0), Linear()), None),
    "product": (Product(Polynomial(), Delta()), None),
}


@named(WITHOUT_MASS)
def test_only_radial_kernels_have_mass(kernel, formula):
    a = points(0, N)
    assert not kernel.has_mass
    with pytest.raises(ValueError, match="mass"):
        kernel.gradient(a, a, jnp.ones(N), precondition="mass")


@named(RADIAL)
def test_radial_kernels_have_mass(kernel, formula):
    assert kernel.has_mass
    assert Product(Sum(kernel, RBF(1.0)), Delta()).has_mass


def test_which_kernels_compare_conditions():
    assert Product(RBF(1.0), Delta()).uses_cond
    assert Sum(RBF(1.0), Product(RBF(1.0), Delta())).uses_cond
    assert Mapped(jnp.tanh, Product(RBF(1.0), Delta())).uses_cond
    assert not Mapped(jnp.tanh, RBF(1.0)).uses_cond
    assert not RBF(1.0).uses_cond


# --- what comes from the references -------------------------------------------------------------------------------


def numpy_median(x):
    return np.median(np.sqrt(dist2(x, x))[np.triu_indices(len(x), 1)])


def numpy_nearest(x, k=1):
    """The median distance to the k-th nearest distinct other row, or to the last where there are fewer."""
    rows = [np.sort(row[row > 0]) for row in np.sqrt(dist2(x, x))]
    return np.median([row[min(k, len(row)) - 1] for row in rows])


@pytest.mark.parametrize(
    ("n", "d"),
    [(2, 3), *(pytest.param(*size, marks=pytest.mark.slow) for size in ((2, 20), (7, 3), (7, 20), (10, 3), (10, 20)))],
)
def test_bandwidth_rules_against_numpy(n, d):
    x = np.random.default_rng(n).normal(size=(n, d)).astype(np.float32)
    x = np.concatenate([x, x[:2], 99 * np.ones((3, d), np.float32)])  # two duplicates, three empty slots
    weight = np.r_[np.linspace(0.1, 3, n + 2), np.zeros(3)]
    refs, present = Particles(x, weight=weight), x[: n + 2].astype(float)
    for rule in (RBF, Laplacian, RationalQuadratic):
        assert rule().fit(refs).bandwidth == pytest.approx(numpy_median(present), rel=1e-5)  # float32 rounding
    neighbourhood = min(0.8 * numpy_nearest(present, round((n + 2) ** 0.5)), 3.5 * numpy_nearest(present))
    assert IMQ().fit(refs).bandwidth == pytest.approx(neighbourhood, rel=1e-5)
    assert median_bandwidth(refs) == pytest.approx(numpy_median(present), rel=1e-5)
    assert Energy().fit(refs).length == pytest.approx(numpy_median(present), rel=1e-5)
    mixture = RBF((1, None, Median(0.5), NearestNeighbour(3.0))).fit(refs).bandwidth
    expected = (1, numpy_median(present), numpy_median(present) / 2, 3 * numpy_nearest(present))
    np.testing.assert_allclose(mixture, expected, rtol=1e-5)


def test_bandwidth_rule_may_be_a_function():
    refs = points(0, N)
    kernel = RBF(lambda refs: refs.x.std())
    assert kernel.fit(refs).bandwidth == refs.x.std()
    assert jax.jit(lambda k: k.fit(refs).bandwidth)(kernel) == pytest.approx(float(refs.x.std()))


@pytest.mark.parametrize("rule", [RBF, IMQ, Laplacian, RationalQuadratic])
def test_equal_references_give_nan_under_jit(rule):
    assert jnp.isnan(jax.jit(lambda x: rule().fit(Particles(x)).bandwidth)(jnp.ones((4, 20)) / 3))


@pytest.mark.parametrize("rule", [RBF, IMQ, Laplacian, RationalQuadratic])
def test_one_reference_has_no_bandwidth(rule):
    with pytest.raises(ValueError, match="one reference"):
        rule().fit(Particles(jnp.ones((1, 3))))


@pytest.mark.parametrize("kernel", [RBF(), IMQ(), Laplacian(), RationalQuadratic(), RBF((1.0, None)), RBF(Median(2.0))])
def test_an_unfitted_kernel_names_fit(kernel):
    p = points(0, 3)
    for call in (lambda: kernel(p, p), lambda: kernel.gradient(p, p, jnp.ones(3))):
        with pytest.raises(ValueError, match=r"kernel\.fit"):
            call()


@pytest.mark.parametrize(
    "bandwidth", [0, -1.0, (1.0, 0.0), np.float32(-2), Median(0.0), float("nan"), (), jnp.zeros(())]
)
@pytest.mark.parametrize("kernel", [RBF, IMQ, Laplacian, RationalQuadratic])
def test_bandwidth_must_be_positive(kernel, bandwidth):
    with pytest.raises(ValueError, match="bandwidth"):
        kernel(bandwidth)


def test_an_array_of_bandwidths_is_for_vmap():
    p = points(0, 2)
    kernel = RBF(jnp.array([1.0, 2.0]))
    swept = jax.vmap(lambda k: k(p, p))(kernel)
    np.testing.assert_allclose(swept, [RBF(1.0)(p, p), RBF(2.0)(p, p)], rtol=1e-6)
    with pytest.raises(ValueError, match="bandwidth has shape"):
        kernel(p, p)  # would scale the columns one by one


@pytest.mark.parametrize("kernel", [RBF(), IMQ(), Energy(), Product(Energy(), Linear()), Sum(RBF(), IMQ())])
def test_fit_is_detached(kernel):
    def total(x):
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(kernel.fit(Particles(x, cond=jnp.ones((N, 2))))))

    assert not jax.grad(total)(points(0, N).x).any()


def test_fit_reaches_the_parts():
    refs = Particles(points(0, N).x, cond=points(1, N).x)
    h, feature_h = median_bandwidth(refs), median_bandwidth(jnp.tanh(refs.x))
    assert Sum(RBF(), Laplacian()).fit(refs).kernels[1].bandwidth == h
    assert Mapped(jnp.tanh, RBF()).fit(refs).kernel.bandwidth == feature_h
    assert Product(RBF(), RBF()).fit(refs).cond.bandwidth == median_bandwidth(refs.cond)
    with pytest.raises(ValueError, match="conditions"):
        Product(RBF(), RBF()).fit(Particles(refs.x))


def test_energy_needs_no_length_to_be_evaluated():
    one = Particles(jnp.ones((1, 3)), cond=jnp.zeros(1))
    assert Energy().fit(one)(one, one).tolist() == [[0.0]]
    assert Product(Energy(), Delta()).fit(one)(one, one).tolist() == [[0.0]]


def test_kernels_at_a_noise_level(x64):
    level = Level(0.3, 0.6, 0.8)
    assert RBF(2.0).at_level(level).bandwidth == pytest.approx(np.hypot(1.2, 0.8))
    assert IMQ(2.0).at_level(level).bandwidth == pytest.approx(1.2)
    assert RBF((1.0, 2.0)).at_level(level).bandwidth[1] == pytest.approx(np.hypot(1.2, 0.8))
    scaled = Energy(origin=jnp.asarray(ORIGIN), length=3.0).at_level(level)
    np.testing.assert_allclose(scaled.origin, 0.6 * ORIGIN)
    assert scaled.length == pytest.approx(1.8)
    assert Product(IMQ(2.0), IMQ(2.0)).at_level(level).cond.bandwidth == 2.0  # conditions have no noise


# --- construction -------------------------------------------------------------------------------------------------


def test_construction_errors_say_what_to_give():
    with pytest.raises(ValueError, match="at least one"):
        Sum()
    with pytest.raises(ValueError, match="2 kernels and 1 weights"):
        Sum(RBF(1.0), RBF(2.0), weights=(1.0,))
    with pytest.raises(ValueError, match="degree"):
        Polynomial(degree=0)
    with pytest.raises(TypeError, match="kernel is a callable"):
        as_kernel(3.0)
    with pytest.raises(ValueError, match="conditions"):
        Product(RBF(1.0), Delta())(points(0, 2), Particles(jnp.zeros((2, D))))


def test_a_function_is_told_what_it_serves():
    for precondition in (None, "mass", "length"):
        with pytest.raises(ValueError, match=r'use precondition="none", or write .* subclass of mmdjax.kernels.Scaled'):
            MMDGuidance(kernel=sine, precondition=precondition)
    assert MMDGuidance(kernel=sine, precondition="none").precondition == "none"  # as told
    with pytest.raises(ValueError, match=r'Polynomial is none; use precondition="length" or "none"'):
        MMDGuidance(kernel=Polynomial())

    class Sharper(RBF):
        def value(self, d2, h):
            return jnp.exp(-(d2**2) / h**4)

    with pytest.raises(ValueError, match="in closed form, which exists for RBF only, not Sharper"):
        MMDGuidance(kernel=Sharper(1.0), at="diffused")
    with pytest.raises(ValueError, match=r'Delta is none; use precondition="none"$'):
        MMDGuidance(kernel=Delta())


def test_a_callable_is_a_kernel_anywhere():
    a = points(0, N)
    custom = as_kernel(sine)
    assert isinstance(custom, Kernel)
    assert as_kernel(custom) is custom
    np.testing.assert_array_equal(Sum(sine, sine)(a, a), 2 * sine(a, a))
    np.testing.assert_array_equal(
        Product(sine, Linear())(a, a), sine(a, a) * Linear()(Particles(a.cond), Particles(a.cond))
    )
    assert as_kernel(sine) == as_kernel(sine)  # the same compiled program


def test_new_numbers_compile_nothing():
    gram = jax.jit(lambda kernel, p: kernel(p, p))
    p = points(0, N)
    for kernel in (RBF(1), RBF(1.0), RBF(2.5)):
        gram(kernel, p)
    assert gram._cache_size() == 1
    gram(Sum(RBF(1), IMQ(2.0), weights=(1, 2)), p)
    gram(Sum(RBF(3.0), IMQ(1), weights=(0.5, 1)), p)
    assert gram._cache_size() == 2


def test_bandwidth_is_differentiable(x64):
    a, b = points(0, N), points(1, M)
    slope = jax.grad(lambda h: RBF(h)(a, b).sum())(1.3)
    d2 = dist2(a.x, b.x)
    np.testing.assert_allclose(slope, (jnp.exp(-d2 / 3.38) * d2 / 1.3**3).sum(), rtol=EXACT)


# --- kernels of one's own -----------------------------------------------------------------------------------------


class Matern(Scaled):
    """Of ν = 3/2: (1 + √3 d/h) exp(−√3 d/h), its root without care."""

    def value(self, d2, h):
        r = jnp.sqrt(3 * d2) / h
        return (1 + r) * jnp.exp(-r)

    def value_weight(self, d2, h):
        return 3 / h**2 * jnp.exp(-jnp.sqrt(3 * d2) / h)


COINCIDENT = np.random.default_rng(0).normal(size=(5, 2))[[0, 1, 2, 1, 4]]  # two points are one, and one a reference
AGAINST = np.random.default_rng(1).normal(size=(4, 2)) + np.array([[0.0]] * 3 + [[9.0]])
AGAINST[0] = COINCIDENT[2]


def matern_mmd2(x, y, h):
    def mean(a, b):
        r = np.sqrt(3 * dist2(a, b)) / h
        return ((1 + r) * np.exp(-r)).mean()

    return mean(x, x) - 2 * mean(x, y) + mean(y, y)


def matern_slopes(x, y, h):
    """∂MMD²/∂x [n, d] and ∂²MMD²/∂x² [n, d, n, d].

    ∂k/∂a = −w (a − b), ∂²k/∂a² = −w I + w √3/(h d) (a − b)(a − b)ᵀ.
    """
    (n, d), m = x.shape, len(y)
    gradient, hessian = np.zeros((n, d)), np.zeros((n, d, n, d))
    for i in range(n):
        for others, scale in ((x, 2 / n**2), (y, -2 / (n * m))):
            for j, b in enumerate(others):
                apart, distance = x[i] - b, np.linalg.norm(x[i] - b)
                w = 3 / h**2 * np.exp(-np.sqrt(3) * distance / h)
                gradient[i] -= scale * w * apart
                if others is x and j == i:
                    continue  # a point is at no distance from itself wherever it is
                bend = -w * np.eye(d)
                if distance > 0:
                    bend += w * np.sqrt(3) / (h * distance) * np.outer(apart, apart)
                hessian[i, :, i] += scale * bend
                if others is x:
                    hessian[i, :, j] -= scale * bend
    return gradient, hessian


def test_own_kernel_is_the_formula_also_at_distance_zero(x64):
    def f(x, h):
        return mmd2(Matern(h), x, AGAINST)

    @jax.jit
    def derivatives(x, h):
        return {
            "value": f(x, h),
            "x": jax.grad(f)(x, h),
            "x x, forward over reverse": jax.hessian(f)(x, h),
            "x x, reverse over reverse": jax.jacrev(jax.jacrev(f))(x, h),
            "h": jax.grad(f, 1)(x, h),
            "x h": jax.jacfwd(jax.grad(f), 1)(x, h),
            "h x": jax.grad(jax.grad(f, 1))(x, h),
            "x x h": jax.jacfwd(jax.hessian(f), 1)(x, h),
            "h x x": jax.hessian(jax.grad(f, 1))(x, h),
        }

    own, step = derivatives(jnp.asarray(COINCIDENT), 1.3), 1e-5
    at = {s: (matern_mmd2(COINCIDENT, AGAINST, 1.3 + s), *matern_slopes(COINCIDENT, AGAINST, 1.3 + s))
          for s in (0.0, step, -step)}  # fmt: skip
    of_h = [(high - low) / (2 * step) for high, low in zip(at[step], at[-step], strict=True)]  # to step² = 1e-10
    for name, expected in zip(("value", "x", "x x"), at[0.0], strict=True):
        for found in (v for k, v in own.items() if k.partition(",")[0] == name):
            np.testing.assert_allclose(found, expected, atol=EXACT, err_msg=name)
    for names, expected in zip((("h",), ("x h", "h x"), ("x x h", "h x x")), of_h, strict=True):
        for name in names:
            np.testing.assert_allclose(own[name], expected, atol=1e-8, err_msg=name)


def test_own_kernel_pulls_and_weighs_by_its_weight(x64):
    a, b, coef = Particles(COINCIDENT), Particles(AGAINST), np.linspace(0.5, -1, 4)
    gradient, mass = Matern(1.3).gradient(a, b, jnp.asarray(coef), precondition="mass")
    w = 3 / 1.3**2 * np.exp(-np.sqrt(3 * dist2(COINCIDENT, AGAINST)) / 1.3)
    apart = COINCIDENT[:, None] - AGAINST[None]
    np.testing.assert_allclose(gradient, -np.einsum("ij,ijd->id", coef * w, apart), atol=EXACT)
    np.testing.assert_allclose(mass, (np.abs(coef) * w).sum(1), atol=EXACT)
    np.testing.assert_allclose(Product(Sum(Matern(1.3)), Delta()).x.pair_weights(a, b), w, atol=EXACT)
    assert Matern().fit(b).bandwidth == pytest.approx(numpy_median(AGAINST))


def test_a_weight_that_is_left_out_is_the_derivative(x64):
    class Cauchy(Scaled):
        def value(self, d2, h):
            return 1 / (1 + d2 / h**2)

    class Narrower(RBF):  # its parent's weight is of another value
        def value(self, d2, h):
            return jnp.exp(-2 * d2 / h**2)

    class Bump(Radial):
        def profile(self, d2):
            return jnp.exp(-(d2**2))

    a, b = Particles(COINCIDENT), Particles(AGAINST)
    d2 = dist2(COINCIDENT, AGAINST)
    for kernel, w in (
        (Cauchy(1.3), 2 / 1.3**2 / (1 + d2 / 1.3**2) ** 2),
        (Narrower(1.3), 4 / 1.3**2 * np.exp(-2 * d2 / 1.3**2)),
        (Bump(), 4 * d2 * np.exp(-(d2**2))),
    ):
        np.testing.assert_allclose(kernel.pair_weights(a, b), w, atol=EXACT)
        gradient = jax.grad(lambda x, k=kernel: k(Particles(x), b).sum())(a.x)
        np.testing.assert_allclose(gradient, -(w[..., None] * (COINCIDENT[:, None] - AGAINST[None])).sum(1), atol=EXACT)


def test_a_weight_that_is_infinite_at_zero_does_not_count_there(x64):
    class Exponential(Scaled):
        def value(self, d2, h):
            return jnp.exp(-jnp.sqrt(d2) / h)

        def value_weight(self, d2, h):
            return self.value(d2, h) / (h * jnp.sqrt(d2))

    class OfValue(Scaled):
        def value(self, d2, h):
            return jnp.exp(-jnp.sqrt(d2) / h)

    @jax.jit
    def uses(kernel, x):
        a, b = Particles(x), Particles(AGAINST)
        once = MMDGuidance(kernel=kernel, inner_steps=1)  # then rounding parts coincident points, which 1/d sees
        moved = guide_denoiser(lambda params, x, level, cond: x, once, AGAINST)
        return {
            "weights": kernel.pair_weights(a, b),
            "of themselves": kernel.pair_weights(a, a, same=True),
            "their derivatives": jax.grad(lambda x, k: k.pair_weights(Particles(x), b).sum(), (0, 1))(x, kernel),
            "MMD²": jax.grad(lambda x, k: mmd2(k, x, AGAINST), (0, 1))(x, kernel),
            "guided": moved(None, x, Level(0.5, 0.8, 0.6), None),
        }

    x = jnp.asarray(COINCIDENT)
    expected = jax.tree.leaves(uses(Laplacian(1.3), x))
    for kernel in (Exponential(1.3), OfValue(1.3)):
        for found, known in zip(jax.tree.leaves(uses(kernel, x)), expected, strict=True):
            np.testing.assert_allclose(found, known, atol=EXACT)


class ByHand(Radial):
    def __init__(self, width, power: int = 1, shift=None):
        self.width, self.power = 2 * width, power
        self.shift = jnp.zeros(2) if shift is None else shift

    def profile(self, d2):
        return jnp.exp(-(d2**self.power) / self.width)


class FurtherByHand(ByHand):
    def __init__(self, width):
        super().__init__(width, power=2)
        self.more = 3


class Inherits(FurtherByHand):
    more_still: float = 1.0


class Annotated(Scaled):
    nu: float = 1.5
    order: int = 2
    name: str = static(default="a")

    def value(self, d2, h):
        return self.nu * jnp.exp(-self.order * d2 / h**2)


class FurtherAnnotated(Annotated):
    extra: Any = None


@pytree
class Decorated(Annotated):
    pass


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RegisteredByHand(Scaled):
    bandwidth: Any = None

    def value(self, d2, h):
        return jnp.exp(-d2 / h**2)


@dataclasses.dataclass
class PlainDataclass(Scaled):
    bandwidth: Any = None

    def value(self, d2, h):
        return jnp.exp(-d2 / h**2)


WAYS = {  # made, its leaves, the same with other numbers
    "by hand": (lambda w: ByHand(w, 1, jnp.ones(2)), [4, (1, 1)]),
    "further by hand": (FurtherByHand, [4, (0, 0), 3]),
    "by hand, inherited": (Inherits, [4, (0, 0), 3, 1]),
    "annotated": (lambda h: Annotated(h, 3), [2, 3]),
    "further annotated": (lambda h: FurtherAnnotated(h, extra=dist2), [2, 1.5]),
    "decorated": (lambda h: Decorated(h, nu=2), [2, 2]),
    "registered by hand": (RegisteredByHand, [2]),
    "dataclass": (PlainDataclass, [2]),
}


@pytest.mark.parametrize("name", WAYS)
def test_own_class_is_a_component(name):
    make, leaves = WAYS[name]
    kernel = make(2)
    assert [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(kernel)] == [np.asarray(v).tolist() for v in leaves]
    assert jax.tree.structure(make(2)) == jax.tree.structure(make(3.0))
    assert describe(make(2)) == describe(make(2.0)) != describe(make(3))
    gram = jax.jit(lambda kernel, p: kernel(p, p))
    p = points(0, 3)
    for k in (kernel, make(2.0), make(3), copy.deepcopy(kernel), replace(kernel)):
        np.testing.assert_allclose(gram(k, p), k(p, p), rtol=1e-6)  # float32, fused
    assert gram._cache_size() == (2 if name == "registered by hand" else 1)  # JAX's own decorator tells 2 from 2.0


def test_own_class_survives_pickling_and_a_second_definition():
    kernel = pickle.loads(pickle.dumps(FurtherByHand(2)))
    assert kernel.more == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        kernel.more = 4
    for width in (1.0, 2.0):  # as a notebook's cell that runs twice

        class Again(Scaled):
            def value(self, d2, h, width=width):
                return jnp.exp(-d2 / (width * h) ** 2)

        p = points(0, 3)
        np.testing.assert_allclose(
            jax.jit(lambda k, p: k(p, p))(Again(1.0), p), np.exp(-dist2(p.x, p.x) / width**2), rtol=1e-5
        )


def test_own_class_says_what_it_lacks():
    class Flagged(Scaled):
        flag: Any = False

    class Undeclared(Radial):
        def __init__(self):
            setattr(self, "wid" + "th", 1.0)

    class Forgetful(Radial):
        def __init__(self, wide):
            if wide:
                self.width = 2.0

    class Constant(Scaled):
        def value(self, d2, h):
            return 1.0

    class Summed(Scaled):
        def value(self, d2, h):
            return jnp.exp(-d2 / h**2)

        def value_weight(self, d2, h):
            return jnp.sum(d2, axis=-1)

    class Empty(Scaled):
        pass

    class Bare(Radial):
        def weight(self, d2):
            return d2

    x = Particles(jnp.arange(6.0).reshape(3, 2))
    for use in (lambda k: k(x, x), lambda k: k.pair_weights(x, x), lambda k: jax.grad(lambda y: mmd2(k, y, x))(x.x)):
        with pytest.raises(ValueError, match=r"Constant.value returned shape \(\) for d2 of shape \(3, 3\)"):
            use(Constant(1.0))
        with pytest.raises(NotImplementedError, match=r"Empty has no value\(d2, h\); write it"):
            use(Empty(1.0))
    with pytest.raises(ValueError, match=r"Summed.value_weight returned shape \(3,\) for d2 of shape \(3, 3\)"):
        Summed(1.0).pair_weights(x, x)
    with pytest.raises(NotImplementedError, match=r"Bare has no profile\(d2\); write it"):
        Bare()(x, x)
    with pytest.raises(AttributeError) as raised:
        as_kernel(lambda a, b: a @ b.T)(x, x)
    assert raised.value.__notes__ == ["A kernel function (a, b) -> Gram gets Particles: the points are a.x and b.x."]
    with pytest.raises(TypeError, match=r"flag is False, a choice, not a number; .* `flag: bool`"):
        Flagged(1.0)
    with pytest.raises(AttributeError, match=r"Undeclared has no field width; declare it .* `width: Any`"):
        Undeclared()
    with pytest.raises(TypeError, match=r"Forgetful.__init__ did not assign width"):
        Forgetful(False)
