"""tools/notebooks.py on small made-up projects: it lets a good notebook pass and finds each kind of damage."""
import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import exercises
import notebooks as tools
import stamps
import suite

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="  # one pixel
TEXT = """# %% [markdown]
# # Doubling

# %%
#| default_exp double

# %%
#| export
def double(x): return 2 * x

# %%
assert double(3) == 6
double(4)
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty nbdev project in which the tool thinks it lives."""
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "toy"\nversion = "0"\n[tool.nbdev]\nlib_path = "toy"\nnbs_path = "nbs"\n'
        'update_pyproject = false\nput_version_in_init = false\nallowed_metadata_keys = ["posttrain"]\n'
        'allowed_cell_metadata_keys = ["jupyter", "cellView"]\n'
        'allowed_out_metadata_keys = ["image/png"]\n')
    for folder in ("nbs", "toy", "tutorials"): (tmp_path / folder).mkdir()
    (tmp_path / "toy" / "__init__.py").touch()
    for name, value in dict(ROOT=tmp_path, NBS=tmp_path / "nbs", PACKAGE=tmp_path / "toy").items():
        monkeypatch.setattr(tools, name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(path, *cells, stamped=True):
    """A notebook, as if it had been run if `stamped`."""
    nb = new_notebook(cells=list(cells))
    if stamped: nb.metadata["posttrain"] = {"source": stamps.code_stamp(tools.code_cells(nb))}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)
    return path


def md(text): return new_markdown_cell(text)
def code(text, *outputs): return new_code_cell(text, outputs=list(outputs))
def shown(**data): return new_output("display_data", data={k.replace("_", "/"): v for k, v in data.items()})


GOOD = [md("# Doubling"), code("#| export\ndef double(x): return 2 * x"), code("assert double(3) == 6")]


def test_a_good_notebook_passes(project):
    assert tools.check_notebook(save(project / "nbs/a.ipynb", *GOOD)) == []


DAMAGE = {"the first cell must be a markdown title": [code("1"), *GOOD],
          "exported but never checked in a later cell: double": [*GOOD[:2], code("double(3)")],
          "exported but never checked in a later cell: halve": [*GOOD, code("#| export\ndef halve(x): return x / 2")],
          "exports code but asserts nothing": [md("# One"), code("#| export\nONE = 1")],
          "holds an error output": [*GOOD,
                                    code("1 / 0",
                                         new_output("error", ename="ZeroDivisionError", evalue="", traceback=[]))],
          "holds a saved widget view": [*GOOD,
                                        code("slider",
                                             new_output("display_data", data={tools.WIDGET_VIEW: {"model_id": "1"}}))],
          "is not folded": [*GOOD, code("#| hide\n1")],
          "the cell for Colab is not that of this version": [*GOOD, code("![ -e /content ] && pip install posttrain")],
          "does something on any machine": [*GOOD, code("#| eval: false\ntrainer.train()")],
          "is not clean (execution count)": [*GOOD, new_code_cell("1", execution_count=1)],
          "more than": [*GOOD, code("print(text)", new_output("stream", text="x" * 1024 * (tools.MAX_OUTPUT_KB + 1)))]}


@pytest.mark.parametrize("said", DAMAGE)
def test_damage_is_found(project, said):
    found = tools.check_notebook(save(project / "nbs/a.ipynb", *DAMAGE[said]))
    assert any(said in f for f in found), found


def test_what_is_hidden_is_folded_when_it_is_written(project):
    path = save(project / "nbs/a.ipynb", *GOOD, code("#| hide\n1"))
    tools.write(tools.read(path), path)
    assert tools.read(path).cells[-1].metadata == {"cellView": "form", "jupyter": {"source_hidden": True}}
    assert not any("folded" in found for found in tools.check_notebook(path))


FIG_ALT = "The loss of a run against the step: it falls, quickly at first, and then stays where it is."


def test_a_directive_says_what_is_folded(project):
    drawn = code("#| code-fold: true\nax.plot(x)")
    assert any("not folded" in found for found in tools.cells.wrong_cells([drawn]))
    tools.write(tools.read(save(project / "nbs/a.ipynb", *GOOD, drawn)), project / "nbs/a.ipynb")
    written = tools.read(project / "nbs/a.ipynb").cells[-1]
    assert written.metadata == {"cellView": "form", "jupyter": {"source_hidden": True}}
    assert tools.cells.wrong_cells([written]) == []
    written.source = "ax.plot(x)"  # folded, and nothing says so
    assert any("is folded, but" in found for found in tools.cells.wrong_cells([written]))


@pytest.mark.parametrize("source, kind, said", [
    ("plot()", "image_png", "has no text"), ("#| fig-alt: \"A plot.\"\nplot()", "image_png", "has 7 letters"),
    (f"#| fig-alt: \"{FIG_ALT}\"\nplot()", "image_png", "saved without its #| fig-alt"),
    (f"#| fig-alt: \"{FIG_ALT}\"\nplot()", "image_svg+xml", "display posttrain.explore.svg.Picture"),
    ("plot()", "text_html", "no alt text")])
def test_a_picture_says_what_it_shows(source, kind, said):
    picture = code(source, shown(**{kind: "<img src='data:image/png;base64,AA'>" if kind == "text_html" else PNG}))
    assert any(said in found for found in tools.cells.wrong_cells([picture])), tools.cells.wrong_cells([picture])


def test_the_text_of_a_picture_reaches_a_reader(project):
    "Written beside the picture, kept by nbdev's cleaner, and read by nbconvert."
    from nbconvert import HTMLExporter
    path = save(project / "nbs/a.ipynb", *GOOD, code(f'#| fig-alt: "{FIG_ALT}"\nplot()', shown(image_png=PNG)))
    tools.write(tools.read(path), path)
    nb = tools.read(path)
    assert nb.cells[-1].outputs[0].metadata == {"image/png": {"alt": FIG_ALT}}
    assert tools.cells.wrong_cells(nb.cells[-1:]) == []
    page, _ = HTMLExporter(template_name="classic").from_notebook_node(nb)
    assert f'alt="{FIG_ALT}"' in page


def test_an_assert_that_is_never_run_is_no_check(project):
    skipped = code("#| eval: false\nassert double(3) == 6")
    assert any("never checked" in f for f in tools.check_notebook(save(project / "nbs/a.ipynb", *GOOD[:2], skipped)))
    before = [GOOD[0], GOOD[2], GOOD[1]]
    assert any("never checked" in f for f in tools.check_notebook(save(project / "nbs/a.ipynb", *before)))


def test_edited_after_its_run(project):
    path = save(project / "nbs/a.ipynb", *GOOD)
    nb = tools.read(path)
    nb.cells[0].source += "\n\nOnly words changed."
    nbformat.write(nb, path)
    assert tools.check_notebook(path) == []
    nb.cells[2].source = "assert double(3) == 6.0"
    nbformat.write(nb, path)
    assert any("edited after its last run" in f for f in tools.check_notebook(path))
    assert any("edited after its last run" in f
               for f in tools.check_notebook(save(project / "nbs/b.ipynb", *GOOD, stamped=False)))


def exercise(n):
    """The cells of an exercise: task, checker, open cell, solution, proof."""
    return [md(f"**{n}. Derive it.** How much is two and {n}?"),
            code(f'#| hide\n@checker\ndef check_{n}(answer): assert answer == 2 + {n}, "count on your fingers"'),
            code(f"answer = ...\ncheck_{n}(answer)", shown(text_plain="'not answered yet'")),
            md(f"<details><summary>Solution</summary>\n\n{2 + n}\n</details>"),
            code(f'#| hide\nassert check_{n}({2 + n}) == "right" and refused(check_{n}(0))')]


def lesson(*parts):
    """`## Exercises` with these cells, between two other headings, all folded as they are when they are written."""
    cells = [md("# A lesson"), md("## The idea"), md(f"## Exercises\n\n{exercises.INTRODUCTION}"),
             *(cell for part in parts for cell in part), md("## Further reading")]
    for cell in filter(tools.cells.is_unfolded, cells): tools.cells.fold(cell)
    return cells


def paper(*headings):
    cells = []
    for heading in headings:
        cells += lesson(*map(exercise, (1, 2, 3)))[2:-1] if heading == "Exercises" else [md(f"## {heading}")]
    return [md("# A paper"), *cells, *GOOD[1:], code("1", new_output("stream", text="1"))]


def test_headings(project):
    path = project / "nbs/offline/01_paper.ipynb"
    assert tools.check_notebook(save(path, *paper(*tools.PAPER))) == []
    assert tools.check_notebook(save(path, *paper(*tools.PAPER[:5], "An aside", *tools.PAPER[5:]))) == []
    assert tools.check_notebook(save(path, *paper(*tools.PAPER[1:]))) == ["missing headings: Quick facts"]
    assert "out of order" in tools.check_notebook(save(path, *paper(*reversed(tools.PAPER))))[0]
    in_code = paper(*tools.PAPER[1:])
    in_code.insert(1, md("```\n## Quick facts\n```"))
    assert tools.check_notebook(save(path, *in_code)) == ["missing headings: Quick facts"]
    without = [cell for cell in paper(*tools.PAPER) if not cell.get("outputs")]
    assert "no outputs: run it" in tools.check_notebook(save(path, *without))
    lesson = project / "nbs/foundations/01_lesson.ipynb"
    assert tools.check_notebook(save(lesson, *paper(*tools.LESSON))) == []
    assert tools.check_notebook(save(lesson, *paper(*tools.PAPER))) == ["missing headings: The code"]
    short = project / "nbs/offline/14_kto_trainer.ipynb"
    assert tools.check_notebook(save(short, *paper(*tools.TRAINER))) == []
    assert tools.check_notebook(save(short, *paper(*tools.TRAINER[1:]))) == ["missing headings: Quick facts"]
    by_badge = paper(*tools.LESSON)
    by_badge[0] = md("# A paper in another room\n\n[paper](https://example.org)")
    assert "The loss" in tools.check_notebook(save(project / "nbs/data/01_paper.ipynb", *by_badge))[0]


def test_good_exercises_pass(project):
    assert tools.check_notebook(save(project / "tutorials/a.ipynb", *lesson(*map(exercise, (1, 2, 3, 4))))) == []
    assert exercises.wrong_exercises(GOOD) == []  # a notebook may have none


def small_lesson(*numbers, heading="## Exercise", introduction=None):
    cells = lesson(*map(exercise, numbers))
    cells[2] = md(f"{heading}\n\n{introduction or exercises.INTRODUCTION_OF_ONE}")
    return cells


def test_a_small_lesson_has_one_exercise_of_the_same_kind(project):
    path = project / "nbs/data/01_a.ipynb"
    def found(*numbers, **text): return "\n".join(exercises.wrong_exercises(small_lesson(*numbers, **text)))
    assert tools.check_notebook(save(path, *small_lesson(1))) == []
    assert "has 2 exercises, expected one" in found(1, 2) and "has 0 exercises" in found()
    assert "must begin with the sentences" in found(1, introduction=exercises.INTRODUCTION)
    assert "has 1 exercises, a lesson has at least 3" in found(1, heading="## Exercise: find the bug")
    no_open_cell = [cell for cell in small_lesson(1) if not cell.source.startswith("answer = ")]
    assert "exercise 1 has no open cell" in "\n".join(exercises.wrong_exercises(no_open_cell))


def damaged(place, old, new):
    """Three exercises; in the second, `old` became `new` in the cell at this place."""
    parts = [exercise(n) for n in (1, 2, 3)]
    cell = parts[1][place]
    assert old in cell.source
    cell.source = cell.source.replace(old, new)
    return parts


def answered():
    parts = [exercise(n) for n in (1, 2, 3)]
    parts[1][2] = code("check_2(4)", shown(text_plain="'right'"))
    return parts


TASK, CHECKER, OPEN, SOLUTION, PROOF = range(5)
FAULTS = {"has 2 exercises, a lesson has at least 3": lambda: [exercise(1), exercise(2)],
          "numbered [1, 3, 3]": lambda: damaged(TASK, "2.", "3."),
          "exercise 2 has no checker": lambda: damaged(CHECKER, "def check_2", "def check"),
          "check_2 lacks `@checker`": lambda: damaged(CHECKER, "@checker\n", ""),
          "check_2 has an assert without a message": lambda: damaged(CHECKER, ', "count on your fingers"', ""),
          "check_2 stands open": lambda: damaged(CHECKER, "#| hide\n", ""),
          "exercise 2 has no open cell that calls check_2": lambda: damaged(
              OPEN, "answer = ", "#| hide\nanswer = "),
          "exercise 2 has no folded cell that asserts": lambda: damaged(PROOF, " and refused(check_2(0))", ""),
          "must come as checker, open cell, solution, proof": lambda: [
              exercise(1), [exercise(2)[i] for i in (TASK, OPEN, CHECKER, SOLUTION, PROOF)], exercise(3)],
          "exercise 2 has no `<details><summary>Solution": lambda: damaged(SOLUTION, "Solution", "Hint"),
          "use answer from an open cell": lambda: damaged(PROOF, "check_2(4)", "check_2(answer)"),
          "exercise 2 is answered already": answered}


@pytest.mark.parametrize("said", FAULTS)
def test_faults_of_exercises_are_found(project, said):
    found = tools.check_notebook(save(project / "tutorials/a.ipynb", *lesson(*FAULTS[said]())))
    assert any(said in f for f in found), found


def test_a_notebook_of_a_trainer_builds_its_loss_from_blank(project):
    path, parts = project / "nbs/offline/01_sft.ipynb", [exercise(n) for n in (1, 2, 3)]
    assert any("Build it" in f for f in tools.check_notebook(save(path, *lesson(*parts))))
    parts[2][0].source = "**3. Build it.** How much is two and three?"
    assert not any("Build it" in f for f in tools.check_notebook(save(path, *lesson(*parts))))


def test_the_protocol_is_told_where_exercises_begin(project):
    cells = lesson(*map(exercise, (1, 2, 3)))
    cells[2] = md("## Exercises")
    assert "must begin with the sentences" in tools.check_notebook(save(project / "tutorials/a.ipynb", *cells))[0]


def test_build_run_and_text_go_round(project):
    text = project / "nbs/01_double.py"
    text.write_text(TEXT)
    tools.build(text)
    notebook = text.with_suffix(".ipynb")
    assert "def double" in (project / "toy/double.py").read_text()
    assert any("edited after its last run" in f for f in tools.check_notebook(notebook))
    tools.run(notebook)
    assert tools.check_notebook(notebook) == []
    assert tools.read(notebook).cells[-1].outputs[0].data["text/plain"] == "8"
    first = notebook.read_bytes()
    tools.to_text(notebook), tools.build(text)
    assert notebook.read_bytes() == first, "text and back changes nothing, and keeps outputs"
    tools.run(notebook)
    assert notebook.read_bytes() == first, "a second run changes nothing"


def test_a_cell_that_did_not_change_keeps_id_and_outputs(project):
    text = project / "nbs/01_double.py"
    text.write_text(TEXT + "\n# %%\ndouble(5)\n\n# %%\ndouble(5)\n")
    tools.build(text), tools.run(text.with_suffix(".ipynb"))
    before = tools.read(text.with_suffix(".ipynb")).cells
    # A cell of the text `double(5)` stands there twice already.
    more = "# %%\ndouble(5)\n\n# %% [markdown]\n# Checks\n\n# %%\nassert"
    text.write_text(text.read_text().replace("# %%\nassert", more))
    tools.build(text)
    after = tools.read(text.with_suffix(".ipynb")).cells
    assert len(after) == len(before) + 2 and len({c.id for c in after}) == len(after)
    assert {c.id for c in before} < {c.id for c in after}
    assert after[-3].id == before[-3].id and after[-3].outputs == before[-3].outputs != []


def test_modules_out_of_sync(project):
    text = project / "nbs/01_double.py"
    text.write_text(TEXT)
    tools.build(text)
    tools.subprocess.run([tools.tool("nbdev-export")], check=True, cwd=project)
    assert tools.check_sync() == []
    module = project / "toy/double.py"
    good = module.read_text()
    module.write_text(good.replace("2 * x", "3 * x"))
    assert tools.check_sync() == [
        "toy/double.py: not in sync with its notebook, run `python tools/notebooks.py export`"]
    assert "3 * x" in module.read_text(), "a check must not repair"
    module.write_text(good)
    stale = project / "toy/triple.py"
    stale.write_text(good.replace("double", "triple"))
    assert tools.check_sync() == ["toy/triple.py: stale, no notebook exports it"]
    stale.unlink(), module.unlink()
    assert tools.check_sync() == [
        "toy/double.py: not in sync with its notebook, run `python tools/notebooks.py export`"] and not module.exists()


def test_a_failing_assert_fails_the_test_run(project, capsys):
    good = save(project / "nbs/a.ipynb", *GOOD)
    wrong = save(project / "nbs/b.ipynb", *GOOD, code("assert double(1) == 3"))
    skipped = save(project / "nbs/c.ipynb", *GOOD, code("#| eval: false\nassert False"))
    before = wrong.read_bytes()
    assert tools.execute_all([good, wrong, skipped], workers=1, stale=False, keep=False) == 1
    said = capsys.readouterr().out
    assert "FAIL nbs/b.ipynb" in said and "AssertionError" in said and "2 passed, 1 failed" in said
    assert wrong.read_bytes() == before


def test_tidy_outputs():
    view = {tools.WIDGET_VIEW: {"model_id": "1"}, "text/plain": "Box()"}
    nb = new_notebook(
        cells=[code("x", new_output("stream", name="stderr", text="a warning"), new_output("stream", text="kept"),
                    new_output("stream", text=" as one"),
                    new_output("display_data", data=dict(view)),
                    new_output("display_data", data={**view, "text/html": "<svg/>"}))], metadata={"widgets": {}})
    tools.tidy_outputs(nb)
    stream, picture = nb.cells[0].outputs
    assert stream.text == "kept as one" and picture.data == {"text/plain": "Box()", "text/html": "<svg/>"}
    assert "widgets" not in nb.metadata and tools.is_as_run(nb)


def test_readme(project):
    (project / "nbs/rooms").mkdir()
    index = project / "nbs/index.ipynb"
    save(index, md("# Toy\n\n[a room](rooms/a.ipynb), [how](../HOW.md#there), [out](https://example.org/b)"),
         code("#| hide\nsecret = 1", new_output("stream", text="hidden")),
         code("answer = 42\nprint(answer)", new_output("stream", text="42\n"), new_output("stream", text="43\n")),
         code("#| echo: false\n#| fig-alt: a dot\ndraw()", shown(image_png=PNG, text_plain="<Figure>")),
         code("#| echo: false\ntable()", shown(text_markdown="| [a](rooms/a.ipynb) |")),
         code("#| echo: false\nlive()", shown(text_html="<b>", text_plain="<HTML object>")),
         code("#| echo: false\nPicture()", shown(text_html="".join(
             f'<img alt="{words}" src="data:image/svg+xml;base64,PHN2Zy8+">' for words in ("one &amp; a", "two")))))
    missing = {f.split(":")[0] for f in tools.readme(check_only=True)}
    assert missing == {"README.md", *(f"nbs/images/index-{name}" for name in ("0.png", "1.svg", "2.svg"))}
    assert not (project / "README.md").exists(), "a check must not write"
    tools.readme()
    text = (project / "README.md").read_text()
    assert "[a room](nbs/rooms/a.ipynb), [how](HOW.md#there), [out](https://example.org/b)" in text
    assert "| [a](nbs/rooms/a.ipynb) |" in text
    assert "```python\nanswer = 42\nprint(answer)\n```\n\n```\n42\n43\n```" in text
    assert "![a dot](nbs/images/index-0.png)" in text
    assert "![one & a](nbs/images/index-1.svg)\n![two](nbs/images/index-2.svg)" in text
    assert (project / "nbs/images/index-2.svg").read_text() == "<svg/>"
    assert not any(word in text for word in ("secret", "hidden", "draw()", "table()", "HTML object", "Figure>"))
    assert tools.readme(check_only=True) == []

    (project / "README.md").write_text(text + "by hand\n")
    assert tools.readme(check_only=True)[0].startswith("README.md: not made from nbs/index.ipynb")
    tools.readme()
    (project / "nbs/images/index-7.png").write_bytes(b"old")
    assert tools.readme(check_only=True) == ["nbs/images/index-7.png: left over, nbs/index.ipynb draws no such picture"]
    tools.readme()
    assert tools.readme(check_only=True) == [] and not (project / "nbs/images/index-7.png").exists()
    index.unlink()
    assert tools.readme(check_only=True) == ["nbs/index.ipynb is missing"]


def test_broken_links(project):
    save(project / "nbs/a.ipynb",
         md("# A\n\n[b](room/b.ipynb) [up](../HOW.md#x) [out](https://example.org) [here](#x) $f[x](y)$ " "`d[0](1)`"),
         code("t()", shown(text_markdown="[gone](gone.ipynb)")))
    save(project / "nbs/room/b.ipynb", md("# B\n\n![p](p.png) <img src='q.png'>"))
    (project / "HOW.md").write_text("[a](nbs/a.ipynb) [planned](nbs/later.ipynb)\n```\n[code](none.md)\n```\n")
    assert tools.broken_links() == [
        "HOW.md: links to nbs/later.ipynb, which is not there", "nbs/a.ipynb: links to gone.ipynb, which is not there",
        "nbs/room/b.ipynb: links to p.png, which is not there", "nbs/room/b.ipynb: links to q.png, which is not there"]


def test_check_fails_as_a_command(project, capsys, monkeypatch):
    save(project / "nbs/index.ipynb", md("# Toy"))
    tools.readme()
    monkeypatch.setattr("sys.argv", ["notebooks.py", "check", "--no-sync"])
    assert tools.main() == 0 and "agree" in capsys.readouterr().out
    save(project / "nbs/a.ipynb", *DAMAGE["holds an error output"])
    assert tools.main() == 1 and "nbs/a.ipynb: code cell 2 holds an error output" in capsys.readouterr().out


# ---------------------------------------------------------------- stamps
BASE = "from toy.low import twice\n\n\ndef four(x):\n    return twice(twice(x))\n"
USES = [md("# Uses"), code("from toy.high import four\nassert four(1) == 4")]


@pytest.fixture
def package(project):
    """toy.high imports toy.low inside a function; toy.other is imported by nobody; toy.Public leads to toy.high."""
    files = {"low": "def twice(x): return 2 * x\n", "other": "def half(x): return x / 2\n",
             "high": "def four(x):\n    from .low import twice\n    return twice(twice(x))\n",
             "__init__": '_HOMES = {"Public": "high", "Half": "other"}\n\n\ndef __getattr__(name): ...\n'}
    for name, text in files.items():
        (project / f"toy/{name}.py").write_text(text)
    (project / "constraints.txt").write_text("torch==1.0\n")
    return project


def stamp_of(path):
    return stamps.Dependencies(tools.ROOT, tools.PACKAGE).stamp(path, tools.code_cells(tools.read(path)))


def append(path, text):
    path.write_text(path.read_text() + text)


def changes(path, file, text):
    """Whether the stamp of the notebook `path` changes when `text` is written at the end of `file`."""
    before = stamp_of(path)
    append(file, text)
    return stamp_of(path) != before


def test_stamp_covers_what_is_imported_at_any_depth(package):
    path = save(package / "nbs/a.ipynb", *USES)
    assert changes(path, package / "toy/low.py", "def thrice(x): return 3 * x\n")
    assert changes(path, package / "toy/high.py", "EIGHT = 8\n")
    assert changes(path, package / "toy/__init__.py", "def __dir__(): return []\n")
    assert not changes(path, package / "toy/other.py", "THIRD = 1 / 3\n")


def test_stamp_covers_versions(package, monkeypatch):
    path = save(package / "nbs/a.ipynb", *USES)
    assert changes(path, package / "constraints.txt", "numpy==2.0\n")
    before = stamp_of(path)
    monkeypatch.setattr(stamps.sys, "version_info", type("Version", (), {"major": 3, "minor": 99}))
    assert stamp_of(path) != before


def test_comments_and_line_breaks_do_not_count(package):
    path = save(package / "nbs/a.ipynb", *USES)
    before, run_with = stamp_of(path), tools.read(path)
    low = package / "toy/low.py"
    low.write_text("# A comment.\ndef twice(\n    x,  # a number\n):\n    return 2 * x\n")
    run_with.cells[1].source = "from toy.high import (\n    four,\n)\n# one\nassert four(1) == 4  # 2 * 2"
    nbformat.write(run_with, path)
    assert stamp_of(path) == before
    assert tools.is_as_run(run_with), "check, too, looks at the code alone"
    run_with.cells[1].source = "#| eval: false\n" + run_with.cells[1].source
    nbformat.write(run_with, path)
    assert stamp_of(path) != before, "a directive says what is run"


def test_who_reads_sources_depends_on_their_text(package):
    reads = code("import inspect\nfrom toy.high import four\nprint(inspect.getsource(four))")
    path = save(package / "nbs/a.ipynb", md("# Reads"), reads)
    assert changes(path, package / "toy/high.py", "# a comment\n")
    assert not changes(path, package / "toy/low.py", "# what it shows is of toy.high\n")
    nb = tools.read(path)
    nb.cells[1].source += "  # a comment"
    assert not tools.is_as_run(nb)


SHOWS = {"comments": "inspect.getcomments(four)", "a file": "open(inspect.sys.modules[four.__module__].__file__)",
         "line numbers": "four.__code__.co_firstlineno", "help": "four??", "help, put first": "??four",
         "a magic": "%psource four"}


@pytest.mark.parametrize("what", SHOWS)
def test_what_else_shows_sources(package, what):
    reads = code(f"import inspect\nfrom toy.high import four\n{SHOWS[what]}")
    path = save(package / "nbs/a.ipynb", md("# Reads"), reads)
    assert changes(path, package / "toy/high.py", "# a comment\n")
    assert not changes(path, package / "toy/other.py", "THIRD = 1 / 3\n")


def test_a_semicolon_that_hides_the_output_counts():
    shown, hidden, other = (stamps.code_stamp([cell]) for cell in ("f(x)  # a;", "f(x);  # a", "f(x) ;\n# b\n"))
    assert shown != hidden == other and shown == stamps.code_stamp(["f(x)"])


def test_a_module_that_reads_sources_depends_on_their_text(package):
    reads = "import inspect\nfrom . import low\nTEXT = inspect.getsource(low)\n"
    (package / "toy/reads.py").write_text(reads)
    path = save(package / "nbs/a.ipynb", md("# Uses"), code("from toy.reads import TEXT"))
    assert changes(path, package / "toy/low.py", "# a comment\n")


EVERYTHING = {
    "a program that it starts": "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import toy.other'])",
    "a line of the shell": "!python -m toy.other",
    "a cell of the shell": "%%bash\npython -m toy.other",
    "a name that is put together": "from importlib import import_module\nimport_module('toy.' + name)",
    "the package handed on": "import toy\ngetattr(toy, name)",
    "all public names": "import toy\ntoy.__all__",
    "a star": "from toy import *\nHalf",
    "code as text": "exec('from toy.other import half')",
    "a module that it runs": "import runpy\nrunpy.run_module(name)",
    "a command": "import os\nos.system('python -m toy.other')",
    "processes of its own": "from multiprocessing import Process\nProcess(target=f).start()",
}


@pytest.mark.parametrize("how", EVERYTHING)
def test_what_may_import_anything_depends_on_everything(package, how):
    path = save(package / "nbs/a.ipynb", md("# Anything"), code(EVERYTHING[how]))
    assert changes(path, package / "toy/other.py", "THIRD = 1 / 3\n")


ONE_MODULE = {
    "a public name": "from toy import Public",
    "an attribute of the package": "import toy\ntoy.Public",
    "a module as an attribute": "import toy.high\ntoy.high.four(1)",
    "a name in a call": "from importlib import import_module\nimport_module('toy.high')",
    "beside a line of the shell": "![ -e /content ] && pip install -q toy\nfrom toy.high import four",
    "inside a function": "def f():\n    from toy import high\n    return high.four(1)",
}


@pytest.mark.parametrize("how", ONE_MODULE)
def test_which_module_is_imported(package, how):
    path = save(package / "nbs/a.ipynb", md("# One"), code(ONE_MODULE[how]))
    assert changes(path, package / "toy/low.py", "TWO = 2\n")
    assert not changes(path, package / "toy/other.py", "THIRD = 1 / 3\n")


ROOM = {
    "a room": "from toy import room\nroom.deep.X",
    "by another name": "import toy.room as r\nr.deep.X",
    "from the package": "import toy.room\nr = toy.room\nr.deep.X",
    "a name in text": "from toy import room\ngetattr(room, 'deep')",
    "a star": "from toy.room import *\ndeep.X",
    "in a module": "from toy.side import Y",
}


@pytest.mark.parametrize("how", ROOM)
def test_who_holds_a_room_depends_on_its_modules(package, how):
    (package / "toy/room").mkdir()
    files = {"room/__init__": "", "room/deep": "X = 1\n", "side": "from . import room\nY = room.deep.X\n"}
    for name, text in files.items():
        (package / f"toy/{name}.py").write_text(text)
    path = save(package / "nbs/a.ipynb", md("# Room"), code(ROOM[how]))
    assert changes(path, package / "toy/room/deep.py", "Z = 1\n")
    assert not changes(path, package / "toy/other.py", "THIRD = 1 / 3\n")
    one_module = code("from toy.room.deep import X\nimport toy.room.deep\ntoy.room.deep.X")
    one = save(package / "nbs/b.ipynb", md("# One"), one_module)
    (package / "toy/room/more.py").write_text("")
    assert not changes(one, package / "toy/room/more.py", "Z = 1\n"), "a module of a room is not the room"


def test_a_new_public_name_concerns_only_those_who_use_it(package):
    path = save(package / "nbs/a.ipynb", md("# One"), code("from toy import Public"))
    before = stamp_of(path)
    init = package / "toy/__init__.py"
    init.write_text(init.read_text().replace('"Half"', '"Third": "other", "Half"'))
    assert stamp_of(path) == before
    init.write_text(init.read_text().replace('"Public": "high"', '"Public": "other"'))
    assert stamp_of(path) != before


def test_a_notebook_depends_on_its_cells_and_not_on_the_module_that_it_exports(package):
    cells = [md("# High"), code("#| default_exp high"), code("#| export\nfrom toy.low import twice"), code("twice(2)")]
    path = save(package / "nbs/high.ipynb", *cells)
    assert not changes(path, package / "toy/high.py", "EIGHT = 8\n")
    assert changes(path, package / "toy/low.py", "TWO = 2\n")


def test_files_that_a_notebook_reads(package):
    path = save(package / "nbs/a.ipynb", md("# Reads"), code("#| reads: ../data/*.csv room/*.ipynb\n1"))
    before = stamp_of(path)
    (package / "data").mkdir()
    (package / "data/a.csv").write_text("1")
    assert stamp_of(path) != before
    other = save(package / "nbs/room/b.ipynb", md("# B"), code("1"))
    before = stamp_of(path)
    save(other, md("# B"), code("2"))
    assert stamp_of(path) == before, "of a notebook the prose is read"
    save(other, md("# C"), code("2"))
    assert stamp_of(path) != before


def test_stamps_of_all_notebooks_are_made_quickly():
    notebooks = {path: tools.code_cells(tools.read(path)) for path in tools.all_notebooks()}
    start = tools.time.process_time()
    dependencies = stamps.Dependencies(tools.ROOT, tools.PACKAGE)
    assert all(dependencies.stamp(path, cells) for path, cells in notebooks.items())
    # 3 s of one busy core for 68 notebooks; most of it is Python's parser.
    assert tools.time.process_time() - start < .2 * len(notebooks)


# ---------------------------------------------------------------- which notebooks run
def execute(keep, stale=True):
    return tools.execute_all(tools.all_notebooks(), workers=2, stale=stale, keep=keep)


def quick_run(monkeypatch, wrong=()):
    """Executing takes no time and fails for the notebooks in `wrong`. Returns the list of what was executed."""
    ran = []
    def executes(nb, cwd):
        name = nb.cells[0].source.removeprefix("# ")
        ran.append(name)
        assert name not in wrong, "an assert of the notebook"
    monkeypatch.setattr(tools, "execute", executes)
    monkeypatch.setattr(tools, "write", lambda nb, path: nbformat.write(nb, path))
    return ran


def test_a_true_stamp_is_trusted_and_a_tenth_runs_anyway(package, monkeypatch, capsys):
    names = [f"n{i:02}" for i in range(20)]
    for name in names:
        save(package / f"nbs/{name}.ipynb", md(f"# {name}"),
             code(f"from toy.{'low' if name < 'n05' else 'other'} import *"))
    ran = quick_run(monkeypatch)
    monkeypatch.setattr(stamps, "turn", lambda root: 7)
    assert execute(keep=True) == 0 and sorted(ran) == names
    ran.clear()
    assert execute(keep=True) == 0 and ran == [], "run --stale has nothing to do"
    assert execute(keep=False) == 0 and sorted(ran) == ["n07", "n17"]
    output = capsys.readouterr().out
    assert "this turn's tenth: nbs/n07.ipynb, nbs/n17.ipynb" in output
    assert "18 taken from their stamps" in output
    ran.clear()
    append(package / "toy/low.py", "TWO = 2\n")
    assert execute(keep=False) == 0 and sorted(ran) == ["n00", "n01", "n02", "n03", "n04", "n07", "n17"]
    ran.clear()
    assert execute(keep=False, stale=False) == 0 and sorted(ran) == names


def test_ten_turns_run_every_notebook_once():
    names = [f"n{i}" for i in range(68)]
    picked = [stamps.tenth(names, turn) for turn in range(31, 41)]
    assert set().union(*picked) == set(names) and sum(map(len, picked)) == len(names)
    assert max(map(len, picked)) <= 7


def test_the_turn_counts_commits_and_days_where_there_is_no_history(package, monkeypatch):
    day = stamps.date.today().toordinal()
    assert stamps.turn(package) in (day, day + 1), "no git"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "-q"], cwd=package, check=True)
    for n in (1, 2):
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "one"], cwd=package, check=True)
        assert stamps.turn(package) == n


def test_a_notebook_that_failed_loses_its_stamp(package, monkeypatch):
    for name in ("a", "b"):
        save(package / f"nbs/{name}.ipynb", md(f"# {name}"), code("1"))
    monkeypatch.setattr(stamps, "turn", lambda root: 0)
    quick_run(monkeypatch)
    assert execute(keep=True) == 0
    quick_run(monkeypatch, wrong={"a"})
    assert execute(keep=False) == 1, "the tenth of this turn"
    monkeypatch.setattr(stamps, "turn", lambda root: 5)
    ran = quick_run(monkeypatch, wrong={"a"})
    assert execute(keep=False) == 1 and ran == ["a"], "it runs until it passes"
    assert execute(keep=True) == 1 and "nbs/a.ipynb" not in stamps.read_records(tools.records_file())
    quick_run(monkeypatch)
    assert execute(keep=True) == 0 and execute(keep=False) == 0


def test_check_does_not_mind_a_changed_import(package):
    path = save(package / "nbs/a.ipynb", *USES)
    append(package / "toy/low.py", "TWO = 2\n")
    assert tools.check_notebook(path) == []


def test_records(tmp_path):
    file = tmp_path / "stamps.txt"
    file.write_text("# head\na.ipynb 11 3.5\n<<<<<<< ours\na.ipynb 22 4\n")
    records = stamps.read_records(file)
    assert records == {"a.ipynb": stamps.Record({"11", "22"}, 4.0)}, "after a merge the runs of both sides count"
    stamps.write_records(file, records)
    assert stamps.read_records(file) == records
    assert stamps.rounded(3.0, 4.0) == 4.0 and stamps.rounded(9.04, 4.0) == 9.0 and stamps.rounded(3.04, None) == 3.0


def test_the_slowest_start_first(package, monkeypatch):
    paths = [save(package / f"nbs/{name}.ipynb", md(f"# {name}")) for name in "abc"]
    seconds = {"nbs/a.ipynb": 3.0, "nbs/c.ipynb": 9.0}
    stamps.write_records(tools.records_file(), {name: stamps.Record({"0"}, s) for name, s in seconds.items()})
    assert [p.stem for p in tools.slowest_first(paths)] == ["b", "c", "a"], "a new one may be long"


# ---------------------------------------------------------------- the report of the suite
JUNIT = """<testsuites><testsuite><testcase classname="tests.test_a" name="test_long" time="12.5"/>
<testcase classname="tests.test_a" name="test_short" time="0.1"><failure message="no"/></testcase>
<testcase classname="tests.test_b" name="test_c" time="0"><skipped message="GSM8K is not here"/></testcase>
</testsuite></testsuites>"""


def test_the_report_tells_what_was_run_and_what_was_slow(tmp_path):
    (tmp_path / "tests.xml").write_text(JUNIT)
    part = suite.tests_part(tmp_path / "tests.xml")
    assert part.failed == ["test_a::test_short"] and list(part.ran) == ["test_a::test_long", "test_a::test_short"]
    text = "\n".join(suite.describe("tests", part))
    assert "tests: 2 run, 1 left out, 1 failed" in text and "FAILED test_a::test_short" in text
    assert "1 left out, GSM8K is not here: test_b::test_c" in text and "12.5 s  test_a::test_long" in text
    result = {"run": [{"name": "a.ipynb", "seconds": 3, "error": "", "stamp": "1"}], "picked": [],
              "stamped": ["b.ipynb"]}
    (tmp_path / "notebooks.json").write_text(json.dumps(result))
    text = "\n".join(suite.describe("notebooks", suite.notebooks_part(tmp_path / "notebooks.json")))
    assert "notebooks: 1 run, 1 left out, 0 failed" in text and "1 left out, its stamp is true: b.ipynb" in text


@pytest.mark.parametrize("failing, status", [("nothing", 0), ("check", 1), ("test", 1), ("pytest", 1)])
def test_a_part_that_fails_fails_the_suite(tmp_path, monkeypatch, capsys, failing, status):
    ran = []
    def pretend(command, **kw):
        part = next(p for p in ("check", "test", "pytest") if p in command)
        ran.append(part)
        return subprocess.CompletedProcess(command, int(part == failing))
    monkeypatch.setattr(suite.subprocess, "run", pretend)
    assert suite.run_suite(False, tmp_path) == status
    assert ran == (["check"] if failing == "check" else ["check", "test", "pytest"])
    if failing != "check":
        assert ("FAILED" if status else "passed in") in capsys.readouterr().out
