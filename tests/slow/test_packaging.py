"""What is published holds what the package needs, and nothing of the repository besides."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from mmdjax import __version__

ROOT = Path(__file__).parents[2]
NEEDED = {
    "py.typed", "__init__.py", "sd/networks/unet.py", "digits/NOTICE", "digits/digits.npz", "digits/digits.safetensors",
    "faces/NOTICE", "faces/source.png", "faces/source.npz", "faces/faces.safetensors", "faces/attributes.safetensors",
}  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of an sdist, and of the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", out, ROOT], check=True, capture_output=True)
    return out


def test_wheel_has_the_package_alone(built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        (metadata,) = (wheel.read(name).decode() for name in names if name.endswith("METADATA"))
    assert {f"mmdjax/{name}" for name in NEEDED} <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"mmdjax"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "# mmdjax" in metadata
    assert "![" not in metadata  # pictures by a path that an index page does not have


def test_sdist_has_no_tests(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {f"mmdjax/{name}" for name in NEEDED} | {"README.md", "LICENSE", "pyproject.toml"} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "examples/"))]


def test_wheel_runs_outside_of_the_repository(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    into = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site", wheel]
    subprocess.run(into, check=True, capture_output=True)
    code = "import mmdjax; model, _ = mmdjax.load_digits(); print(mmdjax.__file__, model.shape)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert run.stdout.split(maxsplit=1) == [str(tmp_path / "site/mmdjax/__init__.py"), "(8, 8, 1)\n"]


def test_versions_are_the_same_wherever_they_stand():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
    ruff = re.search(r'"ruff==([^"]+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert f"rev: v{ruff} " in (ROOT / ".pre-commit-config.yaml").read_text()
