"""RLOOTrainer: against TRL 1.16 on the same completions, REINFORCE++ against formulas written out, cuts, resuming, bad input."""
import copy
from types import SimpleNamespace

import pytest
import torch
from test_grpo import logs, noisy, rows, weights
from test_grpo_parity import (
    LONGEST, G, P, Rollouts, Weights, by_column, close, length_reward, models, moved, noise, prompts, same, sometimes, trl)

from posttrain import RLOOConfig, RLOOTrainer, pocket
from posttrain.online.reinforce_plus_plus import reinforce_plus_plus_advantages, reinforce_plus_plus_baseline_advantages
from posttrain.online.rloo import rloo_advantages

assert models and trl  # fixtures


@pytest.fixture(autouse=True)
def in_order(monkeypatch, request):
    "TRL shuffles a generation before it cuts it into micro-batches, which no result here depends on, but for the order."
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
    common = dict(model=policy, reward_funcs=rewards, train_dataset=prompts(), processing_class=tokenizer, callbacks=[seen])
    if which == "ours":
        reference = reference if args.get("beta", .05) else None
        trainer = RLOOTrainer(args=RLOOConfig(**args), ref_model=reference, rollout_func=rollouts, **common)
    else:
        trainer = trl.RLOOTrainer(args=trl.RLOOConfig(**args), **common)
        texts = tokenizer.batch_decode
        trainer._generate_single_turn = lambda ids, *_: rollouts(texts(ids), trainer)["completion_ids"]
    trainer.train()
    changes = [(a - b) / trainer.args.learning_rate for a, b in zip(seen.seen, seen.seen[1:])]
    return SimpleNamespace(gradients=changes, logs=[r for r in trainer.state.log_history if "loss" in r], trainer=trainer)


OPTIONS = {
    "plain": {}, "no KL": dict(beta=0.0), "normalised": dict(normalize_advantages=True),
    "clipped rewards": dict(reward_clip_range=[.5, 1.5], beta=.2), "temperature": dict(temperature=.7),
    "two iterations": dict(num_iterations=2, steps=3, epsilon=.01, epsilon_high=.02, learning_rate=1e-4),
    "accumulated": dict(per_device_train_batch_size=G * P // 2, gradient_accumulation_steps=2),
    "several rewards": dict(rewards=[noise, length_reward, by_column], reward_weights=[1.0, .5, 2.0]),
    "some unscored": dict(rewards=sometimes), "some unscored, normalised": dict(rewards=sometimes, normalize_advantages=True),
}


@pytest.mark.parity
@pytest.mark.parametrize("name", OPTIONS)
def test_like_trl(name, trl, config, models):
    """Loss, gradient and metrics. TRL counts dead groups after the KL was taken from the rewards, when none is equal any more: ours are those of the rewards."""
    ours, theirs = (run(which, trl, config, models, **OPTIONS[name]) for which in ("ours", "trl"))
    skip = ["frac_reward_zero_std"] if OPTIONS[name].get("beta", .05) else []
    if name == "accumulated":  # TRL averages micro-batches as if they had equally many tokens
        skip += ["entropy", "kl"]
    if name == "two iterations":  # what was sampled is logged by the step that sampled it
        skip += [key for key in theirs.logs[0] if key.startswith(("reward", "completions/")) or key in ("kl", "num_tokens")]
        of_samples = set(theirs.logs[0]) & set(ours.logs[0]) & set(skip)
        assert all(close(ours.logs[0][key], theirs.logs[0][key]) for key in of_samples - {"frac_reward_zero_std"})
    same(ours, theirs, skip=skip)
