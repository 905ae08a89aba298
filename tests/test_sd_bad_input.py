"""Files that are not what they should be: each is refused with a message that says so, and nothing in them runs."""

import io
import json
import pickle
import re
import shutil
import struct
import sys
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import sd_tiny
from safetensors.numpy import load_file, save_file

from mmdjax.checkpoint import CheckpointError, open_safetensors
from mmdjax.sd.files.places import open_file
from mmdjax.sd.models import load_component, load_models, module_from_config, save


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return sd_tiny.write(tmp_path_factory.mktemp("sound") / "unet", sd_tiny.UNET)


@pytest.fixture
def unet(sound, tmp_path):
    """A sound folder to be spoilt, and its weights."""
    return shutil.copytree(sound.parent, tmp_path / "unet") / sound.name


def refused(path, *texts, error=CheckpointError, load=open_file):
    with pytest.raises(error) as info:
        load(path)
    for text in texts:
        assert text in str(info.value)


# --- safetensors ---


@pytest.mark.parametrize("keep", [0, 5, 200, -1, -1000])
def test_truncated(unet, keep):
    data = unet.read_bytes()
    unet.write_bytes(data[:keep])
    refused(unet, "diffusion_pytorch_model.safetensors is not a sound safetensors file")
    if keep < 0:
        refused(unet, "the file is cut off")


@pytest.mark.parametrize("length", [2**62, 5 * 10**12, 10**7])
def test_header_longer_than_the_file(unet, length):
    data = unet.read_bytes()
    unet.write_bytes(struct.pack("<Q", length) + data[8:])
    refused(unet, f"its header claims {length:,} bytes of a file of {len(data):,}")


def test_header_of_wrong_length(unet):
    data = unet.read_bytes()
    unet.write_bytes(struct.pack("<Q", 100) + data[8:])
    refused(unet, "its header is not JSON")


def header(path, entry, data=b""):
    head = json.dumps({"w": entry}).encode() if isinstance(entry, dict) else entry
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)
    return path


def test_tensor_claims_terabytes(tmp_path):
    entry = {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}
    refused(
        header(tmp_path / "x.safetensors", entry, b"1234"),
        "'w' ends at byte 4,000,000,000,000 of 4: the file is cut off",
    )


def test_shape_that_overflows(tmp_path):
    entry = {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}  # 2⁶⁴ wraps to 0
    refused(header(tmp_path / "x.safetensors", entry), "takes 73,786,976,294,838,206,464 bytes, its entry says 0")


TWICE = json.dumps({key: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for key in "vw"}).encode()


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "'w' of shape [2] and dtype F32 takes 8 bytes"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "the entry of 'w' lacks a dtype, a shape or offsets"),
        ({"dtype": "F32", "shape": [1]}, "the entry of 'w' lacks"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}, "takes 4 bytes"),
        ({"dtype": "F3", "shape": [1], "data_offsets": [0, 4]}, "'w' is of dtype F3; known: F64, F32"),
        (b"[]", "its header is not a JSON object"),
        (b'{"w": 3}', "the entry of 'w' lacks"),
        (b"\xff\xfe", "its header is not JSON"),
        (b"[" * 100_000, "its header is not JSON"),
        ({"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}, "the entry of 'w' lacks"),
        ({"dtype": "F32", "shape": [1] * 40, "data_offsets": [0, 4]}, "the entry of 'w' lacks"),
        (b'{"__metadata__": 5}', "its __metadata__ are not strings"),
        (b'{"__metadata__": {"a": 5}}', "its __metadata__ are not strings"),
        (TWICE, "'v' and 'w' overlap"),
    ],
)
def test_unsound_header(tmp_path, entry, text):
    refused(header(tmp_path / "x.safetensors", entry, b"1234"), text)


def test_neither_format(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"<!DOCTYPE html>")
    refused(tmp_path / "x.bin", "x.bin is neither safetensors nor a PyTorch archive")
    (tmp_path / "x.safetensors").write_bytes(b"<!DOCTYPE html>")
    refused(tmp_path / "x.safetensors", "not a sound safetensors file")


# --- pickles ---

CALLED = []


class Harmful:
    """Pickled, it calls a function of this module, which is how code runs on loading."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def harm(*args):
    CALLED.append(args)


def archive(path, tree, *, data=b"", program=None, compression=zipfile.ZIP_STORED, storage="0"):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickle.dumps(tree, protocol=2) if program is None else program)
        file.writestr(f"archive/data/{storage}", data)
    return path


def tensor_program(shape=(2,), strides=(1,), offset=0, dtype="FloatStorage", extra=b""):
    """The pickle that torch.save writes for {"w": tensor}, in plain opcodes."""

    out = io.BytesIO()
    out.write(b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n(")
    out.write(
        b"(X\x07\x00\x00\x00storagectorch\n" + dtype.encode() + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQ"
    )
    for value in (offset, shape, strides):
        out.write(pickle.dumps(value, protocol=2)[2:-1])
    out.write(b"\x89}tRs" + extra + b".")
    return out.getvalue()


def test_sound_archive(tmp_path):
    path = archive(tmp_path / "x.ckpt", None, program=tensor_program(), data=np.array([1.5, -2.5], "f4").tobytes())
    np.testing.assert_array_equal(open_file(path)["w"], [1.5, -2.5])


@pytest.mark.parametrize("where", ["top", "state_dict", "key"])
def test_pickle_with_code_runs_nothing(tmp_path, where):
    harmful = Harmful(harm, "ran")
    tree = {"top": [harmful], "state_dict": {"state_dict": {"w": harmful}}, "key": {"optimizer": {"x": harmful}}}[where]
    CALLED.clear()
    path = archive(tmp_path / "x.ckpt", tree)
    refused(
        path, "x.ckpt asks for test_sd_bad_input.harm, which is not a tensor", "nothing in it was run", "safetensors"
    )
    assert not CALLED


@pytest.mark.parametrize(
    ("module", "name"),
    [
        *(("posix", "system"), ("builtins", "eval"), ("torch", "load"), ("torch._utils", "_import_dotted_name")),
        *(("numpy", "load"), ("collections", "deque"), ("mmdjax.sd.files.archive", "zipfile")),
        *(("torch", "float16.to"), ("torch._utils", "_rebuild_wrapper_subclass"), ("torchx", "Size")),
    ],
)
def test_other_globals_are_refused_by_name(tmp_path, module, name):
    program = f"\x80\x02c{module}\n{name}\n(X\x04\x00\x00\x00truetR.".encode("latin1")
    refused(archive(tmp_path / "x.ckpt", None, program=program), f"x.ckpt asks for {module}.{name}")


def test_training_leftovers_are_inert(tmp_path):
    """The published latent-diffusion files name Lightning's ModelCheckpoint: read as nothing, imported never."""
    leftovers = (
        b"X\x09\x00\x00\x00callbackscpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n"
        b")\x81}X\x01\x00\x00\x00aK\x01sbs"
    )
    path = archive(tmp_path / "x.ckpt", None, program=tensor_program(extra=leftovers), data=bytes(8))
    assert list(open_file(path)) == ["w"]
    assert "pytorch_lightning" not in sys.modules


@pytest.mark.parametrize(
    "name",
    [
        *("torch float16", "torch Size", "torch device", "torch.nn.parameter Parameter", "torch strided"),
        *("builtins set", "__builtin__ complex", "collections Counter", "argparse Namespace", "torch bits1x8"),
    ],
)
def test_harmless_types_are_inert(tmp_path, name):
    """Those that torch's own restricted loader reads: called, filled and read as nothing."""
    module, cls = name.split()
    called = f"X\x05\x00\x00\x00extrac{module}\n{cls}\n(K\x01K\x02tR".encode()
    filled = b"(K\x01K\x02u}X\x01\x00\x00\x00aK\x01sbs"  # as a mapping, and by its state
    path = archive(tmp_path / "x.ckpt", None, program=tensor_program(extra=called + filled), data=bytes(8))
    assert list(open_file(path)) == ["w"]


@pytest.mark.parametrize("where", ["model", "module", "ema", "params", "state_dict"])
def test_tensors_within(tmp_path, where):
    """Training scripts keep them under one of a few names."""
    program = tensor_program()[2:-1]
    whole = b"\x80\x02}X" + len(where).to_bytes(4, "little") + where.encode() + program + b"s."
    path = archive(tmp_path / "x.ckpt", None, program=whole, data=bytes(8))
    assert list(open_file(path)) == ["w"]


def test_pickle_cannot_alter_what_reads_it(tmp_path):
    # BUILD with a pair sets attributes, here on the constructor of tensors: on a copy of it, made for this one mention
    program = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(N}X\x01\x00\x00\x00aK\x01stb0" + tensor_program()[2:]
    assert list(open_file(archive(tmp_path / "x.ckpt", None, program=program, data=bytes(8)))) == ["w"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"shape": (3,)}, "'w' of shape [3] reaches beyond its storage"),
        ({"offset": 1}, "reaches beyond its storage"),
        ({"shape": (2, 2), "strides": (10**12, 1)}, "reaches beyond its storage"),
        ({"shape": (-1,)}, "'w' is not a tensor that torch.save wrote"),
        ({"strides": (-1,)}, "'w' is not a tensor that torch.save wrote"),
        ({"strides": ()}, "'w' is not a tensor that torch.save wrote"),
        ({"dtype": "QInt8Storage"}, "x.ckpt asks for torch.QInt8Storage"),
    ],
)
def test_tensor_that_lies(tmp_path, change, text):
    refused(archive(tmp_path / "x.ckpt", None, program=tensor_program(**change), data=bytes(8)), text)


def test_damaged_archives(tmp_path):
    path = archive(tmp_path / "x.ckpt", None, program=tensor_program(), data=bytes(8))
    path.write_bytes(path.read_bytes()[:-30])
    refused(path, "x.ckpt is not a whole zip archive", "cut off")
    refused(archive(tmp_path / "y.ckpt", None, program=b"\x80\x02}"), "y.ckpt holds a pickle that cannot be read")
    refused(
        archive(tmp_path / "y.ckpt", {"a": 1}),
        'y.ckpt holds no tensors, neither at the top nor under "state_dict" or ema, model',
    )
    refused(archive(tmp_path / "y.ckpt", {"epoch": 3, "opt": {}}), "there are 'epoch', 'opt'")
    refused(archive(tmp_path / "y.ckpt", [1]), "y.ckpt holds no tensors")
    lost = archive(tmp_path / "y.ckpt", None, program=tensor_program(), data=bytes(8), storage="7")
    refused(lost, "the data of 'w' are missing from the archive")
    packed = archive(
        tmp_path / "y.ckpt", None, program=tensor_program(), data=bytes(8), compression=zipfile.ZIP_DEFLATED
    )
    refused(packed, "the archive is compressed")
    with zipfile.ZipFile(tmp_path / "z.ckpt", "w") as file:
        file.writestr("hello.txt", "hello")
    refused(tmp_path / "z.ckpt", "z.ckpt is a zip archive without data.pkl")


def test_legacy_pickle(tmp_path):
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps([Harmful(harm)], protocol=2))
    refused(tmp_path / "x.ckpt", "the format of PyTorch before 1.6", "convert it to safetensors")


# --- folders ---


def load_unet(weights):
    return load_component(weights.parent)


def test_config_without_weights(unet):
    unet.unlink()
    refused(unet, "unet: no weights beside config.json", error=FileNotFoundError, load=load_unet)


def test_weights_without_config(unet):
    (unet.parent / "config.json").unlink()
    refused(unet, "unet: no config.json, which says what the weights are", error=FileNotFoundError, load=load_unet)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_config_that_is_not_json(unet, text):
    (unet.parent / "config.json").write_text(text)
    refused(unet, "unet/config.json is not ", load=load_unet)


def test_missing_variant(unet):
    unet.rename(unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
    sd_tiny.write(unet.parent, sd_tiny.UNET)
    with pytest.raises(FileNotFoundError, match="unet: no bf16 weights; there are: fp16, plain"):
        load_component(unet.parent, variant="bf16")


def shard(unet, places):
    tensors = load_file(unet)
    names = sorted(tensors)
    parts = {f"diffusion_pytorch_model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for name, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, unet.with_name(name))
    index = {"weight_map": {key: name for name, keys in parts.items() for key in keys} | places}
    unet.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    unet.unlink()
    return list(parts)


def test_missing_shards(unet):
    first, second, _ = shard(unet, {})
    load_unet(unet)
    unet.with_name(first).unlink()
    unet.with_name(second).unlink()
    refused(unet, f"unet: 2 of 3 shards are missing: {first}, {second}", error=FileNotFoundError, load=load_unet)


def test_index_that_misplaces(unet):
    _first, *_ = shard(unet, {"x": "diffusion_pytorch_model-00001-of-00003.safetensors"})
    refused(unet, "places ['x'] (1 in all) in shards that lack them", load=load_unet)


def test_index_that_points_outside(unet):
    shard(unet, {"x": "../secret.safetensors"})
    refused(unet, "points outside its folder", load=load_unet)


def test_index_without_map(unet):
    shard(unet, {})
    unet.with_name("diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    refused(unet, "is not an index of shards", load=load_unet)


@pytest.mark.parametrize("stored", [jnp.float32, jnp.bfloat16])
def test_weights_that_overflow_float16(unet, stored):
    tensors = {key: value.astype(stored) for key, value in load_file(unet).items()}
    tensors["conv_in.weight"][0, 0, 0, 0] = -1e5
    save_file(tensors, unet)
    text = "conv_in.weight holds values beyond float16's largest, 65,504; give param_dtype=jnp.bfloat16"

    def load_half(weights):
        return load_component(weights.parent, param_dtype=jnp.float16)

    refused(unet, f"{unet.name}: {text}", load=load_half)
    component = load_component(unet.parent, param_dtype=jnp.bfloat16)
    save(unet.parent / "saved", {"unet": component})  # and in our own layout
    with pytest.raises(CheckpointError, match=r"saved/unet.safetensors: conv_in.weight holds values beyond float16's"):
        load_models(unet.parent / "saved", param_dtype=jnp.float16)


# --- the wrong model ---


def test_all_differences_are_one_error(unet):
    """Porting 27: missing, unused and mis-shaped keys, every one of them named."""
    tensors = load_file(unet)
    for key in ("conv_in.bias", "conv_out.weight"):
        tensors.pop(key)
    tensors["mid_block.resnets.0.extra"] = np.zeros(3, np.float32)
    tensors["conv_norm_out.weight"] = np.zeros(7, np.float32)
    save_file(tensors, unet)
    refused(
        unet,
        "diffusion_pytorch_model.safetensors as UNet2DCondition: 2 keys missing, 1 unused, 1 of another shape",
        "  missing: conv_in.bias [32]\n  missing: conv_out.weight [4, 32, 3, 3]",
        "  unused: mid_block.resnets.0.extra [3]",
        "  shape: conv_norm_out.weight is [7], the model wants [32]",
        load=load_unet,
    )


def test_weights_of_another_architecture(unet):
    vae = sd_tiny.write(unet.parent.parent / "vae", sd_tiny.VAE)
    vae.rename(unet)
    refused(unet, "as UNet2DCondition:", "another network's weights", "  unused: decoder.* (66 keys)\n", load=load_unet)


def test_shape_with_ones_is_another_shape(unet):
    tensors = load_file(unet)
    tensors["conv_in.bias"] = tensors["conv_in.bias"][:, None]
    save_file(tensors, unet)
    refused(unet, "shape: conv_in.bias is [32, 1], the model wants [32]", load=load_unet)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        (["lora_unet_down_blocks_0.lora_down.weight"], "is a LoRA: a change to a model; give it beside its model"),
        (["unet.down_blocks.0.attentions.0.to_q.lora_A.weight"], "is a LoRA"),
        (["unet.mid_block.attentions.0.to_q.lora.up.weight"], "is a LoRA"),
        (["lora_te_text_model.hada_w1_a"], "is a LoRA"),
        (["controlnet_cond_embedding.conv_in.weight"], "is a ControlNet, which needs a model of its own"),
        (["control_model.input_blocks.0.0.weight"], "is a ControlNet"),
        (["emb_params"], "is a textual inversion"),
        (["layer.weight"], "holds no U-Net, autoencoder or text encoder"),
    ],
)
def test_other_kinds_of_file(unet, keys, text):
    path = unet.parent.parent / "x.safetensors"
    save_file({key: np.zeros(2, np.float32) for key in keys}, path)
    refused(path, f"x.safetensors {text}", load=load_models)
    path.rename(unet)  # and the same beside a U-Net's config
    if "holds" not in text:
        refused(unet, text, load=load_unet)


@pytest.mark.parametrize("name", ["ControlNetModel", "ChromaTransformer2DModel", None])
def test_config_of_another_class(name):
    with pytest.raises(ValueError, match=f"config.json is of {name!r}, which is not implemented"):
        module_from_config({"_class_name": name})


def test_settings_that_are_not_implemented_are_all_named():
    raw = sd_tiny.UNET | {
        "act_fn": "mish",
        "class_embed_type": "timestep",
        "new_setting": 3,
        "_private": 1,
        "null": None,
    }
    with pytest.raises(ValueError, match="UNet2DConditionModel with settings that") as info:
        module_from_config(raw)
    for text in ("act_fn = 'mish' (implemented: 'silu')", "class_embed_type = 'timestep'", "new_setting = 3 (unknown)"):
        assert text in str(info.value)
    assert "null" not in str(info.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, r"blocks \['AttnDownBlock2D'\] are not implemented"),
        ({"attention_head_dim": 5}, "32 channels cannot be split in 5 heads"),
        ({"attention_head_dim": [8]}, "differ in length"),
        ({"addition_embed_type": "text_time"}, "an SDXL U-Net needs addition_time_embed_dim"),
        ({"addition_embed_type": "image"}, "addition_embed_type is 'image'"),
    ],
)
def test_settings_that_do_not_fit(change, text):
    with pytest.raises(ValueError, match=text):
        module_from_config(sd_tiny.UNET | change)


def test_text_encoder_that_does_not_say_what_it_is():
    with pytest.raises(ValueError, match="hidden_act is 'relu'"):
        module_from_config(sd_tiny.TEXT | {"hidden_act": "relu"})
    with pytest.raises(ValueError, match="is of None"):
        module_from_config({key: value for key, value in sd_tiny.TEXT.items() if key != "architectures"})


def test_no_such_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_models(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no model; looked for"):
        load_models(tmp_path)


def test_hub_id_without_the_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="someone/model is no local path; to fetch it"):
        load_models("someone/model")


def test_ema_of_a_folder(unet):
    with pytest.raises(ValueError, match="ema=True is for single files"):
        load_models(unet.parent, ema=True)


def test_saved_by_a_newer_version(tmp_path):
    (tmp_path / "mmdjax.json").write_text('{"format": 99, "components": {}}')
    with pytest.raises(CheckpointError, match="is of format 99; this version reads 1"):
        load_models(tmp_path)


# --- what is small to write and large to hold ---


def test_header_out_of_proportion(tmp_path):
    header = b"{" + b",".join(b'"k%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(30000)) + b"}"
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    refused(tmp_path / "x.safetensors", "which is more than a model's does")


def test_memo_of_billions(tmp_path):
    """A pickle of ten bytes for which the unpickler in C takes 32 GB."""
    program = b"\x80\x02Nr\xff\xff\xff\x7f."
    refused(archive(tmp_path / "x.ckpt", None, program=program), "holds no tensors")


@pytest.mark.parametrize("text", ["[" * 100000, '{"a":' * 100000, "[" + "{}," * 2**21 + "1]"])
def test_json_that_is_deep_or_huge(unet, text):
    (unet.parent / "config.json").write_text(text)
    refused(unet.parent, "unet/config.json", load=load_component)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"layers_per_block": 10**9}, "describes a network of 2 levels and"),
        ({"block_out_channels": [32] * 40, "down_block_types": ["DownBlock2D"] * 40}, "of 40 levels"),
        ({"block_out_channels": "ab"}, "block_out_channels is 'ab'"),
        ({"cross_attention_dim": -16}, "cross_attention_dim is -16"),
        ({"norm_eps": float("inf")}, "norm_eps is inf"),
        ({"attention_head_dim": 0}, "cannot be split in 0 heads"),
    ],
)
def test_settings_of_another_kind(change, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        module_from_config(sd_tiny.UNET | change)


def test_norm_without_groups(unet):
    (unet.parent / "config.json").write_text(json.dumps(sd_tiny.UNET | {"norm_num_groups": 0}))
    text = "the configuration describes no UNet2DCondition that works"
    refused(unet.parent, text, error=ValueError, load=load_component)


def test_reading_allocates_nothing(tmp_path):
    save_file({"w": np.zeros((1000, 1000), np.float32)}, tmp_path / "x.safetensors")
    w = open_safetensors(tmp_path / "x.safetensors")["w"]
    assert not w.flags.owndata
    assert not w.flags.writeable
