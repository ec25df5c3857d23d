"""A file's vocabulary as a `tokenizers.Tokenizer`, and its chat template."""

from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from ...files import Json, short
from .file import GgufFile

# token_type: names of the vocabulary that no text is cut into by merges.
_UNKNOWN, _CONTROL, _USER = 2, 3, 4


def _strings(file: GgufFile, name: str) -> list[str]:
    value = file.key(f"tokenizer.ggml.{name}", list)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{file.path}: tokenizer.ggml.{name} must be texts, got {short(value)}")
    return [str(text) for text in value]


def backend_of(file: GgufFile) -> tokenizers.Tokenizer:
    """Gemma 4's tokenizer: merges over text whose spaces are ▁, with bytes for what is unknown.

    Raises ValueError, naming the file, for another kind of vocabulary and one that is damaged.
    """
    kind = file.key("tokenizer.ggml.model", str)
    if kind != "gemma4":
        raise ValueError(f"{file.path}: tokenizer.ggml.model must be gemma4, got {short(kind)}")
    tokens = _strings(file, "tokens")
    merges = _strings(file, "merges")
    kinds = file.key("tokenizer.ggml.token_type", list)
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise ValueError(f"{file.path}: tokenizer.ggml.token_type must be one for each token")
    if len(set(tokens)) < len(tokens):
        raise ValueError(f"{file.path}: tokenizer.ggml.tokens must be unlike one another")
    vocabulary: Any = {token: index for index, token in enumerate(tokens)}
    unknown = file.key(
        "tokenizer.ggml.unknown_token_id", int, kinds.index(_UNKNOWN) if _UNKNOWN in kinds else 3
    )
    if not isinstance(unknown, int) or not 0 <= unknown < len(tokens):
        raise ValueError(f"{file.path}: tokenizer.ggml.unknown_token_id must number a token")
    try:
        model = models.BPE(
            vocab=vocabulary,
            merges=[(one, other) for one, other in (merge.split(" ", 1) for merge in merges)],
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    except Exception as error:  # the library raises bare Exception
        raise ValueError(
            f"{file.path}: tokenizer.ggml.merges must join tokens: {str(error)[:200]}"
        ) from None
    made = tokenizers.Tokenizer(model)
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = [
        AddedToken(token, special=kind != _USER, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (_UNKNOWN, _CONTROL, _USER)
    ]
    made.add_tokens(special)
    return made


def tokenizer_config_of(file: GgufFile) -> Json:
    """What a tokenizer_config.json would say, chat template and all."""
    tokens = _strings(file, "tokens")
    config: Json = {"add_bos_token": file.key("tokenizer.ggml.add_bos_token", bool, True)}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        index = file.keys.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(index, int) and 0 <= index < len(tokens):
            config[f"{name}_token"] = tokens[index]
    template = file.keys.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    return config
