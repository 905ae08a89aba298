"""The error and the time of compressed references against all of them: MMD and the direction of its gradient.

m references of 10 Gaussian clusters in 64 dimensions, a batch of 64 between them, an RBF of the references' median
distance. For each compression of a size: the error of the MMD beside its bound, how far its gradient is from the exact
one (relative, and the mean cosine a sample), and the time of one gradient over that against all references.

    coreset          |MMD(P, Q) − MMD(P, C)| ≤ MMD(Q, C), which is known exactly
    random features  |MMD²_k̂ − MMD²_k| ≤ 4 ε, ε for all pairs among batch and references at a failure probability of .05
    Nyström          |MMD(P, Q) − MMD_k̂(P, Q)| ≤ √r_P + √r_Q, r the mean residual of a set

"random rows" are as many references drawn without thought: what a coreset has to beat.

    python benchmarks/compressed_refs.py [--quick]
"""

import argparse
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import medians, write_json

from mmdjax import RBF, Particles, median_bandwidth, mmd2
from mmdjax.compression import coreset, embed, nystroem, random_features
from mmdjax.guidance.rules import Plain
from mmdjax.guidance.sides import Sides
from mmdjax.provenance import provenance

N, D, CLUSTERS = 64, 64, 10


def clusters(seed: int, n: int, spread: float) -> jax.Array:
    centres = 3 * np.random.default_rng(0).standard_normal((CLUSTERS, D))
    rng = np.random.default_rng(seed)
    return jnp.asarray(centres[rng.integers(CLUSTERS, size=n)] + spread * rng.standard_normal((n, D)), jnp.float32)


def seconds(call: Callable, rounds: int = 20) -> float:
    return medians({"call": call}, rounds)["call"]


def compare(m: int, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    refs, batch = clusters(1, m, 1.0), clusters(2, N, 2.0)
    kernel = RBF(median_bandwidth(refs))
    direct = jax.jit(lambda z, refs: Plain().direction(Sides(kernel, Particles(z), refs, estimator="v"), None))
    every = Particles(refs)
    exact, exact_mmd2 = direct(batch, every), float(mmd2(kernel, batch, refs))
    exact_time = seconds(lambda: direct(batch, every))
    rows = []

    def add(name: str, size: int, gradient: Callable, value: Any, bound: float, making: float):
        g = gradient()
        cosine = jnp.sum(g * exact, 1) / (jnp.linalg.norm(g, axis=1) * jnp.linalg.norm(exact, axis=1))
        mmd = math.sqrt(max(float(value), 0.0))
        row = {
            "compression": name,
            "size": size,
            "MMD error": abs(mmd - math.sqrt(exact_mmd2)),
            "bound": bound,
            "gradient error": float(jnp.linalg.norm(g - exact) / jnp.linalg.norm(exact)),
            "cosine": float(cosine.mean()),
            "time over exact": seconds(gradient) / exact_time,
            "seconds to make": making,
        }
        rows.append(row)
        numbers = "".join(f"{v:14.4g}" for v in list(row.values())[2:])
        print(f"{name:22}{size:6}{numbers}", flush=True)

    print(f"m = {m}: MMD {math.sqrt(exact_mmd2):.4f}, gradient {1e3 * exact_time:.2f} ms")
    print(
        f"{'':22}{'size':>6}"
        + "".join(f"{v:>14}" for v in ("MMD error", "bound", "grad. error", "cosine", "time", "s to make"))
    )
    for size in sizes:
        some = Particles(refs[np.random.default_rng(3).choice(m, size, replace=False)])
        bound = math.sqrt(max(float(mmd2(kernel, refs, some)), 0.0))
        add("random rows", size, lambda some=some: direct(batch, some), mmd2(kernel, batch, some), bound, 0.0)
        few = some
        for method in ("herding", "thinning"):
            start = time.perf_counter()
            found = jax.block_until_ready(coreset(kernel, refs, size, method=method))
            making = time.perf_counter() - start
            few = found.particles
            value = mmd2(kernel, batch, few)
            add(f"coreset, {method}", size, lambda few=few: direct(batch, few), value, float(found.mmd), making)
        for name in ("random features", "Nyström"):
            start = time.perf_counter()
            if name == "Nyström":
                phi = nystroem(kernel, refs, few)
                bound = float(phi.error + nystroem(kernel, batch, few).error)
            else:
                phi = random_features(kernel, jax.random.key(0), refs, size)
                pairs = (N + m) * (N + m - 1) // 2
                # of the MMD, from that of its square
                bound = math.sqrt(exact_mmd2 + 4 * phi.pair_bound(pairs)) - math.sqrt(exact_mmd2)
            embedding = jax.block_until_ready(embed(phi, refs, estimator="v"))
            making = time.perf_counter() - start
            run = jax.jit(lambda embedding, z: embedding.gradient(z))
            call = lambda embedding=embedding, run=run: run(embedding, batch)
            add(name, size, call, embedding.mmd2(batch), bound, making)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="500 references; nothing is written")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "compressed_refs.json")
    args = parser.parse_args()
    m, sizes = (500, (20, 100)) if args.quick else (5000, (50, 200, 1000))
    rows = compare(m, sizes)
    if not args.quick:
        report = provenance() | {"load_average": os.getloadavg(), "m": m, "n": N, "d": D, "rows": rows}
        write_json(args.out, report)


if __name__ == "__main__":
    main()
