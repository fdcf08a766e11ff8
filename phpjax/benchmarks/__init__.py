"""The benchmarks that a run may learn, each in one file. `BENCHMARKS` is the only place where their names stand."""

from __future__ import annotations

from phpjax.benchmarks.ave import AVE
from phpjax.benchmarks.avqa import AVQA
from phpjax.benchmarks.avs import AVS, MS3
from phpjax.benchmarks.avvp import AVVP
from phpjax.benchmarks.base import Benchmark, TaskInfo
from phpjax.benchmarks.classes import AVEClasses, ClassIncremental, Tux21


class Table(dict[str, Benchmark]):
  """{name: benchmark}; NAME_3 is the third task of the class-incremental family NAME, whose class `families` holds."""

  def __init__(self, single: dict[str, Benchmark], families: dict[str, type[ClassIncremental]]) -> None:
    super().__init__(single)
    self.families = families

  def __missing__(self, name: str) -> Benchmark:
    family, _, number = name.rpartition("_")
    if family not in self.families or not (number.isascii() and number.isdigit()) or not int(number):
      raise KeyError(name)
    return self.families[family](int(number))

  def __contains__(self, name: object) -> bool:
    try:
      return self[name] is not None
    except (KeyError, AttributeError):
      return False

  def known(self) -> tuple[str, ...]:
    """The names for people."""
    return (*self, *(f"{family}_N" for family in self.families))


BENCHMARKS = Table(
  {"ave": AVE(), "avvp": AVVP(), "avs": AVS(), "avqa": AVQA(), "ms3": MS3()},
  families={"ave_classes": AVEClasses, "tux21": Tux21},
)

__all__ = ["AVE", "AVQA", "AVS", "AVVP", "BENCHMARKS", "MS3", "Benchmark", "ClassIncremental", "TaskInfo"]
