"""What all trainers promise at their seams: a reference computes as the policy does, reward functions get copies, a
checkpoint folder may not be there yet."""
import random
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    TrainableTokensConfig,
    get_peft_model,
)
from transformers import Qwen3ForCausalLM, TrainerCallback

from posttrain import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
    pocket,
)
from posttrain.foundations import layouts
from posttrain.foundations.layouts import make_batch
from posttrain.rollout.generation import Generation
from posttrain.rollout.rewards import exact_match_reward
from posttrain.rollout.stream import StreamState, informative_groups
from posttrain.training.heads import attach_head, completion_logps, completion_loss
from posttrain.training.metrics import policy_metrics
from test_grpo import logs, make, noisy, rows, train, weights


def adapter(): return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])


REFERENCES = {"copy": {}, "adapter off": dict(peft_config=adapter),
              "own model": dict(ref_model=lambda: pocket.model(0)),
              "moving": dict(sync_ref_model=True, ref_model_sync_steps=1),
              "precomputed": dict(precompute_ref_log_probs=True)}


@pytest.mark.parametrize("name", REFERENCES)
def test_dpo_in_bfloat16_starts_at_log_2(name, config, tmp_path, monkeypatch):
    "Before the first step policy and reference are one model, in mixed precision too: the margin is 0 to the bit."
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))  # nothing from an earlier run
    options = dict(REFERENCES[name])
    made = {key: options.pop(key)() for key in ("peft_config", "ref_model") if key in options}
    args = DPOConfig(**{**config(), "bf16": True, "max_steps": 1, **options})
    trainer = DPOTrainer(pocket.model(0), args=args, train_dataset=pocket.dataset("reverse", "preference", n=8),
                         processing_class=pocket.tokenizer(), **made)
    trainer.train()
    first = logs(trainer)[0]
    assert first["rewards/margins"] == 0 and abs(first["loss"] - 0.6931472) < 1e-6


@pytest.mark.parametrize("options", [{}, dict(dataloader_drop_last=True), dict(gradient_accumulation_steps=2)],
                         ids=["shuffled", "drop the last", "accumulated"])
def test_precomputed_in_bfloat16_is_equal_for_the_whole_first_pass(options, config, tmp_path, monkeypatch):
    "Rows of many lengths in random order: the reference is asked in the batches that training then reads."
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    data = Dataset.from_list([{"prompt": "reverse: " + "abcde"[:1 + i % 5] * (1 + i % 3), "chosen": "edcba"[:1 + i % 5],
                               "rejected": "a" * (1 + i % 7)} for i in range(29)])
    args = {**config(), "bf16": True, "num_train_epochs": 2, "learning_rate": 0.0, "per_device_train_batch_size": 4,
            "precompute_ref_log_probs": True, "logging_steps": 1, **options}
    for name in ("max_steps", "train_sampling_strategy"): args.pop(name, None)
    trainer = DPOTrainer(pocket.model(0), args=DPOConfig(**args), train_dataset=data,
                         processing_class=pocket.tokenizer())
    trainer.train()
    margins = [entry["rewards/margins"] for entry in logs(trainer)]
    first, second = margins[:len(margins) // 2], margins[len(margins) // 2:]
    assert set(first) == {0}
    # other batches round in another way: without this the test above would say nothing
    assert any(second) and max(map(abs, second)) < 5e-3


@pytest.mark.parametrize("trainer_class, config_class", [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
@pytest.mark.parametrize("peft_config", [None, adapter], ids=["copy", "adapter off"])
def test_online_in_bfloat16_starts_without_kl(trainer_class, config_class, peft_config, config):
    "And it is the reference that computes in bfloat16, not the policy in float32."
    args = {**config(), "bf16": True, "beta": .1, "max_steps": 1, "num_generations": 4, "max_completion_length": 8}
    args.pop("train_sampling_strategy")
    trainer = trainer_class(pocket.start("reverse")[0], noisy, config_class(**args), rows(), None, pocket.tokenizer(),
                            peft_config=peft_config and peft_config())
    seen, model = set(), trainer.model if peft_config else trainer.ref_model
    layer = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp.up_proj"))
    layer.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    trainer.train()
    assert logs(trainer)[0]["kl"] == 0 and seen == {torch.bfloat16}


def vandal(prompts, completions, completion_ids, answer, **columns):
    "Changes all that it is given."
    scores = [float(len(ids)) for ids in completion_ids]
    for ids in completion_ids: ids[:] = [5]
    completions[:] = ["0"] * len(completions)
    answer.clear()
    if isinstance(prompts[0], list):
        for messages in prompts: messages[0]["content"] = "spoilt"
    return scores


@pytest.mark.parametrize("chat", [False, True], ids=["text", "messages"])
def test_a_reward_function_changes_nothing_but_its_copies(chat, config):
    def polite(completion_ids, **columns): return [float(len(ids)) for ids in completion_ids]
    data = rows(20)
    if chat:
        data = data.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]})
    ends = []
    for first in (vandal, polite):
        args = {**config(), "num_generations": 4, "max_completion_length": 8, "max_steps": 2, "learning_rate": 1e-3}
        args.pop("train_sampling_strategy")
        second = polite if chat else exact_match_reward
        trainer = GRPOTrainer(pocket.start("reverse")[0], [first, second], GRPOConfig(**args), data, None,
                              pocket.tokenizer())
        trainer.train()
        ends.append((weights(trainer), trainer.generation.rewards, trainer.generation.completions))
        assert len(trainer.train_dataset[0]["answer"]) and "spoilt" not in str(trainer.train_dataset[0])
    assert torch.equal(ends[0][0], ends[1][0]) and torch.equal(ends[0][1], ends[1][1]) and ends[0][2] == ends[1][2]


def test_a_process_may_write_its_state_before_the_folder_is_there(config, tmp_path):
    "The other process makes the folder of a checkpoint; this one may be first."
    args = {**config(), "num_generations": 4, "max_completion_length": 8}
    args.pop("train_sampling_strategy")
    trainer = GRPOTrainer(pocket.start("reverse")[0], noisy, GRPOConfig(**args), rows(), None, pocket.tokenizer())
    trainer.create_optimizer_and_scheduler(2)
    trainer._save_optimizer_and_scheduler(str(tmp_path / "checkpoint-1"))
    assert (tmp_path / "checkpoint-1" / "run-state-0.pt").exists()


def test_rounds_of_dynamic_sampling_count_by_their_size(config):
    "Twelve completions with reward 1 and four with reward 0."
    args = {**config(), "num_generations": 4, "max_completion_length": 8}
    args.pop("train_sampling_strategy")
    values = iter([1.0, 0.0])
    def by_round(completions, **columns): return [next(values)] * len(completions)
    trainer = GRPOTrainer(pocket.start("reverse")[0], by_round, GRPOConfig(**args), rows(), None, pocket.tokenizer())
    trainer.engine.sync(trainer.model)
    for number in (3, 1): trainer.one_round(*trainer.stream.prompts.draw(number))
    assert trainer.metrics["train"].close()["reward"] == .75


@pytest.mark.parametrize("wanted, state, good, asked", [
    (4, StreamState(), [1, 3], [4, 12]), (2, StreamState(asked=4, kept=1), [2], [8]),
    (3, StreamState(asked=5, kept=2), [3], [8])], ids=["second round", "a step later", "rounded up"])
def test_dynamic_sampling_asks_for_as_many_as_it_expects_to_need(wanted, state, good, asked):
    good = iter(good)
    def sample(n): return Generation([{}] * n, [[1]] * n, [[2]] * n, None, [True] * n, ["2"] * n, 1)
    def is_informative(generation):
        number = next(good)
        return torch.arange(len(generation)) < number
    generation, rounds = informative_groups(sample, is_informative, wanted, state, most=100)
    assert rounds.asked == asked and rounds.missing == 0 and len(generation) == wanted
    assert (state.asked, state.kept) == (sum(asked), wanted)


def test_a_ratio_of_whole_completions_counts_each_once():
    mask = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0]])
    stats = {"ratio/mean": torch.tensor(1.5), "clip_ratio/high_mean": torch.tensor(.5), "approx_kl": torch.tensor(2.0)}
    for of_completions, count in ((True, 2), (False, 4)):
        metrics = policy_metrics(stats, mask, of_completions=of_completions)
        assert metrics["ratio/mean"] == (1.5 * count, count) and metrics["clip_ratio/high_mean"] == (.5 * count, count)
        assert metrics["approx_kl"] == (8, 4), "the KL is of tokens"


def test_a_reward_function_cannot_reach_arrays_of_the_dataset(config):
    def writes(completions, array, **columns):
        for values in array: values[:] = 7
        return [0.0] * len(completions)
    seen = []
    def reads(completions, array, **columns):
        seen.extend(values.tolist() for values in array)
        return noisy(completions)
    data = rows(20).map(lambda row: {"array": [1.0, 2.0]})
    data = data.with_format("numpy", columns=["array"], output_all_columns=True)
    trainer = train(config, [writes, reads], data)
    assert seen == [[1.0, 2.0]] * 16
    assert all(isinstance(row["array"], np.ndarray) for row in trainer.generation.rows)
    assert all(row["array"].tolist() == [1.0, 2.0] for row in trainer.generation.rows)


def answers(n, seed=0):
    "What a rollout_func may return for n prompts."
    source = random.Random(seed)
    ids = [[source.randrange(4, 10) for _ in range(source.randrange(1, 8))] for _ in range(n)]
    return {"prompt_ids": [[5, 6]] * n, "completion_ids": ids, "logprobs": None}


def test_a_rollout_func_gets_messages_of_its_own(config):
    "One list for all completions of a prompt would grow with each of them."
    lengths = {"asked": [], "scored": []}
    def rollouts(prompts, trainer):
        for messages in prompts:
            lengths["asked"].append(len(messages))
            messages.append({"role": "assistant", "content": "1"})
            messages[0]["content"] = "spoilt"
        return answers(len(prompts))
    def judge(prompts, completions, **columns):
        lengths["scored"].extend(map(len, prompts))
        assert "spoilt" not in str(prompts)
        return [float(i % 3) for i in range(len(prompts))]
    data = rows(20).map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    trainer = train(config, judge, data, rollout_func=rollouts)
    assert lengths == {"asked": [1] * 16, "scored": [1] * 16} and "spoilt" not in str(trainer.generation.rows)


WRONG_TOKENS = {
    "half a mark": (dict(env_mask=.5), "returned 0.5 in env_mask of completion 1: expected 1 for"),
    "two as a mark": (dict(env_mask=2), "returned 2 in env_mask of completion 1: expected 1 for"),
    "no mark": (dict(env_mask=None), "returned None in env_mask of completion 1: expected 1 for"),
    "no id": (dict(completion_ids=None), "returned None in completion_ids of completion 1: expected a token id"),
    "negative id": (dict(completion_ids=-1), "returned -1 in completion_ids of completion 1: expected a token id"),
    "id beyond the vocabulary": (dict(completion_ids=99999), "returned 99999 in completion_ids of completion 1.*0 to"),
    "id of a prompt": (dict(prompt_ids=1.5), "returned 1.5 in prompt_ids of completion 1: expected a token id"),
    "text": (dict(completion_ids="5"), "returned '5' in completion_ids of completion 1: expected a token id"),
    "text as a log-prob": (dict(logprobs="a"), "returned 'a' in logprobs of completion 1: expected a log-prob"),
}


@pytest.mark.parametrize("wrong, words", WRONG_TOKENS.values(), ids=WRONG_TOKENS)
def test_wrong_tokens_of_a_rollout_func(wrong, words, config):
    def rollouts(prompts, trainer):
        out = answers(len(prompts))
        for name, value in wrong.items():
            right = out["completion_ids"] if name != "prompt_ids" else out["prompt_ids"]
            good = -1 if name == "logprobs" else 1
            of_tokens = out[name] if name.endswith("ids") else [[good] * len(ids) for ids in right]
            out[name] = [of_tokens[0], [value] * len(right[1]), *of_tokens[2:]]
        return out
    with pytest.raises(ValueError, match=words): train(config, rollout_func=rollouts)


WRONG_LISTS = {
    "masks": (lambda n: dict(env_mask=[None] * n), "returned None as env_mask of completion 0: expected a list"),
    "log-probs": (lambda n: dict(logprobs=[None] * n), "returned None as logprobs of completion 0: expected a list"),
    "completions": (lambda n: dict(completion_ids=None), "returned None as completion_ids: expected a list"),
    "empty prompt": (lambda n: dict(prompt_ids=[[5]] * (n - 1) + [[]]), "empty prompt_ids for completion 15"),
    "taken name": (lambda n: dict(prompts=["x"] * n), "column 'prompts'.*return it by another one.*'my_prompts'"),
}


@pytest.mark.parametrize("wrong, words", WRONG_LISTS.values(), ids=WRONG_LISTS)
def test_wrong_lists_of_a_rollout_func(wrong, words, config):
    def rollouts(prompts, trainer): return answers(len(prompts)) | wrong(len(prompts))
    with pytest.raises(ValueError, match=words): train(config, rollout_func=rollouts)


def test_marks_and_tokens_of_any_whole_number_type(config):
    "What was accepted before still is: marks as bools or floats, ids as numbers of NumPy."
    ends = []
    for mark, token in ((int, int), (bool, np.int64), (float, torch.tensor)):
        def rollouts(prompts, trainer):
            out = answers(len(prompts))
            masks = [[mark(i % 2 == 0) for i in range(len(ids))] for ids in out["completion_ids"]]
            return out | {"env_mask": masks, "completion_ids": [[token(x) for x in ids] for ids in
                                                                out["completion_ids"]]}
        def judge(completion_ids, **columns): return [float(len(ids)) for ids in completion_ids]
        ends.append(weights(train(config, judge, rollout_func=rollouts)))
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


def test_a_rollout_func_is_a_function(config):
    with pytest.raises(TypeError, match="rollout_func is 5: expected a function"):
        make(config, model="no such model", rollout_func=5)


def test_rows_of_a_stream_that_lack_a_column(config):
    whole = [{"prompt": row["prompt"], "level": i} for i, row in enumerate(rows(8))]
    del whole[2]["level"]
    def judge(completions, level, **columns): return [0.0] * len(completions)
    data = IterableDataset.from_generator(lambda: iter(whole))
    with pytest.raises(ValueError, match="row 8 of those asked now has no column 'level'.*the same columns in every"):
        train(config, judge, data)


class Vandal(TrainerCallback):
    "Writes into every tensor and list of numbers of a generation."

    def on_generation(self, trainer, generation):
        for values in generation.columns.values(): values.zero_()
        generation.rewards.zero_()
        for ids in generation.completion_ids: ids[:] = [5]
        for logps in generation.sampled_logps: logps[:] = [0.0]


def test_a_callback_cannot_change_what_is_learned(config):
    plain, watched = (train(config, callbacks=callbacks, max_steps=2, learning_rate=.1, num_iterations=2)
                      for callbacks in ([], [Vandal()]))
    assert not watched.generation.rewards.any() and torch.equal(weights(plain), weights(watched))


def kept(folder):
    "The tables of completions, by the names of their files."
    return {path.name: pq.read_table(path).to_pydict() for path in sorted((folder / "completions").iterdir())}


def test_every_generation_of_a_step_is_kept(config, tmp_path):
    train(config, log_completions=True, num_completions_to_print=0, max_steps=2, per_device_train_batch_size=4,
          gradient_accumulation_steps=4, steps_per_generation=1, learning_rate=.1)
    tables = kept(tmp_path)
    assert list(tables) == [f"completions_{step:05d}{suffix}.parquet" for step in (1, 2)
                            for suffix in ("", "_2", "_3", "_4")]
    assert [len(table["step"]) for table in tables.values()] == [4] * 8
    assert [table["step"][0] for table in tables.values()] == [1] * 4 + [2] * 4
    assert len({table["prompt"][0] for table in tables.values()}) == 8, "each has prompts of its own"


def test_a_run_that_goes_on_writes_the_same_files(config, tmp_path):
    options = dict(log_completions=True, num_completions_to_print=0, max_steps=3, per_device_train_batch_size=4,
                   gradient_accumulation_steps=2, steps_per_generation=1, save_strategy="steps", save_steps=1)
    trainer = train(config, **options)
    first = kept(tmp_path)
    for path in (tmp_path / "completions").iterdir():
        if "00001" not in path.name: path.unlink()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert len(first) == 6 and kept(tmp_path) == first


def test_an_extra_column_replaces_none_of_the_tables(config, tmp_path):
    names = ("step", "prompt", "completion", "judge", "advantage", "mine")
    def judge(completions, log_extra, **columns):
        for name in names: log_extra(name, ["x"] * len(completions))
        log_extra("large", [2**70] * len(completions))
        return noisy(completions)
    train(config, judge, log_completions=True, num_completions_to_print=0)
    table, = kept(tmp_path).values()
    assert list(table) == ["step", "prompt", "completion", "extra/step", "extra/prompt", "extra/completion",
                           "extra/judge", "extra/advantage", "mine", "large", "judge", "advantage"]
    assert table["step"] == [1] * 16 and table["extra/step"] == ["x"] * 16 == table["mine"]
    assert table["judge"] == torch.tensor(noisy(table["completion"])).tolist() and table["large"] == [str(2**70)] * 16


@pytest.mark.parametrize("cells", [20000, 1500, 1])
def test_a_batch_in_parts_is_the_batch(cells, monkeypatch):
    "Where one mask would be too large a batch is read in parts: the same answers and gradients."
    model = attach_head(pocket.model(0)).train()
    draw = random.Random(0)
    def ids(n): return [draw.randrange(5, 60) for _ in range(n)]
    batch = make_batch([ids(4), [], ids(30), ids(7), ids(3)], [ids(n) for n in (5, 90, 3, 60, 40, 2, 2, 8)],
                       [0, 1, 2, 2, 2, 3, 3, 4])
    batch["mask"][4, :7] = 0
    def answers():
        model.zero_grad()
        out = completion_logps(model, batch, want=("entropy", "is_top1"))
        loss, stats = completion_loss(model, batch, torch.neg, batch["mask"] / 77, want=("entropy",))
        (out["logps"].sum() / 77 + loss).backward()
        return [*out.values(), loss, *stats.values(), torch.cat([p.grad.flatten() for p in model.parameters()])]
    whole = answers()
    monkeypatch.setattr(layouts, "MASK_CELLS", cells)
    assert len(layouts.lay_out_parts(batch, "auto", 64)) > 1
    for a, b in zip(whole, answers(), strict=True): assert torch.allclose(a.float(), b.float(), atol=1e-5)


def qwen(**options):
    torch.manual_seed(0)
    return Qwen3ForCausalLM(pocket.config(tie_word_embeddings=False, **options))


def test_lora_with_a_bias_on_the_output_layer(config):
    "The bias counts and learns: the log-probs are those of the model's own logits."
    args = SFTConfig(**config(learning_rate=1e-2, max_steps=3))
    trainer = SFTTrainer(qwen(), args, train_dataset=pocket.dataset("reverse", "prompt_completion", n=8),
                         processing_class=pocket.tokenizer(),
                         peft_config=LoraConfig(target_modules=["q_proj", "lm_head"], lora_bias=True))
    trainer.train()
    model, ids = trainer.model.eval(), torch.tensor([[9, 10, 11, 12]])
    bias = model.base_model.model.lm_head.lora_B["default"].bias
    assert bias.abs().max() > 0
    with torch.no_grad():
        bias.normal_()
        own = model(input_ids=ids).logits[0].log_softmax(-1)[[1, 2], ids[0, 2:]]
        ours = completion_logps(model, make_batch([[9, 10]], [[11, 12]]))["logps"][0]
    assert torch.allclose(ours, own, atol=1e-5)


@pytest.mark.parametrize("adapter", [
    IA3Config(target_modules=["q_proj", "lm_head"], feedforward_modules=[]), LoHaConfig(target_modules=["lm_head"]),
    OFTConfig(target_modules=["lm_head"], r=0, oft_block_size=8), LoraConfig(target_modules=["lm_head"], use_dora=True),
    TrainableTokensConfig(target_modules=["lm_head"], token_indices=[5])], ids=lambda config: type(config).__name__)
def test_other_adapters_on_the_output_layer(adapter, config):
    with pytest.raises(TypeError, match="lm_head"):
        SFTTrainer(qwen(), SFTConfig(**config()), train_dataset=pocket.dataset("reverse", "prompt_completion", n=8),
                   processing_class=pocket.tokenizer(), peft_config=adapter)


def frozen_adapter(folder):
    get_peft_model(pocket.model(0), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    return PeftModel.from_pretrained(pocket.model(0), folder)


@pytest.mark.parametrize("kind", ["adapter", "all frozen"])
def test_nothing_to_train(kind, config, tmp_path):
    model = frozen_adapter(tmp_path) if kind == "adapter" else pocket.model(0).requires_grad_(False)
    words = pytest.raises(ValueError, match="no weight that learns.*is_trainable=True")
    with words:
        SFTTrainer(model, SFTConfig(**config()), train_dataset=pocket.dataset("reverse", "prompt_completion", n=8),
                   processing_class=pocket.tokenizer())
    with words:
        DPOTrainer(model, args=DPOConfig(**config()), processing_class=pocket.tokenizer(),
                   train_dataset=pocket.dataset("sort", "preference", n=8))
    with words: make(config, model=model)
    # it can be evaluated
    test = pocket.dataset("reverse", "prompt_completion", n=8)
    evaluated = SFTTrainer(model, SFTConfig(**config()), eval_dataset=test, processing_class=pocket.tokenizer())
    assert evaluated.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value, config):
    model = pocket.model(0)
    with torch.no_grad(): model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(ValueError, match="NaN or infinite weights, in 1 of .*model.layers.1.mlp.up_proj.weight"):
        make(config, model=model)


def test_several_active_adapters_are_no_reference(config):
    model = get_peft_model(pocket.model(0), adapter())
    model.add_adapter("other", adapter())
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="several active adapters, default, other"):
        DPOTrainer(model, args=DPOConfig(**config()), train_dataset=pocket.dataset("sort", "preference", n=8),
                   processing_class=pocket.tokenizer())


@pytest.mark.parametrize("size", [1e-20, 1, 1e20, 1e38])
@pytest.mark.parametrize("options", [dict(), dict(scale_rewards="batch"), dict(scale_rewards="none")], ids=str)
def test_rewards_of_any_size(size, options, config):
    "Scaled to their deviation they teach the same; without scaling they are as large as they are."
    def scaled(completions, **columns): return [size * reward for reward in noisy(completions)]
    large, plain = (train(config, rewards, learning_rate=0.0, **options) for rewards in (scaled, noisy))
    a, b = (trainer.generation.columns["advantages"] for trainer in (large, plain))
    if options.get("scale_rewards") == "none": torch.testing.assert_close(a / size, b, rtol=1e-4, atol=1e-5)
    # the deviation has an epsilon beside it, to which the smallest rewards are nothing
    else: torch.testing.assert_close(a, b if size >= 1 else 0 * b, rtol=5e-3, atol=2e-3)
    assert a.isfinite().all()


def full(*args): raise OSError("No space left on device")


def test_a_full_disk_stops_no_run(config, tmp_path, monkeypatch):
    "The log of completions is lost, and said to be so, once for each trainer."
    monkeypatch.setattr("posttrain.rollout.completions.write_completions", full)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer = train(config, log_completions=True, num_completions_to_print=0, max_steps=2, learning_rate=.1)
        said = [str(w.message) for w in caught if "could not be logged" in str(w.message)]
        assert len(said) == 1 and "No space left" in said[0] and trainer.state.global_step == 2


def test_a_full_disk_stops_no_dashboard(config, tmp_path):
    from posttrain.explore.dashboard import Dashboard
    (tmp_path / "dashboard.jsonl").mkdir()  # cannot be written
    with pytest.warns(UserWarning, match="the dashboard could not be drawn .*the run goes on"):
        trainer = train(config, callbacks=[Dashboard()], max_steps=2, learning_rate=.1)
    assert trainer.state.global_step == 2
