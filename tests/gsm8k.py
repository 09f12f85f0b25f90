"""GSM8K (MIT licence) for tests and benchmarks: real text that is not part of this project."""
import json
import os
from pathlib import Path

from datasets import Dataset

HERE = Path(__file__).resolve().parent.parent


def gsm8k(split="train", n=None) -> Dataset:
    """Prompt-completion rows, from POSTTRAIN_GSM8K, from a folder of data beside the checkout, or from the hub."""
    for folder in (os.environ.get("POSTTRAIN_GSM8K"), HERE.parent / "shared" / "data" / "gsm8k"):
        if folder and (file := Path(folder) / f"{split}.jsonl").exists():
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:n]]
            break
    else:
        from datasets import load_dataset
        rows = load_dataset("openai/gsm8k", "main", split=split)
        rows = rows.select(range(n or len(rows)))
    return Dataset.from_list([{"prompt": r["question"] + "\n", "completion": r["answer"]} for r in rows])


def gsm8k_pairs(n=None) -> Dataset:
    """Preference rows: a right against a wrong solution of the same question, both written by models (example_model_solutions.jsonl)."""
    folder = Path(os.environ.get("POSTTRAIN_GSM8K") or HERE.parent / "shared" / "data" / "gsm8k")
    name = "example_model_solutions.jsonl"
    if (file := folder / name).exists(): text = file.read_text(encoding="utf-8")
    else:
        from urllib.request import urlopen
        with urlopen("https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/" + name, timeout=60) as page: text = page.read().decode()
    pairs = []
    for line in text.splitlines():
        row = json.loads(line)
        solutions = [v for v in row.values() if isinstance(v, dict)]
        right, wrong = ([s["solution"] for s in solutions if s["is_correct"] is verdict] for verdict in (True, False))
        pairs += [{"prompt": row["question"] + "\n", "chosen": c, "rejected": r} for c in right for r in wrong]
    return Dataset.from_list(pairs[:n])


def bpe_tokenizer(rows, vocab_size=8192):
    """A byte-level BPE tokenizer trained on the rows' own text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.train_from_iterator(("".join(r.values()) for r in rows),
                             trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<pad>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def ten_million(vocab_size, seed=0):
    """A Qwen3 of about ten million parameters."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=vocab_size, hidden_size=256, intermediate_size=768, num_hidden_layers=9, num_attention_heads=8, num_key_value_heads=4,
                                        head_dim=32, max_position_embeddings=1024, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None))
