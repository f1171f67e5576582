"""Code is loaded only from folders and files that no other user can have written."""

import os
from pathlib import Path

import pytest

from avcil_dist.errors import ConfigError
from avcil_dist.system.trusted_files import check_trusted_file, check_trusted_folder, make_private_folder

NOBODY = 65534
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")


def library(folder: Path, mode: int = 0o600) -> Path:
    path = folder / "code.so"
    path.write_bytes(b"code")
    path.chmod(mode)
    return path


def test_a_new_folder_and_its_files_are_trusted_under_any_umask(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        folder = make_private_folder(tmp_path / "a" / "b")
        path = folder / "code.so"
        path.write_bytes(b"code")
    finally:
        os.umask(umask)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o666
    assert make_private_folder(folder) == folder
    check_trusted_file(path)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_a_folder_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    folder = make_private_folder(tmp_path / "cache")
    path = library(folder)
    folder.chmod(mode)
    for check in (
        lambda: make_private_folder(folder),
        lambda: check_trusted_folder(folder),
        lambda: check_trusted_file(path),
    ):
        with pytest.raises(ConfigError, match="others can write it"):
            check()


@pytest.mark.parametrize("mode", [0o666, 0o620, 0o602])
def test_a_file_that_others_can_reach_and_write_is_refused(tmp_path: Path, mode: int) -> None:
    folder = make_private_folder(tmp_path / "cache")
    folder.chmod(0o755)
    path = library(folder, mode)
    with pytest.raises(ConfigError, match=r"code\.so: others can write it"):
        check_trusted_file(path)
    folder.chmod(0o700)
    check_trusted_file(path)


def test_a_link_is_refused(tmp_path: Path) -> None:
    folder = make_private_folder(tmp_path / "cache")
    (tmp_path / "link").symlink_to(folder)
    (folder / "link.so").symlink_to(library(folder))
    for check in (make_private_folder, check_trusted_folder):
        with pytest.raises(ConfigError, match="not a folder"):
            check(tmp_path / "link")
    with pytest.raises(ConfigError, match="not a regular file"):
        check_trusted_file(folder / "link.so")


@as_root
def test_what_belongs_to_another_user_is_refused(tmp_path: Path) -> None:
    folder = make_private_folder(tmp_path / "cache")
    path = library(folder)
    os.chown(path, NOBODY, NOBODY)
    with pytest.raises(ConfigError, match=r"code\.so: belongs to another user"):
        check_trusted_file(path)
    os.chown(folder, NOBODY, NOBODY)
    with pytest.raises(ConfigError, match="cache: belongs to another user"):
        make_private_folder(folder)
