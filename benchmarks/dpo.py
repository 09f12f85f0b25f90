"""DPO against TRL 1.16: whole training steps with their reference pass, peak memory, and equal gradients.

    python benchmarks/dpo.py [--rounds 5] [--only steps,memory]

Same model, same reference, same rows, same optimizer, float32, in one process; losses and gradients are compared before
a time is believed."""
import copy
from functools import partial

import harness  # sets the environment before transformers is imported
import datasets
import numpy as np
from datasets import Dataset

from posttrain import pocket

datasets.disable_progress_bars()

STEPS = 4    # per round; the first is not counted
REPEATS = 3  # fresh processes for a peak of memory
PAIRS = 4    # per step

MODELS = {  # name -> how to make it, tokens of a prompt, tokens of a completion
    "pocket": (lambda: pocket.model(seed=0), 64, 32),
    "10M, 32k vocabulary": (lambda: harness.qwen3(32_768, 256, 2), 256, 128),
    "30M, 32k vocabulary": (lambda: harness.qwen3(32_768, 512, 4), 256, 128),
}
KINDS = {  # name -> config, adapter
    "equal lengths": ({}, False),
    "skewed lengths": ({}, False),
    "LoRA": ({}, True),
    "reference precomputed": (dict(precompute_ref_log_probs=True), False),
}


def rows(kind, vocab, prompt, completion, n=PAIRS * STEPS):
    rng = np.random.default_rng(0)
    ids = lambda size: rng.integers(5, vocab, size).tolist()
    def length(most):
        return int(np.exp(rng.uniform(np.log(most / 8), np.log(most)))) if kind == "skewed lengths" else most
    def row():
        return dict(prompt_ids=ids(length(prompt)), chosen_ids=ids(length(completion)),
                    rejected_ids=ids(length(completion)))
    return Dataset.from_list([row() for _ in range(n)])


def trainer(name, kind, library, folder, **more):
    if library == "TRL":
        import trl
        class DPOTrainer(trl.DPOTrainer):
            def _prepare_dataset(self, dataset, *args, **kw): return dataset  # the rows are token ids already
        DPOConfig = trl.DPOConfig
    else:
        from posttrain import DPOConfig, DPOTrainer
    make, prompt, completion = MODELS[name]
    options, peft = KINDS[kind]
    model, peft_config = make(), None
    reference = None if peft or "precompute_ref_log_probs" in options else copy.deepcopy(model)
    if peft:
        from peft import LoraConfig
        peft_config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    quiet = dict(max_length=None, use_cpu=True, bf16=False, gradient_checkpointing=False, max_steps=STEPS,
                 logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, learning_rate=1e-4,
                 per_device_train_batch_size=PAIRS, train_sampling_strategy="sequential", seed=0)
    args = DPOConfig(folder, **{**quiet, **options, **more})
    data = rows(kind, model.config.vocab_size, prompt, completion)
    return harness.silence(DPOTrainer(model, reference, args, train_dataset=data, processing_class=pocket.tokenizer(),
                                      peft_config=peft_config))


def bench_steps(rounds, names):
    print(f"\n{'training step':44}{'TRL':>9}{'posttrain':>11}   TRL / posttrain         gradients differ by")
    for name in names:
        for kind in KINDS:
            harness.compare_steps(partial(trainer, name, kind), f"{name}, {kind}", rounds)


def memory_of(library, name, kind):
    return harness.memory_of_training(lambda folder: trainer(name, kind, library, folder))


def bench_memory(names):
    print(f"\n{'peak memory of training over the loaded models':46}{'TRL':>9}{'posttrain':>11}   TRL / posttrain")
    for name in names:
        for kind in ("equal lengths", "skewed lengths"):
            mib = harness.memory_of_both(__file__, REPEATS, ("train",), name, kind)
            harness.print_memory(f"{name}, {kind}", mib)


if __name__ == "__main__":
    harness.command_line(__doc__, ";".join(MODELS), memory_of, bench_steps, bench_memory)
