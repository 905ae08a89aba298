"""Merged LoRAs against diffusers' `fuse_lora` and PEFT's `merge_and_unload`; new tokens against diffusers' too."""

import functools
import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

torch = pytest.importorskip("torch", reason="parity needs the extra mmdjax[parity]")
diffusers = pytest.importorskip("diffusers", reason="parity needs the extra mmdjax[parity]")
peft = pytest.importorskip("peft", reason="parity needs the extra mmdjax[parity]")

import torch_models as tm  # noqa: E402
from test_sd_files import overrides, single_file  # noqa: E402
from test_sd_pipeline import build  # noqa: E402

from mmdjax.checkpoint import CheckpointError  # noqa: E402
from mmdjax.sd import load, load_models  # noqa: E402
from mmdjax.sd.files.compvis import unet_source  # noqa: E402
from mmdjax.sd.files.convert import params_to_torch  # noqa: E402
from mmdjax.sd.files.inversion import add_tokens  # noqa: E402
from mmdjax.sd.files.lora import plan  # noqa: E402
from mmdjax.sd.models import module_from_config  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # NumPy 2 of torch's tensors
    pytest.mark.filterwarnings("ignore:.*merge:UserWarning"),  # PEFT's remark on rounding
    pytest.mark.filterwarnings("ignore:Adapter 'default'"),  # biases, whose shape PEFT does not expect
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),  # several at once, on purpose
]
UNET = re.compile(
    r"attn[12]\.(to_[qkv]|to_out\.0)$|ff\.net\.(0\.proj|2)$|proj_(in|out)$|resnets\.\d\.(conv[12]|conv_shortcut|time_emb_proj)$"
    r"|samplers\.0\.conv$|^conv_(in|out)$|_embedding\.linear_[12]$"
)
TEXT = re.compile(r"self_attn\.(q|k|v|out)_proj$|mlp\.fc[12]$")
RANK = 3


def layers(model, pattern):
    """Module names and the shapes of their weights."""
    return {k: tuple(m.weight.shape) for k, m in model.named_modules() if hasattr(m, "weight") and pattern.search(k)}


def factors(rng, shape, rank=RANK):
    """(down, up) of a linear map or a convolution, of a change as large as a weight."""
    ones = (1,) * (len(shape) - 2)
    down = rng.standard_normal((rank, *shape[1:])) / np.sqrt(np.prod(shape[1:]))
    up = rng.standard_normal((shape[0], rank, *ones)) / np.sqrt(rank)
    return down.astype(np.float32), up.astype(np.float32)


def parts(pipe):
    names = ("unet", "text_encoder", "text_encoder_2")
    return {name: getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None}


def in_diffusers(pipe, seed, *, old=False):
    """As diffusers saves them; older versions named the factors otherwise."""
    rng, file = np.random.default_rng(seed), {}
    for component, model in parts(pipe).items():
        for name, shape in layers(model, UNET if component == "unet" else TEXT).items():
            ends = ("lora_A.weight", "lora_B.weight")
            if old and component == "unet":
                ends = ("lora.down.weight", "lora.up.weight")
            elif old:
                ends = ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")
            file |= dict(zip([f"{component}.{name}.{end}" for end in ends], factors(rng, shape), strict=True))
    return file


def by_kohya(pipe, seed, *, compvis=False):
    """Underscores and alphas; SDXL's U-Net in CompVis's names."""
    rng, file = np.random.default_rng(seed), {}
    two = "text_encoder_2" in parts(pipe)
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if two else "lora_te_", "text_encoder_2": "lora_te2_"}
    for component, model in parts(pipe).items():
        for name, shape in layers(model, UNET if component == "unet" else TEXT).items():
            if component == "unet" and compvis:
                config = config_of(model)
                name = unet_source(f"{name}.weight", config).key.removesuffix(".weight")
            elif component != "unet":
                name = f"text_model.{name.removeprefix('text_model.')}"
            place = prefixes[component] + name.replace(".", "_")
            down, up = factors(rng, shape)
            file |= {f"{place}.lora_down.weight": down, f"{place}.lora_up.weight": up}
            file[f"{place}.alpha"] = np.array(1 + seed, np.float32)  # one for all: others diffusers drops in attention
    return file


@functools.cache
def config_of(unet):
    return module_from_config({**json.loads(unet.to_json_string())}).config


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def family(request, tmp_path_factory):
    """(name, pipeline of diffusers, its folder)."""
    pipe, folder, *_ = build(request.param, tmp_path_factory.mktemp(request.param))
    return request.param, pipe, folder


def fused(pipe, files, strengths):
    """The weights by component, after diffusers fused files into them."""
    plain = {name: {k: v.clone() for k, v in model.state_dict().items()} for name, model in parts(pipe).items()}
    names = [f"a{i}" for i in range(len(files))]
    for name, file in zip(names, files, strict=True):
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    pipe.set_adapters(names, list(strengths))
    pipe.fuse_lora(components=list(parts(pipe)), adapter_names=names)
    pipe.unload_lora_weights()
    found = {name: {k: v.numpy().copy() for k, v in m.state_dict().items()} for name, m in parts(pipe).items()}
    for name, model in parts(pipe).items():
        model.load_state_dict(plain[name])
    return found


def ours(folder, lora, **how):
    _, params = load(folder, lora=lora, **how)
    return {name: {k: e.read() for k, e in params_to_torch(tree).items()} for name, tree in params.items()}


def same(found, expected, plain):
    """Within 1e-6 of each tensor's largest value, and most tensors not those of the plain model."""
    changed = 0
    for name, tensors in expected.items():
        for key, theirs in tensors.items():
            mine = found[name][key if key in found[name] else f"text_model.{key}"]
            assert np.abs(mine - theirs).max() <= 1e-6 * np.abs(theirs).max(), (name, key)
            changed += not np.array_equal(theirs, plain[name][key])
    return changed


def plain_of(pipe):
    return {name: {k: v.numpy().copy() for k, v in m.state_dict().items()} for name, m in parts(pipe).items()}


DIALECTS = {
    "diffusers": in_diffusers,
    "old diffusers": functools.partial(in_diffusers, old=True),
    "kohya": by_kohya,
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_one_file(family, tmp_path, dialect):
    name, pipe, folder = family
    make = DIALECTS[dialect]
    tensors = make(pipe, 1, compvis=name == "sdxl") if dialect == "kohya" else make(pipe, 1)
    save_file(tensors, tmp_path / "a.safetensors")
    expected = fused(pipe, [tmp_path / "a.safetensors"], [0.7])
    found = ours(folder, {tmp_path / "a.safetensors": 0.7})
    ends = ("lora_A.weight", "lora_down.weight", "down.weight")
    assert same(found, expected, plain_of(pipe)) == sum(key.endswith(ends) for key in tensors)


def test_several_files(family, tmp_path):
    """Files of three dialects at once: the sum of their changes, whatever their order."""
    name, pipe, folder = family
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    save_file(in_diffusers(pipe, 1), files[0])
    save_file(by_kohya(pipe, 2, compvis=name == "sdxl"), files[1])
    save_file(in_diffusers(pipe, 3, old=True), files[2])
    strengths = (0.8, -0.5, 0.3)
    expected = fused(pipe, files, strengths)
    pairs = list(zip(files, strengths, strict=True))
    assert same(ours(folder, dict(pairs)), expected, plain_of(pipe)) > 50
    same(ours(folder, dict(pairs[::-1])), expected, plain_of(pipe))


def test_strength_by_component(family, tmp_path):
    """One number for the U-Net, another for an encoder, and none for what is not named."""
    _, pipe, folder = family
    tensors = in_diffusers(pipe, 1)
    save_file(tensors, tmp_path / "all.safetensors")
    for name in ("unet", "text_encoder"):
        save_file({k: v for k, v in tensors.items() if k.startswith(f"{name}.")}, tmp_path / f"{name}.safetensors")
    expected = fused(pipe, [tmp_path / "unet.safetensors", tmp_path / "text_encoder.safetensors"], [0.5, 2.0])
    found = ours(folder, {tmp_path / "all.safetensors": {"unet": 0.5, "text_encoder": 2.0}})
    assert same(found, expected, plain_of(pipe)) > 50


def test_alphas_in_the_header(family, tmp_path):
    """PEFT's configuration as diffusers' own writer keeps it."""
    _, pipe, folder = family
    tensors, layers_, metadata = in_diffusers(pipe, 1), {}, {}
    for name in parts(pipe):
        layers_[f"{name}_lora_layers"] = {
            k.removeprefix(f"{name}."): torch.from_numpy(v) for k, v in tensors.items() if k.startswith(f"{name}.")
        }
        targets = sorted({k.rpartition(".lora_")[0] for k in layers_[f"{name}_lora_layers"]})
        config = {"r": RANK, "lora_alpha": 1.5, "use_rslora": True, "target_modules": targets}
        metadata[f"{name}_lora_adapter_metadata"] = config | {"alpha_pattern": {targets[0]: 4.0}}
    pipe.save_lora_weights(tmp_path, **layers_, **metadata, weight_name="a.safetensors")
    expected = fused(pipe, [tmp_path / "a.safetensors"], [1.0])
    assert same(ours(folder, {tmp_path / "a.safetensors": 1.0}), expected, plain_of(pipe)) > 50


LINEAR = r".*(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)|time_emb_proj)"
ALL = r".*(attn[12]\.to_[qk]|resnets\.\d\.(conv[12]|conv_shortcut)|proj_in|samplers\.0\.conv)"
ADAPTERS = {
    "LoRA": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=ALL, alpha_pattern={"attn1.to_q": 3}),
    "rank-stabilised": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=ALL, use_rslora=True),
    "bias": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=r".*(to_out\.0|proj_in)", lora_bias=True),
    "DoRA": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=ALL, use_dora=True),
    "LoHa": lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=ALL),
    "LoHa with a core": lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=ALL, use_effective_conv2d=True),
    "LoKr": lambda: peft.LoKrConfig(r=2, alpha=6, target_modules=ALL),
    "LoKr, both decomposed": lambda: peft.LoKrConfig(r=2, alpha=6, target_modules=ALL, decompose_both=True),
    "LoKr with a core": lambda: peft.LoKrConfig(r=2, alpha=6, target_modules=ALL, use_effective_conv2d=True),
    "LoKr of whole factors": lambda: peft.LoKrConfig(r=500, alpha=300, target_modules=LINEAR),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_peft_folder(tmp_path, kind):
    """A folder that PEFT wrote, adapter_config.json with its alpha, against PEFT's own merging."""
    unet = tm.FAMILIES["sd1"]()["unet"]
    unet.save_pretrained(tmp_path / "unet")
    plain = {k: v.numpy().copy() for k, v in unet.state_dict().items()}
    model = peft.get_peft_model(unet, ADAPTERS[kind]())
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                noise = torch.from_numpy(rng.standard_normal(tuple(p.shape)).astype(np.float32))
                p.copy_(p + 0.1 * noise if "magnitude" in name else 0.5 * noise)
    model.save_pretrained(tmp_path / "adapter")
    merged = {k: v.numpy() for k, v in model.merge_and_unload().state_dict().items()}
    found = load_models(tmp_path / "unet", lora={tmp_path / "adapter": 1.0})
    found = {"unet": {k: e.read() for k, e in params_to_torch(found["unet"].params).items()}}
    assert same(found, {"unet": merged}, {"unet": plain}) > 10


TRANSFORMERS = {
    "sd3": lambda: diffusers.SD3Transformer2DModel(**tm.SD3["medium35"]),
    "flux": lambda: diffusers.FluxTransformer2DModel(**tm.FLUX),
    "flux2": lambda: diffusers.Flux2Transformer2DModel(**tm.FLUX2),
}
IN_TRANSFORMERS = re.compile(
    r"attn\d?\.(to_[qkv]|to_out\.0|to_add_out|add_[qkv]_proj|to_qkv_mlp_proj|to_out)$|ff(_context)?\.(net\.(0\.proj|2)|linear_in)$"
    r"|proj_(mlp|out)$|norm\w*\.linear$|embedder|modulation\w*\.linear$"
)


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(tmp_path, name, dialect):
    """Their names are found without a word about any family."""
    model, rng = tm.randomise(TRANSFORMERS[name]()), np.random.default_rng(0)
    model.save_pretrained(tmp_path / "transformer")
    plain = {k: v.detach().numpy().copy() for k, v in model.named_parameters()}
    places = {k: factors(rng, shape) for k, shape in layers(model, IN_TRANSFORMERS).items() if len(shape) > 1}
    file, adapter = {}, {}
    for key, (down, up) in places.items():
        adapter |= {f"{key}.lora_A.weight": torch.from_numpy(down), f"{key}.lora_B.weight": torch.from_numpy(up)}
        stem, ends = f"transformer.{key}", ("lora_A.weight", "lora_B.weight")
        if dialect == "kohya":
            stem, ends = "lora_transformer_" + key.replace(".", "_"), ("lora_down.weight", "lora_up.weight")
        file |= {f"{stem}.{ends[0]}": down, f"{stem}.{ends[1]}": up}
    save_file(file, tmp_path / "a.safetensors")
    model.load_lora_adapter(adapter, prefix=None)
    model.fuse_lora(lora_scale=0.7)
    model.unload_lora()
    merged = {k: v.detach().numpy() for k, v in model.named_parameters()}
    found = load_models(tmp_path / "transformer", lora={tmp_path / "a.safetensors": 0.7})["transformer"].params
    found = {"transformer": {k: e.read() for k, e in params_to_torch(found).items()}}
    assert same(found, {"transformer": merged}, {"transformer": plain}) == len(places)


def test_single_file_as_the_base(family, tmp_path):
    """The same file merged into the model's folder and into its single file."""
    name, pipe, folder = family
    save_file(by_kohya(pipe, 1, compvis=name == "sdxl"), tmp_path / "a.safetensors")
    components = load_models(folder)
    save_file(single_file(name, components), tmp_path / "model.safetensors")
    lora = {tmp_path / "a.safetensors": 0.7}
    merged = load_models(folder, lora=lora)
    again = load_models(tmp_path / "model.safetensors", configs=overrides(folder, components), lora=lora)
    for part, component in merged.items():
        jax.tree.map(np.testing.assert_array_equal, component.params, again[part].params)


# --- learnt tokens ---


PROMPTS = ["a <cat>", "<cat>, a <DOG>!", "the<cat>s", "<cat> <dog> <cat>", "cat dog", "<dog", "a  <dog>\n<cat>"]
KINDS = {
    "emb_params": lambda path, rows: save_file({"emb_params": rows}, path) or path,
    "diffusers": lambda path, rows: save_file({"<name>": rows[0] if len(rows) == 1 else rows}, path) or path,
    "A1111": lambda path, rows: _archive(path.with_suffix(".pt"), rows),
}


def _archive(path, rows):
    parts = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.nn.Parameter(torch.from_numpy(rows))}}
    torch.save(parts | {"name": "x", "step": 500, "sd_checkpoint": None, "sd_checkpoint_name": None}, path)
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vectors", [1, 3])
def test_textual_inversion(tmp_path, kind, vectors):
    """Ids, embeddings and the text encoder's output, for two tokens of which one has a vector alone.

    (For "<CAT>" of several vectors diffusers takes the first alone.)
    """
    pipe, folder, *_ = build("sd1", tmp_path / "m")
    rng = np.random.default_rng(0)
    rows = [0.5 * rng.standard_normal((n, 64)).astype(np.float32) for n in (vectors, 1)]
    files = {
        "<cat>": KINDS[kind](tmp_path / "cat.safetensors", rows[0]),
        "<dog>": KINDS["emb_params"](tmp_path / "dog.safetensors", rows[1]),
    }
    for token, path in files.items():
        loaded = torch.load(path) if path.suffix == ".pt" else str(path)
        how = {} if path.suffix == ".pt" else {"weight_name": path.name}
        pipe.load_textual_inversion(str(path.parent) if how else loaded, token=token, **how)
    pipeline, params = load(folder, textual_inversion=files)
    prompts = pipe.maybe_convert_prompt(PROMPTS, pipe.tokenizer)
    theirs = pipe.tokenizer(prompts, padding="max_length", truncation=True).input_ids
    table = params_to_torch(params["text_encoder"])["text_model.embeddings.token_embedding.weight"].read()
    np.testing.assert_array_equal(table, pipe.text_encoder.get_input_embeddings().weight.detach().numpy())
    np.testing.assert_array_equal(pipeline.tokenizers["text_encoder"](PROMPTS), theirs)
    with torch.no_grad():
        expected = pipe.text_encoder(torch.tensor(theirs)).last_hidden_state
    found = pipeline.encode_prompts(params, PROMPTS)["context"]
    assert tm.relative(found, expected) < 1e-4


def test_textual_inversion_of_two_encoders(tmp_path):
    pipe, folder, *_ = build("sdxl", tmp_path / "m")
    rng = np.random.default_rng(0)
    pair = {"clip_l": rng.standard_normal((2, 64)), "clip_g": rng.standard_normal((2, 96))}
    pair = {key: 0.5 * rows.astype(np.float32) for key, rows in pair.items()}
    save_file(pair, tmp_path / "a.safetensors")
    both = (("clip_l", pipe.tokenizer, pipe.text_encoder), ("clip_g", pipe.tokenizer_2, pipe.text_encoder_2))
    for key, tokenizer, encoder in both:
        pipe.load_textual_inversion(
            torch.from_numpy(pair[key]), token="<cat>", tokenizer=tokenizer, text_encoder=encoder
        )
    pipeline, params = load(folder, textual_inversion={"<cat>": tmp_path / "a.safetensors"})
    expected, _, pooled, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    found = pipeline.encode_prompts(params, PROMPTS)
    assert tm.relative(found["context"], expected.detach()) < 1e-4
    assert tm.relative(found["pooled"], pooled.detach()) < 1e-4


@pytest.mark.parametrize("how", ["model", "lora", "textual_inversion"])
def test_ip_adapter_is_refused_by_name(tmp_path, how):
    """In the nested dictionaries of its .bin."""
    parts = {"image_proj": {"proj.weight": torch.ones(2, 2)}, "ip_adapter": {"1.to_k_ip.weight": torch.ones(2, 2)}}
    torch.save(parts, tmp_path / "ip.bin")
    call = {
        "model": lambda: load_models(tmp_path / "ip.bin"),
        "lora": lambda: plan({tmp_path / "ip.bin": 1.0}, {}),
        "textual_inversion": lambda: add_tokens({"<cat>": tmp_path / "ip.bin"}, {}, {}),
    }
    with pytest.raises(CheckpointError, match=r"ip.bin is an IP-Adapter, which needs an image encoder"):
        call[how]()
