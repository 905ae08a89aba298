"""Whole pipelines of the diffusion transformers against diffusers': prompts to pictures, eight steps."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity needs the extra mmdjax[parity]")
diffusers = pytest.importorskip("diffusers", reason="parity needs the extra mmdjax[parity]")
transformers = pytest.importorskip("transformers", reason="parity needs the extra mmdjax[parity]")
pytest.importorskip("sentencepiece", reason="parity needs the extra mmdjax[parity]")

import text_models as texts  # noqa: E402
import torch_models as tm  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from test_sd_pipeline import WORDS, close, tokenizer  # noqa: E402

from mmdjax import DDIM, guided_sample  # noqa: E402
from mmdjax.sd import load  # noqa: E402

PROMPTS, NEGATIVE, SCALE, STEPS = ["a cat", "a dog, DOG!"], "ugly dog", 2.0, 8
SIZE = {"height": 16, "width": 24}  # pixels: not square, and not the training size
KL = tm.KL | {"scaling_factor": 0.7}
FLOW_KL = KL | {"latent_channels": 16, "shift_factor": 0.1, "use_quant_conv": False, "use_post_quant_conv": False}
CLASSES = ("white shark", "hen", "tench", "cock, rooster", "ostrich", "crow", "kite")
DDIM_CONFIG = {"beta_schedule": "linear", "clip_sample": False}


def flow(**how):
    return diffusers.FlowMatchEulerDiscreteScheduler(**how)


def t5(width):
    return texts.t5(transformers.T5EncoderModel, texts.T5_V11 | {"d_model": width})


def t5_tokenizer(folder):
    texts.write_unigram(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def dit(path):
    return diffusers.DiTPipeline(
        transformer=tm.randomise(diffusers.DiTTransformer2DModel(**tm.DIT | {"num_embeds_ada_norm": 1000})),
        vae=tm.randomise(diffusers.AutoencoderKL(**KL)),
        scheduler=diffusers.DDIMScheduler(**DDIM_CONFIG),
    )


def pixart(path, cls):
    return cls(
        tokenizer=t5_tokenizer(path / "t5"),
        text_encoder=t5(20),
        transformer=tm.randomise(diffusers.PixArtTransformer2DModel(**tm.PIXART)),
        vae=tm.randomise(diffusers.AutoencoderKL(**KL)),
        scheduler=diffusers.DDIMScheduler(**DDIM_CONFIG),
    )


def sd3(path, with_t5=True):
    text = tm.CLIP_L | WORDS | {"hidden_size": 8, "intermediate_size": 16, "projection_dim": 8}
    return diffusers.StableDiffusion3Pipeline(
        transformer=tm.randomise(diffusers.SD3Transformer2DModel(**tm.SD3["medium35"] | {"in_channels": 16})),
        vae=tm.randomise(diffusers.AutoencoderKL(**FLOW_KL)),
        scheduler=flow(shift=3.0),
        text_encoder=tm.text_encoder(text, projection=True),
        text_encoder_2=tm.text_encoder(text | {"hidden_size": 12, "projection_dim": 12}, projection=True),
        text_encoder_3=t5(24) if with_t5 else None,
        tokenizer=tokenizer(path / "t1"),
        tokenizer_2=tokenizer(path / "t2", "!"),
        tokenizer_3=t5_tokenizer(path / "t3") if with_t5 else None,
    )


def flux(path, dev):
    config = tm.FLUX | {"in_channels": 64, "guidance_embeds": dev}
    return diffusers.FluxPipeline(
        transformer=tm.randomise(diffusers.FluxTransformer2DModel(**config)),
        vae=tm.randomise(diffusers.AutoencoderKL(**FLOW_KL)),
        scheduler=flow(shift=3.0, use_dynamic_shifting=True) if dev else flow(),
        text_encoder=tm.text_encoder(tm.CLIP_L | WORDS | {"hidden_size": 12, "num_attention_heads": 2}),
        text_encoder_2=t5(24),
        tokenizer=tokenizer(path / "t1"),
        tokenizer_2=t5_tokenizer(path / "t2"),
    )


def klein(path):
    texts.write_qwen(path / "qwen")
    config = {key: value for key, value in texts.QWEN3.items() if key != "out_layers"} | {"num_hidden_layers": 28}
    vae = tm.randomise_statistics(tm.randomise(diffusers.AutoencoderKLFlux2(**tm.KL_FLUX2)))
    return diffusers.Flux2KleinPipeline(
        transformer=tm.randomise(diffusers.Flux2Transformer2DModel(**tm.FLUX2 | {"joint_attention_dim": 96})),
        vae=vae,
        scheduler=flow(shift=3.0, use_dynamic_shifting=True),
        text_encoder=texts.qwen3(transformers.Qwen3ForCausalLM, config),
        tokenizer=transformers.AutoTokenizer.from_pretrained(path / "qwen"),
    )


BUILDERS = {
    "dit": dit,
    "pixart-alpha": functools.partial(pixart, cls=diffusers.PixArtAlphaPipeline),
    "pixart-sigma": functools.partial(pixart, cls=diffusers.PixArtSigmaPipeline),
    "sd3": sd3,
    "sd3-without-t5": functools.partial(sd3, with_t5=False),
    "flux-dev": functools.partial(flux, dev=True),
    "flux-schnell": functools.partial(flux, dev=False),
    "klein": klein,
}


@pytest.fixture(autouse=True)
def precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """By family: the pipeline of diffusers, its folder, ours and its parameters."""

    @functools.cache
    def build(family):
        path = tmp_path_factory.mktemp(family)
        made = BUILDERS[family](path)
        made.set_progress_bar_config(disable=True)
        made.save_pretrained(path / "model")
        if family == "dit":  # the published file names the classes; save_pretrained does not write them
            index = path / "model" / "model_index.json"
            names = {str(i): name for i, name in enumerate(CLASSES)}
            index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": names}))
        return made, path / "model", *load(path / "model")

    return build


def theirs_made(family, made, latents):
    """Pictures of diffusers, from these latents."""
    how = {"num_inference_steps": STEPS, "output_type": "np", "guidance_scale": SCALE}
    if family == "dit":  # it draws its own latents
        return made([3, 0], generator=torch.Generator().manual_seed(0), **how).images
    how |= {"latents": tm.nchw(latents), **SIZE}
    if "flux" in family:
        n, height, width, channels = latents.shape
        how["latents"] = made._pack_latents(how["latents"], n, channels, height, width)
        return made(PROMPTS, max_sequence_length=512, **how).images
    if family == "klein":
        return made(prompt=PROMPTS, **how).images
    if "pixart" in family:
        how["use_resolution_binning"] = False
    return made(PROMPTS, negative_prompt=[NEGATIVE] * 2, **how).images


@pytest.mark.parametrize("family", BUILDERS)
def test_pictures(built, family):
    made, _, pipeline, params = built(family)
    prompts, size = (["cock", "white shark"], {}) if family == "dit" else (PROMPTS, SIZE)
    negative = "" if family in ("dit", "klein") else NEGATIVE
    shape = pipeline.model(**size).shape
    if family == "dit":
        x = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
        latents = tm.nhwc(x)
    else:
        latents = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    expected = theirs_made(family, made, latents)

    how = dict(size)
    if "flux" not in family:
        null = pipeline.encode_prompts(params, negative, negative=True)
        how |= {"guidance_scale": SCALE, "null_cond": null}
    elif family == "flux-dev":
        how["embedded_guidance"] = SCALE
    cond = pipeline.encode_prompts(params, prompts)
    call = {"num_samples": 2, "cond": cond, "sampler": DDIM(eta=0.0), "times": pipeline.times(STEPS, **size)}
    call["x_init"] = latents
    samples = guided_sample(params, jax.random.key(0), None, model=pipeline.model(**how), **call)
    close(pipeline.decode(params, samples.x), expected)


@pytest.mark.parametrize("family", BUILDERS)
def test_export_is_read_by_diffusers(built, tmp_path, family):
    theirs, _, pipeline, params = built(family)
    dataclasses.replace(pipeline, index={}).export(tmp_path, params)  # its own model_index.json
    absent = {} if family != "sd3-without-t5" else {"text_encoder_3": None, "tokenizer_3": None}
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path, **absent)
    assert type(again) is type(theirs) or family == "pixart-alpha"  # which only model_index.json tells from PixArt-Σ
    for name in pipeline.modules:
        one, other = (getattr(whole, name).state_dict() for whole in (theirs, again))
        written = load_file(next((tmp_path / name).glob("*.safetensors")))  # without layers that no prompt needs
        assert all(torch.equal(one[key], other[key]) for key in other if key in written)


@pytest.mark.parametrize("family", ["sd3", "pixart-sigma"])
def test_saved_pipeline_loads_equal(built, tmp_path, family):
    _, _, pipeline, params = built(family)
    pipeline.save(tmp_path / "saved", params)
    again, same = load(tmp_path / "saved")
    assert (again.scheduler.raw, again.index) == (pipeline.scheduler.raw, pipeline.index)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    conds = pipeline.encode_prompts(params, PROMPTS), again.encode_prompts(same, PROMPTS)
    jax.tree.map(np.testing.assert_array_equal, *conds)
