"""`edgeft doctor`: the verdict first, the exit code that goes with it, and one JSON object when asked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from broken_folders import pickled
from typer.testing import CliRunner

from edgeft.cli import app


def doctor(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["doctor", *map(str, arguments)])
    return done.exit_code, done.stdout


def test_the_verdict_comes_first(checkpoint_folder: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "my model", tmp_path / "out"
    pickled()(checkpoint_folder, folder)
    code, shown = doctor(folder)
    lines = " ".join(shown.split())
    assert code == 1 and lines.startswith(
        f"{folder}: not usable as it is, but it can be repaired: the weights are pickled"
    )
    assert f"edgeft doctor '{folder}' --repair OUT" in lines
    code, shown = doctor(folder, "--repair", out)
    assert code == 0 and "bit for bit" in shown
    code, shown = doctor(out, "--values")
    assert code == 0 and "usable as it is" in shown
    code, shown = doctor(folder, "--json")
    found = json.loads(shown)
    assert code == 1 and found["verdict"] == "repairable" and found["findings"][0]["code"] == "form"


def test_errors_are_said_as_everywhere(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgeft", "doctor", str(tmp_path / "absent")], capture_output=True, text=True
    )
    assert done.returncode == 1 and "no such folder\n\nhint: " in done.stderr and not done.stdout


def test_looking_needs_no_torch(checkpoint_folder: Path) -> None:
    code = "import sys\nimport edgeft\nprint(edgeft.doctor(sys.argv[1]).verdict)\n"
    code += "assert not {'torch', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(checkpoint_folder)], capture_output=True, text=True)
    assert done.stdout == "usable\n", done.stderr
