"What several tests need."
import functools, os

# before torch: small tensors gain nothing from threads, and on a busy machine threads wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")

import nbformat, pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from diffda.store import Store

@pytest.fixture
def store(tmp_path): return Store(tmp_path/"store")

@pytest.fixture
def breaks_off(monkeypatch):
    """`breaks_off(at)`: fine-tuning writes a checkpoint after every step, and its loss number `at` (from 0)
    is an interruption, once; returns the list of all that were asked for."""
    from diffda import finetune
    def prepare(at):
        real, calls = finetune.denoising, []
        def failing(*given, **named):
            loss = real(*given, **named)
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
row = dict(method="baseline", task="toy-task", metric=metric, mean=12.3, std=float("nan"), n=len(seeds),
           scale=scale, counterpart="Toys", paper_mean=45.6, paper_std=0.7)
pd.DataFrame([row]).to_csv(pathlib.Path(out)/"toy"/"table01"/"table.csv", index=False)'''

KERNEL = {"name": "python3", "display_name": "python3", "language": "python"}

def write_notebook(path, cells):
    "A notebook of `cells`: markdown where they start with '#' and a blank, code else; (text, tag) has a tag."
    made = []
    for cell in cells:
        source, *tags = (cell,) if isinstance(cell, str) else cell
        if source.startswith("# "): made.append(new_markdown_cell(source))
        else: made.append(new_code_cell(source, metadata={"tags": tags}))
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=made, metadata={"kernelspec": KERNEL}), path)
    return path

@pytest.fixture
def notebook(): return write_notebook

@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Make a paper of one item, `toy/table01`, the only one there is; `toy(source)` sets what its last cell
    runs after writing the table."""
    # papermill would take the brace for a placeholder
    papers = tmp_path/"pa{pers"/"all"
    def write(source="pass"):
        cells = ["# A toy table", (PARAMETERS, "parameters"), TABLE, source]
        return write_notebook(papers/"toy"/"table01.ipynb", cells)
    monkeypatch.setattr("diffda.places.papers_dir", lambda: papers)
    write()
    return write
