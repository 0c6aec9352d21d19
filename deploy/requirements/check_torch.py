"""Exits with an error unless the installed torch is a CPU build. Reads its version file; importing it takes seconds."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path


def main() -> int:
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        print("torch is not installed", file=sys.stderr)
        return 1
    version = runpy.run_path(str(Path(found.origin).parent / "version.py"))
    if version["cuda"] is None and version.get("hip") is None:
        return 0
    text = f"torch {version['__version__']} is no CPU build; start afresh: make clean-venv install TORCH_INDEX=URL"
    print(text, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
