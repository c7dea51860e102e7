"""Who vouches for a bundle? An Ed25519 key in a file signs bundle.json, which names every file by its hash."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from edgeft.documents import saving
from edgeft.errors import BadInput, ParityFailed
from edgeft.exporting.bundle import MANIFEST
from edgeft.machines.extras import missing
from edgeft.machines.runner import runner_module


def _cryptography() -> tuple[Any, Any]:
    """(its serialization module, its Ed25519 module). Raises MissingExtra.

    Signing handles a secret, so it is left to a library that takes care of timing; checking is run.py's own.
    """
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        what = "is not installed, keys and signatures are made with it; verifying needs nothing"
        raise missing("cryptography", what, "sign") from None
    return serialization, ed25519


def public_key_path(key: Path) -> Path:
    """Where `keygen` writes the public half of a key."""
    return key.with_name(key.name + ".pub")


def keygen(out: Path) -> str:
    """The new public key in hexadecimal; the private one goes to `out`, for its owner only, the public to `out`.pub.

    Both in PEM, as openssl reads and writes them. Raises BadInput if a file is there: a key is never replaced.
    """
    serialization, ed25519 = _cryptography()
    public = public_key_path(out)
    for path in (out, public):
        if path.exists() or path.is_symlink():
            raise BadInput(path, "exists: a key is never replaced", "give another --out")
    key = ed25519.Ed25519PrivateKey.generate()
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    open_half = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    with saving(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        # never readable by others, not even for the moment before a chmod
        with os.fdopen(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secret)
        public.write_bytes(open_half)
    return _raw(key.public_key())


def _raw(public: Any) -> str:
    return bytes(public.public_bytes_raw()).hex()


def sign(bundle: Path, key: Path) -> str:
    """The signer's public key in hexadecimal, after writing bundle.sig; the same key gives the same signature.

    Raises BadInput (no bundle, no Ed25519 key) and ParityFailed if a file is not as exported: that is not signed.
    """
    serialization, ed25519 = _cryptography()
    runner = runner_module()
    if not (bundle / MANIFEST).is_file():
        raise BadInput(bundle / MANIFEST, "no such file", "give a folder that edgeft export wrote")
    if problems := runner.check_files(bundle):
        problem = "is not what was exported, and will not be signed:\n" + "\n".join(problems)
        raise ParityFailed(bundle, problem, "export it again")
    hint = "give the file that edgeft sign --new-key wrote, not its .pub"
    try:
        secret = serialization.load_pem_private_key(key.read_bytes(), password=None)
    except OSError as problem:
        raise BadInput(key, f"cannot be read: {problem.strerror}", hint) from None
    except TypeError:
        raise BadInput(key, "is encrypted", "decrypt it first: openssl pkey -in KEY -out PLAIN") from None
    except Exception:  # ValueError, UnsupportedAlgorithm
        raise BadInput(key, "is no private key in PEM", hint) from None
    if not isinstance(secret, ed25519.Ed25519PrivateKey):
        raise BadInput(key, "is no Ed25519 key", hint)
    public = bytes(secret.public_key().public_bytes_raw())
    message = runner.SIGNED + (bundle / MANIFEST).read_bytes()
    path = bundle / runner.SIGNATURE
    with saving(path):
        temporary = bundle.with_name(f".{bundle.name}.sig.{os.getpid()}.tmp")  # not in the bundle: it has no strangers
        temporary.write_bytes(runner.signature_text(public, secret.sign(message)).encode())
        temporary.replace(path)
    return public.hex()
