"""The demo's folder, damaged in hundreds of ways: it loads with the numbers that it should have, or
one sentence names the file and what is wrong with it, soon and in little memory.

What loads in spite of a change must have the numbers that plain transformers gives for the same
folder. Only where transformers cannot read it either, the undamaged numbers are expected.
"""

import json
import os
import random
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
import transformers

from gemma4 import Gemma4ForCausalLM, Gemma4Tokenizer, demo

SECONDS, BYTES = 10, 2 * 10**9
CHAT = [{"role": "user", "content": "Who are you?"}]
NAMES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
)
WRONG = (None, "x", "false", -1, 0, 1.5, 2**31, 10**30, 1e300, float("nan"), float("inf"), [], {})
DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5000000\n"

Damage = Callable[[Path], object]


def rewrite(file: Path, data: bytes) -> None:
    file.unlink(missing_ok=True)  # it may be a link to the demo's own
    file.write_bytes(data)


def changed_json(name: str, change: Callable[[dict], object]) -> Damage:
    def damage(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        change(data)
        rewrite(folder / name, json.dumps(data).encode())

    return damage


def with_bytes(name: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: rewrite(folder / name, change((folder / name).read_bytes()))


def with_table(change: Callable[[dict], object]) -> Damage:
    """The table of model.safetensors changed, the tensors' bytes as they were."""

    def damage(folder: Path) -> None:
        data = (folder / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        table = json.loads(data[8 : 8 + length])
        change(table)
        header = json.dumps(table).encode()
        rest = data[8 + length :]
        rewrite(folder / "model.safetensors", struct.pack("<Q", len(header)) + header + rest)

    return damage


def sharded(change: Callable[[dict], object] = lambda index: None) -> Damage:
    def damage(folder: Path) -> None:
        Gemma4ForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="2MB")
        changed_json("model.safetensors.index.json", change)(folder)

    return damage


def set_to(key: str, value: object) -> Callable[[dict], object]:
    return lambda data: data.update({key: value})


def damages() -> Iterator[tuple[str, Damage]]:
    yield from in_config()
    yield from in_generation_config()
    yield from in_tokenizer()
    yield from in_any_file()
    yield from in_table()
    yield from in_shards()


def in_config() -> Iterator[tuple[str, Damage]]:
    config = json.loads((demo.path() / "config.json").read_text())
    for key in config:
        if key == "architectures":
            continue
        yield f"config: no {key}", changed_json("config.json", lambda data, key=key: data.pop(key))
        for value in WRONG:
            damage = changed_json("config.json", set_to(key, value))
            yield f"config: {key} = {str(value)[:12]}", damage
    for key in ("rope_scaling", "text_config", "quantization_config", "per_layer_config"):
        for value in (5, "x", {"factor": 8.0}, [1]):
            yield f"config: {key} = {value}", changed_json("config.json", set_to(key, value))
    for kind, entry in config["rope_parameters"].items():
        for key in (*entry, "factor", "mine"):
            for value in WRONG:

                def change(data: dict, kind=kind, key=key, value=value) -> None:
                    data["rope_parameters"][kind][key] = value

                damage = changed_json("config.json", change)
                yield f"config: {kind}.{key} = {str(value)[:12]}", damage


def in_generation_config() -> Iterator[tuple[str, Damage]]:
    generation = json.loads((demo.path() / "generation_config.json").read_text())
    for key in (*generation, "max_new_tokens", "repetition_penalty", "min_p"):
        for value in WRONG:
            damage = changed_json("generation_config.json", set_to(key, value))
            yield f"generation_config: {key} = {str(value)[:12]}", damage


def in_tokenizer() -> Iterator[tuple[str, Damage]]:
    tokenizer_config = json.loads((demo.path() / "tokenizer_config.json").read_text())
    for key in (*tokenizer_config, "chat_template"):
        for value in (None, 5, "x", [], {}, [5], {"content": 5}):
            damage = changed_json("tokenizer_config.json", set_to(key, value))
            yield f"tokenizer_config: {key} = {value}", damage
    tokenizer = json.loads((demo.path() / "tokenizer.json").read_text())
    for key in tokenizer:
        for value in (None, 5, [], {}):
            yield f"tokenizer: {key} = {value}", changed_json("tokenizer.json", set_to(key, value))
    more = {f"token {i}": 2048 + i for i in range(5)}
    more_tokens = changed_json("tokenizer.json", lambda t: t["model"]["vocab"].update(more))
    yield "tokenizer: more tokens than the model", more_tokens


def in_any_file() -> Iterator[tuple[str, Damage]]:
    rng = random.Random(0)
    for name in NAMES:
        size = (demo.path() / name).stat().st_size
        yield f"{name} is a pointer", with_bytes(name, lambda _: LFS)
        yield f"{name} is empty", with_bytes(name, lambda _: b"")
        yield f"{name} is nested", with_bytes(name, lambda _: DEEP)
        yield f"{name} is binary", with_bytes(name, lambda _: bytes(range(256)))
        yield f"{name} is a list", with_bytes(name, lambda _: b"[1, 2]")
        yield f"{name} is gone", lambda folder, name=name: (folder / name).unlink()

        def to_folder(folder: Path, name=name) -> None:
            (folder / name).unlink()
            (folder / name).mkdir()

        yield f"{name} is a folder", to_folder
        for _ in range(6):
            at = rng.randrange(size)
            yield f"{name} is cut at {at}", with_bytes(name, lambda data, at=at: data[:at])


def in_table() -> Iterator[tuple[str, Damage]]:
    for dropped in ("dtype", "shape", "data_offsets"):
        for wrong in (None, 5, "x", [], [-1, 5], [2**62, 2**62], [0.5], {}):

            def change(table: dict, key=dropped, value=wrong) -> None:
                table["model.norm.weight"][key] = value

            yield f"table: {dropped} = {wrong}", with_table(change)
    for number in range(80):

        def flipped(data: bytes, seed=number) -> bytes:
            rng, data = random.Random(seed), bytearray(data)
            (length,) = struct.unpack("<Q", data[:8])
            at = rng.randrange(8) if seed < 8 else 8 + rng.randrange(length)
            data[at] ^= 1 << rng.randrange(8)
            return bytes(data)

        yield f"bit {number} of the table", with_bytes("model.safetensors", flipped)


def in_shards() -> Iterator[tuple[str, Damage]]:
    yield "in shards", sharded()
    for wrong in (None, 5, "../x", "/etc/passwd", "", ".", "absent.safetensors", ["x"], "a\0b"):

        def change(index: dict, value=wrong) -> None:
            index["weight_map"]["model.norm.weight"] = value

        yield f"index: {wrong!r}", sharded(change)
    for key in ("weight_map", "metadata"):
        for value in (None, 5, {}, [], "x"):
            yield f"index: {key} = {value}", sharded(set_to(key, value))


@pytest.fixture(scope="module")
def undamaged() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([[2, *range(20, 60)]])
    with torch.no_grad():
        return ids, Gemma4ForCausalLM.from_pretrained(demo.path(), dtype="float32")(ids).logits


def peak() -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def theirs(folder: Path, ids: torch.Tensor) -> torch.Tensor | None:
    """What plain transformers makes of a folder; None where it cannot."""
    transformers.utils.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        model, told = transformers.Gemma4ForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not any(told.values())
        return model.eval()(ids).logits
    except Exception:
        return None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no Linux")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", [29, pytest.param(1, marks=pytest.mark.slow)])
@torch.no_grad()
def test_every_damage_is_harmless_or_named(step: int, undamaged, tmp_path: Path) -> None:
    ids, logits = undamaged
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, faults, named, total = peak(), [], 0, 0
    for number, (what, damage) in enumerate(islice(damages(), 0, None, step)):
        total += 1
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in NAMES:
            os.link(demo.path() / name, folder / name)
        damage(folder)
        start = time.monotonic()
        try:
            now = Gemma4ForCausalLM.from_pretrained(folder, dtype="float32")(ids).logits
            tokenizer = Gemma4Tokenizer.from_pretrained(folder)
            tokenizer.apply_chat_template(CHAT)
        except (ValueError, OSError) as error:
            named += 1
            said = str(error)
            if str(folder) not in said or "\n" in said or len(said) > 700:
                faults.append(f"{what}: {said[:300]}")
        except BaseException as error:
            faults.append(f"{what}: {type(error).__name__}: {str(error)[:300]}")
        else:
            expected = theirs(folder, ids)
            expected = logits if expected is None else expected
            if now.shape != expected.shape or (now - expected).abs().max() > 1e-3:
                faults.append(f"{what}: other numbers")
        if time.monotonic() - start > SECONDS:
            faults.append(f"{what}: {time.monotonic() - start:.1f} s")
        shutil.rmtree(folder)
    assert not faults, "\n".join([f"{len(faults)} of {total}", *faults])
    assert total * step >= 900 and named * step >= 700
    assert peak() - before < BYTES
