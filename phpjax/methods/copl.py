"""CoPL: collaborative prompt learning for audio-visual tasks (Zhao et al., ACM MM 2024), a re-implementation from the abstract.

PUBLISHED (its abstract, all of the paper that could be read; no code is public): pretrained uni-modal encoders are tuned by
modal-specific prompts, modal-interaction prompts that explore the association between the modalities, and a prompt bank with
mutual coupling that extracts features of the single sample; about 1 percent of additional trainable parameters; trained and
tested on one task at a time, it is no continual method.

NOT KNOWN: encoders, tasks, layers, numbers of prompts, size of the bank, losses, optimizer, ablations, any table.

OURS, all of what follows. In every block l of `blocks`, with tokens X_v, X_a of a second, all prompts fresh in each block:
  modal-specific   P_v [8, D], P_a [8, d]: learned, and never see the other modality.
  interaction      latents Z [4, r] read the partner's tokens, narrowed by its projection D:
                   I_v = Z_v + softmax(Z_v (X_a D_a)' / sqrt r) (X_a D_a); prompts I_v U_v behind a gate tanh(g_v), g_v = 0 at
                   first. The same for audio. The gate stands behind the attention to these prompts, which have a softmax of
                   their own (`Prefix.gate`): a factor on the prompts themselves would be undone by the block's layer norm,
                   and a prompt of zeros is still a key. So at 0 the rest runs as if they were not there.
  instance         one bank for all blocks, slots j with keys k_v, k_a [r] and values V_v, V_a [4, r]. Weights
                   w_v = softmax(cos(mean(X_v D_v), k_v) / 0.1), w_a likewise. Mutual coupling: both take
                   w = (w_v + w_a) / 2, so that slot j means the same in both banks; prompts sum_j w_j V_v_j U_v and
                   sum_j w_j V_a_j U_a. No top-k, no vote over the batch.
All enter as keys and values of kind "input"; in HTS-AT in every window, with zero relative bias. Losses beside the task's:
0.1 (KL(w_v || w_a) + KL(w_a || w_v)) / 2, 0.01 |K K' - I|_F^2 of each bank's unit keys (within reach where M <= r), and
optionally ln M - H(mean w) against slots that no one takes. Heads are the tasks' own, as those of `linear_probe`. Without its
partner a modality has no interaction prompts and takes its own weights.

In sequence (ours too, for the paper has none): every part belongs to its task, so nothing is forgotten and nothing is
transferred, and on one task this is the method above exactly. `shared` names parts that all tasks train on instead.

Parameters of a task without its head, of steps l with widths D_l and d_l, S the sum of D_l + d_l, L blocks:
  msp         P S               P = msp_length
  projections 2 r S             r = rank
  mip         2 L (K r + 1)     K = num_latents, and a gate
  bank        2 M r (1 + K')    M = num_slots, K' = instance_length
0 for a part that is switched off; without mip and bank there are no projections.
CLIP ViT-B/32 and HTS-AT, S = 13632: 109,056 + 872,448 + 3,096 + 5,120 = 989,720, 0.85 percent of all.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from phpjax.methods import copl_modules as modules
from phpjax.methods.base import Method, Tree
from phpjax.methods.prompts import Prefix

PAIR = ("visual", "audio")
PARTS = ("msp", "projections", "mip", "bank")


@dataclasses.dataclass(frozen=True)
class CoPL(Method):
  """Collaborative prompts: modal-specific, modal-interaction, and of the instance, from a coupled bank.

  Raises ValueError for options that do not fit one another or the encoders.

  Attributes:
    blocks: the steps that carry prompts.
    msp, mip, bank: whether there are modal-specific, interaction and instance prompts.
    coupling: whether the two modalities' weights on the bank are averaged and drawn to each other; else each takes its own.
    msp_length, num_latents, instance_length: prompts of each kind in a block, for each modality.
    rank: width in which the modalities meet.
    num_slots, temperature: of the bank.
    coupling_weight, orthogonality_weight, entropy_weight: of the losses; 0 leaves one out.
    shared: parts (of msp, projections, mip, bank) that all tasks train on; the others belong to a task.
    shuffle_audio: at test, interaction and coupling pair each clip's vision with the sound of the next clip of the batch and
      its sound with the vision of the one before, while heads read the clips as they are. What the score loses is what the
      interaction was worth. A batch of one clip has no other.
  """

  blocks: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)
  msp: bool = True
  mip: bool = True
  bank: bool = True
  coupling: bool = True
  msp_length: int = 8
  num_latents: int = 4
  instance_length: int = 4
  rank: int = 32
  num_slots: int = 16
  temperature: float = 0.1
  coupling_weight: float = 0.1
  orthogonality_weight: float = 0.01
  entropy_weight: float = 0.0
  shared: tuple[str, ...] = ()
  shuffle_audio: bool = False

  def __post_init__(self) -> None:
    problems = []
    if missing := [m for m in PAIR if m not in self.backbone.present()]:
      problems.append(f"needs encoders for {', '.join(missing)}")
    elif outside := [step for step in self.blocks if not 0 <= step < self.depth]:
      problems.append(f"has prompts in layer {max(outside)}, the encoders have {self.depth} layers")
    if twice := sorted({step for step in self.blocks if self.blocks.count(step) > 1}):
      problems.append(f"names layer {twice[0]} more than once in blocks")
    sizes = ("msp_length", "num_latents", "instance_length", "rank", "num_slots")
    problems += [f"{name}={getattr(self, name)} must be 1 or more" for name in sizes if getattr(self, name) < 1]
    weights = ("coupling_weight", "orthogonality_weight", "entropy_weight")
    problems += [f"{name}={getattr(self, name)} must not be negative" for name in weights if getattr(self, name) < 0]
    if not self.temperature > 0:
      problems.append(f"temperature={self.temperature} must be above 0")
    if unknown := [part for part in self.shared if part not in PARTS]:
      problems.append(f"shares {', '.join(map(str, unknown))}, which is not one of {', '.join(PARTS)}")
    if problems:
      raise ValueError("method copl " + "; ".join(problems))

  @property
  def depth(self) -> int:
    """Steps: layers of the shallower encoder; a deeper one takes several at each."""
    return min(getattr(self.backbone, m).depth for m in PAIR)

  def width(self, modality: str, step: int) -> int:
    """Channels of the tokens whose attention a step's prompts join; see `model.layer_map`."""
    sizes = getattr(self.backbone, modality)
    return sizes.layer_widths[sizes.depth // self.depth * (step + 1) - 1]

  # -- parameters ----------------------------------------------------------------------------------------------

  def init_shared(self, rng: jax.Array) -> Tree:
    """The parts that `shared` names, {part: as in `init_parts`}."""
    return {part: tree for part, tree in self.init_parts(rng).items() if part in self.shared}

  def init_task(self, rng: jax.Array, task: Any, previous: Tree | None) -> Tree:
    """The other parts, fresh: nothing comes from the task before."""
    del task, previous
    return {part: tree for part, tree in self.init_parts(rng).items() if part not in self.shared}

  def init_parts(self, rng: jax.Array) -> Tree:
    """All that is switched on, float32: {"msp", "projections", "mip": {step: {modality: ...}}, "bank": {modality: ...}}.

    Modal-specific prompts as VPT draws its own (arXiv 2203.12119), U(-b, b) with b = sqrt(6 / (3 p^2 + D)) of patches p: here
    3 p^2 = D, as in a ViT-B/16. Projections, keys and values N(0, 1 / fan in), latents N(0, 0.02^2), gates 0.
    """
    if not self.blocks:
      return {}
    r, parts = self.rank, {}
    rng_msp, rng_projections, rng_latents, rng_bank = jax.random.split(rng, 4)
    each = lambda make: {f"step_{s}": {m: make(self.width(m, s)) for m in PAIR} for s in self.blocks}
    if self.msp:
      uniform = functools.partial(jax.random.uniform, minval=-1, maxval=1)
      drawn = modules.draw(uniform, rng_msp, each(lambda width: (self.msp_length, width)))
      parts["msp"] = jax.tree.map(lambda x: x * (3 / x.shape[-1]) ** 0.5, drawn)
    if self.mip or self.bank:
      drawn = modules.draw(jax.random.normal, rng_projections, each(lambda width: {"down": (width, r), "up": (r, width)}))
      parts["projections"] = jax.tree.map(lambda x: x * x.shape[0] ** -0.5, drawn)
    if self.mip:
      drawn = modules.draw(jax.random.normal, rng_latents, each(lambda _: (self.num_latents, r)))
      parts["mip"] = jax.tree.map(lambda x: {"latents": 0.02 * x, "gate": jnp.zeros(())}, drawn)
    if self.bank:
      slots = {"keys": (self.num_slots, r), "values": (self.num_slots, self.instance_length, r)}
      drawn = modules.draw(jax.random.normal, rng_bank, dict.fromkeys(PAIR, slots))
      parts["bank"] = jax.tree.map(lambda x: x * r**-0.5, drawn)
    return parts

  def uses(self, task: Any) -> tuple[str, ...]:
    """The shared parts that are switched on."""
    del task
    on = {"msp": self.msp, "projections": self.mip or self.bank, "mip": self.mip, "bank": self.bank}
    return tuple(part for part in PARTS if on[part] and part in self.shared and self.blocks)

  # -- inside the encoders -------------------------------------------------------------------------------------

  def start(
    self,
    task: Any,
    trainable: Tree,
    frozen: Tree,
    state: Tree,
    past: Tree | None,
    streams: Tree,
    *,
    query: Tree | None,
    mask: jax.Array | None,
    rng: jax.Array | None,
    train: bool,
  ) -> Tree:
    """Gathers the parts; at test, whose sound each clip's vision is paired with."""
    del state, past, query, rng
    pairing = None
    if self.shuffle_audio and not train and all(m in streams for m in PAIR):
      rows = len(streams["visual"].tokens)
      clips = rows // task.seconds if mask is None else len(mask)
      follows = modules.next_real(jnp.ones(clips) if mask is None else mask)
      of_rows = lambda clip: (clip[:, None] * (rows // clips) + jnp.arange(rows // clips)).reshape(-1)
      pairing = {"visual": of_rows(follows), "audio": of_rows(jnp.argsort(follows))}
    parts = {**frozen["shared"], **trainable["shared"], **trainable["task"]["prompts"]}
    return {"parts": parts, "pairing": pairing, "prefixes": {}, "routing": ()}

  def observe(self, context: Tree, step: int, streams: Tree) -> Tree:
    """Makes the prompts of this step from its tokens, and keeps how the rows were routed, for the losses."""
    tokens = {m: streams[m].tokens for m in PAIR if m in streams}
    if step not in self.blocks or not tokens:
      return {**context, "prefixes": {}}
    params = {part: tree if part == "bank" else tree[f"step_{step}"] for part, tree in context["parts"].items()}
    kept = jax.checkpoint if self.remat else lambda f: f
    prefixes, weights = kept(self.prompts)(params, tokens, context["pairing"])
    return {**context, "prefixes": prefixes, "routing": (*context["routing"], weights)}

  def prefix(self, context: Tree, step: int) -> Tree:
    """What `observe` has made."""
    del step
    return context["prefixes"]

  def prompts(self, params: Tree, tokens: Tree, pairing: Tree | None) -> tuple[Tree, Tree]:
    """The prompts of a block.

    Args:
      params: {part: {modality: ...}} of the block.
      tokens: {modality: [B, N, D]}, as the block's attention is about to read them.
      pairing: {modality: int32 [B], the partner's row that each row reads}, None: its own.

    Returns:
      {modality: Prefix}, {modality: its own weights on the bank [B, M]}, empty without a bank.
    """
    partner = lambda x, m: x if pairing is None else x[pairing[m]]
    projections, bank = params.get("projections"), params.get("bank")
    low = {m: modules.narrow(x, projections[m]["down"]) for m, x in tokens.items()} if projections else {}
    weights = {m: modules.route(x, bank[m]["keys"], self.temperature) for m, x in low.items()} if bank else {}
    prefixes = {}
    for m, x in tokens.items():
      prompts, num_gated = [], 0
      if "msp" in params:
        prompts.append(jnp.broadcast_to(params["msp"][m], (len(x), *params["msp"][m].shape)))
      if bank:
        coupled = self.coupling and other(m) in weights
        taken = (weights[m] + partner(weights[other(m)], m)) / 2 if coupled else weights[m]
        prompts.append(modules.mix(taken, bank[m]["values"]) @ projections[m]["up"])
      if "mip" in params and other(m) in low:
        read = modules.read_partner(params["mip"][m]["latents"], partner(low[other(m)], m))
        prompts.append(read @ projections[m]["up"])
        num_gated = self.num_latents
      if prompts:
        extra = jnp.concatenate(prompts, axis=1)  # the gated ones last
        gate = jnp.tanh(params["mip"][m]["gate"]) if num_gated else None
        prefixes[m] = Prefix(extra, extra, "input", gate, num_gated)
    return prefixes, weights

  # -- losses --------------------------------------------------------------------------------------------------

  def losses(self, task: Any, context: Tree, features: Tree, outputs: Tree, batch: Tree) -> Tree:
    """Of the bank: "coupling", "orthogonality", "entropy", those whose weight is not 0."""
    del task, features, outputs
    if not context["routing"] or not context["routing"][0]:
      return {}
    weights = {m: jnp.stack([w[m] for w in context["routing"]]) for m in context["routing"][0]}  # [L, B T, M]
    rows = next(iter(weights.values())).shape[1]
    real = jnp.repeat(batch["mask"], rows // len(batch["mask"]))
    found = {}
    if self.coupling and self.coupling_weight and len(weights) == len(PAIR):
      found["coupling"] = self.coupling_weight * modules.coupling(*(weights[m] for m in PAIR), real)
    if self.orthogonality_weight:
      keys = [context["parts"]["bank"][m]["keys"] for m in weights]
      found["orthogonality"] = self.orthogonality_weight * sum(map(modules.orthogonality, keys))
    if self.entropy_weight:
      found["entropy"] = self.entropy_weight * sum(modules.collapse(w, real) for w in weights.values())
    return found


def other(modality: str) -> str:
  """The partner of a modality."""
  return "audio" if modality == "visual" else "visual"
