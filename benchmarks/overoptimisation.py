"""Every run of the lesson on over-optimisation, nbs/reward/06_overoptimisation.ipynb, which makes a part of them.

    python benchmarks/overoptimisation.py           all runs, into benchmarks/overoptimisation.json
    python benchmarks/overoptimisation.py --pack    from that file into a cell of nbs/explore/20_goodhart.ipynb

Three draws of pairs (seeds 1, 2 and 3), reward models of three sizes: one on 200 pairs, one on 2,000, and three on the
same 200 combined in two ways. Each is optimised by best-of-n and by RLOO with two prices of a nat. It takes about
15 CPU minutes on one core. Draws that the file has already are kept; delete it to make all of them anew.
"""
import argparse
import base64
import json
import textwrap
import time
import zlib
from pathlib import Path

import datasets
import torch
import transformers

from posttrain import pocket
from posttrain.online.rloo_trainer import RLOOConfig, RLOOTrainer
from posttrain.pocket.tasks import judge
from posttrain.reward.herding import RewardEnsemble
from posttrain.reward.overoptimisation import (
    DRAWS,
    RECIPES,
    SIZES,
    bon_curve,
    judged_pairs,
    optimise,
    train_proxy,
    write_answers,
)

HERE = Path(__file__).resolve().parent
RECORD, NOTEBOOK = HERE / "overoptimisation.json", HERE.parent / "nbs/explore/20_goodhart.ipynb"
BETAS = (0.0, 0.2)
STEPS = {200: 60, 2000: 120}  # pairs -> steps of training a reward model
NS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MEASURED = ("d", "gold", "reward")
ASKED, SAMPLES, SHOWN = 4, 1024, 2  # prompts of best-of-n, answers to each, answers that the record shows


def prompts(n: int, seed: int, split: str = "train") -> list[str]:
    return [row["prompt"] for row in pocket.rows("sentiment", "prompt_only", n, seed, split)]


def twice(n: int, draw: int) -> list[str]:
    "The prompts of a draw's pairs: two answers to each."
    return [prompt for prompt in prompts(n, 100 + draw) for _ in range(2)]


def candidates(policy, tokenizer) -> tuple[list, list, torch.Tensor]:
    "What best-of-n chooses from: prompts, answers, and gold (ASKED, SAMPLES)."
    asked = [prompt for prompt in prompts(ASKED, 0, "test") for _ in range(SAMPLES)]
    _, answers = write_answers(policy, tokenizer, asked)
    return asked, answers, torch.tensor([judge(answer) for answer in answers]).view(ASKED, SAMPLES).double()


def scores(proxy, asked: list, answers: list) -> torch.Tensor:
    "(ASKED, SAMPLES); equal answers are scored once, so that they have exactly the same reward."
    different = sorted(set(zip(asked, answers)), key=lambda row: (len(row[0] + row[1]), row))
    place = {row: i for i, row in enumerate(different)}
    found = proxy(*map(list, zip(*different)))
    return found[torch.tensor([place[row] for row in zip(asked, answers)])].view(ASKED, SAMPLES).double()


def chosen(rewards: torch.Tensor, answers: list) -> list[list[str]]:
    "For each n, the best of the first n answers to the first prompts."
    return [[answers[p * SAMPLES + rewards[p, :n].argmax().item()] for p in range(SHOWN)] for n in NS]


def runs_of(draw: int, policy, tokenizer, measured: tuple) -> list[dict]:
    "Everything for one draw of pairs."
    asked, answers, gold = measured
    doubled = twice(6000, draw)
    _, written = write_answers(policy, tokenizer, doubled, seed=draw)
    questions, watched, found = pocket.rows("sentiment", "prompt_only", 2000), prompts(192, 5, "test"), []
    for size in SIZES:
        data = {n: judged_pairs(doubled, written, n) for n in STEPS}
        members = {n: [train_proxy(data[n], size, tokenizer, 10 * draw + k, STEPS[n]) for k in range(many)]
                   for n, many in ((200, 3), (2000, 1))}
        for name, (n, many, how) in RECIPES.items():
            proxy = RewardEnsemble(members[n][:many], how).calibrate(doubled[:800], written[:800])
            about, rewards = {"draw": draw, "size": size, "proxy": name}, scores(proxy, asked, answers)
            found.append(about | {"by": "best-of-n", "said": chosen(rewards, answers)} | bon_curve(rewards, gold, NS))
            for beta in BETAS:
                points = optimise((RLOOTrainer, RLOOConfig), policy, tokenizer, proxy, questions, watched, seed=draw,
                                  num_generations=8, beta=beta)
                points["said"] = [said[:SHOWN] for said in points["said"]]
                found.append(about | {"by": f"RLOO, β = {beta:g}"} | points)
            print(f"draw {draw}, {size}, {name}: {time.process_time():.0f} CPU seconds", flush=True)
    return found


def rounded(run: dict) -> dict:
    return run | {name: [round(value, 3) for value in run[name]] for name in MEASURED}


def record() -> None:
    "Make the draws that are missing."
    runs = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else []
    policy, tokenizer = pocket.start("sentiment")
    measured = candidates(policy, tokenizer)
    for draw in DRAWS:
        if any(run["draw"] == draw for run in runs): continue
        runs += [rounded(run) for run in runs_of(draw, policy, tokenizer, measured)]
        lines = ",\n".join(json.dumps(run, ensure_ascii=False) for run in runs)
        RECORD.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def pack() -> None:
    "Write the record, compressed, as the cell that begins with its name."
    runs = json.loads(RECORD.read_text(encoding="utf-8"))
    whole = base64.b64encode(zlib.compress(json.dumps(runs, separators=(",", ":")).encode(), 9)).decode()
    text = "\n".join(textwrap.wrap(whole, 116))
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cell, = [cell for cell in notebook["cells"] if "\n_RECORD = " in "".join(cell["source"])]
    source = "".join(cell["source"])
    cell["source"] = (source[:source.index("_RECORD = ")] + f'_RECORD = """\n{text}\n"""').splitlines(keepends=True)
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", action="store_true", help="only write the notebook's cell")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    pack() if parser.parse_args().pack else record()
