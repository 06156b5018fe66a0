"""What is printed, where nobody reads it, the disk behind it is full, or it cannot show every character."""

from __future__ import annotations

import errno
import io
import json
import os
import pty
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from semi_fast.cli import main
from semi_fast.screen import check_taken, tolerate_closed_pipes, without_reader

from .reliability.test_checkpoint_faults import largest_file
from .synthetic_data import write_prepared
from .tiny import ARGUMENTS

FULL = Path("/dev/full")
Printing = Callable[..., None]


@pytest.fixture
def unread() -> Iterator[int]:
    """The descriptor of a pipe that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.fixture
def printing(monkeypatch: pytest.MonkeyPatch) -> Printing:
    """Has `print` write to a descriptor or file, which outlives its stream."""

    def begun(to: int | Path, encoding: str = "utf-8", name: str = "stdout") -> None:
        descriptor = io.FileIO(to, "w", closefd=isinstance(to, Path))
        stream = io.TextIOWrapper(io.BufferedWriter(descriptor), encoding=encoding)
        monkeypatch.setattr(sys, name, stream)

    return begun


def train(data: Path, run_dir: Path, *flags: str) -> int:
    return main(["train", *ARGUMENTS, f"--data.path={data}", f"--run_dir={run_dir}", *flags])


def finished(run_dir: Path) -> bool:
    status = json.loads((run_dir / "status.json").read_text())
    return status == {"exit_code": 0, "message": "finished"} and (run_dir / "summary.json").exists()


@pytest.mark.parametrize("reader", ["closed", "full disk"])
def test_a_run_goes_on_without_a_screen(
    reader: str, unread: int, digits: Path, tmp_path: Path, printing: Printing
) -> None:
    """Both streams: `train 2>&1 | head`, and a log on a disk that is full."""
    for name in ("stdout", "stderr"):
        printing(unread if reader == "closed" else FULL, name=name)
    assert train(digits, tmp_path / "run", "--log.every=1") == 0
    assert finished(tmp_path / "run")


def test_a_terminal_of_another_encoding_shows_the_progress(
    digits: Path, tmp_path: Path, printing: Printing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On 80 columns, which cut the line with a character that latin-1 lacks."""
    ours, theirs = pty.openpty()
    seen = bytearray()

    def read() -> None:
        while b"report: " not in seen:
            seen.extend(os.read(ours, 4096))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    printing(theirs, "latin-1")
    assert train(digits, tmp_path / "run", "--log.every=1") == 0
    reader.join(60)
    assert b"12/12" in seen
    assert finished(tmp_path / "run")
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_cannot_be_shown_is_replaced(encoding: str, tmp_path: Path, printing: Printing) -> None:
    names = ["größe", "日本", "plain"]
    write_prepared(tmp_path / "data", (2,) * 3, (1,) * 3, class_names=names)
    shown = tmp_path / "shown"
    printing(shown, encoding)
    assert main(["inspect", str(tmp_path / "data")]) == 0
    words = [line.split()[0] for line in shown.read_text(encoding=encoding).splitlines()[3:]]
    assert words == [name.encode(encoding, "replace").decode(encoding) for name in names]


def test_a_result_that_a_full_disk_refuses_is_told(
    digits: Path, printing: Printing, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not so a reader who has enough."""
    printing(FULL)
    assert main(["inspect", str(digits)]) == 3
    assert capsys.readouterr().err == (
        "semi-fast: standard output could not be written: No space left on device; what it lacks is lost\n"
    )


def test_a_reader_who_has_enough_is_no_error(
    digits: Path, unread: int, printing: Printing, capsys: pytest.CaptureFixture[str]
) -> None:
    printing(unread)
    assert main(["inspect", str(digits)]) == 0
    assert capsys.readouterr().err == ""


def test_a_log_goes_on_once_there_is_room(tmp_path: Path, printing: Printing) -> None:
    """What is refused meanwhile is lost; the system writes what fits."""
    printing(tmp_path / "log")
    with tolerate_closed_pipes():
        print("before", flush=True)
        with largest_file(10):
            print("meanwhile", flush=True)
        print("after", flush=True)
        with pytest.raises(RuntimeError, match="standard output could not be written: File too large"):
            check_taken()
    assert (tmp_path / "log").read_text() == "before\nmeaafter\n"


def test_an_error_of_a_disk_is_none_of_a_terminal(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    os.close(ours)
    with pytest.raises(OSError, match="Input/output error") as caught:
        os.write(theirs, b"x")
    with (tmp_path / "log").open("w") as file:
        assert [without_reader(caught.value, number) for number in (theirs, file.fileno())] == [True, False]
    os.close(theirs)


def test_a_pipe_that_does_not_block_gets_everything(printing: Printing) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    printing(writing)
    text, seen = "x" * 2**18, bytearray()

    def read() -> None:
        while len(seen) < len(text):
            seen.extend(os.read(reading, 2**14))

    reader = threading.Thread(target=read, daemon=True)
    with tolerate_closed_pipes():
        threading.Timer(0.05, reader.start).start()  # the pipe is full by then, or not: both must do
        print(text, end="")
    reader.join(60)
    assert seen.decode() == text
    os.close(reading)
    os.close(writing)


def test_streams_that_are_closed_lead_nowhere_and_others_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """`>&-`: what is opened next must not take their numbers, nor their text."""
    kept = os.dup(1)
    try:
        monkeypatch.setattr(sys, "stdout", None)
        os.close(1)
        before = sys.stderr
        with tolerate_closed_pipes():
            print("nowhere")
            assert not sys.stdout.isatty()
            assert os.path.samestat(os.fstat(1), os.stat(os.devnull))
        assert (sys.stdout, sys.stderr) == (None, before)
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def test_another_error_of_the_pipe_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A broken pipe of a process that has died is none of a reader who has enough."""

    def broken(argv: list[str]) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("semi_fast.cli.run_command", broken)
    assert main(["inspect", "data"]) == 3
    assert "Broken pipe" in capsys.readouterr().err
