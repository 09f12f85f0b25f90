"""PPO against TRL 1.12, the last release that had it: a whole generation's learning on given completions, peak memory,
and equal gradients.

    python benchmarks/ppo.py [--rounds 5] [--only steps,memory]

Same policy, reference, critic, completions, scores and optimizer, float32, in one process; the gradients are compared
before a time is believed. A step is all that happens to a generation after it was sampled and scored: log-probs of the
policy and of the reference, values, advantages, and four passes with an optimizer step each. The critic is a model of
its own in both, as in TRL; a last row has ours as a layer on the policy's body. TRL 1.12's wheel is downloaded."""
import copy
import sys
import tempfile
import warnings
from functools import cache, partial

import harness  # sets the environment before transformers is imported
import datasets
import numpy as np
import torch
from datasets import Dataset

from posttrain import PPOConfig, PPOTrainer, pocket

datasets.disable_progress_bars()

STEPS, REPEATS, PASSES = 3, 3, 4  # generations per round, of which the first is not counted; fresh processes; passes
ROWS = 8  # completions of a generation
WHEEL = "trl==1.12.0"
MODELS = {  # name -> how to make it, tokens of a prompt, tokens of a completion
    "pocket, 8 of 48 + 48": (lambda: pocket.model(seed=0), 48, 48),
    "10M, 32k vocabulary, 8 of 256 + 64": (lambda: harness.qwen3(32_768, 256, 2), 256, 64),
}


@cache
def old_trl():
    return harness.old_trl(WHEEL, "trl.experimental.ppo.ppo_trainer")


def prompts(length, n):
    rng = np.random.default_rng(0)
    # the pocket tokenizer reads a character as a token
    return ["".join(rng.choice(list("abcdefghij"), length)) for _ in range(n)]


def written(prompt, vocab, completion):
    """The completion that is given to a prompt, and its score: the same for whoever asks."""
    rng = np.random.default_rng([ord(c) for c in prompt])
    return rng.integers(8, vocab, completion).tolist(), float(rng.normal())


def critic_of(model):
    """A classifier with one label on a copy of a body, with a last layer that says something."""
    from posttrain.rollout.critic import copied_critic
    value = copied_critic(model)
    with torch.no_grad(): value.score.weight.copy_(.1 * torch.linspace(-1, 1, value.score.weight.shape[1])[None])
    return value


QUIET = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no",
             disable_tqdm=True, learning_rate=1e-5, lr_scheduler_type="constant", seed=0,
             per_device_train_batch_size=ROWS, logging_steps=1, kl_coef=.1, temperature=.7)


def theirs(make, prompt, completion, folder, steps, options):
    module, tokenizer, policy = old_trl(), pocket.tokenizer(), make()
    tokenizer.padding_side = "left"
    vocab = policy.config.vocab_size
    args = module.PPOConfig(folder, **{**QUIET, **options}, response_length=completion, total_episodes=ROWS * steps,
                            num_sample_generations=0)
    data = Dataset.from_dict({"input_ids": tokenizer(prompts(prompt, ROWS * steps))["input_ids"]})

    def given(model, queries, _, pad, config):
        ids = [written(text, vocab, completion)[0] for text in tokenizer.batch_decode(queries)]
        whole = torch.cat([queries, torch.tensor(ids)], 1)
        return whole, module.forward(model, whole, pad).logits[:, queries.shape[1] - 1:-1] / (args.temperature + 1e-7)
    module.batch_generation = given
    judge, values_of = critic_of(policy), getattr(module, "values_of", module.get_reward)
    module.values_of = values_of
    def scored(model, texts, pad, context):
        if model is not judge: return values_of(model, texts, pad, context)
        asked = tokenizer.batch_decode(texts[:, :context])
        return None, torch.tensor([written(text, vocab, completion)[1] for text in asked]), None
    module.get_reward = scored
    made = module.PPOTrainer(args, tokenizer, policy, copy.deepcopy(policy), judge, data, critic_of(policy))
    made.accelerator.print = lambda *said: None
    return harness.silence(made)


def ours(make, prompt, completion, folder, steps, options):
    tokenizer, policy = pocket.tokenizer(), make()
    vocab, critic = policy.config.vocab_size, options.pop("critic", "model")
    args = PPOConfig(folder, **{**QUIET, **options}, response_length=completion, total_episodes=ROWS * steps,
                     shuffle_dataset=False, critic=critic)

    def rollouts(asked, trainer):
        return {"prompt_ids": tokenizer(asked)["input_ids"], "logprobs": None,
                "completion_ids": [written(text, vocab, completion)[0] for text in asked]}
    def score(prompts, **columns): return [written(text, vocab, completion)[1] for text in prompts]
    return harness.silence(PPOTrainer(
        policy, score, args, Dataset.from_dict({"prompt": prompts(prompt, ROWS * steps)}), processing_class=tokenizer,
        ref_model=copy.deepcopy(policy), value_model=critic_of(policy) if critic == "model" else None,
        rollout_func=rollouts))


def trainer(name, library, folder, steps=STEPS, **options):
    make, prompt, completion = MODELS[name]
    return (theirs if library == "TRL" else ours)(make, prompt, completion, folder, steps, options)


def gradients_agree(name):
    """One pass of plain gradient descent from the same weights ends at the same weights."""
    ends = []
    for library in ("TRL", "posttrain"):
        with tempfile.TemporaryDirectory() as folder:
            t = trainer(name, library, folder, 1, optim="sgd", learning_rate=1e-2, max_grad_norm=1e9, num_ppo_epochs=1)
            before = [p.detach().clone() for p in t.model.parameters()]
            t.train()
            ends.append(torch.cat([(b - p.detach()).flatten() for b, p in zip(before, t.model.parameters())]))
    difference = ((ends[0] - ends[1]).norm() / ends[0].norm()).item()
    assert ends[0].norm() > 0 and difference < 1e-4, f"{name}: gradients differ by {difference:.1e} of their size"
    return f"{difference:.0e}"


class Generations(harness.Steps):
    "Seconds from one generation to the next; `passes` optimizer steps belong to each."

    def __init__(self, passes):
        super().__init__()
        self.passes = passes

    def of(self, trainer):
        self.ends.clear()
        trainer.train()
        ends = self.ends[self.passes - 1::self.passes]
        return float(np.median([b - a for a, b in zip(ends, ends[1:])]))


def timed(trainer, passes):
    generations = Generations(passes)
    trainer.add_callback(generations.callback)
    return lambda: generations.of(trainer)


def bench_steps(rounds, names):
    print(f"\n{'a generation: four passes':44}{'TRL 1.12':>9}{'posttrain':>11}   TRL / posttrain"
          "         gradients differ by")
    for name in names:
        difference = gradients_agree(name)
        for label, options in ((name, {}), (f"{name}, a layer", dict(critic="head"))):
            with tempfile.TemporaryDirectory() as folder:
                their, our = trainer(name, "TRL", folder), trainer(name, "posttrain", folder, **options)
                both = {"TRL": timed(their, 1), "posttrain": timed(our, PASSES)}
                seconds = harness.interleaved(both, rounds)
            harness.print_times(label, seconds, "another critic" if options else difference)


def memory_of(library, name):
    return harness.memory_of_training(partial(trainer, name, library, steps=1))


def bench_memory(names):
    print(f"\n{'peak memory of a generation over the models':46}{'TRL':>9}{'posttrain':>11}   TRL / posttrain")
    for name in names:
        harness.print_memory(name, harness.memory_of_both(__file__, REPEATS, ("train",), name))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "var\\(\\): degrees of freedom")  # TRL's, of one micro-batch
    if "--memory" not in sys.argv: old_trl()  # before anything names the version
    harness.command_line(__doc__, ";".join(MODELS), memory_of, bench_steps, bench_memory)
