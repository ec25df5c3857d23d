"""What a compiler is shown in the ops' places has the numbers of the ops."""

import torch
from support import cases
from support.backends import EAGER

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


def test_a_packed_product_stays_a_call():
    """Its weight would be numbers all at once."""
    arguments = cases.linear_small(EAGER, 2, 64, 32, "norm_weight", "gated", form={})

    def call(x):
        return EAGER.ops.linear_small(**arguments | {"x": x})[0]

    with opset.showing(TRACED):
        shown = torch.compile(call, backend="aot_eager", fullgraph=True)(arguments["x"])
    torch.testing.assert_close(shown, call(arguments["x"]))
