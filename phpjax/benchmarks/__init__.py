"""The benchmarks that a run may learn, each in one file. `BENCHMARKS` is the only place where their names stand."""

from __future__ import annotations

from phpjax.benchmarks.ave import AVE
from phpjax.benchmarks.avqa import AVQA
from phpjax.benchmarks.avs import AVS, MS3
from phpjax.benchmarks.avvp import AVVP
from phpjax.benchmarks.base import Benchmark, TaskInfo

BENCHMARKS: dict[str, Benchmark] = {"ave": AVE(), "avvp": AVVP(), "avs": AVS(), "avqa": AVQA(), "ms3": MS3()}

__all__ = ["AVE", "AVQA", "AVS", "AVVP", "BENCHMARKS", "MS3", "Benchmark", "TaskInfo"]
