import pytest
import torch
from support import cases, float64
from support.backends import BF16, FP16, FP32, in_dtypes
from support.expect import assert_close_to_float64, assert_refused
from support.marks import all_dtypes

CASES = {  # slots, leading dimensions of the cache, query heads, KV heads, C, V given
    "no tokens": ([], (2, 8), 4, 2, 64, True),
    "rows": ([7, 8, 0], (2, 8), 4, 2, 64, True),
    "one pool of slots": ([15, 0, 7], (16,), 4, 2, 64, True),
    "pages out of order": ([19, 2, 12, 13, 0], (5, 4), 8, 4, 128, True),
    "dropped tokens": ([3, -1, 17, -1, -1, 16], (5, 4), 8, 4, 256, True),
    "all dropped": ([-1, -1], (5, 4), 8, 4, 256, True),
    "full": ([40, 41, 42], (3, 16), 4, 1, 512, True),
    "full, V from K": ([31, 32, 5], (3, 16), 4, 2, 512, False),
}


def inputs(backend, case, dtype):
    *sizes, with_v = CASES[case]
    positions = torch.randperm(500)[: len(sizes[0])]
    options = dict(dtype=dtype, with_v=with_v, live=32, positions=positions)
    return cases.qkv_norm_rope_cache(backend, *sizes, **options)


def check(backend, arguments, dtype, eps=1e-6):
    """Slots that no token names keep the NaN they were made with."""
    q = backend.ops.qkv_norm_rope_cache(**arguments, eps=eps)
    k_cache, v_cache, slots = (arguments[name] for name in ("k_cache", "v_cache", "slots"))
    given = [arguments[n] for n in ("q", "k", "v", "q_weight", "k_weight", "positions", "inv_freq")]
    exact = float64.qkv_norm_rope(*given, eps)
    rounded = float64.qkv_norm_rope(*given, eps, dtype=dtype)
    # Angles, cos and sin are fp32 in every dtype.
    size = dict(terms=q.shape[-1], inner=torch.float32)
    assert_close_to_float64(q, exact[0], dtype, rounded=rounded[0], **size)
    kept = slots.cpu() >= 0
    for cache, e, r in ((k_cache, exact[1], rounded[1]), (v_cache, exact[2], rounded[2])):
        flat = cache.flatten(0, -3)
        written = flat[slots[slots >= 0].long()]
        assert_close_to_float64(written, e[kept], dtype, rounded=r[kept], **size)
        others = torch.ones(len(flat), dtype=torch.bool)
        others[slots[slots >= 0].cpu().long()] = False
        assert flat.cpu()[others].isnan().all()


@all_dtypes
@pytest.mark.parametrize("case", CASES)
def test_qkv_norm_rope_cache(backend, poisoned_memory, case, dtype):
    check(backend, inputs(backend, case, dtype), dtype)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_fp32_weights(backend, poisoned_memory, case, dtype):
    arguments = in_dtypes(inputs(backend, case, dtype), q_weight=FP32, k_weight=FP32)
    check(backend, arguments, dtype)


def test_int32_slots(backend):
    arguments = inputs(backend, "dropped tokens", torch.float32)
    check(backend, arguments | {"slots": arguments["slots"].int()}, torch.float32)


def test_eps(backend):
    arguments = inputs(backend, "rows", torch.float32)
    check(backend, arguments, torch.float32, eps=0.5)


def test_the_cache_holds_a_v_that_is_not_k(backend):
    arguments = inputs(backend, "full, V from K", torch.float32)
    backend.ops.qkv_norm_rope_cache(**arguments)
    slots = arguments["slots"]
    k, v = (arguments[name].flatten(0, 1)[slots] for name in ("k_cache", "v_cache"))
    assert (k - v).abs().max() > 0.1


def test_a_slot_past_the_cache_writes_nothing(backend):
    """The eager twin raises; a kernel, which nobody waits for, drops the token."""
    arguments = inputs(backend, "rows", torch.float32)
    slots = arguments["slots"].clone()
    slots[0] = arguments["k_cache"].flatten(0, 1).shape[0]
    if backend.name == "eager":
        with pytest.raises(ValueError, match="slots must lie below the cache's"):
            backend.ops.qkv_norm_rope_cache(**(arguments | {"slots": slots}))
        return
    dropped = arguments | {"slots": slots.clone().index_fill_(0, torch.tensor([0]), -1)}
    caches = {name: arguments[name].clone() for name in ("k_cache", "v_cache")}
    backend.ops.qkv_norm_rope_cache(**(dropped | caches))
    backend.ops.qkv_norm_rope_cache(**(arguments | {"slots": slots}))
    for name, cache in caches.items():
        assert torch.equal(arguments[name].nan_to_num(), cache.nan_to_num())


def test_is_for_inference(backend):
    arguments = inputs(backend, "rows", torch.float32)
    arguments["q_weight"].requires_grad_()
    with pytest.raises(RuntimeError, match="qkv_norm_rope_cache has no backward"):
        backend.ops.qkv_norm_rope_cache(**arguments)
    with torch.no_grad():
        backend.ops.qkv_norm_rope_cache(**arguments)


BAD = {
    "integer q": ({"q": lambda q: q.int()}, TypeError, "q must be a floating.*got torch.int32"),
    "k head": (
        {"k": lambda k: k[..., :64]},
        ValueError,
        r"k must be \[5, G, 128\], got \[5, 4, 64\]",
    ),
    "k dtype": (
        {"k": lambda k: k.double()},
        TypeError,
        "k must have the dtype of q, torch.float32, got torch.float64",
    ),
    "v heads": (
        {"v": lambda v: v[:, :2]},
        ValueError,
        r"v must have shape \[5, 4, 128\], got \[5, 2, 128\]",
    ),
    "k_cache dtype": (
        {"k_cache": lambda c: c.half()},
        TypeError,
        "k_cache must have the dtype of q, torch.float32, got torch.float16",
    ),
    "k_cache heads": (
        {"k_cache": lambda c: c[:, :, :2].contiguous()},
        ValueError,
        r"k_cache must end in \[G, C\] = \[4, 128\], got \[5, 4, 2, 128\]",
    ),
    "k_cache without slots": (
        {"k_cache": lambda c: c[0, 0]},
        ValueError,
        r"k_cache must end in \[G, C\] = \[4, 128\], got \[4, 128\]",
    ),
    "k_cache of strides": (
        {"k_cache": lambda c: c.transpose(0, 1)},
        ValueError,
        "k_cache must be contiguous",
    ),
    "k_cache device": (
        {"k_cache": lambda c: c.to("meta")},
        ValueError,
        "k_cache must be on the device of q, c.*, got meta",
    ),
    "v_cache size": (
        {"v_cache": lambda c: c[:4]},
        ValueError,
        r"v_cache must have shape \[5, 4, 4, 128\], got \[4, 4, 4, 128\]",
    ),
    "v_cache dtype": (
        {"v_cache": lambda c: c.bfloat16()},
        TypeError,
        "v_cache must have the dtype of q, torch.float32, got torch.bfloat16",
    ),
    "float slots": (
        {"slots": lambda s: s.float()},
        TypeError,
        "slots must hold integers, got torch.float32",
    ),
    "slots length": (
        {"slots": lambda s: s[:2]},
        ValueError,
        r"slots must have shape \[5\], got \[2\]",
    ),
    "slots device": (
        {"slots": lambda s: s.to("meta")},
        ValueError,
        "slots must be on the device of q, c.*, got meta",
    ),
    "half table": (
        {"inv_freq": lambda f: f.half()},
        TypeError,
        "inv_freq must be torch.float32 .*, got torch.float16",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(backend, case):
    changes, error, sentence = BAD[case]
    arguments = inputs(backend, "pages out of order", torch.float32)
    arguments |= {name: change(arguments[name]) for name, change in changes.items()}
    assert_refused(backend.ops.qkv_norm_rope_cache, arguments, error, sentence)
