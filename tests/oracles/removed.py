"""Record what trainers computed that TRL has removed since: `python tests/oracles/removed.py` (a minute).

Each method's last wheel is downloaded without its dependencies and runs beside the installed libraries, in a process
of its own. The tests compare with the numbers that are written here, in tests/oracles/NAME.json.
"""
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
#: what is recorded -> the wheel, what else it needs, and the test file with its CASES and `theirs(case, folder)`
WHEELS = {"bco": ("trl==1.13.0", ("scikit-learn", "joblib", "scipy", "threadpoolctl", "narwhals"),
                  "test_bco"),
          "comparing": ("trl==1.13.0", (), "test_comparing_parity"),
          "ppo": ("trl==1.12.0", ("rich", "markdown-it-py", "mdurl", "pygments", "pandas"), "test_ppo"),
          "prm": ("trl==1.13.0", (), "test_prm")}


def fetch(wheel: str, needs: tuple[str, ...], folder: Path) -> None:
    """Unpack a wheel, and install what it needs beside it."""
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "download", "--quiet", "--no-deps", "--dest", folder / "wheels", wheel], check=True)
    for path in (folder / "wheels").glob("*.whl"):
        zipfile.ZipFile(path).extractall(folder)
    missing = [name for name in needs if subprocess.run([*pip, "show", "--quiet", name]).returncode]
    if missing:
        subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", folder, *missing], check=True)


def answers(test: str) -> dict:
    """In the process that has the old wheel: case -> gradient and log."""
    sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent / "tools")]
    from importlib import import_module

    from oracle import sketch
    module, recorded = import_module(test), {}
    for case in module.CASES:
        with tempfile.TemporaryDirectory() as folder:
            answer = module.theirs(case, folder)
        gradient = answer.gradients[0]
        recorded[case] = {"norm": gradient.norm().item(), "projections": sketch(gradient).tolist(),
                          "log": answer.logs[0]}
    return recorded


def main() -> int:
    if sys.argv[1:2] == ["--of"]:
        name = sys.argv[2]
        (HERE / f"{name}.json").write_text(json.dumps(answers(WHEELS[name][2]), indent=1) + "\n")
        return 0
    for name in sys.argv[1:] or WHEELS:
        wheel, needs, _ = WHEELS[name]
        with tempfile.TemporaryDirectory() as folder:
            fetch(wheel, needs, Path(folder))
            path = os.pathsep.join([folder, str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
            env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
            subprocess.run([sys.executable, __file__, "--of", name], env=env, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
