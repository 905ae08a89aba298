"""CLIP's byte-pair encoding: prompts to rows of token ids, from a checkpoint's own vocabulary.

Text is normalised (Unicode NFC, single spaces, lower case) and split into words, single digits and runs of other signs.
The UTF-8 bytes of each piece are merged pair by pair, in the order in which the merges were learnt; `</w>` marks the
end of a piece. A row is  start, the tokens, end, padding  and has length 77 for CLIP.

Tokens that training added, such as "<cat-toy>" of textual inversion, are found in the text before that and have ids
after those of the vocabulary. One that was learnt as several vectors stands in the vocabulary as "<cat-toy>",
"<cat-toy>_1", "<cat-toy>_2", …; its name in a prompt then gives the ids of all, as in diffusers.

References:
  Radford et al. 2021, section 2.4; Sennrich et al. 2016 (byte-pair encoding); Gal et al. 2023 (textual inversion).
"""

import dataclasses
import functools
import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int

from mmdjax._core.extras import optional
from mmdjax.checkpoint import CheckpointError, read_json, refuse_pointer
from mmdjax.sd.text.fast_tokenizer import FastTokenizer, kind_of, load_fast
from mmdjax.tree import short_repr

START, END = "<|startoftext|>", "<|endoftext|>"
PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
LENGTH = 77  # of CLIP's position table
FILES = "vocab.json with merges.txt, or tokenizer.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Prompts to token ids.

    Args:
      encoding: the `tokenizers.Tokenizer` of the vocabulary; the tokens that it adds around a prompt are not used.
      start: id before the prompt.
      end: id after it.
      pad: id of the padding: the end's for CLIP-L, 0 ("!") for Stable Diffusion 2 and SDXL's second encoder.
      length: of a row.
    """

    encoding: Any
    start: int
    end: int
    pad: int
    length: int = LENGTH
    class_name: ClassVar[str] = "CLIPTokenizer"  # in transformers

    __repr__ = short_repr

    def __call__(self, prompts: Sequence[str]) -> Int[np.ndarray, "n l"]:
        """Token ids, a row for each prompt. A prompt that is too long is cut, with a warning that quotes the rest.

        Raises:
          TypeError: `prompts` is a single string, or holds something other than strings.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError(f"prompts is {prompts!r}; give a list of strings")
        rows = np.full((len(prompts), self.length), self.pad, np.int32)
        found = self.encoding.encode_batch(list(prompts), add_special_tokens=False)
        for row, prompt, one in zip(rows, prompts, found, strict=True):
            several = [self._vectors.get(i, (i,)) for i in one.ids]
            ids, fits = [i for group in several for i in group], self.length - 2
            if len(ids) > fits:
                starts = [start for group, (start, _) in zip(several, one.offsets, strict=True) for _ in group]
                cut = prompt[starts[fits] :].strip()
                warnings.warn(
                    f"a prompt of {len(ids)} tokens was cut to the {fits} that the text encoder takes; "
                    f"left out: {cut!r}",
                    stacklevel=2,
                )
            ids = [self.start, *ids[:fits], self.end]
            row[: len(ids)] = ids
        return rows

    def check(self, ids: Int[np.ndarray, "n l"], rows: int, name: str) -> None:
        """Raise ValueError for ids beyond the rows of a text encoder's table: tokens that it has not learnt."""
        if ids.max(initial=0) >= rows:
            token = self.encoding.id_to_token(int(ids.max()))
            raise ValueError(
                f"the token {token!r} has the id {ids.max()}, but {name} has embeddings for {rows} tokens: the "
                "vocabulary is another model's, or the text encoder that was trained with the token is missing"
            )

    @property
    def size(self) -> int:
        """How many ids there are; the text encoder's table of embeddings must have as many rows."""
        return self.encoding.get_vocab_size()

    def with_tokens(self, tokens: Sequence[str]) -> "Tokenizer":
        """The same tokenizer with more tokens, whose ids follow the last: `size`, `size` + 1, ….

        Args:
          tokens: names that stand for themselves in prompts, in upper or lower case; for one of several vectors
            "<cat-toy>", "<cat-toy>_1", and so on.
        Raises:
          ValueError: a name is empty, has spaces at its ends, is given twice, or is a token already.
        """
        library = optional("tokenizers", "sd", "to read prompts")
        encoding = library.Tokenizer.from_str(self.encoding.to_str())  # a copy
        for token in tokens:
            if not isinstance(token, str) or not token or token != token.strip():
                raise ValueError(f"the new token {token!r} is not a name; give a text without spaces around it")
            if encoding.token_to_id(token) is not None:
                raise ValueError(
                    f"{token!r} is a token already, with id {encoding.token_to_id(token)}; give another name"
                )
            encoding.add_tokens([library.AddedToken(token, normalized=True, special=False)])
        return dataclasses.replace(self, encoding=encoding)

    @functools.cached_property
    def _vectors(self) -> dict[int, tuple[int, ...]]:
        """The ids that an added token's id stands for, where they are several."""
        ids = {token.content: i for i, token in self.encoding.get_added_tokens_decoder().items()}
        found = {}
        for token, i in ids.items():
            several = [i]
            while (more := ids.get(f"{token}_{len(several)}")) is not None:
                several.append(more)
            if len(several) > 1:
                found[i] = tuple(several)
        return found

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json; `load_tokenizer` and transformers read them back."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.encoding.save(str(folder / "tokenizer.json"))
        names = {"bos_token": self.start, "eos_token": self.end, "pad_token": self.pad, "unk_token": self.end}
        config = {name: self.encoding.id_to_token(i) for name, i in names.items()}
        config |= {"model_max_length": self.length, "tokenizer_class": "CLIPTokenizer"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_tokenizer(folder: str | Path) -> Tokenizer | FastTokenizer:
    """The tokenizer in a folder of a checkpoint: CLIP's, T5's or Qwen3's, by its settings or else its files.

    CLIP's vocabulary is read from vocab.json and merges.txt, else from tokenizer.json; T5's from tokenizer.json, else
    from spiece.model; Qwen3's from tokenizer.json. The padding token and the length are read from tokenizer_config.json
    and special_tokens_map.json, if they exist. Tokens that training added to CLIP's are those of `added_tokens_decoder`
    in tokenizer_config.json, else of added_tokens.json and tokenizer.json.

    Raises:
      ImportError: the package `tokenizers` is not installed.
      FileNotFoundError: no vocabulary.
      CheckpointError: files that are not a vocabulary of these kinds, another tokenizer's, or added tokens whose ids do
        not follow it.
    """
    folder = Path(folder)
    tokenizers = optional("tokenizers", "sd", "to read prompts")
    kind = kind_of(folder)
    if kind is not None:
        return load_fast(folder, kind)
    settings = _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")
    special = {name: _token(settings.get(name), default) for name, default in _DEFAULTS.items()}
    wrong = [token for token in special.values() if not _is_token(token)]
    if wrong:
        raise CheckpointError(f"{folder.name}: its special tokens are {wrong}, which are not tokens")
    names = {token["content"] for token in special.values()}
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        encoding = _from_vocabulary(folder, special["unk_token"]["content"])
    elif (folder / "tokenizer.json").exists():
        encoding = _read_tokenizer(folder)
        encoding.no_padding()
        encoding.no_truncation()
    else:
        raise FileNotFoundError(f"{folder}: no vocabulary for prompts; needed: {FILES}")
    _add_tokens(encoding, _added(folder, names), folder.name)
    ids: dict[str, Any] = {token["content"]: encoding.token_to_id(token["content"]) for token in special.values()}
    missing = [content for content, i in ids.items() if i is None]
    if missing:
        raise CheckpointError(f"{folder.name}: the vocabulary lacks {', '.join(missing)}; is it CLIP's?")
    known = {token.content for token in encoding.get_added_tokens_decoder().values()}  # with flags of their own
    new = [token for token in special.values() if token["content"] not in known]
    encoding.add_special_tokens([tokenizers.AddedToken(**token, special=True) for token in new])
    start, end, pad, _ = (ids[token["content"]] for token in special.values())
    length = settings.get("model_max_length", LENGTH)
    if type(length) not in (int, float) or not length > 2:
        raise CheckpointError(f"{folder.name}: model_max_length is {length!r}; it is a number of tokens")
    return Tokenizer(encoding, start, end, pad, int(length) if length < 1e6 else LENGTH)


_DEFAULTS = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}


def _added(folder: Path, named: Collection[str]) -> dict[int, dict[str, Any]]:
    """Tokens beside the vocabulary by id, as transformers finds them; `named` are start, end and the like."""
    config = _json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" in config:
        return _by_id(config["added_tokens_decoder"], f"{folder.name}/tokenizer_config.json: added_tokens_decoder")
    known = _read_tokenizer(folder).get_added_tokens_decoder() if (folder / "tokenizer.json").exists() else {}
    plain = {
        str(i): {"content": content, "special": content in named, "normalized": content not in named}
        for content, i in _json(folder / "added_tokens.json").items()
    }
    found = _by_id(plain, f"{folder.name}/added_tokens.json")
    return found | {i: token.__getstate__() for i, token in known.items()}


def _by_id(raw: Any, where: str) -> dict[int, dict[str, Any]]:
    found = {}
    for i, token in raw.items() if isinstance(raw, Mapping) else [("", raw)]:
        sound = i.isdecimal() and isinstance(token, Mapping) and _is_token(_token(token, ""))
        if not sound:
            raise CheckpointError(f"{where} names no token by its id: {i!r}: {token!r}")
        found[int(i)] = {**_token(token, ""), "special": token.get("special", False) is True}
    return found


def _add_tokens(encoding: Any, added: Mapping[int, Mapping[str, Any]], where: str) -> None:
    """Add tokens to an encoding in the order of their ids, which must follow the vocabulary's."""
    library = optional("tokenizers", "sd", "to read prompts")
    known = {token.content for token in encoding.get_added_tokens_decoder().values()}
    for i, token in sorted(added.items()):
        if token["content"] not in known:
            encoding.add_tokens([library.AddedToken(**token)])
        if encoding.token_to_id(token["content"]) != i:
            raise CheckpointError(
                f"{where}: the added token {token['content']!r} has the id {i}, but the vocabulary's next is "
                f"{encoding.token_to_id(token['content'])}; the files are of two tokenizers, or one is missing"
            )


def _read_tokenizer(folder: Path) -> Any:
    library = optional("tokenizers", "sd", "to read prompts")
    refuse_pointer(folder / "tokenizer.json")
    try:
        return library.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(f"{folder.name}/tokenizer.json is not a tokenizer: {error}") from error


def _from_vocabulary(folder: Path, unknown: str) -> Any:
    library = optional("tokenizers", "sd", "to read prompts")
    models, normalizers, pre_tokenizers = library.models, library.normalizers, library.pre_tokenizers
    vocabulary = _json(folder / "vocab.json")
    refuse_pointer(folder / "merges.txt")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    pairs = [(a, b) for a, _, b in (line.partition(" ") for line in lines if not line.startswith("#version")) if b]
    try:
        model = models.BPE(
            vocabulary, pairs, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=unknown
        )
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(f"{folder.name}: vocab.json and merges.txt do not fit: {error}") from error
    encoding = library.Tokenizer(model)
    encoding.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(library.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    encoding.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(library.Regex(PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return encoding


def _token(value: Any, default: str) -> dict[str, Any]:
    # a string, or an object with how it is found in text
    if not isinstance(value, Mapping):
        return {"content": value or default}
    known = ("content", "lstrip", "rstrip", "normalized", "single_word")
    return {key: value[key] for key in known if key in value}


def _is_token(token: Mapping[str, Any]) -> bool:
    return isinstance(token.get("content"), str) and all(
        isinstance(flag, bool) for key, flag in token.items() if key != "content"
    )


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
