"""Places that are no files of this machine: the hub, and the released file of a model's card."""

import hashlib
import logging
import os
import re
import shutil
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from evmamba_jax.checkpoints.seal import DESCRIPTION
from evmamba_jax.errors import UserError
from evmamba_jax.models import model_card
from evmamba_jax.storage import written_whole

HUB = "hf-hub:"
OFFICIAL = "official"

_SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".ckpt", ".bin")
_PAGE = re.compile(r"https://huggingface\.co/([^/]+/[^/]+)")
_TIMEOUT = 20.0  # seconds without an answer

T = TypeVar("T")


class Found(NamedTuple):
    """A place of this machine, and what a message calls it."""

    path: str | PathLike[str]
    told: str


def resolve(place: str | PathLike[str], name: str = "") -> Found:
    """Return where a place lies on this machine, fetched if it has to be.

    Args:
        place: ``hf-hub:owner/name``, with ``@revision`` behind it and a file as ``owner/name/FILE`` where the
            repository has several; ``official``; anything else is returned as it is.
        name: of the model, whose released file ``official`` is.

    Raises:
        UserError: it cannot be fetched, and is not in a cache; it is damaged; there are several files.
    """
    if isinstance(place, str) and place.startswith(HUB):
        return _of_hub(place)
    if place == OFFICIAL:
        return _official(name)
    return Found(place, str(place))


def cache() -> Path:
    """Return the folder where released files are kept, and where their user may put them."""
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(base) / "evmamba-jax" / "weights"


def _of_hub(place: str) -> Found:
    repository, _, revision = place.removeprefix(HUB).partition("@")
    owner, _, rest = repository.partition("/")
    name, _, file = rest.partition("/")
    if not (owner and name):
        raise UserError(f"{place!r} is no place on the hub: write hf-hub:owner/name, and @revision if it is not main")
    repository, revision = f"{owner}/{name}", revision or "main"

    def fetch() -> Path:
        hub, at = _client(), {"revision": revision, "local_files_only": not _is_online()}
        if at["local_files_only"]:
            here = Path(hub.snapshot_download(repository, **at))
            files = [path.relative_to(here).as_posix() for path in here.rglob("*") if path.is_file()]
        else:
            files = hub.HfApi().list_repo_files(repository, revision=revision)
        chosen = file or _chosen(place, files)
        if chosen == DESCRIPTION or chosen.endswith(f"/{DESCRIPTION}"):  # a folder of ours
            return Path(hub.snapshot_download(repository, **at)) / Path(chosen).parent
        return Path(hub.hf_hub_download(repository, chosen, **at))

    path = _fetched(fetch, place, "check the name, or copy it from where there is a network and give its path")
    _check_hash(path)
    return Found(path, place)


def _chosen(place: str, files: list[str]) -> str:
    """Return the one file of a repository that holds weights."""
    ours = [file for file in files if file == DESCRIPTION or file.endswith(f"/{DESCRIPTION}")]
    weights = [file for file in files if file.endswith(_SUFFIXES)]
    for kind in (ours, [file for file in weights if file.endswith(".safetensors")], weights):
        if len(kind) == 1:
            return kind[0]
    if not weights and not ours:
        raise UserError(f"{place} holds no weights ({', '.join(_SUFFIXES)}, or a folder of ours); it has {files[:6]}")
    stem, at, revision = place.partition("@")
    listed = ", ".join(f"{stem}/{file}{at}{revision}" for file in (ours or weights)[:6])
    raise UserError(f"{place} holds several files of weights; name one: {listed}")


def _official(name: str) -> Found:
    if not name:
        raise UserError(
            "'official' stands for the released file of a model: name the model too, e.g. --model evmamba_t"
        )
    card = model_card(name)
    if card.checkpoint is None:
        raise UserError(
            f"the released file of {name} has no address of its own: take it from {card.source}, and give its path"
        )
    torch_home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "torch"
    kept = cache() / card.checkpoint
    for path in (kept, Path(torch_home).expanduser() / "hub" / "checkpoints" / card.checkpoint):
        if path.is_file():
            return Found(path, str(path))
    mend = f"take {card.checkpoint} from {card.source} and put it into {kept.parent}"
    if page := _PAGE.match(card.source):

        def fetch() -> Path:
            return Path(_client().hf_hub_download(page[1], card.checkpoint, local_files_only=not _is_online()))

        path = _fetched(fetch, f"the released file of {name}", mend)
        _check_hash(path)
        return Found(path, f"{HUB}{page[1]}/{card.checkpoint}")
    _fetched(lambda: _download(card.source, kept), f"the released file of {name}", mend)
    return Found(kept, str(kept))


def _client() -> Any:
    """Return the hub's client, which is to leave warnings of what fails in the end to our one line."""
    import huggingface_hub

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return huggingface_hub


def _is_online() -> bool:
    """Return whether the hub's host is known from here; its client would try for half a minute."""
    if urllib.request.getproxies():
        return True  # the proxy, not this machine, looks up names
    from huggingface_hub import constants

    try:
        socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return False
    return True


def _download(address: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        urllib.request.urlopen(address, timeout=_TIMEOUT) as answer,
        written_whole(path) as beside,
        beside.open("wb") as file,
    ):
        shutil.copyfileobj(answer, file)


def _fetched(fetch: Callable[[], T], what: str, mend: str) -> T:
    try:
        return fetch()
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{what} is fetched by huggingface_hub: pip install 'evmamba-jax[hub]', or {mend}") from error
    except Exception as error:  # of the hub's client, of whatever it speaks HTTP with, of the network, of the disk
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise UserError(f"{what} cannot be fetched ({reason[:200]}): {mend}") from error


def _check_hash(path: Path) -> None:
    """Compare a file with its SHA-256, by which the hub's cache names large files; others have no such name."""
    known = path.resolve().name
    if not path.is_file() or not re.fullmatch(r"[0-9a-f]{64}", known):
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != known:
        raise UserError(f"{path} is damaged: its SHA-256 is {found}, and should be {known}: delete it, and start again")
