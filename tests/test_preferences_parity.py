"""Every loss of pairs against TRL 1.16's own code: a real trl.DPOTrainer gets prepared log-probs in place of a model's.

Value and gradient by each token's log-prob, in float64, at log-ratios from 0 to 60 nats and more. What whole trainers
do is compared in test_dpo_parity."""
import inspect
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from posttrain import pocket
from posttrain.foundations.divergences import f_score
from posttrain.foundations.preferences import Pairs, split_pairs
from posttrain.offline.preference_zoo import (
    OF_THE_BATCH,
    OF_THE_CHOSEN,
    OF_THE_MARGIN,
    PAIR_LOSSES,
    on_policy_weights,
    verbosity_weights,
)

pytestmark = pytest.mark.parity
PAIRS, TOKENS, PROMPT = 6, 9, 3
SCALES = (0.5, 5.5, 60.0)  # nats: the largest log-ratio of an answer; 5.0 would meet the hinge's corner at beta 0.1


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A function that runs TRL's _compute_loss on given tokens' log-probs; one trainer serves all settings."""
    import trl
    assert trl.__version__ == "1.16.0", "the reference is TRL 1.16.0; install the dev extra with -c constraints.txt"
    args = trl.DPOConfig(str(tmp_path_factory.mktemp("trl")), use_cpu=True, bf16=False, report_to="none",
                         gradient_checkpointing=False)
    trainer = trl.DPOTrainer(model=pocket.model(), ref_model=pocket.model(), args=args,
                             processing_class=pocket.tokenizer(),
                             train_dataset=pocket.dataset("sort", "preference", n=4, conversational=False))

    def run(step, loss_type, **options):
        settings = {"beta": .1, "label_smoothing": 0.0, "loss_weights": None, "discopop_tau": .05,
                    "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": .5, "ld_alpha": None,
                    "use_weighting": False, **options}
        trainer.loss_types = [loss_type] if isinstance(loss_type, str) else loss_type
        trainer.loss_weights = settings.pop("loss_weights") or [1.0] * len(trainer.loss_types)
        trainer.args.discopop_tau = settings.pop("discopop_tau")
        for name, value in settings.items():
            assert hasattr(trainer, name), f"TRL's trainer has no {name} to set"
            setattr(trainer, name, value)
        def chosen_first(x): return torch.cat(split_pairs(x))
        def shifted(x):  # the first token of a text is predicted by nothing
            return torch.cat([x.new_zeros(len(x), PROMPT - 1), x], 1)

        mask = torch.cat([torch.zeros(2 * PAIRS, PROMPT, dtype=torch.long), chosen_first(step.mask)], 1)

        def model_with(logps):
            "What stands in for a model: a function that returns these log-probs, whatever it is given."
            out = SimpleNamespace(log_probs=shifted(chosen_first(logps)), is_top1=shifted(step.mask) > 0,
                                  log_sum_sq_probs=shifted(chosen_first(step.log_sum_sq_probs)),
                                  entropy=shifted(step.mask * 1.0), mean_logits=shifted(step.mask * 1.0))
            return lambda **inputs: out

        trainer.ref_model = model_with(step.ref_logps)
        inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
        return trainer._compute_loss(model_with(step.logps * step.mask), inputs, False)
    return run


def step_of(scale, seed=0, dtype=torch.float64):
    """A step of pairs with answers of unequal lengths, chosen and rejected in turn.

    Log-ratios go up to `scale`, the largest of which are reached."""
    generator = torch.Generator().manual_seed(seed)
    def random(*shape): return torch.rand(*shape, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([9, 4, 1, 7, 5, 5, 3, 8, 6, 2, 9, 9])
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    ratios = scale * (2 * random(2 * PAIRS) - 1)
    ratios[:4] = torch.tensor([scale, -scale, -scale, scale])  # margins of 2 and -2 scales
    ref_logps = -(random(2 * PAIRS, TOKENS) + scale)
    split = random(2 * PAIRS, TOKENS) * mask
    logps = ref_logps + ratios[:, None] * split / split.sum(1, keepdim=True)
    def cast(x): return (x * mask).to(dtype)
    return SimpleNamespace(logps=cast(logps).requires_grad_(), ref_logps=cast(ref_logps), mask=mask,
                           log_sum_sq_probs=cast(-3 * random(2 * PAIRS, TOKENS)))


def ours(step, loss_type, *, loss_weights=None, ld_alpha=None, use_weighting=False, f_divergence_type="reverse_kl",
         f_alpha_divergence_coef=.5, **options):
    """The mean over pairs, by the exported functions alone."""
    names = [loss_type] if isinstance(loss_type, str) else loss_type
    weights, logps = verbosity_weights(step.mask, ld_alpha).to(step.logps.dtype), step.logps * step.mask
    score = {}
    if f_divergence_type != "reverse_kl":
        score = {"score": partial(f_score, f_divergence_type=f_divergence_type, alpha=f_alpha_divergence_coef)}
    summed, ref_summed = (logps * weights).sum(1), (step.ref_logps * weights).sum(1)
    chosen_nll = -split_pairs(logps)[0].sum(1) * PAIRS / split_pairs(step.mask)[0].sum()
    pairs = Pairs(*split_pairs(summed), *split_pairs(ref_summed), *split_pairs(step.mask.sum(1)),
                  chosen_nll=chosen_nll, **score)
    options = {"beta": .1, **options}

    def value(name):
        loss = PAIR_LOSSES[name]
        return loss(pairs, **{k: v for k, v in options.items() if k in inspect.signature(loss).parameters})

    each = sum(weight * value(name) for name, weight in zip(names, loss_weights or [1.0] * len(names)))
    assert each.shape == (PAIRS,)
    return (each * on_policy_weights(step.logps, step.log_sum_sq_probs, step.mask) if use_weighting else each).mean()


def compare(theirs, step, loss_type, tolerance=1e-6, **options):
    losses = [ours(step, loss_type, **options), theirs(step, loss_type, **options)]
    (loss, other), (slope, other_slope) = losses, [torch.autograd.grad(x, step.logps)[0] for x in losses]
    case = f"{loss_type} with {options}"
    assert loss.isfinite() and slope.isfinite().all(), case
    assert abs(loss - other) <= tolerance * max(1, abs(other)), f"{case}: {loss} against TRL's {other}"
    off, largest = (slope - other_slope).abs().max(), other_slope.abs().max()
    assert off <= tolerance * max(1e-3, largest), f"{case}: gradients differ by {off:.2e} of {largest:.2e}"
    if options.get("ld_alpha") == 0 and loss_type != "sft":
        counted = (slope != 0).sum(1).view(-1, 2)
        assert (counted.diff() == 0).all(), "with ld_alpha=0 both answers count to the same length"
    return slope


def smoothings(loss):
    """Label smoothing that both libraries take: TRL drops sigmoid's."""
    return (1e-3, .2) if loss == "exo_pair" else (0.0, .2) if loss in ("robust", *OF_THE_BATCH) else (0.0,)


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_value_and_gradient(loss, theirs):
    for scale in SCALES:
        for beta in (.01, .1, 1.0):
            for eps in smoothings(loss):
                for seed in range(3):
                    gradient = compare(theirs, step_of(scale, seed), loss, beta=beta, label_smoothing=eps)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("tau", [.02, .2, 1.0])
def test_discopop_tau(tau, theirs):
    for scale in SCALES: compare(theirs, step_of(scale), "discopop", beta=.1, discopop_tau=tau)


@pytest.mark.parametrize("loss", PAIR_LOSSES)
@pytest.mark.parametrize("ld_alpha", [0.0, .3, 1.0])
def test_ld_alpha(loss, ld_alpha, theirs):
    for scale in SCALES: compare(theirs, step_of(scale), loss, ld_alpha=ld_alpha, label_smoothing=smoothings(loss)[-1])


@pytest.mark.parametrize("loss", [*OF_THE_MARGIN, *OF_THE_CHOSEN])
@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence"])
def test_f_divergences(loss, divergence, theirs):
    # exp(60) nats of margin is an overflow of TRL's discopop even in float64
    for scale in SCALES[:2] if loss == "discopop" else SCALES:
        for beta in (.01, 1.0):
            compare(theirs, step_of(scale), loss, f_divergence_type=divergence, beta=beta,
                    label_smoothing=smoothings(loss)[-1])


@pytest.mark.parametrize("loss", [*OF_THE_MARGIN, *OF_THE_CHOSEN])
@pytest.mark.parametrize("alpha", [-.5, 0.0, .5, 1.0, 2.0])
def test_alpha_divergence(loss, alpha, theirs):
    """In float32, as TRL takes no float64 here; hence the tolerance."""
    for scale in SCALES[:2]:
        compare(theirs, step_of(scale, dtype=torch.float32), loss, tolerance=2e-5, f_divergence_type="alpha_divergence",
                f_alpha_divergence_coef=alpha, beta=.01, label_smoothing=smoothings(loss)[-1])


# the others: below
WEIGHED_BY_TRL = [n for n in PAIR_LOSSES if n not in {**OF_THE_BATCH, **OF_THE_CHOSEN, "hinge": None}]


@pytest.mark.parametrize("loss", WEIGHED_BY_TRL)
def test_wpo(loss, theirs):
    for scale in SCALES[:2]:
        for seed in range(3):
            compare(theirs, step_of(scale, seed), loss, use_weighting=True, label_smoothing=smoothings(loss)[-1])


@pytest.mark.parametrize("names,weights", [
    (["sigmoid", "bco_pair", "sft"], [.8, .2, 1.0]), (["ipo", "nca_pair"], [.5, 2.0]),
    (["aot", "sft"], None), (["sigmoid_norm", "apo_down", "robust"], [1.0, 0.0, -.5])])
def test_mixtures(names, weights, theirs):
    for scale in SCALES: compare(theirs, step_of(scale), names, loss_weights=weights, ld_alpha=.5)


# ---------------------------------------------------------------- where TRL 1.16 does otherwise
# These differences are pinned, so that a change there is noticed.
def test_trl_drops_label_smoothing_of_sigmoid(theirs):
    step = step_of(5.0)
    assert theirs(step, "sigmoid", label_smoothing=.2) == theirs(step, "sigmoid")
    plain, smooth = (ours(step, "sigmoid", label_smoothing=eps) for eps in (0.0, .2))
    margins = .1 * ((step.logps - step.ref_logps).sum(1).view(-1, 2) * torch.tensor([1, -1])).sum(1)
    # softplus(m) = softplus(-m) + m
    assert torch.isclose(smooth, plain + .2 * margins.mean()) and not torch.isclose(smooth, plain)


def test_trl_cannot_weigh_sft_and_hinge(theirs):
    """It multiplies in place: an expanded scalar for sft, and for hinge the output that relu's backward pass needs."""
    step = step_of(5.5)
    logps = (step.logps * step.mask).sum(1).view(-1, 2)
    with pytest.raises(RuntimeError): theirs(step, "sft", use_weighting=True)
    with pytest.raises(RuntimeError): torch.autograd.grad(theirs(step, "hinge", use_weighting=True), step.logps)
    weights = on_policy_weights(step.logps, step.log_sum_sq_probs, step.mask)
    assert torch.isclose(ours(step, "sft", use_weighting=True), (weights * -logps[:, 0] / step.mask[0::2].sum()).sum())
    margins = .1 * (logps - step.ref_logps.sum(1).view(-1, 2)) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    loss = ours(step, "hinge", use_weighting=True)
    gradient, = torch.autograd.grad(loss, step.logps)
    assert torch.isclose(loss, (weights * (1 - margins).clamp(min=0)).mean())
    assert torch.isclose(loss, theirs(step, "hinge", use_weighting=True))
    assert torch.isclose(gradient[0::2, 0], -.1 * weights * (margins < 1) / PAIRS).all()


def test_trl_has_no_alpha_divergence_in_float64(theirs):
    with pytest.raises(KeyError): theirs(step_of(5.0), "sigmoid", f_divergence_type="alpha_divergence")
    options = dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=.5)
    double, single = (ours(step_of(5.0, dtype=dtype), "sigmoid", **options) for dtype in (torch.float64, torch.float32))
    assert torch.isclose(double.float(), single)


FORWARD = dict(f_divergence_type="forward_kl")


@pytest.mark.parametrize(
    "loss,options", [("discopop", dict(beta=1.0)), ("sigmoid", FORWARD), ("sigmoid_norm", FORWARD)])
def test_trl_overflows_in_float32(loss, options, theirs):
    """A hundred nats on the wrong side: TRL's loss or gradient is not a number, ours is one."""
    step = step_of(100.0, dtype=torch.float32)
    other = theirs(step, loss, **options)
    slope, = torch.autograd.grad(other, step.logps)
    assert not (other.isfinite() and slope.isfinite().all()), "TRL copes now: compare it"
    loss = ours(step, loss, **options)
    assert loss.isfinite() and torch.autograd.grad(loss, step.logps)[0].isfinite().all()
