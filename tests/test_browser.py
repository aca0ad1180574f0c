"The explorer in a real browser: JupyterLab on this machine, Debian's chromium without a screen"

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minsnr_nb.analysis.explorer import objective_of, sections, summary, view
from minsnr_nb.sweep.engine import run_sweep

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="no chromium here (Debian: apt-get install chromium chromium-driver)",
)
CELL = "from minsnr_nb.analysis.explorer import explore\n\nexplore()"
BOARD = "from minsnr_nb.sweep.board import SweepBoard\n\nSweepBoard('../tiny.yaml', '../runs')"
STUDY = """
study: tiny
model: {name: mlp, width: 8, depth: 1}
train: {steps: 2, batch_size: 16, checkpoint_every: 2}
callbacks: [{name: log_events}, {name: evaluate}, {name: checkpoint}]
metrics: []
sampler: {name: ddim, steps: 1}
eval: {every: 2, samples: 4, probe_images: 16, probe_draws: 1}
sweep:
  seeds: {count: 2}
  baseline: constant
  arms: {constant: {loss: {name: constant}}, mine: {loss: {name: min_snr, gamma: 5.0}}}
  primary: {metric: probe/x0}
"""
IDLE = """const lab = window.jupyterapp, panel = lab && lab.shell.currentWidget;
const kernel = panel && panel.sessionContext && panel.sessionContext.session;
return Boolean(kernel && kernel.kernel && kernel.kernel.status === 'idle');"""
WIDGET = "//div[contains(@class, 'widget-inline-hbox')][label[text()='{}']]"


def until(condition, seconds: float = 30):
    "Ask until the answer is true"
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.1)
    return found


@pytest.fixture
def lab(tmp_path, monkeypatch, request):
    "JupyterLab on a copy of a small notebook; the address of that notebook"
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    home, cell = (
        tmp_path / "home",
        {"cell_type": "code", "id": "one", "metadata": {}, "outputs": []},
    )
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    notebook = {
        "cells": [cell | {"source": getattr(request, "param", CELL), "execution_count": None}],
        "metadata": kernel,
    }
    (tmp_path / "nbs").mkdir()
    text = json.dumps(notebook | {"nbformat": 4, "nbformat_minor": 5})
    (tmp_path / "nbs/look.ipynb").write_text(text)
    here = {f"JUPYTER_{k}_DIR": str(home / k) for k in ("CONFIG", "RUNTIME")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0"]
    command += ["--ip=127.0.0.1", "--expose-app-in-browser", "--IdentityProvider.token=look"]
    command += [f"--ServerApp.root_dir={tmp_path / 'nbs'}", "--LabApp.news_url=None"]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with open(tmp_path / "lab.log", "wb") as log:
        options = {"stdout": log, "stderr": log, "start_new_session": True}
        server = subprocess.Popen(command, env=os.environ | here, cwd=tmp_path, **options)
    try:
        (about,) = until(lambda: list((home / "RUNTIME").glob("jpserver-*.json")))
        port = until(lambda: re.search(r'"port": (\d+)', about.read_text()))[1]
        yield f"http://127.0.0.1:{port}/lab/tree/look.ipynb?token=look"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)


@pytest.fixture
def browser(tmp_path, monkeypatch):
    "Chromium without a screen and without a past"
    monkeypatch.setenv("SE_OFFLINE", "true")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in (
        "headless=new",
        "no-sandbox",
        "no-proxy-server",
        "disable-dev-shm-usage",
        "disable-background-networking",
        "window-size=1300,1000",
        f"user-data-dir={tmp_path / 'chromium'}",
    ):
        options.add_argument(f"--{word}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def test_browser_gamma_is_dragged(lab, browser):
    "The slider moves the curves, the numbers are those of the dragged γ, and a refusal says why"
    browser.get(lab)
    until(lambda: browser.execute_script(IDLE))
    browser.execute_script("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    image = until(lambda: browser.find_elements("css selector", "img.widget-image"))[0]
    gamma = browser.find_element("xpath", WIDGET.format("gamma"))
    readout = gamma.find_element("css selector", ".widget-readout")
    text = browser.find_element("css selector", ".widget-html-content")
    until(lambda: image.size["height"] > 300)
    assert readout.text == "5.00" and "31 % of the loss, 20 % of the gradient noise" in text.text
    before = image.screenshot_as_png

    handle = gamma.find_element("css selector", ".noUi-handle")
    action = webdriver.ActionChains(browser, 20).click_and_hold(handle)
    for _ in range(5):
        action = action.move_by_offset(-8, 0)
    action.release().perform()
    dragged = float(until(lambda: readout.text != "5.00" and readout.text))
    assert 0.05 < dragged < 4
    expected = summary(
        view(objective_of(sections(weighting={"name": "min_snr", "gamma": dragged})))
    )
    until(lambda: text.text == expected)
    assert image.screenshot_as_png != before
    if place := os.environ.get("MINSNR_SCREENSHOT"):
        Path(place).write_bytes(browser.get_screenshot_as_png())

    browser.find_element("xpath", "//label[contains(., 'zero_terminal_snr')]/input").click()
    until(
        lambda: (
            "refused: zero_terminal_snr: objective.prediction: 'eps' cannot be used" in text.text
        )
    )
    assert not image.is_displayed()


@pytest.mark.parametrize("lab", [BOARD], indirect=True)
def test_browser_a_board_shows_runs_that_somebody_else_makes(lab, browser, tmp_path):
    "Empty cells and no verdict at first; a look later, signs and sentences"
    (tmp_path / "tiny.yaml").write_text(STUDY)
    browser.get(lab)
    until(lambda: browser.execute_script(IDLE))
    browser.execute_script("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    cells = lambda state: browser.find_elements("css selector", f"td[title='{state}']")  # noqa: E731
    until(lambda: len(cells("waiting")) == 4)
    told = lambda: browser.find_element("css selector", ".jp-OutputArea").text  # noqa: E731
    assert "appears when every run has ended" in told() and "mine" in told()

    run_sweep(tmp_path / "tiny.yaml", 1, tmp_path / "runs")
    browser.find_element("xpath", "//button[contains(., 'look again')]").click()
    until(lambda: len(cells("completed")) == 4)
    until(lambda: "appears when every run has ended" not in told())
    assert "4 completed" in told() and "mine and constant are" in told()
    if place := os.environ.get("MINSNR_SCREENSHOT"):
        Path(place).write_bytes(browser.get_screenshot_as_png())
