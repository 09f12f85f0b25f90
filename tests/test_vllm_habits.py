"""What people do to vLLM: interrupts, two engines, closed ones, two trainings on one server, unusual models."""
import gc
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma2Config, GPTNeoXConfig, MixtralConfig, Qwen3Config, Qwen3MoeConfig

from posttrain import pocket
from posttrain.pocket.checkpoint import prompt_ids
from posttrain.rollout.sampling import Sampling
from posttrain.rollout.server_requests import ServerRequests
from posttrain.rollout.vllm import VLLMEngine, engine_weights, positions
from posttrain.rollout.vllm_colocated import VLLMColocated
from posttrain.rollout.vllm_serve import serve
from posttrain.rollout.vllm_server import VLLMServer, address, own
from test_vllm import SAMPLING, moved, needs_vllm, worst

ADDRESS = "http://127.0.0.1:1234"


@pytest.fixture(scope="module")
def start():
    return pocket.start("reverse")


@pytest.fixture(scope="module")
def prompts(start):
    return [prompt_ids(start[1], row["prompt"]) for row in pocket.dataset("reverse", "prompt_only", n=6)]


@needs_vllm
def test_interrupts_a_second_engine_and_closing(start, prompts, monkeypatch):
    model, tokenizer = start
    first = VLLMColocated(model, tokenizer, max_model_len=256)
    expected = first.sample(prompts, list(range(6)), SAMPLING)
    steps, engine = [], first.llm.llm_engine
    def interrupted(step=engine.step):
        steps.append(1)
        if len(steps) == 3: raise KeyboardInterrupt
        return step()
    monkeypatch.setattr(engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt): first.sample(prompts * 4, list(range(24)), SAMPLING)
    # nothing of it is left: not in the next answer, and the weights can change
    assert first.sample(prompts, list(range(6)), SAMPLING).completion_ids == expected.completion_ids
    first.sync(model)

    second = VLLMColocated(model, tokenizer, max_model_len=256)
    assert second.sample(prompts, list(range(6)), SAMPLING).completion_ids == expected.completion_ids
    second.close()
    second.close()
    assert first.sample(prompts, list(range(6)), SAMPLING).completion_ids == expected.completion_ids
    first.sync(moved(pocket.start("reverse")[0]))
    for use in (lambda: second.sample(prompts, list(range(6)), SAMPLING), lambda: second.sync(model)):
        with pytest.raises(RuntimeError, match="was closed"): use()
    second.sleep()
    first.close()
    third = VLLMColocated(model, tokenizer, max_model_len=256)  # after the last one was closed
    assert third.sample(prompts, list(range(6)), SAMPLING).completion_ids == expected.completion_ids
    third.close()


def tiny(config): return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


SMALL = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
             max_position_embeddings=256, eos_token_id=1, pad_token_id=0, bos_token_id=2)
HEADS = dict(num_key_value_heads=1, head_dim=32)


@needs_vllm
def test_a_model_without_an_output_layer_of_its_own():
    torch.manual_seed(0)
    model = tiny(Gemma2Config(**SMALL, **HEADS, sliding_window=64, attn_implementation="eager"))
    engine = VLLMColocated(model, max_model_len=128)
    try:
        prompts = [[5, 9, 13, 7], [11, 6]] * 2
        engine.sync(moved(model))
        assert worst(model, prompts, engine.sample(prompts, [0, 1, 2, 3], SAMPLING)) < 1e-3
    finally: engine.close()


@needs_vllm
def test_prompts_longer_than_what_is_read_at_a_time(start):
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(7, 30, (300,), generator=generator).tolist() for _ in range(32)]
    answers = []
    for most in ({}, dict(max_num_batched_tokens=16384)):
        engine = VLLMColocated(start[0], max_model_len=512, **most)
        answers.append(engine.sample(prompts, list(range(32)), Sampling(max_tokens=8)).completion_ids)
        engine.close()
    assert len(answers[0]) == 32 and answers[0] == answers[1]


@needs_vllm
def test_a_model_that_vllm_runs_with_transformers_classes():
    small = {name: value for name, value in SMALL.items() if name != "pad_token_id"}
    model = tiny(GPTNeoXConfig(**small))
    with pytest.raises(ValueError, match="GPTNeoXForCausalLM.*vllm_mode='server'"): VLLMColocated(model)
    assert model(torch.tensor([[5, 6]])).logits.shape == (1, 2, 64)
    mixture = tiny(MixtralConfig(**SMALL, **HEADS, num_local_experts=4))
    with pytest.raises(ValueError, match="CPU build does not take new weights of the experts"): VLLMColocated(mixture)


@needs_vllm
def test_trainable_tokens_are_merged_on_the_way(start, prompts):
    from peft import LoraConfig, get_peft_model
    model = pocket.model(seed=0, tie_word_embeddings=False)
    lora = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 6]))
    with torch.no_grad():
        for name, p in lora.named_parameters():
            if "lora_B" in name or "trainable_tokens" in name: p.add_(.1 * torch.randn_like(p))
    engine = VLLMColocated(lora, start[1], max_model_len=256)
    try: assert worst(lora, prompts, engine.sample(prompts, list(range(6)), SAMPLING)) < 1e-4
    finally: engine.close()


# ---------------------------------------------------------------- without an engine
@pytest.mark.parametrize("config", [
    Qwen3MoeConfig(**SMALL, **HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    MixtralConfig(**SMALL, **HEADS, num_local_experts=4),
    Qwen3Config(**SMALL, **HEADS),
], ids=lambda config: config.model_type)
def test_what_is_sent_is_what_a_checkpoint_holds(config, tmp_path):
    model = tiny(config)
    model.save_pretrained(tmp_path)
    stored, sent = load_file(tmp_path / "model.safetensors"), dict(engine_weights(model))
    assert set(stored) == set(sent)
    assert all(torch.equal(stored[name], tensor) for name, tensor in sent.items())


def test_a_layer_that_the_engine_lacks_is_not_sent():
    names = dict(engine_weights(tiny(Gemma2Config(**SMALL, **HEADS))))
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names


def test_one_training_per_server():
    """Other processes are refused as long as this one has a client; in this one the last to send weights may sample."""
    asks = [sys.executable, "-c", f"from posttrain.rollout.vllm_server import own; own({ADDRESS!r}); print('mine')"]
    def another(): return subprocess.run(asks, capture_output=True, text=True, timeout=120)
    mark = own(ADDRESS)
    assert own(ADDRESS) is mark
    refused = another()
    assert refused.returncode and f"used by another training (process {os.getpid()})" in refused.stderr
    del mark
    gc.collect()
    assert another().stdout == "mine\n"


def client(**fields):
    "A client that never met its server."
    server = object.__new__(VLLMServer)
    vars(server).update(server=ServerRequests(ADDRESS, 1.0), tokenizer=None, eos=[1], name="m", **fields)
    return server


def test_the_last_one_to_send_weights_may_sample():
    mark = own(ADDRESS)
    first, second = client(owner=mark), client(owner=mark)
    mark.last = lambda: second
    with pytest.raises(RuntimeError, match="another trainer of this process has sent its weights"):
        first.complete([[5]], [0], SAMPLING)


def test_a_server_that_was_restarted_otherwise(monkeypatch):
    then = {"model": "m", "dtype": "torch.float32", "logprobs_mode": "processed_logprobs"}
    server = client(owner=None, started_with=then)
    monkeypatch.setattr(VLLMServer, "_settings", lambda self: {**then, "logprobs_mode": "raw_logprobs"})
    with pytest.raises(RuntimeError, match="logprobs_mode was processed_logprobs and is raw_logprobs"):
        server._send({})


@pytest.mark.parametrize("name, there", [("head_dim", 64), ("num_key_value_heads", 3), ("num_attention_heads", 9),
                                         ("tie_word_embeddings", False)])
def test_another_shape_is_refused_before_weights_are_sent(name, there, start):
    theirs = {**start[0].config.to_dict(), name: there}
    with pytest.raises(RuntimeError, match=f"{name} is .* here and {there} there"):
        client()._check_model(start[0], theirs)
    client()._check_model(start[0], start[0].config.to_dict())


def test_a_port_that_is_taken(start, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        with pytest.raises(RuntimeError, match=f"port {s.getsockname()[1]} is taken"):
            with serve(tmp_path, port=s.getsockname()[1]): pass


def test_addresses():
    assert address("::1", 8000) == "http://[::1]:8000" and address("localhost", 1) == "http://localhost:1"
    with pytest.raises(ValueError, match="leave /v1 out"): ServerRequests("http://127.0.0.1:8000/v1", 1.0)


class Short(VLLMEngine):
    tokenizer, max_model_len, mode = None, 20, "processed_logprobs"


def test_what_vllm_would_do_in_silence():
    with pytest.raises(ValueError, match="temperature=0.005: vLLM takes 0.01"):
        Short().sample([[5]], [0], Sampling(max_tokens=4, temperature=.005))
    with pytest.raises(ValueError, match="vllm_max_model_length"): Short().sample([[5] * 10], [0], SAMPLING)


def test_how_many_tokens_a_model_can_read():
    from transformers import BloomConfig
    assert positions(pocket.model().config) == pocket.model().config.max_position_embeddings
    assert positions(BloomConfig(seq_length=77)) == 77
    with pytest.raises(ValueError, match="vllm_max_model_length"): positions(BloomConfig())


@needs_vllm
def test_prompts_must_fit_into_vllm_before_anything_runs(tmp_path):
    from posttrain import GRPOConfig, GRPOTrainer
    from posttrain.rollout.rewards import exact_match_reward
    model, tokenizer = pocket.start("reverse")
    args = GRPOConfig(tmp_path, use_vllm=True, vllm_max_model_length=20, max_completion_length=12, num_generations=2,
                      per_device_train_batch_size=2, report_to="none")
    rows = pocket.dataset("reverse", "prompt_only", n=4)
    with pytest.raises(ValueError, match="row [0-3]: the prompt has .* vllm_max_model_length=20 of vLLM"):
        GRPOTrainer(model, exact_match_reward, args, rows, processing_class=tokenizer)
