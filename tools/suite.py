"""The whole suite: check, notebooks, tests, and a report at the end.

    python tools/suite.py         notebooks whose stamp is true are taken from it, but for a rotating tenth
    python tools/suite.py --all   every notebook runs, and every recorded oracle is compared with a live trainer
"""
import argparse
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SLOWEST = 10
# Whole files to each of two workers, in the order of tests/conftest.py.
TWO_WORKERS = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]


@dataclass
class Part:
    """What one part of the suite did."""
    ran: dict[str, float]  # name of a notebook or test -> seconds
    failed: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # name -> why it did not run
    notes: list[str] = field(default_factory=list)


def notebooks_part(file: Path) -> Part:
    """From the report of tools/notebooks.py."""
    found = json.loads(file.read_text(encoding="utf-8"))
    part = Part({r["name"]: r["seconds"] for r in found["run"]}, [r["name"] for r in found["run"] if r["error"]])
    part.left_out = {name: "its stamp is true" for name in found["stamped"]}
    if found["picked"]:
        part.notes.append(f"run though their stamps are true: {', '.join(found['picked'])}")
    return part


def tests_part(file: Path) -> Part:
    """From pytest's JUnit file."""
    part = Part({})
    for case in xml.parse(file).iter("testcase"):
        name = f"{case.get('classname', '').removeprefix('tests.')}::{case.get('name')}"
        skipped = case.find("skipped")
        if skipped is not None:
            part.left_out[name] = skipped.get("message") or "no reason given"
            continue
        part.ran[name] = part.ran.get(name, 0) + float(case.get("time", 0))
        if case.find("failure") is not None or case.find("error") is not None:
            part.failed.append(name)
    return part


def slowest(part: Part) -> list[str]:
    names = sorted(part.ran, key=part.ran.get, reverse=True)[:SLOWEST]
    return [f"  {part.ran[name]:6.1f} s  {name}" for name in names]


def describe(kind: str, part: Part) -> list[str]:
    """The lines of the report about one part."""
    left_out = f", {len(part.left_out)} left out" if part.left_out else ""
    lines = [f"{kind}: {len(part.ran)} run{left_out}, {len(part.failed)} failed", *part.notes]
    for why in sorted(set(part.left_out.values())):
        names = [name for name, reason in part.left_out.items() if reason == why]
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        lines.append(f"  {len(names)} left out, {why}: {shown}")
    lines += [f"  FAILED {name}" for name in part.failed]
    return [*lines, f"the slowest {kind}:", *slowest(part)]


def step(name: str, command: list[str], env: dict | None = None) -> tuple[int, str]:
    """Run one part; its exit status, and a line on how long it took."""
    start = time.time()
    status = subprocess.run(command, cwd=ROOT, env={**os.environ, **(env or {})}).returncode
    return status, f"{name} {(time.time() - start) / 60:.1f} min"


def run_suite(everything: bool, folder: Path) -> int:
    """All three parts. A failing check ends the suite; failing notebooks do not keep the tests from running."""
    start, tool = time.time(), [sys.executable, str(ROOT / "tools/notebooks.py")]
    notebooks, tests = folder / "notebooks.json", folder / "tests.xml"
    for file in (notebooks, tests):
        file.unlink(missing_ok=True)
    checked, check_time = step("check", [*tool, "check"])
    if checked:
        return checked
    which = [] if everything else ["--stale"]
    ran, run_time = step("notebooks", [*tool, "test", *which, "--report", str(notebooks)])
    pytest = [sys.executable, "-m", "pytest", *TWO_WORKERS, f"--junitxml={tests}"]
    live = {"POSTTRAIN_LIVE": "1"} if everything else {}
    tested, test_time = step("tests", pytest, {"OMP_NUM_THREADS": "1", **live})

    lines = ["", "=" * 100]
    for kind, file, read in (("notebooks", notebooks, notebooks_part), ("tests", tests, tests_part)):
        lines += describe(kind, read(file)) if file.exists() else [f"{kind}: no report, they ended early"]
    bad = [name for name, status in (("notebooks", ran), ("tests", tested)) if status]
    verdict = f"FAILED: {' and '.join(bad)}" if bad else "passed"
    lines.append(f"{verdict} in {(time.time() - start) / 60:.1f} min ({check_time}, {run_time}, {test_time})")
    print("\n".join(lines), flush=True)
    return int(bool(bad))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="trust no stamp and no recorded oracle")
    parser.add_argument("--reports", type=Path, default=ROOT / "out", help="folder for the results of the parts")
    args = parser.parse_args()
    return run_suite(args.all, args.reports)


if __name__ == "__main__":
    sys.exit(main())
