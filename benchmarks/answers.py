"""KTO, CPO and ORPO against TRL 1.16: whole training steps with their reference pass, peak memory, and equal gradients.

    python benchmarks/answers.py [--rounds 5] [--only steps,memory]

Same model, same reference, same texts, same optimizer, float32, in one process; gradients are compared before a time is
believed. KTO takes its mismatched answers from the row before, as TRL does. ORPO is there twice: as it is by default,
with the likelihood of the completion (the paper's), beside TRL's of the whole sequence; and with TRL's in both."""
import copy
from functools import partial
from importlib import import_module

import harness  # sets the environment before transformers is imported
import datasets
import numpy as np
from datasets import Dataset
from dpo import MODELS, REPEATS, STEPS

from posttrain import pocket

datasets.disable_progress_bars()

ROWS = 4  # per step: pairs, or judged answers
METHODS = {  # name -> options of both libraries, and of ours alone to compute what TRL computes
    "KTO": ({}, dict(mismatched="batch")),
    "CPO": ({}, {}),
    "SimPO": (dict(loss_type="simpo", cpo_alpha=0.0, beta=2.0), {}),
    "ORPO": ({}, {}),
    "ORPO of sequences": ({}, dict(nll_of="sequence")),
}
ANOTHER_OBJECTIVE = ("ORPO",)  # than TRL's: the gradients are not to be compared


def texts(method, prompt, completion, n=ROWS * STEPS):
    "Rows of digits, each of which is a token."
    rng = np.random.default_rng(0)
    def digits(size): return "".join(map(str, rng.integers(0, 10, size)))
    def row(i):
        answer = digits(completion - 1)  # its end is a token too
        if method == "KTO": return dict(prompt=digits(prompt), completion=answer, label=bool(i % 2))
        return dict(prompt=digits(prompt), chosen=answer, rejected=digits(completion - 1))
    return Dataset.from_list([row(i) for i in range(n)])


def classes(library, method):
    name = {"SimPO": "CPO", "ORPO of sequences": "ORPO"}.get(method, method)
    place = "posttrain" if library == "posttrain" else "trl" if name == "KTO" else f"trl.experimental.{name.lower()}"
    home = import_module(place)
    return getattr(home, f"{name}Trainer"), getattr(home, f"{name}Config")


def trainer(method, name, library, folder, **more):
    trainer_class, config_class = classes(library, method)
    make, prompt, completion = MODELS[name]
    model = make()
    reference = {"ref_model": copy.deepcopy(model)} if method == "KTO" else {}
    options, as_trl = METHODS[method]
    quiet = dict(max_length=prompt + completion, use_cpu=True, bf16=False, gradient_checkpointing=False,
                 max_steps=STEPS, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
                 learning_rate=1e-4, per_device_train_batch_size=ROWS, train_sampling_strategy="sequential", seed=0)
    own = as_trl if library == "posttrain" else {}
    args = config_class(folder, **{**quiet, **options, **own, **more})
    return harness.silence(trainer_class(model=model, args=args, train_dataset=texts(method, prompt, completion),
                                         processing_class=pocket.tokenizer(), **reference))


def bench_steps(rounds, names):
    print(f"\n{'training step':44}{'TRL':>9}{'posttrain':>11}   TRL / posttrain         gradients differ by")
    for name in names:
        for method in METHODS:
            harness.compare_steps(partial(trainer, method, name), f"{method}, {name}", rounds,
                                  gradients=method not in ANOTHER_OBJECTIVE)


def memory_of(library, method, name):
    return harness.memory_of_training(lambda folder: trainer(method, name, library, folder))


def bench_memory(names):
    print(f"\n{'peak memory of training over the loaded models':46}{'TRL':>9}{'posttrain':>11}   TRL / posttrain")
    for name in names:
        for method in METHODS:
            harness.print_memory(f"{method}, {name}",
                                 harness.memory_of_both(__file__, REPEATS, ("train",), method, name))


if __name__ == "__main__":
    harness.command_line(__doc__, "pocket;10M, 32k vocabulary", memory_of, bench_steps, bench_memory)
