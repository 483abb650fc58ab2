"""Make a shallow model of some of a large model's layers: where the training of a small one starts.

    python shrink.py large.pt OUT.pt --encoder-layers 6 --decoder-layers 1

Evenly spaced layers are copied, the first among them, and all else. Such a start saves most of the training ("shrink
and fine-tune", Shleifer and Rush, *Pre-trained Summarization Distillation*, arXiv 2010.13002).
"""

import argparse
import pathlib
import re
from typing import Any

import torch

from bild_fairseq.errors import BildError
from bild_fairseq.plugin.checkpoints import read
from bild_fairseq.plugin.files import replacing

LAYER = re.compile(r"(encoder|decoder)\.layers\.(\d+)\.(.+)")


def spaced(have: int, keep: int) -> list[int]:
    """Return ``keep`` of ``have`` layer numbers: the first, the last if there are two or more, others between."""
    if not 1 <= keep <= have:
        raise SystemExit(f"shrink: the large model has {have} layers there, so keep 1 to {have}, not {keep}")
    return [round(i * (have - 1) / max(keep - 1, 1)) for i in range(keep)]


def shrink(weights: dict[str, torch.Tensor], keep: dict[str, int]) -> dict[str, torch.Tensor]:
    """Return the weights of a model with ``keep[side]`` layers on each side."""
    numbers: dict[str, set[int]] = {side: set() for side in keep}
    for name in weights:
        if match := LAYER.fullmatch(name):
            numbers[match[1]].add(int(match[2]))
    kept = {
        side: {old: new for new, old in enumerate(spaced(len(found), keep[side]))} for side, found in numbers.items()
    }
    result = {}
    for name, tensor in weights.items():
        match = LAYER.fullmatch(name)
        if not match:
            result[name] = tensor
        elif int(match[2]) in kept[match[1]]:
            result[f"{match[1]}.layers.{kept[match[1]][int(match[2])]}.{match[3]}"] = tensor
    return result


def describe(config: Any, keep: dict[str, int]) -> None:
    """Set the numbers of layers in a checkpoint's options, in place."""
    for side, layers in keep.items():
        if isinstance(config, dict):
            config[f"{side}_layers"] = layers
        elif config is not None:
            setattr(config, f"{side}_layers", layers)


def main() -> None:
    """Read the command line and write the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("large", type=pathlib.Path, help="checkpoint")
    parser.add_argument("out", type=pathlib.Path, help="checkpoint to write")
    parser.add_argument("--encoder-layers", type=int, required=True)
    parser.add_argument("--decoder-layers", type=int, required=True)
    args = parser.parse_args()
    keep = {"encoder": args.encoder_layers, "decoder": args.decoder_layers}
    try:
        state = read(args.large)
    except BildError as error:
        raise SystemExit(f"shrink: {error}") from error
    state["model"] = shrink(state["model"], keep)
    state["last_optimizer_state"] = None
    describe(state.get("args"), keep)
    describe((state.get("cfg") or {}).get("model"), keep)
    with replacing(args.out) as temporary:
        torch.save(state, temporary)


if __name__ == "__main__":
    main()
