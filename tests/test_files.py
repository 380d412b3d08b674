"""Files and downloads: nothing half-written, nothing unchecked, nothing lost."""

import hashlib
import urllib.error
from pathlib import Path

import pytest

import binllm_utils as bu

CONTENT = b"what the server holds"
SOURCE = bu.Source("file.zip", hashlib.sha256(CONTENT).hexdigest(), url="https://example.invalid/file.zip")
OTHER = bu.Source("file.whl", "0" * 64, package="no-such-package==1.0")


def serve(monkeypatch, content):
    """Let downloads from a URL give `content`; None means that there is no network."""

    class Downloader:
        def __init__(self, **_):
            pass

        def __call__(self, url, target, _):
            if content is None:
                raise urllib.error.URLError("Name or service not known")
            Path(target).write_bytes(content)

    monkeypatch.setattr("pooch.HTTPDownloader", Downloader)


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
    serve(monkeypatch, CONTENT)
    assert bu.fetch(SOURCE, cache=tmp_path).read_bytes() == CONTENT
    serve(monkeypatch, None)
    assert bu.fetch(SOURCE, cache=tmp_path).read_bytes() == CONTENT  # from the cache


def test_a_wrong_checksum_is_refused(tmp_path, monkeypatch):
    serve(monkeypatch, b"something else")
    with pytest.raises(OSError, match="SHA256 hash of downloaded file .*does not match"):
        bu.fetch(SOURCE, cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_truncated_file_is_fetched_again(tmp_path, monkeypatch):
    (tmp_path / SOURCE.file).write_bytes(CONTENT[:5])
    serve(monkeypatch, CONTENT)
    assert bu.fetch(SOURCE, cache=tmp_path).read_bytes() == CONTENT


def test_a_truncated_file_without_network_is_named_and_kept(tmp_path, monkeypatch):
    (tmp_path / SOURCE.file).write_bytes(CONTENT[:5])
    serve(monkeypatch, None)
    with pytest.raises(OSError, match=r"file\.zip is there but damaged"):
        bu.fetch(SOURCE, cache=tmp_path)
    assert (tmp_path / SOURCE.file).read_bytes() == CONTENT[:5]


def test_no_network_and_no_cache_names_every_source(tmp_path, monkeypatch):
    serve(monkeypatch, None)
    with pytest.raises(OSError, match=r"file\.zip: .*nor no-such-package==1\.0: .*Go online .* or put file\.zip into"):
        bu.fetch(SOURCE, OTHER, cache=tmp_path)


def test_the_second_source_serves_when_the_first_cannot(tmp_path, monkeypatch):
    second = bu.Source("second.whl", SOURCE.sha256, package="some==1")
    serve(monkeypatch, None)
    monkeypatch.setattr(bu.Source, "__call__", lambda self, url, target, _: Path(target).write_bytes(CONTENT))
    assert bu.fetch(SOURCE, second, cache=tmp_path) == tmp_path / "second.whl"


def test_the_registry_client_says_no_in_one_line(tmp_path):
    """A real pip call for a package that no registry has."""
    missing = bu.Source("x.whl", "0" * 64, package="binllm-no-such-package==0.0.1")
    with pytest.raises(OSError, match="binllm-no-such-package==0.0.1: ERROR") as caught:
        bu.fetch(missing, cache=tmp_path)
    assert "\n" not in str(caught.value)


def test_an_unknown_profile_is_named(monkeypatch):
    monkeypatch.setenv("BINLLM_PROFILE", "huge")
    with pytest.raises(ValueError, match="'huge'; choose one of smoke, cpu, patient, full, large, paper"):
        bu.current_profile()


def test_the_llm_of_the_environment_wins_over_a_profiles(monkeypatch):
    monkeypatch.setenv("BINLLM_PROFILE", "large")
    assert bu.current_profile().llm == "HuggingFaceTB/SmolLM2-1.7B-Instruct"
    monkeypatch.setenv("BINLLM_LLM", "")  # as good as not set
    assert bu.current_profile().llm == "HuggingFaceTB/SmolLM2-1.7B-Instruct"
    monkeypatch.setenv("BINLLM_LLM", "mine")
    assert bu.current_profile().llm == "mine"


def test_the_papers_profile_takes_the_papers_lora():
    assert bu.PROFILES["paper"].lora == "paper" and bu.LORA["paper"]["target_modules"] == ["q_proj", "v_proj"]
    assert (bu.LORA["paper"]["r"], bu.LORA["paper"]["lora_alpha"], bu.LORA["paper"]["lora_dropout"]) == (8, 16, 0.05)


def test_a_digest_follows_content(toy):
    same = bu.digest(toy.train, 3, {"a": 1})
    assert same == bu.digest(toy.train.copy(), 3, {"a": 1})
    changed = toy.train.copy()
    changed.loc[0, "label"] ^= 1
    assert len({same, bu.digest(changed, 3, {"a": 1}), bu.digest(toy.train, 4, {"a": 1})}) == 3


def test_a_file_never_takes_a_folders_place(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with (
        pytest.raises(OSError, match=r"cannot write .*mine .*the one before is kept"),
        bu.replacing(tmp_path / "mine") as part,
    ):
        part.write_text("codes")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_what_the_block_reads_is_not_told_as_a_full_disk(tmp_path):
    """A source that is not there, or a hub that does not answer, is its own error; the disk's errors name the path."""

    def fails_with(error):
        with bu.replacing(tmp_path / "kept.txt") as part:
            part.write_text("half")
            raise error

    (tmp_path / "elsewhere").mkdir()
    missing = FileNotFoundError(2, "No such file or directory", str(tmp_path.parent / "source.csv"))
    for error in (missing, OSError("the hub does not answer")):
        with pytest.raises(OSError, match="source.csv|the hub") as told:
            fails_with(error)
        assert told.value is error
    for error in (OSError(28, "No space left on device"), PermissionError(13, "Permission denied", str(tmp_path))):
        with pytest.raises(OSError, match=r"cannot write .*kept.txt .*make room"):
            fails_with(error)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere"]
