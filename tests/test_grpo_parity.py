"""GRPO and its family against TRL 1.16: given the same completions, rewards and old log-probs, the same loss, gradient
and metrics.

Two kinds of tests. Whole runs: both trainers get the same rollouts from one `rollout_func`; a step of plain gradient
descent changes the weights by the gradient times the learning rate. And the loss alone, in float64, on log-probs made
by hand, where every combination of options can be asked in a millisecond."""
import copy
import functools
import gc
import hashlib
import itertools
import math
import os
import random
from operator import attrgetter
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from oracle import Answer, described, oracle, stamps, start
from posttrain import GRPOConfig, GRPOTrainer, pocket
from posttrain.online.policy_zoo import LOSS_TYPES

pytestmark = pytest.mark.parity
G, P, LONGEST = 4, 3, 12  # completions of a prompt, prompts of a generation, tokens of a completion
EOS = pocket.tokenizer().eos_token_id


@pytest.fixture(scope="module")
def trl():
    import trl
    import trl.trainer.grpo_trainer as module
    assert trl.__version__ == "1.16.0", "the reference is TRL 1.16.0; install the dev extra with -c constraints.txt"
    gc.collect()
    gc.freeze()  # each run ends with a full collection, which would look at every imported module again
    # TRL shuffles a generation before it cuts it: which completion is in which step must not differ here
    shuffle, module.shuffle_sequence_dict = module.shuffle_sequence_dict, lambda batch: batch
    yield trl
    module.shuffle_sequence_dict = shuffle
    gc.unfreeze()


def moved(model, seed, by):
    """A model near another one, so that log-ratios are not all 0."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.add_(by * torch.randn(p.shape, generator=generator) * p.std())
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A policy and its reference, in float64: rounding of the weights is then not what is measured. TRL loads the
    reference from where the policy's config says that it came from."""
    reference, _ = start("reverse")
    path = str(tmp_path_factory.mktemp("reference"))
    reference.save_pretrained(path)
    policy = moved(reference, 1, .2).double()
    policy.config._name_or_path = path
    return policy, reference.double()


# ------------------------------------------------ the same rollouts for both
def dice(*about): return random.Random(hashlib.blake2b(repr(about).encode()).hexdigest())


class Rollouts:
    """Completions of unequal length, some cut, which depend on the prompt and on how often it was asked; with
    `engine`, also the log-probs of a sampler that is not the policy."""

    def __init__(self, engine=None, masks=False, unknown=False):
        self.engine, self.masks, self.unknown, self.asked = engine, masks, unknown, {}

    def __call__(self, prompts, trainer):
        tokenizer, out = pocket.tokenizer(), {"prompt_ids": [], "completion_ids": [], "logprobs": None}
        for prompt in prompts:
            k = self.asked[prompt] = self.asked.get(prompt, -1) + 1
            d = dice(prompt, k)
            n = d.randint(1, LONGEST)
            out["prompt_ids"].append(tokenizer(prompt, add_special_tokens=False).input_ids)
            out["completion_ids"].append([d.randrange(4, len(tokenizer)) for _ in range(n - 1)]
                                         + [EOS if d.random() < .7 else d.randrange(4, len(tokenizer))])
        if self.masks:
            out["env_mask"] = [[int(dice(i, t, len(ids)).random() < .7) for t in range(len(ids))]
                               for i, ids in enumerate(out["completion_ids"])]
        if self.engine is not None:
            out["logprobs"] = [self.believed(p, c, trainer.args.temperature)
                               for p, c in zip(out["prompt_ids"], out["completion_ids"])]
        return out

    @torch.no_grad()
    def believed(self, prompt, completion, temperature):
        logits = self.engine(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1:-1].float() / temperature
        logps = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0].tolist()
        if self.unknown and len(logps) > 2: logps[1] = float("nan")  # what an engine could not say
        return logps


def length_reward(completion_ids, **kwargs): return [len(ids) / 4 for ids in completion_ids]
def noise(prompts, completion_ids, **kwargs):
    return [dice(p, c).randrange(5) / 2 for p, c in zip(prompts, completion_ids)]
def parity(completion_ids, **kwargs): return [float(sum(ids) % 2) for ids in completion_ids]
def sometimes(completion_ids, **kwargs):
    return [None if sum(ids) % 3 == 0 else float(sum(ids) % 5) for ids in completion_ids]
def also_sometimes(completion_ids, **kwargs):
    return [None if sum(ids) % 2 else 1.5 * (ids[0] % 2) for ids in completion_ids]
def never(completions, **kwargs): return [None] * len(completions)
def by_column(completions, weight, log_metric, **kwargs):
    log_metric("my/weight", sum(weight) / len(weight))
    return [float(w) for w in weight]


@functools.cache
def prompts(n=24):
    rows = pocket.dataset("reverse", "prompt_only", n=n, seed=5)
    return Dataset.from_list([{"prompt": p, "weight": dice(p).randrange(3)} for p in dict.fromkeys(rows["prompt"])])


class Weights(TrainerCallback):
    """The trained weights before the first step and after each."""

    def __init__(self): self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(torch.cat([p.detach().flatten().clone() for p in model.parameters() if p.requires_grad]))

    on_train_begin = on_step_end


def run(which, trl, config, models, *, steps=1, rewards=noise, engine=None, masks=False, unknown=False, peft=None,
        evaluate=False, skip_prompts=0, **options):
    """Train with this implementation: the change of the weights in each step, and what was logged in each."""
    policy, reference = copy.deepcopy(models[0]), copy.deepcopy(models[1])
    options = {"learning_rate": .02, "per_device_train_batch_size": G * P, "num_generations": G,
               "max_completion_length": LONGEST, **options}
    args = config(**{"optim": "sgd", "max_grad_norm": 1e9, "max_steps": steps, "lr_scheduler_type": "constant",
                     "shuffle_dataset": False, **options})
    args.pop("train_sampling_strategy")
    by_vllm = args.pop("use_vllm", False)
    weights, rollouts = Weights(), Rollouts(engine, masks, unknown)
    if peft is not None: policy = peft(policy)
    common = dict(model=policy, reward_funcs=rewards, train_dataset=prompts().skip(skip_prompts),
                  eval_dataset=prompts(4) if evaluate else None, processing_class=pocket.tokenizer(),
                  callbacks=[weights], rollout_func=rollouts)
    if which == "ours":
        trainer = GRPOTrainer(args=GRPOConfig(**args, use_vllm=by_vllm),
                              ref_model=reference if peft is None and args.get("beta") else None, **common)
    else:
        trainer = trl.GRPOTrainer(args=trl.GRPOConfig(**args), **common)
        # the rollouts say what vLLM would say
        if by_vllm:
            trainer.use_vllm, trainer._last_loaded_step, trainer.vllm_generation = True, -1, SimpleNamespace(
                sync_weights=lambda: None)
    trainer.train()
    if evaluate:
        rollouts.asked = {}
        trainer.evaluate()
    changes = [(a - b) / trainer.args.learning_rate for a, b in zip(weights.seen, weights.seen[1:])]
    return SimpleNamespace(gradients=changes, logs=[r for r in trainer.state.log_history if "loss" in r],
                           eval=next((r for r in trainer.state.log_history if "eval_loss" in r), None), trainer=trainer)


ALWAYS = ("loss", "grad_norm", "entropy", "num_tokens", "reward", "reward_std", "frac_reward_zero_std",
          "completions/mean_length", "completions/min_length", "completions/max_length", "completions/clipped_ratio",
          "completions/mean_terminated_length", "completions/min_terminated_length",
          "completions/max_terminated_length")
NOT_OURS = {"step_time", "epoch", "learning_rate", "step"}  # of the machine, or of transformers


def close(a, b, tolerance=1e-5): return abs(a - b) <= tolerance * max(1, abs(b))


def same(ours, theirs, skip=(), tolerance=1e-5):
    """Gradients and everything that TRL logs."""
    assert len(ours.gradients) == len(theirs.gradients) == len(ours.logs) == len(theirs.logs)
    for step, (a, b, mine, their) in enumerate(zip(ours.gradients, theirs.gradients, ours.logs, theirs.logs), 1):
        assert b.norm() > 1e-3, "nothing was learned"
        difference, size = (a - b).norm(), b.norm()
        assert difference <= tolerance * size, f"step {step}: gradients differ by {difference:.2e} of {size:.2e}"
        for key in set(their) - NOT_OURS - set(skip):
            if key.startswith("profiling/") or their[key] is None: continue
            assert key in mine, f"step {step}: {key} is not logged; {sorted(mine)}"
            assert close(mine[key], their[key],
                         tolerance), f"step {step}, {key}: {mine[key]} against TRL's {their[key]}"
        for key in set(ALWAYS) - set(skip): assert key in mine and key in their, key


def their_run(trl, config, models, **options):
    """TRL's run, live or recorded; its record has the test's name, and a mark where a test has several."""
    test = os.environ["PYTEST_CURRENT_TEST"].split("::", 1)[1].removesuffix(" (call)").removeprefix("test_")
    inputs = [run, models, {**config(), "output_dir": None}, options]
    live = lambda: Answer(*attrgetter("gradients", "logs", "eval")(run("trl", trl, config, models, **options)))
    return oracle(f"{test} {stamps.short_hash(described(options))[:4]}", inputs, live, "test_grpo_parity")


def both(trl, config, models, **options):
    return [run("ours", trl, config, models, **options), their_run(trl, config, models, **options)]


# ------------------------------------------------ one step, on policy
SEVERAL = [noise, parity, sometimes]
LEVELS = [(name, level) for name in LOSS_TYPES for level in ("token", "sequence")]


def of_type(name, limit=5.0, **options):
    """Options with this loss. For CISPO `epsilon_high` is the limit itself."""
    return dict(options, loss_type=name, **({"epsilon_high": limit} if name == "cispo" else {}))


ONE_STEP = {
    **{f"{name}, {level}": of_type(name, importance_sampling_level=level, beta=.1 * (level == "token"))
       for name, level in LEVELS},
    "KL, plain": dict(beta=.1, use_bias_correction_kl=False),
    "KL, sequence": dict(beta=.1, importance_sampling_level="sequence", loss_type="grpo"),
    "scaled by the batch": dict(scale_rewards="batch"), "not scaled": dict(scale_rewards="none"),
    "scaled, True": dict(scale_rewards=True), "scaled, False": dict(scale_rewards=False),
    "several rewards": dict(rewards=SEVERAL, reward_weights=[1.0, .5, -.3]),
    "several rewards, batch": dict(rewards=SEVERAL, scale_rewards="batch"),
    "a column and a metric": dict(rewards=[by_column, noise]),
    "GDPO": dict(rewards=SEVERAL, reward_weights=[1.0, .5, 2.0], multi_objective_aggregation="normalize_then_sum"),
    "GDPO, one reward": dict(multi_objective_aggregation="normalize_then_sum"),
    "rewards that do not apply": dict(rewards=[sometimes]),
    "nor these": dict(rewards=[sometimes, also_sometimes], reward_weights=[1.0, .25]),
    "one never applies": dict(rewards=[noise, never]),
    "GDPO, not applicable": dict(rewards=[sometimes, also_sometimes], multi_objective_aggregation="normalize_then_sum"),
    "batch, not applicable": dict(rewards=[sometimes], scale_rewards="batch"),
    **{f"truncated, {name}": of_type(name, mask_truncated_completions=True) for name in LOSS_TYPES},
    "truncated, KL": dict(beta=.1, mask_truncated_completions=True), "tokens of an environment": dict(masks=True),
    "tokens of an environment, grpo": dict(masks=True, loss_type="grpo", beta=.1),
    "tokens of an environment, truncated": dict(masks=True, mask_truncated_completions=True),
    **{f"top entropy, {q}": dict(top_entropy_quantile=q) for q in (.5, .2, .05)},
    "top entropy, KL": dict(top_entropy_quantile=.3, beta=.1, loss_type="grpo"),
    "entropy bonus": dict(entropy_coef=.05), "entropy bonus, bnpo": dict(entropy_coef=.05, loss_type="bnpo", beta=.1),
    "entropy bonus, top entropy": dict(entropy_coef=.05, top_entropy_quantile=.4),
    "entropy malus": dict(entropy_coef=-.01), "temperature .7": dict(temperature=.7, beta=.1),
    "temperature 1.4": dict(temperature=1.4, entropy_coef=.01, loss_type="grpo"),
    "dr_grpo, longer": dict(loss_type="dr_grpo", max_completion_length=40), "clipped gradient": dict(max_grad_norm=.1)}


# with an environment: here what the model has read counts, in TRL what it wrote, and the prompts
READ = ("num_tokens",)


@pytest.mark.parametrize("case", ONE_STEP)
def test_one_step(case, trl, config, models):
    ours, theirs = both(trl, config, models, **ONE_STEP[case])
    same(ours, theirs, skip=READ if ONE_STEP[case].get("masks") else ())
    if ONE_STEP[case].get("masks"): assert ours.logs[0]["num_tokens"] > theirs.logs[0]["num_tokens"]


# ------------------------------------------------ several steps on one generation: the old log-probs really differ
REUSED = {
    **{f"{name}, {level}": of_type(name, 1.2, importance_sampling_level=level, beta=.1,
                                   use_bias_correction_kl=i % 4 in (0, 3)) for i, (name, level) in enumerate(LEVELS)},
    "GSPO": dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4),
    "a new generation": dict(steps=3, loss_type="grpo", importance_sampling_level="sequence"),
    "clip higher": dict(epsilon_high=.28), "two-sided": dict(delta=1.5),
    "two-sided, sequence": dict(delta=1.3, loss_type="grpo", importance_sampling_level="sequence"),
    "narrow": dict(epsilon=.01), "off-policy mask": dict(off_policy_mask_threshold=.02),
    "off-policy mask, grpo": dict(off_policy_mask_threshold=.05, loss_type="grpo", beta=.1),
    "off-policy mask, vespo": dict(off_policy_mask_threshold=.02, loss_type="vespo"),
    "SAPO, other temperatures": dict(loss_type="sapo", sapo_temperature_neg=2.0, sapo_temperature_pos=.5),
    "VESPO, other weights": dict(loss_type="vespo", vespo_k_pos=1.0, vespo_lambda_pos=1.5, vespo_k_neg=2.0,
                                 vespo_lambda_neg=1.0), "truncated": dict(mask_truncated_completions=True, beta=.1),
    "tokens of an environment": dict(masks=True, loss_type="grpo"),
    "tokens of an environment, vespo": dict(masks=True, loss_type="vespo"),
    "two completions": dict(num_generations=2, rewards=SEVERAL), "top entropy": dict(top_entropy_quantile=.4),
    "temperature": dict(temperature=.8, beta=.1),
    "adaptive entropy": dict(steps=3, use_adaptive_entropy=True, entropy_coef=.05, entropy_target=1.6,
                             entropy_coef_delta=.02),
    "GDPO": dict(rewards=SEVERAL, multi_objective_aggregation="normalize_then_sum")}


@pytest.mark.parametrize("case", REUSED)
def test_steps_that_share_a_generation(case, trl, config, models):
    """Twice over each generation; where there is a third step it has a new one."""
    ours, theirs = both(trl, config, models, num_iterations=2, **{"steps": 2, "learning_rate": .004, **REUSED[case]})
    same(ours, theirs,
         skip=("num_tokens", "reward", "reward_std", "frac_reward_zero_std",
               *(k for k in ALWAYS if k.startswith("completions"))))
    for key in ("reward", "reward_std", "completions/mean_length"):  # logged when there is something new
        assert key in ours.logs[0] and key not in ours.logs[1]
        assert all(close(a[key], b[key]) for a, b in zip(ours.logs[::2], theirs.logs[::2]))
    assert abs(ours.logs[1]["ratio/max"] - 1) > .01 and ours.logs[0]["ratio/max"] == 1


HALF = dict(per_device_train_batch_size=G * P // 2)
LATER = {**{name: of_type(name, 1.2, beta=.1) for name in LOSS_TYPES},
         "GSPO": dict(loss_type="grpo", importance_sampling_level="sequence"),
         "twice": dict(num_iterations=2, steps=5),
         "twice, grpo": dict(num_iterations=2, loss_type="grpo", beta=.1, importance_sampling_level="sequence",
                             steps=4),
         "three in steps of two": dict(per_device_train_batch_size=G, steps_per_generation=3,
                                       gradient_accumulation_steps=2, loss_type="grpo"),
         "by its size": dict(steps_per_generation=None, generation_batch_size=G * P),
         "off-policy mask": dict(off_policy_mask_threshold=.02, num_iterations=2),
         "entropy bonus": dict(entropy_coef=.05),
         "adaptive entropy": dict(use_adaptive_entropy=True, entropy_coef=.05, entropy_target=1.6,
                                  entropy_coef_delta=.02), "truncated": dict(mask_truncated_completions=True)}


@pytest.mark.parametrize("case", LATER)
def test_a_generation_that_serves_two_steps(case, trl, config, models):
    """The second half of it is learned from by a policy that has moved; the third step begins a new one."""
    options = {**HALF, "steps": 3, "steps_per_generation": 2, "learning_rate": .004, **LATER[case]}
    ours, theirs = both(trl, config, models, **options)
    same(ours, theirs,
         skip=(*(PER_MICRO_BATCH if "gradient_accumulation_steps" in options else ()), "num_tokens", "reward",
               "reward_std", "frac_reward_zero_std", *(k for k in ALWAYS if k.startswith("completions"))))
    assert abs(ours.logs[1]["ratio/max"] - 1) > .01


ACCUMULATED = {**{name: of_type(name, 1.2, beta=.1) for name in LOSS_TYPES if name != "bnpo"},
               "GSPO": dict(loss_type="grpo", importance_sampling_level="sequence"), "twice": dict(num_iterations=2),
               "truncated": dict(mask_truncated_completions=True),
               "adaptive": dict(use_adaptive_entropy=True, entropy_target=1.6)}
# (and it logs the mean of their extremes, where here the least and the greatest of the step are logged)
PER_MICRO_BATCH = ("entropy", "kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean",
                   "clip_ratio/low_min", "clip_ratio/high_max", "cispo_clip_ratio", "vespo/phi_seq_mean")


@pytest.mark.parametrize("case", ACCUMULATED)
def test_a_step_of_two_micro_batches(case, trl, config, models):
    """TRL logs the mean of the micro-batches' means; here each token (or sequence) counts the same, so these numbers
    do not depend on how a step is cut. All else is equal."""
    ours, theirs = both(trl, config, models, steps=2, **HALF, gradient_accumulation_steps=2,
                        **{"learning_rate": .004, **ACCUMULATED[case]})
    # TRL's `policy_loss` is the mean over micro-batches, of losses that dapo divides by the tokens of all of them: half
    # the loss. Ours is the loss without the bonus
    if case == "adaptive":
        for mine, their in zip(ours.logs, theirs.logs): assert close(mine["policy_loss"], 2 * their["policy_loss"])
    once = [k for k in ALWAYS if k.startswith(("completions", "reward", "frac"))] if case == "twice" else []
    same(ours, theirs, skip=(*PER_MICRO_BATCH, "policy_loss", *once, *(["num_tokens"] if once else [])))


# ------------------------------------------------ a sampler that is not the policy
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def limits(mode, low, high):
    return dict(vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_max=high,
                vllm_importance_sampling_clip_min=low)


SAMPLER = {
    **{f"{mode}, from below": limits(mode, .8, None) for mode in MODES if mode.endswith("mask")},
    **{f"{mode}, between": limits(mode, .7, 1.2) for mode in MODES},
    "mask, no limits": dict(vllm_importance_sampling_mode="sequence_mask", vllm_importance_sampling_clip_max=None),
    "the default": {},
    **{f"{name}, {mode}": of_type(name, vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_max=1.3,
                                  beta=.1) for name, mode in zip(LOSS_TYPES, (*MODES, *MODES[::-1]))},
    "GSPO": dict(loss_type="grpo", importance_sampling_level="sequence"),
    "luspo, sequence": dict(loss_type="luspo", importance_sampling_level="sequence"),
    "no correction": dict(vllm_importance_sampling_correction=False),
    "off-policy mask": dict(off_policy_mask_threshold=.02),
    "off-policy mask, no correction": dict(off_policy_mask_threshold=.02, vllm_importance_sampling_correction=False),
    "truncated": dict(mask_truncated_completions=True),
    "tokens of an environment": dict(masks=True, vllm_importance_sampling_mode="token_truncate"),
    "log-probs that are unknown": dict(unknown=True, vllm_importance_sampling_mode="token_truncate"),
    "unknown, sequence": dict(unknown=True, off_policy_mask_threshold=.02),
    "unknown, vespo": dict(unknown=True, loss_type="vespo", vllm_importance_sampling_mode="token_mask"),
    "temperature": dict(temperature=.8), "top entropy, bonus": dict(top_entropy_quantile=.4, entropy_coef=.05),
    "twice": dict(steps=3, num_iterations=2, learning_rate=.004),
    "twice, token": dict(steps=3, num_iterations=2, learning_rate=.004, vllm_importance_sampling_mode="token_mask",
                         off_policy_mask_threshold=.05, beta=.1),
    "half": dict(steps=3, **HALF, steps_per_generation=2, learning_rate=.004)}


@pytest.mark.parametrize("case", SAMPLER)
def test_log_probs_of_another_sampler(case, trl, config, models):
    """Made by a third model. TRL believes that they came from vLLM."""
    ours, theirs = both(trl, config, models, engine=moved(models[0], 2, .03), use_vllm=True, **SAMPLER[case])
    # TRL logs what it knows of a generation once, when it is made; here the sampler is compared with each micro-batch
    once = (("num_tokens", *(k for k in theirs.logs[0] if k.startswith(("reward", "frac", "completions", "sampling"))))
            if SAMPLER[case].get("steps") else ())
    same(ours, theirs, skip=READ if SAMPLER[case].get("masks") else once)
    if SAMPLER[case].get("vllm_importance_sampling_correction", True):
        assert ours.logs[0]["sampling/sampling_logp_difference/max"] > .05


# ------------------------------------------------ adapters, evaluation, single precision
def lora(model):
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n: p.normal_(std=.2)
    return model.double()


def test_an_adapter_and_the_model_without_it(trl, config, models):
    same(*both(trl, config, models, peft=lora, beta=.1, loss_type="grpo"))
    same(*both(trl, config, models, peft=lora, beta=.1, steps=2, num_iterations=2, learning_rate=.002),
         skip=("num_tokens", *(k for k in ALWAYS if k.startswith(("reward", "frac", "completions")))))


@pytest.mark.parametrize("options", [
    {}, dict(loss_type="grpo", beta=.1), dict(loss_type="bnpo", entropy_coef=.05),
    dict(loss_type="dr_grpo", num_generations_eval=2), dict(scale_rewards="none", mask_truncated_completions=True),
    dict(top_entropy_quantile=.4),
], ids=["dapo", "grpo, KL", "bnpo, bonus", "other size of groups", "truncated", "top entropy"])
def test_evaluation(options, trl, config, models):
    g = options.get("num_generations_eval", G)
    # TRL counts completions in an evaluation batch, here prompts are counted
    ours, theirs = run("ours", trl, config, models, evaluate=True, per_device_eval_batch_size=4,
                       **options), their_run(trl, config, models, evaluate=True, per_device_eval_batch_size=4 * g,
                                             **options)
    for key in set(theirs.eval) - {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second",
                                   "eval_num_tokens", "epoch", "step"}:
        if not key.startswith("eval_profiling"):
            assert close(ours.eval[key], theirs.eval[key]), f"{key}: {ours.eval[key]} against TRL's {theirs.eval[key]}"
    assert "eval_reward" in theirs.eval and "eval_rewards/noise/mean" in ours.eval


@pytest.mark.parametrize("options", [
    {}, dict(loss_type="grpo", importance_sampling_level="sequence", beta=.1), dict(loss_type="vespo"),
    dict(top_entropy_quantile=.3, entropy_coef=.05)], ids=["dapo", "GSPO", "vespo", "entropy"])
def test_single_precision(options, trl, config, models):
    """Learning rate 1, so that the rounding of the weights is small beside the gradient."""
    single = tuple(copy.deepcopy(model).float() for model in models)
    # Always live: rounding differs from machine to machine.
    same(*(run(who, trl, config, single, learning_rate=1.0, **options) for who in ("ours", "trl")))


# ------------------------------------------------ where the two differ on purpose
def test_an_empty_completion_has_no_ratio(trl, config, models):
    """Sequence level and truncated completions left out: TRL counts their ratio of 1 among those that were not
    clipped, here it is none. Everything else is equal."""
    clipping = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "clip_ratio/low_min")
    ours, theirs = both(trl, config, models, steps=2, num_iterations=2, learning_rate=.004,
                        mask_truncated_completions=True, loss_type="grpo", importance_sampling_level="sequence")
    same(ours, theirs,
         skip=(*clipping, "num_tokens", *(k for k in ALWAYS if k.startswith(("reward", "frac", "completions")))))
    kept = 1 - ours.logs[0]["completions/clipped_ratio"]
    assert 0 < kept < 1 and ours.logs[1]["clip_ratio/region_mean"] > 0
    for key in clipping[:3]: assert close(ours.logs[1][key] * kept, theirs.logs[1][key])


def cut(trl, config, models, **options):
    """The same completions as one micro-batch and as two: ours, TRL's, each (whole, in halves)."""
    return [[run(which, trl, config, models, **options, **parts)
             for parts in ({}, {**HALF, "gradient_accumulation_steps": 2})] for which in ("ours", "trl")]


@pytest.mark.parametrize("options", [
    dict(loss_type="bnpo"), dict(entropy_coef=.5, loss_type="grpo"), dict(top_entropy_quantile=.3),
], ids=["bnpo", "entropy bonus", "top entropy"])
def test_a_mean_over_the_step_does_not_depend_on_how_it_is_cut(options, trl, config, models):
    """TRL takes these means, and the quantile, over a micro-batch: its gradient depends on the cut. Uncut the two
    agree."""
    ours, theirs = cut(trl, config, models, **options)
    same(ours[0], theirs[0])
    whole, mine, their = ours[0].gradients[0], ours[1].gradients[0], theirs[1].gradients[0]
    assert (mine - whole).norm() <= 1e-6 * whole.norm() and (their - whole).norm() > 1e-3 * whole.norm()
    assert close(ours[1].logs[0]["entropy"],
                 ours[0].logs[0]["entropy"]) and not close(theirs[1].logs[0]["entropy"], theirs[0].logs[0]["entropy"])


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo"])
def test_a_step_of_two_generations(loss_type, trl, config, models):
    """gradient_accumulation_steps=2, steps_per_generation=1. TRL divides each generation by its own tokens, so that a
    token of a short generation counts more; here all tokens of the step count the same."""
    options = of_type(loss_type, gradient_accumulation_steps=2, steps_per_generation=1)
    ours, theirs = both(trl, config, models, **options)
    lengths, rollouts = [], Rollouts()
    for g in range(2):
        lengths.append(
            sum(
                map(len,
                    rollouts([p for p in prompts()["prompt"][g * P:(g + 1) * P] for _ in range(G)],
                             None)["completion_ids"])))
    assert lengths[0] != lengths[1]
    # each generation's own mean over tokens
    alone = [run("ours", trl, config, models, **{**options, "gradient_accumulation_steps": 1},
                 skip_prompts=g * P).gradients[0] for g in range(2)]
    for run_, shares in ((ours, [n / sum(lengths) for n in lengths]), (theirs, [.5, .5])):
        expected = sum(share * gradient for share, gradient in zip(shares, alone))
        assert (run_.gradients[0] - expected).norm() <= 1e-5 * expected.norm()
    assert (ours.gradients[0] - theirs.gradients[0]).norm() > 1e-3 * theirs.gradients[0].norm()


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "luspo", "sapo"])
def test_two_generations_where_completions_are_counted(loss_type, trl, config, models):
    """Losses that divide by a number of completions agree."""
    ours, theirs = both(trl, config, models, loss_type=loss_type, gradient_accumulation_steps=2, steps_per_generation=1,
                        beta=.1)
    same(ours, theirs, skip=(*PER_MICRO_BATCH, "num_tokens"))


def one_group_lives(prompts, completion_ids, **kwargs):
    return [float(len(c) % 2) if prompts[0] == p else 1.0 for p, c in zip(prompts, completion_ids)]


@pytest.mark.parametrize("options", [
    dict(scale_rewards="batch"), dict(multi_objective_aggregation="normalize_then_sum")], ids=["batch", "GDPO"])
def test_dead_groups_are_groups(options, trl, config, models):
    """Two of three groups have equal rewards. Where advantages are scaled by the batch, TRL's `frac_reward_zero_std`
    is 1 or 0, whether the *batch* has a standard deviation; ours says how many groups teach nothing, for every setting.
    """
    ours, theirs = both(trl, config, models, rewards=one_group_lives, **options)
    same(ours, theirs, skip=("frac_reward_zero_std",))
    assert close(ours.logs[0]["frac_reward_zero_std"], 2 / 3) and theirs.logs[0]["frac_reward_zero_std"] == 0
    ours, theirs = both(trl, config, models, rewards=one_group_lives)
    assert close(ours.logs[0]["frac_reward_zero_std"], 2 / 3) and close(theirs.logs[0]["frac_reward_zero_std"], 2 / 3)


@pytest.mark.parametrize("scored", [0, 1])
def test_a_group_without_scores_is_dead(scored, trl, config, models):
    """All rewards of a group are None, or all but one: it teaches nothing. TRL has no standard deviation for it and
    counts it among the living; everything else is equal."""
    def some(prompts, completion_ids, **kwargs):
        return [len(ids) / 4 if i % G < scored or i >= G else None for i, ids in enumerate(completion_ids)]
    ours, theirs = both(trl, config, models, rewards=some)
    same(ours, theirs, skip=("frac_reward_zero_std",))
    assert close(ours.logs[0]["frac_reward_zero_std"], 1 / 3) and theirs.logs[0]["frac_reward_zero_std"] == 0


def test_absolute_positions(trl, config, tmp_path):
    """GPT-2 counts positions from the first token that it is given. TRL pads prompts on the left, and does not tell
    it: a short prompt is read too far to the right unless it is sampled alone. Here it is not padded."""
    from transformers import GPT2Config, GPT2LMHeadModel
    reference = GPT2LMHeadModel(GPT2Config(vocab_size=len(pocket.tokenizer()), n_embd=32, n_layer=2, n_head=2,
                                           n_positions=64, bos_token_id=EOS, eos_token_id=EOS, attn_pdrop=0.,
                                           embd_pdrop=0., resid_pdrop=0.))
    reference.save_pretrained(tmp_path / "gpt2")
    policy = moved(reference, 1, .2).double()
    policy.config._name_or_path = str(tmp_path / "gpt2")
    options = dict(trl=trl, config=config, models=(policy, reference.double()), loss_type="grpo", beta=.1)
    ours, theirs = (run(who, **options) for who in ("ours", "trl"))
    alone = run("trl", **options, per_device_train_batch_size=G, gradient_accumulation_steps=P, steps_per_generation=1)
    norm = alone.gradients[0].norm()
    assert (ours.gradients[0] - alone.gradients[0]).norm() <= 1e-5 * norm and (
        theirs.gradients[0] - alone.gradients[0]).norm() > .1 * norm


def test_tokens_are_counted_when_they_are_read(trl, config, models):
    """Two steps on one generation: TRL counts what is generated, once and at once; ours, as all trainers here, what
    went through the model to learn from."""
    ours, theirs = both(trl, config, models, steps=2, num_iterations=2, learning_rate=1e-3)
    assert ours.logs[0]["num_tokens"] == theirs.logs[0]["num_tokens"] and ours.logs[1]["num_tokens"] == 2 * ours.logs[
        0]["num_tokens"] and "num_tokens" not in theirs.logs[1]


def test_a_foreign_sampler_without_vllm(trl, config, models):
    """A `rollout_func` that returns log-probs: TRL corrects for them only with use_vllm=True; here whenever there are
    any."""
    engine = moved(models[0], 2, .03)
    ours, theirs = both(trl, config, models, engine=engine)
    same(run("ours", trl, config, models, engine=engine, vllm_importance_sampling_correction=False), theirs)
    corrected = run("trl", trl, config, models, engine=engine, use_vllm=True)
    same(ours, corrected)
    assert (ours.gradients[0] - theirs.gradients[0]).norm() > 1e-3 * theirs.gradients[0].norm()


def test_far_away_a_ratio_stays_finite(trl, config, models):
    """A learning rate that throws the policy out of the window: TRL's ratio overflows and the weights are NaN from the
    next step on; ours are held below e^20."""
    ours, theirs = (run(who, trl, config, models, steps=3, num_iterations=3, beta=.1, learning_rate=1.0)
                    for who in ("ours", "trl"))
    assert theirs.gradients[2].isnan().any() and not ours.gradients[2].isnan().any()


# ------------------------------------------------ the loss alone, in float64, on log-probs made by hand
def by_hand(seed, empty_row):
    """(B, T) log-probs and their kin, masks with holes and padding that holds nonsense."""
    g = torch.Generator().manual_seed(seed)
    B, T = 6, 7
    draw = lambda scale, *shape: scale * torch.randn(*shape, generator=g, dtype=torch.float64)
    logps = -draw(1.5, B, T).abs()
    mask = (torch.rand(B, T, generator=g) < .75).long()
    mask[:, 0] = 1
    if empty_row: mask[2] = 0
    x = dict(logps=logps, entropies=draw(1.0, B, T).abs(), old=logps + draw(.4, B, T), ref=logps + draw(.5, B, T),
             advantages=draw(1.0, B), ratio_token=draw(.3, B, T).exp(), ratio_sequence=draw(.3, B, 1).exp())
    x["advantages"][1] = 0
    x["old"][0, 0], x["old"][3, 0] = logps[0, 0] - 3, logps[3, 0] + 3
    for name in ("logps", "old", "ref"): x[name] = torch.where(mask == 1, x[name], draw(3.0, B, T))
    return x, mask


@pytest.fixture(scope="module")
def accelerator():
    from accelerate import Accelerator
    return Accelerator(cpu=True)


def their_loss(trl, accelerator, args, x, mask, sampler):
    """TRL's `_compute_loss` on these tensors: the second of two micro-batches like it."""
    self = object.__new__(trl.GRPOTrainer)
    logps, entropies = (x[k].clone().requires_grad_() for k in ("logps", "entropies"))
    self._get_per_token_logps_and_entropies = lambda *a, **k: (logps, entropies, None)
    self.args = SimpleNamespace(
        **{k: args[k] for k in ("use_bias_correction_kl", "delta", "sapo_temperature_pos", "sapo_temperature_neg",
                                "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")},
        steps_per_generation=4)
    for name in ("loss_type", "importance_sampling_level", "beta", "top_entropy_quantile", "off_policy_mask_threshold",
                 "max_completion_length", "entropy_coef"):
        setattr(self, name, args[name])
    self.epsilon_low, self.epsilon_high = (args["epsilon"],
                                           args["epsilon"] if args["epsilon_high"] is None else args["epsilon_high"])
    self.accelerator, self.model, self._metrics = accelerator, SimpleNamespace(training=True), {"train": {}}
    class Lists(dict):
        def __missing__(self, key): return self.setdefault(key, [])
    self._metrics = {"train": Lists()}
    self.current_gradient_accumulation_steps, self._entropy_bonus_enabled = 2, args["entropy_coef"] != 0
    self.use_adaptive_entropy = self.aux_loss_enabled = False
    self.use_vllm = self.vllm_importance_sampling_correction = sampler is not None
    zeros = torch.zeros(len(mask), 1, dtype=torch.long)
    inputs = dict(prompt_ids=zeros, prompt_mask=zeros, completion_ids=mask, completion_mask=torch.ones_like(mask),
                  tool_mask=mask, advantages=x["advantages"], old_per_token_logps=x["old"],
                  ref_per_token_logps=x["ref"], num_items_in_batch=torch.tensor(61))
    if sampler is not None: inputs |= {"importance_sampling_ratio": sampler[1], "sampling_per_token_logps": sampler[0]}
    loss = self._compute_loss(None, inputs)
    return loss, torch.autograd.grad(loss, (logps, entropies),
                                     allow_unused=True), {k: v[0] for k, v in self._metrics["train"].items()}


def our_loss(monkeypatch, accelerator, args, x, mask, sampler):
    self = object.__new__(GRPOTrainer)
    logps, entropies = (x[k].clone().requires_grad_() for k in ("logps", "entropies"))
    answer = {"logps": logps, "entropy": entropies}
    monkeypatch.setattr("posttrain.online.grpo_trainer.completion_logps", lambda *a, **k: answer)
    own = {k: v for k, v in args.items() if k.split("_")[0] == args["loss_type"]}
    self.args = SimpleNamespace(**args, gradient_accumulation_steps=2, options_of=lambda f: own)
    self.args.clip_range = GRPOConfig.clip_range.fget(self.args)
    self.args.limits = functools.partial(GRPOConfig.limits, self.args)
    self.model, self.accelerator, self.sampler_is_exact = SimpleNamespace(training=True), accelerator, False
    self.callback_handler = SimpleNamespace(callbacks=[])
    from posttrain.online.corrections import EntropyController, entropy_threshold, top_entropy_mask
    from posttrain.training.metrics import Mean, MetricAccumulator
    self.entropy, self._entropy_of_step = EntropyController(args["entropy_coef"]), Mean(0., 0.)
    batch = dict(mask=mask, advantages=x["advantages"], old_logps=x["old"], ref_logps=x["ref"],
                 token_share=torch.tensor(61 / 4))
    if args["beta"] == 0: del batch["ref_logps"]
    if sampler is not None: batch["sampled_logps"] = sampler[0]
    learns = mask.sum()
    if args["top_entropy_quantile"] < 1:
        counted = x["entropies"][mask == 1]
        threshold = entropy_threshold(counted, args["top_entropy_quantile"])
        batch["top_entropy"] = top_entropy_mask(x["entropies"], mask, threshold)
        learns = (counted >= counted.float().quantile(1 - args["top_entropy_quantile"]).double()).sum()
    batch["bonus_tokens"] = 2 * learns
    totals = self.totals_of(batch) + self.totals_of(batch)
    loss, stats = self.loss(None, batch, totals)
    gradients = torch.autograd.grad(loss, (logps, entropies), allow_unused=True)
    metrics = MetricAccumulator()
    metrics.add(stats)
    return loss, gradients, metrics.close()


DEFAULTS = dict(loss_type="dapo", importance_sampling_level="token", beta=0.0, use_bias_correction_kl=True, epsilon=.2,
                epsilon_high=None, delta=None, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
                entropy_coef=0.0, max_completion_length=20, temperature=1.0, sapo_temperature_pos=1.0,
                sapo_temperature_neg=1.05, vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0,
                vllm_importance_sampling_correction=True, vllm_importance_sampling_mode="token_truncate",
                vllm_importance_sampling_clip_max=None, vllm_importance_sampling_clip_min=None)
KL = [{}, dict(beta=.1), dict(beta=.1, use_bias_correction_kl=False)]
CLIP = [{}, dict(epsilon_high=.28), dict(epsilon=.1, epsilon_high=.5, delta=2.0), dict(delta=1.21)]
TOKENS = [{}, dict(off_policy_mask_threshold=.05), dict(top_entropy_quantile=.35), dict(entropy_coef=.03),
          dict(off_policy_mask_threshold=.05, top_entropy_quantile=.35, entropy_coef=.03)]
ALL_LEVELS = ("token", "sequence")


@pytest.mark.parametrize("level", ALL_LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_combination_of_options(loss_type, level, trl, accelerator, monkeypatch):
    """KL, clipping, tokens that are left out, sampler; with and without a row that does not count at all. Of the 360
    combinations a third, another one for each loss: any three options meet in all their values."""
    cases, third = 0, (2 * list(LOSS_TYPES).index(loss_type) + ALL_LEVELS.index(level)) % 3
    for numbers in itertools.product(*map(range, (3, 4, 5, 3, 2))):
        if sum(numbers) % 3 != third: continue
        axes = (KL, CLIP, TOKENS, (None, "token", "sequence"), (False, True))
        kl, clip, tokens, sampler, empty = (options[i] for options, i in zip(axes, numbers))
        if loss_type == "vespo" and sampler == "sequence": continue  # refused by both
        if loss_type == "cispo": clip = {"epsilon_high": {None: None, .28: 1.3, .5: 5.0}[clip.get("epsilon_high")]}
        x, mask = by_hand(cases, empty)
        args = {**DEFAULTS, "loss_type": loss_type, "importance_sampling_level": level, **kl, **clip, **tokens,
                "vllm_importance_sampling_mode": f"{sampler}_truncate"}
        said = None
        if sampler:  # log-probs of a sampler from which the ratio follows; TRL is told both
            sampled = x["old"] - torch.randn(mask.shape, dtype=torch.float64,
                                             generator=torch.Generator().manual_seed(cases)) * .2
            change = ((x["old"] - sampled) * mask)
            said = sampled, (change.sum(1, keepdim=True) if sampler == "sequence" else change).exp()
        (a, da, mine), (b, db, their) = our_loss(monkeypatch, accelerator, args, x, mask,
                                                 said), their_loss(trl, accelerator, args, x, mask, said)
        about = f"{args} {sampler} empty={empty}"
        assert close(a.item(), b.item(), 1e-6), f"{a} {b} {about}"
        for p, q in zip(da, db):
            assert (p is None or not p.any() if q is None
                    else torch.allclose(torch.zeros_like(q) if p is None else p, q, rtol=1e-6, atol=1e-9)), about
        for key in their:
            # see test_an_empty_completion_has_no_ratio
            if empty and level == "sequence" and key.startswith(("clip_ratio", "cispo")): continue
            # see test_a_step_of_two_micro_batches
            if key == "policy_loss" and LOSS_TYPES[loss_type].whole_generation: their[key] *= 2
            assert close(float(mine[key]), their[key], 1e-5), f"{key}: {mine[key]} against {their[key]}; {about}"
        cases += 1
    assert cases >= 80


def test_functions_equal_trls(trl):
    """Weights and masks one by one, at the ends of their range too."""
    from posttrain.online.corrections import entropy_threshold, off_policy_mask, top_entropy_mask
    from posttrain.online.policy_zoo import gamma_weight
    x, mask = by_hand(5, True)
    for threshold in (-.1, 0.0, .05, 3.0):
        theirs = trl.GRPOTrainer.get_off_policy_mask(x["advantages"][:, None], x["logps"], x["old"], mask, threshold)
        assert torch.equal(off_policy_mask(x["logps"], x["old"], x["advantages"], mask, threshold).long(), theirs)
    for scale in (.1, 1.0, 30.0):
        change = scale * (x["logps"] - x["old"]) * mask
        for correction in (None, x["ratio_token"], torch.where(x["ratio_token"] < .8, 0.0, x["ratio_token"])):
            theirs = trl.GRPOTrainer.get_gamma_weights(x["advantages"][:, None], change, mask, correction)
            log_w = (change.clamp(-20, 20).sum(1, keepdim=True)
                     + (0 if correction is None else correction.log().clamp(math.log(1e-8), 20).sum(1, keepdim=True)))
            assert torch.allclose(gamma_weight(log_w, x["advantages"][:, None]), theirs, rtol=1e-9, atol=1e-30)
    self = object.__new__(trl.GRPOTrainer)
    self.accelerator = SimpleNamespace(pad_across_processes=lambda t, **k: t, gather=lambda t: t)
    for q in (.01, .2, .5, .99):
        assert torch.equal(top_entropy_mask(x["entropies"], mask, entropy_threshold(x["entropies"][mask == 1], q)) == 1,
                           self.get_high_entropy_mask(x["entropies"], mask, 1 - q))
