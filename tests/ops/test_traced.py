"""What a compiler is shown in the ops' places has the numbers of the ops."""

import torch
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
