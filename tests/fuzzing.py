"""How the fuzz tests draw: bytes mutated at random places, JSON values of other kinds, and few or many cases of it."""

import contextlib
import json
import os
import pathlib
import resource
import signal
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

SHARE = float(os.environ.get("PHPJAX_FUZZ", "0.1"))  # PHPJAX_FUZZ=1 runs all cases: 25 minutes
TIMEOUT_S = 120  # of one case: what takes longer hangs

# What stands in published files where it counts: separators, quotes, line ends, names that lead elsewhere, and no UTF-8.
TOKENS = (
  *(
    b"&",
    b"\t",
    b",",
    b"\n",
    b"\r\n",
    b'"',
    b"'",
    b"[",
    b"]",
    b"{",
    b"}",
    b"\\",
    b"/",
    b"../",
    b"/etc/passwd",
    b"\x00",
    b"\xff",
  ),
  *(b"-1", b"99999999999999999999", b"1e999", b"NaN", b"null", b"true", b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"%s", b"[" * 3000),
  *(b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"a" * 300),
)
# Values of JSON that fit nowhere in particular.
ODD = st.sampled_from(
  (
    None,
    True,
    -1,
    0,
    10**25,
    1.5,
    float("inf"),
    float("nan"),
    "",
    "x",
    "../x",
    "/etc/passwd",
    "a/b",
    "\ud800",
    [],
    {},
    [[]],
    {"a": 1},
  )
)


def run_cases(count: int, check: Callable[[st.DataObject], None]) -> None:
  """Calls `check` with `count` draws, the same ones every time, each within TIMEOUT_S."""
  quiet = [getattr(hypothesis.HealthCheck, name) for name in ("too_slow", "data_too_large", "large_base_example")]

  # The case that fails is shown as it was drawn: to look for a smaller one can take minutes.
  phases = [hypothesis.Phase.generate]

  @hypothesis.settings(
    max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=quiet, phases=phases
  )
  @hypothesis.given(st.data())
  def cases(data: st.DataObject) -> None:
    with in_time():
      check(data)

  cases()


@contextlib.contextmanager
def in_time() -> Iterator[None]:
  """Fails what hangs in Python; a hang in C ends with the test's process, which is as visible."""

  def late(number: int, frame: Any) -> None:
    raise AssertionError(f"took longer than {TIMEOUT_S} s")

  before = signal.signal(signal.SIGALRM, late)
  signal.alarm(TIMEOUT_S)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def counts(few: int, many: int) -> pytest.MarkDecorator:
  """The parameter `count`: `few` cases by default; `many` times SHARE under the marker `slow`."""
  return pytest.mark.parametrize("count", [few, pytest.param(max(few, int(many * SHARE)), marks=pytest.mark.slow)])


def mutated(data: st.DataObject, content: bytes) -> bytes:
  """The bytes with one to four places overwritten, cut out, doubled or filled with what counts in files; sometimes cut off."""
  made = bytearray(content)
  for _ in range(data.draw(st.integers(1, 4))):
    # Headers stand at both ends of files, and that is where damage does most.
    near = st.integers(0, min(len(made), 200))
    end = len(made)
    place = data.draw(st.one_of(near, near.map(end.__sub__), st.integers(0, end)))
    length = data.draw(st.sampled_from((0, 1, 2, 4, 8, 30, 300)))
    new = data.draw(
      st.one_of(st.binary(min_size=1, max_size=4), st.sampled_from(TOKENS), st.just(bytes(made[place : place + 40])))
    )
    made[place : place + length] = new
  if not data.draw(st.integers(0, 9)):
    del made[data.draw(st.integers(0, len(made))) :]
  return bytes(made)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
  """The path of every value inside a JSON value, itself first."""
  yield path
  inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
  for key, part in inner:
    yield from places(part, (*path, key))


def mutated_json(data: st.DataObject, content: bytes) -> bytes:
  """A JSON file of which one or two values were replaced, dropped or renamed; or, one time in three, mutated as bytes."""
  if not data.draw(st.integers(0, 2)):
    return mutated(data, content)
  value = json.loads(content)
  for _ in range(data.draw(st.integers(1, 2))):
    *above, last = data.draw(st.sampled_from(list(places(value)))) or (None,)
    if last is None:
      return json.dumps(data.draw(ODD)).encode()
    holder = value
    for key in above:
      holder = holder[key]
    odd = data.draw(st.sampled_from(("replace", "drop", "rename")))
    if odd == "replace":
      holder[last] = data.draw(ODD)
    elif odd == "drop" or isinstance(holder, list):
      del holder[last]
    else:
      holder[data.draw(st.sampled_from(("x", "../x", "")))] = holder.pop(last)
  return json.dumps(value).encode()


@contextlib.contextmanager
def writing_only(folder: pathlib.Path, watched: pathlib.Path) -> Iterator[None]:
  """Fails if a file below `watched` but outside `folder` is made, removed or changed."""

  def seen() -> dict[str, tuple[int, int]]:
    found = (path for path in watched.rglob("*") if path.is_file() and not path.is_relative_to(folder))
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in found}

  before = seen()
  yield
  assert seen() == before


def peak_bytes() -> int:
  """Largest resident size of this process so far."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one_line(text: str) -> str:
  """The message, which must be one line of a bearable length."""
  assert text and "\n" not in text and "\r" not in text and len(text) < 20_000, text
  return text
