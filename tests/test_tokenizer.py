"""The tokenizer without torch, on a vocabulary of bytes and two words."""

import json
from pathlib import Path

import numpy as np
import pytest

from mmdjax.checkpoint import CheckpointError
from mmdjax.sd.tiny import BYTES, write_vocabulary
from mmdjax.sd.tokenizer import load_tokenizer

START, END = 516, 517


def vocabulary(folder, **how):
    assert write_vocabulary(folder, **how) == 518
    return folder


def test_words_bytes_and_padding(tmp_path):
    tokenizer = load_tokenizer(vocabulary(tmp_path, length=8))
    a, b = BYTES.index("a"), BYTES.index("b")
    ids = tokenizer(["A  Cat\n", "", "ab"])
    assert ids.tolist() == [
        [START, 256 + a, 513, END, END, END, END, END],
        [START, END, END, END, END, END, END, END],
        [START, a, 256 + b, END, END, END, END, END],
    ]
    assert ids.dtype == np.int32


@pytest.mark.filterwarnings("ignore:a prompt of")  # too long, on purpose
@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_awkward_prompts_as_recorded(tmp_path, pad):
    """transformers' ids (tests/fixtures, recorded by tests/parity/record_fixtures.py)."""
    recorded = json.loads((Path(__file__).parent / "fixtures" / "sd_tokenizer.json").read_text())
    tokenizer = load_tokenizer(vocabulary(tmp_path, length=recorded["length"], pad=pad))
    assert len(recorded["prompts"]) > 100
    np.testing.assert_array_equal(tokenizer(recorded["prompts"]), recorded["ids"][pad])


def test_padding_with_another_token(tmp_path):
    assert load_tokenizer(vocabulary(tmp_path, length=5, pad="!"))(["cat"]).tolist() == [[START, 513, END, 0, 0]]


def test_long_prompt_is_cut_with_a_warning(tmp_path):
    tokenizer = load_tokenizer(vocabulary(tmp_path, length=5))
    assert tokenizer(["cat dog cat"]).tolist() == [[START, 513, 515, 513, END]]  # fits: no warning
    with pytest.warns(UserWarning, match="of 4 tokens was cut to the 3 that the text encoder takes; left out: 'Dog'"):
        assert tokenizer(["cat dog cat Dog"]).tolist() == [[START, 513, 515, 513, END]]


def test_saved_and_loaded(tmp_path):
    tokenizer = load_tokenizer(vocabulary(tmp_path / "a", length=9, pad="!"))
    tokenizer.save(tmp_path / "b")
    again = load_tokenizer(tmp_path / "b")
    prompts = ["cat!", "a <|endoftext|> b", "é"]
    assert (again.pad, again.length) == (0, 9)
    np.testing.assert_array_equal(again(prompts), tokenizer(prompts))


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no vocabulary for prompts; needed: vocab.json with merges.txt"):
        load_tokenizer(tmp_path)
    folder = vocabulary(tmp_path / "a")
    with pytest.raises(TypeError, match="prompts is 'a cat'; give a list of strings"):
        load_tokenizer(folder)("a cat")
    folder.joinpath("merges.txt").write_text("#version: 0.2\nzz zz\n")
    with pytest.raises(CheckpointError, match=r"vocab.json and merges.txt do not fit"):
        load_tokenizer(folder)
    folder.joinpath("vocab.json").write_text('{"a": 0, "<|endoftext|>": 1}')
    folder.joinpath("merges.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"the vocabulary lacks <\|startoftext\|>"):
        load_tokenizer(folder)
    folder.joinpath("vocab.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"vocab.json is not JSON"):
        load_tokenizer(folder)
    folder.joinpath("vocab.json").unlink()
    folder.joinpath("tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json is not a tokenizer"):
        load_tokenizer(folder)
