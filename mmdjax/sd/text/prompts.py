"""Kernels that compare prompts, by their conditions.

A condition is {"context": [n, l, d], "pooled": [n, p], …}: the token states that the network attends to, and one vector
for each prompt; `mmdjax.sd.families` says what they are in each family.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mmdjax._core.numerics import reciprocal, safe_sqrt
from mmdjax._points.distances import pairwise_median
from mmdjax._points.mesh import distances_of
from mmdjax._points.particles import Particles, flat
from mmdjax.kernels import IMQ, RBF, Kernel, Mapped, Product, as_kernel
from mmdjax.tree import pytree

LEVELS = ("pooled", "tokens")
SAME = 0.02  # distance of two unit vectors: one prompt, rounded differently


def rows(cond: Any, index: Any) -> Any:
    """Rows of a condition: `rows(cond, 0)` is that of one sample, `rows(cond, [0, 0, 1])` has one twice."""
    index = np.asarray(index)
    return jax.tree.map(lambda leaf: leaf[index], cond)


def pooled(cond: Mapping[str, Array]) -> Float[Array, "n p"]:
    """One unit vector for each prompt, for `Mapped`: its "pooled" state, or its `mean_token` if it has none."""
    return _unit(cond["pooled"]) if "pooled" in cond else mean_token(cond)


def mean_token(cond: Mapping[str, Array]) -> Float[Array, "n d"]:
    """The direction of the mean of a prompt's tokens, for text encoders that make no pooled state: unit vectors.

    Each token counts with its direction alone, as language models give the first token a state hundreds of times as
    long as others', the same for all prompts. Padding, by "mask", does not count.
    """
    return _unit(_directions(cond).sum(1))


def tokens(cond: Mapping[str, Array]) -> Float[Array, "n l d"]:
    """One unit vector for each token, for `Mapped`; their distance compares the tokens at the same places.

    Without a "mask" the first is left out: it is CLIP's start token, the same in all prompts. With one, padding is
    zero.
    """
    return _directions(cond) if "mask" in cond else _unit(cond["context"][:, 1:])


def _directions(cond: Mapping[str, Array]) -> Array:
    # a zero state has no direction, not even under a mask that lets it pass
    states = _unit(cond["context"])
    return jnp.where(cond["mask"][..., None], states, 0) if "mask" in cond else states


def _unit(x: Array) -> Array:
    x = x.astype(jnp.float32)
    return x * reciprocal(safe_sqrt((x**2).sum(-1, keepdims=True)))


@pytree
class Apart:
    """factor × the median distance between different prompts of the references; .1 if there is only one prompt.

    Embeddings of prompts lie close together (CLIP's have cosines of .6 to .9), so their kernel needs its own bandwidth.
    At a third of the median distance, prompts hardly pull each other (exp(−9/2) = .01).
    """

    factor: Any = 1 / 3

    def __call__(self, refs: Particles) -> Array:
        if refs.n < 2:
            return jnp.full((), 0.1)
        median = pairwise_median(flat(refs.x), refs.probabilities(), distances_of(refs), above=SAME)
        return jnp.where(median > 0, self.factor * median, 0.1)


def prompt_kernel(x: Any = None, *, level: str = "pooled", cond: Any = None) -> Product:
    """k_x(x, x') k_c(c, c') for latents and prompts: a sample is pulled by references with a similar prompt.

    Equal arguments give equal kernels, which compile nothing anew.

    Args:
      x: kernel on the latents; None: `IMQ(None)`, the default of `MMDGuidance`.
      level: "pooled" compares one vector for each prompt; "tokens" compares token by token, so that only prompts with
        the same words in the same order are alike.
      cond: kernel on those unit vectors; None: `RBF(Apart())`.
    Raises:
      ValueError: another level.

    Example:
      >>> prompt_kernel() == prompt_kernel(level="pooled")
      True
    """
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}; choose one of {LEVELS}")
    features = pooled if level == "pooled" else tokens
    inner: Kernel = RBF(Apart()) if cond is None else as_kernel(cond)
    return Product(x=IMQ(None) if x is None else x, cond=Mapped(features, inner))
