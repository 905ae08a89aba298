"""Finding a checkpoint's weights: single files, folders with variants and shards, and the hub.

References:
  the file names of diffusers and transformers: `<stem>[.variant].safetensors`,
  `<stem>.safetensors.index[.variant].json`.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmdjax._core.extras import optional
from mmdjax.checkpoint import Checkpoint, CheckpointError, open_safetensors, read_json, refuse_pointer
from mmdjax.sd.files.archive import open_archive
from mmdjax.sd.files.quantised import scaled

WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>\w+))?"
    r"\.(?P<format>safetensors|bin)(?P<index>(?:\.(?P<old_variant>\w+))?\.index(?:\.(?P<variant_of_index>\w+))?\.json)?"
)
SHARD = re.compile(r"-\d{5}-of-\d{5}(\.\w+)?\.(safetensors|bin)$")


def open_file(path: str | Path) -> Checkpoint:
    """A `.safetensors`, `.ckpt`, `.bin`, `.pt` or `.pth` file; the format is known from its first bytes, not its name.

    Weights that were stored with a scale, in 8 bits, are read as value × scale: see `mmdjax.sd.files.quantised`.

    Raises:
      FileNotFoundError: no such file.
      CheckpointError: it is damaged, of another format, or a pickle that names more than tensors.
    """
    return scaled(_open(Path(path)))


def _open(path: Path) -> Checkpoint:
    refuse_pointer(path)
    with path.open("rb") as file:
        magic = file.read(9)
    if magic[:2] == b"PK":
        return open_archive(path)
    if path.suffix == ".safetensors" or magic[8:] == b"{":  # after the length of a JSON
        return open_safetensors(path)
    if magic[:4] == b"GGUF":
        raise CheckpointError(f"{path.name} is in the format GGUF, which is not read; take the model's safetensors")
    if magic[:1] == b"\x80":
        raise CheckpointError(
            f"{path.name} is in the format of PyTorch before 1.6, a bare pickle; save it again with a newer PyTorch, "
            "or convert it to safetensors"
        )
    raise CheckpointError(f"{path.name} is neither safetensors nor a PyTorch archive")


def download(repo: str, *, variant: str | Mapping[str, str] | None = None, revision: str | None = None) -> Path:
    """Download a model from the hub, and return its local folder. Only configs, tokenizers and one variant are fetched.

    Args:
      variant: see `mmdjax.sd.load_models`; parts that lack it are fetched plain.
    Raises:
      ImportError: huggingface_hub is not installed.
      FileNotFoundError: no such model, no permission, or no network.
    """
    hub = optional("huggingface_hub", "sd", f"{repo} is no local path; to fetch it from the hub")

    def fetch(stems: Sequence[str], ending: str, parts: Mapping[str, str | None]) -> Path:
        weights = []
        for part, name in parts.items():
            dot = f".{name}" if name else ""
            shapes = (dot, f"{dot}-?????-of-?????", f"-?????-of-?????{dot}")
            weights += [f"{part}/{stem}{shape}.{ending}" for stem in stems for shape in shapes]
        try:
            patterns = ["*.json", "*.txt", "*.jinja", "*spiece.model", *weights]
            return Path(hub.snapshot_download(repo, revision=revision, allow_patterns=patterns))
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) is not None:  # of this machine's disk
                raise
            said = " ".join(str(error).split())
            raise FileNotFoundError(f"{repo} is no local path, and the hub does not give it: {said}") from error

    new, old = ("diffusion_pytorch_model", "model"), ("diffusion_pytorch_model", "pytorch_model")
    if isinstance(variant, Mapping):
        folder = fetch((), "", {})
        parts = {path.parent.name: variant.get(path.parent.name) for path in folder.glob("*/config.json")}
        folder = fetch(new, "safetensors", parts)
    else:
        folder = fetch(new, "safetensors", {"*": variant})
        lacking = [path.parent for path in folder.glob("*/config.json") if not variants(path.parent)]
        if variant is not None and lacking and len(lacking) < len([*folder.glob("*/config.json")]):
            fetch(new, "safetensors", {part.name: None for part in lacking})
    if any(folder.rglob("*.safetensors")):
        return folder
    # the oldest models have nothing else
    return fetch(old, "bin", {"*": None} if isinstance(variant, Mapping) else {"*": variant})


def variants(folder: Path) -> dict[str | None, list[re.Match]]:
    """The files of weights in a folder and the indices of shards, by variant; None is the plain one."""
    found: dict[str | None, list[re.Match]] = {}
    for match in filter(None, map(WEIGHTS.fullmatch, sorted(path.name for path in folder.iterdir()))):
        found.setdefault(match["variant"] or match["variant_of_index"] or match["old_variant"], []).append(match)
    return found


def variant_of_each(folders: Mapping[str, Path], variant: str | Mapping[str, str] | None) -> dict[str, str | None]:
    """The variant of each of a model's parts: as in diffusers, a part that lacks it takes its plain weights.

    Raises:
      FileNotFoundError: no part has the variant.
      ValueError: a variant for parts that are not there.
    """
    if isinstance(variant, Mapping):
        unknown = sorted(variant.keys() - folders.keys())
        if unknown:
            raise ValueError(f"variant names {', '.join(unknown)}; the model's parts are {', '.join(folders)}")
        return {name: variant.get(name) for name in folders}
    there = {name: variants(folder) for name, folder in folders.items()}
    if variant is not None and not any(variant in found for found in there.values()):
        names = sorted({name or "plain" for found in there.values() for name in found})
        raise FileNotFoundError(f"no part of the model has {variant} weights; there are: {', '.join(names) or 'none'}")
    return {name: variant if variant in found else None for name, found in there.items()}


def open_folder(folder: str | Path, variant: str | None = None) -> Checkpoint:
    """The weights in a model's folder: one file, or shards with an index; safetensors if there are any.

    Args:
      variant: "fp16" for `model.fp16.safetensors` and the like. None: the plain file, or the only variant.
    Raises:
      FileNotFoundError: no weights, not that variant, or shards that the index names are missing; all are listed.
      CheckpointError: see `open_file`.
    """
    folder = Path(folder)
    found = variants(folder)
    if not found:
        part = next((path.name for path in sorted(folder.iterdir()) if SHARD.search(path.name)), None)
        reason = "looked for *.safetensors and *.bin"
        if part is not None:
            reason = f"{part} is one of several parts whose index, *.safetensors.index.json, is missing"
        raise FileNotFoundError(f"{folder.name}: no weights beside config.json ({reason})")
    if variant is None and None not in found and len(found) == 1:
        (variant,) = found
    if variant not in found:
        there = sorted(name or "plain" for name in found)
        raise FileNotFoundError(f"{folder.name}: no {variant or 'plain'} weights; there are: {', '.join(there)}")
    best = min(found[variant], key=lambda m: (m["format"] != "safetensors", m["index"] is not None))
    return scaled(_open_shards(folder / best.string)) if best["index"] else open_file(folder / best.string)


def _open_shards(index: Path) -> Checkpoint:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index.name} is not an index of shards: it has no weight_map")
    files = sorted(set(places.values()))
    if any(Path(name).name != name for name in files):
        raise CheckpointError(f"{index.name} points outside its folder")
    missing = [name for name in files if not (index.parent / name).exists()]
    if missing:
        count = f"{len(missing)} of {len(files)}"
        raise FileNotFoundError(f"{index.parent.name}: {count} shards are missing: {', '.join(missing)}")
    shards = {name: _open(index.parent / name).stored for name in files}
    absent = [key for key, name in places.items() if key not in shards[name]]
    if absent:
        raise CheckpointError(f"{index.name} places {absent[:5]} ({len(absent)} in all) in shards that lack them")
    return Checkpoint({key: shards[name][key] for key, name in places.items()}, index.parent.name)
