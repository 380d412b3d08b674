"""Records: rows replace what they repeat, foreign files are kept, and the README says what the records say."""

import subprocess

import numpy as np
import pandas as pd
import pytest
import readme
import records
import run

import binllm_utils as bu

ROW = {"dataset": "toy", "split": "test", "rows": 10, "model": "codes", "variant": "ste", "bits": 32, "seed": 0}
NUMBERS = {"auc": 0.7, "auc_lo": 0.6, "auc_hi": 0.8, "uauc": 0.6, "uauc_lo": 0.5, "uauc_hi": 0.7, "users": 5}


@pytest.fixture
def smoke(tmp_path, monkeypatch):
    monkeypatch.setattr(bu, "OUTPUT", tmp_path)
    return bu.PROFILES["smoke"], tmp_path / "results/metrics.csv"


def put(path, row):
    records.put_row(path, {column: row.get(column) for column in records.METRIC_COLUMNS}, records.METRIC_COLUMNS[:9])


def test_a_row_replaces_only_the_one_it_repeats(smoke):
    profile, path = smoke
    for change in ({}, {"seed": 1}, {"format": "dotted"}, {"auc": 0.75}):
        put(path, ROW | NUMBERS | change)
    table = pd.read_csv(path)
    assert list(table.columns) == records.METRIC_COLUMNS
    assert len(table) == 3  # the last one repeats the first
    assert table.auc.tolist() == [0.7, 0.7, 0.75] and table.seed.tolist() == [1, 0, 0]
    assert table.hardware.notna().all() and table.versions.str.contains("torch 2.13.0").all()


def test_a_file_of_another_schema_is_kept(smoke):
    profile, path = smoke
    path.parent.mkdir(parents=True)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"metrics\.csv: its columns are not those of this version"):
        put(path, ROW | NUMBERS)
    assert path.read_text() == "a,b\n1,2\n"


def test_a_result_is_recorded_with_its_numbers(smoke, toy):
    profile, path = smoke
    scores = bu.popularity_baseline(toy, toy.test)
    records.record(profile, toy.test, scores, dataset="toy", split="test", model="popularity")
    (row,) = pd.read_csv(path).itertuples()
    assert (row.rows, row.profile, row.auc) == (100, "smoke", round(bu.auc(toy.test.label, scores), 4))


def test_the_smoke_profile_never_writes_into_the_repository():
    assert records.results_folder(bu.PROFILES["smoke"]).is_relative_to(bu.OUTPUT)
    assert records.results_folder(bu.PROFILES["cpu"]) == bu.ROOT / "data" / "results"


def test_the_committed_records_have_the_agreed_columns():
    table = pd.read_csv(bu.ROOT / "data/results/metrics.csv")
    assert list(table.columns) == records.METRIC_COLUMNS
    assert not table.duplicated(records.METRIC_COLUMNS[:9]).any()
    assert (table.profile != "smoke").all()
    assert ((table.auc_lo <= table.auc) & (table.auc <= table.auc_hi)).all()


def test_the_tables_are_made_from_the_records():
    for text, path in zip(readme.rendered(), (bu.ROOT / "README.md", bu.ROOT / "docs" / "RESULTS.md")):
        assert text == path.read_text(encoding="utf-8"), "run python scripts/readme.py"


def test_the_readme_is_short_and_its_table_too():
    text = (bu.ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("<!-- metrics -->")[1].split("<!-- end of metrics -->")[0]
    assert (
        len([word for word in text.split() if any(map(str.isalnum, word))]) < 1200
        and 3 < table.count("\n") - 2 <= 2 + readme.README_ROWS
    )


def test_what_the_readme_says_in_a_sentence_is_in_the_records():
    """ "32 bits alone … rank as well as the paper prints for its whole system": each of five seeds, both measures."""
    metrics = pd.read_csv(bu.ROOT / "data/results/metrics.csv")
    ours = metrics[(metrics.variant == "ste") & (metrics.bits == 32) & (metrics.dataset == "ml-1m")]
    printed = pd.read_csv(bu.ROOT / "data/published.csv").query("source == 'paper' and run == 'two_step'")
    assert len(ours) == 5 and len(printed)
    assert ours.auc.min() >= printed.auc.min() and ours.uauc.min() >= printed.uauc.min()
    text = (bu.ROOT / "README.md").read_text(encoding="utf-8")
    assert "rank as well as the paper prints" in text
    bare = metrics[(metrics.variant == "ste, no features") & (metrics.rows == 7331)]
    below = pd.read_csv(bu.ROOT / "data/published.csv").query("source == 'paper' and run == 'codes alone'")
    assert len(bare) == 5 and "from ratings alone they rank between its codes and that" in text
    for measure in ("auc", "uauc"):
        assert below[measure].item() < bare[measure].mean() < printed[measure].min()
    past = metrics[(metrics.dataset == "ml-1m-past") & (metrics.split == "test")]
    told = (past.model == "popularity") | (past.variant == "bit lessons")
    coded = past[["variant", "bits"]].apply(tuple, axis=1).isin([("past", 64), ("descent", 128)])
    past = past[told | coded].assign(way=lambda rows: rows.model.where(rows.variant != "descent", "descent"))
    means = past.groupby("way")[["auc", "uauc"]].mean().map(lambda value: f"{value:.3f}".lstrip("0"))
    said = ["/".join(means.loc[way]) for way in ("popularity", "codes", "descent", "llm")]
    assert "counting {}, 64 bits alone {} (128 by descent {}), 32 bits read by that last LLM {}".format(*said) in text


def test_what_the_readme_says_of_all_ratings_is_in_the_records():
    """Tuned on all ratings, each variant that reads codes is about a hundredth at most from them and from the paper."""
    metrics = pd.read_csv(bu.ROOT / "data/results/metrics.csv").query("split == 'test' and dataset == 'ml-1m'")
    read = metrics[(metrics.profile == "full") & metrics.variant.isin(["codes_only", "one_step", "two_step"])]
    codes = metrics[(metrics.variant == "ste") & (metrics.bits == 32)].set_index("seed").loc[read.seed]
    printed = pd.read_csv(bu.ROOT / "data/published.csv").query("source == 'paper' and run == 'two_step'")
    assert len(read) == 7
    for measure in ("auc", "uauc"):
        assert np.abs(read[measure].to_numpy() - codes[measure].to_numpy()).max() < 0.0125
        assert (read[measure] > printed[measure].max() - 0.0085).all()
    drawn = read[read.variant == "codes_only"][["auc", "uauc"]].mean().map(lambda value: f"{value:.3f}".lstrip("0"))
    few = metrics[(metrics.profile == "patient") & metrics.variant.isin(read.variant)]
    assert len(few) == 5 and few.auc.max() < 0.7
    text = (bu.ROOT / "README.md").read_text(encoding="utf-8")
    assert (
        "within about a hundredth of its codes, so to that level too, though *one step* compares them only in part"
        in text
    )
    assert f"three draws: {'/'.join(drawn)}" in text
    asked = pd.read_parquet(bu.ROOT / "data/results/controls.parquet")
    liked = bu.load_ml1m().test.label[asked.index]
    turned = {name: bu.auc(liked, asked[f"{name}: every bit turned over"]) for name in ("all ratings", "bit lessons")}
    assert turned["all ratings"] < 0.5 - 0.1 and turned["bit lessons"] > 0.7


def test_what_the_readme_says_of_titles_is_in_the_records():
    """By titles alone as the paper's 7B; beside codes nothing that valid can see."""
    text = (bu.ROOT / "README.md").read_text(encoding="utf-8")
    metrics = pd.read_csv(bu.ROOT / "data/results/metrics.csv")
    (ours,) = metrics[(metrics.variant == "title lessons") & (metrics.rows == 7331)].to_dict("records")
    (printed,) = (
        pd.read_csv(bu.ROOT / "data/published.csv").query("source == 'paper' and run == 'text'").to_dict("records")
    )
    said = ["/".join(f"{row[m]:.3f}".lstrip("0") for m in ("auc", "uauc")) for row in (ours, printed)]
    assert f"{said[0]} to {said[1]}" in text and ours["auc"] >= printed["auc"] and ours["uauc"] >= printed["uauc"]
    cold = pd.read_csv(bu.ROOT / "data/results/cold.csv")
    ties = cold[(cold.split == "valid") & (cold.films == "all") & (cold.method == "codes, ties by LLM")]
    assert len(ties) == 3 and "beside codes it adds nothing that validation months show" in text
    assert (ties.auc_more_lo < 0).all() and (ties.uauc_more_lo < 0).all()


def test_what_the_readme_says_of_the_drills_is_in_the_records():
    drills = pd.read_csv(bu.ROOT / "data/results/drills.csv")
    assert (drills.tried == drills.survived + drills.lost).all() and drills.tried.sum() > 100_000
    said = (
        f"{drills.tried.sum():,} odd inputs and faults, {'none' if drills.lost.sum() == 0 else drills.lost.sum()} lost"
    )
    assert said in (bu.ROOT / "README.md").read_text(encoding="utf-8")


def test_memory_stays_flat_over_a_hundred_thousand_prompts():
    """What benchmarks/soak.py recorded: after the first twenty thousand, memory grows by less than a tenth."""
    soak = pd.read_csv(bu.ROOT / "data/results/soak_prompts.csv")
    assert soak.prompts.max() == 100_000 and soak.resident_mb.iloc[3:].max() < 1.1 * soak.resident_mb.iloc[3]


def test_make_run_three_times_gives_the_same_and_grows_nothing():
    """What benchmarks/soak.py recorded."""
    runs = pd.read_csv(bu.ROOT / "data/results/soak_runs.csv")
    assert len(runs) == 3 and runs.cells.min() > 50 and not runs.cells_that_differ.any()
    assert not runs.tracked_files_changed.any() and runs.cache_mb.max() <= 1.01 * runs.cache_mb.min()


def test_making_notebooks_changes_no_tracked_file(tmp_path, monkeypatch):
    """The whole of `make run`, on a copy of the repository with one short notebook."""
    nbformat = pytest.importorskip("nbformat")
    root = tmp_path / "copy"
    (root / "notebooks").mkdir(parents=True)
    cells = [nbformat.v4.new_code_cell("print(6 * 7)")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), root / "notebooks/00_short.ipynb")
    (root / ".gitignore").write_text("executed/\n")
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", root, *command], check=True)
    monkeypatch.setattr(run, "ROOT", root)
    monkeypatch.setattr(bu, "OUTPUT", root / "executed")
    monkeypatch.setattr(bu, "load_llm", lambda *_, **__: None)
    run.main([], release=False)
    done = nbformat.read(root / "executed/notebooks/00_short.ipynb", as_version=4)
    assert done.cells[0].outputs[0].text == "42\n"
    status = subprocess.run(["git", "-C", root, "status", "--porcelain"], capture_output=True, text=True, check=True)
    assert status.stdout == ""


def test_a_table_holds_what_the_record_says():
    row = ROW | NUMBERS | {"profile": "cpu", "hardware": "a box", "format": ""}
    rows = [row, row | {"seed": 1, "auc": 0.8, "auc_lo": 0.7, "uauc": 0.5}, row | {"bits": 64, "seconds": 3.0}]
    table = pd.DataFrame([{column: row.get(column) for column in records.METRIC_COLUMNS} for row in rows])
    lines = [line for line in readme.results_table(table).splitlines() if "codes alone" in line]
    two, one = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert two[0].endswith("32 bits") and one[0].endswith("64 bits")
    assert two[1:4] == ["2", "0.7500 ± 0.0707 [0.650, 0.800]", "0.5500 ± 0.0707 [0.500, 0.700]"]
    assert one[1:5] == ["1", "0.7000 [0.600, 0.800]", "0.6000 [0.500, 0.700]", "3 s"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, r"line 3: the same result is there twice"),
        ({"seed": ""}, r"line 3: a codes without its seed"),
    ],
)
def test_records_that_fit_no_table_are_named(smoke, change, message):
    profile, path = smoke
    put(path, ROW | NUMBERS)
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    pd.concat([table, table.assign(**change)]).to_csv(path, index=False)
    with pytest.raises(ValueError, match=rf"metrics\.csv, {message}"):
        readme.read_metrics(path)


def test_a_failing_notebook_stays_as_it_was(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setattr(bu, "OUTPUT", tmp_path / "executed")
    path = tmp_path / "99_fails.ipynb"
    cells = [nbformat.v4.new_code_cell("x = 1"), nbformat.v4.new_code_cell("raise ValueError('on purpose')")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    before = path.read_bytes()
    with pytest.raises(SystemExit, match=r"99_fails\.ipynb failed; see"):
        run.execute(path, tmp_path / "copy.ipynb")
    assert path.read_bytes() == before and not (tmp_path / "copy.ipynb").exists()
    failed = nbformat.read(tmp_path / "executed/failed/99_fails.ipynb", as_version=4)
    assert failed.cells[0].execution_count == 1 and failed.cells[1].outputs[0].ename == "ValueError"


def test_running_saves_outputs_without_dead_progress_bars(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    path = tmp_path / "98_runs.ipynb"
    source = "from tqdm.auto import tqdm\nimport ipywidgets\nfor _ in tqdm(range(3)): pass\nipywidgets.IntSlider()"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), path)
    before = path.read_bytes()
    minutes, peak_gb = run.execute(path, tmp_path / "copy.ipynb")
    saved = nbformat.read(tmp_path / "copy.ipynb", as_version=4)
    assert path.read_bytes() == before
    assert minutes > 0 and peak_gb > 0.03
    assert "widgets" not in saved.metadata and saved.cells[0].execution_count == 1
    assert [o.data["text/plain"] for o in saved.cells[0].outputs] == ["(interactive: run this notebook to use it)"]


@pytest.mark.parametrize("answer", [-1e-39, np.float32(1) + np.finfo(np.float32).eps, -0.1, np.inf])
def test_an_answer_that_is_hardly_no_probability_is_none_all_the_same(tmp_path, toy, answer):
    """One half subtracted in float32 would round the first of them to a probability."""
    table = pd.DataFrame({"a": np.array([0, 1, answer], np.float32)}, index=pd.RangeIndex(3, name="row"))
    table.to_parquet(tmp_path / "answers.parquet")
    with pytest.raises(ValueError, match="row 2 holds an answer not from 0 to 1"):
        records.read_answers(tmp_path / "answers.parquet", toy)
