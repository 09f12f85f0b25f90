"""The checkers of exercises: whatever an answer does, the notebook goes on, and only a right one passes."""
import pytest
import torch

from posttrain.explore.exercises import checker, close, refused


@checker
def check(double):
    for x in (1.0, 2.0):
        assert close(double(x), 2 * x), f"twice {x} is {2 * x}, not {double(x)}"
    assert double(torch.ones(2)).sum() == 4, "it should also take a tensor"


def fails(error):
    def answer(x): raise error
    return answer


NO_ANSWERS = [..., None, (1, ...), {"a": ...}, lambda x: ..., lambda x: [..., x]]
BAD_ANSWERS = [3, "2x", [2], object(), lambda: 2, lambda x: None, lambda x: "2x", lambda x: [2 * x], lambda x: 3 * x,
               lambda x: torch.tensor([2 * x]), lambda x: 2 * float(x), fails(ZeroDivisionError()),
               fails(AssertionError()), fails(AssertionError("a\nb")), fails(StopIteration()), fails(Warning("w"))]


@pytest.mark.parametrize("answer", NO_ANSWERS)
def test_an_exercise_that_nobody_answered(answer):
    assert check(answer) == "not answered yet: write your answer in the place of `...`"


@pytest.mark.parametrize("answer", BAD_ANSWERS)
def test_no_wrong_answer_stops_the_notebook_or_passes(answer):
    verdict = check(answer)
    assert verdict.startswith("not yet: ") and "\n" not in verdict


def test_a_right_answer_passes_and_leaves_random_numbers_as_they_were():
    torch.manual_seed(1)
    want = torch.rand(1)
    torch.manual_seed(1)
    assert check(lambda x: 2 * x + 0 * torch.rand(()).item()) == "right"
    assert torch.equal(torch.rand(1), want)


def test_an_answer_that_raised_is_not_refused():
    assert refused(check(lambda x: 3 * x)) and not refused(check(lambda x: 2 * x))
    assert not any(refused(check(answer)) for answer in (..., fails(NameError("lgo")), lambda x: None))
    assert not refused()  # nothing was asked
