"""Have the checkpoints of the paper's authors at hand: Hugging Face folders, in one folder under their names.

    python checkpoints.py mT5-large-iwslt2017-de-en mT5-small-iwslt2017-de-en --folder FOLDER

What is not there is downloaded. No checksums are published beside the files: those below are what Hugging Face shows
for its Git LFS files, as far as they are known here.
"""

import argparse
import pathlib
from collections.abc import Sequence

from download import Published, download, reason

HUB = "https://huggingface.co"
OWNER = "kssteven"
CONFIG, PIECES, WEIGHTS = "config.json", "spiece.model", "pytorch_model.bin"
# By the model that was fine-tuned: the size of the weights, and where its pieces are as well.
FAMILIES = {
    "mT5-large": ("4.92 GB", "google/mt5-large"),
    "mT5-small": ("1.2 GB", "google/mt5-small"),
    "T5-large": ("2.95 GB", "google-t5/t5-large"),
    "T5-small": ("242 MB", "google-t5/t5-small"),
}
CHECKSUMS = {
    "mT5-large-iwslt2017-de-en": "e7614dc56282e45bf035d3cd4cdc6f4abd09cc964f4e551387e3003f80d60fce",
    "mT5-large-wmt2014-de-en": "700f5a7b6db84006eda37342ddcf73db956542b6532d7b01bcb10bd92aab8234",
    "T5-small-xsum-bild-aligned": "a9432f7960eaaf31de97ddba0c5ba1283adbd2bcc65a2cb843a85f73fe4d8211",
}


def family(name: str) -> tuple[str, str]:
    """Return the size of a checkpoint's weights and the published model that it was made from."""
    return FAMILIES["-".join(name.split("-")[:2])]


def files(name: str) -> list[Published]:
    """Return what is needed of a checkpoint, in the order of a download: weights last."""
    urls = {file: [f"{HUB}/{OWNER}/{name}/resolve/main/{file}"] for file in (CONFIG, PIECES, WEIGHTS)}
    urls[PIECES].append(f"{HUB}/{family(name)[1]}/resolve/main/{PIECES}")
    checksum = CHECKSUMS.get(name)
    checksums = {WEIGHTS: f"sha256:{checksum}"} if checksum else {}
    return [Published(file, tuple(places), checksums.get(file)) for file, places in urls.items()]


def is_there(folder: pathlib.Path, file: str) -> bool:
    """Return whether a folder has a file; weights may also be in other forms."""
    others = ("model.safetensors", "model.safetensors.index.json", f"{WEIGHTS}.index.json") if file == WEIGHTS else ()
    return any((folder / name).is_file() for name in (file, *others))


def take(name: str, folder: pathlib.Path) -> str | None:
    """Download what is missing of a checkpoint; return why that failed, or None.

    Args:
        name: of the checkpoint.
        folder: its own.
    """
    for file in files(name):
        if is_there(folder, file.name):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        try:
            download(file, folder / file.name)
        except OSError as error:
            return reason(error)
    return None


def take_all(names: Sequence[str], folder: pathlib.Path, may_download: bool = True) -> None:
    """Make sure that ``folder`` has a folder for each name, with all that is needed.

    Raises:
        SystemExit: with one line that says what is missing, how large it is and where to put it.
    """
    missing = {}
    for name in names:
        complete = all(is_there(folder / name, file.name) for file in files(name))
        failure = (take(name, folder / name) if may_download else "not in that folder") if not complete else None
        if failure:
            missing[name] = failure
    if not missing:
        return
    wanted = ", ".join(f"{OWNER}/{name} ({family(name)[0]})" for name in missing)
    why = next(iter(missing.values()))
    raise SystemExit(
        f"checkpoints: {len(missing)} of {len(names)} are missing ({why}): get {wanted} from {HUB}, of each "
        f"{CONFIG}, {PIECES} and {WEIGHTS} (or model.safetensors), put them into {folder}/NAME, "
        "and run this step again; or name a folder with these folders in PAPER_MODELS"
    )


def main() -> None:
    """Read the command line and download."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", help="checkpoints of the paper's authors, without the owner's name")
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="where they are, or will be put")
    parser.add_argument("--no-download", action="store_true", help="take what is there only")
    args = parser.parse_args()
    for name in args.names:
        if not any(name.startswith(f"{start}-") for start in FAMILIES):
            parser.error(f"{name}: is no checkpoint of the paper's; its name begins with {' or '.join(FAMILIES)}")
    take_all(args.names, args.folder, not args.no_download)


if __name__ == "__main__":
    main()
