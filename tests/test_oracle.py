"""Recorded oracles: they answer for the inputs that they were recorded with, and a stale one is found."""
import functools
from dataclasses import dataclass

import pytest
import torch

import oracle as module
from oracle import (
    Answer,
    Sketch,
    close_weights,
    described,
    disagreement,
    models_in,
    oracle,
    pack,
    sketch,
    unpack,
    weights_of,
)


@pytest.fixture
def asks(tmp_path, monkeypatch):
    """A function that asks for a record of these inputs, and the list of live answers so far."""
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    for name in ("RECORDING", "LIVE"): monkeypatch.setattr(module, name, False)
    monkeypatch.setattr(module, "is_its_turn", lambda name: False)
    monkeypatch.setattr(module, "COUNTS", dict.fromkeys(module.COUNTS, 0))
    live = []
    def ask(inputs, gradient, loss=1.0):
        def run():
            live.append(inputs)
            return Answer([gradient], [{"loss": loss, "step_time": 3.0}])
        return oracle("a case", inputs, run, "some_tests")
    yield ask, live
    module.records.cache_clear()


@pytest.fixture
def gradient():
    return torch.randn(1000, dtype=torch.float64)


def recorded(monkeypatch, ask, *args):
    with monkeypatch.context() as patch:
        patch.setattr(module, "RECORDING", True)
        ask(*args)


def test_a_record_answers_for_its_inputs_alone(asks, gradient, monkeypatch):
    ask, live = asks
    recorded(monkeypatch, ask, {"beta": .1}, gradient)
    answer = ask({"beta": .1}, gradient)
    assert len(live) == 1 and isinstance(answer.gradients[0], Sketch) and answer.logs == [{"loss": 1.0}]
    assert ask({"beta": .2}, gradient).gradients[0] is gradient and len(live) == 2
    assert module.COUNTS == {"recorded": 1, "live": 0, "changed": 1}


@pytest.mark.parametrize("how", ["its turn", "POSTTRAIN_LIVE"])
def test_a_stale_record_is_found(asks, gradient, monkeypatch, how):
    ask, live = asks
    recorded(monkeypatch, ask, 1, gradient)
    if how == "its turn": monkeypatch.setattr(module, "is_its_turn", lambda name: True)
    else: monkeypatch.setattr(module, "LIVE", True)
    assert ask(1, gradient).gradients[0] is gradient and len(live) == 2
    with pytest.raises(AssertionError, match="gradients differ by .*tests/oracles/record.py"):
        ask(1, gradient + 1e-4 * torch.randn(1000))
    with pytest.raises(AssertionError, match="loss: 1.001 live, 1.0 recorded"):
        ask(1, gradient, 1.001)


def test_a_sketch_tells_the_size_of_a_difference(gradient):
    other = Sketch(sketch(gradient), gradient.norm().item())
    for scale in (1e-6, 1e-2):
        difference = scale * torch.randn(1000, dtype=torch.float64)
        for estimate in ((gradient + difference - other).norm(), (other - (gradient + difference)).norm()):
            # One standard error is 9 % with 64 projections.
            assert .6 < estimate / difference.norm() < 1.4
    assert (gradient - other).norm() == 0


def test_ten_turns_ask_each_trainer_once(monkeypatch):
    names = [f"case {n}" for n in range(200)]
    asked = []
    for turn in range(40, 50):
        monkeypatch.setattr(module, "turn", lambda turn=turn: turn)
        asked.append({name for name in names if module.is_its_turn(name)})
    assert set().union(*asked) == set(names) and sum(map(len, asked)) == len(names) and min(map(len, asked)) > 5


def by(weight):
    def reward(completions): return [weight * offset() for _ in completions]
    return reward


def offset(): return 1


def test_inputs_are_told_by_their_content(monkeypatch):
    one, two = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert not close_weights(weights_of(one), weights_of(two))
    two.load_state_dict(one.state_dict())
    assert close_weights(weights_of(one), weights_of(two)) and models_in([1, {"b": two, "a": [one]}]) == [one, two]
    with torch.no_grad(): two.weight[0, 0] *= 1 + 1e-7
    assert close_weights(weights_of(one), weights_of(two)), "noise of the last digit"
    with torch.no_grad(): two.weight[0, 0] += 1e-3
    assert not close_weights(weights_of(one), weights_of(two))
    assert described(one) == described(two) != described(torch.nn.Linear(2, 3))
    assert described(by(1)) == described(by(1)) != described(by(2)), "what a function takes from outside counts"
    assert "offset" in described(by(1)) and "Constant(value=1)" in described(by(1))
    with pytest.raises(TypeError, match="Tensor"): described(torch.ones(2))


LACKS = {"a key": lambda record: record["logs"][0].pop("kl"), "all keys": lambda record: record["logs"][0].clear(),
         "a row": lambda record: record.update(logs=[None]), "an evaluation": lambda record: record.update(eval=None),
         "a key of the evaluation": lambda record: record["eval"].pop("eval_loss"),
         "a part of a list": lambda record: record["logs"][0]["shares"].pop()}


def test_what_one_side_lacks_is_found(gradient):
    def answer(): return Answer([gradient], [{"loss": 1.0, "kl": .3, "shares": [1, 2], "step_time": 3.0}],
                                {"eval_loss": 2.0, "eval_runtime": 1.0})
    assert not disagreement(answer(), unpack(pack(answer())))
    for what, take in LACKS.items():
        record = pack(answer())
        take(record)
        assert disagreement(answer(), unpack(record)), what
    less = answer()
    del less.logs[0]["kl"]
    assert "kl: nothing live, 0.3 recorded" in disagreement(less, unpack(pack(answer())))
    less = answer()
    less.eval = None
    assert "eval_loss: nothing live" in disagreement(less, unpack(pack(answer())))
    assert disagreement(answer(), unpack(pack(Answer([gradient], [{**answer().logs[0], "loss": float("nan")}]))))


WEIGHTS, SCALES = {"right": 1.0}, [1.0]


def by_table(completions): return [WEIGHTS["right"] * SCALES[0] for _ in completions]
def by_default(completions, *, scales=SCALES): return [scales[0] for _ in completions]
@functools.cache
def cached(): return offset()
class Scorer:
    def __call__(self, completions): return [offset() for _ in completions]
    @property
    def scale(self): return SCALES[0]
class Heir(Scorer): pass
@dataclass
class Settings:
    scale: float = 1.0
    def scaled(self): return self.scale * offset()
def again(n): return 0 if n == 0 else other(n - 1)
def other(n): return again(n) + offset()


@pytest.mark.parametrize("thing", [by, by_table, by_default, cached, Scorer, Heir, Settings, again])
def test_what_is_used_at_any_depth_is_described(thing):
    "Tables, default values, and helpers of classes, of cached functions and of those that call one another."
    before, reads_scales = described(thing), thing in (by_table, by_default, Scorer, Heir)
    def is_changed_by(table, key, value):
        old, table[key] = table[key], value
        changed, table[key] = described(thing) != before, old
        return changed
    def offset(): return 2
    assert is_changed_by(SCALES, 0, 2.0) == reads_scales
    assert is_changed_by(WEIGHTS, "right", 2.0) == (thing is by_table)
    assert is_changed_by(globals(), "offset", offset) == (thing not in (by_table, by_default))


def test_constants_of_a_signature_are_in_the_code_alone():
    def plain(completions, scale=1.0, *, shift=None): return [scale for _ in completions]
    assert described(plain).endswith("{}")
