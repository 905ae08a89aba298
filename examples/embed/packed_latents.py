"""A transformer that predicts velocities of packed latents, in a loop with no place for guidance: maxdiffusion's FLUX.

Its `FluxPipeline._generate` (0.22.0.dev0) runs all steps in one `fori_loop`. Rather than change it, give its
transformer to `guided_sample`: a loop of Euler steps on (1 − t) x_0 + t ε is `DDIM()` on `RectifiedFlow`, and its time
shift is that schedule's. References are encoded and packed as the samples are; decode `result.x` as before.

    python examples/embed/packed_latents.py
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from world import NUM_SAMPLES, NUM_STEPS, references, report, x0_hat

from mmdjax import DDIM, DiffusionModel, from_model, guided_sample
from mmdjax.schedules import RectifiedFlow


def flux_model(transformer, img_ids, shape, shift=1.0):
    """A model of packed latents; cond: a dict of encoder_hidden_states, txt_ids, guidance, pooled_projections."""
    schedule = RectifiedFlow(shift)  # shift = exp(mu) of the pipeline's `time_shift`

    def velocity(params, x, t, cond):
        ids = jnp.broadcast_to(img_ids, (len(x), *img_ids.shape[-2:]))
        return transformer.apply({"params": params}, hidden_states=x, img_ids=ids, timestep=t, **cond).sample

    return DiffusionModel(from_model(velocity, "flow", time=lambda t: schedule(t).sigma), schedule, shape)


def pack_latents(latents, batch_size, num_channels_latents, height, width):
    """[b, c, h, w] to [b, (h/2)(w/2), 4c], as the pipeline's method of this name does: 2 × 2 patches become tokens."""
    x = latents.reshape(batch_size, num_channels_latents, height // 2, 2, width // 2, 2)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(batch_size, -1, 4 * num_channels_latents)


# --- a stand-in for the package ---------------------------------------------------------------------------------------


class Output(NamedTuple):
    sample: Any


class FluxTransformer2DModel(nn.Module):
    """Latents [1, 4, 4] whose first 2 × 2 patch is a picture of a point in the plane, the rest 0."""

    @nn.compact
    def __call__(
        self, hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, guidance=None
    ):
        t = timestep[:, None]
        x0 = jnp.zeros_like(hidden_states).at[:, 0, :2].set(x0_hat(hidden_states[:, 0, :2], 1 - t, t))
        return Output((hidden_states - x0) / t[:, None])


def generate(transformer, params, latents, c_ts, p_ts, **inputs):
    """As `FluxPipeline._generate`: all steps in one loop."""

    def step(i, latents):
        t_vec = jnp.full(len(latents), c_ts[i])
        pred = transformer.apply({"params": params}, hidden_states=latents, timestep=t_vec, **inputs).sample
        return latents + (p_ts[i] - c_ts[i]) * pred

    return jax.lax.fori_loop(0, len(c_ts), step, latents)


def as_latents(points):
    """The stand-in for pictures encoded by the VAE, [n, 1, 4, 4]."""
    return jnp.zeros((len(points), 1, 4, 4)).at[:, 0, 0, :2].set(points)


def main():
    transformer, img_ids = FluxTransformer2DModel(), jnp.zeros((4, 3))
    rows = {"encoder_hidden_states": (7, 8), "pooled_projections": (8,), "txt_ids": (7, 3), "guidance": ()}
    cond = {name: jnp.ones((NUM_SAMPLES, *shape)) for name, shape in rows.items()}
    refs = pack_latents(as_latents(references()), 100, 1, 4, 4)
    noise = pack_latents(jax.random.normal(jax.random.key(0), (NUM_SAMPLES, 1, 4, 4)), NUM_SAMPLES, 1, 4, 4)
    model = flux_model(transformer, img_ids, shape=(4, 4), shift=1.5)
    settings = {"model": model, "num_samples": NUM_SAMPLES, "cond": cond, "x_init": noise, "sampler": DDIM()}
    guided = guided_sample({}, jax.random.key(0), refs, num_steps=NUM_STEPS, **settings).x
    times = model.schedule(jnp.linspace(1.0, 0.0, NUM_STEPS + 1)).sigma
    ids = jnp.broadcast_to(img_ids, (NUM_SAMPLES, 4, 3))
    unguided = generate(transformer, {}, noise, times[:-1], times[1:], img_ids=ids, **cond)
    return report(unguided=unguided[:, 0, :2], guided=guided[:, 0, :2])


if __name__ == "__main__":
    main()
