"""Chat templates: rendered as transformers does, refused with one error, and kept in a sandbox."""

import json
import pathlib

import jinja2
import pytest

from espalier.data.limited_process import LimitedProcess
from espalier.data.tokenizers import chat_sandbox, chat_template
from espalier.data.tokenizers.chat_template import ChatTemplate, ChatTemplateError

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
GOLDEN = json.loads((GOLDENS / "chat_templates.json").read_bytes())
SOURCES = {path.stem: path.read_text("utf-8") for path in (GOLDENS / "chat_templates").iterdir()}
USER = [{"role": "user", "content": "hi"}]


def template(source, **variables):
    return ChatTemplate({"default": source}, variables)


def render_case(case, source):
    extra = {key: GOLDEN[key] if case["extra"] else None for key in ("tools", "documents")}
    return template(source, **GOLDEN["tokens"]).render(
        GOLDEN["conversations"][case["conversation"]],
        add_generation_prompt=case["prompt"],
        **extra,
    )


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_conversations_are_rendered_as_transformers_renders_them(name):
    cases = [case for case in GOLDEN["cases"] if case["template"] == name]
    assert len(cases) == 40 and any("text" in case for case in cases)
    for case in cases:
        if "text" in case:
            assert render_case(case, SOURCES[name]) == case["text"], case
        else:
            with pytest.raises(ChatTemplateError) as error:
                render_case(case, SOURCES[name])
            # What a filter says of a value's type is worded by Python.
            assert case["error"] in str(error.value), case


def test_the_command_format_is_built_in():
    """Against the template in another style, as transformers renders it; and the words of section 2.6."""
    cases = [case for case in GOLDEN["cases"] if case["template"] == "cohere" and not case["extra"]]
    rendered = 0
    for case in cases:
        # A later system message, which that template leaves out without a word, is an error here.
        if "text" in case and case["conversation"] != "system later":
            assert render_case(case, chat_template.COMMAND) == case["text"]
            rendered += 1
        else:
            with pytest.raises(ChatTemplateError):
                render_case(case, chat_template.COMMAND)
    assert rendered >= 6
    found = chat_template.named("command", {"bos_token": "<BOS_TOKEN>"})
    said = [{"role": "system", "content": " S "}, *USER, {"role": "assistant", "content": "yo\n"}]
    assert found.render(said, add_generation_prompt=True) == (
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>S<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>hi<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>yo<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
    )
    with pytest.raises(ChatTemplateError, match="alternate.*message 2 of them has the role user"):
        found.render([*USER, *USER])


def test_spans_are_what_the_assistant_says():
    said = [
        *USER,
        {"role": "assistant", "content": "hi"},
        *USER,
        {"role": "assistant", "content": ""},
    ]
    rendered = chat_template.named("command").render_spans(said)
    words = [rendered.text[start:end] for start, end in rendered.spans]
    assert words == ["hi<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"]
    before = rendered.text[: rendered.spans[0][0]]
    assert before.endswith(
        "<|USER_TOKEN|>hi<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
    )
    assert rendered.spans[1][1] == len(rendered.text)


BLOCK = "{% generation %}b{% endgeneration %}"


@pytest.mark.parametrize(
    ("source", "spans"),
    [
        (f"a{BLOCK}{{% macro m() %}}<{BLOCK}>{{% endmacro %}}{{{{ m() }}}}", [(1, 2), (3, 4)]),
        (f"{{% filter trim %}} a{BLOCK}{{% endfilter %}}", [(1, 2)]),
        (f"{{% filter upper %}}a{BLOCK}{{% endfilter %}}", None),
        (f"{{% filter replace('b', '') %}}a{BLOCK}{{% endfilter %}}c", None),
        (f"{{% filter trim %}}b{BLOCK}{{% endfilter %}}", None),
        (f"{{% set x %}}{BLOCK}{{% endset %}}c", None),
        (f"{{% set x %}}{BLOCK}{{% endset %}}", None),
    ],
)
def test_a_span_that_a_filter_moves_is_right_or_one_clear_error(source, spans):
    template = chat_template.ChatTemplate({"default": source}, {})
    if spans is None:
        assert isinstance(template.render(USER), str)
        with pytest.raises(ChatTemplateError, match="Put filters inside the block"):
            template.render_spans(USER)
    else:
        assert list(template.render_spans(USER).spans) == spans


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ range.__globals__['json'] }}",
        "{{ dict.__globals__.x }}",
        "{{ cycler.__init__.__globals__.os.popen('id') }}",
        "{{ self.__init__.__globals__ }}",
        "{% set n = namespace(__class__=1) %}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{% include '/etc/passwd' %}",
        "{% import '/etc/passwd' as x %}",
        "{{ open('/etc/passwd').read() }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10**10 }}",
        "{{ 10**10 * [1] }}",
        "{{ 9 ** 99999999999 }}",
        "{{ '%099999999999d' % 1 }}",
        "{{ '%*d' % (10**11, 1) }}",
        "{{ '{:99999999999}'.format(1) }}",
        "{{ '{:{}}'.format(1, 10**11) }}",
        "{{ 'a'.ljust(10**11) }}",
        "{{ 'a' | center(10**11) }}",
        "{{ '%099999999999d' | format(1) }}",
        "{% for i in range(999) %}{{ 'a' * 99999 }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ nothing.at.all }}",
        "{% if %}",
        "{{ 1 / 0 }}",
        "{{ raise_exception('refused') }}",
    ],
)
def test_what_a_template_must_not_do_is_one_error(source, monkeypatch):
    monkeypatch.setattr(chat_sandbox, "CPU_SECONDS", 0.5)
    with pytest.raises(ChatTemplateError, match="^chat template: .") as error:
        template(source).render(USER)
    assert "root:" not in str(error.value)


def test_ordinary_widths_and_loops_are_not_refused():
    source = (
        "{{ 'abc' | indent(2) }}{{ 'a'.ljust(3) }}{{ '%05d|%s' % (3, 100) }}{{ '{:>5}'.format(1) }}"
        "{{ '%s' | format(2) }}{{ 'x' | center(5) }}{{ 7 % 4 }}{{ [1] * 3 }}{{ 2 ** 10 }}"
        "{% for i in range(50000) %}{% endfor %}{{ dict(a=1) }}{{ strftime_now('%Y') | length }}"
    )
    expected = "abca  00003|100    12  x  3[1, 1, 1]1024{'a': 1}4"
    assert template(source).render(USER) == expected
    # The steps are counted anew each time.
    source = f"{{% for i in range({chat_sandbox.MAX_STEPS // 20}) %}}{{% endfor %}}"
    for _ in range(30):
        assert template(source).render(USER) == ""


def test_tojson_keeps_what_html_would_escape():
    value = [{"role": "user", "content": "<a & 'b'>é"}]
    found = template("{{ messages[0].content | tojson }}").render(value)
    assert found == "\"<a & 'b'>é\""
    assert (
        jinja2.Environment().from_string("{{ x | tojson }}").render(x=value[0]["content"]) != found
    )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ("hi", "at least one message"),
        (["hi"], "message 1 is not of the form"),
        ([*USER, {"content": "a"}], "message 2 is not of the form"),
        ([{"role": 3, "content": "a"}], "message 1 is not of the form"),
        ([{"role": "", "content": "a"}], "message 1 has an empty role"),
        ([{"role": "user", "content": {1, 2}}], "messages are not what JSON can hold"),
        ([*USER, {"role": "asistant", "content": "b"}], "message 2 has the role 'asistant'"),
    ],
)
def test_wrong_messages_are_named(messages, message):
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}U{{ m.content }}{% elif m.role == 'assistant' %}"
        "A{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ChatTemplateError, match=message):
        template(source).render(messages)


def test_a_role_that_the_template_writes_is_not_refused():
    said = [{"role": "narrator", "content": " Once "}]
    assert template(
        "{% for m in messages %}{{ m.role }}:{{ m.content | trim }}{% endfor %}"
    ).render(said) == ("narrator:Once")


def test_templates_are_found_where_checkpoints_have_them(tmp_path):
    def read(config):
        return chat_template.read(tmp_path, config, {"bos_token": "<s>"})

    assert read({}) is None
    assert read({"chat_template": "{{ bos_token }}1"}).render(USER) == "<s>1"
    several = read(
        {
            "chat_template": [
                {"name": "default", "template": "plain"},
                {"name": "tool_use", "template": "tools"},
            ]
        }
    )
    assert several.render(USER) == "plain"
    assert several.render(USER, tools=[]) == "tools"
    assert several.render(USER, tools=[], name="default") == "plain"
    with pytest.raises(ChatTemplateError, match="no template 'rag'; there is default, tool_use"):
        several.render(USER, name="rag")
    with pytest.raises(ChatTemplateError, match="tokenizer_config.json: chat_template is neither"):
        read({"chat_template": [3]})
    # Files come before the entry, as in transformers.
    (tmp_path / "chat_template.jinja").write_text("file\n")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("rag")
    found = read({"chat_template": "entry"})
    assert (found.render(USER), found.render(USER, name="rag")) == ("file", "rag")
    assert chat_template.named(str(tmp_path / "chat_template.jinja")).render(USER) == "file"
    with pytest.raises(ChatTemplateError, match="no chat template 'comand'.*command"):
        chat_template.named("comand")


def test_the_process_of_a_template_writes_no_bytecode():
    process = LimitedProcess("builtins:eval", memory_bytes=1 << 30)
    try:
        without = process.call(
            "__import__('sys').dont_write_bytecode", cpu_seconds=5, wall_seconds=30
        )
    finally:
        process.close()
    assert without is True
