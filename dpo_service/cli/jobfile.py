"""A job document from a YAML file, from options, or both. What it holds is checked by the service, not here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dpo_service.cli.exits import CliError, ExitCode

DOCUMENT_SUFFIXES = (".yaml", ".yml")
FILE_FIELDS = ("training_file", "validation_file", "mix.file")
HYPERPARAMETERS = (
    "batch_size", "n_epochs", "learning_rate_multiplier", "loss", "losses", "beta", "label_smoothing", "discopop_tau",
    "length_penalty", "rpo_alpha", "wpo", "ld_alpha", "length_normalize", "lam", "gamma_beta_ratio", "desirable_weight",
    "undesirable_weight", "accepted", "rejection_beta", "win_scale",
)  # fmt: skip
"""What `--set name=value` puts into the method's own block."""

Document = dict[str, Any]


def build(file: Path, *, model: str | None, method: str | None, settings: Iterable[str], deploy: bool) -> Document:
    """The job that `dpo submit` sends. `file` is a job file (YAML), or rows to train on.

    Raises:
        CliError: the file cannot be read, is no document, or a setting is malformed.
    """
    if not file.is_file():
        raise CliError(f"there is no file {file}", ExitCode.USAGE)
    document: Document = load(file) if file.suffix.lower() in DOCUMENT_SUFFIXES else {"training_file": str(file)}
    if model:
        document["model"] = model
    if method:
        _set_method(document, method)
    document.setdefault("method", {"type": "dpo"})
    for setting in settings:
        _apply(document, setting)
    if deploy:
        document["deploy"] = True
    if not document.get("model"):
        raise CliError("which model is to be trained? Add --model, or `model:` to the job file", ExitCode.USAGE)
    return document


def load(path: Path) -> Document:
    """The document in a YAML file; local files it names are taken relative to it."""
    import yaml

    try:
        document: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CliError(f"{path} is no readable YAML: {error}", ExitCode.USAGE) from None
    if not isinstance(document, dict):
        raise CliError(f"{path} holds no job: a mapping with model, training_file and method is needed", ExitCode.USAGE)
    found: Document = document
    for field in FILE_FIELDS:
        name = _named(found, field)
        if isinstance(name, str) and not Path(name).is_file() and (path.parent / name).is_file():
            found = with_file(found, field, str(path.parent / name))
    return found


def local_files(document: Document) -> dict[str, Path]:
    """The fields that name a file on this machine, to be uploaded first.

    Raises:
        CliError: a field names neither an uploaded file (file-...) nor a file that is here.
    """
    found: dict[str, Path] = {}
    for field in FILE_FIELDS:
        name = _named(document, field)
        if not isinstance(name, str) or name.startswith("file-"):
            continue
        if not Path(name).is_file():
            raise CliError(f"{field}: there is no file {name!r}, and it is no id of an uploaded one", ExitCode.USAGE)
        found[field] = Path(name)
    return found


def _named(document: Document, field: str) -> Any:
    value: Any = document
    for part in field.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def with_file(document: Document, field: str, name: str) -> Document:
    """The document with `name` in one of its `FILE_FIELDS`."""
    first, _, rest = field.partition(".")
    return document | {first: with_file(document[first], rest, name) if rest else name}


def _set_method(document: Document, method: str) -> None:
    current = document.get("method")
    if not isinstance(current, dict) or current.get("type") != method:
        document["method"] = {"type": method}


def _apply(document: Document, setting: str) -> None:
    """`eval.split=0.1` sets a nested field; a bare hyperparameter goes to the method's block."""
    import yaml

    key, found, text = setting.partition("=")
    if not found or not key.strip():
        raise CliError(
            f"--set {setting!r}: write it as key=value, for instance --set learning_rate=1e-5", ExitCode.USAGE
        )
    path = key.strip().split(".")
    if path[0] in HYPERPARAMETERS:
        kind = document["method"].get("type", "dpo") if isinstance(document["method"], dict) else "dpo"
        path = ["method", kind, "hyperparameters", *path]
    try:
        value = _number(text) if _number(text) is not None else yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CliError(f"--set {setting!r}: {error}", ExitCode.USAGE) from None
    target = document
    for part in path[:-1]:
        if not isinstance(target.get(part), dict):
            target[part] = {}
        target = target[part]
    target[path[-1]] = value


def _number(text: str) -> int | float | None:
    """YAML 1.1 reads `1e-5` as text; a user means a number."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None
