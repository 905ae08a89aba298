"""Families of models behind one pipeline: labels, prompts to pictures in one call, and parts that do not fit."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mmdjax import RBF, Particles
from mmdjax.__main__ import main
from mmdjax.sd import load
from mmdjax.sd.families import Embedded, family_of
from mmdjax.sd.families.labels import label_of
from mmdjax.sd.tiny import write_tiny

CLASSES = {"id2label": {"0": "tench, Tinca tinca", "1": "hen", "2": "white shark"}}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    folder = write_tiny(tmp_path_factory.mktemp("labels"), labels=True)
    return folder, *load(folder)


def test_labels_by_name_and_number():
    names = {"tench": 0, "Tinca tinca": 0, "tench, Tinca tinca": 0, "HEN ": 1, "white shark": 2, "1": 1, "": 3, " ": 3}
    assert {name: label_of(name, 3, CLASSES) for name in names} == names
    with pytest.raises(
        ValueError, match=r"'shark' is no class of this model; give a number from 0 to 2.*: white shark"
    ):
        label_of("shark", 3, CLASSES)
    with pytest.raises(ValueError, match="'4' is no class"):
        label_of("4", 3, CLASSES)
    with pytest.raises(ValueError, match="this model names no classes"):
        label_of("hen", 3, {})


def test_conditions_of_labels(labelled):
    _, pipeline, params = labelled
    cond = pipeline.encode_prompts(params, ["dog", "0", "", "dog"])
    np.testing.assert_array_equal(cond["label"], [1, 0, 3, 1])
    null = pipeline.encode_prompts(params, "", negative=True)
    assert null["label"] == 3
    # by classifier-free guidance: x̂0(∅) + s (x̂0(c) − x̂0(∅))
    x, level = jnp.ones((2, 16, 16, 4)), pipeline.schedule(0.5)
    plain, label = pipeline.model(), {"label": jnp.array([1, 0])}
    denoise = jax.jit(lambda label: plain.denoise(params, x, level, {"label": label}))
    one, none = denoise(label["label"]), denoise(jnp.array([3, 3]))
    assert np.abs(one - none).max() > 1e-3
    strong = pipeline.model(guidance_scale=2.0, null_cond=null)
    guided = jax.jit(lambda label: strong.denoise(params, x, level, label))(label)
    np.testing.assert_allclose(guided, 2 * one - none, atol=1e-4)
    with pytest.raises(ValueError, match="this model takes labels"):
        plain.denoise(params, x, level, {"context": x})


def test_the_kernel_of_labels_is_whether_they_are_equal(labelled):
    _, pipeline, _ = labelled
    one, other = ({"label": jnp.array(labels)} for labels in ([0, 1], [1, 1]))
    gram = pipeline.kernel(x=RBF(1.0))(Particles(jnp.zeros((2, 3)), one), Particles(jnp.zeros((2, 3)), other))
    np.testing.assert_array_equal(gram, [[0, 0], [1, 1]])


def test_command_line_with_labels(labelled, tmp_path):
    folder, _, _ = labelled
    refs = tmp_path / "refs"
    refs.mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32), (80 * i, 40, 0)).save(refs / f"{i}.png")
        (refs / f"{i}.txt").write_text("cat" if i else "dog")
    words = ["sample", folder, "--refs", refs, "--out", tmp_path / "out", "-n", 2, "--steps", 2, "--prompt", "dog"]
    assert main([str(word) for word in (*words, "--no-compare", "--quiet")]) == 0
    report = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (report["prompts"], report["cfg_scale"]) == (["dog"], 4.0)


def test_one_call_from_prompts_to_pictures(labelled, tmp_path):
    _, pipeline, params = labelled
    how = {"num_steps": 2, "progress": False, "guidance_scale": 1.0}
    pictures = pipeline.sample(params, jax.random.key(0), ["cat", "dog"], **how)
    assert pictures.shape == (2, 32, 32, 3)
    assert np.abs(pictures).max() <= 1
    guided = pipeline.sample(params, jax.random.key(0), ["cat", "dog"], refs=pictures[:, ::-1], **how)
    assert np.abs(guided - pictures).max() > 0.01
    with pytest.raises(FileNotFoundError, match="no such folder of pictures"):
        pipeline.sample(params, jax.random.key(0), "cat", refs=tmp_path / "nothing", **how)
    with pytest.raises(ValueError, match="batch_size is 0; give at least 1"):
        pipeline.sample(params, jax.random.key(0), "cat", batch_size=0, **how)


def test_parts_from_elsewhere(labelled, tmp_path):
    folder, _, params = labelled
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.move(copy / "vae", tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="a pipeline needs a transformer and a vae or vqvae; there are: transformer"):
        load(copy)
    _, again = load(copy, parts={"vae": tmp_path / "elsewhere"})
    jax.tree.map(np.testing.assert_array_equal, again, params)
    with pytest.raises(ValueError, match="parts has decoder; known: unet, transformer, vae"):
        load(copy, parts={"decoder": tmp_path / "elsewhere"})


def test_parts_of_two_models_are_refused(labelled):
    _, pipeline, _ = labelled
    wrong = {**pipeline.modules, "vae": dataclasses.replace(pipeline.modules["vae"])}
    wrong["vae"] = wrong["vae"].clone(config=dataclasses.replace(wrong["vae"].config, latent_channels=16))
    with pytest.raises(ValueError, match="takes 4 channels but the autoencoder's latents have 16: parts of two models"):
        dataclasses.replace(pipeline, modules=wrong)
    with pytest.raises(ValueError, match="a pipeline needs a unet or a transformer"):
        family_of({"vae": wrong["vae"]})


def test_embedded_guidance_is_an_input_of_the_network():
    seen = {}

    def denoiser(params, x, level, cond):
        seen.update(cond)
        return x

    Embedded(denoiser, 3.5)(None, jnp.zeros((2, 1)), None, {"context": 1})
    assert seen["context"] == 1
    np.testing.assert_array_equal(seen["guidance"], [3.5, 3.5])


def test_modules_that_moved_are_imported_by_their_old_names():
    import mmdjax.sd.clip as old
    from mmdjax.sd.layers import Block

    from mmdjax.sd.files import open_file
    from mmdjax.sd.networks import clip, layers

    assert old is clip
    assert Block is layers.Block
    assert callable(open_file)
