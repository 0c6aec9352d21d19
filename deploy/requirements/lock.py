"""Writes cpu.txt and dev.txt: every package of the CPU stack, and of the tests, with its version.

    make lock

pip resolves the extras of pyproject.toml without installing anything; what only a CUDA build of torch
needs is left out. The lists are installed with `--no-deps`. The extras' own pins decide; everything else
is the newest that fits.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
EXTRAS = ("cpu", "postgres")
SETUPTOOLS = "setuptools==77.0.3"
UNWANTED = re.compile(r"^(torchvision|torchaudio|torchcodec|triton|nvidia-.*|cuda-.*|dpo-service)$")
"""CUDA builds, which break `import transformers` beside a CPU torch, and the project itself."""


def resolve(extras: tuple[str, ...]) -> dict[str, str]:
    """Package -> version of everything `extras` need, as pip resolves it for this Python."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report), f"{ROOT}[{','.join(extras)}]", SETUPTOOLS]
        subprocess.run(command, check=True)
        installed = json.loads(report.read_text())["install"]
    found = {_name(item["metadata"]["name"]): item["metadata"]["version"].split("+")[0] for item in installed}
    return {name: version for name, version in sorted(found.items()) if not UNWANTED.match(name)}


def _name(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


def write(name: str, packages: dict[str, str]) -> None:
    (HERE / name).write_text("".join(f"{package}=={version}\n" for package, version in packages.items()))
    print(f"{name}: {len(packages)} packages")


def main() -> None:
    cpu = resolve(EXTRAS)
    everything = resolve((*EXTRAS, "dev"))
    moved = {name: (version, everything[name]) for name, version in cpu.items() if everything[name] != version}
    if moved:
        # One environment holds both lists, so the tests' needs decide.
        print(f"held back by the development tools: {moved}")
        cpu = {name: everything[name] for name in cpu}
    write("cpu.txt", cpu)
    write("dev.txt", {name: version for name, version in everything.items() if name not in cpu})


if __name__ == "__main__":
    main()
