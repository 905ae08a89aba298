import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from safetensors.numpy import load_file

from mmdjax import DDIM, DDPM, DPMSolverPP2M, EulerMaruyama, Heun, Level, SDEDPMSolverPP2M, from_model
from mmdjax.schedules import (
    EDM,
    VE,
    Cosine,
    Discrete,
    DiscreteTime,
    RectifiedFlow,
    ScaledLinear,
    VPLinear,
    log_snr_times,
    uniform_times,
)

DETERMINISTIC = {"ddim": DDIM(), "heun": Heun(), "dpmpp": DPMSolverPP2M()}
STOCHASTIC = {
    "ddim_1": DDIM(eta=1.0),
    "ddpm": DDPM(),
    "ddpm_large": DDPM("large"),
    "euler": EulerMaruyama(),
    "sde_dpmpp": SDEDPMSolverPP2M(),
}
SAMPLERS = DETERMINISTIC | STOCHASTIC | {"ddim_half": DDIM(eta=0.5)}
ORDERS = {"ddim": 1, "heun": 2, "dpmpp": 2}
WORLD = toys.Gaussian(mean=1.5, var=0.3)


@pytest.fixture(params=SAMPLERS.values(), ids=SAMPLERS.keys())
def sampler(request):
    return request.param


def denoise_in(world):
    return lambda x, level, state: (world(None, x, level), state)


def step(sampler, x, t, s, key=None, world=WORLD):
    return sampler.step(jax.random.key(0) if key is None else key, x, sampler.init(x), (), denoise_in(world), t, s)[0]


def scalars(level):
    return float(level.alpha), float(level.sigma)


# Orders


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("schedule", [VPLinear(), Cosine(), EDM(), ScaledLinear()], ids=["vp", "cos", "edm", "table"])
def test_order_on_a_gaussian(name, schedule):
    # from t = 1 to t = 1e-3, against the exact flow to that level: the step to 0 has no order
    num_steps = (128, 512)
    with jax.enable_x64(True):
        errors = [toys.flow_error(DETERMINISTIC[name], schedule, n) for n in num_steps]
    # the next power of h is .7 to 2 percent of the first at 128 steps
    assert toys.order(num_steps, errors) == pytest.approx(ORDERS[name], abs=0.05)
    assert errors[-1] < 0.01


@pytest.mark.slow
def test_order_on_a_ring():
    # a denoiser that is not linear: against 2,048 steps of Heun, 1/64 of the error at 256 steps
    num_steps, world, schedule = (64, 256), toys.ring(), VPLinear()
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(3), (64, 2))

        def solve(sampler, n):
            times = log_snr_times(schedule, n, final=False)
            return toys.run(sampler, world, schedule, times, x)

        reference = solve(Heun(), 2048)
        for name, sampler in DETERMINISTIC.items():
            errors = [float(jnp.sqrt(jnp.mean((solve(sampler, n) - reference) ** 2))) for n in num_steps]
            # particles turn sharply between modes: the error is not yet a pure power of h
            assert toys.order(num_steps, errors) == pytest.approx(ORDERS[name], abs=0.25), name


def test_heun_from_pure_noise_of_rectified_flow():
    with jax.enable_x64(True):
        num_steps = (64, 256)
        errors = [toys.flow_error(Heun(), RectifiedFlow(), n) for n in num_steps]  # finite from α = 0
        assert toys.order(num_steps, errors) == pytest.approx(2.0, abs=0.1)  # 2.02
        assert errors[-1] < 1e-4


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_from_alpha_0_it_is_finite_and_lands_on_the_data(name):
    x = jax.random.normal(jax.random.key(0), (4000, 1))
    x0 = toys.run(DETERMINISTIC[name], WORLD, RectifiedFlow(), uniform_times(200), x)
    exact = WORLD.flow(x, Level(1.0, 0.0, 1.0), Level(0.0, 1.0, 0.0))
    # 200 steps uniform in t: first order .3 percent a step of h = .005, the last step without order
    np.testing.assert_allclose(x0, exact, atol=0.03)


# The step to the clean level


@pytest.mark.parametrize("level", [Level(1.0, 0.2, 0.98), Level(0.5, 1.0, 80.0), Level(0.1, 0.9, 0.1)])
def test_last_step_returns_x0_hat(sampler, level):
    x = level.sigma * jax.random.normal(jax.random.key(1), (5, 2)) + 1
    x0_hat = WORLD(None, x, level)
    clean = Level(0.0, 1.0, 0.0)
    for seed in (0, 1):  # no noise: whatever the key
        found = step(sampler, x, level, clean, jax.random.key(seed))
        # x cancels in float32: 6e-8 of |x|/α < 250
        np.testing.assert_allclose(found, x0_hat, rtol=1e-6, atol=3e-5 if isinstance(sampler, EulerMaruyama) else 1e-6)


# Stochastic samplers: a linear denoiser makes x_s = a x_t + b + c z, whose moments are exact


def posterior(t, s, large=False):
    """DDPM: x_s given x_t and x_0, by Bayes: precisions add."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = scalars(t), scalars(s)
    r = alpha_t / alpha_s
    added = sigma_t**2 - r**2 * sigma_s**2  # x_t | x_s ~ N(r x_s, added)
    variance = 1 / (1 / sigma_s**2 + r**2 / added)
    return variance * r / added, variance * alpha_s / sigma_s**2, np.sqrt(added if large else variance)


def euler_maruyama(t, s):
    """x̄ = x/α:  x̄ + (x̂0 − x̄)/σ̄² Δ + √Δ z,  Δ the decrease of σ̄²."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = scalars(t), scalars(s)
    bar2 = (sigma_t / alpha_t) ** 2
    delta = bar2 - (sigma_s / alpha_s) ** 2
    return alpha_s / alpha_t * (1 - delta / bar2), alpha_s * delta / bar2, alpha_s * np.sqrt(delta)


def ddim_paper(t, s, eta):
    """Song et al. 2021a, eq. 12 and 16, in its ᾱ."""
    (alpha_t, sigma_t), (alpha_s, _) = scalars(t), scalars(s)
    bar_t, bar_s = alpha_t**2, alpha_s**2
    c = eta * np.sqrt((1 - bar_s) / (1 - bar_t)) * np.sqrt(1 - bar_t / bar_s)
    direction = np.sqrt(1 - bar_s - c**2)
    return direction / sigma_t, alpha_s - direction * alpha_t / sigma_t, c


def log_snr(level):
    alpha, sigma = scalars(level)
    return np.log(alpha) - np.log(sigma)


def sde_dpm_solver_pp(t, s):
    """Lu et al. 2022b, SDE-DPM-Solver++(2M) of D, which is x̂0 in the first step."""
    (_, sigma_t), (alpha_s, sigma_s) = scalars(t), scalars(s)
    h = log_snr(s) - log_snr(t)
    return sigma_s / sigma_t * np.exp(-h), -alpha_s * np.expm1(-2 * h), sigma_s * np.sqrt(-np.expm1(-2 * h))


def half_ratio(last, t, s):
    """r of D = x̂0 + r (x̂0 − x̂0₋):  h/2h₋."""
    return (log_snr(s) - log_snr(t)) / (2 * (log_snr(t) - log_snr(last)))


COEFFICIENTS = {  # (of x_t, of x̂0, of z)
    "ddim_1": posterior,
    "ddpm": posterior,
    "ddpm_large": functools.partial(posterior, large=True),
    "euler": euler_maruyama,
    "ddim_half": functools.partial(ddim_paper, eta=0.5),
    "sde_dpmpp": sde_dpm_solver_pp,
}
EXTRAPOLATION = {"sde_dpmpp": half_ratio}
WEAK_ORDERS = {"sde_dpmpp": 2}  # the others' is 1


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("ends", [(1.0, 0.9), (0.4, 0.39), (0.3, 0.001)])
def test_step_is_the_papers(name, ends):
    with jax.enable_x64(True):
        t, s = (VPLinear()(v) for v in ends)
        x, key = jax.random.normal(jax.random.key(0), (5, 2)), jax.random.key(7)
        of_x, of_x0, of_z = COEFFICIENTS[name](t, s)
        expected = of_x * x + of_x0 * WORLD(None, x, t) + of_z * jax.random.normal(key, x.shape)
        np.testing.assert_allclose(step(SAMPLERS[name], x, t, s, key), expected, rtol=1e-9, atol=1e-11)  # float64


def moments(name, schedule, times, world=WORLD):
    """Mean and variance at times[-1], exactly, from those of x at times[0]."""
    levels = jax.tree.map(np.float64, toys.levels_at(schedule, jnp.asarray(times)))
    at = [Level(*row) for row in zip(levels.t, levels.alpha, levels.sigma, strict=True)]
    mean, var = world.moments(at[0])
    mean, cov, last = np.array([mean, 0.0]), np.diag([var, 0.0]), None  # of x and the last x̂0
    for t, s in itertools.pairwise(at):
        of_x, of_x0, of_z = COEFFICIENTS[name](t, s)
        r = EXTRAPOLATION[name](last, t, s) if name in EXTRAPOLATION and last is not None else 0.0
        alpha, sigma = scalars(t)
        gain = alpha * world.var / (alpha**2 * world.var + sigma**2)  # x̂0 = mean + gain (x − α mean)
        a = np.array([[of_x + of_x0 * (1 + r) * gain, -of_x0 * r], [gain, 0.0]])
        b = np.array([of_x0 * (1 + r), 1.0]) * (world.mean - gain * alpha * world.mean)
        mean, cov, last = a @ mean + b, a @ cov @ a.T + np.diag([of_z**2, 0.0]), t
    return float(mean[0]), float(cov[0, 0])


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("schedule", [VPLinear(), Cosine()], ids=["vp", "cosine"])
def test_weak_order(name, schedule):
    num_steps = (200, 400, 800)
    with jax.enable_x64(True):
        exact = np.array(WORLD.moments(jax.tree.map(float, schedule(1e-3))))
        found = [moments(name, schedule, log_snr_times(schedule, n, final=False)) for n in num_steps]
    errors = np.abs(np.array(found) - exact)
    # started from the exact mean, a linear step keeps it: only the variance is off
    np.testing.assert_allclose(errors[:, 0], 0.0, atol=1e-9)  # float64, 800 steps
    # the next power of h is 2 percent of the first at 200 steps
    assert toys.order(num_steps, errors[:, 1]) == pytest.approx(WEAK_ORDERS.get(name, 1), abs=0.05)


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_samples_have_the_moments_of_the_recursion(name):
    n, schedule = 40_000, VPLinear()
    times = log_snr_times(schedule, 12, final=False)  # few steps: the sampler's own bias must show
    mean, var = moments(name, schedule, times)
    x = WORLD.sample(jax.random.key(5), n, 1, schedule(1.0))
    x = np.asarray(toys.run(SAMPLERS[name], WORLD, schedule, times, x, jax.random.key(6)))
    # 4 standard errors of a Gaussian's mean and variance; standard errors are .003 and .002 or so
    assert abs(x.mean(dtype=np.float64) - mean) < 4 * np.sqrt(var / n)
    assert abs(x.var(dtype=np.float64) - var) < 4 * var * np.sqrt(2 / n)


def test_from_alpha_0_samples_of_the_sde_have_the_datas_moments():
    n = 40_000
    x = jax.random.normal(jax.random.key(5), (n, 1))
    x = np.asarray(toys.run(SDEDPMSolverPP2M(), WORLD, RectifiedFlow(), uniform_times(200), x, jax.random.key(6)))
    # 4 standard errors; the variance's is .002, more than its bias in 200 steps (DDPM's is .009)
    assert abs(x.mean(dtype=np.float64) - WORLD.mean) < 4 * np.sqrt(WORLD.var / n)
    assert abs(x.var(dtype=np.float64) - WORLD.var) < 4 * WORLD.var * np.sqrt(2 / n)


@pytest.mark.parametrize("schedule", [VPLinear(), VE(), ScaledLinear()], ids=["vp", "ve", "table"])
def test_ddim_with_eta_1_is_ddpm(schedule):
    times = uniform_times(20)
    x = jax.random.normal(jax.random.key(1), (6, 2)) * float(
        jnp.hypot(*[getattr(schedule(1.0), k) for k in ("alpha", "sigma")])
    )
    ddim, ddpm = (
        toys.run(s, toys.ring(), schedule, times, x, jax.random.key(2)) for s in (DDIM(eta=1.0), DDPM("small"))
    )
    np.testing.assert_allclose(ddim, ddpm, rtol=1e-4, atol=1e-4)  # the same numbers, rounded otherwise, twenty steps


def test_ddpm_variance_is_checked():
    with pytest.raises(ValueError, match="variance is 'learned'"):
        DDPM("learned")


# DPM-Solver++ 2M, deterministic and not


def dpm_solver_pp_2m(world, levels, x, noise=None):
    """Lu et al. 2022b, algorithm 2, as printed; with noise SDE-DPM-Solver++(2M). x̂0 alone where λ is infinite."""
    q_last = lam_last = None
    for i, ((alpha_t, sigma_t), (alpha_s, sigma_s)) in enumerate(itertools.pairwise(levels)):
        q = np.asarray(world(None, x, Level(0.0, alpha_t, sigma_t)))
        if sigma_s == 0:
            x = alpha_s * q
            continue
        lam, lam_s = (np.log(a) - np.log(s) if a > 0 else -np.inf for a, s in ((alpha_t, sigma_t), (alpha_s, sigma_s)))
        h = lam_s - lam
        if q_last is None or not np.isfinite(lam_last):
            d = q
        else:
            r = (lam - lam_last) / h
            d = (1 + 1 / (2 * r)) * q - 1 / (2 * r) * q_last
        if noise is None:
            x = sigma_s / sigma_t * x - alpha_s * np.expm1(-h) * d
        else:
            fresh = -np.expm1(-2 * h)
            x = sigma_s / sigma_t * np.exp(-h) * x + alpha_s * fresh * d + sigma_s * np.sqrt(fresh) * noise[i]
        q_last, lam_last = q, lam
    return x


@pytest.mark.parametrize("name", ["dpmpp", "sde_dpmpp"])
@pytest.mark.parametrize("schedule", [VPLinear(), EDM(), RectifiedFlow()], ids=["vp", "edm", "alpha_0"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 11])
def test_dpm_solver_is_the_printed_algorithm(name, schedule, num_steps):
    with jax.enable_x64(True):
        times = uniform_times(num_steps)
        grid = toys.levels_at(schedule, jnp.asarray(times))
        levels = list(zip(np.asarray(grid.alpha), np.asarray(grid.sigma), strict=True))
        x, key = jax.random.normal(jax.random.key(0), (6, 2)) * levels[0][1], jax.random.key(7)
        noise = [jax.random.normal(jax.random.fold_in(key, i), x.shape) for i in range(num_steps)]  # of toys.run
        found = toys.run(SAMPLERS[name], toys.ring(), schedule, times, x, key)
        expected = dpm_solver_pp_2m(toys.ring(), levels, x, noise if name in STOCHASTIC else None)
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-9)  # float64


@pytest.mark.parametrize(
    ("dpm", "first_order"), [(DPMSolverPP2M(), DDIM()), (SDEDPMSolverPP2M(), DDPM())], ids=["ode", "sde"]
)
def test_first_and_last_dpm_solver_steps_are_of_order_1(dpm, first_order):
    levels = [VPLinear()(t) for t in (0.9, 0.5, 0.0)]
    x, key, denoise = jax.random.normal(jax.random.key(0), (6, 2)), jax.random.key(0), denoise_in(toys.ring())
    first, carry, _ = dpm.step(key, x, dpm.init(x), (), denoise, levels[0], levels[1])
    expected = first_order.step(key, x, (), (), denoise, levels[0], levels[1])[0]
    np.testing.assert_allclose(first, expected, rtol=1e-5, atol=1e-6)  # float32
    last, *_ = dpm.step(key, first, carry, (), denoise, levels[1], levels[2])
    np.testing.assert_allclose(last, denoise(first, levels[1], ())[0], rtol=1e-6)


# diffusers' schedulers (tests/fixtures, recorded by tests/parity/record_fixtures.py)


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        *(("ddim_0", DDIM()), ("ddim_1", DDIM(eta=1.0)), ("euler", DDIM()), ("dpmpp_2m", DPMSolverPP2M())),
        *(("ddpm_small", DDPM()), ("ddpm_large", DDPM("large"))),
    ],
)
def test_ten_steps_are_the_recorded_ones(monkeypatch, name, sampler):
    recorded = load_file(Path(__file__).parent / "fixtures" / "sd_samplers.safetensors")
    noise = iter(recorded["noise"])
    monkeypatch.setattr("mmdjax.samplers.noise_like", lambda key, x, s: (s.sigma > 0) * jnp.asarray(next(noise)))
    network = from_model(lambda params, x, t, cond: toys.noise_prediction(x, t[:, None]), "eps", DiscreteTime(1000))
    schedule = Discrete(recorded["alphas_cumprod"])
    levels = [schedule(t) for t in recorded[f"{name}.times"]]
    x = jnp.asarray(recorded["start"])
    carry = sampler.init(x)
    for t, s in itertools.pairwise(levels):
        denoise = lambda x, level, state: (network(None, x, level, None), state)
        x, carry, _ = sampler.step(jax.random.key(0), x, carry, (), denoise, t, s)
    # float32 on both sides; x̂0 = (x − σ ε̂)/α with α down to .07
    np.testing.assert_allclose(x, recorded[f"{name}.x"], rtol=1e-5, atol=1e-5)


# Calls and state


@pytest.mark.parametrize(
    ("sampler", "calls"), [(s, 1) for k, s in SAMPLERS.items() if k != "heun"] + [(Heun(), 2)], ids=lambda v: repr(v)
)
def test_state_passes_through_every_call(sampler, calls):
    levels = [VPLinear()(t) for t in (1.0, 0.5, 0.2, 0.0)]

    def denoise(x, level, state):
        return WORLD(None, x, level), state + 1

    @jax.jit
    def one(x, carry, state, t, s):
        return sampler.step(jax.random.key(0), x, carry, state, denoise, t, s)

    x = jnp.ones((3, 2))
    carry, state, counts = sampler.init(x), jnp.zeros((), int), []
    for t, s in itertools.pairwise(levels):
        x, carry, state = one(x, carry, state, t, s)
        counts.append(int(state))
    assert counts == [calls, 2 * calls, 2 * calls + 1]  # one for the step to σ = 0


def test_the_network_is_asked_at_the_level_x_has():
    seen = []

    def denoise(x, level, state):
        seen.append((float(level.t), np.asarray(x)))
        return WORLD(None, x, level), state

    x, (t, s) = jnp.ones((3, 2)), (VPLinear()(v) for v in (0.7, 0.4))
    with jax.disable_jit():
        Heun().step(jax.random.key(0), x, (), (), denoise, t, s)
    assert [time for time, _ in seen] == [pytest.approx(0.7), pytest.approx(0.4)]  # float32
    np.testing.assert_allclose(seen[1][1], step(DDIM(), x, t, s), rtol=1e-6)  # predicted by DDIM


# Transformations


def test_inside_scan_vmap_and_grad(sampler):
    schedule, times = VPLinear(), np.array([1.0, 0.6, 0.3, 0.05, 0.0])
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(jax.random.key(1), (4, 2))

    def sample(key, mean):
        return toys.run(sampler, toys.Gaussian(mean, 0.3), schedule, times, x, key)

    alone = jnp.stack([sample(k, 1.5) for k in keys])
    np.testing.assert_allclose(jax.vmap(sample, (0, None))(keys, 1.5), alone, rtol=1e-4, atol=1e-5)  # float32
    if sampler in DETERMINISTIC.values():
        np.testing.assert_array_equal(alone[0], alone[1])
    else:
        assert np.abs(alone[0] - alone[1]).max() > 0.1

    # x is affine in the mean: a difference quotient is exact but for float32, .5 percent of its noise
    slope = jax.grad(lambda mean: sample(keys[0], mean).sum())(1.5)
    quotient = (sample(keys[0], 2.5) - sample(keys[0], 0.5)).sum() / 2
    np.testing.assert_allclose(slope, quotient, rtol=1e-3)


def test_gradient_to_eta_is_finite():
    def total(eta):
        return toys.run(DDIM(eta), WORLD, VPLinear(), np.array([1.0, 0.5, 0.0]), jnp.ones((2, 2))).sum()

    # η = 0 is the edge of √v, and there √(σ² − v) has v = 0
    assert np.isfinite(jax.jit(jax.vmap(jax.grad(total)))(jnp.array([0.0, 0.5, 1.0]))).all()
