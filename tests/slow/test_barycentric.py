"""Inner steps in barycentric coordinates: the same guidance, its derivatives and its float32 accuracy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdjax import IMQ, RBF, Delta, Energy, Laplacian, Level, Memory, MMDGuidance, Particles, Polynomial, Product, Sum
from mmdjax.guidance.bound import bind
from mmdjax.guidance.coordinates import pays
from mmdjax.tree import replace

N, M, D = 5, 12, 60
LEVEL = Level(0.3, 0.9, 0.4)
GUIDANCE = [
    MMDGuidance(IMQ(6.0)),
    MMDGuidance(RBF((3.0, 9.0)), estimator="v", precondition="length", scale=0.5),
    MMDGuidance(Energy(length=3.0), precondition="mass", inner_steps=3),
    MMDGuidance(Product(IMQ(6.0), Delta())),
    MMDGuidance(Sum(IMQ(5.0), Laplacian(6.0)), at="clean", inner_steps=4, precondition="raw", scale=10.0),
]


def points(seed, n, d=D):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(n, d)) + seed), jnp.arange(n) % 3


def guided(guidance, x, y, *, plain, memory=None):
    (x, cond), (y, cond_y) = x, y
    bound = bind(guidance, guidance.kernel, Particles(y, cond_y), cond, memory)
    assert bound.distances is not None
    bound = replace(bound, distances=None) if plain else bound
    if guidance.at == "clean":
        return bound.after_step(jax.random.key(0), x, bound.init(x), 0.5, LEVEL, LEVEL)
    return bound.denoised(x, bound.init(x), 0.5, LEVEL)


@pytest.mark.parametrize(
    ("guidance", "remembered"), [(g, False) for g in GUIDANCE] + [(GUIDANCE[i], True) for i in (0, 3, 4)]
)
@pytest.mark.parametrize("gap", [0.0, 100.0])
def test_guidance_is_that_among_the_points_themselves(guidance, remembered, gap):
    """Points, trace, and the derivatives of both by batch and references; float64."""
    with jax.enable_x64(True):
        (x, cond), (y, cond_y) = points(0, N), points(1, M)
        x = x + gap * jnp.sin(jnp.arange(D))
        memory = None
        if remembered:
            memory = Memory.empty(4, (D,), cond=jnp.zeros(1, int)).push(Particles(*points(2, 3)))

        def run(x, y, plain):
            found, state = guided(guidance, (x, cond), (y, cond_y), plain=plain, memory=memory)
            return jnp.sum(found**3), (found, state.mmd2, state.shift_norm)

        def all_of(plain):
            return jax.jit(jax.value_and_grad(lambda x, y: run(x, y, plain), (0, 1), has_aux=True))(x, y)

        found, expected = all_of(False), all_of(True)
        assert jnp.abs(found[0][1][0] - x).max() > (0.01 if gap == 0 else 1e-6)  # narrow kernels hardly see so far
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), found, expected)


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("apart", [1e-3, 1e-2, 1.0])  # of the norm: both sides of where products cancel
@pytest.mark.parametrize("wide", [False, True])
def test_float32_beside_references(apart, offset, wide):
    """A batch that lies close to references, against float64; as good as rounding of the points themselves allows."""
    rng = np.random.default_rng(0)
    y = (rng.normal(size=(30, 4096)) + offset).astype(np.float32)
    x = (y[:6] + apart * rng.normal(size=(6, 4096))).astype(np.float32)
    guidance = MMDGuidance(IMQ(64.0 if wide else 64.0 * apart))

    def shift(dtype, plain):
        run = jax.jit(lambda x, y: guided(guidance, (x, None), (y, None), plain=plain)[0] - x)
        return np.asarray(run(jnp.asarray(x, dtype), jnp.asarray(y, dtype)))

    found = shift(jnp.float32, plain=False)
    with jax.enable_x64(True):
        expected = shift(jnp.float64, plain=True)
    rounding = 2**-23 * (1 + offset) * 64  # of 4096 coordinates about the offset
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected) + rounding


@pytest.mark.parametrize("kernel", [IMQ(1e4), Energy(), IMQ(64.0)], ids=["wide", "energy", "narrow"])
def test_float32_far_from_references_is_nearly_as_good_as_on_points(kernel):
    """Digits go with the gap, as they do for points, and not with its square."""
    run = jax.jit(
        lambda x, y, plain: guided(MMDGuidance(kernel), (x, None), (y, None), plain=plain)[0], static_argnums=2
    )
    for gap in (10.0, 100.0, 1000.0):  # in spreads
        rng = np.random.default_rng(0)
        x = (rng.normal(size=(6, 4096)) + gap * rng.normal(size=4096)).astype(np.float32)
        y = rng.normal(size=(30, 4096)).astype(np.float32)
        found, on_points = (np.asarray(run(jnp.asarray(x), jnp.asarray(y), plain)) for plain in (False, True))
        with jax.enable_x64(True):
            expected = np.asarray(run(jnp.asarray(x, float), jnp.asarray(y, float), True))
        error, allowed = (np.sqrt(((v - expected) ** 2).mean()) for v in (found, on_points))
        assert error <= 2 * allowed + 8 * 2**-24 * gap  # a rounding of the gap at each of eight inner steps


def test_only_where_it_pays():
    """Few points in many dimensions, several inner steps, a kernel of distances, and no transform of single points."""
    refs = Particles(points(1, M)[0])

    def known(guidance, refs=refs):
        return bind(guidance, guidance.kernel, refs).distances is not None

    assert known(MMDGuidance(IMQ(1.0)))
    assert not known(MMDGuidance(IMQ(1.0), inner_steps=1))
    assert not known(MMDGuidance(IMQ(1.0), at="sample"))
    assert not known(MMDGuidance(Polynomial(), precondition="none"))
    assert not known(MMDGuidance(Energy(origin=jnp.zeros(D))))
    assert not known(MMDGuidance(IMQ(1.0)), Particles(points(1, M, 20)[0]))
    assert pays(64, 5000, 16384)
    assert not pays(5000, 100, 1024)
