"""What every test needs: no network, no telemetry, a fixed seed, short quiet runs.

And the order of the files, and what CI may not skip."""
import os
import sys

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

import pytest

from gsm8k import may_be_missing

# Files that take a minute or more. Workers take whole files (so that each makes its engines and models once), these
# first.
COUNTS = {}
LONG = ("test_online", "test_vllm", "test_grpo", "test_dpo", "test_browser", "test_grpo_parity", "test_dpo_parity",
        "test_distributed", "test_checkpoints", "test_real_shapes", "test_seams", "test_vllm_habits", "test_parity",
        "test_sft", "test_compat", "test_sampling", "test_readme", "test_from_trl_answers", "test_fsdp")


def pytest_collection_modifyitems(items):
    rank = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONG)))


def not_on_ci(report):
    """On CI a test that is skipped has failed: browser, vLLM, TRL and two processes are all there."""
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not may_be_missing(reason):
            report.outcome, report.longrepr = "failed", f"on CI no test may be skipped; this one was: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    return not_on_ci((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return not_on_ci((yield))


def pytest_sessionfinish(session):
    """A worker tells how it got the answers of TRL's trainers."""
    if hasattr(session.config, "workeroutput") and "oracle" in sys.modules:
        session.config.workeroutput["oracles"] = sys.modules["oracle"].COUNTS


def pytest_testnodedown(node, error):
    for kind, count in getattr(node, "workeroutput", {}).get("oracles", {}).items():
        COUNTS[kind] = COUNTS.get(kind, 0) + count


def pytest_terminal_summary(terminalreporter):
    counts = COUNTS or (sys.modules["oracle"].COUNTS if "oracle" in sys.modules else {})
    if any(counts.values()):
        changed = f", {counts['changed']} live because their inputs changed: python tests/oracles/record.py"
        terminalreporter.write_line(f"answers of TRL: {counts['recorded']} recorded, {counts['live']} live and compared"
                                    + (changed if counts["changed"] else ""))


@pytest.fixture(autouse=True)
def seeded():
    from transformers import set_seed
    set_seed(0)


@pytest.fixture
def config(tmp_path):
    """Keyword arguments for a short, quiet run on the CPU, for any config class of ours or TRL's."""
    quiet = dict(output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
                 logging_steps=1, save_strategy="no", max_steps=2, per_device_train_batch_size=4,
                 train_sampling_strategy="sequential", disable_tqdm=True, seed=0, warmup_steps=0)
    return lambda **kw: {**quiet, **kw}


@pytest.fixture
def heard(caplog):
    """What is said to the logger `posttrain`; things that are said once may be said again in each test."""
    import logging

    from posttrain.data.formats import show_warnings_again
    show_warnings_again()
    caplog.set_level(logging.WARNING, logger="posttrain")
    return caplog


@pytest.fixture
def hub(monkeypatch):
    """The hub as transformers' Trainer sees it, without a network: this is the one place where it is replaced.

    It lists what was created and uploaded."""
    from types import SimpleNamespace
    calls = []

    def create_repo(name, **options):
        calls.append(("create_repo", name))
        return SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")

    def upload_folder(**options): calls.append(("upload_folder", options["repo_id"]))
    api = SimpleNamespace(create_repo=create_repo, upload_folder=upload_folder)
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: api)
    return calls
