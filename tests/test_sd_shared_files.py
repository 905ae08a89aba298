"""Files as people share them: other spellings, marks, 8-bit floats, variants, pointers; and errors of few lines."""

import json
import re
import types

import jax
import numpy as np
import pytest
import sd_tiny
import sd_toys
from safetensors.numpy import load_file, save_file

from mmdjax.checkpoint import Checkpoint, CheckpointError, Entry
from mmdjax.sd import load_component, load_models
from mmdjax.sd.describe import shape_of
from mmdjax.sd.files import compvis, convert, single
from mmdjax.sd.files.differences import SHOWN, gathered
from mmdjax.sd.files.spellings import respelled, said_of_sampling
from mmdjax.sd.models import module_from_config
from mmdjax.sd.pretrained import assemble

ONE = np.zeros(0, np.float32)  # a mark: only its name says something
PREFIX = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}


def checkpoint(shapes, metadata=None):
    """A file of these keys and shapes, without values."""
    return Checkpoint({key: Entry(shape, np.float32, lambda: ONE) for key, shape in shapes.items()}, "file", metadata)


def openclip(layers, width=64, prefix=""):
    shapes = {"token_embedding.weight": (50, width), "positional_embedding": (8, width), "text_projection": (width, 5)}
    for i in range(layers):
        shapes[f"transformer.resblocks.{i}.mlp.c_fc.weight"] = (2 * width, width)
    return checkpoint({prefix + key: shape for key, shape in shapes.items()})


@pytest.mark.parametrize(("layers", "used"), [(24, 23), (23, 23), (22, 22), (4, 4)])
def test_layers_of_the_second_text_encoder(layers, used):
    """OpenCLIP-H has 24, of which Stable Diffusion 2 is conditioned on 23: a file may hold either, or fewer."""
    assert single.openclip_config(openclip(layers), second=False)["num_hidden_layers"] == used
    assert single.openclip_config(openclip(layers), second=True)["num_hidden_layers"] == layers
    part = single.Part("", {}, openclip=True)
    config = types.SimpleNamespace(num_hidden_layers=used, with_projection=False)
    kept = single.used(part, config, openclip(layers))
    assert sum("resblocks" in key for key in kept) == used
    assert "text_projection" not in kept


# --- whole single files ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sd_toys.write_pipeline(tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture(scope="module")
def whole(folder):
    """The folder's model as a single file's tensors, and its configs, whose heads the shapes do not tell."""
    found, file = load_models(folder, put=np.asarray), {}
    for name, part in found.items():
        tensors = {key: np.ascontiguousarray(e.read()) for key, e in convert.params_to_torch(part.params).items()}
        file |= {PREFIX[name] + s.key: tensors[key] for key, s in compvis.sources(part.module, tensors).items()}
    return file, {name: part.config for name, part in found.items()}, found


def renamed(file, pattern, new):
    again = {re.sub(pattern, new, key): value for key, value in file.items()}
    assert again.keys() != file.keys()
    return again


SPELLED = {
    "without text_model.": lambda file: renamed(file, r"transformer\.text_model\.", "transformer."),
    "compiled": lambda file: {f"_orig_mod.{key}": value for key, value in file.items()},
    "compiled within": lambda file: renamed(file, r"^(model\.diffusion_model)\.", r"\1._orig_mod."),
    "wrapped": lambda file: {f"module.{key}": value for key, value in file.items()},
    "marks": lambda file: file | {"v_pred": ONE, "ztsnr": ONE, "scaled_fp8": ONE, "embedding_manager.a.b": ONE},
    "left by training": lambda file: file | {"model_ema.x": ONE, "first_stage_model.loss.x": ONE, "betas": ONE},
    "projection": lambda file: file | {PREFIX["text_encoder"] + "text_projection.weight": np.eye(32, dtype=np.float32)},
    "buffers": lambda file: file | {PREFIX["text_encoder"] + "text_model.embeddings.position_ids": np.arange(8)[None]},
}


@pytest.mark.parametrize("name", SPELLED)
def test_spellings_of_one_model(whole, tmp_path, name):
    file, configs, expected = whole
    save_file(SPELLED[name](file), tmp_path / "x.safetensors")
    found = load_models(tmp_path / "x.safetensors", configs=configs, put=np.asarray)
    assert found.keys() == expected.keys()
    for part, component in expected.items():
        jax.tree.map(np.testing.assert_array_equal, found[part].params, component.params)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_network_alone_without_its_prefix(whole, tmp_path, part):
    """As fine-tuned autoencoders are shared, and U-Nets for programs that keep them apart."""
    file, configs, expected = whole
    mine = {key.removeprefix(PREFIX[part]): value for key, value in file.items() if key.startswith(PREFIX[part])}
    save_file(mine | ({"loss.logvar": ONE} if part == "vae" else {}), tmp_path / "x.safetensors")
    found = load_models(tmp_path / "x.safetensors", configs=configs, put=np.asarray)
    assert list(found) == [part]
    jax.tree.map(np.testing.assert_array_equal, found[part].params, expected[part].params)


def test_two_spellings_in_one_file():
    with pytest.raises(CheckpointError, match="file has tensors twice, under two spellings"):
        respelled(checkpoint({"module.a.weight": (1,), "a.weight": (1,)}))


@pytest.mark.parametrize(
    ("keys", "metadata", "settings"),
    [
        ([], {}, {}),
        ([], {"modelspec.prediction_type": "v"}, {"prediction_type": "v_prediction"}),
        ([], {"modelspec.prediction_type": "epsilon"}, {"prediction_type": "epsilon"}),
        ([], {"ss_v_parameterization": "True"}, {"prediction_type": "v_prediction"}),
        ([], {"modelspec.architecture": "stable-diffusion-v2-768-v"}, {"prediction_type": "v_prediction"}),
        ([], {"modelspec.architecture": "stable-diffusion-v2-512"}, {"prediction_type": "epsilon"}),
        ([], {"modelspec.architecture": "stable-diffusion-xl-v1-base"}, {}),
        (["v_pred"], {}, {"prediction_type": "v_prediction"}),
        (["v_pred"], {"modelspec.prediction_type": "v"}, {"prediction_type": "v_prediction"}),
        (
            ["v_pred", "ztsnr"],
            {},
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        ),
    ],
)
def test_what_a_file_says_of_its_prediction(keys, metadata, settings):
    file = checkpoint(dict.fromkeys(keys, (0,)), metadata)
    assert said_of_sampling(file, {}) == settings
    given = {"prediction_type": "sample", "timestep_spacing": "leading"}  # the caller's come first
    assert said_of_sampling(file, given) == settings | given


@pytest.mark.parametrize(
    ("keys", "metadata", "text"),
    [
        (["v_pred"], {"modelspec.prediction_type": "epsilon"}, "says two things of what its network predicts"),
        ([], {"modelspec.prediction_type": "magic"}, "modelspec.prediction_type = 'magic'; known: v, v_prediction"),
        (["edm_mean", "edm_std"], {}, "a model of EDM's noise, such as Playground 2.5 or CosXL"),
    ],
)
def test_what_a_file_says_that_is_not_known(keys, metadata, text):
    with pytest.raises(ValueError, match=text):
        said_of_sampling(checkpoint(dict.fromkeys(keys, (0,)), metadata), {})


@pytest.mark.parametrize("said", [{"modelspec.prediction_type": "v"}, None])
def test_file_is_sampled_as_it_says(whole, tmp_path, said):
    file, configs, _ = whole
    save_file(file | ({"v_pred": ONE, "ztsnr": ONE} if said is None else {}), tmp_path / "x.safetensors", said)
    found = load_models(tmp_path / "x.safetensors", configs=configs, put=shape_of)
    scheduler = assemble(tmp_path / "x.safetensors", found).scheduler
    assert scheduler.prediction == "v"
    assert (scheduler.alphas_cumprod[-1] == 0) == (said is None)
    assert (scheduler.times(10)[0] == 1) == (said is None)  # from pure noise
    other = {"prediction_type": "epsilon", "_class_name": "EulerDiscreteScheduler"}
    given = assemble(tmp_path / "x.safetensors", found, scheduler=other).scheduler
    assert (given.prediction, given.clip, given.raw["beta_end"]) == ("eps", None, 0.012)


# --- keys that do not fit ---


def test_unused_keys_that_are_permitted(whole, tmp_path):
    """By patterns on the file's own names, in a network and beside all; the error says how."""
    file, configs, expected = whole
    more = {"extra.a": ONE, "extra.b": ONE, PREFIX["unet"] + "hook.x": ONE}
    save_file(file | more, tmp_path / "x.safetensors")
    how = {"configs": configs, "put": np.asarray}
    with pytest.raises(CheckpointError) as info:
        load_models(tmp_path / "x.safetensors", **how)
    assert str(info.value).splitlines() == [
        "x.safetensors: 2 keys unused",
        "  unused: extra.* (2 keys)",
        '  to leave them out: load(..., allow_unused="PATTERN") or --allow-unused PATTERN, such as "extra.*"',
    ]
    with pytest.raises(CheckpointError, match=r"1 unused, 0 of another shape\n  unused: hook\.x \[0\]\n  to leave"):
        load_models(tmp_path / "x.safetensors", allow_unused="extra.*", **how)
    for pattern in ("*hook*", "model.diffusion_model.hook.*", "hook.?"):
        found = load_models(tmp_path / "x.safetensors", allow_unused=["extra.*", pattern], **how)
        jax.tree.map(np.testing.assert_array_equal, found["unet"].params, expected["unet"].params)
    first = next(key for key in file if key.startswith(PREFIX["vae"] + "decoder"))
    save_file({key: value for key, value in file.items() if key != first}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"1 keys missing"):  # what is missing is never permitted
        load_models(tmp_path / "x.safetensors", allow_unused="*", **how)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("depth_model.model.x.weight", "of a depth model"),
        ("noise_augmentor.time_embed.0.weight", "of unCLIP"),
        ("edm_mean", "of a model of EDM's noise"),
        ("control_model.input_blocks.0.0.weight", "of a ControlNet"),
        ("first_stage_model.decoder.up.0.block.0.time_stack.x", "of a video model"),
    ],
)
def test_parts_of_other_models_are_named(whole, key, text):
    file, configs, _ = whole
    if not key.startswith("first_stage"):
        with pytest.raises(CheckpointError, match=f"1 keys unused\n  unused: {re.escape(key)} .*{text}"):
            single.parts(checkpoint({**{k: v.shape for k, v in file.items()}, key: (0,)}), configs)
    assert text.removeprefix("of ") in (single._reason(key) or "")


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        (["model_ema.diffusion_modelout0weight"], "holds only a moving average"),
        (["down_blocks.0.resnets.0.conv1.weight"], "in the naming of diffusers, and no config.json"),
        (["decoder.mid_block.resnets.0.conv1.weight"], "in the naming of diffusers, and no config.json"),
    ],
)
def test_file_without_a_network_says_what_it_has(keys, text):
    with pytest.raises(CheckpointError, match=text):
        single.parts(checkpoint(dict.fromkeys(keys, (1,))))


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


def test_layer_that_is_missing_is_one_line(text):
    change(text, r"layers\.1\.")
    assert message(lambda: load_component(text.parent))[1:] == [
        "  missing: text_model.encoder.layers.1.* (16 keys)",
    ]


def test_layers_that_differ_in_a_number_are_one_line(text):
    config = text.parent / "config.json"
    config.write_text(json.dumps(sd_tiny.TEXT | {"num_hidden_layers": 12}))
    lines = message(lambda: load_component(text.parent))
    assert lines[0].endswith("160 keys missing, 0 unused, 0 of another shape")
    assert lines[1:] == ["  missing: text_model.encoder.layers.{2…11}.* (160 keys)"]


def test_network_of_another_size_is_a_few_lines(text):
    config = text.parent / "config.json"
    config.write_text(json.dumps(sd_tiny.TEXT | {"hidden_size": 64}))
    lines = message(lambda: load_component(text.parent))
    assert lines[1] == "  most shapes differ: these are weights of a network of another size than its configuration's"
    assert sum(line.startswith("  shape:") for line in lines) == SHOWN == len(lines) - 3
    assert lines[-1] == f"  … and {int(lines[0].split()[-4]) - SHOWN} more such lines"


def test_another_network_is_a_few_lines(text):
    vae = sd_tiny.write(text.parent.parent / "vae", sd_tiny.VAE)
    vae.replace(text)
    lines = message(lambda: load_component(text.parent))
    assert lines[1] == "  none of the network's keys is there: these are another network's weights"
    assert "  missing: text_model.* (36 keys)" in lines
    assert "  unused: encoder.* (50 keys)" in lines
    assert len(lines) < 12


def test_gathered_keys_are_those_that_were_given():
    """Groups hold exactly the keys of which they are made, whatever the tree: their numbers add up."""
    rng = np.random.default_rng(0)
    among = {".".join(map(str, rng.integers(0, 3, rng.integers(1, 5)))) + f".w{i}": (i,) for i in range(200)}
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        keys = [key for key in among if rng.random() < share]
        counts = [re.search(r"\((\d+) keys\)$", line) for line in gathered(keys, among, among)]
        assert sum(1 if count is None else int(count[1]) for count in counts) == len(keys)


@pytest.mark.parametrize("before", ["_orig_mod.", "module.", "unet.", "a.b."])
def test_prefix_before_all_keys(text, before):
    expected = load_component(text.parent, put=np.asarray).params
    tensors = load_file(text)
    save_file({before + key: value for key, value in tensors.items()}, text)
    jax.tree.map(np.testing.assert_array_equal, load_component(text.parent, put=np.asarray).params, expected)


def test_fewer_layers_than_the_file(text):
    """What config.json does not speak of is not read: the last layers, and a projection."""
    save_file(load_file(text) | {"text_projection.weight": np.eye(32, dtype=np.float32)}, text)
    (text.parent / "config.json").write_text(json.dumps(sd_tiny.TEXT | {"num_hidden_layers": 1}))
    found = load_component(text.parent, put=np.asarray).params
    assert sum(".layers." in name for name in found) == 1


# --- models of other kinds, and smaller ones ---


@pytest.mark.parametrize(
    ("channels", "text"),
    [
        ((9, 4), "an inpainting model, which also takes a mask"),
        ((8, 4), "InstructPix2Pix"),
        ((5, 4), "a depth model"),
        ((7, 4), "an upscaler"),
        ((4, 8), "predicts its variance too"),
        ((3, 3), "parts of two models"),
    ],
)
def test_other_kinds_of_unet_are_named(folder, channels, text):
    found = load_models(folder, put=shape_of)
    unet = found["unet"]
    raw = {**unet.config, "in_channels": channels[0], "out_channels": channels[1]}
    with pytest.raises(ValueError, match=text):
        assemble(folder, found | {"unet": unet._replace(module=module_from_config(raw))}, vocabularies=False)


def test_refiner_is_named(folder):
    """From its sizes: a prompt of the second text encoder alone, and five numbers beside its projection."""
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    raw = sd_tiny.UNET | added | {"projection_class_embeddings_input_dim": 16 + 5 * 8, "cross_attention_dim": 32}
    second = sd_tiny.TEXT | {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": 16}
    found = load_models(folder, put=shape_of)
    text = found.pop("text_encoder")._replace(module=module_from_config(second))
    unet = found["unet"]._replace(module=module_from_config(raw))
    with pytest.raises(ValueError, match="this is SDXL's refiner, which is trained for the last fifth of the noise"):
        assemble(folder, found | {"unet": unet, "text_encoder_2": text}, vocabularies=False)
    file = openclip(2, prefix="conditioner.embedders.0.model.")
    assert [*single.parts(file)] == ["text_encoder_2"]  # and so its single file comes to the same error


DEEP = sd_tiny.UNET | {
    "down_block_types": ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2,
    "transformer_layers_per_block": [[1], [2]],
    "reverse_transformer_layers_per_block": [[2, 1], [1, 1]],
    "attention_head_dim": 8,
    "mid_block_type": "UNetMidBlock2D",
}


@pytest.mark.parametrize("raw", [sd_tiny.UNET | {"mid_block_type": None}, DEEP])
def test_distilled_unets_from_shapes(raw):
    """A smaller middle or none, and a number of transformer blocks for each attention: in a single file, too."""
    module = module_from_config(raw)
    tree = convert.abstract(module)
    leaves = convert.flat(tree)
    shapes = {key: convert.torch_shape(path[-1], leaves[path].shape) for key, path in convert.keys(tree).items()}
    assert sum("mid_block.resnets" in key for key in shapes) == (0 if raw["mid_block_type"] is None else 10)
    file = {source.key: shapes[key] for key, source in compvis.sources(module, shapes).items()}
    assert len(file) == len(shapes)
    again = module_from_config(single.unet_config(checkpoint(file))).config
    for place in ("down_blocks.1.attentions.0", "up_blocks.0.attentions.1", "up_blocks.1.attentions.0"):
        assert again.depth(place) == module.config.depth(place)
    assert again.middle == module.config.middle


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
            "mid_block_type is 'UNetMidBlock2DSimpleCrossAttn'; impl",
        ),
        ({"reverse_transformer_layers_per_block": None}, "then the way up needs its own"),
        ({"transformer_layers_per_block": [[1], [2, 3]]}, "it takes a number for each level, or 1 numbers for each"),
    ],
)
def test_middles_and_depths_that_do_not_fit(change, text):
    with pytest.raises(ValueError, match=text):
        module_from_config(DEEP | change)


def test_settings_without_effect_when_sampling():
    """Dropout, and what the moving average of diffusers' training writes into config.json."""
    plain = module_from_config(sd_tiny.UNET).config
    more = {"dropout": 0.1, "decay": 0.9999, "power": 0.6667, "optimization_step": 5, "inv_gamma": 1.0}
    assert module_from_config(sd_tiny.UNET | more).config == plain


def test_clip_skip_is_written_into_the_configuration(folder):
    found = load_models(folder, put=shape_of, clip_skip=1)
    assert found["text_encoder"].config["clip_skip"] == 1
    assert found["text_encoder"].module.config.clip_skip == 1
    assert "clip_skip" not in found["unet"].config
    with pytest.raises(ValueError, match="clip_skip is 2; give 0 to 1, as the text encoder has 2 layers"):
        load_models(folder, put=shape_of, clip_skip=2)
    with pytest.raises(ValueError, match="clip_skip is 1, but the model has no text encoder of CLIP"):
        load_models(folder / "vae", put=shape_of, clip_skip=1)
