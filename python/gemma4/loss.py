"""The language model's loss, without an fp32 copy of all logits."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .layout import Layout

# Tokens whose loss is computed at once: the fp32 copy of their logits is all that exists of it.
LOSS_TOKENS = 1024


def causal_lm_loss(
    logits_TV: Tensor, labels_BS: Tensor, layout: Layout, num_items_in_batch: int | Tensor | None
) -> Tensor:
    """The cross-entropy, in fp32, of each token's logits against the label of the next column.

    Over labels that are not -100: their mean (0 if all are), or their sum over num_items_in_batch.
    Raises ValueError for labels of another shape than the batch.
    """
    if labels_BS.shape != layout.shape:
        raise ValueError(
            f"labels must be {list(layout.shape)}, like the input, got {list(labels_BS.shape)}"
        )
    targets_T = layout.pack(F.pad(labels_BS[:, 1:], (0, 1), value=-100)).to(logits_TV.device)
    total = logits_TV.new_zeros((), dtype=torch.promote_types(logits_TV.dtype, torch.float32))
    pairs = zip(logits_TV.split(LOSS_TOKENS), targets_T.split(LOSS_TOKENS), strict=True)
    for part, target in pairs:
        # Recomputed in backward: autograd would keep every part's fp32 softmax.
        total = total + checkpoint(_summed, part, target, use_reentrant=False)
    count = num_items_in_batch
    if count is None:
        count = (targets_T != -100).sum().clamp(min=1)
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


def _summed(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    return F.cross_entropy(logits_TV, targets_T, ignore_index=-100, reduction="sum")
