"""Many devices and many hosts: starting, meshes, placing parameters, and each host's own part of the result.

A thin layer over JAX. Every host runs the same program:

    initialize()                                    # first of all; on TPU pods, SLURM and Kubernetes without arguments
    params = shard_params(params, batch_mesh())     # or replicate(...), if they fit on each device
    out = guided_sample(params, key, refs, model=model, num_samples=256, sharding=batch_sharding())
    index, rows = local_rows(out.x)                 # this host's samples, for it to write

The whole batch is guided together: samples do not depend on the number of devices, except for rounding. References that
do not fit on one host are split by `jax.make_array_from_process_local_data(batch_sharding(), own_references)`. Inside a
`jax.shard_map` of your own give `guided_sample` the `axis_name` in place of the sharding. How to start:

    # a TPU pod slice: JAX finds the processes by itself
    gcloud compute tpus tpu-vm ssh my-slice --zone us-west4-a --worker=all --command "python sample.py"

    # SLURM: one process a GPU
    srun --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 python sample.py

    # hosts by address; in sample.py initialize("10.0.0.1:1234", num_processes=4, process_id=int(sys.argv[1]))
    for i in 0 1 2 3; do ssh host$i python sample.py $i & done; wait

References:
  Rajbhandari et al. 2020 (parameters split over the devices that share a batch).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int, Shaped

SMALL = 2**14  # entries; smaller arrays of parameters stay whole


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout_seconds: int = 30,
    **settings: Any,
) -> None:
    """Join this process to the others of a run: `jax.distributed.initialize`. Call it before anything else uses JAX.

    On TPU pods, SLURM, Open MPI and Kubernetes no arguments are needed. Elsewhere give all three: the address of
    process 0, such as "10.0.0.1:1234", the same on all hosts; how many processes there are; and which one this is.

    If a process dies, the others stop with an error after about `heartbeat_timeout_seconds`, instead of waiting for it.

    Args:
      coordinator_address: host:port of process 0.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      heartbeat_timeout_seconds: after how long a silent process counts as dead.
      settings: other arguments of `jax.distributed.initialize`, such as local_device_ids.
    Raises:
      ValueError: one or two of the three arguments.
      RuntimeError: JAX is in use already, or the processes of the run are not known.

    Example:
      >>> initialize("10.0.0.1:1234", num_processes=2)
      Traceback (most recent call last):
      ...
      ValueError: process_id is not given; give coordinator_address, num_processes and process_id together, or none...
    """
    given = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) not in (0, 3):
        raise ValueError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not given; give coordinator_address, "
            "num_processes and process_id together, or none of them"
        )
    try:
        jax.distributed.initialize(
            **given,
            heartbeat_timeout_seconds=heartbeat_timeout_seconds,
            **settings,
        )
    except ValueError as error:
        if missing and "should be defined" in str(error):
            raise RuntimeError(
                "found no TPU pod, SLURM, Open MPI or Kubernetes, which list the processes; give "
                "coordinator_address, num_processes and process_id"
            ) from error
        raise


def batch_mesh(devices: Sequence[Any] | None = None, *, axis: str = "batch", explicit: bool = False) -> Mesh:
    """A mesh with one axis: all devices of all processes, or those given.

    Args:
      devices: None for all.
      axis: its name.
      explicit: whether the axis is Explicit. By default it is Auto: samples split over it are used like other arrays.
        With an Explicit axis, split references stay split inside your own `jit`.

    Example:
      >>> batch_mesh(jax.devices()[:1]).axis_names
      ('batch',)
    """
    devices = jax.devices() if devices is None else list(devices)
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh((len(devices),), (axis,), axis_types=(kind,), devices=devices)


def batch_sharding(mesh: Mesh | None = None, axis: str = "batch") -> NamedSharding:
    """For `guided_sample(sharding=...)`: the batch split over a mesh axis, by default over all devices.

    Raises:
      ValueError: the mesh has no such axis.

    Example:
      >>> batch_sharding(batch_mesh(jax.devices()[:1])).spec == P("batch")
      True
    """
    mesh = batch_mesh(axis=axis) if mesh is None else mesh
    _check_axis(mesh, axis)
    return NamedSharding(mesh, P(axis))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A pytree of arrays, whole on every device. Every process must give the same values; this is not checked."""
    return jax.tree.map(lambda leaf: _put(leaf, NamedSharding(mesh, P())), tree)


def shard_params(params: Any, mesh: Mesh, axis: str = "batch") -> Any:
    """Parameters split over a mesh axis, each array along its longest dimension that the axis divides.

    So each device holds its part only, and gathers a layer's parameters when it runs. Small arrays stay whole. The axis
    may be that of the batch. With `load(path, put=lambda array: shard_params(array, mesh))` no device ever holds all
    parameters of a checkpoint.

    Args:
      params: a pytree of arrays, the same on every process.
    Raises:
      ValueError: the mesh has no such axis.

    Example:
      >>> mesh = batch_mesh(jax.devices()[:1])
      >>> params = shard_params({"kernel": np.ones((3, 256, 512), np.float32), "bias": np.ones(512)}, mesh)
      >>> tuple(params["kernel"].sharding.spec), tuple(params["bias"].sharding.spec)
      ((None, None, 'batch'), ())
    """
    _check_axis(mesh, axis)
    size = mesh.shape[axis]

    def split(leaf):
        shape = np.shape(leaf)
        fits = [i for i, length in enumerate(shape) if length % size == 0]
        if math.prod(shape) < SMALL or not fits:
            return _put(leaf, NamedSharding(mesh, P()))
        longest = max(fits, key=lambda i: shape[i])
        return _put(leaf, NamedSharding(mesh, P(*[None] * longest, axis)))

    return jax.tree.map(split, params)


def local_rows(x: Any) -> tuple[Int[np.ndarray, " k"], Shaped[np.ndarray, "k ..."]]:
    """This process's own rows of an array split along its leading axis: their indices in the whole, and the rows.

    Over all processes each row comes exactly once, even if several devices hold it.

    Raises:
      ValueError: the array is split along another axis.

    Example:
      >>> index, rows = local_rows(jax.numpy.arange(3.0) + 1)
      >>> index.tolist(), rows.tolist()
      ([0, 1, 2], [1.0, 2.0, 3.0])
    """
    if not isinstance(x, jax.Array):
        x = jax.numpy.asarray(x)
    n, own = x.shape[0], [shard for shard in x.addressable_shards if shard.replica_id == 0]
    if any(shard.data.shape[1:] != x.shape[1:] for shard in own):
        raise ValueError(f"x of shape {x.shape} is split as {x.sharding}; only its leading axis may be split")
    own.sort(key=lambda shard: shard.index[0].start or 0)
    index = [np.arange(n)[shard.index[0]] for shard in own]
    rows = [np.asarray(shard.data) for shard in own]
    empty = np.empty((0, *x.shape[1:]), x.dtype)
    return np.concatenate([np.empty(0, int), *index]).astype(int), np.concatenate([empty, *rows])


def _check_axis(mesh: Mesh, axis: str) -> None:
    if axis not in mesh.axis_names:
        raise ValueError(
            f"axis is {axis!r}, but the mesh has {', '.join(map(repr, mesh.axis_names))}; give one of them"
        )


def _put(leaf: Any, sharding: NamedSharding) -> Any:
    if isinstance(leaf, jax.Array) and (jax.process_count() == 1 or not leaf.is_fully_addressable):
        return jax.device_put(leaf, sharding)
    values = np.asarray(leaf)  # no process asks the others whether they have the same
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
