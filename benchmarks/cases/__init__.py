"""All cases, by name."""

from benchmarks.cases.ird import IRD
from benchmarks.cases.linear_fisher import LinearFisher
from benchmarks.cases.optimizer_step import OptimizerStep
from benchmarks.cases.scoring import Scoring
from benchmarks.cases.scoring_memory import ScoringMemory
from benchmarks.cases.selected_grad import SelectedGrad
from benchmarks.cases.topk import TopK
from benchmarks.cases.training_step import TrainingStep

_ALL = (
    *(Scoring(), ScoringMemory(), LinearFisher(), IRD(), OptimizerStep(), TopK()),
    *(SelectedGrad(), TrainingStep()),
)
CASES = {case.name: case for case in _ALL}
