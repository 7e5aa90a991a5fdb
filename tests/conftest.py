"""Eight simulated CPU devices, exact products, no silent rank promotion, and programs that are compiled once."""

import atexit
import gc
import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and run little: programs that are optimised less halve their time.
XLA_FLAGS = {
    "xla_force_host_platform_device_count": 8,
    "xla_backend_optimization_level": 0,
    "xla_cpu_parallel_codegen_split_count": 1,
}
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # The older emitter of fused loops compiles a training step three times faster; later versions lack it,
    # and XLA ends the process at a flag that it does not know.
    XLA_FLAGS["xla_cpu_use_fusion_emitters"] = "false"
for name, value in XLA_FLAGS.items():
    flags = os.environ.get("XLA_FLAGS", "")
    if name not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{name}={value}".strip()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Workers and the processes that tests start compile each module once, also where images turn this off.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Test files, worker processes and the processes that tests start share compiled programs; in a folder that is given, the
# next run of the tests does too.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = tempfile.mkdtemp(prefix="espalier-test-programs-")
    atexit.register(shutil.rmtree, _programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

import jax  # noqa: E402
import pytest  # noqa: E402

TESTS = pathlib.Path(__file__).parent

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


# Files that take longest, which begin first: no worker is left with one at the end while others have nothing to do.
LONGEST = (
    "methods_test.py",
    "python_docs_test.py",
    "launch/papers/code_mix/recipes_test.py",
    "launch/papers/shared/stored_pages_test.py",
    "trainers/influence/fit_test.py",
    "launch/influence/influence_test.py",
    "launch/released_mixture_test.py",
    "launch/stores_test.py",
    "trainers/checkpoints/stores_test.py",
    "launch/resume_test.py",
    "launch/t5_adapters_test.py",
    "launch/adapters_test.py",
    "launch/papers/preference/preference_test.py",
    "launch/papers/nexus/nexus_test.py",
    "launch/sweep_test.py",
    "launch/load/hf_checkpoint_test.py",
    "launch/sweep/made_arms_test.py",
    "launch/finetune_test.py",
    "launch/distillation_test.py",
    "launch/quickstart_test.py",
    "trainers/partitioning_test.py",
    "trainers/influence/backward_test.py",
    "trainers/loop_test.py",
)


def pytest_configure(config):
    # xdist would begin with the files that have most tests.
    config.option.loadscopereorder = False
    if missing := [file for file in LONGEST if not (TESTS / file).exists()]:
        raise pytest.UsageError(
            f"LONGEST in {__file__} has files that are elsewhere now: {missing}"
        )


def pytest_collection_modifyitems(items):
    """Puts the longest files first; within a file, and for the others, the order stays. Skips what needs Apache Beam."""
    if importlib.util.find_spec("apache_beam") is None:
        skip = pytest.mark.skip(reason="Apache Beam is not installed here: make test-beam")
        for item in items:
            if item.get_closest_marker("beam"):
                item.add_marker(skip)
    places = {str(TESTS / file): place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(str(item.path), len(places)))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Imports and tracing allocate much that stays: few garbage collections, none of which visits what was imported."""
    gc.disable()
    result = yield
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    gc.enable()
    return result


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_module_in_memory():
    """Compiled programs of a test file leave memory with it: the next file's collections are quicker."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def programs_of_absent_chips_are_not_stored(request):
    """A program for hundreds of chips takes long to write, and no other test would read it."""
    if request.node.get_closest_marker("tpu") is None:
        yield
        return
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


@pytest.fixture
def compiled():
    """The names of all programs that jax compiles or reads from its cache in this test, those of single operations too."""
    from jax import monitoring

    jax.clear_caches()  # what other tests have compiled would not be counted
    names = []

    def record(event, duration, **facts):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(facts.get("fun_name"))

    monitoring.register_event_duration_secs_listener(record)
    yield names
    monitoring.unregister_event_duration_listener(record)


@pytest.fixture(autouse=True, scope="module")
def seqio_registries_as_found():
    """SeqIO's registries are global: what a module's tests register ends with the module."""
    before = _registered()
    yield
    if "espalier.data.tasks" in sys.modules:
        sys.modules["espalier.data.tasks"].clear()
    for kind, names in _registered().items():
        for name in names - before.get(kind, set()):
            getattr(sys.modules["seqio"], kind).remove(name)


def _registered():
    seqio = sys.modules.get("seqio")  # importing it takes seconds, and most tests do without
    kinds = ("MixtureRegistry", "TaskRegistry") if seqio else ()
    return {kind: set(getattr(seqio, kind).names()) for kind in kinds}


@pytest.fixture(scope="session")
def _stores():
    """Object stores on this machine, started when a test needs one; clients read their environment once in a process."""
    import contextlib

    from tests.faults import object_stores

    with contextlib.ExitStack() as stack:
        started = {}

        def start(scheme: str):
            package = object_stores.PACKAGES[scheme]
            pytest.importorskip(package, reason="the extra test_stores is not installed")
            if scheme not in started:
                started[scheme] = stack.enter_context(getattr(object_stores, scheme)())
                os.environ.update(started[scheme].environment)
            return started[scheme]

        yield start
        for store in started.values():
            for name in store.environment:
                os.environ.pop(name, None)


@pytest.fixture(params=["s3", "gs"])
def store(request, _stores, monkeypatch, tmp_path):
    """A store with an empty bucket (`store.address`), of each kind."""
    running = _stores(request.param)
    running.new_bucket()
    monkeypatch.setenv("ESPALIER_COPIES", str(tmp_path / "copies"))
    yield running
    running.fault = None
