"""The blocks of diffusion transformers: patches, positions, and attention modulated by adaptive layer norm.

References:
  Dosovitskiy et al. 2021 (patches), Peebles & Xie 2023 (DiT: adaLN-Zero), Esser et al. 2024 (joint attention).
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mmdjax.sd.layers import Block
from mmdjax.sd.primitives import attend


def patchify(x: Float[Array, "n h w c"], size: int) -> Float[Array, "n l d"]:
    """Patches of size × size pixels, row by row; d runs over the patch's rows, its columns, channels.

    Raises:
      ValueError: the picture is no whole number of patches high or wide.

    Example:
      >>> patchify(jnp.arange(16.0).reshape(1, 4, 4, 1), 2)[0, 1].tolist()
      [2.0, 3.0, 6.0, 7.0]
    """
    n, h, w, c = x.shape
    if h % size or w % size:
        raise ValueError(f"the picture is {h} × {w}; give a multiple of the patch, {size}")
    x = x.reshape(n, h // size, size, w // size, size, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, (h // size) * (w // size), size * size * c)


def unpatchify(x: Float[Array, "n l d"], size: int, height: int, width: int) -> Float[Array, "n h w c"]:
    """The inverse of `patchify`, for pictures of height × width."""
    n = x.shape[0]
    x = x.reshape(n, height // size, width // size, size, size, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, height, width, -1)


def sincos_positions(height: int, width: int, dim: int) -> Float[np.ndarray, "l dim"]:
    """Fixed positions of a grid, row by row: sin and cos of the column, then of the row.  Peebles & Xie 2023.

    Raises:
      ValueError: dim is not a multiple of four.

    Example:
      >>> sincos_positions(2, 3, 8).shape
      (6, 8)
    """
    if dim % 4:
        raise ValueError(f"dim is {dim}; give a multiple of 4")
    frequencies = 1 / 10_000 ** (np.arange(dim // 4) / (dim // 4))

    def axis(places):
        angles = places.reshape(-1, 1) * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    rows, columns = np.meshgrid(np.arange(height, dtype=float), np.arange(width, dtype=float), indexing="ij")
    return np.concatenate([axis(columns), axis(rows)], axis=1).astype(np.float32)


def modulate(x: Float[Array, "n l c"], shift: Float[Array, "n c"], scale: Float[Array, "n c"]) -> Float[Array, "n l c"]:
    """x (1 + scale) + shift, the same for all tokens of a sample."""
    return x * (1 + scale[:, None]) + shift[:, None]


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
    """Self-attention with its four projections, [n, l, c] -> [n, l, c]."""

    heads: int

    @nn.compact
    def __call__(self, x):
        return self.attention(x, x, self.heads, bias=True)


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
    """

    heads: int
    mlp_ratio: float = 4.0
    zero: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "n l c"], c: Float[Array, "n e"]) -> Float[Array, "n l c"]:
        channels = x.shape[-1]
        six = self.modulation("norm1.linear", 6 * channels)(nn.silu(c))
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = jnp.split(six, 6, axis=-1)
        y = modulate(self.part(PlainNorm, "norm1")(x), shift, scale)
        x = x + gate[:, None] * self.part(Attention, "attn1", heads=self.heads)(y)
        y = modulate(self.part(PlainNorm, "norm3")(x), shift_mlp, scale_mlp)
        return x + gate_mlp[:, None] * self.part(FeedForward, "ff", hidden=int(self.mlp_ratio * channels))(y)

    def modulation(self, name: str, features: int) -> nn.Dense:
        """The linear map from the condition to shifts, scales and gates."""
        init = nn.initializers.zeros if self.zero else nn.linear.default_kernel_init
        return nn.Dense(features, kernel_init=init, dtype=self.compute_dtype, param_dtype=self.param_dtype, name=name)


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


class JointAttention(Block):
    """One attention over two streams of tokens, each with its own projections: ([n, l, c], [n, m, d]) -> the same.

    Without a context it is self-attention, and the context's output is None. So it is with `context_out` false, where
    the context is only looked at. With `qk_norm` each head's queries and keys have a mean square of 1 before a learned
    scale.  Esser et al. 2024, fig. 2.
    """

    heads: int
    qk_norm: bool = False
    context_out: bool = True
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x, context=None):
        n, length, channels = x.shape

        def project(tokens, *names):
            q, k, v = (
                self.dense(name, channels)(tokens).reshape(n, -1, self.heads, channels // self.heads) for name in names
            )
            return q, k, v

        def normed(name, a):
            return self.rms_norm(name, self.eps)(a) if self.qk_norm else a

        q, k, v = project(x, "to_q", "to_k", "to_v")
        q, k = normed("norm_q", q), normed("norm_k", k)
        if context is not None:
            p, j, u = project(context, "add_q_proj", "add_k_proj", "add_v_proj")
            p, j = normed("norm_added_q", p), normed("norm_added_k", j)
            q, k, v = (jnp.concatenate(pair, axis=1) for pair in ((q, p), (k, j), (v, u)))
        y = attend(q, k, v, flash=self.flash).astype(self.compute_dtype).reshape(n, -1, channels)
        out = self.dense("to_out.0", channels)(y[:, :length])
        if context is None or not self.context_out:
            return out, None
        return out, self.dense("to_add_out", context.shape[-1])(y[:, length:])
