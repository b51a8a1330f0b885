# Sourced by scripts/test and scripts/wheel.
# list_pythons: a line "3.13 /path/of/it" for every Python 3.11 or later on PATH and in pyenv that can make an
# environment, the newest first, one for each minor version.

list_pythons() {
  local folder candidate folders=()
  IFS=: read -ra folders <<<"$PATH"
  for folder in "${folders[@]}" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin; do
    for candidate in "$folder"/python3 "$folder"/python3.[0-9] "$folder"/python3.[0-9][0-9]; do
      [ -x "$candidate" ] || continue
      # A shim without a version behind it fails, and so does an interpreter without venv.
      "$candidate" -c '
import sys, venv, ensurepip
if sys.version_info >= (3, 11) and sys.version_info.releaselevel == "final" and sys.prefix == sys.base_prefix:
    print("%d.%d" % sys.version_info[:2], sys.executable)' 2>/dev/null || true
    done
  done | sort -t. -k1,1nr -k2,2nr -s | awk '!seen[$1]++'
}
