"""The public functions. Each is one op; its arithmetic is the eager twin's, in `reference`.

Shape letters: T tokens (all sequences, packed), B sequences, N new tokens of a sequence, S key
positions, D model width, H query heads, G key-value heads, C head channels, F feed-forward width,
E experts, K experts per token, P PLE width, L layers, V vocabulary.

Dtypes that meet, as fp32 weights and residuals meet 16-bit branches under `torch.autocast`, are
promoted as the same torch expression promotes them. While autocast is on, attention and the experts
take what they multiply in its dtype; the arithmetic of an op is always the one it states.

Errors, for all of them: TypeError for a dtype, ValueError for a shape, a device or a range; the
sentence names the argument, what it must be and what came.
"""

from .attention import attention_prefill
from .decode import attention_decode, qkv_attention_decode
from .linear import linear_packed, linear_small
from .logits import sample, softcap, softcap_argmax, softcap_cross_entropy
from .mlp import geglu
from .moe import moe_experts, moe_norm, moe_route
from .moe_small import moe_experts_small, moe_open
from .norm import add_rms_norm, rms_norm
from .ple import ple_embed, ple_gate
from .rope import qkv_norm_rope, qkv_norm_rope_cache

__all__ = [
    "add_rms_norm",
    "attention_decode",
    "attention_prefill",
    "geglu",
    "linear_packed",
    "linear_small",
    "moe_experts",
    "moe_experts_small",
    "moe_norm",
    "moe_open",
    "moe_route",
    "ple_embed",
    "ple_gate",
    "qkv_attention_decode",
    "qkv_norm_rope",
    "qkv_norm_rope_cache",
    "rms_norm",
    "sample",
    "softcap",
    "softcap_argmax",
    "softcap_cross_entropy",
]
