"""The scripts: cheap checks of what is run by hand."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "scripts" / "benchmarks"


def _shell_scripts() -> list[pathlib.Path]:
    files = [path for folder in ("scripts", ".ci") for path in (ROOT / folder).iterdir() if path.is_file()]
    return [path for path in files if path.suffix == ".sh" or path.read_bytes().startswith(b"#!/usr/bin/env bash")]


@pytest.mark.parametrize("path", _shell_scripts(), ids=lambda path: path.name)
def test_shell_scripts_parse(path):
    result = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("name", ["scripts/demo", "scripts/test", "scripts/bench", "scripts/soak", ".ci/run"])
def test_commands_can_be_run(name):
    assert (ROOT / name).stat().st_mode & 0o111


def _bench(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "scripts" / "bench", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [["--help"], ["speed", "--help"], ["quality", "--help"]], ids=" ".join)
def test_bench_says_what_it_does(arguments):
    result = _bench(*arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: scripts/bench")


def test_bench_refuses_an_unknown_name():
    result = _bench("nonsense")
    assert result.returncode == 1
    assert (
        result.stderr == "bench: there is no benchmark 'nonsense': choose one of speed, quality, records, host, gpu\n"
    )


def _python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.append({str(BENCHMARKS)!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_texts_are_different_pieces_of_the_lengths_asked_for():
    pieces = json.loads(
        _python(
            "import json, texts; print(json.dumps([t.decode('latin1') for t in texts.python_source(16, 512, 1024)]))"
        )
    )
    assert len(set(pieces)) == 16
    assert [len(piece) for piece in pieces][::15] == [512, 1024]


def test_an_environment_is_made_again_only_when_something_changed(tmp_path):
    """ensure_venv with a stand-in for pip and venv, so that nothing is installed."""
    (tmp_path / "dsv4_jax").mkdir()
    (tmp_path / "ffi").mkdir()
    (tmp_path / "pyproject.toml").write_text("")
    source = tmp_path / "dsv4_jax" / "a.py"
    source.write_text("1")
    fake = tmp_path / "python"
    fake.write_text(
        "#!/usr/bin/env bash\n"
        'if [ "$1" = -V ]; then echo Python 3.99; exit; fi\n'
        'if [ "$1" = -c ]; then echo same; exit; fi\n'
        'if [ "$2" = venv ]; then mkdir -p env/bin; cp "$0" env/bin/python; echo venv >>log; exit; fi\n'
        'echo "${@: -1}" >>log\n'
    )
    fake.chmod(0o755)
    log = tmp_path / "log"

    def ensure(extra: str) -> list[str]:
        log.write_text("")
        code = f'set -euo pipefail; . {ROOT}/scripts/venv.sh; ensure_venv "{extra}"; test "$venv" = env'
        environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(fake), "VENV": "env"}
        subprocess.run(["bash", "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True)
        return log.read_text().split()

    assert ensure("") == ["venv", "."]
    assert ensure("") == []
    assert ensure("test") == [".[test]"]
    assert ensure("") == []
    source.write_text("2")
    assert ensure("test") == [".[test]"]
    (tmp_path / "pyproject.toml").write_text("x")
    assert ensure("") == ["."]


@pytest.mark.parametrize("name", ["bench", "soak", "fuzz"])
def test_scripts_without_their_packages_run_in_an_environment_that_is_made_for_them(tmp_path, name):
    fake, log = tmp_path / "python", tmp_path / "log"
    fake.write_text(
        "#!/usr/bin/env bash\n"
        'if [ "$1" = -V ]; then echo Python 3.99; exit; fi\n'
        'if [ "$1" = -c ]; then echo same; exit; fi\n'
        f'if [ "$2" = venv ]; then mkdir -p {tmp_path}/env/bin; cp "$0" {tmp_path}/env/bin/python; exit; fi\n'
        f'echo "$@" >>{log}\n'
    )
    fake.chmod(0o755)
    arguments = {"bench": ["records", "--help"], "soak": ["--moves", "7"], "fuzz": []}[name]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(fake), "VENV": str(tmp_path / "env")}
    script = str(ROOT / "scripts" / name)
    # -S: without the packages that are installed beside this Python.
    command = [sys.executable, "-S", script, *arguments]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Installing dsv4_jax[test]" in result.stderr
    assert log.read_text().splitlines()[-1] == " ".join([script, *arguments])


def test_a_python_that_is_too_old_is_named(tmp_path):
    code = f"set -euo pipefail; cd {ROOT}; . scripts/venv.sh; ensure_venv ''"
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": "/nowhere/python", "VENV": str(tmp_path / "env")}
    result = subprocess.run(["bash", "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "Python 3.11 or later is needed and /nowhere/python is not one" in result.stderr
