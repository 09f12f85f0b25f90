"""Samplers beyond what their notebooks show: every family with adapters, odd groups, long completions, real
tokenizers; nothing that a batch does may reach a completion."""
import copy
import warnings

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import tiny
from posttrain.foundations.layouts import make_batch
from posttrain.rollout.decoder import CachedDecoder
from posttrain.rollout.generate_sampler import GenerateSampler
from posttrain.rollout.mixture import GeometricMixture
from posttrain.rollout.packed import pack
from posttrain.rollout.sampler import Sampler, make_sampler
from posttrain.rollout.sampling import Sampling, draw, eos_ids, filtered
from posttrain.rollout.weights import dense_weights
from posttrain.training.heads import attach_head, completion_logps

COMMON = dict(vocab_size=420, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=None)
MODELS = {
    "qwen3": lambda **kw: Qwen3ForCausalLM(
        Qwen3Config(**{**COMMON, "head_dim": 16, "tie_word_embeddings": True, **kw})),
    "qwen3 untied": lambda **kw: Qwen3ForCausalLM(
        Qwen3Config(**{**COMMON, "head_dim": 8, "num_key_value_heads": 1, **kw})),
    "qwen2": lambda **kw: Qwen2ForCausalLM(Qwen2Config(**{**COMMON, **kw})),
    "llama": lambda **kw: LlamaForCausalLM(LlamaConfig(**{**COMMON, **kw})),
    "llama yarn": lambda **kw: LlamaForCausalLM(
        LlamaConfig(**{**COMMON, "attention_bias": True,
                       "rope_parameters": dict(rope_type="yarn", rope_theta=1e4, factor=4.0,
                                               original_max_position_embeddings=64), **kw})),
    "gpt2": lambda **kw: GPT2LMHeadModel(GPT2Config(vocab_size=kw.get("vocab_size", 420), n_embd=32, n_layer=2,
                                                    n_head=4, n_positions=256, pad_token_id=0, eos_token_id=1,
                                                    bos_token_id=None)),}
LORA = {"gpt2": ["c_attn", "c_fc"]}


def shaken(name, **kw):
    """Random weights everywhere: fresh norms of ones and biases of zero would hide mistakes."""
    torch.manual_seed(0)
    model = MODELS[name](**kw).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.15 * torch.randn_like(p))
    return model


def adapted(name, **kw):
    from peft import LoraConfig, get_peft_model
    return get_peft_model(shaken(name),
                          LoraConfig(r=4, target_modules=LORA.get(name, ["q_proj", "v_proj", "down_proj"]),
                                     init_lora_weights=False, lora_dropout=0.1, fan_in_fan_out=name == "gpt2", **kw))


def groups(sizes, lengths, vocab=420):
    g = torch.Generator().manual_seed(3)
    return [p for n, length in zip(sizes, lengths)
            for p in [torch.randint(2, vocab, (length,), generator=g).tolist()] * n]


def by_generate(model, prompts, sampling):
    """transformers.generate, one prompt at a time without padding: the plainest there is. Equal prompts have equal
    answers."""
    said = {}
    for p in map(tuple, prompts):
        if p in said: continue
        ids = model.generate(input_ids=torch.tensor([p]), attention_mask=torch.ones(1, len(p), dtype=torch.long),
                             max_new_tokens=sampling.max_tokens, do_sample=False,
                             repetition_penalty=sampling.repetition_penalty)
        said[p] = ids[0, len(p):].tolist()
    return [said[tuple(p)] for p in prompts]


def difference(model, prompts, samples, temperature=1.0):
    logps = completion_logps(model, make_batch(prompts, samples.completion_ids),
                             temperature=temperature)["logps"].detach()
    pairs = zip(samples.sampled_logps, logps)
    return max((torch.tensor(own) - row[:len(own)]).abs().max().item() for own, row in pairs)


@pytest.mark.parametrize("lora, penalty", [(False, 1.3), (True, 1.0)], ids=["plain, penalty", "lora"])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_generate(name, lora, penalty):
    model = (adapted if lora else shaken)(name).eval()
    prompts, greedy = groups((3, 1, 2, 5), (3, 17, 1, 40)), Sampling(max_tokens=45, temperature=0.0,
                                                                     repetition_penalty=penalty)
    expected = by_generate(model, prompts, greedy)
    for engine in (Sampler(model), GenerateSampler(model)):
        samples = engine.sample(prompts, list(range(11)), greedy)
        assert samples.completion_ids == expected
        assert samples.finished == [c[-1] == 1 for c in expected]
        assert difference(model, prompts, samples) < 1e-4


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_sync_takes_new_weights(name):
    model = adapted(name)
    sampler, prompts, greedy = Sampler(model), groups((2, 1), (4, 9)), Sampling(max_tokens=12, temperature=0.0)
    old = sampler.sample(prompts, [0] * 3, greedy).completion_ids
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p.add_(0.3 * torch.randn_like(p))
    assert sampler.sample(prompts, [0] * 3, greedy).completion_ids == old
    changed = {n: p.clone() for n, p in model.state_dict().items()}
    sampler.sync(model)
    new = sampler.sample(prompts, [0] * 3, greedy).completion_ids
    assert new != old and new == by_generate(model.eval(), prompts, greedy)
    assert any(not torch.equal(before[n], changed[n])
               for n in before) and all(torch.equal(p, changed[n]) for n, p in model.state_dict().items())


def test_the_copy_shares_no_memory_with_the_trainer():
    for name in MODELS:
        model = shaken(name)
        sampler, prompts = Sampler(model), groups((2,), (5,))
        old = sampler.sample(prompts, [1, 2], Sampling(max_tokens=8))
        with torch.no_grad():
            for p in model.parameters(): p.zero_()
        assert sampler.sample(prompts, [1, 2], Sampling(max_tokens=8)) == old, name


@pytest.mark.parametrize("config", [dict(use_dora=True), dict(use_rslora=True), dict(modules_to_save=["lm_head"]),
                                    dict(target_modules=["q_proj", "lm_head", "embed_tokens"])], ids=str)
def test_dense_weights_of_adapters(config):
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(shaken("qwen3 untied"),
                           LoraConfig(**{**dict(r=4, target_modules=["q_proj"], init_lora_weights=False), **config}))
    if "modules_to_save" in config:
        with torch.no_grad(): model.base_model.model.lm_head.modules_to_save.default.weight.add_(1)
    dense = {n: p.clone() for n, p in dense_weights(model)}
    merged = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    assert dense.keys() == merged.keys() and all(torch.allclose(dense[n], merged[n], atol=1e-5) for n in merged)


def test_dense_weights_through_wrappers():
    model = shaken("qwen3")
    names = [n for n, _ in model.named_parameters()]
    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.module = inner
    assert [n for n, _ in dense_weights(Wrapped(attach_head(model)))] == names and "lm_head.weight" not in names
    # whoever reads them half way keeps his gradients
    for _, p in dense_weights(model): assert not p.requires_grad and torch.is_grad_enabled()


@pytest.mark.parametrize("how", [dict(), dict(top_k=20, temperature=1.3), dict(top_p=0.9, repetition_penalty=1.2),
                                 dict(min_p=0.02)], ids=str)
def test_a_completion_depends_on_its_prompt_and_seed_alone(how):
    model = shaken("qwen3")
    sampler, sampling = Sampler(model), Sampling(max_tokens=70, **how)  # past two growths of the cache
    sampler.eos = list(range(0, 420, 16))  # many ends, so that the grid shrinks often
    prompts, seeds = groups((9, 1, 2, 4), (3, 30, 8, 12)), list(range(100, 116))
    whole = sampler.sample(prompts, seeds, sampling)
    assert len({len(c) for c in whole.completion_ids}) > 5
    assert sampler.sample(prompts, seeds, sampling) == whole
    for part in ([0], [9], [15], [3, 4], range(8, 16), [15, 0, 11, 1], range(15, -1, -1)):
        some = sampler.sample([prompts[i] for i in part], [seeds[i] for i in part], sampling)
        assert some.completion_ids == [whole.completion_ids[i] for i in part]
        assert some.finished == [whole.finished[i] for i in part]
        for i, l in zip(part, some.sampled_logps):
            torch.testing.assert_close(torch.tensor(l), torch.tensor(whole.sampled_logps[i]), atol=1e-4, rtol=0)
    short = sampler.sample(prompts, seeds, Sampling(max_tokens=10, **how))
    assert short.completion_ids == [c[:10] for c in whole.completion_ids]


def test_retiring_saves_work(monkeypatch):
    sampler, widths, step = Sampler(shaken("qwen3")), [], CachedDecoder.step
    def counting(decoder, tokens):
        widths.append(len(tokens))
        return step(decoder, tokens)
    monkeypatch.setattr(CachedDecoder, "step", counting)
    sampler.eos = list(range(0, 420, 8))
    lengths = [len(c) for c in sampler.sample(groups((8, 8, 8), (3, 4, 5)), list(range(24)),
                                              Sampling(max_tokens=40)).completion_ids]
    assert len(widths) == max(lengths) - 1 and widths[0] <= 24 and widths[-1] <= 4 and widths == sorted(
        widths, reverse=True)
    assert sum(widths) < 2.5 * sum(lengths) < 24 * max(lengths)  # a grid wastes some, but not what padding wastes


def test_a_mixture_of_two_families():
    """One text, two caches: through growth and shrinking, with a penalty, and with rows that share a prompt."""
    first, second = shaken("qwen3"), shaken("gpt2")
    other = pack(second)
    sampler = Sampler(first, make_decoder=lambda w: GeometricMixture(CachedDecoder(w), CachedDecoder(other), 0.4))
    sampler.eos = list(range(0, 420, 32))
    prompts, seeds = groups((12, 1, 2, 1), (3, 30, 8, 12)), list(range(16))
    samples = sampler.sample(prompts, seeds, Sampling(max_tokens=70, temperature=0.8, repetition_penalty=1.2))
    assert len({len(c) for c in samples.completion_ids}) > 5 and max(map(len, samples.completion_ids)) > 33
    for prompt, completion, own in zip(prompts, samples.completion_ids, samples.sampled_logps):
        ids = torch.tensor([prompt + completion])
        with torch.no_grad(): p, q = (model(input_ids=ids).logits[0].log_softmax(-1) for model in (first, second))
        logps = ((0.6 * p + 0.4 * q) / 0.8).log_softmax(-1)[len(prompt) - 1:-1]
        expected = logps.gather(1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(own), expected, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="256 positions"):
        sampler.sample([[5] * 200], [0], Sampling(max_tokens=58))


def test_one_large_group_among_small_ones():
    sampler = Sampler(shaken("llama"))
    prompts = groups((40, *[1] * 20), (6, *range(1, 21)))
    whole = sampler.sample(prompts, list(range(60)), Sampling(max_tokens=6))
    alone = [sampler.sample([p], [i], Sampling(max_tokens=6)).completion_ids[0] for i, p in enumerate(prompts)]
    assert alone == whole.completion_ids


def test_processors_are_those_of_transformers():
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )
    logits, ids = 3 * torch.randn(16, 50), torch.randint(50, (16, 9))
    seen = torch.zeros(16, 50, dtype=torch.bool).scatter_(1, ids, True)
    sampling = Sampling(temperature=0.7, top_k=20, top_p=0.8, min_p=0.03, repetition_penalty=1.5)
    theirs = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.5), TemperatureLogitsWarper(0.7),
                                  TopKLogitsWarper(20), TopPLogitsWarper(0.8), MinPLogitsWarper(0.03)])(
                                      ids, logits.clone())
    torch.testing.assert_close(filtered(logits, sampling, seen), theirs)


def test_draws_are_exact_where_it_is_tight():
    probs = torch.zeros(3, 1000)
    probs[0, 999], probs[1, 0], probs[2, [7, 990]] = 1.0, 1.0, torch.tensor([1e-30, 0.5])
    for u in (0.0, 0.5, 1 - 2 ** -24):
        assert draw(probs, torch.full((3,), u)).tolist()[:2] == [999,
                                                                 0] and draw(probs, torch.full((3,), u))[2] in (7, 990)
    for size in (2, 151_936):
        big = torch.rand(500 if size == 2 else 8, size)  # of any sum, so of any rounding
        big[:, -1] = 0
        assert int(draw(big, torch.full((len(big),), 1 - 2 ** -24)).max()) < size - 1


def test_distribution_of_both_engines_over_two_tokens():
    """All 25 completions of two tokens, penalty included: chi-square against the model's own probabilities."""
    torch.manual_seed(2)
    model = Qwen3ForCausalLM(
        Qwen3Config(**{**COMMON, "vocab_size": 5, "hidden_size": 16, "head_dim": 8, "initializer_range": 0.5,
                       "eos_token_id": None, "pad_token_id": None})).eval()
    n, prompt = 8000, [3, 3, 1]
    for how in (dict(), dict(temperature=1.5, top_p=0.9), dict(repetition_penalty=1.4, min_p=0.05)):
        sampling = Sampling(max_tokens=2, **how)
        def after(texts):
            ids = torch.tensor(texts)
            seen = (torch.zeros(len(ids), 5, dtype=torch.bool).scatter_(1, ids, True)
                    if sampling.repetition_penalty != 1 else None)
            with torch.no_grad(): return filtered(model(input_ids=ids).logits[:, -1], sampling, seen).softmax(-1)
        expected = n * (after([prompt])[0][:, None] * after([prompt + [v] for v in range(5)])).flatten()
        possible = expected > 0
        k = int(possible.sum())
        assert k > 3
        for engine in (Sampler(model), GenerateSampler(model)):
            samples = engine.sample([prompt] * n, list(range(n)), sampling)
            counts = torch.bincount(torch.tensor([5 * a + b for a, b in samples.completion_ids]), minlength=25)
            assert counts[~possible].sum() == 0
            chi = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
            assert chi < k - 1 + 4 * (2 * (k - 1)) ** 0.5 + 4, (how, type(engine).__name__, float(chi), k)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("engine", [Sampler, GenerateSampler])
def test_sampled_logps_are_the_trainers(engine, temperature):
    model, prompts = adapted("qwen3").eval(), groups((4, 2), (6, 11))
    samples = engine(model).sample(prompts, list(range(6)),
                                   Sampling(max_tokens=30, temperature=temperature, top_k=10, repetition_penalty=1.1))
    assert difference(model, prompts, samples, temperature) < 1e-4


def test_generate_tells_no_logps_where_they_would_not_fit(monkeypatch):
    monkeypatch.setattr(GenerateSampler, "LOGITS_BYTES", 1000)
    assert GenerateSampler(shaken("llama")).sample([[5, 6]], [0], Sampling(max_tokens=3)).sampled_logps is None


def test_generate_ignores_the_models_own_settings():
    model = shaken("llama")
    plain = GenerateSampler(model).sample([[5, 6]] * 4, [1, 2, 3, 4], Sampling(max_tokens=9))
    model.generation_config.update(top_k=1, temperature=0.1, repetition_penalty=3.0, do_sample=False, max_length=4,
                                   no_repeat_ngram_size=1, suppress_tokens=list(range(2, 400)))
    own = model.generation_config
    assert GenerateSampler(model).sample([[5, 6]] * 4, [1, 2, 3, 4], Sampling(max_tokens=9)) == plain
    assert model.generation_config is own and own.top_k == 1


@pytest.mark.parametrize("engine", [Sampler, GenerateSampler])
def test_ends(engine):
    tokenizer = tiny.tokenizer()
    model = shaken("qwen3", vocab_size=448)  # padded beyond the tokenizer's vocabulary, as many are
    assert model.config.vocab_size > len(tokenizer)
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "</s>")]
    sampler = engine(model, tokenizer)
    assert set(sampler.eos) == set(eos_ids(model, tokenizer)) == {tokenizer.convert_tokens_to_ids(t)
                                                                  for t in ("<|im_end|>", "<|endoftext|>", "</s>")}
    sampler.eos = [*sampler.eos, 50, 60, 70, 80]
    prompts, seeds = groups((8, 8), (4, 7), len(tokenizer)), list(range(16))
    samples = sampler.sample(prompts, seeds, Sampling(max_tokens=60))
    assert any(samples.finished) and not all(samples.finished)
    for c, finished in zip(samples.completion_ids, samples.finished):
        assert finished == (c[-1] in sampler.eos) and (finished or len(c) == 60) and not set(c[:-1]) & set(sampler.eos)
    stops = ("e", "an", " 2", "sky")
    samples = sampler.sample(prompts, seeds, Sampling(max_tokens=60, stop=stops))
    ended_by_text = 0
    for c, finished in zip(samples.completion_ids, samples.finished):
        text = lambda ids: tokenizer.decode([i for i in ids if i < len(tokenizer)])
        here, before = (any(s in text(ids) for s in stops) for ids in (c, c[:-1]))
        assert not before and finished == (here or c[-1] in sampler.eos)
        ended_by_text += here
    assert ended_by_text >= 4
    first = next(i for i, c in enumerate(samples.completion_ids) if c[-1] not in sampler.eos and samples.finished[i])
    cut = sampler.sample(prompts, seeds, Sampling(max_tokens=len(samples.completion_ids[first]), stop=stops))
    # the text ends it exactly at the limit
    assert cut.completion_ids[first] == samples.completion_ids[first] and cut.finished[first]


@pytest.mark.parametrize("engine", [Sampler, GenerateSampler])
def test_model_and_random_state_are_left_alone(engine):
    model = adapted("llama").train()
    model.base_model.model.model.layers[0].eval()  # modes may be mixed
    modes, flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    weights, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
    sampler = engine(model)
    sampler.sync(model)
    first = sampler.sample([[5, 6]] * 3, [1, 2, 3], Sampling(max_tokens=9))
    assert torch.equal(torch.get_rng_state(), state), "sampling draws from generators of its own"
    torch.rand(7)
    # no global state goes in either, and no dropout
    assert sampler.sample([[5, 6]] * 3, [1, 2, 3], Sampling(max_tokens=9)) == first
    torch.set_rng_state(state)
    assert [m.training for m in model.modules()] == modes and [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights))
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()  # nothing of inference mode clings to it


@pytest.mark.parametrize("engine", [Sampler, GenerateSampler])
def test_errors_name_what_is_wrong(engine):
    sampler = engine(shaken("gpt2"))
    for prompts, seeds, how, words in [([[5], []], [0, 1], {}, "prompt 1 is empty"),
                                       ([[5]], [0, 1], {}, "1 prompts need as many seeds"),
                                       ([[5] * 300], [0], {}, "prompt 0 has 300 tokens"),
                                       ([[5] * 200], [0], dict(max_tokens=58), "256 positions"),
                                       ([[5]], [0], dict(stop="x"), "tokenizer")]:
        with pytest.raises(ValueError, match=words):
            sampler.sample(prompts, seeds, Sampling(**{**dict(max_tokens=4), **how}))
    # to the last position
    assert len(sampler.sample([[5] * 200], [0], Sampling(max_tokens=57, temperature=0.0)).completion_ids[0]) <= 57


def test_what_cannot_be_served_falls_back_and_says_why():
    model = shaken("qwen3")
    model.model.layers[1].mlp.act_fn = torch.nn.ReLU()
    with pytest.warns(UserWarning, match="logits differ"): sampler = make_sampler(model)
    assert type(sampler) is GenerateSampler
    assert sampler.sample([[5, 6]], [0],
                          Sampling(max_tokens=5, temperature=0.0)).completion_ids == by_generate(
                              model, [[5, 6]], Sampling(max_tokens=5))
    with pytest.raises(TypeError, match="logits differ"): make_sampler(model, kind="own")
    with pytest.raises(ValueError, match="kind='vllm'"): make_sampler(model, kind="vllm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(make_sampler(shaken("qwen3"))) is Sampler


@pytest.mark.parametrize("name", MODELS)
def test_half_precision(name):
    model, prompts = shaken(name), groups((4, 2), (6, 11))
    as_half = copy.deepcopy(model).to(torch.bfloat16)
    for sampler in (Sampler(as_half), Sampler(model, dtype=torch.bfloat16)):
        assert sampler.w.embed.dtype == torch.bfloat16
        samples = sampler.sample(prompts, list(range(6)), Sampling(max_tokens=20))
        assert difference(model, prompts, samples) < 1.0  # logits of some 20 are rounded to 3 digits
    assert Sampler(model).w.embed.dtype == torch.float32
