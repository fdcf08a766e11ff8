"""What compat decides, in one table; how options, rates and variants of a config come out of it."""

import math
import re

import pytest
import small

from configs import base, ewc, finetune, joint, linear_probe, lwf, php_avqa
from phpjax import checks, compat, workdir
from phpjax.benchmarks import BENCHMARKS
from phpjax.encoders.vit import STATISTICS
from phpjax.errors import UserError
from phpjax.methods import METHODS, php_options

PHP_CONFIGS = {"php": php_avqa, "finetune": finetune, "ewc": ewc, "lwf": lwf, "joint": joint}
WORDS = {"True": True, "False": False, **{str(n): n for n in range(10)}}


def flat(config):
  return workdir.flatten(workdir.plain(config))


def set_option(config, name, value):
  node, field = compat._place(config, name)
  node[field] = value
  return config


# -- the table ---------------------------------------------------------------------------------------------------


def test_the_table_of_the_docstring_is_the_one_that_counts():
  head, *lines = [line for line in compat.__doc__.splitlines() if line.startswith("  ")]
  starts = [head.index(word) for word in ("option", "paper", "released", "quirk", "what")]
  rows = [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for line in lines]
  assert [row[0] for row in rows] == list(compat.OPTIONS), "the same options in the same order"
  for name, paper, released, quirks, reason in rows:
    read = [WORDS.get(word, word) for word in (paper, released)]
    assert read == [compat.OPTIONS[name].paper, compat.OPTIONS[name].released], name
    assert [type(value) for value in read] == [type(value) for value in compat.OPTIONS[name][:2]], name
    assert re.fullmatch(r"\d+( \d+)*", quirks) and len(reason) > 15, name
    for other in (value for value in compat.OPTIONS[name].others if not isinstance(value, bool)):
      assert other in reason, f"{name}: what {other} does"


@pytest.mark.parametrize("name", PHP_CONFIGS)
def test_the_options_are_what_the_full_config_leaves_empty(name):
  config = PHP_CONFIGS[name].get_config()
  assert {field for field, value in flat(config).items() if value is None} == set(compat.OPTIONS)
  for option, (paper, released, *_) in compat.OPTIONS.items():
    node, field = compat._place(config, option)
    assert node.get_type(field) is type(paper) is type(released), option


def test_the_values_are_those_that_the_parts_know():
  for option, known in php_options.CHOICES.items():
    assert set(compat.OPTIONS[f"method.{option}"].choices) == set(known), option
  assert set(compat.OPTIONS["protocol.avvp"].choices) == set(BENCHMARKS["avvp"].protocols)
  assert set(compat.OPTIONS["encoders.visual.statistics"].choices) == set(STATISTICS)
  assert {name for name, benchmark in BENCHMARKS.items() if benchmark.protocols} == set(base.base().protocol)


# -- resolving ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", compat.MODES)
@pytest.mark.parametrize("name", PHP_CONFIGS)
def test_compat_fills_what_is_empty(name, mode):
  config = PHP_CONFIGS[name].get_config()
  config.method.compat = mode
  found = flat(compat.resolve(config))
  assert {option: found[option] for option in compat.OPTIONS} == {k: getattr(v, mode) for k, v in compat.OPTIONS.items()}
  assert config.method.write_back is None, "the config that was given stays as it is"


@pytest.mark.parametrize("option", compat.OPTIONS)
def test_each_option_can_be_set_alone(option):
  for mode in compat.MODES:
    for value in compat.OPTIONS[option].choices:
      config = php_avqa.get_config()
      config.method.compat = mode
      plain = flat(compat.resolve(config))
      found = flat(compat.resolve(set_option(config, option, value)))
      assert found[option] == value
      others = {field for field in found if found[field] != plain[field]} - {option}
      assert others <= ({"method.deep_pool"} if option == "method.deep_select" else set())


@pytest.mark.parametrize(("select", "pool"), [("task", 1), ("key_majority", 3)])
def test_the_pool_suits_how_it_is_chosen_from(select, pool):
  for mode in compat.MODES:
    config = set_option(php_avqa.get_config("tiny"), "method.compat", mode)
    assert compat.resolve(set_option(config, "method.deep_select", select)).method.deep_pool == pool
  assert compat.resolve(set_option(config, "method.deep_pool", 5)).method.deep_pool == 5


def test_resolving_twice_changes_nothing():
  for config in (php_avqa.get_config(v) for v in ("full", "toybox", "released")):
    once = compat.resolve(config)
    assert flat(compat.resolve(once)) == flat(once)


def test_an_unknown_compat_is_named():
  config = set_option(php_avqa.get_config("tiny"), "method.compat", "publshed")
  with pytest.raises(UserError, match=r"publshed.*'paper', 'released'"):
    compat.resolve(config)


def test_other_methods_and_encoders_leave_options_out():
  found = compat.resolve(linear_probe.get_config())
  assert "write_back" not in found.method and found.opt.decay == "decoupled" and found.protocol.avvp == "official"
  config = set_option(linear_probe.get_config(), "encoders.audio.name", "ast_base")
  assert "mel_source" not in compat.resolve(config).encoders.audio
  config = set_option(config, "encoders.audio.mel_source", "rate")  # asked for by the user: `checks` says what is wrong
  assert compat.resolve(config).encoders.audio.mel_source == "rate"
  assert all("statistics" not in compat.resolve(php_avqa.get_config(v)).encoders.visual for v in ("toybox", "tiny"))


def test_a_config_that_is_no_experiment_is_left_to_the_checks():
  from configs import nano

  assert checks.problems(compat.resolve(nano.get_config("tiny")))[0].startswith("--config is no experiment")


def test_two_configs_share_no_option():
  first, second = php_avqa.get_config("tiny"), php_avqa.get_config("tiny")
  first.method.write_back = False
  assert second.method.write_back is None


@pytest.mark.parametrize("mode", compat.MODES)
@pytest.mark.parametrize("name", METHODS)
def test_every_mode_passes_the_checks_with_the_toybox(name, mode):
  config = small.config_of(name, "toybox")
  assert checks.problems(compat.resolve(set_option(config, "method.compat", mode))) == []


# -- rates -------------------------------------------------------------------------------------------------------


def rates(config):
  return {label: compat.resolve(config).opt[label].lr for label in ("shared", "prompts", "head")}


@pytest.mark.parametrize(("rule", "factor"), [("none", 1), ("sqrt", math.sqrt(24)), ("linear", 24)])
def test_rates_grow_with_the_batch(rule, factor):
  config = php_avqa.get_config()
  config.opt.lr_scaling, config.batch_size, config.opt.head.lr = rule, 48, 1e-3
  assert rates(config) == pytest.approx({"shared": 3e-4 * factor, "prompts": 3e-4 * factor, "head": 1e-3 * factor})


def test_the_rates_of_the_variants():
  assert rates(php_avqa.get_config()) == pytest.approx(dict.fromkeys(("shared", "prompts", "head"), 1.2e-3))
  assert rates(php_avqa.get_config("released")) == dict.fromkeys(("shared", "prompts", "head"), 3e-4)
  for size in ("toybox", "tiny", "released_toybox"):
    assert rates(php_avqa.get_config(size)) == dict.fromkeys(("shared", "prompts", "head"), 2e-3), "to the last bit"


# -- variants ----------------------------------------------------------------------------------------------------


def test_the_release_trains_as_it_was_published():
  config = compat.resolve(php_avqa.get_config("released"))
  assert (config.batch_size, config.num_epochs, set(config.epoch_factor.values())) == (2, 10, {1})
  assert {config.opt[label].weight_decay for label in ("shared", "prompts", "head")} == {1e-5}
  assert (config.opt.decay, config.opt.clip, config.opt.clip_norm, config.opt.later_shared_scale) == ("l2", "global", 0.5, 1)
  assert 3e-4 * config.opt.min_scale == pytest.approx(1e-6)
  assert not config.data.labelled_seconds_only and config.data.questions_per_clip == 1
  assert {entry: encoder.name for entry, encoder in config.encoders.items()} == {
    "visual": "clip_vit_b32",
    "audio": "htsat_tiny",
    "text": "clip_text_b32",
    "audio_text": "roberta_base",
  }


def test_the_release_on_the_toybox_differs_in_compat_decay_mirroring_and_the_epoch_that_counts():
  ours, theirs = (flat(compat.resolve(php_avqa.get_config(v))) for v in ("toybox", "released_toybox"))
  differing = {field for field in ours if ours[field] != theirs[field]}
  decay = {f"opt.{label}.weight_decay" for label in ("shared", "prompts")}
  assert not len(theirs["data.mirrored"]) and len(ours["data.mirrored"])
  assert (ours["data.selection_split"], theirs["data.selection_split"]) == ("val", "")
  assert differing - decay - {"method.compat", "data.mirrored", "data.selection_split"} == {
    o for o, v in compat.OPTIONS.items() if v.paper != v.released
  }


@pytest.mark.parametrize(
  ("variant", "field", "value"),
  [
    ("reversed", "tasks", ["avqa", "avs", "avvp", "ave"]),
    ("released+ave_avvp_avqa", "tasks", ["ave", "avvp", "avqa"]),
    ("toybox+ave_avqa_avvp", "tasks", ["ave", "avqa", "avvp"]),
    ("toybox+no_shallow", "method.shallow", []),
    ("toybox+no_middle", "method.mid", []),
    ("toybox+no_deep", "method.deep", []),
    ("full+shallow_0_3", "method.shallow", [0, 1, 2, 3]),
    ("toybox+middle_3_3", "method.mid", [3]),
    ("deep_5_8", "method.deep", [5, 6, 7, 8]),
    ("deep_length_20", "method.deep_length", 20),
    ("ast", "encoders.audio.name", "ast_base"),
  ],
)
def test_a_change_is_one_field(variant, field, value):
  size = variant.split("+")[0] if variant.split("+")[0] in base.PHP_SIZES else "full"
  before, after = flat(php_avqa.get_config(size)), flat(php_avqa.get_config(variant))
  assert {k: v for k, v in after.items() if v != before[k]} == {field: value}


@pytest.mark.parametrize(("word", "kept"), [("shallow", "shallow"), ("middle", "mid"), ("deep", "deep")])
def test_a_phase_alone(word, kept):
  method = php_avqa.get_config(f"toybox+only_{word}").method
  assert [phase for phase in ("shallow", "mid", "deep") if method[phase]] == [kept]


def test_changes_add_up():
  config = finetune.get_config("toybox+reversed+no_shallow+deep_length_2")
  assert config.tasks[0] == "avqa" and config.method.shallow == () and config.method.deep_length == 2
  config = php_avqa.get_config("released+clip_b16")
  assert (config.encoders.visual.name, config.encoders.text.name) == ("clip_vit_b16", "clip_text_b16")


@pytest.mark.parametrize("wrong", ["huge", "", "toybox+", "toybox+no_depth", "toybox+tiny", "deep_length_0", "shallow_3_1"])
def test_an_unknown_variant_names_all_there_are(wrong):
  with pytest.raises(ValueError, match=r"unknown variant .*released_toybox.*reversed.*clip_b16.*only_PHASE") as error:
    php_avqa.get_config(wrong)
  assert "\n" not in str(error.value)


def test_variants_that_do_not_fit():
  with pytest.raises(ValueError, match="'ast' changes encoders of full size"):
    php_avqa.get_config("toybox+ast")
  with pytest.raises(ValueError, match="unknown variant 'no_deep'"):
    linear_probe.get_config("toybox+no_deep")
  with pytest.raises(ValueError, match="unknown variant 'released'"):
    linear_probe.get_config("released")
  with pytest.raises(ValueError, match="'short' shortens the toybox's runs"):
    linear_probe.get_config("short")
  assert linear_probe.get_config("toybox+reversed").tasks[-1] == "ave"


@pytest.mark.parametrize("name", METHODS)
def test_short_runs_differ_in_the_method_and_nothing_else(name):
  config = small.config_of(name, "toybox+short")
  plain = linear_probe.get_config("toybox+short")
  for field in ("epoch_factor", "num_epochs", "batch_size", "eval_batch_size", "data", "seed", "task_id"):
    assert config[field] == plain[field], field
  rates = {label: config.opt[label].lr for label in ("shared", "prompts", "head")}
  assert rates == {"shared": 2e-3, "prompts": 2e-3, "head": 5e-3}


def test_every_variant_that_the_config_shows_is_one():
  shown = re.findall(r"^  (\S+(?:, \S+)*) {2,}", php_avqa.__doc__, re.MULTILINE)
  words = [word for line in shown for word in line.split(", ") if "PHASE" not in word and "..." not in word]
  assert set(base.PHP_SIZES) | set(base.ORDERS) | set(base.ENCODERS) <= set(words)
  for word in words:
    php_avqa.get_config(word)
