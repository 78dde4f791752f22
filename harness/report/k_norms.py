"""What K-norm weights do, in words and a table, from the records of accuracy.k_norms."""

from __future__ import annotations

import pandas as pd

from castpoint.harness.report.markdown import markdown, paragraphs
from castpoint.harness.report.paired import correlation
from castpoint.harness.runs.words import KNorms

BY = ["layer", "sample"]  # what one measurement is of
MULTIPLES = {
    "K, largest error: multiple": "k_max_abs",
    "logits, rms error: multiple": "logit_rms_error",
    "predicted by the products q·k of the channels": "logit_terms",
    "predicted by q's and K's weights alone": "gain_predicted",
    "logits, relative error: multiple": "logit_rel_error",
    "softmax total variation, mean: multiple": "softmax_tv_mean",
}
VALUES = {
    "most attended key flips, %": "top_key_flips",
    "K correctly rounded, %": "k_share_equal",
    "K, relative rms error": "k_rel_rms",
    "K, p99 error in ulps": "k_p99_ulp",
    "of the logits' squared error, through the channel of the largest, %": "channel_share",
    "of it, cross terms between channels, %": "cross_share",
}


def arm(rows: pd.DataFrame, k_norm: str, q_norm: str = KNorms.OWN) -> pd.DataFrame:
    """Rows with these weights, by layer and sample; those that failed are left out."""
    kept = (rows["status"] == "ok") & (rows["k_norm"] == k_norm) & (rows["q_norm"] == q_norm)
    return rows[kept].set_index(BY)


def multiples(rows: pd.DataFrame, column: str, k_norm: str, q_norm: str = KNorms.OWN) -> pd.Series:
    """By layer and sample: the column over that of K-norm weights near 1, with the same q-norm weights."""
    return (arm(rows, k_norm, q_norm)[column] / arm(rows, KNorms.NEAR_1, q_norm)[column]).dropna()


def measured(rows: pd.DataFrame) -> bool:
    """Whether there is something to compare with."""
    return len(multiples(rows, "logit_rms_error", KNorms.OWN)) > 0


def middle_and_ends(values: pd.Series) -> tuple[float, float, float]:
    """Of draws the 10th percentile, the median and the 90th; of several layers the least, median and greatest of their
    medians over texts."""
    layers = values.index.get_level_values("layer")
    if layers.nunique() > 1:
        values = values.groupby(layers).median()
        return values.min(), values.median(), values.max()
    return values.quantile(0.1), values.median(), values.quantile(0.9)


def spread(values: pd.Series) -> str:
    """`8.57 (4.67 to 15.6)`: the middle and the ends; one number where they agree."""
    low, middle, high = (f"{v:.0f}" if abs(v) >= 99.95 else f"{v:.3g}" for v in middle_and_ends(values))
    return middle if low == high else f"{middle} ({low} to {high})"


def of_what(rows: pd.DataFrame) -> str:
    """What the numbers of spread are."""
    layers, samples = rows["layer"].nunique(), rows["sample"].nunique()
    if layers > 1:
        return f"median, least and greatest of {layers} layers, of each the median of {samples} texts"
    return f"median, 10th and 90th percentile of {samples} draws"


def k_norm_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One column for the weights in place of the layer's, one row a measure: multiples of that with K-norm weights near
    1, and values. Empty where nothing was measured."""
    if not measured(rows):
        return pd.DataFrame()
    heads = {str(k_norm): (k_norm, KNorms.OWN) for k_norm in KNorms}
    heads["own, and q's near 1"] = (KNorms.OWN, KNorms.NEAR_1)
    table = {"measure; K-norm weights:": [*MULTIPLES, *VALUES]}
    for head, (k_norm, q_norm) in heads.items():
        found = arm(rows, k_norm, q_norm)
        cells = [spread(multiples(rows, column, k_norm, q_norm)) for column in MULTIPLES.values()]
        scales = [100 if "%" in name else 1 for name in VALUES]
        table[head] = cells + [spread(s * found[c]) for s, c in zip(scales, VALUES.values(), strict=True)]
    return pd.DataFrame(table)


def together(a: pd.Series, b: pd.Series) -> str:
    """`0.994 (0.984 to 0.998)`: correlation over draws, or over the medians of several layers, and its interval."""
    if a.index.get_level_values("layer").nunique() > 1:
        a, b = (values.groupby("layer").median() for values in (a, b))
    return "{:.3g} ({:.3g} to {:.3g})".format(*correlation(a, b))


def what_it_goes_with(rows: pd.DataFrame) -> str:
    """Measured over predicted multiples of the logits' rms error, and q's weights beside K's."""
    multiple, own = multiples(rows, "logit_rms_error", KNorms.OWN), arm(rows, KNorms.OWN)
    by_terms, by_weights = (multiples(rows, column, KNorms.OWN) for column in ("logit_terms", "gain_predicted"))
    over, there = multiple / by_terms, own["q_norm_there"]
    without = multiples(rows, "logit_rms_error", KNorms.WITHOUT_LARGEST)
    return (
        "With its own weights, measured over what the products predict: "
        f"{over.median():.3g} ({over.min():.3g} to {over.max():.3g}, least and greatest of all {len(over)}). The "
        f"measured multiple's correlation with that prediction is {together(multiple, by_terms)}, with that from the "
        f"weights alone {together(multiple, by_weights)}, with q's weight at the channel of K's largest "
        f"{together(multiple, there)}; in brackets its 95 % interval. That weight is {spread(there)} times the rms of "
        f"q's; rank correlation of q's and K's weights over channels: {spread(own['weights_rank'])}. Without K's "
        f"largest weight the logits' rms error is {spread(without / multiple)} times that with it."
    )


def explained(rows: pd.DataFrame) -> str:
    """The table with its words; empty where nothing was measured."""
    table, plan = k_norm_table(rows), rows["plan"].iloc[0] if len(rows) else ""
    if not len(table):
        return ""
    return paragraphs(
        f"Plan `{plan}`; {of_what(rows)}. Multiples are of the same inputs with every K-norm weight 129/128: near 1, "
        "and of eight significant bits, so that a product with it is rounded like any other (with a power of two it is "
        "exact: weights of 1 or 64 take a rounding away). Of the relative error each query's mean logit is taken off, "
        "which softmax does not see. A logit sums products of q and K over channels: relative, independent roundings "
        "predict an error like the root of these products' summed squares; or, where all channels carry alike, like "
        "the rms of K's weights, each counted as the square of q's weight there.",
        markdown(table, right=table.columns[1:]),
        what_it_goes_with(rows),
    )
