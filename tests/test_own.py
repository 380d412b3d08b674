"""Files of one's own: whatever people have is read, or one sentence names file and line; every repair is counted."""

import json
import tracemalloc
import warnings
from contextlib import suppress

import numpy as np
import pandas as pd
import pytest
from conftest import case, make_rows
from hypothesis import given
from hypothesis import strategies as st
from test_drill import cases, spoiled

import binllm_own as bo
import binllm_utils as bu

HEADER = "user,item,rating,timestamp,title\n"
LINES = ["7,30,5,978300760,Film A", "7,4,3,978302109,Film B", "12,30,4,978301968,Film A", "12,5,1,978300275,Film C"]
TEXT = HEADER + "\n".join(LINES) + "\n"


def write(tmp_path, content, name="ratings.csv", encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


def rows_of(read):
    """(user as written, item as written, value, time) of each row, sorted."""
    r = read.rows
    return sorted((read.users[u], read.items[i], float(v), int(t)) for u, i, v, t in r.itertuples(index=False))


WANTED = [
    ("12", "30", 4.0, 978301968),
    ("12", "5", 1.0, 978300275),
    ("7", "30", 5.0, 978300760),
    ("7", "4", 3.0, 978302109),
]


@pytest.mark.parametrize("separator", [",", "\t", ";", "|", "::"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_any_separator_and_line_end(tmp_path, separator, ending):
    read = bo.read_interactions(write(tmp_path, TEXT.replace(",", separator).replace("\n", ending), "r.txt"))
    assert rows_of(read) == WANTED
    assert (
        read.users == ["7", "12"] and read.items == ["4", "5", "30"] and read.titles == ["Film B", "Film C", "Film A"]
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_any_encoding(tmp_path, encoding):
    read = bo.read_interactions(write(tmp_path, TEXT.replace("Film A", "Amélie"), encoding=encoding))
    assert rows_of(read) == WANTED and "Amélie" in read.titles
    assert ("not UTF-8, all of it read as Windows-1252" in read.report) == (encoding == "cp1252")


def test_parquet_and_json_lines_give_the_same(tmp_path):
    table = pd.read_csv(write(tmp_path, TEXT))
    table.to_parquet(tmp_path / "r.parquet")
    table.to_json(tmp_path / "r.jsonl", orient="records", lines=True)
    table.assign(timestamp=pd.to_datetime(table.timestamp, unit="s")).to_parquet(tmp_path / "dates.parquet")
    for name in ("r.parquet", "r.jsonl", "dates.parquet"):
        assert rows_of(bo.read_interactions(tmp_path / name)) == WANTED, name


@pytest.mark.parametrize(
    ("header", "line", "name"),
    [
        ("userId,movieId,rating,timestamp", "1,2,4.0,964982703", "MovieLens"),
        ("user_id:token\titem_id:token\trating:float\ttimestamp:float", "1\t2\t4\t964982703", "RecBole"),
        ('"User-ID";"ISBN";"Book-Rating"', '"1";"2";"4"', "Book-Crossing"),
        ("reviewerID,asin,overall,unixReviewTime", "1,2,4.0,964982703", "Amazon 2018"),
        ("rating,title,asin,parent_asin,user_id,timestamp", "4.0,good,9,2,1,964982703000", "Amazon 2023"),
        ("1,2,4,964982703", "1,2,4,964982703", "without a header"),
    ],
)
def test_exports_that_people_have_are_recognised(tmp_path, header, line, name):
    path = write(tmp_path, f"{header}\n{line}\n", "x.csv")
    columns = {"item": "parent_asin"} if name == "Amazon 2023" else None
    read = bo.read_interactions(path, columns)
    time = bo.NO_TIME if name == "Book-Crossing" or len(read.rows) == 1 else 964982703
    assert rows_of(read) == [("1", "2", 4.0, time)]


def test_json_lines_have_the_columns_of_all_their_first_records(tmp_path):
    records = [{"item": "9", "rating": 1, "note": "a\u2028b" + "x" * 300_000}]
    records += [{"user": f"u{n % 3}", "item": str(n), "rating": n % 2, "timestamp": 10 * n} for n in range(1, 21)]
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    read = bo.read_interactions(write(tmp_path, lines, "r.jsonl"))
    assert read.users == ["u0", "u1", "u2"] and len(read.rows) == 20 and read.rows.time.is_monotonic_increasing
    assert read.report["rows without user, item or rating, left out"] == 1


def test_a_column_that_may_be_the_user_is_asked_about(tmp_path):
    path = write(tmp_path, "visitorid,itemid,rating,timestamp\n1,2,5,10\n2,3,1,20\n")
    with pytest.raises(ValueError, match="no column of users; if it is among 'visitorid'"):
        bo.read_interactions(path)
    assert bo.read_interactions(path, columns={"user": "visitorid"}).users == ["1", "2"]


def test_large_ids_in_a_column_of_decimals_are_refused(tmp_path):
    table = pd.DataFrame({"user": [1234567890123456, 1234567890123457, None], "item": [1.0, 2.0, 3.0], "rating": 5})
    table.to_parquet(tmp_path / "r.parquet")
    read = bo.read_interactions(tmp_path / "r.parquet")
    assert read.users == ["1234567890123456", "1234567890123457"] and read.items == ["1", "2"]
    table.assign(user=table.user * 100).to_parquet(tmp_path / "r.parquet")
    with pytest.raises(ValueError, match="line 1: the user 123456789012345600 stands in a column of decimals"):
        bo.read_interactions(tmp_path / "r.parquet")
    table.assign(item=np.float32([1, 2, 2**24])).to_parquet(tmp_path / "r.parquet")
    with pytest.raises(ValueError, match="line 3: the item 16777216 stands"):
        bo.read_interactions(tmp_path / "r.parquet")


def test_blanks_around_ids_and_marks_in_titles_are_counted(tmp_path):
    text = "user,item,rating,title\nu1,1,5,AT&amp;T\n u1,2,1,B\nu1 ,3,4,C\n"
    report = bo.read_interactions(write(tmp_path, text)).report
    assert report["users"] == 1 and report["ids with blanks around them, cut"] == 2
    assert report["titles with marks such as &amp; or <i>, cleaned"] == 1


@pytest.mark.parametrize("form", ["Mon {}", "10:00 {}", "{} 10:00:00", "{}T10:00"])
@pytest.mark.parametrize("separator", "/-. ")
def test_days_and_months_are_never_mixed(tmp_path, form, separator):
    def read(*dates):
        dates = [form.format(separator.join(date.split())) for date in dates]
        lines = [f"{n},{n},5,{date}" for n, date in enumerate(dates)]
        return bo.read_interactions(write(tmp_path, "user,item,rating,date\n" + "\n".join(lines) + "\n"))

    times = pd.to_datetime(read("13 04 2020", "03 04 2020", "14 04 2020").rows.time, unit="s")
    assert times.dt.day.tolist() == [3, 13, 14] and (times.dt.month == 4).all()
    with pytest.raises(ValueError, match="may begin with the day or with the month"):
        read("03 04 2020", "05 06 2020")
    with pytest.raises(ValueError, match="say dayfirst"):
        read("13 04 2020", "04 14 2020")


def test_a_date_that_begins_with_the_year_says_its_order(tmp_path):
    for date in ("2020-01-02 03:04:05", "2020-01-02T03:04:05.678", "2020 01 02 10:30", "2020-01-02 10:00+02:00"):
        read = bo.read_interactions(write(tmp_path, f"user,item,rating,date\n1,1,5,{date}\n2,1,5,2021-05-06\n"))
        assert pd.to_datetime(read.rows.time.min(), unit="s").date().isoformat() == "2020-01-02", date


def test_days_count_before_times_of_day_and_small_numbers_are_told(tmp_path):
    text = "user,item,rating,date,time\n1,1,5,2001-05-06,10:30\n2,2,1,2009-01-02,09:15\n"
    read = bo.read_interactions(write(tmp_path, text))
    assert pd.to_datetime(read.rows.time, unit="s").dt.year.tolist() == [2001, 2009]
    for times, told in (((43831, 43900), True), ((2019, 2020), True), ((964982703, 964982803), False)):
        read = bo.read_interactions(write(tmp_path, "user,item,rating,time\n1,1,5,{}\n2,2,1,{}\n".format(*times)))
        assert ("times are small" in read.report) == told


def test_ids_that_a_program_wrote_for_none_are_nobody(tmp_path):
    ids = ("NA", "N/A", "#N/A", "NULL", "Nathan")
    read = bo.read_interactions(write(tmp_path, "user,item,rating\n" + "".join(f"{name},1,5\n" for name in ids)))
    assert read.users == ["Nathan"] and read.report["ids such as NULL or nan, taken as missing"] == 4


def test_parquet_texts_may_be_bytes_and_other_kinds_are_refused(tmp_path):
    table = {
        "user": [b"u1", "Jos\u00e9".encode()],
        "item": ["a", "b"],
        "rating": [5, 1],
        "title": [b"Am\xc3\xa9lie", b"B"],
    }
    path = tmp_path / "r.parquet"
    pd.DataFrame(table).to_parquet(path)
    read = bo.read_interactions(path)
    assert read.users == ["Jos\u00e9", "u1"] and read.titles == ["Am\u00e9lie", "B"]
    for column, values, said in (
        ("user", [[1], [2]], "column 'user' holds list<"),
        ("time", pd.to_datetime(["2020-01-01 10:30", "2020-01-02 11:00"]).time, "column 'time' holds time64"),
    ):
        pd.DataFrame(table | {column: values}).to_parquet(path)
        with pytest.raises(ValueError, match=f"r.parquet: a Parquet file that cannot be read .{said}"):
            bo.read_interactions(path)
    pd.DataFrame(table).head(0).to_parquet(path)
    with pytest.raises(ValueError, match=r"r\.parquet: no row has a user"):
        bo.read_interactions(path)


def test_lists_of_ratings_whose_items_stand_first(tmp_path):
    amazon = "0001713353,A1C6M8LCIX4M6M,5.0,1123804800\nB00006HAXW,A1RSDE90N6RSZF,1.0,1123804900\n"
    read = bo.read_interactions(write(tmp_path, amazon))
    assert read.users == ["A1C6M8LCIX4M6M", "A1RSDE90N6RSZF"] and read.items == ["0001713353", "B00006HAXW"]
    assert read.report["no header, columns taken as"] == "item, user, rating, timestamp"


def test_official_files_of_titles(tmp_path):
    ratings = write(tmp_path, "1\t1\t5\t881250949\n2\t2\t1\t881250950\n", "u.data")
    rest = "|01-Jan-1995||http://x|" + "|".join("0" * 19)
    films = write(tmp_path, f"1|Toy Story (1995){rest}\n2|C\u00e9line (1992){rest}\n", "u.item", "latin-1")
    assert bo.read_interactions(ratings, titles=films).titles == ["Toy Story (1995)", "C\u00e9line (1992)"]
    ratings = write(tmp_path, '"User-ID";"ISBN";"Book-Rating"\n"1";"a";"4"\n"2";"b";"9"\n', "ratings.csv")
    books = '"ISBN";"Book-Title"\n"a";"The \\"Real; Thing\\" Again"\n"b";"B"\n'
    read = bo.read_interactions(ratings, titles=write(tmp_path, books, "books.csv"))
    assert read.titles == ['The "Real; Thing" Again', "B"]


def test_an_item_keeps_its_first_title_without_markup(tmp_path):
    text = "user,item,rating,title\n1,a,5,<i>Emma</i>\n2,a,1,Alien\n3,b,4,A &lt;b&gt;X <3\n"
    read = bo.read_interactions(write(tmp_path, text))
    assert read.titles == ["Emma", "A X <3"] and read.report["titles with marks such as &amp; or <i>, cleaned"] == 2
    assert read.report["titles other than the first of their item, left out"] == 1
    listed = write(tmp_path, "item,title\na,Emma\na,Alien\na,Emma\nb,B\n", "titles.csv")
    read = bo.read_interactions(write(tmp_path, "user,item,rating\n1,a,5\n2,b,1\n"), titles=listed)
    assert read.titles == ["Emma", "B"] and read.report["titles other than the first of their item, left out"] == 1


def test_exports_of_one_person(tmp_path):
    goodreads = "Book Id,Title,Author,My Rating,Average Rating,Date Read\n"
    goodreads += '1,"A, B",X,5,3.9,2020/01/02\n2,C,Y,0,4,2020/02/03\n3,D,Y,3,4,2021/03/04\n'
    read = bo.read_interactions(write(tmp_path, goodreads))
    assert (
        read.users == ["me"]
        and "no column of users" in read.report
        and read.titles == ["A, B", "D"]
        and read.rows.value.tolist() == [5, 3]
    )
    titles_only = bo.read_interactions(write(tmp_path, "Title,My Rating\nHeat,4\nDune,5\n"))
    assert titles_only.items == titles_only.titles == ["Dune", "Heat"]
    letterboxd = "Date,Name,Year,Letterboxd URI,Rating\n2020-01-02,Dune,2021,https://boxd.it/a,4.5\n"
    letterboxd += "2020-01-03,Heat,1995,https://boxd.it/b,0.5\n"
    read = bo.read_interactions(write(tmp_path, letterboxd))
    assert read.titles == ["Dune", "Heat"] and read.rows.value.tolist() == [4.5, 0.5]
    assert read.rows.time.diff().iloc[1] == 86_400


@pytest.mark.parametrize(
    ("header", "row", "named"),
    [
        ("person,movie,rating,date", "{},Heat,5,2020-01-0{}", "'person'"),
        ("client,product_id,stars,date", "{},7,5,2020-01-0{}", "'client'"),
        ("email,isbn,rating", "{},7,{}", "'email'"),
        ("name,movie,rating", "{},Heat,{}", "'name'"),
        ("guest_id,movie,rating", "{},Heat,{}", "'guest_id'"),
    ],
)
def test_a_column_that_may_be_the_user_is_not_passed_over(tmp_path, header, row, named):
    """Else everybody is one person, and of two ratings of a film one is dropped."""
    path = write(tmp_path, "\n".join([header, row.format("ann", 3), row.format("bob", 4)]) + "\n")
    with pytest.raises(ValueError, match=f"no column of users; if it is among {named}.*--columns role=name"):
        bo.read_interactions(path)
    read = bo.read_interactions(path, columns={"user": named.strip("'")})
    assert read.users == ["ann", "bob"] and len(read.rows) == 2 and "ann" not in read.titles


def test_users_of_six_rows_leave_one_for_valid(tmp_path):
    lines = [f"u{user},i{item},{1 + 4 * ((user + item) % 2)}" for user in range(40) for item in range(6)]
    read = bo.read_interactions(write(tmp_path, "user,item,rating\n" + "\n".join(lines) + "\n"))
    assert (read.split().valid.groupby("user").size() == 1).all()


def test_titles_named_as_the_items_are_titles_still(tmp_path):
    path = write(tmp_path, "user,title,rating\n1,Tom &amp; Jerry,5\n2,Dune,1\n")
    for columns in (None, {"item": "title"}, {"title": "title"}):
        read = bo.read_interactions(path, columns=columns)
        assert read.titles == ["Dune", "Tom & Jerry"] and "items without a title, shown by their id" not in read.report


def test_a_wrong_unit_names_its_line_wherever_a_part_of_the_file_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(bo, "CHUNK", 4)
    for early, late in ((8, 1), (4, 4)):  # within a part, and from one part to the next
        times = [1577836800000] * early + [1577836800] * late
        lines = [f"u{place},i,{1 + place % 2},{time}" for place, time in enumerate(times)]
        if early == late:
            lines += lines[:1]  # the others' unit is that of most rows
        with pytest.raises(ValueError, match=f"ratings.csv, line {early + 2}: time 1577836800 is not in the unit"):
            bo.read_interactions(write(tmp_path, "user,item,rating,time\n" + "\n".join(lines) + "\n"))
    times = [1577836800000] * 4 + [0, 0, 1577836900000]  # a last part of few good times
    lines = [f"u{place},i,{1 + place % 2},{time}" for place, time in enumerate(times)]
    assert len(bo.read_interactions(write(tmp_path, "user,item,rating,time\n" + "\n".join(lines) + "\n")).rows) == 7


@pytest.mark.parametrize("header", ["movie,rating,date", "name,rating,date"])
def test_a_file_of_items_and_ratings_is_one_persons(tmp_path, header):
    read = bo.read_interactions(write(tmp_path, f"{header}\nHeat,5,2020-01-01\nDune,1,2020-01-02\n"))
    assert read.users == ["me"] and "no column of users" in read.report and read.titles == ["Dune", "Heat"]


def test_what_counts_as_liked_is_in_the_report_and_doubted_where_hardly_anything_is(tmp_path):
    rows = make_rows(0, 400).assign(rating=lambda r: 1 + 4 * r.label)[["user", "item", "rating", "timestamp"]]
    rows.to_csv(tmp_path / "r.csv", index=False)
    read = bo.read_interactions(tmp_path / "r.csv")
    read.split()
    assert read.report["liked"] == f"4 or more: {(rows.rating == 5).mean():.1%} of the rows"
    plays = np.random.default_rng(0).integers(1, 50, len(rows))
    plays[::40] = 1000  # four fifths of which hardly anything reaches
    rows.assign(rating=plays).to_csv(tmp_path / "r.csv", index=False)
    read = bo.read_interactions(tmp_path / "r.csv")
    with suppress(ValueError):  # some part may hold none of them
        read.split()
    assert read.report["liked"] == "800 or more: 2.5% of the rows; is that meant? Else say like=, in a shell --like"


def test_a_part_without_rows_is_not_blamed_on_likes(tmp_path):
    lines = [f"u{user},i{item},{1 + 4 * (item % 2)}" for user in range(40) for item in range(5)]
    read = bo.read_interactions(write(tmp_path, "user,item,rating\n" + "\n".join(lines) + "\n"))
    with pytest.raises(ValueError, match="valid would hold no row: .*users of five rows or fewer"):
        read.split()


def test_the_columns_of_titles_are_reported(tmp_path):
    ratings = write(tmp_path, "user,item,rating\n1,3,5\n2,4,1\n")
    listed = write(tmp_path, "id,title\n3,Emma\n4,Dune\n", "films.csv")
    read = bo.read_interactions(ratings, titles=listed)
    assert read.titles == ["Emma", "Dune"] and read.report["titles from"] == "films.csv: item = id, title = title"
    listed = write(tmp_path, "id,book_id,title\n1,3,Emma\n2,4,Dune\n", "books.csv")
    assert bo.read_interactions(ratings, titles=listed).titles == ["Emma", "Dune"]


@pytest.mark.parametrize(
    ("cells", "values", "repair"),
    [
        (["4,5", "3,0", "2"], [4.5, 3, 2], "ratings with a decimal comma"),
        (["0,125", "0,5", "1"], [0.125, 0.5, 1], "ratings with a decimal comma"),
        (["★★★½", "½", "★"], [3.5, 0.5, 1], "ratings written in stars"),
        (["yes", "No", "TRUE"], [1, 0, 1], "ratings written as words"),
        (["4.5", " 3 ", "1e0"], [4.5, 3, 1], None),
    ],
)
def test_ratings_as_people_write_them(tmp_path, cells, values, repair):
    lines = "".join(f"{n};x;{cell}\n" for n, cell in enumerate(cells))
    read = bo.read_interactions(write(tmp_path, "user;item;rating\n" + lines))
    assert read.rows.value.tolist() == values
    assert repair is None or read.report[repair] > 0


@pytest.mark.parametrize(
    "stamps",
    [
        ["978300760", "978302109"],
        ["978300760000", "978302109000"],
        ["978300760000000000", "978302109000000000"],
        ["978300760.0", "978302109.0"],
        ["2000-12-31 22:12:40", "2000-12-31 22:35:09"],
        ["2000-12-31T22:12:40Z", "2000-12-31T22:35:09Z"],
        ["2000-12-31T23:12:40+01:00", "2000-12-31T23:35:09+01:00"],
        ["31/12/2000 22:12:40", "31/12/2000 22:35:09"],
        ["12/31/2000 22:12:40", "12/31/2000 22:35:09"],
        ["31.12.2000 22:12:40", "31.12.2000 22:35:09"],
    ],
)
def test_times_in_any_unit_and_dates_in_any_order(tmp_path, stamps):
    lines = "".join(f"{n},x,4,{stamp}\n" for n, stamp in enumerate(stamps))
    read = bo.read_interactions(write(tmp_path, "user,item,rating,date\n" + lines))
    assert read.rows.time.tolist() == [978300760, 978302109]


def test_dates_that_may_mean_two_days_are_asked_about(tmp_path):
    path = write(tmp_path, "user,item,rating,date\n1,2,3,03/04/2020\n2,2,3,05/06/2020\n")
    with pytest.raises(
        ValueError, match=r"ratings\.csv, line 2: '03/04/2020' may begin with the day or with the month"
    ):
        bo.read_interactions(path)
    days = [bo.read_interactions(path, dayfirst=first).rows.time.iloc[0] for first in (True, False)]
    assert days == [pd.Timestamp("2020-04-03").timestamp(), pd.Timestamp("2020-03-04").timestamp()]


def test_ids_stay_what_they_are(tmp_path):
    read = bo.read_interactions(write(tmp_path, "user,item,rating\n007,a b,4\n7,\U0001f3ac,5\n 7 ,A b,1\n"))
    assert read.users == ["007", "7"] and read.items == ["A b", "a b", "\U0001f3ac"]


def test_what_is_repaired_is_counted(tmp_path):
    more = [
        "7,30,2,978300760,Film A",
        ",30,2,1,x",
        "8,,2,1,x",
        "8,30,,1,x",
        "9,30,4,,x",
        "9,6,4,978300999,Tom &amp; Jerry",
    ]
    read = bo.read_interactions(write(tmp_path, TEXT + "\n".join(more) + "\n"))
    assert read.report["rows without user, item or rating, left out"] == 3
    assert read.report["same user, item and time, all but the last left out"] == 1
    assert read.report["rows without a time, left out"] == 1
    assert read.report["rows"] == 5 == len(read.rows) and "Tom & Jerry" in read.titles
    assert ("7", "30", 2.0, 978300760) in rows_of(read)  # the last of the two
    assert "rows" in read.table.index


def test_titles_come_from_a_second_file(tmp_path):
    ratings = write(tmp_path, "user,item,rating\n1,10,4\n2,11,5\n3,12,1\n")
    titles = write(tmp_path, "movieId::title::genres\n10::Heat (1995)::Action\n11::Heat (1995)::Drama\n", "movies.dat")
    read = bo.read_interactions(ratings, titles=titles)
    assert read.titles == ["Heat (1995)", "Heat (1995)", "12"]
    assert read.report["items without a title, shown by their id"] == 1
    assert read.report["titles that several items have"] == 1
    with pytest.raises(ValueError, match="no columns of items and titles among 'user', 'item', 'rating'"):
        bo.read_interactions(ratings, titles=ratings)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"PK\x03\x04rest", "is a ZIP archive or an Excel file"),
        (b"\x1f\x8brest", "is compressed by gzip; unpack it"),
        (b"\x89PNG\r\n\x1a\n", "is a picture"),
        (b"PAR1 no PAR1", "not a Parquet file that can be read"),
        (b"a\0b,c\n", "is not text: there are zero bytes"),
        (
            b'[{"user": 1, "item": 2, "rating": 3},\n{"user": 2, "item": 2, "rating": 4}]\n',
            "is a JSON array; write one",
        ),
        (b'user,item,rating\n1,2,"987"\n1,3,"1,234"\n', "line 3: the rating '1,234' may be a thousand or a fraction"),
        (
            b"user,item,rating,time\n1,1,,\n" + b"1,2,3,1577836800\n" * 5 + b"1,3,3,1577836800000\n",
            "line 8: time 1577836800000 is not in the unit of the others; write all in one",
        ),
        (b"just words\nand more\n", "no comma, tab, semicolon, bar or :: parts its lines"),
        (b"user,item\n1,2\n", "no column of ratings or labels among 'user', 'item'; say columns="),
        (b"user,rating\n1,2\n", "no column of items among"),
        (b"1,2\n3,4\n", "no header line, and 2 columns; write their names into line 1"),
        (b"user,item,rating,item\n1,2,3,4\n", "line 1: the column 'item' is there twice"),
        (b"user,item,rating\n1,2,good\n", "line 2: the rating is 'good'; give a number"),
        (b"user,item,rating\n1,2,3\n1,2,inf\n", "line 3: the rating is inf"),
        (b"user,item,title,rating\n1,2,Apollo,13,5\n", "is a quotation mark left open, or a line broken"),
        (b"user,item,rating\n\n\n1,2,good\n", "line 4: the rating is 'good'"),
        (b"\n" * 60 + b"user,item,rating\n1,2,good\n", "line 62: the rating is 'good'"),
        (b"user,item,rating,time\n1,2,3,inf\n", "line 2: the time is 'inf'"),
        (b"user,item,rating,time\n1,2,3,1e30\n", "line 2: the time is '1e30'"),
        (b"user,item,rating,date\n1,2,3,25/04/2020\n2,2,3,04/25/2020\n", "say dayfirst"),
        (b'user,item,rating\n1,"' + b"x" * 200_000 + b'",3\n', "field larger than"),
        (b'{"user": 1, "item": 2, "rating": 3}\n[1]\n', "line 2: not an object of JSON"),
        (b"user,item,rating,time\n1,2,3,yesterday\n", "line 2: the time is 'yesterday'; give a date with its year"),
        (b'user,item,rating\n1,"2,3\n4,5,6\n', "is a quotation mark left open, or a line broken"),
        (b"user,item,rating\n1,2,3\n1,2,3,4,5\n", "is a quotation mark left open, or a line broken"),
        (b"user,item,rating\n,,\n", "no row has a user, an item and a rating"),
        (b"user,item,rating,time\n1,2,3,10:30\n", "line 2: the time is '10:30'; give a date with its year"),
        (b"user,item,rating,time\n1,2,3,2020-01-02\n1,2,3,Jan 5\n", "line 3: the time is 'Jan 5'; give a date"),
        (
            b'{"user": 1, "item": 2, "rating": 3}\n{"user": [1], "item": 2, "rating": 3}\n',
            "line 2: a list or an object",
        ),
        (b'{"user": "\x81\x8f", "item": 2, "rating": 3}\n', "line 1: neither UTF-8 nor Windows-1252"),
        (b"user,item,rating\n1,2,3\n\x81,2,3\n", "line 3: neither UTF-8 nor Windows-1252"),
        (b'{"user": 1, "item"\n', "line 1: not JSON"),
        (b'{"user": 1, "item": 2, "rating": 3}\n{"user"\n', "line 2: not JSON"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, content, said):
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=said.replace(".", r"\.").replace("?", r"\?")) as caught:
        bo.read_interactions(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_changes_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is not there; give the path of a file"):
        bo.read_interactions(tmp_path / "none.csv")
    path, real = write(tmp_path, TEXT), bo._Reading.take

    def meanwhile(self, *given):
        real(self, *given)
        path.write_text(TEXT + "9,9,9,9,x\n")

    monkeypatch.setattr(bo._Reading, "take", meanwhile)
    with pytest.raises(ValueError, match=r"ratings\.csv was changed while it was read"):
        bo.read_interactions(path)
    monkeypatch.undo()
    titles, chunks = write(tmp_path, "item,title\n30,A\n", "titles.csv"), bo._Source.chunks

    def later(self, wanted):
        yield from chunks(self, wanted)
        titles.write_text("item,title\n30,Another\n")

    monkeypatch.setattr(bo._Source, "chunks", later)
    with pytest.raises(ValueError, match=r"titles\.csv was changed while it was read"):
        bo.read_interactions(write(tmp_path, TEXT), titles=titles)


def test_a_million_people_and_one_item(tmp_path):
    path = write(tmp_path, "user,item,rating\n" + "".join(f"{n},x,{1 + 4 * (n % 2)}\n" for n in range(1_000_000)))
    read = bo.read_interactions(path)
    assert (len(read.users), read.items, len(read.rows)) == (1_000_000, ["x"], 1_000_000)
    assert read.users[-1] == "999999" and read.rows.value.sum() == 3_000_000


def test_other_columns_can_be_asked_for(tmp_path):
    path = write(tmp_path, "user,who,item,rating,like\n1,a,2,5,0\n1,b,2,4,1\n")
    read = bo.read_interactions(path, {"user": "who", "rating": "like"})
    assert read.users == ["a", "b"] and read.rows.value.tolist() == [0, 1]
    with pytest.raises(ValueError, match="columns: 'user': 'whom'; roles are user, item"):
        bo.read_interactions(path, {"user": "whom"})


def as_csv(tmp_path, rows):
    rows = rows.assign(rating=1 + 4 * rows.label)
    rows[["user", "item", "rating", "timestamp"]].to_csv(tmp_path / "r.csv", index=False)
    return tmp_path / "r.csv"


def test_the_split_goes_by_time(tmp_path):
    rows = make_rows(0, 400).assign(timestamp=lambda r: r.timestamp // 700 * 700 + 10**9)  # many at the same moment
    data = bo.read_interactions(as_csv(tmp_path, rows)).split()
    sizes = {split: len(getattr(data, split)) for split in bu.SPLITS}
    assert sum(sizes.values()) == 400 and sizes["train"] > 300 and min(sizes.values()) > 20
    assert (
        data.train.timestamp.max()
        < data.valid.timestamp.min()
        <= data.valid.timestamp.max()
        < data.test.timestamp.min()
    )
    wanted = rows.label.mean()
    assert pd.concat([data.train, data.valid, data.test]).label.mean() == pytest.approx(wanted)


def test_without_times_each_users_last_rows_are_for_the_test(tmp_path):
    rows = make_rows(0, 400)
    path = as_csv(tmp_path, rows)
    table = pd.read_csv(path).drop(columns="timestamp")
    table.to_csv(path, index=False)
    read = bo.read_interactions(path)
    data = read.split()
    assert "the file's order" in read.report["times"]
    for user, own in table.groupby("user"):
        parts = pd.concat([getattr(data, split) for split in bu.SPLITS])
        mine = parts[parts.user == read.users.index(str(user))]
        assert [read.items[i] for i in mine.item] == own.item.astype(str).tolist()  # train, valid, test: its order
    assert data.train.timestamp.max() < data.valid.timestamp.min() < data.test.timestamp.min()
    assert any(len(liked) for liked in bu.liked_before(data, data.test))


def test_a_split_that_nothing_can_be_learned_from_is_refused(tmp_path):
    path = as_csv(tmp_path, make_rows(0, 400).assign(label=1))
    with pytest.raises(ValueError, match="train would hold .* 320 of them liked; a value of 4 or more counts as liked"):
        bo.read_interactions(path).split()
    assert set(bo.read_interactions(as_csv(tmp_path, make_rows(0, 400))).split(like=5).train.label) == {0, 1}


def test_a_second_data_set_is_read_as_anybodys_file():
    """MovieLens-100K: another decade, its titles in a second file."""
    ratings, films = bo.ml100k_files()
    read = bo.read_interactions(ratings, titles=films)
    assert (len(read.rows), len(read.users), len(read.items)) == (100_000, 943, 1682)
    assert read.titles[:2] == ["Toy Story", "GoldenEye"] and read.report["period"] == "1997-09-20 to 1998-04-22"
    data = read.split(name="ml-100k")
    assert len(data.train) == pytest.approx(80_000, abs=200) and data.train.label.mean() == pytest.approx(
        0.55, abs=0.02
    )


def test_the_text_is_never_in_memory_as_a_whole(tmp_path, monkeypatch):
    """Ten times as many rows at once take much more; both read the same."""
    rng, n = np.random.default_rng(0), 100_000
    table = pd.DataFrame({"user": rng.integers(0, 5000, n), "item": rng.integers(0, 900, n)})
    table = table.assign(rating=rng.integers(1, 6, n), timestamp=10**9 + np.arange(n), review="so many words " * 4)
    table.to_csv(tmp_path / "r.csv", index=False)
    peaks, found = [], []
    for chunk in (5_000, 100_000):
        monkeypatch.setattr(bo, "CHUNK", chunk)
        tracemalloc.start()
        found.append(bo.read_interactions(tmp_path / "r.csv"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert found[0].rows.equals(found[1].rows) and peaks[0] < 0.75 * peaks[1]
    assert [int(found[0].users[u]) for u in found[0].rows.user] == table.user.tolist()
    assert found[0].rows.value.tolist() == table.rating.tolist()


def test_json_lines_are_taken_some_at_a_time(tmp_path, monkeypatch):
    lines = [{"user": n % 7, "item": n, "rating": n % 5, "timestamp": 10**9 + n} for n in range(43)]
    path = write(tmp_path, "".join(json.dumps(row) + "\n" for row in lines) + "{", "r.jsonl")
    monkeypatch.setattr(bo, "CHUNK", 50)
    with pytest.raises(ValueError, match="line 44: not JSON"):
        bo.read_interactions(path)
    path.write_text(path.read_text()[:-1])
    read = bo.read_interactions(path)
    assert [
        (int(read.users[u]), int(read.items[i]), v) for u, i, v in read.rows[["user", "item", "value"]].to_numpy(int)
    ] == [(row["user"], row["item"], row["rating"]) for row in lines]


def test_large_ids_stay_apart_in_every_kind_of_file(tmp_path):
    """Beside a missing one they would become floating-point numbers, which cannot tell them apart."""
    ids = [76561197960287930, 76561197960287931]
    lines = [{"user": i, "item": 1, "rating": 4} for i in ids] + [{"user": None, "item": 1, "rating": 2}]
    write(tmp_path, "".join(json.dumps(row) + "\n" for row in lines), "r.jsonl")
    pd.DataFrame(lines).assign(user=pd.array([*ids, None], dtype="Int64")).to_parquet(tmp_path / "r.parquet")
    write(tmp_path, "user,item,rating\n" + "".join(f"{r['user'] or ''},1,{r['rating']}\n" for r in lines), "r.csv")
    for name in ("r.jsonl", "r.parquet", "r.csv"):
        read = bo.read_interactions(tmp_path / name)
        assert read.users == [str(i) for i in ids], name
        assert read.report["rows without user, item or rating, left out"] == 1


@pytest.mark.parametrize("stamps", [["20200102", "20200103"], ["02.01.20", "13.01.20"], ["1969-12-31", "1970-01-02"]])
def test_dates_that_look_like_something_else(tmp_path, stamps):
    lines = "".join(f"{n},x,4,{stamp}\n" for n, stamp in enumerate(stamps))
    read = bo.read_interactions(write(tmp_path, "user,item,rating,date\n" + lines))
    first = {"20200102": "2020-01-02", "02.01.20": "2020-01-02", "1969-12-31": "1969-12-31"}[stamps[0]]
    assert pd.Timestamp(read.rows.time.iloc[0], unit="s") == pd.Timestamp(first) and len(read.rows) == 2


def test_dates_must_agree_over_the_whole_file(tmp_path, monkeypatch):
    path = write(tmp_path, "user,item,rating,date\n1,2,3,25/04/2020\n2,2,3,04/25/2020\n")
    monkeypatch.setattr(bo, "CHUNK", 1)
    with pytest.raises(ValueError, match="line 3: '04/25/2020' does not begin with the day as other dates do"):
        bo.read_interactions(path)
    with pytest.raises(ValueError, match="line 2: '25/04/2020' does not begin with the month"):
        bo.read_interactions(path, dayfirst=False)


def test_a_time_in_another_unit_than_the_others_is_named(tmp_path):
    lines = "".join(f"{n},x,4,{t}\n" for n, t in enumerate([964982703000, 964982704000, 964982705000, 964982706]))
    with pytest.raises(ValueError, match="time 964982706 is not in the unit of the others"):
        bo.read_interactions(write(tmp_path, "user,item,rating,timestamp\n" + lines))


def test_a_reviews_headline_is_no_title(tmp_path):
    path = write(tmp_path, "rating,title,parent_asin,user_id\n5,Love it,B1,u\n1,Broke,B2,u\n")
    assert bo.read_interactions(path).titles == ["B1", "B2"]
    assert bo.read_interactions(path, {"title": "title"}).titles == ["Love it", "Broke"]


def test_a_user_with_very_many_rows_and_no_times(tmp_path):
    n = 4_000
    table = pd.DataFrame({"user": 1, "item": np.arange(n) % 50, "rating": np.arange(n) % 5 + 1})
    table.to_csv(tmp_path / "r.csv", index=False)
    read = bo.read_interactions(tmp_path / "r.csv")
    read.rows = pd.concat([read.rows] * 1).assign(item=np.arange(len(read.rows)) % 50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read.split()


def test_a_title_in_parquet_that_is_no_text_is_refused(tmp_path):
    table = pd.DataFrame(
        {"user": [1, 1, 2], "item": [1, 2, 1], "rating": [5, 1, 3], "title": ["Emma", "Alien", "Emma"]}
    )
    table.to_parquet(tmp_path / "x.parquet", compression=None)
    content = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(content.replace(b"Alien", b"\xfflien"))
    with pytest.raises(ValueError, match=r"x\.parquet.*UTF"):
        bo.read_interactions(tmp_path / "x.parquet")


@cases(150, 4_000)
@given(
    st.integers(0, 10**9),
    st.binary(min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from(["csv", "jsonl", "parquet"]),
)
def test_damaged_files_are_read_or_refused(tmp_path_factory, at, new, cut, kind):
    with case("read: files of one's own"):
        folder = tmp_path_factory.getbasetemp()
        table = pd.read_csv(write(folder, TEXT))
        if kind == "csv":
            content = TEXT.encode()
        elif kind == "jsonl":
            content = "".join(json.dumps(row) + "\n" for row in table.to_dict("records")).encode()
        else:
            table.to_parquet(folder / "x.parquet")
            content = (folder / "x.parquet").read_bytes()
        path = write(folder, spoiled(content, at, new, cut), "damaged.bin")
        try:
            read = bo.read_interactions(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error), error
        else:
            assert np.isfinite(read.rows.value).all() and len(read.titles) == len(read.items) >= 1
            assert read.rows.item.between(0, len(read.items) - 1).all()
            assert read.rows.user.between(0, len(read.users) - 1).all()


def test_the_verdict_says_what_the_paired_test_says(toy):
    rng = np.random.default_rng(0)
    chance, truth = rng.random(100), toy.test.label + rng.random(100) / 2
    for scores, word in (
        ({"counting": chance, "codes": truth}, "codes against counting: across users better"),
        ({"counting": truth, "codes": chance}, "codes against counting: across users worse"),
        ({"counting": chance, "codes": chance + 0}, "codes against counting: across users not surely different"),
    ):
        table, sentence = bo.verdict(toy.test, scores)
        gap = bu.paired_test(toy.test.user, toy.test.label, scores["counting"], scores["codes"]).loc["auc"]
        assert word in sentence and f"({gap.difference:+.3f} AUC" in sentence and "On 100 rows" in sentence
        within = bu.paired_test(toy.test.user, toy.test.label, scores["counting"], scores["codes"]).loc["uauc"]
        assert f"{within.difference:+.3f} UAUC, {within.low:+.3f} to {within.high:+.3f}" in sentence
        assert table.auc["codes"] == round(bu.auc(toy.test.label, scores["codes"]), 4)


def test_the_verdict_on_one_person_is_not_sure(toy):
    scores = {"counting": np.random.default_rng(0).random(100), "codes": toy.test.label.to_numpy(float)}
    _, sentence = bo.verdict(toy.test.assign(user=0), scores)
    assert sentence.count("too few users to tell") == 2 and "better" not in sentence and "nan" not in sentence


@pytest.mark.parametrize("style", ["text", "text+codes", "codes"])
def test_a_prompt_may_be_about_books(toy, toy_codes, style):
    films = bu.build_prompts(toy, toy.test, toy_codes, style)
    books = bu.build_prompts(toy, toy.test, toy_codes, bo.template_about(style, "book"))
    assert [prompt.replace("movie", "book") for prompt in films] == books != films
    for thing in ("", "two words", "{likes}", "<b>", "x" * 40):
        with pytest.raises(ValueError, match="no word for what the items are"):
            bo.template_about(style, thing)


def test_goodbooks_10k_as_its_authors_give_it(tmp_path):
    """No times, but rows in their order; the title stands in a column beside an original title and other ids."""
    rng = np.random.default_rng(0)
    lines = [
        f"{user},{book},{rating}" for user in range(1, 31) for book, rating in zip(rng.permutation(20) + 1, [5, 2] * 10)
    ]
    ratings = write(tmp_path, "user_id,book_id,rating\n" + "\n".join(lines) + "\n", "ratings.csv")
    head = "book_id,goodreads_book_id,best_book_id,work_id,books_count,isbn,isbn13,authors,original_publication_year,"
    head += "original_title,title,language_code,average_rating\n"
    books = "".join(
        f'{n},{90 + n},1,1,9,43,9.78e+12,"A, B",2008.0,Old {n},"New {n} (Set, #{n})",eng,4.3\n' for n in range(1, 21)
    )
    read = bo.read_interactions(ratings, titles=write(tmp_path, head + books, "books.csv"))
    assert read.titles == [f"New {n} (Set, #{n})" for n in range(1, 21)]
    data = read.split()
    assert len(data.train) == 480 and len(data.test) == 60 and data.train.label.mean() == 0.5
    last = [tuple(map(int, line.split(",")[:2])) for line in lines[19::20]]  # each user's last row
    assert set(last) <= {(user + 1, item + 1) for user, item in zip(data.test.user, data.test.item)}


def amazon(tmp_path, reviews):
    """`bo.amazon_book` of (user, book, stars, date) and of titles for all books but the one called untitled."""
    lines = [
        {"overall": float(stars), "verified": True, "reviewTime": "03 30, 2005", "reviewerID": user, "asin": book,
         "style": {"Format:": " Hardcover"}, "reviewText": "a\nb", "summary": "fine",
         "unixReviewTime": int(pd.Timestamp(date).timestamp())}
        for user, book, stars, date in reviews
    ]  # fmt: skip
    path = write(tmp_path, "\n".join(map(json.dumps, lines)) + "\n", "Books_5.json")
    titles = {book: f"Title of {book}" for _, book, *_ in reviews} | {"spoilt": "var a = getTime()"}
    titles.pop("untitled", None)
    books = [{"category": [], "title": title, "brand": "x", "asin": book} for book, title in titles.items()]
    return bo.amazon_book(path, write(tmp_path, "\n".join(map(json.dumps, books)) + "\n", "meta_Books.json"))


def test_amazon_book_is_cut_as_the_reference_code_does(tmp_path):
    days = pd.date_range("2017-01-01", "2017-12-28", periods=24).strftime("%Y-%m-%d")
    reviews = [
        (f"U{u:02d}", f"B{b:02d}", 4 + u % 2, days[(u + b) % 24]) for u in range(22) for b in range(22)
    ]  # each user and each book 22 times
    reviews += [(f"U{u:02d}", "B00", 5, "2016-12-31") for u in range(22)]  # another year
    reviews += [("seldom", f"B{b:02d}", 5, days[b]) for b in range(20)]  # just 20: not more than 20
    reviews += [(f"U{u:02d}", book, 5, days[0]) for u in range(22) for book in ("untitled", "spoilt")]
    reviews += [(f"U{u:02d}", "rare", 5, days[0]) for u in range(20)] + [("seldom", "rare", 5, days[0])]
    data = amazon(tmp_path, reviews)
    whole = pd.concat([data.train, data.valid, data.test])
    # "seldom" has 21 rows and "rare" 21: counted before anything is left out, so that both stay
    assert data.titles == [f"Title of B{b:02d}" for b in range(22)] + ["Title of rare"] and data.n_users == 23
    assert len(whole) == 22 * 22 + 20 + 21
    month = pd.to_datetime(whole.timestamp, unit="s").dt.month
    assert (month.iloc[: len(data.train)] < 12).all() and (month.iloc[len(data.train) :] == 12).all()
    assert abs(len(data.valid) - len(data.test)) <= 1 and data.valid.timestamp.max() <= data.test.timestamp.min()
    assert whole.label.sum() == sum(stars == 5 for _, book, stars, date in reviews if book[0] in "Br" and date > "2017")


def test_amazon_book_of_another_year_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no rating of 2017"):
        amazon(tmp_path, [("U", "B", 5, "2016-05-05"), ("V", "B", 1, "2016-05-06")])


@pytest.mark.parametrize("dayfirst", [None, True, False])
def test_a_year_in_front_decides_whatever_other_dates_say(tmp_path, dayfirst):
    dates = ["2020-03-04", "2020/03/05", "2020-04-01 10:00"]
    lines = "".join(f"{n},x,4,{date}\n" for n, date in enumerate(dates))
    read = bo.read_interactions(write(tmp_path, "user,item,rating,date\n" + lines), dayfirst=dayfirst)
    found = pd.to_datetime(read.rows.time, unit="s")
    assert found.dt.strftime("%m-%d").tolist() == ["03-04", "03-05", "04-01"]
    mixed = write(tmp_path, "user,item,rating,date\n" + lines + "9,x,1,31/12/2019\n")
    found = pd.to_datetime(bo.read_interactions(mixed).rows.time, unit="s")
    assert found.dt.strftime("%m-%d").tolist() == ["12-31", "03-04", "03-05", "04-01"]


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        (["23-01-02", "23-01-03"], "may begin with the year or end in it; write years in four digits"),
        (["43831.25", "43831.75"], "the time is '43831.25'; give a date"),
    ],
)
def test_times_that_mean_two_things_are_refused(tmp_path, cells, reason):
    lines = "".join(f"{n},x,4,{cell}\n" for n, cell in enumerate(cells))
    with pytest.raises(ValueError, match=f"line 2: {reason}" if "the time" in reason else reason):
        bo.read_interactions(write(tmp_path, "user,item,rating,date\n" + lines))


def test_fourteen_digits_are_a_date_and_a_time(tmp_path):
    lines = "1,x,4,20200102030405\n2,x,4,20200102030407\n"
    read = bo.read_interactions(write(tmp_path, "user,item,rating,date\n" + lines))
    assert read.rows.time.diff().iloc[1] == 2 and read.report["period"] == "2020-01-02 to 2020-01-02"


def test_lines_that_quotation_marks_swallow_are_counted(tmp_path):
    """Two titles that begin with a mark make one cell of all lines between: nobody may lose rows without a word."""
    rows = [f"{n}\tm{n}\t4\tFilm {n}" for n in range(10)]
    rows[3], rows[7] = '3\tm3\t4\t"Weird Al', '7\tm7\t4\t"Crocodile" Dundee'
    told = "lines that stand inside quotation marks, read as part of a cell"
    read = bo.read_interactions(write(tmp_path, "user\titem\trating\ttitle\n" + "\n".join(rows) + "\n"))
    assert len(read.rows) + read.report[told] == 10 and read.report[told] >= 4
    fine = bo.read_interactions(write(tmp_path, 'user,item,rating,title\n1,a,4,"two\nlines"\n2,a,3,x\n'))
    assert fine.report[told] == 1 and len(fine.rows) == 2
    plain = bo.read_interactions(write(tmp_path, "user,item,rating\n\n1,a,4\n\n2,b,3\n\n"))
    assert told not in plain.report and len(plain.rows) == 2


def test_what_means_no_rating_and_no_id_is_left_out(tmp_path):
    read = bo.read_interactions(write(tmp_path, "User-ID;ISBN;Book-Rating\n1;a;0\n1;b;8\n2;a;3\n2;b;0\n"))
    assert read.rows.value.tolist() == [8, 3]
    read = bo.read_interactions(write(tmp_path, "user,item,rating\n1,a,4\nNULL,a,3\nnan,b,2\n2,b,5\n"))
    assert read.users == ["1", "2"] and read.report["ids such as NULL or nan, taken as missing"] == 2
    assert read.report["rows without user, item or rating, left out"] == 2


def test_whole_numbers_with_a_point_are_the_same_ids_in_json(tmp_path):
    lines = [{"user": 7, "item": 1, "rating": 4}, {"user": 7.0, "item": 2, "rating": 3.5}]
    read = bo.read_interactions(write(tmp_path, "".join(json.dumps(row) + "\n" for row in lines), "r.jsonl"))
    assert read.users == ["7"] and read.rows.value.tolist() == [4, 3.5]


def test_times_with_and_without_a_zone_are_told(tmp_path):
    lines = "1,a,4,2020-01-02T03:04:05+02:00\n2,a,3,2020-01-02T03:04:05\n"
    read = bo.read_interactions(write(tmp_path, "user,item,rating,date\n" + lines))
    assert "UTC" in read.report["times with and without a zone"] and read.rows.time.diff().iloc[1] == 7200
