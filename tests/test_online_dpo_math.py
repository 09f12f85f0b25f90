"""Online DPO and XPO: what the lessons' checks leave out. Random batches against loops, and states that come back."""
import json
import math

import pytest
import torch

from posttrain.explore import bandit, online_offline
from posttrain.foundations.preferences import Pairs, split_pairs
from posttrain.offline.preference_zoo import PAIR_LOSSES
from posttrain.online.online_dpo import (
    chosen_first,
    identical_pairs,
    online_dpo_loss,
    preference_of_scores,
    preferred,
    win_rate_and_error,
    with_eos_penalty,
)
from posttrain.online.xpo import ReferenceSamples, xpo_bonus, xpo_loss

NAN = math.nan


def generator(seed=0): return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- labels
def test_empty_batches_have_no_labels_and_no_loss():
    none = torch.zeros(0, dtype=torch.float64)
    assert preference_of_scores(none).shape == (0,) and chosen_first(none).shape == (0,)
    first, known = preferred(none)
    assert first.shape == known.shape == (0,)
    loss, _ = online_dpo_loss(none, known)
    assert loss == 0
    loss, stats = xpo_loss(none, none, alpha=0.1)
    assert loss == stats["dpo"] == stats["xpo"] == 0
    assert math.isnan(identical_pairs([]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_scores_of_any_type_become_preferences(dtype):
    scores = torch.tensor([3, 1, 2, 2, 0, 5]).to(dtype)
    p = preference_of_scores(scores)
    assert p.dtype == torch.float64 and not p.requires_grad
    torch.testing.assert_close(p, torch.tensor([2.0, 0.0, -5.0], dtype=torch.float64).sigmoid())
    assert chosen_first(p).tolist() == [0, 1, 2, 3, 5, 4]


def test_scores_carry_no_gradient():
    scores = torch.randn(8, requires_grad=True)
    assert not preference_of_scores(scores).requires_grad


def test_infinite_scores():
    p = preference_of_scores(torch.tensor([math.inf, 0.0, 0.0, math.inf, math.inf, math.inf]))
    assert p[:2].tolist() == [1.0, 0.0] and p[2].isnan()
    assert preferred(p)[1].tolist() == [True, True, False]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("penalty", [0.0, 0.3, 1.0, 4.0])
def test_the_penalty_has_one_meaning(seed, penalty):
    g = generator(seed)
    scores = torch.randint(-4, 5, (200,), generator=g).double() / 4
    ended = torch.rand(200, generator=g) < 0.5
    from_scores = preference_of_scores(scores - penalty * (~ended).double())
    from_preferences = with_eos_penalty(preference_of_scores(scores), ended, penalty)
    torch.testing.assert_close(from_preferences, from_scores, rtol=1e-9, atol=1e-12)
    for a, b in zip(preferred(from_preferences), preferred(from_scores)): assert torch.equal(a, b)


def test_the_penalty_is_monotone_and_leaves_the_unknown_unknown():
    p, ended = torch.tensor([0.7, NAN, 0.5, 1.0]).double(), torch.tensor([False, True] * 4)
    seen = torch.stack([with_eos_penalty(p, ended, c) for c in (0.0, 0.5, 1.0, 2.0)])
    assert (seen[1:, [0, 2]] < seen[:-1, [0, 2]]).all() and seen[:, 1].isnan().all() and (seen[:, 3] == 1).all()
    both_cut = with_eos_penalty(p, torch.zeros(8, dtype=torch.bool), 3.0)
    torch.testing.assert_close(both_cut, p, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", sorted(set(PAIR_LOSSES) - {"aot", "aot_unpaired", "sft", "exo_pair"}))
def test_swapping_all_pairs_changes_nothing(name):
    g = generator(1)
    logps, ref = torch.randn(2, 12, generator=g).double().unbind(0)
    scores = torch.randint(0, 3, (12,), generator=g).double()
    swap = torch.arange(12).view(-1, 2).flip(1).flatten()

    def loss_of(logps, ref, scores):
        p = preference_of_scores(scores)
        order = chosen_first(p)
        pairs = Pairs(*split_pairs(logps[order]), *split_pairs(ref[order]))
        return online_dpo_loss(PAIR_LOSSES[name](pairs, beta=0.4), preferred(p)[1])[0]

    torch.testing.assert_close(loss_of(logps, ref, scores), loss_of(logps[swap], ref[swap], scores[swap]))
    # ties alone: nothing to learn, whatever the loss says of them
    assert loss_of(logps, ref, torch.zeros(12).double()) == 0


def test_a_tie_has_no_gradient_even_if_its_loss_is_not_a_number():
    losses = torch.tensor([0.4, NAN, math.inf, 0.6], requires_grad=True)
    known = torch.tensor([True, False, False, True])
    loss, stats = online_dpo_loss(losses, known)
    loss.backward()
    assert abs(loss.item() - 0.25) < 1e-7 and losses.grad.tolist() == [0.25, 0, 0, 0.25] and stats["frac_ties"] == 0.5


def test_refusals():
    for wrong in ([1.5], [-0.1], [0.5, 2.0]):
        with pytest.raises(ValueError, match="from 0 to 1"): preferred(torch.tensor(wrong))
    with pytest.raises(ValueError, match="0 or more"):
        with_eos_penalty(torch.tensor([0.5]), torch.tensor([True, True]), -1)
    with pytest.raises(ValueError, match="one of each per pair"):
        online_dpo_loss(torch.zeros(3), torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="even number"): identical_pairs([[1]])
    with pytest.raises(ValueError, match="alpha"): xpo_loss(torch.zeros(2), torch.zeros(2), alpha=-1e-3)
    with pytest.raises(ValueError, match="no answers"): ReferenceSamples().draw(3)
    with pytest.raises(ValueError): ReferenceSamples().add([[1]], [])


def test_win_rate():
    assert win_rate_and_error(torch.tensor([0.5, 0.5])) == (0.5, 0)
    rate, error = win_rate_and_error(torch.tensor([NAN, 1.0, NAN]))
    assert rate == 1 and math.isnan(error)
    assert all(map(math.isnan, win_rate_and_error(torch.tensor([NAN]))))


# ---------------------------------------------------------------- XPO
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bonus_is_a_sum_over_counted_tokens_in_float32_or_better(dtype):
    logps = -torch.rand(4, 30, generator=generator(2)).to(dtype) * 20
    mask = (torch.rand(4, 30, generator=generator(3)) < 0.7).long()
    got = xpo_bonus(logps, mask)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    want = torch.stack([sum((x.double() for x, m in zip(*row) if m), torch.zeros(()).double())
                        for row in zip(logps, mask)])
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("sizes", [[8], [4, 4], [1] * 8, [5, 3]])
def test_one_gradient_for_any_split(sizes):
    g = generator(4)
    z = torch.randn(6, generator=g).double().requires_grad_()
    won, lost, theirs = (torch.randint(6, (8,), generator=g) for _ in range(3))
    known = torch.rand(8, generator=g) < 0.7
    ref = torch.full((6,), 1 / 6).double().log()

    def gradient(parts):
        total = 0
        for rows in parts:
            logps = z.log_softmax(0)
            pairs = Pairs(logps[won[rows]], logps[lost[rows]], ref[won[rows]], ref[lost[rows]])
            loss, _ = xpo_loss(PAIR_LOSSES["sigmoid"](pairs, beta=0.3), logps[theirs[rows]], alpha=0.05,
                               has_preference=known[rows], pairs=8, answers=8)
            total = total + torch.autograd.grad(loss, z)[0]
        return total

    parts, whole = gradient(torch.arange(8).split(sizes)), gradient([torch.arange(8)])
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-14)


def test_the_bonus_leads_away_from_the_reference():
    ref = torch.tensor([0.5, 0.3, 0.2]).double()
    z = (ref.log() + torch.tensor([0.2, -0.1, 0.0])).requires_grad_()
    far = []
    for _ in range(20):
        far.append((ref * (ref.log() - z.detach().log_softmax(0))).sum().item())
        loss, _ = xpo_loss(torch.zeros(1).double(), ref * z.log_softmax(0), alpha=1.0, answers=1)
        z = (z - 0.5 * torch.autograd.grad(loss, z)[0]).detach().requires_grad_()
    assert all(a < b for a, b in zip(far, far[1:]))


def test_replay_goes_on_after_a_stop_at_any_place():
    rounds = [([[i], [i, i]], [[i, 1], [i, 2]]) for i in range(40)]
    whole = ReferenceSamples(keep=16, seed=5)
    for stop in (0, 3, 8, 39):
        whole = ReferenceSamples(keep=16, seed=5)
        for prompts, answers in rounds[:stop]: whole.add(prompts, answers)
        back = ReferenceSamples(keep=16, seed=5)
        back.load_state_dict(json.loads(json.dumps(whole.state_dict())))
        for one in (whole, back):
            for prompts, answers in rounds[stop:]: one.add(prompts, answers)
        assert whole == back and whole.draw(9) == back.draw(9) and len(back.answers) == 16 and back.added == 80
    # the caller's lists stay his own
    mine = [[1, 2]]
    whole = ReferenceSamples()
    whole.add(mine, mine)
    mine[0].append(3)
    assert whole.answers == [[1, 2]]


def test_replay_estimates_the_mean_over_all_rounds():
    store = ReferenceSamples(keep=64, seed=0)
    store.add([[0]] * 1000, [[k] for k in range(1000)])
    draws = []
    for seed in range(300):
        one = ReferenceSamples(keep=64, seed=seed)
        one.add([[0]] * 1000, [[k] for k in range(1000)])
        draws += [answer[0] for answer in one.draw(8)[1]]
    mean = sum(draws) / len(draws)
    assert abs(mean - 499.5) < 4 * 289 / len(draws)**0.5


# ---------------------------------------------------------------- the explorers' worlds
def test_the_bandit_needs_the_bonus_and_not_too_much_of_it():
    # medians of twenty runs
    def end(alpha): return bandit.bandit_run(alpha)["policies"][-1, :, bandit.BEST].exp().median()
    ends = {alpha: end(alpha) for alpha in (0.0, 0.03162, 1.0)}
    assert ends[0.0] < 0.01 < 0.9 < ends[0.03162] and ends[1.0] < 0.05


@pytest.mark.parametrize("seed", range(3))
def test_fresh_pairs_win_more_than_frozen_ones(seed):
    runs = (online_offline.online_run(kept, seed) for kept in (False, True))
    online, frozen = (online_offline.wins(run[-1]["policy"]) for run in runs)
    assert online > frozen + 0.05 and frozen > 0.75
