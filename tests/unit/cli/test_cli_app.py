"""Help, exit codes and errors of the command as a whole."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from dpo_service.cli.app import run
from dpo_service.cli.exits import MEANING, ExitCode

NAMES = "up down submit jobs watch logs cancel models deploy undeploy chat data doctor demo"
COMMANDS = NAMES.split()


def test_help_names_every_command_and_exit_code(capsys):
    assert run(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(name in shown for name in COMMANDS)
    assert all(f"{int(code)} " in shown for code in ExitCode)
    assert set(MEANING) == set(ExitCode)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert run([command, "--help"]) == 0
    assert "Usage: dpo" in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    heavy = ("torch", "ray", "fastapi", "pydantic", "transformers", "sqlalchemy", "yaml")
    code = (
        "import sys\n"
        "from dpo_service.cli.app import run\n"
        "run(['--help'])\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.rstrip().endswith("[]")


def test_unknown_commands_and_options_are_usage_errors(capsys):
    assert run(["traim"]) == ExitCode.USAGE
    assert run(["jobs", "--limmit", "3"]) == ExitCode.USAGE
    assert "--limmit" in capsys.readouterr().err


def test_a_service_that_is_away_is_said_with_the_mend(capsys, unused_tcp_port):
    assert run(["jobs", "--url", f"http://127.0.0.1:{unused_tcp_port}"]) == ExitCode.UNREACHABLE
    assert "dpo up" in capsys.readouterr().err


def test_a_data_directory_without_a_service_is_not_taken_for_the_default_one(tmp_path, capsys):
    assert run(["jobs", "--data-dir", str(tmp_path / "none")]) == ExitCode.UNREACHABLE
    assert f"dpo up --data-dir {tmp_path / 'none'}" in " ".join(capsys.readouterr().err.split())


def test_with_json_an_error_is_an_object_on_stdout(capsys, unused_tcp_port):
    assert run(["jobs", "--json", "--url", f"http://127.0.0.1:{unused_tcp_port}"]) == ExitCode.UNREACHABLE
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 4
