"""Checkpoints as runs leave them: whole, torn, damaged, of other runs, and of a run that was finished."""
import json
import shutil
import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from posttrain import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
    pocket,
)
from posttrain.training.checkpoints import check_checkpoint, last_complete_checkpoint
from test_grpo import logs, noisy, weights

SAVED = dict(max_steps=4, save_steps=2, save_strategy="steps", per_device_train_batch_size=4, learning_rate=1e-3)
SAMPLED = dict(num_generations=4, max_completion_length=8, per_device_train_batch_size=8)


def sft(config, **options):
    return SFTTrainer(pocket.model(0), SFTConfig(**config(**{**SAVED, **options})),
                      train_dataset=pocket.dataset("reverse", "prompt_completion", n=20),
                      processing_class=pocket.tokenizer())


def dpo(config, model=None, peft_config=None, **options):
    return DPOTrainer(pocket.model(0) if model is None else model, args=DPOConfig(**config(**{**SAVED, **options})),
                      train_dataset=pocket.dataset("sort", "preference", n=20), processing_class=pocket.tokenizer(),
                      peft_config=peft_config)


def sampling(config, kind, settings, **options):
    given = config(**{**SAVED, **SAMPLED, **options})
    given.pop("train_sampling_strategy")
    data = pocket.dataset("reverse", "prompt_completion", n=20).rename_column("completion", "answer")
    return kind(pocket.start("reverse")[0], noisy, settings(**given), data, None, pocket.tokenizer())


def grpo(config, **options): return sampling(config, GRPOTrainer, GRPOConfig, **options)
def rloo(config, **options): return sampling(config, RLOOTrainer, RLOOConfig, **options)


def follows(config, **options): return dpo(config, **{**dict(sync_ref_model=True, ref_model_sync_steps=1), **options})


# a generation serves four steps, so that each checkpoint lies in the middle of one
def halfway(config, **options): return grpo(config, **{**dict(steps_per_generation=2, num_iterations=3), **options})


RUNS = {"SFT": sft, "TR-DPO": follows, "GRPO": halfway}


def resumed(trainer, folder=True):
    "A trainer that went on, and what was said."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=folder)
    return trainer, [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


@pytest.mark.parametrize("lost", [None, "model.norm.weight"])
def test_only_a_weight_that_is_really_missing_is_warned_of(lost, config, tmp_path, monkeypatch):
    """The pocket model's output matrix is its embedding, which a checkpoint holds once."""
    sft(config).train()
    path = tmp_path / "checkpoint-2/model.safetensors"
    kept = {name: weight for name, weight in load_file(path).items() if name != lost}
    if lost: save_file(kept, path)
    said = []
    monkeypatch.setattr("transformers.trainer.logger.warning", said.append)
    trainer = sft(config)
    trainer._load_from_checkpoint(str(path.parent))
    assert "lm_head.weight" not in kept and torch.equal(trainer.model.lm_head.weight, kept["model.embed_tokens.weight"])
    assert said == ([f"There were missing keys in the checkpoint model loaded: {[lost]}."] if lost else [])


def damaged(path, how):
    content = path.read_bytes()
    if how == "missing": path.unlink()
    else: path.write_bytes({"truncated": content[:-9], "empty": b"", "zeros": bytes(len(content))}[how])
    return content


@pytest.mark.parametrize("name", RUNS)
def test_each_part_that_is_damaged_is_named(name, config, tmp_path):
    whole = RUNS[name](config)
    whole.train()
    last, before = tmp_path / "checkpoint-4", str(tmp_path / "checkpoint-2")
    assert last_complete_checkpoint(tmp_path) == str(last)
    parts = sorted(path for path in last.iterdir() if path.suffix in (".safetensors", ".pt", ".pth", ".bin", ".json"))
    expected = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    expected |= {"TR-DPO": {"ref_model.safetensors"}, "GRPO": {"run-state-0.pt"}}.get(name, set())
    assert expected <= {path.name for path in parts}
    for path in parts:
        for how in ("missing", "truncated", "empty", "zeros"):
            # what resuming does not read may be missing
            if how == "missing" and path.suffix == ".json" and path.name != "trainer_state.json": continue
            content = damaged(path, how)
            with pytest.warns(UserWarning, match=f"checkpoint-4 is passed over: .*{path.name}"):
                assert last_complete_checkpoint(tmp_path, whole.needed_parts()) == before
            with pytest.raises((ValueError, FileNotFoundError), match=path.name): check_checkpoint(last)
            path.write_bytes(content)
    damaged(last / "optimizer.pt", "truncated")
    with pytest.raises(ValueError, match="checkpoint-4/optimizer.pt is damaged"):
        RUNS[name](config).train(resume_from_checkpoint=str(last))
    again, said = resumed(RUNS[name](config))
    assert torch.equal(weights(whole), weights(again)) and ["passed over" in text for text in said] == [True]


class Stopped(BaseException):
    "Stands for a kill: nothing of the run goes on."


@pytest.mark.parametrize("name", RUNS)
def test_stopped_at_each_file_of_a_checkpoint(name, config, tmp_path, tmp_path_factory, monkeypatch):
    "A folder that holds a checkpoint of this number is written anew, and the run is stopped at its k-th file."
    whole = RUNS[name](config)
    whole.train()
    import safetensors.torch
    left, saved = [0], {torch: torch.save, safetensors.torch: safetensors.torch.save_file}
    def counted(save):
        def write(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0: raise Stopped
            return save(*args, **kwargs)
        return write
    class Arm(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs): left[0] = k if state.global_step == 4 else 0
    for k in range(1, 12):
        shutil.copytree(tmp_path, target := tmp_path_factory.mktemp("stopped") / "run")
        monkeypatch.setattr(torch, "save", counted(saved[torch]))
        monkeypatch.setattr(safetensors.torch, "save_file", counted(saved[safetensors.torch]))
        trainer = RUNS[name](config, output_dir=str(target))
        trainer.add_callback(Arm())
        try: trainer.train()
        except Stopped: stopped = True
        else: stopped = False
        monkeypatch.undo()
        if not stopped: break
        again, said = resumed(RUNS[name](config, output_dir=str(target)))
        assert torch.equal(weights(whole), weights(again)), k
        assert len(said) == 1 and "passed over" in said[0] and "checkpoint-4/trainer_state.json is missing" in said[0]
    # optimizer, scheduler, random state, the arguments; and what the method adds
    assert k > {"SFT": 4, "TR-DPO": 5, "GRPO": 5}[name]


def test_only_numbers_are_checkpoints(config, tmp_path):
    trainer = sft(config)
    trainer.train()
    for name in ("checkpoint-9-best", "checkpoint-²", "checkpoint-", "checkpoint-x", "checkpoint-07.bak"):
        shutil.copytree(tmp_path / "checkpoint-2", tmp_path / name)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-6").write_text("a file")
    with pytest.warns(UserWarning, match="checkpoint-6 is no folder"): last_complete_checkpoint(tmp_path)


# ends with its last epoch (5 steps each), in the middle of one, and after a number of epochs
@pytest.mark.parametrize("options", [dict(max_steps=5), dict(max_steps=7), dict(max_steps=-1, num_train_epochs=2)],
                         ids=str)
def test_a_finished_run_is_not_trained_further(options, config, tmp_path):
    whole = sft(config, **options)
    whole.train()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for save in ("steps", "epoch"):
        again, said = resumed(sft(config, save_strategy=save, **options))
        assert torch.equal(weights(whole), weights(again)) and again.state.global_step == whole.state.global_step
        assert len(said) == 1 and f"the end of a run of {whole.state.global_step} steps" in said[0]
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    more, said = resumed(sft(config, **{**options, "max_steps": whole.state.global_step + 2}))
    assert not said and more.state.global_step == whole.state.global_step + 2


@pytest.mark.parametrize("changed, words", [
    (dict(per_device_train_batch_size=4), "per_device_train_batch_size=8"),
    (dict(num_generations=2), "num_generations=4"), (dict(steps_per_generation=1), "steps_per_generation=2"),
    (dict(processes=2), "by 2 processes")], ids=str)
def test_the_rest_of_a_generation_needs_the_same_sizes(changed, words, config, tmp_path):
    halfway(config).train()
    folder = tmp_path / "checkpoint-2"
    if changed.pop("processes", None):
        state = torch.load(folder / "run-state-0.pt")
        torch.save({**state, "sizes": {**state["sizes"], "processes": 2}}, folder / "run-state-0.pt")
        (folder / "run-state.json").unlink()
    with pytest.raises(ValueError, match=f"{words} in the middle of a generation"):
        halfway(config, **changed).train(resume_from_checkpoint=str(folder))


def test_between_generations_other_sizes_are_fine(config, tmp_path):
    grpo(config).train()
    again, _ = resumed(grpo(config, per_device_train_batch_size=4, num_generations=2, max_steps=6))
    assert again.state.global_step == 6


@pytest.mark.parametrize("other", [sft, dpo, rloo])
def test_a_checkpoint_of_another_method(other, config, tmp_path):
    grpo(config).train()
    for folder in (True, str(tmp_path / "checkpoint-2")):
        with pytest.raises(ValueError, match="was saved by GRPOTrainer, and this is .*pass the folder as `model`"):
            other(config).train(resume_from_checkpoint=folder)


def test_a_class_of_ones_own_goes_on(config, tmp_path):
    sft(config).train()
    class Own(SFTTrainer): pass
    again = Own(pocket.model(0), SFTConfig(**config(**{**SAVED, "max_steps": 5})), processing_class=pocket.tokenizer(),
                train_dataset=pocket.dataset("reverse", "prompt_completion", n=20))
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5


def test_weights_alone_are_no_checkpoint(config, tmp_path):
    sft(config, save_only_model=True).train()
    with pytest.raises(FileNotFoundError, match="optimizer.pt is missing.*save_only_model=True"):
        sft(config).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    none = pytest.raises(ValueError, match="no complete checkpoint")
    with pytest.warns(UserWarning, match="optimizer.pt is missing"), none:
        sft(config).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("wrong, kind", [("no/such/folder", FileNotFoundError), (5, TypeError)], ids=str)
def test_no_checkpoint(wrong, kind, config):
    with pytest.raises(kind, match="no/such/folder is no folder|got 5"): sft(config).train(resume_from_checkpoint=wrong)


def test_a_checkpoint_of_transformers_goes_on(config, tmp_path):
    "Without our record, as transformers and TRL write it."
    whole = sft(config)
    whole.train()
    (tmp_path / "checkpoint-2" / "run-state.json").unlink()
    again, said = resumed(sft(config), tmp_path / "checkpoint-2")
    assert not said and torch.equal(weights(whole), weights(again))


def test_parts_of_two_processes_are_asked_for(config, tmp_path):
    "The record names what every process wrote."
    grpo(config).train()
    folder = tmp_path / "checkpoint-4"
    record = json.loads((folder / "run-state.json").read_text())
    assert record["method"] == "GRPOTrainer" and record["processes"] == 1
    for name in ("run-state-1.pt", "rng_state_1.pth"): shutil.copy(folder / "run-state-0.pt", folder / name)
    size = (folder / "run-state-0.pt").stat().st_size
    record = {**record, "processes": 2, "files": record["files"] | {"run-state-1.pt": size, "rng_state_1.pth": size}}
    (folder / "run-state.json").write_text(json.dumps(record))
    assert last_complete_checkpoint(tmp_path) == str(folder)
    (folder / "run-state-1.pt").unlink()
    with pytest.warns(UserWarning, match="checkpoint-4/run-state-1.pt is missing"):
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_adapters_are_loaded_once(config, tmp_path, monkeypatch):
    def trained():
        torch.manual_seed(0)
        model = get_peft_model(pocket.model(0), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        return dpo(config, model=model)
    whole, again = trained(), trained()
    whole.train()
    from peft import PeftModel
    loaded, load = [], PeftModel.load_adapter
    def noted(self, path, adapter, *args, **kwargs):
        loaded.append(adapter)
        return load(self, path, adapter, *args, **kwargs)
    monkeypatch.setattr(PeftModel, "load_adapter", noted)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert loaded == ["default", "ref"] and torch.equal(weights(whole), weights(again))
    assert [n for n, p in again.model.named_parameters() if p.requires_grad and ".ref." in n] == []


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_stream_goes_on_beyond_its_first_pass(shuffled, accumulate, config, tmp_path):
    "Six rows, and steps of one or two: three passes."
    def run(resume=None):
        data = Dataset.from_list([{"text": letter * 5} for letter in "abcdef"]).to_iterable_dataset()
        seen = []
        class Spy(SFTTrainer):
            def training_step(self, model, inputs, *args, **kwargs):
                seen.append(self.processing_class.decode(inputs["completion_ids"][0].tolist())[0])
                return super().training_step(model, inputs, *args, **kwargs)
        args = config(**{**SAVED, "max_steps": 16 // accumulate, "save_steps": 1, "per_device_train_batch_size": 1})
        trainer = Spy(pocket.model(0), SFTConfig(**args, gradient_accumulation_steps=accumulate),
                      train_dataset=data.shuffle(seed=1, buffer_size=6) if shuffled else data,
                      processing_class=pocket.tokenizer())
        trainer.train(resume_from_checkpoint=resume)
        return "".join(seen), trainer
    whole, one = run()
    assert len(whole) == 16 and (shuffled or whole == "abcdefabcdefabcd")
    for step in (2, 3, 6, 7):  # within a pass, and at its end
        rest, other = run(str(tmp_path / f"checkpoint-{step}"))
        assert rest == whole[step * accumulate:] and torch.equal(weights(one), weights(other)), step
        assert one.state.epoch == other.state.epoch


class Interrupted(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3: raise KeyboardInterrupt


def test_an_interrupted_run_leaves_no_metrics_behind(config):
    fresh, used = (sft(config, save_strategy="no", logging_steps=4) for _ in range(2))
    used.add_callback(stop := Interrupted())
    with pytest.raises(KeyboardInterrupt): used.train()
    used.remove_callback(stop)
    used.model.load_state_dict(fresh.model.state_dict())
    used.optimizer = None
    fresh.train(), used.train()
    a, b = logs(fresh)[0], logs(used)[0]
    assert a["mean_token_accuracy"] == b["mean_token_accuracy"] and a["entropy"] == b["entropy"]


@pytest.mark.parametrize("options, steps", [(dict(logging_steps=10), [4]), (dict(logging_steps=3), [3, 4]),
                                            (dict(logging_steps=2), [2, 4]), (dict(logging_strategy="no"), []),
                                            (dict(logging_strategy="epoch", max_steps=7), [5, 7])], ids=str)
def test_the_last_window_is_logged(options, steps, config):
    trainer = sft(config, save_strategy="no", **options)
    trainer.train()
    assert [row["step"] for row in logs(trainer)] == steps
    if options.get("logging_steps") == 10:
        each = sft(config, save_strategy="no", logging_steps=1)
        each.train()
        losses = [row["loss"] for row in logs(each)]
        assert logs(trainer)[0]["loss"] == pytest.approx(sum(losses) / 4) and "entropy" in logs(trainer)[0]
