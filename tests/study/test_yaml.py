"""The strict loader reads what YAML 1.2 means, knows where it stands, and refuses the rest by line and column."""

import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cadis_ray.errors import UsageError
from cadis_ray.study.yaml import MAX_BYTES, MAX_DEPTH, MAX_VALUES, load

SCALARS = {  # plain scalar -> value in the YAML 1.2 core schema
    "1e-4": 1e-4, "1E3": 1000.0, "-.5": -0.5, "1.": 1.0, "+12e03": 12000.0, "0.25": 0.25,
    "017": 17, "-19": -19, "0o17": 15, "0x1F": 31, "0": 0,
    "no": "no", "on": "on", "Yes": "Yes", "off": "off", "y": "y", "12:30:45": "12:30:45", "1_000": "1_000",
    "0b11": "0b11", "2001-12-14": "2001-12-14", "=": "=", "1e": "1e", "e4": "e4", ".": ".",
    "tRUE": "tRUE", "-0x1": "-0x1",
    "true": True, "False": False, "TRUE": True, "null": None, "~": None, "": None, "Null": None,
    ".inf": math.inf, "-.INF": -math.inf, "'1'": "1", '"true"': "true", "'~'": "~", "1" * 101: "1" * 101,
}  # fmt: skip


@pytest.mark.parametrize(("text", "value"), SCALARS.items())
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    data, _ = load(f"key: {text}\n")
    assert data == {"key": value}
    assert type(data["key"]) is type(value)


def test_nan() -> None:
    assert math.isnan(load("a: .NaN")[0]["a"])


def test_marks_are_the_places_of_keys_and_values() -> None:
    text = "a: 1\nb:\n  c: [x, {d: 2}]\n  'e': |\n    text\nf:\n"
    data, marks = load(text)
    assert data == {"a": 1, "b": {"c": ["x", {"d": 2}], "e": "text\n"}, "f": None}
    lines = text.splitlines()
    starts = {path: lines[mark.key[0] - 1][mark.key[1] - 1 :] for path, mark in marks.items() if path}
    assert {path: start[: len(str(path[-1]))] for path, start in starts.items()} == {
        ("a",): "a", ("b",): "b", ("b", "c"): "c", ("b", "c", 0): "x", ("b", "c", 1): "{", ("b", "c", 1, "d"): "d",
        ("b", "e"): "'", ("f",): "f",
    }  # fmt: skip
    assert marks["b", "c", 1, "d"] == ((3, 11), (3, 14))
    assert marks["b", "e"].value == (4, 8)


def problems(text: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        load(text)
    return str(caught.value).replace("<text>:", "").splitlines()


def test_every_duplicate_tag_and_key_is_listed_in_the_files_order() -> None:
    assert problems("a: !!int 1\nb:\n  a: 2\n  a: {x: 1, x: 2}\n1: one\na: 3\n? [k]\n: 4\n") == [
        "1:4: tag '!!int' refused; only plain values are allowed",
        "4:3: 'a' given twice (first at 3:3)",
        "4:13: 'x' given twice (first at 4:7)",
        "5:1: a key must be text; quote it if text is meant",
        "6:1: 'a' given twice (first at 1:1)",
        "7:3: a key must be text; quote it if text is meant",
    ]


def test_a_duplicate_inside_a_duplicate_refers_to_the_first_of_all() -> None:
    assert problems("a: {x: 1}\na: {x: 2}\n") == ["2:1: 'a' given twice (first at 1:1)"]


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("a: [1, 2\nb: 3\n", "2:2", "expected ',' or ']', but got ':' (while parsing a flow sequence begun at 1:4)"),
        ("a: b: c\n", "1:5", "mapping values are not allowed here"),
        ("a: 'x\n", "2:1", "found unexpected end of stream (while scanning a quoted scalar begun at 1:4)"),
        ("a: 1\n---\nb: 2\n", "2:1", "found another document"),
        ("a: *nowhere\n", "1:4", "found undefined alias 'nowhere'"),
        ("a: 1\nb: x\x07y\n", "2:5", "a control character"),
        ('a: "\\UFFFFFFFF"\n', "1:7", "not valid YAML"),
        ('a: "\\ud800"\n', "1:4", "half of a surrogate pair"),
        ('"\\udfff": 1\n', "1:1", "half of a surrogate pair"),
    ],
)
def test_malformed(text: str, where: str, what: str) -> None:
    (problem,) = problems(text)
    assert problem.startswith(f"{where}: not valid YAML: ")
    assert what in problem


def test_each_tab_is_listed_but_tabs_inside_text_are_allowed() -> None:
    assert problems("a:\n  b: 1\n\tc: 1\n  d: 2\n  \te: 3\n") == [
        "3:1: tab used for spacing; YAML needs spaces",
        "5:3: tab used for spacing; YAML needs spaces",
    ]
    assert load('a: "x\ty"\nb: |\n  \tz\n')[0] == {"a": "x\ty", "b": "\tz\n"}


def test_limits() -> None:
    assert load("[" * MAX_DEPTH + "]" * MAX_DEPTH)[1].keys() >= {(0,) * (MAX_DEPTH - 1)}
    nested = f"nested more than {MAX_DEPTH} deep"
    assert problems("[" * 5000) == [f"1:{MAX_DEPTH + 2}: {nested}"]
    assert problems("&a [*a]") == [f"1:1: {nested}"]
    too_many = f"more than {MAX_VALUES} keys and values, aliases expanded"
    assert too_many in problems("- x\n" * MAX_VALUES)[0]
    bomb = "a: &a [x, x, x, x]\n" + "".join(
        f"{key}: &{key} [*{of}, *{of}, *{of}, *{of}]\n" for of, key in zip("abcdefghi", "bcdefghij", strict=True)
    )
    assert too_many in problems(bomb)[0]


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes("\ufeffa: ä\n".encode())
    assert load(file)[0] == {"a": "ä"}
    for content, problem in {
        b"a: 1\nb: \xff\n": ":2:4: not valid YAML: not UTF-8 text",
        b"\xef\xbb\xbfa: \xff\n": ":1:4: not valid YAML: not UTF-8 text",
        b"#" * (MAX_BYTES + 1): f": larger than {MAX_BYTES} bytes",
        b"a: 1\na: 2\n": ":2:1: 'a' given twice (first at 1:1)",
    }.items():
        file.write_bytes(content)
        with pytest.raises(UsageError, match=re.escape(f"{file}{problem}") + "$"):
            load(file)
    with pytest.raises(UsageError, match="cannot be read: No such file or directory"):
        load(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        load(tmp_path)


printable = st.characters(max_codepoint=0x2000, exclude_categories=["Cc"]) | st.sampled_from('\n\t\r"\\')
text = st.text(printable, max_size=8)
numbers = st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
plain = st.none() | st.booleans() | numbers | text
documents = st.recursive(plain, lambda x: st.lists(x, max_size=4) | st.dictionaries(text, x, max_size=4), max_leaves=12)


@given(documents)
def test_json_is_yaml(document: object) -> None:
    assert repr(load(json.dumps(document, ensure_ascii=False))[0]) == repr(document)


@given(st.text(alphabet="ab01.-:,[]{}#&*!|>'\"%@`?\n\t ~\\", max_size=40))
def test_any_text_is_read_or_refused_with_positions(text: str) -> None:
    message = ""
    try:
        load(text)
    except UsageError as error:
        message = str(error)
    assert all(re.match(r"<text>:\d+:\d+: ", line) for line in message.splitlines())
