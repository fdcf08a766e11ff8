"""The JSON files of a workdir, mutated: every command that reads them goes on or says in one line what is wrong."""

import json
import pathlib
import shutil

import pytest
from fuzzing import counts, mutated, mutated_json, one_line, run_cases, writing_only
from hypothesis import strategies as st

from configs import php_avqa
from phpjax import cli, logs, predict, sources, workdir
from phpjax.encoders import pretrained
from phpjax.errors import UserError


@counts(300, 3000)
def test_a_mutated_config_is_refused_or_of_the_same_run(tmp_path, count):
  config = php_avqa.get_config("tiny")
  workdir.claim(tmp_path / "run", config)
  path = tmp_path / "run" / workdir.CONFIG
  content, seen = path.read_bytes(), set()

  def check(data):
    path.write_bytes(mutated_json(data, content))
    try:
      workdir.claim(tmp_path / "run", config)
      assert workdir.differing(workdir.read_json(path), workdir.plain(config)) == []
      seen.add("taken")
    except UserError as error:
      one_line(" ".join(str(error).split()))
      seen.add("refused")

  with writing_only(tmp_path / "run", tmp_path):
    run_cases(count, check)
  assert seen == {"taken", "refused"}


@pytest.mark.slow
@pytest.mark.parametrize("count", [6])
def test_a_run_with_mutated_files_is_loaded_or_refused(tiny_run, tmp_path, count):
  run = shutil.copytree(tiny_run.workdir, tmp_path / "run")
  contents = {run / name: (run / name).read_bytes() for name in (workdir.CONFIG, workdir.RESULTS)}
  clip, seen = tiny_run.clip(), set()

  def check(data):
    for path, content in contents.items():
      path.write_bytes(content)
    path = data.draw(st.sampled_from(sorted(contents)))
    path.write_bytes(mutated_json(data, contents[path]))
    code = cli.guarded(lambda: predict.load(run))
    assert code in (0, 2)
    seen.add(code)

  with writing_only(run, tmp_path):
    run_cases(count, check)
  assert clip.is_file() and seen == {0, 2}


@pytest.mark.parametrize("tasks", [5, "ave", None, [1], {"a": 1}])
def test_predict_refuses_a_config_whose_tasks_are_no_names(tmp_path, tasks, capsys):
  (tmp_path / "config.json").write_text(json.dumps({"tasks": tasks}))
  assert cli.guarded(lambda: predict.main(["predict", f"--workdir={tmp_path}", "--task=ave", "--video=x"])) == 2
  assert one_line(capsys.readouterr().err.strip()).startswith(f"error: {tmp_path}/config.json is damaged: its tasks are ")


@pytest.mark.parametrize("content", ["[]", "5", "null", '"x"', "[" * 100_000, "\x00", "{"])
def test_json_that_is_no_object_is_refused(tmp_path, content):
  (tmp_path / "results.json").write_text(content)
  with pytest.raises(UserError, match=r"results\.json"):
    workdir.read_json(tmp_path / "results.json")


@counts(40, 2000)
def test_mutated_metrics_lose_no_good_line(tmp_path, count):
  path = tmp_path / logs.FILE
  lines = [json.dumps({"step": step, "task": "ave", "loss": 0.5}) for step in range(1, 9)]
  content = "".join(f"{line}\n" for line in lines).encode()

  def check(data):
    path.write_bytes(mutated(data, content))
    before = path.read_text(errors="replace").splitlines()
    logs._drop_after(path, 4)
    kept = path.read_text().splitlines()
    assert all(json.loads(line)["step"] <= 4 for line in kept)
    assert [line for line in before if line in lines[:4]] == [line for line in kept if line in lines]

  run_cases(count, check)


@counts(40, 2000)
def test_mutated_encoder_json_is_read_or_refused(tmp_path, count):
  source = pretrained.SHIPPED / "nano_vit"
  for path in source.iterdir():
    shutil.copy(path, tmp_path)
  content = (tmp_path / "encoder.json").read_bytes()

  def check(data):
    (tmp_path / "encoder.json").write_bytes(mutated_json(data, content))
    try:
      pretrained.module_of("nano_vit", str(tmp_path))
    except (ValueError, TypeError) as error:  # what `checks` and `experiment.build` turn into one line
      assert str(error)

  run_cases(count, check)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", 5, None, "model.txt"])
def test_an_index_cannot_name_files_outside(tmp_path, name):
  (tmp_path / "model").mkdir()
  (tmp_path / "secret.safetensors").write_bytes(b"")
  (tmp_path / "model" / sources.INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
  with pytest.raises(UserError, match="no weight file beside it"):
    sources.weight_files(tmp_path / "model")


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 3}', "{", '{"weight_map": {"a": ["x"]}}'])
def test_an_index_that_is_none_is_refused(tmp_path, content):
  (tmp_path / sources.INDEX).write_text(content)
  with pytest.raises(UserError, match="weight_map"):
    sources.weight_files(pathlib.Path(tmp_path))
