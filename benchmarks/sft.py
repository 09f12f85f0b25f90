"""SFT against TRL 1.16: whole training steps, peak memory, the head alone, and packing.

    python benchmarks/sft.py [--rounds 5] [--only steps,memory,head,packing]

Same model, same rows, same optimizer, float32, in one process. Both losses are compared before a time is believed.
"""
import argparse
import json
import tempfile
import time

import harness  # sets the environment before transformers is imported
import numpy as np
import torch
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM

from posttrain import pocket

STEPS = 4    # per round; the first is not counted
REPEATS = 3  # fresh processes for a peak of memory


def model(name):
    if name == "pocket": return pocket.model(seed=0)
    return harness.qwen3(32_768, 256, 2)  # 10 M parameters, most of them the vocabulary's


def rows(lengths, vocab):
    rng = np.random.default_rng(0)
    return Dataset.from_dict({"input_ids": [rng.integers(5, vocab, n).tolist() for n in lengths]})


def lengths(kind, scale):
    rng = np.random.default_rng(1)
    if kind == "equal lengths": return [scale] * 64
    if kind == "skewed lengths":
        return np.exp(rng.uniform(np.log(scale / 32), np.log(scale), 160)).astype(int).clip(4).tolist()
    return np.exp(rng.normal(np.log(scale / 6), .6, 1200)).astype(int).clip(4, scale).tolist()  # packed


WORK = {  # kind -> config
    "equal lengths": dict(per_device_train_batch_size=4),
    "skewed lengths": dict(per_device_train_batch_size=8),
    "packed": dict(per_device_train_batch_size=4, packing=True),
}
MODELS = {"pocket": 128, "10M, 32k vocabulary": 512}  # name -> longest row


def trainer(library, name, kind, folder):
    if library == "TRL":
        from trl import SFTConfig, SFTTrainer
    else:
        from posttrain import SFTConfig, SFTTrainer
    scale, m = MODELS[name], model(name)
    args = SFTConfig(folder, **WORK[kind], max_length=scale, use_cpu=True, bf16=False, gradient_checkpointing=False,
                     max_steps=STEPS, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
                     learning_rate=1e-4, train_sampling_strategy="sequential", seed=0)
    return harness.silence(SFTTrainer(m, args, train_dataset=rows(lengths(kind, scale), m.config.vocab_size),
                                      processing_class=pocket.tokenizer()))


def bench_steps(rounds):
    print(f"\n{'training step':44}{'TRL':>9}{'posttrain':>11}   TRL / posttrain")
    for name in MODELS:
        for kind in WORK:
            with tempfile.TemporaryDirectory() as folder:
                both = {lib: trainer(lib, name, kind, folder) for lib in ("TRL", "posttrain")}
                seconds = harness.interleaved({lib: harness.timed(t) for lib, t in both.items()}, rounds)
            first = [next(r["loss"] for r in t.state.log_history if "loss" in r) for t in both.values()]
            # packed rows may hold other documents
            assert kind == "packed" or abs(first[0] - first[1]) < 1e-3, f"different losses: {first}"
            harness.print_seconds(f"{name}, {kind}", seconds)


def memory_of(library, name, kind):
    return harness.memory_of_training(lambda folder: trainer(library, name, kind, folder))


def bench_memory():
    print(f"\n{'peak memory of training over the loaded model':46}{'TRL':>9}{'posttrain':>11}   TRL / posttrain")
    for kind in WORK:
        name = "10M, 32k vocabulary"
        mib = {lib: [harness.in_fresh_process(__file__, "train", lib, name, kind)["mib"] for _ in range(REPEATS)]
               for lib in ("TRL", "posttrain")}
        harness.print_memory(f"{name}, {kind}", mib)


# ---------------------------------------------------------------- the head alone
N, V, H = 2048, 32_768, 256


def head_inputs():
    torch.manual_seed(0)
    return torch.randn(N, H, requires_grad=True), (torch.randn(V, H) / 16).requires_grad_(), torch.randint(V, (N,))


def trl_head(h, w, y):
    """TRL's fused head as its SFTTrainer calls it, through a model that is nothing but a head."""
    from transformers.modeling_outputs import BaseModelOutputWithPast
    from trl.trainer.utils import add_fused_lm_head

    m = Qwen3ForCausalLM(Qwen3Config(vocab_size=V, hidden_size=H, intermediate_size=16, num_hidden_layers=1,
                                     num_attention_heads=1, num_key_value_heads=1, head_dim=16,
                                     tie_word_embeddings=False))
    m.lm_head.weight = torch.nn.Parameter(w.detach())
    state = torch.cat([h.detach(), torch.zeros(1, H)])[None].requires_grad_()  # it drops the last position

    class Backbone(torch.nn.Module):
        def forward(self, *a, **k): return BaseModelOutputWithPast(last_hidden_state=state)
    m.model, m.get_output_embeddings = Backbone(), lambda: m.lm_head
    add_fused_lm_head(m, outputs=("log_probs", "entropy", "is_top1"))
    labels = torch.cat([torch.full((1,), -100), y])[None]
    def run():
        out = m(input_ids=labels.clamp(min=0), labels=labels, fused_lm_head=True)
        loss = -out.log_probs.sum() / N
        loss.backward()
        state.grad = m.lm_head.weight.grad = None
        return loss.item()
    return run


def our_head(h, w, y):
    from posttrain.foundations.logps import linear_token_loss
    weights = torch.full((N,), 1 / N)
    def run():
        loss, _ = linear_token_loss(h, w, y, weights, torch.neg, want=("entropy", "is_top1"))
        loss.backward()
        h.grad = w.grad = None
        return loss.item()
    return run


def naive_head(h, w, y):
    def run():
        loss = -torch.log_softmax(h @ w.T, -1).gather(1, y[:, None]).mean()
        loss.backward()
        h.grad = w.grad = None
        return loss.item()
    return run


HEADS = {"naive": naive_head, "TRL": trl_head, "posttrain": our_head}


def head_memory(library):
    run = HEADS[library](*head_inputs())
    torch.randn(64, 64) @ torch.randn(64, 64)  # start the thread pool
    before = harness.current_mib()
    loss = run()
    return {"mib": harness.peak_mib() - before, "loss": loss}


def bench_head(rounds):
    label = f"head forward and backward, {N} x {V:,} (H {H})"
    print(f"\n{label:46}{'naive':>9}{'TRL':>9}{'posttrain':>11}   TRL / posttrain")
    runs = {name: make(*head_inputs()) for name, make in HEADS.items()}
    losses = {name: run() for name, run in runs.items()}
    assert max(losses.values()) - min(losses.values()) < 1e-3, losses
    def timed(run):
        def once():
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        return once
    seconds = harness.interleaved({n: timed(run) for n, run in runs.items()}, rounds)
    columns = "".join(f"{harness.median(seconds[n]):{w}.3f}s" for n, w in (("naive", 8), ("TRL", 8), ("posttrain", 10)))
    print(f"{'time':46}{columns}   {harness.ratio(seconds, 'TRL', 'posttrain')}")
    mib = {n: [harness.in_fresh_process(__file__, "head", n)["mib"] for _ in range(REPEATS)] for n in HEADS}
    columns = "".join(f"{harness.median(mib[n]):{w}.0f}MiB" for n, w in (("naive", 6), ("TRL", 6), ("posttrain", 8)))
    print(f"{'peak memory over its inputs':46}{columns}   {harness.ratio(mib, 'TRL', 'posttrain')}", flush=True)


# ---------------------------------------------------------------- packing
def bench_packing(rounds):
    import datasets
    from trl import pack_dataset as theirs

    from posttrain.data.packing import pack_dataset as ours
    datasets.disable_progress_bars()
    datasets.disable_caching()
    rng = np.random.default_rng(0)
    ids = [rng.integers(5, 30_000, int(n)).tolist() for n in np.exp(rng.normal(5, .8, 20_000)).clip(4, 2000)]
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    print(f"\n{'packing 20,000 rows to 1024':44}{'TRL':>9}{'posttrain':>11}   TRL / posttrain")
    for strategy in ("bfd", "bfd_split", "wrapped"):
        seconds = harness.interleaved({"TRL": lambda: theirs(data, 1024, strategy) and None,
                                       "posttrain": lambda: ours(data, 1024, strategy) and None}, rounds)
        harness.print_seconds(strategy, seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="steps,memory,head,packing")
    parser.add_argument("--memory", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        what, *rest = args.memory
        print(json.dumps({"train": memory_of, "head": head_memory}[what](*rest)))
        return
    print(harness.machine())
    only = args.only.split(",")
    if "steps" in only: bench_steps(args.rounds)
    if "memory" in only: bench_memory()
    if "head" in only: bench_head(args.rounds)
    if "packing" in only: bench_packing(args.rounds)


if __name__ == "__main__":
    main()
