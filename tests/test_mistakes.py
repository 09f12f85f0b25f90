"""Mistakes that people make with data, rewards, adapters, checkpoints and evaluations: each is named."""
import shutil

import pandas as pd
import pytest
import torch
from datasets import Dataset, IterableDataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
    Qwen3Model,
    T5Config,
    T5ForSequenceClassification,
)

from posttrain import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    PRMConfig,
    PRMTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
    pocket,
)
from posttrain.command.loading import load_named
from posttrain.data.templates import CHATML
from posttrain.foundations.policy_gradient import policy_gradient_loss
from posttrain.reward.herding import RewardEnsemble
from posttrain.rollout.reward_models import ModelReward
from posttrain.rollout.rewards import get_cosine_scaled_reward
from posttrain.rollout.sampling import Sampling
from posttrain.rollout.score import Rewards

disable_progress_bars()
pytestmark = pytest.mark.usefixtures("heard")


def user(text): return {"role": "user", "content": text}
def assistant(text): return {"role": "assistant", "content": text}
def pairs(n=8): return pocket.dataset("add", "preference", n=n)
def sums(n=8): return pocket.dataset("add", "prompt_completion", n=n)
def lora(**options): return LoraConfig(**{**dict(r=2, target_modules=["q_proj"]), **options})


def of_any_speaker():
    "A tokenizer whose chat template refuses no role."
    tokenizer = pocket.tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


def sft(config, dataset, model=None, arguments=None, eval_dataset=None, **options):
    return SFTTrainer(model or pocket.model(seed=0), SFTConfig(**config(**options)), train_dataset=dataset,
                      eval_dataset=eval_dataset, processing_class=of_any_speaker(), **(arguments or {}))


def dpo(config, dataset):
    return DPOTrainer(pocket.model(seed=0), args=DPOConfig(**config()), train_dataset=dataset,
                      processing_class=pocket.tokenizer())


def grpo(config, dataset, reward=lambda completions, **columns: [0.0] * len(completions), **arguments):
    args = GRPOConfig(**config(num_generations=2, max_completion_length=2))
    return GRPOTrainer(pocket.model(seed=0), reward, args, train_dataset=dataset, processing_class=pocket.tokenizer(),
                       **arguments)


# ---------------------------------------------------------------- rows that teach something else
AS_TEXT = '[{"role": "user", "content": "1+1="}]'
PROMPT = "add 12+13="
ODD = {
    "json prompt": (grpo, {"prompt": AS_TEXT}, "conversation that is written as text"),
    "json text": (sft, {"text": str([user("1+1=")])}, "conversation that is written as text"),
    "json pair": (dpo, {"prompt": "1", "chosen": AS_TEXT, "rejected": "2"}, "conversation that is written as text"),
    "other speaker": (sft, {"messages": [user("1"), {"role": "critic", "content": "2"}, assistant("3")]},
                      "another speaker than 'system'"),
    "no answer": (sft, {"messages": [user("1")]}, "no word of the assistant"),
    "empty answer": (sft, {"messages": [user("1"), assistant(" ")]}, "no word of the assistant"),
    "prompt again": (dpo, {"prompt": PROMPT, "chosen": PROMPT + "25", "rejected": PROMPT + "26"}, "read twice"),
    "messages again": (dpo, {"prompt": [user("1")], "chosen": [user("1"), assistant("2")],
                             "rejected": [user("1"), assistant("3")]}, "read twice"),
    "user answers": (sft, {"prompt": [user("1")], "completion": [user("2")]}, "another speaker than the assistant"),
    "swapped": (dpo, {"prompt": "1", "chosen": "2", "rejected": "3", "score_chosen": 1.0, "score_rejected": 9.0},
                "lower score for the chosen"),
    "mask": (sft, {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}, "'completion_mask' is not read"),
}


@pytest.mark.parametrize("kind", ODD)
def test_rows_that_teach_something_else_are_said(kind, config, heard):
    method, row, words = ODD[kind]
    method(config, Dataset.from_list([row] * 4))
    assert words in heard.text and "row 0" in heard.text or kind == "mask", heard.text


def test_the_line_that_takes_the_prompt_away(config, heard):
    first = ODD["messages again"][1]
    dataset = Dataset.from_list([first, {**first, "chosen": [assistant("2")]}])
    dpo(config, dataset)
    line = heard.text.split("To take it away: dataset = ")[1].split("\n")[0]
    repaired = eval(line, {"dataset": dataset})
    assert [row["chosen"] for row in repaired] == [[assistant("2")]] * 2
    assert [row["rejected"] for row in repaired] == [[assistant("3")]] * 2


def test_roles_in_capitals_and_of_other_libraries_are_read(config, heard):
    row = {"messages": [{"role": "User ", "content": "1"}, {"role": "AI", "content": "2"}]}
    trainer = sft(config, Dataset.from_list([row] * 4))
    plain = sft(config, Dataset.from_list([{"messages": [user("1"), assistant("2")]}] * 4))
    assert trainer.train_dataset[0] == plain.train_dataset[0] and "speaker" not in heard.text


BAD = {
    "half a character": (lambda: IterableDataset.from_generator(lambda: iter([{"text": "a\ud800"}])), "half of a char"),
    "bytes": (lambda: Dataset.from_dict({"text": [b"a"]}), r"\.decode\(\)"),
    "mask": (lambda: Dataset.from_list([{"input_ids": [5, 6], "attention_mask": [1]}]), "row 0 has 2 input_ids"),
    "frame": (lambda: pd.DataFrame({"text": ["a"]}), "Dataset.from_pandas"),
    "columns": (lambda: {"text": ["a"]}, "Dataset.from_dict"),
    "empty": (lambda: Dataset.from_dict({"text": []}), "as its train dataset is empty"),
}


@pytest.mark.parametrize("kind", BAD)
def test_data_that_cannot_be_read(kind, config):
    make, words = BAD[kind]
    with pytest.raises((ValueError, TypeError), match=words): sft(config, make())


def test_log_probs_above_0_are_none(config):
    with pytest.raises(TypeError, match="ref_chosen_logps', row 0: expected .* 0 or below, got 5.0"):
        dpo(config, pairs().map(lambda row: {"ref_chosen_logps": 5.0, "ref_rejected_logps": -1.0}))


def test_a_formatting_func_that_raises_is_named(config):
    with pytest.raises(RuntimeError, match="formatting_func raised KeyError: 'nope', for the row with columns prompt"):
        sft(config, sums(), arguments=dict(formatting_func=lambda row: row["nope"]))


# ---------------------------------------------------------------- rewards and rollouts
def test_rewards_that_cannot_judge():
    with pytest.raises(TypeError, match="from posttrain.rewards import exact_match_reward"):
        Rewards("exact_match_reward")
    with pytest.raises(FileNotFoundError, match="reward model './none': there is no such folder"): Rewards("./none")
    with pytest.raises(TypeError, match="takes no argument by name"): Rewards(lambda *all: [1.0]).check(["prompt"])
    with pytest.raises(TypeError, match=r"call it: get_cosine_scaled_reward\(\.\.\.\)"):
        Rewards(get_cosine_scaled_reward).check(["prompt"])


def test_rollouts_that_cannot_be(config):
    prompts = pocket.dataset("add", "prompt_only", n=4)
    with pytest.raises(TypeError, match=r"called as rollout_func\(prompts, trainer\)"):
        grpo(config, prompts, rollout_func=lambda prompts: {})
    def rollout(logp): return lambda prompts, trainer: {
        "prompt_ids": [[5]] * len(prompts), "completion_ids": [[6]] * len(prompts), "logprobs": [[logp]] * len(prompts)}
    for logp in (2.0, float("-inf")):  # NaN is what an engine does not know
        trainer = grpo(config, prompts, rollout_func=rollout(logp))
        with pytest.raises(ValueError, match="in logprobs of completion 0: expected a log-prob, finite and 0 or below"):
            trainer.train()


def test_completions_without_a_token_are_no_error():
    loss, stats = policy_gradient_loss(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2), torch.zeros(2, 0))
    assert float(loss) == 0 and float(stats["ratio/min"]) == float(stats["ratio/max"]) == 1


@pytest.mark.parametrize("options", [dict(stop=5), dict(stop=[5]), dict(stop_ids=True), dict(stop_ids=["5"])])
def test_stops_of_another_kind(options):
    with pytest.raises(ValueError, match=r"stop(_ids)?=\("): Sampling(**options)
    assert Sampling(stop="a", stop_ids=5).stop_ids == (5,)


@pytest.mark.parametrize("trainer, config_class", [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
@pytest.mark.parametrize("returned, words", [
    (lambda n: [0.0] * (n - 1) + [float("nan")], "reward 'odd' returned nan"),
    (lambda n: [float("inf")] + [0.0] * (n - 1), "reward 'odd' returned inf"),
    (lambda n: [0.0] * (n - 1), "returned 3 values for 4 completions"), (lambda n: None, "reward 'odd' returned None")])
def test_a_reward_that_is_none_touches_no_weight(trainer, config_class, returned, words, config):
    model = pocket.model(seed=0)
    before = [p.clone() for p in model.parameters()]
    def odd(completions): return returned(len(completions))
    args = config_class(**config(num_generations=2, max_completion_length=2))
    run = trainer(model, odd, args, train_dataset=pocket.dataset("add", "prompt_only", n=4),
                  processing_class=pocket.tokenizer())
    with pytest.raises((ValueError, TypeError), match=words): run.train()
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("trainer, config_class", [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_a_reward_model_that_does_not_know_the_tokens(trainer, config_class, config):
    "Alone and among the members of an ensemble. On a GPU the embedding would stop the process."
    small, tokenizer = classifier(vocab_size=20), pocket.tokenizer()
    args = config_class(**config(num_generations=2, max_completion_length=2))
    for reward, tokenizers in ((small, tokenizer), (RewardEnsemble([ModelReward(small, tokenizer)]), None)):
        run = trainer(pocket.model(seed=0), reward, args, train_dataset=pocket.dataset("add", "prompt_only", n=4),
                      processing_class=tokenizer, reward_processing_classes=tokenizers)
        with pytest.raises(RuntimeError, match="vocabulary ends at 19. Give it the tokenizer that it was trained with"):
            run.train()


@pytest.mark.parametrize("returned, words", [
    ([1.0, None], "member 1 of mean_of_2 returned .1.0, None"), ([1.0], r"the shape .1,. for 2 answers"),
    ([1.0, float("nan")], "member 1 of mean_of_2 returned nan for answer 1"), (2.0, "the shape"),
    ("ab", "returned ab")])
def test_a_member_of_an_ensemble_that_gives_no_numbers(returned, words):
    def good(prompts, completions): return [0.0] * len(completions)
    def bad(prompts, completions): return returned
    with pytest.raises((TypeError, ValueError), match=words): RewardEnsemble([good, bad])(["a", "b"], ["c", "d"])


# ---------------------------------------------------------------- reward models and judges of steps
def classifier(labels=1, kind=Qwen3ForSequenceClassification, **options):
    return kind(pocket.config(num_labels=labels, **options))


def tiny_bert(kind, labels):
    return kind(BertConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                           intermediate_size=32, num_labels=labels))


def reward(config, dataset, model=None, arguments=None, **options):
    return RewardTrainer(model or classifier(), args=RewardConfig(**config(**options)), train_dataset=dataset,
                         **{"processing_class": pocket.tokenizer(), **(arguments or {})})


def prm(config, dataset, model=None, arguments=None, **options):
    return PRMTrainer(model or classifier(2, Qwen3ForTokenClassification), args=PRMConfig(**config(**options)),
                      train_dataset=dataset, **{"processing_class": pocket.tokenizer(), **(arguments or {})})


PAIR = dict(prompt="add 1+2=", chosen="3", rejected="4")
STEPS = dict(prompt="add 1+2=", completions=["1+2", "3"], labels=[True, False])
TOKENS = dict(input_ids=[5, 6, 7], labels=[-100, 0, 1])


def rows(of, last=None, **every):
    "Four rows; `last` changes the fourth and `every` all of them."
    made = [{**of, **every} for _ in range(4)]
    made[3] = {**made[3], **(last or {})}
    return Dataset.from_list(made)


def stream(dataset): return IterableDataset.from_generator(lambda: iter(list(dataset)))


REFUSED = {  # kind -> trainer, rows, options, what is said
    "no rejected": (reward, lambda: rows(PAIR).remove_columns("rejected"), {}, "'rejected' is missing"),
    "single answers": (reward, lambda: rows(dict(prompt="a", completion="b", label=True)), {}, "'chosen' and"),
    "number for text": (reward, lambda: rows(PAIR, chosen=3), {}, "train dataset: column 'chosen', row 0: .* got 3"),
    "None for text": (reward, lambda: rows(PAIR, dict(chosen=None)), {}, "column 'chosen', row 3: .* got None"),
    "equal": (reward, lambda: rows(PAIR, rejected="3"), {}, "in all 4 pairs the two answers have the same tokens"),
    "equal stream": (reward, lambda: stream(rows(PAIR, rejected="3")), {}, "first 4 pairs of the stream the two"),
    "margin NaN": (reward, lambda: rows(PAIR, dict(margin=float("nan")), margin=1.0), {}, "row 3: .* got nan"),
    "margin inf": (reward, lambda: rows(PAIR, dict(margin=float("inf")), margin=1.0), {}, "row 3: .* got inf"),
    "margin None": (reward, lambda: rows(PAIR, dict(margin=None), margin=1.0), {}, "'margin', row 3: .* got None"),
    "margin of words": (reward, lambda: rows(PAIR, margin="better"), {},
                        "'margin', row 0: .* got 'better'"),
    "margin a list": (reward, lambda: rows(PAIR, margin=[1.0]), {}, "'margin', row 0: .*finite number"),
    "margin True": (reward, lambda: rows(PAIR, margin=True), {}, "'margin', row 0: .*finite number"),
    "margin NaN in a stream": (reward, lambda: stream(rows(PAIR, margin=float("nan"))), {}, "'margin', row 0: .* nan"),
    "splits": (reward, lambda: {"train": rows(PAIR)}, {}, r"dataset\['train'\]"),
    "a list": (reward, lambda: [PAIR], {}, "Dataset.from_list"),
    "empty": (reward, lambda: rows(PAIR).select([]), {}, "as its train dataset is empty"),
    "too long": (reward, lambda: rows(PAIR), dict(max_length=2), "Set max_length=10 or more"),
    "too long in a stream": (reward, lambda: stream(rows(PAIR)), dict(max_length=2), "Set max_length=10 or more"),
    "image": (reward, lambda: rows(PAIR, images=["a"]), {}, "'images', but only text"),
    "no completion": (reward, lambda: rows(dict(prompt_ids=[5], chosen_ids=[], rejected_ids=[6])), {}, "no row"),
    "ids of floats": (reward, lambda: rows(dict(prompt_ids=[5.0], chosen_ids=[7.0], rejected_ids=[6.0])), {},
                      "'prompt_ids', row 0: expected a list of token ids"),
    "no labels": (prm, lambda: rows(STEPS).remove_columns("labels"), {}, "'labels' in the train dataset, but 'labels'"),
    "no steps": (prm, lambda: rows(STEPS).remove_columns("completions"), {}, "'completions' is missing"),
    "a text for steps": (prm, lambda: rows(STEPS, completions="ab"), {}, "'completions', row 0: .* got 'ab'"),
    "messages for steps": (prm, lambda: rows(STEPS, completions=[[user("a")]] * 2), {}, "row 0: .*strings"),
    "a label more": (prm, lambda: rows(STEPS, dict(labels=[True] * 3)), {}, "row 3 has 2 completions but 3 labels"),
    "a label less in a stream": (prm, lambda: stream(rows(STEPS, dict(labels=[True]))), {}, "row 3 has 2 completions"),
    "labels of words": (prm, lambda: rows(STEPS, labels=["yes", "no"]), {}, "'labels', row 0: .*True or False"),
    "labels of shares": (prm, lambda: rows(STEPS, labels=[.5, 1.0]), {}, r"'labels', row 0: .* got \[0.5"),
    "labels 2": (prm, lambda: rows(STEPS, labels=[2, 1]), {}, r"'labels', row 0: .* got \[2, 1\]"),
    "labels None": (prm, lambda: rows(STEPS, dict(labels=None)), {}, "'labels', row 3: .* got None"),
    "one label None": (prm, lambda: rows(STEPS, dict(labels=[None, True])), {}, r"'labels', row 3: .* got \[None"),
    "one label for all": (prm, lambda: rows(STEPS, labels=True), {}, "'labels', row 0: .* got True"),
    "step None": (prm, lambda: rows(STEPS, dict(completions=[None, "3"])), {}, "'completions', row 3: .* got .None"),
    "prompt None": (prm, lambda: rows(STEPS, dict(prompt=None)), {}, "'prompt', row 3: .* got None"),
    "no step at all": (prm, lambda: rows(STEPS, completions=[], labels=[]), {}, "no row of the train dataset"),
    "steps too long": (prm, lambda: rows(STEPS), dict(max_length=4), "set max_length to at least 12"),
    "steps cut": (prm, lambda: rows(STEPS), dict(max_completion_length=1), "max_completion_length to at least 4"),
    "separator of nothing": (prm, lambda: rows(STEPS), dict(step_separator=""), "step_separator='' is no token"),
    "unknown separator": (prm, lambda: rows(STEPS), dict(step_separator="中"), "is not in the vocabulary"),
    "image beside steps": (prm, lambda: rows(STEPS, images=["a"]), {}, "'images', but only text"),
    "splits of steps": (prm, lambda: {"train": rows(STEPS)}, {}, r"dataset\['train'\]"),
    "verdict 5 of a token": (prm, lambda: rows(TOKENS, dict(labels=[-100, 5, 1])), {}, "'labels', row 3: .* got 5"),
    "tokens as labels": (prm, lambda: rows(TOKENS, labels=[5, 6, 7]), {}, "'labels', row 0: .* got 5"),
    "True for -100": (prm, lambda: rows(TOKENS, labels=[True, False, True]), {}, "dataset.map makes True of -100"),
    "a label less of tokens": (prm, lambda: rows(TOKENS, dict(labels=[0, 1])), {}, "3 input_ids but 2 labels"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_rows_that_no_judge_can_learn(kind, config):
    method, data, options, words = REFUSED[kind]
    with pytest.raises((ValueError, TypeError), match=words): method(config, data(), **options)


@pytest.mark.parametrize("kind", ["margin NaN", "None for text", "labels 2", "no labels"])
def test_rows_of_an_evaluation_are_named_as_such(kind, config):
    method, data, options, words = REFUSED[kind]
    good = rows(PAIR if method is reward else STEPS)
    with pytest.raises((ValueError, TypeError), match=words.replace("train", "eval").split(":")[0]) as error:
        method(config, good, arguments=dict(eval_dataset=data()), **options)
    assert "eval dataset" in str(error.value)


SAID = {  # kind -> trainer, rows, what is said, rows that are left
    "some equal": (reward, lambda: rows(PAIR, dict(rejected="3")), "1 of 4 pairs have the same tokens", 3),
    "empty answer": (reward, lambda: rows(PAIR, dict(chosen="")), "an empty answer", 4),
    "empty prompt": (reward, lambda: rows(PAIR, dict(prompt="")), "have no prompt: it is empty", 4),
    "no prompt": (prm, lambda: rows(STEPS, dict(prompt="")), "have no prompt: it is empty", 4),
    "empty step": (prm, lambda: rows(STEPS, dict(completions=["", "3"])), "a step without a word", 4),
    "no steps": (prm, lambda: rows(STEPS, dict(completions=[], labels=[])), "1 of 4 rows of the train dataset", 3),
    "one verdict": (prm, lambda: rows(STEPS, labels=[True, True]), "all steps of the first 4 rows are True", 4),
    "question": (prm, lambda: rows(STEPS, question="why?"), "'question' may belong to what is asked", 4),
}


@pytest.mark.parametrize("kind", SAID)
def test_rows_that_teach_a_judge_something_else_are_said(kind, config, heard):
    method, data, words, left = SAID[kind]
    run = method(config, data())
    assert words in heard.text and len(run.train_dataset) == left
    run.train()


def test_good_rows_say_nothing(config, heard):
    for method, of in ((reward, PAIR), (prm, STEPS), (prm, TOKENS)): method(config, rows(of)).train()
    assert not [record for record in heard.records if record.name.startswith("posttrain")]


MODELS = {  # kind -> trainer, model, what is said
    "two labels": (reward, lambda: classifier(2), "got a Qwen3ForSequenceClassification with num_labels=2"),
    "causal LM": (reward, lambda: pocket.model(seed=0), "num_labels=1, got a Qwen3ForCausalLM"),
    "of tokens": (reward, lambda: classifier(1, Qwen3ForTokenClassification), "got a Qwen3ForTokenClassification"),
    "no head": (reward, lambda: Qwen3Model(pocket.config()), "got a Qwen3Model"),
    "BERT": (reward, lambda: tiny_bert(BertForSequenceClassification, 1), "also looks at what comes after it"),
    "T5": (reward, lambda: T5ForSequenceClassification(T5Config(
        vocab_size=300, d_model=32, num_layers=1, num_heads=2, d_kv=16, d_ff=32, num_labels=1, pad_token_id=0,
        decoder_start_token_id=0)), "T5ForSequenceClassification is no decoder-only"),
    "one verdict": (prm, lambda: classifier(1, Qwen3ForTokenClassification), "num_labels=2, got .* num_labels=1"),
    "causal LM for steps": (prm, lambda: pocket.model(seed=0), "num_labels=2, got a Qwen3ForCausalLM"),
    "of texts": (prm, lambda: classifier(2), "got a Qwen3ForSequenceClassification"),
    "no head for steps": (prm, lambda: Qwen3Model(pocket.config()), "got a Qwen3Model"),
    "BERT for steps": (prm, lambda: tiny_bert(BertForTokenClassification, 2), "also looks at what comes after it"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_models_that_judge_something_else(kind, config):
    method, model, words = MODELS[kind]
    with pytest.raises((ValueError, TypeError), match=words):
        method(config, rows(PAIR if method is reward else STEPS), model())


@pytest.mark.parametrize("method, of, kind, labels", [(reward, PAIR, Qwen3ForSequenceClassification, 1),
                                                      (prm, STEPS, Qwen3ForTokenClassification, 2)])
def test_a_vocabulary_that_was_not_made_larger(method, of, kind, labels, config):
    model = classifier(labels, kind, vocab_size=20)
    before = [p.clone() for p in model.parameters()]
    run = method(config, rows(of), model)
    with pytest.raises(ValueError, match="vocabulary ends at 19: .* model.resize_token_embeddings"): run.train()
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("method, of", [(reward, PAIR), (prm, STEPS)])
def test_tokenizers_of_judges(method, of, config):
    without_end, without_pad = pocket.tokenizer(), pocket.tokenizer()
    without_end.eos_token, without_pad.pad_token = None, None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        method(config, rows(of), arguments=dict(processing_class=without_end))
    run = method(config, rows(of), arguments=dict(processing_class=without_pad))
    run.train()
    assert run.processing_class.pad_token == run.processing_class.eos_token


@pytest.mark.parametrize("method, of", [(reward, PAIR), (prm, STEPS)])
@pytest.mark.parametrize("task, learns", [(None, False), ("CAUSAL_LM", True), ("SEQ_CLS", True), ("TOKEN_CLS", True)])
def test_an_adapter_beside_the_layer_of_the_labels(method, of, task, learns, config, recwarn):
    run = method(config, rows(of), arguments=dict(peft_config=lora(task_type=task)))
    assert any("'score' does not learn" in str(w.message) for w in recwarn) != learns
    assert any(p.requires_grad and "score" in name for name, p in run.model.named_parameters()) == learns
    run.train()


@pytest.mark.parametrize("method, of, field, words", [
    (reward, PAIR, dict(center_rewards_coefficient="a"), "must be a number or None, got 'a'"),
    (reward, PAIR, dict(center_rewards_coefficient=float("nan")), "at least 0 and finite"),
    (reward, PAIR, dict(truncation_mode="keep_left"), "Did you mean 'keep_end'"),
    (reward, PAIR, dict(beta=.1), "no field 'beta'"), (prm, STEPS, dict(beta=.1), "no field 'beta'"),
    (prm, STEPS, dict(max_completion_length=0), "at least 1"), (prm, STEPS, dict(step_separator=3), "must be text")])
def test_fields_of_judges(method, of, field, words, config):
    with pytest.raises((ValueError, TypeError), match=words): method(config, rows(of), **field)


def test_metrics_of_judges(config):
    "Rewards of both answers, and verdicts where there are some."
    seen = []
    def keep(predictions):
        seen.append((predictions.predictions.shape, predictions.label_ids.tolist()))
        return {"own": 1.0}
    for method, of in ((reward, PAIR), (prm, STEPS)):
        run = method(config, rows(of), arguments=dict(eval_dataset=rows(of), compute_metrics=keep))
        assert run.evaluate()["eval_own"] == 1
    (shape, labels), ((batch, tokens, two), verdicts) = seen
    assert shape == (4, 2) and labels == [0] * 4 and (batch, two) == (4, 2)
    assert [[v for v in row if v != -100] for row in verdicts] == [[1, 0]] * 4 and len(verdicts[0]) == tokens


@pytest.mark.parametrize("first, then", [("SFT", "Reward"), ("PRM", "Reward"), ("Reward", "PRM"), ("Reward", "SFT")])
def test_a_run_of_another_method_does_not_go_on(first, then, config, tmp_path):
    methods = {"SFT": (sft, sums()), "Reward": (reward, rows(PAIR)), "PRM": (prm, rows(STEPS))}
    def run(name):
        method, data = methods[name]
        return method(config, data, save_strategy="steps", save_steps=1, max_steps=1)
    run(first).train()
    with pytest.raises(ValueError, match=f"was saved by {first}Trainer, and this is {then}Trainer"):
        run(then).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


# ---------------------------------------------------------------- models, adapters, optimizers
def test_names_of_modules_that_are_not_there(config):
    with pytest.warns(UserWarning, match="modules_to_save names 'lm_haed', .* Did you mean 'lm_head'"):
        sft(config, sums(), arguments=dict(peft_config=lora(modules_to_save=["lm_haed"])))
    with pytest.warns(UserWarning, match="target_modules names 'v_prok'"):
        sft(config, sums(), arguments=dict(peft_config=lora(target_modules=["q_proj", "v_prok"])))


def test_models_that_cannot_be_trained(config, tmp_path):
    classifier = AutoModelForSequenceClassification.from_config(pocket.model(seed=0).config)
    with pytest.raises(TypeError, match="needs a causal LM, got a Qwen3ForSequenceClassification"):
        sft(config, sums(), classifier)
    get_peft_model(pocket.model(seed=0), lora()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="base_model_name_or_path is None"):
        SFTTrainer(str(tmp_path / "adapter"), SFTConfig(**config()), train_dataset=sums(),
                   processing_class=pocket.tokenizer())
    pocket.model(seed=0).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="no tokenizer that can read a text"):
        SFTTrainer(str(tmp_path / "bare"), SFTConfig(**config()), train_dataset=sums())
    weights = tmp_path / "bare" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OSError, match="bare' could not be loaded: SafetensorError"):
        SFTTrainer(str(tmp_path / "bare"), SFTConfig(**config()), train_dataset=sums(),
                   processing_class=pocket.tokenizer())


def test_an_optimizer_of_another_model(config):
    other = torch.optim.SGD(pocket.model(seed=0).parameters(), 1e-3)
    with pytest.raises(ValueError, match="no weight of the model that learns"):
        sft(config, sums(), arguments=dict(optimizers=(other, None)))


def test_a_run_without_a_step_is_said(config):
    trainer = sft(config, sums(3), per_device_train_batch_size=8, dataloader_drop_last=True)
    with pytest.warns(UserWarning, match="not a single step: the train dataset has 3 rows, and a step takes 8"):
        trainer.train()


# ---------------------------------------------------------------- going on
@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of a whole model that was saved at step 2, once for all tests; they work on copies."""
    folder = tmp_path_factory.mktemp("whole")
    args = SFTConfig(str(folder), max_steps=2, save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True,
                     per_device_train_batch_size=4)
    SFTTrainer(pocket.model(seed=0), args, train_dataset=sums(), processing_class=pocket.tokenizer()).train()
    return folder


@pytest.fixture
def saved(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    return tmp_path


def going_on(config, resume, dataset=None, **options):
    trainer = sft(config, sums() if dataset is None else dataset, max_steps=3, **options)
    trainer.train(resume_from_checkpoint=resume)


def test_a_run_goes_on_with_what_it_began_with(config, saved):
    checkpoint = str(saved / "checkpoint-2")
    with pytest.raises(ValueError, match="is the folder of a run .* did you mean .*checkpoint-2"):
        going_on(config, str(saved))
    for optim in ("sgd", "adafactor"):
        with pytest.raises(ValueError, match=f"does not fit the optimizer of this run, optim='{optim}'"):
            going_on(config, checkpoint, optim=optim)
    with pytest.raises(ValueError, match="checkpoint of a whole model, and the model of this run has an adapter"):
        going_on(config, checkpoint, arguments=dict(peft_config=lora()))
    with pytest.warns(UserWarning, match="train dataset of 8 rows, and this one has 12"):
        going_on(config, checkpoint, sums(12))
    with pytest.warns(UserWarning, match="learning rate of .* goes on, 2e-05, and not that of this run, 0.5"):
        going_on(config, checkpoint, learning_rate=.5)


def test_a_folder_in_the_place_of_a_file(config, saved):
    (saved / "checkpoint-3" / "model.safetensors").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match="model.safetensors is a folder"):
        going_on(config, str(saved / "checkpoint-2"), save_strategy="steps", save_steps=3)


@pytest.mark.parametrize("now, words", [
    (dict(r=4), "r=2 of the adapter, and this run has 4"),
    (dict(target_modules=["v_proj"]), r"target_modules=\['q_proj'\] of the adapter, and this run has \['v_proj'\]"),
    (None, "checkpoint of an adapter, and the model of this run has none")])
def test_an_adapter_goes_on_as_itself(now, words, config, tmp_path):
    sft(config, sums(), arguments=dict(peft_config=lora()), save_strategy="steps", save_steps=2).train()
    arguments = {} if now is None else dict(peft_config=lora(**now))
    with pytest.raises(ValueError, match=words):
        going_on(config, str(tmp_path / "checkpoint-2"), arguments=arguments)


# ---------------------------------------------------------------- evaluations and settings
def test_evaluations_that_have_no_data(config):
    for names in ({}, {3: sums()}):
        with pytest.raises(ValueError, match="eval_dataset must be a dataset or a dict"):
            sft(config, sums(), eval_dataset=names)
    with pytest.raises(ValueError, match="as its b dataset is empty"):
        sft(config, sums(), eval_dataset={"a": sums(), "b": sums().select([])})
    trainer = sft(config, sums(), eval_dataset={"a": sums()})
    with pytest.raises(ValueError, match="nothing of this name; it has 'a'"): trainer.evaluate("b")
    with pytest.raises(ValueError, match="got a dict of nothing"): trainer.evaluate({})


def test_metrics_must_be_numbers_by_names(config):
    trainer = sft(config, sums(), eval_dataset=sums(), arguments=dict(compute_metrics=lambda predictions: None))
    with pytest.raises(TypeError, match="compute_metrics returned None: expected a dict"): trainer.evaluate()


def test_settings_that_would_be_lost(config, tmp_path):
    with pytest.raises(ValueError, match="output_dir is an empty text"): SFTConfig(**config(output_dir=""))
    with pytest.raises(ValueError, match="holds a variable"): SFTConfig(**config(output_dir="${NOWHERE}/out"))
    with pytest.raises(ValueError, match="load_best_model_at_end=True needs evaluations"):
        SFTConfig(**config(load_best_model_at_end=True))


# ---------------------------------------------------------------- files of data
@pytest.mark.parametrize("text", ["prompt,completion\n1+6=,007\n", "prompt;completion\n1+6=;007\n",
                                  "prompt\tcompletion\n1+6=\t007\n", "\ufeffprompt,completion\n1+6=,007\n"])
def test_a_table_of_text_is_text(text, tmp_path):
    (tmp_path / "rows.csv").write_text(text, encoding="utf-8")
    assert load_named(str(tmp_path / "rows.csv"))["train"][0] == {"prompt": "1+6=", "completion": "007"}


def test_a_mark_at_the_beginning_of_a_file_is_no_error(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8-sig")
    assert load_named(str(tmp_path / "rows.jsonl"))["train"][0] == {"prompt": "a", "completion": "b"}
