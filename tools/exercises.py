"""The exercises of a lesson: one protocol for all, which `check` of tools/notebooks.py holds them to.

They stand under `## Exercises`, and the only one of a small lesson under `## Exercise`.

An exercise is five cells: the task, its folded checker, an open cell that calls the checker, the solution, and a folded
cell which asserts that the checker accepts the solution and refuses the usual wrong answers."""
import ast
import re
import symtable

from cells import directive

AT_LEAST = 3
# What stands under the heading: the whole protocol, as a learner has to know it.
INTRODUCTION = ("Each exercise has an open cell. Replace the `...` there, or repair the code, and run the cell: "
                "it says `right`, or what is not right yet.")
INTRODUCTION_OF_ONE = INTRODUCTION.replace("Each exercise", "The exercise")


def section(cells: list) -> list:
    """The cells from `## Exercises` or `## Exercise` up to the next heading of this level."""
    starts = [i for i, cell in enumerate(cells) if has_heading(cell, "Exercises?\\b.*")]
    if not starts: return []
    ends = (i for i, cell in enumerate(cells) if i > starts[0] and has_heading(cell))
    return cells[starts[0]:next(ends, len(cells))]


def has_heading(cell, name: str = ".+") -> bool:
    return cell.cell_type == "markdown" and bool(re.search(rf"^## {name}$", cell.source, re.M))


def is_hidden(cell) -> bool:
    """Does it hold what a learner must not see at once? `tools/cells.py` folds it."""
    return directive(cell.source, "hide") == ""


def functions(cell) -> dict[str, ast.FunctionDef]:
    """The functions that a cell defines at its top, by name."""
    try: body = ast.parse(cell.source).body
    except SyntaxError: return {}  # a line for the shell
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


def is_checker(function: ast.FunctionDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "checker" for d in function.decorator_list)


def names(cell) -> tuple[set[str], set[str]]:
    """The names that a cell defines at its top, and those that it takes from other cells."""
    try: table = symtable.symtable(cell.source, "cell", "exec")
    except SyntaxError: return set(), set()  # a line for the shell
    defined = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}

    def looked_up(scope):
        used = [s for s in scope.get_symbols() if s.is_referenced() and (scope is table or s.is_global())]
        return {s.get_name() for s in used}.union(*map(looked_up, scope.get_children()))
    return defined, looked_up(table) - defined


def borrowed(cells: list) -> set[str]:
    """Names of open cells, which the learner may change, that a later folded cell uses."""
    code, found, open_names = [cell for cell in cells if cell.cell_type == "code"], set(), set()
    for cell in code:
        defined, used = names(cell)
        if is_hidden(cell): found |= used & open_names
        else: open_names |= defined
    return found


def numbers(cells: list) -> list[int]:
    """The exercises that begin in these cells, as in `**2. Find the planted bug.** ...`."""
    texts = (cell.source.split("## Exercise")[-1] for cell in cells if cell.cell_type == "markdown")
    return [int(n) for text in texts for n in re.findall(r"^\*\*(\d+)\. ", text, re.M)]


def wrong_exercises(cells: list, introduces_a_trainer: bool = False) -> list[str]:
    """What is wrong with the exercises of a notebook; nothing where it has none."""
    cells = section(cells)
    if not cells: return []
    found, bad, has_one = numbers(cells), [], has_heading(cells[0], "Exercise")
    introduction = INTRODUCTION_OF_ONE if has_one else INTRODUCTION
    if introduction not in cells[0].source:
        bad.append(f"the exercises must begin with the sentences of tools/exercises.py: {introduction}")
    if has_one and len(found) != 1: bad.append(f"## Exercise has {len(found)} exercises, expected one")
    if not has_one and len(found) < AT_LEAST:
        bad.append(f"## Exercises has {len(found)} exercises, a lesson has at least {AT_LEAST}")
    if found != list(range(1, len(found) + 1)): bad.append(f"exercises are numbered {found}, not from 1 on")
    if introduces_a_trainer and not any(re.search(r"^\*\*\d+\. Build it\.\*\*", cell.source, re.M) for cell in cells):
        bad.append("a notebook that introduces a trainer needs an exercise `**N. Build it.**`: its loss, from blank")
    if taken := borrowed(cells):
        bad.append(f"folded cells of ## Exercises use {', '.join(sorted(taken))} from an open cell, where a learner "
                   "may write anything: define it in the folded cell")
    return bad + [fault for n in found for fault in faults(cells, n)]


def faults(cells: list, n: int) -> list[str]:
    """What exercise n lacks."""
    name, code = f"check_{n}", [cell for cell in cells if cell.cell_type == "code"]
    defining = [cell for cell in code if name in functions(cell)]
    calls = [cell for cell in code if re.search(rf"\b{name}\(", cell.source) and cell not in defining]
    answered = [cell for cell in calls if not is_hidden(cell)]
    proofs = [cell for cell in calls if is_hidden(cell) and '== "right"' in cell.source and "refused(" in cell.source]
    solutions = [cell for cell in cells if cell.cell_type == "markdown" and "<summary>Solution" in cell.source]
    told = f"exercise {n}"
    if not defining: return [f"{told} has no checker: a folded cell with `@checker` above `def {name}`"]
    bad, check = [], functions(defining[0])[name]
    if not is_checker(check): bad.append(f"{name} lacks `@checker` (posttrain.explore.exercises)")
    if silent := [a.lineno for a in ast.walk(check) if isinstance(a, ast.Assert) and a.msg is None]:
        bad.append(f"{name} has an assert without a message that helps, in line {silent[0]} of its cell")
    if not is_hidden(defining[0]): bad.append(f"{name} stands open and may give the answer away: begin with #| hide")
    if not answered: bad.append(f"{told} has no open cell that calls {name}")
    if not proofs:
        bad.append(f"{told} has no folded cell that asserts {name}(the solution) == \"right\" and refused(...)")
    if bad: return bad
    places = [cells.index(part[0]) for part in (defining, answered, proofs)]
    if places != sorted(places): bad.append(f"{told} must come as checker, open cell, solution, proof")
    if not any(places[1] < cells.index(solution) < places[2] for solution in solutions):
        bad.append(f"{told} has no `<details><summary>Solution</summary>` between its open cell and the proof")
    if any("right" == str(text).strip().strip("'") for cell in answered for text in outputs(cell)):
        bad.append(f"{told} is answered already: its open cell must leave the answer to the learner")
    return bad


def outputs(cell) -> list[str]:
    return [out.get("text") or out.get("data", {}).get("text/plain", "") for out in cell.outputs]
