"""Adaptive solvers against closed forms on Gaussian data, against fine fixed steps, and against themselves.

Most tests share shapes and static choices: compiling a solver costs more than running it.
"""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdjax import DDIM, RBF, Avoid, DiffusionModel, Energy, MMDGuidance, Particles, guided_sample, mmd2
from mmdjax.diffeq import _worst_rms, probability_flow, reverse_sde
from mmdjax.schedules import EDM, RectifiedFlow, ScaledLinear, VPLinear, log_snr_times
from mmdjax.tree import replace

MU, SPREAD = 0.7, 0.4  # the data: N(MU, SPREAD²) in every coordinate
KEY = jax.random.key(0)
N, MANY = 8, 4096
GUIDANCE = MMDGuidance(kernel=RBF(1.0), scale=0.5, inner_steps=1, precondition="field")
VP = VPLinear()


def denoiser(mu, x, level, cond):
    """E[x_0 | x_t] for N(mu, SPREAD²)."""
    shrink = SPREAD**2 * level.alpha / (level.alpha**2 * SPREAD**2 + level.sigma**2)
    return mu + shrink * (x - level.alpha * mu)


def spread_at(level):
    return jnp.sqrt(level.alpha**2 * SPREAD**2 + level.sigma**2)


def exact_flow(x, t, s):
    """The flow is affine: quantiles go to quantiles."""
    return s.alpha * MU + spread_at(s) / spread_at(t) * (x - t.alpha * MU)


def gaussian(schedule=VP):
    return DiffusionModel(denoiser, schedule, (2,))


def start(schedule=VP, t=1.0, n=N):
    level = schedule(t)
    return level.alpha * MU + spread_at(level) * jax.random.normal(jax.random.key(1), (n, 2))


def flow(x, tol=1e-3, refs=None, *, mu=MU, key=KEY, solve=probability_flow, **kwargs):
    common = {"model": gaussian(), "num_samples": len(x), "x_init": x, "guidance": GUIDANCE, "final": False}
    return solve(mu, key, refs, **(common | {"rtol": tol, "atol": tol} | kwargs))


sde = functools.partial(flow, solve=reverse_sde)


def references(m=5):
    return 1.2 + 0.3 * jax.random.normal(jax.random.key(2), (m, 2))


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


# --- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [VP, *(pytest.param(s, marks=pytest.mark.slow) for s in (EDM(), ScaledLinear()))])
def test_flow_is_the_closed_form_to_the_tolerance(float64, schedule):
    x = start(schedule)
    exact = exact_flow(x, schedule(1.0), schedule(1e-3))
    errors = []
    for tol in (1e-3, 1e-5, 1e-7):
        samples = flow(x, tol, model=gaussian(schedule))
        errors.append(float(jnp.abs(samples.x - exact).max()))
        assert errors[-1] < 5 * tol  # the tolerance is of one step, and a dozen are taken
        assert samples.num_evaluations < {1e-3: 80, 1e-5: 140, 1e-7: 260}[tol]
        assert samples.succeeded
    assert errors[0] > 10 * errors[2]


def test_default_start_and_end():
    plain = {"model": gaussian(), "num_samples": N}
    samples = probability_flow(MU, KEY, None, **plain)
    noise = jax.random.normal(jax.random.split(KEY)[0], (N, 2))
    end = flow(noise).x
    np.testing.assert_allclose(samples.x, denoiser(MU, end, VP(1e-3), None), atol=1e-4)
    # the noise is guided_sample's; 400 steps of order 1 are off by a few thousandths, another start would be by tenths
    fixed = guided_sample(MU, KEY, None, sampler=DDIM(), num_steps=400, **plain)
    np.testing.assert_allclose(samples.x, fixed.x, atol=0.02)


def test_flow_from_pure_noise(float64):
    # at α = 0 a sample is its noise, which goes to MU + SPREAD · noise; the DDIM step errs by .001²
    schedule, noise = RectifiedFlow(), jax.random.normal(jax.random.key(1), (N, 2))
    exact = exact_flow(noise, schedule(1.0), schedule(1e-3))
    np.testing.assert_allclose(flow(noise, 1e-8, model=gaussian(schedule)).x, exact, atol=2e-6)


def assert_marginal(samples, schedule):
    # mean and variance within four standard errors; where a sample started is forgotten: the noise is the path's
    end = schedule(1e-3)
    count, sd = samples.size, float(spread_at(end))
    assert abs(samples.mean() - end.alpha * MU) < 4 * sd / count**0.5
    assert abs(samples.var() - sd**2) < 4 * sd**2 * (2 / count) ** 0.5
    n = len(samples)
    assert abs(jnp.corrcoef(samples[:, 0], start(schedule, n=n)[:, 0])[0, 1]) < 4 / n**0.5


@pytest.mark.slow
def test_reverse_sde_has_the_marginal_and_one_path_a_key():
    coarse, middle, fine = (sde(start(n=MANY), tol) for tol in (1e-1, 3e-2, 5e-3))
    for samples in (coarse, middle, fine):
        assert_marginal(samples.x, VP)
    errors = [jnp.sqrt(jnp.mean((samples.x - fine.x) ** 2)) for samples in (coarse, middle)]
    assert coarse.num_steps < middle.num_steps < fine.num_steps
    assert errors[0] < 0.02  # the samples spread by .4
    assert errors[1] < errors[0] / 2


@pytest.mark.slow
def test_reverse_sde_from_pure_noise():
    schedule = RectifiedFlow()
    assert_marginal(sde(start(schedule, n=MANY // 4), 5e-2, model=gaussian(schedule)).x, schedule)


# --- guidance --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_guided_flow_is_the_limit_of_ddim(float64):
    x, refs = start(), references()
    adaptive = flow(x, 1e-7, refs).x

    def fixed(num_steps):
        times = log_snr_times(VP, num_steps, final=False)
        common = {"model": gaussian(), "num_samples": N, "x_init": x, "guidance": GUIDANCE}
        return guided_sample(MU, KEY, refs, sampler=DDIM(), times=times, **common).x

    coarse, fine = fixed(250), fixed(500)
    errors = [float(jnp.abs(x - adaptive).max()) for x in (coarse, fine)]
    assert 1.9 < errors[0] / errors[1] < 2.1  # DDIM is of order 1
    assert jnp.abs(2 * fine - coarse - adaptive).max() < 1e-4  # Richardson's extrapolation
    assert jnp.abs(adaptive - flow(x, 1e-7).x).max() > 0.1  # guidance did something


@pytest.mark.slow
@pytest.mark.parametrize("solve", [probability_flow, reverse_sde])
def test_default_guidance_aligns_the_batch(solve):
    refs = Particles(references(100))
    data = Particles(MU + SPREAD * jax.random.normal(KEY, (64, 2)))
    guided = Particles(solve(MU, KEY, refs, model=gaussian(), num_samples=64).x)
    assert mmd2(Energy(), guided, refs) < 0.06 * mmd2(Energy(), data, refs)  # guided_sample: .03 to .06, by steps


def test_scale_zero_is_the_plain_flow():
    still = MMDGuidance(kernel=RBF(1.0), scale=0.0, inner_steps=1)
    np.testing.assert_allclose(flow(start(), refs=references(), guidance=still).x, flow(start()).x, rtol=1e-5)


@pytest.mark.slow
# by rounding, the average of "field" changes the sizes of adaptive steps, and these the samples: far below tolerance
@pytest.mark.parametrize(
    ("precondition", "rtol"), [pytest.param("mass", 1e-9, marks=pytest.mark.slow), ("field", 1e-7)]
)
def test_permuting_the_batch_permutes_the_samples(float64, precondition, rtol):
    x, refs = start(), references()
    order = jnp.array([3, 0, 5, 1, 7, 4, 2, 6])
    guidance = MMDGuidance(kernel=RBF(1.0), scale=0.5, inner_steps=1, precondition=precondition)
    samples, permuted = (flow(z, 1e-5, refs, guidance=guidance) for z in (x, x[order]))
    np.testing.assert_allclose(permuted.x, samples.x[order], rtol=rtol)
    assert permuted.num_steps == samples.num_steps
    other = flow(x.at[1].add(1.0), 1e-5, refs, guidance=guidance)
    assert jnp.abs(other.x[0] - samples.x[0]).max() > 1e-3  # the batch is one coupled state


@pytest.mark.slow
def test_window_is_unguided_then_guided_then_unguided(float64):
    x, refs = start(), references()
    windowed = replace(GUIDANCE, window=(0.3, 0.8))
    samples = flow(x, 1e-7, refs, guidance=windowed)
    first = flow(x, 1e-7, t_min=0.7).x
    second = flow(first, 1e-7, refs, t_max=0.7, t_min=0.2).x
    np.testing.assert_allclose(samples.x, flow(second, 1e-7, t_max=0.2).x, atol=1e-5)
    assert samples.num_rejected < 12  # the edges are known, not searched for


def test_window_edges_outside_the_interval_change_nothing():
    wide = replace(GUIDANCE, window=(0.05, 0.9999))
    whole, cut = (flow(start(VP, 0.9), refs=references(), guidance=g, t_max=0.9) for g in (GUIDANCE, wide))
    np.testing.assert_array_equal(whole.x, cut.x)
    assert whole.num_steps == cut.num_steps
    assert whole.num_evaluations == cut.num_evaluations


def test_avoiding_with_strength_zero_is_the_plain_flow():
    np.testing.assert_array_equal(flow(start(), avoid=Avoid(references(), strength=0.0)).x, flow(start()).x)


@pytest.mark.slow
@pytest.mark.parametrize("refs", [None, references()])
def test_avoiding_is_the_limit_of_ddim(float64, refs):
    """In the window of `Avoid`, whose edges the solver steps to; without references and with them."""
    x, avoid = start(), Avoid(np.float64(references(3)) - 0.4, strength=30.0, window=(0.0, 0.8), kernel=RBF(1.0))
    adaptive = flow(x, 1e-7, refs, avoid=avoid)

    def fixed(num_steps):
        times = np.concatenate([np.linspace(1.0, 0.2, num_steps + 1), np.linspace(0.2, 1e-3, num_steps + 1)[1:]])
        guidance = replace(GUIDANCE, window=(0.0, 1.0))
        held = replace(avoid, window=(0.0, 0.5))  # of the steps
        common = {"model": gaussian(), "num_samples": N, "x_init": x, "guidance": guidance, "avoid": held}
        return guided_sample(MU, KEY, refs, sampler=DDIM(), times=times, **common).x

    coarse, fine = fixed(400), fixed(800)
    assert jnp.abs(2 * fine - coarse - adaptive.x).max() < 1e-3  # Richardson's extrapolation
    assert jnp.abs(adaptive.x - flow(x, 1e-7, refs).x).max() > 0.05  # it did something
    assert refs is not None or adaptive.num_rejected < 12  # the edges are known, not searched for


@pytest.mark.slow
@pytest.mark.parametrize("solve", [probability_flow, reverse_sde])
def test_no_sample_ends_within_the_radius(solve):
    few = jnp.array([[MU, MU], [0.2, 1.3]])
    nearest = lambda x: jnp.linalg.norm(x[:, None] - few, axis=-1).min(1)
    plain, kept = (solve(MU, KEY, None, model=gaussian(), num_samples=32, avoid=a).x
                   for a in (None, Avoid(few, radius=0.35)))  # fmt: skip
    assert (nearest(plain) < 0.35).sum() > 5
    assert nearest(kept).min() > 0.35 - 1e-5


@pytest.mark.slow
def test_memory_of_two_calls():
    first = flow(start(), refs=references(), memory=2 * N)
    assert first.memory.count == N
    second = flow(start(), refs=references(), memory=first.memory)
    assert second.memory.count == 2 * N
    np.testing.assert_array_equal(second.memory.particles.x, jnp.concatenate([first.x, second.x]))
    assert jnp.abs(second.x - first.x).max() > 1e-3  # guided around the first


# --- step control ----------------------------------------------------------------------------------------------------


def test_error_norm_is_the_worst_samples():
    errors = jnp.zeros((5, 2, 2)).at[3].set(jnp.array([[3.0, 0.0], [4.0, 0.0]]))
    assert _worst_rms(errors) == 2.5
    np.testing.assert_array_equal(jax.grad(_worst_rms)(jnp.zeros((2, 3))), 0.0)


def test_easy_samples_do_not_excuse_a_hard_one(float64):
    # an absolute tolerance: relative to its own size the far sample would be the easy one
    hard, easy = jnp.full((2,), -30.0), jnp.full((2,), VP(1.0).alpha * MU)
    alone, together = (flow(jnp.stack([hard] + 7 * [other]), rtol=0.0) for other in (hard, easy))
    assert together.num_steps == alone.num_steps
    np.testing.assert_allclose(together.x[0], alone.x[0], rtol=1e-9)


@pytest.mark.parametrize(
    ("solve", "solver", "schedule"),
    [
        (probability_flow, None, VP),
        pytest.param(probability_flow, diffrax.Heun(), RectifiedFlow(), marks=pytest.mark.slow),
        pytest.param(reverse_sde, None, VP, marks=pytest.mark.slow),
    ],
)
def test_evaluations_are_counted(solve, solver, schedule):
    calls = []

    def counted(mu, x, level, cond):
        jax.debug.callback(lambda t: calls.append(float(t)), level.t)
        return denoiser(mu, x, level, cond)

    guidance = MMDGuidance(kernel=RBF(1.0), inner_steps=1, window=(0.2, 0.8))
    model = DiffusionModel(counted, schedule, (2,))
    samples = flow(start(), 0.1, references(), model=model, guidance=guidance, solver=solver, solve=solve, final=True)
    jax.block_until_ready(samples.x)
    jax.effects_barrier()
    assert len(calls) == samples.num_evaluations
    assert min(calls) > 0.999e-3
    assert max(calls) <= 1.0


def test_giving_up():
    with pytest.raises(RuntimeError, match="max_steps"):
        flow(start(), max_steps=2)
    samples = flow(start(), max_steps=2, throw=False)
    assert not samples.succeeded
    assert samples.num_steps == 2


# --- transformations -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_gradients_are_finite_differences(float64):
    # "length": the masses of "mass" cross in kinks, at which no solver is of high order
    x, refs, weights = start(), references(), jnp.arange(2.0 * N).reshape(N, 2)
    move = jnp.array([1.0, -0.5])  # the direction of the arrays' differences
    values = {"params": MU, "scale": 0.5, "bandwidth": 1.0, "refs": 0.0, "x_init": 0.0}

    @jax.jit
    @jax.value_and_grad
    def loss(at):
        kernel = RBF(at["bandwidth"])
        guidance = MMDGuidance(kernel=kernel, scale=at["scale"], inner_steps=1, precondition="length")
        samples = flow(x + at["x_init"] * move, 1e-7, refs + at["refs"] * move, mu=at["params"], guidance=guidance)
        return jnp.sum(weights * samples.x)

    (_, gradient), h = loss(values), 1e-3
    for name, value in values.items():
        difference = (loss(values | {name: value + h})[0] - loss(values | {name: value - h})[0]) / (2 * h)
        np.testing.assert_allclose(gradient[name], difference, rtol=1e-5, err_msg=name)
        assert abs(difference) > 0.01


@pytest.mark.slow
def test_gradient_of_the_sde_to_the_datas_mean():
    # the start is forgotten, so moving the data's mean moves every sample as far
    gradient = jax.grad(lambda mu: sde(start(), 5e-2, mu=mu, final=True).x.mean())(MU)
    np.testing.assert_allclose(gradient, 1.0, atol=0.02)


@pytest.mark.slow
def test_forward_mode_with_its_adjoint():
    def end(x):
        return flow(x, adjoint=diffrax.ForwardMode()).x

    tangent = jax.jvp(end, (start(),), (jnp.ones((N, 2)),))[1]
    np.testing.assert_allclose(tangent, spread_at(VP(1e-3)) / spread_at(VP(1.0)), rtol=5e-3)


@pytest.mark.slow
def test_jit_and_vmap_change_nothing():
    def end(params, x):
        return flow(x, refs=references(), mu=params).x

    plain = end(MU, start())
    both = jax.jit(jax.vmap(end, (0, None)))(jnp.array([MU, 1.0]), start())
    # rounding may change the step lengths, and x by less than the tolerance
    np.testing.assert_allclose(both[0], plain, atol=1e-3)


@pytest.mark.parametrize("solve", [probability_flow, pytest.param(reverse_sde, marks=pytest.mark.slow)])
def test_second_call_compiles_nothing(solve):
    compiled = []

    def listen(name, seconds, **kwargs):
        if "backend_compile" in name:
            compiled.append(name)

    def call(mu, seed, shift, scale, tol, t_min):
        guidance = MMDGuidance(kernel=RBF(scale), scale=scale, inner_steps=1)
        refs = references() + shift if solve is probability_flow else None
        model = DiffusionModel(denoiser, VPLinear(), (2,))
        numbers = {"t_min": t_min, "guidance": guidance, "model": model, "key": jax.random.key(seed)}
        x = start(n=N if solve is probability_flow else MANY) + shift
        return flow(x, tol, refs, mu=mu, solve=solve, **numbers)

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.jit(lambda x: x + 12345.0)(1.0)
    assert compiled  # the listener hears
    call(0.5, 0, 1.0, 0.5, 0.1, 1e-3)
    compiled.clear()
    call(0.6, 1, 2.0, 1, 0.2, 2e-3)
    assert not compiled


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solve", [probability_flow, reverse_sde])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"guidance": MMDGuidance(at="sample")}, ValueError, 'at="sample" moves x after a step.*guided_sample'),
        ({"guidance": MMDGuidance.paper()}, ValueError, 'at="clean"'),
        (
            {"guidance": MMDGuidance(at="sample"), "refs": None, "avoid": jnp.ones((4, 2))},
            ValueError,
            'at="sample" moves x after a step',
        ),
        ({"avoid": jnp.zeros((4, 3))}, ValueError, r"avoid has shape \(4, 3\)"),
        ({"key": jnp.zeros(2, jnp.uint32)}, TypeError, r"jax\.random\.key"),
        ({"refs": jnp.zeros((4, 3))}, ValueError, r"refs have shape \(4, 3\)"),
        ({"x_init": jnp.zeros((3, 2))}, ValueError, r"x_init has shape \(3, 2\)"),
        ({"num_samples": 0}, ValueError, "num_samples is 0"),
        ({"t_min": 0.0}, ValueError, "0 < t_min < t_max <= 1"),
        ({"t_max": 1.5}, ValueError, "0 < t_min < t_max <= 1"),
        ({"rtol": 0.0, "atol": 0.0}, ValueError, "nor both 0"),
        ({"rtol": -1.0}, ValueError, "must not be negative"),
        ({"max_steps": 0}, ValueError, "max_steps is 0"),
        ({"solver": "tsit5"}, TypeError, r"diffrax\.Tsit5"),
        ({"adjoint": "direct"}, TypeError, r"diffrax\.DirectAdjoint"),
        ({"memory": 0}, ValueError, "memory is 0"),
    ],
)
def test_mistakes_are_named(solve, change, error, message):
    call = {"key": KEY, "refs": references(), "model": gaussian(), "num_samples": 2, **change}
    with pytest.raises(error, match=message):
        solve(MU, call.pop("key"), call.pop("refs"), **call)
