"""The loss of a model's logits without an fp32 copy of them, and of their softmax."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.gemma4 import modeling_gemma4 as gemma4

from ... import ops
from . import base

HAVE_LOSS = (gemma4.Gemma4ForCausalLM, gemma4.Gemma4ForConditionalGeneration)
IGNORED = -100


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = IGNORED,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """What transformers' ForCausalLMLoss computes, of the same arguments."""
    if ignore_index != IGNORED or type(logits) is not Tensor or not base.takes_ops(logits):
        kwargs |= dict(num_items_in_batch=num_items_in_batch, ignore_index=ignore_index)
        return ForCausalLMLoss(logits, labels, vocab_size, shift_labels=shift_labels, **kwargs)
    if shift_labels is None:
        assert labels is not None  # one of both is given
        shift_labels = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
    targets_T = shift_labels.reshape(-1).to(logits.device)
    nll_T, _ = ops.softcap_cross_entropy(logits.reshape(-1, vocab_size), targets_T, 0.0)
    count = num_items_in_batch
    if count is None:
        count = (targets_T != IGNORED).sum()
    return nll_T.sum() / (count.to(nll_T.device) if isinstance(count, Tensor) else count)


def put_loss(model: nn.Module) -> None:
    """In the place of transformers' own alone: a loss that somebody set stays."""
    for module in model.modules():
        if isinstance(module, HAVE_LOSS) and module.loss_function is ForCausalLMLoss:
            module.loss_function = causal_lm_loss


def take_loss(model: nn.Module) -> None:
    for module in model.modules():
        if module.__dict__.get("_loss_function") is causal_lm_loss:
            del module._loss_function
