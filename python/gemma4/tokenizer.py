"""Text to token ids and back: the checkpoint's tokenizer.json, chat template, and streaming.

Every encoding starts with exactly one `<bos>`, whoever wrote it: the caller, the template or the
text itself.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypedDict, overload

import tokenizers
import torch

from .checkpoint import gguf, resolve
from .files import Json, check_no_pointer, naming, read_json, replacing, short, write_json
from .template import render

TURN_START, TURN_END = "<|turn>", "<turn|>"
# Far above the files of released models (33 MB, 20 kB): what is larger is something else.
MAX_TOKENIZER_BYTES, MAX_TEMPLATE_BYTES = 256 * 2**20, 2**20
_ENTRY = ("name", "template")
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Encoded(TypedDict):
    input_ids: torch.Tensor
    attention_mask: torch.Tensor


class Gemma4Tokenizer:
    """A `tokenizers.Tokenizer` with Gemma 4's special tokens and chat template.

    `config` is the content of tokenizer_config.json, `templates` maps names to jinja sources;
    `source` and `template_source` name their files in errors. Raises ValueError if bos, eos or pad
    is not a token.
    """

    padding_side = "left"

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        config: Json | None = None,
        templates: dict[str, str] | None = None,
        source: str = "the tokenizer",
        template_source: str = "the chat template",
    ) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.backend, self.source, self.template_source = tokenizer, source, template_source
        self.config, self.templates = config or {}, templates or {}
        self.add_bos_token = self.config.get("add_bos_token", True)
        if not isinstance(self.add_bos_token, bool):
            raise ValueError(
                f"add_bos_token must be true or false, got {short(self.add_bos_token)}"
            )
        self.bos_token = _content(self.config, "bos_token", "<bos>")
        self.eos_token = _content(self.config, "eos_token", "<eos>")
        self.pad_token = _content(self.config, "pad_token", "<pad>")
        self.bos_token_id = self._required(self.bos_token)
        self.eos_token_id = self._required(self.eos_token)
        self.pad_token_id = self._required(self.pad_token)
        self.turn_end_id = self.token_id(TURN_END)
        self.skipped_ids = frozenset(
            index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )

    @classmethod
    def from_pretrained(cls, path_or_repo_id: str | Path) -> "Gemma4Tokenizer":
        """From a folder, hub id or .gguf file.

        Raises FileNotFoundError without tokenizer.json, and ValueError, naming file and entry, for
        one that is damaged or has more tokens than the model that lies beside it.
        """
        folder = resolve(path_or_repo_id, "tokenizer.json")
        if folder.is_file():
            return cls._from_gguf(folder)
        file, config_file = folder / "tokenizer.json", folder / "tokenizer_config.json"
        backend = _read_backend(file)
        config = read_json(config_file) if config_file.is_file() else {}
        templates, template_file = _read_templates(folder, config, config_file)
        try:
            made = cls(backend, config, templates, str(file), str(template_file))
        except ValueError as error:
            said = str(error)
            raise ValueError(said if str(file) in said else f"{config_file}: {said}") from None
        tokens, rows = 1 + max(backend.get_vocab().values(), default=-1), _model_rows(folder)
        if rows is not None and tokens > rows:
            raise ValueError(
                f"{file} must have no more tokens than the model, whose vocab_size is {rows}, "
                f"got {tokens}"
            )
        return made

    @classmethod
    def _from_gguf(cls, path: Path) -> "Gemma4Tokenizer":
        file = gguf.read_shards(path)
        config = gguf.tokenizer_config_of(file)
        templates = _templates_of(config, path)
        return cls(gguf.backend_of(file), config, templates, str(path), str(path))

    def save_pretrained(self, path: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and the chat template to a folder."""
        with replacing(Path(path)) as (staging, removed):
            self.write(staging)
            if not (staging / "chat_template.jinja").exists():
                removed.add("chat_template.jinja")

    def write(self, folder: Path) -> None:
        """Writes the files into a folder that is there."""
        config = {key: value for key, value in self.config.items() if key != "chat_template"}
        with naming(folder / "tokenizer.json"):
            self.backend.save(str(folder / "tokenizer.json"))
        if self.templates.keys() == {"default"}:
            with naming(folder / "chat_template.jinja"):
                (folder / "chat_template.jinja").write_text(
                    self.templates["default"], encoding="utf-8", newline=""
                )
        elif self.templates:
            named = [{"name": k, "template": v} for k, v in self.templates.items()]
            config["chat_template"] = named
        write_json(folder / "tokenizer_config.json", config)

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

    def __call__(self, texts: str | Sequence[str], add_bos: bool | None = None) -> Encoded:
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

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Json],
        add_generation_prompt: bool = True,
        tokenize: Literal[True] = True,
        enable_thinking: bool = False,
        **variables: object,
    ) -> list[int]: ...

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Json],
        add_generation_prompt: bool = True,
        *,
        tokenize: Literal[False],
        enable_thinking: bool = False,
        **variables: object,
    ) -> str: ...

    def apply_chat_template(
        self,
        messages: Sequence[Json],
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        enable_thinking: bool = False,
        **variables: object,
    ) -> list[int] | str:
        """The conversation as ids, or as text if not `tokenize`; `variables` reach the template.

        messages: dicts of a role and a content, text or a list of {"type": "text", "text": ...};
        what else they hold is the template's to read. Raises ValueError for others, if the tokens
        or the template of a chat are missing, and with the template's own sentence if it refuses
        the messages (see `template.render` for its bounds).
        """
        for token in (TURN_START, TURN_END):
            if self.token_id(token) is None:
                raise ValueError(f"{self.source} has no {token} token, which a chat needs")
        _check_messages(messages)
        values = {
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
            "enable_thinking": enable_thinking,
            "tools": None,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
            **variables,
        }
        source = self._template("tool_use" if values["tools"] else "default")
        text = render(source, values, self.template_source)
        return self.encode(text, add_bos=True) if tokenize else text

    def _template(self, name: str) -> str:
        source = self.templates.get(name) or self.templates.get("default")
        if source is None or not source.strip():
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


def _content(config: Json, name: str, default: str) -> str:
    token = config.get(name)
    if token is None:
        return default
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a token's text, got {short(token)}")
    return text


def _read_backend(file: Path) -> tokenizers.Tokenizer:
    with file.open("rb") as stream:
        check_no_pointer(file, stream.read(64))
    if (size := file.stat().st_size) > MAX_TOKENIZER_BYTES:
        raise ValueError(
            f"{file} must be at most {MAX_TOKENIZER_BYTES} bytes to be a tokenizer, got {size}"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file} is not a tokenizer: {str(error)[:200]}") from None


def _model_rows(folder: Path) -> int | None:
    """The vocab_size of the model in the folder, if there is one that gives it."""
    file = folder / "config.json"
    config = read_json(file) if file.is_file() else {}
    text = config.get("text_config") or config
    rows = text.get("vocab_size") if isinstance(text, dict) else None
    return rows if isinstance(rows, int) else None


def _read_templates(folder: Path, config: Json, config_file: Path) -> tuple[dict[str, str], Path]:
    """Chat templates by name, and the file that they come from."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        with file.open("rb") as stream:
            data = stream.read(MAX_TEMPLATE_BYTES + 1)
        if len(data) > MAX_TEMPLATE_BYTES:
            raise ValueError(f"{file} must be at most {MAX_TEMPLATE_BYTES} bytes")
        check_no_pointer(file, data)
        try:
            return {"default": data.decode("utf-8")}, file
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} must be UTF-8: {error}") from None
    return _templates_of(config, config_file), config_file


def _templates_of(config: Json, config_file: Path) -> dict[str, str]:
    """Those in a tokenizer_config.json."""
    found = config.get("chat_template")
    entries = found if isinstance(found, list) else []
    if isinstance(found, str):
        entries = [{"name": "default", "template": found}]
    elif isinstance(found, dict):
        entries = [{"name": name, "template": text} for name, text in found.items()]
    elif found is not None and not isinstance(found, list):
        raise ValueError(
            f"{config_file}: chat_template must be text or a list of templates, got {short(found)}"
        )
    templates = {}
    for index, entry in enumerate(entries):
        name, text = (entry.get(key) if isinstance(entry, dict) else None for key in _ENTRY)
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(
                f"{config_file}: chat_template[{index}] must have a name and a template, "
                f"got {short(entry)}"
            )
        templates[name] = text
    return templates


def _check_messages(messages: object) -> None:
    if isinstance(messages, (str, dict)) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(
            "messages must be a list of at least one message, each with a role and a content, "
            f"got {short(messages)}"
        )
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise ValueError(
                f"{where} must be a dict of a role and a content, got {short(message)}"
            )
        if not isinstance(message.get("role"), str):
            raise ValueError(f"{where} must have a role, a text, got {short(message.get('role'))}")
        content = message.get("content")
        if content is None and any(message.get(key) for key in ("tool_calls", "tool_responses")):
            continue
        if not isinstance(content, (str, list, tuple)):
            raise ValueError(f"{where} must have a content, text, got {short(content)}")
        for part in content if not isinstance(content, str) else []:
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                raise ValueError(
                    f"{where} must hold text alone, for this is a text model, got {short(kind)}"
                )
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError(
                    f'{where} must hold parts {{"type": "text", "text": ...}}, got {short(part)}'
                )
