"""Nash-MD's algorithms in tables and its loss, against brute force and against formulas written out."""
import itertools
import math

import pytest
import torch

from posttrain.explore import policy_simplex, simplex
from posttrain.foundations.masks import Totals, length_mask
from posttrain.online.nash_md import (
    KL_FORMS,
    bradley_terry_fit,
    expected_preference,
    exploitability,
    geometric_mixture,
    nash_md_loss,
    nash_md_step,
    nash_mirror_prox_step,
    online_dpo_step,
    regularized_nash,
    self_play_step,
    win_rate,
)

EXACT = dict(rtol=1e-9, atol=1e-12)
SEEDS = range(5)


def game(n, g, hard=False):
    "A random preference matrix; hard: of 0 and 1."
    upper = torch.rand(n, n, generator=g, dtype=torch.float64).triu(1)
    if hard: upper = upper.round()
    return upper + (1 - upper.T).tril(-1) + torch.eye(n, dtype=torch.float64) / 2


def policies(n, g, spread=2.0):
    return (spread * torch.randn(2, n, generator=g, dtype=torch.float64)).log_softmax(-1).unbind()


def kl(p, q): return (p.exp() * (p - q)).sum()


# ---------------------------------------------------------------- tables
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("hard", [False, True])
def test_nobody_beats_the_regularised_solution(seed, hard):
    g = torch.Generator().manual_seed(seed)
    P, (mu, other) = game(4, g, hard), policies(4, g)
    star = regularized_nash(P, mu, 0.15)
    # a best response to itself
    response = (mu + expected_preference(P, star) / 0.15).log_softmax(-1)
    torch.testing.assert_close(star.exp(), response.exp(), atol=1e-5, rtol=0)
    assert abs(exploitability(star, P, mu, 0.15)) < 1e-11 < exploitability(other, P, mu, 0.15)
    lead = win_rate(star, other, P) - 0.15 * kl(star, mu) + 0.15 * kl(other, mu)
    assert lead >= 0.5 - 1e-9


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("hard", [False, True])
def test_a_step_of_nash_md_and_one_of_mirror_prox_come_closer_by_what_is_proved(seed, hard):
    g = torch.Generator().manual_seed(seed)
    P, (mu, policy) = game(5, g, hard), policies(5, g)
    tau = 0.1
    star = regularized_nash(P, mu, tau)
    for eta in (0.01, 0.5, 3.0, 1 / tau):
        after = kl(star, nash_md_step(policy, mu, P, eta, tau))
        assert after <= (1 - eta * tau) * kl(star, policy) + eta**2 / 8 + 1e-12
    for eta in (0.1, 1.0, 2.0):
        after = kl(star, nash_mirror_prox_step(policy, mu, P, eta, tau))
        assert after <= kl(star, policy) / (1 + eta * tau) + 1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_the_schedule_stays_below_the_bound(seed):
    g = torch.Generator().manual_seed(seed)
    P, (mu, policy) = game(3, g), policies(3, g)
    star = regularized_nash(P, mu, 0.2)
    for t in range(300):
        policy = nash_md_step(policy, mu, P, 2 / (0.2 * (t + 2)), 0.2)
        assert kl(star, policy) <= 1 / (2 * 0.2**2 * (t + 2))
    assert kl(star, policy) < 1e-2


@pytest.mark.parametrize("seed", SEEDS)
def test_a_tie_of_names(seed):
    "Self-play, online IPO and Nash-MD are one family."
    g = torch.Generator().manual_seed(seed)
    P, (mu, policy) = game(4, g), policies(4, g)
    torch.testing.assert_close(self_play_step(policy, P, 0.7), nash_md_step(policy, mu, P, 0.7, 0.0), **EXACT)
    torch.testing.assert_close(online_dpo_step(policy, mu, P, 0.7, 0.2, "ipo"),
                               nash_md_step(policy, mu, P, 0.7, 0.2, coef=0.0), **EXACT)
    torch.testing.assert_close(nash_md_step(policy, mu, P, 0.7, 0.2),
                               nash_md_step(policy, mu, P, 0.7, 0.2, coef=0.14), **EXACT)
    torch.testing.assert_close(geometric_mixture(policy, mu, 1.0), mu, **EXACT)
    # near the reference DPO's beta is four times the tau
    near = (mu + 1e-4 * torch.randn(4, generator=g, dtype=torch.float64)).log_softmax(-1)
    torch.testing.assert_close(online_dpo_step(near, mu, P, 1.0, 0.4), online_dpo_step(near, mu, P, 1.0, 0.1, "ipo"),
                               atol=1e-9, rtol=0)


def test_functions_take_batches_of_games():
    g = torch.Generator().manual_seed(0)
    games = torch.stack([game(3, g) for _ in range(4)])
    mu, policy = (torch.stack(x) for x in zip(*(policies(3, g) for _ in range(4))))
    for one in (lambda p, m, P: nash_md_step(p, m, P, 0.5, 0.1),
                lambda p, m, P: nash_mirror_prox_step(p, m, P, 0.5, 0.1),
                lambda p, m, P: online_dpo_step(p, m, P, 0.5, 0.1), lambda p, m, P: exploitability(p, P, m, 0.1),
                lambda p, m, P: exploitability(p, P)):
        together = one(policy, mu, games)
        torch.testing.assert_close(together, torch.stack([one(*x) for x in zip(policy, mu, games)]), **EXACT)


def test_a_corner_has_a_finite_exploitability():
    P = simplex.cycle(0.9, 0.9, 0.9)
    corner = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).log()
    mu = torch.full((3,), -math.log(3), dtype=torch.float64)
    assert abs(exploitability(corner, P) - 0.4) < 1e-12
    assert exploitability(corner, P, mu, 0.1).isfinite()


@pytest.mark.parametrize("seed", SEEDS)
def test_bradley_terry_finds_its_own_scores_and_is_flat_on_a_circle(seed):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(5, generator=g, dtype=torch.float64)
    weights = torch.rand(5, generator=g, dtype=torch.float64).softmax(-1)
    fit = bradley_terry_fit(torch.sigmoid(scores[:, None] - scores), weights)
    torch.testing.assert_close(fit, scores - scores.mean(), rtol=1e-6, atol=1e-6)
    assert bradley_terry_fit(simplex.cycle(0.8, 0.8, 0.8)).abs().max() < 1e-9


# ---------------------------------------------------------------- the loss
def batch(seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    mask = length_mask(torch.tensor([4, 1, 3, 2]), 4)
    logps, ref = (-torch.rand(4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    return logps.to(dtype), ref.to(dtype), torch.tensor([0.9, torch.nan, 0.0, 1.0]), mask


@pytest.mark.parametrize("form", KL_FORMS)
def test_the_loss_is_the_formula(form):
    logps, ref, preference, mask = batch()
    leaf = logps.clone().requires_grad_()
    loss, _ = nash_md_loss(leaf, ref, preference, mask, beta=0.3, kl=form)
    slope, = torch.autograd.grad(loss, leaf)
    for i, t in itertools.product(range(4), range(4)):
        counted = [s for s in range(4) if mask[i, s]]
        chosen = {"to_go": [s for s in counted if s >= t], "sequence": counted, "token": [t]}[form]
        paid = 0.3 * sum((logps - ref)[i, s].item() for s in chosen)
        lead = 0.0 if preference[i].isnan() else preference[i].item() - 0.5
        assert abs(slope[i, t].item() - (paid - lead) / 4 * mask[i, t].item()) < 1e-7


@pytest.mark.parametrize("form", KL_FORMS)
@pytest.mark.parametrize("sizes", [[2, 2], [1, 1, 1, 1], [3, 1]])
def test_micro_batches_add_up(form, sizes):
    logps, ref, preference, mask = batch(1)

    def gradient(rows, totals=None):
        leaf = logps.clone().requires_grad_()
        return torch.autograd.grad(nash_md_loss(leaf[rows], ref[rows], preference[rows], mask[rows], kl=form,
                                                totals=totals)[0], leaf)[0]
    parts = [gradient(rows, Totals.of(mask)) for rows in torch.arange(4).split(sizes)]
    torch.testing.assert_close(sum(parts), gradient(slice(None)), **EXACT)


@pytest.mark.parametrize("form", KL_FORMS)
@pytest.mark.parametrize("junk", [1e9, math.inf, -math.inf, math.nan])
def test_padding_may_hold_anything(form, junk):
    logps, ref, preference, mask = batch(2)
    clean, _ = nash_md_loss(logps, ref, preference, mask, kl=form)
    leaf = logps.masked_fill(mask == 0, junk).requires_grad_()
    loss, stats = nash_md_loss(leaf, ref.masked_fill(mask == 0, junk), preference, mask, kl=form)
    torch.testing.assert_close(loss, clean, **EXACT)
    slope, = torch.autograd.grad(loss, leaf)
    assert slope.isfinite().all() and all(value.isfinite() for value in stats.values())


def test_a_batch_that_nobody_can_judge_goes_back_to_the_reference():
    logps, ref, _, mask = batch(3)
    unknown = torch.full((4,), torch.nan)
    loss, stats = nash_md_loss(logps, ref, unknown, mask)
    half, _ = nash_md_loss(logps, ref, torch.full((4,), 0.5), mask)
    assert loss == half and stats["preference"].isnan() and stats["frac_without_preference"] == 1
    assert nash_md_loss(ref, ref, unknown, mask)[0] == 0


def test_half_precision_is_summed_in_float32_and_rows_without_tokens_count():
    logps, ref, preference, mask = batch(4, torch.bfloat16)
    assert nash_md_loss(logps, ref, preference, mask)[0].dtype == torch.float32
    empty = mask.clone()
    empty[0] = 0
    loss, _ = nash_md_loss(logps.double(), ref.double(), preference, empty)
    short, _ = nash_md_loss(logps[1:].double(), ref[1:].double(), preference[1:], mask[1:])
    torch.testing.assert_close(loss * 4, short * 3, **EXACT)
    nothing = nash_md_loss(logps[:, :0], ref[:, :0], preference, mask[:, :0])[0]
    assert nothing == 0


@pytest.mark.parametrize("change, words", [
    (dict(kl="k3"), "unknown kl 'k3'"), (dict(preference=torch.zeros(4, 1)), "one probability per completion"),
    (dict(preference=torch.tensor([0.5, 1.2, 0, 0])), "got 1.2"),
    (dict(preference=torch.tensor([-1, 0, 0, 0])), "got -1")])
def test_bad_input_is_refused(change, words):
    logps, ref, preference, mask = batch()
    given = dict(logps=logps, ref_logps=ref, preference=preference, mask=mask) | change
    with pytest.raises(ValueError, match=words): nash_md_loss(**given)


# ---------------------------------------------------------------- explorers
def test_explorers_call_what_they_explain():
    P, start = simplex.cycle(0.9, 0.5, 0.9), simplex.START
    path = simplex.algorithm_path("Nash-MD", (0.9, 0.5, 0.9), 0.1, 0.3, 0.5)
    torch.testing.assert_close(path[1], nash_md_step(start, start, P, 0.3, 0.1, 0.5), **EXACT)
    path = simplex.algorithm_path("online DPO", (0.9, 0.5, 0.9), 0.1, 0.3)
    torch.testing.assert_close(path[-1], online_dpo_step(path[-2], start, P, 0.3, 0.4), **EXACT)
    runs = policy_simplex.sampled_paths((1.0, 0.5, 0.0), 0.0, True)
    assert torch.equal(runs, policy_simplex.sampled_paths.__wrapped__((1.0, 0.5, 0.0), 0.0, True))
