"""Runs of more samples than one batch: written as they are made, resumed after any interruption.

    manifest.json            what defines the run: settings, hashes of parameters, references and conditions, versions
    batch-00000.safetensors  "x" [b, *shape]; the batch's trace, "mmd2" and "shift_norm" [num_steps]; and, where the
                             guidance remembers something else than x (`MMDGuidance.paper`), "remembered"

Batch i is made from `fold_in(key, i)` and the memory of batches 0 to i − 1, which is read back from their files. So
every batch follows from the manifest and the batches before it, and one that is missing or damaged is made again, the
same bit for bit on the same devices. A batch's metadata hold the hash of the manifest's definition, its rows, and the
hash of all of it, so that a file vouches for itself; files appear under their names once they are whole.
"""

import contextlib
import json
import platform
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from mmdjax.checkpoint import Checkpoint, CheckpointError, Entry, open_safetensors, write_safetensors
from mmdjax.denoisers import DiffusionModel
from mmdjax.guidance import MMDGuidance
from mmdjax.identity import arrays_hash, describe, differences, on_host, sha256, tree_hash
from mmdjax.lock import NAME as LOCK
from mmdjax.lock import locked
from mmdjax.memory import Memory
from mmdjax.particles import Particles, as_particles
from mmdjax.progress import progress_bar
from mmdjax.provenance import provenance
from mmdjax.samplers import DDIM, Sampler
from mmdjax.sampling import as_memory, check_call, guided_sample
from mmdjax.whole import write_json

MANIFEST, FORMAT = "manifest.json", "mmdjax run 1"
FILE = re.compile(r"(batch-\d{5,}\.safetensors|manifest\.json)(\.part)?")
NUMERICS = ("enable_x64", "default_matmul_precision", "threefry_partitionable")
SAID = ("format", "run", "rows")  # what a batch's metadata say of it


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
) -> "SavedSamples":
    """Make any number of samples in batches, into a folder; the same call goes on where an earlier one was cut off.

    Whatever ends a run, `kill -9` included, costs at most the batch that was being made. A run that was resumed has the
    arrays of one that was not, bit for bit on the same devices; on others, whose sums round differently, they agree to
    rounding (GPUs: only with XLA_FLAGS=--xla_gpu_deterministic_ops=true do they repeat their own bits).

    The last batch is made in full and cut, so that nothing compiles twice; with conditions, those of its surplus are
    the first ones again.

    Args:
      params, key, refs, model, guidance, sampler, num_steps, times, sharding, checks: as in `guided_sample`.
      num_samples: N, of the whole run.
      out: a folder of its own, made where there is none. The run's files there are resumed.
      batch_size: samples made at once.
      cond: all N samples' conditions, a pytree of [N, ...], or None; or where these would be too large a function of
        rows, an array of b integers below N, that returns theirs, [b, ...].
      memory: None, the capacity of a memory of earlier batches, or the memory to begin with. With it many small batches
        align as one large batch does.
      each: called with the first row and x of each batch that is on disk, in order; also of those made earlier.
      progress: show bars, with the time left.
    Returns:
      The samples, read from disk as they are used.
    Raises:
      FileExistsError: `out` holds something else, or a run of other settings; they are named.
      BlockingIOError: another process is at work in `out`.
      OSError: the disk is full, or `out` is read-only or was removed; once it is repaired, the same call goes on.
      FloatingPointError: samples are not finite; nothing of that batch is kept.
      ValueError, TypeError: as `guided_sample`.

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
    refs = None if refs is None else as_particles(refs)
    for name, number in (("num_samples", num_samples), ("batch_size", batch_size)):
        if not isinstance(number, (int, np.integer)) or number < 1:
            raise ValueError(f"{name} is {number}; give an integer of at least 1")
    for leaf in () if callable(cond) else jax.tree.leaves(cond):
        if np.shape(leaf)[:1] != (num_samples,):
            raise ValueError(f"cond has shape {np.shape(leaf)}; it needs one row for each of the {num_samples} samples")
    num_samples, batch_size = int(num_samples), min(int(batch_size), int(num_samples))
    first = _rows(cond, 0, batch_size, num_samples)
    check_call(key, refs, model, batch_size, first, guidance, sampler, None)
    made_with = provenance() | {"devices": 1 if sharding is None else sharding.num_devices}
    definition = {
        "format": FORMAT,
        "num_samples": num_samples,
        "batch_size": batch_size,
        "steps": describe(num_steps if times is None else np.asarray(times)),
        "memory": describe(memory),
        "key": describe(key),
        "params": f"sha256 {tree_hash(params)}",
        "refs": describe(refs),
        "cond": describe(cond),
        "model": describe(model),
        "guidance": None if refs is None else describe(guidance),
        "sampler": describe(sampler),
        "versions": {name: made_with[name] for name in ("mmdjax", "jax", "jaxlib")}
        | {"python": ".".join(platform.python_version_tuple()[:2])},
        "numerics": {name: getattr(jax.config, f"jax_{name}") for name in NUMERICS},
    }
    settings = {
        "model": model, "num_samples": batch_size, "guidance": guidance, "sampler": sampler, "num_steps": num_steps,
        "times": times, "progress": progress, "sharding": sharding, "checks": checks,
    }  # fmt: skip
    memory = as_memory(memory, model, first)
    process = jax.process_index()
    with locked(out, LOCK if process == 0 else f"{LOCK}-{process}") as lock:
        run = _open_run(Path(out), definition, made_with)
        with _bar(num_samples, progress) as bar, _resumable(run):
            for index, (start, stop) in enumerate(run.rows):
                mine = index % jax.process_count() == process  # with several hosts each writes its share
                arrays = run.find(index)
                if arrays is None:
                    lock.check()
                    rows = _rows(cond, start, batch_size, num_samples)
                    key_of_batch, memory = jax.random.fold_in(key, index), _replicated(memory, sharding)
                    samples = guided_sample(params, key_of_batch, refs, cond=rows, memory=memory, **settings)
                    memory, arrays = samples.memory, _arrays(samples, guidance, refs, start, stop)
                    if mine:
                        run.write(index, arrays)
                    lock.check()
                else:
                    memory = _remember(memory, arrays, _rows(cond, start, stop - start, num_samples), guidance, refs)
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
    """The samples of a finished run of `sample_many`, read from disk as they are used, each file checked by its hash.

    Args:
      out: the run's folder.
      partial: take what there is of an unfinished run, up to the first batch that is missing.
    Raises:
      FileNotFoundError: no run there.
      CheckpointError: the manifest is damaged.
      ValueError: the run is unfinished.
    """
    out = Path(out)
    if not (out / MANIFEST).exists():
        raise FileNotFoundError(f"{out}: no {MANIFEST}; give the folder that sample_many wrote")
    manifest = _read_manifest(out)
    if manifest is None:
        raise CheckpointError(f"{out / MANIFEST} is damaged; call sample_many again as before, which writes it anew")
    run = SavedSamples(out, manifest["definition"])
    missing = [index for index in range(len(run.rows)) if not run.path(index).exists()]
    if not missing:
        return run
    if not partial:
        raise ValueError(
            f"{out} lacks {len(missing)} of {len(run.rows)} batches, the first being {missing[0]}; call sample_many "
            "again as before, which makes them, or take what there is with load_samples(out, partial=True)"
        )
    return SavedSamples(out, run.definition, run.rows[: missing[0]])


class SavedSamples:
    """Samples on disk, N of one shape: indexed, sliced and iterated as an array of them; `np.asarray` reads all.

    Args:
      folder: of the run.
      definition: what defines the run: settings, hashes and versions.
      rows: (first, last + 1) of each batch; None: the whole run's.
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

    def __getitem__(self, rows: int | slice) -> np.ndarray:
        """One sample, or those of a slice; a view of the file where one file holds them."""
        size, wanted = self.definition["batch_size"], range(len(self))[rows]
        if isinstance(wanted, int):
            return self.batch(wanted // size)["x"][wanted % size]
        low, high = (min(wanted[0], wanted[-1]), max(wanted[0], wanted[-1])) if wanted else (0, -1)
        first = low // size
        parts = [self.batch(i)["x"] for i in range(first, max(first, high // size) + 1)]
        x = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return x[low - first * size : high + 1 - first * size][:: wanted.step]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (sample for index in range(len(self.rows)) for sample in self.batch(index)["x"])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def batch(self, index: int) -> Mapping[str, np.ndarray]:
        """The arrays of one batch: "x" and the trace, "mmd2" and "shift_norm"; its hash is checked at the first use."""
        found = self.find(index)
        if found is None:
            raise CheckpointError(
                f"{self.path(index)} is missing or damaged; call sample_many again as before, which makes it anew"
            )
        return found

    def find(self, index: int) -> Mapping[str, np.ndarray] | None:
        """The arrays of one batch; None where its file is missing or damaged.

        Raises:
          FileExistsError: the file is another run's.
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
                raise FileExistsError(f"{self.path(index)} is of another run; give another folder, or remove it")
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
        return [FORMAT, self.id, f"{start}:{stop}"]


def _open_run(out: Path, definition: dict[str, Any], made_with: dict[str, Any]) -> SavedSamples:
    """The run in a folder, begun where it has none, or none with a batch.

    Raises:
      FileExistsError: the folder holds something else, or a run of another definition.
    """
    found = [path for path in out.iterdir() if not path.name.startswith(LOCK)]
    strange = [path.name for path in found if not FILE.fullmatch(path.name)]
    manifest, begun = _read_manifest(out), any(path.suffix == ".safetensors" for path in found)
    if manifest is None and strange:
        raise FileExistsError(
            f"{out} holds {', '.join(strange[:3])} but no run; nothing was overwritten. Give an empty folder, or none"
        )
    definition = json.loads(json.dumps(definition))  # as it is read back
    if manifest is None or not begun:
        if jax.process_index() == 0:
            with _resumable(SavedSamples(out, definition)):
                write_json(out / MANIFEST, {"definition": definition, "made_with": made_with})
    else:
        lines = differences(manifest["definition"], definition)
        if lines:
            raise FileExistsError(
                f"{out} holds a run of other settings; nothing was changed. Give another folder, or these settings:"
                + "".join(f"\n  {line}" for line in lines)
            )
        before = manifest.get("made_with", {})
        if any(before.get(key) != made_with[key] for key in ("device", "devices")):
            now, then = (f"{made.get('devices')} × {made.get('device')}" for made in (made_with, before))
            warnings.warn(
                f"{out} was begun on {then}, and this is {now}: the samples agree with those of one of them to "
                "rounding, not bit for bit",
                stacklevel=3,
            )
    for path in found:
        if path.suffix == ".part" and path.name not in strange and jax.process_index() == 0:
            path.unlink(missing_ok=True)  # of a process that was killed
    return SavedSamples(out, definition)


def _read_manifest(out: Path) -> dict[str, Any] | None:
    """The manifest; None where there is none, or it is damaged: the batches know whose they are."""
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        definition = manifest["definition"]
        return manifest if definition["format"] == FORMAT and definition["num_samples"] else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _replicated(memory: Any, sharding: Any) -> Any:
    # a memory that was read must lie as one that was made, or another program is compiled, which rounds differently
    mesh = getattr(sharding, "mesh", None)
    return memory if mesh is None else jax.device_put(memory, NamedSharding(mesh, PartitionSpec()))


def _rows(cond: Any, start: int, count: int, num_samples: int) -> Any:
    rows = np.arange(start, start + count) % num_samples  # beyond the last one the first ones again
    return cond(rows) if callable(cond) else jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], cond)


def _arrays(samples: Any, guidance: MMDGuidance, refs: Any, start: int, stop: int) -> dict[str, np.ndarray]:
    """What a batch's file holds."""
    count = stop - start
    arrays = {"x": samples.x, "mmd2": samples.trace.mmd2, "shift_norm": samples.trace.shift_norm}
    if samples.memory is not None and refs is not None and guidance.published:  # it remembers x before its last shift
        held, size = samples.memory, len(samples.x)
        kept = min(size, held.capacity)
        slots = (int(held.next) - kept + np.arange(kept)) % held.capacity
        arrays["remembered"] = held.particles.x[slots]
    arrays = {name: on_host(x) for name, x in arrays.items()}
    arrays["x"] = arrays["x"][:count]  # not before: devices may share the batch equally only
    if not np.isfinite(arrays["x"]).all():
        finite = np.isfinite(arrays["x"]).reshape(count, -1).all(1)
        raise FloatingPointError(
            f"samples {(start + np.flatnonzero(~finite)).tolist()[:10]} are not finite, and their batch was not kept; "
            "checks=True names the step where it begins"
        )
    return arrays


def _remember(memory: Any, arrays: Mapping[str, np.ndarray], cond: Any, guidance: MMDGuidance, refs: Any) -> Any:
    """The memory after a batch that was read, as `guided_sample` would have left it."""
    if memory is None:
        return None
    if refs is not None and guidance.published:
        memory, x = memory.reset_when_full(), arrays["remembered"]
        cond = jax.tree.map(lambda leaf: leaf[-len(x) :], cond)
    else:
        x = arrays["x"]
    return memory.push(Particles(jnp.asarray(x), cond))


def _bar(num_samples: int, shown: bool) -> Any:
    return progress_bar(total=num_samples, desc="samples", unit="sample", smoothing=0, disable=not shown)


@contextlib.contextmanager
def _resumable(run: SavedSamples) -> Iterator[None]:
    """Say in what interrupts a run how to go on."""
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
        return "nothing of the run is left there; the same call begins it again"
    there = sum(stop - start for i, (start, stop) in enumerate(run.rows) if run.path(i).exists())
    return f"{there} of {len(run)} samples are in {run.folder}, and the same call goes on from there"
