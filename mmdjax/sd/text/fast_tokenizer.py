"""Tokenizers of T5 and Qwen3: prompts to rows of token ids with masks, from a checkpoint's own files.

T5's is a unigram model: a prompt is cut into the most probable pieces, and `</s>` follows. Qwen3's merges bytes, as
CLIP's does, with the prompt written into a conversation as FLUX.2 klein was trained: the user says it, and the answer
begins without thinking. Rows are padded at their end, and the mask says where the prompt is.

References:
  Kudo 2018 (unigram), Sennrich et al. 2016 (byte-pair encoding), Raffel et al. 2020 (T5), Qwen team 2025 (Qwen3).
"""

import dataclasses
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from mmdjax._core.extras import optional
from mmdjax.checkpoint import CheckpointError, read_json
from mmdjax.sd.text.spiece import unigram

CONVERSATION = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
WRITTEN = ("<|im_start|>", "<|im_end|>", "<think>", "enable_thinking")  # in the chat template of Qwen3
NO_LENGTH = 1e6  # of tokens: transformers writes 1e30 where there is no limit
NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
GENERAL = ("PreTrainedTokenizerFast", "TokenizersBackend")  # class names that do not say what a tokenizer is


class Kind(NamedTuple):
    """A family of tokenizers.

    Args:
      name: of the class in transformers, to which "Fast" may be added.
      sign: what only its tokenizer.json holds.
      pad, end: tokens of the padding and after a prompt, where the files do not name them; end None: there is none.
      around: texts around a prompt.
      vocabulary: files, of which the first that exists is read.
    """

    name: str
    sign: re.Pattern[bytes]
    pad: str
    end: str | None
    around: tuple[str, str]
    vocabulary: tuple[str, ...]


KINDS = (
    Kind(
        "T5Tokenizer",
        re.compile(rb'"type"\s*:\s*"Unigram"'),
        "<pad>",
        "</s>",
        ("", ""),
        ("tokenizer.json", "spiece.model"),
    ),
    Kind("Qwen2Tokenizer", re.compile(rb"<\|im_start\|>"), "<|endoftext|>", None, CONVERSATION, ("tokenizer.json",)),
)
LENGTH = 512  # of a row, at most: what FLUX and Stable Diffusion 3 take


class Encoded(NamedTuple):
    """Tokenized prompts.

    Args:
      ids: of tokens, [n, l].
      mask: False at the padding, [n, l].
    """

    ids: Int[np.ndarray, "n l"]
    mask: Bool[np.ndarray, "n l"]


@dataclasses.dataclass(frozen=True, eq=False)
class FastTokenizer:
    """Prompts to token ids; made by `load_tokenizer`. `dataclasses.replace(tokenizer, length=300)` has longer rows.

    Args:
      kind: whose it is.
      encoding: the `tokenizers.Tokenizer` of the vocabulary; the tokens that it adds around a prompt are not used.
      pad: id of the padding.
      end: id after a prompt, also after one that is cut; None: there is none.
      length: of a row.
      files: the files that it was read from, by name.
    """

    kind: Kind
    encoding: Any
    pad: int
    end: int | None
    length: int
    files: Mapping[str, bytes]

    def __post_init__(self):
        if self.length < 2:
            raise ValueError(f"length is {self.length}; give at least 2")

    def __repr__(self) -> str:
        return f"FastTokenizer({self.kind.name}, length={self.length})"

    @property
    def class_name(self) -> str:
        """Its class in transformers."""
        return self.kind.name

    def __call__(self, prompts: Sequence[str]) -> Int[np.ndarray, "n l"]:
        """Token ids, a row for each prompt; see `encode`."""
        return self.encode(prompts).ids

    def encode(self, prompts: Sequence[str]) -> Encoded:
        """Token ids and mask, a row for each prompt. One that is too long is cut, with a warning that quotes the rest.

        Raises:
          TypeError: `prompts` is a single string, or holds something other than strings.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError(f"prompts is {prompts!r}; give a list of strings")
        before, after = self.kind.around
        texts = [before + prompt + after for prompt in prompts]
        end = [] if self.end is None else [self.end]
        ids = np.full((len(texts), self.length), self.pad, np.int32)
        mask = np.zeros(ids.shape, bool)
        fits = self.length - len(end)
        for i, one in enumerate(self.encoding.encode_batch(texts, add_special_tokens=False)):
            if len(one.ids) > fits:
                _warn(texts[i][one.offsets[fits][0] : len(texts[i]) - len(after)], len(one.ids), fits)
            row = one.ids[:fits] + end
            ids[i, : len(row)] = row
            mask[i, : len(row)] = True
        return Encoded(ids, mask)

    def save(self, folder: str | Path) -> None:
        """Write the files that the tokenizer was read from, byte by byte."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (folder / name).write_bytes(data)


def kind_of(folder: Path) -> Kind | None:
    """The kind of the tokenizer in a folder, by its class or else by its files; None: CLIP's, or none of these.

    Raises:
      CheckpointError: its class is none that is implemented.
    """
    name = _settings(folder).get("tokenizer_class")
    if name is not None and name not in GENERAL:
        plain = str(name).removesuffix("Fast")
        known = {kind.name: kind for kind in KINDS}
        if plain not in known and plain != "CLIPTokenizer":
            raise CheckpointError(
                f"{folder.name}: tokenizer_class is {name!r}; implemented: CLIPTokenizer, {', '.join(known)}"
            )
        return known.get(plain)
    if (folder / "tokenizer.json").exists():
        data = (folder / "tokenizer.json").read_bytes()
        return next((kind for kind in KINDS if kind.sign.search(data)), None)
    return KINDS[0] if (folder / "spiece.model").exists() else None


def load_fast(folder: Path, kind: Kind) -> FastTokenizer:
    """The tokenizer of a kind in a folder; see `mmdjax.sd.text.tokenizer.load_tokenizer`."""
    library = optional("tokenizers", "sd", "to read prompts")
    settings = _settings(folder)
    found = next((folder / name for name in kind.vocabulary if (folder / name).exists()), None)
    if found is None:
        raise FileNotFoundError(f"{folder}: no vocabulary for prompts; needed: {' or '.join(kind.vocabulary)}")
    if found.suffix == ".model":
        encoding = unigram(found, _count(settings, "extra_ids", 100, folder))
    else:
        try:
            encoding = library.Tokenizer.from_file(str(found))
        except Exception as error:  # the library raises bare Exceptions
            raise CheckpointError(f"{folder.name}/{found.name} is not a tokenizer: {error}") from error
        encoding.no_padding()
        encoding.no_truncation()
    _add_tokens(encoding, _added(folder, settings), folder.name)
    if settings.get("padding_side", "right") != "right":
        raise CheckpointError(f"{folder.name}: padding_side is {settings['padding_side']!r}; implemented: 'right'")
    if kind.around is CONVERSATION:
        _check_template(folder, settings)
    pad = _id(encoding, _content(settings.get("pad_token")) or kind.pad, folder)
    end = None if kind.end is None else _id(encoding, _content(settings.get("eos_token")) or kind.end, folder)
    length = min(_count(settings, "model_max_length", LENGTH, folder), LENGTH)
    files = {name: (folder / name).read_bytes() for name in NAMES if (folder / name).exists()}
    return FastTokenizer(kind, encoding, pad, end, length, files)


def _warn(cut: str, found: int, fits: int) -> None:
    if cut.strip():
        warnings.warn(
            f"a prompt of {found} tokens was cut to the {fits} that the text encoder takes; left out: {cut.strip()!r}",
            stacklevel=3,
        )


def _settings(folder: Path) -> dict[str, Any]:
    paths = [folder / "special_tokens_map.json", folder / "tokenizer_config.json"]
    return {key: value for path in paths if path.exists() for key, value in read_json(path).items()}


def _added(folder: Path, settings: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    # tokens beside the vocabulary, by id
    raw: Any = settings.get("added_tokens_decoder")
    if raw is None:
        path = folder / "added_tokens.json"
        raw = {i: {"content": text} for text, i in (read_json(path) if path.exists() else {}).items()}
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    try:
        found = {int(i): {key: token[key] for key in ("content", *flags) if key in token} for i, token in raw.items()}
        wrong = [token for token in found.values() if not isinstance(token["content"], str)]
    except (AttributeError, KeyError, TypeError, ValueError):
        found, wrong = {}, [raw]
    if wrong:
        raise CheckpointError(f"{folder.name}: its added tokens are no tokens by id, such as {str(wrong[0])[:80]}")
    return found


def _add_tokens(encoding: Any, added: Mapping[int, Mapping[str, Any]], where: str) -> None:
    library = optional("tokenizers", "sd", "to read prompts")
    known = {token.content for token in encoding.get_added_tokens_decoder().values()}
    for i, token in sorted(added.items()):
        if token["content"] not in known:
            encoding.add_tokens([library.AddedToken(**token)])
        if encoding.token_to_id(token["content"]) != i:
            raise CheckpointError(
                f"{where}: the added token {token['content']!r} has id {i} in the settings but "
                f"{encoding.token_to_id(token['content'])} in the vocabulary"
            )


def _check_template(folder: Path, settings: Mapping[str, Any]) -> None:
    # the conversation is written as fixed text; another template would give other ids without a word
    path = folder / "chat_template.jinja"
    template = path.read_text(encoding="utf-8") if path.exists() else settings.get("chat_template")
    lacking = [] if template is None else [part for part in WRITTEN if part not in str(template)]
    if lacking:
        raise CheckpointError(
            f"{folder.name}: its chat template lacks {', '.join(lacking)}; implemented: that of Qwen3, which FLUX.2 "
            "klein uses"
        )


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, Mapping) else token


def _id(encoding: Any, token: Any, folder: Path) -> int:
    found = encoding.token_to_id(token) if isinstance(token, str) else None
    if found is None:
        raise CheckpointError(f"{folder.name}: the vocabulary lacks the token {token!r}")
    return found


def _count(settings: Mapping[str, Any], key: str, default: int, folder: Path) -> int:
    value = settings.get(key, default)
    if type(value) not in (int, float) or not value >= 0:
        raise CheckpointError(f"{folder.name}: {key} is {value!r}; it is a number of tokens")
    return int(value) if value < NO_LENGTH else default
