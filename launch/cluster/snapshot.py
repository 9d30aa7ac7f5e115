"""A copy of the code that a job runs, so that editing the working tree changes nothing that is queued."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

from training.reliability.events import tell

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("model", "data_pipeline", "training", "launch", "conf", "examples")
SUFFIXES = (".py", ".yaml", ".css")
# Files that look like credentials stay where they are: a snapshot lies in a run folder that others may read.
CREDENTIALS = re.compile(
    r"\.env(\..*)?|.*\.(env|pem|key|p12|pfx|jks|keytab|kdbx|ovpn)|\.?(netrc|pypirc|npmrc|pgpass|htpasswd|git-credentials)"
    r"|.*\.(ppk|p8|asc|gpg|age)|\.?(s3cfg|boto|kubeconfig|dockercfg|dockerconfigjson)|id_(rsa|dsa|ecdsa|ed25519).*"
    r"|(?!.*\.py$)(.*(secret|credential|password|passphrase|(api|private)[-_]?key|service[-_]?account).*"
    r"|\.?token(\.(txt|json))?|(.*[-_.])?(hf|hub|access|auth|bearer|github|gitlab|wandb|bot)[-_]token.*)",
    re.IGNORECASE,
)


def code_files() -> list[Path]:
    """Files of the packages relative to `ROOT`: git's where this is a checkout, else those of the installed package.

    Files that are new and not ignored count too: a module that was just written must not be missing in the job.
    """
    try:
        answer = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PACKAGES],
            cwd=ROOT,
            capture_output=True,
            check=False,
        )
        names = answer.stdout.decode().split("\0") if answer.returncode == 0 else []
    except FileNotFoundError:
        names = []
    found = [Path(name) for name in names if name and (ROOT / name).is_file()]
    if not found:
        found = [
            path.relative_to(ROOT)
            for package in PACKAGES
            for path in (ROOT / package).rglob("*")
            if path.suffix in SUFFIXES
        ]
    left_out = sorted(str(path) for path in found if looks_like_credentials(path))
    if left_out:
        tell(f"not copied for the job, because they look like credentials: {', '.join(left_out)}")
    return sorted(path for path in found if not looks_like_credentials(path))


def looks_like_credentials(path: Path) -> bool:
    return any(CREDENTIALS.fullmatch(part) for part in (path.name, *path.parent.parts[1:]))


def snapshot(folder: Path) -> Path:
    """`folder/<digest of the contents>`: the code, copied unless it is there already. Published by rename."""
    contents = {path: (ROOT / path).read_bytes() for path in code_files()}
    digest = hashlib.blake2b(digest_size=8)
    for path, content in contents.items():
        digest.update(f"{path}\0{len(content)}\0".encode())
        digest.update(content)
    target = folder / digest.hexdigest()
    if target.is_dir():
        return target
    temporary = folder / f".{target.name}.{os.getpid()}"
    for path, content in contents.items():
        copy = temporary / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(content)
        shutil.copymode(ROOT / path, copy)  # what only its owner may read stays so
    try:
        temporary.rename(target)
    except OSError:  # another submission published the same code in the meantime
        shutil.rmtree(temporary)
        if not target.is_dir():
            raise
    return target
