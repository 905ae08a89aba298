"""The shipped model of drawn portraits in diffusers: the same pictures of the same noise and prompts."""

from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity needs the extra mmdjax[parity]")
diffusers = pytest.importorskip("diffusers", reason="parity needs the extra mmdjax[parity]")
pytest.importorskip("transformers", reason="parity needs the extra mmdjax[parity]")

import torch_models as tm  # noqa: E402

from mmdjax import DDIM, guided_sample  # noqa: E402
from mmdjax.sd import load  # noqa: E402

FOLDER = Path(__file__).parents[2] / "examples" / "portraits"
PROMPTS = [
    "a smiling person with a red bun, dark skin, blue clothes",
    "an angry person with a full beard and sunglasses",
]
SCALE, STEPS = 3.0, 10


@pytest.fixture(autouse=True)
def precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # NumPy 2 of torch's tensors
@pytest.mark.filterwarnings("ignore:[^a-z]*The configuration file:FutureWarning")
def test_portraits_in_diffusers():
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(FOLDER, safety_checker=None).to(torch.float32)
    theirs.set_progress_bar_config(disable=True)
    latents = np.random.default_rng(0).standard_normal((2, 16, 16, 4)).astype(np.float32)
    expected = theirs(
        PROMPTS, latents=tm.nchw(latents), height=64, width=64, num_inference_steps=STEPS, guidance_scale=SCALE,
        eta=0.0, output_type="np",
    ).images  # fmt: skip
    assert expected.std() > 0.2  # portraits, not a flat picture
    pipeline, params = load(FOLDER, param_dtype=np.float32)
    ids = theirs.tokenizer(PROMPTS, padding="max_length", max_length=theirs.tokenizer.model_max_length).input_ids
    np.testing.assert_array_equal(pipeline.tokenizers["text_encoder"](PROMPTS), ids)
    null = pipeline.encode_prompts(params, "", negative=True)
    samples = guided_sample(
        params, jax.random.key(0), None, model=pipeline.model(guidance_scale=SCALE, null_cond=null), num_samples=2,
        cond=pipeline.encode_prompts(params, PROMPTS), sampler=DDIM(eta=0.0), times=pipeline.times(STEPS),
        x_init=latents,
    )  # fmt: skip
    images = pipeline.decode(params, samples.x)
    assert np.abs((np.asarray(images) + 1) / 2 - expected).max() < 2 / 255
