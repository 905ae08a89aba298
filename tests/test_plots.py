"""Pictures: that they are whole, of the stated size, and show the numbers that they are given."""

import io
import pickle

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mmdjax import IMQ, Delta, Particles, Product, witness
from mmdjax.plots import (
    attribution_grid,
    before_after,
    image_grid,
    save_figure,
    save_labelled_grids,
    trace_curves,
    witness_map,
)
from mmdjax.sampling import Trace

POINTS = np.random.default_rng(0).normal(size=(12, 2)).astype(np.float32)


def width(path):
    with Image.open(path) as picture:
        return picture.width


def test_image_grid_places_every_image():
    images = np.linspace(-1, 1, 6)[:, None, None, None] * np.ones((6, 2, 3, 1))
    pixels = np.asarray(image_grid(images, columns=4, scale=2, margin=1))
    assert pixels.shape == (2 * 5 + 1, 4 * 7 + 1, 3)
    for i, value in enumerate(np.round(np.linspace(0, 255, 6))):
        top, left = 1 + (i // 4) * 5, 1 + (i % 4) * 7
        assert (pixels[top : top + 4, left : left + 6] == value).all()
    with pytest.raises(ValueError, match=r"images have shape \(6, 2, 3\); give \[n, height, width, 1 or 3\]"):
        image_grid(images[..., 0], columns=4)


def test_titles_do_not_overlap(tmp_path):
    small = np.ones((1, 2, 2, 3))
    path = save_labelled_grids(
        tmp_path / "new" / "a.png", {"a long title": small, "another": small}, columns=1, scale=1
    )
    one = save_labelled_grids(tmp_path / "b.png", {"a long title": small}, columns=1, scale=1)
    assert width(path) > width(one) + 16 + 40  # room for the second title
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_rows_of_labelled_grids(tmp_path):
    black, white = -np.ones((4, 2, 2, 1)), np.ones((3, 2, 2, 1))
    path = save_labelled_grids(tmp_path / "a.png", [{"a": black}, {"b": white}], columns=[2, 3], scale=4)
    with Image.open(path) as picture:
        pixels = np.asarray(picture)
    above, below = image_grid(black, columns=2, scale=4, margin=4), image_grid(white, columns=3, scale=4, margin=4)
    for top, grid in ((34, above), (34 + above.height + 16 + 34, below)):
        np.testing.assert_array_equal(pixels[top : top + grid.height, 16 : 16 + grid.width], np.asarray(grid))


def test_before_after_draws_points_paths_and_densities(tmp_path):
    path = np.stack([POINTS * step for step in (3.0, 2.0, 1.0)])
    normal = lambda points: -0.5 * jnp.sum(jnp.asarray(points) ** 2, axis=1)
    figure = before_after(
        POINTS[:5], POINTS, POINTS, path=path, model_density=normal, target_density=normal, shown_paths=4
    )
    panels = figure.get_axes()
    assert [axes.get_title() for axes in panels] == ["references (5)", "unguided (12)", "guided (12)"]
    np.testing.assert_allclose(panels[2].collections[-1].get_offsets(), POINTS)
    assert len(panels[2].lines) == 4
    np.testing.assert_allclose(panels[2].lines[0].get_xydata(), path[:, 0])
    assert width(save_figure(figure, tmp_path / "a.png")) > 500
    with pytest.raises(ValueError, match=r"guided has shape \(12, 3\); give points in the plane, \[n, 2\]"):
        before_after(POINTS, POINTS, np.ones((12, 3)))


def test_trace_curves():
    trace = Trace(jnp.array([0.5, 0.25, -0.01]), jnp.array([1.0, 0.5, 0.1]))
    left, right = trace_curves({"guided": trace}).get_axes()
    np.testing.assert_allclose(left.lines[0].get_ydata(), trace.mmd2)
    np.testing.assert_allclose(right.lines[0].get_xdata(), [1 / 3, 2 / 3, 1])


def test_witness_map_is_the_witness():
    figure = witness_map(IMQ(1.0), {"samples": POINTS[:4]}, POINTS[4:], resolution=5)
    image = figure.get_axes()[0].images[0]
    left, right, bottom, top = image.get_extent()
    corners = np.array([[left, bottom], [right, top]], np.float32)
    expected = witness(IMQ(1.0), POINTS[:4], POINTS[4:], corners)
    np.testing.assert_allclose(np.asarray(image.get_array())[[0, -1], [0, -1]], expected, rtol=1e-4)


def test_attribution_grid_shows_the_nearest_references_of_the_same_label():
    grey = lambda *values: np.broadcast_to(np.array(values, np.float32)[:, None, None, None], (len(values), 2, 2, 1))
    samples, refs = grey(-1.0, 1.0), grey(-0.9, 0.8, 0.2, 1.0)
    picture = np.asarray(attribution_grid(IMQ(1.0), samples, refs, top=2, scale=1))
    shown = [[int(picture[1 + 3 * row, 1 + 3 * column, 0]) for column in range(3)] for row in range(2)]
    pixel = lambda value: round((value + 1) * 127.5)
    assert shown == [[0, pixel(-0.9), pixel(0.2)], [255, 255, pixel(0.8)]]
    labelled = attribution_grid(
        Product(IMQ(1.0), Delta()),
        Particles(samples, cond=jnp.array([0, 0])),
        Particles(refs, cond=jnp.array([1, 1, 0, 0])),
        top=1,
        scale=1,
    )
    assert int(np.asarray(labelled)[1, 4, 0]) == pixel(np.float32(0.2))


def test_a_notebook_shows_figures():
    figure = trace_curves({"a": Trace(np.ones(3), np.ones(3))})
    with Image.open(io.BytesIO(figure._repr_png_())) as picture:  # what a notebook asks an object for
        assert picture.format == "PNG"
        assert picture.size == (880, 352)  # 8 × 3.2 inches at 110 pixels
    again = pickle.loads(pickle.dumps(figure))
    assert again._repr_png_().startswith(b"\x89PNG")
