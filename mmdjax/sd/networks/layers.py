"""The layers that Stable Diffusion's networks share, NHWC.

Every module has a `dtype` that it computes in and a `param_dtype` that its parameters are initialised in; statistics of
norms, attention logits and softmax are float32 at least. Modules are named by the paths of the PyTorch checkpoints
("down_blocks.0.resnets.1.conv1"), so that joining a parameter's path with dots gives its key there, up to the leaf's
name.

References:
  He et al. 2016 (residual blocks), Wu & He 2018 (group norm), Vaswani et al. 2017 (attention, sinusoidal embeddings),
  Ho et al. 2020 (the U-Net's embedding of time).
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from mmdjax.sd.networks.primitives import attend, convolve


class Block(nn.Module, kw_only=True):
    """Base of the modules: how they compute, and the layers under the names of the checkpoint.

    Args:
      dtype: of the computation.
      param_dtype: of the parameters that `init` makes.
      flash: use cuDNN's fused attention if possible (a GPU, half precision, heads of at most 128, no upcast, no mask).
      remat: in a U-Net or a transformer, keep only the inputs of each block for the backward pass, and compute the rest
        again.
    """

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    flash: bool = False
    remat: bool = False

    def inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Of a whole network: arguments to trace `init` with. The parameters do not depend on sizes of the input."""
        raise NotImplementedError

    def checkpoint_key(self, key: str) -> str | None:
        """Of a whole network: its name of a tensor that other checkpoints spell otherwise; None: it does not use it."""
        return key

    @property
    def compute_dtype(self) -> Any:
        """The dtype of the computation: `dtype`, unless a config asks for another."""
        return self.dtype

    @property
    def wide_dtype(self) -> Any:
        """The same with the range of float32: for values that outgrow float16."""
        return jnp.float32 if self.compute_dtype == jnp.float16 else self.compute_dtype

    def part(self, cls, name: str | None, *args, **kwargs) -> Any:
        """A submodule with this one's dtypes and settings."""
        how = {"dtype": self.compute_dtype, "param_dtype": self.param_dtype, "flash": self.flash}
        return cls(*args, **how | kwargs, name=name)

    def conv(self, name: str | None, features: int, size: int = 3, stride: int = 1, padding: Any = None) -> nn.Conv:
        """A convolution, by default one that keeps the resolution."""
        pad = [(size // 2, size // 2)] * 2 if padding is None else padding
        return nn.Conv(
            features,
            (size, size),
            (stride, stride),
            pad,
            dtype=self.compute_dtype,
            param_dtype=self.param_dtype,
            conv_general_dilated=convolve,
            name=name,
        )

    def dense(self, name: str, features: int, bias: bool = True, *, zero: bool = False) -> nn.Dense:
        """A linear map; with `zero` it starts at zero."""
        init = nn.initializers.zeros if zero else nn.linear.default_kernel_init
        how = {"dtype": self.compute_dtype, "param_dtype": self.param_dtype, "kernel_init": init}
        return nn.Dense(features, use_bias=bias, **how, name=name)

    def wide_dense(self, name: str, features: int) -> nn.Dense:
        """A linear map without bias, computed in `wide_dtype`."""
        return nn.Dense(features, use_bias=False, dtype=self.wide_dtype, param_dtype=self.param_dtype, name=name)

    def embed(self, name: str, num: int, features: int) -> nn.Embed:
        """A table of embeddings."""
        return nn.Embed(num, features, dtype=self.compute_dtype, param_dtype=self.param_dtype, name=name)

    def group_norm(self, name: str, groups: int, eps: float) -> nn.GroupNorm:
        """Group norm; E[x²] − E[x]² would cancel where the mean is large, so the variance is exact."""
        how = {"dtype": self.compute_dtype, "param_dtype": self.param_dtype, "use_fast_variance": False}
        return nn.GroupNorm(groups, epsilon=eps, **how, name=name)

    def layer_norm(self, name: str, eps: float = 1e-5) -> nn.LayerNorm:
        """Layer norm with the exact variance."""
        how = {"dtype": self.compute_dtype, "param_dtype": self.param_dtype, "use_fast_variance": False}
        return nn.LayerNorm(epsilon=eps, **how, name=name)

    def rms_norm(self, name: str, eps: float = 1e-6) -> nn.RMSNorm:
        """x over the root of its mean square, times a scale; along the last axis.  Zhang & Sennrich 2019."""
        return nn.RMSNorm(epsilon=eps, dtype=self.compute_dtype, param_dtype=self.param_dtype, name=name)

    def attention(self, x, context, heads: int, *, bias: bool = False, upcast: bool = False, mask: Any = None):
        """softmax(q kᵀ/√d) v with its four projections: x [n, l, c], context [n, m, d], mask [n, m] -> [n, l, c]."""
        n, length, channels = x.shape
        q = self.dense("to_q", channels, bias)(x).reshape(n, length, heads, -1)
        k = self.dense("to_k", channels, bias)(context).reshape(n, context.shape[1], heads, -1)
        v = self.dense("to_v", channels, bias)(context).reshape(n, context.shape[1], heads, -1)
        y = attend(q, k, v, mask=mask, upcast=upcast, flash=self.flash).astype(self.compute_dtype)
        return self.dense("to_out.0", channels)(y.reshape(n, length, channels))


class ResnetBlock(Block):
    """x + conv(silu(norm(conv(silu(norm x)) + W silu(emb)))): [n, h, w, c] -> [n, h, w, features]."""

    features: int
    groups: int = 32
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x, emb=None):
        h = self.conv("conv1", self.features)(nn.silu(self.group_norm("norm1", self.groups, self.eps)(x)))
        if emb is not None:
            h = h + self.dense("time_emb_proj", self.features)(nn.silu(emb))[:, None, None]
        h = self.conv("conv2", self.features)(nn.silu(self.group_norm("norm2", self.groups, self.eps)(h)))
        if x.shape[-1] != self.features:
            x = self.conv("conv_shortcut", self.features, 1)(x)
        return x + h


class SpatialAttention(Block):
    """Self-attention over positions with its own norm and residual: [n, h, w, c] -> [n, h, w, c]."""

    heads: int
    groups: int = 32
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x):
        h = self.group_norm("group_norm", self.groups, self.eps)(x).reshape(x.shape[0], -1, x.shape[-1])
        return x + self.attention(h, h, self.heads, bias=True).reshape(x.shape)


def timestep_embedding(
    t: Shaped[Array, " n"], dim: int, *, flip: bool = True, shift: int | float = 0
) -> Float[Array, "n d"]:
    """[cos(t ω), sin(t ω)] with ω_i = 10000^{−i/(dim/2 − shift)}, in float32; without `flip` the sines come first.

    The convention of Ho et al. 2020 is shift 1, sines first; that of latent diffusion shift 0, cosines first.
    """
    half = dim // 2
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - shift))
    angles = t.astype(jnp.float32)[:, None] * frequencies
    waves = (jnp.cos(angles), jnp.sin(angles)) if flip else (jnp.sin(angles), jnp.cos(angles))
    return jnp.pad(jnp.concatenate(waves, axis=-1), ((0, 0), (0, dim % 2)))


def upsample(x: Float[Array, "n h w c"], size: tuple[int, ...]) -> Float[Array, "n h2 w2 c"]:
    """Nearest neighbour: row i of the result is row ⌊i h/h2⌋."""
    for axis, new in enumerate(size, start=1):
        old = x.shape[axis]
        x = jnp.repeat(x, 2, axis) if new == 2 * old else jnp.take(x, jnp.arange(new) * old // new, axis)
    return x


def pack(x: Float[Array, "n h w c"], size: int = 2) -> Float[Array, "n h2 w2 k"]:
    """Each size × size positions as one, of c size² channels; these run over c, then the rows, then the columns.

    Raises:
      ValueError: height or width is no multiple of the size.

    Example:
      >>> pack(jnp.arange(8.0).reshape(1, 2, 2, 2)).tolist()
      [[[[0.0, 2.0, 4.0, 6.0, 1.0, 3.0, 5.0, 7.0]]]]
    """
    n, h, w, c = x.shape
    if h % size or w % size:
        raise ValueError(f"the latents are {h} × {w}; give multiples of {size}, which are packed {size} × {size}")
    x = x.reshape(n, h // size, size, w // size, size, c)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(n, h // size, w // size, c * size**2)


def unpack(x: Float[Array, "n h w k"], size: int = 2) -> Float[Array, "n h2 w2 c"]:
    """The inverse of `pack`."""
    n, h, w, k = x.shape
    x = x.reshape(n, h, w, k // size**2, size, size)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(n, h * size, w * size, k // size**2)
