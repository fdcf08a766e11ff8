"""Settings that must stand before a test imports jax: CPU, two devices, few threads, a compile cache."""

import os
import pathlib

from absl import flags

ROOT = pathlib.Path(__file__).resolve().parents[1]
NUM_DEVICES = 2  # enough for every sharding rule; each further device makes every compile dearer


def _environment() -> None:
  """Sets what tests, xdist workers and child processes inherit; the caller's own settings win."""
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  xla_flags = os.environ.get("XLA_FLAGS", "")
  if "xla_force_host_platform_device_count" not in xla_flags:
    # Both settings together cut what the many small compiles of the tests cost to less than half.
    added = f"--xla_force_host_platform_device_count={NUM_DEVICES} --xla_backend_optimization_level=0"
    added = f"{added} --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{xla_flags} {added}".strip()
  cache = pathlib.Path(os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax")))
  cache.mkdir(parents=True, exist_ok=True)
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
  os.environ.setdefault("MPLBACKEND", "Agg")
  os.environ.setdefault("HF_HUB_OFFLINE", "1")
  # One thread per library: xdist already runs one process per core. NPROC is read by XLA's CPU client.
  for name in ("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(name, "1")


_environment()
if not flags.FLAGS.is_parsed():  # grain and the configs read absl flags, here outside of app.run
  flags.FLAGS.mark_as_parsed()

from fabricated import layout_roots  # noqa: E402, F401  a fixture for all tests
from tiny_run import tiny_run  # noqa: E402, F401  likewise
