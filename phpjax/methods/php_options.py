"""PHP's options, and which encoders they fit; what is done with them stands in php.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from phpjax.methods.base import Method, Sizes
from phpjax.methods.class_texts import PAIR, space_problems, text_of

NUM_CONTEXT_WORDS = 4  # place holders of the visual class texts (phpjax/tasks/event.py)
CHOICES = {
  "audio_logit_scale": ("raw", "exp"),
  "deep_layout": ("keys_values", "reshaped"),
  "deep_select": ("task", "key_majority"),
  "audio_repeats": ("encoder", "seconds"),
}


@dataclasses.dataclass(frozen=True)
class PHPOptions(Method):
  """Sizes and switches of progressive homeostatic and plastic prompt tuning; raises ValueError for those that do not fit.

  Attributes:
    shallow, mid, deep: steps that carry adapters, generated prompts, deep prompts; empty switches a phase off.
    num_latents, reduction, groups, alpha, beta, gamma: of the shallow adapters.
    num_mid_prompts: prompts per middle layer, half of them keys, half values.
    codebook_size, generator_depth: of the prompt generators.
    deep_length: deep prompts per layer, each for keys and for values.
    num_context: learnable context words in front of a class name.
    write_back: audio tokens take up what their adapters say, as visual ones do (quirk 3).
    gate_audio: audio adapters begin as the identity, as visual ones do (quirk 22).
    deep_layout: "keys_values", or "reshaped" as the release mixes them up (quirk 5).
    deep_audio: deep prompts for audio too (quirk 4).
    deep_select: "task" has one set of deep prompts, "key_majority" chooses one of `deep_pool` sets by random keys (quirk 6).
    warm_start: a task's prompts begin where the previous task's ended (quirk 8), else fresh.
    audio_noise: the audio encoder trains in training mode: SpecAugment, drop-path, batch statistics (quirk 1).
    train_mode_at_test: all that and dropout and batch statistics of the heads at test too, clip by clip (quirk 1).
    mixup: the audio of AVS clips is blended with other seconds' in training, and at test in training mode (quirk 2).
    audio_logit_scale: "raw" multiplies audio scores by the stored scale as it is, "exp" by its exponential as CLAP itself
      does (quirk 12).
    audio_repeats: a second of sound is repeated as the "encoder" wants it, or as often as a clip has "seconds" (section 2).
    class_weight, audio_to_visual_weight, visual_to_audio_weight: loss weights of event tasks.
  """

  shallow: tuple[int, ...] = (0, 1)
  mid: tuple[int, ...] = (3, 4)
  deep: tuple[int, ...] = (5, 6, 7, 8, 9, 10, 11)
  num_latents: int = 32
  reduction: int = 8
  groups: int = 2
  alpha: float = 0.2
  beta: float = 0.05
  gamma: float = 0.01
  num_mid_prompts: int = 32
  codebook_size: int = 256
  generator_depth: int = 3
  deep_length: int = 10
  num_context: int = 4
  write_back: bool = True
  gate_audio: bool = True
  deep_layout: str = "keys_values"
  deep_audio: bool = True
  deep_select: str = "task"
  deep_pool: int = 1
  warm_start: bool = True
  audio_noise: bool = False
  train_mode_at_test: bool = False
  mixup: bool = False
  audio_logit_scale: str = "raw"
  audio_repeats: str = "encoder"
  class_weight: float = 5.0
  audio_to_visual_weight: float = 2.0
  visual_to_audio_weight: float = 1.5

  def __post_init__(self) -> None:
    problems = []
    if missing := [m for m in ("visual", "audio", "text") if m not in self.backbone.present()]:
      problems.append(f"needs encoders for {', '.join(missing)}")
    else:
      problems += [*space_problems(self.backbone), *self._phase_problems(), *self._audio_problems()]
    for name, known in CHOICES.items():
      if (value := getattr(self, name)) not in known:
        problems.append(f"{name} is {' or '.join(known)}, not {value!r}")
    if (self.deep_select == "key_majority") != (self.deep_pool > 1):
      problems.append(f"deep_select={self.deep_select} with deep_pool={self.deep_pool}: task has 1 set, key_majority more")
    if not 1 <= self.num_context <= NUM_CONTEXT_WORDS:
      problems.append(f"num_context is 1 to {NUM_CONTEXT_WORDS} (place holders before a class name), not {self.num_context}")
    sizes = (
      "num_latents",
      "reduction",
      "groups",
      "num_mid_prompts",
      "codebook_size",
      "generator_depth",
      "deep_length",
      "deep_pool",
    )
    problems += [f"{name}={getattr(self, name)} must be 1 or more" for name in sizes if getattr(self, name) < 1]
    if self.num_mid_prompts % 2:
      problems.append(f"num_mid_prompts must be even, not {self.num_mid_prompts}")
    if problems:
      raise ValueError("method php " + "; ".join(problems))

  def _phase_problems(self) -> Iterator[str]:
    """Layers that do not exist or would take two prompts."""
    depth = min(getattr(self.backbone, m).depth for m in PAIR)  # a deeper encoder takes several layers per step
    outside = [layer for layer in (*self.shallow, *self.mid, *self.deep) if not 0 <= layer < depth]
    if outside:
      yield f"has a prompt in layer {max(outside)}, the encoders have {depth} layers"
    prompted = (*self.mid, *self.deep)
    if twice := sorted({layer for layer in prompted if prompted.count(layer) > 1}):
      yield f"has more than one prompt of mid and deep in layer {twice[0]}, a layer takes one"

  def _audio_problems(self) -> Iterator[str]:
    """What these encoders cannot be given."""
    visual, audio = self.backbone.visual, self.backbone.audio
    if not visual.uniform:
      yield "does not run on a visual encoder whose layers differ in width"
    elif self.mid and audio.uniform and visual.width != audio.width:
      yield (
        f"shares its middle generators between modalities and needs equal widths, got visual {visual.width} and audio "
        f"{audio.width}"
      )
    elif self.mid and not audio.uniform:
      numbers = self.num_mid_prompts * visual.width
      if audio.num_tokens * audio.width % (16 * visual.width):
        yield f"cannot view {audio.num_tokens // 16} cells of {audio.width} channels as audio tokens of width {visual.width}"
      for tokens, width in (self.audio_layer(step) for step in self.mid if 0 <= step < audio.depth):
        if numbers % tokens or numbers // tokens > width:
          yield f"cannot lay {numbers} numbers of prompts over {tokens} audio tokens of {width} channels"
    noisy = {"audio_noise": self.audio_noise, "train_mode_at_test": self.train_mode_at_test, "mixup": self.mixup}
    noisy["audio_repeats=seconds"] = self.audio_repeats == "seconds"
    if (wanted := [name for name, on in noisy.items() if on]) and not audio.noisy:
      yield f"has no training mode for this audio encoder: {', '.join(wanted)} cannot be had"

  def text_of(self, modality: str) -> Sizes:
    """The text tower that a modality's features are compared with."""
    return text_of(self.backbone, modality)

  def audio_layer(self, step: int) -> tuple[int, int]:
    """(tokens, channels) of the audio layer at whose end a step is; see `model.layer_map`."""
    audio, steps = self.backbone.audio, min(getattr(self.backbone, m).depth for m in PAIR)
    layer = audio.depth // steps * (step + 1) - 1
    return audio.layer_tokens[layer], audio.layer_widths[layer]
