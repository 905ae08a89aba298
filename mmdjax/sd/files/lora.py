"""LoRA: changes to a model's weights, merged into them as the model is loaded.

    W' = W + Σ_files strength · ΔW                           ΔW: `mmdjax.sd.files.updates`

Merging is on the host, tensor by tensor, as each is read, so that the merged model takes the memory of the plain one.

Files name the same weight in many ways:

    unet.down_blocks.0.….attn1.to_q.lora_A.weight                diffusers; older ones: to_q.lora.down, to_q_lora.down
    base_model.model.down_blocks.0.….attn1.to_q.lora_A.weight    PEFT, with adapter_config.json beside it
    lora_unet_down_blocks_0_…_attn1_to_q.lora_down.weight        kohya, for Stable Diffusion 1 and 2
    lora_unet_input_blocks_4_1_…_attn1_to_q.lora_down.weight     kohya, for SDXL: CompVis's names
    lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight      kohya, for FLUX and SD 3: of single files, fused

All are read as a component and a name in which dots are underscores, and looked up among the model's own keys written
so, and among those of its single files. A tensor that a single file keeps in one, as queries, keys and values, is
changed piece by piece. A new family of models needs nothing here.

References:
  the formats of github.com/huggingface/peft, github.com/kohya-ss/sd-scripts and github.com/KohakuBlueleaf/LyCORIS.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from mmdjax.checkpoint import Checkpoint, CheckpointError, Entry
from mmdjax.sd.files import compvis, convert, single_sd3
from mmdjax.sd.files.compvis import FluxNetwork, Source
from mmdjax.sd.files.differences import REMEDY
from mmdjax.sd.files.lora_files import LoRAFile, open_lora
from mmdjax.sd.files.single_flux import Rows
from mmdjax.sd.files.updates import Update
from mmdjax.sd.networks.transformers.sd3 import SD3
from mmdjax.sd.networks.unet import UNet2D, UNet2DCondition

T5 = ("text_encoder_3", "text_encoder_2")  # of Stable Diffusion 3, of FLUX
TEXTS = {"": ("text_encoder",), "1": ("text_encoder",), "2": ("text_encoder_2",), "3": T5}
CLIPS = {"clip_l": ("text_encoder",), "clip_g": ("text_encoder_2",), "t5xxl": T5}
PREFIXES = (  # how a name begins, and the components that it then means; None: the network that is sampled with
    (re.compile(r"lora_(?:unet|transformer)_"), None),
    (re.compile(r"(?:model\.)?diffusion_model\."), None),
    (re.compile(r"lora_te([123]?)_"), TEXTS),
    (re.compile(r"text_encoders\.(clip_l|clip_g|t5xxl)\.(?:transformer\.)?"), CLIPS),
    (re.compile(r"(unet|transformer|vae|vqvae|text_encoder(?:_\d)?)\."), {}),
)
NO_NETWORK = re.compile(r"vae|vqvae|text_encoder")
FEW = 3  # names in a sentence
SPELLINGS = (  # of the model's keys
    (re.compile(r"^text_model\."), ""),
    (re.compile(r"\.to_out\.0\."), ".to_out."),
    (re.compile(r"\.self_attn\.([qkv])_proj\."), r".self_attn.to_\1."),
    (re.compile(r"\.self_attn\.out_proj\."), ".self_attn.to_out."),
)


class Home(NamedTuple):
    """A parameter that a name means, and its shape; of one in a file's larger tensor, also its piece of that."""

    component: str
    key: str
    shape: tuple[int, ...]
    source: Source | Rows | None = None


class Change(NamedTuple):
    """What one file does to one parameter."""

    name: str
    strength: float
    update: Update
    source: Source | Rows | None

    def of(self, weight: np.ndarray) -> np.ndarray:
        """s ΔW, of the weight's shape."""
        if self.source is None:
            return self.strength * self.update.change(weight)
        whole = Entry(self.update.shape, np.dtype(np.float32), self.update.value)
        piece = self.source.of(Checkpoint({self.source.key: whole}, self.name))
        return self.strength * piece.read().reshape(weight.shape)


class Merges(NamedTuple):
    """What all files do: the changes by component and key, and a line about each file."""

    changes: dict[str, dict[str, list[Change]]]
    said: list[str]


def plan(
    lora: Mapping[Any, Any], components: Mapping[str, Any], permits: Callable[[str], bool] = lambda name: False
) -> Merges:
    """Where every tensor of LoRA files goes in a model. Only headers and alphas are read.

    Args:
      lora: strength by file or folder; a number, or numbers by component: the others are then left as they are.
      components: `Component` by name; of the parameters only the shapes are used.
      permits: whether what has this name in a file may be left out, where it has no place in the model.
    Raises:
      TypeError, ValueError: `lora` is of another kind; a strength is not finite, or for a component that is not there.
      FileNotFoundError: no such file.
      CheckpointError: a file is damaged or holds something else; names that are not in the model, and other shapes, all
        listed.

    Example:
      >>> plan({}, {})
      Merges(changes={}, said=[])
    """
    if not isinstance(lora, Mapping):
        raise TypeError(f"lora is {lora!r}; give the strength of each file: {{file: 1.0}}")
    index = _index(components)
    merges = Merges({}, [])
    for path, strength in lora.items():
        strengths = _strengths(path, strength, components)
        _place(open_lora(path, permits), strengths, index, merges, permits)
    return merges


def merge(changes: Mapping[str, list[Change]], checkpoint: Checkpoint, dtype: Any = None) -> Checkpoint:
    """A component's tensors with the changes made as each is read.

    Args:
      changes: by key; of strength 0 they change no bit.
      checkpoint: in diffusers' naming.
      dtype: of what is changed; None: as stored.
    """

    def entry(key, plain, these):
        def read():
            stored = plain.read()
            weight = stored.astype(np.float64 if stored.dtype == np.float64 else np.float32)
            moved = weight.copy()
            for change in these:
                moved += change.of(weight)
            return convert.cast(moved, dtype or stored.dtype, f"{checkpoint.source}: {key} with its LoRA")

        return Entry(plain.shape, dtype or plain.dtype, read)

    active = {key: [change for change in these if change.strength] for key, these in changes.items()}
    stored = {k: entry(k, v, active[k]) if active.get(k) else v for k, v in checkpoint.stored.items()}
    return Checkpoint(stored, checkpoint.source, checkpoint.metadata)


def _strengths(path: Any, strength: Any, components: Collection[str]) -> Callable[[str], float | None]:
    """The strength by component; None for what is to be left out."""
    by_name = isinstance(strength, Mapping)
    for name, value in strength.items() if by_name else [(None, strength)]:
        number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            of = "" if name is None else f" for {name}"
            raise ValueError(f"the strength of LoRA {path}{of} is {value!r}; give a finite number, such as 1.0")
        if name is not None and name not in components:
            raise ValueError(f"LoRA {path} has a strength for {name!r}; the model has {', '.join(components)}")
    if by_name:
        return lambda name: None if name not in strength else float(strength[name])
    return lambda name: float(strength)


# Finding each name's parameter


def _index(components: Mapping[str, Any]) -> dict[str, dict[str, list[Home]]]:
    """By component: the parameters under every name that files have for them, joined by underscores."""
    index: dict[str, dict[str, list[Home]]] = {}
    for component, (module, params, *_) in components.items():
        leaves, names = convert.flat(params), index.setdefault(component, {})
        homes = {
            key: Home(component, key, convert.torch_shape(path[-1], leaves[path].shape))
            for key, path in convert.keys(params).items()
        }
        for key, home in homes.items():
            for name in _spellings(key):
                names.setdefault(_joined(name), [home])
        pieces: dict[str, list[Home]] = {}
        for key, source in _sources(module, homes).items():
            piece = None if source in (Source(source.key), Rows(source.key)) else source
            pieces.setdefault(_joined(source.key), []).append(homes[key]._replace(source=piece))
        for name, these in pieces.items():
            names.setdefault(name, these)
    return index


def _sources(module: Any, keys: Collection[str]) -> Mapping[str, Source | Rows]:
    """The places of the parameters in single files, whose names LoRAs have, too."""
    if isinstance(module, SD3):
        return single_sd3.sources(keys)
    return compvis.sources(module, keys) if isinstance(module, UNet2D | UNet2DCondition | FluxNetwork) else {}


def _spellings(key: str) -> list[str]:
    names = [key]
    for pattern, other in SPELLINGS:
        names += [pattern.sub(other, name) for name in names if pattern.search(name)]
    return names


def _joined(name: str) -> str:
    return name.replace(".", "_")


def _read_name(name: str, index: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    """A module's name as the components that it may be of, and its name there."""
    while name.startswith("base_model.model."):
        name = name.removeprefix("base_model.model.")
    networks = tuple(component for component in index if not NO_NETWORK.match(component)) or ("unet",)
    components = tuple(index)
    for pattern, meant in PREFIXES:
        match = pattern.match(name)
        if match:
            name = name[match.end() :]
            components = networks if meant is None else meant.get(match[1], (match[1],))
            break
    return components, name.replace(".processor.", ".")


def _place(
    file: LoRAFile, strengths: Callable, index: Mapping[str, Mapping], merges: Merges, permits: Callable[[str], bool]
) -> None:
    """Add what a file does to the changes, or raise one error about all that does not fit."""
    found: dict[tuple[str, str], Change] = {}
    astray, total = _Astray({}, [], []), 0
    for name in file.modules:
        components, rest = _read_name(name, index)
        wanted = [component for component in components if strengths(component) is not None]
        present = [component for component in wanted if component in index]
        if wanted and not present and not permits(name):
            astray.absent.setdefault(wanted[0], []).append(name)
        if not present:
            continue
        total += 1
        for leaf, update in file.updates(present[0], name, rest):
            place = f"{_joined(rest)}_{leaf}"
            groups = [index[component][place] for component in present if place in index[component]]
            if not groups and permits(name):
                continue
            for home in _homes(name, update, groups, astray):
                where = (home.component, home.key)
                if where in found:
                    raise CheckpointError(f"{update.name} changes {home.key}, and so does {found[where].name}")
                found[where] = Change(name, strengths(home.component), update, home.source)
    astray.check(file.source, total, tuple(index))
    if not found:
        raise CheckpointError(f"{file.source} changes nothing in the components that its strength names")
    for (component, key), change in found.items():
        merges.changes.setdefault(component, {}).setdefault(key, []).append(change)
    counts = {component: sum(where[0] == component for where in found) for component in index}
    merges.said.extend(
        f"{file.source}: changes {count} tensors of {component}, with strength {strengths(component):g}"
        for component, count in counts.items()
        if count
    )


def _homes(name: str, update: Update, groups: list[list[Home]], astray: "_Astray") -> list[Home]:
    """The parameters that an update changes, of those that its name may mean; none, and a note, if it fits nowhere."""
    fitting = [group for group in groups if update.fits(_whole(group))]
    if len(fitting) > 1:
        one, two = (group[0].component for group in fitting[:2])
        raise CheckpointError(
            f"{update.name} may be of {one} or of {two}; give the strength by component, such as "
            f"lora={{file: {{{one!r}: 1.0}}}}"
        )
    if not groups:
        astray.homeless.append(name)
    elif not fitting:
        astray.unlike.append((name, update.shape, groups[0]))
    elif update.magnitudes and fitting[0][0].source is not None:
        raise CheckpointError(
            f"{update.name} is a DoRA of {len(fitting[0])} parameters in one, which is not implemented"
        )
    return fitting[0] if fitting else []


def _whole(group: list[Home]) -> tuple[int, ...]:
    """The shape of the tensor that a name means: that of one parameter, or of several that are kept in one."""
    return (sum(home.shape[0] for home in group), *group[0].shape[1:])


class _Astray(NamedTuple):
    """What of a file fits nowhere: modules by a component that is not there, without a parameter, of another shape."""

    absent: dict[str, list[str]]
    homeless: list[str]
    unlike: list[tuple[str, tuple[int, ...], list[Home]]]

    def check(self, source: str, total: int, components: tuple[str, ...]) -> None:
        """Raise one CheckpointError about all of it; a file of another model is one sentence."""
        there = ", ".join(components)
        lines = []
        for component, names in self.absent.items():
            lines.append(
                f"{source} changes {component} ({_few(names)}), which is not in this model ({there}); "
                f"to leave it out, give the strength by component: lora={{file: {{{components[0]!r}: 1.0}}}}"
            )
        told = [f"{name} changes {list(shape)}, {home.key} of {home.component} is {list(_whole([home, *more]))}"
                for name, shape, (home, *more) in self.unlike]  # fmt: skip
        if len(self.homeless) + len(self.unlike) > total / 2:
            lacking = f"{len(self.homeless)} have no place ({_few(self.homeless)})" if self.homeless else ""
            other = f"{len(self.unlike)} have another shape, as {told[0]}" if self.unlike else ""
            said = "; ".join(filter(None, (lacking, other)))
            lines.append(f"{source} is a LoRA for another model than this ({there}): of its {total} modules {said}")
        elif self.homeless or told:
            lines.append(
                f"{source}: of its {total} modules {len(self.homeless)} have no place in this model ({there}), "
                f"{len(told)} another shape"
            )
            lines += [f"  no place: {name}" for name in self.homeless] + [f"  shape: {text}" for text in told]
            lines += [REMEDY.format(self.homeless[0])] if self.homeless else []
        if lines:
            raise CheckpointError("\n".join(lines))


def _few(names: list[str]) -> str:
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(names[:FEW]) + more
