"""What is indexed, pictures with their captions, and how far an index has fallen behind it."""

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyvl import UserError, data, files, media
from tinyvl.progress import skip
from tinyvl.store import Row
from tinyvl.text import has_words


@dataclass
class Source:
    """What is indexed."""

    name: str  # absolute path of a folder or a data file; "-" for a list of paths
    root: str  # the folder that paths are relative to; "" where all are absolute
    captions: dict[str, list[str]] = field(default_factory=dict)  # of each picture, by its path

    def texts(self, paths: Iterable[str]) -> dict[str, str]:
        """The captions of some pictures as they are embedded -> the first picture of each."""
        found: dict[str, str] = {}
        for path in paths:
            for text in self.captions[path]:
                found.setdefault(one_line(text), path)
        found.pop("", None)
        return found

    def file(self, path: str) -> str:
        return os.path.join(self.root, path)


def read_source(
    name: str, null: bool = False, format: str | None = None, images: str | None = None,
    quiet: bool = False,
) -> Source:  # fmt: skip
    """A folder's pictures (captions from ``x.txt`` beside ``x.jpg``), a data set, or ``-``.

    With ``null`` the paths behind ``-`` end with NUL; ``format`` and ``images`` as in `data.read`.
    Unless ``quiet``, a line says what else is in a folder.

    Raises UserError: as `data.read`, or there are no pictures. The index is then left as it is: a
    disk that is not mounted looks like an empty folder.
    """
    if (format or images) and (name == "-" or os.path.isdir(name)):
        raise UserError("--format and --images go with a data set, not with bare pictures.", 2)
    if name == "-":
        source = Source("-", "")
        for path in media.expand(["-"], files.Unmarked(sys.stdin), null=null):
            source.captions[os.path.abspath(path)] = []
    elif os.path.isdir(name):
        root = os.path.abspath(name)
        source = Source(root, root)
        for path in media.expand([root], others=media.Others("image", quiet)):
            lines = source.captions[os.path.relpath(path, root)] = []
            beside = Path(os.path.splitext(path)[0] + ".txt")
            try:
                found = [line for _, line in files.text_lines(beside, optional=True)]
                lines += filter(has_words, found)
                if (bare := len(found) - len(lines)) and not quiet:
                    skip(f"{bare} captions without words in {beside}")
            except UserError as error:
                skip(str(error))
    else:
        file = os.path.abspath(os.path.expanduser(name))
        root = os.path.dirname(file)
        source = Source(file, root)
        records = data.read(file, format=format, images=images)
        pictures = [record for record in records if record.image]
        data.say_left_out(name, records, pictures, "not of a picture")
        for record in pictures:
            path = record.image.removeprefix(os.path.join(root, ""))
            source.captions.setdefault(path, []).extend(record.captions)
    if not source.captions:
        raise UserError(f"{name}: no pictures to index.")
    return source


def one_line(text: str) -> str:
    """A text as it is embedded: white space collapsed, what is no Unicode a question mark."""
    return " ".join(text.split()).encode("utf-8", "replace").decode()


def behind(source: Source, images: list[Row], captions: list[Row], failed: dict[str, Any]) -> str:
    """What has changed since an index was made, as "3 new, 1 gone"; "" if nothing has.

    ``images``, ``captions``: the index's rows; ``failed``: files that could not be read then, with
    their sizes and times of change.
    """
    known = {path: tuple(found) for path, found in failed.items()}
    known |= {row.path: (row.size, row.mtime) for row in images}
    there = {path: files.stat(source.file(path)) for path in source.captions}
    texts = source.texts(row.path for row in images if row.path in there)
    counts = {
        "new": len(there.keys() - known.keys()),
        "changed": sum(known.get(path, found) != found for path, found in there.items()),
        "gone": len(known.keys() - there.keys()),
    }
    if not any(counts.values()) and texts.keys() != {row.caption for row in captions}:
        return "other captions"
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
