"""Documents to token shards to training windows. The public names, nothing else.

Importing this costs numpy alone: tokenizers, tiktoken, pyarrow and datasets load where they are used.
"""

from moe.data.mixture import Mixture, permute, permute_many, validation_windows
from moe.data.prepare import DataInfo, SplitInfo, compressed, compression, describe, held_out_text, prepare
from moe.data.shards import DocumentTable, TokenData, TokenStream
from moe.data.sources import DataError, Document, Report, Source, default_sources, is_held_out, parse_source, read

__all__ = [
    "DataError",
    "DataInfo",
    "Document",
    "DocumentTable",
    "Mixture",
    "Report",
    "Source",
    "SplitInfo",
    "TokenData",
    "TokenStream",
    "compressed",
    "compression",
    "default_sources",
    "describe",
    "held_out_text",
    "is_held_out",
    "parse_source",
    "permute",
    "permute_many",
    "prepare",
    "read",
    "validation_windows",
]
