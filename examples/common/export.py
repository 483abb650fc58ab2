"""Make the checkpoint that the other steps use of a training run's.

    python export.py SAVE_DIR OUT.pt --average 5

It is the mean of the last epochs, as many as there are up to the number given, or the best one on the validation set.
As from the quickstart's export_checkpoint.py it has half precision and neither an optimizer nor the names of folders.
"""

import argparse
import os
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "quickstart"))

from export_checkpoint import allow_fairseq_globals, export, last_checkpoints  # noqa: E402


def choose(save_dir: pathlib.Path, average: int) -> list[pathlib.Path]:
    """Return the checkpoints whose mean is taken.

    Raises:
        SystemExit: the run has left none.
    """
    epochs = sum(1 for path in save_dir.glob("checkpoint*.pt") if re.fullmatch(r"checkpoint\d+\.pt", path.name))
    # A training that ends by its number of updates saves no checkpoint of its last, unfinished epoch.
    if average and epochs:
        return last_checkpoints(save_dir, min(average, epochs))
    best = save_dir / "checkpoint_best.pt"
    if not best.exists():
        raise SystemExit(f"export: {save_dir} has no checkpoint_best.pt: did the training end before it was validated?")
    return [best]


def main() -> None:
    """Read the command line and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("save_dir", type=pathlib.Path, help="the --save-dir of fairseq-train")
    parser.add_argument("out", type=pathlib.Path, help="checkpoint to write")
    parser.add_argument("--average", type=int, default=0, help="epochs, from the last on; 0: the best (%(default)s)")
    args = parser.parse_args()
    allow_fairseq_globals()
    temporary = args.out.with_name(args.out.name + ".tmp")
    export(choose(args.save_dir, args.average), temporary)
    os.replace(temporary, args.out)


if __name__ == "__main__":
    main()
