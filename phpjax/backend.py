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


def jit(function: Callable[..., Any], compile_effort: int, **options: Any) -> Any:
  """`jax.jit` at an optimisation level of LLVM, 0 (compiles fastest) to 3 (runs fastest).

  The level is passed on CPU only, and only when it is not the default: other backends do not know the option.
  """
  lower = compile_effort < 3 and jax.default_backend() == "cpu"
  return jax.jit(function, compiler_options={"xla_backend_optimization_level": compile_effort} if lower else None, **options)
