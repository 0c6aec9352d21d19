"""`dpo chat`: one question, or a conversation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from dpo_service.cli.client import Json, Service
from dpo_service.cli.context import ApiKey, AsJson, DataDir, Url, connect

LEAVE = frozenset({"/quit", "/exit", "/q"})


def register(app: typer.Typer) -> None:
    app.command("chat")(chat)


def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model that is being served.")],
    message: Annotated[str | None, typer.Argument(help="Ask this and leave; without it, a conversation.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2)] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    url: Url = None,
    api_key: ApiKey = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Talk to a model that is being served. In a conversation, /new starts over and /quit (or Ctrl-D) leaves."""
    service = connect(url, api_key, data_dir)
    options = {"temperature": temperature, "max_tokens": max_tokens}
    body: Json = {"model": model, **{name: value for name, value in options.items() if value is not None}}
    opening = [{"role": "system", "content": system}] if system else []
    if message is not None:
        _ask_once(service, body, [*opening, {"role": "user", "content": message}], as_json=as_json)
    else:
        _converse(service, body, opening)


def answer_pieces(service: Service, body: Json, messages: list[Json]) -> Iterator[str]:
    """The answer to a conversation, piece by piece as it is made."""
    for chunk in service.stream("POST", "/v1/chat/completions", {**body, "messages": messages, "stream": True}):
        if "error" in chunk:
            from dpo_service.cli.exits import CliError

            raise CliError(chunk["error"].get("message") or "the model's engine failed; see: dpo models")
        for choice in chunk.get("choices", []):
            yield choice["delta"].get("content") or ""


def _ask_once(service: Service, body: Json, messages: list[Json], *, as_json: bool) -> None:
    if as_json:
        from dpo_service.cli.output import print_json

        print_json(service.post("/v1/chat/completions", {**body, "messages": messages}))
        return
    _show(answer_pieces(service, body, messages))


def _converse(service: Service, body: Json, opening: list[Json]) -> None:
    from dpo_service.cli.exits import Refused
    from dpo_service.cli.output import err

    messages = list(opening)
    while True:
        try:
            question = input("you> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if question in LEAVE:
            return
        if question == "/new" or not question:
            messages = list(opening) if question else messages
            continue
        messages.append({"role": "user", "content": question})
        try:
            messages.append({"role": "assistant", "content": _show(answer_pieces(service, body, messages))})
        except Refused as error:
            # What was asked stays out of the conversation, so that the next question can be answered.
            messages.pop()
            if error.status == 404:
                raise
            err.print(f"error: {error}", markup=False)


def _show(pieces: Iterator[str]) -> str:
    """Print the pieces as they come; returns the whole."""
    whole = ""
    for piece in pieces:
        text = piece if whole else piece.lstrip()
        whole += text
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return whole
