"""Two programs side by side in one run: interleaved rounds, medians, the ratio round by round; peak memory in fresh processes.

Machines are shared and drift, so only ratios within one run mean anything."""
import json
import os
import statistics
import subprocess
import sys
import time

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false", DATASETS_VERBOSITY="error")


def interleaved(variants: dict, rounds: int = 5) -> dict:
    """Run each variant once to warm up, then A B A B ...: name -> seconds of each round. A variant returns its own seconds, or None to be timed whole."""
    seconds = {name: [] for name in variants}
    for i in range(rounds + 1):
        for name, f in variants.items():
            start = time.perf_counter()
            own = f()
            if i: seconds[name].append(own if own is not None else time.perf_counter() - start)
    return seconds


def ratio(seconds: dict, peer: str, ours: str) -> str:
    """`peer / ours`, of seconds or of MiB: median of the rounds' ratios, and their range."""
    pairs = [a / b for a, b in zip(seconds[peer], seconds[ours])]
    return f"{statistics.median(pairs):5.2f} [{min(pairs):.2f}, {max(pairs):.2f}]"


def median(values) -> float:
    return statistics.median(values)


def _status_mib(field: str) -> float:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(field)) / 1024


def peak_mib() -> float:
    """Largest resident size since the last `current_mib()` (getrusage would also remember the parent's)."""
    return _status_mib("VmHWM")


def current_mib() -> float:
    """Resident size now; starts the measurement of a new peak."""
    with open("/proc/self/clear_refs", "w") as f: f.write("5")
    return _status_mib("VmRSS")


def in_fresh_process(script: str, *args: str) -> dict:
    """Run this file's `--memory` mode elsewhere, so that one variant's peak does not hide another's; it prints one line of JSON."""
    done = subprocess.run([sys.executable, script, "--memory", *args], capture_output=True, text=True)
    if done.returncode: raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def machine() -> str:
    import platform

    import torch
    import transformers
    import trl
    return f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, TRL {trl.__version__}"
