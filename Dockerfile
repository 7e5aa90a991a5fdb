# The locked environment: Python 3.11 with the versions in constraints/py311.txt, as `make venv` installs them.
#   docker build -t espalier . && docker run --rm -it espalier
# For NVIDIA GPUs: docker build --build-arg EXTRA=cuda -t espalier . && docker run --rm -it --gpus=all espalier
# For the workers and drivers of Apache Beam: docker build --target=beam -t espalier-beam .
FROM python:3.11-slim-bookworm AS base

# git: runs record their commit. gcc: `tests.faults` compiles a library.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc git libc6-dev make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /espalier
# Only what the environment depends on, so that a change of code does not install it again.
COPY Makefile README.md pyproject.toml setup.py ./
COPY constraints constraints
# The package's own folder and its links, by which the installed package is known.
COPY espalier espalier

# Beam's versions are not those of constraints/py311.txt. Its image has the program that starts workers.
FROM base AS beam
RUN make beam
COPY --from=apache/beam_python3.11_sdk:2.77.0 /opt/apache/beam /opt/apache/beam
COPY . .
ENV PATH=/espalier/.venv-beam/bin:$PATH RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1
ENTRYPOINT ["/opt/apache/beam/boot"]

FROM base
RUN make venv

ARG EXTRA=
RUN [ -z "$EXTRA" ] || .venv/bin/pip install -q -c constraints/py311.txt \
    -e ".[$EXTRA]"

COPY . .
ENV PATH=/espalier/.venv/bin:$PATH
CMD ["espalier", "quickstart"]
