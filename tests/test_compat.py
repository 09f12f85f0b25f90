"""The oldest transformers that settings.ini admits, the one Colab ships: short runs give the same losses there."""
import configparser
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SCRIPT = """
import json, sys, posttrain, transformers
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
result = {"version": transformers.__version__, "full": run("SFT"), "lora": run("SFT", peft_config=adapter()),
          "dpo": run("DPO", sorts), "dpo lora": run("DPO", peft_config=adapter())}
print("RESULT" + json.dumps(result))
"""


@pytest.fixture(scope="module")
def oldest():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini")
    return next(r.split(">=")[1] for r in parser["DEFAULT"]["requirements"].split() if r.startswith("transformers"))


def run(tmp_path, path=None):
    env = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, env=env,
                          timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT")[1])


def install_old(folder, *requirements):
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--retries", "1", "--target", str(folder)]
    done = subprocess.run([*pip, *requirements], capture_output=True, text=True)
    if "Failed to establish a new connection" in done.stderr or "Temporary failure in name resolution" in done.stderr:
        pytest.skip("no network: the oldest transformers cannot be installed beside the newest")
    assert done.returncode == 0, done.stderr[-3000:]


def test_oldest_transformers_trains_the_same(tmp_path, oldest):
    install_old(tmp_path / "old", f"transformers=={oldest}.*", "tokenizers==0.22.*", "huggingface-hub>=1.5,<2")
    old, new = run(tmp_path, tmp_path / "old"), run(tmp_path)
    assert old["version"].startswith(oldest) and not new["version"].startswith(oldest)
    for key in ("full", "lora", "dpo", "dpo lora"):
        equal = all(abs(a - b) < 1e-4 for a, b in zip(old[key], new[key], strict=True))
        assert len(old[key]) == 6 and equal, (old[key], new[key])
