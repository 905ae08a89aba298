"""scheduler_config.json against what diffusers computed (tests/fixtures, by tests/parity/record_fixtures.py)."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from mmdjax.sd.scheduler import Scheduler, in_place

FIXTURES = Path(__file__).parent / "fixtures"
CONFIGS = json.loads((FIXTURES / "sd_schedulers.json").read_text())["configs"]
ARRAYS = load_file(FIXTURES / "sd_schedulers.safetensors")


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("table.")])
def test_table_exactly(name):
    """Porting 22: float32, the product accumulated in float64."""
    found = Scheduler(CONFIGS[name]).alphas_cumprod
    assert found.dtype == Scheduler(CONFIGS[name]).schedule().alphas_cumprod.dtype == np.float32
    np.testing.assert_array_equal(found, ARRAYS[name])
    assert (found[-1] == 0) == (name == "table.zero")


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("steps.")])
def test_ten_steps_exactly(name):
    """Porting 23: spacing and offset."""
    index = ARRAYS[name]
    times = Scheduler(CONFIGS[name]).times(10)
    np.testing.assert_allclose(times[:-1] * 1000 - 1, index, rtol=0, atol=1e-9 if index.dtype == int else 1e-4)
    assert times[-1] == 0


@pytest.mark.parametrize(("one", "offset", "end"), [(True, 1, 0.0), (False, 1, 0.001), (False, 0, 0.0)])
def test_where_the_grid_ends(one, offset, end):
    """Porting 23: `set_alpha_to_one`."""
    times = Scheduler({"_class_name": "DDIMScheduler", "set_alpha_to_one": one, "steps_offset": offset}).times(10)
    assert times[-1] == end
    assert np.diff(times).max() < 0


@jax.jit
def ratios(schedule, times):
    """σ/α at each time."""
    level = jax.vmap(schedule)(times)
    return level.sigma / level.alpha


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("how", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_levels_spaced_in_the_ratio_of_noise(name, how):
    """Even in the seventh root, in the logarithm, or dense at both ends; from the first level visited to the last."""
    scheduler = Scheduler({"_class_name": name, "beta_schedule": "scaled_linear", how: True})
    times = scheduler.times(9)
    assert times[-1] == 0
    ratio = ratios(scheduler.schedule(), times[:-1])
    np.testing.assert_allclose(times[[0, -2]], [1, 1e-3], rtol=1e-6)
    if how == "use_beta_sigmas":
        part = (ratio - ratio[-1]) / (ratio[0] - ratio[-1])
        np.testing.assert_allclose(part + part[::-1], 1, rtol=1e-3)  # the distribution is symmetric
        steps = -np.diff(part)
        assert steps[0] < steps[1] < steps[2] < steps[3]
    else:
        even = np.log(ratio) if how == "use_exponential_sigmas" else ratio ** (1 / 7)
        np.testing.assert_allclose(np.diff(even), np.diff(even).mean(), rtol=1e-3)  # float32 levels
    plain = Scheduler({"_class_name": "EulerAncestralDiscreteScheduler", "beta_schedule": "scaled_linear", how: True})
    np.testing.assert_array_equal(plain.times(9)[:-1], (np.linspace(999, 0, 9, dtype=np.float32) + 1.0) / 1000)


def test_class_in_place_of_another():
    """What all classes share is kept; Karras' sigmas go, and x̂0 is not clipped if it was not before."""
    file = {
        "_class_name": "LCMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_end": 0.012,
        "use_karras_sigmas": True,
    }
    file |= {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "original_inference_steps": 50}
    found = Scheduler(in_place(file, {"_class_name": "DDIMScheduler"}))
    assert (found.prediction, found.clip, found.raw["beta_end"]) == ("v", None, 0.012)
    np.testing.assert_allclose(found.times(4), [1, 0.75, 0.5, 0.25, 0])
    same = {"_class_name": "DDIMScheduler", "beta_schedule": "linear", "clip_sample_range": 2.0}
    assert Scheduler(in_place(same, {"_class_name": "DDIMScheduler"})).clip == 2.0
    assert in_place(same, {"beta_end": 0.5}) == same | {"beta_end": 0.5}
    with pytest.raises(ValueError, match="DDIMScheduler cannot take the place of the scheduler's class 'FlowMatch"):
        in_place({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, {"_class_name": "DDIMScheduler"})


def test_clipping_is_as_the_config_says():
    """Porting 23: diffusers clips x̂0 unless told not to, and Stable Diffusion's configs tell it."""
    assert Scheduler({"_class_name": "DDIMScheduler"}).clip == 1.0
    assert Scheduler({"_class_name": "DDIMScheduler", "clip_sample": False}).clip is None
    assert Scheduler({"_class_name": "DDIMScheduler", "clip_sample_range": 2}).clip == 2.0
    assert Scheduler({"_class_name": "EulerDiscreteScheduler"}).clip is None
