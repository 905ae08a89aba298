"""Pictures of samples: grids of images, points in the plane with their paths, curves, witness, attribution."""

import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmdjax._core.extras import optional
from mmdjax._files.atomic import written_whole
from mmdjax._points.particles import as_particles
from mmdjax.mmd import attribution, witness

DPI = 110


def image_grid(images: Any, *, columns: int, scale: int = 1, margin: int = 1) -> Any:
    """Images in rows, as one `PIL.Image`.

    Args:
      images: [n, height, width, 1 or 3] in [−1, 1]; values outside are clipped.
      columns: images in a row.
      scale: each pixel becomes scale × scale pixels.
      margin: pixels between images.
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


def save_labelled_grids(
    path: str | Path,
    grids: dict[str, Any] | Sequence[dict[str, Any]],
    *,
    columns: int | Sequence[int] = 8,
    scale: int = 6,
) -> Path:
    """Write several image grids side by side, each under its title, as one PNG; complete or not at all.

    Args:
      path: the file; its folder is made.
      grids: title -> images [n, height, width, 1 or 3] in [−1, 1]. A list of such: one row of grids below the other.
      columns: images in a row of each grid; a list gives one number for each row of grids.
      scale: each pixel becomes scale × scale pixels.
    Returns:
      The path.
    """
    from PIL import Image, ImageDraw, ImageFont

    path = Path(path)
    rows = [grids] if isinstance(grids, dict) else list(grids)
    widths = [columns] * len(rows) if isinstance(columns, int) else list(columns)
    gap, header, font = 16, 34, ImageFont.load_default(size=16)
    placed, bottom, right = [], 0, 0  # (title, picture, left, top)
    for row, number in zip(rows, widths, strict=True):
        left, top, height = gap, bottom + header, 0
        for title, images in row.items():
            picture = image_grid(images, columns=number, scale=scale, margin=scale)
            placed.append((title, picture, left, top))
            left += max(picture.width, round(font.getlength(title))) + gap
            height = max(height, picture.height)
        bottom, right = top + height + gap, max(right, left)
    sheet = Image.new("RGB", (right, bottom), "white")
    draw = ImageDraw.Draw(sheet)
    for title, picture, left, top in placed:
        draw.text((left, top - header + 8), title, fill="black", font=font)
        sheet.paste(picture, (left, top))
    with written_whole(path) as partial:
        sheet.save(partial, format="PNG")
    return path


# Two dimensions, curves and features, through matplotlib: each returns its figure, which a notebook shows as the last
# line of a cell; `save_figure` writes one.


def _figure(**settings: Any) -> Any:
    figure: Any = optional("matplotlib.figure", "plots", "to draw figures").Figure(**settings)
    figure._repr_png_ = functools.partial(_png, figure)  # no pyplot made it, so that notebooks would print its name
    return figure


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, format="png")
    return buffer.getvalue()


def before_after(
    refs: Any,
    unguided: Any,
    guided: Any,
    *,
    path: Any = None,
    model_density: Callable[[np.ndarray], Any] | None = None,
    target_density: Callable[[np.ndarray], Any] | None = None,
    shown_paths: int = 40,
) -> Any:
    """Three panels of points in the plane: references, unguided samples, guided samples with their paths.

    Args:
      refs: [m, 2].
      unguided: [n, 2].
      guided: [n, 2].
      path: [num_steps, n, 2], `trace.path` of `guided_sample(..., keep_path=True)`; None: no paths.
      model_density: points [k, 2] -> log density [k], drawn as contours under the unguided samples.
      target_density: likewise, under the other two.
      shown_paths: how many samples' paths are drawn.
    Raises:
      ValueError: points that are not in the plane.
    """
    panels = {"references": refs, "unguided": unguided, "guided": guided}
    panels = {title: np.asarray(points) for title, points in panels.items()}
    for title, points in panels.items():
        if points.ndim != 2 or points.shape[1] != 2:
            raise ValueError(f"{title} has shape {points.shape}; give points in the plane, [n, 2]")
    low, high = _limits(np.concatenate(list(panels.values())))
    figure = _figure(figsize=(10.5, 3.7), layout="constrained")
    for axes, (title, points) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        density = model_density if title == "unguided" else target_density
        if density is not None:
            _contours(axes, density, low, high)
        if title == "guided" and path is not None:
            for line in np.asarray(path)[:, :shown_paths].transpose(1, 0, 2):
                axes.plot(line[:, 0], line[:, 1], color="0.5", linewidth=0.5, zorder=2)
        colour = {"references": "tab:blue", "unguided": "tab:gray", "guided": "tab:red"}[title]
        axes.scatter(points[:, 0], points[:, 1], s=9, color=colour, edgecolor="white", linewidth=0.3, zorder=3)
        axes.set(title=f"{title} ({len(points)})", xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
    return figure


def trace_curves(traces: dict[str, Any]) -> Any:
    """Curves of MMD² to the references, and of the mean length of the shifts, over the fraction of steps done.

    Args:
      traces: label -> `Samples.trace`. An unguided run has no MMD²: give the trace of one with `MMDGuidance(scale=0)`.
    """
    figure = _figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for label, trace in traces.items():
        mmd2 = np.asarray(trace.mmd2)
        done = np.arange(1, len(mmd2) + 1) / len(mmd2)
        left.plot(done, mmd2, label=label)
        right.plot(done, np.asarray(trace.shift_norm), label=label)
    left.axhline(0, color="0.8", linewidth=0.8, zorder=0)  # an unbiased estimate may lie below
    left.set(xlabel="steps done", ylabel="MMD² to the references")
    right.set(xlabel="steps done", ylabel="mean length of a shift", ylim=(0, None))
    left.legend(frameon=False)
    return figure


def witness_map(kernel: Any, points: dict[str, Any], refs: Any, *, resolution: int = 120) -> Any:
    """The witness function between samples and references in the plane, in a panel for each set of samples.

    Red: too many samples; guidance moves them away. Blue: too few; it moves samples there. All panels have one colour
    scale.

    Args:
      kernel: as for `witness`.
      points: title -> samples [n, 2].
      refs: references [m, 2].
      resolution: grid points along each side.
    """
    sets = {title: np.asarray(p) for title, p in points.items()}
    low, high = _limits(np.concatenate([np.asarray(refs), *sets.values()]))
    grid, extent = _grid(low, high, resolution)
    values = {title: np.asarray(witness(kernel, p, refs, grid)).reshape(resolution, -1) for title, p in sets.items()}
    most = max(np.abs(v).max() for v in values.values()) or 1.0
    figure = _figure(figsize=(3.6 * len(sets) + 0.8, 3.5), layout="constrained")
    panels = figure.subplots(1, len(sets), squeeze=False)[0]
    image: Any = None
    for axes, (title, value) in zip(panels, values.items(), strict=True):
        image = axes.imshow(value, extent=extent, origin="lower", cmap="RdBu_r", vmin=-most, vmax=most)
        axes.scatter(*sets[title].T, s=4, color="black", linewidth=0)
        axes.scatter(*np.asarray(refs).T, s=10, facecolor="none", edgecolor="tab:green", linewidth=0.6)
        axes.set(title=title)
    figure.colorbar(image, ax=panels.tolist(), label="witness: samples − references")
    return figure


def attribution_grid(kernel: Any, samples: Any, refs: Any, *, rows: int = 8, top: int = 4, scale: int = 4) -> Any:
    """Images: each sample, then the references that pull it most, as one `PIL.Image`; see `mmdjax.mmd.attribution`.

    Args:
      kernel: the kernel of the guidance.
      samples: [n, h, w, c] in [−1, 1], or Particles of such images, with the conditions that the kernel compares.
      refs: likewise.
      rows: how many samples are shown.
      top: how many references for each.
      scale: each pixel becomes scale × scale pixels.
    """
    shares = np.asarray(attribution(kernel, samples, refs))[:rows]
    of_samples, of_refs = (np.asarray(as_particles(points).x) for points in (samples, refs))
    most = np.argsort(-shares, axis=1)[:, :top]
    images = [image for i, best in enumerate(most) for image in (of_samples[i], *of_refs[best])]
    return image_grid(np.stack(images), columns=1 + most.shape[1], scale=scale, margin=scale)


def save_figure(figure: Any, path: str | Path, *, dpi: int = DPI) -> Path:
    """Write a matplotlib figure as PNG; complete or not at all.

    Returns:
      The path.
    """
    path = Path(path)
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=dpi, format="png")
    return path


def _limits(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, high = points.min(0), points.max(0)
    margin = 0.08 * max((high - low).max(), 1e-6)
    return low - margin, high + margin


def _grid(low: np.ndarray, high: np.ndarray, resolution: int) -> tuple[np.ndarray, tuple]:
    x, y = (np.linspace(a, b, resolution, dtype=np.float32) for a, b in zip(low, high, strict=True))
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2), (low[0], high[0], low[1], high[1])


def _contours(axes: Any, density: Callable[[np.ndarray], Any], low: np.ndarray, high: np.ndarray) -> None:
    # at a thousandth to nine tenths of the highest density
    grid, extent = _grid(low, high, 150)
    values = np.asarray(density(grid)).reshape(150, 150)
    levels = values.max() + np.log([1e-3, 0.01, 0.1, 0.5, 0.9])
    axes.contour(values, levels, extent=extent, colors="0.75", linewidths=0.6, linestyles="solid", zorder=1)
