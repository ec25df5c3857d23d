"""The commands about a checkpoint's weights: what they are worth, and fewer bits for them."""

import argparse
import sys
from dataclasses import asdict

from .. import Gemma4Tokenizer
from ..quantize import quantize as quantized
from ..score import score as scored
from .arguments import decoded
from .models import append_line, check_devices, folder_of, load, name_of


def score(args: argparse.Namespace) -> None:
    """Bits per token of a text, and how far another model is from this one."""
    check_devices(args)
    text = decoded(args.file.read_bytes(), str(args.file))
    folders = [folder_of(name) for name in (args.model, args.against) if name]
    tokenizers = [Gemma4Tokenizer.from_pretrained(folder) for folder in folders]
    ids, *twice = [tokenizer.encode(text, add_bos=False) for tokenizer in tokenizers]
    if any(other != ids for other in twice):
        raise ValueError(f"{args.model} and {args.against} cut {args.file} into unlike tokens")
    model, *others = [load(args, folder) for folder in folders]
    against = others[0] if others else None
    shown = sys.stderr.isatty()

    def progress(done: int) -> None:
        if shown:
            print(f"\r{done} of {len(ids)} tokens", end="", file=sys.stderr)

    bos = tokenizers[0].bos_token_id
    made = scored(model, ids, against, args.context, bos, progress, args.kv_dtype)
    if shown:
        print(file=sys.stderr)
    bytes_a_token = len(text.encode()) / made.tokens
    scores = [(args.model, made.bits_per_token), (args.against, made.against_bits_per_token)]
    for name, bits in scores[: len(folders)]:
        print(f"{name_of(name)}: {bits:.4f} bits a token, {bits / bytes_a_token:.4f} a byte")
    print(f"{made.tokens} tokens, in pieces of {args.context}")
    if against:
        print(f"{made.agreed / made.tokens:.2%} the same first choice")
        print(f"{made.divergence_bits:.5f} bits a token apart (KL divergence)")
    if args.json:
        row = {"model": args.model, "against": args.against, "context": args.context}
        append_line(args.json, row | asdict(made))


def quantize(args: argparse.Namespace) -> None:
    """Writes a checkpoint in 4 or 8 bits, and says what it cost."""
    shown = sys.stderr.isatty()

    def progress(name: str) -> None:
        if shown:
            print(f"\r\033[K{name}", end="", file=sys.stderr, flush=True)

    report = quantized(folder_of(args.source), args.target, args.format, progress, args.head)
    if shown:
        print("\r\033[K", end="", file=sys.stderr)
    for layer in report.squares:
        print(f"{layer}: {report.relative(layer):.3%} error")
    if report.on_grid:
        print(
            f"{report.on_grid} of {report.tensors} matrices lie on a grid of 4 bits: their codes "
            "are recovered, not rounded anew"
        )
    print(f"{report.before_bytes / 1e9:.3f} GB became {report.after_bytes / 1e9:.3f}")
