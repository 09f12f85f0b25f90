"""Build posttrain from settings.ini, the one place for its name, version, requirements and extras."""
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

STATUSES = {"3": "Development Status :: 3 - Alpha", "4": "Development Status :: 4 - Beta"}

extras = {key.removesuffix("_requirements"): value.split()
          for key, value in cfg.items() if key.endswith("_requirements")}
site = cfg["git_url"]
PAGES, PICTURES = f"{site}/blob/{cfg['branch']}/", f"{site}/raw/{cfg['branch']}/"


def with_whole_links(markdown: str) -> str:
    """README.md for the page of a package index, where a relative link or picture would lead nowhere."""
    pictures = re.sub(r"(!\[[^\]]*\]\()(?![a-z]+:|#)([^()\s]+\))", rf"\1{PICTURES}\2", markdown)
    return re.sub(r"(?<!!)(\[[^\]]*\]\()(?![a-z]+:|#)([^()\s]+\))", rf"\1{PAGES}\2", pictures)


setup(
    version=cfg["version"],
    description=cfg["description"],
    long_description=with_whole_links((here / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=site,
    project_urls={"Source": site, "Documentation": f"{PAGES}README.md", "Changelog": f"{PAGES}CHANGELOG.md",
                  "Issues": f"{site}/issues"},
    classifiers=[STATUSES[cfg["status"]], "Intended Audience :: Education", "Intended Audience :: Science/Research",
                 "Programming Language :: Python :: 3", f"Natural Language :: {cfg['language']}"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[cfg["lib_path"], f"{cfg['lib_path']}.*"]),
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={group: cfg[group].split() for group in ("console_scripts", "vllm.general_plugins")},
)
