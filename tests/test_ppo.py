"""PPO: against TRL 1.12, the last that had it (recorded by tests/oracles/removed.py), against formulas written out, and
what is our own: the two critics, cuts, resuming, bad input."""
import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import Qwen3ForSequenceClassification

from oracle import Answer, Sketch, start
from posttrain import PPOConfig, PPOTrainer, pocket
from posttrain.foundations.layouts import make_batch
from posttrain.foundations.masks import length_mask
from posttrain.online.ppo import ppo_advantages, ppo_loss, token_rewards, value_loss
from posttrain.rollout.critic import load_critic
from posttrain.training.heads import PolicyAndValue, completion_logps
from stamps import short_hash
from test_dpo_parity import moved
from test_grpo import assert_two_processes_are_one, logs, noisy, rows, weights

ORACLE = Path(__file__).parent / "oracles" / "ppo.json"
RECORDED = json.loads(ORACLE.read_text()) if ORACLE.exists() else {}  # it is not there while it is made
QUIET = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no",
             disable_tqdm=True, seed=0, warmup_steps=0)
SGD = dict(optim="sgd", learning_rate=1.0, max_grad_norm=1e9, lr_scheduler_type="constant")
LONGEST, N = 7, 8
#: options -> those of a run of N completions. Where they end early, TRL 1.12 is right at lambda = 1 and for the policy
#: alone: it puts the score one place behind the last token, and the critic learns that place, too
PLAIN = dict(num_ppo_epochs=1, vf_coef=.5, kl_coef=.2)
CASES = {
    "whole answers": PLAIN,
    "k3, whitened rewards, discounted": dict(PLAIN, kl_estimator="k3", whiten_rewards=True, gamma=.9, lam=.7,
                                             missing_eos_penalty=.5),
    "two passes": dict(PLAIN, num_ppo_epochs=2, learning_rate=.05, cliprange=.05, cliprange_value=.02),
    "ended, lambda 1": dict(PLAIN, vf_coef=0.0, lam=1.0),
    "ended, lambda 0": dict(PLAIN, vf_coef=0.0, lam=0.0),
}
LOGGED = ("objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward",
          "objective/scores", "loss/policy_avg", "loss/value_avg", "policy/clipfrac_avg", "val/clipfrac_avg",
          "policy/approxkl_avg", "policy/entropy_avg", "val/ratio", "val/num_eos_tokens")


# ---------------------------------------------------------------- one step of TRL 1.12 on given completions
def value_model(hidden_size=None, seed=0, scale=.3):
    "A critic on a body of its own that says something of each state, the same everywhere."
    lm, _ = start("sort")
    config = type(lm.config)(**{**lm.config.to_dict(), "num_labels": 1, "id2label": None, "label2id": None})
    if hidden_size: config.hidden_size = hidden_size
    torch.manual_seed(seed)
    made = Qwen3ForSequenceClassification(config)
    size = config.hidden_size
    own = {} if hidden_size else lm.state_dict()
    made.load_state_dict({**own, "score.weight": scale * torch.linspace(-1, 1, size)[None]}, strict=False)
    return made


def questions():
    "Prompts of different lengths, each of them once."
    found = {row["prompt"]: row for row in pocket.dataset("reverse", "prompt_only", n=40, seed=5)}
    return list(found)[:N]


def written(prompt, ended):
    "The completion that is given to a prompt: all of one length, or some that end early."
    tokenizer = pocket.tokenizer()
    number = questions().index(prompt)
    g = torch.Generator().manual_seed(number)
    ids = torch.randint(4, 14, (LONGEST,), generator=g).tolist()
    if ended and number % 3 != 2: ids = [*ids[:2 + number % 4], tokenizer.eos_token_id]
    return ids


def score_of(prompt): return torch.linspace(-1, 2, N)[questions().index(prompt)].item()


def models(): return moved(start("reverse")[0], 1, .1), start("reverse")[0]


def answer(trainer, before, rate):
    gradient = {n: (before[n] - p.detach()) / rate for n, p in trainer.model.named_parameters() if n in before}
    row = next(row for row in trainer.state.log_history if "objective/kl" in row)
    row = {name: value for name, value in row.items() if name in LOGGED}
    return Answer([torch.cat([g.flatten() for g in gradient.values()])],
                  [{**row, "trained": short_hash(*(n.replace("value_model.", "value.") for n in gradient))}])


def theirs(case, folder):
    "In a process with TRL 1.12."
    import trl
    import trl.experimental.ppo.ppo_trainer as module
    assert trl.__version__ == "1.12.0"
    ended, tokenizer, (policy, reference) = case.startswith("ended"), pocket.tokenizer(), models()
    tokenizer.padding_side = "left"
    given = {**QUIET, **SGD, **CASES[case]}
    args = module.PPOConfig(folder, **given, per_device_train_batch_size=N, response_length=LONGEST, logging_steps=1,
                            total_episodes=N, num_sample_generations=0, temperature=.7, stop_token="eos")
    asked = questions()
    data = Dataset.from_list([{"input_ids": tokenizer(prompt).input_ids} for prompt in asked])

    def given_completions(model, queries, _, pad, config):
        prompts = tokenizer.batch_decode(queries, skip_special_tokens=True)
        ids = [written(prompt, ended) for prompt in prompts]
        padded = torch.tensor([x + [pad] * (LONGEST - len(x)) for x in ids])
        whole = torch.cat([queries, padded], 1)
        logits = module.forward(model, whole, pad).logits[:, queries.shape[1] - 1:-1]
        return whole, logits / (args.temperature + 1e-7)
    module.batch_generation = given_completions
    asked_model, reward_model = module.get_reward, value_model(seed=1)
    def scored(model, texts, pad, context):
        if model is not reward_model: return asked_model(model, texts, pad, context)
        prompts = tokenizer.batch_decode(texts[:, :context], skip_special_tokens=True)
        return None, torch.tensor([score_of(prompt) for prompt in prompts]), None
    module.get_reward = scored
    trainer = module.PPOTrainer(args, tokenizer, policy, reference, reward_model, data, value_model())
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    return answer(trainer, before, args.learning_rate)


def rollouts(ended):
    def answered(prompts, trainer):
        return {"prompt_ids": [pocket.tokenizer()(p).input_ids for p in prompts], "logprobs": None,
                "completion_ids": [written(p, ended) for p in prompts]}
    return answered


def by_prompt(prompts, **columns): return [score_of(prompt) for prompt in prompts]


def ours(case, folder, ended=None, **more):
    policy, reference = models()
    given = {**QUIET, **SGD, **CASES.get(case, PLAIN)}
    args = PPOConfig(str(folder), **{**given, **dict(per_device_train_batch_size=N, response_length=LONGEST,
                     logging_steps=given["num_ppo_epochs"], total_episodes=N, temperature=.7), **more})
    trainer = PPOTrainer(policy, by_prompt, args, Dataset.from_list([{"prompt": p} for p in questions()]),
                         processing_class=pocket.tokenizer(), ref_model=reference, value_model=value_model(),
                         rollout_func=rollouts(case.startswith("ended") if ended is None else ended))
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    return answer(trainer, before, args.learning_rate)


@pytest.mark.parity
@pytest.mark.parametrize("case", [name for name in CASES if name != "ended, lambda 0"])
def test_gradient_and_metrics_equal_trl_where_it_is_right(case, tmp_path):
    their, our = RECORDED[case], ours(case, tmp_path)
    assert our.logs[0]["trained"] == their["log"]["trained"]
    recorded = Sketch(torch.tensor(their["projections"]), their["norm"])
    assert (recorded - our.gradients[0]).norm() <= 1e-5 * max(1, their["norm"])
    # TRL's critic learns a place behind the end, and its means count padding
    differ = ("loss/value_avg", "policy/approxkl_avg", "policy/entropy_avg", "val/ratio", "val/clipfrac_avg")
    for key in LOGGED:
        if case.startswith("ended") and key in differ: continue
        assert abs(our.logs[0][key] - their["log"][key]) <= 1e-5 * max(1, abs(their["log"][key])), key


def test_at_lambda_0_trls_last_action_does_not_see_the_score(tmp_path):
    "Named difference: the score one place behind the end reaches the action only through lambda."
    their, our = RECORDED["ended, lambda 0"], ours("ended, lambda 0", tmp_path)
    recorded = Sketch(torch.tensor(their["projections"]), their["norm"])
    assert (recorded - our.gradients[0]).norm() > .1 * their["norm"]


# ---------------------------------------------------------------- the numbers by hand
def by_loops(scores, logps, old, ref, values, old_values, mask, o):
    "PPO's loss of a batch, one number at a time."
    earned, columns = {}, [[t for t in range(mask.shape[1]) if mask[b, t]] for b in range(len(mask))]
    for b, places in enumerate(columns):
        for t in places: earned[b, t] = -o["beta"] * float(old[b, t] - ref[b, t])
        if places: earned[b, places[-1]] += float(scores[b])
    advantages, returns = {}, {}
    for b, places in enumerate(columns):
        after, later = 0.0, 0.0
        for t in reversed(places):
            delta = earned[b, t] + o["gamma"] * after - float(old_values[b, t])
            later = delta + o["gamma"] * o["lam"] * later
            advantages[b, t], after = later, float(old_values[b, t])
            returns[b, t] = later + after
    n, mean = len(advantages), sum(advantages.values()) / len(advantages)
    deviation = (sum((a - mean) ** 2 for a in advantages.values()) / (n - 1)) ** .5
    policy, critic = 0.0, 0.0
    for (b, t), advantage in advantages.items():
        white = (advantage - mean) / deviation
        ratio = (logps[b, t] - old[b, t]).exp()
        policy -= torch.minimum(ratio * white, ratio.clamp(.8, 1.2) * white)
        near = old_values[b, t] + (values[b, t] - old_values[b, t]).clamp(-.2, .2)
        critic += torch.maximum((values[b, t] - returns[b, t]) ** 2, (near - returns[b, t]) ** 2) / 2
    return policy / n + o["vf_coef"] * critic / n


@pytest.mark.parametrize("lam", [0.0, .5, 1.0])
@pytest.mark.parametrize("holes", [False, True])
def test_the_loss_equals_plain_loops(lam, holes):
    g = torch.Generator().manual_seed(0)
    def draw(*shape): return torch.randn(*shape, generator=g, dtype=torch.float64)
    lengths, options = torch.tensor([5, 1, 3, 0, 4]), dict(beta=.3, gamma=.9, lam=lam, vf_coef=.7)
    mask = length_mask(lengths, 6)
    if holes: mask[0, 1:3] = 0  # a tool wrote these
    logps, old, ref, values, old_values = (draw(5, 6) for _ in range(5))
    logps, values = (old + .3 * logps).requires_grad_(), (old_values + .3 * values).requires_grad_()
    scores = draw(5)
    expected = by_loops(scores, logps, old, ref, values, old_values, mask, options)
    padding = torch.where(mask == 0, torch.nan, 0.0)  # may hold anything
    rewards = token_rewards(scores, old - ref + padding, mask, beta=.3)
    advantages, returns = ppo_advantages(rewards, old_values, mask, gamma=.9, lam=lam)
    loss, _ = ppo_loss(logps + padding, old + padding, advantages, values, old_values, returns, mask, vf_coef=.7)
    assert torch.allclose(loss, expected, rtol=1e-12)
    own, their = (torch.autograd.grad(x, (logps, values), retain_graph=True) for x in (loss, expected))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(own, their))
    assert not advantages.requires_grad and not returns.requires_grad


def test_a_value_that_left_its_neighbourhood_has_no_gradient():
    values = torch.tensor([[0.0, .5, -.5, .1]], requires_grad=True)
    loss, stats = value_loss(values, torch.zeros(1, 4), torch.tensor([[1.0, 1.0, 1.0, 1.0]]), torch.ones(1, 4))
    loss.backward()
    # .5 went towards its return, further than .2: it rests. -.5 went away from it, and is called back
    assert values.grad[0, 1] == 0 and values.grad[0, 2] < 0 and stats["clipfrac"] == .25


# ---------------------------------------------------------------- the trainer
def make(config, steps=1, value=None, rewards=noisy, peft_config=None, data=None, **options):
    given = dict(per_device_train_batch_size=16, max_completion_length=8, max_steps=steps, optim="sgd",
                 learning_rate=.1, max_grad_norm=1e9, lr_scheduler_type="constant", num_ppo_epochs=1)
    args = config(**{**given, **options})
    args.pop("train_sampling_strategy")
    return PPOTrainer(pocket.start("reverse")[0], rewards, PPOConfig(**args), data or rows(), rows(6),
                      pocket.tokenizer(), value_model=value, peft_config=peft_config)


def train(config, resume=None, **options):
    trainer = make(config, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


CRITICS = {"head": {}, "copy": dict(critic="model"), "model": dict(value=True)}


def of(critic): return {**CRITICS[critic], **({"value": value_model(32)} if critic == "model" else {})}


@pytest.mark.parametrize("critic", CRITICS)
def test_one_gradient_however_a_step_is_cut(critic, config):
    runs = [train(config, per_device_train_batch_size=size, gradient_accumulation_steps=16 // size, steps=2,
                  num_generations=2, **of(critic)) for size in (16, 8, 2)]
    for other in runs[1:]:
        assert (weights(runs[0]) - weights(other)).abs().max() < 1e-5
        for a, b in zip(logs(runs[0]), logs(other), strict=True):
            for key in ("loss", "loss/value_avg", "loss/policy_avg", "kl", "objective/kl", "objective/rlhf_reward",
                        "val/clipfrac_avg", "entropy"):
                assert abs(a[key] - b[key]) < 1e-4 * max(1, abs(a[key])), key


@pytest.mark.distributed
def test_two_processes_are_one(tmp_path):
    assert_two_processes_are_one(tmp_path, "PPO", [
        dict(num_ppo_epochs=2, kl_coef=.1, kl_target=1.0, vf_coef=.5),
        dict(kl_coef=.1, critic="model", whiten_rewards=True, missing_eos_penalty=.5)])


@pytest.mark.parametrize("critic", CRITICS)
def test_resuming_goes_on_with_the_critic(critic, config, tmp_path):
    "In the middle of a generation, with a price of KL that had moved, and AdamW's state of the critic."
    options = dict(steps=6, num_ppo_epochs=2, num_mini_batches=2, save_steps=3, save_strategy="steps",
                   optim="adamw_torch", learning_rate=1e-3, critic_learning_rate=5e-3, kl_target=.5,
                   output_dir=str(tmp_path))
    whole = train(config, **options, **of(critic))
    again = train(config, str(tmp_path / "checkpoint-3"), **options, **of(critic))
    assert torch.equal(weights(whole), weights(again)) and whole.kl.coef == again.kl.coef != .05
    assert logs(whole)[3:] == logs(again)[-3:] or [r["loss"] for r in logs(whole)] == [r["loss"] for r in logs(again)]


def test_what_is_saved_is_a_language_model_with_a_critic_beside_it(config, tmp_path):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    trainer = train(config, value=value_model(), output_dir=str(tmp_path))
    trainer.save_model(str(tmp_path / "out"))
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "critic")
    for saved, now in ((policy, trainer.model.policy), (critic, trainer.model.value)):
        assert all(torch.equal(a, b) for a, b in zip(saved.state_dict().values(), now.state_dict().values()))
    assert trainer.model.generate(torch.tensor([[5, 6]]), max_new_tokens=1).shape == (1, 3)
    other = make(config, value=str(tmp_path / "out" / "critic"))
    assert all(torch.equal(a, b) for a, b in zip(other.model.value.parameters(), critic.parameters()))


def in_an_adapter(model):
    from peft import LoraConfig, get_peft_model
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=4, task_type="SEQ_CLS"), "critic")


@pytest.mark.parametrize("critic", [*CRITICS, "adapter"])
def test_a_saved_critic_says_the_same(critic, config, tmp_path):
    from transformers import AutoModelForCausalLM
    options = dict(value=in_an_adapter(value_model())) if critic == "adapter" else of(critic)
    trainer = train(config, critic_learning_rate=.5, output_dir=str(tmp_path), **options)
    trainer.save_model(str(tmp_path / "out"))
    both = load_critic(tmp_path / "out", AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    batch = make_batch([[5, 6]], [[7, 8, 9], [7, 8]], [0, 0])
    before, after = (completion_logps(model.eval(), batch) for model in (trainer.model, both))
    for name in ("logps", "values"):
        assert torch.allclose(before[name], after[name], atol=1e-6) and before[name].std() > 0, name
    if critic != "adapter": return
    other = make(config, value=str(tmp_path / "out" / "critic"))  # another run goes on with it
    assert torch.equal(completion_logps(other.model.eval(), batch)["values"], after["values"])
    learns = [name for name, p in other.model.value.named_parameters() if p.requires_grad]
    assert learns == [name for name, p in trainer.model.value.named_parameters() if p.requires_grad]
    with pytest.raises(FileNotFoundError, match="where a trainer with a critic has"): load_critic(tmp_path, both.policy)


def test_the_best_model_comes_with_its_critic(config, tmp_path):
    options = dict(steps=4, save_steps=1, eval_steps=1, save_strategy="steps", eval_strategy="steps",
                   learning_rate=1e-2, load_best_model_at_end=True, metric_for_best_model="eval_reward",
                   output_dir=str(tmp_path))
    trainer = train(config, **options)
    best = trainer.state.best_model_checkpoint
    fresh = make(config, output_dir=str(tmp_path))
    fresh._load_from_checkpoint(best)
    assert torch.equal(weights(trainer), weights(fresh))


@pytest.mark.parametrize("critic", CRITICS)
def test_an_adapter_learns_beside_either_critic(critic, config, tmp_path):
    from peft import LoraConfig, PeftModel
    adapter = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM")
    options = dict(peft_config=adapter, steps=4, save_steps=2, save_strategy="steps", optim="adamw_torch",
                   learning_rate=1e-3, output_dir=str(tmp_path))
    trainer = train(config, **options, **of(critic))
    moved = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert all("lora" in n or n.startswith("value.") for n in moved) and any(n.startswith("value.") for n in moved)
    assert abs(logs(trainer)[0]["kl"]) < 1e-5 < abs(logs(trainer)[-1]["kl"])  # the reference is the policy without it
    again = train(config, str(tmp_path / "checkpoint-2"), **options, **of(critic))
    assert torch.equal(weights(trainer), weights(again))
    loaded = PeftModel.from_pretrained(pocket.start("reverse")[0], tmp_path / "checkpoint-4")
    batch = make_batch([[5, 6]], [[7, 8, 9]], [0])
    assert torch.allclose(completion_logps(loaded, batch)["logps"], completion_logps(trainer.model, batch)["logps"])


@pytest.mark.parametrize("critic", CRITICS)
def test_in_the_warm_up_only_the_critic_learns(critic, config):
    "Not even weight decay moves the policy."
    trainer = train(config, steps=3, critic_warmup_steps=2, optim="adamw_torch", learning_rate=1e-3, vf_coef=1.0,
                    kl_coef=0.0, weight_decay=.1, **of(critic))
    at_first = make(config, kl_coef=0.0, **of(critic))
    first, second, third = logs(trainer)
    # the policy did not move before the third step: its ratio was 1 until then
    assert all(abs(row["ratio/max"] - 1) < 1e-4 for row in (first, second, third))
    short = train(config, steps=2, critic_warmup_steps=2, optim="adamw_torch", learning_rate=1e-3, vf_coef=1.0,
                  kl_coef=0.0, weight_decay=.1, **of(critic))
    def parts(t, part): return torch.cat([p.detach().flatten() for p in getattr(t.model, part).parameters()])
    assert torch.equal(parts(short, "policy"), parts(at_first, "policy"))
    assert not torch.equal(parts(short, "value"), parts(at_first, "value"))
    assert not torch.equal(parts(trainer, "policy"), parts(at_first, "policy"))


@pytest.mark.parametrize("critic", CRITICS)
def test_the_critic_has_a_learning_rate_of_its_own(critic, config):
    own = train(config, learning_rate=1e-3, critic_learning_rate=4e-3, kl_coef=0.0, **of(critic))
    one = train(config, learning_rate=1e-3, kl_coef=0.0, **of(critic))
    first = make(config, kl_coef=0.0, **of(critic))
    def change(t, part):
        pairs = zip(getattr(t.model, part).parameters(), getattr(first.model, part).parameters())
        return torch.cat([(a - b).detach().flatten() for a, b in pairs])
    assert torch.allclose(change(own, "value"), 4 * change(one, "value"), atol=1e-6)
    assert torch.equal(change(own, "policy"), change(one, "policy"))


@pytest.mark.parametrize("with_schedule", [False, True])
def test_an_optimizer_of_ones_own_gets_the_critic(with_schedule, config):
    model = pocket.start("reverse")[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0) if with_schedule else None
    def trainer(**options):
        args = config(per_device_train_batch_size=16, max_completion_length=8, max_steps=1, learning_rate=.5, **options)
        args.pop("train_sampling_strategy")
        return PPOTrainer(model, noisy, PPOConfig(**args), rows(), processing_class=pocket.tokenizer(),
                          optimizers=(optimizer, schedule))
    if with_schedule:
        with pytest.raises(ValueError, match="critic_learning_rate=0.1 with a scheduler of your own"):
            trainer(critic_learning_rate=.1).train()
    run = trainer()
    run.train()
    assert run.model.value.weight.abs().sum() > 0 and len(optimizer.param_groups) == 1


def test_a_group_of_ones_own_keeps_its_rate(config):
    model, critic = pocket.start("reverse")[0], value_model()
    optimizer = torch.optim.SGD([{"params": model.parameters()}, {"params": critic.parameters(), "lr": 1e-3}], lr=.01)
    args = config(per_device_train_batch_size=16, max_completion_length=8, max_steps=1, learning_rate=.5,
                  lr_scheduler_type="constant")
    args.pop("train_sampling_strategy")
    PPOTrainer(model, noisy, PPOConfig(**args), rows(), processing_class=pocket.tokenizer(), value_model=critic,
               optimizers=(optimizer, None)).train()
    assert [group["lr"] for group in optimizer.param_groups] == [.01, 1e-3]


def test_a_reference_follows_the_policy_alone(config):
    trainer = train(config, steps=2, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=1.0)
    assert all(torch.equal(a, b) for a, b in zip(trainer.ref_model.parameters(), trainer.model.policy.parameters()))


def test_the_price_of_a_run_is_its_own(config, tmp_path):
    options = dict(steps=4, save_strategy="steps", save_steps=2, output_dir=str(tmp_path))
    train(config, kl_coef=.2, **options)
    assert train(config, str(tmp_path / "checkpoint-2"), kl_coef=.4, **options).kl.coef == .4


def test_the_price_of_kl_is_steered(config):
    "Below its target the price falls by at most a fiftieth, above it rises."
    low = train(config, steps=4, kl_target=1e3, learning_rate=1e-3)
    assert [round(row["kl_coef"] / .05, 6) for row in logs(low)] == [round(.98**k, 6) for k in range(4)]
    high = train(config, steps=4, kl_target=1e-6, optim="adamw_torch", learning_rate=1e-3)
    assert high.kl.coef > low.kl.coef


def test_a_completion_that_was_cut_pays(config):
    free, paid = (train(config, max_completion_length=3, kl_coef=0.0, missing_eos_penalty=p) for p in (None, 2.0))
    a, b = logs(free)[0], logs(paid)[0]
    cut = a["completions/clipped_ratio"]
    assert 0 < cut and abs(a["objective/scores"] - 2 * cut - b["objective/scores"]) < 1e-5
    assert a["reward"] == b["reward"]  # what the functions said


def test_completions_without_a_score_teach_nothing(config):
    def every_other(completions, **columns): return [None if i % 2 else float(i) for i in range(len(completions))]
    def none_at_all(completions, **columns): return [None] * len(completions)
    trainer = make(config, rewards=every_other)
    trainer.train()
    assert abs(logs(trainer)[0]["objective/scores"] - logs(trainer)[0]["reward"]) < 1e-5
    mask = trainer.stream.state.batches[0]["mask"].sum(1)
    assert (mask[1::2] == 0).all() and (mask[::2] > 0).all() and weights(trainer).isfinite().all()
    before = weights(make(config, rewards=none_at_all))
    assert torch.equal(weights(train(config, rewards=none_at_all)), before)


def test_evaluation_leaves_everything_as_it_was(config):
    trainer = train(config)
    before, first = weights(trainer).clone(), trainer.evaluate()
    again = trainer.evaluate()
    assert torch.equal(before, weights(trainer)) and first["eval_reward"] == again["eval_reward"]
    assert {"eval_loss", "eval_loss/value_avg", "eval_kl", "eval_objective/scores"} <= first.keys()


def test_prompts_may_be_messages(config):
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows()])
    trainer = make(config, data=data, rewards=lambda completions, **_: [len(c[0]["content"]) for c in completions])
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_reward_model_scores(config):
    args = config(per_device_train_batch_size=16, max_completion_length=8, max_steps=1, learning_rate=.1)
    args.pop("train_sampling_strategy")
    trainer = PPOTrainer(
        pocket.start("reverse")[0], args=PPOConfig(**args), train_dataset=rows(), processing_class=pocket.tokenizer(),
        reward_model=value_model(seed=3), reward_processing_classes=pocket.tokenizer())
    trainer.train()
    log = logs(trainer)[0]
    assert log["reward_std"] > 0 and log["reward"] == log["rewards/Qwen3ForSequenceClassification/mean"]


def test_a_critic_that_begins_as_a_language_model_says_nothing(config, tmp_path):
    pocket.start("reverse")[0].save_pretrained(tmp_path / "lm")
    trainer = train(config, value=str(tmp_path / "lm"), vf_coef=0.0)
    assert (trainer.stream.state.batches[0]["values"] == 0).all()


# ---------------------------------------------------------------- config and bad input
def test_trls_names_are_the_same_fields():
    args = PPOConfig("out", num_ppo_epochs=2, response_length=9, kl_coef=.3, cliprange=.1, use_cpu=True)
    assert (args.num_iterations, args.max_completion_length, args.beta, args.epsilon) == (2, 9, .3, .1)
    default = PPOConfig("out", use_cpu=True)
    assert (default.num_iterations, default.max_completion_length, default.beta, default.epsilon) == (4, 53, .05, .2)
    assert replace(args, beta=.4).beta == .4 and replace(default, kl_coef=.4).beta == .4
    saved = {k: v for k, v in args.to_dict().items() if k in PPOConfig.__dataclass_fields__ and v is not None}
    known = {k: v for k, v in saved.items() if k in ("beta", "epsilon", "num_iterations", "kl_coef", "num_ppo_epochs")}
    assert PPOConfig("out", use_cpu=True, **known).beta == .3
    small = PPOConfig("out", total_episodes=8, steps_per_generation=1, gradient_accumulation_steps=8, use_cpu=True)
    assert small.max_steps == 1  # the passes do not fill a step
    split = PPOConfig("out", num_mini_batches=3, gradient_accumulation_steps=2, use_cpu=True)
    assert split.steps_per_generation == 6 and split.generation_batch_size == 48
    counted = PPOConfig("out", total_episodes=100, per_device_train_batch_size=16, num_mini_batches=2, use_cpu=True)
    assert counted.max_steps == 4 * 4 * 2  # four generations of 32, four passes, two steps
    again = PPOConfig(**{f: getattr(counted, f) for f in ("total_episodes", "max_steps", "num_mini_batches")},
                      per_device_train_batch_size=16, use_cpu=True)
    assert again.max_steps == counted.max_steps
    assert PPOConfig("out", stop_token_id=7, use_cpu=True).sampling().stop_ids == (7,)


WRONG = {
    "two names": (dict(num_ppo_epochs=2, num_iterations=3), "num_ppo_epochs=2 and num_iterations=3"),
    "lambda": (dict(lam=1.5), "lam=1.5"), "gamma": (dict(gamma=-.1), "gamma=-0.1"),
    "estimator": (dict(kl_estimator="k2"), "kl_estimator='k2'.*'k1'"),
    "critic": (dict(critic="body"), "critic='body'.*'head'"),
    "sizes": (dict(num_mini_batches=2, steps_per_generation=3), "num_mini_batches=2 and steps_per_generation=3"),
    "target": (dict(kl_target=1.0, kl_coef=0.0), "kl_target=1 steers beta"),
    "episodes": (dict(total_episodes=64, max_steps=3), "total_episodes=64 makes .* max_steps=3"),
    "path": (dict(reward_model_path="x"), "give the trainer its models"),
    "warm-up": (dict(critic_warmup_steps=-1), "critic_warmup_steps=-1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_config_that_cannot_work(name):
    options, said = WRONG[name]
    with pytest.raises(ValueError, match=said): PPOConfig("out", use_cpu=True, **options)


def test_a_critic_that_cannot_work(config):
    config_of_lm = pocket.model().config
    two = Qwen3ForSequenceClassification(type(config_of_lm)(**{**config_of_lm.to_dict(), "num_labels": 2}))
    small = copy.deepcopy(value_model())
    small.resize_token_embeddings(10)
    frozen = value_model().requires_grad_(False)
    with pytest.warns(UserWarning, match="value_model does not learn"): make(config, value=frozen)
    both = PolicyAndValue(pocket.start("reverse")[0])
    with pytest.raises(TypeError, match="the policy and the critic of another run"):
        PPOTrainer(both, noisy, None, rows(), processing_class=pocket.tokenizer())
    for value, options, kind, said in (
            (two, {}, ValueError, "with 2 labels: expected a classifier with one"),
            (pocket.model(), {}, ValueError, "a Qwen3ForCausalLM: expected a classifier"),
            (small, {}, ValueError, "value_model knows 10 tokens"),
            (value_model(), dict(critic="head"), ValueError, "leave one of them out"),
            (3, {}, TypeError, "value_model must be a model, a path or None, got int"),
            ("./nowhere", {}, FileNotFoundError, "no such folder")):
        with pytest.raises(kind, match=said): make(config, value=value, **options)
    model = pocket.start("reverse")[0]
    with pytest.raises(ValueError, match="same object"):
        PPOTrainer(model, noisy, None, rows(), processing_class=pocket.tokenizer(), value_model=model)
    shared = value_model()
    with pytest.raises(ValueError, match="shares weights with a reward model"):
        PPOTrainer(pocket.start("reverse")[0], shared, None, rows(), processing_class=pocket.tokenizer(),
                   reward_processing_classes=pocket.tokenizer(), value_model=shared)
    with pytest.raises(TypeError, match="reward_model is TRL's name"):
        PPOTrainer(model, noisy, None, rows(), processing_class=pocket.tokenizer(), reward_model=noisy)


def test_tokens_in_place_of_prompts_are_refused(config):
    "TRL 1.12 takes rows of input_ids."
    with pytest.raises(ValueError, match="prompt"): make(config, data=Dataset.from_list([{"input_ids": [1, 2]}]))


def test_a_checkpoint_with_another_critic_is_refused(config, tmp_path):
    train(config, save_strategy="steps", save_steps=1, output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="critic/model.safetensors holds the critic of another run"):
        train(config, str(tmp_path / "checkpoint-1"), steps=2, critic="model", output_dir=str(tmp_path))
    (tmp_path / "checkpoint-1" / "critic" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="the critic would begin anew"):
        train(config, str(tmp_path / "checkpoint-1"), steps=2, output_dir=str(tmp_path))


def test_values_of_a_critic_with_a_body_of_its_own_do_not_move_the_policy():
    model = PolicyAndValue(pocket.model(), value_model(32))
    out = completion_logps(model, make_batch([[5, 6]], [[7, 8, 9]], [0]))
    out["values"].sum().backward()
    assert all(p.grad is None for p in model.policy.parameters())


def test_the_microscope_shows_the_advantage_of_each_token(config, tmp_path):
    from posttrain.explore.microscope import Microscope
    trainer = make(config, steps=4, num_ppo_epochs=2, lam=.5, output_dir=str(tmp_path))
    trainer.add_callback(Microscope(every_steps=1))
    trainer.train()
    looks = [json.loads(line) for line in (tmp_path / "microscope.jsonl").read_text().splitlines()]
    seen = [c for look in looks if "prompts" in look for p in look["prompts"] for c in p["completions"]]
    assert (tmp_path / "microscope.html").exists() and seen
    assert any(len(set(c["advantages"])) > 1 for c in seen) and all(len(c["logps"]) == len(c["ids"]) for c in seen)
