"""Everything that one trial needs, as a section of the study file."""

from cadis_ray.data.settings import Data
from cadis_ray.finetuning.settings import NOISY, FineTuning
from cadis_ray.interface.section import Positive, Section
from cadis_ray.models.settings import BaseClassifier, BlackBox, Classifier, Denoiser, Kind
from cadis_ray.smoothing.settings import Certification, Validation


class Configuration(Section):
    """Everything one trial needs."""

    data: Data
    sigma: Positive
    denoiser: Denoiser
    classifier: Classifier
    base_classifier: BaseClassifier = BaseClassifier()
    black_box: BlackBox = BlackBox()
    finetuning: FineTuning = FineTuning()
    validation: Validation = Validation()
    certification: Certification = Certification()

    @property
    def kind(self) -> Kind:
        """The kind of base classifier, which ``base_classifier.kind`` may leave to the recipe."""
        if self.finetuning.recipe == "black_box_prompt":
            return "black_box"
        noisy = self.finetuning.recipe in NOISY
        return self.base_classifier.kind or ("classify" if noisy else "denoise_then_classify")
