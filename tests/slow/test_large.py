"""Points read in blocks: the sums of the plain computation, their derivatives, and memory that does not grow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdjax import (
    IMQ,
    RBF,
    Cosine,
    Delta,
    Energy,
    Laplacian,
    Mapped,
    MMDGuidance,
    Particles,
    Polynomial,
    Product,
    Sum,
    mmd2,
)
from mmdjax._points import blocks
from mmdjax.guidance.bound import bind, fit_kernel
from mmdjax.mmd import cross_term
from mmdjax.tree import replace

N, M, D = 7, 101, 9  # 101 rows are four blocks of 32 at least, the last one overlapping
KERNELS = [
    RBF(2.0),
    RBF((1.0, 3.0)),
    Laplacian(2.0),
    IMQ(1.5),
    Energy(),
    Energy(origin=np.linspace(-1, 1, D)),
    Polynomial(),
    Cosine(),
    Sum(IMQ(1.5), RBF(2.0), weights=(0.5, 2.0)),
    Product(IMQ(1.5), Delta()),
    Product(Energy(origin=np.linspace(-1, 1, D)), Delta()),
    Mapped(jnp.tanh, RBF(1.0)),
]
each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: type(k).__name__)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 32 rows; what was compiled with the usual ones is forgotten, before and after."""
    with jax.enable_x64(True):
        yield functools.partial(use_small_blocks, monkeypatch)
    jax.clear_caches()


def use_small_blocks(monkeypatch):
    for name in ("PLAIN", "CACHED"):
        monkeypatch.setattr(blocks, name, 1)
    jax.clear_caches()


def points(seed, n):
    rng = np.random.default_rng(seed)
    return Particles(jnp.asarray(rng.normal(size=(n, D)) + 3), jnp.asarray(rng.integers(0, 3, n)))


def compare(run, small_blocks, rtol=1e-11):
    plain = run()
    small_blocks()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), run(), plain)


@each_kernel
def test_blocked_gradient_is_the_plain_one(kernel, small_blocks):
    """Gradient and mass; with one weight a reference and with one a pair; among the same points; times its length."""
    a, b = points(0, N), points(1, M)
    among = points(2, M)
    coef = jax.random.normal(jax.random.key(0), (N, M), float)
    rule = "mass" if kernel.has_mass else "none"

    def run():
        return [
            kernel.gradient(a, b, coef, precondition=rule),
            kernel.gradient(a, b, coef[0], precondition=rule),
            kernel.gradient(among, among, coef[0], same=True, precondition=rule),
        ]

    compare(run, small_blocks)


@pytest.mark.parametrize("kernel", [KERNELS[i] for i in (3, 5, 6, 8, 9)], ids=lambda k: type(k).__name__)
def test_derivatives_of_the_blocked_gradient(kernel, small_blocks):
    """Forward, reverse, with respect to the references and the Hessian's action."""
    a, b = points(0, N), points(1, M)
    v = jnp.asarray(np.random.default_rng(3).normal(size=(N, D)))

    def pull(x, y):
        gradient, mass = kernel.gradient(
            replace(a, x=x), replace(b, x=y), jnp.ones(M) / M, precondition="mass" if kernel.has_mass else "none"
        )
        return gradient / mass[:, None]

    def along(x, y):
        return jnp.vdot(pull(x, y), v)

    @jax.jit
    def derivatives(x, y):
        return (
            jax.jvp(lambda x: pull(x, y), (x,), (v,))[1],
            jax.grad(along, (0, 1))(x, y),
            jax.grad(lambda x: jnp.vdot(jax.grad(along)(x, y), v))(x),
        )

    compare(lambda: derivatives(a.x, b.x), small_blocks, rtol=1e-9)


@pytest.mark.parametrize("estimator", ["u", "v"])
def test_blocked_mmd2_is_the_plain_one(estimator, small_blocks):
    a, b = points(0, 150), Particles(points(1, M).x, weight=jnp.arange(M) % 4.0)
    for kernel in (IMQ(1.5), Energy(), Polynomial()):

        def run(kernel=kernel):
            value = functools.partial(mmd2, kernel, estimator=estimator)
            return value(a.x, b), jax.grad(lambda x: value(x, b))(a.x)

        compare(run, small_blocks)


def test_close_pairs_in_blocks(small_blocks):
    """Distances that matrix products lose are computed again in every block."""
    rng = np.random.default_rng(0)
    y = (rng.normal(size=(M, 4096)) + 5).astype(np.float32)
    x = (y[::20] + 1e-3 * rng.normal(size=(6, 4096))).astype(np.float32)
    small_blocks()
    gram = Energy()(Particles(jnp.asarray(x)), Particles(jnp.asarray(y)))
    exact = -np.linalg.norm(x[:, None].astype(float) - y[None].astype(float), axis=-1)
    np.testing.assert_allclose(gram, exact, rtol=1e-3)  # inputs about 5 round at 3e-7, differences are 1e-3


LARGE_N, LARGE_M, LARGE_D = 64, 100_000, 4096


def temporary_megabytes(function, *shapes):
    """What the compiled program needs beside its arguments and results; nothing is run."""
    return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes / 1e6


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        (IMQ(60.0), jnp.float32),
        (IMQ(60.0), jnp.bfloat16),
        (IMQ(60.0), jnp.float16),
        (Polynomial(), jnp.bfloat16),
        (Product(IMQ(60.0), Delta()), jnp.bfloat16),
    ],
)
def test_memory_does_not_grow_with_the_references(kernel, dtype):
    """64 MB beside 1.6 GB of references, 0.8 GB in half precision; also for the gradient's own derivative."""
    x = jax.ShapeDtypeStruct((LARGE_N, LARGE_D), jnp.float32), jax.ShapeDtypeStruct((LARGE_N,), jnp.int32)
    y = jax.ShapeDtypeStruct((LARGE_M, LARGE_D), dtype), jax.ShapeDtypeStruct((LARGE_M,), jnp.int32)

    def pull(x, c, y, e):
        return kernel.gradient(Particles(x, c), Particles(y, e), jnp.full(LARGE_M, 1 / LARGE_M))[0]

    assert temporary_megabytes(pull, *x, *y) < 64
    if not kernel.uses_cond:  # the conditions' Gram, 26 MB, would be held twice
        assert temporary_megabytes(jax.grad(lambda *args: (pull(*args) ** 2).sum()), *x, *y) < 64
    assert temporary_megabytes(lambda x, c, y, e: cross_term(kernel, Particles(x, c), Particles(y, e)), *x, *y) < 64


def test_guidance_makes_no_copy_of_large_references():
    """One call of the default guidance against 800 MB of bfloat16 references, the kernel given: 64 MB beside them."""
    guidance = MMDGuidance(IMQ(60.0))
    x = jax.ShapeDtypeStruct((LARGE_N, LARGE_D), jnp.float32)
    refs = jax.ShapeDtypeStruct((LARGE_M, LARGE_D), jnp.bfloat16)

    def guide(x, refs):
        refs = Particles(refs)
        bound = bind(guidance, fit_kernel(guidance, refs), refs)
        return bound.denoised(x, bound.init(x), 0.5)[0]

    assert temporary_megabytes(guide, x, refs) < 64
