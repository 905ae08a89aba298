"""Time and memory of the MMD gradient beside its peers, and of the default guidance beside one plain gradient.

All times in one process, in turns, medians; two numbers a row: elapsed time of the peer over ours (above 1: ours is
faster). float32 throughout, JAX's products at precision "highest". Peers, each in its usual form:

    autograd, cdist      torch: gradient by autograd of the biased MMD² with an RBF of torch.cdist(x, y) ** 2
    autograd, products   the same with |x|² + |y|² − 2 xyᵀ
    sequential           the authors' rule, one sample at a time in torch: the closed form of the gradient of MMD² with
                         their cubic kernel, references and 100 remembered samples; per sample, ours also per sample,
                         with the same kernel, on the batch of 64
    GeomLoss             SamplesLoss("gaussian"), backends "tensorized" and "online" (KeOps), and autograd
    GEMM                 two products x yᵀ and w y of the same sizes, jitted jnp.matmul: the share of their rate

torch's autograd is spared E k(y, y'), which moves nothing; GeomLoss has no way to leave it out. "Guidance" is a call
of `MMDGuidance()` at "denoised" with all of its inner steps, its trace included, references bound before.

    python benchmarks/mmd_speed.py [--quick] [--rounds 7]

Needs torch; GeomLoss and KeOps (pip install geomloss pykeops pybind11, a C++ compiler) or their rows are left out.
Linux only: memory is read from /proc.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import medians, memory, normal, reset_peak, write_json

from mmdjax import IMQ, RBF, DiffusionModel, MMDGuidance, Particles, Polynomial, guided_sample, load_digits
from mmdjax.guidance.bound import bind, fit_kernel
from mmdjax.guidance.rules import Raw
from mmdjax.guidance.sides import Sides
from mmdjax.provenance import provenance
from mmdjax.tree import replace

PACKAGES = ("torch", "geomloss", "pykeops")


def ours(kernel: Any, x: Any, y: Any, estimator: str = "v") -> Callable:
    """The gradient of MMD² by all x, without E k(y, y')."""
    run = jax.jit(lambda x, y: Raw().direction(Sides(kernel, Particles(x), Particles(y), estimator=estimator), None))
    x, y = jnp.asarray(x), jnp.asarray(y)
    return lambda: run(x, y)


# --- peers ---


def autograd(x: np.ndarray, y: np.ndarray, h: float, by_cdist: bool) -> Callable:
    import torch

    x_t, y_t = torch.from_numpy(x), torch.from_numpy(y)

    def gram(a, b):
        products = lambda: (a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * a @ b.T
        d2 = torch.cdist(a, b) ** 2 if by_cdist else products()
        return torch.exp(-d2 / (2 * h * h))

    def run():
        a = x_t.clone().requires_grad_(True)
        loss = gram(a, a).mean() - 2 * gram(a, y_t).mean()
        return torch.autograd.grad(loss, a)[0].numpy()

    return run


def sequential(x: np.ndarray, y: np.ndarray, memory: np.ndarray) -> Callable:
    """The shift of one sample: arXiv 2601.08379's rule as its code runs it, gradient in closed form."""
    import torch

    one, refs, held = torch.from_numpy(x[0]), torch.from_numpy(y), torch.from_numpy(memory)
    d = one.numel()

    def run():
        generated = torch.cat([held, one[None]])
        n, m = len(generated), len(refs)
        own, pull = 3 * (generated @ one / d + 1) ** 2, 3 * (refs @ one / d + 1) ** 2
        g = 2 / (n * n * d) * (own @ generated) - 2 / (n * m * d) * (pull @ refs)
        return (0.002 * one.norm() * g / (g.norm() + 1e-5)).numpy()

    return run


def geomloss(x: np.ndarray, y: np.ndarray, h: float, backend: str) -> Callable:
    import torch
    from geomloss import SamplesLoss

    x_t, y_t = torch.from_numpy(x), torch.from_numpy(y)
    loss = SamplesLoss("gaussian", blur=h, backend=backend, potentials=False)

    def run():
        a = x_t.clone().requires_grad_(True)
        return torch.autograd.grad(loss(a, y_t), a)[0].numpy()

    return run


# --- the rows ---


def latents(n: int, m: int, d: int, rounds: int) -> dict[str, Any]:
    """n samples and m references of d numbers."""
    x, y, h = normal(0, n, d), normal(1, m, d) + np.float32(0.1), float(d) ** 0.5
    weights = normal(2, n, m)

    @jax.jit
    def gemm(x, y, w):
        return jnp.matmul(x, y.T, precision="highest"), jnp.matmul(w, y, precision="highest")

    kernel = RBF(h)
    on_device = tuple(map(jnp.asarray, (x, y, weights)))
    pull = jax.jit(lambda x, y: kernel.gradient(Particles(x), Particles(y), jnp.full(m, 1 / m))[0])
    calls = {
        "ours": ours(kernel, x, y),
        "pull alone": lambda: pull(*on_device[:2]),
        "GEMM": lambda: gemm(*on_device),
        "autograd, products": autograd(x, y, h, by_cdist=False),
        "autograd, cdist": autograd(x, y, h, by_cdist=True),
        "ours, cubic kernel": ours(Polynomial(), x, y),
        "sequential, one sample": sequential(x, y, normal(3, 100, d)),
    }
    np.testing.assert_allclose(
        calls["ours"](), calls["autograd, products"](), rtol=1e-3, atol=1e-6
    )  # the same quantity
    seconds = medians(calls, rounds)
    mine = seconds["ours"]
    ratio = {name: seconds[name] / mine for name in ("autograd, cdist", "autograd, products")}
    ratio["sequential"] = n * seconds["sequential, one sample"] / seconds["ours, cubic kernel"]
    share = seconds["GEMM"] / seconds["pull alone"]
    rate = 4e-9 * n * m * d / seconds["GEMM"]
    return {"n": n, "m": m, "d": d, "seconds": seconds, "ratio": ratio, "share of GEMM": share, "GEMM GFLOP/s": rate}


def points(n: int, m: int, d: int, rounds: int) -> dict[str, Any]:
    """Many samples in few dimensions, against GeomLoss."""
    x, y, h = normal(0, n, d), normal(1, m, d) + np.float32(0.1), float(d) ** 0.5
    calls, missing = {"ours": ours(RBF(h), x, y)}, {}
    for name, backend in (("GeomLoss, tensorized", "tensorized"), ("GeomLoss, KeOps", "online")):
        try:
            run = geomloss(x, y, h, backend)
            found = run()
        except Exception as problem:  # not installed, or no compiler: said in the table and the record
            missing[name] = f"{type(problem).__name__}: {problem}"[:200]
            continue
        mine = np.asarray(calls["ours"]())
        np.testing.assert_allclose(2 * found, mine, rtol=1e-2, atol=1e-3 * np.abs(mine).max())  # theirs is MMD²/2
        calls[name] = run
    seconds = medians(calls, rounds)
    ratio = {name: value / seconds["ours"] for name, value in seconds.items() if name != "ours"}
    return {"n": n, "m": m, "d": d, "seconds": seconds, "ratio": ratio, "missing": missing}


def guidance(n: int, m: int, d: int, rounds: int) -> dict[str, Any]:
    """A call of the default guidance over one plain gradient with its kernel, by inner step."""
    x, y = jnp.asarray(normal(0, n, d)), jnp.asarray(normal(1, m, d) + np.float32(0.1))
    default, refs = MMDGuidance(), Particles(y)
    kernel = fit_kernel(default, refs)
    make = jax.jit(lambda refs: bind(default, kernel, refs))
    bound = jax.block_until_ready(make(refs))
    start = time.perf_counter()
    jax.block_until_ready(make(refs))
    binding = time.perf_counter() - start
    step = jax.jit(lambda bound, x: bound.denoised(x, bound.init(x), 0.5)[0])
    plainly = replace(bound, distances=None)
    calls = {
        "plain gradient": ours(kernel, x, y, "u"),
        "guidance": lambda: step(bound, x),
        "guidance, no distances kept": lambda: step(plainly, x),
    }
    seconds = medians(calls, rounds)
    steps = default.steps
    each = {name: value / seconds["plain gradient"] / steps for name, value in seconds.items()}
    shape = {"n": n, "m": m, "d": d, "inner steps": steps, "distances kept": bound.distances is not None}
    return shape | {"seconds": seconds, "bind seconds, once a run": binding, "gradients an inner step": each}


def digits(rounds: int, n: int = 200, m: int = 100, num_steps: int = 50) -> dict[str, Any]:
    """Guided over unguided sampling with the digits' network."""
    model, params = load_digits()
    refs = jnp.asarray(normal(0, m, *model.shape))

    def sample(refs: Any, model: DiffusionModel = model) -> Callable:
        run = jax.jit(
            lambda params, key, refs: (
                guided_sample(params, key, refs, model=model, num_samples=n, num_steps=num_steps).x
            )
        )
        return lambda: run(params, jax.random.key(0), refs)

    seconds = medians({"unguided": sample(None), "guided": sample(refs)}, rounds)
    ratio = seconds["guided"] / seconds["unguided"]
    extra = 1e3 * (seconds["guided"] - seconds["unguided"]) / num_steps
    return {"n": n, "m": m, "seconds": seconds, "guided over unguided": ratio, "ms of guidance a step": extra}


# --- memory, each case in a process of its own ---


def peak(dtype: str, n: int, m: int, d: int) -> dict[str, float]:
    """What the process grows by while it computes one gradient, compiled before, in bytes."""
    kernel = IMQ(float(d) ** 0.5)
    x, y = jnp.asarray(normal(0, n, d)), jnp.ones((m, d), dtype).block_until_ready()
    run = jax.jit(lambda x, y: kernel.gradient(Particles(x), Particles(y), jnp.full(m, 1 / m), precondition="mass"))
    compiled = run.lower(x, y).compile()
    time.sleep(1)
    reset_peak()
    before = memory("VmRSS")
    jax.block_until_ready(compiled(x, y))
    return {"extra": float(memory("VmHWM") - before), "references": float(y.nbytes)}


def peaks(n: int, m: int, d: int) -> dict[str, Any]:
    found = {}
    for dtype in ("float32", "bfloat16", "float16"):
        command = [sys.executable, __file__, "--peak", dtype, str(n), str(m), str(d)]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        found[dtype] = row | {"share": row["extra"] / row["references"]}
    return {"n": n, "m": m, "d": d, "peak": found}


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def table(results: dict[str, Any]) -> str:
    big, low, mem = (results[k] for k in ("latents", "points", "memory"))

    def sizes(row):
        return f"n = {row['n']}, m = {row['m']}, d = {row['d']}"

    rows = [(f"{name} over ours, {sizes(row)}", ratio) for row in (big, low) for name, ratio in row["ratio"].items()]
    rows += [(f"share of the GEMM rate ({big['GEMM GFLOP/s']:.0f} GFLOP/s)", big["share of GEMM"])]
    for row in results["guidance"]:
        rows += [(f"plain gradients an inner step, {sizes(row)}", row["gradients an inner step"]["guidance"])]
    for dtype, row in mem["peak"].items():
        rows += [(f"peak MB, {dtype}, of {row['references'] / 1e6:.0f} MB of references", row["extra"] / 1e6)]
    small = results["digits"]
    rows += [("digits: guided over unguided", small["guided over unguided"])]
    rows += [("digits: ms of guidance a step", small["ms of guidance a step"])]
    lines = [f"{name:64}{value:10.3g}" for name, value in rows]
    return "\n".join(lines + [f"{name}: left out, {why}" for name, why in low["missing"].items()])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, to see that it runs: the numbers mean little"
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each (default 7)")
    parser.add_argument("--out", type=Path, help="default: results/mmd_speed.json; with --quick nothing is written")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(json.dumps(peak(args.peak[0], *map(int, args.peak[1:]))))
        return
    quick, rounds = args.quick, 2 if args.quick else args.rounds
    results = {
        "latents": latents(*((16, 500, 1024) if quick else (64, 5000, 16384)), rounds),
        "points": points(*((100, 500, 64) if quick else (2000, 10_000, 64)), rounds),
        "guidance": [
            guidance(*sizes, rounds)
            for sizes in ([(4, 50, 1024)] if quick else [(64, 5000, 16384), (4, 150, 16384), (200, 100, 64)])
        ],
        "memory": peaks(*((16, 2000, 1024) if quick else (64, 100_000, 4096))),
        "digits": digits(rounds, num_steps=5 if quick else 50),
    }
    print(table(results))
    out = args.out or (None if quick else Path(__file__).parent / "results" / "mmd_speed.json")
    if out:
        report = provenance() | versions() | {"load_average": os.getloadavg()} | results
        write_json(out, report)


if __name__ == "__main__":
    main()
