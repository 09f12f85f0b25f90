"""What scripts written for TRL pass and read, beside datasets and losses."""
import pytest
import torch
from transformers import AutoModelForCausalLM

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
from posttrain.data.templates import encode_chats

ONLINE = dict(num_generations=4, max_completion_length=8)


def lengths(completions, **kwargs): return [float(len(text)) for text in completions]


def rows(kind, n=8): return pocket.dataset("add", kind, n=n, seed=3, conversational=False)


METHODS = {  # trainer, config, rows, options, arguments
    "sft": (SFTTrainer, SFTConfig, "prompt_completion", {}, {}),
    "dpo": (DPOTrainer, DPOConfig, "preference", {}, {}),
    "grpo": (GRPOTrainer, GRPOConfig, "prompt_only", ONLINE, dict(reward_funcs=lengths)),
    "rloo": (RLOOTrainer, RLOOConfig, "prompt_only", ONLINE, dict(reward_funcs=lengths)),
}


def made(method, config, model=None, tokenizer=None, arguments=None, **options):
    trainer, config_class, columns, own, always = METHODS[method]
    return trainer(pocket.model(seed=0) if model is None else model, args=config_class(**config(**own, **options)),
                   train_dataset=rows(columns), processing_class=tokenizer or pocket.tokenizer(),
                   **{**always, **(arguments or {})})


# ---------------------------------------------------------------- quantisation
@pytest.fixture
def loaded(monkeypatch, tmp_path):
    """What `from_pretrained` was asked for; no quantiser runs on a CPU here."""
    asked, original = [], AutoModelForCausalLM.from_pretrained

    def without_quantiser(name, quantization_config=None, **options):
        asked.append(quantization_config)
        return original(name, **options)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", without_quantiser)
    pocket.model(seed=0).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model"), asked


@pytest.mark.parametrize("method", METHODS)
def test_quantization_config_reaches_the_model(method, config, loaded):
    path, asked = loaded
    made(method, config, path, arguments=dict(quantization_config=None))
    assert asked and set(asked) == {None}
    made(method, config, path, arguments=dict(quantization_config="4 bits"))
    assert "4 bits" in asked
    with pytest.raises(ValueError, match="quantization_config: .* already made"):
        made(method, config, arguments=dict(quantization_config="4 bits"))
    with pytest.raises(ValueError, match="leave one of them out"):
        made(method, config, path, arguments=dict(quantization_config="4 bits"),
             model_init_kwargs={"quantization_config": "8 bits"})


def test_a_reference_from_a_path_is_quantised_too(config, loaded):
    path, asked = loaded
    made("dpo", config, path, arguments=dict(quantization_config="4 bits", ref_model=path))
    assert asked == ["4 bits", "4 bits"]


# ---------------------------------------------------------------- a tokenizer without a pad token
@pytest.mark.parametrize("method", METHODS)
def test_without_a_pad_token_eos_is_taken_and_still_trained_on(method, config):
    bare = pocket.tokenizer()
    bare.pad_token = None
    trainer, usual = made(method, config, tokenizer=bare), made(method, config)
    assert trainer.processing_class.pad_token_id == trainer.processing_class.eos_token_id
    for t in (trainer, usual): t.train()
    assert all(map(torch.equal, trainer.model.parameters(), usual.model.parameters()))


def test_eos_is_a_label_where_it_is_the_pad_token(config):
    bare = pocket.tokenizer()
    bare.pad_token = None
    trainer = made("sft", config, tokenizer=bare)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    ends = batch["completion_lengths"] - 1
    assert (batch["completion_ids"].gather(1, ends[:, None]) == bare.eos_token_id).all()
    assert batch["mask"].gather(1, ends[:, None]).all()


def test_a_model_stops_at_the_eos_that_it_is_trained_on(config):
    tokenizer = pocket.tokenizer()
    other = next(token for token in tokenizer.get_vocab() if token not in (tokenizer.eos_token, tokenizer.pad_token))
    was = tokenizer.eos_token_id
    trainer = made("sft", config, tokenizer=tokenizer, eos_token=other)
    eos = tokenizer.get_vocab()[other]
    assert trainer.train_dataset[0]["input_ids"][-1] == trainer.model.config.eos_token_id == eos
    assert trainer.model.generation_config.eos_token_id == [eos, was]


# ---------------------------------------------------------------- settings as attributes
SHOWN = {
    "sft": dict(aux_loss_enabled=False, router_aux_loss_coef=0),
    "dpo": dict(beta=.2, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 1.0], label_smoothing=0.0,
                f_divergence_type="reverse_kl", aux_loss_enabled=False),
    "grpo": dict(beta=0.0, loss_type="dapo", num_generations=4, num_generations_eval=4, temperature=1.0, top_p=1.0,
                 max_completion_length=8, epsilon_low=.2, epsilon_high=.3, entropy_coef=.01, reward_funcs=[lengths],
                 ref_model=None, num_iterations=1, scale_rewards="group", aux_loss_enabled=False, use_vllm=False),
    "rloo": dict(beta=0.0, epsilon_low=.2, epsilon_high=.2, normalize_advantages=False, num_generations=4,
                 ref_model=None),
}
OPTIONS = {"sft": {}, "dpo": dict(beta=.2, loss_type=["sigmoid", "sft"]), "rloo": dict(beta=0.0),
           "grpo": dict(epsilon_high=.3, entropy_coef=.01)}


@pytest.mark.parametrize("method", METHODS)
def test_settings_are_attributes_that_nobody_sets(method, config):
    trainer = made(method, config, **OPTIONS[method])
    for name, value in SHOWN[method].items():
        assert getattr(trainer, name) == value, name
        if name in ("ref_model", "reward_funcs", "router_aux_loss_coef"): continue
        with pytest.raises(AttributeError): setattr(trainer, name, value)


# ---------------------------------------------------------------- sampling, data, scripts
@pytest.mark.parametrize("sampler", ["own", "transformers"])
def test_stop_token_ids_end_completions(sampler, config):
    trainer = made("grpo", config, sampler=sampler, generation_kwargs={"stop_token_ids": [*range(5, 20)]})
    generation = trainer.generate(list(trainer.train_dataset), list(range(8)), 1)
    ended = [ids for ids, done in zip(generation.completion_ids, generation.finished) if done]
    assert ended and all(5 <= ids[-1] < 20 or ids[-1] == trainer.processing_class.eos_token_id for ids in ended)
    assert all(not 5 <= i < 20 for ids in generation.completion_ids for i in ids[:-1])


def test_a_stop_token_beyond_the_vocabulary_is_refused(config):
    """No completion could end with it."""
    size = pocket.model(seed=0).get_input_embeddings().num_embeddings
    with pytest.raises(ValueError, match=f"stop token .* has the number 9999, but the model's vocabulary has {size}"):
        made("grpo", config, generation_kwargs={"eos_token_id": [5, 9999]})
    for sampler in ("own", "transformers"):
        model = pocket.model(seed=0)
        model.generation_config.eos_token_id = [1, size]
        with pytest.raises(ValueError, match=f"generation_config.* has the number {size}"):
            made("rloo", config, model, sampler=sampler)


def test_fields_of_sampling_may_come_in_generation_kwargs(config):
    args = GRPOConfig(**config(**ONLINE, generation_kwargs={"temperature": .7, "max_new_tokens": 4, "do_sample": True}))
    assert (args.temperature, args.max_completion_length, args.sampling().temperature) == (.7, 4, .7)
    with pytest.raises(ValueError, match="do_sample': False is unknown"):
        GRPOConfig(**config(**ONLINE, generation_kwargs={"do_sample": False}))


@pytest.mark.parametrize("loss_type, warned", [("dapo", True), ("bnpo", True), ("dr_grpo", True), ("grpo", False)])
def test_ratios_of_sequences_warn_of_losses_of_tokens(loss_type, warned, config, recwarn):
    GRPOConfig(**config(**ONLINE, importance_sampling_level="sequence", loss_type=loss_type))
    assert any("set loss_type='grpo'" in str(w.message) for w in recwarn) == warned


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_cast_lm_head_to_fp32_scores_policy_and_reference_in_float32(method, config):
    """In bfloat16 the policy's and the reference's log-probs are then no longer multiples of a rounding step."""
    from posttrain.training.heads import completion_logps
    model = pocket.model(seed=0).to(torch.bfloat16)
    trainer = made(method, config, model, cast_lm_head_to_fp32=True, beta=.1)
    generation = trainer.generate(list(trainer.train_dataset)[:2], [0, 1], 1)
    batch = generation.batch()
    counted = batch["mask"] != 0
    policy, reference = completion_logps(model, batch)["logps"], trainer.reference.logps(batch)
    assert torch.allclose(policy, reference, atol=1e-6) and (policy[counted] < 0).all()
    states = model.get_input_embeddings().weight.dtype
    assert states == torch.bfloat16, "the weights stay as they are"
    plain = completion_logps(pocket.model(seed=0).to(torch.bfloat16), batch)["logps"]
    assert not torch.equal(policy, plain) and torch.allclose(policy, plain, atol=.05)
    trainer.train()


@pytest.mark.parametrize("method", METHODS)
def test_images_are_refused(method, config):
    trainer, config_class, columns, own, always = METHODS[method]
    dataset = rows(columns).add_column("image", ["a.png"] * 8)
    with pytest.raises(ValueError, match="'image', but only text"):
        trainer(pocket.model(seed=0), args=config_class(**config(**own)), train_dataset=dataset,
                processing_class=pocket.tokenizer(), **always)


def test_a_script_for_trl_parses_its_arguments(tmp_path):
    from posttrain import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config
    (tmp_path / "run.yaml").write_text("learning_rate: 1e-4\nuse_peft: true\nlora_r: 4\n")
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
    script, args, model = parser.parse_args_and_config([
        "--config", str(tmp_path / "run.yaml"), "--dataset_name", "rows.jsonl", "--output_dir", str(tmp_path),
        "--lora_r", "8"])
    assert (script.dataset_name, args.learning_rate, get_peft_config(model).r) == ("rows.jsonl", 1e-4, 8)
    assert get_quantization_config(model) is None
    assert TrlParser(ModelConfig).parse_args_and_config([])[0].use_peft is False


def test_trl_parser_gives_back_what_no_class_knows(tmp_path):
    """The file's first, as words. Without that its settings may be passed over; unknown flags are always refused."""
    from posttrain import ModelConfig, TrlParser
    (tmp_path / "run.yaml").write_text("lora_r: 4\nmy_setting: 3\n")
    parser, argv = TrlParser(ModelConfig), ["--config", str(tmp_path / "run.yaml"), "--lora_alpha", "8"]
    model, rest = parser.parse_args_and_config([*argv, "--mine", "a b", "--yours"], return_remaining_strings=True)
    assert (model.lora_r, model.lora_alpha) == (4, 8) and rest == ["--my_setting", "3", "--mine", "a b", "--yours"]
    model, = parser.parse_args_and_config(args=tuple(argv), fail_with_unknown_args=False)
    assert (model.lora_r, model.lora_alpha) == (4, 8)
    with pytest.raises(ValueError, match="no setting 'my_setting'"): parser.parse_args_and_config(argv)
    with pytest.raises(ValueError, match="no flag --mine"):
        parser.parse_args_and_config([*argv, "--mine", "1"], fail_with_unknown_args=False)


# ---------------------------------------------------------------- model cards
def card_in(folder):
    from huggingface_hub import ModelCard
    return ModelCard.load(folder / "README.md")


SAID = {"sft": ["\\log \\pi_\\theta", "all counted tokens of the optimizer step", "2203.02155", "`completion`"],
        "dpo": ["weight beta = 0.1, divergence `reverse_kl`", "the pairs of the optimizer step", "`sigmoid`, weight 1"],
        "grpo": ["k3 times the ratio, weight beta = 0.02", "the tokens of the generation", "1 * lengths", "2503.14476"],
        "rloo": ["k1 in the reward, weight beta = 0.05", "the completions of the optimizer step", "`rloo`"]}


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_model_says_how_it_was_made(method, config, tmp_path):
    trainer = made(method, config, **(dict(beta=.02) if method == "grpo" else {}))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    card = card_in(tmp_path / "saved")
    about = card.data.to_dict()
    assert {"posttrain", method} <= set(about["tags"]) and about["library_name"] == "transformers"
    assert "base_model" not in about, "it was made in memory"
    expected = [*SAID[method], "| 2 | ", "2 optimizer steps", "`learning_rate`"]
    assert all(text in card.text for text in expected), card.text
    assert all(name in card.text for name in rows(METHODS[method][2]).column_names) and "{{" not in card.text


def test_what_push_to_hub_is_told_stands_in_the_card(config, hub, tmp_path):
    model = pocket.model(seed=0)
    model.config._name_or_path = "me/base"
    trainer = made("sft", config, model, hub_model_id="me/adder")
    trainer.push_to_hub(dataset_name="me/sums", model_name="Adder", tags="sums")
    card, about = card_in(tmp_path), card_in(tmp_path).data.to_dict()
    assert hub == [("create_repo", "me/adder"), ("upload_folder", "me/adder")]
    assert about["datasets"] == ["me/sums"] and "sums" in about["tags"] and about["model_name"] == "Adder"
    assert about["base_model"] == "me/base" and about["base_model_relation"] == "finetune"
    assert "# Adder" in card.text and 'model="me/adder"' in card.text and "huggingface.co/datasets/me/sums" in card.text


def test_the_card_of_an_adapter_and_of_a_resumed_run(config, tmp_path):
    from peft import LoraConfig
    def adapted(**options):
        model = pocket.model(seed=0)
        model.config._name_or_path = "me/base"
        return made("sft", config, model, arguments=dict(peft_config=LoraConfig(r=2, target_modules=["q_proj"])),
                    **options)
    first = adapted(save_strategy="steps", save_steps=1)
    first.train()
    resumed = adapted(save_strategy="steps", save_steps=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    resumed.create_model_card("Adder", dataset_name=["me/sums", "me/products"])
    card, about = card_in(tmp_path), card_in(tmp_path).data.to_dict()
    assert about["library_name"] == "peft" and about["base_model_relation"] == "adapter"
    assert about["datasets"] == ["me/sums", "me/products"]
    assert "| 1 | " in card.text and "| 2 | " in card.text and "an adapter for [me/base]" in card.text


@pytest.mark.parametrize("adapter", [False, True])
def test_a_page_of_others_is_never_written_over(adapter, config, hub, tmp_path):
    """Nor added to, as PEFT does. Where there is none, an adapter's card is ours and not PEFT's draft."""
    from peft import LoraConfig
    options = dict(arguments=dict(peft_config=LoraConfig(r=2, target_modules=["q_proj"]))) if adapter else {}
    trainer = made("sft", config, pocket.model(seed=0), hub_model_id="me/adder", **options)
    (tmp_path / "README.md").write_text("by hand")
    with pytest.warns(UserWarning, match="was not written by posttrain, and stays as it is"): trainer.push_to_hub()
    with pytest.warns(UserWarning, match="no model card was made"): trainer.create_model_card()
    trainer.save_model()
    assert (tmp_path / "README.md").read_text() == "by hand" and ("upload_folder", "me/adder") in hub
    (tmp_path / "README.md").unlink()
    trainer.push_to_hub(model_name="Adder")
    assert "# Adder" in card_in(tmp_path).text and "trained with [posttrain]" in card_in(tmp_path).text


def test_a_template_is_found_in_the_home_folder(monkeypatch, tmp_path):
    from posttrain.data.templates import CHATML, adopt_chat_template, load_chat_template
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    source = pocket.tokenizer()
    source.chat_template = CHATML
    source.save_pretrained(tmp_path / "source")
    assert load_chat_template("~/mine.jinja") == "{{ messages }}" and load_chat_template("~/source") == CHATML
    tokenizer = pocket.tokenizer()
    adopt_chat_template(tokenizer, "~/source")
    assert tokenizer.chat_template == CHATML


def test_turns_of_a_long_chat_are_found_without_reading_it_again_for_each():
    from posttrain.data.templates import CHATML, encode_chats
    marked, unmarked = pocket.tokenizer(), pocket.tokenizer()
    marked.chat_template = CHATML
    unmarked.chat_template = CHATML.replace("{%- generation -%}\n", "").replace("{%- endgeneration -%}\n", "")
    read, call = [], type(unmarked).__call__
    class Counted(type(unmarked)):
        def __call__(self, text, *args, **kwargs):
            read.append(len(text))
            return call(self, text, *args, **kwargs)
    unmarked.__class__ = Counted
    chat = [{"role": role, "content": f"{i}+{i}="} for i in range(50) for role in ("user", "assistant")]
    assert encode_chats(unmarked, [chat], assistant_masks=True) == encode_chats(marked, [chat], assistant_masks=True)
    whole = len(unmarked.apply_chat_template(chat, tokenize=False))
    assert whole < sum(read) < 5 * whole


TOOLS_END_OTHERWISE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}<|tool|>{% else %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def test_a_turn_that_ends_in_another_way_is_not_taken_with_the_next_ones():
    """Without markers the end of a call must be known: what a tool said is never trained on."""
    tokenizer = pocket.tokenizer()
    tokenizer.chat_template = TOOLS_END_OTHERWISE
    ask, answer = {"role": "user", "content": "3+4="}, {"role": "assistant", "content": "7"}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {
        "name": "add", "arguments": {}}}]}
    (ids,), (mask,) = encode_chats(tokenizer, [[ask, answer]], assistant_masks=True)
    assert tokenizer.decode([i for i, on in zip(ids, mask) if on]) == "7<|end|>"
    with pytest.raises(ValueError, match="message 1 cannot be found"):
        encode_chats(tokenizer, [[ask, call, {"role": "tool", "content": "7"}, answer]], assistant_masks=True)
