"""A mistake of the user's is a ValueError or TypeError that names the value and the remedy."""

from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest

from mmdjax import (
    DDIM,
    IMQ,
    RBF,
    Cosine,
    Delta,
    DiffusionModel,
    Memory,
    MMDGuidance,
    Particles,
    Product,
    cfg,
    from_model,
    guide_denoiser,
    guide_sampler,
    guided_sample,
)
from mmdjax.kernels import Median
from mmdjax.schedules import VPLinear


def shrink(params, x, level, cond):
    """The denoiser of standard normal data."""
    return level.alpha * x / (level.alpha**2 + level.sigma**2)


@pytest.fixture(autouse=True)
def without_type_checks():
    """The errors are those that a user sees, not those of the type checker that only the tests have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


MODEL = DiffusionModel(shrink, VPLinear(), (3, 2))
REFS = jax.random.normal(jax.random.key(1), (6, 3, 2))


def run(refs=REFS, key=None, **settings):
    settings = {"model": MODEL, "num_samples": 4, "num_steps": 3, **settings}
    return guided_sample(None, jax.random.key(0) if key is None else key, refs, **settings)


class Returns(DDIM):
    """A sampler whose step returns `change` of what it should."""

    change = staticmethod(lambda *stepped: stepped)

    def step(self, key, x, carry, state, denoise, t, s):
        return self.change(*super().step(key, x, carry, state, denoise, t, s))


class Alone(Returns):
    change = staticmethod(lambda x, carry, state: x)


class Fewer(Returns):
    change = staticmethod(lambda x, carry, state: (x[:2], carry, state))


class Twice(Returns):
    change = staticmethod(lambda x, carry, state: ((x, state), carry, state))


def of(denoiser=shrink, schedule=None):
    return DiffusionModel(denoiser, VPLinear() if schedule is None else schedule, (3, 2))


NAN = np.asarray(REFS).copy()
NAN[2, 0, 0] = np.nan
INFINITE = np.asarray(REFS).copy()
INFINITE[[1, 4], 0, 0] = np.inf
BOTH = Product(x=IMQ(1.0), cond=Delta())
LABELS = jnp.zeros(4, int)
CASES = {
    "another shape": (ValueError, r"refs have shape \(6, 2, 3\) but the model makes samples of shape \(3, 2\)",
                      lambda: run(jnp.ones((6, 2, 3)))),
    "a list": (TypeError, r"refs is a list; give one array", lambda: run([np.zeros((3, 2), np.float32)] * 6)),
    "several scales": (ValueError, "scale has shape .*jax.vmap over several",
                       lambda: run(guidance=MMDGuidance(scale=jnp.ones(2)))),
    "null_cond with a batch axis": (
        ValueError, "null_cond of one sample",
        lambda: run(model=DiffusionModel(cfg(shrink, 2.0, jnp.zeros((1, 3))), VPLinear(), (3, 2)),
                    cond=jnp.ones((4, 3)))),
    "sharding of another kind": (
        TypeError, r"sharding is SingleDeviceSharding; give NamedSharding\(mesh, PartitionSpec\(axis\)\)",
        lambda: run(sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))),
    "sharding of the samples' own axes": (
        ValueError, "only the leading axis, that of the samples, can be split",
        lambda: run(sharding=jax.sharding.NamedSharding(jax.make_mesh((1,), ("n",)),
                                                        jax.sharding.PartitionSpec(None, "n")))),
    "memory as a number in guide_sampler": (
        TypeError, "memory is int", lambda: guide_sampler(DDIM(), MMDGuidance(), REFS, memory=5)),
    "memory without conditions": (
        ValueError, "memory has none",
        lambda: guide_sampler(DDIM(), MMDGuidance(kernel=BOTH), Particles(REFS, jnp.zeros(6, int)), cond=LABELS,
                              memory=Memory.empty(5, (3, 2)))),
    "guided sampler on another shape": (
        ValueError, "refs have shape .* but the samples have",
        lambda: guide_sampler(DDIM(), MMDGuidance(), REFS).init(jnp.ones((4, 2)))),
    "guided denoiser on many levels": (
        ValueError, "one level for the batch",
        lambda: guide_denoiser(shrink, MMDGuidance(), REFS)(None, REFS, VPLinear()(jnp.linspace(0, 1, 6)), None)),
    "kernel of another shape": (
        ValueError, "the kernel returned shape",
        lambda: run(guidance=MMDGuidance(kernel=lambda a, b: jnp.ones(3), precondition="none"))),
    "one sample without batch axis": (ValueError, "refs have shape", lambda: run(jnp.ones((3, 2)))),
    "empty": (ValueError, r"refs is empty \(shape \(0, 3, 2\)\)", lambda: run(jnp.ones((0, 3, 2)))),
    "one only": (ValueError, "one reference has no neighbour distance; give the kernel's bandwidth",
                 lambda: run(REFS[:1])),
    "NaN": (ValueError, r"refs is NaN or infinite in rows \[2\]; remove or repair", lambda: run(NAN)),
    "infinite": (ValueError, r"rows \[1, 4\]", lambda: run(INFINITE)),
    "integer images": (TypeError, r"refs has dtype uint8; .*/ 127.5 - 1", lambda: run(np.zeros((6, 3, 2), np.uint8))),
    "complex": (TypeError, "refs has dtype complex64", lambda: run(REFS.astype(jnp.complex64))),
    "all equal": (ValueError, "a bandwidth of 0: they are all equal", lambda: run(jnp.ones((6, 3, 2)))),
    "all equal, median": (ValueError, "they are all equal",
                          lambda: run(jnp.ones((6, 3, 2)), guidance=MMDGuidance(kernel=RBF()))),
    "mostly equal, median": (ValueError, "so many are repeated that most pairs are equal",
                             lambda: run(jnp.ones((6, 3, 2)).at[0].set(2.0), guidance=MMDGuidance(kernel=RBF()))),
    "bandwidth zero": (ValueError, "bandwidth is 0; a length above 0", lambda: MMDGuidance(kernel=RBF(0))),
    "bandwidth negative": (ValueError, "bandwidth is -1.0", lambda: MMDGuidance(kernel=IMQ(-1.0))),
    "weights negative": (ValueError, "refs.weight must be finite, non-negative",
                         lambda: run(Particles(REFS, weight=-jnp.ones(6)))),
    "weights of another length": (ValueError, "one row for each", lambda: run(Particles(REFS, weight=jnp.ones(5)))),
    "weights all zero": (ValueError, "not all zero", lambda: run(Particles(REFS, weight=jnp.zeros(6)))),
    "cond without ref cond": (ValueError, "refs have none; give refs=Particles",
                              lambda: run(guidance=MMDGuidance(kernel=BOTH), cond=LABELS)),
    "ref cond without cond": (ValueError, "cond is None; give cond",
                              lambda: run(Particles(REFS, jnp.zeros(6, int)), guidance=MMDGuidance(kernel=BOTH))),
    "conds of other shapes": (
        ValueError, r"refs.cond has shape \(6, 7\) but cond has \(4, 5\)",
        lambda: run(Particles(REFS, jnp.ones((6, 7))), cond=jnp.ones((4, 5)),
                    guidance=MMDGuidance(kernel=Product(x=IMQ(1.0), cond=Cosine())))),
    "cond of other length": (ValueError, r"cond has shape \(5,\); it needs one row for each of the 4",
                             lambda: run(cond=jnp.zeros(5))),
    "cond NaN": (ValueError, "refs.cond is NaN",
                 lambda: run(Particles(REFS, jnp.full((6, 2), jnp.nan)), cond=jnp.ones((4, 2)),
                             guidance=MMDGuidance(kernel=Product(x=IMQ(1.0), cond=Cosine())))),
    "no samples": (ValueError, "num_samples is 0", lambda: run(num_samples=0)),
    "fractional samples": (ValueError, "num_samples is 2.5", lambda: run(num_samples=2.5)),
    "no steps": (ValueError, "num_steps is 0", lambda: run(num_steps=0)),
    "untyped key": (TypeError, "make one with jax.random.key", lambda: run(key=jax.random.PRNGKey(0))),
    "seed as key": (TypeError, "make one with jax.random.key", lambda: run(key=0)),
    "several keys": (ValueError, r"key has shape \(3,\)", lambda: run(key=jax.random.split(jax.random.key(0), 3))),
    "denoiser of another shape": (
        ValueError, r"the denoiser returned shape \(4, 2, 3\) for x of shape \(4, 3, 2\)",
        lambda: run(model=DiffusionModel(lambda p, x, t, c: x.transpose(0, 2, 1), VPLinear(), (3, 2)))),
    "times increasing": (ValueError, "times must decrease", lambda: run(times=np.array([0.0, 0.5, 1.0]))),
    "times out of range": (ValueError, "times must decrease within", lambda: run(times=np.array([999, 500, 0]))),
    "times of rank two": (ValueError, "times has shape", lambda: run(times=np.ones((2, 2)))),
    "x_init of another shape": (ValueError, r"x_init has shape \(4, 2, 3\)", lambda: run(x_init=jnp.ones((4, 2, 3)))),
    "memory below one": (ValueError, "memory is 0", lambda: run(memory=0)),
    "memory of another model": (ValueError, "memory holds samples of shape",
                                lambda: run(memory=Memory.empty(5, (4,)))),
    "memory of another kind": (TypeError, "memory is list", lambda: run(memory=[1])),
    "guidance of another kind": (TypeError, "guidance is float", lambda: run(guidance=0.5)),
    "sampler a class": (TypeError, "sampler is", lambda: run(sampler="ddim")),
    "model a function": (TypeError, r"give DiffusionModel\(denoiser, schedule, shape\)", lambda: run(model=shrink)),
    "sampler, the class": (TypeError, "sampler is the class DDIM; give an instance of it, DDIM",
                           lambda: run(sampler=DDIM)),
    "kernel, the class": (TypeError, r"kernel is the class RBF; give", lambda: MMDGuidance(kernel=RBF)),
    "guidance, the class": (TypeError, "guidance is the class MMDGuidance; give", lambda: run(guidance=MMDGuidance)),
    "model, the class": (TypeError, "model is the class DiffusionModel; give", lambda: run(model=DiffusionModel)),
    "schedule, the class": (TypeError, "schedule is the class VPLinear; give", lambda: of(schedule=VPLinear)),
    "rule, the class": (TypeError, "bandwidth is the class Median; give", lambda: RBF(Median)),
    "guided sampler of a class": (TypeError, "sampler is the class", lambda: guide_sampler(DDIM, MMDGuidance(), REFS)),
    "optax's function": (TypeError, r"transform is scale_by_adam; give .*scale_by_adam\(\)",
                         lambda: MMDGuidance(transform=optax.scale_by_adam)),
    "x alone": (TypeError, r"returned float32\[4, 3, 2\]; it must return \(x, carry, state\)",
                lambda: run(sampler=Alone())),
    "x alone, unguided": (TypeError, r"it must return \(x, carry, state\)", lambda: run(None, sampler=Alone())),
    "x in a tuple": (TypeError, r"it must return \(x, carry, state\)", lambda: run(None, sampler=Twice())),
    "x of fewer": (ValueError, r"returned x of shape \(2, 3, 2\) for x of shape \(4, 3, 2\)",
                   lambda: run(None, sampler=Fewer())),
    "schedule of a tuple": (TypeError, r"the schedule returned \(float32\[4\], .*must return Level\(t, alpha, sigma\)",
                            lambda: run(model=of(schedule=lambda t: (t, 1 - t)))),
    "denoiser of a tuple": (TypeError, r"the denoiser returned \(float32.*; it must return one array",
                            lambda: run(model=of(lambda *given: (shrink(*given), 1)))),
    "network of a tuple": (TypeError, r"the network returned \(float32.*; it must return one array",
                           lambda: run(model=of(from_model(lambda params, x, t, cond: (x, 1))))),
    "denoiser of two arguments": (
        TypeError, r"denoiser is called as denoiser\(params, x, level, cond\), but its arguments are \(x, t\)",
        lambda: of(lambda x, t: x)),
    "network of two arguments": (TypeError, r"apply is called as apply\(params, x, t, cond\)",
                                 lambda: from_model(lambda x, t: x)),
    "denoiser and schedule swapped": (TypeError, "denoiser is called as",
                                      lambda: DiffusionModel(VPLinear(), shrink, 2)),
    "cfg of a model": (TypeError, "denoiser must be callable, not DiffusionModel", lambda: cfg(MODEL, 2.0, None)),
    "text as cfg's scale": (TypeError, "scale is '2'; give a number", lambda: cfg(shrink, "2", jnp.ones(1))),
    "text as scale": (TypeError, "scale is '1'; give a number", lambda: MMDGuidance(scale="1")),
    "no scale": (TypeError, "scale is None; give a number", lambda: MMDGuidance(scale=None)),
    "text as eta": (TypeError, "eta is '1'; give a number", lambda: DDIM(eta="1")),
    "text as bandwidth": (TypeError, "bandwidth is 'median'; give a length", lambda: RBF("median")),
    "text in a window": (ValueError, r"window is \('0', 1\); give", lambda: MMDGuidance(window=("0", 1))),
    "fractional inner steps": (ValueError, "inner_steps is 8.0; give an integer", lambda: MMDGuidance(inner_steps=8.0)),
    "fractional steps": (ValueError, "num_steps is 50.0; give an integer", lambda: run(num_steps=50.0)),
    "text as steps": (ValueError, "num_steps is '50'; give an integer", lambda: run(num_steps="50")),
    "text as samples": (ValueError, "num_samples is '4'; give an integer", lambda: run(num_samples="4")),
    "samples in jit": (ValueError, "num_samples is traced .*static_argnames",
                       lambda: jax.jit(lambda n: run(num_samples=n).x)(4)),
    "times as a number": (ValueError, r"times has shape \(\); .*num_steps alone", lambda: run(times=50)),
    "times as text": (TypeError, "times holds a str; give numbers", lambda: run(times="karras")),
    "no conditions in a list": (TypeError, r"cond is \[None.*holds no arrays", lambda: run(cond=[None] * 4)),
    "prompts as cond": (TypeError, "cond holds a str; .*encode_prompts", lambda: run(cond=["a cat"] * 4)),
    "path as x_init": (TypeError, "x_init holds a pathlib.*; give numbers", lambda: run(x_init=Path("a.png"))),
    "pictures as x_init": (TypeError, "x_init has dtype uint8; .*diffuse makes them from pictures",
                           lambda: run(x_init=np.zeros((4, 3, 2), np.uint8))),
    "memory as a switch": (TypeError, "memory is True; give None, a capacity", lambda: run(memory=True)),
    "samples as memory": (TypeError, "memory is MMDGuidance.*; give None, a capacity, or samples.memory",
                          lambda: run(memory=MMDGuidance())),
    "no guidance": (TypeError, "guidance is NoneType; .*refs=None for plain", lambda: run(None, guidance=None)),
    "checks in jit": (ValueError, "call it outside", lambda: jax.jit(lambda r: run(r, checks=True).x)(REFS)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_mistake_is_named(name):
    error, message, call = CASES[name]
    with pytest.raises(error, match=message):
        call()


def test_lists_of_numbers_are_arrays():
    model = of(lambda params, x, level, cond: x * 0 + cond[:, None, None])
    for cond in ([3, 1, 2, 3], (3, 1, 2, 3), np.array([3, 1, 2, 3])):
        out = run(
            None, model=model, cond=cond, num_samples=np.int64(4), times=[1, 0.5, 0], x_init=[[[0.0] * 2] * 3] * 4
        )
        np.testing.assert_array_equal(out.x[:, 0, 0], [3, 1, 2, 3])
    assert MMDGuidance(window=[0, 0.5]).window == (0.0, 0.5)


def test_guidance_without_references_warns():
    with pytest.warns(UserWarning, match="guidance does nothing without references") as caught:
        run(None, guidance=MMDGuidance(scale=2.0))
    assert len(caught) == 1
    run(None)
    run(None, guidance=MMDGuidance())


@pytest.mark.slow
def test_what_is_unusual_but_fine():
    """One sample, one reference with a bandwidth, duplicates."""
    with pytest.warns(UserWarning, match="guided as if it were the whole batch"):
        one = run(num_samples=1)
    assert one.x.shape == (1, 3, 2)
    assert bool(jnp.isfinite(one.x).all())
    single = run(REFS[:1], guidance=MMDGuidance(kernel=IMQ(1.0)))
    assert bool(jnp.isfinite(single.x).all())
    field = MMDGuidance(precondition="field")  # "shrunk" trusts more references more
    twice = run(jnp.concatenate([REFS, REFS]), guidance=field)
    np.testing.assert_allclose(twice.x, run(guidance=field).x, rtol=1e-4, atol=1e-4)  # float32 sums of other lengths


@pytest.mark.parametrize("dtype", [np.float64, jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_references_of_other_float_types(dtype):
    x = run(3 + np.asarray(REFS).astype(dtype)).x
    assert x.dtype == jnp.float32
    assert bool(jnp.isfinite(x).all())


def test_under_jit_equal_references_give_nan():
    """The documented result where values cannot be seen."""
    x = jax.jit(lambda refs: run(refs).x)(jnp.ones((6, 3, 2)))
    assert bool(jnp.isnan(x).all())


def watched(quantity, denoiser=shrink, refs=REFS, **settings):
    with pytest.raises(FloatingPointError, match=quantity):
        run(refs, model=DiffusionModel(denoiser, VPLinear(), (3, 2)), num_steps=10, checks=True, **settings)


@pytest.mark.parametrize(
    "at", ["denoised", *(pytest.param(at, marks=pytest.mark.slow) for at in ("sample", "clean", "diffused"))]
)
@pytest.mark.filterwarnings("ignore:scale is 1e.38:mmdjax.GuidanceWarning")  # so that the shift overflows
def test_checks_name_the_step_and_the_quantity(at):
    """Where a NaN arises: in the network, the sampler, the guidance's kernel, or before the first step."""

    def breaks(params, x, level, cond):
        return jnp.where(level.t < 0.5, jnp.nan, 1.0) * x

    class Breaks(DDIM):
        def step(self, key, x, carry, state, denoise, t, s):
            x, carry, state = super().step(key, x, carry, state, denoise, t, s)
            return jnp.where(t.t < 0.5, jnp.nan, 1.0) * x, carry, state

    kernel = RBF(1.0) if at == "diffused" else None
    guidance, scale = (MMDGuidance(kernel=kernel, at=at, inner_steps=1, scale=scale) for scale in (1, 1e38))
    watched(r"x0_hat is not finite at step 6 of 10 \(t = 0.4\)", breaks, guidance=guidance)
    watched(r"^x is not finite at step 6 of 10 \(t = 0.4\)", sampler=Breaks(), guidance=guidance)
    watched(r"the guidance's shift is not finite at step 0 of 10 \(t = 1\)", guidance=scale)
    memory = Memory.empty(4, (3, 2)).push(Particles(jnp.full((1, 3, 2), jnp.inf)))
    watched(r"memory\.x \(shape \(4, 3, 2\)\) is not finite, before the first step", memory=memory, guidance=guidance)
    run(num_steps=10, guidance=guidance, checks=True)


def test_checks_name_what_was_given():
    run(None, num_steps=10, checks=True)
    model = DiffusionModel(shrink, VPLinear(), (3, 2))
    params = {"out": {"bias": np.array([0, np.nan])}}
    with pytest.raises(FloatingPointError, match=r"params\.out\.bias \(shape \(2,\)\) is not finite, before the first"):
        guided_sample(params, jax.random.key(0), REFS, model=model, num_samples=4, num_steps=3, checks=True)
    watched("cond .* is not finite, before the first step", cond=jnp.full((4, 1), jnp.inf))
    with pytest.raises(ValueError, match="so far apart that their squared distances overflow"):
        run(1e25 * REFS)
