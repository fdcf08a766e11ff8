"""Every field that the code reads, set once; and the variants that all experiments share."""

from __future__ import annotations

from ml_collections import ConfigDict

VARIANTS = ("full", "toybox", "tiny")

# Sizes of PHP's modules. Full: the release's. Nano and tiny encoders have narrower layers and so smaller prompts.
_PHP = {
  "reduction": 8,
  "groups": 2,
  "alpha": 0.2,
  "beta": 0.05,
  "gamma": 0.01,
  "num_context": 4,
  "warm_start": True,
  "class_weight": 5.0,
  "audio_to_visual_weight": 2.0,
  "visual_to_audio_weight": 1.5,
}
PHP = {
  "full": {
    **_PHP,
    "num_mid_prompts": 32,
    "codebook_size": 256,
    "generator_depth": 3,
    "deep_length": 10,
    "num_latents": 32,
    "shallow": (0, 1),
    "mid": (3, 4),
    "deep": (5, 6, 7, 8, 9, 10, 11),
    "audio_logit_scale": "released",
  },
  "toybox": {
    **_PHP,
    "num_mid_prompts": 8,
    "codebook_size": 16,
    "generator_depth": 1,
    "deep_length": 4,
    "num_latents": 8,
    "shallow": (0, 1),
    "mid": (3, 4),
    "deep": (5, 6, 7, 8, 9, 10, 11),
    "audio_logit_scale": "exp",
  },  # the nano audio tower was trained with the exponential
  "tiny": {
    **_PHP,
    "num_mid_prompts": 4,
    "codebook_size": 8,
    "generator_depth": 1,
    "deep_length": 2,
    "num_latents": 4,
    "shallow": (0,),
    "mid": (1,),
    "deep": (2,),
    "audio_logit_scale": "exp",
  },
}


def base() -> ConfigDict:
  """Full size: the user's data and weights."""
  c = ConfigDict()
  c.seed = 0
  c.tasks = ("ave", "avvp", "avs", "avqa")  # learned in this order
  c.batch_size = 32  # over all devices
  c.eval_batch_size = 32
  c.num_epochs = 10  # per task
  c.epoch_factor = ConfigDict({"ave": 1, "avvp": 1, "avs": 1, "avqa": 1})  # a task's epochs: num_epochs times this
  c.task_id = "given"  # the task is known at test time
  c.on_nonfinite = "stop"  # or "skip": leave out a step whose loss or gradient is not finite, and count it
  c.mesh = (-1, 1)  # devices along (data, fsdp); -1: all that are left
  c.resume = True  # continue a workdir that holds checkpoints
  c.log_every_steps = 10
  c.compile_effort = 3  # LLVM's optimisation level on CPU, 0 to 3: less compiles faster and runs slower
  c.encoder_dtype = "auto"  # bfloat16 on accelerators, float32 on CPU

  c.method = ConfigDict({"name": "linear_probe", "compat": "paper"})

  c.encoders = ConfigDict(
    {  # weights: a folder written by phpjax.convert
      "visual": {"name": "clip_vit_b32", "weights": ""},
      "audio": {"name": "ast_base", "weights": ""},
      "text": {"name": "clip_text_b32", "weights": ""},
    }
  )

  c.data = ConfigDict()
  c.data.root = ""  # holds AVE, LLP, AVSBench, MUSIC-AVQA; empty with toybox: a cache folder of the user
  c.data.toybox = ""  # "default" or "tiny": compose the embedded data instead
  c.data.toybox_seed = 0
  c.data.evaluation_split = "test"  # and "unseen" where the data has it; or "val", to choose settings on
  c.data.on_bad_clip = "error"  # or "skip": leave out clips that cannot be read, and list them
  c.data.crop = False  # stretch pictures to a square (DG-SCT, PHP); True: resize the short side and cut out the middle (CLIP)
  c.data.num_threads = 2  # decoding
  c.data.cache_gb = 1.5  # decoded clips kept in memory
  c.data.labelled_seconds_only = True  # AVS training leaves out seconds without a mask (the release runs them for nothing)
  c.data.questions_per_clip = 1  # questions that share one encoding of their clip; batch_size counts clips then

  c.opt = ConfigDict(
    {  # Adam, decoupled weight decay, one setting per label of phpjax/partition.py
      "shared": {"lr": 3e-4, "weight_decay": 0.0},
      "prompts": {"lr": 3e-4, "weight_decay": 0.0},
      "head": {"lr": 3e-4, "weight_decay": 1e-5},
      "b1": 0.9,
      "b2": 0.999,
      "eps": 1e-8,
      "clip_norm": 0.5,  # of the gradient, per label
      "min_scale": 1 / 300,  # the cosine ends at this share of the rate (3e-4 -> 1e-6)
      "later_shared_scale": 1.0,  # slows the shared parameters down after the first task
    }
  )
  return c


def nano(c: ConfigDict) -> ConfigDict:
  """The embedded data and encoders: minutes on two CPU cores."""
  c.encoders = ConfigDict(
    {m: {"name": f"nano_{kind}", "weights": "shipped"} for m, kind in (("visual", "vit"), ("audio", "ast"), ("text", "text"))}
  )
  c.data.toybox = "default"
  c.data.questions_per_clip = 5
  c.data.cache_gb = 0.5
  c.batch_size, c.eval_batch_size = 8, 16
  c.num_epochs = 1
  c.epoch_factor = ConfigDict({"ave": 2, "avvp": 3, "avs": 10, "avqa": 16})  # avs: one labelled second per clip
  c.compile_effort = 1
  for label in ("shared", "prompts", "head"):
    c.opt[label].lr = 2e-3
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
  c.batch_size, c.eval_batch_size, c.log_every_steps = 2, 4, 1
  c.epoch_factor = ConfigDict(dict.fromkeys(c.epoch_factor, 1))
  c.compile_effort = 0
  return c


def choose(c: ConfigDict, variant: str) -> ConfigDict:
  """Applies a variant; raises ValueError for an unknown one."""
  if variant not in VARIANTS:
    raise ValueError(f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}")
  return {"full": lambda c: c, "toybox": nano, "tiny": tiny}[variant](c)
