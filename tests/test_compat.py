"""The oldest releases that settings.ini admits, Colab's transformers among them: short runs give the same losses."""
import configparser
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# torch and what pictures need stay as they are. Beside the oldest stand the releases that they ask for.
HERE = ("torch", "matplotlib", "ipywidgets")
ASKED_FOR = ("tokenizers==0.22.*", "huggingface-hub>=1.5,<2", "dill==0.3.8", "multiprocess==0.70.16",
             "fsspec[http]==2025.3.0")

SCRIPT = """
import json, sys, posttrain
from importlib.metadata import version
from posttrain import pocket
from peft import LoraConfig
ROWS = {"SFT": ("reverse", "prompt_completion"), "DPO": ("sort", "preference")}
def adapter(): return LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
def run(method, options={}, **kw):
    train, test = (pocket.dataset(*ROWS[method], n=n, seed=seed, split=split)
                   for n, seed, split in ((40, 1, "train"), (10, 2, "test")))
    args = getattr(posttrain, method + "Config")(
        sys.argv[1], **options, use_cpu=True, max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, learning_rate=1e-3, seed=0,
        eval_strategy="steps", eval_steps=2)
    trainer = getattr(posttrain, method + "Trainer")(
        pocket.model(seed=0), args=args, train_dataset=train, eval_dataset=test,
        processing_class=pocket.tokenizer(), **kw)
    trainer.train()
    return [r.get("loss", r.get("eval_loss")) for r in trainer.state.log_history if "loss" in r or "eval_loss" in r]
sorts = dict(loss_type=["sigmoid", "aot"], sync_ref_model=True, ref_model_sync_steps=2)
result = {"versions": {name: version(name) for name in sys.argv[2:]},
          "full": run("SFT"), "lora": run("SFT", peft_config=adapter()),
          "dpo": run("DPO", sorts), "dpo lora": run("DPO", peft_config=adapter())}
print("RESULT" + json.dumps(result))
"""


@pytest.fixture(scope="module")
def oldest():
    """Name -> lower bound, of what is needed."""
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini")
    bounds = dict(requirement.split(">=") for requirement in parser["DEFAULT"]["requirements"].split())
    return {name: version for name, version in bounds.items() if name not in HERE}


def run(tmp_path, names, *paths):
    """Short runs, with the packages in `paths` before those that are installed, and the versions of `names`."""
    there = os.environ.get("PYTHONPATH")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*paths, *([there] if there else []))))}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path), *names], capture_output=True, text=True,
                          env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT")[1])


def install_old(folder, *requirements):
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--retries", "1", "--target", str(folder)]
    done = subprocess.run([*pip, *requirements], capture_output=True, text=True)
    if "Failed to establish a new connection" in done.stderr or "Temporary failure in name resolution" in done.stderr:
        pytest.skip("no network: the oldest releases cannot be installed beside the newest")
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_oldest_releases_train_the_same(tmp_path, oldest):
    install_old(tmp_path / "old", *(f"{name}=={version}" for name, version in oldest.items()), *ASKED_FOR)
    old, new = run(tmp_path, oldest, tmp_path / "old"), run(tmp_path, oldest)
    for name, bound in oldest.items():
        assert re.fullmatch(rf"{re.escape(bound)}(\.0)*", old["versions"][name]), (name, old["versions"])
    assert old["versions"] != new["versions"]
    for key in ("full", "lora", "dpo", "dpo lora"):
        equal = all(abs(a - b) < 1e-4 for a, b in zip(old[key], new[key], strict=True))
        assert len(old[key]) == 6 and equal, (old[key], new[key])
