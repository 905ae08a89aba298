"""LoRAs merged into a model: what each form and each spelling of a name means, and how a wrong file is refused."""

import json
import shutil
import tracemalloc

import jax
import numpy as np
import pytest
import sd_tiny
import sd_toys
from safetensors.numpy import load_file, save_file

from mmdjax._files.fingerprint import tree_hash
from mmdjax.checkpoint import Checkpoint, CheckpointError, Entry
from mmdjax.sd import load
from mmdjax.sd.files import convert
from mmdjax.sd.files.lora import merge, plan
from mmdjax.sd.files.updates import Update
from mmdjax.sd.models import Component, load_models, module_from_config

RNG = np.random.default_rng(0)
UNET = sd_tiny.UNET | {"cross_attention_dim": 32, "sample_size": 4}
TEXT = sd_tiny.TEXT | {"vocab_size": 518, "eos_token_id": 517}
Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = Q.replace("to_q", "to_out.0")
FC = "text_model.encoder.layers.0.mlp.fc1"


def component(raw, **shapes):
    """A network of a few parameters, by key and PyTorch's shape. No weights, and nothing traced."""
    params = {}
    for key, shape in shapes.items():
        path, _, leaf = key.rpartition(".")
        leaf = {"weight": "kernel", "bias": "bias"}[leaf]
        flax = convert.to_flax(leaf, np.broadcast_to(np.float32(0), shape)).shape
        params.setdefault(path, {})[leaf] = jax.ShapeDtypeStruct(flax, np.float32)
    return Component(module_from_config(raw), params, raw)


@pytest.fixture(scope="module")
def model():
    square = {f"{Q.removesuffix('to_q')}{part}.weight": (32, 32) for part in ("to_q", "to_k", "to_v", "to_out.0")}
    convolution = {"conv_in.weight": (32, 4, 3, 3), "conv_in.bias": (32,)}
    unet = component(UNET, **square, **convolution, **{"mid_block.resnets.0.time_emb_proj.weight": (32, 128)})
    text = component(
        TEXT, **{f"{FC}.weight": (48, 32), "text_model.encoder.layers.0.self_attn.v_proj.weight": (32, 32)}
    )
    return {"unet": unet, "text_encoder": text, "text_encoder_2": text}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sd_toys.write_pipeline(tmp_path_factory.mktemp("lora") / "model")


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def entries(arrays):
    return {key: Entry(x.shape, x.dtype, lambda x=x: x) for key, x in arrays.items()}


def lora(module, out, rows=None, rank=2, names=("lora_A.weight", "lora_B.weight")):
    """Two factors of a linear map's change."""
    return {f"{module}.{names[0]}": normal(rank, rows or out), f"{module}.{names[1]}": normal(out, rank)}


def written(path, tensors, **metadata):
    save_file(tensors, path, metadata or None)
    return path


# --- what a change is ---


def test_convolution_and_core_are_their_sums():
    up, down, mid = normal(5, 2, 1, 1), normal(3, 4, 1, 1), normal(2, 3, 3, 3)
    change = Update("x", entries({"lora_a": up, "lora_b": down, "lora_t": mid}), 0.5)
    expected = 0.5 * np.einsum("op,pqhw,qi->oihw", up[..., 0, 0], mid, down[..., 0, 0])
    assert change.shape == (5, 4, 3, 3)
    np.testing.assert_allclose(change.value(), expected, rtol=1e-5)
    down = normal(2, 4, 3, 3)
    change = Update("x", entries({"lora_a": up, "lora_b": down}), 0.5)
    np.testing.assert_allclose(change.value(), 0.5 * np.einsum("op,pihw->oihw", up[..., 0, 0], down), rtol=1e-5)


def test_kronecker_is_by_blocks():
    """Row o of block a is row a·c + o, for every element of a kernel."""
    w1, w2 = normal(2, 3), normal(4, 5, 3, 3)
    whole = Update("x", entries({"lokr1": w1, "lokr2": w2})).value()
    assert whole.shape == (8, 15, 3, 3)
    np.testing.assert_allclose(whole.reshape(2, 4, 3, 5, 3, 3), np.einsum("ab,cdhw->acbdhw", w1, w2))


def test_loha_is_elementwise():
    a, b, c, d = normal(4, 2), normal(2, 6), normal(4, 2), normal(2, 6)
    parts = {"hada1_a": a, "hada1_b": b, "hada2_a": c, "hada2_b": d}
    np.testing.assert_allclose(Update("x", entries(parts)).value(), (a @ b) * (c @ d))


@pytest.mark.parametrize("axis", [0, 1])
def test_dora_sets_the_norms(axis):
    """W' has the magnitudes as norms, of rows or of columns, and the direction of W + ΔW."""
    weight, magnitude = normal(3, 5), 1 + np.arange([3, 5][axis], dtype=np.float32)
    parts = {"lora_a": normal(3, 2), "lora_b": normal(2, 5), "dora_scale": np.expand_dims(magnitude, 1 - axis)}
    change = Update("x", entries(parts))
    moved = weight + change.change(weight)
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1 - axis), magnitude, rtol=1e-6)
    plain = weight + change.value()
    np.testing.assert_allclose(
        moved / np.linalg.norm(moved, axis=1 - axis, keepdims=True),
        plain / np.linalg.norm(plain, axis=1 - axis, keepdims=True),
        rtol=1e-5,
    )


# --- whose change it is ---


KOHYA = ("lora_down.weight", "lora_up.weight")
NAMES = {
    f"unet.{Q}": "to_q in diffusers",
    f"base_model.model.{Q}": "to_q in PEFT",
    Q: "to_q without a component",
    f"unet.{Q.replace('to_q', 'processor.to_q')}": "to_q of attention processors",
    "lora_unet_" + Q.replace(".", "_"): "to_q in kohya",
    "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q": "to_q in kohya, for SDXL",
    "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q": "to_q in ComfyUI",
}


@pytest.mark.parametrize("name", NAMES)
def test_spellings_of_one_weight(model, tmp_path, name):
    path = written(tmp_path / "a.safetensors", lora(name, 32, names=KOHYA))
    changes = plan({path: 0.5}, model).changes
    assert {component: list(keys) for component, keys in changes.items()} == {"unet": [f"{Q}.weight"]}


def test_spellings_of_other_weights(model, tmp_path):
    old = ("to_out_lora.down.weight", "to_out_lora.up.weight")
    tensors = lora(Q.removesuffix(".to_q") + ".processor", 32, names=old)
    tensors |= lora("lora_te1_" + FC.replace(".", "_"), 48, 32, names=KOHYA)
    tensors |= lora(
        "text_encoder_2.encoder.layers.0.self_attn", 32, names=("to_v_lora.down.weight", "to_v_lora.up.weight")
    )
    tensors |= lora("lora_unet_middle_block_0_emb_layers_1", 32, 128, names=KOHYA)
    tensors |= {"unet.conv_in.diff": normal(32, 4, 3, 3), "unet.conv_in.diff_b": normal(32)}
    found = plan({written(tmp_path / "a.safetensors", tensors): 1.0}, model)
    assert {component: sorted(keys) for component, keys in found.changes.items()} == {
        "unet": sorted(["conv_in.bias", "conv_in.weight", "mid_block.resnets.0.time_emb_proj.weight", f"{OUT}.weight"]),
        "text_encoder": [f"{FC}.weight"],
        "text_encoder_2": ["text_model.encoder.layers.0.self_attn.v_proj.weight"],
    }
    assert found.said[0] == "a.safetensors: changes 4 tensors of unet, with strength 1"


def test_alpha_by_module_by_configuration_or_rank(model, tmp_path):
    """a = alpha/rank: the module's own alpha, else the configuration's, for some modules another; else 1."""
    k, v = Q.replace("to_q", "to_k"), Q.replace("to_q", "to_v")
    tensors = {**lora(f"unet.{Q}", 32), **lora(f"unet.{k}", 32, rank=4), **lora(f"unet.{v}", 32)}
    tensors[f"unet.{Q}.alpha"] = np.array(3.0, np.float16)

    def scales(**metadata):
        path = written(tmp_path / "a.safetensors", tensors, **metadata)
        changes = plan({path: 1.0}, model).changes["unet"]
        return [changes[f"{name}.weight"][0].update.scale for name in (Q, k, v)]

    assert scales() == [1.5, 1.0, 1.0]
    settings = {"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_v": 1}}
    assert scales(lora_adapter_metadata=json.dumps(settings)) == [1.5, 2.0, 0.5]
    assert scales(lora_adapter_metadata=json.dumps(settings | {"unet.use_rslora": True}))[1] == 4.0


def test_fused_tensor_is_changed_piece_by_piece(tmp_path):
    """An unconditional model's single file keeps queries, keys and values in one, by head."""
    heads = sd_toys.UNCONDITIONAL | {"attention_head_dim": 8}
    parts = ("to_q", "to_k", "to_v")
    model = {"unet": component(heads, **{f"mid_block.attentions.0.{part}.weight": (32, 32) for part in parts})}
    up, down = normal(96, 2), normal(2, 32)
    tensors = {"lora_unet_middle_block_1_qkv.lora_up.weight": up, "lora_unet_middle_block_1_qkv.lora_down.weight": down}
    path = written(tmp_path / "a.safetensors", tensors | {"lora_unet_middle_block_1_qkv.dora_scale": normal(96, 1)})
    with pytest.raises(CheckpointError, match="block_1_qkv is a DoRA of 3 parameters in one, which is not implemented"):
        plan({path: 1.0}, model)
    changes = plan({written(path, tensors): 2.0}, model).changes["unet"]
    whole = (up @ down).reshape(4, 3, 8, 32)  # head, query/key/value, channel
    for i, part in enumerate(parts):
        (change,) = changes[f"mid_block.attentions.0.{part}.weight"]
        np.testing.assert_allclose(
            change.of(np.zeros((32, 32), np.float32)), 2 * whole[:, i].reshape(32, 32), rtol=1e-6
        )


FLUX = {"_class_name": "FluxTransformer2DModel", "num_attention_heads": 4, "attention_head_dim": 8}
FLUX |= {"axes_dims_rope": [2, 2, 4], "num_layers": 1, "num_single_layers": 1}
SD3 = {"_class_name": "SD3Transformer2DModel", "num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2}
SD3 |= {"caption_projection_dim": 32}
HALVES = [*range(32, 64), *range(32)]  # a modulation's shift and scale, in the other order in diffusers
IN_ONE = {  # a tensor's name in single files; of each parameter that is in it, its rows there
    "flux single block": (
        FLUX,
        "single_blocks_0_linear1",
        {
            **{f"single_transformer_blocks.0.attn.to_{x}": range(32 * i, 32 * i + 32) for i, x in enumerate("qkv")},
            "single_transformer_blocks.0.proj_mlp": range(96, 224),
        },
    ),
    "flux double block": (
        FLUX,
        "double_blocks_0_txt_attn_qkv",
        {f"transformer_blocks.0.attn.add_{x}_proj": range(32 * i, 32 * i + 32) for i, x in enumerate("qkv")},
    ),
    "flux modulation": (FLUX, "final_layer_adaLN_modulation_1", {"norm_out.linear": HALVES}),
    "sd3 block": (
        SD3,
        "joint_blocks_0_context_block_attn_qkv",
        {f"transformer_blocks.0.attn.add_{x}_proj": range(32 * i, 32 * i + 32) for i, x in enumerate("qkv")},
    ),
    "sd3 plain": (SD3, "joint_blocks_0_x_block_mlp_fc2", {"transformer_blocks.0.ff.net.2": range(32)}),
    "sd3 modulation": (SD3, "final_layer_adaLN_modulation_1", {"norm_out.linear": HALVES}),
    "sd3 last block": (
        SD3,
        "joint_blocks_1_context_block_adaLN_modulation_1",
        {"transformer_blocks.1.norm1_context.linear": HALVES},
    ),
}


@pytest.mark.parametrize("case", IN_ONE)
def test_names_of_a_transformers_single_file(tmp_path, case):
    """Kohya's files for FLUX and Stable Diffusion 3 name the tensors of single files."""
    raw, name, rows = IN_ONE[case]
    other = {"transformer_blocks.0.ff_context.net.0.proj.weight": (8, 32)} if raw is SD3 else {}
    shapes = {f"{key}.weight": (len(these), 32) for key, these in rows.items()} | other
    tensors = lora(f"lora_unet_{name}", sum(map(len, rows.values())), 32, names=KOHYA)
    path = written(tmp_path / "a.safetensors", tensors)
    changes = plan({path: 1.0}, {"transformer": component(raw, **shapes)}).changes["transformer"]
    whole = tensors[f"lora_unet_{name}.lora_up.weight"] @ tensors[f"lora_unet_{name}.lora_down.weight"]
    assert set(changes) == {f"{key}.weight" for key in rows}
    for key, these in rows.items():
        (change,) = changes[f"{key}.weight"]
        found = change.of(np.zeros((len(these), 32), np.float32))
        np.testing.assert_allclose(found, whole[list(these)], rtol=1e-6)


# --- merging ---


@pytest.mark.slow
def test_merged_parameters(folder, tmp_path):
    """W + s BA where the file says so, in any layout of the model, as stored or cast; nothing else changes."""
    tensors = lora(f"unet.{Q}", 32) | lora(f"text_encoder.{FC}", 48, 32)
    path = written(tmp_path / "a.safetensors", tensors)
    pipeline, plain = load(folder)
    _, merged = load(folder, lora={path: 0.5})
    _, halved = load(folder, lora={path: 0.5}, param_dtype={"unet": np.float16})
    pipeline.save(tmp_path / "saved", plain)
    _, saved = load(tmp_path / "saved", lora={path: 0.5})
    for name, key in (("unet", f"{Q}.weight"), ("text_encoder", f"{FC}.weight")):
        where = convert.keys(plain[name])
        module = f"{name}.{key.removesuffix('.weight')}"
        expected = 0.5 * tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
        for other in where:
            before, after, again = (convert.flat(tree[name])[where[other]] for tree in (plain, merged, saved))
            np.testing.assert_array_equal(after, again)
            if other != key:
                np.testing.assert_array_equal(before, after)
                continue
            np.testing.assert_allclose(np.asarray(after - before).T, expected, atol=1e-6)
            half = convert.flat(halved[name])[where[other]]
            np.testing.assert_array_equal(half, after.astype(half.dtype))
    assert convert.flat(halved["unet"])[convert.keys(plain["unet"])[f"{Q}.weight"]].dtype == np.float16
    # whatever stands before the names of the model's file
    shutil.copytree(folder, tmp_path / "prefixed")
    (weights,) = (tmp_path / "prefixed" / "unet").glob("*.safetensors")
    save_file({f"module.{key}": value for key, value in load_file(weights).items()}, weights)
    _, prefixed = load(tmp_path / "prefixed", lora={path: 0.5})
    assert tree_hash(prefixed) == tree_hash(merged)
    # strength 0 is the plain model bit for bit; another strength is another model to runs and packs
    _, zero = load(folder, lora={path: 0.0})
    assert tree_hash(zero) == tree_hash(plain)
    assert tree_hash(merged) != tree_hash(plain)


def test_strength_zero_changes_no_bit(model, tmp_path):
    """Not even the entry that is read: the plain weight, also where a change would not be finite."""
    tensors = lora(f"unet.{Q}", 32)
    tensors[f"unet.{Q}.lora_B.weight"][0] = np.nan
    plain = Checkpoint(entries({f"{Q}.weight": normal(32, 32), "conv_in.bias": normal(32)}), "x")
    found = merge(plan({written(tmp_path / "a.safetensors", tensors): 0.0}, model).changes["unet"], plain)
    assert all(found.stored[key] is plain.stored[key] for key in plain)


def test_merged_weight_is_as_stored_or_cast(model, tmp_path):
    """Half precision stays what it is; the sum is made in float32 and rounded once."""
    tensors, weight = lora(f"unet.{Q}", 32), normal(32, 32).astype(np.float16)
    changes = plan({written(tmp_path / "a.safetensors", tensors): 0.1}, model).changes["unet"]
    base = Checkpoint(entries({f"{Q}.weight": weight}), "x")
    up, down = tensors[f"unet.{Q}.lora_B.weight"], tensors[f"unet.{Q}.lora_A.weight"]
    exact = weight.astype(np.float32) + np.float32(0.1) * (up @ down)
    np.testing.assert_array_equal(merge(changes, base)[f"{Q}.weight"], exact.astype(np.float16))
    np.testing.assert_array_equal(merge(changes, base, np.float32)[f"{Q}.weight"], exact)


def test_changes_add_up_in_any_order(model, tmp_path):
    one = written(tmp_path / "a.safetensors", lora(f"unet.{Q}", 32))
    two = written(tmp_path / "b.safetensors", lora(f"unet.{Q}", 32) | {f"unet.{Q}.dora_scale": 1 + normal(32, 1) ** 2})
    weight = normal(32, 32)
    base = Checkpoint(entries({f"{Q}.weight": weight}), "x")

    def merged(strengths):
        return merge(plan(strengths, model).changes["unet"], base)[f"{Q}.weight"]

    both = merged({one: 0.5, two: -2.0})
    np.testing.assert_allclose(both, merged({two: -2.0, one: 0.5}), atol=1e-6)
    np.testing.assert_allclose(both - weight, merged({one: 0.5}) + merged({two: -2.0}) - 2 * weight, atol=1e-5)


def test_merging_keeps_one_tensor_at_a_time(tmp_path):
    """So that a merged model takes the memory of the plain one: a tensor is changed when it is read, and not kept."""
    n, side = 30, 256  # tensors of 256 kB
    tensors = {f"{i}.weight": np.ones((side, side), np.float32) for i in range(n)}
    model = {"unet": component(UNET, **{key: x.shape for key, x in tensors.items()})}
    path = written(tmp_path / "a.safetensors", {k: v for i in range(n) for k, v in lora(f"unet.{i}", side).items()})
    merged = merge(plan({path: 1.0}, model).changes["unet"], Checkpoint(entries(tensors), "x"))
    tracemalloc.start()
    for key in merged:
        assert np.ptp(merged[key]) > 0
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * side**2 * 4


def test_strength_by_component_leaves_the_others_out(model, tmp_path):
    path = written(tmp_path / "a.safetensors", lora(f"unet.{Q}", 32) | lora(f"text_encoder.{FC}", 48, 32))
    changes = plan({path: {"text_encoder": 0.3}}, model).changes
    assert {name: [c.strength for these in keys.values() for c in these] for name, keys in changes.items()} == {
        "text_encoder": [0.3]
    }
    assert set(plan({path: {"unet": 1.0}}, {"unet": model["unet"]}).changes) == {"unet"}


# --- wrong files ---


def pairs(*names):
    return {key: value for name in names for key, value in lora(name, 32).items()}


WRONG = {
    "another model": (
        pairs(*(f"unet.other.{i}" for i in range(600))),
        r"^a.safetensors is a LoRA for another model than this \(unet, text_encoder, text_encoder_2\): of its 600 "
        r"modules 600 have no place \(unet.other.0, unet.other.1, unet.other.10 and 597 more\)$",
    ),
    "some astray": (
        pairs(f"unet.{Q}", f"unet.{OUT}", "unet.other"),
        r"^a.safetensors: of its 3 modules 1 have no place in this model \(unet, text_encoder, text_encoder_2\), 0 "
        r"another shape\n  no place: unet.other\nto leave them out: .* --allow-unused PATTERN, such as .unet.other.$",
    ),
    "another size": (
        lora(f"unet.{Q}", 64),
        rf"of its 1 modules 1 have another shape, as unet.{Q} changes \[64, 64\], {Q}.weight of unet is \[32, 32\]$",
    ),
    "no such component": (
        pairs("transformer.x", "transformer.y"),
        r"^a.safetensors changes transformer \(transformer.x, transformer.y\), which is not in this model \(unet, "
        r"text_encoder, text_encoder_2\); to leave it out, give the strength by component: lora={file: {'unet': 1.0}}$",
    ),
    "which encoder": (
        lora(FC, 48, 32),
        rf"{FC} may be of text_encoder or of text_encoder_2; give the strength by comp",
    ),
    "half of a pair": ({f"unet.{Q}.lora_A.weight": normal(2, 32)}, rf"unet.{Q} lacks its lora_up \(lora_B\)$"),
    "ranks": (
        {f"unet.{Q}.lora_A.weight": normal(2, 32), f"unet.{Q}.lora_B.weight": normal(32, 3)},
        rf"unet.{Q}: its factors \[32, 3\] and \[2, 32\] do not multiply",
    ),
    "alpha alone": ({f"unet.{Q}.alpha": normal()}, "mixes no parts"),
    "alpha": (lora(f"unet.{Q}", 32) | {f"unet.{Q}.alpha": np.float32([np.nan])}, "has alpha nan and rank 2"),
    "alphas": (lora(f"unet.{Q}", 32) | {f"unet.{Q}.alpha": normal(2)}, r"the alpha of .* has shape \[2\]"),
    "twice": (pairs(f"unet.{Q}", Q), rf"a.safetensors: unet.{Q} changes {Q}.weight, and so does {Q}$"),
    "a model": (
        {"conv_in.weight": normal(2), "conv_in.bias": normal(2)},
        r"is no LoRA: 2 of its 2 keys are none's, as con",
    ),
    "unknown": (
        lora(f"unet.{Q}", 32) | {"unet.step": normal()},
        r"1 keys are none that a LoRA has\n  unknown: unet.step\nto leave them out: ",
    ),
    "OFT": ({f"lora_unet_{Q}.oft_blocks": normal(2)}, r"is OFT, which is not implemented; implemented: LoRA with conv"),
    "GLoRA": ({"lora_unet_x.a1.weight": normal(2)}, "is GLoRA, which is not implemented"),
    "ControlNet": ({"controlnet_cond_embedding.conv_in.weight": normal(2)}, "is a ControlNet, which needs a model"),
    "Control-LoRA": ({"lora_controlnet": normal(2)}, "is a ControlNet"),
    "IP-Adapter": ({"image_proj.norm.weight": normal(2), "ip_adapter.1.to_k_ip.weight": normal(2)}, "is an IP-Adapter"),
    "embedding": ({"emb_params": normal(2, 32)}, "is a textual inversion: an embedding, not a model; give it beside"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files(model, tmp_path, case):
    tensors, text = WRONG[case]
    with pytest.raises(CheckpointError, match=text):
        plan({written(tmp_path / "a.safetensors", tensors): 1.0}, model)


def test_what_may_be_left_out(model, tmp_path):
    """By patterns of names, where they have no place; what has one is merged none the less."""
    tensors = pairs(f"unet.{Q}", "unet.other", "transformer.x") | {"unet.step": normal()}
    path = written(tmp_path / "a.safetensors", tensors)
    found = plan({path: 1.0}, model, convert.permitted(["unet.*", "transformer.*"])).changes
    assert list(found["unet"]) == [f"{Q}.weight"]
    with pytest.raises(CheckpointError, match=r"changes transformer \(transformer.x\), which is not in this model"):
        plan({path: 1.0}, model, convert.permitted("unet.*"))


def test_values_that_are_not_finite(model, tmp_path):
    tensors = lora(f"unet.{Q}", 32)
    tensors[f"unet.{Q}.lora_B.weight"][3, 1] = np.inf
    changes = plan({written(tmp_path / "a.safetensors", tensors): 1.0}, model).changes["unet"]
    with pytest.raises(CheckpointError, match=rf"a.safetensors: unet.{Q} holds values that are not finite"):
        merge(changes, Checkpoint(entries({f"{Q}.weight": normal(32, 32)}), "x"))[f"{Q}.weight"]


def test_wrong_calls(model, tmp_path):
    path = written(tmp_path / "a.safetensors", pairs(f"unet.{Q}"))
    with pytest.raises(TypeError, match=r"lora is \['a'\]; give the strength of each file: {file: 1.0}"):
        plan(["a"], model)  # pyright: ignore[reportArgumentType]
    with pytest.raises(FileNotFoundError, match=r"LoRA nowhere.safetensors: no such file or folder"):
        plan({"nowhere.safetensors": 1.0}, model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no LoRA in this folder; looked for adapter_model.safetensors"):
        plan({tmp_path / "empty": 1.0}, model)
    for strength, text in (
        (np.nan, "is nan"),
        ("1", "is '1'"),
        (True, "is True"),
        ({"unet": None}, "for unet is None"),
    ):
        with pytest.raises(ValueError, match=rf"the strength of LoRA .*a.safetensors {text}; give a finite number"):
            plan({path: strength}, model)
    with pytest.raises(
        ValueError, match=r"has a strength for 'unett'; the model has unet, text_encoder, text_encoder_2"
    ):
        plan({path: {"unett": 1.0}}, model)
    with pytest.raises(CheckpointError, match="changes nothing in the components that its strength names"):
        plan({path: {"text_encoder": 1.0}}, model)


@pytest.mark.slow
def test_wrong_files_are_told_before_weights_are_read(folder, tmp_path):
    path = written(tmp_path / "a.safetensors", pairs("unet.other"))
    with pytest.raises(CheckpointError, match="is a LoRA for another model"):
        load_models(folder, lora={path: 1.0}, put=lambda array: pytest.fail("a weight was read"))
