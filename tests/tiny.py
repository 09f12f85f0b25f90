"""Small real fast tokenizers, made by code: a byte-level BPE trained on a few lines, so that words merge as they do in
large ones. And the gradient of a small step, and what an adapter leaves as it was."""
import functools

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = """The sky is blue. The grass is green. What colour is the sky? It is blue, of course.
What is 2 + 3? The answer is 5. Natalia sold clips to 48 of her friends in April, and then she sold half as many in May.
She sold 48/2 = 24 clips in May. She sold 48+24 = 72 clips altogether in April and May. user assistant system tool
Naïve café, déjà vu: 你好，世界! <think> </think>"""
SPECIALS = ["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]


@functools.cache
def _core(vocab_size):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.train_from_iterator(TEXT.splitlines(),
                             trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIALS,
                                                 initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                                 show_progress=False))
    return core.to_str()


def tokenizer(chat_template=None, pad="<|pad|>", eos="<|im_end|>", bos=None, adds=None, vocab_size=420):
    "`adds` is what the tokenizer puts around a text by itself, such as '<s> $A' or '<s> $A </s>'."
    core = Tokenizer.from_str(_core(vocab_size))
    if adds:
        specials = [(t, core.token_to_id(t)) for t in ("<s>", "</s>")]
        core.post_processor = processors.TemplateProcessing(single=adds, special_tokens=specials)
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=pad, eos_token=eos, bos_token=bos)
    made.chat_template = chat_template
    return made


#: options of plain gradient descent with the learning rate 1: a step changes the weights by the gradient
SGD = dict(optim="sgd", learning_rate=1.0, max_grad_norm=1e9, max_steps=1, lr_scheduler_type="constant")


def gradients_of_step(trainer) -> tuple[dict, dict]:
    "With `SGD`: the gradient of each weight that learns, by its name, and what was logged."
    def learning(): return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    before = learning()
    trainer.train()
    return ({name: before[name] - weight for name, weight in learning().items()},
            next(row for row in trainer.state.log_history if "loss" in row))


def flat(weights: dict) -> torch.Tensor:
    "All of them in one vector."
    return torch.cat([weight.flatten() for weight in weights.values()])


def only_the_adapter_learned(trained, start):
    "Assert that a model in LoRA has the weights of its start below the adapter, and that the adapter has moved."
    start = dict(start.named_parameters())
    for name, p in trained.named_parameters():
        if "lora_" in name: continue
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(p, start[plain]), name
    assert any(p.abs().sum() > 0 for name, p in trained.named_parameters() if "lora_B" in name)
