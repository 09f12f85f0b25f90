"""The shapes of data that people have, through all trainers: read as they stand, or refused with the line that repairs
them. And bad rows: each error names the dataset, the row, the column and the value, before a model is loaded."""
import json
import re

import pytest
from datasets import Dataset, disable_progress_bars, load_dataset

from posttrain import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer, pocket
from posttrain.online.rloo_trainer import RLOOConfig, RLOOTrainer

disable_progress_bars()


pytestmark = pytest.mark.usefixtures("heard")


def user(text): return {"role": "user", "content": text}
def assistant(text): return {"role": "assistant", "content": text}
def human(text): return {"from": "human", "value": text}
def gpt(text): return {"from": "gpt", "value": text}
def length(completions, **columns): return [float(len(str(c))) for c in completions]


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
OPENAI_CALL = {"id": "1", "type": "function", "function": {**CALL, "arguments": '{"city": "Oslo"}'}}

#: data as in -> two rows of it, as a file would hold them
SHAPES = {
    "sharegpt": [
        {"system": "You know tools.", "tools": json.dumps([WEATHER]), "conversations": [
            human("Weather?"), {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "3 degrees"}, gpt("It is cold.")]},
        {"system": "", "tools": "[]", "conversations": [human("2+3?"), gpt("5")]}],
    "openai": [
        {"messages": [user("Weather?"), {"role": "assistant", "content": None, "tool_calls": [OPENAI_CALL]},
                      {"role": "tool", "tool_call_id": "1", "content": "3 degrees"}, assistant("It is cold.")]},
        {"messages": [user([{"type": "text", "text": "2+3?"}]), assistant("6") | {"weight": 0}, user("No."),
                      assistant("5")]}],
    "ultrafeedback": [
        {"prompt": q, "prompt_id": "a1", "chosen": [user(q), assistant(a)], "rejected": [user(q), assistant("No.")],
         "messages": [user(q), assistant(a)], "score_chosen": 9.0, "score_rejected": 1.0}
        for q, a in (("2+3?", "5"), ("1+1?", "2"))],
    "hh_rlhf": [
        {"chosen": f"\n\nHuman: {q}\n\nAssistant: {a}", "rejected": f"\n\nHuman: {q}\n\nAssistant: no"}
        for q, a in (("2+3?", "5"), ("1+1?", "2"))],
    "alpaca": [{"instruction": "Add.", "input": "2 and 3", "output": "5"},
               {"instruction": "Say hi.", "input": "", "output": "hi"}],
    "dolly": [{"instruction": "What is it?", "context": "It rains.", "response": "Rain.", "category": "qa"},
              {"instruction": "2+3?", "context": "", "response": "5", "category": "math"}],
    "orca": [{"system": "Be brief.", "question": "2+3?", "chosen": "It is 5", "rejected": "No idea"},
             {"system": "", "question": "1+1?", "chosen": "It is 2", "rejected": "No"}],
    "gsm8k": [{"question": "2+3?", "answer": "2+3=5\n#### 5"}, {"question": "1+1?", "answer": "#### 2"}],
    "prm800k": [{"prompt": "2+3?", "completions": ["2+3", "=5"], "labels": [True, True]},
                {"prompt": "1+1?", "completions": ["1+1", "=3"], "labels": [True, False]}],
    "kto": [{"prompt": "2+3?", "completion": "5", "label": True},
            {"prompt": "1+1?", "completion": "3", "label": False}],
}

#: What is trained on as it stands. For the others: words of the error, and whether its line repairs the data.
READ = "read"
OUTCOMES = {
    "sharegpt": (READ, ["'chosen' and 'rejected' are missing"], ["'prompt' is missing", '"conversations"', "[:-1]"]),
    "openai": (READ, ["'chosen' and 'rejected' are missing"], ["'prompt' is missing", '"messages"', "[:-1]"]),
    "ultrafeedback": (READ, READ, READ),
    "hh_rlhf": (["These are pairs", "('chosen', 'text')"], READ, ["extract_prompt"]),
    "alpaca": (["'instruction' and 'input'", '"completion": row["output"]'], ["'chosen' and 'rejected'"],
               ["'instruction' and 'input'"]),
    "dolly": (["'instruction' and 'context'", '"completion": row["response"]'], ["'chosen' and 'rejected'"],
              ["'instruction' and 'context'"]),
    "orca": (["These are pairs"], ["'question' and 'system' would not be read", "dataset.map"],
             ["'prompt' is missing"]),
    "gsm8k": (["{'question': 'prompt', 'answer': 'completion'}"], ["'chosen' and 'rejected'"],
              ["{'question': 'prompt'}"]),
    "prm800k": (["'completion' is missing", '"\\n".join'], ["'chosen' and 'rejected' are missing"],
                ["'completions'", "rename"]),
    "kto": (READ, ["'chosen' and 'rejected' are missing"], READ),
}
#: where the line in the error makes data that is trained on
REPAIRED = {("alpaca", "sft"), ("dolly", "sft"), ("gsm8k", "sft"), ("prm800k", "sft"), ("hh_rlhf", "sft"),
            ("orca", "dpo"), ("sharegpt", "grpo"), ("openai", "grpo"), ("hh_rlhf", "grpo"), ("alpaca", "grpo"),
            ("dolly", "grpo"), ("gsm8k", "grpo")}
TRAINERS = {
    "sft": (SFTTrainer, SFTConfig, {}),
    "dpo": (DPOTrainer, DPOConfig, {}),
    "grpo": (GRPOTrainer, GRPOConfig, dict(num_generations=2, max_completion_length=2, beta=0.0)),
    "rloo": (RLOOTrainer, RLOOConfig, dict(num_generations=2, max_completion_length=2)),
}


def made(method, dataset, config, model=None, **options):
    "A trainer of the pocket model, or of a model that does not exist."
    trainer, of_config, fields = TRAINERS[method]
    args = of_config(**config(**{**dict(max_steps=1, per_device_train_batch_size=2), **fields, **options}))
    rewards = dict(reward_funcs=length) if method in ("grpo", "rloo") else {}
    return trainer(pocket.model(0) if model is None else model, args=args, train_dataset=dataset,
                   processing_class=pocket.tokenizer() if model is None else None, **rewards)


def write(rows, path):
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def from_file(shape, tmp_path, ending="jsonl", streaming=False):
    file = write(SHAPES[shape], tmp_path / f"{shape}.{ending}")
    return load_dataset("json", data_files=file, split="train", streaming=streaming, cache_dir=str(tmp_path / "cache"))


def repaired(message, dataset):
    "What the line in an error makes of a dataset."
    import posttrain.data.conversions
    line = re.search(r"dataset(?: = dataset)?\.(?:map|rename_column\w*)\(.*", message).group().split(". If not")[0]
    return eval(line.removeprefix("dataset = "), {"dataset": dataset, "posttrain": posttrain})


@pytest.mark.parametrize("method", TRAINERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_read_or_refused_with_the_line_that_repairs_it(shape, method, tmp_path, config):
    dataset = from_file(shape, tmp_path, "json" if method == "rloo" else "jsonl")
    outcome = OUTCOMES[shape][min(list(TRAINERS).index(method), 2)]
    if outcome != READ:
        with pytest.raises((ValueError, TypeError)) as error:
            made(method, dataset, config, model="/there/is/no/model")
        assert all(words in str(error.value) for words in outcome), error.value
        if (shape, method) not in REPAIRED: return
        dataset = repaired(str(error.value), dataset)
    trainer = made(method, dataset, config)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("kind", ["numpy", "torch", "arrow", "stream", "stream of numpy"])
@pytest.mark.parametrize("shape, method", [("openai", "sft"), ("ultrafeedback", "dpo"), ("ultrafeedback", "grpo")])
def test_formats_and_streams_do_not_matter(shape, method, kind, tmp_path, config):
    dataset = from_file(shape, tmp_path)
    plain = made(method, dataset, config)
    if kind.startswith("stream"):
        dataset = dataset.to_iterable_dataset()
        kind = kind.removeprefix("stream").removeprefix(" of ") or None
    trainer = made(method, dataset.with_format(kind), config)
    names = ["prompt"] if method == "grpo" else list(plain.train_dataset.column_names)
    def rows(trainer): return [{name: row[name] for name in names} for row in trainer.train_dataset]
    assert rows(trainer) == rows(plain)
    trainer.train()


def test_what_a_model_sees_of_each_shape(tmp_path, config):
    tokenizer = pocket.tokenizer()
    def seen(shape, **options):
        rows = made("sft", from_file(shape, tmp_path), config, **options).train_dataset
        return [tokenizer.decode(row["input_ids"]) for row in rows], [
            tokenizer.decode([i for i in row["labels"] if i != -100]) for row in rows]

    (with_tools, plain), _ = seen("sharegpt")
    assert "You know tools." in with_tools and '"city": "Oslo"' in with_tools and "<|tool|>3 degrees" in with_tools
    assert plain == "<|user|>2+3?<|end|><|assistant|>5<|end|>"
    texts, trained = seen("openai", assistant_only_loss=True)
    assert 'call: {"name": "weather", "arguments": {"city": "Oslo"}}' in texts[0] and "None" not in texts[0]
    assert texts[1].startswith("<|user|>2+3?<|end|><|assistant|>6<|end|>") and trained[1] == "5<|end|>"
    whole, trained = seen("openai")
    assert "6" in whole[1] and "6" not in trained[1] and "No." in trained[1]


def test_a_pair_keeps_its_system_prompt(tmp_path, config):
    dataset = from_file("orca", tmp_path)
    with pytest.raises(ValueError) as error:
        made("dpo", dataset, config)
    rows = made("dpo", repaired(str(error.value), dataset), config).train_dataset
    prompts = [pocket.tokenizer().decode(row["prompt_ids"]) for row in rows]
    assert prompts == ["<|system|>Be brief.<|end|><|user|>2+3?<|end|><|assistant|>", "<|user|>1+1?<|end|><|assistant|>"]


def test_sharegpt_pairs(config):
    "As some tools write them: the conversation is the prompt, and each side is one message."
    rows = [{"conversations": [human("2+3?")], "chosen": gpt("5"), "rejected": gpt("6")}] * 2
    (row, _) = made("dpo", Dataset.from_list(rows), config).train_dataset
    decode = pocket.tokenizer().decode
    assert decode(row["prompt_ids"]) == "<|user|>2+3?<|end|><|assistant|>" and decode(row["chosen_ids"]) == "5<|end|>"


# ---------------------------------------------------------------- bad rows
GOOD = [user("hi"), assistant("ho")]


def chat(*messages): return {"messages": list(messages)}
def pair(**columns): return {"prompt": "a", "chosen": "b", "rejected": "c", **columns}


#: name -> (method, the rows, words of the error)
BAD_ROWS = {
    # --------------------------------------------- messages
    "content missing": ("sft", [chat(*GOOD), chat(user("hi"), {"role": "assistant"})],
                        ["'messages', row 1, message 1, key 'content'", "expected text", "tool_calls"]),
    "content None": ("sft", [chat(*GOOD), chat(user(None), assistant("ho"))], ["row 1, message 0, key 'content'"]),
    "content a number": ("sft", [chat(user(1), assistant(2))], ["row 0, message 0, key 'content'", "1 (int)", "str("]),
    "content an object": ("sft", [chat(user({"a": 1}), assistant({"a": 2}))], ["key 'content'", "json.dumps"]),
    "content an image": ("sft", [chat(user([{"type": "image_url", "image_url": {"url": "x"}}]))],
                         ["message 0, key 'content', part 0", "'image_url'"]),
    "content numbers": ("sft", [chat(user([1, 2]))], ["key 'content', part 0", "1 (int)"]),
    "content empty list": ("sft", [chat(user([]))], ["key 'content'", "[] (list)"]),
    "text part of None": ("sft", [chat(user([{"type": "text", "text": None}]))], ["part 0", "expected a part of text"]),
    "role missing": ("sft", [chat(*GOOD), chat({"content": "hi"})], ["row 1, message 0, key 'role'"]),
    "role a number": ("sft", [chat({"role": 3, "content": "hi"})], ["message 0, key 'role'", "3 (int)"]),
    "role empty": ("sft", [chat({"role": "", "content": "hi"})], ["key 'role'", "'' (str)"]),
    "speaker unknown": ("sft", [{"conversations": [{"from": "narrator", "value": "hi"}]}],
                        ["key 'from'", "'narrator' (str)", "'human'"]),
    "value missing": ("sft", [{"conversations": [{"from": "human"}, gpt("a")]}], ["message 0, key 'value'"]),
    "weight a half": ("sft", [chat(user("a"), assistant("b") | {"weight": 0.5})], ["key 'weight'", "0.5 (float)"]),
    "tool_calls a word": ("sft", [chat(user("a"), {"role": "assistant", "tool_calls": "call"})],
                          ["message 1, key 'tool_calls'", "'call' (str)"]),
    "tool_calls unnamed": ("sft", [chat(user("a"), {"role": "assistant", "tool_calls": [{"id": "1"}]})],
                           ["key 'tool_calls'", "'function'"]),
    "no messages": ("sft", [chat(*GOOD), chat()], ["row 1", "non-empty list of messages", "[]"]),
    "messages None": ("sft", [chat(*GOOD), {"messages": None}], ["column 'messages', row 1", "None"]),
    "messages as JSON": ("sft", [{"messages": json.dumps(GOOD)}], ["row 0", "json.loads"]),
    "messages are strings": ("sft", [{"messages": ["hi", "ho"]}], ["message 0", "'hi' (str)"]),
    "tools are no JSON": ("sft", [chat(*GOOD) | {"tools": "{nope"}], ["column 'tools', row 0", "not JSON"]),
    "tools a number": ("sft", [chat(*GOOD) | {"tools": 3}], ["column 'tools', row 0", "3 (int)"]),
    "options a word": ("sft", [chat(*GOOD) | {"chat_template_kwargs": "x"}], ["'chat_template_kwargs', row 0", "dict"]),
    "system a number": ("sft", [chat(*GOOD) | {"system": 3}], ["row 0", "'system'", "3 (int)"]),
    "two system prompts": ("sft", [chat({"role": "system", "content": "A."}, *GOOD) | {"system": "B."}],
                           ["row 0", "already", "'B.' (str)"]),
    # --------------------------------------------- SFT
    "text a number": ("sft", [{"text": 3}], ["column 'text', row 0", "3 (int)", "str("]),
    "text a hole": ("sft", [{"text": "a"}, {"text": None}], ["column 'text', row 1", "None", "filter"]),
    "text a list": ("sft", [{"text": ["a", "b"]}], ["column 'text', row 0", "(list)"]),
    "completion a hole": ("sft", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}],
                          ["column 'completion', row 1"]),
    "completion a number": ("sft", [{"prompt": "a", "completion": 5}], ["column 'completion', row 0", "5 (int)"]),
    "completion a list": ("sft", [{"prompt": "a", "completion": ["b"]}], ["column 'completion', row 0", "(list)"]),
    "prompt text, completion chat": ("sft", [{"prompt": "a", "completion": GOOD[1:]}], ["row 0: 'prompt' is a string"]),
    "an image": ("sft", [chat(*GOOD) | {"image": "x.png"}], ["'image'", "remove_columns"]),
    "audio": ("sft", [{"text": "a", "audio": "x.wav"}], ["'audio'", "remove_columns"]),
    "nothing known": ("sft", [{"a": "b"}], ["are missing", "The dataset has: 'a'"]),
    "steps": ("sft", [{"prompt": "a", "completions": ["b"]}], ["'completion' is missing", "join"]),
    "ids below 0": ("sft", [{"input_ids": [1, -2]}], ["column 'input_ids', row 0", "not below 0"]),
    "ids of text": ("sft", [{"input_ids": "a b"}], ["column 'input_ids', row 0", "'a b' (str)"]),
    "ids are floats": ("sft", [{"input_ids": [1.5]}], ["column 'input_ids', row 0", "integers"]),
    # --------------------------------------------- DPO
    "chosen a hole": ("dpo", [pair(), pair(chosen=None)], ["column 'chosen', row 1", "None"]),
    "rejected a number": ("dpo", [pair(rejected=3)], ["column 'rejected', row 0", "3 (int)"]),
    "prompt a list": ("dpo", [pair(prompt=["a"])], ["column 'prompt', row 0", "(list)"]),
    "prompt None": ("dpo", [pair(), pair(prompt=None)], ["column 'prompt', row 1"]),
    "chosen chat, rejected text": ("dpo", [pair(prompt=GOOD[:1], chosen=GOOD[1:])], ["'rejected' is a string"]),
    "prompt text, answers chats": ("dpo", [pair(chosen=GOOD[1:], rejected=[assistant("no")])],
                                   ["row 0: the prompt is a string ('a' (str))", "messages too"]),
    "no prompt in chats": ("dpo", [{"chosen": GOOD[1:], "rejected": [assistant("no")]}], ["row 0", "column 'prompt'"]),
    "question": ("dpo", [{"question": "q?", "chosen": "a", "rejected": "b"}], ["'question'", "prompt"]),
    "Instruction and Input": ("dpo", [{"Instruction": "q?", "Input": "x", "chosen": "a", "rejected": "b"}],
                              ["'Instruction'", "'Input'", "join"]),
    "query": ("dpo", [{"user_query": "q?", "chosen": "a", "rejected": "b"}], ["'user_query'"]),
    "system alone": ("dpo", [{"system": "s", "chosen": "a", "rejected": "b"}], ["'system'"]),
    "system of strings": ("dpo", [pair(system="Be kind.")], ["row 0", "'system'", "'Be kind.' (str)"]),
    "implicit, empty": ("dpo", [{"chosen": "ab", "rejected": "ac"}, {"chosen": "", "rejected": "ac"}],
                        ["row 1", "'chosen' is empty"]),
    "images": ("dpo", [pair(images=["x.png"])], ["'images'", "remove_columns"]),
    "message a number in chosen": ("dpo", [pair(prompt=GOOD[:1], chosen=[assistant(3)], rejected=[assistant(4)])],
                                   ["column 'chosen', row 0, message 0, key 'content'", "3 (int)"]),
    "ids of pairs": ("dpo", [{"prompt_ids": [1], "chosen_ids": [2.5], "rejected_ids": [3]}],
                     ["column 'chosen_ids', row 0"]),
    # --------------------------------------------- GRPO and RLOO
    "GRPO's prompt a hole": ("grpo", [{"prompt": "a"}, {"prompt": None}], ["column 'prompt', row 1", "None"]),
    "GRPO's prompt a number": ("grpo", [{"prompt": 3}], ["column 'prompt', row 0", "3 (int)"]),
    "GRPO's prompt of no messages": ("grpo", [{"prompt": GOOD[:1]}, {"prompt": []}], ["column 'prompt', row 1"]),
    "GRPO's message": ("grpo", [{"prompt": GOOD[:1]}, {"prompt": [user(None)]}], ["row 1, message 0, key 'content'"]),
    "GRPO's system": ("grpo", [{"prompt": "a", "system": "Be kind."}], ["row 0", "'system'"]),
    "GRPO's image": ("grpo", [{"prompt": "a", "image": "x.png"}], ["'image'"]),
    "RLOO's prompt a hole": ("rloo", [{"prompt": "a"}, {"prompt": None}], ["column 'prompt', row 1", "None"]),
    "RLOO's question": ("rloo", [{"question": "a"}], ["'prompt' is missing", "'question'"]),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_before_a_model_is_loaded(case, config):
    method, rows, words = BAD_ROWS[case]
    with pytest.raises((ValueError, TypeError)) as error:
        made(method, Dataset.from_list(rows), config, model="/there/is/no/model")
    text = str(error.value)
    assert TRAINERS[method][0].__name__ in text and "train dataset" in text, text
    assert all(word in text for word in words), text


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_a_bad_row_of_a_stream_is_named_when_it_is_read(method, config):
    rows = [{"prompt": GOOD[:1], "completion": GOOD[1:]}] * 5 + [{"prompt": [user(None)], "completion": GOOD[1:]}]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    with pytest.raises(TypeError, match="train dataset: column 'prompt', row 5, message 0, key 'content'"):
        list(made(method, stream, config, shuffle_dataset=False).train_dataset)


# ---------------------------------------------------------------- what is asked, and what is passed over
@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_prompts_that_cannot_be_asked_are_found_in_a_table(method, config):
    for bad, words in (("", ["row 20", "empty"]), ("x" * 600, ["row 20", "600 tokens", "512 positions"]),
                       ("x" * 512, ["row 20", "512 tokens", "max_completion_length=1 or less"])):
        rows = Dataset.from_list([{"prompt": "hi"}] * 20 + [{"prompt": bad}])
        with pytest.raises(ValueError) as error:
            made(method, rows, config)
        assert all(word in str(error.value) for word in (*words, "train dataset")), error.value
    stream = made(method, rows.to_iterable_dataset(), config).train_dataset
    with pytest.raises(ValueError, match="row 20: the prompt has 512 tokens"):
        list(stream)


NO_SYSTEM = ("{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
             "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("method", TRAINERS)
def test_a_row_that_the_template_refuses_is_named(method, streaming, config):
    trainer, of_config, fields = TRAINERS[method]
    asked = [user("hi")], [{"role": "system", "content": "be kind"}, user("hi")]
    plain, refused = ({"prompt": p, "completion": GOOD[1:], "chosen": GOOD[1:], "rejected": [assistant("no")]}
                      for p in asked)
    rows = Dataset.from_list([plain] * 70 + [refused])
    tokenizer = pocket.tokenizer()
    tokenizer.chat_template = NO_SYSTEM
    rewards = dict(reward_funcs=length) if method in ("grpo", "rloo") else {}
    with pytest.raises(ValueError, match="train dataset: row 70: the chat template cannot render it: System role not"):
        made_from = rows.to_iterable_dataset() if streaming else rows
        list(trainer(pocket.model(0), args=of_config(**config(**fields)), train_dataset=made_from,
                     processing_class=tokenizer, **rewards).train_dataset)


def test_a_template_without_calls_is_an_error(config, tmp_path):
    tokenizer = pocket.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    with pytest.raises(ValueError, match="row 0: message 1 calls a tool, but the chat template never writes"):
        SFTTrainer(pocket.model(0), SFTConfig(**config()), train_dataset=from_file("openai", tmp_path),
                   processing_class=tokenizer)


@pytest.mark.parametrize("field, row, expected", [
    ("messages", {"messages": GOOD}, "<|user|>hi<|end|><|assistant|>ho<|end|>"),
    ("chat", {"chat": GOOD, "messages": [user("other")]}, "<|user|>hi<|end|><|assistant|>ho<|end|>"),
    ("formatted", {"messages": GOOD, "formatted": "my own"}, "my own<|end|>"),
    ("text", {"conversations": [human("hi"), gpt("ho")], "text": "my own"}, "my own<|end|>"),
    ("completion", {"prompt": "a", "completion": "b"}, "b<|end|>"),
    (None, {"messages": GOOD, "text": "my own"}, "<|user|>hi<|end|><|assistant|>ho<|end|>"),
    ("body", {"text": "the other column"}, ValueError),
    ("body", {"messages": GOOD}, ValueError)])
def test_a_text_field_that_is_asked_for_wins_or_is_an_error(field, row, expected, config):
    options = {} if field is None else dict(dataset_text_field=field)
    if expected is ValueError:
        with pytest.raises(ValueError, match="dataset_text_field='body' is not a column"):
            made("sft", Dataset.from_list([row] * 4), config, **options)
        return
    rows = made("sft", Dataset.from_list([row] * 4), config, **options).train_dataset
    assert pocket.tokenizer().decode(rows[0]["input_ids"]) == expected


@pytest.mark.parametrize("method, row, words", [
    ("sft", {"prompt": "q", "context": "c", "completion": "a"}, ["'context'", "only 'prompt' and 'completion'"]),
    ("dpo", pair(question="q?"), ["'question'"]),
    ("grpo", {"prompt": "q", "context": "c"}, ["'context'", "only 'prompt' is read"]),
    ("sft", {"prompt": "q", "completion": "a", "label": False}, ["'label'", "not liked"]),
    ("dpo", pair(rejected="b"), ["twice the same answer", "row 0"])])
def test_what_is_passed_over_is_said(method, row, words, config, heard):
    made(method, Dataset.from_list([row] * 2), config)
    assert all(word in heard.text for word in words), heard.text


@pytest.mark.parametrize("method, row", [
    ("sft", {"prompt": "c\n\nq", "context": "c", "question": "q", "completion": "a"}),
    ("dpo", {"question": "q?", "chosen": "q? a", "rejected": "q? b"}),
    ("grpo", {"prompt": [user("q? Think.")], "question": "q?", "context": None})])
def test_what_is_read_is_not_said_to_be_passed_over(method, row, config, heard):
    made(method, Dataset.from_list([row] * 2), config)
    assert "may belong to what is asked" not in heard.text


def test_a_column_that_a_reward_asks_for_is_not_passed_over(config, heard):
    def reads(completions, context, **columns): return [0.0] * len(completions)
    GRPOTrainer(pocket.model(0), reads, GRPOConfig(**config(num_generations=2, max_completion_length=2)),
                train_dataset=Dataset.from_list([{"prompt": "q", "context": "c"}] * 4),
                processing_class=pocket.tokenizer())
    assert "may belong to what is asked" not in heard.text


# ---------------------------------------------------------------- small things that stop a run
def begins_with_bos():
    "The pocket tokenizer with a beginning of sequence that it adds by itself, as Llama's does."
    from tokenizers import processors
    tokenizer = pocket.tokenizer()
    begin = tokenizer.convert_tokens_to_ids("<|system|>")
    tokenizer.bos_token = "<|system|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", begin)])
    return tokenizer


def test_text_that_was_rendered_before_gets_no_second_beginning(config):
    tokenizer = begins_with_bos()
    begin = tokenizer.bos_token_id
    def rows(method, **row):
        trainer, of_config, fields = TRAINERS[method]
        rewards = dict(reward_funcs=length) if method == "grpo" else {}
        return trainer(pocket.model(0), args=of_config(**config(**fields)), processing_class=tokenizer,
                       train_dataset=Dataset.from_list([row] * 4), **rewards)

    assert rows("sft", text="<|system|>hi").train_dataset[0]["input_ids"].count(begin) == 1
    assert rows("sft", text="hi").train_dataset[0]["input_ids"].count(begin) == 1
    (row, *_) = rows("dpo", prompt="<|system|>hi", chosen=" a", rejected=" b").train_dataset
    assert row["prompt_ids"].count(begin) == 1
    trainer = rows("grpo", prompt="<|system|>hi")
    assert trainer.encode([trainer.train_dataset[0]])[0].count(begin) == 1


def test_a_margin_of_words_is_left_out(config):
    trainer = made("dpo", Dataset.from_list([pair(margin="large")] * 4), config)
    assert "margin" not in trainer.train_dataset.column_names
    trainer.train()
    numbers = made("dpo", Dataset.from_list([pair(margin=2.5)] * 4), config).train_dataset
    assert numbers["margin"][:] == [2.5] * 4


@pytest.mark.parametrize("method, row", [("sft", {"text": "abc"}), ("dpo", pair())])
def test_rows_are_drawn_by_their_length(method, row, config):
    rows = Dataset.from_list([{name: value * k for name, value in row.items()} for k in range(1, 9)])
    trainer = made(method, rows, config, train_sampling_strategy="group_by_length", length_column_name="tokens")
    if method == "dpo":
        assert trainer.train_dataset["tokens"][:] == [2 * k + 1 for k in range(1, 9)]
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("kind", [None, "numpy", "torch"])
def test_prepared_rows_need_no_labels(kind, config):
    rows = Dataset.from_list([{"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}] * 4).with_format(kind)
    options = dict(dataset_kwargs={"skip_prepare_dataset": True})
    trainer = made("sft", rows, config, **options)
    assert trainer.data_collator([rows[0]])["mask"].tolist() == [[0, 1, 1]]  # a first token has nothing before it
    trainer.train()
    masked = made("sft", Dataset.from_list([{"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1]}] * 4), config,
                  completion_only_loss=True, **options)
    assert masked.data_collator([masked.train_dataset[0]])["mask"].tolist() == [[0, 0, 1, 1]]
    with pytest.raises(ValueError, match="the train dataset must hold input_ids already, but it has 'text'"):
        made("sft", Dataset.from_list([{"text": "a"}]), config, **options)


def test_a_processor_gives_its_tokenizer(config):
    class Processor:
        def __init__(self): self.tokenizer, self.chat_template = pocket.tokenizer(), None
        def __call__(self, *args, **kwargs): raise AssertionError("texts are for the tokenizer")
    trainer = SFTTrainer(pocket.model(0), SFTConfig(**config()), train_dataset=Dataset.from_list([chat(*GOOD)] * 4),
                         processing_class=Processor())
    trainer.train()
    with pytest.raises(TypeError, match="must be a tokenizer"):
        SFTTrainer(pocket.model(0), SFTConfig(**config()), train_dataset=Dataset.from_list([chat(*GOOD)] * 4),
                   processing_class=lambda text: text)


@pytest.mark.parametrize("method, row", [("sft", {"text": "{} ab"}), ("dpo", pair(prompt="{}"))])
def test_a_stream_goes_on_in_its_second_pass(method, row, config, tmp_path):
    rows = Dataset.from_list([{name: value.format(i) for name, value in row.items()} for i in range(6)])
    def run(resume=None):
        trainer = made(method, rows.to_iterable_dataset(), config, max_steps=10, save_steps=4,
                       per_device_train_batch_size=1, save_strategy="steps")
        seen, step = [], trainer.training_step
        def spy(model, inputs, *args, **kwargs):
            seen.append([*inputs["prompt_ids"].flatten().tolist(), *inputs["completion_ids"].flatten().tolist()])
            return step(model, inputs, *args, **kwargs)
        trainer.training_step = spy
        trainer.train(resume_from_checkpoint=resume)
        return seen
    whole = run()
    assert whole[6:] == whole[:4] and run(f"{tmp_path}/checkpoint-8") == whole[8:]


def test_whole_floats_and_short_fractions_are_answers():
    from posttrain.rollout.rewards import accuracy_reward, exact_match_reward
    assert exact_match_reward(["72", "0.5", "7"], answer=[72.0, 0.5, float("nan")]) == [1.0, 1.0, 0.0]
    for said, solution in ((r"\frac12", r"\frac12"), (r"\frac12", r"$\frac{1}{2}$"), (r"\sqrt2", r"$\sqrt{2}$"),
                           (r"2\sqrt 3", r"$2\sqrt{3}$"), (r"3\frac12", "3.5"), (r"\dfrac34", "0.75"), ("72", 72.0),
                           (r"\frac{1}2", r"\frac12"), (r"-\frac12", "-0.5"), ("100000000000000000000", 1e20)):
        assert accuracy_reward([rf"\boxed{{{said}}}"], [solution]) == [1.0], (said, solution)
        assert accuracy_reward([r"\boxed{9999}"], [solution]) == [0.0]
