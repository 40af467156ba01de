"""The config tree: one frozen dataclass for every group of ``configs/`` and one for the whole.

Defaults stand in the YAML files, where each key is commented; here stand names, types and meaning. Only fields that
most configs leave alone have a default here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

FP8_TOKENS: Mapping[str | None, int] = {None: 1, "delayed": 16, "current": 16, "blockwise": 128}
"""Tokens that a matrix product of each recipe is over a multiple of. The product of a weight's gradient sums over
tokens: that dimension is a multiple of 16 for FP8 (cuBLAS), and of whole blocks of 128 for ``blockwise``."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the language model (Qwen2) and of the patch embedding."""

    name: str
    layers: int
    hidden: int
    ffn_hidden: int
    heads: int
    kv_heads: int
    vocab_size: int | None
    """Rows of the word embedding. None: the tokenizer's size, rounded up to a multiple of 64."""
    rope_theta: float
    norm_eps: float
    tied_head: bool
    max_position: int
    init_std: float
    patch_size: int
    """Side of a patch in pixels (P)."""
    patch_width: int
    """Width of the patch embedding (C)."""
    patch_heads: int
    cell_reduction: int
    """Patches per side of a cell (r): ``r x r`` patches are averaged into one token."""
    patch_embedding: str
    """``cross_attention`` (FRAME and LINE look at their cells) or ``naive`` (projection alone)."""
    attention_mask: str
    """``causal`` or ``frame_bidirectional`` (cells of one frame see each other)."""
    positions: str
    """``1d``: one position id per token of a sample."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def cell_pixels(self) -> int:
        """Side of a cell in pixels."""
        return self.patch_size * self.cell_reduction

    @property
    def patch_values(self) -> int:
        """Numbers in one patch: P x P pixels of three colours."""
        return self.patch_size * self.patch_size * 3


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is split. The data-parallel size is what is left: ranks / (tensor x pipeline)."""

    tensor: int
    pipeline: int
    virtual_pipeline: int | None = None
    """Chunks of layers per pipeline rank (interleaved schedule). None: one."""
    sequence: bool
    """Sequence parallelism over the tensor ranks."""
    carrier: str = "rows"
    """``rows`` or ``fixed``: how hidden states and merge index cross from one pipeline rank to the next."""
    carrier_tokens: int | None = None
    """With ``carrier=fixed``: tokens of every message between pipeline ranks, before division by the tensor ranks under
    sequence parallelism. None: the estimate of the largest pack."""
    overlap_p2p: bool | None = None
    """Overlapped exchange between pipeline ranks, of the interleaved schedule. None: on exactly with interleaving."""
    deallocate_outputs: bool | None = None
    """Free outputs once they were sent. None: on exactly without interleaving."""

    @property
    def interleaved(self) -> bool:
        """Whether a pipeline rank has several chunks of layers."""
        return (self.virtual_pipeline or 1) > 1

    @property
    def overlaps_p2p(self) -> bool:
        """``overlap_p2p`` with null resolved."""
        return self.interleaved if self.overlap_p2p is None else self.overlap_p2p

    @property
    def deallocates_outputs(self) -> bool:
        """``deallocate_outputs`` with null resolved."""
        return not self.interleaved if self.deallocate_outputs is None else self.deallocate_outputs


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Shards of one kind of data."""

    shards: list[str]
    """Paths or globs of WebDataset tar files."""
    task: str
    """``caption`` (trains on the caption), ``conversation`` (trains on answers) or ``text``."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where samples come from and how they become packs."""

    name: str
    root: str
    """Folder that the paths of the sources start from."""
    sources: dict[str, SourceConfig]
    tokenizer: str | None
    """Folder of a Hugging Face tokenizer. None: the one of ``init_from``."""
    frames: int
    """Frames taken from a video at most, uniformly over its length."""
    fit: str
    """``crop`` or ``pad``: how height and width become whole cells."""
    max_pixels: int | None
    """Area of a frame at most, in pixels; larger frames are scaled down with their aspect ratio. None: no bound."""
    pack_tokens: int | None
    """Token budget of a pack. None: a data-parallel rank's share of a micro-step forms one pack."""
    max_text_tokens: int
    """Samples with more text than this are skipped."""
    caption_prompt: str
    """The user's turn that a caption answers."""
    workers: int
    prefetch: int
    cache_mb: int = 0
    """Decoded videos that each worker keeps, in MB. 0: none."""
    max_source_pixels: int
    """Larger frames are refused before decoding."""
    max_source_frames: int
    """Videos with more frames are refused."""
    max_source_mb: int = 2048
    """Larger files are refused, in MB."""
    max_source_seconds: float = 14400.0
    """Longer videos are refused."""
    sampling: str = "uniform"
    """Which frames are taken: ``uniform`` (spread over the video), ``rate`` (so many a second), ``clip`` (a random
    stretch, by sample and epoch) or ``timestamps`` (those that the sample's JSON names)."""
    rate: float | None = None
    """Frames a second with ``sampling=rate`` and within a clip; where those are too many, ``frames`` uniform ones."""
    clip_seconds: float | None = None
    """Length of a random clip, with ``sampling=clip``."""
    hybrid: str | None = None
    """``hi=336,lo=168,k=3``: of each 1 + k frames the first has at most hi x hi pixels and the others lo x lo.
    None: one resolution class."""
    decoder: str = "auto"
    """``pyav``, ``dali`` (the codecs its device decodes; PyAV for the rest) or ``auto`` (``dali`` on a GPU where it is
    installed)."""
    pack_text_tokens: int | None = None
    """Of a token budget, what text may take; video then has the rest. None: they share it."""
    pack_buffer: int = 64
    """Samples of known length that each pack chooses from, with a token budget."""
    quarantine: str | None = None
    """File of sample keys to pass by, one a line, besides the ``quarantine.txt`` that a run writes itself."""
    max_bad_share: float = 0.1
    """A run ends when more of its last 1,000 samples than this were bad."""
    decode_timeout_s: float = 60.0
    """A sample that takes longer is given up and its worker replaced."""
    cache_dir: str | None = None
    """Folder where shards from URLs are kept. None: they are read piece by piece."""


@dataclass(frozen=True, kw_only=True)
class MergePoint:
    """One place between two decoder layers where tokens merge; `merge_schedule.resolve` makes layers of shares."""

    after: float
    """Layers done before the merge; below 1 a share of the depth."""
    rule: str
    """``threshold`` (links more similar than ``tau`` merge) or ``budget`` (the share ``keep`` of the cells stays)."""
    tau: float | None = None
    keep: float | None = None


@dataclass(frozen=True, kw_only=True)
class PoolingConfig:
    """Average over time at the input."""

    window: int = 2
    """Frames averaged into one."""


@dataclass(frozen=True, kw_only=True)
class MergingConfig:
    """Token merging. ``kind`` is ``none``, ``pooling`` or ``hierarchical``."""

    kind: str
    survivor: str = "first"
    """Token of a run of merged cells that stays: ``first``, or ``last`` (no position holds what comes after it)."""
    points: list[MergePoint] = field(default_factory=list)
    pooling: PoolingConfig = PoolingConfig()


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number formats: ``dtype`` of parameters and activations, ``fp8`` recipe or None."""

    name: str
    dtype: str
    fp8: str | None


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What a training stage is about."""

    id: int
    name: str
    blend: dict[str, float]
    """Weight of each source of ``data.sources``; they are normalised."""
    losses: list[str]
    """Of ``gen``, ``mse``, ``con``."""
    frozen: list[str]
    """Glob patterns of parameters that do not train; each must match something."""
    frozen_share: float
    """Share of the stage's steps during which ``frozen`` holds."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimizer, schedule, checkpoints."""

    steps: int
    global_batch: int
    """Samples a step; packs where ``data.pack_tokens`` sets a token budget."""
    accumulate: int
    """Micro-steps (pipeline micro-batches) in a step."""
    lr: float
    lr_patch_embedding: float
    """Learning rate of patch embedding and projector."""
    lr_min_share: float
    """Learning rate at the end as a share of ``lr``."""
    warmup_steps: int
    hold_share: float
    """Share of the steps after warm-up at full learning rate, before the cosine decay."""
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    clip_grad: float
    recompute: bool
    """Recompute activations layer by layer in the backward pass."""
    checkpoint_every: int
    keep_checkpoints: int
    """Newest complete checkpoints kept. 0 keeps all."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are kept for ever. 0: none is."""
    checkpoint_async: bool = True
    """Write checkpoints beside training, which waits for the copy only."""
    log_every: int


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where the job runs. The Slurm fields are ignored by ``local`` and ``debug``."""

    kind: str
    partition: str | None
    account: str | None
    qos: str | None
    time_min: int
    """Time limit in minutes."""
    signal_s: int = 180
    """Seconds before the time limit at which the job saves and requeues itself."""
    requeue: bool = True
    """Start again, from the newest checkpoint, after a failure, a preemption or the time limit."""
    cpus_per_task: int | None
    exclusive: bool
    gpu_memory_gb: float = 80.0
    """Memory of a GPU in GB (1e9 bytes). A job whose estimate is above it is refused."""
    interface: str | None = None
    """Network interface of gloo and NCCL's bootstrap. None: the one with a route to the first node."""
    snapshot: bool = True
    """Run a copy of the code as it is at submission, kept in the run directory."""
    container_image: str | None
    container_mounts: str | None
    modules: list[str] = field(default_factory=list)
    """Environment modules to load on the first node before srun."""
    setup: list[str]
    srun_args: list[str]
    sbatch_args: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class FaultConfig:
    """What happens when something goes wrong."""

    step_timeout_s: float | None = 600.0
    """A step that takes longer ends the job, with the stacks of all ranks in ``logs/``. None: no limit."""
    start_timeout_s: float | None = 1800.0
    """Likewise for all that comes before the first step, and for a checkpoint."""
    collective_timeout_s: float = 2100.0
    """A collective that takes longer fails: what ends ranks whose watchdog cannot, as on a cut network."""
    nonfinite: str = "skip"
    """``skip`` (no weight changes, training goes on) or ``stop``: a step whose loss or gradient is not finite."""
    max_nonfinite: int = 100
    """So many of them in a row end the run."""
    straggler_every: int = 100
    """Steps between two comparisons of the ranks' own time. 0: none."""
    straggler_ratio: float = 1.25
    """A rank is named when its own time is above this many times the median."""
    same_step: int = 3
    """A job that has failed so many times in a row at the same step is not started again."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow. Nothing here can slow down or end training: a process of its own sends what the run writes to disk."""

    mlflow: bool = True
    uri: str | None = None
    """Tracking server. None: the variable ``MLFLOW_TRACKING_URI``, or ``mlflow.db`` beside the run directory."""
    experiment: str | None = None
    """None: the variable ``MLFLOW_EXPERIMENT_NAME``, or ``elva``."""
    nested: bool = False
    """The run stands below one that the folder above its run directory has. Set by ``stage=all``."""
    system_every_s: float = 10.0
    """Seconds between samples of CPU, memory, disk, network and GPU of each node. 0: none."""
    answers_every: int = 0
    """Steps between sample answers (with a picture of merging) of a fresh checkpoint; a multiple of
    ``train.checkpoint_every``. 0: none."""
    answers: int = 4
    """Samples that are asked."""
    flush_s: float = 60.0
    """Seconds that the end of a job waits for what is not sent yet; the rest is sent when the run is next started."""


@dataclass(frozen=True, kw_only=True)
class DebugConfig:
    """Switches for finding faults."""

    dump_merge_index: bool = False
    """Write the merge index of each pack to the run directory."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole of one stage's run."""

    stage: StageConfig
    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig
    merging: MergingConfig
    precision: PrecisionConfig
    train: TrainConfig
    cluster: ClusterConfig
    fault: FaultConfig = field(default_factory=FaultConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    debug: DebugConfig
    nodes: int
    tasks_per_node: int
    device: str
    """``cuda`` or ``cpu``."""
    layers: str
    """``local`` (plain torch), ``te`` (Transformer Engine) or ``auto`` (``te`` where it can run, else ``local``)."""
    seed: int
    run_dir: str
    init_from: str | None
    """A run or a Hugging Face folder to take weights from."""
    dry_run: bool
    follow: bool

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.nodes * self.tasks_per_node

    @property
    def data_parallel(self) -> int:
        """Model replicas."""
        return self.world_size // (self.parallel.tensor * self.parallel.pipeline)

    @property
    def sequence_shards(self) -> int:
        """Parts that a pack is in along its length: one for each tensor rank under sequence parallelism."""
        return self.parallel.tensor if self.parallel.sequence else 1

    @property
    def pad_multiple(self) -> int:
        """What the length of a pack is padded to a multiple of: shards of a length that the FP8 recipe can take."""
        return self.sequence_shards * FP8_TOKENS[self.precision.fp8]
