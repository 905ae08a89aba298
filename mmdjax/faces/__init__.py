"""A small world of faces: pixel art of 16 × 16, every attribute of every picture known, and a denoiser of them.

The denoiser was trained by `examples/faces/train_faces.py` on 20,000 faces that wear no glasses, no hat and no beard.
The sheets in this folder hold other faces, drawn from other seeds: 4,000 more of that kind ("source"), and 1,200 each
that wear glasses, hats and beards. `examples/faces/write_faces.py` drew them all.

Source: Pixel Art by DiceBear, CC0 1.0.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from mmdjax.checkpoint import load_weights
from mmdjax.denoisers import DiffusionModel, from_model
from mmdjax.schedules import Cosine

DATA = Path(__file__).parent
WEIGHTS, CLASSIFIER = DATA / "faces.safetensors", DATA / "attributes.safetensors"
SIZE, COLUMNS = 16, 40  # pixels of a face; faces in a row of a sheet


class Hair(NamedTuple):
    """A family of hair styles: the share of faces that have it, and its names at DiceBear."""

    share: float
    variants: tuple[str, ...]


class Colour(NamedTuple):
    """A colour of hair: the share of faces that have it, and its red, green and blue."""

    share: float
    hex: str


def _styles(kind: str, *numbers: int) -> tuple[str, ...]:
    return tuple(f"{kind}{i:02d}" for i in numbers)


HAIR = {
    "short": Hair(0.4, _styles("short", 1, 2, 3, 4, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 19)),
    "cropped": Hair(0.15, _styles("short", 5, 7, 18, 20, 21, 22, 23, 24)),
    "long": Hair(0.25, _styles("long", 1, 2, 3, 4, 7, 8, 9, 12, 13, 18, 19, 20, 21)),
    "tied": Hair(0.2, _styles("long", 5, 6, 10, 11, 14, 15, 16, 17)),
}
HAIR_COLOURS = {
    "blond": Colour(0.22, "cab188"),
    "brown": Colour(0.25, "83623b"),
    "black": Colour(0.22, "28150a"),
    "auburn": Colour(0.15, "612616"),
    "red": Colour(0.06, "bd1700"),
    "blue": Colour(0.05, "009bbd"),
    "green": Colour(0.05, "91cb15"),
}
SKINS = {"pale": "ffdbac", "light": "eac393", "tan": "cb9e6e", "brown": "a26d3d", "dark": "8d5524"}
CONDITIONS = ("hair", "hair_colour", "skin")  # what the denoiser can be told, in this order
CLASSES = {"hair": len(HAIR), "hair_colour": len(HAIR_COLOURS), "skin": len(SKINS)}
ACCESSORIES = ("glasses", "hat", "beard")  # what it has never seen
VALUES = CLASSES | dict.fromkeys(ACCESSORIES, 2)  # how many each attribute has
POOLS = ("source", "glasses", "hats", "beards")
ATTRIBUTES = {  # what references may have in common: the pool, and the attribute's name and value there
    "glasses": ("glasses", "glasses", 1),
    "hat": ("hats", "hat", 1),
    "beard": ("beards", "beard", 1),
    "long-hair": ("source", "hair", list(HAIR).index("long")),
    **{f"{name}-hair": ("source", "hair_colour", i) for i, name in enumerate(HAIR_COLOURS)},
}


class Faces(NamedTuple):
    """Pictures and what they show.

    Args:
      images: [n, 16, 16, 3] float32 in [−1, 1].
      attributes: by name, [n] integers. "hair", "hair_colour" and "skin" count along `HAIR`, `HAIR_COLOURS` and
        `SKINS`; "glasses", "hat" and "beard" are 0 or 1.
    """

    images: Float[np.ndarray, "n 16 16 3"]
    attributes: dict[str, Int[np.ndarray, " n"]]

    @property
    def cond(self) -> Int[np.ndarray, "n 3"]:
        """What the denoiser takes as cond, int32 [n, 3]."""
        return np.stack([self.attributes[name] for name in CONDITIONS], axis=1).astype(np.int32)

    def __getitem__(self, rows: Any) -> "Faces":
        return Faces(self.images[rows], {name: values[rows] for name, values in self.attributes.items()})


def faces_model() -> DiffusionModel:
    """The faces' model without parameters: v-prediction on the cosine schedule, samples [16, 16, 3]."""
    from mmdjax.faces.network import FacesNetwork

    return DiffusionModel(from_model(FacesNetwork().apply, "v"), Cosine(), (SIZE, SIZE, 3))


def load_faces() -> tuple[DiffusionModel, Any]:
    """A trained denoiser of 16 × 16 pixel-art faces and its parameters, from the package's own files.

    It was trained on faces without glasses, hats and beards. cond is int [n, 3]: hair style, hair colour and skin,
    counted along `HAIR`, `HAIR_COLOURS` and `SKINS`; the number after the last (4, 7, 5) leaves one open. None leaves
    all open.

    Returns:
      (model, params): model.shape is (16, 16, 3), pictures in [−1, 1]; params are float32 NumPy arrays.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from mmdjax import guided_sample
      >>> model, params = load_faces()
      >>> long_and_blue = jnp.array([[2, 5, 5]] * 2)
      >>> faces = guided_sample(
      ...     params, jax.random.key(0), None, model=model, num_samples=2, cond=long_and_blue, num_steps=2)
      >>> faces.x.shape
      (2, 16, 16, 3)
    """
    return faces_model(), load_weights(WEIGHTS)


@functools.cache
def pool(name: str) -> Faces:
    """All faces of a sheet of the package: "source", "glasses", "hats" or "beards".

    Raises:
      ValueError: another name.

    Example:
      >>> glasses = pool("glasses")
      >>> glasses.images.shape, int(glasses.attributes["glasses"].min())
      ((1200, 16, 16, 3), 1)
    """
    if name not in POOLS:
        raise ValueError(f"the pool is {name!r}; choose of {POOLS}")
    faces = read_sheet(DATA / name)
    for array in (faces.images, *faces.attributes.values()):
        array.flags.writeable = False  # all callers share them
    return faces


def faces_with(attribute: str) -> Faces:
    """All faces that share an attribute of `ATTRIBUTES`: "glasses", or of the pool "source" those with "long-hair".

    Raises:
      ValueError: another attribute.

    Example:
      >>> faces_with("blue-hair").images.shape[1:]
      (16, 16, 3)
    """
    if attribute not in ATTRIBUTES:
        raise ValueError(f"attribute is {attribute!r}; choose of {', '.join(ATTRIBUTES)}")
    sheet, name, value = ATTRIBUTES[attribute]
    faces = pool(sheet)
    return faces[faces.attributes[name] == value]


def read_attributes(images: Float[Array | np.ndarray, "n 16 16 3"]) -> dict[str, Int[np.ndarray, " n"]]:
    """What a small network sees in faces: the attributes of `Faces`, by name.

    It was trained on 12,000 faces of which 40% each wear glasses, hats and beards. How often it is right on fresh
    faces: see `examples/faces/train_faces.py --evaluate`.

    Example:
      >>> glasses = pool("glasses").images[:100]
      >>> float(read_attributes(glasses)["glasses"].mean()) > 0.95
      True
    """
    logits, _ = _attributes(images)
    return {name: np.asarray(values).argmax(-1) for name, values in logits.items()}


def attribute_features(images: Float[Array | np.ndarray, "n 16 16 3"]) -> Float[np.ndarray, "n 128"]:
    """What the network of `read_attributes` makes of faces before it names anything: features to compare sets in.

    Example:
      >>> attribute_features(pool("source").images[:2]).shape
      (2, 128)
    """
    return np.asarray(_attributes(images)[1])


def _attributes(images):
    from mmdjax.faces.network import AttributesNetwork

    return AttributesNetwork().apply(_classifier(), np.asarray(images, np.float32))


@functools.cache
def _classifier():
    return load_weights(CLASSIFIER)


def read_sheet(path: str | Path) -> Faces:
    """The faces of `path`.png, with their attributes from `path`.npz."""
    from PIL import Image

    with np.load(Path(path).with_suffix(".npz")) as data:
        attributes = {name: values.astype(np.int32) for name, values in data.items()}
    with Image.open(Path(path).with_suffix(".png")) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    images = from_sheet(pixels, SIZE)[: len(attributes["hair"])]
    return Faces((images / 127.5 - 1).astype(np.float32), attributes)


def write_sheet(path: str | Path, pixels: np.ndarray, attributes: dict[str, np.ndarray]) -> None:
    """Write bytes [n, 16, 16, 3] and their attributes as `read_sheet` reads them."""
    from PIL import Image

    Image.fromarray(as_sheet(pixels, blank=255)).save(Path(path).with_suffix(".png"), optimize=True)
    small: dict[str, Any] = {name: values.astype(np.uint8) for name, values in attributes.items()}
    np.savez_compressed(Path(path).with_suffix(".npz"), **small)


def as_sheet(pixels: np.ndarray, *, blank: int) -> np.ndarray:
    """Square pictures [n, size, size, 3] side by side, `COLUMNS` a row, what is left of the last one `blank`.

    Example:
      >>> as_sheet(np.zeros((41, 2, 2, 3), np.uint8), blank=255).shape
      (4, 80, 3)
    """
    size, rows = pixels.shape[1], -(-len(pixels) // COLUMNS)
    padded = np.full((rows * COLUMNS, *pixels.shape[1:]), blank, np.uint8)
    padded[: len(pixels)] = pixels
    return padded.reshape(rows, COLUMNS, size, size, 3).swapaxes(1, 2).reshape(rows * size, COLUMNS * size, 3)


def from_sheet(sheet: np.ndarray, size: int) -> np.ndarray:
    """The pictures [n, size, size, 3] of a sheet, those that fill up its last row included."""
    rows, columns = (length // size for length in sheet.shape[:2])
    return sheet.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
