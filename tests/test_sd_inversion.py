"""Textual inversion: learnt vectors as rows of the text encoders' tables, and as tokens of their vocabularies."""

import dataclasses

import numpy as np
import pytest
import sd_tiny
import sd_toys
from safetensors.numpy import save_file

from mmdjax.checkpoint import Checkpoint, CheckpointError, Entry
from mmdjax.sd import load
from mmdjax.sd.files import convert
from mmdjax.sd.files.inversion import TABLE, NewRows, add_tokens
from mmdjax.sd.models import Component, module_from_config
from mmdjax.sd.text.tokenizer import load_tokenizer
from mmdjax.sd.tiny import write_vocabulary

SIZE = 518  # of the vocabulary; its last two tokens are start and end
START, A, END = 516, 320, 517
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    write_vocabulary(folder, length=8)
    return dict.fromkeys(("text_encoder", "text_encoder_2"), load_tokenizer(folder))


@pytest.fixture(scope="module")
def components():
    """Two text encoders, of width 32 and 48."""
    found = {}
    for name, width in (("text_encoder", 32), ("text_encoder_2", 48)):
        raw = sd_tiny.TEXT | {"vocab_size": SIZE, "hidden_size": width}
        found[name] = Component(module_from_config(raw), {}, raw)
    return found


def added(path, tensors, tokenizers, components, token="<cat>"):
    save_file(tensors, path)
    return add_tokens({token: path}, tokenizers, components)


@pytest.mark.parametrize("key", ["emb_params", "<its-own-name>"])
def test_one_vector(tmp_path, tokenizers, components, key):
    """The token is the caller's, whatever the file calls it; its encoder is that of its width."""
    rows = normal(48) if key != "emb_params" else normal(1, 48)
    found, new = added(tmp_path / "a.safetensors", {key: rows}, tokenizers, components)
    assert list(new) == ["text_encoder_2"]
    assert (new["text_encoder_2"].first, new["text_encoder_2"].end) == (SIZE, END)
    np.testing.assert_array_equal(new["text_encoder_2"].rows, rows.reshape(1, 48))
    assert found["text_encoder_2"](["a <cat>"]).tolist() == [[START, A, SIZE, END, *[END] * 4]]
    assert SIZE not in found["text_encoder"](["a <cat>"])
    assert SIZE not in tokenizers["text_encoder_2"](["a <cat>"])  # the caller's is as it was


def test_several_vectors_for_two_encoders(tmp_path, tokenizers, components):
    """ "<cat>" in a prompt is all of its vectors; other tokens come after them."""
    pair = {"clip_l": normal(3, 32), "clip_g": normal(3, 48)}
    save_file(pair, tmp_path / "a.safetensors")
    save_file({"emb_params": normal(1, 32)}, tmp_path / "b.safetensors")
    files = {"<cat>": tmp_path / "a.safetensors", "<dog>": tmp_path / "b.safetensors"}
    found, new = add_tokens(files, tokenizers, components)
    ids = [START, SIZE, SIZE + 1, SIZE + 2, A, END]
    assert found["text_encoder_2"](["<cat> a"])[0, :6].tolist() == ids
    assert found["text_encoder"](["<dog> <CAT>"])[0, :5].tolist() == [START, SIZE + 3, *ids[1:4]]
    np.testing.assert_array_equal(new["text_encoder_2"].rows, pair["clip_g"])
    assert len(new["text_encoder"].rows) == 4


def test_rows_of_the_table():
    """They follow the last row, or take the place of those that the vocabulary does not use."""
    table = normal(6, 4)
    plain = Checkpoint({TABLE: Entry(table.shape, np.float16, lambda: table.astype(np.float16)), "b": None}, "x")
    for first in (6, 3):
        new = NewRows(first, normal(2, 4), end=5)
        found = new.checkpoint(plain)
        expected = np.concatenate([table[:first], new.rows, table[first + 2 :]]).astype(np.float16)
        assert found.shape(TABLE) == expected.shape
        np.testing.assert_array_equal(found[TABLE], expected)
    assert list(found) == [TABLE, "b"]


def test_end_of_a_prompt_is_not_the_largest_id_any_more():
    """Configurations before 2023 say 2, the largest id: with tokens after it that would be a learnt one."""
    new = NewRows(SIZE, normal(2, 4), END)
    assert new.config({"vocab_size": SIZE, "eos_token_id": 2}) == {"vocab_size": SIZE + 2, "eos_token_id": END}
    assert new.config({"vocab_size": SIZE + 9, "eos_token_id": 7}) == {"vocab_size": SIZE + 9, "eos_token_id": 7}
    with pytest.raises(CheckpointError, match="the vocabulary has 518 tokens, the text encoder 500; add no tokens"):
        new.config({"vocab_size": 500})


WRONG = {
    "width": (
        {"emb_params": normal(1, 99)},
        r"vectors of shape \[1, 99\]; the model's text encoders and their widths: ",
    ),
    "widths": ({"clip_l": normal(1, 48)}, r"shape \[1, 48\]; .* widths: text_encoder 32, text_encoder_2 48$"),
    "axes": ({"emb_params": normal(1, 1, 32)}, r"vectors of shape \[1, 1, 32\]"),
    "none": ({"emb_params": normal(0, 32)}, r"vectors of shape \[0, 32\]"),
    "finite": ({"emb_params": np.float32([[np.nan] * 32])}, "a.safetensors holds values that are not finite"),
    "many": ({"a": normal(32), "b": normal(32)}, "is no textual inversion: it holds 2 tensors, the first a; one holds"),
    "LoRA": ({"lora_unet_x.lora_up.weight": normal(2), "lora_unet_x.alpha": normal(1)}, "is a LoRA: a change to a"),
    "ControlNet": ({"control_model.x": normal(2), "control_model.y": normal(2)}, "is a ControlNet"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files(tmp_path, tokenizers, components, case):
    tensors, text = WRONG[case]
    with pytest.raises(CheckpointError, match=text):
        added(tmp_path / "a.safetensors", tensors, tokenizers, components)


def test_wrong_calls(tmp_path, tokenizers, components):
    save_file({"emb_params": normal(1, 32)}, tmp_path / "a.safetensors")
    save_file({"clip_g": normal(1, 48)}, tmp_path / "g.safetensors")
    with pytest.raises(TypeError, match="textual_inversion is 'a'; give the file of each token"):
        add_tokens("a", tokenizers, components)  # pyright: ignore[reportArgumentType]
    with pytest.raises(FileNotFoundError):
        add_tokens({"<cat>": tmp_path / "nowhere.pt"}, tokenizers, components)
    for token, text in ((" ", "is not a name"), ("cat</w>", "'cat</w>' is a token already, with id 513")):
        with pytest.raises(ValueError, match=text):
            add_tokens({token: tmp_path / "a.safetensors"}, tokenizers, components)
    one = {"text_encoder": components["text_encoder"]}
    with pytest.raises(CheckpointError, match=r"has vectors for text_encoder_2; .* widths: text_encoder 32$"):
        add_tokens({"<cat>": tmp_path / "g.safetensors"}, {"text_encoder": tokenizers["text_encoder"]}, one)
    with pytest.raises(CheckpointError, match="their widths: none with a vocabulary"):
        add_tokens({"<cat>": tmp_path / "a.safetensors"}, {}, one)


@pytest.mark.slow
def test_loaded_saved_and_loaded_again(tmp_path):
    """Rows after the table's, ids after the vocabulary's, in every layout that the model is written in."""
    folder = sd_toys.write_pipeline(tmp_path / "model")
    rows = normal(2, 32)
    save_file({"emb_params": rows}, tmp_path / "a.safetensors")
    _, plain = load(folder)
    pipeline, params = load(folder, textual_inversion={"<cat>": tmp_path / "a.safetensors"})
    where = convert.keys(plain["text_encoder"])[TABLE]
    table = convert.flat(params["text_encoder"])[where]
    np.testing.assert_array_equal(table, np.concatenate([convert.flat(plain["text_encoder"])[where], rows]))
    ids = pipeline.tokenizers["text_encoder"](["a <cat>", "cat"])
    assert ids[0, :5].tolist() == [START, A, SIZE, SIZE + 1, END]
    expected = pipeline.encode_prompts(params, ["a <cat>", "cat"])
    pipeline.save(tmp_path / "saved", params)
    pipeline.export(tmp_path / "exported", params)
    for written in ("saved", "exported"):
        again, same = load(tmp_path / written)
        assert dataclasses.asdict(again.modules["text_encoder"].config)["vocab_size"] == SIZE + 2
        np.testing.assert_array_equal(again.tokenizers["text_encoder"](["a <cat>", "cat"]), ids)
        found = again.encode_prompts(same, ["a <cat>", "cat"])
        assert all(np.array_equal(found[key], expected[key]) for key in expected)
