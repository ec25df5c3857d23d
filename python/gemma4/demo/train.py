"""Train the demo checkpoint: a 2.5 M parameter Gemma 4 that writes like Jane Austen.

The text is her six novels, published 1811 to 1818 and in the public domain: Sense and
Sensibility, Pride and Prejudice, Mansfield Park, Emma, Northanger Abbey, Persuasion. They come
from the R package janeaustenr 1.0.0, in Debian `r-cran-janeaustenr`:

    apt-get install r-cran-janeaustenr
    Rscript -e 'writeLines(janeaustenr::austen_books()$text, "austen.txt")'
    python -m gemma4.demo.train --text austen.txt --out DIR

One core takes about an hour. One training sequence in four is a conversation in the chat
template: the user gives the opening of a passage, the model continues it and ends its turn.
"""

import argparse
import itertools
import json
import math
import random
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from gemma4 import Gemma4ForCausalLM, Gemma4TextConfig
from gemma4.files import Json
from gemma4.tokenizer import Gemma4Tokenizer

TEMPLATE = Path(__file__).with_name("chat_template.jinja")

SPECIALS = [
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|think|>"),
    *("<|channel>", "<channel|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>"),
    *("<|tool_response>", "<tool_response|>", '<|"|>'),
]
PAD, EOS, BOS = 0, 1, 2

CONFIG: Json = {
    "vocab_size": 2048,
    "vocab_size_per_layer_input": 2048,
    "hidden_size": 128,
    "hidden_size_per_layer_input": 16,
    "intermediate_size": 288,
    "num_hidden_layers": 12,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "num_kv_shared_layers": 6,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 64,
    "max_position_embeddings": 2048,
    "final_logit_softcapping": 30.0,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
}
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 64, "top_p": 0.95}

LENGTH = 256  # tokens of a training sequence
HELD_OUT = 25  # every 25th chapter is for validation
CHAT_SHARE = 0.25

Chapter = list[str]  # of paragraphs


# ------------------------------------------------------------------------------------------ text


def read_chapters(path: Path) -> list[Chapter]:
    """Chapters of unwrapped paragraphs, without headings, emphasis marks and title pages."""
    heading = re.compile(r"^(?:CHAPTER|Chapter) .*$", re.MULTILINE)
    chapters = []
    for chapter in heading.split(path.read_text(encoding="utf-8")):
        blocks = (" ".join(b.split()) for b in re.split(r"\n\s*\n", chapter.replace("_", "")))
        paragraphs = [b for b in blocks if re.search(r"[a-z].*[.!?;:,\"'-]", b)]
        if sum(map(len, paragraphs)) > 1000:  # a table of contents is shorter than any chapter
            chapters.append(paragraphs)
    return chapters


def train_tokenizer(chapters: list[Chapter], vocab_size: int) -> Gemma4Tokenizer:
    """Byte-fallback BPE in the manner of Gemma: ordinary pieces, spaces written as U+2581."""
    size = vocab_size - len(SPECIALS) - 256
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    # Gemma's tokenizer has no word split of its own, so the merges must never cross words.
    words = r"▁?\p{L}+|▁?\p{N}|\n+|▁?[^\p{L}\p{N}\n▁]+|▁"
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(words), "isolated")
    learner.train_from_iterator(
        ("\n\n".join(c) for c in chapters),
        BpeTrainer(vocab_size=size, show_progress=False, max_token_length=16),
    )
    learned = json.loads(learner.to_str())["model"]

    # The 256 bytes are pieces that no text spells: only the fallback reaches them.
    pieces = SPECIALS + [f"<0x{byte:02X}>" for byte in range(256)] + list(learned["vocab"])
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[tuple(pair) for pair in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    tokenizer.add_special_tokens(SPECIALS)
    assert tokenizer.get_vocab_size() == vocab_size
    return Gemma4Tokenizer(tokenizer, templates={"default": TEMPLATE.read_text(encoding="utf-8")})


class Prose:
    """The chapters as one stream of ids, cut into sequences that open with <bos>."""

    def __init__(self, tokenizer: Gemma4Tokenizer, chapters: list[Chapter]):
        streams = [[*tokenizer.encode("\n\n".join(c), add_bos=False), EOS] for c in chapters]
        self.ids = np.concatenate([np.asarray(s, np.int64) for s in streams])
        pieces = [tokenizer.backend.id_to_token(i) or "" for i in self.ids]
        # Start where a sentence does, for that is what a prompt looks like.
        self.starts = [
            i
            for i in range(1, len(pieces) - LENGTH)
            if pieces[i - 1][-1] in '.!?\n"' and re.match(r"▁?\"?[A-Z]|▁?\"", pieces[i])
        ]

    def sample(self, rng: random.Random) -> np.ndarray:
        start = rng.choice(self.starts)
        return np.concatenate([[BOS], self.ids[start : start + LENGTH - 1]])

    def windows(self) -> np.ndarray:
        """All of the stream, once: [sequences, LENGTH]."""
        rows = len(self.ids) // (LENGTH - 1)
        body = self.ids[: rows * (LENGTH - 1)].reshape(rows, LENGTH - 1)
        return np.concatenate([np.full((rows, 1), BOS), body], axis=1)


class Conversations:
    """Neighbouring paragraphs told by turns: the user begins each, the model goes on."""

    def __init__(self, tokenizer: Gemma4Tokenizer, chapters: list[Chapter]):
        self.tokenizer = tokenizer
        self.chapters = [[p for p in c if len(p.split()) >= 20] for c in chapters]
        self.chapters = [c for c in self.chapters if len(c) >= 8]

    def sample(self, rng: random.Random) -> np.ndarray:
        chapter = rng.choice(self.chapters)
        first = rng.randrange(len(chapter) - 7)
        messages = []
        if rng.random() < 0.1:
            messages.append({"role": "system", "content": "Continue the passage."})
        for paragraph in chapter[first : first + 8]:
            opening, reply = self.split(paragraph, rng)
            messages.append({"role": "user", "content": opening})
            messages.append({"role": "assistant", "content": reply})
        ids = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=False, enable_thinking=rng.random() < 0.05
        )[:LENGTH]
        return np.pad(np.asarray(ids), (0, LENGTH - len(ids)), constant_values=PAD)

    @staticmethod
    def split(paragraph: str, rng: random.Random) -> tuple[str, str]:
        """Some first words, or the first sentence; then whole sentences, eighty words or so."""
        words = paragraph.split()
        ends = [i + 1 for i, word in enumerate(words) if word.rstrip('"')[-1:] in set(".!?")]
        opening = rng.randint(3, 14)
        if rng.random() < 0.4:
            opening = next((end for end in ends if 3 <= end <= 18), opening)
        close = next((end for end in ends if end >= opening + rng.randint(5, 80)), len(words))
        return " ".join(words[:opening]), " ".join(words[opening:close])


# --------------------------------------------------------------------------------------- measure


def bigram_loss(train: np.ndarray, rows: np.ndarray, vocab_size: int) -> float:
    """Nats per token of an interpolated Kneser-Ney bigram, at its best discount on `rows`."""
    counts = np.zeros((vocab_size, vocab_size), np.float32)
    np.add.at(counts, (train[:-1], train[1:]), 1)
    total = counts.sum(1, keepdims=True).clip(min=1)
    kinds = (counts > 0).sum(1, keepdims=True)
    continuation = (counts > 0).sum(0) + 0.1  # never seen, never impossible
    continuation = continuation / continuation.sum()
    before, after = rows[:, 1:-1], rows[:, 2:]

    def loss(discount: float) -> float:
        mass = np.where(kinds > 0, discount * kinds / total, 1)
        kept = (counts[before, after] - discount).clip(min=0) / total[before, 0]
        return float(-np.log(kept + mass[before, 0] * continuation[after]).mean())

    return min(loss(discount) for discount in np.arange(0.3, 1.0, 0.05))


@torch.no_grad()
def validation_loss(model: torch.nn.Module, rows: np.ndarray) -> float:
    """Nats per token on the bigram's targets: all but each row's first, which has no context."""
    losses = []
    for chunk in torch.from_numpy(rows).split(16):
        logits = model(input_ids=chunk, use_cache=False).logits[:, 1:-1].float()
        losses.append(
            F.cross_entropy(logits.flatten(0, 1), chunk[:, 2:].flatten(), reduction="none")
        )
    return torch.cat(losses).mean().item()


# ----------------------------------------------------------------------------------------- train


@torch.no_grad()
def initialise(model: Gemma4ForCausalLM) -> None:
    """Unit-variance linears and quiet branches: the usual 0.02 is made for wide models."""
    for name, weight in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            weight.fill_(len(weight) ** -0.25)  # the scores have no 1/sqrt(d) of their own
        elif re.search(r"post_\w+norm\.weight", name):
            weight.fill_(0.25)
        elif "embed_tokens" in name:
            weight.normal_(std=0.05)
        elif weight.dim() == 2:
            weight.normal_(std=weight.shape[1] ** -0.5)


def optimizers(model: Gemma4ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for tables and norms."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.dim() == 2 and "embed_tokens" not in name]
    tables = [p for name, p in named if "embed_tokens" in name]
    norms = [p for _, p in named if p.dim() == 1]
    return [
        torch.optim.Muon(matrices, lr=1.4e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": tables, "weight_decay": 0.05}, {"params": norms, "weight_decay": 0.0}],
            lr=1e-2,
            betas=(0.9, 0.98),
        ),
    ]


def batches(sources: list[Prose | Conversations], size: int, seed: int) -> Iterator[torch.Tensor]:
    rng = random.Random(seed)
    weights = [1 - CHAT_SHARE, CHAT_SHARE]
    while True:
        rows = [source.sample(rng) for source in rng.choices(sources, weights, k=size)]
        yield torch.from_numpy(np.stack(rows))


def rate(progress: float) -> float:
    """Short warm-up, then cosine to nothing."""
    return min(1, progress / 0.02) * 0.5 * (1 + math.cos(math.pi * progress))


def fit(model: Gemma4ForCausalLM, data: Iterator[torch.Tensor], steps: int) -> None:
    opts = optimizers(model)
    groups = [(group, group["lr"]) for opt in opts for group in opt.param_groups]
    began, smooth = time.monotonic(), 0.0
    for step, ids in enumerate(itertools.islice(data, steps), start=1):
        for group, peak in groups:
            group["lr"] = peak * rate(step / steps)
        labels = ids.masked_fill(ids == PAD, -100)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        smooth += (loss.item() - smooth) / min(step, 50)
        if step % 50 == 0 or step == steps:
            minutes = (time.monotonic() - began) / 60
            print(f"step {step}/{steps}  loss {smooth:.3f}  {minutes:.1f} min", flush=True)


# ----------------------------------------------------------------------------------------- write


def write_tokenizer(tokenizer: Gemma4Tokenizer, out: Path) -> None:
    tokenizer.backend.save(str(out / "tokenizer.json"), pretty=False)
    names = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk", "mask")}
    options = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "padding_side": "left",
    }
    write_json(out / "tokenizer_config.json", options | names)
    if out.resolve() != TEMPLATE.parent:
        shutil.copy(TEMPLATE, out)


def write_model(model: Gemma4ForCausalLM, tokenizer: Gemma4Tokenizer, out: Path) -> None:
    model.save_pretrained(out)
    stops = [tokenizer.token_id(token) for token in ("<eos>", "<turn|>", "<|tool_response>")]
    ids = {"bos_token_id": BOS, "eos_token_id": stops, "pad_token_id": PAD}
    write_json(out / "generation_config.json", SAMPLING | ids)


def write_json(path: Path, value: Json) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo checkpoint.")
    parser.add_argument("--text", type=Path, required=True, help="the novels, as plain text")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    chapters = read_chapters(args.text)
    held_out = chapters[HELD_OUT // 2 :: HELD_OUT]
    kept = [c for i, c in enumerate(chapters) if i % HELD_OUT != HELD_OUT // 2]
    tokenizer = train_tokenizer(kept, CONFIG["vocab_size"])
    write_tokenizer(tokenizer, args.out)
    prose = Prose(tokenizer, kept)
    rows = Prose(tokenizer, held_out).windows()
    bigram = bigram_loss(prose.ids, rows, CONFIG["vocab_size"])
    print(f"{len(kept)} chapters, {len(prose.ids):,} tokens; {rows.size:,} held out")

    model = Gemma4ForCausalLM(Gemma4TextConfig(**CONFIG))
    initialise(model)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    data = batches([prose, Conversations(tokenizer, kept)], args.batch, args.seed)
    fit(model.train(), data, args.steps)

    model = model.eval().to(torch.bfloat16)
    write_model(model, tokenizer, args.out)
    loss = validation_loss(model.float(), rows)
    print(f"validation {loss:.3f} nats per token, Kneser-Ney bigram {bigram:.3f}")


if __name__ == "__main__":
    main()
