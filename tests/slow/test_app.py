"""The page of examples/app.py: what it makes, what it says of mistakes, and the page itself in a browser."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import types
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from mmdjax.faces import faces_with, read_attributes
from mmdjax.sd.tiny import write_tiny

gr = pytest.importorskip("gradio", reason="the page needs the extra app")
EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.append(str(EXAMPLES))
import app  # noqa: E402  # found through the line above
from app import FOLDER, OWN, PORTRAITS, Settings, make  # noqa: E402

PAGE_SECONDS, RUN_SECONDS = 60, 120  # a busy machine's; mostly they are 5 and 15

# the page's process, which tells of every connection beyond this machine
WATCHED = """
import runpy, sys
HERE = (None, "127.0.0.1", "::1", "localhost", "0.0.0.0", "::")
def watch(event, args):
    host = args[1] if event == "socket.connect" else args if event == "socket.getaddrinfo" else None
    if isinstance(host, tuple) and host[0] not in HERE:
        print("reaches out to", host[0], file=sys.stderr, flush=True)
sys.addaudithook(watch)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def with_glasses(pictures):
    """The share of faces, as bytes, that wear glasses."""
    return read_attributes(pictures / np.float32(127.5) - 1)["glasses"].mean()


@pytest.fixture(scope="module")
def glasses(tmp_path_factory):
    """Files of faces with glasses, and their bytes."""
    folder, pictures = tmp_path_factory.mktemp("glasses"), app.as_bytes(faces_with("glasses").images[:30])
    files = [str(folder / f"{i:02d}.png") for i in range(len(pictures))]
    for file, picture in zip(files, pictures, strict=True):
        Image.fromarray(picture).save(file)
    return files, pictures


@pytest.fixture(scope="module")
def made():
    return make(Settings(samples=16, steps=20))


def test_guided_faces_wear_the_references_glasses(made):
    assert made.refs.shape == (50, 16, 16, 3)
    assert with_glasses(made.refs) > 0.95
    assert with_glasses(made.unguided) < 0.1
    assert with_glasses(made.guided) > 0.9
    unguided, guided = (float(made.table[1][column]) for column in (1, 2))
    assert guided < 0.2 * unguided  # the energy distance
    assert made.traces["guided"].mmd2[-1] < 0.2 * made.traces["unguided"].mmd2[-1]
    assert made.table[3] == ["with glasses", *(f"{100 * with_glasses(x):.0f} %" for x in (made[1], made[2], made[0]))]


def test_the_noise_is_the_same_and_nothing_compiles_anew(made):
    compiled = []
    listen = lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    plain = make(Settings(samples=16, steps=20, scale=0.0))
    np.testing.assert_array_equal(plain.unguided, made.unguided)
    np.testing.assert_array_equal(plain.guided, plain.unguided)
    other = make(Settings(samples=16, steps=20, scale=0.5, seed=1, attribute="hat"))
    assert compiled == []
    assert not np.array_equal(other.unguided, made.unguided)


def test_the_nearest_reference_pulls_most(made):
    clicked = types.SimpleNamespace(index=3)
    title, best = app.pulled((made.refs, made.shares), clicked)
    assert "guided picture 4" in title
    distances = ((made.guided[3] - made.refs.astype(float)) ** 2).sum((1, 2, 3))
    order = np.argsort(distances)[: app.PULLED]
    for (picture, _), i in zip(best, order, strict=True):
        np.testing.assert_array_equal(picture[::6, ::6], made.refs[i])
    np.testing.assert_allclose(made.shares.sum(1), 1, rtol=1e-5)


def test_own_pictures(glasses):
    files, pictures = glasses
    own = make(Settings(attribute=OWN, files=files, samples=16, steps=20))
    np.testing.assert_array_equal(own.refs, pictures)
    assert with_glasses(own.guided) > 0.9
    assert with_glasses(own.unguided) < 0.1
    assert own.shares.shape == (16, 30)


def test_portraits_with_prompts():
    one, other = "a smiling person with no hair, pale skin", "an angry person with a black afro, dark skin"
    chosen = Settings(PORTRAITS, attribute="sunglasses", prompts=f"{one}\n\n  {other}", samples=4, steps=6)
    portraits = make(chosen)
    assert portraits.guided.shape == (4, 64, 64, 3)
    unguided, guided = (float(portraits.table[1][column]) for column in (1, 2))
    assert guided < 0.5 * unguided
    alike = make(chosen._replace(prompts=one))
    apart = np.abs(alike.unguided - portraits.unguided.astype(float)).mean((1, 2, 3))  # of 256 levels
    assert apart[::2].max() < 1  # the samples take prompts in turn; rounding differs
    assert apart[1::2].min() > 20


@pytest.mark.parametrize("unconditional", [False, True])
def test_a_folder_of_ones_own(tmp_path, glasses, unconditional):
    folder = write_tiny(tmp_path / "model", unconditional=unconditional)
    chosen = Settings(FOLDER, str(folder), OWN, glasses[0][:5], "" if unconditional else "a cat", samples=3, steps=2)
    assert make(chosen).guided.shape == (3, 32, 32, 3)
    if unconditional:
        with pytest.raises(ValueError, match="takes no prompts, and there is 'a dog'; empty the field"):
            make(chosen._replace(prompts="a dog"))


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory, glasses):
    """By what is wrong: settings, and what the message says."""
    files, folder = glasses[0], tmp_path_factory.mktemp("mistakes")
    no_picture, broken = folder / "letter.png", write_tiny(folder / "broken")
    no_picture.write_text("Dear reader")
    (broken / "unet" / "config.json").write_text("{")
    shutil.copytree(broken, folder / "bare", ignore=lambda path, names: names if path.endswith("unet") else [])
    own, here = Settings(attribute=OWN), Settings(FOLDER, attribute=OWN, files=files)
    return {
        "no references": (own, "Number of references: 0; drop at least 2"),
        "one reference": (own._replace(files=files[:1]), "Number of references: 1; drop at least 2"),
        "equal references": (own._replace(files=files[:1] * 3), "equal"),
        "no picture": (
            own._replace(files=[*files, str(no_picture)]),
            "letter.png is not a picture that can be read; remove",
        ),
        "no folder": (here, "folder '' does not exist; give one in the layout of diffusers"),
        "a hub's name": (here._replace(folder="some/model"), "folder 'some/model' does not exist"),
        "broken folder": (here._replace(folder=str(broken)), "config.json"),
        "half a folder": (here._replace(folder=str(folder / "bare")), "unet"),
        "prompts": (Settings(prompts="a cat"), "takes no prompts, and there is 'a cat'; empty the field"),
        "one sample": (Settings(samples=1), "samples is 1; give a whole number from 2 to 256"),
        "half a sample": (Settings(samples=2.5), "samples is 2.5; give a whole number"),
        "no steps": (Settings(steps=0), "steps is 0; give a whole number from 1"),
        "no seed": (Settings(seed=None), "seed is None; give a whole number from 0"),
    }


WRONG = (
    "no references", "one reference", "equal references", "no picture", "no folder", "a hub's name", "broken folder",
    "half a folder", "prompts", "one sample", "half a sample", "no steps", "no seed",
)  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_mistakes_are_named(mistakes, wrong):
    chosen, message = mistakes[wrong]
    with pytest.raises((ValueError, OSError)) as caught:
        make(chosen)
    assert message in str(caught.value)


def test_more_mistakes_are_named(glasses):
    with pytest.raises(ValueError, match="References 'hat': choose of sunglasses, glasses, my own pictures"):
        app.references(Settings(PORTRAITS, attribute="hat"), (64, 64, 3))
    many = Settings(PORTRAITS, attribute="glasses", prompts="a person\n" * 5, samples=4)
    with pytest.raises(ValueError, match="There are 5 prompts for 4 samples"):
        make(many)


# The page's process


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The page's address, and a function for what its process has said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log, url = tmp_path_factory.mktemp("page") / "log", f"http://127.0.0.1:{port}/"
    words = [sys.executable, "-c", WATCHED, str(EXAMPLES / "app.py"), "--port", str(port)]
    with (
        log.open("w") as out,
        subprocess.Popen(words, stdout=out, stderr=out, env=os.environ | {"JAX_PLATFORMS": "cpu"}) as process,
    ):
        try:
            wait_for(lambda: answers(url) or process.poll() is not None, PAGE_SECONDS, log.read_text)
            assert process.poll() is None, log.read_text()
            yield url, log.read_text
        finally:
            process.terminate()


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as page:
            return page.status == 200
    except OSError:
        return False


def wait_for(condition, seconds, log):
    """The first true value of the condition."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, log()
        time.sleep(0.2)
    return value


def test_mistakes_over_http(served, mistakes):
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    url, log = served
    client = Client(url, verbose=False, analytics_enabled=False)
    try:
        for wrong in (
            "no references",
            "one reference",
            "no picture",
            "no folder",
            "broken folder",
            "prompts",
            "no steps",
        ):
            chosen, message = mistakes[wrong]
            fields = chosen._replace(files=[handle_file(file) for file in chosen.files or ()])
            with pytest.raises(AppError) as caught:
                client.predict(*fields, api_name="/make")
            assert message in str(caught.value)
    finally:
        client.close()
    assert "Traceback" not in log()
    assert "reaches out" not in log()


@pytest.fixture
def browser():
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1500,1100"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield opened
    opened.quit()


def test_in_a_browser(served, browser, glasses, tmp_path):
    """Drop pictures, press the button, look at what was made, and click a picture."""
    (url, log), (files, pictures) = served, glasses
    find = lambda css: browser.find_elements("css selector", css)
    text = lambda: browser.execute_script("return document.body.innerText")

    def gallery(name, count, seconds):
        """Its pictures at the size that the model has; enlarged sixfold on the page."""
        images = lambda: browser.execute_script(f"return [...document.querySelectorAll('#{name} img')].map(i => i.src)")
        wait_for(lambda: len(images()) == count, seconds, log)
        opened = []
        for source in images():
            with urllib.request.urlopen(source) as answer, Image.open(io.BytesIO(answer.read())) as picture:
                assert picture.size == (96, 96)
                opened.append(np.asarray(picture.convert("RGB"))[::6, ::6])
        return np.stack(opened)

    browser.get(url)
    gallery("references", 50, PAGE_SECONDS)
    letter = tmp_path / "letter.png"
    letter.write_text("Dear reader")
    find("input[type=file]")[0].send_keys(str(letter))
    wait_for(lambda: "letter.png is not a picture that can be read; remove it" in text(), PAGE_SECONDS, log)
    browser.refresh()
    gallery("references", 50, PAGE_SECONDS)
    find("input[type=file]")[0].send_keys("\n".join(files))
    np.testing.assert_array_equal(gallery("references", 30, PAGE_SECONDS), pictures)

    find("#make")[0].click()
    guided, unguided = gallery("guided", 25, RUN_SECONDS), gallery("unguided", 25, PAGE_SECONDS)
    assert with_glasses(guided) > 0.9
    assert with_glasses(unguided) < 0.1
    assert "Energy distance to the references" in text()

    find("#guided img")[2].click()
    pull = gallery("pulled", app.PULLED, PAGE_SECONDS)
    assert "What pulls guided picture 3 most" in text()
    order = np.argsort(((guided[2] - pictures.astype(float)) ** 2).sum((1, 2, 3)))
    np.testing.assert_array_equal(pull, pictures[order[: app.PULLED]])

    sent = [json.loads(entry["message"])["message"]["params"] for entry in browser.get_log("performance")]
    asked = {request["request"]["url"] for request in sent if "request" in request}
    assert len(asked) > 5
    assert [address for address in asked if not address.startswith((url, "data:", "blob:"))] == []
    assert "reaches out" not in log()
