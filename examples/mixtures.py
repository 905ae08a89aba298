"""What guidance does, in the plane: a ring of eight Gaussians guided to three of them, with an exact denoiser.

The script samples the ring without and with guidance and writes three pictures: samples before and after with the paths
that they took, MMD² to the references along the way, and the witness function, which shows where samples are too many
and where too few.

    python examples/mixtures.py
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mmdjax import MMDGuidance, guided_sample
from mmdjax.guidance import default_kernel
from mmdjax.metrics import energy_distance
from mmdjax.mixtures import Mixture, mixture, mixture_model
from mmdjax.plots import before_after, save_figure, trace_curves, witness_map


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of references and samples (default 0)")
    parser.add_argument("--refs", type=int, default=100, help="references (default 100)")
    parser.add_argument("--samples", type=int, default=200, help="samples (default 200)")
    parser.add_argument("--steps", type=int, default=50, help="denoiser calls a sample (default 50)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures (default out)")
    args = parser.parse_args()

    angles = 2 * np.pi * np.arange(8) / 8
    ring = mixture(4 * np.stack([np.cos(angles), np.sin(angles)], axis=1), std=0.35)
    kept = np.array([0, 2, 5])
    target = Mixture(ring.means[kept], ring.log_stds[kept], np.log(np.array([0.4, 0.3, 0.3], np.float32)))
    key_refs, key_fresh, key = jax.random.split(jax.random.key(args.seed), 3)
    refs, fresh = target.sample(key_refs, args.refs), target.sample(key_fresh, 2000)

    settings = {"model": mixture_model(2), "num_samples": args.samples, "num_steps": args.steps, "keep_path": True}
    # scale 0 is plain sampling, with the MMD² to the references on its trace
    unguided = guided_sample(ring, key, refs, guidance=MMDGuidance(scale=0.0), **settings)
    guided = guided_sample(ring, key, refs, guidance=MMDGuidance(), **settings)

    for name, x in {"unguided": unguided.x, "guided": guided.x, "references": refs}.items():
        print(f"{name:12} energy distance to fresh samples of the target {float(energy_distance(x, fresh)):8.4f}")
    figures = {
        "mixtures": before_after(
            refs,
            unguided.x,
            guided.x,
            path=guided.trace.path,
            model_density=lambda points: ring.log_density(jnp.asarray(points)),
            target_density=lambda points: target.log_density(jnp.asarray(points)),
        ),
        "mixtures_mmd": trace_curves({"unguided": unguided.trace, "guided": guided.trace}),
        "mixtures_witness": witness_map(default_kernel("denoised"), {"unguided": unguided.x, "guided": guided.x}, refs),
    }
    for name, figure in figures.items():
        print(save_figure(figure, args.out / f"{name}.png"))


if __name__ == "__main__":
    main()
