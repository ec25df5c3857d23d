"""What a compiler is shown in the ops' places has the numbers of the ops."""

import pytest
import torch
from support import cases, float64
from support.backends import EAGER
from support.expect import assert_close_to_float64
from support.marks import all_dtypes

from gemma4_kernels import opset
from gemma4_kernels.reference.traced import TRACED


def test_ops_are_shown():
    assert TRACED.keys() < opset.OPS.keys()


def test_the_compiler_is_shown_them():
    nodes: list[str] = []

    def backend(graph, inputs):
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    x = torch.randn(2, 8)
    compiled = torch.compile(lambda x: torch.ops.aten.neg(EAGER.ops.geglu(x)), backend=backend)
    with opset.showing(TRACED):
        shown = compiled(x)
    assert not any("gemma4_kernels" in node for node in nodes)
    nodes.clear()
    assert torch.equal(compiled(x), shown)
    assert any("gemma4_kernels.geglu" in node for node in nodes)  # compiled anew


@all_dtypes
@pytest.mark.parametrize(
    "seq_lens, slots, options",
    [
        ([1, 17, 20], 20, {}),
        ([1, 8, 9, 20], 20, dict(window=8)),
        ([1, 5, 8, 9, 16, 77], 8, dict(window=8, ring=True)),
        ([1, 12, 13, 14, 40], 13, dict(window=8, ring=True)),
        ([9], 16, dict(scale=0.25)),
    ],
)
def test_attention_over_all_slots(dtype, seq_lens, slots, options):
    """A ring holds the last keys; what no key was put in is 0, as a compiled step demands."""
    batch, heads, kv_heads, size = len(seq_lens), 4, 2, 64
    q = EAGER.randn(batch, 1, heads, size, dtype=dtype, std=0.5)
    k_cache, v_cache = torch.zeros(2, batch, slots, kv_heads, size, dtype=dtype)
    rows = []
    for b, length in enumerate(seq_lens):
        k, v = (EAGER.randn(length, kv_heads, size, dtype=dtype, std=std) for std in (0.5, 1.0))
        last = torch.arange(max(0, length - slots), length)
        k_cache[b, last % slots], v_cache[b, last % slots] = k[last], v[last]
        rows.append((k, v))
    lengths = torch.tensor(seq_lens, dtype=torch.int32)
    window, scale, ring = (
        options.get(n, x) for n, x in dict(window=0, scale=1.0, ring=False).items()
    )
    out, _ = TRACED["attention_decode"](
        q, k_cache, v_cache, lengths, None, scale, window, ring, 0.0, False
    )
    for b, (k, v) in enumerate(rows):
        exact, rounded = (
            float64.attention(q[b], k, v, window=window, scale=scale, dtype=to)[0]
            for to in (None, dtype)
        )
        size_of = dict(terms=size, magnitude=10.0)
        assert_close_to_float64(out[b], exact, dtype, rounded=rounded, **size_of)


def test_new_keys_in_their_slots():
    """The same cache as the op's, to the bit."""
    arguments = cases.qkv_norm_rope_cache(EAGER, [3, 17], [8, 20], 4, 2, 16)
    caches = [torch.zeros_like(arguments[name]) for name in ("k_cache", "v_cache")]
    given = arguments | dict(k_cache=caches[0], v_cache=caches[1])
    expected = EAGER.ops.qkv_norm_rope_cache(**given)
    made = [torch.zeros_like(x) for x in caches]
    names = opset.OPS["qkv_norm_rope_cache"].names
    given |= dict(k_cache=made[0], v_cache=made[1])
    q = TRACED["qkv_norm_rope_cache"](*(given.get(name, 1e-6) for name in names))
    assert torch.equal(q, expected)
    for one, other in zip(made, caches, strict=True):
        assert torch.equal(one, other) and one.any()
