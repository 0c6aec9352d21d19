"""The demo's base model: a small Llama with a byte-level BPE tokenizer of its own, an ordinary Hugging Face directory.

Its weights are random; the demo's supervised job teaches it to answer (half of the time badly).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

VOCABULARY = 768
CONTEXT = 256
PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|> ' + message['content'] | trim + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SHAPE = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
}


def make_base_model(directory: Path, texts: Iterable[str], *, seed: int = 0) -> int:
    """Write a model with a tokenizer trained on `texts`; returns its number of parameters. `directory` appears whole.

    The same texts and seed give the same files.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    size = _write_model(partial, _write_tokenizer(partial, texts), seed)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
    return size


def _write_tokenizer(directory: Path, texts: Iterable[str]) -> dict[str, int]:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    special = [AddedToken(text, special=True) for text in (PAD, END, SYSTEM, USER, ASSISTANT)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return {text: number for text in (PAD, END) if (number := tokenizer.token_to_id(text)) is not None}


def _write_model(directory: Path, tokens: dict[str, int], seed: int) -> int:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokens[END],
        pad_token_id=tokens[PAD],
        dtype="float32",
        initializer_range=0.06,
        **SHAPE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    # A small model's second thoughts are poor: whoever asks for no temperature gets a cool one.
    model.generation_config.update(do_sample=True, temperature=0.7)
    model.save_pretrained(directory)
    return int(model.num_parameters())
