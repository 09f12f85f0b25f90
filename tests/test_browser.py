"""Explorers in real headless Chromium: the page without a kernel, and a real JupyterLab with and without one."""
import html
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from posttrain.explore import (
    beta,
    clip,
    dashboard,
    groups,
    kl,
    microscope,
    pair_losses,
    plane,
    tokens,
    weights,
    zero_loss,
)

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium() -> str:
    "The browser's path. Missing is a failure, not a skip: the explorers' promise is that they move."
    found = next(filter(None, map(shutil.which, (os.environ.get("CHROMIUM", "chromium"), *NAMES))), None)
    assert found, (f"no browser found ({', '.join(NAMES)}): install one, "
                   "e.g. `apt-get install -y chromium`, or set CHROMIUM to its path")
    return found


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        one = p.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield one
        one.close()


@pytest.fixture
def page(browser):
    one = browser.new_page(viewport={"width": 1200, "height": 900})
    one.set_default_timeout(30_000)
    one.errors = []
    one.on("pageerror", lambda e: one.errors.append(str(e)))
    yield one
    one.close()


def shown(picture) -> str:
    "What a screen reader would say of the picture."
    return picture.get_attribute("aria-label")


def has_changed(page, picture, before: str) -> str:
    "Wait for a picture other than `before`."
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        # the element itself is replaced, so ask anew each time
        if picture.count() and (now := shown(picture)) != before:
            return now
        page.wait_for_timeout(20)
    raise AssertionError(f"the picture did not change: {before!r}")


# ---------------------------------------------------------------- the page without a kernel
def a_run():
    "A dashboard replayed: made-up numbers, since here only the page is looked at."
    rows = [{"step": s, "loss": 1 / (1 + s), "reward": s / 9, "reward_std": .5} for s in range(1, 9)]
    group = {"prompt": "1+1=", "completions": ["2", "11"], "scores": {"exact": [1.0, 0.0], "advantage": [.7, -.7]}}
    rows += [{"step": s, "samples": [{"prompt": "2+2=", "completion": str(s)}], "group": group} for s in (1, 5, 8)]
    return dashboard.replay(rows)


def a_microscope():
    "Tokens of a run: made-up numbers, since here only the page is looked at."
    def look(s):
        completion = {"ids": [1, 2], "tokens": ["4", "<|end|>"], "special": [1], "left_out": 0,
                      "scores": {"right": 1.0}, "logps": [-3 / (1 + s), -0.1 * s], "old_logps": [-1.0, -1.0]}
        return {"step": s, "prompts": [{"prompt": "2+2=", "prompt_ids": [1], "completions": [completion]}]}
    return microscope.microscope([look(s) for s in range(5)])


@pytest.mark.parametrize("make", [
    tokens.tokens_explorer, kl.kl_explorer, weights.weights_explorer, beta.beta_explorer, plane.dpo_plane,
    pair_losses.pair_loss_curves, zero_loss.zero_loss_explorer, groups.groups_explorer, clip.clip_explorer, a_run,
    a_microscope])
def test_static_page_moves_by_keyboard(page, tmp_path, make):
    explorer = make()
    page.goto(explorer.save(tmp_path / "page.html").as_uri())
    picture = page.locator('[data-role="view"] > svg')
    assert shown(picture) in html.unescape(explorer.frame()) and page.locator('[data-role="view"] img').count() == 0
    # A slider if there is one.
    name, control = min(explorer.controls.items(), key=lambda item: item[1].kind != "slider")
    box = page.locator(f'[data-name="{name}"]')
    at, along = control.values.index(control.value), control.kind == "slider"
    step = 1 if at + 1 < len(control.values) else -1
    keys = {1: "ArrowRight", -1: "ArrowLeft"} if along else {1: "ArrowDown", -1: "ArrowUp"}
    key, to = keys[step], at + step
    before = shown(picture)
    box.focus()
    page.keyboard.press(key)
    after = has_changed(page, picture, before)
    want = explorer.frame(**{name: control.values[to]})
    label = ("(svg) => { const d = document.createElement('div'); d.innerHTML = svg; "
             "return d.firstChild.getAttribute('aria-label'); }")
    assert page.evaluate(label, want) == after
    assert page.locator('[data-role="said"]').text_content() == after  # announced in words
    for other, c in explorer.controls.items():  # each of the other controls moves it too, or shows its own state
        box = page.locator(f'[data-name="{other}"]')
        assert box.get_attribute("aria-label")
        if c.kind == "choice":
            box.select_option(index=len(c.values) - 1 if c.value != c.values[-1] else 0)
        elif c.kind == "toggle":
            box.set_checked(not c.value)
    if len(explorer.controls) > 1: has_changed(page, picture, after)
    assert page.errors == []


# ---------------------------------------------------------------- JupyterLab
RUN = """
from posttrain import GRPOConfig, GRPOTrainer, pocket
from posttrain.explore.dashboard import Dashboard
from posttrain.rollout.rewards import exact_match_reward
model, tokenizer = pocket.start("reverse")
args = GRPOConfig(
    "out", max_steps=40, logging_steps=2, report_to="none", save_strategy="no", learning_rate=1e-3,
    per_device_train_batch_size=64, num_generations=8, max_completion_length=12, beta=.01)
trainer = GRPOTrainer(
    model, exact_match_reward, args, train_dataset=pocket.dataset("reverse", "prompt_only", n=200),
    processing_class=tokenizer, callbacks=[Dashboard(every=.05)])
trainer.train()
None
"""


FOLDERS = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_WORKSPACES_DIR",
           "JUPYTERLAB_SETTINGS_DIR")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab server of its own: (address, token, folder). It is ended by its own process id."
    root = tmp_path_factory.mktemp("lab")
    folder = root / "notebooks"
    folder.mkdir()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    token = "posttrain-test"
    private = {name: str(root / name.lower()) for name in FOLDERS}
    env = {**os.environ, **private, "OMP_NUM_THREADS": "1"}
    cell = "from posttrain.explore.weights import weights_explorer\nweights_explorer()"
    code = {"cell_type": "code", "id": "one", "execution_count": None, "metadata": {}, "outputs": [], "source": cell}
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    nb = {"cells": [code], "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}}, "nbformat": 4,
          "nbformat_minor": 5}
    (folder / "live.ipynb").write_text(json.dumps(nb))
    (folder / "run.ipynb").write_text(json.dumps({**nb, "cells": [{**nb["cells"][0], "source": RUN}]}))
    committed = json.loads((ROOT / "nbs/explore/05_weights.ipynb").read_text())
    # As committed, outputs included. Trust goes by the content, so the two must differ.
    for name in ("untrusted", "trusted"):
        metadata = {**committed["metadata"], "copy": name}
        (folder / f"{name}.ipynb").write_text(json.dumps({**committed, "metadata": metadata}))
    subprocess.run([sys.executable, "-m", "jupyter", "trust", str(folder / "trusted.ipynb")], env=env, check=True,
                   capture_output=True)
    log = open(root / "log", "w")
    flags = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
             f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}",
             "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
             "--LabApp.extension_manager=readonly"]
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *flags], env=env, stdout=log,
                              stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"

    try:
        for _ in range(300):
            assert server.poll() is None, (root / "log").read_text()[-2000:]
            try:
                urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=5)
                break
            except OSError:
                time.sleep(0.1)
        else:
            raise AssertionError("JupyterLab did not answer within 30 s: " + (root / "log").read_text()[-2000:])
        yield address, token, folder
    finally:
        server.terminate()  # it ends its kernels on the way out
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(5)
        log.close()


def open_notebook(page, lab, name):
    address, token, _ = lab
    page.goto(f"{address}/lab/tree/{name}?token={token}&reset")
    page.wait_for_selector(".jp-Notebook .jp-Cell")


def wait_for_kernel(page, lab):
    "Until the page is connected to an idle kernel; before that, running a cell asks which kernel to take."
    address, token, _ = lab
    kernels, error = [], None
    for _ in range(300):
        try:
            kernels = json.load(urllib.request.urlopen(f"{address}/api/kernels?token={token}", timeout=5))
        except urllib.error.HTTPError as e:  # the server lists a kernel before its state is known, and answers 500
            kernels, error = [], e
        if any(k["connections"] and k["execution_state"] == "idle" for k in kernels):
            page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]')
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"no idle kernel within 30 s: {kernels or error}")


def test_lab_live_slider_redraws(page, lab):
    open_notebook(page, lab, "live.ipynb")
    wait_for_kernel(page, lab)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    handle = page.locator(".jp-OutputArea .noUi-handle").first
    handle.wait_for()
    picture = page.locator(".jp-OutputArea .widget-html svg[role=img]").first
    explorer = weights.weights_explorer()
    control = explorer.controls["long"]
    assert page.locator(".jp-OutputArea .noUi-base").first.bounding_box()["width"] > 100  # a track that can be grabbed
    before = shown(picture)
    assert before in explorer.frame()
    handle.focus()
    page.keyboard.press("ArrowLeft")  # it starts at its right end
    after = has_changed(page, picture, before)
    assert after in explorer.frame(long=control.fine[control.fine.index(control.value) - 1])
    page.keyboard.press("ArrowRight")
    assert has_changed(page, picture, after) == before


def test_lab_shows_a_picture_of_an_untrusted_notebook(page, lab):
    open_notebook(page, lab, "untrusted.ipynb")
    image = page.locator('.jp-OutputArea img[src^="data:image/svg+xml"]').first
    image.wait_for()
    image.scroll_into_view_if_needed()
    assert page.evaluate("i => i.complete && i.naturalWidth > 300", image.element_handle())
    # nothing that looks alive and is not
    assert image.get_attribute("alt") and page.locator(".jp-OutputArea input").count() == 0
    assert "model not found" not in page.content()


def test_lab_moves_a_trusted_notebook_without_running_it(page, lab):
    open_notebook(page, lab, "trusted.ipynb")
    slider = page.locator('.jp-OutputArea input[data-name="long"]')
    slider.wait_for()
    picture = page.locator('.jp-OutputArea [data-role="view"] > svg')
    before = shown(picture)
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert has_changed(page, picture, before) in weights.weights_explorer().frame(long=9)
    assert slider.input_value() == "2" and page.errors == []


def test_lab_dashboard_grows_in_place(page, lab):
    """GRPO: one picture for the whole run, redrawn; at the end it shows the last answers and what was sampled last,
    and the folder holds them."""
    open_notebook(page, lab, "run.ipynb")
    wait_for_kernel(page, lab)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    picture, seen = page.locator(".jp-OutputArea svg[role=img]").first, set()
    picture.wait_for(timeout=60_000)
    deadline = time.monotonic() + 90
    while "after step 40" not in (now := shown(picture)) and time.monotonic() < deadline:
        seen.add(now)
        page.wait_for_timeout(50)
    wanted = ("greedy answers after step 40", "sampled in step 40", "kl (nats per token)", "dead groups")
    assert all(text in shown(picture) for text in wanted)
    assert len(seen) > 1
    assert page.locator(".jp-OutputArea :not(svg) > svg[role=img]").count() == 1
    assert page.locator(".jp-OutputArea pre", has_text="step 40/40").count() == 1
    wait_for_kernel(page, lab)
    assert (lab[2] / "out" / "dashboard.svg").exists()
