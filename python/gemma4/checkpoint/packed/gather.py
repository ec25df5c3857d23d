"""Which tensors of a checkpoint make one weight together, and of what format it is."""

import re
from collections.abc import Iterable
from typing import TypeGuard

from ...files import Json, short
from ..tensorfile import Entry
from .others import Awq, Gptq, Nf4
from .scaled import Fp4, GroupedInts, LowBits, Scaled
from .weight import Options, Packed

# What stands behind a module's name beside or in place of its weight.
ROLE = re.compile(
    r"(?P<module>.+)\.(?P<role>weight_(packed|scale|scale_2|scale_inv|global_scale|shape"
    r"|zero_point|g_idx)|qweight|qzeros|scales|biases|g_idx|SCB|weight_format|_weight_(qdata"
    r"|scale|zero_point)|embedding_(quantized|scale)|weight\.(absmax|quant_map|nested_absmax"
    r"|nested_quant_map|quant_state\.bitsandbytes__\w+))"
)
# Of activations and caches, which stay as they are here.
PASSED_OVER = re.compile(
    r".+\.((input|output)(_global|_activation)?_(scale|zero_point)|[kqv](_cache|_proj)?_scale"
    r"|[kv]_zero_point)"
)
METHODS = (
    *("compressed-tensors", "modelopt", "fp8", "fbgemm_fp8", "gptq", "auto-round", "awq"),
    *("bitsandbytes", "torchao", "gemma"),
)
TURNED = {"qweight", "qzeros", "scales"}


def options_of(config: Json, source: str) -> Options:
    """What a config.json says of its quantised weights; ValueError where that is not known."""
    text = config.get("text_config")
    parts = (config, text if isinstance(text, dict) else {})
    keys = ("quantization_config", "compression_config")
    said = next((part[key] for part in parts for key in keys if part.get(key) is not None), None)
    if said is None:
        return Options()
    if not isinstance(said, dict):
        raise ValueError(f"{source}: quantization_config must be an object, got {short(said)}")

    def choice(name: str, known: tuple[str, ...], default: str) -> str:
        value = said.get(name, default)
        if not isinstance(value, str) or value.lower() not in known:
            raise ValueError(f"{source}: {name} must be {' or '.join(known)}, got {short(value)}")
        return value.lower()

    method = choice("quant_method", METHODS, "compressed-tensors")
    stored = "gptq"
    if method == "gptq":
        stored = choice("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    elif method == "auto-round":
        choice("packing_format", ("auto_round:auto_gptq",), "auto_round:auto_gptq")
    elif method == "awq":
        choice("version", ("gemm",), "gemm")
    weights = _weights(said)
    blocks = [said.get("weight_block_size"), *(group.get("block_structure") for group in weights)]
    block = next((sizes for sizes in blocks if sizes is not None), [128, 128])
    if not isinstance(block, list) or len(block) != 2 or not all(map(_is_size, block)):
        raise ValueError(f"{source}: a block must have two sizes, got {short(block)}")
    groups = (group.get("group_size") for group in weights)
    return Options(
        method,
        (block[0], block[1]),
        tuple(size for size in groups if _is_size(size)),
        0 if stored == "gptq_v2" else 1,
    )


def _weights(said: Json) -> list[Json]:
    """What compressed-tensors says of the weights of each of its groups of modules."""
    groups = said.get("config_groups")
    found = groups.values() if isinstance(groups, dict) else ()
    weights = (group.get("weights") for group in found if isinstance(group, dict))
    return [each for each in weights if isinstance(each, dict)]


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def gathered(
    entries: Iterable[Entry], options: Options
) -> tuple[list[Entry | Packed], list[Entry]]:
    """The weights, plain and packed, and the tensors that are about activations alone.

    Raises ValueError, naming file and tensor, for a weight in a form that is not known.
    """
    modules: dict[str, dict[str, Entry]] = {}
    others, passed_over = [], []
    for entry in entries:
        if match := ROLE.fullmatch(entry.name):
            modules.setdefault(match["module"], {})[match["role"]] = entry
        elif PASSED_OVER.fullmatch(entry.name):
            passed_over.append(entry)
        else:
            others.append(entry)
    plain: list[Entry | Packed] = []
    for entry in others:
        module, _, role = entry.name.rpartition(".")
        if role == "weight" and module in modules:
            modules[module][role] = entry
        else:
            plain.append(entry)
    packed = [_packed(module, parts, options) for module, parts in modules.items()]
    return plain + packed, passed_over


def _packed(module: str, parts: dict[str, Entry], options: Options) -> Packed:
    cls = _format({role: entry.dtype for role, entry in parts.items()}, options)
    if cls is None:
        entry = next(iter(parts.values()))
        form = ", ".join(f"{role} {part.dtype}" for role, part in sorted(parts.items()))
        raise ValueError(
            f"{entry.file}: {module} is a quantised weight in a form that is not known ({form})"
        )
    return cls(f"{module}.weight", parts, options)


def _format(dtypes: dict[str, str], options: Options) -> type[Packed] | None:
    """By the dtype of each tensor that a weight has."""
    roles, weight = set(dtypes), dtypes.get("weight")
    if any(role.startswith(Nf4.STATE) for role in roles):
        return Nf4
    if roles >= TURNED:
        return Awq if options.method == "awq" else Gptq
    if dtypes.get("weight_packed") == "I32":
        return GroupedInts
    if "weight_scale_2" in roles and weight == "U8":
        return Fp4
    if dtypes.get("weight_packed") == "U8" and "weight_scale" in roles:
        named = dtypes["weight_scale"] != "F8_E4M3" or "weight_global_scale" in roles
        return Fp4 if named else None
    if roles == {"embedding_quantized", "embedding_scale"} or (
        roles == {"weight", "weight_scale"} and weight == "U8"
    ):
        return LowBits
    element = dtypes.get("_weight_qdata", weight)
    if element in ("I8", "F8_E4M3", "F8_E5M2") and roles & set(Scaled.SCALES):
        return Scaled
    return None
