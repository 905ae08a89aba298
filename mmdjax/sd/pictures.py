"""Folders of pictures, with captions or without, as arrays in [−1, 1].

A picture is rotated by its EXIF tag, cropped around its centre to the wanted shape, and resized (Lanczos). Colours are
converted to 8-bit RGB: also grey, CMYK and 16 bits a channel; transparent pictures get a white background. Pictures
with several frames, and those smaller than one latent, are errors. A picture whose EXIF data are damaged is used; if
they do not tell how to rotate it, it is not rotated.

What else lies in the folder is named as skipped, but for hidden files. For captions see `mmdjax.sd.text.captions`.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mmdjax.checkpoint import POINTER
from mmdjax.sd.text.captions import TABLES, find_captions, is_caption

ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".apng"),
    *(".jp2", ".j2k", ".jpx", ".jpf", ".tga", ".ppm", ".pgm", ".pbm", ".pnm", ".pcx", ".qoi", ".ico", ".psd", ".mpo"),
)
UNKNOWN = (".heic", ".heif", ".jxl", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".raw")
NO_CAPTION = "it has no caption and others have"
TURNS = {  # EXIF's orientation, and the name of Pillow's operation that undoes it
    **{2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"},
    **{6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"},
}
ORIENTATION = 0x0112


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
    there = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    paths = [path for path in there if path.suffix.lower() in ENDINGS + UNKNOWN and not path.is_dir()]
    if not paths:
        raise FileNotFoundError(f"{folder}: no pictures; looked for {', '.join('*' + ending for ending in ENDINGS)}")
    problems = {path: problem for path in paths if (problem := _problem(path, smallest)) is not None}
    found, stray = find_captions(folder, paths) if captions else ({}, [])
    for path in paths if found else ():
        if path not in found:
            problems.setdefault(path, NO_CAPTION)
    others = [path for path in there if not (path in paths or is_caption(path) or path.name in TABLES)]
    return _usable(paths, found or None, problems, stray, skip, tuple(_left_out(others)))


def _left_out(paths: Iterable[Path]) -> Iterator[str]:
    """Files and folders that are neither pictures nor captions, a line for each kind."""
    kinds: dict[str, list[str]] = {}
    for path in paths:
        kinds.setdefault("/" if path.is_dir() else path.suffix.lower(), []).append(path.name)
    for kind, names in kinds.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        what = "a folder; the pictures in folders within are not read" if kind == "/" else "neither picture nor caption"
        yield f"{names[0]}{more}: {what}"


def read_picture(path: str | Path, height: int, width: int, *, channels: int = 3) -> Float[np.ndarray, "h w c"]:
    """One picture in [−1, 1], cropped around its centre to the ratio height : width and resized.

    Args:
      channels: 3, or 1 for grey.
    Raises:
      PictureError: it cannot be read; `open_pictures` finds out before.
    """
    from PIL import Image

    try:
        picture = _opened(Path(path), "RGB" if channels == 3 else "L")
    except Exception as error:  # a file can spoil a decoder in any way, and the user needs its name
        raise PictureError(f"{path}: not readable as a picture ({error})") from error
    shrink = min(picture.width / width, picture.height / height)
    cut = round(width * shrink), round(height * shrink)
    left, top = (picture.width - cut[0]) // 2, (picture.height - cut[1]) // 2
    fitted = picture.crop((left, top, left + cut[0], top + cut[1])).resize((width, height), Image.Resampling.LANCZOS)
    return (np.asarray(fitted, np.float32) / 127.5 - 1).reshape(height, width, channels)


def _opened(path: Path, mode: str) -> Any:
    from PIL import Image

    with Image.open(path) as picture:
        return _eight_bit(_upright(picture), mode)


def _upright(picture: Any) -> Any:
    """The picture as its EXIF data say that it was held; damaged ones say nothing, which harms no pixel."""
    from PIL import Image

    try:
        turn = TURNS.get(picture.getexif().get(ORIENTATION, 1))
    except Exception:  # Pillow's readers of EXIF fail in their own ways: struct's, SyntaxError, ValueError
        turn = None
    return picture if turn is None else picture.transpose(Image.Transpose[turn])


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
            _opened(path, "RGB")  # all that reading it does
    except Exception as error:  # a file can spoil a decoder in any way
        return _why(path, error)
    return None


def _why(path: Path, error: Exception) -> str:
    """Why a picture cannot be read."""
    if not path.exists():
        return "a link to a file that is not there" if path.is_symlink() else "it vanished while it was read"
    if path.suffix.lower() in UNKNOWN:
        return f"Pillow reads no {path.suffix.lower()}; save it as .png or .jpg"
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            return "a Git LFS pointer, a note in place of the picture; run `git lfs pull`"
    return f"not readable as a picture ({error})"
