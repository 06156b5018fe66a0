"""The doctor says what is there, what is missing and the command that mends it."""

from __future__ import annotations

import pytest

from semi_fast.cli import main
from semi_fast.commands import doctor


def test_what_is_there_is_ok(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("semi_fast ")
    for name in doctor.PACKAGES:
        assert any(line.split()[:2] == ["ok", name] for line in lines)


def test_what_is_missing_comes_with_its_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(module: str) -> object:
        raise ImportError(f"No module named {module!r}")

    monkeypatch.setattr(doctor.importlib, "import_module", absent)
    monkeypatch.setattr(doctor, "version", lambda name: "1.0")
    doctor.run()
    out = capsys.readouterr().out
    for name, wrong, command in (
        ("FFCV", "No module named 'ffcv.loader'", "libturbojpeg0-dev libopencv-dev pkg-config g++ && pip install"),
        ("DALI", "No module named 'nvidia.dali'", "pip install 'semi-fast[dali]'"),
    ):
        at = out.index(f"missing  {name}")
        assert wrong in out[at:]
        assert command in out[at:]
