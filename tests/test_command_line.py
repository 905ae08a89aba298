"""The command line on a tiny model: what it writes, and how it refuses."""

import json

import numpy as np
import pytest
import sd_toys
from PIL import Image
from safetensors.numpy import load_file

import mmdjax.sd.run
from mmdjax.__main__ import main
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
        run("sample", model, "--refs", refs, "--out", out, "-n", 5, "--batch-size", 2, "--steps", 4, "--seed", 3) == 0
    )
    return out


def test_sample_writes_all_of_it(sampled, refs):
    names = sorted(path.name for path in sampled.iterdir())
    assert names == [
        *(f"0000{i}.png" for i in range(5)),
        "comparison.png",
        "grid.png",
        "run.json",
        "samples.safetensors",
    ]
    arrays = load_file(sampled / "samples.safetensors")
    assert {name: x.shape for name, x in arrays.items()} == {
        "latents": (5, 4, 4, 4), "unguided": (5, 4, 4, 4), "prompt": (5,),
    }  # fmt: skip
    report = json.loads((sampled / "run.json").read_text())
    assert report["prompts"] == CAPTIONS  # none were given
    assert arrays["prompt"].tolist() == [0, 1, 2, 0, 1]
    assert report["settings"]["seed"] == 3
    assert report["settings"]["refs"] == str(refs)
    assert report["references"] == 3
    assert {"device", "jax", "mmdjax"} <= set(report["made_with"])
    before, after = report["distances"]["before"], report["distances"]["after"]
    assert after["energy_distance"] < before["energy_distance"]
    assert after["mmd2"] < before["mmd2"]


@pytest.mark.parametrize(("samples", "references"), [(1, 3), (3, 1)])
def test_distances_of_one_sample_are_left_out(samples, references):
    """Unbiased ones are unknown; so says run.json, and a run of one picture ends well."""
    draw = np.random.default_rng(0).normal
    particles = mmdjax.Particles(draw(size=(references, 2)).astype(np.float32))
    arrays = {"latents": draw(size=(samples, 2)).astype(np.float32)}
    guidance = mmdjax.MMDGuidance(mmdjax.IMQ(1.0))
    assert mmdjax.sd.run._distances(guidance, particles, arrays, None) == {}


def test_interrupted_run_goes_on(sampled, model, refs, tmp_path, monkeypatch, capsys):
    """Ctrl-C at the fourth picture, then the same command: its files are those of a run that nothing interrupted."""
    out, save_picture = tmp_path / "out", mmdjax.sd.run.save_picture
    words = ["sample", model, "--refs", refs, "--out", out, "-n", 5, "--batch-size", 2, "--steps", 4, "--seed", 3]

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
    assert "holds the 5 pictures of this command already; nothing was done" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_pictures_are_the_decoded_latents(sampled, model):
    pipeline, params = load(model)
    latents = load_file(sampled / "samples.safetensors")["latents"]
    picture = np.asarray(pipeline.decode(params, latents[4:5]))[0]
    with Image.open(sampled / "00004.png") as file:
        stored = np.asarray(file, np.float32) / 127.5 - 1
    np.testing.assert_allclose(stored, picture, atol=1.5 / 127.5)  # 8 bits, rounded


def test_pack_samples_as_its_pictures_do(sampled, model, refs, tmp_path):
    assert run("encode", model, refs, "--batch-size", 2, "--out", tmp_path / "refs.safetensors") == 0
    report = json.loads((sampled / "run.json").read_text())
    pack = load_references(tmp_path / "refs.safetensors", *load(model))
    assert pack.content == report["hashes"]["references"]
    words = ["--refs", tmp_path / "refs.safetensors", "-n", 5, "--batch-size", 2, "--steps", 4, "--seed", 3]
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
def test_half_precision_takes_the_same_pack(model, refs, tmp_path):
    pack = tmp_path / "refs.safetensors"
    assert run("encode", model, refs, "--out", pack) == 0
    how = ("-n", 2, "--steps", 2, "--cfg-scale", 1, "--no-compare", "--sampler", "dpm++2m", "--at", "sample")
    assert run("sample", model, "--refs", pack, "--out", tmp_path / "out", "--dtype", "bfloat16", *how) == 0
    assert np.isfinite(load_file(tmp_path / "out" / "samples.safetensors")["latents"]).all()


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


# --- what is refused ---


def test_out_that_exists(sampled, model, refs, capsys):
    before = {path: path.stat().st_mtime_ns for path in sampled.iterdir()}
    refused(
        capsys, "sample", model, "--refs", refs, "--out", sampled, text="exists and is not an empty folder; nothing was"
    )
    refused(capsys, "convert", model, "--out", sampled, text="Give another --out")
    assert {path: path.stat().st_mtime_ns for path in sampled.iterdir()} == before


def test_words_that_do_not_fit(model, refs, tmp_path, capsys):
    out = ("--out", tmp_path / "out")
    refused(capsys, "sample", tmp_path / "no" / "model", *out, text="no such file or folder")
    refused(capsys, "sample", model, *out, "--refs", tmp_path / "no", text="no such folder of pictures")
    refused(capsys, "sample", model, *out, "-n", "0", text="--num-samples/-n is 0; give at least 1")
    refused(capsys, "sample", model, *out, "--height", "9", text="height is 9; give a multiple of 2, such as 8")
    refused(capsys, "sample", model, *out, "--guidance-scale", "nan", text="scale is nan; give a finite number")
    refused(
        capsys, "encode", model, refs, "--out", tmp_path / "refs.zip", text="a pack is a .safetensors file, such as"
    )
    (tmp_path / "empty.txt").write_text("\n")
    refused(
        capsys, "sample", model, *out, "--prompts", tmp_path / "empty.txt", text="holds no prompts; give one a line"
    )
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileNotFoundError):
        run("sample", tmp_path / "no" / "model", *out, "--traceback")


def test_references_of_another_size(model, refs, tmp_path, capsys):
    pack = tmp_path / "refs.safetensors"
    assert run("encode", model, refs, "--height", 16, "--width", 12, "--out", pack) == 0
    text = "the references are of 16 × 12 pixels but the samples of 8 × 8"
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
