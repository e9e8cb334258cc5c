"""The published TOFU logs, scored: model utility and forget quality, beside the figures that were published of them."""

from __future__ import annotations

import argparse
from pathlib import Path

from engram.audit.tofu import forget_quality, ks_statistic, model_utility

WHOLE, RETAIN = "eval_log_llama2-7b_full_wd0.01.json", "eval_log_llama2-7b_retain90_wd0.01.json"


def main() -> None:
    """Print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--logs", type=Path, required=True, help="folder with the two logs of Llama-2-7b")
    folder = parser.parse_args().logs
    whole, retain = folder / WHOLE, folder / RETAIN
    figures = {
        "Kolmogorov-Smirnov statistic": (ks_statistic(whole, retain), "0.39667"),
        "its p-value, forget quality": (forget_quality(whole, retain), "1.834e-21"),
        "utility of the model of all authors, geometric": (model_utility(whole, "geometric"), "0.62268"),
        "utility of the model of 90 %, geometric": (model_utility(retain, "geometric"), "0.61374"),
        "utility of the model of all authors, arithmetic": (model_utility(whole, "arithmetic"), "0.58589"),
    }
    for name, (found, published) in figures.items():
        print(f"{name:<50} {found:<14.8g} {published}")


if __name__ == "__main__":
    main()
