"""Two programs side by side in one run: interleaved rounds, medians, and the ratio round by round.

Peaks of memory are measured in fresh processes. Machines are shared and drift, so only ratios within one run mean
anything.
"""
import json
import os
import statistics
import subprocess
import sys
import time

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false",
                  DATASETS_VERBOSITY="error")


def interleaved(variants: dict, rounds: int = 5) -> dict:
    """Run each variant once to warm up, then A B A B ...: name -> seconds of each round.

    A variant returns its own seconds, or None to be timed whole.
    """
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
    """Run this file's `--memory` mode elsewhere, so that one variant's peak does not hide another's.

    That mode prints one line of JSON.
    """
    done = subprocess.run([sys.executable, script, "--memory", *args], capture_output=True, text=True)
    if done.returncode: raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


class Steps:
    """Seconds from the end of one step to the end of the next, data loading included; `.callback` goes to a trainer."""
    def __init__(self):
        from transformers import TrainerCallback
        ends = self.ends = []
        class Callback(TrainerCallback):
            def on_step_end(self, *args, **kw): ends.append(time.perf_counter())
        self.callback = Callback()

    def of(self, trainer) -> float:
        """Train once more; the median step. The first is not counted."""
        self.ends.clear()
        trainer.train()
        return statistics.median(b - a for a, b in zip(self.ends, self.ends[1:]))


def timed(trainer):
    """A function that trains once more and returns the median step."""
    steps = Steps()
    trainer.add_callback(steps.callback)
    return lambda: steps.of(trainer)


def memory_of_training(make) -> dict:
    """What training needs over what is loaded: `make` gets a folder and returns a trainer. For a fresh process."""
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(folder)
        before = current_mib()
        trainer.train()
    return {"mib": peak_mib() - before}


def print_memory(label: str, mib: dict, widths=(7, 8)) -> None:
    print(f"{label:46}{median(mib['TRL']):{widths[0]}.0f}MiB{median(mib['posttrain']):{widths[1]}.0f}MiB   "
          f"{ratio(mib, 'TRL', 'posttrain')}", flush=True)


def print_seconds(label: str, seconds: dict, more: str = "") -> None:
    of_ratio = ratio(seconds, "TRL", "posttrain")
    print(f"{label:44}{median(seconds['TRL']):8.3f}s{median(seconds['posttrain']):10.3f}s   "
          + (f"{of_ratio:22}  {more}" if more else of_ratio), flush=True)


def silence(trainer):
    """No table, no bar."""
    for c in list(trainer.callback_handler.callbacks):
        if type(c).__name__ in ("PrinterCallback", "Progress", "ProgressCallback"): trainer.remove_callback(c)
    return trainer


def qwen3(vocab_size: int, hidden_size: int, layers: int):
    """A Qwen3 with random weights."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=3 * hidden_size, num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32, num_key_value_heads=hidden_size // 64, head_dim=32,
        max_position_embeddings=2048, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    return Qwen3ForCausalLM(config)


def machine() -> str:
    import platform

    import torch
    import transformers
    import trl
    return (f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
            f"torch {torch.__version__}, transformers {transformers.__version__}, TRL {trl.__version__}")
