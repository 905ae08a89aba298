"""A web page: choose a model and references, see what it makes without guidance and with it, from the same noise.

    python examples/app.py                     # the page is at http://127.0.0.1:7860
    python examples/app.py --model FOLDER      # begin with a model of your own, in the layout of diffusers

It needs the extra `app`. The page is for this machine alone, and nothing is fetched from the network. `make` does the
work without the page. The first run of a model compiles for some seconds; other values of the same sizes do not.
"""

import argparse
import dataclasses
import functools
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
import jax
import jax.numpy as jnp
import numpy as np

import mmdjax.sd
from mmdjax import MMDGuidance, guided_sample, load_faces
from mmdjax.faces import ATTRIBUTES, faces_with, read_attributes
from mmdjax.guidance import default_kernel
from mmdjax.metrics import energy_distance
from mmdjax.mmd import attribution
from mmdjax.plots import trace_curves
from mmdjax.sd.pictures import read_picture

HERE = Path(__file__).parent
sys.path.append(str(HERE / "faces"))

from drawn_portraits import BUNS, read_sheet  # noqa: E402  # found through the line above

FACES, PORTRAITS, FOLDER = "pixel-art faces", "drawn portraits", "a folder of mine"
OWN = "my own pictures"
NUM_REFS, NUM_FRESH, PULLED, SHOWN_SIDE = 50, 200, 8, 96


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the page asks for.

    Args:
      model: FACES, PORTRAITS or FOLDER.
      folder: of the model, with FOLDER.
      attribute: what the references have in common, of `attributes(model)`; OWN: take `files`.
      files: paths of pictures.
      prompts: one a line; the samples take them in turn.
      cfg: how strongly prompts count, in models that take them.
      scale: of the guidance.
    """

    model: str = FACES
    folder: str = ""
    attribute: str = "glasses"
    files: tuple[str, ...] = ()
    prompts: str = ""
    cfg: float = 2.0
    scale: float = 1.0
    samples: int = 16
    steps: int = 20
    seed: int = 0


class Loaded(NamedTuple):
    """A model; without a pipeline samples are pictures, with one they are its latents."""

    params: Any
    size: tuple[int, int, int]  # height, width and channels of pictures
    model: Any = None
    pipeline: Any = None


class Result(NamedTuple):
    """Pictures are bytes [n, height, width, 3].

    Args:
      refs, unguided, guided: pictures.
      traces: by name, what happened at each step.
      table: a header and rows: what was measured of unguided samples, guided ones, and references.
      shares: [samples, references] of each guided sample, how much of the pull on it comes from each reference.
    """

    refs: np.ndarray
    unguided: np.ndarray
    guided: np.ndarray
    traces: dict[str, Any]
    table: list[list[str]]
    shares: np.ndarray


def attributes(model: str) -> list[str]:
    """What references may have in common, for the model."""
    names = {FACES: ATTRIBUTES, PORTRAITS: ("sunglasses", "glasses", "beard", "bun")}
    return [*names.get(model, ()), OWN]


def pictures_with(model: str, attribute: str) -> np.ndarray:
    """All pictures of the examples that have an attribute, in [−1, 1]."""
    if attribute not in attributes(model)[:-1]:
        raise ValueError(f"references: {attribute!r}; for {model} choose of {', '.join(attributes(model))}")
    if model == FACES:
        return faces_with(attribute).images
    if attribute in ("sunglasses", "glasses"):
        return read_sheet(attribute).images
    source = read_sheet("source")
    has = {"beard": source.attributes["beard"] != "none", "bun": np.isin(source.attributes["head"], BUNS)}
    return source.images[has[attribute]]


def read_files(files: tuple[str, ...], size: tuple[int, int, int]) -> np.ndarray:
    """Pictures in [−1, 1], cropped to the shape of the model's and resized.

    Raises:
      ValueError: fewer than two, or one that cannot be read.
    """
    pictures = []
    for file in files:
        try:
            pictures.append(read_picture(file, size[0], size[1], channels=size[2]))
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"{Path(file).name} cannot be read as a picture ({error}); remove it") from error
    if len(pictures) < 2:
        found = "There are no references" if not pictures else "There is one reference"
        raise ValueError(f"{found}, and sets are compared: drop at least 2 pictures, better 20 to 500")
    return np.stack(pictures)


@functools.lru_cache(maxsize=3)
def load(model: str, folder: str = "") -> Loaded:
    """The model, which stays in memory.

    Raises:
      ValueError, OSError: no such folder, or one that cannot be loaded.
    """
    if model == FACES:
        faces, params = load_faces()
        return Loaded(params, faces.shape, faces)
    if model not in (PORTRAITS, FOLDER):
        raise ValueError(f"model: {model!r}; choose of {FACES}, {PORTRAITS}, {FOLDER}")
    path = HERE / "portraits" if model == PORTRAITS else Path(folder.strip()).expanduser()
    if model == FOLDER and not (folder.strip() and path.is_dir()):
        raise ValueError(f"model: there is no folder {folder.strip()!r}; give one in the layout of diffusers")
    pipeline, params = mmdjax.sd.load(path, param_dtype=jnp.float32)
    down, (height, width, _) = pipeline.autoencoder.config.downscale, pipeline.latent_shape()
    return Loaded(params, (height * down, width * down, pipeline.autoencoder.config.in_channels), pipeline=pipeline)


def references(chosen: Settings) -> tuple[np.ndarray, np.ndarray | None]:
    """Pictures to guide by, and others like them to judge by; None: there are no others."""
    if chosen.attribute == OWN:
        return read_files(chosen.files, load(chosen.model, chosen.folder).size), None
    images = pictures_with(chosen.model, chosen.attribute)
    rows = np.random.default_rng(chosen.seed).permutation(len(images))
    return images[rows[:NUM_REFS]], images[rows[NUM_REFS : NUM_REFS + NUM_FRESH]]


def check(chosen: Settings) -> None:
    """Raise ValueError for a number that is missing or out of range, naming it."""
    whole = {"samples": (2, 256), "steps": (1, 1000), "seed": (0, 2**31 - 1)}
    for name, (least, most) in (whole | {"scale": (0, 10), "cfg": (0, 50)}).items():
        value, kind = getattr(chosen, name), "a whole number" if name in whole else "a number"
        good = isinstance(value, int | float) and least <= value <= most
        if not good or (name in whole and value != int(value)):
            raise ValueError(f"{name} is {value}; give {kind} from {least} to {most}")


def make(chosen: Settings) -> Result:
    """Sample without and with guidance from the same noise, and measure both.

    Raises:
      ValueError, OSError: a setting or a file that cannot be used; the message says which, and what to do.
    """
    check(chosen)
    params, _, model, pipeline = loaded = load(chosen.model, chosen.folder)
    prompts = [line.strip() for line in chosen.prompts.splitlines() if line.strip()]
    if prompts and not (pipeline and pipeline.conditional):
        raise ValueError(f"prompts: the model takes none, and there is {prompts[0]!r}; empty the field")
    images, others = references(chosen)
    judged = images if others is None else others
    n, how = int(chosen.samples), {}
    encode = decode = np.asarray
    if pipeline:
        encode = functools.partial(pipeline.encode_images, params, batch_size=8)
        decode = functools.partial(pipeline.decode, params, batch_size=8)
        words = {}
        if pipeline.conditional:
            words = {"guidance_scale": chosen.cfg, "null_cond": pipeline.encode_prompts(params, "", negative=True)}
            how["cond"] = pipeline.encode_prompts(
                params, [(prompts or [""])[i % len(prompts or [""])] for i in range(n)]
            )
        model, how["times"] = pipeline.model(**words), pipeline.times(int(chosen.steps))
    refs, fresh = encode(images), encode(judged)

    def sample(scale):  # 0 is plain sampling by the same program, and its trace has MMD², too
        guidance, key = MMDGuidance(scale=float(scale)), jax.random.key(int(chosen.seed))
        settings = {"model": model, "num_samples": n, "num_steps": int(chosen.steps), **how}
        return guided_sample(params, key, refs, guidance=guidance, **settings)

    plain, guided = sample(0), sample(chosen.scale)
    made = [np.asarray(decode(x)) for x in (plain.x, guided.x)]
    far = [f"{float(energy_distance(x, fresh)):.3f}" for x in (plain.x, guided.x, refs)]
    table = [["", "unguided", "guided", "references"], ["energy distance", *far]]
    table.append(["MMD² to the references", *(f"{float(done.trace.mmd2[-1]):.4f}" for done in (plain, guided)), "0"])
    if loaded.model and chosen.attribute in ATTRIBUTES:
        _, name, value = ATTRIBUTES[chosen.attribute]
        has = [f"{100 * (read_attributes(x)[name] == value).mean():.0f} %" for x in (*made, images)]
        table.append([f"with {chosen.attribute}, says a classifier", *has])
    traces = {"unguided": plain.trace, "guided": guided.trace}
    shares = np.asarray(attribution(default_kernel("denoised"), guided.x, refs))
    return Result(*map(as_bytes, (images, *made)), traces, table, shares)


def as_bytes(images: np.ndarray) -> np.ndarray:
    """Pictures in [−1, 1] as bytes with three channels."""
    pixels = np.round((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)
    return np.broadcast_to(pixels, (*pixels.shape[:3], 3))


def most_pulling(shares: np.ndarray) -> list[tuple[int, float]]:
    """The references that pull a sample most, and their shares [references] of the pull."""
    return [(int(i), float(shares[i])) for i in np.argsort(-shares)[:PULLED]]


# The page


def shown(images: np.ndarray) -> list[Any]:
    """Small pictures enlarged without blur, for a gallery."""
    from PIL import Image

    times = max(1, SHOWN_SIDE // images.shape[1])
    return [Image.fromarray(image.repeat(times, 0).repeat(times, 1)) for image in images]


def explained(function):
    """A mistake of the user's becomes a message on the page."""

    @functools.wraps(function)
    def wrapped(*values):
        try:
            return function(*values)
        except (ValueError, OSError) as error:
            raise gr.Error(str(error), title="This cannot run", duration=None, print_exception=False) from error

    return wrapped


def settings_of(*values: Any) -> Settings:
    """The settings from the page's fields, in their order; an empty field of files or words is None."""
    chosen = Settings(*values)
    files = tuple(chosen.files or ())
    return dataclasses.replace(chosen, files=files, folder=chosen.folder or "", prompts=chosen.prompts or "")


@explained
def preview(*values: Any):
    """The references, before anything is sampled."""
    chosen, size = settings_of(*values), {FACES: 16, PORTRAITS: 64}.get(values[0], SHOWN_SIDE)
    if chosen.attribute == OWN:
        images = read_files(chosen.files, (size, size, 3)) if len(chosen.files) > 1 else np.zeros((0, size, size, 3))
    else:
        images, _ = references(chosen)
    return gr.Gallery(shown(as_bytes(images)), label=f"References: {len(images)}")


@explained
def run(*values: Any):
    """Everything that the button shows."""
    chosen = settings_of(*values)
    result = make(chosen)
    head, *rows = result.table
    lines = [head, ["---"] + ["---:"] * 3, *rows]
    by = "the references" if chosen.attribute == OWN else f"up to {NUM_FRESH} others with {chosen.attribute}"
    note = f"\n\nThe energy distance is to {by}; 0 is a perfect match."
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines) + note
    columns = 4 if len(result.guided) <= 16 else 8
    galleries = [gr.Gallery(shown(images), columns=columns) for images in (result.unguided, result.guided)]
    return *galleries, table, trace_curves(result.traces), result, gr.Gallery([], label=CLICK)


def pulled(result: Result | None, event: gr.SelectData):
    """The references that pulled the sample that was clicked."""
    best = most_pulling(result.shares[event.index])
    pictures = shown(result.refs[[i for i, _ in best]])
    captions = [f"{100 * share:.1f} %" for _, share in best]
    label = f"References that pull guided sample {event.index + 1} most, with their share of the pull"
    return gr.Gallery(list(zip(pictures, captions, strict=True)), label=label)


def switch(model: str, attribute: str):
    """The fields that suit a model."""
    names, prompts = attributes(model), model != FACES
    value = OWN if attribute == OWN else names[0]
    fields = gr.Textbox(visible=prompts), gr.Slider(visible=prompts)
    if not prompts:
        fields = gr.Textbox("", visible=False), fields[1]
    return gr.Textbox(visible=model == FOLDER), gr.Dropdown(names, value=value), *fields


CLICK = "Click a guided picture: the references that pull it most"
CSS = ".gallery-item img, .thumbnail-item img {image-rendering: pixelated}"


def page(folder: str = "") -> gr.Blocks:
    """The page, to be launched."""
    start = Settings(model=FOLDER if folder else FACES, folder=folder, attribute=OWN if folder else "glasses")
    with gr.Blocks(title="MMD Guidance", analytics_enabled=False, fill_width=True) as blocks:
        gr.Markdown(
            "# MMD Guidance\nA diffusion model follows a few reference pictures while it samples, without training. "
            "Both sets of pictures begin with the same noise."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                model = gr.Radio([FACES, PORTRAITS, FOLDER], value=start.model, label="Model")
                own = gr.Textbox(folder, label="Folder of the model, in the layout of diffusers", visible=bool(folder))
                attribute = gr.Dropdown(attributes(start.model), value=start.attribute, label="References: all have")
                files = gr.File(file_count="multiple", file_types=["image"], label="Or drop pictures", height=120)
                prompts = gr.Textbox(label="Prompts, one a line", lines=3, visible=bool(folder),
                                     placeholder="a smiling person with a black bun")  # fmt: skip
                cfg = gr.Slider(1, 15, start.cfg, step=0.5, label="Strength of the prompts", visible=bool(folder))
                scale = gr.Slider(0, 2, start.scale, step=0.05, label="Strength of the guidance (scale)")
                samples = gr.Slider(2, 64, start.samples, step=1, label="Number of samples")
                steps = gr.Slider(1, 100, start.steps, step=1, label="Steps")
                seed = gr.Number(start.seed, precision=0, label="Seed")
                button = gr.Button("Make pictures", variant="primary", elem_id="make")
            with gr.Column(scale=3):
                with gr.Row():
                    refs, plain, guided = (
                        gr.Gallery(label=label, columns=columns, height=430, format="png", allow_preview=False,
                                   object_fit="contain", interactive=False, elem_id=label.lower(), buttons=[])
                        for label, columns in (("References", 8), ("Unguided", 4), ("Guided", 4))
                    )  # fmt: skip
                best = gr.Gallery(label=CLICK, columns=PULLED, height=170, format="png", allow_preview=False,
                                  object_fit="contain", interactive=False, elem_id="pulled", buttons=[])  # fmt: skip
                with gr.Row():
                    table = gr.Markdown(elem_id="table")
                    curves = gr.Plot(label="MMD² along the way")
        state = gr.State()
        fields = [model, own, attribute, files, prompts, cfg, scale, samples, steps, seed]
        button.click(run, fields, [plain, guided, table, curves, state, best], api_name="make")
        guided.select(pulled, state, best, api_name=False)
        files.upload(lambda: OWN, None, attribute, api_name=False)
        model.change(switch, [model, attribute], [own, attribute, prompts, cfg], api_name=False)
        gr.on([blocks.load, attribute.change, files.change], preview, fields, refs, api_name=False)
    return blocks


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=7860, help="of the page (default %(default)s)")
    parser.add_argument("--model", default="", metavar="FOLDER", help="a model of your own, in the layout of diffusers")
    args = parser.parse_args()
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    page(args.model).launch(server_name="127.0.0.1", server_port=args.port, theme=theme, css=CSS, footer_links=[])


if __name__ == "__main__":
    main()
