"""Guide a model of faces to an accessory that it has never seen.

The model was trained on pixel-art faces without glasses, hats and beards. References are 50 faces that wear glasses.
The script samples the model without and with guidance from the same noise, measures both on other faces with glasses,
and writes a picture.

    python examples/quickstart.py                        # glasses
    python examples/quickstart.py --attribute hat        # or beard, long-hair, blue-hair, ...
    python examples/quickstart.py --refs FOLDER          # pictures of your own, made 16 × 16
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np

from mmdjax import guided_sample, load_faces
from mmdjax.faces import ATTRIBUTES, SIZE, Faces, faces_with, pool, read_attributes
from mmdjax.metrics import energy_distance, nearest_ratio
from mmdjax.plots import save_labelled_grids

NUM_REFS, SEEDS, SHOWN, PAIRS = 50, 3, 32, 25


def draw(attribute: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """50 references with an attribute, and all other faces that have it."""
    images = faces_with(attribute).images
    rows = np.random.default_rng(seed).permutation(len(images))
    return images[rows[:NUM_REFS]], images[rows[NUM_REFS:]]


def read_folder(folder: Path) -> np.ndarray:
    """All pictures of a folder as [m, 16, 16, 3] in [−1, 1].

    Raises:
      SystemExit: there are fewer than two, or one cannot be read.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not folder.is_dir():
        raise SystemExit(f"--refs {folder}: no such folder")
    images = []
    for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        try:
            with Image.open(path) as picture:
                picture = ImageOps.exif_transpose(picture).convert("RGBA")
        except (UnidentifiedImageError, OSError) as error:
            raise SystemExit(f"--refs: {path} is no picture that can be read ({error}); remove it") from None
        white = Image.new("RGBA", picture.size, "white")
        small = Image.alpha_composite(white, picture).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX)
        images.append(np.asarray(small, np.float32) / 127.5 - 1)
    if len(images) < 2:
        raise SystemExit(
            f"--refs {folder} holds {len(images)} pictures; MMD compares sets: give at least 2, better 20 to 500"
        )
    return np.stack(images)


def share(x: np.ndarray, attribute: str) -> float:
    """Of faces that have an attribute, by the classifier, in %."""
    _, name, value = ATTRIBUTES[attribute]
    return 100 * float((read_attributes(x)[name] == value).mean())


def accuracy(attribute: str) -> float:
    """How often the classifier is right on fresh faces, in %: as many with the attribute as without."""
    _, name, value = ATTRIBUTES[attribute]
    source: Faces = pool("source")
    without = source.images[source.attributes[name] != value]
    return (share(faces_with(attribute).images, attribute) + 100 - share(without, attribute)) / 2


def nearest(x: np.ndarray, refs: np.ndarray) -> np.ndarray:
    """The reference that is nearest to each sample."""
    distances = ((x[:, None] - refs[None]) ** 2).sum((2, 3, 4))
    return refs[distances.argmin(1)]


def mean(values: list[float], digits: int) -> str:
    """Mean ± standard error; of one value, the value."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.{digits}f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attribute", default="glasses", choices=ATTRIBUTES, metavar="NAME", help=" ".join(ATTRIBUTES))
    parser.add_argument("--refs", type=Path, metavar="FOLDER", help="pictures to use as references")
    parser.add_argument("--seed", type=int, default=0, help="of the first references and samples (default: 0)")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many to average over (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture (default: out)")
    parser.add_argument("--samples", type=int, default=64, help="faces to generate (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="network calls a face (default: %(default)s)")
    args = parser.parse_args()
    for name, least in (("seeds", 1), ("samples", 2), ("steps", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}; give at least {least}")
    start = time.perf_counter()

    own = read_folder(args.refs) if args.refs else None
    model, params = load_faces()
    settings = {"model": model, "num_samples": args.samples, "num_steps": args.steps, "progress": True}
    rows: dict[str, list] = {}
    for seed in range(args.seed, args.seed + args.seeds):
        refs, target = draw(args.attribute, seed) if own is None else (own, own)
        unguided, guided = (
            np.asarray(guided_sample(params, jax.random.key(seed), some, **settings).x) for some in (None, refs)
        )
        if seed == args.seed:
            first = refs, unguided, guided
        for name, x in (("unguided", unguided), ("guided", guided), ("references", refs)):
            rows.setdefault(f"share {name}", []).append(share(x, args.attribute))
            rows.setdefault(f"energy {name}", []).append(float(energy_distance(x, target)))
            if own is None:
                rows.setdefault(f"nearest {name}", []).append(float(nearest_ratio(x, refs, target)))

    m = len(first[0])
    errors = f"; mean ± standard error over {args.seeds} seeds" if args.seeds > 1 else ""
    print(f"\n{args.samples} faces, {m} references{errors}\n{'':26}{'unguided':>16}{'guided':>16}{'references':>16}")
    lines = [("energy distance", "energy", 3)]
    if own is None:
        lines = [(f"with {args.attribute}, %", "share", 1), *lines, ("nearest reference, ratio", "nearest", 2)]
    for title, kind, digits in lines:
        cells = [mean(rows[f"{kind} {name}"], digits) for name in ("unguided", "guided", "references")]
        if kind == "nearest":
            cells[2] = ""  # a reference is its own nearest one
        print(f"{title:26}" + "".join(f"{cell:>16}" for cell in cells))
    if own is None:
        print(
            f"\nThe share is what a classifier sees; on fresh faces it is right {accuracy(args.attribute):.1f}% of the "
            "time.\nThe energy distance is measured to other faces with the attribute: 0 is a perfect match, and the\n"
            "references' own distance shows what chance does. The ratio is the distance of samples to their nearest\n"
            "reference, over that of fresh faces: 1 is fresh, far below 1 is copied."
        )
    else:
        print("\nThe energy distance is measured to the references themselves: 0 is a perfect match.")
    some = slice(0, SHOWN)
    grids = {"references": first[0][some], "unguided": first[1][some], "guided": first[2][some]}
    few = first[2][:PAIRS]
    pairs = {"guided faces, and under each its nearest reference": np.concatenate([few, nearest(few, first[0])])}
    path = save_labelled_grids(args.out / "quickstart.png", [grids, pairs], columns=[8, len(few)], scale=4)
    print(f"\npicture: {path}   ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
