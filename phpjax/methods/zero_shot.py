"""Zero-shot: class texts in the space that the encoders share with text (CLIP, arXiv 2103.00020; CLAP, arXiv 2211.06687)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from phpjax.methods.base import Method, Tree
from phpjax.methods.class_texts import PAIR, encode, space_problems
from phpjax.methods.prompts import l2_normalise, similarity


@dataclasses.dataclass(frozen=True)
class ZeroShot(Method):
  """Zero-shot: events and classes by fixed class texts, nothing is learned and no training clip is looked at.

  Every second's frame and sound are compared with the classes' texts, cosine times the encoder's temperature. AVE takes the
  best class of the sum of both, "background" being one of the texts. AVVP says a class of a second, seen or heard, whose text
  has more than 0.257 = exp(-e / 2) of the softmax over all texts, "background" among them: what the task's calibration gives
  before anything is learned. (Of the toybox's `val` 77.9 percent Type@AV; with "closer than background" 9.5, for almost every
  text is; with more than half of the softmax 68.0.) A clip of a growing label set is given the class, of all tasks so far, with
  the best mean over its seconds. 0 trainable parameters.

  Raises ValueError for encoders that share no space with text.

  Attributes:
    visual_text, audio_text: class texts with {} for the class, fixed. By default that of CLIP's paper and that of LAION's
      CLAP.
  """

  visual_text: str = "a photo of a {}."
  audio_text: str = "This is a sound of {}."
  learns: ClassVar[bool] = False
  looks: ClassVar[bool] = False

  def __post_init__(self) -> None:
    towers = (*PAIR, "text", *(("audio_text",) if self.backbone.audio_text else ()))
    if missing := [m for m in towers if getattr(self.backbone, m) is None]:
      problems = [f"needs encoders for {', '.join(missing)}"]
    elif apart := [m for m in towers if not getattr(self.backbone, m).joint]:
      problems = [f"compares features with class texts, and these encoders share no space with text: {', '.join(apart)}"]
    else:
      problems = list(space_problems(self.backbone))
    problems += [f"{name} needs one {{}}" for name in ("visual_text", "audio_text") if getattr(self, name).count("{}") != 1]
    if problems:
      raise ValueError("method zero_shot " + "; ".join(problems))

  @classmethod
  def refuses(cls, task: Any) -> str | None:
    """Tasks whose answers are no named classes of seconds or clips: masks, answers to a question."""
    known = task.kind in ("event", "classes")
    return None if known else "it compares seconds with the texts of classes, so a task must ask for events or classes"

  def templates(self) -> dict[str, str]:
    """The fixed texts."""
    return {"visual": self.visual_text, "audio": self.audio_text}

  def init_head(self, rng: jax.Array, task: Any) -> Tree:
    """The texts are the classifier."""
    del rng, task
    return {}

  def class_features(self, encoders: Tree, trainable: Tree, frozen: Tree, constants: Tree) -> Tree:
    """Class texts {"visual": [C, E], "audio": [C, E]}, unit length."""
    del trainable
    if (seen := constants.get("visual_text")) is None:
      seen = encode(encoders["text"].bind({"params": frozen["encoders"]["text"]}), constants["class_ids"])
    return {"visual": l2_normalise(seen), "audio": l2_normalise(constants["audio_text"])}

  def predict(
    self,
    task: Any,
    trainable: Tree,
    frozen: Tree,
    state: Tree,
    features: Tree,
    context: Tree,
    classes: Tree,
    batch: Tree,
    *,
    rng: jax.Array | None,
    train: bool,
  ) -> tuple[Tree, Tree]:
    """{"visual", "audio": [B, T, C]} of events, {"logits": [B, C]} of classes."""
    scale = {m: jnp.exp(frozen["encoders"][m]["logit_scale"].astype(jnp.float32)) for m in PAIR}
    logits = {m: similarity(scale[m] * l2_normalise(features[m].pooled), classes[m]) for m in PAIR}
    logits = {m: x.reshape(-1, task.seconds, x.shape[-1]) for m, x in logits.items()}
    if task.kind == "classes":
      return task.outputs_of(sum(logits.values()).mean(axis=1)), state
    return task.calibrate(task.init_calibration(), logits), state
