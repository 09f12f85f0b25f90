"""Cells that many notebooks have alike.

    python tools/cells.py     bring them up to date in every notebook: the cell for Colab to the version that
                              settings.ini names, folds and texts of pictures to what directives say

`check` of tools/notebooks.py says where one is missing or wrong."""
import ast
import configparser
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def colab_cell(extra: str = "") -> str:
    """The cell that installs the package in Colab, as it was when the notebook was written."""
    config = configparser.ConfigParser()
    config.read(ROOT / "settings.ini", encoding="utf-8")
    user, repo, version = (config["DEFAULT"][name] for name in ("user", "repo", "version"))
    name = f"{repo}[{extra}]" if extra else repo
    return f"""#| hide
#| eval: false
WHERE = "git+https://github.com/{user}/{repo}@v{version}"  # in Colab: the package at this notebook's version
HELP = f"Nothing was installed from {{WHERE}}. Open the notebook of a released version, or leave @v{version} out."
![ -e /content ] && (pip install -q "{name} @ {{WHERE}}" || echo "{{HELP}}")"""


def installs(code: str) -> str | None:
    """The extras that a cell installs in Colab, "" for none; None where it installs nothing."""
    if "/content" not in code or "pip install" not in code: return None
    extras = re.search(r"posttrain\[([\w,]+)\]", code)
    return extras[1] if extras else ""


def is_left_out(code: str) -> bool:
    """Is it for other machines than those that run the notebooks?"""
    return code.startswith("#| eval: false") and "#| export" not in code


def guarded(code: str) -> str:
    """Code that needs a GPU, so that running all cells of a notebook ends well without one."""
    return (f"import torch\n\nif torch.cuda.is_available():\n{textwrap.indent(code, ' ' * 4)}\n"
            'else: print("This cell needs a GPU and was skipped.")')


def is_guarded(code: str) -> bool:
    """Does it do nothing of its own accord? A condition decides, or it only imports and names things."""
    harmless = (ast.Import, ast.ImportFrom, ast.If, ast.Assign, ast.FunctionDef)
    try: return all(isinstance(node, harmless) for node in ast.parse(code).body)
    except SyntaxError: return False  # a line for the shell


def directive(code: str, name: str) -> str | None:
    """What a cell's `#| name: ...` says, without quotes; "" for the bare name, None where it is not there."""
    found = re.search(rf"^#\|[ \t]*{name}\b[ \t]*:?[ \t]*(.*?)[ \t]*$", code, re.M)
    return found and found[1].strip("\"'")


def wants_fold(cell) -> bool:
    """What a rendered page hides or folds is folded in the notebook too: setup, solutions, what only draws."""
    code = cell.source if cell.cell_type == "code" else ""
    return directive(code, "hide") == "" or directive(code, "code-fold") == "true"


def fold(cell) -> None:
    """Fold a cell in Jupyter and in Colab."""
    cell.metadata["jupyter"] = {"source_hidden": True}
    cell.metadata["cellView"] = "form"


def is_folded(cell) -> bool:
    """Is it folded in Jupyter and in Colab?"""
    in_jupyter = cell.metadata.get("jupyter", {}).get("source_hidden", False)
    return in_jupyter and cell.metadata.get("cellView") == "form"


def is_unfolded(cell) -> bool:
    """Does a directive ask for a fold that is missing?"""
    return wants_fold(cell) and not is_folded(cell)


def is_folded_in_silence(cell) -> bool:
    """Is it folded, in Jupyter or in Colab, though no directive asks for it?"""
    return not wants_fold(cell) and bool({"jupyter", "cellView"} & set(cell.metadata))


# ---------------------------------------------------------------- what pictures show, in words
PICTURES = ("image/png", "image/jpeg", "image/svg+xml")
ALT_LENGTHS = range(40, 401)  # letters; shorter says too little, and nobody listens longer to one picture


def pictures_of(cell) -> list[tuple]:
    """(output, its kind) of each saved picture."""
    return [(out, kind) for out in cell.get("outputs", []) for kind in PICTURES if kind in out.get("data", {})]


def describe(cell) -> None:
    """Write the cell's `#| fig-alt: ...` beside its pictures.

    Quarto reads the directive, nbconvert's classic template and nbsphinx read what is written here. JupyterLab 4 and
    nbconvert's template `lab` read no text for an image/png at all."""
    text = directive(cell.source, "fig-alt")
    for out, kind in pictures_of(cell) if text else []:
        out.metadata[kind] = {"alt": text}


def wrong_pictures(cell) -> list[str]:
    """What is wrong with the texts of a cell's pictures."""
    if not (pictures := pictures_of(cell)): return []
    if any(kind == "image/svg+xml" for _, kind in pictures):
        return ["JupyterLab shows no SVG of a notebook that is not trusted: display posttrain.explore.svg.Picture(svg)"]
    text = directive(cell.source, "fig-alt")
    if text is None:
        return ['a picture has no text: write `#| fig-alt: "..."` at the top of its cell: what is plotted against '
                "what, and what one should notice"]
    if len(text) not in ALT_LENGTHS:
        return [f"the text of a picture has {len(text)} letters, expected {ALT_LENGTHS[0]} to {ALT_LENGTHS[-1]}: "
                f"{text[:60]!r}"]
    if any(out.metadata.get(kind, {}).get("alt") != text for out, kind in pictures):
        return ["a picture was saved without its #| fig-alt: run `python tools/cells.py`"]
    return []


def undescribed_images(cell) -> list[str]:
    """Images in the HTML that a cell shows, without a text of their own."""
    shown = "".join(out.get("data", {}).get("text/html", "") for out in cell.get("outputs", []))
    images = re.findall(r"<img\b[^>]*>", re.sub(r"<script>.*?</script>", "", shown, flags=re.S))
    return [image[:60] for image in images if not re.search(r"\balt=([\"']).+?\1", image)]


def tidy(cell) -> None:
    """Give a cell the metadata that its directives ask for."""
    if is_unfolded(cell): fold(cell)
    if cell.cell_type == "code": describe(cell)


def wrong_cells(cells: list) -> list[str]:
    """What is wrong with such cells of a notebook."""
    bad = []
    for cell in cells:
        extras = installs(cell.source)
        if extras is not None and cell.source != colab_cell(extras):
            bad.append("the cell for Colab is not that of this version: run `python tools/cells.py`")
        elif is_left_out(cell.source) and not is_guarded(cell.source):
            bad.append("a cell that is not run here does something on any machine: put it under "
                       "`if torch.cuda.is_available():`")
        bad += wrong_pictures(cell) + [f"an image has no alt text: {image}" for image in undescribed_images(cell)]
    if any(map(is_unfolded, cells)):
        bad.append("a cell with #| hide or #| code-fold: true is not folded: run `python tools/cells.py`")
    if silent := [cell.source[:40] for cell in cells if is_folded_in_silence(cell)]:
        bad.append(f"a cell is folded, but neither #| hide nor #| code-fold: true says so: {silent[0]!r}")
    return bad


def main() -> int:
    from notebooks import all_notebooks, read, write
    for path in all_notebooks():
        nb = read(path)
        for cell in nb.cells:
            extras = installs(cell.source)
            if extras is not None: cell.source = colab_cell(extras)
            tidy(cell)
        if nb != read(path): write(nb, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
