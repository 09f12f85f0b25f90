"""Our sampler against `transformers.generate`: tokens per second, float32 both.

    python benchmarks/sampling.py [--rounds 5] [--bf16]

Both make the same number of tokens: no EOS ends a completion. Both are first asked for greedy completions, which must
be equal."""
import argparse

import harness
import torch

from posttrain import pocket
from posttrain.rollout.generate_sampler import GenerateSampler
from posttrain.rollout.sampler import Sampler
from posttrain.rollout.sampling import Sampling

NEW = 48  # tokens of each completion
CASES = [  # model, prompts, completions of each, tokens of a prompt
    ("pocket", 1, 8, 16), ("pocket", 8, 8, 48), ("pocket", 64, 1, 32), ("10M, 32k vocabulary", 1, 8, 256),
    ("30M, 32k vocabulary", 1, 8, 256), ("30M, 32k vocabulary", 4, 8, 256),
]
MODELS = {"pocket": lambda: pocket.start("reverse")[0], "10M, 32k vocabulary": lambda: harness.qwen3(32_768, 256, 2),
          "30M, 32k vocabulary": lambda: harness.qwen3(32_768, 512, 4)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", default=";".join(MODELS), help="names, separated by ;")
    parser.add_argument("--bf16", action="store_true", help="also our sampler in bfloat16")
    args = parser.parse_args()
    print(harness.machine())
    print(f"\n{'tokens per second':44}{'generate':>10}{'ours':>9}   ours / generate"
          + ("       bfloat16   over generate" if args.bf16 else ""))
    for name, groups, size, length in CASES:
        if name not in args.models.split(";"): continue
        model = MODELS[name]().eval()
        engines = {"generate": GenerateSampler(model), "ours": Sampler(model)}
        if args.bf16: engines["bf16"] = Sampler(model, dtype=torch.bfloat16)
        for engine in engines.values(): engine.eos = []
        generator = torch.Generator().manual_seed(0)
        prompts = []
        for i in range(groups):
            ids = torch.randint(7, model.config.vocab_size, (length - i % 5,), generator=generator)
            prompts += [ids.tolist()] * size
        seeds = list(range(len(prompts)))
        exact = [e for k, e in engines.items() if k != "bf16"]
        greedy = [e.sample(prompts, seeds, Sampling(max_tokens=NEW, temperature=0.0)).completion_ids for e in exact]
        assert greedy[0] == greedy[1], f"{name}: greedy completions differ"
        def run(engine):
            def once():
                samples = engine.sample(prompts, seeds, Sampling(max_tokens=NEW))
                assert all(len(c) == NEW for c in samples.completion_ids)
            return once
        seconds = harness.interleaved({k: run(e) for k, e in engines.items()}, args.rounds)
        speed = {k: len(prompts) * NEW / harness.median(v) for k, v in seconds.items()}
        more = f"   {speed['bf16']:10.0f}   {harness.ratio(seconds, 'generate', 'bf16')}" if args.bf16 else ""
        print(f"{f'{name}, {groups} x {size}, prompt {length}':44}{speed['generate']:10.0f}{speed['ours']:9.0f} "
              f"  {harness.ratio(seconds, 'generate', 'ours'):20}{more}", flush=True)


if __name__ == "__main__":
    main()
