"""tools/notebooks.py on small made-up projects: it lets a good notebook pass and finds each kind of damage."""
import importlib.util
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

spec = importlib.util.spec_from_file_location("notebooks", Path(__file__).parent.parent / "tools" / "notebooks.py")
tools = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tools)

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
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "toy"\nversion = "0"\n[tool.nbdev]\nlib_path = "toy"\nnbs_path = "nbs"\nupdate_pyproject = false\nput_version_in_init = false\nallowed_metadata_keys = ["posttrain"]\n')
    for folder in ("nbs", "toy", "tutorials"): (tmp_path / folder).mkdir()
    (tmp_path / "toy" / "__init__.py").touch()
    for name, value in dict(ROOT=tmp_path, NBS=tmp_path / "nbs", PACKAGE=tmp_path / "toy").items(): monkeypatch.setattr(tools, name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(path, *cells, stamped=True):
    """A notebook, as if it had been run if `stamped`."""
    nb = new_notebook(cells=list(cells))
    if stamped: nb.metadata["posttrain"] = {"source": tools.stamp(nb)}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)
    return path


def md(text): return new_markdown_cell(text)
def code(text, *outputs): return new_code_cell(text, outputs=list(outputs))
def shown(**data): return new_output("display_data", data={k.replace("_", "/"): v for k, v in data.items()})


GOOD = [md("# Doubling"), code("#| export\ndef double(x): return 2 * x"), code("assert double(3) == 6")]


def test_a_good_notebook_passes(project):
    assert tools.check_notebook(save(project / "nbs/a.ipynb", *GOOD)) == []


DAMAGE = {
    "the first cell must be a markdown title": [code("1"), *GOOD],
    "exported but never checked in a later cell: double": [*GOOD[:2], code("double(3)")],
    "exported but never checked in a later cell: halve": [*GOOD, code("#| export\ndef halve(x): return x / 2")],
    "exports code but asserts nothing": [md("# One"), code("#| export\nONE = 1")],
    "holds an error output": [*GOOD, code("1 / 0", new_output("error", ename="ZeroDivisionError", evalue="", traceback=[]))],
    "holds a saved widget view": [*GOOD, code("slider", new_output("display_data", data={tools.WIDGET_VIEW: {"model_id": "1"}}))],
    "is not clean (execution count)": [*GOOD, new_code_cell("1", execution_count=1)],
    "more than": [*GOOD, code("print(text)", new_output("stream", text="x" * 1024 * (tools.MAX_OUTPUT_KB + 1)))],
}


@pytest.mark.parametrize("said", DAMAGE)
def test_damage_is_found(project, said):
    found = tools.check_notebook(save(project / "nbs/a.ipynb", *DAMAGE[said]))
    assert any(said in f for f in found), found


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
    assert any("edited after its last run" in f for f in tools.check_notebook(save(project / "nbs/b.ipynb", *GOOD, stamped=False)))


def paper(*headings):
    return [md("# A paper"), *(md(f"## {h}") for h in headings), *GOOD[1:], code("1", new_output("stream", text="1"))]


def test_headings(project):
    path = project / "nbs/offline/01_paper.ipynb"
    assert tools.check_notebook(save(path, *paper(*tools.PAPER))) == []
    assert tools.check_notebook(save(path, *paper(*tools.PAPER[:5], "An aside", *tools.PAPER[5:]))) == []
    assert tools.check_notebook(save(path, *paper(*tools.PAPER[1:]))) == ["missing headings: Quick facts"]
    assert "out of order" in tools.check_notebook(save(path, *paper(*reversed(tools.PAPER))))[0]
    in_code = [md("```\n## Quick facts\n```"), *(md(f"## {h}") for h in tools.PAPER[1:])]
    assert tools.check_notebook(save(path, md("# A paper"), *in_code, *paper()[1:])) == ["missing headings: Quick facts"]
    assert tools.check_notebook(save(path, *paper(*tools.PAPER)[:-1])) == ["no outputs: run it"]
    lesson = project / "nbs/foundations/01_lesson.ipynb"
    assert tools.check_notebook(save(lesson, *paper(*tools.LESSON))) == []
    assert tools.check_notebook(save(lesson, *paper(*tools.PAPER))) == ["missing headings: The code"]
    by_badge = paper(*tools.LESSON)
    by_badge[0] = md("# A paper in another room\n\n[paper](https://example.org)")
    assert "The loss" in tools.check_notebook(save(project / "nbs/data/01_paper.ipynb", *by_badge))[0]


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
    text.write_text(text.read_text().replace("# %%\nassert", "# %%\ndouble(5)\n\n# %% [markdown]\n# Checks\n\n# %%\nassert"))  # a cell of that text stands there twice already
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
    assert tools.check_sync() == ["toy/double.py: not in sync with its notebook, run `python tools/notebooks.py export`"]
    assert "3 * x" in module.read_text(), "a check must not repair"
    module.write_text(good)
    stale = project / "toy/triple.py"
    stale.write_text(good.replace("double", "triple"))
    assert tools.check_sync() == ["toy/triple.py: stale, no notebook exports it"]
    stale.unlink(), module.unlink()
    assert tools.check_sync() == ["toy/double.py: not in sync with its notebook, run `python tools/notebooks.py export`"] and not module.exists()


def test_a_failing_assert_fails_the_test_run(project, capsys):
    good = save(project / "nbs/a.ipynb", *GOOD)
    wrong = save(project / "nbs/b.ipynb", *GOOD, code("assert double(1) == 3"))
    skipped = save(project / "nbs/c.ipynb", *GOOD, code("#| eval: false\nassert False"))
    before = wrong.read_bytes()
    assert tools.test_all([good, wrong, skipped], workers=1) == 1
    said = capsys.readouterr().out
    assert "FAIL nbs/b.ipynb" in said and "AssertionError" in said and "2 passed, 1 failed" in said
    assert wrong.read_bytes() == before


def test_tidy_outputs():
    view = {tools.WIDGET_VIEW: {"model_id": "1"}, "text/plain": "Box()"}
    nb = new_notebook(cells=[code("x", new_output("stream", name="stderr", text="a warning"), new_output("stream", text="kept"), new_output("display_data", data=dict(view)),
                                  new_output("display_data", data={**view, "text/html": "<svg/>"}))], metadata={"widgets": {}})
    tools.tidy_outputs(nb)
    stream, picture = nb.cells[0].outputs
    assert stream.text == "kept" and picture.data == {"text/plain": "Box()", "text/html": "<svg/>"}
    assert "widgets" not in nb.metadata and nb.metadata["posttrain"]["source"] == tools.stamp(nb)


def test_readme(project):
    (project / "nbs/rooms").mkdir()
    index = project / "nbs/index.ipynb"
    save(index, md("# Toy\n\n[a room](rooms/a.ipynb), [how](../HOW.md#there), [out](https://example.org/b)"), code("#| hide\nsecret = 1", new_output("stream", text="hidden")),
         code("answer = 42\nprint(answer)", new_output("stream", text="42\n"), new_output("stream", text="43\n")),
         code("#| echo: false\n#| fig-alt: a dot\ndraw()", shown(image_png=PNG, text_plain="<Figure>")),
         code("#| echo: false\ntable()", shown(text_markdown="| [a](rooms/a.ipynb) |")), code("#| echo: false\nlive()", shown(text_html="<b>", text_plain="<HTML object>")),
         code("#| echo: false\nSVG()", new_output("display_data", data={"image/svg+xml": "<svg/>"})))
    assert {f.split(":")[0] for f in tools.readme(check_only=True)} == {"README.md", "nbs/images/index-0.png", "nbs/images/index-1.svg"}
    assert not (project / "README.md").exists(), "a check must not write"
    tools.readme()
    text = (project / "README.md").read_text()
    assert "[a room](nbs/rooms/a.ipynb), [how](HOW.md#there), [out](https://example.org/b)" in text and "| [a](nbs/rooms/a.ipynb) |" in text
    assert "```python\nanswer = 42\nprint(answer)\n```\n\n```\n42\n43\n```" in text
    assert "![a dot](nbs/images/index-0.png)" in text and "![figure](nbs/images/index-1.svg)" in text and (project / "nbs/images/index-1.svg").read_text() == "<svg/>"
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
    save(project / "nbs/a.ipynb", md("# A\n\n[b](room/b.ipynb) [up](../HOW.md#x) [out](https://example.org) [here](#x) $f[x](y)$ `d[0](1)`"), code("t()", shown(text_markdown="[gone](gone.ipynb)")))
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
