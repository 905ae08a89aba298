"""What can be combined keeps the contract, over the one table of `examples`.

The cube of samplers, kernels, placements, rules and estimators is factored, as each of its sides meets only the next: a
sampler meets a placement, end to end through `guided_sample`, with one kernel, rule and estimator a pair; a kernel
meets placement, rule and estimator in the bound guidance, without a network. tests/slow/test_cube.py has all of it.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import examples
import mmdjax
from examples import KERNELS, PLACEMENTS, RULES, SAMPLERS, SCHEDULES, allowed, diffusable, rules_of
from mmdjax import DiffusionModel, MMDGuidance, Particles, guided_sample
from mmdjax.guidance.bound import bind, fit_kernel
from mmdjax.schedules import VPLinear

REFS = Particles(jax.random.normal(jax.random.key(1), (6, 2)) + 1.0, jnp.arange(6) % 2)
MODEL = DiffusionModel(lambda params, x, level, cond: level.alpha * x, VPLinear(), (2,))
TIMES = np.array([0.7, 0.4, 0.1, 0.0])
COND = jnp.arange(4) % 2


# where plain steps of .01 diverge, as the gradient grows with the cube, or exponentially
STEPS = {"Polynomial": 1e-4, "Custom": 1e-3}


def guidance_of(kernel, at, rule, estimator, inner_steps=1):
    scale = STEPS.get(kernel, 0.01)
    return MMDGuidance(
        KERNELS[kernel],
        scale,
        at=PLACEMENTS[at],
        precondition=RULES[rule],
        estimator=estimator,
        inner_steps=inner_steps,
    )


def test_every_public_class_is_in_the_table():
    """A new kernel, sampler or schedule without an example would be tested by nothing here."""
    assert not examples.MISSING, "give each a classmethod example(), or an entry in tests/examples.py"
    for table in (KERNELS, SAMPLERS, SCHEDULES):
        assert len(table) > 5  # the scan finds them
    exported = {name for name in mmdjax.__all__ if isinstance(getattr(mmdjax, name), type)}
    found = {type(made).__name__ for table in (KERNELS, SAMPLERS) for made in table.values()}
    here = {"Avoid", "DiffusionModel", "HostReferences", "Level", "MMDGuidance", "Memory", "Particles", "Samples"}
    assert exported - found - here - {"GuidanceWarning"} == {"Delta"}  # a kernel on conditions only


@pytest.mark.parametrize(("kernel", "at", "rule"), list(itertools.product(KERNELS, PLACEMENTS, RULES)))
def test_what_is_ruled_out_raises(kernel, at, rule):
    if allowed(KERNELS[kernel], at, rule):
        assert guidance_of(kernel, at, rule, "u").at == PLACEMENTS[at]
    else:
        with pytest.raises(ValueError, match=r"none; use precondition|has no length|for RBF only|is for x̂0 moved"):
            guidance_of(kernel, at, rule, "u")


PAIRS = [(k, at) for k, at in itertools.product(KERNELS, PLACEMENTS) if at != "diffused" or diffusable(KERNELS[k])]


# each kernel at two placements; the others are like these, and slow
ANY = [at for at in PLACEMENTS if at != "diffused"]
IN_TURN = [(k, ANY[(i + j) % len(ANY)]) for i, k in enumerate(KERNELS) for j in (0, 1)] + [("RBF", "diffused")]


@pytest.mark.parametrize(
    ("kernel", "at"), [pytest.param(*pair, marks=() if pair in IN_TURN else pytest.mark.slow) for pair in PAIRS]
)
def test_bound_guidance(kernel, at):
    """By a rule and an estimator in turn: finite and moved, and at scale 0 not at all."""
    turn, rules = PAIRS.index((kernel, at)), rules_of(KERNELS[kernel], at)
    check_bound([guidance_of(kernel, at, rules[turn % len(rules)], "uv"[turn // 2 % 2])])


def check_bound(guidances):
    level, after = VPLinear()(0.4), VPLinear()(0.1)
    x = jax.random.normal(jax.random.key(2), (4, 2))

    def moved(scale):
        for guidance in guidances:
            bound = bind(mmdjax.tree.replace(guidance, scale=scale), fit_kernel(guidance, REFS), REFS, COND)
            if guidance.placement.moves == "x0_hat":
                yield bound.denoised(x, bound.init(x), 0.5, level)
            else:
                yield bound.after_step(jax.random.key(3), x, bound.init(x), 0.5, level, after)

    still, guided = map(jax.jit(lambda scale: list(moved(scale))), (0.0, guidances[0].scale))
    for guidance, (rest, _), (there, state) in zip(guidances, still, guided, strict=True):
        np.testing.assert_array_equal(rest, x)
        assert np.isfinite(there).all(), guidance
        assert np.abs(there - x).max() > 1e-7, guidance
        assert np.isfinite(state.mmd2), guidance


CLASSES = [name for name, sampler in SAMPLERS.items() if type(sampler).__name__ == name]


def end_to_end():
    """A sampler of each class with every placement; the kernels, rules and estimators in turn."""
    for (i, at), (j, sampler) in itertools.product(enumerate(PLACEMENTS), enumerate(CLASSES)):
        kernels = [kernel for kernel, where in PAIRS if where == at]
        kernel = kernels[(i * len(CLASSES) + j) % len(kernels)]
        rules = rules_of(KERNELS[kernel], at)
        yield sampler, kernel, at, rules[(i - j) % len(rules)], "uv"[j % 2]


@functools.cache
def plain(sampler):
    return guided_sample(
        None, jax.random.key(0), None, model=MODEL, num_samples=4, times=TIMES, sampler=SAMPLERS[sampler]
    ).x


def check(sampler, kernel, at, rule, estimator):
    """Finite, guided, and plain sampling at scale 0, under the caller's jit and vmap."""
    guidance = guidance_of(kernel, at, rule, estimator, inner_steps=2)

    def sample(scale):
        return guided_sample(
            None,
            jax.random.key(0),
            REFS,
            model=MODEL,
            num_samples=4,
            times=TIMES,
            cond=COND,
            sampler=SAMPLERS[sampler],
            guidance=mmdjax.tree.replace(guidance, scale=scale),
        ).x

    guided = jax.jit(jax.vmap(sample))(jnp.array([0.0, guidance.scale]))
    assert guided.shape == (2, 4, 2)
    assert bool(jnp.isfinite(guided).all())
    if not guidance.placement.settles:  # or x_s is not the sampler's at scale 0 either
        np.testing.assert_allclose(guided[0], plain(sampler), rtol=1e-5, atol=1e-6)  # compiled apart
    assert float(jnp.abs(guided[1] - guided[0]).max()) > 1e-7


@pytest.mark.parametrize(("sampler", "kernel", "at", "rule", "estimator"), list(end_to_end()))
def test_end_to_end(sampler, kernel, at, rule, estimator):
    check(sampler, kernel, at, rule, estimator)


def test_end_to_end_meets_every_side():
    sides = list(zip(*end_to_end(), strict=True))
    for found, table in zip(sides, (CLASSES, KERNELS, PLACEMENTS, RULES, "uv"), strict=True):
        assert set(found) == set(table)
