"""README.md: every snippet and every command of it runs, verbatim, in an empty folder, on the pocket model."""
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(python|bash|yaml)\n(.*?)^```", README, re.M | re.S)
# What needs a clone, a network or an environment of its own. What they name is checked, see below.
NEEDS_A_CLONE = re.compile(r"^(git clone|make|pip install) ", re.M)


def snippets():
    """The snippets that are programs; the function of DFT is shown from the package's source."""
    return [code for kind, code in FENCES if kind == "python" and not code.startswith("def ")]


def commands():
    """The command lines, each with the files that the README writes before it."""
    lines = [line for kind, code in FENCES if kind == "bash" and not NEEDS_A_CLONE.search(code)
             for line in code.splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def is_for_a_gpu(line): return "Qwen/" in line


def environment():
    """Offline, one thread, and the package of this checkout as the `posttrain` command."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}


def run(line, folder):
    """A line of a shell, where `posttrain` is this checkout's."""
    line = re.sub(r"^posttrain\b", f"{sys.executable} -m posttrain", line)
    return subprocess.run(line, shell=True, cwd=folder, capture_output=True, text=True, env=environment(), timeout=300)


def test_there_is_something_to_run():
    assert len(snippets()) == 4 and len(commands()) == 7 and len([k for k, _ in FENCES if k == "yaml"]) == 1


@pytest.mark.parametrize("code", snippets(), ids=[re.search(r"(\w+)Trainer", code)[0] for code in snippets()])
def test_a_snippet_runs_in_an_empty_folder(code, tmp_path):
    (tmp_path / "snippet.py").write_text(code, encoding="utf-8")
    done = subprocess.run([sys.executable, "snippet.py"], cwd=tmp_path, capture_output=True, text=True,
                          env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    if shares := re.findall(r"(\d+)%", done.stdout): assert int(shares[-1]) > int(shares[0]) + 50
    if rewards := column("reward", done.stdout): assert rewards[-1] > rewards[0] + .1, done.stdout


def column(name, printed):
    """The numbers below a word of a table's first line; none where there is no such word."""
    head, *rows = [line.split() for line in printed.splitlines() if line.startswith(" ")] or [[]]
    return [float(row[head.index(name)]) for row in rows] if name in head else []


def test_the_commands_run_one_after_the_other(tmp_path):
    """Each leaves a model; the one for a GPU stops at the model, which is not here, in one message."""
    for kind, text in FENCES:
        if kind == "yaml": (tmp_path / re.match(r"# (\S+)", text)[1]).write_text(text, encoding="utf-8")
    for line in filter(lambda line: not is_for_a_gpu(line), commands()):
        done = run(line, tmp_path)
        assert done.returncode == 0 and "Warning" not in done.stderr, f"{line}\n{done.stderr}"
    assert all((tmp_path / name / "model.safetensors").exists() for name in ("sft", "dpo", "kto", "grpo", "out"))


def test_the_command_for_a_gpu_names_flags_that_there_are(tmp_path):
    line, = filter(is_for_a_gpu, commands())
    done = run(line, tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "--model_name_or_path Qwen/" in done.stderr or "which is not installed" in done.stderr, done.stderr


def test_what_needs_a_clone_names_what_is_there():
    lines = [line for kind, code in FENCES if kind == "bash" and NEEDS_A_CLONE.search(code)
             for line in code.splitlines()]
    targets = re.findall(r"^make (\w+)", "\n".join(lines), re.M)
    makefile = (ROOT / "Makefile").read_text()
    assert targets == ["demo", "test"] and all(re.search(rf"^{target}:", makefile, re.M) for target in targets)
    assert (ROOT / "constraints.txt").exists() and any("-c constraints.txt ." in line for line in lines)


def test_the_shown_function_is_the_packages():
    from posttrain.offline.dft import dft
    assert inspect.getsource(dft).strip() in [code.strip() for kind, code in FENCES if kind == "python"]
