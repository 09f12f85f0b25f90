"""RewardTrainer against TRL 1.16 on the same model, tokenizer and rows, and what it promises beside."""
import copy

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from posttrain import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, pocket
from test_dpo_parity import moved, rows
from tiny import SGD, flat, gradients_of_step

LOGGED = ("loss", "grad_norm", "num_tokens", "accuracy", "margin", "mean_reward", "min_reward", "max_reward")


@pytest.fixture(scope="module")
def trl():
    import trl
    assert trl.__version__ == "1.16.0", "the reference is TRL 1.16.0; install the dev extra with -c constraints.txt"
    return trl


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "The start of the pocket model with a new layer for scores."
    folder = tmp_path_factory.mktemp("start")
    moved(pocket.start("sort")[0], 1, .2).save_pretrained(folder)
    torch.manual_seed(0)
    made = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    made.config.pad_token_id = pocket.tokenizer().pad_token_id
    return made


def make(trainer_class, config_class, model, dataset, options, **more):
    return trainer_class(model=copy.deepcopy(model), args=config_class(**options), train_dataset=dataset,
                         processing_class=pocket.tokenizer(), **more)


def one_step(trainer):
    gradients, row = gradients_of_step(trainer)
    return flat(gradients), row


def with_margins(n=8):
    return rows(n).map(lambda row, i: {"margin": i / 3}, with_indices=True)


CASES = {"plain": (rows, {}), "margins": (with_margins, {}),
         "centred": (rows, dict(center_rewards_coefficient=.05)),
         "margins, centred": (with_margins, dict(center_rewards_coefficient=.05)),
         "too long ones": (lambda: rows(16), dict(max_length=18, per_device_train_batch_size=4)),
         "messages": (lambda: rows(8, conversational=True), {})}


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_loss_gradient_and_metrics_equal_trl(case, trl, model, config):
    data, options = CASES[case]
    options = config(**{"per_device_train_batch_size": 8, **SGD, **options})
    ours, theirs = (one_step(make(*classes, model, data(), options))
                    for classes in ((RewardTrainer, RewardConfig), (trl.RewardTrainer, trl.RewardConfig)))
    difference = (ours[0] - theirs[0]).norm()
    assert theirs[0].norm() > 1e-3 and difference <= 1e-5 * max(1, theirs[0].norm()), difference
    for key in LOGGED:
        assert abs(ours[1][key] - theirs[1][key]) <= 1e-5 * max(1, abs(theirs[1][key])), (key, ours[1], theirs[1])


@pytest.mark.parametrize("options", [{}, dict(center_rewards_coefficient=.05)], ids=str)
def test_one_gradient_however_a_step_is_cut(options, model, config):
    def cut(size):
        options_ = config(**SGD, **options, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size)
        return one_step(make(RewardTrainer, RewardConfig, model, with_margins(), options_))
    whole, logged = cut(8)
    for size in (4, 2, 1):
        gradient, row = cut(size)
        assert (gradient - whole).norm() <= 1e-5 * max(1, whole.norm())
        for key in LOGGED: assert abs(row[key] - logged[key]) <= 1e-4 * max(1, abs(logged[key])), key


def test_a_run_goes_on_where_it_stopped(model, config, tmp_path):
    settings = config(max_steps=6, save_strategy="steps", save_steps=3, learning_rate=1e-3,
                      per_device_train_batch_size=2, gradient_accumulation_steps=2, train_sampling_strategy="random")
    whole, again = (make(RewardTrainer, RewardConfig, model, rows(16), settings) for _ in range(2))
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters()): assert torch.equal(a, b), name


def test_it_learns_to_judge_and_grpo_asks_it(model, config, tmp_path):
    data, test = (pocket.dataset("sort", "preference", n=n, seed=seed) for n, seed in ((1000, 3), (200, 99)))
    settings = config(max_steps=60, per_device_train_batch_size=32, learning_rate=2e-3)
    trainer = make(RewardTrainer, RewardConfig, model, data, settings, eval_dataset=test)
    assert trainer.evaluate()["eval_accuracy"] < .7
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] > .9
    trainer.save_model(str(tmp_path / "judge"))
    args = GRPOConfig(**config(max_steps=1, num_generations=2, per_device_train_batch_size=4, max_completion_length=8))
    policy, tokenizer = pocket.start("sort")
    grpo = GRPOTrainer(model=policy, reward_funcs=str(tmp_path / "judge"), args=args, processing_class=tokenizer,
                       train_dataset=pocket.dataset("sort", "prompt_only", n=8))
    grpo.train()
    assert "rewards/judge/mean" in grpo.state.log_history[0]


@pytest.mark.parametrize("pad", ["own", "end of sequence"])
def test_a_saved_model_scores_as_it_was_trained(pad, model, config, tmp_path):
    "transformers reads a score at the last token that is no padding, whatever that token is."
    tokenizer, data = pocket.tokenizer(), rows(8)
    if pad != "own": tokenizer.pad_token = tokenizer.eos_token
    options = RewardConfig(**config(per_device_train_batch_size=8))
    trainer = RewardTrainer(model=copy.deepcopy(model), args=options, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    from posttrain.training.heads import read
    from posttrain.training.states import scores
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    with torch.no_grad():
        ours = read(trainer.model, batch, scores, at="token")["scores"].sum(1)
        texts = [row["prompt"] + row[side] + tokenizer.eos_token for row in data for side in ("chosen", "rejected")]
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        theirs = loaded(**inputs).logits[:, 0]
    assert torch.allclose(ours, theirs, atol=1e-5)
