"""What does a stage leave on disk, and how does a killed run never leave half of it?

Every stage writes one folder (or one file) holding one JSON document, a frozen pydantic model derived from `Artifact`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import pydantic
from pydantic_core import CoreSchema, ErrorDetails, PydanticKnownError
from pydantic_core.core_schema import no_info_plain_validator_function

from edgeft.errors import BadInput, EdgeftError, did_you_mean
from edgeft.units import show_bytes

PACKAGES = (
    "edgeft",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "onnx",
    "onnxruntime",
    "onnxruntime-genai",
    "tokenizers",
    "gguf",
    "llama-cpp-python",
)


class Strict(pydantic.BaseModel):
    """Frozen data whose unknown keys are errors."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", defer_build=True)


@dataclass(frozen=True, eq=False)
class NameIn:
    """In `Annotated[str, NameIn(table)]`: a key of the table, as a Literal of all its keys would be."""

    table: Mapping[str, object]

    def __get_pydantic_core_schema__(self, source: Any, handler: pydantic.GetCoreSchemaHandler) -> CoreSchema:
        return no_info_plain_validator_function(self._known)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: pydantic.GetJsonSchemaHandler) -> Any:
        return {"enum": list(self.table), "type": "string"}

    def _known(self, value: object) -> str:
        if isinstance(value, str) and value in self.table:
            return value
        *others, last = [repr(name) for name in self.table]
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(others)} or {last}"})


class Artifact(Strict):
    """One stage's JSON document. `input_sha256` is the hash of the JSON document it was made from."""

    input_sha256: str = ""
    versions: dict[str, str] = {}

    def write(self, path: Path) -> None:
        """Write as indented JSON, through a temporary sibling so that a reader never sees half a file."""
        with saving(path):
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            try:
                temporary.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read one back. Raises BadInput naming the file and every field that does not fit."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise BadInput(path, "no such file", "run the stage that writes it first") from None
        except OSError as problem:
            raise BadInput(path, f"cannot be read: {problem.strerror}") from None
        except pydantic.ValidationError as problem:
            if is_yaml(path):
                raise BadInput(path, "is YAML, no document of edgeft's", TOML) from None
            raise invalid(path, problem, cls) from None


def invalid(where: object, problem: pydantic.ValidationError, model: type[pydantic.BaseModel]) -> BadInput:
    """All of pydantic's complaints as one BadInput; an unknown key gets the nearest known one as its hint."""
    lines, hint = [], ""
    for error in problem.errors():
        key = ".".join(str(part) for part in error["loc"])
        if error["type"] == "extra_forbidden":
            lines.append(f"unknown key {key!r}")
            hint = hint or did_you_mean(str(error["loc"][-1]), _field_names(model, error["loc"][:-1]))
        else:
            place = f"{key}: " if key else ""  # the document as a whole has no key
            around = error["type"] == "missing" or (not key and error["type"] == "value_error")  # got: all around it
            lines.append(place + _complaint(error) + ("" if around else f", got {error.get('input')!r:.120}"))
    return BadInput(where, "\n".join(lines), hint)


def _complaint(error: ErrorDetails) -> str:
    """What is wrong: a validator's own words as they are, pydantic's in small letters."""
    raised = error.get("ctx", {}).get("error")
    return str(raised) if isinstance(raised, ValueError) else error["msg"].lower()


def _field_names(model: type[pydantic.BaseModel], path: tuple[int | str, ...]) -> list[str]:
    for part in path:
        field = model.model_fields.get(str(part))
        if field is None or not (
            isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel)
        ):
            break
        model = field.annotation
    return [field.alias or name for name, field in model.model_fields.items()]


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: object) -> str:
    """Hex digest of a JSON-able value in canonical form: the same value, the same digest."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Python and the installed packages that can change a result; absent ones are left out. Imports none of them."""
    found = {package: version for package in packages if (version := _version(package))}
    return {"python": platform.python_version()} | found


@functools.cache  # a plan asks twice, and a page of many plans for each of them
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@contextlib.contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turn a failed write (disk full, no permission) below `path` into an EdgeftError that says what to do."""
    try:
        yield
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(nearest_folder(path)).free
            hint = "free some space or choose another place with --out (make: out=...), then run the same command again"
            raise EdgeftError(path, f"the disk is full ({show_bytes(free)} left)", hint) from None
        if problem.errno in (
            errno.EACCES,
            errno.EROFS,
            errno.EPERM,
            errno.ENOTDIR,
            errno.EISDIR,
            errno.EEXIST,
        ):
            raise EdgeftError(path, f"cannot write: {problem.strerror}", "choose another place with --out") from None
        raise


def nearest_folder(path: Path) -> Path:
    """The path itself, or the first folder above it that exists."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


@contextlib.contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A temporary sibling folder that becomes `out` when the block ends well, and goes away when it does not.

    Whatever `out` held is replaced, and only then. A leftover of a killed run is removed at the next start.
    Raises BadInput when `out` is a file, or a folder around the current one or the user's own.
    """
    named, out = out, out.resolve()  # behind a link it is the target that is replaced
    if out.is_file():
        raise BadInput(named, "is a file, a folder is written here", "choose another place with --out")
    home = Path(os.path.expanduser("~"))  # Path.home() raises for a user without one
    if any(place.resolve().is_relative_to(out) for place in (Path.cwd(), home)):
        raise BadInput(named, "would be replaced as a whole", "choose a folder for this alone with --out")
    temporary, previous = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.previous")
    with saving(out):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            shutil.rmtree(previous, ignore_errors=True)
            if out.exists():
                out.replace(previous)
            try:
                temporary.replace(out)
            except BaseException:
                if previous.exists():
                    previous.replace(out)
                raise
            shutil.rmtree(previous, ignore_errors=True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def cache_folder() -> Path:
    """Where edgeft keeps what can be made again: $XDG_CACHE_HOME/edgeft or ~/.cache/edgeft."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeft"


UNUSED_DAYS = 14  # after which what is kept makes room


def unused(folder: Path, pattern: str) -> list[Path]:
    """Files of a cache folder that nobody has touched for UNUSED_DAYS: what they stand for can be made again."""
    return [path for path in folder.glob(pattern) if time.time() - path.stat().st_mtime > UNUSED_DAYS * 86_400]


def shipped_folder(name: str) -> Path:
    """`profiles`, `export`, `examples` or `docs`: at the top of a checkout, in the package when installed from a wheel.

    `edgeft.export` is a function, so a wheel holds the targets as `export_targets`.
    """
    package = Path(__file__).resolve().parent
    inside = package / ("export_targets" if name == "export" else name)
    return inside if inside.is_dir() else package.parent / name


def shipped_path(kind: str, folder: str, name_or_path: str) -> Path:
    """The file of a shipped `kind` of that name, or a user's own: anything with a slash or ending in .toml.

    Raises BadInput for an unknown name; whether a user's own file exists is for its reader to see.
    """
    if name_or_path.endswith(".toml") or "/" in name_or_path or os.sep in name_or_path:
        return Path(name_or_path).expanduser()
    path = shipped_folder(folder) / f"{name_or_path}.toml"
    if not path.is_file():
        names = [file.stem for file in path.parent.glob("*.toml")]
        raise BadInput(
            kind, f"unknown {kind} {name_or_path!r}", did_you_mean(name_or_path, names, f"edgeft show {kind}s")
        )
    return path


def parse_toml(path: Path, absent: str) -> dict[str, Any]:
    """What a TOML file holds; `absent` is the hint where there is none. Raises BadInput for what is no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(path, "no such file", absent) from None
    except OSError as problem:
        raise BadInput(path, f"cannot be read: {problem.strerror}") from None
    except ValueError as problem:  # TOML syntax, and bytes that are not UTF-8
        hint = TOML if is_yaml(path) else "text needs quotes, tables come last"
        raise BadInput(path, f"not valid TOML: {problem}", hint) from None


TOML = "write TOML (edgeft init begins it); docs/other-trainers.md has what other trainers' keys are called here"


def is_yaml(path: str | Path) -> bool:
    """Whether a file is one of those that other trainers read their jobs from."""
    return Path(path).suffix in (".yaml", ".yml") and Path(path).is_file()


Model = TypeVar("Model", bound=pydantic.BaseModel)


def read_toml(kind: str, path: Path, model: type[Model], reserved: tuple[str, ...]) -> Model:
    """A TOML file as `model`, named after the file; `reserved` keys cannot be set in it.

    Raises BadInput for a file that is no TOML, an unknown key or a value that does not fit.
    """
    data = parse_toml(path, f"give a file that exists, or a shipped {kind}'s name")
    for key in sorted(set(reserved) & set(data)):
        raise BadInput(path, f"key {key!r} cannot be set", "remove the line: the file's name names it")
    try:
        return model.model_validate(data | {"name": path.stem})
    except pydantic.ValidationError as problem:
        raise invalid(path, problem, model) from None
