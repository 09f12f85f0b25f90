"""DPOTrainer as people use it: learning, references, cuts of a step, resuming, and what it says of a mistake."""
import copy
import gc
import json

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from gsm8k import bpe_tokenizer, gsm8k, gsm8k_pairs, needs_gsm8k, ten_million
from posttrain import DPOConfig, DPOTrainer, pocket
from posttrain.data.collate import collate_pairs
from posttrain.offline.preference_zoo import PAIR_LOSSES
from posttrain.training.heads import completion_logps
from posttrain.training.with_reference import sync_weights


def rows(n=40, **kw):
    return pocket.dataset("sort", "preference", n=n, seed=1, **kw)


def unequal(n=40):
    def cut(row, i):
        return {"rejected": row["rejected"][: 2 + i % 3] if i % 2 else row["rejected"] + row["chosen"][:3]}
    return rows(n).map(cut, with_indices=True)


def make(config, dataset=None, model=None, ref_model=None, tokenizer=None, eval_dataset=None, peft_config=None,
         callbacks=None, **kw):
    return DPOTrainer(model if model is not None else pocket.model(seed=0), ref_model, DPOConfig(**config(**kw)),
                      train_dataset=rows() if dataset is None else dataset,
                      processing_class=tokenizer or pocket.tokenizer(), eval_dataset=eval_dataset,
                      peft_config=peft_config, callbacks=callbacks)


def train(config, *args, resume=None, **kw):
    trainer = make(config, *args, **kw)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(model):
    return torch.cat([p.detach().flatten() for p in getattr(model, "model", model).parameters()])


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


def adapter(**kw):
    from peft import LoraConfig
    return LoraConfig(**{**dict(r=4, target_modules="all-linear", task_type="CAUSAL_LM"), **kw})


# ---------------------------------------------------------------- learning
@needs_gsm8k
def test_gsm8k_right_against_wrong_solutions(config):
    data = gsm8k_pairs(800)
    tokenizer = bpe_tokenizer([*gsm8k(n=2000), *data])
    model = ten_million(len(tokenizer))
    assert 9e6 < model.num_parameters() < 12e6
    trainer = train(config, data, model, tokenizer=tokenizer, max_length=128, max_steps=30,
                    per_device_train_batch_size=4, learning_rate=2e-4, logging_steps=5,
                    train_sampling_strategy="random")
    margins, accuracies = logged(trainer, "rewards/margins"), logged(trainer, "rewards/accuracies")
    assert sum(margins[-3:]) / 3 > max(margins[0],
                                       .05) and sum(accuracies[-3:]) / 3 > .55 > accuracies[0] - .1, (
                                           margins, accuracies)


def test_a_loss_is_a_function_and_an_entry(config, monkeypatch):
    """No trainer or config is touched; its hyper-parameters come from the config by name, its own defaults otherwise.
    """
    seen = {}
    def square(pairs, *, beta, target=1.0):
        seen.update(beta=beta, target=target)
        return (beta * pairs.margin - target) ** 2
    monkeypatch.setitem(PAIR_LOSSES, "square", square)
    trainer = train(config, loss_type="square", beta=.5, max_steps=12, learning_rate=1e-3)
    assert seen == dict(beta=.5,
                        target=1.0) and min(logged(trainer, "loss")) < .5 < logged(trainer, "loss")[0] == pytest.approx(
                            1.0)
    monkeypatch.setitem(PAIR_LOSSES, "needy", lambda pairs, *, gamma: pairs.margin)
    with pytest.raises(AttributeError, match="gamma.*DPOConfig does not have"): train(config, loss_type="needy")


# ---------------------------------------------------------------- one gradient, however the step is cut
LOSSES = {name: dict(loss_type=[name], label_smoothing=1e-3 if name == "exo_pair" else 0.0) for name in PAIR_LOSSES}


@pytest.mark.parametrize("case", [*LOSSES, "MPO, LD, WPO", "aot and aot_unpaired, smoothed"])
def test_one_gradient_for_every_cut(case, config):
    """Two steps, so that in the second the policy is not the reference."""
    options = (LOSSES.get(case)
               or {"MPO, LD, WPO": dict(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[.8, .2, 1], ld_alpha=.3,
                                        use_weighting=True),
                   "aot and aot_unpaired, smoothed": dict(loss_type=["aot", "aot_unpaired"], label_smoothing=.1)}[case])
    def after(size, accumulate):
        return train(config, unequal(16), optim="sgd", learning_rate=0.01, max_grad_norm=1e9,
                     lr_scheduler_type="constant", max_steps=2, per_device_train_batch_size=size,
                     gradient_accumulation_steps=accumulate, **options)
    whole = after(8, 1)
    assert (weights(whole) - weights(pocket.model(seed=0))).norm() > 1e-4
    for cut in ((4, 2), (1, 8)):
        other = after(*cut)
        difference = (weights(other) - weights(whole)).abs().max()
        assert torch.allclose(weights(other), weights(whole), atol=1e-6), (cut, difference)
        for name in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logits/rejected", "entropy",
                     "mean_token_accuracy", "num_tokens"):
            assert logged(other, name) == pytest.approx(logged(whole, name), abs=1e-4), (cut, name)


def test_one_gradient_for_every_cut_with_an_adapter(config):
    def after(size, accumulate):
        torch.manual_seed(0)
        return train(config, unequal(16), optim="sgd", learning_rate=0.01, max_grad_norm=1e9,
                     lr_scheduler_type="constant", max_steps=2, per_device_train_batch_size=size,
                     gradient_accumulation_steps=accumulate, loss_type=["aot", "sft"], peft_config=adapter())
    assert torch.allclose(weights(after(2, 4)), weights(after(8, 1)), atol=1e-5)


def test_weighting_reaches_the_likelihood_too(config):
    """WPO with sft, which TRL cannot do: each pair's share of the token mean, times its weight; here by hand."""
    trainer = make(config, unequal(4), loss_type=["sft"], use_weighting=True, max_steps=1)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad(): out = completion_logps(trainer.model, batch, want=("log_sum_sq_probs",))
    counts = batch["mask"].sum(1)
    weight = ((out["logps"] - out["log_sum_sq_probs"]) * batch["mask"]).sum(1).div(counts).exp()
    by_hand = -(out["logps"][0::2].sum(1) * weight[0::2] * weight[1::2]).sum() / counts[0::2].sum()
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(by_hand.item(), abs=1e-5)


@pytest.mark.parametrize("layout", ["padded", "flat", "shared"])
def test_layouts_give_one_loss(layout, config, monkeypatch):
    import posttrain.offline.dpo_trainer as module
    def with_layout(model, batch, **kw): return completion_logps(model, batch, layout, **kw)
    monkeypatch.setattr(module, "completion_logps", with_layout)
    a = train(config, unequal(), learning_rate=.1, optim="sgd")
    monkeypatch.undo()
    b = train(config, unequal(), learning_rate=.1, optim="sgd")
    assert torch.allclose(weights(a), weights(b), atol=1e-5)


# ---------------------------------------------------------------- references
def test_the_reference_is_what_training_starts_from(config):
    model = pocket.model(seed=3)
    with torch.no_grad(): model.lm_head.weight.mul_(1.1)  # changed in memory: no file holds it
    start = weights(model).clone()
    trainer = train(config, model=model, learning_rate=1e-2)
    assert torch.equal(weights(trainer.ref_model), start) and not torch.equal(weights(trainer), start)
    assert logged(trainer, "rewards/margins")[0] == 0
    assert not any(p.requires_grad for p in trainer.ref_model.parameters())


def test_ref_model_by_object_and_by_path(config, tmp_path):
    other = pocket.model(seed=5)
    other.save_pretrained(tmp_path / "reference")
    by_object = train(config, ref_model=other)
    by_path = train(config, ref_model=str(tmp_path / "reference"))
    assert torch.equal(weights(by_object), weights(by_path)) and logged(by_object, "rewards/margins")[0] != 0


def test_dropout_plays_no_part_in_the_reference(config):
    """With an adapter the reference is the policy itself, in the middle of training mode."""
    trainer = make(config, peft_config=adapter(lora_dropout=.5), disable_dropout=False)
    trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    a, b = trainer.reference.logps(batch), trainer.reference.logps(batch)
    assert torch.equal(a, b) and trainer.model.training and not a.requires_grad
    assert torch.allclose(a, completion_logps(pocket.model(seed=0).eval(), batch)["logps"], atol=1e-5)
    assert all(m.p == 0 for m in make(config, peft_config=adapter(lora_dropout=.5)).model.modules()
               if isinstance(m, torch.nn.Dropout))


def test_a_trained_adapter_is_its_own_reference(config, tmp_path):
    from peft import PeftModel, get_peft_model
    torch.manual_seed(0)
    model = get_peft_model(pocket.model(seed=0), adapter())
    for n, p in model.named_parameters():
        if "lora_B" in n: p.data.normal_(0, .1)
    batch = collate_pairs([dict(prompt_ids=[5, 6], chosen_ids=[7, 8], rejected_ids=[9])])
    with torch.no_grad(): before = completion_logps(model.eval(), batch)["logps"]
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    trainer = make(config, model=model, learning_rate=1e-2, max_steps=4)
    trainer.train()
    assert torch.allclose(trainer.reference.logps(batch), before, atol=1e-6)
    assert {n for n, p in trainer.model.named_parameters()
            if p.requires_grad} == trainable and trainer.model.active_adapter == "default"
    with torch.no_grad():
        assert not torch.allclose(completion_logps(trainer.model.eval(), batch)["logps"], before, atol=1e-3)
    trainer.save_model(tmp_path / "saved")
    again = PeftModel.from_pretrained(pocket.model(seed=0), tmp_path / "saved")
    with torch.no_grad():
        assert torch.allclose(completion_logps(again.eval(), batch)["logps"],
                              completion_logps(trainer.model, batch)["logps"], atol=1e-5)


@pytest.mark.parametrize("peft", [False, True])
def test_precomputed_equals_asked_every_time(config, peft, tmp_path, monkeypatch):
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # plain gradient descent: Adam would blow up the rounding of other batches to whole learning rates
    kw = dict(dataset=unequal(), eval_dataset=unequal(10), optim="sgd", learning_rate=1.0, max_steps=6, ld_alpha=.5)
    def run(**more):
        torch.manual_seed(0)
        return train(config, **kw, **more, **(dict(peft_config=adapter()) if peft else {}))
    live, once = run(), run(precompute_ref_log_probs=True, precompute_ref_batch_size=7)
    assert logged(live, "rewards/margins")[-1] > 1e-3, "nothing was learned"
    assert torch.allclose(weights(live), weights(once), atol=1e-5)
    assert live.evaluate()["eval_loss"] == pytest.approx(once.evaluate()["eval_loss"], abs=1e-5)
    assert once.ref_model is None and (peft or once.reference.source is None)
    files = list((tmp_path / "cache").rglob("*.npz"))
    assert len(files) == 2  # training and evaluation
    import posttrain.training.references as references
    calls = []
    monkeypatch.setattr(references.ModelReference, "logps", lambda self, batch: calls.append(1))
    monkeypatch.setattr(references.AdapterReference, "logps", lambda self, batch: calls.append(1))
    again = run(precompute_ref_log_probs=True)
    assert not calls and torch.equal(weights(again), weights(once))  # read from the cache


def test_the_cache_knows_the_weights_and_the_rows(config, tmp_path, monkeypatch):
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    count = lambda: len(list((tmp_path / "cache").rglob("*.npz")))
    make(config, precompute_ref_log_probs=True)
    make(config, precompute_ref_log_probs=True)
    assert count() == 1
    other = pocket.model(seed=0)
    with torch.no_grad(): other.model.norm.weight[0] += 1e-3
    make(config, model=other, precompute_ref_log_probs=True)
    assert count() == 2
    make(config, rows(39), precompute_ref_log_probs=True)
    assert count() == 3


def test_raw_evaluation_after_the_reference_is_gone(config):
    trainer = make(config, precompute_ref_log_probs=True)
    # until the policy moves it is the reference
    for each in (trainer, make(config)): assert each.evaluate(rows(4))["eval_rewards/margins"] == 0
    trainer.train()
    with pytest.raises(ValueError, match="reference is gone.*eval_dataset"): trainer.evaluate(rows(4))


@pytest.mark.parametrize("given", ["path", "model", "adapter"])
def test_raw_evaluation_where_the_reference_can_be_asked_again(given, config, tmp_path):
    other = pocket.model(seed=5)
    other.save_pretrained(tmp_path / "reference")
    options = {"path": dict(ref_model=str(tmp_path / "reference")), "model": dict(ref_model=other),
               "adapter": dict(peft_config=adapter())}[given]
    ends = []
    for more in ({}, dict(precompute_ref_log_probs=True)):
        torch.manual_seed(0)
        trainer = train(config, learning_rate=1e-2, **options, **more)
        ends.append(trainer.evaluate(rows(4))["eval_rewards/margins"])
    assert abs(ends[0]) > 1e-4 and ends[0] == pytest.approx(ends[1], abs=1e-5)


def test_a_reference_that_nobody_has_any_more(config):
    trainer = make(config, precompute_ref_log_probs=True, ref_model=pocket.model(seed=5))
    gc.collect()
    with pytest.raises(ValueError, match="reference is gone.*ref_model as a path"): trainer.evaluate(rows(4))


def test_columns_computed_elsewhere_are_used(config):
    """As TRL stores them: one sum per answer."""
    data = unequal(8)
    live = make(config, data, ref_model=pocket.model(seed=5))
    batch = live.data_collator([live.train_dataset[i] for i in range(8)])
    sums = live.reference.logps(batch).sum(1).view(-1, 2)
    known = data.add_column("ref_chosen_logps",
                            sums[:, 0].tolist()).add_column("ref_rejected_logps", sums[:, 1].tolist())
    given = make(config, known, precompute_ref_log_probs=True)
    live.train(), given.train()
    assert torch.allclose(weights(live), weights(given), atol=1e-6)


def test_the_reference_follows(config, tmp_path):
    """TR-DPO: soft updates every two steps, equal to moving it by hand."""
    class Record(TrainerCallback):
        def __init__(self): self.policies = []
        def on_step_end(self, args, state, control, model=None, **kw): self.policies.append(copy.deepcopy(model))
    record = Record()
    trainer = train(config, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=.6, max_steps=5,
                    learning_rate=1e-2, callbacks=[record])
    by_hand = pocket.model(seed=0)
    for policy in record.policies[1::2]: sync_weights(by_hand, policy, .6)
    assert torch.allclose(weights(trainer.ref_model), weights(by_hand), atol=1e-7)
    hard = train(config, sync_ref_model=True, ref_model_sync_steps=5, ref_model_mixup_alpha=1.0, max_steps=5,
                 learning_rate=1e-2)
    assert torch.equal(weights(hard.ref_model), weights(hard))


def test_resuming_finds_the_reference_that_had_moved(config, tmp_path):
    options = dict(sync_ref_model=True, ref_model_sync_steps=2, max_steps=8, save_strategy="steps", save_steps=5,
                   learning_rate=1e-2, train_sampling_strategy="random")
    whole = train(config, **options)
    (tmp_path / "checkpoint-5").rename(tmp_path / "moved-5")
    resumed = train(config, resume=str(tmp_path / "moved-5"), **options)
    assert torch.equal(weights(whole), weights(resumed))
    assert torch.equal(weights(whole.ref_model), weights(resumed.ref_model))
    (tmp_path / "moved-5").rename(tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-5" / "ref_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="ref_model.safetensors.*sync_ref_model"):
        train(config, resume=str(tmp_path / "checkpoint-5"), **options)


def test_resuming_a_trained_adapter_finds_it_again(config, tmp_path):
    """A frozen copy of the adapter lies in the checkpoint beside the trained one; transformers would load only that."""
    from peft import get_peft_model
    def make_it():
        torch.manual_seed(0)
        model = get_peft_model(pocket.model(seed=0), adapter(target_modules=["q_proj", "embed_tokens"]))
        generator = torch.Generator().manual_seed(1)
        for n, p in model.named_parameters():
            if "lora_" in n: p.data.copy_(torch.randn(p.shape, generator=generator) * .1)
        return make(config, model=model, max_steps=6, save_strategy="steps", save_steps=3, learning_rate=1e-2)
    whole = make_it()
    assert abs(logged_first(whole)) < 1e-6  # its copy says what it says, embeddings included
    whole.train()
    resumed = make_it()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(weights(whole), weights(resumed))
    assert not any(p.requires_grad for n, p in resumed.model.named_parameters() if ".ref" in n)


def logged_first(trainer):
    """The first margin, before anything is trained."""
    return trainer.evaluate(rows(8))["eval_rewards/margins"]


def test_functional_dropout_is_off_too(config):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(pocket.tokenizer()), hidden_size=32, intermediate_size=64,
                                         num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128,
                                         attention_dropout=.5))
    assert logged(train(config, model=model), "rewards/margins")[0] == pytest.approx(0, abs=1e-6)


def test_the_cache_knows_how_the_weights_are_used(config, tmp_path, monkeypatch):
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    first = make(config, precompute_ref_log_probs=True).train_dataset[0]["ref_chosen_logps"]
    other = pocket.model(seed=0, rms_norm_eps=.1)
    assert torch.equal(weights(other), weights(pocket.model(seed=0)))
    assert make(config, model=other, precompute_ref_log_probs=True).train_dataset[0]["ref_chosen_logps"] != first
    for file in (tmp_path / "cache").rglob("*.npz"): file.write_bytes(b"cut off")
    with pytest.warns(UserWarning, match="cannot be read.*computed anew"):
        again = make(config, precompute_ref_log_probs=True).train_dataset[0]["ref_chosen_logps"]
    assert again == first


def test_a_stream_that_ends_in_the_middle_of_a_step(config):
    """22 rows as 2 x 4: the last six are dropped with a word, and no gradient is carried into the next step."""
    options = dict(optim="sgd", learning_rate=.1, max_steps=4, lr_scheduler_type="constant")
    with pytest.warns(UserWarning, match="do not fill a step"):
        cut = train(config, rows(22).to_iterable_dataset(), per_device_train_batch_size=2,
                    gradient_accumulation_steps=4, **options)
    whole = train(config, rows(16).to_iterable_dataset(), per_device_train_batch_size=8, **options)
    assert torch.allclose(weights(cut), weights(whole), atol=1e-5)


# ---------------------------------------------------------------- what it may be given
def test_streams_chats_tools_and_tokenised_rows(config):
    table = train(config)
    assert torch.allclose(weights(table), weights(train(config, rows().to_iterable_dataset())), atol=1e-6)
    tokenised = table.train_dataset
    assert torch.allclose(weights(table), weights(train(config, tokenised)), atol=1e-6)
    chats = rows(8, conversational=True)
    tool = [{"type": "function",
             "function": {"name": "look_up", "description": "a word",
                          "parameters": {"type": "object", "properties": {}}}}]
    trainer = train(config, chats.map(lambda row: {"tools": json.dumps(tool)}))
    assert logged(trainer, "loss")[0] == pytest.approx(.6931, abs=1e-3)


def test_evaluation_predict_and_checkpointing(config):
    trainer = train(config, eval_dataset={"easy": rows(8), "hard": unequal(9)}, eval_strategy="steps", eval_steps=1)
    assert {"eval_easy_loss", "eval_hard_rewards/margins",
            "eval_hard_logps/chosen"} <= {k for row in trainer.state.log_history for k in row}
    predicted = trainer.predict(rows(4))  # one row a pair: the chosen answer with its prompt, then the rejected one
    assert len(predicted.predictions) == len(predicted.label_ids) == 4
    lengths = [len(r["chosen"]) + 1 + len(r["rejected"]) + 1 for r in rows(4)]
    assert (predicted.label_ids != -100).sum(1).tolist() == lengths
    exact = train(config, max_steps=4, learning_rate=1e-3)
    assert torch.allclose(weights(exact),
                          weights(train(config, max_steps=4, learning_rate=1e-3, gradient_checkpointing=True)),
                          atol=1e-5)
    half = train(config, max_steps=4, learning_rate=1e-3, bf16=True)
    assert abs(logged(half, "loss")[-1] - logged(exact, "loss")[-1]) < .05


def test_evaluation_batches_do_not_matter(config):
    a, b = (make(config, eval_dataset=unequal(10), ref_model=pocket.model(seed=5), per_device_eval_batch_size=n,
                 loss_type=["sigmoid", "ipo"]).evaluate() for n in (4, 10))
    for k in a:
        if not any(word in k for word in ("time", "per_second")): assert a[k] == pytest.approx(b[k], abs=1e-5), k


# ---------------------------------------------------------------- what it says when something is wrong
NOWHERE = "no/such/model"  # never looked at: the error comes first


@pytest.mark.parametrize("data, options, kind, message", [
    (Dataset.from_dict({"prompt": ["a"], "chosen": ["b"]}), {}, ValueError, "'rejected'"),
    (Dataset.from_dict({"text": ["a"]}), {}, ValueError, "preference"),
    (Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": [1]}), {}, TypeError, "rejected.*row 0"),
    ([{"prompt": "a"}], {}, TypeError, "is a list.*Dataset.from_list"),
    (rows(4), dict(max_length=3), ValueError, "max_length=3"),
    (rows(4).to_iterable_dataset(), dict(precompute_ref_log_probs=True), ValueError, "stream"),
], ids=["a missing column", "another kind", "a wrong type", "a list", "too long", "a stream to precompute"])
def test_bad_data_is_named_before_a_model_is_loaded(data, options, kind, message, config):
    with pytest.raises(kind, match=f"(?s){message}"):
        DPOTrainer(NOWHERE, args=DPOConfig(**config(**options)), train_dataset=data,
                   processing_class=pocket.tokenizer())


@pytest.mark.parametrize("options, message", [
    (dict(loss_type="dpo"), "loss_type='dpo'.*'sigmoid'"), (dict(loss_type="sigmoid,sft"), "'sigmoid,sft'.*or a list"),
    (dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0]), "loss_weights=.*each"),
    (dict(loss_weights=["a"]), "loss_weights=.*number"), (dict(loss_weights=[float("nan")]), "loss_weights"),
    (dict(beta=0), "beta=0 of DPOConfig must be above 0"), (dict(beta=float("inf")), "beta=inf.*finite"),
    (dict(discopop_tau=0), "discopop_tau=0"), (dict(label_smoothing=.5), "label_smoothing"),
    (dict(loss_type="exo_pair"), "exo_pair.*label_smoothing.*1e-3"),
    (dict(f_divergence_type="kl"), "f_divergence_type='kl'.*'js_divergence'"),
    (dict(f_divergence_type="forward_kl", loss_type=["apo_zero"]), "apo_zero.*log Z"),
    (dict(use_weighting=True, loss_type=["aot"]), "use_weighting.*aot"),
    (dict(sync_ref_model=True, precompute_ref_log_probs=True), "sync_ref_model.*precompute"),
    (dict(ld_alpha=1.5), "ld_alpha=1.5"), (dict(ref_model_mixup_alpha=2), "ref_model_mixup_alpha=2"),
    (dict(ref_model_sync_steps=0), "ref_model_sync_steps=0"),
    (dict(truncation_mode="drop"), "truncation_mode"), (dict(max_length=1), "max_length"),
    (dict(router_aux_loss_coef=-.1), "router_aux_loss_coef"),
])
def test_bad_config_is_named(options, message, config):
    with pytest.raises(ValueError, match=f"(?s){message}"): DPOConfig(**config(**options))


@pytest.mark.parametrize("options, message", [
    (dict(beta="0.1"), "beta of DPOConfig must be a number, got '0.1'"),
    (dict(label_smoothing=None), "label_smoothing.*None"), (dict(loss_type=[]), "loss_type"),
    (dict(loss_type=None), "loss_type=None")])
def test_what_is_no_number_is_named(options, message, config):
    with pytest.raises(TypeError, match=message): DPOConfig(**config(**options))


def test_label_smoothing_without_effect_is_said(config):
    with pytest.warns(UserWarning, match="label_smoothing=0.1 has no effect.*hinge"):
        DPOConfig(**config(loss_type="hinge", label_smoothing=.1))


def test_references_that_cannot_be(config):
    model = pocket.model(seed=0)
    with pytest.raises(ValueError, match="same object"): make(config, model=model, ref_model=model)
    with pytest.raises(ValueError, match="vocabulary has .* the reference's 50"):
        make(config, ref_model=pocket.model(seed=0, vocab_size=50))
    with pytest.raises(TypeError, match="got DPOConfig.*third parameter, args="):
        DPOTrainer(model, DPOConfig(**config()), train_dataset=rows(), processing_class=pocket.tokenizer())
    with pytest.raises(ValueError, match="pissa.*pass ref_model"):
        make(config, peft_config=adapter(init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="bias='all'.*pass ref_model"): make(config, peft_config=adapter(bias="all"))
    with pytest.raises(FileNotFoundError, match="nowhere.jinja"): make(config, chat_template_path="/nowhere.jinja")
    with pytest.raises(ValueError, match="sync_ref_model.*PEFT"):
        make(config, peft_config=adapter(), sync_ref_model=True)
