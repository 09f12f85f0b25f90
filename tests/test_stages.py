"""The stages of a generation at their edges: small rounds, a selection, checkpoints of a run with other settings."""
import pytest
import torch

from posttrain import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer, pocket
from posttrain.foundations.layouts import make_batch
from posttrain.training.heads import PolicyAndValue, attach_head, read
from posttrain.training.states import logps
from test_grpo import logs, noisy, rows, weights


def make(config, trainer=RLOOTrainer, rewards=noisy, **options):
    given = dict(per_device_train_batch_size=16, num_generations=4, max_completion_length=8, max_steps=1, optim="sgd",
                 learning_rate=.1, max_grad_norm=1e9, lr_scheduler_type="constant")
    args = config(**{**given, **options})
    args.pop("train_sampling_strategy")
    kind = RLOOConfig if issubclass(trainer, RLOOTrainer) else GRPOConfig
    return trainer(pocket.start("reverse")[0], rewards, kind(**args), rows(), rows(6), pocket.tokenizer())


def train(config, resume=None, **options):
    trainer = make(config, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def alike(completions, **columns): return [1.0] * len(completions)


@pytest.mark.parametrize("trainer", [RLOOTrainer, GRPOTrainer])
def test_small_rounds_fill_the_step_too(trainer, config):
    "One prompt a round and two rounds, for a step of four groups: more rounds are asked, and the step has its groups."
    with pytest.warns(UserWarning, match="after 4 rounds and 4 prompts only 0 of 4 groups"):
        dead = train(config, trainer=trainer, rewards=alike, dynamic_sampling=True, dynamic_sampling_prompts=1,
                     dynamic_sampling_rounds=2)
    assert len(dead.generation) == 16 and len({id(row) for row in dead.generation.rows}) == 4


def test_rewards_that_differ_beyond_the_clip_only_do_not_differ(config):
    def high(completions, **columns): return [10 + reward for reward in noisy(completions)]
    options = dict(rewards=high, dynamic_sampling=True, dynamic_sampling_rounds=2)
    assert train(config, **options).generation.columns["advantages"].any()
    with pytest.warns(UserWarning, match="only 0 of 4 groups"):
        clipped = train(config, reward_clip_range=[0.0, 1.0], beta=0.0, **options)
    assert not clipped.generation.columns["advantages"].any()


class FirstTwo(RLOOTrainer):
    "Learns from the first two of each four completions."
    def select(self, generation):
        chosen = super().select(generation).pick([i for i in range(len(generation)) if i % 4 < 2])
        chosen.num_generations = 2
        return chosen


def test_a_selection_is_cut_anew(config):
    whole, halves = train(config, trainer=FirstTwo), train(config, trainer=FirstTwo, per_device_train_batch_size=4,
                                                           gradient_accumulation_steps=4)
    assert len(whole.generation) == len(halves.generation) == 8
    moved = (weights(whole) - weights(pocket.start("reverse")[0])).norm()
    assert (weights(whole) - weights(halves)).norm() <= 2e-5 * moved and moved > 1e-3
    assert 0 < whole.evaluate()["eval_reward"] < 1
    with pytest.raises(ValueError, match="8 completions learn, which are no whole number of the 16"):
        train(config, trainer=FirstTwo, per_device_train_batch_size=1, gradient_accumulation_steps=16)


SAVED = dict(num_iterations=2, steps_per_generation=2, per_device_train_batch_size=8, max_steps=6, save_steps=3,
             save_strategy="steps", learning_rate=1e-3)


def test_resumed_with_fewer_iterations_it_samples_anew(config, tmp_path):
    train(config, **SAVED)
    resumed = train(config, resume=str(tmp_path / "checkpoint-3"), **{**SAVED, "num_iterations": 1, "max_steps": 9})
    # two generations before the stop; of the six steps after it each pair has its own
    assert resumed.stream.state.sampled == 16 * (1 + 3)


def test_resumed_with_a_reference_where_there_was_none(config, tmp_path):
    train(config, beta=0.0, **SAVED)
    resumed = train(config, resume=str(tmp_path / "checkpoint-3"), beta=.1, **SAVED)
    assert all("kl" in row for row in logs(resumed)[-3:])


class Counts(SFTTrainer):
    "Remembers nothing before its first step."
    steps = None

    def run_state(self): return {} if self.steps is None else {"steps": self.steps}

    def load_run_state(self, state): self.steps = state["steps"]

    def loss(self, *args):
        self.steps = (self.steps or 0) + 1
        return super().loss(*args)


def test_a_state_that_begins_empty_is_loaded(tmp_path):
    def run(resume=None):
        args = SFTConfig(str(tmp_path), max_steps=4, save_steps=2, per_device_train_batch_size=4, use_cpu=True,
                         report_to="none", disable_tqdm=True)
        data = pocket.dataset("reverse", "prompt_completion", n=20)
        trainer = Counts(pocket.model(), args=args, train_dataset=data, processing_class=pocket.tokenizer())
        trainer.train(resume_from_checkpoint=resume)
        return trainer.steps
    assert run() == run(str(tmp_path / "checkpoint-2")) == 4


REFUSED = [(dict(dynamic_sampling="false"), TypeError, "dynamic_sampling of RLOOConfig must be True or False, got 'f"),
           (dict(normalize_advantages="no"), TypeError, "normalize_advantages .* True or False"),
           (dict(dynamic_sampling=True, num_generations=1, advantage_estimator="reinforce_plus_plus"), ValueError,
            "dynamic_sampling=True with num_generations=1"),
           (dict(normalize_advantages=True, advantage_estimator="reinforce_plus_plus"), ValueError, "is RLOO's"),
           *[(dict(reward_clip_range=limits), ValueError, "least and the greatest reward")
             for limits in (5, "ab", ["0", "1"], {0, 1}, [None, 1.0], [True, 2])]]


@pytest.mark.parametrize("options, kind, words", REFUSED)
def test_refused(options, kind, words, config):
    with pytest.raises(kind, match=words): RLOOConfig(**{**config(), "per_device_train_batch_size": 16, **options})


def test_values_are_float32_under_autocast():
    model = PolicyAndValue(attach_head(pocket.model()))
    with torch.no_grad(): model.value.bias.fill_(14.0245)
    batch = make_batch([[5, 6]], [[7, 8, 9]], [0])
    with torch.autocast("cpu", dtype=torch.bfloat16): values = read(model, batch, logps())["values"]
    assert values.dtype == torch.float32 and torch.allclose(values, torch.tensor(14.0245))
    assert torch.allclose(read(model.to(torch.bfloat16), batch, logps())["values"], torch.tensor(14.0245), atol=.1)
