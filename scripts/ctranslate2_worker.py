#!/usr/bin/env python3
"""Translates with CTranslate2 what ``benchmark.py`` sends, and times it.

A process of its own that never imports PyTorch: two OpenMP runtimes in one process, each with threads that spin while
they wait, slow one another severalfold. Reads a JSON line of tokenized sentences, answers with a JSON line of the
translations and the seconds that they took.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import ctranslate2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of a converted model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compute-type", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--options", type=json.loads, default={}, help="JSON: options of translate_batch")
    args = parser.parse_args()
    translator = ctranslate2.Translator(
        args.model, device=args.device, compute_type=args.compute_type, inter_threads=1, intra_threads=args.threads
    )
    for line in sys.stdin:
        sentences = json.loads(line)
        start = time.perf_counter()
        results = translator.translate_batch(sentences, beam_size=1, max_batch_size=0, **args.options)
        seconds = time.perf_counter() - start
        print(json.dumps([[result.hypotheses[0] for result in results], seconds]), flush=True)


if __name__ == "__main__":
    main()
