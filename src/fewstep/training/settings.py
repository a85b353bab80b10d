"""Settings that teacher training and distillation share."""

from contextlib import suppress
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from fewstep.metric_table import METRICS, base
from fewstep.settings import Count, Settings, UserPath

Beta = Annotated[float, Field(ge=0, lt=1)]
MAX_DECAYS = 16  # averages, each as large as the network


class NoiseLevels(Settings):
    """The distribution of native times that a loss is trained on."""

    distribution: Literal["index", "lognormal", "logit_normal", "shifted"] = "index"
    """`index`: uniform over the schedule's levels (1,000 Karras levels for EDM); `lognormal`: EDM's training
    distribution; `logit_normal`, `shifted`: flow models."""
    min_index: int = Field(0, ge=0, le=999)
    """Lowest level for `index`; 0 is the least noise. DMD2 trains the student from 20 on."""
    max_index: int = Field(999, ge=0, le=999)
    """Highest level for `index`, included. DMD2 trains the student up to 980."""
    mean: float = -1.2
    """Of ln(sigma) for `lognormal`, of logit(t) for `logit_normal` (EDM, table 1)."""
    std: float = Field(1.2, gt=0)
    """Of ln(sigma) for `lognormal`, of logit(t) for `logit_normal` (EDM, table 1)."""
    shift: float = Field(1.0, gt=0)
    """Resolution shift for `shifted` (SD3, equation 23)."""

    def idle(self) -> dict[str, str]:
        """What other distributions have."""
        used = {"index": ("min_index", "max_index"), "shifted": ("shift",)}.get(self.distribution, ("mean", "std"))
        others = {"min_index", "max_index", "mean", "std", "shift"} - set(used)
        return dict.fromkeys(sorted(others), f"the distribution is {self.distribution}, which has {', '.join(used)}")

    @model_validator(mode="after")
    def _indices_fit(self) -> Self:
        if self.min_index > self.max_index:
            raise ValueError(f"min_index {self.min_index} is above max_index {self.max_index}")
        return self


class OptimizerSettings(Settings):
    """AdamW; the defaults are DMD2's (spec, 1.6)."""

    kind: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw8bit` keeps both moments in 8 bits, in blocks of 256 with a scale each (arXiv 2110.02861): 2.03 bytes per
    trained weight in place of 8, but of tensors of less than 4,096 numbers; needs `pip install fewstep[8bit]`, which is
    bitsandbytes. The host waits for the device at every tensor."""
    lr: float = Field(2e-6, gt=0)
    """Peak learning rate. ImageNet-64: 2e-6, SD 1.5 stage 1: 1e-5, SDXL: 5e-7."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of the running means."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay."""
    eps: float = Field(1e-8, gt=0)
    """Added to the denominator."""
    warmup_steps: int = Field(0, ge=0, le=10**9)
    """Updates over which the rate rises linearly; the official 500 amounts to about 2 student updates on 64 GPUs."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls from its peak to zero; the paper keeps it constant."""
    decay_start: float = Field(0.0, ge=0, lt=1)
    """Share of the run behind which the rate begins to fall."""
    clip_norm: float = Field(10.0, gt=0)
    """Largest global gradient norm."""

    def idle(self) -> dict[str, str]:
        """When a constant rate falls."""
        return {"decay_start": "decay is constant"} if self.decay == "constant" else {}


class EvaluationSettings(Settings):
    """How a run judges itself on the way: FID, and what else its judge gives, of the weights that it saves."""

    every: Count | None = None
    """Steps per evaluation, which also writes a checkpoint; by default none. The paper picks its best by FID."""
    num_samples: int = Field(1000, ge=10, le=10**7)
    """Images per evaluation, always of the same noise and conditions."""
    features: UserPath | None = None
    """The network in whose features FID is taken: a TorchScript file, a folder of CLIP or DINOv2, `classifier`, trained
    on the data's labels, or `autoencoder`, the text-to-image model's; by default the one of the two that the model
    has."""
    resize: Literal["legacy", "clean"] = "legacy"
    """How images are brought to that network's size: `clean` as clean-fid does it, antialiased by Pillow, `legacy` by
    the network itself or as it was published with."""
    clip: UserPath | None = None
    """A folder of CLIP, for the CLIP score of pictures and their prompts; by default there is none."""
    clip_prefix: str = ""
    """In front of every prompt in the CLIP score; the paper's is "A photo depicts "."""
    lpips: UserPath | None = None
    """LPIPS, for the diversity within a prompt or class: a TorchScript file, or `lpips` for the package."""
    scorers: list[str] = []
    """Further scores of pictures, as MODULE:CLASS of classes of your own."""
    keep: list[str] = ["fid", "kid", "precision", "recall", "clip", "accuracy", "prompt_accuracy", "two_objects"]
    """The metrics, and scorers by the name of their class in lower case, of each of which the best checkpoint is kept
    beside the newest two; of several averages, of each."""
    time_share: float = Field(0.05, gt=0, le=1)
    """Share of the run's time, up to any moment, that evaluations may take: one that is due is left out if as long a
    one as the last would exceed it, but never the first and that of the last step. 1 leaves out none. The time is that
    since the run began, or was resumed."""

    def keeps(self, name: str) -> bool:
        """Whether the best by this metric, or by `ema0.99995_NAME`, is kept."""
        return base(name) in self.keep

    @model_validator(mode="after")
    def _what_is_kept_is_judged(self) -> Self:
        known = {*METRICS, *(scorer.rpartition(":")[2].lower() for scorer in self.scorers)}
        if unknown := [name for name in self.keep if name not in known]:
            raise ValueError(f"keep: {unknown[0]!r} is no metric; there are {', '.join(sorted(known))}")
        return self

    def idle(self) -> dict[str, str]:
        """How what is not judged is judged; whoever says `every: null` has switched it off knowingly."""
        if not self.every and "every" not in self.model_fields_set:
            return dict.fromkeys(
                (name for name in type(self).model_fields if name != "every"), "evaluation.every is null"
            )
        return {} if self.clip else {"clip_prefix": "evaluation.clip is null"}


class SampleSettings(Settings):
    """What the sample grids of a run show."""

    prompts: UserPath | None = None
    """Of a text-to-image model: a .txt file with one prompt per line, or a .csv, .tsv or .parquet file; the grids show
    them in order, the first `grid_images` of them. By default the first eight that it is trained on."""


class SpeedSettings(Settings):
    """How a step is run; its numbers are those of any other way (docs/speed.md)."""

    graphs: Literal["auto", "off"] = "auto"
    """`auto` runs each kind of step as one CUDA graph, without the host's time for each kernel, where a trial of 20
    steps says that it pays and memory suffices; the log says what was chosen. Without CUDA there are none."""
    compile: Literal["none", "blocks"] = "none"
    """`blocks` compiles transformer and residual blocks in place, each kind once per shape: minutes at the start, and
    seconds when a later run finds them in the cache. Needs a C compiler."""


class ParallelSettings(Settings):
    """How several ranks train together (docs/scaling.md)."""

    shard: Literal["none", "full", "hybrid"] = "none"
    """Who holds the weights of a distillation, with their gradients, averages and moments: `none`, every rank all of
    them; `full`, each some rows of every tensor, and gathers the rest when a pass needs it; `hybrid`, so among the
    ranks of a machine, and every machine all of them. Numbers are the same."""
    keep_gathered: bool = True
    """Whether gathered weights stay until they change: half the messages, for the memory of one more set of each
    network's weights, in the dtype that it computes in."""
    offload_student_optimizer: bool = False
    """Keeps the moments and averages of a distillation's student in main memory, and updates it there: 8 bytes per
    weight and 4 per average less on the device (SDXL with one: 31 GB), and 16 and 4 in main memory; numbers are the
    same but for rounding. The student's turns wait for its gradients on their way, its update there and its weights on
    their way back, as far as the critic's passes don't hide them; other turns wait for nothing."""
    stall_minutes: float = Field(10.0, gt=0, le=1440)
    """How long a rank waits for the others in a step, before it takes them for lost."""
    max_rows_per_part: int | None = Field(None, ge=1, le=65_536)
    """In place of `accumulate`: each rank computes its rows of a batch in as few equal parts as have at most so many,
    however many ranks there are. 40 of a batch of 280 are seven parts on one GPU, and one on each of seven."""


class LoopSettings(Settings):
    """How long a run is and what it writes on the way."""

    num_steps: Count = 1000
    """Steps; for distillation these are critic updates, as in the paper's counts."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Everything random in a run is a function of this and the step."""
    batch_size: int = Field(64, ge=1, le=65_536)
    """Samples per step."""
    accumulate: Count = 1
    """Parts that each rank computes its rows of a batch in, one after the other, for want of memory; the numbers are
    those of one part."""
    speed: SpeedSettings = SpeedSettings()
    """How a step is run (keys graphs, compile)."""
    parallel: ParallelSettings = ParallelSettings()
    """How several ranks train together (keys shard, keep_gathered, offload_student_optimizer, stall_minutes,
    max_rows_per_part)."""
    max_skipped: Count = 20
    """Updates in a row that may be skipped because a loss or a gradient is not finite, before the run ends."""
    log_every: Count = 50
    """Steps per line of metrics.jsonl."""
    sample_every: Count = 1000
    """Steps per sample grid."""
    grid_images: int = Field(40, ge=1, le=10_000)
    """Images in a sample grid, drawn a few at a time: 40 suit small images, 8 those of SD, 4 those of SDXL."""
    samples: SampleSettings = SampleSettings()
    """What the grids show (key prompts)."""
    tensorboard: bool = False
    """Writes metrics, evaluations and sample grids to RUN/tensorboard, too (`pip install fewstep[tensorboard]`)."""
    checkpoint_every: Count = 1000
    """Steps per checkpoint; the newest two are kept, and those that `evaluation.keep` means."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """Judging on the way; `init_from: RUN@best-fid` starts from what it found best."""

    @model_validator(mode="after")
    def _parts_are_equal(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate: {self.accumulate} parts don't divide batch_size {self.batch_size}")
        if self.accumulate > 1 and (most := self.parallel.max_rows_per_part):
            told = f"accumulate={self.accumulate} and parallel.max_rows_per_part={most} both say what a part is"
            raise ValueError(f"accumulate: {told}; set accumulate to 1, or the other to null")
        return self

    def num_parts(self, num_ranks: int = 1) -> int:
        """Equal parts that each of so many ranks computes its rows of a batch in."""
        if not (most := self.parallel.max_rows_per_part):
            return self.accumulate
        rows = max(1, self.batch_size // num_ranks)  # that they divide is checked once the ranks are there
        return next(num for num in range(-(-rows // most), rows + 1) if rows % num == 0)


class TeacherSettings(Settings):
    """How a teacher is trained."""

    optimizer: OptimizerSettings = OptimizerSettings(lr=1e-4)
    """Of the network."""
    noise: NoiseLevels = NoiseLevels(distribution="lognormal")
    """Noise levels of the denoising loss."""
    class_dropout: float = Field(0.0, ge=0, le=1)
    """Share of the labels replaced by the null class, so that the teacher can be guided."""
    ema_decay: float = Field(0.999, ge=0, lt=1)
    """Of the weights that are saved and sampled."""


class AutoencoderSettings(Settings):
    """How an autoencoder is trained."""

    optimizer: OptimizerSettings = OptimizerSettings(lr=2e-3)
    """Of encoder and decoder."""
    kl_weight: float = Field(1e-4, ge=0)
    """Of the posterior's divergence from the unit normal, per number of a latent."""
    l1_weight: float = Field(1.0, ge=0)
    """Of the mean absolute error, which keeps edges sharp, beside the mean squared error of weight 1."""


class StudentSettings(Settings):
    """The few-step denoiser that is being made."""

    num_timesteps: int = Field(1, ge=1, le=1000)
    """K, the number of calls that make an image."""
    timesteps: list[float] | Literal["random"] | None = None
    """The K native times, decreasing; by default evenly spaced levels of the schedule (999, 749, 499, 249 for SDXL).
    `random`: every step has a number of them from 1 to `num_timesteps`, the first where pure noise is and the others
    at random levels (as in arXiv 2605.06376), for a student of any number of steps; it is drawn evenly spaced."""
    stops: Literal["shared", "mixed"] = "shared"
    """Which of the timesteps a step trains: one for the whole batch, as published, or for each sample its own, in
    turn, at the same cost: as many passes, and every update sees all of them."""
    backward_simulation: bool = True
    """Train on its own samples, as at inference. false is the paper's ablation "w/o backward simulation": its input is
    noised real images, each at a random one of the K times (pure noise at the first), with the real condition."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """Of the student; its updates are every `student_every`-th step."""
    ema_decay: float | list[float] = 0.999
    """Of the weights that are saved and sampled, per student update; the official system has none (0). A list keeps
    several averages at once, [0.9999, 0.99995]: the first is meant where none is named; the others are saved as
    `model-ema0.99995` beside `model`, and judged as `ema0.99995_fid`. Each takes 4 bytes per weight on the device."""

    @field_validator("ema_decay", mode="before")
    @classmethod
    def _decays_fit(cls, given: Any) -> Any:
        decays = given if isinstance(given, list) else [given]
        with suppress(TypeError, ValueError, OverflowError):
            fitting = {float(each) for each in decays if 0 <= float(each) < 1}
            if 0 < len(decays) == len(fitting) <= MAX_DECAYS:
                return given
        what = f"a number from 0 to below 1, or a list of different ones, at most {MAX_DECAYS}"
        raise ValueError(f"takes {what}, not {given!r:.60}")

    @field_validator("timesteps", mode="before")
    @classmethod
    def _times_are_a_list(cls, given: Any) -> Any:
        with suppress(TypeError, ValueError, OverflowError):
            if given is None or given == "random" or (isinstance(given, list) and [float(each) for each in given]):
                return given
        raise ValueError(f"takes a list of times, random, or null, not {given!r:.60}")

    @model_validator(mode="after")
    def _timesteps_fit(self) -> Self:
        times = self.timesteps
        if times == "random" and (self.num_timesteps == 1 or not self.backward_simulation):
            raise ValueError("timesteps: random is for num_timesteps of 2 or more, with backward_simulation")
        if not isinstance(times, list):
            return self
        if len(times) != self.num_timesteps:
            raise ValueError(f"timesteps has {len(times)} entries, but num_timesteps is {self.num_timesteps}")
        if sorted(set(times), reverse=True) != times:
            raise ValueError(f"timesteps must decrease, which {times} does not")
        return self


class RegressionSettings(Settings):
    """Pairs of a teacher's noise and image, and how a student's image is compared with the teacher's."""

    pairs: UserPath
    """The folder that `fewstep data pairs` wrote."""
    num: int | None = Field(None, ge=1, le=10**9)
    """With it, pairs that are not there are drawn first, so many, of a teacher on pixels; a bare name then means a
    folder beside the run, where there is none of that name here. null: they must be there."""
    sampler: str
    """What the pairs must have been drawn by, as `fewstep data pairs --sampler` has it; SDXL: euler:50@8."""
    lpips: UserPath | None = None
    """LPIPS: a TorchScript file, or `lpips` for the package of that name (VGG, as published); by default the mean
    squared error of latents, or of pixels where the model has no latents."""
    lpips_size: int | None = Field(None, ge=16, le=8192)
    """Pixels that pictures are resized to for LPIPS; the original DMD has 224 for images of 32 and 64."""
    decoder: UserPath | None = None
    """A folder of diffusers' AutoencoderTiny that decodes latents for LPIPS; by default the model's own autoencoder,
    which takes far more memory."""

    @model_validator(mode="after")
    def _decoded_for_lpips(self) -> Self:
        if not self.lpips and (self.decoder or self.lpips_size):
            raise ValueError("decoder and lpips_size are for lpips, which is not set")
        return self


class RegressSettings(Settings):
    """How a student is pretrained on pairs."""

    checkpointing: Literal["none", "blocks"] = "none"
    """`blocks` keeps no activations inside the student's blocks and computes them again in the backward pass: the same
    gradients, for about a third more arithmetic."""
    student: StudentSettings = StudentSettings()
    regression: RegressionSettings

    @model_validator(mode="after")
    def _one_step(self) -> Self:
        if self.student.num_timesteps != 1:
            raise ValueError("student.num_timesteps: regression trains one timestep, from pure noise; set 1")
        return self
