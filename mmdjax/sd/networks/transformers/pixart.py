"""PixArt: a transformer of latents conditioned on the token states of a prompt.

Patches of the latent are tokens. Each block attends to them, then to the prompt, then applies its feed-forward. One
map of the time gives the six shifts, scales and gates of all blocks, to which each block adds a table of its own
(adaLN-single). PixArt-α's model of 1024 pixels also takes the picture's size and aspect ratio; PixArt-Σ does not.

References:
  Chen et al. 2023 (PixArt-α), section 2.3; Chen et al. 2024 (PixArt-Σ).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from mmdjax.sd.config import Config, check_size
from mmdjax.sd.networks.layers import Block, timestep_embedding
from mmdjax.sd.networks.transformers.blocks import (
    Attention,
    FeedForward,
    PlainNorm,
    Transformer,
    modulate,
    sincos_positions,
    unpatchify,
)
from mmdjax.sd.networks.transformers.dit import WAVES, check_channels

PIXELS = 8  # for each latent along an axis, of the autoencoders that PixArt was trained with


@dataclasses.dataclass(frozen=True)
class PixArtConfig(Config):
    """diffusers' config.json of a PixArt."""

    CLASSES: ClassVar = ("PixArtTransformer2DModel",)
    FIXED: ClassVar = {
        "activation_fn": "gelu-approximate",
        "attention_type": "default",
        "dropout": 0.0,
        "norm_elementwise_affine": False,
        "norm_type": "ada_norm_single",
    }

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = 8
    num_layers: int = 28
    cross_attention_dim: int = 1152
    attention_bias: bool = True
    sample_size: int = 128
    patch_size: int = 2
    num_embeds_ada_norm: Any = 1000  # nothing reads it
    upcast_attention: bool = False
    norm_eps: float = 1e-6
    norm_num_groups: Any = 32  # nor this
    interpolation_scale: int | float | None = None
    use_additional_conditions: bool | None = None
    caption_channels: int | None = None

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def context_width(self) -> int:
        """Channels of the prompt's token states."""
        return self.caption_channels or self.cross_attention_dim

    @property
    def conditions_on_size(self) -> bool:
        """Whether the model takes the picture's size and aspect ratio."""
        given = self.use_additional_conditions
        return self.sample_size == 128 if given is None else given

    @property
    def scale(self) -> int | float:
        """What positions are divided by."""
        return max(self.sample_size // 64, 1) if self.interpolation_scale is None else self.interpolation_scale

    def __post_init__(self):
        check_size(self, self.num_layers)
        check_channels(self)
        if self.caption_channels is not None and self.cross_attention_dim != self.width:
            raise ValueError(
                f"prompts are projected to the width {self.width} but cross_attention_dim is {self.cross_attention_dim}"
            )
        if self.conditions_on_size and self.width % 3:
            raise ValueError(f"the width {self.width} does not split in three, for height, width and aspect ratio")


class PixArt(Transformer):
    """PixArt-α and PixArt-Σ, by their configuration.

    Call with x [n, h, w, c], t [n] (the index of the trained table, from 0) and the condition, a mapping of

        "context"       [n, l, d], the token states of the prompt,
        "mask"          [n, l], 1 where there is a token, 0 where padding; without it all are tokens,
        "resolution"    [n, 2], height and width in pixels; without it those of x, eight for each latent,
        "aspect_ratio"  [n], height over width; without it that of x.

    The last two are for the model of 1024 pixels of PixArt-α; others do not read them. Other keys are not read, either.
    Returns the predicted noise [n, h, w, c]; the half of the output that predicts variances is left out. Pictures of
    another size than the training's have their positions scaled to its grid.

    Raises:
      ValueError: a condition without context, of another width, or with a mask of another shape; a size that the
        patches do not divide.
    """

    config: PixArtConfig

    def inputs(self):
        cfg = self.config
        x = jax.ShapeDtypeStruct((1, cfg.patch_size, cfg.patch_size, cfg.in_channels), jnp.float32)
        context = jax.ShapeDtypeStruct((1, 2, cfg.context_width), jnp.float32)
        return x, jax.ShapeDtypeStruct((1,), jnp.float32), {"context": context}

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], t: Shaped[Array, " n"], cond: Any) -> Float[Array, "n h w c"]:
        cfg = self.config
        _, height, width, _ = x.shape
        context, mask = self.prompt(cond)
        h = self.patches("pos_embed.proj", x, cfg.patch_size, cfg.width)
        grid = height // cfg.patch_size, width // cfg.patch_size
        where = sincos_positions(*grid, cfg.width, base=cfg.sample_size // cfg.patch_size, scale=cfg.scale)
        h = (h + where).astype(self.dtype)
        c = self.condition(t, cond, (height, width))
        six = self.dense("adaln_single.linear", 6 * cfg.width)(nn.silu(c)).reshape(-1, 6, cfg.width)
        for i in range(cfg.num_layers):
            block = self.part(PixArtBlock, f"transformer_blocks.{i}", cfg)
            h = block(h, six, context, mask)
        shift, scale = jnp.moveaxis(table(self, 2, cfg.width) + c[:, None], 1, 0)
        h = modulate(self.part(PlainNorm, "norm_out")(h), shift, scale)
        features = cfg.patch_size**2 * (cfg.out_channels or cfg.in_channels)
        out = self.dense("proj_out", features, zero=True)(h)
        return unpatchify(out, cfg.patch_size, height, width)[..., : cfg.in_channels]

    def prompt(self, cond: Any) -> tuple[Float[Array, "n l d"], Bool[Array, "n l"] | None]:
        """The token states as the blocks attend to them, and which of them count."""
        cfg = self.config
        if not isinstance(cond, Mapping) or "context" not in cond:
            raise ValueError('this model is conditioned on a mapping of "context" [n, l, d] and "mask" [n, l]')
        context, mask = cond["context"], cond.get("mask")
        if context.shape[-1] != cfg.context_width:
            raise ValueError(f"the context has width {context.shape[-1]}; this model takes {cfg.context_width}")
        if mask is not None and mask.shape != context.shape[:2]:
            raise ValueError(
                f"the mask has shape {mask.shape} but the context {context.shape}; give one for each token"
            )
        context = context.astype(self.dtype)
        if cfg.caption_channels is not None:
            gelu = functools.partial(nn.gelu, approximate=True)
            context = self.two_layers("caption_projection", context, cfg.width, gelu)
        return context, None if mask is None else mask != 0

    def condition(self, t: Shaped[Array, " n"], cond: Mapping[str, Any], size: tuple[int, int]) -> Float[Array, "n e"]:
        """The embedding of time and, if the model takes them, of the picture's size and aspect ratio."""
        cfg, n = self.config, t.shape[0]

        def embed(name, numbers, features):
            waves = timestep_embedding(numbers.reshape(-1), WAVES).astype(self.dtype)
            return self.two_layers(f"adaln_single.emb.{name}", waves, features).reshape(n, -1)

        c = embed("timestep_embedder", t, cfg.width)
        if not cfg.conditions_on_size:
            return c
        pixels = jnp.array([[PIXELS * side for side in size]], jnp.float32)
        resolution = cond.get("resolution", jnp.tile(pixels, (n, 1)))
        aspect_ratio = cond.get("aspect_ratio", jnp.full(n, size[0] / size[1]))
        third = cfg.width // 3
        added = embed("resolution_embedder", resolution, third), embed("aspect_ratio_embedder", aspect_ratio, third)
        return c + jnp.concatenate(added, axis=-1)


class PixArtBlock(Block):
    """x ← x + g₁ attention(modulated norm x), x ← x + attention(x, context), x ← x + g₂ feedforward(modulated norm x).

    The shifts, scales and gates g are a table of the block plus the `six` of the time, [n, 6, c].  Chen et al. 2023,
    fig. 4.
    """

    config: PixArtConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "n l c"],
        six: Float[Array, "n 6 c"],
        context: Float[Array, "n m d"],
        mask: Bool[Array, "n m"] | None,
    ) -> Float[Array, "n l c"]:
        cfg = self.config
        how = {"heads": cfg.num_attention_heads, "bias": cfg.attention_bias, "upcast": cfg.upcast_attention}
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = jnp.moveaxis(table(self, 6, cfg.width) + six, 1, 0)
        y = modulate(self.part(PlainNorm, "norm1", eps=cfg.norm_eps)(x), shift, scale)
        x = x + gate[:, None] * self.part(Attention, "attn1", **how)(y)
        x = x + self.part(Attention, "attn2", **how)(x, context, mask)  # of x as it is, without a norm
        y = modulate(self.part(PlainNorm, "norm2", eps=cfg.norm_eps)(x), shift_mlp, scale_mlp)
        return x + gate_mlp[:, None] * self.part(FeedForward, "ff", hidden=4 * cfg.width)(y)


def table(module: Block, rows: int, features: int) -> Float[Array, "rows features"]:
    """A module's learned shifts and scales."""
    init = nn.initializers.normal(features**-0.5)
    return module.param("scale_shift_table", init, (rows, features), module.param_dtype).astype(module.dtype)
