"""Stable Diffusion 3 and 3.5: two CLIP encoders and T5, whose states follow one another.

A condition is {"context": [n, l, d], "pooled": [n, p]}. The context is the states before the last of both CLIP
encoders, side by side and padded with zeros to T5's width, then T5's states. T5 may be left out to save memory, for
which the model was trained: its states are zeros then. "pooled" is both encoders' projections, side by side.

References:
  Esser et al. 2024, section 4 and appendix B.3.
"""

import jax
import jax.numpy as jnp

from mmdjax.sd.families.contract import Family, check_width, padded
from mmdjax.sd.flow import CLASS
from mmdjax.sd.networks.transformers.sd3 import SD3

SCHEDULER = {"_class_name": CLASS, "shift": 3.0}
CLIPS = ("text_encoder", "text_encoder_2")
LENGTH = 256  # of T5's tokens


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5."""

    networks = (SD3,)
    encoders = (*CLIPS, "text_encoder_3")
    usual_scale = 7.0
    usual_scheduler = SCHEDULER
    takes = "prompts: cond=pipeline.encode_prompts(params, [...])"

    def check(self, latent_channels):
        super().check(latent_channels)
        modules, config = dict(self.modules), self.network.config
        missing = [name for name in CLIPS if name not in modules]
        if missing:
            raise ValueError(
                f"Stable Diffusion 3 lacks its {' and '.join(missing)}; only text_encoder_3 can be left out"
            )
        pooled = sum(modules[name].config.projection_dim for name in CLIPS)
        if pooled != config.pooled_projection_dim:
            raise ValueError(
                f"the transformer takes a pooled prompt of width {config.pooled_projection_dim} but text_encoder and "
                f"text_encoder_2 give {pooled}"
            )
        check_width(self, "text_encoder_3", config.joint_attention_dim)
        states = sum(modules[name].config.hidden_size for name in CLIPS)
        if states > config.joint_attention_dim:
            raise ValueError(
                f"the transformer takes prompts of width {config.joint_attention_dim} but text_encoder and "
                f"text_encoder_2 give {states}"
            )

    @property
    def pipeline_class(self):
        return "StableDiffusion3Pipeline"

    @property
    def left_out(self):
        absent = () if "text_encoder_3" in self.texts else ("text_encoder_3", "tokenizer_3")
        return ("image_encoder", "feature_extractor", *absent)

    def time(self, scheduler):
        return scheduler.time

    def times(self, scheduler, num_steps, latent):
        return scheduler.times(num_steps, (latent[0] // self.patch) * (latent[1] // self.patch))

    def tokens(self, prompts, tokenizers, index):
        clips = {name: (tokenizers[name](prompts),) for name in CLIPS}
        if "text_encoder_3" not in self.texts:
            return clips
        ids = padded(tokenizers["text_encoder_3"], prompts, LENGTH).ids  # padding is attended to, as in training
        return {**clips, "text_encoder_3": (ids,)}

    def encode(self, params, tokens):
        clips = [self.text(name, params, tokens[name]) for name in CLIPS]
        states = jnp.concatenate([clip.hidden[-2] for clip in clips], axis=-1)
        n, width = states.shape[0], self.network.config.joint_attention_dim
        states = jnp.pad(states, ((0, 0), (0, 0), (0, width - states.shape[-1])))
        if "text_encoder_3" in self.texts:
            more = self.text("text_encoder_3", params, tokens["text_encoder_3"]).last
        else:
            more = jnp.zeros((n, LENGTH, width), states.dtype)
        pooled = jnp.concatenate([clip.projected for clip in clips], axis=-1)
        return {"context": jnp.concatenate([states, more.astype(states.dtype)], axis=1), "pooled": pooled}

    def cond_shapes(self):
        config = self.network.config
        return {
            "context": jax.ShapeDtypeStruct((77 + LENGTH, config.joint_attention_dim), jnp.float32),
            "pooled": jax.ShapeDtypeStruct((config.pooled_projection_dim,), jnp.float32),
        }
