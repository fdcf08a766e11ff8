"""Files that appear at once and whole, and are still there after a power cut."""

from __future__ import annotations

import errno
import os
import pathlib


def write_whole(path: pathlib.Path, text: str) -> None:
  """Writes next to the target and renames, so that a reader never sees half a file; a write that fails leaves nothing."""
  temporary = path.with_name(path.name + ".tmp")
  try:
    with open(temporary, "w", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())  # else a power cut may keep the name and lose what it should hold
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
  sync_folder(path.parent)


def sync_folder(folder: pathlib.Path) -> None:
  """Until the names in a folder are on the disk, where the file system can tell (some networked ones cannot)."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError as error:
    if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
      raise
  finally:
    os.close(descriptor)
