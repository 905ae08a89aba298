"""Guide a model of handwritten digits to a pen that it has never seen.

References are 50 held-out digits with thickened strokes. The script samples the model without and with guidance, prints
how far both are from *other* thickened held-out digits, and writes a picture of all three.

    python examples/quickstart.py
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np

from mmdjax import guided_sample, load_digits, median_bandwidth, mmd2
from mmdjax.digits import splits, thicken
from mmdjax.kernels import RBF
from mmdjax.metrics import energy_distance
from mmdjax.plots import save_labelled_grids


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of references and samples (default 0)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture (default out)")
    parser.add_argument("--samples", type=int, default=200, help="digits to generate (default 200)")
    parser.add_argument("--steps", type=int, default=50, help="network calls a digit (default 50)")
    args = parser.parse_args()
    start = time.perf_counter()

    model, params = load_digits()
    _, (held_out, _) = splits()
    thick = thicken(held_out)[np.random.default_rng(args.seed).permutation(len(held_out))]
    refs, target = thick[:50], thick[50:]

    key = jax.random.key(args.seed)
    settings = {"model": model, "num_samples": args.samples, "num_steps": args.steps, "progress": True}
    unguided = guided_sample(params, key, None, **settings).x
    guided = guided_sample(params, key, refs, **settings).x

    kernel = RBF(median_bandwidth(target))
    print(f"\ndistance to {len(target)} other thickened digits, {args.samples} samples, 50 references")
    print(f"{'':18}{'unguided':>10}{'guided':>10}{'references':>12}")
    for name, distance in [
        ("energy distance", energy_distance),
        ("MMD² (RBF)", lambda x, y: mmd2(kernel, x, y, estimator="u")),
    ]:
        before, after, own = (float(distance(x, target)) for x in (unguided, guided, refs))
        print(f"{name:18}{before:10.4f}{after:10.4f}{own:12.4f}")

    grids = {"references": refs[:40], "unguided": unguided[:40], "guided": guided[:40]}
    path = save_labelled_grids(args.out / "quickstart.png", grids)
    print(f"picture: {path}   ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
