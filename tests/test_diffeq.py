"""Adaptive solvers against closed forms on Gaussian data, against fine fixed steps, and against themselves."""

import functools
import subprocess
import sys

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdjax import DDIM, RBF, DiffusionModel, MMDGuidance, guided_sample
from mmdjax.diffeq import _worst_rms, probability_flow, reverse_sde
from mmdjax.schedules import EDM, RectifiedFlow, ScaledLinear, VPLinear, log_snr_times

MU, SPREAD = 0.7, 0.4  # the data: N(MU, SPREAD²) in every coordinate
KEY = jax.random.key(0)
GUIDANCE = MMDGuidance(kernel=RBF(1.0), scale=0.5, inner_steps=1)


def denoiser(mu, x, level, cond):
    """E[x_0 | x_t] for N(mu, SPREAD²)."""
    shrink = SPREAD**2 * level.alpha / (level.alpha**2 * SPREAD**2 + level.sigma**2)
    return mu + shrink * (x - level.alpha * mu)


def spread_at(level):
    return jnp.sqrt(level.alpha**2 * SPREAD**2 + level.sigma**2)


def exact_flow(x, t, s):
    """The flow is affine: quantiles go to quantiles."""
    return s.alpha * MU + spread_at(s) / spread_at(t) * (x - t.alpha * MU)


def gaussian(schedule, d=2):
    return DiffusionModel(denoiser, schedule, (d,))


def start(schedule, t, n, d=2):
    level = schedule(t)
    return level.alpha * MU + spread_at(level) * jax.random.normal(jax.random.key(1), (n, d))


def flow(model, x, tol=1e-3, refs=None, mu=MU, guidance=GUIDANCE, **kwargs):
    return probability_flow(
        mu, KEY, refs, model=model, num_samples=len(x), x_init=x, guidance=guidance, rtol=tol, atol=tol, **kwargs
    )


def references(m=5):
    return 1.2 + 0.3 * jax.random.normal(jax.random.key(2), (m, 2))


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


# --- closed forms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule, t_max", [(VPLinear(), 1.0), (EDM(), 1.0), (ScaledLinear(), 1.0), (RectifiedFlow(), 0.999)])
def test_flow_is_the_closed_form_to_the_tolerance(schedule, t_max):
    model, x = gaussian(schedule), start(schedule, t_max, 16)
    exact = exact_flow(x, schedule(t_max), schedule(1e-3))
    errors = []
    for tol in (1e-2, 1e-3, 1e-4):
        samples = flow(model, x, tol, t_max=t_max, final=False)
        errors.append(float(jnp.abs(samples.x - exact).max()))
        assert errors[-1] < 5 * tol  # the tolerance is a step's; a dozen steps err both ways
        assert samples.num_evaluations <= 110 and samples.succeeded
    assert errors[0] > 4 * errors[1] > 16 * errors[2] or errors[2] < 1e-5


def test_final_is_the_denoised_end():
    model, x = gaussian(VPLinear()), start(VPLinear(), 1.0, 4)
    end = flow(model, x, final=False).x
    np.testing.assert_allclose(flow(model, x).x, denoiser(MU, end, VPLinear()(1e-3), None), rtol=1e-5)


def test_flow_from_pure_noise(float64):
    # at α = 0 a sample is its noise, which goes to MU + SPREAD · noise; the one DDIM step errs by O(.001²)
    schedule, noise = RectifiedFlow(), jax.random.normal(jax.random.key(1), (8, 2))
    samples = flow(gaussian(schedule), noise, 1e-8, final=False)
    np.testing.assert_allclose(samples.x, exact_flow(noise, schedule(1.0), schedule(1e-3)), atol=2e-6)


def test_same_key_starts_where_guided_sample_starts():
    model = gaussian(VPLinear())
    fixed = guided_sample(MU, KEY, None, model=model, num_samples=8, sampler=DDIM(), num_steps=400)
    np.testing.assert_allclose(probability_flow(MU, KEY, None, model=model, num_samples=8).x, fixed.x, atol=0.02)


@pytest.mark.parametrize("schedule", [VPLinear(), RectifiedFlow()])
def test_reverse_sde_has_the_marginal(schedule):
    model, n = gaussian(schedule), 4096
    x = start(schedule, 1.0, n)
    samples = reverse_sde(MU, KEY, None, model=model, num_samples=n, x_init=x, final=False)
    end = schedule(1e-3)
    count, sd = samples.x.size, float(spread_at(end))
    assert abs(samples.x.mean() - end.alpha * MU) < 4 * sd / count**0.5
    assert abs(samples.x.var() - sd**2) < 4 * sd**2 * (2 / count) ** 0.5
    # the noise is the SDE's, not the start's: from one start the samples spread as much, whatever the start was
    assert abs(jnp.corrcoef(samples.x[:, 0], x[:, 0])[0, 1]) < 4 / n**0.5


def test_one_key_is_one_path():
    model, x = gaussian(VPLinear()), start(VPLinear(), 1.0, 16)

    def solve(tol):
        samples = reverse_sde(MU, KEY, None, model=model, num_samples=16, x_init=x, rtol=tol, atol=tol)
        return samples.x, int(samples.num_steps)

    (coarse, few), (middle, more), (fine, most) = map(solve, (1e-1, 1e-2, 1e-3))
    errors = [float(jnp.abs(x - fine).max()) for x in (coarse, middle)]
    assert few < more < most
    assert errors[0] < 0.1 and errors[1] < 0.01 and errors[1] < errors[0] / 3


# --- guidance -----------------------------------------------------------------------------------------------------------


def test_guided_flow_is_the_limit_of_ddim(float64):
    schedule, refs = VPLinear(), references()
    model, x = gaussian(schedule), start(schedule, 1.0, 6)
    adaptive = flow(model, x, 1e-8, refs).x

    def fixed(num_steps):
        times = log_snr_times(schedule, num_steps)
        return guided_sample(
            MU, KEY, refs, model=model, num_samples=6, x_init=x, guidance=GUIDANCE, sampler=DDIM(), times=times
        ).x

    coarse, fine = fixed(250), fixed(500)
    errors = [float(jnp.abs(x - adaptive).max()) for x in (coarse, fine)]
    assert 1.9 < errors[0] / errors[1] < 2.1  # DDIM is of order 1
    assert jnp.abs(2 * fine - coarse - adaptive).max() < 1e-4  # Richardson's extrapolation
    assert jnp.abs(adaptive - flow(model, x, 1e-8).x).max() > 0.1  # and guidance did something


def test_default_guidance_moves_towards_the_references():
    model, refs = gaussian(VPLinear()), references(20)
    plain = probability_flow(MU, KEY, None, model=model, num_samples=16)
    for solve in (probability_flow, reverse_sde):
        guided = solve(MU, KEY, refs, model=model, num_samples=16)
        assert jnp.abs(guided.x.mean(0) - refs.mean(0)).max() < 0.15 < jnp.abs(plain.x.mean(0) - refs.mean(0)).max()


def test_scale_zero_is_the_plain_flow():
    model, x = gaussian(VPLinear()), start(VPLinear(), 1.0, 4)
    still = MMDGuidance(kernel=RBF(1.0), scale=0.0, inner_steps=1)
    np.testing.assert_allclose(flow(model, x, refs=references(), guidance=still).x, flow(model, x).x, rtol=1e-5)


def test_permuting_the_batch_permutes_the_samples(float64):
    model, x = gaussian(VPLinear()), start(VPLinear(), 1.0, 6)
    order = jnp.array([3, 0, 5, 1, 4, 2])
    samples, permuted = (flow(model, z, refs=references()) for z in (x, x[order]))
    np.testing.assert_allclose(permuted.x, samples.x[order], rtol=1e-10)
    assert permuted.num_steps == samples.num_steps
    alone = flow(model, x[:1], refs=references())
    assert jnp.abs(alone.x[0] - samples.x[0]).max() > 0.01  # the batch is one coupled state


def test_window_is_unguided_then_guided_then_unguided(float64):
    schedule, refs = VPLinear(), references()
    model, x = gaussian(schedule), start(schedule, 1.0, 6)
    windowed = MMDGuidance(kernel=RBF(1.0), scale=0.5, inner_steps=1, window=(0.3, 0.8))
    samples = flow(model, x, 1e-8, refs, guidance=windowed)
    first = flow(model, x, 1e-8, t_min=0.7, final=False).x
    second = flow(model, first, 1e-8, refs, t_max=0.7, t_min=0.2, final=False).x
    np.testing.assert_allclose(samples.x, flow(model, second, 1e-8, t_max=0.2).x, atol=1e-6)
    # at an edge the solver starts afresh instead of searching for it
    assert samples.num_rejected < 10


def test_window_edges_outside_the_interval_change_nothing():
    model, x = gaussian(VPLinear()), start(VPLinear(), 0.9, 4)
    wide = MMDGuidance(kernel=RBF(1.0), scale=0.5, inner_steps=1, window=(0.05, 0.9999))
    whole, cut = (flow(model, x, refs=references(), guidance=g, t_max=0.9) for g in (GUIDANCE, wide))
    np.testing.assert_array_equal(whole.x, cut.x)
    assert whole.num_steps == cut.num_steps and whole.num_evaluations == cut.num_evaluations


def test_memory_of_two_calls():
    model, refs = gaussian(VPLinear()), references()
    first = probability_flow(MU, KEY, refs, model=model, num_samples=4, guidance=GUIDANCE, memory=8)
    assert first.memory.count == 4
    second = probability_flow(MU, KEY, refs, model=model, num_samples=4, guidance=GUIDANCE, memory=first.memory)
    assert second.memory.count == 8
    assert jnp.abs(second.x - first.x).max() > 1e-3  # guided around the first four


# --- step control -------------------------------------------------------------------------------------------------------


def test_error_norm_is_the_worst_samples():
    errors = jnp.zeros((5, 2, 2)).at[3].set(jnp.array([[3.0, 0.0], [4.0, 0.0]]))
    assert _worst_rms(errors) == 2.5
    np.testing.assert_array_equal(jax.grad(_worst_rms)(jnp.zeros((2, 3))), 0.0)


def test_easy_samples_do_not_excuse_a_hard_one():
    model, hard = gaussian(VPLinear()), jnp.full((1, 2), -3.0)
    crowd = jnp.concatenate([hard, 0.1 * jax.random.normal(KEY, (63, 2))])
    alone, together = flow(model, hard, final=False), flow(model, crowd, final=False)
    assert together.num_steps >= alone.num_steps
    np.testing.assert_allclose(together.x[0], alone.x[0], atol=1e-5)


@pytest.mark.parametrize("solve, solver", [(probability_flow, None), (probability_flow, diffrax.Heun()), (reverse_sde, None)])
@pytest.mark.parametrize("schedule", [VPLinear(), RectifiedFlow()])
def test_evaluations_are_counted(solve, solver, schedule):
    calls = []

    def counted(mu, x, level, cond):
        jax.debug.callback(lambda t: calls.append(float(t)), level.t)
        return denoiser(mu, x, level, cond)

    model = DiffusionModel(counted, schedule, (2,))
    guidance = MMDGuidance(kernel=RBF(1.0), inner_steps=1, window=(0.2, 0.8))
    samples = solve(
        MU, KEY, references(), model=model, num_samples=2, guidance=guidance, solver=solver, rtol=0.1, atol=0.1
    )
    jax.block_until_ready(samples.x)
    jax.effects_barrier()
    assert len(calls) == samples.num_evaluations
    assert min(calls) >= 0.999e-3 and max(calls) <= 1.0


def test_giving_up():
    model, x = gaussian(VPLinear()), start(VPLinear(), 1.0, 2)
    with pytest.raises(RuntimeError, match="max_steps"):
        flow(model, x, max_steps=2)
    samples = flow(model, x, max_steps=2, throw=False)
    assert not samples.succeeded and samples.num_steps == 2


# --- transformations ----------------------------------------------------------------------------------------------------


def central(f, x, h=1e-5):
    return (f(x + h) - f(x - h)) / (2 * h)


@pytest.mark.parametrize("name", ["params", "scale", "bandwidth", "refs", "x_init"])
def test_gradient_is_the_finite_difference(float64, name):
    model, x, refs = gaussian(VPLinear()), start(VPLinear(), 1.0, 3), references()
    weights = jnp.arange(6.0).reshape(3, 2)

    def loss(value):
        shifted = {"params": MU, "scale": 0.5, "bandwidth": 1.0, "refs": 0.0, "x_init": 0.0} | {name: value}
        guidance = MMDGuidance(kernel=RBF(shifted["bandwidth"]), scale=shifted["scale"], inner_steps=1)
        move = jnp.array([1.0, -0.5])  # a direction for the arrays
        samples = flow(
            model, x + shifted["x_init"] * move, 1e-9, refs + shifted["refs"] * move, shifted["params"], guidance
        )
        return jnp.sum(weights * samples.x)

    at = {"params": MU, "scale": 0.5, "bandwidth": 1.0, "refs": 0.0, "x_init": 0.0}[name]
    got = jax.grad(loss)(at)
    assert abs(got) > 1e-3
    np.testing.assert_allclose(got, central(loss, at), rtol=1e-5, atol=1e-7)


def test_gradient_of_the_sde_to_the_datas_mean():
    # the start is forgotten, so moving the data's mean moves every sample as far
    def mean(mu):
        return reverse_sde(mu, KEY, None, model=gaussian(VPLinear()), num_samples=4).x.mean()

    np.testing.assert_allclose(jax.grad(mean)(MU), 1.0, atol=0.02)


def test_forward_mode_with_its_adjoint():
    model, x = gaussian(VPLinear()), start(VPLinear(), 1.0, 2)
    end = functools.partial(flow, model, final=False)
    forward = jax.jvp(lambda x: end(x, adjoint=diffrax.ForwardMode()).x, (x,), (jnp.ones_like(x),))[1]
    ratio = spread_at(VPLinear()(1e-3)) / spread_at(VPLinear()(1.0))
    np.testing.assert_allclose(forward, ratio, rtol=5e-3)


def test_jit_and_vmap_change_nothing():
    model, refs = gaussian(VPLinear()), references()
    solve = functools.partial(probability_flow, model=model, num_samples=3, guidance=GUIDANCE)
    plain = solve(MU, KEY, refs).x
    np.testing.assert_allclose(jax.jit(solve)(MU, KEY, refs).x, plain, atol=1e-5)
    keys = jnp.stack([KEY, jax.random.key(1)])
    np.testing.assert_allclose(jax.vmap(lambda key: solve(MU, key, refs).x)(keys)[0], plain, atol=1e-5)


@pytest.mark.parametrize("solve", [probability_flow, reverse_sde])
def test_second_call_compiles_nothing(solve):
    compiled = []

    def listen(name, seconds, **kwargs):
        if "backend_compile" in name:
            compiled.append(name)

    def call(mu, seed, refs, scale, tol, t_min, solver):
        guidance = MMDGuidance(kernel=RBF(scale), scale=scale, inner_steps=1)
        model = DiffusionModel(denoiser, VPLinear(), (2,))
        numbers = {"rtol": tol, "atol": tol, "t_min": t_min}
        return solve(mu, jax.random.key(seed), refs, model=model, num_samples=2, guidance=guidance, solver=solver, **numbers)

    solver = diffrax.Tsit5 if solve is probability_flow else diffrax.SRA1
    refs = references(), references() + 1.0
    jax.monitoring.register_event_duration_secs_listener(listen)
    call(0.5, 0, refs[0], 0.5, 0.1, 1e-3, solver())
    assert compiled  # the listener hears
    compiled.clear()
    call(0.6, 1, refs[1], 1, 0.2, 2e-3, solver())
    assert not compiled


# --- mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solve", [probability_flow, reverse_sde])
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"guidance": MMDGuidance(at="sample")}, ValueError, 'at="sample" moves x after a step.*guided_sample'),
        ({"guidance": MMDGuidance.paper()}, ValueError, 'at="clean"'),
        ({"guidance": 3}, TypeError, "guidance is int"),
        ({"key": jnp.zeros(2, jnp.uint32)}, TypeError, "jax.random.key"),
        ({"refs": jnp.zeros((4, 3))}, ValueError, r"refs have shape \(4, 3\)"),
        ({"x_init": jnp.zeros((3, 2))}, ValueError, r"x_init has shape \(3, 2\)"),
        ({"num_samples": 0}, ValueError, "num_samples is 0"),
        ({"t_min": 0.0}, ValueError, "0 < t_min < t_max <= 1"),
        ({"t_max": 1.5}, ValueError, "0 < t_min < t_max <= 1"),
        ({"rtol": 0.0, "atol": 0.0}, ValueError, "nor both 0"),
        ({"rtol": -1.0}, ValueError, "must not be negative"),
        ({"max_steps": 0}, ValueError, "max_steps is 0"),
        ({"solver": "tsit5"}, TypeError, "diffrax.Tsit5"),
        ({"adjoint": "direct"}, TypeError, "diffrax.DirectAdjoint"),
        ({"memory": 0}, ValueError, "memory is 0"),
    ],
)
def test_mistakes_are_named(solve, change, error, message):
    call = {"key": KEY, "refs": references(), "model": gaussian(VPLinear()), "num_samples": 2, **change}
    with pytest.raises(error, match=message):
        solve(MU, call.pop("key"), call.pop("refs"), **call)


def test_import_leaves_diffrax_alone():
    code = "import sys, mmdjax; assert 'diffrax' not in sys.modules and 'equinox' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
