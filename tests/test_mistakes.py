"""Mistakes that people make with data, rewards, adapters, checkpoints and evaluations: each is named."""
import shutil

import pandas as pd
import pytest
import torch
from datasets import Dataset, IterableDataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from posttrain import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer, pocket
from posttrain.command.loading import load_named
from posttrain.data.templates import CHATML
from posttrain.foundations.policy_gradient import policy_gradient_loss
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
