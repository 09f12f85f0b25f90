"""PRM: against TRL 1.13, the last that had it (recorded by tests/oracles/removed.py), and what is our own."""
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import Qwen3ForTokenClassification

from oracle import Answer, Sketch, start
from posttrain import PRMConfig, PRMTrainer, pocket
from stamps import short_hash
from tiny import SGD, flat, gradients_of_step

ORACLE = Path(__file__).parent / "oracles" / "prm.json"
RECORDED = json.loads(ORACLE.read_text()) if ORACLE.exists() else {}  # it is not there while it is made
QUIET = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", logging_steps=1,
             save_strategy="no", disable_tqdm=True, seed=0, warmup_steps=0)
CASES = {"all steps": {}, "last steps": dict(train_on_last_step_only=True), "cut": dict(max_length=24),
         "another separator": dict(step_separator="=")}


def model():
    "The start of the pocket model, with a layer for verdicts that is the same everywhere."
    lm, _ = start("add")
    made = Qwen3ForTokenClassification(type(lm.config)(**{**lm.config.to_dict(), "num_labels": 2}))
    size = lm.config.hidden_size
    score = torch.stack([torch.linspace(-.1, .1, size), torch.linspace(.2, -.1, size)])
    made.load_state_dict({**lm.state_dict(), "score.weight": score, "score.bias": torch.zeros(2)}, strict=False)
    return made


def data(n=8): return pocket.dataset("add", "stepwise_supervision", n=n, seed=3)


def step(classes, case, folder, **more):
    trainer_class, config_class = classes
    args = config_class(**{**QUIET, **SGD, "per_device_train_batch_size": 8, **CASES.get(case, {}), **more,
                           "output_dir": str(folder)})
    trainer = trainer_class(model=model(), args=args, train_dataset=data(), processing_class=pocket.tokenizer())
    gradients, row = gradients_of_step(trainer)
    return Answer([flat(gradients)], [{**row, "trained": short_hash(*gradients)}])


def theirs(case, folder):
    "In a process with TRL 1.13."
    import trl
    from trl.experimental.prm import PRMConfig, PRMTrainer
    assert trl.__version__ == "1.13.0"
    return step((PRMTrainer, PRMConfig), case, folder)


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_trl(case, tmp_path):
    their, ours = RECORDED[case], step((PRMTrainer, PRMConfig), case, tmp_path)
    assert ours.logs[0]["trained"] == their["log"]["trained"]
    theirs = Sketch(torch.tensor(their["projections"]), their["norm"])
    assert (theirs - ours.gradients[0]).norm() <= 1e-5 * max(1, their["norm"])
    for key in ("loss", "grad_norm"):
        assert abs(ours.logs[0][key] - their["log"][key]) <= 1e-5 * max(1, abs(their["log"][key])), key


@pytest.mark.parametrize("case", CASES)
def test_one_gradient_however_a_step_is_cut(case, tmp_path):
    whole = step((PRMTrainer, PRMConfig), case, tmp_path)
    for size in (4, 1):
        other = step((PRMTrainer, PRMConfig), case, tmp_path, per_device_train_batch_size=size,
                     gradient_accumulation_steps=8 // size)
        assert (other.gradients[0] - whole.gradients[0]).norm() <= 1e-5 * max(1, whole.gradients[0].norm())
        assert abs(other.logs[0]["accuracy"] - whole.logs[0]["accuracy"]) < 1e-6


def test_a_run_goes_on_where_it_stopped(tmp_path):
    args = PRMConfig(**{**QUIET, "output_dir": str(tmp_path), "max_steps": 6, "save_strategy": "steps", "save_steps": 3,
                        "learning_rate": 1e-3, "per_device_train_batch_size": 4})
    whole, again = (PRMTrainer(model(), args=args, train_dataset=data(16), processing_class=pocket.tokenizer())
                    for _ in range(2))
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters()): assert torch.equal(a, b), name


@pytest.mark.parametrize("rows, words", [
    ([{"prompt": "a", "completions": ["b", "c"], "labels": [True]}], "2 completions but 1 labels"),
    ([{"prompt": "a", "completions": ["b"], "labels": ["yes"]}], "'labels'"),
    ([{"prompt": "a", "completions": "b", "labels": [True]}], "'completions'"),
    ([{"prompt": "a", "completion": "b", "label": True}], "'completions'"),
    ([{"prompt": "a", "completions": [], "labels": []}], "no row"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_bad_rows_are_named(rows, words, tmp_path):
    with pytest.raises((ValueError, TypeError), match=words):
        PRMTrainer(model(), args=PRMConfig(**{**QUIET, "output_dir": str(tmp_path)}),
                   train_dataset=Dataset.from_list(rows), processing_class=pocket.tokenizer())
