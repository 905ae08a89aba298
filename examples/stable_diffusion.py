"""Guide Stable Diffusion to a folder of pictures, in its latent space: the library's calls, one after the other.

    python examples/stable_diffusion.py MODEL --refs PICTURES --prompt "a red cat"
    python examples/stable_diffusion.py --tiny

MODEL is a folder in the layout of diffusers, a single file, or a hub id; PICTURES may have captions (cat.txt beside
cat.png). With --tiny the script writes a model of random weights and some pictures itself, so that it runs anywhere:
its pictures are noise, the distances are real. `mmdjax sample` does the same from the command line and keeps more.
"""

import argparse
from pathlib import Path

import jax
import numpy as np

import mmdjax.sd
from mmdjax import MMDGuidance, guided_sample
from mmdjax.digits import splits
from mmdjax.metrics import energy_distance
from mmdjax.plots import save_labelled_grids
from mmdjax.sd.pictures import open_pictures
from mmdjax.sd.tiny import write_tiny


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a folder, a file or a hub id")
    parser.add_argument("--refs", type=Path, help="folder of reference pictures, with captions or without")
    parser.add_argument("--prompt", action="append", help="may be repeated; the samples take them in turn")
    parser.add_argument("--tiny", action="store_true", help="write and use a model of random weights")
    parser.add_argument("--samples", type=int, default=8, help="pictures to make (default 8)")
    parser.add_argument("--steps", type=int, default=30, help="network calls a picture (default 30)")
    parser.add_argument("--cfg-scale", type=float, default=5.0, help="of classifier-free guidance (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture (default out)")
    args = parser.parse_args()
    if args.tiny:
        args.model, args.refs = write_tiny(args.out / "tiny"), write_pictures(args.out / "tiny-references")
    if not args.model or not args.refs:
        parser.error("give MODEL and --refs PICTURES, or --tiny")

    pipeline, params = mmdjax.sd.load(args.model, progress=True)
    down = pipeline.autoencoder.config.downscale
    height, width, _ = (side * down for side in pipeline.latent_shape())

    folder = open_pictures(args.refs, smallest=down)
    refs = mmdjax.sd.encode_references(pipeline, params, folder.batches(height, width), folder.captions)
    prompts = args.prompt or refs.captions() or [""]
    prompts = [prompts[i % len(prompts)] for i in range(args.samples)]

    null = pipeline.encode_prompts(params, "", negative=True)
    settings = {
        "model": pipeline.model(guidance_scale=args.cfg_scale, null_cond=null),
        "num_samples": args.samples,
        "cond": pipeline.encode_prompts(params, prompts),
        "times": pipeline.times(args.steps),
        "progress": True,
    }
    key = jax.random.key(args.seed)
    # where the references have prompts, too, each pulls the samples whose prompt is like its own
    guidance = MMDGuidance(kernel=pipeline.kernel()) if refs.prompts else MMDGuidance()
    unguided = guided_sample(params, key, None, **settings).x
    guided = guided_sample(params, key, refs.particles(), guidance=guidance, **settings).x

    before, after = (float(energy_distance(x, refs.latents)) for x in (unguided, guided))
    print(f"energy distance to {len(refs.latents)} references, in latents: {before:.3f} unguided, {after:.3f} guided")
    grids = {"references": refs.latents[: args.samples], "unguided": unguided, "guided": guided}
    pictures = {title: pipeline.decode(params, x, batch_size=1) for title, x in grids.items()}
    scale = max(1, 96 // width)
    print(save_labelled_grids(args.out / "stable_diffusion.png", pictures, columns=4, scale=scale))


def write_pictures(folder: Path) -> Path:
    """Twelve held-out digits as dark cats and light dogs, with captions."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    _, (digits, _) = splits()
    for i, digit in enumerate(digits[:12, :, :, 0]):
        light = i % 2 * 0.8
        pixels = np.round((digit + 1) * 50 + light * 150).astype(np.uint8)
        Image.fromarray(pixels).resize((32, 32)).convert("RGB").save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text("a dog" if i % 2 else "a cat")
    return folder


if __name__ == "__main__":
    main()
