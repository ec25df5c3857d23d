"""Puts the modules in and takes them out."""

from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.gemma4 import modeling_gemma4 as gemma4

from ...fusion import M
from . import base, layer
from .attention import attention
from .experts import experts
from .loss import put_loss, take_loss
from .mask import mask
from .packed import put_packed

ORIGINAL = {ours: theirs for theirs, ours in layer.SWAPPED.items()}


def register() -> None:
    """Adds attn_implementation and experts_implementation "gemma4_kernels" to transformers.

    Raises RuntimeError under a transformers that this was not made for.
    """
    base.check_version()
    AttentionInterface.register(base.NAME, attention)
    AttentionMaskInterface.register(base.NAME, mask)
    ExpertsInterface.register(base.NAME, experts)


def enable(model: nn.Module, *, packed: bool = False) -> nn.Module:
    """Puts a Gemma 4 model's modules, attention, experts and loss on these ops, in place.

    Weights, their names and the outputs stay; `disable` takes it back but for the implementations,
    which `set_attn_implementation` sets. On a CPU all of it runs what transformers would, but for
    the attention of long prompts.

    Linear layers that another library quantised are called, as it has them. packed: those of four
    or eight bits whose numbers a `PackedWeight` holds (of bitsandbytes, torchao and
    compressed-tensors) become `PackedLinear`, multiplied by our kernels, their activations in 16
    bits; for good, for what was there is gone.

    Returns the model, which may be one that others wrapped (PEFT). Raises ValueError for a model
    without Gemma 4 text layers, or with an activation or rotary embedding that these ops do not
    compute.
    """
    layers = _all(model, gemma4.Gemma4TextDecoderLayer)
    if not layers:
        raise ValueError(f"enable needs a Gemma 4 text model, got {type(model).__name__}")
    config = layers[0].config
    if config.hidden_activation != "gelu_pytorch_tanh":
        raise ValueError(f"enable needs the tanh-GELU, got {config.hidden_activation}")
    for rotary in _all(model, gemma4.Gemma4TextRotaryEmbedding):
        odd = set(rotary.rope_type.values()) - {"default", "proportional"}
        if odd:
            raise ValueError(f"enable needs default or proportional rope, got {sorted(odd)}")
    register()
    disable(model)
    if packed:
        for text_model in _all(model, gemma4.Gemma4TextModel):
            put_packed(text_model)
    _swap(model, layer.SWAPPED)
    for text_model in _all(model, gemma4.Gemma4TextModel):
        text_model.register_forward_pre_hook(layer.before_model, with_kwargs=True)
        text_model.register_forward_hook(layer.after_model, with_kwargs=True, always_call=True)
    put_loss(model)
    outermost = _all(model, PreTrainedModel)[0]
    outermost.set_attn_implementation(base.NAME)
    if config.enable_moe_block:
        outermost.set_experts_implementation(base.NAME)
    return model


def disable(model: nn.Module) -> nn.Module:
    """Takes back what `enable` did to the modules. Returns the model."""
    _swap(model, ORIGINAL)
    take_loss(model)
    for text_model in _all(model, gemma4.Gemma4TextModel):
        for hooks in (text_model._forward_pre_hooks, text_model._forward_hooks):
            for key, hook in list(hooks.items()):
                if hook in (layer.before_model, layer.after_model):
                    del hooks[key]
                    text_model._forward_pre_hooks_with_kwargs.pop(key, None)
                    text_model._forward_hooks_with_kwargs.pop(key, None)
                    text_model._forward_hooks_always_called.pop(key, None)
    return model


def _swap(model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    for module in model.modules():
        was = type(module)
        if was not in classes:
            continue
        module.__class__ = classes[was]
        # accelerate's hooks call the forward that they found.
        if getattr(module.__dict__.get("_old_forward"), "__func__", None) is was.forward:
            module._old_forward = module.__class__.forward.__get__(module)


def _all(model: nn.Module, cls: type[M]) -> list[M]:
    return [module for module in model.modules() if isinstance(module, cls)]
