"""Sizes of what a training step makes on its way: `train` keeps to them, `planning` counts on them without torch."""

from __future__ import annotations

CHUNK_BYTES, CUDA_CHUNK_BYTES = 2**27, 2**30
"""Logits made at one time, in float32 and in the arithmetic's type: a thousand tokens at a vocabulary of 32,000. For
each chunk the head's weight is read and its gradient added to, which keeps a GPU waiting if the chunk is small."""
MIN_CHUNK = 128
"""Fewer tokens than this would read the head's weight more often than is worth the memory."""
KEPT_LOGITS = 2**25
"""Logits in float32 whose exponentials live until the backward pass: 128 MB. One product of the head in four is spared
by it; in bfloat16 that product is cheap, and nothing is kept."""
BUCKET_BYTES = 32 << 20
"""Gradients that are summed over the ranks at one time."""


def chunk_tokens(vocabulary: int, logit_bytes: int, *, cuda: bool) -> int:
    """Tokens whose logits are made at one time; a logit takes `logit_bytes`, in all the types it exists in."""
    return max(MIN_CHUNK, (CUDA_CHUNK_BYTES if cuda else CHUNK_BYTES) // (logit_bytes * vocabulary))
