"""Every field of every config: wrong types, values out of range, misspelt names; and what must keep working."""
import copy
import dataclasses
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

import posttrain
from posttrain.training.config import RANGES, UNCHECKED, PostConfig
from posttrain.training.fields import default_of, hints_of, limits_of, option
from posttrain.training.types import members

CONFIGS = [getattr(posttrain, name).config_class for name in posttrain.__all__ if name.endswith("Trainer")]
NAN = float("nan")
PLAIN = {int, float, bool, str, list, dict, type(None)}


def make(cls, folder, **options):
    size = {"per_device_train_batch_size": 16} if hasattr(cls, "num_generations") else {}
    return cls(**{**dict(output_dir=str(folder), use_cpu=True, report_to="none"), **size, **options})


def wrong_values(hint):
    """Values of another type than the declared one, none of which could be meant."""
    kinds = {getattr(kind, "__origin__", kind) for kind in members(hint)}
    wrong = [object(), 1 + 2j, print]
    if not kinds & {int, float}: wrong += [3, 2.5]
    if not kinds & {str, dict}: wrong += ["no", "3", "0.5", "None"]
    if bool not in kinds: wrong += [True]
    if list not in kinds: wrong += [["a"], [1]]
    if dict not in kinds: wrong += [{"a": 1}]
    if float not in kinds: wrong += [2.5]
    return wrong


@pytest.mark.parametrize("cls", CONFIGS)
def test_a_value_of_another_type_is_named(cls, tmp_path):
    """Every field of every config, those of transformers included."""
    silent, unclear, tried = [], [], 0
    for field in dataclasses.fields(cls):
        hint = hints_of(cls).get(field.name)
        kinds = [getattr(kind, "__origin__", kind) for kind in members(hint)] if hint else []
        # what only transformers knows it checks itself
        if not field.init or field.name in UNCHECKED or not set(kinds) <= PLAIN: continue
        for value in wrong_values(hint):
            if value is True and field.name in ("include_num_input_tokens_seen", "scale_rewards"): continue
            tried += 1
            try: make(cls, tmp_path, **{field.name: value})
            except (TypeError, ValueError) as e:
                if field.name not in str(e) or repr(value)[:12] not in str(e): unclear.append(f"{field.name}: {e}")
            else: silent.append((field.name, value))
    assert tried > 800 and not silent and not unclear, (silent, unclear)


@pytest.mark.parametrize("cls", CONFIGS)
def test_a_value_out_of_its_range_is_named(cls, tmp_path):
    """Just beyond each bound, NaN, infinity, and a word that is no choice."""
    missed, tried = [], 0
    for field in dataclasses.fields(cls):
        limits, hint = limits_of(field, cls), hints_of(cls).get(field.name)
        kinds = members(hint) if hint else ()
        beyond = [limits[name] + step for name, step in (("low", -1), ("above", 0), ("high", 1), ("below", 0))
                  if limits[name] is not None and abs(limits[name]) < math.inf]
        if float in kinds: beyond += [NAN]
        if float in kinds and limits["low"] is not None and limits["high"] is None: beyond += [math.inf]
        if limits["choices"]: beyond += ["no such word"]
        if any(getattr(kind, "__origin__", None) is list for kind in kinds): beyond = [[value] for value in beyond]
        for value in beyond:
            tried += 1
            try: make(cls, tmp_path, **{field.name: value})
            except ValueError as e:
                if field.name not in str(e): missed.append(f"{field.name}: {e}")
            else: missed.append((field.name, value))
    assert tried > 60 and not missed, missed


# What transformers takes in silence, or refuses only in the middle of a run.
SILENT = [
    dict(gradient_accumulation_steps=-1), dict(gradient_accumulation_steps=0), dict(max_steps=0), dict(max_steps=-2),
    dict(num_train_epochs=0), dict(num_train_epochs=-3), dict(weight_decay=-1), dict(max_grad_norm=NAN),
    dict(max_grad_norm=-1), dict(learning_rate=-1e-5), dict(learning_rate=NAN), dict(learning_rate=math.inf),
    dict(warmup_steps=-1), dict(adam_beta1=1.0), dict(adam_beta2=2), dict(adam_epsilon=-1e-8), dict(save_steps=0),
    dict(save_steps=-5), dict(save_total_limit=0), dict(logging_steps=-1), dict(eval_steps=-1), dict(eval_delay=-1),
    dict(per_device_train_batch_size=0), dict(per_device_eval_batch_size=-1), dict(seed=-1), dict(seed=2**32),
    dict(dataloader_num_workers=-1), dict(lr_scheduler_type="cosin"), dict(optim="adam"), dict(eval_strategy="step"),
    dict(train_sampling_strategy="length"), dict(log_level="loud"), dict(neftune_noise_alpha=-1),
    dict(label_smoothing_factor=.1), dict(include_for_metrics=["inputs"]), dict(router_aux_loss_coef=-.1),
]


@pytest.mark.parametrize("options", SILENT, ids=repr)
def test_silent_values_of_transformers_are_named(options, tmp_path):
    (name, value), = options.items()
    with pytest.raises(ValueError, match=name) as error: make(posttrain.SFTConfig, tmp_path, **options)
    wrong = value[0] if isinstance(value, list) else value
    assert str(wrong) in str(error.value)


@pytest.mark.parametrize("options, words", [
    (dict(bf16="no"), "bf16 of SFTConfig must be True or False or None, got 'no': write False, without quotes"),
    (dict(learning_rate="2e-5"), "must be a number, got '2e-5': write 2e-5, without quotes"),
    (dict(max_steps=2.5), "must be a whole number, got 2.5"), (dict(model_init_kwargs="x"), "a dict or None, got 'x'"),
    (dict(label_names="labels"), r"write \['labels'\]"), (dict(num_train_epoch=1), "Did you mean 'num_train_epochs'"),
    (dict(learning_rat=1), "Did you mean 'learning_rate'"), (dict(evaluation_strategy="steps"), "'eval_strategy' now"),
    (dict(max_seq_length=8), "'max_length' now"), (dict(peft_config=None), "Give it to the trainer"),
    (dict(zzz=1), "SFTConfig has no field 'zzz'.$"),
])
def test_what_to_write_instead_is_said(options, words, tmp_path):
    with pytest.raises(TypeError, match=words): make(posttrain.SFTConfig, tmp_path, **options)


@pytest.mark.parametrize("options, kind, words", [
    (dict(reward_weights=1.0), TypeError, r"reward_weights of GRPOConfig .* got 1.0: write \[1.0\]"),
    (dict(chat_template_kwargs="x"), TypeError, "chat_template_kwargs .* a dict or None, got 'x'"),
    (dict(generation_kwargs=["stop"]), TypeError, r"generation_kwargs .* a dict or None, got \['stop'\]"),
    (dict(generation_kwargs="{'stop': 1}"), ValueError, "no JSON"),
    (dict(reward_weights=[NAN]), ValueError, "reward_weights.*NaN"), (dict(num_generations=True), TypeError, "True"),
    (dict(per_device_train_batch_size=0), ValueError, "per_device_train_batch_size=0"),
    (dict(vllm_importance_sampling_clip_max=-1), ValueError, "clip_max=-1"),
    (dict(off_policy_mask_threshold=-.1), ValueError, "off_policy_mask_threshold=-0.1"),
    (dict(sapo_temperature_pos=0), ValueError, "sapo_temperature_pos=0"), (dict(vespo_k_pos=-1), ValueError, "vespo_k"),
    (dict(entropy_coef_min=.5, entropy_coef_max=.1), ValueError, "entropy_coef_min=0.5 must not be above"),
    (dict(ref_model_sync_steps=1.5), TypeError, "whole number, got 1.5"),
    (dict(loss_type="dapoo"), ValueError, "Did you mean 'dapo'"),
    (dict(num_generation=4), TypeError, "num_generations"),
])
def test_fields_of_grpo(options, kind, words, tmp_path):
    with pytest.raises(kind, match=words): make(posttrain.GRPOConfig, tmp_path, **options)


def test_what_is_meant_is_taken(tmp_path):
    args = make(posttrain.GRPOConfig, tmp_path, num_generations=4.0, max_steps=np.int64(3), seed=7.0,
                learning_rate=np.float32(.5), shuffle_dataset=np.bool_(False), reward_weights=(1, 2.5),
                max_grad_norm=None, generation_kwargs='{"stop": ["x"]}', resume_from_checkpoint=True)
    assert [type(value) for value in (args.num_generations, args.max_steps, args.seed)] == [int] * 3
    assert args.shuffle_dataset is False and args.learning_rate == .5 and args.sampling().stop == ("x",)
    assert make(posttrain.SFTConfig, tmp_path, max_grad_norm=math.inf, max_steps=-1).max_grad_norm == math.inf
    from pathlib import Path
    assert posttrain.SFTConfig(Path(tmp_path), use_cpu=True).output_dir == str(tmp_path)


@pytest.mark.parametrize("cls", CONFIGS)
def test_copies_and_pickles(cls, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        args = make(cls, tmp_path, seed=3, gradient_checkpointing=True)
        copies = [copy.copy(args), copy.deepcopy(args), pickle.loads(pickle.dumps(args)),
                  dataclasses.replace(args, learning_rate=1e-4), cls.adopt(args)]
        plain = TrainingArguments(str(tmp_path), seed=3, use_cpu=True, report_to="none")
        assert cls.adopt(plain).seed == 3
    assert all(type(other) is cls and other.seed == 3 and other.gradient_checkpointing for other in copies)


@pytest.mark.parametrize("cls", CONFIGS)
def test_a_config_is_made_again_from_its_dict(cls, tmp_path):
    "transformers writes <STOP_TOKEN> for each field whose name ends in _token."
    own = {"stop_token": "eos", "pad_token": "<|pad|>", "eos_token": "<|end|>"}
    own = {name: value for name, value in own.items() if name in cls.__dataclass_fields__}
    args = cls(str(tmp_path), use_cpu=True, **own)
    again = cls(**args.to_dict())
    assert again.to_dict() == args.to_dict() and all(getattr(again, name) == value for name, value in own.items())
    secret = cls(str(tmp_path), use_cpu=True, hub_token="hf_abc")
    assert secret.to_dict()["hub_token"] == "<HUB_TOKEN>" and "hf_abc" not in secret.to_json_string()


def test_defaults_are_within_their_ranges(tmp_path):
    """What a field is by itself passes its own check, and every range of the table is of a field that there is."""
    for cls in CONFIGS:
        args = make(cls, tmp_path)
        for field in dataclasses.fields(cls):
            if limits_of(field, cls)["refused"]: assert getattr(args, field.name) == default_of(field)
    assert set(RANGES) <= {field.name for field in dataclasses.fields(TrainingArguments)}


def test_a_config_of_ones_own(tmp_path):
    """Fields of a subclass are checked, its own `__init__` may take what it likes, and plain fields need no option."""
    @dataclasses.dataclass
    class Mine(posttrain.SFTConfig):
        strength: float = option(0.5, "How strong.", low=0, high=1)
        plain: int = 3
        names: list[str] = dataclasses.field(default_factory=lambda: ["a"])

    class Wrapped(Mine):
        def __init__(self, *args, extra=None, **kwargs):
            super().__init__(*args, **kwargs)
            self.extra = extra

    assert make(Mine, tmp_path, plain=4.0).plain == 4 and make(Wrapped, tmp_path, extra=5).extra == 5
    for wrong, words in ((dict(strength=2), "strength=2"), (dict(plain="4"), "plain of Mine"),
                         (dict(names="a"), "names"), (dict(strenght=1), "Did you mean 'strength'")):
        with pytest.raises((TypeError, ValueError), match=words): make(Mine, tmp_path, **wrong)
    with pytest.raises(TypeError, match="strenght"): make(Wrapped, tmp_path, strenght=1)


def test_the_newer_name_of_checkpointing_is_set(tmp_path, monkeypatch):
    """transformers 5.23 calls it activation_checkpointing, and warns of the old name unless the new one is set."""
    args = make(PostConfig, tmp_path)
    old, new = "gradient_checkpointing", "activation_checkpointing"
    for given, value in (({old: True}, True), ({new: True}, True), ({}, False)):
        for name in (old, new): monkeypatch.setattr(args, name, given.get(name), raising=False)
        args._set_checkpointing("gradient_checkpointing", False)
        assert args.gradient_checkpointing is args.activation_checkpointing is value


def test_tensors_are_no_numbers(tmp_path):
    with pytest.raises(TypeError, match="learning_rate of SFTConfig must be a number, got tensor"):
        make(posttrain.SFTConfig, tmp_path, learning_rate=torch.tensor(1e-3))


GIVEN = [("data_collator", 5), ("compute_metrics", "x"), ("callbacks", "x"), ("callbacks", [3]), ("optimizers", "adam"),
         ("optimizers", ("adam", None)), ("optimizer_cls_and_kwargs", 5), ("peft_config", {"r": 4}),
         ("peft_config", "lora"), ("formatting_func", "x"), ("preprocess_logits_for_metrics", 1),
         ("args", {"max_steps": 1}), ("args", "x"), ("processing_class", "x")]


@pytest.mark.parametrize("name, value", GIVEN, ids=repr)
def test_what_a_trainer_is_given_is_checked_before_a_model_is_loaded(name, value, tmp_path):
    rows = posttrain.pocket.dataset("reverse", "prompt_completion", n=4)
    given = {"args": make(posttrain.SFTConfig, tmp_path), name: value}
    with pytest.raises(TypeError, match=f"{name} .*must be a"):
        posttrain.SFTTrainer("/nowhere/model", train_dataset=rows, **given)


def test_a_config_of_another_method_is_refused(tmp_path):
    for cls, other in ((posttrain.SFTConfig, posttrain.DPOConfig), (posttrain.RLOOConfig, posttrain.GRPOConfig)):
        with pytest.raises(TypeError, match=f"args is a {other.__name__}; expected a {cls.__name__}"):
            cls.adopt(make(other, tmp_path))


def test_a_model_that_is_not_there_is_named(tmp_path):
    (tmp_path / "model").mkdir()
    for path in (tmp_path / "modle", str(tmp_path / "modle")):
        with pytest.raises(FileNotFoundError, match="modle.*no such folder. Did you mean '.*model'"):
            posttrain.SFTTrainer(path, args=make(posttrain.SFTConfig, tmp_path),
                                 train_dataset=posttrain.pocket.dataset("reverse", "prompt_completion", n=4))
