"""A checkpoint goes from one number of devices to another: the same bits at restore, the same training after it.

`PHPJAX_STEPS=200 pytest -m slow tests/test_topology.py -rP` trains longer in float32 too and prints how far runs move apart.

In float64 two runs that began 1e-15 apart are 3e-9 apart after 200 steps at PHP's rate, 3e-4. At the toybox's, 2e-3, training
the tiny network on its four clips is chaotic: the gap grows by half with every step (1e-13 after 20, 3e-11 after 30, 3e-7
after 50), so that float64 does not keep 200 of them together.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from command import ROOT, tiny_toybox  # noqa: F401  fixture

pytestmark = pytest.mark.slow
MOVES = ((8, 1), (1, 8), (8, 2))
STEPS = int(os.environ.get("PHPJAX_STEPS", "30"))  # in float32; always DOUBLE_STEPS in float64
DOUBLE_STEPS = 200
TOYBOX_RATE, PHP_RATE = 2e-3, 3e-4


def process(devices: int, **job: object) -> dict[str, np.ndarray]:
  """What tests/topology.py finds with this many devices."""
  flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
  count = f"--xla_force_host_platform_device_count={devices}"
  environment = {**os.environ, "XLA_FLAGS": " ".join([*flags, count]), "PYTHONPATH": str(ROOT)}
  command = [sys.executable, str(ROOT / "tests" / "topology.py"), json.dumps(job)]
  done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  found = dict(np.load(job["out"]))
  assert found.pop("devices") == devices
  return found


def group(found: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
  """The arrays below a name, by the rest of theirs."""
  return {key.removeprefix(f"{name}/"): value for key, value in found.items() if key.startswith(f"{name}/")}


def distance(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> float:
  """Length of the difference of all arrays together over the length of `one`."""
  assert one.keys() == two.keys() and one
  gap = sum(np.square(one[key].astype(np.float64) - two[key]).sum() for key in one)
  return float(np.sqrt(gap / sum(np.square(value, dtype=np.float64).sum() for value in one.values())))


@pytest.fixture(scope="module")
def moved(toybox, tmp_path_factory):
  """(devices before, devices after, double) -> what a run has that goes on as it was, and what one has that was moved."""
  base, made = tmp_path_factory.mktemp("moved"), {}

  def job(folder: pathlib.Path, double: bool) -> dict[str, object]:
    how = {"steps": DOUBLE_STEPS, "lr": PHP_RATE} if double else {"steps": STEPS, "lr": TOYBOX_RATE}
    return {"data": str(toybox), "folder": str(folder), "out": f"{folder}.npz", "double": double, **how}

  def there(devices: int, double: bool) -> tuple[pathlib.Path, dict[str, np.ndarray]]:
    folder = base / f"{devices}{'x' * double}"
    if folder not in made:
      made[folder] = process(devices, **job(folder, double))
    return folder, made[folder]

  def go(before: int, after: int, double: bool) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    folder, stayed = there(before, double)
    copy = base / f"{folder.name}to{after}"
    shutil.copytree(folder, copy)
    return stayed, process(after, **job(copy, double))

  return go


@pytest.mark.parametrize(("before", "after"), MOVES)
def test_what_is_restored_has_the_same_bits_and_the_same_gradient(moved, before, after):
  stayed, went = moved(before, after, False)
  for name in ("params", "opt_state"):
    one, two = group(stayed, name), group(went, name)
    assert one.keys() == two.keys() and all(one[key].tobytes() == two[key].tobytes() for key in one)
  gap = distance(group(stayed, "gradient"), group(went, "gradient"))
  drift = distance(group(stayed, "trained"), group(went, "trained"))
  print(f"{before} to {after} devices, float32: gradient {gap:.1e}, parameters after {STEPS} steps {drift:.1e}")
  assert gap <= 1e-5


@pytest.mark.parametrize(("before", "after"), MOVES)
def test_in_double_precision_training_is_the_same(moved, before, after):
  stayed, went = moved(before, after, True)
  assert {x.dtype for x in group(stayed, "trained").values()} == {np.dtype("float64")}
  assert distance(group(stayed, "params"), group(stayed, "trained")) > 1e-3, "there was something to learn"
  drift = distance(group(stayed, "trained"), group(went, "trained"))
  print(f"{before} to {after} devices, float64: parameters after {DOUBLE_STEPS} steps {drift:.1e}")
  assert drift <= 1e-6
