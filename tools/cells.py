"""Cells that many notebooks have alike.

    python tools/cells.py     write the cell for Colab into every notebook, at the version that settings.ini names

`check` of tools/notebooks.py says where one is missing or of another version."""
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


def fold(cell) -> None:
    """Fold a cell in Jupyter and in Colab."""
    cell.metadata["jupyter"] = {"source_hidden": True}
    cell.metadata["cellView"] = "form"


def is_unfolded(cell) -> bool:
    """What the page of a notebook hides is folded in the notebook: setup, solutions, what only checks or draws."""
    hidden = cell.cell_type == "code" and bool(re.match(r"#\|\s*hide\b", cell.source))
    in_jupyter = cell.metadata.get("jupyter", {}).get("source_hidden", False)
    return hidden and not (in_jupyter and cell.metadata.get("cellView") == "form")


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
    if any(map(is_unfolded, cells)):
        bad.append("a cell with #| hide is not folded: `python tools/notebooks.py run` folds it")
    return bad


def main() -> int:
    from notebooks import all_notebooks, read, write
    for path in all_notebooks():
        nb = read(path)
        for cell in nb.cells:
            extras = installs(cell.source)
            if extras is not None: cell.source = colab_cell(extras)
        if nb != read(path): write(nb, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
