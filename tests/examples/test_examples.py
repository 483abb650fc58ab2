"""The benchmarks under examples/: their settings, the way from raw text to a table, downloads, and what goes wrong."""

import argparse
import functools
import hashlib
import http.server
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from types import ModuleType

import pytest
import torch
from example_support import COMMON, EXAMPLES, OFFLINE, error_line, load, write_raw
from fairseq import options
from fairseq.data.encoders.gpt2_bpe_utils import bytes_to_unicode

WITH_DOWNLOADS = ["iwslt17.de-en", "wmt14.de-en", "xsum", "cnn_dm"]
BENCHMARKS = [*WITH_DOWNLOADS, "lohelp.de-en"]


def write_byte_vocabulary(folder: Path) -> None:
    """A byte-level BPE in GPT-2's format with a subword for each byte, and one merge."""
    folder.mkdir()
    characters = [*bytes_to_unicode().values(), "ĠD"]
    (folder / "encoder.json").write_text(json.dumps({character: i for i, character in enumerate(characters)}))
    (folder / "vocab.bpe").write_text("#version: 0.2\nĠ D\n")


TINY = shlex.split(
    "--encoder-embed-dim 8 --encoder-ffn-embed-dim 8 --encoder-attention-heads 2 --decoder-embed-dim 8 "
    "--decoder-ffn-embed-dim 8 --decoder-attention-heads 2 --max-source-positions 64 --max-target-positions 64 "
    "--max-update 2 --update-freq 1 --num-workers 0 --log-format none"
)


def times(folder: Path) -> dict[Path, int]:
    """When each file was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_translation_from_raw_text_to_the_table(run_step, tmp_path):
    raw, work = tmp_path / "mine", tmp_path / "work"
    write_raw(raw, ("de", "en"), {"train": 40, "dev": 6, "test": 5})
    (raw / "train.de").write_text((raw / "train.de").read_text() + "\n")  # a pair without a source
    (raw / "train.en").write_text((raw / "train.en").read_text() + "NOTHING.\n")
    run = functools.partial(run_step, "iwslt17.de-en", work, SENTENCES=3, SUBSETS="valid", RAW=raw)

    run("prepare", "--merges", 20, "--workers", 1)
    assert len((work / "raw/train.de").read_text().splitlines()) == 40
    assert len((work / "data/valid.bpe.en").read_text().splitlines()) == 6
    assert (work / "data/data-bin/test.de-en.en.idx").exists()
    run("train-large", *TINY, "--encoder-layers", 1, "--decoder-layers", 2)
    # Any checkpoint can be the small model; how one is trained is for the summarization's test.
    run("evaluate", "--warmup", 0, SMALL=work / "large.pt")
    shown = run("table").stdout

    table = (work / "results/TABLE.md").read_text()
    assert shown == table
    assert "888 sentences, which is the validation split" in table
    large, careful = (
        next(line for line in table.split("\n") if start in line) for start in ("alone | - | 40", "2, 0.6")
    )
    assert [cell.strip() for cell in large.split("|")[2:6]] == ["-", "40.3", "1.00", "-"]
    assert [cell.strip() for cell in careful.split("|")[3:6]] == ["40.33 (+0.03)", "1.43", "40.33"]
    assert re.search(r"\| 1\.00 \[1\.00, 1\.00\] \|", large), "the measured side is filled in"
    assert "3 sentences, batch size 1" in table and "sig" not in table

    before = times(work)
    run("prepare", RAW=tmp_path)  # what is there needs no source
    run("train-large", "--arch", "no_such_arch")
    run("evaluate", "--warmup", 0, SMALL=work / "large.pt")
    assert times(work) == before, "a finished step wrote something"


def test_summarization_from_raw_text_to_a_small_model(run_step, tmp_path):
    raw, work = tmp_path / "mine", tmp_path / "work"
    write_raw(raw, ("source", "target"), {"train": 30, "val": 4, "test": 4})
    write_byte_vocabulary(tmp_path / "bytes")
    run = functools.partial(
        run_step,
        *("xsum", work),
        **{"RAW": raw, "GPT2_BPE": tmp_path / "bytes", "LARGE_ARCHIVE": "", "SENTENCES": 2, "SUBSETS": "test"},
        SMALL_ENCODER_LAYERS=1,
    )

    run("prepare", "--workers", 1, "--longest", 20)
    lines = (work / "data/train.bpe.source").read_text().splitlines()
    assert all(line.startswith("<s> ") and len(line.split()) <= 21 for line in lines)
    assert len((work / "data/data-bin/dict.target.txt").read_text().splitlines()) == 257
    run("train-large", *TINY, "--encoder-layers", 1, "--decoder-layers", 3, "--warmup-updates", 1)
    run("train-small", *TINY, "--warmup-updates", 1)
    start = torch.load(work / "small-start.pt", weights_only=True)["model"]
    assert {name.split(".")[2] for name in start if name.startswith("decoder.layers.")} == {"0"}
    shown = run("evaluate", "--warmup", 0).stdout
    assert "ROUGE-L" in shown and "bild (0.5,3)" in shown
    assert (work / "results/test-unaligned.json").exists()


@pytest.mark.parametrize(
    ("benchmark", "models"), [(name, "") for name in BENCHMARKS] + [(name, "paper") for name in WITH_DOWNLOADS]
)
def test_every_command_of_a_benchmark_is_accepted_by_its_program(run_step, benchmark, models, tmp_path, monkeypatch):
    """Names of files apart: with settings that a program does not know, a step would fail after hours."""
    for script in (EXAMPLES / benchmark / "run.sh", EXAMPLES / benchmark / "settings.sh", *COMMON.glob("*.sh")):
        subprocess.run(["bash", "-n", script], check=True)
    shown = run_step(benchmark, tmp_path / "work", "all", DRY_RUN=1, MODELS=models).stderr
    if "all_steps" in (EXAMPLES / benchmark / "settings.sh").read_text():
        for step in ("train-large", "train-small", "train-early-exit"):
            shown += run_step(benchmark, tmp_path / "work", step, DRY_RUN=1).stderr
    assert not (tmp_path / "work").exists(), "a dry run writes nothing"
    if benchmark in ("xsum", "cnn_dm") and not models:
        shown += run_step(benchmark, tmp_path / "work", "train-large", DRY_RUN=1, LARGE_ARCHIVE="").stderr
    (tmp_path / "large.pt").touch()
    programs = set()
    for line in shown.split("\n"):
        if not line.startswith("+ python "):
            continue
        _, _, program, *words = shlex.split(line)
        programs.add(Path(program).stem if program != "-m" else words.pop(0))
        # Checkpoints and folders that the programs look for before anything else.
        words = [re.sub(r"\S+/work/(data/data-bin|\S+\.pt)$", str(tmp_path), word) for word in words]
        monkeypatch.setattr(sys, "argv", [program, *words])
        if program == "-m":
            options.parse_args_and_arch(options.get_training_parser(), words)
        elif "/scripts/align.py" in program:
            load(Path(program)).make_parser().parse_args(words[: words.index("--")])
        elif "/scripts/" in program or program.endswith("preprocess.py"):
            assert isinstance(load(Path(program)).parse_args(), argparse.Namespace)
    wanted = {"preprocess", "fairseq_cli.train", "calibrate", "sweep", "benchmark", "rounds", "plot", "table"}
    assert wanted | ({"checkpoints", "convert_t5"} if models else {"align"}) <= programs


@pytest.mark.parametrize("benchmark", WITH_DOWNLOADS)
def test_offline_one_line_says_what_to_download_and_where_to_put_it(run_step, benchmark, tmp_path):
    message = error_line(run_step(benchmark, tmp_path / "work", "prepare", status=1))
    text = load(EXAMPLES / benchmark / "extract.py")
    assert all(file.urls[0] in message for file in text.FILES)
    assert str(tmp_path / "work/download") in message and "RAW" in message
    # The README names the files of one's own as the message does.
    names = re.search(r"\{train,valid,test\}\.\{\S+\}", message)[0]
    assert f"`{names}`" in (EXAMPLES / benchmark / "README.md").read_text()
    assert not (tmp_path / "work/raw").exists()


def test_a_step_says_which_step_comes_before_it(run_step, tmp_path):
    work = tmp_path / "work"
    assert "run.sh prepare" in error_line(run_step("iwslt17.de-en", work, "train-large", status=1))
    assert "run.sh train-large" in error_line(run_step("iwslt17.de-en", work, "sweep", status=1))
    assert "run.sh evaluate" in error_line(run_step("iwslt17.de-en", work, "table", status=1))
    assert "LARGE=nowhere.pt" in error_line(run_step("xsum", work, "sweep", status=1, LARGE="nowhere.pt"))
    assert "dl.fbaipublicfiles.com" in error_line(run_step("xsum", work, "train-large", status=1))
    assert run_step("xsum", work, "no-such-step", status=2).stderr.startswith("usage:")


def add_files(archive: Path, files: Mapping[str, str]) -> None:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, BytesIO(text.encode()))


def read_all(extract: ModuleType, downloads: Path) -> dict[str, list[tuple[str, str]]]:
    return {part: list(pairs) for part, pairs in extract.read(downloads)}


def segments(*texts: str) -> str:
    lines = "".join(f'<seg id="{i}"> {text} </seg>\n' for i, text in enumerate(texts, 1))
    return f'<?xml version="1.0"?>\n<doc docid="1">\n{lines}</doc>\n'


def test_iwslt_text_is_what_stands_between_the_tags(tmp_path):
    files = {
        "de-en/train.tags.de-en.de": "<url>x</url>\n<title>Titel</title>\nEins.\nZwei <b.\n<reviewer></reviewer>\n",
        "de-en/train.tags.de-en.en": "<url>x</url>\n<title>Title</title>\nOne.\nTwo <b.\n<reviewer></reviewer>\n",
    }
    for name in ("dev2010", *(f"tst{year}" for year in range(2010, 2016))):
        files[f"de-en/IWSLT17.TED.{name}.de-en.de.xml"] = segments(f"{name} eins", "zwei")
        files[f"de-en/IWSLT17.TED.{name}.de-en.en.xml"] = segments(f"{name} one", "two")
    add_files(tmp_path / "de-en.tgz", files)
    parts = read_all(load(EXAMPLES / "iwslt17.de-en/extract.py"), tmp_path)
    assert parts["train"] == [("Eins.", "One."), ("Zwei <b.", "Two <b.")]
    assert [(a.strip(), b.strip()) for a, b in parts["valid"]] == [("dev2010 eins", "dev2010 one"), ("zwei", "two")]
    assert len(parts["test"]) == 12


def test_wmt_text_comes_from_three_corpora_and_two_test_sets(tmp_path):
    extract = load(EXAMPLES / "wmt14.de-en/extract.py")
    for number, (archive, prefix) in enumerate(extract.TRAINING.items()):
        text = {f"{prefix}.de": f"Satz {number}\n\n", f"{prefix}.en": f"sentence {number}\nonly here\n"}
        add_files(tmp_path / archive.name, text)
    for archive, (source, target) in extract.EVALUATION.values():
        add_files(tmp_path / archive.name, {source: segments("Hallo"), target: segments("Hello")})
    parts = read_all(extract, tmp_path)
    assert parts["train"][::2] == [(f"Satz {i}", f"sentence {i}") for i in range(3)]
    assert parts["valid"] == parts["test"] == [(" Hallo ", " Hello ")]

    add_files(tmp_path / next(iter(extract.TRAINING)).name, {"something/else": "x"})
    with pytest.raises(SystemExit, match="has no training/europarl-v7.de-en.de"):
        read_all(extract, tmp_path)


def test_xsum_summaries_are_first_sentences_and_buttons_are_no_text(tmp_path):
    extract = load(EXAMPLES / "xsum/extract.py")
    story = (
        "[SN]URL[SN]\nhttp://x\n[SN]TITLE[SN]\nTitle\n[SN]FIRST-SENTENCE[SN]\nIt rained.\n"
        "[SN]RESTBODY[SN]\nShare this with\nIn {}.\nTwitter\nFor hours.\n"
    )
    add_files(tmp_path / extract.ARTICLES.name, {f"bbc-summary-data/{i}.summary": story.format(i) for i in range(3)})
    split = {"train": ["2"], "validation": ["0"], "test": ["1", "99"]}
    (tmp_path / extract.SPLIT.name).write_text(json.dumps(split))
    parts = read_all(extract, tmp_path)
    clean = {part: [tuple(" ".join(text.split()) for text in pair) for pair in pairs] for part, pairs in parts.items()}
    assert clean["train"] == [("In 2. For hours.", "It rained.")]
    assert [len(clean[part]) for part in ("valid", "test")] == [1, 1]


def test_cnn_dm_stories_are_found_by_the_hash_of_their_address(tmp_path):
    extract = load(EXAMPLES / "cnn_dm/extract.py")
    story = "(CNN) -- It rained\n\nA lot.\n\n@highlight\n\nRain in {}\n\n@highlight\n\nStreets wet\n"
    addresses = [f"http://news/{i}" for i in range(3)]
    names = [hashlib.sha1(address.encode()).hexdigest() for address in addresses]
    add_files(tmp_path / "cnn_stories.tgz", {f"cnn/stories/{names[0]}.story": story.format(0)})
    files = {f"dailymail/stories/{names[i]}.story": story.format(i) for i in (1, 2)}
    add_files(tmp_path / "dailymail_stories.tgz", files)
    for file, address in zip(extract.SPLIT.values(), addresses, strict=True):
        (tmp_path / file.name).write_text(address + "\nhttp://gone\n")
    parts = read_all(extract, tmp_path)
    assert parts["train"] == [("(CNN) -- It rained. A lot.", "Rain in 0. Streets wet.")]
    assert [parts[part][0][1] for part in ("valid", "test")] == ["Rain in 1. Streets wet.", "Rain in 2. Streets wet."]


def test_a_users_text_is_checked_and_made_one_line_a_line(tmp_path, capsys):
    corpus = importlib.import_module("corpus")
    write_raw(tmp_path / "mine", ("a", "b"), {"train": 3, "val": 2, "test": 2})
    (tmp_path / "mine/test.a").write_text("one\x0btwo\u2028three \x85\nfour\n")
    corpus.take(tmp_path / "mine", tmp_path / "out", ("a", "b"))
    assert (tmp_path / "out/test.a").read_text() == "one two three\nfour\n"
    assert "valid: 2 pairs" in capsys.readouterr().err

    (tmp_path / "mine/val.b").write_text("one line\n")
    with pytest.raises(SystemExit, match="equally many lines: .*val.a 2 and .*val.b 1"):
        corpus.take(tmp_path / "mine", tmp_path / "again", ("a", "b"))
    (tmp_path / "mine/train.a").write_bytes(b"\xff\n")
    with pytest.raises(SystemExit, match="train.a is not UTF-8"):
        corpus.take(tmp_path / "mine", tmp_path / "again", ("a", "b"))
    (tmp_path / "mine/train.a").unlink()
    with pytest.raises(SystemExit, match="has no train.a"):
        corpus.take(tmp_path / "mine", tmp_path / "again", ("a", "b"))


CONTENT = bytes(range(256)) * 40


class Server(http.server.BaseHTTPRequestHandler):
    """Sends CONTENT from where it is asked to, but breaks off after some bytes of each answer."""

    asked: list[str | None]
    at_once: int

    def do_GET(self):
        asked = self.headers.get("Range")
        self.asked.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start : start + self.at_once])

    def log_message(self, *arguments):
        pass


@contextmanager
def serving(at_once: int) -> Iterator[tuple[str, list[str | None]]]:
    """The address of a server on this machine, and the ranges that it is asked for."""
    asked: list[str | None] = []
    handler = type("Handler", (Server,), {"asked": asked, "at_once": at_once})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/file", asked
        finally:
            server.shutdown()
            thread.join()


def test_a_download_goes_on_where_it_broke_off(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    download = importlib.import_module("download")
    checksum = "sha256:" + hashlib.sha256(CONTENT).hexdigest()
    (tmp_path / "file.part").write_bytes(CONTENT[:100])
    with serving(at_once=4000) as (url, asked):
        (path,) = download.fetch([download.Published("file", (url,), checksum)], tmp_path)
    assert path.read_bytes() == CONTENT
    assert asked == ["bytes=100-", "bytes=4100-", "bytes=8100-"]
    assert not (tmp_path / "file.part").exists()
    # Now it is there, and no server is needed; nor does it help against a damaged one.
    download.fetch([download.Published("file", (url,), checksum)], tmp_path)
    path.write_bytes(CONTENT[1:])
    with pytest.raises(SystemExit, match="is not the published file .*remove it"):
        download.fetch([download.Published("file", (url,), checksum)], tmp_path)


def test_a_download_that_is_not_what_was_published_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    download = importlib.import_module("download")
    checksum = "md5:" + hashlib.md5(CONTENT).hexdigest()
    with serving(at_once=10**6) as (good, _):
        wrong = download.Published("file", (good,), "md5:" + "0" * 32)
        with pytest.raises(SystemExit, match="is not the published file"):
            download.fetch([wrong], tmp_path)
        assert not list(tmp_path.iterdir())
        nowhere = "http://127.0.0.1:9/file"
        (path,) = download.fetch([download.Published("file", (nowhere, good), checksum)], tmp_path)
        assert path.read_bytes() == CONTENT
    with serving(at_once=0) as (silent, asked), pytest.raises(SystemExit, match="stopped sending"):
        download.fetch([download.Published("other", (silent,))], tmp_path)
    assert len(asked) == download.ATTEMPTS


def test_training_pairs_of_unlike_or_great_length_are_left_out():
    is_clean = importlib.import_module("preprocess").is_clean
    assert is_clean("a b c", "x y", 3, 1.5)
    assert not is_clean("a b c", "x", 3, 1.5)
    assert not is_clean("a b c d", "w x y z", 3, 1.5)
    assert not is_clean("", "", 3, 1.5)


def test_shrinking_copies_evenly_spaced_layers():
    shrink = importlib.import_module("shrink")
    weights = {f"decoder.layers.{i}.fc1.weight": torch.tensor(i) for i in range(12)}
    weights |= {f"encoder.layers.{i}.fc1.weight": torch.tensor(i) for i in range(12)}
    weights |= {"encoder.embed_tokens.weight": torch.tensor(99)}
    small = shrink.shrink(weights, {"encoder": 3, "decoder": 1})
    assert {name: int(value) for name, value in small.items()} == {
        "encoder.layers.0.fc1.weight": 0,
        "encoder.layers.1.fc1.weight": 6,
        "encoder.layers.2.fc1.weight": 11,
        "decoder.layers.0.fc1.weight": 0,
        "encoder.embed_tokens.weight": 99,
    }
    with pytest.raises(SystemExit, match="12 layers"):
        shrink.shrink(weights, {"encoder": 13, "decoder": 1})


def write_results(results: Path) -> None:
    """Figures as benchmark.py, calibrate.py and sweep.py write them."""

    def row(system: str, bleu: float, speedup: float, **more: object) -> dict[str, object]:
        times = {f"speedup_over_{name}": [speedup * f] * 3 for name, f in (("greedy", 1), ("fairseq --beam 1", 2))}
        return {"system": system, "bleu": bleu, **times, **more}

    bild = {"small_calls": 9, "fallback_rate": 0.25, "rollback_rate": 0.01}
    results.mkdir(parents=True)
    for megabytes, (name, draft, setting) in enumerate(
        (("valid-aligned", 10, "0.9,3"), ("test-aligned", 20, "0.35,4,end"), ("test-unaligned", 10, "0.9,3"))
    ):
        rows = [row("greedy", 30, 1), row("small alone", 20, 5), row(f"bild ({setting})", 29.5, 1.5, **bild)]
        text = {"arguments": {"metric": "bleu", "max_draft": draft}, "rows": rows}
        (results / f"{name}.json").write_text(json.dumps(text))
        (results / f"{name}.txt").write_text(
            f"12 sentences; peak memory {megabytes} MB (all systems); BLEU sig\n| system |\n"
        )
    best = {"fallback_threshold": 0.35, "rollback_threshold": 4.0, "max_draft": 20, "verify_end": True}
    (results / "calibrate-aligned.json").write_text(json.dumps({"best": best}))
    (results / "calibrate-unaligned.json").write_text(json.dumps({"best": None}))
    (results / "sweep").mkdir()
    rows = [
        dict(
            zip(
                (
                    "kind",
                    "rollback_threshold",
                    "quality_change",
                    "speedup",
                    "method",
                    "fallback_threshold",
                    "max_draft",
                ),
                values,
                strict=True,
            ),
            **{"verify_end": False, "quality": 30 + values[2], "fallback_rate": 0.3},
            **{f"{name}_{end}": 0 for name in ("speedup", "quality_change") for end in ("low", "high")},
        )
        for values in [
            ("bild", 2.0, 0.2, 1.2, "aligned", 0.8, 10),
            ("bild", 5.0, -0.4, 1.8, "aligned", 0.4, 10),
            ("no rollback", "inf", -0.7, 1.7, "aligned", 0.6, 10),
            ("no fallback", 1.0, -3.0, 2.7, "aligned", 0.0, 4),
            ("greedy", None, 0.0, 1.0, "large model", None, None),
        ]
    ]
    (results / "sweep/results.json").write_text(json.dumps({"origin": {"metric_name": "BLEU"}, "rows": rows}))


def test_the_table_puts_the_papers_numbers_beside_the_users(tmp_path):
    table = importlib.import_module("table")
    paper = table.read_json(EXAMPLES / "iwslt17.de-en/paper.json")
    results = tmp_path / "results"
    write_results(results)
    lines = table.document(paper, results).split("\n")
    ours = "29.50 (-0.50) | 1.50 [1.50, 1.50] | 3.00 [3.00, 3.00] | 25.0% | 1.0%"
    assert f"| two models, aligned | 3, 0.9 | 40.24 (-0.06) | 1.62 | 40.09 | {ours} |" in lines
    test_set = lines[lines.index("## Test set, at thresholds chosen on the validation set") :]
    assert f"| two models, aligned | 4, 0.35, draft 20, end | {ours} |" in test_set
    assert test_set.count("- Measured: 12 sentences; BLEU sig") == 1  # the same for all methods
    # The fastest setting of each kind that loses no more than so much, or none.
    swept = [line for line in lines if line.startswith("| aligned | ")]
    assert [line.split(" | ")[3] for line in swept] == [
        *("2, 0.8", "5, 0.4", "5, 0.4"),
        *("-", "-", "inf, 0.6"),
        *("-", "-", "-"),
    ]
    assert any("30.20, +0.20 against the large model alone" in line for line in lines)


def test_thresholds_are_the_papers_on_validation_and_the_calibrated_ones_on_test(tmp_path):
    table = importlib.import_module("table")
    paper = table.read_json(EXAMPLES / "iwslt17.de-en/paper.json")
    write_results(tmp_path / "results")
    flags = functools.partial(table.flags, paper, tmp_path / "results")
    assert flags("valid", "aligned") == ["--bild", "0.9,3", "--bild", "0.6,4"]
    assert flags("test", "aligned") == ["--bild", "0.35,4.0,end", "--max-draft", "20"]
    assert flags("test", "unaligned") == ["--bild", "0.6,2", "--bild", "0.5,3"], "calibrate.py found none"
    assert flags("valid", "early-exit") == ["--exit", "0.6,2", "--exit", "0.5,3"]


def test_without_a_network_the_bpe_may_be_named(monkeypatch, tmp_path):
    """One line says where the BPE comes from, and the variable for one's own; so does one about a folder without it."""
    preprocess = importlib.import_module("preprocess")
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="download: cannot reach .*encoder.json.*vocab.bpe in GPT2_BPE$"):
        preprocess.find_vocabulary(None, tmp_path)
    with pytest.raises(SystemExit, match="which GPT2_BPE or --vocabulary names, has no encoder.json"):
        preprocess.find_vocabulary(tmp_path, tmp_path)


@pytest.mark.parametrize("benchmark", WITH_DOWNLOADS)
def test_the_readme_has_the_numbers_of_the_papers_file(benchmark):
    paper = json.loads((EXAMPLES / benchmark / "paper.json").read_text())
    readme = (EXAMPLES / benchmark / "README.md").read_text()
    for row in paper["settings"]:
        change = row["score"] - paper["large_alone"]
        setting = f"{row['models']} | {row['rollback']}, {row['fallback']}"
        numbers = f"{row['score']:.2f} ({change:+.2f}) | {row['speedup']:.2f} | {row['rerun']:.2f}"
        assert f"| two models, {setting} | {numbers} |" in readme
    assert "validation split" in readme
