"""Attention of draft-tree tokens against a KV cache: the verifying pass of speculative decoding."""

from pallas_kernels.verify_attention.api import BACKENDS, verify_attention
from pallas_kernels.verify_attention.reference import verify_attention_reference
from pallas_kernels.verify_attention.tpu import verify_attention_tpu

__all__ = [
    "BACKENDS",
    "verify_attention",
    "verify_attention_reference",
    "verify_attention_tpu",
]
