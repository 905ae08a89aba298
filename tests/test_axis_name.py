"""Truths about `axis_name`: the calls of a `vmap` or `shard_map` are guided as one batch.

On 8 simulated devices: tests/slow/sharded.py, "joined".
"""

import os

import diffrax
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
import toys
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mmdjax import (
    DDIM,
    IMQ,
    Avoid,
    Delta,
    DiffusionModel,
    DPMSolverPP2M,
    Memory,
    MMDGuidance,
    Particles,
    Product,
    guide_denoiser,
    guide_sampler,
    guided_sample,
)
from mmdjax.digits import load_digits, splits, thicken
from mmdjax.guidance import Denoised
from mmdjax.metrics import energy_distance
from mmdjax.schedules import VPLinear, log_snr_times

N, STEPS, KEY = 6, 5, jax.random.key(0)
RING = toys.ring()
MODEL = DiffusionModel(RING, VPLinear(), (2,))
REFS = RING.keep(0, 2, 5).sample(jax.random.key(1), 12)
X_INIT = jax.random.normal(jax.random.key(2), (N, 2))
LABELS = jnp.arange(N) % 3
OUT = {"x": 0, "mmd2": None, "shift_norm": None, "memory": None}  # what differs between calls, and what does not


class Flipped(Denoised):
    """x̂0 is moved, and x_s is drawn anew around it, without noise of its own: the same for one call and many."""

    def settle(self, key, x, x0, t, s):
        return s.alpha * x0 + 0.9 * (x - s.alpha * x0)


CASES = {
    "denoised": {},
    "sample": {"guidance": MMDGuidance(at="sample"), "memory": 3},
    "clean": {"guidance": MMDGuidance(at="clean", window=(0.3, 0.8)), "sampler": DPMSolverPP2M()},
    "diffused": {"guidance": MMDGuidance(at="diffused")},
    "by label": {
        "guidance": MMDGuidance(Product(x=IMQ(), cond=Delta())),
        "refs": Particles(REFS, jnp.arange(12) % 3),
        "cond": LABELS,
        "memory": 4,
    },
    "transform": {"guidance": MMDGuidance(transform=optax.trace(0.5), estimator="v"), "remat": True},
    "published": {"guidance": MMDGuidance.paper(0.05), "memory": Memory.empty(20, (2,)).push(Particles(REFS[:2]))},
    "avoiding": {"avoid": Avoid(REFS[:4], strength=0.5)},
    "field": {"guidance": MMDGuidance(precondition="field")},
    "settled": {"guidance": MMDGuidance(at=Flipped(), inner_steps=2)},
}
QUICK = ("denoised", "by label", "avoiding")


def sample(x_init, cond=None, key=KEY, refs=REFS, **settings):
    settings = {"model": MODEL, "num_steps": STEPS, "sampler": DDIM(), **settings}
    made = guided_sample(None, key, refs, num_samples=len(x_init), x_init=x_init, cond=cond, **settings)
    return {"x": made.x, "mmd2": made.trace.mmd2, "shift_norm": made.trace.shift_norm, "memory": made.memory}


def joined(x_init, cond=None, *, rows=1, **settings):
    """As `sample`, by calls of `rows` samples each."""
    split = lambda v: v.reshape(-1, rows, *v.shape[1:])
    one = lambda x_init, cond: sample(x_init, cond, axis_name="batch", **settings)
    made = jax.vmap(one, out_axes=OUT, axis_name="batch")(*jax.tree.map(split, (x_init, cond)))
    return made | {"x": made["x"].reshape(x_init.shape)}


def assert_equal(one, other, tol=1e-5):
    """To rounding: of sums in another order, and of a few steps that follow."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tol, atol=tol), one, other)


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in CASES])
def test_calls_of_a_vmap_are_one_batch(case):
    """Samples, trace and memory; one sample a call, and two."""
    settings = {"refs": REFS, "cond": None, **CASES[case]}
    arguments = X_INIT, settings.pop("cond"), settings.pop("refs")
    run = lambda how: jax.jit(lambda x, cond, refs: how(x, cond, refs=refs, **settings))(*arguments)
    whole = run(sample)
    assert whole["shift_norm"].max() > 1e-3  # guided at all
    assert_equal(whole, run(joined))
    assert_equal(whole, run(lambda x, cond, **settings: joined(x, cond, rows=2, **settings)))


@pytest.mark.parametrize("at", ["denoised", pytest.param("sample", marks=pytest.mark.slow)])
def test_gradients_are_those_of_one_batch(at):
    """Of a scalar of all samples, to what differs between the calls and what does not."""

    def loss(how, x_init, refs, scale):
        return (how(x_init, refs=refs, guidance=MMDGuidance(scale=scale, at=at))["x"] ** 3).sum()

    whole, calls = (jax.jit(jax.grad(lambda *a, how=how: loss(how, *a), (0, 1, 2))) for how in (sample, joined))
    slopes = whole(X_INIT, REFS, 0.8)
    assert all(np.abs(slope).max() > 0.1 for slope in slopes[1:])
    assert_equal(slopes, calls(X_INIT, REFS, 0.8), tol=1e-4)  # relative to slopes of up to 10


def test_one_call_among_many_costs_its_share():
    """The batch is guided once, not once for each call: as many operations as in one call with all."""
    x_init = jnp.concatenate([X_INIT] * 4)
    flops = [jax.jit(how).lower(x_init).compile().cost_analysis()["flops"] for how in (sample, joined)]
    assert flops[1] < 1.1 * flops[0], flops


def test_keys_do_not_depend_on_the_axis():
    """At scale 0 each call is plain sampling by its own key, noise of the steps included."""
    keys = jax.random.split(KEY, N)
    settings = {"model": MODEL, "num_samples": 1, "num_steps": STEPS}
    one = lambda key: guided_sample(None, key, REFS, guidance=MMDGuidance(scale=0.0), axis_name="batch", **settings).x
    plain = lambda key: guided_sample(None, key, None, **settings).x
    assert_equal(jax.vmap(one, axis_name="batch")(keys), jnp.stack([plain(key) for key in keys]))


@pytest.mark.slow
def test_another_number_of_calls_is_another_batch():
    """The program of a call knows how many there are; equal calls compile nothing."""
    compiled = []

    def listen(name, seconds, **_):
        if "backend_compile" in name:
            compiled.append(name)

    for n in (4, N, 4):
        assert_equal(sample(X_INIT[:n]), joined(X_INIT[:n]))
    jax.monitoring.register_event_duration_secs_listener(listen)
    joined(X_INIT)
    assert not compiled
    joined(X_INIT[:5])
    assert compiled  # the listener hears


def test_wrappers_join_the_calls_of_a_loop():
    """`guide_denoiser` and `guide_sampler`, made outside and inside the calls, in a loop for one sample."""
    times, field = log_snr_times(VPLinear(), STEPS), MMDGuidance(precondition="field")
    steps = times[:-1], times[1:]

    def loop(sampler, denoiser, x):
        def one_step(carry, ends):
            denoise = lambda x, level, state: (denoiser(None, x, level, None), state)
            return sampler.step(KEY, *carry, (), denoise, *map(MODEL.schedule, ends))[:2], None

        return jax.lax.scan(one_step, (x[None], sampler.init(x[None])), steps)[0][0][0]

    # the window is never left, so that it does not matter how the share of the steps is told
    make_denoiser = lambda: guide_denoiser(RING, field, REFS, axis_name="batch")
    make_sampler = lambda: guide_sampler(DDIM(), MMDGuidance(), REFS, axis_name="batch")
    denoiser, sampler = make_denoiser(), make_sampler()
    by_denoiser = lambda x: loop(DDIM(), denoiser, x), lambda x: loop(DDIM(), make_denoiser(), x)
    by_sampler = lambda x: loop(sampler, RING, x), lambda x: loop(make_sampler(), RING, x)
    for guidance, ways in ((field, by_denoiser), (MMDGuidance(), by_sampler)):
        whole = sample(X_INIT, times=times, guidance=guidance)["x"]
        for one in ways:
            assert_equal(whole, jax.jit(jax.vmap(one, axis_name="batch"))(X_INIT))


def solve(x, controller, **settings):
    """The probability flow in σ of x [n, 2], or of one sample [2]; data have α = 1."""
    refs, ndim = Particles(REFS), x.ndim
    denoiser = guide_denoiser(RING, MMDGuidance(), refs, **settings)

    def flow(sigma, x, args):
        level = MODEL.schedule(sigma / 10)
        x0 = denoiser(None, x.reshape(-1, 2), level, None).reshape(x.shape)
        return (x - x0) / sigma

    term, solver = diffrax.ODETerm(flow), diffrax.Heun()
    assert ndim in (1, 2)
    return diffrax.diffeqsolve(term, solver, 5.0, 0.5, -0.5, x, stepsize_controller=controller, max_steps=64).ys[0]


def test_solvers_for_one_sample():
    """Steps that are the same for all are joined; steps that a sample chooses for itself raise."""
    same, own = diffrax.ConstantStepSize(), diffrax.PIDController(rtol=1e-3, atol=1e-3)
    one = lambda controller: lambda x: solve(x, controller, axis_name="batch")
    whole = jax.jit(lambda x: solve(x, same))(X_INIT)
    assert_equal(whole, jax.jit(jax.vmap(one(same), axis_name="batch"))(X_INIT))
    message = r'along axis_name "batch" are at noise levels of their own.*ConstantStepSize.*mmdjax\.diffeq'
    with pytest.raises(ValueError, match=message):
        jax.vmap(one(own), axis_name="batch")(X_INIT)
    # levels that a vmap further out tells apart are no such thing
    denoiser = guide_denoiser(RING, MMDGuidance(), REFS, axis_name="batch")
    at = lambda t: jax.vmap(lambda x: denoiser(None, x[None], MODEL.schedule(t), None), axis_name="batch")(X_INIT)
    times = jnp.array([0.3, 0.6])
    assert_equal(*jax.jit(lambda times: (jnp.stack([at(t) for t in times]), jax.vmap(at)(times)))(times))


@pytest.mark.parametrize("check_vma", [False, True])
def test_calls_of_a_shard_map(check_vma):
    """On one device, with and without JAX's checks of what differs between devices."""
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    one = lambda x: sample(x, axis_name="batch", memory=3)
    out = {"x": P("batch"), "mmd2": P(), "shift_norm": P(), "memory": P()}
    split = jax.shard_map(one, mesh=mesh, in_specs=P("batch"), out_specs=out, check_vma=check_vma)
    assert_equal(sample(X_INIT, memory=3), jax.jit(split)(X_INIT))


@pytest.mark.slow
def test_energy_of_samples_made_one_at_a_time():
    """Digits: alone, each goes where most references are, and all look alike; together they are one good batch."""
    (model, params), ((train, _), (held_out, _)) = load_digits(), splits()
    refs, target, n = thicken(train[:100]), jnp.asarray(thicken(held_out)), 64
    keys = jax.random.split(KEY, n)

    def make(key, refs, num_samples, **more):
        return guided_sample(params, key, refs, model=model, num_samples=num_samples, num_steps=20, **more).x

    with pytest.warns(UserWarning, match="whole batch"):
        alone = jax.vmap(lambda key: make(key, refs, 1)[0])(keys)
    together = jax.vmap(lambda key: make(key, refs, 1, axis_name="batch")[0], axis_name="batch")(keys)
    made = {"alone": alone, "axis_name": together, "one batch": make(KEY, refs, n), "unguided": make(KEY, None, n)}
    energy = {name: float(energy_distance(x, target)) for name, x in made.items()}
    print(energy)
    assert energy["alone"] > energy["unguided"] > 5 * energy["axis_name"]
    assert abs(energy["axis_name"] - energy["one batch"]) < 0.05  # of other noise


@pytest.fixture
def without_type_checks():
    """The errors are those that a user sees, not those of the type checker that only the tests have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_mistakes(without_type_checks):
    level = MODEL.schedule(0.5)
    denoiser = guide_denoiser(RING, MMDGuidance(), REFS, axis_name="image")
    sampler = guide_sampler(DDIM(), MMDGuidance(), REFS, axis_name="image")
    denoise = lambda x, level, state: (x, state)
    other = lambda function: jax.vmap(lambda x: function(x[None]), axis_name="batch")(X_INIT)
    for function in (
        lambda x: sample(x, axis_name="image"),
        lambda x: denoiser(None, x, level, None),
        lambda x: sampler.step(KEY, x, sampler.init(x), (), denoise, level, MODEL.schedule(0.4)),
    ):
        with pytest.raises(
            ValueError, match=r'axis_name is "image", but .* \(there is "batch"\); .* axis_name="image"'
        ):
            other(function)
        with pytest.raises(ValueError, match='axis_name is "image"'):
            function(X_INIT)
    with pytest.raises(TypeError, match=r'axis_name is 3; give the name of an axis .* such as "batch"'):
        sample(X_INIT, axis_name=3)
    with pytest.raises(ValueError, match="sharding and axis_name='batch' both split the batch"):
        other(lambda x: sample(x, axis_name="batch", sharding="any"))


def blamed(caught):
    """One warning, which points at the caller's line: here, unless a type checker's frame lies between."""
    return len(caught) == 1 and (caught[0].filename == __file__ or "MMDJAX_TYPES" in os.environ)


def test_a_sample_alone_warns():
    """Once a call, naming the remedies; not where it is joined, remembered, unguided, or one of several."""
    level, x = MODEL.schedule(0.5), X_INIT[:1]
    message = r'guided as if it were the whole batch.*axis_name="batch"'
    with pytest.warns(UserWarning, match=message + ".*memory") as caught:
        jax.eval_shape(jax.vmap(lambda key: sample(x, key=key)["x"]), jax.random.split(KEY, 3))
    assert blamed(caught)
    with pytest.warns(UserWarning, match=message) as caught:
        jax.eval_shape(lambda x: guide_denoiser(RING, MMDGuidance(), REFS)(None, x, level, None), x)
    assert blamed(caught)
    with pytest.warns(UserWarning, match=message + ".*memory") as caught:
        guide_sampler(DDIM(), MMDGuidance(), REFS).init(x)
    assert blamed(caught)
    jax.eval_shape(lambda: (sample(x, memory=3), sample(x, refs=None), sample(X_INIT[:2])))
    guide_sampler(DDIM(), MMDGuidance(), REFS, axis_name="batch").init(x)
