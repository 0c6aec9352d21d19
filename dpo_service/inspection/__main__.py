"""`python -m dpo_service.inspection`: an InspectionRequest as JSON on stdin, an Inspection as JSON on stdout."""

from __future__ import annotations

import os
import sys

from dpo_service.manifests.inspection import InspectionRequest


def main() -> int:
    request = InspectionRequest.model_validate_json(sys.stdin.buffer.read())
    # Libraries print to standard output as they please; the answer is alone on the one we were given.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from dpo_service.inspection.inspect import inspect

    answer.write(inspect(request).model_dump_json())
    answer.close()
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)
