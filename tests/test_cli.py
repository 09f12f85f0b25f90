"""The command line: what is wrong with a command is said in one message, before a model is loaded; and what works."""
import contextlib
import gzip
import json
import os
import re
import subprocess
import sys

import pytest

from posttrain import cli, pocket
from posttrain.command import needs
from posttrain.command.arguments import reward_function
from posttrain.command.flags import groups_of, parse

FILES = {
    "rows.jsonl": '{"prompt": "a", "completion": "b"}\n' * 8, "questions.jsonl": '{"prompt": "a", "answer": "b"}\n' * 8,
    "broken.jsonl": '{"prompt": "a", "completion": "b"}\n{"prompt": \n', "list.jsonl": "[1]\n", "empty.jsonl": "",
    "broken.json": "[{]", "rows.xlsx": "x", "broken.parquet": "x" * 50, "wrong.jsonl": '{"a": 1}\n' * 4,
    "numbers.jsonl": '{"prompt": 1, "completion": 2}\n' * 4, "text.gz": "x",
    "null.json": "null", "cut.json": '[{"prompt": "a"},\n]', "header.csv": "prompt,completion\n",
    "twice.yaml": "max_steps: 1\nmax_steps: 2",
    "broken.yaml": "learning_rate: [1", "words.yaml": "just words", "empty.yaml": "", "broken_config.json": "{",
    "misspelt.yaml": "learning_rat: 1", "kind.yaml": "max_steps: many", "list.yaml": "- 1", "env.yaml": "env: 3",
    "weight.yaml": "datasets:\n  - path: rows.jsonl\n    weight: 2",
    "path.yaml": "datasets:\n  - paths: rows.jsonl", "no_path.yaml": "datasets:\n  - name: x",
    "missing.yaml": "datasets:\n  - path: nowhere.jsonl", "column.yaml": "datasets: [{path: rows.jsonl, columns: [b]}]",
    "split.yaml": "datasets: [{path: rows.jsonl, split: test}]", "tabs.yaml": "a:\n\tb: 1",
    "share.yaml": "datasets: [{path: rows.jsonl, fraction: 1}, {path: questions.jsonl}]",
    "words.py": "def brevity(completions, **columns): return [0.0]\nLIMIT = 3", "syntax.py": "def brevity(:",
    "raises.py": "import nowhere_at_all", "zero.py": "1 / 0",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model and with files that are right and wrong."""
    place = tmp_path_factory.mktemp("cli")
    for name, text in FILES.items(): (place / name).write_text(text)
    pocket.model(seed=0).save_pretrained(place / "model")
    pocket.tokenizer().save_pretrained(place / "model")
    (place / "hollow").mkdir()
    (place / "texts").mkdir()
    for name in ("train", "test"): (place / f"texts/{name}.txt").write_text("reverse 12=21\nsort 31=13\n")
    (place / "run/checkpoint-20").mkdir(parents=True)
    return place


def say(command, folder, capsys):
    """Exit status, output and errors of a command that runs in the folder."""
    capsys.readouterr()
    with contextlib.chdir(folder): status = cli.main(command if isinstance(command, list) else command.split())
    out, err = capsys.readouterr()
    return status, out, err


SFT = "sft --model_name_or_path model --dataset_name rows.jsonl --output_dir out --use_cpu --report_to none"
NO_DATA = SFT.replace(" --dataset_name rows.jsonl", "")
NO_MODEL = SFT.replace(" --model_name_or_path model", "")
GRPO = SFT.replace("sft", "grpo").replace("rows", "questions") + " --num_generations 4"
GKD = SFT.replace("sft", "gkd")
MINILLM = SFT.replace("sft", "minillm").replace("rows", "questions") + " --teacher_model_name_or_path model"
TEXT = f"{MINILLM} --pretrain_dataset_name"
WRONG = [
    ("stf", "no command 'stf'. Did you mean 'sft'?"), ("teach", "no command 'teach'"), ("--sft", "no command '--sft'"),
    ("demo --steps 0", "steps=0 of DemoArguments must be at least 1"), ("demo --steps many", "steps .* got 'many'"),
    ("demo --out a.gif", "--out must end in"), ("demo --out no/a.png", "folder no is not there"),
    ("demo --seed -1", "seed=-1"), ("demo --step 3", "no flag --step. Did you mean '--steps'"),
    ("demo a b", "one config file"), ("pocket --out .", "holds something else"),
    ("pocket --task sum", "'sum' is unknown"),
    ("pocket --rows 0", "rows=0"),
    ("sft --model_name_or_path model --learning_rat 1", "no flag --learning_rat. Did you mean '--learning_rate'"),
    (f"{SFT} --lr 1", "no flag --lr"), (f"{SFT} -x", "no flag -x"), (f"{SFT} --learning_rate", "expected one argument"),
    (f"{SFT} --learning_rate fast", "learning_rate of SFTConfig must be a number, got 'fast'"),
    (f"{SFT} --learning_rate nan", "learning_rate=nan"), (f"{SFT} --max_steps 0", "max_steps=0"),
    (f"{SFT} --max_steps 1.5", "max_steps .* whole number, got 1.5"), (f"{SFT} --packing maybe", "packing='maybe'"),
    (f"{SFT} --bf16 2", "True or False or None, got '2'"), (f"{SFT} --loss_type mse", "loss_type='mse'"),
    (f"{SFT} --optim adam", "optim='adam' is unknown"), (f"{SFT} --eval_strategy step", "Did you mean 'steps'"),
    (f"{SFT} --lr_scheduler_type cosin", "Did you mean 'cosine'"), (f"{SFT} --model_init_kwargs x", "a dict or None"),
    (f"{SFT} --model_init_kwargs {{'a':1}}", "is no JSON"), (f"{SFT} --max_length 1", "max_length=1"),
    (f"{SFT} --gradient_accumulation_steps -1", "gradient_accumulation_steps=-1"),
    (f"{SFT} --dtype fp8", "dtype='fp8'"),
    (f"{SFT} --report_to wandbb", "--report_to wandbb.*Did you mean 'wandb'"),
    (f"{SFT} --lora_r 0 --use_peft", "lora_r=0"), (f"{SFT} --load_in_4bit", "load_in_4bit.*use_peft"),
    (f"{SFT} --load_in_4bit --load_in_8bit --use_peft", "choose one"),
    (f"{SFT.replace('sft', 'sft rows.jsonl')}", "expected a config file"),
    (NO_MODEL, "--model_name_or_path is needed"), (NO_DATA, "--dataset_name is needed"),
    (f"{NO_MODEL} --model_name_or_path ./modle", "no such folder. Did you mean 'model'"),
    (f"{NO_MODEL} --model_name_or_path hollow", "holds no config.json; it holds nothing"),
    (f"{NO_MODEL} --model_name_or_path run", "Did you mean run/checkpoint-20"),
    (f"{NO_MODEL} --model_name_or_path rows.jsonl", "is a file; expected the folder"),
    (f"{NO_MODEL} --model_name_or_path Qwen/nowhere", "--model_name_or_path Qwen/nowhere: no such folder here"),
    (f"{NO_MODEL} --model_name_or_path rnu/checkpoint-20", "Did you mean 'run/checkpoint-20'"),
    (f"{NO_MODEL} --model_name_or_path a/b/c", "no such folder"),
    (f"{NO_DATA} --dataset_name row.jsonl", "is not there. Did you mean 'rows.jsonl'"),
    (f"{NO_DATA} --dataset_name broken.jsonl", "broken.jsonl: line 2 is no JSON"),
    (f"{NO_DATA} --dataset_name list.jsonl", "line 1 is no object"),
    (f"{NO_DATA} --dataset_name empty.jsonl", "is empty"),
    (f"{NO_DATA} --dataset_name broken.json", "--dataset_name broken.json: "),
    (f"{NO_DATA} --dataset_name cut.json", "cut.json: line 2, column . is no JSON"),
    (f"{NO_DATA} --dataset_name null.json", "null.json must hold a list of objects, .* it begins with 'null'"),
    (f"{NO_DATA} --dataset_name header.csv", "header.csv holds no row"),
    (f"{NO_DATA} --dataset_name https://a.b/rows.jsonl", "https://a.b/rows.jsonl is an address"),
    (f"{SFT} –max_steps 1", "no flag –max_steps: .* two hyphens: --max_steps"),
    ("sft twice.yaml", "twice.yaml is no YAML: line 2: 'max_steps' stands twice"),
    (f"{NO_DATA} --dataset_name rows.xlsx", "must end in one of .json"),
    (f"{NO_DATA} --dataset_name text.gz", "must end"),
    (f"{NO_DATA} --dataset_name broken.parquet", "--dataset_name broken.parquet: "),
    (f"{NO_DATA} --dataset_name hollow", "no file in this folder"),
    (f"{NO_DATA} --dataset_name org/none", "org/none: "),
    (f"{NO_DATA} --dataset_name wrong.jsonl", "'a'"), (f"{NO_DATA} --dataset_name numbers.jsonl", "prompt"),
    (f"{SFT} --eval_strategy steps", "no split 'test'; it has train.*test_split_size"),
    (f"{SFT} --dataset_train_split dev --dataset_name model", "is the folder of a model"),
    (f"{SFT} --test_split_size 9 --eval_strategy steps", "whole number of rows below the 8"),
    (f"{SFT} --test_split_size 0", "test_split_size=0"), ("sft none.yaml", "none.yaml is not there"),
    ("sft broken.yaml", "broken.yaml is no YAML: line 1"), ("sft tabs.yaml", "tabs.yaml is no YAML: line 2"),
    ("sft words.yaml", "holds a str"), ("sft list.yaml", "holds a list"), ("sft empty.yaml", "holds nothing"),
    ("sft broken_config.json", "is no JSON: line 1"), ("sft env.yaml", "env must hold names"),
    ("sft misspelt.yaml", "misspelt.yaml: there is no setting 'learning_rat'. Did you mean 'learning_rate'"),
    ("sft --config kind.yaml", "max_steps .* got 'many'"), ("sft kind.yaml --config kind.yaml", "one config file"),
    (f"{NO_DATA} --config path.yaml", "no field 'paths'. Did you mean 'path'"),
    (f"{NO_DATA} --config weight.yaml", "no field 'weight'. Its fields are path, name, .*fraction"),
    (f"{NO_DATA} --config no_path.yaml", "needs a path"),
    (f"{NO_DATA} --config missing.yaml", "nowhere.jsonl is not there"),
    (f"{NO_DATA} --config column.yaml", "no column 'b'; it has prompt, completion"),
    (f"{NO_DATA} --config share.yaml", "a fraction to all of them"), (GRPO, "--reward_funcs or"),
    (f"{GRPO} --reward_funcs acuracy_reward", "Did you mean 'accuracy_reward'"),
    (f"{GRPO} --reward_funcs get_cosine_scaled_reward", "it has .*exact_match_reward"),
    (f"{GRPO} --reward_funcs nowhere.f", "No module named 'nowhere'"),
    (f"{GRPO} --reward_funcs words.LIMIT", "it has brev"),
    (f"{GRPO} --reward_funcs ./words.py:brevit", "it has brevity. Did you mean 'brevity'"),
    (f"{GRPO} --reward_funcs ../words.py:brevity", "the file must be in this folder .* or below it"),
    (f"{GRPO} --reward_funcs syntax.brevity", "syntax.py, line 1"),
    (f"{GRPO} --reward_funcs raises.f", "nowhere_at_all"),
    (f"{GRPO} --reward_funcs zero.f", "ZeroDivisionError in .*zero.py, line 1"),
    (f"{GRPO} --reward_funcs words.brevity --reward_weights 1 2", "2 reward weights for 1 reward"),
    (f"{GRPO} --reward_funcs words.brevity --num_generations 3", "num_generations=3"),
    (f"{GRPO} --reward_model_name_or_path ./none", "--reward_model_name_or_path ./none: there is no such folder"),
    (GKD, "--teacher_model_name_or_path is needed"), (f"{GKD} --lmbda 2", "lmbda=2"),
    (f"{GKD} --teacher_model_name_or_path ./none", "--teacher_model_name_or_path ./none: there is no such folder"),
    (f"{GKD} --teacher_model_name_or_path model --teacher_model_init_kwargs {{'a':1}}", "is no JSON"),
    (f"{TEXT} row.jsonl", "--pretrain_dataset_name row.jsonl is not there. Did you mean 'rows.jsonl'"),
    (f"{TEXT} broken.jsonl", "--pretrain_dataset_name broken.jsonl: line 2 is no JSON"),
    (f"{TEXT} wrong.jsonl", "in the pretrain dataset"), (f"{TEXT} org/none", "--pretrain_dataset_name org/none: "),
    (f"{TEXT} texts --pretrain_dataset_split tests", "texts has no split 'tests'; it has train, test. Did you mean "
     "'test'.* --pretrain_dataset_split"),
    (f"{TEXT} rows.jsonl --pretrain_dataset_config x", "--pretrain_dataset_name rows.jsonl is a file"),
    (f"{MINILLM} --pretrain_dataset rows.jsonl", "no flag --pretrain_dataset. Did you mean '--pretrain_dataset_"),
    (f"{SFT} --pretrain_dataset_name rows.jsonl", "no flag --pretrain_dataset_name"),
    (f"{MINILLM} --reward_funcs words.brevity", "num_generations=1"),
    (f"{GKD.replace('rows', 'questions')} --teacher_model_name_or_path model", "'completion' is missing"),
]


@pytest.mark.parametrize("command, words", WRONG, ids=[command[-60:] for command, _ in WRONG])
def test_one_message_says_what_is_wrong(command, words, folder, capsys, monkeypatch):
    def load(*args, **kwargs): raise AssertionError("a model was loaded before the fault was found")
    monkeypatch.setattr("posttrain.training.trainer.load_model", load)
    monkeypatch.syspath_prepend(str(folder))
    status, _, err = say(command, folder, capsys)
    assert status == 2 and re.search(words, err, re.S), err
    assert "Traceback" not in err and err.count("posttrain") and len(err) < 1500


@pytest.mark.parametrize("flags, module, install", [
    ("--use_peft --load_in_4bit", "bitsandbytes", "bitsandbytes"), ("--use_peft", "peft", "peft"),
    ("--report_to wandb", "wandb", "wandb"), ("--optim lomo", "lomo_optim", "lomo_optim"),
    ("--attn_implementation flash_attention_2", "flash_attn", "flash-attn"),
    ("--reward_funcs accuracy_reward", "math_verify", r"posttrain\[math\]"),
    ("--use_vllm --reward_funcs words.brevity", "vllm", r"posttrain\[vllm\]")])
def test_a_missing_package_is_asked_for_first(flags, module, install, folder, capsys, monkeypatch):
    """Whether or not it is installed here."""
    monkeypatch.setattr(needs, "find_spec", lambda name: None if name == module else object())
    monkeypatch.setattr("transformers.utils.import_utils.is_bitsandbytes_available", lambda *args: True)
    command = GRPO if "reward" in flags else SFT
    status, _, err = say(f"{command.replace(' --report_to none', '')} {flags}", folder, capsys)
    assert status == 2 and f"needs the package {module}" in err and re.search(f"pip install .*{install}", err)


def test_debug_shows_the_traceback(folder, capsys):
    _, _, err = say("demo --steps 0 --debug", folder, capsys)
    assert "Traceback" in err and err.splitlines()[-1].startswith("posttrain demo: steps=0")
    args, = parse([cli.posttrain.SFTConfig], ["--debug", "underflow_overflow", "--output_dir", "out", "--use_cpu"])
    assert [option.value for option in args.debug] == ["underflow_overflow"]


def test_an_unexpected_error_leaves_its_traceback_in_a_file(folder, capsys, monkeypatch):
    def boom(*args, **kwargs): raise KeyError("x")
    monkeypatch.setattr(cli, "load_data", boom)
    status, _, err = say(SFT, folder, capsys)
    assert status == 2 and "posttrain sft: KeyError: 'x'" in err
    path = err.split("The traceback is in ")[1].split(";")[0]
    assert "in boom" in open(path).read()
    os.remove(path)


def test_somebody_at_a_terminal_sees_that_it_has_begun(folder, capsys, monkeypatch):
    """Importing torch takes seconds, in which a terminal would stay empty. A file gets no such line."""
    _, _, quiet = say("sft", folder, capsys)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    _, _, err = say("sft", folder, capsys)
    assert err.splitlines()[0].startswith("importing torch") and not quiet.startswith("importing")


@pytest.mark.parametrize("name", ["./words.py:brevity", "words.py:brevity", "words.brevity",
                                  "{folder}/words.py:brevity"])
def test_a_reward_is_found_however_its_file_is_written(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    assert reward_function(name.format(folder=folder))(["a"]) == [0.0]


def test_an_interrupt_is_no_traceback(folder, capsys, monkeypatch):
    def stop(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(cli, "load_data", stop)
    status, _, err = say(SFT, folder, capsys)
    assert status == 130 and err.strip() == "posttrain sft: interrupted"


# ---------------------------------------------------------------- help
@pytest.mark.parametrize("command", [[], ["--help"], ["-h"], ["help"]])
def test_the_command_explains_itself(command, folder, capsys):
    status, out, _ = say(command, folder, capsys)
    assert status == 0 and all(name in out for name in (*cli.TRAINERS, "demo", "pocket", "To begin with"))


@pytest.mark.parametrize("method", cli.TRAINERS)
def test_help_begins_with_the_methods_own_flags(method, folder, capsys):
    status, out, _ = say([method, "--help"], folder, capsys)
    titles = [line[:-1] for line in out.splitlines() if line and line[0] != " " and line.endswith(":")]
    assert titles[0] == f"{method.upper()}, its own" and titles[-1] == "training, as transformers does it"
    config = getattr(cli.posttrain, cli.TRAINERS[method][0])
    assert "one of linear, cosine" in " ".join(out.split())
    losses = config.__dataclass_fields__.get("loss_type")  # GKD's is TRL's alone, and does nothing
    assert ("--loss_type" in out) == (losses is not None and not losses.metadata["help"].startswith("Accepted"))
    assert "Not supported" not in out
    assert max(map(len, out.splitlines())) <= 120


def test_every_flag_stands_in_one_group():
    config, trainer = (getattr(cli.posttrain, name) for name in cli.TRAINERS["grpo"])
    groups = groups_of(cli._classes(config, trainer), "own")
    names = [field.name for found in groups.values() for _, field in found]
    assert len(names) == len(set(names)) > 150 and "use_vllm" in [f.name for _, f in groups["sampling with vLLM"]]


# ---------------------------------------------------------------- what works
ONE_STEP = ("model_name_or_path: model\noutput_dir: out-yaml\nmax_steps: 1\nlearning_rate: 2e-5\nwarmup_steps: 1e0\n"
            "report_to: none\nuse_cpu: yes\neval_strategy: no\nlogging_steps: 1\nsave_strategy: no\n"
            "datasets:\n  - path: rows.jsonl\n  - path: packed.jsonl.gz\ntest_split_size: 0.25\n")


def test_a_config_file_with_flags_on_top(folder, capsys):
    """Numbers that YAML reads as text, a mixture, a split; a flag wins."""
    with gzip.open(folder / "packed.jsonl.gz", "wt") as file: file.write(FILES["rows.jsonl"])
    (folder / "run.yaml").write_text(ONE_STEP)
    with contextlib.chdir(folder):
        trainer = cli.train("sft", ["run.yaml", "--seed", "9", "--eval-strategy=epoch", "--torch_dtype", "bfloat16"])
    args = trainer.args
    assert (args.learning_rate, args.warmup_steps, args.seed, args.use_cpu) == (2e-5, 1, 9, True)
    assert len(trainer.train_dataset) == 12 and len(trainer.eval_dataset) == 4
    assert str(trainer.model.dtype) == "torch.bfloat16" and (folder / "out-yaml/model.safetensors").exists()
    assert args.eval_strategy.value == "epoch"


@pytest.mark.parametrize("method", ["gkd", "distillation", "minillm"])
def test_a_teacher_by_its_path(method, folder):
    flags = "--teacher_model_name_or_path model --teacher_model_init_kwargs {\"dtype\":\"bfloat16\"} --max_steps 1"
    command = SFT.replace("sft", method).replace("--output_dir out", f"--output_dir out-{method}")
    longest = "max_completion_length" if method == "minillm" else "max_new_tokens"
    with contextlib.chdir(folder): trainer = cli.train(method, f"{command} {flags} --{longest} 4".split()[1:])
    assert str(trainer.teacher_model.dtype) == "torch.bfloat16" and trainer.args.max_completion_length == 4
    assert (folder / f"out-{method}/model.safetensors").exists()


@pytest.mark.parametrize("text, rows", [("rows.jsonl", 8), ("texts", 2), ("texts --pretrain_dataset_split test", 2),
                                        ("texts --dataset_streaming --max_steps 1", None), ("", 0)])
def test_text_for_the_pretraining_term(text, rows, folder):
    """MiniLLM's beside its questions, by a name as these."""
    command = MINILLM.replace("--output_dir out", f"--output_dir out-text-{len(text)} --max_steps 1 --logging_steps 1")
    if text: command += f" --pretrain_coef 2 --pretrain_dataset_name {text}"
    with contextlib.chdir(folder): trainer = cli.train("minillm", f"{command} --max_completion_length 4".split()[1:])
    logged = trainer.state.log_history[0]
    assert ("pretrain_loss" in logged) == bool(text) == (trainer.pretraining is not None)
    if rows: assert len(trainer.pretraining.dataset) == rows and trainer.args.pretrain_coef == 2


def test_flags_of_text_stand_with_the_methods_own(folder, capsys):
    _, out, _ = say("minillm --help", folder, capsys)
    places = [out.index(f"--{name} ") for name in ("pretrain_dataset_name", "pretrain_coef", "dataset_train_split")]
    assert max(places[:2]) < out.index("\nsampling:") < out.index("\ndata:") < places[2]
    assert "--pretrain" not in say("gkd --help", folder, capsys)[1]


def test_python_m_posttrain_on_a_console_without_unicode(folder):
    """A console that cannot print a character gets another one in its place."""
    code = "import sys; from posttrain import cli; cli.overview = lambda: 'naïve ≥ 1'; sys.exit(cli.main([]))"
    quiet = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=quiet)
    assert done.returncode == 0 and done.stdout.strip() == b"na?ve ? 1", done.stderr
    done = subprocess.run([sys.executable, "-m", "posttrain"], capture_output=True, env=quiet, text=True)
    assert done.returncode == 0 and "To begin with" in done.stdout


def test_a_reader_that_goes_away(folder):
    done = subprocess.run(f"{sys.executable} -m posttrain --help | head -1", shell=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_json_and_yaml_say_the_same(folder):
    values = {"learning_rate": "2e-5", "max_steps": 3, "output_dir": "o", "use_cpu": True}
    (folder / "a.json").write_text(json.dumps(values))
    (folder / "a.yaml").write_text("learning_rate: 2e-5\nmax_steps: 3\noutput_dir: o\nuse_cpu: true\n")
    configs = [parse([cli.posttrain.SFTConfig], [str(folder / f"a.{end}")])[0] for end in ("json", "yaml")]
    assert configs[0].learning_rate == configs[1].learning_rate == 2e-5 and configs[0].max_steps == 3
