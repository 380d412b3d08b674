"""Files and downloads: nothing half-written, nothing unchecked, nothing lost."""

import hashlib
import urllib.error

import pytest

import binllm_utils as bu

CONTENT = b"what the server holds"
SOURCE = bu.Source("file.zip", hashlib.sha256(CONTENT).hexdigest(), url="https://example.invalid/file.zip")
OTHER = bu.Source("file.whl", "0" * 64, package="no-such-package==1.0")


def offline(source, target):
    raise urllib.error.URLError("Name or service not known")


def serving(content):
    return lambda source, target: target.write_bytes(content)


def test_an_error_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), bu.replacing(path) as part:
        part.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_replacing_puts_files_and_folders(tmp_path):
    for word in ("old", "new"):
        with bu.replacing(tmp_path / "folder") as part:
            part.mkdir()
            (part / word).write_text(word)
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_download_is_checked_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(bu, "_download", serving(CONTENT))
    assert bu.fetch(SOURCE, cache=tmp_path).read_bytes() == CONTENT
    monkeypatch.setattr(bu, "_download", offline)
    assert bu.fetch(SOURCE, cache=tmp_path).read_bytes() == CONTENT  # from the cache


def test_a_wrong_checksum_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(bu, "_download", serving(b"something else"))
    with pytest.raises(OSError, match="SHA-256 differs"):
        bu.fetch(SOURCE, cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_truncated_file_is_fetched_again(tmp_path, monkeypatch):
    (tmp_path / SOURCE.file).write_bytes(CONTENT[:5])
    monkeypatch.setattr(bu, "_download", serving(CONTENT))
    assert bu.fetch(SOURCE, cache=tmp_path).read_bytes() == CONTENT


def test_a_truncated_file_without_network_is_named_and_kept(tmp_path, monkeypatch):
    (tmp_path / SOURCE.file).write_bytes(CONTENT[:5])
    monkeypatch.setattr(bu, "_download", offline)
    with pytest.raises(OSError, match=r"file\.zip is there but damaged"):
        bu.fetch(SOURCE, cache=tmp_path)
    assert (tmp_path / SOURCE.file).read_bytes() == CONTENT[:5]


def test_no_network_and_no_cache_names_every_source(tmp_path, monkeypatch):
    monkeypatch.setattr(bu, "_download", offline)
    with pytest.raises(OSError, match=r"file\.zip: .*nor no-such-package==1\.0: .*Go online .* or put file\.zip into"):
        bu.fetch(SOURCE, OTHER, cache=tmp_path)


def test_the_second_source_serves_when_the_first_cannot(tmp_path, monkeypatch):
    second = bu.Source("second.whl", SOURCE.sha256, package="some==1")
    monkeypatch.setattr(bu, "_download", lambda s, t: t.write_bytes(CONTENT) if s is second else offline(s, t))
    assert bu.fetch(SOURCE, second, cache=tmp_path) == tmp_path / "second.whl"


def test_the_registry_client_says_no_in_one_line(tmp_path):
    """A real pip call for a package that no registry has."""
    missing = bu.Source("x.whl", "0" * 64, package="binllm-no-such-package==0.0.1")
    with pytest.raises(OSError, match="binllm-no-such-package==0.0.1: ERROR") as caught:
        bu.fetch(missing, cache=tmp_path)
    assert "\n" not in str(caught.value)


def test_an_unknown_profile_is_named(monkeypatch):
    monkeypatch.setenv("BINLLM_PROFILE", "huge")
    with pytest.raises(ValueError, match="'huge'; choose one of smoke, cpu, patient, gpu, paper"):
        bu.current_profile()


def test_a_fingerprint_follows_content(toy, tmp_path):
    same = bu.fingerprint(bu.tune, toy.train, 3)
    assert same == bu.fingerprint(bu.tune, toy.train.copy(), 3)
    changed = toy.train.copy()
    changed.loc[0, "label"] ^= 1
    assert len({same, bu.fingerprint(bu.tune, changed, 3), bu.fingerprint(bu.score, toy.train, 3)}) == 3
