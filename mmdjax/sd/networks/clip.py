"""CLIP's text encoders: CLIP-L, and OpenCLIP's H and bigG.

    h_0 = token + position,   h_i = h + W_o attn(ln h),   then h + fc2 act(fc1 ln h),   y = ln h_L.

All are returned, as diffusion models use different ones: Stable Diffusion 1 and 2 are conditioned on y (2 has an
encoder of one layer less), SDXL on h_{L−1} of two encoders and on the second's projected pooled state. With `clip_skip`
k, which some fine-tuned models were trained with, the states are those of the first L − k layers, y = ln h_{L−k}; only
the projection is of the whole encoder.

References:
  Radford et al. 2021 (CLIP), Cherti et al. 2023 (OpenCLIP), Podell et al. 2023, section 2.1 (SDXL's pair).
"""

import dataclasses
import re
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mmdjax.sd.config import Config, check_size, class_name
from mmdjax.sd.networks.layers import Block, attend

ACTIVATIONS = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # CLIP-L
    "gelu": lambda x: nn.gelu(x, approximate=False),  # OpenCLIP: the erf one
}
UNPREFIXED = re.compile(r"(embeddings|encoder\.layers|final_layer_norm)\.")


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(Config):
    """A text encoder's config.json. Its `architectures` say whether there is a projection; the width does not."""

    CLASSES: ClassVar = ("CLIPTextModel", "CLIPTextModelWithProjection")
    OPEN: ClassVar = True

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"
    projection_dim: int = 512
    eos_token_id: int = 49407
    with_projection: bool = False
    clip_skip: int = 0  # no setting of transformers: `mmdjax.sd.load` writes it here

    @classmethod
    def from_json(cls, raw):
        """See `Config.from_json`.

        Raises:
          ValueError: another model's file, an unknown `hidden_act`, no `architectures` to say whether there is a
            projection, or a `clip_skip` of all layers.
        """
        if not raw.get("architectures"):
            raise ValueError(f"a text encoder's config.json must name its architecture: one of {cls.CLASSES}")
        config = super().from_json(raw)
        check_size(config, config.num_hidden_layers)
        if config.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {config.hidden_act!r}; implemented: {tuple(ACTIVATIONS)}")
        if not 0 <= config.clip_skip < config.num_hidden_layers:
            raise ValueError(
                f"clip_skip is {config.clip_skip}; give 0 to {config.num_hidden_layers - 1}, as the text encoder has "
                f"{config.num_hidden_layers} layers"
            )
        return dataclasses.replace(config, with_projection=str(class_name(raw)).endswith("WithProjection"))


class TextOutput(NamedTuple):
    """The output of a text encoder for ids [n, l].

    Args:
      last: y = ln h_{L−k}, [n, l, d], k = `clip_skip`.
      hidden: h_0 … h_{L−k} before the final norm, each [n, l, d]; hidden[-2] is SDXL's condition.
      pooled: y at the end-of-text token, [n, d].
      projected: ln h_L at the end-of-text token times the projection, [n, p]; None in a model without one.
    """

    last: Float[Array, "n l d"]
    hidden: tuple[Float[Array, "n l d"], ...]
    pooled: Float[Array, "n d"]
    projected: Float[Array, "n p"] | None


class CLIPText(Block):
    """A CLIP text encoder: ids [n, l] -> `TextOutput`. The mask is causal; padding is not masked, as in training."""

    config: CLIPTextConfig

    def inputs(self):
        return (jax.ShapeDtypeStruct((1, 2), jnp.int32),)

    def checkpoint_key(self, key):
        return f"text_model.{key}" if UNPREFIXED.match(key) else key  # transformers 5 leaves it out

    @nn.compact
    def __call__(self, ids: Int[Array, "n l"]) -> TextOutput:
        cfg = self.config
        tokens = self.embed("text_model.embeddings.token_embedding", cfg.vocab_size, cfg.hidden_size)
        positions = self.embed("text_model.embeddings.position_embedding", cfg.max_position_embeddings, cfg.hidden_size)
        h = tokens(ids) + positions(jnp.arange(ids.shape[1]))
        hidden = [h]
        for i in range(cfg.num_hidden_layers):
            h = self.part(EncoderLayer, f"text_model.encoder.layers.{i}", cfg)(h)
            hidden.append(h)
        norm, ends = self.layer_norm("text_model.final_layer_norm", cfg.layer_norm_eps), jnp.arange(ids.shape[0])
        at_end = (ends, end_of_text(ids, cfg.eos_token_id))
        hidden = hidden[: len(hidden) - cfg.clip_skip]
        last, projected = norm(hidden[-1]), None
        if cfg.with_projection:
            whole = norm(h) if cfg.clip_skip else last
            projected = self.dense("text_projection", cfg.projection_dim, bias=False)(whole[at_end])
        return TextOutput(last, tuple(hidden), last[at_end], projected)


class EncoderLayer(Block):
    """One pre-norm transformer layer, [n, l, d] -> [n, l, d]."""

    config: CLIPTextConfig

    @nn.compact
    def __call__(self, h):
        cfg = self.config
        n, length, width = h.shape
        x = self.layer_norm("layer_norm1", cfg.layer_norm_eps)(h)
        q, k, v = (
            self.dense(f"self_attn.{which}_proj", width)(x).reshape(n, length, cfg.num_attention_heads, -1)
            for which in "qkv"
        )
        h = h + self.dense("self_attn.out_proj", width)(
            attend(q, k, v, causal=True).astype(self.dtype).reshape(n, length, width)
        )
        x = self.layer_norm("layer_norm2", cfg.layer_norm_eps)(h)
        x = ACTIVATIONS[cfg.hidden_act](self.dense("mlp.fc1", cfg.intermediate_size)(x))
        return h + self.dense("mlp.fc2", width)(x)


def end_of_text(ids: Int[Array, "n l"], eos_token_id: int) -> Int[Array, " n"]:
    """Where each prompt ends: the first eos token.

    Configs written before 2023 say 2, which is wrong: for them it is the largest id, as in CLIP's own code. That fails
    only if tokens were added after eos.
    """
    if eos_token_id == 2:
        return jnp.argmax(ids, axis=-1)
    return jnp.argmax(ids == eos_token_id, axis=-1)
