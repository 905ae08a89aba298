"""The command line: `mmdjax sample`, `encode`, `convert` and `inspect`, also `python -m mmdjax`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
SAMPLERS = ("ddim", "ddpm", "euler-maruyama", "heun", "dpm++2m")
PACK = ".safetensors"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0, or 2 after an error, which is one message on stderr."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
        if args.traceback:
            raise
        print(f"mmdjax {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resume = "; the same command goes on from there" if args.command == "sample" else ""
        print(f"\nmmdjax {args.command}: interrupted; every file that was written is whole{resume}", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(
        prog="mmdjax",
        description="MMD Guidance for Stable Diffusion and latent diffusion models, in JAX: sample a model so that its "
        "pictures take on the distribution of a folder of references, without training.",
    )
    top.add_argument("--version", action="version", version=_version())
    commands = top.add_subparsers(dest="command", required=True)

    sample = _command(commands, "sample", _sample, "sample a model, guided by reference pictures")
    _model_options(sample)
    sample.add_argument(
        "--out",
        type=Path,
        required=True,
        help="a new folder for pictures, figures and run.json; in one where this command was interrupted it goes on",
    )
    sample.add_argument("--refs", type=Path, help="folder of reference pictures, or a pack that `mmdjax encode` wrote")
    _picture_options(sample)
    sample.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="may be repeated; sample i takes prompt i modulo their number. Without: the references' captions in turn",
    )
    sample.add_argument("--prompts", type=Path, help="file of prompts, one a line")
    sample.add_argument("--negative", default="", help="negative prompt (default: empty)")
    sample.add_argument("--num-samples", "-n", type=int, default=8, help="pictures to make (default 8)")
    sample.add_argument("--batch-size", type=int, default=4, help="pictures made at once, at most (default 4)")
    sample.add_argument("--steps", type=int, default=50, help="network calls a picture (default 50; Heun: twice)")
    sample.add_argument("--sampler", choices=SAMPLERS, default="ddim", help="default ddim")
    sample.add_argument("--eta", type=float, default=1.0, help="noise of ddim: 0 is deterministic (default 1)")
    sample.add_argument(
        "--cfg-scale", type=float, default=7.5, help="classifier-free guidance; 1 is none (default 7.5)"
    )
    sample.add_argument("--guidance-scale", type=float, default=1.0, help="MMD guidance; 0 is none (default 1)")
    sample.add_argument(
        "--at",
        choices=("denoised", "sample", "clean", "diffused"),
        default="denoised",
        help="what the guidance moves, see MMDGuidance (default denoised)",
    )
    sample.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    sample.add_argument("--no-compare", action="store_true", help="leave out the unguided samples: half the time")

    encode = _command(commands, "encode", _encode, "encode reference pictures once, into one file to keep or share")
    _model_options(encode)
    encode.add_argument("refs", type=Path, metavar="PICTURES", help="folder of reference pictures")
    encode.add_argument("--out", type=Path, required=True, help="the pack to write, NAME.safetensors")
    encode.add_argument("--batch-size", type=int, default=4, help="pictures encoded at once (default 4)")
    encode.add_argument("--prompt", help="caption of all pictures, in place of their own")
    _picture_options(encode)

    convert = _command(commands, "convert", _convert, "convert a checkpoint, tensor by tensor")
    _model_options(convert, computes=False)
    convert.add_argument("--out", type=Path, required=True, help="a new folder")
    convert.add_argument("--to", choices=("mmdjax", "diffusers"), default="mmdjax", help="layout (default mmdjax)")
    convert.add_argument("--dtype", choices=DTYPES, help="cast to (default: as stored)")

    inspect = _command(commands, "inspect", _inspect, "say what a checkpoint is and what it needs in memory")
    _model_options(inspect)
    inspect.add_argument(
        "--batch-size", type=int, help="compile the U-Net for as many pictures and tell the memory it takes here"
    )
    return top


def _command(commands: Any, name: str, run: Any, description: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=description, description=description[0].upper() + description[1:] + ".")
    command.set_defaults(run=run)
    command.add_argument("--traceback", action="store_true", help="show where an error came from")
    return command


def _model_options(command: argparse.ArgumentParser, computes: bool = True) -> None:
    command.add_argument(
        "model",
        metavar="MODEL",
        help="a folder in the layout of diffusers or of mmdjax, a .safetensors or .ckpt file, or a hub id",
    )
    command.add_argument("--variant", help='weights of a folder, such as "fp16"')
    command.add_argument("--ema", action="store_true", help="the averaged weights of a single file")
    command.add_argument("--tokenizer", type=Path, help="folder of CLIP's vocabulary, which single files lack")
    command.add_argument(
        "--prediction",
        choices=("epsilon", "v_prediction", "sample"),
        help="what the network predicts, where the checkpoint does not say (single files of Stable Diffusion 2)",
    )
    if computes:
        command.add_argument("--dtype", choices=DTYPES, default="float32", help="to compute in (default float32)")


def _picture_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--height", type=int, help="of pictures, in pixels (default: the model's)")
    command.add_argument("--width", type=int, help="likewise")
    command.add_argument(
        "--unreadable",
        choices=("refuse", "skip"),
        default="refuse",
        help="what to do with unreadable pictures, and with captions without picture or the reverse (default refuse). "
        "Readable ones are cut around their centre and resized",
    )


def _sample(args: argparse.Namespace) -> None:
    from mmdjax import DDIM, DDPM, DPMSolverPP2M, EulerMaruyama, Heun, MMDGuidance
    from mmdjax.sd.run import check_out, sample_to_folder

    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("run", "traceback")}
    if check_out(args.out, settings):  # before minutes of loading
        print(f"{args.out} holds the {args.num_samples} pictures of this command already; nothing was done")
        return
    prompts = [*args.prompt, *(_lines(args.prompts) if args.prompts else [])]
    samplers = {
        "ddim": DDIM(eta=args.eta),
        "ddpm": DDPM(),
        "euler-maruyama": EulerMaruyama(),
        "heun": Heun(),
        "dpm++2m": DPMSolverPP2M(),
    }
    guidance = MMDGuidance(scale=args.guidance_scale, at=args.at)
    pipeline, params = _load(args)
    refs = None
    if args.refs is not None and args.refs.is_file():
        from mmdjax.sd import load_references

        refs = load_references(args.refs, pipeline, params)
    elif args.refs is not None:
        refs = _encode_folder(args, pipeline, params)
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
        num_steps=args.steps,
        sampler=samplers[args.sampler],
        guidance=guidance,
        height=args.height,
        width=args.width,
        batch_size=args.batch_size,
        compare=not args.no_compare,
        settings=settings,
    )
    distances = report["distances"] or {}
    if distances:
        print(f"\ndistance to the {report['references']} references, in latents (unbiased)")
        print(f"{'':18}" + "".join(f"{'unguided' if name == 'before' else 'guided':>12}" for name in distances))
        for quantity in ("energy_distance", "mmd2"):
            print(f"{quantity:18}" + "".join(f"{found[quantity]:12.4f}" for found in distances.values()))
    print(f"\n{args.num_samples} pictures in {args.out}")


def _encode(args: argparse.Namespace) -> None:
    if args.out.suffix != PACK:
        raise ValueError(f"--out is {args.out}; a pack is a {PACK} file, such as {args.out.with_suffix(PACK)}")
    if args.out.exists():
        raise FileExistsError(f"{args.out} exists; nothing was overwritten. Give another --out")
    pipeline, params = _load(args)
    pack = _encode_folder(args, pipeline, params, args.prompt)
    pack.save(args.out)
    captions = pack.captions()
    print(f"{len(pack.latents)} references, {len(set(captions)) if captions else 'no'} prompts, in {args.out}")


def _encode_folder(args: argparse.Namespace, pipeline: Any, params: Any, prompt: str | None = None) -> Any:
    from tqdm.auto import tqdm

    from mmdjax.sd import encode_references
    from mmdjax.sd.pictures import open_pictures

    config = pipeline.autoencoder.config
    folder = open_pictures(args.refs, smallest=config.downscale, skip=args.unreadable == "skip")
    for line in folder.skipped:
        print(f"skipped {line}", file=sys.stderr)
    height, width = (side * config.downscale for side in pipeline.latent_shape(args.height, args.width)[:2])
    batches = folder.batches(height, width, channels=config.in_channels, batch_size=args.batch_size)
    count = -(-len(folder.paths) // args.batch_size)
    captions = (folder.captions if prompt is None else prompt) if pipeline.conditional else None
    return encode_references(pipeline, params, tqdm(batches, desc="encoding", total=count), captions)


def _convert(args: argparse.Namespace) -> None:
    import jax.numpy as jnp

    from mmdjax.sd import export, load_models, save
    from mmdjax.sd.models import local_path
    from mmdjax.sd.pretrained import assemble
    from mmdjax.sd.run import check_out

    check_out(args.out)
    path = local_path(args.model, args.variant)
    # put: the file's own memory map, so that one tensor at a time is in memory
    how = {"param_dtype": None if args.dtype is None else jnp.dtype(args.dtype), "put": lambda array: array}
    found = load_models(path, variant=args.variant, ema=args.ema, progress=True, **how)
    if len(found) == 1:
        (save if args.to == "mmdjax" else export)(args.out, found)
    else:
        pipeline = assemble(path, found, **_assembly(args))
        write = pipeline.save if args.to == "mmdjax" else pipeline.export
        write(args.out, {name: component.params for name, component in found.items()})
    print(f"{', '.join(found)} in {args.out}")


def _inspect(args: argparse.Namespace) -> None:
    import jax.numpy as jnp

    from mmdjax.sd.describe import describe

    dtype = jnp.dtype(args.dtype)
    how = {"variant": args.variant, "ema": args.ema, "dtype": dtype, **_assembly(args)}
    print(describe(args.model, batch_size=args.batch_size, **how))


def _load(args: argparse.Namespace) -> Any:
    import jax.numpy as jnp

    from mmdjax.sd import load

    dtype = jnp.dtype(args.dtype)
    return load(
        args.model,
        dtype=dtype,
        param_dtype=None if args.dtype == "float32" else {"unet": dtype},  # the encoders' stay: packs depend on them
        variant=args.variant,
        ema=args.ema,
        progress=True,
        **_assembly(args),
    )


def _assembly(args: argparse.Namespace) -> dict[str, Any]:
    scheduler = None if args.prediction is None else {"prediction_type": args.prediction}
    return {"scheduler": scheduler, "tokenizer": args.tokenizer}


def _lines(path: Path) -> list[str]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    if not any(lines):
        raise ValueError(f"{path} holds no prompts; give one a line")
    return [line for line in lines if line]


def _version() -> str:
    from mmdjax._version import __version__

    return f"mmdjax {__version__}"


if __name__ == "__main__":
    sys.exit(main())
