"""How many parameters each method trains, without heads: what is built against the formula of its docstring."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest
import small

from phpjax import compat, experiment, partition
from phpjax.methods import METHODS

PAIR = ("visual", "audio")
PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "methods.md"


def dense(n_in, n_out):
  return (n_in + 1) * n_out


def widths(method, steps):
  """{modality: sum of channels over these steps}; a tower of more layers takes several per step."""
  of = {m: getattr(method.backbone, m) for m in PAIR}
  count = min(sizes.depth for sizes in of.values())
  last = lambda sizes, step: sizes.layer_widths[sizes.depth // count * (step + 1) - 1]
  return {m: sum(last(sizes, step) for step in steps) for m, sizes in of.items()}


def nothing(method):
  return {}, {}


def adapter(method, tokens, width, other_tokens, other_width, gated):
  half, narrow = width // 2, width // method.reduction
  maps = dense(other_tokens, tokens) + dense(other_width, width)
  gates = 2 * dense(width, width) + 3 * dense(width, half) + dense(half, width) + dense(half, 1) + dense(width, 1)
  return maps + method.num_latents * width + 1 + gates + 2 * width * narrow // method.groups + 4 * width + gated


def php(method):
  backbone, width = method.backbone, method.backbone.visual.width
  visual, audio, text = (backbone.visual.num_tokens, width), backbone.audio, {"visual": backbone.text}
  text["audio"], steps = backbone.audio_text or backbone.text, min(backbone.visual.depth, audio.depth)
  embed, adapters = {m: text[m].embed_dim for m in PAIR}, 0
  for step in method.shallow:
    layer = audio.depth // steps * (step + 1) - 1
    heard = audio.layer_tokens[layer], audio.layer_widths[layer]
    adapters += 2 * adapter(method, *visual, *heard, True) + (1 + method.write_back) * adapter(
      method, *heard, *visual, method.gate_audio
    )
  shared = {
    "adapters": adapters,
    "context": method.num_context * backbone.text.width,
    **dict.fromkeys(("clip_adapter", "clip_adapter_text"), 2 * embed["visual"] * (embed["visual"] // 4)),
    "contrastive": dense(embed["audio"], embed["visual"]),
    "maps": sum(getattr(backbone, m).embed_dim * embed[m] + 1 for m in PAIR if not getattr(backbone, m).joint),
  }
  block = 3 * width * width + 3 * dense(width, width) + 4 * width
  generator = method.generator_depth * block + dense(width, method.num_mid_prompts * method.codebook_size)
  mid = method.codebook_size * width + 2 * dense(width, width) + len(method.mid) * generator
  deep = sum(n for m, n in widths(method, method.deep).items() if m == "visual" or method.deep_audio)
  own = {"mid": mid if method.mid else 0, "deep": 2 * method.deep_pool * method.deep_length * deep}
  return shared, own


def finetune(method):
  shared, own = php(method)
  return {**shared, "prompts": sum(own.values())}, {}


def copl(method):
  total, blocks = sum(widths(method, method.blocks).values()), len(method.blocks)
  parts = {
    "msp": method.msp * method.msp_length * total,
    "projections": (method.mip or method.bank) * 2 * method.rank * total,
    "mip": method.mip * 2 * blocks * (method.num_latents * method.rank + 1),
    "bank": method.bank * 2 * method.num_slots * method.rank * (1 + method.instance_length),
  }
  shared = {part: n for part, n in parts.items() if part in method.shared}
  return shared, {part: n for part, n in parts.items() if part not in shared}


def embeds(method):
  return {m: getattr(method.backbone, m).embed_dim for m in PAIR}


def l2p(method):
  first, embed = widths(method, (0,)), embeds(method)
  return {m: method.pool_size * (method.length * first[m] + embed[m]) for m in PAIR}, {}


def dualprompt(method):
  general, expert, embed = widths(method, method.general), widths(method, method.expert), embeds(method)
  own = {m: 2 * method.expert_length * expert[m] + embed[m] for m in PAIR}
  return {m: 2 * method.general_length * general[m] for m in PAIR}, own


def coda_prompt(method):
  total, embed = widths(method, method.steps), embeds(method)
  each = {m: method.length * total[m] + 2 * embed[m] * len(method.steps) for m in PAIR}
  return {}, {m: method.components_per_task * n for m, n in each.items()}


def s_prompts(method):
  return {}, {m: method.length * n for m, n in widths(method, (0,)).items()}


def aper(method):
  total = widths(method, range(min(getattr(method.backbone, m).depth for m in PAIR)))
  return {m: method.length * total[m] for m in method.modalities}, {}


# method -> ({part: parameters of all tasks}, {part: parameters of a task}), parts as they stand in the trees
FORMULAS = {
  "linear_probe": nothing,
  "finetune": finetune,
  "ewc": finetune,
  "lwf": finetune,
  "joint": finetune,
  "php": php,
  "copl": copl,
  "zero_shot": nothing,
  "ncm": nothing,
  "slda": nothing,
  "aper": aper,
  "l2p": l2p,
  "dualprompt": dualprompt,
  "coda_prompt": coda_prompt,
  "s_prompts": s_prompts,
}
SHARED, OF_A_TASK = 12_804_456, 35_419_648  # of PHP
FULL = {  # (shared, per task) with CLIP ViT-B/32 and HTS-AT
  **dict.fromkeys(("linear_probe", "zero_shot", "ncm", "slda"), (0, 0)),
  **dict.fromkeys(("finetune", "ewc", "lwf", "joint"), (SHARED + OF_A_TASK, 0)),
  "php": (SHARED, OF_A_TASK),
  "copl": (0, 109_056 + 872_448 + 3_096 + 5_120),
  "l2p": (10 * (5 * 768 + 512) + 10 * (5 * 96 + 512), 0),
  "dualprompt": (2 * 5 * (2 * 768 + 96 + 96), 2 * 20 * (3 * 768 + 192 + 192 + 384) + 2 * 512),
  "coda_prompt": (0, 25 * (8 * (5 * 768 + 96 + 96 + 192 + 192 + 384) + 2 * 5 * (2 * 512))),
  "s_prompts": (0, 10 * (768 + 96)),
  "aper": (10 * (12 * 768 + 2 * 96 + 2 * 192 + 6 * 384 + 2 * 768), 0),
}


def built(method):
  """({part: count} that is shared, of a task), all of it float32."""
  shapes = lambda init: jax.eval_shape(lambda: init(jax.random.key(0)))
  trees = shapes(method.init_shared), shapes(lambda rng: method.init_task(rng, small.task("ave"), None))
  assert {x.dtype for x in jax.tree.leaves(trees)} <= {jnp.dtype(jnp.float32)}
  return tuple({part: partition.count(tree) for part, tree in of.items()} for of in trees)


def by_formula(name, method):
  return tuple({part: n for part, n in of.items() if n} for of in FORMULAS[name](method))


def full(name, variant="full"):
  """The method at full size; no weight is read."""
  config = compat.resolve(small.config_of(name, variant))
  return experiment.method_of(config, experiment.modules_of(config))


def test_every_method_has_a_formula():
  assert FORMULAS.keys() == METHODS.keys()


@pytest.mark.parametrize("name", METHODS)
def test_every_docstring_says_how_many(name):
  kinds = [kind for kind in METHODS[name].__mro__ if kind.__module__.startswith("phpjax")]
  said = f"{kinds[0].__doc__} {sys.modules[kinds[0].__module__].__doc__}"
  assert "Parameters" in said or "0 trainable parameters" in said


OPTIONS = {
  "php": [
    {"shallow": (0, 1), "mid": (), "generator_depth": 2, "num_latents": 2, "groups": 1},
    {"shallow": (), "mid": (0, 1), "generator_depth": 2, "num_context": 3},
    {"mid": (0,), "deep": (1, 2), "deep_length": 3, "write_back": False, "gate_audio": False},
    {"deep_audio": False, "deep_select": "key_majority", "deep_pool": 3, "deep": (1, 2), "mid": ()},
  ],
  "finetune": [{"shallow": (0, 1), "mid": ()}],
  "copl": [
    {"rank": 3, "num_slots": 5},
    {"blocks": (1,), "msp_length": 7},
    {"num_latents": 2, "instance_length": 1},
    *({part: False} for part in ("msp", "mip", "bank")),
    {"mip": False, "bank": False},
    {"shared": ("bank", "msp")},
  ],
  "l2p": [{"pool_size": 7, "length": 1}],
  "dualprompt": [{"general": (), "expert": (0, 1, 2)}, {"general_length": 1, "expert_length": 2}],
  "coda_prompt": [{"steps": (0, 1, 2), "length": 2, "components_per_task": 3}],
  "s_prompts": [{"length": 1}],
  "aper": [{"length": 3, "merge": False}, {"modalities": ("audio",)}],
}
CASES = [(name, options) for name in METHODS for options in ({}, *OPTIONS.get(name, ()))]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_parameter_counts_follow_the_formula(name, options):
  method = small.method_of(name, **options)
  assert built(method) == by_formula(name, method)


@pytest.mark.parametrize("name", METHODS)
def test_they_do_so_at_full_size(name):
  method = full(name)
  found = built(method)
  assert found == by_formula(name, method)
  assert tuple(sum(of.values()) for of in found) == FULL[name]


@pytest.mark.parametrize("name", METHODS)
def test_the_page_of_methods_says_so(name):
  rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("|")]
  assert [row[1:] for row in rows if len(row) == 3 and f"`{name}`" in row[0]][-1] == [f"{n:,}" for n in FULL[name]]


@pytest.mark.parametrize(("name", "variant"), [("php", "released"), ("php", "ast"), ("copl", "ast"), ("copl", "clip_b16")])
def test_variants_of_full_size_follow_it_too(name, variant):
  method = full(name, variant)
  found = built(method)
  assert found == by_formula(name, method)
  assert ("maps" in found[0]) == ((name, variant) == ("php", "ast")), "AST shares no space with text"
