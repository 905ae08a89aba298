"""Record what the real libraries compute, for the tests that run without them: python tests/parity/record_fixtures.py.

A fixture is a JSON (config.json of a tiny network, the names and shapes of its parameters) and a safetensors file
(inputs and outputs). Parameters are not stored: `sd_tiny.draw` makes them from their names.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import torch_models as tm
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from safetensors.numpy import save_file

FOLDER = Path(__file__).parent.parent / "fixtures"
VERSIONS = {name: sys.modules[name].__version__ for name in ("torch", "diffusers", "transformers")}


def normal(seed, *shape):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def unet(config, cls=UNet2DConditionModel):
    model = tm.randomise(cls(**config))
    arrays = {"x": normal(0, 3, 8, 8, model.config.in_channels), "t": np.array([0.0, 1.0, 999.0], np.float32)}
    args, added = [tm.nchw(arrays["x"]), torch.from_numpy(arrays["t"])], {}
    if cls is UNet2DConditionModel:
        arrays["context"] = normal(1, 3, 5, config["cross_attention_dim"])
        args.append(torch.from_numpy(arrays["context"]))
    if "addition_embed_type" in config:
        arrays |= {"pooled": normal(2, 3, 16), "time_ids": np.float32([[512, 640, 0, 8, 1024, 1024]] * 3)}
        pooled, time_ids = torch.from_numpy(arrays["pooled"]), torch.from_numpy(arrays["time_ids"])
        added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}
    return model, arrays | {"output": tm.nhwc(model(*args, **added).sample)}


def vae():
    model = tm.randomise(AutoencoderKL(**tm.KL))
    images, z = normal(0, 1, 16, 24, 3), normal(1, 1, 8, 12, 4)
    posterior = model.encode(tm.nchw(images)).latent_dist
    outputs = {"mean": posterior.mean, "logvar": posterior.logvar, "decoded": model.decode(tm.nchw(z)).sample}
    return model, {"images": images, "z": z} | {key: tm.nhwc(value) for key, value in outputs.items()}


def vqvae():
    model = tm.randomise(VQModel(**tm.VQ))
    images, z = normal(0, 1, 16, 24, 3), normal(1, 1, 8, 12, 3)
    outputs = {"latents": model.encode(tm.nchw(images)).latents, "decoded": model.decode(tm.nchw(z)).sample}
    outputs["codes"] = model.quantize(tm.nchw(z))[0]
    return model, {"images": images, "z": z} | {key: tm.nhwc(value) for key, value in outputs.items()}


def text(config, projection=False):
    model = tm.text_encoder(config, projection)
    ids = np.random.RandomState(0).randint(1, 97, (2, 12))
    for row, length in zip(ids, (3, 11), strict=True):
        row[length:] = 99
    out = model(torch.from_numpy(ids), output_hidden_states=True)
    arrays = {"ids": ids.astype(np.int32), "last": out.last_hidden_state.numpy()}
    arrays |= {f"hidden{i}": hidden.numpy() for i, hidden in enumerate(out.hidden_states)}
    return model, arrays | (
        {"projected": out.text_embeds.numpy()} if projection else {"pooled": out.pooler_output.numpy()}
    )


RECORDED = {
    "unet_sd1": lambda: unet(tm.SD1_UNET),
    "unet_sd2": lambda: unet(tm.SD2_UNET),
    "unet_sdxl": lambda: unet(tm.SDXL_UNET),
    "unet_ldm": lambda: unet(tm.LDM_UNET, UNet2DModel),
    "vae": vae,
    "vqvae": vqvae,
    "clip_l": lambda: text(tm.CLIP_L),
    "clip_h": lambda: text(tm.CLIP_H),
    "clip_g": lambda: text(tm.CLIP_H, projection=True),
}


@torch.no_grad()
def main():
    FOLDER.mkdir(exist_ok=True)
    for name, record in RECORDED.items():
        model, arrays = record()
        if name.startswith("clip"):
            config = model.config.to_dict() | {"architectures": [type(model).__name__]}
        else:
            config = dict(model.config) | {"_class_name": type(model).__name__}
        shapes = {key: list(value.shape) for key, value in model.named_parameters()}
        fixture = {"versions": VERSIONS, "config": config, "shapes": shapes}
        (FOLDER / f"sd_{name}.json").write_text(json.dumps(fixture, separators=(",", ":")) + "\n")
        save_file(
            {key: np.ascontiguousarray(value) for key, value in arrays.items()}, FOLDER / f"sd_{name}.safetensors"
        )


if __name__ == "__main__":
    main()
