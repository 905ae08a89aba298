"""FLUX.2 ([klein] 4B and 9B, [dev]): FLUX.1's design with one modulation for all blocks of a kind, and no biases.

Feed-forwards are swiglu, single blocks have one product before and one after attention and feed-forward:

    q, k, v, u = W y,   x ← x + g ⊙ W' [attention(q, k, v), swiglu(u)].

A token's place has four axes: (0, row, column, 0) in the picture, (0, 0, 0, i) for the prompt's token i.

References:
  Black Forest Labs 2025, github.com/black-forest-labs/flux2; Shazeer 2020 (swiglu); and those of `flux`.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mmdjax.sd.config import Config
from mmdjax.sd.networks.layers import Block
from mmdjax.sd.networks.primitives import attend
from mmdjax.sd.networks.transformers.blocks import (
    PlainNorm,
    Rotary,
    modulate,
    rotary_tables,
    rotate,
    split_heads,
    swiglu,
)
from mmdjax.sd.networks.transformers.flux import FluxNetwork, Streams, check_flux, grid_places, in_range


@dataclasses.dataclass(frozen=True)
class Flux2Config(Config):
    """transformer/config.json of FLUX.2. Channels are those of packed latents."""

    CLASSES: ClassVar = ("Flux2Transformer2DModel",)
    FIXED: ClassVar = {"patch_size": 1}

    in_channels: int = 128
    out_channels: int | None = None
    num_layers: int = 8
    num_single_layers: int = 48
    attention_head_dim: int = 128
    num_attention_heads: int = 48
    joint_attention_dim: int = 15360
    timestep_guidance_channels: int = 256
    mlp_ratio: int | float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: int | float = 2000
    eps: float = 1e-6
    guidance_embeds: bool = True

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def hidden(self) -> int:
        """Channels inside of a feed-forward."""
        return int(self.width * self.mlp_ratio)

    def __post_init__(self):
        check_flux(self, axes=4)


class Flux2(FluxNetwork):
    """FLUX.2's transformer: the velocity (noise minus picture) at x.

    Call with x [n, h, w, c], the latents of `AutoencoderKLFlux2.to_latents` (128 channels); t [n] in [0, 1], the noise
    level sigma of the flow, 1 for pure noise; and the prompt's tokens, [n, l, d] or a mapping with them as "context".
    Padding of the prompt is attended to, as it was in training. FLUX.2 [dev] also takes guidance [n], the strength of
    guidance that it imitates, such as 4; [klein] takes none. Returns [n, h, w, out_channels].

    Raises:
      ValueError: a context of another width, or guidance where the network takes none, or none where it does.
    """

    config: Flux2Config

    def inputs(self):
        cfg, shape = self.config, jax.ShapeDtypeStruct
        cond = {"context": shape((1, 2, cfg.joint_attention_dim), jnp.float32)}
        number = shape((1,), jnp.float32)
        return (shape((1, 1, 2, cfg.in_channels), jnp.float32), number, cond, number)[: 3 + cfg.guidance_embeds]

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "n h w c"],
        t: Float[Array, " n"],
        cond: Float[Array, "n l d"] | Mapping[str, Array],
        guidance: Float[Array, " n"] | None = None,
    ) -> Float[Array, "n h w o"]:
        cfg = self.config
        n, height, width, _ = x.shape
        c = self.embedded("time_guidance_embed", t, guidance, cfg.timestep_guidance_channels, bias=False)
        modulation = {
            name: self.dense(f"{name}.linear", times * cfg.width, bias=False)(nn.silu(c))
            for name, times in MODULATIONS.items()
        }
        context = self.dense("context_embedder", cfg.width, bias=False)(self.prompt(cond))
        rotary = rotary_tables(places(context.shape[1], height, width), cfg.axes_dims_rope, cfg.rope_theta)
        h = self.dense("x_embedder", cfg.width, bias=False)(x.astype(self.dtype).reshape(n, height * width, -1))
        picture, prompt, single = (modulation[name] for name in MODULATIONS)
        for i in range(cfg.num_layers):
            block = self.part(SharedDoubleBlock, f"transformer_blocks.{i}", cfg.num_attention_heads, cfg)
            h, context = block(h, context, picture, prompt, rotary)
        h = jnp.concatenate([context, h], axis=1)
        for i in range(cfg.num_single_layers):
            h = self.part(SharedSingleBlock, f"single_transformer_blocks.{i}", cfg)(h, single, rotary)
        features = cfg.out_channels or cfg.in_channels
        return self.out(h[:, context.shape[1] :], c, features, cfg.eps, bias=False).reshape(n, height, width, features)


MODULATIONS = {"double_stream_modulation_img": 6, "double_stream_modulation_txt": 6, "single_stream_modulation": 3}


def places(length: int, height: int, width: int) -> Float[np.ndarray, "l 4"]:
    """The place of each token of a prompt of some length, then of a picture.

    Example:
      >>> places(2, 1, 2).tolist()
      [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]
    """
    prompt = np.pad(np.arange(length, dtype=float)[:, None], ((0, 0), (3, 0)))
    return np.concatenate([prompt, np.pad(grid_places(height, width), ((0, 0), (0, 1)))])


class SharedDoubleBlock(Streams):
    """FLUX.2's block on two streams; its modulation is that of all of them."""

    config: Flux2Config

    @nn.compact
    def __call__(self, x, context, six: Float[Array, "n s"], six_context: Float[Array, "n s"], rotary: Rotary):
        return self.joint(x, context, six, six_context, rotary, self.config.eps, bias=False)

    def feed(self, name, x):
        hidden = swiglu(self.dense(f"{name}.linear_in", 2 * self.config.hidden, bias=False)(x))
        return self.dense(f"{name}.linear_out", x.shape[-1], bias=False)(hidden)


class SharedSingleBlock(Block):
    """FLUX.2's block on one sequence; its modulation is that of all of them."""

    config: Flux2Config

    @nn.compact
    def __call__(self, x: Float[Array, "n l c"], three: Float[Array, "n s"], rotary: Rotary) -> Float[Array, "n l c"]:
        cfg, channels = self.config, x.shape[-1]
        shift, scale, gate = jnp.split(three, 3, axis=-1)
        y = modulate(self.part(PlainNorm, "norm", cfg.eps)(x), shift, scale)
        y = self.dense("attn.to_qkv_mlp_proj", 3 * channels + 2 * cfg.hidden, bias=False)(y)
        *qkv, u = jnp.split(y, [channels, 2 * channels, 3 * channels], axis=-1)
        q, k, v = (split_heads(a, cfg.num_attention_heads) for a in qkv)
        q, k = self.rms_norm("attn.norm_q", cfg.eps)(q), self.rms_norm("attn.norm_k", cfg.eps)(k)
        mixed = attend(rotate(q, rotary), rotate(k, rotary), v, flash=self.flash).astype(self.compute_dtype)
        both = jnp.concatenate([mixed.reshape(x.shape), swiglu(u)], axis=-1)
        return in_range(x + gate[:, None] * self.dense("attn.to_out", channels, bias=False)(both))
