import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdjax.schedules import Discrete, ScaledLinear, discrete_times, karras_times, time_of_log_snr

pytest.importorskip("torch", reason="parity needs torch")
diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers")

# diffusers hands torch tensors to np.array; torch's __array__ predates NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

NUM_STEPS = [1, 2, 3, 7, 10, 20, 33, 50, 100, 300, 999]


def indices(num_steps, **kwargs):
    return discrete_times(1000, num_steps, **kwargs)[:-1] * 1000 - 1


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_discrete_times_are_those_of_diffusers(spacing, offset):
    config = {"timestep_spacing": spacing, "steps_offset": offset}
    ddim, euler = diffusers.DDIMScheduler(**config), diffusers.EulerDiscreteScheduler(**config)
    for num_steps in NUM_STEPS:
        ours = indices(num_steps, spacing=spacing, offset=offset)
        ddim.set_timesteps(num_steps)
        np.testing.assert_allclose(ours, ddim.timesteps.numpy(), atol=1e-9)  # t T − 1 in float64
        euler.set_timesteps(num_steps)
        # Euler does not round its linspace; the rest are whole numbers
        np.testing.assert_allclose(ours, euler.timesteps.numpy(), atol=0.5 if spacing == "linspace" else 1e-9)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddpm_visits_the_same(spacing):
    scheduler = diffusers.DDPMScheduler(timestep_spacing=spacing)
    for num_steps in NUM_STEPS:
        scheduler.set_timesteps(num_steps)
        np.testing.assert_allclose(indices(num_steps, spacing=spacing), scheduler.timesteps.numpy(), atol=1e-9)


@pytest.mark.parametrize(("beta_start", "beta_end"), [(0.00085, 0.012), (0.0015, 0.0195)])
def test_scaled_linear_is_the_table_of_diffusers(beta_start, beta_end):
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=beta_start, beta_end=beta_end)
    # theirs is a product of a thousand float32 numbers: 1000 × 6e-8 at worst
    np.testing.assert_allclose(ScaledLinear(beta_start, beta_end).alphas_cumprod, scheduler.alphas_cumprod, rtol=2e-5)


def test_discrete_levels_are_the_sigmas_of_euler():
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(10)
    schedule = Discrete(scheduler.alphas_cumprod.numpy())
    level = schedule(jnp.asarray(discrete_times(1000, 10, spacing="trailing")))
    # float32 on both sides, 1 − ᾱ to 1e-5 of itself at the smallest
    np.testing.assert_allclose(level.sigma / level.alpha, scheduler.sigmas.numpy(), rtol=1e-5)


def test_zero_terminal_table_of_diffusers():
    scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True)
    schedule = Discrete(scheduler.alphas_cumprod.numpy())
    assert (float(schedule(1.0).alpha), float(schedule(1.0).sigma)) == (0.0, 1.0)


def test_karras_times_on_a_table_are_the_karras_sigmas_of_euler():
    scheduler = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(10)
    sigmas = scheduler.sigmas.numpy()
    with jax.enable_x64(True):
        schedule = Discrete(scheduler.alphas_cumprod.numpy().astype(np.float64))
        t_min = float(time_of_log_snr(schedule, -2 * np.log(float(sigmas[-2]))))
        level = jax.vmap(schedule)(karras_times(schedule, 10, t_min=t_min))
        np.testing.assert_allclose(level.sigma / level.alpha, sigmas, rtol=1e-4)  # their table and roots are float32
