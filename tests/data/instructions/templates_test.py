"""Prompt templates against texts rendered by hand."""

import itertools
import pathlib

import pytest

from espalier.data.instructions import templates
from espalier.data.instructions.templates import Rendered, Row
from espalier.data.text.documents import DataError

PROMPTSOURCE = """
dataset: super_glue
subset: rte
templates:
  2b52a83c-0021-41fe-b44c-5aaa076d71a2: !Template
    answer_choices: Yes ||| No
    id: 2b52a83c-0021-41fe-b44c-5aaa076d71a2
    jinja: '{{premise}} Is it true that "{{hypothesis}}"?
      ||| {% if label != -1 %}{{ answer_choices[label] }}{% endif %}'
    metadata: !TemplateMetadata
      choices_in_prompt: false
      languages:
      - en
      metrics:
      - Accuracy
      original_task: true
    name: is it true
    reference: ''
  8fb1c6aa-0000-41fe-b44c-5aaa076d71a2: !Template
    answer_choices: null
    id: 8fb1c6aa-0000-41fe-b44c-5aaa076d71a2
    jinja: '{% if label == 0 %}Draw a conclusion: {{premise}} ||| {{hypothesis}}{% endif %}'
    metadata: !TemplateMetadata
      choices_in_prompt: null
      metrics: []
      original_task: false
    name: Draw a conclusion!
    reference: ''
"""
ROW = {"premise": "It rains. ||| So", "hypothesis": "It is wet", "label": 0}


@pytest.fixture
def read(tmp_path):
    def call(text):
        path = tmp_path / "templates.yaml"
        path.write_text(text)
        return templates.read(path)

    return call


@pytest.fixture
def render(read):
    """Renders rows with one template of fields; returns its texts."""

    def call(*rows, **fields):
        lines = "".join(f"  {key}: {value!r}\n" for key, value in fields.items())
        (template,) = read(f"templates:\n- name: one\n{lines[1:] and lines}")
        placed = [Row(f"x.jsonl:{n}", f"x.jsonl, line {n}", row) for n, row in enumerate(rows, 1)]
        return [texts for _, texts in template.render(placed)]

    return call


def test_files_of_promptsource_are_read_and_rendered(read):
    draw, true = read(PROMPTSOURCE)
    assert (draw.slug, true.slug) == ("draw_a_conclusion", "is_it_true")
    assert (draw.original_task, true.original_task) == (False, True)
    placed = [Row("a", "x", ROW), Row("b", "x", ROW | {"label": 1})]
    first, second = true.render(placed)
    question = 'It rains. ||| So Is it true that "It is wet"?'
    assert first == (placed[0], Rendered(question, "Yes", ("Yes", "No")))
    assert second == (placed[1], Rendered(question, "No", ("Yes", "No")))
    assert list(draw.render(placed)) == [
        (placed[0], Rendered("Draw a conclusion: It rains. ||| So", "It is wet")),
        (placed[1], None),
    ]


def test_filters_of_promptsource_do_not_depend_on_other_rows(render):
    rows = [{"answers": ["b", "a", "a", "b", "c"], "label": 1, "names": ["x", "y"]}] * 90
    fields = {
        "jinja": "{{ answers | most_frequent | join(' ') }} {{ 'pqrstuvw' | list | choice }} ||| "
        "{{ answer_choices[label] }}",
        "answer_choices": "{% for n, a in zip(names, answers) %}{{n}}{{a}} ||| {% endfor %}z",
    }
    results = render(*rows, **fields)
    assert {each.inputs[:3] for each in results} == {"b a"}
    assert {(each.target, each.choices) for each in results} == {("ya", ("xb", "ya", "z"))}
    drawn = [each.inputs[4:] for each in results]
    assert set(drawn) == set("pqrstuvw")
    assert [each.inputs[4:] for each in render(*rows[:70], **fields)] == drawn[:70]


YES = {"answer_choices": "yes ||| no"}


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        ({"b": 1}, {"jinja": "{{a}} ||| x"}, "the row has no field 'a'; present are 'b'"),
        ({"a": 1}, {"jinja": "{{a.b.c}} ||| x"}, "has no attribute 'b'"),
        (
            {"a": 1},
            {"jinja": "{{a}} ||| maybe", **YES},
            "'maybe' is none of the answer choices 'yes', 'no'",
        ),
        ({"a": " "}, {"jinja": "x ||| {{a}}"}, "the target is empty"),
        ({"a": " "}, {"jinja": "{{a}} ||| x"}, "the input is empty"),
        ({"a": 1}, {"jinja": "x ||| y", "answer_choices": "y ||| "}, "an answer choice is empty"),
        (
            {"a": 1},
            {"jinja": "x ||| y", "answer_choices": "y ||| " * 1001 + "y"},
            "it has 1,002 answer choices, more than 1,000",
        ),
        ({"a": 1}, {"jinja": "x ||| y ||| z"}, "it renders 3 parts"),
        ({"a": 1}, {"jinja": "{{ ''.__class__.mro() }} ||| x"}, "SecurityError"),
        (
            {"a": 1},
            {
                "jinja": "{% for i in range(9999) %}{% for i in range(9999) %}{% endfor %}{% endfor %} ||| x"
            },
            "its ranges count more than 1,000,000 steps",
        ),
    ],
)
def test_an_error_names_file_template_and_row(render, row, fields, message):
    with pytest.raises(DataError) as raised:
        render({"a": "good", "b": 2} if "a" not in str(fields) else row, row, **fields)
    text = str(raised.value)
    assert "templates.yaml, template 'one', x.jsonl, line " in text and message in text


GOOD = "{name: one, jinja: 'x ||| y'}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "there is no list or mapping 'templates'"),
        ("templates: []", "there is no list or mapping 'templates'"),
        ("templates: [1]", "template 1: it is a int, not a mapping"),
        (f"templates: [{GOOD}, {GOOD}]", "'one' and 'one' would name one task, 'one'; rename one"),
        (f"templates: {{a: {GOOD}, a: {GOOD}}}", "the key 'a' is repeated"),
        (
            f"x: &x {{a: b}}\ntemplates: {{<<: *x, a: {GOOD}}}",
            "merged mappings ('<<') are not supported",
        ),
        ("templates: {[1]: 2}", "a key is a list or mapping"),
        ("templates: 2001-13-01", "malformed YAML: month must be in 1..12"),
        ("templates: [" + "1," * 1001 + "]", "it has 1,001 templates, more than 1,000"),
        ("x" * (1 << 20) + "y", "it is larger than 1,048,576 bytes"),
        ("templates: [{name: yes, jinja: 'x ||| y'}]", "'name' is True; write a text"),
        ("templates: [{name: one}]", "template 'one': 'jinja' is None"),
        ("templates: [{name: one, jinja: x}]", "'jinja' has no '|||'"),
        ("templates: [{name: one, jinja: '{{ ||| y'}]", "template 'one': syntax error in line 1"),
        ("templates: [{name: one, jinja: 'x ||| y', choices: a}]", "unknown key 'choices'"),
        (
            "templates: [{name: one, jinja: 'x ||| y', metadata: {original_task: 'no'}}]",
            "write true or",
        ),
        ("templates: [!Python x]", "malformed YAML: could not determine a constructor"),
    ],
)
def test_malformed_files_are_one_error(read, text, message):
    with pytest.raises(DataError) as raised:
        read(text)
    assert "templates.yaml" in str(raised.value) and message in str(raised.value)


@pytest.mark.parametrize(
    "entry", ["name: *i, jinja: x", "name: one, jinja: *i", "name: *j, *j : x"]
)
def test_values_that_aliases_make_endless_are_not_written_out(read, entry):
    lists = [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in itertools.pairwise("abcdefghi")]
    text = "\n".join(["a: &a [x]", *lists, f"j: &j {'y' * 300_000}", f"templates: [{{{entry}}}]"])
    with pytest.raises(DataError) as raised:
        read(text)
    assert "templates.yaml" in str(raised.value) and len(str(raised.value)) < 1000


def test_a_file_that_does_not_exist(tmp_path):
    with pytest.raises(DataError, match="the templates cannot be read"):
        templates.read(pathlib.Path(tmp_path / "none.yaml"))
