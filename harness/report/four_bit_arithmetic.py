"""What four bits can buy for one token: arithmetic from sizes and a card's bandwidth. Nothing here was measured.

With one token every weight is read once and multiplied once, so bytes over bandwidth is a floor: no kernel is faster
while weights come from memory. Cards have NVIDIA's published bandwidth, which no kernel reaches, and floors are of
reading weights, norm weights, bias, x and storing q, k and v, all but W in bf16. Launches, attention, MLP and the cache
are left out: a share of the chain is no share of a model.
"""

from __future__ import annotations

from dataclasses import dataclass

from castpoint.harness.problems.geometry import GEOMETRIES, Geometry, layer_work

CARDS = {"H100": 3.352e12, "H200": 4.8e12}  # bytes/s, data sheets of the SXM cards
BITS = {"bf16": 16.0, "q8_0": 8 * 34 / 32, "q4_0": 8 * 18 / 32}  # of a weight, its share of the block's scale included
MODELS = ("qwen3-0.6b", "qwen3-8b", "qwen2.5-7b")
LAUNCH_S = 1.3e-6  # a kernel inside a CUDA graph: an assumption, about what graphs of small kernels take


@dataclass(frozen=True)
class Floor:
    """The chain of one layer, one token. bytes: all that it must read and write; seconds: at the card's bandwidth."""

    model: str
    weights: str
    card: str
    weight_bytes: int
    bytes: int
    seconds: float
    layers: int

    @property
    def tokens_per_s(self) -> float:
        """If a model were nothing but its layers' chains."""
        return 1 / (self.layers * self.seconds)


def weight_bytes(g: Geometry, weights: str) -> int:
    """Of the QKV weight in that format. Raises KeyError for an unknown one."""
    return int(g.rows * g.hidden_size * BITS[weights] / 8)


def floor_of(model: str, weights: str, card: str) -> Floor:
    """Raises KeyError for a model, format or card that is not known here."""
    g = GEOMETRIES[model]
    size = weight_bytes(g, weights)
    whole = layer_work(g, 1).bytes - weight_bytes(g, "bf16") + size
    return Floor(model, weights, card, size, whole, whole / CARDS[card], g.num_layers)


def table(models: tuple[str, ...] = MODELS) -> str:
    """Markdown: for each model and format the bytes of W, and on each card the floor of a layer, of all layers' chains,
    and how often faster than bf16 the chain can be at most, without launches and with one a layer."""
    heads = [f"{card}: µs a layer | all layers, µs | at most, of bf16 | with a launch" for card in CARDS]
    lines = [f"| model | W | MB of W | {' | '.join(heads)} |", "|---|---|--:" + "|--:" * 4 * len(CARDS) + "|"]
    for model in models:
        for weights in BITS:
            cells = []
            for card in CARDS:
                floor, plain = floor_of(model, weights, card), floor_of(model, "bf16", card)
                launched = (plain.seconds + LAUNCH_S) / (floor.seconds + LAUNCH_S)
                cells += [f"{1e6 * floor.seconds:.2f}", f"{1e6 * floor.layers * floor.seconds:.1f}"]
                cells += [f"{plain.seconds / floor.seconds:.2f} ×", f"{launched:.2f} ×"]
            size = weight_bytes(GEOMETRIES[model], weights) / 1e6
            lines.append(f"| {model} | {weights} | {size:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def words() -> str:
    """The table with what it is and is not."""
    return (
        "Arithmetic, not measured: bytes over published bandwidth (H100 3,352 GB/s, H200 4,800 GB/s), one token, "
        f"weights from memory. A launch is taken as {1e6 * LAUNCH_S:.1f} µs. A Q4_0 weight has {BITS['q4_0']} bits and "
        f"a Q8_0 weight {BITS['q8_0']}, so W shrinks by {16 / BITS['q4_0']:.2f} and {16 / BITS['q8_0']:.2f} times, and "
        f"no chain gains more.\n\n{table()}"
    )
