"""Files written over what is there: equal bytes stay, the rest is replaced, the end is what was written."""

from __future__ import annotations

import hashlib
import os
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semi_fast.prepared.hashed_file import HashedFile


def write(path: Path, pieces: list[bytes]) -> int:
    """The number of bytes that stayed."""
    with closing(HashedFile(path)) as file:
        for piece in pieces:
            file.write(piece)
        entry = file.finish()
        content = b"".join(pieces)
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert path.read_bytes() == content
        return file.kept_bytes


PIECES = st.lists(st.binary(max_size=9), max_size=5)


@given(PIECES, st.binary(max_size=40))
def test_whatever_was_there_it_holds_what_is_written(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes], there: bytes
) -> None:
    path = tmp_path_factory.mktemp("file") / "a"
    path.write_bytes(there)
    kept = write(path, pieces)
    assert b"".join(pieces)[:kept] == there[:kept]


@pytest.mark.parametrize(
    ("there", "kept"),
    [(b"", 0), (b"abc", 3), (b"abcd", 3), (b"abcdef", 6), (b"abcdefxyz", 6), (b"abcdeX", 3), (b"Xbcdef", 0)],
)
def test_equal_pieces_at_the_beginning_stay(tmp_path: Path, there: bytes, kept: int) -> None:
    (tmp_path / "a").write_bytes(there)
    assert write(tmp_path / "a", [b"abc", b"def"]) == kept


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_bytes(b"theirs")
    (tmp_path / "a").symlink_to(tmp_path / "theirs")
    with pytest.raises(OSError, match="symbolic links"):
        HashedFile(tmp_path / "a")
    assert (tmp_path / "theirs").read_bytes() == b"theirs"


def test_nothing_is_written_where_everything_stands(tmp_path: Path) -> None:
    write(tmp_path / "a", [b"abc", b"def"])
    os.utime(tmp_path / "a", ns=(1, 1))
    with closing(HashedFile(tmp_path / "a")) as file:
        file.write(b"abcdef")
        file.file.flush()
        assert (tmp_path / "a").stat().st_mtime_ns == 1
