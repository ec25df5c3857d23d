"""What the terminal sees of an answer while it is made, and how long that took."""

import math
import sys
import time

import torch

from ..tokenizer import Gemma4Tokenizer, TextStreamer


class Clock:
    """A streamer that notes when the prompt was put, and when each new token came."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.times: list[float] = []
        self.reused = 0  # prompt tokens that a cache held already

    def put(self, ids: torch.Tensor) -> None:
        if not self.times:
            self.prompt_tokens = ids.numel()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""

    @property
    def new_tokens(self) -> int:
        return max(0, len(self.times) - 1)

    def rates(self) -> tuple[float, float, float]:
        """Prompt tokens per second, new ones per second, seconds to the first; NaN if unknown."""
        put, first, last = (*self.times[:2], self.times[-1]) if self.new_tokens else [math.nan] * 3
        decode = (self.new_tokens - 1) / ((last - first) or math.nan)
        return (self.prompt_tokens - self.reused) / (first - put), decode, first - put


class Answer(Clock):
    """Streams an answer's text to stdout, and into `text`; the thoughts in it go to stderr."""

    def __init__(self, tokenizer: Gemma4Tokenizer) -> None:
        super().__init__()
        self.text, self.thinking, self.interrupted = "", False, False
        opens, closes = tokenizer.token_id("<|channel>"), tokenizer.token_id("<channel|>")
        self.channel = {opens: True, closes: False}
        self.speech = TextStreamer(tokenizer, self._speak)
        self.thought = TextStreamer(tokenizer, self._think)

    def _speak(self, text: str) -> None:
        self.text += text
        print(text, end="", flush=True)

    def _think(self, text: str) -> None:
        print(text, end="", file=sys.stderr, flush=True)

    def put(self, ids: torch.Tensor) -> None:
        super().put(ids)
        if len(self.times) == 1:
            self.speech.put(ids)
            self.thought.put(ids)
        elif (index := int(ids)) in self.channel:
            self.thinking = self.channel[index]
            self._think("\n" * (not self.thinking))
        else:
            (self.thought if self.thinking else self.speech).put(ids)

    def end(self) -> None:
        self.thought.end()
        self.speech.end()
        print(flush=True)

    def summary(self) -> str:
        prompt, decode, first = self.rates()
        counts = f"{self.prompt_tokens} prompt tokens, {self.new_tokens} new tokens"
        rates = f"{prompt:.1f} prompt tok/s, {decode:.1f} decode tok/s"
        reused = f", {self.reused} prompt tokens reused" if self.reused else ""
        whole = f"{counts}, {rates}, first token {first * 1e3:.0f} ms{reused}"
        return whole.replace("nan", "-")
