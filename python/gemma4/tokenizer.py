"""Text to token ids and back: the checkpoint's tokenizer.json, chat template, and streaming.

Every encoding starts with exactly one `<bos>`, whoever wrote it: the caller, the template or the
text itself.
"""

import json
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import tokenizers
import torch
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .config import read_json
from .weights import resolve

TURN_START, TURN_END = "<|turn>", "<turn|>"
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Gemma4Tokenizer:
    """A `tokenizers.Tokenizer` with Gemma 4's special tokens and chat template.

    `config` is the content of tokenizer_config.json, `templates` maps names to jinja sources, and
    `source` names the file in errors. Raises ValueError if bos, eos or pad is not a token.
    """

    padding_side = "left"

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        config: dict[str, Any] | None = None,
        templates: dict[str, str] | None = None,
        source: str = "the tokenizer",
    ) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.backend, self.source = tokenizer, source
        config = config or {}
        self.templates = templates or {}
        self.add_bos_token = bool(config.get("add_bos_token", True))
        self.bos_token = _content(config.get("bos_token"), "<bos>")
        self.eos_token = _content(config.get("eos_token"), "<eos>")
        self.pad_token = _content(config.get("pad_token"), "<pad>")
        self.bos_token_id = self._required(self.bos_token)
        self.eos_token_id = self._required(self.eos_token)
        self.pad_token_id = self._required(self.pad_token)
        self.turn_end_id = self.token_id(TURN_END)
        self.skipped_ids = frozenset(
            index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )

    @classmethod
    def from_pretrained(cls, path_or_repo_id: str | Path) -> "Gemma4Tokenizer":
        """From a folder or hub id; FileNotFoundError without tokenizer.json, ValueError if bad."""
        folder = resolve(path_or_repo_id)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"{folder} holds no tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{file} is not a tokenizer: {error}") from None
        config = _read_config(folder / "tokenizer_config.json")
        return cls(backend, config, _read_templates(folder, config), str(file))

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def token_id(self, token: str) -> int | None:
        """The id of one token's exact string, or None."""
        return self.backend.token_to_id(token)

    def _required(self, token: str) -> int:
        index = self.token_id(token)
        if index is None:
            raise ValueError(f"{self.source} has no {token} token")
        return index

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Ids of `text`, with one BOS if `add_bos` (None: as the checkpoint says) or the text asks.

        Special tokens written in the text count as such. Raises ValueError for a lone surrogate.
        """
        text.encode("utf-8")
        ids = self.backend.encode(text, add_special_tokens=False).ids
        start = next((i for i, index in enumerate(ids) if index != self.bos_token_id), len(ids))
        wanted = self.add_bos_token if add_bos is None else add_bos
        return [self.bos_token_id] * (start > 0 or wanted) + ids[start:]

    def decode(self, ids: Sequence[int] | torch.Tensor, skip_special_tokens: bool = True) -> str:
        """The text of one sequence of ids [T]; bytes that are not UTF-8 become U+FFFD."""
        if isinstance(ids, torch.Tensor):
            ids = ids.tolist()
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def __call__(
        self, texts: str | Sequence[str], add_bos: bool | None = None
    ) -> dict[str, torch.Tensor]:
        """input_ids and attention_mask [B, S] int64, padded on the left."""
        rows = [
            self.encode(text, add_bos) for text in ([texts] if isinstance(texts, str) else texts)
        ]
        if not rows:
            raise ValueError("texts is empty")
        width = max(map(len, rows))
        pad = self.pad_token_id
        input_ids = [[pad] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return {"input_ids": torch.tensor(input_ids), "attention_mask": torch.tensor(mask)}

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        enable_thinking: bool = False,
        **variables: Any,
    ) -> list[int] | str:
        """The conversation as ids, or as text if not `tokenize`; `variables` reach the template.

        Raises ValueError if the tokens or the template of a chat are missing, and with the
        template's own sentence if it refuses the messages.
        """
        for token in (TURN_START, TURN_END):
            if self.token_id(token) is None:
                raise ValueError(f"{self.source} has no {token} token, which a chat needs")
        values = {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "enable_thinking": enable_thinking,
            "tools": None,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
            **variables,
        }
        source = self._template("tool_use" if values["tools"] else "default")
        try:
            text = _environment().from_string(source).render(values)
        except (TemplateError, TypeError) as error:
            raise ValueError(str(error)) from error
        return self.encode(text, add_bos=True) if tokenize else text

    def _template(self, name: str) -> str:
        source = self.templates.get(name) or self.templates.get("default")
        if source is None:
            names = ", ".join(sorted(self.templates)) or "none"
            raise ValueError(f"{self.source} comes without a default chat template (has: {names})")
        return source


class TextStreamer:
    """Passes generated text to `write` piece by piece; the pieces join to `decode` of the ids.

    `put` takes the prompt [S] or [1, S] first (written too unless `skip_prompt`), then each step's
    ids [1]; `end` writes what is held back. Raises ValueError for a batch.

    A run of byte tokens is held until it ends, since one bad byte makes `decode` replace all of
    its run. `tokenizers.DecodeStream` does not: it raises there, and drops an unfinished tail.
    """

    def __init__(
        self,
        tokenizer: Gemma4Tokenizer,
        write: Callable[[str], object],
        skip_prompt: bool = True,
    ) -> None:
        self.tokenizer, self.write, self.skip_prompt = tokenizer, write, skip_prompt
        self._reset()

    def _reset(self) -> None:
        self._at_prompt = True
        self._last: list[int] = []  # the token before `_held`: a decoder may strip the first one
        self._held: list[int] = []

    def put(self, ids: torch.Tensor) -> None:
        """Takes the prompt, then new ids."""
        at_prompt, self._at_prompt = self._at_prompt, False
        rows = len(ids) if ids.dim() == 2 or (ids.dim() == 1 and not at_prompt) else 1
        if rows > 1:
            raise ValueError(f"a TextStreamer streams one sequence, got a batch of {rows}")
        if at_prompt and self.skip_prompt:
            return
        for index in ids.flatten().tolist():
            self._step(index)

    def end(self) -> None:
        """Writes the held bytes and makes ready for another prompt."""
        if self._held:
            self._emit()
        self._reset()

    def _step(self, index: int) -> None:
        token = self.tokenizer.backend.id_to_token(index)
        if token is None or index in self.tokenizer.skipped_ids:
            return
        self._held.append(index)
        if not _BYTE.fullmatch(token):
            self._emit()

    def _emit(self) -> None:
        before = self.tokenizer.decode(self._last)
        text = self.tokenizer.decode(self._last + self._held)[len(before) :]
        self._last, self._held = self._held[-1:], []
        if text:
            self.write(text)


def _content(token: str | dict[str, Any] | None, default: str) -> str:
    return (token.get("content") if isinstance(token, dict) else token) or default


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    return read_json(file)


def _read_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return {"default": file.read_text(encoding="utf-8")}
    template = config.get("chat_template") or {}
    if isinstance(template, str):
        return {"default": template}
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}
    return dict(template)


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as chat templates expect it; a template is data from a download, hence the sandbox."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = tojson
    return environment
