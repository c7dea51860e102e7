"""Does a signature prove who made a bundle, offline, and by arithmetic that others have checked?"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bundles import bundle, reseal, script
from warm import edgeft

from edgeft.errors import BadInput, MissingExtra, ParityFailed
from edgeft.exporting.sign import keygen, public_key_path, sign
from edgeft.machines.runner import runner_module

RUNNER = runner_module()
# RFC 8032, 7.1: secret key, public key, message, signature
VECTORS = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
        "d25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c"
        "387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc659"
        "4a7c15e9716ed28dc027beceea1ec40a",
    ),
    (
        "833fe62409237b9d62ec77587520911e9a759cec1d19755b7da901b96dca3d42",
        "ec172b93ad5e563bf4932c70e1245034c35467ef2efd4d64ebf819683467e2bf",
        hashlib.sha512(b"abc").hexdigest(),
        "dc2a4459e7369633a52b1bf277839a00201009a3efbf3ecb69bea2186c26b58909351fc9ac90b3ecfdfbc7c66431e030"
        "3dca179c138ac17ad9bef1177331a704",
    ),
]


def expand(secret: bytes) -> tuple[int, bytes, bytes]:
    """(scalar, prefix, public key) of a secret key: RFC 8032, 5.1.5."""
    digest = hashlib.sha512(secret).digest()
    scalar = int.from_bytes(digest[:32], "little") & (2**254 - 8) | 2**254
    return scalar, digest[32:], RUNNER.point_encode(RUNNER.point_multiply(scalar, RUNNER.BASE_POINT))


def signed(secret: bytes, message: bytes) -> bytes:
    """RFC 8032, 5.1.6, on the runner's group operations: good for tests only, its timing depends on the secret."""
    scalar, prefix, public = expand(secret)

    def number(*parts: bytes) -> int:
        return int.from_bytes(hashlib.sha512(b"".join(parts)).digest(), "little") % RUNNER.ORDER

    nonce = number(prefix, message)
    commitment = RUNNER.point_encode(RUNNER.point_multiply(nonce, RUNNER.BASE_POINT))
    answer = (nonce + number(commitment, public, message) * scalar) % RUNNER.ORDER
    return commitment + answer.to_bytes(32, "little")


SECRET, OTHER = bytes(range(32)), bytes(range(1, 33))
KEY, OTHER_KEY = expand(SECRET)[2], expand(OTHER)[2]


def put_signature(folder: Path, secret: bytes = SECRET) -> None:
    message = RUNNER.SIGNED + (folder / "bundle.json").read_bytes()
    text = RUNNER.signature_text(expand(secret)[2], signed(secret, message))
    (folder / "bundle.sig").write_text(text, encoding="ascii")


def pem(key: bytes) -> str:
    text = base64.b64encode(RUNNER.KEY_PREFIX + key).decode()
    return f"-----BEGIN PUBLIC KEY-----\n{text}\n-----END PUBLIC KEY-----\n"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A signed bundle, and the public key as a file beside it."""
    folder = tmp_path / "my bundle"
    shutil.copytree(bundle("ort-int4"), folder)
    put_signature(folder)
    (tmp_path / "key.pub").write_text(pem(KEY), encoding="ascii")
    return folder


def problems(folder: Path, trusted: bytes | None = KEY) -> list[str]:
    return list(RUNNER.verify(folder, trusted, replay=False))


@pytest.mark.parametrize(("secret", "public", "message", "signature"), VECTORS)
def test_the_rfcs_own_vectors(secret: str, public: str, message: str, signature: str) -> None:
    text, right = bytes.fromhex(message), bytes.fromhex(signature)
    key = expand(bytes.fromhex(secret))[2]
    assert key.hex() == public
    assert signed(bytes.fromhex(secret), text) == right
    assert RUNNER.signature_is_right(key, text, right)
    assert not RUNNER.signature_is_right(key, text + b"\0", right)
    assert not RUNNER.signature_is_right(KEY, text, right)
    for at in range(0, 64, 7):
        wrong = bytearray(right)
        wrong[at] ^= 1
        assert not RUNNER.signature_is_right(key, text, bytes(wrong))


def test_a_signature_and_a_key_have_one_form_each() -> None:
    message, right = b"text", signed(SECRET, b"text")
    assert RUNNER.signature_is_right(KEY, message, right)
    answer = int.from_bytes(right[32:], "little") + RUNNER.ORDER
    assert not RUNNER.signature_is_right(KEY, message, right[:32] + answer.to_bytes(32, "little"))
    for number in (2, RUNNER.PRIME, RUNNER.PRIME + 1, 1 + 2**255):  # no x; y not reduced, twice; x = 0 with a sign
        with pytest.raises(ValueError, match="not a point"):
            RUNNER.point_decode(number.to_bytes(32, "little"))
        assert not RUNNER.signature_is_right(number.to_bytes(32, "little"), message, right)
    assert not RUNNER.signature_is_right(KEY[:31], message, right)
    assert not RUNNER.signature_is_right(KEY, message, right[:63])


def test_base_point_has_the_order_of_the_rfc() -> None:
    neutral = (1).to_bytes(32, "little")
    assert RUNNER.point_encode(RUNNER.point_multiply(RUNNER.ORDER, RUNNER.BASE_POINT)) == neutral
    assert RUNNER.point_encode(RUNNER.BASE_POINT).hex() == "58" + "66" * 31


def test_agrees_with_another_implementation() -> None:
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    chance = random.Random(1)
    for length in range(12):
        secret, message = chance.randbytes(32), chance.randbytes(length * 37)
        theirs = ed25519.Ed25519PrivateKey.from_private_bytes(secret)
        public, signature = theirs.public_key().public_bytes_raw(), theirs.sign(message)
        assert (public, signature) == (expand(secret)[2], signed(secret, message))
        assert RUNNER.signature_is_right(public, message, signature)


def test_who_signed_is_said_and_whether_that_was_checked(copy: Path) -> None:
    done = script(copy, "--verify", "--no-replay")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1] == f"signed, by a key that nobody vouched for: {KEY.hex()}"
    done = script(copy, "--verify", "--public-key", str(copy.parent / "key.pub"), "--json")
    assert done.returncode == 0
    expected = {"ok": True, "problems": [], "signature": f"signed by the trusted key {KEY.hex()}", "notes": []}
    assert json.loads(done.stdout) == expected


def test_signature_and_hashes_need_nothing_but_python(copy: Path) -> None:
    arguments = ["--verify", "--no-replay", "--public-key", str(copy.parent / "key.pub")]
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(copy / "run.py"), *arguments], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"signed by the trusted key {KEY.hex()}\n")


def test_another_signer_and_no_signer_are_refused_by_name(copy: Path) -> None:
    put_signature(copy, OTHER)
    assert problems(copy, None) == []
    line = f"bundle.sig: signed by {OTHER_KEY.hex()}, not by the trusted key {KEY.hex()}"
    assert problems(copy) == [line]
    assert RUNNER.verify(copy, KEY) == [line, "golden vectors: not replayed, the files above come first"]
    (copy / "bundle.sig").unlink()
    assert problems(copy, None) == []
    assert problems(copy) == [f"bundle.sig: missing, the trusted key {KEY.hex()} must have signed"]


def test_what_hashes_cannot_show_the_signature_does(copy: Path) -> None:
    path = copy / "chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8") + "{# changed #}", encoding="utf-8")
    reseal(copy, lambda manifest: None)
    line = f"bundle.sig: is not {KEY.hex()}'s signature of this bundle.json"
    assert problems(copy) == problems(copy, None) == [line]
    done = script(copy, "--verify", "--public-key", str(copy.parent / "key.pub"))
    assert done.returncode == 4 and line in done.stderr


def test_the_key_in_the_signature_cannot_be_exchanged(copy: Path) -> None:
    path = copy / "bundle.sig"
    path.write_text(path.read_text().replace(KEY.hex(), OTHER_KEY.hex()))
    assert problems(copy, OTHER_KEY) == [f"bundle.sig: is not {OTHER_KEY.hex()}'s signature of this bundle.json"]


def test_with_a_key_nothing_is_run_but_what_it_signed(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ["--bundle", str(copy), "--public-key", str(copy.parent / "key.pub")]
    answer, measure = [*ask, "x", "--max-tokens", "1"], [*ask, "--bench"]
    assert RUNNER.main(answer) == RUNNER.main(measure) == 0
    capsys.readouterr()
    manifest = (copy / "bundle.json").read_bytes()

    def refused(line: str) -> None:
        for arguments in (answer, measure, [*ask, "--verify"], [*ask, "--verify", "--no-replay"]):
            assert RUNNER.main(arguments) == 4
            out, err = capsys.readouterr()
            assert out == "" and line in err

    put_signature(copy, OTHER)
    refused(f"bundle.sig: signed by {OTHER_KEY.hex()}, not by the trusted key {KEY.hex()}")
    (copy / "bundle.sig").unlink()
    refused(f"bundle.sig: missing, the trusted key {KEY.hex()} must have signed")
    put_signature(copy)
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8") + "{# changed #}", encoding="utf-8")
    reseal(copy, lambda manifest: None)
    refused(f"bundle.sig: is not {KEY.hex()}'s signature of this bundle.json")
    (copy / "bundle.json").write_bytes(manifest)  # rightly signed, and one file is another
    refused("chat_template.jinja: ")
    (copy / "bundle.sig").rename(copy.parent / "sig")
    (copy / "bundle.sig").symlink_to("../sig")
    refused("bundle.sig: missing")


def test_a_broken_signature_stops_an_answer_without_a_key_too(copy: Path) -> None:
    path = copy / "bundle.sig"
    path.write_text(path.read_text().replace(KEY.hex(), OTHER_KEY.hex()))
    with pytest.raises(RUNNER.NotAsExported, match=r"bundle\.sig: is not "):
        RUNNER.Runner(copy)


def test_a_signature_is_of_bundles_only(copy: Path) -> None:
    signature = signed(SECRET, (copy / "bundle.json").read_bytes())
    (copy / "bundle.sig").write_text(RUNNER.signature_text(KEY, signature), encoding="ascii")
    assert len(problems(copy)) == 1


def test_any_changed_byte_of_the_signature_file_is_found(copy: Path) -> None:
    chance, path = random.Random(2), copy / "bundle.sig"
    whole = path.read_bytes()
    for at in range(0, len(whole), 3):
        raw = bytearray(whole)
        raw[at] ^= chance.randrange(1, 256)
        path.write_bytes(bytes(raw))
        (line,) = RUNNER.check_signature(copy, None)[0]
        assert line.startswith("bundle.sig: ")
    for text in (b"", whole[:-1], whole + b"\n", whole.upper(), b"\xff" * 3):
        path.write_bytes(text)
        assert problems(copy) == ["bundle.sig: is not a signature file"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"key\.pub: cannot be read"),
        ("", r"key\.pub: is no public key in PEM"),
        ("-----BEGIN PUBLIC KEY-----\n!\n-----END PUBLIC KEY-----", r"key\.pub: is no Ed25519 public key"),
        (
            pem(KEY + b"x"),
            r"key\.pub: is no Ed25519 public key\n\nhint: give the \.pub file that edgeft sign --new-key wrote",
        ),
        (pem(KEY).replace("PUBLIC", "PRIVATE"), r"key\.pub: is no public key in PEM"),
    ],
)
def test_a_file_that_is_no_public_key_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "key.pub").write_text(text)
    with pytest.raises(RUNNER.RunError, match=message):
        RUNNER.read_public_key(tmp_path / "key.pub")


def test_signing_without_the_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    for act in (lambda: keygen(tmp_path / "key"), lambda: sign(bundle("ort-int4"), tmp_path / "key")):
        with pytest.raises(MissingExtra, match=r"cryptography: is not installed.*\n\nhint: pip install .*\[sign\]"
                           ) as caught:  # fmt: skip
            act()
        assert caught.value.exit_code == 5


@pytest.fixture
def key(tmp_path: Path) -> Path:
    pytest.importorskip("cryptography")
    keygen(tmp_path / "keys" / "mine")
    return tmp_path / "keys" / "mine"


def test_keygen_sign_and_verify_fit_each_other(copy: Path, key: Path) -> None:
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    public = RUNNER.read_public_key(public_key_path(key))
    assert sign(copy, key) == public.hex()  # replaces the signature that was there
    assert problems(copy, public) == []
    first = (copy / "bundle.sig").read_bytes()
    sign(copy, key)
    assert (copy / "bundle.sig").read_bytes() == first
    assert sorted(path.name for path in copy.parent.iterdir()) == ["key.pub", "keys", "my bundle"]


def test_openssl_reads_the_keys_and_verifies_the_signature(copy: Path, key: Path, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here")
    sign(copy, key)
    (tmp_path / "message").write_bytes(RUNNER.SIGNED + (copy / "bundle.json").read_bytes())
    (tmp_path / "signature").write_bytes(bytes.fromhex((copy / "bundle.sig").read_text().split()[-1]))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(public_key_path(key)), "-rawin", "-in",
               str(tmp_path / "message"), "-sigfile", str(tmp_path / "signature")]  # fmt: skip
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_key_is_never_replaced(key: Path) -> None:
    before = key.read_bytes()
    with pytest.raises(BadInput, match=r"mine: exists: a key is never replaced"):
        keygen(key)
    key.rename(key.with_name("other"))
    with pytest.raises(BadInput, match=r"mine\.pub: exists: a key is never replaced"):
        keygen(key)
    assert key.with_name("other").read_bytes() == before and not key.exists()


def test_what_is_damaged_is_not_signed(copy: Path, key: Path) -> None:
    (copy / "run.py").write_text("")
    before = (copy / "bundle.sig").read_bytes()
    with pytest.raises(ParityFailed, match=r"will not be signed:\nrun\.py: 0 bytes, the export wrote \d+"):
        sign(copy, key)
    assert (copy / "bundle.sig").read_bytes() == before
    with pytest.raises(BadInput, match=r"keys/bundle\.json: no such file"):
        sign(key.parent, key)


def test_a_file_that_is_no_private_key_is_refused(copy: Path, key: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    def written(secret: Any, password: bytes | None) -> bytes:
        kind = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
        form = serialization.PrivateFormat.PKCS8
        return bytes(secret.private_bytes(serialization.Encoding.PEM, form, kind))

    bad = copy.parent / "bad"
    cases = [
        (
            public_key_path(key).read_bytes(),
            r"bad: is no private key in PEM\n\nhint: give the file that edgeft sign --new-key",
        ),
        (written(ed25519.Ed25519PrivateKey.generate(), b"word"), r"bad: is encrypted"),
        (written(ec.generate_private_key(ec.SECP256R1()), None), r"bad: is no Ed25519 key"),
    ]
    for raw, message in cases:
        bad.write_bytes(raw)
        with pytest.raises(BadInput, match=message):
            sign(copy, bad)
    with pytest.raises(BadInput, match=r"nothing: cannot be read: No such file"):
        sign(copy, copy.parent / "nothing")


def test_the_verbs(copy: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")

    made = edgeft("sign", "--new-key", tmp_path / "k")
    assert made.returncode == 0
    assert edgeft("sign", copy, "--key", tmp_path / "k").stdout == made.stdout
    good = edgeft("verify", copy, "--public-key", tmp_path / "k.pub", "--no-replay")
    assert (good.returncode, good.stdout.splitlines()[1]) == (0, f"signed by the trusted key {made.stdout.strip()}")
    bad = edgeft("verify", copy, "--public-key", tmp_path / "key.pub", "--no-replay")
    assert bad.returncode == 4 and "not by the trusted key" in bad.stderr
