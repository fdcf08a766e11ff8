"""What the decoding processes of the loader and of `prepare` have in common."""

import multiprocessing
import multiprocessing.connection
import os
import threading


def end_with_parent() -> None:
  """Ends this process when its parent is gone: one that was killed cannot end its workers, and no later run may meet them."""
  parent = multiprocessing.parent_process()
  if parent is not None:
    threading.Thread(target=_wait_and_end, args=(parent.sentinel,), daemon=True).start()


def _wait_and_end(sentinel: int) -> None:
  multiprocessing.connection.wait([sentinel])
  os._exit(1)
