"""`python -m dpo_service.demo` is `dpo demo`."""

from __future__ import annotations

import sys

from dpo_service.cli.app import run

sys.exit(run(["demo", *sys.argv[1:]]))
