"""KTO, BCO, CPO and ORPO: what each of them promises beside TRL's numbers."""
import copy

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

import posttrain
from posttrain import pocket
from test_dpo_parity import moved, rows
from test_real_shapes import SHAPES, from_file

METHODS = ("KTO", "BCO", "CPO", "ORPO")
UNPAIRED = ("KTO", "BCO")
VARIANTS = {  # every form of loss
    "KTO": ({}, dict(loss_type="apo_zero_unpaired"), dict(mismatched="batch"), dict(precompute_ref_log_probs=True),
            dict(undesirable_weight=3.0)),
    "BCO": ({}, dict(reward_shift="running_mean"), dict(precompute_ref_log_probs=True)),
    "CPO": ({}, dict(loss_type="hinge"), dict(loss_type="ipo"), dict(loss_type="simpo", cpo_alpha=0.0),
            dict(loss_type="alphapo", alpha=.3), dict(label_smoothing=.2)),
    "ORPO": ({}, dict(nll_of="sequence")),
}
CASES = [(method, options) for method in METHODS for options in VARIANTS[method]]
#: TRL's rotation draws other answers in batches of another size
SPLIT = [(method, options) for method, options in CASES if options.get("mismatched") != "batch"]


def classes(method): return getattr(posttrain, f"{method}Trainer"), getattr(posttrain, f"{method}Config")


@pytest.fixture(scope="module")
def models():
    reference, _ = pocket.start("sort")
    return moved(reference, 1, .2), reference


def data_for(method, n=8): return rows(n // 2) if method in UNPAIRED else rows(n)


def make(method, models, config, dataset=None, tokenizer=None, **options):
    trainer, settings = classes(method)
    more = {"ref_model": copy.deepcopy(models[1])} if method in UNPAIRED else {}
    return trainer(model=copy.deepcopy(models[0]), args=settings(**config(**options)), processing_class=tokenizer or
                   pocket.tokenizer(), train_dataset=data_for(method) if dataset is None else dataset, **more)


SGD = dict(optim="sgd", learning_rate=1.0, max_grad_norm=1e9, max_steps=1, lr_scheduler_type="constant")


def gradient(method, models, config, size, **options):
    "Of one step of 8 rows, in micro-batches of `size`."
    trainer = make(method, models, config, **SGD, **options, per_device_train_batch_size=size,
                   gradient_accumulation_steps=8 // size)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    return torch.cat([(before[n] - p.detach()).flatten() for n, p in trainer.model.named_parameters()])


@pytest.mark.filterwarnings("ignore:loss_type='simpo' with cpo_alpha")
@pytest.mark.parametrize("method, options", SPLIT, ids=str)
def test_one_gradient_however_a_step_is_cut(method, options, models, config):
    whole = gradient(method, models, config, 8, **options)
    assert whole.norm() > 1e-3
    for size in (4, 2, 1):
        difference = (gradient(method, models, config, size, **options) - whole).norm()
        assert difference <= 1e-5 * max(1, whole.norm()), f"{size}: {difference:.2e} of {whole.norm():.2e}"


@pytest.mark.parametrize("method, options", [("KTO", {}), ("BCO", {}), ("BCO", dict(reward_shift="running_mean")),
                                             ("CPO", {}), ("ORPO", {})], ids=str)
def test_a_run_goes_on_where_it_stopped(method, options, models, config, tmp_path):
    settings = dict(max_steps=6, save_strategy="steps", save_steps=3, learning_rate=1e-3, per_device_train_batch_size=2,
                    gradient_accumulation_steps=2, train_sampling_strategy="random", **options)
    whole = make(method, models, config, data_for(method, 16), **settings)
    whole.train()
    again = make(method, models, config, data_for(method, 16), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters()): assert torch.equal(a, b), name
    logged = [[row for row in t.state.log_history if row["step"] > 3 and "loss" in row] for t in (whole, again)]
    assert len(logged[0]) == 3 and logged[0] == logged[1]


@pytest.mark.parametrize("method, precompute", [*((method, False) for method in METHODS),
                                                *((method, True) for method in UNPAIRED)])
def test_a_later_pass_over_rows_grouped_by_length_goes_on(method, precompute, models, config, tmp_path):
    settings = dict(max_steps=7, save_strategy="steps", save_steps=5, learning_rate=1e-3, per_device_train_batch_size=2,
                    train_sampling_strategy="group_by_length")
    if precompute: settings["precompute_ref_log_probs"] = True
    whole, again = (make(method, models, config, **settings) for _ in range(2))
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert all(map(torch.equal, whole.model.parameters(), again.model.parameters()))
    logged = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (whole, again)]
    assert logged[0] == logged[1] and logged[0][:3] != logged[0][4:], "each pass has an order of its own"


@pytest.mark.parametrize("method", METHODS)
def test_with_an_adapter_no_second_model(method, models, config):
    from peft import LoraConfig
    trainer, settings = classes(method)
    run = trainer(model=copy.deepcopy(models[1]), args=settings(**config(per_device_train_batch_size=4)),
                  train_dataset=data_for(method), processing_class=pocket.tokenizer(),
                  peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    run.train()
    assert getattr(run, "ref_model", None) is None
    if method in UNPAIRED: assert abs(run.state.log_history[0]["rewards/chosen"]) < 1e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["stream", "chats", "implicit prompt", "text of many turns"])
def test_forms_of_data(method, form, models, config):
    data = {"stream": lambda: rows(8).to_iterable_dataset(), "chats": lambda: rows(8, True),
            "implicit prompt": lambda: rows(8).map(
                lambda row: {s: row["prompt"] + row[s] for s in ("chosen", "rejected")}, remove_columns="prompt"),
            "text of many turns": lambda: Dataset.from_list(4 * [
                {"chosen": "\n\nHuman: 1 2\n\nAssistant: 2\n\nHuman: 3 4\n\nAssistant: 3 4",
                 "rejected": "\n\nHuman: 1 2\n\nAssistant: 2\n\nHuman: 3 4\n\nAssistant: 9"}])}[form]()
    if form == "text of many turns":  # words that the pocket's tokenizer does not know
        from transformers import LlamaConfig, LlamaForCausalLM

        import tiny
        tokenizer = tiny.tokenizer()
        torch.manual_seed(0)
        small = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32,
                                             num_hidden_layers=1, num_attention_heads=2))
        run = make(method, (small, small), config, data, tokenizer)
    else: run = make(method, models, config, data)
    run.train()
    assert torch.isfinite(torch.tensor(run.state.log_history[0]["loss"]))


def test_tools_reach_the_template(models, config):
    tool = {"type": "function", "function": {"name": "look_up", "description": "", "parameters": {
        "type": "object", "properties": {}}}}
    data = rows(4, True).map(lambda row: {"tools": [tool]})
    for method in METHODS:
        plain, told = (make(method, models, config, d).train_dataset[0]["prompt_ids"] for d in (rows(4, True), data))
        assert len(told) > len(plain)


ASKED = {"prompt": [{"role": "user", "content": "1 2"}]}
SAID = [{"role": "assistant", "content": word} for word in ("1", "2")]
WITH_SYSTEM = {
    "judged": {**ASKED, "completion": SAID[:1], "label": True},
    "pairs": {**ASKED, "chosen": SAID[:1], "rejected": SAID[1:]},
    "pairs with log-probs": {**ASKED, "chosen": SAID[:1], "rejected": SAID[1:], "ref_chosen_logps": -1.0,
                             "ref_rejected_logps": -1.0},
    "implicit prompt with margins": {**{s: ASKED["prompt"] + [m] for s, m in zip(("chosen", "rejected"), SAID)},
                                     "margin": .5}}


@pytest.mark.parametrize("method, kind", [(method, kind) for method in METHODS for kind in WITH_SYSTEM
                                          if kind != "judged" or method in UNPAIRED])
def test_a_system_prompt_in_a_column_of_its_own_is_read(method, kind, models, config):
    data = Dataset.from_list([{**WITH_SYSTEM[kind], "system": "Sort."}] * 4)
    run = make(method, models, config, data)
    assert run.processing_class.decode(run.train_dataset[0]["prompt_ids"]).startswith("<|system|>Sort.<|end|><|user|>")


# ---------------------------------------------------------------- KTO's zero
def test_the_zero_of_kto_is_the_steps(models, config):
    "z0 by hand: the mean over the step's mismatched answers, each asked by itself."
    from posttrain.data.collate import mismatched
    from posttrain.training.heads import completion_logps
    run = make("KTO", models, config, per_device_train_batch_size=2)
    batches = [run.data_collator([run.train_dataset[i] for i in pair]) for pair in ((0, 1), (2, 3), (4, 5))]
    with torch.no_grad():
        rows_alone = [{k: v[b:b + 1] for k, v in mismatched(batch).items()} for batch in batches for b in range(2)]
        for row in rows_alone: row["prompt_index"] = torch.tensor([0])
        def log_prob(model, row): return completion_logps(model, row)["logps"].sum()
        logratios = [log_prob(run.model, row) - log_prob(run.ref_model, row) for row in rows_alone]
    by_hand = torch.stack(logratios).mean().clamp(min=0)
    found = [batch["kl"] for batch in run.before_step(batches, None)]
    assert len(set(map(float, found))) == 1 and torch.allclose(found[0], by_hand, atol=1e-5)
    assert (torch.stack(logratios).mean() < 0) == (found[0] == 0)


def test_the_reference_reads_each_prompt_once(models, config, monkeypatch):
    run, seen = make("KTO", models, config), []
    ask = run.reference.logps
    monkeypatch.setattr(run.reference, "logps", lambda batch: seen.append(batch) or ask(batch))
    batch = run.data_collator([run.train_dataset[i] for i in range(4)])
    run.before_step([batch], None)
    assert len(seen) == 1 and seen[0]["prompt_ids"].shape[0] == 4 and seen[0]["completion_ids"].shape[0] == 8


def test_a_batch_of_one_has_a_mismatched_answer(models, config):
    run = make("KTO", models, config, per_device_train_batch_size=1)
    rows_there = [run.train_dataset[i] for i in range(len(run.train_dataset))]
    assert all(row["mismatched_ids"] and row["mismatched_ids"] != row["completion_ids"] for row in rows_there)
    run.train()
    assert run.state.log_history[0]["kl"] >= 0


def test_a_dataset_of_one_row_has_no_zero_but_0(models, config):
    one = Dataset.from_dict({"prompt": ["1 2"], "completion": ["1 2"], "label": [True]})
    run = make("KTO", models, config, one, per_device_train_batch_size=1)
    run.train()
    assert run.state.log_history[0]["kl"] == 0


def test_masks_are_not_made_of_values(models, config):
    "Where policy and reference agree every log-ratio is 0, and each answer still counts: HALOs drops such rows."
    trainer, settings = classes("KTO")
    run = trainer(model=copy.deepcopy(models[1]), args=settings(**config(per_device_train_batch_size=8, **SGD)),
                  train_dataset=data_for("KTO"), processing_class=pocket.tokenizer())
    run.train()
    assert run.state.log_history[0]["loss"] == .5 and run.state.log_history[0]["grad_norm"] > 1e-3


# ---------------------------------------------------------------- BCO's shift
def test_delta_is_frozen_within_a_step_and_half_way_between_the_classes(models, config):
    nine_to_one = rows(10).map(lambda row, i: {"completion": row["rejected" if i == 9 else "chosen"], "label": i < 9},
                               with_indices=True, remove_columns=["chosen", "rejected"])
    run = make("BCO", models, config, nine_to_one, per_device_train_batch_size=5, gradient_accumulation_steps=2,
               max_steps=2, learning_rate=0.0)
    run.train()
    first, second = (row for row in run.state.log_history if "delta" in row)
    assert first["delta"] == 0
    assert abs(second["delta"] - (first["rewards/chosen"] + first["rewards/rejected"]) / 2) < 1e-6
    theirs = make("BCO", models, config, nine_to_one, per_device_train_batch_size=10, max_steps=1, learning_rate=0.0,
                  reward_shift="running_mean")
    theirs.train()
    log = theirs.state.log_history[0]
    assert abs(log["delta"] - (9 * log["rewards/chosen"] + log["rewards/rejected"]) / 10) < 1e-6


def test_an_evaluation_does_not_move_delta(models, config):
    run = make("BCO", models, config)
    run.evaluate(data_for("BCO"))
    assert run.shift.sums.abs().sum() == 0 and run.shift.step is None or float(run.shift.step.abs().sum()) == 0


class Interrupted(TrainerCallback):
    "Once, in the middle of the first step."
    substeps = 0

    def on_substep_end(self, *args, **kwargs):
        self.substeps += 1
        if self.substeps == 2: raise KeyboardInterrupt


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_interrupted_within_a_step_begins_anew(method, models, config):
    settings = dict(per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=2)
    whole, again = (make(method, models, config, **settings) for _ in range(2))
    again.add_callback(Interrupted)
    with pytest.raises(KeyboardInterrupt): again.train()
    for run in (whole, again): run.train()
    logged = [[row for row in run.state.log_history if "loss" in row] for run in (whole, again)]
    assert len(logged[0]) == 2 and logged[0] == logged[1]


@pytest.mark.parametrize("missing", ["embedding_func", "embedding_tokenizer"])
def test_an_embedding_needs_its_tokenizer(missing, models, config):
    given = {"embedding_func": lambda input_ids, attention_mask: input_ids, "embedding_tokenizer": pocket.tokenizer()}
    del given[missing]
    trainer, settings = classes("BCO")
    with pytest.raises(TypeError, match="belong together"):
        trainer(model=models[0], args=settings(**config()), train_dataset=data_for("BCO"), **given)


EMBEDDINGS = {
    "a row per token": (lambda input_ids, attention_mask: torch.zeros(*input_ids.shape, 3), r"shape \(4, .* for 4"),
    "an array": (lambda input_ids, attention_mask: input_ids.numpy(), "ndarray for 4 prompts"),
    "the model's output": (lambda input_ids, attention_mask: (input_ids,), "tuple for 4 prompts"),
    "one row": (lambda input_ids, attention_mask: input_ids[:1], r"shape \(1, \d+\) for 4"),
    "no numbers": (lambda input_ids, attention_mask: input_ids / 0, "NaN or infinite features for 4 of 4 prompts")}


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_embeddings_that_are_none(kind, models, config):
    function, words = EMBEDDINGS[kind]
    with pytest.raises((TypeError, ValueError), match=f"embedding_func returned {words}"):
        posttrain.BCOTrainer(models[0], args=posttrain.BCOConfig(**config()), train_dataset=data_for("BCO"),
                             processing_class=pocket.tokenizer(), embedding_func=function,
                             embedding_tokenizer=pocket.tokenizer())


def test_bounds_of_the_density_ratio_in_their_order(config):
    with pytest.raises(ValueError, match="min_density_ratio=2 is above max_density_ratio=1"):
        posttrain.BCOConfig(**config(min_density_ratio=2, max_density_ratio=1))


# ---------------------------------------------------------------- what is said
def test_simpo_says_what_cpo_alpha_does(config):
    with pytest.warns(UserWarning, match="SimPO itself has cpo_alpha=0"):
        posttrain.CPOConfig(**config(loss_type="simpo"))
    both = posttrain.CPOConfig(**config(loss_type="alphapo"))
    assert both.loss_type == "simpo" and both.cpo_alpha == 0


@pytest.mark.parametrize("method", ["CPO", "ORPO", "BCO"])
def test_encoder_decoders_are_refused(method, config):
    _, settings = classes(method)
    settings(**config(is_encoder_decoder=False, padding_value=0))
    for wrong in (dict(is_encoder_decoder=True), dict(max_completion_length=10), dict(generate_during_eval=True)):
        with pytest.raises(ValueError, match=next(iter(wrong))): settings(**config(**wrong))


LABELS = {"words": (["good", "bad"], TypeError, "row 0: expected True or False, got 'good'"),
          "numbers": ([1, 2], TypeError, "row 1: expected True or False, got 2"),
          "shares": ([.2, .9], TypeError, "row 0: expected True or False"),
          "nothing": ([True, None], TypeError, "row 1: expected True or False, got None")}


@pytest.mark.parametrize("method", UNPAIRED)
@pytest.mark.parametrize("kind", LABELS)
def test_labels_that_are_none(method, kind, config, models):
    values, error, words = LABELS[kind]
    data = Dataset.from_dict({"prompt": ["1 2", "2 1"], "completion": ["1 2", "2 1"], "label": values})
    with pytest.raises(error, match=words) as raised: make(method, models, config, data)
    assert f"{method}Trainer, train dataset" in str(raised.value)


@pytest.mark.parametrize("method", UNPAIRED)
@pytest.mark.parametrize("values", [[1, 0], [1.0, 0.0], [True, False]], ids=str)
def test_labels_that_are(method, values, config, models):
    data = Dataset.from_dict({"prompt": ["1 2", "2 1"], "completion": ["1 2", "2 1"], "label": values})
    run = make(method, models, config, data)
    assert run.data_collator([run.train_dataset[0], run.train_dataset[1]])["label"].tolist() == [True, False]


@pytest.mark.parametrize("method", UNPAIRED)
def test_one_class_is_said(method, config, models, heard):
    data = Dataset.from_dict({"prompt": ["1 2", "2 1"], "completion": ["1 2", "2 1"], "label": [True, True]})
    run = make(method, models, config, data)
    run.train()
    assert "all 2 rows have label True" in heard.text
    assert "rewards/rejected" not in run.state.log_history[0]


@pytest.mark.parametrize("method, options", [*((method, {}) for method in METHODS),
                                             ("BCO", dict(reward_shift="running_mean"))], ids=str)
def test_a_tokenizer_of_another_model_is_said(method, options, config):
    "Also where the model is asked before the step."
    small = pocket.model(seed=0, vocab_size=20)
    run = make(method, (small, small), config, **options)
    with pytest.raises(ValueError, match="vocabulary ends at 19: is this the model's tokenizer"): run.train()
    with pytest.raises(ValueError, match="vocabulary ends at 19"): run.evaluate(data_for(method))


@pytest.mark.parametrize("method", METHODS)
def test_answers_that_are_equal_or_empty_are_said(method, config, models, heard):
    data = Dataset.from_dict({"prompt": ["1 2", "2 1"], "chosen": ["1 2", ""], "rejected": ["1 2", "2 1"]})
    run = make(method, models, config, data)
    run.train()
    assert "twice the same answer" in heard.text and "an empty answer" in heard.text
    assert torch.isfinite(torch.tensor(run.state.log_history[0]["loss"]))


def test_log_odds_never_give_nan():
    from posttrain.offline.orpo import odds_ratio
    for dtype in (torch.float32, torch.bfloat16):
        for p in (0.0, -1e-30, -1e-8, -1e-3, -1.0, -50.0, -1e4):
            chosen = torch.tensor([p], dtype=dtype, requires_grad=True)
            rejected = torch.tensor([-.5], dtype=dtype, requires_grad=True)
            loss = odds_ratio(chosen, rejected).sum() + odds_ratio(rejected, chosen).sum()
            assert torch.isfinite(loss)
            assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, (chosen, rejected)))


# ---------------------------------------------------------------- data that people have
READ_BY = {"ultrafeedback": METHODS, "hh_rlhf": METHODS, "kto": UNPAIRED}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_read_or_refused_by_name(shape, method, models, config, tmp_path):
    data = from_file(shape, tmp_path)
    if method in READ_BY.get(shape, ()):
        run = make(method, (pocket.model(0), pocket.model(0)), config, data, max_steps=1)
        run.train()
        assert run.state.global_step == 1
        return
    with pytest.raises((ValueError, TypeError), match=f"{method}Trainer") as refused:
        make(method, models, config, data)
    words = str(refused.value)
    assert "missing" in words or "would not be read" in words, words


@pytest.mark.parametrize("method", METHODS)
def test_the_model_card_has_the_objective(method, models, config, tmp_path):
    run = make(method, models, config)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text()
    words = {"KTO": ("z_0", "2402.01306"), "BCO": ("delta", "2404.04656"), "CPO": ("log", "2401.08417"),
             "ORPO": ("odds", "2403.07691")}[method]
    assert all(word in card for word in (*words, f"by {method}")) and "of the optimizer step" in card
