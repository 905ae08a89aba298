"""Folders of pictures, with captions or without, as arrays in [−1, 1].

A picture is rotated by its EXIF tag, cropped around its centre to the wanted shape, and resized (Lanczos). Colours are
converted to 8-bit RGB: also grey, CMYK and 16 bits a channel; transparent pictures get a white background. Pictures
with several frames, and those smaller than one latent, are errors.

Captions are `name.txt` beside `name.png`, or a `metadata.jsonl` of lines {"file_name": "name.png", "text": "…"}. If
there is a metadata.jsonl, text files are ignored.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
METADATA = "metadata.jsonl"
NO_CAPTION = "it has no caption and others have"


class PictureError(ValueError):
    """Pictures or captions that cannot be used. The message lists them and says what to do."""


@dataclasses.dataclass(frozen=True)
class PictureFolder:
    """The pictures of a folder in the order of their names; made by `open_pictures`.

    Args:
      paths: of the pictures that can be read.
      captions: one for each; None if there are none or they are ignored.
      skipped: what was left out, and why.
    """

    paths: tuple[Path, ...]
    captions: tuple[str, ...] | None
    skipped: tuple[str, ...] = ()

    def batches(
        self, height: int, width: int, *, channels: int = 3, batch_size: int = 8
    ) -> Iterator[Float[np.ndarray, "k h w c"]]:
        """An iterator over the pictures, `batch_size` at a time, so that not all are in memory."""
        for start in range(0, len(self.paths), batch_size):
            paths = self.paths[start : start + batch_size]
            yield np.stack([read_picture(path, height, width, channels=channels) for path in paths])

    def at_least(self, smallest: int, *, skip: bool = False) -> "PictureFolder":
        """The same after a check of the sizes, with `smallest` and `skip` as in `open_pictures`."""
        problems = {path: problem for path in self.paths if (problem := _problem(path, smallest, sizes_only=True))}
        captions = None if self.captions is None else dict(zip(self.paths, self.captions, strict=True))
        return _usable(self.paths, captions, problems, [], skip, self.skipped)


def open_pictures(folder: str | Path, *, smallest: int = 2, skip: bool = False, captions: bool = True) -> PictureFolder:
    """The pictures and captions of a folder, after a check of each; subfolders are not read.

    Args:
      smallest: the fewest pixels of the shorter side, such as the autoencoder's downscale.
      skip: leave out what cannot be used instead of raising; also pictures without a caption if others have one.
      captions: False: captions are ignored.
    Raises:
      FileNotFoundError: no such folder, or no picture in it.
      PictureError: unreadable pictures, captions without pictures, pictures without a caption if others have one: all
        listed in one message.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of pictures")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS and path.is_file())
    if not paths:
        raise FileNotFoundError(f"{folder}: no pictures; looked for {', '.join('*' + ending for ending in ENDINGS)}")
    problems = {path: problem for path in paths if (problem := _problem(path, smallest)) is not None}
    found, stray = _captions(folder, paths) if captions else ({}, [])
    for path in paths if found else ():
        if path not in found:
            problems.setdefault(path, NO_CAPTION)
    return _usable(paths, found or None, problems, stray, skip)


def read_picture(path: str | Path, height: int, width: int, *, channels: int = 3) -> Float[np.ndarray, "h w c"]:
    """One picture in [−1, 1], cropped around its centre to the ratio height : width and resized.

    Args:
      channels: 3, or 1 for grey.
    """
    from PIL import Image, ImageOps

    with Image.open(path) as picture:
        picture = _eight_bit(ImageOps.exif_transpose(picture), "RGB" if channels == 3 else "L")
    shrink = min(picture.width / width, picture.height / height)
    cut = round(width * shrink), round(height * shrink)
    left, top = (picture.width - cut[0]) // 2, (picture.height - cut[1]) // 2
    fitted = picture.crop((left, top, left + cut[0], top + cut[1])).resize((width, height), Image.Resampling.LANCZOS)
    return (np.asarray(fitted, np.float32) / 127.5 - 1).reshape(height, width, channels)


def _eight_bit(picture: Any, mode: str) -> Any:
    from PIL import Image

    if picture.mode.startswith("I") or picture.mode == "F":  # 16 bits and more: `convert` would clip them at 255
        grey = np.asarray(picture, np.float32)
        span = 65535.0 if picture.mode.startswith("I") else 1.0
        picture = Image.fromarray(np.round(np.clip(grey / span, 0, 1) * 255).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert(mode)


def _usable(
    paths: Sequence[Path],
    captions: dict[Path, str] | None,
    problems: dict[Path, str],
    stray: list[str],
    skip: bool,
    skipped: tuple[str, ...] = (),
) -> PictureFolder:
    """The pictures without a problem; without `skip`, one error that lists all problems."""
    lines = [f"{path.name}: {problem}" for path, problem in sorted(problems.items())] + stray
    usable = tuple(path for path in paths if path not in problems)
    if lines and (not skip or not usable):
        remedy = "mend or remove them, or skip them (--unreadable skip)" if usable else "none is left"
        if usable and (stray or NO_CAPTION in problems.values()):
            remedy += ", or use no captions (--captions ignore)"
        head = f"{paths[0].parent}: {len(lines)} of {len(paths)} pictures or captions: {remedy}"
        raise PictureError("\n  ".join([head, *lines]))
    found = None if captions is None else tuple(captions[path] for path in usable)
    return PictureFolder(usable, found, (*skipped, *lines))


def _problem(path: Path, smallest: int, *, sizes_only: bool = False) -> str | None:
    # decoding is the only proof that a picture is whole
    from PIL import Image

    try:
        with Image.open(path) as picture:
            frames = getattr(picture, "n_frames", 1)
            if frames > 1 and picture.format != "MPO":  # of a camera: one picture with previews of it
                return f"it has {frames} frames; save the one that is meant"
            if min(picture.size) < smallest:
                return f"it has {picture.width} × {picture.height} pixels; the shorter side needs {smallest}"
            if not sizes_only:
                picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"not readable as a picture ({error})"
    return None


def _captions(folder: Path, paths: Sequence[Path]) -> tuple[dict[Path, str], list[str]]:
    """Captions by picture, and their problems."""
    names, stems = {path.name: path for path in paths}, {path.stem: path for path in paths}
    found, stray = {}, []
    metadata = folder / METADATA
    if metadata.exists():
        lines = enumerate(metadata.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        for number, line in ((number, line) for number, line in lines if line.strip()):
            try:
                entry = json.loads(line)
                name, text = entry.get("file_name"), entry.get("text")
            except (ValueError, AttributeError):
                name = text = None
            if not (isinstance(name, str) and isinstance(text, str)):
                stray.append(f'{METADATA}, line {number}: not a JSON object with "file_name" and "text"')
            elif name not in names:
                stray.append(f"{METADATA}, line {number}: a caption without its picture {name}")
            else:
                found[names[name]] = text
    for path in sorted(folder.glob("*.txt")):
        if path.stem not in stems:
            stray.append(f"{path.name}: a caption without a picture")
        elif not metadata.exists():
            found[stems[path.stem]] = " ".join(path.read_text(encoding="utf-8", errors="replace").split())
    return found, stray
