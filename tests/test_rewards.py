"""Rewards: the usual functions against TRL's, and what `Rewards` does with every kind of function and of mistake."""
import asyncio
import functools
import logging
import math
import pickle
import random
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from transformers import Qwen3ForSequenceClassification

from posttrain import pocket
from posttrain.rollout.judges import win_rate_reward
from posttrain.rollout.reward_models import ModelReward
from posttrain.rollout.rewards import (
    accuracy_reward,
    exact_match_reward,
    get_cosine_scaled_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    reasoning_accuracy_reward,
    text_of,
    think_format_reward,
    total,
)
from posttrain.rollout.score import Rewards

user = lambda text: [{"role": "user", "content": text}]
said = lambda text: [{"role": "assistant", "content": text}]
ROWS = dict(prompts=["add 1+1=", "add 2+1=", "add 2+2="], completions=["2", "4", "four"],
            completion_ids=[[1], [2], [3, 4]])


# ---------------------------------------------------------------- the usual functions, against TRL
ANSWERS = [r"\boxed{72}", "72", "The answer is $72$.", r"The final answer is \(72\).", r"\[72\]",
           r"\boxed{71} then \boxed{72}", r"\boxed{72} and \boxed{72}", r"\boxed{71,72}", r"\boxed{x=72}", r"\boxed{72",
           r"\boxed{72.0}", r"\boxed{72\text{ apples}}", r"\boxed{\frac{144}{2}}", r"\boxed{36+36}", r"\boxed{\$72}",
           r"\boxed{}", "", "#### 72", r"\boxed{-72}", r"\boxed{\frac{1}{3}}", r"\boxed{1/3}", r"\boxed{0.3333333333}",
           r"\boxed{x^2+2x+1}", r"\boxed{(x+1)^2}", r"\boxed{\sqrt{12}}", r"\boxed{(1,2)}", r"\boxed{\{2,1\}}",
           r"\boxed{\text{Monday}}", r"\boxed{50\%}", "<think>\\boxed{71}</think> \\boxed{72}"]
SOLUTIONS = ["72", r"$72$", "Natalia sold 48+24 = <<48+24=72>>72 clips altogether.\n#### 72", r"\frac{1}{3}",
             r"$(x+1)^2$", r"$2\sqrt{3}$", r"\boxed{\{1,2\}}", r"$\text{Monday}$", "0.5", "Answer is forty-two.", ""]


@pytest.mark.parametrize("solution", SOLUTIONS)
def test_accuracy_equals_trl(solution):
    from trl.rewards import accuracy_reward as theirs
    expected = theirs([said(a) for a in ANSWERS], [solution] * len(ANSWERS))
    solutions = [solution] * len(ANSWERS)
    assert accuracy_reward(ANSWERS, solutions) == accuracy_reward([said(a) for a in ANSWERS], solutions) == expected
    assert None in expected or 1.0 in expected  # a table in which nothing is right would prove little


def test_accuracy_of_references_that_trl_misreads():
    """An unmarked formula: TRL takes a number in it, or nothing, for all of it."""
    from trl.rewards import accuracy_reward as theirs
    for reference, good, bad in [(r"2\sqrt{3}", r"\sqrt{12}", "2"), ("y=2x", "2x", "2"), ("2+3i", "3i+2", "2"),
                                 ("5!", "120", "5"), ("x^2", "x^2", "2"), ("(1,2)", "(1,2)", "(1,3)"),
                                 ("1, 2", r"\{1,2\}", "2")]:
        completions = [rf"\boxed{{{good}}}", rf"\boxed{{{bad}}}"]
        assert accuracy_reward(completions, [reference] * 2) == [1, 0], reference
        assert accuracy_reward(completions, [f"${reference}$"] * 2) == [1, 0], reference
        assert theirs([said(c) for c in completions], [reference] * 2) != [1, 0]
    assert accuracy_reward([r"\boxed{72}"] * 4, [72, 72.0, None, "x is 72"]) == [1, 1, None, 1]


def test_accuracy_tells_what_it_read():
    from trl.rewards import accuracy_reward as theirs
    ours_table, trl_table = {}, {}
    accuracy_reward(ANSWERS[:3], ["72", "72", "words"], log_extra=ours_table.__setitem__)
    theirs([said(a) for a in ANSWERS[:3]], ["72", "72", "words"], log_extra=trl_table.__setitem__)
    assert ours_table.keys() == trl_table.keys() and ours_table["solution"] == trl_table["solution"]
    assert ours_table["answer_parsed"] == ["72", "[unparseable]", "[no reference]"]


def test_reasoning_accuracy_equals_trl():
    from trl.rewards import reasoning_accuracy_reward as theirs
    contents = [r"<think>hm</think> \boxed{72}", r"<think>\boxed{72}</think> \boxed{71}", r"<think>\boxed{72}",
                r"\boxed{72}", r"</think></think>\boxed{72}", r"a</think>\boxed{71}</think>\boxed{72}", "",
                r"<think>x</think>"]
    for kw in ({}, {"reasoning_delimiters": ["</think>"]}, {"reasoning_delimiters": ["\\boxed"]},
               {"reasoning_delimiters": []}):
        expected = theirs([said(c) for c in contents], ["72"] * len(contents), **kw)
        assert reasoning_accuracy_reward(contents, ["72"] * len(contents), **kw) == expected
    # Where several delimiters occur, TRL cuts at the first of the list; its documentation and we: at the last in the
    # text.
    twice, both = [r"a</think>\boxed{71}<end>\boxed{72}"], ["</think>", "<end>"]
    assert reasoning_accuracy_reward(twice, ["72"], both) == reasoning_accuracy_reward(twice, ["72"], both[::-1]) == [1]
    assert theirs([said(twice[0])], ["72"], both) == [0]
    # A reference that cannot be parsed judges nobody; TRL gives 0 to unfinished reasoning and None to the others.
    assert reasoning_accuracy_reward(["<think>", r"</think>\boxed{1}"], ["words"] * 2) == [None, None]


def test_accuracy_off_the_main_thread(caplog):
    """math-verify's alarms exist in the main thread only; elsewhere it would raise. Its own advice is not passed on,
    its loggers are left as they were."""
    found = []
    with caplog.at_level(logging.WARNING):
        thread = threading.Thread(
            target=lambda: found.append(accuracy_reward([r"\boxed{72}", r"\boxed{71}"], ["72", "72"])))
        thread.start()
        thread.join()
    assert found == [[1, 0]] and "Timeout is disabled" not in caplog.text
    assert logging.getLogger("math_verify.parser").level == logging.NOTSET


def test_accuracy_comes_back_from_an_endless_expression(monkeypatch):
    from posttrain.rollout import math_rewards
    monkeypatch.setattr(math_rewards, "_COMPARING_LIMIT", 1)
    start, table = time.perf_counter(), {}
    assert accuracy_reward([r"\boxed{9^{9^{9}}}", r"\boxed{72}"], ["72", "72"], log_extra=table.__setitem__) == [0, 1]
    assert time.perf_counter() - start < 8 and table["answer_parsed"] == ["9^{9^{9}}", "72"]


def test_think_format_equals_trl():
    from trl.rewards import think_format_reward as theirs
    rng = random.Random(0)
    pieces = ["<think>", "</think>", "\n", "a", " ", "<think", "think>", "answer", "<THINK>"]
    texts = ["".join(rng.choices(pieces, k=rng.randint(0, 6))) for _ in range(3000)] + ["<think>\nx\n</think>\ny"]
    expected = theirs([said(t) for t in texts])
    assert think_format_reward(texts) == expected and 20 < sum(expected) < 1000


def test_lengths_and_repetition_equal_trl():
    from trl import rewards as trl
    rng = random.Random(0)
    ids = [[rng.randrange(k) for _ in range(n)] for n in range(0, 130) for k in (1, 2, 50)]
    for limit, cache in [(100, 20), (100, 0), (100, 100), (1, 1), (37, 12), (0, 0)]:
        theirs = trl.get_soft_overlong_punishment(limit, cache)(completion_ids=ids)
        assert get_soft_overlong_punishment(limit, cache)(ids) == theirs
    for n, penalty in [(1, -1.0), (2, -0.5), (3, -1.0), (5, -3.0), (200, -1.0), (3, 0.0)]:
        ours = get_repetition_penalty_reward(n, penalty)(ids)
        theirs = trl.get_repetition_penalty_reward(n, penalty)(completion_ids=ids)
        assert ours == pytest.approx(theirs) and not any(math.copysign(1, r) < 0 for r in ours if r == 0)
    completions = [rf"\boxed{{{i % 3}}}" for i in range(len(ids))]
    solution = [("1", "2", "words")[i % 7 % 3] for i in range(len(ids))]
    for args in [(100,), (50, -2.0, -1.0, 0.0, 4.0), (1,)]:
        ours = get_cosine_scaled_reward(*args)(completions, solution, ids)
        theirs = trl.get_cosine_scaled_reward(*args)([said(c) for c in completions], solution, ids)
        assert [r is None for r in ours] == [r is None for r in theirs]
        assert [r for r in ours if r is not None] == pytest.approx([r for r in theirs if r is not None])


def test_made_rewards_have_trls_names_and_can_be_sent_to_a_process():
    from trl import rewards as trl
    args = {"get_soft_overlong_punishment": (9, 3), "get_repetition_penalty_reward": (2,),
            "get_cosine_scaled_reward": (9,)}
    for make in (get_soft_overlong_punishment, get_repetition_penalty_reward, get_cosine_scaled_reward):
        made, theirs = make(*args[make.__name__]), getattr(trl, make.__name__)(*args[make.__name__])
        assert Rewards(made).names == [theirs.__name__] and pickle.loads(pickle.dumps(made)) == made


@pytest.mark.parametrize("make, words", [
    (lambda: get_soft_overlong_punishment(10, 11), "soft_punish_cache=11"),
    (lambda: get_soft_overlong_punishment(10, -1), "soft_punish_cache=-1"),
    (lambda: get_cosine_scaled_reward(0), "max_len=0"),
    (lambda: get_repetition_penalty_reward(0), "ngram_size=0"),
    (lambda: get_repetition_penalty_reward(3, 0.1), "max_penalty=0.1"),
    (lambda: get_repetition_penalty_reward(3, math.nan), "max_penalty=nan")])
def test_values_out_of_range(make, words):
    with pytest.raises(ValueError, match=words): make()


def test_exact_match():
    rows = pocket.dataset("reverse", "prompt_only", n=20)
    assert exact_match_reward([a + " \n" for a in rows["answer"]], **rows[:]) == [1] * 20
    assert exact_match_reward([said(a + "1") for a in rows["answer"]], rows["answer"]) == [0] * 20
    Rewards(exact_match_reward).check(rows.column_names)
    with pytest.raises(TypeError, match="'exact_match_reward' needs one of the columns 'answer', 'solution'"):
        Rewards(exact_match_reward).check(["prompt", "gold"])


def test_text_of():
    parts = [{"type": "text", "text": "a"}, {"type": "image", "image": None}, {"type": "text", "text": "b"}]
    for completion in ("ab", said("ab"), said(parts), [*said("x"), {"role": "tool", "content": "y"}, *said("ab")],
                       [*said("ab"), {"role": "tool", "content": "y"}], [{"content": "ab"}]):
        assert text_of(completion) == "ab"
    assert text_of(said(None)) == text_of([{"role": "assistant", "tool_calls": []}]) == ""
    for wrong in (None, 3, [], ["ab"], {"content": "ab"}):
        with pytest.raises(TypeError, match="a string or a list of messages"): text_of(wrong)


# ---------------------------------------------------------------- what a trainer holds
def test_functions_get_what_they_ask_for():
    seen = {}
    def everything(**kwargs): seen["everything"] = kwargs; return [1] * 3
    def some(completions, level, trainer_state): seen["some"] = (completions, level, trainer_state); return [1] * 3
    def default(level, more="left alone", *, prompts): seen["default"] = (level, more, prompts); return (1, 2, 3)
    class Judge:
        def __call__(self, completion_ids, **kwargs): seen["judge"] = completion_ids; return np.array([1, 2, 3])
        def method(self, completions): return torch.ones(3, requires_grad=True)
    columns = {"level": ["a", "b", "c"], "prompt": [0, 0, 0], "completion": [0, 0, 0]}
    rewards = Rewards([everything, some, default, Judge(), Judge().method, functools.partial(default, more="set")])
    r = rewards(**ROWS, columns=columns, trainer_state="state")
    assert r.shape == (3, 6) and r.dtype == torch.float32 and not r.requires_grad and r[:, 2].tolist() == [1, 2, 3]
    # as TRL: no `prompt`, no `completion`
    assert seen["everything"].keys() == {"prompts", "completions", "completion_ids", "level", "trainer_state",
                                         "log_extra", "log_metric"}
    assert seen["some"] == (ROWS["completions"], columns["level"], "state")
    assert seen["default"] == (columns["level"], "set", ROWS["prompts"]) and seen["judge"] == ROWS["completion_ids"]
    assert rewards.names == ["everything", "some", "default", "Judge", "method", "default_2"]
    r = Rewards(functools.partial(default, more="set"))(**ROWS, columns={**columns, "more": [1, 2, 3]})
    assert seen["default"][1] == "set"  # a column does not replace what a partial has settled


def test_logging_reaches_the_trainer_and_may_be_absent():
    def talks(completions, log_extra, log_metric, **kwargs):
        log_extra("length", [len(c) for c in completions]); log_metric("longest", max(map(len, completions)))
        return [0.0] * len(completions)
    extra, metrics = {}, {}
    Rewards(talks)(**ROWS, log_extra=extra.__setitem__, log_metric=metrics.__setitem__)
    assert extra == {"length": [1, 1, 4]} and metrics == {"longest": 4}
    assert Rewards(talks)(**ROWS).tolist() == [[0], [0], [0]]


def test_functions_get_copies_of_all_that_can_change():
    class Note:
        def __init__(self): self.words = []
    columns = {"array": [np.zeros(2) for _ in range(3)], "pair": [([], "a") for _ in range(3)],
               "note": [Note() for _ in range(3)], "many": [{1} for _ in range(3)], "lock": [threading.Lock()] * 3}
    def writes(array, pair, note, many, lock):
        for row in range(3):
            array[row][:] = 9
            pair[row][0].append("spoilt")
            note[row].words.append("spoilt")
            many[row].clear()
        return [0.0] * 3
    seen = []
    def reads(array, pair, note, many, lock):
        seen.extend(zip([a.tolist() for a in array], pair, [n.words for n in note], many, lock))
        return [0.0] * 3
    Rewards([writes, reads])(**ROWS, columns=columns)
    expected = ([0.0, 0.0], ([], "a"), [], {1}, columns["lock"][0])  # a lock refuses to be copied
    assert seen == [expected] * 3
    assert [a.tolist() for a in columns["array"]] == [[0.0, 0.0]] * 3 and columns["pair"] == [([], "a")] * 3


@pytest.mark.parametrize("buffer", [lambda: [0.0] * 3, lambda: torch.zeros(3), lambda: np.zeros(3)],
                         ids=["list", "tensor", "array"])
def test_functions_may_return_one_buffer(buffer):
    shared = buffer()
    def fill(value):
        for row in range(3): shared[row] = value
        return shared
    def one(completions): return fill(1.0)
    def two(completions): return fill(2.0)
    async def three(completions):
        await asyncio.sleep(.02)
        return fill(3.0)
    async def four(completions):
        await asyncio.sleep(.2)
        return fill(4.0)
    assert Rewards([one, two, three, four])(**ROWS).tolist() == [[1, 2, 3, 4]] * 3


def numeric(completions, **kwargs): return [float(c) if c.isdigit() else None for c in completions]


@pytest.fixture
def judge():
    torch.manual_seed(0)
    return Qwen3ForSequenceClassification(pocket.config(num_labels=1, attention_dropout=0.5))


@pytest.fixture
def tokenizer(): return pocket.tokenizer()


def alone(model, tokenizer, text):
    "The model's own forward on one text."
    with torch.no_grad():
        return model.eval()(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0, 0].item()


def test_functions_async_functions_and_models_together(judge, tokenizer):
    meeting = []
    async def first(completions, **kwargs):
        meeting.append("first")
        while "second" not in meeting: await asyncio.sleep(0.001)  # would wait for ever if the other came after it
        return [1.0, None, 3.0]
    class Second:
        async def __call__(self, completions):
            while "first" not in meeting: await asyncio.sleep(0.001)
            meeting.append("second")
            return torch.tensor([4.0, 5.0, 6.0])
    def hidden(completions): return Second()(completions)  # returns something to await without being `async def`
    rewards = Rewards([numeric, first, judge, Second(), hidden], weights=[1, 2, 0, 0.5, 0],
                      processing_classes=[None, None, tokenizer, None, None])
    expected = torch.tensor([[2, 1, 0, 4, 4], [4, math.nan, 0, 5, 5], [math.nan, 3, 0, 6, 6]])
    texts = [p + c for p, c in zip(ROWS["prompts"], ROWS["completions"])]
    expected[:, 2] = torch.tensor([alone(judge, tokenizer, text) for text in texts])
    def ask():
        meeting.clear()
        torch.testing.assert_close(rewards(**ROWS), expected, equal_nan=True, rtol=0, atol=1e-5)
    ask()
    async def inside(): ask()  # as in Jupyter: a loop is running in this thread
    asyncio.run(inside())
    torch.testing.assert_close(total(expected, rewards.weights), torch.tensor([2 + 2 + 2, 4 + 2.5, 6 + 3.0]))


def test_async_functions_find_the_same_loop_and_wait_while_others_compute():
    loops, order = [], []
    async def client(completions):
        loops.append(asyncio.get_running_loop()); order.append("asked")
        await asyncio.sleep(0.05)
        order.append("answered")
        return [0.0] * len(completions)
    def computes(completions):
        while "asked" not in order: time.sleep(0.001)
        order.append("computed")
        return [0.0] * len(completions)
    rewards = Rewards([computes, client])  # the asynchronous one starts first, wherever it stands
    for _ in range(3):
        order.clear()
        rewards(**ROWS)
        assert order[0] == "asked" and set(order) == {"asked", "computed", "answered"}
    assert len(set(map(id, loops))) == 1


def test_an_error_cancels_those_who_wait():
    cancelled = threading.Event()
    async def waits(completions):
        try: await asyncio.sleep(60)
        except asyncio.CancelledError: cancelled.set(); raise
    def breaks(completions): time.sleep(0.05); raise KeyError("x")
    start = time.perf_counter()
    with pytest.raises(RuntimeError, match="'breaks'"): Rewards([waits, breaks])(**ROWS)
    assert cancelled.wait(5) and time.perf_counter() - start < 10


def test_none_is_not_applicable():
    match = r"1 of 3 completions.*'numeric'.*row 2: prompts 'add 2\+2=', completions 'four', answer 'c'"
    with pytest.warns(UserWarning, match=match):
        rewards = Rewards([numeric, lambda **kw: [None] * 3])
        r = rewards(**ROWS, columns={"answer": ["a", "b", "c"]})
    assert r[:, 0].tolist()[:2] == [2, 4] and r[2].isnan().all() and r[:, 1].isnan().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rewards(**ROWS, columns={"answer": ["a", "b", "c"]})  # said once
    sums = total(r, rewards.weights)
    assert sums[:2].tolist() == [2, 4] and sums[2].isnan()


@pytest.mark.parametrize("returned", [
    [1, True, 0.5], (1, 1.0, 0.5), np.array([1, 1, 0.5]), torch.tensor([1, 1, 0.5], dtype=torch.bfloat16),
    [np.float32(1), torch.tensor(1), np.bool_(True) * 0.5]])
def test_numbers_in_any_container(returned):
    assert Rewards(lambda **kw: returned)(**ROWS)[:, 0].tolist() == [1, 1, 0.5]


# ---------------------------------------------------------------- mistakes
def raised(error, functions, columns=None, rows=ROWS, **kw):
    with pytest.raises(error) as caught: Rewards(functions, **kw)(**rows, columns=columns or {})
    return str(caught.value), caught.value


def test_a_reward_that_raises_is_called_once():
    calls = []
    def parses(completions, **kwargs): calls.append(len(completions)); return [float(int(c)) for c in completions]
    async def later(completions): calls.append(len(completions)); return [1 / (c != "4") for c in completions]
    for function, kind in [(parses, ValueError), (later, ZeroDivisionError)]:
        calls.clear()
        message, error = raised(RuntimeError, [numeric, function])
        for word in (f"reward '{function.__name__}' raised {kind.__name__}", "locate_failing_reward=True",
                     "the batch begins with row 0: prompt 'add 1+1='"):
            assert word in message
        assert isinstance(error.__cause__, kind) and calls == [3]
    message, _ = raised(RuntimeError, parses, rows={name: values[2:] for name, values in ROWS.items()})
    assert "row 0: prompt 'add 2+2=', completion 'four'" in message  # there is no other row
    assert "locate_failing_reward" not in message


def test_a_function_that_stops_an_iteration_has_raised():
    message, error = raised(RuntimeError, lambda completions: [next(iter([])) for _ in completions])
    assert "raised StopIteration" in message and isinstance(error.__cause__, StopIteration)


def test_a_reward_that_raises_names_the_row():
    calls = []
    def parses(completions, solution, **kwargs):
        calls.append(len(completions))
        return [float(int(c) == int(s)) for c, s in zip(completions, solution)]
    message, error = raised(RuntimeError, [numeric, parses], {"solution": ["2", "3", "4"], "other": [7, 8, 9]},
                            locate_failing_reward=True)
    for word in ("reward 'parses' raised ValueError", "invalid literal for int() with base 10: 'four'", "row 2",
                 "prompt 'add 2+2='", "completion 'four'", "solution '4'"):
        assert word in message
    assert "'add 1+1='" not in message and isinstance(error.__cause__, ValueError) and calls == [3, 1, 1, 1]

    async def later(completions): await asyncio.sleep(0); return [1 / (c != "4") for c in completions]
    message, error = raised(RuntimeError, [later, numeric], locate_failing_reward=True)
    assert "'later' raised ZeroDivisionError" in message and "row 1: prompt 'add 2+1=', completion '4'" in message
    assert isinstance(error.__cause__, ZeroDivisionError)


def test_a_reward_that_raises_only_for_the_batch_or_by_its_state():
    def together(completions):
        if len(completions) > 1: raise OSError("too much")
        return [0.0]
    message, _ = raised(RuntimeError, together, locate_failing_reward=True)
    assert "'together' raised OSError: too much" in message and "row 0: prompt 'add 1+1='" in message
    assert "scored one by one, no completion raised it again" in message
    def batches_only(completions): raise OSError("too much") if len(completions) > 1 else TypeError("not a batch")
    message, _ = raised(RuntimeError, batches_only, locate_failing_reward=True)
    # another error says nothing about the row
    assert "OSError: too much" in message and "no completion raised it again" in message
    logged = []
    def logs(completions, log_metric): log_metric("n", len(completions)); raise ValueError
    rewards = Rewards(logs, locate_failing_reward=True)
    with pytest.raises(RuntimeError): rewards(**ROWS, log_metric=lambda name, value: logged.append(value))
    assert logged == [3]  # while the row is searched nothing is logged a second time


def test_the_search_for_the_row_ends(monkeypatch):
    from posttrain.rollout import score
    monkeypatch.setattr(score, "_SEARCH_SECONDS", 0.1)
    def slow(completions):
        if len(completions) > 1: raise ValueError("no")
        time.sleep(0.06)
        return [0.0]
    start = time.perf_counter()
    raised(RuntimeError, slow, rows={k: v * 100 for k, v in ROWS.items()}, locate_failing_reward=True)
    assert 0.1 < time.perf_counter() - start < 5


@pytest.mark.parametrize("returned, error, words", [
    ([1.0], ValueError, ["1 values for 3 completions", "one each", "'add 1+1='"]),
    ([1.0] * 4, ValueError, ["4 values for 3"]), (torch.ones(2), ValueError, ["2 values"]),
    (1.0, TypeError, ["returned 1.0", "expected a list"]), (None, TypeError, ["returned None"]),
    ("abc", TypeError, ["returned 'abc'"]), ({"a": 1}, TypeError, ["expected a list"]),
    (torch.ones(3, 1), TypeError, ["Tensor of shape (3, 1)"]),
    (torch.tensor(1.0), TypeError, ["shape ()"]), ((x for x in [1, 2, 3]), TypeError, ["generator"]),
    ([1.0, math.nan, 2.0], ValueError, ["returned nan", "row 1", "'add 2+1='", "completion '4'", "return None"]),
    (torch.tensor([1, 2, math.inf]), ValueError, ["returned inf", "row 2", "'four'"]),
    ([-math.inf, 0, 0], ValueError, ["-inf", "row 0"]), ([0, 1e39, 0], ValueError, ["1e+39", "row 1"]),
    ([0, 10**400, 0], ValueError, ["row 1"]), ([1.0, "2", 3.0], TypeError, ["'2' (str)", "row 1"]),
    ([1j, 0, 0], TypeError, ["complex"]),
    ([[1.0], 2.0, 3.0], TypeError, ["[1.0] (list)", "row 0"])])
def test_wrong_answers_of_a_reward(returned, error, words):
    def odd(completions): return returned
    message, _ = raised(error, [numeric, odd])
    for word in ["reward 'odd'", *words]: assert word in message
    async def odd_later(completions): return returned
    message, _ = raised(error, odd_later)
    for word in ["reward 'odd_later'", *words]: assert word in message


def test_missing_and_taken_columns_are_found_before_anything_runs():
    ran = []
    def needs(completions, solution, **kwargs): ran.append(1); return [0.0] * 3
    rewards = Rewards([lambda **kw: ran.append(1), needs, "no/such-model"])
    match = r"reward 'needs' needs 'solution'.*columns for rewards: 'soluton'\. Did you mean 'soluton'\?"
    with pytest.raises(TypeError, match=match):
        rewards.check(["prompt", "soluton"])
    with pytest.raises(TypeError, match="'solution'"): rewards(**ROWS)
    rewards.check(["prompt", "solution"])  # and no model was loaded
    with pytest.raises(ValueError, match=r"column 'completions'.*rename_column\('completions', 'my_completions'\)"):
        rewards.check(["prompt", "completions", "solution"])
    def misnamed(prompt, completion): return []
    with pytest.raises(TypeError, match="needs 'prompt', 'completion'.*Did you mean 'prompts'"):
        Rewards(misnamed).check(["prompt", "completion"])
    assert not ran


def test_inputs_of_different_lengths():
    with pytest.raises(ValueError, match="level has 2 values for 3 prompts"):
        Rewards(numeric)(**ROWS, columns={"level": [1, 2]})
    with pytest.raises(ValueError, match="completions has 1 values"): Rewards(numeric)(**ROWS | {"completions": ["1"]})


@pytest.mark.parametrize("make, error, words", [
    (lambda: Rewards([]), ValueError, "at least one"),
    (lambda: Rewards(3), TypeError, "reward 3 is neither a function nor a model"),
    (lambda: Rewards(ModelReward), TypeError, "a class; pass an object"),
    (lambda: Rewards([numeric, numeric], weights=[1]), ValueError,
     "1 reward weights for 2 reward functions \\('numeric', 'numeric_2'\\)"),
    (lambda: Rewards(numeric, weights=[math.nan]), ValueError, "weight nan of reward 'numeric'"),
    (lambda: Rewards(numeric, weights=["1"]), ValueError, "weight '1'"),
    (lambda: Rewards(numeric, weights=[math.inf]), ValueError, "finite"),
    (lambda: Rewards([numeric] * 2, processing_classes=[None]), ValueError, "1 processing classes for 2"),
    (lambda: Rewards(eval("lambda completions, /: [0]")), TypeError, "completions by position only")])
def test_what_rewards_do_not_take(make, error, words):
    with pytest.raises(error, match=words): make()


# ---------------------------------------------------------------- judges
def prefers_short(prompt, first, second): return 1 / (1 + math.exp(len(first) - len(second)))


def test_a_judge_beside_other_rewards():
    """Groups lie in any order, prompts may be messages, and an async judge gives the same rewards."""
    async def later(*args): await asyncio.sleep(0.001); return prefers_short(*args)
    rows = dict(prompts=[user("a"), "b", user("a"), "b", "b"], completions=["12", "1", "1", "123", "12"],
                completion_ids=[[1]] * 5)
    r = Rewards([win_rate_reward(prefers_short), win_rate_reward(later), lambda completions: [0.0] * 5])(**rows)
    assert torch.equal(r[:, 0], r[:, 1])
    lost, won = prefers_short("", "12", "1"), prefers_short("", "1", "12")
    assert r[[0, 2], 0].tolist() == pytest.approx([lost, won])
    far = prefers_short("", "1", "123")
    assert r[[1, 3, 4], 0].tolist() == pytest.approx([(won + far) / 2, (lost + 1 - far) / 2, 0.5])


def test_a_judge_is_asked_once_in_each_order_and_may_be_silent():
    asked = []
    def silent(prompt, first, second): asked.append((prompt, first, second)); return None if "d" in second else 0.25
    reward = win_rate_reward(silent)
    assert reward(["p", "p", "q", "p"], ["a", "b", "c", "d"]) == [0.625, 0.625, None, 0.25]
    assert len(asked) == len(set(asked)) == 6 and {prompt for prompt, _, _ in asked} == {"p"}
    assert reward([], []) == []


@pytest.mark.parametrize("answer", [-0.1, 1.1, math.nan])
def test_a_judge_answers_probabilities(answer):
    message, error = raised(RuntimeError, win_rate_reward(lambda prompt, first, second: answer),
                            rows={**ROWS, "prompts": ["p"] * 3})
    assert "'win_rate_reward' raised ValueError" in message and "from 0 to 1" in message


def grpo(config, reward, **settings):
    "A trainer of two groups of four, for two steps."
    from posttrain import GRPOConfig, GRPOTrainer
    args = GRPOConfig(**config(num_generations=4, max_completion_length=8, per_device_train_batch_size=8, **settings))
    data = pocket.dataset("reverse", "prompt_only", n=16)
    return GRPOTrainer(pocket.model(), reward, args, train_dataset=data, processing_class=pocket.tokenizer())


def test_a_judge_in_a_trainer(config):
    trainer = grpo(config, win_rate_reward(prefers_short))
    trainer.train()
    rows = [row for row in trainer.state.log_history if "reward" in row]
    # whatever one sibling wins, another loses
    assert len(rows) == 2 and all(row["reward"] == pytest.approx(0.5) and row["reward_std"] > 0 for row in rows)


@pytest.mark.parametrize("locate, calls", [(False, [8]), (True, [8, 1, 1, 1])])
def test_a_trainer_locates_a_failing_reward_on_request(config, locate, calls):
    asked = []
    def fails(prompts, completions):
        asked.append(len(completions))
        if len(asked) in (1, 4): raise OSError("no answer")  # at the batch, and at its third row
        return [0.0]
    with pytest.raises(RuntimeError, match="'fails' raised OSError: no answer") as caught:
        grpo(config, fails, locate_failing_reward=locate).train()
    assert asked == calls and ("row 2: prompt" in str(caught.value)) == locate


def test_win_rates_can_be_sent_to_a_process():
    made = win_rate_reward(prefers_short)
    assert pickle.loads(pickle.dumps(made)) == made


def test_total():
    r = torch.tensor([[1.0, 2.0], [math.nan, 2.0], [math.nan, math.nan], [0.0, -1.0]])
    torch.testing.assert_close(total(r, torch.tensor([1.0, 0.5])), torch.tensor([2.0, 1.0, math.nan, -0.5]),
                               equal_nan=True)
    assert total(r.double(), torch.tensor([1.0, 0.5])).dtype == torch.float64
    for wrong in (torch.ones(1), torch.ones(3), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"\(4, 2\)"): total(r, wrong)


# ---------------------------------------------------------------- models
TEXTS = dict(prompts=["reverse 12=", "reverse 31752=", "add 1+2=", "sort 4="], completions=["21", "25713", "3", ""])


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_model_scores_are_its_own_forwards(judge, tokenizer, batch_size):
    judge.train()
    judge.config.pad_token_id = 5  # wrong on purpose: the score must be read before the tokenizer's padding
    scores = ModelReward(judge, tokenizer, batch_size=batch_size)(**TEXTS)
    assert judge.training and scores.dtype == torch.float32 and not scores.requires_grad
    plain = [alone(judge, tokenizer, p + c) for p, c in zip(*TEXTS.values())]
    torch.testing.assert_close(scores, torch.tensor(plain), rtol=0, atol=1e-5)
    score = ModelReward(judge, tokenizer, batch_size=batch_size)
    chats = score([user(p) for p in TEXTS["prompts"]], [said(c) for c in TEXTS["completions"]])
    templated = [alone(judge, tokenizer, f"<|user|>{p}<|end|><|assistant|>{c}<|end|>") for p, c in zip(*TEXTS.values())]
    torch.testing.assert_close(chats, torch.tensor(templated), rtol=0, atol=1e-5)
    assert not torch.allclose(scores, chats)


def test_model_with_absolute_positions(tokenizer):
    """Padding on the left would shift the positions of short texts."""
    from transformers import GPT2Config, GPT2ForSequenceClassification
    torch.manual_seed(0)
    gpt2 = GPT2ForSequenceClassification(GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64, num_labels=1, initializer_range=0.3))
    tokenizer.padding_side = "left"
    plain = [alone(gpt2, tokenizer, p + c) for p, c in zip(*TEXTS.values())]
    torch.testing.assert_close(ModelReward(gpt2, tokenizer)(**TEXTS), torch.tensor(plain), rtol=0, atol=1e-5)


def test_model_scores_equal_trls(judge, tokenizer, config, tmp_path):
    """TRL's own code for reward models, on its own trainer."""
    from trl import GRPOConfig, GRPOTrainer
    judge.eval()
    policy = pocket.model()
    trainer = GRPOTrainer(policy, judge, GRPOConfig(**config(num_generations=2, max_completion_length=4)),
                          train_dataset=pocket.dataset("reverse", "prompt_only", n=4), processing_class=tokenizer,
                          reward_processing_classes=tokenizer)
    for wrap_prompt, wrap_completion in ((str, str), (user, said)):
        prompts = [wrap_prompt(p) for p in TEXTS["prompts"]]
        completions = [wrap_completion(c) for c in TEXTS["completions"]]
        ids = [[1]] * 4
        theirs = trainer._calculate_rewards([{"prompt": p} for p in prompts], prompts, completions, ids)
        torch.testing.assert_close(Rewards(judge, processing_classes=tokenizer)(prompts, completions, ids),
                                   theirs.cpu(), rtol=0, atol=1e-5)


def test_model_from_a_path_is_loaded_when_asked(judge, tokenizer, tmp_path):
    path = tmp_path / "my-judge"
    judge.save_pretrained(path); tokenizer.save_pretrained(path)
    rewards = Rewards([str(path), f"{path}/", path])
    assert rewards.names == ["my-judge", "my-judge_2", "my-judge_3"] and rewards.functions[0].model is None
    r = rewards.to("cpu")(**TEXTS, completion_ids=[[1]] * 4)
    plain = torch.tensor([alone(judge, tokenizer, p + c) for p, c in zip(*TEXTS.values())])
    torch.testing.assert_close(r, plain[:, None].expand(4, 3), rtol=0, atol=1e-5)
    assert Rewards(rewards.functions[0].model).names == ["my-judge"]  # a model knows where it comes from


def test_plain_texts_get_the_tokenizers_special_tokens(judge):
    """A reward model trained on `<s> text` must see it; a chat template brings its own."""
    from tokenizers import processors
    tokenizer = pocket.tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", tokenizer.convert_tokens_to_ids("<|system|>"))])
    scores = ModelReward(judge, tokenizer)(["add 1+2="], ["3"])
    with torch.no_grad():
        expected = judge.eval()(**pocket.tokenizer()("<|system|>add 1+2=3", return_tensors="pt")).logits[0, 0]
    assert scores[0].item() == pytest.approx(expected.item(), abs=1e-5)
    chat = ModelReward(judge, tokenizer)([user("add 1+2=")], [said("3")])
    assert chat[0].item() == pytest.approx(alone(judge, pocket.tokenizer(),
                                                 "<|user|>add 1+2=<|end|><|assistant|>3<|end|>"), abs=1e-5)


def test_models_that_are_no_rewards(judge, tokenizer, tmp_path):
    pocket.model().save_pretrained(tmp_path / "lm"); tokenizer.save_pretrained(tmp_path / "lm")
    rewards = Rewards(tmp_path / "lm")
    with pytest.raises(ValueError, match="lm is no reward model: it has no weights for score.weight"): rewards(**ROWS)
    with pytest.raises(ValueError, match="made in memory"): Rewards(judge)
    with pytest.raises(ValueError, match="gives 2 scores per text"):
        Rewards(Qwen3ForSequenceClassification(pocket.config(num_labels=2)), processing_classes=tokenizer)
    with torch.no_grad(): judge.score.weight.fill_(math.nan)
    message, _ = raised(ValueError, judge, processing_classes=tokenizer)
    assert "'Qwen3ForSequenceClassification' returned nan" in message and "row 0: prompt 'add 1+1='" in message
