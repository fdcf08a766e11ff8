"""Sequential fine-tuning: PHP's modules as one set that every task trains on, nothing kept."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from phpjax.methods.base import Tree
from phpjax.methods.php import PHP


@dataclasses.dataclass(frozen=True)
class FineTune(PHP):
  """What PHP would be without task-specific parts: the same adapters, generators, prompts and text classifier, all shared.

  Only heads with an output space of their own stay per task. So the table's difference between `php` and `finetune`
  is the partition and nothing else.

  Parameters without heads: shared(php) + prompts of one task(php), all shared; 0 per task.
  """

  def init_shared(self, rng: jax.Array) -> Tree:
    """PHP's shared parts and, as a shared part too, its prompts."""
    rng_shared, rng_prompts = jax.random.split(rng)
    return {**super().init_shared(rng_shared), "prompts": super().init_task(rng_prompts, None, None)}

  def init_task(self, rng: jax.Array, task: Any, previous: Tree | None) -> Tree:
    """Nothing is specific to a task."""
    return {}

  def uses(self, task: Any) -> tuple[str, ...]:
    """PHP's shared parts and the prompts."""
    return (*super().uses(task), "prompts")

  def prompts(self, trainable: Tree) -> Tree:
    """The one set."""
    return trainable["shared"]["prompts"]
