"""Every command that the README, docs/ and the configs show parses, what they name exists, and `--help` answers.

Commands are the lines that start with `python -m phpjax...`, `python -m data_pipelines...` or
`bash launch/...` in these pages and in the docstrings of configs and modules.
"""

import ast
import functools
import importlib.util
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCS = sorted(f"docs/{path.name}" for path in (ROOT / "docs").iterdir())
PAGES = ("README.md", "launch/README.md", *DOCS)
EXPERIMENTS = sorted(
  p for p in (ROOT / "configs").glob("*.py") if p.stem not in ("__init__", "base") and not p.stem.startswith("nano")
)
VARIANTS = ("", "toybox", "tiny")
FIELDS = (
  "seed",
  "batch_size",
  "num_epochs",
  "tasks",
  "method.name",
  "method.compat",
  "data.root",
  "task_id",
  "mesh",
  "on_nonfinite",
  "resume",
)
COMMAND = re.compile(
  r"^\s*(?:\$ )?((?:[A-Z_]+=\S+ )*"
  r"(?:python -m (?:phpjax|data_pipelines)\b|bash launch/).*)$"
)


def texts() -> dict[str, str]:
  """File name -> the text in which commands are looked for."""
  found = {name: (ROOT / name).read_text() for name in PAGES}
  for folder in ("configs", "data_pipelines", "phpjax"):
    for path in sorted((ROOT / folder).rglob("*.py")):
      found[str(path.relative_to(ROOT))] = ast.get_docstring(ast.parse(path.read_text())) or ""
  return found


def commands(text: str) -> list[str]:
  """The commands of a text, continued lines joined."""
  lines = re.sub(r"\\\n\s*", "", text).splitlines()
  return [match[1].strip() for line in lines if (match := COMMAND.match(line))]


COMMANDS = sorted({(file, command) for file, text in texts().items() for command in commands(text)})


def load_config(path: pathlib.Path, variant: str) -> ConfigDict:
  """What `--config=PATH:VARIANT` gives; no variant when it is empty."""
  spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(variant) if variant else module.get_config()


def field(config: ConfigDict, name: str) -> object:
  """config.a.b of "a.b"; raises when there is none."""
  return functools.reduce(lambda node, key: node[key], name.split("."), config)


@functools.cache
def help_of(module: str) -> str:
  """The text of `python -m MODULE --help`, which must exit with 0 and print no traceback."""
  done = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, f"{module} --help: exit {done.returncode}\n{done.stderr[-2000:]}"
  assert "Traceback" not in done.stdout + done.stderr
  return done.stdout + done.stderr


def check_arguments(module: str, arguments: list[str]) -> None:
  """Raises AssertionError unless `module` knows every flag, and the config and its overrides exist."""
  config = None
  flags = dict(a.lstrip("-").partition("=")[::2] for a in arguments if a.startswith("-"))
  if "config" in flags:
    path, _, variant = flags["config"].partition(":")
    assert (ROOT / path).is_file(), f"no such config: {path}"
    config = load_config(ROOT / path, variant)
  for flag in flags:
    if flag.startswith("config."):
      field(config or load_config(ROOT / "configs" / "php_avqa.py", "toybox"), flag.removeprefix("config."))
    elif flag != "config":
      assert re.search(rf"--(\[no\])?{re.escape(flag)}\b", help_of(module)), f"{module} has no flag --{flag}"


def test_readme_names_the_two_commands():
  shown = [command for file, command in COMMANDS if file == "README.md"]
  assert "bash launch/local.sh" in shown and "bash launch/test.sh" in shown


@pytest.mark.parametrize(("file", "command"), COMMANDS, ids=lambda v: re.sub(r"[^\w.:=-]+", "_", v)[:50])
def test_command_parses(file, command):
  words = shlex.split(command, comments=True)
  while "=" in words[0]:
    words.pop(0)
  if words[0] == "bash":
    script = ROOT / words[1]
    assert script.is_file(), f"{file}: no such file {words[1]}"
    assert subprocess.run(["bash", "-n", script], timeout=10).returncode == 0
    if script.name == "local.sh":
      check_arguments("phpjax.main", words[2:])
    for path in (word for word in words[2:] if word.startswith("tests/")):
      assert (ROOT / path.split("::")[0]).exists(), f"{file}: no such test {path}"
  else:
    assert importlib.util.find_spec(words[2]) is not None, f"{file}: no module {words[2]}"
    check_arguments(words[2], words[3:])


@pytest.mark.parametrize(
  "module",
  [
    *(f"data_pipelines.{name}" for name in ("bench", "check", "prepare", "toybox")),
    *(f"phpjax.{name}" for name in ("bench", "convert", "main", "predict", "pretrain", "report", "sweep")),
  ],
)
def test_help_exits_with_zero(module):
  assert "--" in help_of(module)


def test_the_experiment_of_the_readme_exists():
  assert ROOT / "configs" / "php_avqa.py" in EXPERIMENTS


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v or "full")
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_config_loads_and_has_the_agreed_fields(path, variant):
  config = load_config(path, variant)
  for name in FIELDS:
    field(config, name)
  assert len(config.tasks) == len(set(config.tasks)) > 0
  assert config.task_id in ("given", "inferred")
  assert config.encoders
  for modality, encoder in config.encoders.items():
    assert modality in ("visual", "audio", "text", "audio_text")
    assert {"name", "weights"} <= set(encoder)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_config_shows_its_own_command_and_refuses_unknown_variants(path):
  shown = commands(ast.get_docstring(ast.parse(path.read_text())) or "")
  assert any(f"--config=configs/{path.name}" in command for command in shown)
  with pytest.raises(ValueError, match="no_such_variant"):
    load_config(path, "no_such_variant")


def test_readme_names_every_method_and_task():
  from phpjax.benchmarks import BENCHMARKS
  from phpjax.methods import METHODS

  readme, methods = ((ROOT / page).read_text() for page in ("README.md", "docs/methods.md"))
  assert [name for name in (*METHODS, *BENCHMARKS) if f"`{name}`" not in readme] == []
  assert [name for name in METHODS if f"`{name}`" not in methods] == []


def anchors(page: pathlib.Path) -> set[str]:
  """What a link can have behind its `#`, as GitHub makes it of the titles."""
  titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), flags=re.MULTILINE)
  return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
  here = ROOT / page
  for link in re.findall(r"\]\(([^)]+)\)", here.read_text()):
    if link.startswith("https://"):
      continue
    target, _, anchor = link.partition("#")
    path = (here.parent / target).resolve() if target else here
    assert path.exists(), f"{page}: broken link {link}"
    assert not anchor or anchor in anchors(path), f"{page}: {target or page} has no title #{anchor}"


FOLDERS = sorted(path.name for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.*")) and path.name[0] != ".")


@pytest.mark.parametrize("page", PAGES)
def test_files_and_settings_that_a_page_names_exist(page):
  """Files in backticks that begin with a folder of the repository, and fields of a config."""
  for word in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)):
    if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./*]*", word) and not word.startswith("runs/"):
      assert any(ROOT.glob(word)), f"{page}: there is no {word}"
    named = re.match(r"--config\.([a-z][\w.]+)", word) or re.fullmatch(r"((?:data|opt|method|protocol)\.\w+)(?:=.*)?", word)
    if named:
      assert any(has_field(config, named[1]) for config in full_configs()), f"{page}: no config has {named[1]}"


@functools.cache
def full_configs() -> list[ConfigDict]:
  return [load_config(path, "") for path in EXPERIMENTS]


def has_field(config: ConfigDict, name: str) -> bool:
  try:
    field(config, name)
  except (KeyError, TypeError):
    return False
  return True


def test_readme_stays_short_and_links_every_page():
  text = (ROOT / "README.md").read_text()
  assert text.count("\n") <= 150
  assert [page for page in PAGES[1:] if f"]({page})" not in text] == []
  assert all((ROOT / page).suffix == ".md" and (ROOT / page).read_text().startswith("# ") for page in PAGES)


def test_nothing_is_said_twice():
  """No sentence and no row of a table stands on two pages, or twice on one."""
  seen: dict[str, str] = {}
  for page in PAGES:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for sentence in (" ".join(part.split()) for part in re.split(r"(?<=[.:;])\s|\n\n|\n(?=\|)", text)):
      if len(sentence) > 40:
        assert sentence not in seen, f"{page} repeats {seen[sentence]}: {sentence}"
        seen[sentence] = page


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("bash launch/local.sh", ["bash launch/local.sh"]),
    ("  $ python -m phpjax.main --help\n", ["python -m phpjax.main --help"]),
    ("python -m phpjax.main \\\n  --workdir=a", ["python -m phpjax.main --workdir=a"]),
    ("PHPJAX_EXTRAS=cuda bash launch/local.sh", ["PHPJAX_EXTRAS=cuda bash launch/local.sh"]),
    ("see `python -m phpjax.main`", []),
  ],
)
def test_commands_are_found(text, expected):
  assert commands(text) == expected
