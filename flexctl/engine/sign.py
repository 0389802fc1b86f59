"""Sign a bundle: a detached signature beside it, over the digests that its manifest has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from flexctl import flags
from flexctl.bundle.opening import open_bundle
from flexctl.bundle.signatures import Envelope, read_envelope, signature_path, signed_statement
from flexctl.bundle.store import check_file_target, new_file
from flexctl.errors import UsageError
from flexctl.options import TRUST, Config, argument, flag, switch
from flexctl.runtime import SILENT, Reporter
from flexctl.steps.passphrase import known_passphrase, open_key
from flexctl.trust.keys import read_key_file
from flexctl.trust.oms import oms_path, require_oms, write_oms
from flexctl.trust.signing import seal

__all__ = ["SignConfig", "SignResult", "sign"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SignConfig(Config):
    """What to sign.

    Writes PATH.sig beside a file and flexctl.sig inside a directory: the signature names the digest, the manifest,
    the license and a merged model's card. Nothing is hashed again: verify before you sign what is not yours.

    Examples:
        flexctl sign experts/law.st --key acme.key
        flexctl sign merged --key coordinator.key
    """

    path: Annotated[Path, argument("PATH", "Anchor, expert (.st), router file or merged model.")]
    key: Annotated[Path, flag("FILE", "Private key, made by keygen, that signs.", TRUST)]
    passphrase_file: flags.PassphraseFile = None
    oms: Annotated[
        bool, switch("Write OpenSSF's model signing v1 instead; hashes everything, and takes EC keys in PEM.", TRUST)
    ] = False
    overwrite: flags.Overwrite = False
    dry_run: flags.DryRun = False


@dataclass(frozen=True, kw_only=True, slots=True)
class SignResult:
    """What was signed.

    Attributes:
        path: The bundle.
        digest: Its digest.
        signature: File with the signature.
        key_id: Of the key that signed; None in OpenSSF's form, which has none.
        signatures: How many keys have signed it now.
        dry_run: Whether nothing was written.
    """

    path: Path
    digest: str
    signature: Path
    key_id: str | None
    signatures: int
    dry_run: bool


def sign(config: SignConfig, reporter: Reporter = SILENT) -> SignResult:
    """Sign a bundle. A second key's signature is added to that of the first.

    Args:
        config: What to sign, and with what.
        reporter: Asks for the passphrase.

    Raises:
        UsageError: There is no such bundle or key, the passphrase is wrong, or there is a signature of something else.
        BundleError: The bundle is not valid.
    """
    bundle = open_bundle(config.path)
    if config.oms:
        return _sign_for_openssf(config, bundle.digest, reporter)
    target, payload = signature_path(config.path), signed_statement(bundle.manifest)
    before = _before(target, payload, config)
    check_file_target(target, overwrite=True)
    signer = open_key(config.key, config, reporter)
    key_id = signer.public_key.keyid
    if not config.dry_run:
        with new_file(target, overwrite=True, beside=config.path if config.path.is_dir() else None) as temporary:
            temporary.write_bytes(seal(payload, signer, before))
    return SignResult(
        path=config.path,
        digest=bundle.digest,
        signature=target,
        key_id=key_id,
        signatures=len({key_id, *(before.signatures if before else ())}),
        dry_run=config.dry_run,
    )


def _sign_for_openssf(config: SignConfig, digest: str, reporter: Reporter) -> SignResult:
    require_oms()
    target = check_file_target(oms_path(config.path), overwrite=config.overwrite)
    read_key_file(config.key)
    passphrase = known_passphrase(config.key, config, reporter)
    if not config.dry_run:
        write_oms(config.path, config.key, passphrase, overwrite=config.overwrite)
    return SignResult(
        path=config.path, digest=digest, signature=target, key_id=None, signatures=1, dry_run=config.dry_run
    )


def _before(target: Path, payload: bytes, config: SignConfig) -> Envelope | None:
    """Return the signatures of the same bundle that are there already; others are in the way."""
    if config.overwrite:
        return None
    envelope = read_envelope(target)
    if envelope is not None and envelope.payload != payload:
        raise UsageError(f"{target}: signs another version", hint="give `overwrite` to replace it")
    return envelope
