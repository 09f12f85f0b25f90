"""The project itself: one place for its metadata, a lazy import, a build that holds what it should."""
import configparser
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def settings():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini")
    return parser["DEFAULT"]


def test_settings_and_pyproject_agree(settings):
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert pyproject["project"]["name"] == settings["lib_name"]
    for name in ("lib_path", "nbs_path"):
        assert pyproject["tool"]["nbdev"][name] == settings[name]
    # the licence stands in both: setuptools takes it for an SPDX expression only from pyproject.toml
    static = set(pyproject["project"]) - {"name", "dynamic", "license", "license-files"}
    assert not static, f"{static} belong in settings.ini"
    assert (settings["license"], pyproject["project"]["license"]) == ("apache2", "Apache-2.0")


def test_nbdev_reads_the_same(settings):
    from nbdev.config import get_config
    config = get_config(ROOT)
    assert config.lib_name == settings["lib_name"]
    assert (Path(config.lib_path), Path(config.nbs_path)) == (ROOT / settings["lib_path"], ROOT / settings["nbs_path"])
    assert "posttrain" in config.allowed_metadata_keys, "nbdev-clean would remove the stamps"


def test_the_changelog_knows_this_version(settings):
    assert f"## {settings['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_requirements_are_pinned(settings):
    pinned = {line.split("==")[0].lower().replace("_", "-")
              for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    for key in ("requirements", "dev_requirements"):
        for requirement in settings[key].split():
            name = requirement.split(">")[0].split("=")[0].split("<")[0].lower().replace("_", "-")
            assert name in pinned, f"{name} of {key} has no version in constraints.txt"


def test_the_readme_names_the_versions_that_are_tested(settings):
    readme, pins = (ROOT / "README.md").read_text(encoding="utf-8"), (ROOT / "constraints.txt").read_text()
    section = readme[readme.index("## Compatibility"):]
    pinned = {name: re.search(rf"^{name}==(\d+\.\d+)", pins, re.M)[1] for name in ("transformers", "torch")}
    assert f"with transformers {pinned['transformers']} and torch {pinned['torch']};" in section
    oldest = re.search(r"transformers>=(\S+)", settings["requirements"])[1]
    assert f"transformers {oldest}, which Colab ships" in section


def run(*code, **kw):
    return subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, check=True,
                          **kw).stdout


def test_import_is_lazy():
    heavy = run("import sys, posttrain",
                "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'datasets', "
                "'numpy', 'matplotlib', 'ipywidgets'}))")
    assert heavy.strip() == "[]"


def test_import_is_quick():
    command = [sys.executable, "-X", "importtime", "-c", "import posttrain"]
    trace = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    microseconds = next(int(line.split("|")[1]) for line in trace.splitlines()
                        if line.split("|")[-1].strip() == "posttrain")
    # a millisecond when idle; torch alone takes over a second
    assert microseconds < 200_000, f"import posttrain takes {microseconds / 1e6:.2f} s"


def test_every_public_name_can_be_imported():
    import posttrain
    for name in posttrain.__all__:
        assert getattr(posttrain, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'SFTrainer'"):
        posttrain.SFTrainer()


def test_wheel_and_sdist(tmp_path, settings):
    """Both are built from settings.ini; the wheel holds every module and nothing else of the project."""
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)], check=True,
                   capture_output=True)
    wheel, = tmp_path.glob("*.whl")
    assert list(tmp_path.glob("*.tar.gz")) and wheel.name.startswith(f"posttrain-{settings['version']}-")
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "posttrain").rglob("*.py")}
    assert modules <= set(names)
    assert {n.split("/")[0] for n in names} == {"posttrain", f"posttrain-{settings['version']}.dist-info"}
    info = f"posttrain-{settings['version']}.dist-info"
    meta = zipfile.ZipFile(wheel).read(f"{info}/METADATA").decode()
    assert f"Requires-Python: >={settings['min_python']}" in meta and "Provides-Extra: vllm" in meta
    assert "License-Expression: Apache-2.0" in meta and "Project-URL: Changelog, https://" in meta
    check_page(meta.split("\n\n", 1)[1])
    check_entry_points(zipfile.ZipFile(wheel).read(f"{info}/entry_points.txt").decode(), settings)


def check_page(page):
    """What a package index shows: the README, with links and pictures that lead somewhere, to files that there are."""
    targets = re.findall(r"\]\(([^()\s]+)\)", re.sub(r"```.*?```|`[^`\n]*`|\$[^$\n]+\$", "", page, flags=re.S))
    assert len(targets) > 80 and all(re.match("https?://|#", target) for target in targets)
    own = [re.match("https://github.com/posttrain/posttrain/(?:blob|raw)/main/(.+)", target) for target in targets]
    assert all((ROOT / found[1].split("#")[0]).exists() for found in own if found) and sum(map(bool, own)) > 60


def check_entry_points(text, settings):
    """The command and vLLM's plugin are in the wheel, and each leads to a function."""
    from configparser import ConfigParser
    from importlib import import_module
    parser = ConfigParser(delimiters=["="])
    parser.read_string(text)
    for group in ("console_scripts", "vllm.general_plugins"):
        (name, target), = parser[group].items()
        module, function = target.split(":")
        assert f"{name}={target}" == settings[group] and callable(getattr(import_module(module), function))


def committed():
    """Paths of the files that git knows, or would add."""
    names = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                           capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in names.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_place_on_somebodys_machine():
    home = re.compile("|".join([r"/(?:home|Users)/\w", r"/root/\w", r"[A-Z]:[\\/]+Users", re.escape(f"{ROOT}/")]))
    found = []
    for path in committed():
        if path == Path(__file__) or path.suffix in (".png", ".npz"): continue
        found += [f"{path.relative_to(ROOT)}: {m[0]}" for m in home.finditer(path.read_text(encoding="utf-8"))]
    assert not found


def test_readme_tells_the_state_of_each_trainer():
    import posttrain
    states = dict(re.findall(r"\| `(\w+Trainer)` \|.*\| (\S+) \|$", (ROOT / "README.md").read_text(), re.M))
    assert len(states) == 17  # sixteen methods, and one of them by two names
    works = {name for name in posttrain.__all__ if name.endswith("Trainer")}
    shown = {name for name, state in states.items() if state == "**works**"}
    assert shown == works, "run nbs/index.ipynb, then `python tools/notebooks.py readme`"
    assert set(states.values()) <= {"**works**", "planned"}


def test_readme_leads_to_every_notebook():
    readme = (ROOT / "README.md").read_text()
    notebooks = [str(p.relative_to(ROOT)) for p in committed() if p.suffix == ".ipynb" and p.name != "index.ipynb"]
    missing = [name for name in notebooks if f"({name})" not in readme]
    assert not missing, "run nbs/index.ipynb, then `python tools/notebooks.py readme`"


def cells_with_an_adapter():
    """The cells for a real model that train LoRA; and the commands that do."""
    for path in [*ROOT.glob("nbs/o*line/*.ipynb"), *ROOT.glob("tutorials/*.ipynb")]:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            code = "".join(cell["source"])
            if "Trainer(" in code and "peft_config=" in code and code.startswith("#| eval: false"):
                yield pytest.param(code, id=f"{path.parent.name}/{path.stem}")
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("posttrain ") and "--use_peft" in line: yield pytest.param(line, id="README.md")


@pytest.mark.parametrize("code", list(cells_with_an_adapter()))
def test_an_adapter_gets_ten_times_the_default_learning_rate(code):
    """The defaults are for training all weights, and LoRA hardly learns with them. The defaults of BCO and of trainers
    that compare are half of the others', and CPO's authors train an adapter with 1e-4."""
    rates = {float(rate) for rate in re.findall(r"(?<!critic_)learning_rate[= ]([\d.e-]+)", code)}
    of_their_own = {"SFT": 2e-4, "BCOConfig": 5e-6, 'CPOConfig("cpo"': 1e-4,
                    "OnlineDPOConfig": 5e-6, "XPOConfig": 5e-6, "NashMDConfig": 5e-6}
    expected = next((rate for words, rate in of_their_own.items() if words in code), 1e-5)
    assert rates == {expected}, f"{rates or 'the default'} for LoRA"


def test_the_workflow_runs_what_ci_runs():
    import yaml
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = workflow["jobs"]["test"]["steps"]
    nightly = "(github.event_name == 'schedule' || github.event_name == 'workflow_dispatch')"
    assert steps[-1]["run"] == f"bash .ci/run ${{{{ {nightly} && 'test-all' || 'test' }}}}"
    # YAML reads the key `on` as true.
    assert "schedule" in workflow[True]
    assert (ROOT / ".ci/run").read_text().rstrip().endswith('make "${1:-test}"')


def test_the_workflow_takes_actions_that_run_and_targets_that_there_are():
    text, targets = (ROOT / ".github/workflows/ci.yml").read_text(), (ROOT / "Makefile").read_text()
    # The releases before these ask for Node 20, which GitHub took away in 2026.
    first = {"actions/checkout": 5, "actions/setup-python": 6}
    for action, release in re.findall(r"uses: (\S+)@v(\d+)", text):
        assert int(release) >= first[action], f"{action}@v{release} needs Node 20"
    named = {*re.findall(r"run: make (\S+)", text), "test", "test-all"}
    assert named == {"test", "test-all", "newest"}
    for name in named:
        assert re.search(rf"^{name}:", targets, re.M), f"the Makefile has no target {name!r}"


def test_contributing_shows_the_newest_preference_loss_as_it_is():
    """The two pieces of `sigmoid_norm` in CONTRIBUTING.md stand word for word in the zoo."""
    import nbformat
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text[text.index("## A new preference loss"):]
    pieces = re.findall(r"```python\n(.*?)```", section[:section.index("\n## ")], re.S)
    zoo = nbformat.read(ROOT / "nbs/offline/08_preference_zoo.ipynb", as_version=4)
    source = "\n".join(c.source for c in zoo.cells)
    assert len(pieces) == 2 and all(piece.rstrip() in source for piece in pieces)


@pytest.mark.parametrize("ci, data_is_missing, folder_is_there, outcome", [
    ("true", False, True, "failed"), ("", False, True, "skipped"), ("true", True, True, "failed"),
    ("true", True, False, "skipped"), ("", True, False, "skipped")])
def test_a_skip_on_ci_is_a_failure(monkeypatch, tmp_path, ci, data_is_missing, folder_is_there, outcome):
    """Whatever is skipped; but for the data of two tests, where there is no folder that should hold it."""
    import gsm8k
    from conftest import not_on_ci
    monkeypatch.setenv("CI", ci)
    monkeypatch.delenv("POSTTRAIN_GSM8K", raising=False)
    monkeypatch.setattr(gsm8k, "SHARED", tmp_path if folder_is_there else tmp_path / "nowhere")
    reason = f"Skipped: {gsm8k.MISSING}: set ..." if data_is_missing else "Skipped: vLLM is not installed"
    report = not_on_ci(SimpleNamespace(outcome="skipped", skipped=True, longrepr=("file.py", 3, reason)))
    assert report.outcome == outcome and (outcome == "skipped" or reason in report.longrepr)
