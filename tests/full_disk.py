"""A disk that takes no more, as a fixture: the kernel refuses to let files grow beyond a size."""

import resource
import signal
from collections.abc import Callable, Iterator

import pytest

SIZE = 1 << 16


@pytest.fixture(name="small_files")
def files_that_stay_small() -> Iterator[Callable[[], None]]:
  """Once it is called, no file can grow beyond SIZE."""
  before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  limit = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  yield lambda: limit(SIZE)
  limit(before[0])
  signal.signal(signal.SIGXFSZ, handler)
