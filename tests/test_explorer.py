"The explorer without a browser: what a cell shows, and what a refusal says"

import pytest

pytest.importorskip("ipywidgets")

from minsnr_nb.analysis.explorer import explore  # noqa: E402


def test_explorer_is_shown_with_a_picture():
    shown = explore()._repr_mimebundle_()[0]
    assert "application/vnd.jupyter.widget-view+json" in shown
    assert shown["image/png"].startswith(b"\x89PNG")


def test_explorer_refusal_names_the_slider():
    explorer = explore(prediction="eps")
    ending = explorer.choosers["schedule"].controls["zero_terminal_snr"]
    ending.value = True
    said = explorer.text.value
    assert said.startswith("<b>refused:</b> zero_terminal_snr: objective.prediction: ")
    assert explorer.image.layout.display == "none"
    ending.value = False
    assert "refused" not in explorer.text.value and explorer.image.layout.display is None
