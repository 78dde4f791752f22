"""Words and numbers of records that more than one room reads: statuses, backends, checks, steps, measures."""

from enum import StrEnum


class Status(StrEnum):
    """What became of a row. A fingerprint's row has its answer here instead of `ok`."""

    OK = "ok"
    RED = "red"  # measured, and wrong
    FAILED = "failed"  # raised; reason says what
    NOT_APPLICABLE = "not applicable"
    NOT_INSTALLED = "not installed"
    REFUSED = "refused"
    DOES_NOT_FIT = "does not fit"
    IDENTIFIED = "identified"
    UNDECIDED = "undecided"
    NONE = "none"
    ERROR = "error"


class Backend(StrEnum):
    """What ran a plan: those of variants.backends, and eager as a baseline or for its noise floor."""

    SPEC = "spec"
    EAGER = "eager"
    EAGER_BATCH_OF_1 = "eager, batch of 1"
    COMPILED_EAGER = "torch.compile"
    INDUCTOR = "inductor"
    TRITON = "triton"
    TRITON_SEPARATE = "triton-separate"


class Check(StrEnum):
    """What a kernel is compared with: its spec on exact inputs, its envelope; eager's spec; itself interpreted; its PTX
    run on a CPU; and what a tensor core returns, with the model of its sums."""

    EXACT = "exact"
    ENVELOPE = "envelope"
    EAGER = "eager"
    INTERPRETER = "interpreter"
    PTX = "ptx"
    TENSOR_CORE = "tensor core"


COMPARED = (Check.INTERPRETER, Check.PTX)  # on a CPU, once the run is home


class Gate(StrEnum):
    """What a planted fault is put before: the spec's bits on inputs with exact sums, and the envelope of a drawn layer,
    each with outputs as the plan stores them and in fp32."""

    ONE_PRODUCT = "one product"
    ONE_PRODUCT_FP32 = "one product, fp32"
    MANY_PRODUCTS = "many products"
    MANY_PRODUCTS_FP32 = "many products, fp32"
    ENVELOPE = "envelope"
    ENVELOPE_FP32 = "envelope, fp32"

    @property
    def stores_fp32(self) -> bool:
        return self.endswith("fp32")


class Verdict(StrEnum):
    """What a gate says of a planted fault. `same function`: the fault changes no element wherever it was tried."""

    SEEN = "seen"
    UNSEEN = "unseen"
    SAME_FUNCTION = "same function"


class Judged(StrEnum):
    """What the lab says of a claim."""

    REPRODUCED = "reproduced"
    NOT_REPRODUCED = "not reproduced"
    OTHERWISE = "explained otherwise"
    UNDECIDED = "cannot be decided here"


class How(StrEnum):
    """How an engine came to a text: all prompts in one batch, one after the other, with pages of an earlier run, with
    fewer pages than all prompts need."""

    BATCH = "batch"
    ALONE = "alone"
    REUSED = "prefix reused"
    PREEMPTED = "preempted"


class KScale(StrEnum):
    """What was done to a model's K-norm weights before it wrote: nothing; each layer's multiplied until its largest is
    96.5, with q k's scale divided by as much, so that the function stays, or without."""

    OWN = "as it is"
    BALANCED = "K norm to 96.5, scale divided by as much"
    ALONE = "K norm to 96.5"


class Regime(StrEnum):
    """How weights lie at a point of the GPU grid: rotated over 3 x L2; one weight; one a layer; rotated, with RoPE."""

    COLD = "cold"
    HOT = "hot"
    LAYERS = "layers"
    ROPE = "rope"


class Step(StrEnum):
    """What a GPU run does at a time, in the order that gpu.order gives: the GPU's own limits and arithmetic, its
    counters, outputs kept for a comparison elsewhere; and at a point of the grid arms that are timed in turns."""

    LIMITS = "limits"
    EAGER = "eager"
    TENSOR_CORES = "tensor cores"
    COUNTERS = "counters"
    OUTPUTS = "outputs"
    PARTS = "parts"  # of separate chains, each by itself, and our own loop
    TUNING = "tuning"  # every config, for the dispatch table
    CHAINS = "chains"  # P1, P4 and the plans that stand for an order of scaling
    PLANS = "plans"  # all other plans, and P1
    COMPILED = "compiled"  # torch.compile with all its tuning, and P1


class Kind(StrEnum):
    """What an arm of the GPU grid does: a part of P1 by itself or our own loop; a chain of parts (P1), torch.compile
    (P2) or eager; or a plan's own kernels. The bare matmul is P4; with as many empty kernels behind it as a chain has
    norms, it says what launches cost."""

    NORM = "norm"
    MATMUL = "matmul"
    LAUNCHES = "launches"
    HEADS = "heads"
    LOOP = "loop"
    CHAIN = "chain"
    COMPILED = "compiled"
    EAGER = "eager"
    OWN = "own"


class KNorms(StrEnum):
    """What stands in place of a layer's q- or K-norm weights."""

    OWN = "own"
    NEAR_1 = "near 1"  # 129 / 128, every one
    ALL_LARGEST = "all the largest"
    LARGEST_ALONE = "largest alone"  # all others near 1
    WITHOUT_LARGEST = "without the largest"  # that one near 1


# Measures of the error budget. k_rel_ms: mean over heads of (mean square of the head's error / of the head), the square
# of rel_rms. logit_ms: mean square of the error of causal attention logits, the square of logit_rms_error.
MEASURES = ("k_rel_ms", "logit_ms")
NO_BOUNDARY = "none"  # of rope_positions: all in fp32
FP32, ORDER_OF_SUMS = "fp32 arithmetic", "order of sums"  # players that no plan names
# A plan's players, in the order of the chain.
PLAYERS = (
    *("x", "weight_offset", "statistics", "variance", "rstd", "normed", "hidden", "scale", "matmul", "proj"),
    *("head_rstd", "head_normed", "unrotated", "inv_freq", "position", "phase", "cos_sin", "products", "out"),
)
BINS = [10 ** (i / 4) for i in range(-28, 5)]  # model_dlogp's lower edges of |difference of log p|, nats; below: 0
