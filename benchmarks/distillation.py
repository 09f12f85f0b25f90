"""GKD and distillation against TRL 1.16: steps, and their memory over two models.

    python benchmarks/distillation.py [--rounds 5] [--only steps,memory]

Steps are whole ones, float32, in one process: same student, teacher, rows and optimizer, eight answers a step. GKD
learns from the dataset's answers (lmbda 0), where the gradients are compared before a time is believed, or from the
student's own (lmbda 1), which each library samples by itself. TRL's DistillationTrainer, whose loss is computed in
chunks, always samples; so does ours beside it."""
import copy
import tempfile
from functools import partial

import harness  # sets the environment before transformers is imported
import datasets
import numpy as np
import torch
from datasets import Dataset

from posttrain import pocket

datasets.disable_progress_bars()

STEPS, REPEATS, ROWS = 3, 3, 8  # per round, of which the first is not counted; fresh processes; answers of a step
MODELS = {  # name -> kind, how to make a model, tokens of a prompt, tokens of an answer, further settings
    "pocket, dataset's answers, 48 + 48": ("GKD", lambda: pocket.model(seed=0), 48, 48, dict(lmbda=0.0)),
    "pocket, own answers, 48 + 48": ("GKD", lambda: pocket.model(seed=0), 48, 48, dict(lmbda=1.0)),
    "10M, 32k, GKD, dataset's answers, 128 + 64": (
        "GKD", lambda: harness.qwen3(32_768, 256, 2), 128, 64, dict(lmbda=0.0)),
    "10M, 32k, GKD, own answers, 128 + 64": (
        "GKD", lambda: harness.qwen3(32_768, 256, 2), 128, 64, dict(lmbda=1.0)),
    "10M, 32k, Distillation, 128 + 64": ("Distillation", lambda: harness.qwen3(32_768, 256, 2), 128, 64, {}),
}


def rows(prompt, completion, n):
    """Conversations of one turn. The pocket tokenizer reads a character as a token."""
    rng = np.random.default_rng(0)
    def text(length): return "".join(rng.choice(list("abcdefghij"), length))
    return [[{"role": "user", "content": text(prompt)}, {"role": "assistant", "content": text(completion)}]
            for _ in range(n)]


def another(student):
    """A teacher of the same make with other weights."""
    teacher = copy.deepcopy(student)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in teacher.parameters(): p.add_(.3 * p.std() * torch.randn_like(p))
    return teacher


def trainer(name, library, folder, **more):
    kind, make, prompt, completion, own = MODELS[name]
    if library == "posttrain":
        from posttrain.distillation import distillation_trainer, gkd_trainer
        module = {"GKD": gkd_trainer, "Distillation": distillation_trainer}[kind]
    elif kind == "GKD":
        from trl.experimental import gkd as module
    else:
        import trl as module
    config, cls = (getattr(module, kind + part) for part in ("Config", "Trainer"))
    chats, student = rows(prompt, completion, ROWS * STEPS), make()
    # the student's answers end where they are cut: both libraries write equally many tokens
    student.generation_config.eos_token_id = None
    longest = dict(max_new_tokens=completion) if kind == "GKD" else dict(max_completion_length=completion)
    data = {"messages": chats} if kind == "GKD" else {"prompt": [chat[:-1] for chat in chats]}
    quiet = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, max_steps=STEPS, logging_steps=1,
                 save_strategy="no", report_to="none", disable_tqdm=True, learning_rate=1e-5, seed=0,
                 per_device_train_batch_size=ROWS, **longest)
    if more.get("learning_rate") == 1: data = {key: values[:ROWS] for key, values in data.items()}
    return harness.silence(cls(
        student, another(student), config(folder, **{**quiet, **own, **more}), train_dataset=Dataset.from_dict(data),
        processing_class=pocket.tokenizer()))


def bench_steps(rounds, names):
    print(f"\n{'a whole step':44}{'TRL':>9}{'posttrain':>11}   TRL / posttrain         gradients differ by")
    for name in names:
        make, is_sampled = partial(trainer, name), MODELS[name][4].get("lmbda", 1)
        difference = "each its own answers" if is_sampled else f"{harness.gradients_agree(make, name):.0e}"
        with tempfile.TemporaryDirectory() as folder:
            both = {library: make(library, folder) for library in ("TRL", "posttrain")}
            seconds = harness.interleaved({library: harness.timed(t) for library, t in both.items()}, rounds)
        harness.print_times(name, seconds, difference)


def memory_of(library, name): return harness.memory_of_training(lambda folder: trainer(name, library, folder))


def bench_memory(names):
    print(f"\n{'peak memory of training over both models':46}{'TRL':>9}{'posttrain':>11}   TRL / posttrain")
    for name in names: harness.print_memory(name, harness.memory_of_both(__file__, REPEATS, ("train",), name))


if __name__ == "__main__": harness.command_line(__doc__, ";".join(MODELS), memory_of, bench_steps, bench_memory)
