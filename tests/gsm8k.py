"""GSM8K (MIT licence) for tests: real text that is not part of this project."""
import json
import os
from pathlib import Path

from datasets import Dataset

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
MODEL_SOLUTIONS = "example_model_solutions"
MISSING = "GSM8K is not here"


def gsm8k_folder() -> Path:
    """POSTTRAIN_GSM8K, or a folder of data beside the checkout. It may not be there."""
    return Path(os.environ.get("POSTTRAIN_GSM8K") or SHARED / "data" / "gsm8k")


def has_gsm8k() -> bool:
    return all((gsm8k_folder() / f"{name}.jsonl").exists() for name in ("train", MODEL_SOLUTIONS))


def needs_gsm8k(test):
    """A test that is skipped where the data is not; marked as slow, since it trains on it."""
    import pytest
    reason = (f"{MISSING}: set POSTTRAIN_GSM8K to a folder with train.jsonl and {MODEL_SOLUTIONS}.jsonl "
              "(of github.com/openai/grade-school-math)")
    return pytest.mark.slow(pytest.mark.skipif(not has_gsm8k(), reason=reason)(test))


def may_be_missing(reason: str) -> bool:
    """Whether CI, too, may skip a test for this reason: there is no data, and no folder in which it should be."""
    return MISSING in reason and not SHARED.exists() and not os.environ.get("POSTTRAIN_GSM8K")


def read_rows(name: str, n: int | None = None) -> list[dict]:
    """The first n rows of one of the files."""
    file = gsm8k_folder() / f"{name}.jsonl"
    if not file.exists():
        raise FileNotFoundError(f"{file} is not there; set POSTTRAIN_GSM8K to a folder that has {file.name}")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:n]]


def gsm8k(split="train", n=None) -> Dataset:
    """Prompt-completion rows."""
    return Dataset.from_list([{"prompt": r["question"] + "\n", "completion": r["answer"]} for r in read_rows(split, n)])


def gsm8k_pairs(n=None) -> Dataset:
    """Preference rows: a right against a wrong solution of the same question, both written by models."""
    pairs = []
    for row in read_rows(MODEL_SOLUTIONS):
        solutions = [v for v in row.values() if isinstance(v, dict)]
        right, wrong = ([s["solution"] for s in solutions if s["is_correct"] is verdict] for verdict in (True, False))
        prompt = row["question"] + "\n"
        pairs += [{"prompt": prompt, "chosen": c, "rejected": r} for c in right for r in wrong]
    return Dataset.from_list(pairs[:n])


def bpe_tokenizer(rows, vocab_size=8192):
    """A byte-level BPE tokenizer trained on the rows' own text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<pad>", "<eos>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(("".join(r.values()) for r in rows), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def ten_million(vocab_size, seed=0):
    """A Qwen3 of about ten million parameters."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=vocab_size, hidden_size=256, intermediate_size=768, num_hidden_layers=9, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=True, pad_token_id=0,
        eos_token_id=1, bos_token_id=None))
