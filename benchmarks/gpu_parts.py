"""Parts of a step on a CUDA device, each by itself: attention, the output head, a layer under an adapter, AdamW.

`gpu_step` runs it first. Times are of a forward and a backward pass where there is one; rates count useful operations.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo_service.specs.optim import OptimSpec
from dpo_service.train.attention import flex, sdpa, varlen
from dpo_service.train.attention.interface import row_layout
from dpo_service.train.attention.layout import Segment
from dpo_service.train.head import Head, head_logps
from dpo_service.train.optim import build_optimizer

DTYPE = torch.bfloat16
REPEATS = 5
BUDGET_S = 0.6


class Size(NamedTuple):
    tokens: int
    hidden: int
    inner: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    weights: int
    """Parameters that AdamW moves."""


FULL = Size(10_240, 4096, 14_336, 32, 8, 128, 128_256, 500_000_000)
TINY = Size(256, 64, 128, 4, 2, 16, 300, 100_000)


def measurements(device: str, *, tiny: bool) -> Iterator[dict[str, Any]]:
    """An entry a part and way; one that fails has the reason."""
    size = TINY if tiny else FULL
    parts: list[tuple[str, str, Callable[[], tuple[Callable[[], Any], float]]]] = [
        *(("attention", name, partial(_attention, name, size, device)) for name in _attentions(device)),
        *(("head", name, partial(_head, name, size, device)) for name in ("one piece", "chunks")),
        *(("adapter", name, partial(_adapter, name, size, device)) for name in ("none", "peft", "own")),
        *(("adamw", name, partial(_adamw, name, size, device)) for name in ("float32", "pure bfloat16", "8 bits")),
    ]
    for part, way, build in parts:
        entry: dict[str, Any] = {"part": part, "way": way}
        try:
            run, operations = build()
            seconds = _median(run, device)
            entry |= {"milliseconds": seconds * 1e3, "tflops": operations / seconds / 1e12}
        except Exception as error:  # whatever it is, the other parts are to have their turn
            entry["failed"] = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        run = None  # type: ignore[assignment]  # it holds the arrays
        if device == "cuda":
            torch.cuda.empty_cache()
        yield entry


def _median(run: Callable[[], Any], device: str) -> float:
    """Seconds of one call, without the first two."""
    seconds: list[float] = []
    for _ in range(REPEATS + 2):
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        seconds.append(time.perf_counter() - started)
        if len(seconds) > 3 and sum(seconds[2:]) > BUDGET_S:
            break
    return statistics.median(seconds[2:])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _attentions(device: str) -> list[str]:
    return ["varlen", "cudnn", "flex", "sdpa"] if device == "cuda" else ["sdpa"]


def _attention(name: str, size: Size, device: str) -> tuple[Callable[[], Any], float]:
    """Two pairs, each with a prompt of 2/5 of its tokens."""
    pair = size.tokens // 2
    prompt, answer = 2 * pair // 5, 3 * pair // 10
    segments = [Segment(start, prompt, answer, answer) for start in (0, prompt + 2 * answer)]
    layout = row_layout(segments, torch.device(device))
    total = segments[-1].end

    def states(heads: int) -> Tensor:
        return torch.randn(1, heads, total, size.head_size, device=device, dtype=DTYPE, requires_grad=True)

    query, key, value = states(size.heads), states(size.key_heads), states(size.key_heads)
    attends = {"varlen": varlen.attend, "flex": flex.attend, "sdpa": sdpa.attend, "cudnn": _cudnn}
    gradient = torch.randn(1, total, size.heads, size.head_size, device=device, dtype=DTYPE)

    def run() -> None:
        output = attends[name](query, key, value, layout, scaling=None)
        torch.autograd.grad(output, (query, key, value), gradient)

    seen = sum(
        (s.prompt + s.chosen) * (s.prompt + s.chosen + 1) / 2 + s.rejected * (s.prompt + (s.rejected + 1) / 2)
        for s in segments
    )
    return run, 3 * 4 * size.heads * size.head_size * seen


def _cudnn(query_1HTD: Tensor, key_1KTD: Tensor, value_1KTD: Tensor, layout: Any, *, scaling: float | None) -> Tensor:
    """cuDNN's kernel over whole sequences, the prompt's queries a second time: it knows no causal mask aligned to the
    end of longer keys. An experiment: not among our backends."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    outputs = []
    for s in layout.segments:
        parts = [states[0].split([s.start, s.prompt, s.chosen, s.rejected, states.shape[2] - s.end], 1)[1:4]
                 for states in (query_1HTD, key_1KTD, value_1KTD)]  # fmt: skip
        pair = [torch.stack([torch.cat([p, c], 1), torch.cat([p, r], 1)]) for p, c, r in parts]
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            output = nn.functional.scaled_dot_product_attention(*pair, is_causal=True, scale=scaling, enable_gqa=True)
        outputs += [output[0], output[1, :, s.prompt :]]
    return torch.cat(outputs, 1).transpose(0, 1)[None]


def _head(name: str, size: Size, device: str) -> tuple[Callable[[], Any], float]:
    """Frozen weights, as under an adapter; 60% of the tokens are answers'. One piece is all logits at one time."""
    tokens = 6 * size.tokens // 10
    module = nn.Linear(size.hidden, size.vocabulary, bias=False, device=device, dtype=DTYPE).requires_grad_(False)
    hidden = torch.randn(tokens, size.hidden, device=device, dtype=DTYPE, requires_grad=True)
    target = torch.randint(size.vocabulary, (tokens,), device=device)

    def run() -> None:
        if name == "chunks":
            logps = head_logps(Head(module), hidden, target).logps_C
        else:
            logps = -nn.functional.cross_entropy(module(hidden), target, reduction="none")
        torch.autograd.grad(logps.sum(), hidden)

    return run, 4.0 * tokens * size.hidden * size.vocabulary


def _adapter(name: str, size: Size, device: str) -> tuple[Callable[[], Any], float]:
    """The widest layer, frozen in bfloat16, and an adapter of rank 16 over it in float32."""
    from peft import LoraConfig, get_peft_model

    from dpo_service.train.lora_linear import LoraLinear

    layer = nn.Linear(size.hidden, size.inner, bias=False, device=device, dtype=DTYPE).requires_grad_(False)
    module: Any = nn.Sequential(layer)
    if name != "none":
        config = LoraConfig(r=16, target_modules=["0"], init_lora_weights=False)
        if name == "own":
            config._register_custom_module({nn.Linear: LoraLinear})
        module = get_peft_model(module, config).eval()
    states = torch.randn(size.tokens, size.hidden, device=device, dtype=DTYPE, requires_grad=True)
    gradient = torch.randn(size.tokens, size.inner, device=device, dtype=DTYPE)
    wanted = [states, *(p for p in module.parameters() if p.requires_grad)]

    def run() -> None:
        with torch.autocast(device, DTYPE):
            output = module(states)
        torch.autograd.grad(output, wanted, gradient)

    return run, 4.0 * size.tokens * size.hidden * size.inner


def _adamw(name: str, size: Size, device: str) -> tuple[Callable[[], Any], float]:
    dtype = DTYPE if name == "pure bfloat16" else torch.float32
    module = nn.Linear(1000, size.weights // 1000, bias=False, device=device, dtype=dtype)
    optimizer = build_optimizer(
        module, OptimSpec(learning_rate=1e-6, optimizer="adamw_8bit" if name == "8 bits" else "adamw")
    )
    module.weight.grad = torch.randn_like(module.weight)
    return optimizer.step, 12.0 * size.weights


def line(entry: dict[str, Any]) -> str:
    start = f"{entry['part']:>9} {entry['way']:<14}"
    if "failed" in entry:
        return f"{start} {entry['failed'][:120]}"
    return f"{start} {entry['milliseconds']:9.2f} ms {entry['tflops']:8.2f} TFLOP/s"
