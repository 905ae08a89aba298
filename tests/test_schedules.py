import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdjax import Level
from mmdjax._files.fingerprint import describe
from mmdjax.schedules import (
    EDM,
    VE,
    Cosine,
    Discrete,
    DiscreteTime,
    RectifiedFlow,
    ScaledLinear,
    VPLinear,
    diffuse,
    discrete_times,
    karras_times,
    log_snr_times,
    time_of_log_snr,
    uniform_times,
)
from mmdjax.tree import as_component


def zero_terminal(alphas_cumprod):
    """√ᾱ shifted to end at 0 and scaled to keep its start.  Lin et al. 2024, alg. 1."""
    root = np.sqrt(alphas_cumprod)
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def ddpm_table(num_train_steps=1000):
    return np.cumprod(1 - np.linspace(1e-4, 0.02, num_train_steps))


SCHEDULES = {
    "vp": VPLinear(),
    "cosine": Cosine(),
    "ve": VE(),
    "edm": EDM(),
    "flow": RectifiedFlow(),
    "flow_shift": RectifiedFlow(shift=3.0),
    "flow_shift_below_1": RectifiedFlow(shift=0.3),
    "scaled_linear": ScaledLinear(),
    "ddpm": Discrete(ddpm_table()),
    "zero_terminal": Discrete(zero_terminal(ddpm_table())),
    "table_of_4": Discrete(np.array([0.9, 0.6, 0.2, 0.01])),
    "table_of_1": Discrete(np.array([0.5])),
}
VP_FAMILY = ["vp", "cosine", "scaled_linear", "ddpm", "zero_terminal", "table_of_4", "table_of_1"]
# index t T − 1 in float32 is off by up to 6e-5, in which log-SNR, .02 an index, changes by 1e-6; but beside zero
# terminal SNR by 1.4 an index
BETWEEN = {"zero_terminal": 5e-5}
CLOSED_FORMS = ["vp", "cosine", "ve", "edm", "flow", "flow_shift", "flow_shift_below_1"]


@pytest.fixture(params=SCHEDULES.values(), ids=SCHEDULES.keys())
def schedule(request):
    return request.param


@jax.jit
def levels_at(schedule, times):
    return jax.vmap(schedule)(times)


def levels(schedule, times):
    return levels_at(as_component(schedule), jnp.asarray(times, float))


def fine_grid():
    return np.concatenate([np.geomspace(1e-6, 1e-2, 200), np.linspace(0.01, 1.0, 2000)[1:]])


# Every schedule


def test_time_0_is_exactly_clean(schedule):
    for level in (schedule(0.0), jax.jit(lambda t: schedule(t))(0.0), schedule(0)):
        assert (float(level.alpha), float(level.sigma)) == (1.0, 0.0)
        assert float(level.log_snr()) == np.inf


def test_log_snr_strictly_decreases_in_float32(schedule):
    level = levels(schedule, fine_grid())
    assert level.alpha.dtype == level.sigma.dtype == jnp.float32
    assert (np.diff(level.log_snr()) < 0).all()
    assert (np.asarray(level.alpha) >= 0).all()


def test_level_has_the_shape_of_t(schedule):
    t = np.array([0.0, 0.3, 1.0])
    together = schedule(t)
    for i in range(3):
        # one program per shape: XLA may round the last bit differently
        np.testing.assert_allclose(together.alpha[i], schedule(t[i]).alpha, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(together.sigma[i], schedule(t[i]).sigma, rtol=1e-6)


def test_gradient_in_time_and_numbers_is_finite(schedule):
    def total(schedule, t):
        level = schedule(t)
        return level.alpha + level.sigma

    concrete = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), schedule)
    gradient = jax.jit(jax.vmap(jax.grad(total, argnums=(0, 1)), in_axes=(None, 0)))
    for leaf in jax.tree.leaves(gradient(concrete, jnp.array([0.0, 1e-4, 0.1, 0.4999, 0.5, 0.9995, 1.0]))):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("name", VP_FAMILY)
def test_vp_keeps_unit_variance(name):
    level = levels(SCHEDULES[name], np.append(0.0, fine_grid()))
    # α and σ are each within a few units of float32 rounding (6e-8); Cosine's α² is the difference of larger numbers
    np.testing.assert_allclose(level.alpha**2 + level.sigma**2, 1.0, atol=1e-6)


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_sigma_keeps_its_digits_near_0(name):
    t = fine_grid().astype(np.float32)
    sigma = np.asarray(levels(SCHEDULES[name], t).sigma, np.float64)
    with jax.enable_x64(True):
        exact = np.asarray(levels(SCHEDULES[name], t.astype(np.float64)).sigma)
    # powers and exponentials of up to 17 amplify float32's 6e-8 by as much; cancellation near 0 would cost 1e-2
    np.testing.assert_allclose(sigma, exact, rtol=4e-6)


@pytest.mark.parametrize("name", VP_FAMILY)
def test_float32_table_or_formula_agrees_with_float64(name):
    t = fine_grid().astype(np.float32)
    single = levels(SCHEDULES[name], t)
    with jax.enable_x64(True):
        exact = levels(SCHEDULES[name], t.astype(np.float64))
    np.testing.assert_allclose(single.sigma, exact.sigma, rtol=BETWEEN.get(name, 2e-6))
    np.testing.assert_allclose(single.alpha, exact.alpha, rtol=BETWEEN.get(name, 2e-6))


@pytest.mark.parametrize("name", SCHEDULES)
def test_both_ends_keep_their_digits_in_float32(name):
    ends = np.geomspace(1e-6, 1e-2, 100)
    t = np.concatenate([ends, np.linspace(0.02, 0.98, 97), 1 - ends]).astype(np.float32)
    single = levels(SCHEDULES[name], t)
    with jax.enable_x64(True):
        exact = levels(SCHEDULES[name], t.astype(np.float64))
        log_snr = np.asarray(exact.log_snr())
    rtol = BETWEEN.get(name, 4e-6)  # powers and exponentials of up to 17 amplify float32's 6e-8 by as much
    for part in ("alpha", "sigma"):
        np.testing.assert_allclose(getattr(single, part), getattr(exact, part), rtol=rtol)
    np.testing.assert_allclose(single.log_snr(), log_snr, atol=2 * rtol + 2e-6)  # and of logarithms near 20


def test_a_table_in_float32_keeps_what_1_less_it_needs():
    """As a leaf that `jit` rounds, as an array that JAX rounded before, and traced, with its derivative."""
    table = ddpm_table()
    exact, t = np.sqrt(1 - table), np.float32((np.arange(1000) + 1) / 1000)
    schedule = Discrete(table)
    rounded = jax.tree.map(jnp.asarray, schedule)
    assert rounded.alphas_cumprod.dtype == jnp.float32
    for one in (schedule, rounded):
        np.testing.assert_array_max_ulp(levels(one, t).sigma, exact.astype(np.float32), 1)
    given = jnp.asarray(table, jnp.float32)  # then 1 − ᾱ is that of the numbers given
    np.testing.assert_array_max_ulp(levels(Discrete(given), t).sigma, np.sqrt(1 - np.asarray(given)), 1)
    slope = jax.jit(jax.grad(lambda table: Discrete(table)(0.5).sigma))(given)
    np.testing.assert_allclose(slope[499], -0.5 / exact[499], rtol=1e-6)
    through = jax.grad(lambda schedule: schedule(0.5).sigma)(rounded).alphas_cumprod
    np.testing.assert_allclose(through, slope, rtol=1e-6)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(levels(schedule, (np.arange(1000) + 1) / 1000).sigma, exact)


def test_a_table_is_described_by_its_numbers_alone():
    # descriptions are in the files of unfinished runs
    described = describe(Discrete(np.array([0.9, 0.5, 0.1])))
    assert set(described) == {"is", "alphas_cumprod"}
    assert "rounding" not in repr(Discrete(np.array([0.9])))


# Formulas, in NumPy


def vp_linear(t):
    beta = np.polynomial.Polynomial([0.1, 19.9])
    alpha2 = np.exp(-(beta.integ()(t) - beta.integ()(0)))
    return np.sqrt(alpha2), np.sqrt(1 - alpha2)


def cosine(t, s=0.008, alpha_min=1e-3):
    start = np.arctan2(0, 1) + s / (1 + s) * np.pi / 2
    end = np.arccos(alpha_min * np.cos(start))
    alpha = np.cos((1 - t) * start + t * end) / np.cos(start)
    return alpha, np.sqrt(1 - alpha**2)


def ve(t):
    # Song et al.'s variance less that of their t = 0
    return np.ones_like(t), np.sqrt((0.01 * 5000.0**t) ** 2 - 0.01**2)


def edm(t):
    root = (1 - t) * 0.002 ** (1 / 7) + t * 80 ** (1 / 7)
    return np.ones_like(t), root**7 - (1 - t) * 0.002


def flow(t, shift=1.0):
    odds = shift * t / (1 - t)  # σ/α of Esser et al. 2024, eq. 23: shifted by a factor
    return 1 / (1 + odds), odds / (1 + odds)


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        (VPLinear(), vp_linear),
        (VPLinear(beta_min=0.1, beta_max=20), vp_linear),
        (Cosine(), cosine),
        (VE(), ve),
        (EDM(), edm),
        (RectifiedFlow(), flow),
        (RectifiedFlow(shift=3), lambda t: flow(t, 3.0)),
    ],
)
def test_formula(schedule, formula):
    t = np.linspace(0.01, 0.99, 99)
    with jax.enable_x64(True):
        level = levels(schedule, t)
        alpha, sigma = formula(t)
        # the NumPy forms cancel near t = 0 (EDM: 1e-3 of its terms)
        np.testing.assert_allclose(level.alpha, alpha, rtol=1e-12)
        np.testing.assert_allclose(level.sigma, sigma, rtol=1e-10)


def test_ends():
    assert float(EDM()(1.0).sigma) == pytest.approx(80.0, rel=1e-5)  # a seventh power in float32
    assert float(VE()(1.0).sigma) == pytest.approx(50.0, rel=1e-5)
    assert float(Cosine()(1.0).alpha) == pytest.approx(1e-3, rel=1e-3)  # cos near π/2 in float32
    for shift in (0.3, 1.0, 1.15, 3.0, 7.0):
        level = RectifiedFlow(shift)(1.0)
        assert float(level.alpha) == 0.0
        assert float(level.sigma) == pytest.approx(1.0, rel=1e-6)  # float32 rounding
    assert float(RectifiedFlow(0.5)(0.5).sigma) == pytest.approx(1 / 3, rel=1e-6)


def test_cosine_is_the_paper_s_before_its_clip():
    # ᾱ = cos²((t + s)/(1 + s) π/2)/cos²(s/(1 + s) π/2), eq. 17; ending at α_min instead of 0 turns φ by .1 percent
    t = np.linspace(0.0, 0.9, 10)
    paper = np.cos((t + 0.008) / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)
    np.testing.assert_allclose(levels(Cosine(), t).alpha, paper, atol=1e-3)


# Tables


@pytest.mark.parametrize("name", ["ddpm", "scaled_linear", "zero_terminal"])
def test_every_index_is_met_exactly_in_float32(name):
    schedule = SCHEDULES[name]
    table = np.asarray(schedule.alphas_cumprod)
    for times in ((np.arange(1000) + 1) / 1000, (np.arange(1000, dtype=np.float32) + 1) * np.float32(1e-3)):
        level = levels(schedule, times)
        np.testing.assert_array_equal(level.alpha, np.sqrt(table.astype(np.float32)))
        np.testing.assert_array_max_ulp(level.sigma, np.sqrt(1 - table).astype(np.float32), 1)


@pytest.mark.parametrize("num_train_steps", [10, 1000, 4000])
def test_discrete_time_is_an_exact_index(num_train_steps):
    # a network that looks its time up truncates: 499.99997 would be the wrong row
    index = np.arange(num_train_steps)
    found = jax.jit(DiscreteTime(num_train_steps))(jnp.asarray((index + 1) / num_train_steps, jnp.float32))
    np.testing.assert_array_equal(found, index)
    np.testing.assert_array_equal(found.astype(int), index)
    # 5e-4 is rounding of t T in float32
    assert float(DiscreteTime(1000)(0.50025)) == pytest.approx(499.25, abs=5e-4)


def test_log_snr_is_linear_between_indices():
    with jax.enable_x64(True):
        schedule, table = SCHEDULES["ddpm"], ddpm_table()
        log_snr = np.log(table / (1 - table))
        position = np.linspace(0.0, 999.0, 3331)
        found = levels(schedule, (position + 1) / 1000).log_snr()
        # from numbers of size 10 in float64, and t T − 1 with T = 1000
        np.testing.assert_allclose(found, np.interp(position, np.arange(1000), log_snr), atol=1e-10)


def test_first_and_last_interval():
    with jax.enable_x64(True):
        schedule = Discrete(np.array([0.8, 0.5, 0.0]))
        level = levels(schedule, [1 / 6, 5 / 6, 1.0])
        # σ²/α² from 0 to 1/4, halfway; α²/σ² from 1 to 0, halfway; pure noise
        np.testing.assert_allclose((level.sigma / level.alpha)[0] ** 2, 0.125, rtol=1e-12)  # float64 rounding
        np.testing.assert_allclose((level.alpha / level.sigma)[1] ** 2, 0.5, rtol=1e-12)
        assert (float(level.alpha[2]), float(level.sigma[2])) == (0.0, 1.0)


def test_zero_terminal_snr_is_finite_everywhere():
    schedule = SCHEDULES["zero_terminal"]
    level = levels(schedule, np.linspace(0.0, 1.0, 4001))
    assert np.isfinite(level.alpha).all()
    assert np.isfinite(level.sigma).all()

    def total(table, t):
        level = Discrete(table)(t)
        return level.alpha * 2.0 + level.sigma

    times = jnp.concatenate([jnp.linspace(0.0, 1.0, 21), jnp.array([1e-4, 5e-4, 0.9991, 0.9999])])
    gradient = jax.jit(jax.vmap(jax.grad(total, argnums=(0, 1)), (None, 0)))(
        jnp.asarray(schedule.alphas_cumprod, jnp.float32), times
    )
    assert all(np.isfinite(g).all() for g in gradient)


@pytest.mark.parametrize(
    "table",
    [
        [0.5, 0.9],  # increasing
        [0.9, 0.9, 0.5],  # not strictly
        [1.0, 0.5],  # index 0 without noise
        [0.5, -0.1],
        [0.9, np.nan],
        [np.nan, 0.5],
        [],
        [[0.9, 0.5]],
    ],
)
def test_bad_tables_raise(table):
    with pytest.raises(ValueError, match="decreasing in"):
        Discrete(np.array(table))


def test_scaled_linear_is_the_float64_table():
    alphas_cumprod = np.ones(1, np.float64)
    for i in range(1000):
        root = 0.00085**0.5 + i / 999 * (0.012**0.5 - 0.00085**0.5)
        alphas_cumprod = np.append(alphas_cumprod, alphas_cumprod[-1] * (1 - root**2))
    # a thousand products in float64
    np.testing.assert_allclose(ScaledLinear().alphas_cumprod, alphas_cumprod[1:], rtol=1e-12)
    assert ScaledLinear(0.0015, 0.0195, 200).alphas_cumprod.shape == (200,)


def test_new_table_compiles_nothing():
    count = 0

    @jax.jit
    def sigma(schedule, t):
        nonlocal count
        count += 1
        return schedule(t).sigma

    sigma(Discrete(ddpm_table()), 0.3)
    sigma(ScaledLinear(), 0.4)
    sigma(VPLinear(0.1, 20.0), 0.4)
    sigma(VPLinear(1, 20), 0.4)
    assert count == 2  # one for each class


# Users' schedules


def test_a_function_is_a_schedule():
    def tangent(t):  # σ/α = tan(πt/2)
        return Level(t, jnp.cos(0.5 * jnp.pi * t), jnp.sin(0.5 * jnp.pi * t))

    times = log_snr_times(tangent, 10, t_max=0.99)
    np.testing.assert_allclose(np.diff(levels(tangent, times[:-1]).log_snr(), n=2), 0.0, atol=1e-3)  # see the grid test
    assert float(time_of_log_snr(tangent, 0.0)) == pytest.approx(0.5, abs=1e-6)  # float32


# Time grids


def test_uniform_times():
    np.testing.assert_allclose(uniform_times(4), [1.0, 0.75, 0.5, 0.25, 0.0])
    np.testing.assert_allclose(uniform_times(2, t_max=0.8, t_min=0.2), [0.8, 0.5, 0.2])


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("name", ["vp", "cosine", "ve", "edm", "flow", "scaled_linear", "zero_terminal"])
def test_log_snr_times_are_uniform_in_log_snr(name, final):
    with jax.enable_x64(True):
        schedule = SCHEDULES[name]
        times = np.asarray(log_snr_times(schedule, 20, final=final))
        assert times.shape == (21,)
        assert (np.diff(times) < 0).all()
        assert times[0] == 1.0
        assert times[-1 - final] == 1e-3
        assert not final or times[-1] == 0.0
        pure = name in ("flow", "zero_terminal")  # infinite log-SNR at t = 1: uniform from .999 on
        assert not pure or times[1] == 0.999
        log_snr = np.asarray(levels(schedule, times).log_snr())[int(pure) : 21 - final]
        # bisection to float64 rounding of t; a table snaps to an index within 1e-12
        np.testing.assert_allclose(np.diff(log_snr), np.ptp(log_snr) / (len(log_snr) - 1), rtol=1e-6)


def test_log_snr_times_in_float32():
    times = log_snr_times(VPLinear(), 50)
    log_snr = levels(VPLinear(), times[:-1]).log_snr()
    # t = 1e-3 is found to 5e-7 of itself, and a step is .35
    np.testing.assert_allclose(np.diff(log_snr), np.ptp(log_snr) / 49, rtol=1e-4)


@pytest.mark.parametrize("name", ["edm", "ve"])
def test_karras_times_are_karras_sigmas(name):
    # Karras et al. 2022, eq. 5
    low, high = (0.002, 80.0) if name == "edm" else (0.02, 49.0)
    sigmas = (high ** (1 / 7) + np.arange(18) / 17 * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    with jax.enable_x64(True):
        schedule = SCHEDULES[name]
        t_max, t_min = (float(time_of_log_snr(schedule, -2 * np.log(s))) for s in (high, low))
        times = karras_times(schedule, 18, t_max=t_max, t_min=t_min)
        found = levels(schedule, times).sigma
        assert float(found[-1]) == 0.0
        # bisection in t to 1e-16, times |d log σ/dt| < 1e3
        np.testing.assert_allclose(found[:-1], sigmas, rtol=1e-9)


def test_karras_times_on_vp_are_uniform_in_the_root_of_the_noise_ratio():
    with jax.enable_x64(True):
        level = levels(VPLinear(), karras_times(VPLinear(), 12, rho=5.0, final=False))
        root = (level.sigma / level.alpha) ** 0.2
        np.testing.assert_allclose(np.diff(root), (root[-1] - root[0]) / 12, rtol=1e-8)  # as above


# indices that diffusers 0.42 visits; the whole comparison is in parity/test_schedules_parity.py
RECORDED = [
    ("leading", 0, 3, [666, 333, 0]),
    ("leading", 0, 7, [852, 710, 568, 426, 284, 142, 0]),
    ("leading", 1, 10, [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]),
    ("trailing", 0, 3, [999, 666, 332]),
    ("trailing", 0, 7, [999, 856, 713, 570, 428, 285, 142]),
    ("trailing", 1, 10, [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]),
    ("linspace", 0, 3, [999, 500, 0]),
    ("linspace", 1, 7, [999, 832, 666, 500, 333, 166, 0]),
]


@pytest.mark.parametrize(("spacing", "offset", "num_steps", "indices"), RECORDED)
def test_discrete_times_are_the_recorded_ones(spacing, offset, num_steps, indices):
    times = discrete_times(1000, num_steps, spacing=spacing, offset=offset)
    # t T − 1 in float64
    np.testing.assert_allclose(times * 1000 - 1, [*indices, -1], atol=1e-9)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("num_steps", [1, 2, 300, 999, 1000])
def test_discrete_times_decrease_and_meet_indices(spacing, num_steps):
    times = discrete_times(1000, num_steps, spacing=spacing)
    assert times.shape == (num_steps + 1,)
    assert (np.diff(times) < 0).all()
    assert times[-2] > 0
    assert times[0] <= 1
    index = np.asarray(DiscreteTime(1000)(jnp.asarray(times[:-1], jnp.float32)))
    np.testing.assert_array_equal(index, index.round())


def test_time_of_log_snr_inverts(schedule):
    with jax.enable_x64(True):
        t = np.array([0.0015, 0.02, 0.25, 0.5, 0.77, 0.9993])
        # bisection to 1e-17; log-SNR itself is only known to rounding where it is flat, and tables snap to an index
        np.testing.assert_allclose(time_of_log_snr(schedule, levels(schedule, t).log_snr()), t, rtol=1e-8)
    # float32: rounding of log-SNR near 10 is 1e-6, its slope in t at least 1
    np.testing.assert_allclose(time_of_log_snr(schedule, levels(schedule, t).log_snr()), t, atol=2e-5)


def test_time_of_log_snr_at_the_ends():
    t = time_of_log_snr(RectifiedFlow(), jnp.array([jnp.inf, -jnp.inf]))
    np.testing.assert_allclose(t, [0.0, 1.0], atol=1e-6)  # float32


def test_errors():
    for grid in (log_snr_times, karras_times):
        with pytest.raises(ValueError, match=r"t_max 0\.2 and t_min 0\.5"):
            grid(VPLinear(), 10, t_max=0.2, t_min=0.5)
        with pytest.raises(ValueError, match="0 < t_min"):
            grid(VPLinear(), 10, t_min=0.0)
        with pytest.raises(ValueError, match="needs at least 2"):
            grid(VPLinear(), 1)
        with pytest.raises(ValueError, match="needs at least 3"):
            grid(RectifiedFlow(), 2)
    with pytest.raises(ValueError, match="allows 1 to 1000"):
        discrete_times(1000, 1001)
    with pytest.raises(ValueError, match="allows 1 to 1000"):
        discrete_times(1000, 0)
    with pytest.raises(ValueError, match="spacing is 'Leading'"):
        discrete_times(1000, 10, spacing="Leading")
    with pytest.raises(ValueError, match="offset 1 leaves the table"):
        discrete_times(1000, 1000, offset=1)  # diffusers fails here with an index error
    with pytest.raises(ValueError, match="offset -1 leaves the table"):
        discrete_times(1000, 10, offset=-1)


# Diffusing


def test_diffuse_has_the_moments_of_the_level():
    x0 = jnp.stack([jnp.full(200_000, 3.0), jnp.full(200_000, -1.0)])
    level = Level(jnp.array([0.2, 0.6]), jnp.array([0.9, 0.5]), jnp.array([0.4, 2.0]))
    x = np.asarray(diffuse(jax.random.key(0), x0, level), np.float64)
    error = np.array([0.4, 2.0]) / np.sqrt(200_000)
    assert (np.abs(x.mean(axis=1) - [2.7, -0.5]) < 4 * error).all()  # 4 standard errors
    assert (np.abs(x.std(axis=1) - [0.4, 2.0]) < 4 * error / np.sqrt(2)).all()
