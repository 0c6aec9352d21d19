"""Small tokenizers in the layouts in which families of models publish theirs: files only, no transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tests.models import TEXT

Json = dict[str, Any]
LLAMA_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% else %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
TINYLLAMA_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UNDERLINE = "▁"


def token(number: int, content: str, **flags: bool) -> Json:
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": content, **usual, **flags}


@cache
def _trained(kind: str, specials: tuple[str, ...]) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet, first, size = pre_tokenizers.ByteLevel.alphabet(), list(specials), 380
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        alphabet, first, size = [UNDERLINE, "\n"], [*specials, *(f"<0x{n:02X}>" for n in range(256))], 400
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=first, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer.to_str()


def _state(kind: str, specials: tuple[str, ...]) -> Json:
    state: Json = json.loads(_trained(kind, specials))
    state["added_tokens"] = [token(number, content) for number, content in enumerate(specials)]
    return state


def pieces(*specials: str) -> Json:
    """tokenizer.json of pieces with ▁ for a space and bytes for what has no piece, as Llama 2's and TinyLlama's."""
    state = _state("pieces", specials)
    state["model"] |= {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    prepend = {"type": "Prepend", "prepend": UNDERLINE}
    state["normalizer"] = {"type": "Sequence", "normalizers": [prepend, spaces_to_underlines()]}
    state["pre_tokenizer"] = None
    state["post_processor"] = beginning("<s>", 1)
    steps = [{"type": "Replace", "pattern": {"String": UNDERLINE}, "content": " "}, {"type": "ByteFallback"}]
    state["decoder"] = {"type": "Sequence", "decoders": [*steps, {"type": "Fuse"}]}
    return state


def spaces_to_underlines() -> Json:
    return {"type": "Replace", "pattern": {"String": " "}, "content": UNDERLINE}


def of_bytes(*specials: str) -> Json:
    """tokenizer.json of byte-level pieces, as GPT-2's, Llama 3's and Qwen's."""
    state = _state("bytes", specials)
    state["pre_tokenizer"] = byte_level()
    state["decoder"] = byte_level()
    return state


def byte_level(prefix: bool = False, *, use_regex: bool = True) -> Json:
    return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": use_regex}


def beginning(text: str, number: int) -> Json:
    first = {"SpecialToken": {"id": text, "type_id": 0}}
    whole = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, whole],
        "pair": [first, whole, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {text: {"id": text, "ids": [number], "tokens": [text]}},
    }


def save(directory: Path, state: Json, config: Json, *, model_type: str = "llama", **files: Json) -> Path:
    """`files` by name without .json, as special_tokens_map."""
    directory.mkdir(parents=True, exist_ok=True)
    contents = {"tokenizer": state, "tokenizer_config": config, "config": {"model_type": model_type}, **files}
    for name, content in contents.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
BYTES_NAMES = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
BYTES_SPECIALS = ("<|bos|>", "<|eos|>", "<|pad|>")


def llama(directory: Path, **config: Any) -> Path:
    """As Llama 2 and TinyLlama: the file puts ▁ before every stretch between special tokens, the class before the
    text only."""
    config = {"tokenizer_class": "LlamaTokenizer", **NAMES, "chat_template": TINYLLAMA_TEMPLATE, **config}
    return save(directory, pieces("<unk>", "<s>", "</s>"), config)


def llama_turns(directory: Path) -> Path:
    return llama(directory, chat_template=LLAMA_TEMPLATE, add_bos_token=True, add_eos_token=False)


def llama_legacy(directory: Path) -> Path:
    return llama(directory, legacy=True)


def llama_without_prefix(directory: Path) -> Path:
    return llama(directory, add_prefix_space=False)


def llama_with_lost_tokens(directory: Path) -> Path:
    """tokenizer.json has an added token that the configuration's list does not."""
    state = pieces("<unk>", "<s>", "</s>")
    state["added_tokens"].append(token(len(state["model"]["vocab"]), "<|tool|>"))
    listed = {str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in state["added_tokens"][:3]}
    config = {"tokenizer_class": "LlamaTokenizerFast", **NAMES, "added_tokens_decoder": listed}
    return save(directory, state, config)


def code_llama(directory: Path) -> Path:
    """The class writes the beginning of a sequence, and the file does not."""
    state = pieces("<unk>", "<s>", "</s>") | {"post_processor": None}
    return save(directory, state, {"tokenizer_class": "CodeLlamaTokenizer", **NAMES}, model_type="code_llama")


def code_llama_without_beginning(directory: Path) -> Path:
    config = {"tokenizer_class": "CodeLlamaTokenizer", **NAMES, "bos_token": None}
    return save(directory, pieces("<unk>", "<s>", "</s>"), config, model_type="code_llama")


def llama_of_bytes(directory: Path) -> Path:
    """As Llama 3 and DeepSeek: byte-level, with a declared class that is not."""
    return save(directory, of_bytes(*BYTES_SPECIALS), {"tokenizer_class": "LlamaTokenizerFast", **BYTES_NAMES})


def mistral(directory: Path) -> Path:
    config = {"tokenizer_class": "LlamaTokenizer", **NAMES, "add_bos_token": True}
    return save(directory, pieces("<unk>", "<s>", "</s>"), config, model_type="mistral")


def phi3(directory: Path) -> Path:
    """Tokens around which spaces vanish, declared in tokenizer_config.json otherwise than in tokenizer.json."""
    state = pieces("<unk>", "<s>", "</s>")
    state["added_tokens"] += [token(len(state["model"]["vocab"]), "<|end|>", rstrip=True)]
    listed = {str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in state["added_tokens"]}
    listed[str(len(state["model"]["vocab"]))] |= {"rstrip": False, "lstrip": True, "special": False}
    config = {"tokenizer_class": "LlamaTokenizer", **NAMES, "added_tokens_decoder": listed}
    return save(directory, state, config, model_type="phi3")


def gemma(directory: Path) -> Path:
    state = pieces("<unk>", "<s>", "</s>", "<pad>", "<mask>")
    state["normalizer"] = spaces_to_underlines()
    config = {"tokenizer_class": "GemmaTokenizerFast", **NAMES, "pad_token": "<pad>"}
    return save(directory, state, config, model_type="gemma2")


def qwen2(directory: Path, declared: str = "Qwen2Tokenizer", model_type: str = "qwen2") -> Path:
    """The file's own rules are of GPT-2; the class has Qwen's, and special tokens without flags."""
    state = of_bytes("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    state["added_tokens"][2] |= {"lstrip": True, "rstrip": True}
    config = {
        "tokenizer_class": declared,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "chat_template": CHATML,
    }
    return save(directory, state, config, model_type=model_type)


def qwen2_misdeclared(directory: Path) -> Path:
    return qwen2(directory, "PreTrainedTokenizerFast")


def qwen3_misdeclared(directory: Path) -> Path:
    return qwen2(directory, "PreTrainedTokenizerFast", "qwen3")


def qwen3_5(directory: Path) -> Path:
    return qwen2(directory, "Qwen2Tokenizer", "qwen3_5")


def gpt2(directory: Path, **config: Any) -> Path:
    config = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_eos_token": True, **config}
    return save(directory, of_bytes("<|endoftext|>"), config, model_type="gpt2")


def gpt2_with_prefix(directory: Path) -> Path:
    return gpt2(directory, add_prefix_space=True)


def gpt2_undeclared(directory: Path) -> Path:
    """No class anywhere: the model's decides, with tokens of its own."""
    return save(directory, of_bytes("<|endoftext|>"), {}, model_type="gpt2")


def gpt_neox(directory: Path) -> Path:
    state = of_bytes("<|endoftext|>", "<|padding|>") | {"post_processor": beginning("<|endoftext|>", 0)}
    return save(directory, state, {"tokenizer_class": "GPTNeoXTokenizer"}, model_type="gpt_neox")


def cohere(directory: Path) -> Path:
    state = of_bytes("<PAD>", "<UNK>", "<CLS>", "<SEP>", "<MASK_TOKEN>", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>")
    return save(directory, state, {"tokenizer_class": "CohereTokenizerFast"}, model_type="cohere")


def plain(directory: Path, **config: Any) -> Path:
    """Falcon's, SmolLM's, OLMo's: read as it is."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **BYTES_NAMES, **config}
    state = of_bytes(*BYTES_SPECIALS) | {"post_processor": beginning("<|bos|>", 0)}
    return save(directory, state, config)


def prefix_in_name_only(directory: Path) -> Path:
    return plain(directory, add_prefix_space=True, clean_up_tokenization_spaces=True, add_eos_token=True)


def special_tokens_split(directory: Path) -> Path:
    return plain(directory, split_special_tokens=True)


def named_token_declared_as_plain(directory: Path) -> Path:
    """A token with a name is special, whatever the list says, so it is split with the others."""
    listed = {"353": {k: v for k, v in token(353, "<|end|>", special=False).items() if k != "id"}}
    return plain(directory, split_special_tokens=True, eos_token="<|end|>", added_tokens_decoder=listed)


def special_tokens_in_config(directory: Path) -> Path:
    return plain(directory, additional_special_tokens=["<|tool|>", "<|call|>"])


def extra_special_tokens(directory: Path) -> Path:
    return plain(directory, extra_special_tokens={"image_token": "<|image|>"}, audio_token="<|audio|>")


def special_tokens_in_map(directory: Path) -> Path:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **BYTES_NAMES, "eos_token": "<|other|>"}
    return save(
        directory,
        of_bytes(*BYTES_SPECIALS),
        config,
        special_tokens_map={
            "eos_token": {"content": "<|eos|>", "rstrip": True, "lstrip": False, "normalized": False},
            "additional_special_tokens": ["<|tool|>"],
        },
        added_tokens={"<|later|>": 380, "<|pad|>": 2},
    )


def unigram(directory: Path) -> Path:
    """As T5: the class has rules of its own, and the service no recipe for them."""
    words = ["<pad>", "</s>", "<unk>", UNDERLINE, *"abcdefghijklmnopqrstuvwxyz.,", f"{UNDERLINE}the", f"{UNDERLINE}a"]
    state = pieces("<unk>", "<s>", "</s>")
    state |= {"post_processor": None, "normalizer": {"type": "Lowercase"}, "pre_tokenizer": {"type": "Whitespace"}}
    state["added_tokens"] = [token(number, content) for number, content in enumerate(words[:3])]
    state["model"] = {"type": "Unigram", "unk_id": 2, "vocab": [[word, -float(n)] for n, word in enumerate(words)]}
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "eos_token": "</s>", "unk_token": "<unk>"}
    return save(directory, state, config, model_type="t5")


def rewritten(directory: Path, name: str, **entries: Any) -> Path:
    """With other entries in the file `name`.json."""
    path = directory / f"{name}.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**known, **entries}))
    return directory


def special_tokens_listed_twice(directory: Path) -> Path:
    plain(directory, additional_special_tokens=["<|tool|>"])
    return rewritten(directory, "special_tokens_map", additional_special_tokens=["<|other|>"])


def special_tokens_in_both(directory: Path) -> Path:
    further = {"additional_special_tokens": ["<|other|>"], "extra_special_tokens": ["<|more|>"]}
    plain(directory, additional_special_tokens=["<|tool|>"])
    return rewritten(directory, "special_tokens_map", **further)


CASES: tuple[Callable[[Path], Path], ...] = (
    llama, llama_turns, llama_legacy, llama_without_prefix, llama_with_lost_tokens, llama_of_bytes, code_llama,
    code_llama_without_beginning, mistral, phi3, gemma, qwen2, qwen2_misdeclared, qwen3_misdeclared, qwen3_5, gpt2,
    gpt2_with_prefix, gpt2_undeclared, gpt_neox, cohere, plain, prefix_in_name_only, special_tokens_split,
    named_token_declared_as_plain, special_tokens_in_both, special_tokens_in_config, special_tokens_listed_twice,
    extra_special_tokens, special_tokens_in_map,
)  # fmt: skip
