"""Progress bars: where they appear, and what they show."""

import sys
import types

import pytest

from text_to_image import progress
from text_to_image.progress import ProgressBar, as_progress


@pytest.fixture
def notebook(monkeypatch):
    """As in a Jupyter kernel."""
    monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", types.ModuleType("ipykernel.zmqshell"))


def test_a_bar_counts_and_ends_by_itself(capsys):
    bar = ProgressBar("drawing", "token")
    bar(1, 4)
    bar(3, 4)
    assert bar.bar.n == 3 and bar.bar.total == 4 and not bar.bar.disable
    bar(4, 4)
    assert bar.bar.n == 4 and bar.bar.disable  # closed
    assert "drawing: 100%" in capsys.readouterr().err
    with ProgressBar("drawing", "token") as unfinished:
        unfinished(1, 4)
    assert unfinished.bar.disable


def test_a_bar_where_it_is_asked_for():
    def own(done, total):
        pass

    assert as_progress(own, "x", "step") is own
    assert as_progress(None, "x", "step") is None and as_progress(False, "x", "step") is None
    assert isinstance(as_progress(True, "x", "step"), ProgressBar)


def test_a_notebook_shows_bars_by_itself(notebook, monkeypatch, recwarn):
    monkeypatch.setattr(progress, "find_spec", lambda name: object())
    assert isinstance(as_progress(None, "x", "step"), ProgressBar) and as_progress(False, "x", "step") is None
    assert not recwarn.list
    monkeypatch.setattr(progress, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"ipywidgets is missing.*dalle-diffusion\[notebook\]"):
        assert isinstance(as_progress(None, "x", "step"), ProgressBar)
