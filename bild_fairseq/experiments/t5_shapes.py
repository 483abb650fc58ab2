"""Whether tensors are of the shapes that T5's options ask for, and numbers that a model can be made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from fairseq.data import Dictionary
from torch import Tensor, nn

from ..errors import BildError
from ..models.t5 import T5Decoder, T5Encoder
from ..models.t5_config import T5Config

# Others are quantized: their numbers mean nothing without scales, which a T5 does not have.
_FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_shapes(
    arch: T5Config, dictionary: Dictionary, tensors: Mapping[str, Tensor], names: Mapping[str, str], source: Path
) -> None:
    """Makes sure that a model can be built from tensors.

    Args:
        arch: the model's options.
        dictionary: of the model.
        tensors: by fairseq's names. Others than a T5's are not looked at, and some may be missing.
        names: what messages call tensors, where not by fairseq's names.
        source: where they are from, for messages.

    Raises:
        BildError: a tensor has another shape, or no floating-point numbers.
    """
    for name, wanted in _shapes(arch, dictionary).items():
        tensor = tensors.get(name)
        if tensor is None:
            continue
        called = names.get(name, name)
        if tensor.dtype not in _FLOATING:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise BildError(f"{source}: {called} holds {kind} numbers; convert a model that is not quantized")
        if tensor.shape != wanted:
            raise BildError(f"{source}: {called} is {_words(tensor.shape)}, by options and dictionary {_words(wanted)}")


def _shapes(arch: T5Config, dictionary: Dictionary) -> dict[str, torch.Size]:
    with torch.device("meta"):  # shapes without memory
        embedding = nn.Embedding(len(dictionary), arch.d_model)
        parts = {
            "encoder": T5Encoder(arch, dictionary, embedding),
            "decoder": T5Decoder(arch, dictionary, embedding),
        }
    return {
        f"{side}.{name}": tensor.shape for side, part in parts.items() for name, tensor in part.state_dict().items()
    }


def _words(shape: torch.Size) -> str:
    return " x ".join(map(str, shape)) or "one number"
