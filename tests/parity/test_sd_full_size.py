"""The published models at full size: every parameter's name and shape, without memory for any."""

import pytest

torch = pytest.importorskip("torch", reason="parity needs the extra mmdjax[parity]")
diffusers = pytest.importorskip("diffusers", reason="parity needs the extra mmdjax[parity]")
transformers = pytest.importorskip("transformers", reason="parity needs the extra mmdjax[parity]")

from mmdjax.sd.files import convert  # noqa: E402
from mmdjax.sd.models import module_from_config  # noqa: E402

SD1 = {
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "sample_size": 64,
}
SD2 = SD1 | {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
    "upcast_attention": True,
    "sample_size": 96,
}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}
KL = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
VQ_F4 = {
    "block_out_channels": (128, 256, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 2,
    "num_vq_embeddings": 8192,
}
CELEBA = {"attention_head_dim": 32, "sample_size": 64}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
CLIP_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "hidden_act": "gelu",
}
CLIP_G = CLIP_H | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}

PIXART = {"caption_channels": 4096, "sample_size": 128}

MODELS = {  # with the number of parameters, in millions, that their authors give
    "sd1-unet": (diffusers.UNet2DConditionModel, SD1, 859.5),
    "sd2-unet": (diffusers.UNet2DConditionModel, SD2, 865.9),
    "sdxl-unet": (diffusers.UNet2DConditionModel, SDXL, 2567.5),
    "ldm-unet": (diffusers.UNet2DModel, CELEBA, 274.1),
    "dit": (diffusers.DiTTransformer2DModel, {"out_channels": 8}, 749.8),  # 675 and 27 more tables of labels and times
    "pixart-alpha": (diffusers.PixArtTransformer2DModel, PIXART, 611.3),
    "pixart-sigma": (diffusers.PixArtTransformer2DModel, PIXART | {"use_additional_conditions": False}, 610.9),
    "kl": (diffusers.AutoencoderKL, KL, 83.7),
    "vq-f4": (diffusers.VQModel, VQ_F4, 55.3),
    "clip-l": (transformers.CLIPTextModel, CLIP_L, 123.1),
    "clip-h": (transformers.CLIPTextModel, CLIP_H, 340.4),
    "clip-g": (transformers.CLIPTextModelWithProjection, CLIP_G, 694.7),
}


@pytest.mark.parametrize("name", MODELS)
def test_tree_of_full_size(name):
    cls, config, millions = MODELS[name]
    with torch.device("meta"):
        if name.startswith("clip"):
            theirs = cls(transformers.CLIPTextConfig(**config))
            raw = theirs.config.to_dict() | {"architectures": [cls.__name__]}
        else:
            theirs = cls(**config)
            raw = dict(theirs.config) | {"_class_name": cls.__name__}
    module = module_from_config(raw)
    tree = convert.abstract(module)
    leaves = convert.flat(tree)
    ours = {key: convert.torch_shape(path[-1], leaves[path].shape) for key, path in convert.keys(tree).items()}
    expected = {key: tuple(value.shape) for key, value in theirs.named_parameters()}
    if name in ("clip-l", "clip-h"):
        expected = {f"text_model.{key}": shape for key, shape in expected.items()}
    assert ours == expected
    assert round(sum(leaf.size for leaf in leaves.values()) / 1e6, 1) == millions
