"""These ops under models of transformers.

`register()` adds an attention and an experts implementation to transformers, both called
"gemma4_kernels". `enable(model)` also puts norms, MLP, rotary embedding, router and the per-layer
gate of a Gemma 4 model on these ops, in place; `explain(model)` says what runs where. On a CPU,
which has no kernels, all of it is left to transformers and torch, but for the attention of long
prompts.

    base        the name, the versions of transformers that this is made for, when ops run
    mask        what a layer is told about its mask
    attention   what transformers calls for attention
    experts     what it calls for a layer's experts
    modules     transformers' modules as subclasses whose forward takes these ops
    layer       so its layer, and what its text model tells the layers
    decode      the parts of a layer for a few tokens
    cache       transformers' static cache, as a step of decoding writes and reads it
    packed      linear layers that other libraries quantised, as packed ones of ours
    loss        what it calls for the loss
    swap        puts them in and takes them out
    report      says what they do
"""

from .base import NAME, VERSIONS
from .layer import DecoderLayer
from .modules import MLP, Attention, RMSNorm, RotaryEmbedding, Router  # in pickles
from .report import explain
from .swap import disable, enable, register

__all__ = [
    "MLP",
    "NAME",
    "VERSIONS",
    "Attention",
    "DecoderLayer",
    "RMSNorm",
    "RotaryEmbedding",
    "Router",
    "disable",
    "enable",
    "explain",
    "register",
]
