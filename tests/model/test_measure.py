"""What bench/ and `gemma4 bench` measure with; no test depends on how fast this machine is."""

from types import SimpleNamespace

import pytest
import torch

from gemma4 import Gemma4ForCausalLM, Gemma4TextConfig, measure

CPU = torch.device("cpu")


def test_calls_rotate():
    seen = []
    timing = measure.time_calls(seen.append, CPU, rotations=3, seconds=0.0)
    assert seen == [0, 1, 2, 0, 1, 2, 0, 1]  # all once to warm up, then five samples
    assert 0 < timing.p20 <= timing.median <= timing.p80
    assert timing.taken == "host"


def test_quantiles(monkeypatch):
    """Of 1 to 10 seconds, in any order."""
    times = iter([0.0, *[x for s in (3, 1, 9, 7, 5, 2, 8, 10, 6, 4) for x in (0.0, s)], 99.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    monkeypatch.setattr(measure, "LEAST_SAMPLES", 10)
    timing = measure.time_calls(lambda i: None, CPU, seconds=0.0)
    assert (timing.median, timing.p20, timing.p80) == pytest.approx((5.5, 2.8, 8.2))


# Gigabytes in bf16, worked out from the shapes: projections, feed-forward or 8 of 128 experts,
# per-layer gates and the head.
@pytest.mark.parametrize(
    "name, gigabytes",
    [("E2B", 4.559), ("E4B", 9.288), ("12B", 23.81), ("26B-A4B", 7.644), ("31B", 61.39)],
)
def test_decode_bytes(name, gigabytes):
    with torch.device("meta"):
        model = Gemma4ForCausalLM(Gemma4TextConfig.preset(name)).to(torch.bfloat16)
    assert measure.decode_bytes(model) == pytest.approx(gigabytes * 1e9, rel=1e-3)


def test_untied_embeddings_are_not_read():
    options = Gemma4TextConfig.preset("E2B").to_dict()
    models = []
    for tied in (True, False):
        config = Gemma4TextConfig.from_dict(options | {"tie_word_embeddings": tied})
        with torch.device("meta"):
            models.append(Gemma4ForCausalLM(config))
    assert measure.decode_bytes(models[0]) == measure.decode_bytes(models[1])


def test_machine():
    facts = measure.machine(CPU)
    assert facts["device"] == "cpu" and facts["torch"] == torch.__version__
    assert facts["commit"] is None or len(facts["commit"]) == 40
    assert measure._said("no-such-program") is None
    assert measure._said("git", "no-such-command") is None


class FakeGpu:
    """torch.cuda's part in a timing: a clock that each call moves on, graphs that replay calls."""

    def __init__(self, monkeypatch, reads_on_host):
        self.clock, self.mode, self.calls, self.recording = 0.0, 0, [], None
        self.reads_on_host = reads_on_host
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.clock

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        class Graph:
            def replay(self):
                for i in self.recorded:
                    gpu.launch(i)

        class Capture:
            def __init__(self, graph):
                self.graph = graph

            def __enter__(self):
                gpu.recording = self.graph.recorded = []

            def __exit__(self, *error):
                gpu.recording = None

        fakes = dict(Event=Event, CUDAGraph=Graph, graph=Capture)
        fakes["get_sync_debug_mode"] = lambda: self.mode
        fakes["set_sync_debug_mode"] = lambda mode: setattr(self, "mode", mode)
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def launch(self, i):
        self.clock += 1e-5
        self.calls.append(i)

    def call(self, i):
        if self.reads_on_host and self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.recording is not None:
            self.recording.append(i)
        else:
            self.launch(i)


@pytest.mark.parametrize("reads_on_host", [False, True])
def test_timing_on_a_gpu(monkeypatch, reads_on_host):
    """Calls of 10 µs: 6 turns of 3 nearly fill a replay of 200 µs, and each call is 10 µs of it."""
    gpu = FakeGpu(monkeypatch, reads_on_host)
    timing = measure.time_calls(gpu.call, torch.device("cuda"), rotations=3, seconds=0.0)
    assert timing.taken == ("stream" if reads_on_host else "graph")
    assert timing.median == pytest.approx(1e-5) and gpu.mode == 0
    before = 3 + (not reads_on_host) + 1  # warm-up, the trial, the call that is timed alone
    assert gpu.calls[before:] == [0, 1, 2] * (6 * (1 + 5))


def test_key_bytes():
    """E4B over 32,768 keys: 35 windows of 512 and 7 full layers, two KV heads, keys and values."""
    config = Gemma4TextConfig.preset("E4B")
    expected = 2 * 2 * 2 * (35 * 512 * 256 + 7 * 32768 * 512)
    assert measure.key_bytes(config, 32768, torch.bfloat16) == expected
    assert measure.key_bytes(config, 100, torch.float32) == 2 * 2 * 4 * 100 * (35 * 256 + 7 * 512)
    full, sliding = 2 * 2 * 7 * 32768 * (512 + 4), 2 * 2 * 35 * 512
    for kv_dtype, head in (("fp8", 2 * 256), ("fp8-all", 256 + 4)):
        found = measure.key_bytes(config, 32768, torch.bfloat16, kv_dtype)
        assert found == full + sliding * head


def test_launches_of_a_token(monkeypatch):
    """What the profiler saw of the longer of two answers beside the shorter, a token each."""
    made = []

    class Profile:
        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def events(self):
            gpu, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
            on_gpu = 50 + 301 * made[-1]  # the prompt's, and each token's
            return [SimpleNamespace(device_type=d) for d in [gpu] * on_gpu + [cpu] * 9]

    class Model:
        device = torch.device("cuda")

        def generate(self, ids, max_new_tokens, **options):
            made.append(max_new_tokens)

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch, "tensor", lambda values, device: values)
    assert measure.launches_per_token(Model()) == 301
    Model.device = CPU
    assert measure.launches_per_token(Model()) is None
