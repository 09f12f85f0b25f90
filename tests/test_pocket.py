"""The embedded default beyond what its notebooks show: the cache under stress, rows that never change, a start that
any loader reads."""
import shutil
import subprocess
import sys

import pytest
import torch

from posttrain import pocket
from posttrain.pocket import checkpoint, tasks


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


EXPECTED = {
    "reverse": ("reverse 478100=", "001874", "001784"),
    "sort": ("sort 6255846=", "2455668", "2465658"),
    "add": ("add 28+47=", "75", "74"),
    "countdown": ("countdown 6,2,7 to 1=", "6+2-7", "6*2+7"),
    "sentiment": ("praise stew and table:", "crisp and sweet", "bland and sweet"),
}


def test_rows_are_the_same_on_every_machine():
    # Saved results, the start checkpoint and the README's curve depend on these rows: a change must be deliberate.
    assert {task: tasks.problems(task, 1, seed=0)[0] for task in pocket.TASKS} == EXPECTED


@pytest.mark.parametrize("task", pocket.TASKS)
@pytest.mark.parametrize("kind", pocket.TYPES)
def test_every_type_is_recognised_by_the_data_room(task, kind):
    from posttrain.data.formats import COLUMNS, check_rows, dataset_type
    for conversational in (False, True):
        if conversational and kind == "stepwise_supervision":
            continue
        data = pocket.dataset(task, kind, n=8, conversational=conversational)
        assert dataset_type(data) == kind
        check_rows(data[:], [c for c in data.column_names if c in COLUMNS])


def test_two_processes_make_one_checkpoint(cache):
    code = "from posttrain import pocket; print(pocket.start_path('sort', steps=2))"
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)]
    said = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert said[0][0] == said[1][0] and [p.name for p in cache.iterdir()] == [said[0][0].strip().rsplit("/", 1)[1]]


def test_a_failed_training_leaves_nothing_behind(cache, monkeypatch):
    def broken(*args):
        raise RuntimeError("out of memory")
    monkeypatch.setattr(checkpoint, "train_start", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        pocket.start("sort", steps=2)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "garbled", "no folder"])
def test_a_damaged_start_is_made_again(damage, cache):
    path = pocket.start_path("sort", steps=2)
    whole = {file.name: file.read_bytes() for file in path.iterdir()}
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        content = whole[name]
        if damage == "missing": (path / name).unlink()
        elif damage == "no folder":
            shutil.rmtree(path)
            path.write_text("")
        else:
            wrong = {"truncated": content[:-5], "empty": b"", "garbled": content[:-5] + b"12345"}[damage]
            (path / name).write_bytes(wrong)
        assert pocket.start_path("sort", steps=2) == path
        assert {file.name: file.read_bytes() for file in path.iterdir()} == whole
        assert [each.name for each in cache.iterdir()] == [path.name]


def test_a_start_is_a_checkpoint_like_any_other(cache):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    path = pocket.start_path("sort", steps=2)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    ours, own_tokenizer = pocket.start("sort", steps=2)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), ours.state_dict().values()))
    chat = [{"role": "user", "content": "sort 31="}]
    def ids(tokenizer):
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids(tokenizer) == ids(own_tokenizer)
    assert pocket.complete(model, tokenizer, ["sort 31="]) == pocket.complete(ours, own_tokenizer, ["sort 31="])


def test_the_start_of_reverse_has_begun_and_not_finished():
    model, tokenizer = pocket.start("reverse")
    for conversational in (False, True):
        test = pocket.dataset("reverse", "prompt_only", n=200, split="test", conversational=conversational)
        assert 0.02 < pocket.accuracy(model, tokenizer, test) < 0.3


def test_adapters_fit_the_pocket_model():
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(pocket.model(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4))
    assert 0.0 <= pocket.accuracy(model, pocket.tokenizer(), pocket.dataset("reverse", "prompt_only", n=8)) <= 1.0
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    pocket.fit(model, pocket.tokenizer(), pocket.rows("reverse", n=8), steps=2, batch_size=4)
    assert any(not torch.equal(a, b) for a, b in zip(before, (p for p in model.parameters() if p.requires_grad)))
