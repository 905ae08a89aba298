"""Style that depends on the prompt: beards come with sunglasses, buns with glasses, though no prompt says so.

The latent diffusion model in examples/portraits has seen no glasses of any kind. References are drawn portraits with
their prompts, of which none names the accessory: people with a beard wear sunglasses, people with a bun glasses, all
others nothing. Guided by latents alone, a sample is pulled by references of all prompts; with the product kernel, by
those whose prompt is like its own. The script prints what a classifier sees, and writes a picture.

    python examples/prompt_aware_portraits.py
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import mmdjax.sd
from mmdjax import MMDGuidance, guided_sample
from mmdjax.metrics import energy_distance
from mmdjax.plots import save_labelled_grids

EXAMPLES = Path(__file__).parent
sys.path.append(str(EXAMPLES / "faces"))
from drawn_portraits import WORN_BY, kind, read_accessories, read_sheet  # noqa: E402  # beside the sheets

SHOWN = 8  # of each kind


def draw(num: int, seed: int):
    """`num` portraits of each kind, and the others."""
    portraits = read_sheet("mixed")
    rows = np.random.default_rng(seed).permutation(len(portraits.images))
    kinds = kind(portraits.attributes)[rows]
    chosen = np.concatenate([rows[kinds == each][:num] for each in WORN_BY])
    return portraits[chosen], portraits[np.setdiff1d(rows, chosen)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of references and samples (default 0)")
    parser.add_argument("--refs", type=int, default=40, help="references of each kind (default 40)")
    parser.add_argument("--samples", type=int, default=24, help="samples of each kind (default 24)")
    parser.add_argument("--steps", type=int, default=30, help="network calls a sample (default 30)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture (default out)")
    args = parser.parse_args()

    pipeline, params = mmdjax.sd.load(EXAMPLES / "portraits", param_dtype=jnp.float32)
    chosen, others = draw(args.refs, args.seed)
    refs = mmdjax.sd.encode_references(pipeline, params, chosen.images, chosen.prompts(accessory=False)).particles()
    asked, _ = draw(args.samples, args.seed + 1)  # for their prompts
    settings = {
        "model": pipeline.model(),
        "num_samples": len(asked.images),
        "cond": pipeline.encode_prompts(params, asked.prompts(accessory=False)),
        "times": pipeline.times(args.steps),
        "progress": True,
    }
    methods = {
        "unguided": (None, MMDGuidance()),
        "latents alone": (refs, MMDGuidance()),
        "product kernel": (refs, MMDGuidance(kernel=pipeline.kernel())),
    }
    kinds, wore, made = kind(asked.attributes), kind(chosen.attributes), {}
    fresh = {each: pipeline.encode_images(params, others[kind(others.attributes) == each].images) for each in WORN_BY}
    print(f"\n{'':18}{'with the accessory of the prompt':>34}{'energy distance':>18}   mean over the kinds (worst)")
    for name, (by, guidance) in methods.items():
        latents = guided_sample(params, jax.random.key(args.seed), by, guidance=guidance, **settings).x
        made[name] = np.asarray(pipeline.decode(params, latents))
        worn = read_accessories(made[name])
        right = [100 * (worn[kinds == each] == accessory).mean() for each, accessory in WORN_BY.items()]
        energy = [float(energy_distance(latents[kinds == each], fresh[each])) for each in WORN_BY]
        shares, energies = f"{np.mean(right):.0f}% ({min(right):.0f}%)", f"{np.mean(energy):.2f} ({max(energy):.2f})"
        print(f"{name:18}{shares:>34}{energies:>18}")

    mine, theirs = (np.concatenate([np.flatnonzero(of == each)[:SHOWN] for each in WORN_BY]) for of in (kinds, wore))
    upper = {"references": chosen.images[theirs], "unguided": made["unguided"][mine]}
    lower = {name: made[name][mine] for name in ("latents alone", "product kernel")}
    print(save_labelled_grids(args.out / "prompt_aware_portraits.png", [upper, lower], columns=SHOWN, scale=1))


if __name__ == "__main__":
    main()
