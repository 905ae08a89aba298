"""Guide an unconditional latent diffusion model of faces to a few pictures: the setting of the published experiments.

    python examples/latent_faces.py MODEL --refs PICTURES
    python examples/latent_faces.py --tiny

MODEL is CompVis's celebahq or ffhq 256 model (`model.ckpt` of the zip, or diffusers' folder `ldm-celebahq-256`),
PICTURES some 150 faces. The published rule and the default are run from the same noise. With --tiny the
script writes a model of random weights and some pictures itself, so that it runs anywhere.
"""

import argparse
from pathlib import Path

import jax
import numpy as np

import mmdjax.sd
from mmdjax import MMDGuidance, guided_sample
from mmdjax.metrics import energy_distance, nearest_ratio
from mmdjax.plots import save_labelled_grids
from mmdjax.sd.pictures import open_pictures
from mmdjax.sd.tiny import write_tiny


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a folder, a file or a hub id")
    parser.add_argument("--refs", type=Path, help="folder of reference faces")
    parser.add_argument("--tiny", action="store_true", help="write and use a model of random weights")
    parser.add_argument("--samples", type=int, default=16, help="faces to make (default 16)")
    parser.add_argument("--steps", type=int, default=50, help="network calls a face (default 50; the paper has 1000)")
    parser.add_argument("--alpha", type=float, default=0.002, help="of the published rule (default .002, the paper's)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture (default out)")
    args = parser.parse_args()
    if args.tiny:
        args.model = write_tiny(args.out / "tiny-faces", unconditional=True)
        args.refs = write_faces(args.out / "tiny-faces-references")
    if not args.model or not args.refs:
        parser.error("give MODEL and --refs PICTURES, or --tiny")

    pipeline, params = mmdjax.sd.load(args.model, progress=True)
    down = pipeline.autoencoder.config.downscale
    height, width, _ = (side * down for side in pipeline.latent_shape())
    folder = open_pictures(args.refs, smallest=down)
    latents = mmdjax.sd.encode_references(pipeline, params, folder.batches(height, width)).latents
    refs, rest = latents[::2], latents[1::2]  # half to guide by, half to judge by

    settings = {"model": pipeline.model(), "num_samples": args.samples, "times": pipeline.times(args.steps)}
    methods = {
        "unguided": (None, MMDGuidance()),
        "published rule": (refs, MMDGuidance.paper(args.alpha)),
        "guided": (refs, MMDGuidance()),
    }
    key, made = jax.random.key(args.seed), {}
    print(f"\n{'':16}{'energy distance':>16}{'nearest ratio':>16}   to {len(rest)} other faces, in latents")
    for name, (by, guidance) in methods.items():
        x = guided_sample(params, key, by, guidance=guidance, progress=True, **settings).x
        made[name] = pipeline.decode(params, x, batch_size=1)
        print(f"{name:16}{float(energy_distance(x, rest)):16.4f}{float(nearest_ratio(x, refs, rest)):16.3f}")
    grids = {"references": pipeline.decode(params, refs[: args.samples], batch_size=1), **made}
    print(save_labelled_grids(args.out / "latent_faces.png", grids, columns=4, scale=max(1, 96 // width)))


def write_faces(folder: Path) -> Path:
    """Forty drawn faces: a disc of some skin colour, two eyes and a mouth, on some background."""
    from PIL import Image, ImageDraw

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(40):
        ground, skin = rng.integers(0, 90, 3), rng.integers(140, 240, 3)
        picture = Image.new("RGB", (64, 64), tuple(ground.tolist()))
        draw, (dx, dy) = ImageDraw.Draw(picture), rng.integers(-4, 5, 2).tolist()
        draw.ellipse((12 + dx, 8 + dy, 52 + dx, 58 + dy), fill=tuple(skin.tolist()))
        for eye in (24, 40):
            draw.ellipse((eye - 3 + dx, 24 + dy, eye + 3 + dx, 30 + dy), fill="black")
        draw.arc((24 + dx, 36 + dy, 40 + dx, 50 + dy), 10, 170, fill="darkred", width=2)
        picture.save(folder / f"{i:02d}.png")
    return folder


if __name__ == "__main__":
    main()
