"""Truths about guided_sample: plain sampling inside it, transformations around it, and what it compiles."""

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from mmdjax import (
    DDIM,
    DDPM,
    IMQ,
    RBF,
    Delta,
    DiffusionModel,
    DPMSolverPP2M,
    EulerMaruyama,
    GuidanceWarning,
    Heun,
    Memory,
    MMDGuidance,
    Particles,
    Product,
    cfg,
    from_model,
    guide_sampler,
    guided_sample,
    mmd2,
)
from mmdjax._files.fingerprint import tree_hash
from mmdjax.guidance import Rule
from mmdjax.schedules import VPLinear, diffuse, log_snr_times

SAMPLERS = {
    "ddim": DDIM(),
    "ddim1": DDIM(1.0),
    "ddpm": DDPM(),
    "em": EulerMaruyama(),
    "heun": Heun(),
    "2m": DPMSolverPP2M(),
}
PLACEMENTS = ("denoised", "sample", "clean", "diffused")
SLOW = pytest.mark.slow
REFS = 0.5 * jax.random.normal(jax.random.key(1), (8, 3)) + 1.0


def gaussian(params, x, level, cond):
    """E[x_0 | x_t] of N(params, 0.6)."""
    return params + 0.6 * level.alpha / (0.6 * level.alpha**2 + level.sigma**2) * (x - level.alpha * params)


MODEL = DiffusionModel(gaussian, VPLinear(), (3,))


def run(refs=REFS, params=0.3, key=0, **settings):
    settings = {"model": MODEL, "num_samples": 5, "num_steps": 6, **settings}
    return guided_sample(params, jax.random.key(key), refs, **settings)


def guidance_at(at, **settings):
    return MMDGuidance(kernel=RBF(1.0) if at == "diffused" else IMQ(1.0), at=at, **settings)


def check_plain_sampling(every):
    """Scale 0 and no references give the same bits: each sampler at every placement, or two pairs of them."""
    pairs = [(sampler, PLACEMENTS) for sampler in SAMPLERS.values()]
    if not every:
        pairs = [(SAMPLERS[name], (at,)) for name, at in (("ddpm", "denoised"), ("heun", "sample"))]
    for sampler, placements in pairs:
        plain = run(None, sampler=sampler)
        assert bool(jnp.isnan(plain.trace.mmd2).all())
        for at in placements:
            still = run(sampler=sampler, guidance=guidance_at(at, scale=0.0))
            np.testing.assert_array_equal(still.x, plain.x)
            assert float(jnp.abs(still.trace.shift_norm).max()) == 0


@SLOW
@pytest.mark.parametrize("every", [False, True])
def test_scale_zero_and_no_references_are_plain_sampling(every):
    """Bit for bit, in code that XLA optimises as it does for users; so is the first sample of the published loop."""
    checks = f"test_sampling.check_plain_sampling({every}); test_paper.check_first_sample()"
    run_python(f"import test_paper, test_sampling; {checks}", XLA_FLAGS="")


@pytest.mark.parametrize(
    "at", ["denoised", "sample", pytest.param("clean", marks=SLOW), pytest.param("diffused", marks=SLOW)]
)
def test_loop_of_ones_own_is_guided_sample(at):
    """guide_sampler in a Python loop, with the keys that guided_sample folds."""

    def denoise(x, level, state):
        return gaussian(0.3, x, level, None), state

    guidance = guidance_at(at)
    sampler = guide_sampler(DDIM(1.0), guidance, REFS, num_steps=6)
    key_init, key_steps = jax.random.split(jax.random.key(0))
    levels = [VPLinear()(t) for t in np.linspace(1, 0, 7)]
    x = jax.random.normal(key_init, (5, 3)) * jnp.sqrt(levels[0].alpha ** 2 + levels[0].sigma ** 2)
    carry, state = sampler.init(x), ()
    step = jax.jit(lambda key, x, carry, state, t, s, by=sampler: by.step(key, x, carry, state, denoise, t, s))
    for i in range(6):
        key = jax.random.fold_in(key_steps, i)
        x, carry, state = step(key, x, carry, state, levels[i], levels[i + 1])
    np.testing.assert_allclose(x, run(guidance=guidance).x, rtol=1e-4, atol=1e-5)  # float32, fused differently


@pytest.mark.parametrize("at", ["denoised", "clean"])
def test_trace_ends_with_the_distance_of_what_is_returned(at):
    guidance = guidance_at(at)
    samples = run(guidance=guidance)
    expected = mmd2(IMQ(1.0), samples.x, REFS, estimator="u")
    np.testing.assert_allclose(samples.trace.mmd2[-1], expected, rtol=1e-4, atol=1e-5)  # float32
    assert samples.trace.mmd2.shape == samples.trace.shift_norm.shape == (6,)


def test_trace_ends_with_the_distance_at_each_condition():
    """With a product kernel, of the samples and those remembered; a label that no reference has counts for nothing."""
    labels, cond = Particles(REFS, jnp.array([0, 0, 0, 1, 1, 1, 1, 2])), jnp.array([0, 0, 0, 1, 1])
    kernel = Product(x=IMQ(1.0), cond=Delta())
    past = Memory.empty(4, (3,), cond).push(Particles(REFS[:3] - 1, jnp.array([0, 1, 5])))
    with pytest.warns(GuidanceWarning, match="has cond 7"):
        samples = run(labels, guidance=MMDGuidance(kernel), cond=cond.at[2].set(7), memory=past)
    x, c = jnp.concatenate([samples.x, past.particles.x[:3]]), np.array([0, 0, 7, 1, 1, 0, 1, 5])
    parts = [mmd2(IMQ(1.0), x[c == i], REFS[labels.cond == i], estimator="u") for i in (0, 1)]
    np.testing.assert_allclose(samples.trace.mmd2[-1], 0.5 * parts[0] + 0.5 * parts[1], rtol=1e-4, atol=1e-5)


class Aside(Rule):
    """Each inner step moves each particle by one in each coordinate."""

    def direction(self, sides, plan):
        return -jnp.ones_like(sides.rows.x)


@pytest.mark.parametrize("at", ["denoised", pytest.param("clean", marks=SLOW)])
def test_relative_shift_of_a_step_by_hand(at):
    """Of a model whose x̂0 is 0, from x_t = 5 in each coordinate: its move is 5/α in x̂0, 5 (1 − σ_s/σ_t) in x_s."""
    model = DiffusionModel(lambda params, x, level, cond: 0 * x, VPLinear(), (3,))
    guidance = MMDGuidance(IMQ(1.0), scale=0.1, at=at, precondition=Aside(), inner_steps=4)
    how = {"model": model, "times": np.array([0.5, 0.2]), "x_init": jnp.full((5, 3), 5.0), "sampler": DDIM()}
    trace = run(guidance=guidance, **how).trace
    t, s = VPLinear()(0.5), VPLinear()(0.2)
    own = 5 / t.alpha if at == "denoised" else 5 * (1 - s.sigma / t.sigma)
    np.testing.assert_allclose(trace.shift_norm, [0.4 * 3**0.5], rtol=1e-5)
    np.testing.assert_allclose(trace.relative_shift, [0.4 / own], rtol=1e-5)
    assert run(None, **how).trace.relative_shift.tolist() == [0]


def test_jit_as_the_contract_writes_it():
    sample = jax.jit(functools.partial(guided_sample, model=MODEL, num_samples=5, num_steps=6))
    np.testing.assert_allclose(sample(0.3, jax.random.key(0), REFS).x, run().x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "at", ["denoised", "sample", *(pytest.param(at, marks=pytest.mark.slow) for at in ("clean", "diffused"))]
)
def test_vmap_over_keys_and_scale_is_a_loop(at):
    keys = jax.random.split(jax.random.key(0), 3)
    each = lambda key, scale: (
        guided_sample(0.3, key, REFS, model=MODEL, num_samples=5, num_steps=6, guidance=guidance_at(at, scale=scale)).x
    )
    scales = jnp.array([0.0, 0.5, 1.0])
    mapped = jax.vmap(each)(keys, scales)
    for i in range(3):
        np.testing.assert_allclose(mapped[i], each(keys[i], scales[i]), rtol=1e-4, atol=1e-5)  # float32


@pytest.mark.parametrize(
    ("at", "rule"),
    [
        ("denoised", "field"),
        *(pytest.param(at, "mass", marks=SLOW) for at in PLACEMENTS),
    ],
)
def test_gradients_are_finite_differences(at, rule):
    """To scale, bandwidth, references (bandwidth given) and params, in float64.

    What "field" takes from the references itself, their spread, is detached: there they stay.
    """
    with jax.enable_x64(True):
        refs = jnp.asarray(REFS, jnp.float64)
        direction = jax.random.normal(jax.random.key(5), refs.shape, jnp.float64)

        def loss(theta):
            scale, bandwidth, move, params = theta
            kernel = RBF(bandwidth) if at == "diffused" else IMQ(bandwidth)
            guidance = MMDGuidance(kernel=kernel, scale=scale, at=at, precondition=rule)
            x = run(refs + (move * direction if rule == "mass" else 0.0), params, guidance=guidance, num_steps=4).x
            return jnp.mean(jnp.sin(x))

        theta = jnp.array([0.7, 1.1, 0.1, 0.3])
        both, step = jax.jit(jax.value_and_grad(loss)), 1e-5  # one program
        gradient = both(theta)[1]
        for i in range(4) if rule == "mass" else (0, 1, 3):
            up, down = both(theta.at[i].add(step))[0], both(theta.at[i].add(-step))[0]
            numeric = (up - down) / (2 * step)
            # central differences of float64: error ~1e-10 in curvature, 1e-11 in rounding
            np.testing.assert_allclose(gradient[i], numeric, rtol=1e-5, atol=1e-8)
            assert abs(numeric) > 1e-6


@pytest.mark.slow
def test_remat_changes_no_gradient():
    for remat in (False, True):
        loss = lambda scale, remat=remat: run(guidance=guidance_at("denoised", scale=scale), remat=remat).x.sum()
        value = jax.jit(jax.grad(loss))(0.7)
        first = value if not remat else first
    np.testing.assert_allclose(value, first, rtol=1e-4)  # float32, recomputed


def test_nothing_recompiles():
    """New params, key, refs, cond, scale, bandwidth, cfg scale, 1 for 1.0: the denoiser is traced once."""
    traces = []

    def network(params, x, t, cond):
        traces.append(x.shape)
        return params * x + cond[:, None]

    denoiser = from_model(network, "eps")
    kernel = lambda h: Product(x=IMQ(h), cond=Delta())

    def call(params=0.1, key=0, move=0.0, label=0, scale=1.0, bandwidth=1.0, cfg_scale=2.0, eta=1.0):
        return guided_sample(
            params,
            jax.random.key(key),
            Particles(REFS + move, jnp.arange(8) % 2),
            model=DiffusionModel(cfg(denoiser, cfg_scale, 0), VPLinear(), (3,)),
            num_samples=5,
            num_steps=4,
            cond=jnp.full(5, label),
            guidance=MMDGuidance(kernel=kernel(bandwidth), scale=scale),
            sampler=DDIM(eta),
        ).x

    first = call()
    count = len(traces)
    changes = [
        {"params": 0.2}, {"key": 1}, {"move": 0.5}, {"label": 1},
        {"scale": 0.5}, {"scale": 1}, {"scale": np.float32(2)}, {"scale": jnp.array(0.3)},
        {"bandwidth": 2}, {"bandwidth": 1.7}, {"cfg_scale": 3}, {"cfg_scale": 1.5}, {"eta": 0},
    ]  # fmt: skip
    for change in changes:
        assert bool(jnp.isfinite(call(**change)).all())
    assert len(traces) == count
    assert not np.array_equal(first, call(scale=0.1))

    # with the model passed through the user's own jit
    @jax.jit
    def jitted(params, key, refs, model, guidance):
        return guided_sample(params, key, refs, model=model, num_samples=5, cond=jnp.zeros(5, int), guidance=guidance).x

    def call_jitted(scale, cfg_scale):
        model = DiffusionModel(cfg(denoiser, cfg_scale, 0), VPLinear(), (3,))
        refs = Particles(REFS, jnp.arange(8) % 2)
        return jitted(0.1, jax.random.key(0), refs, model, MMDGuidance(kernel=kernel(1.0), scale=scale))

    call_jitted(1.0, 2.0)
    count = len(traces)
    call_jitted(1, 3), call_jitted(0.5, 2.5)
    assert len(traces) == count


def test_memory_of_two_calls():
    """Shapes stay, samples are kept, and a batch guided with memory differs from one without."""
    first = run(memory=12)
    assert int(first.memory.count) == 5
    second = run(key=1, memory=first.memory)
    assert int(second.memory.count) == 10
    np.testing.assert_array_equal(second.memory.particles.x[:5], first.x)
    np.testing.assert_array_equal(second.memory.particles.x[5:10], second.x)
    alone = run(key=1)
    assert float(jnp.abs(alone.x - second.x).max()) > 1e-3
    empty = run(key=1, memory=12)
    np.testing.assert_allclose(empty.x, alone.x, rtol=1e-4, atol=1e-5)  # empty slots change nothing but rounding


def test_what_is_no_pytree_still_serves():
    """A sampler that is a plain class, a list of times, and a denoiser that indexes with an integer of its own."""

    class Plain:
        def init(self, x):
            return ()

        def step(self, key, x, carry, state, denoise, t, s):
            return DDIM().step(key, x, carry, state, denoise, t, s)

    plain = Plain()
    expected = run(sampler=DDIM(), times=np.linspace(1, 0, 7))
    np.testing.assert_array_equal(run(sampler=plain, times=list(np.linspace(1, 0, 7))).x, expected.x)

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Indexed:
        which: jax.Array

        def __call__(self, params, x, level, cond):
            return gaussian(jnp.array([5.0, params])[self.which], x, level, cond)

    model = DiffusionModel(Indexed(jnp.int32(1)), VPLinear(), (3,))
    np.testing.assert_allclose(run(model=model).x, run().x, rtol=1e-4, atol=1e-5)  # float32


def test_image_to_image_starts_from_x_init():
    times = log_snr_times(VPLinear(), 6, t_max=0.3)
    x = diffuse(jax.random.key(7), jnp.full((5, 3), 2.0), VPLinear()(0.3))
    out = run(None, x_init=x, times=times, sampler=DDIM())
    # the deterministic flow keeps the order and pulls towards the prior's mean
    order = lambda v: np.argsort(np.asarray(v)[:, 0])
    np.testing.assert_array_equal(order(out.x), order(x))


@pytest.mark.slow
def test_bfloat16_network():
    narrow = DiffusionModel(lambda p, x, t, c: gaussian(p, x, t, c).astype(jnp.bfloat16), VPLinear(), (3,))
    for at in PLACEMENTS:
        out = run(model=narrow, guidance=guidance_at(at))
        assert out.x.dtype == jnp.float32
        np.testing.assert_allclose(out.x, run(guidance=guidance_at(at)).x, atol=0.1)  # 8 bits of x̂0 in units of 1


@SLOW
@pytest.mark.parametrize("at", PLACEMENTS)
def test_bfloat16_batch_is_moved_as_in_float32(at):
    """A batch, references and memory in bfloat16 are the float32 ones of the same values, rounded once, at the end."""
    guidance = MMDGuidance(kernel=None if at != "diffused" else RBF(None), at=at)

    @jax.jit
    def moved(x, refs, memory):
        bound = guide_sampler(DDIM(), guidance, refs, memory=memory).bound
        t, s = VPLinear()(0.6), VPLinear()(0.5)
        if at == "denoised":
            return bound.denoised(x, bound.init(x), 0.5, t)
        return bound.after_step(jax.random.key(9), x, bound.init(x), 0.5, t, s)

    for size in (1.0, 1e4, 1e12):
        sets = [size * jax.random.normal(jax.random.key(i), (6, 300)) + size for i in range(3)]
        narrow = [x.astype(jnp.bfloat16) for x in sets]
        wide = [x.astype(jnp.float32) for x in narrow]
        (found, state), (expected, _) = (
            moved(x, refs, Memory.empty(6, (300,)).push(Particles(old))) for x, refs, old in (narrow, wide)
        )
        assert found.dtype == jnp.bfloat16
        assert state.mmd2.dtype == state.shift_norm.dtype == jnp.float32
        assert bool(jnp.isfinite(found).all() & (state.shift_norm > 0))
        np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16))


def bits():
    """A hash of samples of every placement."""
    made = [run(sampler=DDIM(1.0), guidance=guidance_at(at)) for at in PLACEMENTS]
    return tree_hash([(samples.x, samples.trace) for samples in made])


def test_import_is_light_and_bits_are_the_same_in_every_run_and_process():
    """At import no backend is initialised (no JAX array made), and nothing heavy is pulled in."""
    code = """
import mmdjax, jax
assert not jax._src.xla_bridge._backends, "a JAX array was made at import"
heavy = {"matplotlib", "diffrax", "equinox", "sklearn", "torch", "flax", "tqdm"} & set(sys.modules)
assert not heavy, heavy
import test_sampling
print(test_sampling.bits())
"""
    assert {bits(), bits()} == set(run_python(code).split())


def test_progress_bar_inside_jit(capfd):
    jax.block_until_ready(jax.jit(lambda key: guided_sample(
        0.3, key, REFS, model=MODEL, num_samples=5, num_steps=6, progress=True
    ).x)(jax.random.key(0)))  # fmt: skip
    jax.effects_barrier()
    assert "6/6" in capfd.readouterr().err


def run_python(code, **environment):
    import os

    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{code}"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_program_does_not_grow_with_the_steps():
    """Steps are in a scan, whose times are an argument: 1,000 compile in what 10 take."""

    def length(num_steps):
        return len(jax.jit(lambda times: run(times=times).x).lower(jnp.linspace(1.0, 0.0, num_steps + 1)).as_text())

    assert length(1000) < 1.01 * length(10)  # longer by the digits of the count, here and there


def test_export():
    """A guided sampler written by jax.export, for machines of three kinds, gives the same samples when read again."""

    def sample(key_data, refs):
        key = jax.random.wrap_key_data(key_data)
        return guided_sample(0.3, key, refs, model=MODEL, num_samples=5, num_steps=6).x

    inputs = jax.random.key_data(jax.random.key(7)), REFS
    written = jax.export.export(jax.jit(sample), platforms=("cpu", "cuda", "tpu"))(*inputs).serialize()
    read = jax.export.deserialize(written)
    np.testing.assert_allclose(read.call(*inputs), jax.jit(sample)(*inputs), rtol=2e-6)  # float32, fused otherwise
