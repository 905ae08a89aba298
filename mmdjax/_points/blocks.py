"""Passes over all pairs of rows, a block against a block, so that sums over pairs never hold an n × m matrix.

A set no larger than one block is one plain computation. Sums over pairs can be differentiated: the blocks are computed
again on the way back, and the memory is that of one block.

The sizes below are read when called, so that a test may set small ones; what `jit` has compiled keeps its own.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mmdjax._points.particles import Particles, on_device
from mmdjax._points.streaming import HostReferences

BLOCK = 2048  # rows: two blocks of 2,048 float32 features and what is made of them take some 100 MB
PLAIN = 2**22  # numbers in a set of points and its pairs: up to here one plain computation, 16 MB in float32
CACHED = 5 * 2**20  # numbers in a block beside others on a CPU: 20 MB, long enough for products at full speed


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

        def some(v):
            if v.shape[0] == size:
                return v
            start = self.index[0]
            if v.dtype.itemsize < 4:  # or XLA would cast all of a bfloat16 array before the loop over its blocks
                v, start = jax.lax.optimization_barrier((v, start))
            return jax.lax.dynamic_slice_in_dim(v, start, size)

        return jax.tree.map(some, tree)

    def weights(self, v: Array) -> Array:
        """`of` an array, with 0 for the repeated rows."""
        return jnp.where(self.fresh.reshape((-1,) + (1,) * (v.ndim - 1)), self.of(v), jnp.zeros((), v.dtype))

    def put(self, v: Array, values: Array) -> Array:
        """v with these rows replaced."""
        return jax.lax.dynamic_update_slice_in_dim(v, values, self.index[0], 0)


def rows(n: int, i: Any, block: int | None = None) -> Rows:
    """Block i of n rows; `block` rows at most, None: `BLOCK`."""
    count = num_blocks(n, block)
    size = -(-n // count)
    index = jnp.minimum(i * size, n - size) + jnp.arange(size)
    return Rows(index, index >= i * size)


def num_blocks(n: int, block: int | None = None) -> int:
    """How many blocks n rows make."""
    return -(-n // (BLOCK if block is None else block))


def row_size(x: Any) -> int:
    """How many numbers a row of a pytree of arrays [n, ...] has."""
    leaves = [x] if isinstance(x, HostReferences) else jax.tree.leaves(x)
    return sum(math.prod(leaf.shape[1:]) for leaf in leaves)


def block_of(x: Any) -> int:
    """Rows of x to take at a time for its own pairs, or those with another set: at most `BLOCK`, and 16 MB of them."""
    return max(64, min(BLOCK, PLAIN // _copies(x) // max(1, row_size(x))))


def block_beside(n: int, y: Any) -> int:
    """Rows of y to take at a time beside n points: all where that is little, else what a processor's cache holds."""
    each, m = n + row_size(y), jax.tree.leaves(y)[0].shape[0]
    if each * m <= PLAIN // _copies(y):
        return m
    most = CACHED if jax.default_backend() == "cpu" else PLAIN  # elsewhere fewer, larger products are faster
    return min(m, max(32, most // _copies(y) // each))


def _copies(x: Any) -> int:
    return 3 if isinstance(x, HostReferences) else 1  # a block as it was read, about a centre, and what is made of it


def sum_over(term: Callable, m: int, block: int) -> Any:
    """Σ term(rows) over the blocks of m rows; every sum over rows in it must give `Rows.weights` their due."""
    return sum_and_least(lambda rows: (term(rows), ()), m, block)[0]


def sum_and_least(term: Callable, m: int, block: int) -> tuple[Any, Any]:
    """Over the blocks of m rows, the sum of one result of term(rows) and the elementwise least of another, in one pass.

    Args:
      term: rows -> (summed, least), two pytrees of arrays; as in `sum_over`.
    """
    count = num_blocks(m, block)
    if count == 1:
        return term(rows(m, 0, block))
    shapes = jax.eval_shape(lambda: term(rows(m, 0, block)))
    start = tuple(
        jax.tree.map(lambda s, v=v: jnp.full(s.shape, v, s.dtype), tree)
        for tree, v in zip(shapes, (0, jnp.inf), strict=True)
    )

    def body(carry, i):
        summed, least = term(rows(m, i, block))
        return (jax.tree.map(jnp.add, carry[0], summed), jax.tree.map(jnp.minimum, carry[1], least)), None

    return jax.lax.scan(jax.checkpoint(body), start, jnp.arange(count))[0]


def columns_of(term: Callable, m: int, block: int) -> Array:
    """term(rows) [n, rows] for each block of m rows, side by side: [n, m]."""
    count = num_blocks(m, block)
    if count == 1:
        return term(rows(m, 0, block))
    body = jax.checkpoint(lambda _, i: (None, term(rows(m, i, block))))
    parts = jax.lax.scan(body, None, jnp.arange(count))[1]
    _, n, size = parts.shape
    whole = jnp.moveaxis(parts[:-1], 0, 1).reshape(n, -1)
    return jnp.concatenate([whole, parts[-1, :, count * size - m :]], axis=1)


def fold(
    step: Callable, carry: Any, n: int, m: int, pairs: Any, blocks: tuple[int | None, int | None] = (None, None)
) -> Any:
    """carry = step(carry, rows of n, columns of m) for each pair (i, j) of block numbers in turn."""

    def body(carry, pair):
        return step(carry, rows(n, pair[0], blocks[0]), rows(m, pair[1], blocks[1])), None

    if len(pairs) == 1:
        return body(carry, pairs[0])[0]
    return jax.lax.scan(jax.checkpoint(body), carry, jnp.asarray(pairs))[0]


def all_pairs(n: int, m: int, blocks: tuple[int | None, int | None] = (None, None)) -> np.ndarray:
    """Every block of n rows with every block of m."""
    return np.indices((num_blocks(n, blocks[0]), num_blocks(m, blocks[1]))).reshape(2, -1).T


def own_pairs(n: int, block: int | None = None) -> np.ndarray:
    """Each block of n rows with itself."""
    return np.repeat(np.arange(num_blocks(n, block))[:, None], 2, axis=1)


def upper_pairs(n: int, block: int | None = None) -> np.ndarray:
    """Each two different blocks of n rows, once."""
    return np.stack(np.triu_indices(num_blocks(n, block), k=1), axis=1)


def sum_across(gram: Callable, term: Callable, p: Particles, q: Particles, u: Array, v: Array) -> Any:
    """Σ term(K, u', v') over the blocks K of gram(p, q), u' and v' the weights ([n, ...]) of its rows."""

    def one(rows, columns):
        return term(gram(on_device(rows.of(p)), on_device(columns.of(q))), rows.weights(u), columns.weights(v))

    blocks = block_of(p.x), block_of(q.x)
    return _sum(one, p.n, q.n, all_pairs(p.n, q.n, blocks), blocks)


def sum_within(gram: Callable, term: Callable, p: Particles, u: Array, *, self_pairs: bool) -> Any:
    """`sum_across` for p with itself, the two halves of the symmetric Gram computed once; its diagonal on demand."""

    def own(rows, _):
        part, w = on_device(rows.of(p)), rows.weights(u)
        k = gram(part, part, same=True)
        return term(k if self_pairs else jnp.where(jnp.eye(part.n, dtype=bool), 0.0, k), w, w)

    def two(rows, columns):
        k = gram(on_device(rows.of(p)), on_device(columns.of(p)))
        left, right = rows.weights(u), columns.weights(u)
        return jax.tree.map(jnp.add, term(k, left, right), term(k.T, right, left))

    block = block_of(p.x)
    total = _sum(own, p.n, p.n, own_pairs(p.n, block), (block, block))
    if num_blocks(p.n, block) == 1:
        return total
    return jax.tree.map(jnp.add, total, _sum(two, p.n, p.n, upper_pairs(p.n, block), (block, block)))


def _sum(term: Callable, n: int, m: int, pairs: np.ndarray, blocks: tuple[int, int]) -> Any:
    if len(pairs) == 1:
        return term(rows(n, pairs[0][0], blocks[0]), rows(m, pairs[0][1], blocks[1]))
    shapes = jax.eval_shape(lambda: term(rows(n, 0, blocks[0]), rows(m, 0, blocks[1])))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return fold(lambda total, *parts: jax.tree.map(jnp.add, total, term(*parts)), zero, n, m, pairs, blocks)


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
