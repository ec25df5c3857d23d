"""TRL's supervised fine-tuning of the model, which brings its own head, collator and packing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from support import tiny
from support.pairs import close, pair
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

trl = pytest.importorskip("trl", minversion="1.16")  # which needs Python 3.11
pytestmark = pytest.mark.slow
RECIPES = {
    "padded": {},
    "packed": dict(packing=True, padding_free=True, max_length=16),
    "checkpointing": dict(activation_checkpointing=True),
}


def losses(model: nn.Module, folder: Path, **options: Any) -> Tensor:
    words = models.WordLevel({f"t{i}": i for i in range(97)}, unk_token="t3")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="t0", eos_token="t1"
    )
    rows = [dict(input_ids=tiny.ids(1, 6 + i % 4, seed=i)[0].tolist()) for i in range(12)]
    config = trl.SFTConfig(
        str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        optim="sgd",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **{"bf16": False, "activation_checkpointing": False, **options},
    )
    run = trl.SFTTrainer(
        model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    run.train()
    return torch.tensor([entry["loss"] for entry in run.state.log_history if "loss" in entry])


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["moe", "e_series"])
def test_sft(name: str, recipe: str, tmp_path: Path) -> None:
    theirs, ours = (losses(model, tmp_path, **RECIPES[recipe]) for model in pair(name))
    assert ours.shape == (3,)
    close(ours, theirs, 1e-4)
