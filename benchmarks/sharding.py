"""Sharded sampling, read from the compiled programs: what each device computes and what a step sends.

FLOPs of a device, of 8 simulated ones, over an eighth of what one device has alone; with the loops over steps and inner
steps unrolled, since XLA counts a loop's body once, and with all that is done once a call. And the collectives of one
step, outside and inside of the loop over inner steps: they must not grow with the references.

    python benchmarks/sharding.py
"""

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import numpy as np
from common import normal, write_json
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmdjax import MMDGuidance, guided_sample, load_digits
from mmdjax.distributed import batch_mesh, batch_sharding, replicate
from mmdjax.provenance import provenance

DEVICES, STEPS, INNER_STEPS = 8, 2, 8
MUST, GOAL = 1.05, 1.01
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
BYTES = {"f32": 4, "f64": 8, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1}


def collectives(compiled: Any) -> list[tuple[str, int, str]]:
    """(kind, bytes of the result on a device, the JAX operation's name) of each collective in a compiled program."""
    found = []
    for line in compiled.as_text().splitlines():
        if match := re.search(rf" = (.*?) ({KINDS})(-start)?\(", line):
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            size = sum(BYTES[kind] * int(np.prod([int(i) for i in sides.split(",") if i])) for kind, sides in shapes)
            name = re.search(r'op_name="([^"]*)"', line)
            found.append((match[2], size, name[1] if name else ""))
    return found


def loops(name: str) -> int:
    """How many loops an operation is in: 0 once a call, 1 once a step, 2 once an inner step."""
    return name.split(":")[0].count("while/body")


def program(num_samples: int, num_refs: int, guidance: Any, devices: int, split_refs: bool = False) -> Any:
    """The compiled sampler of the digits' model; guidance None: unguided."""
    model, params = load_digits()
    mesh = batch_mesh(jax.devices()[:devices], explicit=True)  # inside jit, split references are seen as such
    refs = None
    if guidance is not None:
        refs = normal(0, num_refs, *model.shape)
        refs = jax.device_put(refs, NamedSharding(mesh, P("batch" if split_refs else None)))
    settings: dict[str, Any] = {"num_samples": num_samples, "num_steps": STEPS, "sharding": batch_sharding(mesh)}
    if guidance is not None:
        settings["guidance"] = guidance
    sample = functools.partial(guided_sample, model=model, **settings)
    return jax.jit(sample).lower(replicate(params, mesh), jax.random.key(0), refs).compile()


def flops_share(compile_for: Callable[[int], Any]) -> float:
    """FLOPs of one of the devices, over its share of one device's."""
    jax.clear_caches()  # of traces with loops, and after this of those without
    with mock.patch.object(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True)):
        alone, one_of_many = (compile_for(k).cost_analysis()["flops"] for k in (1, DEVICES))
    jax.clear_caches()
    return one_of_many * DEVICES / alone


def main():
    default, sample = ("MMDGuidance()", MMDGuidance()), ('at="sample"', MMDGuidance(at="sample"))
    cases = [  # samples, references, whether these are split
        (64, 100, False, "unguided", None),
        *((*sizes, *default) for sizes in ((64, 100, False), (256, 100, False), (64, 1000, False), (64, 1000, True))),
        *((*sizes, *sample) for sizes in ((64, 1000, False), (64, 1000, True))),
    ]
    shares = []
    print(f"FLOPs of one of {DEVICES} devices over an eighth of one device's: at most {MUST}, goal {GOAL}")
    for num_samples, num_refs, split_refs, name, guidance in cases:
        share = flops_share(functools.partial(program, num_samples, num_refs, guidance, split_refs=split_refs))
        row = {"samples": num_samples, "refs": num_refs, "split_refs": split_refs, "guidance": name}
        shares.append(row | {"flops_share": share})
        split = "split" if split_refs else "whole"
        print(f"{name:16} {num_samples:4} samples, {num_refs:5} references ({split}): {share:.4f}", flush=True)
    sent = []
    print("\nCollectives of one step (kB received by a device), by number of references")
    for split_refs in (False, True):
        for num_refs in (200, 1000, 4000):
            found = collectives(program(64, num_refs, MMDGuidance(), DEVICES, split_refs))
            once = sum(size for _, size, name in found if loops(name) == 0)
            step = sum(size for _, size, name in found if loops(name) == 1)
            inner = sum(size for _, size, name in found if loops(name) == 2)
            count = [sum(loops(name) == depth for *_, name in found) for depth in range(3)]
            row = {"refs": num_refs, "split_refs": split_refs, "count": count}
            sent.append(row | {"bytes_once": once, "bytes_step": step, "bytes_inner_step": inner})
            split = "split" if split_refs else "whole"
            print(
                f"{num_refs:5} references ({split}): {step / 1e3:8.2f} a step + {INNER_STEPS} × {inner / 1e3:.2f}, "
                f"{once / 1e3:.2f} once; counts {count}"
            )
    batch = 64 * 64 * 4
    out = Path(__file__).parent / "results" / "sharding.json"
    results = {**provenance(), "devices": DEVICES, "batch_bytes": batch, "flops": shares, "collectives": sent}
    write_json(out, results)


if __name__ == "__main__":
    main()
