"""Mixtures of experts: their load-balancing loss in every trainer, and against TRL 1.16.

As in test_parity: after one step of plain gradient descent with learning rate 1, equal weights mean equal gradients."""
import copy

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from oracle import Answer, oracle
from posttrain import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    PPOConfig,
    PPOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
    pocket,
)
from posttrain.training.router import balance_function, router_coefficient

TOKENIZER = pocket.tokenizer()
SIZE = dict(vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, pad_token_id=TOKENIZER.pad_token_id,
            eos_token_id=TOKENIZER.eos_token_id, bos_token_id=None)


def mixtral(): return MixtralForCausalLM(MixtralConfig(**SIZE, num_local_experts=4, sliding_window=None))


def qwen3():
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZE, head_dim=8, moe_intermediate_size=16, num_experts=4,
                                              num_experts_per_tok=2))


MODELS = {"Mixtral": mixtral, "Qwen3": qwen3}
STEP = dict(optim="sgd", learning_rate=1.0, max_grad_norm=1e9, max_steps=1, lr_scheduler_type="constant")


def model(kind):
    torch.manual_seed(1)
    made = MODELS[kind]()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "gate.weight" in name: p.mul_(20)  # routers that prefer some experts
    return made


def rollout(prompts, trainer):
    """Completions of unequal length that depend on nothing but the place."""
    ids = [TOKENIZER(prompt, add_special_tokens=False).input_ids for prompt in prompts]
    made = [[5 + (7 * i + t) % 20 for t in range(2 + i % 4)] + [TOKENIZER.eos_token_id] for i in range(len(prompts))]
    return {"prompt_ids": ids, "completion_ids": made, "logprobs": None}


def parity(completion_ids, **kwargs): return [float(sum(ids) % 3) for ids in completion_ids]


def rows(kind, n=8): return pocket.dataset("add", kind, n=n, seed=3, conversational=False)


ONLINE = dict(num_generations=4, max_completion_length=12, temperature=1.0, beta=0.0, shuffle_dataset=False)
METHODS = {  # trainer, config, rows, options, arguments
    "sft": (SFTTrainer, SFTConfig, "prompt_completion", {}, {}),
    "dpo": (DPOTrainer, DPOConfig, "preference", {}, {}),
    "grpo": (GRPOTrainer, GRPOConfig, "prompt_only", ONLINE, dict(reward_funcs=parity, rollout_func=rollout)),
    "rloo": (RLOOTrainer, RLOOConfig, "prompt_only", ONLINE, dict(reward_funcs=parity, rollout_func=rollout)),
}


def one_step(trainer_class, config_class, kind, dataset, options, arguments):
    policy = model(kind)
    before = [p.detach().clone() for p in policy.parameters()]
    trainer = trainer_class(model=policy, args=config_class(**{**options, **STEP}), train_dataset=dataset,
                            processing_class=pocket.tokenizer(), **arguments)
    trainer.train()
    gradient = torch.cat([(b - a.detach()).flatten() for a, b in zip(policy.parameters(), before)])
    return Answer([gradient], [next(row for row in trainer.state.log_history if "loss" in row)])


def ours(method, config, kind="Mixtral", **options):
    trainer, config_class, columns, own, arguments = METHODS[method]
    return one_step(trainer, config_class, kind, rows(columns), {**config(**own), **options}, arguments)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_added_with_its_weight_and_logged(method, kind, config):
    off, on, twice = (ours(method, config, kind, router_aux_loss_coef=c) for c in (0.0, .5, 1.0))
    (quiet,), (loud,) = off.logs, on.logs
    assert "aux_loss" not in quiet and loud["aux_loss"] > 1
    assert loud["loss"] - quiet["loss"] == pytest.approx(.5 * loud["aux_loss"], abs=2e-5)
    first, second = (b.gradients[0] - off.gradients[0] for b in (on, twice))
    assert first.norm() > 1e-3 and torch.allclose(second, 2 * first, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_none_means_the_models_own_weight(method, config):
    own = MixtralConfig().router_aux_loss_coef
    a, b = ours(method, config), ours(method, config, router_aux_loss_coef=own)
    assert own > 0 and torch.equal(a.gradients[0], b.gradients[0]) and "aux_loss" in a.logs[0]


def test_micro_batches_weigh_as_many_tokens_as_they_read(config):
    """The loss of a step is the mean of its micro-batches' losses, by tokens: what transformers' own would be."""
    rows_of = rows("prompt_completion")
    parts = [one_step(SFTTrainer, SFTConfig, "Mixtral", rows_of.select(range(k, k + 2)), options, {}).logs[0]
             for k in (0, 2, 4, 6) for options in [config(per_device_train_batch_size=2, router_aux_loss_coef=.5)]]
    whole = ours("sft", config, per_device_train_batch_size=2, gradient_accumulation_steps=4, router_aux_loss_coef=.5)
    tokens = [part["num_tokens"] for part in parts]
    expected = sum(part["aux_loss"] * n for part, n in zip(parts, tokens)) / sum(tokens)
    assert len(set(tokens)) > 1 and whole.logs[0]["aux_loss"] == pytest.approx(expected, rel=1e-5)


def test_evaluation_adds_it_too_and_counts_no_reference(config):
    """With an adapter the reference is the same model: what its routers do is not part of the loss."""
    from peft import LoraConfig
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = DPOTrainer(model("Mixtral"), args=DPOConfig(**config(router_aux_loss_coef=.5)), peft_config=adapter,
                         train_dataset=rows("preference"), eval_dataset=rows("preference"),
                         processing_class=pocket.tokenizer())
    logs = trainer.evaluate()
    assert logs["eval_loss"] == pytest.approx(0.693147 + .5 * logs["eval_aux_loss"], abs=1e-4)
    assert trainer.aux_loss_enabled and trainer.router_aux_loss_coef == .5


def test_a_model_without_experts_says_so(config):
    arguments = dict(train_dataset=rows("prompt_completion"), processing_class=pocket.tokenizer())
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0.1, but Qwen3ForCausalLM has no load-balancing loss"):
        SFTTrainer(pocket.model(), SFTConfig(**config(router_aux_loss_coef=.1)), **arguments)
    off = SFTTrainer(pocket.model(), SFTConfig(**config(router_aux_loss_coef=0.0)), **arguments)
    assert not off.aux_loss_enabled


@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize("trainer_class, config_class", [(GRPOTrainer, GRPOConfig), (PPOTrainer, PPOConfig)])
def test_a_mixture_that_says_what_its_routers_do_can_sample(trainer_class, config_class, asks, config):
    "In `generate` Mixtral compares the router logits of the newest token with a mask of all tokens."
    policy = model("Mixtral")
    policy.config.output_router_logits = asks
    own = dict(ONLINE) if trainer_class is GRPOTrainer else dict(max_completion_length=12)
    args = config(**own, max_steps=1, per_device_train_batch_size=4, num_iterations=2)
    args.pop("train_sampling_strategy", None)
    trainer = trainer_class(policy, parity, config_class(**args), rows("prompt_only"), rows("prompt_only", 4),
                            processing_class=pocket.tokenizer())
    trainer.train()
    assert trainer.evaluate()["eval_loss"] is not None and policy.config.output_router_logits is asks
    ids = trainer.generation.completion_ids
    assert len(ids) >= 4 and trainer.state.log_history[0]["aux_loss"] > 1


@pytest.fixture(scope="module")
def trl():
    import trl
    import trl.trainer.grpo_trainer as module
    assert trl.__version__ == "1.16.0", "the reference is TRL 1.16.0; install the dev extra with -c constraints.txt"
    # TRL shuffles a generation before it cuts it: which completion is in which step must not differ here
    shuffle, module.shuffle_sequence_dict = module.shuffle_sequence_dict, lambda batch: batch
    yield trl
    module.shuffle_sequence_dict = shuffle


# several micro-batches have equal lengths: TRL weighs them alike, we by their tokens
CASES = {"SFT": ("sft", "Mixtral", {}), "SFT, Qwen3": ("sft", "Qwen3", {}),
         "SFT, the model's own": ("sft", "Mixtral", dict(router_aux_loss_coef=None)),
         "SFT, off": ("sft", "Mixtral", dict(router_aux_loss_coef=0.0)),
         "SFT, accumulated": ("sft", "Mixtral", dict(per_device_train_batch_size=1, gradient_accumulation_steps=2)),
         "DPO": ("dpo", "Qwen3", {}), "GRPO": ("grpo", "Mixtral", {})}


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_trl(case, config, trl):
    method, kind, options = CASES[case]
    ours_class, config_class, columns, own, arguments = METHODS[method]
    dataset = rows(columns)
    if case.endswith("accumulated"): dataset = dataset.select([0, 0])
    # TRL reads a reference from a path, where none is given
    if method == "dpo": arguments = dict(ref_model=model(kind))
    options = {**config(**own), "router_aux_loss_coef": .5, **options}
    theirs = getattr(trl, ours_class.__name__), getattr(trl, config_class.__name__)
    recorded = oracle(case, [one_step, model(kind), dataset, {**options, "output_dir": None}, arguments],
                      lambda: one_step(*theirs, kind, dataset, copy.deepcopy(options), arguments), "test_moe")
    answer = one_step(ours_class, config_class, kind, dataset, copy.deepcopy(options), arguments)
    (a,), (b,), (mine,), (other,) = answer.gradients, recorded.gradients, answer.logs, recorded.logs
    assert a.norm() > 1e-3 and (a - b).norm() <= 1e-5 * max(1, b.norm()), f"{(a - b).norm():.2e} of {b.norm():.2e}"
    assert ("aux_loss" in mine) == ("aux_loss" in other) == (not case.endswith("off"))
    for key in {"loss", "grad_norm", "aux_loss"} & other.keys():
        assert abs(mine[key] - other[key]) <= 1e-5 * max(1, abs(other[key])), f"{key}: {mine[key]}, TRL {other[key]}"


def test_a_dense_model_of_a_family_with_mixtures_has_no_such_loss():
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM
    config = GraniteMoeHybridConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, shared_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=0, mamba_n_heads=4, mamba_d_head=16,
        layer_types=["attention"] * 2)
    lm = GraniteMoeHybridForCausalLM(config)
    assert balance_function(lm) is None and router_coefficient(lm) == 0


def test_checkpointing_that_cuts_the_routers_off_is_refused(config):
    """With use_reentrant=True the router logits of a forward pass have no gradient: the loss would teach nothing."""
    def learn(router_aux_loss_coef, **options):
        policy = model("Qwen3")
        args = SFTConfig(**config(router_aux_loss_coef=router_aux_loss_coef, **options))
        trainer = SFTTrainer(policy, args, train_dataset=rows("prompt_completion"), processing_class=TOKENIZER)
        if not options: policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        trainer.train()
    in_config = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    for options in ({}, in_config):
        with pytest.raises(ValueError, match="use_reentrant=True cuts the routers off"): learn(.5, **options)
    learn(0.0, **in_config)
    learn(.5, **{**in_config, "gradient_checkpointing_kwargs": {"use_reentrant": False}})
