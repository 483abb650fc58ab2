#!/usr/bin/env python3
"""Converts T5, mT5 and Flan-T5 from Hugging Face's folders to fairseq, and back.

    python scripts/convert_t5.py HF-FOLDER OUT              # writes OUT/model.pt, dict.txt, spiece.model and hf/
    python scripts/convert_t5.py --to-hf CONVERTED OUT      # writes a folder that transformers loads

HF-FOLDER holds config.json, spiece.model, and model.safetensors or pytorch_model.bin, in shards or not. A model that
was trained on in fairseq goes back with --checkpoint.
"""

import argparse
from pathlib import Path

from bild_fairseq.errors import BildError
from bild_fairseq.experiments.commandline import run
from bild_fairseq.experiments.convert_t5 import convert, restore


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to read")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--to-hf", action="store_true", help="convert a converted folder back")
    parser.add_argument("--checkpoint", type=Path, help="with --to-hf: the model (default: FOLDER/model.pt)")
    parser.add_argument(
        "--rows", type=int, help="rows of the vocabulary, where the other model of the pair has more (its vocab_size)"
    )
    args = parser.parse_args()
    if args.to_hf and args.rows is not None:
        raise BildError("--rows is for the way to fairseq; leave it out with --to-hf")
    if not args.to_hf and args.checkpoint is not None:
        raise BildError("--checkpoint is for the way back; give --to-hf as well")
    return args


def main() -> None:
    """Converts, and says what was written."""
    args = parse_args()
    if args.to_hf:
        print(restore(args.folder, args.out, args.checkpoint))
    else:
        print(convert(args.folder, args.out, args.rows))


if __name__ == "__main__":
    run("convert_t5", main)
