"""`python -m nltrain.model`: a table of the presets with their parameters, per level and in total."""

import json
import sys
from fnmatch import fnmatch

import torch

from nltrain.model.lm import build
from nltrain.model.presets import SIZES, preset


def count_parameters(family: str, name: str) -> dict[str, int]:
    """Parameters of a preset per level ("base" and the CMS levels), without allocating them."""
    config = preset(family, name)
    with torch.device("meta"):
        model = build(config)
    counts = {"base": 0} | dict.fromkeys(config.level_patterns(), 0)
    for parameter_name, parameter in model.named_parameters():
        owners = [n for n, ps in config.level_patterns().items() if any(fnmatch(parameter_name, p) for p in ps)]
        counts[owners[0] if owners else "base"] += parameter.numel()
    return counts


def main() -> None:
    """Prints the table; with --json one JSON object instead."""
    rows = {name: {f: count_parameters(f, name) for f in ("hope", "transformer")} for name in SIZES}
    if "--json" in sys.argv[1:]:
        print(json.dumps(rows))
        return
    print("preset  vocab   width  layers  head  | Hope: parameters by level" + 31 * " " + "| Transformer++ | ratio")
    for name, families in rows.items():
        config = preset("hope", name)
        hope, transformer = sum(families["hope"].values()), sum(families["transformer"].values())
        split = " + ".join(f"{n} {v / 1e6:.1f}M" for n, v in families["hope"].items())
        print(
            f"{name:6} {config.vocab_size:6,} {config.width:6,} {config.num_layers:6} {config.head_dim:6}  | "
            f"{hope / 1e6:8.2f}M = {split:44} | {transformer / 1e6:8.2f}M     | {transformer / hope:.4f}"
        )


if __name__ == "__main__":
    main()
