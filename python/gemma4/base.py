"""What programs around a model ask of it: files, device, dtype, tables, checkpointing."""

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from gemma4_kernels.packed_linear import PackedParameter

from .checkpoint import load, save_pretrained
from .config import Gemma4TextConfig

if TYPE_CHECKING:
    from .model import Gemma4TextModel


Model = TypeVar("Model", bound="PreTrainedModel")


class PreTrainedModel(nn.Module):
    """A model whose weights a checkpoint holds: the stack, or the stack with a head."""

    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ("DecoderLayer",)

    config: Gemma4TextConfig
    # What a loaded model knows of its checkpoint: the tensors that it left there, and where it is.
    skipped: list[str]
    folder: Path
    # What became of a checkpoint's quantised weights, in a line; None where it had none.
    quantized: str | None = None

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path_or_repo_id: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        ple_device: torch.device | str | None = None,
        progress: bool = False,
        quantized: str = "keep",
    ) -> Model:
        """A model with the weights of a local folder, a hub repository or a .gguf file.

        dtype: the checkpoint's own by default. device: "cpu" by default, where weights of that
        dtype stay in their files until they are touched. ple_device="cpu" keeps the table of per-
        layer embeddings in host memory (pinned if the model is on a GPU). The multimodal layout is
        accepted; `model.skipped` lists the tensors that are not the text model's. quantized: "keep"
        leaves quantised weights packed, as far as there is a form that kernels multiply, or
        "dequantize"; `model.quantized` says in a line what became of them, and a warning what takes
        more memory than in its file. `model.folder` is where it came from: its tokenizer is saved
        with the model. The model comes back in eval mode.

        Raises FileNotFoundError (no such checkpoint or file) or ValueError (a truncated, incomplete
        or misshapen one, or weights in a form that is not known), naming file and tensor.
        """
        return load(cls, path_or_repo_id, dtype, device, ple_device, progress, quantized)

    save_pretrained = save_pretrained

    @property
    def base_model(self) -> "Gemma4TextModel":
        """The stack."""
        raise NotImplementedError

    def loaded(self, folder: Path) -> None:
        """Its own weights are in; what hangs on them follows."""

    @property
    def device(self) -> torch.device:
        stack = self.base_model
        device = next(stack.parameters()).device
        if device.type == "meta":
            # Offloaded weights are nowhere between calls; accelerate's hook says where they go.
            hook = getattr(stack.embed_tokens, "_hf_hook", None)
            return torch.device(getattr(hook, "execution_device", None) or device)
        return device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.base_model.parameters()).dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that projections give now, and that a cache must hold: autocast's, or dtype."""
        kind = self.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.dtype

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Elements of all parameters and packed weights; a tied head counts once, as the
        embedding. Packed weights are not trained."""
        left_out = set()
        if exclude_embeddings:
            tables = [m for m in self.modules() if isinstance(m, nn.Embedding)]
            held = (x for table in tables for x in (*table.parameters(), *table.children()))
            left_out = {id(x) for x in held}
        counts = {id(p): p.numel() for p in self.parameters() if p.requires_grad}
        if not only_trainable:
            packed = [m for m in self.modules() if isinstance(m, PackedParameter)]
            counts |= {id(p): p.numel() for p in self.parameters()}
            counts |= {id(m): m.shape.numel() for m in packed}
        return sum(count for key, count in counts.items() if key not in left_out)

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Keeps what trainers write into a model's card."""
        tags = [tags] if isinstance(tags, str) else tags
        self.model_tags = list(dict.fromkeys([*getattr(self, "model_tags", []), *tags]))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.base_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.base_model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear | None:
        """The head, of a model that has one."""
        return None

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None
    ) -> nn.Embedding:
        """Gives the token table, the PLE table and the head `new_num_tokens` rows (as many as now
        if None), rounded up to a multiple of `pad_to_multiple_of`.

        New rows are the mean of the old ones. Returns the token embedding. Raises ValueError where
        a table is packed.
        """
        if any(isinstance(m, nn.Embedding) and m._modules for m in self.modules()):
            raise ValueError(
                "a packed token table has no room for rows: load the model with "
                "quantized='dequantize' to resize it"
            )
        stack, head, config = self.base_model, self.get_output_embeddings(), self.config
        table = stack.embed_tokens
        tied = head is not None and head.weight is table.weight
        rows = table.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            rows = -(-rows // pad_to_multiple_of) * pad_to_multiple_of
        tables = [table]
        if stack.ple_width:
            tables.append(stack.embed_tokens_per_layer)
            config.vocab_size_per_layer_input = rows
        for each in tables:
            each.weight, each.num_embeddings = _resized(each.weight, rows), rows
        if head is not None:
            head.weight = table.weight if tied else _resized(head.weight, rows)
            head.out_features = rows
        config.vocab_size = rows
        return table

    @property
    def is_activation_checkpointing(self) -> bool:
        return self.base_model.checkpointing is not None

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, object] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Keeps the inputs alone of every n-th layer for the backward, which makes the rest again.

        activation_checkpointing_kwargs: for torch.utils.checkpoint.checkpoint; use_reentrant is
        False unless given. Raises ValueError for offload=True: activations stay on the device.
        """
        if offload:
            raise ValueError("offload=True is not served: checkpointed inputs stay on the device")
        if every_n_layers < 1:
            raise ValueError(f"every_n_layers must be at least 1, got {every_n_layers}")
        stack, options = self.base_model, activation_checkpointing_kwargs or {}
        stack.checkpointing = {"use_reentrant": False, **options}
        stack.checkpoint_every = every_n_layers

    def activation_checkpointing_disable(self) -> None:
        self.base_model.checkpointing = None

    # The names of these until transformers 5.23.
    is_gradient_checkpointing = is_activation_checkpointing
    gradient_checkpointing_disable = activation_checkpointing_disable

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, object] | None = None,
        every_n_layers: int = 1,
    ) -> None:
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, every_n_layers)


def _resized(weight: Tensor, rows: int) -> nn.Parameter:
    new = weight.new_empty(rows, weight.shape[1])
    kept = min(rows, weight.shape[0])
    new[:kept] = weight.detach()[:kept]
    new[kept:] = weight.detach().float().mean(0).to(weight.dtype)
    return nn.Parameter(new, requires_grad=weight.requires_grad)
