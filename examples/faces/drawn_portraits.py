"""Drawn portraits of 64 × 64 pixels whose every attribute is known, and the prompts that describe them.

The sheets in examples/faces/portraits, drawn by examples/faces/write_portraits.py, none of them seen in training:

  source      as in training: no glasses, sunglasses, eye patches or masks
  sunglasses  everyone wears sunglasses
  glasses     everyone wears glasses
  mixed       beards wear sunglasses, buns wear glasses, the rest neither

    portraits = read_sheet("sunglasses")
    portraits.images[:4], portraits.prompts()[:4], portraits.attributes["head"][:4]
    read_accessories(portraits.images[:4])  # what a classifier sees: "sunglasses"

Source: Open Peeps by Pablo Stanley, CC0 1.0.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmdjax.faces import as_sheet, from_sheet

SHEETS = Path(__file__).parent / "portraits"
POOLS = ("source", "sunglasses", "glasses", "mixed")
SIZE = 64  # pixels of a portrait

# Names at DiceBear, and what a prompt calls them.

FACES = {
    "smile": "smiling",
    "calm": "calm",
    "cute": "calm",
    "smileBig": "grinning",
    "smileTeethGap": "grinning",
    "smileLOL": "laughing",
    "cheeky": "cheeky",
    "lovingGrin1": "loving",
    "driven": "determined",
    "explaining": "talking",
    "serious": "serious",
    "solemn": "sad",
    "tired": "tired",
    "concerned": "worried",
    "suspicious": "suspicious",
    "veryAngry": "angry",
}
HEADS = {  # {} is the colour, which hair that is drawn in one piece with its outline does not have: it is black
    "afro": "a black afro",
    "bangs": "a {} fringe",
    "bangs2": "a black bob",
    "bantuKnots": "black knots",
    "bun": "a black bun with a headband",
    "bun2": "a black bun",
    "buns": "small black buns",
    "cornrows": "{} cornrows",
    "cornrows2": "a black plait",
    "dreads1": "long black dreadlocks",
    "dreads2": "black dreadlocks",
    "flatTop": "a black flat top",
    "flatTopLong": "a high black flat top",
    "grayBun": "a {} bun",
    "grayMedium": "{} hair tied back",
    "grayShort": "short {} hair",
    "long": "long black hair",
    "longBangs": "long black hair",
    "longCurly": "long curly black hair",
    "medium1": "medium black hair",
    "medium2": "medium black hair",
    "medium3": "medium black hair",
    "mediumBangs": "medium black hair",
    "mediumBangs2": "curly {} hair",
    "mediumBangs3": "medium black hair",
    "mediumStraight": "straight black hair",
    "mohawk": "a {} mohawk",
    "mohawk2": "a {} mohawk",
    "noHair1": "no hair",
    "noHair3": "thin {} hair",
    "pomp": "a black quiff",
    "shaved1": "black hair with shaved sides",
    "shaved2": "black hair with shaved sides",
    "shaved3": "wild black hair",
    "short1": "short black hair",
    "short2": "short black hair",
    "short3": "short black hair",
    "short4": "a {} quiff",
    "short5": "short black hair",
    "twists": "black twists",
    "twists2": "black twists",
}
BUNS = ("bun", "bun2", "grayBun")
BEARDS = {
    "none": "",
    "chin": "a chin beard",
    "full": "a full beard",
    "full2": "a full beard",
    "full3": "a long beard",
    "full4": "a full beard",
    "goatee1": "a goatee",
    "goatee2": "a goatee",
    "moustache2": "a drooping moustache",
    "moustache3": "a curled moustache",
    "moustache5": "a moustache",
    "moustache6": "a moustache",
    "moustache7": "a moustache",
    "moustache9": "a moustache",
}
ACCESSORIES = {
    "none": "",
    "sunglasses": "sunglasses",
    "sunglasses2": "sunglasses",
    "glasses": "glasses",
    "glasses2": "glasses",
    "glasses3": "glasses",
    "glasses4": "glasses",
    "glasses5": "glasses",
}
HAIR_COLOURS = {"blond": "d6b370", "brown": "724133", "red": "c93305", "pink": "f59797", "grey": "b9b6b4"}
SKINS = {"pale": "ffdbb4", "light": "edb98a", "tan": "d08b5b", "brown": "ae5d29", "dark": "694d3d"}
CLOTHES = {
    "red": "e78276",
    "orange": "ffae5c",
    "yellow": "fdea6b",
    "green": "78e185",
    "turquoise": "9ddadb",
    "blue": "8fa7df",
    "pink": "e279c7",
}
TABLES = {  # of each attribute: what its numbers count along
    "face": tuple(FACES),
    "head": tuple(HEADS),
    "beard": tuple(BEARDS),
    "accessory": tuple(ACCESSORIES),
    "hair_colour": tuple(HAIR_COLOURS),
    "skin": tuple(SKINS),
    "clothes": tuple(CLOTHES),
}


class Portraits(NamedTuple):
    """Pictures and what they show.

    Args:
      images: [n, 64, 64, 3] float32 in [−1, 1].
      attributes: by the names of `TABLES`, [n] strings. Heads whose hair is black have a hair colour, too, which is
        not seen.
    """

    images: np.ndarray
    attributes: dict[str, np.ndarray]

    def prompts(self, *, accessory: bool = True) -> list[str]:
        """A prompt of each, which names all that it shows; without `accessory`, all but that."""
        rows = zip(*self.attributes.values(), strict=True)
        portraits = [dict(zip(self.attributes, row, strict=True)) for row in rows]
        parts = tuple(part for part in PARTS if accessory or part != "accessory")
        return [describe(portrait, parts) for portrait in portraits]

    def __getitem__(self, rows: Any) -> "Portraits":
        return Portraits(self.images[rows], {name: values[rows] for name, values in self.attributes.items()})


PARTS = ("face", "head", "beard", "accessory", "skin", "clothes")


def describe(portrait: dict[str, str], parts: Sequence[str] = PARTS) -> str:
    """The prompt of one portrait that tells these parts of it, all in one order.

    Example:
      >>> bearded = {"face": "smile", "head": "grayBun", "beard": "full", "accessory": "sunglasses"}
      >>> describe(bearded | {"hair_colour": "red", "skin": "dark", "clothes": "blue"})
      'a smiling person with a red bun, a full beard and sunglasses, dark skin, blue clothes'
      >>> describe(bearded, ["face", "beard"])
      'a smiling person with a full beard'
    """
    face = FACES[portrait["face"]] if "face" in parts else ""
    told = {
        "head": lambda: HEADS[portrait["head"]].format(portrait["hair_colour"]),
        "beard": lambda: BEARDS[portrait["beard"]],
        "accessory": lambda: ACCESSORIES[portrait["accessory"]],
    }
    wears = [words for part, tell in told.items() if part in parts and (words := tell())]
    prompt = " ".join(["an" if face[:1] == "a" else "a", *face.split(), "person"])
    if wears:
        prompt += " with " + " and ".join(filter(None, [", ".join(wears[:-1]), wears[-1]]))
    if "skin" in parts:
        prompt += f", {portrait['skin']} skin"
    if "clothes" in parts:
        prompt += f", {portrait['clothes']} clothes"
    return prompt


def read_sheet(pool: str, folder: str | Path = SHEETS) -> Portraits:
    """The portraits of a pool in the order in which they were drawn."""
    from PIL import Image

    with np.load(Path(folder) / f"{pool}.npz") as file:
        attributes = {name: np.array(table)[file[name]] for name, table in TABLES.items()}
    with Image.open(Path(folder) / f"{pool}.png") as picture:
        sheet = np.asarray(picture.convert("RGB"))
    count = len(next(iter(attributes.values())))
    return Portraits(from_sheet(sheet, SIZE)[:count].astype(np.float32) / 127.5 - 1, attributes)


def kind(attributes: dict[str, np.ndarray]) -> np.ndarray:
    """What decides on the accessory in "mixed": "beard", else "bun", else "other"; [n] strings."""
    return np.select([attributes["beard"] != "none", np.isin(attributes["head"], BUNS)], ["beard", "bun"], "other")


WORN = ("none", "glasses", "sunglasses")
WORN_BY = {"beard": "sunglasses", "bun": "glasses", "other": "none"}  # in "mixed"


def read_accessories(images: np.ndarray) -> np.ndarray:
    """What portraits [n, 64, 64, 3] wear, of `WORN`: [n] strings.

    By ridge regression on small grey pictures of every other portrait of three sheets. On the others it is right for
    99.8% without, 96.8% with glasses and 99% with sunglasses.
    """
    return np.array(WORN)[(_small_and_grey(images) @ _reader()).argmax(1)]


@functools.cache
def _reader():
    parts = [_small_and_grey(read_sheet(pool).images[::2]) for pool in ("source", "glasses", "sunglasses")]
    x, y = np.concatenate(parts), np.repeat(np.eye(3), list(map(len, parts)), axis=0)
    return np.linalg.solve(x.T @ x + 3.0 * np.eye(x.shape[1]), x.T @ y)


def _small_and_grey(images):
    # 16 × 16, and a column of ones
    grey = np.asarray(images).mean(-1).reshape(len(images), 16, 4, 16, 4).mean((2, 4)).reshape(len(images), -1)
    return np.concatenate([grey, np.ones((len(images), 1))], axis=1)


def write_sheet(pool: str, folder: str | Path, images: np.ndarray, attributes: dict[str, np.ndarray]) -> Path:
    """Write uint8 pictures [n, 64, 64, 3] of at most 256 colours, and their attributes as numbers along `TABLES`."""
    from PIL import Image

    sheet = as_sheet(images, blank=0)
    path = Path(folder) / f"{pool}.png"
    values, inverse = np.unique(sheet.reshape(-1, 3), axis=0, return_inverse=True)
    if len(values) > 256:
        raise ValueError(f"the pictures have {len(values)} colours; a sheet holds 256")
    picture = Image.frombytes("P", sheet.shape[1::-1], inverse.astype(np.uint8).tobytes())
    picture.putpalette(values.tobytes())
    picture.save(path, optimize=True)
    np.savez_compressed(path.with_suffix(".npz"), **{name: a.astype(np.uint8) for name, a in attributes.items()})
    return path
