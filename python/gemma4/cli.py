"""The command `gemma4`: generate, chat, info, bench.

Answers go to stdout; thoughts, rates and errors go to stderr. Exit codes: 0, 2 for an error,
130 for ctrl-c, 141 for a pipe that was closed at the other end. Longer than 400 lines because
everything that a terminal, a pipe or a mistaken option brings is dealt with here, and only here.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub.utils import disable_progress_bars

import gemma4_kernels

from . import Gemma4ForCausalLM, Gemma4TextConfig, demo, measure
from .config import FULL
from .tokenizer import Gemma4Tokenizer, TextStreamer
from .checkpoint import resolve

RELEASED = ("E2B", "E4B", "12B", "26B-A4B", "31B")
SUFFIXES = (".json", ".jinja", ".safetensors")


class Clock:
    """A streamer that notes when the prompt was put, and when each new token came."""

    def __init__(self) -> None:
        self.prompt_tokens, self.times = 0, []

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
        return self.prompt_tokens / (first - put), decode, first - put


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
        elif (index := ids.item()) in self.channel:
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
        return f"{counts}, {rates}, first token {first * 1e3:.0f} ms".replace("nan", "-")


def generate(args: argparse.Namespace) -> None:
    """Continues a prompt, or answers it with --chat."""
    if not args.chat and (args.system is not None or args.think):
        raise ValueError("--system and --think need --chat")
    _sampling(args)
    prompt = _prompt(args.prompt)
    folder = _folder(args.model)  # the prompt is checked before the weights, which take long
    config = Gemma4TextConfig.from_pretrained(folder)
    tokenizer = Gemma4Tokenizer.from_pretrained(folder)
    if args.chat:
        turns = [*_system(args), {"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turns, enable_thinking=args.think)
    else:
        ids = tokenizer.encode(prompt, add_bos=True)
    _room(config, ids)
    if _reply(args, _load(args, folder), tokenizer, ids).interrupted:
        raise KeyboardInterrupt


def chat(args: argparse.Namespace) -> None:
    """A conversation: every turn runs the whole of it again."""
    _sampling(args)
    history = _system(args)
    folder = _folder(args.model)
    tokenizer = Gemma4Tokenizer.from_pretrained(folder)
    tokenizer.apply_chat_template([*history, {"role": "user", "content": "."}])  # fails early
    model = _load(args, folder)
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        print(f"{args.model}: /reset starts over, /exit or ctrl-d leaves", file=sys.stderr)
    for line in _lines(on_terminal):
        if line == "/exit":
            break
        if line == "/reset":
            history = _system(args)
            print("a new conversation", file=sys.stderr)
        if line in ("", "/reset"):
            continue
        history.append({"role": "user", "content": line})
        try:
            ids = tokenizer.apply_chat_template(history, enable_thinking=args.think)
            answer = _reply(args, model, tokenizer, ids)
        except ValueError as error:
            if not on_terminal:
                raise
            print(_line(error), file=sys.stderr)
            history.pop()
            continue
        # Turns must alternate: an answer cut short stays, one that never began takes its question.
        if answer.interrupted and not answer.text:
            history.pop()
        else:
            history.append({"role": "assistant", "content": answer.text})


def info(args: argparse.Namespace) -> None:
    """What is installed, what runs, and with --model the model's sizes."""
    build = gemma4_kernels.build_info()
    archs, reason, device = build.pop("archs"), build.pop("reason"), build.pop("device")
    if build.pop("cuda") and not device:
        reason = "torch sees no CUDA device"
    others = ("build_info", "flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")
    ops = [name for name in gemma4_kernels.__all__ if name not in others]
    rows = {
        "gemma4-kernels": build.pop("version"),
        "torch": build.pop("torch"),
        "python": platform.python_version(),
        "device": device or "cpu (torch sees no CUDA device)",
        "compiled for": ", ".join(map(str, archs)) or "no CUDA architecture",
        "kernels for": ", ".join(build.pop("kernels")) or "no op",
        "in use": f"eager torch: {reason}" if reason else "CUDA kernels",
        **{key: value for key, value in build.items() if value is not None},
        "ops": ", ".join(ops),
    }
    if args.model is not None:
        rows |= _facts(_folder(args.model))
    width = max(map(len, rows))
    for key, value in rows.items():
        print(f"{key:{width}}  {value}")


def bench(args: argparse.Namespace) -> None:
    """Tokens per second of prompt and decode, as median, least and most of --repeat runs, and what
    memory and matrix products reach in the same process."""
    folder = _folder(args.model)
    config = Gemma4TextConfig.from_pretrained(folder)
    positions, wanted = config.max_position_embeddings, args.prompt_tokens + args.new_tokens
    if wanted > positions:
        raise ValueError(f"{wanted} tokens do not fit the model's {positions} positions")
    model = _load(args, folder)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.vocab_size, (1, args.prompt_tokens), generator=draw)
    options = {"max_new_tokens": args.new_tokens, "do_sample": False, "eos_token_id": []}
    clocks = [Clock() for _ in range(args.repeat + 1)]  # the first run is the warm-up
    for clock in clocks:
        model.generate(ids.to(model.device), streamer=clock, **options)
    prompt, decode, first = zip(*(clock.rates() for clock in clocks[1:]), strict=True)
    size, dtype = _count(model.num_parameters()), str(model.dtype).removeprefix("torch.")
    print(f"{args.model}: {size} parameters, {dtype}, {model.device}, {args.repeat} runs")
    print(f"{'':12}{'tokens':>8}{'median':>12}{'least':>12}{'most':>12}")
    _row("prompt", args.prompt_tokens, prompt, "tok/s")
    _row("decode", args.new_tokens, decode, "tok/s")
    _row("first token", 1, [seconds * 1e3 for seconds in first], "ms")
    copy, gemm = measure.copy_bandwidth(model.device), measure.gemm_rate(model.device, model.dtype)
    limit = copy / measure.decode_bytes(model)
    reached = statistics.median(decode)
    print(f"copies move {copy / 1e9:.1f} GB/s, matrix products make {gemm / 1e12:.3f} TFLOP/s")
    print(f"reading the weights allows {limit:.1f} decode tok/s: {reached / limit:.0%} reached")
    if args.json:
        row = measure.machine(model.device) | {
            "kind": "model",
            "model": args.model,
            "dtype": dtype,
            "prompt_tokens": args.prompt_tokens,
            "new_tokens": args.new_tokens,
            "prompt_tok_s": prompt,
            "decode_tok_s": decode,
            "decode_limit_tok_s": limit,
            "copy_gb_s": copy / 1e9,
            "gemm_tflop_s": gemm / 1e12,
        }
        with open(args.json, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _row(name: str, tokens: int, values: Sequence[float], unit: str) -> None:
    numbers = statistics.median(values), min(values), max(values)
    print(f"{name:12}{tokens:8}" + "".join(f"{x:12.1f}" for x in numbers) + f"  {unit}")


def _folder(model: str) -> Path:
    if not (sys.stderr.isatty() or Path(model).is_dir()):
        disable_progress_bars()  # a download shows them even into a log
    return resolve(model)


def _load(args: argparse.Namespace, folder: Path) -> Gemma4ForCausalLM:
    return Gemma4ForCausalLM.from_pretrained(
        folder,
        dtype=None if args.dtype == "auto" else args.dtype,
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        ple_device=args.ple_device,
        progress=sys.stderr.isatty(),
    )


def _reply(
    args: argparse.Namespace,
    model: Gemma4ForCausalLM,
    tokenizer: Gemma4Tokenizer,
    ids: list[int],
) -> Answer:
    """Streams the continuation of `ids`; ctrl-c ends it and no more than it."""
    room = _room(model.config, ids)
    wanted = args.max_new_tokens or model.generation_config.max_new_tokens
    if wanted > room:
        print(f"only {room} more tokens fit the model's positions", file=sys.stderr)
    stop = list(model.generation_config.eos_ids)
    if args.chat and tokenizer.turn_end_id not in stop:
        stop.append(tokenizer.turn_end_id)
    options = {"max_new_tokens": min(wanted, room), "eos_token_id": stop, **_sampling(args)}
    answer = Answer(tokenizer)
    try:
        model.generate(torch.tensor([ids], device=model.device), streamer=answer, **options)
    except KeyboardInterrupt:
        answer.interrupted = True
        answer.end()
    print(answer.summary(), file=sys.stderr)
    return answer


def _room(config: Gemma4TextConfig, ids: list[int]) -> int:
    """How many tokens can follow `ids`; ValueError if none can."""
    room = config.max_position_embeddings - len(ids)
    if room < 1:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, and the model's {config.max_position_embeddings} "
            "positions must hold it and its answer"
        )
    return room


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """`generate`'s options; any sampling option turns sampling on, and temperature 0 is greedy."""
    given = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p")}
    given = {name: value for name, value in given.items() if value is not None}
    if args.greedy and given:
        raise ValueError("--greedy goes with no --temperature, --top-k or --top-p")
    if args.greedy or args.temperature == 0:
        return {"do_sample": False}
    return {**given, "do_sample": True if given else None, "seed": args.seed}


def _system(args: argparse.Namespace) -> list[dict[str, str]]:
    return [] if args.system is None else [{"role": "system", "content": args.system}]


def _prompt(argument: str | None) -> str:
    if argument is None and (sys.stdin is None or sys.stdin.isatty()):
        raise ValueError("no prompt: give it as an argument or on stdin")
    prompt = argument
    if argument in (None, "-"):
        prompt = _decoded(sys.stdin.buffer.read()).removesuffix("\n")
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    return prompt


def _lines(on_terminal: bool) -> Iterator[str]:
    """The user's lines; at a terminal ctrl-c gives up the line, and ctrl-d ends."""
    if not on_terminal:
        yield from (_decoded(line).strip() for line in sys.stdin.buffer)
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (its import gives input() line editing)
    while True:
        try:
            yield input("> ").strip()
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"stdin is not valid UTF-8 (byte {error.start})") from None


def _facts(folder: Path) -> dict[str, str]:
    """A checkpoint's sizes, from its config; the weights are not read."""
    config, preset = Gemma4TextConfig.from_pretrained(folder), Gemma4TextConfig.preset
    with torch.device("meta"):
        model = Gemma4ForCausalLM(config)
    kinds, full = config.layer_types, config.kv_heads(FULL)
    facts = {
        "model": str(folder),
        "released as": ", ".join(x for x in RELEASED if _sizes(preset(x)) == _sizes(config)) or "-",
        "parameters": _count(model.num_parameters()),
        "layers": f"{len(kinds)}, of which {kinds.count(FULL)} full attention and "
        f"{config.num_kv_shared_layers} on borrowed keys",
        "width": f"{config.hidden_size}, feed-forward {config.intermediate_size}",
        "heads": f"{config.num_attention_heads} for queries; for keys "
        f"{config.num_key_value_heads} of {config.head_dim} (sliding, window "
        f"{config.sliding_window}), {full} of {config.global_head_dim} (full)",
        "vocabulary": str(config.vocab_size),
        "positions": str(config.max_position_embeddings),
        "dtype": config.dtype,
    }
    if config.enable_moe_block:
        facts["experts"] = f"{config.num_experts}, {config.top_k_experts} per token"
    if config.hidden_size_per_layer_input:
        table = model.model.embed_tokens_per_layer.weight.numel()
        facts["per-layer embeddings"] = f"{_count(table)} of the parameters"
    files = [file for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES]
    facts["files"] = ", ".join(
        f"{file.name} ({file.stat().st_size / 1e6:.2f} MB)" for file in files
    )
    return facts


def _sizes(config: Gemma4TextConfig) -> tuple:
    return config.hidden_size, config.intermediate_size, config.layer_types, config.num_experts


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _text(argument: str) -> str:
    # Arguments that are not UTF-8 reach Python as lone surrogates.
    try:
        argument.encode("utf-8")
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("it is not valid UTF-8") from None
    return argument


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"gemma4: error: {message}\n")


def _bounded(kind: Callable[[str], Any], test: Callable[[Any], bool], rule: str) -> Callable:
    def parse(text: str) -> Any:
        with suppress(ValueError):
            if test(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")

    return parse


def _device(text: str) -> str:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text} is asked for, but torch sees no such device")
    return text


def _parser() -> Parser:
    positive = _bounded(int, lambda n: n > 0, "a positive whole number")
    shared = Parser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show where an error came from")
    model = Parser(add_help=False)
    default = str(demo.path())
    model.add_argument("--model", default=default, help="folder or hub id (default: the demo)")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    model.add_argument("--dtype", choices=dtypes, default="auto", help="auto: the checkpoint's own")
    model.add_argument("--device", type=_device, help="default: cuda if there is one, else cpu")
    model.add_argument("--ple-device", type=_device, help="where the per-layer embeddings live")
    answers = Parser(add_help=False)
    add = answers.add_argument
    add("--max-new-tokens", type=positive, help="default: as the checkpoint says, or 256")
    temperature = _bounded(float, lambda x: 0 <= x < math.inf, "a number of at least 0")
    add("--temperature", type=temperature, help="0 is greedy")
    natural = _bounded(int, lambda n: 0 <= n < 2**63, "a whole number of at least 0")
    add("--top-k", type=natural, help="0 is all")
    add("--top-p", type=_bounded(float, lambda x: 0 < x <= 1, "above 0 and at most 1"))
    add("--greedy", action="store_true", help="always the most probable token")
    add("--seed", type=natural, help="same seed, same text")
    add("--system", type=_text, help="a system message for the chat")
    add("--think", action="store_true", help="let the model think first (shown on stderr)")

    parser = Parser(prog="gemma4", description="Gemma 4 text models on gemma4-kernels.")
    parser.add_argument("--version", action="version", version=gemma4_kernels.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(run: Callable, help: str, *parents: Parser) -> Parser:
        made = commands.add_parser(
            run.__name__, help=help, description=run.__doc__, parents=[*parents, shared]
        )
        made.set_defaults(run=run)
        return made

    text = command(generate, "continue or answer a prompt", model, answers)
    text.add_argument("prompt", nargs="?", type=_text, help="- or none: read it from stdin")
    mode = text.add_mutually_exclusive_group()
    mode.add_argument("--raw", dest="chat", action="store_false", help="plain continuation")
    mode.add_argument("--chat", action="store_true", help="as the user's turn of a chat")
    text.set_defaults(chat=False)
    command(chat, "talk with the model", model, answers).set_defaults(chat=True)
    speed = command(bench, "measure tokens per second", model)
    speed.add_argument("--prompt-tokens", type=positive, default=512)
    several = _bounded(int, lambda n: n > 1, "a whole number above 1")
    speed.add_argument("--new-tokens", type=several, default=64)
    speed.add_argument("--repeat", type=positive, default=3)
    speed.add_argument("--json", type=Path, help="append all of it to this file, as one line")
    about = command(info, "what is installed, what runs and why")
    about.add_argument("--model", help="also the sizes of this one: folder or hub id")
    return parser


def _line(error: BaseException) -> str:
    """An error as one line: its first one, with the type if it is not a plain refusal."""
    first = (str(error).strip().splitlines() or [""])[0]
    name = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
    return f"gemma4: error: {name}{first}"


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code. argparse exits by itself on a wrong option."""
    args = _parser().parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The interpreter flushes stdout once more at its end; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        print(_line(error), file=sys.stderr)
        return 2
    return 0
