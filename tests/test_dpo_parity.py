"""DPO and its family against TRL 1.16 on the same model, reference, tokenizer and rows: loss, gradient and metrics.

As in test_parity: after one step of plain gradient descent with learning rate 1, equal weights mean equal gradients."""
import copy
import json

import pytest
import torch

from oracle import Answer, oracle, start
from posttrain import DPOConfig, DPOTrainer, pocket
from posttrain.offline.preference_zoo import PAIR_LOSSES
from stamps import short_hash

pytestmark = pytest.mark.parity
LOGGED = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "rewards/chosen", "rewards/rejected",
          "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected")
ROWS = 8


@pytest.fixture(scope="module")
def trl():
    import trl
    assert trl.__version__ == "1.16.0", "the reference is TRL 1.16.0; install the dev extra with -c constraints.txt"
    return trl


def rows(n=ROWS, conversational=False):
    """Answers of unequal length: a wrong one is cut or goes on."""
    data = pocket.dataset("sort", "preference", n=n, seed=3, conversational=conversational)
    def unequal(row, i):
        if conversational:
            return {"rejected": [{**row["rejected"][0], "content": row["rejected"][0]["content"][: 2 + i % 3]}]}
        return {"rejected": row["rejected"][: 2 + i % 3] if i % 2 else row["rejected"] + row["chosen"][:3]}
    return data.map(unequal, with_indices=True)


def moved(model, seed, by=.05):
    """A model near another one, so that log-ratios are not all 0."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.add_(by * torch.randn(p.shape, generator=generator) * p.std())
    return model


@pytest.fixture(scope="module")
def models():
    reference, _ = start("sort")
    return moved(reference, 1, .2), reference


def one_step(trainer_class, config_class, models, dataset, options, peft=None):
    policy, reference = copy.deepcopy(models[0]), copy.deepcopy(models[1])
    args = config_class(**{**options, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9, "max_steps": 1,
                           "lr_scheduler_type": "constant"})
    if peft is not None: policy = peft(policy)
    trainer = trainer_class(model=policy, ref_model=None if peft is not None else reference, args=args,
                            train_dataset=dataset, processing_class=pocket.tokenizer())
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    gradient = {n: before[n] - p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
    row = next(row for row in trainer.state.log_history if "loss" in row)
    return Answer([torch.cat([g.flatten() for g in gradient.values()])], [{**row, "trained": short_hash(*gradient)}])


def same(ours, theirs, skip=(), norm=1e-3):
    (a,), (b,), (mine,), (their,) = ours.gradients, theirs.gradients, ours.logs, theirs.logs
    assert mine["trained"] == their["trained"], "other names of weights"
    assert b.norm() > norm
    assert (a - b).norm() <= 1e-5 * max(1, b.norm()), f"gradients differ by {(a - b).norm():.2e} of {b.norm():.2e}"
    for key in LOGGED:
        if key not in skip:
            limit = 1e-5 * max(1, abs(their[key]))
            assert abs(mine[key] - their[key]) <= limit, f"{key}: {mine[key]} against TRL's {their[key]}"


def both(name, trl, config, models, dataset, options, peft=None):
    """Our step, and TRL's on the same rows, live or recorded. `dataset` is a function that makes them."""
    options = config(**options)
    inputs = [one_step, models, dataset(), {**options, "output_dir": None}, peft]
    theirs = oracle(name, inputs, lambda: one_step(trl.DPOTrainer, trl.DPOConfig, models, dataset(), options, peft),
                    "test_dpo_parity")
    return one_step(DPOTrainer, DPOConfig, models, dataset(), options, peft), theirs


BATCH = dict(per_device_train_batch_size=ROWS)
CASES = {**{name: dict(loss_type=[name], label_smoothing=1e-3 if name == "exo_pair" else 0.0) for name in PAIR_LOSSES},
         "robust, smoothed": dict(loss_type=["robust"], label_smoothing=.1),
         "aot, smoothed": dict(loss_type=["aot"], label_smoothing=.2),
         "aot_unpaired, smoothed": dict(loss_type=["aot_unpaired"], label_smoothing=.2), "small beta": dict(beta=.01),
         "large beta": dict(beta=2.0), "ipo, beta 1": dict(loss_type="ipo", beta=1.0),
         "MPO": dict(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[.8, .2, 1.0]),
         "RPO": dict(loss_type=["sigmoid", "sft"]), "LD-DPO": dict(ld_alpha=.5),
         "LD-DPO, ipo and sft": dict(ld_alpha=0.0, loss_type=["ipo", "sft"]), "WPO": dict(use_weighting=True),
         "WPO, two losses": dict(use_weighting=True, loss_type=["sigmoid", "nca_pair"], loss_weights=[1.0, .3]),
         "discopop, tau": dict(loss_type=["discopop"], discopop_tau=.5),
         **{f"{name}, {divergence}": dict(loss_type=[name], f_divergence_type=divergence)
            for divergence in ("forward_kl", "js_divergence", "alpha_divergence") for name in ("sigmoid", "ipo")},
         "alpha near 1": dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0),
         "alpha 2": dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=2.0),
         "truncated": dict(max_length=14), "precomputed": dict(precompute_ref_log_probs=True, loss_type=["sigmoid"]),
         "precomputed, LD-DPO": dict(precompute_ref_log_probs=True, ld_alpha=.3), "clipped": dict(max_grad_norm=.1),
         "smoothed mixture": dict(loss_type=["robust", "exo_pair", "aot"], label_smoothing=.01, ld_alpha=.2,
                                  loss_weights=[.1, .2, .3])}


@pytest.mark.parametrize("case", CASES)
def test_loss_gradient_and_metrics_equal_trl(case, config, trl, models):
    same(*both(case, trl, config, models, rows, {**BATCH, **CASES[case]}), norm=1e-5)


def chats(**columns): return rows(conversational=True).map(lambda row: columns)


TOOL = [{"type": "function",
         "function": {"name": "look_up", "description": "a word", "parameters": {"type": "object", "properties": {}}}}]
whole = lambda row: {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]}
DATA = {"explicit prompt": rows, "implicit prompt": lambda: rows().map(whole, remove_columns="prompt"),
        "no prompt": lambda: rows().map(lambda row: {"prompt": ""}), "chats": chats,
        "chats, implicit prompt": lambda: chats().map(whole, remove_columns="prompt"),
        "chats with tools": lambda: chats(tools=json.dumps(TOOL)),
        "chats with template options": lambda: chats(chat_template_kwargs={"enable_thinking": False}),
        "a stream": lambda: rows().to_iterable_dataset()}


@pytest.mark.parametrize("case", DATA)
def test_every_form_of_data(case, config, trl, models):
    options = dict(**BATCH, loss_type=["sigmoid", "sigmoid_norm", "sft"])
    same(*both(f"data: {case}", trl, config, models, DATA[case], options))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_other_models(family, config, trl):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    n = len(pocket.tokenizer())
    llama = LlamaConfig(vocab_size=n, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False)
    # with dropout .1
    gpt2 = GPT2Config(vocab_size=n, n_embd=32, n_layer=2, n_head=2, n_positions=128, bos_token_id=1, eos_token_id=1)
    model = LlamaForCausalLM(llama) if family == "llama" else GPT2LMHeadModel(gpt2)
    same(*both(f"model: {family}", trl, config, (moved(model, 1, .3), model), rows, BATCH))


def test_defaults_are_trls(trl, tmp_path):
    """Fields and defaults; three differ for all trainers (see PostConfig)."""
    import dataclasses
    ours, theirs = DPOConfig(str(tmp_path), use_cpu=True,
                             report_to="none"), trl.DPOConfig(str(tmp_path), use_cpu=True, report_to="none", bf16=False)
    names = {f.name for f in dataclasses.fields(trl.DPOConfig)}
    assert names <= {f.name for f in dataclasses.fields(DPOConfig)}
    different = {n for n in names if getattr(ours, n) != getattr(theirs, n)}
    assert different <= {"gradient_checkpointing", "gradient_checkpointing_kwargs", "logging_nan_inf_filter",
                         "remove_unused_columns", "pad_to_multiple_of", "dataloader_pin_memory",
                         "logging_dir"}, different


def lora(trained):
    """An adapter that has learned something, or a fresh one whose effect is not nothing either way."""
    def wrap(model):
        from peft import LoraConfig, get_peft_model
        torch.manual_seed(0)
        model = get_peft_model(model,
                               LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM",
                                          init_lora_weights="gaussian"))
        for name, p in model.named_parameters():
            if trained and "lora_B" in name: p.data.normal_(0, .05)
        return model
    return wrap


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("loss", list(PAIR_LOSSES))
def test_with_an_adapter(loss, trained, config, trl, models):
    """A PEFT model as the policy: the reference is the adapter as it came."""
    options = dict(**BATCH, loss_type=[loss], label_smoothing=1e-3 if loss == "exo_pair" else 0.0)
    name = f"adapter: {loss}, {'trained' if trained else 'fresh'}"
    same(*both(name, trl, config, models, rows, options, lora(trained)), norm=1e-6)


def test_a_fresh_adapter_refers_to_the_model_without_it(config, trl, models):
    """peft_config in the constructor, two steps: in the second the reference differs from the policy."""
    from peft import LoraConfig
    def run(trainer_class, config_class):
        args = config_class(**config(**BATCH, max_steps=3, learning_rate=1e-2, optim="sgd",
                                     lr_scheduler_type="constant", max_grad_norm=1e9))
        trainer = trainer_class(model=copy.deepcopy(models[0]), args=args, train_dataset=rows(24),
                                processing_class=pocket.tokenizer(),
                                peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        trainer.train()
        return {n: p.detach() for n, p in trainer.model.named_parameters()
                if p.requires_grad}, [r for r in trainer.state.log_history if "loss" in r]
    (mine, ours), (theirs, other) = run(DPOTrainer, DPOConfig), run(trl.DPOTrainer, trl.DPOConfig)
    assert mine.keys() == theirs.keys() and ours[2]["rewards/margins"] != 0
    for a, b in zip(ours, other):
        for key in LOGGED: assert abs(a[key] - b[key]) <= 1e-5 * max(1, abs(b[key])), key


def test_where_trl_is_wrong(config, trl, models):
    """Label smoothing, which TRL's sigmoid drops; WPO with losses that it cannot weigh; what ours does instead, to the
    digit."""
    from posttrain.foundations.preferences import margin_loss
    plain, smooth = config(**BATCH, loss_type=["sigmoid"]), config(**BATCH, loss_type=["sigmoid"], label_smoothing=.2)
    theirs = [one_step(trl.DPOTrainer, trl.DPOConfig, models, rows(), o).logs[0]["loss"] for o in (plain, smooth)]
    assert theirs[0] == theirs[1], "TRL takes label_smoothing into account now: compare it"
    ours = [one_step(DPOTrainer, DPOConfig, models, rows(), o).logs[0] for o in (plain, smooth)]
    assert abs(ours[0]["loss"] - theirs[0]) < 1e-5
    # softplus(m) = softplus(-m) + m, so cDPO's mean is DPO's plus eps times the mean margin
    assert abs(ours[1]["loss"] - (ours[0]["loss"] + .2 * ours[0]["rewards/margins"])) < 1e-5
    assert float(margin_loss(torch.tensor(1.0), label_smoothing=.2)) > float(margin_loss(torch.tensor(1.0)))
    weighted = config(**BATCH, use_weighting=True, loss_type=["sft"])
    with pytest.raises(RuntimeError): one_step(trl.DPOTrainer, trl.DPOConfig, models, rows(), weighted)
    logged, = one_step(DPOTrainer, DPOConfig, models, rows(), weighted).logs
    assert 0 < logged["loss"] < ours[0]["loss"] + 20 and logged["grad_norm"] > 0
