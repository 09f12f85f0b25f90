"""What TRL's own tests ask of RewardTrainer (1.16) and PRMTrainer (1.13), asked of ours, on models that are made here.

Each test names those of TRL that it stands for, unless it has their name. These of TRL are not here:
- `compute_accuracy`, a function for `compute_metrics`. The accuracy is logged without it, in training too, and
  tests/test_mistakes.py asks what `compute_metrics` gets.
- `test_tokenize_row_prompt_truncation`: PRMConfig has no `max_prompt_length`; the limits are `max_length` and
  `max_completion_length`.
- `test_pad_to_multiple_of`, `test_different_pad_token_id`: batches hold no padding that a model would read.
- the second case of `test_train_with_pretokenized_data`: `chosen_input_ids` is a name that TRL itself gives up.
- `model_tags`: ours stand in the card that is saved beside the weights (`test_tag_added`)."""
import json

import pytest
import torch
from datasets import Dataset, IterableDatasetDict, disable_progress_bars
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import (
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import posttrain
from posttrain import pocket
from posttrain.data.collate import collate_scored_pairs
from posttrain.data.templates import CHATML
from posttrain.data.tokens import tokenize_steps
from posttrain.foundations.layouts import lay_out
from test_from_trl_answers import CAPITALS, PAIRS, trained, zen
from test_real_shapes import CALL, WEATHER, assistant, user

disable_progress_bars()
METHODS = {"Reward": (Qwen3ForSequenceClassification, 1), "PRM": (Qwen3ForTokenClassification, 2)}
SLOW = ("norm",)  # weights that a few steps hardly move


def rows_of(method, split="train", n=8):
    return zen(PAIRS[1], split, n) if method == "Reward" else pocket.dataset("add", "stepwise_supervision", n=n,
                                                                             split=split, seed=3)


def classifier(method, **options):
    kind, labels = METHODS[method]
    torch.manual_seed(0)
    return kind(pocket.config(num_labels=labels, **options))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    "A causal LM, a mixture of experts and both classifiers in folders, with the tokenizer."
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    mixture = Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=len(pocket.tokenizer()), hidden_size=32, intermediate_size=32, moe_intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4,
        num_experts_per_tok=2, pad_token_id=0, eos_token_id=1, bos_token_id=None))
    models = {"causal": pocket.model(seed=0), "mixture": mixture, **{m: classifier(m) for m in METHODS}}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        pocket.tokenizer().save_pretrained(folder / name)
    return {name: str(folder / name) for name in models}


@pytest.fixture
def make(paths, config):
    def of(method, arguments=None, **options):
        given = dict(model=paths["causal"], train_dataset=rows_of(method))
        settings = dict(learning_rate=.01, max_steps=3, per_device_train_batch_size=2)
        args = getattr(posttrain, f"{method}Config")(**config(**{**settings, **options}))
        return getattr(posttrain, f"{method}Trainer")(args=args, **{**given, **(arguments or {})})
    return of


# ---------------------------------------------------------------- batches and rows
def test_basic_padding():
    "And test_single_example, test_collate_with_margin: which tokens a model reads, and where the score stands."
    rows = [{"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4], "margin": .1},
            {"prompt_ids": [6], "chosen_ids": [7], "rejected_ids": [8, 9, 5], "margin": .2}]
    for some in (rows, rows[:1]):
        batch = collate_scored_pairs(some, pad_token_id=0)
        read = lay_out(batch, "padded")
        whole = [row["prompt_ids"] + row[side] for row in some for side in ("chosen_ids", "rejected_ids")]
        for ids, expected in zip(read.input_ids, whole, strict=True): assert ids[:len(expected)].tolist() == expected
        scored = batch["completion_ids"][batch["mask"] > 0].tolist()
        assert scored == [ids[-1] for ids in whole] and batch["mask"].sum(1).tolist() == [1] * len(whole)
        torch.testing.assert_close(batch["margin"], torch.tensor([row["margin"] for row in some]))


ROW = dict(prompt="9.8 or 9.11?", completions=["11 > 8.", "9.11 > 9.8."], labels=[True, False])
CUTS = {"test_tokenize_row_no_truncation": dict(), "test_tokenize_row_train_on_last_step_only": dict(
            train_on_last_step_only=True), "test_tokenize_row_completion_truncation": dict(max_completion_length=9),
        "test_tokenize_row_multi_token_separator": dict(step_separator="\n\n")}


@pytest.mark.parametrize("name", CUTS)
def test_tokenize_row(name):
    options, tokenizer = CUTS[name], pocket.tokenizer()
    def ids(text): return tokenizer(text, add_special_tokens=False)["input_ids"]
    separator = ids(options.get("step_separator", "\n"))
    prompt, steps = ids(ROW["prompt"]), [ids(step) + separator for step in ROW["completions"]]
    labels = [[-100] * (len(step) - 1) + [int(right)] for step, right in zip(steps, ROW["labels"])]
    if "train_on_last_step_only" in options: labels[0][-1] = -100
    end = options.get("max_completion_length")
    found = tokenize_steps({name: [value] for name, value in ROW.items()}, tokenizer, **options)
    assert found == {"input_ids": [prompt + sum(steps, [])[:end]],
                     "labels": [[-100] * len(prompt) + sum(labels, [])[:end]]}
    assert len(separator) == 1 + name.endswith("separator")


def test_tokenize_row_prompt_completion_truncation(make):
    whole = make("PRM").train_dataset
    end = 1 + max(row["labels"].index(next(v for v in row["labels"] if v != -100)) for row in whole)
    cut = make("PRM", max_length=end).train_dataset
    for a, b in zip(whole, cut, strict=True):
        assert a["input_ids"][:end] == b["input_ids"] and a["labels"][:end] == b["labels"]
    assert any(len(a["input_ids"]) > end for a in whole)


# ---------------------------------------------------------------- training
@pytest.mark.parametrize("model", ["causal", "mixture", "Reward"])
def test_train(model, make, paths):
    "And test_train_from_sequence_classification_model."
    trained(make("Reward", dict(model=paths[model]), max_steps=6), but=SLOW)


@pytest.mark.parametrize("last_only", [True, False])
def test_train_full(last_only, make, paths):
    trained(make("PRM", dict(model=paths["PRM"]), train_on_last_step_only=last_only), but=SLOW)


@pytest.mark.parametrize("kind", PAIRS)
def test_train_dataset_types(kind, make):
    trained(make("Reward", dict(train_dataset=zen(kind))), but=SLOW)


@pytest.mark.parametrize("method", METHODS)
def test_train_model(method, make):
    trained(make(method, dict(model=classifier(method), processing_class=pocket.tokenizer())), but=SLOW)


@pytest.mark.parametrize("method", METHODS)
def test_train_model_dtype(method, make):
    run = make(method, model_init_kwargs={"dtype": torch.float16}, optim="sgd", learning_rate=.1)
    assert {p.dtype for p in trained(run, but=["norm", "q_proj", "k_proj", "score.bias"]).model.parameters()} == {
        torch.float16}


def test_train_with_margin(make):
    rows = rows_of("Reward").map(lambda row: {"margin": float(len(row["chosen"]))})
    with_margin, without = make("Reward", dict(train_dataset=rows)), make("Reward")
    for run in (with_margin, without): trained(run, but=SLOW)
    first, second = (next(row["loss"] for row in run.state.log_history if "loss" in row)
                     for run in (with_margin, without))
    assert first > second + 1  # a margin of ten or more is far from being kept


def test_train_with_center_rewards_coefficient(make):
    trained(make("Reward", center_rewards_coefficient=.01), but=SLOW)


def test_train_with_pretokenized_data(make):
    "The tokens of prompt and answer in one column: what both begin with is read once, and nothing else changes."
    tokenizer, rows = pocket.tokenizer(), rows_of("Reward")
    def tokens(row):
        return {f"{s}_ids": tokenizer(row[s])["input_ids"] + [tokenizer.eos_token_id] for s in ("chosen", "rejected")}
    logs = []
    for data in (rows, rows.map(tokens, remove_columns=rows.column_names)):
        for given in (data, data.to_iterable_dataset()):
            run = make("Reward", dict(model=classifier("Reward"), processing_class=pocket.tokenizer(),
                                      train_dataset=given))
            trained(run, but=SLOW)
            logs.append([row["loss"] for row in run.state.log_history if "loss" in row])
    for other in logs[1:]: assert other == pytest.approx(logs[0], abs=1e-5)


def test_train_full_pretokenized(make):
    labels = [[-100] * n + [v] + [-100] * 2 + [1 - v] for n, v in ((9, 0), (8, 1), (11, 0), (6, 1))]
    rows = Dataset.from_dict(dict(labels=labels, input_ids=[[5 + i % 7 for i in range(len(row))] for row in labels]))
    given = dict(train_dataset=rows, model=classifier("PRM"), processing_class=pocket.tokenizer())
    trained(make("PRM", given), but=SLOW)


@pytest.mark.parametrize("method", METHODS)
def test_train_with_iterable_dataset(method, make):
    trained(make(method, dict(train_dataset=rows_of(method).to_iterable_dataset())), but=SLOW)


# ---------------------------------------------------------------- adapters and checkpointing
TASK = {"Reward": "SEQ_CLS", "PRM": "TOKEN_CLS"}


@pytest.mark.parametrize("checkpointing", [{}, dict(gradient_checkpointing=True), *(
    dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": use}) for use in (True, False))],
    ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_train_with_peft_config_and_gradient_checkpointing(method, checkpointing, make, paths):
    "And test_train_dense_with_peft_config, ..._reentrant, test_train_lora: the new layer learns, the rest stays."
    config = LoraConfig(task_type=TASK[method], r=8, lora_alpha=32,
                        lora_dropout=.1)
    run = trained(make(method, dict(model=paths[method], peft_config=config), **checkpointing))
    assert {"lora" in n or "modules_to_save" in n for n, p in run.model.named_parameters() if p.requires_grad} == {True}


def test_train_moe_with_peft_config(make, paths):
    config = LoraConfig(target_modules=["q_proj", "score"])
    run = trained(make("Reward", dict(model=paths["mixture"], peft_config=config)))
    assert any("score.lora_A" in n for n, p in run.model.named_parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:the layer 'score' does not learn")
@pytest.mark.parametrize("method", METHODS)
def test_train_peft_model(method, make):
    model = get_peft_model(classifier(method), LoraConfig(target_modules=["q_proj", "v_proj"]))
    trained(make(method, dict(model=model, processing_class=pocket.tokenizer())))


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("method", METHODS)
def test_train_with_gradient_checkpointing(method, reentrant, make):
    "And test_train_with_gradient_checkpointing_reentrant."
    more = {} if reentrant is None else dict(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    trained(make(method, gradient_checkpointing=True, **more), but=SLOW)


# ---------------------------------------------------------------- templates and tools
def test_train_with_chat_template_kwargs(make):
    tokenizer, rows = pocket.tokenizer(), zen(PAIRS[3])
    tokenizer.chat_template = CAPITALS
    rows = rows.add_column("chat_template_kwargs", [{"role_capital": bool(i % 2)} for i in range(len(rows))])
    run = trained(make("Reward", dict(train_dataset=rows, processing_class=tokenizer)), but=SLOW)
    beginnings = [tokenizer.decode(row["prompt_ids"]).startswith("ROLE <|user|>") for row in run.train_dataset]
    assert beginnings == [False, True] * (len(rows) // 2)


def test_train_with_set_chat_template_from_path(make, tmp_path):
    "And ..._from_model: it is taken from a folder's tokenizer. It is saved with the checkpoint."
    tokenizer = pocket.tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "other")
    (tmp_path / "template.jinja").write_text(CHATML)
    for path in ("template.jinja", "other"):
        plain = pocket.tokenizer()
        plain.chat_template = None
        run = make("Reward", dict(train_dataset=zen(PAIRS[2]), processing_class=plain), max_steps=1,
                   chat_template_path=str(tmp_path / path), save_strategy="steps", save_steps=1)
        run.train()
        assert "<|im_start|>user" in run.processing_class.decode(run.train_dataset[0]["prompt_ids"])
        saved = next(tmp_path.glob("checkpoint-1/chat_template.jinja"))
        assert saved.read_text() == CHATML


@pytest.mark.parametrize("as_json", [False, True])
def test_train_toolcall_data(as_json, make):
    "And test_train_toolcall_data_as_json: `tools` as lists of dicts, and as JSON."
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]}
    rows = Dataset.from_list([{"prompt": [user("Weather?")], "tools": json.dumps([WEATHER]) if as_json else [WEATHER],
                               "chosen": [call, {"role": "tool", "content": "3"}, assistant("Cold.")],
                               "rejected": [assistant("No.")]}] * 8)
    run = trained(make("Reward", dict(train_dataset=rows), max_length=512), but=SLOW)
    assert "tools:" in run.processing_class.decode(run.train_dataset[0]["prompt_ids"])


# ---------------------------------------------------------------- evaluations and what is saved
@pytest.mark.parametrize("method", METHODS)
def test_evaluate_with_raw_dataset(method, make):
    run = make(method, max_steps=1)
    run.train()
    assert run.evaluate(rows_of(method, "test"))["eval_loss"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_train_with_eval(method, make):
    run = make(method, dict(eval_dataset=rows_of(method, "test")), eval_strategy="steps", eval_steps=3, max_steps=4,
               logging_steps=10)
    run.train()
    assert run.state.log_history[0]["eval_loss"] > 0


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_train_with_multiple_eval_dataset(method, streaming, make):
    test = rows_of(method, "test")
    parts = {"data1": test, "data2": test}
    if streaming: parts = IterableDatasetDict({name: part.to_iterable_dataset() for name, part in parts.items()})
    run = make(method, dict(eval_dataset=parts), eval_strategy="steps", eval_steps=3)
    run.train()
    assert run.state.log_history[-3]["eval_data1_loss"] == run.state.log_history[-2]["eval_data2_loss"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_train_with_compute_metrics(method, make):
    run = make(method, dict(eval_dataset=rows_of(method, "test"), compute_metrics=lambda p: {"my_metric": .123}),
               eval_strategy="steps", eval_steps=3)
    run.train()
    assert run.state.log_history[-2]["eval_my_metric"] == .123


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_tag_added(method, adapter, make, tmp_path):
    "And test_tag_added_peft, test_tags."
    config = LoraConfig(task_type=TASK[method])
    run = make(method, dict(peft_config=config) if adapter else {}, max_steps=1)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    tags = ModelCard.load(tmp_path / "saved" / "README.md").data.to_dict()["tags"]
    assert {"reward modelling" if method == "Reward" else "process reward modelling", "posttrain"} <= set(tags)
