"""Scripts of test_distributed: each runs in a process of its own, with the devices that it needs.

python tests/slow/sharded.py NAME [ARGUMENT ...]
"""

import contextlib
import functools
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import sd_tiny
from sharding import collectives, loops, program

from mmdjax import (
    DDIM,
    DDPM,
    IMQ,
    RBF,
    Avoid,
    Cosine,
    Delta,
    DiffusionModel,
    DPMSolverPP2M,
    EulerMaruyama,
    Heun,
    Mapped,
    Memory,
    MMDGuidance,
    Particles,
    Product,
    from_model,
    guided_sample,
    median_bandwidth,
    mmd2,
    sample_many,
    witness,
)
from mmdjax.distributed import batch_mesh, batch_sharding, initialize, local_rows, replicate, shard_params
from mmdjax.schedules import RectifiedFlow, VPLinear
from mmdjax.sd.models import export, load_component
from mmdjax.tree import replace

D, N, M, STEPS = 6, 16, 24, 3
RUN = 9 * N + 5  # samples of a long run
DRAW = np.random.default_rng(0)
PARAMS = {"in": DRAW.standard_normal((D, 4096), np.float32), "out": DRAW.standard_normal((4096, D), np.float32) / 4096}
REFS = DRAW.standard_normal((M, D), np.float32) + 1


def network(params, x, level, cond):
    shift = 0.0 if cond is None else 0.1 * cond[:, None]
    return level.alpha * (x + jnp.tanh(x @ params["in"]) @ params["out"]) + shift


MODEL = DiffusionModel(network, VPLinear(), (D,))
LABELS = np.arange(N) % 3
KNOWN = Particles(REFS, np.arange(M) % 3, np.where(np.arange(M) % 5 == 0, 0.0, 1.0).astype(np.float32))
TIMES = np.linspace(0.9, 0.0, STEPS + 1)
BY_LABEL = Product(x=IMQ(), cond=Delta())
AVOIDED = DRAW.standard_normal((M, D), np.float32) - 0.5
CASES = {
    "denoised": {"memory": 10},
    "sample": {"guidance": MMDGuidance(at="sample"), "sampler": Heun(), "memory": 10},
    "field": {"guidance": MMDGuidance(precondition="field")},
    "clean": {"guidance": MMDGuidance(RBF(), at="clean", precondition="length"), "sampler": DPMSolverPP2M()},
    "diffused": {"guidance": MMDGuidance(at="diffused"), "sampler": EulerMaruyama()},
    "by label": {"guidance": MMDGuidance(BY_LABEL), "refs": KNOWN, "cond": LABELS, "memory": 9, "sampler": DDPM()},
    "published": {"guidance": MMDGuidance.paper(), "memory": 20, "keep_path": True},
    "features": {
        "guidance": MMDGuidance(Mapped(jnp.tanh, RBF()), precondition="length", estimator="v"),
        "sampler": DDIM(eta=0.5),
        "checks": True,
    },
    "avoid": {"memory": 10, "avoid": Avoid(AVOIDED, strength=3.0)},
    "only avoid": {"refs": None, "avoid": Avoid(AVOIDED, nearest=3, window=(0, 1), kernel=IMQ(2.0)), "memory": 10},
    "avoid at sample": {
        "guidance": MMDGuidance(at="sample"),
        "avoid": Avoid(AVOIDED, weight=np.arange(M) % 4 != 0, strength=3.0),
    },
    "avoid by label": {
        "guidance": MMDGuidance(BY_LABEL),
        "refs": KNOWN,
        "cond": LABELS,
        "avoid": Avoid(AVOIDED, np.arange(M) % 3, radius=3.0),
    },
}


def sample(refs=REFS, params=PARAMS, key=0, **settings):
    return guided_sample(
        params, jax.random.key(key), refs, model=MODEL, **{"num_samples": N, "times": TIMES, **settings}
    )


def assert_equal(one, other):
    """To rounding, of values of order 1. Euler–Maruyama divides by an α of .02 at first, which leaves 5 digits."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), one, other)


def mesh_of(devices, *, explicit=True, shape=None, names=("batch",)):
    kinds = (AxisType.Explicit if explicit else AxisType.Auto,) * len(names)
    return jax.make_mesh(shape or (devices,), names, axis_types=kinds, devices=jax.devices()[:devices])


def put(tree, mesh, *spec):
    return jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, P(*spec))), tree)


def agree(*names):
    """8 devices and one: Explicit axes, all split; in every second case Auto ones too, all but the batch whole."""
    for i, name in enumerate(names):
        print(name, flush=True)
        agree_in(auto=i % 2 == 0, **CASES[name])


def agree_in(*, auto, refs=REFS, **settings):
    alone = sample(refs, **settings)
    mesh = mesh_of(8)
    sharding = batch_sharding(mesh)
    there = put_avoided(settings, mesh)
    split = sample(put(refs, mesh, "batch"), shard_params(PARAMS, mesh), sharding=sharding, **there)
    assert split.x.sharding.is_equivalent_to(sharding, 2), split.x.sharding
    assert_equal(alone, split)
    if not auto:
        return
    mesh = mesh_of(8, explicit=False)
    whole = sample(refs, replicate(PARAMS, mesh), sharding=batch_sharding(mesh), **settings)
    assert whole.x.sharding.is_equivalent_to(batch_sharding(mesh), 2), whole.x.sharding
    assert_equal(alone, whole)


def put_avoided(settings, mesh):
    """What is avoided, split by rows."""
    if "avoid" not in settings:
        return settings
    avoid = settings["avoid"]
    rows = {name: put(getattr(avoid, name), mesh, "batch") for name in ("x", "cond", "weight")}
    return settings | {"avoid": replace(avoid, **rows)}


def counts():
    """2 and 4 devices; references on an axis of their own, a batch over both; split references without a sharding."""
    alone = sample(memory=10)
    for devices in (2, 4):
        assert_equal(alone, sample(memory=10, sharding=batch_sharding(mesh_of(devices))))
    mesh = mesh_of(8, shape=(2, 4), names=("batch", "refs"))
    assert_equal(alone, sample(put(REFS, mesh, "refs"), memory=10, sharding=NamedSharding(mesh, P("batch"))))
    both = NamedSharding(mesh, P(("batch", "refs")))
    assert_equal(alone, sample(put(REFS, mesh, "refs"), memory=10, sharding=both))
    assert_equal(alone, sample(put(REFS, mesh, ("batch", "refs")), memory=10))


def transformations():
    """Inside jit under a mesh, vmap over keys, grad to scale and bandwidth: as on one device."""

    def call(sharding, scale, key, refs):
        guidance = MMDGuidance(IMQ(scale), scale)
        settings = {"model": MODEL, "num_samples": N, "times": TIMES, "guidance": guidance, "sharding": sharding}
        return guided_sample(PARAMS, key, refs, **settings).x

    keys = jax.random.split(jax.random.key(0), 2)
    drawn = np.random.default_rng(1).standard_normal((N, D), np.float32)

    def results(sharding, refs):
        one = functools.partial(call, sharding)
        several = jax.jit(jax.vmap(one, in_axes=(None, 0, None)))(0.7, keys, refs)
        slope = jax.jit(jax.grad(lambda scale: (drawn * one(scale, keys[0], refs)).sum()))(0.7)
        return several, slope

    alone = results(None, REFS)
    for explicit in (True, False):
        mesh = mesh_of(8, explicit=explicit)
        with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
            assert_equal(alone, results(batch_sharding(mesh), put(REFS, mesh, "batch")))


def joined():
    """Calls of the caller's `shard_map`, and of a `vmap` inside it, are one batch: samples, trace, memory, slopes."""
    x_init = np.random.default_rng(2).standard_normal((N, D), np.float32)
    out = (P("batch"), P(), P(), P())

    def call(case, x_init, cond, **more):
        settings = {"refs": REFS, "sampler": DDIM(), **case, **more}
        made = sample(num_samples=len(x_init), x_init=x_init, cond=cond, **settings)
        return made.x, made.trace.mmd2, made.trace.shift_norm, made.memory

    for name in ("denoised", "clean", "by label"):
        case = {k: v for k, v in CASES[name].items() if k != "sampler"}
        cond = case.pop("cond", None)
        alone, ours = call(case, x_init, cond), functools.partial(call, case, axis_name="batch")
        for devices, explicit, check_vma in ((8, False, False), (4, True, True)):
            print(name, devices, check_vma, flush=True)
            mesh = mesh_of(devices, explicit=explicit)
            split = jax.shard_map(ours, mesh=mesh, in_specs=P("batch"), out_specs=out, check_vma=check_vma)
            assert_equal(alone, jax.jit(split)(*put((x_init, cond), mesh, "batch")))

    mesh, remembers = mesh_of(8, explicit=False), {"memory": 10}
    one = lambda x: call(remembers, x[None], None, axis_name=("batch", "own"))
    calls = jax.vmap(one, axis_name="own", out_axes=(0, None, None, None))
    split = jax.shard_map(calls, mesh=mesh, in_specs=P("batch"), out_specs=out, check_vma=False)
    x, *rest = jax.jit(split)(x_init)
    assert_equal(call(remembers, x_init, None), (x[:, 0], *rest))
    with pytest.raises(ValueError, match=r'"own" is .* a vmap inside a shard_map over "batch" with check_vma=True'):
        jax.shard_map(calls, mesh=mesh, in_specs=P("batch"), out_specs=out)(x_init)

    def cubes(x, scale, **more):
        return (call({"guidance": MMDGuidance(scale=scale)}, x, None, **more)[0] ** 3).sum()

    slopes = jax.jit(jax.grad(cubes, (0, 1)))(x_init, 0.7)
    ours = lambda x, scale: jax.lax.psum(cubes(x, scale, axis_name="batch"), "batch")
    for check_vma in (False, True):
        split = jax.shard_map(ours, mesh=mesh, in_specs=(P("batch"), P()), out_specs=P(), check_vma=check_vma)
        assert_equal(slopes, jax.jit(jax.grad(split, (0, 1)))(x_init, 0.7))


def sent():
    """One all-gather of the batch a step and two an inner step, whatever the number of references."""
    batch, rows = 64 * 64 * 4, 64 * 4

    def of(num_refs, split_refs, at="denoised"):
        guidance = MMDGuidance(at=at)
        found = collectives(program(64, num_refs, guidance, 8, split_refs))
        return [sorted((kind, size) for kind, size, name in found if loops(name) == depth) for depth in range(3)]

    def large(found):
        return [(kind, size) for kind, size in found if size > 16]  # without sums of one or two numbers

    _, step, inner = of(104, False)
    assert large(step) == [("all-gather", batch)]
    assert large(inner) == [("all-gather", batch)] * 2
    assert of(800, False)[1:] == [step, inner]
    _, step, inner = of(104, True)
    nearest = 8 * rows  # what each device finds to be the nearest of its references
    moments = ("reduce-scatter", 2 * rows // 8)  # of the references' weights at each sample
    trace = ("reduce-scatter", rows // 8)
    assert large(step) == [("all-gather", nearest), ("all-gather", batch), trace, moments]
    assert large(inner) == [("all-gather", batch)] * 2 + [("reduce-scatter", rows // 8), ("reduce-scatter", batch // 8)]
    once, *loop = of(800, True)
    assert loop == [step, inner]
    # the bandwidth's own, once: the references that it is taken from, at most 2,000, and their distances
    assert sum(size for _, size in once) < 4 * 800 * (800 + 3 * 64)
    _, step, inner = of(104, True, at="sample")
    assert large(step) == [("all-gather", batch), trace]  # no average: "sample" takes "mass"
    assert of(800, True, at="sample")[1:] == [step, inner]


def flops():
    """A device of 8 computes an eighth of what one does alone, the fit of the bandwidth included."""
    one, eighth = (program(64, 100, MMDGuidance(), devices).cost_analysis()["flops"] for devices in (1, 8))
    assert eighth * 8 / one < 1.05, eighth * 8 / one
    assert eighth * 8 / one > 0.9, eighth * 8 / one


SD3 = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 16,
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 8,
    "joint_attention_dim": 64,
    "caption_projection_dim": 256,
    "pooled_projection_dim": 64,
    "pos_embed_max_size": 16,
    "qk_norm": "rms_norm",
    "dual_attention_layers": [0],
}


def transformer():
    """A small Stable Diffusion 3.5 loaded onto 8 devices, a part of each array on each; a guided step as on one."""
    with tempfile.TemporaryDirectory() as folder:
        export(folder, {"transformer": sd_tiny.component(SD3)})
        check_transformer(Path(folder) / "transformer")


def check_transformer(folder):
    draw = lambda *shape: np.random.default_rng(len(shape)).standard_normal(shape, np.float32)
    refs, cond = draw(40, 16, 16, 16), {"context": draw(32, 8, 64), "pooled": draw(32, 64)}
    made, flops = [], []
    for devices in (1, 8):
        mesh = mesh_of(devices, explicit=False)
        module, params, _ = load_component(folder, put=lambda array, mesh=mesh: shard_params(array, mesh))
        held = [leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(params)]
        whole = sum(leaf.size for leaf in jax.tree.leaves(params))
        assert whole / devices <= sum(held) < 1.02 * whole / devices + 1e4
        network = from_model(lambda params, *args, module=module: module.apply({"params": params}, *args), "flow")
        sample = jax.jit(
            functools.partial(
                guided_sample, model=DiffusionModel(network, RectifiedFlow(), (16, 16, 16)), num_samples=32,
                num_steps=1, sharding=batch_sharding(mesh),
            )
        )  # fmt: skip
        rows = {name: jax.device_put(value, batch_sharding(mesh)) for name, value in cond.items()}
        compiled = sample.lower(params, jax.random.key(0), refs, cond=rows).compile()
        flops.append(compiled.cost_analysis()["flops"])
        made.append(np.asarray(compiled(params, jax.random.key(0), refs, cond=rows).x))
    np.testing.assert_allclose(*made, rtol=1e-3, atol=1e-3)
    assert 0.95 < 8 * flops[1] / flops[0] < 1.05, 8 * flops[1] / flops[0]


def placed():
    """Where `shard_params`, `replicate` and `local_rows` put things; a batch that cannot be shared equally."""
    mesh = batch_mesh()
    params = shard_params({**PARAMS, "bias": np.ones(8, np.float32), "odd": np.ones((129, 129))}, mesh)
    shapes = {name: leaf.addressable_shards[0].data.shape for name, leaf in params.items()}
    assert shapes == {"in": (D, 512), "out": (512, D), "bias": (8,), "odd": (129, 129)}
    assert replicate(PARAMS, mesh)["in"].is_fully_replicated
    for spec in (P("batch"), P()):
        index, rows = local_rows(jax.device_put(REFS, NamedSharding(mesh, spec)))
        assert index.tolist() == list(range(M))
        np.testing.assert_array_equal(rows, REFS)
    with pytest.raises(ValueError, match=r"8 devices \(batch\) cannot share equally; give a multiple of 8, such as 16"):
        sample(num_samples=10, sharding=batch_sharding(mesh))


def resumes():
    """A batch that is lost is made again, the same bit for bit, wherever the arguments of a run lie."""
    for explicit in (True, False):
        mesh = mesh_of(8, explicit=explicit)
        sharding = batch_sharding(mesh)
        before = Memory.empty(10, (D,), LABELS).push(Particles(REFS[:3], LABELS[:3]))
        cases = {
            "memory": {"sharding": sharding},
            "conditions": {
                "sharding": sharding,
                "guidance": MMDGuidance(BY_LABEL),
                "refs": put(KNOWN, mesh, "batch"),
                "cond": put(np.arange(3 * N) % 3, mesh, "batch"),
                "num_samples": 3 * N,
                "memory": put(before, mesh),
                "key": jax.device_put(jax.random.key(0), NamedSharding(mesh, P())),
                "times": jax.device_put(TIMES, NamedSharding(mesh, P())),
            },
            "published": {
                "sharding": sharding,
                "guidance": MMDGuidance.paper(0.02),
                "cond": put(np.arange(2 * N + 5) % 3, mesh),
            },
            "references alone on the mesh": {"refs": put(REFS, mesh, "batch")},
        }
        for name, case in cases.items():
            settings = {"num_samples": 2 * N + 5, "memory": 10, "key": jax.random.key(0), "refs": REFS} | case
            lost_and_made(name, explicit, **settings)


def lost_and_made(name, explicit, *, key, refs, **settings):
    with tempfile.TemporaryDirectory() as out:
        again = functools.partial(
            sample_many, PARAMS, key, refs, model=MODEL, batch_size=N, out=out, **{"times": TIMES, **settings}
        )
        again()
        whole = {path: path.read_bytes() for path in Path(out).iterdir()}
        for path in sorted(Path(out).glob("batch-*")):
            path.unlink()
            again()
            assert {path: path.read_bytes() for path in Path(out).iterdir()} == whole, (name, explicit, path.name)


def metrics():
    """What takes point sets takes split ones, over Auto and Explicit axes: values, derivatives, plots."""
    from mmdjax.compression import coreset, embed, nystroem
    from mmdjax.metrics import (
        density_coverage,
        energy_distance,
        frechet_distance,
        kid,
        mmd2_with_error,
        nearest_distance,
        nearest_neighbour_accuracy,
        nearest_ratio,
        permutation_test,
        precision_recall,
        rke,
        vendi,
    )
    from mmdjax.mmd import attribution
    from mmdjax.plots import before_after, witness_map

    key = jax.random.key(0)
    by_label = Product(x=RBF(2.0), cond=Delta())
    functions = {
        "energy_distance": energy_distance,
        "kid": kid,
        "mmd2_with_error": lambda x, y: mmd2_with_error(RBF(None), x, y),
        "frechet_distance": frechet_distance,
        "permutation_test": lambda x, y: permutation_test(RBF(None), x, y, key, num_permutations=9),
        "precision_recall": precision_recall,
        "density_coverage": density_coverage,
        "accuracy": nearest_neighbour_accuracy,
        "nearest_ratio": lambda x, y: nearest_ratio(x, y, REFS[:8] + 1),
        "nearest_distance": nearest_distance,
        "vendi": lambda x, y: vendi(RBF(2.0), x),
        "vendi by features": lambda x, y: vendi(Cosine(), x),
        "rke": lambda x, y: rke(RBF(None), x),
        "mmd2": lambda x, y: mmd2(IMQ(), x, y, estimator="u"),
        "mmd2 of weighted": lambda x, y: mmd2(
            by_label, Particles(x, cond=LABELS), Particles(y, jnp.arange(M) % 3, jnp.arange(M) % 5)
        ),
        "witness": lambda x, y: witness(RBF(None), x, y, x),
        "attribution": lambda x, y: attribution(RBF(0.1), x, y),
        "median_bandwidth": lambda x, y: median_bandwidth(y),
        "kernel": lambda x, y: RBF(2.0)(Particles(x), Particles(y)),
        "fit": lambda x, y: IMQ().fit(Particles(y)).bandwidth,
        "coreset": lambda x, y: coreset(RBF(None), y, 5).particles.x,
        "embedding": lambda x, y: embed(nystroem(RBF(2.0), REFS[:8], y), y).mmd2(x),
    }
    slopes = ("energy_distance", "mmd2", "mmd2 of weighted", "nearest_ratio", "rke", "vendi")
    x = DRAW.standard_normal((N, D), np.float32)
    alone = {name: f(x, REFS) for name, f in functions.items()}
    alone_slopes = {name: jax.grad(functions[name])(x, REFS) for name in slopes}
    for mesh in (batch_mesh(), batch_mesh(explicit=True)):
        split = put(x, mesh, "batch"), put(REFS, mesh, "batch")
        for name, f in functions.items():
            print(mesh.axis_types, name, flush=True)
            for sets in (split, (split[0], REFS), (x, split[1])):
                assert_equal(jax.tree.map(np.asarray, alone[name]), jax.tree.map(np.asarray, f(*sets)))
        for name in slopes:
            print(mesh.axis_types, "slope", name, flush=True)
            slope = jax.grad(functions[name])
            assert_equal(np.asarray(alone_slopes[name]), np.asarray(slope(*split)))
            assert_equal(np.asarray(alone_slopes[name]), np.asarray(jax.jit(slope)(*split)))
            with jax.set_mesh(mesh):
                assert_equal(np.asarray(alone_slopes[name]), np.asarray(slope(*split)))
        before_after(split[1][:, :2], split[0][:, :2], split[0][:, :2])
        witness_map(RBF(1.0), {"x": split[0][:, :2]}, split[1][:, :2], resolution=4)
    made = sample(sharding=batch_sharding())
    assert made.x[:10].shape == (10, D)
    assert_equal(np.asarray(sample().x[:10]), np.asarray(made.x[:10]))


def join(rank, size, port, seconds=10):
    initialize(f"127.0.0.1:{port}", int(size), int(rank), heartbeat_timeout_seconds=seconds)
    return batch_mesh()


def process(rank, size, port, out):
    """One of several processes: its own part of the references in, its own part of the samples out."""
    mesh = join(rank, size, port)
    refs = jax.make_array_from_process_local_data(batch_sharding(mesh), np.split(REFS, int(size))[int(rank)])
    memory = replicate(Memory.empty(10, (D,)), mesh)
    settings = {"sharding": batch_sharding(mesh), "checks": True}
    for key in range(2):
        made = sample(refs, shard_params(PARAMS, mesh), memory=memory, key=key, **settings)
        memory = made.memory
    index, rows = local_rows(made.x)
    assert len(index) == N // int(size)
    np.savez(Path(out) / f"{rank}.npz", index=index, rows=rows, mmd2=made.trace.mmd2)


def many(rank, size, port, out):
    """One of several processes at a long run: says the first row of each batch that it has on disk."""
    mesh = join(rank, size, port)
    refs = jax.make_array_from_process_local_data(batch_sharding(mesh), np.split(REFS, int(size))[int(rank)])
    run(refs, shard_params(PARAMS, mesh), out, sharding=batch_sharding(mesh))


def run(refs, params, out, **settings):
    return sample_many(
        params,
        jax.random.key(0),
        refs,
        **{"model": MODEL, "num_samples": RUN, "batch_size": N, "times": TIMES, "memory": 10, "out": out, **settings},
        each=lambda start, x: print(start, flush=True),
    )


def process_without_end(rank, size, port):
    """One of several processes that sample until one is killed."""
    mesh = join(rank, size, port)
    for key in range(10**9):
        jax.block_until_ready(sample(put(REFS, mesh), put(PARAMS, mesh), sharding=batch_sharding(mesh), key=key))
        print(key, flush=True)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
