"""The blocks of diffusion transformers: patches, positions, and attention modulated by adaptive layer norm.

References:
  Dosovitskiy et al. 2021 (patches), Peebles & Xie 2023 (DiT: adaLN-Zero), Su et al. 2024 (rotary positions), Esser et
  al. 2024 (joint attention), Shazeer 2020 (swiglu).
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mmdjax.sd.networks.layers import Block
from mmdjax.sd.networks.primitives import attend

Rotary = tuple[Any, Any]  # cosines and sines, [l, d/2] each


def patchify(x: Float[Array, "n h w c"], size: int) -> Float[Array, "n l d"]:
    """Patches of size × size pixels, row by row; d runs over the patch's rows, its columns, channels.

    Raises:
      ValueError: the picture is no whole number of patches high or wide.

    Example:
      >>> patchify(jnp.arange(16.0).reshape(1, 4, 4, 1), 2)[0, 1].tolist()
      [2.0, 3.0, 6.0, 7.0]
    """
    n, h, w, c = x.shape
    check_patches(h, w, size)
    x = x.reshape(n, h // size, size, w // size, size, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, (h // size) * (w // size), size * size * c)


def unpatchify(x: Float[Array, "n l d"], size: int, height: int, width: int) -> Float[Array, "n h w c"]:
    """The inverse of `patchify`, for pictures of height × width."""
    n = x.shape[0]
    x = x.reshape(n, height // size, width // size, size, size, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, height, width, -1)


def check_patches(height: int, width: int, size: int) -> None:
    """Raise ValueError for a picture that is no whole number of patches high or wide."""
    if height % size or width % size:
        raise ValueError(f"the picture is {height} × {width}; give a multiple of the patch, {size}")


def sincos_positions(
    height: int, width: int, dim: int, *, base: int | None = None, scale: int | float = 1
) -> Float[Array, "l dim"]:
    """Fixed positions of a grid, row by row: sin and cos of the column, then of the row.  Peebles & Xie 2023.

    Args:
      base: place i of an axis of length n counts as i · base/n, so that any grid spans the trained one; None: as i.
      scale: the places are divided by it.  Chen et al. 2024 (PixArt-Σ), section 3.
    Raises:
      ValueError: dim is not a multiple of four.

    Example:
      >>> sincos_positions(2, 3, 8).shape
      (6, 8)
    """
    if dim % 4:
        raise ValueError(f"dim is {dim}; give a multiple of 4")
    frequencies = 1 / 10_000 ** (np.arange(dim // 4) / (dim // 4))

    def axis(length):
        angles = np.arange(length)[:, None] * (1 if base is None else base / length) / scale * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)

    # the two axes are constants of the program, the grid is made in it: at 128 × 128 it has 75 MB
    columns = jnp.broadcast_to(axis(width)[None], (height, width, dim // 2))
    rows = jnp.broadcast_to(axis(height)[:, None], (height, width, dim // 2))
    return jnp.concatenate([columns, rows], axis=-1).reshape(height * width, dim)


def modulate(x: Float[Array, "n l c"], shift: Float[Array, "n c"], scale: Float[Array, "n c"]) -> Float[Array, "n l c"]:
    """x (1 + scale) + shift, the same for all tokens of a sample."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Transformer(Block):
    """Base of the networks: with `remat` each of its blocks is recomputed in the backward pass."""

    config: Any

    def part(self, cls, name, *args, **kwargs):
        """A submodule with this one's dtypes and settings."""
        return super().part(nn.remat(cls) if self.remat else cls, name, *args, **kwargs)

    def patches(self, name: str, x: Float[Array, "n h w c"], size: int, features: int) -> Float[Array, "n l d"]:
        """A linear map of each patch of size × size, row by row; its kernel is a convolution's."""
        check_patches(x.shape[1], x.shape[2], size)
        h = self.conv(name, features, size, size, [(0, 0)] * 2)(x.astype(self.dtype))
        return h.reshape(x.shape[0], -1, features)

    def two_layers(self, name: str, x: Float[Array, "*n d"], features: int, act: Any = nn.silu) -> Float[Array, "*n e"]:
        """W₂ act(W₁ x), as conditions are embedded."""
        return self.dense(f"{name}.linear_2", features)(act(self.dense(f"{name}.linear_1", features)(x)))


class PlainNorm(Block):
    """Layer norm without parameters of its own; the statistics in float32 at least."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x):
        norm = nn.LayerNorm(
            epsilon=self.eps, use_bias=False, use_scale=False, use_fast_variance=False, dtype=self.compute_dtype
        )
        return norm(x)


class Attention(Block):
    """Attention to itself, or to a context [n, m, d] with a mask [n, m], with its four projections: [n, l, c]."""

    heads: int
    bias: bool = True
    upcast: bool = False

    @nn.compact
    def __call__(self, x, context=None, mask=None):
        context = x if context is None else context
        return self.attention(x, context, self.heads, bias=self.bias, upcast=self.upcast, mask=mask)


class FeedForward(Block):
    """W₂ gelu(W₁ x), gelu by its tanh approximation: [n, l, c] -> [n, l, c]."""

    hidden: int

    @nn.compact
    def __call__(self, x):
        hidden = nn.gelu(self.dense("net.0.proj", self.hidden)(x), approximate=True)
        return self.dense("net.2", x.shape[-1])(hidden)


class AdaLNZeroBlock(Block):
    """x ← x + g₁ attention(modulated norm x), x ← x + g₂ feedforward(modulated norm x).  Peebles & Xie 2023, fig. 3.

    Shifts, scales and gates g are linear in silu(c). With `zero`, that map starts at zero, and the block as identity.
    The second norm's epsilon is `eps`; `bias` is of queries, keys and values.
    """

    heads: int
    mlp_ratio: float = 4.0
    zero: bool = True
    eps: float = 1e-6
    bias: bool = True
    upcast: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "n l c"], c: Float[Array, "n e"]) -> Float[Array, "n l c"]:
        channels = x.shape[-1]
        six = self.dense("norm1.linear", 6 * channels, zero=self.zero)(nn.silu(c))
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = jnp.split(six, 6, axis=-1)
        y = modulate(self.part(PlainNorm, "norm1")(x), shift, scale)
        attention = self.part(Attention, "attn1", heads=self.heads, bias=self.bias, upcast=self.upcast)
        x = x + gate[:, None] * attention(y)
        y = modulate(self.part(PlainNorm, "norm3", eps=self.eps)(x), shift_mlp, scale_mlp)
        return x + gate_mlp[:, None] * self.part(FeedForward, "ff", hidden=int(self.mlp_ratio * channels))(y)


class Embedder(Block):
    """W₂ silu(W₁ x), of times or pooled prompts: [n, d] -> [n, features]."""

    features: int

    @nn.compact
    def __call__(self, x):
        h = self.dense("linear_1", self.features)(x.astype(self.compute_dtype))
        return self.dense("linear_2", self.features)(nn.silu(h))


class AdaLNOut(Block):
    """The last layers of a transformer: modulated norm x, with scale and shift linear in silu(c), in this order."""

    @nn.compact
    def __call__(self, x: Float[Array, "n l c"], c: Float[Array, "n e"]) -> Float[Array, "n l c"]:
        scale, shift = jnp.split(self.dense("linear", 2 * x.shape[-1])(nn.silu(c)), 2, axis=-1)
        return modulate(self.part(PlainNorm, "norm")(x), shift, scale)


def swiglu(x: Float[Array, "... d"]) -> Float[Array, "... d2"]:
    """silu(a) b of the halves a, b of the last axis.  Shazeer 2020."""
    gate, value = jnp.split(x, 2, axis=-1)
    return nn.silu(gate) * value


def rotary_tables(places: Float[np.ndarray, "l axes"], dims: Sequence[int], theta: float) -> Rotary:
    """Cosines and sines of the angles by which `rotate` turns each pair of channels, float32.  Su et al. 2024.

    Axis a of the places owns the next dims[a] channels; its pair i turns by place · theta^(−2 i / dims[a]).

    Raises:
      ValueError: there are not as many axes as dims, or one of these is odd.

    Example:
      >>> cos, sin = rotary_tables(np.array([[0.0, 0.0], [0.0, 1.0]]), (2, 4), 10_000)
      >>> sin.round(2).tolist()
      [[0.0, 0.0, 0.0], [0.0, 0.8399999737739563, 0.009999999776482582]]
    """
    if places.shape[1] != len(dims) or any(dim % 2 for dim in dims):
        raise ValueError(
            f"places have {places.shape[1]} axes and dims are {tuple(dims)}; give an even one for each axis"
        )
    angles = [
        places[:, axis : axis + 1] * float(theta) ** (-np.arange(0, dim, 2) / dim) for axis, dim in enumerate(dims)
    ]
    both = np.concatenate(angles, axis=1)
    return np.cos(both).astype(np.float32), np.sin(both).astype(np.float32)


def rotate(x: Float[Array, "n l h d"], rotary: Rotary) -> Float[Array, "n l h d"]:
    """Each pair of neighbouring channels turned by the angle of its token: a rotary position; in float32 at least."""
    cos, sin = (jnp.asarray(table)[:, None] for table in rotary)
    pairs = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape).astype(x.dtype)


class JointAttention(Block):
    """One attention over two streams of tokens, each with its own projections: ([n, l, c], [n, m, d]) -> the same.

    Without a context it is self-attention, and the context's output is None. So it is with `context_out` false, where
    the context is only looked at.  Esser et al. 2024, fig. 2.

    Args:
      qk_eps: with it each head's queries and keys have an RMS norm, of this eps.
      bias: whether the projections have one.
    """

    heads: int
    qk_eps: float | None = None
    bias: bool = True
    context_out: bool = True

    @nn.compact
    def __call__(self, x, context=None, rotary: Rotary | None = None):
        """`rotary` tables are those of the context's tokens, then of x's."""
        n, length, channels = x.shape
        q, k, v = self.projected(x, channels, ("to_q", "to_k", "to_v"), "norm_")
        if context is not None:
            first = self.projected(context, channels, ("add_q_proj", "add_k_proj", "add_v_proj"), "norm_added_")
            q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(first, (q, k, v), strict=True))
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        y = attend(q, k, v, flash=self.flash).astype(self.compute_dtype).reshape(n, -1, channels)
        out = self.dense("to_out.0", channels, self.bias)(y[:, -length:])
        if context is None or not self.context_out:
            return out, None
        return out, self.dense("to_add_out", context.shape[-1], self.bias)(y[:, :-length])

    def projected(self, x, channels: int, names: Sequence[str], norm: str) -> tuple[Array, Array, Array]:
        """Queries, keys and values of one stream by head, [n, l, h, d]."""
        q, k, v = (split_heads(self.dense(name, channels, self.bias)(x), self.heads) for name in names)
        if self.qk_eps is None:
            return q, k, v
        return self.rms_norm(f"{norm}q", self.qk_eps)(q), self.rms_norm(f"{norm}k", self.qk_eps)(k), v


def split_heads(x: Float[Array, "n l c"], heads: int) -> Float[Array, "n l h d"]:
    """The channels by head."""
    return x.reshape(*x.shape[:-1], heads, -1)
