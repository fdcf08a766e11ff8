#!/usr/bin/env bash
# Runs the tests: makes the environment with the test extra if need be, then pytest from the repository root.
#
#   bash launch/test.sh                       every default test, on two worker processes
#   bash launch/test.sh tests/test_model.py   arguments go to pytest; `-m slow`, `-m real`, `-m parity` pick the others
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

phpjax_install test
cd "$root"
exec "$python" -m pytest "$@"
