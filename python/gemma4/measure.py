"""Times of calls, and beside them what this process's memory and matrix products reach."""

import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import gemma4_kernels
from gemma4_kernels.packed_linear import PackedParameter

from .cache import KVDtype, is_coded

if TYPE_CHECKING:
    from .config import Gemma4TextConfig
    from .model import Gemma4ForCausalLM

REPLAY_SECONDS = 2e-4  # at least, so that the events' own cost does not count
LEAST_SAMPLES = 5


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, and how they were taken: "graph", "stream" or "host"."""

    median: float
    p20: float
    p80: float
    taken: str


def time_calls(
    call: Callable[[int], object], device: torch.device, rotations: int = 1, seconds: float = 0.3
) -> Timing:
    """Times call(i), i = 0..rotations - 1 by turns: one set of inputs each, together more than the
    caches hold.

    On a GPU the calls are captured in a CUDA graph whose replays are timed; where a call reads
    values on the host and so cannot be captured, streams of calls are.
    """
    for i in range(rotations):
        call(i)
    if device.type != "cuda":
        return _timing(_host_samples(call, rotations, seconds), "host")
    taken = "graph" if _can_be_captured(call) else "stream"
    alone = _events(lambda: call(0))
    turns = max(1, min(1000, int(REPLAY_SECONDS / max(alone, 1e-7)) // rotations))

    def run() -> None:
        for _ in range(turns):
            # Outputs are kept for a turn, so that they rotate too.
            _ = [call(i) for i in range(rotations)]

    replay: Callable[[], object] = run
    if taken == "graph":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        replay = graph.replay
    _events(replay)
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < LEAST_SAMPLES or time.perf_counter() < end:
        samples.append(_events(replay) / (turns * rotations))
    return _timing(samples, taken)


def _timing(samples: list[float], taken: str) -> Timing:
    p20, *_, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    return Timing(statistics.median(samples), p20, p80, taken)


def _host_samples(call: Callable[[int], object], rotations: int, seconds: float) -> list[float]:
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < LEAST_SAMPLES or time.perf_counter() < end:
        start = time.perf_counter()
        call(len(samples) % rotations)
        samples.append(time.perf_counter() - start)
    return samples


def _events(run: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _can_be_captured(call: Callable[[int], object]) -> bool:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(0)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return False
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return True


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written ones both, of a copy that no cache holds."""
    size = 1 << (30 if device.type == "cuda" else 26)
    x, y = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / time_calls(lambda i: y.copy_(x), device).median


def gemm_rate(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP a second of torch's product of two square matrices."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / time_calls(lambda i: a @ b, device).median


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that run() has in use at most, beyond those before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate((change for _, change in changes), initial=0))


def machine(device: torch.device) -> dict[str, object]:
    """What a result must say of where it was made."""
    facts: dict[str, object] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "version": gemma4_kernels.__version__,
        "commit": _said("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        asked = "driver_version,power.limit,clocks.sm,clocks.max.sm,clocks.mem"
        query = ("--query-gpu=" + asked, "--format=csv,noheader", f"--id={device.index or 0}")
        facts["card"] = dict(
            zip(asked.split(","), (_said("nvidia-smi", *query) or "").split(", "), strict=False)
        )
    else:
        facts["threads"] = torch.get_num_threads()
    return facts


def _said(*command: str) -> str | None:
    """The first line that a program prints; None if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else None


def decode_bytes(model: "Gemma4ForCausalLM") -> int:
    """The weights that one token's decoding must read: all but the tables it takes one row of, and
    of the experts those that are chosen."""
    config = model.config
    tables = {"model.embed_tokens_per_layer.weight"}
    if not config.tie_word_embeddings:
        tables.add("model.embed_tokens.weight")
    share = 1.0
    if config.enable_moe_block:
        experts, chosen, _ = config.expert_sizes
        share = chosen / experts
    sizes = {name: weight.nbytes for name, weight in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, PackedParameter):
            sizes[name] = module.nbytes
    total = 0.0
    for name, size in sizes.items():
        part = share if ".experts." in name else 1
        total += 0 if name in tables else size * part
    return int(total)


def key_bytes(
    config: "Gemma4TextConfig", keys: int, dtype: torch.dtype, kv_dtype: KVDtype | None = None
) -> int:
    """The keys and values that one token's attention reads in all layers."""
    total = 0
    for kind in config.layer_types:
        window = config.window(kind)[0]
        seen = min(keys, window) if window else keys
        size = config.head_size(kind)
        head = size + 4 if is_coded(kv_dtype, bool(window)) else size * dtype.itemsize
        total += 2 * seen * config.kv_heads(kind) * head
    return total


def launches_per_token(model: "Gemma4ForCausalLM") -> float | None:
    """Kernels, copies and fills that the profiler sees a GPU do for one more token of `generate`,
    a graph's too; None on a CPU, which is given none."""
    if model.device.type != "cuda":
        return None
    ids = torch.tensor([[2, 3]], device=model.device)

    def seen(tokens: int) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=[])
            torch.cuda.synchronize(model.device)
        on_gpu = torch.autograd.DeviceType.CUDA
        return sum(event.device_type == on_gpu for event in profile.events())

    # The prompt and the first step, which captures the others, are in both.
    few, more = 4, 12
    seen(few)
    return (seen(more) - seen(few)) / (more - few)
