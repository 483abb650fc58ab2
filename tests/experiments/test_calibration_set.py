"""Calibration sets, made with a large model that writes each source backwards: nothing is loaded or trained."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import support
import torch
from fairseq.data import indexed_dataset
from script_support import MemoryTask

from bild_fairseq.errors import BildError
from bild_fairseq.experiments.align_options import AlignOptions
from bild_fairseq.experiments.calibration_set import CalibrationSet, Limits
from bild_fairseq.experiments.splice import splices
from bild_fairseq.plugin.search import SearchOptions

EOS = support.symbols().eos()
SOURCES = [support.source([i % 7, 8, 9, *range(i % 5)]) for i in range(23)]


def backwards(source: list[int]) -> list[int]:
    return [*source[-2::-1], EOS]


class Maker:
    """Makes calibration sets of SOURCES in a folder, and keeps what was said and how large the batches were."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.said: list[str] = []
        self.batches: list[int] = []
        self.stop_after = 10**6  # batches
        for language in ("de", "en"):
            support.symbols().save(str(folder / f"dict.{language}.txt"))
        for name in ("large.pt", "small.pt"):
            (folder / name).touch()

    def __call__(self, work: str = "work", train: range = range(23), **changes: Any) -> CalibrationSet:
        """Validates with the first three sources and trains with those of ``train``; options are ``changes``."""
        paths = {"data": self.folder, "large": self.folder / "large.pt", "small": self.folder / "small.pt"}
        options = AlignOptions(**paths, out=self.folder / "out.pt", **{"part": 10, "splice": 0, **changes})
        limits = Limits(source=changes.get("truncate_source") or 10, target=10)
        task = MemoryTask(SOURCES, SOURCES)
        made = CalibrationSet(
            self.folder / work, task, options, limits, "the large model", lambda: self._write, self.said.append
        )
        made.make({"valid": range(3), "train": train})
        return made

    def _write(self, batch: dict[str, Any]) -> list[list[int]]:
        if len(self.batches) == self.stop_after:
            raise KeyboardInterrupt
        rows = [row[row != support.symbols().pad()].tolist() for row in batch["net_input"]["src_tokens"]]
        self.batches.append(len(rows))
        return [backwards(row) for row in rows]


@pytest.fixture
def maker(tmp_path) -> Maker:
    return Maker(tmp_path)


def pairs(made: CalibrationSet, subset: str = "train") -> list[tuple[list[int], list[int]]]:
    """What fairseq will read."""
    sides = [indexed_dataset.MMapIndexedDataset(str(made.data / f"{subset}.de-en.{side}")) for side in ("de", "en")]
    return [(source.tolist(), target.tolist()) for source, target in zip(*sides, strict=True)]


def test_each_source_is_with_what_the_large_model_writes(maker):
    made = maker()
    assert pairs(made) == [(source, backwards(source)) for source in SOURCES]
    assert pairs(made, "valid") == pairs(made)[:3]
    assert (made.data / "dict.en.txt").read_text() == (maker.folder / "dict.en.txt").read_text()
    count = len(maker.batches)
    assert pairs(maker()) == pairs(made)
    assert len(maker.batches) == count, "done is done"


def test_an_interruption_costs_one_part(maker):
    maker.stop_after = 2  # validation sources, and the first part
    with pytest.raises(KeyboardInterrupt):
        maker()
    assert not (maker.folder / "work/data-bin").exists()
    maker.stop_after, maker.said = 10**6, []
    assert pairs(maker()) == [(source, backwards(source)) for source in SOURCES]
    assert [line for line in maker.said if "writes" in line] == [
        "the large model writes train, part 2 of 3",
        "the large model writes train, part 3 of 3",
    ]


def test_outputs_without_an_end_are_left_out(maker):
    """With room for five words, longer outputs are cut; the end that fairseq puts there is nothing to learn."""
    made = maker(search=SearchOptions(max_len_b=5))
    assert pairs(made) == [(source, backwards(source)) for source in SOURCES if len(source) <= 5]
    assert f"{len(pairs(made))} sentences, {23 - len(pairs(made))} without an end left out" in maker.said[-1]
    with pytest.raises(BildError, match="ended none of the 3 valid sentences; raise --max-len-b"):
        maker("other", search=SearchOptions(max_len_b=2))
    # The limit may depend on the source's length, and is never above what the small model can be trained on.
    made = maker("relative", search=SearchOptions(max_len_a=0.5, max_len_b=3))
    assert pairs(made) == [(source, backwards(source)) for source in SOURCES if len(source) <= 6]


def test_a_source_that_is_longer_than_a_batch_is_a_batch_of_its_own(maker):
    made = maker(part=100, generate_tokens=12)
    assert pairs(made) == [(source, backwards(source)) for source in SOURCES]
    assert max(maker.batches) == 3  # of the shortest, with four tokens each
    maker.batches.clear()
    assert pairs(maker("short", generate_tokens=4)) == pairs(made)
    assert maker.batches == [1] * (3 + 23)


def test_spliced_sources_come_after_the_corpus_own(maker):
    plain = pairs(maker())
    rows = pairs(maker("spliced", splice=12))
    assert rows[: len(plain)] == plain
    more = rows[len(plain) :]
    assert 6 < len(more) <= 12
    assert all(target == backwards(source) and source not in SOURCES for source, target in more)


def test_splices_join_where_two_tokens_are_the_same():
    rows = [torch.tensor(row) for row in ([5, 6, 7, 8, 2], [9, 6, 7, 10, 11, 2], [4, 2], [2])]
    make: Callable[..., list] = partial(splices, longest=99, seed=1)
    made = [tuple(row.tolist()) for row in make(rows, 10)]
    assert sorted(made) == [(5, 6, 7, 10, 11, 2), (9, 6, 7, 8, 2)]
    assert [tuple(row.tolist()) for row in make(rows, 1)] == made[:1]
    assert [tuple(row.tolist()) for row in make(rows, 10, longest=5)] == [(9, 6, 7, 8, 2)]
    assert make(rows[2:], 10) == []
