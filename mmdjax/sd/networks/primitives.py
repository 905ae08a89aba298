"""Attention and convolution, in the form that is fastest on each platform.

On a CPU attention takes one head and some rows of queries at a time, so that the logits stay in the cache (about ten
times faster on 2 cores, for 4096 positions and 8 heads of 40). A convolution of few positions is one product with a
matrix of patches, as XLA's convolution leaves most cores idle there. On other platforms both are XLA's.

References:
  Vaswani et al. 2017 (attention), Rabe & Staats 2021 (in blocks of queries).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

SCORES_IN_MEMORY = 2**28  # attention logits held at once: 1 GiB in float32
SCORES_IN_CACHE = 2**19  # of them on a CPU: 2 MiB
FEW_POSITIONS = 1024  # of a convolution's output, over the batch
HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)  # the logit of a masked key; finite, as in JAX's own attention


def attend(
    q: Float[Array, "n l h d"],
    k: Float[Array, "n m g d"],
    v: Float[Array, "n m g d"],
    *,
    mask: Bool[Array, "n m"] | None = None,
    causal: bool = False,
    bias: Float[Array, "b h l m"] | None = None,
    scale: float | None = None,
    upcast: bool = False,
    flash: bool = False,
    limit: int | None = None,
) -> Float[Array, "n l h d"]:
    """softmax(q kᵀ/√d) v, in blocks of queries where the logits would not fit.

    Args:
      mask: which keys of each sample count; None: all. A sample without any attends to all keys equally.
      causal: a query attends to keys up to its own place.
      bias: added to the logits.
      scale: of q kᵀ, in place of 1/√d.
      upcast: compute all in float32, as is done for float16 unless with `flash`; else only logits and softmax.
      flash: use cuDNN's fused attention if possible: half precision, d a multiple of 8 up to 128, none of the above but
        `causal`.
      limit: the most logits in memory at once, by default `SCORES_IN_MEMORY` or, on a CPU, `SCORES_IN_CACHE`.

    With `causal`, `bias` or `scale` all logits are in memory at once, and there may be fewer heads g of keys than h of
    queries: each serves h/g neighbours.
    """
    dim = q.shape[-1]
    plain = bias is None and scale is None
    if upcast:
        q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    if flash and plain and mask is None and half and dim <= 128 and dim % 8 == 0:
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
    if q.dtype == jnp.float16:  # JAX's float16 product with float32 sums exists on GPUs only
        q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
    if causal or not plain:
        return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=_of_keys(mask), is_causal=causal, scale=scale)

    def form(f, limit):
        return lambda q, k, v, mask: f(q, k, v, limit, mask)

    return jax.lax.platform_dependent(
        q,
        k,
        v,
        mask,
        cpu=form(_by_head, limit or SCORES_IN_CACHE),
        default=form(_all_heads, limit or SCORES_IN_MEMORY),
    )


def _of_keys(mask):
    # [n, m] as JAX's attention takes it, [n, heads, queries, m]
    return None if mask is None else mask[:, None, None]


def _all_heads(q, k, v, limit, mask=None):
    n, _, heads, _ = q.shape

    def block(q):  # [rows, n, h, d]
        return jnp.moveaxis(jax.nn.dot_product_attention(jnp.moveaxis(q, 0, 1), k, v, mask=_of_keys(mask)), 1, 0)

    return jnp.moveaxis(_in_blocks(block, jnp.moveaxis(q, 1, 0), limit // (n * heads * k.shape[1])), 0, 1)


def _by_head(q, k, v, limit, mask=None):
    n, length, heads, dim = q.shape

    def one(head):
        q, k, v, seen = head  # [l, d], [m, d], [m]

        def block(q):
            scores = jnp.dot(q * dim**-0.5, k.T)
            if seen is not None:
                scores = jnp.where(seen, scores, HIDDEN)
            exponentials = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
            return jnp.dot(exponentials, v) / exponentials.sum(-1, keepdims=True)

        return _in_blocks(block, q, limit // k.shape[0])

    apart = [jnp.moveaxis(a.astype(jnp.float32), 2, 1).reshape(n * heads, -1, dim) for a in (q, k, v)]
    seen = None if mask is None else jnp.repeat(mask, heads, axis=0)
    return jnp.moveaxis(jax.lax.map(one, (*apart, seen)).reshape(n, heads, length, dim), 1, 2).astype(q.dtype)


def _in_blocks(f: Callable[[Array], Array], q: Array, rows: int) -> Array:
    # f over blocks of at most so many rows; the checkpoint keeps reverse mode from holding every block's softmax
    length = q.shape[0]
    if rows >= length:
        return f(q)
    blocks = -(-length // max(rows, 1))
    rows = -(-length // blocks)  # even blocks: less padding
    padded = jnp.pad(q, ((0, blocks * rows - length),) + ((0, 0),) * (q.ndim - 1))
    y = jax.lax.map(jax.checkpoint(f), padded.reshape(blocks, rows, *q.shape[1:]))
    return y.reshape(blocks * rows, *y.shape[2:])[:length]


def convolve(
    x: Float[Array, "n h w c"],
    kernel: Float[Array, "k l c o"],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **how: Any,
) -> Float[Array, "n h2 w2 o"]:
    """`jax.lax.conv_general_dilated` of NHWC images without dilation or groups, for `nn.Conv`."""
    size = kernel.shape[:2]
    if size == (1, 1) and tuple(strides) == (1, 1) and not any(map(any, padding)):
        return jnp.dot(x, kernel[0, 0])

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **how)

    def patches(x, kernel):
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        shifted = [
            x[:, i : i + strides[0] * (height - 1) + 1 : strides[0], j : j + strides[1] * (width - 1) + 1 : strides[1]]
            for i in range(size[0])
            for j in range(size[1])
        ]
        return jnp.dot(jnp.concatenate(shifted, axis=-1), kernel.reshape(-1, kernel.shape[-1]))

    height, width = ((x.shape[1 + axis] + sum(padding[axis]) - size[axis]) // strides[axis] + 1 for axis in range(2))
    if math.prod((x.shape[0], height, width)) >= FEW_POSITIONS:
        return plain(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=patches, default=plain)
