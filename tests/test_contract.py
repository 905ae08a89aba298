"""Every sampler × kernel × placement, with preconditions and estimators in turn, keeps the contract end to end.

For each of the 195 triples one precondition and estimator is drawn so that over the samplers every precondition and
both estimators meet every kernel and placement; the direction itself is tested for all of them in test_guidance.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmdjax
from mmdjax import (
    DDIM,
    DDPM,
    IMQ,
    RBF,
    Cosine,
    Delta,
    DiffusionModel,
    DPMSolverPP2M,
    Energy,
    EulerMaruyama,
    Heun,
    Laplacian,
    Linear,
    Mapped,
    MMDGuidance,
    Particles,
    Polynomial,
    Product,
    RationalQuadratic,
    Sum,
    guided_sample,
)
from mmdjax.schedules import VPLinear

SAMPLERS = {"ddpm": DDPM(), "ddim": DDIM(), "em": EulerMaruyama(), "heun": Heun(), "2m": DPMSolverPP2M()}
KERNELS = {
    "rbf": RBF(),
    "mixture": RBF((0.5, 1.0, 2.0)),
    "laplacian": Laplacian(),
    "imq": IMQ(),
    "rq": RationalQuadratic(),
    "energy": Energy(),
    "polynomial": Polynomial(),
    "linear": Linear(),
    "cosine": Cosine(),
    "sum": Sum(RBF(), Energy(), weights=(1.0, 0.5)),
    "product": Product(x=RBF(), cond=Delta()),
    "mapped": Mapped(jnp.tanh, RBF()),
}
PLACEMENTS = ("denoised", "sample", "clean", "diffused")
PRECONDITIONS = ("field", "mass", "length", "none", "raw")
DIFFUSABLE = {"rbf", "mixture", "product"}
RADIAL = {"rbf", "mixture", "laplacian", "imq", "rq", "energy", "sum", "product"}

REFS = Particles(jax.random.normal(jax.random.key(1), (6, 2)) + 1.0, jnp.arange(6) % 2)
MODEL = DiffusionModel(lambda params, x, level, cond: level.alpha * x, VPLinear(), (2,))
TIMES = np.array([0.7, 0.4, 0.1, 0.0])


def guidance_of(kernel, at, precondition, estimator):
    scale = 1e-4 if kernel == "polynomial" else 0.01  # plain steps on a cubic gradient diverge at larger ones
    return MMDGuidance(KERNELS[kernel], scale, at=at, precondition=precondition, estimator=estimator, inner_steps=2)


@pytest.mark.parametrize(("kernel", "at", "precondition"), list(itertools.product(KERNELS, PLACEMENTS, PRECONDITIONS)))
def test_what_is_ruled_out_raises(kernel, at, precondition):
    """Mass needs a kernel of the distance, "diffused" an RBF; everything else can be built."""
    allowed = (precondition not in ("field", "mass") or kernel in RADIAL) and (at != "diffused" or kernel in DIFFUSABLE)
    if allowed:
        assert guidance_of(kernel, at, precondition, "u").at == at
    else:
        with pytest.raises(ValueError, match=r"none; use precondition|for RBF only"):
            guidance_of(kernel, at, precondition, "u")


def combinations():
    for (i, sampler), (j, kernel), at in itertools.product(enumerate(SAMPLERS), enumerate(KERNELS), PLACEMENTS):
        if at == "diffused" and kernel not in DIFFUSABLE:
            continue
        choices = PRECONDITIONS if kernel in RADIAL else PRECONDITIONS[2:]
        yield sampler, kernel, at, choices[(i + j) % len(choices)], "uv"[(i // 2 + j) % 2]


@functools.cache
def plain(sampler):
    return guided_sample(
        None, jax.random.key(0), None, model=MODEL, num_samples=4, times=TIMES, sampler=SAMPLERS[sampler]
    ).x


@pytest.mark.parametrize(("sampler", "kernel", "at", "precondition", "estimator"), list(combinations()))
def test_contract(sampler, kernel, at, precondition, estimator):
    """Finite, guided, and plain sampling at scale 0, under the caller's jit and vmap."""
    guidance = guidance_of(kernel, at, precondition, estimator)

    def sample(scale):
        return guided_sample(
            None,
            jax.random.key(0),
            REFS,
            model=MODEL,
            num_samples=4,
            times=TIMES,
            cond=jnp.arange(4) % 2,
            sampler=SAMPLERS[sampler],
            guidance=mmdjax.tree.replace(guidance, scale=scale),
        ).x

    guided = jax.jit(jax.vmap(sample))(jnp.array([0.0, guidance.scale]))
    assert guided.shape == (2, 4, 2)
    assert bool(jnp.isfinite(guided).all())
    np.testing.assert_allclose(guided[0], plain(sampler), rtol=1e-5, atol=1e-6)  # compiled apart
    assert float(jnp.abs(guided[1] - guided[0]).max()) > 1e-7
