"""Every fabricated layout of every dataset, made once for a whole run of the tests."""

import pathlib

import fabricate
import pytest

LAYOUTS = [(name, layout) for name, layouts in fabricate.LAYOUTS.items() for layout in layouts]
every_layout = pytest.mark.parametrize(("name", "layout"), LAYOUTS)


@pytest.fixture(scope="session")
def layout_roots(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], pathlib.Path]:
  """The data root of each (dataset, layout); shared, so never to be written to."""
  top = tmp_path_factory.mktemp("layouts")
  roots = {(name, layout): top / f"{name}_{layout}" for name, layout in LAYOUTS}
  for (name, layout), root in roots.items():
    fabricate.LAYOUTS[name][layout](root)
  return roots
