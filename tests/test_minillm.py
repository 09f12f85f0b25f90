"""MiniLLM: the loss against enumeration in every setting; MiniLLMTrainer: by hand, cuts, two processes, resuming, the
mixture's samples, rewards, text, adapters, bad input."""
import copy
import itertools
import math

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from transformers import TrainerCallback, TrainingArguments

import tiny
from posttrain import pocket
from posttrain.distillation.minillm import (
    distillation_rewards,
    importance_weights_of_mixture,
    minillm_loss,
    minillm_returns,
)
from posttrain.distillation.minillm_trainer import MiniLLMConfig, MiniLLMTrainer
from posttrain.explore.reward_to_go import LETTERS, LONGEST, PLACES, all_answers, logps_of_answers, sequence_kl
from posttrain.foundations.divergences import reverse_kl
from posttrain.foundations.masks import Totals, length_mask
from posttrain.rollout.opponents import TeacherMixtureEngine
from posttrain.rollout.sampler import Sampler
from posttrain.rollout.sampling import Sampling
from posttrain.training.references import ModelReference
from test_distributed import LEAVE, launch
from test_grpo import logs, weights


# ---------------------------------------------------------------- the loss, by enumeration
def world(seed):
    "Student, teacher, and the student some steps later: logits of each place (40, 4)."
    g = torch.Generator().manual_seed(seed)
    student, teacher, step = (torch.randn(PLACES, LETTERS + 1, generator=g).double() for _ in range(3))
    return student, teacher, student + .5 * step


def expected_gradient(now, old, teacher, split, gamma, normalise, alpha, average, epsilon=.2, both=True):
    "Of `minillm_loss`: the mean over all 121 answers, by their probabilities under the sampler."
    tokens, places, mask = all_answers()
    now = now.clone().requires_grad_()
    old_logps, teacher_logps = logps_of_answers(old), logps_of_answers(teacher)
    rewards = distillation_rewards(teacher_logps, old_logps, mask)
    returns = minillm_returns(rewards, mask, gamma=gamma, length_normalization=normalise,
                              single_step_decomposition=split) * both
    weights = importance_weights_of_mixture(old_logps, teacher_logps, alpha)
    sampled = ((old_logps - weights.log()) * mask).sum(1).exp()
    logps, exact, total = logps_of_answers(now), reverse_kl(now[places], teacher[places]), 0
    for i in range(len(tokens)):
        one = slice(i, i + 1)
        loss, _ = minillm_loss(logps[one], old_logps[one], returns[one], mask[one], exact[one] if split else None,
                               weights=weights[one], average=average, epsilon=epsilon, totals=Totals(1, 1))
        total = total + sampled[i] * loss
    return torch.autograd.grad(total, now)[0]


def place_of(prefix):
    place = 0
    for letter in prefix: place = LETTERS * place + 1 + letter
    return place


def endings(prefix, table):
    "(chance, tokens) of all that may follow, under probabilities (40, 4)."
    if len(prefix) == LONGEST or LETTERS in prefix: return [(1.0, [])]
    p = table[place_of(prefix)]
    return [(p[v].item() * chance, [v, *rest]) for v in range(LETTERS + 1)
            for chance, rest in endings([*prefix, v], table)]


def promised_gradient(now, old, teacher, split, gamma, normalise, alpha, average, epsilon=.2, both=True):
    "The same from the text of the lesson: prefixes, next tokens and continuations, without log-probs of answers."
    p, q, r = teacher.softmax(-1), old.softmax(-1), now.softmax(-1)
    mixture = alpha * p + (1 - alpha) * q
    gradient = torch.zeros_like(now)

    def visit(prefix, often):
        i = place_of(prefix)
        log_ratio = (r[i] / p[i]).log()
        if split: gradient[i] += often * share(prefix) * r[i] * (log_ratio - (r[i] * log_ratio).sum())
        for v in range(LETTERS + 1):
            for chance, rest in endings([*prefix, v], mixture):
                text, earned = [*prefix, v, *rest], []
                for t in range(len(prefix), len(text)):
                    k = place_of(text[:t])
                    earned.append(math.log(p[k, text[t]] / q[k, text[t]]))
                powers = [gamma**k for k in range(len(earned))]
                credit = sum(w * x for w, x in zip(powers[split:], earned[split:]))
                over = sum(powers[:len(powers) - split])
                if normalise and over: credit /= over
                ratio, weight = r[i, v] / q[i, v], q[i, v] / mixture[i, v]
                clipped = (credit > 0 and ratio > 1 + epsilon) or (credit < 0 and ratio < 1 - epsilon)
                slope = -r[i]  # of log r(v), by the logits
                slope = slope + torch.eye(LETTERS + 1).double()[v]
                if not clipped and both:
                    gradient[i] -= often * share(prefix) * mixture[i, v] * chance * weight * ratio * credit * slope
        if len(prefix) + 1 < LONGEST:
            for v in range(LETTERS): visit([*prefix, v], often * mixture[i, v].item())

    # a sum over tokens, for one answer that counts as one
    def share(prefix): return 1.0
    visit([], 1.0)
    return gradient


GRID = list(itertools.product((True, False), (1.0, .7, 0.0), (True, False), (0.0, .2, .6)))


@pytest.mark.parametrize("split, gamma, normalise, alpha", GRID)
def test_expected_gradient_is_the_enumerated_one(split, gamma, normalise, alpha):
    student, teacher, moved = world(0)
    for now in (student, moved):
        for average in ("sum", "token"):  # of one answer that is all of a step of one token: the same sum
            how = (now, student, teacher, split, gamma, normalise, alpha, average)
            found, promised = expected_gradient(*how), promised_gradient(*how)
            assert (found - promised).abs().max() < 1e-8 < promised.abs().max()


@pytest.mark.parametrize("seed", range(4))
def test_the_papers_gradient_is_that_of_the_kl_of_answers(seed):
    student, teacher, _ = world(seed)
    student.requires_grad_()
    true, = torch.autograd.grad(sequence_kl(student, teacher), student)
    for split in (True, False):
        found = expected_gradient(student.detach(), student.detach(), teacher, split, 1.0, False, 0.0, "sum")
        assert (found - true).abs().max() < 1e-10
    biased = [(split, gamma, normalise, alpha) for split, gamma, normalise, alpha in GRID
              if gamma < 1 or normalise or alpha]
    for how in biased:
        off = expected_gradient(student.detach(), student.detach(), teacher, *how, "sum") - true
        assert off.norm() > .01 * true.norm(), how


@pytest.mark.parametrize("clip", [.05, .2, 10.0])
def test_the_clip_is_where_it_is_said_to_be(clip):
    student, teacher, moved = world(1)
    how = (moved, student, teacher, True, 1.0, True, .2, "sum", clip)
    assert (expected_gradient(*how) - promised_gradient(*how)).abs().max() < 1e-8


def test_without_returns_only_the_exact_part_is_left():
    student, teacher, _ = world(2)
    how = (student, student, teacher, True)
    alone = expected_gradient(*how, 1.0, False, 0.0, "sum", both=False)
    torch.testing.assert_close(alone, expected_gradient(*how, 0.0, True, 0.0, "sum"))
    torch.testing.assert_close(alone, promised_gradient(*how, 1.0, False, 0.0, "sum", both=False))


def test_returns_of_padding_holes_and_empty_rows():
    g = torch.Generator().manual_seed(0)
    rewards, mask = torch.randn(4, 6, generator=g).double(), length_mask(torch.tensor([6, 1, 0, 4]), 6)
    mask[0, 2] = 0
    for gamma, normalise, split in itertools.product((1.0, .5, 0.0), (True, False), (True, False)):
        how = dict(gamma=gamma, length_normalization=normalise, single_step_decomposition=split)
        found = minillm_returns(rewards.masked_fill(mask == 0, 7e7), mask, **how)
        for i in range(4):
            own = rewards[i][mask[i].bool()]
            want = []
            for t in range(len(own)):
                powers = gamma ** torch.arange(len(own) - t).double()
                total, over = (powers * own[t:])[split:].sum(), powers[:len(powers) - split].sum()
                want.append(total / over if normalise and over else total)
            assert found[i][mask[i].bool()].tolist() == pytest.approx([float(x) for x in want], abs=1e-12)
        assert (found[mask == 0] == 0).all() and found.isfinite().all()


def test_weights_of_extreme_log_probs():
    q, p = torch.tensor([[0.0, -1e4, -50.0, -.1]]), torch.tensor([[-1e4, 0.0, -50.0, -.2]])
    weights = importance_weights_of_mixture(q, p, .2)
    assert weights.isfinite().all() and weights.max() <= 1.25 + 1e-6
    assert weights[0].tolist() == pytest.approx([1.25, 0, 1, 1 / (.8 + .2 * math.exp(-.1))], abs=1e-6)


def test_half_precision_is_summed_in_float32():
    logps = torch.full((2, 3), -1.0, dtype=torch.bfloat16, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.long)
    loss, stats = minillm_loss(logps, None, torch.ones(2, 3), mask, torch.ones(2, 3))
    assert loss.dtype == torch.float32 and stats["reverse_kl"] == 1


# ---------------------------------------------------------------- the trainer
def student(seed=3, **options): return pocket.model(**{"seed": seed, "hidden_size": 32, **options})


def teacher(): return pocket.start("reverse")[0]


def rows(n=50): return pocket.dataset("reverse", "prompt_only", n=n)


def text(n=24): return Dataset.from_dict({"text": [f"reverse {i * 7}={str(i * 7)[::-1]}" for i in range(n)]})


def lengths(completions, **columns): return [len(answer) / 4 for answer in completions]


class Seen(TrainerCallback):
    def __init__(self): self.batches = []

    def on_tokens(self, trainer, batch, tokens): self.batches.append((batch, tokens))


def make(config, model=None, teacher_model=None, rewards=None, **options):
    beside = {name: options.pop(name) for name in (
        "peft_config", "rollout_func", "callbacks", "pretrain_dataset", "eval_dataset") if name in options}
    args = config(**{**dict(per_device_train_batch_size=8, max_completion_length=8, max_steps=1, optim="sgd",
                            learning_rate=.1, max_grad_norm=1e9, lr_scheduler_type="constant"), **options})
    args.pop("train_sampling_strategy")
    return MiniLLMTrainer(student() if model is None else model, teacher() if teacher_model is None else teacher_model,
                          rewards, MiniLLMConfig(**args), train_dataset=rows(), processing_class=pocket.tokenizer(),
                          **beside)


def train(config, *args, resume=None, **options):
    trainer = make(config, *args, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


#: name -> options, reward functions, whether there is text
RUNS = {"paper": ({}, None, False),
        "student alone": (dict(teacher_mixed_alpha=0.0), None, False),
        "all, discounted": (dict(gamma=.9, length_normalization=False, average="sum", temperature=.8), None, True),
        "no split": (dict(single_step_decomposition=False, gamma=.7, average="sequence"), None, False),
        "exact alone": (dict(rkl_advantage=False, teacher_mixed_alpha=.5), None, True),
        "groups with rewards": (dict(num_generations=4, scale_rewards="batch", average="constant"), lengths, False)}
EACH = pytest.mark.parametrize("name", RUNS)


def options_of(name):
    options, rewards, has_text = RUNS[name]
    return dict(options, rewards=rewards, **({"pretrain_dataset": text(), "pretrain_coef": .5} if has_text else {}))


def all_logits(model, generation, i, temperature):
    prompt, answer = generation.prompt_ids[i], generation.completion_ids[i]
    return (model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1] / temperature).log_softmax(-1)


def loss_by_hand(trainer, model):
    "Answer by answer, from all logits, in plain loops."
    args, generation, other, total = trainer.args, trainer.generation, teacher(), 0
    tokens, alpha = generation.token_count(), args.teacher_mixed_alpha
    advantages = torch.zeros(len(generation))
    if trainer.rewards:
        score = generation.rewards[:, 0].view(-1, args.num_generations)
        advantages = ((score - score.mean(1, keepdim=True)) / (score.std() + 1e-4)).flatten()
    for i, answer in enumerate(generation.completion_ids):
        log_q, log_p = (all_logits(m, generation, i, args.temperature) for m in (model, other))
        q, p = (x[range(len(answer)), answer] for x in (log_q, log_p))
        earned = (p - q).tolist()
        terms = []
        for t in range(len(answer)):
            powers = [args.gamma**k for k in range(len(answer) - t)]
            first = int(args.single_step_decomposition)
            credit = sum(w * x for w, x in list(zip(powers, earned[t:]))[first:])
            over = sum(powers[:len(powers) - first])
            if args.length_normalization and over: credit /= over
            credit = credit * args.rkl_advantage + advantages[i].item()
            weight = (q[t].exp() / (alpha * p[t].exp() + (1 - alpha) * q[t].exp())).item()
            term = -weight * credit * (q[t] - q[t].detach()).exp()
            if args.single_step_decomposition: term = term + (log_q[t].exp() * (log_q[t] - log_p[t])).sum()
            terms.append(term)
        share = {"token": 1 / tokens, "sum": 1 / len(generation), "sequence": 1 / len(generation) / len(answer),
                 "constant": 1 / len(generation) / args.max_completion_length}[args.average]
        total = total + share * sum(terms)
    if trainer.pretraining is not None:
        read = trainer.pretraining
        read.state.drawn = 0
        ids = [row["input_ids"] for row in read.take(len(generation))]
        logps = [model(torch.tensor([x])).logits[0, :-1].log_softmax(-1)[range(len(x) - 1), x[1:]] for x in ids]
        summed = -sum(x.sum() for x in logps)
        total = total + args.pretrain_coef * summed / sum(len(x) - 1 for x in ids)
    return total


@EACH
def test_loss_and_gradient_in_plain_loops(name, config):
    trainer, before = train(config, **options_of(name)), student()
    loss = loss_by_hand(trainer, before)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in before.parameters()])
    found = (weights(before) - weights(trainer)) / trainer.args.learning_rate
    assert abs(logs(trainer)[0]["loss"] - loss.item()) < 1e-4
    assert (found - gradient).norm() < 1e-3 * gradient.norm() and gradient.norm() > 1e-2


@EACH
def test_one_gradient_for_every_cut(name, config):
    whole = train(config, max_steps=3, **options_of(name))
    moved = (weights(whole) - weights(student())).norm()
    assert moved > 1e-3
    for size, accumulated in ((4, 2), (1, 8)):
        cut = train(config, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated, max_steps=3,
                    **options_of(name))
        assert (weights(cut) - weights(whole)).norm() <= 1e-4 * moved, (size, accumulated)
        for a, b in zip(logs(whole), logs(cut), strict=True):
            assert a.keys() == b.keys()
            for key in set(a) - {"step", "epoch"}:
                if not key.startswith("time"): assert abs(a[key] - b[key]) <= 1e-4 * max(1, abs(a[key])), key


@EACH
def test_resumed_in_the_middle_of_a_generation(name, config, tmp_path):
    settings = dict(num_iterations=2, steps_per_generation=2, per_device_train_batch_size=4, max_steps=9,
                    learning_rate=1e-3, optim="adamw_torch", save_strategy="steps", save_steps=3)
    whole = train(config, **settings, **options_of(name))
    resumed = train(config, resume=str(tmp_path / "checkpoint-3"), **settings, **options_of(name))
    assert torch.equal(weights(whole), weights(resumed)) and whole.stream.state.drawn == resumed.stream.state.drawn
    assert [row["loss"] for row in logs(whole)] == [row["loss"] for row in logs(resumed)]


def test_the_teacher_reads_a_micro_batch_once_and_its_states_stay_out_of_checkpoints(config, tmp_path):
    trainer, asked = make(config, num_iterations=3, max_steps=3, save_strategy="steps", save_steps=2), []
    trainer.teacher_model.model.register_forward_hook(lambda *given: asked.append(1))
    trainer.train()
    assert len(asked) == 1
    saved = [torch.load(file, weights_only=False) for file in (tmp_path / "checkpoint-2").glob("*.pt")]
    batches = [batch for state in saved if isinstance(state, dict) and "stream" in str(state.keys())
               for batch in state["stream"]["batches"]]
    assert all("teacher" not in batch for batch in batches)
    assert all("teacher" not in batch for batch in trainer.run_state()["stream"]["batches"])


SCRIPT = LEAVE + """
import io, os, sys, torch
torch.set_num_threads(1)
from posttrain.training.progress import Progress
from test_minillm import *
def run(folder, name, size, accumulated):
    options = options_of(name)
    beside = {k: options.pop(k) for k in ("rewards", "pretrain_dataset") if k in options}
    args = MiniLLMConfig(folder, use_cpu=True, ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None, optim="sgd",
                         lr_scheduler_type="constant", max_grad_norm=1e9, max_steps=3, per_device_train_batch_size=size,
                         gradient_accumulation_steps=accumulated, max_completion_length=8, num_iterations=1,
                         per_device_eval_batch_size=4, logging_steps=1, save_strategy="no", report_to="none",
                         disable_tqdm=True, learning_rate=.1, **options)
    trainer = MiniLLMTrainer(student(), teacher(), beside.pop("rewards"), args, rows(), rows(11), pocket.tokenizer(),
                             callbacks=[Progress(stream=io.StringIO())], **beside)
    trainer.train()
    return {"weights": weights(trainer), "log": logs(trainer), "eval": trainer.evaluate(),
            "processes": trainer.accelerator.num_processes}
"""


@pytest.mark.distributed
def test_two_processes_are_one(tmp_path, monkeypatch):
    import os
    tests = os.path.dirname(os.path.abspath(__file__))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH")])))
    names = ["paper", "all, discounted", "groups with rewards"]
    (tmp_path / "run.py").write_text(SCRIPT + f"""
out = [run(sys.argv[1], name, *cut) for name in {names!r} for cut in ((2, 4), (8, 1))]
import torch.distributed as dist
if dist.get_rank() == 0: torch.save(out, sys.argv[1] + "/out.pt")
leave(dist.barrier)
""")
    launch(2, str(tmp_path / "run.py"), str(tmp_path))
    together, scope = torch.load(tmp_path / "out.pt"), {}
    exec(SCRIPT, scope)
    for i, name in enumerate(names):
        alone = scope["run"](str(tmp_path), name, 16, 1)
        for other in together[2 * i:2 * i + 2]:
            apart, moved = ((alone["weights"] - x).norm() for x in (other["weights"], weights(student())))
            assert other["processes"] == 2 and apart <= 1e-4 * moved, (name, apart, moved)
            for a, b in [*zip(alone["log"], other["log"], strict=True), (alone["eval"], other["eval"])]:
                assert a.keys() == b.keys()
                for key in set(a) - {"step", "epoch"}:
                    if "time" in key or "per_second" in key: continue
                    assert abs(a[key] - b[key]) <= 2e-4 * max(1, abs(a[key])), (name, key, a[key], b[key])


# ---------------------------------------------------------------- who writes
def test_the_mixture_has_the_exact_distribution():
    """Both tokens of 40,000 answers of at most two, against the product of mixed probabilities, at a temperature."""
    n, alpha, tau, tokenizer = 40_000, .3, 2.0, pocket.tokenizer()
    first, other = pocket.start("sort")[0].eval(), teacher().eval()
    prompt = tokenizer("reverse 31=")["input_ids"]
    engine = TeacherMixtureEngine(first, ModelReference(other), tokenizer, alpha)
    found = engine.sample([prompt] * n, list(range(n)), Sampling(max_tokens=2, temperature=tau))
    with torch.no_grad():
        def probs(ids): return sum(share * (m(torch.tensor([ids])).logits[0, -1] / tau).double().softmax(-1)
                                   for m, share in ((first, 1 - alpha), (other, alpha)))
        start = probs(prompt)
        exact = {(v, w): (start[v] * p).item() for v in start.topk(6).indices.tolist()
                 for w, p in enumerate(probs([*prompt, v])) if start[v] * p > 30 / n}
    counts = {}
    for ids in found.completion_ids: counts[tuple(ids)] = counts.get(tuple(ids), 0) + 1
    assert len(exact) > 20
    for pair, p in exact.items():
        seen = counts.get(pair, 0) if pair[0] != tokenizer.eos_token_id else None
        if seen is not None: assert abs(seen - n * p) < 5 * math.sqrt(n * p * (1 - p)), (pair, seen / n, p)


def test_weights_are_those_of_the_sampler(config):
    "q / p~ from both models' log-probs is the student's log-prob less what the engine reported."
    seen = Seen()
    trainer = train(config, temperature=.6, teacher_mixed_alpha=.4, callbacks=[seen])
    batch, _ = seen.batches[0]
    counted = batch["mask"] != 0
    ratio = (batch["old_logps"] - batch["sampled_logps"]).exp()
    assert torch.allclose(batch["weights"][counted], ratio[counted], atol=1e-4) and ratio[counted].min() < .5
    assert batch["weights"].max() <= 1 / .6 + 1e-5
    mean = batch["weights"][counted].mean().item()
    assert logs(trainer)[0]["importance_weight/mean"] == pytest.approx(mean, abs=1e-5)


def test_an_evaluation_is_of_the_student_alone(config):
    trainer = make(config, model=pocket.start("sort")[0], eval_dataset=rows(12), per_device_eval_batch_size=5)
    first, again = trainer.evaluate(), trainer.evaluate()
    assert first["eval_reverse_kl"] == again["eval_reverse_kl"] and first["eval_importance_weight/mean"] == 1
    assert trainer.alpha == .2  # training goes on with the teacher's help
    alone = make(config, model=pocket.start("sort")[0], eval_dataset=rows(12), per_device_eval_batch_size=5,
                 teacher_mixed_alpha=0.0).evaluate()
    assert alone["eval_reverse_kl"] == pytest.approx(first["eval_reverse_kl"], abs=1e-5)
    trainer.train()
    assert logs(trainer)[0]["importance_weight/mean"] != 1


def test_the_sampler_has_the_weights_of_now(config):
    trainer = train(config, max_steps=2, learning_rate=1.0)
    trainer.sync_engines()
    prompts, how = trainer.encode(list(rows(8))), trainer.args.sampling()
    trainer.alpha = 0.0
    now = trainer.sample(list(rows(8)), list(range(8)), 1).completion_ids
    assert now == Sampler(trainer.model, trainer.processing_class).sample(prompts, list(range(8)), how).completion_ids


def test_ones_own_rollouts_are_taken_as_the_students(config):
    def rollout(prompts, trainer):
        ids = trainer.processing_class(prompts)["input_ids"]
        return {"prompt_ids": ids, "completion_ids": [[5, 6, 7, 1]] * len(ids), "logprobs": None,
                "env_mask": [[1, 0, 1, 1]] * len(ids)}
    seen = Seen()
    train(config, rollout_func=rollout, callbacks=[seen])
    batch, tokens = seen.batches[0]
    assert (batch["weights"] == 1).all() and (tokens["divergence"][:, 1] == 0).all()
    assert (batch["returns"][:, [1, 3]] == 0).all() and (batch["returns"][:, [0, 2]] != 0).all()


# ---------------------------------------------------------------- models
def test_a_teacher_that_is_the_student_teaches_nothing(config):
    trainer = train(config, model=teacher())
    assert abs(logs(trainer)[0]["reverse_kl"]) < 1e-6
    assert torch.allclose(weights(trainer), weights(teacher()), atol=1e-5)


def test_a_student_with_an_adapter(config):
    trainer = train(config, peft_config=LoraConfig(r=4, target_modules=["q_proj"]), learning_rate=1.0, max_steps=2)
    tiny.only_the_adapter_learned(trainer.model, student())


def test_a_teacher_with_more_padding_in_its_vocabulary(config, tmp_path):
    model, folder = teacher(), str(tmp_path / "teacher")
    model.resize_token_embeddings(model.get_input_embeddings().weight.shape[0] + 25, mean_resizing=False)
    model.save_pretrained(folder)
    pocket.tokenizer().save_pretrained(folder)
    wide, plain = train(config, teacher_model=folder), train(config)
    assert (weights(wide) - weights(plain)).abs().max() < 1e-5
    assert wide.generation.completion_ids == plain.generation.completion_ids


def test_a_teacher_with_an_adapter(config):
    from peft import get_peft_model
    torch.manual_seed(0)
    adapted = get_peft_model(teacher(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    merged = copy.deepcopy(adapted).merge_and_unload()
    one, other, plain = (train(config, teacher_model=model) for model in (adapted, merged, teacher()))
    assert (weights(one) - weights(other)).norm() < 1e-3 * (weights(one) - weights(plain)).norm()


def test_dropout_is_off_unless_it_is_asked(config):
    args = dict(attention_dropout=.5)
    on, off = (make(config, model=student(**args), disable_dropout=flag) for flag in (False, True))
    assert on.model.model.layers[0].self_attn.attention_dropout == .5
    assert off.model.model.layers[0].self_attn.attention_dropout == 0


def test_it_learns(config):
    "The sorting model learns to reverse as its teacher does: three seeds."
    for seed in range(3):
        trainer = make(config, model=pocket.start("sort")[0], eval_dataset=rows(32), optim="adamw_torch",
                       learning_rate=1e-3, per_device_train_batch_size=32, max_steps=40, max_grad_norm=1.0, seed=seed,
                       max_completion_length=10)
        before = trainer.evaluate()["eval_reverse_kl"]
        trainer.train()
        assert trainer.evaluate()["eval_reverse_kl"] < .75 * before


# ---------------------------------------------------------------- names and bad input
def test_names_that_scripts_read(config):
    trainer = make(config, pretrain_dataset=text())
    assert (trainer.teacher_mixed_alpha, trainer.gamma, trainer.epsilon_low) == (.2, 1.0, .2)
    assert trainer.teacher_model.config.hidden_size == 64 and trainer.ref_model is None
    card = trainer.method()
    assert card.name == "MiniLLM" and card.values["teacher_mixed_alpha"] == .2
    trainer.train()
    names = {"loss", "reverse_kl", "entropy", "importance_weight/mean", "clip_ratio/region_mean", "pretrain_loss",
             "completions/mean_length", "ratio/mean"}
    assert names <= logs(trainer)[0].keys() and "reverse_kl" in logs(trainer)[0]


WRONG = [(dict(teacher_mixed_alpha=1.0), ValueError, "teacher_mixed_alpha=1 lets the teacher"),
         (dict(teacher_mixed_alpha=1.5), ValueError, "teacher_mixed_alpha=1.5 .* at most 1"),
         (dict(teacher_mixed_alpha=-.1), ValueError, "teacher_mixed_alpha=-0.1"),
         (dict(teacher_mixed_alpha="a"), TypeError, "teacher_mixed_alpha"), (dict(gamma=1.1), ValueError, "gamma=1.1"),
         (dict(kd_temperature=2.0), ValueError, "kd_temperature=2 with temperature=1"),
         (dict(average="mean"), ValueError, "average='mean'.*'token'"),
         (dict(scale_rewards="all"), ValueError, "scale_rewards='all'"),
         (dict(pretrain_coef=-1), ValueError, "pretrain_coef=-1"),
         (dict(pretrain_max_length=1), ValueError, "pretrain_max_length=1"),
         (dict(use_vllm=True), ValueError, "use_vllm=True with teacher_mixed_alpha=0.2.*set teacher_mixed_alpha=0"),
         (dict(sampler="transformers"), ValueError, "sampler='transformers' with teacher_mixed_alpha"),
         (dict(repetition_penalty=1.2), ValueError, "repetition_penalty=1.2 with"),
         (dict(top_k=3), ValueError, "top_k=3 with teacher_mixed_alpha=0.2: the importance weights"),
         (dict(top_p=.9), ValueError, "top_p=0.9 with"), (dict(min_p=.1), ValueError, "min_p=0.1 with"),
         (dict(generation_kwargs={"top_k": 4}), ValueError, "top_k=4 with.*set teacher_mixed_alpha=0"),
         (dict(beta=.1), ValueError, "no other reference"), (dict(dynamic_sampling=True), ValueError, "equal rewards"),
         (dict(gama=.5), TypeError, "no field 'gama'. Did you mean 'gamma'")]


@pytest.mark.parametrize("options, kind, words", WRONG, ids=str)
def test_bad_fields_are_named(options, kind, words, tmp_path):
    with pytest.raises(kind, match=words): MiniLLMConfig(str(tmp_path), use_cpu=True, report_to="none", **options)


def test_what_may_stand_together(tmp_path):
    for options in (dict(use_vllm=True, teacher_mixed_alpha=0.0), dict(sampler="transformers", teacher_mixed_alpha=0.0),
                    dict(repetition_penalty=1.2, teacher_mixed_alpha=0.0), dict(sampler="own"),
                    dict(kd_temperature=.7, temperature=.7), dict(num_generations=1),
                    dict(top_p=1.0, top_k=0, min_p=0.0), dict(top_p=.9, top_k=5, min_p=.1, teacher_mixed_alpha=0.0)):
        MiniLLMConfig(str(tmp_path), use_cpu=True, report_to="none", **options)


NOBODY = "./nobody/loads/this"


def test_bad_arguments_are_named_before_a_model_is_loaded(config):
    with pytest.raises(ValueError, match="learns nothing from the teacher"):
        make(config, model=NOBODY, rkl_advantage=False, single_step_decomposition=False)
    with pytest.raises(ValueError, match="pretrain dataset.*'words'"):
        make(config, model=NOBODY, pretrain_dataset=Dataset.from_dict({"words": ["a"]}))
    with pytest.raises(ValueError, match="MiniLLMTrainer needs a teacher"):
        MiniLLMTrainer(NOBODY, None, args=MiniLLMConfig(config()["output_dir"], use_cpu=True), train_dataset=rows())
    with pytest.raises(TypeError, match="the config is the third parameter|got MiniLLMConfig"):
        MiniLLMTrainer(NOBODY, MiniLLMConfig(config()["output_dir"], use_cpu=True), train_dataset=rows())


def test_a_model_that_our_sampler_cannot_mix_is_named(config, monkeypatch):
    import posttrain.rollout.opponents as module
    def cannot(*args): raise TypeError("it has layers that pack does not know")
    monkeypatch.setattr(module, "pack", cannot)
    with pytest.raises(TypeError, match="set teacher_mixed_alpha=0"): make(config)


def test_rewards_alone_teach_without_the_teacher(config):
    with_rewards = train(config, rewards=lengths, rkl_advantage=False, single_step_decomposition=False,
                         num_generations=4, teacher_mixed_alpha=0.0)
    batch = with_rewards.generation.columns["returns"]
    counted = with_rewards.generation.batch()["mask"] != 0
    assert abs(batch[counted]).max() > 0 and logs(with_rewards)[0]["reward"] > 0


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_rewards_of_a_group_of_one_are_refused(scale, config):
    "Their advantage is 0 whatever they are scaled by."
    with pytest.raises(ValueError, match="num_generations=1: reward_funcs"):
        make(config, model=NOBODY, rewards=lengths, scale_rewards=scale)


@pytest.mark.parametrize("given, words", [
    (["abc"], "pretrain dataset is a list.*from_list"), ("abc", "pretrain dataset is a str"),
    ({"text": ["abc"]}, "pretrain dataset is a dict.*from_dict"), (3, "pretrain dataset is a int"),
    (text().to_pandas(), "pretrain dataset is a DataFrame.*from_pandas"),
    (DatasetDict(train=text(), test=text()), "a dict of train, test; .*dataset\\['train'\\]")],
    ids=["list", "str", "dict", "int", "DataFrame", "DatasetDict"])
def test_pretrain_text_that_is_no_dataset_is_named(given, words, config):
    with pytest.raises(TypeError, match=words): make(config, model=NOBODY, pretrain_dataset=given)


def test_text_as_a_stream(config):
    streamed = train(config, pretrain_dataset=text().to_iterable_dataset(), shuffle_dataset=False)
    table = train(config, pretrain_dataset=text(), shuffle_dataset=False)
    assert torch.equal(weights(streamed), weights(table))


def test_the_third_parameter_is_said_to_be_reward_funcs(config):
    for args in (MiniLLMConfig, TrainingArguments):
        args = args(config()["output_dir"], use_cpu=True, report_to="none")
        with pytest.raises(TypeError, match="third parameter is reward_funcs.*args=..., train_dataset="):
            MiniLLMTrainer(NOBODY, teacher(), args, rows())


def test_a_prompt_for_the_teacher_alone_is_refused(config):
    asked = rows().map(lambda row: {"teacher_prompt": "sort 31="})
    for names in (dict(train_dataset=asked), dict(train_dataset=rows(), eval_dataset=asked)):
        with pytest.raises(ValueError, match="dataset has the column 'teacher_prompt'.*remove_columns"):
            MiniLLMTrainer(NOBODY, teacher(), args=MiniLLMConfig(config()["output_dir"], use_cpu=True), **names,
                           processing_class=pocket.tokenizer())


# ---------------------------------------------------------------- a teacher that excludes tokens
def excluding(*tokens):
    "The teacher with logits of -inf."
    model = teacher()
    head = torch.nn.Linear(*model.lm_head.weight.T.shape)
    head.weight, head.bias = model.lm_head.weight, torch.nn.Parameter(torch.zeros(len(head.weight)))
    head.bias.data[list(tokens)] = -math.inf
    model.lm_head = head
    return model


@pytest.mark.parametrize("options", [{}, dict(gamma=0.0), dict(rkl_advantage=False), dict(average="sum"),
                                     dict(single_step_decomposition=False)], ids=str)
def test_an_infinite_kl_is_not_blamed_on_the_learning_rate(options, config):
    with pytest.raises(FloatingPointError, match="reverse KL to the teacher is infinite.*No learning rate helps"):
        train(config, teacher_model=excluding(*range(5, 12)), teacher_mixed_alpha=0.0, **options)


def test_a_token_that_both_exclude_is_no_infinity(config):
    trainer = train(config, model=excluding(7), teacher_model=excluding(7), teacher_mixed_alpha=0.0)
    assert abs(logs(trainer)[0]["reverse_kl"]) < 1e-6


def test_rewards_alone_do_not_mind_what_the_teacher_excludes(config):
    how = dict(rewards=lengths, rkl_advantage=False, single_step_decomposition=False, num_generations=4,
               teacher_mixed_alpha=0.0)
    one, other = (train(config, teacher_model=x, **how) for x in (excluding(*range(5, 12)), teacher()))
    assert torch.equal(weights(one), weights(other))
    assert 0 < one.generation.columns["returns"].abs().max() < math.inf
