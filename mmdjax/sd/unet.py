"""The U-Nets of latent diffusion: a network from (x_t, t, condition) to its prediction, [n, h, w, c] each.

Both have one body. Going down, level i of resolution has `layers_per_block` residual blocks, with attention at some
levels; each output is kept. Going up it has one block more, and each takes a kept output too. `UNet2DCondition` (Stable
Diffusion) also attends to a context; `UNet2D` (the unconditional face models, and those of Ho et al. 2020) does not.

References:
  Rombach et al. 2022 (latent diffusion), Ho et al. 2020 (the U-Net), Podell et al. 2023, section 2.2 (SDXL's
  conditions).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from mmdjax.sd.config import Config, check_size, per_level
from mmdjax.sd.layers import Block, ResnetBlock, SpatialAttention, timestep_embedding, upsample

COMMON = {
    "act_fn": "silu",
    "center_input_sample": False,
    "class_embed_type": None,
    "dropout": 0.0,
    "mid_block_scale_factor": 1,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
}


@dataclasses.dataclass(frozen=True)
class UNet2DConditionConfig(Config):
    """Stable Diffusion's unet/config.json."""

    CLASSES: ClassVar = ("UNet2DConditionModel",)
    FIXED: ClassVar = COMMON | {
        "addition_embed_type_num_heads": 64,  # read by other kinds of added condition only
        "attention_type": "default",
        "class_embeddings_concat": False,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "cross_attention_norm": None,
        "dual_cross_attention": False,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "mid_block_only_cross_attention": None,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "only_cross_attention": False,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "reverse_transformer_layers_per_block": None,
        "time_cond_proj_dim": None,
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
    }

    sample_size: Any = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int | float = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    downsample_padding: int = 1
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8  # a number of heads, whatever it is called
    num_attention_heads: int | tuple[int, ...] | None = None
    use_linear_projection: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    upcast_attention: bool | None = False  # SDXL's file has null

    @property
    def heads(self) -> tuple[int, ...]:
        """Heads at each level. They are in `attention_head_dim`, a misnomer that the format keeps for old files."""
        return per_level(self.num_attention_heads or self.attention_head_dim, len(self.block_out_channels))

    @property
    def depths(self) -> tuple[int, ...]:
        """Transformer blocks at each level that attends."""
        return per_level(self.transformer_layers_per_block, len(self.block_out_channels))

    def __post_init__(self):
        check_blocks(self, {"DownBlock2D", "CrossAttnDownBlock2D"}, {"UpBlock2D", "CrossAttnUpBlock2D"})
        sizes = (self.addition_time_embed_dim, self.projection_class_embeddings_input_dim)
        if self.addition_embed_type == "text_time" and None in sizes:
            raise ValueError("an SDXL U-Net needs addition_time_embed_dim and projection_class_embeddings_input_dim")
        if self.addition_embed_type not in (None, "text_time"):
            raise ValueError(
                f'addition_embed_type is {self.addition_embed_type!r}; implemented: None and "text_time" (SDXL)'
            )


@dataclasses.dataclass(frozen=True)
class UNet2DConfig(Config):
    """An unconditional U-Net's config.json."""

    CLASSES: ClassVar = ("UNet2DModel",)
    FIXED: ClassVar = COMMON | {
        "add_attention": True,
        "attn_norm_num_groups": None,
        "downsample_type": "conv",
        "mid_block_type": "UNetMidBlock2D",
        "upsample_type": "conv",
    }

    sample_size: Any = None
    in_channels: int = 3
    out_channels: int = 3
    flip_sin_to_cos: bool = True
    freq_shift: int | float = 0
    down_block_types: tuple[str, ...] = ("DownBlock2D",) + ("AttnDownBlock2D",) * 3
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D",) * 3 + ("UpBlock2D",)
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    downsample_padding: int = 1
    attention_head_dim: int | None = 8  # here it is the size of a head; None: one head
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    num_train_timesteps: int | None = None

    @property
    def heads(self) -> tuple[int, ...]:
        """Heads at each level."""
        return tuple(channels // (self.attention_head_dim or channels) for channels in self.block_out_channels)

    def __post_init__(self):
        check_blocks(self, {"DownBlock2D", "AttnDownBlock2D"}, {"UpBlock2D", "AttnUpBlock2D"})


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

        h = resnet("mid_block.resnets.0", features, h)
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
        pooled = cfg.projection_class_embeddings_input_dim - 6 * cfg.addition_time_embed_dim
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
        return self.part(SpatialTransformer, name, cfg, cfg.heads[i], cfg.depths[i])(x, context)


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


def check_blocks(cfg: Any, down: set[str], up: set[str]) -> None:
    """Raise ValueError for a block that is not implemented, other numbers of blocks than levels, or heads that do not
    divide the channels.
    """
    unknown = sorted({*cfg.down_block_types} - down | {*cfg.up_block_types} - up)
    if unknown:
        raise ValueError(f"blocks {unknown} are not implemented; implemented: {sorted(down | up)}")
    depth = max(getattr(cfg, "depths", ()), default=1)
    height = len(cfg.block_out_channels)
    check_size(cfg, 2 * height * (cfg.layers_per_block + 1) * (1 + depth), height)
    levels = {height, len(cfg.down_block_types), len(cfg.up_block_types), len(cfg.heads)}
    if len(levels) > 1:
        raise ValueError(
            f"block_out_channels, down_block_types, up_block_types and heads differ in length: {sorted(levels)}"
        )
    for channels, heads in zip(cfg.block_out_channels, cfg.heads, strict=True):
        if heads < 1 or channels % heads:
            raise ValueError(f"{channels} channels cannot be split in {heads} heads")
    if not isinstance(cfg.layers_per_block, int):
        raise ValueError(f"layers_per_block is {cfg.layers_per_block!r}; one number for all levels is implemented")
