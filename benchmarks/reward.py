"""RewardTrainer against TRL 1.16: whole training steps, peak memory, and equal gradients.

    python benchmarks/reward.py [--rounds 5] [--only steps,memory] [--models "pocket;10M, 32k vocabulary"]

Same model with a layer for scores, same tokens, same optimizer, float32, in one process; gradients are compared before
a time is believed. TRL reads each answer behind a prompt of its own, padded to the longest of the batch."""
from functools import partial
from importlib import import_module

import harness  # sets the environment before transformers is imported
import datasets
from datasets import Dataset
from dpo import MODELS, REPEATS, STEPS
from dpo import rows as pairs_of

from posttrain import pocket

datasets.disable_progress_bars()

KINDS = {  # name -> lengths as in dpo.py, pairs a step: the more there are, the longer is the longest of them
    "equal lengths, 4 pairs": ("equal lengths", 4), "skewed lengths, 4 pairs": ("skewed lengths", 4),
    "equal lengths, 16 pairs": ("equal lengths", 16), "skewed lengths, 16 pairs": ("skewed lengths", 16)}


def rows(library, lengths, pairs, vocab, prompt, completion):
    "Token ids, in each library's columns: TRL's hold the prompt with each answer."
    made = pairs_of(lengths, vocab, prompt, completion, n=pairs * STEPS)
    if library == "posttrain": return made
    return Dataset.from_list([{side: row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")}
                              for row in made])


def classifier(lm):
    "A model of the same size with random weights and one score."
    import torch
    from transformers import Qwen3ForSequenceClassification
    torch.manual_seed(0)
    settings = {**lm.config.to_dict(), "num_labels": 1, "pad_token_id": pocket.tokenizer().pad_token_id}
    return Qwen3ForSequenceClassification(type(lm.config)(**settings))


def trainer(name, kind, library, folder, **more):
    home = import_module("posttrain" if library == "posttrain" else "trl")
    make, prompt, completion = MODELS[name]
    model, (lengths, pairs) = classifier(make()), KINDS[kind]
    quiet = dict(max_length=prompt + completion, use_cpu=True, bf16=False, gradient_checkpointing=False,
                 max_steps=STEPS, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
                 learning_rate=1e-4, per_device_train_batch_size=pairs, train_sampling_strategy="sequential", seed=0)
    data = rows(library, lengths, pairs, model.config.vocab_size, prompt, completion)
    return harness.silence(home.RewardTrainer(
        model=model, args=home.RewardConfig(folder, **{**quiet, **more}), train_dataset=data,
        processing_class=pocket.tokenizer()))


def bench_steps(rounds, names):
    print(f"\n{'training step':44}{'TRL':>9}{'posttrain':>11}   TRL / posttrain         gradients differ by")
    for name in names:
        for kind in KINDS: harness.compare_steps(partial(trainer, name, kind), f"{name}, {kind}", rounds)


def memory_of(library, name, kind):
    return harness.memory_of_training(lambda folder: trainer(name, kind, library, folder))


def bench_memory(names):
    print(f"\n{'peak memory of training over the loaded model':46}{'TRL':>9}{'posttrain':>11}   TRL / posttrain")
    for name in names:
        for kind in KINDS:
            harness.print_memory(f"{name}, {kind}",
                                 harness.memory_of_both(__file__, REPEATS, ("train",), name, kind))


if __name__ == "__main__":
    harness.command_line(__doc__, "pocket;10M, 32k vocabulary", memory_of, bench_steps, bench_memory)
