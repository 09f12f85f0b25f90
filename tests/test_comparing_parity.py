"""Trainers that compare, against TRL on the same answers and scores: online DPO against 1.16, live; XPO and Nash-MD
against 1.13, the last that had them (recorded by tests/oracles/removed.py)."""
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from datasets import Dataset

import posttrain
from oracle import Answer, Sketch, start
from posttrain import pocket
from test_dpo_parity import moved

ORACLE = Path(__file__).parent / "oracles" / "comparing.json"
RECORDED = json.loads(ORACLE.read_text()) if ORACLE.exists() else {}  # it is not there while it is made
QUIET = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no",
             disable_tqdm=True, seed=0, warmup_steps=0, logging_steps=1, max_steps=1, optim="sgd", learning_rate=1.0,
             max_grad_norm=1e9, lr_scheduler_type="constant", temperature=1.0)
LONGEST, N = 7, 8  # tokens of an answer, prompts
LIVE = {"plain": dict(beta=.3), "ipo": dict(loss_type="ipo", beta=2.0),
        "ended answers, penalty": dict(beta=.3, missing_eos_penalty=.5)}
#: method and case -> options
CASES = {"XPO, plain": dict(beta=.3, alpha=.05), "XPO, ipo": dict(beta=2.0, alpha=.05, loss_type="ipo"),
         "XPO, ended answers, penalty": dict(beta=.3, alpha=.05, missing_eos_penalty=.5),
         "NashMD, plain": dict(beta=.3, mixture_coef=.25),
         "NashMD, ended answers, penalty": dict(beta=.3, mixture_coef=.25, missing_eos_penalty=.5)}


# ---------------------------------------------------------------- the same answers and scores for everybody
@cache
def questions():
    "Prompts of different lengths, each of them once."
    found = {row["prompt"]: row for row in pocket.dataset("reverse", "prompt_only", n=40, seed=5)}
    return list(found)[:N]


def written(prompt, which, ended):
    "The first or the second answer to a prompt: all of one length, or some that end early."
    number = 2 * questions().index(prompt) + which
    ids = torch.randint(4, 14, (LONGEST,), generator=torch.Generator().manual_seed(number)).tolist()
    return [*ids[:2 + number % 4], pocket.tokenizer().eos_token_id] if ended and number % 3 != 2 else ids


def score_of(ids): return float(sum((k + 1) * token for k, token in enumerate(ids)) % 17) / 8


def models(): return moved(start("reverse")[0], 1, .1), start("reverse")[0]


def data(): return Dataset.from_list([{"prompt": prompt} for prompt in questions()])


def answer(trainer, before):
    changed = torch.cat([(before[n] - p.detach()).flatten() for n, p in trainer.model.named_parameters()])
    row = next(row for row in trainer.state.log_history if "loss" in row)
    return Answer([changed], [{name: value for name, value in row.items() if "/" in name or name == "loss"}])


def trained(trainer):
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    return answer(trainer, before)


# ---------------------------------------------------------------- TRL
def theirs(case, folder):
    "In a process with TRL 1.13."
    from importlib import import_module

    import trl
    assert trl.__version__ == "1.13.0"
    method = case.split(",")[0]
    name = {"XPO": "xpo", "NashMD": "nash_md"}[method]
    module = import_module(f"trl.experimental.{name}.{name}_trainer")
    tokenizer, (policy, reference) = pocket.tokenizer(), models()
    tokenizer.padding_side = "left"
    config = getattr(import_module(f"trl.experimental.{name}"), f"{method}Config")

    def scored(model, texts, pad, context):
        answers = [[i for i in row if i != pad] for row in texts[:, context:].tolist()]
        return None, torch.tensor([score_of(ids) for ids in answers]), None
    module.get_reward = scored
    from transformers import Qwen3ForSequenceClassification
    judge = Qwen3ForSequenceClassification(type(policy.config)(**{**policy.config.to_dict(), "num_labels": 1,
                                                                  "id2label": None, "label2id": None}))
    tokenizer.save_pretrained(folder)
    judge.config._name_or_path = folder  # where its tokenizer is looked for
    trainer = getattr(module, f"{method}Trainer")(
        model=policy, ref_model=reference, reward_funcs=judge, train_dataset=data(), processing_class=tokenizer,
        args=config(folder, **{**QUIET, **CASES[case]}, per_device_train_batch_size=N, max_new_tokens=LONGEST))

    def given(*args):
        prompts = next(value for value in args if isinstance(value, dict))
        texts = tokenizer.batch_decode(prompts["input_ids"], skip_special_tokens=True)
        return [torch.cat([prompts["input_ids"], torch.tensor([padded(written(text, k, "ended" in case), tokenizer)
                                                               for text in texts])], 1) for k in (0, 1)]
    trainer._generate_completions = given
    return trained(trainer)


def padded(ids, tokenizer): return ids + [tokenizer.pad_token_id] * (LONGEST - len(ids))


def live(case, folder):
    "TRL 1.16's online DPO."
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
    from trl.experimental.utils import truncate_right
    tokenizer, (policy, reference) = pocket.tokenizer(), models()
    trainer = OnlineDPOTrainer(
        policy, reference, by_ids, OnlineDPOConfig(folder, **{**QUIET, **LIVE[case]}, per_device_train_batch_size=N,
                                                   max_new_tokens=LONGEST),
        train_dataset=data(), processing_class=tokenizer)

    def given(model, prompts, images=None):
        inputs = tokenizer(text=prompts, return_tensors="pt", padding=True, padding_side="left",
                           add_special_tokens=False)
        answers = torch.tensor([padded(written(p, k, "ended" in case), tokenizer) for k in (0, 1) for p in prompts])
        ids, mask = truncate_right(answers, trainer.eos_token_ids, tokenizer.pad_token_id)
        return inputs["input_ids"].repeat(2, 1), inputs["attention_mask"].repeat(2, 1), ids, mask, None
    trainer._generate = given
    return trained(trainer)


def by_ids(completion_ids, **columns):
    pad = pocket.tokenizer().pad_token_id
    return [score_of([i for i in ids if i != pad]) for ids in completion_ids]


# ---------------------------------------------------------------- ours
class Given:
    "An engine that gives the first or the second answers."

    name = "reference"

    def __init__(self, which, ended): self.which, self.ended = which, ended

    def sync(self, model): pass

    def sleep(self): pass

    def sample(self, prompts, seeds, sampling):
        from posttrain.rollout.sampling import Samples
        eos, texts = pocket.tokenizer().eos_token_id, pocket.tokenizer().batch_decode(prompts)
        # online DPO asks one engine for both answers
        which = [i % 2 for i in range(len(texts))] if self.which is None else [self.which] * len(texts)
        ids = [written(text, k, self.ended) for text, k in zip(texts, which)]
        return Samples(ids, None, [x[-1] == eos for x in ids])


def ours(method, options, ended, folder, **more):
    policy, reference = models()
    config, cls = (getattr(posttrain, method + kind) for kind in ("Config", "Trainer"))
    trainer = cls(policy, by_ids, config(str(folder), **{**QUIET, **options, **more}, per_device_train_batch_size=N,
                                         max_new_tokens=LONGEST), data(), processing_class=pocket.tokenizer(),
                  ref_model=reference)
    if method == "OnlineDPO": trainer.engine = Given(None, ended)
    else: trainer.engine, other = Given(0, ended), Given(1, ended)
    if method == "XPO": trainer.__dict__["reference_engine"] = other
    if method == "NashMD": trainer.opponent = other
    return trained(trainer)


def same(their_log, our_log, skip=()):
    keys = [key for key in their_log if not key.startswith(skip)] if skip else list(their_log)
    assert len(keys) > 8
    for key in keys:
        our, their = our_log[key], their_log[key]
        near = 5.1e-5 if key == "loss" else 1e-5 * max(1, abs(their))  # TRL rounds the loss
        assert abs(our - their) <= near, (key, our, their)


@pytest.mark.parity
@pytest.mark.parametrize("case", LIVE)
def test_online_dpo_like_trl(case, tmp_path):
    "TRL's sums of log-probs count padding: where answers differ in length, three metrics differ."
    their, our = live(case, str(tmp_path / "trl")), ours("OnlineDPO", LIVE[case], "ended" in case, tmp_path)
    difference = (their.gradients[0] - our.gradients[0]).norm()
    assert difference <= 1e-5 * max(1, their.gradients[0].norm()) and their.gradients[0].norm() > .1
    summed = ("objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward")
    same(their.logs[0], our.logs[0], skip=summed if "ended" in case else ())


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_xpo_and_nash_md_like_trl(case, tmp_path):
    "TRL's XPO adds the reference's log-probs to the policy's in `logps`."
    method, their = case.split(",")[0], RECORDED[case]
    more = dict(kl="token") if method == "NashMD" else {}
    our = ours(method, CASES[case], "ended" in case, tmp_path, **more)
    recorded = Sketch(torch.tensor(their["projections"]), their["norm"])
    assert (recorded - our.gradients[0]).norm() <= 1e-5 * max(1, their["norm"]) and their["norm"] > .1
    same(their["log"], our.logs[0], skip=("logps/",) if method == "XPO" else ())


@pytest.mark.parity
def test_the_kl_of_tokens_is_another_gradient_than_that_of_answers(tmp_path):
    "Named difference: TRL's token-wise KL leaves out what later tokens cost."
    their = RECORDED["NashMD, plain"]
    recorded = Sketch(torch.tensor(their["projections"]), their["norm"])
    our = ours("NashMD", CASES["NashMD, plain"], False, tmp_path)
    assert (recorded - our.gradients[0]).norm() > .1 * their["norm"]
