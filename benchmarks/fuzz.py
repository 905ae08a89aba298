"""Fuzzed files through `mmdjax.sd`'s loading, and random arguments through the public functions.

Files are sound ones of tiny models with bytes turned, cut or added, headers that lie, and JSON of the wrong kind. Each
is loaded in a process that is watched: it must end within 30 seconds in one of the documented errors or in what the
file says (the safetensors library's reading of it is compared), with its memory growing by at most twice the larger of
the file and its result, and 32 MiB for the interpreter.
"""

import io
import json
import pickle
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

from common import as_particles, memory, reset_peak

BOMBS = (b"Nr\xff\xff\xff\x7f", b"\x96" + b"\xff" * 5 + bytes(3))  # a memo of 2³¹ places; a string of 2⁴⁰ bytes
FUNCTIONS = ("mmd2", "witness", "memory", "guided_sample", "median_bandwidth", "energy_distance")
SECONDS, ALLOWED = 30, 32 * 2**20
NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**53, 2**63, 10**400, 0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf"),
    "", "a", "0", "é\u0000", "x" * 5000, [], {}, [[]], [None], [0], [-1], [2**62] * 3, [0, 2**62], [1] * 100, ["a", 1],
    {"a": {}}, {"dtype": "F32"}, "../../etc/passwd", "F64", "BF16", "UNet2DModel", "AutoencoderKL", "DDIMScheduler",
]  # fmt: skip


# --- making files ---


def mutate_bytes(data: bytes, rng: random.Random, *, head: int = 0) -> bytes:
    """Some bytes changed, cut out, cut off, doubled or added; mostly in the first `head` bytes."""
    data, where = bytearray(data), min(head or len(data), len(data)) or 1
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(where)
        match rng.randrange(6):
            case 0 | 1:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 2:
                data[at : at + rng.randrange(64)] = b""
            case 3:
                del data[rng.randrange(len(data) + 1) :]
            case 4:
                data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 32)))
            case 5:
                data[at:at] = data[at : at + rng.randrange(64)]
    return bytes(data)


def mutate_json(value: Any, rng: random.Random) -> Any:
    """One or a few places of a JSON value replaced, removed or added."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = value
        while isinstance(at, dict | list) and at:
            key = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
            if isinstance(at[key], dict | list) and at[key] and rng.random() < 0.8:
                at = at[key]
                continue
            what = rng.random()
            if what < 0.15:
                del at[key]
            elif what < 0.2 and isinstance(at, dict):
                at[rng.choice(("new", "_private", "", "__metadata__"))] = rng.choice(NASTY)
            else:
                at[key] = rng.choice(NASTY)
            break
    return value


def huge_json(rng: random.Random) -> bytes:
    """JSON that is small to write and large to hold, or deep."""
    n = rng.choice((10**3, 10**5, 4 * 10**5, 2 * 10**6))
    return rng.choice((
        b"[" * n, b'{"a":' * n, b"[" + b"[]," * n + b"1]", b"[" + b"{}," * n + b"1]", b'{"a":"' + b"x" * n + b'"}',
        b"1" * n, b'{"a":' + b"9" * n + b"}", b'{"a":[' + b"1," * n + b"1]}",
        b"{" + b",".join(b'"k%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(n // 60)) + b"}",
    ))  # fmt: skip


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: Any, body: bytes, lie: int = 0) -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", max(0, len(head) + lie) % 2**64) + head + body


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    header, body = split(data)
    match rng.randrange(6):
        case 0:
            return mutate_bytes(data, rng)
        case 1:
            return mutate_bytes(data, rng, head=len(data) - len(body))
        case 2 | 3:
            return joined(mutate_json(header, rng), body)
        case 4:
            return joined(huge_json(rng), body if rng.random() < 0.5 else b"")
        case _:
            return joined(header, body, rng.choice((-1, 1, 8, -8, 2**16, 2**31, 2**62, 2**63)))


def mutate_config(data: bytes, rng: random.Random) -> bytes:
    what = rng.random()
    if what < 0.2:
        return mutate_bytes(data, rng)
    return huge_json(rng) if what < 0.3 else json.dumps(mutate_json(json.loads(data), rng)).encode()


class _Rebuilt:
    """Pickled, a tensor as torch.save writes it."""

    def __init__(self, storage: "_Storage", shape: tuple[int, ...]):
        self.arguments = storage, 0, shape, tuple(int(s) for s in strides(shape)), False, None

    def __reduce__(self):
        return rebuild, self.arguments


class _Storage:
    def __init__(self, key: str):
        self.key = key


def rebuild(*_):
    """Stands for torch._utils._rebuild_tensor_v2 in the pickles."""


class FloatStorage:
    """Stands for torch.FloatStorage in the pickles."""


rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
FloatStorage.__module__ = "torch"


def strides(shape: tuple[int, ...]) -> list[int]:
    found = [1]
    for n in shape[:0:-1]:
        found.insert(0, found[0] * n)
    return found[len(found) - len(shape) :]


def archive(arrays: dict[str, Any]) -> bytes:
    """The arrays as torch.save would write them."""
    import types

    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    vars(torch)["FloatStorage"], vars(utils)["_rebuild_tensor_v2"] = FloatStorage, rebuild

    class Pickler(pickle._Pickler):
        def persistent_id(self, obj):
            return ("storage", FloatStorage, obj.key, "cpu", 0) if isinstance(obj, _Storage) else None

    program, out = io.BytesIO(), io.BytesIO()
    before = {name: sys.modules.get(name) for name in ("torch", "torch._utils")}
    sys.modules |= {"torch": torch, "torch._utils": utils}
    try:
        tree = {key: _Rebuilt(_Storage(str(i)), x.shape) for i, (key, x) in enumerate(arrays.items())}
        Pickler(program, protocol=2).dump({"state_dict": tree, "epoch": 3})
    finally:
        for name, module in before.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("archive/data.pkl", program.getvalue())
        for i, x in enumerate(arrays.values()):
            file.writestr(f"archive/data/{i}", x.astype("float32").tobytes())
    return out.getvalue()


def mutate_archive(data: bytes, rng: random.Random) -> bytes:
    """The zip, or the pickle in it in a zip that is sound."""
    if rng.random() < 0.4:
        return mutate_bytes(data, rng, head=rng.choice((0, 200)))
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            held = old.read(name)
            if name.endswith("data.pkl"):
                held = mutate_bytes(held, rng)
                if rng.random() < 0.2:
                    held = b"\x80\x02" + rng.choice(BOMBS) + held[2:]
            new.writestr(name, held, rng.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,)))
    return out.getvalue()


def write_sound(folder: Path) -> None:
    """Sound files to start from: a pipeline of diffusers in parts, one of ours, shards, an archive, a pack."""
    import jax
    import numpy as np
    from safetensors.numpy import load_file, save_file

    from mmdjax.sd import encode_references, load, tiny
    from mmdjax.sd.files import convert
    from mmdjax.sd.models import load_models, module_from_config, save

    model = tiny.write_tiny(folder / "model")
    save(folder / "ours", {"text_encoder": load_models(model / "text_encoder")["text_encoder"]})
    text = load_file(model / "text_encoder" / "model.safetensors")
    shards = folder / "shards"
    shards.mkdir()
    shutil.copy(model / "text_encoder" / "config.json", shards)
    halves = [dict(list(text.items())[::2]), dict(list(text.items())[1::2])]
    for i, half in enumerate(halves):
        save_file(half, shards / f"model-0000{i + 1}-of-00002.safetensors")
    places = {key: f"model-0000{i + 1}-of-00002.safetensors" for i, half in enumerate(halves) for key in half}
    (shards / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "archive").mkdir()
    shutil.copy(model / "text_encoder" / "config.json", folder / "archive")
    (folder / "archive" / "pytorch_model.bin").write_bytes(archive(text))
    wide = module_from_config(tiny.TEXT | {"hidden_size": 64, "num_attention_heads": 1})
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float16), convert.abstract(wide))
    named = {f"cond_stage_model.transformer.{k}": e.read() for k, e in convert.params_to_torch(zeros).items()}
    save_file(named, folder / "single.safetensors")
    pipeline, params = load(model)
    images = np.zeros((2, 32, 32, 3), np.float32)
    encode_references(pipeline, params, images, ["a cat", "a dog"]).save(folder / "pack.safetensors")


KINDS = {  # the file that is mutated, how, and what is loaded; those that load fast are mutated most
    "text encoder": ("model/text_encoder/model.safetensors", mutate_safetensors, "model/text_encoder", 20),
    "U-Net": ("model/unet/diffusion_pytorch_model.safetensors", mutate_safetensors, "model/unet", 6),
    "saved by mmdjax": ("ours/text_encoder.safetensors", mutate_safetensors, "ours", 8),
    "single file": ("single.safetensors", mutate_safetensors, None, 8),
    "reference pack": ("pack.safetensors", mutate_safetensors, "pack.safetensors", 10),
    "PyTorch archive": ("archive/pytorch_model.bin", mutate_archive, "archive", 16),
    "index of shards": ("shards/model.safetensors.index.json", mutate_config, "shards", 8),
    "config of a text encoder": ("model/text_encoder/config.json", mutate_config, "model/text_encoder", 8),
    "config of a U-Net": ("model/unet/config.json", mutate_config, "model/unet", 8),
    "config of an autoencoder": ("model/vae/config.json", mutate_config, "model/vae", 6),
    "manifest": ("ours/mmdjax.json", mutate_config, "ours", 6),
    "scheduler": ("model/scheduler/scheduler_config.json", mutate_config, "scheduler", 6),
    "settings of a tokenizer": ("model/tokenizer/tokenizer_config.json", mutate_config, "tokenizer", 4),
    "index of a pipeline": ("model/model_index.json", mutate_config, "pipeline", 2),
}


def load_one(sound: Path, kind: str, file: Path, data: bytes) -> int:
    """Load what holds the mutated file; the bytes of the result."""
    import jax

    from mmdjax.sd import load, load_models, load_references
    from mmdjax.sd.scheduler import Scheduler
    from mmdjax.sd.text.tokenizer import load_tokenizer

    what = KINDS[kind][2]
    if what is None:
        result = {name: part.params for name, part in load_models(file).items()}
    elif what == "scheduler":
        from mmdjax.checkpoint import read_json

        scheduler = Scheduler(read_json(file))
        scheduler.schedule()
        result = scheduler.alphas_cumprod
    elif what == "tokenizer":
        result = load_tokenizer(file.parent)(["a cat"])
    elif what == "pipeline":
        result = load(sound / "model")[1]
    elif what.endswith(".safetensors"):
        pack = load_references(file)
        result = [pack.latents, pack.index, pack.cond]
    else:
        result = {name: part.params for name, part in load_models(sound / what).items()}
    return sum(leaf.nbytes for leaf in jax.tree.leaves(result))


def agrees(file: Path) -> bool:
    """Whether a file that was read holds what the safetensors library reads from it, where that library takes it."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from mmdjax.checkpoint import open_safetensors

    try:
        theirs = load_file(file)
    except (SafetensorError, TypeError, KeyError, ValueError, OverflowError):
        return True
    ours = open_safetensors(file)
    return set(ours) == set(theirs) and all(ours[key].tobytes() == x.tobytes() for key, x in theirs.items())


# --- watching ---


def in_child(folder: str, first: int, last: int) -> None:
    """Load mutants first … last − 1; a line of JSON before and after each."""
    import gc

    from mmdjax.checkpoint import CheckpointError

    sound = Path(folder)
    documented = (CheckpointError, ValueError, FileNotFoundError, OSError)
    for kind, (name, _, _, _) in KINDS.items():  # what is imported and compiled at first is no file's doing
        load_one(sound, kind, sound / name, (sound / name).read_bytes())
    names = [kind for kind, (_, _, _, weight) in KINDS.items() for _ in range(weight)]
    for seed in range(first, last):
        rng = random.Random(seed)
        kind = rng.choice(names)
        name, mutate, _, _ = KINDS[kind]
        file = sound / name
        whole = file.read_bytes()
        data = mutate(whole, rng)
        print(json.dumps({"seed": seed, "kind": kind}), flush=True)
        said: dict[str, Any] = {"bytes": len(data)}
        file.write_bytes(data)
        gc.collect()
        reset_peak()
        before, start, result = memory("VmRSS"), time.perf_counter(), 0
        try:
            result = load_one(sound, kind, file, data)
            said["outcome"] = "loaded" if file.suffix != ".safetensors" or agrees(file) else "loaded wrongly"
        except documented as error:
            said["outcome"] = "error"
            said["error"] = f"{type(error).__name__}: {str(error)[:200]}"
        except BaseException as error:
            said["outcome"] = f"undocumented: {type(error).__name__}: {str(error)[:200]}"
        said["seconds"] = round(time.perf_counter() - start, 3)
        said["memory"] = memory("VmHWM") - before
        said["allowed"] = 2 * max(len(data), result) + ALLOWED
        file.write_bytes(whole)
        print(json.dumps(said), flush=True)


def fuzz(count: int, first: int = 0) -> dict[str, Any]:
    """Load `count` mutants; how many ended as they should, and the failures."""
    outcomes, kinds, failures, longest = Counter(), Counter(), [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        write_sound(Path(folder))
        seed, last = first, first + count
        while seed < last:
            command = [sys.executable, __file__, folder, str(seed), str(last)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            at = None
            for line in lines(process, SECONDS + 30):
                said = json.loads(line)
                if "outcome" not in said:
                    at = said
                    continue
                assert at is not None
                seed, kinds[at["kind"]] = at["seed"] + 1, kinds[at["kind"]] + 1
                longest = max(longest, said["seconds"])
                good = said["outcome"] in ("loaded", "error")
                said["within"] = said["memory"] <= said["allowed"] and said["seconds"] <= SECONDS
                outcomes[said["outcome"] if good else "failure"] += 1
                if not (good and said["within"]):
                    failures.append(at | said)
                    print(failures[-1], flush=True)
                at = None
            if process.wait() and at is None:
                raise SystemExit("the child failed before its first file")
            if at is not None:  # it died, or was stopped, in this file
                failures.append(at | {"outcome": f"ended with {process.returncode}"})
                print(failures[-1], flush=True)
                outcomes["failure"] += 1
                seed = at["seed"] + 1
                shutil.rmtree(folder)
                Path(folder).mkdir()
                write_sound(Path(folder))
    return {
        "tried": count,
        "held": count - len(failures),
        "outcomes": dict(outcomes),
        "kinds": dict(kinds),
        "longest_seconds": longest,
        "failures": failures[:20],
    }


def lines(process: subprocess.Popen, patience: float):
    """What a process prints; it is killed where it prints nothing for so long."""
    import threading

    assert process.stdout is not None
    while True:
        timer = threading.Timer(patience, process.kill)
        timer.start()
        line = process.stdout.readline()
        timer.cancel()
        if not line:
            process.stdout.close()
            return
        yield line


# --- random arguments ---


def api(count: int) -> dict[str, Any]:
    """Call public functions with random arguments; how many gave a documented result, ValueError or TypeError."""
    from hypothesis import HealthCheck, Phase, given, settings

    outcomes, functions, failures = Counter(), Counter(), []

    @settings(
        max_examples=count, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(calls())
    def every(call):
        functions[call[0]] += 1
        try:
            outcomes[outcome(*call)] += 1
        except Exception as error:
            said = {"function": call[0], "arguments": str(call[1]), "error": f"{type(error).__name__}: {error}"}
            failures.append({key: text[:500] for key, text in said.items()})
            outcomes["failure"] += 1
            print(failures[-1], flush=True)

    every()
    tried = sum(outcomes.values())
    found = {"outcomes": dict(outcomes), "functions": dict(functions), "failures": failures[:20]}
    return {"tried": tried, "held": tried - outcomes["failure"], **found}


def calls():
    """(name of a function, its arguments), as a hypothesis strategy; two thirds of them are nearly right."""
    import hypothesis.strategies as st
    import jax
    import jax.numpy as jnp
    import numpy as np

    import mmdjax as mj
    from mmdjax.schedules import VPLinear

    floats = [jnp.float32, jnp.float32, jnp.float32, jnp.bfloat16, np.float64]
    others = [jnp.float16, np.int32, np.uint8, np.bool_, np.complex64, "U1"]
    model = mj.DiffusionModel(lambda params, x, level, cond: 0.5 * x, VPLinear(), (2,))
    kernels = [
        mj.RBF(1.0), mj.RBF(None), mj.IMQ(None), mj.IMQ(1.0), mj.Laplacian(1.0), mj.RationalQuadratic(1.0), mj.Energy(),
        mj.Polynomial(), mj.Linear(), mj.Cosine(), mj.RBF((0.5, 2.0)), mj.Sum(mj.RBF(1.0), mj.Energy()),
        mj.Product(x=mj.RBF(1.0), cond=mj.Delta()), mj.Product(x=mj.IMQ(None), cond=mj.Cosine()),
    ]  # fmt: skip
    placements = ["denoised", "sample", "clean", "diffused"]
    grids = [None, [1.0, 0.5, 0.0], [0.0, 1.0], [], [2.0, 0.0], "grid", np.ones((2, 2))]

    @st.composite
    def one(draw):
        right = draw(st.integers(0, 2)) > 0
        slips = st.integers(0, 15 if right else 2).map(lambda i: i == 0)

        def pick(usual, *rest):  # one of the usual, or by a slip one of all
            return draw(st.sampled_from([*usual, *rest] if draw(slips) else usual))

        def array(rows, row):
            rows, row = pick([rows], 0, 1, 2, 5), pick([row], (), (1,), (3,), (0,), (2, 2))
            values = np.random.default_rng(draw(st.integers(0, 9))).normal(size=pick([(rows, *row)], ()))
            fill, dtype = pick([None], 0.0, 1.0, np.nan, np.inf, 1e30, 1e-30), pick(floats, *others)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what does not fit its type is meant not to
                made = (values if fill is None else values * 0 + fill).astype(dtype)
            return jnp.asarray(made) if made.dtype.kind != "U" and draw(st.booleans()) else made

        def tree(rows, row=(2,)):
            kind = pick(["array"], "dict", "tuple", "list", None, 1.5, "text", {})
            if kind not in ("array", "dict", "tuple", "list"):
                return kind
            x = array(rows, row)
            return {"array": x, "dict": {"a": x, "b": array(rows, row)}, "tuple": (x, x), "list": [x]}[kind]

        def points(rows, cond=False):
            x = tree(rows)
            if not cond and draw(st.booleans()):
                return x
            weight = abs(array(rows, ())) if draw(st.integers(0, 3)) == 0 else None
            return mj.Particles(x, tree(rows) if cond or draw(slips) else None, weight)

        kernel = pick(kernels, None, "rbf", 1.0)
        cond, n = getattr(kernel, "uses_cond", False), pick([3], 0, 1, -1, 2.5, None, "3", np.int32(2), True)
        rows = n if type(n) is int and n > 0 else 3
        match draw(st.sampled_from(FUNCTIONS)):
            case "mmd2":
                sets = {"p": points(4, cond), "q": points(3, cond)}
                return "mmd2", {"kernel": kernel, **sets, "estimator": pick(["u", "v"], "w", None)}
            case "witness":
                return "witness", {"kernel": kernel, "x": points(2, cond), "p": points(4, cond), "q": points(3, cond)}
            case "memory":
                return "memory", {"capacity": n, "cond": tree(3) if cond else None, "new": points(rows, cond)}
            case "median_bandwidth":
                return "median_bandwidth", {"refs": points(4)}
            case "energy_distance":
                return "energy_distance", {"x": points(4), "y": points(3)}
        fitting = [k for k in kernels if type(k) in (mj.RBF, mj.IMQ)]
        guidance = {
            "at": pick(placements),
            "kernel": kernel if draw(slips) else pick([None, *fitting]),
            "inner_steps": 1,
        }
        made = {"refs": points(5), "num_samples": n, "num_steps": pick([2], 0, 1.5), "guidance": guidance}
        if draw(slips):
            key = pick([jax.random.key(1)], 0, None, jax.random.PRNGKey(0), jax.random.split(jax.random.key(0)))
            made |= {"times": pick([[1.0, 0.5, 0.0]], *grids), "key": key}
        made |= {"memory": pick([4], 0, -1, "all", 2.5)} if draw(st.booleans()) else {}
        made |= {"x_init": array(rows, (2,))} if draw(slips) else {}
        return "guided_sample", {"model": model, **made}

    return one()


def outcome(name: str, arguments: dict[str, Any]) -> str:
    """Call a function: "refused" or "result"; AssertionError for a result that is not the documented one."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import mmdjax as mj
    from mmdjax.metrics import energy_distance

    a = dict(arguments)
    try:
        match name:
            case "mmd2" | "witness":
                result = getattr(mj, name)(*(a.pop(key) for key in list(a) if key != "estimator"), **a)
                wanted = () if name == "mmd2" else None
            case "memory":
                memory = mj.Memory.empty(a["capacity"], (2,), a["cond"])
                result, wanted = memory.push(as_particles(a["new"])).particles.x, (a["capacity"], 2)
            case "median_bandwidth":
                result, wanted = mj.median_bandwidth(a["refs"]), ()
            case "energy_distance":
                result, wanted = energy_distance(a["x"], a["y"]), ()
            case _:
                refs, key = a.pop("refs"), a.pop("key", jax.random.key(0))
                a["guidance"] = mj.MMDGuidance(**a["guidance"])
                result, wanted = mj.guided_sample(None, key, refs, **a).x, (a["num_samples"], 2)
    except (ValueError, TypeError):
        return "refused"
    assert jnp.issubdtype(result.dtype, jnp.floating), result.dtype
    assert wanted is None or tuple(result.shape) == wanted, (result.shape, wanted)
    numbers = {key: value for key, value in arguments.items() if key != "key"}
    given = [np.asarray(x) for x in jax.tree.leaves(numbers) if hasattr(x, "ndim")]
    if all((abs(x.astype(np.float32)) < 1e6).all() for x in given if x.dtype.kind in "fiubV"):
        assert np.isfinite(np.asarray(result, np.float32)).all(), result
    return "result"


if __name__ == "__main__":
    in_child(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
