"""Text files as people have them: UTF-8 with or without a mark of byte order, UTF-16 and UTF-32 by theirs."""

import codecs
import re
from pathlib import Path

MARKS = (  # the longer first: UTF-32's begins as UTF-16's does
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
LINE = re.compile("\r\n|\n|\r")  # not U+2028 and the like, which may stand in a caption


def read_text(path: str | Path) -> str:
    """The text of a file, without a mark of byte order.

    Raises:
      ValueError: bytes that are not text in the encoding that the mark says, or in UTF-8; it names the file.
    """
    path = Path(path)
    data = path.read_bytes()
    encoding = next((name for mark, name in MARKS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is {data[error.start]:#04x}" if error.start < len(data) else "it is cut off"
        raise ValueError(
            f"{path.name} is not {encoding.removesuffix('-sig').upper()} text ({found}); save it as UTF-8"
        ) from None


def lines(text: str) -> list[str]:
    """The lines of a text, ended by line feed, carriage return or both.

    Example:
      >>> lines("a\\r\\nb\\u2028c\\n")
      ['a', 'b\\u2028c', '']
    """
    return LINE.split(text)
