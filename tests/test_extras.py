"""Optional packages: each is imported in one way, and a missing one is named with what installs it."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

import mmdjax
from mmdjax._core.extras import installed
from mmdjax.plots import trace_curves
from mmdjax.sd.files.places import download
from mmdjax.sd.text.tokenizer import load_tokenizer
from mmdjax.sd.tiny import write_vocabulary

PACKAGE = Path(mmdjax.__file__).parent


@pytest.mark.parametrize(
    ("package", "extra", "use"),
    [
        ("matplotlib", "plots", lambda folder: trace_curves({})),
        ("tokenizers", "sd", load_tokenizer),
        ("huggingface_hub", "sd", lambda folder: download("someone/model")),
    ],
)
def test_missing_package_names_the_extra(monkeypatch, tmp_path, package, extra, use):
    write_vocabulary(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not there
    assert not installed(package)
    with pytest.raises(ImportError, match=re.escape(f"install {package} (")) as info:
        use(tmp_path)
    assert f'pip install "mmdjax[{extra}]"' in str(info.value)


def test_nothing_optional_is_imported_otherwise():
    """Every import statement of the package is of the standard library, itself, or a package it depends on."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {re.match(r"[\w-]+", line)[0].replace("pillow", "PIL") for line in project["dependencies"]}
    required |= {"ml_dtypes"}  # JAX's own
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {node.module.partition(".")[0]}
    assert {"jax", "numpy", "PIL"} <= found
    assert found <= required | {"mmdjax"} | set(sys.stdlib_module_names)


def test_hub_that_gives_nothing(monkeypatch, tmp_path):
    """Not found, no permission, no network: the error says that the name was no path, either."""

    def refuse(*args, **how):
        raise OSError("404 Client Error.\n\nRepository Not Found")

    monkeypatch.setitem(sys.modules, "huggingface_hub", type("hub", (), {"snapshot_download": staticmethod(refuse)}))
    text = "no/model is no local path, and the hub does not give it: 404 Client Error. Repository Not Found"
    with pytest.raises(FileNotFoundError, match=re.escape(text)):
        download("no/model")
