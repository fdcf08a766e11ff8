"""What the commands share: reading flags, and errors as one line instead of a traceback."""

from __future__ import annotations

import logging
import os
import pathlib
import select
import sys
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from phpjax.errors import UserError

EXIT_USER = 2
EXIT_PIPE = 128 + 13  # as a shell reports a program that SIGPIPE has ended
HELP = ("--help", "-help", "--helpshort", "-h")


def parse_flags(argv: list[str], doc: str, values: flags.FlagValues = flags.FLAGS) -> list[str]:
  """Parses `argv` into `values` -> what is no flag, the program's name first.

  `--help` prints `doc` and the flags and exits 0.

  Raises:
    UserError: an unknown flag (with "did you mean"), a bad value, or a config that cannot be read.
  """
  if any(word in HELP for word in argv[1:]):
    own = values.main_module_help() if values is flags.FLAGS else values.get_help(include_special_flags=False)
    print(f"{doc.strip()}\n\n{own}")
    sys.exit(0)
  if (root := str(pathlib.Path(__file__).resolve().parents[1])) not in sys.path:
    sys.path.append(root)  # configs import their neighbours, from any folder
  try:
    return values(argv)
  except Exception as error:  # the user's config file is code and may fail in any way
    raise UserError(f"bad arguments: {gist(error)}; see --help") from error


def gist(error: Exception) -> str:
  """The message without a traceback that was pasted into it and without the quotes that KeyError adds; never empty."""
  lines = str(error.args[0] if error.args else error).strip().splitlines() or [type(error).__name__]
  lines = [line.removeprefix("ValueError: ") for line in lines]
  return lines[-1] if any(line.startswith("Traceback") for line in lines) or "Traceback" in lines[0] else " ".join(lines)


def guarded(function: Callable[[], Any], exits: Mapping[type[Exception], int] | None = None) -> int:
  """Runs a command -> its exit code: 0, 2 after one line on stderr for what the user can mend, or that of `exits`.

  Nothing is said, and the code is that of a program which SIGPIPE ends, where its output is no longer read.
  """
  exits = dict(exits or {})
  _one_line_only()
  try:
    function()
    sys.stdout.flush()
  except UserError as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return EXIT_USER
  except BrokenPipeError:
    if not _unread():
      raise  # of another pipe
    return EXIT_PIPE
  except tuple(exits) as error:
    return next(code for kind, code in exits.items() if isinstance(error, kind))
  return 0


def _unread() -> bool:
  """Whether nobody reads our output any more, as in `... --list | head`; what is left of it is dropped then."""
  poll = select.poll()
  poll.register(1, 0)
  if gone := any(event & select.POLLERR for _, event in poll.poll(0)):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python writes the rest when it ends
  return gone


def _one_line_only() -> None:
  """Silences what libraries print of a failure that they raise too: orbax its stacks, tensorstore's threads theirs after it."""
  for name in ("absl", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  shown = sys.unraisablehook

  def hook(found: sys.UnraisableHookArgs) -> None:
    if "Event loop is closed" not in str(found.exc_value):
      shown(found)

  sys.unraisablehook = hook


def open_config(holder: Any) -> ConfigDict:
  """The config of a --config flag; raises UserError when its file cannot be read (the flag fails only when it is used)."""
  try:
    return ConfigDict(holder.value.to_dict()).lock()
  except Exception as error:  # as in `parse_flags`
    raise UserError(f"cannot read the config file of --config ({gist(error)})") from error


def use_compile_cache() -> None:
  """Keeps compiled programs for the next command, unless the environment names another place."""
  import jax  # not at the top: `--help` and wrong arguments do not wait for it

  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/phpjax/jax"))
