"""Kernels of the inner product: Polynomial, Linear, Cosine.

References:
  Bińkowski et al. 2018 (the cubic kernel of KID).
"""

from typing import Any

from mmdjax._core.numerics import product, reciprocal, safe_sqrt
from mmdjax._points.particles import flat
from mmdjax.kernels.contract import Kernel
from mmdjax.tree import pytree, static


@pytree
class Polynomial(Kernel):
    """(xᵀy/D + offset)^degree on flattened samples, D their size. Degree 3 and offset 1 are those of KID and the paper.

    Example:
      >>> import jax.numpy as jnp
      >>> from mmdjax import Particles
      >>> Polynomial()(Particles(jnp.ones((1, 4))), Particles(jnp.ones((1, 4)))).tolist()
      [[8.0]]
    """

    degree: int = static(default=3)
    offset: Any = 1.0

    def __post_init__(self):
        if not isinstance(self.degree, int) or self.degree < 1:
            raise ValueError(f"degree is {self.degree}; give an integer of at least 1")

    def gram(self, a, b, *, same=False):
        x, y = flat(a.x), flat(b.x)
        return (product(x, y.T) / x.shape[1] + self.offset) ** self.degree

    def length2(self, a):
        return float(flat(a.x).shape[1])


@pytree
class Linear(Kernel):
    """xᵀy/D on flattened samples, D their size: MMD² compares only means; it is their squared distance over D."""

    def gram(self, a, b, *, same=False):
        x, y = flat(a.x), flat(b.x)
        return product(x, y.T) / x.shape[1]

    def length2(self, a):
        return float(flat(a.x).shape[1])


@pytree
class Cosine(Kernel):
    """xᵀy / (|x||y|) on flattened samples; 0 if x or y is zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from mmdjax import Particles
      >>> Cosine()(Particles(jnp.array([[1.0, 0.0]])), Particles(jnp.array([[1.0, 1.0]]))).tolist()
      [[0.707...]]
    """

    def gram(self, a, b, *, same=False):
        x, y = (v * reciprocal(safe_sqrt((v**2).sum(1, keepdims=True))) for v in (flat(a.x), flat(b.x)))
        return product(x, y.T)

    def length2(self, a):
        return (flat(a.x) ** 2).sum(1)
