"""The dense parts of the model. The names that others use, nothing else."""

from moe.layers.attention import (
    Attend,
    Attention,
    attend_within,
    causal,
    document_runs,
    rope_frequencies,
    rope_tables,
    rotate,
    text_first,
    text_of,
    within_documents,
    within_documents_by_mask,
)
from moe.layers.cache import KVCache, LayerCache
from moe.layers.plain import INDIFFERENT, MLP, Head, Linear, RMSNorm, at_least_fp32, cast, untouched, without_autocast

__all__ = [
    "INDIFFERENT",
    "MLP",
    "Attend",
    "Attention",
    "Head",
    "KVCache",
    "LayerCache",
    "Linear",
    "RMSNorm",
    "at_least_fp32",
    "attend_within",
    "cast",
    "causal",
    "document_runs",
    "rope_frequencies",
    "rope_tables",
    "rotate",
    "text_first",
    "text_of",
    "untouched",
    "within_documents",
    "within_documents_by_mask",
    "without_autocast",
]
