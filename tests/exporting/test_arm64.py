"""Does a bundle run on an emulated Raspberry Pi 5 as it did at export, and is a planted fault caught there?

Left out of `make test`: run by name with `make test-arm64`, after `make arm64`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from bundles import DATA, bundle, reseal
from typer.testing import CliRunner

from edgeft.cli import app
from edgeft.errors import EdgeftError, MissingExtra, ParityFailed
from edgeft.exporting.device_check import DeviceCheck, refuse, result_path, verify_on
from edgeft.exporting.emulation import emulated, find_machine, run
from edgeft.machines.profile import list_profiles

pytestmark = pytest.mark.arm64
PI = "raspberrypi5-8gb"
EMULATED = [profile.name for profile in list_profiles() if profile.emulation]


@pytest.fixture(autouse=True, scope="module")
def set_up() -> None:
    try:
        find_machine("ort-genai")
    except MissingExtra as problem:
        pytest.fail(str(problem), pytrace=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A bundle to damage, in a path with spaces."""
    folder = tmp_path / "my bundle"
    shutil.copytree(bundle("ort-int4"), folder)
    return folder


@pytest.mark.parametrize("profile", EMULATED)
def test_the_program_sees_the_devices_processor(profile: str) -> None:
    found, processor = emulated(profile)
    told = "platform.machine(), open('/proc/cpuinfo').read(), os.listdir('/sys/devices/system/cpu')"
    done = run(find_machine("ort-genai"), found, processor, ["-c", f"import os, platform; print({told})"], timeout=100)
    assert done.stdout.startswith("aarch64 ") and processor.contents(found.cores)["/proc/cpuinfo"] in done.stdout
    assert all(f"'cpu{n}'" in done.stdout for n in range(found.cores)) and f"'cpu{found.cores}'" not in done.stdout


@pytest.mark.parametrize("profile", EMULATED)
def test_a_bundle_verifies_and_what_differs_is_close(copy: Path, profile: str) -> None:
    made = verify_on(copy, profile, data=DATA, rows=8)
    assert made.problems == () and made.rows is not None and made.rows.rows == 8
    assert all(each.margin_here <= 0.6 for each in made.rows.others)
    assert made.rows.logit_difference > 0  # 8-bit activations: another instruction set rounds otherwise
    assert 30 * 2**20 < made.memory.program_bytes < made.memory.emulated_bytes
    assert made.memory.program_bytes == pytest.approx(made.memory.here_bytes, rel=0.2)
    assert DeviceCheck.read(result_path(copy, profile)) == made


@pytest.mark.parametrize("target", ["ort-fp32", "ort-int8"])
def test_other_targets_verify(tmp_path: Path, target: str) -> None:
    shutil.copytree(bundle(target), tmp_path / "b")
    made = verify_on(tmp_path / "b", PI, data=DATA, rows=4)
    assert made.problems == () and made.rows is not None
    assert target != "ort-fp32" or (made.rows.others == () and made.rows.logit_difference < 1e-3)


def faults(folder: Path) -> tuple[str, ...]:
    made = verify_on(folder, PI)
    with pytest.raises(ParityFailed, match="not what was exported, on raspberrypi5-8gb"):
        refuse(made, folder)
    return made.problems


def test_a_changed_golden_answer_is_caught(copy: Path) -> None:
    def other(manifest: dict[str, Any]) -> None:
        vector = manifest["golden"][0]
        at = max(range(len(vector["greedy_ids"])), key=lambda step: vector["margins"][step])
        vector["greedy_ids"][at] = (vector["greedy_ids"][at] + 1) % 300

    reseal(copy, other)
    assert any("golden vector 1 continues with" in line for line in faults(copy))


def flip(folder: Path, name: str, at: int, bit: int) -> None:
    path = folder / name
    raw = bytearray(path.read_bytes())
    raw[at] ^= bit
    path.write_bytes(raw)


def test_a_flipped_byte_of_the_weights_is_caught_though_its_hash_is_right(copy: Path) -> None:
    graph = onnx.load(str(copy / "model.onnx"), load_external_data=False).graph
    norm = next(each for each in graph.initializer if "final_norm" in each.name)
    place = {entry.key: entry.value for entry in norm.external_data}
    flip(copy, place["location"], int(place["offset"]) + 3, 0x02)  # of an exponent
    reseal(copy, lambda manifest: None)
    assert any(line.startswith("model: golden vector") for line in faults(copy))


def test_a_flipped_byte_is_caught_by_its_hash_and_nothing_is_loaded(copy: Path) -> None:
    flip(copy, "model.onnx.data", 100, 1)
    assert "model.onnx.data: changed since the export" in faults(copy)


def test_the_command_writes_text_or_json_and_exits_with_4_for_a_fault(copy: Path) -> None:
    arguments = ["verify", str(copy), "--for", PI, "--test", str(DATA), "--rows", "2"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["rows"]["rows"] == 2
    flip(copy, "tokenizer.json", 100, 1)
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, ParityFailed) and done.exception.exit_code == 4
    assert "tokenizer.json: changed since the export" in done.stdout


def test_too_little_time_is_said(copy: Path) -> None:
    with pytest.raises(EdgeftError, match=r"emulated: was not done with the bundle after ") as caught:
        verify_on(copy, PI, timeout=0.9)
    assert "--timeout" in str(caught.value)
