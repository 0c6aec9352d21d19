"""Small random models in the Hugging Face layout, for tests that need a real directory."""

from itertools import pairwise
from pathlib import Path

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = [
    "Which colour has the red cat number 1234567890? The boat is blue. It may be green or so.",
    "hello world, this is a test of a tokenizer; nothing in it matters much",
]


def save_tokenizer(directory: Path, *, vocabulary: int = 400, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """A byte-level BPE tokenizer; no torch, no transformers."""
    import json

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    specials = ["<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "pad_token": "<|pad|>",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    if chat_template:
        config["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def save_no_weights(directory: Path) -> None:
    """A whole file with no weight in it, for a model that is not looked into."""
    (directory / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")


def tiny_config(**sizes):
    """A Llama's for the tokenizer of `save_tokenizer`; `sizes` as in LlamaConfig."""
    from transformers import LlamaConfig

    usual = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaConfig(vocab_size=400, bos_token_id=0, eos_token_id=1, pad_token_id=2, **usual | sizes)


def save_tiny_llama(
    directory: Path,
    *,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    context: int = 512,
    chat_template: str | None = CHAT_TEMPLATE,
) -> Path:
    """A random Llama of `layers` layers with a tokenizer of 400 tokens."""
    import torch
    from transformers import LlamaForCausalLM

    save_tokenizer(directory, chat_template=chat_template)
    torch.manual_seed(seed)
    config = tiny_config(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        max_position_embeddings=context,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


SAID = "Score: "


def save_scorer(directory: Path, *, context: int = 4096) -> Path:
    """A Llama that answers everything with "Score: " and a random digit from 0 to 5: each token depends on the one
    before it alone, until it is trained. So its answers end, differ, and can be read by who asks it for a score."""
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

    save_tokenizer(directory)
    known = Tokenizer.from_file(str(directory / "tokenizer.json"))
    spelt = [known.token_to_id(character) for character in SAID.replace(" ", "Ġ")]
    digits = [known.token_to_id(digit) for digit in "012345"]
    config = tiny_config(intermediate_size=64, max_position_embeddings=context, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    embedded, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        head.zero_()
        follows = [(known.token_to_id("<|assistant|>"), spelt[:1])]
        follows += [(one, [following]) for one, following in pairwise(spelt)]
        follows += [(spelt[-1], digits), *((digit, [1]) for digit in digits)]
        for place, (token, after) in enumerate(follows):
            embedded[token] = torch.nn.functional.one_hot(torch.tensor(place), 64).float()
            head[after, place] = 2.0  # a normed one-hot is 8 long, so a logit of 16 stands against zeros
    model.save_pretrained(directory)
    return directory
