"""Headers of weight files: what is there, and what is refused without reading a weight."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from dpo_service.errors import ModelRefused
from dpo_service.storage.weights import INDEX, SINGLE, quantised_as, renaming, stored_weights

HALVES = {"a.safetensors": {"x": np.zeros((2, 3), np.float32)}, "b.safetensors": {"y": np.ones(5, np.float16)}}


def sharded(directory, **changed):
    for file, weights in HALVES.items():
        save_file(weights, directory / file)
    weight_map = {name: file for file, weights in HALVES.items() for name in weights} | changed
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def refusal(directory):
    with pytest.raises(ModelRefused) as caught:
        stored_weights(directory)
    assert caught.value.param == "model"
    return caught.value.message


def test_shards_are_read_as_one(tmp_path):
    save_file({"stray": np.zeros(1)}, sharded(tmp_path) / "leftover.safetensors")
    found = stored_weights(tmp_path)
    assert {name: (w.dtype, w.shape, w.file) for name, w in found.items()} == {
        "x": ("F32", (2, 3), "a.safetensors"),
        "y": ("F16", (5,), "b.safetensors"),
    }


def test_a_missing_shard_is_named(tmp_path):
    (sharded(tmp_path) / "b.safetensors").unlink()
    assert "names 2 files and 1 of them are missing (b.safetensors)" in refusal(tmp_path)


def test_a_weight_that_is_not_in_its_shard_is_named(tmp_path):
    assert "1 weights are not in the file that" in refusal(sharded(tmp_path, z="a.safetensors"))
    assert "(z)" in refusal(tmp_path)


def test_a_weight_that_is_there_twice_is_named(tmp_path):
    save_file({"x": np.zeros(1), "y": np.zeros(1)}, sharded(tmp_path) / "b.safetensors")
    assert "weight x is in a.safetensors and in b.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("place", ["../a.safetensors", "/etc/passwd"])
def test_an_index_that_points_elsewhere_is_refused(tmp_path, place):
    assert "is no file of this directory" in refusal(sharded(tmp_path, x=place))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', "{" * 5000])
def test_an_index_that_cannot_be_read_is_refused(tmp_path, text):
    (sharded(tmp_path) / INDEX).write_text(text)
    assert "index.json cannot be read" in refusal(tmp_path)


def test_other_names_for_a_weight_file_do_not_count(tmp_path):
    save_file({"x": np.zeros(1)}, tmp_path / "weights.safetensors")
    assert "only weights.safetensors" in refusal(tmp_path)


def header(entries):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"torn",
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 4) + b"[1,2]",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc",
        header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}),
        header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}) + bytes(8),
        header({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}) + bytes(8),
        header({"x": {"dtype": "F32", "shape": "ab", "data_offsets": [0, 8]}}) + bytes(8),
        header({"x": {"dtype": "F32"}}),
        header({"x": 7}),
    ],
)
def test_a_file_that_is_cut_short_or_is_none_is_refused(tmp_path, content):
    (tmp_path / SINGLE).write_bytes(content)
    assert SINGLE in refusal(tmp_path)


def test_a_whole_file_is_not_refused(tmp_path):
    content = header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}) + bytes(8)
    (tmp_path / SINGLE).write_bytes(content)
    assert stored_weights(tmp_path)["x"].numbers == 2


@pytest.mark.parametrize(
    ("names", "wrapped"),
    [
        (["model.embed_tokens.weight", "lm_head.weight"], False),
        (["transformer.module_list.0.weight"], False),
        (["_orig_mod.lm_head.weight"], True),
        (["base_model.model.model.norm.weight"], True),
        (["module._orig_mod.lm_head.weight"], True),
        (["model.layers.0._orig_mod.mlp.up_proj.weight"], True),
    ],
)
def test_names_under_wrappers_are_recognised(names, wrapped):
    assert bool(renaming(names)) is wrapped


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "bitsandbytes", "torchao", "hqq"])
def test_a_quantised_checkpoint_that_is_not_read_says_what_to_give(method):
    with pytest.raises(ModelRefused, match=rf"quantised \({method}\).*give the model it was made from"):
        quantised_as({"quantization_config": {"quant_method": method}})


def test_numbers_and_those_that_are_turned_into_numbers():
    assert quantised_as({}) is None
    assert quantised_as({"quantization_config": None}) is None
    assert quantised_as({"quantization_config": {"quant_method": "fp8"}}) == "fp8"
    with pytest.raises(ModelRefused, match="bitsandbytes"):
        quantised_as({"text_config": {"quantization_config": {"load_in_4bit": True}}})
