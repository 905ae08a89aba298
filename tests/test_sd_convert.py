"""The rules of conversion on tensors whose values are their places."""

import json
import mmap
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sd_tiny
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file, save_file

from mmdjax.checkpoint import Checkpoint, CheckpointError, Entry, open_safetensors, write_safetensors
from mmdjax.sd.files import compvis, convert, single
from mmdjax.sd.files.places import open_file, open_folder
from mmdjax.sd.models import export, load_component, load_models, module_from_config, save
from mmdjax.sd.networks.layers import SpatialAttention


def entries(arrays):
    return Checkpoint({k: Entry(v.shape, v.dtype, lambda v=v: v) for k, v in arrays.items()}, "memory")


def test_11_layouts():
    """[out, in, h, w] is [h, w, in, out] and [out, in] is [in, out]; only kernels change."""
    conv = np.arange(2 * 3 * 5 * 7).reshape(2, 3, 5, 7)
    assert convert.to_flax("kernel", conv)[4, 6, 2, 1] == conv[1, 2, 4, 6]
    assert convert.to_flax("kernel", conv[0, 0])[6, 4] == conv[0, 0, 4, 6]
    for leaf in convert.LEAVES:
        for array in (conv, conv[0, 0], conv[0, 0, 0]):
            np.testing.assert_array_equal(convert.to_torch(leaf, convert.to_flax(leaf, array)), array)
            assert convert.torch_shape(leaf, convert.to_flax(leaf, array).shape) == array.shape
        if leaf != "kernel":
            np.testing.assert_array_equal(convert.to_flax(leaf, conv[0, 0]), conv[0, 0])


THIRDS = {1: {"q": [0, 1, 2, 3], "v": [8, 9, 10, 11]}, 2: {"q": [0, 1, 6, 7], "k": [2, 3, 8, 9], "v": [4, 5, 10, 11]}}


@pytest.mark.parametrize(("heads", "rows"), THIRDS.items())
def test_5_fused_attention_is_heads_first(heads, rows):
    """CompVis's qkv rows are [head][q, k, v][channel]; OpenCLIP's in_proj is plain thirds."""
    fused = entries({"qkv": np.arange(12.0)[:, None, None] + np.zeros((12, 4, 1))})
    for which, expected in rows.items():
        piece = compvis.Source("qkv", "third", "qkv".index(which), heads).of(fused)
        assert piece.shape == piece.read().shape == (4, 4, 1)
        np.testing.assert_array_equal(piece.read()[:, 0, 0], expected)


def test_5_fused_attention_is_the_attention_it_was():
    """The published AttentionBlock, written out, against ours with the converted parameters."""
    rng = np.random.default_rng(0)
    raw = {
        "_class_name": "UNet2DModel",
        "block_out_channels": [32, 64],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "attention_head_dim": 16,
    }
    module = module_from_config(raw)
    tree = convert.abstract(module)
    sources = compvis.sources(module, convert.keys(tree))
    fused = {f"middle_block.1.{k}": (0.3 * rng.standard_normal(s)).astype(np.float32) for k, s in {
        "norm.weight": (64,), "norm.bias": (64,), "qkv.weight": (192, 64, 1), "qkv.bias": (192,),
        "proj_out.weight": (64, 64, 1), "proj_out.bias": (64,)}.items()}  # fmt: skip
    mine = {k: v for k, v in sources.items() if "mid_block.attentions" in k}
    found = compvis.translate(entries(fused), mine)
    assert set(found) == set(mine)
    params = {}
    for key in found:
        *_, part, leaf = key.removeprefix("mid_block.attentions.0.").replace("to_out.0", "to_out").split(".")
        value = found[key]
        value = value[..., 0].T if value.ndim == 3 else value
        flax_leaf = "bias" if leaf == "bias" else "scale" if part == "group_norm" else "kernel"
        params.setdefault("to_out.0" if part == "to_out" else part, {})[flax_leaf] = jnp.asarray(value)
    x = rng.standard_normal((1, 3, 5, 64)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        y = SpatialAttention(4, 32, 1e-5).apply({"params": params}, jnp.asarray(x))
    h = x.astype(np.float64).reshape(15, 32, 2)
    h = (h - h.mean((0, 2), keepdims=True)) / np.sqrt(h.var((0, 2), keepdims=True) + 1e-5)
    h = h.reshape(15, 64) * fused["middle_block.1.norm.weight"] + fused["middle_block.1.norm.bias"]
    qkv = fused["middle_block.1.qkv.weight"][..., 0] @ h.T + fused["middle_block.1.qkv.bias"][:, None]
    q, k, v = np.split(qkv.reshape(4, 48, 15), 3, axis=1)  # by head, then q, k, v
    logits = np.einsum("hct,hcs->hts", q, k) / 4
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    a = np.einsum("hts,hcs->hct", weights, v).reshape(64, 15)
    out = fused["middle_block.1.proj_out.weight"][..., 0] @ a + fused["middle_block.1.proj_out.bias"][:, None]
    np.testing.assert_allclose(y, x + out.T.reshape(x.shape), rtol=1e-4, atol=1e-4)


def test_20_openclip_names():
    """in_proj splits in thirds, text_projection is transposed, position_ids is no parameter."""
    raw = sd_tiny.TEXT | {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": 5}
    module = module_from_config(raw)
    sources = compvis.sources(module, convert.keys(convert.abstract(module)), openclip=True)
    layer = "text_model.encoder.layers.1."
    assert sources[layer + "self_attn.k_proj.weight"] == ("transformer.resblocks.1.attn.in_proj_weight", "third", 1, 1)
    assert sources[layer + "self_attn.v_proj.bias"] == ("transformer.resblocks.1.attn.in_proj_bias", "third", 2, 1)
    assert sources[layer + "self_attn.out_proj.bias"].key == "transformer.resblocks.1.attn.out_proj.bias"
    assert sources[layer + "mlp.fc2.weight"].key == "transformer.resblocks.1.mlp.c_proj.weight"
    assert sources[layer + "layer_norm2.bias"].key == "transformer.resblocks.1.ln_2.bias"
    projection = np.arange(160.0).reshape(32, 5)
    read = sources["text_projection.weight"].of(entries({"text_projection": projection})).read()
    np.testing.assert_array_equal(convert.to_flax("kernel", read), projection)  # pooled @ text_projection, as OpenCLIP
    dropped = convert.canonical(entries({"text_model.embeddings.position_ids": np.arange(8)}), module)
    assert not dropped


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("conv_in.weight", "input_blocks.0.0.weight"),
        ("time_embedding.linear_2.bias", "time_embed.2.bias"),
        ("add_embedding.linear_1.weight", "label_emb.0.0.weight"),
        ("down_blocks.0.resnets.0.norm1.weight", "input_blocks.1.0.in_layers.0.weight"),
        ("down_blocks.0.downsamplers.0.conv.weight", "input_blocks.3.0.op.weight"),
        ("down_blocks.1.resnets.0.conv_shortcut.bias", "input_blocks.4.0.skip_connection.bias"),
        ("down_blocks.2.attentions.1.proj_in.weight", "input_blocks.8.1.proj_in.weight"),
        ("down_blocks.3.resnets.1.time_emb_proj.bias", "input_blocks.11.0.emb_layers.1.bias"),
        ("mid_block.resnets.1.conv2.bias", "middle_block.2.0.out_layers.3.bias".replace(".2.0.", ".2.")),
        ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight",
         "middle_block.1.transformer_blocks.0.attn1.to_q.weight"),
        ("mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.bias",
         "middle_block.1.transformer_blocks.0.attn2.to_out.0.bias"),
        ("up_blocks.0.resnets.2.conv1.weight", "output_blocks.2.0.in_layers.2.weight"),
        ("up_blocks.0.upsamplers.0.conv.weight", "output_blocks.2.1.conv.weight"),
        ("up_blocks.1.upsamplers.0.conv.weight", "output_blocks.5.2.conv.weight"),
        ("up_blocks.3.attentions.2.norm.bias", "output_blocks.11.1.norm.bias"),
        ("conv_norm_out.bias", "out.0.bias"),
        ("conv_out.weight", "out.2.weight"),
    ],
)  # fmt: skip
def test_names_of_stable_diffusion_1(key, place):
    assert compvis.unet_source(key, module_from_config({"_class_name": "UNet2DConditionModel"}).config) == (
        place,
        "all",
        0,
        1,
    )


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("encoder.down_blocks.1.resnets.0.conv_shortcut.weight", "encoder.down.1.block.0.nin_shortcut.weight"),
        ("encoder.down_blocks.2.downsamplers.0.conv.bias", "encoder.down.2.downsample.conv.bias"),
        ("encoder.mid_block.resnets.1.norm1.weight", "encoder.mid.block_2.norm1.weight"),
        ("decoder.mid_block.attentions.0.to_out.0.weight", "decoder.mid.attn_1.proj_out.weight"),
        ("decoder.mid_block.attentions.0.group_norm.bias", "decoder.mid.attn_1.norm.bias"),
        ("decoder.up_blocks.0.resnets.2.conv1.weight", "decoder.up.3.block.2.conv1.weight"),
        ("decoder.up_blocks.2.upsamplers.0.conv.weight", "decoder.up.1.upsample.conv.weight"),
        ("decoder.conv_norm_out.weight", "decoder.norm_out.weight"),
        ("post_quant_conv.weight", "post_quant_conv.weight"),
    ],
)
def test_names_of_the_autoencoder(key, place):
    assert compvis.vae_key(key, 4) == place


def test_12_old_spelling_of_attention():
    """query, key, value, proj_attn: as diffusers wrote at first. CompVis's q, k, v, proj_out: `test_vae_alone`."""
    module, params, _ = sd_tiny.component(sd_tiny.VAE)
    tensors = {key: entry.read() for key, entry in convert.params_to_torch(params).items()}
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        assert any(f".{new}." in key for key in tensors)
        tensors = {key.replace(f".{new}.", f".{old}."): value for key, value in tensors.items()}
    jax.tree.map(np.testing.assert_array_equal, convert.params_from_torch(module, entries(tensors)), params)


def test_28_name_of_the_moving_average():
    assert (
        compvis.ema_key("model.diffusion_model.input_blocks.0.0.weight")
        == "model_ema.diffusion_modelinput_blocks00weight"
    )


def test_30_tensor_by_tensor(tmp_path):
    """Each array is handed over as a view of the file, one after the other, and nothing else is held."""
    weights = sd_tiny.write(tmp_path / "unet", sd_tiny.UNET)
    seen = []

    def put(array):
        assert not array.flags.owndata
        seen.append(array.nbytes)
        return jnp.array(array)

    load_component(tmp_path / "unet", put=put)
    assert sum(seen) == sum(value.nbytes for value in load_file(weights).values())


def test_30_memory_for_one_tensor(tmp_path):
    """Writing, reading and casting hold a few tensors' memory at once, not the model's."""
    raw = sd_tiny.TEXT | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
    tree = convert.flat(convert.abstract(module_from_config(raw)))
    keys = convert.keys(unflatten_dict(tree))
    total = sum(4 * leaf.size for leaf in tree.values())
    entries = {}
    for key, path in keys.items():
        shape = convert.torch_shape(path[-1], tree[path].shape)
        entries[key] = Entry(shape, np.float32, lambda shape=shape: np.ones(shape, np.float32))
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text(json.dumps(raw))
    for run in (
        lambda: write_safetensors(tmp_path / "text_encoder" / "model.safetensors", entries),
        lambda: load_component(tmp_path / "text_encoder", put=np.shape),
        lambda: load_component(tmp_path / "text_encoder", put=np.shape, param_dtype=np.float16),
    ):
        tracemalloc.start()
        run()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < total / 5  # the largest tensor is 1/12 of all


@pytest.mark.parametrize("swap", [False, True])
def test_parameters_are_copies(swap):
    """Of the file's memory, whose pages JAX would else share: a file may change or vanish once its model is loaded."""
    file = np.ndarray((256, 256), np.float32, mmap.mmap(-1, 2**18))  # aligned as JAX shares it
    file[:] = np.arange(256.0)
    expected = file.T.copy() if swap else file.copy()
    leaf = convert.to_device(file.T if swap else file)
    np.testing.assert_array_equal(leaf, expected)
    file[:] = -1.0
    np.testing.assert_array_equal(leaf, expected)


def test_written_bytes_are_the_librarys(tmp_path):
    arrays = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "a": np.float16([1, 2, 3]),
        "scalar": np.float32(3).reshape(()),
        "c": np.arange(3, dtype=np.int64),
        "none": np.zeros((0, 3), np.float32),
        "é": np.zeros(1, np.uint8),
    }
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, tmp_path / "a", {"format": "pt"})
    items = {k: Entry(v.shape, v.dtype, lambda v=v: v) for k, v in arrays.items()}
    write_safetensors(tmp_path / "b", items, {"format": "pt"})
    theirs = load_file(tmp_path / "b")
    for key, value in arrays.items():
        np.testing.assert_array_equal(theirs[key], value)
    ours = open_safetensors(tmp_path / "a")
    assert ours.metadata == {"format": "pt"}
    for key, value in arrays.items():
        np.testing.assert_array_equal(ours[key], value)
        assert ours[key].dtype == value.dtype
    assert not list(tmp_path.glob("*.part"))


def test_saved_and_exported_models_come_back(tmp_path):
    made = {"unet": sd_tiny.component(sd_tiny.UNET), "vae": sd_tiny.component(sd_tiny.VAE)}
    made["text_encoder"] = sd_tiny.component(sd_tiny.TEXT)
    save(tmp_path / "saved", made)
    export(tmp_path / "exported", made)
    for again in (load_models(tmp_path / "saved"), load_models(tmp_path / "exported")):
        assert again.keys() == made.keys()
        for name, component in made.items():
            jax.tree.map(np.testing.assert_array_equal, again[name].params, component.params)
            assert again[name].module == component.module
            assert again[name].config == component.config
    half = load_models(tmp_path / "saved", param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    assert {x.dtype for c in half.values() for x in jax.tree.leaves(c.params)} == {jnp.dtype(jnp.bfloat16)}
    assert all(c.module.dtype == jnp.bfloat16 for c in half.values())


def test_saved_model_is_checked_too(tmp_path):
    save(tmp_path, {"vae": sd_tiny.component(sd_tiny.VAE)})
    tensors = load_file(tmp_path / "vae.safetensors")
    tensors.pop("quant_conv.bias")
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(
        CheckpointError, match=r"1 keys missing, 0 unused, 0 of another shape\n  missing: quant_conv.bias \[8\]"
    ):
        load_models(tmp_path)


def test_variants(tmp_path):
    plain = sd_tiny.write(tmp_path / "unet", sd_tiny.UNET)
    half = {key: value.astype(np.float16) for key, value in load_file(plain).items()}
    save_file(half, plain.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert open_folder(tmp_path / "unet")["conv_in.bias"].dtype == np.float32
    assert open_folder(tmp_path / "unet", "fp16")["conv_in.bias"].dtype == np.float16


def test_vae_alone(tmp_path):
    """The hub has fine-tuned autoencoders as single files with no prefix-bearing U-Net beside them."""
    _, params, _ = made = sd_tiny.component(sd_tiny.VAE)
    torch_side = {key: entry.read() for key, entry in convert.params_to_torch(params).items()}
    file = {f"first_stage_model.{compvis.vae_key(key, 2)}": value for key, value in torch_side.items()}
    file = {
        key: np.ascontiguousarray(value[..., None, None] if "attn_1" in key and value.ndim == 2 else value)
        for key, value in file.items()
    }
    save_file(file, tmp_path / "vae.safetensors")
    loaded = load_models(tmp_path / "vae.safetensors")
    assert list(loaded) == ["vae"]
    jax.tree.map(np.testing.assert_array_equal, loaded["vae"].params, made.params)
    save_file(file | {"what.is.this": np.zeros(1)}, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match=r"vae.safetensors: 1 keys unused\n  unused: what.is.this"):
        load_models(tmp_path / "vae.safetensors")


def test_scale_factor_of_the_file(tmp_path):
    """A training checkpoint that measured its latents' scale says so."""
    made = sd_tiny.component(sd_tiny.VQ)
    torch_side = {key: entry.read() for key, entry in convert.params_to_torch(made.params).items()}
    file = {f"first_stage_model.{compvis.vae_key(key, 2)}": np.ascontiguousarray(v) for key, v in torch_side.items()}
    save_file(file, tmp_path / "x.safetensors")
    assert single.parts(open_file(tmp_path / "x.safetensors"))["vqvae"].config["scaling_factor"] == 1.0
    save_file(file | {"scale_factor": np.array(0.25, np.float32)}, tmp_path / "x.safetensors")
    assert single.parts(open_file(tmp_path / "x.safetensors"))["vqvae"].config["scaling_factor"] == 0.25
