"""Builds a wheel, checks what it holds, and trains with it: in a new environment, from a folder with a user's own modules.

  python tests/wheel.py

The environment has this Python's other packages, so that nothing is downloaded.
"""

import os
import pathlib
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = ("model", "trainers", "data", "launch")


def build(folder: pathlib.Path) -> pathlib.Path:
    """Builds the wheel in a folder, and checks its content."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        f"--wheel-dir={folder}",
        ".",
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    (wheel,) = folder.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"espalier"}, tops
    of_project = subprocess.run(
        ["git", "ls-files", *FOLDERS, "t5x_configs", "espalier"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    wanted = {
        file if file.startswith("espalier/") else f"espalier/{file}"
        for file in of_project
        if file.endswith((".py", ".gin", ".html", ".css", ".js", "page.md", ".yaml"))
    }
    assert not (missing := wanted - set(names)), f"the wheel lacks {sorted(missing)}"
    assert not any(name.startswith("espalier/tests") for name in names)
    return wheel


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        wheel = build(folder)
        venv.create(folder / "env", with_pip=True)
        python = folder / "env" / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True)
        (site,) = (folder / "env" / "lib").glob("python*/site-packages")
        (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
        own = folder / "own"
        own.mkdir()
        for name in ("model", "data"):  # of a user: they are never imported
            (own / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the user was run')\n")
        sizes = [f"--gin.config.TransformerConfig.{n}=16" for n in ("embed_dim", "mlp_dim")]
        flags = [
            *(
                f"--gin_file=t5x_configs/{f}.gin"
                for f in ("models/tiny", "data/bytes", "runs/pretrain")
            ),
            *("--gin.MODEL_DIR=run", "--gin.MIXTURE_OR_TASK_NAME=python", "--gin.TRAIN_STEPS=3"),
            *("--gin.BATCH_SIZE=8", "--gin.TASK_FEATURE_LENGTHS={'targets': 64}", *sizes),
            "--gin.EVAL_STEPS=1",
        ]
        console = folder / "env" / "bin" / "espalier"
        environment = {**os.environ, "ESPALIER_CACHE": str(folder / "cache")}
        subprocess.run([console, "train", *flags], cwd=own, env=environment, check=True)
        load = "import espalier; run = espalier.load('run'); print(espalier.__file__, run.generate(['def '], max_new_tokens=4))"
        done = subprocess.run(
            [python, "-P", "-c", load], cwd=own, check=True, capture_output=True, text=True
        )
        assert str(site) in done.stdout, done.stdout
        print(f"{wheel.name} trains from another folder: {done.stdout.strip()}")


if __name__ == "__main__":
    main()
