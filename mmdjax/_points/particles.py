"""Weighted point sets, and the numbers read from them.

A point set stands for the measure Σ_i u_i δ(x_i), weights summing to one. References, the generated batch and the
memory are all `Particles`.
"""

import functools
import os
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree

from mmdjax._core.numerics import readable, reciprocal
from mmdjax._points.streaming import HostReferences
from mmdjax.tree import is_concrete, is_traced, pytree, replace

T = TypeVar("T")


@pytree
class Particles:
    """A weighted point set: samples with, where they have them, conditions and weights.

    Needed where a plain array does not say enough: references with labels or prompts for a `Product` kernel, or with
    unequal weights. `guided_sample`, `mmd2` and the metrics take an array [n, ...] as n points of equal weight.

    Args:
      x: the points, an array [n, *shape] in the units of the model's data; kernels and `mmd2` take any pytree of arrays
        [n, ...].
      cond: the condition of each point (labels, prompt embeddings), a pytree of arrays [n, ...]; None: no conditions.
      weight: [n], not negative. Only ratios matter. A point of weight 0 has no effect. None: equal weights.

    Example:
      >>> refs = Particles(jnp.zeros((4, 2)), cond=jnp.array([0, 0, 1, 1]), weight=jnp.array([1.0, 1.0, 1.0, 0.0]))
      >>> refs.n, refs.probabilities().tolist()
      (4, [0.333..., 0.333..., 0.333..., 0.0])
    """

    x: Any
    cond: Any = None
    weight: Any = None

    @property
    def n(self) -> int:
        """Number of points, those of weight 0 included."""
        return jax.tree.leaves(self.x)[0].shape[0]

    def probabilities(self) -> Float[Array, " n"]:
        """The weights [n], normalised to sum to 1; all 0 if every weight is 0."""
        if self.weight is None:
            return jnp.full((self.n,), 1.0 / self.n, wide_dtype(self.x))
        weight = _summable(jnp.asarray(self.weight, wide_dtype(self.x)))
        total = weight.sum()
        return weight / jnp.where(total > 0, total, 1.0)


def as_particles(points: Any, name: str = "refs") -> Particles:
    """Particles unchanged; an array or pytree [n, ...] as particles of equal weight.

    Anything that numpy reads (a torch tensor, a pandas frame) becomes an array.

    Raises:
      TypeError: numpy cannot read it, or it holds something other than numbers; `name` names it in the message.
    """
    points = points if isinstance(points, Particles) else Particles(points)
    weight = points.weight
    if weight is not None and not _is_array(weight):  # one array, never a tree
        weight = _as_array(f"{name}.weight", np.asarray(weight) if isinstance(weight, list | tuple) else weight)
    if all(map(_is_array, jax.tree.leaves((points.x, points.cond)))):
        return points if weight is points.weight else replace(points, weight=weight)
    x = jax.tree.map(functools.partial(_as_array, name), points.x)
    cond = jax.tree.map(functools.partial(_as_array, f"{name}.cond"), points.cond)
    return Particles(x, cond, weight)


def _is_array(leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype.kind not in "OUSMm"  # objects, text, dates
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)


def _as_array(name: str, leaf: Any) -> Any:
    if _is_array(leaf):
        return leaf
    kind = f"{type(leaf).__module__.split('.')[0]}.{type(leaf).__name__}".removeprefix("builtins.")
    if isinstance(leaf, np.ndarray | np.generic):
        raise TypeError(f"{name} has dtype {leaf.dtype}; give an array of numbers")
    if isinstance(leaf, str | bytes | os.PathLike) or kind.startswith("PIL."):
        raise TypeError(
            f"{name} holds a {kind}; give one array [m, height, width, channels] of numbers: "
            "mmdjax.sd.pictures.read_picture(path, height, width) reads a file, np.stack joins several"
        )
    if isinstance(leaf, bool | int | float | complex):
        raise TypeError(
            f"{name} holds the number {leaf!r} where an array is needed; give np.asarray({name}), rows of one length"
        )
    if not hasattr(leaf, "__array__"):
        raise TypeError(f"{name} holds a {kind}; give an array of numbers, such as np.asarray({name})")
    try:
        array = np.asarray(leaf)
    except Exception as error:
        raise TypeError(
            f"{name} is a {kind} that numpy cannot read ({error}); give a numpy array in its place"
        ) from error
    if not _is_array(array):
        raise TypeError(f"{name} is a {kind}, which numpy reads as {array.dtype}; give an array of numbers")
    return array


def whole(points: T) -> T:
    """A pytree of arrays; those on a mesh of Explicit axes become whole on every device.

    Operations on all pairs of rows raise on such axes, as they do not say how their results are to be split. Outside of
    `jax.set_mesh` derivatives, and operations with new arrays, raise too; there the axes become Auto ones.
    """

    def gather(leaf):
        sharding = getattr(jax.typeof(leaf), "sharding", None) if isinstance(leaf, jax.Array) else None
        if not isinstance(sharding, NamedSharding) or AxisType.Explicit not in sharding.mesh.axis_types:
            return leaf
        leaf, mesh = jax.sharding.reshard(leaf, NamedSharding(sharding.mesh, P())), _mesh_of(leaf) or sharding.mesh
        if not jax.sharding.get_abstract_mesh().empty:
            return leaf
        auto = mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names))
        return jax.device_put(leaf, NamedSharding(auto, P()))

    return jax.tree.map(gather, points)


def _mesh_of(leaf: Any) -> Any:
    # an array being differentiated or mapped over outside of `jit` has a value, and that a mesh
    while is_traced(leaf):
        leaf = getattr(leaf, "primal", getattr(leaf, "val", None))
    sharding = leaf.sharding if isinstance(leaf, jax.Array) else None
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


def _summable(weight: Array) -> Array:
    """Weights, those so large that their sum could overflow times a power of two, which is exact."""
    return weight * jnp.where(jax.lax.stop_gradient(weight.max(initial=0)) > 2.0**64, 2.0**-64, 1.0).astype(
        weight.dtype
    )


def num_present(points: Particles) -> int:
    """How many rows have a weight that is not negligible beside the largest; all of them inside `jit`."""
    if points.weight is None or not is_concrete(points.weight):
        return points.n
    weight = np.asarray(points.weight).astype(np.float64)
    least = float(jnp.finfo(wide_dtype(points.x)).tiny) * weight.max(initial=0)
    return int(((weight > 0) & (weight >= least)).sum())


def wide_dtype(tree: PyTree) -> Any:
    """The float type to compute in: float64 if any leaf has it, else float32 (never bfloat16 or float16)."""
    return jnp.result_type(jnp.float32, *[x for x in map(jnp.result_type, jax.tree.leaves(tree)) if x == jnp.float64])


def widen(points: Particles) -> Particles:
    """The points with bfloat16 and float16 cast to float32, and rows of weight 0 replaced by another row.

    They are cast once, so that gradients add up before they are rounded. A row of weight 0 may hold anything, NaN too.
    """

    def cast(x):
        floating = jnp.issubdtype(jnp.result_type(x), jnp.floating)
        return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32)) if floating else x

    return jax.tree.map(cast, fill_empty(points))


def effective_number(points: Particles) -> Any:
    """(Σ w)²/Σ w² of the weights: how many points of equal weight they count as."""
    return points.n if points.weight is None else reciprocal(jnp.sum(points.probabilities() ** 2))


def fill_empty(points: Particles) -> Particles:
    """The points with rows of weight 0 replaced by a row of positive weight."""
    if points.weight is None:
        return points
    weight = jnp.asarray(points.weight)
    counts = weight > 0
    row = jnp.argmax(counts)

    def fill(v):
        v = jnp.asarray(v)
        return jnp.where(per_sample(counts, v), v, v[row])

    x, cond = jax.tree.map(fill, (points.x, points.cond))
    floating = jnp.issubdtype(weight.dtype, jnp.floating)
    weight = _summable(weight.astype(jnp.promote_types(weight.dtype, jnp.float32))) if floating else points.weight
    return replace(points, x=x, cond=cond, weight=weight)


def flat(x: PyTree) -> Float[Array, "n d"]:
    """A pytree of samples as one matrix, a row for each sample, in `wide_dtype`.

    Example:
      >>> flat({"a": jnp.ones((3, 2, 2)), "b": jnp.zeros(3)}).shape
      (3, 5)
    """
    if isinstance(x, HostReferences):
        return x.flat()
    rows = [jnp.reshape(leaf, (leaf.shape[0], -1)) for leaf in jax.tree.leaves(x)]
    return jnp.concatenate([r.astype(wide_dtype(x)) for r in rows], axis=1)


def on_device(points: Particles) -> Particles:
    """Points of which those on the host are read, as one array."""
    x = points.x
    return replace(points, x=x.flat().reshape(x.shape)) if isinstance(x, HostReferences) else points


def per_sample(value: Any, x: Array) -> Array:
    """`value`, a scalar or [n], shaped to multiply x [n, ...]."""
    value = jnp.asarray(value)
    return value if value.ndim == 0 else value.reshape(value.shape + (1,) * (x.ndim - value.ndim))


def check_points(name: str, points: Particles, *, floats: bool = False) -> None:
    """Raise for particles that no kernel can use; values are checked only if they are concrete.

    Raises:
      TypeError: with `floats`, x does not hold floating-point numbers.
      ValueError: no rows, or other numbers of rows in x, cond and weight; values that are not finite or whose squares
        overflow; weights that are negative, all zero, or out of range.
    """
    leaves = [points.x] if isinstance(points.x, HostReferences) else jax.tree.leaves(points.x)
    if not leaves:
        found = "is None" if points.x is None else "has no arrays"
        raise ValueError(f"{name} {found}; give an array of shape [m, ...] or Particles")
    for leaf in leaves:
        if floats and not jnp.issubdtype(leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf), jnp.floating):
            if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
                raise TypeError(f"{name} has dtype {jnp.result_type(leaf)}; give real numbers")
            raise TypeError(
                f"{name} has dtype {jnp.result_type(leaf)}; give floats, scaled as the model's training data was: for "
                f"8-bit images {name}.astype('float32') / 127.5 - 1"
            )
    rows = {np.shape(leaf)[:1] for leaf in jax.tree.leaves((points.x, points.cond, points.weight))}
    if len(rows) > 1 or rows == {()}:
        shapes = {k: jax.tree.map(np.shape, v) for k, v in vars(points).items() if v is not None}
        raise ValueError(f"{name} must have one row for each sample in x, cond and weight; the shapes are {shapes}")
    if points.n == 0:
        raise ValueError(
            f"{name} is empty (shape {np.shape(leaves[0])}); give at least one sample, or None for no guidance"
        )
    counts = np.ones(points.n, bool)
    if points.weight is not None and is_concrete(points.weight):
        counts = _check_weight(name, np.asarray(points.weight), jnp.finfo(wide_dtype(points.x)))
    for part, value in (("", points.x), (".cond", points.cond)):
        for leaf in jax.tree.leaves(value):
            if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) and is_concrete((leaf, points.weight)):
                _check_values(f"{name}{part}", leaf, counts)


def _check_weight(name: str, weight: np.ndarray, limits: Any) -> np.ndarray:
    """Whether the weight of each row is positive."""
    if not np.isfinite(weight).all() or (weight < 0).any() or not (weight > 0).any():
        raise ValueError(
            f"{name}.weight must be finite, non-negative and not all zero; it is {_shorten(weight.tolist())}"
        )
    if not float(limits.tiny) <= float(weight.max()) <= float(limits.max):
        raise ValueError(
            f"{name}.weight is at most {weight.max()}, which {limits.dtype} cannot hold; divide it by its largest entry"
        )
    return weight > 0


def _check_values(what: str, leaf: Any, counts: np.ndarray) -> None:
    limits = jnp.finfo(wide_dtype(leaf))
    with jax.ensure_compile_time_eval(), np.errstate(invalid="ignore"):
        values, xp = readable(leaf)
        largest = float(xp.max(xp.abs(values), initial=0))  # NaN if there is one
    most2 = float(limits.max) / 4  # of |x|²: |x − y|² is at most four times as much
    if largest * largest * np.prod(np.shape(leaf)[1:]) <= most2:
        return
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.asarray(leaf, limits.dtype).reshape(len(counts), -1).astype(np.float64)
        bad = np.flatnonzero(~np.isfinite(values).all(1) & counts).tolist()
        far = np.flatnonzero(((values**2).sum(1) > most2) & counts).tolist()
    if bad:
        raise ValueError(f"{what} is NaN or infinite in rows {_shorten(bad)}; remove or repair them")
    if far:
        raise ValueError(
            f"{what} has values up to {np.abs(values[far]).max():.3g} in rows {_shorten(far)}, so far apart that their "
            f"squared distances overflow in {limits.dtype}; scale the data"
        )


def _shorten(values: list) -> str:
    return str(values) if len(values) <= 10 else f"{str(values[:10])[:-1]}, …] ({len(values)} in all)"
