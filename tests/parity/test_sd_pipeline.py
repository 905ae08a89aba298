"""Whole pipelines against diffusers': prompts to pictures, ten steps, from checkpoints that diffusers wrote."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity needs the extra mmdjax[parity]")
diffusers = pytest.importorskip("diffusers", reason="parity needs the extra mmdjax[parity]")
transformers = pytest.importorskip("transformers", reason="parity needs the extra mmdjax[parity]")

import torch_models as tm  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402
from test_sd_files import single_file  # noqa: E402

from mmdjax import DDIM, guided_sample  # noqa: E402
from mmdjax.sd import load, load_models  # noqa: E402
from mmdjax.sd.scheduler import GRIDS, Scheduler  # noqa: E402
from mmdjax.sd.tiny import write_vocabulary  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # NumPy 2 of torch's tensors
    pytest.mark.filterwarnings("ignore:[^a-z]*The configuration file:FutureWarning"),  # "offset should be 1"
    pytest.mark.filterwarnings("ignore:The configuration file:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LDMPipeline.*:FutureWarning"),  # deprecated
]
PROMPTS, NEGATIVE, SCALE, STEPS = ["a cat", "a dog, DOG!"], "ugly dog", 3.0, 10
SD1 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
SCHEDULERS = {
    "sd1": SD1 | {"set_alpha_to_one": False, "steps_offset": 1},
    "sd2": SD1 | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    "sdxl": SD1 | {"set_alpha_to_one": True, "steps_offset": 1},
    "ldm": SD1 | {"beta_start": 0.0015, "beta_end": 0.0195},
}
WORDS = {"vocab_size": 518, "bos_token_id": 516, "eos_token_id": 517}


@pytest.fixture(autouse=True)
def precision():
    with jax.default_matmul_precision("highest"):
        yield


def tokenizer(folder, pad="<|endoftext|>"):
    write_vocabulary(folder, length=12, pad=pad)
    return transformers.CLIPTokenizer.from_pretrained(folder)


def build(family, path):
    """A pipeline of diffusers with tiny random networks, its folder, and what we load from it."""
    tokenizers = [tokenizer(path / "t1", "!" if family == "sd2" else "<|endoftext|>"), tokenizer(path / "t2", "!")]
    scheduler = diffusers.DDIMScheduler(**SCHEDULERS[family])
    parts = {}
    if family == "ldm":
        parts = tm.FAMILIES["ldm"]()
        made = diffusers.LDMPipeline(**parts, scheduler=scheduler)
    else:
        text = {"sd1": tm.CLIP_L | WORDS | {"eos_token_id": 2}, "sd2": tm.CLIP_H | WORDS, "sdxl": tm.CLIP_L | WORDS}
        config = {"sd1": tm.SD1_UNET, "sd2": tm.SD2_UNET, "sdxl": tm.SDXL_UNET}[family]
        width = 160 if family == "sdxl" else 64
        parts |= {
            "unet": tm.randomise(diffusers.UNet2DConditionModel(**config | {"cross_attention_dim": width})),
            "vae": tm.randomise(diffusers.AutoencoderKL(**tm.KL | {"scaling_factor": 0.7})),
            "text_encoder": tm.text_encoder(text[family]),
            "tokenizer": tokenizers[0],
            "scheduler": scheduler,
        }
        if family == "sdxl":
            parts |= {"text_encoder_2": tm.text_encoder(tm.CLIP_G | WORDS, projection=True)}
            parts |= {"tokenizer_2": tokenizers[1]}
            made = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
        else:
            made = diffusers.StableDiffusionPipeline(
                **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            )
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(path / "model")
    return made, path / "model", *load(path / "model")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """By family: the pipeline of diffusers, its folder, ours and its parameters."""
    return functools.cache(lambda family: build(family, tmp_path_factory.mktemp(family)))


def close(ours, theirs):
    """Pictures in [−1, 1] and [0, 1] within 2/255 everywhere, and not because they are flat or saturated."""
    assert np.mean((theirs > 0.01) & (theirs < 0.99)) > 0.5
    assert theirs.std() > 0.1
    assert np.abs((np.asarray(ours) + 1) / 2 - theirs).max() < 2 / 255


@pytest.mark.parametrize(
    ("family", "negative"), [("sd1", NEGATIVE), ("sd2", NEGATIVE), ("sdxl", NEGATIVE), ("sdxl", None)]
)
def test_text_to_image(built, family, negative):
    theirs, _, pipeline, params = built(family)
    latents = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    expected = theirs(
        PROMPTS, negative_prompt=None if negative is None else [negative] * 2, latents=tm.nchw(latents),
        num_inference_steps=STEPS, guidance_scale=SCALE, eta=0.0, height=16, width=16, output_type="np",
    ).images  # fmt: skip

    cond = pipeline.encode_prompts(params, PROMPTS)
    null = pipeline.encode_prompts(params, negative or "", negative=True)
    model = pipeline.model(guidance_scale=SCALE, null_cond=null)
    assert model.shape == (8, 8, 4)
    samples = guided_sample(
        params, jax.random.key(0), None, model=model, num_samples=2, cond=cond, sampler=DDIM(eta=0.0),
        times=pipeline.times(STEPS), x_init=latents,
    )  # fmt: skip
    images = pipeline.decode(params, samples.x)
    close(images, expected)
    if family != "sd1":
        return
    # without classifier-free guidance the pictures are others: the test sees it
    plain = guided_sample(
        params, jax.random.key(0), None, model=pipeline.model(), num_samples=2, cond=cond, sampler=DDIM(eta=0.0),
        times=pipeline.times(STEPS), x_init=latents,
    )  # fmt: skip
    assert np.abs(np.asarray(images - pipeline.decode(params, plain.x))).max() > 8 / 255


def test_unconditional(built):
    theirs, _, pipeline, params = built("ldm")
    latents = torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    expected = theirs(
        batch_size=2, generator=torch.Generator().manual_seed(0), eta=0.0, num_inference_steps=STEPS, output_type="np"
    ).images
    samples = guided_sample(
        params, jax.random.key(0), None, model=pipeline.model(), num_samples=2, sampler=DDIM(eta=0.0),
        times=pipeline.times(STEPS), x_init=tm.nhwc(latents),
    )  # fmt: skip
    close(pipeline.decode(params, samples.x), expected)


@pytest.mark.parametrize("family", SCHEDULERS)
def test_export_is_read_by_diffusers(built, tmp_path, family):
    theirs, _, pipeline, params = built(family)
    dataclasses.replace(pipeline, index={}).export(tmp_path, params)  # its own model_index.json
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is type(theirs)
    for name in pipeline.modules:
        one, other = (getattr(whole, name).state_dict() for whole in (theirs, again))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    for name in pipeline.tokenizers:
        tokenizers = [getattr(whole, name.replace("text_encoder", "tokenizer")) for whole in (theirs, again)]
        ids = [one(PROMPTS, padding="max_length", max_length=12).input_ids for one in tokenizers]
        assert ids[0] == ids[1]


@pytest.mark.parametrize("family", SCHEDULERS)
def test_encode_images(built, family):
    theirs, _, pipeline, params = built(family)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
    with torch.no_grad():
        if family == "ldm":
            expected = theirs.vqvae.encode(tm.nchw(images)).latents
        else:
            expected = theirs.vae.encode(tm.nchw(images)).latent_dist.mean * theirs.vae.config.scaling_factor
    assert tm.relative(pipeline.encode_images(params, images), tm.nhwc(expected)) < 1e-5


def test_saved_pipeline_loads_equal(built, tmp_path):
    _, folder, pipeline, params = built("sdxl")
    pipeline.save(tmp_path / "saved", params)
    again, same = load(tmp_path / "saved")
    assert again.scheduler.raw == pipeline.scheduler.raw
    assert again.index == pipeline.index == json.loads((folder / "model_index.json").read_text())
    jax.tree.map(np.testing.assert_array_equal, same, params)
    prompts = ["a cat!", "é 1"]
    conds = pipeline.encode_prompts(params, prompts), again.encode_prompts(same, prompts)
    jax.tree.map(np.testing.assert_array_equal, *conds)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_single_file(built, tmp_path, family):
    """It has no vocabulary and no scheduler; Stable Diffusion 2's does not say what it predicts."""
    _, folder, pipeline, params = built(family)
    components, path = load_models(folder), tmp_path / "model.safetensors"
    save_file(single_file(family, components), path)
    how = {"configs": {name: c.config for name, c in components.items()}, "tokenizer": folder / "tokenizer"}
    if family == "sd2":
        with pytest.raises(ValueError, match=r'scheduler=\{"prediction_type": "epsilon"\}\) for the base model'):
            load(path, **how)
        how["scheduler"] = {key: value for key, value in pipeline.scheduler.raw.items() if key[0] != "_"}
    again, same = load(path, **how)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    np.testing.assert_array_equal(again.scheduler.alphas_cumprod, pipeline.scheduler.alphas_cumprod)
    np.testing.assert_array_equal(again.times(STEPS), pipeline.times(STEPS))
    assert again.scheduler.prediction == pipeline.scheduler.prediction
    prompts = again.encode_prompts(same, PROMPTS), pipeline.encode_prompts(params, PROMPTS)
    jax.tree.map(np.testing.assert_array_equal, *prompts)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_single_file_is_read_by_diffusers(built, tmp_path, family):
    """The writer of single files and our reader would share a mistake; diffusers' reader does not. It knows no single
    files of the unconditional models.
    """
    theirs, folder, _, _ = built(family)
    components, path = load_models(folder), tmp_path / "model.safetensors"
    save_file(single_file(family, components), path)
    none = {} if family == "sdxl" else {"safety_checker": None, "feature_extractor": None}
    again = type(theirs).from_single_file(str(path), config=str(folder), local_files_only=True, **none)
    for name in components:
        expected, found = getattr(theirs, name).state_dict(), getattr(again, name).state_dict()
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value), (name, key)


TABLES = {
    "sd": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "ldm": {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"},
    "ddpm": {"beta_schedule": "linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "given": {"trained_betas": np.linspace(1e-4, 0.5, 20).tolist()},
}


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("table", TABLES)
def test_alphas_cumprod_exactly(name, table):
    theirs = getattr(diffusers, name)(**TABLES[table])
    ours = Scheduler(dict(theirs.config) | {"_class_name": name})
    np.testing.assert_array_equal(ours.alphas_cumprod, theirs.alphas_cumprod.numpy())


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_zero_terminal_snr(name):
    with tm.exact_sqrt():
        theirs = getattr(diffusers, name)(**TABLES["sd"], rescale_betas_zero_snr=True)
    ours = Scheduler(dict(theirs.config) | {"_class_name": name})
    np.testing.assert_array_equal(ours.alphas_cumprod, theirs.alphas_cumprod.numpy())


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [7, 10, 50])
def test_time_grids_exactly(name, spacing, steps):
    plms = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    theirs = getattr(diffusers, name)(**TABLES["sd"], timestep_spacing=spacing, steps_offset=1, **plms)
    theirs.set_timesteps(steps)
    index = theirs.timesteps.numpy()
    if name == "PNDMScheduler":  # visits its second level twice
        index = theirs._timesteps[::-1]
    if name == "HeunDiscreteScheduler":  # visits every level but the first twice
        index = index[[0, *range(1, len(index), 2)]]
    times = Scheduler(dict(theirs.config) | {"_class_name": name}).times(steps)
    np.testing.assert_allclose(times[:-1] * 1000 - 1, index, rtol=0, atol=1e-9 if index.dtype == int else 1e-4)
    assert times[-1] == (0.001 if name == "PNDMScheduler" and index[-1] > 0 else 0)
