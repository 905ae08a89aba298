"""What is installed and sent out: the wheel and the source distribution, outside of the repository."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WITH = {"mmdjax/py.typed", "mmdjax/data/digits.npz", "mmdjax/data/digits.safetensors", "mmdjax/data/NOTICE"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", out, ROOT], check=True, stdout=subprocess.DEVNULL)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def modules():
    return {str(path.relative_to(ROOT)) for path in (ROOT / "mmdjax").rglob("*.py")}


def test_files_of_the_sdist(built):
    with tarfile.open(built[0]) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert WITH | modules() | {"LICENSE", "README.md", "DESCRIPTION.md", "pyproject.toml"} <= names
    folders = {name.partition("/")[0] for name in names if "/" in name}
    assert folders == {"mmdjax", "mmdjax.egg-info"}  # no tests without their helpers


def test_files_of_the_wheel(built):
    with zipfile.ZipFile(built[1]) as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == WITH | modules()
    licences = {name.partition("/licenses/")[2] for name in names if "/licenses/" in name}
    assert licences == {"LICENSE", "mmdjax/data/NOTICE"}
    said = HeaderParser().parsestr(metadata)
    assert said.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2601.08379"]
    links = re.findall(r"\]\(([^)]*)\)", said.get_payload())
    assert links
    assert all(link.startswith("https://") for link in links)  # an index page has no files beside it


@pytest.mark.parametrize("kind", [0, 1], ids=["sdist", "wheel"])
def test_installed_it_runs_elsewhere(built, kind, tmp_path):
    """The index page's example, and the command line; the dependencies are those of this Python."""
    place = tmp_path / "packages"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", place, built[kind]]
    subprocess.run(pip, check=True)
    environment = os.environ | {"PYTHONPATH": str(place)}
    example = re.search(r"```python\n(.*?)```", (ROOT / "DESCRIPTION.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    script = tmp_path / "example.py"
    script.write_text(f"{example}\nimport mmdjax\nprint(mmdjax.__file__)\n", encoding="utf-8")
    how = {"check": True, "capture_output": True, "text": True, "cwd": tmp_path, "env": environment}
    lines = subprocess.run([sys.executable, "-W", "error", script], **how).stdout.splitlines()
    assert lines[0].startswith("(64, 8, 8, 1) ")
    assert lines[1] == str(place / "mmdjax" / "__init__.py")
    assert "encode reference pictures" in subprocess.run([place / "bin" / "mmdjax", "--help"], **how).stdout
