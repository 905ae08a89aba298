"""Flow-matching schedulers: diffusers' levels bit for bit (tests/fixtures), and what they must be."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mmdjax.sd.flow import FlowScheduler, FlowTime, flux2_mu

FIXTURES = Path(__file__).parent / "fixtures"
RECORDED = json.loads((FIXTURES / "sd_flow.json").read_text())
LEVELS = load_file(FIXTURES / "sd_flow.safetensors")
CLASS = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
DYNAMIC = CLASS | {"use_dynamic_shifting": True}


@pytest.mark.parametrize("name", RECORDED["cases"])
def test_ten_levels_exactly(name):
    case = RECORDED["cases"][name]
    found = FlowScheduler(case["config"]).times(10, RECORDED["length"], grid=case["grid"])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.minimum(LEVELS[name], 1))
    assert np.diff(found).max() < 0


def test_uniform_grid_without_shift_is_uniform():
    times = FlowScheduler(CLASS).times(4, grid="uniform")
    assert times.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert FlowTime(1000)(times).tolist() == [1000.0, 750.0, 500.0, 250.0, 0.0]


def test_larger_pictures_stay_noisy_for_longer():
    scheduler = FlowScheduler(DYNAMIC)
    small, large = (scheduler.times(10, length, grid="uniform") for length in (256, 4096))
    assert (large[1:-1] > small[1:-1]).all()
    # at the two lengths of the config μ is its two shifts: odds σ/(1 − σ) are e^μ times those without a shift
    for times, mu in ((small, 0.5), (large, 1.15)):
        np.testing.assert_allclose(times[5] / (1 - times[5]), np.exp(mu), rtol=1e-6)  # σ = 1/2 without


def test_length_is_ignored_where_the_shift_is_static():
    scheduler = FlowScheduler(CLASS | {"shift": 3.0})
    np.testing.assert_array_equal(scheduler.times(7), scheduler.times(7, 4096))


def test_terminal_level():
    times = FlowScheduler(CLASS | {"shift": 3.0, "shift_terminal": 0.1}).times(7)
    assert times[0] == 1
    np.testing.assert_allclose(times[-2:], [0.1, 0], rtol=1e-6)


def test_mu_of_flux2_meets_its_lines():
    """At 10 and 200 steps it is the fitted line, and beyond a length of 4300 the steps no longer matter."""
    np.testing.assert_allclose(flux2_mu(1024, 10), 8.73809524e-05 * 1024 + 1.89833333, rtol=1e-12)
    np.testing.assert_allclose(flux2_mu(1024, 200), 0.00016927 * 1024 + 0.45666666, rtol=1e-12)
    assert flux2_mu(4301, 4) == flux2_mu(4301, 50)


def test_schedule_is_the_straight_path():
    level = FlowScheduler(CLASS | {"shift": 3.0}).schedule()(0.25)
    assert (float(level.alpha), float(level.sigma)) == (0.75, 0.25)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "class is 'FlowMatchHeunDiscreteScheduler'; implemented"),
        ({"_class_name": None}, "class is None"),
        ({"invert_sigmas": True}, "invert_sigmas is not implemented"),
        ({"stochastic_sampling": True}, r"stochastic_sampling is not implemented; choose noise by the sampler"),
        ({"shift": "3"}, "shift is '3', of another type or out of range"),
        ({"shift": 0}, "shift is 0"),
        ({"num_train_timesteps": 1e3}, "num_train_timesteps is 1000.0"),
        ({"shift_terminal": 1.0}, "shift_terminal is 1.0"),
        ({"base_image_seq_len": 4096}, "they must differ"),
        ({"time_shift_type": "cubic"}, "time_shift_type is 'cubic'; implemented: exponential, linear"),
        (
            {"use_karras_sigmas": True, "use_beta_sigmas": True},
            "use_karras_sigmas and use_beta_sigmas exclude each other",
        ),
    ],
)
def test_settings_that_are_refused(change, text):
    with pytest.raises(ValueError, match=text):
        FlowScheduler(CLASS | change)


def test_calls_that_are_refused():
    with pytest.raises(ValueError, match="image_seq_len is None; this scheduler's levels depend on the picture's size"):
        FlowScheduler(DYNAMIC).times(10)
    with pytest.raises(ValueError, match="num_steps is 0"):
        FlowScheduler(CLASS).times(0)
    with pytest.raises(ValueError, match="num_steps is 1; shift_terminal needs at least 2"):
        FlowScheduler(CLASS | {"shift_terminal": 0.1}).times(1)
    with pytest.raises(ValueError, match=r"grid is 'sd3'; choose one of \('own', 'uniform', 'flux2'\)"):
        FlowScheduler(CLASS).times(10, grid="sd3")
