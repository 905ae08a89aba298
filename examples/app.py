"""A web page: choose a model and references, see what it makes without guidance and with it, from the same noise.

    python examples/app.py                     # then open the address that it tells
    python examples/app.py --model FOLDER      # begin with a model of your own, in the layout of diffusers

It needs the extra `app`. Only this machine can open the page, and nothing is fetched from the network. `make` does the
work without the page. The first run of a model compiles for some seconds; other values of the same sizes do not.
"""

import argparse
import contextlib
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parent / "faces"))

import gradio as gr
import jax
import jax.numpy as jnp
import numpy as np
from drawn_portraits import read_sheet

import mmdjax.sd
from mmdjax import MMDGuidance, guided_sample, load_faces
from mmdjax.faces import ATTRIBUTES, faces_with, read_attributes
from mmdjax.guidance import default_kernel
from mmdjax.metrics import energy_distance
from mmdjax.mmd import attribution
from mmdjax.plots import trace_curves
from mmdjax.sd.pictures import read_picture

FACES, PORTRAITS, FOLDER, OWN = "pixel-art faces", "drawn portraits", "a folder of mine", "my own pictures"
COMMON = {FACES: (*ATTRIBUTES,), PORTRAITS: ("sunglasses", "glasses"), FOLDER: ()}  # what references may have in common
RANGES = {"samples": (2, 256), "steps": (1, 1000), "seed": (0, 2**31 - 1), "scale": (0, 10), "cfg": (0, 50)}
WHOLE = ("samples", "steps", "seed")
NUM_REFS, BATCH, PULLED, SIDE = 50, 10, 10, 96  # SIDE: pixels of a picture on the page, at least
CLICK = "### Click a guided picture to see which references pull it most"
CSS = """.grid-container {grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)) !important;
  grid-auto-rows: min-content !important; grid-template-rows: none !important; gap: 4px}
.grid-container .gallery-item, .grid-container button {aspect-ratio: 1; height: auto}
.grid-container img {image-rendering: pixelated} #table td, #table th {white-space: nowrap; padding: 4px 10px}"""


class Settings(NamedTuple):
    """What the page asks for, in the order of its fields."""

    model: str = FACES
    folder: str = ""  # of the model, with FOLDER
    attribute: str = "glasses"  # what the references have in common, of COMMON[model]; OWN: they are `files`
    files: Sequence[str] | None = None
    prompts: str = ""  # one a line; the samples take them in turn
    cfg: float = 2.0  # how strongly prompts count
    scale: float = 1.0  # of the guidance
    samples: int = 25
    steps: int = 40
    seed: int = 0


class Result(NamedTuple):
    """Pictures are bytes [n, height, width, 3]; shares [samples, references] are those of the pull on a guided one."""

    refs: np.ndarray
    unguided: np.ndarray
    guided: np.ndarray
    traces: dict[str, Any]
    table: list[list[str]]
    shares: np.ndarray


@functools.lru_cache(maxsize=3)
def load(model: str, folder: str = "") -> tuple[Any, tuple[int, int, int], Any, Any]:
    """Parameters, the pictures' height, width and channels, and a model of pictures or a pipeline of latents."""
    if model == FACES:
        faces, params = load_faces()
        return params, faces.shape, faces, None
    path = Path(__file__).parent / "portraits" if model == PORTRAITS else Path(folder.strip()).expanduser()
    if model != PORTRAITS and not (folder.strip() and path.is_dir()):  # another word would be looked up on the hub
        raise ValueError(f"The model's folder {folder.strip()!r} does not exist; give one in the layout of diffusers")
    pipeline, params = mmdjax.sd.load(path, param_dtype=jnp.float32)
    down, (height, width, _) = pipeline.autoencoder.config.downscale, pipeline.latent_shape()
    return params, (height * down, width * down, pipeline.autoencoder.config.in_channels), None, pipeline


def references(chosen: Settings, size: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Pictures in [−1, 1]: those to guide by, and others with the same attribute; of one's own there are no others."""
    if chosen.attribute == OWN:
        images = np.zeros((len(chosen.files or ()), *size), np.float32)
        for i, file in enumerate(chosen.files or ()):
            try:
                images[i] = read_picture(file, *size[:2], channels=size[2])
            except Exception as error:  # decoders raise errors of many kinds
                raise ValueError(f"{Path(file).name} is not a picture that can be read; remove it") from error
        return images, images[:0]
    if chosen.attribute not in COMMON[chosen.model]:
        raise ValueError(f"References {chosen.attribute!r}: choose of {', '.join((*COMMON[chosen.model], OWN))}")
    images = (faces_with if chosen.model == FACES else read_sheet)(chosen.attribute).images
    rows = np.random.default_rng(0).permutation(len(images))
    return images[rows[:NUM_REFS]], images[rows[NUM_REFS : 2 * NUM_REFS]]


def make(chosen: Settings) -> Result:
    """Sample without and with guidance from the same noise, and measure both. ValueError or OSError: why not."""
    for name, (least, most) in RANGES.items():
        value, whole = getattr(chosen, name), name in WHOLE
        if value is None or not least <= value <= most or (whole and value != int(value)):
            raise ValueError(f"{name} is {value}; give a {'whole ' * whole}number from {least} to {most}")
    params, size, model, pipeline = load(chosen.model, chosen.folder)
    n, steps, key = int(chosen.samples), int(chosen.steps), jax.random.key(int(chosen.seed))
    prompts = [line.strip() for line in (chosen.prompts or "").splitlines() if line.strip()]
    if prompts and not (pipeline and pipeline.conditional):
        raise ValueError(f"The model takes no prompts, and there is {prompts[0]!r}; empty the field")
    if len(prompts) > n:
        raise ValueError(f"There are {len(prompts)} prompts for {n} samples; give fewer prompts or make more samples")
    images, others = references(chosen, size)
    if len(images) < 2:
        raise ValueError(f"Number of references: {len(images)}; drop at least 2 pictures, better 20 to 500")
    encode, decode, how = np.asarray, np.asarray, {"num_steps": steps}
    if pipeline:
        encode = functools.partial(pipeline.encode_images, params, batch_size=BATCH)
        decode = functools.partial(pipeline.decode, params, batch_size=BATCH)
        model, how = pipeline.model(), {"times": pipeline.times(steps)}
    if pipeline and pipeline.conditional:
        each = [(prompts or [""])[i % max(1, len(prompts))] for i in range(n)]
        model = pipeline.model(guidance_scale=chosen.cfg, null_cond=pipeline.encode_prompts(params, "", negative=True))
        how["cond"] = pipeline.encode_prompts(params, each)
    encoded = encode(np.concatenate([images, others]))
    refs, fresh = encoded[: len(images)], encoded[len(images) :] if len(others) else encoded
    plain, guided = (
        guided_sample(params, key, refs, model=model, num_samples=n, guidance=MMDGuidance(scale=scale), **how)
        for scale in (0.0, float(chosen.scale))  # 0 is plain sampling by the same program, and its trace has MMD², too
    )
    made = np.split(np.asarray(decode(np.concatenate([plain.x, guided.x]))), 2)
    distances = [f"{float(energy_distance(x, fresh)):.2f}" for x in (plain.x, guided.x, refs)]
    mmd2 = [f"{float(done.trace.mmd2[-1]):.3f}" for done in (plain, guided)]
    table = [["", "unguided", "guided", "references"], ["energy distance", *distances], ["MMD²", *mmd2, ""]]
    if chosen.model == FACES and chosen.attribute != OWN:
        _, name, value = ATTRIBUTES[chosen.attribute]
        seen = [f"{100 * (read_attributes(x)[name] == value).mean():.0f} %" for x in (*made, images)]
        table.append([f"with {chosen.attribute}", *seen])
    shares = np.asarray(attribution(default_kernel("denoised"), guided.x, refs))
    return Result(*map(as_bytes, (images, *made)), {"unguided": plain.trace, "guided": guided.trace}, table, shares)


def as_bytes(images: np.ndarray) -> np.ndarray:
    """Pictures in [−1, 1] as bytes with three channels."""
    return np.round((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8).repeat(3 // images.shape[-1], axis=-1)


def shown(images: np.ndarray) -> list[np.ndarray]:
    """Small pictures enlarged without blur."""
    return [image.repeat(times := max(1, SIDE // len(image)), 0).repeat(times, 1) for image in images]


@contextlib.contextmanager
def explained():
    """A mistake of the user's becomes a message on the page."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from error


@explained()
def preview(model, *fields):
    side = {FACES: 16, PORTRAITS: 64}.get(model, SIDE)  # no model is loaded for it
    return shown(as_bytes(references(Settings(model, *fields), (side, side, 3))[0]))


@explained()
def run(*fields):
    result = make(chosen := Settings(*fields))
    head, *rows = ["| " + " | ".join(line) + " |" for line in result.table]
    to = "the references" if chosen.attribute == OWN else f"others with {chosen.attribute}"
    note = f"Energy distance to {to}, MMD² to the references: 0 is a match, below 0 is more even than chance."
    columns = min(8, int(np.ceil(len(result.guided) ** 0.5)))
    galleries = [gr.Gallery(shown(images), columns=columns, selected_index=None) for images in result[1:3]]
    table = "\n".join([head, "|---|---:|---:|---:|", *rows, "", note])
    return *galleries, table, trace_curves(result.traces), (result.refs, result.shares), CLICK, []


def pulled(kept: tuple[np.ndarray, np.ndarray], event: gr.SelectData):
    refs, shares = kept[0], kept[1][event.index]
    best = np.argsort(-shares)[:PULLED]
    title = f"### What pulls guided picture {event.index + 1} most, and its share of the pull"
    title += f" (if all pulled alike: {100 / len(refs):.1f} %)"
    return title, list(zip(shown(refs[best]), [f"{100 * share:.1f} %" for share in shares[best]], strict=True))


def switch(model: str, attribute: str):
    names, words = (*COMMON[model], OWN), model != FACES
    dropdown = gr.Dropdown(names, value=OWN if attribute == OWN else names[0])
    return gr.Textbox(visible=model == FOLDER), dropdown, gr.Textbox("", visible=words), gr.Slider(visible=words)


def page(folder: str = "") -> gr.Blocks:
    """The page, to be launched."""
    first = Settings(FOLDER, folder, OWN) if folder else Settings()
    quiet = {"format": "png", "allow_preview": False, "interactive": False, "show_label": False, "buttons": []}
    with gr.Blocks(title="MMD Guidance", analytics_enabled=False, fill_width=True) as blocks:
        gr.Markdown("# MMD Guidance\nThe same noise, without guidance and guided by references.")
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                model = gr.Radio([*COMMON], value=first.model, label="Model")
                own = gr.Textbox(folder, label="The model's folder, in the layout of diffusers", visible=bool(folder))
                attribute = gr.Dropdown((*COMMON[first.model], OWN), value=first.attribute, label="References")
                files = gr.File(file_count="multiple", file_types=["image"], label="My own pictures", height=130)
                prompts = gr.Textbox("", label="Prompts, one a line", lines=3, visible=bool(folder))
                cfg = gr.Slider(1, 15, first.cfg, step=0.5, label="Strength of the prompts (cfg)", visible=bool(folder))
                scale = gr.Slider(0, 2, first.scale, step=0.05, label="Strength of the guidance (scale)")
                with gr.Row():
                    numbers = [gr.Number(getattr(first, name), label=name.title(), min_width=80) for name in WHOLE]
                button = gr.Button("Make pictures", variant="primary", elem_id="make")
            with gr.Column(scale=4):
                galleries = []
                with gr.Row():
                    for title in ("References", "Unguided", "Guided"):
                        with gr.Column(min_width=240):
                            gr.Markdown(f"### {title}")
                            galleries.append(gr.Gallery(columns=5, height=345, elem_id=title.lower(), **quiet))
                refs, plain, guided = galleries
                told = gr.Markdown(CLICK)
                best = gr.Gallery(columns=PULLED, height=120, elem_id="pulled", **quiet)
                with gr.Row():
                    table = gr.Markdown(elem_id="table")
                    curves = gr.Plot(show_label=False)
        kept, fields = gr.State(), [model, own, attribute, files, prompts, cfg, scale, *numbers]
        shows = {"fn": preview, "inputs": fields, "outputs": refs, "show_progress": "hidden"}
        outputs = [plain, guided, table, curves, kept, told, best]
        button.click(run, fields, outputs, api_name="make", show_progress_on=[plain, guided])
        guided.select(pulled, kept, [told, best])
        files.upload(lambda: OWN, None, attribute).then(**shows)
        model.input(switch, [model, attribute], [own, attribute, prompts, cfg]).then(**shows)
        gr.on([blocks.load, attribute.input, files.clear, files.delete], **shows)
    return blocks


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, help="of the page (default: the first free one from 7860)")
    parser.add_argument("--model", default="", metavar="FOLDER", help="a model of your own, in the layout of diffusers")
    args = parser.parse_args()
    theme = gr.themes.Default(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    page(args.model).launch(server_name="127.0.0.1", server_port=args.port, theme=theme, css=CSS, footer_links=[])


if __name__ == "__main__":
    main()
