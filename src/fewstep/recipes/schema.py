"""What a recipe can hold; every field is documented where it is declared, here or in the settings it is made of."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from fewstep.data.settings import DataSettings, EmbeddingSettings, PromptSettings
from fewstep.embedded.settings import AutoencoderConfig, TextModelConfig
from fewstep.networks.settings import LoRASettings, PixelModelConfig
from fewstep.settings import UserPath
from fewstep.training.dmd2_settings import DMD2Settings
from fewstep.training.settings import AutoencoderSettings, LoopSettings, RegressSettings, TeacherSettings


class RunSettings(LoopSettings):
    """What every run has."""

    description: str = ""
    """One line for `fewstep recipes`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU if there is one."""
    data: DataSettings = DataSettings()

    @model_validator(mode="after")
    def _what_is_offloaded_steps_seldom_and_in_float32(self) -> Self:
        given: Any = self
        told = "parallel.offload_student_optimizer: "
        if self.parallel.offload_student_optimizer and given.kind != "distill":
            raise ValueError(f"{told}is for a distillation, whose student steps seldom; set false")
        if self.parallel.offload_student_optimizer and given.student.optimizer.kind == "adamw8bit":
            raise ValueError(f"{told}adamw8bit updates on a GPU alone; set student.optimizer.kind to adamw, or false")
        return self

    def gives(self, key: str) -> bool:
        """Whether the user gave this dotted key, by --set or in a recipe of their own: not one that fewstep brings."""
        at: Any = self
        for part in key.split("."):
            if part not in at.model_fields_set:
                return False
            at = getattr(at, part)
        return True


class TeachRecipe(RunSettings, TeacherSettings):
    """Trains a teacher from scratch."""

    kind: Literal["teach"] = "teach"
    model: PixelModelConfig = PixelModelConfig()

    @model_validator(mode="after")
    def _null_class_is_trained(self) -> Self:
        if bool(self.class_dropout) != self.model.null_class:
            raise ValueError("class_dropout: guidance needs it and model.null_class (0.1 and true); else set neither")
        return self


class TeachTextRecipe(RunSettings, TeacherSettings):
    """Trains a small text-to-image teacher from scratch, on the latents of an autoencoder."""

    kind: Literal["teach-text"] = "teach-text"
    model: TextModelConfig = TextModelConfig()
    embeddings: EmbeddingSettings = EmbeddingSettings()


class AutoencoderRecipe(RunSettings, AutoencoderSettings):
    """Trains a small autoencoder from scratch."""

    kind: Literal["teach-autoencoder"] = "teach-autoencoder"
    model: AutoencoderConfig = AutoencoderConfig()

    @model_validator(mode="after")
    def _is_not_judged(self) -> Self:
        if self.evaluation.every:
            raise ValueError("evaluation.every: an autoencoder is not judged on the way; its errors are its metrics")
        return self


class WithTeacher(RunSettings):
    """What every run has whose student is made of a teacher."""

    teacher: UserPath
    """A run folder (RUN@best-fid: its best checkpoint), a model folder (diffusers' or ours), one `.safetensors` file of
    an SD or SDXL fine-tune, a hub id `owner/name`, or the name of a `teach` recipe, which is run first if its run does
    not exist."""
    teacher_config: UserPath | None = None
    """For a single file: a diffusers folder or hub id of its family, for configuration, tokenizers and the parts that
    the file lacks; by default its base model on the hub."""
    teacher_prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What a text-to-image teacher predicts, where the scheduler in its folder or `teacher_config` says it wrongly."""
    teacher_family: str | None = None
    """For a teacher of your own: MODULE:NAME of its family, in a module here or an installed one, which is imported
    (docs/adding-a-teacher.md); not needed where an installed package has it as an entry point."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 computes teacher, student, critic, autoencoder and text encoders in it, but neither the discriminator
    nor LPIPS and an AutoencoderTiny; what is trained keeps float32 weights, all else is held in it. There is no
    float16, in which EDM's training diverges (spec, 1.1)."""
    embeddings: EmbeddingSettings = EmbeddingSettings()


class DistillRecipe(WithTeacher, DMD2Settings):
    """Distils a teacher into a few-step student."""

    kind: Literal["distill"] = "distill"
    init_from: UserPath | None = None
    """A distillation or regression whose student, and critic if it has one, this one starts from: RUN (its newest
    checkpoint), RUN@5000 (that step) or RUN@best-fid (the best by a metric of its evaluation). RUN is a folder, or the
    name of a recipe whose run lies beside this one, which is run or finished first where no step is named, with the
    teacher and the images of this one. Optimizers and discriminator start anew."""
    lora: LoRASettings | None = None
    """Student and critic as low-rank weights beside the teacher's, which are there once (keys rank, alpha, targets);
    null trains all weights. Adam's first step moves a weight by about lr alpha / rank sqrt(rank / (3 inputs)), where
    that of all weights moves it by lr: of SDXL, at rank 64 and alpha 8, a 60th, so rates are higher here."""
    guidance_scale: float = Field(1.0, ge=1)
    """Classifier-free guidance on the teacher, uncond + s (cond - uncond); 1 is none. SD 1.5: 1.75, SDXL: 8."""
    prompts: PromptSettings | None = None
    """Prompts for the student (keys source, column); by default the captions of the real images, as in the released
    4-step model. The paper has captions of LAION-Aesthetics 6.25+ here."""

    @model_validator(mode="after")
    def _reals_are_whole_images(self) -> Self:
        reals = self.batch_size * self.gan.real_share
        if self.gan.student_weight and (reals < 0.5 or abs(reals - round(reals)) > 1e-4):
            told = f"{self.gan.real_share:g} of batch_size {self.batch_size} is {reals:g} images"
            raise ValueError(f"gan.real_share: {told}; it must be a whole number, 1 or more")
        return self


class RegressRecipe(WithTeacher, RegressSettings):
    """Pretrains a one-step student on pairs of its teacher's noise and image, for `init_from` of a distillation."""

    kind: Literal["regress"] = "regress"


TeachingRecipe = TeachRecipe | TeachTextRecipe | AutoencoderRecipe
StudentRecipe = DistillRecipe | RegressRecipe
AnyRecipe = TeachingRecipe | StudentRecipe
Recipe = Annotated[AnyRecipe, Field(discriminator="kind")]
