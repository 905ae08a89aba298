"""The command line: `mmdjax sample`, `encode`, `convert` and `inspect`, also `python -m mmdjax`."""

import argparse
import functools
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

DTYPES = ("float32", "bfloat16", "float16")
SAMPLERS = ("ddim", "ddpm", "euler-maruyama", "heun", "dpm++2m")
PACK = ".safetensors"
NO_SETTINGS = ("run", "traceback", "quiet")  # what run.json does not record, as it changes no result
EXAMPLE = """example:
  mmdjax inspect path/to/stable-diffusion-v1-5
  mmdjax sample path/to/stable-diffusion-v1-5 --refs pictures/ --prompt "a red cat" -n 16 --out cats

`mmdjax COMMAND --help` lists the options, their defaults and units."""


QUIET_IS_CACHED = """JAX's persistent compilation cache (JAX_COMPILATION_CACHE_DIR=FOLDER) keeps the sampling program
only with --quiet, without the progress bar."""


class _Parser(argparse.ArgumentParser):
    """Its errors are one line: "mmdjax sample: error: --steps is 0; give at least 1"."""

    def error(self, message: str) -> NoReturn:
        said = re.sub(r"^argument ([^:]+): is ", r"\1 is ", message)
        self.exit(2, f"{self.prog}: error: {said}{'' if said != message else f'; see {self.prog} --help'}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0, or 2 after an error, which is one message on stderr, or 130 after Ctrl-C."""
    try:
        args = parser().parse_args(argv)
    except SystemExit as end:  # --help, --version, or options that do not fit: all is said
        return int(end.code or 0)
    if args.quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = functools.partial(_show, args.command)
            args.run(args)
    except (ArithmeticError, ImportError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        if args.traceback:
            raise
        print(f"mmdjax {args.command}: error: {_in_words(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resume = "; repeat the command to resume" if args.command == "sample" else ""
        print(f"\nmmdjax {args.command}: interrupted; every file that was written is whole{resume}", file=sys.stderr)
        return 130
    return 0


def _show(command: str, message: Any, *where: Any, **more: Any) -> None:
    print(f"mmdjax {command}: warning: {message}", file=sys.stderr)


def _in_words(error: Exception) -> str:
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "out of memory; give a smaller --batch-size, --height and --width, or --dtype bfloat16"
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = _Parser(
        prog="mmdjax",
        description="MMD Guidance for Stable Diffusion and latent diffusion models, in JAX: sample a model so that its "
        "pictures take on the distribution of a folder of references, without training.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=_version())
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")

    sample = _command(commands, "sample", _sample, "sample a model, guided by reference pictures", QUIET_IS_CACHED)
    _model_options(sample)
    group = sample.add_argument_group("output")
    group.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="a new folder for pictures, figures, latents and run.json; if the command stops, repeat it to resume",
    )
    group.add_argument(
        "--num-samples", "-n", type=_whole(1), default=8, metavar="N", help="pictures to make (default 8)"
    )
    group.add_argument(
        "--no-compare", action="store_true", help="make no unguided samples to compare with, in half the time"
    )
    group = sample.add_argument_group("references")
    group.add_argument(
        "--refs",
        type=Path,
        metavar="PATH",
        help="folder of reference pictures, or a pack that `mmdjax encode` wrote (default: none, plain sampling)",
    )
    group.add_argument(
        "--avoid",
        type=Path,
        metavar="PATH",
        help="folder or pack of pictures to keep away from, with or without --refs (default: none)",
    )
    group.add_argument(
        "--avoid-strength",
        type=_real(0.0),
        default=1.0,
        metavar="X",
        help="how strongly; 0 is not at all (default 1)",
    )
    group.add_argument(
        "--avoid-radius",
        type=_real(0.0),
        metavar="X",
        help="no picture comes closer to one of --avoid than this, an L2 norm in latents (default: none; less of what "
        "the pictures of --avoid have in common)",
    )
    _picture_options(group)
    group = sample.add_argument_group("prompts")
    group.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="may be repeated; samples take the prompts in turn (default: the references' captions, else the empty "
        "prompt)",
    )
    group.add_argument(
        "--prompts", type=Path, metavar="FILE", help="text file with a prompt in each line, after those of --prompt"
    )
    group.add_argument("--negative", default="", metavar="TEXT", help="negative prompt (default: empty)")
    group.add_argument(
        "--cfg-scale",
        type=_real(),
        metavar="X",
        help="strength of classifier-free guidance by the prompts; 1 is none (default: the usual one of the model's "
        "family, 7.5 for Stable Diffusion 1, 2 and XL)",
    )
    group.add_argument(
        "--embedded-guidance",
        type=_real(),
        metavar="X",
        help="strength of guidance that is an input of the network (FLUX.1 dev; default 3.5)",
    )
    group = sample.add_argument_group("guidance by the references")
    group.add_argument(
        "--guidance-scale", type=_real(), default=1.0, metavar="X", help="strength; 0 is none (default 1)"
    )
    group.add_argument(
        "--at",
        choices=("denoised", "sample", "clean", "diffused"),
        default="denoised",
        help="what the guidance moves; see help(mmdjax.MMDGuidance) (default denoised)",
    )
    group.add_argument(
        "--precondition",
        choices=("shrunk", "field", "mass"),
        help="shrunk: leave out what few references show by chance; field: follow all (default shrunk; mass with --at)",
    )
    group.add_argument(
        "--memory",
        type=_whole(0),
        default=1000,
        metavar="N",
        help="how many samples of earlier batches the guidance of a batch takes into account, so that small batches "
        "align as one large batch does; 0: none (default 1000)",
    )
    group = sample.add_argument_group("sampling")
    group.add_argument("--sampler", choices=SAMPLERS, default="ddim", help="default ddim")
    group.add_argument(
        "--steps",
        type=_whole(1),
        default=50,
        metavar="N",
        help="steps for each picture, with a network call each; heun: two calls (default 50)",
    )
    group.add_argument(
        "--eta",
        type=_real(0.0),
        default=1.0,
        metavar="X",
        help="noise of ddim, from 0 (deterministic) to 1 (default 1)",
    )
    group.add_argument(
        "--batch-size", type=_whole(1), default=4, metavar="N", help="the most pictures made at once (default 4)"
    )
    group.add_argument(
        "--seed", type=_whole(-(2**31), 2**32 - 1), default=0, metavar="N", help="of the noise (default 0)"
    )

    encode = _command(commands, "encode", _encode, "encode reference pictures once, into one file to keep or share")
    _model_options(encode)
    group = encode.add_argument_group("references")
    group.add_argument("refs", type=Path, metavar="PICTURES", help="folder of reference pictures")
    group.add_argument("--prompt", metavar="TEXT", help="caption of all pictures, in place of their own")
    group.add_argument(
        "--batch-size", type=_whole(1), default=4, metavar="N", help="pictures encoded at once (default 4)"
    )
    _picture_options(group)
    group = encode.add_argument_group("output")
    group.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the pack to write, a new NAME.safetensors"
    )

    convert = _command(commands, "convert", _convert, "convert a checkpoint, tensor by tensor")
    _model_options(convert, computes=False)
    group = convert.add_argument_group("output")
    group.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    group.add_argument("--to", choices=("mmdjax", "diffusers"), default="mmdjax", help="layout (default mmdjax)")
    group.add_argument("--dtype", choices=DTYPES, help="cast to (default: as stored)")

    inspect = _command(commands, "inspect", _inspect, "show what a checkpoint is and how much memory it needs")
    _model_options(inspect)
    inspect.add_argument(
        "--batch-size",
        type=_whole(1),
        metavar="N",
        help="compile the U-Net for N pictures at once and report the memory it needs here (default: do not compile)",
    )
    return top


def _command(commands: Any, name: str, run: Any, description: str, epilog: str = "") -> argparse.ArgumentParser:
    sentence = description[0].upper() + description[1:] + "."
    command = commands.add_parser(name, help=description, description=sentence, epilog=epilog)
    command.set_defaults(run=run)
    command.add_argument(
        "--quiet",
        action="store_true",
        help="no progress bars and no summary, only errors and what was skipped",
    )
    command.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    return command


def _model_options(command: argparse.ArgumentParser, computes: bool = True) -> None:
    group = command.add_argument_group("model")
    group.add_argument(
        "model",
        metavar="MODEL",
        help="a folder in the layout of diffusers or of mmdjax, a .safetensors or .ckpt file, or a hub id",
    )
    group.add_argument(
        "--variant",
        type=_variant,
        metavar="NAME",
        help='weights of a folder, such as "fp16", or "unet=fp16,vae=fp16" by part (default: the plain ones)',
    )
    group.add_argument("--ema", action="store_true", help="the averaged weights of a single file")
    group.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="CLIP's vocabulary, which single files do not have (default: the model's own)",
    )
    group.add_argument(
        "--prediction",
        choices=("epsilon", "v_prediction", "sample"),
        help="what the network predicts, if the checkpoint does not say (single files of Stable Diffusion 2)",
    )
    group.add_argument(
        "--lora",
        action=_Pairs,
        convert=_strength,
        metavar="FILE=STRENGTH",
        help="merge a LoRA into the model, a file or PEFT's folder, such as style.safetensors=0.8; may be repeated. By "
        "component: FILE=unet:0.8,text_encoder:0.5, which leaves the others as they are (default: none)",
    )
    group.add_argument(
        "--textual-inversion",
        action=_Pairs,
        convert=str,
        first=True,
        metavar="TOKEN=FILE",
        help='a learnt word for the prompts, such as "<cat>=cat.safetensors"; may be repeated (default: none)',
    )
    group.add_argument(
        "--part",
        action=_Pairs,
        convert=str,
        first=True,
        metavar="NAME=FOLDER",
        help="a network that a single file does not hold, such as vae=FOLDER; may be repeated (default: none)",
    )
    group.add_argument(
        "--scheduler",
        metavar="CLASS",
        help="a scheduler in place of the checkpoint's, such as DDIMScheduler, with its noise and prediction",
    )
    group.add_argument(
        "--clip-skip",
        type=_whole(0),
        metavar="N",
        help="leave out the last N layers of CLIP's text encoders (default: the checkpoint's, mostly 0; what other "
        'programs call "clip skip 2" is 1)',
    )
    group.add_argument(
        "--allow-unused",
        action="append",
        default=[],
        metavar="PATTERN",
        help='keys of the checkpoint that may be left out, such as "extra.*"; may be repeated (default: none)',
    )
    if computes:
        group.add_argument("--dtype", choices=DTYPES, default="float32", help="of the computation (default float32)")


def _picture_options(group: Any) -> None:
    sides = {"type": _whole(1), "metavar": "PIXELS"}
    group.add_argument(
        "--height",
        **sides,
        help="of all pictures, a multiple of the autoencoder's factor, mostly 8 (default: the model's)",
    )
    group.add_argument("--width", **sides, help="likewise")
    group.add_argument(
        "--captions",
        choices=("use", "ignore"),
        default="use",
        help="use: a reference pulls the samples whose prompt is like its caption; if one picture has a caption, all "
        "need one. ignore: as if there were none (default use)",
    )
    group.add_argument(
        "--unreadable",
        choices=("refuse", "skip"),
        default="refuse",
        help="what to do with unreadable pictures, captions without a picture, and missing captions: stop or skip them "
        "(default refuse). Readable pictures are cropped around their centre and resized",
    )


class _Pairs(argparse.Action):
    """A repeatable option KEY=VALUE, as a dictionary; the key ends at the first or at the last sign of equality."""

    def __init__(self, *args: Any, convert: Callable[[str], Any], first: bool = False, **kwargs: Any):
        super().__init__(*args, default={}, **kwargs)
        self.convert, self.first = convert, first

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        key, sign, value = values.partition("=") if self.first else values.rpartition("=")
        given = getattr(namespace, self.dest)
        try:
            if not (key and sign and value):
                raise argparse.ArgumentTypeError(f"is {values!r}; give {self.metavar}")
            if key in given:
                raise argparse.ArgumentTypeError(f"is given twice for {key}; give it once")
            setattr(namespace, self.dest, {**given, key: self.convert(value)})
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, str(error)) from None


def _strength(text: str) -> float | dict[str, float]:
    """A number, or numbers by component."""
    if ":" not in text:
        return _real()(text)
    pairs = [part.partition(":") for part in text.split(",")]
    return {name: _real()(value) for name, _, value in pairs}


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"is {text!r}; give a whole number") from None
        if value < least or (most is not None and value > most):
            wanted = f"at least {least}" if most is None else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"is {value}; give {wanted}")
        return value

    return convert


def _real(least: float = -math.inf) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"is {text!r}; give a number") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"is {value}; give a finite number")
        if value < least:
            raise argparse.ArgumentTypeError(f"is {value:g}; give at least {least:g}")
        return value

    return convert


def _variant(text: str) -> Any:
    """ "fp16", or {"unet": "fp16"} of "unet=fp16"."""
    if "=" not in text:
        return text
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(part and equals and name for part, equals, name in pairs):
        raise argparse.ArgumentTypeError(f"is {text!r}; give a name, or PART=NAME for each part, separated by commas")
    return {part: name for part, _, name in pairs}


def _sample(args: argparse.Namespace) -> None:
    """First the checks that need no model, then those that need no weights, as loading takes minutes."""
    _check_together(args)
    prompts = [*args.prompt, *(_lines(args.prompts) if args.prompts else [])]
    from mmdjax import DDIM, DDPM, DPMSolverPP2M, EulerMaruyama, Heun, MMDGuidance
    from mmdjax.sd.models import check_path
    from mmdjax.sd.run import check_out, check_settings, check_writable, sample_to_folder

    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in NO_SETTINGS}
    if check_out(args.out, settings):
        _say(args, f"{args.out} holds the {args.num_samples} pictures of this command already; nothing was done")
        return
    check_writable(args.out)
    check_path(args.model)
    pack, folder = _open_set(args, "--refs", args.refs)
    avoided_pack, avoided_folder = _open_set(args, "--avoid", args.avoid)
    samplers = {
        "ddim": DDIM(eta=args.eta),
        "ddpm": DDPM(),
        "euler-maruyama": EulerMaruyama(),
        "heun": Heun(),
        "dpm++2m": DPMSolverPP2M(),
    }
    size = {"height": args.height, "width": args.width}
    outline = _outline(args)
    how = {"num_steps": args.steps, "prompts": prompts, "negative": args.negative, **size}
    check_settings(outline, pack, avoid=avoided_pack, **how)
    folder, avoided_folder = (_large_enough(args, found, outline) for found in (folder, avoided_folder))

    pipeline, params = _load(args)
    refs = _encoded(args, pack, folder, pipeline, params)
    avoid = _encoded(args, avoided_pack, avoided_folder, pipeline, params)
    report = sample_to_folder(
        args.out,
        pipeline,
        params,
        refs,
        num_samples=args.num_samples,
        seed=args.seed,
        prompts=prompts,
        negative=args.negative,
        cfg_scale=args.cfg_scale,
        embedded_guidance=args.embedded_guidance,
        num_steps=args.steps,
        sampler=samplers[args.sampler],
        guidance=MMDGuidance(scale=args.guidance_scale, at=args.at, precondition=args.precondition),
        batch_size=args.batch_size,
        memory=args.memory,
        compare=not args.no_compare,
        settings=settings,
        progress=not args.quiet,
        avoid=avoid,
        avoid_strength=args.avoid_strength,
        avoid_radius=args.avoid_radius,
        **size,
    )
    at = ", at each prompt" if report.get("by_condition") else ""
    lines = _table(f"distance to the {report['references']} references, in latents (unbiased{at})", report["distances"])
    lines += _table(
        f"distance to the nearest of the {report['avoided']} pictures to avoid", report.get("nearest_avoided")
    )
    _say(args, *lines, "", f"{args.num_samples} pictures in {args.out}")


def _table(title: str, found: Any) -> list[str]:
    """Lines of a table of {"before": {quantity: number}, "after": …}; none without figures."""
    if not found:
        return []
    lines = ["", title, f"{'':18}" + "".join(f"{'unguided' if name == 'before' else 'guided':>12}" for name in found)]
    for quantity in found["after"]:
        cells = ("–" if found[name][quantity] is None else f"{found[name][quantity]:.4f}" for name in found)
        lines.append(f"{quantity:18}" + "".join(f"{cell:>12}" for cell in cells))
    return lines


def _open_set(args: argparse.Namespace, option: str, path: Path | None) -> tuple[Any, Any]:
    """(pack, None) or (None, folder) of the pictures that an option names; (None, None) without one."""
    from mmdjax.checkpoint import CheckpointError
    from mmdjax.sd import load_references

    if path is None:
        return None, None
    if not path.is_file():
        return None, _open_folder(args, path, captions=args.captions == "use")
    try:
        return load_references(path), None
    except CheckpointError as error:
        reason = f": {error}" if path.suffix == PACK else " is neither a folder nor a pack"
        remedy = "a folder of pictures, or a pack that `mmdjax encode` wrote"
        raise CheckpointError(f"{option} {path}{reason}; give {remedy}") from error


def _encoded(args: argparse.Namespace, pack: Any, folder: Any, pipeline: Any, params: Any) -> Any:
    """The encoded pictures of `_open_set`; None without any."""
    if folder is not None:
        return _encode_folder(args, folder, pipeline, params)
    if pack is not None:
        pack.check(pipeline, params)
        return pack if args.captions == "use" else pack.without_prompts()
    return None


def _check_together(args: argparse.Namespace) -> None:
    """Raise ValueError for options of `mmdjax sample` that have no effect beside the others."""
    changed = {"--guidance-scale": args.guidance_scale != 1, "--at": args.at != "denoised"}
    changed |= {"--precondition": args.precondition is not None}
    changed |= {"--captions": args.captions != "use", "--unreadable": args.unreadable != "refuse"}
    if args.refs is None and args.avoid is None:
        alone = [name for name, given in changed.items() if given]
        if alone:
            raise ValueError(f"{', '.join(alone)} without --refs; give --refs, or leave {alone[0]} out")
    of_avoid = {"--avoid-strength": args.avoid_strength != 1, "--avoid-radius": args.avoid_radius is not None}
    for name, given in of_avoid.items():
        if given and args.avoid is None:
            raise ValueError(f"{name} without --avoid; give --avoid, or leave {name} out")
    if args.avoid_radius == 0:
        raise ValueError("--avoid-radius is 0; give a length above 0, or leave it out")
    for name, path in (("--refs", args.refs), ("--avoid", args.avoid)):
        if path is not None and (path.resolve() == args.out.resolve() or path.resolve() in args.out.resolve().parents):
            raise ValueError(f"--out {args.out} is within {name} {path}; give an --out outside of it")
    if args.eta != 1 and args.sampler != "ddim":
        raise ValueError(f"--eta is for --sampler ddim, not {args.sampler}; leave it out")
    if args.negative and args.cfg_scale == 1:
        raise ValueError("--negative needs a --cfg-scale other than 1, which is no classifier-free guidance")


def _encode(args: argparse.Namespace) -> None:
    from mmdjax.sd.models import check_path
    from mmdjax.sd.run import check_writable

    if args.out.suffix != PACK:
        raise ValueError(f"--out is {args.out}; a pack is a {PACK} file, such as {args.out.with_suffix(PACK)}")
    if args.out.exists():
        raise FileExistsError(f"{args.out} exists; nothing was overwritten. Give another --out")
    check_writable(args.out)
    check_path(args.model)
    folder = _open_folder(args, args.refs, captions=args.captions == "use" and args.prompt is None)
    outline = _outline(args)
    outline.latent_shape(args.height, args.width)
    folder = _large_enough(args, folder, outline)

    pipeline, params = _load(args)
    pack = _encode_folder(args, folder, pipeline, params, args.prompt)
    pack.save(args.out)
    captions = pack.captions()
    _say(args, f"{len(pack.latents)} references, {len(set(captions)) if captions else 'no'} prompts, in {args.out}")


def _open_folder(args: argparse.Namespace, path: Path, *, captions: bool) -> Any:
    from mmdjax.sd.pictures import open_pictures

    return open_pictures(path, skip=args.unreadable == "skip", captions=captions)


def _large_enough(args: argparse.Namespace, folder: Any, pipeline: Any) -> Any:
    if folder is None:
        return None
    folder = folder.at_least(pipeline.autoencoder.config.downscale, skip=args.unreadable == "skip")
    for line in folder.skipped:
        print(f"skipped {line}", file=sys.stderr)
    return folder


def _encode_folder(args: argparse.Namespace, folder: Any, pipeline: Any, params: Any, prompt: str | None = None) -> Any:
    from mmdjax._core.progress import progress_bar
    from mmdjax.sd import encode_references

    config = pipeline.autoencoder.config
    height, width = (side * config.downscale for side in pipeline.latent_shape(args.height, args.width)[:2])
    batches = folder.batches(height, width, channels=config.in_channels, batch_size=args.batch_size)
    count = -(-len(folder.paths) // args.batch_size)
    captions = (folder.captions if prompt is None else prompt) if pipeline.conditional else None
    shown = progress_bar(batches, desc="encoding", total=count, disable=args.quiet)
    return encode_references(pipeline, params, shown, captions)


def _convert(args: argparse.Namespace) -> None:
    import jax.numpy as jnp

    from mmdjax._files.atomic import folder_written_whole
    from mmdjax.sd import export, load_models, save
    from mmdjax.sd.files.convert import shape_of
    from mmdjax.sd.models import local_path
    from mmdjax.sd.pretrained import assemble, with_tokens
    from mmdjax.sd.run import check_out, check_writable

    check_out(args.out)
    check_writable(args.out)
    path, assembly = local_path(args.model, args.variant), _assembly(args)
    # put: the file's own memory map, so that one tensor at a time is in memory; what a LoRA changes is there as a whole
    how = {"param_dtype": None if args.dtype is None else jnp.dtype(args.dtype), "put": lambda array: array}
    how |= {"progress": not args.quiet, "lora": args.lora}
    if args.textual_inversion:
        plain = load_models(path, put=shape_of, **_weights(args))
        tokenizers, how["new_rows"] = with_tokens(path, plain, args.tokenizer, args.textual_inversion)
        assembly["tokenizer"] = tokenizers
    found = load_models(path, **_weights(args), **how)
    pipeline = assemble(path, found, **assembly) if len(found) > 1 else None
    with folder_written_whole(args.out) as out:
        if pipeline is None:
            (save if args.to == "mmdjax" else export)(out, found)
        else:
            write = pipeline.save if args.to == "mmdjax" else pipeline.export
            write(out, {name: component.params for name, component in found.items()})
    _say(args, f"{', '.join(found)} in {args.out}")


def _inspect(args: argparse.Namespace) -> None:
    import jax.numpy as jnp

    from mmdjax.sd.describe import describe

    dtype = jnp.dtype(args.dtype)
    how = {"dtype": dtype, **_weights(args), **_assembly(args), **_added(args)}
    print(describe(args.model, batch_size=args.batch_size, **how))


def _outline(args: argparse.Namespace) -> Any:
    """The pipeline without its weights."""
    import jax.numpy as jnp

    from mmdjax.sd.pretrained import outline

    how = {"dtype": jnp.dtype(args.dtype), **_weights(args)}
    return outline(args.model, **how, **_assembly(args), **_added(args))


def _load(args: argparse.Namespace) -> Any:
    import jax.numpy as jnp

    from mmdjax.sd import load

    dtype = jnp.dtype(args.dtype)
    return load(
        args.model,
        dtype=dtype,
        # the encoders' stay: packs depend on them
        param_dtype=None if args.dtype == "float32" else {"unet": dtype, "transformer": dtype},
        progress=not args.quiet,
        **_weights(args),
        **_assembly(args),
        **_added(args),
    )


def _weights(args: argparse.Namespace) -> dict[str, Any]:
    """Which weights to read, for `load_models`."""
    names = ("variant", "ema", "clip_skip", "allow_unused")
    return {name: getattr(args, name) for name in names} | {"parts": args.part}


def _assembly(args: argparse.Namespace) -> dict[str, Any]:
    given = {"_class_name": args.scheduler, "prediction_type": args.prediction}
    return {
        "scheduler": {key: value for key, value in given.items() if value is not None} or None,
        "tokenizer": args.tokenizer,
    }


def _added(args: argparse.Namespace) -> dict[str, Any]:
    return {"lora": args.lora, "textual_inversion": args.textual_inversion}


def _lines(path: Path) -> list[str]:
    from mmdjax._files.text import lines, read_text

    if not path.is_file():
        raise FileNotFoundError(f"--prompts {path} is not a file; give a text file with a prompt in each line")
    try:
        found = [line.strip() for line in lines(read_text(path))]
    except ValueError as error:
        raise ValueError(f"--prompts {error}") from error
    if not any(found):
        raise ValueError(f"{path} holds no prompts; write one in each line")
    return [line for line in found if line]


def _say(args: argparse.Namespace, *lines: str) -> None:
    if not args.quiet:
        print(*lines, sep="\n")


def _version() -> str:
    from mmdjax._version import __version__

    return f"mmdjax {__version__}"


if __name__ == "__main__":
    sys.exit(main())
