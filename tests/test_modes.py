"""JAX's strict modes, which other people's test suites switch on, break nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdjax import (
    DDIM,
    IMQ,
    RBF,
    DiffusionModel,
    MMDGuidance,
    Particles,
    guide_denoiser,
    guide_sampler,
    guided_sample,
    median_bandwidth,
    mmd2,
)
from mmdjax.metrics import energy_distance, precision_recall
from mmdjax.schedules import RectifiedFlow

SWITCHES = {
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "transfers": lambda: jax.transfer_guard("disallow"),
}


def shrink(params, x, level, cond):
    return params * x


MODEL = DiffusionModel(shrink, RectifiedFlow(), (2,))
REFS, X, HALF, KEY = (
    jnp.array([[1.0, 0], [0, 1], [1, 1]]),
    jnp.arange(8.0).reshape(4, 2),
    jnp.float32(0.5),
    jax.random.key(0),
)
AHEAD = X + 1
LEVELS = RectifiedFlow()(0.9), RectifiedFlow()(0.8)
MARKED = Particles(X, weight=jnp.array([1, 2, 0, 1]))


def step_of_ones_own():
    sampler = guide_sampler(DDIM(1.0), MMDGuidance(at="sample"), REFS)
    denoise = lambda x, level, state: (shrink(HALF, x, level, None), state)
    return sampler.step(KEY, X, sampler.init(X), (), denoise, *LEVELS)[0]


CALLS = {
    "guided_sample": lambda: guided_sample(HALF, KEY, REFS, model=MODEL, num_samples=4, num_steps=3).x,
    "guide_denoiser": lambda: guide_denoiser(shrink, MMDGuidance(), REFS)(HALF, X, LEVELS[0], None),
    "guide_sampler": step_of_ones_own,
    "mmd2": lambda: mmd2(IMQ(), MARKED, REFS, estimator="u"),
    "gradient": lambda: jax.jit(jax.grad(lambda x: mmd2(RBF(1.0), x, REFS)))(
        X
    ),  # outside of `jit`, JAX's own transfers
    "kernel": lambda: RBF(1.0)(Particles(X), Particles(REFS)),
    "bandwidth": lambda: median_bandwidth(MARKED),
    "energy_distance": lambda: energy_distance(X, REFS),
    "precision_recall": lambda: precision_recall(X, AHEAD, k=1).precision,
}


LONG = ("guide_denoiser", "guide_sampler")  # to compile


@pytest.mark.parametrize(
    "call",
    [pytest.param(call, id=name, marks=pytest.mark.slow if name in LONG else ()) for name, call in CALLS.items()],
)
def test_strict_modes_change_nothing(call):
    expected = np.asarray(call())
    for switch in SWITCHES.values():
        with switch():
            found = call()
        np.testing.assert_array_equal(np.asarray(found), expected)
