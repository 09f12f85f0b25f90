"""GRPOTrainer as people use it: learning, every way of cutting a step, other samplers and rewards, evaluation,
stopping and going on, and what it says when something is wrong."""
import copy
import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from posttrain import GRPOConfig, GRPOTrainer, pocket
from posttrain.rollout.rewards import exact_match_reward
from posttrain.training.heads import completion_logps
from test_distributed import LEAVE, launch

G = 4


def rows(n=50, **kw):
    return pocket.dataset("reverse", "prompt_completion", n=n, **kw).rename_column("completion", "answer")
def noisy(completions, **kwargs): return [random.Random(c).random() for c in completions]


def make(config, rewards=noisy, dataset=None, model=None, tokenizer=None, eval_dataset=None, peft_config=None,
         callbacks=None, rollout_func=None, ref_model=None, judges=None, **kw):
    kw = config(
        **{**dict(per_device_train_batch_size=16, num_generations=G, max_completion_length=10, max_steps=1, optim="sgd",
                  learning_rate=1.0, max_grad_norm=0, lr_scheduler_type="constant"), **kw})
    kw.pop("train_sampling_strategy")
    return GRPOTrainer(model if model is not None else pocket.start("reverse")[0], rewards, GRPOConfig(**kw),
                       rows() if dataset is None else dataset, eval_dataset, tokenizer or pocket.tokenizer(), judges,
                       peft_config=peft_config, callbacks=callbacks, rollout_func=rollout_func, ref_model=ref_model)


def train(*args, resume=None, **kw):
    trainer = make(*args, **kw)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer): return torch.cat([p.detach().flatten() for p in getattr(trainer, "model", trainer).parameters()])
def logs(trainer): return [row for row in trainer.state.log_history if "loss" in row]


class Generations(TrainerCallback):
    """Keeps every generation, and what each token's log-prob was when it was learned from."""

    def __init__(self): self.seen, self.tokens = [], []

    def on_generation(self, trainer, generation): self.seen.append(generation)

    def on_tokens(self, trainer, batch, tokens): self.tokens.append((batch, tokens))


# ---------------------------------------------------------------- one gradient
CUTS = {"dapo": {}, "grpo, KL": dict(loss_type="grpo", beta=.1), "dr_grpo": dict(loss_type="dr_grpo"),
        "bnpo, bonus": dict(loss_type="bnpo", entropy_coef=.1),
        "top entropy": dict(top_entropy_quantile=.3, entropy_coef=.1),
        "luspo, sequence": dict(loss_type="luspo", importance_sampling_level="sequence", num_iterations=2, max_steps=2,
                                learning_rate=.05, epsilon=.05),
        "sapo, truncated": dict(loss_type="sapo", mask_truncated_completions=True, max_completion_length=6),
        "vespo": dict(loss_type="vespo", num_iterations=2, max_steps=2, learning_rate=.05),
        "cispo": dict(loss_type="cispo", epsilon_high=5.0), "batch": dict(scale_rewards="batch"),
        "transformers": dict(sampler="transformers", temperature=.9),
        "adaptive": dict(use_adaptive_entropy=True, entropy_target=5.0, max_steps=2, learning_rate=.05),
        "twice": dict(num_iterations=2, max_steps=2, learning_rate=.05, beta=.1),
        "dynamic": dict(dynamic_sampling=True, rewards=exact_match_reward),}


@pytest.mark.parametrize("case", CUTS)
def test_one_gradient_for_every_cut(case, config):
    whole = train(config, **CUTS[case])
    start = weights(pocket.start("reverse")[0])
    moved = weights(whole) - start
    assert moved.norm() > 1e-3
    for size, accumulated in ((4, 4), (1, 16)):  # whole groups, and single completions
        cut = train(config, **CUTS[case], per_device_train_batch_size=size, gradient_accumulation_steps=accumulated)
        assert (weights(cut) - weights(whole)).norm() <= 2e-5 * moved.norm(), (size, accumulated)
        for a, b in zip(logs(whole), logs(cut), strict=True):
            for key in set(a) - {"step", "epoch"}:
                if not key.startswith("time"):
                    assert abs(a[key] - b[key]) <= 2e-5 * max(1, abs(a[key])), (key, a[key], b[key])


def test_tokens_that_tie_learn_together():
    """Completions of a prompt begin alike: the same entropy, but for rounding, which differs with the cut."""
    from posttrain.online.corrections import entropy_threshold, top_entropy_mask
    mask = torch.ones(1, 6, dtype=torch.long)
    for noise in ((0, 0, 0), (0, 1e-6, -1e-6), (-1e-6, 1e-6, 0)):
        entropies = torch.tensor([[2.0, 1.0 + noise[0], 1.0 + noise[1], 1.0 + noise[2], .5, .1]])
        assert top_entropy_mask(entropies, mask, entropy_threshold(entropies[0], .5)).tolist() == [[1, 1, 1, 1, 0, 0]]


@pytest.mark.parametrize("spread", [1.0, 2e-3, 5e-6], ids=str)
def test_the_entropy_threshold_is_trls(spread):
    """A token that is below the quantile does not learn, however near it is, unless it ties with one that does."""
    from posttrain.online.corrections import entropy_threshold, top_entropy_mask
    for n, q in ((3, .5), (10, .2), (101, .3), (999, .05), (64, .4)):
        entropies = torch.arange(n).float()[torch.randperm(n)] * spread
        chosen = top_entropy_mask(entropies[None], torch.ones(1, n), entropy_threshold(entropies, q))[0]
        assert torch.equal(chosen == 1, entropies >= torch.quantile(entropies, 1 - q))


# ---------------------------------------------------------------- the sampler's log-probs are the trainer's
FIRST_RATIOS = {
    "pocket": ("pocket", {}), "top-p": ("pocket", dict(temperature=.6, top_p=.9)),
    "llama": ("llama", dict(temperature=.6)),
    "gpt2, sequence": ("gpt2", dict(temperature=1.3, loss_type="grpo", importance_sampling_level="sequence")),
}


@pytest.mark.parametrize("family, options", FIRST_RATIOS.values(), ids=FIRST_RATIOS)
def test_the_first_ratio_is_one(family, options, config):
    """Sampled in one batch with a cache, scored in another layout without: float32 leaves a few 1e-6."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
    n = len(pocket.tokenizer())
    model = {"pocket": lambda: pocket.start("reverse")[0],
             "llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=n, hidden_size=32, intermediate_size=64,
                                                           num_hidden_layers=2, num_attention_heads=4,
                                                           num_key_value_heads=2, max_position_embeddings=128)),
             "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=n, n_embd=32, n_layer=2, n_head=2, n_positions=128,
                                                        bos_token_id=1, eos_token_id=1, attn_pdrop=0., embd_pdrop=0.,
                                                        resid_pdrop=0.))}[family]()
    trainer = train(config, model=model, per_device_train_batch_size=4, gradient_accumulation_steps=4, **options)
    assert trainer.sampler_is_exact
    first = logs(trainer)[0]
    for key in ("ratio/min", "ratio/mean", "ratio/max"): assert abs(first[key] - 1) < 1e-4, (key, first[key])
    assert abs(first["approx_kl"]) < 1e-6 and first["clip_ratio/region_mean"] == 0


@pytest.mark.parametrize("noise", ["dropout", "NEFTune"])
def test_noise_in_the_forward_pass_is_no_step_of_the_policy(noise, config):
    """With dropout each pass is another policy, none the one that sampled. Used once, completions have a ratio of 1,
    as in TRL; used again, the old log-probs are those of the policy without dropout."""
    options = (dict(peft_config=adapter(lora_dropout=.3, init_lora_weights=False)) if noise == "dropout"
               else dict(neftune_noise_alpha=5.0))
    first = logs(train(config, **options, off_policy_mask_threshold=0.0))[0]
    assert first["ratio/min"] == first["ratio/max"] == 1 and first["clip_ratio/region_mean"] == 0
    again, keep = {**options, "num_iterations": 2, "max_steps": 2, "learning_rate": .02}, Generations()
    trainer = make(config, **again, callbacks=[keep])
    batch = trainer.get_train_dataloader().dataset[0]
    assert torch.equal(batch["old_logps"],
                       batch["sampled_logps"]) and trainer.forward_is_stochastic and not make(
                           config).forward_is_stochastic


def test_old_logps_of_the_sampler_equal_those_computed_again(config):
    """Two steps on one generation: with the sampler's own log-probs as the old ones, and with old ones computed anew.
    """
    options = dict(num_iterations=2, max_steps=2, learning_rate=.02, beta=.05)
    a = train(config, **options)
    b = make(config, **options)
    b.sampler_is_exact = False
    b.args.vllm_importance_sampling_correction = False
    b.train()
    assert a.sampler_is_exact and (weights(a) - weights(b)).abs().max() < 1e-6 and abs(
        logs(a)[1]["ratio/max"] - 1) > .01


def test_vespo_takes_the_correction_of_an_answer_once(config):
    """With our own sampler in half precision the default is one weight per answer: its logarithm, not one for each
    token."""
    trainer = make(config, loss_type="vespo")
    trainer.sampler_is_exact, mask = False, torch.tensor([[1, 1, 1], [1, 1, 0]])
    old, sampled = torch.full((2, 3), -1.0), torch.tensor([[-1.1, -.9, -1.2], [-1.3, -1.0, 7.0]])
    batch = {"mask": mask, "sampled_logps": sampled}
    correction, _ = trainer.sampler_correction(batch, old)
    assert trainer.token_weights(batch, old, old, correction) is None
    torch.testing.assert_close(trainer.trust_region(batch, correction).keywords["log_importance"],
                               torch.tensor([[.2], [.3]]))
    assert not trainer.sampler_is_exact and trainer.args.vllm_importance_sampling_mode == "sequence_mask"


# ---------------------------------------------------------------- prompts and rollouts
def test_conversations(config):
    seen, keep = [], Generations()
    def judge(prompts, completions, answer, **kwargs):
        seen.extend(zip(prompts, completions))
        said, right = ([message["content"] for (message,) in chats] for chats in (completions, answer))
        return [float(text == wanted) + noise for text, wanted, noise in zip(said, right, noisy(said))]
    data = rows(conversational=True)
    trainer = train(config, judge, data, callbacks=[keep], log_completions=True)
    prompt, completion = seen[0]
    assert prompt[-1]["role"] == "user" and list(completion[0]) == ["role",
                                                                    "content"] and completion[0]["role"] == "assistant"
    tokenizer = trainer.processing_class
    wanted = tokenizer.apply_chat_template(keep.seen[0].rows[0]["prompt"], add_generation_prompt=True, tokenize=True,
                                           return_dict=True)["input_ids"]
    assert keep.seen[0].prompt_ids[0] == wanted and logs(trainer)[0]["reward_std"] > 0


def test_an_environment_writes_tokens_that_do_not_learn(config):
    """`rollout_func` with `env_mask` and a column of its own. The gradient is that of the marked tokens; the others
    were read."""
    tokenizer, keep, asked = pocket.tokenizer(), Generations(), []
    def rollouts(prompts, trainer):
        asked.append((len(prompts), trainer))
        d = random.Random(len(asked))
        ids = [[d.randrange(4, 30) for _ in range(d.randint(3, 8))] + [tokenizer.eos_token_id] for _ in prompts]
        return {"prompt_ids": [tokenizer(p).input_ids for p in prompts], "completion_ids": ids, "logprobs": None,
                "env_mask": [[1] + [0, 0] + [1] * (len(x) - 3) for x in ids], "turns": list(range(len(prompts)))}
    def judge(completions, turns, **kwargs): return [t % 3 for t in turns]
    trainer = train(config, judge, rollout_func=rollouts, callbacks=[keep], loss_type="dapo")
    assert asked == [(16, trainer)] and trainer.engine is None
    batch, tokens = keep.tokens[0]
    assert (batch["mask"][:, 1:3] == 0).all() and (batch["mask"][:, 0] == 1).all()
    assert logs(trainer)[0]["completions/mean_length"] == batch["mask"].sum(1).float().mean() and logs(trainer)[0][
        "completions/clipped_ratio"] == 0
    model = pocket.start("reverse")[0]
    logps = completion_logps(model, batch)["logps"]
    (-(logps * batch["advantages"][:, None] * batch["mask"]).sum() / batch["mask"].sum()).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (weights(pocket.start("reverse")[0]) - weights(trainer) - expected).norm() < 1e-5 * expected.norm() + 1e-5


def test_every_eos_ends_a_rollout(config):
    """TRL reads them from the generation config too."""
    model, tokenizer = pocket.start("reverse")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 7]
    func = lambda prompts, trainer: {"prompt_ids": [[5]] * len(prompts),
                                     "completion_ids": [[8, 7] if i % 2 else [8, 9] for i in range(len(prompts))],
                                     "logprobs": None}
    assert logs(train(config, lambda completions, **k: list(range(len(completions))), model=model, rollout_func=func))[
        0]["completions/clipped_ratio"] == .5


def test_what_a_rollout_func_may_return(config):
    """Prompts that differ within a group, tensors, log-probs that are unknown, one value for all."""
    keep, end, levels = Generations(), pocket.tokenizer().eos_token_id, []
    def rollouts(prompts, trainer):
        return {"prompt_ids": [[5, 6, 7, 8][:2 + i % 3] for i in range(len(prompts))],
                "completion_ids": torch.tensor([[9, 10 + i % 5, end] for i in range(len(prompts))]),
                "logprobs": [[-1.0, None, -2.0]] * len(prompts), "level": "hard", "room": torch.arange(len(prompts))}
    def judge(completions, level, room, **kwargs):
        levels.extend(level)
        return [float(r % 4) for r in room]
    trainer = train(config, judge, rollout_func=rollouts, callbacks=[keep], learning_rate=0.0)
    (batch, tokens), generation = keep.tokens[0], keep.seen[0]
    from posttrain.foundations.layouts import make_batch
    alone = make_batch(generation.prompt_ids, generation.completion_ids)
    assert torch.allclose(tokens["logps"], completion_logps(trainer.model, alone)["logps"],
                          atol=1e-5) and (
                              alone["prompt_lengths"] == batch["prompt_lengths"][batch["prompt_index"]]).all()
    assert levels == ["hard"] * 16 and logs(trainer)[0]["completions/clipped_ratio"] == 0 and batch["sampled_logps"][
        :, 1].isnan().all()
    for wrong, error, says in ((None, TypeError, "returned NoneType"),
                               ({"logprobs": [[-1.0]] * 16}, ValueError, "1 logprobs for the 3 tokens of completion 0"),
                               ({"env_mask": [[1, 1, 1]] * 15 + [[1]]}, ValueError,
                                "1 env_mask for the 3 tokens of completion 15")):
        with pytest.raises(error, match=says):
            def broken(prompts, trainer): return wrong and {**rollouts(prompts, trainer), **wrong}
            train(config, judge, rollout_func=broken)


SIXTEEN = {"prompt_ids": [[1]] * 16, "completion_ids": [[1]] * 16}
WRONG_ROLLOUTS = {
    "key": (SIXTEEN, "missing: logprobs"),
    "completions": (SIXTEEN | {"completion_ids": [[1]] * 15, "logprobs": None},
                    "returned 15 values of 'completion_ids' for 16 prompts"),
    "masks": (SIXTEEN | {"logprobs": None, "env_mask": [[1]]}, "1 values of 'env_mask'"),
}


@pytest.mark.parametrize("out, says", WRONG_ROLLOUTS.values(), ids=WRONG_ROLLOUTS)
def test_a_rollout_func_that_is_wrong(out, says, config):
    with pytest.raises(ValueError, match=says): train(config, rollout_func=lambda prompts, trainer: out)


def test_a_stream_of_prompts(config):
    data = rows(6)
    plain, stream = train(config, dataset=data, shuffle_dataset=False,
                          max_steps=3), train(config, dataset=data.to_iterable_dataset(), max_steps=3)
    assert torch.equal(weights(plain), weights(stream)) and stream.stream.state.drawn == 12  # twice around six prompts
    with pytest.raises(ValueError, match="max_steps"):
        make(config, dataset=data.to_iterable_dataset(), max_steps=-1, num_train_epochs=1)
    from datasets import IterableDataset
    broken = IterableDataset.from_generator(lambda: ({"prompt": p} for p in ("reverse 12=", None)))
    with pytest.raises(TypeError, match="train dataset: column 'prompt', row 1: .*None"):
        train(config, dataset=broken)


def test_epochs_are_passes_over_the_prompts(config):
    trainer = train(config, dataset=rows(12), max_steps=-1, num_train_epochs=2, learning_rate=1e-3)
    assert trainer.state.global_step == 2 * 12 * G // 16
    assert trainer.stream.state.drawn == 24 and trainer.state.epoch == 2


def test_dynamic_sampling_leaves_no_dead_group(config):
    keep = Generations()
    trainer = train(config, exact_match_reward, callbacks=[keep], dynamic_sampling=True, max_steps=2,
                    learning_rate=1e-3)
    for generation in keep.seen:
        assert len(generation) == 16 and (generation.rewards.view(-1, G).std(1) > 0).all() and (
            generation.columns["advantages"] != 0).all()
    first = logs(trainer)[0]
    # rewards are those of all that was sampled
    assert 0 < first["dynamic_sampling/kept"] <= 1 and first["dynamic_sampling/rounds"] >= 1
    assert first["frac_reward_zero_std"] > 0
    def opposite(completions, **columns): return [1 - r for r in noisy(completions)]
    def constant(completions, **columns): return [1.0] * len(completions)
    trainer = make(config, [noisy, opposite, constant], dynamic_sampling=True,
                   multi_objective_aggregation="normalize_then_sum")
    generation = trainer.generate([row for row in rows(2) for _ in range(G)], list(range(2 * G)))
    # GDPO: two rewards that differ within a group, though their sum does not
    assert trainer.keep(generation).tolist() == [True] * 2
    trainer.rewards.weights[:2] = 0
    assert trainer.keep(generation).tolist() == [False] * 2
    with pytest.warns(UserWarning, match="after 2 rounds"):
        train(config, lambda completions, **k: [1.0] * len(completions), dynamic_sampling=True,
              dynamic_sampling_rounds=2)


# ---------------------------------------------------------------- rewards, references, adapters
def test_a_model_as_a_reward(config):
    from transformers import Qwen3Config, Qwen3ForSequenceClassification
    tokenizer, keep = pocket.tokenizer(), Generations()
    judge = Qwen3ForSequenceClassification(Qwen3Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
                                                       num_hidden_layers=2, num_attention_heads=4,
                                                       num_key_value_heads=2, head_dim=8, num_labels=1,
                                                       pad_token_id=tokenizer.pad_token_id))
    trainer = train(config, [judge, exact_match_reward], callbacks=[keep], reward_weights=[1.0, .5],
                    judges=[tokenizer, None])
    generation = keep.seen[0]
    for i in (0, 7, 15):
        ids = torch.tensor(
            [tokenizer(generation.rows[i]["prompt"] + generation.completions[i], add_special_tokens=False).input_ids])
        with torch.no_grad(): assert abs(judge(input_ids=ids).logits[0, 0] - generation.rewards[i, 0]) < 1e-4
    first = logs(trainer)[0]
    assert generation.rewards.shape == (16,
                                        2) and abs(
                                            first["reward"] - (generation.rewards @ torch.tensor([1.0, .5])).mean(
                                                )) < 1e-5
    assert abs(first[f"rewards/{trainer.rewards.names[0]}/mean"] - generation.rewards[:, 0].mean()) < 1e-5
    assert not any(p.grad is not None for p in judge.parameters())


def adapter(**kw):
    from peft import LoraConfig
    return LoraConfig(**{**dict(r=4, target_modules="all-linear", task_type="CAUSAL_LM"), **kw})


def test_the_reference_of_an_adapter_is_the_model_without_it(config):
    keep = Generations()
    trainer = train(config, peft_config=adapter(), beta=.1, max_steps=3, num_iterations=3, learning_rate=.5,
                    callbacks=[keep])
    assert trainer.reference.model is trainer.model and logs(trainer)[0]["kl"] == 0 and logs(trainer)[2]["kl"] > 0
    batch, _ = keep.tokens[-1]
    base = completion_logps(pocket.start("reverse")[0], batch)["logps"]
    assert torch.allclose(batch["ref_logps"], base,
                          atol=1e-5) and not torch.allclose(completion_logps(trainer.model, batch)["logps"], base,
                                                            atol=1e-3)
    merged = copy.deepcopy(trainer.model).merge_and_unload()
    trainer.engine.sync(trainer.model)
    seeds, prompts = list(range(8)), [batch["prompt_ids"][0, :batch["prompt_lengths"][0]].tolist()] * 8
    # with the adapter: its log-probs are those of the merged model
    said = trainer.engine.sample(prompts, seeds, trainer.args.sampling())
    from posttrain.foundations.layouts import make_batch
    scored = completion_logps(merged, make_batch(prompts[:1], said.completion_ids, [0] * 8))["logps"]
    for logps, row in zip(said.sampled_logps, scored):
        assert torch.allclose(torch.tensor(logps), row[:len(logps)], atol=1e-4)


def test_a_reference_of_ones_own_and_one_that_follows(config):
    other = pocket.model(seed=3)
    trainer = train(config, beta=.1, ref_model=other)
    assert logs(trainer)[0]["kl"] > .01
    trainer = train(config, beta=.1, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0,
                    max_steps=2, num_iterations=1)
    assert torch.allclose(weights(trainer.reference.model), weights(trainer))


# ---------------------------------------------------------------- evaluation and logs
def test_evaluation_samples(config):
    test = rows(8, split="test")
    trainer = make(config, [exact_match_reward, noisy], eval_dataset=test, num_generations_eval=2,
                   per_device_eval_batch_size=4, beta=.05)
    first, again = trainer.evaluate(), trainer.evaluate()
    for key in ("eval_loss", "eval_reward", "eval_reward_std", "eval_rewards/exact_match_reward/mean",
                "eval_rewards/noisy/mean", "eval_completions/mean_length", "eval_kl", "eval_entropy",
                "eval_frac_reward_zero_std"):
        assert key in first, (key, first)
    # the same seeds: a curve of evaluations is no noise
    assert all(first[k] == again[k] for k in first if not k.endswith(("runtime", "second", "rollout")))
    # settings of a loader of rows: here batches are sampled
    of_rows = dict(dataloader_num_workers=2, dataloader_prefetch_factor=2, dataloader_persistent_workers=True,
                   train_sampling_strategy="group_by_length")
    half = make(config, [exact_match_reward, noisy], eval_dataset=test, num_generations_eval=2,
                per_device_eval_batch_size=1, beta=.05, **of_rows).evaluate()
    for key in ("eval_reward", "eval_rewards/noisy/mean", "eval_completions/mean_length"):
        assert abs(half[key] - first[key]) < 1e-5, key
    named = make(config, exact_match_reward, eval_dataset={"a": test, "b": rows(4, split="test", seed=9)},
                 eval_strategy="steps", eval_steps=1, max_steps=2)
    named.train()
    assert sum("eval_a_reward" in r for r in named.state.log_history) == 2 == sum(
        "eval_b_reward" in r for r in named.state.log_history)
    assert len(logs(named)) == 2 and named.args.num_generations == G
    with pytest.raises(NotImplementedError, match="evaluate"): trainer.predict(test)


def test_evaluation_does_not_change_training(config):
    plain = train(config, max_steps=3, learning_rate=.05, use_adaptive_entropy=True, entropy_target=5.0)
    both = train(config, max_steps=3, learning_rate=.05, use_adaptive_entropy=True, entropy_target=5.0,
                 eval_dataset=rows(8, split="test"), eval_strategy="steps", eval_steps=1)
    assert torch.equal(weights(plain), weights(both))


def test_completions_are_kept_and_shown(config, tmp_path, capsys):
    def judge(completions, log_extra, log_metric, **kwargs):
        log_extra("first", [c[:1] for c in completions])
        log_extra("of several kinds", ["a", 1, None, 2.5] * 4)
        log_extra("of an array", torch.arange(len(completions)))
        log_metric("mine/long", sum(map(len, completions)))
        log_metric("mine/unknown", math.nan)
        return noisy(completions)
    trainer = train(config, [judge, exact_match_reward], log_completions=True, num_completions_to_print=2, max_steps=2,
                    learning_rate=1e-3)
    files = sorted((tmp_path / "completions").iterdir())
    assert [f.name for f in files] == ["completions_00001.parquet", "completions_00002.parquet"]
    table = pq.read_table(files[1]).to_pydict()
    assert list(table) == ["step", "prompt", "completion", "first", "of several kinds", "of an array", "judge",
                           "exact_match_reward", "advantage"] and table["step"] == [2] * 16
    assert table["of several kinds"] == ["a", "1", None, "2.5"] * 4 and table["of an array"] == list(range(16))
    assert table["first"] == [c[:1] for c in table["completion"]] and abs(sum(table["advantage"])) < 1e-3
    assert logs(trainer)[1]["mine/long"] == sum(map(len, table["completion"])) and "mine/unknown" not in logs(trainer)[
        1]
    said = capsys.readouterr().out
    assert said.count("advantage") == 4 and repr(table["completion"][1]) in said and "judge" in said
    trainer.args.log_unique_prompts, trainer.args.num_completions_to_print = True, None
    assert len(trainer.completions_table().splitlines()) == 4  # one for each prompt


# ---------------------------------------------------------------- stopping and going on
RUN = """
import io, json, sys, torch
torch.set_num_threads(1)
from transformers import TrainerCallback
from posttrain import GRPOConfig, GRPOTrainer, pocket
from posttrain.rollout.rewards import exact_match_reward
from posttrain.training.progress import Progress
class Say(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs): print("STEP", state.global_step, flush=True)
def run(folder, resume, options):
    rows = pocket.dataset("reverse", "prompt_completion", n=50).rename_column("completion", "answer")
    given = dict(per_device_train_batch_size=8, gradient_accumulation_steps=2, num_generations=4, use_cpu=True,
                 max_completion_length=10, max_steps=12, learning_rate=1e-3, logging_steps=1, save_steps=3,
                 report_to="none", disable_tqdm=True, log_completions=True, num_completions_to_print=0)
    trainer = GRPOTrainer(pocket.start("reverse")[0], exact_match_reward, GRPOConfig(folder, **{**given, **options}),
                          train_dataset=rows, processing_class=pocket.tokenizer(),
                          callbacks=[Progress(stream=io.StringIO()), Say()])
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer
"""


def untimed(row): return {name: value for name, value in row.items() if not name.startswith("time")}


def test_killed_and_gone_on(tmp_path, capsys):
    """kill -9 after step 8, in the middle of a generation, between two checkpoints, with everything that a run
    remembers: weights, metrics and files end as if nothing had happened."""
    options = {"num_iterations": 2, "steps_per_generation": 4, "beta": .05, "sync_ref_model": True,
               "ref_model_sync_steps": 2, "use_adaptive_entropy": True, "entropy_target": 1.0, "dynamic_sampling": True}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    killed = subprocess.Popen([sys.executable, "-c", RUN + "run(sys.argv[1], False, json.loads(sys.argv[2]))",
                               str(tmp_path / "killed"), json.dumps(options)], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    scope = {}
    exec(RUN, scope)
    try:
        whole = scope["run"](str(tmp_path / "whole"), False, options)
        for line in killed.stdout:
            if line.startswith("STEP 8"): break
        else: raise AssertionError("the run ended before it was killed")
    finally:
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        killed.stdout.close()
    assert not (tmp_path / "killed" / "checkpoint-12").exists()
    resumed = scope["run"](str(tmp_path / "killed"), True, options)
    torch.set_num_threads(threads)
    assert torch.equal(weights(whole), weights(resumed))
    assert len(logs(whole)) == len(logs(resumed)) == 12
    for a, b in zip(logs(whole), logs(resumed)):
        assert untimed(a) == untimed(b)
    a, b = whole.stream.state_dict(), resumed.stream.state_dict()
    assert {k: v for k, v in a.items() if k != "batches"} == {k: v for k, v in b.items() if k != "batches"}
    files = sorted(f.name for f in (tmp_path / "whole" / "completions").iterdir())
    assert files == sorted(f.name for f in (tmp_path / "killed" / "completions").iterdir())
    for f in files:
        assert pq.read_table(tmp_path / "whole" / "completions" / f).equals(
            pq.read_table(tmp_path / "killed" / "completions" / f))


def test_a_checkpoint_without_its_rollouts(config, tmp_path):
    train(config, max_steps=2, save_strategy="steps", save_steps=1, learning_rate=1e-3)
    (tmp_path / "checkpoint-2" / "run-state-0.pt").unlink()
    with pytest.raises(FileNotFoundError, match="run-state-0.pt is missing"):
        train(config, max_steps=3, resume=str(tmp_path / "checkpoint-2"))


# ---------------------------------------------------------------- two processes
PROCESSES = LEAVE + """
import io, json, os, sys, random, torch
torch.set_num_threads(1)
import posttrain
from posttrain import pocket
from posttrain.training.progress import Progress
def noisy(completions, log_metric, **kwargs):
    log_metric("mine", float(len(completions)))
    return [random.Random(c).random() for c in completions]
def run(folder, method, size, accumulated, options):
    rows = pocket.dataset("reverse", "prompt_completion", n=50)
    config, trainer = (getattr(posttrain, method + kind) for kind in ("Config", "Trainer"))
    args = config(folder, use_cpu=True, ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None, optim="sgd",
                  lr_scheduler_type="constant", max_grad_norm=1e9, max_steps=2, per_device_train_batch_size=size,
                  gradient_accumulation_steps=accumulated, max_completion_length=8, per_device_eval_batch_size=4,
                  logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
                  **{"learning_rate": .1, "num_generations": 4, **options})
    model = pocket.start("reverse")[0]
    trainer = trainer(model, noisy, args, train_dataset=rows, eval_dataset=rows.select(range(11)),
                      processing_class=pocket.tokenizer(), callbacks=[Progress(stream=io.StringIO())])
    trainer.train()
    return {"weights": torch.cat([p.detach().flatten() for p in model.parameters()]),
            "log": [r for r in trainer.state.log_history if "loss" in r],
            "eval": trainer.evaluate(), "processes": trainer.accelerator.num_processes}
"""
SETTINGS = [{"loss_type": "grpo", "beta": .1, "num_iterations": 2},
            {"loss_type": "bnpo", "top_entropy_quantile": .4, "use_adaptive_entropy": True, "entropy_coef": .1,
             "entropy_target": 5.0},
            {"dynamic_sampling": True, "scale_rewards": "batch", "mask_truncated_completions": True}]


def assert_two_processes_are_one(folder, method, settings):
    "Each of the settings, in two processes and two cuts of a step, gives the weights and the logs of one process."
    (folder / "run.py").write_text(PROCESSES + f"""
cuts = ((2, 4), (8, 1))
out = [run(sys.argv[1], {method!r}, *cut, options) for options in {settings!r} for cut in cuts]
import torch.distributed as dist
if dist.get_rank() == 0: torch.save(out, sys.argv[1] + "/out.pt")
leave(dist.barrier)
""")
    launch(2, str(folder / "run.py"), str(folder))
    together, scope = torch.load(folder / "out.pt"), {}
    exec(PROCESSES, scope)
    for i, options in enumerate(settings):
        alone = scope["run"](str(folder), method, 16, 1, options)
        for other in together[2 * i:2 * i + 2]:
            apart = (alone["weights"] - other["weights"]).abs().max()
            assert other["processes"] == 2 and apart <= 1e-5, (options, apart)
            for a, b in zip(alone["log"], other["log"], strict=True):
                for key in set(a) - {"mine", "step", "epoch"}:
                    if not key.startswith("time"):
                        assert abs(a[key] - b[key]) <= 1e-4 * max(1, abs(a[key])), (options, key, a[key], b[key])
            # Rows that a process repeats count nothing: the last batch of the evaluation is not full.
            assert alone["eval"].keys() == other["eval"].keys() >= {"eval_reward", "eval_completions/mean_length"}
            for key, value in alone["eval"].items():
                if any(word in key for word in ("time", "per_second")): continue
                found = other["eval"][key]
                assert abs(value - found) <= 1e-4 * max(1, abs(value)), (options, key, value, found)


@pytest.mark.distributed
def test_two_processes_are_one(tmp_path):
    """A group may lie on two processes; the same completions, gradient and metrics."""
    assert_two_processes_are_one(tmp_path, "GRPO", SETTINGS)


# ---------------------------------------------------------------- what it says when something is wrong
WRONG = {"loss_type": (dict(loss_type="ppo"), r"loss_type='ppo'.*'grpo'"),
         "level": (dict(importance_sampling_level="word"), "importance_sampling_level='word'"),
         "scale": (dict(scale_rewards="all"), "scale_rewards='all'"),
         "aggregation": (dict(multi_objective_aggregation="sum"), "multi_objective_aggregation='sum'"),
         "mode": (dict(vllm_importance_sampling_mode="clip"), "vllm_importance_sampling_mode='clip'.*'sequence_mask'"),
         "sampler": (dict(sampler="mine"), "sampler='mine'"),
         "vllm_mode": (dict(vllm_mode="remote"), "vllm_mode='remote'"), "beta": (dict(beta=-.1), "beta=-0.1"),
         "epsilon": (dict(epsilon=-1), "epsilon=-1"), "epsilon_high": (dict(epsilon_high=-1), "epsilon_high=-1"),
         "quantile": (dict(top_entropy_quantile=1.5), "top_entropy_quantile=1.5"),
         "mixup": (dict(ref_model_mixup_alpha=2), "ref_model_mixup_alpha=2"),
         "sync steps": (dict(ref_model_sync_steps=0), "ref_model_sync_steps=0"),
         "one generation": (dict(num_generations=1), "num_generations=1"),
         "no generations": (dict(num_generations=0), "num_generations=0"),
         "eval generations": (dict(num_generations_eval=0), "num_generations_eval=0"),
         "length": (dict(max_completion_length=0), "max_completion_length=0"),
         "iterations": (dict(num_iterations=0), "num_iterations=0"),
         "steps": (dict(steps_per_generation=0), "steps_per_generation=0"),
         "rounds": (dict(dynamic_sampling_rounds=0), "dynamic_sampling_rounds=0"),
         "temperature": (dict(temperature=0), "temperature=0"),
         "endless temperature": (dict(temperature=math.inf), "temperature=inf"), "top_p": (dict(top_p=0), "top_p=0"),
         "top_k": (dict(top_k=-1), "top_k=-1"), "min_p": (dict(min_p=2), "min_p=2"),
         "penalty": (dict(repetition_penalty=0), "repetition_penalty=0"),
         "stop": (dict(generation_kwargs={"stop": [""]}), "stop"),
         "kwargs": (dict(generation_kwargs={"num_beams": 4}), "'num_beams': 4 is unknown"),
         "auto size": (dict(auto_find_batch_size=True), "auto_find_batch_size"),
         "both sizes": (dict(generation_batch_size=16, steps_per_generation=2),
                        "generation_batch_size=16 and steps_per_generation=2"),
         "no multiple": (dict(generation_batch_size=20), "generation_batch_size=20 must be a multiple.* 16"),
         "no groups": (dict(num_generations=5), "16 completions.*num_generations=5"),
         "delta": (dict(delta=1.1), r"delta=1.1 .* 1\.2"),
         "vespo and sequences": (dict(loss_type="vespo", use_vllm=True), "vespo.*'sequence_mask'"),
         "no reference to move": (dict(sync_ref_model=True), "sync_ref_model=True.*beta=0"),
         "limits": (dict(vllm_importance_sampling_clip_min=3.0), "clip_min=3.0 must be below .*clip_max=3.0"),
         "gather": (dict(ds3_gather_for_generation=False), "ds3_gather_for_generation=False"),
         "hub": (dict(log_completions_hub_repo="a/b"), "log_completions_hub_repo='a/b'.*upload"),
         "a list": (dict(loss_type=["grpo"]), r"loss_type=\['grpo'\].*'grpo'"),
         "scale, None": (dict(scale_rewards=None), "scale_rewards=None.*'group'"),
         "tool turns": (dict(max_tool_calling_iterations=3), "max_tool_calling_iterations=3"),
         "continuous": (dict(use_transformers_continuous_batching=True), "use_transformers_continuous_batching=True"),
         "paged": (dict(use_transformers_paged=True), "use_transformers_paged=True"),
         "batching config": (dict(transformers_continuous_batching_config={"a": 1}),
                             "transformers_continuous_batching_config"),
         "model impl": (dict(vllm_model_impl="transformers"), "vllm_model_impl='transformers'"),
         "regex": (dict(vllm_structured_outputs_regex="a"), "vllm_structured_outputs_regex='a'"),}


@pytest.mark.parametrize("case", WRONG)
def test_a_config_that_is_wrong_says_what(case, tmp_path):
    options, says = WRONG[case]
    with pytest.raises(ValueError, match=says):
        GRPOConfig(str(tmp_path), use_cpu=True, report_to="none",
                   **{"per_device_train_batch_size": 16, "num_generations": G, **options})


def test_a_config_of_the_wrong_kind(tmp_path):
    for options, says in ((dict(num_generations="8"), "num_generations.*'8'"),
                          (dict(temperature=None), "temperature.*None"), (dict(beta="0.1"), "beta.*'0.1'"),
                          (dict(num_iterations=2.5), "num_iterations.* whole number, got 2.5"),
                          (dict(max_completion_length=None), "max_completion_length.*None"),
                          (dict(top_k=None), "top_k.*None"), (dict(top_p=None), "top_p.*None")):
        with pytest.raises(TypeError, match=says): GRPOConfig(str(tmp_path), use_cpu=True, report_to="none", **options)
    with pytest.warns(UserWarning, match="epsilon_high as the cap"):
        GRPOConfig(str(tmp_path), use_cpu=True, report_to="none", loss_type="cispo")
    with pytest.warns(FutureWarning, match="clip_max"):
        assert GRPOConfig(str(tmp_path), use_cpu=True, report_to="none",
                          vllm_importance_sampling_cap=2.0).vllm_importance_sampling_clip_max == 2.0
    # as in TRL, where it changes nothing for this loss
    assert GRPOConfig(str(tmp_path), use_cpu=True, report_to="none", loss_type="cispo", epsilon_high=5.0,
                      delta=2.0).delta == 2.0
    for given, becomes in ((True, "group"), (False, "none")):
        assert GRPOConfig(str(tmp_path), use_cpu=True, report_to="none", scale_rewards=given).scale_rewards == becomes


@pytest.mark.parity
def test_fields_and_defaults_are_trls(tmp_path):
    """Every field of TRL's config is here. Differences: see PostConfig; fewer completions are printed; a server is
    looked for on this machine; and padding."""
    import trl
    fields = {f.name for f in dataclasses.fields(trl.GRPOConfig)}
    assert fields <= {f.name for f in dataclasses.fields(GRPOConfig)}
    ours, theirs = GRPOConfig(str(tmp_path), use_cpu=True,
                              report_to="none"), trl.GRPOConfig(str(tmp_path), use_cpu=True, report_to="none",
                                                                bf16=False)
    different = {n for n in fields if getattr(ours, n) != getattr(theirs, n)}
    assert different <= {"gradient_checkpointing", "gradient_checkpointing_kwargs", "logging_nan_inf_filter",
                         "num_completions_to_print", "pad_to_multiple_of", "vllm_server_host", "dataloader_pin_memory",
                         "logging_dir", "remove_unused_columns"}, different
    import inspect
    names = [n for n in inspect.signature(trl.GRPOTrainer.__init__).parameters if n not in ("quantization_config",)]
    assert set(names) <= set(inspect.signature(GRPOTrainer.__init__).parameters)


def test_arguments_that_are_wrong_are_found_before_a_model_is_loaded(config):
    nowhere = "/nowhere/at/all"
    kw = config(num_generations=4)
    kw.pop("train_sampling_strategy")
    four = rows(4)
    def build(rewards=noisy, data=four, **more):
        return GRPOTrainer(nowhere, rewards, GRPOConfig(**kw, **more.pop("config", {})), data,
                           processing_class=pocket.tokenizer(), **more)
    for call, error, says in ((lambda: build(None), TypeError, "needs reward_funcs"),
                              (lambda: build([]), ValueError, "at least one"),
                              (lambda: build(config=dict(reward_weights=[1.0, 2.0])), ValueError,
                               "2 reward weights for 1"),
                              (lambda: build(tools=[print]), ValueError, "tools is not supported.*rollout_func"),
                              (lambda: build(environment_factory=dict), ValueError, "environment_factory"),
                              (lambda: build(data=Dataset.from_list([{"question": "a"}])), ValueError, "prompt"),
                              (lambda: build(data=[{"prompt": "a"}]), TypeError, "list"),
                              (lambda: build(data=Dataset.from_list([{"prompt": None}])), TypeError,
                               "column 'prompt', row 0"),
                              (lambda: build(exact_match_reward, rows(4).remove_columns("answer")), TypeError,
                               "answer"),
                              (lambda: build(noisy, rows(4).add_column("completions", ["a"] * 4)), ValueError,
                               "completions"), (lambda: build(print_me), TypeError, "needs 'colour'"),
                              (lambda: build(eval_dataset=Dataset.from_list([{"a": 1}])), ValueError, "prompt")):
        with pytest.raises(error, match=says): call()
    plain = pocket.tokenizer()
    plain.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        GRPOTrainer(nowhere, noisy, GRPOConfig(**kw), rows(4, conversational=True), processing_class=plain)
    with pytest.raises(ValueError, match="training requires a train_dataset"):
        GRPOTrainer(pocket.model(seed=0), noisy, GRPOConfig(**kw), processing_class=pocket.tokenizer()).train()
    with pytest.raises(TypeError, match="args must be"): GRPOTrainer(nowhere, noisy, {"beta": 1}, rows(4))


def print_me(completions, colour): return [1.0] * len(completions)


def test_a_reward_that_fails_names_itself(config):
    def broken(completions, **kwargs): return [1.0]
    def raising(completions, **kwargs): raise KeyError("gold")
    with pytest.raises(ValueError, match="broken.*16|broken.* 1 "): train(config, broken)
    with pytest.raises(RuntimeError, match="raising"): train(config, raising)
    def talking(completions, log_extra, **kwargs): log_extra("x", [1])
    with pytest.raises(RuntimeError, match=r"talking.*log_extra\('x', ...\) was given 1 values for 16 completions"):
        train(config, talking)
