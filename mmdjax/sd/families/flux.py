"""FLUX.1 and FLUX.2 klein: flows over packed latents.

A condition is {"context": [n, l, d], "pooled": [n, p]}. For FLUX.1 the context is T5's states, and "pooled" CLIP's
vector, which the network takes as well. For FLUX.2 klein the context is some hidden states of Qwen3, side by side, and
"pooled" the tokens' mean direction, for kernels only. Padding is attended to, as in training.

FLUX.1 dev was distilled from guided samples: the strength of guidance is an input of its network. Klein's distilled
model takes no guidance at all.

References:
  Black Forest Labs 2024, 2025; Meng et al. 2023 (distilled guidance).
"""

import jax
import jax.numpy as jnp

from mmdjax.sd.families.contract import Family, check_width, padded
from mmdjax.sd.flow import CLASS as FLOW
from mmdjax.sd.networks.transformers.flux import Flux
from mmdjax.sd.networks.transformers.flux2 import Flux2
from mmdjax.sd.text.prompts import mean_token

LENGTH = 512  # tokens of a prompt
PIXELS = 1024  # the side of pictures, unless told otherwise


class Flow(Family):
    """What both have in common."""

    takes = "prompts: cond=pipeline.encode_prompts(params, [...])"

    @property
    def pooled_width(self) -> int:
        """The width of "pooled"."""
        raise NotImplementedError

    def time(self, scheduler):
        return None  # σ itself

    def scheduler_config(self, given, name):
        return {"_class_name": FLOW, "shift": 3.0, "use_dynamic_shifting": True, **given}

    @property
    def embedded_guidance(self):
        return 3.5 if self.network.config.guidance_embeds else None

    def call(self, params, x, t, cond, down):
        self.check_cond(cond)
        guidance = (cond["guidance"],) if self.network.config.guidance_embeds else ()
        return self.network.apply({"params": params["transformer"]}, x, t, cond, *guidance)

    def cond_shapes(self):
        context = jax.ShapeDtypeStruct((LENGTH, self.network.config.joint_attention_dim), jnp.float32)
        return {"context": context, "pooled": jax.ShapeDtypeStruct((self.pooled_width,), jnp.float32)}


class Flux1(Flow):
    """FLUX.1 dev and schnell."""

    networks = (Flux,)
    encoders = ("text_encoder", "text_encoder_2")

    @property
    def pipeline_class(self):
        return "FluxPipeline"

    @property
    def patch(self):
        return 2  # of packing, which the network does

    @property
    def sample_size(self):
        return PIXELS // 8

    @property
    def left_out(self):
        return ("image_encoder", "feature_extractor")

    @property
    def pooled_width(self) -> int:
        """The width of CLIP's vector."""
        return self.network.config.pooled_projection_dim

    def check(self, latent_channels):
        if self.network.config.in_channels != 4 * latent_channels:
            raise ValueError(
                f"the transformer takes {self.network.config.in_channels // 4} channels but the autoencoder's latents "
                f"have {latent_channels}: parts of two models"
            )
        check_width(self, "text_encoder", self.pooled_width)
        check_width(self, "text_encoder_2", self.network.config.joint_attention_dim)

    def scheduler_config(self, given, name):
        if not self.network.config.guidance_embeds:  # schnell
            return {"_class_name": FLOW, **given}
        return super().scheduler_config(given, name)

    def times(self, scheduler, num_steps, latent):
        return scheduler.times(num_steps, (latent[0] // 2) * (latent[1] // 2), grid="uniform")

    def tokens(self, prompts, tokenizers, index):
        ids = padded(tokenizers["text_encoder_2"], prompts, LENGTH).ids
        return {"text_encoder": (tokenizers["text_encoder"](prompts),), "text_encoder_2": (ids,)}

    def encode(self, params, tokens):
        pooled = self.text("text_encoder", params, tokens["text_encoder"]).pooled
        return {"context": self.text("text_encoder_2", params, tokens["text_encoder_2"]).last, "pooled": pooled}


class Flux2Klein(Flow):
    """FLUX.2 klein."""

    networks = (Flux2,)
    encoders = ("text_encoder",)
    usual_scale = 4.0

    @property
    def pipeline_class(self):
        return "Flux2KleinPipeline"

    @property
    def sample_size(self):
        return PIXELS // 16

    @property
    def pooled_width(self) -> int:
        """The width of the mean state: that of the context."""
        return self.network.config.joint_attention_dim

    def check(self, latent_channels):
        super().check(latent_channels)
        text = dict(self.modules).get("text_encoder")
        given = 0 if text is None else text.config.hidden_size * len(text.config.out_layers)
        if given != self.pooled_width:
            raise ValueError(
                f"the transformer takes prompts of width {self.pooled_width} but text_encoder gives {given or 'none'}"
            )

    def guidance_scale(self, index):
        return 1.0 if index.get("is_distilled") else self.usual_scale

    def times(self, scheduler, num_steps, latent):
        return scheduler.times(num_steps, latent[0] * latent[1], grid="flux2")

    def tokens(self, prompts, tokenizers, index):
        return {"text_encoder": tuple(padded(tokenizers["text_encoder"], prompts, LENGTH))}

    def encode(self, params, tokens):
        context = self.text("text_encoder", params, tokens["text_encoder"]).context
        mask = jnp.asarray(tokens["text_encoder"][1])
        return {"context": context, "pooled": mean_token({"context": context, "mask": mask})}
