"""The token microscope: what a run leaves behind, and that it never stops one."""
import json
import math
import warnings
from xml.dom import minidom

import pytest
import torch

import tiny
from posttrain import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer, pocket
from posttrain.explore import microscope as m
from posttrain.explore.dashboard import read_rows
from posttrain.explore.microscope import FILE, WHICH, Microscope, draw_look, followed, microscope, record, values_of
from posttrain.foundations.layouts import make_batch
from test_explore import check_picture, corners
from test_grpo import make

COLUMNS = ("tokens", "ids", "logps", "old_logps", "ref_logps", "entropy", "advantages")


def looks(folder): return read_rows(folder / FILE)
def completions(look): return [c for p in look["prompts"] for c in p["completions"]]
def varied(completions, **kwargs): return [float(len(set(c))) for c in completions]


def run(config, *, resume=None, **kw):
    scope = kw.pop("scope", None) or Microscope(1)
    settings = dict(rewards=varied, max_steps=4, num_iterations=2, beta=0.1, learning_rate=0.05, callbacks=[scope])
    trainer = make(config, **{**settings, **kw})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


# ---------------------------------------------------------------- a run
def test_a_run_of_four_steps(config, tmp_path):
    trainer = run(config)
    seen = looks(tmp_path)
    assert [look["step"] for look in seen] == [0, 1, 2, 3] and all("followed" in look for look in seen[1:])
    assert "followed" not in seen[0]
    for look in seen:
        assert 1 <= len(look["prompts"]) <= 2 and all(1 <= len(p["completions"]) <= 3 for p in look["prompts"])
        for p in look["prompts"]:
            for c in p["completions"]:
                assert p["prompt"].startswith("reverse")
                assert len({len(c[k]) for k in COLUMNS}) == 1
                text = [t for t, i in zip(c["tokens"], c["ids"]) if i not in trainer.processing_class.all_special_ids]
                assert c["scores"] == {"varied": varied(["".join(text)])[0]}
    # a generation serves two steps: the same completions, sampled by the policy of the first
    for first, second in (seen[:2], seen[2:]):
        assert [c["ids"] for c in completions(first)] == [c["ids"] for c in completions(second)]
        assert all(abs(v) < 1e-3 for c in completions(first) for v in values_of(c, "ratio"))
        assert any(abs(v) > 1e-3 for c in completions(second) for v in values_of(c, "ratio"))
    assert (tmp_path / "microscope.html").stat().st_size > 5000
    course = followed(seen)  # on the second pass the followed completions are the step's own
    for a, b in zip(completions(course[1]), completions(seen[1])):
        assert max(abs(x - y) for x, y in zip(a["logps"], b["logps"])) < 1e-3 and a["old_logps"] == b["old_logps"]
    assert completions(course[3])[0]["ids"] == completions(seen[0])[0]["ids"]
    assert completions(course[3])[0]["logps"] != completions(seen[0])[0]["logps"]


def test_micro_batches_evaluation_and_other_settings(config, tmp_path):
    rows = pocket.dataset("reverse", "prompt_completion", n=4).rename_column("completion", "answer")
    run(config, per_device_train_batch_size=4, gradient_accumulation_steps=4, eval_dataset=rows, eval_strategy="steps",
        eval_steps=1, scope=Microscope(2, prompts=1, completions=2, follow=False), num_iterations=1)
    seen = looks(tmp_path)
    # one look a step, none of an evaluation
    assert [look["step"] for look in seen] == [0, 2, 3] and not any("followed" in look for look in seen)
    assert all(len(look["prompts"]) == 1 and len(completions(look)) == 2 for look in seen)
    explorer = microscope(tmp_path)
    assert set(explorer.controls) == {"step", "what"} and explorer.controls["step"].values == (0, 2, 3)


@pytest.mark.parametrize("every, steps, most, iterations, want", [
    (None, 100, 200, 1, 5), (None, 80, 200, 2, 5), (None, 60, 200, 2, 3), (None, 7, 200, 1, 1), (None, 7, 200, 4, 1),
    (1, 1000, 50, 1, 20), (3, 30, 200, 3, 3)])
def test_steps_between_two_looks(tmp_path, every, steps, most, iterations, want):
    from types import SimpleNamespace
    scope = Microscope(every, most=most)
    args = SimpleNamespace(output_dir=str(tmp_path), num_iterations=iterations, steps_per_generation=2,
                           gradient_accumulation_steps=2)
    scope.on_train_begin(args, SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=steps), None)
    assert scope.gap == want


def test_only_the_first_process_looks(tmp_path):
    from types import SimpleNamespace
    scope = Microscope(1)
    scope.on_train_begin(SimpleNamespace(output_dir=str(tmp_path)),
                         SimpleNamespace(is_world_process_zero=False, global_step=0, max_steps=4), None)
    scope.on_generation(None, None)
    scope.on_tokens(SimpleNamespace(state=SimpleNamespace(global_step=0)), None, None)
    scope.on_train_end(None, None, None)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- stopping and going on
def test_a_resumed_run_keeps_what_it_knew(config, tmp_path):
    run(config, save_strategy="steps", save_steps=2, num_iterations=1)
    whole = looks(tmp_path)
    with open(tmp_path / FILE, "a") as f: f.write('{"step": 4, "prompts": [{"pro')  # a crash in the middle of a line
    assert looks(tmp_path) == whole and [look["step"] for look in m._looks(tmp_path)] == [0, 1, 2, 3]
    run(config, save_strategy="no", num_iterations=1, resume=str(tmp_path / "checkpoint-2"))
    again = looks(tmp_path)
    assert [look["step"] for look in again] == [0, 1, 2, 3] and again[:2] == whole[:2]
    assert (tmp_path / FILE).read_text().endswith("\n")
    assert len(followed(again)) == 4  # the first look's completions, from the file
    for a, b in zip(completions(again[3]), completions(whole[3])):
        assert a["ids"] == b["ids"] and max(abs(x - y) for x, y in zip(a["logps"], b["logps"])) < 1e-3
    for a, b in zip(again[3]["followed"], whole[3]["followed"]):
        assert max(abs(x - y) for x, y in zip(a["logps"], b["logps"])) < 1e-3
    run(config, max_steps=1, num_iterations=1)
    assert [look["step"] for look in looks(tmp_path)] == [0]  # a new run starts anew


def test_nothing_to_resume_from(config, tmp_path):
    run(config, save_strategy="steps", save_steps=2, scope=None)
    (tmp_path / FILE).unlink()
    run(config, resume=str(tmp_path / "checkpoint-2"))
    assert [look["step"] for look in looks(tmp_path)] == [2, 3]


# ---------------------------------------------------------------- never in the way
def test_what_goes_wrong_is_said_once_and_stops_no_run(config, tmp_path, monkeypatch):
    monkeypatch.setattr(m, "record", lambda *args, **kw: 1 / 0)
    with pytest.warns(UserWarning, match="the microscope saw nothing .ZeroDivisionError") as said:
        trainer = run(config)
    assert trainer.state.global_step == 4 and len([w for w in said if "microscope" in str(w.message)]) == 1


def test_a_trainer_that_shows_no_tokens(config, tmp_path, monkeypatch):
    monkeypatch.setattr(Microscope, "on_tokens", lambda *args: None)  # whatever a trainer may show
    trainer = SFTTrainer(pocket.start("reverse")[0], SFTConfig(**config(max_steps=1)),
                         train_dataset=pocket.dataset("reverse", n=8), processing_class=pocket.tokenizer(),
                         callbacks=[Microscope(1)])
    with pytest.warns(UserWarning, match="does not call on_tokens"): trainer.train()
    with pytest.raises(ValueError, match=r"callbacks=\[Microscope\(\)\]"): microscope(tmp_path)


def test_no_folder_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=FILE): microscope(tmp_path)
    with pytest.raises(FileNotFoundError): microscope(tmp_path / "nowhere" / FILE)


# ---------------------------------------------------------------- texts
def batch_of(prompts, texts, index, tokenizer):
    ids = lambda t: tokenizer(t, add_special_tokens=False).input_ids
    return make_batch([ids(p) for p in prompts], [ids(t) + [tokenizer.eos_token_id] for t in texts], index)


def test_long_completions_are_cut_and_said_to_be():
    tokenizer = tiny.tokenizer()
    batch = batch_of(["What?"], ["The sky is blue. " * 400, "x"], [0, 0], tokenizer)
    logps = -torch.rand(batch["mask"].shape)
    found = record(batch, {"logps": logps}, tokenizer, max_tokens=50)
    long, short = found[0]["completions"]
    total = int(batch["completion_lengths"][0])
    assert len(long["tokens"]) == len(long["ids"]) == len(long["logps"]) == 50 and long["left_out"] == total - 50
    assert short["left_out"] == 0
    picture = draw_look({"step": 0, "prompts": found})
    assert f"… {total - 50} more" in picture and len(picture) < 12_000 and len(json.dumps(found)) < 4000
    check_picture(picture)
    assert m.batch_of(found)["completion_lengths"].tolist() == [50, 2]


@pytest.mark.parametrize("text", [
    "</text><b>\"'&<!-- ]]>", "a\x00b\x01\x1f", "\n\r\t  x",
    "你好，世界! naïve café 🙂", "́combining", "﷽" * 30, "W" * 300, ""])
def test_texts_cannot_break_a_picture(text):
    tokenizer = tiny.tokenizer()
    batch = batch_of([text], [text, "ok"], [0, 0], tokenizer)
    shape = batch["mask"].shape
    found = record(batch, {"logps": -torch.rand(shape), "entropy": torch.rand(shape)}, tokenizer,
                   scores=lambda p, c: {text: 1.0})
    found = json.loads(json.dumps(found))
    explorer = microscope([{"step": s, "prompts": found} for s in (0, 5)])
    for v in explorer.grid(): minidom.parseString(explorer.frame(**v))
    assert explorer.html().count("</script>") == 1
    assert "�" in m.visible("\ud800\x00\uffff") and m.visible("a\nb c") == "a⏎b·c"


def test_pieces_make_the_text_again():
    tokenizer = tiny.tokenizer()
    for text in ("What is 2 + 3?  The answer is 5.", "<think> x </think>\n\n", "Naïve café"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert "".join(m.pieces(tokenizer, ids)) == text and len(m.pieces(tokenizer, ids)) == len(ids)
    ids = tokenizer("🙂", add_special_tokens=False).input_ids
    assert len(ids) > 1 and all(m.pieces(tokenizer, ids)) and m.pieces(tokenizer, []) == []


# ---------------------------------------------------------------- which rows, which numbers
def test_which_completions_are_kept():
    tokenizer = pocket.tokenizer()
    batch = batch_of(["1+1=", "2+2=", "3+3="], list("123456789"), [0, 0, 0, 1, 1, 1, 2, 2, 2], tokenizer)
    tokens = {"logps": torch.zeros(batch["mask"].shape)}

    def kept(**kw):
        "The first token of each completion that was kept."
        return [["".join(c["tokens"][:1]) for c in p["completions"]] for p in record(batch, tokens, tokenizer, **kw)]
    assert kept(completions=2) == [["1", "2"], ["4", "5"]]
    assert kept(prompts=5, completions=9) == [["1", "2", "3"], ["4", "5", "6"], ["7", "8", "9"]]
    batch["advantages"] = torch.tensor([0, 0, 0, .1, -.2, .1, 0, 0, 0])
    # a group that teaches something comes first, and in it who is pushed hardest
    assert kept(completions=2) == [["4", "5"], ["1", "2"]]
    batch["advantages"] = batch["advantages"][:, None].expand(-1, batch["mask"].shape[1]).clone()
    batch["advantages"][6:, 1] = math.nan
    batch["mask"][6:, 1] = 0  # not counted, so whatever it holds is nothing
    assert kept(completions=2) == [["4", "5"], ["1", "2"]]
    row = record(batch, tokens, tokenizer, prompts=3)[2]["completions"][2]
    assert row["logps"] == [0.0, None] and row["advantages"] == [0.0, None]


def test_pairs_have_names_and_the_references_log_probs(config, tmp_path):
    trainer = DPOTrainer(pocket.start("sort")[0], args=DPOConfig(**config(max_steps=3, learning_rate=1e-3)),
                         train_dataset=pocket.dataset("sort", "preference", n=12), processing_class=pocket.tokenizer(),
                         callbacks=[Microscope(1, names=("chosen", "rejected"))])
    trainer.train()
    for look in looks(tmp_path):
        assert [c["name"] for c in completions(look)] == ["chosen", "rejected"] * 2
        assert not any(c["scores"] or "advantages" in c for c in completions(look))
    explorer = microscope(trainer)
    assert explorer.controls["what"].values == ("log-prob", "KL", "entropy")
    assert set(explorer.controls) == {"step", "what", "which"} and explorer.controls["which"].values == WHICH


# ---------------------------------------------------------------- the explorer
def test_the_explorer_of_a_run(config, tmp_path):
    run(config)
    explorer = microscope(tmp_path / FILE)
    assert len(list(explorer.grid())) <= 150 and explorer.html() == microscope(tmp_path).html()
    assert explorer.question.count("?") == 1
    for v in corners(explorer): check_picture(explorer.frame(**v))
    for name, control in explorer.controls.items():
        assert explorer.frame(**{name: control.values[0]}) != explorer.frame(**{name: control.values[-1]}), name
    one = microscope(looks(tmp_path)[:1])
    assert set(one.controls) == {"what"} and "step" not in one.controls
    box = explorer.widget()
    box.inputs["what"].value = "KL"
    assert box.view.value == explorer.view(what="KL")


def test_a_long_run_makes_a_page_of_bounded_size():
    tokenizer = tiny.tokenizer()
    batch = batch_of(["What is 2 + 3?"] * 2, ["The answer is 5. " * 60] * 6, [0, 0, 0, 1, 1, 1], tokenizer)

    def logps(): return -torch.rand(batch["mask"].shape)
    columns = ("logps", "old_logps", "entropy")
    few = [record({**batch, "ref_logps": logps()}, {k: logps() for k in columns}, tokenizer) for _ in range(10)]
    many = [{"step": step, "prompts": few[step % 10]} for step in range(200)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explorer = microscope(many)
    assert len(explorer.controls["step"].values) == 7 and len(explorer.controls["step"].fine) == 200
    assert len(explorer.html()) < 1_000_000
