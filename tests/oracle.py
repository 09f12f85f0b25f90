"""Recorded answers of live trainers of TRL, which cost a second each: what they logged, and sketches of gradients.

    theirs = oracle(name, inputs, live)     # what `live()` returned when it was recorded with these very inputs

A record counts only for the inputs that it was made with: weights, rows, options, functions, versions. With others the
live trainer is asked. Weights that training made differ from machine to machine, so `start` reads them from a file.
The live trainer is asked anyway for a tenth of the records, another one with each commit, and with POSTTRAIN_LIVE=1 for
all; then its answer must be the recorded one. `python tests/oracles/record.py` records anew.
"""
import ast
import base64
import hashlib
import inspect
import json
import math
import os
import sys
import textwrap
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import stamps
from posttrain import pocket

FOLDER = Path(__file__).parent / "oracles"
SKETCH = 64  # projections of a gradient: they tell the norm of a difference to a tenth
RECORDING, LIVE = bool(os.environ.get("POSTTRAIN_RECORD")), bool(os.environ.get("POSTTRAIN_LIVE"))
COUNTS = {"recorded": 0, "live": 0, "changed": 0}


# ---------------------------------------------------------------- what was asked
def code_of(thing) -> str:
    """The code of a function or a class, without comments, line breaks and docstrings."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            del node.body[0]
    return stamps.tree_text(tree)


def start(task: str):
    """A pocket model that knows a little of a task, the same on every machine, with its tokenizer."""
    model, stored = pocket.model(), np.load(FOLDER / f"start_{task}.npz")
    scale = float(stored["scale"])
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(stored[name].astype(np.float32) * scale))
    return model, pocket.tokenizer()


def store_start(task: str) -> None:
    """Write what `start` reads: trained weights, to eight bits behind the point."""
    weights = {name: p.detach() for name, p in pocket.start(task)[0].named_parameters()}
    scale = 2.0 ** -8
    whole = {name: (p / scale).round().numpy().astype(np.int16) for name, p in weights.items()}
    np.savez_compressed(FOLDER / f"start_{task}.npz", scale=scale, **whole)


def models_in(thing) -> list[torch.nn.Module]:
    """The models among the inputs, in their order."""
    if isinstance(thing, torch.nn.Module):
        return [thing]
    parts = [value for _, value in sorted(thing.items())] if isinstance(thing, dict) else thing
    return [model for part in parts for model in models_in(part)] if isinstance(parts, (list, tuple)) else []


def weights_of(model) -> list[float]:
    """A model's weights as a few numbers."""
    flat = torch.cat([p.detach().flatten().double() for p in model.parameters()])
    return [*sketch(flat)[:8].tolist(), flat.norm().item()]


def close_weights(a: list[float], b: list[float]) -> bool:
    """Whether two models differ by the last digit at most: noise from a random generator is not the same to the bit
    on every processor."""
    return all(abs(x - y) <= 1e-6 * b[-1] for x, y in zip(a, b))


def described(thing, within: tuple = ()) -> str:
    """Inputs as text: rows by their content, functions by their code without comments and line breaks, models by the
    names and shapes of their weights. `within` holds the functions whose surroundings are being described."""
    def inner(part): return described(part, within)
    if isinstance(thing, torch.nn.Module):
        return repr([(name, tuple(p.shape), str(p.dtype)) for name, p in thing.named_parameters()])
    if hasattr(thing, "column_names"):  # a dataset, or a stream
        return repr(list(thing))
    if isinstance(thing, dict):
        return "{" + ", ".join(f"{key}: {inner(value)}" for key, value in sorted(thing.items())) + "}"
    if isinstance(thing, (list, tuple)):
        return "[" + ", ".join(map(inner, thing)) + "]"
    if isinstance(thing, (set, frozenset)):
        return "{" + ", ".join(sorted(map(inner, thing))) + "}"
    if callable(thing):
        around = {name: value for name, value in used_by(thing).items() if not is_one_of(value, (*within, thing))}
        return code_of(thing) + described(around, (*within, thing))
    if not isinstance(thing, (str, int, float, bool, type(None))):
        raise TypeError(f"inputs of an oracle cannot hold {type(thing).__name__}: say how it is described")
    return repr(thing)


def is_one_of(value, things) -> bool:
    """Whether a value is one of the things, not merely equal to it."""
    return any(value is thing for thing in things)


def names_in(code) -> set[str]:
    """Names that a function's code uses, also in comprehensions and inner functions, which are code of their own."""
    inner = [names_in(part) for part in code.co_consts if inspect.iscode(part)]
    return set(code.co_names).union(*inner)


def functions_of(thing) -> list:
    """The functions behind a callable: the methods of a class, and what a decorator such as functools.cache wraps."""
    if inspect.isclass(thing):
        parts = [getattr(part, "fget", part) for part in vars(thing).values()]
        return [f for part in parts if not inspect.isclass(part) for f in functions_of(part)]
    chain = [getattr(thing, "__func__", thing)]
    while hasattr(chain[-1], "__wrapped__"):
        chain.append(chain[-1].__wrapped__)
    # Not what a dataclass makes, which no file holds, nor a library's part of a decorated function.
    def is_own(f): return f.__code__.co_filename == getattr(sys.modules.get(f.__module__), "__file__", None)
    return [f for f in chain if inspect.isfunction(f) and is_own(f)]


def defaults_of(function) -> list:
    """A function's default values, but for those that its code says."""
    values = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0] if values else None
    if not isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef)):  # a lambda stands within its line
        return values
    written = [*tree.args.defaults, *(node for node in tree.args.kw_defaults if node)]
    return [value for node, value in zip(written, values, strict=True) if not isinstance(node, ast.Constant)]


PLAIN = (str, int, float, list, tuple, dict, set, frozenset)


def used_by(thing) -> dict:
    """What a callable takes from around it: values of an outer function, default values, and functions, numbers, lists
    and dicts of its module; of a class also the classes of its module that it inherits from."""
    found = {}
    for function in functions_of(thing):
        around = {n: function.__globals__[n] for n in names_in(function.__code__) if n in function.__globals__}
        def belongs(value):
            here = getattr(value, "__module__", None) == function.__module__ and value is not function
            return here or isinstance(value, PLAIN)
        defaults = defaults_of(function)
        found |= {f"defaults of {function.__qualname__}": defaults} if defaults else {}
        found |= inspect.getclosurevars(function).nonlocals
        found |= {name: value for name, value in around.items() if belongs(value)}
    bases = thing.__bases__ if inspect.isclass(thing) else ()
    return found | {base.__name__: base for base in bases if base.__module__ == thing.__module__}


@cache
def versions() -> list[str]:
    import transformers
    import trl
    return [trl.__version__, transformers.__version__, torch.__version__.split("+")[0]]


# ---------------------------------------------------------------- what was answered
@cache
def directions(size: int) -> torch.Tensor:
    """Random signs, (SKETCH, size): the same on every machine."""
    bits = np.random.default_rng(0).integers(0, 2, (SKETCH, size), dtype=np.int8)
    return torch.from_numpy(2 * bits - 1).float()


def sketch(gradient: torch.Tensor) -> torch.Tensor:
    """(SKETCH,) projections. The mean square of those of a vector is about its squared norm."""
    flat = gradient.detach().flatten().double()
    return torch.stack([row.double() @ flat for row in directions(len(flat))])


@dataclass
class Sketch:
    """A recorded gradient."""
    projections: torch.Tensor  # (SKETCH,)
    size: float                # its norm

    def norm(self) -> float:
        return self.size

    def __sub__(self, gradient: torch.Tensor) -> "Sketch":
        """The difference, whose norm is estimated."""
        difference = self.projections - sketch(gradient)
        return Sketch(difference, difference.norm().item() / math.sqrt(SKETCH))

    __rsub__ = __sub__  # but for the sign, which no norm has


@dataclass
class Answer:
    """What a trainer did: the change of its weights in each step, and what it logged."""
    gradients: list = field(default_factory=list)  # tensors, or sketches of them
    logs: list[dict] = field(default_factory=list)
    eval: dict | None = None


def nine_digits(value):
    """Numbers with nine digits, also within lists and dicts."""
    if isinstance(value, dict):
        return {k: nine_digits(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [nine_digits(v) for v in value]
    return value if isinstance(value, (str, type(None))) else float(f"{value:.9g}")


NOT_OF_THE_METHOD = ("time", "per_second", "profiling", "total_flos")


def kept(row: dict | None) -> dict | None:
    """What a record keeps of a row of a log: no times, numbers with nine digits."""
    numbers = {k: v for k, v in (row or {}).items() if not any(word in k for word in NOT_OF_THE_METHOD)}
    return nine_digits(numbers) or None


def pack(answer: Answer) -> dict:
    """An answer as JSON. Numbers keep nine digits, projections the precision of float32; times are left out."""
    gradients = [[base64.b64encode(sketch(g).float().numpy().tobytes()).decode(), nine_digits(g.double().norm().item())]
                 for g in answer.gradients]
    return {"gradients": gradients, "logs": [kept(row) for row in answer.logs], "eval": kept(answer.eval)}


def unpack(record: dict) -> Answer:
    def read(text):
        return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.float32).copy()).double()
    return Answer([Sketch(read(text), norm) for text, norm in record["gradients"]], record["logs"], record["eval"])


def close_values(a, b) -> bool:
    """Whether two values of a log are one, numbers to five digits. NaN is close to nothing."""
    if isinstance(b, dict):
        return isinstance(a, dict) and a.keys() == b.keys() and all(close_values(a[key], b[key]) for key in b)
    if isinstance(b, list):
        return isinstance(a, list) and len(a) == len(b) and all(map(close_values, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= 1e-5 * max(1, abs(b))
    return a == b


def disagreement(answer: Answer, recorded: Answer) -> str:
    """Where a live answer is not the recorded one, or an empty text."""
    if (len(answer.gradients), len(answer.logs)) != (len(recorded.gradients), len(recorded.logs)):
        return "another number of steps"
    for step, (a, b) in enumerate(zip(answer.gradients, recorded.gradients), 1):
        # Written so that NaN disagrees.
        if not (a - b).norm() <= 1e-5 * max(b.norm(), 1):
            return f"step {step}: gradients differ by {(a - b).norm():.1e} of {b.norm():.1e}"
    for row, record in zip([*answer.logs, answer.eval], [*recorded.logs, recorded.eval]):
        live, record = kept(row) or {}, kept(record) or {}
        for key in sorted(live.keys() | record.keys()):
            if key not in live or key not in record or not close_values(live[key], record[key]):
                return f"{key}: {live.get(key, 'nothing')} live, {record.get(key, 'nothing')} recorded"
    return ""


# ---------------------------------------------------------------- records
@cache
def records(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


@cache
def turn() -> int:
    return stamps.turn(Path(__file__).parent.parent)


def is_its_turn(name: str) -> bool:
    """A tenth of the names, another one with each commit."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == turn() % 10


def save(file: Path, name: str, record: dict) -> None:
    known = records(file)
    known[name] = record
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(known[key])}" for key in sorted(known))
    file.write_text("{\n" + lines + "\n}\n", encoding="utf-8")


def oracle(name: str, inputs, live, file: str) -> Answer:
    """The answer of `live()`, an Answer, for these inputs; `file` holds the records of one file of tests."""
    path = FOLDER / f"{file}.json"
    key, weights = stamps.short_hash(described(inputs), *versions()), [weights_of(m) for m in models_in(inputs)]
    known = records(path).get(name)
    if RECORDING:
        answer = live()
        save(path, name, {"inputs": key, "weights": nine_digits(weights), **pack(answer)})
        return answer
    matches = known is not None and known["inputs"] == key and all(map(close_weights, weights, known["weights"]))
    if matches and not LIVE and not is_its_turn(name):
        COUNTS["recorded"] += 1
        return unpack(known)
    COUNTS["live" if matches else "changed"] += 1
    answer = live()
    if matches and (why := disagreement(answer, unpack(known))):
        raise AssertionError(f"the record of {name!r} in {path.name} is not what TRL says now ({why}). "
                             "Find out why, then run `python tests/oracles/record.py`")
    return answer
