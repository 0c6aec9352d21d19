"""How a command ends. `dpo --help` shows this table."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    OK = 0
    FAILED = 1
    USAGE = 2
    REFUSED = 3
    UNREACHABLE = 4
    HELD = 5


MEANING: dict[ExitCode, str] = {
    ExitCode.OK: "done",
    ExitCode.FAILED: "the job, the deployment or the check failed; the service did not start",
    ExitCode.USAGE: "wrong usage of the command",
    ExitCode.REFUSED: "the service (or the file check) refused what was asked",
    ExitCode.UNREACHABLE: "the service cannot be reached, or is not ready",
    ExitCode.HELD: "another `dpo up` holds the data directory",
}


class CliError(Exception):
    """Ends the command with `code`; the message is shown as it is."""

    def __init__(self, message: str, code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.code = code


class Refused(CliError):
    """The service answered with an error."""

    def __init__(self, message: str, *, status: int, error_code: str | None = None, param: str | None = None) -> None:
        super().__init__(message, ExitCode.UNREACHABLE if status in (502, 503, 504) else ExitCode.REFUSED)
        self.status, self.error_code, self.param = status, error_code, param
