"""Average the last checkpoints of a training run and keep what inference needs.

    python export_checkpoint.py SAVE_DIR OUT.pt --last 3

A training checkpoint is six times as large as the model in half precision, because it holds
float32 weights and the two moments of Adam, and its configuration names the folders of the
machine that trained it. The exported file is an ordinary fairseq checkpoint without either:
fairseq reads it back into float32 unless `--fp16` is given.
"""

import argparse
import pathlib
import re
import sys
from typing import Any

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from bild_fairseq.plugin.checkpoints import allow_fairseq_globals  # noqa: E402

# Settings that name places: inference gets them from its own command line.
PLACES = {
    "data": "data-bin",
    "save_dir": "checkpoints",
    "user_dir": None,
    "plasma_path": "plasma",
    "finetune_from_model": None,
}


def last_checkpoints(save_dir: pathlib.Path, count: int) -> list[pathlib.Path]:
    """Return the checkpoints of the last epochs, newest first."""
    epochs = {
        int(match[1]): path
        for path in save_dir.glob("checkpoint*.pt")
        if (match := re.fullmatch(r"checkpoint(\d+)\.pt", path.name))
    }
    if len(epochs) < count:
        raise SystemExit(f"export_checkpoint.py: {len(epochs)} epoch checkpoints in {save_dir}, not {count}")
    return [epochs[epoch] for epoch in sorted(epochs, reverse=True)[:count]]


def load(path: pathlib.Path) -> dict[str, Any]:
    """Read a training checkpoint with PyTorch's safe unpickler."""
    return torch.load(path, map_location="cpu", weights_only=True)


def average(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the mean of several model states in half precision.

    Entries that share their memory, as tied embeddings do, share it in the result as well, or
    the file would hold the same matrix three times.
    """
    shared: dict[int, torch.Tensor] = {}
    result = {}
    for name, tensor in states[0].items():
        if not tensor.is_floating_point():
            result[name] = tensor
            continue
        place = tensor.data_ptr() if tensor.numel() else id(tensor)
        if place not in shared:
            mean = torch.stack([state[name].float() for state in states]).mean(dim=0)
            shared[place] = mean.half()
        result[name] = shared[place]
    return result


def without_places(value: Any, name: str = "") -> Any:
    """Return a configuration without the paths of the machine that trained the model."""
    if name in PLACES:
        return PLACES[name]
    if isinstance(value, argparse.Namespace):
        return argparse.Namespace(**without_places(vars(value)))
    if isinstance(value, dict):
        return {key: without_places(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [without_places(item) for item in value]
    if isinstance(value, str) and value.startswith("/"):
        return pathlib.PurePosixPath(value).name
    return value


def export(paths: list[pathlib.Path], out: pathlib.Path) -> None:
    """Write the averaged model as a checkpoint that fairseq loads for inference."""
    states = [load(path) for path in paths]
    newest = states[0]
    history = newest["optimizer_history"][-1]
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {
            "args": None,
            "cfg": without_places(newest["cfg"]),
            "model": average([state["model"] for state in states]),
            "criterion": None,
            "optimizer_history": [{**history, "lr_scheduler_state": {}}],
            "task_state": {},
            "extra_state": {"epoch": newest["extra_state"]["train_iterator"]["epoch"]},
            "last_optimizer_state": None,
        },
        out,
    )
    names = ", ".join(path.name for path in paths)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, mean of {names}")


def main() -> None:
    """Read the command line and export one model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("save_dir", type=pathlib.Path, help="the --save-dir of fairseq-train")
    parser.add_argument("out", type=pathlib.Path, help="checkpoint to write")
    parser.add_argument("--last", type=int, default=1, help="epochs to average (%(default)s)")
    args = parser.parse_args()
    allow_fairseq_globals()
    if args.last < 1:
        parser.error("--last must be 1 or more")
    export(last_checkpoints(args.save_dir, args.last), args.out)


if __name__ == "__main__":
    main()
