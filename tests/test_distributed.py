"""Two processes (gloo, on the CPU) train as one: the same gradient and metrics, for every way of cutting the step."""
import json
import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.distributed

# The work is done and asserted, its files are closed: leave without the interpreter's teardown, in which gloo's threads
# sometimes abort.
LEAVE = """
def leave(wait_for_all):
    import os, time
    wait_for_all()
    time.sleep(1)  # nobody goes while another still reads from it
    os._exit(0)
"""

SCRIPT = LEAVE + """
import json, os, sys, torch
import posttrain
from posttrain import pocket

def data(method, **kw):
    if method == "SFT": return pocket.dataset("reverse", "prompt_completion", **kw)
    if method == "PRM": return pocket.dataset("add", "stepwise_supervision", **kw)
    rows = pocket.dataset("sort", "preference", **kw)
    def unequal(row, i):
        return {"rejected": row["rejected"][: 2 + i % 3] if i % 2 else row["rejected"] + row["chosen"][:3]}
    rows = rows.map(unequal, with_indices=True)
    judged = posttrain.unpair_preference_dataset(rows).shuffle(seed=0).select(range(len(rows)))
    return judged if method in ("KTO", "BCO") else rows

def model_of(method):
    lm = pocket.model(seed=0)
    if method not in ("Reward", "PRM"): return lm
    from transformers import Qwen3ForSequenceClassification, Qwen3ForTokenClassification
    kind, labels = (Qwen3ForSequenceClassification, 1) if method == "Reward" else (Qwen3ForTokenClassification, 2)
    judge = kind(type(lm.config)(**{**lm.config.to_dict(), "num_labels": labels}))
    score = torch.linspace(-.1, .1, labels * lm.config.hidden_size).view(labels, -1)
    judge.load_state_dict({**lm.state_dict(), "score.weight": score}, strict=False)
    if judge.score.bias is not None: torch.nn.init.zeros_(judge.score.bias)
    return judge

def train(out, method, size, accumulate, stream=False, shards=1, n=64, **options):
    os.makedirs(out, exist_ok=True)  # two processes make it
    rows = data(method, n=n, seed=1)
    backend = "gloo" if "WORLD_SIZE" in os.environ else None
    args = getattr(posttrain, method + "Config")(out, **{**dict(
        use_cpu=True, ddp_backend=backend, optim="sgd", lr_scheduler_type="constant", max_grad_norm=1e9, max_steps=2,
        per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, train_sampling_strategy="sequential", learning_rate=1.0), **options})
    model, test = model_of(method), data(method, n=13, seed=2, split="test")
    trainer = getattr(posttrain, method + "Trainer")(
        model, args=args, train_dataset=rows.to_iterable_dataset(shards) if stream else rows,
        eval_dataset=test.to_iterable_dataset(shards) if stream else test, processing_class=pocket.tokenizer())
    trainer.train()
    metrics = trainer.evaluate()
    if trainer.accelerator.is_main_process:
        torch.save(torch.cat([p.detach().flatten() for p in model.parameters()]), out + "/weights.pt")
        log = [r for r in trainer.state.log_history if "loss" in r]
        with open(out + "/log.json", "w") as file:
            json.dump({"log": log, "eval": metrics, "processes": trainer.accelerator.num_processes}, file)
    return trainer

for job in json.load(open(sys.argv[1])):
    trainer = train(**{**job, "out": sys.argv[2] + "/" + job["out"]})
leave(trainer.accelerator.wait_for_everyone)
"""


FSDP2 = LEAVE + """
import copy, sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from posttrain import pocket
from posttrain.foundations.layouts import make_batch
from posttrain.training.heads import attach_head, completion_logps, completion_loss
from posttrain.training.precompute import fingerprint
from posttrain.training.references import make_reference
from posttrain.training.with_reference import sync_weights
dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
model = attach_head(pocket.model(seed=0)).train()
whole = copy.deepcopy(model)
other = pocket.model(seed=1)
reference, whole_reference = make_reference(model, copy.deepcopy(other)), make_reference(whole, copy.deepcopy(other))
for layer in reference.model.model.layers: fully_shard(layer, mesh=mesh)
fully_shard(reference.model, mesh=mesh)
for layer in model.model.layers: fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
batches = [make_batch([[5, 6, 7]], [[8, 9, 10, 1], [11, 12, 1]], [0, 0]), make_batch([[9, 8]], [[20, 21, 1]])]
def share(model, batch, processes): return completion_loss(model, batch, torch.neg, batch["mask"] / 10 * processes)[0]
share(model, batches[rank], 2).backward()
sum(share(whole, batch, 1) for batch in batches).backward()
for (name, p), q in zip(model.named_parameters(), whole.named_parameters()):
    assert type(p).__name__ == "DTensor" and torch.allclose(p.grad.full_tensor(), q[1].grad, atol=1e-6), name
assert torch.allclose(reference.logps(batches[rank]), whole_reference.logps(batches[rank]), atol=1e-6)
sync_weights(reference.model, model, .6)
sync_weights(whole_reference.model, whole, .6)
for (name, p), q in zip(reference.weights(), whole_reference.weights()):
    assert type(p).__name__ == "DTensor" and torch.allclose(p.full_tensor(), q[1], atol=1e-7), name
leave(dist.barrier)
"""


def launch(processes, *command):
    one = [sys.executable]
    several = [*one, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([*(several if processes > 1 else one), *command], capture_output=True, text=True,
                          timeout=500, env=env)
    assert done.returncode == 0, done.stderr[-3000:]


SFT = {"nll": {}, "packed dft": {"loss_type": "dft", "packing": True, "max_length": 48}, "stream": {"stream": True}}
DPO = {"losses that sort": {"loss_type": ["sigmoid", "aot", "aot_unpaired", "sft"]},
       "precomputed": {"precompute_ref_log_probs": True, "loss_type": ["ipo"]},
       "following reference": {"sync_ref_model": True, "ref_model_sync_steps": 1}}
ANSWERS = {"KTO": {}, "KTO, precomputed": {"precompute_ref_log_probs": True}, "BCO": {},
           "BCO, running mean": {"reward_shift": "running_mean"}, "CPO": {"loss_type": "simpo", "cpo_alpha": .5},
           "ORPO": {}, "ORPO, sequence": {"nll_of": "sequence"}, "Reward": {"center_rewards_coefficient": .1},
           "PRM": {}, "PRM, last steps": {"train_on_last_step_only": True}}
# One pass over eight rows; on two processes two passes over two rows each, and for one case one pass over four.
WHOLE = dict(size=8, accumulate=1)
ALONE = [*(dict(options, method="SFT", out=name, **WHOLE) for name, options in SFT.items()),
         *(dict(options, method="DPO", out=name, learning_rate=.1, **WHOLE) for name, options in DPO.items()),
         *(dict(options, method=name.split(",")[0], out=name, learning_rate=.1, **WHOLE)
           for name, options in ANSWERS.items())]
TOGETHER = [*(dict(job, size=2, accumulate=2) for job in ALONE), dict(ALONE[0], out="nll, whole", size=4)]
# The last step of a pass is not full: the second process has one row less, or none.
CASES = (("SFT", 11, {}), ("SFT", 9, {}), ("SFT", 11, dict(stream=True)), ("DPO", 9, dict(stream=True)),
         ("SFT", 17, dict(packing=True, max_length=64)), ("DPO", 9, {}), ("DPO", 9, dict(loss_type=["aot"])),
         ("DPO", 11, dict(loss_type=["sigmoid", "aot", "aot_unpaired"])), ("KTO", 9, {}), ("BCO", 9, {}),
         ("Reward", 9, {}), ("PRM", 9, {}))
PARTIAL = [dict(method=method, out=f"{method}, {n} rows, {' '.join(more)}", n=n, size=4, accumulate=1, max_steps=5,
                learning_rate=.1, **more) for method, n, more in CASES]
# Three shards for two processes: one has twice as many rows as the other. The weights stay, so both evaluate the same.
SHARDS = dict(method="SFT", out="shards", n=48, size=4, accumulate=1, stream=True, shards=3, max_steps=10,
              learning_rate=0.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All jobs in one process and in two: (processes, name) -> weights and log. To start a process takes seconds."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    (folder / "train.py").write_text(SCRIPT)
    for processes, jobs in ((1, [*ALONE, *PARTIAL, SHARDS]),
                            (2, [*TOGETHER, *(dict(job, size=2) for job in [*PARTIAL, SHARDS])])):
        here = folder / str(processes)
        here.mkdir()
        (here / "jobs.json").write_text(json.dumps(jobs))
        launch(processes, str(folder / "train.py"), str(here / "jobs.json"), str(here))
        for job in jobs:
            log = json.loads((here / job["out"] / "log.json").read_text())
            found[processes, job["out"]] = torch.load(here / job["out"] / "weights.pt"), log
    return found


def agree(one, two, keys):
    """The same weights, and the same metrics in each step."""
    (alone, log), (together, other) = one, two
    assert log["processes"] == 1 and other["processes"] == 2
    assert torch.allclose(alone, together, atol=1e-5), (alone - together).abs().max()
    for a, b in zip(log["log"], other["log"], strict=True):
        for key in keys:
            assert (key in a) == (key in b), key
            if key not in a: continue  # a step without answers of one class
            # A tie but for rounding: the policy is the reference.
            if key == "rewards/accuracies" and abs(a["rewards/margins"]) < 1e-6: continue
            assert abs(a[key] - b[key]) <= 1e-4 * max(1, abs(a[key])), (key, a[key], b[key])


def agree_in_evaluation(one, two, but=()):
    """All metrics, of 13 rows in batches of 8: those that accelerate evaluates twice count once."""
    (_, log), (_, other) = one, two
    assert log["eval"].keys() == other["eval"].keys()
    for key, value in log["eval"].items():
        if any(word in key for word in ("time", "per_second", *but)): continue
        assert abs(value - other["eval"][key]) <= 1e-4 * max(1, abs(value)), (key, value, other["eval"][key])


SFT_METRICS = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")
DPO_METRICS = ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen", "logits/rejected",
               "entropy", "mean_token_accuracy", "num_tokens")


JUDGED_METRICS = ("loss", "grad_norm", "logps/chosen", "logits/rejected", "entropy", "num_tokens")
REWARD_METRICS = ("loss", "grad_norm", "num_tokens", "accuracy", "margin", "mean_reward", "min_reward", "max_reward")
OF_A_BATCH = ("eval_loss", "eval_kl")  # an evaluation's batch has a zero of its own


def metrics_of(method):
    more = {"KTO": ("kl",), "BCO": ("delta",)}
    if method == "Reward": return REWARD_METRICS
    if method == "PRM": return ("loss", "grad_norm", "num_tokens", "accuracy")
    if method in more: return (*JUDGED_METRICS, *more[method])
    return SFT_METRICS if method == "SFT" else DPO_METRICS


@pytest.mark.parametrize("name", SFT)
def test_two_processes_are_one(runs, name):
    for cut in [name] + (["nll, whole"] if name == "nll" else []):
        agree(runs[1, name], runs[2, cut], SFT_METRICS)
        agree_in_evaluation(runs[1, name], runs[2, cut])


@pytest.mark.parametrize("job", PARTIAL, ids=lambda job: job["out"])
def test_rows_that_a_process_repeats_count_nothing(runs, job):
    one, two = runs[1, job["out"]], runs[2, job["out"]]
    assert len(one[1]["log"]) == 5
    agree(one, two, metrics_of(job["method"]))
    agree_in_evaluation(one, two, but=OF_A_BATCH if job["method"] == "KTO" else ())


def test_a_pass_over_unequal_shards_ends_for_all(runs):
    one, two = runs[1, "shards"], runs[2, "shards"]
    assert len(two[1]["log"]) == 10 and two[1]["log"][-1]["epoch"] > 1  # nobody waits for rows that never come
    agree_in_evaluation(one, two, but=["epoch"])


@pytest.mark.parametrize("name", DPO)
def test_two_processes_learn_from_pairs_as_one(runs, name):
    one, two = runs[1, name], runs[2, name]
    agree(one, two, DPO_METRICS)
    agree_in_evaluation(one, two)


@pytest.mark.parametrize("name", ANSWERS)
def test_two_processes_learn_from_answers_as_one(runs, name):
    one, two, method = runs[1, name], runs[2, name], name.split(",")[0]
    agree(one, two, metrics_of(method))
    agree_in_evaluation(one, two, but=OF_A_BATCH if method == "KTO" else ())
    if method == "KTO": assert one[1]["log"][1]["kl"] > 0 or one[1]["log"][0]["kl"] == 0


def test_fsdp2_gathers_and_reduces_through_the_head(tmp_path):
    """Sharded over two processes: the same gradients, although the head never calls the output layer; a sharded
    reference answers and follows."""
    (tmp_path / "sharded.py").write_text(FSDP2)
    launch(2, str(tmp_path / "sharded.py"))
