"""What a guided step of Stable Diffusion 1.5 should take on a pod: a prediction, not a measurement.

FLOPs of the U-Net and of the guidance come from XLA's count of the programs. What is sent is what
results/sharding.json found in the compiled ones: the batch once a network call and twice an inner step. The rest is
assumed:

    the network reaches 40% of the bfloat16 peak, with classifier-free guidance (two U-Net calls a sample)
    guidance runs in float32 at precision "highest": on a TPU six bfloat16 passes, at 40% of the peak; on a GPU 40% of
      the float32 peak without tensor cores
    an all-gather takes (devices − 1)/devices × bytes / bandwidth, and a latency for each; nothing overlaps

    python benchmarks/pod_model.py [--table]
"""

import argparse
import functools
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import sd15
from common import table, write_json
from full_size import SHAPE, TOKENS, WIDTH

from mmdjax import IMQ, MMDGuidance, Particles
from mmdjax.guidance.field import Field
from mmdjax.guidance.sides import Sides
from mmdjax.provenance import provenance

RESULTS = Path(__file__).parent / "results"
REFS, UTILISATION, CFG = 150, 0.4, 2


@dataclass(frozen=True)
class Machine:
    """Assumed rates of a device: FLOP/s, bytes/s and seconds."""

    name: str
    devices: tuple[int, ...]
    bfloat16: float
    float32: float
    bandwidth: float
    latency: float
    source: str


MACHINES = (
    Machine(
        "TPU v5e", (1, 8, 64, 256), 197e12, 197e12 / 6, 100e9, 30e-6, "published peak; half of 1,600 Gbit/s a chip"
    ),
    Machine("H200", (1, 2, 4, 8), 989e12, 67e12, 450e9, 10e-6, "published dense peaks; NVLink in one direction"),
)


def flops(function: Any, *args: Any) -> float:
    return jax.jit(function).lower(*args).cost_analysis()["flops"]


def unet_flops() -> float:
    """Of one sample."""
    module = sd15.component("unet")[0]
    args = jnp.zeros((1, *SHAPE)), jnp.zeros(1), jnp.zeros((1, TOKENS, WIDTH))
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), *args))
    return flops(module.apply, params, *args)


@functools.cache
def guidance_flops(n: int, share: int) -> float:
    """Of one of `share` devices, for a batch of n in all: its rows among everyone, with all inner steps."""
    mine = n // share
    refs = Particles(jnp.zeros((REFS, *SHAPE)))
    kernel, steps = IMQ(1.0), MMDGuidance().steps  # the default's, of any width
    rows, everyone = (Particles(jax.ShapeDtypeStruct((k, *SHAPE), jnp.float32)) for k in (mine, n))

    def one(rows, everyone):
        return Field().step(Sides(kernel, rows, refs, everyone=everyone), 0.5)

    def average(rows, everyone):
        return Field().average(Sides(kernel, rows, refs, everyone=everyone), None)

    return steps * (flops(one, rows, everyone) + 2.0 * mine * n * math.prod(SHAPE)) + flops(average, rows, everyone)


def predict(machine: Machine, devices: int, per_device: int, unet: float) -> dict[str, float]:
    """Seconds of a step by part, at a constant batch a device."""
    n, steps = devices * per_device, MMDGuidance().steps
    network = CFG * per_device * unet / (UTILISATION * machine.bfloat16)
    guidance = guidance_flops(n, devices) / (UTILISATION * machine.float32)
    gathers = 1 + 2 * steps
    sent = 4.0 * n * math.prod(SHAPE) * (devices - 1) / devices
    collectives = gathers * (sent / machine.bandwidth + machine.latency) if devices > 1 else 0.0
    total = network + guidance + collectives
    return {"devices": devices, "batch": n, "network_s": network, "guidance_s": guidance,
            "collectives_s": collectives, "total_s": total, "bytes_per_gather": sent}  # fmt: skip


def markdown(report: dict[str, Any]) -> str:
    """The table of benchmarks/README.md."""
    rows = []
    for machine in report["machines"]:
        for row in machine["predicted"]:
            parts = (f"{1e3 * row[f'{part}_s']:.2f}" for part in ("network", "guidance", "collectives", "total"))
            rows.append(
                [machine["name"], str(row["devices"]), str(row["batch"]), *parts, f"{100 * row['efficiency']:.0f}%"]
            )
    return table(["machine", "devices", "batch", "network", "guidance", "sending", "step", "efficiency"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-device", type=int, default=8, help="samples of each device (default 8)")
    parser.add_argument("--out", type=Path, default=RESULTS / "pod_model.json")
    parser.add_argument("--table", action="store_true", help="print the table from the JSON, run nothing")
    args = parser.parse_args()
    if args.table:
        print(markdown(json.loads(args.out.read_text())))
        return
    unet = unet_flops()
    print(f"U-Net: {unet / 1e12:.3f} TFLOP a sample; {args.per_device} samples a device, {REFS} references, bfloat16")
    found = []
    for machine in MACHINES:
        rows = [predict(machine, devices, args.per_device, unet) for devices in machine.devices]
        for row in rows:
            row["efficiency"] = rows[0]["total_s"] / row["total_s"]
            row["guidance_share"] = (row["guidance_s"] + row["collectives_s"]) / row["total_s"]
            print(
                f"{machine.name:8}{row['devices']:4} devices, batch {row['batch']:5}: {1e3 * row['total_s']:7.1f} ms a "
                f"step, of it guidance {1e3 * row['guidance_s']:6.2f} and sending {1e3 * row['collectives_s']:6.2f}; "
                f"efficiency {row['efficiency']:.3f}"
            )
        found.append({**asdict(machine), "predicted": rows})
    report = {**provenance(), "unet_flops": unet, "per_device": args.per_device, "references": REFS,
              "utilisation": UTILISATION, "machines": found}  # fmt: skip
    write_json(args.out, report)


if __name__ == "__main__":
    main()
