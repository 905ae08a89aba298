"""The tokenizer without torch, on a vocabulary of bytes and two words."""

import json
from pathlib import Path

import numpy as np
import pytest

from mmdjax.checkpoint import CheckpointError
from mmdjax.sd.text.tokenizer import load_tokenizer
from mmdjax.sd.tiny import BYTES, write_vocabulary

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


def token(content, **flags):
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": True, "single_word": False} | flags


def config(folder, **changes):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("where", ["added_tokens.json", "added_tokens_decoder", "tokenizer.json", "all"])
def test_tokens_that_training_added(tmp_path, where):
    """They are one id wherever they stand and however they are written, from each of the files that may name them."""
    folder = vocabulary(tmp_path / "a", length=9)
    if where in ("tokenizer.json", "all"):
        load_tokenizer(folder).with_tokens(["<Toy>", "<toy>_1"]).save(folder)  # beside vocab.json and merges.txt
    if where in ("added_tokens.json", "all"):
        folder.joinpath("added_tokens.json").write_text(json.dumps({"<toy>_1": 519, "<Toy>": 518}))
    if where in ("added_tokens_decoder", "all"):
        special = {str(START): token("<|startoftext|>", special=True), str(END): token("<|endoftext|>", special=True)}
        config(folder, added_tokens_decoder=special | {"518": token("<Toy>"), "519": token("<toy>_1")})
    tokenizer = load_tokenizer(folder)
    toy = {
        "a <toy> cat": [256 + BYTES.index("a"), 518, 513],
        "cat<TOY>cat": [513, 518, 513],
        "<toy>_1 <": [519, 256 + 27],
    }
    for prompt, ids in toy.items():
        assert tokenizer([prompt])[0, 1 : 2 + len(ids)].tolist() == [*ids, END]
    tokenizer.save(tmp_path / "b")
    np.testing.assert_array_equal(load_tokenizer(tmp_path / "b")(list(toy)), tokenizer(list(toy)))
    assert tokenizer.size == 520


def test_flags_of_added_tokens(tmp_path):
    """As transformers reads them: `normalized` false is found only as it is written, `single_word` alone."""
    folder = vocabulary(tmp_path, length=9)
    exact, alone = token("<Toy>", normalized=False), token("mew", single_word=True)
    config(folder, added_tokens_decoder={"518": exact, "519": alone})
    tokenizer = load_tokenizer(folder)
    ids = [set(row) for row in tokenizer(["<Toy>", "<toy>", "a mew", "mews"]).tolist()]
    assert [518 in ids[0], 518 in ids[1], 519 in ids[2], 519 in ids[3]] == [True, False, True, False]


def test_token_of_several_vectors(tmp_path):
    """As in diffusers, the name alone stands for all of them; and a prompt is cut between them."""
    tokenizer = load_tokenizer(vocabulary(tmp_path, length=7))
    more = tokenizer.with_tokens(["<toy>", "<toy>_1", "<toy>_2", "<toy>_4"])
    assert more(["cat <toy>"])[0].tolist() == [START, 513, 518, 519, 520, END, END]
    assert more(["<toy>_2 <toy>_4"])[0].tolist() == [START, 520, 521, END, END, END, END]
    with pytest.warns(UserWarning, match="of 7 tokens was cut to the 5 .* left out: '<toy> dog'"):
        assert more(["cat cat cat <toy> dog"])[0].tolist() == [START, 513, 513, 513, 518, 519, END]
    assert tokenizer(["<toy>"]).max() == END  # as it was
    for name, text in {"": "is not a name", " x": "is not a name", "<toy>": "already, with id 518"}.items():
        with pytest.raises(ValueError, match=text):
            more.with_tokens([name])


@pytest.mark.parametrize(
    ("added", "text"),
    [
        ({"<toy>": 600}, "'<toy>' has the id 600, but the vocabulary's next is 518"),
        ({"<toy>": "x"}, "added_tokens.json names no token by its id: 'x'"),
        ({"<toy>": -1}, "added_tokens.json names no token by its id: '-1'"),
        ([5], "tokenizer_config.json: added_tokens_decoder names no token by its id"),
        ({"518": {"content": 5}}, "added_tokens_decoder names no token by its id: '518'"),
        ({"518": "<toy>"}, "added_tokens_decoder names no token by its id: '518'"),
    ],
)
def test_added_tokens_that_do_not_fit(tmp_path, added, text):
    folder = vocabulary(tmp_path)
    if isinstance(added, dict) and "<toy>" in added:
        folder.joinpath("added_tokens.json").write_text(json.dumps(added))
    else:
        config(folder, added_tokens_decoder=added)
    with pytest.raises(CheckpointError, match=text):
        load_tokenizer(folder)


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
