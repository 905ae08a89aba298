"""Style that depends on the prompt: thick zeros, thin ones, slanted twos and so on, though no prompt says so.

The small latent diffusion model in examples/latent_digits is asked for "a zero", "a one" …. References are ten held-out
digits of each, in a style of their own, encoded to its latents. Guided by latents alone, a sample is pulled by
references of all prompts; with the product kernel, by those of its own. The script prints how far the samples of each
prompt are from *other* held-out digits in its style, and writes a picture.

    python examples/prompt_aware_digits.py
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from train_latent_digits import FOLDER, NAMES, STYLES

import mmdjax.sd
from mmdjax import IMQ, MMDGuidance, Particles, guided_sample, mmd2
from mmdjax.digits import splits
from mmdjax.metrics import energy_distance
from mmdjax.plots import save_labelled_grids

ORDER = ("thick", "thin", "slanted")  # the styles of zero, one, two; of three, four, five; and so on


def styled_digits(num_refs: int, seed: int):
    """By prompt: `num_refs` held-out digits in its style, and the others, [n, 8, 8, 3]."""
    _, (images, labels) = splits()
    rng, found = np.random.default_rng(seed), {}
    for digit, name in enumerate(NAMES):
        pictures = STYLES[ORDER[digit % 3]](rng.permutation(images[labels == digit])).repeat(3, axis=-1)
        found[f"a {name}"] = pictures[:num_refs], pictures[num_refs:]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of references and samples (default 0)")
    parser.add_argument("--refs", type=int, default=10, help="references of each prompt (default 10)")
    parser.add_argument("--samples", type=int, default=10, help="samples of each prompt (default 10)")
    parser.add_argument("--steps", type=int, default=30, help="network calls a sample (default 30)")
    parser.add_argument("--cfg-scale", type=float, default=2.0, help="of classifier-free guidance (default 2)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture (default out)")
    args = parser.parse_args()

    pipeline, params = mmdjax.sd.load(FOLDER, param_dtype=jnp.float32)
    digits = styled_digits(args.refs, args.seed)
    pictures, captions = np.concatenate([refs for refs, _ in digits.values()]), np.repeat(list(digits), args.refs)
    refs = mmdjax.sd.encode_references(pipeline, params, pictures, captions.tolist()).particles()

    prompts = np.repeat(list(digits), args.samples)
    null = pipeline.encode_prompts(params, "", negative=True)
    settings = {
        "model": pipeline.model(guidance_scale=args.cfg_scale, null_cond=null),
        "num_samples": len(prompts),
        "cond": pipeline.encode_prompts(params, prompts.tolist()),
        "times": pipeline.times(args.steps),
        "progress": True,
    }
    methods = {
        "unguided": (None, MMDGuidance()),
        "latents alone": (refs, MMDGuidance()),
        "product kernel": (refs, MMDGuidance(kernel=pipeline.kernel())),
    }
    kernel = IMQ(None).fit(Particles(refs.x))
    key, made = jax.random.key(args.seed), {}
    for name, (by, guidance) in methods.items():
        latents = guided_sample(params, key, by, guidance=guidance, **settings).x
        made[name] = latents, np.asarray(pipeline.decode(params, latents))

    print("\nto other held-out digits in the prompt's style, mean over the prompts (worst)")
    print(f"{'':18}{'energy in pixels':>22}{'MMD² in latents':>22}")
    for name, (latents, images) in made.items():
        energy, distance = [], []
        for prompt, (_, fresh) in digits.items():
            mine, others = prompts == prompt, pipeline.encode_images(params, fresh)
            energy.append(float(energy_distance(images[mine], fresh)))
            distance.append(float(mmd2(kernel, latents[mine], others, estimator="u")))
        cells = [f"{np.mean(found):.3f} ({np.max(found):.3f})" for found in (energy, distance)]
        print(f"{name:18}{cells[0]:>22}{cells[1]:>22}")

    by_prompt = np.concatenate([np.flatnonzero(prompts == prompt)[:8] for prompt in digits])
    shown = np.concatenate([np.flatnonzero(captions == prompt)[:8] for prompt in digits])
    grids = {"references": pictures[shown], **{name: images[by_prompt] for name, (_, images) in made.items()}}
    print(save_labelled_grids(args.out / "prompt_aware_digits.png", grids, columns=8, scale=5))


if __name__ == "__main__":
    main()
