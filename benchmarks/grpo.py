"""GRPO against TRL 1.16: update step on given completions, whole step with sampling, peak memory, equal gradients.

    python benchmarks/grpo.py [--rounds 5] [--only update,whole,memory]

Same model, prompts, rewards and optimizer, float32, in one process. For the update both are handed the same completions
(rollout_func), and the gradients are compared before a time is believed. In whole steps each samples with its own loop:
`transformers.generate` in TRL, ours here. A step has one group of eight.
"""
import argparse
import json
import tempfile

import datasets
import harness  # sets the environment before transformers is imported
import numpy as np
import torch
from datasets import Dataset

from posttrain import pocket

datasets.disable_progress_bars()

STEPS = 4    # per round; the first is not counted
REPEATS = 3  # fresh processes for a peak of memory
G = 8        # completions of one prompt

MODELS = {  # name -> how to make it, tokens of a prompt, tokens of a completion
    "pocket, prompt 48 + 48": (lambda: pocket.model(seed=0), 48, 48),
    "10M, 32k vocabulary, prompt 256 + 64": (lambda: harness.qwen3(32_768, 256, 2), 256, 64),
    "30M, 32k vocabulary, prompt 256 + 64": (lambda: harness.qwen3(32_768, 512, 4), 256, 64),
}


def prompts(length, n=STEPS):
    rng = np.random.default_rng(0)
    # the pocket tokenizer reads a character as a token
    return ["".join(rng.choice(list("abcdefghij"), length)) for _ in range(n)]


def handed(vocab, completion):
    """A `rollout_func` that gives both libraries the same completions."""
    tokenizer = pocket.tokenizer()
    def rollout_func(prompts, trainer):
        rng = np.random.default_rng(len(prompts))
        return {"prompt_ids": tokenizer(prompts)["input_ids"],
                "completion_ids": rng.integers(8, vocab, (len(prompts), completion)).tolist(), "logprobs": None}
    return rollout_func


def variety(completion_ids, **kwargs): return [len(set(ids)) / len(ids) + ids[0] % 7 for ids in completion_ids]


def trainer(library, name, folder, sample, **more):
    if library == "TRL":
        from trl import GRPOConfig, GRPOTrainer
    else:
        from posttrain import GRPOConfig, GRPOTrainer
    make, prompt, completion = MODELS[name]
    model = make()
    usual = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, max_steps=STEPS, logging_steps=1,
                 save_strategy="no", report_to="none", disable_tqdm=True, learning_rate=1e-5,
                 per_device_train_batch_size=G, num_generations=G, max_completion_length=completion,
                 shuffle_dataset=False, loss_type="grpo", seed=0)
    rows = Dataset.from_dict({"prompt": prompts(prompt)})
    rollout_func = None if sample else handed(model.config.vocab_size, completion)
    return harness.silence(GRPOTrainer(model, variety, GRPOConfig(folder, **usual | more), train_dataset=rows,
                                       processing_class=pocket.tokenizer(), rollout_func=rollout_func))


def gradients_agree(name):
    """One step of plain gradient descent from the same weights ends at the same weights."""
    ends = []
    for library in ("TRL", "posttrain"):
        with tempfile.TemporaryDirectory() as folder:
            t = trainer(library, name, folder, False, optim="sgd", learning_rate=1.0, max_steps=1,
                        lr_scheduler_type="constant", max_grad_norm=1e9)
            before = [p.detach().clone() for p in t.model.parameters()]
            t.train()
            ends.append(torch.cat([(b - p.detach()).flatten() for b, p in zip(before, t.model.parameters())]))
    difference = ((ends[0] - ends[1]).norm() / ends[0].norm()).item()
    assert ends[0].norm() > 0 and difference < 1e-4, f"{name}: gradients differ by {difference:.1e} of their size"
    return difference


def bench(rounds, names, sample):
    print(f"\n{'whole step with sampling' if sample else 'update step':44}{'TRL':>9}{'posttrain':>11}   "
          f"TRL / posttrain{'' if sample else '         gradients differ by'}")
    for name in names:
        difference = "" if sample else f"{gradients_agree(name):.0e}"
        with tempfile.TemporaryDirectory() as folder:
            both = {lib: trainer(lib, name, folder, sample) for lib in ("TRL", "posttrain")}
            seconds = harness.interleaved({lib: harness.timed(t) for lib, t in both.items()}, rounds)
        harness.print_seconds(name, seconds, difference)


def memory_of(library, name): return harness.memory_of_training(lambda folder: trainer(library, name, folder, False))


def bench_memory(names):
    print(f"\n{'peak memory of the update over the model':46}{'TRL':>9}{'posttrain':>11}   TRL / posttrain")
    for name in names:
        mib = {lib: [harness.in_fresh_process(__file__, lib, name)["mib"] for _ in range(REPEATS)]
               for lib in ("TRL", "posttrain")}
        harness.print_memory(name, mib)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="update,whole,memory")
    parser.add_argument("--models", default=";".join(MODELS), help="names, separated by ;")
    parser.add_argument("--memory", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory: return print(json.dumps(memory_of(*args.memory)))
    print(harness.machine())
    names = args.models.split(";")
    if "update" in args.only: bench(args.rounds, names, False)
    if "whole" in args.only: bench(args.rounds, names, True)
    if "memory" in args.only: bench_memory([n for n in names if not n.startswith("pocket")])


if __name__ == "__main__":
    main()
