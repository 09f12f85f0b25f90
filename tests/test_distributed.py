"""Two processes (gloo, on the CPU) train as one: the same gradient, the same metrics, for every way of cutting the step."""
import json
import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.distributed

# The work is done and asserted, its files are closed: leave without the interpreter's teardown, in which gloo's threads sometimes abort.
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
out, size, accumulate, options = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
method = options.pop("method", "SFT")
def data(**kw):
    if method == "SFT": return pocket.dataset("reverse", "prompt_completion", **kw)
    rows = pocket.dataset("sort", "preference", **kw)
    return rows.map(lambda row, i: {"rejected": row["rejected"][: 2 + i % 3] if i % 2 else row["rejected"] + row["chosen"][:3]}, with_indices=True)
rows = data(n=64, seed=1)
if options.pop("stream", False): rows = rows.to_iterable_dataset()
args = getattr(posttrain, method + "Config")(out, use_cpu=True, ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None, optim="sgd", lr_scheduler_type="constant", max_grad_norm=1e9, max_steps=2, per_device_train_batch_size=size,
                 gradient_accumulation_steps=accumulate, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, train_sampling_strategy="sequential", **{"learning_rate": 1.0, **options})
model = pocket.model(seed=0)
trainer = getattr(posttrain, method + "Trainer")(model, args=args, train_dataset=rows, eval_dataset=data(n=16, seed=2, split="test"), processing_class=pocket.tokenizer())
trainer.train()
metrics = trainer.evaluate()
if trainer.accelerator.is_main_process:
    torch.save(torch.cat([p.detach().flatten() for p in model.parameters()]), out + "/weights.pt")
    json.dump({"log": [r for r in trainer.state.log_history if "loss" in r], "eval": metrics, "processes": trainer.accelerator.num_processes}, open(out + "/log.json", "w"))
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
from posttrain.training.references import make_reference, sync_weights
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
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else [sys.executable]
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"})
    assert done.returncode == 0, done.stderr[-3000:]


def train(folder, processes, size, accumulate, **options):
    folder.mkdir()
    (folder / "train.py").write_text(SCRIPT)
    launch(processes, str(folder / "train.py"), str(folder), str(size), str(accumulate), json.dumps(options))
    return torch.load(folder / "weights.pt"), json.loads((folder / "log.json").read_text())


@pytest.mark.parametrize("options", [{}, {"loss_type": "dft", "packing": True, "max_length": 48}, {"stream": True}], ids=["nll", "packed dft", "stream"])
def test_two_processes_are_one(tmp_path, options):
    alone, log = train(tmp_path / "one", 1, 8, 1, **options)
    cuts = [("two accumulating", 2, 2)] + ([] if options else [("two", 4, 1)])
    for name, size, accumulate in cuts:
        together, other = train(tmp_path / name, 2, size, accumulate, **options)
        assert other["processes"] == 2
        assert torch.allclose(alone, together, atol=1e-5), (name, (alone - together).abs().max())
        for a, b in zip(log["log"], other["log"], strict=True):
            for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"):
                assert abs(a[key] - b[key]) <= 1e-4 * max(1, abs(a[key])), (name, key, a[key], b[key])
        # 16 rows: with a number that does not divide evenly, accelerate evaluates a few rows twice
        assert abs(log["eval"]["eval_loss"] - other["eval"]["eval_loss"]) < 1e-4


@pytest.mark.parametrize("options", [{"loss_type": ["sigmoid", "aot", "aot_unpaired", "sft"]}, {"precompute_ref_log_probs": True, "loss_type": ["ipo"]}, {"sync_ref_model": True, "ref_model_sync_steps": 1}],
                         ids=["losses that sort", "precomputed", "following reference"])
def test_two_processes_learn_from_pairs_as_one(tmp_path, options):
    options = {"method": "DPO", "learning_rate": .1, **options}
    alone, log = train(tmp_path / "one", 1, 8, 1, **options)
    together, other = train(tmp_path / "two", 2, 2, 2, **options)
    assert other["processes"] == 2 and torch.allclose(alone, together, atol=1e-5), (alone - together).abs().max()
    for a, b in zip(log["log"], other["log"], strict=True):
        for key in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen", "logits/rejected", "entropy", "mean_token_accuracy", "num_tokens"):
            if key == "rewards/accuracies" and abs(a["rewards/margins"]) < 1e-6: continue  # a tie but for rounding: the policy is the reference
            assert abs(a[key] - b[key]) <= 1e-4 * max(1, abs(a[key])), (key, a[key], b[key])
    if "aot" not in options.get("loss_type", ()): assert abs(log["eval"]["eval_loss"] - other["eval"]["eval_loss"]) < 1e-4  # a sort in evaluation is that of a batch


def test_fsdp2_gathers_and_reduces_through_the_head(tmp_path):
    """Sharded over two processes: the same gradients, although the head never calls the output layer; a sharded reference answers and follows."""
    (tmp_path / "sharded.py").write_text(FSDP2)
    launch(2, str(tmp_path / "sharded.py"))
