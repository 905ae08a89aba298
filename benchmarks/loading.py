"""Loading Stable Diffusion 1.5 at full size: its memory over the parameters', its time over that of reading the files.

Checkpoints of random weights, written a tensor at a time by `mmdjax.sd`. Each measurement is a fresh process; loading
(`mmdjax.sd.load`, all three networks) and reading (all files with `Path.read_bytes`, held) alternate, and the ratio is
of their medians. Memory is anonymous (RssAnon, of which pages of the mapped file are no part), its peak beyond what the
process held before. "warm": the files are in the page cache; "cold": evicted from it before, though not from what
caches a virtual disk may have below. "cpu" is the ratio of processor times, which a busy machine changes less. "passed"
is reading through one buffer of 16 MiB, nothing held: a bound that no model in memory can meet, whose pages alone take
longer to come by.

    python benchmarks/loading.py [--rounds 5] [--folder on-a-disk-with-6-GB]
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import memory, write_json

PEAK, TIME = 1.3, 2.5  # at most
CASES = {  # how it lies on disk, the dtype there, the dtype that it is cast to
    "folder, float32": ("folder", "float32", None),
    "single file, float32": ("single", "float32", None),
    "saved by mmdjax, float32": ("saved", "float32", None),
    "folder, float16": ("folder", "float16", None),
    "folder, float16 to bfloat16": ("folder", "float16", "bfloat16"),
}
KINDS = ("read", "load", "passed")
BUFFER = 2**24


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each kind (default 5)")
    parser.add_argument("--folder", help="where to write the checkpoints, one at a time (default: the system's)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "loading.json")
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(*args.child)
    from mmdjax.provenance import provenance

    results, at = {}, None
    print(f"{'':30}{'size':>8}{'memory':>8}{'':>8}{'read':>8}{'load':>8}{'ratio':>8}{'cpu':>8}{'passed':>8}")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for name, (layout, dtype, cast) in CASES.items():
            if (layout, dtype) != at:
                shutil.rmtree(Path(folder) / "model", ignore_errors=True)
                path, at = write(Path(folder) / "model", layout, dtype), (layout, dtype)
            row = results[name] = measure(path, cast, args.rounds)
            for state in ("warm", "cold"):
                read, load, passed = (statistics.median(row[state][kind]) for kind in KINDS)
                cpu = [statistics.median(row[state][f"{kind}, cpu"]) for kind in KINDS]
                row[state] |= {"ratio": load / read, "ratio, cpu": cpu[1] / cpu[0]}
                head = f"{name:30}{row['bytes'] / 1e9:6.2f}GB{row['memory']:8.3f}" if state == "warm" else ""
                times = f"{read:7.2f}s{load:7.2f}s{load / read:8.2f}{cpu[1] / cpu[0]:8.2f}{passed:7.2f}s"
                print(f"{head:46}{state:>8}{times}", flush=True)
    print(f"at most: memory {PEAK}, ratio {TIME}")
    load = {"load_average": os.getloadavg()}
    write_json(args.out, {**provenance(), **load, "cases": results})


def write(path: Path, layout: str, dtype: str) -> Path:
    import sd15

    path.mkdir()
    if layout == "single":
        path = path / "model.safetensors"
    {"folder": sd15.write_folder, "single": sd15.write_single, "saved": sd15.write_saved}[layout](path, dtype)
    os.sync()  # what is not written yet cannot be evicted
    return path


def measure(path: Path, cast: str | None, rounds: int) -> dict[str, Any]:
    """Seconds of each kind, warm and cold, and the largest peak of memory over the parameters' bytes."""
    row: dict[str, Any] = {"warm": {}, "cold": {}, "memory": 0.0}
    for _ in range(rounds):
        for state in ("warm", "cold"):
            for kind in KINDS:
                prepare(path, cold=state == "cold")
                said, peak = run(kind, str(path), *([cast] if cast else []))
                row[state].setdefault(kind, []).append(said["seconds"])
                row[state].setdefault(f"{kind}, cpu", []).append(said["cpu"])
                if kind == "load":
                    row["bytes"] = said["bytes"]
                    row["memory"] = max(row["memory"], (peak - said["anonymous_before"]) / said["bytes"])
    return row


def files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.rglob("*.safetensors"))


def prepare(path: Path, cold: bool) -> None:
    """Bring the files into the page cache, or have them out of it."""
    for file in files(path):
        if cold:
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            pass_through(file)


def pass_through(file: Path) -> None:
    buffer = bytearray(BUFFER)
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(buffer):
            pass


def run(*arguments: str) -> tuple[dict[str, Any], int]:
    """What a child says, and the peak of its anonymous memory, watched from here: a busy child could not look."""
    command = [sys.executable, __file__, "--child", *arguments]
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, memory("RssAnon", process.pid))
            time.sleep(0.002)
        assert process.stdout is not None
        said = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return json.loads(said), peak


def child(kind: str, name: str, cast: str | None = None):
    path, said = Path(name), {}
    if kind == "load":
        import jax
        import jax.numpy as jnp

        from mmdjax.sd import load

        jnp.zeros(1).block_until_ready()  # the backend's start is not loading
        said["anonymous_before"] = memory("RssAnon")
    start, start_cpu = time.perf_counter(), time.process_time()
    if kind == "load":
        _, params = jax.block_until_ready(load(path, param_dtype=cast))
    elif kind == "read":
        held = [file.read_bytes() for file in files(path)]
    else:
        for file in files(path):
            pass_through(file)
    said |= {"seconds": time.perf_counter() - start, "cpu": time.process_time() - start_cpu}
    if kind == "load":
        leaves = jax.tree.leaves(params)
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype(cast)} if cast else True
        said["bytes"] = sum(leaf.nbytes for leaf in leaves)
    elif kind == "read":
        said["bytes"] = sum(map(len, held))
    print(json.dumps(said))


if __name__ == "__main__":
    main()
