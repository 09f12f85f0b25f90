"""OnlineDPOTrainer, XPOTrainer, NashMDTrainer: losses in plain loops, cuts, two processes, resuming, judges, reference
answers, evaluation, bad input."""
import copy
import math
import random

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from posttrain import (
    NashMDConfig,
    NashMDTrainer,
    OnlineDPOConfig,
    OnlineDPOTrainer,
    XPOConfig,
    XPOTrainer,
    pocket,
)
from posttrain.online.comparing import of_epoch
from posttrain.rollout.rewards import exact_match_reward
from posttrain.rollout.sampler import Sampler
from test_grpo import assert_two_processes_are_one, logs, noisy, rows, weights

METHODS = {"online dpo": (OnlineDPOTrainer, OnlineDPOConfig, {}),
           "xpo": (XPOTrainer, XPOConfig, dict(alpha=.05)),
           "xpo, rounds": (XPOTrainer, XPOConfig, dict(alpha=.05, bonus_over="rounds")),
           "nash-md": (NashMDTrainer, NashMDConfig, dict(mixture_coef=.25)),
           "nash-md, token": (NashMDTrainer, NashMDConfig, dict(mixture_coef=.25, kl="token"))}
EACH = pytest.mark.parametrize("name", METHODS)
THREE = pytest.mark.parametrize("name", ["online dpo", "xpo, rounds", "nash-md"])


def score_of(completion): return random.Random(completion).random()


class Batches(TrainerCallback):
    "What was learned from."

    def __init__(self): self.seen, self.generations = [], []

    def on_tokens(self, trainer, batch, tokens): self.seen.append((batch, tokens))

    def on_generation(self, trainer, generation): self.generations.append(generation)


def make(config, name="online dpo", rewards=noisy, dataset=None, model=None, callbacks=None, **options):
    trainer, config_class, own = METHODS[name]
    beside = {k: options.pop(k) for k in ("judge", "ref_model", "peft_config", "rollout_func") if k in options}
    if "judge" in beside: rewards = None
    given = dict(per_device_train_batch_size=8, max_completion_length=10, max_steps=1, optim="sgd", learning_rate=.1,
                 max_grad_norm=1e9, lr_scheduler_type="constant", **own)
    args = config(**{**given, **options})
    args.pop("train_sampling_strategy")
    return trainer(pocket.start("reverse")[0] if model is None else model, rewards, config_class(**args),
                   rows() if dataset is None else dataset, rows(8), pocket.tokenizer(), callbacks=callbacks, **beside)


def train(config, *args, resume=None, **options):
    trainer = make(config, *args, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def start(): return pocket.start("reverse")[0]


# ---------------------------------------------------------------- the loss and its gradient
def logps_of(model, prompt, completion, temperature):
    "Log-probs of one completion's tokens from all logits."
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1:-1].float() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def loss_by_hand(name, generation, policy, reference, *, beta, temperature, alpha=0.0, bonus=None):
    "The losses of the papers, pair by pair."
    losses = []
    for i in range(0, len(generation), 2):
        prompt, answers = generation.prompt_ids[i], generation.completion_ids[i:i + 2]
        own = [logps_of(policy, prompt, ids, temperature) for ids in answers]
        with torch.no_grad(): base = [logps_of(reference, prompt, ids, temperature) for ids in answers]
        scores = [score_of(pocket.tokenizer().decode(ids, skip_special_tokens=True)) for ids in answers]
        better = int(scores[1] > scores[0])
        ratios = [o.sum() - b.sum() for o, b in zip(own, base)]
        if name.startswith("nash-md"):
            p = 1 / (1 + math.exp(scores[1] - scores[0]))
            ratio = (own[0] - base[0]).detach()
            to_go = ratio.flip(0).cumsum(0).flip(0)
            cost = ((ratio if name.endswith("token") else to_go) * own[0]).sum()
            losses.append(beta * cost - (p - .5) * own[0].sum())
            continue
        loss = -F.logsigmoid(beta * (ratios[better] - ratios[1 - better])) if scores[0] != scores[1] else 0
        losses.append(loss + (alpha * own[1].sum() if name == "xpo" else 0))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("name", ["online dpo", "xpo", "nash-md", "nash-md, token"])
def test_loss_and_gradient_in_plain_loops(name, config):
    "The generation as it was sampled: the policy's answer stands first, before pairs are sorted."
    policy, reference = start(), pocket.start("sort")[0]
    trainer = make(config, name, model=policy, ref_model=reference, temperature=.7, beta=.3)
    sampled, sample = [], trainer.sample
    trainer.sample = lambda *args: sampled.append(sample(*args)) or sampled[-1]
    expected = copy.deepcopy(policy)
    trainer.train()
    loss = loss_by_hand(name, sampled[0], expected, reference, beta=.3, temperature=.7, alpha=.05)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in expected.parameters()])
    found = (weights(expected) - weights(trainer)) / trainer.args.learning_rate
    assert abs(logs(trainer)[0]["loss"] - loss.item()) < 1e-5
    assert (found - gradient).norm() < 1e-4 * gradient.norm() and gradient.norm() > 1e-2


@EACH
def test_one_gradient_for_every_cut(name, config):
    whole = train(config, name, per_device_train_batch_size=8, max_steps=2)
    moved = (weights(whole) - weights(start())).norm()
    assert moved > 1e-3
    for size, accumulated in ((4, 2), (1, 8)):
        cut = train(config, name, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated,
                    max_steps=2)
        assert (weights(cut) - weights(whole)).norm() <= 2e-5 * moved, (size, accumulated)
        for a, b in zip(logs(whole), logs(cut), strict=True):
            for key in set(a) - {"step", "epoch"}:
                if key.startswith("time"): continue
                assert abs(a[key] - b[key]) <= 2e-5 * max(1, abs(a[key])), (key, a[key], b[key])


@pytest.mark.distributed
@pytest.mark.parametrize("method, settings", [
    ("OnlineDPO", [dict(beta=.3), dict(loss_type="ipo", dynamic_sampling=True, num_iterations=2, learning_rate=2e-3)]),
    ("XPO", [dict(alpha=.05), dict(alpha=.05, bonus_over="rounds", mask_truncated_completions=True)]),
    ("NashMD", [dict(mixture_coef=.25, beta=.3)])])
def test_two_processes_are_one(tmp_path, method, settings):
    assert_two_processes_are_one(tmp_path, method, [dict(num_generations=2, **options) for options in settings])


@THREE
def test_resumed_in_the_middle_of_a_generation(name, config, tmp_path):
    settings = dict(num_iterations=2, steps_per_generation=2, per_device_train_batch_size=4, max_steps=6,
                    learning_rate=1e-3, optim="adamw_torch", save_strategy="steps", save_steps=3)
    whole = train(config, name, **settings)
    resumed = train(config, name, resume=str(tmp_path / "checkpoint-3"), **settings)
    assert torch.equal(weights(whole), weights(resumed)) and whole.stream.state.sampled == resumed.stream.state.sampled


# ---------------------------------------------------------------- who is better
@pytest.mark.parametrize("name", ["online dpo", "xpo"])
def test_ties_teach_nothing_and_are_counted(name, config):
    trainer = train(config, name, rewards=lambda completions, **_: [1.0] * len(completions),
                    **(dict(alpha=0.0) if name == "xpo" else {}))
    assert torch.equal(weights(trainer), weights(start())) and logs(trainer)[0]["frac_ties"] == 1
    unknown = train(config, name, rewards=lambda completions, **_: [None] * len(completions),
                    **(dict(alpha=0.0) if name == "xpo" else {}))
    assert torch.equal(weights(unknown), weights(start())) and logs(unknown)[0]["frac_ties"] == 1


def test_half_of_the_pairs_tied_is_half_of_the_loss(config):
    "The mean is over all prompts that were asked, so a tie makes a step smaller and no other pair louder."
    keep = Batches()
    def rarely(completions, **_): return [score_of(c) if i // 2 % 2 else 0.0 for i, c in enumerate(completions)]
    trainer = train(config, rewards=rarely, callbacks=[keep])
    batch, _ = keep.seen[0]
    assert batch["decided"][0::2].tolist() == [False, True] * 4 and logs(trainer)[0]["frac_ties"] == .5
    assert abs(logs(trainer)[0]["loss"] - math.log(2) / 2) < 1e-6 and logs(trainer)[0]["rewards/margins"] == 0


@EACH
def test_a_judge_and_the_rewards_that_it_follows(name, config):
    "A judge that says sigma of the difference is the same as the scores themselves."
    def judge(prompt, first, second): return 1 / (1 + math.exp(score_of(second) - score_of(first)))
    by_scores, by_judge = train(config, name), train(config, name, judge=judge)
    assert (weights(by_scores) - weights(by_judge)).norm() <= 1e-6 * (weights(by_scores) - weights(start())).norm()
    (a,), (b,) = logs(by_scores), logs(by_judge)
    for key in ("frac_ties", "loss", "rewards/margins"): assert abs(a[key] - b[key]) < 1e-6


class LongerIsBetter:
    "A judge of TRL's kind."
    calls = 0

    def judge(self, prompts, completions, shuffle_order=True):
        LongerIsBetter.calls += 1
        return [-1 if len(a) == len(b) else int(len(b) > len(a)) for a, b in completions]


def test_judges_of_trls_kind_and_async_ones(config):
    keep = Batches()
    trainer = train(config, judge=LongerIsBetter(), callbacks=[keep])
    texts = [pocket.tokenizer().decode(ids, skip_special_tokens=True) for ids in keep.generations[0].completion_ids]
    lengths = torch.tensor([len(text) for text in texts]).view(-1, 2)
    assert (lengths[:, 0] >= lengths[:, 1]).all() and (lengths[:, 0] > lengths[:, 1]).any()
    assert logs(trainer)[0]["frac_ties"] == (lengths[:, 0] == lengths[:, 1]).float().mean().item()
    async def longer(prompt, first, second): return .5 if len(first) == len(second) else float(len(first) > len(second))
    other = train(config, judge=longer)
    assert torch.equal(weights(trainer), weights(other))


def test_a_judge_gets_columns_that_it_names(config):
    def by_answer(prompt, first, second, answer): return .5 + .5 * ((first == answer) - (second == answer))
    trainer = train(config, judge=by_answer, dataset=rows())
    other = train(config, rewards=exact_match_reward, dataset=rows())
    assert torch.equal(weights(trainer), weights(other))


@pytest.mark.parametrize("judged", [False, True])
def test_missing_eos_costs_the_same_by_scores_and_by_a_judge(judged, config):
    "Penalty 3 on answers of at most four tokens: whoever ended beats whoever was cut by 3 nats of log-odds."
    keep = Batches()
    how = dict(judge=lambda prompt, first, second: .5) if judged else dict(
        rewards=lambda completions, **_: [0.0] * len(completions))
    train(config, missing_eos_penalty=3.0, max_completion_length=4, per_device_train_batch_size=32, callbacks=[keep],
          temperature=1.5, **how)
    generation = keep.generations[0]
    ended = torch.tensor(generation.finished).view(-1, 2)
    differs = ended[:, 0] != ended[:, 1]
    assert differs.any() and ended[differs, 0].all()  # the one that ended was chosen
    p = torch.tensor(generation.extra["preference"]).view(-1, 2)[:, 0]
    assert torch.allclose(p[differs], torch.tensor(3.0).sigmoid()) and (p[~differs] == .5).all()


def test_dynamic_sampling_leaves_ties_out(config):
    keep = Batches()
    def sometimes(completions, **_): return [float(len(c) > 4) for c in completions]
    trainer = train(config, rewards=sometimes, dynamic_sampling=True, dynamic_sampling_rounds=30, callbacks=[keep])
    assert keep.seen[0][0]["decided"].all() and logs(trainer)[0]["dynamic_sampling/kept"] < 1


def test_pairs_with_a_cut_answer_can_be_left_out(config):
    keep = Batches()
    train(config, mask_truncated_completions=True, max_completion_length=5, per_device_train_batch_size=16,
          callbacks=[keep])
    batch, generation = keep.seen[0][0], keep.generations[0]
    ended = torch.tensor(generation.finished).view(-1, 2).all(1)
    differ = torch.tensor([a != b for a, b in zip(generation.completion_ids[0::2], generation.completion_ids[1::2])])
    assert 0 < ended.sum() < 16 and torch.equal(batch["decided"][0::2], ended & differ)


# ---------------------------------------------------------------- the opponents
LORA = dict(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False,
            task_type="CAUSAL_LM")


@pytest.mark.parametrize("name", ["xpo", "nash-md"])
def test_with_an_adapter_the_reference_writes_without_it(name, config):
    """TRL 1.13 lets the base model write with the adapter's layers still on. Here a mixture with the coefficient 1, and
    XPO's second answer, are those of the plain model."""
    torch.manual_seed(0)
    keep = Batches()
    options = dict(mixture_coef=1.0) if name == "nash-md" else {}
    trainer = make(config, name, peft_config=LoraConfig(**LORA), callbacks=[keep], **options)
    sampled, sample = [], trainer.sample
    trainer.sample = lambda rows, seeds, n=None: sampled.append((sample(rows, seeds, n), seeds)) or sampled[-1][0]
    trainer.train()
    generation, seeds = sampled[0]
    plain = Sampler(start(), pocket.tokenizer())
    how = trainer.args.sampling()
    def written(k): return plain.sample(generation.prompt_ids[k::2], seeds[k::2], how).completion_ids
    assert generation.completion_ids[1::2] == written(1)
    assert generation.completion_ids[0::2] != written(0)  # the policy has its adapter on
    assert all(not m.disable_adapters for m in trainer.model.modules() if hasattr(m, "lora_A"))
    assert logs(trainer)[0]["grad_norm"] > 0


def test_xpo_lowers_what_the_reference_says(config):
    "With alpha alone the reference's answers lose probability, over rounds as over the batch."
    for name in ("xpo", "xpo, rounds"):
        keep = Batches()
        trainer = train(config, name, rewards=lambda completions, **_: [0.0] * len(completions), alpha=1.0,
                        learning_rate=.02, per_device_train_batch_size=16, callbacks=[keep])
        g = keep.generations[0]
        theirs = [i for i, writer in enumerate(g.extra["written_by"]) if writer == "reference"]
        @torch.no_grad()
        def mean_logp(model):
            logps = [logps_of(model, g.prompt_ids[i], g.completion_ids[i], .9).sum() for i in theirs]
            return sum(logps) / len(logps)
        assert len(theirs) == 16 and mean_logp(trainer.model) < mean_logp(start()) - .01


def test_rounds_are_replayed_from_all_of_them(config):
    trainer = train(config, "xpo, rounds", max_steps=5)
    assert len(trainer.reference_samples.answers) == 5 * 8


def test_a_reference_that_moves_is_sampled_from_as_it_is_now(config):
    trainer = train(config, "xpo", sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0, max_steps=2,
                    learning_rate=1.0)
    trainer.sync_engines()
    ids, how = [trainer.generation.prompt_ids[0]] * 8, trainer.args.sampling()
    now = Sampler(trainer.model, pocket.tokenizer()).sample(ids, list(range(8)), how)
    assert trainer.reference_engine.sample(ids, list(range(8)), how).completion_ids == now.completion_ids
    assert not torch.equal(weights(trainer.ref_model), weights(start()))


@EACH
def test_without_our_sampler(name, config):
    "transformers' generate where it can; a mixture needs our own sampler."
    trainer = train(config, name, sampler="transformers")
    assert logs(trainer)[0]["grad_norm"] > 0


def test_a_model_that_the_mixture_cannot_serve(config, monkeypatch):
    import posttrain.online.nash_md_trainer as module
    def refuse(*args, **kw): raise TypeError("GPTNeoX is not known")
    monkeypatch.setattr(module, "MixtureEngine", refuse)
    with pytest.raises(TypeError, match="own sampler, which cannot serve this one: GPTNeoX is not known"):
        make(config, "nash-md")


@THREE
def test_ones_own_rollouts_and_messages(name, config):
    def own(prompts, trainer):
        ids = trainer.encode([{"prompt": p} for p in prompts])
        answers = [[5 + i % 3, 6, trainer.processing_class.eos_token_id] for i in range(len(prompts))]
        return {"prompt_ids": ids, "completion_ids": answers, "logprobs": None}
    first, second = (logs(train(config, name, rollout_func=own))[0] for _ in range(2))
    assert first["loss"] == second["loss"]


@THREE
def test_what_a_tool_wrote_is_not_learned_and_columns_reach_the_judge(name, config):
    "A rollout_func's env_mask and its own columns, also where the other answer is an opponent's, which has none."
    keep, told = Batches(), []
    def own(prompts, trainer):
        ids = trainer.encode([{"prompt": p} for p in prompts])
        answers = [[5, 6 + i % 2, trainer.processing_class.eos_token_id] for i in range(len(prompts))]
        return {"prompt_ids": ids, "completion_ids": answers, "logprobs": None, "env_mask": [[1, 0, 1]] * len(prompts),
                "used": [i for i in range(len(prompts))]}
    def judge(prompt, first, second, used):
        told.append(used)
        return float(first > second)
    train(config, name, judge=judge, rollout_func=own, callbacks=[keep])
    batch = keep.seen[0][0]
    by_policy = [i for i, ids in enumerate(batch["completion_ids"].tolist()) if ids[:1] == [5]]
    assert len(by_policy) >= 8 and all(batch["mask"][i, :3].tolist() == [1, 0, 1] for i in by_policy)
    assert set(told) >= set(range(8))


# ---------------------------------------------------------------- evaluation and logs
@THREE
def test_evaluation_says_who_wins_against_the_reference(name, config):
    trainer = make(config, name, per_device_eval_batch_size=4, eval_strategy="no")
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_win_rate"] == second["eval_win_rate"] and 0 < first["eval_win_rate"] < 1
    assert math.isfinite(first["eval_loss"]) and first["eval_loss"] == second["eval_loss"]
    silent = make(config, name, eval_win_rate=False)
    assert ("eval_win_rate" in silent.evaluate()) == (name == "never")


def test_the_win_rate_is_over_the_pairs_that_were_judged(config):
    "However rows are cut into batches, although the judge cannot tell for some of them."
    def unsure(prompt, first, second): return None if len(prompt) % 2 else float(first > second)
    def rate(size): return make(config, judge=unsure, per_device_eval_batch_size=size).evaluate()["eval_win_rate"]
    rates = [rate(size) for size in (1, 3, 8)]
    assert max(rates) - min(rates) < 1e-6 and 0 < rates[0] < 1


def test_a_better_policy_wins(config):
    "Short answers are asked for: a policy that has learned to write them beats the start."
    def short(completions, **_): return [-float(len(c)) for c in completions]
    trainer = make(config, rewards=short, per_device_train_batch_size=32, learning_rate=3e-3, optim="adamw_torch",
                   max_steps=12)
    before = trainer.evaluate()["eval_win_rate"]
    trainer.train()
    assert trainer.evaluate()["eval_win_rate"] > max(.7, before + .1)


TRL_LOGS = {
    "online dpo": {"objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward",
                   "objective/scores", "objective/scores_margin", "rewards/chosen", "rewards/rejected",
                   "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "val/contain_eos_token",
                   "beta"},
    "xpo": {"loss/dpo", "loss/xpo", "objective/kl", "objective/entropy", "objective/model_scores",
            "objective/ref_scores", "objective/scores_margin", "rewards/chosen", "rewards/rejected",
            "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "val/model_contain_eos_token",
            "val/ref_contain_eos_token", "alpha", "beta"},
    "nash-md": {"loss/kl", "loss/score", "objective/entropy", "rewards/probabilities", "rewards/chosen",
                "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
                "val/model_contain_eos_token", "val/ref_contain_eos_token", "beta", "mixture_coef"}}


@pytest.mark.parametrize("name", TRL_LOGS)
def test_trls_names_are_logged(name, config):
    assert TRL_LOGS[name] <= set(logs(train(config, name))[0])


@THREE
def test_completions_can_be_looked_at(name, config, tmp_path):
    import pyarrow.parquet as pq
    train(config, name, log_completions=True, max_steps=2)
    table = pq.read_table(next((tmp_path / "completions").glob("*.parquet"))).to_pydict()
    assert {"prompt", "completion", "preference"} <= set(table)


@THREE
def test_dashboard_and_microscope_show_them(name, config, tmp_path):
    "Both read what every trainer tells; the microscope has the reference's log-probs and the scores of each answer."
    from posttrain.explore.dashboard import Dashboard, read_rows
    from posttrain.explore.microscope import FILE, Microscope, microscope
    train(config, name, max_steps=3, callbacks=[Microscope(1), Dashboard()])
    looks = read_rows(tmp_path / FILE)
    answers = [answer for look in looks for prompt in look["prompts"] for answer in prompt["completions"]]
    assert len(looks) == 3 and all(answer["scores"] and len(answer["ref_logps"]) == len(answer["logps"])
                                   for answer in answers)
    assert {"log-prob", "KL", "entropy"} <= set(microscope(tmp_path / FILE).controls["what"].values)
    assert (tmp_path / "dashboard.html").exists()


def test_beta_alpha_and_mixture_of_each_epoch(config):
    assert [of_epoch([1, 2, 3], epoch) for epoch in (None, 0, .9, 1.0, 7.5)] == [1, 1, 1, 2, 3]
    assert of_epoch(.5, 3) == .5
    trainer = train(config, "xpo", beta=[.5, .25], alpha=[.1, .2, .4], num_train_epochs=3, max_steps=-1,
                    dataset=rows(16))
    found = [(row["beta"], round(row["alpha"], 3)) for row in logs(trainer)]
    assert found == [(.5, .1)] * 2 + [(.25, .2)] * 2 + [(.25, .4)] * 2


# ---------------------------------------------------------------- what it says when something is wrong
WRONG = [
    ("online dpo", dict(num_generations=4), ValueError, "num_generations"),
    ("online dpo", dict(num_generations_eval=3), ValueError, "two answers are compared"),
    ("online dpo", dict(loss_type="ppo"), ValueError, "'sigmoid'"),
    ("online dpo", dict(loss_type="aot"), ValueError, "aot"),
    ("online dpo", dict(loss_type="exo_pair"), ValueError, "label_smoothing"),
    ("online dpo", dict(beta=0), ValueError, "beta"), ("online dpo", dict(beta=[.1, -1.0]), ValueError, "beta"),
    ("online dpo", dict(missing_eos_penalty=-1), ValueError, "missing_eos_penalty"),
    ("online dpo", dict(judge_timeout=0), ValueError, "judge_timeout"),
    ("online dpo", dict(reward_model_path="x"), ValueError, "reward_funcs"),
    ("online dpo", dict(beta=[]), ValueError, "holds no value"),
    ("nash-md", dict(mixture_coef=[]), ValueError, "holds no value"),
    ("xpo", dict(alpha=-1), ValueError, "alpha"), ("xpo", dict(bonus_over="all"), ValueError, "'rounds'"),
    ("nash-md", dict(mixture_coef=1.5), ValueError, "mixture_coef"),
    ("nash-md", dict(mixture_coef=[.5, 2]), ValueError, "mixture"),
    ("nash-md", dict(kl="word"), ValueError, "'to_go'")]


@pytest.mark.parametrize("name, options, kind, words", WRONG)
def test_bad_fields_are_named(name, options, kind, words, config):
    with pytest.raises(kind, match=words): METHODS[name][1](**{**config(), "per_device_train_batch_size": 4, **options})


def test_someone_must_say_who_is_better(config):
    for given in (dict(rewards=None), dict(judge=7)):
        with pytest.raises(TypeError, match="judge"): make(config, **given)
    with pytest.raises(TypeError, match="both are given"):
        OnlineDPOTrainer(start(), noisy, OnlineDPOConfig(**config()), rows(), judge=lambda p, a, b: 1)


def test_settings_that_would_do_nothing_or_harm_are_refused(config):
    with pytest.raises(ValueError, match="reward_weights=.* leave them out"):
        make(config, judge=lambda prompt, first, second: 1.0, reward_weights=[.5])
    with pytest.raises(ValueError, match="a stream has no epochs"):
        make(config, beta=[.5, .1], dataset=rows().to_iterable_dataset(), max_steps=2)
    with pytest.warns(UserWarning, match="no ratio of policies"): make(config, "nash-md", num_iterations=2)


class Fails:
    "A judge that fails at its third generation, until it is repaired."
    def __init__(self, how): self.how, self.calls, self.repaired = how, 0, False

    def __call__(self, prompt, first, second):
        self.calls += 1
        return self.how(first, second) if self.calls > 32 and not self.repaired else float(first > second)


def unavailable(first, second): raise ConnectionError("the judge has gone home")


@pytest.mark.parametrize("how, words", [
    (unavailable, "ConnectionError: the judge has gone home"), (lambda a, b: 1.5, "answered 1.5"),
    (lambda a, b: "first", "answered 'first'"), (lambda a, b: -.1, "answered -0.1")])
def test_a_judge_that_fails_names_itself_and_nothing_is_lost(how, words, config, tmp_path):
    settings = dict(max_steps=4, save_strategy="steps", save_steps=1, learning_rate=1e-3)
    whole = train(config, judge=lambda prompt, first, second: float(first > second), output_dir=str(tmp_path / "whole"),
                  **settings)
    judge = Fails(how)
    with pytest.raises(RuntimeError) as error: train(config, judge=judge, **settings)
    assert words in str(error.value) and "Fails" in str(error.value) and "reverse" in str(error.value)
    judge.repaired = True
    resumed = train(config, judge=judge, resume=True, **settings)
    assert torch.equal(weights(whole), weights(resumed))


def test_a_judge_that_takes_too_long(config):
    import time
    def slow(prompt, first, second): time.sleep(2)
    with pytest.raises(RuntimeError, match="'slow' did not answer within 0.05 seconds"):
        train(config, judge=slow, judge_timeout=.05)


def test_a_judge_with_too_few_answers(config):
    class Short:
        def judge(self, prompts, completions): return [0]
    with pytest.raises(RuntimeError, match="judge 'Short' returned 1 for 16 pairs"): train(config, judge=Short())


@pytest.mark.parity
def test_every_field_of_trl_is_here():
    import dataclasses

    from trl.experimental.online_dpo import OnlineDPOConfig as theirs
    their, ours = theirs("out", use_cpu=True), OnlineDPOConfig("out", use_cpu=True)
    missing = {f.name for f in dataclasses.fields(theirs)} - {f.name for f in dataclasses.fields(OnlineDPOConfig)}
    assert not missing, missing
    for name in ("learning_rate", "temperature", "beta", "loss_type", "max_length", "missing_eos_penalty", "top_p",
                 "disable_dropout", "vllm_gpu_memory_utilization"):
        assert getattr(ours, name) == getattr(their, name), name
    assert ours.max_completion_length == their.max_new_tokens


# ---------------------------------------------------------------- learning
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_online_dpo_learns(seed, tmp_path):
    "From about .2 greedy to at least .6, with a judge that knows what is right."
    model, tokenizer = pocket.start("reverse")
    test = pocket.dataset("reverse", "prompt_only", n=300, seed=2, split="test")
    def judge(prompt, first, second):
        right = prompt.removeprefix("reverse ").removesuffix("=")[::-1]
        return .5 + .5 * ((first == right) - (second == right))
    args = OnlineDPOConfig(str(tmp_path), max_steps=180, per_device_train_batch_size=64, dynamic_sampling=True,
                           dynamic_sampling_rounds=6, dynamic_sampling_prompts=128, max_completion_length=12, beta=.3,
                           learning_rate=1e-3, temperature=1.0, warmup_steps=20, logging_steps=20, save_strategy="no",
                           report_to="none", disable_tqdm=True, use_cpu=True, seed=seed)
    trainer = OnlineDPOTrainer(model, args=args, judge=judge, processing_class=tokenizer,
                               train_dataset=pocket.dataset("reverse", "prompt_only", n=8000, seed=1))
    before = pocket.accuracy(model, tokenizer, test)
    trainer.train()
    after = pocket.accuracy(trainer.model, tokenizer, test)
    print(f"seed {seed}: {before:.2f} -> {after:.2f}, {trainer.state.log_history[-1]['train_runtime']:.0f} s")
    assert before < .25 and after >= .6


# rock, scissors, paper in one token
BEATS, ANSWERS = {("r", "s"), ("s", "p"), ("p", "r")}, ("r", "s", "p")
TAUGHT = [{"prompt": "rps=", "completion": answer} for answer in "r" * 27 + "p" * 20 + "s" * 17]


def referee(prompt, first, second):
    "The winner is preferred with probability .9; what is no answer loses."
    legal = first in ANSWERS, second in ANSWERS
    if not all(legal): return None if not any(legal) else float(legal[0])
    return .5 if first == second else .9 if (first, second) in BEATS else .1


@torch.no_grad()
def played(model):
    "Probabilities of the three answers."
    ids, answers = (pocket.tokenizer()(text)["input_ids"] for text in ("rps=", "rsp"))
    return model(torch.tensor([ids])).logits[0, -1].softmax(-1)[answers]


def after_playing(name, seed, folder, **options):
    "How far the furthest of the three probabilities is from 1/3, before and after."
    model = pocket.model(seed)
    pocket.fit(model, pocket.tokenizer(), TAUGHT, 60)
    trainer, config, _ = METHODS[name]
    args = config(str(folder), **{**dict(
        max_completion_length=1, max_steps=150, optim="sgd", lr_scheduler_type="linear", max_grad_norm=1.0, seed=seed,
        temperature=1.0, judge_both_orders=False, logging_steps=50, save_strategy="no", report_to="none",
        disable_tqdm=True, use_cpu=True), **options})
    before = (played(model) - 1 / 3).abs().max().item()
    trainer(model, args=args, judge=referee, processing_class=pocket.tokenizer(),
            train_dataset=Dataset.from_list([{"prompt": "rps="}] * 64)).train()
    after = (played(model) - 1 / 3).abs().max().item()
    print(f"{name}, seed {seed}: {before:.3f} -> {after:.3f} from the uniform policy")
    return before, after


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_nash_md_with_a_cyclic_judge_ends_near_the_uniform_policy(seed, tmp_path):
    before, after = after_playing("nash-md", seed, tmp_path, mixture_coef=.0625, beta=.1, learning_rate=.03,
                                  per_device_train_batch_size=512)
    assert before > .08 and after < .05


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_online_dpo_that_is_held_loosely_does_not(seed, tmp_path):
    """With beta=.02 it goes round. The step is as large as Nash-MD's: the slope of DPO's loss has the factor 2 beta.
    Held as firmly as Nash-MD here it comes to rest, too: nbs/online/19_nash_md.ipynb says why."""
    before, after = after_playing("online dpo", seed, tmp_path, beta=.02, learning_rate=.75,
                                  per_device_train_batch_size=128)
    assert after > .05 and after > before
