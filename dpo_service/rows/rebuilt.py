"""The classes of tokenizers that transformers 5 builds anew from their vocabulary and merges, whatever else
tokenizer.json holds: the rules here are those of its `models/*/tokenization_*.py`, as sections of a tokenizer.json.

A class that is not here is read as its file is. A test holds the tables to transformers, and the inspection of a model
holds its tokenizer to AutoTokenizer (`inspection/tokenizer.py`), so a rule that changes there is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
BYTE_LEVEL = "ByteLevel"
_BPE: Json = {
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}
_NO_AFFIXES: Json = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
_PIECES: Json = {"fuse_unk": True, "byte_fallback": True}
_QWEN_2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_3_5 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END = "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    """How one class is built."""

    sections: Callable[[Json], Json]
    """tokenizer_config.json -> sections that replace those of tokenizer.json."""
    named: Mapping[str, str]
    """Special tokens that the class has where the configuration does not name them."""
    renews_special: bool = False
    """The class adds its special tokens once more, without what the configuration knows of spaces around them."""
    begins: bool = False
    """The class puts the beginning-of-sequence token before a text, whatever tokenizer.json does."""


def _model(**settings: Any) -> Json:
    return {"type": "BPE", **_BPE, **settings}


def _byte_level(prefix: object = False, *, use_regex: bool = True) -> Json:
    return {"type": BYTE_LEVEL, "add_prefix_space": bool(prefix), "trim_offsets": True, "use_regex": use_regex}


def _sequence(kind: str, *steps: Json) -> Json:
    return {"type": "Sequence", kind: list(steps)}


def _spaces_back(*more: Json) -> Json:
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    return _sequence("decoders", replace, {"type": "ByteFallback"}, {"type": "Fuse"}, *more)


def _metaspace(scheme: str) -> Json:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}


def _llama(config: Json) -> Json:
    prefix = config.get("add_prefix_space")
    scheme = "never" if prefix is not None and not prefix else "always" if config.get("legacy", False) else "first"
    strip = [] if scheme == "never" else [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return {
        "model": _model(**_PIECES),
        "normalizer": None,
        "pre_tokenizer": _metaspace(scheme),
        "decoder": _spaces_back(*strip),
    }


def _code_llama(config: Json) -> Json:
    prefix = config.get("add_prefix_space")
    return {
        "model": _model(**_PIECES, unk_token=_unknown(config, "<unk>")),
        "normalizer": None,
        "pre_tokenizer": _metaspace("never" if prefix is not None and not prefix else "first"),
        "decoder": _spaces_back({"type": "Strip", "content": " ", "start": 1, "stop": 0}),
        "post_processor": None,
    }


def _gemma(config: Json) -> Json:
    return {
        "model": _model(**_PIECES, unk_token=_unknown(config, "<unk>")),
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "decoder": _spaces_back(),
    }


def _unknown(config: Json, usual: str) -> str:
    token = config.get("unk_token", usual)
    return str(token.get("content") if isinstance(token, dict) else token)


def _qwen(pattern: str) -> Callable[[Json], Json]:
    def sections(config: Json) -> Json:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        return _bytes(_byte_level(config.get("add_prefix_space"), use_regex=False), split, normalizer={"type": "NFC"})

    return sections


def _bytes(last: Json, *before: Json, normalizer: Json | None) -> Json:
    return {
        "model": _model(**_NO_AFFIXES),
        "normalizer": normalizer,
        "pre_tokenizer": _sequence("pretokenizers", *before, last) if before else last,
        "decoder": _byte_level(True),
    }


def _gpt2(config: Json) -> Json:
    return _bytes(_byte_level(config.get("add_prefix_space")), normalizer=None)


def _gpt_neox(config: Json) -> Json:
    # It is without the file's post-processor: that class writes one of its own that adds nothing.
    return _bytes(_byte_level(config.get("add_prefix_space")), normalizer={"type": "NFC"}) | {"post_processor": None}


def _cohere(config: Json) -> Json:
    digits = {"type": "Digits", "individual_digits": True}
    return _bytes(_byte_level(config.get("add_prefix_space")), digits, normalizer={"type": "NFC"})


_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_INFILLING = {
    "prefix_token": "▁<PRE>",
    "middle_token": "▁<MID>",
    "suffix_token": "▁<SUF>",
    "eot_token": "▁<EOT>",
    "fill_token": "<FILL_ME>",
}
_GPT2 = {"bos_token": _END, "eos_token": _END, "unk_token": _END}
_QWEN = {"eos_token": _END, "unk_token": _END, "pad_token": _END}
_GEMMA = {
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
_COHERE = {
    "bos_token": "<BOS_TOKEN>",
    "eos_token": "<|END_OF_TURN_TOKEN|>",
    "unk_token": "<UNK>",
    "sep_token": "<SEP>",
    "pad_token": "<PAD>",
    "cls_token": "<CLS>",
    "mask_token": "<MASK_TOKEN>",
}

RECIPES: Mapping[str, Recipe] = {
    "LlamaTokenizer": Recipe(_llama, _LLAMA),
    "CodeLlamaTokenizer": Recipe(_code_llama, _LLAMA | _INFILLING, begins=True),
    "GemmaTokenizer": Recipe(_gemma, _GEMMA),
    "Qwen2Tokenizer": Recipe(_qwen(_QWEN_2), _QWEN, renews_special=True),
    "Qwen3_5Tokenizer": Recipe(_qwen(_QWEN_3_5), _QWEN),
    "GPT2Tokenizer": Recipe(_gpt2, _GPT2),
    "CodeGenTokenizer": Recipe(_gpt2, _GPT2),
    "GPTNeoXTokenizer": Recipe(_gpt_neox, _GPT2 | {"pad_token": "<|padding|>"}),
    "CohereTokenizer": Recipe(_cohere, _COHERE),
}

AS_STORED = "TokenizersBackend"
"""The class that reads tokenizer.json as it is."""

_MODELS: Mapping[str, str] = {
    AS_STORED: (
        "aria beam bigbird_pegasus ernie4_5 ernie4_5_moe flex_olmo fuyu glm glm4 glm4_moe glm4_moe_lite glm4v "
        "glm4v_moe got_ocr2 gpt_bigcode granite granitemoe granitemoehybrid granitemoeshared hyperclovax internlm2 "
        "internlm3 iquestcoder jamba kimi_k25 kimi_linear kosmos-2 llava llava_next mimo_v2_flash minicpm3 "
        "minicpm_ocr minicpmv4_6 minicpmv4_7 minimax_m2 ministral ministral3 mistral mistral3 mistral_large4 mixtral "
        "modernbert-decoder molmo2 nemotron olmo2 olmo3 olmo_hybrid paddleocr_vl persimmon phi3 phimoe pix2struct "
        "pixtral smolvlm stablelm vipllava xlm-roberta-xl"
    ),
    "LlamaTokenizer": "idefics idefics2",
    "CodeLlamaTokenizer": "code_llama",
    "GemmaTokenizer": (
        "diffusion_gemma gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text recurrent_gemma shieldgemma2 zaya"
    ),
    "Qwen2Tokenizer": (
        "cosmos3_omni dots3_note hunyuan_vl internvl lighton_ocr moss_transcribe_diarize ovis2 qianfan_ocr qwen2 "
        "qwen2_5_vl qwen2_moe qwen2_vl qwen3 qwen3_moe qwen3_next qwen3_vl qwen3_vl_moe"
    ),
    "Qwen3_5Tokenizer": "qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen4_exp",
    "GPT2Tokenizer": (
        "blip-2 codegen dbrx emu3 gpt2 gpt_neo gptj hyperclovax_vision_v2 instructblip instructblipvideo jais2 opt phi "
        "starcoder2"
    ),
    "GPTNeoXTokenizer": "falcon_mamba gpt_neox mamba mamba2 mpt olmo olmoe rwkv xlstm",
    "CohereTokenizer": "aya_vision cohere cohere2",
}
REGISTERED: Mapping[str, str] = {kind: name for name, kinds in _MODELS.items() for kind in kinds.split()}
"""The class that transformers knows for a `model_type`, those with a recipe and those read as they are."""
MISDECLARED = frozenset({"qwen2", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp", "hyperclovax_vision_v2"})
"""Of these, the registered class is taken also where the configuration names another one."""


@dataclass(frozen=True)
class Declared:
    """What a model directory says of its tokenizer's class."""

    model_type: str
    tokenizer_class: str
    """Of tokenizer_config.json, else of config.json; "" where neither names one."""
    has_code: bool = False
    """The model brings code of its own for it, which is not run."""
    byte_level: bool = field(default=False)
    """tokenizer.json mentions byte-level rules."""

    @property
    def built_as(self) -> str:
        """As AutoTokenizer chooses the class: one of `RECIPES`, or that which reads the file as it is."""
        registered = REGISTERED.get(self.model_type, "")
        wanted = self.tokenizer_class.removesuffix("Fast")
        if wanted == "LlamaTokenizer" and self.byte_level and not self.has_code and not self._misdeclared:
            return AS_STORED
        if wanted and registered and not self.has_code:
            wanted = registered if self._misdeclared or registered == AS_STORED else wanted
        name = wanted or registered
        return name if name in RECIPES else AS_STORED

    @property
    def _misdeclared(self) -> bool:
        return self.model_type in MISDECLARED
