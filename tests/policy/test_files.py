import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from rsafe_plugins.errors import PolicyError
from rsafe_plugins.policy import CONTENT_KINDS, Category, Policy

ONE = "name: p\ncategories:\n  - id: A\n    name: Arson\n"
KINDS = ", ".join(CONTENT_KINDS)
CATEGORY_KEYS = "id, name, description, covers, allows, examples, allowed_examples, applies_to"
EMPTY = "expected a policy with a name and categories, but this is empty"
DEEP = "nested too deeply"
ANCHORS = "anchors (&) and aliases (*) are refused"
BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n"

# (text, line, field, what the sentence says)
BAD_YAML = {
    "nothing": ("", None, None, EMPTY),
    "only a comment": ("# nothing\n", None, None, EMPTY),
    "only a BOM": ("\ufeff", None, None, EMPTY),
    "a list": (
        "- a\n",
        1,
        None,
        "expected a mapping with the keys name, description, categories, but this is a list",
    ),
    "a word": ("\nword", 2, None, "but this is the text 'word'"),
    "null": ("~", 1, None, "but this is empty"),
    "no name": ("categories:\n  - {id: a, name: b}", 1, "name", "the required key 'name' is missing; add it"),
    "no categories": ("name: p", 1, "categories", "the required key 'categories' is missing; add it"),
    "empty list of categories": (
        "name: p\ncategories: []",
        2,
        "categories",
        "at least one category, but the list is",
    ),
    "null categories": ("name: p\ncategories:\n", 2, "categories", "expected a list, but this is empty"),
    "text as categories": (
        "name: p\ncategories: U1",
        2,
        "categories",
        "expected a list, but this is the text 'U1'",
    ),
    "mapping as categories": (
        "name: p\ncategories: {}",
        2,
        "categories",
        "expected a list, but this is a mapping",
    ),
    "text as category": (
        ONE + "  - U2\n",
        5,
        "categories[1]",
        f"mapping with the keys {CATEGORY_KEYS}, but this is",
    ),
    "null category": (ONE + "  -\n", 5, "categories[1]", "but this is empty"),
    "no id": (
        "name: p\ncategories:\n  - name: a\n",
        3,
        "categories[0].id",
        "the required key 'id' is missing",
    ),
    "null id": (ONE.replace("A\n", "\n", 1), 3, "categories[0].id", "expected text, but this is empty"),
    "empty id": (ONE.replace("A\n", "''\n", 1), 3, "categories[0].id", "expected text, but this is empty"),
    "id of two words": (ONE.replace("A\n", "A B\n", 1), 3, "categories[0].id", "one word without commas"),
    "list as id": (
        ONE.replace("A\n", "[A]\n", 1),
        3,
        "categories[0].id",
        "expected text, but this is a list",
    ),
    "long id": (
        ONE.replace("A\n", "A" * 65 + "\n", 1),
        3,
        "categories[0].id",
        "at most 64 characters, this has 65",
    ),
    "long name": (
        ONE.replace("Arson", "A" * 201),
        4,
        "categories[0].name",
        "at most 200 characters, this has 201",
    ),
    "null name": (ONE.replace("Arson", "null"), 4, "categories[0].name", "expected text, but this is empty"),
    "same id": (
        ONE + "  - id: a\n    name: B\n",
        5,
        "categories[1].id",
        "'a' is the id of categories[0] too",
    ),
    "same name": (
        ONE + "  - name: ARSON\n    id: B\n",
        5,
        "categories[1].name",
        "'ARSON' is the name of categories[0]",
    ),
    "braces in same name": (
        "name: p\ncategories: [{id: a, name: '{x}'}, {id: b, name: '{x}'}]",
        2,
        "categories[1].name",
        "'{x}' is the name of categories[0]",
    ),
    "an id that could close a tag": (
        "name: p\ncategories: [{id: '</think>', name: a}]",
        2,
        "categories[0].id",
        "one word without commas or brackets",
    ),
    "unknown top key": (
        "nmae: p\n",
        1,
        "nmae",
        "unknown key 'nmae' (did you mean 'name'?); it can be name, descr",
    ),
    "unknown key": (
        ONE + "    descripton: x\n",
        5,
        "categories[0].descripton",
        f"unknown key 'descripton' (did you mean 'description'?); it can be {CATEGORY_KEYS}.",
    ),
    "key like no other": (ONE + "    zzz: x\n", 5, "categories[0].zzz", "unknown key 'zzz'; it can be id,"),
    "merge key": (ONE + "<<: {a: b}\n", 5, "<<", "unknown key '<<'"),
    "text as covers": (
        ONE + "    covers: x\n",
        5,
        "categories[0].covers",
        "expected a list, but this is the text 'x'",
    ),
    "list in covers": (
        ONE + "    covers:\n    - x\n    - [y]\n",
        7,
        "categories[0].covers[1]",
        "but this is a list",
    ),
    "empty covers": (
        ONE + "    covers: ['']\n",
        5,
        "categories[0].covers[0]",
        "expected text, but this is empty",
    ),
    "unknown kind": (
        ONE + "    applies_to:\n    - document\n    - prompts\n",
        7,
        "categories[0].applies_to[1]",
        f"unknown value 'prompts' (did you mean 'prompt'?); it can be {KINDS}.",
    ),
    "no kind": (ONE + "    applies_to: []\n", 5, "categories[0].applies_to", "at least one kind of content"),
    "null description": (ONE + "description:\n", 5, "description", "expected text, but this is empty"),
    "control character": (
        'name: "a\\x07"\ncategories: [{id: a, name: b}]',
        1,
        "name",
        "U+0007 can't stand in a policy",
    ),
    "raw control character": ("name: p\nx: \x00\n", 2, None, "the character U+0000 can't stand in YAML"),
    "control character after others": (
        "name: é\nx: é\x1f",
        2,
        None,
        "the character U+001F can't stand in YAML",
    ),
    "lone surrogate": ("name: p\nx: \ud800\n", 2, None, "lone surrogate"),
    "same key": (ONE + "name: q\n", 5, None, "the key 'name' stands on line 1 already"),
    "same key in a category": (
        ONE + "    id: B\n",
        5,
        "categories[0]",
        "the key 'id' stands on line 3 already",
    ),
    "list as key": ("? [a]\n: b", 1, None, "expected a key that is text"),
    "null as key": ("name: p\nx: {~: b}", 2, "x", "expected a key that is text"),
    "anchor": ("name: &a p\n", 1, None, ANCHORS),
    "bomb": (BOMB, 1, None, ANCHORS),
    "alias": ("name: p\ncategories: *a\n", 2, None, ANCHORS),
    "tag": ("name: p\nx: !!python/object/apply:os.system [ls]\n", 2, None, "tags (!) are refused"),
    "two documents": (ONE + "---\n" + ONE, 6, None, "a second document starts here"),
    "open bracket": ("name: [a\n", 2, None, "this is not YAML ("),
    "tab": ("name: p\n\tx: y\n", 2, None, "this is not YAML (found a tab"),
    "two colons": ("name: a: b\n", 1, None, "this is not YAML (mapping values are not allowed"),
    "unknown YAML version": ("%YAML 9.9\n---\na: b", 1, None, "this is not YAML ("),
    "100,000 brackets": ("[" * 100_000, 1, None, DEEP),
    "100,000 lists": ("- " * 100_000, 1, None, DEEP),
    "100,000 mappings": ("{a: " * 100_000, 1, None, DEEP),
    "100,000 keys": ("? " * 100_000, 1, None, "expected a key that is text"),
    "1 MiB and a byte": ("#" * (1024 * 1024 + 1), None, None, "at most 1 MiB, but this has 1.00 MiB"),
    "10 MB": ("- x\n" * 2_621_440, None, None, "at most 1 MiB, but this has 10.00 MiB"),
    "201 categories": (
        "name: p\ncategories:\n" + "".join(f"- {{id: {n}, name: n{n}}}\n" for n in range(201)),
        2,
        "categories",
        "at most 200 categories, this has 201",
    ),
}
BAD_JSON = {
    "nothing": (" \n", None, None, EMPTY),
    "open": ("{", 1, None, "this is not JSON ("),
    "comma at the end": ('{"name": "p",\n}', 2, None, "this is not JSON ("),
    "two documents": ("{}\n{}", 2, None, "this is not JSON (Extra data)"),
    "a list": ("[]", 1, None, "but this is a list"),
    "number as name": ('{"name": 1,\n"categories": []}', 1, "name", "expected text, but this is 1;"),
    "truth as name": ('{\n"name": true}', 2, "name", "expected text, but this is true;"),
    "null as categories": (
        '{"name": "p",\n"categories": null}',
        2,
        "categories",
        "expected a list, but this is empty",
    ),
    "NaN": ("NaN", 1, None, "but this is NaN"),
    "huge number": ("1" * 5000, 1, None, "a number has too many digits"),
    "same key": ('{"name": "a",\n"name": "b"}', 2, None, "the key 'name' stands on line 1 already"),
    "lone surrogate": ('{"name": "\\ud800", "categories": []}', 1, "name", "U+D800 can't stand in a policy"),
    "unknown key": ('{\n\t"nmae": "p\\u00e9 \\" {["\n}', 2, "nmae", "did you mean 'name'?"),
    "same id": (
        '{"name": "p", "categories": [\n\t{"id": "a", "name": "b"},\n\t{\n\t"name": "c",\n\t"id": "A"}]}',
        5,
        "categories[1].id",
        "'A' is the id of categories[0] too",
    ),
    "nine lists": ("[" * 9 + "]" * 9, 1, None, DEEP),
    "100,000 brackets": ("[" * 100_000, 1, None, DEEP),
    "10 MB": ("[" + " " * 10_485_760 + "]", None, None, "at most 1 MiB, but this has 10.00 MiB"),
}


def assert_is_one_sentence(message, source, line, field, sentence):
    where = source + (f", line {line}" if line else "") + (f", field {field}" if field else "")
    assert message.startswith(f"{where}: ")
    assert sentence in message
    assert message.endswith(".")
    assert len(message.splitlines()) == 1
    assert len(message) < 300


@pytest.mark.parametrize(("text", "line", "field", "sentence"), BAD_YAML.values(), ids=BAD_YAML)
def test_bad_yaml_gets_one_sentence_with_source_line_and_field(text, line, field, sentence):
    with pytest.raises(PolicyError) as caught:
        Policy.from_yaml(text, source="p.yaml")
    assert_is_one_sentence(str(caught.value), "p.yaml", line, field, sentence)


@pytest.mark.parametrize(("text", "line", "field", "sentence"), BAD_JSON.values(), ids=BAD_JSON)
def test_bad_json_gets_one_sentence_with_source_line_and_field(text, line, field, sentence):
    with pytest.raises(PolicyError) as caught:
        Policy.from_json(text, source="p.json")
    assert_is_one_sentence(str(caught.value), "p.json", line, field, sentence)


@pytest.mark.parametrize(
    "name", ["bomb", "100,000 brackets", "10 MB", "two documents", "control character after others", "tag"]
)
def test_without_libyaml_the_sentence_is_the_same(name, monkeypatch):
    monkeypatch.setattr(yaml, "__with_libyaml__", False)
    text, line, field, sentence = BAD_YAML[name]
    with pytest.raises(PolicyError) as caught:
        Policy.from_yaml(text, source="p.yaml")
    assert_is_one_sentence(str(caught.value), "p.yaml", line, field, sentence)


def test_without_libyaml_a_policy_reads_the_same(monkeypatch):
    fast = Policy.load("rsafe-18")
    monkeypatch.setattr(yaml, "__with_libyaml__", False)
    assert Policy.load("rsafe-18") == fast


@pytest.mark.parametrize("id", ["1", "no", "2024-01-01", "0x1F", "1e3", "true", "=", "1:30"])
def test_yaml_scalars_are_the_text_that_stands_there(id):
    assert Policy.from_yaml(ONE.replace("A\n", f"{id}\n", 1)).categories[0].id == id


@pytest.mark.parametrize("quoted", ["'null'", '"~"'])
def test_a_quoted_null_is_text(quoted):
    assert Policy.from_yaml(ONE.replace("Arson", quoted)).categories[0].name == quoted[1:-1]


def test_text_may_span_lines_in_yaml():
    policy = Policy.from_yaml(ONE + "    description: |\n      one\n      two\n    covers: [a\n        b]\n")
    assert policy.categories[0].description == "one two"
    assert policy.categories[0].covers == ("a b",)


def test_yaml_that_is_written_leaves_defaults_out():
    assert yaml.safe_load(Policy.from_yaml(ONE).to_yaml()) == yaml.safe_load(ONE)


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_file_may_begin_with_a_byte_order_mark(tmp_path, suffix):
    policy = Policy.from_yaml(ONE)
    path = tmp_path / f"p{suffix}"
    text = policy.to_yaml() if suffix == ".yaml" else policy.to_json()
    path.write_text(text, encoding="utf-8-sig")
    assert Policy.load(path) == policy


def test_a_policy_with_crlf_line_ends_reads_the_same_and_counts_lines_the_same(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_bytes(ONE.replace("\n", "\r\n").encode())
    assert Policy.load(path) == Policy.from_yaml(ONE)
    path.write_bytes((ONE + "    zzz: x\n").replace("\n", "\r\n").encode())
    with pytest.raises(PolicyError, match=r"p\.yaml, line 5, field categories\[0\]\.zzz"):
        Policy.load(path)


def load_error(path):
    with pytest.raises(PolicyError) as caught:
        Policy.load(path)
    return str(caught.value)


def test_a_file_that_is_not_utf_8_is_named_with_line_and_byte(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_bytes("name: p\ndescription: café\n".encode("latin-1"))
    assert_is_one_sentence(load_error(path), str(path), 2, None, "expected UTF-8, but byte 0xe9 isn't")


def test_a_file_of_10_mb_is_refused_with_its_size(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_bytes(b"- x\n" * 2_621_440)
    assert_is_one_sentence(load_error(path), str(path), None, None, "at most 1 MiB, but this has 10.00 MiB")


def test_a_missing_file_is_an_error_that_names_the_built_in_policies(tmp_path):
    path = tmp_path / "p.yaml"
    says = "there is no such file; check the path, or use a built-in policy (mlcommons, prompt-injection,"
    assert_is_one_sentence(load_error(path), str(path), None, None, says)


def test_a_path_object_is_never_a_built_in_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "there is no such file" in load_error(tmp_path / "rsafe-18")


@pytest.mark.parametrize("name", ["folder", "folder.yaml"])
def test_a_directory_is_refused(tmp_path, name):
    path = tmp_path / name
    path.mkdir()
    assert_is_one_sentence(load_error(path), str(path), None, None, "but this is a directory")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the platform has no named pipes")
def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    path = tmp_path / "p.yaml"
    os.mkfifo(path)
    assert_is_one_sentence(load_error(path), str(path), None, None, "but this is not a regular file")


def test_another_suffix_is_refused(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text(ONE)
    says = "expected a policy file whose name ends in .yaml, .yml or .json"
    assert_is_one_sentence(load_error(path), str(path), None, None, says)
    with pytest.raises(PolicyError, match=says):
        Policy.from_yaml(ONE).save(path)


@pytest.mark.parametrize("path", ["a\0b.yaml", "x" * 5000 + ".yaml", "a.yaml/b.yaml"])
def test_a_path_that_can_not_be_opened_is_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(ONE)
    message = load_error(path)
    assert "the file can't be read (" in message
    assert "\0" not in message


def test_a_policy_that_can_not_be_written_is_an_error(tmp_path):
    with pytest.raises(PolicyError, match="the file can't be written"):
        Policy.from_yaml(ONE).save(tmp_path / "missing" / "p.yaml")


def parses_or_says_why(read, argument):
    try:
        read(argument)
        message = ""
    except PolicyError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1


words = st.sampled_from(["name", "categories", "id", "covers", "a", "1", "null", "%YAML", "---", "...", "# "])
marks = st.sampled_from([*"[]{},'\"&*!?|>~:\n", ": ", ":\n", "- ", "? ", "  ", "\\u"])
fragments = st.lists(words | marks, max_size=60).map("".join)


@given(st.text() | fragments)
@example('{"a": "\\')
def test_no_text_raises_anything_but_a_policy_error(text):
    parses_or_says_why(Policy.from_yaml, text)
    parses_or_says_why(Policy.from_json, text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from(["name", "categories", "id", "x"]), inner)
    ),
)


@given(json_values)
def test_no_json_value_raises_anything_but_a_policy_error(value):
    parses_or_says_why(Policy.from_json, json.dumps(value))
    parses_or_says_why(Policy.from_yaml, json.dumps(value))


@given(st.binary() | st.binary().map(lambda end: ONE.encode() + end))
def test_no_bytes_in_a_file_raise_anything_but_a_policy_error(tmp_path_factory, content):
    for suffix in (".yaml", ".json"):
        path = tmp_path_factory.getbasetemp() / f"any{suffix}"
        path.write_bytes(content)
        parses_or_says_why(Policy.load, path)


def test_importing_policies_leaves_the_yaml_library_out():
    code = "import sys, rsafe_plugins.policy; sys.exit('yaml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_policy_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    many = tuple(f"{number} {'x' * 900}" for number in range(100))
    categories = tuple(Category(id=f"C{n}", name=f"N{n}", allows=many) for n in range(20))
    with pytest.raises(PolicyError, match="at most 1 MiB"):
        Policy(name="p", categories=categories).save(tmp_path / "p.yaml")
    assert not (tmp_path / "p.yaml").exists()
