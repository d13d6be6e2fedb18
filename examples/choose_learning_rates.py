"""The quickstart's learning rates: each method on a small grid, judged by a held-out part of train.

    python examples/choose_learning_rates.py

takes the quickstart's options. The test set has no part in it.
"""

from __future__ import annotations

from functools import partial

import quickstart
from _data import Data, load_data
from _training import Task, num_candidates

GRIDS = {
    quickstart.train_lora: (1e-3, 2e-3, 5e-3, 1e-2, 2e-2),
    quickstart.train_fish_lora: (1e-3, 3e-3, 1e-2, 2e-2),
    quickstart.train_fish_base: (1e-3, 3e-3, 1e-2),
}


def main() -> None:
    args = quickstart.parse_args()
    data = load_data(args.data, args.seed, args.train_samples, args.test_samples)
    quarter = len(data.train) // 4
    task = Task(Data(data.name, data.train[quarter:], data.train[:quarter]), args)
    k = num_candidates(quickstart.add_lora(task.new_model(), quickstart.RANK))
    quickstart.time_scoring = lambda *_: None
    for train, rates in GRIDS.items():
        for lr in rates:
            method = train if train is quickstart.train_lora else partial(train, k=k)
            run = method(task, lr)
            print(
                f"{train.__name__}  lr {lr:<6g}  held-out accuracy {run.curve[-1][1]:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
