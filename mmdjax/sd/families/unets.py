"""The U-Nets: latent diffusion without conditions, and Stable Diffusion 1, 2 and XL.

A condition is {"context": [n, l, d], "pooled": [n, p]}: the token states that the U-Net attends to, and one vector for
each prompt. For Stable Diffusion 1 and 2 these are the text encoder's last state and its row at the end of the prompt.
For SDXL they are the states before the last of both encoders, concatenated, and the second encoder's projection; it
also takes "time_ids" [n, 6], sizes, by default those of the samples.

References:
  Rombach et al. 2022, Podell et al. 2023 (SDXL, section 2.2: sizes).
"""

from typing import Any

import jax
import jax.numpy as jnp

from mmdjax.sd.families.contract import Family
from mmdjax.sd.files.kinds import other_channels, other_sizes
from mmdjax.sd.networks.unet import UNet2D, UNet2DCondition

SD_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
LDM_SCHEDULER = SD_SCHEDULER | {"beta_start": 0.0015, "beta_end": 0.0195, "set_alpha_to_one": True, "steps_offset": 0}


class Unconditional(Family):
    """Latent diffusion without conditions."""

    component = "unet"
    networks = (UNet2D,)
    conditional = False
    usual_scheduler = LDM_SCHEDULER

    def check(self, latent_channels):
        config = self.network.config
        if config.in_channels != latent_channels or config.out_channels != latent_channels:
            raise ValueError(
                f"the U-Net maps {config.in_channels} channels to {config.out_channels} but the autoencoder's latents "
                f"have {latent_channels}: {other_channels(config, latent_channels)}"
            )

    def call(self, params, x, t, cond, down):
        if cond is not None:
            raise ValueError("this model is unconditional; leave cond out")
        return self.network.apply({"params": params["unet"]}, x, t)

    @property
    def pipeline_class(self):
        return "LDMPipeline"


class StableDiffusion(Unconditional):
    """Stable Diffusion 1, 2 and XL."""

    networks = (UNet2DCondition,)
    encoders = ("text_encoder", "text_encoder_2")
    conditional = True
    usual_scale = 7.5
    usual_scheduler = SD_SCHEDULER
    takes = "prompts: cond=pipeline.encode_prompts(params, [...])"

    @property
    def sizes(self) -> bool:
        """Whether the U-Net also takes pooled prompts and sizes (SDXL)."""
        return self.network.config.addition_embed_type is not None

    @property
    def pooled_width(self) -> int:
        """The width of SDXL's pooled prompt."""
        config = self.network.config
        return config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim

    def check(self, latent_channels):
        super().check(latent_channels)
        modules, wanted = dict(self.modules), self.network.config.cross_attention_dim
        given = sum(modules[name].config.hidden_size for name in self.texts)
        if given != wanted:
            raise ValueError(
                f"the U-Net takes prompts of width {wanted} but the text encoders ({', '.join(self.texts) or 'none'}) "
                f"give {given}"
            )
        if self.sizes:
            pooled = modules["text_encoder_2"].config.projection_dim if "text_encoder_2" in modules else 0
            if pooled != self.pooled_width:
                raise ValueError(
                    f"the U-Net takes a pooled prompt of width {self.pooled_width} beside six sizes but text_encoder_2 "
                    f"gives {pooled}: {other_sizes(self.network.config, pooled)}"
                )

    def scheduler_config(self, given, name):
        second = self.network.config.use_linear_projection and not self.sizes
        if second and "prediction_type" not in given:
            raise ValueError(
                f"{name}: Stable Diffusion 2's models of noise and of velocity have the same shapes; give "
                'load(..., scheduler={"prediction_type": "epsilon"}) for the base model, "v_prediction" for the 768 one'
            )
        return super().scheduler_config(given, name)

    def encode(self, params, tokens):
        outputs = [self.text(name, params, tokens[name]) for name in self.texts]
        if "text_encoder_2" not in self.texts:
            return {"context": outputs[-1].last, "pooled": outputs[-1].pooled}
        context = jnp.concatenate([output.hidden[-2] for output in outputs], axis=-1)
        return {"context": context, "pooled": outputs[-1].projected}

    def negative(self, cond, prompts, index):
        if not self.sizes or not index.get("force_zeros_for_empty_prompt", True) or "" not in prompts:
            return cond
        return jax.tree.map(lambda leaf: leaf.at[list(prompts).index("")].set(0), cond)

    def call(self, params, x, t, cond, down):
        self.check_cond(cond)
        taken: Any = cond["context"]
        if self.sizes:
            size = jnp.array([side * down for side in x.shape[1:3]], jnp.float32)
            time_ids = jnp.tile(jnp.concatenate([size, jnp.zeros(2), size]), (x.shape[0], 1))
            taken = {"time_ids": time_ids, **cond}
        return self.network.apply({"params": params["unet"]}, x, t, taken)

    def cond_shapes(self):
        pooled = self.pooled_width if self.sizes else self.network.config.cross_attention_dim
        return {
            "context": jax.ShapeDtypeStruct((77, self.network.config.cross_attention_dim), jnp.float32),
            "pooled": jax.ShapeDtypeStruct((pooled,), jnp.float32),
        }

    @property
    def pipeline_class(self):
        return "StableDiffusionXLPipeline" if self.sizes else "StableDiffusionPipeline"

    @property
    def left_out(self):
        return () if self.sizes else ("safety_checker", "feature_extractor")
