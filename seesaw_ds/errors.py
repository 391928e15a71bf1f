"""The error that a user can mend: shown as its message alone, once, without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(ValueError):
    """A setting, file or machine that does not fit. The text says name=value, the rule, and the likely mend."""


def exit_with(main: Callable[[], int]) -> NoReturn:
    """End the process of a tool with what `main` returns; with 2, and one line, when the user has something to mend."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
