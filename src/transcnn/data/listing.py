"""Which files are images, by their names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = [
    "EXTENSIONS",
    "folder_identity",
    "folders_in",
    "image_names",
    "images_in",
    "is_dir",
    "is_image_name",
    "lies_beside",
    "list_images",
]

ENDINGS = "jpg jpeg jpe jfif mpo png apng gif bmp dib tif tiff webp avif ppm pgm pbm pnm tga ico jp2 j2k qoi pcx"
ENDINGS += " npy"  # arrays, see image_names
# Images, too, so that nobody misses them in silence: HEIC is read where pillow-heif is installed, the others never.
ENDINGS += " heic heif jxl jpeg2000 psd svg exr hdr dng cr2 cr3 nef arw raf orf rw2"
EXTENSIONS = frozenset(f".{ending}" for ending in ENDINGS.split())
# What lies beside images; files of other endings in a folder of images are listed as left out.
BESIDE = "txt json jsonl xml csv tsv md rst yml yaml toml ini db cls log html htm py ipynb mat npy npz pt pth onnx url"
BESIDE += " safetensors zip tar gz tgz pdf lnk"
# What the directory of a training run holds: who trains inside of a data set's folder has the runs there, with figures.
RUN = frozenset({"config.yaml", "data.json"})


def is_image_name(name: str) -> bool:
    """Whether a file's name says that it is an image, and not a hidden file."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS


def image_names(names: Iterable[str]) -> list[str]:
    """Those names that are images'; arrays (.npy) only in folders without other images: beside these they are features.

    Names may have folders before them.
    """
    images = [name for name in names if is_image_name(os.path.basename(name))]
    folders = {os.path.dirname(name) for name in images if not _is_array(name)}
    return [name for name in images if not _is_array(name) or os.path.dirname(name) not in folders]


def _is_array(name: str) -> bool:
    return name.lower().endswith(".npy")


def lies_beside(name: str) -> bool:
    """Whether a file's name says that it is none of the images, but belongs beside them (notes, labels, archives)."""
    return name.startswith(".") or os.path.splitext(name)[1][1:].lower() in BESIDE.split()


def list_images(
    folder: str | os.PathLike[str],
    outside: Iterable[str | os.PathLike[str]] = (),
    others: list[str] | None = None,
) -> Iterator[str]:
    """The image files below a folder by name, sorted folder by folder, as paths; hidden ones are left out.

    Links to folders are followed, each folder is listed once, and those above this one and of ``outside`` (the folder
    of the whole data set, the other classes) never: so links in circles end, and no class gets another's images.
    Directories of runs are left out, for the images in them are figures. To ``others`` the paths of files are added
    whose names say neither that they are images nor something that usually lies beside images.

    Yields:
        Also what only looks like an image (a dangling link, a folder named x.jpg): reading it says what is wrong.
    """
    listed = {folder_identity(path) for path in (*outside, *Path(folder).resolve().parents)}
    waiting = [os.fspath(folder)]
    while waiting:
        path = waiting.pop()
        if path != os.fspath(folder) and not os.access(path, os.R_OK | os.X_OK):
            continue
        identity = folder_identity(path)
        if identity in listed:
            continue
        listed.add(identity)
        folders: list[str] = []
        files: list[str] = []
        odd: list[str] = []
        of_run = 0
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                of_run += entry.name in RUN
                if is_image_name(entry.name):
                    files.append(entry.name)
                elif is_dir(entry):
                    folders.append(entry.name)
                elif not lies_beside(entry.name):
                    odd.append(entry.path)
        if of_run == len(RUN):
            continue
        if others is not None:
            others += odd
        for name in sorted(image_names(files)):
            yield os.path.join(path, name)
        waiting += [os.path.join(path, name) for name in sorted(folders, reverse=True)]


def folders_in(folder: str | os.PathLike[str]) -> list[str]:
    """The names of the folders in a folder, sorted, those that are named like images among them; hidden ones are not.

    Raises:
        OSError: It can't be listed.
    """
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and is_dir(entry))


def images_in(folder: str | os.PathLike[str]) -> list[str]:
    """The names of the images that lie in a folder itself, sorted; none where it can't be listed."""
    try:
        with os.scandir(folder) as entries:
            return sorted(image_names(entry.name for entry in entries if not is_dir(entry)))
    except OSError:
        return []


def folder_identity(folder: str | os.PathLike[str]) -> tuple[int, int]:
    """What is equal for all paths of one folder."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def is_dir(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one; a link to itself isn't."""
    try:
        return entry.is_dir()
    except OSError:  # a circular link
        return False
