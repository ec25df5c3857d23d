"""What a forward is given, checked."""

import torch
from torch import Tensor

from .config import Gemma4TextConfig


def checked_shape(
    config: Gemma4TextConfig,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    per_layer_inputs: Tensor | None,
) -> tuple[int, int]:
    """[B, S] of a batch. Raises ValueError for inputs that are none or contradict each other."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if input_ids is not None:
        if per_layer_inputs is not None:
            raise ValueError("per_layer_inputs go with inputs_embeds, not with input_ids")
        return _shape_of_ids(config, input_ids)
    assert inputs_embeds is not None
    return _shape_of_embeds(config, inputs_embeds, per_layer_inputs)


def _shape_of_ids(config: Gemma4TextConfig, input_ids: Tensor) -> tuple[int, int]:
    if input_ids.ndim != 2 or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids must be integers [B, S], got {input_ids.dtype} {list(input_ids.shape)}"
        )
    if input_ids.is_cpu and not torch.compiler.is_compiling() and input_ids.numel():
        low, high = input_ids.aminmax()
        if low < 0 or high >= config.vocab_size:
            bad = int(low if low < 0 else high)
            raise ValueError(f"input_ids must lie in 0..{config.vocab_size - 1}, got {bad}")
    batch, columns = input_ids.shape
    return batch, columns


def _shape_of_embeds(
    config: Gemma4TextConfig, embeds: Tensor, per_layer_inputs: Tensor | None
) -> tuple[int, int]:
    if embeds.ndim != 3 or embeds.shape[-1] != config.hidden_size:
        raise ValueError(
            f"inputs_embeds must be [B, S, {config.hidden_size}], got {list(embeds.shape)}"
        )
    batch, columns, _ = embeds.shape
    if config.hidden_size_per_layer_input:
        want = [batch, columns, config.num_hidden_layers, config.hidden_size_per_layer_input]
        got = None if per_layer_inputs is None else list(per_layer_inputs.shape)
        if got != want:
            raise ValueError(
                f"inputs_embeds of a model with PLE need per_layer_inputs {want}, got {got}"
            )
    elif per_layer_inputs is not None:
        raise ValueError("per_layer_inputs given, but this model has no PLE")
    return batch, columns


def restarting(cu_seq_lens: Tensor, shape: tuple[int, int]) -> Tensor:
    """position_ids [1, S] of the sequences that one row packs."""
    lengths = cu_seq_lens.diff().tolist()
    if shape[0] != 1 or sum(lengths) != shape[1]:
        raise ValueError(
            f"cu_seq_lens_q must cover one row of tokens, got {sum(lengths)} for {list(shape)}"
        )
    return torch.cat([torch.arange(length) for length in lengths])[None]
