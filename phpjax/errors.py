"""What the user can mend: one clear line on stderr and exit code 2, never a traceback."""

from __future__ import annotations


class UserError(Exception):
  """Says what is wrong, where, and how to mend it, in one line."""
