"""Paper or release: what `config.method.compat` decides, each option of which can also be set alone.

`paper` is the paper's intent (arXiv 2507.21588), `released` what the published code does (commit b2d018d). The options stand
empty in the configs; `resolve` fills in those that the user did not set (`--config.method.write_back=False`). Quirks are
numbered as in the notes on that code.

  option                       paper        released      quirk  what it is
  method.write_back            True         False         3      audio goes on with what the shallow adapters added to it
  method.gate_audio            True         False         22     audio adapters start as the identity: no noise at step 0
  method.deep_layout           keys_values  reshaped      5      reshaped: half the frames get keys as both, half values
  method.deep_audio            True         False         4      deep prompts for the audio encoder too
  method.deep_select           task         key_majority  6      one set per task, or the row of a pool nearest to most frames
  method.deep_pool             1            3             6      rows of that pool; unset, it follows deep_select
  method.warm_start            True         True          8      a task's prompts begin where those of the task before ended
  method.audio_noise           False        True          1      training: SpecAugment, drop-path, batch statistics in HTS-AT
  method.train_mode_at_test    False        True          1      the network is evaluated as it is trained, noise included
  method.mixup                 False        True          2      AVS: log-mels are mixed with those of other frames
  method.audio_logit_scale     raw          raw           12     raw: the stored number as it is; exp: its exponential, as CLAP
  method.audio_repeats         encoder      seconds       21     a second of sound ten times, or as often as a clip has seconds
  encoders.visual.statistics   imagenet     imagenet      20     mean and deviation of pixels; clip: those CLIP was trained with
  encoders.audio.mel_source    checkpoint   checkpoint    21     mel matrix as stored, or rate: one for the rate that is fed
  protocol.avvp                official     released      17 31  labels per second and modality, or one softmax for the clip
  opt.decay                    decoupled    l2            34     AdamW's, or a part of the gradient, as in torch's Adam
  opt.clip                     label        global        34     norms of shared, prompts and head apart, or of all together
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from phpjax.encoders import ENCODERS
from phpjax.errors import UserError


class Option(NamedTuple):
  """One line of the table above; `others` are values that neither mode takes."""

  paper: Any
  released: Any
  others: tuple[Any, ...] = ()

  @property
  def choices(self) -> tuple[Any, ...]:
    """All values, each once."""
    return tuple(dict.fromkeys((self.paper, self.released, *self.others)))


OPTIONS: dict[str, Option] = {
  "method.write_back": Option(True, False),
  "method.gate_audio": Option(True, False),
  "method.deep_layout": Option("keys_values", "reshaped"),
  "method.deep_audio": Option(True, False),
  "method.deep_select": Option("task", "key_majority"),
  "method.deep_pool": Option(1, 3),
  "method.warm_start": Option(True, True, (False,)),
  "method.audio_noise": Option(False, True),
  "method.train_mode_at_test": Option(False, True),
  "method.mixup": Option(False, True),
  "method.audio_logit_scale": Option("raw", "raw", ("exp",)),
  "method.audio_repeats": Option("encoder", "seconds"),
  "encoders.visual.statistics": Option("imagenet", "imagenet", ("clip",)),
  "encoders.audio.mel_source": Option("checkpoint", "checkpoint", ("rate",)),
  "protocol.avvp": Option("official", "released"),
  "opt.decay": Option("decoupled", "l2"),
  "opt.clip": Option("label", "global"),
}
MODES = ("paper", "released")
FOLLOWS = {"method.deep_pool": "method.deep_select"}  # unset, it suits the other's value, whichever mode that one is of
# How a rate grows with the batch, by the factor `batch_size / opt.reference_batch_size`. The square root is Adam's rule
# (Malladi et al. 2022, arXiv 2205.10287). That rule moves 1 - b1, 1 - b2 and eps too, which a factor of 16 would drive out of
# their range: here they stay.
SCALING = {"none": lambda factor: 1.0, "sqrt": math.sqrt, "linear": lambda factor: factor}


def resolve(config: ConfigDict) -> ConfigDict:
  """A locked copy in which compat has filled its options and the rates are those of the batch; resolving twice changes nothing.

  An option that the config leaves out stays out (a method without such parts); an unset one that the chosen encoder does not
  have is taken out. Raises UserError for an unknown compat.
  """
  config = ConfigDict(config.to_dict())
  if "compat" not in config.get("method", {}):
    return config.lock()  # no experiment; `checks.problems` says so
  if (mode := config.method.compat) not in MODES:
    raise UserError(f"method.compat={mode!r} is not one of {', '.join(map(repr, MODES))}")
  for name in OPTIONS:
    node, field = _place(config, name)
    if field not in node or node[field] is not None:
      continue
    if name.startswith("encoders.") and not _has(node.name, field):
      del node[field]
    else:
      node[field] = _value(config, name, mode)
  if "opt" in config:
    _scale_rates(config.opt, config.batch_size)
  return config.lock()


def _place(config: ConfigDict, name: str) -> tuple[ConfigDict, str]:
  """The part of the config that may hold the option `a.b`, and `b`."""
  *path, field = name.split(".")
  for key in path:
    config = config.get(key, ConfigDict())
  return config, field


def _value(config: ConfigDict, name: str, mode: str) -> Any:
  """What an unset option becomes."""
  if leader := FOLLOWS.get(name):
    node, field = _place(config, leader)
    mode = next((m for m in MODES if getattr(OPTIONS[leader], m) == node.get(field)), mode)
  return getattr(OPTIONS[name], mode)


def _has(encoder: str, field: str) -> bool:
  """Whether the encoder called so has such a field."""
  return encoder in ENCODERS and field in {f.name for f in dataclasses.fields(ENCODERS[encoder][0])}


def _scale_rates(opt: ConfigDict, batch_size: int) -> None:
  """Turns rates for `opt.reference_batch_size` into rates for the batch, which is the reference from then on."""
  rule, reference = opt.get("lr_scaling", "none"), opt.get("reference_batch_size", batch_size)
  if rule == "none" or rule not in SCALING or min(reference, batch_size) < 1:
    return  # `problems` names what is wrong
  for group in (group for group in opt.values() if isinstance(group, ConfigDict)):
    group.lr = group.lr * SCALING[rule](batch_size / reference)
  opt.reference_batch_size = batch_size


def problems(config: ConfigDict) -> Iterator[str]:
  """What is wrong in a resolved config with the options that are not the method's (those it checks itself), one line each."""
  for name, option in OPTIONS.items():
    node, field = _place(config, name)
    if not name.startswith("method.") and field in node and node[field] not in option.choices:
      yield f"{name}={node[field]!r} is not one of {', '.join(map(repr, option.choices))}"
  if (rule := config.opt.get("lr_scaling", "none")) not in SCALING:
    yield f"opt.lr_scaling={rule!r} is not one of {', '.join(map(repr, SCALING))}"
