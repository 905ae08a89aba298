"""Draw the pixel-art faces: sheets of 16 × 16 pictures, and what each of them shows.

    cd examples/faces && npm install                            # DiceBear and resvg, of the versions in package.json
    python examples/faces/write_faces.py                        # the sheets that ship with mmdjax
    python examples/faces/write_faces.py --training out/faces   # those that only training reads

Every attribute of a face is drawn by NumPy from the seed of its pool, and DiceBear is told all of them: what a picture
shows is known, and no two pools share a seed.
"""

import argparse
import hashlib
import json
import subprocess
from pathlib import Path

import numpy as np

from mmdjax.faces import ACCESSORIES, DATA, HAIR, HAIR_COLOURS, SIZE, SKINS, write_sheet

HERE = Path(__file__).parent
BACKGROUND = "d5e4f1"
EYE_COLOURS = ("76778b", "697b94", "647b90", "5b7c8b", "588387", "876658")
MOUTH_COLOURS = ("d29985", "c98276", "e35d6a", "de0f0d")
CLOTHING_COLOURS = (
    "5bc0de", "428bca", "03396c", "88d8b0", "44c585", "00b159", "ff6f69", "d11141", "ae0001", "ffeead", "ffd969",
    "ffc425",
)  # fmt: skip
HAT_COLOURS = ("2e1e05", "2663a3", "989789", "3d8a6b", "cc6192", "614f8a", "a62116")
GLASSES_COLOURS = ("4b4b4b", "323232", "191919", "43677d", "5f705c", "a04b5d")
EARRING_COLOURS = ("daa520", "ffd700", "fafad2", "d3d3d3", "a9a9a9")
MOUTHS = tuple(f"happy{i:02d}" for i in range(1, 14)) + tuple(f"sad{i:02d}" for i in range(1, 11))
GLASSES = tuple(f"{kind}{i:02d}" for kind in ("light", "dark") for i in range(1, 8))

SHIPPED = {  # pool: (seed, faces, share that wears each accessory)
    "source": (1, 4000, {}),
    "glasses": (2, 1200, {"glasses": 1}),
    "hats": (3, 1200, {"hat": 1}),
    "beards": (4, 1200, {"beard": 1}),
}
TRAINING = {
    "training": (5, 20_000, {}),
    "everyone": (6, 12_000, {"glasses": 0.4, "hat": 0.4, "beard": 0.4}),  # for the classifier of attributes
}


def variants(count: int) -> tuple[str, ...]:
    return tuple(f"variant{i:02d}" for i in range(1, count + 1))


def choose(seed: int, count: int, wears: dict[str, float]) -> tuple[list[dict], dict[str, np.ndarray]]:
    """DiceBear's options of each face, and the attributes that mmdjax.faces knows: integers [count]."""
    rng = np.random.default_rng(seed)
    families = rng.choice(len(HAIR), count, p=[family.share for family in HAIR.values()])
    colours = rng.choice(len(HAIR_COLOURS), count, p=[colour.share for colour in HAIR_COLOURS.values()])
    skins = rng.integers(len(SKINS), size=count)
    worn = {name: (rng.random(count) < wears.get(name, 0)).astype(np.int64) for name in ACCESSORIES}
    hair, hair_colours = list(HAIR.values()), list(HAIR_COLOURS.values())
    options = []
    for i in range(count):

        def one(values):
            return [values[rng.integers(len(values))]]

        options.append(
            {
                "seed": f"{seed}-{i}",
                "backgroundColor": [BACKGROUND],
                "hair": one(hair[families[i]].variants),
                "hairColor": [hair_colours[colours[i]].hex],
                "skinColor": [list(SKINS.values())[skins[i]]],
                "eyes": one(variants(12)),
                "eyesColor": one(EYE_COLOURS),
                "mouth": one(MOUTHS),
                "mouthColor": one(MOUTH_COLOURS),
                "clothing": one(variants(23)),
                "clothingColor": one(CLOTHING_COLOURS),
                "glasses": one(GLASSES),
                "glassesColor": one(GLASSES_COLOURS),
                "glassesProbability": int(100 * worn["glasses"][i]),
                "hat": one(variants(10)),
                "hatColor": one(HAT_COLOURS),
                "hatProbability": int(100 * worn["hat"][i]),
                "beard": one(variants(8)),
                "beardProbability": int(100 * worn["beard"][i]),
                "accessories": one(variants(4)),
                "accessoriesColor": one(EARRING_COLOURS),
                "accessoriesProbability": int(100 * (rng.random() < 0.1)),
            }
        )
    return options, {"hair": families, "hair_colour": colours, "skin": skins, **worn}


def draw(options: list[dict], style: str, size: int) -> np.ndarray:
    """The pictures of DiceBear's options, uint8 [n, size, size, 3]."""
    lines = "\n".join(map(json.dumps, options)).encode()
    command = ["node", "draw.mjs", style, str(size)]
    made = subprocess.run(command, input=lines, cwd=HERE, stdout=subprocess.PIPE, check=False)
    if made.returncode:
        raise SystemExit("node draw.mjs failed; `npm install` in examples/faces brings what it needs")
    return np.frombuffer(made.stdout, np.uint8).reshape(len(options), size, size, 3)


def write_manifest(folder: Path, script: str, pools: dict[str, dict]) -> None:
    """manifest.json: what drew the sheets of a folder, and what is told of each."""
    packages = json.loads((HERE / "package.json").read_text())["dependencies"]
    manifest = {"drawn by": packages, "script": script, "pools": pools}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training", type=Path, metavar="FOLDER", help="write the sheets for training, here")
    args = parser.parse_args()
    folder, pools = (args.training, TRAINING) if args.training else (DATA, SHIPPED)
    folder.mkdir(parents=True, exist_ok=True)
    told = {}
    for name, (seed, count, wears) in pools.items():
        options, attributes = choose(seed, count, wears)
        images = draw(options, "pixelArt", SIZE)
        write_sheet(folder / name, images, attributes)
        digest = hashlib.sha256(images.tobytes()).hexdigest()
        told[name] = {"seed": seed, "faces": count, "wears": wears, "sha256 of the pixels": digest}
        print(f"{name}: {count} faces, {(folder / name).with_suffix('.png').stat().st_size / 1e3:.0f} kB")
    write_manifest(folder, "examples/faces/write_faces.py", told)


if __name__ == "__main__":
    main()
