"""Folders of pictures: what is read, in which order and how; and what is refused."""

import io
import json
import struct
import unicodedata
import zlib

import numpy as np
import pytest
from PIL import Image

from mmdjax.sd.pictures import ORIENTATION, PictureError, open_pictures, read_picture

RED, GREY = (255, 0, 0), (128, 128, 128)


def save(path, array, **how):
    Image.fromarray(np.asarray(array, np.uint8)).save(path, **how)
    return path


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "a.jpg", "c.PNG"):
        save(tmp_path / name, np.full((8, 8, 3), GREY))
    return tmp_path


def test_sorted_and_in_batches(folder):
    found = open_pictures(folder)
    assert [path.name for path in found.paths] == ["a.jpg", "b.png", "c.PNG"]
    assert found.captions is None
    batches = list(found.batches(4, 6, batch_size=2))
    assert [batch.shape for batch in batches] == [(2, 4, 6, 3), (1, 4, 6, 3)]
    np.testing.assert_allclose(np.concatenate(batches), 128 / 127.5 - 1, atol=2 / 127.5)


def test_cut_around_the_centre_and_resized(tmp_path):
    # 12 × 4: the middle third is green, and all that a square picture keeps
    wide = np.zeros((4, 12, 3))
    wide[:, :4, 0], wide[:, 4:8, 1], wide[:, 8:, 2] = 255, 255, 255
    picture = read_picture(save(tmp_path / "wide.png", wide), 2, 2)
    np.testing.assert_array_equal(picture, np.broadcast_to([-1.0, 1.0, -1.0], (2, 2, 3)))
    tall = read_picture(save(tmp_path / "tall.png", wide.transpose(1, 0, 2)), 2, 2)
    np.testing.assert_array_equal(tall, picture)


def test_turned_upright(tmp_path):
    left_red = np.zeros((4, 4, 3))
    left_red[:, :2] = RED
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise: left becomes top
    picture = read_picture(save(tmp_path / "a.png", left_red, exif=exif), 4, 4)
    assert (picture[:2, :, 0] == 1).all()
    assert (picture[2:, :, 0] == -1).all()


@pytest.mark.parametrize(
    ("name", "mode", "stored", "pixel"),
    [
        ("rgba.png", "RGBA", (255, 0, 0, 128), (255, 127, 127)),  # on white
        ("clear.png", "RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("clear-grey.png", "LA", (0, 0), (255, 255, 255)),
        ("grey.png", "L", (128,), GREY),
        ("cmyk.jpg", "CMYK", (0, 255, 255, 0), RED),
    ],
)
def test_colours(tmp_path, name, mode, stored, pixel):
    Image.new(mode, (8, 8), stored).save(tmp_path / name)
    picture = read_picture(tmp_path / name, 4, 4)
    np.testing.assert_allclose((picture[1, 1] + 1) * 127.5, pixel, atol=3)  # JPEG, and the blend's rounding


def test_palette_bits_and_grey_models(tmp_path):
    Image.fromarray(np.full((8, 8), 30_000, np.uint16)).save(tmp_path / "deep.png")  # 16 bits: 30000/65535
    np.testing.assert_allclose(read_picture(tmp_path / "deep.png", 4, 4), 2 * 30_000 / 65_535 - 1, atol=0.01)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, *RED])
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "palette.png", 4, 4)[0, 0], [1, -1, -1])
    palette.save(tmp_path / "clear.png", transparency=1)
    np.testing.assert_array_equal(read_picture(tmp_path / "clear.png", 4, 4)[0, 0], [1, 1, 1])
    assert read_picture(tmp_path / "palette.png", 4, 6, channels=1).shape == (4, 6, 1)


def test_captions(folder):
    for name, text in {"a": "a cat\n", "b": "two\nlines", "c": ""}.items():
        (folder / f"{name}.txt").write_text(text)
    assert open_pictures(folder).captions == ("a cat", "two lines", "")
    entries = [{"file_name": name, "text": f"of {name}"} for name in ("c.PNG", "b.png", "a.jpg")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)) + "\n\n")
    assert open_pictures(folder).captions == ("of a.jpg", "of b.png", "of c.PNG")  # these come first


@pytest.mark.parametrize("mark", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.caption", "metadata.jsonl", "metadata.csv"])
def test_captions_in_encodings(tmp_path, name, mark):
    """A mark of byte order is no part of a caption; lines end where an editor ends them, not at U+2028."""
    save(tmp_path / "a.png", np.zeros((8, 8, 3)))
    text = 'a "caf\u00e9",\u2028b'
    whole = text
    if name.endswith("jsonl"):
        whole = json.dumps({"file_name": "./a.png", "text": text}, ensure_ascii=False) + "\r\n"
    if name.endswith("csv"):
        whole = 'file_name,text\na.png,"a ""caf\u00e9"",\u2028b"\n'
    (tmp_path / name).write_bytes(whole.encode(mark))
    expected = " ".join(text.split()) if name.startswith("a.") else text
    assert open_pictures(tmp_path).captions == (expected,)


def test_captions_of_names_with_accents(tmp_path):
    """macOS takes letters with accents apart in names of files; tables mostly have them whole."""
    name = unicodedata.normalize("NFD", "caf\u00e9.png")
    save(tmp_path / name, np.zeros((8, 8, 3)))
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "caf\u00e9.png", "text": "x"}))
    assert open_pictures(tmp_path).captions == ("x",)


def entry(tag, kind, count, value):
    return struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


HELD = entry(ORIENTATION, 3, 1, struct.pack("<H", 6))  # to be turned by 90° clockwise
EXIF = {  # what cameras and programs wrote, and whether it still says how the camera was held
    "text for a resolution": ("jpg", [HELD, entry(0x011A, 2, 4, b"abc\0")], b"", True),
    "a double for a place": ("jpg", [HELD, entry(0xA005, 12, 1, struct.pack("<I", 38))], struct.pack("<d", 1.5), True),
    "a place beyond the end": ("jpg", [HELD, entry(0x8769, 4, 1, struct.pack("<I", 2**31))], b"", True),
    "text for the turn": ("jpg", [entry(ORIENTATION, 2, 2, b"6\0")], b"", False),
    "garbage": ("png", chunk(b"eXIf", b"garbage"), b"", False),
    "cut off": ("png", chunk(b"eXIf", b"II*\0\x08\0\0\0\x05"), b"", False),
    "no hexadecimal": ("png", chunk(b"tEXt", b"Raw profile type exif\0\nexif\n   10\nzz-not-hex"), b"", False),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF|Truncated|.*EXIF")
@pytest.mark.parametrize("name", EXIF)
def test_damaged_exif_harms_no_pixel(tmp_path, name):
    """The picture is used, and turned if the damage leaves that to be read; the check finds nothing wrong."""
    kind, said, extra, turned = EXIF[name]
    left_red, out = np.zeros((16, 16, 3), np.uint8), io.BytesIO()
    left_red[:, :8] = RED
    Image.fromarray(left_red).save(out, "JPEG" if kind == "jpg" else "PNG")
    data, place = out.getvalue(), 2 if kind == "jpg" else 33
    if kind == "jpg":
        ifd = struct.pack("<H", len(said)) + b"".join(said) + bytes(4)
        said = b"Exif\0\0II*\0\x08\0\0\0" + ifd + extra
        said = b"\xff\xe1" + struct.pack(">H", len(said) + 2) + said
    (tmp_path / f"a.{kind}").write_bytes(data[:place] + said + data[place:])
    (picture,) = next(open_pictures(tmp_path).batches(16, 16))
    red = picture[:7, :, 0] if turned else picture[:, :7, 0]
    np.testing.assert_allclose(red, 1, atol=0.1)  # JPEG
    assert picture[..., 0].mean() < 0.2


@pytest.mark.parametrize("ending", ["jfif", "jpe", "avif", "tga", "jp2", "dib", "pbm", "qoi", "apng", "JPG"])
def test_pictures_by_other_endings(tmp_path, ending):
    formats = {"jfif": "JPEG", "jpe": "JPEG", "jpg": "JPEG", "avif": "AVIF", "apng": "PNG"}
    mode = "1" if ending == "pbm" else "RGB"
    try:
        Image.new(mode, (8, 8), "white").save(tmp_path / f"a.{ending}", format=formats.get(ending.lower()))
    except (OSError, KeyError, ValueError) as error:
        pytest.skip(f"this Pillow writes no {ending}: {error}")
    (picture,) = next(open_pictures(tmp_path).batches(4, 4))
    np.testing.assert_allclose(picture, 1, atol=0.05)


def test_what_is_left_out_is_named(folder):
    for name in ("b.md", "c.md", "Thumbs.db", ".hidden.png", "Makefile"):
        (folder / name).write_bytes(b"x")
    (folder / "within").mkdir()
    assert open_pictures(folder).skipped == (
        "Makefile: neither picture nor caption",
        "Thumbs.db: neither picture nor caption",
        "b.md and 1 more: neither picture nor caption",
        "within: a folder; the pictures in folders within are not read",
    )


# --- what is refused ---


def test_pictures_that_cannot_be_read_say_why(folder):
    (folder / "d.png").symlink_to(folder / "moved away.png")
    (folder / "e.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "f.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    lines = ("3 of 6", "d.png: a link to a file that is not there", "e.heic: Pillow reads no .heic; save it as .png")
    refused(folder, *lines, "f.png: a Git LFS pointer")
    assert len(open_pictures(folder, skip=True).paths) == 3


def test_captions_that_cannot_be_read(folder):
    (folder / "a.txt").write_bytes("caf\u00e9".encode("cp1252"))
    (folder / "b.txt").write_bytes(b"\xff\xfea")
    (folder / "c.txt").write_text("one")
    (folder / "c.caption").write_text("two")
    lines = ("a.txt is not UTF-8 text (byte 3 is 0xe9); save it as UTF-8", "b.txt is not UTF-16 text")
    refused(folder, *lines, "c.txt: another caption than that of a file of the same name")
    for name in ("metadata.jsonl", "metadata.csv"):
        (folder / name).write_text("")
    refused(folder, "metadata.jsonl and metadata.csv are two tables of captions; leave one")


def test_table_that_does_not_fit(folder):
    (folder / "metadata.csv").write_text("file_name,text\na.jpg,x\nno.png,y\nb.png\n")
    refused(
        folder,
        "metadata.csv, line 3: a caption without its picture no.png",
        'metadata.csv, line 4: not a row of columns "file_name" and "text"',
    )


def refused(folder, *texts, error=PictureError, **how):
    with pytest.raises(error) as info:
        open_pictures(folder, **how)
    for text in texts:
        assert text in str(info.value)


def test_no_folder_no_pictures(tmp_path):
    refused(tmp_path / "no", "no: no such folder of pictures", error=FileNotFoundError)
    (tmp_path / "notes.md").write_text("no picture")
    refused(tmp_path, "no pictures; looked for *.png, *.jpg", error=FileNotFoundError)


def test_every_unreadable_picture_is_named(folder):
    (folder / "d.png").write_bytes(b"not a picture")
    whole = folder.joinpath("b.png").read_bytes()
    (folder / "e.png").write_bytes(whole[: len(whole) // 2])
    (folder / "f.png").write_bytes(b"")
    save(folder / "tiny.png", np.zeros((1, 1, 3)))
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    lines = (
        "5 of 8 pictures or captions: mend or remove them, or skip them (--unreadable skip)",
        "d.png: not readable as a picture",
        "e.png: not readable as a picture",
        "f.png: not readable as a picture",
        "moving.gif: it has 2 frames; save the one that is meant",
        "tiny.png: it has 1 × 1 pixels; the shorter side needs 8",
    )
    refused(folder, *lines, smallest=8)
    found = open_pictures(folder, smallest=8, skip=True)
    assert [path.name for path in found.paths] == ["a.jpg", "b.png", "c.PNG"]
    assert len(found.skipped) == 5


def test_captions_without_pictures_and_the_reverse(folder):
    (folder / "a.txt").write_text("a cat")
    (folder / "z.txt").write_text("a dog")
    refused(
        folder,
        "3 of 3 pictures or captions",
        "b.png: it has no caption and others have",
        "z.txt: a caption without a picture",
    )
    assert open_pictures(folder, skip=True).captions == ("a cat",)
    refused(folder, "mend or remove them, or skip them (--unreadable skip), or use no captions (--captions ignore)")
    found = open_pictures(folder, captions=False)
    assert [path.name for path in found.paths] == ["a.jpg", "b.png", "c.PNG"]
    assert found.captions is None
    assert not found.skipped


def test_a_later_look_at_sizes(folder):
    """As if `smallest` had been given at once; captions stay with their pictures."""
    save(folder / "b.png", np.zeros((6, 20, 3)))
    for name in "abc":
        (folder / f"{name}.txt").write_text(f"of {name}")
    first = open_pictures(folder)
    assert len(first.at_least(6).paths) == 3
    later = first.at_least(7, skip=True)
    assert later == open_pictures(folder, smallest=7, skip=True)
    assert later.captions == ("of a", "of c")
    with pytest.raises(PictureError, match=r"b\.png: it has 20 × 6 pixels; the shorter side needs 7"):
        first.at_least(7)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"file_name": "no.png", "text": "a"}', "metadata.jsonl, line 1: a caption without its picture no.png"),
        ("{", 'metadata.jsonl, line 1: not a JSON object with "file_name" and "text"'),
        ("[1]", 'metadata.jsonl, line 1: not a JSON object with "file_name" and "text"'),
        ('{"file_name": "a.jpg"}', 'metadata.jsonl, line 1: not a JSON object with "file_name" and "text"'),
    ],
)
def test_metadata_that_does_not_fit(folder, line, text):
    (folder / "metadata.jsonl").write_text(line + "\n")
    refused(folder, text)


def test_nothing_is_left(tmp_path):
    save(tmp_path / "a.png", np.zeros((1, 1, 3)))
    refused(tmp_path, "none is left", skip=True)
