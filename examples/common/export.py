"""Make the checkpoint that the other steps use of a training run's.

    python export.py SAVE_DIR OUT.pt --average 5

It is the mean of the last epochs, as many as there are up to the number given, or the best one on the validation set,
in half precision, with neither an optimizer nor the names of folders.
"""

import argparse
import pathlib

from bild_fairseq.errors import BildError
from bild_fairseq.plugin.light import last_epochs, write_light


def choose(save_dir: pathlib.Path, average: int) -> list[pathlib.Path]:
    """Return the checkpoints whose mean is taken.

    Raises:
        SystemExit: the run has left none.
    """
    # A training that ends by its number of updates saves no checkpoint of its last, unfinished epoch.
    chosen = last_epochs(save_dir, average) or [save_dir / "checkpoint_best.pt"]
    if not chosen[0].exists():
        raise SystemExit(f"export: {save_dir} has no checkpoint_best.pt: did the training end before it was validated?")
    return chosen


def main() -> None:
    """Read the command line and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("save_dir", type=pathlib.Path, help="the --save-dir of fairseq-train")
    parser.add_argument("out", type=pathlib.Path, help="checkpoint to write")
    parser.add_argument("--average", type=int, default=0, help="epochs, from the last on; 0: the best (%(default)s)")
    args = parser.parse_args()
    chosen = choose(args.save_dir, args.average)
    try:
        write_light(chosen, args.out)
    except BildError as error:
        raise SystemExit(f"export: {error}") from error
    names = ", ".join(path.name for path in chosen)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB, mean of {names}")


if __name__ == "__main__":
    main()
