"""Markup and documentation: READMEs of packages, their manuals, templates and style sheets."""

from collections.abc import Iterator

from espalier.data.text.sources import code, environment

SUFFIXES = (".md", ".rst", ".html", ".txt", ".css", ".xml", ".toml", ".yaml", ".tex", ".sty")
# Word lists, class labels, checksums and notices under the same suffixes.
SKIPPED = ("licen", "copying", "notices", "_stopwords", "tensorflow_datasets/", "/iso", "test_data")

# Packages of which only the README in their metadata is read.
README_PACKAGES = (
    *("attrs", "beartype", "certifi", "charset-normalizer", "cycler", "distlib", "dm-tree"),
    *("einops", "filelock", "gast", "google-pasta", "grpcio", "h5py", "humanize", "idna"),
    *("immutabledict", "iniconfig", "jaxtyping", "kiwisolver", "markdown-it-py", "mdurl"),
    *("mimesis", "ml_dtypes", "msgpack", "namex", "opt_einsum", "optree", "packaging"),
    *("platformdirs", "polib", "prometheus-client", "promise", "psutil", "pyparsing", "pytest"),
    *("python-dateutil", "pythonbible", "pyyaml", "safetensors", "sentencepiece", "six"),
    *("snowballstemmer", "sqlparse", "tensorstore", "termcolor", "typing_extensions", "virtualenv"),
    *("wrapt", "zipp", "zstandard"),
)


PACKAGES = (*code.PYTHON_PACKAGES, *README_PACKAGES)


def candidates(env: environment.Environment) -> Iterator[environment.Candidate]:
    """Yields whole files, and one README per package."""
    for package in code.PYTHON_PACKAGES:
        for name, path in env.files(package, SUFFIXES):
            if not any(part in name.lower() for part in SKIPPED):
                yield code.candidate(f"markup/{name}", name, path)
    for package in PACKAGES:
        if package != "python" and (text := env.description(package)):
            yield environment.Candidate.of_text(f"markup/README/{package}", text)
