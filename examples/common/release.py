"""Take model.pt out of one of fairseq's released archives (bart.large.xsum, bart.large.cnn).

    python release.py bart.large.xsum OUT.pt --downloads FOLDER

No checksums of these archives are published. A download that breaks off is noticed and goes on; a checkpoint is read
with PyTorch's safe unpickler wherever it is used.
"""

import argparse
import os
import pathlib
import shutil
import tarfile

from download import Published, fetch

PLACE = "https://dl.fbaipublicfiles.com/fairseq/models"


def take_model(archive: pathlib.Path, name: str, out: pathlib.Path) -> None:
    """Write NAME/model.pt of the archive to ``out``, which appears once it is complete.

    Raises:
        SystemExit: the archive is damaged, or another one.
    """
    temporary = out.with_name(out.name + ".tmp")
    try:
        with tarfile.open(archive) as tar, temporary.open("wb") as file:
            model = tar.extractfile(f"{name}/model.pt")
            shutil.copyfileobj(model, file)
    except KeyError:
        raise SystemExit(f"release: {archive} has no {name}/model.pt: is it the right archive?") from None
    except (tarfile.TarError, EOFError) as error:
        raise SystemExit(f"release: {archive} is damaged ({error}): remove it and run this step again") from None
    os.replace(temporary, out)


def main() -> None:
    """Read the command line, download and unpack."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of the release")
    parser.add_argument("out", type=pathlib.Path, help="checkpoint to write")
    parser.add_argument("--downloads", type=pathlib.Path, required=True, help="folder for the archive")
    args = parser.parse_args()
    file = f"{args.name}.tar.gz"
    (archive,) = fetch([Published(file, (f"{PLACE}/{file}",))], args.downloads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    take_model(archive, args.name, args.out)


if __name__ == "__main__":
    main()
