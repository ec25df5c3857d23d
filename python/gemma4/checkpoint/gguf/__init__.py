"""llama.cpp's files: keys, a table of tensors and their blocks, in one file or several."""

from .file import read_shards
from .model import config_of, sources_of
from .tokenizer import backend_of, tokenizer_config_of

__all__ = ["backend_of", "config_of", "read_shards", "sources_of", "tokenizer_config_of"]
