"""A model's folder: JSON read strictly, and files replaced all at once, whenever a save is cut."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.tiny import DENSE, E_SERIES, ids, tiny

from gemma4 import Gemma4ForCausalLM, demo
from gemma4.files import COMMITTED, finish, read_json, replacing

POSIX = pytest.mark.skipif(os.name != "posix", reason="no fork")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"a": 1', "is not valid JSON"),
        (b'{"a": 1, "b": 2, "a": 3}', "gives the key 'a' twice"),
        (b'{"a": {"b": 1, "b": 1}}', "gives the key 'b' twice"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deep"),
        (b"[1]", r"must hold a JSON object, got \[1\]"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "is not valid JSON"),
        (b"\xff\xfe{\x00", "is not valid JSON"),
        (b" " * (33 * 2**20) + b"{}", "longer than"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-lfs pointer"),
    ],
)
def test_json_is_read_strictly(content: bytes, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "some.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as error:
        read_json(file)
    assert str(error.value).startswith(str(file)) and len(str(error.value)) < 300


def test_replacing(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    with replacing(folder) as (staging, removed):
        (staging / "a").write_text("1")
        (staging / "b").write_text("1")
        removed.add("c")
        assert sorted(path.name for path in folder.iterdir()) == [staging.name]
    (folder / "mine").write_text("mine")
    with pytest.raises(KeyError), replacing(folder) as (staging, removed):
        (staging / "a").write_text("2")
        removed.add("b")
        raise KeyError
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "a": "1",
        "b": "1",
        "mine": "mine",
    }
    with replacing(folder) as (staging, removed):
        (staging / "a").write_text("3")
        removed |= {"a", "b"}
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"a": "3", "mine": "mine"}


@pytest.mark.parametrize("name", ["../victim", "/victim", "sub/victim", ".."])
def test_a_manifest_stays_in_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("here")
    committed = tmp_path / "folder" / COMMITTED
    committed.mkdir(parents=True)
    (committed / "manifest.json").write_text(json.dumps({"moved": [], "removed": [name]}))
    with pytest.raises(ValueError, match=r"manifest\.json names files outside"):
        finish(tmp_path / "folder")
    assert (tmp_path / "victim").exists()


def test_other_files_stay(tmp_path: Path) -> None:
    others = [
        "model_ema.safetensors",
        "model-backup.safetensors",
        "model-00007-of-00009.safetensors",
    ]
    for name in others:
        tmp_path.joinpath(name).write_text("mine")
    for size in ("5GB", "50KB", "80KB", "5GB"):
        tiny(DENSE).save_pretrained(tmp_path, max_shard_size=size)
        assert all(tmp_path.joinpath(name).read_text() == "mine" for name in others)
        index = tmp_path / "model.safetensors.index.json"
        assert index.exists() == (size != "5GB")
        named = (
            set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else set()
        )
        weights = {path.name for path in tmp_path.glob("*.safetensors")} - set(others)
        assert weights == (named or {"model.safetensors"})


@POSIX
def test_files_have_the_umasks_mode(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        model = Gemma4ForCausalLM.from_pretrained(demo.path())
        model.save_pretrained(tmp_path, max_shard_size="2MB")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) > 6 and modes == {0o640}


LIMITED = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from support.tiny import E_SERIES, tiny
model = tiny(E_SERIES)
for limit in (None, 0, 100, 5_000, 200_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit or 0, resource.RLIM_INFINITY))
    try:
        if limit is None:
            model.generation_config.save_pretrained(sys.argv[1])
        else:
            model.save_pretrained(sys.argv[1], max_shard_size="250KB")
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        print(error)
"""


@POSIX
@torch.no_grad()
def test_a_full_disk_leaves_the_old_model(tmp_path: Path) -> None:
    old = tiny(DENSE)
    old.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    command = [sys.executable, "-c", LIMITED, tmp_path, Path(__file__).parents[1]]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(said) == 5
    assert all("File too large" in line for line in said)
    assert str(tmp_path / "generation_config.json") in said[0]
    assert str(tmp_path / "config.json") in said[1] and ".safetensors" in said[4]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# A child of this process saves and is killed; this one looks at what it left. `at_step` ends the
# child at its n-th change of the disk; the others are killed at any time.
KILLED = """
import itertools, os, random, signal, sys, time
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from support.tiny import DENSE, MOE, ids, tiny
from gemma4 import Gemma4ForCausalLM

folder, rng = Path(sys.argv[1]), random.Random(0)
torch.set_grad_enabled(False)
models = [tiny(DENSE), tiny(MOE), tiny(DENSE, seed=1)]
sizes = ["5GB", "700KB", "400KB"]
logits = [model(ids(1, 9)).logits for model in models]

def found():
    now = Gemma4ForCausalLM.from_pretrained(folder)(ids(1, 9)).logits
    return next(i for i, known in enumerate(logits) if torch.equal(known, now))

def at_step(last):
    steps = itertools.count()
    def counted(call):
        def step(*args, **kwargs):
            if next(steps) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return step
    for name in ("replace", "rename", "unlink", "fsync", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid

for old, new in [(1, 2), (0, 1), (2, 0)][: int(sys.argv[3])]:
    seen = set()
    for last in itertools.count():
        models[old].save_pretrained(folder, max_shard_size=sizes[old])
        def work():
            at_step(last)
            models[new].save_pretrained(folder, max_shard_size=sizes[new])
        _, status = os.waitpid(child(work), 0)
        seen.add(found())
        if status == 0:
            break
        assert status == signal.SIGKILL, status
    assert last > 8 and seen == {old, new} and found() == new, (last, seen)

def forever():
    for i in itertools.count():
        models[i % 3].save_pretrained(folder, max_shard_size=sizes[i % 3])

for _ in range(int(sys.argv[4])):
    pid = child(forever)
    time.sleep(rng.uniform(0.01, 0.06))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    found()
models[0].save_pretrained(folder)
print(sorted(path.name for path in folder.iterdir()))
"""


@POSIX
@pytest.mark.parametrize(
    ("changes", "kills"), [(1, 5), pytest.param(3, 60, marks=pytest.mark.slow)]
)
def test_killed_at_any_moment(changes: int, kills: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, tmp_path, Path(__file__).parents[1]]
    command += [str(changes), str(kills)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    names = ["config.json", "generation_config.json", "model.safetensors"]
    assert run.stdout.strip() == str(names), "nothing unfinished stays"


def test_a_committed_save_is_finished_by_whoever_opens_the_folder(tmp_path: Path) -> None:
    """What lies there after a kill between the commit and the last move."""
    old, new = tiny(DENSE), tiny(E_SERIES)
    old.save_pretrained(tmp_path, max_shard_size="60KB")
    shards = sorted(path.name for path in tmp_path.glob("model-*.safetensors"))
    committed = tmp_path / COMMITTED
    new.save_pretrained(committed)
    (committed / "config.json").replace(tmp_path / "config.json")
    moved = ["config.json", "generation_config.json", "model.safetensors"]
    removed = [*shards, "model.safetensors.index.json"]
    (committed / "manifest.json").write_text(json.dumps({"moved": moved, "removed": removed}))
    model = Gemma4ForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(ids(1, 9)).logits, new(ids(1, 9)).logits)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(moved)
