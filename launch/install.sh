# Sourced by local.sh and test.sh: finds Python, makes the virtual environment and installs phpjax once.
# shellcheck shell=bash
#
#   phpjax_install core|test     -> sets $root (the repository) and $python (the environment's interpreter)
#
# Settings (environment variables):
#   PYTHON         the interpreter to build the environment with; default: the first Python >= 3.11 found
#   PHPJAX_VENV    where the environment lies; default: .venv in the repository
#   PHPJAX_EXTRAS  further extras of pyproject.toml, comma-separated, e.g. cuda or tpu

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${PHPJAX_VENV:-$root/.venv}
python=$venv/bin/python

say() { printf 'phpjax: %s\n' "$*" >&2; }
die() { say "$*"; exit 2; }

# Prints 311 for Python 3.11; fails when $1 does not run or is older than 3.11.
python_tag() {
  "$1" -c 'import sys; v = sys.version_info[:2]; print("%d%d" % v); sys.exit(v < (3, 11))' 2>/dev/null
}

# Prints an interpreter: one with a lock file if there is any, else any Python >= 3.11.
find_python() {
  if [ -n "${PYTHON:-}" ]; then
    python_tag "$PYTHON" >/dev/null || die "PYTHON=$PYTHON does not run or is older than Python 3.11"
    echo "$PYTHON"
    return
  fi
  local name tag other=
  for name in python3 python3.12 python3.11 python3.13 python3.14 python; do
    tag=$(python_tag "$name") || continue
    [ ! -f "$root/requirements/py$tag.lock" ] || { echo "$name"; return; }
    other=${other:-$name}
  done
  [ -n "$other" ] || die "no Python 3.11 or newer found; install one, or name it: PYTHON=/path/to/python3.11 bash $0"
  echo "$other"
}

make_venv() {
  local base tag
  if tag=$(python_tag "$python"); then
    [ -z "${PYTHON:-}" ] || [ "$(python_tag "$PYTHON")" = "$tag" ] ||
      die "$venv was made with another Python than PYTHON=$PYTHON; remove it, or set PHPJAX_VENV to another folder"
    return
  fi
  base=$(find_python)
  say "making the environment $venv with $("$base" --version)"
  "$base" -m venv --clear "$venv" ||
    die "$base cannot make a virtual environment (on Debian and Ubuntu: apt-get install python3-venv)"
}

# What the environment was installed from: when this changes, it is installed again.
fingerprint() {
  "$python" - "$root" "$1" "${PHPJAX_EXTRAS:-}" <<'PY'
import hashlib, pathlib, sys
digest = hashlib.sha256(repr((sys.version, sys.argv[1:])).encode())
for name in sys.argv[2], "pyproject.toml":
  path = pathlib.Path(sys.argv[1], name)
  digest.update(path.read_bytes() if path.is_file() else b"")
print(digest.hexdigest())
PY
}

phpjax_install() {
  local level=$1 lock stamp want have
  make_venv
  lock=requirements/py$(python_tag "$python").lock
  stamp=$venv/phpjax-installed
  want=$(fingerprint "$lock")
  have=$(cat "$stamp" 2>/dev/null || true)
  # An environment with the test extra holds all of the core too.
  if [ "$have" = "$level $want" ] || [ "$have" = "test $want" ]; then return; fi

  local extras=${PHPJAX_EXTRAS:-} pins=()
  [ "$level" = core ] || extras=$level${extras:+,$extras}
  if [ -f "$root/$lock" ]; then
    pins=(--constraint "$root/$lock")
    say "installing the versions of $lock (about 2 minutes and 1.5 GB the first time)"
  else
    say "no lock file for $("$python" --version): installing the newest versions that pyproject.toml allows (untested)"
  fi
  rm -f "$stamp"
  "$python" -m pip install --quiet --disable-pip-version-check ${pins[@]+"${pins[@]}"} \
    --editable "$root${extras:+[$extras]}" || die "the installation failed; pip's own message stands above"
  printf '%s %s\n' "$level" "$want" > "$stamp"
}
