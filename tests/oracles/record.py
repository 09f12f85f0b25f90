"""Ask the live trainers of TRL for every recorded answer again: `python tests/oracles/record.py` (some minutes).

It runs the parity tests, which ask them for what they need, with POSTTRAIN_RECORD=1. See tests/oracle.py. With
`--start` it also makes the weights anew from which the models of these tests start.
"""
import os
import subprocess
import sys
from pathlib import Path

FILES = ("test_parity", "test_dpo_parity", "test_grpo_parity", "test_moe", "test_answers_parity")


def main() -> int:
    here = Path(__file__).resolve().parent
    for name in FILES:
        (here / f"{name}.json").unlink(missing_ok=True)
    if "--start" in sys.argv[1:]:
        sys.path.insert(0, str(here.parent))
        import oracle
        for task in ("add", "sort", "reverse"):
            oracle.store_start(task)
    tests = [str(here.parent / f"{name}.py") for name in FILES]
    env = {**os.environ, "POSTTRAIN_RECORD": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=here.parent.parent, env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
