"""Learning from rewards, for real: the pocket model finds out how to reverse digits, with our sampler and with vLLM. Seed 0 is the demo's (nbs/index.ipynb); that nothing is learned without a baseline is asserted in nbs/online/01_grpo.ipynb."""
import io
import os
import subprocess
import sys
import time

import pytest
import torch

from posttrain import GRPOTrainer, pocket
from posttrain.cli import demo_config
from posttrain.rollout.rewards import exact_match_reward
from posttrain.training.progress import Progress


def learn(seed, folder, steps=260, **settings):
    "Greedy accuracy before and after, the seconds that training took, and the trainer."
    model, tokenizer = pocket.start("reverse")
    test = pocket.dataset("reverse", "prompt_only", n=300, seed=2, split="test")
    config = demo_config(str(folder), steps, seed)
    for name, value in dict(dict(beta=0.0, disable_tqdm=True), **settings).items(): setattr(config, name, value)
    before, start = pocket.accuracy(model, tokenizer, test), time.time()
    running = GRPOTrainer(model, exact_match_reward, config, train_dataset=pocket.dataset("reverse", "prompt_only", n=8000, seed=1), processing_class=tokenizer, callbacks=[Progress(stream=io.StringIO())])
    running.train()
    return before, pocket.accuracy(running.model, tokenizer, test), time.time() - start, running


@pytest.mark.parametrize("seed", [1, 2])
def test_grpo_teaches_the_pocket_model(seed, tmp_path):
    before, after, seconds, trainer = learn(seed, tmp_path)
    print(f"seed {seed}: {before:.2f} -> {after:.2f} in {seconds:.0f} s, {trainer.stream.sampled} completions")
    assert before < 0.25 and after >= 0.85
    assert all(abs(row["ratio/max"] - 1) < 1e-4 and abs(row["ratio/min"] - 1) < 1e-4 for row in trainer.state.log_history if "ratio/max" in row)


VLLM = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
from test_online import learn
from posttrain import pocket
mode, folder = sys.argv[1:]
def run(**settings):
    before, after, seconds, trainer = learn(0, folder, steps=60, dynamic_sampling=True, **settings)
    rows = [r for r in trainer.state.log_history if "reward" in r]
    gaps = [r["sampling/sampling_logp_difference/max"] for r in rows if "sampling/sampling_logp_difference/max" in r]
    print("RESULT", before, after, rows[0]["reward"], rows[-1]["reward"], max(gaps, default=-1), flush=True)
if mode == "own": run()
elif mode == "colocate": run(use_vllm=True)
else:
    from posttrain.rollout.vllm import serve
    with serve(pocket.start_path("reverse"), dtype="float32", max_model_len=64) as server: run(use_vllm=True, vllm_mode="server", vllm_server_base_url=server.url)
"""


def test_vllm_earns_the_same_reward(tmp_path):
    "Colocated and server, the real vLLM: the reward after 60 steps is that of our own sampler within noise."
    reached = {}
    for mode in ("own", "colocate", "server"):
        out = subprocess.run([sys.executable, "-W", "ignore", "-c", VLLM, mode, str(tmp_path)], capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
        lines = [line.split()[1:] for line in out.stdout.splitlines() if line.startswith("RESULT")]
        assert lines, out.stdout[-2000:] + out.stderr[-3000:]
        before, after, first, last, gap = map(float, lines[0])
        reached[mode] = last
        print(mode, before, after, first, last, gap)
        assert after > before + 0.08 and last > first + 0.05
        assert gap == -1 if mode == "own" else 0 <= gap < 1e-3, gap
    noise = 4 * (2 * 0.25 / (4 * 128)) ** 0.5  # four standard errors of a difference of two means of four steps each
    assert max(reached.values()) - min(reached.values()) < noise, reached
