"""RLOOTrainer: against TRL 1.16 on the same completions, REINFORCE++ against formulas written out, cuts, resuming, bad
input."""
import copy
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from posttrain import RLOOConfig, RLOOTrainer, pocket
from posttrain.foundations.masks import Totals
from posttrain.online.reinforce_plus_plus import (
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
    reinforce_plus_plus_baseline_loss,
    reinforce_plus_plus_loss,
)
from posttrain.rollout.rewards import exact_match_reward
from posttrain.training.heads import completion_logps
from test_grpo import assert_two_processes_are_one, logs, noisy, rows, weights
from test_grpo_parity import (
    LONGEST,
    G,
    P,
    Rollouts,
    Weights,
    by_column,
    close,
    length_reward,
    models,
    noise,
    prompts,
    same,
    sometimes,
    trl,
)

assert models and trl  # fixtures


@pytest.fixture(autouse=True)
def in_order(monkeypatch, request):
    """TRL shuffles a generation before it cuts it into micro-batches, which no result here depends on, but for the
    order."""
    if "trl" not in request.fixturenames: return
    import trl.trainer.rloo_trainer as module
    monkeypatch.setattr(module, "shuffle_sequence_dict", lambda batch: batch)


def run(which, trl, config, models, *, steps=1, rewards=noise, **options):
    "Train with this implementation: the change of the weights in each step, and what was logged."
    policy, reference = copy.deepcopy(models[0]), copy.deepcopy(models[1])
    given = dict(optim="sgd", max_grad_norm=1e9, max_steps=steps, lr_scheduler_type="constant", shuffle_dataset=False,
                 learning_rate=.02, per_device_train_batch_size=G * P, num_generations=G, max_completion_length=LONGEST)
    args = config(**{**given, **options})
    args.pop("train_sampling_strategy")
    seen, rollouts, tokenizer = Weights(), Rollouts(), pocket.tokenizer()
    common = dict(model=policy, reward_funcs=rewards, train_dataset=prompts(), processing_class=tokenizer,
                  callbacks=[seen])
    if which == "ours":
        reference = reference if args.get("beta", .05) else None
        trainer = RLOOTrainer(args=RLOOConfig(**args), ref_model=reference, rollout_func=rollouts, **common)
    else:
        trainer = trl.RLOOTrainer(args=trl.RLOOConfig(**args), **common)
        texts = tokenizer.batch_decode
        trainer._generate_single_turn = lambda ids, *_: rollouts(texts(ids), trainer)["completion_ids"]
    trainer.train()
    changes = [(a - b) / trainer.args.learning_rate for a, b in zip(seen.seen, seen.seen[1:])]
    return SimpleNamespace(gradients=changes, logs=[r for r in trainer.state.log_history if "loss" in r],
                           trainer=trainer)


OPTIONS = {"plain": {}, "no KL": dict(beta=0.0), "normalised": dict(normalize_advantages=True),
           "clipped rewards": dict(reward_clip_range=[.5, 1.5], beta=.2), "temperature": dict(temperature=.7),
           "two iterations": dict(num_iterations=2, steps=3, epsilon=.01, epsilon_high=.02, learning_rate=1e-4),
           "accumulated": dict(per_device_train_batch_size=G * P // 2, gradient_accumulation_steps=2),
           "several rewards": dict(rewards=[noise, length_reward, by_column], reward_weights=[1.0, .5, 2.0]),
           "some unscored": dict(rewards=sometimes),
           "some unscored, normalised": dict(rewards=sometimes, normalize_advantages=True),}


@pytest.mark.parity
@pytest.mark.parametrize("name", OPTIONS)
def test_like_trl(name, trl, config, models):
    """Loss, gradient and metrics. TRL counts dead groups after the KL was taken from the rewards, when none is equal
    any more: ours are those of the rewards."""
    ours, theirs = (run(which, trl, config, models, **OPTIONS[name]) for which in ("ours", "trl"))
    skip = ["frac_reward_zero_std"] if OPTIONS[name].get("beta", .05) else []
    if name == "accumulated":  # TRL averages micro-batches as if they had equally many tokens
        skip += ["entropy", "kl"]
    if name == "two iterations":  # what was sampled is logged by the step that sampled it
        skip += [key for key in theirs.logs[0] if key.startswith(("reward", "completions/"))
                 or key in ("kl", "num_tokens")]
        of_samples = set(theirs.logs[0]) & set(ours.logs[0]) & set(skip)
        assert all(close(ours.logs[0][key], theirs.logs[0][key]) for key in of_samples - {"frac_reward_zero_std"})
    same(ours, theirs, skip=skip)


# ---------------------------------------------------------------- ours alone
class Generations(TrainerCallback):
    "Every generation, and the tokens that were learned from."

    def __init__(self): self.seen, self.batches = [], []

    def on_generation(self, trainer, generation): self.seen.append(generation)

    def on_tokens(self, trainer, batch, tokens): self.batches.append(batch)


def make(config, rewards=noisy, callbacks=None, **options):
    given = dict(per_device_train_batch_size=16, num_generations=4, max_completion_length=10, max_steps=1, optim="sgd",
                 learning_rate=.1, max_grad_norm=1e9, lr_scheduler_type="constant")
    args = config(**{**given, **options})
    args.pop("train_sampling_strategy")
    return RLOOTrainer(pocket.start("reverse")[0], rewards, RLOOConfig(**args), rows(), rows(8), pocket.tokenizer(),
                       callbacks=callbacks)


def train(config, resume=None, **options):
    trainer = make(config, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def by_hand(name, rewards, logratio, lengths, G, beta):
    "Advantages in plain loops: one number per token of each completion."
    B = len(rewards)
    if name == "rloo":
        returns = [rewards[i] - beta * sum(logratio[i][:lengths[i]]) for i in range(B)]
        siblings = [[j for j in range(B) if j // G == i // G and j != i] for i in range(B)]
        return [[returns[i] - sum(returns[j] for j in siblings[i]) / (G - 1)] * lengths[i] for i in range(B)]
    if name == "reinforce_plus_plus":
        raw = [[rewards[i] - beta * sum(logratio[i][t:lengths[i]]) for t in range(lengths[i])] for i in range(B)]
    else:
        raw = [[rewards[i] - sum(rewards[i // G * G:i // G * G + G]) / G] * lengths[i] for i in range(B)]
    numbers = [a for row in raw for a in row]
    mean = sum(numbers) / len(numbers)
    std = (sum((a - mean) ** 2 for a in numbers) / len(numbers)) ** .5
    return [[(a - mean) / std for a in row] for row in raw]


@pytest.mark.parametrize("cut", [(16, 1), (4, 4)], ids=["whole", "cut"])
@pytest.mark.parametrize("name", ["rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"])
def test_advantages_are_the_formula(name, cut, config):
    "Of the second step, when the policy has left its reference: what the loss saw, token by token, against loops."
    keep, beta = Generations(), .3
    size, accumulated = cut
    train(config, callbacks=[keep], advantage_estimator=name, beta=beta, max_steps=2, learning_rate=.5,
          per_device_train_batch_size=size, gradient_accumulation_steps=accumulated)
    batches, generation = keep.batches[accumulated:], keep.seen[1]
    lengths = [len(ids) for ids in generation.completion_ids]
    logratio = [row.tolist() for b in batches for row in b["old_logps"] - b["ref_logps"]]
    assert max(abs(x) for row in logratio for x in row) > 1e-2, "the policy is still its reference"
    expected = by_hand(name, generation.rewards[:, 0].tolist(), logratio, lengths, 4, beta)
    found = [row for b in batches for row in b["advantages"]]
    for row, numbers in zip(found, expected, strict=True):
        row = row.expand(len(numbers)) if row.dim() == 0 else row[:len(numbers)]
        torch.testing.assert_close(row.float(), torch.tensor(numbers), atol=2e-5, rtol=1e-4)


PLUS_PLUS = {"reinforce_plus_plus": reinforce_plus_plus_loss,
             "reinforce_plus_plus_baseline": lambda *args, **options: reinforce_plus_plus_baseline_loss(
                 *args, beta=0.0, **options)}


@pytest.mark.parametrize("name", PLUS_PLUS)
def test_the_upper_limit_is_a_field_of_its_own(name):
    "Limits .9 and 1.5: the ratio 1.3 is within them, 1.6 and .7 are not, and the last token is padding."
    logps = torch.tensor([[1.3, 1.6], [.7, 9.0]]).log().requires_grad_()
    advantages, mask = torch.tensor([[2.0, 2.0], [-1.0, 5.0]]), torch.tensor([[1, 1], [1, 0]])
    loss, stats = PLUS_PLUS[name](logps, torch.zeros(2, 2), advantages, mask, epsilon=.1, epsilon_high=.5)
    loss.backward()
    torch.testing.assert_close(loss.item(), -(1.3 * 2 + 1.5 * 2 - .9) / 3, atol=1e-6, rtol=0)
    torch.testing.assert_close(logps.grad, torch.tensor([[-1.3 * 2 / 3, 0], [0, 0]]))
    assert abs(stats["clip_ratio/high_mean"].item() - 1 / 3) < 1e-6
    symmetric, _ = PLUS_PLUS[name](logps, torch.zeros(2, 2), advantages, mask, epsilon=.1)
    torch.testing.assert_close(symmetric.item(), -(1.1 * 2 + 1.1 * 2 - .9) / 3, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", PLUS_PLUS)
@pytest.mark.parametrize("epsilon_high, limit", [(.5, 1.3), (.2, 1.2), (None, 1.1)])
def test_the_trainer_uses_the_upper_limit(name, epsilon_high, limit, config):
    "Each token has the ratio 1.3 and the advantage 2."
    trainer = make(config, advantage_estimator=name, epsilon=.1, epsilon_high=epsilon_high, beta=0.0)
    batch = trainer.make_batches(trainer.stream.prompts)[0]
    now = completion_logps(trainer.model, batch)["logps"].detach()
    batch |= {"old_logps": now - math.log(1.3), "advantages": torch.full_like(now, 2.0)}
    loss, _ = trainer.loss(trainer.model, batch, Totals.of(batch["mask"]))
    assert abs(loss.item() + 2 * limit) < 1e-4
    loss.backward()
    moves = any(p.grad is not None and p.grad.abs().max() > 1e-6 for p in trainer.model.parameters())
    assert moves == (limit == 1.3), "a clipped ratio has no gradient"


def test_the_kl_of_the_baseline_is_k2():
    "Half a square, with the slope of the log-ratio, over the tokens of the whole step; advantages are 0 here."
    logps, mask = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True), torch.tensor([[1, 1, 0]])
    options = dict(ref_logps=torch.tensor([[-1.5, -1.0, torch.nan]]), beta=.3)
    for totals, count in ((None, 2), (Totals(8, 4), 8)):
        logps.grad = None
        loss, stats = reinforce_plus_plus_baseline_loss(logps, None, torch.zeros(1, 3), mask, totals=totals, **options)
        loss.backward()
        torch.testing.assert_close(loss.item(), .3 * (.5**2 / 2 + 1 / 2) / count, atol=1e-7, rtol=0)
        torch.testing.assert_close(logps.grad, .3 * torch.tensor([[.5, -1.0, 0]]) / count)
        assert abs(stats["kl"].item() - (.5**2 / 2 + 1 / 2) / 2) < 1e-6


@pytest.mark.parametrize("advantages", [
    lambda rewards, mask: reinforce_plus_plus_advantages(rewards, None, mask, 2),
    lambda rewards, mask: reinforce_plus_plus_baseline_advantages(rewards, None, mask, 2)], ids=["plain", "baseline"])
def test_who_could_not_be_scored_is_not_counted(advantages):
    "The mean and the deviation are those of the other completions, whose rewards lie around no zero."
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]])
    all_scored, some = torch.tensor([5.0, 7, 6, 9]), torch.tensor([5.0, 7, 6, 9, torch.nan, torch.nan])
    longer = torch.cat([mask, torch.ones(2, 3, dtype=mask.dtype)])
    found = advantages(some, longer)
    torch.testing.assert_close(found[:4], advantages(all_scored, mask))
    assert (found[4:] == 0).all() and found[:4].abs().max() > .5


CUTS = {"rloo": dict(normalize_advantages=True, reward_clip_range=[.2, .9]),
        "reinforce_plus_plus": dict(num_iterations=2, max_steps=2),
        "reinforce_plus_plus_baseline": dict(beta=.2, max_steps=2)}


@pytest.mark.parametrize("name", CUTS)
def test_one_gradient_for_every_cut(name, config):
    whole = train(config, advantage_estimator=name, **CUTS[name])
    moved = (weights(whole) - weights(pocket.start("reverse")[0])).norm()
    assert moved > 1e-3
    for size, accumulated in ((4, 4), (1, 16)):
        cut = train(config, advantage_estimator=name, per_device_train_batch_size=size,
                    gradient_accumulation_steps=accumulated, **CUTS[name])
        assert (weights(cut) - weights(whole)).norm() <= 2e-5 * moved, (size, accumulated)
        for a, b in zip(logs(whole), logs(cut), strict=True):
            for key in ("loss", "kl", "entropy", "reward", "grad_norm"):
                if key in a: assert abs(a[key] - b[key]) <= 2e-5 * max(1, abs(a[key])), (key, a[key], b[key])


@pytest.mark.distributed
def test_two_processes_are_one(tmp_path):
    "The KL in the reward, and what is normalised over the whole generation, are those of both processes."
    assert_two_processes_are_one(tmp_path, "RLOO", [
        dict(beta=.1, num_iterations=2, normalize_advantages=True),
        dict(beta=.1, advantage_estimator="reinforce_plus_plus"),
        dict(beta=.1, advantage_estimator="reinforce_plus_plus_baseline", mask_truncated_completions=True)])


@pytest.mark.parametrize("name", ["rloo", "reinforce_plus_plus"])
def test_resumed_in_the_middle_of_a_generation(name, config, tmp_path):
    settings = dict(advantage_estimator=name, num_iterations=2, steps_per_generation=2, per_device_train_batch_size=8,
                    max_steps=6, learning_rate=1e-3, optim="adamw_torch", save_strategy="steps", save_steps=3)
    whole = train(config, **settings)
    resumed = train(config, resume=str(tmp_path / "checkpoint-3"), **settings)
    assert torch.equal(weights(whole), weights(resumed)) and whole.stream.state.sampled == resumed.stream.state.sampled


@torch.no_grad()
def logps_by_hand(model, prompt, completion, temperature):
    "Log-probs of one completion's tokens from all logits."
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1:-1].float() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def test_each_batch_of_evaluation_has_its_seeds(config):
    "Of one question asked eight times no two batches get the same answers."
    trainer = make(config, num_generations_eval=2, per_device_eval_batch_size=4)
    generate, seen = trainer.generate, []
    trainer.generate = lambda *args: seen.append(generate(*args)) or seen[-1]
    trainer.evaluate(rows(8).select([0] * 8))
    first, second = (generation.completion_ids for generation in seen)
    assert first != second and seen[0].prompt_ids == seen[1].prompt_ids


def test_evaluation_goes_through_the_same_stages(config):
    trainer = make(config, advantage_estimator="reinforce_plus_plus", num_generations_eval=2,
                   per_device_eval_batch_size=4, temperature=.7)
    with torch.no_grad():
        for p in trainer.model.parameters(): p += .02 * torch.randn_like(p)
    generate, seen = trainer.generate, []
    trainer.generate = lambda *args: seen.append(generate(*args)) or seen[-1]
    first = trainer.evaluate()
    samples = [(prompt, completion) for generation in seen
               for prompt, completion in zip(generation.prompt_ids, generation.completion_ids)]
    def spoken(model): return torch.cat([logps_by_hand(model, *sample, .7) for sample in samples])
    kl = (spoken(trainer.model) - spoken(trainer.ref_model)).mean().item()
    assert len(samples) == 16 and abs(kl) > 1e-2 and abs(first["eval_kl"] - kl) < 1e-4 * abs(kl) + 1e-5
    second = trainer.evaluate()
    assert first["eval_reward"] == second["eval_reward"] and first["eval_kl"] == second["eval_kl"]
    assert trainer.evaluate(rows(4))["eval_completions/mean_length"] > 0


BAD = [
    (dict(num_generations=1, per_device_train_batch_size=4), ValueError, "needs at least 2"),
    (dict(advantage_estimator="grpo"), ValueError, "'rloo', 'reinforce_plus_plus'"),
    (dict(reward_clip_range=[1.0, 0.0]), ValueError, "least and the greatest"),
    (dict(reward_clip_range=[1.0]), ValueError, "least and the greatest"),
    (dict(beta=-1), ValueError, "beta=-1"), (dict(epsilon="0.2"), TypeError, "must be a number"),
    (dict(sync_ref_model=True, beta=0.0), ValueError, "there is none"),
]


@pytest.mark.parametrize("options, kind, words", BAD)
def test_bad_fields_are_named(options, kind, words, config):
    with pytest.raises(kind, match=words): RLOOConfig(**{**config(), "per_device_train_batch_size": 16, **options})


def test_one_completion_a_prompt_is_enough_without_groups(config):
    trainer = train(config, advantage_estimator="reinforce_plus_plus", num_generations=1)
    assert trainer.generation.num_generations == 1 and logs(trainer)[0]["grad_norm"] > 0


def test_every_field_of_trl_is_here():
    import dataclasses

    from trl import RLOOConfig as theirs
    missing = {f.name for f in dataclasses.fields(theirs)} - {f.name for f in dataclasses.fields(RLOOConfig)}
    assert not missing, missing
    ours, their = RLOOConfig("out", use_cpu=True), {f.name: f for f in dataclasses.fields(theirs)}
    for name in ("num_generations", "beta", "epsilon", "normalize_advantages", "learning_rate", "num_iterations"):
        assert getattr(ours, name) == their[name].default, name


@pytest.mark.parametrize("name", ["rloo", "reinforce_plus_plus_baseline"])
def test_it_learns(name, tmp_path):
    "The reward rises as it does with GRPO (tests/test_online.py), from a start that answers one question in five."
    model, tokenizer = pocket.start("reverse")
    test = pocket.dataset("reverse", "prompt_only", n=300, seed=2, split="test")
    args = RLOOConfig(str(tmp_path), advantage_estimator=name, max_steps=100, per_device_train_batch_size=128,
                      num_generations=4, dynamic_sampling=True, dynamic_sampling_rounds=6, dynamic_sampling_prompts=64,
                      max_completion_length=12, learning_rate=1.5e-3, beta=0.0, logging_steps=10, save_strategy="no",
                      report_to="none", disable_tqdm=True, use_cpu=True)
    trainer = RLOOTrainer(model, exact_match_reward, args, processing_class=tokenizer,
                          train_dataset=pocket.dataset("reverse", "prompt_only", n=8000, seed=1))
    before = pocket.accuracy(model, tokenizer, test)
    trainer.train()
    after = pocket.accuracy(trainer.model, tokenizer, test)
    print(f"{name}: {before:.2f} -> {after:.2f}",
          [row["reward"] for row in trainer.state.log_history if "reward" in row])
    assert before < .25 and after > before + .2
