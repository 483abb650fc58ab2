"""What a T5 model is made of: its options, their checks and the published sizes.

The names are those of T5's ``config.json``; ``--dropout`` alone has fairseq's name, which every fairseq recipe uses.
"""

import argparse
from dataclasses import dataclass, field, fields
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..errors import BildError, flag


def gelu_new(x: Tensor) -> Tensor:
    """GELU in its tanh approximation, as T5 1.1 uses it."""
    return F.gelu(x, approximate="tanh")


gelu_new.engine_kind = "gelu_tanh"  # tells the engines what it computes


# feed_forward_proj: the activation, and whether its output is multiplied by a second product (gated).
FEED_FORWARD = {"relu": (F.relu, False), "gated-gelu": (gelu_new, True)}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class T5Config:
    """The options of architecture ``t5``; the defaults are those of T5 1.0 small.

    Raises:
        BildError: a value that no T5 can have, or that is not implemented here.
    """

    d_model: int = _option(512, "width of the model")
    d_kv: int = _option(64, "size of a head; heads x size may differ from the width")
    d_ff: int = _option(2048, "width of the feed-forward layers")
    num_heads: int = _option(8, "attention heads")
    num_layers: int = _option(6, "encoder layers")
    num_decoder_layers: int = _option(6, "decoder layers (default: as many as the encoder has)")
    relative_attention_num_buckets: int = _option(32, "relative positions that have a bias of their own")
    relative_attention_max_distance: int = _option(128, "distance in tokens from which all share one bias")
    feed_forward_proj: str = _option("relu", "relu (T5 1.0) or gated-gelu (T5 1.1, mT5, Flan-T5)")
    layer_norm_epsilon: float = _option(1e-6, "what the root of the mean square has added under the root")
    tie_word_embeddings: bool = _option(True, "the output projection is the embedding (T5 1.0)")
    scale_decoder_outputs: bool = _option(True, "outputs are scaled by d_model ** -0.5 before the projection (T5 1.0)")
    dropout: float = _option(0.1, "dropout probability")
    missing_rows: int = _option(0, "rows at the end of the dictionary that the model lacks: their probability is 0")

    def __post_init__(self) -> None:
        if self.feed_forward_proj not in FEED_FORWARD:
            known = " or ".join(FEED_FORWARD)
            raise BildError(f"--feed-forward-proj {self.feed_forward_proj} is not supported; it must be {known}")
        for name in ("d_model", "d_kv", "d_ff", "num_heads", "num_layers"):
            if getattr(self, name) < 1:
                raise BildError(f"{flag(name)} {getattr(self, name)}: give a number above 0")
        if self.missing_rows < 0:
            raise BildError(f"--missing-rows {self.missing_rows}: give a number of rows, 0 for none")
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4:
            raise BildError(f"--relative-attention-num-buckets {buckets}: give at least 4")
        if distance <= buckets // 2:
            raise BildError(
                f"--relative-attention-max-distance {distance}: half of the {buckets} buckets hold one distance each,"
                f" so give more than {buckets // 2}"
            )

    @property
    def output_scale(self) -> float:
        """What the decoder's output is multiplied by before the output projection."""
        return self.d_model**-0.5 if self.scale_decoder_outputs else 1.0


def from_namespace(args: argparse.Namespace) -> T5Config:
    """The configuration that complete options describe; see `set_defaults`."""
    return T5Config(**{option.name: getattr(args, option.name) for option in fields(T5Config)})


def set_defaults(args: argparse.Namespace, **sizes: Any) -> None:
    """Completes options in place: what is absent or None comes from `sizes`, else from `T5Config`."""
    defaults = {option.name: option.default for option in fields(T5Config)} | sizes
    if "num_decoder_layers" not in sizes:
        chosen = getattr(args, "num_layers", None)
        defaults["num_decoder_layers"] = defaults["num_layers"] if chosen is None else chosen
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each option, without defaults: those depend on the architecture."""
    for option in fields(T5Config):
        if option.type is bool:
            kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        elif option.name == "feed_forward_proj":
            kind = {"choices": list(FEED_FORWARD)}
        else:
            kind = {"type": option.type}
        parser.add_argument(flag(option.name), help=option.metadata["help"], **kind)


# T5 1.0 (Raffel et al., 2020).
_T5 = {
    "small": {},
    "base": {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    "large": {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
    "3b": {"d_model": 1024, "d_kv": 128, "d_ff": 16384, "num_layers": 24, "num_heads": 32},
    "11b": {"d_model": 1024, "d_kv": 128, "d_ff": 65536, "num_layers": 24, "num_heads": 128},
}
# T5 1.1 (Shazeer, 2020), which mT5 and Flan-T5 have as well.
_T5_V1_1 = {
    "small": {"d_model": 512, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
    "base": {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
    "large": {"d_model": 1024, "d_ff": 2816, "num_layers": 24, "num_heads": 16},
    "xl": {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
    "xxl": {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
}
_V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "scale_decoder_outputs": False}

# Name of an architecture -> what it sets.
PRESETS: dict[str, dict[str, Any]] = {f"t5_{size}": options for size, options in _T5.items()}
for _family in ("t5_v1_1", "mt5", "flan_t5"):
    PRESETS.update({f"{_family}_{size}": options | _V1_1 for size, options in _T5_V1_1.items()})
