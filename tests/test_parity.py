"""SFT against TRL 1.16 on the same model, tokenizer and rows: loss, gradient and logged metrics.

One step of plain gradient descent with learning rate 1 moves each weight by minus its gradient, so two trainers that
agree on all weights after a step agree on the gradient, whatever happens inside them."""
import pytest
import torch
from datasets import Dataset

from oracle import Answer, oracle, start
from posttrain import SFTConfig, SFTTrainer, pocket

pytestmark = pytest.mark.parity
LOGGED = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")


@pytest.fixture(scope="module")
def trl():
    import trl
    assert trl.__version__ == "1.16.0", "the reference is TRL 1.16.0; install the dev extra with -c constraints.txt"
    return trl


def rows(kind, n=16):
    return pocket.dataset("add", kind, n=n, seed=3, conversational=False)


def chats(n=16):
    two = pocket.dataset("add", "language_modeling", n=2 * n, seed=4, conversational=True)["messages"]
    return Dataset.from_dict({"messages": [two[2 * i] + two[2 * i + 1] for i in range(n)]})


CASES = {"text": (lambda: rows("language_modeling"), {}),
         "prompt and completion": (lambda: rows("prompt_completion"), {}),
         "whole texts of prompt and completion": (lambda: rows("prompt_completion"), dict(completion_only_loss=False)),
         "dft": (lambda: rows("prompt_completion"), dict(loss_type="dft")),
         "chats, assistant only": (chats, dict(assistant_only_loss=True)), "chats": (chats, {}),
         "padding-free": (lambda: rows("language_modeling"), dict(padding_free=True, max_length=None)),
         "packed bfd": (lambda: rows("language_modeling", 40),
                        dict(packing=True, max_length=48, per_device_train_batch_size=2)),
         "packed bfd_split": (lambda: rows("language_modeling", 40),
                              dict(packing=True, packing_strategy="bfd_split", max_length=20,
                                   per_device_train_batch_size=2)),
         "packed wrapped": (lambda: rows("language_modeling", 40),
                            dict(packing=True, packing_strategy="wrapped", max_length=32,
                                 per_device_train_batch_size=2)),
         "packed completions, dft": (lambda: rows("prompt_completion", 40),
                                     dict(packing=True, max_length=48, loss_type="dft", per_device_train_batch_size=2)),
         "accumulated": (lambda: rows("prompt_completion"),
                         dict(per_device_train_batch_size=2, gradient_accumulation_steps=4)),
         "truncated": (lambda: rows("language_modeling"), dict(max_length=12))}


def one_step(trainer_class, config_class, dataset, options):
    model, _ = start("add")  # knows a little, so that accuracy and entropy have something to say
    before = [p.detach().clone() for p in model.parameters()]
    args = config_class(**{**options, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9, "max_steps": 1,
                           "lr_scheduler_type": "constant"})
    trainer = trainer_class(model=model, args=args, train_dataset=dataset, processing_class=pocket.tokenizer())
    trainer.train()
    gradient = torch.cat([(b - a.detach()).flatten() for a, b in zip(model.parameters(), before)])
    return Answer([gradient], [next(row for row in trainer.state.log_history if "loss" in row)])


@pytest.mark.parametrize("case", CASES)
def test_loss_gradient_and_metrics_equal_trl(case, config, trl):
    make, options = CASES[case]
    answer = one_step(SFTTrainer, SFTConfig, make(), config(**options))
    inputs = [one_step, start("add")[0], make(), {**config(**options), "output_dir": None}]
    recorded = oracle(case, inputs, lambda: one_step(trl.SFTTrainer, trl.SFTConfig, make(), config(**options)),
                      "test_parity")
    (ours,), (theirs,) = answer.gradients, recorded.gradients
    (mine,), (other,) = answer.logs, recorded.logs
    assert ours.norm() > 1e-3
    difference = (ours - theirs).norm()
    assert difference <= 1e-5 * max(1, theirs.norm()), f"gradients differ by {difference:.2e} of {theirs.norm():.2e}"
    # TRL averages these two over micro-batches, we over tokens
    averaged = options.get("gradient_accumulation_steps", 1) > 1
    for key in LOGGED:
        tolerance = 2e-2 if averaged and key in ("entropy", "mean_token_accuracy") else 1e-5
        limit = tolerance * max(1, abs(other[key]))
        assert abs(mine[key] - other[key]) <= limit, f"{key}: {mine[key]} against TRL's {other[key]}"


def test_lora_gradient_equals_trl(config, trl):
    from peft import LoraConfig, get_peft_model

    def run(trainer_class, config_class):
        torch.manual_seed(0)
        model = get_peft_model(pocket.model(seed=1),
                               LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM",
                                          init_lora_weights="gaussian"))
        for name, p in model.named_parameters():
            if "lora_B" in name: p.data.normal_(0, .05)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        args = config_class(**config(optim="sgd", learning_rate=1.0, max_grad_norm=1e9, max_steps=1,
                                     lr_scheduler_type="constant"))
        trainer = trainer_class(model=model, args=args, train_dataset=rows("prompt_completion"),
                                processing_class=pocket.tokenizer())
        trainer.train()
        return {n: before[n] - p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}

    ours, theirs = run(SFTTrainer, SFTConfig), run(trl.SFTTrainer, trl.SFTConfig)
    assert ours.keys() == theirs.keys() and all("lora" in n for n in ours)
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=1e-5), name
