"""Style that depends on the prompt: threes thick, sevens slanted, though no prompt says so.

The small latent diffusion model in examples/latent_digits is asked for "a three" and "a seven". References are held-out
threes with a broad pen and slanted sevens, encoded to its latents. Guided by latents alone, a sample is pulled by
references of both prompts; with the product kernel, by those of its own. The script prints how far the samples of each
prompt are from *other* held-out digits in its style, and writes a picture.

    python examples/prompt_aware_digits.py
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import mmdjax.sd
from mmdjax import IMQ, MMDGuidance, Particles, guided_sample, mmd2
from mmdjax.digits import slant, splits, thicken
from mmdjax.metrics import energy_distance
from mmdjax.plots import save_labelled_grids

MODEL = Path(__file__).parent / "latent_digits"
STYLES = {"a three": (3, thicken), "a seven": (7, slant)}


def styled_digits(num_refs: int, seed: int):
    """By prompt: `num_refs` held-out digits in its style, and the others, [n, 8, 8, 3]."""
    _, (images, labels) = splits()
    rng, found = np.random.default_rng(seed), {}
    for prompt, (digit, style) in STYLES.items():
        pictures = style(rng.permutation(images[labels == digit])).repeat(3, axis=-1)
        found[prompt] = pictures[:num_refs], pictures[num_refs:]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of references and samples (default 0)")
    parser.add_argument("--refs", type=int, default=25, help="references of each prompt (default 25)")
    parser.add_argument("--samples", type=int, default=50, help="samples of each prompt (default 50)")
    parser.add_argument("--steps", type=int, default=30, help="network calls a sample (default 30)")
    parser.add_argument("--cfg-scale", type=float, default=2.0, help="of classifier-free guidance (default 2)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture (default out)")
    args = parser.parse_args()

    pipeline, params = mmdjax.sd.load(MODEL, param_dtype=jnp.float32)
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

    print(f"\nto other held-out digits in the prompt's style{'energy in pixels':>24}{'MMD² in latents':>18}")
    for name, (latents, images) in made.items():
        for prompt, (_, fresh) in digits.items():
            mine, others = prompts == prompt, pipeline.encode_images(params, fresh)
            energy = float(energy_distance(images[mine], fresh))
            print(
                f"{name:18}{prompt:28}{energy:24.3f}{float(mmd2(kernel, latents[mine], others, estimator='u')):18.4f}"
            )

    some = np.concatenate([np.flatnonzero(prompts == prompt)[:20] for prompt in digits])
    shown = np.concatenate([np.flatnonzero(captions == prompt)[:20] for prompt in digits])
    grids = {"references": pictures[shown], **{name: images[some] for name, (_, images) in made.items()}}
    print(save_labelled_grids(args.out / "prompt_aware_digits.png", grids, columns=8, scale=5))


if __name__ == "__main__":
    main()
