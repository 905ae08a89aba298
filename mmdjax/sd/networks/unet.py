"""The U-Nets of latent diffusion: a network from (x_t, t, condition) to its prediction, [n, h, w, c] each.

Both have one body. Going down, level i of resolution has `layers_per_block` residual blocks, with attention at some
levels; each output is kept. Going up it has one block more, and each takes a kept output too. `UNet2DCondition` (Stable
Diffusion) also attends to a context; `UNet2D` (the unconditional face models, and those of Ho et al. 2020) does not.

References:
  Rombach et al. 2022 (latent diffusion), Ho et al. 2020 (the U-Net), Podell et al. 2023, section 2.2 (SDXL's
  conditions).
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from mmdjax.sd.networks.layers import Block, ResnetBlock, SpatialAttention, timestep_embedding, upsample
from mmdjax.sd.networks.unet_config import UNet2DConditionConfig, UNet2DConfig


class UNet(Block):
    """The body of both U-Nets. A subclass says what attention is at a level of resolution."""

    config: Any

    def inputs(self):
        side = 2 ** len(self.config.block_out_channels)
        x = jax.ShapeDtypeStruct((1, side, side, self.config.in_channels), jnp.float32)
        return (x, jax.ShapeDtypeStruct((1,), jnp.float32))

    def part(self, cls, name, *args, **kwargs):
        """A submodule with this one's dtypes and settings; with `remat` it is recomputed in the backward pass."""
        return super().part(nn.remat(cls) if self.remat else cls, name, *args, **kwargs)

    def level(self, name, i, x, context):
        """Attention at level i, [n, h, w, c] -> [n, h, w, c]."""
        raise NotImplementedError

    def time_embedding(self, t):
        """The embedding of t for the residual blocks, [n, 4 c]."""
        cfg = self.config
        waves = timestep_embedding(t, cfg.block_out_channels[0], flip=cfg.flip_sin_to_cos, shift=cfg.freq_shift)
        return self.embedding("time_embedding", waves)

    def embedding(self, name, features):
        """W₂ silu(W₁ ·), [n, 4 c]."""
        width = 4 * self.config.block_out_channels[0]
        h = self.dense(f"{name}.linear_1", width)(features.astype(self.dtype))
        return self.dense(f"{name}.linear_2", width)(nn.silu(h))

    def body(self, x, emb, context=None):
        """[n, h, w, c], the embedding of time [n, e] and the context -> [n, h, w, out_channels]."""
        cfg = self.config
        last = len(cfg.block_out_channels) - 1
        x = x.astype(self.dtype)

        def resnet(name, features, h):
            return self.part(ResnetBlock, name, features, cfg.norm_num_groups, cfg.norm_eps)(h, emb)

        h = self.conv("conv_in", cfg.block_out_channels[0])(x)
        kept = [h]
        for i, (kind, features) in enumerate(zip(cfg.down_block_types, cfg.block_out_channels, strict=True)):
            for j in range(cfg.layers_per_block):
                h = resnet(f"down_blocks.{i}.resnets.{j}", features, h)
                if "Attn" in kind:
                    h = self.level(f"down_blocks.{i}.attentions.{j}", i, h, context)
                kept.append(h)
            if i < last:
                padding = [(cfg.downsample_padding, 1)] * 2
                h = self.conv(f"down_blocks.{i}.downsamplers.0.conv", features, stride=2, padding=padding)(h)
                kept.append(h)

        if cfg.middle > 0:
            h = resnet("mid_block.resnets.0", features, h)
        if cfg.middle > 1:
            h = self.level("mid_block.attentions.0", last, h, context)
            h = resnet("mid_block.resnets.1", features, h)

        for i, (kind, features) in enumerate(zip(cfg.up_block_types, cfg.block_out_channels[::-1], strict=True)):
            for j in range(cfg.layers_per_block + 1):
                h = resnet(f"up_blocks.{i}.resnets.{j}", features, jnp.concatenate([h, kept.pop()], axis=-1))
                if "Attn" in kind:
                    h = self.level(f"up_blocks.{i}.attentions.{j}", last - i, h, context)
            if i < last:
                h = upsample(h, kept[-1].shape[1:3])  # of an odd size, too
                h = self.conv(f"up_blocks.{i}.upsamplers.0.conv", features)(h)
        h = nn.silu(self.group_norm("conv_norm_out", cfg.norm_num_groups, cfg.norm_eps)(h))
        return self.conv("conv_out", cfg.out_channels)(h)


class UNet2DCondition(UNet):
    """Stable Diffusion's U-Net: 1.x, 2.x and SDXL, by its configuration.

    Call with x [n, h, w, c], t [n] (the index of the trained table, from 0) and the condition: the context [n, l, d],
    or for SDXL a mapping of "context" [n, l, d], "pooled" [n, p] (the second encoder's projection) and "time_ids" [n,
    6] (original size, crop's corner and target size, each height then width). Returns the prediction [n, h, w,
    out_channels].
    """

    config: UNet2DConditionConfig

    def inputs(self):
        cfg = self.config
        context = jax.ShapeDtypeStruct((1, 2, cfg.cross_attention_dim), jnp.float32)
        if cfg.addition_embed_type is None:
            return (*super().inputs(), context)
        pooled = (cfg.projection_class_embeddings_input_dim or 0) - 6 * (cfg.addition_time_embed_dim or 0)
        added = {
            "pooled": jax.ShapeDtypeStruct((1, pooled), jnp.float32),
            "time_ids": jax.ShapeDtypeStruct((1, 6), jnp.float32),
        }
        return (*super().inputs(), {"context": context, **added})

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "n h w c"],
        t: Shaped[Array, " n"],
        cond: Float[Array, "n l d"] | Mapping[str, Array],
    ) -> Float[Array, "n h w o"]:
        cfg = self.config
        added = cfg.addition_embed_type is not None
        if isinstance(cond, Mapping) != added:
            wants = 'a mapping of "context", "pooled" and "time_ids"' if added else "the context alone, [n, l, d]"
            raise ValueError(f"this U-Net is conditioned on {wants}")
        context = (cond["context"] if isinstance(cond, Mapping) else cond).astype(self.dtype)
        if context.shape[-1] != cfg.cross_attention_dim:
            raise ValueError(f"the context has width {context.shape[-1]}; this U-Net takes {cfg.cross_attention_dim}")
        emb = self.time_embedding(t)
        if isinstance(cond, Mapping):
            size = cfg.addition_time_embed_dim or 0
            times = timestep_embedding(
                cond["time_ids"].reshape(-1), size, flip=cfg.flip_sin_to_cos, shift=cfg.freq_shift
            )
            both = jnp.concatenate([cond["pooled"], times.reshape(x.shape[0], -1)], axis=-1)
            emb = emb + self.embedding("add_embedding", both)
        return self.body(x, emb, context)

    def level(self, name, i, x, context):
        """Attention at level i of resolution."""
        cfg = self.config
        return self.part(SpatialTransformer, name, cfg, cfg.heads[i], cfg.depth(name))(x, context)


class UNet2D(UNet):
    """An unconditional U-Net: x [n, h, w, c] and t [n] (the index of the trained table) -> [n, h, w, out_channels].

    `cond` must be None; it is an argument so that `from_model(module.apply)` works.
    """

    config: UNet2DConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], t: Shaped[Array, " n"], cond: None = None
    ) -> Float[Array, "n h w o"]:
        return self.body(x, self.time_embedding(t))

    def level(self, name, i, x, context):
        """Self-attention at level i of resolution."""
        cfg = self.config
        return self.part(SpatialAttention, name, cfg.heads[i], cfg.norm_num_groups, cfg.norm_eps)(x)


class SpatialTransformer(Block):
    """x + W_out T(W_in norm x), T a stack of transformer blocks over positions: [n, h, w, c] -> [n, h, w, c].

    W_in and W_out are 1 × 1 convolutions in Stable Diffusion 1, linear maps (of other shapes in the file) in 2 and
    SDXL.
    """

    config: UNet2DConditionConfig
    heads: int
    depth: int

    @nn.compact
    def __call__(self, x, context):
        cfg = self.config
        n, height, width, channels = x.shape

        def project(name, h):
            if cfg.use_linear_projection:
                return self.dense(name, channels)(h)
            return self.conv(name, channels, 1)(h)

        h = self.group_norm("norm", cfg.norm_num_groups, 1e-6)(x)  # not norm_eps
        h = project("proj_in", h).reshape(n, height * width, channels)
        for i in range(self.depth):
            h = self.part(TransformerBlock, f"transformer_blocks.{i}", self.heads, bool(cfg.upcast_attention))(
                h, context
            )
        return x + project("proj_out", h.reshape(n, height, width, channels))


class TransformerBlock(Block):
    """Self-attention, attention to the context and a gated feed-forward, each pre-norm with a residual: [n, l, c]."""

    heads: int
    upcast: bool

    @nn.compact
    def __call__(self, h, context):
        x = self.layer_norm("norm1")(h)
        h = h + self.part(Attention, "attn1", self.heads, self.upcast)(x, x)
        h = h + self.part(Attention, "attn2", self.heads, self.upcast)(self.layer_norm("norm2")(h), context)
        x = self.dense("ff.net.0.proj", 8 * h.shape[-1])(self.layer_norm("norm3")(h))
        value, gate = jnp.split(x, 2, axis=-1)
        gated = value * nn.gelu(gate, approximate=False)  # GEGLU: Shazeer 2020, with the erf gelu
        return h + self.dense("ff.net.2", h.shape[-1])(gated)


class Attention(Block):
    """Multi-head attention of x [n, l, c] to context [n, m, d] -> [n, l, c]."""

    heads: int
    upcast: bool

    @nn.compact
    def __call__(self, x, context):
        return self.attention(x, context, self.heads, upcast=self.upcast)
