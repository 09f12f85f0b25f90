"""GKDTrainer and DistillationTrainer: losses in plain loops, cuts, two processes, resuming, whose answers are learned
from, teachers of all kinds, evaluation, bad input, learning."""
import copy
import json
import re
from functools import partial

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForMaskedLM, Qwen3ForSequenceClassification, TrainerCallback

import tiny
from posttrain import pocket
from posttrain.distillation.distillation_trainer import DistillationConfig, DistillationTrainer
from posttrain.distillation.gkd_trainer import GKDConfig, GKDTrainer
from posttrain.distillation.on_policy import top_k_divergence
from posttrain.foundations.divergences import generalized_jsd
from posttrain.rollout.demonstrations import coin
from posttrain.rollout.sampler import Sampler
from test_distributed import LEAVE, launch
from test_grpo import logs, weights

COINS = [coin(0, drawn, .5) for drawn in (0, 8, 16, 24)]  # of steps of eight answers with the seed 0
#: name -> trainer, config, options
RUNS = {"gkd": (GKDTrainer, GKDConfig, {}), "gkd, data": (GKDTrainer, GKDConfig, dict(lmbda=0, beta=.1)),
        "gkd, own": (GKDTrainer, GKDConfig, dict(lmbda=1, beta=.9, loss_temperature=None)),
        "gkd, teacher": (GKDTrainer, GKDConfig, dict(lmbda=0, seq_kd=True, beta=0)),
        "gkd, kept": (GKDTrainer, GKDConfig, dict(lmbda=0, precompute_teacher=True)),
        "distillation": (DistillationTrainer, DistillationConfig, dict(temperature=.7))}
EACH = pytest.mark.parametrize("name", RUNS)


def student(seed=3, **options): return pocket.model(**{"seed": seed, "hidden_size": 32, **options})


def teacher(task="reverse"): return pocket.start(task)[0]


def rows(n=50, **options): return pocket.dataset("reverse", "prompt_completion", n=n, **options)


class Seen(TrainerCallback):
    "What was learned from, and how far the models were apart."

    def __init__(self): self.generations, self.tokens = [], []

    def on_generation(self, trainer, generation):
        source, = set(generation.extra["written_by"])
        self.generations.append((source, generation))

    def on_tokens(self, trainer, batch, tokens): self.tokens.append((batch, tokens))


def make(config, name="gkd", model=None, teacher_model="reverse", dataset=None, eval_dataset=None, tokenizer=None,
         **options):
    trainer, config_class, own = RUNS[name]
    beside = {k: options.pop(k) for k in ("peft_config", "rollout_func", "callbacks") if k in options}
    args = config(**{**dict(per_device_train_batch_size=8, max_completion_length=8, max_steps=1, optim="sgd",
                            learning_rate=.1, max_grad_norm=1e9, lr_scheduler_type="constant"), **own, **options})
    args.pop("train_sampling_strategy")
    if teacher_model in ("reverse", "sort"): teacher_model = teacher(teacher_model)
    return trainer(student() if model is None else model, teacher_model, config_class(**args),
                   train_dataset=rows() if dataset is None else dataset, eval_dataset=eval_dataset,
                   processing_class=tokenizer or pocket.tokenizer(), **beside)


def train(config, *args, resume=None, **options):
    trainer = make(config, *args, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def mean_divergence(model, other, generation, beta, temperature=1.0):
    "Answer by answer, token by token, from all logits."
    total, tokens = 0, 0
    for prompt, answer in zip(generation.prompt_ids, generation.completion_ids):
        mine, theirs = (m(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1] / temperature
                        for m in (model, other))
        total, tokens = total + generalized_jsd(mine, theirs.detach(), beta).sum(), tokens + len(answer)
    return total / tokens


# ---------------------------------------------------------------- the loss and its gradient
@EACH
def test_loss_and_gradient_in_plain_loops(name, config):
    trainer, before = make(config, name), student()
    trainer.train()
    how = trainer.args
    loss = mean_divergence(before, teacher(), trainer.generation, how.beta, how.loss_temperature or how.temperature)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in before.parameters()])
    found = (weights(before) - weights(trainer)) / how.learning_rate
    assert abs(logs(trainer)[0]["loss"] - loss.item()) < 1e-5 and abs(logs(trainer)[0]["divergence"] - loss) < 1e-5
    assert (found - gradient).norm() < 1e-4 * gradient.norm() and gradient.norm() > 1e-2


@EACH
def test_one_gradient_for_every_cut(name, config):
    whole = train(config, name, max_steps=3)
    moved = (weights(whole) - weights(student())).norm()
    assert moved > 1e-3
    for size, accumulated in ((4, 2), (1, 8)):
        cut = train(config, name, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated,
                    max_steps=3)
        assert (weights(cut) - weights(whole)).norm() <= 5e-5 * moved, (size, accumulated)
        for a, b in zip(logs(whole), logs(cut), strict=True):
            assert a.keys() == b.keys()
            for key in set(a) - {"step", "epoch"}:
                if not key.startswith("time"): assert abs(a[key] - b[key]) <= 5e-5 * max(1, abs(a[key])), key


def test_the_step_divides_by_the_tokens_that_it_learns_from(config):
    "The student's own answers are longer than the dataset's, which TRL counts."
    seen = Seen()
    trainer = train(config, "gkd, own", callbacks=[seen], per_device_train_batch_size=2, gradient_accumulation_steps=4)
    total = sum(tokens["divergence"].sum() for _, tokens in seen.tokens)
    generation = trainer.generation
    written, given = generation.token_count(), sum(len(row["completion"]) + 1 for row in generation.rows)
    assert abs(total / written - logs(trainer)[0]["loss"]) < 1e-5 and written != given


@pytest.mark.parametrize("estimator, rest", [("top_k", "renormalised"), ("top_k_tail", "bucket")])
def test_part_of_the_vocabulary(estimator, rest, config):
    trainer, before, other = make(config, "gkd, data", estimator=estimator, estimator_k=5, beta=1), student(), teacher()
    trainer.train()
    total, generation = 0, trainer.generation
    for prompt, answer in zip(generation.prompt_ids, generation.completion_ids):
        mine, theirs = (m(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1] for m in (before, other))
        total += top_k_divergence(mine, theirs, 5, partial(generalized_jsd, beta=1), rest=rest).sum().item()
    assert abs(total / generation.token_count() - logs(trainer)[0]["loss"]) < 1e-5


@pytest.mark.parametrize("name", ["gkd", "distillation"])
def test_a_copy_of_the_teacher_learns_nothing(name, config):
    trainer = train(config, name, model=teacher(), optim="sgd")
    assert abs(logs(trainer)[0]["loss"]) < 1e-6 and torch.allclose(weights(trainer), weights(teacher()), atol=1e-6)


def test_dropout_is_off_where_it_is_asked(config):
    args = dict(attention_dropout=.5, hidden_size=32)
    on, off = (make(config, model=pocket.model(**args), disable_dropout=flag) for flag in (False, True))
    assert on.model.model.layers[0].self_attn.attention_dropout == .5
    assert off.model.model.layers[0].self_attn.attention_dropout == 0
    assert not off.teacher_model.training


# ---------------------------------------------------------------- whose answers
def test_the_coin_says_whose_answers(config):
    assert len(set(COINS)) == 2
    seen = Seen()
    trainer = train(config, max_steps=4, callbacks=[seen])
    assert [source for source, _ in seen.generations] == ["student" if own else "dataset" for own in COINS]
    assert [row["on_policy"] for row in logs(trainer)] == [float(own) for own in COINS]
    for row, own in zip(logs(trainer), COINS): assert ("completions/mean_length" in row) == own
    for source, generation in seen.generations:
        texts = [row["completion"] for row in generation.rows]
        assert (generation.completions == texts) == (source == "dataset")
        if source == "dataset":
            assert [ids[-1] for ids in generation.completion_ids] == [trainer.processing_class.eos_token_id] * 8


def test_the_student_writes_with_the_weights_of_now(config):
    trainer = train(config, "gkd, own", max_steps=2, learning_rate=1.0)
    seeds, model = list(range(8)), trainer.model
    prompts = trainer.encode(list(rows(8)))
    trainer.source = "student"
    trainer.sync_engines()
    now, how = trainer.sample(list(rows(8)), seeds, 1).completion_ids, trainer.args.sampling()
    def written_by(model): return Sampler(model, pocket.tokenizer()).sample(prompts, seeds, how).completion_ids
    assert now == written_by(model) != written_by(student())


def test_the_teacher_writes_with_seq_kd(config):
    trainer = train(config, "gkd, teacher", dataset=rows().remove_columns("completion"))
    generation, model = trainer.generation, teacher()
    right = [text == row["prompt"].removeprefix("reverse ").removesuffix("=")[::-1]
             for row, text in zip(generation.rows, generation.completions)]
    assert logs(trainer)[0]["on_policy"] == 0 and "completions/mean_length" in logs(trainer)[0]
    assert trainer.teacher_engine is not trainer.engine and len(right) == 8
    loss = mean_divergence(student(), model, generation, 0)
    assert abs(loss.item() - logs(trainer)[0]["loss"]) < 1e-5


@pytest.mark.parametrize("options", [dict(lmbda=1), dict(seq_kd=True), dict(lmbda=0, seq_kd=True)], ids=str)
def test_prompts_alone_are_enough_where_a_model_writes(options, config):
    assert logs(train(config, dataset=rows().remove_columns("completion"), **options))


CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2+3"},
        {"role": "assistant", "content": "5"}, {"role": "user", "content": "and 1?"},
        {"role": "assistant", "content": "6"}]


@pytest.mark.parametrize("row", [
    {"messages": CHAT}, {"conversations": CHAT}, {"prompt": CHAT[:-1], "completion": CHAT[-1:]},
    {"prompt": "ignored", "messages": CHAT}, {"system": "be brief", "prompt": CHAT[1:-1], "completion": CHAT[-1:]}],
    ids=lambda row: ", ".join(row))
def test_the_last_turn_of_a_chat_is_learned_from(row, config):
    trainer = train(config, "gkd, data", dataset=Dataset.from_list([row] * 8))
    tokenizer, generation = trainer.processing_class, trainer.generation
    whole = tokenizer.apply_chat_template(CHAT, return_dict=False)
    start = tokenizer.apply_chat_template(CHAT[:-1], add_generation_prompt=True, return_dict=False)
    assert generation.prompt_ids[0] == start and start + generation.completion_ids[0] == whole
    assert generation.completions[0] == CHAT[-1:]


def test_tokens_are_those_of_supervised_fine_tuning(config):
    from posttrain.data.prepare import prepare_sft
    trainer = make(config, "gkd, data")
    theirs = prepare_sft(rows(), trainer.processing_class)
    for ours, row in zip(trainer.train_dataset, theirs):
        assert ours["prompt_ids"] + ours["completion_ids"] == row["input_ids"]
        assert [-100] * len(ours["prompt_ids"]) + ours["completion_ids"] == row["labels"]


def test_options_of_the_chat_template_reach_both_sides(config):
    template = "{% if loud %}<|system|>{% endif %}" + pocket.tokenizer().chat_template
    tokenizer = pocket.tokenizer()
    tokenizer.chat_template = template
    data = Dataset.from_list([{"prompt": CHAT[1:2], "completion": CHAT[2:3]}] * 8)
    plain, loud = (train(config, "gkd, data", dataset=data, tokenizer=tokenizer, chat_template_kwargs=options)
                   for options in (None, {"loud": True}))
    assert loud.generation.prompt_ids[0] == tokenizer("<|system|>")["input_ids"] + plain.generation.prompt_ids[0]


def test_long_rows_lose_the_beginning_of_their_prompt_and_are_counted(config, heard):
    kinds = [("abc", "d")] * 4 + [("abcdefgh", "ij")] * 3 + [("a", "bcdefghijk")]
    data = Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in kinds])
    trainer = make(config, "gkd, data", dataset=data, max_length=8)
    decode = trainer.processing_class.decode
    assert [decode(row["prompt_ids"]) for row in trainer.train_dataset] == ["abc"] * 4 + ["defgh"] * 3
    assert "3 of 7 rows of the train dataset fill max_length=8" in heard.text
    assert "1 of 8 rows of the train dataset have no token to train on" in heard.text
    whole = make(config, "gkd, data", dataset=data, max_length=None)
    assert len(whole.train_dataset) == 8


def test_streams(config):
    stream = rows().to_iterable_dataset()
    chats = Dataset.from_list([{"messages": CHAT}] * 8)
    pair = [train(config, "gkd, data", dataset=data, shuffle_dataset=False, max_length=20) for data in (
        chats, chats.to_iterable_dataset())]
    assert torch.equal(*map(weights, pair))
    evaluated = [make(config, eval_dataset=data).evaluate()["eval_loss"]
                 for data in (rows(12), rows(12).to_iterable_dataset())]
    assert evaluated[0] == evaluated[1]
    a = train(config, max_steps=4, dataset=stream)
    b = train(config, max_steps=4, dataset=rows(), shuffle_dataset=False)
    assert torch.equal(weights(a), weights(b))
    with pytest.raises(ValueError, match="a stream has no end"): make(config, "gkd, kept", dataset=stream)


def test_ones_own_rollouts_and_what_they_do_not_count(config):
    def rollout(prompts, trainer):
        ids = trainer.processing_class(prompts)["input_ids"]
        return {"prompt_ids": ids, "completion_ids": [[5, 6, 7, 1]] * len(ids), "logprobs": None,
                "env_mask": [[1, 0, 0, 1]] * len(ids)}
    seen = Seen()
    trainer = train(config, "distillation", rollout_func=rollout, callbacks=[seen])
    batch, tokens = seen.tokens[0]
    assert batch["mask"].tolist() == [[1, 0, 0, 1]] * 8 and (tokens["divergence"][:, 1:3] == 0).all()
    assert abs(tokens["divergence"].sum().item() / 16 - logs(trainer)[0]["loss"]) < 1e-5


# ---------------------------------------------------------------- the teacher
def test_a_path_and_its_options(config, tmp_path):
    folder = str(tmp_path / "teacher")
    teacher().save_pretrained(folder)
    by_object = train(config, "gkd, own")
    for given, options in ((folder, {}), (tmp_path / "teacher", {}), (None, dict(teacher_model_name_or_path=folder)),
                           (folder, dict(teacher_model_name_or_path=folder)),
                           (folder, dict(teacher_model_init_kwargs={"dtype": "float32"}))):
        by_path = train(config, "gkd, own", teacher_model=given, **options)
        assert torch.equal(weights(by_path), weights(by_object))
        assert not any(p.requires_grad for p in by_path.teacher_model.parameters())
    half = make(config, teacher_model=folder, teacher_model_init_kwargs='{"dtype": "bfloat16"}')
    assert half.teacher_model.dtype == torch.bfloat16 and half.model.dtype == torch.float32
    half.train()


def test_a_teacher_with_an_adapter(config, tmp_path):
    torch.manual_seed(0)
    adapted = get_peft_model(teacher(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    merged = copy.deepcopy(adapted).merge_and_unload()
    one, other = (train(config, "gkd, data", teacher_model=model) for model in (adapted, merged))
    plain = train(config, "gkd, data")
    assert (weights(one) - weights(other)).norm() < 1e-4 * (weights(one) - weights(plain)).norm()
    adapted.save_pretrained(tmp_path / "adapter")
    teacher().save_pretrained(tmp_path / "base")
    text = (tmp_path / "adapter" / "adapter_config.json").read_text()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(
        {**json.loads(text), "base_model_name_or_path": str(tmp_path / "base")}))
    by_path = train(config, "gkd, data", teacher_model=str(tmp_path / "adapter"))
    assert (weights(by_path) - weights(other)).norm() < 1e-4 * (weights(one) - weights(plain)).norm()
    with_sampling = train(config, "gkd, teacher", teacher_model=get_peft_model(teacher(), LoraConfig(
        r=4, target_modules=["q_proj"])))
    assert logs(with_sampling)


def test_a_student_with_an_adapter(config):
    trainer = train(config, peft_config=LoraConfig(r=4, target_modules=["q_proj"]), learning_rate=1.0, max_steps=2)
    tiny.only_the_adapter_learned(trainer.model, student())


@pytest.mark.parametrize("options", [dict(bf16=True), dict(cast_lm_head_to_fp32=True), dict(activation_offloading=True),
                                     dict(bf16=True, cast_lm_head_to_fp32=True), dict(gradient_checkpointing=True)],
                         ids=str)
@pytest.mark.parametrize("name", ["gkd, kept", "distillation"])
def test_in_other_precisions_and_with_less_memory(name, options, config):
    found, plain = train(config, name, **options), train(config, name)
    near = .05 if "bf16" in options else 1e-5
    assert abs(logs(found)[0]["loss"] - logs(plain)[0]["loss"]) < near * logs(plain)[0]["loss"]


def test_a_teacher_in_its_own_widths_and_layout(config):
    "One that must be padded beside a student that need not be, and the other way round."
    plain = train(config, "gkd, data")
    for where in ("teacher", "student"):
        trainer = make(config, "gkd, data")
        model = trainer.teacher_model if where == "teacher" else trainer.model
        model._posttrain_head.masked_rows = False
        trainer.train()
        assert (weights(trainer) - weights(plain)).abs().max() < 1e-5


def test_a_teacher_with_more_padding_in_its_vocabulary(config, tmp_path):
    "As of Qwen2.5, where large models have 152,064 rows and small ones 151,936 for the same tokenizer."
    model, folder = teacher(), str(tmp_path / "teacher")
    known = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(known + 25, mean_resizing=False)
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=f"{known} token ids, the teacher for {known + 25}, and there is no tokenizer"):
        make(config, "gkd, data", teacher_model=folder)
    pocket.tokenizer().save_pretrained(folder)
    for name in ("gkd, data", "gkd, kept"):
        wide, plain = train(config, name, teacher_model=folder), train(config, name)
        assert (weights(wide) - weights(plain)).abs().max() < 1e-6
    with pytest.raises(ValueError, match=re.escape(f"resize_token_embeddings({known - 3})")):
        narrow = teacher()
        narrow.resize_token_embeddings(known - 3)
        make(config, teacher_model=narrow)


def test_a_teacher_of_another_tokenizer_is_refused_by_name(config, tmp_path):
    folder, other = str(tmp_path / "teacher"), tiny.tokenizer()
    pocket.model(vocab_size=len(other)).save_pretrained(folder)
    other.save_pretrained(folder)
    words = "read the same token ids.*student.s tokenizer, '.*that of the teacher, '" + re.escape(folder)
    with pytest.raises(ValueError, match=words):
        make(config, model="./a/student/that/is/never/loaded", teacher_model=folder)
    loaded = type(teacher()).from_pretrained(folder)  # which knows where it comes from
    with pytest.raises(ValueError, match="read the same token ids"): make(config, teacher_model=loaded)


def test_renamed_special_tokens_are_told(config, tmp_path):
    folder, tokenizer = str(tmp_path / "teacher"), pocket.tokenizer()
    teacher().save_pretrained(folder)
    text = tokenizer.backend_tokenizer.to_str().replace("<|system|>", "<|other|>")
    renamed = type(tokenizer)(tokenizer_object=type(tokenizer.backend_tokenizer).from_str(text),
                              eos_token=tokenizer.eos_token, pad_token=tokenizer.pad_token)
    renamed.save_pretrained(folder)
    with pytest.warns(UserWarning, match="special token '<|system|>'"): make(config, teacher_model=folder)


def test_a_teacher_that_is_asked_otherwise(config):
    data = rows().map(lambda row: {"teacher_prompt": f"{row['completion']} {row['prompt']}"})
    for name in ("gkd, data", "gkd, kept", "distillation"):
        trainer, before = make(config, name, dataset=data, eval_dataset=data.select(range(6))), student()
        trainer.train()
        total, other, generation, how = 0, teacher(), trainer.generation, trainer.args
        temperature = how.loss_temperature or how.temperature
        for row, prompt, answer in zip(generation.rows, generation.prompt_ids, generation.completion_ids):
            asked = trainer.processing_class(row["teacher_prompt"])["input_ids"]
            mine, theirs = (m(torch.tensor([ids + answer])).logits[0, len(ids) - 1:-1] / temperature
                            for m, ids in ((before, prompt), (other, asked)))
            total += generalized_jsd(mine, theirs, how.beta).sum().item()
        assert abs(total / generation.token_count() - logs(trainer)[0]["loss"]) < 1e-5
        assert trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(TypeError, match="what the teacher is asked"):
        make(config, dataset=rows().map(lambda row: {"teacher_prompt": 3}))


# ---------------------------------------------------------------- stopping, and several processes
@pytest.mark.parametrize("name", ["gkd", "gkd, kept", "gkd, teacher", "distillation"])
def test_resumed_in_the_middle_of_a_generation(name, config, tmp_path):
    settings = dict(num_iterations=2, steps_per_generation=2, per_device_train_batch_size=4, max_steps=9,
                    learning_rate=1e-3, optim="adamw_torch", save_strategy="steps", save_steps=3)
    whole = train(config, name, **settings)
    resumed = train(config, name, resume=str(tmp_path / "checkpoint-3"), **settings)
    assert torch.equal(weights(whole), weights(resumed)) and whole.stream.state.drawn == resumed.stream.state.drawn
    assert [row["loss"] for row in logs(whole)] == [row["loss"] for row in logs(resumed)]


SCRIPT = LEAVE + """
import io, os, sys, torch
torch.set_num_threads(1)
from posttrain import pocket
from posttrain.distillation.distillation_trainer import DistillationConfig, DistillationTrainer
from posttrain.distillation.gkd_trainer import GKDConfig, GKDTrainer
from posttrain.training.progress import Progress
def run(folder, name, size, accumulated, options):
    rows = pocket.dataset("reverse", "prompt_completion", n=50)
    trainer, config = (GKDTrainer, GKDConfig) if name == "GKD" else (DistillationTrainer, DistillationConfig)
    args = config(folder, use_cpu=True, ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None, optim="sgd",
                  lr_scheduler_type="constant", max_grad_norm=1e9, max_steps=3, per_device_train_batch_size=size,
                  gradient_accumulation_steps=accumulated, max_completion_length=8, per_device_eval_batch_size=4,
                  logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, learning_rate=.1, **options)
    trainer = trainer(pocket.model(seed=3, hidden_size=32), pocket.start("reverse")[0], args, train_dataset=rows,
                      eval_dataset=rows.select(range(11)), processing_class=pocket.tokenizer(),
                      callbacks=[Progress(stream=io.StringIO())])
    trainer.train()
    return {"weights": torch.cat([p.detach().flatten() for p in trainer.model.parameters()]),
            "log": [r for r in trainer.state.log_history if "loss" in r], "eval": trainer.evaluate(),
            "processes": trainer.accelerator.num_processes}
"""
SETTINGS = [("GKD", {}), ("GKD", dict(lmbda=0, precompute_teacher=True)), ("GKD", dict(lmbda=0, seq_kd=True)),
            ("Distillation", {})]


@pytest.mark.distributed
def test_two_processes_are_one(tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT + f"""
out = [run(sys.argv[1], name, *cut, options) for name, options in {SETTINGS!r} for cut in ((2, 4), (8, 1))]
import torch.distributed as dist
if dist.get_rank() == 0: torch.save(out, sys.argv[1] + "/out.pt")
leave(dist.barrier)
""")
    launch(2, str(tmp_path / "run.py"), str(tmp_path))
    together, scope = torch.load(tmp_path / "out.pt"), {}
    exec(SCRIPT, scope)
    for i, (name, options) in enumerate(SETTINGS):
        alone = scope["run"](str(tmp_path), name, 16, 1, options)
        for other in together[2 * i:2 * i + 2]:
            assert other["processes"] == 2
            assert (alone["weights"] - other["weights"]).abs().max() <= 1e-5, (name, options)
            pairs = [*zip(alone["log"], other["log"], strict=True), (alone["eval"], other["eval"])]
            for a, b in pairs:
                assert a.keys() == b.keys()
                for key in set(a) - {"step", "epoch"}:
                    if "time" in key or "per_second" in key: continue
                    assert abs(a[key] - b[key]) <= 1e-4 * max(1, abs(a[key])), (name, options, key, a[key], b[key])


# ---------------------------------------------------------------- evaluation and logs
def test_evaluation_is_on_the_datasets_answers_where_there_are_some(config):
    both = {"data": rows(12), "prompts": rows(12).remove_columns("completion")}
    trainer = make(config, "gkd, own", eval_dataset=both, per_device_eval_batch_size=5)
    answers = trainer.demonstrated(list(trainer.eval_dataset["data"]))
    expected = mean_divergence(trainer.model, teacher(), answers, .9, .9)
    found = trainer.evaluate()
    assert abs(found["eval_data_loss"] - expected.item()) < 1e-5
    assert "eval_data_completions/mean_length" not in found and "eval_prompts_completions/mean_length" in found
    assert trainer.evaluate()["eval_prompts_loss"] == found["eval_prompts_loss"]  # the same seeds
    raw = trainer.evaluate(rows(12))
    assert abs(raw["eval_loss"] - expected.item()) < 1e-5
    trainer.train()  # and training samples again afterwards
    assert logs(trainer)[0]["on_policy"] == 1


def test_kept_states_serve_evaluation_and_leave_no_file(config, tmp_path):
    kept, plain = (make(config, name, eval_dataset=rows(12), per_device_eval_batch_size=5, beta=.5)
                   for name in ("gkd, kept", "gkd, data"))
    assert not list(tmp_path.glob("teacher-states*"))
    asked = []
    kept.teacher_model.register_forward_hook(lambda *args: asked.append(1))
    assert abs(kept.evaluate()["eval_loss"] - plain.evaluate()["eval_loss"]) < 1e-6
    kept.train()
    assert not asked  # the body was not asked again
    assert abs(kept.evaluate(rows(7))["eval_loss"] - mean_divergence(
        kept.model, teacher(), kept.demonstrated(make(config, "gkd, data", dataset=rows(7)).train_dataset.to_list()),
        .5)) < 1e-5 and asked


def test_completions_can_be_looked_at(config, tmp_path):
    import pyarrow.parquet as pq
    train(config, max_steps=4, log_completions=True)
    files = sorted((tmp_path / "completions").iterdir())
    assert len(files) == 4 and pq.read_table(files[0]).num_rows == 8


def test_names_that_scripts_read(config):
    trainer = make(config)
    assert (trainer.lmbda, trainer.beta, trainer.temperature, trainer.seq_kd) == (.5, .5, .9, False)
    assert trainer.teacher_model.config.hidden_size == 64 and trainer.ref_model is None
    card = trainer.method()
    assert card.name == "GKD" and card.values["lmbda"] == .5
    assert make(config, "distillation").method().name == "on-policy distillation"
    trainer.train()
    assert trainer.generate(list(rows(3)), [0, 1, 2]).completions  # whatever was learned from last


# ---------------------------------------------------------------- bad input
WRONG = [(dict(lmbda=1.5), ValueError, "lmbda=1.5 .* at least 0 and at most 1"),
         (dict(lmbda="half"), TypeError, "lmbda of GKDConfig must be a number"),
         (dict(beta=2), ValueError, "beta=2 .* at most 1"), (dict(beta=float("nan")), ValueError, "beta=nan"),
         (dict(temperature=0), ValueError, "temperature=0 .* above 0"),
         (dict(loss_temperature=0), ValueError, "loss_temperature=0"),
         (dict(num_generations=4), ValueError, "num_generations=4"),
         (dict(max_new_tokens=0), ValueError, "max_new_tokens=0"),
         (dict(max_new_tokens=5, max_completion_length=6), ValueError, "one thing by two names"),
         (dict(precompute_teacher=True), ValueError, "set lmbda=0 and seq_kd=False"),
         (dict(dynamic_sampling=True), ValueError, "no rewards"), (dict(packing=True), ValueError, "packing=True"),
         (dict(assistant_only_loss=True), ValueError, "the last turn"), (dict(loss_type="dft"), ValueError, "'nll'"),
         (dict(teacher_model_init_kwargs="{"), ValueError, "is no JSON"),
         (dict(teacher_model_init_kwargs="[1]"), TypeError, "teacher_model_init_kwargs"),
         (dict(teacher_model_init_kwargs={"dtype": "float99"}), ValueError, "teacher_model_init_kwargs: dtype=.flo"),
         (dict(estimator="top"), ValueError, "estimator='top' .*'top_k'"),
         (dict(estimator_k=0), ValueError, "estimator_k=0"),
         (dict(teacher="x"), TypeError, "no field 'teacher'. Did you mean"),
         (dict(lambda_=.5), TypeError, "no field 'lambda_'. Did you mean 'lmbda'")]


@pytest.mark.parametrize("options, kind, words", WRONG, ids=str)
def test_bad_fields_are_named(options, kind, words, tmp_path):
    with pytest.raises(kind, match=words): GKDConfig(str(tmp_path), use_cpu=True, report_to="none", **options)


def judge(): return Qwen3ForSequenceClassification(pocket.config(num_labels=1))


def masked():
    return BertForMaskedLM(BertConfig(vocab_size=len(pocket.tokenizer()), hidden_size=8, num_hidden_layers=1,
                                      num_attention_heads=1, intermediate_size=8))


NOBODY = "./nobody/loads/this"  # the student: what is wrong with the teacher and the data is said before
TEACHERS = [(lambda: None, {}, ValueError, "GKDTrainer needs a teacher: pass teacher_model"),
            (lambda: "", {}, ValueError, "needs a teacher"), (lambda: 3, {}, TypeError, "got int"),
            (lambda: {"model": 1}, {}, TypeError, "got dict"),
            (lambda: GKDConfig("x", use_cpu=True), {}, TypeError, "the config is the third parameter"),
            (lambda: "./there/is/none", {}, FileNotFoundError, "teacher_model './there/is/none': there is no such"),
            (judge, {}, TypeError, "no head over the vocabulary"),
            (masked, {}, TypeError, "must be a causal LM, got a BertForMaskedLM"),
            (lambda: __file__, {}, FileNotFoundError, "is a file: expected the folder"),
            (lambda: torch.nn.Linear(2, 2), {}, TypeError, "must be a causal LM, got a Linear"),
            (teacher, dict(teacher_model_name_or_path="/tmp"), ValueError, "both given"),
            (teacher, dict(teacher_model_init_kwargs={"dtype": "float32"}), ValueError, "already made"),
            (teacher, dict(teacher_model_revision="main"), ValueError, "already made")]


@pytest.mark.parametrize("make_teacher, options, kind, words", TEACHERS, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_teachers_are_named_before_anything_is_loaded(make_teacher, options, kind, words, config):
    with pytest.raises(kind, match=words): make(config, model=NOBODY, teacher_model=make_teacher(), **options)


def test_the_student_is_no_teacher(config):
    model = teacher()
    with pytest.raises(ValueError, match="same object: a teacher that is trained along"):
        make(config, model=model, teacher_model=model)
    other = teacher()
    other.model.layers[0] = model.model.layers[0]
    with pytest.raises(ValueError, match="shares weights"): make(config, model=model, teacher_model=other)
    folder = str(config()["output_dir"])
    model.save_pretrained(folder)
    pocket.tokenizer().save_pretrained(folder)
    assert make(config, model=folder, teacher_model=folder)  # two copies are two models


DATA = [([{"prompt": "a"}], {}, ValueError, "lmbda=1 or seq_kd=True prompts are enough.*'completion' is missing"),
        ([{"text": "a"}], {}, ValueError, "'prompt' and 'completion' are missing"),
        ([{"prompt": "a", "answer": "b"}], {}, ValueError, "rename_column"),
        ([{"prompt": "a", "completion": 3}], {}, TypeError, "column 'completion', row 0"),
        ([{"prompt": None, "completion": "b"}], {}, TypeError, "column 'prompt', row 0"),
        ([{"messages": CHAT}, {"messages": CHAT[:2]}], {}, ValueError, "row 1: the last message is written by 'user'"),
        ([{"messages": CHAT[2:3]}], {}, ValueError, "row 0: there is no message before"),
        ([{"messages": []}], {}, (TypeError, ValueError), "messages"),
        ([{"messages": CHAT}, {"messages": None}], {}, TypeError, "column 'messages', row 1"),
        ([{"messages": None}, {"messages": CHAT}], {}, TypeError, "column 'messages', row 0"),
        ([{"messages": json.dumps(CHAT)}], {}, TypeError, "column 'messages', row 0.*json.loads"),
        ([{"conversations": CHAT}, {"conversations": None}], {}, TypeError, "column 'conversations', row 1"),
        ([{"text": "a"}], {}, ValueError, "reads chats in 'messages'"),
        ([{"text": "a"}], dict(lmbda=1), ValueError, "reads chats in 'messages'"),
        ([{"prompt": "", "completion": "b"}], dict(lmbda=0), ValueError, "row 0: the prompt is empty"),
        ([{"prompt": "", "completion": "b"}], {}, ValueError, "row 0: the prompt is empty"),
        ([{"prompt": "a", "completion": "b" * 30}], dict(max_length=8), ValueError,
         "no row of the train dataset has a token left")]


@pytest.mark.parametrize("bad, options, kind, words", DATA, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_rows_are_named_before_a_model_is_loaded(bad, options, kind, words, config):
    with pytest.raises(kind, match=words): make(config, model=NOBODY, dataset=Dataset.from_list(bad), **options)


def test_parameters_that_do_nothing_here_are_refused(config):
    for name in ("data_collator", "compute_metrics", "preprocess_logits_for_metrics", "formatting_func"):
        with pytest.raises(ValueError, match=f"{name} is not supported by GKDTrainer"):
            GKDTrainer(NOBODY, teacher(), GKDConfig(config()["output_dir"], use_cpu=True), train_dataset=rows(),
                       **{name: len})
    with pytest.raises(ValueError, match="tools is not supported"):
        DistillationTrainer(NOBODY, teacher(), DistillationConfig(config()["output_dir"], use_cpu=True), rows(),
                            tools=[len])
    with pytest.raises(TypeError, match="args must be a GKDConfig, TrainingArguments or None, got dict"):
        GKDTrainer(NOBODY, teacher(), {"lmbda": 1}, train_dataset=rows())


def test_seq_kd_that_is_never_reached_is_told(tmp_path):
    with pytest.warns(UserWarning, match="changes nothing with lmbda=1"):
        GKDConfig(str(tmp_path), use_cpu=True, lmbda=1, seq_kd=True)


# ---------------------------------------------------------------- learning
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_small_student_learns_from_its_own_answers(seed, tmp_path):
    "From random weights, with less than a quarter of the teacher's, to at least nine tenths of its accuracy."
    (master, tokenizer), model = pocket.start("reverse", steps=400), student(seed + 10, num_hidden_layers=2,
                                                                               intermediate_size=96)
    test = pocket.dataset("reverse", "prompt_only", n=300, seed=2, split="test")
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, master)]
    args = DistillationConfig(str(tmp_path), max_steps=600, per_device_train_batch_size=64, max_completion_length=12,
                              beta=.5, learning_rate=3e-3, lr_scheduler_type="constant_with_warmup", warmup_steps=20,
                              logging_steps=50, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
                              seed=seed)
    trainer = DistillationTrainer(model, master, args, pocket.dataset("reverse", "prompt_only", n=8000, seed=1),
                                  processing_class=tokenizer)
    before, best = (pocket.accuracy(m, tokenizer, test) for m in (model, master))
    trainer.train()
    after, seconds = pocket.accuracy(trainer.model, tokenizer, test), trainer.state.log_history[-1]["train_runtime"]
    print(f"seed {seed}: {before:.2f} -> {after:.2f}, the teacher {best:.2f}, {seconds:.0f} s")
    assert before == 0 and best > .95 and sizes[0] <= sizes[1] / 4 and after >= .9 * best and seconds < 60


# ---------------------------------------------------------------- found by attack
def test_an_empty_teacher_prompt_is_refused(config):
    "The teacher's state before the first token is then that of another row of the batch."
    data = rows(8).map(lambda row: {"teacher_prompt": ""})
    with pytest.raises((ValueError, TypeError), match="teacher_prompt"): train(config, "gkd, data", dataset=data)


def test_a_bad_teacher_prompt_is_named_by_its_column(config):
    "The message names 'prompt', and its filter keeps the bad row."
    data = rows(8).add_column("teacher_prompt", ["a"] * 7 + [None])
    with pytest.raises(TypeError, match=r"column 'teacher_prompt'.*row\['teacher_prompt'\]"):
        make(config, model=NOBODY, dataset=data)


def test_with_seq_kd_the_teacher_writes_what_it_is_asked(config):
    "And the student learns to write the same to its own prompt."
    data = rows(8).map(lambda row: {"teacher_prompt": "reverse 47810="})
    trainer = train(config, "gkd, teacher", dataset=data, temperature=.1)
    generation = trainer.generation
    assert "01874" in generation.completions
    assert trainer.processing_class.batch_decode(generation.prompt_ids) == [row["prompt"] for row in generation.rows]


def test_a_teacher_with_more_padding_writes_no_padding(config, tmp_path):
    model, folder = teacher(), str(tmp_path / "teacher")
    known = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(known + 25, mean_resizing=False)
    weight = model.get_output_embeddings().weight.data
    weight[known:] = 3 * weight[:25]
    model.save_pretrained(folder)
    pocket.tokenizer().save_pretrained(folder)
    for sampler in ("own", "transformers"):
        trainer = train(config, "gkd, teacher", teacher_model=folder, sampler=sampler)
        assert max(map(max, trainer.generation.completion_ids)) < known


def test_a_reward_model_by_its_path_is_no_teacher(config, tmp_path):
    "As an object it is refused; by its path it gets a random head, and is learned from."
    judge().save_pretrained(tmp_path / "judge")
    with pytest.raises(TypeError, match="teacher_model must be a causal LM"):
        make(config, model=NOBODY, teacher_model=str(tmp_path / "judge"))


def test_no_room_is_asked_for_answers_that_nobody_writes(config):
    "lmbda=0 samples nothing: the rows fit."
    make(config, "gkd, data", model=student(max_position_embeddings=64), max_completion_length=128)


def gpt2(positions):
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(pocket.tokenizer()), n_embd=32, n_layer=1, n_head=4,
                                      n_positions=positions, bos_token_id=0, eos_token_id=1))


@pytest.mark.parametrize("name", ["gkd, data", "gkd, own", "gkd, teacher", "gkd, kept"])
def test_a_teacher_that_is_too_short_is_named(name, config):
    data = Dataset.from_list([{"prompt": "abc", "completion": "d"}] * 8 + [{"prompt": "abc", "completion": "defghij"}])
    most = 3 + 8  # with the end of the answer
    assert train(config, name, teacher_model=gpt2(most), dataset=data, max_completion_length=8)
    words = f"row {8 if 'data' in name or 'kept' in name else 0}: .* 3 tokens .* 8, but the teacher has {most - 1} "
    with pytest.raises(ValueError, match=words):
        make(config, name, teacher_model=gpt2(most - 1), dataset=data, max_completion_length=8)
    asked = data.map(lambda row: {"teacher_prompt": "abcd"})
    with pytest.raises(ValueError, match=f"the teacher is asked: row .* 4 tokens .* teacher has {most} positions"):
        make(config, name, teacher_model=gpt2(most), dataset=asked, max_completion_length=8)


def test_a_demonstration_that_is_too_long_for_the_student_is_named(config):
    "By its row in the dataset, also where rows before it were dropped."
    kinds = [("a", "b" * 40), ("abc", "d"), ("abc", "d" * 20)]
    data = Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in kinds])
    words = "train dataset: row 2: the prompt has 3 tokens .* 21, but the model has 16 positions"
    with pytest.raises(ValueError, match=words):
        make(config, "gkd, data", model=gpt2(16), dataset=data, max_length=30, teacher_model=gpt2(64))


def test_the_student_is_asked_the_whole_prompt(config):
    data = Dataset.from_list([{"prompt": "abcdefgh", "completion": "ij"}] * 8)
    seen = Seen()
    trainer = train(config, dataset=data, max_length=8, max_steps=4, callbacks=[seen])
    decode = trainer.processing_class.decode
    prompts = [(source, decode(generation.prompt_ids[0])) for source, generation in seen.generations]
    assert prompts == [("student", "abcdefgh") if own else ("dataset", "defgh") for own in COINS]


def test_answers_that_are_not_read_may_be_anything(config):
    for completions in ([None] * 8, [3] * 8):
        data = rows(8).remove_columns("completion").add_column("completion", completions)
        assert train(config, "distillation", dataset=data)
        assert train(config, "gkd, teacher", dataset=data)


def test_a_teacher_that_reads_the_students_prompt_says_so(tmp_path):
    from posttrain.distillation.minillm_trainer import MiniLLMConfig, MiniLLMTrainer
    data = rows(8).map(lambda row: {"teacher_prompt": "a"})
    with pytest.raises(ValueError, match="column 'teacher_prompt', but the teacher of MiniLLMTrainer"):
        MiniLLMTrainer(NOBODY, teacher(), None, MiniLLMConfig(str(tmp_path), use_cpu=True, report_to="none"), data,
                       processing_class=pocket.tokenizer())


@pytest.mark.parametrize("kind, options, words", [
    ("t5", {}, "a T5"), ("bert", {}, "a Bert"), ("nothing", {}, "teacher_model .*config.json"),
    ("a-hub-id/that-is-none", {}, "teacher_model 'a-hub-id"), ("gpt", {"load_in_4bit": True}, "quantization_config"),
    ("gpt", {"hidden_sizes": 3}, "teacher_model_init_kwargs")])
def test_other_models_at_a_path_are_no_teachers(kind, options, words, config, tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration
    small = dict(vocab_size=len(pocket.tokenizer()))
    folder = tmp_path / "other"
    folder.mkdir()
    if kind == "t5":
        T5ForConditionalGeneration(T5Config(**small, d_model=8, num_layers=1, d_ff=8)).save_pretrained(folder)
    if kind == "bert": masked().save_pretrained(folder)
    if kind == "gpt": gpt2(16).save_pretrained(folder)
    with pytest.raises((TypeError, OSError, ValueError), match=words):
        make(config, model=student() if "hidden_sizes" in options else NOBODY, teacher_model_init_kwargs=options,
             teacher_model=kind if "/" in kind else str(folder))


def test_a_dataset_in_the_place_of_the_collator_is_told(config):
    with pytest.raises(ValueError, match="data_collator is not .* train_dataset="):
        GKDTrainer(NOBODY, teacher(), GKDConfig(config()["output_dir"], use_cpu=True), rows())


def test_chats_that_end_with_a_question_are_prompts_where_no_answer_is_read(config):
    "lmbda=1 reads no answer of the dataset. An evaluation reads those that are there."
    questions, whole = (Dataset.from_list([{"messages": chat}] * 8) for chat in (CHAT[:2], CHAT))
    trainer = train(config, "distillation", dataset=questions, eval_dataset={"questions": questions, "whole": whole})
    found = trainer.evaluate()
    assert "eval_questions_completions/mean_length" in found and "eval_whole_completions/mean_length" not in found
    assert "eval_whole_loss" in found


def test_half_a_generation_on_kept_states_goes_on_without_them(config, tmp_path):
    how = dict(max_steps=6, steps_per_generation=4, num_iterations=2, per_device_train_batch_size=4)
    train(config, "gkd, kept", save_strategy="steps", save_steps=3, **how)
    assert train(config, "gkd, data", resume=str(tmp_path / "checkpoint-3"), **how)


def test_half_a_generation_on_kept_states_does_not_read_those_of_other_rows(config, tmp_path):
    how = dict(max_steps=6, steps_per_generation=4, num_iterations=2, per_device_train_batch_size=4)
    train(config, "gkd, kept", save_strategy="steps", save_steps=3, **how)
    losses = [[row["loss"] for row in logs(train(config, name, dataset=rows().select(range(49, -1, -1)),
                                                 resume=str(tmp_path / "checkpoint-3"), beta=.5, **how))]
              for name in ("gkd, kept", "gkd, data")]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-5
