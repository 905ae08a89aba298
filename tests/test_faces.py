"""The shipped faces, their denoiser and the classifier of attributes: what they are, and how good."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from mmdjax import HostReferences, guided_sample, load_faces
from mmdjax.faces import (
    ATTRIBUTES,
    CLASSES,
    CLASSIFIER,
    CONDITIONS,
    DATA,
    POOLS,
    WEIGHTS,
    faces_with,
    pool,
    read_attributes,
    read_sheet,
    write_sheet,
)

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.py"


@pytest.fixture(scope="module")
def faces():
    return load_faces()


def test_pools_show_what_they_say():
    for name, worn in zip(POOLS, (None, "glasses", "hat", "beard"), strict=True):
        found = pool(name)
        assert found.images.shape[1:] == (16, 16, 3)
        assert found.images.min() == -1
        assert found.images.max() == 1
        assert {key: set(found.attributes[key].tolist()) for key in ("glasses", "hat", "beard")} == {
            key: {int(key == worn)} for key in ("glasses", "hat", "beard")
        }
        for key in CONDITIONS:
            assert set(found.attributes[key].tolist()) == set(range(CLASSES[key]))
    seeds = [entry["seed"] for entry in json.loads((DATA / "manifest.json").read_text())["pools"].values()]
    assert len(set(seeds)) == len(POOLS)


def test_pools_are_not_for_writing():
    with pytest.raises(ValueError, match="read-only"):
        pool("source").images[:] = 0


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_faces_with_an_attribute_all_have_it(attribute):
    _, name, value = ATTRIBUTES[attribute]
    assert (faces_with(attribute).attributes[name] == value).all()
    assert len(faces_with(attribute).images) >= 150


def test_unknown_names_are_listed():
    with pytest.raises(ValueError, match="attribute is 'monocle'; choose of glasses, hat, beard, long-hair"):
        faces_with("monocle")
    with pytest.raises(ValueError, match="the pool is 'monocles'; choose of"):
        pool("monocles")


def test_sheet_comes_back(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (45, 16, 16, 3), np.uint8)
    write_sheet(tmp_path / "some", pixels, {"hair": np.arange(45), "hat": np.ones(45, int)})
    back = read_sheet(tmp_path / "some")
    np.testing.assert_array_equal(np.round((back.images + 1) * 127.5), pixels)
    np.testing.assert_array_equal(back.attributes["hair"], np.arange(45))
    np.testing.assert_array_equal(back[10:12].attributes["hair"], [10, 11])


def test_classifier_is_right_about_fresh_faces():
    found = [pool(name) for name in POOLS]
    said = read_attributes(np.concatenate([each.images for each in found]))
    right = {name: (said[name] == np.concatenate([each.attributes[name] for each in found])).mean() for name in said}
    least = {"glasses": 0.99, "hat": 0.99, "skin": 0.99, "hair": 0.95, "hair_colour": 0.94, "beard": 0.93}
    assert {name: right[name] > share for name, share in least.items()} == dict.fromkeys(least, True), right


def test_weights_are_small_and_tell_where_they_came_from():
    assert WEIGHTS.stat().st_size < 4_000_000
    for path in (WEIGHTS, CLASSIFIER):
        with safe_open(path, "np") as file:
            assert {"script", "commit", "seed", "steps", "versions", "data"} <= set(file.metadata())


def test_no_condition_leaves_all_open(faces):
    model, params = faces
    x, level = jax.random.normal(jax.random.key(0), (4, 16, 16, 3)), model.schedule(0.7)
    nulls = jnp.tile(jnp.array([CLASSES[name] for name in CONDITIONS]), (4, 1))
    without = model.denoiser(params, x, level, None)
    np.testing.assert_allclose(without, model.denoiser(params, x, level, nulls), atol=1e-6)  # another program


def test_conditions_are_met(faces):
    model, params = faces
    cond = jnp.array([[2, 5, 0], [0, 2, 4]] * 12)  # long, blue, pale; short, black, dark
    x = guided_sample(params, jax.random.key(0), None, model=model, num_samples=24, cond=cond, num_steps=15).x
    said = read_attributes(x)
    for i, name in enumerate(CONDITIONS):
        assert (said[name] == cond[:, i]).mean() > 0.85, name


def test_references_put_glasses_on_faces(faces):
    model, params = faces
    refs = faces_with("glasses").images[:50]
    unguided, guided = (
        guided_sample(params, jax.random.key(0), some, model=model, num_samples=24, num_steps=15).x
        for some in (None, refs)
    )
    assert read_attributes(unguided)["glasses"].mean() <= 0.1
    assert read_attributes(guided)["glasses"].mean() >= 0.9


@pytest.mark.parametrize(
    ("scale", "shift", "remedy"), [(0.5, 0.5, r"2 \* refs - 1"), (127.5, 127.5, "refs / 127.5 - 1")]
)
def test_references_in_another_range_are_warned_about(faces, scale, shift, remedy):
    model, params = faces
    refs = np.float32(scale * faces_with("glasses").images[:8] + shift)
    settings = {"model": model, "num_samples": 4, "num_steps": 4}
    for given in (refs, HostReferences(refs)):
        with pytest.warns(UserWarning, match=f"Then give {remedy}"):
            guided_sample(params, jax.random.key(0), given, **settings)
    jax.jit(lambda refs: guided_sample(params, jax.random.key(0), refs, **settings).x)(refs)  # values unseen: silent


def quickstart(*arguments):
    command = [sys.executable, "-W", "ignore", str(QUICKSTART), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_quickstart_refuses_what_it_cannot_use(tmp_path):
    made = quickstart("--attribute", "monocle")
    assert made.returncode == 2
    assert "invalid choice: 'monocle'" in made.stderr
    one = tmp_path / "one"
    one.mkdir()
    Image.new("RGB", (30, 40)).save(one / "a.png")
    made = quickstart("--refs", one)
    assert made.returncode == 1
    assert "holds 1 pictures; MMD compares sets: give at least 2" in made.stderr
    (one / "b.png").write_text("no picture")
    assert "b.png is no picture that can be read" in quickstart("--refs", one).stderr
    assert "no such folder" in quickstart("--refs", tmp_path / "none").stderr


@pytest.mark.slow
def test_quickstart_takes_pictures_of_ones_own(tmp_path):
    for i, image in enumerate(pool("hats").images[:12]):
        Image.fromarray(np.uint8((image + 1) * 127.5)).resize((50, 50), 0).save(tmp_path / f"{i}.png")
    made = quickstart("--refs", tmp_path, "--out", tmp_path / "out", "--samples", 8, "--steps", 4, "--seeds", 1)
    assert made.returncode == 0, made.stderr
    assert "8 faces, 12 references" in made.stdout
    with Image.open(tmp_path / "out" / "quickstart.png") as picture:
        assert picture.width > 500
