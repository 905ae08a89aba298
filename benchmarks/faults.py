"""What runs and files survive: each fault is caused for real, many times, and what is left is compared with what should
be. Fuzzed files are in `fuzz.py`.

A run is of `sample_many` with a memory, on an analytic model. "whole" means that every array on disk has the bytes of
an uninterrupted run's.

    python benchmarks/faults.py        (as root, on Linux: full and read-only disks are mounted)
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import fuzz
import jax
from common import table, write_json

from mmdjax import DiffusionModel, load_samples, sample_many
from mmdjax.checkpoint import CheckpointError
from mmdjax.provenance import provenance
from mmdjax.schedules import VPLinear

RESULTS = Path(__file__).parent / "results" / "faults.json"
COUNTS = {"kill": 20, "full": 10, "read_only": 5, "vanish": 5, "corrupt": 200, "second": 10, "fuzz": 1000, "api": 1000}
NAMES = {
    "kill": ("`kill -9` at a random moment, then the same call", "whole"),
    "full": ("disk full, space made, then the same call", "an error that says so, then whole"),
    "read_only": ("folder turned read-only, back, then the same call", "an error that says so, then whole"),
    "vanish": ("folder removed during the run, then the same call", "an error that says so, then whole"),
    "corrupt": ("a batch's file damaged on disk, then the same call", "found by its hash, made anew: whole"),
    "second": ("a second run in the same folder", "refused, naming the first"),
    "fuzz": ("fuzzed safetensors, archives and configurations", "an error or a correct load, memory and time bounded"),
    "api": ("random trees, shapes and types through the API", "a documented result, ValueError or TypeError"),
}
SIZE, BATCH, BATCHES = 64, 32, 12
NOBODY = 65534


def denoise(params, x, level, cond):
    """Of Gaussian data of mean `params`."""
    return params + level.alpha * (x - level.alpha * params) / (level.alpha**2 + level.sigma**2)


def run(out: Path, **changes: Any):
    """192 KiB a batch, so that kills fall into writes, too."""
    refs = 0.3 * jax.random.normal(jax.random.key(1), (10, SIZE, SIZE // 4)) + 1
    settings = {"num_samples": BATCH * BATCHES - 5, "batch_size": BATCH, "memory": 2 * BATCH, "num_steps": 4} | changes
    model = DiffusionModel(denoise, VPLinear(), (SIZE, SIZE // 4))
    return sample_many(0.5, jax.random.key(7), refs, model=model, out=out, **settings)


def arrays(out: Path) -> list[bytes]:
    samples = load_samples(out)
    return [samples.batch(i)[key].tobytes() for i in range(len(samples.rows)) for key in ("x", "mmd2", "shift_norm")]


def child(out: Path, *words: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, __file__, "--child", str(out), *words], stdout=subprocess.PIPE, text=True)


def kill(count: int, whole: list[bytes], folder: Path) -> dict[str, Any]:
    """At a moment drawn from the start, imports included, or around any of the batches; this process goes on."""
    held, left = 0, []
    for trial in range(count):
        rng, out = random.Random(trial), folder / f"kill{trial}"
        process, last = child(out), rng.randrange(-3, BATCHES)
        while last >= 0 and not (out / f"batch-{last:05d}.safetensors").exists() and process.poll() is None:
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.03 if last >= 0 else 5))
        process.kill()
        process.communicate()
        left.append(len(list(out.glob("batch-*.safetensors"))) if out.exists() else 0)
        run(out)
        held += process.returncode == -9 and arrays(out) == whole
    return {"tried": count, "held": held, "batches_left": left, "of_batches": BATCHES}


@contextlib.contextmanager
def mounted(folder: Path, size: int):
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def remount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", folder], check=True)


def interrupted(out: Path, error: type[BaseException], says: str, **changes: Any) -> bool:
    try:
        run(out, **changes)
    except error as caught:
        return says in str(caught)
    return False


def full(count: int, whole: list[bytes], folder: Path) -> dict[str, Any]:
    """A file system with room for none to most of the batches, then grown."""
    held = 0
    for trial in range(count):
        disk = folder / f"full{trial}"
        with mounted(disk, 4 + trial * 128 * BATCHES // count):
            said = interrupted(disk / "out", OSError, "No space left on device")
            remount(disk, "size=16m")
            run(disk / "out")
            held += said and arrays(disk / "out") == whole
    return {"tried": count, "held": held}


def read_only(count: int, whole: list[bytes], folder: Path) -> dict[str, Any]:
    """As a user whom permissions bind: the folder loses them during a run; then its file system is read-only."""
    folder.chmod(0o755)
    held = 0
    for trial in range(count):
        disk = folder / f"read_only{trial}"
        with mounted(disk, 16000), contextlib.ExitStack() as back:
            disk.chmod(0o777)
            out = disk / "out"

            def each(start, x, out=out, at=trial * BATCH):
                if start == at:
                    out.chmod(0o555)

            os.seteuid(NOBODY)
            back.callback(os.seteuid, 0)
            said = interrupted(out, PermissionError, "Permission denied", each=each)
            out.chmod(0o755)
            os.seteuid(0)
            remount(disk, "ro")
            os.seteuid(NOBODY)
            said &= interrupted(out, OSError, "Read-only file system")
            os.seteuid(0)
            remount(disk, "rw")
            os.seteuid(NOBODY)
            run(out)
            held += said and arrays(out) == whole
    return {"tried": count, "held": held}


def vanish(count: int, whole: list[bytes], folder: Path) -> dict[str, Any]:
    held = 0
    for trial in range(count):
        out = folder / f"vanish{trial}"

        def each(start, x, out=out, at=trial * BATCH):
            if start == at:
                shutil.rmtree(out)

        said = interrupted(out, FileNotFoundError, "the folder was removed or replaced", each=each) and not out.exists()
        run(out)
        held += said and arrays(out) == whole
    return {"tried": count, "held": held}


def corrupt(count: int, whole: list[bytes], folder: Path) -> dict[str, Any]:
    """A bit turned, a block zeroed, the file cut, emptied, or replaced by another batch's."""
    out, held, kinds = folder / "corrupt", 0, {}
    run(out)
    for trial in range(count):
        rng = random.Random(trial)
        path = out / f"batch-{rng.randrange(BATCHES):05d}.safetensors"
        data, kind = bytearray(path.read_bytes()), rng.choice(("bit", "bit", "block", "cut", "emptied", "swapped"))
        at = rng.randrange(len(data) - 512) if rng.random() < 0.5 else rng.randrange(400)  # half of them in the header
        if kind == "bit":
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "block":
            data[at : at + 512] = bytes(512)
        elif kind == "cut":
            del data[at:]
        elif kind == "emptied":
            data.clear()
        else:
            data[:] = (out / f"batch-{(int(path.stem[-5:]) + 1) % BATCHES:05d}.safetensors").read_bytes()
        path.write_bytes(data)
        try:  # a bit of white space may turn: then it is read as it was
            found = arrays(out) == whole
        except CheckpointError:
            found = True
        run(out)
        held += found and arrays(out) == whole
        kinds[kind] = kinds.get(kind, 0) + 1
    return {"tried": count, "held": held, "kinds": kinds}


def second(count: int, whole: list[bytes], folder: Path) -> dict[str, Any]:
    """While another process is at work there; and not after it was killed."""
    out, held = folder / "second", 0
    first = child(out, "wait")
    assert first.stdout is not None
    first.stdout.readline()  # it is in the midst
    for _ in range(count):
        held += interrupted(out, BlockingIOError, f"process {first.pid} on")
    first.kill()
    first.communicate()
    run(out)
    return {"tried": count, "held": held if arrays(out) == whole else 0}


CASES = {f.__name__: f for f in (kill, full, read_only, vanish, corrupt, second)}


def markdown(results: dict[str, Any]) -> str:
    """The table of benchmarks/README.md."""
    cases = results["cases"]
    held = {name: f"{cases[name]['held']:,} of {cases[name]['tried']:,}" for name in NAMES}
    return table(["fault", "expected", "held"], [[*said, held[name]] for name, said in NAMES.items()])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="*", default=list(COUNTS), choices=list(COUNTS), help="the others stay as they are"
    )
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return in_child(*args.child)
    warnings.simplefilter("error")
    cases = json.loads(RESULTS.read_text())["cases"] if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(folder / "whole")
        whole = arrays(folder / "whole")
        for case in args.only:
            start = time.perf_counter()
            if case in CASES:
                cases[case] = CASES[case](COUNTS[case], whole, folder)
            else:
                cases[case] = getattr(fuzz, case)(COUNTS[case])
            cases[case]["seconds"] = round(time.perf_counter() - start, 1)
            print(case, cases[case], flush=True)
            found = {name: cases[name] for name in COUNTS if name in cases}
            write_json(RESULTS, {**provenance(), "cases": found})
    if len(cases) == len(COUNTS):
        print(markdown({"cases": cases}))


def in_child(out: str, wait: str = ""):
    def each(start, x):
        if wait and start == 2 * BATCH:
            print("in the midst", flush=True)
            time.sleep(600)

    run(Path(out), each=each)


if __name__ == "__main__":
    main()
