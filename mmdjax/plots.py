"""Pictures of samples."""

from pathlib import Path
from typing import Any

import numpy as np

from mmdjax.whole import written_whole


def image_grid(images: Any, *, columns: int, scale: int = 1, margin: int = 1) -> Any:
    """Images in rows, as one `PIL.Image`.

    Args:
      images: [n, height, width, 1 or 3] in [−1, 1]; values outside are clipped.
      columns: images a row.
      scale: pixels a pixel.
      margin: between images, in pixels of the picture.
    Raises:
      ValueError: images of another shape, or none.

    Example:
      >>> image_grid(np.zeros((6, 8, 8, 1)), columns=3, scale=2).size
      (52, 35)
    """
    from PIL import Image

    images = np.asarray(images, np.float32)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        raise ValueError(f"images have shape {images.shape}; give [n, height, width, 1 or 3]")
    pixels = np.round((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2).repeat(3 // images.shape[-1], axis=3)
    n, height, width, _ = pixels.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (height + margin) + margin, columns * (width + margin) + margin, 3), 64, np.uint8)
    for i, picture in enumerate(pixels):
        top, left = (i // columns) * (height + margin) + margin, (i % columns) * (width + margin) + margin
        sheet[top : top + height, left : left + width] = picture
    return Image.fromarray(sheet)


def save_labelled_grids(path: str | Path, grids: dict[str, Any], *, columns: int = 8, scale: int = 6) -> Path:
    """Write several image grids side by side, each under its title, as one PNG; complete or not at all.

    Args:
      path: the file; its folder is made.
      grids: title -> images [n, height, width, 1 or 3] in [−1, 1].
      columns: images a row in each grid.
      scale: pixels a pixel.
    Returns:
      The path.
    """
    from PIL import Image, ImageDraw, ImageFont

    path = Path(path)
    pictures = {
        title: image_grid(images, columns=columns, scale=scale, margin=scale) for title, images in grids.items()
    }
    gap, header, font = 16, 34, ImageFont.load_default(size=16)
    widths = [max(picture.width, round(font.getlength(title))) for title, picture in pictures.items()]
    size = (sum(widths) + gap * (len(pictures) + 1), max(p.height for p in pictures.values()) + header + gap)
    sheet = Image.new("RGB", size, "white")
    draw, left = ImageDraw.Draw(sheet), gap
    for (title, picture), width in zip(pictures.items(), widths, strict=True):
        draw.text((left, 8), title, fill="black", font=font)
        sheet.paste(picture, (left, header))
        left += width + gap
    with written_whole(path) as partial:
        sheet.save(partial, format="PNG")
    return path
