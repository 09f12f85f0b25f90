"""Real vLLM: in this process and as a server. On CI it must be there; elsewhere its tests are skipped without it."""
import copy
import http.server
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from posttrain import pocket
from posttrain.foundations.layouts import make_batch
from posttrain.pocket.checkpoint import prompt_ids
from posttrain.rollout.sampling import Sampling
from posttrain.rollout.vllm import engine_weights, logprobs_mode_for, tells_logps
from posttrain.rollout.vllm_colocated import VLLMColocated
from posttrain.rollout.vllm_serve import serve
from posttrain.rollout.vllm_server import VLLMServer
from posttrain.training.heads import completion_logps

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None and not os.environ.get("CI"),
                                reason="vLLM is not installed")
SAMPLING = Sampling(max_tokens=16)


@pytest.fixture(scope="module")
def start():
    return pocket.start("reverse")


@pytest.fixture
def model(start):
    return copy.deepcopy(start[0])  # tests change weights


@pytest.fixture(scope="module")
def prompts(start):
    return [prompt_ids(start[1], row["prompt"]) for row in pocket.dataset("reverse", "prompt_only", n=6)
            for _ in range(4)]


@pytest.fixture(scope="module")
def colocated(start):
    engine = VLLMColocated(*start, max_model_len=256)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def served(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    for part in start: part.save_pretrained(folder)
    with serve(folder, dtype="float32", max_model_len=256, timeout=150) as served: yield served


@pytest.fixture(scope="module")
def server(start, served):
    return VLLMServer(*start, base_url=served.url, timeout=60)


@pytest.fixture(params=["colocated", "server"])
def engine(request, model):
    engine = request.getfixturevalue(request.param)
    engine.sync(model)  # whatever the test before left there
    return engine


def moved(model, scale=.05):
    "As an optimizer step does, only further."
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters(): p.add_(scale * p.abs().mean() * torch.randn_like(p))
    return model


def worst(model, prompts, samples, temperature=1.0):
    "The largest difference between the engine's log-prob of a token and the trainer's."
    batch = make_batch(prompts, samples.completion_ids)
    with torch.no_grad(): own = completion_logps(model, batch, temperature=temperature)["logps"]
    theirs = torch.zeros_like(own)
    for row, ids, logps in zip(theirs, samples.completion_ids, samples.sampled_logps):
        assert len(ids) == len(logps)
        row[:len(logps)] = torch.tensor(logps)
    return (own - theirs).abs().max().item()


@needs_vllm
def test_greedy_equals_generate(engine, model, prompts, start):
    got = engine.sample(prompts[::4], [0] * 6, Sampling(max_tokens=12, temperature=0))
    for prompt, ids in zip(prompts[::4], got.completion_ids):
        with torch.no_grad():
            out = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12,
                                 pad_token_id=start[1].pad_token_id)
        assert out[0, len(prompt):].tolist() == ids
    assert worst(model, prompts[::4], got) < 1e-4  # greedy: log-probs at temperature 1


@needs_vllm
@pytest.mark.parametrize("temperature", [1.0, .7, 1.5])
def test_logps_are_the_trainers(engine, model, prompts, temperature):
    got = engine.sample(prompts, list(range(24)), Sampling(max_tokens=16, temperature=temperature))
    assert worst(model, prompts, got, temperature) < 1e-4


@needs_vllm
def test_a_weight_update_arrives(engine, model, prompts):
    before = engine.sample(prompts, list(range(24)), SAMPLING)
    moved(model)
    assert worst(model, prompts, before) > .1
    engine.sync(model)
    # the same prompts: their cached keys and values must be forgotten
    after = engine.sample(prompts, list(range(24)), SAMPLING)
    assert worst(model, prompts, after) < 1e-4


@needs_vllm
def test_lora_is_merged_on_the_way(engine, model, prompts):
    from peft import LoraConfig, get_peft_model
    lora = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_alpha=16))
    plain = engine.sample(prompts, list(range(24)), SAMPLING)
    with torch.no_grad():
        for name, p in lora.named_parameters():
            if "lora_B" in name: p.normal_(0, .1)
    before = {n: p.clone() for n, p in lora.named_parameters()}
    assert worst(lora, prompts, plain) > .1
    engine.sync(lora)
    assert worst(lora, prompts, engine.sample(prompts, list(range(24)), SAMPLING)) < 1e-4
    assert all(torch.equal(p, before[n]) for n, p in lora.named_parameters())  # the trainer's model is as it was


@needs_vllm
def test_a_completion_depends_on_its_prompt_and_its_seed(engine, prompts):
    seeds = [7 * i + 2 ** 40 for i in range(24)]
    all_of_them = engine.sample(prompts, seeds, SAMPLING)
    again = engine.sample(prompts[::-1], seeds[::-1], SAMPLING)
    assert again.completion_ids[::-1] == all_of_them.completion_ids
    assert engine.sample(prompts[9:10], seeds[9:10], SAMPLING).completion_ids == all_of_them.completion_ids[9:10]
    assert len({tuple(ids) for ids in all_of_them.completion_ids}) > 8  # and different seeds, different completions


@needs_vllm
def test_the_sampled_distribution(engine, model, prompts):
    "First tokens of 600 completions of one prompt against the model's probabilities, within 4.5 standard errors each."
    n = 600
    got = engine.sample([prompts[0]] * n, list(range(n)), Sampling(max_tokens=1, temperature=1.5))
    with torch.no_grad(): p = (model(torch.tensor([prompts[0]])).logits[0, -1] / 1.5).softmax(-1)
    counts = torch.bincount(torch.tensor([ids[0] for ids in got.completion_ids]), minlength=len(p)) / n
    assert ((counts - p).abs() < 4.5 * (p * (1 - p) / n).sqrt() + 3 / n).all()


@needs_vllm
def test_ends(engine, prompts, start):
    tokenizer = start[1]
    whole = engine.sample(prompts, list(range(24)), SAMPLING)
    ended = [ids for ids, done in zip(whole.completion_ids, whole.finished) if done]
    assert ended and all(ids[-1] == tokenizer.eos_token_id for ids in ended)
    cut = engine.sample(prompts, list(range(24)), Sampling(max_tokens=2))
    for ids, done in zip(cut.completion_ids, cut.finished):
        assert tokenizer.eos_token_id in ids or (len(ids) == 2 and not done)
    assert [ids[:2] for ids in whole.completion_ids] == cut.completion_ids
    stopped = engine.sample(prompts, list(range(24)), Sampling(max_tokens=16, stop=("2", "78")))
    for ids, logps, done, full in zip(stopped.completion_ids, stopped.sampled_logps, stopped.finished,
                                      whole.completion_ids):
        ends = [t for t in range(1, len(full) + 1) if tokenizer.decode(full[:t]).endswith(("2", "78"))]
        assert ids == full[:ends[0] if ends else len(full)] and done and len(logps) == len(ids)
    assert any(ids[-1] != tokenizer.eos_token_id for ids in stopped.completion_ids)


@needs_vllm
def test_no_log_prob_rather_than_a_wrong_one(engine, prompts):
    engine.warned = False
    with pytest.warns(UserWarning, match="processed_logprobs.*logprobs_mode=raw_logprobs"):
        filtered = engine.sample(prompts[:2], [0, 1], Sampling(max_tokens=4, top_p=.9))
    assert filtered.sampled_logps is None and len(filtered.completion_ids) == 2


@needs_vllm
@pytest.mark.parametrize("prompts, sampling, said", [
    ([[]], SAMPLING, "prompt 0 is empty"), ([[9] * 250], SAMPLING, "250 tokens"),
    ([[9], [9]], SAMPLING, "as many seeds")])
def test_prompts_are_checked(engine, prompts, sampling, said):
    with pytest.raises(ValueError, match=said): engine.sample(prompts, [0], sampling)


@needs_vllm
def test_no_prompts(engine):
    assert engine.sample([], [], SAMPLING).completion_ids == []


@needs_vllm
@pytest.mark.distributed
def test_each_process_has_an_engine(tmp_path):
    "Two processes train together; each samples its own prompts, from weights that are the same."
    script = tmp_path / "two.py"
    script.write_text("""
import torch
from accelerate import PartialState
state = PartialState(cpu=True)
from posttrain import pocket
from posttrain.foundations.layouts import make_batch
from posttrain.rollout.sampling import Sampling
from posttrain.rollout.vllm_colocated import VLLMColocated
from posttrain.training.heads import completion_logps
model = pocket.model()
rank, trained = torch.distributed.get_rank(), torch.nn.parallel.DistributedDataParallel(model)
engine = VLLMColocated(trained, pocket.tokenizer(), max_model_len=64)
with torch.no_grad():
    for p in model.parameters(): p.add_(.02)
engine.sync(trained)
prompts = [[9, 10, 11 + rank]] * (2 + rank)
got = engine.sample(prompts, list(range(2 + rank)), Sampling(max_tokens=4 + rank))
batch = make_batch(prompts, got.completion_ids)
own = completion_logps(model, batch)["logps"][batch["mask"].bool()]
flat = torch.tensor([x for row in got.sampled_logps for x in row])
assert (own - flat).abs().max() < 1e-4
torch.distributed.barrier()
engine.close()
assert torch.distributed.is_initialized()  # it was there before vLLM
print("agreed", rank)
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150,
                          env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0 and "agreed 0" in done.stdout and "agreed 1" in done.stdout, done.stderr[-3000:]


@needs_vllm
def test_filters_at_temperature_one_have_raw_log_probs(model, start, prompts):
    """In a process of its own, an untied model in bfloat16 with an engine started for filtered sampling; its random
    numbers stay the trainer's."""
    code = """
import torch, warnings
warnings.simplefilter("error", UserWarning)
from posttrain import pocket
from posttrain.rollout.sampling import Sampling
from posttrain.rollout.vllm import logprobs_mode_for
from posttrain.rollout.vllm_colocated import VLLMColocated
from posttrain.foundations.layouts import make_batch
from posttrain.training.heads import completion_logps
s, tokenizer = Sampling(max_tokens=8, top_p=.8, top_k=20), pocket.tokenizer()
model = pocket.model(seed=3, tie_word_embeddings=False)
torch.manual_seed(5); expected = torch.rand(3); torch.manual_seed(5)
engine = VLLMColocated(model, tokenizer, logprobs_mode=logprobs_mode_for(s))
prompts = [[9, 10, 11 + i] for i in range(8)]
got = engine.sample(prompts, list(range(8)), s)
assert torch.equal(torch.rand(3), expected)
batch = make_batch(prompts, got.completion_ids)
own = completion_logps(model, batch)["logps"]
flat = torch.tensor([x for row in got.sampled_logps for x in row])
assert (own[batch["mask"].bool()] - flat).abs().max() < 1e-4
engine.close()
assert not torch.distributed.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


# ---------------------------------------------------------------- without vLLM
def test_which_log_probs():
    cases = {Sampling(): (True, True), Sampling(temperature=0): (True, True), Sampling(temperature=.5): (False, True),
             Sampling(top_k=5): (True, False), Sampling(min_p=.1): (True, False),
             Sampling(repetition_penalty=1.1): (True, False), Sampling(temperature=.5, top_p=.9): (False, False)}
    for sampling, (raw, processed) in cases.items():
        assert (tells_logps("raw_logprobs", sampling), tells_logps("processed_logprobs", sampling)) == (raw, processed)
        assert tells_logps(logprobs_mode_for(sampling), sampling) == (raw or processed)


def test_the_tied_output_layer_is_sent():
    tied, untied = pocket.model(), pocket.model(tie_word_embeddings=False)
    assert dict(engine_weights(tied))["lm_head.weight"] is tied.model.embed_tokens.weight or torch.equal(
        dict(engine_weights(tied))["lm_head.weight"], tied.model.embed_tokens.weight)
    names = [name for name, _ in engine_weights(untied)]
    assert len(names) == len(set(names)) == len(list(untied.parameters()))


def test_missing_vllm(monkeypatch, start):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install posttrain\[vllm\]"): VLLMColocated(*start)
    with pytest.raises(ImportError, match="vllm_cpu.py"):
        with serve("anything"): pass


def test_tensor_parallel_needs_a_server(start, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ValueError, match="vllm serve --tensor-parallel-size 2"):
        VLLMColocated(*start, tensor_parallel_size=2)


# ---------------------------------------------------------------- a student that learns from a teacher
DISTILS = """
import sys, torch
from contextlib import nullcontext
from posttrain import pocket
from posttrain.distillation.gkd_trainer import GKDConfig, GKDTrainer
from posttrain.rollout.vllm_serve import serve
from posttrain.training.heads import completion_logps
mode, folder = sys.argv[1:]
path = pocket.start_path("reverse", steps=130)
with serve(path, dtype="float32", max_model_len=64) if mode == "server" else nullcontext() as server:
    where = dict(vllm_server_base_url=server.url) if server else dict(vllm_max_model_length=64)
    args = GKDConfig(folder, max_steps=4, per_device_train_batch_size=16, max_completion_length=12, learning_rate=1e-3,
                     warmup_steps=0, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
                     use_cpu=True, use_vllm=True, vllm_mode=mode, **where)
    rows = pocket.dataset("reverse", "prompt_completion", n=64)
    trainer = GKDTrainer(pocket.start("reverse", steps=130)[0], pocket.start("reverse")[0], args, train_dataset=rows,
                         processing_class=pocket.tokenizer())
    trainer.train()
    log = [row for row in trainer.state.log_history if "loss" in row]
    assert {row["on_policy"] for row in log} == {0, 1} and all(row["loss"] > 0 for row in log)
    trainer.source = "student"
    trainer.sync_engines()
    generation = trainer.sample([rows[0]] * 8, list(range(8)))
    batch = generation.batch()
    print("GAP", ((completion_logps(trainer.model, batch, temperature=.9)["logps"].detach() - batch["sampled_logps"])
                  * batch["mask"]).abs().max().item())
    trainer.engine.close()
"""


@needs_vllm
@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_a_student_writes_with_the_weights_of_now(mode, tmp_path):
    "GKD, whose generations come from the student or from the dataset by turns."
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", DISTILS, mode, str(tmp_path)], capture_output=True,
                          text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    gaps = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("GAP")]
    assert gaps and float(gaps[0]) < 1e-3, done.stdout[-2000:] + done.stderr[-3000:]


# ---------------------------------------------------------------- a judge behind a server
@needs_vllm
def test_an_llm_judge_asks_vllm(server, served, start):
    """The verdict on two pairs is that of the model's own log-probs of A and B, asked in both orders. A bias makes both
    letters likely, so that the server's first five tokens hold them; it cancels between the two."""
    import httpx

    from posttrain import LLMJudge
    from posttrain.rollout.verdicts import Verdicts
    model, tokenizer = start
    server.sync(model)  # whatever the test before left there
    name = httpx.get(f"{served.url}/v1/models").json()["data"][0]["id"]
    a, b = (tokenizer(letter)["input_ids"][0] for letter in "AB")
    judge = LLMJudge(name, f"{served.url}/v1", instruction="say A or B", question="{prompt} A {first} B {second}",
                     extra_body={"logit_bias": {str(a): 20, str(b): 20}, "max_tokens": 1})
    def by_hand(first, second):
        messages = judge.body("1+1=", first, second)["messages"]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        with torch.no_grad(): logits = model(torch.tensor([ids])).logits[0, -1]
        return (logits[a] - logits[b]).sigmoid().item()
    answers = ["2", "3", "11", "one"]
    verdicts = Verdicts(judge)(["1+1="] * 4, answers)
    for i in (0, 2):
        expected = (by_hand(*answers[i:i + 2]) + 1 - by_hand(answers[i + 1], answers[i])) / 2
        assert abs(verdicts[i] - expected) < 1e-3 and verdicts[i + 1] == 1 - verdicts[i]


# ---------------------------------------------------------------- servers that fail
class Bad:
    "A server that answers as told: path -> object, text, a status, or 'hang'."

    def __init__(self, answers):
        self.over = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                answer = answers.get(self.path.split("?")[0], 404)
                if answer == "hang":
                    outer.over.wait(30)
                    return
                if answer == "drip":  # a header, and then a byte now and then
                    self.send_response(200)
                    self.end_headers()
                    while not outer.over.wait(.2):
                        try: self.wfile.write(b" ")
                        except OSError: return
                    return
                body = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
                self.send_response(answer if isinstance(answer, int) else 200)
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self):
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.do_GET()

            def log_message(self, *args): pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.over.set()
        self.server.shutdown(), self.server.server_close()


def connect(start, url, timeout=1.0):
    begin = time.monotonic()
    try: VLLMServer(start[0], None, base_url=url, timeout=timeout)
    except (RuntimeError, TimeoutError) as e: return e, time.monotonic() - begin
    raise AssertionError("a bad server was taken for good")


MODELS = {"data": [{"id": "m", "max_model_len": 256}]}
INFO = {
    "vllm_config": {"model_config": {"model": "/nowhere/at/all", "dtype": "torch.float32",
                                     "logprobs_mode": "processed_logprobs"}}}
def choice(logps):
    "A completion of one token with these log-probs."
    return {"token_ids": [5], "logprobs": {"token_logprobs": logps}, "finish_reason": "stop"}


GOOD = {"/health": "", "/v1/models": MODELS, "/server_info": INFO, "/collective_rpc": {"results": [None]},
        "/reset_prefix_cache": {"success": True}}


@pytest.mark.parametrize("answers, kind, said", [
    ({"/health": "hang"}, TimeoutError, "VLLM_SERVER_DEV_MODE=1 vllm serve"),
    ({"/health": 500}, TimeoutError, "500"),
    ({"/v1/models": "<html>"}, RuntimeError, "makes no sense when asked for its models"),
    ({"/v1/models": {"data": []}}, RuntimeError, "makes no sense when asked for its models"),
    ({"/v1/models": "hang"}, TimeoutError, "no answer for 1 s when asked for its models"),
    ({"/server_info": 404}, RuntimeError, "VLLM_SERVER_DEV_MODE=1"),
    ({"/collective_rpc": 500}, RuntimeError, "a weight update.*500"),
    ({"/collective_rpc": "drip"}, TimeoutError, "no answer for 1 s when asked for a weight update"),
    ({"/reset_prefix_cache": {"success": False}}, RuntimeError, "prefix cache"),
    ({"/v1/completions": "hang"}, TimeoutError, "no answer for 1 s when asked for 2 completions"),
    ({"/v1/completions": "drip"}, TimeoutError, "no answer for 1 s when asked for 2 completions"),
    ({"/v1/completions": "nonsense"}, RuntimeError, "makes no sense"),
    ({"/v1/completions": {"choices": []}}, RuntimeError, "makes no sense"),
    ({"/v1/completions": {"choices": [choice([-.1, -.2])]}}, RuntimeError, "1 tokens with 2 log-probs"),
    ({"/v1/completions": {"choices": [choice([-30.0])]}}, RuntimeError, "disagrees with the trainer"),
])
def test_a_server_that_fails(start, answers, kind, said):
    import re
    with Bad(GOOD | answers) as bad:
        error, seconds = connect(start, bad.url)
        assert type(error) is kind and re.search(said, str(error)), f"{type(error).__name__}: {error}"
        assert bad.url in str(error) and seconds < 4
        if "asked for" in said or "weight update" in said: assert "resume_from_checkpoint=True" in str(error)


def test_nobody_there(start):
    error, seconds = connect(start, "http://127.0.0.1:9", timeout=.5)
    assert type(error) is TimeoutError and "127.0.0.1:9" in str(error) and seconds < 2
    with pytest.raises(ValueError, match="base_url='https"): VLLMServer(*start, base_url="https://127.0.0.1:1")


@needs_vllm
def test_an_adapter_on_the_tied_output_layer(model, start, served, prompts):
    "Embedding and output layer become two matrices: an engine of our own knows, a server that has one cannot."
    from peft import LoraConfig, get_peft_model
    lora = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "lm_head"], lora_alpha=16))
    with pytest.raises(RuntimeError, match="tie_word_embeddings=False"):
        VLLMServer(lora, start[1], base_url=served.url, timeout=20)
    engine = VLLMColocated(lora, start[1], max_model_len=256)
    try:
        with torch.no_grad():
            for name, p in lora.named_parameters():
                if "lora_B" in name: p.normal_(0, .1)
        engine.sync(lora)
        assert worst(lora, prompts, engine.sample(prompts, list(range(24)), SAMPLING)) < 1e-4
    finally: engine.close()


@needs_vllm
def test_a_model_that_does_not_come_up(tmp_path):
    with pytest.raises(RuntimeError, match="Its log ends"):
        with serve(tmp_path / "nothing", timeout=100): pass


@needs_vllm
def test_a_server_ends_with_the_process_that_started_it(start, tmp_path):
    "Killed with -9, which leaves no time to clean up; while the server is still coming up."
    code = """
import sys, time
from posttrain.rollout import vllm_serve as vllm
vllm._well = lambda port: True
with vllm.serve(sys.argv[1], max_model_len=64) as served:
    print(served.process.pid, flush=True)
    time.sleep(600)
"""
    start[0].save_pretrained(tmp_path); start[1].save_pretrained(tmp_path)
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    os.kill(pid, 0)  # it is there
    parent.kill(); parent.wait()
    end = time.monotonic() + 30
    def there():
        # nobody may be there to reap it
        try: return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except FileNotFoundError: return False
    while there():
        assert time.monotonic() < end, "it goes on without its parent"
        time.sleep(.1)


@needs_vllm
def test_another_model_than_the_trainers(start, served):
    with pytest.raises(RuntimeError, match="hidden_size is 32 here and 64 there"):
        VLLMServer(pocket.model(hidden_size=32), start[1], base_url=served.url, timeout=20)
    from tiny import tokenizer
    with pytest.raises(RuntimeError, match="whose tokenizer is another"):
        VLLMServer(start[0], tokenizer(), base_url=served.url, timeout=20)


@needs_vllm
def test_zz_a_server_that_hangs_then_dies(start, served, prompts):
    "The last one that uses the server."
    server = VLLMServer(*start, base_url=served.url, timeout=20)
    for how, kind in [(signal.SIGSTOP, TimeoutError), (signal.SIGKILL, RuntimeError)]:
        server.timeout = 20  # however busy the machine is, it is well
        server.sample(prompts, list(range(24)), SAMPLING)
        server.timeout = 2
        begin = time.monotonic()
        threading.Timer(.05, lambda: os.killpg(served.process.pid, how)).start()  # in the middle of it
        with pytest.raises(kind, match=f"{served.url}.*resume_from_checkpoint"):
            for _ in range(200): server.sample(prompts, list(range(24)), SAMPLING)
        assert time.monotonic() - begin < 2 + 3
        if how == signal.SIGSTOP: os.killpg(served.process.pid, signal.SIGCONT)
    with pytest.raises(RuntimeError, match="its settings"): server.sync(start[0])
