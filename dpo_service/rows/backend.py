"""A model directory's tokenizer as AutoTokenizer of transformers 5 builds it from the same files, without transformers.

tokenizer.json ── the tokenizer's class ─┬─ reads it as it is ──────────┐
                                         └─ has own rules (rebuilt.py) ─┴─> with added and special tokens
tokenizer_config.json, special_tokens_map.json, added_tokens.json ─────────────────┘
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, processors

from dpo_service.rows.rebuilt import BYTE_LEVEL, RECIPES, Declared, Recipe

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class Built:
    backend: tokenizers.Tokenizer
    named: dict[str, str]
    """Special tokens by the name templates know them under: the usual ones, and a model's own."""
    config: dict[str, Any]
    """tokenizer_config.json, and what older versions keep in special_tokens_map.json."""


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def build(model_dir: Path) -> Built:
    """Raises what the libraries raise where a file cannot be read."""
    stored = (model_dir / "tokenizer.json").read_text(encoding="utf-8")
    given = read_json(model_dir / "tokenizer_config.json")
    config = given if "added_tokens_decoder" in given else _with_map(given, model_dir)
    recipe = RECIPES.get(_built_as(given, read_json(model_dir / "config.json"), stored))
    rebuilt = _rebuilt(stored, recipe, config) if recipe else None
    backend = rebuilt or tokenizers.Tokenizer.from_str(stored)
    named = _named(config, recipe.named if recipe and rebuilt else {})
    special = [*named.values(), *filter(None, map(_token, _extra(config)))]
    _add(backend, _declared_tokens(config, model_dir, stored), named, special)
    if recipe and recipe.renews_special and rebuilt:
        backend.add_tokens([AddedToken(token.content, special=True) for token in special])
    if recipe and recipe.begins and rebuilt and "bos_token" in named:
        _begin_with(backend, named["bos_token"].content)
    backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
    return Built(backend, {name: token.content for name, token in named.items()}, config)


def _with_map(given: Mapping[str, Any], model_dir: Path) -> dict[str, Any]:
    """The older map takes precedence, save for the list of further tokens."""
    older = read_json(model_dir / "special_tokens_map.json")
    config = {**given, **older}
    if given.get("extra_special_tokens") or given.get("additional_special_tokens"):
        config["additional_special_tokens"] = _extra(given)
        added = older.get("extra_special_tokens")
        if isinstance(added, list):
            config["extra_special_tokens"] = [*_extra(given), *added]
    return config


def class_of(model_dir: Path) -> str:
    """The class of transformers that builds the tokenizer of a directory with a tokenizer.json, as far as it matters:
    one of `RECIPES`, or `AS_STORED`."""
    stored = (model_dir / "tokenizer.json").read_text(encoding="utf-8")
    return _built_as(read_json(model_dir / "tokenizer_config.json"), read_json(model_dir / "config.json"), stored)


def _built_as(given: Mapping[str, Any], model: Mapping[str, Any], stored: str) -> str:
    code = given.get("auto_map")
    declared = Declared(
        model_type=model.get("model_type") or "",
        tokenizer_class=given.get("tokenizer_class") or model.get("tokenizer_class") or "",
        has_code=bool(code if isinstance(code, list) else (code or {}).get("AutoTokenizer")),
        byte_level=f'"{BYTE_LEVEL}"' in stored,
    )
    return declared.built_as


def _rebuilt(stored: str, recipe: Recipe, config: dict[str, Any]) -> tokenizers.Tokenizer | None:
    """None where tokenizer.json holds another kind of model than the class."""
    state = json.loads(stored)
    sections = recipe.sections(config)
    if "merges" not in state["model"]:
        return None
    words = {name: state["model"][name] for name in ("vocab", "merges")}
    state |= {**sections, "model": sections["model"] | words, "added_tokens": []}
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def _token(value: object) -> AddedToken | None:
    """A token as configuration files write it: its text, or an object that holds it."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = {flag: value[flag] for flag in _FLAGS if flag in value}
        return AddedToken(value["content"], **flags | {"special": True})
    return None


def _named(config: Mapping[str, Any], usual: Mapping[str, str]) -> dict[str, AddedToken]:
    """The class's own tokens where the configuration does not name them; a null there takes one away."""
    own = {name: value for name, value in config.items() if name.endswith("_token") and name not in NAMED}
    if isinstance(config.get("extra_special_tokens"), dict):
        own |= config["extra_special_tokens"]
    given = {name: config.get(name, usual.get(name)) for name in NAMED} | own
    given |= {name: token for name, token in usual.items() if name not in given}
    tokens = ((name, _token(value)) for name, value in given.items())
    return {name: token for name, token in tokens if token is not None}


def _extra(config: Mapping[str, Any]) -> list[Any]:
    """Special tokens without a name; versions before 5 call them additional."""
    lists = (config.get(name) for name in ("extra_special_tokens", "additional_special_tokens"))
    return next((tokens for tokens in lists if tokens and isinstance(tokens, list)), [])


def _declared_tokens(config: Mapping[str, Any], model_dir: Path, stored: str) -> list[AddedToken]:
    """Added tokens in the order of their ids: of tokenizer_config.json, or of the older files where it lists none."""
    if "added_tokens_decoder" in config:
        found = {int(number): AddedToken(**token) for number, token in config["added_tokens_decoder"].items()}
    else:
        named = {name: config.get(name) for name in NAMED}
        special = {token.content for token in map(_token, [*named.values(), *_extra(config)]) if token}
        found = {
            number: AddedToken(text, special=text in special, normalized=text not in special)
            for text, number in read_json(model_dir / "added_tokens.json").items()
        }
        for token in json.loads(stored)["added_tokens"]:
            found[token["id"]] = AddedToken(token["content"], **{flag: token[flag] for flag in _FLAGS if flag in token})
    return [found[number] for number in sorted(found)]


def _add(
    backend: tokenizers.Tokenizer,
    declared: Iterable[AddedToken],
    named: Mapping[str, AddedToken],
    special: Iterable[AddedToken],
) -> None:
    """Declared tokens as they are declared, then special ones that are none yet."""
    there = backend.get_added_tokens_decoder().values()
    same = {repr(token) for token in there}
    tokens = [token for token in declared if repr(token) not in same]
    names = {token.content for token in named.values()}
    for token in tokens:
        token.special = token.special or token.content in names
    known = {token.content for token in [*there, *tokens]}
    for token in special:
        if token.content not in known:
            known.add(token.content)
            tokens.append(token)
    backend.add_tokens(tokens)


def _begin_with(backend: tokenizers.Tokenizer, bos: str) -> None:
    special = [(bos, backend.token_to_id(bos))]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=special
    )
