"""Ask the live trainers of TRL for every recorded answer again: `python tests/oracles/record.py` (some minutes).

It runs the parity tests, which ask them for what they need, with POSTTRAIN_RECORD=1. See tests/oracle.py.
"""
import os
import subprocess
import sys
from pathlib import Path

FILES = ("test_parity", "test_dpo_parity", "test_grpo_parity")


def main() -> int:
    here = Path(__file__).resolve().parent
    for name in FILES:
        (here / f"{name}.json").unlink(missing_ok=True)
    tests = [str(here.parent / f"{name}.py") for name in FILES]
    env = {**os.environ, "POSTTRAIN_RECORD": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=here.parent.parent, env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
