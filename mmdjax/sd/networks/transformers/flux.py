"""FLUX.1: a transformer over a prompt and a picture that predicts the velocity of a rectified flow.

Double blocks hold prompt and picture as two streams, with weights of their own, that attend to both. Single blocks run
on both as one sequence, attention and feed-forward side by side:

    x ← x + g ⊙ W [attention(y), gelu(W₁ y)],   y = (1 + scale) ⊙ norm(x) + shift.

Shifts, scales and gates g of every block are linear in silu(c), where c embeds the time, the pooled prompt, and the
strength of guidance if the network was distilled from guided ones. Queries and keys are turned by the place (0, row,
column) of a picture's token, and (0, 0, 0) of the prompt's.

References:
  Black Forest Labs 2024, github.com/black-forest-labs/flux; Esser et al. 2024 (joint attention); Su et al. 2024 (rotary
  positions); Dehghani et al. 2023 (parallel blocks); Meng et al. 2023 (distilled guidance).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mmdjax.sd.config import Config, check_size
from mmdjax.sd.networks.layers import Block, pack, timestep_embedding, unpack
from mmdjax.sd.networks.primitives import attend
from mmdjax.sd.networks.transformers.blocks import (
    FeedForward,
    JointAttention,
    PlainNorm,
    Rotary,
    Transformer,
    modulate,
    rotary_tables,
    rotate,
    split_heads,
)

THETA = 10_000  # of the rotary positions
TIMES = 256  # waves that embed a time
EPS = 1e-6  # of every norm


@dataclasses.dataclass(frozen=True)
class FluxConfig(Config):
    """transformer/config.json of FLUX.1. Channels are those of packed latents: four times the latents'."""

    CLASSES: ClassVar = ("FluxTransformer2DModel",)
    FIXED: ClassVar = {"patch_size": 1}

    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    def __post_init__(self):
        check_flux(self, axes=3)
        if self.in_channels % 4 or (self.out_channels or 4) % 4:
            raise ValueError(
                f"in_channels is {self.in_channels} and out_channels {self.out_channels}; latents packed 2 × 2 have a "
                "multiple of 4"
            )


def check_flux(config: Any, axes: int) -> None:
    """Raise ValueError for a configuration that is no network's; positions have so many axes."""
    check_size(config, config.num_layers + config.num_single_layers)
    dims, size = config.axes_dims_rope, config.attention_head_dim
    if len(dims) != axes or sum(dims) != size or any(dim % 2 for dim in dims):
        raise ValueError(
            f"axes_dims_rope is {dims}; give {axes} even numbers that add up to attention_head_dim, {size}"
        )


class FluxNetwork(Transformer):
    """What FLUX.1 and FLUX.2 share: the embeddings that modulate the blocks, and the way out."""

    def embedding(self, name: str, features: Array, bias: bool) -> Array:
        """W₂ silu(W₁ ·), [n, f] -> [n, c]."""
        h = self.dense(f"{name}.linear_1", self.config.width, bias)(features.astype(self.dtype))
        return self.dense(f"{name}.linear_2", self.config.width, bias)(nn.silu(h))

    def embedded(self, name: str, t: Array, guidance: Array | None, size: int, bias: bool) -> Array:
        """The embedding [n, c] of the time and, if the network takes one, of the strength of guidance."""
        if (guidance is not None) != self.config.guidance_embeds:
            wants = (
                "embeds the strength of guidance: give guidance, [n], such as 3.5"
                if guidance is None
                else "has no embedding of guidance (guidance_embeds in its config): leave guidance out"
            )
            raise ValueError(f"this {type(self).__name__} {wants}")

        def waves(numbers):
            return timestep_embedding(1000 * numbers.astype(jnp.float32), size)

        c = self.embedding(f"{name}.timestep_embedder", waves(t), bias)
        return c if guidance is None else c + self.embedding(f"{name}.guidance_embedder", waves(guidance), bias)

    def out(self, x: Array, c: Array, features: int, eps: float, bias: bool) -> Array:
        """The prediction of each token, [n, l, c] -> [n, l, features]."""
        scale, shift = jnp.split(self.dense("norm_out.linear", 2 * x.shape[-1], bias)(nn.silu(c)), 2, axis=-1)
        y = modulate(self.part(PlainNorm, "norm_out.norm", eps)(x), shift, scale)
        return self.dense("proj_out", features, bias)(y)

    def prompt(self, cond: Mapping[str, Array] | Array) -> Array:
        """The prompt's tokens in a condition.

        Raises:
          ValueError: they have another width than the network takes.
        """
        context = (cond["context"] if isinstance(cond, Mapping) else cond).astype(self.dtype)
        width = self.config.joint_attention_dim
        if context.shape[-1] != width:
            raise ValueError(f"the context has width {context.shape[-1]}; this {type(self).__name__} takes {width}")
        return context


class Flux(FluxNetwork):
    """FLUX.1's transformer: the velocity (noise minus picture) at x.

    Call with x [n, h, w, c], the latents (16 channels; h and w even: tokens are 2 × 2 of them, packed here); t [n] in
    [0, 1], the noise level sigma of the flow, 1 for pure noise; and a mapping of "context" [n, l, d] (T5's tokens) and
    "pooled" [n, p] (CLIP's pooled prompt). Padding of the prompt is attended to, as it was in training. FLUX.1 [dev]
    also takes guidance [n], the strength of guidance that it imitates, such as 3.5; [schnell] takes none. Returns [n,
    h, w, out_channels / 4].

    Raises:
      ValueError: a condition or latents of another form, or guidance where the network takes none, or none where it
        does.
    """

    config: FluxConfig

    def inputs(self):
        cfg, shape = self.config, jax.ShapeDtypeStruct
        cond = {
            "context": shape((1, 2, cfg.joint_attention_dim), jnp.float32),
            "pooled": shape((1, cfg.pooled_projection_dim), jnp.float32),
        }
        number = shape((1,), jnp.float32)
        return (shape((1, 2, 2, cfg.in_channels // 4), jnp.float32), number, cond, number)[: 3 + cfg.guidance_embeds]

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "n h w c"],
        t: Float[Array, " n"],
        cond: Mapping[str, Array],
        guidance: Float[Array, " n"] | None = None,
    ) -> Float[Array, "n h w o"]:
        cfg = self.config
        if not isinstance(cond, Mapping) or "pooled" not in cond:
            raise ValueError('FLUX.1 is conditioned on a mapping of "context", [n, l, d], and "pooled", [n, p]')
        given, wanted = cond["pooled"].shape[-1], cfg.pooled_projection_dim
        if given != wanted:
            raise ValueError(f"the pooled prompt has width {given}; this network takes {wanted}")
        c = self.embedded("time_text_embed", t, guidance, TIMES, bias=True)
        c = c + self.embedding("time_text_embed.text_embedder", cond["pooled"], bias=True)
        context = self.dense("context_embedder", cfg.width)(self.prompt(cond))
        tokens = pack(x.astype(self.dtype))
        n, height, width, _ = tokens.shape
        places = np.concatenate([np.zeros((context.shape[1], 3)), grid_places(height, width)])
        rotary = rotary_tables(places, cfg.axes_dims_rope, THETA)
        h = self.dense("x_embedder", cfg.width)(tokens.reshape(n, height * width, -1))
        for i in range(cfg.num_layers):
            block = self.part(DoubleBlock, f"transformer_blocks.{i}", cfg.num_attention_heads)
            h, context = block(h, context, c, rotary)
        h = jnp.concatenate([context, h], axis=1)
        for i in range(cfg.num_single_layers):
            h = self.part(SingleBlock, f"single_transformer_blocks.{i}", cfg.num_attention_heads)(h, c, rotary)
        features = cfg.out_channels or cfg.in_channels
        y = self.out(h[:, context.shape[1] :], c, features, EPS, bias=True)
        return unpack(y.reshape(n, height, width, features))


def grid_places(height: int, width: int) -> Float[np.ndarray, "l 3"]:
    """The place (0, row, column) of each token of a picture, row by row."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.stack([np.zeros_like(rows), rows, columns], axis=-1).reshape(-1, 3).astype(float)


def in_range(x: Array) -> Array:
    """The values, kept to float16's range in float16: the last blocks' exceed it."""
    largest = float(jnp.finfo(jnp.float16).max)
    return jnp.clip(x, -largest, largest) if x.dtype == jnp.float16 else x


class Streams(Block):
    """A block on two streams, given the shift, scale and gate of attention, then of the feed-forward, for each."""

    heads: int

    def joint(self, x, context, six: Array, six_context: Array, rotary: Rotary, eps: float, bias: bool):
        """Both streams after the block, [n, l, c] and [n, m, c]; six and six_context are [n, 6 c]."""
        mine, others = jnp.split(six, 6, axis=-1), jnp.split(six_context, 6, axis=-1)
        y, z = self.part(JointAttention, "attn", self.heads, eps, bias)(
            self.modulated("norm1", x, mine, eps), self.modulated("norm1_context", context, others, eps), rotary
        )
        x, context = x + mine[2][:, None] * y, context + others[2][:, None] * z
        y = self.feed("ff", self.modulated("norm2", x, mine[3:], eps))
        z = self.feed("ff_context", self.modulated("norm2_context", context, others[3:], eps))
        return x + mine[5][:, None] * y, in_range(context + others[5][:, None] * z)

    def modulated(self, name: str, x, shift_and_scale, eps: float):
        """The norm of x, shifted and scaled."""
        return modulate(self.part(PlainNorm, f"{name}.norm", eps)(x), *shift_and_scale[:2])

    def feed(self, name: str, x):
        """The feed-forward, [n, l, c] -> [n, l, c]."""
        raise NotImplementedError


class DoubleBlock(Streams):
    """FLUX.1's block on two streams; each has a modulation of its own."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "n l c"], context: Float[Array, "n m c"], c: Float[Array, "n c"], rotary: Rotary
    ):
        six, six_context = (
            self.dense(f"{name}.linear", 6 * x.shape[-1])(nn.silu(c)) for name in ("norm1", "norm1_context")
        )
        return self.joint(x, context, six, six_context, rotary, EPS, bias=True)

    def feed(self, name, x):
        return self.part(FeedForward, name, hidden=4 * x.shape[-1])(x)


class SingleBlock(Block):
    """FLUX.1's block on one sequence, attention and feed-forward side by side."""

    heads: int

    @nn.compact
    def __call__(self, x: Float[Array, "n l c"], c: Float[Array, "n c"], rotary: Rotary) -> Float[Array, "n l c"]:
        channels = x.shape[-1]
        shift, scale, gate = jnp.split(self.dense("norm.linear", 3 * channels)(nn.silu(c)), 3, axis=-1)
        y = modulate(self.part(PlainNorm, "norm.norm", EPS)(x), shift, scale)
        mixed = self.part(RotaryAttention, "attn", self.heads)(y, rotary)
        hidden = nn.gelu(self.dense("proj_mlp", 4 * channels)(y), approximate=True)
        both = self.dense("proj_out", channels)(jnp.concatenate([mixed, hidden], axis=-1))
        return in_range(x + gate[:, None] * both)


class RotaryAttention(Block):
    """Self-attention with normed and turned queries and keys, without a projection after it: [n, l, c] -> [n, l, c]."""

    heads: int

    @nn.compact
    def __call__(self, x, rotary: Rotary):
        q, k, v = (split_heads(self.dense(name, x.shape[-1])(x), self.heads) for name in ("to_q", "to_k", "to_v"))
        q, k = rotate(self.rms_norm("norm_q", EPS)(q), rotary), rotate(self.rms_norm("norm_k", EPS)(k), rotary)
        return attend(q, k, v, flash=self.flash).astype(self.compute_dtype).reshape(x.shape)
