"""Record what the real libraries compute, for the tests that run without them: python tests/parity/record_fixtures.py.

A network's fixture is a JSON (its config.json, the names and shapes of its parameters) and a safetensors file (inputs
and outputs). Parameters are not stored: `sd_tiny.draw` makes them from their names. The others are a whole pipeline's
pictures, schedulers' tables and timesteps, samplers' steps, and token ids.
"""

import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import diffusers
import numpy as np
import sd_tiny
import test_flow_parity as flow_parity
import test_samplers_parity as samplers_parity
import test_sd_pipeline as pipelines
import test_sd_tokenizer as tokenizers
import text_models as texts
import torch
import torch_models as tm
from diffusers import (
    AutoencoderKL,
    DiTTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from safetensors.numpy import save_file
from transformers import CLIPTokenizer, Qwen3ForCausalLM, T5Config, T5EncoderModel

from mmdjax.sd.tiny import write_vocabulary

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


def dit():
    model = tm.randomise(DiTTransformer2DModel(**tm.DIT))
    arrays = {"x": normal(0, 3, 12, 12, 4), "t": np.float32([0, 1, 999]), "labels": np.int32([0, 6, 7])}
    args = tm.nchw(arrays["x"]), torch.from_numpy(arrays["t"]), torch.from_numpy(arrays["labels"])
    return model, arrays | {"output": tm.nhwc(model(*args).sample)[..., :4]}


def pixart():
    """A prompt of one token, one of some, and one of all; a picture that is not square."""
    model = tm.randomise(PixArtTransformer2DModel(**tm.PIXART | tm.ALPHA_1024 | {"num_layers": 1}))
    arrays = {"x": normal(0, 3, 4, 12, 4), "t": np.float32([0, 1, 999]), "context": normal(1, 3, 7, 20)}
    arrays["mask"] = (np.arange(7) < np.array([[1], [4], [7]])).astype(np.int32)
    sizes = {"resolution": torch.tensor([[32.0, 96]] * 3), "aspect_ratio": torch.tensor([[1 / 3]] * 3)}
    x, t, context, mask = (torch.from_numpy(arrays[key]) for key in ("x", "t", "context", "mask"))
    out = model(x.moveaxis(-1, 1), context, t, sizes, encoder_attention_mask=mask).sample
    return model, arrays | {"output": tm.nhwc(out)[..., :4]}


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


def flux():
    model = tm.randomise(FluxTransformer2DModel(**tm.FLUX | {"num_layers": 1, "num_single_layers": 1}))
    arrays = {"x": normal(0, 2, 4, 6, 4), "t": np.float32([0.02, 0.9])}
    arrays |= {"context": normal(1, 2, 5, 24), "pooled": normal(2, 2, 12), "guidance": np.float32([0.2, 1.0])}
    return model, arrays | {"output": tm.flux(model, **arrays)}


def flux2():
    model = tm.randomise(Flux2Transformer2DModel(**tm.FLUX2 | {"num_layers": 1, "num_single_layers": 1}))
    arrays = {"x": normal(0, 2, 2, 3, 16), "t": np.float32([0.02, 0.9]), "context": normal(1, 2, 5, 24)}
    return model, arrays | {"output": tm.flux2(model, **arrays)}


def sd3(layers, n, height, width):
    """Of several blocks the first has dual attention; the last one leaves the context behind."""
    config = tm.SD3["medium35"] | {"num_layers": layers, "dual_attention_layers": (0,)}
    model = tm.randomise(SD3Transformer2DModel(**config))
    table = model.pos_embed.pos_embed
    table.copy_(torch.from_numpy(sd_tiny.draw("pos_embed.pos_embed", tuple(table.shape))))
    arrays = {"x": normal(0, n, height, width, 16), "t": np.array([1000.0, 0.5], np.float32)[:n]}
    arrays |= {"context": normal(1, n, 5, 24), "pooled": normal(2, n, 20)}
    x, t, context, pooled = tm.nchw(arrays["x"]), *(torch.from_numpy(arrays[key]) for key in ("t", "context", "pooled"))
    output = model(x, timestep=t, encoder_hidden_states=context, pooled_projections=pooled).sample
    return model, arrays | {"output": tm.nhwc(output)}


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


def masked_ids():
    ids = np.random.RandomState(0).randint(3, 100, (2, 12))
    return torch.from_numpy(ids), torch.from_numpy(np.arange(12) < np.array([[3], [12]]))


def t5():
    model = tm.randomise(T5EncoderModel(T5Config(**texts.T5_V11 | {"vocab_size": 100, "num_layers": 2})))
    ids, mask = masked_ids()
    out = model(ids, mask.long(), output_hidden_states=True)
    arrays = {"ids": ids.int(), "mask": mask, "last": out.last_hidden_state, "hidden": out.hidden_states[1]}
    return model, {key: x.numpy() for key, x in arrays.items()}


def qwen3():
    small = {"vocab_size": 100, "num_hidden_layers": 2, "out_layers": [1, 2], "tie_word_embeddings": True}
    model = texts.qwen3(Qwen3ForCausalLM, texts.QWEN3 | small)
    ids, mask = masked_ids()
    states = model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    arrays = {"ids": ids.int(), "mask": mask, "hidden1": states[1], "hidden2": states[2]}
    return model, {key: x.numpy() for key, x in arrays.items()}


def pipeline():
    """Ten steps with classifier-free guidance and a negative prompt: the configs of all parts, latents and pictures."""
    with tempfile.TemporaryDirectory() as folder:
        theirs, path, *_ = pipelines.build("sd1", Path(folder))
        parts = ("unet/config", "vae/config", "text_encoder/config", "scheduler/scheduler_config")
        configs = {part.split("/")[0]: json.loads((path / f"{part}.json").read_text()) for part in parts}
    latents = normal(0, 2, 8, 8, 4)
    said = {"prompts": pipelines.PROMPTS, "negative": pipelines.NEGATIVE, "scale": pipelines.SCALE}
    images = theirs(
        pipelines.PROMPTS, negative_prompt=[pipelines.NEGATIVE] * 2, latents=tm.nchw(latents), height=16, width=16,
        num_inference_steps=pipelines.STEPS, guidance_scale=pipelines.SCALE, eta=0.0, output_type="np",
    ).images  # fmt: skip
    write("pipeline", said | {"steps": pipelines.STEPS, "configs": configs}, {"latents": latents, "images": images})


def schedulers():
    """Tables by their settings; ten timesteps by class and spacing."""
    made = {f"table.{name}": diffusers.DDIMScheduler(**settings) for name, settings in pipelines.TABLES.items()}
    with tm.exact_sqrt():
        made["table.zero"] = diffusers.DDIMScheduler(**pipelines.TABLES["sd"], rescale_betas_zero_snr=True)
    for kind in ("DDIM", "DDPM", "EulerDiscrete", "DPMSolverMultistep"):
        for spacing in ("leading", "trailing", "linspace"):
            settings = pipelines.TABLES["sd"] | {"timestep_spacing": spacing, "steps_offset": 1}
            made[f"steps.{kind}.{spacing}"] = getattr(diffusers, f"{kind}Scheduler")(**settings)
            made[f"steps.{kind}.{spacing}"].set_timesteps(10)
    configs = {
        name: dict(scheduler.config) | {"_class_name": type(scheduler).__name__} for name, scheduler in made.items()
    }
    arrays = {key: (s.alphas_cumprod if key[0] == "t" else s.timesteps).numpy() for key, s in made.items()}
    write("schedulers", {"configs": configs}, arrays)


def flow():
    """The ten levels of flow-matching schedulers, by config, grid and the picture's length."""
    arrays, said = {}, {}
    for name, (config, grid) in (flow_parity.PUBLISHED | flow_parity.OTHERS).items():
        scheduler = flow_parity.theirs(config, grid, 10, 1024)
        said[name] = {"config": dict(scheduler.config) | {"_class_name": flow_parity.CLASS}, "grid": grid}
        arrays[name] = scheduler.sigmas.numpy()
    write("flow", {"length": 1024, "cases": said}, arrays)


def samplers():
    """Ten steps from one start with one noise, and the times that were visited."""
    table, noise = samplers_parity.TABLE, normal(0, 10, *samplers_parity.start().shape)
    arrays = {"start": samplers_parity.start(), "noise": noise}

    def record(name, scheduler, noise=None):
        x, times = samplers_parity.theirs(scheduler, 10, noise)
        arrays.update({f"{name}.x": x, f"{name}.times": times, "alphas_cumprod": scheduler.alphas_cumprod.numpy()})

    for eta in (0, 1):
        scheduler = diffusers.DDIMScheduler(**table, clip_sample=False, steps_offset=1)
        step = scheduler.step
        scheduler.step = lambda *args, step=step, eta=eta, **kwargs: step(*args, eta=float(eta), **kwargs)
        record(f"ddim_{eta}", scheduler, noise if eta else None)
    for variance in ("small", "large"):
        scheduler = diffusers.DDPMScheduler(**table, clip_sample=False, variance_type=f"fixed_{variance}")
        drawn = map(torch.tensor, noise)
        with mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, drawn=drawn, **__: next(drawn)):
            record(f"ddpm_{variance}", scheduler)
    record("euler", diffusers.EulerDiscreteScheduler(**table, timestep_spacing="leading", steps_offset=1))
    record("dpmpp_2m", diffusers.DPMSolverMultistepScheduler(**table, final_sigmas_type="zero"))
    write("samplers", {}, arrays)


def token_ids():
    """Ids of awkward prompts in the toy vocabulary, padded both ways."""
    found = {"length": 20, "prompts": tokenizers.AWKWARD, "ids": {}}
    for pad in tokenizers.PADS.values():
        with tempfile.TemporaryDirectory() as folder:
            write_vocabulary(folder, length=20, pad=pad)
            theirs = CLIPTokenizer.from_pretrained(folder)
            found["ids"][pad] = theirs(
                tokenizers.AWKWARD, padding="max_length", max_length=20, truncation=True
            ).input_ids
    write("tokenizer", found)


def write(name, said, arrays=None):
    """A fixture's JSON and, with arrays, its safetensors file."""
    text = json.dumps({"versions": VERSIONS} | said, separators=(",", ":"))
    (FOLDER / f"sd_{name}.json").write_text(text + "\n")
    if arrays is not None:
        save_file({key: np.ascontiguousarray(x) for key, x in arrays.items()}, FOLDER / f"sd_{name}.safetensors")


RECORDED = {
    "unet_sd1": lambda: unet(tm.SD1_UNET),
    "unet_sd2": lambda: unet(tm.SD2_UNET),
    "unet_sdxl": lambda: unet(tm.SDXL_UNET),
    "unet_ldm": lambda: unet(tm.LDM_UNET, UNet2DModel),
    "dit": dit,
    "pixart": pixart,
    "vae": vae,
    "vqvae": vqvae,
    "flux": flux,
    "flux2": flux2,
    "clip_l": lambda: text(tm.CLIP_L),
    "clip_h": lambda: text(tm.CLIP_H),
    "clip_g": lambda: text(tm.CLIP_H, projection=True),
    "t5": t5,
    "qwen3": qwen3,
    "sd3": lambda: sd3(2, 2, 6, 10),
    "sd3_one_block": lambda: sd3(1, 1, 4, 6),
}


@torch.no_grad()
def main():
    FOLDER.mkdir(exist_ok=True)
    for name, record in RECORDED.items():
        model, arrays = record()
        if hasattr(model.config, "to_dict"):  # of transformers
            config = model.config.to_dict() | {"architectures": [type(model).__name__]}
        else:
            config = dict(model.config) | {"_class_name": type(model).__name__}
        buffers = dict(model.named_buffers())
        saved = dict(model.named_parameters()) | {key: buffers[key] for key in model.state_dict() if key in buffers}
        shapes = {key: list(value.shape) for key, value in saved.items()}
        write(name, {"config": config, "shapes": shapes}, arrays)
    for record in (pipeline, schedulers, flow, samplers, token_ids):
        record()


if __name__ == "__main__":
    main()
