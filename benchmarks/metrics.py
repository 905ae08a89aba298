"""Time and memory of each metric on features [n, 2048] in float32, every metric in a process of its own.

`features` is what the two sets take, `peak` what the process grew by from before they were made to the metric's highest
point (compilation included): 2 GB is the limit at 50,000 rows. `first` is with compilation, `again` without.

    python benchmarks/metrics.py            # 10,000 rows: minutes
    python benchmarks/metrics.py --full     # 50,000 rows: 20 minutes on two cores

Linux only: the peak is read from /proc.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import memory, reset_peak, write_json

from mmdjax import RBF, Cosine, Energy
from mmdjax.metrics import (
    density_coverage,
    energy_distance,
    frechet_distance,
    kid,
    nearest_neighbour_accuracy,
    nearest_ratio,
    permutation_test,
    precision_recall,
    rke,
    vendi,
)
from mmdjax.provenance import provenance

DIMENSIONS, LIMIT = 2048, 2e9

METRICS: dict[str, Callable[[Any, Any], Any]] = {
    "energy_distance": energy_distance,
    "kid": kid,
    "frechet_distance": frechet_distance,
    "permutation_test": lambda x, y: permutation_test(Energy(), x, y, jax.random.key(0)),
    "precision_recall": precision_recall,
    "density_coverage": density_coverage,
    "nearest_neighbour_accuracy": nearest_neighbour_accuracy,
    "nearest_ratio": lambda x, y: nearest_ratio(x, y[:100], y[100:]),
    "vendi (Cosine)": lambda x, y: vendi(Cosine(), x),
    "rke (RBF)": lambda x, y: rke(RBF(60.0), x),
}


def features(seed: int, n: int) -> jax.Array:
    """Positive and skewed, as a network's pooled features are."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, DIMENSIONS), dtype=np.float32)
    x += np.float32(0.1 * seed)
    return jax.device_put(np.maximum(x, 0, out=x)).block_until_ready()


def measure(name: str, n: int, repeat: bool) -> dict[str, Any]:
    """One metric in this process."""
    jax.numpy.zeros(1).block_until_ready()
    before = memory("VmRSS")
    x, y = features(0, n), features(1, n)
    gc.collect()  # the arrays that they were copied from
    time.sleep(2)
    held = memory("VmRSS") - before
    reset_peak()
    seconds = {}
    for run in ("first", "again")[: 2 if repeat else 1]:
        start = time.perf_counter()
        value = jax.block_until_ready(METRICS[name](x, y))
        seconds[run] = time.perf_counter() - start
    peak = memory("VmHWM") - before
    return {"value": [float(v) for v in jax.tree.leaves(value)], "seconds": seconds, "features": held, "peak": peak}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="50,000 rows instead of 10,000, each metric run once")
    parser.add_argument("--only", nargs="*", choices=METRICS, metavar="METRIC", help="some of the metrics")
    parser.add_argument("--out", type=Path, help="default: results/metrics.json, with --full results/metrics_full.json")
    parser.add_argument("--one", choices=METRICS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    n = 50_000 if args.full else 10_000
    if args.one:
        print(json.dumps(measure(args.one, n, repeat=not args.full)))
        return

    out = args.out or Path(__file__).parent / "results" / ("metrics_full.json" if args.full else "metrics.json")
    results = {}
    print(f"features [{n}, {DIMENSIONS}]\n{'':28}{'features':>10}{'peak':>10}{'first':>10}{'again':>10}  value")
    for name in args.only or METRICS:
        command = [sys.executable, __file__, "--one", name, *(["--full"] if args.full else [])]
        row = results[name] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        seconds = "".join(f"{row['seconds'].get(run, float('nan')):8.1f} s" for run in ("first", "again"))
        over = "  over 2 GB" if row["peak"] > LIMIT else ""
        numbers = ", ".join(f"{v:.5g}" for v in row["value"])
        print(
            f"{name:28}{row['features'] / 1e9:7.2f} GB{row['peak'] / 1e9:7.2f} GB{seconds}  {numbers}{over}", flush=True
        )
        load = os.getloadavg()[2]  # above the number of cores, others shared them and the times are too long
        report = {**provenance(), "load": load, "rows": n, "dimensions": DIMENSIONS, "metrics": results}
        write_json(out, report)
    print(f"\n{out}")


if __name__ == "__main__":
    main()
