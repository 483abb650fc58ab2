"""Turn raw German-English text into the binary data that fairseq reads.

    python preprocess.py learn RAW OUT            # RAW has {train,valid,test}.{de,en}
    python preprocess.py apply RAW OUT --models DIR

Both tokenize with Moses (no escaping, aggressive dash splits, as fairseq's own
`--tokenizer moses --moses-no-escape` does), split words with BPE and leave the result in
OUT/data-bin. `learn` makes the BPE codes and the joint dictionary from the training part;
`apply` takes them from DIR and handles the test part only.
"""

import argparse
import io
import pathlib
import subprocess
import sys

import sacremoses
from subword_nmt.apply_bpe import BPE
from subword_nmt.learn_bpe import learn_bpe

SOURCE, TARGET = LANGUAGES = ("de", "en")
BPE_MERGES = 5000


def read_lines(path: pathlib.Path) -> list[str]:
    """Return the lines of a text file, split at newlines only."""
    try:
        return path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except OSError as error:
        raise SystemExit(f"preprocess.py: {path}: {error.strerror}") from None


def write_lines(path: pathlib.Path, lines: list[str]) -> None:
    """Write one line per item."""
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def tokenize(lines: list[str], language: str) -> list[str]:
    """Separate punctuation from words with spaces."""
    tokenizer = sacremoses.MosesTokenizer(lang=language)
    return [tokenizer.tokenize(line, aggressive_dash_splits=True, escape=False, return_str=True) for line in lines]


def load_codes(path: pathlib.Path) -> BPE:
    """Read BPE codes."""
    try:
        with path.open(encoding="utf-8") as file:
            return BPE(file)
    except OSError as error:
        raise SystemExit(f"preprocess.py: {path}: {error.strerror}") from None


def run_fairseq_preprocess(*options: str) -> None:
    """Run fairseq-preprocess with the interpreter that runs this script."""
    command = [sys.executable, "-m", "fairseq_cli.preprocess"]
    languages = ["--source-lang", SOURCE, "--target-lang", TARGET]
    if subprocess.run([*command, *languages, *options]).returncode:
        raise SystemExit("preprocess.py: fairseq-preprocess failed, see above")


def learn(raw: pathlib.Path, out: pathlib.Path) -> None:
    """Learn codes and dictionary from the training part and binarize all parts."""
    parts = ("train", "valid", "test")
    tokenized = {
        (part, language): tokenize(read_lines(raw / f"{part}.{language}"), language)
        for part in parts
        for language in LANGUAGES
    }
    out.mkdir(parents=True, exist_ok=True)
    corpus = "\n".join("\n".join(tokenized["train", language]) for language in LANGUAGES)
    with (out / "codes").open("w", encoding="utf-8") as file:
        learn_bpe(io.StringIO(corpus), file, BPE_MERGES)
    bpe = load_codes(out / "codes")
    for (part, language), lines in tokenized.items():
        write_lines(out / f"{part}.bpe.{language}", [bpe.process_line(line) for line in lines])
    prefixes = [word for part in parts for word in (f"--{part}pref", str(out / f"{part}.bpe"))]
    run_fairseq_preprocess(*prefixes, "--joined-dictionary", "--destdir", str(out / "data-bin"))


def apply(raw: pathlib.Path, out: pathlib.Path, models: pathlib.Path) -> None:
    """Binarize the test part with the codes and dictionaries that belong to trained models."""
    bpe = load_codes(models / "codes")
    dictionaries = {language: models / f"dict.{language}.txt" for language in LANGUAGES}
    for path in dictionaries.values():
        read_lines(path)
    texts = {language: read_lines(raw / f"test.{language}") for language in LANGUAGES}
    out.mkdir(parents=True, exist_ok=True)
    for language, lines in texts.items():
        split = [bpe.process_line(line) for line in tokenize(lines, language)]
        write_lines(out / f"test.bpe.{language}", split)
    run_fairseq_preprocess(
        *("--testpref", str(out / "test.bpe"), "--destdir", str(out / "data-bin")),
        *("--srcdict", str(dictionaries[SOURCE]), "--tgtdict", str(dictionaries[TARGET])),
    )


def main() -> None:
    """Read the command line and run the chosen step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("learn", "apply"))
    parser.add_argument("raw", type=pathlib.Path, help="folder with the raw text")
    parser.add_argument("out", type=pathlib.Path, help="folder to write")
    parser.add_argument("--models", type=pathlib.Path, help="apply: folder with codes and dict.*")
    args = parser.parse_args()
    if args.step == "learn":
        learn(args.raw, args.out)
    elif args.models:
        apply(args.raw, args.out, args.models)
    else:
        parser.error("apply needs --models")


if __name__ == "__main__":
    main()
