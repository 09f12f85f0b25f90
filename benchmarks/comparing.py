"""Online DPO against TRL 1.16, and Nash-MD's sampling against TRL 1.13, the last release that had it.

    python benchmarks/comparing.py [--rounds 5] [--only steps,mixture,memory]

Steps are whole ones: both sample two answers to each prompt with their own loop, score them by the same function and
learn from them; same model, reference, prompts and optimizer, float32, in one process. The gradients are compared on
given answers before a time is believed. The mixture writes one answer to each prompt, from two given models.
TRL 1.13's wheel is downloaded, and asked in a process of its own, without a key-value cache: with one its two models
write into the same cache, and the answers are not those of the mixture."""
import copy
import json
import sys
import time
from functools import partial

import harness  # sets the environment before transformers is imported
import datasets
import numpy as np
import torch
from datasets import Dataset

from posttrain import pocket

datasets.disable_progress_bars()

STEPS, REPEATS, PROMPTS = 4, 3, 8  # per round, of which the first is not counted; fresh processes; prompts of a step
WHEEL = "trl==1.13.0"
MODELS = {  # name -> how to make it, tokens of a prompt, tokens of an answer
    "pocket, 8 x 2 of 48 + 48": (lambda: pocket.model(seed=0), 48, 48),
    "10M, 32k vocabulary, 8 x 2 of 256 + 64": (lambda: harness.qwen3(32_768, 256, 2), 256, 64),
    # TRL's defaults: 64 new tokens, and rows of 512 in all
    "10M, 32k vocabulary, 8 x 2 of 448 + 64": (lambda: harness.qwen3(32_768, 256, 2), 448, 64),
}


def prompts(length, n):
    rng = np.random.default_rng(0)
    # the pocket tokenizer reads a character as a token
    return ["".join(rng.choice(list("abcdefghij"), length)) for _ in range(n)]


def variety(completion_ids, **columns):
    # no ties: TRL learns from them in the order in which the answers stand
    return [len(set(ids)) / len(ids) + ids[0] % 7 + ids[-1] / 1e5 for ids in completion_ids]


def written(prompt, which, vocab, completion):
    """The first or second answer that is given to a prompt, where gradients are compared."""
    return np.random.default_rng([which, *map(ord, prompt)]).integers(8, vocab, completion).tolist()


class Given:
    """An engine with given answers."""
    def __init__(self, vocab, completion): self.vocab, self.completion = vocab, completion

    def sync(self, model): pass

    def sleep(self): pass

    def sample(self, ids, seeds, sampling):
        from posttrain.rollout.sampling import Samples
        texts = pocket.tokenizer().batch_decode(ids)
        answers = [written(text, i % 2, self.vocab, self.completion) for i, text in enumerate(texts)]
        return Samples(answers, None, [False] * len(answers))


def trainer(name, library, folder, **more):
    """A trainer that samples itself; with `learning_rate` 1, as gradients are compared, one that is given answers."""
    if library == "TRL":
        from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
    else:
        from posttrain import OnlineDPOConfig, OnlineDPOTrainer
    (make, prompt, completion), tokenizer = MODELS[name], pocket.tokenizer()
    policy = make()
    quiet = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, max_steps=STEPS, logging_steps=1,
                 save_strategy="no", report_to="none", disable_tqdm=True, learning_rate=1e-5, seed=0, beta=.1,
                 per_device_train_batch_size=PROMPTS, max_new_tokens=completion, temperature=1.0)
    made = OnlineDPOTrainer(
        model=policy, ref_model=copy.deepcopy(policy), reward_funcs=variety, processing_class=tokenizer,
        args=OnlineDPOConfig(folder, **{**quiet, **more}),
        train_dataset=Dataset.from_dict({"prompt": prompts(prompt, PROMPTS * STEPS)}))
    if more.get("learning_rate") == 1: give(made, library, policy.config.vocab_size, completion)
    return harness.silence(made)


def give(made, library, vocab, completion):
    """Hand both libraries the same prompts and answers."""
    tokenizer = pocket.tokenizer()
    same = made.train_dataset.select(range(PROMPTS))
    made.train_dataset = same
    if library != "TRL":
        made.engine, made.stream = Given(vocab, completion), made.make_stream()
        return
    def answers(model, asked, images=None):
        inputs = tokenizer(asked, return_tensors="pt")
        ids = torch.tensor([written(text, k, vocab, completion) for k in (0, 1) for text in asked])
        twice = [inputs[key].repeat(2, 1) for key in ("input_ids", "attention_mask")]
        return *twice, ids, torch.ones_like(ids), None
    made._generate = answers


def bench_steps(rounds, names):
    print(f"\n{'online DPO: a whole step':44}{'TRL':>9}{'posttrain':>11}   TRL / posttrain         gradients differ by")
    for name in names: harness.compare_steps(partial(trainer, name), name, rounds)


def memory_of(library, name): return harness.memory_of_training(lambda folder: trainer(name, library, folder))


def bench_memory(names):
    print(f"\n{'peak memory of training over the loaded models':46}{'TRL':>9}{'posttrain':>11}   TRL / posttrain")
    for name in names: harness.print_memory(name, harness.memory_of_both(__file__, REPEATS, ("train",), name))


# ---------------------------------------------------------------- the mixture's answers, in a process with TRL 1.13
def mixtures(name, rounds):
    """Seconds of both for one answer to each prompt, of the full length."""
    from transformers import GenerationConfig

    from posttrain.rollout.opponents import MixtureEngine
    from posttrain.rollout.sampling import Sampling
    from posttrain.training.references import make_reference
    (make, prompt, completion), tokenizer = MODELS[name], pocket.tokenizer()
    policy, other = make(), make()
    ids = tokenizer(prompts(prompt, PROMPTS), return_tensors="pt")
    # no answer ends before the others: both do the same work
    # with a cache TRL's two models write into one: only without it are the answers those of the mixture
    how = GenerationConfig(max_new_tokens=completion, min_new_tokens=completion, do_sample=True, top_k=0,
                           use_cache=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    module = harness.old_trl(WHEEL, "trl.experimental.nash_md.nash_md_trainer")
    theirs = module.GeometricMixtureWrapper(policy, other, how, mixture_coef=.25, device=torch.device("cpu"))
    ours = MixtureEngine(policy, make_reference(policy, other), None, .25)
    ours.eos = []
    policy.generation_config.eos_token_id = None

    def their_answers():
        with torch.no_grad(): assert theirs.generate(**ids, generation_config=how).shape[1] == prompt + completion

    def our_answers():
        ours.sync(policy)
        found = ours.sample(ids["input_ids"].tolist(), list(range(PROMPTS)), Sampling(max_tokens=completion))
        assert {len(answer) for answer in found.completion_ids} == {completion}

    def seconds(sample):
        start = time.perf_counter()
        sample()
        return time.perf_counter() - start
    both = {"TRL": partial(seconds, their_answers), "posttrain": partial(seconds, our_answers)}
    for sample in both.values(): sample()
    return harness.interleaved(both, rounds)


def bench_mixture(rounds, names):
    print(f"\n{'Nash-MD: the answers of the mixture':44}{'TRL 1.13':>9}{'posttrain':>11}   TRL / posttrain")
    for name in names:
        harness.print_times(name, harness.in_fresh_process(__file__, "--mixture", name, str(rounds)))


def bench(rounds, names):
    if "steps" in ONLY: bench_steps(rounds, names)
    if "mixture" in ONLY: bench_mixture(rounds, names)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--mixture"]: print(json.dumps(mixtures(sys.argv[2], int(sys.argv[3]))))
    else:
        ONLY = sys.argv[sys.argv.index("--only") + 1] if "--only" in sys.argv else "steps,mixture"
        harness.command_line(__doc__, ";".join(MODELS), memory_of, bench, bench_memory)
