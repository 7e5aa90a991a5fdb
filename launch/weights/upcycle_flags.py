"""Flags of `launch.upcycle` and `launch.upcycle extend`, and the names that they give to experts."""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from launch.run import load_run

METHODS = ("btx", "bam", "nexus", "soup")
ROUTERS = ("projection", "linear", "mlp")


def split(expert: str) -> tuple[str | None, str]:
    """Name and directory of `NAME=DIR`; None for a name that is not given."""
    name, equals, path = expert.partition("=")
    return (name, path) if equals and name and os.sep not in name else (None, expert)


def default_files(flags: argparse.Namespace) -> Sequence[str]:
    """The configuration of the first model's run."""
    checkpoint = split(flags.experts[0])[1]
    return load_run.default_files(argparse.Namespace(**vars(flags), checkpoint=checkpoint))


def mixture_files(flags: argparse.Namespace) -> Sequence[str]:
    """The configuration of the mixture's run."""
    return load_run.default_files(argparse.Namespace(**vars(flags), checkpoint=flags.moe))


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `launch.upcycle`."""
    models = parser.add_argument_group("models")
    models.add_argument("--method", required=True, choices=METHODS, help="what becomes experts")
    models.add_argument(
        "--experts",
        required=True,
        nargs="+",
        metavar="NAME=DIR",
        help="runs or steps in the order of the experts, with the seed among them but for nexus; DIR alone is "
        "called as the run's directory",
    )
    models.add_argument(
        "--copies", type=int, default=1, metavar="N", help="of each (sparse upcycling of one model)"
    )
    _add_params_and_target(models)
    mixture = parser.add_argument_group("mixture")
    mixture.add_argument("--top_k", type=int, metavar="K", help="FFNs a token uses (1)")
    mixture.add_argument(
        "--renormalise", action="store_true", help="weights of the chosen FFNs sum to 1"
    )
    mixture.add_argument(
        "--shared_kv",
        action="store_true",
        help="of attention experts: one set of keys and values, the mean",
    )
    mixture.add_argument(
        "--attention_top_k",
        type=int,
        metavar="K",
        help="of attention experts: those a token mixes (all)",
    )
    mixture.add_argument(
        "--average_attention",
        action="store_true",
        help="each attention expert is the mean of all: a control, of parameters without specialisation",
    )
    mixture.add_argument(
        "--router_std", type=float, metavar="S", help="of linear routers' draw (0.02)"
    )
    mixture.add_argument(
        "--router_seed",
        type=int,
        default=0,
        metavar="N",
        help="of routers' draws (0); a soup, for which sweeps may give it too, draws nothing",
    )
    _add_nexus(parser.add_argument_group("nexus"))
    _add_changes(parser.add_argument_group("changes to the experts, for every method"))


def _add_params_and_target(group: Any) -> None:
    group.add_argument("--params", choices=load_run.PARAMS, default="auto", help="see launch.score")
    group.add_argument("--to", required=True, metavar="DIR", help="run directory to be made")
    group.add_argument(
        "--unrelated",
        action="store_true",
        help="takes models whose embeddings have nothing in common",
    )


def _add_nexus(group: Any) -> None:
    group.add_argument(
        "--seed_model", metavar="DIR", help="the run whose FFNs are shared by all tokens"
    )
    group.add_argument(
        "--domains",
        metavar="FILE",
        help="embeddings of the experts' data, of launch.prepare embed_domains",
    )
    group.add_argument(
        "--router",
        choices=ROUTERS,
        help="projection of --domains (default), or for comparison a linear one, or an MLP of the token with as "
        "many parameters as the projection",
    )
    group.add_argument(
        "--logit_std",
        type=float,
        metavar="S",
        help="of the logits of a projection or an MLP at the start (0.1)",
    )
    group.add_argument(
        "--attention_experts",
        action="store_true",
        help="attentions become experts too, as with bam, behind routers of the same kind",
    )


def _add_changes(group: Any) -> None:
    group.add_argument(
        "--expert_scale",
        type=float,
        metavar="S",
        help="multiplies the down-projections of routed experts (arXiv 2410.07524): copies of one FFN behind "
        "small probabilities then give about what it gave",
    )
    group.add_argument(
        "--drop_ratio",
        type=float,
        metavar="R",
        help="share of the hidden units of each routed expert that is drawn anew (Drop-Upcycling, arXiv 2502.19261)",
    )
    group.add_argument("--drop_seed", type=int, metavar="N", help="of that draw (0)")


def add_extension(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `launch.upcycle extend`."""
    models = parser.add_argument_group("models")
    models.add_argument(
        "--moe", required=True, metavar="DIR", help="run or step of a mixture of launch.upcycle"
    )
    change = models.add_mutually_exclusive_group(required=True)
    change.add_argument(
        "--add", metavar="NAME=DIR", help="a dense run that began from the same seed"
    )
    change.add_argument("--remove", metavar="NAME", help="an expert of the mixture")
    _add_params_and_target(models)
    how = parser.add_argument_group("addition")
    how.add_argument(
        "--domains", metavar="FILE", help="embeddings of domains, of the encoder the mixture knows"
    )
    how.add_argument(
        "--merge",
        type=float,
        metavar="L",
        help="weight of the new model in what is no expert's; 1 / (number of experts + 1) by default, which makes "
        "a mean of n models one of n + 1; 0 leaves the mixture's",
    )
    how.add_argument(
        "--router",
        choices=("append", "reset"),
        help="of a linear router or an MLP: the new expert's column is drawn (default), or all is",
    )
    how.add_argument(
        "--router_seed",
        type=int,
        metavar="N",
        help="of the draw (0); behind a projection, for which sweeps may give it too, nothing is drawn",
    )
