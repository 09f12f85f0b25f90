"""Write, run and check the notebooks.

    python tools/notebooks.py text  NB.ipynb ...    notebook -> NB.py (jupytext percent) beside it, to edit as text
    python tools/notebooks.py build NB.py ...       text -> notebook (keeps outputs of unchanged cells), then export it
    python tools/notebooks.py run   NB.ipynb ...    execute in a fresh kernel, keep the outputs, clean, stamp
    python tools/notebooks.py check [--no-sync]     structure, cleanliness, stamps, links, export in sync
    python tools/notebooks.py test  [NB.ipynb ...]  execute without saving: every assert must hold
    python tools/notebooks.py readme [--check]      README.md from nbs/index.ipynb

`run` stamps a notebook with the hash of the code whose run made its outputs; `check` compares, so a notebook that was
edited after its last run is found.
"""
import argparse
import ast
import base64
import copy
import hashlib
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NBS, PACKAGE = ROOT / "nbs", ROOT / "posttrain"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
MAX_OUTPUT_KB = 600  # a notebook larger than this is slow to open on GitHub and in Colab

# The headings that a reader may rely on, in order. A paper has all of them, a lesson on foundations the second list.
PAPER = ["Quick facts", "The idea", "The objective", "The derivation", "The loss", "Checks", "Explore", "The trainer",
         "Run it", "What to watch", "Exercises", "Further reading"]
LESSON = ["Quick facts", "The idea", "The derivation", "The code", "Checks", "Explore", "Exercises", "Further reading"]
PAPER_ROOMS = {"offline", "online", "reward", "distillation"}


def all_notebooks() -> list[Path]:
    found = [*NBS.rglob("*.ipynb"), *(ROOT / "tutorials").rglob("*.ipynb")]
    return sorted(p for p in found if ".ipynb_checkpoints" not in p.parts)


def read(path: Path):
    return nbformat.read(path, as_version=4)


def write(nb, path: Path) -> None:
    nbformat.write(nb, path)
    # nbdev's own cleaner, so that its git hooks agree with what is committed.
    subprocess.run([tool("nbdev-clean"), "--fname", str(path)], check=True, cwd=ROOT)


def tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def code_of(nb) -> str:
    return "\n\0\n".join(c.source for c in nb.cells if c.cell_type == "code")


def stamp(nb) -> str:
    return hashlib.sha256(code_of(nb).encode()).hexdigest()[:16]


def is_export(cell) -> bool:
    return cell.cell_type == "code" and bool(re.search(r"^#\|\s*(export|exporti|exports)\b", cell.source, re.M))


def is_evaluated(cell) -> bool:
    return cell.cell_type == "code" and not re.search(r"^#\|\s*eval:\s*false", cell.source, re.M)


# ---------------------------------------------------------------- text, build, export
def to_text(path: Path) -> None:
    import jupytext
    nb = read(path)
    nb.metadata = {"jupytext": {"notebook_metadata_filter": "-all"}}  # no header: the cells alone
    jupytext.write(nb, path.with_suffix(".py"), fmt="py:percent")
    print(path.with_suffix(".py"))


def build(path: Path) -> None:
    import jupytext
    target = path.with_suffix(".ipynb")
    new = jupytext.read(path, fmt="py:percent")
    old, used = {}, set()
    for cell in read(target).cells if target.exists() else []:
        old.setdefault((cell.cell_type, cell.source), []).append(cell)
    for cell in new.cells:  # a cell that did not change keeps its outputs and id, wherever it stands now: a diff shows what changed
        if was := old.get((cell.cell_type, cell.source)):
            cell.id = was[0].id
            if cell.cell_type == "code":
                cell.outputs = copy.deepcopy(was[0].outputs)
            was.pop(0)
        else:
            cell.id = ""
        used.add(cell.id)
    for cell in new.cells:
        if not cell.id:
            tries = (hashlib.sha256(f"{n}{cell.source}".encode()).hexdigest()[:8] for n in range(len(new.cells) + 1))
            cell.id = next(t for t in tries if t not in used)
            used.add(cell.id)
    new.metadata = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    if target.exists() and "posttrain" in read(target).metadata:
        new.metadata["posttrain"] = read(target).metadata["posttrain"]
    write(new, target)
    if NBS in target.resolve().parents:
        export([target])
    print(target)


def export(paths: list[Path]) -> None:
    from nbdev.export import nb_export
    os.chdir(ROOT)
    for path in paths:
        nb_export(str(path))


# ---------------------------------------------------------------- run, test
def execute(nb, cwd: Path, timeout: int = 600, allow_errors: bool = False):
    from nbclient import NotebookClient
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    skipped = {i: c.source for i, c in enumerate(nb.cells) if c.cell_type == "code" and not is_evaluated(c)}
    for i in skipped:
        nb.cells[i].source = ""
    env = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1",
           "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "0",
           "OMP_NUM_THREADS": "1"}  # two notebooks at a time on two cores; and the same sums on every machine
    os.environ.update(env)
    client = NotebookClient(nb, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(cwd)}},
                            allow_errors=allow_errors, extra_arguments=["--IPKernelApp.log_level=40"])  # errors, no advice
    try:
        client.execute()
    finally:
        for i, source in skipped.items():
            nb.cells[i].source = source
    return nb


def tidy_outputs(nb) -> None:
    """Keep what a reader without a kernel can see, and nothing that differs from run to run for no reason."""
    for cell in nb.cells:
        if cell.cell_type != "code":
            continue
        cell.metadata.pop("execution", None)
        kept = []
        for out in cell.outputs:
            if out.output_type == "stream" and out.name == "stderr":
                continue
            if "data" in out and out.data.pop(WIDGET_VIEW, None):  # a saved widget view reopens as "model not found"
                if set(out.data) <= {"text/plain"}:  # and nothing else shows it: a progress bar, mostly
                    continue
            kept.append(out)
        cell.outputs = kept
    nb.metadata.pop("widgets", None)
    nb.metadata["posttrain"] = {"source": stamp(nb)}


def run(path: Path) -> None:
    start = time.time()
    nb = execute(read(path), path.parent)
    tidy_outputs(nb)
    write(nb, path)
    print(f"{path.relative_to(ROOT)}  {time.time() - start:.1f} s", flush=True)


def test(path: Path) -> tuple[Path, float, str]:
    start, error = time.time(), ""
    try:
        execute(read(path), path.parent)
    except Exception as e:  # the report must name every notebook that fails, not only the first
        error = f"{type(e).__name__}: {e}"
    return path, time.time() - start, error


def test_all(paths: list[Path], workers: int) -> int:
    failed = 0
    with ThreadPoolExecutor(workers) as pool:
        for path, seconds, error in pool.map(test, paths):
            print(f"{'FAIL' if error else 'ok  '} {path.relative_to(ROOT)}  {seconds:.1f} s", flush=True)
            if error:
                failed += 1
                print(error[-3000:], flush=True)
    print(f"notebooks: {len(paths) - failed} passed, {failed} failed", flush=True)
    return failed


# ---------------------------------------------------------------- check
def headings(nb) -> list[str]:
    text = "\n".join(c.source for c in nb.cells if c.cell_type == "markdown")
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    return [m.strip() for m in re.findall(r"^##\s+(.+)$", text, re.M)]


def expected_headings(path: Path, nb) -> list[str]:
    room = path.relative_to(NBS).parts[0] if NBS in path.parents else ""
    title = nb.cells[0].source if nb.cells else ""
    if room in PAPER_ROOMS or "[paper]" in title.lower():
        return PAPER
    return LESSON if room == "foundations" else []


def unchecked_functions(nb) -> list[str]:
    """Exported public functions that no later, unexported cell asserts anything about."""
    missing = []
    for i, cell in enumerate(nb.cells):
        if not is_export(cell):
            continue
        try:
            names = [n.name for n in ast.parse(cell.source).body
                     if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]
        except SyntaxError as e:
            missing.append(f"cell {i} does not parse: {e}")
            continue
        later = [c.source for c in nb.cells[i + 1:] if is_evaluated(c) and not is_export(c)]
        checks = [s for s in later if re.search(r"^\s*assert\b|\btest_\w+\(|\bassert_\w+\(|\bgradcheck\(", s, re.M)]
        missing += [n for n in names if not re.search(rf"\b{n}\b", "\n".join(checks))]
    return missing


def check_notebook(path: Path) -> list[str]:
    nb, bad = read(path), []
    code = [c for c in nb.cells if c.cell_type == "code"]
    if not nb.cells or not nb.cells[0].source.startswith("# "):
        bad.append("the first cell must be a markdown title")
    want, have = expected_headings(path, nb), headings(nb)
    found = [h for h in have if h in want]
    if missing := [h for h in want if h not in have]:
        bad.append(f"missing headings: {', '.join(missing)}")
    elif found != want:
        bad.append(f"headings out of order: {', '.join(found)}")
    if names := unchecked_functions(nb):
        bad.append(f"exported but never checked in a later cell: {', '.join(names)}")
    if NBS in path.parents and any(is_export(c) for c in code) and not any("assert" in c.source for c in code if not is_export(c)):
        bad.append("exports code but asserts nothing")
    if nb.metadata.get("posttrain", {}).get("source") != stamp(nb):
        bad.append("edited after its last run: `python tools/notebooks.py run` it")
    for i, c in enumerate(code):
        if any(o.output_type == "error" for o in c.outputs):
            bad.append(f"code cell {i} holds an error output")
        if any(WIDGET_VIEW in o.get("data", {}) for o in c.outputs):
            bad.append(f"code cell {i} holds a saved widget view")
        if c.execution_count is not None:
            bad.append(f"code cell {i} is not clean (execution count)")
    if want and not any(c.outputs for c in code):
        bad.append("no outputs: run it")
    if (kb := path.stat().st_size / 1024) > MAX_OUTPUT_KB:
        bad.append(f"{kb:.0f} kB, more than {MAX_OUTPUT_KB}: thin out the widget's frames or plot as a smaller picture")
    return bad


def check_sync() -> list[str]:
    """Delete every generated module, export anew, and compare: a stale module of a renamed notebook is found too."""
    before = {p: p.read_bytes() for p in PACKAGE.rglob("*.py")}
    for path, content in before.items():
        if b"AUTOGENERATED" in content[:400] or path.name == "_modidx.py":
            path.unlink()
    subprocess.run([tool("nbdev-export")], check=True, cwd=ROOT)
    after = {p: p.read_bytes() for p in PACKAGE.rglob("*.py")}
    bad = [f"{p.relative_to(ROOT)}: stale, no notebook exports it" for p in before if p not in after]
    bad += [f"{p.relative_to(ROOT)}: not in sync with its notebook, run `python tools/notebooks.py export`" for p in after if before.get(p) != after[p]]
    for path, content in before.items():
        path.write_bytes(content)
    for path in set(after) - set(before):
        path.unlink()
    return bad


def prose(path: Path) -> str:
    """What a reader sees as text: a Markdown file, or a notebook's Markdown cells and outputs."""
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    cells = read(path).cells
    shown = [o.data["text/markdown"] for c in cells if c.cell_type == "code" for o in c.outputs if "text/markdown" in o.get("data", {})]
    return "\n\n".join([c.source for c in cells if c.cell_type == "markdown"] + shown)


def relative_links(text: str) -> list[str]:
    """Targets of relative links and pictures; code and maths, where brackets mean something else, are left out."""
    text = re.sub(r"```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]+\$", "", text, flags=re.S)
    found = re.findall(r"\]\(([^()\s]+)\)", text) + re.findall(r"(?:src|href)=[\"']([^\"']+)", text)
    return [t for t in found if not re.match(r"[a-z]+:|#", t)]


def broken_links() -> list[str]:
    pages = sorted(ROOT.glob("*.md")) + all_notebooks()
    return [f"{page.relative_to(ROOT)}: links to {target}, which is not there" for page in pages
            for target in relative_links(prose(page)) if not (page.parent / target.split("#")[0]).exists()]


def check(sync: bool) -> int:
    bad = []
    for path in all_notebooks():
        bad += [f"{path.relative_to(ROOT)}: {b}" for b in check_notebook(path)]
    if sync:
        bad += check_sync()
    bad += readme(check_only=True) + broken_links()
    print("\n".join(bad) if bad else f"checked {len(all_notebooks())} notebooks: structure, stamps, links, export, README agree")
    return len(bad)


# ---------------------------------------------------------------- README
def from_root(markdown: str) -> str:
    """Relative links of a notebook in nbs/, rewritten for a file in the root."""
    def rewrite(match):
        before, target, after = match.groups()
        if re.match(r"[a-z]+:|#|/", target):
            return match[0]
        return before + os.path.relpath(NBS / target, ROOT).replace(os.sep, "/") + after
    return re.sub(r"(\]\()([^()\s]+)(\))", rewrite, markdown)


def readme(check_only: bool = False) -> list[str]:
    """README.md is nbs/index.ipynb: what it says, shows and prints, with its pictures as files in nbs/images/.

    Code cells: `#| hide` leaves out all, `#| echo: false` the code; `#| fig-alt: ...` is the text of a picture."""
    source = NBS / "index.ipynb"
    if not source.exists():
        return ["nbs/index.ipynb is missing"]
    parts, pictures = ["<!-- Made from nbs/index.ipynb by `python tools/notebooks.py readme`: edit that. -->"], {}
    for cell in read(source).cells:
        if cell.cell_type == "markdown":
            parts.append(from_root(cell.source))
            continue
        if re.search(r"^#\|\s*hide", cell.source, re.M) or not cell.source.strip():
            continue
        shown = "\n".join(l for l in cell.source.splitlines() if not l.startswith("#|"))
        if not re.search(r"^#\|\s*echo:\s*false", cell.source, re.M):
            parts.append(f"```python\n{shown.strip()}\n```")
        alt = re.search(r"^#\|\s*fig-alt:\s*(.+)$", cell.source, re.M)
        for out in cell.outputs:
            data = out.get("data", {})
            if kind := next((k for k in ("image/svg+xml", "image/png") if k in data), None):
                content = data[kind].encode() if kind == "image/svg+xml" else base64.b64decode(data[kind])
                name = f"images/index-{len(pictures)}.{kind[6:9]}"
                pictures[NBS / name] = content
                parts.append(from_root(f"![{alt[1].strip() if alt else 'figure'}]({name})"))
            elif "text/markdown" in data:
                parts.append(from_root(data["text/markdown"]))
            elif (text := out.get("text") or data.get("text/plain")) and "text/html" not in data:  # GitHub shows no raw HTML
                text = "```\n" + text.strip("\n") + "\n```"
                if parts[-1].startswith("```\n"):  # printed by the same run: one block
                    text = parts.pop().removesuffix("```") + text.removeprefix("```\n")
                parts.append(text)
    text = "\n\n".join(p.strip() for p in parts) + "\n"
    targets = {ROOT / "README.md": text.encode(), **pictures}
    bad = [f"{p.relative_to(ROOT)}: not made from nbs/index.ipynb, run `python tools/notebooks.py readme`"
           for p, content in targets.items() if not p.exists() or p.read_bytes() != content]
    left = set((NBS / "images").glob("index-*")) - set(pictures)
    bad += [f"{p.relative_to(ROOT)}: left over, nbs/index.ipynb draws no such picture" for p in sorted(left)]
    if not check_only:
        for path, content in targets.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        for path in left:
            path.unlink()
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["text", "build", "run", "test", "check", "readme", "export"])
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--check", action="store_true", help="readme: compare only")
    parser.add_argument("--no-sync", action="store_true", help="check: leave out the export comparison")
    parser.add_argument("--workers", type=int, default=2, help="test: notebooks at a time")
    args = parser.parse_args()
    paths = [p.resolve() for p in args.paths]
    if args.command == "check":
        return bool(check(sync=not args.no_sync))
    if args.command == "readme":
        bad = readme(args.check)
        print("\n".join(bad) if args.check and bad else "README.md")
        return bool(args.check and bad)
    if args.command == "test":
        return bool(test_all(paths or all_notebooks(), args.workers))
    if args.command == "export":
        subprocess.run([tool("nbdev-export")], check=True, cwd=ROOT)
        return 0
    for path in paths or ([] if args.command in ("text", "build") else all_notebooks()):
        {"text": to_text, "build": build, "run": run}[args.command](path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
