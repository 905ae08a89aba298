"""Where a batch and its references lie: on one device, or split over the devices of a mesh.

The batch is split by rows over the mesh axes that `guided_sample(sharding=)` names. The network runs as XLA splits it;
the guidance, which compares all pairs, runs in `jax.shard_map`: each device moves its own rows and sees all others
through an all-gather of the batch. References are whole on every device, or split by rows over mesh axes of their own
choice; then each device pulls with its part, and the sum is scattered back to the rows' owners. So a step sends the
batch and sums of its size, whatever the number of references: an all-gather before the inner steps, and two in each
where shifts are averaged over neighbours (the shifts, the moved batch), one elsewhere; another of x_t and x̂0 where
"shrunk" has fewer than 100 references; and, with split references,
each device's distances to its nearest ones and two moments. Only what is taken from the references once a call (the
bandwidth, their own term and spread) sends at most 2,000 of them and their distances. "sample" draws noise for the
references: whole ones get it on every device alike, split ones each on its own.

A mesh may have Auto or Explicit axes. Inside, all are Auto: under Explicit ones, operations whose result could be split
in several ways raise.

A batch may also be spread over the calls of a `vmap` or `shard_map` of the caller's, each with rows of its own
(`axis_name=`). Over those of a `vmap` they share a device: their rows are gathered, which leaves arrays that are not
mapped, so that the whole batch is guided once and not once for each call; then each call takes its own rows again. Over
the axes of a `shard_map` these calls are devices, and all is as above if it has `check_vma=False`; otherwise JAX checks
of each value whether it differs between devices, and each device guides the whole batch, gathered.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from mmdjax._core.lockstep import axes_here, differs, in_lockstep, is_manual
from mmdjax._points.particles import Particles, wide_dtype
from mmdjax.tree import is_traced, pytree, replace, shown, static

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Shards:
    """What one device does with its own rows, inside `jax.shard_map`; without axes it has all of them.

    Args:
      batch: mesh axes that the batch is split over.
      refs: mesh axes that the references are split over.
    """

    batch: Axes = ()
    refs: Axes = ()

    @property
    def without_refs(self) -> Axes:
        """The batch's axes that the references are not split over."""
        return tuple(axis for axis in self.batch if axis not in self.refs)

    def everyone(self, rows: Any) -> Any:
        """All rows of a pytree [n, ...], this device's own first: row i here and row i of the whole are one point."""
        if not self.batch:
            return rows

        def gather(v):
            whole = jax.lax.all_gather(v, self.batch, tiled=True)
            return jnp.roll(whole, -v.shape[0] * jax.lax.axis_index(self.batch), axis=0)

        return jax.tree.map(gather, rows)

    def total(self, x: Any) -> Any:
        """The sum over the devices that hold the batch."""
        return jax.lax.psum(x, self.batch) if self.batch else x

    def total_with_refs(self, x: Any) -> Any:
        """The sum over the devices that hold the batch or the references."""
        axes = tuple(dict.fromkeys(self.batch + self.refs))
        return jax.lax.psum(x, axes) if axes else x

    def total_without_refs(self, x: Any) -> Any:
        """The sum over the devices that hold the batch and the same references."""
        return jax.lax.psum(x, self.without_refs) if self.without_refs else x

    def share(self, points: Particles, axes: Axes | None = None) -> tuple[Particles, Particles]:
        """This device's part of points that all devices hold, and all of them, that part first; both with weights.

        Parts are equal: where they do not come out even, the last ones are filled up with rows of weight 0. `axes`:
        the mesh axes to split over, in place of the batch's.
        """
        axes = self.batch if axes is None else axes
        weight = jnp.ones(points.n, wide_dtype(points.x)) if points.weight is None else jnp.asarray(points.weight)
        whole = replace(points, weight=weight)
        if not axes:
            return whole, whole
        size = -(-points.n // jax.lax.axis_size(axes))
        start = size * jax.lax.axis_index(axes)
        index = start + jnp.arange(size)
        part = jax.tree.map(lambda v: v[index % points.n], whole)
        part = replace(part, weight=jnp.where(index < points.n, part.weight, 0.0))
        return part, jax.tree.map(lambda v: jnp.roll(v, -start, axis=0), whole)

    def of_shares(self, tree: Any, n: int) -> Any:
        """A pytree of what each device made of its `share` of n points, for all of them in their order."""
        if not self.batch:
            return tree
        return jax.tree.map(lambda v: jax.lax.all_gather(v, self.batch, tiled=True)[:n], tree)

    def probabilities(self, refs: Particles) -> Float[Array, " m"]:
        """The weights of this device's references, normalised over all of them."""
        if not self.refs:
            return refs.probabilities()
        p = refs.probabilities()  # zero if all slots here are empty
        mass = jnp.asarray(refs.n, p.dtype) if refs.weight is None else jnp.asarray(refs.weight, p.dtype).sum()
        return p * mass / jax.lax.psum(mass, self.refs)

    def in_order(self, z: Particles, everyone: Particles) -> Particles:
        """Everyone in the order of the devices, not this one's first."""
        if not self.batch:
            return everyone
        return jax.tree.map(lambda v: jnp.roll(v, self._start(z), axis=0), everyone)

    def _start(self, z: Particles) -> Array:
        # the number of this device's first row in that order
        return z.n * jax.lax.axis_index(self.batch)

    def pull(self, of_refs: Callable, z: Particles, everyone: Particles) -> Any:
        """of_refs(z), a pytree of [n, ...] that is a sum over references, summed over the devices that hold them."""
        return self.meet(lambda z: (of_refs(z), ()), z, everyone)[0]

    def meet(self, of_refs: Callable, z: Particles, everyone: Particles) -> tuple[Any, Any]:
        """of_refs(z), two pytrees of [n, ...]: sums over references, as in `pull`, and least values over them."""
        common = tuple(axis for axis in self.refs if axis in self.batch)
        others = tuple(axis for axis in self.refs if axis not in self.batch)
        n = z.n
        if common and common == self.batch:
            z = self.in_order(z, everyone)
        elif common:
            z = jax.tree.map(lambda v: jax.lax.all_gather(v, common, tiled=True), z)
        sums, least = of_refs(z)
        if others:
            sums = jax.lax.psum(sums, others)
        sums = jax.lax.psum_scatter(sums, common, tiled=True) if common else sums

        def of_all(v):
            for axes in (others, common):
                v = jax.lax.all_gather(v, axes).min(0) if axes else v  # `pmin` has no derivative
            return jax.lax.dynamic_slice_in_dim(v, n * jax.lax.axis_index(common), n) if common else v

        return sums, jax.tree.map(of_all, least)

    def found(self, of_refs: Callable, z: Particles, everyone: Particles) -> Float[Array, "devices n ..."]:
        """of_refs(z), [n, ...], as each of the devices that hold references finds it."""
        if not self.refs:
            return of_refs(z)[None]
        found = jax.lax.all_gather(of_refs(self.in_order(z, everyone)), self.refs)
        return found if not self.batch else jax.lax.dynamic_slice_in_dim(found, self._start(z), z.n, axis=1)

    def sum_over_refs(self, x: Any) -> Any:
        """The sum over the devices that hold references."""
        return jax.lax.psum(x, self.refs) if self.refs else x


WHOLE = Shards()


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a mesh holds a batch and its references; without a mesh, one device holds all.

    Args:
      mesh: as the caller made it.
      shards: the axes.
      calls: axes of the caller's `vmap` or `shard_map` that the batch is spread over; then there is no mesh.
    """

    mesh: Any = None
    shards: Shards = WHOLE
    calls: Axes = ()

    @property
    def auto(self) -> Any:
        """The mesh with Auto axes."""
        return self.mesh.update(axis_types=(AxisType.Auto,) * len(self.mesh.axis_names))

    def put(self, tree: Any, spec: P) -> Any:
        """A pytree laid out as `spec` says."""
        return tree if self.mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(self.auto, spec))

    def batch(self, tree: Any) -> Any:
        """A pytree [n, ...] split as the batch is."""
        return self.put(tree, P(self.shards.batch))

    def rows(self, tree: Any, n: int) -> Any:
        """`batch` for those leaves of a pytree that have n rows."""
        return jax.tree.map(lambda v: self.batch(v) if jnp.shape(v)[:1] == (n,) else v, tree)

    def references(self, tree: Any) -> Any:
        """A pytree [m, ...] split as the references are."""
        return self.put(tree, P(self.shards.refs))

    def whole(self, tree: Any) -> Any:
        """A pytree that every device holds."""
        return self.put(tree, P())

    def known_to(self, points: Particles) -> "LaidOut":
        """Points that know that they lie so."""
        return LaidOut(points.x, points.cond, points.weight, self)

    def run(self, function: Callable, *args: Any, out: Any) -> Any:
        """function(*args) as if the mesh had Auto axes, inside `jit`; `out`, a tree of specs, says how results lie."""
        if self.mesh is None:
            return function(*args)

        def shardings(mesh):
            return jax.tree.map(lambda spec: NamedSharding(mesh, spec), out, is_leaf=lambda leaf: isinstance(leaf, P))

        def laid_out(*args):
            return jax.lax.with_sharding_constraint(function(*args), shardings(self.auto))

        if AxisType.Explicit not in self.mesh.axis_types:
            return laid_out(*args)
        # the mesh without its devices: with them, the caller would have to be under jax.set_mesh
        return jax.sharding.auto_axes(laid_out, out_sharding=shardings(self.mesh.abstract_mesh))(*args)

    def split(self, function: Callable, args: tuple, *, specs: tuple, out: Any) -> Any:
        """function(shards, *args) on each device with its own rows; `specs` and `out` say how args and results lie."""
        if self.mesh is None:
            return function(Shards(self._devices), *args)
        return jax.shard_map(
            lambda *args: function(self.shards, *args), mesh=self.auto, in_specs=specs, out_specs=out, check_vma=False
        )(*args)

    @property
    def _devices(self) -> Axes:
        # of the calls' axes those over which devices share the work
        return tuple(axis for axis in self.calls if is_manual(axis) and not differs(jax.lax.axis_index(axis), axis))

    @property
    def _gathered(self) -> Axes:
        # those along which all is gathered first
        return tuple(axis for axis in self.calls if axis not in self._devices)

    @property
    def _mapped(self) -> Axes:
        # those of a `vmap`
        return tuple(axis for axis in self.calls if not is_manual(axis))

    def num_calls(self) -> int:
        """How many calls the batch is spread over.

        Raises:
          ValueError: the call is not inside a `vmap` or `shard_map` over these axes; or it is in a `vmap` inside a
            `shard_map` that checks its values, where JAX does not gather.
        """
        for axis in self.calls:
            try:
                jax.lax.axis_size(axis)
            except NameError:
                others = ", ".join(f'"{name}"' for name in axes_here())
                known = f" (there is {others})" if others else ""
                raise ValueError(
                    f'axis_name is "{axis}", but no vmap or shard_map around this call has an axis of that '
                    f'name{known}; call it inside jax.vmap(..., axis_name="{axis}"), or leave axis_name out'
                ) from None
        for axis in jax.sharding.get_abstract_mesh().manual_axes if self._mapped else ():
            if differs(jax.lax.axis_index(axis), axis):
                raise ValueError(
                    f'"{self._mapped[0]}" is the axis of a vmap inside a shard_map over "{axis}" with check_vma=True, '
                    "where JAX cannot gather; give shard_map check_vma=False"
                )
        return math.prod(jax.lax.axis_size(axis) for axis in self.calls)

    def join(self, tree: Any) -> Any:
        """A pytree [n, ...] of this call, with the rows of the calls that are gathered below each other."""
        for axis in reversed(self._gathered):
            tree = jax.tree.map(functools.partial(_gather, axis), tree)
        return tree

    def own(self, tree: Any, n: int) -> Any:
        """The n rows of this call in what `join` has made."""
        if not self._gathered:
            return tree
        first = 0
        for axis in self._gathered:
            first = first * jax.lax.axis_size(axis) + jax.lax.axis_index(axis)
        return jax.tree.map(lambda v: jax.lax.dynamic_slice_in_dim(v, n * first, n), tree)

    def join_all(self, tree: Any) -> Any:
        """As `join`, with the rows of all calls."""
        tree, devices = self.join(tree), self._devices
        return jax.tree.map(lambda v: jax.lax.all_gather(v, devices, tiled=True), tree) if devices else tree

    def same(self, tree: Any) -> Any:
        """A pytree that all calls have in common, detached.

        Raises:
          ValueError: calls have values of their own. Not seen for devices that share the work.
        """
        for axis in self._gathered:
            tree = in_lockstep(axis, tree)
        return tree

    def first(self, key: Array) -> Array:
        """The PRNG key of the first call: for noise that all calls have in common."""
        if not self.calls:
            return key
        data = self.join_all(jax.random.key_data(key)[None])[0]
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))

    def by_rows(self, function: Callable, y: Array) -> Array:
        """function(y, y), [m, m], for points that every device holds, each making its own rows.

        Row i of the first argument is row i of the second one.
        """

        def own_rows(shards, y):
            part, whole = shards.share(Particles(y))
            return jnp.roll(function(part.x, whole.x), part.n * jax.lax.axis_index(shards.batch), axis=1)

        if not self.shards.batch:
            return function(y, y)
        return self.split(own_rows, (y,), specs=(P(),), out=P(self.shards.batch))[: y.shape[0]]


HERE = Layout()


def _gather(axis: str, v: Array) -> Array:
    if not is_manual(axis):
        return jax.lax.all_gather(v, axis, tiled=True)
    # JAX's checks of values take a sum, but not what was gathered, to be equal on all devices
    whole = jnp.zeros((v.shape[0] * jax.lax.axis_size(axis), *v.shape[1:]), v.dtype)
    start = v.shape[0] * jax.lax.axis_index(axis)
    return jax.lax.psum(jax.lax.dynamic_update_slice_in_dim(whole, v, start, 0), axis).astype(v.dtype)


@pytree
class LaidOut(Particles):
    """Particles that know how they lie on a mesh: for bandwidth rules, which are given references only."""

    layout: Layout = static(default=HERE)


def distances_of(points: Particles) -> Callable:
    """(function, y) -> function(y, y), [m, m], for some of these points, shared out as they lie."""
    return points.layout.by_rows if isinstance(points, LaidOut) else HERE.by_rows


def layout_of(sharding: Any, num_samples: int, refs: Any, operands: Any = None) -> Layout:
    """The layout that a call asks for.

    Args:
      sharding: of the batch, a `NamedSharding` on the leading axis, or None: wherever the operands are.
      num_samples: n.
      refs: the references, or None. How they lie is seen where they are concrete or the mesh is Explicit.
      operands: everything else, which may lie on a mesh of Explicit axes.
    Raises:
      TypeError: not a NamedSharding.
      ValueError: other axes than the leading one are split, or the batch does not divide.
    """
    points = [] if refs is None else jax.tree.leaves(refs.x)
    on_refs = [_lies(leaf) for leaf in points[:1]]
    if sharding is None:
        split = [s.mesh for s in on_refs if s is not None and _leading(s.spec)]
        lies = on_refs + [_lies(leaf) for leaf in jax.tree.leaves(operands)]
        meshes = split + [s.mesh for s in lies if s is not None and AxisType.Explicit in s.mesh.axis_types]
        if not meshes:
            return HERE
        mesh, batch = next((m for m in meshes if isinstance(m, jax.sharding.Mesh)), meshes[0]), ()
    else:
        mesh, batch = _check(sharding, num_samples)
    split = ()
    for s in on_refs:
        if s is not None and dict(s.mesh.shape) == dict(mesh.shape):
            split = _leading(s.spec)
    return Layout(mesh, Shards(batch, split))


def spread_over(axis_name: Any) -> Layout:
    """The layout of a batch that is spread over the calls of a `vmap` or `shard_map`.

    Args:
      axis_name: of its axis, or a tuple of names; None: the call has the whole batch.
    Raises:
      TypeError: not a name.
    """
    names = () if axis_name is None else axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(
            f'axis_name is {shown(axis_name)}; give the name of an axis of vmap or shard_map, such as "batch"'
        )
    return Layout(calls=names)


def _check(sharding: Any, num_samples: int) -> tuple[Any, Axes]:
    if not isinstance(sharding, NamedSharding):
        raise TypeError(
            f"sharding is {type(sharding).__name__}; give NamedSharding(mesh, PartitionSpec(axis)), such as "
            "mmdjax.distributed.batch_sharding()"
        )
    if any(part not in (None, ()) for part in sharding.spec[1:]):
        raise ValueError(f"sharding has {sharding.spec}; only the leading axis, that of the samples, can be split")
    axes = _leading(sharding.spec)
    devices = math.prod(sharding.mesh.shape[axis] for axis in axes)
    if num_samples % devices:
        raise ValueError(
            f"num_samples is {num_samples}, which {devices} devices ({' × '.join(axes)}) cannot share equally; "
            f"give a multiple of {devices}, such as {-(-num_samples // devices) * devices}"
        )
    return sharding.mesh, axes


def _lies(leaf: Any) -> NamedSharding | None:
    # a tracer's type tells for Explicit axes only
    sharding = getattr(jax.typeof(leaf) if is_traced(leaf) else leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 else None


def _leading(spec: P) -> Axes:
    first = spec[0] if len(spec) else None
    return () if first is None or first is P.UNCONSTRAINED else (first,) if isinstance(first, str) else tuple(first)
