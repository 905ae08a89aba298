"""FLUX's parts: packing, rotary positions, running statistics, single files; the networks against recorded outputs."""

import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sd_tiny
from jax.sharding import AbstractMesh
from safetensors.numpy import load_file, save_file

from mmdjax import distributed
from mmdjax.checkpoint import CheckpointError
from mmdjax.sd import load_models, module_from_config
from mmdjax.sd.files import convert, single_flux
from mmdjax.sd.networks.layers import pack, unpack
from mmdjax.sd.networks.transformers.blocks import rotary_tables, rotate, swiglu
from mmdjax.sd.networks.transformers.flux import grid_places
from mmdjax.sd.networks.transformers.flux2 import places
from mmdjax.sd.networks.vae_flux2 import RunningNorm

FIXTURES = Path(__file__).parent / "fixtures"
FLUX = {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 8,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 6,
    "pooled_projection_dim": 5,
    "axes_dims_rope": [4, 6, 6],
}
KLEIN = {  # FLUX.2-klein-4B with one block of each kind
    "_class_name": "Flux2Transformer2DModel",
    "num_layers": 1,
    "num_single_layers": 1,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
COND = {"context": jnp.zeros((1, 3, 6)), "pooled": jnp.zeros((1, 5))}


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", ["flux", "flux2"])
def test_network(name):
    fixture = json.loads((FIXTURES / f"sd_{name}.json").read_text())
    a = load_file(FIXTURES / f"sd_{name}.safetensors")
    component = sd_tiny.component(fixture["config"])
    cond = {key: a[key] for key in ("context", "pooled") if key in a}
    with jax.default_matmul_precision("highest"):
        y = jax.jit(component.module.apply)({"params": component.params}, a["x"], a["t"], cond, a.get("guidance"))
    # relative, float32: rounding through two blocks is 1e-6
    assert np.abs(y - a["output"]).max() < 1e-5 * np.abs(a["output"]).max()


def test_packing():
    """Channel c of the pixel at (row, column) of a block stands at 4 c + 2 row + column."""
    x = normal(0, 2, 4, 6, 3)
    packed = pack(x)
    for channel in range(3):
        for row in range(2):
            for column in range(2):
                place = packed[..., 4 * channel + 2 * row + column]
                np.testing.assert_array_equal(place, x[:, row::2, column::2, channel])
    np.testing.assert_array_equal(unpack(packed), x)
    with pytest.raises(ValueError, match="the latents are 4 × 5; give multiples of 2"):
        pack(np.zeros((1, 4, 5, 3)))


def test_rotated_products_depend_on_distances():
    """⟨R(p) q, R(p + a) k⟩ does not depend on p, and lengths are kept."""
    q, k = normal(0, 12), normal(1, 12)
    p = np.array([[0.0, 0, 0], [3, 1, 4], [9, 0, 7]])

    def turned(x, places):
        return np.asarray(rotate(jnp.tile(x, (1, 3, 1, 1)), rotary_tables(places, (2, 4, 6), 100.0)))[0, :, 0]

    products = (turned(q, p) * turned(k, p + np.array([1, -2, 5]))).sum(-1)
    np.testing.assert_allclose(products, products[0], rtol=1e-5)  # float32
    assert abs(products[0] - q @ k) > 0.1
    np.testing.assert_allclose(np.linalg.norm(turned(q, p), axis=-1), np.linalg.norm(q), rtol=1e-6)


def test_rotation_is_that_of_complex_numbers():
    """Pair i of an axis' d channels turns by place · theta^(−2 i/d)."""
    x = normal(0, 1, 2, 3, 4)
    table = rotary_tables(np.array([[2.0], [7.0]]), (4,), 50.0)
    z = x[..., ::2] + 1j * x[..., 1::2]
    z = z * np.exp(1j * np.array([2.0, 7.0])[:, None] * 50.0 ** -np.array([0, 0.5]))[None, :, None]
    expected = np.stack([z.real, z.imag], axis=-1).reshape(x.shape)
    np.testing.assert_allclose(rotate(x, table), expected, atol=1e-6)
    with pytest.raises(ValueError, match="places have 1 axes and dims are"):
        rotary_tables(np.zeros((2, 1)), (2, 2), 50.0)


def test_places():
    assert grid_places(2, 3).tolist() == [[0, i, j] for i in range(2) for j in range(3)]
    assert places(3, 2, 1).tolist() == [[0, 0, 0, i] for i in range(3)] + [[0, i, 0, 0] for i in range(2)]


def test_swiglu():
    a, b = normal(0, 5), normal(1, 5)
    np.testing.assert_allclose(swiglu(np.concatenate([a, b])), a / (1 + np.exp(-a)) * b, rtol=1e-5)


def test_running_norm():
    norm = RunningNorm(3, 0.5)
    params = {"running_mean": jnp.array([1.0, 2.0, 3.0]), "running_var": jnp.array([0.5, 3.5, 8.5])}
    apply = functools.partial(norm.apply, {"params": params})
    x = np.float32([[[[2.0, 4.0, 9.0]]]])
    np.testing.assert_array_equal(apply(x), [[[[1.0, 1.0, 2.0]]]])
    np.testing.assert_array_equal(apply(apply(x), inverse=True), x)


def test_latents_of_flux2():
    config = module_from_config({"_class_name": "AutoencoderKLFlux2"}).config
    assert (config.latent_channels, config.z_channels, config.downscale) == (128, 32, 16)
    config = module_from_config(
        {"_class_name": "AutoencoderKLFlux2", "latent_channels": 4, "block_out_channels": [32, 64]}
    ).config
    assert (config.latent_channels, config.z_channels, config.downscale) == (16, 4, 4)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"patch_size": 2}, r"patch_size = 2 \(implemented: 1\)"),
        ({"axes_dims_rope": [4, 6, 8]}, r"axes_dims_rope is \(4, 6, 8\); give 3 even numbers that add up to"),
        ({"axes_dims_rope": [5, 5, 6]}, "give 3 even numbers"),
        ({"axes_dims_rope": [8, 8]}, "give 3 even numbers"),
        ({"in_channels": 6}, "in_channels is 6 and out_channels None; latents packed 2 × 2"),
        ({"num_layers": 3000}, "3,0"),
    ],
)
def test_settings_that_are_no_network(change, text):
    with pytest.raises(ValueError, match=text):
        module_from_config(FLUX | change)


def test_levels_of_the_small_decoder():
    raw = {"_class_name": "AutoencoderKLFlux2", "decoder_block_out_channels": [32, 64]}
    with pytest.raises(ValueError, match="decoder_block_out_channels has 2 levels and block_out_channels 4"):
        module_from_config(raw)
    with pytest.raises(ValueError, match="patch_size"):
        module_from_config({"_class_name": "AutoencoderKLFlux2", "patch_size": [4, 4]})


@pytest.mark.parametrize(
    ("raw", "cond", "guidance", "text"),
    [
        ({}, COND | {"context": jnp.zeros((1, 3, 7))}, None, "the context has width 7; this Flux takes 6"),
        ({}, COND | {"pooled": jnp.zeros((1, 4))}, None, "the pooled prompt has width 4; this network takes 5"),
        ({}, COND["context"], None, 'conditioned on a mapping of "context"'),
        ({}, COND, jnp.ones(1), "this Flux has no embedding of guidance"),
        ({"guidance_embeds": True}, COND, None, "this Flux embeds the strength of guidance: give guidance"),
    ],
)
def test_conditions_of_another_form(raw, cond, guidance, text):
    module = module_from_config(FLUX | raw)
    with pytest.raises(ValueError, match=text):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2, 2, 2)), jnp.zeros(1), cond, guidance)


def test_parameters_split_evenly(monkeypatch):
    """Over 8 devices each holds an eighth of FLUX.2-klein-4B's blocks and embeddings, but for the norms' vectors."""
    monkeypatch.setattr(distributed, "_put", lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)))
    tree = convert.abstract(module_from_config(KLEIN))
    parts = distributed.shard_params(tree, AbstractMesh((8,), ("batch",)))
    whole = sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert whole > 4e8
    assert whole / 8 <= sum(jax.tree.leaves(parts)) < whole / 8 + 2000


# Single files in FLUX's own layout


def published(width=64, head=32, *, guidance=False):
    """FLUX.1's own names: one block of each kind, values by name."""
    module = module_from_config(
        FLUX
        | {"attention_head_dim": head, "num_attention_heads": width // head, "guidance_embeds": guidance}
        | {"axes_dims_rope": [4, 14, 14]}
    )
    tree = convert.abstract(module)
    leaves = convert.flat(tree)
    keys = {key: convert.torch_shape(path[-1], leaves[path].shape) for key, path in convert.keys(tree).items()}
    rows = {}
    for key, place in single_flux.sources(keys, width).items():
        rows.setdefault(place.key, []).append(keys[key])
    shapes = {key: (sum(shape[0] for shape in pieces), *pieces[0][1:]) for key, pieces in rows.items()}
    return module, {key: sd_tiny.draw(key, shape) for key, shape in shapes.items()}


@pytest.mark.parametrize(("prefix", "guidance"), [("", True), ("model.diffusion_model.", False)])
def test_single_file(tmp_path, prefix, guidance):
    module, file = published(guidance=guidance)
    save_file({prefix + key: value for key, value in file.items()}, tmp_path / "flux.safetensors")
    ((name, found),) = load_models(tmp_path / "flux.safetensors").items()
    assert name == "transformer"
    assert found.module == module
    fused = file["single_blocks.0.linear1.weight"]
    block = found.params["single_transformer_blocks.0"]
    np.testing.assert_array_equal(block["attn"]["to_k"]["kernel"], fused[64:128].T)
    np.testing.assert_array_equal(block["proj_mlp"]["kernel"], fused[192:].T)
    shift, scale = np.split(file["final_layer.adaLN_modulation.1.bias"], 2)
    np.testing.assert_array_equal(found.params["norm_out.linear"]["bias"], np.concatenate([scale, shift]))


def test_single_file_of_too_many_rows(tmp_path):
    _, file = published()
    file["double_blocks.0.txt_attn.qkv.bias"] = np.zeros(200, np.float32)
    save_file(file, tmp_path / "flux.safetensors")
    text = r"attn.add_v_proj.bias is \[72\], the model wants \[64\]"
    with pytest.raises(CheckpointError, match=text):
        load_models(tmp_path / "flux.safetensors")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"img_in.weight": None}, "flux.safetensors: img_in.weight should be a matrix, but is missing"),
        ({"img_in.weight": np.zeros(3)}, r"img_in.weight should be a matrix, but is \[3\]"),
        ({"double_blocks.0.img_attn.norm.query_norm.scale": None}, "lacks double_blocks.0.img_attn.norm.query_norm"),
        ({"vector_in.in_layer.weight": None}, r"is a diffusion transformer with double_blocks.\*, but neither FLUX.1"),
        ({"txt_in.bias": None, "strange": np.zeros(3)}, "1 keys missing, 1 unused, 0 of another shape"),
    ],
)
def test_single_file_that_is_damaged(tmp_path, change, text):
    _, file = published()
    kept = {key: value for key, value in (file | change).items() if value is not None}
    save_file(kept, tmp_path / "flux.safetensors")
    with pytest.raises(CheckpointError, match=text):
        load_models(tmp_path / "flux.safetensors")


def test_single_file_has_no_moving_average(tmp_path):
    _, file = published()
    save_file(file, tmp_path / "flux.safetensors")
    with pytest.raises(CheckpointError, match="averaged weights"):
        load_models(tmp_path / "flux.safetensors", ema=True)
