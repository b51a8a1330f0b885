# Sourced by scripts/demo and scripts/test: makes the virtual environment .venv and installs the project in it, or reuses
# it when neither its sources nor the interpreter changed since. PYTHON chooses the interpreter, VENV another folder.
# ensure_venv [extra]: "" for what the package needs to run, "test" also for what its tests need. Sets $venv.

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  echo "Python 3.11 or later is needed and ${PYTHON:-python3} is not one: set PYTHON=/path/to/python" >&2
  return 1
}

fingerprint() { # of everything an installation depends on
  {
    "$1" -c 'import sys; print(sys.version, sys.base_prefix)'
    find pyproject.toml dsv4_jax ffi -type f ! -path '*/__pycache__/*' ! -path '*/_lib/*' -print0 |
      LC_ALL=C sort -z | xargs -0 cksum
  } | cksum
}

ensure_venv() {
  local extra=$1 python stamp stamped
  venv=${VENV:-.venv}
  python=$(find_python)
  stamp=$(fingerprint "$python")
  # What an installation with the test extra has is enough for the demo.
  for stamped in "$venv/.installed-test" "$venv/.installed-$extra"; do
    if [ -f "$stamped" ] && [ "$(cat "$stamped")" = "$stamp" ]; then
      return
    fi
  done
  if ! [ -x "$venv/bin/python" ] || ! cmp -s <("$python" -V) <("$venv/bin/python" -V); then
    echo "Making the virtual environment $venv with $("$python" -V) …" >&2
    if ! "$python" -m venv --clear "$venv"; then
      echo "$python cannot make a virtual environment (Debian and Ubuntu have that in python3-venv)" >&2
      return 1
    fi
  fi
  echo "Installing dsv4_jax${extra:+[$extra]} into $venv …" >&2
  rm -f "$venv"/.installed-*
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check ".${extra:+[$extra]}" >&2
  local libraries
  libraries=$(find "$venv" -path '*/dsv4_jax/_lib/*' -name 'libdsv4_jax_*' | sed 's/.*libdsv4_jax_//; s/\..*//' | sort)
  echo "Native libraries: ${libraries:-none} (docs: README.md, Installation)" | tr '\n' ' ' >&2 && echo >&2
  echo "$stamp" >"$venv/.installed-$extra"
}
