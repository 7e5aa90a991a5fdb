"""Hosts that differ end with one error in every process."""

import json
import threading

import pytest

from espalier.launch.processes import hosts, peers


class Store:
    """The coordinator's store for threads in the place of processes."""

    def __init__(self):
        self._values, self._change = {}, threading.Condition()

    def key_value_set(self, key, value):
        with self._change:
            self._values[key] = value
            self._change.notify_all()

    def blocking_key_value_get(self, key, milliseconds):
        with self._change:
            assert self._change.wait_for(lambda: key in self._values, timeout=10)
            return self._values[key]


@pytest.fixture
def run(monkeypatch):
    """Calls a function in threads that stand for processes; returns their errors."""
    import jax

    index, store = threading.local(), Store()
    monkeypatch.setattr(jax, "process_index", lambda: index.value)
    monkeypatch.setattr(peers, "store", lambda: store)

    def start(function, count):
        monkeypatch.setattr(jax, "process_count", lambda: count)
        errors = [None] * count

        def work(i):
            index.value = i
            try:
                function(i)
            except Exception as error:
                errors[i] = error

        threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return errors

    return start


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("code", ("a1", "a1", "b2"), "in their code: process 2 on .* has 'b2', process 0 .* 'a1'"),
        (
            "packages",
            ("jax 1", "jax 2", "jax 2"),
            r"packages: process 1 on \S+ \(and 1 more\) has 'jax 2'",
        ),
        ("devices", ("4 v5e", "4 v5e", "4 v4"), "has '4 v4', process 0 on .* has '4 v5e'"),
        (
            "configuration",
            ("A = 1\nB = 2", "A = 1\nB = 3", "A = 1\nB = 2"),
            "has 'B = 3', .* has 'B = 2'",
        ),
        ("configuration", ("A = 1", "A = 1\nB = 3", "A = 1"), "has 'B = 3', .* has ''"),
        ("held-out prose", ("a1", "a1", "b2"), "in their held-out prose: .*let all hosts read"),
    ],
)
def test_a_difference_is_the_same_error_everywhere(run, key, values, message):
    errors = run(lambda i: hosts.check_same("start", {key: values[i]}), 3)
    assert len({str(error) for error in errors}) == 1
    with pytest.raises(hosts.HostsDisagreeError, match=message):
        raise errors[0]
    assert "Remedy: " in str(errors[0])


def test_equal_hosts_go_on(run):
    assert run(lambda i: hosts.check_same("data", {"data": "x"}), 3) == [None] * 3


def test_a_folder_that_is_not_shared_is_an_error(run, tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "_VISIBLE_SECONDS", 0.5)
    folders = [tmp_path / "a", tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    errors = run(lambda i: hosts.check_shared(str(folders[i])), 3)
    assert all("MODEL_DIR: process 2" in str(error) for error in errors), errors
    assert "a folder on a file system that all hosts share" in str(errors[0])


def test_a_shared_folder_passes(run, tmp_path):
    assert run(lambda i: hosts.check_shared(str(tmp_path)), 2) == [None] * 2


def test_the_code_has_a_digest_of_its_files(tmp_path, monkeypatch):
    digest = hosts._code_digest()
    assert digest == hosts._code_digest() and len(digest) == 16
    (tmp_path / "espalier/launch").mkdir(parents=True)
    (tmp_path / "espalier/launch/x.py").write_text("1")
    monkeypatch.setattr(hosts.environment, "IMPORTED_FROM", str(tmp_path))
    first = hosts._code_digest()
    (tmp_path / "espalier/launch/x.py").write_text("2")
    assert first != hosts._code_digest() != digest
    json.dumps(hosts._packages())


@pytest.mark.parametrize(
    ("tasks", "node", "local", "per_task", "visible", "gpus"),
    [
        ("1(x2)", "1", "0", None, 8, list(range(8))),  # one process for all GPUs of a host
        ("8(x2)", "0", "3", None, 8, None),  # one for each: JAX's own choice
        ("8(x2)", "0", "3", "1", 1, [0]),  # --gpus-per-task shows each process its own
        ("2", "0", "1", "2", 2, [0, 1]),
        ("2", "0", "1", "a100:4", 4, [0, 1, 2, 3]),
        ("2", "0", "1", "4", 8, [4, 5, 6, 7]),  # --gpu-bind=none shows all of them
        ("2(x3),1", "3", "0", None, 4, [0, 1, 2, 3]),
        ("2(x3),1", "2", "1", None, 4, [2, 3]),
        ("2", "0", "0", None, 0, None),  # no GPUs
        ("x", "0", "0", None, 4, None),
    ],
)
def test_gpus_of_a_process_under_slurm(tasks, node, local, per_task, visible, gpus):
    environment = {
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURM_NODEID": node,
        "SLURM_LOCALID": local,
        **({} if per_task is None else {"SLURM_GPUS_PER_TASK": per_task}),
    }
    assert peers.share(environment, visible) == gpus
    assert peers.share({}, visible) is None
