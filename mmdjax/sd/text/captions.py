"""The captions of a folder of pictures: text files beside them, or one table for all.

`name.txt` or `name.caption` is the caption of `name.png`, whatever the case of its ending. A table is `metadata.jsonl`,
of lines {"file_name": "name.png", "text": "…"}, or `metadata.csv` with these two columns; if there is one, text files
are ignored. Texts are in UTF-8, with or without a mark of byte order, or in UTF-16 with one.
"""

import csv
import io
import json
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mmdjax._files.text import lines, read_text

TABLES = ("metadata.jsonl", "metadata.csv")
ENDINGS = (".txt", ".caption")


def find_captions(folder: Path, paths: Sequence[Path]) -> tuple[dict[Path, str], list[str]]:
    """(captions by picture, problems with captions) of a folder's pictures."""
    tables = [folder / name for name in TABLES if (folder / name).exists()]
    if len(tables) > 1:
        return {}, [f"{' and '.join(TABLES)} are two tables of captions; leave one"]
    found, problems = _from_table(tables[0], paths) if tables else ({}, [])
    stems: dict[str, list[Path]] = {}
    for path in paths:
        stems.setdefault(_plain(path.stem), []).append(path)
    for path in sorted(path for path in folder.iterdir() if is_caption(path)):
        mine = stems.get(_plain(path.stem), [])
        if not mine:
            problems.append(f"{path.name}: a caption without a picture")
        elif not tables:
            problems += _take(path, mine, found)
    return found, problems


def is_caption(path: Path) -> bool:
    """Whether a file's name is that of a caption."""
    return path.suffix.lower() in ENDINGS


def _take(path: Path, pictures: Sequence[Path], found: dict[Path, str]) -> list[str]:
    """Give a text file's caption to its pictures; problems with it."""
    try:
        text = " ".join(read_text(path).split())
    except (OSError, ValueError) as error:
        return [str(error)]
    if any(found.get(picture, text) != text for picture in pictures):
        return [f"{path.name}: another caption than that of a file of the same name"]
    found.update(dict.fromkeys(pictures, text))
    return []


def _from_table(table: Path, paths: Sequence[Path]) -> tuple[dict[Path, str], list[str]]:
    names = {_plain(path.name): path for path in paths}
    found, problems = {}, []
    try:
        rows = list((_json_rows if table.suffix == ".jsonl" else _csv_rows)(read_text(table)))
    except (ValueError, csv.Error) as error:
        return {}, [str(error)]
    for number, entry in rows:
        name, text = (entry.get(key) if isinstance(entry, dict) else None for key in ("file_name", "text"))
        if not (isinstance(name, str) and isinstance(text, str)):
            wanted = 'not a JSON object with "file_name" and "text"'
            if table.suffix == ".csv":
                wanted = 'not a row of columns "file_name" and "text"'
            problems.append(f"{table.name}, line {number}: {wanted}")
        elif (plain := _plain(str(PurePosixPath(name)))) not in names:
            problems.append(f"{table.name}, line {number}: a caption without its picture {name}")
        else:
            found[names[plain]] = text
    return found, problems


def _json_rows(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines(text), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def _csv_rows(text: str) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    for row in reader:
        yield reader.line_num, row


def _plain(name: str) -> str:
    # one form of letters with accents: disks of macOS have another than most tables
    return unicodedata.normalize("NFC", name)
