"""What TRL's own tests ask of KTO, BCO, CPO and ORPO, asked of ours, on models that are made here.

Each test names those of TRL that it stands for. TRL's kernels of Liger, its 4-bit weights and its models that see are
not here, and encoder-decoders are refused."""
import functools

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict, disable_progress_bars
from peft import LoraConfig, get_peft_model
from torch.nn.functional import one_hot
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

import posttrain
from posttrain import pocket
from posttrain.data.collate import collate_unpaired, mismatched
from posttrain.data.mismatched import with_mismatched
from posttrain.foundations.layouts import lay_out
from posttrain.foundations.preferences import Judged
from posttrain.offline.bco import SHIFTS, bco
from posttrain.training.reward_shift import RewardShift
from test_real_shapes import CALL, WEATHER, assistant, user

disable_progress_bars()
METHODS, UNPAIRED = ("KTO", "BCO", "CPO", "ORPO"), ("KTO", "BCO")
PAIRS = ["standard preference", "standard implicit_prompt", "conversational preference",
         "conversational implicit_prompt"]
ANSWERS = ["standard unpaired_preference", "conversational unpaired_preference"]
LORA = dict(r=8, lora_alpha=32, lora_dropout=.05, bias="none", task_type="CAUSAL_LM")


def zen(kind, split="train", n=8):
    "Rows as in TRL's test data of this name."
    form, kind = kind.split()
    made = pocket.dataset("sort", kind.replace("implicit_prompt", "preference"), n=n, split=split,
                          conversational=form == "conversational")
    if kind != "implicit_prompt": return made
    return made.map(lambda row: {s: row["prompt"] + row[s] for s in ("chosen", "rejected")}, remove_columns="prompt")


def usual(method): return ANSWERS[0] if method in UNPAIRED else PAIRS[0]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    "A model and its tokenizer in a folder."
    folder = str(tmp_path_factory.mktemp("model"))
    pocket.model(seed=0).save_pretrained(folder)
    pocket.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def make(path, config):
    def of(method, kind=None, arguments=None, **options):
        given = dict(model=path, train_dataset=zen(kind or usual(method)))
        settings = dict(learning_rate=.01, max_steps=3, per_device_train_batch_size=2)
        args = getattr(posttrain, f"{method}Config")(**config(**{**settings, **options}))
        return getattr(posttrain, f"{method}Trainer")(args=args, **{**given, **(arguments or {})})
    return of


def trained(trainer, but=()):
    "Train; each weight that learns is another one afterwards, and each other one is the same."
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] > 0
    for n, p in trainer.model.named_parameters():
        if any(part in n for part in but): continue
        assert torch.equal(before[n], p) != p.requires_grad, n
    return trainer


# ---------------------------------------------------------------- KTO and BCO: test_train, ..._with_precompute, _eval
TRAINED = [("KTO", PAIRS[0], dict(precompute_ref_log_probs=True)), ("KTO", ANSWERS[0], {}),
           ("KTO", PAIRS[3], dict(loss_type="apo_zero_unpaired", precompute_ref_log_probs=True)),
           ("KTO", ANSWERS[0], dict(loss_type="apo_zero_unpaired")),
           *(("BCO", kind, {}) for kind in [*PAIRS, *ANSWERS]),
           ("BCO", ANSWERS[0], dict(precompute_ref_log_probs=True)),
           ("CPO", PAIRS[0], {}), ("CPO", PAIRS[2], dict(loss_type="ipo")), ("CPO", PAIRS[0], dict(loss_type="simpo")),
           ("CPO", PAIRS[2], dict(loss_type="hinge")), ("CPO", PAIRS[0], dict(loss_type="alphapo", alpha=.5)),
           ("ORPO", PAIRS[0], {}), ("ORPO", PAIRS[2], {})]


@pytest.mark.filterwarnings("ignore:loss_type='simpo' with cpo_alpha")
@pytest.mark.parametrize("method, kind, options", TRAINED, ids=str)
def test_train(method, kind, options, make):
    "test_train, test_train_with_precompute, test_cpo_trainer, test_alphapo_trainer, test_orpo_trainer"
    arguments = dict(model=pocket.model(0), processing_class=pocket.tokenizer(), eval_dataset=zen(kind, "test", 4))
    if method in UNPAIRED: arguments["ref_model"] = pocket.model(0)
    run = trained(make(method, kind, arguments, **options, eval_strategy="steps", eval_steps=1))
    assert sum("eval_loss" in row for row in run.state.log_history) == 3


@pytest.mark.parametrize("method, kind", [("KTO", ANSWERS[0]), ("BCO", ANSWERS[0]),
                                          *((method, kind) for method in ("CPO", "ORPO") for kind in PAIRS)])
def test_lora(method, kind, make):
    "test_train_without_providing_ref_model_with_lora, test_cpo_trainer_with_lora, test_orpo_trainer_with_lora"
    run = make(method, kind, dict(peft_config=LoraConfig(**LORA), eval_dataset=zen(kind, "test", 4)), max_steps=2,
               gradient_accumulation_steps=4, eval_strategy="steps", eval_steps=1)
    assert all(("lora" in n) == p.requires_grad for n, p in trained(run).model.named_parameters())


@pytest.mark.parametrize("method", METHODS)
def test_compute_metrics(method, make):
    run = make(method, None, dict(compute_metrics=lambda predictions: {"test": 0.0},
                                  eval_dataset=zen(usual(method), "test", 4)), eval_strategy="steps", eval_steps=1)
    run.train()
    assert run.state.log_history[-2]["eval_test"] == 0.0


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("method", UNPAIRED)
def test_evaluate_with_raw_dataset(method, precompute, make):
    metrics = make(method, precompute_ref_log_probs=precompute).evaluate(zen(usual(method), "test"))
    assert metrics["eval_loss"] > 0


REMOTE = """from transformers import Qwen3Config, Qwen3ForCausalLM
class RemoteConfig(Qwen3Config): model_type = "remote"
class RemoteForCausalLM(Qwen3ForCausalLM): config_class = RemoteConfig
"""


@pytest.mark.parametrize("method", METHODS)
def test_trust_remote_code(method, make, tmp_path, monkeypatch):
    import json
    folder = tmp_path / "remote"
    pocket.model(0).save_pretrained(folder)
    pocket.tokenizer().save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "remote.RemoteConfig", "AutoModelForCausalLM": "remote.RemoteForCausalLM"}
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "remote", "auto_map": classes}))
    (folder / "remote.py").write_text(REMOTE)
    given = dict(model=str(folder), processing_class=pocket.tokenizer())
    with pytest.raises(ValueError, match="custom code"): make(method, None, given)
    assert type(make(method, None, given, trust_remote_code=True).model).__name__ == "RemoteForCausalLM"


@pytest.mark.parametrize("method", METHODS)
def test_train_gpt_oss(method, make):
    "A mixture of experts: its load-balancing loss is added without being asked for."
    vocabulary = len(pocket.tokenizer())
    torch.manual_seed(0)
    mixture = GptOssForCausalLM(GptOssConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0, eos_token_id=1,
        bos_token_id=None, sliding_window=128, max_position_embeddings=512))
    run = trained(make(method, None, dict(model=mixture, processing_class=pocket.tokenizer()), learning_rate=.1,
                       max_steps=4), but=["sinks"])
    assert run.aux_loss_enabled and any("aux_loss" in row for row in run.state.log_history)


@pytest.mark.parametrize("method", UNPAIRED)
def test_ref_model_is_model_raises(method, make):
    model = pocket.model(0)
    with pytest.raises(ValueError, match="same object"): make(method, None, dict(model=model, ref_model=model))


@pytest.mark.parametrize("method", UNPAIRED)
def test_tokenize_and_process_tokens(method, make):
    run, rows, tokenizer = make(method), zen(usual(method)), pocket.tokenizer()
    for prepared, row in zip(run.train_dataset, rows):
        assert prepared["prompt_ids"] == tokenizer(row["prompt"])["input_ids"]
        assert prepared["completion_ids"] == tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        assert prepared["label"] == row["label"]
    batch = run.data_collator([run.train_dataset[i] for i in range(3)])
    lay = lay_out(batch, "padded")
    for b, (ids, row) in enumerate(zip(lay.input_ids, run.train_dataset)):
        whole = row["prompt_ids"] + row["completion_ids"]
        assert ids[:len(whole)].tolist() == whole
        learned = [i - b * len(ids) for i in lay.reads.tolist() if i // len(ids) == b]
        assert learned == [*range(len(row["prompt_ids"]), len(whole))]


@pytest.mark.parametrize("size", [2, 3])
def test_kl_cycling(size):
    "And the end of test_tokenize_and_process_tokens: within a batch each prompt takes the answer of the row before."
    rows = Dataset.from_dict({"prompt_ids": [[1, 2], [3, 4], [5, 6]], "completion_ids": [[10, 11], [20, 21], [30, 31]],
                              "label": [True, False, True]})
    rotated = with_mismatched(rows, batch_size=size)
    assert all(rotated[name][:] == rows[name][:] for name in rows.column_names)
    expected = {2: [[20, 21], [10, 11], [30, 31]], 3: [[30, 31], [10, 11], [20, 21]]}
    assert rotated["mismatched_ids"][:] == expected[size]


# ---------------------------------------------------------------- collators
def test_padding_and_masks():
    "DataCollatorForUnpairedPreference.test_padding_and_masks and test_optional_reference_logps, in our layout"
    rows = [{"prompt_ids": [1, 2, 3], "completion_ids": [4, 5], "mismatched_ids": [6], "label": True,
             "ref_logps": -.1, "ref_mismatched_logps": -.2},
            {"prompt_ids": [7, 8], "completion_ids": [9, 10], "mismatched_ids": [11, 12, 13], "label": False,
             "ref_logps": -.3, "ref_mismatched_logps": -.4}]
    batch = collate_unpaired(rows)
    def laid(batch):
        lay = lay_out(batch, "padded")
        mask = torch.zeros(lay.input_ids.numel(), dtype=torch.long).index_fill(0, lay.reads, 1)
        return lay.input_ids.tolist(), mask.view(lay.input_ids.shape).tolist()
    assert laid(batch) == ([[1, 2, 3, 4, 5], [7, 8, 9, 10, 0]], [[0, 0, 0, 1, 1], [0, 0, 1, 1, 0]])
    assert laid(mismatched(batch)) == ([[1, 2, 3, 6, 0], [7, 8, 11, 12, 13]], [[0, 0, 0, 1, 0], [0, 0, 1, 1, 1]])
    assert batch["label"].tolist() == [True, False]
    assert torch.allclose(batch["ref_logps"].sum(1), torch.tensor([-.1, -.3]))
    assert torch.allclose(batch["mismatched_ref_logps"].sum(1), torch.tensor([-.2, -.4]))


# ---------------------------------------------------------------- references
@pytest.mark.parametrize("method", UNPAIRED)
def test_train_without_providing_ref_model(method, make):
    trained(make(method, None, dict(eval_dataset=zen(usual(method), "test", 4)), gradient_accumulation_steps=4,
                 eval_strategy="steps", eval_steps=1))


@pytest.mark.parametrize("method", UNPAIRED)
def test_train_with_explicit_ref_model(method, make):
    reference = pocket.model(seed=1)
    before = [p.clone() for p in reference.parameters()]
    run = trained(make(method, None, dict(ref_model=reference)))
    assert all(map(torch.equal, before, run.ref_model.parameters()))


@pytest.mark.parametrize("method", UNPAIRED)
def test_train_with_sync_ref_model(method, make):
    run = make(method, sync_ref_model=True, ref_model_sync_steps=2)
    before = [p.clone() for p in run.ref_model.parameters()]
    trained(run)
    assert not any(map(torch.equal, before, run.ref_model.parameters()))


# ---------------------------------------------------------------- models
@pytest.mark.parametrize("method", METHODS)
def test_train_model_dtype(method, make):
    run = make(method, model_init_kwargs={"dtype": torch.float16}, optim="sgd", learning_rate=.1)
    assert {p.dtype for p in trained(run, but=["norm"]).model.parameters()} == {torch.float16}


@pytest.mark.parametrize("method", METHODS)
def test_train_peft_model(method, make):
    "A model that comes with an adapter: the frozen copy that it is compared with stays as it is."
    model = get_peft_model(pocket.model(0), LoraConfig(target_modules=["q_proj", "v_proj"]))
    trained(make(method, None, dict(model=model, processing_class=pocket.tokenizer())))


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_train_with_gradient_checkpointing(method, adapter, make):
    "And test_train_with_peft_config_and_gradient_checkpointing"
    arguments = dict(peft_config=LoraConfig(target_modules=["q_proj", "v_proj"])) if adapter else {}
    trained(make(method, None, arguments, gradient_checkpointing=True))


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_tag_added(method, adapter, make, tmp_path):
    "And test_tag_added_peft. Ours stand in the card that is saved beside the weights."
    from huggingface_hub import ModelCard
    run = make(method, None, dict(peft_config=LoraConfig()) if adapter else {}, max_steps=1)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    assert {method.lower(), "posttrain"} <= set(ModelCard.load(tmp_path / "saved" / "README.md").data.to_dict()["tags"])


@pytest.mark.parametrize("method", METHODS)
def test_lora_train_and_save(method, make, tmp_path):
    run = make(method, None, dict(peft_config=LoraConfig(**LORA)))
    run.train()
    run.save_model()
    again, ids = AutoModelForCausalLM.from_pretrained(tmp_path), torch.tensor([[9, 8, 7]])
    with torch.no_grad(): assert torch.allclose(again(ids).logits, run.model.eval()(ids).logits, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_processing_class_autoloaded(method, make, path):
    run = make(method, None, dict(model=AutoModelForCausalLM.from_pretrained(path)))
    assert run.processing_class.get_vocab() == pocket.tokenizer().get_vocab()
    run.train()


# ---------------------------------------------------------------- data
STREAMED = {"train": lambda s, d: dict(train_dataset=s), "eval": lambda s, d: dict(eval_dataset=s),
            "eval_dict": lambda s, d: dict(eval_dataset={"eval": s}),
            "eval_iterable_dataset_dict": lambda s, d: dict(eval_dataset=IterableDatasetDict({"eval": s}))}


@pytest.mark.parametrize("place", STREAMED)
@pytest.mark.parametrize("method", UNPAIRED)
def test_precompute_ref_log_probs_raises_for_iterable_dataset(method, place, make):
    rows = zen(usual(method))
    with pytest.raises(ValueError, match="precompute_ref_log_probs=True .* is a stream"):
        make(method, None, STREAMED[place](rows.to_iterable_dataset(), rows), precompute_ref_log_probs=True)


@pytest.mark.parametrize("method, options", [("KTO", {}), ("KTO", dict(loss_type="apo_zero_unpaired")), ("BCO", {}),
                                             ("CPO", {}), ("ORPO", {})], ids=str)
def test_train_with_iterable_dataset(method, options, make):
    trained(make(method, None, dict(train_dataset=zen(usual(method)).to_iterable_dataset()), **options))


CAPITALS = pocket.models.CHAT_TEMPLATE.replace(
    '"<|" ~ message.role ~ "|>"', '("ROLE " if role_capital else "") ~ "<|" ~ message.role ~ "|>"')


@pytest.mark.parametrize("method", METHODS)
def test_train_with_chat_template_kwargs(method, make):
    tokenizer, rows = pocket.tokenizer(), zen(PAIRS[2])
    tokenizer.chat_template = CAPITALS
    rows = rows.add_column("chat_template_kwargs", [{"role_capital": bool(i % 2)} for i in range(len(rows))])
    run = trained(make(method, None, dict(train_dataset=rows, processing_class=tokenizer)))
    prompts = [tokenizer.decode(row["prompt_ids"]) for row in run.train_dataset]
    assert sum(p.startswith("ROLE <|user|>") for p in prompts) * 2 == len(prompts)
    assert sum(p.startswith("<|user|>") for p in prompts) * 2 == len(prompts)


@pytest.mark.parametrize("method", METHODS)
def test_train_toolcall_data(method, make):
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]}
    rows = Dataset.from_list([{"prompt": [user("Weather?")], "tools": [WEATHER], "rejected": [assistant("No.")],
                               "chosen": [call, {"role": "tool", "content": "3"}, assistant("Cold.")]}] * 8)
    run = trained(make(method, None, dict(train_dataset=rows), max_length=512))
    assert "tools:" in run.processing_class.decode(run.train_dataset[0]["prompt_ids"])


@pytest.mark.parametrize("method", METHODS)
def test_train_with_eval(method, make):
    run = make(method, None, dict(eval_dataset=zen(usual(method), "test")), eval_strategy="steps", eval_steps=3,
               logging_steps=10, max_steps=4)
    run.train()
    assert run.state.log_history[0]["eval_loss"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_train_with_multiple_eval_dataset(method, make):
    test = zen(usual(method), "test")
    run = make(method, None, dict(eval_dataset={"data1": test, "data2": test}), eval_strategy="steps", eval_steps=3)
    run.train()
    assert run.state.log_history[-3]["eval_data1_loss"] == run.state.log_history[-2]["eval_data2_loss"] > 0


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_init_with_eval_dataset_dict(method, streaming, make):
    test = zen(usual(method), "test")
    kind, test = (IterableDatasetDict, test.to_iterable_dataset()) if streaming else (DatasetDict, test)
    run = make(method, None, dict(eval_dataset=kind({"data1": test, "data2": test})))
    assert set(run.eval_dataset) == {"data1", "data2"}
    assert all("prompt_ids" in next(iter(part)) for part in run.eval_dataset.values())


@pytest.mark.parametrize("method", METHODS)
def test_vision_dataset_with_text_model_raises(method, make):
    rows = zen(usual(method)).add_column("images", [["a.png"]] * 8)
    with pytest.raises(ValueError, match="'images', but only text"): make(method, None, dict(train_dataset=rows))


# ---------------------------------------------------------------- BCO
def test_train_udm(make):
    "The embedding is that of a model; its first states do not matter here."
    model, size = pocket.model(seed=3), len(pocket.tokenizer())
    def embed(input_ids, attention_mask, model):
        return model.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.mean(1)
    for function in (functools.partial(embed, model=model), lambda input_ids, attention_mask: one_hot(
            input_ids, size).sum(1).float()):
        run = make("BCO", None, dict(embedding_func=function, embedding_tokenizer=pocket.tokenizer()))
        weights = [row["weight"] for row in run.train_dataset]
        assert {w for w, row in zip(weights, run.train_dataset) if row["label"]} == {1.0} and len(set(weights)) > 2
        trained(run)


@pytest.mark.parametrize("method", ["BCO", "CPO", "ORPO"])
def test_generate_during_eval(method, make):
    with pytest.raises(ValueError, match="generate_during_eval"): make(method, generate_during_eval=True)


@pytest.mark.parametrize("rule", SHIFTS)
def test_accumulation_uses_one_updated_baseline(rule):
    "Of test_bco_window: however a step is cut, delta is the same for all of it, and so is the gradient."
    torch.manual_seed(13)
    states, label, weight = torch.randn(8, 3).double(), torch.arange(8) % 2 == 0, torch.randn(3).double()
    found = []
    for sizes in ((8,), (2, 2, 2, 2), (2, 6)):
        shift, w = RewardShift(SHIFTS[rule]), weight.clone().requires_grad_()
        shift.sums = torch.tensor([[2.0, 1.2], [8, 8]]).double()
        before = torch.get_rng_state()
        delta = shift.delta
        for x, liked in zip(states.split(sizes), label.split(sizes)):
            judged = Judged(x @ w, torch.zeros(len(x)), liked, shift=delta / .1)
            shift.add(.1 * judged.logratios, liked)
            assert shift.delta == delta, "it stays within the step"
            (bco(judged, beta=.1).sum() / 8).backward()
        shift.on_step_end()
        assert torch.equal(before, torch.get_rng_state()) and shift.sums[1].tolist() == [12, 12]
        found.append((w.grad, shift.delta))
    for gradient, delta in found[1:]:
        assert torch.allclose(gradient, found[0][0], atol=1e-8) and delta == pytest.approx(found[0][1], abs=1e-12)
