"""Runs of more samples than one batch: written as they are made, resumed after any interruption.

    manifest.json            what defines the run: settings, hashes of parameters, references and conditions, versions
    batch-00000.safetensors  "x" [b, *shape]; the batch's trace, "mmd2", "shift_norm" and "relative_shift" [num_steps];
                             and "remembered", if the guidance remembers something other than x (`MMDGuidance.paper`)

Batch i is made from `fold_in(key, i)` and the memory of batches 0 to i − 1, which is read back from their files. So
every batch follows from the manifest and the batches before it. One that is missing or damaged is made again, the same
bit for bit on the same devices. A batch's metadata hold the hash of the manifest's definition, its rows, and the hash
of its whole content, so that each file can be checked by itself. A file appears under its name only once it is whole.

The manifest describes values as JAX uses them (`mmdjax._files.fingerprint`): float64 references as the float32 that
they become. Manifests of the first format describe them as they were given, and functions in less detail; such a run is
resumed if all that its manifest describes is the same.
"""

import contextlib
import json
import os
import platform
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from mmdjax._core.modes import in_own_modes
from mmdjax._core.progress import progress_bar
from mmdjax._files.atomic import write_json
from mmdjax._files.fingerprint import (
    array_bytes,
    arrays_hash,
    as_used,
    describe,
    differences,
    on_host,
    sha256,
    tree_hash,
    with_public_names,
)
from mmdjax._files.lock import NAME as LOCK
from mmdjax._files.lock import locked
from mmdjax._points.mesh import layout_of
from mmdjax._points.particles import Particles, as_particles
from mmdjax.calls import as_memory, check_call, check_count, check_rows
from mmdjax.checkpoint import Checkpoint, CheckpointError, Entry, open_safetensors, write_safetensors
from mmdjax.denoisers import DiffusionModel
from mmdjax.guidance import MMDGuidance
from mmdjax.guidance.advice import Advisor
from mmdjax.guidance.avoid import as_avoid
from mmdjax.memory import Memory
from mmdjax.provenance import provenance
from mmdjax.samplers import DDIM, Sampler
from mmdjax.sampling import sample_with
from mmdjax.schedules import uniform_times
from mmdjax.tree import as_arrays, replace

MANIFEST, FORMAT, FIRST_FORMAT = "manifest.json", "mmdjax run 2", "mmdjax run 1"
FILE = re.compile(r"(batch-\d{5,}\.safetensors|manifest\.json)(\.part)?")
NUMERICS = ("enable_x64", "default_matmul_precision", "threefry_partitionable")
SAID = ("format", "run", "rows")  # what a batch's metadata say of it


@in_own_modes
def sample_many(
    params: Any,
    key: Array,
    refs: Any,
    *,
    model: DiffusionModel,
    num_samples: int,
    out: str | Path,
    batch_size: int,
    cond: Any = None,
    guidance: MMDGuidance = MMDGuidance(),
    sampler: Sampler = DDIM(eta=1.0),
    num_steps: int = 50,
    times: Any = None,
    memory: int | Memory | None = None,
    each: Callable[[int, np.ndarray], None] | None = None,
    progress: bool = False,
    sharding: Any = None,
    checks: bool = False,
    avoid: Any = None,
) -> "SavedSamples":
    """Make any number of samples in batches, into a folder. If a run stops, even by `kill -9`, repeat the call.

    The repeated call resumes the run: it reads the batches that are there and makes those that are missing. At most the
    batch that was being made is lost. A resumed run has the same samples as one that was never stopped, bit for bit on
    the same devices. On other devices, whose sums round differently, they agree to rounding. GPUs repeat their own bits
    only with XLA_FLAGS=--xla_gpu_deterministic_ops=true.

    A call with other settings than the folder's fails and lists the differences. Settings are compared by value, as JAX
    uses them: float64 references equal the same in float32, equal weights equal no weights, and `times` equal to the
    grid of `num_steps` equal `num_steps`. Functions are compared by their code and the values that they close over. Not
    compared: globals that a function reads, the code of installed packages other than mmdjax and JAX, and objects
    without readable contents, such as a generator or an open file.

    The last batch is made in full and cut, so that nothing compiles twice. Its surplus samples take the conditions of
    the first samples.

    Args:
      params, key, refs, model, guidance, sampler, num_steps, times, sharding, checks, avoid: as in `guided_sample`.
        References are an array [m, *model.shape] or `Particles`.
      num_samples: N, the number of samples of the whole run.
      out: a folder for this run alone. It is made if it does not exist.
      batch_size: n, samples made at once. They are guided together.
      cond: conditions of all N samples, a pytree of [N, ...], or None. If that is too large: a function that takes an
        array of b row numbers below N and returns the conditions of these rows, [b, ...].
      memory: the number of samples of earlier batches that are remembered: they count as particles in the guidance but
        do not move, so that many small batches align as one large batch does. Or a `Memory` to begin with. None: each
        batch is guided by itself.
      each: a function each(first_row, x), called for every batch in order once it is on disk, also for those made by an
        earlier call.
      progress: show bars, with the time left.
    Returns:
      SavedSamples: like an array of N samples (`len`, indices, slices, `np.asarray`), read from disk when used.
    Raises:
      FileExistsError: `out` holds other files, or a run with other settings; the message lists the differences.
      BlockingIOError: another process is using `out`.
      OSError: the disk is full, or `out` is read-only or was removed. Repair it and repeat the call.
      FloatingPointError: samples are not finite. Their batch is not kept.
      ValueError, TypeError: as `guided_sample`.
    Warns:
      GuidanceWarning: as `guided_sample`, once for the whole run.

    Example:
      >>> import tempfile
      >>> from mmdjax.schedules import RectifiedFlow
      >>> model = DiffusionModel(lambda params, x, level, cond: params * x, RectifiedFlow(), (2,))
      >>> refs = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
      >>> out = tempfile.mkdtemp()
      >>> settings = {"model": model, "num_samples": 10, "batch_size": 4, "memory": 10, "num_steps": 5, "out": out}
      >>> samples = sample_many(0.5, jax.random.key(0), refs, **settings)
      >>> samples, samples[7:9].shape
      (SavedSamples(10 of float32[2]), (2, 2))
    """
    refs, avoid = None if refs is None else as_particles(refs), as_avoid(avoid)
    check_count("num_samples", num_samples)
    check_count("batch_size", batch_size)
    if not callable(cond):
        cond = as_arrays("cond", cond)
        check_rows(cond, num_samples)
    num_samples, batch_size = int(num_samples), min(int(batch_size), int(num_samples))
    cond = cond if callable(cond) else jax.tree.map(on_host, cond)  # rows are taken there, however it lies on a mesh
    first = _rows(cond, 0, batch_size, num_samples)
    check_call(key, refs, model, batch_size, first, guidance, sampler, None, avoid)
    guided = refs is not None or avoid is not None
    made_with = provenance() | {"devices": 1 if sharding is None else sharding.num_devices}
    given = {
        "num_samples": num_samples,
        "batch_size": batch_size,
        "steps": num_steps if times is None else np.asarray(times),
        "memory": memory,
        "key": key,
        "params": params,
        "refs": refs,
        "cond": cond,
        "model": model,
        "guidance": guidance if guided else None,
        "sampler": sampler,
    } | ({} if avoid is None else {"avoid": avoid})  # runs of before there was one have none
    settings = {
        "model": model, "num_samples": batch_size, "guidance": guidance, "sampler": sampler, "num_steps": num_steps,
        "times": times, "progress": progress, "sharding": sharding, "checks": checks,
    }  # fmt: skip
    if not isinstance(out, str | os.PathLike) or (Path(out).exists() and not Path(out).is_dir()):
        raise NotADirectoryError(f"out is {out!r}, which is not a folder; give one, or a path that does not exist")
    memory = as_memory(memory, model, first)
    advisor = Advisor(batch_size if memory is None else min(num_samples, batch_size + memory.capacity))
    mesh = layout_of(sharding, batch_size, refs, (params, first, memory)).mesh
    process = jax.process_index()
    with locked(out, LOCK if process == 0 else f"{LOCK}-{process}") as lock:
        run = _open_run(Path(out), given, made_with)
        if run.definition["format"] == FORMAT:
            refs = _without_equal_weights(refs)  # as they are described: the same bits however they were given
            avoid = _without_equal_weights(avoid)
        with _bar(num_samples, progress) as bar, _resumable(run):
            for index, (start, stop) in enumerate(run.rows):
                mine = index % jax.process_count() == process  # with several hosts each writes its share
                arrays = run.find(index)
                if arrays is None:
                    lock.check()
                    rows = _rows(cond, start, batch_size, num_samples)
                    key_of_batch, memory = jax.random.fold_in(key, index), _replicated(memory, mesh)
                    samples = sample_with(
                        advisor, params, key_of_batch, refs, cond=rows, memory=memory, avoid=avoid, **settings
                    )
                    memory, arrays = samples.memory, _arrays(samples, guidance, guided, start, stop)
                    if mine:
                        run.write(index, arrays)
                    lock.check()
                else:
                    if memory is not None:
                        rows = _rows(cond, start, batch_size, num_samples)
                        memory = _remember(memory, arrays, rows, batch_size, guidance, guided)
                    if progress:
                        bar.initial += stop - start  # read, not made: no part of the rate
                if each is not None and mine:
                    each(start, arrays["x"])
                bar.update(stop - start)
        if jax.process_count() > 1:
            from jax.experimental.multihost_utils import sync_global_devices

            sync_global_devices("sample_many: all batches are written")
    return run


def load_samples(out: str | Path, *, partial: bool = False) -> "SavedSamples":
    """The samples of a finished run of `sample_many`, read from disk when used; each file is checked by its hash.

    Args:
      out: the run's folder.
      partial: load an unfinished run too, up to its first missing batch.
    Returns:
      SavedSamples, as from `sample_many`.
    Raises:
      FileNotFoundError: there is no run in the folder.
      CheckpointError: the manifest is damaged.
      ValueError: the run is unfinished, and `partial` is False.
    """
    out = Path(out)
    if not (out / MANIFEST).exists():
        raise FileNotFoundError(f"{out}: no {MANIFEST}; give the folder that sample_many wrote")
    manifest = _read_manifest(out)
    if manifest is None:
        raise CheckpointError(f"{out / MANIFEST} is damaged; repeat the call of sample_many, which writes it again")
    run = SavedSamples(out, manifest["definition"])
    missing = [index for index in range(len(run.rows)) if not run.path(index).exists()]
    if not missing:
        return run
    if not partial:
        raise ValueError(
            f"{out} lacks {len(missing)} of {len(run.rows)} batches, the first is {missing[0]}; repeat the call of "
            "sample_many to make them, or load those before it with load_samples(out, partial=True)"
        )
    return SavedSamples(out, run.definition, run.rows[: missing[0]])


class SavedSamples:
    """N samples of one shape on disk, read when they are used; made by `sample_many` and `load_samples`.

    Index them by an integer, a slice, a list or array of integers, or a boolean array [N]; iterate over them; or read
    all by `np.asarray`. `batch(i)` gives a batch with its trace.

    Args:
      folder: the run's folder.
      definition: what defines the run: settings, hashes and versions.
      rows: (first, last + 1) of each batch; None: of all batches.
    Raises:
      CheckpointError: a file that is read is missing or damaged.
    """

    def __init__(self, folder: Path, definition: Mapping[str, Any], rows: list[tuple[int, int]] | None = None):
        self.folder, self.definition = folder, definition
        self.id = sha256([json.dumps(definition, sort_keys=True).encode()])
        n, b = definition["num_samples"], definition["batch_size"]
        self.rows = [(start, min(start + b, n)) for start in range(0, n, b)] if rows is None else rows
        self._sound: set[int] = set()  # batches whose hash was checked
        self._open: tuple[int, Checkpoint] | None = None  # one: each open file takes a descriptor

    def __len__(self) -> int:
        return self.rows[-1][1] if self.rows else 0

    def __repr__(self) -> str:
        if not self.rows:
            return "SavedSamples(none)"
        x = self.batch(0)["x"]
        return f"SavedSamples({len(self)} of {x.dtype.name}{list(x.shape[1:])})"

    def __getitem__(self, rows: Any) -> np.ndarray:
        """One sample, or an array of several. A slice within one file is a view of it.

        Raises:
          IndexError: there is no such sample.
          TypeError: an index of another kind.
        """
        size = self.definition["batch_size"]
        if not isinstance(rows, slice):
            wanted = self._numbers(rows)
            if not wanted.ndim:
                return self.batch(int(wanted) // size)["x"][int(wanted) % size]
            x = self._empty(wanted.shape)
            for index in np.unique(wanted // size):
                here = wanted // size == index
                x[here] = self.batch(int(index))["x"][wanted[here] % size]
            return x
        wanted = range(len(self))[rows]
        if not wanted:
            return self._empty((0,))
        low, high = min(wanted[0], wanted[-1]), max(wanted[0], wanted[-1])
        first = low // size
        parts = [self.batch(i)["x"] for i in range(first, high // size + 1)]
        x = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return x[low - first * size : high + 1 - first * size][:: wanted.step]

    def _numbers(self, rows: Any) -> np.ndarray:
        """An index as integers from 0 to N − 1."""
        n = len(self)
        numbers = np.asarray(rows, int if isinstance(rows, list) and not rows else None)
        if isinstance(rows, tuple) or numbers.dtype.kind not in "iub" or (numbers.dtype == bool and not numbers.ndim):
            raise TypeError(
                f"samples are indexed by {rows!r}; give an integer, a slice, an array of integers, or a boolean array "
                f"[{n}]. For other axes index the result: samples[:10][..., 0]"
            )
        if numbers.dtype == bool:
            if numbers.shape != (n,):
                raise IndexError(f"the boolean index has shape {numbers.shape}; there are {n} samples")
            return np.flatnonzero(numbers)
        out_of_range = numbers[(numbers < -n) | (numbers >= n)]
        if out_of_range.size:
            raise IndexError(f"there is no sample {out_of_range.flat[0]}; there are {n} samples")
        numbers = numbers.astype(int)
        return np.where(numbers < 0, numbers + n, numbers)

    def _empty(self, rows: tuple[int, ...]) -> np.ndarray:
        """An array for samples [*rows, *shape]."""
        if self.rows:
            x = self.batch(0)["x"]
            return np.empty((*rows, *x.shape[1:]), x.dtype)
        dtype = np.float64 if self.definition["numerics"]["enable_x64"] else np.float32  # as noise is drawn
        return np.empty((*rows, *self.definition["model"]["shape"]), dtype)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (sample for index in range(len(self.rows)) for sample in self.batch(index)["x"])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[:], dtype, copy=copy)

    def batch(self, index: int) -> Mapping[str, np.ndarray]:
        """The arrays of one batch: "x" and the trace, "mmd2" and the like. Its hash is checked once."""
        found = self.find(index)
        if found is None:
            raise CheckpointError(
                f"{self.path(index)} is missing or damaged; repeat the call of sample_many to make it again"
            )
        return found

    def find(self, index: int) -> Mapping[str, np.ndarray] | None:
        """The arrays of one batch; None if its file is missing or damaged.

        Raises:
          FileExistsError: the file belongs to another run.
        """
        if self._open is not None and self._open[0] == index:
            return self._open[1]
        try:
            file = open_safetensors(self.path(index))
        except (FileNotFoundError, CheckpointError):
            return None
        if index not in self._sound:
            said = [file.metadata.get(key, "") for key in SAID]
            if arrays_hash(file, *said) != file.metadata.get("sha256"):
                return None
            if said[1] != self.id:
                raise FileExistsError(f"{self.path(index)} is of another run; give another folder, or remove the file")
            if said != self._said(index):  # another batch's
                return None
            self._sound.add(index)
        self._open = (index, file)
        return file

    def write(self, index: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the file of one batch."""
        said = self._said(index)
        metadata = dict(zip(SAID, said, strict=True)) | {"sha256": arrays_hash(arrays, *said)}
        entries = {key: Entry(x.shape, x.dtype, lambda x=x: x) for key, x in arrays.items()}
        write_safetensors(self.path(index), entries, metadata)

    def path(self, index: int) -> Path:
        """The file of one batch."""
        return self.folder / f"batch-{index:05d}.safetensors"

    def _said(self, index: int) -> list[str]:
        start, stop = self.rows[index]
        return [self.definition["format"], self.id, f"{start}:{stop}"]


def _define(given: Mapping[str, Any], made_with: Mapping[str, Any], form: str) -> dict[str, Any]:
    """The definition of a run for its manifest, from the arguments of the call."""
    used, values = form == FORMAT, dict(given)
    params = f"sha256 {tree_hash(values.pop('params'), used=used)}"
    if used:
        for name in ("refs", "avoid"):
            if name in values:
                values[name] = _without_equal_weights(values[name])
        held = values["memory"]
        if isinstance(held, Memory) and not on_host(held.particles.weight).any() and not on_host(held.next):
            values["memory"] = held.capacity  # an empty one is made from it
        values = as_used(values) | {"steps": _steps(values["steps"])}
    told = {name: describe(value) for name, value in values.items()}
    versions = {name: made_with[name] for name in ("mmdjax", "jax", "jaxlib")}
    definition = told | {
        "format": form,
        "params": params,
        "versions": versions | {"python": ".".join(platform.python_version_tuple()[:2])},
        "numerics": {name: getattr(jax.config, f"jax_{name}") for name in NUMERICS},
    }
    return json.loads(json.dumps(definition))  # as it is read back


def _steps(times: Any) -> Any:
    """The number of steps of `guided_sample`'s default grid, or a text for any other grid."""
    times = as_used(times)
    if np.ndim(times) != 1 or len(times) < 2:
        return times
    count = len(times) - 1
    own = as_used(uniform_times(count))
    if times.dtype == own.dtype and np.array_equal(times, own):
        return count
    shown = " to ".join(f"{times[i]:.6g}" for i in (0, -1))
    return f"a grid of {count} steps from t = {shown} sha256 {sha256(array_bytes({'': times}))}"


def _without_equal_weights(refs: Any) -> Any:
    if refs is None or refs.weight is None:
        return refs
    weight = on_host(refs.weight)
    return replace(refs, weight=None) if (weight == weight[0]).all() else refs


def _open_run(out: Path, given: Mapping[str, Any], made_with: dict[str, Any]) -> SavedSamples:
    """The run in a folder; a new one if there is none, or none with a batch.

    Raises:
      FileExistsError: the folder holds other files, or a run of another definition.
    """
    found = [path for path in out.iterdir() if not path.name.startswith(LOCK)]
    strange = [path.name for path in found if not FILE.fullmatch(path.name)]
    manifest, begun = _read_manifest(out), any(path.suffix == ".safetensors" for path in found)
    if manifest is None and strange:
        raise FileExistsError(
            f"{out} holds {', '.join(strange[:3])} but no run; nothing was overwritten. Give an empty folder, or one "
            "that does not exist"
        )
    if manifest is None or not begun:
        definition = _define(given, made_with, FORMAT)
        if jax.process_index() == 0:
            with _resumable(SavedSamples(out, definition)):
                write_json(out / MANIFEST, {"definition": definition, "made_with": made_with})
    else:
        definition = manifest["definition"]  # its batches name it by its hash
        first = definition["format"] == FIRST_FORMAT
        now = _define(given, made_with, definition["format"])
        lines = differences(with_public_names(definition), now, told=first)
        if lines:
            raise FileExistsError(
                f"{out} holds a run of other settings; nothing was changed. Give another folder, or the run's "
                "settings:" + "".join(f"\n  {line}" for line in lines).replace("\n  refs.x ", "\n  refs ")
            )
        before = manifest.get("made_with", {})
        if any(before.get(key) != made_with[key] for key in ("device", "devices")):
            here, then = (f"{made.get('devices')} × {made.get('device')}" for made in (made_with, before))
            warnings.warn(
                f"{out} was begun on {then}, and this is {here}: the samples agree with those of one of them to "
                "rounding, not bit for bit",
                stacklevel=3,
            )
    for path in found:
        if path.suffix == ".part" and path.name not in strange and jax.process_index() == 0:
            path.unlink(missing_ok=True)  # of a process that was killed
    return SavedSamples(out, definition)


def _read_manifest(out: Path) -> dict[str, Any] | None:
    """The manifest; None if there is none or it is damaged, as the batches tell to which run they belong."""
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        definition = manifest["definition"]
        return manifest if definition["format"] in (FORMAT, FIRST_FORMAT) and definition["num_samples"] else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _replicated(memory: Any, mesh: Any) -> Any:
    # a memory that was read must lie as one that was made, or another program is compiled, which rounds differently
    return memory if mesh is None else jax.device_put(memory, NamedSharding(mesh, P()))


def _rows(cond: Any, start: int, count: int, num_samples: int) -> Any:
    rows = np.arange(start, start + count) % num_samples  # beyond the last one the first ones again
    return cond(rows) if callable(cond) else jax.tree.map(lambda leaf: jnp.asarray(leaf[rows]), cond)


def _arrays(samples: Any, guidance: MMDGuidance, guided: bool, start: int, stop: int) -> dict[str, np.ndarray]:
    """The arrays for a batch's file."""
    count = stop - start
    trace = {name: getattr(samples.trace, name) for name in ("mmd2", "shift_norm", "relative_shift")}
    arrays = {"x": samples.x, **trace}
    if samples.memory is not None and guided and guidance.placement.keeps_unshifted:
        held, size = samples.memory, len(samples.x)
        kept = min(size, held.capacity)
        slots = (int(on_host(held.next)) - kept + np.arange(kept)) % held.capacity
        arrays["remembered"] = on_host(held.particles.x)[slots]
    arrays = {name: on_host(x) for name, x in arrays.items()}
    arrays["x"] = arrays["x"][:count]  # not before: devices may share the batch equally only
    if not np.isfinite(arrays["x"]).all():
        finite = np.isfinite(arrays["x"]).reshape(count, -1).all(1)
        raise FloatingPointError(
            f"samples {(start + np.flatnonzero(~finite)).tolist()[:10]} are not finite, and their batch was not kept; "
            "checks=True names the step where it begins"
        )
    return arrays


def _remember(
    memory: Memory, arrays: Mapping[str, np.ndarray], cond: Any, size: int, guidance: MMDGuidance, guided: bool
) -> Memory:
    """The memory after a batch that was read from its file, the same as `guided_sample` left it.

    Args:
      cond: the conditions of the whole batch; a run's last file holds only its first samples.
      size: how many samples were made.
    """
    memory, cond = _here(memory), _here(cond)
    if guided:
        memory = guidance.placement.begin(memory)
    if "remembered" in arrays:
        last = arrays["remembered"]
        x = np.zeros((size, *last.shape[1:]), last.dtype)  # in their own slots: those before them are overwritten
        x[size - len(last) :] = last
    else:
        x = arrays["x"]
        cond = jax.tree.map(lambda leaf: leaf[: len(x)], cond)
    return memory.push(Particles(jnp.asarray(x), cond))


def _here(tree: Any) -> Any:
    # on one device: operations outside `jit` need to be told how results lie on a mesh of Explicit axes
    return jax.tree.map(lambda leaf: jnp.asarray(on_host(leaf)), tree)


def _bar(num_samples: int, shown: bool) -> Any:
    return progress_bar(total=num_samples, desc="samples", unit="sample", smoothing=0, disable=not shown)


@contextlib.contextmanager
def _resumable(run: SavedSamples) -> Iterator[None]:
    """Add to an error that stops a run how to resume it."""
    try:
        yield
    except KeyboardInterrupt as error:
        error.add_note(_state(run))
        raise
    except OSError as error:
        if error.errno is None:
            raise  # one of this module's own
        raise OSError(error.errno, f"{error.strerror or error}; {_state(run)}", error.filename) from error


def _state(run: SavedSamples) -> str:
    if not (run.folder / MANIFEST).exists():
        return "nothing of the run is left there; repeat the call to begin it again"
    there = sum(stop - start for i, (start, stop) in enumerate(run.rows) if run.path(i).exists())
    return f"{there} of {len(run)} samples are in {run.folder}; repeat the call to resume the run"
