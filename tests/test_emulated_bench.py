"""The bench of the emulated device: what it takes as done, what it leaves out, which model it refuses."""

from __future__ import annotations

import importlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tiny import BENCH

from edgeft.documents import sha256_file
from edgeft.errors import BadInput


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("emulated")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "bundle.json").write_text("{}")
    return tmp_path / "bundle"


def check(bench: Any, bundle: Path, **changed: Any) -> dict[str, Any]:
    """What a verification wrote beside the bundle."""
    return {
        "input_sha256": sha256_file(bundle / "bundle.json"), "problems": [], "rows": {"rows": 4},
        "seconds_here": 1.0, "seconds_emulated": 9.0, "environment": {"features": list(bench.AT_START["features"])},
    } | changed  # fmt: skip


def case(bench: Any) -> Any:
    return bench.Case("example", "ort-int4", {}, 4, 60)


@pytest.mark.parametrize(
    "changed", [{"input_sha256": "00"}, {"rows": {"rows": 5}}, {"rows": None}, {"environment": {"features": ["none"]}}]
)
def test_a_verification_of_another_bundle_other_rows_or_another_machine_is_made_again(
    bench: Any, bundle: Path, changed: dict[str, Any]
) -> None:
    path = bundle.with_name("bundle.on-x.json")
    assert not bench.current(path, bundle, case(bench))
    path.write_text(json.dumps(check(bench, bundle)))
    assert bench.current(path, bundle, case(bench))
    path.write_text(json.dumps(check(bench, bundle, **changed)))
    assert not bench.current(path, bundle, case(bench))


def test_faults_are_recorded_seconds_are_not_and_what_is_done_is_not_done_again(
    bench: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = bundle.with_name(f"bundle.on-{bench.PROFILE}.json"), []

    def failing(*arguments: str) -> None:
        calls.append(arguments)
        assert not path.is_file()
        if len(calls) > 1:
            path.write_text(json.dumps(check(bench, bundle, problems=["golden vector 1 continues with 7"])))
        raise subprocess.CalledProcessError(4, "edgeft")

    monkeypatch.setattr(bench, "verb", failing)
    path.write_text(json.dumps(check(bench, bundle, input_sha256="of another bundle")))
    with pytest.raises(subprocess.CalledProcessError):  # nothing was found: no stale result takes its place
        bench.verified(bundle, Path("test.jsonl"), case(bench))
    found = [bench.verified(bundle, Path("test.jsonl"), case(bench)) for _ in range(2)]
    assert found[0] == found[1] and len(calls) == 2 and {"--for", bench.PROFILE} < set(calls[0])
    assert found[0]["problems"] == ["golden vector 1 continues with 7"]
    assert not [name for name in found[0] if "seconds" in name or name == "environment"]


def test_a_model_that_was_trained_otherwise_is_refused(bench: Any, tmp_path: Path) -> None:
    job = dict(bench.smollm2.SETTINGS)
    (tmp_path / "merged.json").write_text(json.dumps({"train": {"plan": {"job": job}}}))
    assert bench.smollm(tmp_path, tmp_path)[0] == tmp_path
    (tmp_path / "merged.json").write_text(json.dumps({"train": {"plan": {"job": job | {"rank": 8}}}}))
    with pytest.raises(BadInput, match=r"was not trained as this bench trains: .*'rank': 8"):
        bench.smollm(tmp_path, tmp_path)
