"""Tiny text encoders by transformers, and tokenizers with vocabularies trained here."""

import io
import json
from pathlib import Path

import sentencepiece
import test_sd_tokenizer
import tokenizers
import torch_models as tm
from sentencepiece import sentencepiece_model_pb2
from tokenizers import models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, Qwen3Config, T5Config, T5Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "vocab_size": 1200}
T5_V11 = T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
T5_V10 = T5 | {"feed_forward_proj": "relu", "num_decoder_layers": 1}
QWEN3 = {
    "vocab_size": 1200,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "out_layers": [1, 3, 2],
}
# the parts of Qwen3's template that a single message of the user reaches, in our words
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)


def t5(cls, config):
    """A random T5 of a class of transformers; attention's biases are large enough to matter."""
    model = tm.randomise(cls(T5Config(**config)))
    model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data *= 4
    return model


def qwen3(cls, config=QWEN3):
    """A random Qwen3 of a class of transformers."""
    return tm.randomise(cls(Qwen3Config(**config)))


def corpus():
    """Lines to train vocabularies on: the awkward prompts, and English."""
    english = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8").splitlines()
    return [*test_sd_tokenizer.AWKWARD, *english]


def spiece():
    """The bytes of a spiece.model with T5's settings."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for line in corpus() if "\0" not in line), model_writer=written, vocab_size=1000,
        model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>", hard_vocab_limit=False,
        character_coverage=0.99, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return written.getvalue()


def write_spiece(folder):
    """A tokenizer of T5 as PixArt has it: spiece.model, and settings as transformers 4 wrote them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(spiece())
    size = len(sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model")))
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    special = {i: {"content": text} | plain for i, text in enumerate(("<pad>", "</s>", "<unk>"))}
    extra = {f"<extra_id_{i}>": size + 99 - i for i in range(100)}
    stripped = {i: {"content": text} | plain | {"lstrip": True, "rstrip": True} for text, i in extra.items()}
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = named | {
        "added_tokens_decoder": {str(i): token for i, token in sorted((special | stripped).items())},
        "additional_special_tokens": list(extra),
        "extra_ids": 100,
        "legacy": True,
        "model_max_length": 120,
        "tokenizer_class": "T5Tokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    (folder / "added_tokens.json").write_text(json.dumps(extra))


def write_unigram(folder):
    """A tokenizer.json of T5's kind, trained by `tokenizers` and written by transformers."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(spiece())
    table = proto.normalizer_spec.precompiled_charsmap
    encoding = tokenizers.Tokenizer(models.Unigram())
    encoding.normalizer = normalizers.Precompiled(table)
    encoding.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=900, special_tokens=special, unk_token="<unk>", show_progress=False)
    encoding.train_from_iterator(corpus(), trainer)
    vocab = [tuple(pair) for pair in json.loads(encoding.to_str())["model"]["vocab"]]
    vocab += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    T5Tokenizer(vocab=vocab, _spm_precompiled_charsmap=table, model_max_length=64).save_pretrained(folder)


def write_qwen(folder):
    """A tokenizer of Qwen3's kind, trained by `tokenizers` and written by transformers."""
    encoding = tokenizers.Tokenizer(models.BPE())
    encoding.normalizer = normalizers.NFC()
    encoding.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    encoding.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(encoding.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    theirs = Qwen2Tokenizer(
        vocab=model["vocab"], merges=merges, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"],
        model_max_length=131072,
    )  # fmt: skip
    theirs.add_tokens(["<think>", "</think>"])
    theirs.chat_template = CHAT
    theirs.save_pretrained(folder)
