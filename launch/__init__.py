import sys

# `python -m launch.NAME` imports this folder under its own name, in which nothing else may be imported: it would be a second copy.
if __name__ != "espalier.launch" and sys.argv[:1] != ["-m"]:
    raise ImportError(
        "import espalier.launch in place of launch; its folders have the names of commands: submit in place of cluster"
    )
