"""Flow-matching levels and times against diffusers: its scheduler, and what its pipelines make of it."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity needs the extra mmdjax[parity]")
diffusers = pytest.importorskip("diffusers", reason="parity needs the extra mmdjax[parity]")

from diffusers.pipelines.flux.pipeline_flux import calculate_shift  # noqa: E402
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu  # noqa: E402

from mmdjax.sd.flow import FlowScheduler  # noqa: E402

CLASS = "FlowMatchEulerDiscreteScheduler"
FLUX = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
PUBLISHED = {  # config, grid
    "sd3": ({"shift": 3.0}, "own"),
    "schnell": (FLUX | {"shift": 1.0, "use_dynamic_shifting": False}, "uniform"),
    "dev": (FLUX, "uniform"),
    "flux2": (FLUX, "flux2"),
}
OTHERS = {
    "plain": ({}, "own"),
    "odd shift": ({"shift": 1.15}, "own"),
    "few levels": ({"shift": 3.0, "num_train_timesteps": 50}, "own"),
    "dynamic sd3": (FLUX, "own"),
    "linear": (FLUX | {"time_shift_type": "linear"}, "uniform"),
    "terminal": (FLUX | {"shift_terminal": 0.1}, "uniform"),
    "terminal own": ({"shift": 3.0, "shift_terminal": 0.02}, "own"),
    "karras": ({"shift": 3.0, "use_karras_sigmas": True}, "own"),
    "karras dynamic": (FLUX | {"use_karras_sigmas": True}, "uniform"),
    "exponential": (FLUX | {"use_exponential_sigmas": True}, "uniform"),
    "beta": (FLUX | {"use_beta_sigmas": True}, "uniform"),
    "beta own": ({"shift": 3.0, "use_beta_sigmas": True, "shift_terminal": 0.02}, "own"),
}
STEPS = [1, 2, 3, 4, 7, 10, 28, 50, 100, 333, 1000]
LENGTHS = [1, 64, 256, 1024, 4096, 4300, 4301, 9216]


def theirs(config, grid, num_steps, length):
    """diffusers' scheduler, called as its pipelines call it."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    sigmas = None if grid == "own" else np.linspace(1.0, 1 / num_steps, num_steps)
    settings = scheduler.config
    mu = (
        compute_empirical_mu(image_seq_len=length, num_steps=num_steps)
        if grid == "flux2"
        else calculate_shift(
            length,
            settings["base_image_seq_len"],
            settings["max_image_seq_len"],
            settings["base_shift"],
            settings["max_shift"],
        )
    )
    scheduler.set_timesteps(num_steps, sigmas=sigmas, mu=mu)
    return scheduler


@pytest.mark.parametrize("name", [*PUBLISHED, *OTHERS])
def test_levels_and_times_have_the_same_bits(name):
    config, grid = (PUBLISHED | OTHERS)[name]
    ours = FlowScheduler(dict(diffusers.FlowMatchEulerDiscreteScheduler(**config).config) | {"_class_name": CLASS})
    assert ours.dynamic == bool(config.get("use_dynamic_shifting"))
    for num_steps in STEPS:
        if num_steps == 1 and "shift_terminal" in config:
            continue  # theirs divides 0 by 0; ours refuses
        for length in LENGTHS if ours.dynamic else [None]:
            expected = theirs(config, grid, num_steps, length or 256)
            found = ours.times(num_steps, length, grid=grid)
            # a level above 1 by a rounding is no level of the path; ours is 1
            np.testing.assert_array_equal(found, np.minimum(expected.sigmas.numpy(), 1))
            np.testing.assert_array_equal(
                ours.time(jnp.asarray(found[:-1])), np.minimum(expected.timesteps.numpy(), 1000)
            )
            assert found.dtype == np.float32


def test_mu_is_taken_as_it_is():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**FLUX)
    scheduler.set_timesteps(7, sigmas=np.linspace(1, 1 / 7, 7), mu=0.8)
    ours = FlowScheduler(FLUX | {"_class_name": CLASS})
    np.testing.assert_array_equal(ours.times(7, grid="uniform", mu=0.8), scheduler.sigmas.numpy())


def sd3(scheduler):
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, num_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8,
        caption_projection_dim=16, pooled_projection_dim=8, pos_embed_max_size=64,
    )  # fmt: skip
    pipeline = diffusers.StableDiffusion3Pipeline(transformer, scheduler, autoencoder(16), *[None] * 6)
    pooled = torch.zeros(1, 8)
    return pipeline, {"prompt_embeds": torch.zeros(1, 3, 8), "pooled_prompt_embeds": pooled, "guidance_scale": 1.0}


def flux(scheduler):
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 2, 2), guidance_embeds=True,
    )  # fmt: skip
    pipeline = diffusers.FluxPipeline(scheduler, autoencoder(4), *[None] * 4, transformer)
    return pipeline, {"prompt_embeds": torch.zeros(1, 3, 8), "pooled_prompt_embeds": torch.zeros(1, 8)}


def flux2(scheduler):
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(2, 2, 2, 2),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, latent_channels=4,
    )  # fmt: skip
    pipeline = diffusers.Flux2KleinPipeline(scheduler, vae, None, None, transformer)
    return pipeline, {"prompt_embeds": torch.zeros(1, 3, 8), "guidance_scale": 1.0}


def autoencoder(channels):
    return diffusers.AutoencoderKL(
        block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, latent_channels=channels,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "make"),
    [("sd3", sd3), ("dynamic sd3", sd3), ("schnell", flux), ("dev", flux), ("terminal", flux), ("flux2", flux2)],
)
def test_grids_of_the_real_pipelines(name, make):
    config, grid = (PUBLISHED | OTHERS)[name]
    pipeline, prompts = make(diffusers.FlowMatchEulerDiscreteScheduler(**config))
    pipeline.set_progress_bar_config(disable=True)
    visited = []
    pipeline(
        **prompts, height=192, width=256, num_inference_steps=5, output_type="latent",
        callback_on_step_end=lambda pipe, i, t, kwargs: visited.append(float(t)) or {},
    )  # fmt: skip
    ours = FlowScheduler(config | {"_class_name": CLASS})
    times = ours.times(5, 12 * 16, grid=grid)
    np.testing.assert_array_equal(times, pipeline.scheduler.sigmas.numpy())
    np.testing.assert_array_equal(ours.time(jnp.asarray(times[:-1])), visited)
