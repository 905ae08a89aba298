"""T5's encoder, Qwen3 and their tokenizers against transformers, and against diffusers' FLUX.2 klein."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity needs the extra mmdjax[parity]")
pytest.importorskip("diffusers", reason="parity needs the extra mmdjax[parity]")
pytest.importorskip("transformers", reason="parity needs the extra mmdjax[parity]")
pytest.importorskip("sentencepiece", reason="parity needs the extra mmdjax[parity]")

import sentencepiece  # noqa: E402
import text_models as texts  # noqa: E402
import torch_models as tm  # noqa: E402
from diffusers import Flux2KleinPipeline  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from test_sd_tokenizer import prompts  # noqa: E402
from transformers import (  # noqa: E402
    AutoTokenizer,
    Qwen2Tokenizer,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Model,
    T5Tokenizer,
)

from mmdjax.sd.files import convert  # noqa: E402
from mmdjax.sd.models import export, load_component, module_from_config  # noqa: E402
from mmdjax.sd.text.tokenizer import load_tokenizer  # noqa: E402

TOLERANCE = 1e-5  # float32 rounding through a few layers is 1e-6; the promise is 1e-4
LENGTHS = (1, 4, 150)


@pytest.fixture(autouse=True)
def precision():
    with jax.default_matmul_precision("highest"):
        yield


def ours(folder, *args, **how):
    module, params, _ = load_component(folder, **how)
    return jax.jit(lambda params: module.apply({"params": params}, *args))(params)


def rows(length=150, lengths=LENGTHS):
    """Ids and mask of prompts of different lengths, padded at the end."""
    ids = np.random.default_rng(0).integers(3, 1200, (len(lengths), length))
    mask = np.arange(length) < np.array(lengths)[:, None]
    return np.where(mask, ids, 0), mask


def tensor(x):
    return torch.from_numpy(np.array(x))


# --- T5 ---


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("config", [texts.T5_V11, texts.T5_V10], ids=["v1.1", "v1.0"])
def test_t5(tmp_path, config, masked):
    """All states; 150 tokens, where the last bucket of distances begins at 128."""
    theirs = texts.t5(T5EncoderModel, config)
    theirs.save_pretrained(tmp_path)
    ids, mask = rows()
    with torch.no_grad():
        expected = theirs(
            tensor(ids), tensor(mask).long() if masked else torch.ones(ids.shape), output_hidden_states=True
        )
    out = ours(tmp_path, jnp.asarray(ids), jnp.asarray(mask) if masked else None)
    assert tm.relative(out.last, expected.last_hidden_state) < TOLERANCE
    assert len(out.hidden) == len(expected.hidden_states) == config["num_layers"] + 1
    for a, b in zip(out.hidden[:-1], expected.hidden_states, strict=False):
        assert tm.relative(a, b) < TOLERANCE


@pytest.mark.parametrize("buckets", [(32, 128), (16, 20), (6, 300)])
def test_t5_buckets(tmp_path, buckets):
    """Every distance up to 400, by a first layer that sees nothing else."""
    num, furthest = buckets
    config = texts.T5_V11 | {"relative_attention_num_buckets": num, "relative_attention_max_distance": furthest}
    theirs = texts.t5(T5EncoderModel, config | {"num_layers": 1})
    theirs.encoder.block[0].layer[0].SelfAttention.q.weight.data *= 0
    theirs.save_pretrained(tmp_path)
    ids, _ = rows(400, (400,))
    with torch.no_grad():
        expected = theirs(tensor(ids)).last_hidden_state
    assert tm.relative(ours(tmp_path, jnp.asarray(ids)).last, expected) < TOLERANCE


@pytest.mark.parametrize("cls", [T5ForConditionalGeneration, T5Model])
def test_t5_of_a_whole_model(tmp_path, cls):
    """The decoder and the head are left out."""
    theirs = texts.t5(cls, texts.T5_V11)
    theirs.save_pretrained(tmp_path)
    ids, mask = rows()
    with torch.no_grad():
        expected = theirs.encoder(tensor(ids), tensor(mask).long()).last_hidden_state
    assert tm.relative(ours(tmp_path, jnp.asarray(ids), jnp.asarray(mask)).last, expected) < TOLERANCE


@pytest.mark.parametrize("names", [("encoder.embed_tokens.weight",), ("shared.weight", "encoder.embed_tokens.weight")])
def test_t5_names_of_its_tokens(tmp_path, names):
    texts.t5(T5EncoderModel, texts.T5_V11).save_pretrained(tmp_path)
    ids, _ = rows()
    expected = ours(tmp_path, jnp.asarray(ids)).last
    tensors = load_file(tmp_path / "model.safetensors")
    table = tensors.pop("shared.weight")
    assert "encoder.embed_tokens.weight" not in tensors
    save_file(tensors | {name: table.clone() for name in names}, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(ours(tmp_path, jnp.asarray(ids)).last, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_as_in_transformers(tmp_path, dtype):
    """As far from float32 as transformers' own half precision, or nearer."""
    theirs = texts.t5(T5EncoderModel, texts.T5_V11)
    theirs.save_pretrained(tmp_path)
    ids, mask = rows()
    with torch.no_grad():
        exact = theirs(tensor(ids), tensor(mask).long()).last_hidden_state
        half = T5EncoderModel.from_pretrained(tmp_path, dtype=getattr(torch, dtype))
        error = tm.relative(half(tensor(ids), tensor(mask).long()).last_hidden_state.float(), exact)
    out = ours(
        tmp_path, jnp.asarray(ids), jnp.asarray(mask), dtype=getattr(jnp, dtype), param_dtype=getattr(jnp, dtype)
    )
    assert out.last.dtype == dtype
    assert 0 < tm.relative(out.last, exact) < 1.5 * error


# --- Qwen3 ---


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    "change",
    [{}, {"attention_bias": True}, {"num_key_value_heads": 1}, {"out_layers": [0, 4]}, {"out_layers": [2]}],
    ids=str,
)
def test_qwen3(tmp_path, change, masked):
    """The chosen states, those of the padding too: klein's transformer attends to them."""
    config = texts.QWEN3 | change
    theirs = texts.qwen3(Qwen3ForCausalLM, config)
    theirs.save_pretrained(tmp_path)
    ids, mask = rows(40, (1, 7, 40))
    with torch.no_grad():
        states = theirs(
            input_ids=tensor(ids), attention_mask=tensor(mask).long() if masked else None, output_hidden_states=True
        ).hidden_states
    out = ours(tmp_path, jnp.asarray(ids), jnp.asarray(mask) if masked else None)
    expected = [states[i].numpy() for i in config["out_layers"]]
    assert tm.relative(out.context, np.concatenate(expected, -1)) < TOLERANCE
    for a, b in zip(out.hidden, expected, strict=True):
        assert tm.relative(a, b) < TOLERANCE


def test_qwen3_without_its_head_and_in_shards(tmp_path):
    """Qwen3Model has no prefix; sharded files; what is not used is not loaded, and need not be there."""
    theirs = texts.qwen3(Qwen3Model)
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    ids, mask = rows(40, (1, 7, 40))
    expected = ours(tmp_path / "whole", jnp.asarray(ids), jnp.asarray(mask))
    np.testing.assert_array_equal(
        ours(tmp_path / "shards", jnp.asarray(ids), jnp.asarray(mask)).context, expected.context
    )
    _, params, _ = load_component(tmp_path / "shards")
    assert {name.split(".")[2] for name in params if ".layers." in name} == {"0", "1", "2"}
    assert not [name for name in params if name in ("lm_head", "model.norm")]


@pytest.mark.parametrize(
    ("cls", "config"), [(T5EncoderModel, texts.T5_V11), (Qwen3ForCausalLM, texts.QWEN3)], ids=["t5", "qwen3"]
)
def test_exported_for_transformers(tmp_path, cls, config):
    """Our export is a folder of transformers, every tensor with its bits."""
    make = texts.t5 if cls is T5EncoderModel else texts.qwen3
    theirs = make(cls, config)
    theirs.save_pretrained(tmp_path / "theirs")
    export(tmp_path, {"text_encoder": load_component(tmp_path / "theirs")})
    again = cls.from_pretrained(tmp_path / "text_encoder")
    ids, mask = rows(40, (1, 7, 40))
    with torch.no_grad():
        a, b = (
            model(input_ids=tensor(ids), attention_mask=tensor(mask).long(), output_hidden_states=True).hidden_states
            for model in (theirs, again)
        )
    for i in config.get("out_layers", range(len(a))):
        assert torch.equal(a[i], b[i])


# --- tokenizers ---

WRITE = {"spiece": texts.write_spiece, "unigram": texts.write_unigram, "qwen": texts.write_qwen}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizers")
    for name, write in WRITE.items():
        write(path / name)
    return path


@pytest.mark.filterwarnings("ignore:a prompt of")
@pytest.mark.parametrize("length", [16, 77])
@pytest.mark.parametrize("name", ["spiece", "unigram"])
def test_two_hundred_prompts_for_t5(folders, tmp_path, name, length):
    theirs = T5Tokenizer.from_pretrained(folders / name)
    expected = theirs(prompts(), padding="max_length", max_length=length, truncation=True)
    tokenizer = dataclasses.replace(load_tokenizer(folders / name), length=length)
    check(tokenizer, expected)
    for saved in (tokenizer, theirs):  # with tokenizer.json, where transformers 5 wrote it
        folder = tmp_path / type(saved).__name__
        saved.save(folder) if saved is tokenizer else saved.save_pretrained(folder)
        check(dataclasses.replace(load_tokenizer(folder), length=length), expected)


@pytest.mark.filterwarnings("ignore:a prompt of")
def test_two_hundred_prompts_for_klein(folders, tmp_path):
    """The ids that diffusers' pipeline makes with transformers' tokenizer and its chat template, and the condition."""
    theirs = Qwen2Tokenizer.from_pretrained(folders / "qwen")
    seen = []

    class Encoder:
        dtype, device = torch.float32, torch.device("cpu")

        def __call__(self, input_ids, attention_mask, **how):
            seen.append({"input_ids": input_ids.tolist(), "attention_mask": attention_mask.tolist()})
            return type("Output", (), {"hidden_states": [torch.zeros(*input_ids.shape, 1)] * 28})

        def modules(self):
            return iter(())

    for length in (32, 512):
        Flux2KleinPipeline._get_qwen3_prompt_embeds(Encoder(), theirs, prompts(), max_sequence_length=length)
        tokenizer = dataclasses.replace(load_tokenizer(folders / "qwen"), length=length)
        check(tokenizer, seen[-1])
    tokenizer.save(tmp_path)
    check(load_tokenizer(tmp_path), seen[-1])
    assert load_tokenizer(tmp_path).length == 512


def test_condition_of_klein(folders, tmp_path):
    """From prompts to the condition, by diffusers and by us."""
    theirs = texts.qwen3(Qwen3ForCausalLM)
    theirs.save_pretrained(tmp_path)
    given = ["a photo of a cat", "", "two dogs, one of them asleep"]
    with torch.no_grad():
        expected = Flux2KleinPipeline._get_qwen3_prompt_embeds(
            theirs,
            Qwen2Tokenizer.from_pretrained(folders / "qwen"),
            given,
            max_sequence_length=100,
            hidden_states_layers=texts.QWEN3["out_layers"],
        )
    tokenizer = dataclasses.replace(load_tokenizer(folders / "qwen"), length=100)
    out = ours(tmp_path, *map(jnp.asarray, tokenizer.encode(given)))
    assert tm.relative(out.context, expected) < TOLERANCE


@pytest.mark.parametrize("name", WRITE)
def test_saved_byte_by_byte(folders, tmp_path, name):
    load_tokenizer(folders / name).save(tmp_path)
    files = {path.name: path.read_bytes() for path in (folders / name).iterdir()}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is (Qwen2Tokenizer if name == "qwen" else T5Tokenizer)


def test_spiece_as_sentencepiece_reads_it(folders):
    """The library that T5 was trained with gives ids of the same probability; it normalises a few texts otherwise."""
    library = sentencepiece.SentencePieceProcessor(model_file=str(folders / "spiece" / "spiece.model"))
    tokenizer = dataclasses.replace(load_tokenizer(folders / "spiece"), length=600)
    same = 0
    for prompt, ids, mask in zip(prompts(), *tokenizer.encode(prompts()), strict=True):
        mine, theirs = ids[mask].tolist()[:-1], library.encode(prompt)
        normal = "".join(tokenizer.encoding.normalizer.normalize_str(prompt).split())
        if normal == library.normalize(prompt).replace("▁", ""):
            scores = [sum(map(library.get_score, ids)) for ids in (mine, theirs)]
            assert scores[0] == pytest.approx(scores[1], rel=1e-6), prompt
        same += mine == theirs
    assert same >= 190  # of 200; the others are as probable, or have combining marks


def check(tokenizer, expected):
    """Ids and mask, and for prompts that are not long no warning."""
    ids, mask = tokenizer.encode(prompts())
    theirs = np.asarray(expected["input_ids"])
    different = {
        p: (a.tolist(), b.tolist()) for p, a, b in zip(prompts(), ids, theirs, strict=True) if a.tolist() != b.tolist()
    }
    assert not different
    np.testing.assert_array_equal(mask, np.asarray(expected["attention_mask"]).astype(bool))
    np.testing.assert_array_equal(tokenizer(prompts()), ids)


# --- full size ---

FULL = {  # published sizes; the whole of Qwen3-4B has 4,022,468,096 parameters
    "t5-v1_1-xxl": (
        T5EncoderModel,
        {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"},
        4_762_310_656,
    ),
    "qwen3-4b": (
        Qwen3ForCausalLM,
        {
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000},
            "tie_word_embeddings": True,
        },
        4_022_468_096,
    ),
}


@pytest.mark.parametrize("name", FULL)
def test_tree_of_full_size(name):
    """Every name and shape, and the number of parameters; of Qwen3 also the part that klein uses."""
    cls, config, number = FULL[name]
    with torch.device("meta"):
        theirs = cls(cls.config_class(**config))
    expected = {key: tuple(value.shape) for key, value in theirs.named_parameters()}
    assert sum(map(np.prod, expected.values())) == number
    raw = json.loads(json.dumps(theirs.config.to_dict() | {"architectures": [cls.__name__]}))
    whole = {"out_layers": [36]} if name == "qwen3-4b" else {}
    assert shapes(raw | whole) == expected
    if whole:
        used = {key: shape for key, shape in expected.items() if key != "model.norm.weight"}
        assert shapes(raw) == {
            key: shape for key, shape in used.items() if ".layers." not in key or int(key.split(".")[2]) < 27
        }


def shapes(raw):
    tree = convert.abstract(module_from_config(raw))
    leaves = convert.flat(tree)
    return {key: convert.torch_shape(path[-1], leaves[path].shape) for key, path in convert.keys(tree).items()}
