"""Explorers without a browser: every corner draws well-formed, finite pictures, and the widget follows its controls."""
import base64
import json
import re
import subprocess
import sys
import zlib
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from xml.dom import minidom

import pytest
import torch

from posttrain import CPOTrainer, ORPOTrainer
from posttrain.explore import clip, groups, judged, kl, lengths, odds, plane, svg, tokens, weights, zero_loss
from posttrain.explore.core import WIDGET_VIEW, Explorer, choice, slider, toggle
from posttrain.explore.panels import Picture, rows_of
from posttrain.explore.theme import image_css
from posttrain.foundations.preferences import Pairs

# Made up: here only the page is looked at.
A_RUN = {"liked": torch.linspace(-50, 9, 30), "disliked": torch.linspace(-99, 3, 20)}
EXPLORERS = {"tokens": tokens.tokens_explorer, "kl": kl.kl_explorer, "weights": weights.weights_explorer,
             "zero loss": zero_loss.zero_loss_explorer, "groups": groups.groups_explorer, "clip": clip.clip_explorer,
             "judged": judged.judged_explorer, "lengths": lengths.lengths_explorer, "odds": odds.odds_explorer,
             "judged with a run": lambda: judged.judged_explorer(A_RUN, question="Which answers does KTO hold?"),
             "plane": lambda: plane.dpo_plane(losses=plane.OTHERS, title="Other methods", question="Which lets go?")}


@pytest.fixture(scope="module", params=EXPLORERS)
def explorer(request):
    return EXPLORERS[request.param]()


def corners(explorer):
    "First and last value of every control, in all combinations."
    ends = [(c.fine[0], c.fine[-1]) for c in explorer.controls.values()]
    return [dict(zip(explorer.controls, values)) for values in product(*ends)]


def check_picture(text):
    doc = minidom.parseString(text)  # raises on anything that is not well-formed
    root = doc.documentElement
    assert root.tagName == "svg" and root.getAttribute("role") == "img" and root.getAttribute("aria-label")
    for node in doc.getElementsByTagName("*"):
        for a in node.attributes.values():
            if a.name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height", "d", "viewBox"):
                assert not re.search(r"nan|inf", a.value, re.I), (node.tagName, a.name, a.value)
                assert all(abs(float(n)) < 1e4 for n in re.findall(r"-?\d+\.?\d*", a.value))
    return doc


def test_corners_are_finite_and_differ(explorer):
    frames = [explorer.frame(**v) for v in corners(explorer)]
    for frame in frames:
        check_picture(frame)
    for name, control in explorer.controls.items():  # no control is dead
        first, last = (explorer.frame(**{name: v}) for v in (control.values[0], control.values[-1]))
        assert first != last, f"moving {name!r} changes nothing"


def test_every_saved_frame_is_in_the_page_and_the_page_is_small(explorer):
    html = explorer.html()
    assert len(html.encode()) < 150_000
    # the same bytes from a new object
    assert html == EXPLORERS[next(k for k, v in EXPLORERS.items() if v().title == explorer.title)]().html()
    packed = re.search(r'atob\("(.*?)"\)', html)[1]
    data = json.loads(zlib.decompress(base64.b64decode(packed)))
    rebuilt = ["\n".join(data["lines"][k] for k in data["frames"][i]) for i in data["index"]]
    assert rebuilt == [explorer.view(**v) for v in explorer.grid()]
    assert re.search(r"\bid=", html) is None and "src=\"http" not in html and "@import" not in html


def test_without_scripts_there_is_one_right_picture(explorer):
    bare = re.sub(r"<script>.*?</script>", "", explorer.html(), flags=re.S)
    images = re.findall(r'<img alt="([^"]+)" src="data:image/svg\+xml;base64,([^"]+)"', bare)
    style, panels = f"<style>{image_css()}</style>\n", [p for row in rows_of(explorer.frame()) for p in row]
    assert [base64.b64decode(content).decode().replace(style, "") for _, content in images] == panels
    assert len(" ".join(alt for alt, _ in images)) > 20
    assert "<input" not in bare and "<select" not in bare  # no dead controls
    for name in explorer.controls:
        assert explorer._label(name) in bare  # but what they are set to


def test_widget_follows_its_controls(explorer):
    explorer = Explorer(explorer.draw, title=explorer.title, question=explorer.question, **explorer.controls)
    box = explorer.widget()
    assert box.view.value == explorer.view()
    for name, control in explorer.controls.items():
        box.inputs[name].value = other = next(v for v in reversed(control.values) if v != control.value)
        assert box.view.value == explorer.view(**{name: other}) != explorer.view()
        box.inputs[name].value = control.value
        assert box.view.value == explorer.view()


def test_each_asks_one_question(explorer):
    assert explorer.question.endswith("?") and explorer.question.count("?") == 1
    assert explorer.question in explorer.html()


def test_one_bundle_carries_both_forms(monkeypatch):
    one = Explorer(lambda a: svg.line_plot([0, 1], {"y": [0, a]}), title="one", a=slider(0.0, 1.0, steps=3))
    assert set(one._repr_mimebundle_()) == {"text/plain", "text/html"}  # no kernel here
    monkeypatch.setattr("posttrain.explore.core._has_kernel", lambda: True)
    bundle = one._repr_mimebundle_()
    assert bundle[WIDGET_VIEW]["model_id"] == one.widget().model_id and "<script>" in bundle["text/html"]


def test_works_without_ipywidgets():
    code = ("import sys; sys.modules['ipywidgets'] = None\n"
            "from posttrain.explore import core, svg\n"
            "core._has_kernel = lambda: True\n"
            "e = core.Explorer(lambda a: svg.bar_plot('ab', {'y': [a, 1]}), title='t', a=core.slider(0, 1, steps=2))\n"
            "assert set(e._repr_mimebundle_()) == {'text/plain', 'text/html'} and 'torch' not in sys.modules\n"
            "try: e.widget()\n"
            "except ImportError: print('fine')\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "fine", done.stderr


def test_text_cannot_break_the_page():
    nasty = "</script><b>\"'&<!--"
    page = Explorer(lambda a: svg.line_plot([0, 1], {nasty: [0, 1], a: [1, 0]}, title=nasty), title=nasty,
                    question=nasty, a=choice("x", nasty)).html()
    assert page.count("</script>") == 1 and "<b>\"" not in page and "<!--" not in page


def test_mistakes_say_what_to_do():
    draw = lambda a: svg.line_plot([0], {"y": [a]})
    for wrong, hint in [(lambda: Explorer(draw, a=0.5), "expected slider"),
                        (lambda: Explorer(draw, a=toggle()).frame(b=1), "there are: a"),
                        (lambda: Explorer(draw, a=slider(0, 1, steps=900)), "fewer steps"),
                        (lambda: slider(0, 1, log=True), "low > 0"),
                        (lambda: choice("a", value="b"), "among them")]:
        with pytest.raises(ValueError, match=re.escape(hint)):
            wrong()


def test_sliders_have_seven_stops(explorer):
    "As many where the whole numbers between both ends allow."
    for name, control in explorer.controls.items():
        if control.kind == "slider":
            whole = all(isinstance(v, int) for v in control.values)
            most = control.fine[-1] - control.fine[0] + 1 if whole else 7
            assert len(control.values) >= min(7, most), name


def test_a_picture_is_shown_where_scripts_may_not_run():
    "An image with its words for each panel; what the script makes of it is seen in the browser."
    left, right = (svg.line_plot([0, 1], {"y": [0, v]}, title=f"up to {v}") for v in (1, 2))
    shown = Picture(svg.stack(svg.beside(left, right), left))._repr_html_()
    bare = re.sub(r"<(script|style)>.*?</\1>", "", shown, flags=re.S)
    assert re.findall(r'alt="up to (\d)', bare) == ["1", "2", "1"] and "<svg" not in bare


# ---------------------------------------------------------------- what single explorers say
@pytest.mark.parametrize("beta", (0.1, 2.0))
def test_the_plane_has_the_losses_that_the_trainers_have(beta):
    x, y = torch.randn(2, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    args, start, lengths = SimpleNamespace(beta=beta), (-9.0, -12.0), (5.0, 7.0)
    sums = x + start[0], y + start[1]
    means = [v / n for v, n in zip(sums, lengths)]
    pairs = Pairs(*means, chosen_nll=-means[0])
    simpo_args = SimpleNamespace(beta=beta, loss_type="simpo", cpo_alpha=0.0,
                                 options_of=lambda loss: {"beta": beta, "simpo_gamma": 0.5})
    want = {"orpo": ORPOTrainer.answer_loss(SimpleNamespace(args=args), pairs),
            "simpo": CPOTrainer.answer_loss(SimpleNamespace(args=simpo_args), pairs)}
    for name, loss in want.items():
        torch.testing.assert_close(plane.landscape(name, x, y, beta, lengths=lengths, start=start)[0], loss)


def test_the_plane_without_a_reference_ends_where_probabilities_would_be_above_1():
    frame = plane.plane("orpo", 1.0, limits=((-2.0, 4.0), (-2.0, 4.0)), start=(-1.0, -1.0))
    check_picture(frame)
    assert frame.count("z") < plane.plane("apo_zero", 1.0, limits=((-2.0, 4.0), (-2.0, 4.0))).count("z")


def test_the_histogram_of_judged_answers_stands_on_the_axis_of_the_curves():
    explorer = judged.judged_explorer(A_RUN)
    (cost, _), (histogram, words) = rows_of(explorer.frame(zero=-8.0))
    dashed = re.compile(r'x1="([\d.]+)" x2="([\d.]+)" y1=[^>]*stroke-dasharray="3 3"')
    zeros = [dashed.findall(panel) for panel in (cost, histogram)]
    assert zeros[0] == zeros[1] and len(zeros[0]) == 1
    assert "of the liked" in words and rows_of(judged.judged_explorer().frame())[0] == rows_of(explorer.frame())[0]


# ---------------------------------------------------------------- in the lessons
ROOT = Path(__file__).resolve().parent.parent


def questions_of_lessons():
    """The places of saved explorers that ask something, each with the text that stands in the cells below."""
    for path in sorted([*ROOT.glob("nbs/**/*.ipynb"), *ROOT.glob("tutorials/*.ipynb")]):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        for i, cell in enumerate(cells):
            if cell["cell_type"] != "code" or "<b>Question.</b>" not in json.dumps(cell["outputs"]): continue
            below = [c for c in cells[i + 1:i + 3] if c["cell_type"] == "markdown"]
            yield pytest.param("".join("".join(c["source"]) for c in below), id=f"{path.stem} {i}")


@pytest.mark.parametrize("below", list(questions_of_lessons()))
def test_each_question_of_an_explorer_has_a_written_answer(below):
    """Folded, or a link to the explorer's own notebook."""
    assert "<details><summary>An answer</summary>" in below or "The answer is in [the explorer's own notebook]" in below
