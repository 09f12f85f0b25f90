"""BCO: against TRL 1.13, the last that had it (recorded by tests/oracles/removed.py), and what is our own."""
import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from oracle import Sketch, start
from posttrain import pocket, unpair_preference_dataset
from posttrain.offline.bco_trainer import BCOConfig, BCOTrainer
from test_answers_parity import answers, one_step
from test_dpo_parity import moved, rows

ORACLE = Path(__file__).parent / "oracles" / "bco.json"
RECORDED = json.loads(ORACLE.read_text()) if ORACLE.exists() else {}  # it is not there while it is made
QUIET = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", logging_steps=1,
             save_strategy="no", disable_tqdm=True, seed=0, warmup_steps=0, per_device_train_batch_size=8)
CASES = {"bco": dict(), "large beta": dict(beta=2.0), "precomputed": dict(precompute_ref_log_probs=True)}
OF_TWO_KINDS = {"prompts of two kinds": dict(), "a clamped ratio": dict(min_density_ratio=.9, max_density_ratio=1.1)}
CASES |= OF_TWO_KINDS
LOGGED = ("loss", "grad_norm", "delta", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen",
          "logps/rejected")


def bag_of_words(input_ids, attention_mask):
    "An embedding of a prompt that can be written down: how often each of the first 24 tokens stands in it."
    counted = torch.nn.functional.one_hot(input_ids, 256) * attention_mask[..., None]
    return counted.sum(1)[:, :24].float()


def models():
    reference, _ = start("sort")
    return moved(reference, 1, .2), reference


def step(classes, case, folder, **more):
    "One step with the case's options; where the case is about prompts, with their embedding."
    trainer_class, config_class = classes
    embedding, data = {}, answers()
    if case in OF_TWO_KINDS:
        embedding = dict(embedding_func=bag_of_words, embedding_tokenizer=pocket.tokenizer())
        data = unpair_preference_dataset(rows(8)).select([0, 12, 1, 13, 2, 14, 3, 15])

    class WithEmbedding(trainer_class):
        def __init__(self, **kwargs): super().__init__(**kwargs, ref_model=copy.deepcopy(models()[1]), **embedding)
    WithEmbedding.__name__ = trainer_class.__name__
    options = {**QUIET, **CASES[case], **more, "output_dir": folder}
    return one_step((WithEmbedding, config_class), models(), data, options)


def theirs(case, folder):
    "In a process with TRL 1.13."
    import trl
    from trl.experimental.bco import BCOConfig, BCOTrainer
    assert trl.__version__ == "1.13.0"
    np.random.choice = lambda n, size: np.arange(n)[:size[0]]  # of its sample: every prompt once
    return step((BCOTrainer, BCOConfig), case, folder)


@pytest.mark.parametrize("case", CASES)
def test_loss_gradient_and_metrics_equal_trl(case, tmp_path):
    theirs = RECORDED[case]
    ours = step((BCOTrainer, BCOConfig), case, str(tmp_path), reward_shift="running_mean")
    (gradient,), (log,) = ours.gradients, ours.logs
    recorded = Sketch(torch.tensor(theirs["projections"]), theirs["norm"])
    assert (recorded - gradient).norm() <= 1e-5 * max(1, recorded.norm())
    for key in LOGGED:
        assert abs(log[key] - theirs["log"][key]) <= 1e-5 * max(1, abs(theirs["log"][key])), key


def test_prompts_of_two_kinds_change_the_loss():
    assert abs(RECORDED["bco"]["log"]["loss"] - RECORDED["prompts of two kinds"]["log"]["loss"]) > 1e-3
