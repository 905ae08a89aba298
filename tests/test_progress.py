"""Progress bars where they could warn."""

import sys
import types
import warnings

import pytest

from mmdjax._core import progress


@pytest.fixture
def notebook(monkeypatch):
    """tqdm, imported anew, takes this process for a notebook's, and there are no widgets."""
    for name in ("tqdm.auto", "tqdm.autonotebook", "tqdm.notebook"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", types.ModuleType("ipykernel.zmqshell"))
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=object))
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    progress._tqdm.cache_clear()
    yield
    progress._tqdm.cache_clear()


@pytest.mark.parametrize("action", ["error", "always"])
def test_notebook_without_ipywidgets(notebook, action, capsys):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(action)
        assert list(progress.progress_bar(range(3), desc="counting")) == [0, 1, 2]
    assert not caught
    assert "counting: 100%" in capsys.readouterr().err  # a line of text


def test_tqdm_alone_warns_there(notebook):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        from tqdm.auto import tqdm  # noqa: F401
    assert "IProgress not found" in str([warning.message for warning in caught])


def test_disabled_bar_is_silent(capsys):
    assert list(progress.progress_bar(range(3), disable=True)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
