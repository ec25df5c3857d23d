"""llama.cpp's files: keys, a table of tensors and their blocks, in one file or several."""

from .file import MAGIC, GgufFile, read_shards
from .model import config_of, eos_of, sources_of
from .tokenizer import backend_of, tokenizer_config_of

__all__ = [
    *("MAGIC", "GgufFile", "backend_of", "config_of", "eos_of", "read_shards", "sources_of"),
    "tokenizer_config_of",
]
