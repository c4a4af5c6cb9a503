"""Data sets: what they hold, that no label leaks, and a clear sentence where one cannot be had."""

import gzip
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy import datasets
from deploy.datasets import criteo, movielens, ratings
from ps.errors import ConfigError


def slow_history(events: list[tuple[int, int, bool, int]], visible: list[bool], row: int, liked: bool) -> list[int]:
    """Straight from the definition: earlier, visible, of this user, of this kind; by time, then as they stand."""
    user, _, _, time = events[row]
    before = [
        (t, i, item)
        for i, (u, item, label, t) in enumerate(events)
        if u == user and t < time and visible[i] and label == liked
    ]
    return [item for _, _, item in sorted(before)][-ratings.HISTORY_MAX :]


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(1, 2), st.integers(0, 99), st.booleans(), st.integers(0, 12), st.booleans()), max_size=60
    )
)
def test_history_is_strictly_earlier_and_blind_to_held_out_rows(rows: list[tuple]) -> None:
    events, visible = [row[:4] for row in rows], [row[4] for row in rows]
    users, items, labels, times = (
        np.array([e[i] for e in events], kind) for i, kind in enumerate((np.int64, np.int64, np.float32, np.int64))
    )
    columns = ratings.history(ratings.Ratings(users, items, labels, times), np.array(visible, np.bool_))
    for kind, liked in (("liked", True), ("disliked", False)):
        column = columns[kind]
        for row in range(len(rows)):
            found = column.values[column.offsets[row] : column.offsets[row + 1]].tolist()
            assert found == slow_history(events, visible, row, liked)


def test_a_held_out_label_changes_no_column() -> None:
    """Flip every held-out label: columns, so features, stay as they are."""
    rng = np.random.default_rng(0)
    n = 400
    base = ratings.Ratings(
        rng.integers(0, 5, n), rng.integers(0, 50, n), rng.integers(0, 2, n).astype(np.float32), rng.integers(0, 90, n)
    )
    heldout = datasets.random_split(n)
    flipped = ratings.Ratings(base.users, base.items, np.where(heldout, 1 - base.labels, base.labels), base.times)
    for kind, column in ratings.history(base, ~heldout).items():
        other = ratings.history(flipped, ~heldout)[kind]
        np.testing.assert_array_equal(column.values, other.values)
        np.testing.assert_array_equal(column.offsets, other.offsets)
        assert len(column.values) > 0


def check(dataset: datasets.Dataset) -> None:
    """What holds of every data set: its columns fit its features.toml, both labels, a fifth held out."""
    rows = len(dataset.labels)
    assert set(np.unique(dataset.labels)) == {0.0, 1.0}
    assert dataset.heldout.sum() == int(rows * datasets.HELDOUT_SHARE)
    assert all(column.rows == rows for column in dataset.columns.values())
    columns, labels = dataset.split(heldout=True)
    prepared = dataset.features.prepare(columns)
    assert prepared.rows == len(labels) == dataset.heldout.sum()
    assert prepared.dense.shape[1] == dataset.features.dense_width


def test_synthetic_is_the_same_every_time() -> None:
    once, again = datasets.load("synthetic"), datasets.load("synthetic")
    check(once)
    np.testing.assert_array_equal(once.labels, again.labels)
    assert once.columns["tags"].values.to_list() == again.columns["tags"].values.to_list()


def test_movielens_small(shared_data: Path) -> None:
    dataset = datasets.load(f"movielens-small:{shared_data / 'ml-latest-small'}")
    check(dataset)
    assert len(dataset.labels) + dataset.skipped == 100_836
    assert dataset.skipped <= 1  # copies differ: one in circulation has a damaged line
    assert b"Adventure" in dataset.columns["genres"].values.to_list()[0]


def test_movielens_small_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ratings\.csv cannot be read"):
        datasets.load(f"movielens-small:{tmp_path}")
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,2,4.0\n")
    with pytest.raises(ConfigError, match="line 2 has 3 cells; it must have 4"):
        datasets.load(f"movielens-small:{tmp_path}")


def test_a_damaged_rating_is_left_out_and_counted_but_not_many() -> None:
    good = [["1", str(i), "4.0", str(i)] for i in range(2000)]
    damaged = ["5", "39", "3.0", "84743496 https://example.org1"]
    found = ratings.Ratings.of([*good[:7], damaged, *good[7:]], "here")
    assert (len(found.labels), found.skipped) == (2000, 1)
    assert found.times.tolist() == list(range(2000))
    with pytest.raises(ConfigError, match=r"here has 3 malformed ratings of 2003, the first '5,39,3.0,84743496"):
        ratings.Ratings.of([*good, *[damaged] * 3], "here")
    with pytest.raises(ConfigError, match="here has 0 malformed ratings of 0"):
        ratings.Ratings.of([], "here")


def criteo_lines(n: int) -> list[str]:
    rng = np.random.default_rng(1)
    rows = []
    for i in range(n):
        numbers = ["" if rng.random() < 0.3 else str(rng.integers(-2, 900)) for _ in range(criteo.NUMBERS)]
        strings = ["" if rng.random() < 0.1 else f"{rng.integers(0, 99):08x}" for _ in range(criteo.STRINGS)]
        rows.append("\t".join([str(i % 2), *numbers, *strings]))
    return rows


@pytest.mark.parametrize("packed", [False, True])
def test_criteo_rows_plain_or_packed(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / ("day.tsv.gz" if packed else "day.tsv")
    text = "\n".join(criteo_lines(50)) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    dataset = datasets.load(f"criteo:{path}")
    check(dataset)
    first = text.split("\n")[0].split("\t")
    assert dataset.columns["C1"].values.to_list()[0] == first[14].encode()
    value = dataset.columns["I1"].values[0]
    assert np.isnan(value) if first[1] == "" else value == float(first[1])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1\t2", "line 3 is no Criteo row"),
        ("2" + "\t" * 39, "line 3 is no Criteo row"),
        ("1\tx" + "\t" * 38, "I1 holds no"),
    ],
)
def test_criteo_names_the_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.tsv"
    path.write_text("\n".join([*criteo_lines(2), line]))
    with pytest.raises(ConfigError, match=message):
        datasets.load(f"criteo:{path}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("movielens-1b", "'movielens-1b' is unknown; there is movielens, movielens-small, criteo, synthetic"),
        ("criteo", "needs path: give criteo:PATH"),
        ("synthetic:here", "takes no path: give synthetic"),
        ("criteo:/does/not/exist", "cannot be read"),
    ],
)
def test_sources_that_are_none(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        datasets.load(source)


def wheel(folder: Path, member: str, text: bytes) -> Path:
    path = folder / "recbole-1.2.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, text)
    return path


def test_movielens_that_cannot_be_fetched_is_said_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert command[-1] == movielens.PACKAGE
        assert "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no matching distribution\n")

    monkeypatch.setattr(movielens.subprocess, "run", offline)
    with pytest.raises(ConfigError, match="no matching distribution; --data synthetic needs no network") as caught:
        datasets.load("movielens", tmp_path)
    assert "\n" not in str(caught.value)


def test_movielens_of_another_checksum_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        scratch = Path(command[command.index("--dest") + 1])
        path = wheel(scratch, f"{movielens.FOLDER}/ml-100k.inter", b"tampered")
        with zipfile.ZipFile(path, "a") as archive:
            for name in ("ml-100k.item", "ml-100k.user"):
                archive.writestr(f"{movielens.FOLDER}/{name}", b"tampered")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(movielens.subprocess, "run", serve)
    with pytest.raises(ConfigError, match=r"ml-100k\.inter of recbole==1\.2\.1 has another checksum"):
        datasets.load("movielens", tmp_path)
    monkeypatch.setattr(
        movielens.subprocess,
        "run",
        lambda command, **options: (
            wheel(Path(command[command.index("--dest") + 1]), "other", b""),
            subprocess.CompletedProcess(command, 0, "", ""),
        )[1],
    )
    with pytest.raises(ConfigError, match="does not hold MovieLens-100k"):
        datasets.load("movielens", tmp_path)


def test_movielens_fetched_or_skipped_with_its_reason(tmp_path_factory: pytest.TempPathFactory) -> None:
    try:
        dataset = datasets.load("movielens")
    except ConfigError as error:
        pytest.skip(str(error))
    check(dataset)
    assert len(dataset.labels) == 100_000
    assert round(float(dataset.labels.mean()), 3) == 0.554
    assert datasets.load("movielens").labels.sum() == dataset.labels.sum()  # now from the cache
