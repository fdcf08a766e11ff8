"""What depends on the kind of device: precision of frozen weights, compiler options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

ENCODER_DTYPES = ("auto", "float32", "bfloat16")


def encoder_dtype(name: str) -> Any:
  """Of frozen weights: "auto" is bfloat16 on accelerators and float32 on CPU."""
  if name == "auto":
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  return {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[name]


def jit(function: Callable[..., Any], compile_effort: int, *, save_memory: bool = False, **options: Any) -> Any:
  """`jax.jit` that compiles faster and runs slower, or the other way round: `compile_effort` 0 to 3.

  The effort is LLVM's optimisation level; 0 also leaves out XLA's fusion emitters, which cost small programs more to compile
  than they save. `save_memory` orders operations so that little is alive at once; by default XLA's CPU compiler looks for what
  can run side by side, and computes early what rematerialisation wants late (full-size PHP, one clip of AVE: 5.5 instead of 2.0
  GB beside the parameters). All are passed on CPU only, and only where they are not the default: others do not know them.
  """
  chosen: dict[str, Any] = {}
  if compile_effort < 3 and jax.default_backend() == "cpu":
    chosen["xla_backend_optimization_level"] = compile_effort
    if compile_effort == 0:
      chosen["xla_cpu_use_fusion_emitters"] = False
  if save_memory and jax.default_backend() == "cpu":
    chosen["xla_cpu_scheduler_type"] = "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
  return jax.jit(function, compiler_options=chosen or None, **options)
