"""The environment of scripts/bench, soak and fuzz: what runs them, or .venv, which is made where there is none."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
ENTERED = "DSV4_JAX_ENVIRONMENT"
NEEDED = ("jax", "flax", "rich", "ml_dtypes", "hypothesis")


def missing() -> list[str]:
    """Which of the packages that the scripts need cannot be imported here."""
    import importlib.util

    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def enter() -> None:
    """Returns where the packages are there; else runs the script again in .venv (VENV: another), as scripts/test."""
    lacking = missing()
    if not lacking:
        return
    if ENTERED in os.environ:
        sys.exit(f"{os.environ[ENTERED]} lacks {', '.join(lacking)}: remove it, and it is made anew")
    make = '. scripts/venv.sh; ensure_venv test; echo "$venv"'
    made = subprocess.run(["bash", "-euo", "pipefail", "-c", make], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if made.returncode:
        sys.exit(made.returncode)
    venv = str(ROOT / made.stdout.strip().splitlines()[-1])
    os.environ[ENTERED] = venv
    python = os.path.join(venv, "bin", "python")
    os.execv(python, [python, *sys.argv])
