"""Write, run and check the notebooks.

    python tools/notebooks.py text  NB.ipynb ...    notebook -> NB.py (jupytext percent) beside it, to edit as text
    python tools/notebooks.py build NB.py ...       text -> notebook (keeps outputs of unchanged cells), then export it
    python tools/notebooks.py run   [NB.ipynb ...]  execute in a fresh kernel, keep the outputs, clean, stamp
    python tools/notebooks.py test  [NB.ipynb ...]  execute without saving: every assert must hold
    python tools/notebooks.py check [--no-sync]     structure, cleanliness, own code as run, links, export in sync
    python tools/notebooks.py lint                  ruff over the package, notebooks, tests and tools
    python tools/notebooks.py readme [--check]      README.md from nbs/index.ipynb

`run` writes two things. Into the notebook goes the hash of the code whose run made its outputs. `check` compares it,
so a notebook that was edited after its last run is found. Into nbs/stamps.txt goes a stamp that covers all that the
results depend on (tools/stamps.py). `run --stale` and `test --stale` leave out notebooks whose stamp is still true.
`test --stale` runs a tenth of these anyway, another one with each commit.
"""
import argparse
import ast
import base64
import copy
import hashlib
import html
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import nbformat

import cells
import exercises
import stamps

ROOT = Path(__file__).resolve().parent.parent
NBS, PACKAGE = ROOT / "nbs", ROOT / "posttrain"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
MAX_OUTPUT_KB = 750  # a notebook larger than this is slow to open on GitHub and in Colab

# The headings that a reader may rely on, in order. A paper has all of them, a lesson on foundations the second list,
# and a trainer whose paper has a lesson of its own the third.
PAPER = ["Quick facts", "The idea", "The objective", "The derivation", "The loss", "Checks", "Explore", "The trainer",
         "Run it", "What to watch", "Exercises", "Further reading"]
LESSON = ["Quick facts", "The idea", "The derivation", "The code", "Checks", "Explore", "Exercises", "Further reading"]
TRAINER = ["Quick facts", "The trainer", "Checks", "Further reading"]
PAPER_ROOMS = {"offline", "online", "reward", "distillation"}
# The papers that introduce a trainer. Each also holds the whole method as one plain loop, a cell which asserts that
# the loop takes the trainer's step, and an exercise that builds the loss from blank.
ONE_PAGE = "The method on one page"
INTRODUCE_A_TRAINER = {
    "offline/01_sft", "offline/03_dpo", "offline/07_orpo", "offline/10_kto", "offline/11_bco", "offline/13_cpo",
    "online/01_grpo", "online/10_rloo", "online/13_ppo", "online/15_online_dpo", "online/17_xpo", "online/19_nash_md",
    "reward/01_bradley_terry", "reward/04_process", "distillation/01_gkd", "distillation/03_minillm",
}
# The trainers of which a paper's lesson already says all but how they are called.
SHORT_TRAINERS = {
    "offline/14_kto_trainer", "offline/15_bco_trainer", "offline/16_cpo_trainer", "offline/17_orpo_trainer",
    "online/14_ppo_trainer", "online/15b_comparing", "online/16_online_dpo_trainer", "online/18_xpo_trainer",
    "online/20_nash_md_trainer", "reward/03_reward_trainer", "reward/05_prm_trainer",
    "distillation/02_gkd_trainer", "distillation/04_minillm_trainer", "distillation/06_distillation_trainer",
}


def all_notebooks() -> list[Path]:
    found = [*NBS.rglob("*.ipynb"), *(ROOT / "tutorials").rglob("*.ipynb")]
    return sorted(p for p in found if ".ipynb_checkpoints" not in p.parts)


def read(path: Path):
    return nbformat.read(path, as_version=4)


def write(nb, path: Path) -> None:
    for cell in nb.cells: cells.tidy(cell)
    nbformat.write(nb, path)
    # nbdev's own cleaner, so that its git hooks agree with what is committed.
    subprocess.run([tool("nbdev-clean"), "--fname", str(path)], check=True, cwd=ROOT)


def tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def code_cells(nb) -> list[str]:
    return [c.source for c in nb.cells if c.cell_type == "code"]


def is_as_run(nb) -> bool:
    """Whether the code is that whose run made the outputs. Comments and line breaks may differ."""
    plain = hashlib.sha256("\n\0\n".join(code_cells(nb)).encode()).hexdigest()[:16]
    # Notebooks that ran before stamps looked at syntax trees hold the hash of their plain text.
    return nb.metadata.get("posttrain", {}).get("source") in (stamps.code_stamp(code_cells(nb)), plain)


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


def keep_outputs(cells: list, before: list) -> None:
    """A cell that did not change keeps its outputs and id, wherever it stands now: a diff shows what changed."""
    old = {}
    for cell in before:
        old.setdefault((cell.cell_type, cell.source), []).append(cell)
    for cell in cells:
        same = old.get((cell.cell_type, cell.source))
        was = same.pop(0) if same else None
        cell.id = was.id if was else ""
        if was and cell.cell_type == "code":
            cell.outputs = copy.deepcopy(was.outputs)


def give_ids(cells: list) -> None:
    """An id from its source to each cell that has none."""
    used = {cell.id for cell in cells}
    for cell in cells:
        if not cell.id:
            tries = (hashlib.sha256(f"{n}{cell.source}".encode()).hexdigest()[:8] for n in range(len(cells) + 1))
            cell.id = next(t for t in tries if t not in used)
            used.add(cell.id)


def build(path: Path) -> None:
    import jupytext
    target = path.with_suffix(".ipynb")
    new = jupytext.read(path, fmt="py:percent")
    before = read(target) if target.exists() else nbformat.v4.new_notebook()
    keep_outputs(new.cells, before.cells)
    give_ids(new.cells)
    new.metadata = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    if "posttrain" in before.metadata:
        new.metadata["posttrain"] = before.metadata["posttrain"]
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
# Set in every kernel. One thread: two notebooks run at a time on two cores, and sums are the same on every machine.
KERNEL = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1",
          "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
# Errors of the kernel are shown, its advice is not.
QUIET = ["--IPKernelApp.log_level=40"]


def execute(nb, cwd: Path, timeout: int = 600, allow_errors: bool = False):
    """Run the cells of a notebook in a fresh kernel; those with `eval: false` are skipped."""
    from nbclient import NotebookClient
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    skipped = {i: c.source for i, c in enumerate(nb.cells) if c.cell_type == "code" and not is_evaluated(c)}
    for i in skipped:
        nb.cells[i].source = ""
    os.environ.update(KERNEL)
    client = NotebookClient(nb, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(cwd)}},
                            allow_errors=allow_errors, extra_arguments=QUIET)
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
            # A saved widget view reopens as "model not found". One that nothing else shows is a progress bar, mostly.
            view = out.data.pop(WIDGET_VIEW, None) if "data" in out else None
            if view and set(out.data) <= {"text/plain"}:
                continue
            # What is printed comes in one piece or in several, depending on how busy the machine is.
            if out.output_type == "stream" and kept and kept[-1].output_type == "stream":
                kept[-1].text += out.text
            else:
                kept.append(out)
        cell.outputs = kept
    nb.metadata.pop("widgets", None)
    nb.metadata["posttrain"] = {"source": stamps.code_stamp(code_cells(nb))}


@dataclass
class Result:
    """What became of one notebook."""
    name: str        # its path from the root
    seconds: float
    error: str  # empty: every assert held
    stamp: str  # of what it ran with


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def records_file() -> Path:
    return NBS / "stamps.txt"


def run(path: Path, keep: bool = True) -> Result:
    """Execute a notebook; with `keep`, its outputs go into the file. The error is reported, not raised."""
    nb, start, stamp, error = read(path), time.time(), "", ""
    try:
        stamp = stamps.Dependencies(ROOT, PACKAGE).stamp(path, code_cells(nb))
        execute(nb, path.parent)
        if keep:
            tidy_outputs(nb)
            write(nb, path)
    except Exception as e:  # the report must name every notebook that fails, not only the first
        error = f"{type(e).__name__}: {e}"
    return Result(name_of(path), time.time() - start, error, stamp)


def record(result: Result, keep: bool) -> None:
    """Write a run into the file of stamps. A notebook that failed loses its stamp: it runs until it passes."""
    records = stamps.read_records(records_file())
    before = records.get(result.name)
    if result.error:
        records.pop(result.name, None)
    elif keep:
        seconds = stamps.rounded(result.seconds, before.seconds if before else None)
        records[result.name] = stamps.Record({result.stamp}, seconds)
    if records.get(result.name) != before:
        stamps.write_records(records_file(), records)


def true_stamps(paths: list[Path]) -> list[Path]:
    """Those notebooks whose stamp is of what stands there now: to run them would give the same again."""
    records, dependencies = stamps.read_records(records_file()), stamps.Dependencies(ROOT, PACKAGE)
    return [p for p in paths if (known := records.get(name_of(p)))
            and dependencies.stamp(p, code_cells(read(p))) in known.stamps]


def slowest_first(paths: list[Path]) -> list[Path]:
    """In the order in which they are started, so that no long one begins at the end. A new one may be long."""
    records = stamps.read_records(records_file())
    return sorted(paths, key=lambda p: -records[name_of(p)].seconds if name_of(p) in records else -float("inf"))


def run_all(paths: list[Path], workers: int, keep: bool) -> list[Result]:
    results = []
    with ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(run, path, keep) for path in slowest_first(paths)]
        for done in as_completed(running):
            result = done.result()
            results.append(result)
            record(result, keep)
            print(f"{'FAIL' if result.error else 'ok  '} {result.name}  {result.seconds:.1f} s", flush=True)
            if result.error:
                print(result.error[-3000:], flush=True)
    return results


def choose(paths: list[Path], stale: bool, keep: bool) -> tuple[list[Path], list[Path], set[str]]:
    """Which notebooks to run, which to take from their stamps, and the tenth that runs though its stamps are true."""
    if not stale:
        return paths, [], set()
    known = true_stamps(paths)
    picked = set() if keep else stamps.tenth(map(name_of, paths), stamps.turn(ROOT)) & set(map(name_of, known))
    stamped = [p for p in known if name_of(p) not in picked]
    return [p for p in paths if p not in stamped], stamped, picked


def execute_all(paths: list[Path], workers: int, stale: bool, keep: bool, report: Path | None = None) -> int:
    """Run notebooks and say what was run and what was not. Returns how many failed."""
    todo, stamped, picked = choose(paths, stale, keep)
    if stale:
        print(f"{len(todo) - len(picked)} notebooks have no true stamp and are run, "
              f"{len(stamped)} are taken from theirs")
    if picked:
        print("run though their stamps are true, as this turn's tenth: " + ", ".join(sorted(picked)), flush=True)
    results = run_all(todo, workers, keep)
    failed = sum(bool(r.error) for r in results)
    if report:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps({"run": [asdict(r) for r in results], "picked": sorted(picked),
                                      "stamped": [name_of(p) for p in stamped]}), encoding="utf-8")
    passed = len(results) - failed
    print(f"notebooks: {passed} passed, {failed} failed, {len(stamped)} taken from their stamps", flush=True)
    return failed


# ---------------------------------------------------------------- check
def headings(nb) -> list[str]:
    text = "\n".join(c.source for c in nb.cells if c.cell_type == "markdown")
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    return [m.strip() for m in re.findall(r"^##\s+(.+)$", text, re.M)]


def expected_headings(path: Path, nb) -> list[str]:
    room = path.relative_to(NBS).parts[0] if NBS in path.parents else ""
    title = nb.cells[0].source if nb.cells else ""
    if is_among(SHORT_TRAINERS, path):
        return TRAINER
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


def is_among(names: set[str], path: Path) -> bool:
    return any(path.match(f"nbs/{name}.ipynb") for name in names)


def introduces_a_trainer(path: Path) -> bool:
    return is_among(INTRODUCE_A_TRAINER, path)


def bad_headings(path: Path, nb) -> list[str]:
    want, have = expected_headings(path, nb), headings(nb)
    page = [ONE_PAGE] if introduces_a_trainer(path) else []
    if missing := [h for h in want + page if h not in have]:
        return [f"missing headings: {', '.join(missing)}"]
    found = [h for h in have if h in want]
    return [f"headings out of order: {', '.join(found)}"] if found != want else []


def bad_cells(code: list) -> list[str]:
    """What does not belong into a committed code cell."""
    bad = []
    for i, cell in enumerate(code):
        if any(o.output_type == "error" for o in cell.outputs):
            bad.append(f"code cell {i} holds an error output")
        if any(WIDGET_VIEW in o.get("data", {}) for o in cell.outputs):
            bad.append(f"code cell {i} holds a saved widget view")
        if cell.execution_count is not None:
            bad.append(f"code cell {i} is not clean (execution count)")
    return bad


def check_notebook(path: Path) -> list[str]:
    nb, bad = read(path), []
    code = [c for c in nb.cells if c.cell_type == "code"]
    if not nb.cells or not nb.cells[0].source.startswith("# "):
        bad.append("the first cell must be a markdown title")
    bad += bad_headings(path, nb)
    if names := unchecked_functions(nb):
        bad.append(f"exported but never checked in a later cell: {', '.join(names)}")
    exports = NBS in path.parents and any(is_export(c) for c in code)
    if exports and not any("assert" in c.source for c in code if not is_export(c)):
        bad.append("exports code but asserts nothing")
    bad += cells.wrong_cells(code)
    bad += exercises.wrong_exercises(nb.cells, introduces_a_trainer(path))
    if not is_as_run(nb):
        bad.append("edited after its last run: `python tools/notebooks.py run` it")
    bad += bad_cells(code)
    if expected_headings(path, nb) and not any(c.outputs for c in code):
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
    bad += [f"{p.relative_to(ROOT)}: not in sync with its notebook, run `python tools/notebooks.py export`"
            for p in after if before.get(p) != after[p]]
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
    outputs = [o for c in cells if c.cell_type == "code" for o in c.outputs]
    shown = [o.data["text/markdown"] for o in outputs if "text/markdown" in o.get("data", {})]
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


def lint() -> list[str]:
    """What ruff finds in the package, notebooks, tests and tools; pyproject.toml holds the rules."""
    done = subprocess.run([tool("ruff"), "check", "--output-format", "concise", "--quiet", "."],
                          cwd=ROOT, capture_output=True, text=True)
    return (done.stdout + done.stderr).splitlines() if done.returncode else []


def check(sync: bool) -> int:
    bad = lint()
    for path in all_notebooks():
        bad += [f"{path.relative_to(ROOT)}: {b}" for b in check_notebook(path)]
    if sync:
        bad += check_sync()
    bad += readme(check_only=True) + broken_links()
    good = f"checked {len(all_notebooks())} notebooks: lint, structure, stamps, links, export, README agree"
    print("\n".join(bad) or good)
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


def readme_code(cell) -> list[str]:
    """A cell's code as a block, unless `#| echo: false` leaves it out."""
    shown = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|"))
    return [] if re.search(r"^#\|\s*echo:\s*false", cell.source, re.M) else [f"```python\n{shown.strip()}\n```"]


def readme_pictures(out, alt: str) -> list[tuple[str, str, str]]:
    """The pictures of an output: what each shows, its kind, its content in base64. Panels have words of their own."""
    data = out.get("data", {})
    if "image/png" in data: return [(alt, "png", data["image/png"])]
    found = re.findall(r'<img alt="([^"]*)" src="data:image/svg\+xml;base64,([^"]*)"', data.get("text/html", ""))
    return [(html.unescape(words), "svg", content) for words, content in found]


def readme_output(out, alt: str, pictures: dict[Path, bytes]) -> str:
    """One output as Markdown, or nothing; pictures go into `pictures`, path -> content."""
    data, links = out.get("data", {}), []
    for words, kind, content in readme_pictures(out, alt):
        name = f"images/index-{len(pictures)}.{kind}"
        pictures[NBS / name] = base64.b64decode(content)
        links.append(from_root(f"![{words}]({name})"))
    if links:
        return "\n".join(links)
    if "text/markdown" in data:
        return from_root(data["text/markdown"])
    text = out.get("text") or data.get("text/plain")
    # GitHub shows no raw HTML, and what stands beside it as text says little.
    return "```\n" + text.strip("\n") + "\n```" if text and "text/html" not in data else ""


def readme_parts() -> tuple[list[str], dict[Path, bytes]]:
    """The paragraphs of README.md, and its pictures."""
    parts, pictures = ["<!-- Made from nbs/index.ipynb by `python tools/notebooks.py readme`: edit that. -->"], {}
    for cell in read(NBS / "index.ipynb").cells:
        if cell.cell_type == "markdown":
            parts.append(from_root(cell.source))
            continue
        if re.search(r"^#\|\s*hide", cell.source, re.M) or not cell.source.strip():
            continue
        parts += readme_code(cell)
        for out in cell.outputs:
            part = readme_output(out, cells.directive(cell.source, "fig-alt") or "figure", pictures)
            if part.startswith("```\n") and parts[-1].startswith("```\n"):  # printed by the same run: one block
                part = parts.pop().removesuffix("```") + part.removeprefix("```\n")
            parts += [part] if part else []
    return parts, pictures


def readme(check_only: bool = False) -> list[str]:
    """README.md is nbs/index.ipynb: what it says, shows and prints, with its pictures as files in nbs/images/.

    Code cells: `#| hide` leaves out all, `#| echo: false` the code; `#| fig-alt: ...` is the text of a picture."""
    if not (NBS / "index.ipynb").exists():
        return ["nbs/index.ipynb is missing"]
    parts, pictures = readme_parts()
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


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["text", "build", "run", "test", "check", "lint", "readme", "export"])
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--check", action="store_true", help="readme: compare only")
    parser.add_argument("--no-sync", action="store_true", help="check: leave out the export comparison")
    parser.add_argument("--workers", type=int, default=2, help="run, test: notebooks at a time")
    parser.add_argument("--stale", action="store_true", help="run, test: leave out notebooks whose stamp is true")
    parser.add_argument("--report", type=Path, help="run, test: a file for the results, as JSON")
    args = parser.parse_intermixed_args()
    args.paths = [p.resolve() for p in args.paths]
    return args


def main() -> int:
    args = arguments()
    if args.command == "check":
        return bool(check(sync=not args.no_sync))
    if args.command == "lint":
        found = lint()
        print("\n".join(found) or "ruff has nothing to say")
        return bool(found)
    if args.command == "readme":
        bad = readme(args.check)
        print("\n".join(bad) if args.check and bad else "README.md")
        return bool(args.check and bad)
    if args.command in ("run", "test"):
        keep = args.command == "run"
        return bool(execute_all(args.paths or all_notebooks(), args.workers, args.stale, keep, args.report))
    if args.command == "export":
        subprocess.run([tool("nbdev-export")], check=True, cwd=ROOT)
        return 0
    for path in args.paths:
        {"text": to_text, "build": build}[args.command](path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
