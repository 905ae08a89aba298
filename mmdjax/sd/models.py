"""Loading and saving whole models: the architecture from the configurations, the parameters by `files/convert.py`.

A model is one of: a folder of diffusers (with a subfolder for each network), one of these subfolders, a single file
(`.safetensors` or `.ckpt` in the naming of CompVis, Stable Diffusion 3 or FLUX, `.pt` of DiT or SiT), a folder that
`save` wrote (in Flax's names and layout), or a hub id.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mmdjax._core.progress import progress_bar
from mmdjax._files.atomic import write_json
from mmdjax.checkpoint import Checkpoint, CheckpointError, Entry, read_json, write_safetensors
from mmdjax.sd.config import class_name
from mmdjax.sd.files import compvis, convert, published, single, single_sd3
from mmdjax.sd.files.inversion import NewRows
from mmdjax.sd.files.lora import Change, merge, plan
from mmdjax.sd.files.places import download, open_file, open_folder, variant_of_each
from mmdjax.sd.files.spellings import respelled
from mmdjax.sd.networks.clip import CLIPText, CLIPTextConfig
from mmdjax.sd.networks.qwen3 import Qwen3, Qwen3Config
from mmdjax.sd.networks.t5 import T5Encoder, T5EncoderConfig
from mmdjax.sd.networks.transformers.dit import DiT, DiTConfig, PublishedDiTConfig, SiT, SiTConfig
from mmdjax.sd.networks.transformers.flux import Flux, FluxConfig
from mmdjax.sd.networks.transformers.flux2 import Flux2, Flux2Config
from mmdjax.sd.networks.transformers.pixart import PixArt, PixArtConfig
from mmdjax.sd.networks.transformers.sd3 import SD3, SD3Config
from mmdjax.sd.networks.unet import UNet2D, UNet2DCondition, UNet2DConditionConfig, UNet2DConfig
from mmdjax.sd.networks.vae import AutoencoderKL, AutoencoderKLConfig, VQModel, VQModelConfig
from mmdjax.sd.networks.vae_flux2 import AutoencoderKLFlux2, AutoencoderKLFlux2Config

MODULES = (
    (UNet2DConditionConfig, UNet2DCondition),
    (UNet2DConfig, UNet2D),
    (DiTConfig, DiT),
    (PublishedDiTConfig, DiT),
    (SiTConfig, SiT),
    (PixArtConfig, PixArt),
    (SD3Config, SD3),
    (FluxConfig, Flux),
    (Flux2Config, Flux2),
    (AutoencoderKLConfig, AutoencoderKL),
    (AutoencoderKLFlux2Config, AutoencoderKLFlux2),
    (VQModelConfig, VQModel),
    (CLIPTextConfig, CLIPText),
    (T5EncoderConfig, T5Encoder),
    (Qwen3Config, Qwen3),
)
COMPONENTS = ("unet", "transformer", "vae", "vqvae", "text_encoder", "text_encoder_2", "text_encoder_3")
LAYOUTS = (single_sd3,)  # of single files, beside CompVis's
MANIFEST, FORMAT = "mmdjax.json", 1


class Component(NamedTuple):
    """One network of a model: `module.apply({"params": params}, ...)`.

    Args:
      config: its whole config.json, so that it can be written again.
    """

    module: Any
    params: Any
    config: Mapping[str, Any]


class _How(NamedTuple):
    """The caller's settings for every component."""

    dtype: Any
    param_dtype: Any
    flash: bool
    remat: bool
    put: Callable
    progress: bool
    clip_skip: int | None = None
    allow_unused: str | Sequence[str] = ()
    changes: Mapping[str, Mapping[str, list[Change]]] = MappingProxyType({})  # by component and key
    new_rows: Mapping[str, NewRows] = MappingProxyType({})  # by text encoder

    def config(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """A config.json with `clip_skip`, if it is a text encoder's that the setting is for."""
        skips = self.clip_skip is not None and class_name(raw) in CLIPTextConfig.CLASSES
        return {**raw, "clip_skip": self.clip_skip} if skips else raw

    def module(self, raw: Mapping[str, Any]) -> Any:
        return module_from_config(
            raw,
            dtype=self.dtype,
            param_dtype=self.param_dtype or jnp.float32,
            flash=self.flash,
            remat=self.remat,
        )

    def of(self, name: str) -> "_How":
        """For one component: `param_dtype` may be by component."""
        by_name = isinstance(self.param_dtype, Mapping)
        return self._replace(param_dtype=self.param_dtype.get(name)) if by_name else self

    def component(
        self, name: str, raw: Mapping[str, Any], checkpoint: Checkpoint, module: Any, prefix: str = ""
    ) -> Component:
        """The network of a checkpoint whose keys stand after a prefix in their file."""
        if name in self.new_rows:
            raw = self.new_rows[name].config(raw)
            module = self.module(raw)

        def edit(found):
            exact = None if self.param_dtype is None else np.float32  # and then cast
            found = self.new_rows[name].checkpoint(found) if name in self.new_rows else found
            return merge(self.changes[name], found, exact) if name in self.changes else found

        like = convert.permitted(self.allow_unused)
        how = {"param_dtype": self.param_dtype, "permits": lambda key: like(key) or like(prefix + key)}
        with self.loading(name, checkpoint) as put:
            params = convert.params_from_torch(module, checkpoint, put=put, edit=edit, **how)
        return Component(module, params, raw)

    @contextlib.contextmanager
    def loading(self, name: str, checkpoint: Checkpoint) -> Iterator[Callable]:
        """`put`, with a progress bar."""
        if self.put is convert.shape_of:
            yield self.put
            return
        how: dict[str, Any] = {"total": len(checkpoint), "desc": f"loading {name}", "unit": "tensor"}
        with progress_bar(**how, disable=not self.progress) as bar:

            def put(array):
                bar.update()
                return self.put(array)

            yield put


def load_models(
    path: str | Path,
    *,
    variant: str | Mapping[str, str] | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    flash: bool = False,
    remat: bool = False,
    put: Callable = convert.to_device,
    ema: bool = False,
    configs: Mapping[str, Mapping] | None = None,
    clip_skip: int | None = None,
    allow_unused: str | Sequence[str] = (),
    progress: bool = False,
    lora: Mapping[Any, Any] | None = None,
    new_rows: Mapping[str, NewRows] | None = None,
    parts: Mapping[str, str | Path] | None = None,
) -> dict[str, Component]:
    """The networks of a model by component: "unet" or "transformer", "vae" or "vqvae", "text_encoder", and so on.

    Args:
      path: see the top of this module.
      variant: "fp16" for the half-precision files of a folder; parts without them take their plain ones. By part:
        {"unet": "fp16"}.
      dtype: the dtype that the modules compute in.
      param_dtype: cast parameters to this dtype, all or by component, such as {"unet": jnp.bfloat16}; None: as stored.
      flash, remat: see `mmdjax.sd.networks.layers.Block`.
      put: a function for each array of parameters, such as a `jax.device_put` to a sharding.
      ema: take the moving average of a single file's U-Net instead of the last step's weights. Of a DiT or a SiT it is
        taken wherever there is one.
      configs: config.json of a single file's components, in place of what its shapes say. A DiT or a SiT needs
        {"transformer": {"_class_name": "DiT"}} or "SiT", and its other settings may stand there, too.
      clip_skip: how many of the last layers of CLIP's text encoders to leave out of the prompts' states, counted as in
        diffusers: 1 takes the states before the last layer (elsewhere called "clip skip 2"). None: what config.json
        says, else 0.
      allow_unused: keys of the files that may be left out, as patterns such as "extra.*"; all others must be used.
      progress: show a bar for each network.
      lora: see `mmdjax.sd.load`.
      parts: folders of networks that the file does not hold, or that take the place of its own, as {"vae": folder}.
      new_rows: of the text encoders' tables of embeddings, for tokens that were added to their tokenizers.
    Raises:
      FileNotFoundError: no such file, config, weights, variant or shard.
      CheckpointError: the file is damaged or unsafe; keys are missing, unused or of another shape, all in one message;
        values that `param_dtype` cannot hold.
      ValueError: a network or settings in config.json that are not implemented; `clip_skip` for a model without CLIP.
    """
    path = local_path(path, variant)
    rest = {"clip_skip": clip_skip, "allow_unused": allow_unused}
    how = _How(dtype, param_dtype, flash, remat, put, progress, new_rows=new_rows or {}, **rest)
    if lora:
        plain = _How(dtype, None, False, False, convert.shape_of, False, **rest)
        changes = plan(lora, _load(path, variant, plain, ema, configs, parts), convert.permitted(allow_unused)).changes
        how = how._replace(changes=changes)
    found = _load(path, variant, how, ema, configs, parts)
    if clip_skip is not None and not any(isinstance(component.module, CLIPText) for component in found.values()):
        raise ValueError(f"clip_skip is {clip_skip}, but the model has no text encoder of CLIP; leave it out")
    return found


def _load(path: Path, variant: Any, how: _How, ema: bool, configs: Any, parts: Any) -> dict[str, Component]:
    given: Mapping[str, str | Path] = parts or {}
    strange = sorted(given.keys() - set(COMPONENTS))
    if strange:
        raise ValueError(f"parts has {', '.join(strange)}; known: {', '.join(COMPONENTS)}")
    found = {name: net for name, net in _load_own(path, variant, how, ema, configs).items() if name not in given}
    return found | {name: _load_folder(Path(folder), None, how, name) for name, folder in given.items()}


def _load_own(path: Path, variant: Any, how: _How, ema: bool, configs: Any) -> dict[str, Component]:
    if path.is_file():
        return _load_single(open_file(path), how, ema, configs)
    if ema:
        raise ValueError("ema=True is for single files; a folder has one set of weights for each variant")
    if (path / MANIFEST).exists():
        return _load_saved(path, how)
    if (path / "config.json").exists():
        return {path.name: _load_folder(path, variant.get(path.name) if isinstance(variant, Mapping) else variant, how)}
    found = {name: path / name for name in COMPONENTS if (path / name).is_dir()}
    if not found:
        raise FileNotFoundError(
            f"{path.name}: no model; looked for {MANIFEST}, config.json and folders {', '.join(COMPONENTS)}"
        )
    chosen = variant_of_each(found, variant)
    return {name: _load_folder(folder, chosen[name], how) for name, folder in found.items()}


def load_component(
    folder: str | Path,
    *,
    variant: str | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    flash: bool = False,
    remat: bool = False,
    put: Callable = convert.to_device,
    clip_skip: int | None = None,
    allow_unused: str | Sequence[str] = (),
    progress: bool = False,
) -> Component:
    """One network's folder, config.json and its weights. See `load_models`."""
    how = _How(dtype, param_dtype, flash, remat, put, progress, clip_skip, allow_unused)
    return _load_folder(Path(folder), variant, how)


def local_path(path: str | Path, variant: str | Mapping[str, str] | None = None) -> Path:
    """The path of a model on this machine: itself, or where a hub id was downloaded to.

    Raises:
      FileNotFoundError: neither a path nor a hub id.
    """
    check_path(path)
    return Path(path) if Path(path).exists() else download(str(path), variant=variant)


def check_path(path: str | Path) -> None:
    """Raise FileNotFoundError unless the path exists or has the form of a hub id, which is not looked up."""
    if not Path(path).exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise FileNotFoundError(f"{path}: no such file or folder")


def module_from_config(
    raw: Mapping[str, Any],
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    flash: bool = False,
    remat: bool = False,
) -> nn.Module:
    """The module that a parsed config.json describes.

    Raises:
      ValueError: a class or settings that are not implemented, all listed.
    """
    name = class_name(raw)
    for config, module in MODULES:
        if name in config.CLASSES:
            return module(config.from_json(raw), dtype=dtype, param_dtype=param_dtype, flash=flash, remat=remat)
    known = ", ".join(config.CLASSES[0] for config, _ in MODULES)
    raise ValueError(f"config.json is of {name!r}, which is not implemented; implemented: {known}")


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json.

    Raises:
      FileNotFoundError: there is none.
      CheckpointError: it is not a JSON object.
    """
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder.name}: no config.json, which says what the weights are")
    return read_json(folder / "config.json")


def save(path: str | Path, components: Mapping[str, Component]) -> None:
    """Write a model so that it loads without conversion: a safetensors file for each network, and their configurations
    in one JSON.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    for name, component in components.items():
        leaves = {".".join(path): leaf for path, leaf in convert.flat(component.params).items()}
        entries = {key: Entry(x.shape, x.dtype, lambda x=x: np.asarray(x)) for key, x in leaves.items()}
        write_safetensors(path / f"{name}.safetensors", entries, {"format": "flax"})
    manifest = {
        "format": FORMAT,
        "components": {name: dict(component.config) for name, component in components.items()},
    }
    write_json(path / MANIFEST, manifest)


def export(path: str | Path, components: Mapping[str, Component]) -> None:
    """Write a model in the layout of diffusers; tensors that were not cast have their original bits."""
    for name, component in components.items():
        folder = Path(path) / name
        folder.mkdir(parents=True, exist_ok=True)
        stem = "diffusion_pytorch_model" if "_class_name" in component.config else "model"  # else it is transformers'
        entries = convert.params_to_torch(component.params)
        write_safetensors(folder / f"{stem}.safetensors", entries, {"format": "pt"})
        write_json(folder / "config.json", dict(sorted(component.config.items())))


def _load_folder(folder: Path, variant: str | None, how: _How, name: str | None = None) -> Component:
    name = name or folder.name
    how = how.of(name)
    raw = how.config(read_config(folder))
    module = how.module(raw)  # before the weights: another network's config is the clearer error
    return how.component(name, raw, open_folder(folder, variant), module)


def _load_single(file: Checkpoint, how: _How, ema: bool, configs: Mapping[str, Mapping] | None) -> dict[str, Component]:
    file = respelled(file)
    if published.is_published(file):
        return {"transformer": _load_published(file, how.of("transformer"), ema, configs)}
    layout = next((layout for layout in LAYOUTS if layout.found_in(file)), single)
    found, parts = {}, layout.parts(file, configs, convert.permitted(how.allow_unused))
    averaged = {name for name in ("unet", "transformer") if name in parts and parts[name].tensors is None}
    if ema and not averaged:
        raise CheckpointError(f"{file.source} has no moving average of its weights; use ema=False")
    for name, part in parts.items():
        mine_how = how.of(name)
        config = mine_how.config(part.config)
        module = mine_how.module(config)
        if part.tensors is not None:
            found[name] = mine_how.component(name, config, part.tensors, module, part.prefix)
            continue
        mine = single.used(part, module.config, file)
        if ema and name in averaged:
            mine = _moving_average(mine, part.prefix, file)
        sources = compvis.sources(module, convert.keys(convert.abstract(module)), openclip=part.openclip)
        found[name] = mine_how.component(name, config, compvis.translate(mine, sources), module, part.prefix)
    return found


def _load_published(file: Checkpoint, how: _How, ema: bool, configs: Mapping[str, Mapping] | None) -> Component:
    if ema and file.metadata.get("group") != "ema":
        raise CheckpointError(f'{file.source} holds no averaged weights under "ema"; use ema=False')
    raw, mine = published.translate(file, (configs or {}).get("transformer"))
    return how.component("transformer", raw, mine, how.module(raw))


def _moving_average(network: Checkpoint, prefix: str, file: Checkpoint) -> Checkpoint:
    places = {key: compvis.ema_key(prefix + key) for key in network}
    missing = [place for place in places.values() if place not in file]
    if missing:
        raise CheckpointError(
            f"{file.source} lacks {len(missing)} of {len(places)} averaged weights (model_ema.*); use ema=False"
        )
    return Checkpoint({key: file.stored[place] for key, place in places.items()}, file.source)


def _load_saved(path: Path, how: _How) -> dict[str, Component]:
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path.name}/{MANIFEST} is of format {manifest.get('format')}; this version reads {FORMAT}"
        )
    components = manifest.get("components")
    if not isinstance(components, dict) or not all(
        name in COMPONENTS and isinstance(raw, dict) for name, raw in components.items()
    ):
        raise CheckpointError(f"{path.name}/{MANIFEST} names no components; known: {', '.join(COMPONENTS)}")
    found = {}
    like = convert.permitted(how.allow_unused)
    for name, raw in components.items():
        mine = how.of(name)
        raw = mine.config(raw)
        module = mine.module(raw)
        leaves = {".".join(p): (p, leaf.shape) for p, leaf in convert.flat(convert.abstract(module)).items()}
        file = open_file(path / f"{name}.safetensors")
        what = f"{path.name}/{file.source}"
        convert.check(file, {key: shape for key, (_, shape) in leaves.items()}, what, like)
        stored = {convert.torch_key(p): _as_torch(p[-1], file.stored[key]) for key, (p, _) in leaves.items()}
        found[name] = mine.component(name, raw, Checkpoint(stored, what), module)
    return found


def _as_torch(leaf: str, stored: Any) -> Entry:
    shape = convert.torch_shape(leaf, stored.shape)
    return Entry(shape, stored.dtype, lambda: convert.to_torch(leaf, stored.read()))
