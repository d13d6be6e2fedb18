"""All cases, by name."""

from benchmarks.cases.optimizer_step import OptimizerStep
from benchmarks.cases.scoring import Scoring
from benchmarks.cases.scoring_memory import ScoringMemory
from benchmarks.cases.selected_grad import SelectedGrad
from benchmarks.cases.topk import TopK

_ALL = (Scoring(), ScoringMemory(), OptimizerStep(), TopK(), SelectedGrad())
CASES = {case.name: case for case in _ALL}
