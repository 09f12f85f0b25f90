"""Stamps: a short hash of everything that the results of a notebook depend on.

A stamp covers the notebook's code, the sources of all modules of the package that it imports (also inside functions,
and what those import), the files that it says it reads (`#| reads: PATTERN ...`), constraints.txt and Python's minor
version. Comments and line breaks do not count, unless the notebook or the module reads sources (`inspect.getsource`).
`nbs/stamps.txt` holds one line for each notebook: its path, the stamp of its last run, and the seconds that this took.
"""
import ast
import hashlib
import io
import json
import re
import subprocess
import sys
import threading
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date
from functools import cache, cached_property
from pathlib import Path

# Cells of IPython that are not Python, or not only.
MAGIC = re.compile(r"^\s*[%!]", re.M)
HELP = re.compile(r"^\s*\?{1,2}|\?{1,2}[ \t]*$", re.M)
DIRECTIVE = re.compile(r"^#\|.*$", re.M)
# A line of the shell that starts a program with the package in it. `pip install` in a lesson's first cell does not.
STARTS_A_PROGRAM = re.compile(r"^\s*(?:!|%%(?:bash|sh|script)|%sx)(?!.*pip install).*", re.M)
# Code that starts programs, or runs text as code.
RUNS_CODE = re.compile(r"\b(subprocess|multiprocessing|runpy)\b|\bos\.(system|popen|spawn|exec|posix_spawn)"
                       r"|(?<![.\w])(exec|eval)\s*\(|^\s*%run\b", re.M)
READS_SOURCES = re.compile(r"\b(getsource|getsourcelines|getsourcefile|show_source|getcomments|findsource|linecache|"
                           r"__file__|co_firstlineno)\b|\?\?[ \t]*$|^\s*\?\?|^\s*%(psource|pycat|pfile)\b", re.M)
# Fields of a syntax tree that say nothing that the rest does not say.
NOT_CODE = {"ctx", "kind", "type_ignores", "type_comment"}
# The tables of the package's __init__.py: a public name counts for those who use it, not for everybody.
TABLES = ("_HOMES", "_ROOMS", "__all__")


def short_hash(*parts: str) -> str:
    return hashlib.sha256("\n\0\n".join(parts).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- code without its comments and line breaks
def tree_text(node) -> str:
    """A syntax tree as text, the same for every version of Python: what is empty is left out, and so are positions."""
    if isinstance(node, ast.AST):
        fields = [f"{name}={tree_text(value)}" for name, value in vars(node).items()
                  if name in node._fields and name not in NOT_CODE and value is not None and value != []]
        return f"{type(node).__name__}({','.join(fields)})"
    return f"[{','.join(map(tree_text, node))}]" if isinstance(node, list) else repr(node)


PARSING = threading.Lock()


def parse(source: str) -> ast.Module:
    """As ast.parse, one thread at a time: Python 3.11 counts the depth of all trees in one number (gh-106905)."""
    with PARSING:
        return ast.parse(source)


@cache
def parsed(source: str) -> ast.Module | None:
    try:
        return parse(source)
    except SyntaxError:
        return None


def is_quiet(cell: str) -> bool:
    """Whether IPython shows no output of a cell: its last token, before any comment, is a semicolon."""
    if ";" not in cell:
        return False
    nothing = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [t.string for t in tokenize.generate_tokens(io.StringIO(cell).readline) if t.type not in nothing]
    return tokens[-1:] == [";"]


def normalised(cell: str) -> str:
    """A cell's code as its syntax tree, beside its directives; a cell with magics as it stands."""
    tree = None if MAGIC.search(cell) else parsed(cell)
    if tree is None:
        return cell
    quiet = ";" if is_quiet(cell) else ""
    return "\n".join([*DIRECTIVE.findall(cell), tree_text(tree), quiet])


def code_stamp(cells: list[str]) -> str:
    """The hash of a notebook's own code; `cells` are the sources of its code cells."""
    text = any(READS_SOURCES.search(c) for c in cells)
    return short_hash(*(cells if text else map(normalised, cells)))


# ---------------------------------------------------------------- imports
def dotted(node: ast.Attribute) -> str | None:
    """`a.b.c` as text, or None where it does not begin with a name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


@dataclass
class Imports:
    """What of the package a piece of code may import."""
    # Dotted, of modules or of what stands in them; with ".*" where a room is held, whose modules are then attributes.
    names: set[str] = field(default_factory=set)
    anything: bool = False                        # which modules cannot be told from the code

    def update(self, other: "Imports") -> None:
        self.names |= other.names
        self.anything |= other.anything


def from_import(node: ast.ImportFrom, package: str) -> list[str]:
    """The dotted names of `from module import names`, relative ones seen from `package`. Each name may be a room."""
    base = node.module or ""
    if node.level:
        above = package.split(".")[:len(package.split(".")) - node.level + 1]
        base = ".".join([*above, base] if base else above)
    return [base, *(f"{base}.{alias.name}".removesuffix(".*") + ".*" for alias in node.names)]


def imports_by_name(function: ast.expr) -> bool:
    """Whether this function is import_module or __import__."""
    return getattr(function, "attr", getattr(function, "id", "")) in ("import_module", "_import_module", "__import__")


def imports_of(tree: ast.Module, top: str, package: str) -> Imports:
    """What `tree`, code of a module in `package`, may import of the package `top`: statements, attributes, calls."""
    found, nodes = Imports(), list(ast.walk(tree))
    inside_attribute = {id(n.value) for n in nodes if isinstance(n, ast.Attribute)}
    for node in nodes:
        if isinstance(node, ast.Import):
            found.names |= {alias.name + (".*" if alias.asname else "") for alias in node.names}
            found.anything |= any(alias.name == top and alias.asname for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.names |= set(from_import(node, package))
        elif isinstance(node, ast.Attribute) and (name := dotted(node)):
            found.names.add(name if id(node) in inside_attribute else f"{name}.*")
        elif isinstance(node, ast.Name) and node.id == top:
            # The package itself is handed on, as in getattr(package, name).
            found.anything |= id(node) not in inside_attribute
        elif isinstance(node, ast.Call) and imports_by_name(node.func):
            name = node.args[0] if node.args else None
            if isinstance(name, ast.Constant):
                found.names.add(str(name.value))
            else:
                found.anything = True
    found.names = {name for name in found.names if name.split(".")[0] == top}
    found.anything |= any(name.split(".")[1:2] == ["*"] or name.split(".")[1] in TABLES
                          for name in found.names if "." in name)
    return found


def imports_of_cells(cells: list[str], top: str) -> Imports:
    """What a notebook's code may import. One that starts programs may import anything."""
    found = Imports()
    for cell in cells:
        text = MAGIC.sub("#", cell) if MAGIC.search(cell) else cell
        tree = parsed(text) or parsed(HELP.sub("", text))
        if tree is None:
            return Imports(anything=True)
        found.update(imports_of(tree, top, top))
        exported = re.search(r"^#\|\s*export", cell, re.M)
        starts = (STARTS_A_PROGRAM.search(cell) and top in cell) or (RUNS_CODE.search(cell) and not exported)
        found.anything |= bool(starts)
    return found


# ---------------------------------------------------------------- modules
@dataclass
class Module:
    """One file of the package, parsed once."""
    name: str  # dotted
    path: Path
    top: str   # the package's name

    @cached_property
    def source(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return parse(self.source)

    @cached_property
    def imports(self) -> Imports:
        package = self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]
        # The tables of the top package lead to every module; which of them is used is found where the name is used.
        return Imports() if self.name == self.top else imports_of(self.tree, self.top, package)

    @cached_property
    def tables(self) -> dict:
        """The literal tables of a package's __init__.py, by name."""
        found = {}
        for node in self.tree.body:
            name = node.targets[0].id if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) else ""
            if name in ("_HOMES", "_ROOMS"):
                found[name] = ast.literal_eval(node.value)
        return found

    @cached_property
    def code(self) -> str:
        """The hash of its code, without comments and line breaks; without tables, in the package's __init__.py."""
        body = self.tree.body
        if self.name == self.top:
            body = [n for n in body if not (isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) in TABLES)]
        return short_hash(tree_text(body))

    @cached_property
    def text(self) -> str:
        return short_hash(self.source)


class Dependencies:
    """Stamps of notebooks. Each module is read and parsed once, so that all notebooks take a second or two."""

    def __init__(self, root: Path, package: Path):
        self.root, self.top = root, package.name
        self.modules = {name: Module(name, path, self.top) for path in sorted(package.rglob("*.py"))
                        if (name := self.name_of(path, package)) != f"{self.top}._modidx"}

    @staticmethod
    def name_of(path: Path, package: Path) -> str:
        parts = path.relative_to(package.parent).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def modules_of(self, name: str) -> set[str]:
        """The modules that are loaded for a dotted name: those on its way, and the home of a public name; for a room
        that is held (`room.*`) all of its modules."""
        name, held = name.removesuffix(".*"), name.endswith(".*")
        parts = name.split(".")
        found = {".".join(parts[:n]) for n in range(1, len(parts) + 1)} & set(self.modules)
        top = self.modules.get(self.top)
        if top and len(parts) > 1 and (home := top.tables.get("_HOMES", {}).get(parts[1])):
            found |= self.modules_of(f"{self.top}.{home}")
        if held and name != self.top:
            found |= {module for module in self.modules if module.startswith(f"{name}.")}
        return found

    def closure(self, imports: Imports, own: str | None = None) -> set[str]:
        """All modules that these imports lead to, but `own`, which the notebook itself makes."""
        if imports.anything:
            return set(self.modules) - {own}
        found, todo = set(), set().union(*map(self.modules_of, imports.names))
        while todo:
            name = todo.pop()
            found.add(name)
            more = self.modules[name].imports if name != own else Imports()
            if more.anything:
                return set(self.modules) - {own}
            todo |= set().union(*map(self.modules_of, more.names)) - found
        return found - {own}

    def read_as_text(self, modules: set[str], imports: Imports, cells: list[str]) -> set[str]:
        """Those modules whose text counts: a notebook or a module that reads sources reads its own or its imports'."""
        found = set()
        if any(READS_SOURCES.search(c) for c in cells):
            found |= set().union(*map(self.modules_of, imports.names))
        for name in modules:
            if READS_SOURCES.search(self.modules[name].source):
                found |= {name}.union(*map(self.modules_of, self.modules[name].imports.names))
        return found & modules - {self.top}

    def files(self, path: Path, cells: list[str]) -> list[str]:
        """Hashes of the files that `#| reads:` names, seen from the notebook's folder; of notebooks, of their prose."""
        found = []
        for pattern in " ".join(re.findall(r"^#\|\s*reads:(.*)$", "\n".join(cells), re.M)).split():
            for file in sorted(path.parent.glob(pattern)):
                text = file.read_bytes().decode(errors="replace")
                if file.suffix == ".ipynb":
                    prose = [c["source"] for c in json.loads(text)["cells"] if c["cell_type"] == "markdown"]
                    text = "\n".join("".join(source) for source in prose)
                found += [file.relative_to(self.root).as_posix(), short_hash(text)]
        return found

    def stamp(self, path: Path, cells: list[str]) -> str:
        """The stamp of the notebook at `path`, with the sources of its code cells."""
        exports = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(cells), re.M)
        own = f"{self.top}.{exports[1]}".removesuffix(".__init__") if exports else None
        imports = imports_of_cells(cells, self.top)
        modules = self.closure(imports, own)
        as_text = self.read_as_text(modules, imports, cells)
        parts = [code_stamp(cells)]
        for name in sorted(modules):
            module = self.modules[name]
            parts += [name, module.text if name in as_text else module.code]
        return short_hash(*parts, *self.files(path, cells), *self.versions)

    @cached_property
    def versions(self) -> list[str]:
        pins = self.root / "constraints.txt"
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        return [pins.read_text(encoding="utf-8") if pins.exists() else "", python]


# ---------------------------------------------------------------- the file of stamps
@dataclass
class Record:
    """A notebook's last run."""
    stamps: set[str]  # more than one after a merge of branches that both ran it
    seconds: float


def read_records(file: Path) -> dict[str, Record]:
    records = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        if line.startswith("#") or len(line.split()) != 3:
            continue
        name, stamp, seconds = line.split()
        old = records.setdefault(name, Record(set(), 0.0))
        old.stamps.add(stamp)
        old.seconds = max(old.seconds, float(seconds))
    return records


def write_records(file: Path, records: dict[str, Record]) -> None:
    head = "# Written by `python tools/notebooks.py run`: notebook, stamp of its last run, seconds that this took."
    lines = [f"{name} {stamp} {record.seconds:g}" for name, record in sorted(records.items())
             for stamp in sorted(record.stamps)]
    file.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")


def rounded(seconds: float, before: float | None) -> float:
    """Seconds for the record. A run that took about as long as the one before leaves the record as it is."""
    return before if before and .5 < seconds / before < 2 else round(seconds, 1)


# ---------------------------------------------------------------- the rotating tenth
def turn(root: Path) -> int:
    """A number that goes up by one with each commit; with each day, where there is no git or not the whole history."""
    def git(*words):
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""
    shallow = git("rev-parse", "--is-shallow-repository") != "false"
    return date.today().toordinal() if shallow else int(git("rev-list", "--count", "HEAD") or 0)


def tenth(names: Iterable[str], turn: int) -> set[str]:
    """A tenth of the names: ten turns in a row pick each of them once."""
    return {name for place, name in enumerate(sorted(names)) if place % 10 == turn % 10}
