"""GKDTrainer and DistillationTrainer against those of TRL 1.16, live, on the same rows and the same answers: loss and
gradient. One step of plain gradient descent with learning rate 1 moves each weight by minus its gradient."""
import pytest
import torch
from datasets import Dataset

from oracle import start
from posttrain import pocket
from posttrain.distillation.distillation_trainer import DistillationConfig, DistillationTrainer
from posttrain.distillation.gkd_trainer import GKDConfig, GKDTrainer
from posttrain.rollout.sampling import Samples
from test_dpo_parity import moved

pytestmark = pytest.mark.parity
QUIET = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no",
             disable_tqdm=True, seed=0, warmup_steps=0, logging_steps=1, max_steps=1, optim="sgd", learning_rate=1.0,
             max_grad_norm=1e9, lr_scheduler_type="constant")
N, LONGEST = 8, 7  # prompts, tokens of an answer


def models():
    "Two models of one vocabulary that differ by so much that rounding is a small part of what the gradient is made of."
    return moved(start("reverse")[0], 1, .1), start("add")[0]


def chats(n=N):
    "Conversations of two turns, of which the last is learned from."
    single = pocket.dataset("add", "language_modeling", n=2 * n, seed=4, conversational=True)["messages"]
    return Dataset.from_dict({"messages": [single[2 * i] + single[2 * i + 1] for i in range(n)]})


def after(trainer):
    "What one step changed, and what it logged."
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    gradient = torch.cat([(before[name] - p.detach()).flatten() for name, p in trainer.model.named_parameters()])
    return gradient, next(row for row in trainer.state.log_history if "loss" in row)


def equal(ours, theirs, keys=("loss", "grad_norm")):
    (gradient, log), (their_gradient, their_log) = ours, theirs
    difference = (gradient - their_gradient).norm()
    assert difference <= 1e-5 * max(1, their_gradient.norm()), difference
    for key in keys:
        near = 5.1e-5 if key == "loss" else 1e-5 * max(1, abs(their_log[key]))  # TRL rounds the loss
        assert abs(log[key] - their_log[key]) <= near, (key, log[key], their_log[key])
    return their_gradient.norm()


@pytest.mark.parametrize("options", [dict(beta=beta) for beta in (0, .1, .5, .9, 1)]
                         + [dict(beta=.5, per_device_train_batch_size=2, gradient_accumulation_steps=4),
                            dict(beta=1, max_length=24)], ids=str)
def test_gkd_on_the_dataset(options, tmp_path):
    from trl.experimental.gkd import GKDConfig as TheirConfig
    from trl.experimental.gkd import GKDTrainer as Theirs
    given = {"per_device_train_batch_size": N, "lmbda": 0.0, **QUIET, **options}
    tokenizer, (student, teacher) = pocket.tokenizer(), models()
    theirs = after(Theirs(student, teacher, TheirConfig(str(tmp_path / "trl"), **given), train_dataset=chats(),
                          processing_class=tokenizer))
    student, teacher = models()
    ours = after(GKDTrainer(student, teacher, GKDConfig(str(tmp_path / "ours"), **given), train_dataset=chats(),
                            processing_class=tokenizer))
    assert equal(ours, theirs) > .01


def written(prompt: list) -> list:
    "An answer to a prompt of token ids: some end early, by themselves."
    ids = torch.randint(4, 14, (LONGEST,), generator=torch.Generator().manual_seed(sum(prompt))).tolist()
    return [*ids[:2 + sum(prompt) % 4], pocket.tokenizer().eos_token_id] if sum(prompt) % 3 else ids


class Given:
    "An engine that gives these answers."

    def sync(self, model): pass

    def sleep(self): pass

    def sample(self, prompts, seeds, sampling):
        ids, eos = [written(prompt) for prompt in prompts], pocket.tokenizer().eos_token_id
        return Samples(ids, None, [x[-1] == eos for x in ids])


@pytest.mark.parametrize("options", [dict(), dict(beta=0), dict(beta=.5, temperature=.7),
                                     dict(per_device_train_batch_size=2, gradient_accumulation_steps=4)], ids=str)
def test_distillation_on_the_same_answers(options, tmp_path):
    from trl import DistillationConfig as TheirConfig
    from trl import DistillationTrainer as Theirs
    given = {"per_device_train_batch_size": N, "max_completion_length": LONGEST, **QUIET, **options}
    questions = pocket.dataset("add", "prompt_only", n=N, seed=5)
    tokenizer, (student, teacher) = pocket.tokenizer(), models()
    trainer = Theirs(student, teacher, TheirConfig(str(tmp_path / "trl"), **given), train_dataset=questions,
                     processing_class=tokenizer)
    trainer._generate_single_turn = lambda prompt_ids, *args, **kwargs: [written(ids) for ids in prompt_ids]
    theirs = after(trainer)
    student, teacher = models()
    trainer = DistillationTrainer(student, teacher, DistillationConfig(str(tmp_path / "ours"), **given), questions,
                                  processing_class=tokenizer)
    trainer.engine = Given()
    keys = ("loss", "grad_norm", "completions/mean_length", "completions/clipped_ratio",
            "completions/mean_terminated_length", "num_tokens")
    # TRL averages the entropy over micro-batches, we over tokens
    assert equal(after(trainer), theirs, keys if "gradient_accumulation_steps" in options else (*keys, "entropy")) > .01


@pytest.mark.parametrize("name", ["GKD", "Distillation"])
def test_every_field_and_default_of_trl_is_here(name):
    import dataclasses
    import inspect

    import trl
    from trl.experimental import gkd
    module = gkd if name == "GKD" else trl
    their_config, their_trainer = (getattr(module, name + kind) for kind in ("Config", "Trainer"))
    our_config, our_trainer = {"GKD": (GKDConfig, GKDTrainer),
                               "Distillation": (DistillationConfig, DistillationTrainer)}[name]
    their, ours = their_config("out", use_cpu=True), our_config("out", use_cpu=True)
    assert not {f.name for f in dataclasses.fields(their)} - {f.name for f in dataclasses.fields(ours)}
    for key in ("learning_rate", "temperature", "beta", "disable_dropout", "teacher_model_name_or_path",
                "teacher_model_init_kwargs", *(("lmbda", "seq_kd", "max_length") if name == "GKD" else
                                               ("teacher_model_revision", "max_completion_length", "top_p", "top_k"))):
        assert getattr(ours, key) == getattr(their, key), key
    if name == "GKD": assert ours.max_completion_length == their.max_new_tokens
    theirs = list(inspect.signature(their_trainer).parameters)
    assert list(inspect.signature(our_trainer).parameters)[:len(theirs)] == theirs
