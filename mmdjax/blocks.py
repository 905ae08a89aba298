"""Passes over all pairs of rows, a block of rows against a block of rows, so that no n × m matrix is ever in memory.

A set no larger than one block is one plain computation. Sums over pairs can be differentiated: the blocks are computed
again on the way back, and the memory is that of one block.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mmdjax.particles import Particles

BLOCK = 2048  # rows: two blocks of 2,048 float32 features and what is made of them take some 100 MB


class Rows(NamedTuple):
    """A block of consecutive rows. All blocks of a set have one size, so the last may repeat rows of the one before.

    Args:
      index: which rows these are.
      fresh: False for the repeated ones.
    """

    index: Int[Array, " size"]
    fresh: Bool[Array, " size"]

    def of(self, tree: Any) -> Any:
        """These rows of a pytree of arrays [n, ...]."""
        size = self.index.shape[0]
        return jax.tree.map(
            lambda v: v if v.shape[0] == size else jax.lax.dynamic_slice_in_dim(v, self.index[0], size), tree
        )

    def weights(self, v: Array) -> Array:
        """`of` an array, with 0 for the repeated rows."""
        return jnp.where(self.fresh.reshape((-1,) + (1,) * (v.ndim - 1)), self.of(v), jnp.zeros((), v.dtype))

    def put(self, v: Array, values: Array) -> Array:
        """v with these rows replaced."""
        return jax.lax.dynamic_update_slice_in_dim(v, values, self.index[0], 0)


def rows(n: int, i: Any) -> Rows:
    """Block i of n rows."""
    count = num_blocks(n)
    size = -(-n // count)
    index = jnp.minimum(i * size, n - size) + jnp.arange(size)
    return Rows(index, index >= i * size)


def num_blocks(n: int) -> int:
    """How many blocks n rows make."""
    return -(-n // BLOCK)


def fold(step: Callable, carry: Any, n: int, m: int, pairs: Any) -> Any:
    """carry = step(carry, rows of n, columns of m) for each pair (i, j) of block numbers in turn."""

    def body(carry, pair):
        return step(carry, rows(n, pair[0]), rows(m, pair[1])), None

    if len(pairs) == 1:
        return body(carry, pairs[0])[0]
    return jax.lax.scan(jax.checkpoint(body), carry, jnp.asarray(pairs))[0]


def all_pairs(n: int, m: int) -> np.ndarray:
    """Every block of n rows with every block of m."""
    return np.indices((num_blocks(n), num_blocks(m))).reshape(2, -1).T


def own_pairs(n: int) -> np.ndarray:
    """Each block of n rows with itself."""
    return np.repeat(np.arange(num_blocks(n))[:, None], 2, axis=1)


def upper_pairs(n: int) -> np.ndarray:
    """Each two different blocks of n rows, once."""
    return np.stack(np.triu_indices(num_blocks(n), k=1), axis=1)


def sum_across(gram: Callable, term: Callable, p: Particles, q: Particles, u: Array, v: Array) -> Any:
    """Σ term(K, u', v') over the blocks K of gram(p, q), u' and v' the weights ([n, ...]) of its rows."""

    def one(rows, columns):
        return term(gram(rows.of(p), columns.of(q)), rows.weights(u), columns.weights(v))

    return _sum(one, p.n, q.n, all_pairs(p.n, q.n))


def sum_within(gram: Callable, term: Callable, p: Particles, u: Array, *, self_pairs: bool) -> Any:
    """`sum_across` for p with itself, the two halves of the symmetric Gram computed once; its diagonal on demand."""

    def own(rows, _):
        part, w = rows.of(p), rows.weights(u)
        k = gram(part, part, same=True)
        return term(k if self_pairs else jnp.where(jnp.eye(part.n, dtype=bool), 0.0, k), w, w)

    def two(rows, columns):
        k, left, right = gram(rows.of(p), columns.of(p)), rows.weights(u), columns.weights(u)
        return jax.tree.map(jnp.add, term(k, left, right), term(k.T, right, left))

    total = _sum(own, p.n, p.n, own_pairs(p.n))
    if num_blocks(p.n) == 1:
        return total
    return jax.tree.map(jnp.add, total, _sum(two, p.n, p.n, upper_pairs(p.n)))


def _sum(term: Callable, n: int, m: int, pairs: np.ndarray) -> Any:
    if len(pairs) == 1:
        return term(rows(n, pairs[0][0]), rows(m, pairs[0][1]))
    shapes = jax.eval_shape(lambda: term(rows(n, 0), rows(m, 0)))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return fold(lambda total, *blocks: jax.tree.map(jnp.add, total, term(*blocks)), zero, n, m, pairs)


def triangle(rows_of: Callable, n: int, d: int) -> Float[Array, "k d"]:
    """R with RᵀR = AᵀA for a matrix A [n, d] given in blocks, k = min(n, d): the triangle of A's QR factorisation.

    The singular values of A without squaring it, which would lose half of the digits. Where A has more rows than
    columns but not full rank, R is right and its derivative is not defined.

    Args:
      rows_of: index [size] -> those rows of A. By x[index]: of a slice, XLA would first copy all of x, transposed.
    """
    if n <= d:
        return rows_of(jnp.arange(n))
    count = max(1, n // max(BLOCK, 4 * d))  # tall blocks: each is factorised together with the triangle before it
    size = -(-n // count)

    def add(r, i):
        index = jnp.minimum(i * size, n - size) + jnp.arange(size)
        more = jnp.where((index >= i * size)[:, None], rows_of(index), 0)
        return jnp.linalg.qr(jnp.concatenate([r, more]), mode="r"), None

    first = jnp.linalg.qr(rows_of(jnp.arange(size)), mode="r")
    return first if count == 1 else jax.lax.scan(add, first, jnp.arange(1, count))[0]
