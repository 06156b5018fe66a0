"""Exit codes: what each kind of failure ends with."""

from __future__ import annotations

import pytest

from semi_fast.errors import NonFiniteError, PreemptedError, exit_code, one_line


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("x"), 2),
        (RuntimeError("x"), 3),
        (OSError("x"), 3),
        (NonFiniteError(3, [1]), 4),
        (KeyboardInterrupt(), 130),
        (PreemptedError("SIGTERM"), 75),
        (AssertionError("x"), 1),
    ],
)
def test_codes(error: BaseException, code: int) -> None:
    assert exit_code(error) == code


def test_a_message_is_one_line() -> None:
    assert one_line(ValueError("a\n  b")) == "semi-fast: a b"
    assert one_line(KeyboardInterrupt()) == "semi-fast: interrupted"
