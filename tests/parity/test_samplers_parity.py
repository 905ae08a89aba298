"""The samplers against diffusers' schedulers: the same noise predictions, the same noise, the same start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from mmdjax import DDIM, DDPM, DPMSolverPP2M, Heun, Level, SDEDPMSolverPP2M, from_model
from mmdjax.schedules import Discrete, DiscreteTime

torch = pytest.importorskip("torch", reason="parity needs torch")
diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers")

# diffusers hands torch tensors to np.array; torch's __array__ predates NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
# float32 on both sides; x̂0 = (x − σ ε̂)/α with α down to .07
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def start():
    return np.array(jax.random.normal(jax.random.key(1), (4, 3)))


def theirs(scheduler, num_steps, noise=None):
    """diffusers' loop, and the t of its timesteps and of the end."""
    scheduler.set_timesteps(num_steps)
    x = torch.tensor(start()) * scheduler.init_noise_sigma
    for i, index in enumerate(scheduler.timesteps):
        output = toys.noise_prediction(scheduler.scale_model_input(x, index), float(index))
        extra = {} if noise is None else {"variance_noise": torch.tensor(noise[i])}
        x = scheduler.step(output, index, x, **extra).prev_sample
    return x.numpy(), np.append((scheduler.timesteps.numpy() + 1) / 1000, 0.0)


def ours(sampler, scheduler, times):
    denoiser = from_model(lambda params, x, t, cond: toys.noise_prediction(x, t[:, None]), "eps", DiscreteTime(1000))
    schedule = Discrete(scheduler.alphas_cumprod.numpy())
    return toys.run(sampler, denoiser, schedule, times, jnp.asarray(start()), jax.random.key(2))


def noise_of_run(num_steps):
    keys = [jax.random.fold_in(jax.random.key(2), i) for i in range(num_steps)]
    return [np.array(jax.random.normal(key, (4, 3))) for key in keys]


@pytest.mark.parametrize("num_steps", [1, 4, 50])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(eta, num_steps):
    scheduler = diffusers.DDIMScheduler(**TABLE, clip_sample=False, steps_offset=1)
    noise, step = noise_of_run(num_steps), scheduler.step
    scheduler.step = lambda *args, **kwargs: step(*args, eta=eta, **kwargs)
    expected, times = theirs(scheduler, num_steps, noise if eta else None)
    np.testing.assert_allclose(ours(DDIM(eta), scheduler, times), expected, **TOLERANCE)


@pytest.mark.parametrize("num_steps", [1, 4, 50])
@pytest.mark.parametrize(("variance", "name"), [("small", "fixed_small"), ("large", "fixed_large")])
def test_ddpm(variance, name, num_steps, monkeypatch):
    scheduler = diffusers.DDPMScheduler(**TABLE, clip_sample=False, variance_type=name)
    noise = iter(noise_of_run(num_steps))
    module = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
    monkeypatch.setattr(module, lambda *args, **kwargs: torch.tensor(next(noise)))
    expected, times = theirs(scheduler, num_steps)
    np.testing.assert_allclose(ours(DDPM(variance), scheduler, times), expected, **TOLERANCE)


@pytest.mark.parametrize("num_steps", [2, 3, 10, 20])
def test_dpm_solver_pp_2m(num_steps):
    scheduler = diffusers.DPMSolverMultistepScheduler(**TABLE, final_sigmas_type="zero")
    expected, times = theirs(scheduler, num_steps)
    np.testing.assert_allclose(ours(DPMSolverPP2M(), scheduler, times), expected, **TOLERANCE)


@pytest.mark.parametrize("num_steps", [2, 3, 10, 20])
def test_sde_dpm_solver_pp_2m(num_steps):
    settings = {"algorithm_type": "sde-dpmsolver++", "solver_type": "midpoint", "solver_order": 2}
    scheduler = diffusers.DPMSolverMultistepScheduler(**TABLE, **settings, final_sigmas_type="zero")
    expected, times = theirs(scheduler, num_steps, noise_of_run(num_steps))
    np.testing.assert_allclose(ours(SDEDPMSolverPP2M(), scheduler, times), expected, **TOLERANCE)


@pytest.mark.parametrize("num_steps", [1, 4, 20])
def test_euler_is_ddim(num_steps):
    # Euler on x/α with time σ/α
    scheduler = diffusers.EulerDiscreteScheduler(**TABLE, timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(num_steps)
    times = np.append((scheduler.timesteps.numpy() + 1) / 1000, 0.0)
    schedule = Discrete(scheduler.alphas_cumprod.numpy())
    x = torch.tensor(start() / float(schedule(times[0]).alpha))
    for index in scheduler.timesteps:
        output = toys.noise_prediction(scheduler.scale_model_input(x, index), float(index))
        x = scheduler.step(output, index, x).prev_sample
    np.testing.assert_allclose(ours(DDIM(), scheduler, times), x.numpy(), **TOLERANCE)


@pytest.mark.parametrize("num_steps", [2, 10])
def test_heun(num_steps):
    # theirs is the trapezoidal rule on x/α with time σ/α: ours at levels with α = 1
    scheduler = diffusers.HeunDiscreteScheduler(**TABLE)
    scheduler.set_timesteps(num_steps)
    sigmas = scheduler.sigmas.numpy()
    x0 = start() * sigmas[0]
    x = torch.tensor(x0)
    for i, index in enumerate(scheduler.timesteps):
        # their second call of a step is made at the next sigma
        x = scheduler.step(toys.noise_prediction(x, float(sigmas[i + (i % 2)])), index, x).prev_sample
    sigmas = np.append(sigmas[0:-1:2], 0.0)
    assert len(sigmas) == num_steps + 1

    def denoiser(params, x, level, cond):
        return x - level.sigma * toys.noise_prediction(x, level.sigma)

    def schedule(t):  # the scheduler's sigmas at t = 1, 1 − 1/N, …
        return Level(t, 1.0, jnp.asarray(sigmas)[jnp.round((1 - t) * num_steps).astype(int)])

    found = toys.run(Heun(), denoiser, schedule, 1 - np.arange(num_steps + 1) / num_steps, jnp.asarray(x0))
    np.testing.assert_allclose(found, x.numpy(), rtol=1e-5, atol=2e-5)  # x starts at 15 times the data's size
