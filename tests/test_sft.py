"""SFTTrainer as people use it: learning, resuming, streaming, PEFT, paths, and what it says when something is wrong."""
import copy
import json
import math

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from gsm8k import bpe_tokenizer, gsm8k, needs_gsm8k, ten_million
from posttrain import SFTConfig, SFTTrainer, pocket


def rows(n=40, kind="prompt_completion", **kw):
    return pocket.dataset("reverse", kind, n=n, seed=1, **kw)


def train(config, dataset=None, model=None, tokenizer=None, resume=None, **kw):
    trainer = SFTTrainer(model or pocket.model(seed=0), SFTConfig(**config(**kw)),
                         train_dataset=rows() if dataset is None else dataset,
                         processing_class=tokenizer or pocket.tokenizer())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


# ---------------------------------------------------------------- learning
@needs_gsm8k
def test_gsm8k_packed_with_a_trained_bpe_tokenizer(config):
    data = gsm8k(n=2000)
    tokenizer = bpe_tokenizer(data)
    model = ten_million(len(tokenizer))
    assert 9e6 < model.num_parameters() < 12e6
    trainer = train(config, data, model, tokenizer, packing=True, max_length=256, max_steps=30,
                    per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=5)
    start, end = losses(trainer)[0], losses(trainer)[-1]
    assert abs(start - math.log(len(tokenizer))) < 2.5 and end < start - 1, (start, end)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packing_learns(config, strategy):
    trainer = train(config, rows(400), packing=True, packing_strategy=strategy, max_length=64, max_steps=20,
                    learning_rate=3e-3)
    assert losses(trainer)[-1] < losses(trainer)[0] - 1


# ---------------------------------------------------------------- one gradient, however the step is cut
@pytest.mark.parametrize("options", [{}, {"loss_type": "dft"}, {"packing": True, "max_length": 64}])
def test_one_gradient_for_every_cut(config, options):
    def after(size, accumulate):
        return weights(train(config, rows(200), optim="sgd", learning_rate=1.0, max_steps=1,
                             per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, **options))
    whole = after(8, 1)
    assert (
        whole - weights(SFTTrainer(pocket.model(seed=0), SFTConfig(**config()), train_dataset=rows(),
                                   processing_class=pocket.tokenizer()))).norm() > 1e-2
    for cut in ((4, 2), (1, 8)):
        assert torch.allclose(after(*cut), whole, atol=1e-5), cut


# ---------------------------------------------------------------- stopping and going on
def gpt2_with_dropout():
    torch.manual_seed(0)
    n = len(pocket.tokenizer())
    # dropout .1
    return GPT2LMHeadModel(GPT2Config(vocab_size=n, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1,
                                      eos_token_id=1))


def test_resume_in_the_middle_of_an_epoch_is_bit_exact(config, tmp_path):
    """Ten steps an epoch, saved at 7 of 15: data order, dropout, optimizer, schedule and metrics go on as if nothing
    had happened."""
    options = dict(max_steps=15, save_strategy="steps", save_steps=7, train_sampling_strategy="random",
                   learning_rate=1e-3, gradient_accumulation_steps=1)
    whole = train(config, model=gpt2_with_dropout(), **options)
    resumed = train(config, model=gpt2_with_dropout(), resume=str(tmp_path / "checkpoint-7"), **options)
    assert torch.equal(weights(whole), weights(resumed))
    clean = lambda t: [{k: v for k, v in row.items() if "runtime" not in k and "per_second" not in k
                        and k != "train_loss"} for row in t.state.log_history]
    assert clean(whole) == clean(resumed)


def test_a_nan_stops_the_run_and_the_last_checkpoint_stays(config, tmp_path):
    class Poison(SFTTrainer):
        def loss(self, model, batch, totals):
            loss, stats = super().loss(model, batch, totals)
            return loss * (float("nan") if self.state.global_step == 4 else 1), stats
    trainer = Poison(pocket.model(seed=0), SFTConfig(**config(max_steps=10, save_strategy="steps", save_steps=2)),
                     train_dataset=rows(), processing_class=pocket.tokenizer())
    with pytest.raises(FloatingPointError, match="step 5 is nan.*learning rate.*checkpoint"):
        trainer.train()
    assert json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4
    assert torch.isfinite(weights(trainer)).all()


# ---------------------------------------------------------------- what it may be given
def test_streaming_equals_a_table(config):
    table, stream = rows(), rows().to_iterable_dataset()
    assert torch.allclose(weights(train(config, table)), weights(train(config, stream)), atol=1e-6)


def test_model_and_tokenizer_from_a_path(config, tmp_path):
    pocket.model(seed=0).save_pretrained(tmp_path / "model")
    pocket.tokenizer().save_pretrained(tmp_path / "model")
    trainer = SFTTrainer(str(tmp_path / "model"), SFTConfig(**config()), train_dataset=rows())
    trainer.train()
    assert torch.allclose(weights(trainer), weights(train(config)), atol=1e-6)
    trainer.save_model(tmp_path / "trained")
    from transformers import AutoModelForCausalLM
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), trainer.model.parameters()))
    half = SFTTrainer(str(tmp_path / "model"), SFTConfig(**config(model_init_kwargs={"dtype": "bfloat16"})),
                      train_dataset=rows())
    assert half.model.dtype == torch.bfloat16
    half.train()


def test_peft_trains_saves_and_resumes(config, tmp_path):
    from peft import AutoPeftModelForCausalLM, LoraConfig
    pocket.model(seed=0).save_pretrained(tmp_path / "base")
    def make():
        torch.manual_seed(0)
        return SFTTrainer(str(tmp_path / "base"),
                          SFTConfig(**config(max_steps=6, save_strategy="steps", save_steps=3, learning_rate=1e-2)),
                          train_dataset=rows(), processing_class=pocket.tokenizer(),
                          peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    whole = make()
    frozen = copy.deepcopy({n: p.detach() for n, p in whole.model.named_parameters() if not p.requires_grad})
    whole.train()
    assert all(torch.equal(frozen[n], p) for n, p in whole.model.named_parameters() if n in frozen)
    assert losses(whole)[-1] < losses(whole)[0]
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(weights(whole), weights(resumed))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.allclose(loaded(ids).logits, whole.model.eval()(ids).logits, atol=1e-5)


def test_packed_rows_keep_their_boundaries_whatever_the_arguments(config):
    """TRL's config asks transformers to remove the columns that `forward` does not name, and packed rows may come back
    to be evaluated."""
    import trl
    theirs = trl.SFTConfig(**config(packing=True, max_length=48))
    assert theirs.remove_unused_columns
    trainer = SFTTrainer(pocket.model(seed=0), theirs, train_dataset=rows(), processing_class=pocket.tokenizer())
    assert len(next(iter(trainer.get_train_dataloader()))["completion_lengths"]) > 4
    ours = SFTTrainer(pocket.model(seed=0), SFTConfig(**config(packing=True, max_length=48)), train_dataset=rows(),
                      eval_dataset=rows(), processing_class=pocket.tokenizer())
    assert ours.evaluate(ours.eval_dataset)["eval_loss"] == ours.evaluate()["eval_loss"]


def test_an_evaluation_set_may_be_called_train(config):
    trainer = SFTTrainer(pocket.model(seed=0), SFTConfig(**config(packing=True, eval_packing=False, max_length=48)),
                         train_dataset=rows(), processing_class=pocket.tokenizer(), eval_dataset={"train": rows(8)})
    assert "seq_lengths" not in trainer.eval_dataset[
        "train"].column_names and "seq_lengths" in trainer.train_dataset.column_names


def test_a_chat_template_brings_its_tokens(config, tmp_path):
    donor = pocket.tokenizer()
    donor.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    donor.chat_template = ("{% for m in messages %}<|turn|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
                           "{% if add_generation_prompt %}<|turn|>{% endif %}")
    donor.save_pretrained(tmp_path / "donor")
    tokenizer = pocket.tokenizer()
    with pytest.warns(UserWarning, match="1 new tokens.*untrained"):
        trainer = SFTTrainer(pocket.model(seed=0), SFTConfig(**config(chat_template_path=str(tmp_path / "donor"))),
                             train_dataset=rows(kind="language_modeling", conversational=True),
                             processing_class=tokenizer)
    assert trainer.train_dataset[0]["input_ids"][0] == tokenizer.convert_tokens_to_ids("<|turn|>") >= len(
        pocket.tokenizer())
    assert trainer.model.get_input_embeddings().num_embeddings >= len(tokenizer)
    trainer.train()


def test_what_the_collator_and_the_rows_must_be(config):
    from transformers import DataCollatorForSeq2Seq
    tokenizer = pocket.tokenizer()
    foreign = SFTTrainer(pocket.model(seed=0), SFTConfig(**config()), data_collator=DataCollatorForSeq2Seq(tokenizer),
                         train_dataset=rows(), processing_class=tokenizer)
    with pytest.raises(TypeError, match="data_collator made.*Leave data_collator out"):
        foreign.train()
    too_big = SFTTrainer(pocket.model(seed=0, vocab_size=50), SFTConfig(**config()), train_dataset=rows(),
                         processing_class=tokenizer)
    with pytest.raises(ValueError, match="vocabulary ends at 49.*resize_token_embeddings"):
        too_big.train()
    long = SFTTrainer(gpt2_with_dropout(), SFTConfig(**config()),
                      train_dataset=Dataset.from_dict({"text": ["1" * 100]}), processing_class=tokenizer)
    with pytest.raises(ValueError, match="101 tokens.*positions for 64.*max_length=64"):
        long.train()


def test_evaluation_datasets_by_name_and_metrics(config):
    trainer = SFTTrainer(pocket.model(seed=0), SFTConfig(**config(eval_strategy="steps", eval_steps=1)),
                         train_dataset=rows(), processing_class=pocket.tokenizer(),
                         eval_dataset={"easy": rows(8), "hard": rows(9, split="test")})
    trainer.train()
    logged = {k for row in trainer.state.log_history for k in row}
    assert {"eval_easy_loss", "eval_hard_entropy", "eval_hard_mean_token_accuracy", "num_tokens", "entropy",
            "grad_norm", "learning_rate"} <= logged


def test_plain_training_arguments_and_defaults(tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=1, learning_rate=1e-4, use_cpu=True)
    trainer = SFTTrainer(pocket.model(seed=0), args, train_dataset=rows(), processing_class=pocket.tokenizer())
    assert isinstance(trainer.args,
                      SFTConfig) and trainer.args.learning_rate == 1e-4 and trainer.args.max_length == 1024


def test_formatting_func_and_text_field(config):
    data = rows()
    merged = Dataset.from_dict({"story": [r["prompt"] + r["completion"] for r in data]})
    by_field = train(config, merged, dataset_text_field="story")
    trainer = SFTTrainer(pocket.model(seed=0), SFTConfig(**config()), train_dataset=data,
                         processing_class=pocket.tokenizer(), formatting_func=lambda r: r["prompt"] + r["completion"])
    trainer.train()
    assert torch.equal(weights(by_field), weights(trainer))


def test_activation_offloading_changes_nothing(config):
    assert torch.allclose(weights(train(config)), weights(train(config, activation_offloading=True)), atol=1e-6)


def test_gradient_checkpointing_and_bf16(config):
    exact = train(config, max_steps=5, learning_rate=1e-3)
    assert torch.allclose(weights(exact),
                          weights(train(config, max_steps=5, learning_rate=1e-3, gradient_checkpointing=True)),
                          atol=1e-5)
    half = train(config, max_steps=5, learning_rate=1e-3, bf16=True)
    assert abs(losses(half)[-1] - losses(exact)[-1]) < .05 and not torch.equal(weights(half), weights(exact))


# ---------------------------------------------------------------- what it says when something is wrong
NOWHERE = "no/such/model"  # never looked at: the error comes first


def without(what):
    tokenizer = pocket.tokenizer()
    setattr(tokenizer, what, None)
    return tokenizer


BAD = {"a missing column": (dict(train_dataset=Dataset.from_dict({"prompt": ["a"], "answer": ["b"]})), {}, ValueError,
                            "'completion' is missing.*rename"),
       "no known column": (dict(train_dataset=Dataset.from_dict({"foo": ["a"]})), {}, ValueError, "foo"),
       "a wrong type": (dict(train_dataset=Dataset.from_dict({"text": [1, 2]}), processing_class=pocket.tokenizer()),
                        {}, TypeError, "column 'text', row 0.*expected a string"),
       "an empty dataset": (dict(train_dataset=Dataset.from_dict({"text": []})), {}, ValueError, "empty"),
       "prompts longer than max_length": (dict(train_dataset=rows(), processing_class=pocket.tokenizer()),
                                          dict(max_length=5), ValueError, "lose theirs to max_length=5.*max_length=20"),
       "a tokenizer without EOS": (dict(train_dataset=rows(), processing_class=without("eos_token")), {}, ValueError,
                                   "end-of-sequence.*eos_token"),
       "markers missing": (dict(train_dataset=rows(kind="language_modeling", conversational=True),
                                processing_class=pocket.tokenizer()), dict(assistant_only_loss=True), ValueError,
                           "generation"),
       "a list": (dict(train_dataset=[{"text": "a"}]), {}, TypeError, "is a list.*Dataset.from_list"),
       "a dict of splits": (dict(train_dataset={"train": rows(2)}), {}, TypeError, r"dataset\['train'\]"),
       "completion-only without completions": (
           dict(train_dataset=rows(kind="language_modeling"), processing_class=pocket.tokenizer()),
           dict(completion_only_loss=True), ValueError, "completion_only_loss"),
       "an EOS that the vocabulary lacks": (dict(train_dataset=rows(), processing_class=pocket.tokenizer()),
                                            dict(eos_token="<nope>"), ValueError, "eos_token='<nope>'.*vocabulary")}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named_before_a_model_is_loaded(what, config):
    arguments, options, kind, message = BAD[what]
    if what == "markers missing":  # and no token ends a turn
        plain = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        arguments["processing_class"].chat_template = plain
    with pytest.raises(kind, match=f"(?s){message}"):
        SFTTrainer(NOWHERE, SFTConfig(**config(**options)), **arguments)


@pytest.mark.parametrize("options, message", [
    (dict(loss_type="mse"), "loss_type='mse'.*'nll', 'dft'"),
    (dict(packing_strategy="tetris"), "packing_strategy='tetris'.*'bfd'"),
    (dict(truncation_mode="middle"), "truncation_mode"), (dict(max_length=1), "max_length"),
    (dict(packing=True, max_length=None), "packing"),
    (dict(router_aux_loss_coef=-.1), "router_aux_loss_coef"),
    (dict(label_smoothing_factor=.1), "label_smoothing_factor"), (dict(packing="yes"), "packing='yes'"),
    (dict(dataset_kwargs={"add_special_tokens": False}), "dataset_kwargs"),
])
def test_bad_config_is_named(options, message, config):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        SFTConfig(**config(**options))


def test_a_model_in_memory_without_tokenizer_says_so():
    with pytest.raises(ValueError, match="processing_class"):
        SFTTrainer(pocket.model(seed=0), train_dataset=rows())


def test_a_pass_over_a_stream_ends_where_it_ends(config, monkeypatch):
    """No further steps are asked of all processes until the number of steps of the whole run."""
    trainer = SFTTrainer(pocket.model(seed=0), SFTConfig(**config(max_steps=40)), processing_class=pocket.tokenizer(),
                         train_dataset=pocket.dataset("add", "prompt_completion", n=8).to_iterable_dataset())
    asked, count = [], trainer._count
    monkeypatch.setattr(trainer, "_count", lambda *args: asked.append(1) or count(*args))
    trainer.train()
    assert trainer.state.global_step == 40 and len(asked) < 100, "20 passes of 2 steps and an end"
