"""What an alignment is told: models, data, and the settings of its steps; and the flags that say so."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..decoding.policies import Policy
from ..errors import BildError, flag
from ..models.exits import parse_exit_layers
from ..plugin.files import unreadable
from ..plugin.search import SearchOptions
from .arguments import add_score_arguments, add_search_arguments
from .files import check_outputs, try_file, try_folder
from .scoring import ScoreOptions


@dataclass(frozen=True)
class AlignOptions:
    """The flags of ``scripts/align.py``, with the same names and defaults; its ``--help`` says more of each.

    Args:
        data: folder of binarized data.
        source_lang, target_lang: the direction; None for that of the data's files.
        large, small: checkpoints.
        early_exit: the large model's exits after these layers, ``"2"`` or ``"1,2"``, are trained; then there is no
            ``small``.
        exit_own_layers: decoder layers that each exit has for itself.
        out: where the aligned model is written, in half precision with ``half``.
        draft_vocab: how many types to write beside ``out``, in a file of the same name with the suffix ``.vocab.txt``.
        work: folder for all else; None for ``out`` with the suffix ``.work``.
        report: JSON file for the figures; None for ``out`` with the suffix ``.json``.
        cuda: generate and measure on the GPU.
        cpu: train without a GPU.
        seed: of the samples and of the training.
        subset, sample, splice: the sources to learn from.
        valid_subset, valid_sample: the sources to validate with.
        truncate_source: tokens to cut longer sources to.
        part: sentences that the large model writes in one go.
        generate_tokens: tokens of a batch that is generated.
        search: limits of what the large model writes.
        distill, distill_top, epochs, lr, max_tokens, dropout: of the training.
        on_policy: epochs of a second training, with what both models write together; 0 for none.
        train_flags: flags of fairseq-train that win over these.
        sentences, batch_size, fallback, rollback, max_draft, verify_end, lossless_fallback: what is measured.
        score: quality of what is measured.

    Raises:
        BildError: a file that is missing, or a number out of range.
    """

    data: Path
    large: Path
    out: Path
    small: Path | None = None
    early_exit: str | None = None
    exit_own_layers: int = 0
    half: bool = False
    draft_vocab: int | None = None
    work: Path | None = None
    report: Path | None = None
    cuda: bool = False
    cpu: bool = False
    seed: int = 1
    source_lang: str | None = None
    target_lang: str | None = None

    subset: str = "train"
    sample: int | None = None
    splice: int = 0
    valid_subset: str = "valid"
    valid_sample: int = 2000
    truncate_source: int | None = None
    part: int = 5000
    generate_tokens: int = 8000
    search: SearchOptions = field(default_factory=SearchOptions)

    distill: float = 0.0
    distill_top: int = 0
    epochs: int = 10
    lr: float = 1e-3
    max_tokens: int = 4000
    dropout: float = 0.0
    on_policy: int = 0
    train_flags: Sequence[str] = ()

    sentences: int = 100
    batch_size: int = 1
    fallback: float = Policy.fallback_threshold
    rollback: float = Policy.rollback_threshold
    max_draft: int = Policy.max_draft
    verify_end: bool = False
    lossless_fallback: float = 0.25
    score: ScoreOptions = field(default_factory=ScoreOptions)

    def __post_init__(self) -> None:
        for name in ("large", "small"):
            if getattr(self, name) is not None and not getattr(self, name).is_file():
                raise BildError(f"--{name} {getattr(self, name)}: {unreadable(getattr(self, name))}")
        self._check_student()
        if not self.data.is_dir():
            raise BildError(f"{self.data}: no such folder; give what fairseq-preprocess wrote with --destdir")
        for name in ("distill", "fallback", "lossless_fallback"):
            if not 0 <= getattr(self, name) <= 1:
                raise BildError(f"{flag(name)} {getattr(self, name)}: give a number from 0 to 1")
        positive = ("sample", "valid_sample", "part", "generate_tokens", "epochs", "max_tokens", "lr", "sentences")
        for name in (*positive, "batch_size", "max_draft", "truncate_source", "draft_vocab"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise BildError(f"{flag(name)} {getattr(self, name)}: give a number above 0")
        if self.distill_top < 0:
            raise BildError(f"--distill-top {self.distill_top}: give a number of words, 0 for all")
        if self.on_policy < 0:
            raise BildError(f"--on-policy {self.on_policy}: give a number of epochs, 0 for none")
        if self.splice < 0:
            raise BildError(f"--splice {self.splice}: give a number of sources, 0 for none")
        # The class is frozen: a default that depends on another field is set like this.
        object.__setattr__(self, "work", self.work or self.out.with_suffix(".work"))
        object.__setattr__(self, "report", self.report or self.out.with_suffix(".json"))
        if len({self.out.resolve(), self.work.resolve(), self.report.resolve()}) < 3:
            raise BildError(f"--out {self.out}: --work and --report must have other names: {self.work}, {self.report}")
        check_outputs({**vars(self), **vars(self.score)}, "out", "report")

    def _check_student(self) -> None:
        if self.small is None and self.early_exit is None:
            raise BildError("give --small, or --early-exit for exits of the large model")
        if self.small is not None and self.early_exit is not None:
            raise BildError("--small and --early-exit both say what is trained; give one of them")
        if self.early_exit is not None:
            parse_exit_layers(self.early_exit)
        elif self.exit_own_layers:
            raise BildError("--exit-own-layers are of exits: give --early-exit, too")
        if self.exit_own_layers < 0:
            raise BildError(f"--exit-own-layers {self.exit_own_layers}: give a number of layers, 0 for none")
        if self.early_exit is not None and self.distill_top:
            raise BildError("--distill-top is for a small model; an exit learns from the last layer in the same pass")

    @property
    def vocabulary(self) -> Path:
        """The file of the draft vocabulary."""
        return self.out.with_suffix(".vocab.txt")

    def try_outputs(self) -> None:
        """Makes sure that all files can be written.

        Raises:
            BildError: one cannot.
        """
        files = {"--out": self.out, "--report": self.report}
        for name, path in (files | ({"--draft-vocab": self.vocabulary} if self.draft_vocab else {})).items():
            if path.exists() and not path.is_file():
                kind = "a folder" if path.is_dir() else "no file"
                raise BildError(f"{name} {path}: cannot write there, that is {kind}; name a file")
            if path.exists():
                try_file(name, path)
            try_folder(name, path.parent)
        try_folder("--work", self.work)

    def policy(self) -> Policy:
        """The policy that is measured, and that both models write with for ``on_policy``."""
        return Policy(self.fallback, self.rollback, self.max_draft, verify_end=self.verify_end)

    def flags(self, *names: str) -> dict[str, object]:
        """Some settings, or limits of the search, under the names of their flags: what a step depends on."""
        values = {**dataclasses.asdict(self.search), **vars(self)}
        return {flag(name): values[name] for name in names}


def add_student_arguments(parser: argparse.ArgumentParser) -> None:
    """The large model, and what is aligned with it: a small model, or exits."""
    add = parser.add_argument
    add("--large", type=Path, required=True, help="checkpoint of the large model")
    add("--small", type=Path, help="checkpoint of the small model")
    exit_help = "instead of --small: train exits of the large model after these layers, which stays as it is itself"
    add("--early-exit", metavar="K[,K...]", help=f"{exit_help}; the lowest one is measured")
    own_help = "with --early-exit: decoder layers that each exit has for itself, see README (default: 0)"
    add("--exit-own-layers", type=int, default=AlignOptions.exit_own_layers, metavar="N", help=own_help)


def add_calibration_arguments(group: argparse._ArgumentGroup) -> None:
    """The sources, and how the large model writes for them."""
    add = group.add_argument
    add("--subset", default=AlignOptions.subset, help="the sources to learn from (default: train)")
    add("--sample", type=int, metavar="N", help="only N of them, drawn at random")
    add(
        "--splice",
        type=int,
        default=AlignOptions.splice,
        metavar="N",
        help="N more sources, each spliced from two that have two tokens in a row in common; a small corpus is soon "
        "learned by heart, and what the large model makes of these is as good to learn from (default: 0)",
    )
    add("--valid-subset", default=AlignOptions.valid_subset, help="the sources to validate with (default: valid)")
    valid_help = "at most N of them, drawn at random (default: 2000)"
    add("--valid-sample", type=int, default=AlignOptions.valid_sample, metavar="N", help=valid_help)
    truncate_help = "cut longer sources, as fairseq does for summarization"
    add("--truncate-source", type=int, metavar="TOKENS", help=truncate_help)
    part_help = "sentences that are written in one go, which an interruption costs (default: 5000)"
    add("--part", type=int, default=AlignOptions.part, help=part_help)
    add("--generate-tokens", type=int, default=AlignOptions.generate_tokens, help="tokens a batch (default: 8000)")
    add_search_arguments(group)


def add_training_arguments(group: argparse._ArgumentGroup) -> None:
    """How the small model, or the exits, are trained."""
    add = group.add_argument
    add(
        "--distill",
        type=float,
        default=AlignOptions.distill,
        metavar="W",
        help="0 to 1: how much is learned from the large model's distribution at each position rather than from its "
        "text; above 0 the large model runs during training as well (default: 0)",
    )
    add(
        "--distill-top",
        type=int,
        default=AlignOptions.distill_top,
        metavar="K",
        help="with --distill: only the large model's K most probable words, which stay in memory (6 K bytes a token), "
        "so that it runs in the first epoch only; 32 loses little (default: 0, all words in every epoch)",
    )
    add("--epochs", type=int, default=AlignOptions.epochs, help="passes over the calibration set (default: 10)")
    on_policy_help = (
        "so many passes more, at half the learning rate, over what both models write together at --fallback and "
        "--rollback: the small model learns what the large one predicts after the small one's own words (default: 0)"
    )
    add("--on-policy", type=int, default=AlignOptions.on_policy, metavar="EPOCHS", help=on_policy_help)
    add("--lr", type=float, default=AlignOptions.lr, help="learning rate, which falls to 0 (default: 1e-3)")
    add("--max-tokens", type=int, default=AlignOptions.max_tokens, help="tokens a batch (default: 4000)")
    add("--dropout", type=float, default=AlignOptions.dropout, help="of the small model (default: 0)")


def add_report_arguments(group: argparse._ArgumentGroup) -> None:
    """What is measured before and after, and how."""
    add = group.add_argument
    add("--sentences", type=int, default=AlignOptions.sentences, help="how many are generated and timed (default: 100)")
    add("--batch-size", type=int, default=AlignOptions.batch_size)
    add("--fallback", type=float, default=AlignOptions.fallback, help="threshold (default: 0.6)")
    add("--rollback", type=float, default=AlignOptions.rollback, help="threshold (default: 2)")
    add("--max-draft", type=int, default=AlignOptions.max_draft, help="tokens a draft (default: 10)")
    add("--verify-end", action="store_true", help="also verify what is drafted before the end")
    lossless_help = "fallback threshold of lossless runs (default: 0.25)"
    add("--lossless-fallback", type=float, default=AlignOptions.lossless_fallback, help=lossless_help)
    add_score_arguments(group)
