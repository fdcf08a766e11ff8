"""`--config.x=...` with odd values: either a config that can run, or one line that says what is wrong."""

import functools
import json
import sys
from unittest import mock

import pytest
from absl import flags
from fuzzing import counts, one_line, run_cases
from hypothesis import strategies as st
from ml_collections import config_flags

from configs import php_avqa
from phpjax import checks, cli, compat, workdir
from phpjax.errors import UserError

FILES = ("configs/php_avqa.py:tiny", "configs/linear_probe.py:tiny")
VALUES = (
  *(
    "",
    "0",
    "1",
    "-1",
    "3",
    "1.5",
    "-0.1",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "1e-400",
    "True",
    "None",
    "x",
    "'x'",
    "paper",
    "released",
  ),
  *(
    "99999999999",
    "99999999999999999999999",
    "(1,)",
    "(1, 2)",
    "('ave',)",
    "('ave', 'ave')",
    "()",
    "(",
    "[1]",
    "{}",
    "((1,), 2)",
  ),
  *(
    "(-1,)",
    "(nan,)",
    "(99999999999,)",
    "('',)",
    "(None,)",
    "\ud800",
    "\u202e",
    "a\nb",
    "a" * 5000,
    "9" * 5000,
    "(" * 300,
    "../../x",
  ),
  *("/etc/passwd", "__import__('os').system('true')", "lambda: 1", "%s", "@", "--", "0x10", "1_0", "1,2", "random", "shipped"),
)


@functools.cache
def fields() -> tuple[str, ...]:
  """Every field of the config, and some that it has not."""
  flat = workdir.flatten(workdir.plain(php_avqa.get_config("tiny")))
  return (*flat, "opt", "method", "nothing", "opt.nothing", "tasks.0", "method.name.x", "")


def outcome(argv: list[str]) -> str:
  """The words of a UserError or all problems; "" for a config with which a run can start."""
  values = flags.FlagValues()
  holder = config_flags.DEFINE_config_file("config", None, "", values, lock_config=True)
  try:
    with mock.patch.object(sys, "argv", ["main", *argv]):  # where ml_collections looks for the fields
      cli.parse_flags(sys.argv, "", values)
    config = compat.resolve(cli.open_config(holder))
  except UserError as error:
    return " ".join(str(error).split())  # as `cli.guarded` prints it
  if found := checks.problems(config):
    return "; ".join(found)
  json.dumps(workdir.plain(config), allow_nan=False)  # what `workdir.claim` writes
  return ""


@counts(60, 4000)
@pytest.mark.parametrize("file", FILES)
def test_odd_values_are_taken_or_refused_in_one_line(file, count):
  seen = set()

  def check(data):
    names = data.draw(st.lists(st.sampled_from(fields()), min_size=1, max_size=2))
    text = st.one_of(st.sampled_from(VALUES), st.text(max_size=8))
    found = outcome([f"--config={file}", *(f"--config.{name}={data.draw(text)}" for name in names)])
    seen.add(bool(found))
    if found:
      one_line(found)

  run_cases(count, check)
  assert seen == {True, False}


FOUND = {
  "opt={}": "opt.",
  "opt.b1=nan": "opt.b1=nan must be a finite number",
  "opt.eps=inf": "opt.eps=inf must be a finite number",
  "opt.b2=1": "opt.b2=1.0 must be at least 0 and below 1",
  "opt.head.lr=-1": "opt.head.lr=-1.0 must be at least 0",
  "data.cache_gb=nan": "data.cache_gb=nan must be a finite number",
  "tasks=(1,)": "tasks=(1,) must list names",
  "data.mirrored=(None,)": "data.mirrored=(None,) must list names",
  "mesh=(None,)": "mesh=(None,) must list whole numbers",
  f"encoders.visual.weights={'a' * 5000}": "must be printable text",
  "data.root=a\nb": "must be printable text",
  "batch_size=99999999999": "batch_size=99999999999 must be between",
  "method.groups=-1": "groups=-1 must be 1 or more",
  "method.deep_length=99999999999": "method.deep_length=99999999999 must be between",
  "method={}": "method.name must be a text",
  "encoders.visual={}": "encoders.visual must be a group",
}


@pytest.mark.parametrize("argument", FOUND)
def test_what_was_found_stays_mended(argument):
  assert FOUND[argument] in one_line(outcome([f"--config={FILES[0]}", f"--config.{argument}"]))
