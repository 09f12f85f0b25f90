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
    bandit,
    beta,
    clip,
    dashboard,
    densities,
    gae,
    goodhart,
    gradients,
    groups,
    judged,
    kl,
    lengths,
    microscope,
    odds,
    online_offline,
    pair_losses,
    plane,
    policy_simplex,
    reward_to_go,
    simplex,
    tokens,
    two_by_two,
    weights,
    zero_loss,
)
from posttrain.explore.elements import figure, text
from posttrain.explore.panels import Picture

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


def a_plane():
    "The plane with two made-up paths."
    return plane.dpo_plane({"a run": ([0, -1, -2], [0, -2, -5]), "another": ([0, 1, 2], [0, -1, -1])})


EXPLORERS = [
    tokens.tokens_explorer, kl.kl_explorer, weights.weights_explorer, beta.beta_explorer, a_plane,
    pair_losses.pair_loss_curves, zero_loss.zero_loss_explorer, groups.groups_explorer, clip.clip_explorer, a_run,
    a_microscope, judged.judged_explorer, lengths.lengths_explorer, odds.odds_explorer,
    gae.gae_explorer, gradients.gradients_explorer, goodhart.goodhart_explorer,
    bandit.bandit_explorer, online_offline.online_offline_explorer,
    simplex.simplex_explorer, policy_simplex.policy_simplex_explorer, densities.densities_explorer,
    reward_to_go.reward_to_go_explorer, two_by_two.two_by_two_explorer]


@pytest.mark.parametrize("make", EXPLORERS)
def test_static_page_moves_by_keyboard(page, tmp_path, make):
    explorer = make()
    page.goto(explorer.save(tmp_path / "page.html").as_uri())
    picture = page.locator('[data-role="view"] > [role=img]')
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
    others = {other: c for other, c in explorer.controls.items() if other != name}
    for other, c in others.items():  # each of them moves it too, or shows its own state
        box = page.locator(f'[data-name="{other}"]')
        assert box.get_attribute("aria-label")
        if c.kind == "choice":
            box.select_option(index=len(c.values) - 1 if c.value != c.values[-1] else 0)
        elif c.kind == "toggle":
            box.set_checked(not c.value)
        else:
            box.focus()
            page.keyboard.press("ArrowRight" if c.value != c.values[-1] else "ArrowLeft")
    if others: has_changed(page, picture, after)
    assert page.errors == []


def test_a_browser_that_cannot_unpack_the_frames_says_so(page, tmp_path):
    """Browsers from before 2023 have no DecompressionStream."""
    page.add_init_script("delete window.DecompressionStream")
    explorer = beta.beta_explorer()
    page.goto(explorer.save(tmp_path / "page.html").as_uri())
    told = page.locator('[data-role="settings"]').text_content()
    assert told.startswith("Shown for") and told.endswith("Safari 16.4 and newer ones can.")
    assert "It moves in" not in told and page.locator('[data-role="view"] img').count() > 0
    assert page.locator("input, select").count() == 0 and page.errors == []


def test_one_bad_picture_does_not_stop_the_others(page):
    good = Picture(figure([text(9, 30, "a word")], 100, 40, "A", "a picture"))._repr_html_()
    bad = '<div class="pt-picture"><img alt="torn" src="data:image/svg+xml;base64,PHN2Zz4="></div>'
    page.set_content(bad + good)
    assert page.locator(".pt-picture svg[role=img]").count() == 1
    assert page.locator(".pt-picture img[alt=torn]").count() == 1 and page.errors == []


# ---------------------------------------------------------------- on a phone, and in the dark
# What each text of a page looks like: [text, px of its letters, contrast with its ground or null where it cannot be
# seen, whether it leaves its panel]. The ground is what lies below the middle of the text, or the halo about it.
MEASURE = """() => {
  const parts = c => c.match(/[\\d.]+/g).map(Number);
  const light = c => { const [r, g, b] = c.slice(0, 3).map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const contrast = (a, b) => { const [low, high] = [light(a), light(b)].sort((p, q) => p - q);
    return (high + .05) / (low + .05); };
  const ground = (x, y) => {
    let under = [255, 255, 255];
    for (const el of document.elementsFromPoint(x, y).reverse()) {
      const s = getComputedStyle(el), drawn = el instanceof SVGElement;
      if (["text", "tspan", "line", "svg", "g"].includes(el.tagName) || (drawn && s.fill == "none")) continue;
      const c = parts(drawn ? s.fill : s.backgroundColor), a = (c[3] ?? 1) * (drawn ? +s.fillOpacity : 1);
      under = under.map((v, i) => v * (1 - a) + c[i] * a);
    }
    return under;
  };
  const texts = [...document.querySelectorAll("svg text")].filter(t => t.textContent.trim()).map(t => {
    const m = t.getScreenCTM(), s = getComputedStyle(t), box = t.getBoundingClientRect();
    const x = box.x + box.width / 2, y = box.y + box.height / 2;
    const seen = x > 0 && x < innerWidth && y > 0 && y < innerHeight;
    const halo = s.paintOrder.startsWith("stroke") && s.stroke != "none";
    const panel = t.closest(".pt-panel > svg").getBoundingClientRect();
    const leaves = box.left < panel.left - 1 || box.right > panel.right + 1 || box.bottom > panel.bottom + 1;
    return [t.textContent, parseFloat(s.fontSize) * Math.hypot(m.a, m.b),
            seen ? contrast(parts(s.fill), halo ? parts(s.stroke) : ground(x, y)) : null, leaves];
  });
  const card = getComputedStyle(document.querySelector(".pt-card"));
  return {texts, wider: document.documentElement.scrollWidth - document.documentElement.clientWidth,
          card: contrast(parts(card.color), parts(card.backgroundColor)), paper: light(parts(card.backgroundColor))};
}"""


def measured(browser, address: str, **context) -> dict:
    "MEASURE of a page in a browser of this size and colour scheme."
    one = browser.new_page(**context)
    try:
        one.goto(address)
        one.wait_for_selector('[data-role="view"] > [role=img] svg')
        return one.evaluate(MEASURE)
    finally:
        one.close()


@pytest.mark.parametrize("make", EXPLORERS)
def test_is_readable_on_a_phone_and_in_the_dark(browser, tmp_path, make):
    """At 390 px nothing is wider than the page and no text is smaller than 11 px; at 1000 px every text stays in its
    panel. On white and on dark its contrast is at least 4.5."""
    address = make().save(tmp_path / "page.html").as_uri()
    phone = measured(browser, address, viewport={"width": 390, "height": 844}, color_scheme="light")
    assert phone["wider"] <= 0
    assert min((round(px, 2), text) for text, px, _, _ in phone["texts"]) >= (11, "")
    for scheme in ("light", "dark"):
        desk = measured(browser, address, viewport={"width": 1000, "height": 2000}, color_scheme=scheme)
        assert (desk["paper"] < 0.1) == (scheme == "dark") and desk["card"] >= 4.5 and desk["wider"] <= 0
        assert [text for text, _, _, leaves in desk["texts"] if leaves] == []
        worst = min((contrast, text) for text, _, contrast, _ in desk["texts"] if contrast is not None)
        assert worst >= (4.5, ""), (scheme, worst)
        assert sum(contrast is not None for _, _, contrast, _ in desk["texts"]) == len(desk["texts"])


@pytest.mark.parametrize("tag, mark, dark", [
    ("body", 'data-jp-theme-light="false"', True), ("body", 'class="vscode-dark"', True),
    ("html", 'theme="dark"', True), ("body", 'data-jp-theme-light="true"', False),
    ("body", 'class="vscode-light"', False), ("html", 'theme="light"', False)])
def test_a_page_that_says_its_theme_is_believed(browser, tmp_path, tag, mark, dark):
    "JupyterLab, VS Code and Colab, each while the reader's system says the opposite."
    page = beta.beta_explorer().page().replace(f"<{tag}", f"<{tag} {mark}", 1)
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    found = measured(browser, path.as_uri(), color_scheme="light" if dark else "dark")
    assert (found["paper"] < 0.1) == dark and found["card"] >= 4.5


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


def a_dashboard() -> str:
    "What a dashboard leaves in a notebook."
    from types import SimpleNamespace
    log = [{"step": s, "loss": 1 / s, "reward": s / 9} for s in range(1, 9)]
    return dashboard.Dashboard(live=True).picture(SimpleNamespace(log_history=log))


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
    saved = [weights.weights_explorer().html(), a_dashboard(), a_microscope().html()]
    cells = [{**code, "id": f"cell{i}", "outputs": [
        {"output_type": "display_data", "metadata": {}, "data": {"text/html": shown, "text/plain": "words"}}]}
        for i, shown in enumerate(saved)]
    # Trust goes by the content, so the two must differ.
    for name in ("untrusted", "trusted"):
        metadata = {**nb["metadata"], "copy": name}
        (folder / f"{name}.ipynb").write_text(json.dumps({**nb, "cells": cells, "metadata": metadata}))
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


def wait_for_kernel(page, lab, name):
    """Until the page is connected to an idle kernel of this notebook; before that, running a cell asks which to take.

    Kernels of notebooks that were open before are idle too, and still connected for a moment."""
    address, token, _ = lab
    sessions, error = [], None
    for _ in range(300):
        try:
            sessions = json.load(urllib.request.urlopen(f"{address}/api/sessions?token={token}", timeout=5))
        except urllib.error.HTTPError as e:  # the server lists a kernel before its state is known, and answers 500
            sessions, error = [], e
        kernels = [session["kernel"] for session in sessions if session["path"] == name]
        if any(k["connections"] and k["execution_state"] == "idle" for k in kernels):
            page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]')
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"no idle kernel of {name} within 30 s: {sessions or error}")


def test_lab_live_slider_redraws(page, lab):
    open_notebook(page, lab, "live.ipynb")
    wait_for_kernel(page, lab, "live.ipynb")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    handle = page.locator(".jp-OutputArea .noUi-handle").first
    handle.wait_for()
    picture = page.locator(".jp-OutputArea .widget-html [role=img]").first
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
    for i in range(3):  # an explorer, a dashboard, the microscope
        output = page.locator(".jp-Notebook .jp-Cell").nth(i).locator(".jp-OutputArea")
        images = output.locator('img[src^="data:image/svg+xml"]')
        images.first.wait_for()
        for image in images.all():
            image.scroll_into_view_if_needed()
            assert page.evaluate("i => i.complete && i.naturalWidth > 200", image.element_handle())
            assert image.get_attribute("alt")
        # nothing that looks alive and is not
        assert output.locator("input").count() == output.locator("svg[role=img]").count() == 0
    assert "model not found" not in page.content()


def test_lab_moves_a_trusted_notebook_without_running_it(page, lab):
    open_notebook(page, lab, "trusted.ipynb")
    slider = page.locator('.jp-OutputArea input[data-name="long"]')
    slider.wait_for()
    picture = page.locator('.jp-OutputArea [data-role="view"] > [role=img]').first
    before = shown(picture)
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert has_changed(page, picture, before) in weights.weights_explorer().frame(long=11)
    assert slider.input_value() == "8"
    assert page.locator(".jp-OutputArea .pt-picture svg[role=img]").count() == 2  # the dashboard's two panels
    assert page.locator(".jp-OutputArea img").count() == 0 and page.errors == []


def test_lab_dashboard_grows_in_place(page, lab):
    """GRPO: one picture for the whole run, redrawn; at the end it shows the last answers and what was sampled last,
    and the folder holds them."""
    open_notebook(page, lab, "run.ipynb")
    wait_for_kernel(page, lab, "run.ipynb")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    panels, seen = page.locator(".jp-OutputArea .pt-picture svg[role=img]"), set()
    panels.first.wait_for(timeout=60_000)

    def words():
        return page.evaluate("() => [...document.querySelectorAll('.jp-OutputArea .pt-picture svg[role=img]')]"
                             ".map(svg => svg.getAttribute('aria-label')).join(' ')")
    deadline = time.monotonic() + 90
    while "after step 40" not in (now := words()) and time.monotonic() < deadline:
        seen.add(now)
        page.wait_for_timeout(50)
    wanted = ("greedy answers after step 40", "sampled in step 40", "kl (nats per token)", "dead groups")
    assert all(text in words() for text in wanted)
    assert len(seen) > 1
    assert page.locator(".jp-OutputArea .pt-picture").count() == 1
    assert page.locator(".jp-OutputArea pre", has_text="step 40/40").count() == 1
    wait_for_kernel(page, lab, "run.ipynb")
    assert (lab[2] / "out" / "dashboard.svg").exists()
