"""The words of the command line, read and checked without torch."""

import argparse
import importlib.util
import math
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TypeVar

from .. import demo

Number = TypeVar("Number", int, float)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; exits with one line and code 2 where they are wrong."""
    return _parser().parse_args(argv)


def complete(args: argparse.Namespace) -> None:
    """Refuses options that exclude each other, and reads the prompt; ValueError."""
    if getattr(args, "compile", False) and args.kv_dtype is not None:
        raise ValueError("--compile goes with no --kv-dtype")
    if args.command not in ("generate", "chat"):
        return
    if args.greedy and any(getattr(args, name) is not None for name in SAMPLING):
        raise ValueError("--greedy goes with no --temperature, --top-k, --top-p or --min-p")
    if args.command == "generate":
        if not args.chat and (args.system is not None or args.think):
            raise ValueError("--system and --think need --chat")
        args.prompt = _prompt(args.prompt)


# The options that say how to draw, which is to say that there is a draw.
SAMPLING = ("temperature", "top_k", "top_p", "min_p")


def _prompt(argument: str | None) -> str:
    if argument is None and (sys.stdin is None or sys.stdin.isatty()):
        raise ValueError("no prompt: give it as an argument or on stdin")
    if argument is None or argument == "-":
        argument = decoded(sys.stdin.buffer.read()).removesuffix("\n")
    if not argument.strip():
        raise ValueError("the prompt is empty")
    return argument


def decoded(data: bytes, source: str = "stdin") -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not valid UTF-8 (byte {error.start})") from None


def _version() -> str:
    """The string assigned to `gemma4_kernels.__version__`, whose import would import torch."""
    spec = importlib.util.find_spec("gemma4_kernels")
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    assert found is not None
    return found[1]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"gemma4: error: {message}\n")


class Version(argparse.Action):
    """Prints the version, which is looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(_version())
        parser.exit()


def _text(argument: str) -> str:
    # Arguments that are not UTF-8 reach Python as lone surrogates.
    try:
        argument.encode("utf-8")
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("it is not valid UTF-8") from None
    return argument


def _stop(argument: str) -> str:
    if not argument:
        raise argparse.ArgumentTypeError("must not be empty")
    return _text(argument)


def _bounded(
    kind: Callable[[str], Number], test: Callable[[Number], bool], rule: str
) -> Callable[[str], Number]:
    def parse(text: str) -> Number:
        with suppress(ValueError):
            if test(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")

    return parse


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
    return text


_positive = _bounded(int, lambda n: n > 0, "a positive whole number")


def _model_options() -> Parser:
    options = Parser(add_help=False)
    add = options.add_argument
    default = str(demo.path())
    add(
        "--model",
        type=_text,
        default=default,
        help="folder, .gguf file, hub id or owner/name:file.gguf (default: the demo)",
    )
    dtypes = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, default="auto", help="auto: the checkpoint's own")
    add("--device", type=_device, help="default: cuda if there is one, else cpu")
    add("--ple-device", type=_device, help="where the per-layer embeddings live")
    add("--dequantize", action="store_true", help="unpack quantised weights as they are loaded")
    add("--compile", action="store_true", help="decode on the CPU by compiled C++")
    add(
        "--kv-dtype",
        choices=("fp8", "fp8-all"),
        help="keys and values in 8 bits: of full layers, or of sliding layers too",
    )
    return options


def _answer_options() -> Parser:
    options = Parser(add_help=False)
    add = options.add_argument
    natural = _bounded(int, lambda n: 0 <= n < 2**63, "a whole number of at least 0")
    add("--max-new-tokens", type=_positive, help="default: as the checkpoint says, or 256")
    add("--min-new-tokens", type=natural, help="no end before so many")
    temperature = _bounded(float, lambda x: 0 <= x < math.inf, "a number of at least 0")
    add("--temperature", type=temperature, help="0 is greedy")
    add("--top-k", type=natural, help="0 is all")
    share = _bounded(float, lambda x: 0 < x <= 1, "above 0 and at most 1")
    add("--top-p", type=share, help="of the best tokens, those that make up this share")
    least = _bounded(float, lambda x: 0 <= x <= 1, "at least 0 and at most 1")
    add("--min-p", type=least, help="tokens at least so probable, as a part of the best one")
    penalty = _bounded(float, lambda x: 0 < x < math.inf, "a number above 0")
    add("--repetition-penalty", type=penalty, help="above 1: fewer words that were said already")
    add(
        "--stop",
        type=_stop,
        action="append",
        metavar="TEXT",
        help="end where this is said; repeatable",
    )
    add("--greedy", action="store_true", help="always the most probable token")
    add("--seed", type=natural, help="same seed, same text")
    add("--system", type=_text, help="a system message for the chat")
    add("--think", action="store_true", help="let the model think first (shown on stderr)")
    return options


def _parser() -> Parser:
    shared = Parser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show where an error came from")
    model, answers = _model_options(), _answer_options()
    parser = Parser(prog="gemma4", description="Gemma 4 text models on gemma4-kernels.")
    parser.add_argument("--version", action=Version, nargs=0, help="print it and leave")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, description: str, *parents: Parser) -> Parser:
        return commands.add_parser(
            name, help=help, description=description, parents=[*parents, shared]
        )

    text = command(
        "generate",
        "continue or answer a prompt",
        "Continues a prompt, or answers it with --chat.",
        model,
        answers,
    )
    text.add_argument("prompt", nargs="?", type=_text, help="- or none: read it from stdin")
    mode = text.add_mutually_exclusive_group()
    mode.add_argument("--raw", dest="chat", action="store_false", help="plain continuation")
    mode.add_argument("--chat", action="store_true", help="as the user's turn of a chat")
    text.set_defaults(chat=False)
    talk = command("chat", "talk with the model", "A conversation.", model, answers)
    talk.set_defaults(chat=True)
    speed = command(
        "bench",
        "measure tokens per second",
        "Tokens per second of prompt and decode, as median, least and most of --repeat runs, and "
        "what memory and matrix products reach in the same process.",
        model,
    )
    speed.add_argument("--prompt-tokens", type=_positive, default=512)
    several = _bounded(int, lambda n: n > 1, "a whole number above 1")
    speed.add_argument("--new-tokens", type=several, default=64)
    speed.add_argument("--repeat", type=_positive, default=3)
    speed.add_argument("--json", type=Path, help="append all of it to this file, as one line")
    judge = command(
        "score",
        "bits per token of a text, and what another model makes of it",
        "How well a model foretells a text, in bits per token; with --against how often another "
        "model would choose the same token, and how far their probabilities are apart.",
        model,
    )
    judge.add_argument("file", type=Path, help="a text in UTF-8")
    judge.add_argument("--against", type=_text, help="the other model: folder, file or hub id")
    judge.add_argument("--context", type=several, default=2048, help="tokens read in one piece")
    judge.add_argument("--json", type=Path, help="append the result to this file, as one line")
    smaller = command(
        "quantize",
        "write a checkpoint in 4 or 8 bits",
        "Writes a dense checkpoint with its linear layers in 4 or 8 bits (compressed-tensors, as "
        "vLLM and transformers read it), and each layer's error. Weights of quantisation-aware "
        "training keep its codes.",
    )
    smaller.add_argument("source", type=_text, help="folder or hub id")
    smaller.add_argument("target", type=Path, help="the new folder")
    smaller.add_argument("--format", choices=("w4a16", "w8a16", "fp8"), default="w4a16")
    smaller.add_argument(
        "--head", choices=("8bit",), help="also the head, which stays dense if not"
    )
    about = command(
        "info",
        "what is installed, what runs and why",
        "What is installed, what runs, and with --model the model's sizes.",
    )
    about.add_argument("--model", type=_text, help="also the sizes of this one: folder or hub id")
    proof = command(
        "check",
        "prove the kernels on this machine's cards",
        "Every kernel on each kind of card here, against plain PyTorch and float64. What fails is "
        "not used on that card from then on. Exit codes: 0 all right, 1 a kernel failed, 2 nothing "
        "to check.",
    )
    proof.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser
