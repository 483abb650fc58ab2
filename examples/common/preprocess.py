"""Turn raw text into the binary data that fairseq reads.

    python preprocess.py translation RAW OUT --languages de en --merges 10000
    python preprocess.py summarization RAW OUT --vocabulary FOLDER
    python preprocess.py t5 RAW OUT --languages de en --model CONVERTED

RAW has {train,valid,test}.{SOURCE,TARGET}; the result is OUT/data-bin. Translation: Moses tokenization (no escaping,
aggressive dash splits, as fairseq's `--tokenizer moses --moses-no-escape`), then joint BPE with subword-nmt.
Summarization: GPT-2's byte-level BPE, as for BART. T5: the SentencePiece of a folder that scripts/convert_t5.py wrote,
behind the task's prefix. What is there already is not made again.
"""

import argparse
import functools
import itertools
import json
import logging
import multiprocessing
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import sacremoses
from corpus import PARTS, raw_files, writing
from download import Published, fetch
from subword_nmt.apply_bpe import BPE
from subword_nmt.learn_bpe import learn_bpe

SUMMARIZATION = ("source", "target")
CHUNK = 2000  # lines that a worker gets at once
FAIRSEQ_BPE = "https://dl.fbaipublicfiles.com/fairseq/gpt2_bpe"
OPENAI_BPE = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
# Checksums are those that tiktoken has for OpenAI's files. No checksum of dict.txt is published: it has a line for
# each of GPT-2's 50,257 subwords and three more that fill it up.
VOCABULARY = [
    Published(
        "encoder.json",
        (f"{FAIRSEQ_BPE}/encoder.json", f"{OPENAI_BPE}/encoder.json"),
        "sha256:196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    ),
    Published(
        "vocab.bpe",
        (f"{FAIRSEQ_BPE}/vocab.bpe", f"{OPENAI_BPE}/vocab.bpe"),
        "sha256:1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    ),
    Published("dict.txt", (f"{FAIRSEQ_BPE}/dict.txt",), lines=50_260),
]


def convert(lines: Iterable[str], function: Callable[[str], str], workers: int) -> Iterator[str]:
    """Yield the function's results, in order; with several workers each gets its copy of the function."""
    if workers == 1:
        yield from map(function, lines)
        return
    with multiprocessing.Pool(workers) as pool:
        yield from pool.imap(function, lines, CHUNK)


def read(path: pathlib.Path) -> Iterator[str]:
    """Yield the lines of a text file, split at newlines only."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield line.removesuffix("\n")


@functools.cache
def moses(language: str) -> tuple[sacremoses.MosesPunctNormalizer, sacremoses.MosesTokenizer]:
    return sacremoses.MosesPunctNormalizer(lang=language), sacremoses.MosesTokenizer(lang=language)


def tokenize(line: str, language: str, normalize: bool) -> str:
    normalizer, tokenizer = moses(language)
    if normalize:
        line = normalizer.normalize(line)
    return tokenizer.tokenize(line, aggressive_dash_splits=True, escape=False, return_str=True)


@functools.cache
def load_codes(path: pathlib.Path) -> BPE:
    with path.open(encoding="utf-8") as file:
        return BPE(file)


def apply_codes(line: str, path: pathlib.Path) -> str:
    return load_codes(path).process_line(line)


@functools.cache
def load_gpt2(folder: pathlib.Path) -> Any:
    # fairseq takes seconds to import, and translation needs nothing of it here.
    from fairseq.data.encoders.gpt2_bpe_utils import get_encoder

    return get_encoder(str(folder / "encoder.json"), str(folder / "vocab.bpe"))


def apply_gpt2(line: str, folder: pathlib.Path, limit: int) -> str:
    """Return subword numbers, behind the start symbol that BART was trained with."""
    numbers = load_gpt2(folder).encode(line)[:limit]
    return " ".join(["<s>", *map(str, numbers)])


def is_clean(source: str, target: str, longest: int, ratio: float) -> bool:
    """Return whether a training pair is of moderate and similar lengths, in subwords."""
    shorter, longer = sorted((len(source.split()), len(target.split())))
    return 0 < shorter and longer <= longest and longer <= ratio * shorter


@functools.cache
def load_pieces(path: pathlib.Path) -> Any:
    # Only T5 needs the library.
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(path))


def apply_pieces(line: str, path: pathlib.Path, prefix: str, longest: int) -> str:
    """Return at most ``longest`` pieces of a line behind the prefix, the end symbol among them.

    fairseq adds that symbol when it binarizes.
    """
    return " ".join(load_pieces(path).encode(prefix + line, out_type=str)[: longest - 1])


def encode_t5(args: argparse.Namespace, languages: tuple[str, str]) -> list[str]:
    """Write OUT/PART.bpe.LANGUAGE; return the dictionaries' flags of fairseq-preprocess."""
    longest = (args.longest, args.longest_target)
    for part in PARTS:
        raw = raw_files(args.raw, part, languages)
        for language, path, prefix, limit in zip(languages, raw, (args.prefix, ""), longest, strict=True):
            out = args.out / f"{part}.bpe.{language}"
            if not out.exists():
                say(f"splitting the words of {path.name}")
                function = functools.partial(
                    apply_pieces, path=args.model / "spiece.model", prefix=prefix, longest=limit
                )
                write(out, convert(read(path), function, args.workers))
    return ["--srcdict", str(args.model / "dict.txt"), "--joined-dictionary"]


def encode_translation(args: argparse.Namespace, languages: tuple[str, str]) -> list[str]:
    """Write OUT/PART.bpe.LANGUAGE; return the dictionaries' flags of fairseq-preprocess."""
    tokenized = {}
    for part in PARTS:
        for language, raw in zip(languages, raw_files(args.raw, part, languages), strict=True):
            path = tokenized[part, language] = args.out / f"{part}.tok.{language}"
            if not path.exists():
                say(f"tokenizing {raw.name}")
                function = functools.partial(tokenize, language=language, normalize=args.normalize_punctuation)
                write(path, convert(read(raw), function, args.workers))
    codes = args.out / "codes"
    if not codes.exists():
        if args.models:
            shutil.copy(args.models / "codes", codes)
        else:
            say(f"learning {args.merges} BPE merges")
            text = itertools.chain.from_iterable(read(tokenized["train", language]) for language in languages)
            with writing(codes) as file:
                learn_bpe(text, file, args.merges)
    split = functools.partial(apply_codes, path=codes)
    for part in PARTS:
        paths = [args.out / f"{part}.bpe.{language}" for language in languages]
        if all(path.exists() for path in paths):
            continue
        say(f"splitting the words of {part}")
        sides = [convert(read(tokenized[part, language]), split, args.workers) for language in languages]
        pairs = zip(*sides, strict=True)
        if part == "train":
            pairs = (pair for pair in pairs if is_clean(*pair, args.longest, args.ratio))
        with writing(paths[0]) as source, writing(paths[1]) as target:
            for pair in pairs:
                source.write(pair[0] + "\n")
                target.write(pair[1] + "\n")
    if args.models:
        return dictionaries(*(args.models / f"dict.{language}.txt" for language in languages))
    return ["--joined-dictionary"] if args.joined_dictionary else []


def encode_summarization(args: argparse.Namespace) -> list[str]:
    """Write OUT/PART.bpe.{source,target}; return the dictionaries' flags of fairseq-preprocess."""
    folder, dictionary = find_vocabulary(args.vocabulary, args.out)
    function = functools.partial(apply_gpt2, folder=folder, limit=args.longest)
    for part in PARTS:
        for language, raw in zip(SUMMARIZATION, raw_files(args.raw, part, SUMMARIZATION), strict=True):
            path = args.out / f"{part}.bpe.{language}"
            if not path.exists():
                say(f"splitting the words of {raw.name}")
                write(path, convert(read(raw), function, args.workers))
    return dictionaries(dictionary, dictionary)


def find_vocabulary(folder: pathlib.Path | None, out: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Return the folder of encoder.json and vocab.bpe, and the dictionary's path.

    A vocabulary of the user's may lack the dictionary: then it is made of all subwords.

    Raises:
        SystemExit: a file is missing, or cannot be downloaded.
    """
    if folder is None:
        instead = "; or name a folder with encoder.json and vocab.bpe in GPT2_BPE"
        return fetch(VOCABULARY, out / "gpt2_bpe", instead)[0].parent, out / "gpt2_bpe" / "dict.txt"
    for name in ("encoder.json", "vocab.bpe"):
        if not (folder / name).is_file():
            raise SystemExit(f"preprocess: {folder}, which GPT2_BPE or --vocabulary names, has no {name}")
    if (folder / "dict.txt").is_file():
        return folder, folder / "dict.txt"
    dictionary = out / "dict.txt"
    numbers = sorted(json.loads((folder / "encoder.json").read_text(encoding="utf-8")).values())
    write(dictionary, (f"{number} 1" for number in numbers))
    return folder, dictionary


def dictionaries(source: pathlib.Path, target: pathlib.Path) -> list[str]:
    return ["--srcdict", str(source), "--tgtdict", str(target)]


def binarize(out: pathlib.Path, languages: tuple[str, str], flags: Sequence[str], workers: int) -> None:
    """Do what fairseq-preprocess does; OUT/data-bin, with its log, appears once it is complete.

    Raises:
        SystemExit: it failed.
    """
    from fairseq import options
    from fairseq_cli.preprocess import main as fairseq_preprocess

    for handler in logging.getLogger().handlers:  # of the terminal; the log has all
        handler.setLevel(logging.WARNING)
    say("binarizing")
    making = out / "data-bin.tmp"
    shutil.rmtree(making, ignore_errors=True)
    words = ["--destdir", str(making), "--workers", str(workers)]
    words += ["--source-lang", languages[0], "--target-lang", languages[1], *flags]
    for part in PARTS:
        words += [f"--{part}pref", str(out / f"{part}.bpe")]
    try:
        fairseq_preprocess(options.get_preprocessing_parser().parse_args(words))
    except Exception as error:
        raise SystemExit(f"preprocess: fairseq-preprocess failed: {type(error).__name__}: {error}") from error
    os.replace(making, out / "data-bin")


def write(path: pathlib.Path, lines: Iterable[str]) -> None:
    with writing(path) as file:
        file.writelines(line + "\n" for line in lines)


def say(text: str) -> None:
    print(f"preprocess: {text}", file=sys.stderr)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    translation = kinds.add_parser("translation", help="Moses tokenization, BPE of subword-nmt")
    summarization = kinds.add_parser("summarization", help="GPT-2's BPE, suffixes source and target")
    t5 = kinds.add_parser("t5", help="SentencePiece of a converted T5")
    for kind in (translation, summarization, t5):
        kind.add_argument("raw", type=pathlib.Path, help="folder with the raw text")
        kind.add_argument("out", type=pathlib.Path, help="folder to write")
        kind.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    for kind in (translation, t5):
        kind.add_argument("--languages", nargs=2, required=True, metavar=("SOURCE", "TARGET"))
    translation.add_argument("--merges", type=int, default=10000, help="BPE merges to learn (default: %(default)s)")
    translation.add_argument("--models", type=pathlib.Path, help="folder with codes and dict.* to use instead")
    translation.add_argument("--joined-dictionary", action="store_true", help="one dictionary for both languages")
    translation.add_argument("--normalize-punctuation", action="store_true", help="as Moses does, before tokenizing")
    translation.add_argument(
        "--longest", type=int, default=250, help="subwords of a training sentence, at most (default: %(default)s)"
    )
    translation.add_argument(
        "--ratio", type=float, default=1.5, help="between a training pair's lengths, at most (default: %(default)s)"
    )
    summarization.add_argument(
        "--vocabulary",
        type=pathlib.Path,
        help="folder with encoder.json, vocab.bpe and, unless it is to be made of all subwords, dict.txt "
        "(default: download those of BART)",
    )
    summarization.add_argument(
        "--longest", type=int, default=1022, help="subwords; what is longer is cut there (default: %(default)s)"
    )
    add_t5_arguments(t5)
    return parser.parse_args()


def add_t5_arguments(parser: argparse.ArgumentParser) -> None:
    """What T5 needs, with the limits of the paper's authors."""
    parser.add_argument(
        "--model", type=pathlib.Path, required=True, help="folder that convert_t5.py wrote: spiece.model, dict.txt"
    )
    parser.add_argument("--prefix", default="", help="what stands before every source, with the space behind it")
    parser.add_argument(
        "--longest", type=int, default=1024, help="pieces of a source, prefix and end included (default: %(default)s)"
    )
    parser.add_argument(
        "--longest-target", type=int, default=128, help="pieces of a target, end included (default: %(default)s)"
    )


def main() -> None:
    args = parse_args()
    if (args.out / "data-bin").exists():
        return say(f"{args.out / 'data-bin'} is there: nothing to do")
    args.out.mkdir(parents=True, exist_ok=True)
    languages = SUMMARIZATION
    if args.kind == "summarization":
        flags = encode_summarization(args)
    else:
        languages = tuple(args.languages)
        flags = (encode_t5 if args.kind == "t5" else encode_translation)(args, languages)
    binarize(args.out, languages, flags, args.workers)


if __name__ == "__main__":
    main()
