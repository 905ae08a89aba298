"""Stable Diffusion 3's transformer and single files, without torch."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sd_tiny
from safetensors.numpy import load_file, save_file

from mmdjax.sd.files import single_sd3
from mmdjax.sd.files.places import open_file
from mmdjax.sd.models import load_models, module_from_config
from mmdjax.sd.networks.transformers.sd3 import Patches, SD3Block, SD3Config

FIXTURES = Path(__file__).parent / "fixtures"
CONFIG = json.loads((FIXTURES / "sd_sd3.json").read_text())["config"]


def condition(n=2, **change):
    return {"context": np.zeros((n, 5, 24), np.float32), "pooled": np.zeros((n, 20), np.float32)} | change


def recorded(name):
    arrays = {key: jnp.asarray(value) for key, value in load_file(FIXTURES / f"sd_{name}.safetensors").items()}
    cond = {key: arrays[key] for key in ("context", "pooled")}
    return json.loads((FIXTURES / f"sd_{name}.json").read_text())["config"], arrays, cond


@pytest.mark.parametrize("name", ["sd3_one_block", pytest.param("sd3", marks=pytest.mark.slow)])
def test_against_what_diffusers_computed(name):
    config, a, cond = recorded(name)
    component = sd_tiny.component(config)
    compiled = jax.jit(component.module.apply, compiler_options={"xla_backend_optimization_level": 0})
    with jax.default_matmul_precision("highest"):
        y = compiled({"params": component.params}, a["x"], a["t"], cond)
    assert np.abs(y - a["output"]).max() < 1e-5 * np.abs(a["output"]).max()  # float32 rounding is 3e-6


def test_positions_are_the_middle_of_the_table():
    """With W = 0 a token is its place in the table: rows and columns around the middle."""
    module = module_from_config(CONFIG)
    table = np.arange(12 * 12 * 64, dtype=np.float32).reshape(1, 144, 64)
    params = {"pos_embed": table, "proj": {"kernel": np.zeros((2, 2, 16, 64)), "bias": np.zeros(64)}}
    tokens = Patches(config=module.config).apply({"params": params}, np.zeros((1, 4, 10, 16)))
    expected = table.reshape(12, 12, 64)[5:7, 3:8].reshape(10, 64)
    np.testing.assert_array_equal(tokens[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("dual", [True, False])
def test_a_new_block_is_the_identity(dual):
    """adaLN-Zero: the gates start at zero."""
    block = SD3Block(config=module_from_config(CONFIG).config, dual=dual)
    x, context, c = (jax.random.normal(jax.random.key(i), (2, length, 64)) for i, length in enumerate((6, 4, 1)))
    (y, z), _ = block.init_with_output(jax.random.key(0), x, context, c[:, 0])
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(z, context)


@pytest.mark.slow
def test_remat_changes_no_gradient():
    config, a, cond = recorded("sd3")

    def gradient(remat):
        component = sd_tiny.component(config, remat=remat)

        def loss(params):
            return (component.module.apply({"params": params}, a["x"], a["t"], cond) ** 2).sum()

        return jax.jit(jax.grad(loss))(component.params)

    plain, again = gradient(False), gradient(True)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), plain, again)  # order of sums


MEDIUM35 = {  # the published model's own files, key for key
    "_class_name": "SD3Transformer2DModel",
    "_diffusers_version": "0.31.0.dev0",
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "dual_attention_layers": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "sample_size": 128,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.31.0.dev0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}


def test_published_configs_are_understood():
    config, vae = (module_from_config(raw).config for raw in (MEDIUM35, VAE))
    assert config.width == 1536
    assert config.dual_attention_layers == tuple(range(13))
    assert (vae.downscale, vae.scaling_factor, vae.shift_factor, vae.use_quant_conv) == (8, 1.5305, 0.0609, False)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'; implemented: None, 'rms_norm'"),
        ({"caption_projection_dim": 32}, "caption_projection_dim is 32; it must be"),
        ({"pos_embed_max_size": None}, "pos_embed_max_size is None"),
        ({"pos_embed_max_size": 0}, "pos_embed_max_size is 0"),
        ({"_class_name": "SD3ControlNetModel"}, "'SD3ControlNetModel'"),
        ({"force_zeros_for_pooled_projection": True}, r"force_zeros_for_pooled_projection = True \(unknown\)"),
    ],
)
def test_configs_that_are_refused(change, text):
    with pytest.raises(ValueError, match=text):
        SD3Config.from_json(CONFIG | change)


@pytest.mark.parametrize(
    ("size", "cond", "text"),
    [
        ((4, 5), condition(), "the latent is 4 × 5; give multiples of 2 up to 24"),
        ((4, 26), condition(), "the latent is 4 × 26"),
        ((4, 4), condition(context=np.zeros((2, 5, 8))), r"cond\['context'\] has width 8; this model takes 24"),
        ((4, 4), condition(skip_layers=[1]), "skip-layer guidance is not implemented"),
        (
            (4, 4),
            condition(time_ids=np.zeros((2, 6))),
            r"cond is \['context', 'pooled', 'time_ids'\]; this model takes",
        ),
        ((4, 4), np.zeros((2, 5, 24)), "cond is ndarray; this model takes"),
    ],
)
def test_calls_that_are_refused(size, cond, text):
    module = module_from_config(CONFIG)
    with pytest.raises(ValueError, match=text):
        module.check(jnp.zeros((2, *size, 16)), cond)


# Files


def published():
    """A tiny single file whose numbers say where they are: transformer, CLIP-L and T5."""
    width, keys = 128, {}

    def put(key, *shape):
        keys[key] = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + len(keys) / 1024

    def linear(key, features, *rest):
        put(f"{key}.weight", features, *rest)
        put(f"{key}.bias", features)

    start = "model.diffusion_model."
    put(f"{start}pos_embed", 1, 36, width)
    linear(f"{start}x_embedder.proj", width, 16, 2, 2)
    linear(f"{start}t_embedder.mlp.0", width, 256)
    linear(f"{start}t_embedder.mlp.2", width, width)
    linear(f"{start}y_embedder.mlp.0", width, 20)
    linear(f"{start}y_embedder.mlp.2", width, width)
    linear(f"{start}context_embedder", width, 24)
    for i, side in ((0, "x_block"), (0, "context_block"), (1, "x_block"), (1, "context_block")):
        block, last = f"{start}joint_blocks.{i}.{side}", (i, side) == (1, "context_block")
        linear(f"{block}.attn.qkv", 3 * width, width)
        linear(f"{block}.adaLN_modulation.1", (2 if last else 6) * width, width)
        if not last:
            linear(f"{block}.attn.proj", width, width)
            linear(f"{block}.mlp.fc1", 4 * width, width)
            linear(f"{block}.mlp.fc2", width, 4 * width)
    linear(f"{start}final_layer.adaLN_modulation.1", 2 * width, width)
    linear(f"{start}final_layer.linear", 64, width)
    return keys


def test_single_file(tmp_path):
    file = published()
    save_file(file, tmp_path / "x.safetensors")
    found = load_models(tmp_path / "x.safetensors")
    assert list(found) == ["transformer"]
    config = found["transformer"].module.config
    assert (config.num_layers, config.num_attention_heads, config.attention_head_dim) == (2, 2, 64)
    assert (config.pos_embed_max_size, config.qk_norm, config.dual_attention_layers) == (6, None, ())
    params, start = found["transformer"].params, "model.diffusion_model."
    np.testing.assert_array_equal(params["pos_embed"]["pos_embed"], file[f"{start}pos_embed"])
    block, theirs = params["transformer_blocks.1"], f"{start}joint_blocks.1"
    np.testing.assert_array_equal(block["attn"]["to_k"]["bias"], file[f"{theirs}.x_block.attn.qkv.bias"][128:256])
    np.testing.assert_array_equal(
        block["attn"]["add_v_proj"]["kernel"], file[f"{theirs}.context_block.attn.qkv.weight"][256:].T
    )
    # shift, scale in the file: scale, shift here; only where there is no gate
    swapped = np.roll(file[f"{theirs}.context_block.adaLN_modulation.1.bias"], 128)
    np.testing.assert_array_equal(block["norm1_context"]["linear"]["bias"], swapped)
    np.testing.assert_array_equal(block["norm1.linear"]["bias"], file[f"{theirs}.x_block.adaLN_modulation.1.bias"])
    last = np.roll(file[f"{start}final_layer.adaLN_modulation.1.weight"], 128, axis=0)
    np.testing.assert_array_equal(params["norm_out"]["linear"]["kernel"], last.T)


def test_single_file_errors(tmp_path):
    file = published()
    save_file(file, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors has no moving average of its weights; use ema=False"):
        load_models(tmp_path / "x.safetensors", ema=True)
    save_file(file | {"surprise": np.zeros(1, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="1 keys unused\n  unused: surprise"):
        load_models(tmp_path / "x.safetensors")
    inside = "model.diffusion_model.joint_blocks.0.x_block.attn.extra"
    save_file(file | {inside: np.zeros(1, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"unused: joint_blocks\.0\.x_block\.attn\.extra"):
        load_models(tmp_path / "x.safetensors")


def test_projection_of_the_first_encoder_is_the_identity(tmp_path):
    """SD 3 takes CLIP-L's pooled state as it is; a projection in the file is CLIP's own."""
    table = "text_model.embeddings.token_embedding.weight"
    tensors = {table: np.ones((9, 4), np.float16), "text_projection.weight": np.ones((4, 4), np.float16)}
    save_file(tensors, tmp_path / "x.safetensors")
    file = open_file(tmp_path / "x.safetensors")
    first, second = (single_sd3.text_tensors(file, name) for name in ("text_encoder", "text_encoder_2"))
    np.testing.assert_array_equal(first["text_projection.weight"], np.eye(4, dtype=np.float16))
    np.testing.assert_array_equal(second["text_projection.weight"], np.ones((4, 4)))
