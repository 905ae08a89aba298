"""How numbers are stored in shared files, and where: 8-bit floats, formats, pointers, variants."""

import json
import re
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import sd_tiny
import sd_toys
from ml_dtypes import bfloat16, float8_e4m3fn, float8_e5m2
from safetensors.numpy import load_file, save_file

from mmdjax.checkpoint import Checkpoint, CheckpointError, Entry, write_safetensors
from mmdjax.sd import load, load_component, load_models
from mmdjax.sd.describe import shape_of
from mmdjax.sd.files import convert
from mmdjax.sd.files.places import download, open_file, open_folder
from mmdjax.sd.files.quantised import scaled


def checkpoint(shapes):
    """A file of these keys and shapes, without values."""
    return Checkpoint({key: Entry(shape, np.float32, lambda: None) for key, shape in shapes.items()}, "file")


@pytest.fixture
def text(tmp_path):
    """A text encoder's folder, to be spoilt, and its weights."""
    return sd_tiny.write(tmp_path / "text_encoder", sd_tiny.TEXT)


def message(load):
    with pytest.raises(CheckpointError) as info:
        load()
    return str(info.value).splitlines()


def change(weights, pattern, value=None):
    """Rewrite weights without the keys that match, or with a function of them."""
    tensors = load_file(weights)
    changed = {key: value(array) for key, array in tensors.items() if value and re.search(pattern, key)}
    save_file({k: v for k, v in tensors.items() if not re.search(pattern, k)} | changed, weights)


# --- numbers in 8 bits ---


def test_scales_multiply(tmp_path):
    """One for all, one for each row, one for each block of 128 × 128; across shards, too."""
    rng = np.random.default_rng(0)
    value = rng.standard_normal((130, 260)).astype(float8_e4m3fn)
    rows, blocks = rng.random((130, 1)).astype(np.float32), rng.random((2, 3)).astype(np.float32)
    whole = blocks.repeat(128, 0)[:130].repeat(128, 1)[:, :260]
    tensors = {f"{name}.weight": value for name in "abcd"} | {"d.bias": value[0]}
    scales = {"a.scale_weight": np.float32([0.5]), "b.weight_scale": rows, "c.weight_scale_inv": blocks}
    marks = {"scaled_fp8": np.zeros(2, float8_e5m2), "a.scale_input": np.ones((), np.float32)}
    for name, part in {"1": tensors, "2": scales | marks}.items():
        entries = {key: Entry(x.shape, x.dtype, lambda x=x: x) for key, x in part.items()}
        write_safetensors(tmp_path / f"model-0000{name}-of-00002.safetensors", entries)
    places = {key: f"model-0000{1 if key in tensors else 2}-of-00002.safetensors" for key in tensors | scales | marks}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    found, plain = open_folder(tmp_path), value.astype(np.float32)
    assert found.keys() == tensors.keys()
    for name, scale in {"a": 0.5, "b": rows, "c": whole}.items():
        assert found.stored[f"{name}.weight"].dtype == np.float32
        np.testing.assert_array_equal(found[f"{name}.weight"], plain * scale)
    assert found["d.weight"].dtype == float8_e4m3fn  # without a scale: as stored
    np.testing.assert_array_equal(found["d.bias"], value[0])


@pytest.mark.parametrize("dtype", [float8_e4m3fn, float8_e5m2])
def test_weights_in_eight_bits(text, dtype):
    tensors = {key: value.astype(dtype) for key, value in load_file(text).items()}
    write_safetensors(text, {key: Entry(x.shape, x.dtype, lambda x=x: x) for key, x in tensors.items()})
    params = load_component(text.parent, param_dtype=np.float32, put=np.asarray).params
    kernel = params["text_model.encoder.layers.0"]["mlp.fc1"]["kernel"]
    expected = tensors["text_model.encoder.layers.0.mlp.fc1.weight"].astype(np.float32).T
    np.testing.assert_array_equal(kernel, expected)


def test_values_that_eight_bits_cannot_hold():
    """They would become NaN, or infinite, without a word."""
    kept = convert.cast(np.float32([448, -448]), float8_e4m3fn, "w")
    np.testing.assert_array_equal(kept.astype(np.float32), [448, -448])
    for stored in (np.float32, np.float16, bfloat16, float8_e5m2):
        with pytest.raises(CheckpointError, match="w holds values beyond float8_e4m3fn's largest, 448"):
            convert.cast(np.asarray([1, -1024], stored), float8_e4m3fn, "w")
    assert convert.cast(np.asarray([1024], float8_e5m2), float8_e5m2, "w")[0] == 1024


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        ({"a.weight": (4, 6), "a.scale_weight": (3,)}, r"a.scale_weight of shape \[3\] scales no a.weight of shape"),
        ({"a.weight": (4, 6), "a.weight.absmax": (3,)}, "is quantised by bitsandbytes"),
        ({"a.qweight": (4, 6)}, "is quantised by GPTQ, AWQ or SVDQuant"),
        ({"a.weight": (4, 6), "a.weight_scale": (), "a.weight_scale_2": ()}, "is quantised by 4 bits"),
    ],
)
def test_numbers_that_are_not_read(shapes, text):
    with pytest.raises(CheckpointError, match=text):
        scaled(checkpoint(shapes))


def test_integers_are_no_weights(text):
    change(text, r"fc1\.weight", lambda x: x.astype(np.int8))
    assert (
        "2 weights are integers, such as text_model.encoder.layers.0" in message(lambda: load_component(text.parent))[0]
    )


# --- formats, pointers, variants ---


def test_formats_are_known_by_content(text, tmp_path):
    for name in ("x.ckpt", "x.bin", "x"):
        (tmp_path / name).write_bytes(text.read_bytes())
        assert open_file(tmp_path / name).keys() == load_file(text).keys()
    (tmp_path / "x.safetensors").write_bytes(b"GGUF" + bytes(100))
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    assert "in the format GGUF, which is not read" in message(lambda: open_file(tmp_path / "x.gguf"))[0]


def test_pointers_of_git_lfs(tmp_path):
    """Weights, configurations and vocabularies that were cloned without it are named, and what to do."""
    folder = sd_toys.write_pipeline(tmp_path / "model")
    for name in (
        *("unet/diffusion_pytorch_model.safetensors", "unet/config.json", "scheduler/scheduler_config.json"),
        *("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json"),
    ):
        sound = (folder / name).read_bytes()
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
        (line,) = message(lambda: load(folder, put=shape_of))
        assert f"{name} is a Git LFS pointer, a note in place of the file" in line
        assert "git lfs pull" in line
        (folder / name).write_bytes(sound)


def test_variants_by_part(tmp_path):
    for name in ("unet", "vae"):
        sd_tiny.write(tmp_path / name, sd_tiny.UNET if name == "unet" else sd_tiny.VAE)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    half = {key: value.astype(np.float16) for key, value in load_file(weights).items()}
    save_file(half, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))

    def dtypes(variant):
        found = load_models(tmp_path, variant=variant, put=np.asarray)
        return [next(iter(jax.tree.leaves(found[name].params))).dtype for name in ("unet", "vae")]

    assert dtypes("fp16") == dtypes({"unet": "fp16"}) == [np.float16, np.float32]
    assert dtypes(None) == dtypes({}) == [np.float32, np.float32]
    with pytest.raises(FileNotFoundError, match="no part of the model has bf16 weights; there are: fp16, plain"):
        load_models(tmp_path, variant="bf16")
    with pytest.raises(FileNotFoundError, match="vae: no fp16 weights; there are: plain"):
        load_models(tmp_path, variant={"unet": "fp16", "vae": "fp16"})
    with pytest.raises(ValueError, match="variant names u; the model's parts are unet, vae"):
        load_models(tmp_path, variant={"u": "fp16"})


def test_shards_without_their_index(text):
    text.rename(text.with_name("model-00001-of-00002.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-00002\.safetensors is one of several parts"):
        load_component(text.parent)


@pytest.mark.parametrize("variant", ["fp16", {"unet": "fp16"}])
def test_download_of_a_variant_of_some_parts(monkeypatch, tmp_path, variant):
    """Parts that lack it are fetched plain, and nothing twice."""
    there = [*(f"{part}/config.json" for part in ("unet", "vae")), "unet/diffusion_pytorch_model.fp16.safetensors"]
    there += [f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")]

    def snapshot_download(repo, revision, allow_patterns):
        for name in there:
            if any(Path(name).match(pattern) for pattern in allow_patterns):
                (tmp_path / name).parent.mkdir(exist_ok=True)
                (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    folder = download("someone/model", variant=variant)
    taken = {str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")}
    assert taken == {"unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.safetensors"}
