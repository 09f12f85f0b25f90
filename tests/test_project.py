"""The project itself: one place for its metadata, a lazy import, a build that holds what it should."""
import configparser
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

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
    assert pyproject["tool"]["nbdev"]["lib_path"] == settings["lib_path"] and pyproject["tool"]["nbdev"]["nbs_path"] == settings["nbs_path"]
    static = set(pyproject["project"]) - {"name", "dynamic"}
    assert not static, f"{static} belong in settings.ini"


def test_the_changelog_knows_this_version(settings):
    assert f"## {settings['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_requirements_are_pinned(settings):
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    for key in ("requirements", "dev_requirements"):
        for requirement in settings[key].split():
            name = requirement.split(">")[0].split("=")[0].split("<")[0].lower().replace("_", "-")
            assert name in pinned, f"{name} of {key} has no version in constraints.txt"


def run(*code, **kw):
    return subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, check=True, **kw).stdout


def test_import_is_lazy():
    heavy = run("import sys, posttrain", "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'datasets', 'numpy', 'matplotlib', 'ipywidgets'}))")
    assert heavy.strip() == "[]"


def test_every_public_name_can_be_imported():
    import posttrain
    for name in posttrain.__all__:
        assert getattr(posttrain, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'SFTrainer'"):
        posttrain.SFTrainer


def test_wheel_and_sdist(tmp_path, settings):
    """Both are built from settings.ini; the wheel holds every module and nothing else of the project."""
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)], check=True, capture_output=True)
    wheel, = tmp_path.glob("*.whl")
    assert list(tmp_path.glob("*.tar.gz")) and wheel.name.startswith(f"posttrain-{settings['version']}-")
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "posttrain").rglob("*.py")}
    assert modules <= set(names)
    assert {n.split("/")[0] for n in names} == {"posttrain", f"posttrain-{settings['version']}.dist-info"}
    meta = zipfile.ZipFile(wheel).read(f"posttrain-{settings['version']}.dist-info/METADATA").decode()
    assert f"Requires-Python: >={settings['min_python']}" in meta and "Provides-Extra: vllm" in meta
