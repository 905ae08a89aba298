"""Pipelines without torch: what fits together, what is refused, and guidance by prompts."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sd_tiny
import sd_toys
from safetensors.numpy import load_file

from mmdjax import (
    DDIM,
    IMQ,
    RBF,
    Cosine,
    DiffusionModel,
    Mapped,
    MMDGuidance,
    Particles,
    Product,
    from_model,
    guided_sample,
    mmd2,
)
from mmdjax.schedules import RectifiedFlow
from mmdjax.sd import load
from mmdjax.sd.families import Network
from mmdjax.sd.models import export
from mmdjax.sd.scheduler import Scheduler
from mmdjax.sd.text.prompts import Apart, pooled, prompt_kernel, tokens
from mmdjax.sd.tiny import write_vocabulary


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sd_toys.write_pipeline(tmp_path_factory.mktemp("pipeline") / "model")


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder)


def pictures(n=3):
    return np.random.default_rng(0).uniform(-1, 1, (n, 8, 8, 3)).astype(np.float32)


# --- pictures ---


def test_pictures_to_latents_scaled_once(loaded):
    pipeline, params = loaded
    latents = pipeline.encode_images(params, pictures())
    encode = jax.jit(lambda p, x: pipeline.modules["vae"].apply({"params": p}, x, method="encode")[0])
    mean = encode(params["vae"], jnp.asarray(pictures()))
    np.testing.assert_allclose(latents, 0.18215 * mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(pipeline.encode_images(params, pictures(), batch_size=2), latents, atol=1e-5)
    images = pipeline.decode(params, latents, batch_size=2, tile=4)  # one tile: exact
    np.testing.assert_allclose(images, pipeline.decode(params, latents), atol=1e-5)
    assert pipeline.decode(params, latents, tile=3).shape == images.shape
    assert images.shape == (3, 8, 8, 3)
    assert images.dtype == jnp.float32
    assert float(jnp.abs(images).max()) <= 1


def test_pictures_that_are_not(loaded):
    pipeline, params = loaded
    with pytest.raises(ValueError, match=r"images have shape \(1, 8, 8, 4\); give \[n, height, width, 3\]"):
        pipeline.encode_images(params, np.zeros((1, 8, 8, 4), np.float32))
    with pytest.raises(ValueError, match=r"images have shape \(1, 9, 8, 3\); .* multiples of 2"):
        pipeline.encode_images(params, np.zeros((1, 9, 8, 3), np.float32))
    with pytest.raises(ValueError, match=r"images lie in \[0, 255\]; give them in \[-1, 1\]: 8-bit ones / 127.5 - 1"):
        pipeline.encode_images(params, 255 * (pictures() > 0).astype(np.float32))
    with pytest.raises(ValueError, match=r"images lie in \[nan, nan\]"):
        pipeline.encode_images(params, np.full((1, 8, 8, 3), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"latents have shape \(1, 4, 4, 3\); give \[n, h, w, 4\]"):
        pipeline.decode(params, np.zeros((1, 4, 4, 3), np.float32))
    with pytest.raises(FloatingPointError, match=r"the latents to decode are not finite \(dtype float32\)"):
        pipeline.decode(params, np.full((1, 4, 4, 4), np.inf, np.float32))


@pytest.mark.slow
def test_pictures_that_overflow_float16(folder, tmp_path):
    """Porting 14, where the config does not ask for float32: an error, not a black picture."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "vae" / "config.json").read_text()) | {"force_upcast": False}
    (copy / "vae" / "config.json").write_text(json.dumps(config))
    pipeline, params = load(copy, dtype=jnp.float16)
    decoder = params["vae"]["decoder"]
    big = {"conv_in": jax.tree.map(lambda leaf: 1e6 * leaf, decoder["conv_in"])}
    params = params | {"vae": params["vae"] | {"decoder": decoder | big}}
    with pytest.raises(
        FloatingPointError,
        match=r"the pictures are not finite \(dtype float16\); load the model with dtype=jnp.float32 or jnp.bfloat16",
    ):
        pipeline.decode(params, np.ones((1, 4, 4, 4), np.float32))


# --- prompts ---


def test_prompts(loaded):
    pipeline, params = loaded
    cond = pipeline.encode_prompts(params, ["a cat", "a dog", "a cat"])
    assert jax.tree.map(jnp.shape, cond) == {"context": (3, 8, 32), "pooled": (3, 32)}
    np.testing.assert_array_equal(cond["context"][0], cond["context"][2])
    assert float(jnp.abs(cond["pooled"][0] - cond["pooled"][1]).max()) > 0.01
    one = pipeline.encode_prompts(params, "a dog", negative=True)
    np.testing.assert_allclose(one["context"], cond["context"][1], atol=1e-5)
    assert one["pooled"].shape == (32,)
    with pytest.raises(ValueError, match="prompts is empty"):
        pipeline.encode_prompts(params, [])
    with pytest.raises(ValueError, match=r"time_ids has shape \(6,\); give six numbers for SDXL"):
        pipeline.encode_prompts(params, ["a"], time_ids=np.zeros(6))


def test_model(loaded):
    pipeline, params = loaded
    null = pipeline.encode_prompts(params, "", negative=True)
    assert pipeline.model().shape == (4, 4, 4)
    assert pipeline.model(height=16, width=12, guidance_scale=2.0, null_cond=null).shape == (8, 6, 4)
    with pytest.raises(ValueError, match="height is 15; give a multiple of 2, such as 14"):
        pipeline.model(height=15)
    with pytest.raises(ValueError, match=r"guidance_scale is 7.5 without a negative prompt; give null_cond="):
        pipeline.model(guidance_scale=7.5)
    with pytest.raises(ValueError, match=r"null_cond must be one condition without batch axis"):
        pipeline.model(guidance_scale=7.5, null_cond=pipeline.encode_prompts(params, [""]))
    with pytest.raises(ValueError, match=r"cond is NoneType; this model takes prompts"):
        guided_sample(params, jax.random.key(0), None, model=pipeline.model(), num_samples=1, num_steps=1)


def test_text_to_image_as_recorded(tmp_path):
    """diffusers' pictures (tests/fixtures, recorded by tests/parity/record_fixtures.py): ten steps with classifier-free
    guidance and a negative prompt.
    """
    fixtures = Path(__file__).parent / "fixtures"
    recorded = json.loads((fixtures / "sd_pipeline.json").read_text())
    arrays = load_file(fixtures / "sd_pipeline.safetensors")
    for name, config in recorded["configs"].items():
        if name == "scheduler":
            (tmp_path / name).mkdir()
            (tmp_path / name / "scheduler_config.json").write_text(json.dumps(config))
        else:
            prefix = "text_model." if name == "text_encoder" else ""  # which the recording library leaves out
            export(tmp_path, {name: sd_tiny.component(config, prefix=prefix)})
    write_vocabulary(tmp_path / "tokenizer", length=12)
    pipeline, params = load(tmp_path)
    null = pipeline.encode_prompts(params, recorded["negative"], negative=True)
    samples = guided_sample(
        params,
        jax.random.key(0),
        None,
        model=pipeline.model(guidance_scale=recorded["scale"], null_cond=null),
        num_samples=2,
        cond=pipeline.encode_prompts(params, recorded["prompts"]),
        sampler=DDIM(eta=0.0),
        times=pipeline.times(recorded["steps"]),
        x_init=arrays["latents"],
    )
    images = (pipeline.decode(params, samples.x) + 1) / 2
    assert np.mean((arrays["images"] > 0.01) & (arrays["images"] < 0.99)) > 0.5  # neither flat nor saturated
    assert arrays["images"].std() > 0.1
    np.testing.assert_allclose(images, arrays["images"], atol=2 / 255)


@pytest.mark.slow
def test_sampling_compiles_once(loaded, monkeypatch):
    """Another cfg scale, negative prompt, prompt or kernel made anew compiles nothing."""
    pipeline, params = loaded
    refs = Particles(pipeline.encode_images(params, pictures()), pipeline.encode_prompts(params, ["a", "b", "cat"]))

    def sample(scale, negative, prompt):
        null = pipeline.encode_prompts(params, negative, negative=True)
        return guided_sample(
            params,
            jax.random.key(0),
            refs,
            model=pipeline.model(guidance_scale=scale, null_cond=null),
            num_samples=2,
            cond=pipeline.encode_prompts(params, [prompt, "dog"]),
            guidance=MMDGuidance(pipeline.kernel()),
            times=pipeline.times(2),
        ).x

    traces, call = [], Network.__call__
    monkeypatch.setattr(Network, "__call__", lambda self, *args: traces.append(1) or call(self, *args))
    first = sample(2.0, "", "cat")
    count = len(traces)
    assert count > 0
    assert first.shape == (2, 4, 4, 4)
    second = sample(3.0, "dog", "é")
    assert len(traces) == count
    assert float(jnp.abs(first - second).max()) > 1e-3  # and finite


# --- loading ---


@pytest.mark.slow
def test_unconditional(tmp_path):
    pipeline, params = load(sd_toys.write_pipeline(tmp_path / "ldm", unconditional=True))
    x = guided_sample(params, jax.random.key(0), None, model=pipeline.model(), num_samples=2, times=pipeline.times(2)).x
    assert pipeline.decode(params, x).shape == (2, 8, 8, 3)
    latents = pipeline.encode_images(params, pictures())
    encode = jax.jit(lambda p, x: pipeline.modules["vqvae"].apply({"params": p}, x, method="encode"))
    raw = encode(params["vqvae"], jnp.asarray(pictures()))
    np.testing.assert_allclose(latents, raw, atol=1e-5)  # not scaled: the config has no factor
    with pytest.raises(ValueError, match="unconditional; it takes no prompts"):
        pipeline.encode_prompts(params, ["a cat"])
    with pytest.raises(ValueError, match="takes no prompts; use a kernel on latents"):
        pipeline.kernel()
    with pytest.raises(ValueError, match=r"guidance_scale is 2.0 without a negative prompt; an unconditional"):
        pipeline.model(guidance_scale=2.0)


@pytest.mark.slow
def test_guided_by_decoded_pictures(loaded):
    pipeline, params = loaded
    latents = 0.3 * jax.random.normal(jax.random.key(1), (6, 4, 4, 4)) + 1.0
    kernel = Mapped(pipeline.decoder(params), RBF(None)).fit(Particles(latents))
    picture = pipeline.decoder(params)(latents)
    np.testing.assert_allclose(jnp.clip(picture, -1, 1), pipeline.decode(params, latents), atol=1e-4)
    guidance = MMDGuidance(kernel=kernel, scale=0.02, precondition="length", inner_steps=1)
    shrink = DiffusionModel(from_model(lambda params, x, t, cond: 0.5 * x, "x0"), RectifiedFlow(), (4, 4, 4))
    how = {"model": shrink, "num_samples": 4, "num_steps": 3}
    key = jax.random.key(0)
    guided = guided_sample(None, key, latents, guidance=guidance, **how).x
    unguided = guided_sample(None, key, None, **how).x
    before, after = (mmd2(kernel, x, latents, estimator="u") for x in (unguided, guided))
    assert float(after) < 0.2 * float(before)


def test_shown_in_a_line(loaded):
    pipeline, _ = loaded
    parts = "unet=UNet2DCondition, vae=AutoencoderKL, text_encoder=CLIPText"
    assert repr(pipeline) == f"Pipeline({parts}, prediction='eps')"


def test_saved_and_loaded(loaded, tmp_path):
    pipeline, params = loaded
    pipeline.save(tmp_path / "saved", params)
    again, same = load(tmp_path / "saved")
    jax.tree.map(np.testing.assert_array_equal, params, same)
    assert again.scheduler.raw == pipeline.scheduler.raw
    np.testing.assert_array_equal(
        again.tokenizers["text_encoder"](["a cat!"]), pipeline.tokenizers["text_encoder"](["a cat!"])
    )


def test_parts_that_are_missing(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(copy / "tokenizer")
    pipeline, params = load(copy)
    with pytest.raises(ValueError, match=r"no vocabulary for text_encoder; give load\(..., tokenizer=folder\)"):
        pipeline.encode_prompts(params, ["a"])
    pipeline, params = load(copy, tokenizer=folder / "tokenizer")
    assert pipeline.encode_prompts(params, ["a"])["pooled"].shape == (1, 32)
    shutil.rmtree(copy / "scheduler")
    with pytest.raises(FileNotFoundError, match=r"no scheduler/scheduler_config.json, which says how noise was added"):
        load(copy)
    assert load(copy, scheduler={"_class_name": "PNDMScheduler"})[0].times(10)[-1] == 0
    shutil.rmtree(copy / "text_encoder")
    with pytest.raises(ValueError, match=r"prompts of width 32 but the text encoders \(none\) give 0"):
        load(copy, scheduler={"_class_name": "DDIMScheduler"})
    shutil.rmtree(copy / "vae")
    with pytest.raises(ValueError, match=r"a pipeline needs a unet and a vae or vqvae; there are: unet"):
        load(copy, scheduler={"_class_name": "DDIMScheduler"})


def test_schedulers_that_are_refused():
    for raw, text in [
        ({"_class_name": "TCDScheduler"}, "the scheduler's class is 'TCDScheduler'; implemented: DDIMScheduler"),
        ({"prediction_type": "flow"}, "prediction_type is 'flow'; implemented: epsilon, v_prediction, sample"),
        ({"thresholding": True}, "thresholding is for pixel models"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'; implemented: linear"),
    ]:
        with pytest.raises(ValueError, match=text):
            Scheduler({"_class_name": "DDIMScheduler"} | raw)
    with pytest.raises(ValueError, match=r"use_lu_lambdas is not implemented; give guided_sample\(times=...\)"):
        Scheduler({"_class_name": "DPMSolverMultistepScheduler", "use_lu_lambdas": True}).times(5)


# --- references with prompts ---

TOY = DiffusionModel(from_model(lambda params, x, t, cond: x * 0.5, "x0"), RectifiedFlow(), (3,))


def prompt(*directions):
    """Conditions whose pooled embeddings are unit vectors, orthogonal unless of one direction."""
    eye = jnp.eye(4)[jnp.array(directions)]
    return {"context": jnp.tile(eye[:, None], (1, 5, 1)), "pooled": eye}


def toy_sample(refs, cond, kernel):
    guidance = {} if refs is None else {"guidance": MMDGuidance(kernel, precondition="field")}
    return guided_sample(
        None, jax.random.key(0), refs, model=TOY, num_samples=len(cond["pooled"]), cond=cond, num_steps=4,
        sampler=DDIM(eta=0.0), **guidance,
    ).x  # fmt: skip


@pytest.mark.parametrize("level", ["pooled", pytest.param("tokens", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::mmdjax.GuidanceWarning")  # of references that reach no sample: what is tested
def test_reference_of_another_prompt_does_not_pull(level):
    refs = jax.random.normal(jax.random.key(1), (6, 3)) + 3.0
    cond, kernel = prompt(0, 1), prompt_kernel(level=level)  # two samples, orthogonal too
    alone = toy_sample(None, cond, kernel)
    np.testing.assert_array_equal(toy_sample(Particles(refs, prompt(*[2] * 6)), cond, kernel), alone)
    # references of the first sample's prompt pull it and not the second
    pulled = toy_sample(Particles(refs, prompt(*[0] * 6)), cond, kernel)
    assert float(jnp.linalg.norm(pulled[0] - alone[0])) > 0.5
    np.testing.assert_array_equal(pulled[1], alone[1])


@pytest.mark.slow
@pytest.mark.parametrize("level", ["pooled", "tokens"])
def test_constant_prompt_is_the_plain_kernel(level):
    refs, cond = jax.random.normal(jax.random.key(1), (6, 3)) + 3.0, prompt(1, 1, 1)
    product = toy_sample(Particles(refs, prompt(*[1] * 6)), cond, prompt_kernel(level=level))
    np.testing.assert_allclose(product, toy_sample(Particles(refs, prompt(*[1] * 6)), cond, IMQ(None)), atol=1e-5)


def test_prompt_kernel():
    assert prompt_kernel() == Product(x=IMQ(None), cond=Mapped(pooled, RBF(Apart())))
    assert prompt_kernel(RBF(2.0), level="tokens", cond=Cosine()).cond == Mapped(tokens, Cosine())
    with pytest.raises(ValueError, match=r"level is 'words'; choose one of \('pooled', 'tokens'\)"):
        prompt_kernel(level="words")
    # a third of the distance √2 between prompts that differ, however many are alike and however long the vectors are
    cond = {"context": jnp.ones((5, 2, 4)), "pooled": 7 * jnp.eye(4)[jnp.array([0, 0, 0, 0, 1])]}
    fitted = prompt_kernel().fit(Particles(jnp.arange(15.0).reshape(5, 3), cond))
    np.testing.assert_allclose(fitted.cond.kernel.bandwidth, 2**0.5 / 3, rtol=1e-6)
    lengths = jnp.linalg.norm(tokens(prompt(0, 3)), axis=-1)
    np.testing.assert_allclose(lengths, np.ones((2, 4)), rtol=1e-6)  # the first of five is left out
