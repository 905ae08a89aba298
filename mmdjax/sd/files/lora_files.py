"""Reading LoRA files: their tensors by module and part, and the scale of each.

A key is a module's name and an ending that says which part of the change it is. The scale is a = alpha/rank, with alpha

    from the module's own tensor "alpha" (kohya), else
    from PEFT's configuration: adapter_config.json, or diffusers' copy of it in a safetensors header, else
    the rank: a = 1.

References:
  the formats of github.com/huggingface/peft, github.com/kohya-ss/sd-scripts and github.com/KohakuBlueleaf/LyCORIS.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmdjax.checkpoint import Checkpoint, CheckpointError, read_json
from mmdjax.sd.files import convert
from mmdjax.sd.files.differences import REMEDY
from mmdjax.sd.files.places import open_file
from mmdjax.sd.files.updates import Update

# How a key ends, and which part of an `Update` it is. An adapter's name may stand before ".weight".
ENDINGS = tuple(
    (re.compile(rf"{ending}$"), part)
    for ending, part in (
        (r"\.lora_(?:up|B)(?:\.\w+)?\.weight", "lora_a"),
        (r"\.lora_(?:down|A)(?:\.\w+)?\.weight", "lora_b"),
        (r"\.lora_mid\.weight", "lora_t"),
        (r"(?:\.lora|\.lora_linear_layer|_lora)\.up\.weight", "lora_a"),
        (r"(?:\.lora|\.lora_linear_layer|_lora)\.down\.weight", "lora_b"),
        (r"\.lora_B(?:\.\w+)?\.bias", "bias_of_a"),
        (r"\.hada_w(?P<n>[12])_(?P<ab>[ab])", "hada{n}_{ab}"),
        (r"\.hada_t(?P<n>[12])", "hada{n}_t"),
        (r"\.lokr_w(?P<n>[12])(?P<ab>(?:_[ab])?)", "lokr{n}{ab}"),
        (r"\.lokr_t(?P<n>[12])", "lokr{n}_t"),
        (r"\.(?:diff|w_norm)", "diff"),
        (r"\.(?:diff_b|b_norm)", "bias"),
        (r"\.lora_magnitude_vector(?:\.\w+)?(?:\.weight)?", "rows"),
        (r"\.dora_scale", "dora_scale"),
        (r"\.alpha", "alpha"),
    )
)
# Changes of other kinds, by what only they have.
OTHERS = (
    (re.compile(r"\.(oft_|boft_)|\.(oft|boft)_(blocks|diag)"), "OFT"),
    (re.compile(r"\.(ia3_l|on_input$)"), "(IA)³"),
    (re.compile(r"\.(a1|a2|b1|b2)\.weight$"), "GLoRA"),
    (re.compile(r"vera_lambda"), "VeRA"),
    (re.compile(r"lora_embedding_[AB]"), "a LoRA of an embedding"),
)
KNOWN = "LoRA with convolutions, LoHa, LoKr, DoRA and full differences"
IN_FOLDER = ("adapter_model", "pytorch_lora_weights")
FEW = 3  # names in a sentence


class LoRAFile(NamedTuple):
    """An open file.

    Args:
      source: its name in error messages.
      modules: by name, the entries of their parts, as in `Update` and "alpha", "bias", "bias_of_a".
      settings: PEFT's configuration by component, or under "".
    """

    source: str
    modules: dict[str, dict[str, Any]]
    settings: Mapping[str, Mapping[str, Any]]

    def updates(self, component: str, name: str, rest: str) -> list[tuple[str, Update]]:
        """What a module's parts do, by leaf: to its "weight" and to its "bias".

        Args:
          name: of the module in the file.
          rest: its name in the component.
        """
        parts, what, found = self.modules[name], f"{self.source}: {name}", []
        kernel = {part: entry for part, entry in parts.items() if part not in ("alpha", "bias", "bias_of_a")}
        plain = Update(what, kernel)
        scale = 1.0 if "diff" in parts else self._scale(component, rest, parts, plain.rank)
        if kernel or not parts.keys() - {"alpha"}:
            found.append(("weight", dataclasses.replace(plain, scale=scale)))
        if "bias" in parts:
            found.append(("bias", Update(what, {"diff": parts["bias"]})))
        if "bias_of_a" in parts:
            found.append(("bias", Update(what, {"diff": parts["bias_of_a"]}, scale)))
        return found

    def _scale(self, component: str, rest: str, parts: Mapping[str, Any], rank: int | None) -> float:
        settings = self.settings.get(component, self.settings.get("", {}))
        if "alpha" in parts:
            if math.prod(parts["alpha"].shape) != 1:
                raise CheckpointError(f"{self.source}: the alpha of {rest} has shape {list(parts['alpha'].shape)}")
            alpha, rank, settings = float(parts["alpha"].read().astype(np.float64).item()), rank or 1, {}
        else:
            alpha, rank = settings.get("lora_alpha", settings.get("alpha")), rank or settings.get("r")
            patterns = settings.get("alpha_pattern")
            for name, value in patterns.items() if isinstance(patterns, Mapping) else ():
                if f".{rest}".endswith("." + name.removeprefix("^").removesuffix("$")):
                    alpha = value
                    break
            if alpha is None or rank is None:
                return 1.0
        if not all(type(x) in (int, float) and math.isfinite(x) for x in (alpha, rank)) or rank <= 0:
            raise CheckpointError(f"{self.source}: {rest} has alpha {alpha!r} and rank {rank!r}")
        return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def open_lora(path: str | Path, permits: Callable[[str], bool] = lambda key: False) -> LoRAFile:
    """A LoRA's file, or its folder as PEFT and diffusers write it.

    Args:
      permits: whether a key may be left out that no LoRA has.
    Raises:
      FileNotFoundError: there is none.
      CheckpointError: it is damaged, or holds something else.
    """
    path = Path(path)
    settings: Mapping[str, Mapping[str, Any]] = {}
    if path.is_dir():
        names = [f"{stem}.{ending}" for stem in IN_FOLDER for ending in ("safetensors", "bin")]
        found = [path / name for name in names if (path / name).exists()]
        if not found:
            raise FileNotFoundError(f"{path}: no LoRA in this folder; looked for {', '.join(names)}")
        config = path / "adapter_config.json"
        settings = {"": read_json(config)} if config.exists() else {}
        path = found[0]
    elif not path.exists():
        raise FileNotFoundError(f"LoRA {path}: no such file or folder")
    file = open_file(path)
    if "lora_adapter_metadata" in file.metadata:
        settings = _metadata(file)
    return LoRAFile(file.source, _modules(file, permits), settings)


def _metadata(file: Checkpoint) -> Mapping[str, Mapping[str, Any]]:
    """Diffusers' copy of PEFT's configurations, {"unet.lora_alpha": 4, …}, by component."""
    try:
        raw = json.loads(file.metadata["lora_adapter_metadata"])
        found: dict[str, Any] = {}
        for key, value in raw.items():
            component, _, name = key.rpartition(".")
            found.setdefault(component, {})[name] = value
    except (AttributeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.source}: its lora_adapter_metadata is not a JSON object") from error
    return found


def _modules(file: Checkpoint, permits: Callable[[str], bool]) -> dict[str, dict[str, Any]]:
    """The tensors by module and part."""
    convert.refuse_foreign(file, changes=True)
    for pattern, name in OTHERS:
        if any(pattern.search(key) for key in file):
            raise CheckpointError(f"{file.source} is {name}, which is not implemented; implemented: {KNOWN}")
    found: dict[str, dict[str, Any]] = {}
    unknown = []
    for key, stored in file.stored.items():
        for pattern, part in ENDINGS:
            match = pattern.search(key)
            if match:
                found.setdefault(key[: match.start()], {})[part.format(**match.groupdict())] = stored
                break
        else:
            unknown += [] if permits(key) else [key]
    if len(unknown) > len(file) / 2:
        few = ", ".join(unknown[:FEW])
        raise CheckpointError(f"{file.source} is no LoRA: {len(unknown)} of its {len(file)} keys are none's, as {few}")
    if unknown:
        lines = [f"{file.source}: {len(unknown)} keys are none that a LoRA has", *(f"  unknown: {k}" for k in unknown)]
        lines.append(REMEDY.format(unknown[0]))
        raise CheckpointError("\n".join(lines))
    return found
