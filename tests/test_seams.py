"""What all trainers promise at their seams: a reference computes as the policy does, reward functions get copies, a
checkpoint folder may not be there yet."""
import pytest
import torch
from peft import LoraConfig

from posttrain import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, pocket
from posttrain.rollout.generation import Generation
from posttrain.rollout.rewards import exact_match_reward
from posttrain.rollout.stream import StreamState, informative_groups
from posttrain.training.metrics import policy_metrics
from test_grpo import logs, noisy, rows, weights


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
