"""Truths about suggest_guidance: what its figures are, what it chooses where the answer is known, and what it says."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from toys import Mixture, ring

from mmdjax import (
    IMQ,
    RBF,
    Delta,
    DiffusionModel,
    Energy,
    Mapped,
    MMDGuidance,
    Particles,
    Polynomial,
    Product,
    RationalQuadratic,
    Sum,
    guided_sample,
    suggest_guidance,
)
from mmdjax.kernels import Median, NearestNeighbour, Neighbourhood
from mmdjax.metrics import nearest_ratio
from mmdjax.schedules import VPLinear
from mmdjax.suggest import _choose, _excess, _split, _Trial, _vary

WORLD = ring()
MODEL = DiffusionModel(WORLD, VPLinear(), (2,))
SETTINGS = {"model": MODEL, "num_samples": 60, "num_steps": 15}
KEPT = np.asarray(WORLD.keep(0, 2, 5).sample(jax.random.key(7), 48))
LIKE_THE_MODEL = np.asarray(WORLD.sample(jax.random.key(3), 48))


def suggest(refs, seed=0, **settings):
    return suggest_guidance(None, jax.random.key(seed), refs, **{**SETTINGS, **settings})


def chosen(suggestion):
    """The score of what was chosen."""
    (score,) = (s for s in suggestion.scores if s.guidance is suggestion.guidance)
    return score


@functools.cache
def on_the_ring(seed=0):
    return suggest(WORLD.keep(0, 2, 5).sample(jax.random.key(100 + seed), 48), seed)


# The figures


def test_the_score_is_mmd2_to_the_references_held_out():
    """With folds of one size: the mean over folds of MMD²_u, but for the references' own term, which is that of all."""
    key, kernel = jax.random.key(5), RBF(1.5)
    guidance = MMDGuidance(kernel=IMQ(NearestNeighbour(2.0)), precondition="field")
    score = suggest(KEPT, 5, candidates=[guidance], criterion=kernel, folds=2).scores[1]

    key_split, key_runs = jax.random.split(key)
    held = np.asarray(_split(key_split, kernel, Particles(KEPT), np.arange(48), 2))
    gram = lambda x, y: np.exp(-((np.asarray(x)[:, None] - np.asarray(y)[None]) ** 2).sum(-1) / (2 * 1.5**2))
    apart = lambda x: gram(x, x)[~np.eye(len(x), dtype=bool)].mean()
    mmd2, near, fresh = apart(KEPT), [], []
    for index, fold in enumerate(held):
        refs = Particles(KEPT, weight=(~fold).astype(np.float32))
        x = guided_sample(None, jax.random.fold_in(key_runs, index), refs, guidance=guidance, **SETTINGS).x
        mmd2 += (apart(x) - 2 * gram(x, KEPT[fold]).mean()) / 2
        for points, found in ((x, near), (KEPT[fold], fresh)):
            found.append(np.linalg.norm(np.asarray(points)[:, None] - KEPT[~fold][None], axis=-1).min(1))
    ratio = float(nearest_ratio(x, KEPT[~fold], KEPT[fold]))
    assert near[-1].mean() / fresh[-1].mean() == pytest.approx(ratio, rel=1e-4)
    # float32, compiled apart
    assert score.mmd2 == pytest.approx(mmd2, abs=1e-4)
    assert score.ratio == pytest.approx(np.mean(near) / np.mean(fresh), rel=1e-3)
    assert score.typical_ratio == pytest.approx(np.median(near) / np.median(fresh), rel=0.1)  # between two middle ones


def test_the_error_is_that_of_a_paired_mean():
    """s/√m for equal weights; and a reference of weight 0 changes nothing."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 30))
    trials = [_Trial(MMDGuidance(), "", h, 1.0, 1.0) for h in (a, b)]
    excess, error = _excess(*trials, np.full(30, 1 / 30))
    assert excess == pytest.approx((a - b).mean())
    assert error == pytest.approx((a - b).std(ddof=1) / np.sqrt(30))
    longer = [t._replace(pull=np.append(t.pull, 1e3)) for t in trials]
    assert _excess(*longer, np.append(np.full(30, 1 / 30), 0.0)) == pytest.approx((excess, error))


def test_folds_part_the_references_and_are_typical_samples():
    """Each counting reference is held out once, in folds of one size; their MMD²_u is small beside a random split's."""
    weight = np.where(np.arange(48) % 7 == 0, 0.0, 1.0)
    present = np.flatnonzero(weight)
    gram = np.asarray(IMQ(1.0)(Particles(KEPT), Particles(KEPT))) * (1 - np.eye(48))

    def mmd2(fold):
        u, v = fold / fold.sum(), (weight - fold) / (weight - fold).sum()
        return sum(w @ gram @ w / (1 - w @ w) for w in (u, v)) - 2 * u @ gram @ v

    typical, random = [], []
    for seed in range(10):
        held = np.asarray(_split(jax.random.key(seed), IMQ(1.0), Particles(KEPT, weight=weight), present, 3))
        assert held.sum(0).tolist() == weight.tolist()
        assert np.ptp(held.sum(1)) <= 1
        shuffled = np.zeros_like(held)
        shuffled[np.arange(len(present)) % 3, np.random.default_rng(seed).permutation(present)] = True
        typical.append(sum(abs(mmd2(fold)) for fold in held))
        random.append(sum(abs(mmd2(fold)) for fold in shuffled))
    assert max(typical) < np.mean(random) / 2


# The choice


@pytest.mark.parametrize("seed", range(4))
def test_neither_copies_nor_blur_on_the_ring(seed):
    """A kernel that is too narrow copies, one too wide blurs; the one between is taken, though it comes last.

    By its MMD² the copying one is as good, and some samples that stray can lift the mean of its distances.
    """
    narrow, wide, good = (MMDGuidance(kernel=IMQ(NearestNeighbour(f))) for f in (0.3, 100.0, 4.0))
    refs = WORLD.keep(0, 2, 5).sample(jax.random.key(seed), 48)
    suggestion = suggest(refs, seed, candidates=[narrow, wide, good])
    assert suggestion.guidance is good
    _, copy, blur, best = suggestion.scores
    assert copy.typical_ratio < 0.2 < best.typical_ratio
    assert blur.excess > 3 * blur.error
    assert blur.ratio > 1.5


@pytest.mark.parametrize("seed", range(3))
def test_guidance_is_kept_on_the_ring(seed):
    """It is needed there: unguided samples are far off the references, and MMD² falls by more than 3/4."""
    suggestion = on_the_ring(seed)
    unguided, it = suggestion.scores[0], chosen(suggestion)
    assert it.guidance.scale > 0
    assert it.ratio <= 1.5 < unguided.ratio
    assert it.mmd2 < unguided.mmd2 / 4


@pytest.mark.parametrize("seed", range(3))
def test_guidance_is_not_needed_where_the_references_are_the_model_s(seed):
    refs = WORLD.sample(jax.random.key(seed), 48)
    suggestion = suggest(refs, seed)
    assert suggestion.guidance.scale == 0
    assert suggestion.reason.startswith("Guidance is not needed")
    np.testing.assert_array_less(chosen(suggestion).excess, chosen(suggestion).error + 1e-12)


FIGURES = {  # score, nearest ratio, its median -> which is chosen; the first line is unguided, the second preferred
    "the preferred one, not being distinguishable": ([(9, 9, 9), (1.01, 1, 1), (1, 1, 1)], 1),
    "the better one": ([(9, 9, 9), (2, 1, 1), (1, 1, 1)], 2),
    "not a copy by the mean": ([(9, 9, 9), (0, 0.79, 1), (1, 0.81, 1)], 2),
    "not a copy by the median": ([(9, 9, 9), (0, 1, 0.59), (1, 1, 0.61)], 2),
    "none that strays": ([(0, 1.51, 2), (0, 1.51, 2), (1, 1.49, 2)], 2),
    "unguided, which copies nothing": ([(1, 0.5, 0.5), (1, 1, 1), (1, 1, 1)], 0),
    "not unguided, being worse": ([(2, 1, 1), (1, 1, 1)], 1),
    "the least copy of copies": ([(9, 9, 9), (0, 0.4, 0.4), (1, 0.7, 0.5), (2, 0.5, 0.5)], 2),
    "unguided, if it is no worse than the least copy": ([(1, 1, 1), (0, 0.4, 0.4), (1, 0.7, 0.5)], 0),
    "none that is not finite": ([(9, 9, 9), (np.nan, 1, 1), (1, 1, 1)], 2),
    "unguided, for want of others": ([(9, 9, 9), (np.nan, 1, 1)], 0),
}


@pytest.mark.parametrize("name", FIGURES)
def test_the_rule(name):
    """By made-up figures; the noise of each trial's score is .1, independent, so a difference's is about .14/√50."""
    figures, expected = FIGURES[name]
    noise = 0.1 * np.random.default_rng(0).normal(size=(len(figures), 50))
    noise -= noise.mean(1, keepdims=True)
    trials = [
        _Trial(MMDGuidance(), f"{i}" if i else "unguided", score + h, *ratios)
        for i, ((score, *ratios), h) in enumerate(zip(figures, noise, strict=True))
    ]
    assert _choose(trials, np.full(50, 1 / 50))[0] == expected


@pytest.mark.filterwarnings("ignore:scale is 1e.30:mmdjax.GuidanceWarning")  # which is one of the candidates
def test_the_first_of_equals_is_chosen():
    """Of one candidate written twice, the first; and a candidate that breaks is passed over."""
    one, same = (MMDGuidance(kernel=IMQ(NearestNeighbour(4.0))) for _ in range(2))
    assert suggest(KEPT, candidates=[one, same]).guidance is one
    broken = MMDGuidance(scale=1e30)
    suggestion = suggest(KEPT, candidates=[broken, one])
    assert suggestion.guidance is one
    assert "is not finite" in suggestion.reason


def test_each_condition_is_scored_by_itself():
    """Labels swapped, the points as a set being the same: seen where the candidates' kernel is a Product."""
    left, right = (Mixture(np.array([[c, 0.0]]), 0.5).sample(jax.random.key(i), 20) for i, c in enumerate((-3.0, 3.0)))
    labels = jnp.repeat(jnp.arange(2), 20)
    kernel = Product(x=IMQ(), cond=Delta())

    class ByLabel:
        def __call__(self, params, x, level, cond):
            centre = jnp.where(cond[:, None] == 0, jnp.array([-3.0, 0.0]), jnp.array([3.0, 0.0]))
            return Mixture(np.zeros((1, 2)), 0.5)(params, x - level.alpha * centre, level) + centre

    model = DiffusionModel(ByLabel(), VPLinear(), (2,))
    settings = {"model": model, "num_samples": 20, "cond": jnp.repeat(jnp.arange(2), 10)}
    candidates = [MMDGuidance(kernel=kernel)]
    right_way = suggest(Particles(jnp.concatenate([left, right]), labels), candidates=candidates, **settings)
    swapped = Particles(jnp.concatenate([right, left]), labels)
    blind = suggest(swapped, candidates=candidates, criterion=IMQ(), **settings)
    assert suggest(swapped, candidates=candidates, **settings).scores[0].mmd2 > 0.3
    assert abs(right_way.scores[0].mmd2) < 0.05
    assert abs(blind.scores[0].mmd2) < 0.05


# What is tried


def test_the_default_search():
    """Bandwidth, placement and scale in turn, each from the best so far; the default is MMDGuidance() itself."""
    default = MMDGuidance()
    guidances = [s.guidance for s in on_the_ring().scores]
    assert guidances[0] == MMDGuidance(scale=0.0)
    assert guidances[1:5] == [default, *(_vary(default, factor, default.at, 1.0) for factor in (1.5, 2.25, 0.75))]
    assert {guidances[5].at, default.at} == {"denoised", "sample"}
    assert [g.scale for g in guidances[1:]] == [1, 1, 1, 1, 1, 0.5]


@pytest.mark.parametrize(
    ("kernel", "wider"),
    [
        (RBF(2.0), RBF(3.0)),
        (RBF((1.0, 2.0)), RBF((1.5, 3.0))),
        (RBF(), RBF(Median(1.5))),
        (IMQ(), IMQ(Neighbourhood(1.5))),
        (RationalQuadratic(2.0, shape=4.0), RationalQuadratic(3.0, shape=4.0)),
        (Sum(RBF(2.0), Energy(), weights=(1.0, 0.5)), Sum(RBF(3.0), Energy(), weights=(1.0, 0.5))),
        (Product(x=IMQ(2.0), cond=RBF(1.0)), Product(x=IMQ(3.0), cond=RBF(1.0))),
        (Mapped(jnp.tanh, RBF(2.0)), Mapped(jnp.tanh, RBF(3.0))),
        (Polynomial(), Polynomial()),
    ],
)
def test_smoothness_multiplies_every_bandwidth_between_samples(kernel, wider):
    varied = _vary(MMDGuidance(kernel=kernel, precondition="none", scale=0.4), 1.5, "sample", 0.5)
    assert varied == MMDGuidance(kernel=wider, precondition="none", scale=0.2, at="sample")


@pytest.mark.filterwarnings("ignore:.* references for 60 samples:mmdjax.GuidanceWarning")
def test_few_references_keep_the_default_untried():
    guidance = MMDGuidance(at="sample")
    suggestion = suggest(KEPT[:9], guidance=guidance)
    assert suggestion.guidance is guidance
    assert suggestion.scores == ()
    assert str(suggestion).startswith("9 references cannot decide, it takes 10")
    assert suggest(Particles(KEPT, weight=np.arange(48) < 9)).scores == ()  # empty slots are no references
    assert len(suggest(Particles(KEPT, weight=np.arange(48) < 10), candidates=[guidance]).scores) == 2


def test_the_reason_names_figures_of_the_table():
    for suggestion in (on_the_ring(), suggest(LIKE_THE_MODEL)):
        figures = set(itertools.chain(*((f"{s.mmd2:.2g}", f"{s.excess:.2g}", f"{s.error:.1g}", f"{s.ratio:.2f}",
                                         f"{s.typical_ratio:.2f}")
                                        for s in suggestion.scores)))  # fmt: skip
        reason = suggestion.reason
        for score in suggestion.scores:
            reason = reason.replace(score.label, "")
        named = re.findall(r"-?\d+\.?\d*(?:e-\d+)?", reason.replace("MMD²", ""))
        assert len(named) >= 3
        assert set(named) <= figures
        assert str(suggestion).endswith(suggestion.reason)
        assert all(figure in str(suggestion) for figure in named)


def test_the_key_decides_and_nothing_recompiles():
    """All bandwidths, scales and folds share one compilation; so does the next call, with other values."""
    traces = []

    def network(params, x, level, cond):
        traces.append(x.shape)
        return params * WORLD(None, x, level)

    def call(*candidates, params=1.0, seed=0, refs=KEPT):
        model = DiffusionModel(network, VPLinear(), (2,))
        key = jax.random.key(seed)
        return suggest_guidance(params, key, refs, model=model, num_samples=20, num_steps=4, candidates=candidates)

    one = MMDGuidance()
    first = call(one)
    count = len(traces)
    again, other = call(one), call(one, seed=1)
    assert [s.mmd2 for s in first.scores] == [s.mmd2 for s in again.scores]
    assert (first.guidance, first.reason) == (again.guidance, again.reason)
    assert first.scores[0].mmd2 != other.scores[0].mmd2
    call(one, MMDGuidance(kernel=IMQ(Neighbourhood(1.5))), MMDGuidance(scale=0.5))
    call(one, params=0.9), call(one, refs=KEPT + 0.5)
    assert len(traces) == count


# Mistakes


@pytest.fixture
def without_type_checks():
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


PAIRED = MMDGuidance(kernel=Product(x=IMQ(), cond=Delta()))
CASES = {
    "no candidates": (ValueError, r"candidates is \[\]; give a list", lambda: suggest(KEPT, candidates=[])),
    "one candidate": (ValueError, "candidates is MMDGuidance.*give a list",
                      lambda: suggest(KEPT, candidates=MMDGuidance())),
    "a number among them": (TypeError, "guidance is float", lambda: suggest(KEPT, candidates=[MMDGuidance(), 0.5])),
    "no references": (TypeError, "refs is a NoneType", lambda: suggest(None)),
    "another shape": (ValueError, r"refs have shape \(48, 1\)", lambda: suggest(KEPT[:, :1])),
    "all equal": (ValueError, "they are all equal", lambda: suggest(np.ones((20, 2), np.float32))),
    "one fold": (ValueError, "folds is 1; 48 references make from 2 to 24", lambda: suggest(KEPT, folds=1)),
    "too many folds": (ValueError, "folds is 30", lambda: suggest(KEPT, folds=30)),
    "untyped key": (TypeError, "make one with jax.random.key",
                    lambda: suggest_guidance(None, 0, KEPT, **SETTINGS)),
    "criterion of conditions that are not there": (
        ValueError, "refs have none", lambda: suggest(KEPT, criterion=Product(x=IMQ(), cond=Delta()))),
    "product without conditions": (ValueError, "refs have none", lambda: suggest(KEPT, guidance=PAIRED)),
    "criterion no kernel": (TypeError, "a kernel is a callable", lambda: suggest(KEPT, criterion=3)),
    "inside jit": (ValueError, "inside jit", lambda: jax.jit(lambda refs: suggest(refs).guidance.scale)(KEPT)),
    "a model that breaks": (
        FloatingPointError, "the model's samples are not finite",
        lambda: suggest(KEPT, model=DiffusionModel(lambda p, x, t, c: x * jnp.nan, VPLinear(), (2,)))),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_mistake_is_named(name, without_type_checks):
    error, message, call = CASES[name]
    with pytest.raises(error, match=message):
        call()


def test_a_rule_of_one_placement_is_varied_there():
    """The rule "shrunk" serves only "denoised"; where none is named, each placement has its own."""
    found = suggest(KEPT, guidance=MMDGuidance(precondition="shrunk"))
    assert len(found.scores) > 2
    assert {score.guidance.at for score in found.scores} == {"denoised"}
