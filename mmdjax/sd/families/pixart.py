"""PixArt-α and -Σ: prompts by T5's states, with a mask of the tokens that there are.

A condition is {"context": [n, l, d], "mask": [n, l], "pooled": [n, d]}; "pooled" is the tokens' mean direction, for
kernels only. Prompts are in lower case, as in training.

References:
  Chen et al. 2024 (PixArt-α, PixArt-Σ).
"""

import jax
import jax.numpy as jnp

from mmdjax.sd.families.contract import Family, check_width, padded
from mmdjax.sd.networks.transformers.pixart import PixArt as PixArtNetwork
from mmdjax.sd.text.prompts import mean_token

LENGTHS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}  # tokens of a prompt


class PixArt(Family):
    """PixArt-α and -Σ."""

    networks = (PixArtNetwork,)
    encoders = ("text_encoder",)
    usual_scale = 4.5
    takes = "prompts: cond=pipeline.encode_prompts(params, [...])"

    def check(self, latent_channels):
        super().check(latent_channels)
        check_width(self, "text_encoder", self.network.config.caption_channels)

    def tokens(self, prompts, tokenizers, index):
        length = LENGTHS[index.get("_class_name", self.pipeline_class)]
        said = [prompt.lower().strip() for prompt in prompts]
        return {name: tuple(padded(tokenizers[name], said, length)) for name in self.texts}

    def encode(self, params, tokens):
        _, mask = tokens["text_encoder"]
        context = self.text("text_encoder", params, tokens["text_encoder"]).last
        cond = {"context": context, "mask": jnp.asarray(mask)}
        return {**cond, "pooled": mean_token(cond)}

    def cond_shapes(self):
        width, length = self.network.config.caption_channels, LENGTHS[self.pipeline_class]
        return {
            "context": jax.ShapeDtypeStruct((length, width), jnp.float32),
            "mask": jax.ShapeDtypeStruct((length,), jnp.bool_),
            "pooled": jax.ShapeDtypeStruct((width,), jnp.float32),
        }

    @property
    def pipeline_class(self):
        # of the smaller sizes both have the same networks; only model_index.json knows
        return "PixArtAlphaPipeline" if self.network.config.conditions_on_size else "PixArtSigmaPipeline"
