"""All cases, by name."""

from benchmarks.cases.optimizer_step import OptimizerStep
from benchmarks.cases.scoring import Scoring
from benchmarks.cases.scoring_memory import ScoringMemory
from benchmarks.cases.topk import TopK

CASES = {case.name: case for case in (Scoring(), ScoringMemory(), OptimizerStep(), TopK())}
