"""Weights by their names: a hub of our own on loopback, with the hub's real client; the file of a model's card."""

import hashlib
import http.server
import json
import shutil
import threading
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from official_weights import save_pth, weights_of

from evmamba_jax import create_model
from evmamba_jax.arrays import split
from evmamba_jax.errors import UserError
from evmamba_jax.models import abstract_model
from evmamba_jax.weights import places
from evmamba_jax.weights.__main__ import convert_file
from evmamba_jax.weights.load import open_place

OPTIONS = {"width": 8, "depths": (0, 0, 1, 0), "num_classes": 10}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of official weights of a small model, and the folder that it converts to."""
    folder = tmp_path_factory.mktemp("weights")
    save_pth(folder / "small.pth", weights_of(abstract_model("evmamba_t", **OPTIONS)))
    convert_file(folder / "small.pth", "evmamba_t", folder / "ours", **OPTIONS)
    return folder


@pytest.fixture(scope="module")
def hub(weights, tmp_path_factory):
    """A server of repositories, each a folder; what the hub's client asks of the real one."""
    root = tmp_path_factory.mktemp("hub")
    (root / "me" / "file").mkdir(parents=True)
    shutil.copy(weights / "small.pth", root / "me" / "file" / "pytorch_model.pth")
    (root / "me" / "file" / "README.md").write_text("a model")
    shutil.copytree(weights / "ours", root / "me" / "folder")
    shutil.copytree(root / "me" / "file", root / "me" / "two")
    shutil.copy(weights / "small.pth", root / "me" / "two" / "other.pth")
    (root / "me" / "none").mkdir()
    (root / "me" / "none" / "README.md").write_text("nothing")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, *, body):
            parts = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/").split("/")
            kind, headers, data = "application/json", {}, b""
            if parts[0] == "api":  # /api/models/OWNER/NAME/revision/REV, or .../tree/REV
                repository = root / parts[2] / parts[3]
                if not repository.is_dir() or (len(parts) > 5 and parts[5] not in ("main", "v2", COMMIT)):
                    return self.say(404, {"X-Error-Code": "RepoNotFound"}, b"{}", body)
                files = [path for path in sorted(repository.rglob("*")) if path.is_file()]
                names = [path.relative_to(repository).as_posix() for path in files]
                if "tree" in parts:
                    sizes = zip(names, files, strict=True)
                    answer = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": COMMIT} for n, f in sizes]
                else:
                    name = "/".join(parts[2:4])
                    answer = {"id": name, "modelId": name, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
                    answer |= {"private": False, "tags": [], "downloads": 0, "likes": 0}
                data = json.dumps(answer).encode()
            else:  # /OWNER/NAME/resolve/REV/FILE
                path = root / parts[0] / parts[1] / "/".join(parts[4:])
                if not path.is_file():
                    return self.say(404, {"X-Error-Code": "EntryNotFound"}, b"", body)
                data, kind = path.read_bytes(), "application/octet-stream"
                digest = hashlib.sha256(data).hexdigest()
                headers = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT, "X-Linked-Etag": f'"{digest}"'}
            return self.say(200, headers | {"Content-Type": kind}, data, body)

        def say(self, code, headers, data, body):
            self.send_response(code)
            for name, value in (headers | {"Content-Length": str(len(data))}).items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def online(hub, tmp_path, monkeypatch):
    """Let the client ask the server, and keep what it gets in a folder of the test."""
    monkeypatch.setattr(constants, "ENDPOINT", hub)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    "place", ["hf-hub:me/file", "hf-hub:me/file@v2", "hf-hub:me/two/other.pth", "hf-hub:me/folder"]
)
def test_a_repository_gives_its_weights(place, online, weights):
    model = create_model("evmamba_t", pretrained=place, **OPTIONS)
    wanted = create_model("evmamba_t", pretrained=weights / "small.pth", **OPTIONS)
    for name, array in split(wanted).params.items():
        np.testing.assert_array_equal(split(model).params[name], array, err_msg=name)
    assert open_place(place, "evmamba_t", **OPTIONS).weights.taken.startswith(place)


def test_what_was_fetched_is_there_without_a_network(online, monkeypatch):
    create_model("evmamba_t", pretrained="hf-hub:me/file", **OPTIONS)
    monkeypatch.setattr(places, "_is_online", lambda: False)
    create_model("evmamba_t", pretrained="hf-hub:me/file", **OPTIONS)
    with pytest.raises(UserError, match=r"^hf-hub:me/folder cannot be fetched \(.*\): check the name, or copy it"):
        create_model("evmamba_t", pretrained="hf-hub:me/folder", **OPTIONS)


def test_a_file_that_is_not_what_the_hub_says_is_refused(online):
    create_model("evmamba_t", pretrained="hf-hub:me/file", **OPTIONS)
    (kept,) = [path for path in online.glob("*/blobs/*") if path.stat().st_size > 10_000]
    kept.write_bytes(kept.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match="is damaged: its SHA-256 is .*: delete it, and start again"):
        create_model("evmamba_t", pretrained="hf-hub:me/file", **OPTIONS)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("hf-hub:me", "is no place on the hub: write hf-hub:owner/name"),
        ("hf-hub:me/absent", r"hf-hub:me/absent cannot be fetched \(.*\): check the name"),
        ("hf-hub:me/file@v3", r"hf-hub:me/file@v3 cannot be fetched \(.*\): check the name"),
        ("hf-hub:me/two", "holds several files of weights; name one: hf-hub:me/two/other.pth, hf-hub:me/two/pytorch_m"),
        ("hf-hub:me/none", r"hf-hub:me/none holds no weights .*; it has \['README.md'\]"),
        ("hf-hub:me/file/absent.pth", r"cannot be fetched \(.*\): check the name"),
    ],
)
def test_what_the_hub_has_not_gets_one_line(place, message, online):
    with pytest.raises(UserError, match=message) as refused:
        create_model("evmamba_t", pretrained=place, **OPTIONS)
    assert "\n" not in str(refused.value)


def test_the_released_file_is_taken_from_the_cache_or_asked_for(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(places, "_is_online", lambda: False)
    with pytest.raises(
        UserError, match=r"^the released file of evmamba_t cannot be fetched .*: take efficient_vm"
    ) as no:
        create_model("evmamba_t", pretrained="official", **OPTIONS)
    assert "\n" not in str(no.value)
    assert f"put it into {places.cache()}" in str(no.value)
    places.cache().mkdir(parents=True)
    shutil.copy(weights / "small.pth", places.cache() / "efficient_vmamba_tiny.ckpt")
    opened = open_place("official", "evmamba_t", **OPTIONS)
    assert opened.weights.taken.startswith(str(places.cache()))


def test_a_release_is_downloaded_whole_or_not_at_all(hub, weights, tmp_path, monkeypatch):
    path = Path(tmp_path) / "kept" / "file.pth"
    places._download(f"{hub}/me/file/resolve/main/pytorch_model.pth", path)
    assert path.read_bytes() == (weights / "small.pth").read_bytes()
    with pytest.raises(UserError, match=r"cannot be fetched \(HTTP Error 404: Not Found\): take"):
        places._fetched(lambda: places._download(f"{hub}/me/file/resolve/main/no", path.with_name("no")), "it", "take")
    assert not path.with_name("no").exists()


@pytest.mark.parametrize(
    ("name", "message"), [("", "name the model too"), ("msvmamba_n", "has no address of its own: take it from https")]
)
def test_no_released_file_to_take(name, message):
    with pytest.raises(UserError, match=message):
        places.resolve("official", name)
