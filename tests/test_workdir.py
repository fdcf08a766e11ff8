"""A workdir belongs to one config; its files are never half written."""

import json
import os
import pathlib
import stat

import pytest

from configs import php_avqa
from phpjax import manifest, workdir
from phpjax.errors import UserError


def config(variant="tiny", **changes):
  c = php_avqa.get_config(variant)
  with c.unlocked():
    c.update_from_flattened_dict(changes)
  return c


def test_a_workdir_remembers_its_config(tmp_path):
  folder = tmp_path / "new" / "run"
  workdir.claim(folder, config())
  stored = workdir.read_json(folder / "config.json")
  assert (
    stored["method"]["name"] == "php"
    and stored["tasks"] == ["ave", "avvp", "avs", "avqa"]
    and stored["opt"]["head"]["lr"] == 2e-3
  )
  workdir.claim(folder, config())  # and takes it again


def test_another_config_is_refused_and_named(tmp_path):
  workdir.claim(tmp_path, config())
  before = (tmp_path / "config.json").read_bytes()
  with pytest.raises(UserError) as error:
    workdir.claim(tmp_path, config(**{"opt.head.lr": 0.5, "seed": 3}))
  text = str(error.value)
  assert "opt.head.lr (there 0.002, now 0.5)" in text and "seed (there 0, now 3)" in text and str(tmp_path) in text
  assert "\n" not in text
  assert (tmp_path / "config.json").read_bytes() == before


@pytest.mark.parametrize(
  "change",
  [
    {"seed": 1},
    {"batch_size": 4},
    {"tasks": ("ave",)},
    {"method.shallow": ()},
    {"encoders.audio.name": "nano_ast"},
    {"num_epochs": 2},
    {"data.toybox_seed": 1},
    {"opt.b1": 0.8},
  ],
)
def test_whatever_decides_the_result_is_compared(tmp_path, change):
  workdir.claim(tmp_path, config())
  with pytest.raises(UserError, match=next(iter(change))):
    workdir.claim(tmp_path, config(**change))


def test_a_field_that_is_missing_on_one_side_differs(tmp_path):
  workdir.claim(tmp_path, config())
  stored = workdir.read_json(tmp_path / "config.json")
  del stored["method"]["mid"]
  workdir.write_json(tmp_path / "config.json", stored)
  with pytest.raises(UserError, match=r"method\.mid"):
    workdir.claim(tmp_path, config())


def test_fields_that_only_say_where_and_how_may_differ(tmp_path):
  workdir.claim(tmp_path, config("full"))
  values = {
    "resume": False,
    "mesh": (2, 1),
    "log_every_steps": 7,
    "save_every_steps": 3,
    "on_nonfinite": "skip",
    "watchdog_minutes": 0.0,
    "data.root": "elsewhere",
    "data.num_threads": 9,
    "data.num_workers": 3,
    "data.cache_gb": 0.1,
    "data.query_cache": "elsewhere",
    "data.on_bad_clip": "skip",
    "encoders.visual.weights": "elsewhere",
    "encoders.audio.weights": "elsewhere",
    "encoders.text.weights": "elsewhere",
    "encoders.audio_text.weights": "elsewhere",
  }
  assert set(values) == set(workdir.ELSEWHERE), "a new field needs a line in this test"
  fields = workdir.flatten(workdir.plain(config("full")))
  assert set(workdir.ELSEWHERE) <= set(fields), "every rule matches a field"
  other = config("full", **values)
  before = (tmp_path / "config.json").read_bytes()
  workdir.claim(tmp_path, other)
  assert (tmp_path / "config.json").read_bytes() == before, "the run may yet be refused"
  workdir.update(tmp_path, other)
  assert workdir.read_json(tmp_path / "config.json")["data"]["root"] == "elsewhere", "who loads the run looks there"
  written = (tmp_path / "config.json").stat().st_mtime_ns
  workdir.update(tmp_path, other)
  assert (tmp_path / "config.json").stat().st_mtime_ns == written, "the same again writes nothing"


def test_a_workdir_that_cannot_be_one_is_refused(tmp_path):
  (tmp_path / "file").write_text("x")
  with pytest.raises(UserError, match="cannot write"):
    workdir.claim(tmp_path / "file", config())
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "config.json").write_text('{"seed": ')
  with pytest.raises(UserError, match=r"config\.json"):
    workdir.claim(tmp_path / "run", config())


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / "results.json"
  workdir.write_json(path, {"a": 1})
  with pytest.raises(ValueError):
    workdir.write_json(path, {"a": float("nan")})
  assert json.loads(path.read_text()) == {"a": 1}

  def killed(source, target):
    assert pathlib.Path(source).parent == pathlib.Path(target).parent, "a rename is atomic on one file system only"
    assert json.loads(pathlib.Path(source).read_text()) == {"a": 2} and json.loads(path.read_text()) == {"a": 1}
    raise KeyboardInterrupt

  with monkeypatch.context() as patched:
    patched.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
      workdir.write_json(path, {"a": 2})
  assert json.loads(path.read_text()) == {"a": 1}
  workdir.write_json(path, {"a": 3})
  assert json.loads(path.read_text()) == {"a": 3} and [p.name for p in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("write", [lambda p: workdir.write_json(p / "f.json", {}), lambda p: manifest.write(p)])
def test_what_is_renamed_is_on_the_disk_and_so_is_its_name(tmp_path, monkeypatch, write):
  """A power cut after it would otherwise leave an empty file under a good name."""
  done, sync, replace = [], os.fsync, os.replace

  def fsync(descriptor):
    done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
    sync(descriptor)

  monkeypatch.setattr(os, "fsync", fsync)
  monkeypatch.setattr(os, "replace", lambda *names: (done.append("rename"), replace(*names)))
  write(tmp_path)
  assert done == ["file", "rename", "folder"]


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path):
  path = tmp_path / "results.json"
  workdir.write_json(path, {"a": 1})
  (tmp_path / "results.json.tmp").symlink_to("/dev/full")
  with pytest.raises(UserError) as error:
    workdir.write_json(path, {"a": 2})
  assert str(error.value) == (f"cannot write {path}: No space left on device; free some space and run the same command again")
  assert workdir.read_json(path) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_missing_json_says_what_it_should_be(tmp_path):
  with pytest.raises(UserError, match="workdir"):
    workdir.read_json(tmp_path / "results.json")
