#!/usr/bin/env python3
"""Does this bundle answer, how fast, and is it still what was exported?

Needs Python 3.9 and the bundle's runtime, which bundle.json names:
onnxruntime-genai, llama-cpp-python (a .gguf file), or onnxruntime with
tokenizers, and jinja2 for a chat template; the latter two llguidance for
answers by a grammar.

python run.py "prompt"
    answers token by token (`-`, or nothing and a pipe: the prompt is standard
    input); --system TEXT and --messages FILE for a chat; --adapter NAME with
    one of the bundle's
python run.py
    on a terminal: a conversation with a model of chats, each line behind what
    was said before. A bundle that is held to labels answers with one of them:
    --json adds how probable it and the next best are, --min-probability P says
    "none of these" below, --free lets it write. One that is held to a grammar
    (a JSON Schema, a regular expression) writes a whole answer that parses, or
    none (exit 1)
python run.py --batch FILE --out OUT
    answers each line of a file, {"prompt": ...} or {"messages": ...}, into a
    line of --json; what was killed goes on where it was; --serve: standard
    input, as it comes
python run.py --serve 8080
    OpenAI's /v1/chat/completions, /v1/completions and /v1/models, streamed
    where asked, on this machine alone unless a host is named; one answer at a
    time, 16 requests may wait. Where answers copy, several tokens are guessed
    and checked in a pass: --guess, --no-guess
python run.py --bench
    time to first token, tokens/s, peak memory, share of the memory-bandwidth
    bound
python run.py --verify
    every file's sha256, the signature, then the golden vectors recorded at
    export

What is loaded is compared with its hash first, each time (--no-check leaves
that out). Hashes show damage. They do not show who made a bundle: whoever can
replace a file can replace its hash and this script too. Against that, a copy
of this script and a --public-key from elsewhere than the bundle, for answers
as for --verify.

A prompt, a conversation, a line of a batch and each JSON file may have 16 MiB.
Nothing is written but the answers of --batch, and nothing is sent: the
runtime's own telemetry is switched off, unless the user's
ORT_DISABLE_TELEMETRY=0 says otherwise.

Exit codes: 0 done, 1 bad input, 2 usage, 4 this is not what was exported, 5 the
runtime is missing.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    del sys.path[0]  # this folder: a file put beside this one must not be imported as hashlib or numpy

import argparse
import base64
import binascii
import codecs
import contextlib
import ctypes
import datetime
import hashlib
import heapq
import importlib
import json
import math
import os
import platform
import queue
import stat
import threading
import time
from pathlib import Path
from typing import (  # noqa: UP035 (one import less on a device)
    Any,
    Callable,
    Iterable,
    Iterator,
    NamedTuple,
    Optional,
    Sequence,
)

# onnxruntime since 1.29 and onnxruntime-genai since 0.18 write a device id into the home folder and look for a
# collector, unless told before they are imported. What a user has set stays.
SILENCE = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")
for _variable in SILENCE:
    os.environ.setdefault(_variable, "1")

MANIFEST = "bundle.json"
SELF_HASH = "self_sha256"  # of bundle.json's own bytes, with 64 zeros in the place of this hash
BLANK_HASH = "0" * 64
# Tokens per forward pass of a prompt: activations grow with it. Blocks of 64 or more give the very numbers of one
# pass, and 128 to 256 are the fastest: 512 are 9% slower at 135M.
PREFILL_TOKENS = 256
ONE_MORE = 16  # tokens: no pass has one more than a multiple of these
SIGNATURE = "bundle.sig"
SIGNED = b"edgeft bundle 1\n"  # what is signed: this, so that no other use of a key can be mistaken, and bundle.json
# How the names of those processor features begin by which runtimes choose their kernels.
FEATURES = ("amx", "avx", "fma", "f16c", "asimd", "bf16", "fphp", "i8mm", "sve")
MOST_BYTES = 16 * 2**20  # of a prompt, a conversation or a JSON file: the largest of them take a tenth
RUNNER = "run.py"
NEVER_LOADED = (RUNNER, "sbom.cdx.json", "README.md")
# By their mere presence beside the model a runtime reads files of these names; of other strangers it knows nothing.
READ_UNASKED = (".json", ".jinja", ".model", ".txt", ".onnx", ".data", ".gguf")
# A file of these may crash the runtime when it is damaged.
TEMPLATE = "chat_template.jinja"
REASONING = ("reasoning_content", "thinking", "reasoning")  # what templates and data call a message's thoughts
FILES_OF_THE_MODEL = ("genai_config.json", "tokenizer_config.json", ".onnx", ".onnx.data", ".onnx_adapter", ".gguf")


COPY_AGAIN = "copy the bundle again; --verify looks at every file of it"
MOVE_OUT = "move it out of this folder: a runtime may read files of such names unasked"


NONE_OF_THESE = "none of these"  # the answer where no label is probable enough
# How exactly probabilities are known where they are shown: so far the search goes on. Half of it on either side.
PROBABILITY_WITHIN = 0.02

GRAMMARS = ("regex", "json_schema", "lark")  # the forms of answers that are written, not chosen
MAX_TOKENS = 128  # of a free answer, where nobody says

SPIN_MICROSECONDS = 200  # that a thread spins for before it sleeps

# Positions at a pass's end whose logits an onnxruntime-genai bundle gives, in an output of this name beside those of
# the last: so many guesses, and the token before them, are checked at once.
LAST_POSITIONS, LAST_LOGITS = 8, "last_logits"
GRAMS = (5, 4, 3)  # tokens that must be those of an earlier place for what followed there to be guessed, most first


class RunError(Exception):
    """What a user can do something about: printed without a traceback."""

    exit_code = 1

    def __init__(self, where: object, problem: str, hint: str = "") -> None:
        self.where, self.problem, self.hint = str(where), problem, hint
        super().__init__(f"{where}: {problem}" + (f"\n\nhint: {hint}" if hint else ""))


class MissingRuntime(RunError):
    exit_code = 5


class NotAsExported(RunError):
    exit_code = 4


def runtime(module: str, package: str) -> Any:
    """The runtime's Python module. Raises MissingRuntime naming the package."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as problem:  # a shared library that does not load: the latter two
        raise MissingRuntime(package, f"cannot be imported: {problem}", f"pip install {package}") from None


def read_limited(path: Path) -> bytes:
    """A plain file's bytes. Raises RunError for one of more than MOST_BYTES, OSError."""
    if not stat.S_ISREG(os.stat(str(path)).st_mode):
        raise RunError(path, "is no plain file")
    with open(path, "rb") as file:
        raw = file.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise RunError(path, f"is larger than the {MOST_BYTES >> 20} MiB that are read")
    return raw


def parse_json(where: object, raw: bytes, hint: str) -> Any:
    """What JSON text says. Raises RunError for text that is none, or nested too deeply."""
    try:
        return json.loads(raw.decode("utf-8"))
    except RecursionError:
        raise RunError(where, "cannot be read: it is nested too deeply", hint) from None
    except (ValueError, MemoryError) as problem:
        raise RunError(where, f"cannot be read: {problem}", hint) from None


def name_fault(name: object) -> str:
    """Why the file of this name may not be opened, or nothing: it must stay in the bundle, on every system."""
    if not isinstance(name, str) or not name:
        return "is no file name"
    if not name.isprintable() or any(sign in name for sign in '\\:*?"<>|'):
        return "is a file name with a drive, backslash or sign that another system takes for more than a name"
    if any(part.rstrip(". ") != part or not part for part in name.split("/")):
        return "is a file name that may lead out of the bundle"
    return ""


def linked(bundle: Path, name: str) -> str:
    """The part of a name in a bundle that is a link, or nothing: behind one may be other bytes tomorrow."""
    parts = name.split("/")
    places = ("/".join(parts[: count + 1]) for count in range(len(parts)))
    return next((place for place in places if (bundle / place).is_symlink()), "")


def read_manifest(bundle: Path) -> dict[str, Any]:
    """bundle.json as a dict. Raises RunError naming what is wrong with it."""
    return _manifest(bundle)[1]


def _manifest(bundle: Path) -> tuple[bytes, dict[str, Any]]:
    """bundle.json as bytes, read once, and what they say. Raises RunError."""
    path, again = bundle / MANIFEST, "copy the bundle again"
    try:
        raw = read_limited(path)
    except FileNotFoundError:
        raise RunError(path, "no such file", "run from inside a bundle, or name one with --bundle PATH") from None
    except OSError as problem:
        raise RunError(path, f"cannot be read: {problem}", again) from None
    manifest = parse_json(path, raw, again)
    if not isinstance(manifest, dict):
        raise RunError(path, "is not a JSON object", again)
    if manifest.get("format_version") != 1:
        raise RunError(path, f"unknown format_version {manifest.get('format_version')!r:.80}, this file reads 1")
    missing = [key for key in ("files", "golden", "prompt_format", "prefix_ids", SELF_HASH) if key not in manifest]
    if missing:
        raise RunError(path, "incomplete, there is no " + ", ".join(map(repr, missing)), again)
    fault = _tables_fault(manifest) or _kinds_fault(manifest)
    if fault:
        raise NotAsExported(path, fault, "do not use this bundle: no export writes that")
    return raw, manifest


def _tables_fault(manifest: dict[str, Any]) -> str:
    """What is wrong with the manifest's tables of files and adapters, or nothing."""
    files, adapters = manifest["files"], manifest.get("adapters") or {}
    for key, table in (("files", files), ("adapters", adapters)):
        if not isinstance(table, dict) or not all(isinstance(entry, dict) for entry in table.values()):
            return f"{key!r} is no table of names and what belongs to them"
    for name in [*files, *(entry.get("file") for entry in adapters.values())]:
        if name_fault(name):
            return f"{name!r:.80} {name_fault(name)}"
    strange = [entry["file"] for entry in adapters.values() if entry["file"] not in files]
    if strange:
        return f"{strange[0]!r:.80} is an adapter's file that is not among 'files'"
    held = manifest.get("answers")
    if isinstance(held, dict) and isinstance(held.get("file"), str) and held["file"] not in files:
        return f"{held['file']!r:.80} is the file of 'answers' and not among 'files'"
    past = manifest.get("kv_prefix")
    if isinstance(past, dict) and past.get("file") not in files:
        return f"{past.get('file')!r:.80} is the file of 'kv_prefix' and not among 'files'"
    return ""


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int and 0 <= each < 2**31 for each in value)


# What a program may rely on once the manifest was read.
KINDS: dict[str, Callable[[Any], bool]] = {
    "prefix_ids": _are_ids,
    "stop_ids": _are_ids,
    "context_tokens": lambda value: type(value) is int and 0 < value < 2**31,
    "weight_bytes_per_token": lambda value: type(value) is int and 0 < value < 2**63,
    "prompt_format": lambda value: value in ("plain", "chat"),
    "system": lambda value: value is None or isinstance(value, str),
    "labels": lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value),
    "task": lambda value: value in ("text-generation", "text-classification", "feature-extraction"),
    "golden": lambda value: isinstance(value, list),
    "failed": lambda value: isinstance(value, str),
    "answers": lambda value: value is None or _are_answers(value),
    "guesses": lambda value: value is None or (isinstance(value, dict) and type(value.get("on")) is bool),
    "kv_prefix": lambda value: value is None or _is_prefix(value),
}


def _is_prefix(value: Any) -> bool:
    """Whether a manifest's entry says what lies before every text: a file, and of how many tokens."""
    if not isinstance(value, dict) or not isinstance(value.get("file"), str):
        return False
    return type(value.get("tokens")) is int and 0 < value["tokens"] < 2**31


def _are_answers(value: Any) -> bool:
    """Whether a manifest's entry says how answers are held: to a file's grammar, or its labels at a temperature."""
    if not isinstance(value, dict) or not isinstance(value.get("file"), str):
        return False
    if value.get("form") != "labels":
        return value.get("form") in GRAMMARS
    temperature = value.get("temperature")
    return type(temperature) in (int, float) and 0 < temperature < 1e6


def _kinds_fault(manifest: dict[str, Any]) -> str:
    """Which value of the manifest, or of an adapter's entry in it, is not of its kind; or nothing."""
    entries = [
        ("", manifest),
        *((f" of adapter {name}", each) for name, each in (manifest.get("adapters") or {}).items()),
    ]
    for whose, entry in entries:
        for key, right in KINDS.items():
            if key in entry and not right(entry[key]):
                return f"{key!r}{whose} cannot be {str(entry[key])[:80]!r}"
    return ""


def check_adapter(bundle: Path, manifest: dict[str, Any], name: str, check: bool = True) -> Path:
    """The file of an adapter that fits the bundle's graph: base, names, shapes, hash. Raises RunError."""
    adapters = manifest.get("adapters") or {}
    if name not in adapters:
        known = ", ".join(sorted(adapters)) or "none"
        raise RunError("--adapter", f"there is no adapter {name!r} in this bundle", f"it has: {known}")
    where, again = f"adapter {name}", "export the bundle again with this adapter"
    try:
        entry, inputs = adapters[name], manifest["adapter_inputs"]
        base, own = manifest["provenance"].get("base weights"), entry["base_sha256"]
        if base != own:
            raise RunError(where, f"was trained on the base {own}, this bundle holds {base}", again)
        for parameter, shape in entry["parameters"].items():
            if parameter not in inputs:
                raise RunError(where, f"{parameter}: the graph has no such input", again)
            # 0 stands for the rank, or a prefix's tokens, which every adapter has its own of
            wanted = inputs[parameter]
            if len(shape) != len(wanted) or any(size not in (0, shape[n]) for n, size in enumerate(wanted)):
                raise RunError(where, f"{parameter}: shape {shape} does not fit the graph's {wanted}", again)
        file = entry["file"]
        if linked(bundle, file):
            raise NotAsExported(where, f"{linked(bundle, file)}: is a link, the export wrote none", COPY_AGAIN)
        if check and sha256_of(bundle / file) != manifest["files"][file]["sha256"]:
            raise NotAsExported(where, f"{file}: changed since the export", COPY_AGAIN)
    except (KeyError, TypeError, AttributeError, OSError) as problem:
        raise RunError(where, f"cannot be used: {problem!r}", "run --verify") from None
    return bundle / file


def read_config(bundle: Path, names: Iterable[str]) -> dict[str, Any]:
    """genai_config.json. Raises RunError where it names a file that is not the bundle's, or a library to load."""
    path = bundle / "genai_config.json"
    try:
        config = parse_json(path, read_limited(path), "run --verify")
    except OSError as problem:
        raise RunError(path, f"cannot be read: {problem}", "run --verify") from None
    allowed = set(names)
    for key, value in _settings(config):
        if "library" in key.lower():
            raise NotAsExported(path, f"names a library to load, {key!r}: {value!r:.80}", "do not use this bundle")
        if key == "filename" and value not in allowed:
            raise NotAsExported(path, f"names a file that is not the bundle's: {value!r:.80}", "do not use this bundle")
    return config if isinstance(config, dict) else {}


def _settings(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth of a JSON document."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            yield from each.items()
            waiting.extend(each.values())
        elif isinstance(each, list):
            waiting.extend(each)


class Grammar(NamedTuple):
    """What answers are held to, in a language of its own: one of GRAMMARS."""

    form: str
    text: str

    @classmethod
    def read(cls, bundle: Path, held: dict[str, Any]) -> Grammar:
        """The grammar of a bundle's file. Raises RunError."""
        path = bundle / held["file"]
        try:
            return cls(held["form"], read_limited(path).decode("utf-8"))
        except (OSError, ValueError) as problem:
            raise RunError(path, f"cannot be read: {problem}", COPY_AGAIN) from None

    def refused(self, problem: object) -> RunError:
        """What is said of a grammar that its reader does not take."""
        return RunError(f"answers ({self.form})", str(problem), "the runtime or the tokenizer cannot express it")


class Matcher:
    """Which tokens an answer may go on with, by the llguidance package, which onnxruntime-genai has inside."""

    def __init__(self, grammar: Grammar, words: Any, stop_ids: Iterable[int]) -> None:
        """`words` is the tokenizer as llguidance's LLTokenizer. Raises RunError for a grammar that cannot be read."""
        kind = runtime("llguidance", "llguidance").LLMatcher
        self.stops = set(stop_ids)
        try:
            self.state = kind(words, getattr(kind, f"grammar_from_{grammar.form}")(grammar.text), log_level=0)
        except ValueError as problem:
            raise grammar.refused(problem) from None
        if self.state.is_error():
            raise grammar.refused(self.state.get_error())

    def restart(self) -> None:
        self.state.reset()

    def allowed(self, words: int) -> Any:
        """Which of so many tokens may come next: bool (words,). Raises RunError where the grammar is too large."""
        import numpy

        bits, made = self.state.compute_bitmask(), numpy.zeros(words, dtype=bool)
        if self.state.is_error():
            said = self.state.get_error().splitlines()[0]
            if said.startswith("NoExtension"):  # none that the tokenizer has
                return made
            raise RunError("answers", said, "make the grammar simpler")
        found = numpy.unpackbits(numpy.frombuffer(bits, dtype=numpy.uint8), bitorder="little")[:words]
        made[: len(found)] = found
        return made

    def take(self, token: int) -> bool:
        """Whether a token was allowed; it is taken then. An end token ends the answer."""
        return (token in self.stops and self.stopped()) or bool(self.state.try_consume_tokens([token]) == 1)

    def stopped(self) -> bool:
        """Whether the answer has its end, or can have nothing else."""
        return bool(self.state.is_stopped())

    def whole(self, ids: Sequence[int]) -> bool:
        """Whether these tokens, an end token behind them, are an answer."""
        self.restart()
        taken = self.state.try_consume_tokens(list(ids[:-1]))
        return ids[-1] in self.stops and bool(taken == len(ids) - 1 and self.state.is_accepting())


class Guided:
    """A session whose answers may be held to a grammar by a Matcher."""

    matcher: Matcher | None = None

    def hold(self, engine: Any, grammar: Grammar | None) -> None:
        """Hold answers to a grammar; the engine keeps its tokenizer, which takes long to make."""
        if grammar is None:
            return
        if not hasattr(engine, "llguidance_words"):
            engine.llguidance_words = engine.words()
        self.matcher = Matcher(grammar, engine.llguidance_words, engine.eos_ids)

    def begin(self) -> None:
        """A new answer."""
        if self.matcher is not None:
            self.matcher.restart()

    def pick(self, values: Any) -> int:
        """The token with the most of those that the grammar allows next."""
        import numpy

        assert self.matcher is not None
        self.picked = int(numpy.where(self.matcher.allowed(len(values)), values, -numpy.inf).argmax())
        if not self.matcher.take(self.picked):
            raise RunError("answers", "nothing that the grammar wants next is a token of this model", "make it simpler")
        return self.picked

    def following(self) -> Any:
        """Logits after the token that was picked last."""
        return self.append([self.picked])  # type: ignore[attr-defined]


class OnnxRuntimeGenAI:
    """A bundle's model.onnx in onnxruntime-genai, which has the tokenizer and the chat template too.

    `graph` takes the place of model.onnx, over the same weights.
    """

    shares = True  # a prompt's numbers are the same to the bit, however many of its tokens the cache held already

    def __init__(self, bundle: Path, manifest: dict[str, Any], check: bool, graph: bytes | None = None) -> None:
        self.og = runtime("onnxruntime_genai", "onnxruntime-genai")
        config = read_config(bundle, manifest["files"])
        try:
            self.context_tokens = int(config["model"]["context_length"])
            eos = config["model"]["eos_token_id"]
            self.eos_ids = list(eos) if isinstance(eos, list) else [eos]
        except (ValueError, KeyError, TypeError, OverflowError) as problem:
            raise RunError(bundle / "genai_config.json", f"cannot be used: {problem!r}", "run --verify") from None
        self.bundle, self.manifest, self.check = bundle, manifest, check
        self.adapters: Any = None  # the loaded ones
        self.loaded: set[str] = set()
        self.adapter: str | None = None  # the one in use
        try:
            settings = self.og.Config(str(bundle))
            # onnxruntime-genai's own choice is half the cores
            threads = usable_threads()
            session = {"intra_op_num_threads": threads, **spinning(threads)}
            settings.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
            if graph is not None:
                settings.add_model_data(config["model"]["decoder"]["filename"], graph)
            self.model = self.og.Model(settings)
            self.tokenizer = self.og.Tokenizer(self.model)
            # prefix_ids are added by Runner, for plain prompts only: a chat template writes its own
            self.tokenizer.update_options(add_special_tokens="false")
        except Exception as problem:  # onnxruntime-genai raises bare RuntimeError for whatever a file holds
            raise RunError(
                bundle, f"cannot be loaded: {problem}", "run --verify to see which file is damaged"
            ) from None

    def use(self, adapter: str | None) -> None:
        """As Runner.use."""
        if adapter is not None and adapter not in self.loaded:
            entry = (self.manifest.get("adapters") or {}).get(adapter) or {}
            before = _stamps(self.bundle, [entry["file"]] if self.check and entry else ())
            path = check_adapter(self.bundle, self.manifest, adapter, self.check)
            try:
                if self.adapters is None:
                    self.adapters = self.og.Adapters(self.model)
                self.adapters.load(str(path), adapter)
            except Exception as problem:  # bare RuntimeError, as above
                hint = "run --verify to see which file is damaged"
                raise RunError(f"adapter {adapter}", f"cannot be loaded: {problem}", hint) from None
            _same_as_checked(self.bundle, before)
            self.loaded.add(adapter)
        self.adapter = adapter

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer.encode(text)]

    def decoder(self) -> Callable[[int], str]:
        """The text that each next token adds.

        Through the stream on purpose: `decode` of onnxruntime-genai 0.18 drops everything behind a broken
        UTF-8 sequence, the stream only the next few bytes.
        """
        return self.tokenizer.create_stream().decode  # type: ignore[no-any-return]

    def render(self, messages: list[dict[str, Any]], tools: Listed = None, documents: Listed = None) -> str:
        if not tools and not documents:
            return str(self.tokenizer.apply_chat_template(json.dumps(as_seen(messages)), add_generation_prompt=True))
        # onnxruntime-genai 0.18 rewrites tools before a template sees them: other keys, "str" for "string"
        runtime("jinja2", "jinja2")
        template, special = read_template(self.bundle)
        if template is None:
            raise RunError(self.bundle / TEMPLATE, "no such file")
        return apply_template(template, messages, special, tools, documents)

    def start(self, max_tokens: int, grammar: Grammar | None = None) -> OnnxSession:
        return OnnxSession(self, max_tokens, grammar)


class OnnxSession:
    """One text through the model; its KV cache is allocated for `max_tokens`."""

    def __init__(self, engine: OnnxRuntimeGenAI, max_tokens: int, grammar: Grammar | None = None) -> None:
        params, self.stops = engine.og.GeneratorParams(engine.model), engine.eos_ids
        params.set_search_options(max_length=max_tokens)
        if grammar is not None:  # the largest of the logits that it is given, whatever the model's folder asks for
            params.set_search_options(do_sample=False, num_beams=1, repetition_penalty=1.0, min_length=0)
            params.set_guidance("lark_grammar" if grammar.form == "lark" else grammar.form, grammar.text)
        try:
            self.generator = engine.og.Generator(engine.model, params)
        except RuntimeError as problem:
            if grammar is None:
                raise
            raise grammar.refused(problem) from None
        if engine.adapter is not None:
            self.generator.set_active_adapter(engine.adapters, engine.adapter)

    def append(self, ids: list[int], every: bool = False) -> Any:
        """Logits after the last token, or after each: (vocabulary,) or (len(ids), vocabulary).

        Raises RunError if each is asked for and the graph gives the last few tokens' alone, as a bundle's own does.
        """
        self.generator.append_tokens(ids)
        if not every:
            return self.generator.get_logits()[0, -1]  # of the last position: get_output would copy a whole pass
        rows = self.generator.get_output("logits")[0]
        if len(rows) != len(ids):
            with contextlib.suppress(RuntimeError):  # bundles of before 0.3 have no such output
                rows = self.generator.get_output(LAST_LOGITS)[0]
        if len(rows) != len(ids):
            few = f"{len(rows)} tokens" if len(rows) > 1 else "token"
            raise RunError("logits", f"this graph gives those of a pass's last {few} alone", "use Runner.last_logits")
        return rows

    def rewind(self, tokens: int) -> None:
        """Forget all but the first `tokens`: exact, the cache holds them as they were. A grammar begins anew."""
        self.generator.rewind_to(tokens)

    def pick(self, values: Any) -> int:
        """The token with the most of those that the grammar allows next, by the runtime's own guidance.

        That knows the first end token alone: it stands for all of them.
        """
        import numpy

        values = numpy.array(values, dtype=numpy.float32)
        values[self.stops[0]] = values[self.stops].max()
        try:
            self.generator.set_logits(values[None])
            self.generator.generate_next_token()
        except RuntimeError as problem:
            raise RunError("answers", str(problem).splitlines()[0], "make the grammar simpler") from None
        return int(self.generator.get_next_tokens()[0])

    def following(self) -> Any:
        """Logits after the token that was picked last."""
        return self.generator.get_logits()[0, -1]


Listed = Optional[list[Any]]  # noqa: UP045 (evaluated, by Python 3.9)


def apply_template(
    template: str, messages: list[dict[str, Any]], special: dict[str, str], tools: Listed = None,
    documents: Listed = None,
) -> str:  # fmt: skip
    """A chat template's text for messages, up to where the answer begins."""
    given = {"messages": as_seen(messages), "tools": tools, "documents": documents, **special}
    return str(compile_template(template).render(add_generation_prompt=True, **given))


def compile_template(template: str) -> Any:
    """A chat template as transformers runs it, in jinja2's sandbox: templates are programs from strangers."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - marks what the assistant says: nothing here

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    extensions: list[Any] = ["jinja2.ext.loopcontrols", Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.globals.update(raise_exception=refuse, strftime_now=datetime.datetime.now().strftime)
    environment.filters["tojson"] = to_json
    return environment.from_string(template)


def as_seen(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as transformers 5 shows them to a template: without what is null, thoughts under all of their names."""
    seen = []
    for message in messages:
        kept = {key: value for key, value in message.items() if value is not None}
        thoughts = next((kept[name] for name in REASONING if name in kept), None)
        if thoughts is not None:
            kept = {"thinking": thoughts, **kept, "reasoning_content": thoughts}
        seen.append(kept)
    return seen


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """The filter of that name as templates know it: jinja2's own would write <, > and & otherwise."""
    options: dict[str, Any] = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def read_template(bundle: Path) -> tuple[str | None, dict[str, str]]:
    """(chat_template.jinja if there is one, the special tokens that it may name). Raises RunError."""
    config_path, path = bundle / "tokenizer_config.json", bundle / TEMPLATE
    try:
        config = parse_json(config_path, read_limited(config_path), "run --verify") if config_path.is_file() else {}
        text = read_limited(path).decode("utf-8") if path.is_file() else None
        special = {}  # a token that is not there has no name either
        for name in ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token"):
            if value := config.get(name):
                special[name] = str(value["content"] if isinstance(value, dict) else value)
    except (OSError, ValueError, KeyError, AttributeError) as problem:
        raise RunError(bundle, f"the chat template cannot be read: {problem!r}", "run --verify") from None
    return text, special


def read_past(bundle: Path, prefix: dict[str, Any] | None, inputs: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """(tokens, keys and values by a graph's input) that a text begins with: none without a prefix. Raises RunError."""
    import numpy

    wanted = {name: value.shape for name, value in inputs.items() if name.startswith("past_key_values.")}
    if prefix is None:
        return 0, {name: numpy.zeros((1, shape[1], 0, shape[3]), numpy.float32) for name, shape in wanted.items()}
    tokens = prefix["tokens"]
    shapes = {name: [1, heads, tokens, width] for name, (_, heads, _, width) in wanted.items()}
    return tokens, read_tensors(bundle / prefix["file"], shapes)


def read_tensors(path: Path, shapes: dict[str, list[int]]) -> dict[str, Any]:
    """A safetensors file's numbers in fp32: the length of its header, the header as JSON, the numbers.

    Raises RunError where it has other tensors than these, or of other shapes.
    """
    import numpy

    try:
        raw, found = path.read_bytes(), {}
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        if set(header) - {"__metadata__"} != set(shapes):
            raise ValueError("its tensors are not the graph's inputs")
        for name, shape in shapes.items():
            begin, end = header[name]["data_offsets"]
            if header[name]["dtype"] != "F32" or header[name]["shape"] != list(shape):
                raise ValueError(f"{name} is no fp32 tensor of shape {list(shape)}")
            found[name] = numpy.frombuffer(raw[start + begin : start + end], dtype="<f4").reshape(shape)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise RunError(path, f"cannot be used: {problem}", "run --verify") from None
    return found


class OnnxRuntime:
    """A bundle's model.onnx in plain onnxruntime; text by the tokenizers library and jinja2."""

    check = True  # compare an adapter's file with its hash

    def __init__(self, bundle: Path, manifest: dict[str, Any]) -> None:
        self.ort = runtime("onnxruntime", "onnxruntime")
        self.bundle = bundle
        try:
            self.context_tokens = int(manifest["context_tokens"])
            self.eos_ids = [int(token) for token in manifest["stop_ids"]]
        except (KeyError, TypeError, ValueError, OverflowError) as problem:
            raise RunError(bundle / MANIFEST, f"cannot be used: {problem!r}", "run --verify") from None
        tokenizers = runtime("tokenizers", "tokenizers")
        options = self.ort.SessionOptions()
        options.intra_op_num_threads = threads = usable_threads()
        for name, value in spinning(threads).items():
            options.add_session_config_entry(name, value)
        options.log_severity_level = 3  # errors: what it warns of is no matter of a user's
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(bundle / "tokenizer.json"))
            self.tokenizer.no_truncation()
            self.tokenizer.no_padding()
            path, providers = str(bundle / "model.onnx"), ["CPUExecutionProvider"]
            self.model = self.ort.InferenceSession(path, options, providers=providers)
        except Exception as problem:  # both raise exceptions of their own for whatever a file holds
            hint = "run --verify to see which file is damaged"
            raise RunError(bundle, f"cannot be loaded: {problem}", hint) from None
        target = manifest.get("target")
        # 8-bit graphs scale a pass's activations by their largest: its other tokens change a token's numbers
        self.shares = isinstance(target, dict) and target.get("weight_bits") == 32
        self.template, self.special = read_template(bundle)
        self.inputs = {value.name: value for value in self.model.get_inputs()}
        self.outputs = [value.name for value in self.model.get_outputs()]
        self.manifest = manifest
        # (tokens, keys and values before a text, other inputs) without an adapter, and of each that was in use
        self.used: dict[str | None, tuple[int, dict[str, Any], dict[str, Any]]] = {
            None: (*read_past(bundle, manifest.get("kv_prefix"), self.inputs), {})
        }
        self.before, self.past, self.given = self.used[None]

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decoder(self) -> Callable[[int], str]:
        """The text that each next token adds: the last tokens' text with it, less theirs without it.

        The tokens before are needed: some tokenizers drop a text's first space.
        """
        ids: list[int] = []
        first = shown = 0  # ids[first:shown] is the last text that was whole

        def text(some: list[int]) -> str:
            return str(self.tokenizer.decode(some, skip_special_tokens=True))

        def decode(token: int) -> str:
            nonlocal first, shown
            ids.append(token)
            before, now = text(ids[first:shown]), text(ids[first:])
            if now.endswith("\ufffd"):  # half a character: the next token may complete it
                return ""
            first, shown = shown, len(ids)
            return now[len(before) :]

        return decode

    def use(self, adapter: str | None) -> None:
        """As Runner.use: what the graph is given of texts that begin from now on."""
        if adapter not in self.used:
            entry = (self.manifest.get("adapters") or {}).get(adapter) or {}
            before = _stamps(self.bundle, [entry["file"]] if self.check and entry else ())
            path = check_adapter(self.bundle, self.manifest, str(adapter), self.check)
            tokens = (entry.get("kv_prefix") or {}).get("tokens")
            if tokens is None:
                read = read_tensors(path, entry["parameters"])
                make = self.ort.OrtValue.ortvalue_from_numpy
                self.used[adapter] = (*self.used[None][:2], {name: make(values) for name, values in read.items()})
            else:
                past = read_past(self.bundle, {"file": entry["file"], "tokens": tokens}, self.inputs)
                self.used[adapter] = (*past, {})
            _same_as_checked(self.bundle, before)
        self.before, self.past, self.given = self.used[adapter]

    def render(self, messages: list[dict[str, Any]], tools: Listed = None, documents: Listed = None) -> str:
        if self.template is None:
            raise RunError(self.bundle / TEMPLATE, "no such file")
        return apply_template(self.template, messages, self.special, tools, documents)

    def start(self, max_tokens: int, grammar: Grammar | None = None) -> OnnxRuntimeSession:
        return OnnxRuntimeSession(self, grammar)

    def words(self) -> Any:
        """The tokenizer as llguidance reads it."""
        text = (self.bundle / "tokenizer.json").read_text(encoding="utf-8")
        return runtime("llguidance", "llguidance").LLTokenizer(text, eos_token=self.eos_ids)


class OnnxRuntimeSession(Guided):
    """One text through the model. Its KV cache is what the graph gave for the tokens before, and grows with them."""

    def __init__(self, engine: OnnxRuntime, grammar: Grammar | None = None) -> None:
        self.engine, self.done, self.before, self.given = engine, 0, engine.before, engine.given
        self.hold(engine, grammar)
        make = engine.ort.OrtValue.ortvalue_from_numpy
        self.cache = {name: make(values) for name, values in engine.past.items()}

    def append(self, ids: list[int], every: bool = False) -> Any:
        """Logits after the last token, or after each: (vocabulary,) or (len(ids), vocabulary)."""
        import numpy

        total, before = self.done + len(ids), self.before
        given = {
            "input_ids": numpy.array([ids], dtype=numpy.int64),
            "attention_mask": numpy.ones((1, before + total), dtype=numpy.int64),
            "position_ids": numpy.arange(before + self.done, before + total, dtype=numpy.int64)[None],
        }
        make = self.engine.ort.OrtValue.ortvalue_from_numpy
        feeds = {name: make(array) for name, array in given.items() if name in self.engine.inputs}
        values = self.engine.model.run_with_ort_values(self.engine.outputs, {**feeds, **self.given, **self.cache})
        made = dict(zip(self.engine.outputs, values))  # noqa: B905
        # present.N.key is the next past_key_values.N.key
        self.cache = {name: made["present" + name[len("past_key_values") :]] for name in self.cache}
        self.done = total
        logits = made["logits"].numpy()[0]
        return logits if every else logits[-1]

    def rewind(self, tokens: int) -> None:
        """Forget all but the first `tokens`."""
        make = self.engine.ort.OrtValue.ortvalue_from_numpy
        # copies: a value made of an array lies in its memory, and this one's is given back
        kept = self.before + tokens
        self.cache = {name: make(value.numpy()[:, :, :kept].copy()) for name, value in self.cache.items()}
        self.done = tokens
        self.begin()


class OnnxEncoder(OnnxRuntime):
    """A bundle's model.onnx that gives a text's logits, or an embedding: the mean of its tokens' last hidden states."""

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text).ids)  # with the tokens that an encoder wants around a text

    def values(self, ids: list[int]) -> Any:
        """Logits (labels,) or the embedding (hidden,)."""
        import numpy

        given = {"input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": [0] * len(ids)}
        feeds = {name: numpy.array([given[name]], dtype=numpy.int64) for name in self.inputs}
        made = dict(zip(self.outputs, self.model.run(self.outputs, feeds)))  # noqa: B905
        return made["logits"][0] if "logits" in made else made["last_hidden_state"][0].mean(axis=0)


class LlamaCpp:
    """A bundle's model.gguf in llama.cpp, by the functions of its C interface that llama-cpp-python declares."""

    shares = False  # attention over 64 tokens and more is another kernel's than over fewer: a pass's length tells

    def __init__(self, bundle: Path, manifest: dict[str, Any]) -> None:
        self.api = api = runtime("llama_cpp", "llama-cpp-python")
        _silence(api)
        try:
            self.context_tokens = int(manifest["context_tokens"])
            self.eos_ids = [int(token) for token in manifest["stop_ids"]]
        except (KeyError, TypeError, ValueError, OverflowError) as problem:
            raise RunError(bundle / MANIFEST, f"cannot be used: {problem!r}", "run --verify") from None
        target = manifest.get("target")
        self.kv_bits = target.get("kv_bits") if isinstance(target, dict) else None
        path = bundle / "model.gguf"
        params = api.llama_model_default_params()
        params.n_gpu_layers = 0  # the proof is the processor's
        # Weights rearranged for the processor's own instructions. llama.cpp 0.5 crashes in those of Intel's AMX
        # where the system does not grant it their registers, as in many containers.
        params.use_extra_bufts = not _uses_amx(api)
        self.model = api.llama_model_load_from_file(str(path).encode(), params) if path.is_file() else None
        if not self.model:
            raise RunError(path, "cannot be loaded", "run --verify to see whether it is damaged")
        self.vocab = api.llama_model_get_vocab(self.model)
        self.words_count = int(api.llama_vocab_n_tokens(self.vocab))

    def __del__(self) -> None:
        if getattr(self, "model", None):
            self.api.llama_model_free(self.model)

    def encode(self, text: str) -> list[int]:
        raw = text.encode("utf-8")
        room = len(raw) + 8  # no token is shorter than a byte; a space may be put in front
        made = (self.api.llama_token * room)()
        count = self.api.llama_tokenize(self.vocab, raw, len(raw), made, room, False, True)
        if count < 0:
            raise RunError("prompt", f"llama.cpp cannot encode it (needs {-count} tokens)", "shorten the prompt")
        return list(made[:count])

    def decoder(self) -> Callable[[int], str]:
        """The text that each next token adds, special tokens left out."""
        pending = codecs.getincrementaldecoder("utf-8")("replace")
        buffer = ctypes.create_string_buffer(512)

        def decode(token: int) -> str:
            size = self.api.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, False)
            return pending.decode(buffer.raw[: max(0, size)])

        return decode

    def use(self, adapter: str | None) -> None:
        if adapter is not None:
            hint = "only bundles for ONNX Runtime hold adapters"
            raise RunError("--adapter", f"there is no adapter {adapter!r} in this bundle", hint)

    def render(self, messages: list[dict[str, Any]], tools: Listed = None, documents: Listed = None) -> str:
        """By the template in the file and jinja2, which llama-cpp-python needs itself."""
        template = self.api.llama_model_chat_template(self.model, None)
        if not template:
            raise RunError("model.gguf", "has no chat template")
        special = {}
        for name in ("bos", "eos", "pad"):
            token = getattr(self.api, f"llama_vocab_{name}")(self.vocab)
            if token >= 0:
                special[f"{name}_token"] = self.api.llama_vocab_get_text(self.vocab, token).decode("utf-8")
        return apply_template(template.decode("utf-8"), messages, special, tools, documents)

    def start(self, max_tokens: int, grammar: Grammar | None = None) -> LlamaSession:
        return LlamaSession(self, max_tokens, grammar)

    def words(self) -> Any:
        """The file's tokens as llguidance reads them."""
        vocabulary = runtime("llguidance.llamacpp", "llguidance")
        return vocabulary.lltokenizer_from_vocab(self.vocab, n_vocab=self.words_count, eos_token=self.eos_ids)


class LlamaSession(Guided):
    """One text through the model; its KV cache (fp16, or 8 bits in blocks of 32) is allocated for `max_tokens`."""

    def __init__(self, engine: LlamaCpp, max_tokens: int, grammar: Grammar | None = None) -> None:
        self.engine, self.api = engine, engine.api
        self.hold(engine, grammar)
        params = self.api.llama_context_default_params()
        params.n_ctx = max_tokens
        params.n_batch = params.n_ubatch = min(PREFILL_TOKENS, max_tokens)
        params.n_threads = params.n_threads_batch = usable_threads()
        if engine.kv_bits == 8:
            params.type_k = params.type_v = self.api.GGML_TYPE_Q8_0
            params.flash_attn_type = self.api.LLAMA_FLASH_ATTN_TYPE_ENABLED  # values of 8 bits need it
        self.context = self.api.llama_init_from_model(engine.model, params)
        if not self.context:
            raise RunError("llama.cpp", f"cannot allocate a context of {max_tokens} tokens", "ask for fewer tokens")
        self.done = 0

    def __del__(self) -> None:
        if getattr(self, "context", None):
            self.api.llama_free(self.context)

    def append(self, ids: list[int], every: bool = False) -> Any:
        """Logits after the last token, or after each: (vocabulary,) or (len(ids), vocabulary)."""
        import numpy

        batch = self.api.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i] = token, self.done + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = every or i == len(ids) - 1
            code = self.api.llama_decode(self.context, batch)
        finally:
            self.api.llama_batch_free(batch)
        if code != 0:
            raise RunError("llama.cpp", f"llama_decode gives {code}", "report this: the prompt fits the context")
        self.done += len(ids)
        rows = len(ids) if every else 1
        found = numpy.ctypeslib.as_array(
            self.api.llama_get_logits(self.context), (rows, self.engine.words_count)
        ).copy()
        return found if every else found[0]

    def rewind(self, tokens: int) -> None:
        """Forget all but the first `tokens`. Raises RunError for a model whose state cannot be cut."""
        if not self.api.llama_memory_seq_rm(self.api.llama_get_memory(self.context), 0, tokens, -1):
            raise RunError("llama.cpp", "cannot forget the last tokens of this model", "answer with --free")
        self.done = tokens
        self.begin()


def _silence(api: Any) -> None:
    """No log lines of llama.cpp on standard error; a callback has to live as long as the library."""
    if not hasattr(api, "edgeft_silent"):
        api.edgeft_silent = api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(api.edgeft_silent, ctypes.c_void_p(0))


def _uses_amx(api: Any) -> bool:
    """Whether this build of llama.cpp has kernels for AMX, and this processor says that it has it."""
    if b"AMX_INT8 = 1" not in api.llama_print_system_info():
        return False
    try:
        return " amx_int8 " in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


class Labels:
    """The answers that a bundle is held to, each a path of tokens with an end token at its end.

    That end decides between a label and another one that it is the beginning of. `children` are the tokens by which a
    prefix goes on, `under` is how many labels begin with it, `leaves` which label a whole path is.
    """

    def __init__(self, texts: list[str], paths: list[list[int]]) -> None:
        self.texts, self.paths = texts, [tuple(path) for path in paths]
        self.leaves = {path: number for number, path in enumerate(self.paths)}
        self.under: dict[tuple[int, ...], int] = {}
        nodes: dict[tuple[int, ...], dict[int, None]] = {}
        for path in self.paths:
            for end in range(len(path)):
                nodes.setdefault(path[:end], {})[path[end]] = None
                self.under[path[:end]] = self.under.get(path[:end], 0) + 1
        self.children = {prefix: list(tokens) for prefix, tokens in nodes.items()}
        self.longest = max(map(len, self.paths)) - 1  # tokens that are read: nothing is asked behind an end

    @classmethod
    def read(cls, bundle: Path, name: str, stop_ids: Iterable[int]) -> Labels:
        """The labels of a bundle's file. Raises RunError for what no export writes."""
        path, stops = bundle / name, set(stop_ids)
        try:
            entries = parse_json(path, read_limited(path), COPY_AGAIN)["labels"]
            texts, paths = [str(each["text"]) for each in entries], [each["ids"] for each in entries]
        except (OSError, KeyError, TypeError) as problem:
            raise RunError(path, f"cannot be read: {problem!r}", COPY_AGAIN) from None
        right = len(paths) > 1 and all(_are_ids(each) and each for each in paths)
        right = right and all(each[-1] in stops and not stops & set(each[:-1]) for each in paths)
        if not right or len({*map(tuple, paths)}) < len(paths):
            raise NotAsExported(path, "holds no labels that can be told apart", "do not use this bundle")
        return cls(texts, paths)


class LabelSearch:
    """Which label is the most probable, found best first; nothing that could still win is left out.

    A label's score is the sum of its tokens' log-probabilities, its end's included. Every label that begins with a
    prefix has at most the prefix's own: a label is the best as soon as no open prefix has more.

    Probabilities are softmax(score / temperature) over all labels. What is not known of them yet lies between nothing
    and what open prefixes allow: of `n` labels with `m` among them, m^(1/t) in one at t < 1, n (m/n)^(1/t) else.
    """

    def __init__(self, labels: Labels, temperature: float = 1.0) -> None:
        self.labels, self.sharpness, self.passes = labels, 1 / temperature, 0
        self.open: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]  # a heap of (-score, prefix)
        self.found: list[tuple[float, int]] = []  # (score, label), best first

    def next(self) -> tuple[int, ...]:
        """The open prefix that may have the most, to be expanded now."""
        return heapq.heappop(self.open)[1]

    def expand(self, prefix: tuple[int, ...], score: float, gained: Iterable[float]) -> None:
        """What follows a prefix of this score: the log-probability of each of its children."""
        for token, more in zip(self.labels.children[prefix], gained):  # noqa: B905
            path = (*prefix, token)
            if path in self.labels.leaves:
                self.found.append((score + float(more), self.labels.leaves[path]))
            else:
                heapq.heappush(self.open, (-score - float(more), path))
        self.found.sort(key=lambda entry: (-entry[0], entry[1]))

    def decided(self, places: int = 1) -> bool:
        """Whether the best so many labels are known."""
        places = min(places, len(self.labels.texts))
        return len(self.found) >= places and (not self.open or self.found[places - 1][0] >= -self.open[0][0])

    def probability(self, place: int) -> tuple[float, float]:
        """(least, most) that the label found in this place may have of all labels."""
        best = self.found[0][0]
        known = sum(math.exp(self.sharpness * (score - best)) for score, _ in self.found)
        unknown = 0.0
        for loss, prefix in self.open:
            count = self.labels.under[prefix] ** max(0.0, 1 - self.sharpness)
            unknown += count * math.exp(min(700.0, self.sharpness * (-loss - best)))
        own = math.exp(self.sharpness * (self.found[place][0] - best))
        return own / (known + unknown), own / known

    def known_within(self, width: float, places: int = 2) -> bool:
        """Whether the best labels are decided and their probabilities known to this width."""
        if not self.decided(places):
            return False
        bounds = [self.probability(place) for place in range(min(places, len(self.found)))]
        return all(most - least <= width for least, most in bounds)

    def settles(self, threshold: float) -> bool:
        """Whether the best label is decided, and whether its probability reaches a threshold."""
        if not self.decided():
            return False
        least, most = self.probability(0)
        return least >= threshold or most < threshold


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two beginnings have in common."""
    pairs = zip(first, second)  # noqa: B905
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def passes(ids: list[int]) -> Iterator[list[int]]:
    """A prompt's tokens, PREFILL_TOKENS a pass, so that the numbers behind it do not depend on where passes begin.

    A single row is another kernel's, which rounds otherwise: no pass is of one token, nor has one beyond a block that
    attention takes at once (twice a head's width: a multiple of ONE_MORE).
    """
    start = 0
    while start < len(ids):
        left = len(ids) - start
        size = min(left, PREFILL_TOKENS)
        size -= 2 * (size > 1 and (size % ONE_MORE == 1 or left - size == 1))
        yield ids[start : start + size]
        start += size


class Cache:
    """A session of the engine's and the tokens that it has read: what the next prompt has in common with it stays.

    What was read one by one, an answer, does not, so that a prompt's numbers are those of a new session to the bit.
    """

    def __init__(self, engine: Any, room: int, grammar: Grammar | None = None) -> None:
        self.engine, self.room, self.grammar, self.prompt_tokens = engine, room, grammar, 0
        self.session, self.ids = engine.start(room, grammar), list[int]()

    def append(self, ids: list[int], every: bool = False) -> Any:
        """Logits after the last of some more tokens, or after each."""
        self.ids += ids
        return self.session.append(ids, every=True) if every else self.session.append(ids)

    def rewind(self, tokens: int) -> None:
        """Forget all but the first `tokens`."""
        if tokens < len(self.ids):
            self.session.rewind(tokens)
            del self.ids[tokens:]

    def read(self, ids: list[int]) -> Any:
        """Logits after a whole prompt, of which two tokens at least are read anew: a single one is another kernel's."""
        same = max(0, min(common_length(self.ids[: self.prompt_tokens], ids), len(ids) - 2))
        try:
            self.rewind(same)
        except (RunError, RuntimeError):  # this kind of model cannot forget: from its beginning then
            self.session, self.ids = self.engine.start(self.room, self.grammar), []
        for part in passes(ids[len(self.ids) :]):
            last = self.append(part)
        self.prompt_tokens = len(ids)
        return last

    def pick(self, values: Any) -> int:
        """The token with the most of those that the grammar allows, as the next one."""
        token = int(self.session.pick(values))
        self.ids.append(token)
        return token


class Copied:
    """What followed where the last tokens stood before: a guess of what comes next, in a text that copies."""

    def __init__(self, ids: Iterable[int]) -> None:
        self.ids: list[int] = []
        self.behind: dict[tuple[int, ...], int] = {}  # the place behind some tokens, where they stood last
        for token in ids:
            self.add(token)

    def add(self, token: int) -> None:
        """One more token of the text."""
        for size in GRAMS:
            if size <= len(self.ids):
                self.behind[tuple(self.ids[-size:])] = len(self.ids)
        self.ids.append(token)

    def guess(self, most: int) -> list[int]:
        """Up to so many tokens, by the longest run of last tokens that stood somewhere before; none without one."""
        for size in GRAMS:
            at = self.behind.get(tuple(self.ids[-size:]))
            if at is not None and size <= len(self.ids):
                made = list(self.ids)
                for place in range(at, at + most):  # a text that repeats itself goes on from what is guessed
                    made.append(made[place])
                return made[len(self.ids) :]
        return []


def log_shares(logits: Any, tokens: list[int]) -> list[float]:
    """Log-probabilities of some tokens."""
    import numpy

    values = numpy.asarray(logits, dtype=numpy.float64)
    values = values - values.max()
    return list(values[tokens] - numpy.log(numpy.exp(values).sum()))


class Runner:
    """A loaded bundle. Token ids in, token ids and logits out; text through the bundle's own tokenizer.

    `keep_tokens`: more than 0 keeps the last prompt's cache, for at least so many tokens, for what the next one has in
    common with it.
    """

    keep_tokens = 0
    guess = False  # whether free answers are made by guesses that are checked several at a time
    passes = 0  # behind the prompt, of the last free answer
    grammar: Grammar | None = None
    kept: Cache | None = None
    adapter: str | None = None

    def __init__(
        self, bundle: Path, graph: bytes | None = None, trusted: bytes | None = None, check: bool = True
    ) -> None:
        """`graph`: an ONNX graph over the bundle's weights, to be run instead of its own (one with more outputs).

        `trusted` is the public key that must have signed. Without `check` the files are loaded as they are.
        Raises NotAsExported (exit 4), and then nothing was loaded.
        """
        raw, self.manifest = _manifest(bundle)
        _refuse(bundle, check_signature(bundle, trusted, raw)[0] if check or trusted else [])
        before = _stamps(bundle, self.manifest["files"] if check else ())
        _refuse(bundle, check_loaded(bundle, raw, self.manifest) if check else [])
        target = self.manifest.get("target")
        named = target.get("runtime") if isinstance(target, dict) else None
        self.task = str(self.manifest.get("task", "text-generation"))
        portable = OnnxRuntime if self.task == "text-generation" else OnnxEncoder
        engines = {"llama.cpp": LlamaCpp, "onnxruntime": portable}
        if self.task != "text-generation" and named != "onnxruntime":
            raise RunError(bundle / MANIFEST, f"{named!r:.80} runs no model that does {self.task}", "run --verify")
        if self.manifest.get("kv_prefix") and named != "onnxruntime":
            raise RunError(bundle / MANIFEST, f"{named!r:.80} begins no text with keys and values", "run --verify")
        if str(named) in engines:
            self.engine: Any = engines[str(named)](bundle, self.manifest)
            self.engine.check = check
        else:
            self.engine = OnnxRuntimeGenAI(bundle, self.manifest, check, graph)
        _same_as_checked(bundle, before)
        self.context_tokens: int = self.engine.context_tokens
        self.eos_ids: list[int] = self.engine.eos_ids
        held = self.manifest.get("answers") or {}
        self.labels = Labels.read(bundle, held["file"], self.eos_ids) if held.get("form") == "labels" else None
        self.grammar = Grammar.read(bundle, held) if held.get("form") in GRAMMARS else None
        self.temperature = float(held.get("temperature", 1.0))  # by which the labels' probabilities were calibrated
        self.calibrated = held.get("calibration") is not None
        self.guess = bool((self.manifest.get("guesses") or {}).get("on"))

    @contextlib.contextmanager
    def cache(self, room: int, grammar: Grammar | None = None) -> Iterator[Cache]:
        """A cache for so many tokens: the last prompt's, where it is kept and has room: then only what is new is read.

        While one answer is being made another finds none: each has its own.
        """
        kept, self.kept = self.kept, None
        if kept is not None and (kept.room < room or kept.grammar != grammar):
            kept, self.keep_tokens = None, max(self.keep_tokens, 2 * room)
        cache = kept or Cache(self.engine, max(room, min(self.keep_tokens, self.context_tokens)), grammar)
        yield cache  # where that raises, nobody knows what the cache holds: it is not kept
        self.kept = cache if self.keep_tokens and self.engine.shares else None

    def use(self, adapter: str | None) -> None:
        """From the next prompt on, answer with this adapter (None: without). The model stays loaded.

        Raises RunError if the bundle has none of that name, or one that is not for this graph or is damaged.
        """
        self.engine.use(adapter)
        if adapter != self.adapter:
            self.kept = None
        self.adapter = adapter

    def encode(self, text: str, plain: bool) -> list[int]:
        """Token ids of a text; a plain prompt gets the tokenizer's begin-of-text ids in front."""
        try:
            text.encode("utf-8")
        except ValueError:
            raise RunError("prompt", f"is no text: {text!r:.80}", "give UTF-8") from None
        ids: list[int] = self.engine.encode(text)
        return list(self.manifest["prefix_ids"]) + ids if plain else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, special tokens left out."""
        piece = self.engine.decoder()
        return "".join(piece(token) for token in ids)

    def render(self, messages: list[dict[str, Any]], tools: Listed = None, documents: Listed = None) -> str:
        """The chat template's text for messages [{role, content}, ...] and tools, up to where the answer starts."""
        try:
            return str(self.engine.render(messages, tools, documents))
        except RunError:
            raise
        except Exception as problem:
            hint = "use --plain if this model has no chat template"
            raise RunError("chat template", f"cannot be applied: {problem}", hint) from None

    def fit(self, ids: list[int], new_tokens: int) -> None:
        """Nothing. Raises RunError if a prompt is empty or leaves no room for a token."""
        if not ids:
            raise RunError("prompt", "is empty", "give some text")
        if len(ids) + min(1, new_tokens) > self.context_tokens:
            problem = f"{len(ids)} tokens and an answer do not fit the context of {self.context_tokens} tokens"
            raise RunError("prompt", problem, "shorten the prompt, or export with a larger context")

    def logits(self, ids: list[int]) -> Any:
        """Logits after each token: float32 (len(ids), vocabulary); of an encoder (1, labels or width).

        The graph of an onnxruntime-genai bundle does not give them: RunError.
        """
        import numpy

        self.fit(ids, 0)
        if self.task != "text-generation":
            return self.engine.values(ids)[None]
        session = self.engine.start(len(ids))
        rows = [session.append(part, every=True).astype(numpy.float32) for part in passes(ids)]
        return numpy.concatenate(rows)

    def last_logits(self, ids: list[int]) -> Any:
        """Logits after the last token: float32 (vocabulary,); of an encoder (labels or width,)."""
        import numpy

        self.fit(ids, 0)
        if self.task != "text-generation":
            return self.engine.values(ids)
        return Cache(self.engine, len(ids)).read(ids).astype(numpy.float32)

    def stream(
        self,
        ids: list[int],
        max_tokens: int,
        eos_ids: Iterable[int] | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[int]:
        """New token ids one by one, up to the first of `eos_ids` (left out), `max_tokens` or the context.

        Temperature 0 takes the largest logit: where `guess` is set several at a time, those that are what the text
        said before. Search settings of the model folder (repetition penalty and the like) are left out on purpose:
        this is what the parity proof measured.
        """
        import numpy

        self.fit(ids, max_tokens)
        stop = set(self.eos_ids if eos_ids is None else eos_ids)
        max_tokens = min(max_tokens, self.context_tokens - len(ids))
        random, self.passes = numpy.random.default_rng(seed), 0
        with self.cache(len(ids) + max_tokens) as cache:
            last = cache.read(ids)
            if self.guess and temperature <= 0:
                yield from self._checked(cache, ids, last, max_tokens, stop)
                return
            for made in range(1, max_tokens + 1):
                token = int(last.argmax()) if temperature <= 0 else _sample(last, temperature, top_p, random)
                if token in stop:
                    return
                yield token
                if made < max_tokens:
                    last = cache.append([token])
                    self.passes += 1

    def _checked(self, cache: Cache, ids: list[int], last: Any, most: int, stop: set[int]) -> Iterator[int]:
        """As `stream` at temperature 0. A pass reads the next token and what is guessed to follow it.

        Guesses are taken as long as each is the likeliest token, and the rest is forgotten. A pass of several tokens is
        another kernel's than one of a single token: where two tokens are as good as equal, another may be taken.
        """
        text, made, allowed = Copied(ids), 0, LAST_POSITIONS - 1
        rows, guessed = last[None], list[int]()
        while (token := int(rows[0].argmax())) not in stop:
            yield token
            made += 1
            text.add(token)
            if made == most:
                return
            if guessed and token == guessed[0]:  # it was read, and its logits are known
                guessed, rows = guessed[1:], rows[1:]
                continue
            self.passes += 1
            try:
                cache.rewind(len(cache.ids) - len(guessed))
            except (RunError, RuntimeError):  # this kind of model cannot forget: no guesses, and from its beginning
                allowed, guessed, rows = 0, [], cache.read(text.ids)[None]
                continue
            guessed = text.guess(min(allowed, most - made))
            rows = cache.append([token, *guessed], every=True) if guessed else cache.append([token])[None]

    def write(
        self, ids: list[int], most: int | None = None, temperature: float = 0.0, seed: int | None = None
    ) -> list[int]:
        """A whole answer that the bundle's grammar allows, without its end.

        Raises RunError where it has no end within `most` tokens, or the context: half an answer is none.
        """
        if self.grammar is None:
            raise RunError("answers", "this bundle is held to no grammar", "it answers in free text")
        self.fit(ids, 1)
        room = self.context_tokens - len(ids)
        most = min(most or room, room)
        made = list[int]()
        for tokens in sorted({min(MAX_TOKENS, most), most}):  # a cache for the whole context is seldom needed
            made, ended = self._written(ids, tokens, temperature, seed)
            if ended:
                return made
        problem = f"the answer has no end within {most} tokens: {self.decode(made)[-60:]!r}"
        raise RunError("answers", problem, "raise --max-tokens, or export with a larger context")

    def _written(self, ids: list[int], most: int, temperature: float, seed: int | None) -> tuple[list[int], bool]:
        """(up to so many tokens of an answer without its end, whether it came)."""
        import numpy

        random, made = numpy.random.default_rng(seed), list[int]()
        with self.cache(len(ids) + most, self.grammar) as cache:
            last = cache.read(ids)
            for count in range(1, most + 1):
                # the largest of logits with Gumbel noise is one drawn by their shares
                noisy = last / temperature + random.gumbel(size=len(last)) if temperature > 0 else last
                token = cache.pick(noisy)
                if token in self.eos_ids:
                    return made, True
                made.append(token)
                if count < most:
                    last = cache.session.following()
        return made, False

    def follow(self, ids: list[int], tokens: list[int]) -> Iterator[Any]:
        """Logits after the prompt, then after each of the tokens but the last, whatever the model would have said."""
        import numpy

        if self.task != "text-generation":
            yield self.last_logits(ids)
            return
        self.fit(ids, 0)
        self.fit([*ids, *tokens], 0)
        cache = Cache(self.engine, len(ids) + len(tokens))
        yield cache.read(ids).astype(numpy.float32)
        for token in tokens[:-1]:
            yield cache.append([token]).astype(numpy.float32)

    def choose(
        self, ids: list[int], enough: Callable[[LabelSearch], bool] = LabelSearch.decided, labels: Labels | None = None
    ) -> LabelSearch:
        """The best label for a prompt, its own unless others are given; looked for until `enough` says so.

        The prompt is read once. Each pass after it goes on from what the last one has in common with it.
        """
        labels = labels or self.labels
        if labels is None:
            raise RunError("labels", "this bundle is held to none", "it answers in free text")
        self.fit(ids, 0)
        self.fit(ids + [0] * labels.longest, 0)
        search = LabelSearch(labels, self.temperature)
        with self.cache(len(ids) + labels.longest) as cache:
            last = cache.read(ids)
            while search.open and not enough(search):
                score, prefix = -search.open[0][0], search.next()
                if prefix:  # its last token is read anew: its logits are asked for
                    same = common_length(cache.ids[len(ids) :], prefix[:-1])
                    cache.rewind(len(ids) + same)
                    last = cache.append(list(prefix[same:]))
                    search.passes += 1
                search.expand(prefix, score, log_shares(last, labels.children[prefix]))
        return search

    def greedy(self, ids: list[int], max_tokens: int, eos_ids: Iterable[int] | None = None) -> list[int]:
        """The most likely continuation, cut before its first end token."""
        return list(self.stream(ids, max_tokens, eos_ids))


def _refuse(bundle: Path, problems: list[str]) -> None:
    """Nothing. Raises NotAsExported if there is a problem."""
    if problems:
        added = all(": not part of the export" in problem for problem in problems)
        raise NotAsExported(bundle, "not what was exported\n" + "\n".join(problems), MOVE_OUT if added else COPY_AGAIN)


def _stamps(bundle: Path, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """What shows that another file took the place of one, or that somebody wrote to it."""
    found: dict[str, tuple[int, ...]] = dict.fromkeys(names, ())
    for name in found:
        with contextlib.suppress(OSError):
            now = os.stat(str(bundle / name))
            found[name] = (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
    return found


def _same_as_checked(bundle: Path, before: dict[str, tuple[int, ...]]) -> None:
    """Nothing. Raises NotAsExported: runtimes open files by name, so what was exchanged since its check shows now."""
    after = _stamps(bundle, before)
    _refuse(bundle, [f"{name}: changed while it was loaded" for name in before if before[name] != after[name]])


def _sample(logits: Any, temperature: float, top_p: float, random: Any) -> int:
    """A token drawn from softmax(logits / temperature), cut to the fewest tokens that hold `top_p` of it."""
    import numpy

    scaled = logits.astype(numpy.float64) / temperature
    chances = numpy.exp(scaled - scaled.max())
    chances /= chances.sum()
    order = chances.argsort()[::-1]
    kept = order[: int(numpy.searchsorted(chances[order].cumsum(), top_p)) + 1]
    return int(random.choice(kept, p=chances[kept] / chances[kept].sum()))


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def self_hash(raw: bytes, recorded: str) -> str:
    """sha256 of bundle.json's bytes with its own recorded hash blanked: `recorded`, if nothing changed."""
    return hashlib.sha256(raw.replace(recorded.encode(), BLANK_HASH.encode(), 1)).hexdigest()


def check_files(bundle: Path) -> list[str]:
    """What is wrong with the bundle's files, one line each, beginning with the file's name."""
    try:
        raw, manifest = _manifest(bundle)
    except RunError as problem:
        return [str(problem).split("\n\nhint: ")[0]]
    found = _entries(bundle)
    faults = _manifest_faults(raw, manifest) + failed_proof(manifest)
    return faults + _file_faults(bundle, manifest["files"], found, {*manifest["files"], *found})


def failed_proof(manifest: dict[str, Any]) -> list[str]:
    """A line if the export kept this bundle although it is not good enough, to be looked at."""
    why = " ".join(str(manifest.get("failed") or "").split())
    return [f"proof: this bundle FAILED it and is not to be shipped: {why!r:.400}"] if why else []


def check_loaded(bundle: Path, raw: bytes, manifest: dict[str, Any]) -> list[str]:
    """As check_files, of the files alone that a runtime may read now; adapters are checked when they are used."""
    listed = manifest["files"]
    later = {*NEVER_LOADED, *(entry["file"] for entry in (manifest.get("adapters") or {}).values())}
    wanted = {MANIFEST, *(name for name in listed if name not in later)}
    strangers = {name for name in os.listdir(str(bundle)) if name.endswith(READ_UNASKED)} - {*listed, MANIFEST}
    found = {name: _kind(bundle, bundle / name) for name in wanted | strangers if os.path.lexists(str(bundle / name))}
    return _manifest_faults(raw, manifest) + _file_faults(bundle, listed, found, wanted | strangers)


def _manifest_faults(raw: bytes, manifest: dict[str, Any]) -> list[str]:
    recorded = str(manifest[SELF_HASH])
    same = len(recorded) == 64 and self_hash(raw, recorded) == recorded
    return [] if same else [f"{MANIFEST}: changed since the export"]


def _file_faults(bundle: Path, listed: dict[str, Any], found: dict[str, str], names: Iterable[str]) -> list[str]:
    """What is wrong with the files of these names, one line each. `found` is what `_kind` says of those there are."""
    contents = {str(entry.get("sha256")): name for name, entry in listed.items()}
    sizes = {str(entry.get("size_bytes")) for entry in listed.values()}

    def content(path: Path) -> str:
        """What a file that is not as listed holds instead, if the export wrote that too."""
        same = contents.get(sha256_of(path)) if str(path.stat().st_size) in sizes else None
        return f", it holds what the export wrote as {same}" if same else ""

    def fault(name: str) -> str:
        """What is wrong with one file, or nothing."""
        path, entry, kind = bundle / name, listed.get(name), found.get(name)
        if kind is None:
            return "missing" if entry is not None else ""
        if entry is None and name in (MANIFEST, SIGNATURE):
            return f"{kind}, not a file" if kind else ""
        if entry is None:
            return "not part of the export" + (f" ({kind})" if kind else content(path))
        if kind:
            return f"{kind}, the export wrote a file"
        if linked(bundle, name):
            return f"in a folder that is a link, {linked(bundle, name)}"
        size = path.stat().st_size
        if size != entry.get("size_bytes"):
            return f"{size} bytes, the export wrote {entry.get('size_bytes')}{content(path)}"
        return "" if sha256_of(path) == entry.get("sha256") else f"changed since the export{content(path)}"

    problems = []
    for name in sorted(names):
        try:
            text = fault(name)
        except OSError as broken:
            text = f"cannot be read: {broken.strerror}"
        problems += [f"{name}: {text}"] if text else []
    return problems


def _entries(bundle: Path) -> dict[str, str]:
    """Everything in the folder but folders with something in them, and what it is if it is no plain file."""
    found = {}
    for folder, folders, files in os.walk(str(bundle)):
        for name in [*folders, *files]:
            path = Path(folder, name)
            kind = _kind(bundle, path)
            if kind is not None:
                found[path.relative_to(bundle).as_posix()] = kind
    return found


def _kind(bundle: Path, path: Path) -> str | None:
    """What something in the bundle is if it is no plain file; None for a folder with something in it.

    Links are not followed: behind one may be the right bytes today and others tomorrow.
    """
    if path.is_symlink():
        home, place = os.path.realpath(str(bundle)), os.path.realpath(str(path))
        inside = os.path.commonpath([home, place]) == home
        return f"a link to {os.readlink(str(path))}" + ("" if inside else ", outside the bundle")
    if not os.access(str(path), os.R_OK):
        return "unreadable"
    if path.is_dir():
        return None if any(path.iterdir()) else "an empty folder"
    return "" if stat.S_ISREG(path.stat().st_mode) else "a device, pipe or socket"


# Ed25519 (RFC 8032, section 5.1): points of -x^2 + y^2 = 1 + d x^2 y^2 over the integers modulo PRIME, as
# (X, Y, Z, T) with x = X/Z, y = Y/Z, x y = T/Z. Checking involves no secret: nothing here has to take constant time.
PRIME = 2**255 - 19
ORDER = 2**252 + 27742317777372353535851937790883648493
CURVE_D = -121665 * pow(121666, PRIME - 2, PRIME) % PRIME
ROOT_OF_MINUS_ONE = pow(2, (PRIME - 1) // 4, PRIME)
Point = tuple[int, int, int, int]


def point_add(a: Point, b: Point) -> Point:
    """The sum of two points (RFC 8032, 5.1.4)."""
    low, high = (a[1] - a[0]) * (b[1] - b[0]), (a[1] + a[0]) * (b[1] + b[0])
    t, z = 2 * CURVE_D * a[3] * b[3], 2 * a[2] * b[2]
    e, f, g, h = high - low, z - t, z + t, high + low
    return e * f % PRIME, g * h % PRIME, f * g % PRIME, e * h % PRIME


def point_multiply(factor: int, point: Point) -> Point:
    """`factor` times a point, by doubling and adding."""
    result = (0, 1, 1, 0)
    while factor:
        if factor & 1:
            result = point_add(result, point)
        point = point_add(point, point)
        factor >>= 1
    return result


def point_encode(point: Point) -> bytes:
    """32 bytes: y, and the lowest bit of x in the highest bit."""
    inverse = pow(point[2], PRIME - 2, PRIME)
    x, y = point[0] * inverse % PRIME, point[1] * inverse % PRIME
    return (y | (x & 1) << 255).to_bytes(32, "little")


def point_decode(raw: bytes) -> Point:
    """The point of 32 bytes. Raises ValueError if there is none (RFC 8032, 5.1.3)."""
    number = int.from_bytes(raw, "little")
    odd, y = number >> 255, number & (2**255 - 1)
    above, below = (y * y - 1) % PRIME, (CURVE_D * y * y + 1) % PRIME
    x = above * pow(below, 3, PRIME) * pow(above * pow(below, 7, PRIME), (PRIME - 5) // 8, PRIME) % PRIME
    if (below * x * x + above) % PRIME == 0:
        x = x * ROOT_OF_MINUS_ONE % PRIME
    if len(raw) != 32 or y >= PRIME or (below * x * x - above) % PRIME or (x == 0 and odd):
        raise ValueError("not a point of the curve")
    x = x if x & 1 == odd else PRIME - x
    return x, y, 1, x * y % PRIME


# the point with y = 4/5 and even x
BASE_POINT = point_decode((4 * pow(5, PRIME - 2, PRIME) % PRIME).to_bytes(32, "little"))


def signature_is_right(public_key: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` is one of `message` by the owner of `public_key` (RFC 8032, 5.1.7)."""
    if len(public_key) != 32 or len(signature) != 64:
        return False
    commitment, answer = signature[:32], int.from_bytes(signature[32:], "little")
    if answer >= ORDER:  # the same signature written in a second way
        return False
    try:
        key = point_decode(public_key)
    except ValueError:
        return False
    challenge = int.from_bytes(hashlib.sha512(commitment + public_key + message).digest(), "little") % ORDER
    # S B - k A must be R: adding (ORDER - k) A subtracts k A
    wanted = point_add(point_multiply(answer, BASE_POINT), point_multiply(ORDER - challenge, key))
    return point_encode(wanted) == commitment


KEY_PREFIX = bytes.fromhex(
    "302a300506032b6570032100"
)  # of an Ed25519 public key in DER (RFC 8410), its 32 bytes follow


def read_public_key(path: Path) -> bytes:
    """The 32 bytes of an Ed25519 public key in PEM, as edgeft and openssl write it. Raises RunError."""
    hint = "give the .pub file that edgeft sign --new-key wrote"
    try:
        text = path.read_text(encoding="ascii")
    except (OSError, ValueError) as problem:
        raise RunError(path, f"cannot be read: {problem}", hint) from None
    lines = [line.strip() for line in text.strip().splitlines()]
    if len(lines) < 3 or lines[0] != "-----BEGIN PUBLIC KEY-----" or lines[-1] != "-----END PUBLIC KEY-----":
        raise RunError(path, "is no public key in PEM", hint)
    try:
        raw = base64.b64decode("".join(lines[1:-1]), validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) != 44 or not raw.startswith(KEY_PREFIX):
        raise RunError(path, "is no Ed25519 public key", hint)
    return raw[-32:]


def signature_text(public_key: bytes, signature: bytes) -> str:
    """bundle.sig: the one way of writing it, so that every changed byte of the file shows."""
    return f"edgeft signature 1\nkey {public_key.hex()}\nsignature {signature.hex()}\n"


def check_signature(bundle: Path, trusted: bytes | None, manifest: bytes | None = None) -> tuple[list[str], str]:
    """(what is wrong with the signature, who signed in words). A bundle without one is right if no key is given.

    `manifest` is bundle.json where it was read already.
    """
    wanted = f"the trusted key {trusted.hex()}" if trusted else ""
    path = bundle / SIGNATURE
    if not path.is_file() or path.is_symlink():
        if trusted:
            return [f"{SIGNATURE}: missing, {wanted} must have signed"], "not signed"
        return [], "not signed: the hashes show damage, not who made this"
    with open(path, "rb") as file:
        raw = file.read(1000)
    try:
        words = raw.decode("ascii").split()
        key, signature = bytes.fromhex(words[4]), bytes.fromhex(words[6])
    except (ValueError, IndexError):
        key = signature = b""
    if signature_text(key, signature).encode() != raw or len(key) != 32 or len(signature) != 64:
        return [f"{SIGNATURE}: is not a signature file"], "not signed"
    if trusted is not None and key != trusted:
        return [f"{SIGNATURE}: signed by {key.hex()}, not by {wanted}"], "signed by another key"
    try:
        message = SIGNED + (read_limited(bundle / MANIFEST) if manifest is None else manifest)
    except (OSError, RunError):
        return [f"{SIGNATURE}: there is no {MANIFEST} to check it against"], "not signed"
    if not signature_is_right(key, message, signature):
        return [f"{SIGNATURE}: is not {key.hex()}'s signature of this {MANIFEST}"], "wrongly signed"
    return [], f"signed by {wanted}" if trusted else f"signed, by a key that nobody vouched for: {key.hex()}"


def replayed_elsewhere(recorded: dict[str, Any]) -> list[str]:
    """What is another here than where the golden vectors were recorded: `cpu`, its `features`, the `runtime`."""
    import importlib.metadata

    told = {}
    with contextlib.suppress(OSError):
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
        told = {name.strip(): value.strip() for name, _, value in reversed(lines)}  # of the first processor
    flags = (told.get("flags") or told.get("Features") or "").split()
    held = []
    for package in str(recorded.get("runtime", "")).split()[::2]:  # name version name version
        with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError):
            held.append(f"{package} {importlib.metadata.version(package)}")
    here = {
        "cpu": told.get("model name") or platform.processor() or platform.machine(),
        "features": sorted(flag for flag in flags if flag.startswith(FEATURES)),
        "runtime": " ".join(held),
    }
    return [
        f"{name} {recorded[name]}, here {here[name]}" for name in here if recorded.get(name, here[name]) != here[name]
    ]


def check_golden(bundle: Path, notes: list[str] | None = None) -> list[str]:
    """Where the runtime here gives something else than it gave at export, one line each: without and with adapters.

    `notes` takes what differs and may: tokens whose recorded margin is within the tolerance.
    """
    runner, said = Runner(bundle, check=False), [] if notes is None else notes  # the files were checked by now
    problems = _check_vectors(runner, runner.manifest["golden"], "", said)
    for name, entry in (runner.manifest.get("adapters") or {}).items():
        try:
            runner.use(name)
        except RunError as problem:
            problems.append(str(problem).split("\n\nhint: ")[0])
            continue
        problems += _check_vectors(runner, entry["golden"], f"adapter {name}, ", said)
    elsewhere = replayed_elsewhere(runner.manifest.get("environment") or {})
    if elsewhere and (problems or said):
        said.append("the golden vectors were recorded elsewhere: " + "; ".join(elsewhere))
    return problems


def _check_vectors(runner: Runner, vectors: list[dict[str, Any]], whose: str, notes: list[str]) -> list[str]:
    problems = []
    for number, golden in enumerate(vectors, start=1):
        where = f"{whose}golden vector {number}"
        if golden["messages"] is not None:
            text = runner.render(golden["messages"])
            if text != golden["text"]:
                problems.append(f"chat template: {where} gives {text!r}, at export {golden['text']!r}")
                continue
        ids = runner.encode(golden["text"], plain=golden["plain"])
        if ids != golden["ids"]:
            shorter = min(len(ids), len(golden["ids"]))
            at = next((i for i in range(shorter) if ids[i] != golden["ids"][i]), shorter)
            problems.append(
                f"tokenizer.json: wrong tokenizer, {where} differs from token {at} on: "
                f"{ids[at : at + 5]} instead of {golden['ids'][at : at + 5]}"
            )
        try:  # the recorded ids, so that the model is checked even if the tokenizer is wrong
            problems += _replay(runner, golden, where, notes)
            problems += _replay_label(runner, golden, where, notes)
            problems += _replay_answer(runner, golden, where, notes)
        except (RunError, IndexError, RuntimeError) as problem:
            problems.append(f"model: {where} cannot be replayed: {problem}")
    return problems


def _replay(runner: Runner, golden: dict[str, Any], where: str, notes: list[str]) -> list[str]:
    """What the model gives along a recorded continuation and did not give at export, one line each.

    Every step follows the recorded tokens, so that one token which may differ does not put those after it in doubt.
    Two logits may each move by the tolerance: a token is binding where more than twice that lay between the best two.
    """
    tolerance = float(runner.manifest["golden_logit_tolerance"])
    expected, margins = golden["greedy_ids"], golden.get("margins") or []
    problems = []
    for step, last in enumerate(runner.follow(golden["ids"], expected)):
        if step == 0:
            pairs = zip(golden["top_ids"], golden["top_logits"])  # noqa: B905
            errors = [abs(float(last[token]) - value) for token, value in pairs]
            if not all(error <= tolerance for error in errors):  # NaN is an error too
                problems.append(f"model: {where}'s first logits differ by {max(errors):.3g}, allowed {tolerance:.3g}")
        if step == len(expected) or int(last.argmax()) == expected[step]:
            continue
        text = f"{where} continues with {int(last.argmax())} instead of {expected[step]} at token {step}"
        margin = float(margins[step]) if step < len(margins) else float("inf")  # older bundles end before a close one
        if margin > 2 * tolerance:
            problems.append(f"model: {text}")
        else:
            notes.append(f"{text}: within the margin, the best two were {margin:.3g} apart")
    return problems


def _replay_label(runner: Runner, golden: dict[str, Any], where: str, notes: list[str]) -> list[str]:
    """What is another label here than at export, or has another score, one line each.

    A token's log-probability may move by twice the tolerance of a logit: by it, and by the sum over all of them.
    """
    recorded = golden.get("label")
    if runner.labels is None or recorded is None:
        return []
    found = runner.choose(golden["ids"], lambda search: search.decided(2)).found
    score, texts = found[0][0], [runner.labels.texts[number] for _, number in found]
    tolerance = 2 * float(runner.manifest["golden_logit_tolerance"]) * (runner.labels.longest + 1)
    margin = float(recorded["score"]) - float(recorded["runner_up_score"])
    if texts[0] != recorded["label"]:
        text = f"{where} gets the label {texts[0]!r} instead of {recorded['label']!r}"
        if margin > 2 * tolerance:
            return [f"model: {text}"]
        notes.append(f"{text}: within the margin, the best two were {margin:.3g} apart")
    elif not abs(score - float(recorded["score"])) <= tolerance:
        return [f"model: {where}'s label has a score of {score:.4g} instead of {recorded['score']:.4g}"]
    return []


def _replay_answer(runner: Runner, golden: dict[str, Any], where: str, notes: list[str]) -> list[str]:
    """What another answer the grammar gives here than at export, in one line: from its first other token on."""
    recorded = golden.get("held")
    if runner.grammar is None or recorded is None:
        return []
    ids, expected = golden["ids"], recorded["ids"]
    with runner.cache(min(runner.context_tokens, len(ids) + len(expected)), runner.grammar) as cache:
        last = cache.read(ids)
        for step, token in enumerate(expected):
            if step:
                last = cache.session.following()
            given = cache.pick(last)
            if given == token or {given, token} <= set(runner.eos_ids):
                continue
            text = f"{where}'s held answer goes on with {given} instead of {token} at token {step}"
            if float(recorded["margins"][step]) > 2 * float(runner.manifest["golden_logit_tolerance"]):
                return [f"model: {text}"]
            notes.append(f"{text}: within the margin, the best two were {recorded['margins'][step]:.3g} apart")
            break
    return []


def verify(
    bundle: Path, trusted: bytes | None = None, replay: bool = True, notes: list[str] | None = None
) -> list[str]:
    """Everything by which a bundle is not what was exported, one line each; [] if it is.

    `notes` takes what a user may want to know and is no fault. `trusted` is the public key that must have signed.
    Damaged weights may crash the runtime and this process, those of a stranger do worse: vectors are replayed only if
    the model's own files and the signature are right.
    Raises MissingRuntime if all files are right and the vectors cannot be replayed.
    """
    bundle = Path(bundle)
    problems = check_files(bundle) + check_signature(bundle, trusted)[0]
    if notes is not None:
        notes += another_runner(bundle)
    if not replay:
        return problems
    first = (*FILES_OF_THE_MODEL, MANIFEST, SIGNATURE)
    if any(line.split(": ")[0].endswith(first) for line in problems):
        return [*problems, "golden vectors: not replayed, the files above come first"]
    try:
        return problems + check_golden(bundle, notes)
    except MissingRuntime as problem:
        if problems:
            return [*problems, f"golden vectors: not replayed, {str(problem).split(':')[0]} is not installed"]
        package, _, reason = str(problem).split("\n\nhint: ")[0].partition(": ")
        text = f"the files are as exported; the golden vectors need {package}, which {reason}"
        hint = f"pip install {package}, or check the files alone with --no-replay"
        raise MissingRuntime("verify", text, hint) from None
    except RunError as problem:
        return [*problems, str(problem).split("\n\nhint: ")[0]]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as problem:
        return [*problems, f"{MANIFEST}: the golden vectors cannot be read: {problem!r}"]


def another_runner(bundle: Path) -> list[str]:
    """A line if the bundle carries another run.py than this file, which checks and runs it instead."""
    own = Path(__file__).resolve()
    try:
        carried = read_manifest(bundle)["files"].get(RUNNER, {}).get("sha256")
        same = own == (bundle / RUNNER).resolve() or sha256_of(own) == carried
    except (RunError, OSError):
        return []
    return [] if same else [f"{RUNNER}: the bundle's own is another version than the one that runs now"]


def peak_memory_bytes() -> int:
    """The process's largest resident size so far: VmHWM on Linux, else ru_maxrss; 0 where neither exists."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)  # bytes on macOS, KiB elsewhere


def all_cores() -> int:
    """Cores by this process's affinity, whatever its quota."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cores(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores this process may keep busy: its affinity and each cgroup's quota, rounded down; at least 1."""
    cores = all_cores()
    for folder in _cpu_cgroups(proc, cgroup):
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")  # v1, -1: none
        with contextlib.suppress(OSError, ValueError):  # v2: "200000 100000", or "max 100000" for no quota
            quota, period = (int(part) for part in (folder / "cpu.max").read_text().split())
        if quota > 0 and period > 0:
            cores = min(cores, quota // period)
    return max(1, cores)


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def _cpu_cgroups(proc: Path, cgroup: Path) -> list[Path]:
    """The process's cgroups that may limit the processor, and those above them; none where the system has no such."""
    try:
        lines = [line.split(":", 2) for line in (proc / "self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, names, path in (line for line in lines if len(line) == 3):
        if names and "cpu" not in names.split(","):
            continue
        for root in {cgroup / names, cgroup / "cpu"} if names else {cgroup}:
            folder = root / path.lstrip("/")
            found += [place for place in (folder, *folder.parents) if place == root or root in place.parents]
    return found


def usable_threads() -> int:
    """Threads to compute with: OMP_NUM_THREADS, else one per core. llama.cpp's spin: more than are free are ruinous."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else usable_cores()


def spinning(threads: int, proc: Path = Path("/proc"), cores: int | None = None) -> dict[str, str]:
    """How onnxruntime's threads wait for their next piece of work: by spinning where each has a core of its own.

    On two free cores that decodes 1.4 times as fast; where a core is not free it halves the speed (38 tokens/s instead
    of 66 at 135M). A quota that leaves less than the machine's cores counts spinning too, so it forbids it, as does
    other work at this moment. EDGEFT_SPIN=1 or 0 decides instead.
    """
    asked = os.environ.get("EDGEFT_SPIN", "")
    cores = all_cores() if cores is None else cores
    free = usable_cores() >= cores and 1 < threads <= cores - busy_threads(proc, cores)
    if asked == "0" or not (asked == "1" or free):
        return {"session.intra_op.allow_spinning": "0"}
    return {"session.intra_op.allow_spinning": "1", "session.intra_op.spin_duration_us": str(SPIN_MICROSECONDS)}


def busy_threads(proc: Path, cores: int) -> int:
    """Threads of others that run or wait for a core now, the most of three looks; all cores where nothing tells."""
    most = 0
    for look in range(3):
        time.sleep(0.002 * bool(look))
        try:
            most = max(most, int((proc / "loadavg").read_text().split()[3].partition("/")[0]) - 1)
        except (OSError, ValueError, IndexError):
            return cores
    return most


def read_bandwidth(threads: int, megabytes: int = 64) -> float:
    """Bytes per second read from memory: each thread sums an array larger than a cache; the best of 5 rounds.

    Reading only, as decoding does; numpy sums outside the interpreter lock.
    """
    import numpy

    arrays = [numpy.ones(megabytes * 2**20 // 8) for _ in range(threads)]
    best = 0.0
    for _ in range(5):
        workers = [threading.Thread(target=array.sum) for array in arrays]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, sum(array.nbytes for array in arrays) / (time.perf_counter() - start))
    return best


def bench(
    bundle: Path, prompt_tokens: int = 128, new_tokens: int = 64, rounds: int = 3, adapter: str | None = None,
    trusted: bytes | None = None, check: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """What the bundle costs here: the fastest of `rounds` runs, peak memory, the bandwidth bound.

    bound = bytes per second this machine reads / weight bytes that every new token reads.
    """
    start = time.perf_counter()
    runner = Runner(bundle, trusted=trusted, check=check)
    if runner.task != "text-generation":
        raise RunError("--bench", f"measures models that write text, this one does {runner.task}")
    runner.use(adapter)
    runner.guess = False  # what is read here repeats itself
    load_seconds = time.perf_counter() - start
    prompt_tokens = max(1, min(prompt_tokens, runner.context_tokens // 2))
    new_tokens = max(2, min(new_tokens, runner.context_tokens - prompt_tokens))
    seed = next((golden["ids"] for golden in runner.manifest["golden"] if golden["ids"]), [0])
    ids = (seed * prompt_tokens)[:prompt_tokens]
    first, decode = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        tokens = runner.stream(ids, new_tokens, eos_ids=())
        next(tokens)
        first.append(time.perf_counter() - start)
        count = sum(1 for _ in tokens)
        decode.append(count / (time.perf_counter() - start - first[-1]))
    peak = peak_memory_bytes()  # before the arrays of the bandwidth measurement
    threads = usable_threads()
    bandwidth = read_bandwidth(threads)
    weights = int(runner.manifest["weight_bytes_per_token"])
    return {
        "load_seconds": load_seconds,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "time_to_first_token_seconds": min(first),
        "prefill_tokens_per_second": prompt_tokens / min(first),
        "decode_tokens_per_second": max(decode),
        "peak_memory_bytes": peak,
        "weight_bytes_per_token": weights,
        "bandwidth_bytes_per_second": bandwidth,
        "bound_tokens_per_second": bandwidth / weights,
        "fraction_of_bound": max(decode) * weights / bandwidth,
        "cores": threads,
    }


def show_bench(made: dict[str, Any]) -> str:
    """The figures of `bench` as lines for a person."""
    first = f"{made['time_to_first_token_seconds'] * 1e3:.1f} ms for {made['prompt_tokens']} tokens"
    memory = f"{made['peak_memory_bytes'] / 2**20:.0f} MiB, loading took {made['load_seconds']:.2f} s"
    how = f"{made['cores']} threads reading 64 MiB each"
    bound = f"{made['bound_tokens_per_second']:.0f} tokens/s, {made['fraction_of_bound']:.0%} of it reached"
    lines = [
        f"time to first token  {first} ({made['prefill_tokens_per_second']:.0f} tokens/s)",
        f"decoding             {made['decode_tokens_per_second']:.1f} tokens/s",
        f"peak memory          {memory}",
        f"weights per token    {made['weight_bytes_per_token'] / 2**20:.1f} MiB",
        f"memory bandwidth     {made['bandwidth_bytes_per_second'] / 1e9:.1f} GB/s, {how}",
        f"bandwidth bound      {bound}",
    ]
    if made["weight_bytes_per_token"] < 32 * 2**20:
        lines.append("                     (weights this small may stay in the CPU's caches: the bound is not binding)")
    return "\n".join(lines)


NO_PROMPT = 'python run.py "prompt", or pipe one in; --help shows more'


def read_prompt(given: str | None) -> str:
    """The prompt: as given, or from standard input for `-` and for a pipe. Raises RunError."""
    if given is not None and given != "-":
        return given
    if given is None and on_terminal():
        raise RunError("prompt", "there is none", NO_PROMPT)
    text = read_input()
    if not text.strip():
        raise RunError("prompt", "standard input is empty", NO_PROMPT)
    return text[:-1] if text.endswith("\n") else text  # the line end that echo and editors add


def on_terminal() -> bool:
    """Whether somebody types what is read."""
    return sys.stdin is None or sys.stdin.isatty()


def read_input() -> str:
    """Standard input as text. Raises RunError for more than MOST_BYTES, or what is no text."""
    raw = sys.stdin.buffer.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise RunError("standard input", f"is larger than the {MOST_BYTES >> 20} MiB that are read")
    try:
        text = raw.decode(sys.stdin.encoding or "utf-8")
    except ValueError as problem:
        raise RunError("standard input", f"is no text: {problem}", "give UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


class Asked(NamedTuple):
    """What is to be answered: a prompt, or a conversation with its tools and documents."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[Any] | None = None
    documents: list[Any] | None = None


BESIDE = ("tools", "documents")  # a conversation, as a row of training data has them


MESSAGES = 'give a list as in [{"role": "user", "content": "hello"}]'


def read_messages(path: Path) -> Asked:
    """A conversation, and its tools, from a JSON file; `-` is standard input. Raises RunError.

    [{"role": ..., "content": ...}, ...] or, as a row of training data without its answer, {"messages": [...],
    "tools": [...]}, and "documents" as tools.
    """
    try:
        raw = read_input().encode("utf-8") if str(path) == "-" else read_limited(path)
    except OSError as problem:
        raise RunError(path, f"cannot be read: {problem.strerror or problem}", MESSAGES) from None
    given = parse_json(path, raw, MESSAGES)
    if not isinstance(given, dict) or "messages" not in given:
        return as_messages(path, {"messages": given})
    unknown = sorted(given.keys() - {"messages", *BESIDE})
    if unknown:
        raise RunError(
            path, f"has keys that are not used: {', '.join(unknown)}", "give messages, tools and documents alone"
        )
    return as_messages(path, given)


def as_messages(where: object, given: dict[str, Any]) -> Asked:
    """A conversation, its tools and documents as JSON has them. Raises RunError for what is none."""
    messages, beside = given["messages"], {name: given.get(name) for name in BESIDE}
    for name, value in beside.items():
        if value is not None and not (isinstance(value, list) and all(isinstance(each, dict) for each in value)):
            raise RunError(where, f"{name!r} is no list of objects", "give them as the training rows have them")
    if not isinstance(messages, list) or not messages:
        raise RunError(where, "is no list of messages", MESSAGES)
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RunError(where, f"message {number} has no 'role': {message!r:.80}", MESSAGES)
    if messages[-1]["role"] == "assistant":  # the template would show it as said, and the model would answer after it
        raise RunError(where, "ends with an answer, so that nothing is asked", "leave its last message out")
    return Asked(messages=messages, **{name: value or None for name, value in beside.items()})


def conversation(options: argparse.Namespace, asked: Asked, own_system: str | None) -> list[dict[str, Any]]:
    """The messages that the chat template gets: those asked, or the prompt, behind the bundle's own system message.

    --system takes its place; where that is empty there is none. A conversation that has one keeps it.
    """
    messages = asked.messages or [{"role": "user", "content": asked.prompt}]
    has_one = messages[0]["role"] == "system"
    if has_one and options.system is not None:
        raise RunError("--system", "the conversation has a system message already", "give one of the two")
    system = own_system if options.system is None else options.system
    return messages if has_one or not system else [{"role": "system", "content": system}, *messages]


def encoded(runner: Runner, ids: list[int], as_json: bool = True) -> Any:
    """A text's likeliest label and its share, or its embedding; as JSON the shares of all labels."""
    import numpy

    values = runner.logits(ids)[0].astype(numpy.float64)
    labels = runner.manifest.get("labels") or []
    if not labels:
        vector = [float(value) for value in values]
        return {"embedding": vector, "prompt_ids": ids} if as_json else " ".join(f"{v:.6g}" for v in vector)
    shares = numpy.exp(values - values.max())
    shares /= shares.sum()
    best = int(shares.argmax())
    if not as_json:
        return f"{labels[best]} {shares[best]:.4f}"
    scores = {label: float(share) for label, share in zip(labels, shares)}  # noqa: B905
    return {"label": labels[best], "scores": scores, "prompt_ids": ids}


def prompt_text(runner: Runner, options: argparse.Namespace, asked: Asked) -> tuple[str, bool]:
    """(the text that the model continues, whether it is a plain prompt)."""
    trained = runner.manifest["adapters"][options.adapter] if options.adapter else runner.manifest
    chat = (options.format or trained["prompt_format"]) == "chat"
    if not chat and options.system is not None:
        raise RunError("--system", "this model continues plain prompts, which have no system message", "add --chat")
    if not chat and asked.prompt is None:
        what = "this model continues plain prompts (a server takes them at /v1/completions)"
        raise RunError("messages", what, "give a prompt, or add --chat")
    if not chat:
        return str(asked.prompt), True
    messages = conversation(options, asked, trained.get("system"))
    return runner.render(messages, asked.tools, asked.documents), False


def prompt_ids(runner: Runner, options: argparse.Namespace, asked: Asked) -> list[int]:
    """The tokens of what is asked. Raises RunError where options do not go with it, or the context does not hold it."""
    if runner.task != "text-generation":
        if asked.prompt is None or options.system is not None:
            raise RunError("prompt", f"this model does {runner.task}: it takes a text, no conversation")
        ids = runner.encode(asked.prompt, plain=True)
        runner.fit(ids, 0)
        return ids
    ids = runner.encode(*prompt_text(runner, options, asked))
    runner.fit(ids, 1)
    if runner.labels is not None and not options.free:
        runner.fit(ids + [0] * runner.labels.longest, 0)
    return ids


def answer(bundle: Path, options: argparse.Namespace, trusted: bytes | None) -> int:
    """0, after writing the answer to standard output as it comes."""
    if options.prompt is None and options.messages is None and on_terminal() and not options.json:
        return converse(bundle, options, trusted)
    asked = Asked(read_prompt(options.prompt)) if options.messages is None else read_messages(options.messages)
    runner = ready(bundle, options, trusted)
    ids = prompt_ids(runner, options, asked)
    if options.json:
        print(json.dumps(reply(runner, options, ids)))
    else:
        speak(runner, options, ids)
    return 0


def speak(runner: Runner, options: argparse.Namespace, ids: list[int]) -> str:
    """The answer, after writing it to standard output as it comes."""
    if runner.task != "text-generation":
        text = str(encoded(runner, ids, False))
    elif runner.labels is not None and not options.free:
        text = str(choice(runner, options, ids, shown=False)["text"])
    elif runner.grammar is not None and not options.free:  # whole or not at all
        text = runner.decode(written(runner, options, ids))
    else:
        piece, parts = runner.engine.decoder(), []
        for token in continued(runner, options, ids):
            parts.append(piece(token))
            print(parts[-1], end="", flush=True)
        text = "".join(parts)
        print()
        return text
    print(text)
    return text


def converse(bundle: Path, options: argparse.Namespace, trusted: bytes | None) -> int:
    """0, after a conversation on the terminal: each line is asked behind all before it, until one that is empty.

    Raises RunError for a model that has no conversations.
    """
    manifest = read_manifest(bundle)
    trained = (manifest.get("adapters") or {}).get(options.adapter, manifest)
    if (options.format or trained.get("prompt_format")) != "chat":
        read_prompt(None)  # says that there is none
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # lines that are edited and come back
    runner, said = ready(bundle, options, trusted), list[Any]()
    print("a conversation; an empty line ends it", file=sys.stderr)
    while line := next_line():
        asked = [*said, {"role": "user", "content": line}]
        try:
            text = speak(runner, options, prompt_ids(runner, options, Asked(messages=asked)))
        except RunError as problem:
            print(problem, file=sys.stderr)
            continue
        said = [*asked, {"role": "assistant", "content": text}]
    return 0


def next_line() -> str:
    """What is typed next; nothing at its end."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""


NOT_CALIBRATED = "what these probabilities are worth is not known: the export had too few rows to tell"


def ready(bundle: Path, options: argparse.Namespace, trusted: bytes | None = None) -> Runner:
    """A runner that answers as the options say. Raises RunError for what does not go together."""
    runner = Runner(bundle, trusted=trusted, check=not options.no_check)
    if runner.task == "text-generation":
        held = runner.labels is not None and not options.free
        if not held and options.min_probability is not None:
            raise RunError("--min-probability", "is for an answer that is held to labels, this one is not")
        if held and not runner.calibrated and (options.min_probability is not None or options.json):
            print(f"note: {NOT_CALIBRATED}", file=sys.stderr)
        check_drawn(runner, options)
        check_guess(runner, options)
        runner.use(options.adapter)
    return runner


def check_drawn(runner: Runner, options: argparse.Namespace) -> None:
    """Raise RunError where an answer is to be drawn in a way that its form does not allow."""
    if options.free:
        return
    if runner.grammar is not None and options.top_p < 1:
        raise RunError("--top-p", "is for free answers, this one is held to a grammar", "--temperature draws it")
    if runner.labels is not None and (options.temperature > 0 or options.top_p < 1 or options.seed is not None):
        raise RunError("--temperature", "labels are compared, not drawn", "add --free to draw a free text")


def check_guess(runner: Runner, options: argparse.Namespace) -> None:
    """Guess where the bundle or the options say so. Raises RunError where --guess is of no use."""
    if options.guess is not None:
        runner.guess = options.guess
    if not options.guess:
        return
    if (runner.labels is not None or runner.grammar is not None) and not options.free:
        raise RunError("--guess", "is for free answers, this bundle's are held", "add --free")
    if options.temperature > 0:
        raise RunError("--guess", "is for the likeliest tokens, --temperature draws others", "give one of the two")


def continued(runner: Runner, options: argparse.Namespace, ids: list[int]) -> Iterator[int]:
    """The answer's tokens as they come."""
    most = options.max_tokens or MAX_TOKENS
    return runner.stream(ids, most, temperature=options.temperature, top_p=options.top_p, seed=options.seed)


def written(runner: Runner, options: argparse.Namespace, ids: list[int]) -> list[int]:
    """The whole answer's tokens, held to the bundle's grammar unless it is --free."""
    if runner.grammar is None or options.free:
        return list(continued(runner, options, ids))
    return runner.write(ids, options.max_tokens, options.temperature, options.seed)


def choice(runner: Runner, options: argparse.Namespace, ids: list[int], shown: bool = True) -> dict[str, Any]:
    """The most probable label, unless it has less than --min-probability; with probabilities where they are shown.

    They are the middle of what is possible, which is PROBABILITY_WITHIN wide; --min-probability is decided exactly.
    """
    threshold = options.min_probability or 0.0

    def enough(search: LabelSearch) -> bool:
        return search.settles(threshold) and (not shown or search.known_within(PROBABILITY_WITHIN))

    search, labels = runner.choose(ids, enough), runner.labels
    assert labels is not None
    names = [labels.texts[number] for _, number in search.found[:2]]
    taken = search.probability(0)[0] >= threshold
    made: dict[str, Any] = {"text": names[0] if taken else NONE_OF_THESE, "label": names[0] if taken else None}
    if shown:
        middle = [sum(search.probability(place)) / 2 for place in range(2)]
        made.update(best=names[0], probability=middle[0], within=PROBABILITY_WITHIN / 2)
        made["runner_up"] = {"label": names[1], "probability": middle[1]}
        made["passes"] = search.passes
    path = labels.paths[search.found[0][1]]
    return {**made, "ids": list(path[:-1]) if taken else [], "prompt_ids": ids}


def reply(runner: Runner, options: argparse.Namespace, ids: list[int]) -> dict[str, Any]:
    """The whole answer to a prompt: its text, its ids and the prompt's; `choice` of labels, `encoded` of an encoder."""
    if runner.task != "text-generation":
        return dict(encoded(runner, ids))
    if runner.labels is not None and not options.free:
        return choice(runner, options, ids)
    made = written(runner, options, ids)
    passes = {"passes": runner.passes} if runner.guess else {}
    return {"text": runner.decode(made), "ids": made, "prompt_ids": ids, **passes}


BATCH_ROW = (
    'a line is {"prompt": TEXT} or {"messages": [...], "tools": [...], "documents": [...]}, with an "id" of your own'
)
MOST_SHOWN = 5  # of a batch's bad lines


class BatchRow(NamedTuple):
    """One line of a batch."""

    line: int
    asked: Asked
    own: dict[str, Any]  # {"id": ...}, where it has one


def batch_row(where: str, line: int, raw: bytes) -> BatchRow:
    """A row of a batch out of its JSON text. Raises RunError, which names it, for what is none."""
    if len(raw) > MOST_BYTES:
        raise RunError(where, f"is longer than the {MOST_BYTES >> 20} MiB that are read", BATCH_ROW)
    if not raw.strip():
        raise RunError(where, "is empty", BATCH_ROW)
    row = parse_json(where, raw.strip(), BATCH_ROW)
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise RunError(where, f"has no prompt and no messages, or both: {str(row)[:80]}", BATCH_ROW)
    unknown = sorted(map(str, row.keys() - {"prompt", "messages", *BESIDE, "id"}))
    unknown += [name for name in BESIDE if name in row and "messages" not in row]
    if unknown:
        raise RunError(where, f"has keys that are not used: {', '.join(unknown)}", BATCH_ROW)
    if "prompt" in row and not isinstance(row["prompt"], str):
        raise RunError(where, f"'prompt' is no text: {row['prompt']!r:.80}", BATCH_ROW)
    asked = Asked(row["prompt"]) if "prompt" in row else as_messages(where, row)
    return BatchRow(line, asked, {"id": row["id"]} if "id" in row else {})


def each_good(path: Path, entries: Iterable[Any], read: Callable[[Any], Any]) -> list[Any]:
    """What `read` makes of each entry. Raises one RunError for all that it raises one for; then nothing is answered."""
    made, broken = [], []
    for entry in entries:
        try:
            made.append(read(entry))
        except RunError as problem:
            broken.append(problem)
    if len(broken) == 1:
        raise broken[0]
    if broken:
        lines = [f"{each.where}: {each.problem}" for each in broken[:MOST_SHOWN]]
        more = [f"... and {len(broken) - MOST_SHOWN} more"] if len(broken) > MOST_SHOWN else []
        raise RunError(path, f"{len(broken)} lines cannot be used\n" + "\n".join(lines + more), broken[0].hint)
    return made


def numbered(file: Any) -> Iterator[tuple[int, bytes]]:
    """The lines of a binary file with their numbers; of one longer than MOST_BYTES no more than one byte more."""
    for number, raw in enumerate(iter(lambda: file.readline(MOST_BYTES + 1), b""), start=1):
        rest = raw
        while len(rest) > MOST_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(MOST_BYTES + 1)
        yield number, raw


def read_batch(path: Path) -> tuple[list[BatchRow], str]:
    """(the rows of a batch, its bytes' hash). Raises RunError naming the lines that are none."""
    digest = hashlib.sha256()

    def read(each: tuple[int, bytes]) -> BatchRow:
        digest.update(each[1])
        return batch_row(f"{path}, line {each[0]}", *each)

    try:
        with open(path, "rb") as file:
            rows = each_good(path, numbered(file), read)
    except OSError as problem:
        raise RunError(path, f"cannot be read: {problem.strerror or problem}", BATCH_ROW) from None
    if not rows:
        raise RunError(path, "there are no rows in it", BATCH_ROW)
    return rows, digest.hexdigest()


class Journal:
    """The answers of a batch so far, beside its output, one whole line each: what a killed run leaves behind.

    Its first line says of which batch, bundle and options they are: another one's are not taken up.
    """

    def __init__(self, out: Path, batch: dict[str, Any]) -> None:
        self.out, self.path, self.head = out, out.with_name(out.name + ".part"), json.dumps(batch, sort_keys=True)
        self.answers: dict[int, str] = {}  # by the row's place in the file
        self.file: Any = None
        self.whole = self._read() if self.path.exists() else 0  # bytes of its whole lines
        if not self.path.exists() and out.exists():
            raise RunError(out, "is there already", "name another file, or remove this one to answer anew")

    def _read(self) -> int:
        """The bytes that are kept: up to the last line's end. Raises RunError for what is not this batch's."""
        raw = self.path.read_bytes()
        size = raw.rfind(b"\n") + 1
        try:
            head, *lines = raw[:size].decode("utf-8").splitlines() or [self.head]
            self.answers = {int(place): text for place, _, text in (line.partition(" ") for line in lines)}
            ours = head == self.head if lines else "batch" in json.loads(head)
            ours = ours and (size > 0 or f"{self.head}\n".encode().startswith(raw))
        except (ValueError, TypeError):
            ours = False
        if not ours:
            hint = "remove it, or name another --out"
            raise RunError(self.path, "holds no answers of this batch, by this bundle, with these options", hint)
        return size if self.answers else 0

    def _write(self, line: str) -> None:
        if self.file is None:
            self.file = open(self.path, "ab")  # noqa: SIM115 (closed by finish, or with the process)
            self.file.truncate(self.whole)  # half a line, of a run that was killed
            if not self.whole:
                self._write(self.head)
        self.file.write(line.encode("utf-8") + b"\n")
        self.file.flush()

    def add(self, place: int, text: str) -> None:
        """One more answer, as a line of JSON."""
        self._write(f"{place} {text}")
        self.answers[place] = text

    def finish(self) -> None:
        """The answers in the file's order as the output, whole or not at all; then the journal goes."""
        whole = self.out.with_name(self.out.name + ".whole")
        with open(whole, "wb") as file:
            for place in range(len(self.answers)):
                file.write(self.answers[place].encode("utf-8") + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(whole, self.out)
        if self.file is not None:
            self.file.close()
        os.unlink(self.path)


# of the command line, what an answer depends on
ANSWERED_BY = (
    "format", "system", "adapter", "max_tokens", "temperature", "top_p", "seed", "free", "min_probability", "guess",
)  # fmt: skip


def answer_batch(bundle: Path, options: argparse.Namespace, trusted: bytes | None) -> int:
    """0, after answering each row of a file into another, in the file's order: what --json prints of each alone.

    Rows that begin alike are answered one behind the other, so that what they have in common is read once.
    """
    rows, sha256 = read_batch(options.batch)
    chosen = {name: getattr(options, name) for name in ANSWERED_BY}
    batch = {"batch": sha256, "bundle": read_manifest(bundle)[SELF_HASH], "options": chosen}
    journal = Journal(options.out, batch)
    runner = ready(bundle, options, trusted)

    def encode(row: BatchRow) -> list[int]:
        try:
            return prompt_ids(runner, options, row.asked)
        except RunError as problem:
            raise RunError(f"{options.batch}, line {row.line}", str(problem.problem), problem.hint) from None

    prompts = each_good(options.batch, rows, encode)
    behind = _longest(runner, options)
    runner.keep_tokens = max(map(len, prompts)) + behind
    left = sorted((place for place in range(len(rows)) if place not in journal.answers), key=prompts.__getitem__)
    done = len(rows) - len(left)
    if done:
        print(f"{options.out}: {done} of {len(rows)} rows were answered before", file=sys.stderr)
    try:
        for place in left:
            try:
                made = reply(runner, options, prompts[place])
            except RunError as problem:  # a held answer without an end
                made = {"error": str(problem.problem)}
            journal.add(place, json.dumps({**rows[place].own, **made}))
            done += 1
    except KeyboardInterrupt:
        print(f"{done} of {len(rows)} rows are answered: the same command goes on from there", file=sys.stderr)
        return 130
    lost = sum("error" in json.loads(text) for text in journal.answers.values())
    journal.finish()
    if lost:
        print(f"{lost} of {len(rows)} rows have no answer: their lines say why", file=sys.stderr)
    return 0


def _longest(runner: Runner, options: argparse.Namespace) -> int:
    """Tokens that an answer may have, or that of one by a grammar nearly all have."""
    if runner.labels is not None and not options.free:
        return runner.labels.longest
    return options.max_tokens or MAX_TOKENS


def serve(bundle: Path, options: argparse.Namespace, trusted: bytes | None) -> int:
    """0 at the end of standard input, after a line of JSON for each line of it, as it comes.

    A line is a row of a batch. One that cannot be answered gets {"error": ...}, and the next is read.
    """
    runner = ready(bundle, options, trusted)
    runner.keep_tokens = 1  # as many as prompts turn out to need
    for number, raw in numbered(sys.stdin.buffer):
        own: dict[str, Any] = {}
        try:
            row = batch_row(f"line {number}", number, raw)
            own = row.own
            made = reply(runner, options, prompt_ids(runner, options, row.asked))
        except RunError as problem:
            made = {"error": f"line {number}: {problem.problem}"}
        print(json.dumps({**own, **made}), flush=True)
    return 0


HTTP_BYTES = 2**20  # of a request's body
HTTP_SECONDS = 30  # that a client may take to send it
ANSWER_SECONDS = 600  # after which an answer ends where it is
MOST_WAITING, MOST_CONNECTIONS = 16, 64
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Of OpenAI's parameters: what an answer follows, what it does not depend on, and what may be sent at this value alone.
FOLLOWED = ("messages", "prompt", "tools", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed")
UNREAD = ("model", "user", "metadata", "store", "stream", "stream_options", "service_tier", "parallel_tool_calls")
ALONE: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "stop": ([],), "logprobs": (False, 0), "frequency_penalty": (0,), "echo": (False,),
    "presence_penalty": (0,), "logit_bias": ({},), "response_format": ({"type": "text"},), "tool_choice": ("auto",),
}  # fmt: skip


class Request:
    """One request on its way through the thread that owns the model: `parts` are texts, then how it ended."""

    def __init__(self, chat: bool, given: dict[str, Any]) -> None:
        self.chat, self.given, self.created = chat, given, int(time.time())
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{os.urandom(12).hex()}"
        self.parts: queue.Queue[Any] = queue.Queue()
        self.gone = threading.Event()  # the client is: nobody waits for the rest

    @property
    def stream(self) -> bool:
        return bool(self.given.get("stream"))


def checked(chat: bool, given: Any) -> dict[str, Any]:
    """A request's body as one that can be answered. Raises RunError, which names what of it cannot."""
    if not isinstance(given, dict):
        raise RunError("body", f"is no JSON object: {given!r:.60}")
    given = {key: value for key, value in given.items() if value is not None}
    asked = "messages" if chat else "prompt"
    for key, value in given.items():
        if key not in (*FOLLOWED, *UNREAD) and not any(
            value == each and isinstance(value, bool) == isinstance(each, bool) for each in ALONE.get(key, ())
        ):
            raise RunError(key, f"{value!r:.60} is not supported")
    for key, kinds, lowest in (("temperature", (int, float), 0), ("top_p", (int, float), 0), ("seed", int, 0),
                               ("max_tokens", int, 1), ("max_completion_tokens", int, 1)):  # fmt: skip
        value = given.get(key, lowest)
        if isinstance(value, bool) or not isinstance(value, kinds) or not lowest <= value < float("inf"):
            raise RunError(key, f"must be a number of at least {lowest}, got {value!r:.60}")
    if asked not in given or ("prompt" in given) == ("messages" in given):
        raise RunError(asked, "is missing" if asked not in given else "and the other kind are both there")
    if not chat and not isinstance(given["prompt"], str):
        raise RunError("prompt", f"must be a text, got {given['prompt']!r:.60}")
    if "messages" in given:
        asked_for = as_messages("messages", {name: given.get(name) for name in ("messages", "tools")})
        given["messages"] = [with_text(each) for each in asked_for.messages or []]
    return given


def with_text(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is a text, of parts of type text too."""
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str) and (content is not None or not message.get("tool_calls")):
        raise RunError("messages", f"a content is no text: {content!r:.60}")
    return {**message, "content": content}


def handled(runner: Runner, options: argparse.Namespace, request: Request) -> None:
    """Put a request's answer into its parts: texts as they come, then (why it ended, tokens, what else is said)."""
    given, deadline = request.given, time.monotonic() + ANSWER_SECONDS
    own = argparse.Namespace(**vars(options))
    own.max_tokens = given.get("max_completion_tokens", given.get("max_tokens", options.max_tokens))
    for key in ("temperature", "top_p", "seed"):
        setattr(own, key, given.get(key, getattr(options, key)))
    if not request.chat:
        own.format = "plain"
    check_drawn(runner, own)
    asked = Asked(given.get("prompt"), given.get("messages"), given.get("tools") or None)
    ids, made, said = prompt_ids(runner, own, asked), list[int](), dict[str, Any]()
    if runner.labels is not None and not own.free:
        said = choice(runner, own, ids)
        made = said["ids"]
        request.parts.put(said.pop("text"))
    elif runner.grammar is not None and not own.free:
        made = written(runner, own, ids)
        request.parts.put(runner.decode(made))
    else:
        piece = runner.engine.decoder()
        for token in continued(runner, own, ids):
            made.append(token)
            request.parts.put(piece(token))
            if request.gone.is_set() or time.monotonic() > deadline:
                break
    held = (runner.labels or runner.grammar) and not own.free
    most = min(own.max_tokens or MAX_TOKENS, runner.context_tokens - len(ids))
    whole = held or (len(made) < most and time.monotonic() <= deadline)
    usage = {"prompt_tokens": len(ids), "completion_tokens": len(made), "total_tokens": len(ids) + len(made)}
    known = {key: said[key] for key in ("label", "probability", "runner_up") if key in said}
    request.parts.put(("stop" if whole else "length", usage, known))


def piece_of(request: Request, model: str, text: str | None, ended: Any = None, chunk: bool = False) -> dict[str, Any]:
    """OpenAI's object for a whole answer, or for one chunk of it."""
    why, usage, known = ended or (None, None, {})
    choice: dict[str, Any] = {"index": 0, "finish_reason": why, **known}
    if request.chat:
        message = {} if text is None else {"role": "assistant", "content": text}
        choice["delta" if chunk else "message"] = message
        kind = "chat.completion.chunk" if chunk else "chat.completion"
    else:
        choice["text"], kind = text or "", "text_completion"
    made = {"id": request.id, "object": kind, "created": request.created, "model": model, "choices": [choice]}
    return made if chunk or usage is None else {**made, "usage": usage}


def http_handler(name: str, host: str, waiting: queue.Queue[Request]) -> Any:
    """The class that reads requests, hands them to the thread of the model, and writes what it makes of them."""
    from http.server import BaseHTTPRequestHandler

    class Handler(BaseHTTPRequestHandler):
        protocol_version, timeout, server_version, sys_version = "HTTP/1.1", HTTP_SECONDS, "edgeft", ""

        def log_message(self, *_: Any) -> None:
            """Nothing is written: what people ask is theirs."""

        def do_GET(self) -> None:
            listed = {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "edgeft"}]}
            found = {"/v1/models": listed, "/health": {"status": "ok"}}.get(self.path.split("?")[0])
            if self.is_ours():
                self.send(200, found) if found else self.refuse(404, f"there is no {self.path!r:.80}")

        def do_POST(self) -> None:
            chat = {"/v1/chat/completions": True, "/v1/completions": False}.get(self.path.split("?")[0])
            if not self.is_ours():
                return
            raw = self.body()
            if raw is None:
                return
            if chat is None:
                self.refuse(404, f"there is no {self.path!r:.80}")
                return
            try:
                request = Request(chat, checked(chat, parse_json("body", raw, "")))
            except RunError as problem:
                self.refuse(400, f"{problem.where}: {problem.problem}")
                return
            try:
                waiting.put_nowait(request)
            except queue.Full:
                self.refuse(503, f"{MOST_WAITING} requests are waiting already")
                return
            try:
                self.answer(request)
            except OSError:  # the client went away, or takes nothing any more
                self.close_connection = True
            finally:
                request.gone.set()

        def is_ours(self) -> bool:
            """Whether the request is for this server: pages of the web must not reach it through a browser."""
            origin = self.headers.get("Origin")
            named = (self.headers.get("Host") or host).rpartition(":")[0].strip("[]") or self.headers.get("Host")
            if origin is not None or (host in LOOPBACK and named not in LOOPBACK):
                self.close_connection = True
                self.refuse(403, "requests of web pages are not answered")
                return False
            return True

        def body(self) -> bytes | None:
            """What was sent; None after refusing it."""
            length = self.headers.get("Content-Length", "")
            if not length.isascii() or not length.isdigit():
                self.close_connection = True
                self.refuse(411, "a body needs a Content-Length")
                return None
            if int(length) > HTTP_BYTES:
                self.close_connection = True
                left = min(int(length), MOST_BYTES)
                while left > 0 and (read := self.rfile.read(min(left, 2**16))):  # else the answer would not be read
                    left -= len(read)
                self.refuse(413, f"a body may have {HTTP_BYTES >> 20} MiB")
                return None
            return self.rfile.read(int(length))

        def answer(self, request: Request) -> None:
            texts: list[str] = []
            while True:
                try:
                    part = request.parts.get(timeout=0.5)
                except queue.Empty:
                    if self.hung_up():
                        return
                    continue
                if isinstance(part, RunError):
                    self.fail(request, part, bool(texts))
                    return
                if not request.stream:
                    if not isinstance(part, str):
                        self.send(200, piece_of(request, name, "".join(texts), part))
                        return
                    texts.append(part)
                    continue
                if not texts:
                    self.begin_events()
                texts.append("")
                if isinstance(part, str):
                    self.event(piece_of(request, name, part, chunk=True))
                    continue
                self.event(piece_of(request, name, None, part, chunk=True))
                if (request.given.get("stream_options") or {}).get("include_usage"):
                    self.event({**piece_of(request, name, None, chunk=True), "choices": [], "usage": part[1]})
                self.wfile.write(b"data: [DONE]\n\n")
                return

        def hung_up(self) -> bool:
            import select
            import socket

            readable = select.select([self.connection], [], [], 0)[0]
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

        def fail(self, request: Request, problem: RunError, begun: bool) -> None:
            text = f"{problem.where}: {problem.problem}"
            if begun:
                self.event({"error": {"message": text, "type": "server_error", "param": None, "code": None}})
            else:
                self.refuse(400, text)

        def begin_events(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Cache-Control", "no-store")
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True

        def event(self, made: dict[str, Any]) -> None:
            self.wfile.write(b"data: " + json.dumps(made).encode("utf-8") + b"\n\n")
            self.wfile.flush()

        def refuse(self, status: int, problem: str) -> None:
            kind = "invalid_request_error" if status < 500 else "server_error"
            self.send(status, {"error": {"message": problem, "type": kind, "param": None, "code": None}})

        def send(self, status: int, made: dict[str, Any]) -> None:
            raw = json.dumps(made).encode("utf-8")
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            if self.close_connection:
                self.send_header("Connection", "close")
            if status == 503:
                self.send_header("Retry-After", "1")
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(raw)

    return Handler


def http_server(host: str, port: int, handler: Any) -> Any:
    """A server with a thread a connection, of which there are so many at most. Raises RunError for a port in use."""
    import socket
    from http.server import ThreadingHTTPServer

    free = threading.BoundedSemaphore(MOST_CONNECTIONS)

    class Server(ThreadingHTTPServer):
        daemon_threads, request_queue_size = True, MOST_CONNECTIONS
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        def process_request(self, request: Any, client_address: Any) -> None:
            if free.acquire(blocking=False):
                super().process_request(request, client_address)
            else:
                self.shutdown_request(request)

        def process_request_thread(self, request: Any, client_address: Any) -> None:
            try:
                super().process_request_thread(request, client_address)
            finally:
                free.release()

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that went away while it was read or written to: nothing to say."""

    try:
        return Server((host, port), handler)
    except (OSError, OverflowError) as problem:
        raise RunError(f"--serve {host}:{port}", f"cannot listen there: {problem}", "name another port") from None


def serve_http(bundle: Path, options: argparse.Namespace, trusted: bytes | None) -> int:
    """Answer OpenAI's requests until Ctrl-C. One thread owns the model; the others read, wait and write."""
    host, port = options.serve
    runner = ready(bundle, options, trusted)
    if runner.task != "text-generation":
        raise RunError("--serve", f"serves models that write text, this one does {runner.task}")
    runner.keep_tokens = 1
    waiting: queue.Queue[Request] = queue.Queue(MOST_WAITING)
    server = http_server(host, port, http_handler(bundle.resolve().name, host, waiting))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    shown = f"[{host}]" if ":" in host else host
    print(f"serving http://{shown}:{server.server_address[1]}/v1, Ctrl-C ends it", file=sys.stderr, flush=True)
    try:
        while True:
            request = waiting.get()
            if request.gone.is_set():
                continue
            try:
                handled(runner, options, request)
            except RunError as problem:
                request.parts.put(problem)
            except Exception as problem:  # one request must not end the server; what it was is told to who asked
                request.parts.put(RunError("server", f"{type(problem).__name__}: {problem}"))
    finally:
        server.shutdown()
        server.server_close()


def _served(text: str) -> tuple[str, int]:
    """(host, port) of --serve: "8080", "127.0.0.1:8080", "[::1]:8080"."""
    host, _, port = text.rpartition(":")
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"must be a port, or HOST:PORT, got {text!r}")
    return host.strip("[]") or LOOPBACK[0], int(port)


def _at_least(smallest: float, kind: type) -> Any:
    def read(text: str) -> Any:
        value = kind(text)
        if not value >= smallest:
            raise argparse.ArgumentTypeError(f"must be at least {smallest}, got {text}")
        return value

    return read


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {text}")
    return value


HERE = Path(__file__).resolve().parent


def about(argv: list[str]) -> str:
    """What a bundle's prompts are like, where --help is asked for and there is a bundle; else nothing."""
    if not {"-h", "--help"}.intersection(argv):
        return ""
    try:
        manifest = read_manifest(Path(argv[argv.index("--bundle") + 1]) if "--bundle" in argv else HERE)
        golden = manifest["golden"][0]
        said = str(golden["messages"][-1]["content"] if golden.get("messages") else golden["text"])
        chat = manifest["prompt_format"] == "chat"
    except (RunError, LookupError, TypeError, AttributeError):
        return ""
    said = "".join(letter for letter in said[:600] if letter.isprintable() or letter == "\n")
    how = "goes through its chat template" if chat else "goes in as it is, and the model writes on"
    return f"This bundle: a prompt {how}. It was exported with prompts like this one:\n\n{said}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=about(sys.argv[1:] if argv is None else argv),
    )  # fmt: skip
    parser.add_argument("prompt", nargs="?", help="the prompt; - reads standard input")
    parser.add_argument("--bundle", type=Path, default=HERE, help="default: where this file is")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--bench", action="store_true", help="measure speed and memory")
    action.add_argument("--verify", action="store_true", help="check hashes, signature and golden vectors")
    parser.add_argument("--public-key", type=Path, help="the bundle must be signed by this key (PEM)")
    parser.add_argument("--no-check", action="store_true", help="load files without comparing them with their hashes")
    parser.add_argument(
        "--no-replay", action="store_true", help="--verify: hashes and signature only; needs no library"
    )
    style = parser.add_mutually_exclusive_group()
    style.add_argument("--chat", dest="format", action="store_const", const="chat", help="through the chat template")
    style.add_argument("--plain", dest="format", action="store_const", const="plain", help="the prompt as it is")
    parser.add_argument("--system", help="the system message of a chat; '' for none (the one that was trained, if any)")
    parser.add_argument("--messages", type=Path, help="instead of a prompt: a conversation as JSON, - reads it piped")
    action.add_argument("--batch", type=Path, help="answer a file of prompts or conversations, a line of JSON each")
    parser.add_argument("--out", type=Path, help="--batch: the file of the answers, in the same order")
    action.add_argument(
        "--serve", nargs="?", const="-", metavar="[HOST:]PORT",
        help="answer each line of standard input as it comes; with a port OpenAI's requests, on 127.0.0.1 unless named",
    )  # fmt: skip
    parser.add_argument("--adapter", help="answer with this adapter of the bundle")
    parser.add_argument(
        "--max-tokens", type=_at_least(1, int), help=f"longest answer ({MAX_TOKENS}; held to a grammar: the context)"
    )
    parser.add_argument("--temperature", type=_at_least(0, float), default=0.0, help="0: always the likeliest token")
    parser.add_argument("--top-p", type=_at_least(0, float), default=1.0, help="sample from this share of the chances")
    parser.add_argument("--seed", type=_at_least(0, int), help="make sampling repeatable")
    parser.add_argument("--free", action="store_true", help="free text although the bundle is held to a form")
    parser.add_argument(
        "--min-probability", type=_share, help=f"labels: answer {NONE_OF_THESE!r} where the best has less (0 to 1)"
    )
    parser.add_argument(
        "--guess", action=argparse.BooleanOptionalAction, help="free answers: check several guessed tokens in a pass"
    )  # for texts that copy: what followed the last tokens where they stood before. None: as the export found it to pay
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options = parser.parse_args(argv)
    if options.messages is not None and options.prompt is not None:
        parser.error("give a prompt or --messages, not both")
    if (options.batch or options.serve) and (options.messages is not None or options.prompt is not None):
        parser.error("--batch and --serve bring their prompts")
    if (options.batch is None) != (options.out is None):
        parser.error("--batch and --out belong together")
    if options.serve not in (None, "-"):
        try:
            options.serve = _served(options.serve)
        except argparse.ArgumentTypeError as problem:
            parser.error(f"--serve {problem}")
    if options.no_check and (options.verify or options.public_key):
        parser.error("--no-check leaves out what --verify and --public-key ask for")
    return options


def check(options: argparse.Namespace, trusted: bytes | None) -> int:
    """4 if the bundle is not what was exported, else 0, after saying which."""
    notes: list[str] = []
    problems = verify(options.bundle, trusted, not options.no_replay, notes)
    signed = check_signature(options.bundle, trusted)[1]
    if options.json:
        print(json.dumps({"ok": not problems, "problems": problems, "signature": signed, "notes": notes}))
        return 4 if problems else 0
    if problems:
        print(f"{options.bundle}: not what was exported\n" + "\n".join(problems), file=sys.stderr)
    else:
        what = "every file" if options.no_replay else "every file and every golden vector"
        print(f"verified: {what} is as exported\n{signed}")
    print("".join(f"note: {line}\n" for line in notes), end="", file=sys.stderr)
    return 4 if problems else 0


def main(argv: list[str] | None = None) -> int:
    """The exit code."""
    options = parse(argv)
    try:
        trusted = read_public_key(options.public_key) if options.public_key else None
        if options.verify:
            return check(options, trusted)
        for line in failed_proof(read_manifest(options.bundle)):
            print(f"WARNING: {line}", file=sys.stderr)
        if options.bench:
            made = bench(options.bundle, adapter=options.adapter, trusted=trusted, check=not options.no_check)
            print(json.dumps(made) if options.json else show_bench(made))
            return 0
        if options.batch:
            return answer_batch(options.bundle, options, trusted)
        if options.serve is not None and options.serve != "-":
            return serve_http(options.bundle, options, trusted)
        return (serve if options.serve else answer)(options.bundle, options, trusted)
    except RunError as problem:
        print(problem, file=sys.stderr)
        return problem.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except (OSError, MemoryError) as problem:
        print(f"{options.bundle}: {problem or 'there is not enough memory'}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
