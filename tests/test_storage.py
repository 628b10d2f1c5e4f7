"""Files written whole, and disks that refuse."""

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from evmamba_jax.errors import UserError
from evmamba_jax.storage import (
    OPEN_FILES,
    OWNER,
    allow_open_files,
    is_bucket,
    local,
    owned,
    storage_errors,
    written_whole,
)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("RESOURCE_EXHAUSTED: write() failed: No space left on device"),  # as TensorStore puts it
    ],
)
def test_a_full_disk_is_recognised(tmp_path, error):
    with pytest.raises(UserError, match="No space left on device"), storage_errors(tmp_path):
        raise error


def test_other_errors_pass_as_they_are(tmp_path):
    with pytest.raises(ValueError, match="something else") as caught, storage_errors(tmp_path):
        raise ValueError("something else")
    assert not isinstance(caught.value, UserError)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "figures.csv"
    with written_whole(path) as beside:
        beside.write_text("whole")
        assert not path.exists()
    told = f"cannot write in {tmp_path} .No space left on device.: make room"
    with pytest.raises(UserError, match=told), written_whole(path) as beside:  # noqa: PT012
        beside.write_text("ha")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


# Places


def test_every_form_of_a_place_is_the_same_folder(tmp_path, monkeypatch):
    home = tmp_path / "home dir"
    folder = home / "runs" / "one"
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    quoted = str(folder).replace(" ", "%20")
    forms = ["~/runs/one", "~/runs/one/", "runs/one", "./runs/../runs/one//", tmp_path / "link", str(folder)]
    forms += [f"file://{quoted}", f"file://localhost{quoted}/", Path(f"file:{quoted}"), Path("~/runs/one")]
    for form in forms:
        assert local(form) == folder, form
        assert not is_bucket(form)
    assert local("~/new") == home / "new"


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("gs://bucket/run", "gs://bucket/run is not on a disk of this machine"),
        ("s3://bucket/run", "is not on a disk"),
        ("hdfs://host/run", "is not on a disk"),
        ("gcs+x://b", "is not on a disk"),
        (Path("gs://bucket/run"), "gs://bucket/run is not on a disk"),
        ("file://host/run", "names the machine 'host'"),
        ("~nobody-has-this-name/run", "no path that can be followed"),
        ("a\0b", "no path that can be followed"),
        ("", "is no file or folder"),
        (b"runs", "is no file or folder"),
        (3, "is no file or folder"),
        (None, "is no file or folder"),
    ],
)
def test_what_is_no_place_here_is_refused(place, told):
    with pytest.raises(UserError, match=told) as caught:
        local(place)
    assert "\n" not in str(caught.value)


def test_links_in_a_circle_are_refused(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(UserError, match="no path that can be followed"):
        local(tmp_path / "a" / "run")


# Owners

OTHER = "import sys; from pathlib import Path; from evmamba_jax.storage import owned\n"
HOLD = OTHER + "with owned(Path(sys.argv[1])): print('owns', flush=True); sys.stdin.read()"


def start(folder):
    """Start a process that owns a folder; it has it when this returns."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], text=True, cwd=Path(__file__).parents[1], **pipes
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "owns\n"
    return process


def test_a_folder_has_one_owner_that_is_alive(tmp_path):
    folder = tmp_path / "runs" / "one"
    with start(folder) as process:
        before = {path: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(UserError, match=rf"one is still alive \(process {process.pid} on "), owned(folder):
            pytest.fail("it has two")
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (folder / OWNER).exists()  # it could not tidy up
        with owned(folder):  # and the number of its process may be another's by now
            assert f"process {os.getpid()} on " in (folder / OWNER).read_text()
    assert list(folder.iterdir()) == []


def test_a_process_does_not_own_a_folder_twice(tmp_path):
    with owned(tmp_path):
        with pytest.raises(UserError, match=f"still alive .process {os.getpid()} on"), owned(tmp_path / "." / ""):
            pytest.fail("it has two")
        assert (tmp_path / OWNER).exists()
    with owned(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write in .*file/run"), owned(tmp_path / "file" / "run"):
        pass


# Open files


@pytest.mark.parametrize(
    ("limits", "allowed"),
    [
        ((40, 4096), [(OPEN_FILES, 4096)]),
        ((40, resource.RLIM_INFINITY), [(OPEN_FILES, resource.RLIM_INFINITY)]),
        ((OPEN_FILES, OPEN_FILES), []),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), []),
    ],
)
def test_open_files_are_allowed_as_far_as_the_system_lets(limits, allowed, monkeypatch):
    given = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: given.append(new))
    allow_open_files()
    assert given == allowed


def test_too_few_open_files_are_told(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 40))
    with pytest.raises(UserError, match=f"allows 40 open files at a time, and a run takes {OPEN_FILES} or more"):
        allow_open_files()
