"""Whole checkpoints: every layout on disk gives one tree, and what is written back is what was read, bit for bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch", reason="parity needs the extra mmdjax[parity]")
diffusers = pytest.importorskip("diffusers", reason="parity needs the extra mmdjax[parity]")
transformers = pytest.importorskip("transformers", reason="parity needs the extra mmdjax[parity]")

import torch_models as tm  # noqa: E402

from mmdjax.sd.files import compvis, convert  # noqa: E402
from mmdjax.sd.models import export, load_models, save  # noqa: E402

PREFIXES = {
    "sd1": {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "cond_stage_model.transformer.",
    },
    "sd2": {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "ldm": {"unet": "model.diffusion_model.", "vqvae": "first_stage_model."},
}


FIELDS = (
    *("block_out_channels", "layers_per_block", "down_block_types", "up_block_types", "scaling_factor", "heads"),
    *("use_linear_projection", "upcast_attention", "cross_attention_dim", "latent_channels", "code_size"),
    *("vocab_size", "hidden_size", "hidden_act", "num_hidden_layers", "with_projection"),
)


@pytest.fixture(scope="module", params=list(tm.FAMILIES))
def family(request, tmp_path_factory):
    """(name, folder that the real libraries wrote, our components)."""
    folder = tmp_path_factory.mktemp(request.param)
    for name, model in tm.FAMILIES[request.param]().items():
        model.save_pretrained(folder / name)
    return request.param, folder, load_models(folder)


def same(a, b):
    a, b = ({name: c.params for name, c in models.items()} for models in (a, b))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def single_file(family, components):
    """A single file's tensors: the inverse of what the converter reads. `test_sd_pipeline` has diffusers read them."""
    file = {}
    for name, component in components.items():
        prefix = PREFIXES[family][name]
        torch_side = {key: entry.read() for key, entry in convert.params_to_torch(component.params).items()}
        for key, source in compvis.sources(
            component.module, torch_side, openclip=prefix.endswith("model.") and "text" in name
        ).items():
            value, place = torch_side[key], prefix + source.key
            if source.piece == "transposed":
                value = value.T
            if source.piece == "third":
                whole = file.setdefault(place, np.zeros((3 * value.shape[0], *value.shape[1:]), value.dtype))
                by_head = whole.reshape(source.heads, 3, -1, *value.shape[1:])
                by_head[:, source.third] = value.reshape(source.heads, -1, *value.shape[1:])
                continue
            file[place] = value
    for key, value in file.items():  # CompVis's linear maps in convolutions' clothes
        if "mid.attn_1" in key and value.ndim == 2:
            file[key] = value[:, :, None, None]
        if ".qkv." in key and value.ndim == 2:
            file[key] = value[:, :, None]
    extra = {"betas": np.zeros(3, np.float32), "model_ema.decay": np.zeros((), np.float32)}
    if family == "sd1":
        extra["cond_stage_model.transformer.text_model.embeddings.position_ids"] = np.arange(12)[None]
    if family == "sd2":
        layer = {k: v for k, v in file.items() if "resblocks.2." in k}
        extra |= {k.replace("resblocks.2.", "resblocks.3."): v + 1 for k, v in layer.items()}  # the layer left out
        extra |= {"cond_stage_model.model.text_projection": np.eye(64, dtype=np.float32)}
        extra |= {"cond_stage_model.model.logit_scale": np.ones((), np.float32)}
    return {key: np.ascontiguousarray(value) for key, value in (file | extra).items()}


def overrides(folder, components):
    """The configs of the tiny models, whose heads are not those of the published ones."""
    return {name: json.loads((folder / name / "config.json").read_text()) for name in components}


def test_every_parameter_came_from_its_key(family):
    _, folder, components = family
    for name, component in components.items():
        file = load_file(next((folder / name).glob("*.safetensors")))
        assert len(jax.tree.leaves(component.params)) == len(file)


def test_export_is_the_file_that_was_read(family, tmp_path):
    _name, folder, components = family
    export(tmp_path, components)
    for part in components:
        (theirs,) = (folder / part).glob("*.safetensors")
        written = (tmp_path / part / theirs.name).read_bytes()
        if part == "text_encoder":  # transformers 5 leaves "text_model." out for this class; the hub's files have it
            a, b = load_file(theirs), load_file(tmp_path / part / theirs.name)
            b = {key.removeprefix("text_model."): value for key, value in b.items()}
            assert a.keys() == b.keys()
            assert all((a[key] == b[key]).all() for key in a)
        else:
            assert written == theirs.read_bytes()
        assert json.loads((tmp_path / part / "config.json").read_text()) == json.loads(
            (folder / part / "config.json").read_text()
        )


def test_export_is_read_by_the_real_libraries(family, tmp_path):
    name, _folder, components = family
    export(tmp_path, components)
    for part, model in tm.FAMILIES[name]().items():
        again = type(model).from_pretrained(tmp_path / part)
        for key, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), key


def test_saved_model_loads_as_it_was(family, tmp_path):
    _, _, components = family
    save(tmp_path / "saved", components)
    again = load_models(tmp_path / "saved")
    same(again, components)
    assert {n: c.module for n, c in again.items()} == {n: c.module for n, c in components.items()}


def test_half_precision_variant(family, tmp_path):
    name, _folder, components = family
    for part, model in tm.FAMILIES[name]().items():
        model.half().save_pretrained(tmp_path / part, variant="fp16")
    kept = load_models(tmp_path)  # the only variant there
    assert {x.dtype for c in kept.values() for x in jax.tree.leaves(c.params)} == {jnp.dtype(jnp.float16)}
    same(
        kept,
        {n: c._replace(params=jax.tree.map(lambda x: x.astype(jnp.float16), c.params)) for n, c in components.items()},
    )
    cast = load_models(tmp_path, variant="fp16", param_dtype=jnp.float32)
    assert {x.dtype for c in cast.values() for x in jax.tree.leaves(c.params)} == {jnp.dtype(jnp.float32)}


def test_bfloat16(tmp_path):
    model = tm.FAMILIES["ldm"]()["vqvae"].bfloat16()
    model.save_pretrained(tmp_path / "vqvae")
    params = load_models(tmp_path)["vqvae"].params
    expected = model.state_dict()["decoder.conv_in.bias"].float().numpy()
    assert params["decoder"]["conv_in"]["bias"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(params["decoder"]["conv_in"]["bias"].astype(jnp.float32), expected)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(family, tmp_path, variant):
    name, _, components = family
    for part, model in tm.FAMILIES[name]().items():
        model.save_pretrained(tmp_path / part, max_shard_size="300KB", variant=variant)
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    same(load_models(tmp_path, variant=variant), components)


def test_torch_archives(family, tmp_path):
    name, _, components = family
    for part, model in tm.FAMILIES[name]().items():
        model.save_pretrained(tmp_path / part)
        (weights,) = (tmp_path / part).glob("*.safetensors")
        weights.unlink()
        file = "pytorch_model.bin" if "text" in part else "diffusion_pytorch_model.bin"
        torch.save(model.state_dict(), tmp_path / part / file)
    same(load_models(tmp_path), components)


def test_single_file(family, tmp_path):
    name, folder, components = family
    save_file(single_file(name, components), tmp_path / "model.safetensors")
    same(load_models(tmp_path / "model.safetensors", configs=overrides(folder, components)), components)


def test_single_ckpt(family, tmp_path):
    """Porting 29: a training checkpoint, its tensors under state_dict beside what training leaves there."""
    name, folder, components = family
    state = {key: torch.from_numpy(value.copy()) for key, value in single_file(name, components).items()}
    torch.save({"state_dict": state, "epoch": 3, "lr": 1e-4, "callbacks": {}}, tmp_path / "model.ckpt")
    same(load_models(tmp_path / "model.ckpt", configs=overrides(folder, components)), components)


def test_single_file_says_what_it_is(family, tmp_path):
    """Configurations from shapes alone, apart from heads where the tiny models' are not the published ones'."""
    name, folder, components = family
    file = {key: value for key, value in single_file(name, components).items() if "resblocks.3." not in key}
    save_file(file, tmp_path / "model.safetensors")
    text = {k: v for k, v in overrides(folder, components).items() if k == "unet" and name == "sdxl"}
    found = load_models(tmp_path / "model.safetensors", configs=text)
    for part, component in found.items():
        ours, theirs = component.module.config, components[part].module.config
        for field in FIELDS:
            if hasattr(ours, field):
                assert getattr(ours, field) == getattr(theirs, field), (part, field)


@pytest.mark.parametrize("family", ["sd2"], indirect=True)
def test_openclip_h_is_used_without_its_last_layer(family, tmp_path):
    """Of Stable Diffusion 2's text encoder a single file has all 24 layers, and the pipeline uses 23."""
    _, _, components = family
    file = single_file("sd2", components)
    for key in [key for key in file if "resblocks.2." in key]:
        file |= {key.replace("resblocks.2.", f"resblocks.{i}."): file[key].copy() for i in range(3, 24)}
    save_file(file, tmp_path / "model.safetensors")
    assert load_models(tmp_path / "model.safetensors")["text_encoder"].module.config.num_hidden_layers == 23


def test_ema(tmp_path):
    """Porting 28: the averaged weights lie under model_ema. and the key without its dots."""
    models = tm.FAMILIES["sd1"]()
    for part, model in models.items():
        model.save_pretrained(tmp_path / part)
    components = load_models(tmp_path)
    file = single_file("sd1", components)
    unet = {key: value for key, value in file.items() if key.startswith("model.diffusion_model.")}
    file |= {"model_ema." + key.removeprefix("model.").replace(".", ""): value + 1 for key, value in unet.items()}
    save_file(file, tmp_path / "model.safetensors")
    configs = overrides(tmp_path, components)
    last = load_models(tmp_path / "model.safetensors", configs=configs)
    same(last, components)
    averaged = load_models(tmp_path / "model.safetensors", configs=configs, ema=True)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + 1), averaged["unet"].params, last["unet"].params)
    same({"vae": averaged["vae"]}, {"vae": last["vae"]})


def test_old_spelling_of_attention(tmp_path):
    """Porting 12: query/key/value/proj_attn and to_q/…/to_out.0 (and q/k/v/proj_out, above) are one tree."""
    models = tm.FAMILIES["ldm"]()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for part, model in models.items():
        model.save_pretrained(tmp_path / "new" / part)
        model.save_pretrained(tmp_path / "old" / part)
        (weights,) = (tmp_path / "old" / part).glob("*.safetensors")
        tensors = load_file(weights)
        for new, name in old.items():
            tensors = {key.replace(f".{new}.", f".{name}."): value for key, value in tensors.items()}
        assert any(".proj_attn." in key for key in tensors)
        save_file(tensors, weights)
    same(load_models(tmp_path / "old"), load_models(tmp_path / "new"))


def test_prefix_of_text_model(tmp_path):
    """The hub's text encoders have "text_model." before every key, those of transformers 5 do not."""
    model = tm.text_encoder(tm.CLIP_L)
    model.save_pretrained(tmp_path / "new")
    model.save_pretrained(tmp_path / "hub")
    tensors = {f"text_model.{key}": value for key, value in load_file(tmp_path / "new/model.safetensors").items()}
    tensors["text_model.embeddings.position_ids"] = np.arange(12)[None]
    save_file(tensors, tmp_path / "hub/model.safetensors")
    same({"x": load_models(tmp_path / "hub")["hub"]}, {"x": load_models(tmp_path / "new")["new"]})
