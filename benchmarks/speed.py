"""Speed beside thresholds in one table, and every benchmark in one command.

python benchmarks/speed.py            # run them all, for hours: each writes its JSON into results/
python benchmarks/speed.py --table    # the table of benchmarks/README.md from the JSON that there is
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import table as markdown

HERE = Path(__file__).parent
SCRIPTS = (
    "import_time.py", "mmd_speed.py", "compressed_refs.py", "model_speed.py", "full_size.py", "full_size.py --parity",
    "loading.py", "metrics.py --full", "sharding.py", "pod_model.py", "faults.py", "alignment.py", "sweeps.py",
)  # fmt: skip


def read(name: str) -> dict[str, Any]:
    path = HERE / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def targets() -> list[tuple[str, float, float, float, bool]]:
    """(what, measured, must, goal, whether more is better) of all that has been measured; goal is the stricter one."""
    rows = []

    def add(what, measured, must, goal, above=False):
        rows.append((what, measured, must, goal, above))

    if mmd := read("mmd_speed"):
        big, low = mmd["latents"], mmd["points"]
        size = "{n} × {m} × {d}".format(**big)
        add(f"MMD gradient, {size}: torch autograd by `cdist` over ours", big["ratio"]["autograd, cdist"], 5, 7, True)
        add("the same, by matrix products", big["ratio"]["autograd, products"], 3, 4.5, True)
        add("per sample: the authors' sequential rule over ours", big["ratio"]["sequential"], 10, 14, True)
        size = "{n} × {m} × {d}".format(**low)
        for name, ratio in low["ratio"].items():
            add(f"{size}: {name} over ours", ratio, 3, 10, True)
        add(f"share of the GEMM rate ({big['GEMM GFLOP/s']:.0f} GFLOP/s here)", big["share of GEMM"], 0.7, 0.9, True)
        for dtype, row in mmd["memory"]["peak"].items():
            most = 0.15 * row["references"] / 1e6
            what = f"peak extra MB, {mmd['memory']['m']:,} {dtype} references of {mmd['memory']['d']:,}"
            add(what, row["extra"] / 1e6, most, 64)
        for row in mmd["guidance"]:
            size = "{n} × {m} × {d}".format(**row)
            what = f"default guidance, {size}: plain gradients an inner step"
            add(what, row["gradients an inner step"]["guidance"], 1.1, 0.6)
        small = mmd["digits"]
        what = f"digits, guided over unguided ({small['ms of guidance a step']:.2f} ms of guidance a step)"
        add(what, small["guided over unguided"], 1.6, 1.15)
    if full := read("full_size").get("cost"):
        ratio = full["ratio"]['MMDGuidance(), "denoised"']["U-Net on 4"]
        add("SD 1.5, batch 4, 150 references: guided over unguided step", 1 + ratio, 1.02, 1.005)
    speed = read("model_speed")
    if unet := speed.get("unet"):
        over = unet["ours_over"]
        add("SD 1.5 U-Net, float32, batch 1: ours over torch's, channels last", over["torch, channels last"], 1.15, 0.9)
        if "diffusers' Flax" in over:
            add("the same over the last Flax U-Net (diffusers 0.39)", over["diffusers' Flax"], 0.65, 0.5)
    if pipeline := speed.get("pipeline"):
        ratio = pipeline["ours_over"]["diffusers on torch"]
        add("small text-to-image pipeline, 50 steps, batch 4: ours over diffusers on torch", ratio, 0.8, 0.4)
        add("the same with our compilation", pipeline["ours_with_compilation_over"], 1.5, 1.0)
    if compiling := speed.get("compile"):
        what = "compiling the guided SD 1.5 sampler over one U-Net call"
        add(what, compiling["guided_sampler_over_unet"], 1.3, 1.1)
    for row in read("sharding").get("flops", []):
        if row["guidance"] == "MMDGuidance()":
            split = "split" if row["split_refs"] else "whole"
            what = (
                f"FLOPs of one of 8 devices over ⅛ of one's: {row['samples']} samples, {row['refs']} references {split}"
            )
            add(what, row["flops_share"], 1.05, 1.01)
    return rows


def table() -> str:
    rows = []
    for what, measured, must, goal, above in targets():
        reached = [measured >= bound if above else measured <= bound for bound in (must, goal)]
        met = "goal" if reached[1] else "must" if reached[0] else "no"
        sign = "≥" if above else "≤"
        rows.append([what, f"{measured:.4g}", f"{sign} {must:.4g}", f"{sign} {goal:.4g}", met])
    return markdown(["quantity", "measured", "must", "goal", "met"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table, run nothing")
    if not parser.parse_args().table:
        for script in SCRIPTS:
            print(f"\n== {script}", flush=True)
            subprocess.run([sys.executable, *f"{HERE / script}".split(" ")], check=True)
    print(table())


if __name__ == "__main__":
    main()
