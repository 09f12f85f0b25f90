"""Two programs side by side in one run: interleaved rounds, medians, ratios round by round; peak memory in fresh
processes.

Machines are shared and drift, so only ratios within one run mean anything."""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false",
                  DATASETS_VERBOSITY="error")


def interleaved(variants: dict, rounds: int = 5) -> dict:
    """Run each variant once to warm up, then A B A B ...: name -> seconds of each round. A variant returns its own
    seconds, or None to be timed whole."""
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
    """Run this file's `--memory` mode elsewhere, so that one variant's peak does not hide another's; it prints one
    line of JSON."""
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


def gradients_agree(make, label: str) -> float:
    """One step of plain gradient descent from the same weights ends at the same weights: how far the steps are apart,
    as a share of their size. `make` gets a library, a folder and settings, and returns a trainer."""
    import tempfile

    import torch
    ends = []
    for library in ("TRL", "posttrain"):
        with tempfile.TemporaryDirectory() as folder:
            t = make(library, folder, optim="sgd", learning_rate=1.0, max_steps=1, lr_scheduler_type="constant",
                     max_grad_norm=1e9)
            before = [p.detach().clone() for p in t.model.parameters() if p.requires_grad]
            t.train()
            after = (p.detach() for p in t.model.parameters() if p.requires_grad)
            ends.append(torch.cat([(b - a).flatten() for b, a in zip(before, after)]))
    difference = ((ends[0] - ends[1]).norm() / ends[0].norm()).item()
    assert difference < 1e-4, f"{label}: gradients differ by {difference:.1e} of their size"
    return difference


def compare_steps(make, label: str, rounds: int, gradients: bool = True) -> None:
    """One row of a table: a step of both libraries in seconds, if their gradients agree. `make` as there."""
    import tempfile
    difference = f"{gradients_agree(make, label):.0e}" if gradients else "another objective"
    with tempfile.TemporaryDirectory() as folder:
        both = {lib: make(lib, folder) for lib in ("TRL", "posttrain")}
        seconds = interleaved({lib: timed(t) for lib, t in both.items()}, rounds)
    print_times(label, seconds, difference)


def memory_of_training(make) -> dict:
    """What training needs over what is loaded: `make` gets a folder and returns a trainer. For a fresh process."""
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(folder)
        before = current_mib()
        trainer.train()
    return {"mib": peak_mib() - before}


def print_times(label: str, seconds: dict, more: str = "", width: int = 44) -> None:
    """One row of a table: both times, their ratio, and what else is known."""
    row = f"{label:{width}}{median(seconds['TRL']):8.3f}s{median(seconds['posttrain']):10.3f}s"
    print(f"{row}   {ratio(seconds, 'TRL', 'posttrain'):22}  {more}".rstrip(), flush=True)


def memory_of_both(script: str, repeats: int, before: tuple, *after: str) -> dict:
    """MiB of each library in fresh processes, whose arguments are `before`, the library, `after`."""
    return {lib: [in_fresh_process(script, *before, lib, *after)["mib"] for _ in range(repeats)]
            for lib in ("TRL", "posttrain")}


def print_memory(label: str, mib: dict, widths=(7, 8)) -> None:
    print(f"{label:46}{median(mib['TRL']):{widths[0]}.0f}MiB{median(mib['posttrain']):{widths[1]}.0f}MiB "
          f"  {ratio(mib, 'TRL', 'posttrain')}", flush=True)


def command_line(doc: str, models: str, memory_of, bench_steps, bench_memory) -> None:
    """What a benchmark of steps and memory can be asked. `memory_of` gets the arguments of a fresh process."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="steps,memory")
    parser.add_argument("--models", default=models, help="names, separated by ;")
    parser.add_argument("--memory", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory: return print(json.dumps(memory_of(*args.memory[1:])))
    print(machine())
    names = args.models.split(";")
    if "steps" in args.only: bench_steps(args.rounds, names)
    # the pocket model needs too little for a process to tell
    if "memory" in args.only: bench_memory([name for name in names if not name.startswith("pocket")])


def old_trl(wheel: str, module: str):
    """A module of a release of TRL, from its wheel, in the place of the TRL that is installed: "trl==1.12.0"."""
    import importlib
    import tempfile
    from pathlib import Path
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "oracles"))
    from removed import fetch
    folder = tempfile.mkdtemp()
    fetch(wheel, (), Path(folder))
    sys.path.insert(0, folder)
    import trl
    assert wheel.endswith(trl.__version__)
    return importlib.import_module(module)


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
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=3 * hidden_size, num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32, num_key_value_heads=hidden_size // 64, head_dim=32,
        max_position_embeddings=2048, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None))


def machine() -> str:
    import platform

    import torch
    import transformers
    import trl
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, TRL {trl.__version__}"
    return f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, Python {platform.python_version()}, {versions}"
