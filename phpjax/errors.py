"""What the user can mend: one clear line on stderr and exit code 2, never a traceback."""

from __future__ import annotations

import contextlib
import errno
import pathlib
from collections.abc import Iterator

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
  """Says what is wrong, where, and how to mend it, in one line."""


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
  """For the lines that write a file or make a folder: raises UserError when that fails, as on a full disk."""
  try:
    yield
  except OSError as error:
    advice = "free some space" if error.errno in NO_SPACE else "make that possible"
    reason = error.strerror or str(error) or type(error).__name__
    raise UserError(f"cannot write {path}: {reason}; {advice} and run the same command again") from error
