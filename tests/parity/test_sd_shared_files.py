"""Files as people share them: variants of some parts, 8-bit floats, clip skip, distilled U-Nets, against torch."""

import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity needs the extra mmdjax[parity]")
diffusers = pytest.importorskip("diffusers", reason="parity needs the extra mmdjax[parity]")
transformers = pytest.importorskip("transformers", reason="parity needs the extra mmdjax[parity]")

import torch_models as tm  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from test_sd_networks import normal, ours, tensor  # noqa: E402
from test_sd_pipeline import PROMPTS, build  # noqa: E402

from mmdjax.sd import load, load_component, load_models  # noqa: E402
from mmdjax.sd.files.places import open_file  # noqa: E402
from mmdjax.sd.scheduler import Scheduler, in_place  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # NumPy 2 of torch's tensors
    pytest.mark.filterwarnings("ignore:[^a-z]*The configuration file:FutureWarning"),  # "offset should be 1"
]
TOLERANCE = 1e-5  # float32 rounding through some 50 layers is 1e-6; the promise is 1e-4
DEEP = tm.SD2_UNET | {  # as SSD-1B's: a number for each attention
    "transformer_layers_per_block": (1, (2, 3)),
    "reverse_transformer_layers_per_block": ((2, 1, 3), 2),
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
}


@pytest.fixture(autouse=True)
def precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize(
    "config",
    [
        tm.SD1_UNET | {"mid_block_type": None},
        tm.SD2_UNET | {"mid_block_type": "UNetMidBlock2D"},
        DEEP | {"mid_block_type": "UNetMidBlock2D"},
        DEEP,
    ],
)
def test_distilled_unets(tmp_path, config):
    theirs = tm.randomise(diffusers.UNet2DConditionModel(**config))
    call = ours(theirs, tmp_path)
    t, x, context = np.array([0, 1, 999]), normal(0, 3, 8, 12, 4), normal(1, 3, 5, 24)
    with torch.no_grad():
        expected = theirs(tm.nchw(x), tensor(t), tensor(context)).sample
    assert tm.relative(call(x, jnp.asarray(t), context), tm.nhwc(expected)) < TOLERANCE


def test_unconditional_without_a_middle(tmp_path):
    theirs = tm.randomise(diffusers.UNet2DModel(**tm.LDM_UNET | {"mid_block_type": None}))
    x, t = normal(0, 3, 8, 8, 3), np.array([0, 1, 999])
    with torch.no_grad():
        expected = theirs(tm.nchw(x), tensor(t)).sample
    assert tm.relative(ours(theirs, tmp_path)(x, jnp.asarray(t)), tm.nhwc(expected)) < TOLERANCE


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_clip_skip(tmp_path, family):
    theirs, folder, _, _ = build(family, tmp_path)
    if not hasattr(theirs.text_encoder, "text_model"):  # transformers 5.24 leaves it out, diffusers 0.42 asks for it
        theirs.text_encoder.text_model = types.SimpleNamespace(final_layer_norm=theirs.text_encoder.final_layer_norm)
    for skip in (None, 1, 2):
        pipeline, params = load(folder, clip_skip=skip)
        cond = pipeline.encode_prompts(params, PROMPTS)
        how = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False, "clip_skip": skip}
        with torch.no_grad():
            found = theirs.encode_prompt(PROMPTS, **how)
        assert tm.relative(cond["context"], found[0]) < TOLERANCE
        if family == "sdxl":
            assert tm.relative(cond["pooled"], found[2]) < TOLERANCE


def test_config_of_fewer_layers(tmp_path):
    """The other way to skip the last layers: transformers reads as many as config.json says, and warns of the rest."""
    tm.text_encoder(tm.CLIP_L).save_pretrained(tmp_path / "x")
    path = tmp_path / "x" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 1}))
    theirs, ids = transformers.CLIPTextModel.from_pretrained(tmp_path / "x"), np.arange(12)[None]
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).last_hidden_state
    module, params, _ = load_component(tmp_path / "x")
    assert tm.relative(jax.jit(module.apply)({"params": params}, ids).last, expected) < TOLERANCE


def test_variant_of_some_parts(tmp_path):
    theirs, folder, pipeline, params = build("sd1", tmp_path)
    theirs.unet.half().save_pretrained(folder / "unet", variant="fp16")
    with pytest.raises(ValueError, match="no such modeling files are available"):
        diffusers.StableDiffusionPipeline.from_pretrained(folder, variant="bf16")
    with pytest.raises(FileNotFoundError, match="no part of the model has bf16 weights; there are: fp16, plain"):
        load(folder, variant="bf16")
    again = diffusers.StableDiffusionPipeline.from_pretrained(folder, variant="fp16")
    _, half = load(folder, variant="fp16")
    assert half["unet"]["conv_in"]["kernel"].dtype == jnp.float16
    np.testing.assert_array_equal(half["unet"]["conv_in"]["bias"], again.unet.conv_in.bias.detach().numpy())
    jax.tree.map(np.testing.assert_array_equal, half["vae"], params["vae"])
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert load_models(folder, variant={"unet": "fp16"})["unet"].params["conv_in"]["bias"].dtype == jnp.float16
    assert pipeline.scheduler.prediction == "eps"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats(tmp_path, dtype):
    """Plain ones and scaled ones, in safetensors and in archives of torch: the values that torch makes of them."""
    model = tm.text_encoder(tm.CLIP_L)
    model.save_pretrained(tmp_path / "x")
    weights = tmp_path / "x" / "model.safetensors"
    plain = {key: value.to(dtype) for key, value in model.state_dict().items()}
    scaled, expected = dict(plain), {key: value.float() for key, value in plain.items()}
    for i, (key, value) in enumerate(model.state_dict().items()):
        if value.ndim == 2 and "layers" in key:
            rows, columns = value.shape
            scale = [torch.tensor(0.37), torch.rand(rows, 1) + 1, torch.rand(-(-rows // 128), -(-columns // 128))][
                i % 3
            ]
            name = ["scale_weight", "weight_scale", "weight_scale_inv"][i % 3]
            whole = (
                scale if i % 3 < 2 else scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
            )
            scaled[key.replace("weight", name)], expected[key] = scale, plain[key].float() * whole
            scaled[key.replace("weight", "input_scale")] = torch.tensor(1.0)
    scaled["scaled_fp8"] = torch.zeros(0, dtype=dtype)
    for tensors, values in ((plain, {k: v.float() for k, v in plain.items()}), (scaled, expected)):
        save_file(tensors, weights)
        torch.save(tensors, tmp_path / "x.pt")
        for found in (open_file(weights), open_file(tmp_path / "x.pt")):
            assert found.keys() == values.keys()
            for key, value in values.items():
                np.testing.assert_array_equal(np.asarray(found[key], np.float32), value.numpy())
        module, params, _ = load_component(tmp_path / "x", param_dtype=jnp.float32)
        ids = np.arange(12)[None]
        whole = jax.jit(module.apply)({"params": params}, ids).last
        with torch.no_grad():
            model.load_state_dict(values)
            assert tm.relative(whole, model(torch.from_numpy(ids)).last_hidden_state) < TOLERANCE
        kept = load_component(tmp_path / "x").params  # 8 bits without a scale are exact in bfloat16
        assert kept["text_model.final_layer_norm"]["scale"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(jax.jit(module.apply)({"params": kept}, ids).last, whole)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_scheduler_in_place_of_another(name):
    """As `from_config` of diffusers, from a class that is not implemented here."""
    made = diffusers.DPMSolverSinglestepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction"
    )
    file = json.loads(made.to_json_string())
    cls = getattr(diffusers, name)
    expected = cls.from_config(file, clip_sample=False)
    expected.set_timesteps(10)
    scheduler = Scheduler(in_place(file, {"_class_name": name}))
    assert scheduler.prediction == "v"
    assert scheduler.clip is None
    np.testing.assert_array_equal(scheduler.alphas_cumprod, expected.alphas_cumprod.numpy())
    np.testing.assert_allclose(scheduler.times(10)[:-1] * 1000 - 1, expected.timesteps.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"])
@pytest.mark.parametrize("how", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_spaced_sigmas(name, how, spacing):
    raw = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": spacing}
    theirs = getattr(diffusers, name)(**raw, **{how: True})
    theirs.set_timesteps(10)
    sigmas = theirs.sigmas.numpy()
    if name.startswith("Heun"):  # it visits each level twice
        sigmas = np.concatenate([sigmas[:1], sigmas[1:-1:2], sigmas[-1:]])
    scheduler = Scheduler({"_class_name": name, how: True} | raw)
    level = jax.vmap(scheduler.schedule())(scheduler.times(10)[:-1])
    assert len(sigmas) == 11
    np.testing.assert_allclose(level.sigma / level.alpha, sigmas[:-1], rtol=1e-3)  # theirs interpolates in float32


def test_tensors_with_company(tmp_path):
    """Whatever torch's own restricted loader reads is read here; what it refuses is refused by name."""
    company = [
        *(torch.float16, torch.Size([1, 2]), torch.device("cpu"), {1, 2}, complex(1, 2), bytearray(b"a")),
        *(torch.nn.Parameter(torch.ones(2)), torch.strided, torch.ones(2).to(torch.float8_e8m0fnu)),
        torch.ones(3, dtype=torch.uint16),
    ]
    for i, extra in enumerate(company):
        path = tmp_path / f"{i}.ckpt"
        torch.save({"state_dict": {"w": torch.arange(3.0)}, "extra": extra}, path)
        assert torch.load(path, weights_only=True)
        np.testing.assert_array_equal(open_file(path)["w"], np.arange(3.0))
    torch.save({"w": torch.nn.Parameter(torch.ones(2)), "x": torch.ones(2, dtype=torch.uint16) * 7}, tmp_path / "p.pt")
    assert {key: value.tolist() for key, value in open_file(tmp_path / "p.pt").items()} == {"w": [1, 1], "x": [7, 7]}
    torch.save({"w": torch.ones(2), "f": shutil.rmtree}, tmp_path / "bad.pt")
    with pytest.raises(Exception, match="shutil"):
        torch.load(tmp_path / "bad.pt", weights_only=True)
    with pytest.raises(ValueError, match=r"bad\.pt asks for shutil\.rmtree"):
        open_file(tmp_path / "bad.pt")
