"""Documents to token shards to training windows. The public names, nothing else.

Importing this costs numpy alone: tokenizers, tiktoken, pyarrow and datasets load where they are used.
"""

from moe.data.chat import ChatTemplate, check_messages
from moe.data.conversations import ConversationData, open_data, prepare_conversations
from moe.data.mixture import (
    Batch,
    Mixture,
    Stream,
    document_ids,
    permute,
    permute_many,
    spaced_windows,
    validation_windows,
)
from moe.data.packing import ConversationStream
from moe.data.preparation import DataInfo, SplitInfo, compressed, compression, describe, held_out_text, prepare
from moe.data.shards import DocumentTable, TokenData, TokenStream
from moe.data.sources import DataError, Document, Report, Source, default_sources, is_held_out, parse_source, read

__all__ = [
    "Batch",
    "ChatTemplate",
    "ConversationData",
    "ConversationStream",
    "DataError",
    "DataInfo",
    "Document",
    "DocumentTable",
    "Mixture",
    "Report",
    "Source",
    "SplitInfo",
    "Stream",
    "TokenData",
    "TokenStream",
    "check_messages",
    "compressed",
    "compression",
    "default_sources",
    "describe",
    "document_ids",
    "held_out_text",
    "is_held_out",
    "open_data",
    "parse_source",
    "permute",
    "permute_many",
    "prepare",
    "prepare_conversations",
    "read",
    "spaced_windows",
    "validation_windows",
]
