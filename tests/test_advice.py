"""What users are told at run time: when, once, where, in which words, and that all else is silent."""

import os
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdjax import (
    DDIM,
    IMQ,
    RBF,
    Avoid,
    Cosine,
    Delta,
    DiffusionModel,
    GuidanceWarning,
    Mapped,
    Memory,
    MMDGuidance,
    Particles,
    Polynomial,
    Product,
    guide_denoiser,
    guide_sampler,
    guided_sample,
    sample_many,
)
from mmdjax.guidance.advice import Advisor, of_conditions, of_number, of_part, of_reach, of_scale
from mmdjax.schedules import VPLinear
from mmdjax.tree import replace

KEY = jax.random.key(0)
REFS = np.random.default_rng(0).normal(size=(12, 2)).astype(np.float32) + 1
FIELD = MMDGuidance(precondition="field")
BY_LABEL = Product(x=IMQ(1.0), cond=Delta())


def shrink(params, x, level, cond):
    """The denoiser of standard normal data."""
    return level.alpha * x / (level.alpha**2 + level.sigma**2)


MODEL = DiffusionModel(shrink, VPLinear(), (2,))


def sample(refs=REFS, **settings):
    settings = {"model": MODEL, "num_samples": 6, "num_steps": 4, **settings}
    return guided_sample(None, settings.pop("key", KEY), refs, **settings)


def blamed(caught):
    """One warning, of our category, that points at the caller's line, unless a type checker's frame lies between."""
    assert len(caught) == 1, [str(each.message) for each in caught]
    assert caught[0].category is GuidanceWarning
    return caught[0].filename == __file__ or "MMDJAX_TYPES" in os.environ


# --- when ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guidance", "said"),
    [
        (MMDGuidance(scale=-0.5), "scale is -0.5, which drives samples away"),
        (MMDGuidance(Polynomial(), -1.0, precondition="none"), "scale is -1, which"),
        (MMDGuidance(scale=3.5), "scale is 3.5, and 1 is a whole step .*; give 1 or less"),
        (MMDGuidance(scale=np.float32(4), at="clean"), "scale is 4, and 1"),
        (MMDGuidance.paper(5.0), "alpha is 5: .* the paper has 0.002"),
        (MMDGuidance(scale=3.0), None),
        (MMDGuidance(scale=0.0), None),
        (MMDGuidance.paper(), None),
        (MMDGuidance(scale=50.0, precondition="length"), None),  # found by trial
        (MMDGuidance(RBF(1.0), scale=1e4, precondition="none"), None),
        (MMDGuidance(scale=jnp.array([-1.0, 9.0])), None),  # for vmap
    ],
)
def test_scale(guidance, said):
    check(of_scale(guidance), said)


def check(found, said):
    assert found is None if said is None else re.search(said, found), found


def some(n, weight=None):
    return Particles(np.zeros((n, 2)), weight=weight)


@pytest.mark.parametrize(
    ("refs", "samples", "guidance", "said"),
    [
        (some(20), 200, FIELD, '20 references for 200 samples: .* give 50 or more, or precondition="shrunk" .*'),
        (some(49), 196, MMDGuidance(at="sample"), "49 references for 196"),
        (some(400, np.arange(400) < 15), 64, FIELD, "15 references for 64"),
        (some(20), 200, MMDGuidance.paper(), "give 50 or more$"),
        (some(50), 10_000, FIELD, None),
        (some(20), 79, FIELD, None),
        (some(9), 36, MMDGuidance(), "9 references for 36 samples: so few show little .* give 20 or more"),
        (some(10), 200, MMDGuidance(), None),
    ],
)
def test_number_of_references(refs, samples, guidance, said):
    check(of_number(guidance, guidance.base_kernel, refs, samples, samples), said)


def test_where_shrunk_does_nothing_few_references_are_few():
    """In small batches around a memory, beside samples to avoid, by conditions."""
    check(
        of_number(MMDGuidance(), IMQ(), some(20), 200, 16), 'or precondition="shrunk" with .* and 80 samples at once$'
    )
    check(of_number(MMDGuidance(), IMQ(), some(20), 200, 200, Avoid(np.zeros((3, 2)))), "give 50 or more$")
    check(of_number(MMDGuidance(), BY_LABEL, some(20), 200, 200), "give 50 or more$")


PROMPTS = {"pooled": np.eye(4, 8, dtype=np.float32)}


@pytest.mark.parametrize(
    ("kernel", "theirs", "ours", "said"),
    [
        (BY_LABEL, [0, 1, 1, 2], [0, 2, 5, 5], "no reference has cond 5, .* nothing pulls 2 of the 4 samples; give"),
        (BY_LABEL, [0, 0, 0, 0], [0, 1, 2, 3], "has cond 1, 2, 3, or"),
        (BY_LABEL, [0, 1, 1, 2], [2, 1, 0, 0], None),
        (BY_LABEL, [[0, 1], [1, 1], [0, 0], [0, 0]], [[0, 1], [1, 0], [1, 1], [1, 0]], r"has cond \[1, 0\], or"),
        (Product(IMQ(1.0), RBF(0.1)), [0.0, 0.05, 1.0, 1.0], [0.2, 1.4, 1.0, 0.0], None),  # exp(−8)
        (Product(IMQ(1.0), RBF(0.1)), [0.0, 0.05, 1.0, 1.0], [0.2, 2.4, 1.0, 0.0], "has cond 2.4"),
        (
            Product(IMQ(1.0), Mapped(lambda c: c["pooled"], Cosine())),
            {"pooled": PROMPTS["pooled"][[0, 0, 1, 3]]},
            PROMPTS,
            "has the condition of sample 2, or",
        ),
        (IMQ(1.0), [0, 0, 0, 0], [0, 1, 2, 3], None),
    ],
)
def test_conditions_that_no_reference_has(kernel, theirs, ours, said):
    theirs, ours = (c if isinstance(c, dict) else np.asarray(c) for c in (theirs, ours))
    check(of_conditions(kernel, Particles(np.zeros((4, 2)), theirs), ours), said)


def test_a_reference_of_weight_zero_has_no_condition():
    refs = Particles(np.zeros((2, 2)), np.array([0, 1]), np.array([1.0, 0.0]))
    check(of_conditions(BY_LABEL, refs, np.array([0, 1])), "has cond 1, or")


@pytest.mark.parametrize(
    ("guidance", "moved", "said"),
    [
        (MMDGuidance(), [1, 0, 0, 0], r"hardly any sample: the kernel RBF\(bandwidth=0.001\) reaches no reference"),
        (MMDGuidance(), [1, 1, 0.04, 0.01], "give a larger bandwidth, or None"),
        (MMDGuidance(), [-1, 0, 0, -1], "hardly any sample"),
        (MMDGuidance(), [0, 0, 0, 0.2], None),
        (MMDGuidance(), [-1] * 4, None),  # no step was guided
        (MMDGuidance(scale=0.0), [0, 0, 0, 0], None),
        (MMDGuidance.paper(), [0, 0, 0, 0], None),  # as it does until a sample is remembered
    ],
)
def test_kernels_that_reach_nobody(guidance, moved, said):
    check(of_reach(guidance, RBF(1e-3), np.array(moved, float)), said)


@pytest.mark.parametrize(
    ("scale", "part", "said"),
    [
        (1.0, [0.0, 0.05, 0.03], '20 references do not show that .* at most 5% of a shift; .* precondition="field"'),
        (1.0, [-1.0, 0.05, -1.0], "at most 5%"),
        (1.0, [0.0, 0.5, 0.0], None),
        (1.0, [-1.0, -1.0], None),  # no step was guided
        (1.0, [-1.0, np.nan], None),
        (0.0, [0.0, 0.05, 0.03], None),
        (jnp.array([0.0, 1.0]), [0.0], "at most 0%"),
    ],
)
def test_references_that_are_hardly_followed(scale, part, said):
    check(of_part(MMDGuidance(scale=scale), 20, np.array(part)), said)


# --- where and how often ------------------------------------------------------------------------------------------


NARROW = MMDGuidance(RBF(1e-3))


def test_a_call_warns_once_at_its_line():
    with pytest.warns(GuidanceWarning, match="reaches no reference") as caught:
        sample(REFS + 5, guidance=NARROW)
    assert blamed(caught)
    with pytest.warns(GuidanceWarning, match="scale is 9") as caught:
        guide_denoiser(shrink, MMDGuidance(IMQ(1.0), scale=9.0), REFS)
    assert blamed(caught)
    labelled = Particles(REFS, np.arange(12) % 2)
    with pytest.warns(GuidanceWarning, match="no reference has cond 7") as caught:
        guided = guide_sampler(DDIM(), replace(FIELD, kernel=BY_LABEL), labelled, cond=np.array([0, 7]))
    assert blamed(caught)
    with pytest.warns(GuidanceWarning, match="12 references for 48 samples") as caught:
        guided.init(jnp.zeros((48, 2)))
    assert blamed(caught)
    guided.init(jnp.zeros((47, 2)))


def test_references_like_the_models_samples():
    """A default call says that it hardly follows them; "field" follows them, and so does the default with enough."""
    refs = np.random.default_rng(1).normal(size=(100, 2)).astype(np.float32)
    with pytest.warns(GuidanceWarning, match="20 references do not show") as caught:
        sample(refs[:20], num_samples=60)
    assert blamed(caught)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(refs, num_samples=60)
        sample(refs[:20], num_samples=60, guidance=replace(FIELD, scale=0.0))


def test_a_run_warns_once(tmp_path):
    """And not for each of its batches."""
    how = {"model": MODEL, "num_samples": 12, "batch_size": 6, "num_steps": 4, "guidance": NARROW, "out": tmp_path}
    with pytest.warns(GuidanceWarning, match="reaches no reference") as caught:
        sample_many(None, KEY, REFS + 5, **how)
    assert blamed(caught)


def test_remembered_samples_count():
    """Those that a memory holds; of a long run those that it will hold."""
    memory = Memory.empty(30, (2,)).push(Particles(np.zeros((20, 2))))
    for advisor, held, said in (
        (Advisor(), None, None),
        (Advisor(), memory, "12 references for 50 samples"),
        (Advisor(together=60), None, "12 references for 60 samples"),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            advisor.before(FIELD, IMQ(1.0), Particles(REFS), None, 30, held)
        check(str(caught[0].message) if caught else None, said)


def test_nothing_inside_jit_and_one_switch():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        how = {"num_samples": 60, "guidance": MMDGuidance(RBF(1e-3), scale=9.0)}
        jax.eval_shape(lambda key: sample(key=key, **how).x, KEY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=GuidanceWarning)
        sample(REFS + 5, guidance=NARROW)
        sample(None, guidance=NARROW)
