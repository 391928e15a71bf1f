"""The error that a user can mend: shown as its message alone, once, without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """A setting, file or machine that does not fit. The text says name=value, the rule, and the likely mend."""
