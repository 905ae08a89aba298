"""Truths about the shift: its formula, its placements and its composition."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import neighbours, shift_direction

import mmdjax
from mmdjax import (
    DDIM,
    IMQ,
    RBF,
    Cosine,
    Delta,
    Energy,
    Linear,
    Memory,
    MMDGuidance,
    Particles,
    Polynomial,
    Product,
    Sum,
    guide_denoiser,
    guide_sampler,
    mmd2,
)
from mmdjax._points.distances import spread2, subset
from mmdjax.guidance import PLACEMENTS, RULES, AtSample, Denoised, Field, Placement, Rule, Shrunk
from mmdjax.guidance.bound import bind, fit_kernel
from mmdjax.guidance.field import balance_at
from mmdjax.guidance.wrappers import ROUNDING
from mmdjax.kernels import NearestNeighbour, Neighbourhood
from mmdjax.mixtures import mixture, mixture_model
from mmdjax.schedules import Level, VPLinear

# one program where the operations, each of them compiled for shapes that no other test has, would be fifty
shifted = jax.jit(shift_direction, static_argnames=("estimator", "precondition"))
averages = jax.jit(neighbours)

Z = jax.random.normal(jax.random.key(0), (7, 5))
Y = jax.random.normal(jax.random.key(1), (11, 5)) + 1.0
REFS = Particles(Y)
KERNELS = {
    "rbf": RBF(1.5),
    "mixture": RBF((0.7, 2.0)),
    "laplacian": mmdjax.Laplacian(1.5),
    "imq": IMQ(1.5),
    "rq": mmdjax.RationalQuadratic(1.5, 2.0),
    "energy": Energy(length=2.0),
    "polynomial": Polynomial(),
    "linear": Linear(),
    "cosine": Cosine(),
    "sum": Sum(RBF(1.0), Energy(length=2.0), weights=(0.3, 0.7)),
    "product": Product(x=RBF(1.5), cond=Delta()),
    "mapped": mmdjax.Mapped(jnp.tanh, RBF(1.0)),
    "custom": mmdjax.kernels.as_kernel(lambda a, b: jnp.exp(a.x @ b.x.T / 5)),
}


LIKE_OTHERS = (
    "rbf",
    "mixture",
    "laplacian",
    "rq",
    "linear",
    "sum",
)  # computed as the IMQ, the polynomial or the product is


@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        *(pytest.param(name, "u", marks=pytest.mark.slow if name in LIKE_OTHERS else ()) for name in KERNELS),
        *(pytest.param(name, "v", marks=() if name == "product" else pytest.mark.slow) for name in KERNELS),
    ],
)
def test_direction_is_the_gradient_of_mmd2(name, estimator):
    """∂MMD²/∂x_i / u_i by autodiff of mmd2, batch and memory together; "raw" is the gradient itself."""
    with jax.enable_x64(True):
        z, y = jnp.asarray(Z, jnp.float64), jnp.asarray(Y, jnp.float64)
        labels = jnp.arange(7) % 2, jnp.arange(11) % 2
        past = jax.random.normal(jax.random.key(2), (4, 5), jnp.float64)
        memory = Particles(past, jnp.array([0, 1, 0, 1]), jnp.array([1.0, 1.0, 0.0, 1.0]))
        refs = Particles(y, labels[1], jnp.linspace(1.0, 2.0, 11))
        kernel = KERNELS[name]

        def loss(z):
            joined = Particles(
                jnp.concatenate([z, past]),
                jnp.concatenate([labels[0], memory.cond]),
                jnp.concatenate([jnp.ones(7), memory.weight]),
            )
            return mmd2(kernel, joined, refs, estimator=estimator)

        @jax.jit
        def both_ways(z):
            points = Particles(z, labels[0])
            found = [
                shift_direction(kernel, points, refs, memory, estimator=estimator, precondition=rule)
                for rule in ("raw", "none")
            ]
            return jax.grad(loss)(z), *found

        expected, raw, plain = map(np.asarray, both_ways(z))
    # two ways of summing the same float64 terms
    np.testing.assert_allclose(raw, expected, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(plain, expected * 10, rtol=1e-10, atol=1e-12)  # u_i = 1/(7 + 3)


def test_mass_step_is_the_published_prototype_rule():
    """The default's closed form in loops: mean shift to references less that to the other particles, over its mass."""
    z, y, c = np.asarray(Z, np.float64), np.asarray(Y, np.float64), 1.3
    n, m = len(z), len(y)
    expected = np.zeros_like(z)
    for i in range(n):
        w_ref = (((z[i] - y) ** 2).sum(1) + c**2) ** -1.5
        w_gen = (((z[i] - z) ** 2).sum(1) + c**2) ** -1.5
        w_gen[i] = 0
        pull = (w_ref[:, None] * (y - z[i])).sum(0) / m - (w_gen[:, None] * (z - z[i])).sum(0) / (n - 1)
        expected[i] = pull / max(w_ref.sum() / m, w_gen.sum() / (n - 1))
    step = -shift_direction(IMQ(c), Particles(Z), Particles(Y), None)
    np.testing.assert_allclose(step, expected, rtol=2e-5, atol=2e-6)  # float32 against float64


def test_field_step_in_loops():
    """Where particles outweigh references the push is weakened, and the average over neighbours fades."""
    z, y, c, b = np.asarray(Z, np.float64), np.asarray(Y, np.float64), 1.3, 0.6
    w = lambda a, others: (((a - others) ** 2).sum(1) + c**2) ** -1.5
    expected, average = np.zeros_like(z), np.zeros((len(z), len(z)))
    weakened = 0
    for i in range(len(z)):
        w_ref, w_gen = w(z[i], y) / len(y), w(z[i], z) / (len(z) - 1)
        average[i] = w_gen / w_gen.sum()
        w_gen[i] = 0
        t = Field().surplus * max(0, w_gen.sum() - w_ref.sum()) / (len(y) * w_ref).std()
        average[i] = (average[i] + t**4 * np.eye(len(z))[i]) / (1 + t**4)
        f = min(1.0, (w_ref.sum() / w_gen.sum()) ** b)
        weakened += f < 1
        pull = (w_ref[:, None] * (y - z[i])).sum(0) - f * (w_gen[:, None] * (z - z[i])).sum(0)
        expected[i] = pull / max(w_ref.sum(), f * w_gen.sum())
    assert weakened > 0
    step = -shift_direction(IMQ(c), Particles(Z), Particles(Y), None, precondition="field", balance=b)
    np.testing.assert_allclose(step, expected, rtol=2e-5, atol=2e-6)  # float32 against float64
    np.testing.assert_allclose(neighbours(IMQ(c), Particles(Z), Particles(Y)), average, rtol=2e-4)  # t⁴


def chance_in_loops(x, x0, y, noise, level):
    """E/MMD² of pairs (x, x0) and (α y + σ ε, y), biased; E as the variance of a mean of m features."""
    c, s2 = y.mean(0), ((y - y.mean(0)) ** 2).sum(1).mean()
    width2 = level.alpha**2 * s2 / 4 + level.sigma**2 * y.shape[1]

    def k(a, b):
        return (1 + (a[1] - c) @ (b[1] - c) / s2) / np.sqrt(width2 + ((a[0] - b[0]) ** 2).sum())

    p, q = list(zip(x, x0, strict=True)), list(zip(level.alpha * y + level.sigma * noise, y, strict=True))
    among, across, own = (
        np.array([[k(a, b) for b in right] for a in left]) for left, right in ((p, p), (p, q), (q, q))
    )
    m = len(y)
    error = (np.trace(own) / m - (own.sum() - np.trace(own)) / (m * (m - 1))) / m
    return error / (among.mean() - 2 * across.mean() + own.mean())


def of_points(rule, y):
    return rule.from_refs(Particles(y), lambda function, y: function(y, y))


@pytest.mark.parametrize(
    ("enough", "counts"),
    [(100, 1.0), (2 * len(Y), 1.0), (14, 2 - 2 * len(Y) / 14)],  # 11 references
)
def test_part_in_loops(enough, counts):
    rule, level = Shrunk(evidence=2.0, enough=enough), Level(0.5, 0.8, 0.6)
    x, y = Z + 0.3, Y
    noise = jax.random.normal(jax.random.key(0), y.shape)
    chance = 2 * counts * chance_in_loops(*(np.asarray(v, np.float64) for v in (x, Z, y, noise)), level)
    assert chance < 0.9
    for before, c in ((0.0, chance), (0.5, min(chance, 0.5)), (0.95, min(chance, 0.05))):
        part, after = rule.part(x, Z, level, of_points(rule, y), len(y), before)
        np.testing.assert_allclose(part, 1 - c * np.sqrt(chance), rtol=1e-4)
        np.testing.assert_allclose(after, 1 - c, rtol=1e-4)


def test_chance_alone_moves_nothing():
    """Where E explains all of the distance the part is 0, also after clear evidence: the rest may be chance."""
    rule, level = Shrunk(evidence=1e3), Level(0.5, 0.8, 0.6)
    assert rule.part(Z, Z, level, of_points(rule, Y), len(Y), 0.0) == (0.0, 0.0)
    assert rule.part(Z, Z, level, of_points(rule, Y), len(Y), 0.9)[0] == 0.0


def test_a_sample_of_the_references_counts_as_all():
    """Of large samples the rule sees some: their error is that of all, and they are as many."""
    rule, level = Shrunk(), Level(0.5, 0.8, 0.6)
    some = rule.part(Z + 0.3, Z, level, of_points(rule, Y), len(Y), 0.0)[1]
    of_more = rule.part(Z + 0.3, Z, level, of_points(rule, Y), 3 * len(Y), 0.0)[1]
    chance = chance_in_loops(*(np.asarray(v, np.float64) for v in (Z + 0.3, Z, Y, of_points(rule, Y)[2])), level)
    np.testing.assert_allclose(1 - some, chance, rtol=1e-4)
    np.testing.assert_allclose(1 - of_more, chance / 3 / (1 - chance * 2 / 3), rtol=1e-4)
    assert rule.part(Z + 0.3, Z, level, of_points(rule, Y), 100, 0.0)[0] == 1


def test_where_shrunk_is_field():
    """Where the kernel compares conditions, and where samples are avoided: bit for bit."""
    labels = jnp.arange(11) % 2
    by_label = Product(x=IMQ(), cond=Delta())
    for kernel, cond, avoid in ((by_label, jnp.arange(7) % 2, None), (None, None, Y[:3])):
        found = []
        for precondition in ("field", None):
            found.append(
                mmdjax.guided_sample(
                    mixture([[1.0] * 5, [-1.0] * 5], 0.3), jax.random.key(0), Particles(Y, labels),
                    model=mixture_model(5), num_samples=7, num_steps=4, cond=cond, avoid=avoid,
                    guidance=MMDGuidance(kernel, precondition=precondition),
                ).x
            )  # fmt: skip
        np.testing.assert_array_equal(*found)


def test_a_placement_that_shrunk_cannot_serve_has_field():
    class Noisy(Denoised):
        clean = False

    assert MMDGuidance(at=Noisy()).rule == Field()
    assert MMDGuidance().rule == Shrunk()


def test_what_part_returns_is_checked():
    class One(Field):
        def part(self, x, x0, level, seen, count, before):
            return before

    guidance = MMDGuidance(precondition=One())
    bound = bind(guidance, fit_kernel(guidance, Particles(Y)), Particles(Y))
    with pytest.raises(TypeError, match=r"One\.part returned .*; give \(part, number for the next call\)"):
        bound.denoised(Z, bound.init(Z), 0.5, VPLinear()(0.3), Z)


@pytest.mark.parametrize("part", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dimensions", [3, 60])  # 60: inner steps among known distances
def test_a_part_of_the_whole_shift(part, dimensions):
    """x̂0 moves by so much of what "field" moves it by, and the trace has MMD² there."""

    class Fixed(Field):
        def part(self, x, x0, level, seen, count, before):
            return part, before

    x, refs = (jax.random.normal(jax.random.key(i), (n, dimensions)) for i, n in ((1, 6), (2, 9)))
    found = {}
    for rule in (Fixed(), Field()):
        guidance = MMDGuidance(precondition=rule)
        bound = bind(guidance, fit_kernel(guidance, Particles(refs)), Particles(refs))
        found[type(rule)] = bound.denoised(x, bound.init(x), 0.5, VPLinear()(0.3), x)
    moved, state = found[Fixed]
    whole = found[Field][0]
    assert jnp.abs(whole - x).max() > 0.1
    np.testing.assert_allclose(moved, x + part * (whole - x), rtol=1e-4, atol=1e-5)
    kernel = fit_kernel(MMDGuidance(), Particles(refs))
    np.testing.assert_allclose(state.mmd2, mmdjax.mmd2(kernel, moved, refs, estimator="u"), rtol=1e-3, atol=1e-5)


def test_a_rule_that_reads_points_gets_points():
    """In 60 dimensions others get coefficients of known points."""

    class Home(Rule):
        reads_points = True

        def direction(self, sides, plan):
            return sides.rows.x

    x, refs = (jax.random.normal(jax.random.key(i), (n, 60)) for i, n in ((1, 6), (2, 9)))
    guidance = MMDGuidance(precondition=Home())
    bound = bind(guidance, fit_kernel(guidance, Particles(refs)), Particles(refs))
    assert bound.distances is None
    np.testing.assert_array_equal(bound.denoised(x, bound.init(x), 0.5, VPLinear()(0.3))[0], 0.0)


@pytest.mark.parametrize("weight", [None, jnp.full(12, 0.5)])
def test_with_enough_references_the_default_is_field(weight):
    """Bit for bit, where no weights say that some count for less; and likewise where the error does not count."""
    model = mixture_model(2)
    prior = mixture([[-2.0, 0.0], [2.0, 0.0]], 0.5)
    refs = Particles(jax.random.normal(jax.random.key(1), (12, 2)) * 0.5 + jnp.array([2.0, 0.0]), weight=weight)
    run = lambda rule: mmdjax.guided_sample(
        prior,
        jax.random.key(0),
        refs,
        model=model,
        num_samples=12,
        num_steps=6,
        guidance=MMDGuidance(precondition=rule),
    )
    field = run(Field()).x
    assert jnp.abs(run(None).x - field).max() > 0.01
    assert weight is not None or (run(Shrunk(enough=12)).x == field).all()
    for rule in (Shrunk(enough=12), Shrunk(enough=0), Shrunk(evidence=0.0)):
        np.testing.assert_allclose(run(rule).x, field, rtol=1e-4, atol=1e-5)


def test_shrunk_and_placements():
    with pytest.raises(ValueError, match=r"precondition='shrunk' is for x̂0 .* at=\"clean\" does not do; use at="):
        MMDGuidance(precondition="shrunk", at="clean")


def test_one_reference_is_followed():
    """Nothing says how far it is from others: "shrunk" is "field"."""
    rule, y = Shrunk(), jnp.ones((1, 3))
    assert rule.part(jnp.zeros((4, 3)), jnp.zeros((4, 3)), Level(0.5, 0.8, 0.6), of_points(rule, y), 1, 0.0)[0] == 1


def test_what_shrunk_refuses():
    with pytest.raises(ValueError, match="evidence is -1; give at least 0"):
        Shrunk(evidence=-1)
    with pytest.raises(TypeError, match="evidence is 'much'; give a number"):
        Shrunk(evidence="much")
    with pytest.raises(ValueError, match="enough is -1; give at least 0"):
        Shrunk(enough=-1)
    with pytest.raises(TypeError, match=r"enough is 1\.5; give an integer"):
        Shrunk(enough=1.5)


def test_shrunk_leaves_chance_alone():
    """Of 20 references from the model's own distribution little is followed; of references elsewhere nearly all."""
    rng = np.random.default_rng(0)
    means = 2 * rng.normal(size=(12, 16))
    draw = lambda some: (means[rng.choice(some, 20)] + 0.5 * rng.normal(size=(20, 16))).astype(np.float32)
    own, elsewhere = draw(range(12)), draw([1, 4, 6])
    model, prior = mixture_model(16), mixture(means, 0.5)

    def moved(refs, rule):
        run = functools.partial(
            mmdjax.guided_sample, prior, jax.random.key(0), model=model, num_samples=100, num_steps=20
        )
        plain, guided = run(None).x, run(refs, guidance=MMDGuidance(precondition=rule)).x
        return float(jnp.linalg.norm(guided - plain, axis=1).mean())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mmdjax.GuidanceWarning)
        assert moved(own, "shrunk") < 0.25 * moved(own, "field")
        assert moved(elsewhere, "shrunk") > 0.8 * moved(elsewhere, "field")


def test_balance_is_on_when_noise_is_below_the_kernels_reach():
    """(2h)²/((2h)² + (σ/α)²): 0 at pure noise, ½ where σ/α is 2h, 1 at the clean level; the units do not matter."""
    for kernel in (IMQ(1.5), RBF((1.0, 2.0)), Energy(length=1.5), Product(x=IMQ(1.5), cond=Delta())):
        for level, expected in [(Level(1.0, 0.0, 1.0), 0.0), (Level(0.5, 0.2, 0.6), 0.5), (Level(0.0, 1.0, 0.0), 1.0)]:
            np.testing.assert_allclose(balance_at(kernel.reach(), level), expected, rtol=1e-6)
    assert balance_at(1.5, None) == 0.0
    assert balance_at(Sum(RBF(3.0), IMQ(3.0)).reach(), Level(0.5, 0.1, 0.6)) == pytest.approx(0.5)


def test_a_surplus_is_not_pushed_where_there_is_no_data():
    """Nine particles on a mode that has half of the references, one beside it: "mass" pushes that one away from it."""
    refs = Particles(jnp.array([[0.0, 0.1]] * 5 + [[40.0, 0.0]] * 5))
    z = Particles(jnp.array([[0.1 * i, 0.0] for i in range(9)] + [[3.0, 0.0]]))
    pushed = -shifted(IMQ(1.0), z, refs, None)[9, 0]
    balanced = -shifted(IMQ(1.0), z, refs, None, precondition="field", balance=1.0)[9, 0]
    assert float(pushed) > 0.5
    assert abs(float(balanced)) < 0.3 * float(pushed)


@pytest.mark.parametrize(
    "name",
    ["energy", "product", *(pytest.param(n, marks=pytest.mark.slow) for n in ("imq", "rbf", "laplacian", "sum"))],
)
def test_neighbours_average(name):
    """Rows are weights; equal shifts stay; a sample alone is its own average."""
    cond = jnp.zeros(7, int)
    refs = Particles(Y, jnp.zeros(11, int))
    average = averages(KERNELS[name], Particles(Z, cond), refs)
    assert bool((average >= 0).all())
    np.testing.assert_allclose(average.sum(1), 1, rtol=1e-5)  # float32
    assert bool((jnp.diagonal(average) >= average.max(1) * (1 - 1e-6)).all())
    assert averages(KERNELS[name], Particles(Z[:1], cond[:1]), refs).tolist() == [[1.0]]


def test_what_is_far_from_all_references_moves_on_its_own():
    """Nine references a distance 1 apart, one empty slot: particles at .5, 1 and 1.5 from them, in the average."""
    refs = Particles(jnp.arange(10.0)[:, None], weight=jnp.ones(10).at[9].set(0.0))
    spread = spread2(refs.x, refs.weight)
    assert spread == 1.0
    z = Particles(jnp.array([[3.5], [9.0], [9.5], [1e9]]))  # 9 is the empty slot's
    average, plain = (averages(IMQ(1.0), z, refs, spread2=s) for s in (spread, jnp.inf))
    np.testing.assert_allclose(average.sum(1), 1, rtol=1e-5)  # float32
    share = (average - jnp.eye(4))[:, 0] / (plain - jnp.eye(4))[:, 0]
    np.testing.assert_allclose(
        share, 1 / (1 + (np.array([0.25, 1, 2.25, 1e18]) / Field().far) ** 8), rtol=1e-4, atol=1e-6
    )

    def total(x):
        return averages(IMQ(1.0), Particles(x), refs, spread2=spread).sum()

    assert bool(jnp.isfinite(jax.jit(jax.grad(total))(z.x)).all())


SURPLUS_Z = jnp.array([[0.1 * i, 0.0] for i in range(9)] + [[10.0, 0.1 * i] for i in range(3)])
SURPLUS_REFS = jnp.array([[0.1 * i, 0.3] for i in range(5)] + [[10.0, 0.1 * i] for i in range(5)])


def averaged(kernel, z, refs, memory=None):
    """What is left of the average's weight between each particle and its neighbours."""
    average = averages(kernel, z, refs, memory)
    plain = jnp.maximum(kernel.pair_weights(z, z, same=True), 0)
    return (1 - jnp.diagonal(average)) / (1 - jnp.diagonal(plain) / plain.sum(1))


def test_a_surplus_moves_on_its_own():
    """A mode with 9 of 12 particles and half of the references, and one with 3: its particles alone are averaged."""
    share = averaged(IMQ(1.0), Particles(SURPLUS_Z), Particles(SURPLUS_REFS))
    assert float(share[:9].max()) < 0.3
    np.testing.assert_allclose(share[9:], 1, rtol=1e-5)  # float32


@pytest.mark.parametrize("unit", [1e-12, 1e-3, 1e6])
def test_the_average_is_the_same_in_any_units(unit):
    one = averages(IMQ(1.0), Particles(SURPLUS_Z), Particles(SURPLUS_REFS))
    other = averages(IMQ(unit), Particles(unit * SURPLUS_Z), Particles(unit * SURPLUS_REFS))
    np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-6)  # float32 distances


def test_a_surplus_counts_memory_and_compares_at_each_condition():
    """Memory makes up for what the batch lacks; conditions of other shares than the references' make no surplus."""
    z, refs = Particles(SURPLUS_Z), Particles(SURPLUS_REFS)
    memory = Particles(jnp.array([[10.0, 0.02 * i] for i in range(20)]), weight=jnp.ones(20).at[16:].set(0.0))
    share = averaged(IMQ(1.0), z, refs, memory)
    np.testing.assert_allclose(share[:9], 1, rtol=1e-5)  # float32; 9 of 28 now
    assert float(share[9:].max()) < 0.3

    kernel = Product(x=IMQ(1.0), cond=Delta())
    rows = jax.random.normal(jax.random.key(0), (40, 3))
    labels = jnp.arange(40) % 4 == 0  # a quarter of the batch, half of the references
    share = averaged(kernel, Particles(rows, labels), Particles(rows + 0.1, jnp.arange(40) % 2 == 0))
    alike = averaged(kernel, Particles(rows, labels), Particles(rows + 0.1, labels))
    assert float(jnp.abs(share - alike).max()) > 0
    assert float(share[~labels].mean()) > 0.5 * float(alike[~labels].mean())


def test_few_references_are_not_copied():
    """10 references, 60 samples, no model: the field leaves them between the references, "mass" puts them on them."""
    refs = jax.random.normal(jax.random.key(7), (10, 2))
    nearest = lambda a: float(jnp.linalg.norm(a[:, None] - refs[None], axis=-1).min(1).mean())
    fresh = nearest(jax.random.normal(jax.random.key(9), (2000, 2)))
    ratio = {}
    for precondition in ("mass", "field"):
        z = jax.random.normal(jax.random.key(8), (60, 2))
        guidance = MMDGuidance(kernel=IMQ(NearestNeighbour(2.0)), precondition=precondition)
        bound = bind(guidance, fit_kernel(guidance, Particles(refs)), Particles(refs))
        move = jax.jit(lambda z, bound=bound: bound.denoised(z, bound.init(z), 0.0)[0])
        for _ in range(10):
            z = move(z)
        ratio[precondition] = nearest(z) / fresh
    assert ratio["mass"] < 0.6 < 0.7 < ratio["field"]  # .45 and .78


@pytest.mark.parametrize("name", ["rbf", "mixture", "laplacian", "imq", "rq", "energy", "sum", "product"])
def test_mass_step_is_bounded(name):
    """|shift| is at most the distance to the farthest reference plus that to the farthest particle."""
    z, y = Particles(50 * Z, jnp.zeros(7, int)), Particles(Y, jnp.zeros(11, int))
    kernel = KERNELS[name]
    step = shift_direction(kernel, z, y, None)
    reach = jnp.abs(z.x).max() * 4 * np.sqrt(5)
    assert bool(jnp.isfinite(step).all())
    assert float(jnp.linalg.norm(step, axis=1).max()) <= float(reach)


@pytest.mark.slow
def test_length_scales_with_the_data():
    """A length-preconditioned shift is a length: ten times larger data and bandwidths move ten times as far."""
    for kernel, larger in [
        (RBF(1.5), RBF(15.0)),
        (IMQ(1.5), IMQ(15.0)),
        (Energy(length=2.0), Energy(length=20.0)),
        (Linear(), Linear()),
        (Cosine(), Cosine()),
        (Sum(RBF(1.0), IMQ(2.0)), Sum(RBF(10.0), IMQ(20.0))),
    ]:
        one = shift_direction(kernel, Particles(Z), Particles(Y), None, precondition="length")
        ten = shift_direction(larger, Particles(10 * Z), Particles(10 * Y), None, precondition="length")
        np.testing.assert_allclose(ten, 10 * one, rtol=1e-4, atol=1e-5)  # float32


def test_references_equal_to_the_batch_do_not_move_it():
    for kernel in KERNELS.values():
        points = Particles(Z, jnp.arange(7) % 2)
        step = shift_direction(kernel, points, Particles(Z + 0, points.cond), None, estimator="v", precondition="none")
        np.testing.assert_allclose(step, 0, atol=2e-6)  # sums of float32 terms of order 1


def test_permuting_the_batch_permutes_the_shift():
    order = jnp.array([3, 1, 6, 0, 2, 5, 4])
    for kernel in KERNELS.values():
        cond = jnp.arange(7) % 2
        precondition = "mass" if kernel.has_mass else "none"
        refs = Particles(Y, jnp.arange(11) % 2)
        one = shift_direction(kernel, Particles(Z, cond), refs, None, precondition=precondition)
        other = shift_direction(kernel, Particles(Z[order], cond[order]), refs, None, precondition=precondition)
        np.testing.assert_allclose(other, one[order], rtol=1e-4, atol=1e-5)  # float32 sums in another order


def test_product_with_labels_guides_each_class_on_its_own():
    """With Delta a class sees its own references only: the shift is that of guiding the class alone."""
    z_label, y_label = jnp.arange(7) % 2, jnp.arange(11) % 2
    joint = shift_direction(
        Product(x=IMQ(1.5), cond=Delta()), Particles(Z, z_label), Particles(Y, y_label), None, estimator="u"
    )
    # alone, each side's weights are renormalised: pulls scale by the class's share of references and of other particles
    for label in (0, 1):
        mine, theirs = z_label == label, y_label == label
        z, y = np.asarray(Z)[mine], np.asarray(Y)[theirs]
        w = lambda a, b: (((a[:, None] - b[None]) ** 2).sum(-1) + 1.5**2) ** -1.5
        ref, gen = w(z, y) / 11, w(z, z) / 6
        np.fill_diagonal(gen, 0)
        pull = ref @ y - ref.sum(1)[:, None] * z - gen @ z + gen.sum(1)[:, None] * z
        expected = pull / np.maximum(ref.sum(1), gen.sum(1))[:, None]
        np.testing.assert_allclose(-joint[np.asarray(mine)], expected, rtol=1e-4, atol=1e-5)  # float32


def test_a_sample_alone_with_its_prompt_is_hardly_pushed_by_others():
    # seven prompts that are e^-8 alike, a sample and two references of each: the shares agree, so no push is multiplied
    prompts, kernel = 4 * jnp.arange(7.0)[:, None], Product(x=IMQ(1.5), cond=RBF(1.0))
    of_refs = jnp.repeat(prompts, 2, axis=0)
    z, refs = Particles(Z, prompts), Particles(jnp.tile(Y[:1], (14, 1)), of_refs)
    step = shifted(kernel, z, refs, None, precondition="field", balance=0.0)
    to_own = np.asarray(Z - Y[:1])  # the mean-shift step to the references alone
    np.testing.assert_allclose(step, to_own, atol=0.02)


@pytest.mark.parametrize("past", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_field_compares_at_each_condition_whatever_the_shares(past):
    # 5 of 7 samples but 3 of 11 references have label 0, and memory has it once: each label moves as it would alone
    labels, of_refs = jnp.array([0, 0, 1, 0, 0, 1, 0]), jnp.array([0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1])
    kernel, held = Product(x=IMQ(1.5), cond=Delta()), jax.random.normal(jax.random.key(2), (3, 5))
    of_held = jnp.array([0, 1, 1])

    def step(k, z, refs, memory):
        return shifted(k, z, refs, memory, precondition="field", balance=0.7)

    memory = Particles(held, of_held, jnp.ones(3)) if past else None
    joint = step(kernel, Particles(Z, labels), Particles(Y, of_refs), memory)
    for label in (0, 1):
        alone = Particles(held[of_held == label], None, jnp.ones(int((of_held == label).sum()))) if past else None
        own = step(kernel.x, Particles(Z[labels == label]), Particles(Y[of_refs == label]), alone)
        np.testing.assert_allclose(joint[labels == label], own, rtol=1e-4, atol=1e-5)
    # a label that no reference has is left alone
    nobody = step(kernel, Particles(Z, labels), Particles(Y, jnp.ones(11, int)), None)
    np.testing.assert_array_equal(nobody[labels == 0], 0.0)


@pytest.mark.slow
def test_diffused_is_the_mean_of_sample_over_noise():
    """E over fresh noise of the gradient of "sample" is that of "diffused", in closed form."""
    level = VPLinear()(0.4)
    refs = Particles(Y)
    kernel = RBF(1.5)
    diffused = kernel.diffused(level, 5)
    exact = shift_direction(diffused, Particles(Z), Particles(level.alpha * Y), None, precondition="none")
    keys = jax.random.split(jax.random.key(3), 4000)

    def noisy(key):
        y = mmdjax.schedules.diffuse(key, refs.x, level)
        return shift_direction(kernel.at_level(level), Particles(Z), Particles(y), None, precondition="none")

    draws = jax.vmap(noisy)(keys)
    error = jnp.abs(draws.mean(0) - exact) / (draws.std(0) / np.sqrt(len(keys)))
    assert float(error.max()) < 4.5  # 35 means, each within 4.5 of its standard errors
    assert float(jnp.abs(exact).max()) > 1e-3


def test_guidance_with_memory_holds_earlier_samples_fixed():
    """A batch with memory moves as those rows move in one batch that holds the memory's samples fixed."""
    past = jax.random.normal(jax.random.key(4), (3, 5))
    memory = Memory.empty(6, (5,)).push(Particles(past)).particles
    joint = shifted(IMQ(1.5), Particles(jnp.concatenate([Z, past])), Particles(Y), None)[:7]
    with_memory = shifted(IMQ(1.5), Particles(Z), Particles(Y), memory)
    np.testing.assert_allclose(with_memory, joint, rtol=1e-4, atol=1e-6)  # float32


@pytest.mark.slow
def test_transform_is_optax_per_sample():
    """Momentum over the inner steps, one state a sample, and the norm clipped sample by sample."""
    kernel = RBF(1.5)
    transform = optax.chain(optax.clip_by_global_norm(0.1), optax.trace(0.9))
    guidance = MMDGuidance(kernel=kernel, inner_steps=3, precondition="length", transform=transform)
    bound = bind(guidance, fit_kernel(guidance, Particles(Y)), Particles(Y))
    moved, _ = jax.jit(bound.denoised)(Z, bound.init(Z), 0.0)
    z, velocity = Z, jnp.zeros_like(Z)
    for _ in range(3):
        g = shifted(kernel, Particles(z), Particles(Y), None, precondition="length")
        norm = jnp.linalg.norm(g, axis=1, keepdims=True)
        velocity = 0.9 * velocity + jnp.where(norm > 0.1, 0.1 * g / norm, g)
        z = z - velocity
    np.testing.assert_allclose(moved, z, rtol=1e-5, atol=1e-6)  # float32


def test_window_and_scale():
    guidance = MMDGuidance(window=(0.25, 0.75), scale=0.5)
    bound = bind(guidance, fit_kernel(guidance, Particles(Y)), Particles(Y))
    state, denoised = bound.init(Z), jax.jit(bound.denoised)
    for fraction, acts in [(0.0, False), (0.25, True), (0.5, True), (0.75, False)]:
        moved, after = denoised(Z, state, fraction)
        assert bool((moved != Z).any()) == acts
        assert (float(after.shift_norm) > 0) == acts


def test_window_edges_fall_on_their_step():
    """k/N as an edge is step k, whatever its last digit."""
    guidance = MMDGuidance(kernel=IMQ(1.0))
    bound = bind(guidance, guidance.kernel, REFS)

    @functools.partial(jax.jit, static_argnums=1)
    def acts(start, num_steps):
        windowed = mmdjax.tree.replace(bound, guidance=mmdjax.tree.replace(guidance, window=(start, 1.0)))
        return windowed.active(ROUNDING + jnp.arange(num_steps) / num_steps).sum()

    for num_steps in (25, 41, 50):
        for k in range(1, num_steps):
            assert int(acts(np.float32(k / num_steps), num_steps)) == num_steps - k


def test_mass_has_a_finite_derivative_where_the_kernel_is_nearly_zero():
    """A particle ten bandwidths away has mass 1e-20: it moves, and its derivative is that of the mean shift."""
    far = jnp.array([[10.0, 0.0], [0.1, 0.0]])
    refs = Particles(jnp.array([[0.0, 0.0], [0.2, 0.1]]))
    step = lambda z: shifted(RBF(1.0), Particles(z), refs, None)
    slope = jax.jit(jax.jacobian(step))(far)
    assert bool(jnp.isfinite(slope).all())
    numeric = (step(far.at[0, 0].add(0.05)) - step(far.at[0, 0].add(-0.05))) / 0.1
    np.testing.assert_allclose(slope[:, :, 0, 0], numeric, atol=2e-2)  # float32 differences of a step of 0.1


def test_custom_kernel_sees_conditions():
    """A function of x and cond guides as the Product that it writes out."""

    def both(a, b):
        d2 = jnp.sum((a.x[:, None] - b.x[None]) ** 2, axis=-1)
        return jnp.exp(-d2 / 2) * (a.cond[:, None] == b.cond[None])

    labelled, cond = Particles(Y, jnp.arange(11) % 2), jnp.arange(7) % 2
    moved = []
    for kernel in (both, Product(x=RBF(1.0), cond=Delta())):
        guidance = MMDGuidance(kernel=kernel, precondition="none", inner_steps=1)
        bound = bind(guidance, fit_kernel(guidance, labelled), labelled, cond)
        moved.append(jax.jit(bound.denoised)(Z, bound.init(Z), 0.0)[0])
    np.testing.assert_allclose(moved[0], moved[1], rtol=1e-5, atol=1e-6)  # float32


def test_what_lies_in_empty_slots_does_not_matter():
    @jax.jit
    def moved(refs):
        guidance = MMDGuidance()
        bound = bind(guidance, fit_kernel(guidance, refs), refs)
        return bound.denoised(Z, bound.init(Z), 0.0)[0]

    plain = moved(Particles(Y))
    for junk in (1e6, jnp.nan):
        with_gaps = Particles(jnp.concatenate([Y, jnp.full((3, 5), junk)]), weight=jnp.r_[jnp.ones(11), jnp.zeros(3)])
        np.testing.assert_allclose(plain, moved(with_gaps), rtol=1e-4, atol=1e-5)  # float32 sums of other lengths


def test_default_kernel_is_the_neighbourhood_rule():
    for at, rule in [("denoised", Neighbourhood()), ("clean", Neighbourhood()), ("sample", NearestNeighbour(2.5))]:
        kernel = fit_kernel(MMDGuidance(at=at), Particles(Y))
        expected = rule(Particles(Y))
        assert isinstance(kernel, IMQ)
        np.testing.assert_allclose(kernel.bandwidth, expected, rtol=1e-6)  # the same computation


def test_sample_step_length_is_the_rule():
    """20 × the decrease in log σ²/α², capped at .575, in ceil(T) equal parts."""
    guidance = MMDGuidance(kernel=IMQ(1.5), at="sample", scale=1e-4)  # so small that the parts do not interact
    bound = bind(guidance, guidance.kernel, Particles(Y))
    key, after_step = jax.random.key(0), jax.jit(bound.after_step)
    for log_ratio, length in [(0.01, 0.2), (0.1, 2.0), (0.3, 6.0), (5.0, 11.5)]:
        t, s = Level(0.5, 1.0, float(np.exp(log_ratio / 2))), Level(0.4, 1.0, 1.0)
        moved, _ = after_step(key, Z, bound.init(Z), 0.0, t, s)
        noisy = mmdjax.schedules.diffuse(jax.random.split(key)[0], Y, s)
        one = shift_direction(IMQ(1.5), Particles(Z), Particles(noisy), None)
        np.testing.assert_allclose((Z - moved) / 1e-4, length * one, rtol=2e-2, atol=5e-3)  # float32 differences
    # the step to the clean level counts as the cap
    moved, _ = after_step(key, Z, bound.init(Z), 0.0, Level(0.5, 0.9, 0.4), Level(0.0, 1.0, 0.0))
    one = shift_direction(IMQ(1.5), Particles(Z), Particles(Y), None)
    np.testing.assert_allclose((Z - moved) / 1e-4, 11.5 * one, rtol=2e-2, atol=5e-3)


def test_guide_denoiser_is_the_denoised_shift():
    denoiser = lambda params, x, level, cond: level.alpha * x
    guidance = MMDGuidance(inner_steps=4, precondition="field")
    guided = mmdjax.guide_denoiser(denoiser, guidance, Y)
    level = VPLinear()(0.3)
    z = level.alpha * Z
    kernel = fit_kernel(guidance, Particles(Y))
    # of the points as they come
    average = averages(kernel, Particles(z), Particles(Y), spread2=spread2(Y, jnp.ones(len(Y))))
    for _ in range(4):
        balance = balance_at(kernel.reach(), level)
        z = z - average @ shifted(kernel, Particles(z), Particles(Y), None, precondition="field", balance=balance)
    np.testing.assert_allclose(guided(None, Z, level, None), z, rtol=1e-5, atol=1e-6)  # float32


def test_guide_denoiser_refuses_other_placements():
    for at in ("sample", "clean", "diffused"):
        kernel = RBF(1.0)
        with pytest.raises(ValueError, match="guide_sampler"):
            mmdjax.guide_denoiser(lambda p, x, t, c: x, MMDGuidance(kernel=kernel, at=at), Y)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"at": "noise"}, "at is 'noise'"),
        ({"estimator": "w"}, "estimator is 'w'"),
        ({"precondition": "newton"}, "precondition is 'newton'"),
        ({"inner_steps": 0}, "inner_steps is 0"),
        ({"inner_steps": 2.5}, "inner_steps is 2.5"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"window": (0.5, 0.2)}, r"window is \(0.5, 0.2\)"),
        ({"window": (-0.1, 1.0)}, r"window is \(-0.1, 1\)"),
        ({"window": (0.0, 1.5)}, r"window is \(0, 1.5\)"),
        ({"window": 0.5}, "window is 0.5"),
        ({"kernel": Polynomial()}, "Polynomial is none"),
        ({"kernel": Cosine()}, "Cosine is none"),
        ({"kernel": IMQ(1.0), "at": "diffused"}, "RBF only, not IMQ"),
        ({"kernel": Product(x=Energy(), cond=Delta()), "at": "diffused"}, "RBF only, not Energy"),
    ],
)
def test_bad_choices(arguments, message):
    with pytest.raises(ValueError, match=message):
        MMDGuidance(**arguments)


@pytest.mark.slow
@pytest.mark.parametrize("refs_dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.float64])
@pytest.mark.parametrize(
    "dimensions", [pytest.param(5, marks=pytest.mark.slow), 60]
)  # 60: inner steps among known distances
def test_float32_points_under_x64(refs_dtype, dimensions):
    """Neither references nor levels of more digits change what the points are."""
    with jax.enable_x64(True):
        refs = jax.random.normal(jax.random.key(1), (9, dimensions), refs_dtype)
        x = jax.random.normal(jax.random.key(2), (4, dimensions), jnp.float32)
        same = lambda params, x, level, cond: x
        guide = lambda x, refs: mmdjax.guide_denoiser(same, MMDGuidance(), refs)(None, x, VPLinear()(0.5), None)
        moved = jax.jit(guide)(x, refs)
        assert moved.dtype == jnp.float32
        gradient, mass = IMQ(1.0).gradient(Particles(x), Particles(refs), jnp.full(9, 1 / 9), precondition="mass")
        assert gradient.dtype == jnp.float32
        assert float(mass.min()) > 0


@pytest.mark.slow
def test_weights_that_a_subset_misses_leave_the_trace_finite():
    """4,000 references of which three count, none of them among the 2,000 that constants are taken from."""
    rows = np.array([1001, 1003, 1005])
    kept = np.arange(4000)[subset(4000)]
    assert not set(rows) & set(kept)
    refs = Particles(jax.random.normal(jax.random.key(1), (4000, 2)), weight=jnp.zeros(4000).at[rows].set(1.0))
    guidance = MMDGuidance(kernel=RBF(1.0))
    bound = bind(guidance, fit_kernel(guidance, refs), refs)
    moved, state = jax.jit(bound.denoised)(Z[:, :2], bound.init(Z[:, :2]), 0.5)
    assert bool(jnp.isfinite(moved).all())
    assert bool(jnp.isfinite(state.mmd2))


def test_far_from_tight_references_is_told_by_exact_distances():
    """Two modes a tenth of a thousandth wide, a distance 3 apart: float32 products would see no distance within one."""
    mode = 1e-4 * jax.random.normal(jax.random.key(1), (10, 8))
    refs = Particles(jnp.concatenate([mode, mode + 1.0]))
    spread = spread2(refs.x, jnp.ones(20))
    # far beyond the mode and in it; no surplus, as two more are in the other
    z = Particles(jnp.concatenate([mode[:1] + 1e-3, mode[:1], mode[:2] + 1.0]))
    average = averages(IMQ(1.0), z, refs, spread2=spread)
    assert float(average[0, 1]) < 1e-3
    assert float(average[1, 0]) > 0.1


# --- placements and rules as objects ------------------------------------------------------------------------------


class Redrawn(Denoised):
    """x̂0 is moved, then x_s drawn anew from it."""

    amount: Any = 1.0

    def settle(self, key, x, x0, t, s):
        return s.alpha * x0 + self.amount * s.sigma * jax.random.normal(key, x.shape)


class ByMedian(Rule):
    """The step over the batch's own median distance."""

    factor: Any = 1.0

    def prepare(self, sides, level, seen):
        return jnp.sqrt(jnp.median(sides.distance2()))

    def direction(self, sides, plan):
        return self.factor * (sides.push()[0] - sides.pull()[0]) / plan


T, S = VPLinear()(0.5), VPLinear()(0.3)


def one_step(guidance):
    sampler = guide_sampler(DDIM(), guidance, REFS)
    return sampler.step(
        jax.random.key(7), Z, sampler.init(Z), (), lambda x, level, state: (level.alpha * x, state), T, S
    )[0]


@pytest.mark.parametrize(("name", "rule"), [("denoised", "field"), ("sample", "mass"), ("clean", "length")])
def test_a_name_is_the_object_that_it_names(name, rule):
    kernel = IMQ(1.5)
    objects = MMDGuidance(kernel, at=PLACEMENTS[name], precondition=RULES[rule])
    np.testing.assert_array_equal(one_step(MMDGuidance(kernel, at=name, precondition=rule)), one_step(objects))


def test_own_placement_and_its_numbers():
    denoiser = guide_denoiser(lambda params, x, level, cond: level.alpha * x, MMDGuidance(IMQ(1.5)), REFS)
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(7), 1), Z.shape)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def settled(amount):
        x = one_step(MMDGuidance(IMQ(1.5), at=Redrawn(amount)))
        return x.sum(), x

    (_, found), slope = settled(0.5)
    expected = S.alpha * jax.jit(lambda: denoiser(None, Z, T, None))() + 0.5 * S.sigma * noise
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)  # compiled apart
    np.testing.assert_allclose(slope, S.sigma * noise.sum(), rtol=1e-5)


def test_own_rule_sees_points_and_combinations_alike():
    x, y = jax.random.normal(jax.random.key(3), (5, 64)), jax.random.normal(jax.random.key(4), (6, 64)) + 1
    guidance = MMDGuidance(IMQ(8.0), scale=300.0, precondition=ByMedian(), inner_steps=3)
    bound = bind(guidance, guidance.kernel, Particles(y))
    assert bound.distances is not None
    step = jax.jit(lambda bound: bound.denoised(x, bound.init(x), 0.5)[0])
    moved, plain = map(step, (bound, mmdjax.tree.replace(bound, distances=None)))
    assert jnp.abs(moved - x).max() > 0.1
    np.testing.assert_allclose(moved, plain, rtol=1e-4, atol=1e-5)  # float32


class Flat(Rule):
    def direction(self, sides, plan):
        return jnp.ones(3)


class Empty(Rule):
    pass


class Lonely(Placement):
    def meet(self, key, kernel, refs, memory, s):
        return kernel


class FirstOnly(Denoised):
    def settle(self, key, x, x0, t, s):
        return x0[:1]


class Nowhere(Placement):
    moves = "x0"


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"precondition": Flat()}, ValueError, r"Flat.direction returned shape \(3,\) for particles of shape \(7, 5\)"),
        ({"precondition": Empty()}, NotImplementedError, "Empty has no direction"),
        ({"at": Lonely()}, TypeError, r"Lonely.meet returned IMQ.*\(kernel, refs, memory\)"),
        ({"at": FirstOnly()}, ValueError, r"FirstOnly.settle returned shape \(1, 5\)"),
        ({"at": Nowhere()}, ValueError, "Nowhere.moves is 'x0'"),
        ({"at": AtSample}, TypeError, "at is the class AtSample"),
        ({"at": 3}, ValueError, "at is 3; choose one of .* or give a mmdjax.guidance.Placement"),
        ({"precondition": Field}, TypeError, "precondition is the class Field"),
    ],
)
def test_mistakes_in_own_parts_are_named(parts, error, message):
    with pytest.raises(error, match=message):
        one_step(MMDGuidance(IMQ(1.5), **parts))
