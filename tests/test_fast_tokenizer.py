"""The tokenizers of T5 and Qwen3 without torch, on vocabularies of a few pieces written by hand."""

import dataclasses
import json
import random
import struct

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mmdjax.checkpoint import CheckpointError
from mmdjax.sd.text.fast_tokenizer import CONVERSATION
from mmdjax.sd.text.spiece import read_spiece
from mmdjax.sd.text.tokenizer import Tokenizer, load_tokenizer
from mmdjax.sd.tiny import BYTES, write_vocabulary

PAD, END, UNKNOWN = 0, 1, 2
PIECES = ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁cat", "c", "a", "t", "s", "▁dog", "<mark>"]
KINDS = {"<pad>": 3, "</s>": 3, "<unk>": 2, "<mark>": 4}


def field(number, value):
    """A field of a protocol buffer."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value):
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def spiece(pieces=PIECES, trainer=((3, 1), (40, UNKNOWN)), normalizer=((1, b"identity"),)):
    """A spiece.model; longer pieces are more probable than their parts."""
    data = b""
    for piece in pieces:
        score = -1.0 if len(piece) > 2 else -2.0
        data += field(1, field(1, piece.encode()) + field(2, score) + field(3, KINDS.get(piece, 1)))
    data += field(2, b"".join(field(*pair) for pair in trainer))
    return data + field(3, b"".join(field(*pair) for pair in normalizer))


@pytest.fixture
def t5(tmp_path):
    folder = tmp_path / "t5"
    folder.mkdir()
    (folder / "spiece.model").write_bytes(spiece())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "model_max_length": 8}')
    return folder


@pytest.fixture
def qwen(tmp_path):
    """Bytes, one merge, and the tokens of a conversation; no settings."""
    folder = tmp_path / "qwen"
    folder.mkdir()
    vocabulary = {sign: i for i, sign in enumerate(BYTES)} | {"ca": 256}
    encoding = tokenizers.Tokenizer(models.BPE(vocabulary, [("c", "a")]))
    encoding.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoding.decoder = decoders.ByteLevel()
    encoding.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    encoding.add_tokens(["<think>", "</think>"])
    encoding.save(str(folder / "tokenizer.json"))
    return folder


def settings(folder, **changes):
    path = folder / "tokenizer_config.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | changes))


def test_pieces_end_and_padding(t5):
    tokenizer = load_tokenizer(t5)
    ids, mask = tokenizer.encode(["a cat", "", "  cats \n dog", "<extra_id_0> a", "é", "a<mark>"])
    assert ids.tolist() == [
        [4, 5, END, 0, 0, 0, 0, 0],
        [END, 0, 0, 0, 0, 0, 0, 0],
        [5, 9, 10, END, 0, 0, 0, 0],
        [len(PIECES) + 99, 4, END, 0, 0, 0, 0, 0],
        [3, UNKNOWN, END, 0, 0, 0, 0, 0],
        [4, 11, END, 0, 0, 0, 0, 0],
    ]
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(mask.sum(1), [3, 1, 4, 3, 3, 3])
    assert (ids[~mask] == PAD).all()
    assert (np.diff(mask.astype(int)) <= 0).all()  # padding at the end
    np.testing.assert_array_equal(tokenizer(["a cat"]), ids[:1])


def test_the_conversation_around_a_prompt(qwen):
    tokenizer = load_tokenizer(qwen)
    ids, mask = tokenizer.encode(["ca", "<|im_end|>"])
    assert ids.shape == (2, 512)
    said = [tokenizer.encoding.decode(ids[i][mask[i]].tolist(), skip_special_tokens=False) for i in range(2)]
    assert said == [CONVERSATION[0] + text + CONVERSATION[1] for text in ("ca", "<|im_end|>")]
    assert 256 in ids[0]
    assert tokenizer.pad == 257
    assert (ids[~mask] == tokenizer.pad).all()
    assert (ids[:, 0] == 258).all()


def test_long_prompts_are_cut_with_a_warning(t5, qwen):
    short = dataclasses.replace(load_tokenizer(t5), length=3)
    assert short(["cat dog"]).tolist() == [[5, 10, END]]  # fits: no warning
    with pytest.warns(
        UserWarning, match="of 4 tokens was cut to the 2 that the text encoder takes; left out: 'a  dog'"
    ):
        assert short(["cat cat a  dog"]).tolist() == [[5, 5, END]]
    whole = load_tokenizer(qwen)
    fits = int(whole.encode(["ca dog"]).mask.sum())
    cut = dataclasses.replace(
        whole, length=fits - 5
    )  # of the end of the conversation alone: nothing of the prompt is lost
    np.testing.assert_array_equal(cut(["ca dog"]), whole(["ca dog"])[:, : fits - 5])
    inside = whole(["ca dog"])[0].tolist().index(BYTES.index("d"))
    with pytest.warns(UserWarning, match="left out: 'dog'"):
        dataclasses.replace(whole, length=inside)(["ca dog"])
    with pytest.raises(ValueError, match="length is 1; give at least 2"):
        dataclasses.replace(short, length=1)


@pytest.mark.parametrize("kind", ["t5", "qwen"])
def test_saved_byte_by_byte(kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    load_tokenizer(folder).save(tmp_path / "again")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == files


def test_which_tokenizer_a_folder_has(t5, qwen, tmp_path):
    """By its class, or else by its files."""
    (t5 / "tokenizer_config.json").unlink()
    found = [load_tokenizer(t5), load_tokenizer(qwen)]
    assert [(tokenizer.kind.name, tokenizer.length) for tokenizer in found] == [
        ("T5Tokenizer", 512),
        ("Qwen2Tokenizer", 512),
    ]
    assert repr(found) == "[FastTokenizer(T5Tokenizer, length=512), FastTokenizer(Qwen2Tokenizer, length=512)]"
    found[0].encoding.save(str(t5 / "tokenizer.json"))
    for name in ("T5TokenizerFast", "TokenizersBackend"):
        settings(t5, tokenizer_class=name)
        assert load_tokenizer(t5).kind.name == "T5Tokenizer"
        assert load_tokenizer(t5)(["a cat"]).tolist() == found[0](["a cat"]).tolist()
    write_vocabulary(tmp_path / "clip")
    assert isinstance(load_tokenizer(tmp_path / "clip"), Tokenizer)
    settings(t5, tokenizer_class="XLMRobertaTokenizer")
    with pytest.raises(
        CheckpointError, match="tokenizer_class is 'XLMRobertaTokenizer'; implemented: CLIPTokenizer, T5"
    ):
        load_tokenizer(t5)


def test_added_tokens_are_found_in_prompts(t5):
    new = {"content": "<new>", "lstrip": True, "rstrip": True, "normalized": False, "special": True}
    settings(t5, added_tokens_decoder={str(len(PIECES) + 100): new})
    assert load_tokenizer(t5)(["a <new> dog"])[0, :4].tolist() == [4, len(PIECES) + 100, 10, END]
    settings(t5, added_tokens_decoder={"7": new})
    with pytest.raises(
        CheckpointError, match=r"t5: the added token '<new>' has id 7 in the settings but 112 in the voc"
    ):
        load_tokenizer(t5)
    for wrong in ({"x": new}, {"7": 5}, [new], {"7": {"content": 5}}):
        settings(t5, added_tokens_decoder=wrong)
        with pytest.raises(CheckpointError, match="its added tokens are no tokens by id"):
            load_tokenizer(t5)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"padding_side": "left"}, "padding_side is 'left'; implemented: 'right'"),
        ({"pad_token": "<nothing>"}, "the vocabulary lacks the token '<nothing>'"),
        ({"pad_token": {"content": 7}}, "the vocabulary lacks the token 7"),
        ({"model_max_length": "long"}, "model_max_length is 'long'; it is a number of tokens"),
        ({"model_max_length": float("nan")}, "model_max_length is nan; it is a number of tokens"),
        (
            {"chat_template": "{{ messages }}"},
            "its chat template lacks <|im_start|>, <|im_end|>, <think>, enable_thinking",
        ),
    ],
)
def test_settings_that_are_refused(qwen, change, text):
    settings(qwen, **change)
    with pytest.raises(CheckpointError) as info:
        load_tokenizer(qwen)
    assert text in str(info.value)


def test_other_bad_input(t5, qwen):
    with pytest.raises(TypeError, match="prompts is 'a cat'; give a list of strings"):
        load_tokenizer(t5)("a cat")
    (t5 / "spiece.model").unlink()
    with pytest.raises(FileNotFoundError, match=r"no vocabulary for prompts; needed: tokenizer.json or spiece.model"):
        load_tokenizer(t5)
    (t5 / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"t5/tokenizer.json is not a tokenizer"):
        load_tokenizer(t5)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "is not a SentencePiece model: 0 pieces, the unknown one is 0"),
        (b"\xff" * 20, "it ends within a number"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is not a SentencePiece model"),
        (spiece()[:-3], "is not a SentencePiece model: field 3 is cut off"),
        (spiece(trainer=((40, 99),)), "12 pieces, the unknown one is 99"),
        (spiece(trainer=((3, 2), (40, UNKNOWN))), "model_type = 2 (implemented: 1)"),
        (spiece(trainer=((35, 1), (40, UNKNOWN))), "byte_fallback = 1 (implemented: 0)"),
        (spiece(normalizer=((4, 0),)), "remove_extra_whitespaces = 0 (implemented: 1)"),
        (spiece(normalizer=((2, b"table"),)), "is not a SentencePiece model"),
        (spiece(normalizer=((2, 2**40),)), "is not a SentencePiece model"),
        (field(1, 5), "is not a SentencePiece model"),
        (field(1, field(2, 1.0)), "is not a SentencePiece model"),
        (field(1, field(1, b"\xff")), "is not a SentencePiece model"),
    ],
)
def test_spiece_models_that_are_refused(t5, data, text):
    (t5 / "spiece.model").write_bytes(data)
    with pytest.raises(CheckpointError) as info:
        load_tokenizer(t5)
    assert text in str(info.value)


def test_damaged_spiece_models_end_in_one_error(t5):
    rng, data = random.Random(0), spiece()
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 5))):
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        (t5 / "spiece.model").write_bytes(damaged[: rng.choice((len(data), rng.randrange(len(data))))])
        try:
            read_spiece(t5 / "spiece.model")
        except CheckpointError:
            refused += 1
    assert 150 < refused < 300
