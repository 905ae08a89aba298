"""The command line on a tiny model: what it writes, and how it refuses."""

import json
import shutil
import sys
import warnings

import jax
import numpy as np
import pytest
import sd_toys
from PIL import Image
from safetensors.numpy import load_file, save_file

import mmdjax.__main__
import mmdjax.sd.run
from mmdjax import IMQ, Delta, GuidanceWarning, MMDGuidance, Particles, Product, mmd2
from mmdjax.__main__ import main
from mmdjax.metrics import energy_distance
from mmdjax.sd import load, load_references

CAPTIONS = ["a cat", "a dog", "a cat"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return sd_toys.write_pipeline(tmp_path_factory.mktemp("pipeline") / "model")


@pytest.fixture(scope="module")
def refs(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("refs"), np.random.default_rng(0)
    for i, caption in enumerate(CAPTIONS):
        Image.fromarray(rng.integers(0, 255, (20, 12, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


def run(*words):
    return main([str(word) for word in words])


def refused(capsys, *words, text):
    assert run(*words) == 2
    assert text in capsys.readouterr().err.replace("\n", " ")


@pytest.fixture(scope="module")
def sampled(model, refs, tmp_path_factory):
    out = tmp_path_factory.mktemp("sampled") / "out"
    assert (
        run("sample", model, "--refs", refs, "--out", out, "-n", 4, "--batch-size", 2, "--steps", 4, "--seed", 3) == 0
    )
    return out


def test_sample_writes_all_of_it(sampled, refs):
    names = sorted(path.name for path in sampled.iterdir())
    assert names == [
        *(f"0000{i}.png" for i in range(4)),
        "comparison.png",
        "grid.png",
        "run.json",
        "samples.safetensors",
    ]
    arrays = load_file(sampled / "samples.safetensors")
    assert {name: x.shape for name, x in arrays.items()} == {
        "latents": (4, 4, 4, 4), "unguided": (4, 4, 4, 4), "prompt": (4,),
    }  # fmt: skip
    report = json.loads((sampled / "run.json").read_text())
    assert report["prompts"] == CAPTIONS  # none were given
    assert arrays["prompt"].tolist() == [0, 1, 2, 0]
    assert report["settings"]["seed"] == 3
    assert report["settings"]["refs"] == str(refs)
    assert report["references"] == 3
    assert {"device", "jax", "mmdjax"} <= set(report["made_with"])
    before, after = report["distances"]["before"], report["distances"]["after"]
    assert after["energy_distance"] < before["energy_distance"]
    assert after["mmd2"] < before["mmd2"]
    assert report["by_condition"]
    assert report["nearest_avoided"] is None


@pytest.mark.parametrize(("samples", "references"), [(1, 3), (3, 1)])
def test_distances_of_one_sample_are_left_out(samples, references):
    """Unbiased ones are unknown; so says run.json, and a run of one picture ends well."""
    draw = np.random.default_rng(0).normal
    particles = Particles(draw(size=(references, 2)).astype(np.float32))
    arrays = {"latents": draw(size=(samples, 2)).astype(np.float32)}
    guidance = MMDGuidance(IMQ(1.0))
    assert mmdjax.sd.run._distances(guidance, particles, arrays, None) == {}


def test_distances_at_each_prompt():
    """Of the samples alone at each prompt: the prompts' shares do not count; unknown of one sample of each."""
    x, y = (np.random.default_rng(i).normal(size=(8, 2)).astype(np.float32) for i in (0, 1))
    guidance = MMDGuidance(Product(IMQ(1.0), Delta()))
    arrays, prompts = {"latents": x, "prompt": np.array([0, 0, 0, 0, 0, 1, 1, 2])}, np.arange(3)
    refs = Particles(y, np.array([0, 0, 1, 1, 1, 1, 1, 2]))
    found = mmdjax.sd.run._distances(guidance, refs, arrays, prompts)["after"]
    parts = [(x[:5], y[:2]), (x[5:7], y[2:7])]
    expected = [(float(energy_distance(a, b)), float(mmd2(IMQ(1.0), a, b, estimator="u"))) for a, b in parts]
    np.testing.assert_allclose(list(found.values()), np.average(expected, axis=0, weights=[5, 2]), rtol=1e-4)
    alone = mmdjax.sd.run._distances(guidance, refs, {"latents": x[:3], "prompt": np.arange(3)}, prompts)["after"]
    assert alone == {"energy_distance": None, "mmd2": None}
    assert mmdjax.__main__._table("at each prompt", {"after": alone})[-1].split() == ["mmd2", "–"]


def test_nearest_of_the_avoided():
    x, y, z = (np.random.default_rng(i).normal(size=(n, 2, 2)).astype(np.float32) for i, n in enumerate((8, 3, 5)))
    found = mmdjax.sd.run._nearest(Particles(y), {"latents": x, "unguided": z})
    for name, points in (("before", z), ("after", x)):
        near = np.sqrt(((points[:, None] - y) ** 2).sum((2, 3))).min(1)
        np.testing.assert_allclose(list(found[name].values()), [near.min(), np.median(near)], rtol=1e-5)
    lines = mmdjax.__main__._table("distance", found)
    assert [line.split()[0] for line in lines[2:]] == ["unguided", "least", "median"]


@pytest.mark.filterwarnings("default")
def test_warnings_are_told_in_one_line(model, refs, tmp_path, monkeypatch, capsys):
    def warned(*args, **how):
        warnings.warn("scale is 5; give less", GuidanceWarning, stacklevel=1)
        raise KeyboardInterrupt

    monkeypatch.setattr(mmdjax.sd.run, "sample_to_folder", warned)
    assert run("sample", model, "--refs", refs, "--out", tmp_path / "out", "--quiet") == 130
    assert capsys.readouterr().err.startswith("mmdjax sample: warning: scale is 5; give less\n")


def test_interrupted_run_goes_on(sampled, model, refs, tmp_path, monkeypatch, capsys):
    """Ctrl-C at the fourth picture, then the same command: its files are those of a run that nothing interrupted."""
    out, save_picture = tmp_path / "out", mmdjax.sd.run.save_picture
    words = ["sample", model, "--refs", refs, "--out", out, "-n", 4, "--batch-size", 2, "--steps", 4, "--seed", 3]

    def interrupted(path, picture):
        if path.name == "00003.png":
            raise KeyboardInterrupt
        save_picture(path, picture)

    with monkeypatch.context() as patch:
        patch.setattr(mmdjax.sd.run, "save_picture", interrupted)
        assert run(*words) == 130
    assert "repeat the command to resume" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == ["00000.png", "00001.png", "00002.png", "parts"]
    refused(capsys, *words, "--steps", 5, text="holds a run of other settings; nothing was changed")
    refused(capsys, "convert", model, "--out", out, text="exists and is not an empty folder")
    (out / "00001.png").write_bytes((out / "00001.png").read_bytes()[:-20])  # damaged meanwhile
    assert run(*words) == 0
    whole = {path.name: path.read_bytes() for path in sampled.iterdir() if path.name != "run.json"}
    assert whole == {path.name: path.read_bytes() for path in out.iterdir() if path.name != "run.json"}
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert run(*words) == 0
    assert "holds the 4 pictures of this command already; nothing was done" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    report = json.loads((out / "run.json").read_text())
    del report["settings"]["memory"], report["settings"]["captions"]  # as written before there were these options
    (out / "run.json").write_text(json.dumps(report))
    assert run(*words) == 0
    assert "nothing was done" in capsys.readouterr().out


def test_pictures_are_the_decoded_latents(sampled, model):
    pipeline, params = load(model)
    latents = load_file(sampled / "samples.safetensors")["latents"]
    picture = np.asarray(pipeline.decode(params, latents[3:4]))[0]
    with Image.open(sampled / "00003.png") as file:
        stored = np.asarray(file, np.float32) / 127.5 - 1
    np.testing.assert_allclose(stored, picture, atol=1.5 / 127.5)  # 8 bits, rounded


def test_pack_samples_as_its_pictures_do(sampled, model, refs, tmp_path):
    assert run("encode", model, refs, "--batch-size", 2, "--out", tmp_path / "refs.safetensors") == 0
    report = json.loads((sampled / "run.json").read_text())
    pack = load_references(tmp_path / "refs.safetensors", *load(model))
    assert pack.content == report["hashes"]["references"]
    words = ["--refs", tmp_path / "refs.safetensors", "-n", 4, "--batch-size", 2, "--steps", 4, "--seed", 3]
    assert run("sample", model, "--out", tmp_path / "again", "--no-compare", *words) == 0
    again = load_file(tmp_path / "again" / "samples.safetensors")
    np.testing.assert_array_equal(again["latents"], load_file(sampled / "samples.safetensors")["latents"])
    assert "unguided" not in again
    assert not (tmp_path / "again" / "comparison.png").exists()


@pytest.mark.slow
def test_unconditional_without_references(tmp_path):
    model = sd_toys.write_pipeline(tmp_path / "ldm", unconditional=True)
    assert run("sample", model, "--out", tmp_path / "out", "-n", 2, "--steps", 2, "--sampler", "heun") == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["distances"] is None


@pytest.mark.slow
def test_half_precision_takes_the_same_pack(model, refs, tmp_path, capsys):
    pack = tmp_path / "refs.safetensors"
    assert run("encode", model, refs, "--out", pack) == 0
    how = ("-n", 2, "--steps", 2, "--cfg-scale", 1, "--no-compare", "--sampler", "dpm++2m", "--at", "sample")
    assert run("sample", model, "--refs", pack, "--out", tmp_path / "out", "--dtype", "bfloat16", *how) == 0
    assert np.isfinite(load_file(tmp_path / "out" / "samples.safetensors")["latents"]).all()
    assert run("sample", model, "--refs", pack, "--out", tmp_path / "not", "--precondition", "shrunk", *how) == 2
    assert "precondition='shrunk' is for x̂0 moved" in capsys.readouterr().err


def test_convert_there_and_back(model, tmp_path):
    assert run("convert", model, "--out", tmp_path / "ours") == 0
    assert run("convert", tmp_path / "ours", "--to", "diffusers", "--out", tmp_path / "theirs") == 0
    for path in model.rglob("*.safetensors"):
        mine = tmp_path / "theirs" / path.relative_to(model)
        assert mine.read_bytes() == path.read_bytes()
    index = json.loads((tmp_path / "theirs" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    pipeline, _ = load(tmp_path / "theirs")
    assert pipeline.tokenizers["text_encoder"](["cat"]).shape == (1, 8)
    assert run("convert", model / "unet", "--out", tmp_path / "half", "--dtype", "float16", "--to", "diffusers") == 0
    half = load_file(tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {x.dtype.name for x in half.values()} == {"float16"}


def test_inspect(model, refs, tmp_path, capsys):
    assert run("inspect", model, "--batch-size", 2) == 0
    text = capsys.readouterr().out
    total = sum(x.size for path in model.rglob("*.safetensors") for x in load_file(path).values())
    for part in (
        "UNet2DCondition", f"{total:,}", "predicts: eps, 1000 levels", "pictures: 8 × 8, latents 4 × 4 × 4",
        "prompts: through text_encoder", "U-Net, 2 pictures at once: ",
    ):  # fmt: skip
        assert part in text
    assert run("inspect", model / "unet") == 0
    assert "one network, not a whole pipeline" in capsys.readouterr().out
    pack = tmp_path / "refs.safetensors"
    assert run("encode", model, refs, "--prompt", "a bird", "--out", pack) == 0
    assert run("inspect", pack) == 0
    assert "3 references with latents [4, 4, 4], 1 prompts, such as 'a bird'" in capsys.readouterr().out


@pytest.fixture
def calls(monkeypatch):
    """What `sample_many` would have been called with; nothing is sampled."""
    found = []

    def sample_many(params, key, refs, **how):
        found.append(how | {"refs": refs})
        raise KeyboardInterrupt

    monkeypatch.setattr(mmdjax.sd.run, "sample_many", sample_many)
    return found


def test_memory_is_an_option(calls, model, refs, tmp_path):
    words = ["sample", model, "--refs", refs, "--out", tmp_path / "out", "-n", 5, "--batch-size", 2, "--steps", 4]
    for more in ((), ("--memory", 3), ("--memory", 0), ("--batch-size", 5)):
        assert run(*words, *more) == 130
    assert [call["memory"] for call in calls] == [5, 3, None, None]  # one batch has none before it


def test_captions_can_be_ignored(calls, model, refs, tmp_path):
    """Of a folder, half of whose pictures have one, and of a pack."""
    half, pack = tmp_path / "half", tmp_path / "refs.safetensors"
    half.mkdir()
    for path in refs.iterdir():
        if path.name != "1.txt":
            (half / path.name).write_bytes(path.read_bytes())
    assert run("encode", model, refs, "--batch-size", 2, "--out", pack) == 0
    how = ("--batch-size", 2, "--steps", 4, "--out", tmp_path / "out")
    for source, captions in ((half, "ignore"), (pack, "ignore"), (pack, "use")):
        assert run("sample", model, "--refs", source, "--captions", captions, *how) == 130
    assert [call["refs"].cond is None for call in calls] == [True, True, False]
    assert [call["guidance"].kernel is None for call in calls] == [True, True, False]
    for call in calls:
        np.testing.assert_array_equal(call["refs"].x, load_file(pack)["latents"])
    plain = tmp_path / "plain.safetensors"
    assert run("encode", model, half, "--captions", "ignore", "--batch-size", 2, "--out", plain, "--quiet") == 0
    assert load_references(plain).captions() is None
    one = tmp_path / "one.safetensors"
    assert run("encode", model, half, "--prompt", "a bird", "--batch-size", 2, "--out", one) == 0
    assert load_references(one).captions() == ["a bird"] * 3


def test_avoid(calls, model, refs, tmp_path):
    """A folder or a pack, with references or without; prompts are compared where there are captions."""
    pack = tmp_path / "avoid.safetensors"
    assert run("encode", model, refs, "--batch-size", 2, "--out", pack) == 0
    how = ("--batch-size", 2, "--steps", 4, "--out", tmp_path / "out")
    for words in (
        ("--avoid", refs, "--avoid-strength", 2),
        ("--avoid", pack, "--refs", refs),
        ("--avoid", pack, "--avoid-radius", 1.5, "--captions", "ignore"),
    ):
        assert run("sample", model, *words, *how) == 130
    assert [call["refs"] is None for call in calls] == [True, False, True]
    assert [call["guidance"].kernel is None for call in calls] == [False, False, True]
    avoid = [call["avoid"] for call in calls]
    assert [a.cond is None for a in avoid] == [False, False, True]
    assert [(float(a.strength), a.radius) for a in avoid] == [(2.0, None), (1.0, None), (1.0, 1.5)]
    assert [call["memory"] for call in calls] == [8, 8, 8]
    for a in avoid:
        np.testing.assert_array_equal(a.x, load_file(pack)["latents"])


def test_sample_that_only_avoids(model, refs, tmp_path):
    out = tmp_path / "out"
    words = ("--avoid", refs, "--captions", "ignore", "-n", 3, "--batch-size", 3, "--steps", 3, "--prompt", "a bird")
    assert run("sample", model, *words, "--out", out, "--quiet") == 0
    report = json.loads((out / "run.json").read_text())
    assert (report["references"], report["avoided"], report["distances"]) == (None, 3, None)
    assert report["hashes"]["avoided"] is not None
    assert (out / "comparison.png").exists()
    latents = load_file(out / "samples.safetensors")
    assert np.abs(latents["latents"] - latents["unguided"]).max() > 1e-4
    assert set(report["nearest_avoided"]) == {"before", "after"}


def test_quiet(calls, model, refs, tmp_path, capsys):
    """No bar in the program, which JAX's persistent cache then keeps; nothing said."""
    words = ["sample", model, "--refs", refs, "--out", tmp_path / "out", "--batch-size", 2, "--steps", 4]
    assert run(*words, "--quiet") == 130
    assert (
        capsys.readouterr().err.strip() == "mmdjax sample: interrupted; every file that was written is whole; "
        "repeat the command to resume"
    )
    assert run(*words) == 130
    assert "encoding: 100%" in capsys.readouterr().err
    assert [call["progress"] for call in calls] == [False, True]


@pytest.mark.parametrize("change", [{"_class_name": "TCDScheduler"}, {"use_lu_lambdas": True}])
def test_scheduler_in_place_of_one_that_is_refused(model, tmp_path, capsys, change):
    """The error names the way out, and that way works."""
    copy = shutil.copytree(model, tmp_path / "model")
    file = copy / "scheduler" / "scheduler_config.json"
    raw = {"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "scaled_linear"}
    file.write_text(json.dumps(raw | change))
    words = ["sample", copy, "--out", tmp_path / "out", "-n", 1, "--steps", 2, "--no-compare", "--quiet"]
    refused(capsys, *words, text="--scheduler DDIMScheduler")
    assert run("convert", copy, "--scheduler", "EulerDiscreteScheduler", "--out", tmp_path / "new", "--quiet") == 0
    written = json.loads((tmp_path / "new" / "scheduler" / "scheduler_config.json").read_text())
    expected = {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear", "clip_sample": False}
    assert written == expected


def test_unused_keys_and_clip_skip(model, tmp_path, capsys):
    copy = shutil.copytree(model, tmp_path / "model")
    weights = copy / "text_encoder" / "model.safetensors"
    save_file(load_file(weights) | {"extra.x": np.zeros(1, np.float32)}, weights)
    refused(capsys, "inspect", copy, text='such as "extra.*"')
    out = tmp_path / "new"
    assert run("convert", copy, "--allow-unused", "extra.*", "--clip-skip", 1, "--out", out, "--quiet") == 0
    assert load(out)[0].modules["text_encoder"].config.clip_skip == 1


def test_inspect_without_the_extra(model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert run("inspect", model) == 0
    text = capsys.readouterr().out
    assert "in all" in text
    assert 'prompts: through text_encoder; their vocabularies were not looked at: pip install "mmdjax[sd]"' in text
    assert run("sample", model, "--out", "o") == 2
    assert "install tokenizers (" in capsys.readouterr().err


# --- what is refused ---


def test_out_that_exists(sampled, model, refs, capsys):
    before = {path: path.stat().st_mtime_ns for path in sampled.iterdir()}
    refused(
        capsys, "sample", model, "--refs", refs, "--out", sampled, text="exists and is not an empty folder; nothing was"
    )
    refused(capsys, "convert", model, "--out", sampled, text="Give another --out")
    assert {path: path.stat().st_mtime_ns for path in sampled.iterdir()} == before


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    """No weights are read, and nothing is sampled."""

    def loaded(*args, **how):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(mmdjax.__main__, "_load", loaded)


@pytest.fixture
def odd(tmp_path, model, refs, monkeypatch):
    """A folder of what is given by mistake; words of commands are relative to it."""
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "refs").symlink_to(refs)
    for name in ("empty", "full", "half"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "a").touch()
    for name in ("0.png", "1.png", "0.txt"):
        (tmp_path / "half" / name).write_bytes((refs / name).read_bytes())
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "no.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


WRONG = {
    "sample nowhere --out o": "nowhere: no such file or folder",
    "sample refs/0.png --out o": "0.png is neither safetensors nor a PyTorch archive",
    "sample empty --out o": "empty: no model; looked for mmdjax.json",
    "sample no.safetensors --out o": "no.safetensors is not a sound safetensors file: it has 0 bytes",
    "sample model --out o --variant fp8": "no part of the model has fp8 weights; there are: plain",
    "sample model --out o --variant unet=fp8": "unet: no fp8 weights; there are: plain",
    "sample model --out o --variant unet=": "--variant is 'unet='; give a name, or PART=NAME for each part",
    "sample model --out o --scheduler LCMScheduler": "class is 'LCMScheduler'; implemented: DDIMScheduler, DDPM",
    "sample model --out o --clip-skip -1": "--clip-skip is -1; give at least 0",
    "sample model --out o --clip-skip 9": "clip_skip is 9; give 0 to 1",
    "sample model --out o --tokenizer empty": "empty: no vocabulary for prompts; needed: vocab.json",
    "sample model --out full": "full exists and is not an empty folder; nothing was overwritten",
    "sample model --out refs/o --refs refs": "--out refs/o is within --refs refs; give an --out outside of it",
    "sample model --out refs --refs refs": "--out refs is within --refs refs",
    "sample model --out empty.txt/o": "empty.txt: nothing can be written there (Not a directory); give another --out",
    "sample model --out o --refs nowhere": "nowhere: no such folder of pictures",
    "sample model --out o --refs empty": "empty: no pictures; looked for *.png",
    "sample model --out o --refs half": "1.png: it has no caption and others have",
    "sample model --out o --refs half --unreadable refuse": "or use no captions (--captions ignore)",
    "sample model --out o --refs refs/0.png": "--refs refs/0.png is neither a folder nor a pack; give a folder of",
    "sample model --out o --refs no.safetensors": "--refs no.safetensors: no.safetensors is not a sound safetensors",
    "sample model --out o --prompts empty.txt": "empty.txt holds no prompts; write one in each line",
    "sample model --out o --prompts empty": "--prompts empty is not a file; give a text file",
    "sample model --out o --prompts latin.txt": "--prompts latin.txt is not UTF-8 text",
    "sample model --out o -n 0": "--num-samples/-n is 0; give at least 1",
    "sample model --out o --batch-size 0": "--batch-size is 0; give at least 1",
    "sample model --out o --steps 0": "--steps is 0; give at least 1",
    "sample model --out o --steps ten": "--steps is 'ten'; give a whole number",
    "sample model --out o --steps 1001": "1001; the table allows 1 to 1000",
    "sample model --out o --memory -1": "--memory is -1; give at least 0",
    "sample model --out o --seed 4294967296": "--seed is 4294967296; give -2147483648 to 4294967295",
    "sample model --out o --eta -1": "--eta is -1; give at least 0",
    "sample model --out o --cfg-scale inf": "--cfg-scale is inf; give a finite number",
    "sample model --out o --guidance-scale nan": "--guidance-scale is nan; give a finite number",
    "sample model --out o --height 0": "--height is 0; give at least 1",
    "sample model --out o --height 9": "height is 9; give a multiple of 2, such as 8",
    "sample model --out o --eta 0 --sampler heun": "--eta is for --sampler ddim, not heun; leave it out",
    "sample model --out o --negative a --cfg-scale 1": "--negative needs a --cfg-scale other than 1",
    "sample model --out refs/o --avoid refs": "--out refs/o is within --avoid refs; give an --out outside of it",
    "sample model --out o --avoid nowhere": "nowhere: no such folder of pictures",
    "sample model --out o --avoid no.safetensors": "--avoid no.safetensors: no.safetensors is not a sound safetensors",
    "sample model --out o --avoid-strength 2": "--avoid-strength without --avoid; give --avoid, or leave",
    "sample model --out o --avoid refs --avoid-strength -1": "--avoid-strength is -1; give at least 0",
    "sample model --out o --avoid refs --avoid-radius 0": "--avoid-radius is 0; give a length above 0",
    "sample model --out o --at clean": "--at without --refs; give --refs, or leave --at out",
    "sample model --out o --precondition field": "--precondition without --refs; give --refs, or leave",
    "sample model --out o --lora a.safetensors": "--lora is 'a.safetensors'; give FILE=STRENGTH",
    "sample model --out o --lora a=strong": "--lora is 'strong'; give a number",
    "sample model --out o --lora a=unet:inf": "--lora is inf; give a finite number",
    "sample model --out o --lora a=1 --lora a=2": "--lora is given twice for a; give it once",
    "sample model --out o --lora nowhere=1": "LoRA nowhere: no such file or folder",
    "sample model --out o --lora no.safetensors=1": "no.safetensors is not a sound safetensors file",
    "sample model --out o --textual-inversion cat": "--textual-inversion is 'cat'; give TOKEN=FILE",
    "encode model refs --out o.safetensors --lora nowhere=1": "LoRA nowhere: no such file or folder",
    "sample model": "the following arguments are required: --out; see mmdjax sample --help",
    "sample model --out o --fast": "unrecognized arguments: --fast",
    "encode model refs --out o.zip": "a pack is a .safetensors file, such as o.safetensors",
    "encode model half --out o.safetensors": "1.png: it has no caption and others have",
    "encode model refs --out o.safetensors --batch-size 0": "--batch-size is 0; give at least 1",
    "encode model refs --out o.safetensors --width 9": "width is 9; give a multiple of 2, such as 8",
    "encode model refs --out empty.txt/o.safetensors": "empty.txt: nothing can be written there",
    "convert empty --out o": "empty: no model; looked for mmdjax.json",
    "convert model --out model": "model exists and is not an empty folder",
    "inspect nowhere": "nowhere: no such file or folder",
    "inspect model --batch-size 0": "--batch-size is 0; give at least 1",
}


def test_wrong_calls_are_refused_before_anything_is_loaded(odd, nothing_is_loaded, capsys):
    """One message on stderr, exit code 2, nothing written."""
    before = sorted(odd.rglob("*"))
    for words, text in WRONG.items():
        assert run(*words.split()) == 2, words
        streams = capsys.readouterr()
        assert text in streams.err, words
        assert streams.err.startswith("mmdjax"), words
        assert not streams.out, words
        assert sorted(odd.rglob("*")) == before, words
    with pytest.raises(FileNotFoundError):
        run("sample", "nowhere", "--out", "o", "--traceback")


@pytest.fixture
def learnt(tmp_path):
    """The paths of a LoRA, and of a word of three vectors."""
    key, ones = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", np.ones((2, 32), np.float32)
    save_file({f"{key}.lora_A.weight": ones, f"{key}.lora_B.weight": ones.reshape(32, 2)}, tmp_path / "a.safetensors")
    save_file({"emb_params": np.ones((3, 32), np.float32)}, tmp_path / "cat.safetensors")
    return tmp_path / "a.safetensors", tmp_path / "cat.safetensors"


def test_inspect_tells_what_a_lora_changes(model, learnt, capsys):
    lora, word = learnt
    assert run("inspect", model, "--lora", f"{lora}=unet:0.5", "--textual-inversion", f"<cat>={word}") == 0
    out = capsys.readouterr().out
    assert "a.safetensors: changes 1 tensors of unet, with strength 0.5" in out
    assert "<cat>: 3 new vectors of text_encoder" in out


@pytest.mark.slow
def test_convert_writes_the_merged_model(model, learnt, tmp_path):
    lora, word = learnt
    given = ("--lora", f"{lora}=0.5", "--textual-inversion", f"<cat>={word}")
    assert run("convert", model, "--out", tmp_path / "o", *given, "--quiet") == 0
    _, expected = load(model, lora={lora: 0.5}, textual_inversion={"<cat>": word})
    pipeline, params = load(tmp_path / "o")
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert pipeline.tokenizers["text_encoder"](["<cat>"])[0, :4].tolist() == [516, 518, 519, 520]


def test_help_says_what_is_there(capsys):
    assert run("sample", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("--memory N", "0: none (default 1000)", "--captions {use,ignore}", "--quiet"):
        assert part in text
    assert run("--version") == 0


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError(), "out of memory; give a smaller --batch-size"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes"), "out of memory; give a smaller"),
        (OSError(28, "No space left on device", "o/a.png"), "error: o/a.png: No space left on device"),
    ],
)
def test_errors_of_the_machine(error, text, model, tmp_path, monkeypatch, capsys):
    def load(args):
        raise error

    monkeypatch.setattr(mmdjax.__main__, "_load", load)
    refused(capsys, "sample", model, "--out", tmp_path / "out", text=text)


def test_convert_that_is_interrupted_leaves_nothing(model, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(mmdjax.sd.pipeline.Pipeline, "_save_rest", interrupted)  # after the networks
    assert run("convert", model, "--out", tmp_path / "out") == 130
    assert capsys.readouterr().err.endswith("interrupted; every file that was written is whole\n")
    assert not list(tmp_path.iterdir())


def test_references_of_another_size(model, refs, tmp_path, capsys):
    pack = tmp_path / "refs.safetensors"
    assert run("encode", model, refs, "--height", 16, "--width", 12, "--out", pack) == 0
    text = "the references have 16 × 12 pixels but the samples 8 × 8"
    refused(capsys, "sample", model, "--refs", pack, "--out", tmp_path / "out", text=text)
    refused(capsys, "encode", model, refs, "--out", pack, text="exists; nothing was overwritten")


def test_unreadable_pictures_are_skipped_by_a_flag(model, refs, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for path in refs.iterdir():
        (pictures / path.name).write_bytes(path.read_bytes())
    (pictures / "0.png").write_bytes(b"")
    pack = tmp_path / "refs.safetensors"
    refused(capsys, "encode", model, pictures, "--out", pack, text="0.png: not readable as a picture")
    assert not pack.exists()
    assert run("encode", model, pictures, "--out", pack, "--unreadable", "skip") == 0
    streams = capsys.readouterr()
    assert "skipped 0.png: not readable" in streams.err
    assert "2 references, 2 prompts" in streams.out
    assert load_references(pack).captions() == CAPTIONS[1:]


def test_prompts_for_an_unconditional_model(tmp_path, capsys):
    model = sd_toys.write_pipeline(tmp_path / "ldm", unconditional=True)
    text = "this model is unconditional; leave out the prompts ['a cat']"
    refused(capsys, "sample", model, "--out", tmp_path / "out", "--prompt", "a cat", text=text)
