from fastpref.data import _native as _native
from fastpref.data.batchers import CompletionBatcher as CompletionBatcher
from fastpref.data.batchers import PaddedPairBatcher as PaddedPairBatcher
from fastpref.data.batchers import PromptBatcher as PromptBatcher
from fastpref.data.batches import PackedPairs as PackedPairs
from fastpref.data.cache import tokenized as tokenized
from fastpref.data.chat import ChatTemplate as ChatTemplate
from fastpref.data.packing import Packing as Packing
from fastpref.data.packing import PairBatcher as PairBatcher
from fastpref.data.packing import pack_pairs as pack_pairs
from fastpref.data.ragged import Ragged as Ragged
from fastpref.data.readers import RecordStream as RecordStream
from fastpref.data.readers import read_prompts as read_prompts
from fastpref.data.readers import read_records as read_records
from fastpref.data.records import DropReport as DropReport
from fastpref.data.records import Record as Record
from fastpref.data.row_shapes import row_counts as row_counts
from fastpref.data.sources import Source as Source
from fastpref.data.tokenization import Encoder as Encoder
from fastpref.data.tokenization import TokenRecords as TokenRecords
from fastpref.data.tokenization import TokenStream as TokenStream
from fastpref.data.tokenization import tokenize_completions as tokenize_completions
from fastpref.data.tokenization import tokenize_prompts as tokenize_prompts
from fastpref.method.choices import OnBadRecord as OnBadRecord
from fastpref.method.choices import Overlong as Overlong
from fastpref.method.errors import CacheWarning as CacheWarning
from fastpref.method.errors import ChatError as ChatError
from fastpref.method.errors import DataError as DataError

__all__ = [
    "CacheWarning",
    "ChatError",
    "ChatTemplate",
    "CompletionBatcher",
    "DataError",
    "DropReport",
    "Encoder",
    "OnBadRecord",
    "Overlong",
    "PackedPairs",
    "Packing",
    "PaddedPairBatcher",
    "PairBatcher",
    "PromptBatcher",
    "Ragged",
    "Record",
    "RecordStream",
    "Source",
    "TokenRecords",
    "TokenStream",
    "pack_pairs",
    "read_prompts",
    "read_records",
    "row_counts",
    "tokenize_completions",
    "tokenize_prompts",
    "tokenized",
]
