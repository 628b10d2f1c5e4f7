"""Files written whole, and disks that refuse."""

import errno

import pytest

from evmamba_jax.errors import UserError
from evmamba_jax.storage import storage_errors, written_whole


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
