# ruff: noqa: E702
"""What the tables of a results folder hold: a dataclass a table.

A row's fields are the columns of its CSV file in their order, between `run_id` and `status, reason`, which every table
has. Its key tells one row of a run from another. A field without a default is known before anything is measured; a row
that failed has no others. Writing takes rows (Records.add), reading takes tables by name (runs.frames).
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, dataclass_transform

from castpoint.harness.runs.words import Kind, Status, Step

Number = float | None
Count = int | None
Flag = bool | None


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Declared:
    """Every class below it is a frozen dataclass by keywords, with its table's name and key."""

    TABLE: ClassVar[str]
    KEY: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, table: str = "", key: tuple[str, ...] = ()) -> None:
        cls.TABLE, cls.KEY = table, key
        dataclass(frozen=True, kw_only=True)(cls)


class Row(Declared):
    """One measurement, or why there is none. Raises ValueError for a status that no reader knows."""

    status: str = Status.OK
    reason: str = ""

    def __post_init__(self) -> None:
        Status(self.status)

    @classmethod
    def columns(cls) -> tuple[str, ...]:
        return ("run_id", *(f.name for f in dataclasses.fields(cls) if f.name not in SHARED), *SHARED)

    @classmethod
    def key_of(cls, **values: object) -> tuple[str, ...]:
        """The row's key as it stands on disk, from these values. Raises KeyError where one of it is missing."""
        return tuple(text(values[name]) for name in cls.KEY)


SHARED = ("status", "reason")


def text(value: object) -> str:
    """A value as it stands on disk."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# fmt: off
# Several columns a line: a table is read as a whole.

class ErrorRow(Row, table="errors", key=("weights", "layer", "tokens", "plan", "backend", "output", "reference")):
    model: str; weights: str; layer: int; tokens: int; seed: int
    plan: str; backend: str; output: str; reference: str
    max_abs: Number = None; mean_abs: Number = None; rms: Number = None; rel_rms: Number = None
    max_ulp: Number = None; p99_ulp: Number = None; mean_ulp: Number = None; share_equal: Number = None
    signed_mean: Number = None; at_token: Count = None; at_head: Count = None; at_channel: Count = None

class EagerRow(Row, table="eager", key=("weights", "layer", "tokens", "isa", "plan", "backend")):
    model: str; weights: str; layer: int; tokens: int; seed: int; isa: str  # K against eager's on that instruction
    kernel: str = ""; plan: str; backend: str  # set; kernel: oneDNN's name of its matmul
    share_equal: Number = None; rel_rms: Number = None; max_ulp: Number = None; max_abs: Number = None

class SpeedRow(Row, table="speed", key=("tokens", "plan", "backend")):
    model: str; tokens: int; plan: str; backend: str; regime: str
    p10_us: Number = None; p50_us: Number = None; p90_us: Number = None; bytes: int; flops: int
    gbps: Number = None; tflops: Number = None; roofline_share: Number = None
    speedup_vs_eager: Number = None; speedup_vs_compile: Number = None

class AmplificationRow(Row, table="amplification", key=("weights", "layer", "plan")):
    model: str; weights: str; layer: int; plan: str
    k_norm_max: Number = None; gain_predicted_max: Number = None; gain_measured_max: Number = None
    k_max_abs_before: Number = None; k_max_abs_after: Number = None; k_rel_rms_before: Number = None
    k_rel_rms_after: Number = None; logit_rms_error: Number = None; logit_max_error: Number = None
    softmax_tv_mean: Number = None; softmax_tv_max: Number = None; top_key_flips: Number = None

class KNormRow(Row, table="k_norms", key=("weights", "layer", "sample", "q_norm", "k_norm")):
    model: str; weights: str; layer: int; tokens: int; sample: int  # the seed of a drawn layer, the number of a text
    plan: str; q_norm: str; k_norm: str  # what is in place of the weights; words of KNorms
    channel: Count = None; k_norm_there: Number = None  # where the layer's own largest K-norm weight is
    q_norm_there: Number = None; weights_rank: Number = None  # over the rms of q's; rank correlation of q's and K's
    gain_predicted: Number = None; logit_terms: Number = None; channel_share: Number = None; cross_share: Number = None
    k_max_abs: Number = None; k_rel_rms: Number = None; k_p99_ulp: Number = None; k_share_equal: Number = None
    logit_rms_error: Number = None; logit_rel_error: Number = None; softmax_tv_mean: Number = None
    top_key_flips: Number = None

class UlpRow(Row, table="ulps", key=("weights", "layer", "plan", "output", "reference", "ulp_from")):
    model: str; weights: str; layer: int; plan: str; backend: str; output: str; reference: str
    ulp_from: float; ulp_to: float; share: float

class ChannelRow(Row, table="channels", key=("weights", "layer", "plan", "channel")):
    model: str; weights: str; layer: int; plan: str; channel: int
    k_norm_weight: float; gain_predicted: float; gain_measured: float

class StreamRow(Row, table="streams", key=("model", "weights", "layer", "seed", "part", "plan", "backend")):
    model: str; weights: str; layer: int; seed: int; tokens: int; part: str; plan: str; backend: str
    x_max: Number = None; x_min: Number = None; x_abs_median: Number = None
    k_rel_rms: Number = None; k_equal: Number = None; k_equal_eager: Number = None; v_rel_rms: Number = None
    logit_rms_error: Number = None; before_matmul: Number = None; k_norm_multiple: Number = None
    elements: Count = None; outside: Count = None; equal_spec: Number = None

class ImplementationRow(Row, table="implementations", key=("implementation", "kind", "how")):
    implementation: str; package: str; versions: str; kind: str; how: str; device: str; plan: str = ""
    share_equal: Number = None; runner_up_share_equal: Number = None; seconds: Number = None
    expected: str = ""; source: str = ""; verdict: str = ""  # written down beforehand, and where that was read

class BudgetRow(Row, table="budget", key=("weights", "layer", "tokens", "plan", "backend", "measure", "player")):
    model: str; weights: str; rotated_from: Count = None  # position of the first token, where q and k are rotated
    layer: int; tokens: int; plan: str; backend: str; measure: str; player: str
    shapley: Number = None; share: Number = None; total: Number = None
    kernel_vs_spec: Number = None; kernel_vs_spec_share: Number = None

class RopePositionRow(Row, table="rope_positions", key=("weights", "layer", "tokens", "position", "boundary")):
    model: str; weights: str; layer: int; tokens: int; position: int; boundary: str  # boundary: what alone is in bf16
    k_vs_truth: Number = None; k_vs_fp32: Number = None  # rms error relative to the head; fp32: with none in bf16
    phase_max_error: Number = None  # radians

class CaseRow(Row, table="cases", key=("case", "source", "measure")):
    case: int; source: str; where: str; before: str; after: str; measure: str; measured: Number = None; unit: str
    measured_low: Number = None; measured_high: Number = None
    claimed: Number; claimed_low: Number; claimed_high: Number; claimed_text: str; verdict: str = ""; why: str
    share_differ: Number = None; max_ulp: Number = None; signed_bias: Number = None; growth: Number = None

class FourBitRow(Row, table="four_bit", key=("model", "weights", "layer", "arm")):
    model: str; weights: str; layer: int; arm: str; k_rel_rms: Number = None; logit_rel_rms: Number = None

class KlRow(Row, table="kl_statistics", key=("model", "arm", "statistic")):
    model: str; weights: str; arm: str; statistic: str = ""; value: Number = None; standard_error: Number = None
    tokens: Count = None

class ClaimRow(Row, table="claims", key=("claim",)):
    claim: str; source: str; said: str; how: str = ""; figure: str = ""; verdict: str = ""
    decides: str = ""; conditions: str = ""  # decides: the command that would, where nothing here does

class ClaimFigureRow(Row, table="claim_figures", key=("claim", "what", "cause")):
    claim: str; what: str; cause: str; claimed: Number = None; claimed_high: Number = None  # of a range
    measured: Number = None; measured_low: Number = None; measured_high: Number = None  # median, least, greatest
    samples: Count = None; unit: str = ""

class ParallelRow(
    Row, table="parallel", key=("model", "dtype", "reduce", "ranks", "part", "reference", "stage", "layer")
):
    model: str; dtype: str; reduce: str; ranks: int; tokens: int; part: str; reference: str; stage: str; layer: int
    max_abs: Number = None; rms: Number = None; rel_rms: Number = None; reference_max: Number = None
    share_equal: Number = None; first_equal: Number = None  # of the largest value's place in each row: the first choice

class ParallelCostRow(Row, table="parallel_cost", key=("model", "dtype", "reduce", "ranks")):
    model: str; dtype: str; reduce: str; ranks: int; tokens: int; repeats: Count = None
    prefill_ms: Number = None; prefill_low_ms: Number = None; prefill_high_ms: Number = None; decode_ms: Number = None
    sent_bytes: Count = None; read_elements: Count = None  # of rank 0: in a prefill, counted; from the file

class JaxStageRow(Row, table="jax_stages", key=("model", "dtype", "how", "reading", "layer", "stage")):
    model: str; dtype: str; how: str; reading: str; layer: int; stage: str; tokens: int  # how: JAX is run
    elements: Count = None; share_equal: Number = None; max_abs: Number = None; p999: Number = None
    max_ulp: Number = None; ulps_of_largest: Number = None; rel_rms: Number = None; largest: Number = None

class JaxCauseRow(Row, table="jax_causes", key=("model", "dtype", "stage", "by_jax")):
    model: str; dtype: str; stage: str; by_jax: str; tokens: int  # by_jax: what of the stage is, all else PyTorch
    elements: Count = None; differ: Count = None; share_equal: Number = None; max_ulp: Number = None

class JaxPartRow(Row, table="jax_parts", key=("part", "how")):
    part: str; how: str; inputs: str; says: str  # part: what is compared; says: what it decides
    elements: Count = None; share_equal: Number = None; max_ulp: Number = None

class AuditRow(Row, table="audit", key=("target", "kernel", "plan", "keywords")):
    target: str; kernel: str; plan: str; keywords: str; declared: str = ""; ttir: str = ""; machine: str = ""
    roundings: str = ""; matmul: str = ""; not_followed: str = ""; fused: Count = None; expanded: Count = None
    matrix: str = ""; registers: Count = None; spills: Count = None; shared: Count = None

class ExecutedRow(Row, table="executed", key=("target", "plan", "config", "rope", "tokens", "check")):
    target: str; plan: str; config: str; rope: bool = False; tokens: int; check: str
    share_equal: Number = None; elements: Count = None  # compared; of an exact check, half with many products a sum

class GateRow(Row, table="gates", key=("plan", "fault", "gate")):
    plan: str; fault: str; kind: str; gate: str; elements: Count = None
    differ: Count = None  # elements of the wrong kernel that are not the right one's
    outside: Count = None; verdict: str = ""

class ToleranceRow(Row, table="tolerances", key=("peer", "test")):
    peer: str; test: str; atol: Number = None; rtol: Number = None; x: str = ""; weight: str = ""
    norm_faults: Count = None; norm_passed: Count = None  # of a norm by itself, on the test's own inputs
    norm_hidden: Count = None  # of those that it lets pass: no bit differs on its inputs
    chain_faults: Count = None; chain_passed: Count = None  # of every plan, in q, k and v of the drawn layer
    right_kernels: Count = None; right_refused: Count = None  # of every plan, in other orders of summation
    passed: str = ""; url: str = ""  # faults of a norm that it lets pass

class ModelLayerRow(Row, table="model_layers", key=("model", "weights", "text", "prompt", "arm", "reference", "layer")):
    model: str; weights: str; text: str; prompt: int; arm: str; backend: str; reference: str; layer: int
    max_abs: Number = None; rms: Number = None; rel_rms: Number = None; one_minus_cosine: Number = None
    k_norm_max: Number = None; k_max_abs: Number = None; k_rel_rms: Number = None; k_p99_ulp: Number = None
    attention_logit_rms: Number = None

class ModelTokensRow(Row, table="model_tokens", key=("model", "weights", "text", "prompt", "arm", "reference")):
    model: str; weights: str; text: str; prompt: int; tokens: Count = None; arm: str; backend: str; reference: str
    logit_max: Number = None; kl_mean: Number = None; kl_max: Number = None; top1: Number = None; top5: Number = None
    dlogp_p50: Number = None; dlogp_p99: Number = None; dlogp_max: Number = None
    parts_at: Count = None; nll: Number = None

class ModelDlogpRow(Row, table="model_dlogp", key=("model", "weights", "text", "prompt", "arm", "reference", "above")):
    model: str; weights: str; text: str; prompt: int; arm: str; backend: str; reference: str
    above: float; tokens: int

class EngineRow(Row, table="engine", key=("model", "weights", "k_scale", "plan", "backend", "how", "prompt")):
    model: str; weights: str; k_scale: str; plan: str; backend: str; how: str; prompt: int
    beside: str = ""  # the arm that it is compared with, under the same weights: eager, and how
    tokens: Count = None; equal: Count = None  # before the first that parts
    margin: Number = None  # where they part, of the other's logits: its own choice over this one's
    margin_median: Number = None  # of the other's first choice over its second, over its whole text
    nats: Number = None; text: str = ""  # a token of the text, under the unchanged model in fp32

class EngineRunRow(Row, table="engine_runs", key=("model", "weights", "k_scale", "plan", "backend", "how")):
    model: str; weights: str; k_scale: str; plan: str; backend: str; how: str
    sequences: Count = None; prompt_tokens: Count = None; new_tokens: Count = None; threads: Count = None
    steps: Count = None; computed: Count = None; reused: Count = None; preempted: Count = None
    step_p10_ms: Number = None; step_p50_ms: Number = None; step_p90_ms: Number = None  # one token a sequence
    tokens_per_s: Number = None

class GpuCheckRow(Row, table="gpu_checks", key=("plan", "config", "rope", "tokens", "hidden_size", "check")):
    plan: str; config: str; rope: bool = False; tokens: int; hidden_size: int = 1024; check: str
    share_equal: Number = None; elements: Count = None; max_ulp: Number = None

class GpuLimitRow(Row, table="gpu_limits", key=("limit",)):
    limit: str; value: Number = None; unit: str  # what the GPU can do at most, and what a launch costs

class GpuCounterRow(Row, table="gpu_counters", key=("kernel", "counter")):
    kernel: str; counter: str; value: Number = None; unit: str  # of Nsight Compute

class GpuStepRow(Row, table="gpu_steps", key=("step", "model", "tokens", "regime")):
    step: Step; model: str = ""; tokens: int = 0; regime: str = ""  # a point's, where it has one; its rows are complete
    seconds: Number = None; estimated_s: Number = None

class GpuSpeedRow(Row, table="gpu_speed", key=("model", "tokens", "regime", "step", "arm")):
    model: str; tokens: int; regime: str; step: Step  # arms of one step are timed in turns
    kind: Kind; arm: str; function: str = ""  # the plan, or what is rounded
    config: str = ""; kernel: str = ""; prepass: str = ""; copies: Count = None; cold: Flag = None
    rounds: Count = None; laps: Count = None; bytes: Count = None; flops: Count = None; floor_us: Number = None
    p10_us: Number = None; p50_us: Number = None; p90_us: Number = None; gbps: Number = None; tflops: Number = None
    roofline_share: Number = None; p1: str = ""; speedup_p1_p10: Number = None; speedup_p1_p50: Number = None
    speedup_p1_p90: Number = None; p4: str = ""; over_p4_p10: Number = None; over_p4_p50: Number = None
    over_p4_p90: Number = None; noise_p10: Number = None; noise_p90: Number = None; sm_mhz: Number = None
    memory_mhz: Number = None; watts: Number = None; celsius: Number = None; slowed_by: str = ""

class ConfigRow(Row, table="configs", key=("kernel", "plan", "target", "keywords")):
    kernel: str; plan: str; target: str; keywords: str
    registers: Count = None; spills: Count = None; shared: Count = None; matrix: str = ""

class TuningRow(Row, table="tuning", key=("model", "tokens", "scale", "config")):
    model: str; tokens: int; scale: str; config: str; kernel: str; prepass: str; block_m: int; block_k: int
    num_warps: int; num_stages: int; splits: int; cold: bool; p10_us: Number = None; p50_us: Number = None
    p90_us: Number = None; speedup_separate: Number = None; noise_p10: Number = None; noise_p90: Number = None

class CaptureRow(Row, table="captures", key=("kind", "tokens")):
    kind: str; tokens: int; plans: int  # planted in captures of so many tokens
    told_apart: Number = None; lost: Number = None  # shares: answered alone; not among the answers

class FingerprintRow(Row, table="fingerprints", key=("source", "kind", "planted")):
    source: str; kind: str; planted: str; answered: str
    share_equal: Number = None; runner_up_share_equal: Number = None; seconds: Number = None

# fmt: on

ROWS: dict[str, type[Row]] = {row.TABLE: row for row in Row.__subclasses__()}
TABLES = {table: row.columns() for table, row in ROWS.items()}  # columns
KEYS = {table: row.KEY for table, row in ROWS.items()}


def words_of(table: str) -> list[str]:
    """The table's columns of words."""
    fields = dataclasses.fields(ROWS[table])
    return ["run_id", *(f.name for f in fields if isinstance(f.type, type) and issubclass(f.type, str))]


def flags_of(table: str) -> list[str]:
    """The table's columns of True and False. All others but words_of are numbers."""
    return [f.name for f in dataclasses.fields(ROWS[table]) if f.type in (bool, Flag)]
