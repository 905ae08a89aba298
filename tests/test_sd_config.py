"""The published models' own config.json, key for key: all are understood, nothing in them is unknown."""

import fnmatch
import subprocess
import sys
import types

import pytest

from mmdjax.sd.files import places as files
from mmdjax.sd.models import module_from_config

SDXL_UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.19.0.dev0",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 2048,
    "cross_attention_norm": None,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}
CELEBA_UNET = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": 32,
    "block_out_channels": [224, 448, 672, 896],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 64,
    "time_embedding_type": "positional",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
CELEBA_VQ = {
    "_class_name": "VQModel",
    "_diffusers_version": "0.1.2",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "in_channels": 3,
    "latent_channels": 3,
    "layers_per_block": 2,
    "num_vq_embeddings": 8192,
    "out_channels": 3,
    "sample_size": 256,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}
SDXL_VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.20.0.dev0",
    "_name_or_path": "../sdxl-vae/",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SD1_TEXT = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}


def test_sdxl_unet():
    cfg = module_from_config(SDXL_UNET).config
    assert cfg.heads == (5, 10, 20)
    assert cfg.depths == (1, 2, 10)
    assert not cfg.upcast_attention


def test_unconditional_faces():
    assert module_from_config(CELEBA_UNET).config.heads == (7, 14, 21, 28)
    cfg = module_from_config(CELEBA_VQ).config
    assert cfg.scaling_factor == 1.0  # the file is older than the key, and 1 is what the model was trained with
    assert cfg.code_size == 3
    assert cfg.downscale == 4


def test_sdxl_vae():
    cfg = module_from_config(SDXL_VAE).config
    assert cfg.scaling_factor == 0.13025
    assert cfg.force_upcast
    assert cfg.downscale == 8


def test_text_encoder_without_projection_in_spite_of_its_width():
    cfg = module_from_config(SD1_TEXT).config
    assert cfg.projection_dim == 768
    assert not cfg.with_projection
    assert cfg.eos_token_id == 2
    assert module_from_config(SD1_TEXT | {"architectures": ["CLIPTextModelWithProjection"]}).config.with_projection


PLAIN = (
    "unet/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
)
HALF = (
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/model.fp16-00001-of-00002.safetensors",
    "text_encoder/model-00001-of-00002.fp16.safetensors",
)
OTHER = (
    "v1-5-pruned.ckpt",
    "v1-5-pruned.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "vae/a.onnx",
)
OLD = ("unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin")
ALWAYS = ("model_index.json", "unet/config.json", "tokenizer/merges.txt", "unet/model.safetensors.index.json")


@pytest.mark.parametrize(("variant", "there", "wanted"), [(None, PLAIN, PLAIN), ("fp16", HALF, HALF), (None, (), OLD)])
def test_download_asks_for_one_variant(monkeypatch, tmp_path, variant, there, wanted):
    """And for pickles only where there is nothing else."""

    def snapshot_download(repo, revision, allow_patterns):
        assert (repo, revision) == ("someone/model", "main")
        for name in (*ALWAYS, *OTHER, *OLD, *(PLAIN + HALF if there else ())):
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / name).parent.mkdir(exist_ok=True)
                (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert files.download("someone/model", variant=variant, revision="main") == tmp_path
    taken = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert taken == {*ALWAYS, *wanted}


def test_import_needs_no_torch_and_starts_no_backend():
    code = (
        "import sys, jax, mmdjax.sd\n"
        "assert not {'torch', 'diffusers', 'transformers', 'huggingface_hub', 'tokenizers'} & sys.modules.keys()\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'a JAX array was made at import'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
