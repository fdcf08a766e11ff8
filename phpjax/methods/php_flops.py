"""Operations of a PHP training step by hand: what its matrix products cost, to hold against the compiler's count.

A product [a, b] x [b, c] counts 2 a b c. Norms, activations, softmaxes and the optimizer are left out: 1 to 3 percent at full
size. A frozen weight costs its product once forwards and once backwards (for what flows on), a learned one twice backwards.
"""

from __future__ import annotations

from typing import Any

from phpjax.methods.base import Sizes
from phpjax.methods.php import PHP
from phpjax.methods.php_options import PAIR


def product(rows: float, inner: float, columns: float) -> float:
  """Operations of [rows, inner] x [inner, columns]."""
  return 2.0 * rows * inner * columns


def train_step(method: PHP, task: Any, stems: dict[str, float], batch_size: int, text_tokens: int) -> float:
  """Operations of one step without rematerialisation.

  Args:
    method: sizes and phases.
    task: AVE, ...; event tasks run the class texts through the text tower.
    stems: {modality: operations of the stem of one second}, which nothing differentiates.
    batch_size: clips of `task.seconds` seconds.
    text_tokens: tokens of all class texts together.
  """
  frames = batch_size * task.seconds
  total = frames * sum(stems.values())
  total += frames * (encoder(method, "visual") + encoder(method, "audio"))
  total += sum(frames * adapter(method, m, step) for step in method.shallow for site in SITES for m in method.adapted(site))
  if method.mid:
    tokens = {m: middle_tokens(method, m) for m in PAIR}
    total += len(method.mid) * sum(generator(method, tokens[m], frames) for m in PAIR)
  heads = {"question": question_head, "segmentation": segmentation_head}
  if task.kind == "event":
    return total + 2 * text(method.backbone.text, text_tokens)
  return total + 3 * frames * heads[task.kind](method, task)


SITES = ("attention", "mlp")


def encoder(method: PHP, modality: str) -> float:
  """One second through the frozen layers and back as far as something learns."""
  sizes, learns = getattr(method.backbone, modality), first_gradient(method, modality)
  total = 0.0
  for layer, (width, tokens) in enumerate(zip(sizes.layer_widths, sizes.layer_tokens, strict=True)):
    keys, prompts = keys_of(sizes, layer), prompt_length(method, modality, layer)
    attention = product(tokens, width, 4 * width) + 2 * product(tokens, keys + prompts, width)
    back = product(tokens, width, 4 * width) + 4 * product(tokens, keys + prompts, width)
    mlp = product(tokens, width, 8 * width)
    whole_block = not sizes.uniform  # HTS-AT is adapted behind the block, a ViT between its halves
    total += attention + mlp
    if layer > learns[0]:
      total += back + mlp
    elif layer == learns[0]:
      total += {"input": back + mlp, "attention": 0 if whole_block else mlp}[learns[1]]
    total += 2 * 2 * product(prompts, width, width)  # keys and values, forwards and backwards
    if layer and sizes.layer_widths[layer - 1] != width:
      total += (2 if layer > learns[0] else 1) * product(tokens, 2 * width, width)
  return total


def first_gradient(method: PHP, modality: str) -> tuple[int, str]:
  """The first layer, and the site in it, at which something learned enters a stream."""
  entries = [(step, "attention") for step in method.shallow if modality == "visual" or method.write_back]
  entries += [(step, "input") for step in (*method.mid, *(method.deep if modality == "visual" or method.deep_audio else ()))]
  return min(entries, default=(10**6, "input"))


def keys_of(sizes: Sizes, layer: int) -> int:
  """Keys that a token sees: all, or those of its window of 8 x 8."""
  return sizes.layer_tokens[layer] if sizes.uniform else min(64, sizes.layer_tokens[layer])


def prompt_length(method: PHP, modality: str, layer: int) -> int:
  """Extra keys of a layer; middle prompts of a staged encoder are added, not attended to."""
  if layer in method.mid and getattr(method.backbone, modality).uniform:
    return method.num_mid_prompts // 2
  return method.deep_length if layer in method.deep and (modality == "visual" or method.deep_audio) else 0


def adapter(method: PHP, modality: str, step: int) -> float:
  """One shallow adapter for one second, forwards and backwards; all of it learns."""
  visual = method.backbone.visual
  layer = {"visual": (visual.num_tokens, visual.width), "audio": method.audio_layer(step)}
  (tokens, width), (others, other_width) = layer[modality], layer["audio" if modality == "visual" else "visual"]
  tokens_first = product(tokens, others, other_width) + product(tokens, other_width, width)
  channels_first = product(others, other_width, width) + product(tokens, others, width)
  latents = 4 * product(method.num_latents, width, tokens)
  gates = product(tokens, width, width) + product(tokens, width, width // 2) + 3.5 * product(1, width, width)
  bottleneck = 2 * product(tokens, width, width // method.reduction) / method.groups
  return 3 * (min(tokens_first, channels_first) + latents + gates + bottleneck)


def middle_tokens(method: PHP, modality: str) -> int:
  """Tokens of a second that a generator reads."""
  sizes, width = getattr(method.backbone, modality), method.backbone.visual.width
  return sizes.num_tokens if sizes.uniform else sizes.num_tokens * sizes.width // (16 * width)


def generator(method: PHP, own: int, frames: int) -> float:
  """One middle layer's prompts for `frames` seconds of `own` tokens, forwards and backwards."""
  width, codes = method.backbone.visual.width, method.codebook_size
  both, square = own + codes, lambda tokens: product(tokens, width, width)
  heads = method.backbone.visual.num_heads
  last = 5 * square(1) + 2 * product(heads, width, both) + product(1, width, method.num_mid_prompts * codes)
  last += product(method.num_mid_prompts, codes, width)
  if method.generator_depth == 1:
    return frames * 3 * last
  first = 2 * product(own, both, width) + 2 * product(codes, own, width) + 3 * square(both)
  middle = (method.generator_depth - 2) * (6 * square(both) + 2 * product(both, both, width))
  once = 3 * square(codes) + 2 * product(codes, codes, width)
  # nothing learned stands before the tokens: their first projections have one product backwards, not two
  return 3 * (frames * (first + middle + last) + once) + frames * 2 * 3 * square(own)


def text(sizes: Sizes, tokens: int) -> float:
  """All class texts through the text tower once."""
  return sizes.depth * (product(tokens, sizes.width, 12 * sizes.width))


def question_head(method: PHP, task: Any) -> float:
  """The question head for one second, forwards; the question and the two attentions of one query are next to nothing."""
  visual, audio = method.backbone.visual, method.backbone.audio
  heard, seen = audio.layer_tokens[-1], visual.num_tokens
  mlps = product(heard, audio.layer_widths[-1], visual.width) + product(heard + 2 * seen, visual.width, visual.width)
  return mlps + 2 * product(seen, heard, visual.width) + product(seen, 2 * visual.width, visual.width)


def segmentation_head(method: PHP, task: Any) -> float:
  """The segmentation head for one second, forwards: its convolutions."""
  del method
  head, side = task.head(), round(task.widths.patches**0.5)
  channels = head.width // 2
  total = product(side * side, head.width, channels)
  for wanted in head.channels:
    side *= 2
    total, channels = total + product(side * side, 9 * channels, wanted), wanted
  return total + product(side * side, 9 * channels, head.embed)
