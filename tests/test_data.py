"""The data room against TRL's preparation, on bad input, on streams, and packing by its properties.

What teaches is in the notebooks."""
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, IterableDataset, disable_progress_bars

sys.path.insert(0, str(Path(__file__).parent))
import tiny  # noqa: E402
from posttrain.data.collate import collate_sft, show_batch  # noqa: E402
from posttrain.data.conversions import (  # noqa: E402
    extract_prompt,
    maybe_convert_to_chatml,
    maybe_extract_prompt,
    unpair_preference_dataset,
)
from posttrain.data.formats import dataset_type  # noqa: E402
from posttrain.data.packing import PACKING_STRATEGIES, pack_dataset  # noqa: E402
from posttrain.data.packing_best_fit import best_fit_decreasing  # noqa: E402
from posttrain.data.prepare import prepare_pairs, prepare_sft, prepare_steps, prepare_unpaired  # noqa: E402
from posttrain.data.templates import CHATML, apply_chat_template  # noqa: E402

disable_progress_bars()


pytestmark = pytest.mark.usefixtures("heard")


def user(text): return {"role": "user", "content": text}
def assistant(text): return {"role": "assistant", "content": text}
def system(text): return {"role": "system", "content": text}


QA = [("What colour is the sky?", " It is blue."), ("What is 2 + 3?", " The answer is 5."), ("", "Only an answer."),
      ("Déjà vu: ", "你好，世界!"), ("She sold 48+24 =", " 72 clips altogether in April and May.<|im_end|>")]
CHATS = ([[user(q or "?"), assistant(a)] for q, a in QA]
         + [[system("Be brief."), user("a"), assistant("b"), user("c"), assistant("d")]])
TOOLS = [{"type": "function",
          "function": {"name": "add", "description": "Add.",
                       "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}]
TEXT = Dataset.from_dict({"text": [q + a for q, a in QA]})
STANDARD = Dataset.from_dict({"prompt": [q for q, _ in QA], "completion": [a for _, a in QA]})
MESSAGES = Dataset.from_dict({"messages": CHATS})
CONVERSATIONS = Dataset.from_dict({"prompt": [c[:-1] for c in CHATS], "completion": [c[-1:] for c in CHATS]})


def by_trl(dataset, tokenizer, max_length=1024, packing=False, **options):
    "TRL's own preparation, without its trainer."
    from accelerate import PartialState
    from trl import SFTTrainer
    PartialState()
    first = next(iter(dataset))
    completion_only = options.pop("completion_only_loss", None)
    if completion_only is None:
        completion_only = "prompt" in first and "completion" in first
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=completion_only)
    formatting_func = options.pop("formatting_func", None)
    defaults = dict(dataset_num_proc=None, dataset_text_field="text", assistant_only_loss=False, max_length=max_length,
                    truncation_mode="keep_start", shuffle_dataset=False, seed=0, packing_strategy="bfd")
    args = SimpleNamespace(**{**defaults, **options})
    prepared = SFTTrainer._prepare_dataset(trainer, dataset, tokenizer, args, packing, formatting_func, "train")
    return [(r["input_ids"], r["labels"]) for r in prepared]


def by_us(dataset, tokenizer, **options):
    return [(r["input_ids"], r["labels"]) for r in prepare_sft(dataset, tokenizer, **options)]


# ---------------------------------------------------------------- parity with TRL: supervised fine-tuning
MASKED = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5]], "completion_mask": [[0, 1, 1], [0, 1]]})
TWICE_MASKED = Dataset.from_dict(
    {"input_ids": [[1, 2, 3, 4]], "completion_mask": [[0, 1, 1, 1]], "assistant_masks": [[1, 1, 0, 1]]})
LABELLED = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5, 6]], "labels": [[-100, 2, 3], [-100, -100, 6]]})
CASES = {
    "text": (TEXT, {}),
    "text, short": (TEXT, dict(max_length=6)),
    "text, end kept": (TEXT, dict(max_length=6, truncation_mode="keep_end")),
    "other text field": (TEXT.rename_column("text", "story"), dict(dataset_text_field="story")),
    "formatted": (TEXT, dict(formatting_func=lambda row: "Story: " + row["text"])),
    "standard": (STANDARD, {}),
    "standard, all tokens": (STANDARD, dict(completion_only_loss=False)),
    "standard, short": (STANDARD, dict(max_length=9)),
    "standard, end kept": (STANDARD, dict(max_length=9, truncation_mode="keep_end")),
    "messages": (MESSAGES, {}),
    "messages, assistant only": (MESSAGES, dict(assistant_only_loss=True)),
    "messages, assistant only, short": (MESSAGES, dict(assistant_only_loss=True, max_length=30)),
    "conversations": (CONVERSATIONS, {}),
    "conversations, all tokens": (CONVERSATIONS, dict(completion_only_loss=False)),
    "conversations, both masks": (CONVERSATIONS, dict(assistant_only_loss=True)),
    "tools as lists": (MESSAGES.add_column("tools", [TOOLS] * len(CHATS)), {}),
    "tools as JSON": (CONVERSATIONS.add_column("tools", [json.dumps(TOOLS)] * len(CHATS)), {}),
    "template options": (MESSAGES.add_column("chat_template_kwargs", [{"enable_thinking": False}] * len(CHATS)), {}),
    "tokenised": (Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5]]}), {}),
    "tokenised, completion mask": (MASKED, dict(completion_only_loss=True)),
    "tokenised, completion mask unused": (MASKED, {}),
    "tokenised, two masks": (TWICE_MASKED, dict(completion_only_loss=True)),
    "tokenised, labels": (LABELLED, dict(max_length=2)),
}


@pytest.mark.parametrize("adds", [None, "<s> $A"])
@pytest.mark.parametrize("case", CASES)
def test_sft_rows_equal_trl(case, adds):
    dataset, options = CASES[case]
    tokenizer = tiny.tokenizer(CHATML, adds=adds, bos="<s>")
    ours = by_us(dataset, tokenizer, **options)
    assert ours == by_trl(dataset, tokenizer, **options)
    assert len(ours) > 0
    if "formatting_func" not in options:
        assert ours == by_us(dataset.to_iterable_dataset(), tokenizer, **options)


def real_templates():
    "The chat templates that TRL ships for its own tests and patches, where they render plain chats."
    import trl
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja")):
        template = path.read_text(encoding="utf-8")
        tokenizer = tiny.tokenizer(template, bos="<s>")
        try:
            for chat in CHATS:
                tokenizer.apply_chat_template(chat)
                tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True)
        except Exception:
            continue  # wants content blocks, its own tokens, or no system message
        yield path.stem, tokenizer


def test_rows_equal_trl_under_real_templates():
    from posttrain.data.templates import has_generation_markers
    names, marked = [], 0
    for name, tokenizer in real_templates():
        for dataset in (CONVERSATIONS, MESSAGES):
            assert by_us(dataset, tokenizer, max_length=None) == by_trl(dataset, tokenizer, max_length=None), name
        if has_generation_markers(tokenizer.chat_template):
            marked += 1
            options = dict(assistant_only_loss=True, max_length=None)
            assert by_us(MESSAGES, tokenizer, **options) == by_trl(MESSAGES, tokenizer, **options), name
        names.append(name)
    assert len(names) > 20 and marked > 5 and "qwen3" in names


def of_family(template):
    """A tokenizer of bytes that knows the marks of a template as tokens."""
    import re

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    marks = re.findall(r"<[|]?[A-Za-z_]+[|]?>|\[/?[A-Z_]+\]", template)
    marks = sorted({mark for mark in marks if "think" not in mark})
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                                   additional_special_tokens=marks, chat_template=template)


def learned(template, chat):
    """What the assistant's masks mark, a text per turn."""
    from posttrain.data.templates import encode_chats
    tokenizer = of_family(template)
    (ids,), (mask,) = encode_chats(tokenizer, [chat], assistant_masks=True)
    text = "".join(tokenizer.decode([i]) if m else "\0" for i, m in zip(ids, mask))
    return [turn for turn in text.split("\0") if turn]


def trl_template(name):
    import trl
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


TURNS = [user("2+3?"), assistant("It is 5."), user("+1?"), assistant("Now 6.")]
FAMILIES = ("cohere", "cohere2", "gemma", "gemma3", "lfm2", "lfm2_v2", "llama3", "phi3", "phi3_5", "qwen2_5",
            "qwen3_instruct_2507")


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_are_found_without_markers_as_trl_marks_them(family):
    """TRL marks templates of its own making. It also marks what comes behind the end of a turn, where no model writes
    any more."""
    from posttrain.data.templates import has_generation_markers
    template = trl_template(family)
    assert not has_generation_markers(template)
    theirs = [turn.strip().removesuffix("</s>").strip() for turn in learned(trl_template(f"{family}_training"), TURNS)]
    assert learned(template, TURNS) == theirs and len(theirs) == 2


MISTRAL = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
           "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}")


@pytest.mark.parametrize("template, turns", [
    (MISTRAL, [" It is 5.</s>", " Now 6.</s>"]),
    ("qwen3", ["It is 5.<|im_end|>", "<think>\n\n</think>\n\nNow 6.<|im_end|>"]),
    ("gptoss", ["<|channel|>final<|message|>It is 5.<|end|>", "<|channel|>final<|message|>Now 6.<|return|>"]),
], ids=["Mistral", "Qwen3", "gpt-oss"])
def test_a_turn_is_what_the_template_writes_behind_its_generation_prompt(template, turns):
    assert learned(template if "{" in template else trl_template(template), TURNS) == turns


@pytest.mark.parametrize("family, why", [("glm4moe", "no token of its own ends"),
                                         ("qwen3_5_think", "message 1 cannot")])
def test_a_template_that_does_not_let_turns_be_found_is_refused(family, why):
    with pytest.raises(ValueError, match=f"(?s){why}.*generation %.*chat_template_path"):
        learned(trl_template(family), TURNS)


def test_sharegpt_equals_trl_and_renames_speakers():
    tokenizer = tiny.tokenizer(CHATML)
    def sharegpt(chat, speakers):
        return [{"from": speakers[m["role"]], "value": m["content"]} for m in chat]

    chats = by_us(MESSAGES, tokenizer, assistant_only_loss=True)
    same_names = {"user": "user", "assistant": "assistant", "system": "system"}
    spelled = Dataset.from_dict({"conversations": [sharegpt(chat, same_names) for chat in CHATS]})
    assert by_us(spelled, tokenizer, assistant_only_loss=True) == chats
    assert by_trl(spelled, tokenizer, assistant_only_loss=True) == chats
    # TRL keeps the name "gpt" here, and no turn is an assistant's.
    speakers = {"user": "human", "assistant": "gpt", "system": "system"}
    original = Dataset.from_dict({"conversations": [sharegpt(chat, speakers) for chat in CHATS]})
    assert by_us(original, tokenizer, assistant_only_loss=True) == chats
    converted = maybe_convert_to_chatml({"prompt": [{"from": "human", "value": "hi"}], "n": 1})
    assert converted == {"prompt": [user("hi")], "n": 1}


def test_end_of_sequence_once_even_if_the_tokenizer_adds_its_own():
    tokenizer = tiny.tokenizer(eos="</s>", bos="<s>", adds="<s> $A </s>")
    eos = tokenizer.eos_token_id
    for dataset in (TEXT, STANDARD):
        for ids, labels in by_us(dataset, tokenizer):
            assert ids.count(eos) == 1 and ids[-1] == labels[-1] == eos and ids.count(tokenizer.bos_token_id) == 1


def test_padding_with_the_end_token_changes_nothing():
    careful, careless = tiny.tokenizer(CHATML), tiny.tokenizer(CHATML, pad="<|im_end|>")
    for dataset in (TEXT, STANDARD, MESSAGES, CONVERSATIONS):
        assert by_us(dataset, careful) == by_us(dataset, careless)
    rows = list(prepare_sft(STANDARD, careless))
    batch = collate_sft(rows)
    # a first token has no context
    assert batch["mask"].sum(1).tolist() == [sum(l != -100 for l in r["labels"][1:]) for r in rows]
    assert show_batch(batch, careless).ends == 1.0


def test_prompts_that_are_not_prefixes_are_reported_once(heard):
    tokenizer = tiny.tokenizer()
    # " sky" and " is" are tokens
    dataset = Dataset.from_dict({"prompt": ["The ", "What "], "completion": ["sky is", "is 2"]})
    assert by_us(dataset, tokenizer) == by_trl(dataset, tokenizer)
    ours = [record.getMessage() for record in heard.records if record.name == "posttrain"]  # TRL may warn too
    assert len(ours) == 1 and "' '" in ours[0] and "token boundary" in ours[0]


def test_assistant_turns_of_a_long_chat():
    tokenizer = tiny.tokenizer(CHATML)
    chat = [m for i in range(6) for m in (user(f"question {i}?"), assistant(f"answer {i}!"))]
    (ids, labels), = by_us(Dataset.from_dict({"messages": [chat]}), tokenizer, assistant_only_loss=True)
    learned = tokenizer.decode([l for l in labels if l != -100])
    assert learned == "".join(f"answer {i}!<|im_end|>" for i in range(6))


def test_options_differ_from_row_to_row():
    "A struct column fills in None where a row had no such field; None must not reach the template."
    template = CHATML + "{{ '[' ~ mood ~ ']' if mood is defined else '' }}"
    dataset = MESSAGES.select([0, 1, 2]).add_column("chat_template_kwargs",
                                                    [{"mood": "calm", "other": None}, {"mood": None, "other": 1}, None])
    texts = [tiny.tokenizer(template).decode(ids) for ids, _ in by_us(dataset, tiny.tokenizer(template))]
    assert [t.endswith("[calm]") for t in texts] == [True, False, False] and not any("None" in t for t in texts)


def test_formats_of_the_dataset_do_not_matter():
    tokenizer = tiny.tokenizer(CHATML)
    plain = by_us(STANDARD, tokenizer)
    assert by_us(STANDARD.with_format("numpy"), tokenizer) == plain == by_us(STANDARD.with_format("arrow"), tokenizer)
    assert by_us(STANDARD, tokenizer, num_proc=2) == plain
    assert by_us(STANDARD.add_column("extra", [{"a": 1}] * len(QA)), tokenizer) == plain


def test_preparing_twice_is_cached(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": q + a}) for q, a in QA))
    first, second = (prepare_sft(Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache")), tiny.tokenizer())
                     for _ in range(2))
    assert first._fingerprint == second._fingerprint and list(first) == list(second)


def test_a_stream_is_read_lazily():
    read = []

    def generate():
        for i in range(10_000):
            read.append(i)
            yield {"text": f"row {i}"}
    stream = prepare_sft(IterableDataset.from_generator(generate), tiny.tokenizer())
    assert stream.column_names == ["input_ids", "labels"]
    assert len(next(iter(stream))["input_ids"]) > 1 and max(read) < 1100


# ---------------------------------------------------------------- parity with TRL: preferences
EXPLICIT = Dataset.from_dict({"prompt": [q for q, _ in QA], "chosen": [a for _, a in QA],
                              "rejected": [" No." + a[:5] for _, a in QA]})
IMPLICIT = Dataset.from_dict(
    {side: [q + a for q, a in zip(EXPLICIT["prompt"], EXPLICIT[side])] for side in ("chosen", "rejected")})
CHAT_PAIRS = Dataset.from_dict({"prompt": [c[:-1] for c in CHATS], "chosen": [c[-1:] for c in CHATS],
                                "rejected": [[assistant("No.")]] * len(CHATS)})
CHAT_IMPLICIT = Dataset.from_dict(
    {side: [p + a for p, a in zip(CHAT_PAIRS["prompt"], CHAT_PAIRS[side])] for side in ("chosen", "rejected")})
PAIRS = {"explicit": EXPLICIT, "implicit": IMPLICIT, "chats": CHAT_PAIRS, "implicit chats": CHAT_IMPLICIT,
         "chats with tools": CHAT_PAIRS.add_column("tools", [json.dumps(TOOLS)] * len(CHATS))}


@pytest.mark.parametrize("adds", [None, "<s> $A"])
@pytest.mark.parametrize("max_length", [None, 40, 9])
@pytest.mark.parametrize("case", PAIRS)
def test_pairs_equal_trl(case, max_length, adds):
    from trl import DPOTrainer
    tokenizer = tiny.tokenizer(CHATML, adds=adds, bos="<s>")
    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start")
    theirs = DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), PAIRS[case], tokenizer, args, "train")
    def cut(prompt, side): return (prompt + side)[:max_length][len(prompt):]
    theirs = [(r["prompt_ids"], cut(r["prompt_ids"], r["chosen_ids"]), cut(r["prompt_ids"], r["rejected_ids"]))
              for r in theirs]
    if not theirs:
        with pytest.raises(ValueError, match="no row of the train dataset"):
            prepare_pairs(PAIRS[case], tokenizer, max_length=max_length)
        return
    for dataset in (PAIRS[case], PAIRS[case].to_iterable_dataset()):
        assert [(r["prompt_ids"], r["chosen_ids"], r["rejected_ids"])
                for r in prepare_pairs(dataset, tokenizer, max_length=max_length)] == theirs


@pytest.mark.parametrize("case", PAIRS)
def test_rewards_are_asked_for_what_trl_asks(case):
    from trl import RewardTrainer
    tokenizer = tiny.tokenizer(CHATML)
    for max_length in (None, 200 if "tools" in case else 50):
        theirs = RewardTrainer._prepare_dataset(SimpleNamespace(), PAIRS[case], tokenizer,
                                                SimpleNamespace(dataset_num_proc=None, max_length=max_length), "train")
        ours = prepare_pairs(PAIRS[case], tokenizer, max_length=max_length, truncation_mode="drop")
        assert [(r["prompt_ids"] + r["chosen_ids"], r["prompt_ids"] + r["rejected_ids"])
                for r in ours] == [(r["chosen_ids"], r["rejected_ids"]) for r in theirs]


@pytest.mark.parametrize("case", PAIRS)
def test_judged_answers_equal_trl(case):
    from trl import KTOTrainer
    tokenizer = tiny.tokenizer(CHATML)
    limit = 200 if "tools" in case else 60
    args = SimpleNamespace(dataset_num_proc=None, max_length=limit, truncation_mode="keep_start")
    theirs = KTOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer, calculate_KL=False), PAIRS[case],
                                         tokenizer, args, "train")
    theirs = [(r["prompt_ids"], r["completion_ids"][:limit - len(r["prompt_ids"])], r["label"]) for r in theirs]
    for dataset in (PAIRS[case], PAIRS[case].to_iterable_dataset()):
        ours = [(r["prompt_ids"], r["completion_ids"], r["label"])
                for r in prepare_unpaired(dataset, tokenizer, max_length=limit)]
        assert ours == theirs


def test_conversions_equal_trl():
    import trl
    rng = random.Random(0)
    for dataset in PAIRS.values():
        assert list(unpair_preference_dataset(dataset)) == list(trl.unpair_preference_dataset(dataset))
        for row in dataset:
            assert maybe_extract_prompt(row) == trl.maybe_extract_prompt(row)
    for _ in range(300):
        pair = {side: "x" + "".join(rng.choices("a b", k=rng.randint(1, 5))) for side in ("chosen", "rejected")}
        # there TRL leaves a space to the prompt
        if not any(a.startswith(b) for a, b in (pair.values(), list(pair.values())[::-1])):
            assert extract_prompt(pair) == trl.extract_prompt(pair)
    # Where nothing is shared TRL looks at the last character instead of the one before the first, and shares a wrong
    # prompt.
    assert trl.extract_prompt({"chosen": "a ", "rejected": "b "})["prompt"] == "a"
    assert extract_prompt({"chosen": "a ", "rejected": "b "})["prompt"] == ""


def test_rendered_text_equals_trl():
    import trl
    tokenizer = tiny.tokenizer(CHATML)
    rows = [*MESSAGES, *CONVERSATIONS, *CHAT_PAIRS, *CHAT_IMPLICIT, {"prompt": CHATS[0][:1]}, {"prompt": CHATS[0]},
            {**CONVERSATIONS[0], "label": True}]
    for row in rows:
        assert apply_chat_template(row, tokenizer, tools=TOOLS) == trl.apply_chat_template(row, tokenizer, tools=TOOLS)


def test_steps_are_judged_where_they_end():
    tokenizer = tiny.tokenizer(bos="<s>")
    rows = Dataset.from_dict({"prompt": ["What is 2 + 3?", "The sky"],
                              "completions": [["2 + 3 = 5", "The answer is 5."], ["It is blue"]],
                              "labels": [[True, False], [True]]})
    for row, raw in zip(prepare_steps(rows, tokenizer), rows):
        ends = [i for i, l in enumerate(row["labels"]) if l != -100]
        assert [bool(row["labels"][i]) for i in ends] == raw["labels"]
        text = "<s>" + raw["prompt"]
        for end, step in zip(ends, raw["completions"]):
            text += step + "\n"
            assert tokenizer.decode(row["input_ids"][:end + 1]) == text
    last = prepare_steps(rows, tokenizer, train_on_last_step_only=True)
    assert [sum(l != -100 for l in r["labels"]) for r in last] == [1, 1]
    chats = rows.map(lambda row: {"prompt": [user(row["prompt"])]})
    assert "assistant\n2 + 3 = 5\n" in tokenizer.decode(prepare_steps(chats, tiny.tokenizer(CHATML))[0]["input_ids"])


# ---------------------------------------------------------------- bad input: each message must help
def dataset(**columns): return Dataset.from_dict(columns)


LONG_PROMPT = dataset(prompt=["What colour is the sky?"], completion=["blue"])
NO_MARKERS = "{% for m in messages %}{{ m.content }}{% endfor %}"

BAD = {
    "missing column": (
        lambda t: prepare_sft(dataset(prompt=["a"], output=["b"]), t),
        ValueError, ["SFTTrainer needs", "'completion' is missing", "'prompt' and 'output'",
                     "rename_columns({'output': 'completion'})"]),
    "nothing alike": (
        lambda t: prepare_sft(dataset(foo=["a"]), t),
        ValueError, ["The dataset has: 'foo'", "rename_column('your_name'"]),
    "only a prompt": (
        lambda t: prepare_sft(dataset(prompt=["a"]), t),
        ValueError, ["'completion' is missing"]),
    "empty": (
        lambda t: prepare_sft(dataset(text=[]), t),
        ValueError, ["SFTTrainer is empty", "0 rows"]),
    "empty stream": (
        lambda t: prepare_sft(IterableDataset.from_generator(lambda: iter(())), t),
        ValueError, ["SFTTrainer is empty"]),
    "wrong type": (
        lambda t: prepare_sft(dataset(text=[1, 2]), t),
        TypeError, ["column 'text', row 0", "expected a string", "1 (int)"]),
    "a hole": (
        lambda t: prepare_sft(dataset(text=["a", "b", None]), t),
        TypeError, ["column 'text', row 2", "None (NoneType)"]),
    "a hole in a stream": (
        lambda t: list(prepare_sft(dataset(text=["a"] * 1500 + [None]).to_iterable_dataset(), t)),
        TypeError, ["column 'text', row 1500", "None (NoneType)"]),
    "no messages": (
        lambda t: prepare_sft(dataset(messages=[[user("a"), assistant("b")], []]), t),
        TypeError, ["column 'messages', row 1", "non-empty list of messages", "[] (list)"]),
    "mixed spelling": (
        lambda t: prepare_sft(dataset(prompt=["a"], completion=[[assistant("b")]]), t),
        TypeError, ["'prompt' is a string, 'completion' is a list of messages"]),
    "prompts too long": (
        lambda t: prepare_sft(LONG_PROMPT, t, max_length=4),
        ValueError, ["no row of the train dataset", "max_length=4", "keep_end"]),
    "stream of prompts too long": (
        lambda t: prepare_sft(LONG_PROMPT.to_iterable_dataset(), t, max_length=4),
        ValueError, ["first 1000 rows", "max_length=4"]),
    "nothing to learn": (
        lambda t: prepare_sft(dataset(text=["", ""]), t),
        ValueError, ["no row of the train dataset"]),
    "unknown truncation": (
        lambda t: prepare_sft(TEXT, t, truncation_mode="middle"),
        ValueError, ["'keep_start', 'keep_end'", "'middle'"]),
    "max_length 0": (
        lambda t: prepare_sft(TEXT, t, max_length=0),
        ValueError, ["positive", "got 0"]),
    "no end": (
        lambda t: prepare_sft(TEXT, tiny.tokenizer(eos=None)),
        ValueError, ["no end-of-sequence token", "eos_token"]),
    "no template": (
        lambda t: prepare_sft(MESSAGES, tiny.tokenizer()),
        ValueError, ["no chat template", "chat_template_path"]),
    "no markers": (
        lambda t: prepare_sft(MESSAGES, tiny.tokenizer(NO_MARKERS), assistant_only_loss=True),
        ValueError, ["does not mark it", "{% generation %}"]),
    "assistant_only_loss of strings": (
        lambda t: prepare_sft(STANDARD, t, assistant_only_loss=True),
        ValueError, ["needs conversations", "'prompt'"]),
    "completion_only_loss of texts": (
        lambda t: prepare_sft(TEXT, t, completion_only_loss=True),
        ValueError, ["needs the columns 'prompt' and 'completion'"]),
    "formatting a completion": (
        lambda t: prepare_sft(STANDARD, t, formatting_func=str, completion_only_loss=True),
        ValueError, ["formatting_func", "completion_only_loss"]),
    "formatting to a list": (
        lambda t: prepare_sft(STANDARD, t, formatting_func=lambda row: [row["prompt"]]),
        TypeError, ["returns a string", "returned list"]),
    "a transform": (
        lambda t: prepare_sft(TEXT.with_transform(lambda batch: batch), t),
        ValueError, ["with_transform", "Dataset.map"]),
    "labels of another length": (
        lambda t: prepare_sft(dataset(input_ids=[[1, 2], [3, 4]], labels=[[1, 2], [3]]), t),
        ValueError, ["row 1", "2 input_ids", "1 labels"]),
    "labels of other tokens": (
        lambda t: prepare_sft(dataset(input_ids=[[1, 2], [3, 4]], labels=[[1, 2], [3, 9]]), t),
        ValueError, ["row 1", "label 9", "token 4"]),
    "bad tools": (
        lambda t: prepare_sft(MESSAGES.select([0]).add_column("tools", ["{nope"]), t),
        ValueError, ["'tools'", "not JSON"]),
    "pairs without one": (
        lambda t: prepare_pairs(dataset(prompt=["a"], accepted=["b"], rejected=["c"]), t),
        ValueError, ["DPOTrainer", "'chosen' is missing", "{'accepted': 'chosen'}"]),
    "pairs of numbers": (
        lambda t: prepare_pairs(dataset(prompt=["a"], chosen=["b"], rejected=[3]), t),
        TypeError, ["column 'rejected', row 0", "3 (int)"]),
    "no verdict": (
        lambda t: prepare_unpaired(dataset(prompt=["a"], completion=["b"]), t),
        ValueError, ["KTOTrainer", "'label' is missing"]),
    "a verdict of words": (
        lambda t: prepare_unpaired(dataset(prompt=["a"], completion=["b"], label=["good"]), t),
        TypeError, ["column 'label', row 0", "True or False", "'good' (str)"]),
    "steps and labels": (
        lambda t: prepare_steps(dataset(prompt=["a"], completions=[["b", "c"]], labels=[[True]]), t),
        ValueError, ["2 completions", "1 labels"]),
    "unknown packing": (
        lambda t: pack_dataset(dataset(input_ids=[[1]]), 4, "ffd"),
        ValueError, ["'bfd', 'bfd_split', 'wrapped'", "'ffd'"]),
    "packing text": (
        lambda t: pack_dataset(TEXT, 4),
        TypeError, ["column 'text'", "select_columns"]),
    "packing twice": (
        lambda t: pack_dataset(pack_dataset(dataset(input_ids=[[1]]), 4), 4),
        ValueError, ["packed already"]),
    "unpairing answers": (
        lambda t: unpair_preference_dataset(dataset(prompt=["a"], completion=["b"])),
        ValueError, ["'chosen' and 'rejected' are missing"]),
    "type of nothing known": (
        lambda t: dataset_type({"x": 1}),
        ValueError, ["The dataset has: 'x'"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, kind, parts = BAD[case]
    with pytest.raises(kind) as error:
        call(tiny.tokenizer(CHATML))
    for part in parts:
        assert part in str(error.value), f"{part!r} is not in: {error.value}"


def test_dropped_rows_are_counted(heard):
    rows = dataset(prompt=["a", "What colour is the sky? What is 2 + 3?", "b"], completion=["b", "c", "d"])
    assert len(prepare_sft(rows, tiny.tokenizer(), max_length=6, name="eval")) == 2
    assert "1 of 3 rows of the eval dataset" in heard.text and "max_length=6" in heard.text
    assert len(list(prepare_sft(rows.to_iterable_dataset(), tiny.tokenizer(), max_length=6))) == 2
    assert "row 1 of the stream" in heard.text


def test_a_template_that_never_ends_is_reported(heard):
    prepare_sft(MESSAGES, tiny.tokenizer(NO_MARKERS))
    assert "not learn to stop" in heard.text and "never writes it" in heard.text


# ---------------------------------------------------------------- packing
def random_documents(rng, n=200, longest=60):
    start = iter(range(10 ** 6))
    rows = [[next(start) for _ in range(k)] for k in rng.integers(0, longest, n)]
    return Dataset.from_dict({"input_ids": rows, "labels": [[-100 if i % 3 else i for i in row] for row in rows]})


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("strategy", PACKING_STRATEGIES)
def test_packed_rows_equal_trl(strategy, seed):
    import trl
    rng = np.random.default_rng(seed)
    documents, L = random_documents(rng), int(rng.integers(1, 70))
    kwargs = dict(batch_size=int(rng.choice([7, 100, 1000])))
    theirs = list(trl.pack_dataset(documents, L, strategy, dict(kwargs)))
    ours = list(pack_dataset(documents, L, strategy, kwargs))
    assert [{k: r[k] for k in theirs[0]} for r in ours] == theirs
    assert strategy != "wrapped" or all(r["seq_lengths"] == [len(r["input_ids"])] for r in ours)
    assert ours == list(pack_dataset(documents.to_iterable_dataset(), L, strategy, kwargs))


@pytest.mark.parametrize("seed", range(8))
def test_no_token_is_lost_or_doubled(seed):
    rng = np.random.default_rng(100 + seed)
    documents, L = random_documents(rng), int(rng.integers(1, 70))
    rows = documents["input_ids"][:]
    for strategy in PACKING_STRATEGIES:
        packed = pack_dataset(documents, L, strategy)
        kept = sorted(i for row in packed["input_ids"] for i in row)
        assert kept == sorted(i for row in rows for i in (row[:L] if strategy == "bfd" else row))
        for row in packed:
            assert sum(row["seq_lengths"]) == len(row["input_ids"]) == len(row["labels"]) <= L
        if strategy != "wrapped":  # every piece is one stretch of one document
            documents_of = {i: d for d, row in enumerate(rows) for i in row}
            for row in packed:
                start = 0
                for n in row["seq_lengths"]:
                    piece = row["input_ids"][start:start + n]
                    assert piece == list(range(piece[0], piece[0] + n)) and len({documents_of[i] for i in piece}) == 1
                    start += n


def test_labels_travel_with_their_tokens():
    documents = random_documents(np.random.default_rng(5))
    label_of = {i: l for row in documents for i, l in zip(row["input_ids"], row["labels"])}
    for strategy in PACKING_STRATEGIES:
        for row in pack_dataset(documents, 17, strategy):
            assert row["labels"] == [label_of[i] for i in row["input_ids"]]


def test_packing_keeps_types_and_dictionaries():
    from datasets import Features, List, Value
    documents = random_documents(np.random.default_rng(6)).cast(
        Features({"input_ids": List(Value("int64")), "labels": List(Value("int32"))}))
    packed = pack_dataset(DatasetDict(a=documents, b=documents.select(range(10))), 20)
    features = packed["a"].features
    assert features["input_ids"].feature.dtype == "int64" and features["labels"].feature.dtype == "int32"
    assert list(packed["b"]) == list(pack_dataset(documents.select(range(10)), 20))


def test_best_fit_at_its_edges():
    assert len(best_fit_decreasing([], 8).rows) == 1 and len(best_fit_decreasing([0, 0], 8).starts) == 0
    assert best_fit_decreasing([8, 8], 8).rows.tolist() == [0, 1, 2]
    assert best_fit_decreasing([1] * 8, 8).rows.tolist() == [0, 8]
    assert list(pack_dataset(dataset(input_ids=[[], [1]]), 4)) == [dict(input_ids=[1], seq_lengths=[1])]
