"""Joint training: PHP's modules as one set that learns all tasks at once; not continual, the upper bound of the baselines."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from phpjax.methods.finetune import FineTune


@dataclasses.dataclass(frozen=True)
class Joint(FineTune):
  """Fine-tuning on all tasks together: every step takes a batch of each, and adds up their losses.

  The shared parameters get the sum of the tasks' gradients, every head its own. Tasks of a growing label set learn each class
  against those of all of them, not against its own task's alone. Nothing else differs from `finetune`.

  Parameters: as many as `finetune` has, shared(php) + prompts of one task(php), and a head per task.
  """

  joint: ClassVar[bool] = True
