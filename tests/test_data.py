"""The real input is what its README says it is."""

import hashlib
from pathlib import Path


def test_flights_are_the_rows_the_readme_names(flights: list[bytes]) -> None:
    readme = Path(__file__).with_name("data").joinpath("README.md").read_text()
    header, *rows = flights
    assert len(rows) == len(set(rows)) == 27_004
    assert f"{len(rows):,} and a header line" in readme
    assert hashlib.sha256(b"\n".join(flights) + b"\n").hexdigest() in readme
    assert len(header.split(b",")) == 19
    assert {row.count(b",") for row in rows} == {18}
    assert {tuple(row.split(b",")[:2]) for row in rows} == {(b"2013", b"1")}
    assert len({row.split(b",")[2] for row in rows}) == 31
