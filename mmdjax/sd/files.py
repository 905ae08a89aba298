"""Finding a checkpoint's weights: single files, folders with variants and shards, and the hub.

References:
  the file names of diffusers and transformers: `<stem>[.variant].safetensors`,
  `<stem>.safetensors.index[.variant].json`.
"""

import re
from pathlib import Path

from mmdjax._core.extras import optional
from mmdjax.checkpoint import Checkpoint, CheckpointError, open_safetensors, read_json
from mmdjax.sd.archive import open_archive

WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>\w+))?"
    r"\.(?P<format>safetensors|bin)(?P<index>\.index(?:\.(?P<variant_of_index>\w+))?\.json)?"
)


def open_file(path: str | Path) -> Checkpoint:
    """A `.safetensors`, `.ckpt`, `.bin`, `.pt` or `.pth` file; the format is known from its first bytes.

    Raises:
      FileNotFoundError: no such file.
      CheckpointError: it is damaged, of another format, or a pickle that names more than tensors.
    """
    path = Path(path)
    with path.open("rb") as file:
        magic = file.read(2)
    if magic == b"PK":
        return open_archive(path)
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    if magic[:1] == b"\x80":
        raise CheckpointError(
            f"{path.name} is in the format of PyTorch before 1.6, a bare pickle; save it again with a newer PyTorch, "
            "or convert it to safetensors"
        )
    raise CheckpointError(f"{path.name} is neither safetensors nor a PyTorch archive")


def download(repo: str, *, variant: str | None = None, revision: str | None = None) -> Path:
    """Download a model from the hub, and return its local folder. Only configs, tokenizers and one variant are fetched.

    Raises:
      ImportError: huggingface_hub is not installed.
      FileNotFoundError: no such model, no permission, or no network.
    """
    hub = optional("huggingface_hub", "sd", f"{repo} is no local path; to fetch it from the hub")
    dot = f".{variant}" if variant else ""

    def fetch(stems, ending):
        shapes = (dot, f"{dot}-?????-of-?????", f"-?????-of-?????{dot}")
        weights = [f"*/{stem}{shape}.{ending}" for stem in stems for shape in shapes]
        patterns = ["*.json", "*.txt", "*.jinja", "*spiece.model", *weights]
        try:
            return Path(hub.snapshot_download(repo, revision=revision, allow_patterns=patterns))
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) is not None:  # of this machine's disk
                raise
            said = " ".join(str(error).split())
            raise FileNotFoundError(f"{repo} is no local path, and the hub does not give it: {said}") from error

    folder = fetch(("diffusion_pytorch_model", "model"), "safetensors")
    if any(folder.rglob("*.safetensors")):
        return folder
    return fetch(("diffusion_pytorch_model", "pytorch_model"), "bin")  # the oldest models have nothing else


def open_folder(folder: str | Path, variant: str | None = None) -> Checkpoint:
    """The weights in a model's folder: one file, or shards with an index; safetensors if there are any.

    Args:
      variant: "fp16" for `model.fp16.safetensors` and the like. None: the plain file, or the only variant.
    Raises:
      FileNotFoundError: no weights, not that variant, or shards that the index names are missing; all are listed.
      CheckpointError: see `open_file`.
    """
    folder = Path(folder)
    names = sorted(path.name for path in folder.iterdir())
    found: dict[str | None, list[re.Match]] = {}
    for match in filter(None, map(WEIGHTS.fullmatch, names)):
        found.setdefault(match["variant"] or match["variant_of_index"], []).append(match)
    if not found:
        raise FileNotFoundError(f"{folder.name}: no weights beside config.json (looked for *.safetensors and *.bin)")
    if variant is None and None not in found and len(found) == 1:
        (variant,) = found
    if variant not in found:
        there = sorted(name or "plain" for name in found)
        raise FileNotFoundError(f"{folder.name}: no {variant or 'plain'} weights; there are: {', '.join(there)}")
    best = min(found[variant], key=lambda m: (m["format"] != "safetensors", m["index"] is not None))
    return _open_shards(folder / best.string) if best["index"] else open_file(folder / best.string)


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
    shards = {name: open_file(index.parent / name).stored for name in files}
    absent = [key for key, name in places.items() if key not in shards[name]]
    if absent:
        raise CheckpointError(f"{index.name} places {absent[:5]} ({len(absent)} in all) in shards that lack them")
    return Checkpoint({key: shards[name][key] for key, name in places.items()}, index.parent.name)
