# ruff: noqa: E501
"""Our tokenizer against transformers' with CLIP's real vocabulary, id for id."""

import gzip
import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason="parity needs the extra mmdjax[parity]")

from transformers import AddedToken, CLIPTokenizer

from mmdjax.sd.text.tokenizer import load_tokenizer
from mmdjax.sd.tiny import write_vocabulary

PADS = {"clip-l": "<|endoftext|>", "second": "!"}
AWKWARD = [
    "", " ", "\n\n\t", "!", "!!!", "wow!! a cat !", "a", "A PHOTO OF A CAT", "a photo of a cat", "ÀÉÎÕÜ", "naïve café",
    "nai\u0308ve cafe\u0301", "e\u0301\u0327\u0302", "\u1e69 s\u0323\u0307", "ﬁne ﬂuﬀ", "ß ẞ İ ı ŉ ǰ", "Ω Ω Å Å", "Σίσυφος ΣΊΣΥΦΟΣ",
    "Привет, мир", "こんにちは世界", "中文提示詞，很長", "한국어 프롬프트 한글", "שלום עולם", "مرحبا بالعالم", "हिन्दी में", "ไทย", "ქართული",
    "🐱", "🐱🐶 in a 🏡", "👩‍👩‍👧‍👦 family", "🏳️‍🌈", "👍🏽", "☃ ☃️", "1️⃣2️⃣", "🇫🇷🇩🇪", "a\U0001f600b", "\U00020000\U0002a6d6",
    "&amp;", "&lt;b&gt;bold&lt;/b&gt;", "&#39;quoted&#39;", "&nbsp;&eacute;", "a &amp;amp; b", "&notanentity;", "<b>html</b>",
    "a\u00a0b", "a\u2003b\u3000c", "a\tb\r\nc", "  leading and trailing  ", "many     spaces", "\ufeffbom", "zero\u200bwidth",
    "soft\u00adhyphen", "a\u200db", "\u202eright to left", "\x00nul", "\x01\x02\x1f", "\x7fdel", "\x85next line", "\x0bvertical\x0c",
    "2024", "3.14159", "1,000,000", "x²+y³", "½ ⅓ Ⅷ", "٣٤٥", "no1 2nd 3rd4", "0x1F", "1e-5",
    "don't", "DON'T", "it's we're they've I'm you'll he'd", "'s", "''s", "rock'n'roll", "don’t", "o'clock 'tis",
    "snake_case camelCase kebab-case", "a_b__c", "file.name.txt", "https://example.com/a?b=c&d=e#f", "user@example.com", "#tag @at",
    "(masterpiece:1.3), ((best quality)), [lowres]", "a, b; c: d. e? f! g", "...", "…", "--ar 16:9 --v 5", "\\ / | ~ ` ^",
    "\"quoted\" 'single' «guillemets» „low“", "$5 €6 £7 ¥8 50% off", "C++ C# F#", "<|startoftext|>", "a <|endoftext|> b",
    "<|STARTOFTEXT|>", "<| endoftext |>", "<start_of_text>", "</w>", "a</w>b", "[PAD]", "\\u0041", "%20", "\ufffd", "\ue000private",
    "supercalifragilisticexpialidocious", "pneumonoultramicroscopicsilicovolcanoconiosis", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "x" * 500, "a cat " * 100, "🐱" * 60, "word, " * 80, "1" * 76, "1" * 75, "1" * 74, "中" * 100, "ab " * 37 + "c", "ab " * 38 + "c",
]  # fmt: skip


def prompts():
    """The list above, and random strings of the same kinds of sign to make 200."""
    rng = random.Random(0)
    kinds = [(0x20, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x600), (0x2000, 0x2070), (0x3040, 0x30FF), (0, 0x20)]
    kinds += [(0x1F300, 0x1F6FF), (0xAC00, 0xB000), (0x1E00, 0x1F00), (0x900, 0x980), (0x2100, 0x2190)]

    def sign():
        return chr(rng.randrange(*rng.choice(kinds)))

    return AWKWARD + ["".join(sign() for _ in range(rng.randrange(1, 40))) for _ in range(200 - len(AWKWARD))]


@pytest.fixture(scope="module", params=PADS)
def folder(request, tmp_path_factory):
    """A checkpoint's tokenizer folder, as published: vocab.json, merges.txt and two files of settings."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        pytest.skip("CLIP's vocabulary is in open_clip_torch: pip install --no-deps open_clip_torch")
    packed = Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode().split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    signs = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = signs + [sign + "</w>" for sign in signs] + [merge.replace(" ", "") for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    assert len(words) == 49408
    path = tmp_path_factory.mktemp(request.param) / "tokenizer"
    path.mkdir()
    path.joinpath("vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    path.joinpath("merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    flags = {"lstrip": False, "rstrip": False, "normalized": True, "single_word": False}
    named = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special = {key: {"content": word, **flags} for key, word in named.items()} | {"pad_token": PADS[request.param]}
    path.joinpath("special_tokens_map.json").write_text(json.dumps(special))
    kind = {"__type": "AddedToken"}
    config = {key: value | kind if isinstance(value, dict) else value for key, value in special.items()}
    config |= {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
    path.joinpath("tokenizer_config.json").write_text(json.dumps(config))
    return path


def theirs(folder):
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    ids = tokenizer(prompts(), padding="max_length", max_length=77, truncation=True).input_ids
    return tokenizer, np.asarray(ids)


@pytest.mark.filterwarnings("ignore:a prompt of")
def test_two_hundred_prompts(folder, tmp_path):
    assert len(prompts()) == len(set(prompts())) == 200
    tokenizer, expected = theirs(folder)
    ours = load_tokenizer(folder)
    different = {p: (a.tolist(), b.tolist()) for p, a, b in zip(prompts(), ours(prompts()), expected, strict=True)}
    different = {p: both for p, both in different.items() if both[0] != both[1]}
    assert not different
    # transformers 5 writes tokenizer.json in place of the two files, and reads ours
    tokenizer.save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs" / "vocab.json").exists()
    np.testing.assert_array_equal(load_tokenizer(tmp_path / "theirs")(prompts()), expected)
    ours.save(tmp_path / "ours")
    np.testing.assert_array_equal(load_tokenizer(tmp_path / "ours")(prompts()), expected)
    np.testing.assert_array_equal(theirs(tmp_path / "ours")[1], expected)


def test_padding(folder):
    ids = load_tokenizer(folder)(["a cat"])[0]
    pad = 0 if folder.parent.name.startswith("second") else 49407
    assert ids[:5].tolist() == [49406, 320, 2368, 49407, pad]
    assert (ids[4:] == pad).all()


def test_what_was_cut_is_named(folder):
    prompt = "cat " * 75 + "under the Eiffel  Tower"
    with pytest.warns(UserWarning, match="of 79 tokens was cut to the 75 .* left out: 'under the Eiffel  Tower'"):
        ids = load_tokenizer(folder)([prompt])
    assert ids[0, -1] == 49407


ADDED = ("<cat-toy>", "<Cat-Toy>_1", "<cat-toy>_2", "sks")
WITH_ADDED = (
    *("a <cat-toy> on a mat", "<CAT-TOY>", "cat<cat-toy>dog", "<cat-toy>_1", "<cat-toy>_2 <cat-toy>", "<cat-toy>_10"),
    *("sks dog", "sksdog", "SKS", "<cat -toy>", "<cat-toy", "<cat-toy><cat-toy>", "é<cat-toy>é", " <cat-toy> "),
)


@pytest.mark.parametrize("form", ["tokenizer.json", "added_tokens_decoder", "added_tokens.json"])
@pytest.mark.parametrize(
    "flags", [{}, {"normalized": False}, {"single_word": True}, {"special": True}, {"lstrip": True}]
)
def test_added_tokens(tmp_path, form, flags):
    """Written by transformers in its form of today, and in the two older ones."""
    size = write_vocabulary(tmp_path / "plain", length=20)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "plain")
    tokenizer.add_tokens([AddedToken(token, **flags) for token in ADDED])
    folder = tmp_path / "added"
    if form == "tokenizer.json":
        tokenizer.save_pretrained(folder)
    else:
        write_vocabulary(folder, length=20)
        decoder = {i: token.__getstate__() for i, token in tokenizer.added_tokens_decoder.items()}
        path = folder / "tokenizer_config.json"
        if form == "added_tokens_decoder":
            path.write_text(json.dumps(json.loads(path.read_text()) | {form: decoder}))
        else:
            plain = {token["content"]: i for i, token in decoder.items() if i >= size}
            (folder / form).write_text(json.dumps(plain))
    expected = CLIPTokenizer.from_pretrained(folder)(list(WITH_ADDED), padding="max_length", max_length=20).input_ids
    ours = load_tokenizer(folder)
    object.__setattr__(ours, "_vectors", {})  # of several vectors: `test_several_vectors`
    np.testing.assert_array_equal(ours(WITH_ADDED), expected)
    assert ours.size == size + len(ADDED)
    ours.save(tmp_path / "ours")
    again = CLIPTokenizer.from_pretrained(tmp_path / "ours")
    np.testing.assert_array_equal(again(list(WITH_ADDED), padding="max_length", max_length=20).input_ids, expected)


def test_several_vectors(tmp_path):
    """diffusers writes the names of a token's other vectors into the prompt."""
    from diffusers.loaders import TextualInversionLoaderMixin

    write_vocabulary(tmp_path, length=20)
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    names = ["<cat-toy>", "<cat-toy>_1", "<cat-toy>_2", "sks"]
    theirs.add_tokens(names)
    ours = load_tokenizer(tmp_path).with_tokens(names)
    for prompt in ("a <cat-toy> mat", "sks <cat-toy>", "<cat-toy>_2", "dog", "<cat-toy>,<cat-toy>"):
        text = TextualInversionLoaderMixin().maybe_convert_prompt(prompt, theirs)
        expected = theirs([text], padding="max_length", max_length=20, truncation=True).input_ids
        np.testing.assert_array_equal(ours([prompt]), expected)
