"""A decoding step of packed weights launches what one of dense weights does."""

import launches
import pytest
from support import emulated
from support.marks import needs_compiler
from support.packed_models import packed

from gemma4 import Gemma4ForCausalLM, Gemma4TextConfig

pytestmark = [pytest.mark.slow, needs_compiler]
WHOLE = dict(hidden_size_per_layer_input=64, moe_intermediate_size=64)


@pytest.mark.parametrize(("name", "tables"), [("E4B", False), ("12B", True), ("26B-A4B", False)])
def test_launches(name, tables, monkeypatch):
    """But for the look-up in a packed table, which is several of torch's operators."""
    emulated.ops()
    monkeypatch.setattr(emulated.control().settings, "sm_count", launches.MULTIPROCESSORS)
    options = launches.narrow(name).to_dict()
    options |= {key: size for key, size in WHOLE.items() if options[key]}
    dense, other = (
        Gemma4ForCausalLM(Gemma4TextConfig.from_dict(options)).bfloat16().eval() for _ in range(2)
    )
    packed(other, tables)
    made, wanted = launches.steady_step(other, 64), launches.steady_step(dense, 64)
    if tables:
        assert made.pop("first") > wanted.pop("first")
    assert made == wanted
