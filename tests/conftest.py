"""What every test needs: no network, no telemetry, a fixed seed, short quiet runs."""
import os

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

import pytest


@pytest.fixture(autouse=True)
def seeded():
    from transformers import set_seed
    set_seed(0)


@pytest.fixture
def config(tmp_path):
    """Keyword arguments for a short, quiet run on the CPU, for any config class of ours or TRL's."""
    def make(**kw):
        return {**dict(output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", logging_steps=1, save_strategy="no",
                       max_steps=2, per_device_train_batch_size=4, train_sampling_strategy="sequential", disable_tqdm=True, seed=0, warmup_steps=0), **kw}
    return make
