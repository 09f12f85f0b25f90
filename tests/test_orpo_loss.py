"""The odds ratio against TRL 1.16's own function: each pair's loss and both gradients; and where the two part."""
from types import SimpleNamespace

import pytest
import torch

from posttrain.offline.orpo import odds_ratio

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def theirs():
    """TRL's loss of (chosen, rejected) mean log-probs: it returns beta times log sigma of the log odds ratio, which
    its trainer subtracts."""
    import trl
    assert trl.__version__ == "1.16.0", "the reference is TRL 1.16.0; install the dev extra with -c constraints.txt"
    from trl.experimental.orpo import ORPOTrainer
    trainer = SimpleNamespace(beta=1.0, accelerator=SimpleNamespace(device="cpu"))
    return lambda chosen, rejected: -ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0]


def value_and_gradients(loss, chosen, rejected):
    chosen, rejected = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    value = loss(chosen, rejected)
    return value.detach(), *torch.autograd.grad(value.sum(), (chosen, rejected))


@pytest.mark.parametrize("scale", (1e-6, 1e-3, .1, 1., 10., 100.))
def test_loss_and_gradients_equal_trl(theirs, scale):
    chosen, rejected = -scale * (torch.rand(2, 200) + .1)
    for ours, other in zip(value_and_gradients(odds_ratio, chosen, rejected),
                           value_and_gradients(theirs, chosen, rejected)):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chosen, rejected", [(0., -1.), (-1., 0.), (0., 0.), (-1e-8, -1.), (-1., -1e-8)])
def test_an_all_but_certain_answer_is_nan_in_trl_and_finite_here(theirs, chosen, rejected):
    pair = torch.tensor([chosen]), torch.tensor([rejected])
    assert any(not t.isfinite().all() for t in value_and_gradients(theirs, *pair))
    assert all(t.isfinite().all() for t in value_and_gradients(odds_ratio, *pair))
