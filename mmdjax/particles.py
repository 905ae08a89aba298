"""What is compared: weighted point sets, and the numbers read from them.

A point set stands for the measure Σ_i u_i δ(x_i), weights summing to one. References, the generated batch and the
memory are all `Particles`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from mmdjax.host import HostReferences
from mmdjax.numerics import all_finite
from mmdjax.tree import is_concrete, pytree, replace


@pytree
class Particles:
    """A weighted point set.

    Args:
      x: the points: an array [n, ...], or for kernels and `mmd2` any pytree of such arrays.
      cond: what each point is conditioned on (labels, prompt embeddings): a pytree of arrays [n, ...], or None.
      weight: [n], non-negative, normalised where it is used; weight 0 marks an empty slot. None: equal weights.

    Example:
      >>> refs = Particles(jnp.zeros((4, 2)), weight=jnp.array([1.0, 1.0, 1.0, 0.0]))
      >>> refs.n, refs.probabilities().tolist()
      (4, [0.333..., 0.333..., 0.333..., 0.0])
    """

    x: Any
    cond: Any = None
    weight: Any = None

    @property
    def n(self) -> int:
        """Number of rows, empty slots included."""
        return jax.tree.leaves(self.x)[0].shape[0]

    def probabilities(self) -> Float[Array, " n"]:
        """The weights, normalised to sum to one; all zero if every slot is empty."""
        if self.weight is None:
            return jnp.full((self.n,), 1.0 / self.n, wide_dtype(self.x))
        weight = jnp.asarray(self.weight, wide_dtype(self.x))
        total = weight.sum()
        return weight / jnp.where(total > 0, total, 1.0)


def as_particles(points: Any) -> Particles:
    """Particles unchanged; an array or pytree [n, ...] as particles of equal weight."""
    return points if isinstance(points, Particles) else Particles(points)


def wide_dtype(tree: PyTree) -> Any:
    """The float type to compute in: float64 if any leaf has it, else float32 (never bfloat16 or float16)."""
    return jnp.result_type(jnp.float32, *[x for x in map(jnp.result_type, jax.tree.leaves(tree)) if x == jnp.float64])


def widen(points: Particles) -> Particles:
    """The points with bfloat16 and float16 as float32, and what lies in empty slots replaced by a row that counts.

    Cast once, so that gradients add up before they are rounded. An empty slot may hold anything, NaN included.
    """

    def cast(x):
        floating = jnp.issubdtype(jnp.result_type(x), jnp.floating)
        return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32)) if floating else x

    return jax.tree.map(cast, fill_empty(points))


def fill_empty(points: Particles) -> Particles:
    """The points with what lies in empty slots replaced by a row that counts."""
    if points.weight is None:
        return points
    counts = jnp.asarray(points.weight) > 0
    row = jnp.argmax(counts)

    def fill(v):
        v = jnp.asarray(v)
        return jnp.where(per_sample(counts, v), v, v[row])

    x, cond = jax.tree.map(fill, (points.x, points.cond))
    return replace(points, x=x, cond=cond)


def flat(x: PyTree) -> Float[Array, "n d"]:
    """A pytree of samples as one matrix, a row a sample, in `wide_dtype`.

    Example:
      >>> flat({"a": jnp.ones((3, 2, 2)), "b": jnp.zeros(3)}).shape
      (3, 5)
    """
    if isinstance(x, HostReferences):
        return x.flat()
    rows = [jnp.reshape(leaf, (leaf.shape[0], -1)) for leaf in jax.tree.leaves(x)]
    return jnp.concatenate([r.astype(wide_dtype(x)) for r in rows], axis=1)


def per_sample(value: Any, x: Array) -> Array:
    """`value`, a scalar or [n], shaped to multiply x [n, ...]."""
    value = jnp.asarray(value)
    return value if value.ndim == 0 else value.reshape(value.shape + (1,) * (x.ndim - value.ndim))


def check_points(name: str, points: Particles, *, floats: bool = False) -> None:
    """Raise for particles that no kernel can use; values are looked at only when they are concrete.

    Raises:
      TypeError: with `floats`, x is not made of floating-point arrays.
      ValueError: no rows, rows of different number, values that are not finite, or weights that are negative or all
        zero.
    """
    leaves = [points.x] if isinstance(points.x, HostReferences) else jax.tree.leaves(points.x)
    if not leaves:
        raise ValueError(f"{name} has no arrays; give an array of shape [m, ...] or Particles")
    for leaf in leaves:
        if floats and not jnp.issubdtype(leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"{name} has dtype {jnp.result_type(leaf)}; the model works on floats, so scale them as its training "
                f"data was, for 8-bit images {name}.astype('float32') / 127.5 - 1"
            )
    rows = {np.shape(leaf)[:1] for leaf in jax.tree.leaves((points.x, points.cond, points.weight))}
    if len(rows) > 1 or rows == {()}:
        shapes = {k: jax.tree.map(np.shape, v) for k, v in vars(points).items() if v is not None}
        raise ValueError(f"{name} must have one row a sample in x, cond and weight; the shapes are {shapes}")
    if points.n == 0:
        raise ValueError(
            f"{name} is empty (shape {np.shape(leaves[0])}); give at least one sample, or None for no guidance"
        )
    for part, value in (("", points.x), (".cond", points.cond)):
        for leaf in jax.tree.leaves(value):
            floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
            if floating and is_concrete((leaf, points.weight)) and not all_finite(leaf):
                finite = np.isfinite(np.asarray(leaf, np.float32)).reshape(points.n, -1).all(1)
                counts = True if points.weight is None else np.asarray(points.weight) > 0
                bad = np.flatnonzero(~finite & counts).tolist()
                if not bad:
                    continue
                raise ValueError(f"{name}{part} is NaN or infinite in rows {_shorten(bad)}; remove or repair them")
    if points.weight is not None and is_concrete(points.weight):
        weight = np.asarray(points.weight)
        if not np.isfinite(weight).all() or (weight < 0).any() or weight.sum() == 0:
            raise ValueError(
                f"{name}.weight must be finite, non-negative and not all zero; it is {_shorten(weight.tolist())}"
            )


def _shorten(values: list) -> str:
    return str(values) if len(values) <= 10 else f"{str(values[:10])[:-1]}, …] ({len(values)} in all)"
