"""What the tests of the plug-in for transformers share: small models, and both ways to run them."""

from pathlib import Path

import pytest
import torch

from gemma4_kernels import library

transformers = pytest.importorskip("transformers")

from gemma4_kernels.integrations import transformers as plugin  # noqa: E402
from gemma4_kernels.integrations.transformers import attention, base, experts, modules  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
NAMES = ["dense", "e2b_like", "moe_like", "k_eq_v", "attention_bias"]
each = pytest.mark.parametrize("name", NAMES)
IS_ON_A_GPU = base.takes_ops


@pytest.fixture(autouse=True, params=["as on a GPU", "as on a CPU"])
def way(request, monkeypatch, recwarn):
    """The models here are on a CPU: as on a GPU they take the ops (their eager twins), as on a CPU
    they call none but for packed rows and long prompts, whose tests say so by `use_ops`. Either
    way no layer takes torch's attention unseen."""
    if request.param == "as on a GPU":
        monkeypatch.setattr(base, "takes_ops", lambda x: True)
    else:
        use_ops(monkeypatch, None)
    library.warn.cache_clear()
    yield request.param
    assert not [w for w in recwarn if "without a kernel" in str(w.message)]


def load(name, attention="eager", **options):
    if name == "moe_like":
        options["experts_implementation"] = "eager" if attention == "eager" else plugin.NAME
    return transformers.Gemma4ForCausalLM.from_pretrained(
        GOLDEN / name, attn_implementation=attention, **options
    ).eval()


def both(name, **options):
    """Under transformers' eager attention, and with everything on these ops."""
    plugin.register()
    return load(name, **options), plugin.enable(load(name, plugin.NAME, **options))


def some_ids(batch, width, seed=0):
    return torch.randint(3, 96, (batch, width), generator=torch.Generator().manual_seed(seed))


def left_padding(batch, width):
    mask = torch.ones(batch, width, dtype=torch.long)
    for row in range(batch):
        mask[row, : 3 * row] = 0
    return mask


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def close_gradients(ours, theirs):
    """Of two models, by name; none is missing."""
    pairs = zip(theirs.named_parameters(), ours.named_parameters(), strict=True)
    for (key, a), (_, b) in pairs:
        assert (a.grad is None) == (b.grad is None), key
        if a.grad is not None:
            scale = a.grad.abs().max().item()
            options = dict(atol=1e-5 * max(scale, 1), rtol=1e-4)
            torch.testing.assert_close(b.grad, a.grad, **options, msg=key)


def use_ops(monkeypatch, ops):
    """Puts others in the place of the ops that the plug-in calls."""
    for module in (attention, experts, modules):
        monkeypatch.setattr(module, "ops", ops)
