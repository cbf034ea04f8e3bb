import re

import pytest

from longtake.planning import parse_size, size_text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2TB", 2 * 10**12),
        ("500 GB", 5 * 10**11),
        ("1.5TiB", 3 * 2**39),
        ("1_000MiB", 1000 * 2**20),
        ("3KB", 3000),
        ("3kB", 3000),
        ("17B", 17),
        ("0.5PB", 5 * 10**14),
    ],
)
def test_sizes_are_read_as_written(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("2000", "--disk-budget='2000' has no unit: did you mean 2000GB?"),
        ("2tb", "--disk-budget='2tb' has the unit 'tb', which is none: did you mean 2TB?"),
        ("2T", "has the unit 'T', which is none: did you mean 2TB?"),
        ("1.5tib", "did you mean 1.5TiB?"),
        ("2 parsec", "has the unit 'parsec', which is none (units: B, kB, MB"),
        ("", "is not a size: give a number and a unit, such as 500GB, 2TB or 1.5TiB"),
        ("-2TB", "is not a size"),
        ("2,5TB", "is not a size"),
        ("1e3GB", "is not a size"),
        ("nan TB", "is not a size"),
        ("0TB", "must be more than nothing"),
        ("0.1B", "must be more than nothing"),
    ],
)
def test_mistakes_are_explained(text, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        parse_size(text, name="--disk-budget")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_951, "1.0 MB"),
        (51.77e12, "51.8 TB"),
        (3e18, "3,000.0 PB"),
    ],
)
def test_sizes_are_told_in_the_largest_unit(size, text):
    assert size_text(size) == text
