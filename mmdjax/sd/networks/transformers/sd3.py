"""Stable Diffusion 3 and 3.5: a transformer over two streams, patches of the latent and tokens of the prompt.

Each block modulates both streams by c, the embedding of time and pooled prompt, and lets them attend to each other:

    (a, b) = attention(modulated norm x, modulated norm y)
    x ← x + g₁ a,  x ← x + g₂ feedforward(modulated norm x),  and y likewise with b.

The last block leaves y behind. In 3.5's first blocks x also attends to itself alone ("dual attention"), and in 3.5
queries and keys are normalised.

The positions are the middle of a table for larger pictures. The checkpoint holds the table, and nothing in the
published models says how theirs was made, so it is read as a parameter; `init` makes the fixed sines of diffusers.

References:
  Esser et al. 2024 (SD 3, fig. 2 and section 5.3), Peebles & Xie 2023 (adaLN-Zero).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from mmdjax.sd.config import Config, check_size
from mmdjax.sd.networks.layers import Block, timestep_embedding
from mmdjax.sd.networks.transformers.blocks import (
    AdaLNOut,
    Embedder,
    FeedForward,
    JointAttention,
    PlainNorm,
    modulate,
    unpatchify,
)


@dataclasses.dataclass(frozen=True)
class SD3Config(Config):
    """transformer/config.json of Stable Diffusion 3 and 3.5."""

    CLASSES: ClassVar = ("SD3Transformer2DModel",)

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int | None = 16
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    def __post_init__(self):
        check_size(self, self.num_layers)
        for name in ("patch_size", "num_layers", "pos_embed_max_size", "num_attention_heads"):
            if not getattr(self, name):
                raise ValueError(f"{name} is 0; it must be at least 1")
        if self.caption_projection_dim != self.width or self.width % 4:
            raise ValueError(
                f"caption_projection_dim is {self.caption_projection_dim}; it must be num_attention_heads × "
                f"attention_head_dim, {self.width}, a multiple of 4"
            )
        if self.qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm is {self.qk_norm!r}; implemented: None, 'rms_norm'")


class SD3(Block):
    """The transformer of Stable Diffusion 3 and 3.5: predicts ε − x_0 ("flow"), [n, h, w, c] -> [n, h, w, c].

    Call with x [n, h, w, c], t [n] (1000 σ, from 0 to 1000) and the condition, a mapping of "context" [n, l, d] (the
    prompt's tokens) and "pooled" [n, p].
    """

    config: SD3Config

    def inputs(self):
        cfg = self.config
        cond = {"context": (1, 2, cfg.joint_attention_dim), "pooled": (1, cfg.pooled_projection_dim)}
        shapes = ((1, cfg.patch_size, cfg.patch_size, cfg.in_channels), (1,), cond)
        is_shape = {"is_leaf": lambda node: isinstance(node, tuple) and isinstance(node[0], int)}
        return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, **is_shape)

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], t: Shaped[Array, " n"], cond: Mapping[str, Any], *, skip_layers: Any = None
    ) -> Float[Array, "n h w o"]:
        cfg = self.config
        self.check(x, cond, skip_layers)
        _, height, width, _ = x.shape
        waves = timestep_embedding(t, 256)
        c = self.part(Embedder, "time_text_embed.timestep_embedder", features=cfg.width)(waves)
        c = c + self.part(Embedder, "time_text_embed.text_embedder", features=cfg.width)(cond["pooled"])
        x = self.part(Patches, "pos_embed", config=cfg)(x.astype(self.dtype))
        context = self.dense("context_embedder", cfg.width)(cond["context"].astype(self.dtype))
        block = nn.remat(SD3Block) if self.remat else SD3Block
        for i in range(cfg.num_layers):
            how = {"dual": i in cfg.dual_attention_layers, "last": i == cfg.num_layers - 1}
            x, context = self.part(block, f"transformer_blocks.{i}", config=cfg, **how)(x, context, c)
        x = self.part(AdaLNOut, "norm_out")(x, c)
        channels = cfg.in_channels if cfg.out_channels is None else cfg.out_channels
        x = self.dense("proj_out", cfg.patch_size**2 * channels)(x)
        return unpatchify(x, cfg.patch_size, height, width)

    def check(self, x: Array, cond: Any, skip_layers: Any = None) -> None:
        """Raise ValueError for a picture or a condition that this model does not take."""
        cfg = self.config
        widths = {"context": cfg.joint_attention_dim, "pooled": cfg.pooled_projection_dim}
        if skip_layers is not None or (isinstance(cond, Mapping) and "skip_layers" in cond):
            raise ValueError(
                "skip_layers: skip-layer guidance is not implemented; use classifier-free guidance, cfg(...)"
            )
        if not isinstance(cond, Mapping) or set(cond) != set(widths):
            found = sorted(cond) if isinstance(cond, Mapping) else type(cond).__name__
            raise ValueError(f'cond is {found}; this model takes "context" [n, l, d] and "pooled" [n, p]')
        for name, wanted in widths.items():
            if cond[name].shape[-1] != wanted:
                raise ValueError(f"cond[{name!r}] has width {cond[name].shape[-1]}; this model takes {wanted}")
        most = cfg.patch_size * cfg.pos_embed_max_size
        if any(side % cfg.patch_size or not 0 < side <= most for side in x.shape[1:3]):
            raise ValueError(
                f"the latent is {x.shape[1]} × {x.shape[2]}; give multiples of {cfg.patch_size} up to {most}, the most "
                "that this model has positions for"
            )


class Patches(Block):
    """Patches and their positions, [n, h, w, c] -> [n, l, width]."""

    config: SD3Config

    @nn.compact
    def __call__(self, x):
        cfg = self.config
        size, most = cfg.patch_size, cfg.pos_embed_max_size
        y = self.conv("proj", cfg.width, size, stride=size, padding=[(0, 0)] * 2)(x)
        n, height, width, _ = y.shape
        table = self.param("pos_embed", self.positions, (1, most**2, cfg.width), self.param_dtype)
        top, left = (most - height) // 2, (most - width) // 2
        middle = table.reshape(most, most, -1)[top : top + height, left : left + width]
        return (y + middle.astype(y.dtype)).reshape(n, height * width, -1)

    def positions(self, key: Any, shape: tuple[int, ...], dtype: Any) -> Array:
        """Sines and cosines of the column, then of the row, on a grid as long as the training pictures."""
        cfg = self.config
        most, quarter = cfg.pos_embed_max_size, cfg.width // 4
        length = max(cfg.sample_size // cfg.patch_size, 1)
        places = np.arange(most, dtype=np.float32) / np.float32(most / length)
        angles = np.outer(places, 1 / 10_000 ** (np.arange(quarter) / quarter))
        axis = jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), dtype)
        both = (jnp.broadcast_to(a, (most, most, 2 * quarter)) for a in (axis[None], axis[:, None]))
        return jnp.concatenate([*both], axis=-1).reshape(shape)


class SD3Block(Block):
    """One block over both streams; see the top of this module. ([n, l, c], [n, m, c]) -> the same."""

    config: SD3Config
    dual: bool = False
    last: bool = False

    @nn.compact
    def __call__(self, x, context, c):
        cfg = self.config
        heads = {"heads": cfg.num_attention_heads, "qk_eps": None if cfg.qk_norm is None else 1e-6}
        parts = self.modulation("norm1.linear", 9 if self.dual else 6, c)
        normed = self.part(PlainNorm, "norm1")(x)
        if self.last:
            looked_at, rest = self.part(AdaLNOut, "norm1_context")(context, c), []
        else:
            shift, scale, *rest = self.modulation("norm1_context.linear", 6, c)
            looked_at = modulate(self.part(PlainNorm, "norm1_context")(context), shift, scale)
        attention = self.part(JointAttention, "attn", context_out=not self.last, **heads)
        a, b = attention(modulate(normed, *parts[:2]), looked_at)
        x = x + parts[2][:, None] * a
        if self.dual:
            alone, _ = self.part(JointAttention, "attn2", **heads)(modulate(normed, *parts[6:8]))
            x = x + parts[8][:, None] * alone
        x = self.feed_forward("norm2", "ff", x, *parts[3:6])
        if self.last:
            return x, None
        gate, *rest = rest
        return x, self.feed_forward("norm2_context", "ff_context", context + gate[:, None] * b, *rest)

    def modulation(self, name: str, parts: int, c: Array) -> list[Array]:
        """Shifts, scales and gates [n, c] each, linear in silu(c); zero at first, and the block the identity."""
        how = {"dtype": self.compute_dtype, "param_dtype": self.param_dtype, "kernel_init": nn.initializers.zeros}
        return jnp.split(nn.Dense(parts * self.config.width, **how, name=name)(nn.silu(c)), parts, axis=-1)

    def feed_forward(self, norm: str, name: str, x: Array, shift: Array, scale: Array, gate: Array) -> Array:
        """x + gate · feedforward(modulated norm x)."""
        y = modulate(self.part(PlainNorm, norm)(x), shift, scale)
        return x + gate[:, None] * self.part(FeedForward, name, hidden=4 * x.shape[-1])(y)
