"""Reference packs: written, read, shared, refused, damaged."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sd_toys
from safetensors.numpy import load_file, save_file

from mmdjax.checkpoint import CheckpointError, open_safetensors
from mmdjax.sd import encode_references, load, load_references
from mmdjax.sd.pack import identity

PROMPTS = ["a cat", "a dog", "a cat"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(sd_toys.write_pipeline(tmp_path_factory.mktemp("pipeline") / "model"))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(-1, 1, (3, 8, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def pack(loaded, images):
    return encode_references(*loaded, images, PROMPTS)


def changed(params, component, part):
    """Parameters with a part's numbers moved a little."""
    moved = jax.tree.map(lambda leaf: leaf + 1e-3, params[component][part])
    return params | {component: params[component] | {part: moved}}


def test_round_trip(loaded, images, pack, tmp_path):
    pack.save(tmp_path / "refs.safetensors")
    again = load_references(tmp_path / "refs.safetensors", *loaded)
    assert again.content == pack.content
    assert again.captions() == pack.captions() == PROMPTS
    assert again.prompts == ("a cat", "a dog")
    refs = again.particles()
    pipeline, params = loaded
    np.testing.assert_array_equal(refs.x, pipeline.encode_images(params, images))
    jax.tree.map(np.testing.assert_array_equal, refs.cond, pack.particles().cond)
    np.testing.assert_allclose(refs.cond["pooled"], pipeline.encode_prompts(params, PROMPTS)["pooled"], atol=1e-5)
    stored = load_file(tmp_path / "refs.safetensors")  # by the reference implementation
    assert {key: x.shape for key, x in stored.items()} == {
        "latents": (3, 4, 4, 4), "index": (3,), "cond.context": (2, 8, 32), "cond.pooled": (2, 32),
    }  # fmt: skip


def test_without_prompts_and_one_for_all(loaded, images, tmp_path):
    plain = encode_references(*loaded, images)
    plain.save(tmp_path / "plain.safetensors")
    again = load_references(tmp_path / "plain.safetensors", *loaded)
    assert again.captions() is None
    assert again.particles().cond is None
    one = encode_references(*loaded, images, "a cat")
    assert one.captions() == ["a cat"] * 3
    with pytest.raises(ValueError, match="there are 2 prompts for 3 pictures; give one for each, one for all, or None"):
        encode_references(*loaded, images, ["a", "b"])


def test_another_model_refuses_it(loaded, images, pack, tmp_path):
    pipeline, params = loaded
    path = tmp_path / "refs.safetensors"
    pack.save(path)
    for component, part in [("vae", "encoder"), ("text_encoder", "text_model.final_layer_norm")]:
        part = part if part in params[component] else next(iter(params[component]))
        with pytest.raises(ValueError, match=r"this pack of 3 references was encoded by another model .*encode the"):
            load_references(path, pipeline, changed(params, component, part))
    # what latents and conditions do not depend on: the U-Net and the decoder
    for component, part in [("vae", "decoder"), ("unet", next(iter(params["unet"])))]:
        assert load_references(path, pipeline, changed(params, component, part)).model == pack.model
    # without prompts the text encoder matters neither
    other = changed(params, "text_encoder", next(iter(params["text_encoder"])))
    assert identity(pipeline, other, prompts=False) == encode_references(*loaded, images).model
    assert load_references(path).model == pack.model  # looked at without a model


def test_damage_is_found(pack, tmp_path):
    path = tmp_path / "refs.safetensors"
    pack.save(path)
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"refs.safetensors is damaged: its content does not match its hash"):
        load_references(path)
    path.write_bytes(data[:-1000])
    with pytest.raises(CheckpointError, match="the file is cut off"):
        load_references(path)
    pack.save(path)
    metadata = open_safetensors(path).metadata
    for key, value in [("prompts", json.dumps(["a cat", "a bird"])), ("model", "0" * 64)]:
        save_file(load_file(path), tmp_path / "changed.safetensors", metadata | {key: value})
        with pytest.raises(CheckpointError, match=r"changed.safetensors is damaged"):
            load_references(tmp_path / "changed.safetensors")
    save_file({"latents": np.asarray(jnp.zeros((1, 2, 2, 1)))}, path)
    with pytest.raises(CheckpointError, match="of format None, not 'mmdjax references 1'; make one with encode_refer"):
        load_references(path)
