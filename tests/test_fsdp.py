"""FSDP2 by accelerate's own settings, on two processes of a CPU: policy and reference in shards learn as one process.

accelerate shards on devices alone and passes over FSDP on a CPU, so here the processes call themselves those of one."""
import json
import os

import pytest
import torch

from test_distributed import LEAVE, launch

pytestmark = pytest.mark.distributed
FSDP2 = dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
             FSDP_TRANSFORMER_CLS_TO_WRAP="Qwen3DecoderLayer", FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT")

SCRIPT = LEAVE + """
import copy, json, os, sys, torch
import accelerate.state as state
from accelerate.utils import DistributedType
init = state.AcceleratorState.__init__
def as_on_a_device(self, *args, **kwargs):
    known = state.PartialState._shared_state
    if known.get("distributed_type") == DistributedType.MULTI_CPU: known["distributed_type"] = DistributedType.MULTI_XPU
    init(self, *args, **kwargs)
if os.environ.get("ACCELERATE_USE_FSDP"): state.AcceleratorState.__init__ = as_on_a_device

import posttrain
from peft import LoraConfig
from transformers import Qwen3ForSequenceClassification, Qwen3ForTokenClassification
from posttrain import pocket
from test_answers import UNPAIRED
from test_dpo_parity import moved, rows

processes = int(os.environ.get("WORLD_SIZE", 1))
reference = pocket.model(seed=0)
policy = moved(reference, 1, .2)

judges = {"Reward": (Qwen3ForSequenceClassification, 1), "PRM": (Qwen3ForTokenClassification, 2)}
task_type = {"Reward": "SEQ_CLS", "PRM": "TOKEN_CLS"}

def model_of(method):
    if method not in judges: return copy.deepcopy(policy)
    kind, labels = judges[method]
    judge = kind(type(policy.config)(**{**policy.config.to_dict(), "num_labels": labels}))
    score = torch.linspace(-.1, .2, labels * policy.config.hidden_size).view(labels, -1)
    judge.load_state_dict({**policy.state_dict(), "score.weight": score}, strict=False)
    if judge.score.bias is not None: torch.nn.init.zeros_(judge.score.bias)
    return judge

def data_of(method):
    if method in UNPAIRED: return posttrain.unpair_preference_dataset(rows(8)).shuffle(seed=0)
    if method in DISTILS: return pocket.dataset("reverse", "prompt_completion", n=16, seed=3)
    return pocket.dataset("add", "stepwise_supervision", n=16, seed=3) if method == "PRM" else rows(16)

SAMPLES = ("PPO", "OnlineDPO", "XPO", "NashMD")
DISTILS = ("GKD", "Distillation", "MiniLLM")

def lengths(completions, **columns): return [len(text) / 4 for text in completions]

def trainer(out, method, adapter=False, **options):
    args = getattr(posttrain, method + "Config")(out, **{**dict(
        use_cpu=True, ddp_backend="gloo" if processes > 1 else None, lr_scheduler_type="constant", max_steps=3,
        per_device_train_batch_size=4 // processes, logging_steps=1, save_strategy="steps", save_steps=2, seed=0,
        report_to="none", disable_tqdm=True, train_sampling_strategy="sequential", learning_rate=1e-3), **options})
    config = LoraConfig(target_modules=["q_proj"], r=4, task_type=task_type.get(method))
    given = {"peft_config": config} if adapter else (
        {"ref_model": copy.deepcopy(reference)} if method in (*UNPAIRED, *SAMPLES, "DPO") else {})
    if method in SAMPLES: given["reward_funcs"] = lengths
    if method in DISTILS: given["teacher_model"] = copy.deepcopy(reference)
    return getattr(posttrain, method + "Trainer")(model_of(method), args=args, train_dataset=data_of(method),
                                                  processing_class=pocket.tokenizer(), **given)

def whole(model):
    parameters = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in parameters])

def losses(run): return [row for row in run.state.log_history if "loss" in row]

found = {}
for name, job in json.load(open(sys.argv[1])).items():
    out = sys.argv[2] + "/" + name.replace(" ", "-")
    run = trainer(out, **job)
    run.train()
    again = trainer(out, **job)
    again.train(resume_from_checkpoint=out + "/checkpoint-2")
    run.save_model(out + "/saved")
    models = [name for name in ("model", "ref_model", "teacher_model") if getattr(run, name, None) is not None]
    parts = {model: {type(p).__name__ for p in getattr(run, model).parameters()} for model in models}
    torch.save(whole(run.model), out + f"/weights-{run.args.process_index}.pt")
    found[name] = dict(log=losses(run), goes_on=torch.equal(whole(run.model), whole(again.model)),
                       shards={model: "DTensor" in kinds for model, kinds in parts.items()})
if run.accelerator.is_main_process:
    with open(sys.argv[2] + "/found.json", "w") as file: json.dump(found, file)
leave(run.accelerator.wait_for_everyone)
"""
JOBS = {**{method: dict(method=method) for method in ("DPO", "KTO", "BCO", "CPO", "ORPO", "Reward", "PRM")},
        "KTO precomputed": dict(method="KTO", precompute_ref_log_probs=True),
        "BCO following reference": dict(method="BCO", sync_ref_model=True, ref_model_sync_steps=1),
        "KTO adapter": dict(method="KTO", adapter=True, learning_rate=.1),
        **{f"PPO {critic}": dict(method="PPO", critic=critic, max_completion_length=6, num_ppo_epochs=2,
                                 critic_learning_rate=5e-3) for critic in ("head", "model")},
        "PPO adapter": dict(method="PPO", adapter=True, max_completion_length=6, num_ppo_epochs=2),
        **{method: dict(method=method, max_completion_length=6, **more) for method, more in (
            ("OnlineDPO", {}), ("XPO", dict(alpha=.05, bonus_over="rounds")), ("NashMD", {}))},
        **{f"{method} adapter": dict(method=method, adapter=True, max_completion_length=6, **more)
           for method, more in (("XPO", dict(alpha=.05)), ("NashMD", {}))},
        "GKD": dict(method="GKD", max_completion_length=6), "GKD of the teacher": dict(
            method="GKD", lmbda=0, seq_kd=True, max_completion_length=6),
        "GKD kept": dict(method="GKD", lmbda=0, precompute_teacher=True),
        **{f"MiniLLM{name}": dict(method="MiniLLM", max_completion_length=6, **more) for name, more in (
            ("", {}), (" adapter", dict(adapter=True, learning_rate=.01)), (" of the student", dict(
                teacher_mixed_alpha=0.0, num_iterations=2)))},
        "Distillation adapter": dict(method="Distillation", adapter=True, max_completion_length=6, learning_rate=.1),
        # beside the adapter the layer of the labels learns, as a copy of PEFT's
        **{f"{method} adapter": dict(method=method, adapter=True, learning_rate=.01) for method in ("Reward", "PRM")}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All jobs in one process, and in shards on two: name -> log and weights of each."""
    folder, found = tmp_path_factory.mktemp("fsdp"), {}
    (folder / "train.py").write_text(SCRIPT)
    (folder / "jobs.json").write_text(json.dumps(JOBS))
    tests = os.path.dirname(os.path.abspath(__file__))
    for processes, settings in ((1, {}), (2, FSDP2)):
        here = folder / str(processes)
        here.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            paths = os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH")]))
            for name, value in {**settings, "PYTHONPATH": paths}.items(): patch.setenv(name, value)
            launch(processes, str(folder / "train.py"), str(folder / "jobs.json"), str(here))
        for name, run in json.loads((here / "found.json").read_text()).items():
            out = here / name.replace(" ", "-")
            found.setdefault(name, []).append((run, torch.load(out / "weights-0.pt"), out))
    return found


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_in_shards_learn_as_one(runs, name):
    (alone, weights, _), (sharded, gathered, _) = runs[name]
    assert not any(alone["shards"].values()) and all(sharded["shards"].values()) and sharded["shards"]["model"]
    assert torch.allclose(weights, gathered, atol=1e-4), (weights - gathered).abs().max()
    for one, two in zip(alone["log"], sharded["log"], strict=True):
        assert one.keys() == two.keys()
        for key, value in one.items():
            if key.startswith("time"): continue
            assert abs(value - two[key]) <= 1e-3 * max(1, abs(value)), (key, value, two[key])


@pytest.mark.parametrize("name", JOBS)
def test_what_is_saved_is_whole(runs, name):
    "Although the checkpoints are in shards."
    from safetensors.torch import load_file
    alone, sharded = (load_file(folder / "saved" / ("adapter_model.safetensors" if "adapter" in name else
                                                    "model.safetensors")) for _, _, folder in runs[name])
    assert alone.keys() <= sharded.keys() <= {*alone, "lm_head.weight"}  # gathered weights that are tied come twice
    for key, weight in alone.items(): assert torch.allclose(weight, sharded[key], atol=1e-4), key


@pytest.mark.parametrize("name", JOBS)
def test_a_run_in_shards_goes_on_where_it_stopped(runs, name):
    (alone, *_), (sharded, *_) = runs[name]
    assert alone["goes_on"] and sharded["goes_on"]
