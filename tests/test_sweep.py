"""The sweep: what it plans, and what it makes of runs that end well, stop, fail or are stopped, with real processes."""

import json
import os
import signal
import subprocess
import sys
import time

import fabricated_runs as fabricated
import pytest
from command import ROOT

from phpjax import cli, comparison_figures, compat, sweep, sweep_jobs, workdir
from phpjax.errors import UserError
from phpjax.sweep_jobs import DONE, FAILED, WAITING, Job, Pool

PROBE, FINETUNE = "configs/linear_probe.py:tiny", "configs/finetune.py:tiny"
# Stands for phpjax.main: ends as its orders in todo.json say, one for each attempt; a number is an exit code, "wait" waits for
# SIGTERM, saves and exits with 42, "ignore" waits for SIGKILL. Beside it lies the results.json of a run that is done.
FAKE = """
import json, os, pathlib, shutil, signal, sys, time
here = pathlib.Path(__file__).parent
given = dict(word[2:].split("=", 1) for word in sys.argv[1:])
folder = pathlib.Path(given["workdir"])
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "attempts", "a") as file:
  file.write(json.dumps({"argv": sys.argv[1:], "env": dict(os.environ), "cpus": sorted(os.sched_getaffinity(0)),
                         "group": os.getpgid(0)}) + "\\n")
attempt = len((folder / "attempts").read_text().splitlines())
todo = json.loads((here / "todo.json").read_text()).get("/".join(folder.parts[-3:]), [0])
now = todo[min(attempt, len(todo)) - 1]
if now in ("wait", "ignore"):
  def stop(*_):
    if now == "ignore":
      return
    (folder / "saved").write_text("")
    print("SIGTERM: saving after this step", flush=True)
    os._exit(42)
  signal.signal(signal.SIGTERM, stop)
  print("[1/4 ave] epoch 1/1  step 1/9  left: 0:10, all tasks 0:02:30", flush=True)
  (folder / "ready").write_text("")
  time.sleep(60)
if now == 0:
  shutil.copy(here / "results.json", folder / "results.json")
print("loss 0.1\\nerror: the disk is full" if now else "done", file=sys.stderr)
if isinstance(now, int) and now < 0:
  os.kill(os.getpid(), -now)
  time.sleep(60)
sys.exit(now)
"""


class Bench:
  """A folder for a sweep, the fake program, and what both said."""

  def __init__(self, tmp_path):
    self.folder, self.said = tmp_path / "sweep", []
    (tmp_path / "fake").mkdir()
    self.fake = tmp_path / "fake" / "main.py"
    self.fake.write_text(FAKE)
    (tmp_path / "fake" / "results.json").write_text(json.dumps(fabricated.results_of("php", 0, seconds=7200.0)))
    self.todo()

  def todo(self, **orders):
    """What the runs do: {"name/order/seedN" with "__" for "/": [...]}."""
    found = {name.replace("__", "/"): order for name, order in orders.items()}
    (self.fake.parent / "todo.json").write_text(json.dumps(found))

  def jobs(self, *names, seeds=(0,)):
    place = lambda name, seed: self.folder / name / "given" / f"seed{seed}"
    return [Job(n, "given", s, place(n, s), (f"--workdir={place(n, s)}",)) for s in seeds for n in names]

  def pool(self, jobs, **options):
    return Pool(jobs, [sys.executable, str(self.fake)], say=self.said.append, **options)

  def attempts(self, job):
    path = job.folder / "attempts"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def bench(tmp_path, monkeypatch):
  monkeypatch.setattr(sweep_jobs, "POLL_S", 0.01)
  return Bench(tmp_path)


# -- the plan ----------------------------------------------------------------------------------------------------


@pytest.fixture
def at_root(monkeypatch):
  monkeypatch.chdir(ROOT)


def test_a_plan_is_methods_by_seeds_by_orders(tmp_path, at_root):
  jobs = sweep.plan(
    [PROBE, FINETUNE], [4, 5], ["given", "reversed"], tmp_path, changes=["config.opt.head.lr=0.5"], own_seeds=["toybox_seed"]
  )
  assert len(jobs) == 8 and len({job.folder for job in jobs}) == 8
  assert [(job.name, job.order, job.seed) for job in jobs[:3]] == [
    ("linear_probe_tiny", "given", 4), ("finetune_tiny", "given", 4), ("linear_probe_tiny", "reversed", 4)
  ]  # fmt: skip
  assert jobs[2].folder == tmp_path / "linear_probe_tiny" / "reversed" / "seed4"
  assert jobs[2].arguments == (
    f"--config={PROBE}",
    "--config.seed=4",
    "--config.data.toybox_seed=4",
    "--config.tasks=('avqa', 'avs', 'avvp', 'ave')",
    f"--config.data.query_cache={tmp_path / 'features'}",
    "--config.opt.head.lr=0.5",
    f"--workdir={jobs[2].folder}",
  )
  assert not any("tasks" in word for word in jobs[0].arguments) and all(job.state == WAITING for job in jobs)
  config = sweep.opened(PROBE, jobs[2].arguments[1:-1])
  assert (config.seed, config.tasks[0], config.opt.head.lr, config.data.toybox_seed) == (4, "avqa", 0.5, 4)


def test_the_classes_may_be_each_seeds_own(tmp_path, at_root, capsys):
  config = "configs/slda.py:tiny+ave_classes"
  jobs = sweep.plan([config], [3, 4], ["given"], tmp_path, own_seeds=["class_seed"])
  for job in jobs:
    made = sweep.opened(config, job.arguments[1:-1])
    assert (made.seed, made.data.class_seed, made.data.toybox_seed) == (job.seed, job.seed, 0)
  sweep.main(["sweep", f"--config={config}", "--seeds=3", "--class_seed=same", f"--workdir={tmp_path}", "--dry_run"])
  assert "1 of 1 runs to do" in capsys.readouterr().out


def test_orders_have_names(at_root):
  config = sweep.opened(PROBE, [])
  assert sweep.tasks_of("given", config) == ("ave", "avvp", "avs", "avqa")
  assert sweep.tasks_of("reversed", config) == ("avqa", "avs", "avvp", "ave")
  assert sweep.tasks_of("avs-ave", config) == ("avs", "ave") and sweep.tasks_of("avs", config) == ("avs",)


@pytest.mark.parametrize(
  ("config", "name"),
  [
    ("configs/php_avqa.py:toybox+no_deep", "php_avqa_toybox+no_deep"),
    ("configs/php_avqa.py", "php_avqa"),
    ("/a/b.py:x/../y z", "b_x_.._y_z"),
  ],
)
def test_folders_have_names_of_their_configs(config, name):
  assert sweep.name_of(config) == name


def stored(job, config):
  job.folder.mkdir(parents=True)
  workdir.write_json(job.folder / "config.json", workdir.plain(compat.resolve(config)))


def test_what_is_finished_is_passed_over_and_other_settings_are_refused(tmp_path, at_root):
  plan = lambda: sweep.plan([PROBE], [0, 1, 2], ["given"], tmp_path)
  first, second, third = plan()
  stored(first, sweep.opened(PROBE, first.arguments[1:-1]))
  workdir.write_json(first.folder / "results.json", fabricated.results_of("linear_probe", 0))
  stored(second, sweep.opened(PROBE, ["--config.seed=1", "--config.opt.head.lr=0.5"]))
  workdir.write_json(second.folder / "results.json", fabricated.results_of("linear_probe", 1))
  stored(third, sweep.opened(PROBE, third.arguments[1:-1]))
  jobs = plan()
  assert [job.state for job in jobs] == [DONE, FAILED, WAITING]
  assert "opt.head.lr" in jobs[1].reason and "--workdir" in jobs[1].reason
  text = sweep.told(jobs, 1)
  assert text.splitlines()[-1] == "1 of 3 runs to do, 1 at a time; time: about 0.14 hours"
  assert [line.split()[-1] for line in text.splitlines()[1:4]] == ["finished", "run", "continues"]
  assert text.splitlines()[4].startswith("linear_probe_tiny given seed 1 cannot run: ")
  (third.folder / "config.json").write_text("{")
  assert plan()[2].state == FAILED and "not valid JSON" in plan()[2].reason


def test_the_command_shows_its_plan_and_stops(tmp_path, at_root, capsys):
  code = cli.guarded(
    lambda: sweep.main(["sweep", f"--config={PROBE}", "--seeds=3", f"--workdir={tmp_path / 'a'}", "--dry_run"])
  )
  said = capsys.readouterr().out
  assert code == 0 and "time: unknown until a run of linear_probe_tiny has finished" in said
  assert not (tmp_path / "a").exists()


WRONG = {
  (): ("--workdir is missing; --config is missing",),
  ("--config=configs/no.py", "--workdir=x"): ("configs/no.py",),
  (f"--config={PROBE}x", "--workdir=x"): ("tinyx", "toybox"),
  (f"--config={PROBE}", "--workdir=x", "--seeds=1,x,-2"): ("--seeds=x", "--seeds=-2"),
  (f"--config={PROBE}", "--workdir=x", "--seeds=1,2,1"): ("seed 1 is given more than once",),
  (f"--config={PROBE}", "--workdir=x", "--set=opt.head.lr=1"): ("--set=opt.head.lr=1", "config.FIELD=VALUE"),
  (f"--config={PROBE}", "--workdir=x", "--set=config.opt.heads.lr=1"): (PROBE, "heads", "head"),
  (f"--config={PROBE}", "--workdir=x", "--set=config.batch_size=many"): ("batch_size", "many"),
  (f"--config={PROBE}", "--workdir=x", "--orders=given,backwards"): ("'backwards'", "reversed", "avqa"),
  (f"--config={PROBE}", "--workdir=x", "--orders=given,ave-avvp-avs-avqa"): ("two of them are ave-avvp-avs-avqa",),
  (f"--config={PROBE}", f"--config={PROBE}", "--workdir=x"): ("share a folder", "linear_probe_tiny"),
  ("--config=configs/linear_probe.py", "--toybox_seed=same", "--workdir=x"): ("toybox_seed=same", "linear_probe"),
  (f"--config={PROBE}", "--workdir=x", "--toybox_seed=5"): ("toybox_seed", "same"),
  (f"--config={PROBE}", "--workdir=x", "--class_seed=same"): (
    "class_seed=same",
    "linear_probe",
    "not class-incremental: ave, a",
  ),
  ("--config=configs/slda.py:tux21", "--workdir=x", "--class_seed=same", "--set=config.tasks=('tux21_1','ave')"): (
    "not class-incremental: ave",
  ),
  (f"--config={PROBE}", "--workdir=x", "--jobs=0"): ("jobs",),
  (f"--config={PROBE}", "--workdir=x", "more"): ("unexpected arguments more",),
  ("--report", "--workdir=no_such_folder"): ("no_such_folder does not exist",),
}


@pytest.mark.parametrize("arguments", WRONG, ids=lambda a: " ".join(a)[-50:])
def test_wrong_arguments_are_one_line(arguments, at_root, capsys):
  assert cli.guarded(lambda: sweep.main(["sweep", *arguments])) == 2
  [line] = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ") and all(word in line for word in WRONG[arguments]), line


# -- processes ---------------------------------------------------------------------------------------------------


def test_runs_that_end_well(bench):
  jobs = bench.jobs("a", "b", seeds=(0, 1))
  assert bench.pool(jobs).run() == 0
  assert [job.state for job in jobs] == [DONE] * 4 and [len(bench.attempts(job)) for job in jobs] == [1] * 4
  assert [line.split(" in ")[0] for line in bench.said if line.startswith("done")] == [
    "done a given seed 0", "done b given seed 0", "done a given seed 1", "done b given seed 1"
  ]  # fmt: skip
  assert "4 of 4 done" in bench.said[-1] and (jobs[0].folder / "log.txt").read_text().splitlines()[-1] == "done"
  assert bench.attempts(jobs[0])[0]["group"] != os.getpgid(0), "a signal of the terminal must not reach it twice"


def test_what_is_done_already_is_not_run(bench):
  jobs = bench.jobs("a", "b")
  jobs[0].state = DONE
  assert bench.pool(jobs).run() == 0
  assert bench.attempts(jobs[0]) == [] and len(bench.attempts(jobs[1])) == 1


def test_a_run_that_stopped_is_run_again_so_many_times(bench):
  bench.todo(a__given__seed0=[42, 75, 0], b__given__seed0=[42])
  jobs = bench.jobs("a", "b")
  assert bench.pool(jobs, retries=2).run() == 2
  assert [len(bench.attempts(job)) for job in jobs] == [3, 3] and [job.state for job in jobs] == [DONE, FAILED]
  assert jobs[1].reason == "exit code 42, 3 times: error: the disk is full"
  argv = [one["argv"] for one in bench.attempts(jobs[0])]
  assert argv == [argv[0]] * 3, "the same command continues"
  log = (jobs[0].folder / "log.txt").read_text()
  assert log.count("error: the disk is full") == 2 and log.count("$ ") == 3, "all attempts are in the log"


def test_a_failure_is_named_and_the_others_go_on(bench):
  bench.todo(a__given__seed0=[2], b__given__seed0=[1], c__given__seed0=[-9])
  jobs = bench.jobs("a", "b", "c", "d")
  assert bench.pool(jobs).run() == 2
  assert [job.state for job in jobs] == [FAILED] * 3 + [DONE]
  assert jobs[0].reason == "exit code 2: error: the disk is full" and jobs[1].reason.startswith("exit code 1: ")
  assert jobs[2].reason.startswith("killed by SIGKILL: ")
  assert sum(line.startswith("failed a given seed 0: exit code 2") for line in bench.said) == 1


def test_a_folder_that_cannot_be_made_fails_its_run_only(bench):
  jobs = bench.jobs("a", "b")
  bench.folder.mkdir()
  (bench.folder / "a").write_text("")
  assert bench.pool(jobs).run() == 2
  assert "cannot be started" in jobs[0].reason and jobs[1].state == DONE


def test_several_at_a_time_share_the_cpus(bench):
  jobs = bench.jobs("a", "b", seeds=(0, 1))
  assert bench.pool(jobs, slots=2).run() == 0
  for job in jobs:
    [one] = bench.attempts(job)
    assert one["env"]["NPROC"] == os.environ.get("NPROC", str(len(sweep_jobs.share_of_cpus(0, 2))))


def test_shares_of_cpus_are_whole_and_apart(monkeypatch):
  monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3, 5, 7, 11})
  shares = [sweep_jobs.share_of_cpus(slot, 2) for slot in range(2)]
  assert shares == [{2, 3}, {5, 7, 11}] and sweep_jobs.share_of_cpus(0, 1) == set()
  assert all(len(sweep_jobs.share_of_cpus(slot, 7)) == 1 for slot in range(7))


def test_a_run_starts_when_another_has_ended(bench):
  bench.todo(a__given__seed0=["wait"])
  pool = bench.pool(jobs := bench.jobs("a", "b", "c"), slots=2)
  pool._start()
  assert [job.state for job in jobs] == ["running", "running", WAITING]
  pool._start()
  assert jobs[2].state == WAITING, "both slots are taken"
  until(lambda: jobs[1].folder.joinpath("results.json").exists() and (jobs[0].folder / "ready").exists())
  until(lambda: (pool._collect(), jobs[1].state == DONE)[1])
  pool._start()
  assert jobs[2].state == "running"
  pool.asked = 1
  assert pool.run() == 42
  assert (jobs[0].folder / "saved").exists() and jobs[0].state == WAITING


def until(condition, timeout_s=30):
  """Waits for something to happen."""
  end = time.monotonic() + timeout_s
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.01)


# Runs the fake program with a pool of its own, as phpjax.sweep does; without jax, so that it starts at once.
POOL = """
import pathlib, sys
from phpjax.sweep_jobs import Job, Pool
folder, fake = map(pathlib.Path, sys.argv[1:3])
place = lambda n: folder / n / "given" / "seed0"
jobs = [Job(n, "given", 0, place(n), (f"--workdir={place(n)}",)) for n in sys.argv[3:]]
say = lambda text: print(text, file=sys.stderr, flush=True)
sys.exit(Pool(jobs, [sys.executable, str(fake)], slots=2, say=say).run())
"""


@pytest.fixture
def started(bench):
  """Starts a sweep in a process of its own; it is killed with its runs when the test ends."""
  processes = []

  def start(*names):
    argv = [sys.executable, "-c", POOL, str(bench.folder), str(bench.fake), *names]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes.append(subprocess.Popen(argv, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    return processes[-1]

  yield start
  for process in processes:
    process.kill()
    process.wait()
    process.stderr.close()


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_the_runs_save(bench, started, which):
  bench.todo(a__given__seed0=["wait", 0], b__given__seed0=["wait", 0])
  process, (a, b, c) = started("a", "b", "c"), bench.jobs("a", "b", "c")
  until(lambda: (a.folder / "ready").exists() and (b.folder / "ready").exists())
  process.send_signal(which)
  _, said = process.communicate(timeout=60)
  assert process.returncode == 42, said
  assert (a.folder / "saved").exists() and (b.folder / "saved").exists() and not bench.attempts(c), "nothing new is started"
  assert "2 runs save first" in said and "stopped a given seed 0: the same command continues" in said


def test_a_second_signal_stops_runs_that_do_not_save(bench, started):
  bench.todo(a__given__seed0=["wait"], b__given__seed0=["ignore"])
  process, (a, b) = started("a", "b"), bench.jobs("a", "b")
  until(lambda: (a.folder / "ready").exists() and (b.folder / "ready").exists())
  process.send_signal(signal.SIGTERM)
  until(lambda: (a.folder / "saved").exists())
  time.sleep(0.3)
  assert process.poll() is None, "it waits for the run that does not save"
  process.send_signal(signal.SIGTERM)
  assert process.wait(60) == 42
  with pytest.raises(ProcessLookupError):
    os.kill(bench.attempts(b)[0]["group"], 0)


def test_a_stopped_sweep_is_not_compared(bench, monkeypatch):
  monkeypatch.setattr(Pool, "run", lambda self: sweep_jobs.EXIT_STOPPED)
  monkeypatch.setattr(sweep, "compare", lambda folder: pytest.fail("half of it would look like all"))
  with pytest.raises(sweep.Stopped):
    sweep.run(bench.jobs("a"), bench.folder, slots=1, retries=0)


def test_all_that_is_finished_is_compared_and_failures_are_named(bench, monkeypatch, capsys):
  monkeypatch.setattr(comparison_figures, "draw", lambda setting: [])
  bench.todo(b__given__seed0=[2])
  jobs = bench.jobs("a", "b")
  with pytest.raises(UserError, match=r"1 of 2 runs failed: b given seed 0 \(exit code 2: error: the disk is full\)"):
    sweep.run(jobs, bench.folder, slots=1, retries=0, command=[sys.executable, str(bench.fake)])
  said = capsys.readouterr()
  assert "| php | 1 |" in said.out and (bench.folder / "report" / "report.html").is_file()
  sweep.main(["sweep", "--report", f"--workdir={bench.folder}"])
  assert "| php | 1 |" in capsys.readouterr().out


# -- time --------------------------------------------------------------------------------------------------------


def test_time_left_comes_from_finished_runs_of_the_same_config(bench):
  jobs = bench.jobs("a", "b", seeds=(0, 1, 2))
  assert sweep_jobs.time_left(jobs, 1) == (0.0, ["a", "b"])
  fabricated.write(jobs[0].folder, {"seconds": 100.0})
  fabricated.write(jobs[2].folder, {"seconds": 140.0})
  jobs[0].state = jobs[2].state = DONE
  assert sweep_jobs.time_left(jobs, 1) == (120.0, ["b"])
  fabricated.write(jobs[1].folder, {"seconds": 30.0})
  jobs[1].state = DONE
  assert sweep_jobs.time_left(jobs, 1) == (180.0, []), "one of a and two of b"
  assert sweep_jobs.time_left(jobs, 3) == (120.0, []), "not less than the longest"


def test_time_left_comes_from_a_run_at_work_before_one_is_finished(bench):
  jobs = bench.jobs("a", seeds=(0, 1))
  jobs[0].state, jobs[0].started = "running", time.monotonic() - 50
  jobs[0].folder.mkdir(parents=True)
  (jobs[0].folder / "log.txt").write_text("x  left: 0:01, all tasks ?\ny  left: 0:10, all tasks 1:02:30\nevaluate ave: 1/2\n")
  assert sweep_jobs.left_said(jobs[0].folder / "log.txt") == 3750
  left, unknown = sweep_jobs.time_left(jobs, 1)
  assert left == pytest.approx(3750 + 3800, abs=2) and unknown == []


def test_a_sweep_tells_what_runs_and_how_long_it_takes(bench):
  bench.todo(a__given__seed0=["wait"])
  jobs = bench.jobs("a")
  pool = bench.pool(jobs, tell_every_s=0.05)
  pool._start()
  until(lambda: (jobs[0].folder / "ready").exists())
  count = len(bench.said)
  say, pool.say = pool.say, lambda text: (say(text), setattr(pool, "asked", 1))
  assert pool.run() == 42
  assert bench.said[count] == "0 of 1 done, time left: about 0.04 hours; running: a given seed 0"


@pytest.mark.parametrize(
  ("seconds", "unknown", "text"),
  [
    (7200.0, [], "about 2.00 hours"),
    (30.0, [], "about 30 s"),
    (7200.0, ["a"], "about 2.00 hours, without a (unknown until a run of it has finished)"),
    (0.0, ["a", "b"], "unknown until a run of a and b has finished"),
  ],
)
def test_time_in_words(seconds, unknown, text):
  assert sweep_jobs.in_words(seconds, unknown) == text


# -- the real thing ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_real_runs_and_the_same_command_again(tmp_path):
  argv = [sys.executable, "-m", "phpjax.sweep", f"--config={PROBE}", "--seeds=0,1", f"--workdir={tmp_path}", "--orders=ave-avs"]
  done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr
  for seed in (0, 1):
    folder = tmp_path / "linear_probe_tiny" / "ave-avs" / f"seed{seed}"
    assert json.loads((folder / "results.json").read_text())["tasks"] == ["ave", "avs"]
  assert "| linear\\_probe | 2 |" in (tmp_path / "report" / "comparison.md").read_text()
  rows = (tmp_path / "report" / "comparison.csv").read_text().splitlines()
  assert len(rows) == 3 and ",checkpoint_bytes," in rows[0]
  before = (tmp_path / "linear_probe_tiny" / "ave-avs" / "seed0" / "log.txt").read_bytes()
  again = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert again.returncode == 0 and "0 of 2 runs to do, 1 at a time; time: nothing to do" in again.stdout
  assert (tmp_path / "linear_probe_tiny" / "ave-avs" / "seed0" / "log.txt").read_bytes() == before
