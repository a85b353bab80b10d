"""What a recipe can hold; every field is documented where it is declared, here or in the settings it is made of."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fewstep.networks.pixel_model import PixelModelConfig
from fewstep.settings import Settings
from fewstep.training.dmd2 import DMD2Settings
from fewstep.training.loop import LoopSettings
from fewstep.training.teacher import TeacherSettings


class DataSettings(Settings):
    """Where the real images come from; size, grey or RGB, and the number of classes are the model's."""

    source: str = "digits"
    """`digits` (embedded), an image folder, a parquet file, a WebDataset tar, or a folder of those."""
    split: str = "train"
    """The split to read, where the source has several."""
    image_column: str | None = None
    """Column of the images; by default the first of image, png, jpg, jpeg, webp."""
    label_column: str | None = None
    """Column of the class indices; by default the first of label, labels, class, cls."""
    caption_column: str | None = None
    """Column of the captions, for text-to-image; by default the first of caption, text, txt, prompt."""


class RunSettings(LoopSettings):
    """What every run has."""

    description: str = ""
    """One line for `fewstep recipes`."""
    seed: int = Field(0, ge=0)
    """Everything random in a run is a function of this, the step and the rank."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU if there is one."""
    data: DataSettings = DataSettings()


class TeachRecipe(RunSettings, TeacherSettings):
    """Trains a teacher from scratch."""

    kind: Literal["teach"] = "teach"
    model: PixelModelConfig = PixelModelConfig()

    @model_validator(mode="after")
    def _null_class_is_trained(self) -> Self:
        if bool(self.class_dropout) != self.model.null_class:
            raise ValueError("class_dropout: guidance needs it and model.null_class (0.1 and true); else set neither")
        return self


class DistillRecipe(RunSettings, DMD2Settings):
    """Distils a teacher into a few-step student."""

    kind: Literal["distill"] = "distill"
    teacher: str
    """A run folder, a model folder (diffusers' or ours), one `.safetensors` file of an SD or SDXL fine-tune, a hub id
    `owner/name`, or the name of a `teach` recipe, which is run first if its run does not exist."""
    teacher_config: str | None = None
    """For a single file: a diffusers folder or hub id of its family, for configuration, tokenizers and the parts that
    the file lacks; by default its base model on the hub."""
    teacher_prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What a text-to-image teacher predicts, where the scheduler in its folder or `teacher_config` says it wrongly."""
    guidance_scale: float = Field(1.0, ge=1)
    """Classifier-free guidance on the teacher, uncond + s (cond - uncond); 1 is none. SD 1.5: 1.75, SDXL: 8."""


Recipe = Annotated[TeachRecipe | DistillRecipe, Field(discriminator="kind")]
