"""Saves the steps of a small state in a store; a process that stores_test.py kills and starts again.

It is called with the directory, the last step, the file that the store's killer reads, and a list of kills [at, executed].
Each start is forked from this process, which imports once.
"""

import json
import os
import pathlib
import sys

import numpy as np

from espalier.trainers.checkpoints.checkpoint import Checkpointer


def state(step):
    """Returns the state after `step` updates: each update maps it to the next one."""
    w, b = np.arange(12, dtype=np.float32).reshape(3, 4), np.ones(5, np.float32)
    for update in range(1, step + 1):
        w, b = update_of(w, b, update)
    return {"params": {"w": w, "b": b}, "step": np.array(step)}


def update_of(w, b, update):
    return w * np.float32(1.01) + np.float32(update), b / np.float32(1.1) + w.sum(dtype=np.float32)


def train(directory, last):
    """Goes on from the newest good step and saves each of the following; prints what it went on from and what is saved."""
    import jax

    with Checkpointer(directory, keep_last=2) as checkpointer:
        restored = checkpointer.restore_latest(jax.eval_shape(lambda: state(0)))
        now = state(0) if restored is None else jax.device_get(restored.state)
        print(f"from {int(now['step'])}", flush=True)
        for step in range(int(now["step"]) + 1, last + 1):
            w, b = update_of(now["params"]["w"], now["params"]["b"], step)
            now = {"params": {"w": w, "b": b}, "step": np.array(step)}
            checkpointer.save(step, jax.tree.map(jax.numpy.asarray, now))
            checkpointer.wait()
            print(f"saved {step}", flush=True)


def main(directory, last, plan, kills):
    for kill in [*json.loads(kills), None]:
        print("start", flush=True)
        if not (pid := os.fork()):
            if kill is not None:
                partial = pathlib.Path(f"{plan}.new")
                partial.write_text(json.dumps([os.getpid(), *kill]))
                partial.rename(plan)
            train(directory, int(last))
            os._exit(0)
        print(f"ended {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}", flush=True)
        pathlib.Path(plan).unlink(missing_ok=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
