"""The foundations against TRL 1.16's own formulas: TRL's loss methods run on a stand-in for a trainer, same tensors."""
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from posttrain.foundations.advantages import group_advantages
from posttrain.foundations.divergences import F_DIVERGENCES, estimate_kl, f_score, generalized_jsd
from posttrain.foundations.masks import average
from posttrain.foundations.policy_gradient import RECIPES, policy_gradient_loss

trl = pytest.importorskip("trl", reason="TRL is the oracle, a development requirement")

pytestmark = pytest.mark.parity
B, T, MAX_LENGTH = 6, 9, 12


@pytest.fixture
def batch():
    torch.manual_seed(0)
    lengths = torch.tensor([9, 3, 5, 1, 7, 4])
    logps = -2 * torch.rand(B, T, dtype=torch.float64)
    return SimpleNamespace(logps=logps, old=logps + 0.4 * torch.randn(B, T, dtype=torch.float64),
                           ref=logps + 0.3 * torch.randn(B, T, dtype=torch.float64),
                           advantages=torch.randn(B, dtype=torch.float64),
                           mask=(torch.arange(T) < lengths[:, None]).long())


def trl_grpo(batch, **settings):
    "TRL's GRPO loss, its gradient by the log-probs, and its metrics."
    from trl.trainer.grpo_trainer import GRPOTrainer
    logps = batch.logps.clone().requires_grad_()
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    fake = SimpleNamespace(_get_per_token_logps_and_entropies=lambda *a, **k: (logps, torch.zeros(B, T), None),
                           top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token",
                           beta=0.0, loss_type="grpo", epsilon_low=0.2, epsilon_high=0.2, use_vllm=False,
                           aux_loss_enabled=False,
                           args=SimpleNamespace(delta=settings.pop("delta", None),
                                                use_bias_correction_kl=settings.pop("use_bias_correction_kl", True),
                                                steps_per_generation=1), model=SimpleNamespace(training=True),
                           current_gradient_accumulation_steps=1, max_completion_length=MAX_LENGTH,
                           accelerator=accelerator, _entropy_bonus_enabled=False, _metrics={"train": defaultdict(list)})
    for name, value in settings.items():
        assert hasattr(fake, name), f"no setting {name!r}"
        setattr(fake, name, value)
    ids = torch.zeros(B, T, dtype=torch.long)
    loss = GRPOTrainer._compute_loss(fake, None, dict(
        prompt_ids=ids, prompt_mask=ids, completion_ids=ids, completion_mask=batch.mask, advantages=batch.advantages,
        old_per_token_logps=batch.old, ref_per_token_logps=batch.ref, num_items_in_batch=batch.mask.sum()))
    return loss, torch.autograd.grad(loss, logps)[0], fake._metrics["train"]


def ours(batch, **settings):
    logps = batch.logps.clone().requires_grad_()
    loss, stats = policy_gradient_loss(logps, batch.old, batch.advantages, batch.mask, max_length=MAX_LENGTH,
                                       **settings)
    return loss, torch.autograd.grad(loss, logps)[0], stats


CASES = {
    "GRPO": (RECIPES["GRPO"].loss, dict(loss_type="grpo")),
    "Dr. GRPO": (RECIPES["Dr. GRPO"].loss, dict(loss_type="dr_grpo")),
    "DAPO": (RECIPES["DAPO"].loss, dict(loss_type="dapo", epsilon_high=0.28)),
    "BNPO": (dict(average="token"), dict(loss_type="bnpo")),
    "GSPO": (RECIPES["GSPO"].loss, dict(loss_type="grpo", importance_sampling_level="sequence",
                                        epsilon_low=3e-4, epsilon_high=4e-4)),
    "LUSPO": (dict(ratio="sequence", average="sum"), dict(loss_type="luspo", importance_sampling_level="sequence")),
    # TRL's epsilon_high is the limit itself here
    "CISPO": (RECIPES["CISPO"].loss, dict(loss_type="cispo", epsilon_high=5.0)),
    "two-sided": (dict(trust_region="two_sided", average="sequence", delta=1.4), dict(loss_type="grpo", delta=1.4)),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_trls(batch, name):
    mine, theirs = CASES[name]
    loss, grad, stats = ours(batch, **mine)
    want, want_grad, metrics = trl_grpo(batch, **theirs)
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=0)
    torch.testing.assert_close(grad, want_grad, rtol=1e-10, atol=1e-15)
    # TRL counts rows, not tokens, for sequence ratios; and its own for CISPO
    if "level" not in str(theirs) and name not in ("CISPO", "two-sided"):
        for key in ("low", "high", "region"):
            name_of_mean = f"clip_ratio/{key}_mean"
            assert stats[name_of_mean].item() == pytest.approx(metrics[name_of_mean][0], abs=1e-6)


@pytest.mark.parametrize("corrected", [False, True])
def test_grpo_with_its_kl_penalty_is_trls(batch, corrected):
    logps = batch.logps.clone().requires_grad_()
    policy, _ = policy_gradient_loss(logps, batch.old, batch.advantages, batch.mask, average="sequence")
    kl = estimate_kl(logps - batch.ref, "k3", ratio=(logps - batch.old).exp() if corrected else None)
    loss = policy + average(0.05 * kl, batch.mask, "sequence")
    want, want_grad, _ = trl_grpo(batch, loss_type="grpo", beta=0.05, use_bias_correction_kl=corrected)
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, logps)[0], want_grad, rtol=1e-10, atol=1e-15)


def test_rloo_is_trls(batch):
    from trl.trainer.rloo_trainer import RLOOTrainer
    logps = batch.logps.clone().requires_grad_()
    fake = SimpleNamespace(_get_per_token_logps_and_entropies=lambda *a, **k: (logps, torch.zeros(B, T), None),
                           aux_loss_enabled=False, epsilon_low=0.2, epsilon_high=0.2,
                           model=SimpleNamespace(training=True),
                           accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
                           _metrics={"train": defaultdict(list)})
    ids = torch.zeros(B, T, dtype=torch.long)
    want = RLOOTrainer._compute_loss(fake, None,
                                     dict(prompt_ids=ids, prompt_mask=ids, completion_ids=ids,
                                          completion_mask=batch.mask, advantages=batch.advantages,
                                          old_logps=(batch.old * batch.mask).sum(1)))
    loss, grad, _ = ours(batch, **RECIPES["RLOO"].loss)
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=0)
    torch.testing.assert_close(grad, torch.autograd.grad(want, logps)[0], rtol=1e-10, atol=1e-15)


def test_group_advantages_follow_trls_nan_rules():
    from trl.trainer.utils import nanstd
    torch.manual_seed(0)
    r = torch.randn(5, 4)
    r[0, 1] = r[2, 0] = r[2, 3] = torch.nan
    mean = r.nanmean(1, keepdim=True)
    for scale, std in (("group", nanstd(r, dim=1, keepdim=True)), ("batch", nanstd(r)), ("none", None)):
        want = (r - mean) if std is None else (r - mean) / (std + 1e-4)
        torch.testing.assert_close(group_advantages(r.flatten(), 4, scale=scale), want.nan_to_num(nan=0.0).flatten(),
                                   rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_jsd_is_trls(beta):
    from trl.experimental.gkd import GKDTrainer
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 7, dtype=torch.float64).unbind(0)
    want = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, reduction="none").sum(-1)
    torch.testing.assert_close(generalized_jsd(student, teacher, beta), want, rtol=1e-10, atol=1e-12)


def test_every_f_divergence_of_dpo_has_a_score():
    from trl import DPOConfig
    choices = DPOConfig.__dataclass_fields__["f_divergence_type"].metadata["help"]
    for name in F_DIVERGENCES:
        assert name in choices
        assert f_score(torch.zeros(3), name).abs().max() < 1e-6
