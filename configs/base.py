"""Every field that the code reads, set once; and the variants that the experiments share.

A variant is a size, then what is changed, joined by "+": `toybox+no_shallow`, `released+ave_avvp_avqa`; without a size it is
`full`. configs/php_avqa.py lists them.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

SIZES = ("full", "toybox", "tiny", "tux21")
PHP_SIZES = (*SIZES, "released", "released_toybox")
ORDERS = {
  "ave_avvp_avqa": ("ave", "avvp", "avqa"),  # the release's only config
  "ave_avqa_avvp": ("ave", "avqa", "avvp"),  # the other one that its README names
  "reversed": ("avqa", "avs", "avvp", "ave"),
}
CLASS_INCREMENTAL = ("ave_classes",)  # the classes of a dataset in groups, one task each; the task is not given at test
SHORT = "short"  # of the toybox: few epochs, the same rates for all methods, for tables of many methods and seeds
ENCODERS = {
  "ast": {"audio": "ast_base"},
  "clip_b16": {"visual": "clip_vit_b16", "text": "clip_text_b16"},
}
PHASES = {"shallow": "shallow", "middle": "mid", "deep": "deep"}  # what the paper calls them -> what the config does
PHASE_CHANGES = ("no_PHASE", "only_PHASE", "PHASE_FIRST_LAST", "deep_length_N")

# Sizes of PHP's modules. Full: the release's. Nano and tiny encoders have narrower layers and so smaller prompts.
_PHP = {
  "reduction": 8,
  "groups": 2,
  "alpha": 0.2,
  "beta": 0.05,
  "gamma": 0.01,
  "num_context": 4,
  "class_weight": 5.0,
  "audio_to_visual_weight": 2.0,
  "visual_to_audio_weight": 1.5,
}
_PHASES = {"shallow": (0, 1), "mid": (3, 4), "deep": (5, 6, 7, 8, 9, 10, 11)}
_PHP_OF_SIZE = {
  "full": {
    **_PHASES,
    "num_mid_prompts": 32,
    "codebook_size": 256,
    "generator_depth": 3,
    "deep_length": 10,
    "num_latents": 32,
  },
  "toybox": {
    **_PHASES,
    "num_mid_prompts": 8,
    "codebook_size": 16,
    "generator_depth": 1,
    "deep_length": 4,
    "num_latents": 8,
    "audio_logit_scale": "exp",  # the nano audio tower was trained with the exponential
  },
  "tux21": {  # of the four steps that DINOv2 and Whisper make together
    "shallow": (0,),
    "mid": (1,),
    "deep": (2, 3),
    "num_mid_prompts": 8,
    "codebook_size": 16,
    "generator_depth": 1,
    "deep_length": 8,
    "num_latents": 8,
  },
  "tiny": {
    "shallow": (0,),
    "mid": (1,),
    "deep": (2,),
    "num_mid_prompts": 4,
    "codebook_size": 8,
    "generator_depth": 1,
    "deep_length": 2,
    "num_latents": 4,
    "audio_logit_scale": "exp",
  },
}
# Empty until phpjax/compat.py, which documents them, fills them in after the command line has had its say.
_PHP_COMPAT = {
  "write_back": bool,
  "gate_audio": bool,
  "deep_layout": str,
  "deep_audio": bool,
  "deep_select": str,
  "deep_pool": int,
  "warm_start": bool,
  "audio_noise": bool,
  "train_mode_at_test": bool,
  "mixup": bool,
  "audio_logit_scale": str,
  "audio_repeats": str,
}


def base() -> ConfigDict:
  """Full size: the user's data and weights."""
  c = ConfigDict()
  c.seed = 0
  c.tasks = ("ave", "avvp", "avs", "avqa")  # learned in this order
  c.batch_size = 32  # over all devices
  c.eval_batch_size = 32
  c.num_epochs = 10  # per task
  c.epoch_factor = ConfigDict({"ave": 1, "avvp": 1, "avs": 1, "avqa": 1, "ms3": 1})  # a task's epochs: num_epochs times this
  c.task_id = "given"  # the task is known at test time; "inferred": a clip gets the prompts of the task that it looks like
  c.routing = "euclidean"  # to the nearest centroid, as S-Prompts has it; "mahalanobis": see phpjax/routing.py
  c.on_nonfinite = "stop"  # or "skip": leave out a step whose loss or gradient is not finite, and count it
  # A run in which no step, batch of an evaluation or clip is finished for so long writes the stacks of all its threads and
  # exits with 75; 0: never. It has to be longer than the longest compile, save and clip. Minutes.
  c.watchdog_minutes = 30.0
  c.mesh = (-1, 1)  # devices along (data, fsdp); -1: all that are left
  c.resume = True  # continue a workdir that holds checkpoints
  c.log_every_steps = 10
  c.save_every_steps = 200  # a checkpoint within an epoch; there is one at the end of each anyway
  c.remat = False  # True computes activations again for the gradient instead of keeping them: less memory, more time
  c.compile_effort = 3  # LLVM's optimisation level on CPU, 0 to 3: less compiles faster and runs slower
  c.encoder_dtype = "auto"  # bfloat16 on accelerators, float32 on CPU

  c.method = ConfigDict({"name": "linear_probe", "compat": "paper"})

  c.encoders = ConfigDict(
    {  # weights: a folder written by phpjax.convert
      "visual": {"name": "clip_vit_b32", "weights": "", "statistics": placeholder(str)},
      "audio": {"name": "htsat_tiny", "weights": "", "mel_source": placeholder(str)},
      "text": {"name": "clip_text_b32", "weights": ""},
    }
  )
  c.protocol = ConfigDict({"avvp": placeholder(str)})  # how a task is learned and scored, where there is more than one way

  c.data = data()
  c.opt = ConfigDict(
    {  # Adam, one setting per label of phpjax/partition.py
      "shared": {"lr": 3e-4, "weight_decay": 0.0},
      "prompts": {"lr": 3e-4, "weight_decay": 0.0},
      "head": {"lr": 3e-4, "weight_decay": 1e-5},
      "reference_batch_size": 2,  # the rates are PHP's, for this batch size
      "lr_scaling": "sqrt",  # of batch_size / reference_batch_size, Adam's rule (arXiv 2205.10287); or "linear", "none"
      "b1": 0.9,
      "b2": 0.999,
      "eps": 1e-8,
      "decay": placeholder(str),
      "clip": placeholder(str),
      "clip_norm": 0.5,  # of the gradient
      "min_scale": 1 / 300,  # the cosine ends at this share of the rate (3e-4 -> 1e-6)
      "later_shared_scale": 1.0,  # slows the shared parameters down after the first task
    }
  )
  return c


def data() -> ConfigDict:
  """Where clips come from and how they are read."""
  d = ConfigDict()
  d.root = ""  # holds AVE, LLP, AVSBench, MUSIC-AVQA; empty with toybox: a cache folder of the user
  d.toybox = ""  # "default" or "tiny": compose the embedded data instead
  d.toybox_seed = 0
  d.evaluation_split = "test"  # and "unseen" where the data has it; or "val", to choose settings on
  d.selection_split = "val"  # chooses, after every epoch, the epoch of a task that counts, where the data has it; "": the last
  d.on_bad_clip = "error"  # or "skip": leave out clips that cannot be read, and list them
  d.crop = False  # stretch pictures to a square (DG-SCT, PHP); True: resize the short side and cut out the middle (CLIP)
  d.num_threads = 2  # decoding, in each worker where there are any
  d.num_workers = 0  # decoding processes, for hosts with many cores; each start of an epoch takes them seconds
  d.mirrored = ()  # tasks that see half of their training clips mirrored left to right; none whose answers say left
  d.cache_gb = 1.5  # decoded clips kept in memory, over all workers
  d.query_cache_gb = 1.5  # unprompted features that somebody asks for, kept in memory (phpjax/queries.py); 0: none are
  d.query_cache = ""  # a folder where runs on one machine share them; phpjax.sweep sets it
  d.labelled_seconds_only = True  # AVS training leaves out seconds without a mask (the release runs them for nothing)
  d.num_class_tasks = 4  # of a class-incremental benchmark (ave_classes_1 ... _4): its classes in so many groups
  d.class_seed = 0  # who is in which group
  d.questions_per_clip = 1  # questions that share one encoding of their clip; batch_size counts clips then
  return d


def nano(c: ConfigDict) -> ConfigDict:
  """The embedded data and encoders: minutes on two CPU cores."""
  c.encoders = ConfigDict(
    {m: {"name": f"nano_{kind}", "weights": "shipped"} for m, kind in (("visual", "vit"), ("audio", "ast"), ("text", "text"))}
  )
  c.data.toybox = "default"
  c.data.num_class_tasks = 7  # of two classes
  c.data.questions_per_clip = 5
  c.data.mirrored = ("avs", "ms3")  # few clips
  c.data.cache_gb = 0.5
  c.batch_size, c.eval_batch_size = 8, 16
  c.num_epochs = 1
  c.epoch_factor = ConfigDict({"ave": 2, "avvp": 3, "avs": 10, "avqa": 16, "ms3": 10})  # avs: one labelled second per clip
  c.compile_effort = 1
  for label in ("shared", "prompts", "head"):
    c.opt[label].lr = 2e-3
  c.opt.lr_scaling = "none"  # that is the rate of this batch size
  c.opt.clip_norm = 1.0
  c.opt.later_shared_scale = 0.03
  return c


def tiny(c: ConfigDict) -> ConfigDict:
  """Random encoders of three layers and a dozen clips per task: most of the time goes into compiling, for tests."""
  c = nano(c)
  c.encoders = ConfigDict(
    {m: {"name": f"tiny_{kind}", "weights": "random"} for m, kind in (("visual", "vit"), ("audio", "ast"), ("text", "text"))}
  )
  c.data.toybox = "tiny"
  c.data.num_class_tasks = 2
  c.batch_size, c.eval_batch_size, c.log_every_steps = 2, 4, 1
  c.epoch_factor = ConfigDict(dict.fromkeys(c.epoch_factor, 1))
  c.compile_effort = 0
  return c


def php(variant: str, name: str = "php") -> ConfigDict:
  """An experiment with PHP's modules: the method `php`, or another one that has them."""
  size, changes = split(variant, PHP_SIZES)
  modules = {"released": "full", "released_toybox": "toybox"}.get(size, size)
  c = sized(modules)
  if modules == "full":
    add_audio_text(c)
  empty = {option: placeholder(kind) for option, kind in _PHP_COMPAT.items()}  # made anew: placeholders remember their value
  c.method = ConfigDict({"name": name, "compat": "paper", **_PHP, **empty, **_PHP_OF_SIZE[modules]})
  if size.startswith("released"):
    release(c)
  return changed(c, changes, PHP_SIZES, change_phases, PHASE_CHANGES)


def add_audio_text(c: ConfigDict) -> None:
  """CLAP's own text tower for class texts of the audio side at full size; without it `text` reads both sides'."""
  c.encoders.audio_text = ConfigDict({"name": "roberta_base", "weights": ""})


def release(c: ConfigDict) -> ConfigDict:
  """What the release does and, at full size, how it trains: a batch of two, its rates, every frame and question by itself.

  Evaluation stays batched, where the release takes clip by clip. The toybox keeps its rates, batch, epochs and data, so that
  it differs from `toybox` in compat, in decaying all that learns and in mirroring no clip.
  """
  c.method.compat = "released"
  for label in ("shared", "prompts", "head"):
    c.opt[label].weight_decay = 1e-5
  c.data.mirrored = ()
  c.data.selection_split = ""  # the last epoch counts
  if not c.data.toybox:
    c.batch_size, c.opt.lr_scaling = 2, "none"
    c.data.labelled_seconds_only = False
  return c


def tux21(c: ConfigDict) -> ConfigDict:
  """Tux Paint's stamps with their spoken captions, class-incremental, on small encoders of real weights: minutes on two cores.

  Pictures have 64 patches instead of 256, speech is heard for 2 seconds instead of 30. The encoders' weights:
  `python -m phpjax.convert`. DINOv2 has 12 layers and Whisper 4, so that a step is 3 of the one and 1 of the other.
  """
  c.encoders = ConfigDict(
    {
      "visual": {"name": "dinov2_s14", "weights": "", "statistics": "imagenet", "image_size": 112},
      "audio": {"name": "whisper_tiny", "weights": "", "seconds": 2.0},
      "text": {"name": "minilm_l6", "weights": ""},
    }
  )
  c.data.num_class_tasks = 7  # of three classes
  class_incremental(c, "tux21")
  c.batch_size, c.eval_batch_size = 16, 16  # a task has 7 to 21 clips for testing
  for label in ("shared", "prompts", "head"):
    c.opt[label].lr = 2e-3
  c.opt.lr_scaling = "none"  # that is the rate of this batch size
  c.opt.clip_norm = 1.0
  c.opt.later_shared_scale = 0.03
  return c


def class_incremental(c: ConfigDict, family: str) -> None:
  """Groups of classes, one after the other, and nobody says at test which one a clip belongs to."""
  c.tasks, c.task_id = tuple(f"{family}_{i + 1}" for i in range(c.data.num_class_tasks)), "inferred"
  c.routing = "mahalanobis"
  if c.data.toybox != "tiny":
    c.num_epochs = 10  # a task has a few dozen clips


# -- variants ----------------------------------------------------------------------------------------------------


def experiment(variant: str, tasks: tuple[str, ...] | None = None) -> ConfigDict:
  """An experiment without PHP's modules, as `base` has it; `tasks` are those that a method can learn, if not all."""
  size, changes = split(variant, SIZES)
  c = sized(size)
  c.tasks = tuple(name for name in c.tasks if name in (tasks or c.tasks)) or c.tasks  # those of tux21 are others
  return changed(c, changes, SIZES)


def sized(size: str) -> ConfigDict:
  """What all methods share at a size of `SIZES`."""
  return {"full": lambda c: c, "toybox": nano, "tiny": tiny, "tux21": tux21}[size](base())


def split(variant: str, sizes: tuple[str, ...]) -> tuple[str, list[str]]:
  """ "toybox+no_deep" -> ("toybox", ["no_deep"]); `full` where no size comes first."""
  first, *rest = variant.split("+")
  return (first, rest) if first in sizes else ("full", [first, *rest])


def changed(
  c: ConfigDict,
  words: list[str],
  sizes: tuple[str, ...],
  own: Callable[[ConfigDict, str], bool] = lambda c, word: False,
  own_words: tuple[str, ...] = (),
) -> ConfigDict:
  """Applies the words behind the size in their order; raises ValueError for an unknown one, naming all there are.

  own: makes a change of the method's and says whether `word` is one; they are called `own_words`.
  """
  for word in words:
    if word in ORDERS:
      c.tasks = ORDERS[word]
    elif word in CLASS_INCREMENTAL:
      class_incremental(c, word)
    elif word == SHORT:
      shorten(c)
    elif word in ENCODERS:
      change_encoders(c, word)
    elif not own(c, word):
      known = [*ORDERS, *CLASS_INCREMENTAL, SHORT, *ENCODERS, *own_words]
      raise ValueError(
        f"unknown variant {word!r}; a variant is {', '.join(sizes)}, or one of these with +CHANGE behind it: {', '.join(known)}"
      )
  return c


def shorten(c: ConfigDict) -> None:
  """Minutes on two cores for every method: a fifth to a half of the epochs, the last of which counts, one rate for all heads.

  Raises ValueError without the toybox.
  """
  if not c.data.toybox:
    raise ValueError(f"the variant {SHORT!r} shortens the toybox's runs: name a size, as toybox+{SHORT}")
  c.epoch_factor = ConfigDict({"ave": 1, "avvp": 1, "avs": 3, "avqa": 3, "ms3": 3})
  c.data.selection_split = ""
  c.opt.head.lr = 5e-3


def change_encoders(c: ConfigDict, word: str) -> None:
  """Other encoders of full size; raises ValueError at another size."""
  if c.data.toybox:
    raise ValueError(f"the variant {word!r} changes encoders of full size, and the toybox has its own: leave one of them out")
  for entry, name in ENCODERS[word].items():
    c.encoders[entry].name = name


def change_phases(c: ConfigDict, word: str) -> bool:
  """PHP without a phase, with other layers or longer prompts; False if that is not what `word` says."""
  if match := re.fullmatch("(no|only)_(shallow|middle|deep)", word):
    for name, field in PHASES.items():
      if (name == match[2]) == (match[1] == "no"):
        c.method[field] = ()
  elif match := re.fullmatch(r"deep_length_([1-9]\d*)", word):
    c.method.deep_length = int(match[1])
  elif match := re.fullmatch(r"(shallow|middle|deep)_(\d+)_(\d+)", word):
    layers = tuple(range(int(match[2]), int(match[3]) + 1))
    c.method[PHASES[match[1]]] = layers
    return bool(layers)
  return match is not None
