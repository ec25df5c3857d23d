"""A tied head is the embedding: a state dict holds it once, for files do so, and what writes files
from a state dict refuses two names for one memory."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from gemma4_kernels.packed_linear import NAMES

if TYPE_CHECKING:
    from ..model import Gemma4ForCausalLM

ENDS = ("", *(f".{part}" for part in NAMES))  # of a weight's name: dense, or a packed one's parts


def hold_once(model: "Gemma4ForCausalLM") -> None:
    """From now on, while the head is tied, it goes into state dicts and out of them that way.

    The hooks are functions, not methods: a copied or pickled model must not drag along the first.
    """
    model.register_state_dict_post_hook(_without_head)
    model.register_load_state_dict_pre_hook(_with_head)
    model.register_load_state_dict_post_hook(_tie_again)


def _without_head(
    model: "Gemma4ForCausalLM", state: dict[str, Tensor], prefix: str, _: object
) -> None:
    head = getattr(model.lm_head, "weight", None)
    if head is not None and head is getattr(model.model.embed_tokens, "weight", None):
        for end in ENDS:
            state.pop(f"{prefix}lm_head.weight{end}", None)


def _with_head(
    model: "Gemma4ForCausalLM", state: dict[str, Tensor], prefix: str, *_: object
) -> None:
    for end in ENDS:
        head, table = (f"{prefix}{name}.weight{end}" for name in ("lm_head", "model.embed_tokens"))
        if model.config.tie_word_embeddings and head not in state and table in state:
            state[head] = state[table]


def _tie_again(model: "Gemma4ForCausalLM", _: object) -> None:
    """load_state_dict(assign=True) makes two parameters of one tensor."""
    parents = model.lm_head, model.model.embed_tokens
    head, table = (parent._parameters.get("weight") for parent in parents)
    if head is None or table is None or head.is_meta:
        return
    plain = type(head) is type(table) is nn.Parameter
    if plain and head.data_ptr() == table.data_ptr():
        model.lm_head.weight = table
