"What several tests need."
import functools, os
os.environ.setdefault("OMP_NUM_THREADS", "1")        # before torch: small tensors gain nothing from threads, and on a busy machine threads wait for each other

import nbformat, pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from diffda.core import Store


@pytest.fixture
def store(tmp_path): return Store(tmp_path/"store")


@pytest.fixture
def breaks_off(monkeypatch):
    "`breaks_off(at)`: fine-tuning writes a checkpoint after every step, and its loss number `at` (from 0) is an interruption, once; returns the list of all that were asked for."
    from diffda import finetune
    def prepare(at):
        real, calls = finetune.denoising, []
        def failing(*a, **k):
            loss = real(*a, **k)
            def broken(i, members):
                calls.append(i)
                if len(calls) == at + 1: raise KeyboardInterrupt
                return loss(i, members)
            return broken
        monkeypatch.setattr(finetune, "resumable", functools.partial(finetune.resumable, every_s=0))
        monkeypatch.setattr(finetune, "denoising", failing)
        return calls
    return prepare


PARAMETERS = '''scale: str = "nano"  # "nano" or "paper"
seeds: list = [0, 1, 2]  # one trial each
strength: float = 0.9  # share of the noise
num_copies: int = 5  # copies
metric: str = "top1"  # what to report
equal_steps: bool = True  # a switch
store: str = ""  # folder of finished work
out: str = "results"  # folder of the results'''

TABLE = '''import pathlib, sys
import pandas as pd
print("running", strength)
row = dict(method="baseline", task="toy-task", metric=metric, mean=12.3, std=float("nan"), n=len(seeds), scale=scale, counterpart="Toys", paper_mean=45.6, paper_std=0.7)
pd.DataFrame([row]).to_csv(pathlib.Path(out)/"toy"/"table01"/"table.csv", index=False)'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "Make a paper of one item, `toy/table01`, the only one there is; `toy(source)` sets what its last cell runs after writing the table."
    papers = tmp_path/"pa{pers"/"all"                # papermill would take the brace for a placeholder
    def write(source="pass"):
        cells = [new_markdown_cell("# A toy table"), new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), new_code_cell(TABLE), new_code_cell(source)]
        (papers/"toy").mkdir(parents=True, exist_ok=True)
        nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}), papers/"toy"/"table01.ipynb")
        return papers/"toy"/"table01.ipynb"
    monkeypatch.setattr("diffda.report.papers_dir", lambda: papers)
    write()
    return write
