"""Truths about what is avoided: its formula, its bounds, and that it leaves all else as it was."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import ring

from mmdjax import (
    DDIM,
    IMQ,
    RBF,
    Avoid,
    Delta,
    DiffusionModel,
    Energy,
    HostReferences,
    Laplacian,
    Memory,
    MMDGuidance,
    Particles,
    Polynomial,
    Product,
    Sum,
    guide_denoiser,
    guide_sampler,
    guided_sample,
    load_samples,
    mmd2,
    sample_many,
    suggest_guidance,
)
from mmdjax._points import blocks
from mmdjax.guidance.avoid import Shield
from mmdjax.guidance.bound import bind, fit_avoid
from mmdjax.schedules import Level, VPLinear
from mmdjax.tree import replace

N, M, K, D = 7, 11, 9, 5
Z = jax.random.normal(jax.random.key(0), (N, D))
Y = jax.random.normal(jax.random.key(1), (M, D)) + 1.0
A = jax.random.normal(jax.random.key(2), (K, D)) - 0.5
WEIGHT = jnp.linspace(1.0, 2.0, K)
LABELS, OF_Y, OF_A = jnp.arange(N) % 2, jnp.arange(M) % 2, jnp.arange(K) % 2
KEY, T, S = jax.random.key(7), VPLinear()(0.5), VPLinear()(0.3)
MODEL = DiffusionModel(ring(), VPLinear(), (2,))
FORBIDDEN = ring().keep(0, 1).sample(jax.random.key(5), 30)
ALLOWED = ring().keep(0, 2, 4).sample(jax.random.key(6), 40)


def bound_to(guidance, avoid, refs=None, cond=None, memory=None):
    kernel = guidance.base_kernel if refs is not None else None  # with bandwidths given
    return bind(guidance, kernel, refs, cond, memory, avoid=fit_avoid(guidance, kernel, avoid))


def moved(guidance, avoid, refs=None, cond=None, memory=None, z=Z, fraction=0.1, level=None):
    bound = bound_to(guidance, avoid, refs, cond, memory)
    if guidance.placement.moves == "x0_hat":
        return bound.denoised(z, bound.init(z), fraction, level)[0]
    return bound.after_step(KEY, z, bound.init(z), fraction, T, S)[0]


def sample(avoid=None, refs=None, seed=0, **settings):
    how = {"model": MODEL, "num_samples": 32, "num_steps": 12} | settings
    return guided_sample(None, jax.random.key(seed), refs, avoid=avoid, **how)


# --- the formula --------------------------------------------------------------------------------------------------

KERNELS = {
    "imq": IMQ(1.5),
    "laplacian": Laplacian(1.5),
    "energy": Energy(length=2.0),
    "polynomial": Polynomial(),
    "sum": Sum(RBF(1.0), IMQ(2.0), weights=(0.3, 0.7)),
    "product": Product(x=IMQ(1.5), cond=Delta()),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("estimator", ["u", "v"])
def test_step_is_the_gradient_of_mmd2_to_the_signed_measure(name, estimator):
    """By autodiff of MMD²(P, Q) − λ (MMD²(P, A) − E k(z, z')), in the batch and a memory; float64."""
    with jax.enable_x64(True):
        z, y, a = (jnp.asarray(v, jnp.float64) for v in (Z, Y, A))
        past = jax.random.normal(jax.random.key(3), (4, D), jnp.float64)
        kernel, strength = KERNELS[name], 0.7
        memory = Memory.empty(5, (D,), jnp.zeros(1, int)).push(Particles(past, jnp.arange(4) % 2))
        refs, avoid = Particles(y, OF_Y), Particles(a, OF_A, WEIGHT)

        def loss(z):
            joined = Particles(jnp.concatenate([z, past]), jnp.concatenate([LABELS, jnp.arange(4) % 2]))
            own = jnp.mean(kernel(joined, joined))
            if estimator == "u":
                n = N + 4
                own = (own * n**2 - jnp.trace(kernel(joined, joined))) / (n * (n - 1))
            cross = mmd2(kernel, joined, avoid, estimator=estimator) - own
            return mmd2(kernel, joined, refs, estimator=estimator) - strength * cross

        how = {"at": "clean", "inner_steps": 1, "estimator": estimator}
        raw = MMDGuidance(kernel, precondition="raw", **how)
        plain = MMDGuidance(kernel, precondition="none", **how)
        set_apart = Avoid(avoid.x, avoid.cond, avoid.weight, strength=strength)

        @jax.jit
        def both_ways(z):
            found = [z - moved(g, set_apart, refs, LABELS, memory, z) for g in (raw, plain)]
            return jax.grad(loss)(z), *found

        expected, gradient, over_weight = map(np.asarray, both_ways(z))
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-13)  # two ways of summing the same float64 terms
    np.testing.assert_allclose(over_weight, expected * (N + 4), rtol=1e-9, atol=1e-12)


def test_bounded_step_in_loops():
    """λ s Σ a w (z − a) over the largest of three: the mass of A, of the other particles, and w at the reach."""
    z, a, h = np.asarray(Z, np.float64), np.asarray(A, np.float64), 3.0
    w = lambda p, others: (((p - others) ** 2).sum(1) + h**2) ** -1.5
    v = np.asarray(WEIGHT / WEIGHT.sum(), np.float64)
    largest = set()
    for far in (0.0, 1.0, 4.0):
        points, expected = a + far, np.zeros_like(z)
        for i in range(N):
            w_a, w_z = v * w(z[i], points), np.delete(w(z[i], z), i).mean()
            sides = w_a.sum(), w_z, (2 * h**2) ** -1.5
            largest.add(int(np.argmax(sides)))
            expected[i] = 2.0 * 0.05 * (w_a[:, None] * (z[i] - points)).sum(0) / max(sides)
        guidance = MMDGuidance(IMQ(h), at="clean", precondition="mass")
        step = moved(guidance, Avoid(jnp.asarray(points, jnp.float32), weight=WEIGHT, strength=2.0)) - Z
        np.testing.assert_allclose(step, expected, rtol=2e-5, atol=1e-6)  # float32 against float64
    assert len(largest) > 1


@pytest.mark.parametrize("name", ["imq", "laplacian", "energy", "sum", "product"])
def test_bounded_step_is_along_the_gradient_and_bounded(name):
    """The direction of −∂(2 E k(z, a)); no longer than s times the distance to the farthest of A, and finite at A."""
    kernel, avoid = KERNELS[name], Avoid(A, OF_A)
    z = Z.at[0].set(A[0]).at[1].set(1e3)
    steps = [
        moved(MMDGuidance(kernel, at="clean", precondition=rule), avoid, cond=LABELS, z=z) - z
        for rule in ("mass", "none")
    ]
    bounded, gradient = (np.asarray(step, np.float64) for step in steps)
    assert np.isfinite(bounded).all()
    norms = np.linalg.norm(bounded, axis=1), np.linalg.norm(gradient, axis=1)
    np.testing.assert_allclose((bounded * gradient).sum(1)[2:], (norms[0] * norms[1])[2:], rtol=1e-4)
    assert (norms[0] <= 0.05 * np.linalg.norm(z[:, None] - A[None], axis=-1).max(1) + 1e-6).all()
    assert norms[0][2:].min() > 1e-3


@pytest.mark.parametrize(("kernel", "most"), [(RBF(1.0), 0.0), (IMQ(1.0), 1e-5), (Laplacian(1.0), 0.0)])
def test_nothing_moves_far_from_all_that_is_avoided(kernel, most):
    """224 reaches away; of IMQ at most .05 (2 h²/d²)^{3/2} d is left, 3e-6."""
    step = moved(MMDGuidance(kernel, precondition="mass", at="clean"), Avoid(A)) - Z
    far = moved(MMDGuidance(kernel, precondition="mass", at="clean"), Avoid(A + 100.0)) - Z
    assert float(jnp.abs(step).max()) > 1e-3
    assert float(jnp.abs(far).max()) <= most


def test_a_radius_leads_to_the_surface_of_the_ball():
    """One step, for one sample to avoid; 0 outside; coincident points stay."""
    centre = jnp.zeros((1, 2))
    z = jnp.array([[0.2, 0.0], [0.0, -0.9], [1.0, 0.5], [0.0, 0.0]])
    guidance = MMDGuidance(IMQ(1.0), at="clean")
    step = moved(guidance, Avoid(centre, radius=1.0), z=z)
    np.testing.assert_allclose(step, [[1.0, 0.0], [0.0, -1.0], [1.0, 0.5], [0.0, 0.0]], atol=1e-6)


def test_avoiding_each_other_is_particle_guidance():
    """Without x: the gradient of E k(z, z') alone, by autodiff."""
    guidance = MMDGuidance(IMQ(1.5), at="clean", precondition="raw")
    step = Z - moved(guidance, Avoid(kernel=IMQ(1.5), strength=0.5))
    gram = lambda z: IMQ(1.5)(Particles(z), Particles(z))
    expected = jax.grad(lambda z: 0.5 * (gram(z).sum() - N) / (N * (N - 1)))(Z)
    np.testing.assert_allclose(step, expected, rtol=1e-4, atol=1e-7)  # float32
    spread = sample(Avoid(kernel=IMQ(0.5), strength=20.0, window=(0, 1)))
    nearest = lambda x: float(np.sort(np.linalg.norm(x[:, None] - x[None], axis=-1), 1)[:, 1].mean())
    assert nearest(np.asarray(spread.x)) > 1.2 * nearest(np.asarray(sample().x))


# --- what changes nothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("refs", [None, ALLOWED])
def test_none_and_strength_0_are_plain_bit_for_bit(refs):
    alone = sample(refs=refs)
    for avoid in (Avoid(FORBIDDEN, strength=0.0), Avoid(FORBIDDEN, strength=np.float32(0)), None):
        other = sample(avoid, refs)
        np.testing.assert_array_equal(other.x, alone.x)
        np.testing.assert_array_equal(other.trace.mmd2, alone.trace.mmd2)
    assert float(jnp.abs(sample(FORBIDDEN, refs).x - alone.x).max()) > 0.1


def test_scale_0_is_plain_and_the_windows_are_apart():
    z = moved(MMDGuidance(IMQ(1.5), scale=0.0), Avoid(A))
    np.testing.assert_array_equal(z, Z)
    guidance = MMDGuidance(IMQ(1.5), window=(0.5, 1.0))
    refs, avoid = Particles(Y), Avoid(A, window=(0.0, 0.3))
    only_refs = MMDGuidance(IMQ(1.5))
    step = jax.jit(lambda f: moved(guidance, avoid, refs, fraction=f))
    np.testing.assert_allclose(step(0.1), moved(only_refs, avoid), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(step(0.4), Z)
    bound = bind(only_refs, IMQ(1.5), refs)
    np.testing.assert_allclose(step(0.7), bound.denoised(Z, bound.init(Z), 0.7)[0], rtol=1e-5, atol=1e-6)


HOWS = {"plain": {}, "nearest": {"nearest": 3}, "radius": {"radius": 2.5}}


@pytest.mark.parametrize("how", HOWS)
def test_order_and_empty_rows_do_not_matter(how):
    order = np.array([4, 1, 8, 0, 2, 7, 3, 6, 5])
    step = jax.jit(lambda x, w: moved(MMDGuidance(IMQ(1.5)), Avoid(x, weight=w, **HOWS[how])))
    one = step(A, jnp.ones(K))
    assert float(jnp.abs(one - Z).max()) > 1e-3
    np.testing.assert_allclose(step(A[order], jnp.ones(K)), one, rtol=1e-4, atol=1e-5)  # float32 sums
    for junk in (Z[:3] + 0.01, jnp.full((3, D), jnp.nan)):
        padded = step(jnp.concatenate([A, junk]), jnp.r_[jnp.ones(K), jnp.zeros(3)])
        np.testing.assert_allclose(padded, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["plain", "nearest"])
def test_only_those_of_the_same_condition_repel(how):
    """With Delta: another label's rows may lie anywhere. Their share of A counts, as it does for references."""
    kernel = Product(x=RBF(1.5), cond=Delta())
    step = jax.jit(lambda x: moved(MMDGuidance(kernel), Avoid(x, OF_A, **HOWS[how]), cond=LABELS))
    one, other = step(A), step(jnp.where((OF_A == 1)[:, None], A + 3.0, A))
    np.testing.assert_allclose(other[LABELS == 0], one[LABELS == 0], rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(other - one)[LABELS == 1].max()) > 1e-3
    nobody = moved(MMDGuidance(kernel), Avoid(A, jnp.ones(K, int), **HOWS[how]), cond=LABELS)
    np.testing.assert_array_equal(nobody[LABELS == 0], Z[LABELS == 0])


# --- the ways to compute it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "refs"),
    [
        ("plain", False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("plain", True), ("nearest", True), ("nearest", False))
        ),
    ],
)
def test_combinations_of_points_are_the_points(how, refs):
    """Few points in many dimensions: inner steps among known distances, with their derivative; float64."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, y, a = (jnp.asarray(rng.normal(size=(n, 90)) + s) for n, s in ((6, 0.0), (8, 0.5), (7, 0.2)))
        memory = Memory.empty(3, (90,)).push(Particles(x[:2] + 0.3))
        setting, guidance = HOWS[how], MMDGuidance(IMQ(6.0), inner_steps=3)
        level = Level(0.6, 0.6, 0.8)

        def run(x, a, plain):
            bound = bound_to(guidance, Avoid(a, **setting), Particles(y) if refs else None, None, memory)
            assert bound.distances is not None
            bound = replace(bound, distances=None) if plain else bound
            there, state = bound.denoised(x, bound.init(x), 0.2, level)
            return jnp.sum(there**3), (there, state.shift_norm)

        def all_of(plain):
            return jax.jit(jax.value_and_grad(functools.partial(run, plain=plain), (0, 1), has_aux=True))(x, a)

        found, expected = all_of(False), all_of(True)
        assert float(jnp.abs(found[0][1][0] - x).max()) > 1e-2
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-9), found, expected)


@pytest.mark.parametrize("how", HOWS)
def test_on_the_host_and_in_blocks_as_at_once(how, monkeypatch):
    setting = HOWS[how]
    z, a = jax.random.normal(jax.random.key(3), (4, D)), np.array(jax.random.normal(jax.random.key(4), (200, D)))
    guidance = MMDGuidance(IMQ(1.5))
    once = moved(guidance, Avoid(a, **setting), z=z)
    assert float(jnp.abs(once - z).max()) > 1e-3
    np.testing.assert_allclose(moved(guidance, Avoid(HostReferences(a), **setting), z=z), once, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(blocks, "PLAIN", 64)
    monkeypatch.setattr(blocks, "CACHED", 300)
    jax.clear_caches()
    in_blocks = moved(guidance, Avoid(a, **setting), z=z)
    np.testing.assert_allclose(in_blocks, once, rtol=1e-4, atol=1e-5)  # float32 sums of other lengths
    on_host = moved(guidance, Avoid(HostReferences(a), **setting), z=z)
    np.testing.assert_allclose(on_host, once, rtol=1e-4, atol=1e-5)


def test_nearest_of_all_is_all_and_of_one_is_the_nearest_alone():
    guidance = MMDGuidance(IMQ(1.5))
    nearest = jnp.argmin(jnp.linalg.norm(Z[0] - A, axis=1))
    step = moved(MMDGuidance(IMQ(1.5), at="clean"), Avoid(A, nearest=1))[:1] - Z[:1]
    alone = moved(MMDGuidance(IMQ(1.5), at="clean"), Avoid(A[nearest][None], nearest=1))[:1] - Z[:1]
    np.testing.assert_allclose(step, alone, rtol=1e-5, atol=1e-7)
    for k in (K, K + 5):
        np.testing.assert_allclose(
            moved(guidance, Avoid(A, nearest=k)), moved(guidance, Avoid(A, nearest=K)), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    "at", ["denoised", "sample", *(pytest.param(at, marks=pytest.mark.slow) for at in ("clean", "diffused"))]
)
@pytest.mark.parametrize("refs", [True, False])
def test_every_placement(at, refs):
    """Finite, moved, and away: on average farther from what is avoided than without it."""
    guidance = MMDGuidance(RBF(2.0), at=at, scale=0.3)
    refs = Particles(Y) if refs else None
    with_it, without = (moved(guidance, Avoid(A, strength=s), refs) for s in (3.0, 0.0))
    assert np.isfinite(with_it).all()
    assert float(jnp.abs(with_it - without).max()) > 1e-4
    centre = (S.alpha if at in ("sample", "diffused") else 1.0) * A.mean(0)
    distance = lambda z: float(jnp.linalg.norm(z - centre, axis=1).mean())
    assert distance(with_it) > distance(without)


def test_wrappers_are_guided_sample():
    """guide_denoiser as the bound guidance, guide_sampler in a loop as guided_sample, with references and without."""
    denoiser = lambda params, x, level, cond: x
    guided = guide_denoiser(denoiser, MMDGuidance(IMQ(1.5)), None, avoid=A)
    expected = moved(MMDGuidance(IMQ(1.5)), Avoid(A), level=S)
    t = Level(0.9, S.alpha, S.sigma)  # in the window of early steps
    np.testing.assert_allclose(guided(None, Z, t, None), expected, rtol=1e-5, atol=1e-6)
    for refs in (None, ALLOWED):
        sampler = guide_sampler(DDIM(1.0), MMDGuidance(), refs, num_steps=12, avoid=FORBIDDEN)
        loop = sample(sampler=sampler).x
        np.testing.assert_allclose(loop, sample(FORBIDDEN, refs).x, rtol=1e-4, atol=1e-4)


def test_jit_vmap_grad_and_programs():
    """As one call each; a second call and other values compile nothing."""

    @jax.jit
    def run(strength, x):
        return sample(Avoid(x, strength=strength)).x

    several = jax.jit(jax.vmap(run, in_axes=(0, None)))(jnp.array([0.0, 1.0, 2.0]), FORBIDDEN)
    for strength, x in zip((0.0, 1.0, 2.0), several, strict=True):
        np.testing.assert_allclose(x, sample(Avoid(FORBIDDEN, strength=strength)).x, rtol=1e-3, atol=1e-3)
    far = lambda s, x: jnp.sum(run(s, x) ** 2)
    slopes = jax.jit(jax.grad(far, argnums=(0, 1)))(1.0, FORBIDDEN)
    assert all(np.isfinite(slope).all() for slope in slopes)
    sample(Avoid(FORBIDDEN, strength=1.0))
    with jax.log_compiles(False):
        before = guided_sample_programs()
        sample(Avoid(FORBIDDEN + 0.1, strength=0.3, window=(0.1, 0.6)), seed=3)
    assert guided_sample_programs() - before <= 1  # a window in place of none
    before = guided_sample_programs()
    sample(Avoid(FORBIDDEN, strength=0.7, window=(0.0, 0.9)), seed=4)
    assert guided_sample_programs() == before


def guided_sample_programs():
    from mmdjax import sampling

    return sampling._sample._cache_size()


def test_strength_has_the_slope_of_differences():
    with jax.enable_x64(True):
        z = jnp.asarray(Z, jnp.float64)
        how = MMDGuidance(IMQ(1.5), inner_steps=3)

        @jax.jit
        @jax.value_and_grad
        def total(strength):
            a = jnp.asarray(A, jnp.float64)
            return (moved(how, Avoid(a, strength=strength), Particles(jnp.asarray(Y, jnp.float64)), z=z) ** 2).sum()

        slope, by_difference = total(1.0)[1], (total(1.0 + 1e-5)[0] - total(1.0 - 1e-5)[0]) / 2e-5
        np.testing.assert_allclose(slope, by_difference, rtol=1e-6)
        assert abs(float(slope)) > 1e-2


# --- what it is for -----------------------------------------------------------------------------------------------


def share_in(x, modes):
    centres = np.asarray(ring().centres)
    nearest = np.linalg.norm(np.asarray(x)[:, None] - centres, axis=-1).argmin(1)
    return np.isin(nearest, modes).mean()


@pytest.mark.filterwarnings(
    "ignore:40 references for 200 samples:mmdjax.GuidanceWarning"
)  # the two modes that are left
def test_fewer_samples_in_forbidden_modes():
    """A quarter of the ring lies in the two; nearly all stay in some mode."""
    how = {"num_samples": 200, "num_steps": 25}
    plain, kept = sample(**how).x, sample(Avoid(FORBIDDEN, strength=4.0, window=(0, 0.7)), **how).x
    assert share_in(plain, [0, 1]) > 0.15
    assert share_in(kept, [0, 1]) < 0.06
    to_mode = np.linalg.norm(np.asarray(kept)[:, None] - np.asarray(ring().centres), axis=-1).min(1)
    assert (to_mode < 1.1).mean() > 0.95
    # a reference set that holds one of them: what is avoided takes it out of the samples' aim
    aimed = sample(Avoid(FORBIDDEN, strength=20.0, window=(0, 0.8)), ALLOWED, **how).x
    assert share_in(aimed, [0]) < share_in(sample(refs=ALLOWED, **how).x, [0])


def test_no_sample_ends_within_the_radius():
    few = np.asarray(ring().centres)  # one in each mode: the balls do not overlap
    nearest = lambda x: np.linalg.norm(np.asarray(x)[:, None] - few, axis=-1).min(1)
    plain, kept = sample(num_samples=64).x, sample(Avoid(few, radius=0.4), num_samples=64).x
    assert (nearest(plain) < 0.4).sum() > 15
    assert nearest(kept).min() > 0.4 - 1e-5


def test_published_rule_avoids_too():
    """Down the gradient of MMD² to the signed measure; without references it is refused."""
    past = Memory.empty(50, (2,)).push(Particles(ALLOWED))
    how = {"refs": ALLOWED, "guidance": MMDGuidance.paper(0.02), "memory": past}
    assert float(jnp.abs(sample(FORBIDDEN, **how).x - sample(**how).x).max()) > 1e-3
    with pytest.raises(ValueError, match=r"paper\(\) moves each sample by the same share"):
        sample(FORBIDDEN, guidance=MMDGuidance.paper())


# --- mistakes -----------------------------------------------------------------------------------------------------

BY_LABEL = MMDGuidance(Product(x=IMQ(1.0), cond=Delta()))
SOME = np.zeros((3, 2), np.float32)
MISTAKES = {
    "shape": (ValueError, r"avoid has shape \(3, 4\) but samples have shape \(2,\)", lambda: sample(np.zeros((3, 4)))),
    "without its first axis": (ValueError, r"avoid has the shape of one sample, \(2,\)", lambda: sample(np.zeros(2))),
    "dtype": (TypeError, "avoid has dtype uint8; give floats", lambda: sample(np.zeros((3, 2), np.uint8))),
    "nan": (ValueError, "avoid is NaN or infinite in rows", lambda: sample(np.full((3, 2), np.nan))),
    "empty": (ValueError, "avoid is empty", lambda: sample(np.zeros((0, 2)))),
    "text": (TypeError, "avoid holds a str", lambda: sample("pictures/")),
    "a class": (TypeError, "avoid is the class Avoid", lambda: sample(Avoid)),
    "a dict": (TypeError, "avoid is a dict", lambda: sample(Avoid({"a": np.zeros((3, 2))}))),
    "strength": (ValueError, "avoid.strength is -1", lambda: Avoid(SOME, strength=-1.0)),
    "strength of nan": (ValueError, "avoid.strength is nan", lambda: Avoid(SOME, strength=np.nan)),
    "strength as text": (TypeError, "avoid.strength is 'much'", lambda: Avoid(SOME, strength="much")),
    "window": (ValueError, r"avoid.window is \(0.5, 0.2\); it needs", lambda: Avoid(SOME, window=(0.5, 0.2))),
    "one edge": (ValueError, "avoid.window is 0.5; give", lambda: Avoid(SOME, window=0.5)),
    "nearest": (ValueError, "avoid.nearest is 0", lambda: Avoid(SOME, nearest=0)),
    "radius": (ValueError, "avoid.radius is 0", lambda: Avoid(SOME, radius=0.0)),
    "radius and kernel": (ValueError, "a radius and a kernel", lambda: Avoid(SOME, radius=1.0, kernel=RBF(1.0))),
    "nothing": (ValueError, "needs a kernel with a bandwidth", Avoid),
    "radius of nothing": (ValueError, "give x, or leave", lambda: Avoid(kernel=RBF(1.0), radius=1.0)),
    "no bandwidth": (ValueError, "takes its bandwidth from references", lambda: sample(Avoid(kernel=RBF()))),
    "one sample": (ValueError, r"avoid has one sample, .* give a radius", lambda: sample(SOME[:1])),
    "all equal": (ValueError, "the samples to avoid give IMQ a bandwidth of 0", lambda: sample(SOME)),
    "rule": (ValueError, "Polynomial is none", lambda: sample(Avoid(SOME, kernel=Polynomial()))),
    "noisy radius": (
        ValueError,
        "avoid.radius is a distance of clean ones",
        lambda: sample(Avoid(SOME, radius=1.0), guidance=MMDGuidance(at="sample")),
    ),
    "noisy host": (
        ValueError,
        "adds noise to avoid.x",
        lambda: sample(HostReferences(SOME), guidance=MMDGuidance(at="sample")),
    ),
    "no conditions": (
        ValueError,
        "avoid has none; give avoid=Particles",
        lambda: sample(SOME, guidance=BY_LABEL, cond=jnp.zeros(32, int)),
    ),
    "other conditions": (
        ValueError,
        r"avoid.cond has shape \(3, 2\) but cond has \(32,\)",
        lambda: sample(Avoid(SOME, np.zeros((3, 2))), guidance=BY_LABEL, cond=jnp.zeros(32, int)),
    ),
    "not ours": (ValueError, "rows|shape", lambda: sample(Particles(SOME, weight=np.ones(2)))),
    "neither": (ValueError, "refs is None and so is avoid", lambda: guide_sampler(DDIM(), MMDGuidance(), None)),
    "sampler's shape": (
        ValueError,
        r"avoid has shape \(3, 4\) but the samples have \(7, 5\)",
        lambda: guide_sampler(DDIM(), MMDGuidance(IMQ(1.0)), None, avoid=np.zeros((3, 4))).init(Z),
    ),
    "suggestion": (
        ValueError,
        "held-out references, which do not show whether samples keep away",
        lambda: suggest_guidance(None, KEY, ALLOWED, model=MODEL, num_samples=8, avoid=FORBIDDEN),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name):
    error, message, call = MISTAKES[name]
    with pytest.raises(error, match=message):
        call()


def test_pictures_of_another_range_are_told():
    model = DiffusionModel(lambda params, x, level, cond: jnp.tanh(3 * x), VPLinear(), (4, 4, 1))
    pictures = np.linspace(0, 1, 6 * 16, dtype=np.float32).reshape(6, 4, 4, 1)
    with pytest.warns(UserWarning, match=r"avoid lie between 0 and 1, .*give 2 \* avoid - 1"):
        guided_sample(None, KEY, None, model=model, num_samples=4, num_steps=3, avoid=pictures)


# --- long runs ----------------------------------------------------------------------------------------------------


def run(out, **changes):
    how = {"model": MODEL, "num_samples": 20, "batch_size": 8, "num_steps": 6, "memory": 10, "avoid": FORBIDDEN}
    return sample_many(None, KEY, ALLOWED, out=out, **how | changes)


def test_runs_know_what_they_avoid(tmp_path):
    run(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "batch-00001.safetensors").unlink()
    same = Avoid(np.asarray(FORBIDDEN, np.float64), weight=np.full(30, 2.0))
    run(tmp_path, avoid=same)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    for other, text in (
        (None, "avoid was mmdjax.Avoid and is None"),
        (Avoid(FORBIDDEN, strength=2.0), "avoid.strength was 1.0 and is 2.0"),
        (Avoid(FORBIDDEN, radius=1.0), "avoid.radius was None and is 1.0"),
        (FORBIDDEN + 1, "avoid.x"),
    ):
        with pytest.raises(FileExistsError, match=text):
            run(tmp_path, avoid=other)


def test_runs_of_before_are_resumed(tmp_path):
    run(tmp_path, avoid=None)
    definition = json.loads((tmp_path / "manifest.json").read_text())["definition"]
    assert "avoid" not in definition  # as it was before there was one
    (tmp_path / "batch-00001.safetensors").unlink()
    assert len(run(tmp_path, avoid=None)) == 20
    with pytest.raises(FileExistsError, match="avoid"):
        run(tmp_path)


def test_a_run_without_references(tmp_path):
    made = sample_many(None, KEY, None, model=MODEL, num_samples=20, batch_size=8, num_steps=6, memory=10,
                       avoid=FORBIDDEN, out=tmp_path)  # fmt: skip
    first = guided_sample(None, jax.random.fold_in(KEY, 0), None, model=MODEL, num_samples=8, num_steps=6, memory=10,
                          avoid=FORBIDDEN)  # fmt: skip
    np.testing.assert_array_equal(made[:8], first.x)
    assert len(load_samples(tmp_path)) == 20


def test_shield_is_its_own_derivative():
    d2 = jnp.array([1e-6, 0.3, 0.9, 1.7, 5.0])
    weight = jax.vmap(jax.grad(Shield(1.2).profile))(d2)
    np.testing.assert_allclose(-2 * weight, Shield(1.2).weight(d2), rtol=1e-4, atol=1e-6)  # float32 near 0


def test_measured_table_is_that_of_the_results():
    folder = Path(__file__).parents[1] / "benchmarks"
    rows = json.loads((folder / "results" / "avoid.json").read_text())["rows"]
    measured = (folder / "README.md").read_text()
    for row in rows:
        values = [np.array(row[key]) for key in ("share", "energy", "precision", "recall")]
        cells = [f"{v.mean():.3f} ± {v.std(ddof=1) / np.sqrt(len(v)):.3f}" for v in values]
        assert " | ".join(["| " + row["task"], row["method"], row["setting"], *cells]) in measured
