"""YAML that knows its lines, and what overrides and a scale block do to it."""

import pytest

from fffsweep.sweeps.yaml_source import ConfigError, dotted, parse_yaml, read_source


@pytest.fixture
def write(tmp_path):
    def write(text, name="sweep.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e6", 1_000_000.0),
        ("1_000_000", 1_000_000),
        ("1M", "1M"),
        ("-3", -3),
        ("1e-3", 0.001),
        (".5", 0.5),
        ("010", 10),
        ("0x5", "0x5"),
        ("1x8", "1x8"),
        ("no", "no"),
        ("true", True),
        ("none", "none"),
        ("~", None),
        ("", None),
        ("~4095", "~4095"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("'12'", "12"),
        ("dense_active(1x8)", "dense_active(1x8)"),
    ],
)
def test_scalars_are_what_they_look_like(text, value):
    found = parse_yaml(f"a: {text}", "f")[0]["a"]
    assert found == value
    assert type(found) is type(value)


def test_places_of_nested_values(write):
    source = read_source(write("a:\n  b: [1,\n    2]\nc: 3\n"))
    assert source.origin(("a", "b", 1)).endswith("line 3")
    assert source.origin(("a", "b", 1, "deeper")).endswith("line 3")
    assert source.origin(("c",)).endswith("line 4")
    assert dotted(("a", "b", 1, "c")) == "a.b[1].c"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "a: given twice, first at .*line 1; keep one .*line 3"),
        ("a:\n  b: 1\n  b: 2\n", r"a\.b: given twice"),
        ("a: [1\nb: 2\n", "not YAML: .*line 2"),
        ("a: b: c\n", "not YAML: .*line 1"),
        ("just text", "expected a mapping"),
        ("", "got nothing"),
        ("- 1\n- 2\n", "expected a mapping"),
        ("a: 1\n---\nb: 2\n", "not YAML"),
        ("a: !!python/object:os.system x\n", "tag .*expected plain YAML"),
        ("a: &x [*x]\n", "nested without end"),
        (f"a: {'[' * 200_000}{']' * 200_000}\n", "nested without end"),
        ("a: *b\n", "undefined alias 'b'"),
        ("? [1]\n: 2\n", "a key is no text"),
        (b"\x93NUMPY\xff\x00", "not a text file"),
        (b"a: \x00\n", "not YAML"),
        (
            "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
            + "".join(f"{c}: &{c} [{','.join([f'*{p}'] * 10)}]\n" for p, c in zip("abcdef", "bcdefg", strict=True)),
            "more than 100000 values",
        ),
        (f"a: {'9' * 5000}\n", "not a number that can be held"),
    ],
)
def test_what_is_no_config_is_refused_in_one_line(write, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        read_source(write(text))
    assert "\n" not in str(error.value)
    assert "sweep.yaml" in str(error.value)


def test_unreadable_files(tmp_path):
    (tmp_path / "other.yaml").touch()
    with pytest.raises(ConfigError, match=r"no such file; there are .*other\.yaml"):
        read_source(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_source(tmp_path)


def test_overrides_replace_add_and_index(write):
    path = write("a: {b: 1, c: [x, y]}\n")
    source = read_source(path, ["a.b=1e6", "a.c[1]=z", "a.c[2]=w", "d.e.f=[1, 2]", "g=", "h=x=y"])
    assert source.values == {"a": {"b": 1e6, "c": ["x", "z", "w"]}, "d": {"e": {"f": [1, 2]}}, "g": None, "h": "x=y"}
    assert source.origin(("a", "b")) == "--set a.b=1e6"
    assert source.origin(("d", "e")) == "--set d.e.f=[1, 2]"
    assert source.origin(("a", "c", 0)).endswith("line 1")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("a.b", "expected path=value"),
        ("=3", "expected path=value"),
        ("a..b=3", "expected path=value"),
        ("a[x]=3", "expected path=value"),
        ("a.b.c=3", r"a\.b is no mapping"),
        ("a[0]=3", "a is no list"),
        ("l[5]=3", "l has 2 items"),
        ("a=[1", "not YAML"),
    ],
)
def test_overrides_that_lead_nowhere_name_themselves(write, override, message):
    with pytest.raises(ConfigError, match=message) as error:
        read_source(write("a: {b: 1}\nl: [1, 2]\n"), [override])
    assert f"--set {override}" in str(error.value)


def test_scale_is_laid_over_the_config_and_under_the_overrides(write):
    path = write("a: {b: 1, c: 2}\nl: [1, 2]\nscale:\n  a:\n    b: 10\n  l: [3]\n")
    assert read_source(path).values == {"a": {"b": 10, "c": 2}, "l": [3]}
    assert read_source(path).origin(("a", "b")).endswith("line 5")
    assert read_source(path, ["a.b=5"]).values["a"] == {"b": 5, "c": 2}
    assert read_source(path, ["scale=null"]).values == {"a": {"b": 1, "c": 2}, "l": [1, 2]}
    assert read_source(path, ["scale.a.c=7"]).values["a"] == {"b": 10, "c": 7}
    with pytest.raises(ConfigError, match=r"scale: expected a mapping .*--set scale=3"):
        read_source(path, ["scale=3"])
