"""KTO, CPO and ORPO against TRL 1.16 on the same model, reference, tokenizer and rows: loss, gradient and metrics.

As in test_parity: after one step of plain gradient descent with learning rate 1, equal weights mean equal gradients."""
import copy

import pytest
import torch

from oracle import Answer, oracle, start
from posttrain import pocket
from posttrain.offline.cpo_trainer import CPOConfig, CPOTrainer
from posttrain.offline.kto_trainer import KTOConfig, KTOTrainer
from posttrain.offline.orpo_trainer import ORPOConfig, ORPOTrainer
from stamps import short_hash
from test_dpo_parity import moved, rows

pytestmark = pytest.mark.parity
BATCH = dict(per_device_train_batch_size=8)
OF_CLASSES = tuple(f"{what}/{side}" for what in ("rewards", "logps", "logits") for side in ("chosen", "rejected"))
LOGGED = {"KTO": ("loss", "grad_norm", "entropy", "num_tokens", "kl", "rewards/margins", *OF_CLASSES),
          "CPO": ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "nll_loss", *OF_CLASSES[:4]),
          "ORPO": ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "nll_loss", "log_odds_chosen",
                   "log_odds_ratio", *OF_CLASSES[:4])}
OURS = {"KTO": (KTOTrainer, KTOConfig), "CPO": (CPOTrainer, CPOConfig), "ORPO": (ORPOTrainer, ORPOConfig)}
#: the options with which a method computes what TRL computes
AS_TRL = {"KTO": dict(mismatched="batch"), "CPO": {}, "ORPO": dict(nll_of="sequence")}


@pytest.fixture(scope="module")
def trl():
    import trl
    assert trl.__version__ == "1.16.0", "the reference is TRL 1.16.0; install the dev extra with -c constraints.txt"
    return trl


def theirs_of(method, trl):
    if method == "KTO": return trl.KTOTrainer, trl.KTOConfig
    from trl.experimental import cpo, orpo
    return {"CPO": (cpo.CPOTrainer, cpo.CPOConfig), "ORPO": (orpo.ORPOTrainer, orpo.ORPOConfig)}[method]


@pytest.fixture(scope="module")
def models():
    reference, _ = start("sort")
    return moved(reference, 1, .2), reference


def one_step(classes, models, dataset, options, peft=None):
    (trainer_class, config_class), policy = classes, copy.deepcopy(models[0])
    args = config_class(**{**options, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9, "max_steps": 1,
                           "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential"})
    has_reference = peft is None and trainer_class.__name__ == "KTOTrainer"
    more = {"ref_model": copy.deepcopy(models[1])} if has_reference else {}
    if peft is not None: policy = peft(policy)
    trainer = trainer_class(model=policy, args=args, train_dataset=dataset, processing_class=pocket.tokenizer(), **more)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    gradient = {n: before[n] - p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
    row = next(row for row in trainer.state.log_history if "loss" in row)
    return Answer([torch.cat([g.flatten() for g in gradient.values()])], [{**row, "trained": short_hash(*gradient)}])


def same(method, ours, theirs, skip=()):
    (a,), (b,), (mine,), (their,) = ours.gradients, theirs.gradients, ours.logs, theirs.logs
    assert mine["trained"] == their["trained"], "other names of weights"
    assert b.norm() > 1e-5
    assert (a - b).norm() <= 1e-5 * max(1, b.norm()), f"gradients differ by {(a - b).norm():.2e} of {b.norm():.2e}"
    for key in LOGGED[method]:
        if key in skip: continue
        assert (key in mine) == (key in their), key
        if key not in their: continue
        limit = 1e-5 * max(1, abs(their[key]))
        assert abs(mine[key] - their[key]) <= limit, f"{key}: {mine[key]} against TRL's {their[key]}"


def both(name, method, trl, config, models, dataset, options, peft=None):
    """Our step, and TRL's on the same rows, live or recorded. `dataset` is a function that makes them."""
    options, ours = config(**options), OURS[method]
    inputs = [one_step, models, dataset(), {**options, "output_dir": None}, peft]
    theirs = oracle(name, inputs, lambda: one_step(theirs_of(method, trl), models, dataset(), options, peft),
                    "test_answers_parity")
    return one_step(ours, models, dataset(), {**AS_TRL[method], **options}, peft), theirs


def answers(conversational=False):
    "Liked and disliked answers in turn, of unequal length."
    from posttrain import unpair_preference_dataset
    data = unpair_preference_dataset(rows(4, conversational))
    return data.select([0, 4, 1, 5, 2, 6, 3, 7])


CASES = {
    ("KTO", "kto"): dict(), ("KTO", "apo_zero_unpaired"): dict(loss_type="apo_zero_unpaired"),
    ("KTO", "weights"): dict(desirable_weight=.3, undesirable_weight=1.7),
    ("KTO", "large beta"): dict(beta=2.0), ("KTO", "small beta"): dict(beta=.01),
    ("KTO", "precomputed"): dict(precompute_ref_log_probs=True),
    ("CPO", "sigmoid"): dict(), ("CPO", "hinge"): dict(loss_type="hinge"),
    ("CPO", "ipo"): dict(loss_type="ipo"), ("CPO", "simpo"): dict(loss_type="simpo", beta=2.0, cpo_alpha=0.0),
    ("CPO", "simpo and likelihood"): dict(loss_type="simpo", beta=2.0, simpo_gamma=1.6, cpo_alpha=.5),
    ("CPO", "alphapo"): dict(loss_type="alphapo", beta=2.0, alpha=.25),
    ("CPO", "alpha with sums"): dict(alpha=-.1), ("CPO", "smoothed"): dict(label_smoothing=.2),
    ("CPO", "simpo, smoothed"): dict(loss_type="simpo", label_smoothing=.1, cpo_alpha=0.0),
    ("CPO", "no likelihood"): dict(cpo_alpha=0.0), ("CPO", "truncated"): dict(max_length=16),
    ("ORPO", "orpo"): dict(), ("ORPO", "large beta"): dict(beta=2.0), ("ORPO", "truncated"): dict(max_length=16),
}


@pytest.mark.filterwarnings("ignore:loss_type='simpo' with cpo_alpha")
@pytest.mark.parametrize("method, case", CASES, ids=", ".join)
def test_loss_gradient_and_metrics_equal_trl(method, case, trl, config, models):
    data = answers if method == "KTO" else rows
    options = CASES[method, case]
    # with cpo_alpha=0 TRL logs 0 in the place of the likelihood
    skip = ("nll_loss",) if method == "CPO" and not options.get("cpo_alpha", case != "alphapo") else ()
    same(method, *both(f"{method}: {case}", method, trl, config, models, data, {**BATCH, **options}), skip)
