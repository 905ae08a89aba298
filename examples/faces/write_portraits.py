"""Draw the portraits: sheets of 64 × 64 pictures, and what each of them shows.

    cd examples/faces && npm install                                # DiceBear and resvg, see package.json
    python examples/faces/write_portraits.py                        # the sheets in examples/faces/portraits
    python examples/faces/write_portraits.py --training out/portraits   # those that only training reads

Every attribute of a portrait is drawn by NumPy from the seed of its pool, and DiceBear is told all of them: what a
picture shows is known, and no two pools share a seed. No portrait of training wears anything on the eyes. Left out are
monsters, faces whose eyes look like glasses, hats and what is cut by the edge.

Pictures are reduced to one palette of 256 colours, that of the source pool: flat colours and what lies between them
and black.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np
from drawn_portraits import (
    ACCESSORIES,
    BEARDS,
    BUNS,
    CLOTHES,
    HAIR_COLOURS,
    HEADS,
    SHEETS,
    SIZE,
    SKINS,
    TABLES,
    write_sheet,
)  # fmt: skip
from write_faces import draw, write_manifest

BACKGROUND = "dfe8f0"
SHIPPED = {"source": (11, 1000), "sunglasses": (12, 800), "glasses": (13, 800), "mixed": (14, 800)}  # seed, portraits
TRAINING = {"training": (15, 20_000)}
BEARDED = 0.35  # share with facial hair
FACE_SHARES = {"smile": 3.0}  # others 1
HEAD_SHARES = {name: 2.5 for name, words in HEADS.items() if "{}" in words}  # coloured hair; others 1
NEITHER, SUNGLASSES, GLASSES = (
    [i for i, words in enumerate(ACCESSORIES.values()) if words == kind] for kind in ("", "sunglasses", "glasses")
)


def choose(pool: str, seed: int, count: int) -> dict[str, np.ndarray]:
    """The attributes of a pool's portraits: [count] numbers along `TABLES`."""
    rng = np.random.default_rng(seed)
    shares = {"face": FACE_SHARES, "head": HEAD_SHARES}

    def pick(name):
        p = np.array([shares.get(name, {}).get(value, 1.0) for value in TABLES[name]])
        return rng.choice(len(p), count, p=p / p.sum())

    found = {name: pick(name) for name in TABLES}
    bearded, buns = rng.random(count) < BEARDED, [list(HEADS).index(name) for name in BUNS]
    beards, worn = rng.integers(1, len(BEARDS), count), {"sunglasses": SUNGLASSES, "glasses": GLASSES}
    wears = [worn.get(pool, NEITHER)] * count
    if pool == "mixed":  # a third each: beards, buns, neither
        kind = rng.integers(3, size=count)
        bearded = kind == 0
        others = np.setdiff1d(np.arange(len(HEADS)), buns)
        found["head"] = np.where(kind == 1, rng.choice(buns, count), rng.choice(others, count))
        wears = [(SUNGLASSES, GLASSES, NEITHER)[k] for k in kind]
    found["beard"] = np.where(bearded, beards, 0)
    found["accessory"] = np.array([rng.choice(of) for of in wears])
    return found


def options(attributes: dict[str, np.ndarray], i: int) -> dict:
    """What DiceBear is told of portrait i."""
    names = {name: table[attributes[name][i]] for name, table in TABLES.items()}
    return {
        "backgroundColor": [BACKGROUND],
        "face": [names["face"]],
        "head": [names["head"]],
        "headContrastColor": [HAIR_COLOURS[names["hair_colour"]]],
        "skinColor": [SKINS[names["skin"]]],
        "clothingColor": [CLOTHES[names["clothes"]]],
        "facialHair": [names["beard"]] if names["beard"] != "none" else [],
        "facialHairProbability": 100 * (names["beard"] != "none"),
        "accessories": [names["accessory"]] if names["accessory"] != "none" else [],
        "accessoriesProbability": 100 * (names["accessory"] != "none"),
        "maskProbability": 0,
    }


def palette(images: np.ndarray):
    """256 colours of some portraits, as a Pillow picture to quantise others by."""
    from PIL import Image

    return Image.fromarray(images.reshape(-1, SIZE, 3)).quantize(256, kmeans=2, dither=Image.Dither.NONE)


def reduce(images: np.ndarray, colours) -> np.ndarray:
    """The same portraits in those colours alone."""
    from PIL import Image

    picture = Image.fromarray(images.reshape(-1, SIZE, 3)).quantize(palette=colours, dither=Image.Dither.NONE)
    return np.asarray(picture.convert("RGB")).reshape(images.shape)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training", type=Path, metavar="FOLDER", help="write the sheet for training, here")
    args = parser.parse_args()
    folder, pools = (args.training, TRAINING) if args.training else (SHEETS, SHIPPED)
    folder.mkdir(parents=True, exist_ok=True)
    told = {}
    source = choose("source", *SHIPPED["source"])
    colours = palette(draw([options(source, i) for i in range(500)], "openPeeps", SIZE))
    for name, (seed, count) in pools.items():
        attributes = choose(name, seed, count)
        drawn = draw([options(attributes, i) for i in range(count)], "openPeeps", SIZE)
        images = reduce(drawn, colours)
        path = write_sheet(name, folder, images, attributes)
        error = np.sqrt(np.mean((images / 127.5 - drawn / 127.5) ** 2))
        digest = hashlib.sha256(images.tobytes()).hexdigest()
        told[name] = {"seed": seed, "portraits": count, "sha256 of the pixels": digest}
        print(f"{name}: {count} portraits, {path.stat().st_size / 1e3:.0f} kB, RMS error of the palette {error:.4f}")
    write_manifest(folder, "examples/faces/write_portraits.py", told)


if __name__ == "__main__":
    main()
