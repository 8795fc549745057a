"""A stranger's notebook, outside the package: a strategy, a filter, a fine-tuning part, a dataset and a table
are added in one cell each, planned, run, reproduced by the command line; nothing of the package is edited."""
import json

import numpy as np, pandas as pd, pytest
from PIL import Image

from diffda import cli

STRATEGY = '''
import dataclasses
import numpy as np
from diffda.settings import setting
from diffda.utilize import STRATEGIES, Strategy

@STRATEGIES.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstImages(Strategy):
    "All real images, and the first `portion` of the synthetic ones."
    portion: float = setting(.5, "(0, 1]")
    name, title = "first-images", "real images and the first synthetic ones"

    def positions(self, owners, n_real, seed, epoch, draws=0):
        return np.arange(n_real + round(self.portion*len(owners)))

    def size(self, n_real, n_synthetic): return n_real + round(self.portion*n_synthetic)
'''

FILTER = '''
from diffda.filters import FILTERS, Filter

@FILTERS.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Brightness(Filter):
    "Drop the darkest images."
    name, title = "brightness", "brightness"

    def scores(self, pool, job, folders):
        return np.array([np.asarray(pool.image(i)).mean() for i in range(len(pool))])
'''

PART = '''
from pathlib import Path
from diffda.backbone import EMBEDDINGS, TOKENS
from diffda.core import read_json, write_json
from diffda.finetune import FineTune
from diffda.torch_core import generator_for

@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomWords(FineTune):
    "A new word for every class, drawn at random: nothing is learned."
    size: float = setting(.1, "(0, inf)")

    def train(self, split, backbone, previous, folder, seed, progress=True):
        import torch
        from safetensors.torch import save_file
        width = read_json(Path(backbone.source)/"text_encoder"/"config.json")["hidden_size"]
        words = {name: f"<{name}>" for name in split.class_names}
        draws = generator_for(seed, "random words")
        vectors = {word: torch.randn(1, width, generator=draws)*self.size for word in words.values()}
        save_file(vectors, folder/EMBEDDINGS)
        write_json(folder/TOKENS, words)
        return {"words": len(words)}
'''

DATASET = '''
from diffda.data import NANO_TRAINING, Task, register_task
from diffda.datasets.base import Source, register_source
from diffda.samples import folder_dataset

register_source(Source(
    "shapes", "Shapes", read=lambda root, task: folder_dataset("shapes", root), folders=("shapes",),
    classes=2,
    counts={"original": {"train": 8, "test": 4}}, expects="train/<class> and test/<class>", page="–",
    licence="–", how="draw it.", size_gb=.001))
training = dataclasses.replace(NANO_TRAINING, epochs=1, evaluations=1, batch_size=4)
register_task(Task("shapes-3", "shapes", "nano", "conventional", 3, training, "Shapes", "nano"))
'''

GRID = '''
from diffda.generate import SDEdit
from diffda.method import Method, register
from diffda.pipeline import plan, run_all

mine = register(Method(
    "random-words", "Random words", finetune=RandomWords(),
    generate=SDEdit(prompt="article", strength=.9, num_inference_steps=3, num_copies=2),
    filter=Brightness(share=.25), utilize="first-images"))
varied = {"portion": portions, "RandomWords.size": [.2]}
runs = plan(["baseline", "random-words"], ["shapes-3"], seeds, vary=varied)
'''

TABLE = '''
from diffda.report import save_results, table
records = run_all(runs, store or None, progress=False)
measured = table(records, "study/shapes")
folder = save_results("study/shapes", out, records, measured)
'''

PARAMETERS = '''scale: str = "nano"  # the size of the models
seeds: list = [0, 1]  # one trial each
portions: list = [0.5, 1.0]  # of the synthetic images
store: str = ""  # folder of finished work
out: str = "results"  # folder of the results'''

def shapes(folder):
    "Bright squares and dark stripes, 4 images of each for training and 2 for testing."
    rng = np.random.default_rng(0)
    for part, n in (("train", 4), ("test", 2)):
        for name in ("square", "stripe"):
            (folder/part/name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
                if name == "square": pixels[8:24, 8:24] += 150
                else: pixels[:, ::4] += 90
                Image.fromarray(pixels).save(folder/part/name/f"{i}.png")

@pytest.fixture(scope="module")
def reproduced(tmp_path_factory, request):
    "The folder of a stranger's notebook that was run from end to end, and the records that it left."
    from conftest import write_notebook
    root = tmp_path_factory.mktemp("elsewhere")
    shapes(root/"data"/"shapes")
    cells = ["# Shapes, for once", (PARAMETERS, "parameters"), STRATEGY, FILTER, PART, DATASET,
             (GRID, "grid"), TABLE]
    path = write_notebook(root/"study"/"shapes.ipynb", cells)
    patch = pytest.MonkeyPatch()
    request.addfinalizer(patch.undo)
    patch.setenv("DIFFDA_DATA", str(root/"data"))
    command = ["reproduce", str(path), "--out", str(root/"out"), "--store", str(root/"store"),
               "-p", "seeds=[0]"]
    assert cli.main(command) == 0
    lines = (root/"out"/"study"/"shapes"/"records.jsonl").read_text().splitlines()
    return root, pd.DataFrame(map(json.loads, lines)).set_index(["method", "portion"], drop=False)

def test_the_table_is_there(reproduced):
    root, records = reproduced
    table = pd.read_csv(root/"out"/"study"/"shapes"/"table.csv")
    assert set(table.method) == {"baseline", "random-words"} and table["mean"].between(0, 100).all()
    assert len(table) == 3 and (root/"out"/"study"/"shapes"/"shapes.ipynb").exists()

def test_the_dataset_is_the_strangers(reproduced):
    root, records = reproduced
    assert set(records.task) == {"shapes-3"} and set(records.dataset) == {"shapes"}
    assert set(records.n_real) == {6}
    assert set(records.counterpart) == {"Shapes"} and set(records.epochs) == {1}

def test_the_strategy_is_used(reproduced):
    "12 images, 3 of which the filter drops: epochs of 6 + 4 and of 6 + 9 images, in batches of 4."
    root, records = reproduced
    own = records.loc["random-words"]
    assert set(own.utilize) == {"first-images"} and own.n_synthetic.tolist() == [9, 9]
    assert own.steps.tolist() == [3, 4] and records.loc["baseline"].steps.tolist() == [2]

def test_a_changed_setting_of_the_strategy_is_another_key(reproduced):
    "Another training, and the same pool."
    own = reproduced[1].loc["random-words"]
    assert own.portion.tolist() == [.5, 1.] and own.key.nunique() == 2 and own["pool"].nunique() == 1

def test_the_filter_is_used(reproduced):
    root, records = reproduced
    own = records.loc["random-words"]
    assert set(own["filter"]) == {"brightness"} and set(own["Brightness.share"]) == {.25}
    assert set(own.n_dropped) == {3} and set(own.work_filter) == {12.}

def test_the_fine_tuning_part_is_used(reproduced):
    root, records = reproduced
    own = records.loc["random-words"]
    assert set(own.finetune) == {"RandomWords"} and set(own["RandomWords.size"]) == {.2}
    rows = [json.loads(line) for line in open(f"{own['pool'].iloc[0]}/metadata.jsonl")]
    assert {row["prompt"] for row in rows} == {"a photo of a <square>", "a photo of a <stripe>"}
    assert len(list((root/"store"/"adaptation").iterdir())) == 1

def test_a_second_run_finds_everything(reproduced, monkeypatch, capsys):
    root, records = reproduced
    monkeypatch.setenv("DIFFDA_DATA", str(root/"data"))
    before = {path: path.stat().st_mtime_ns for path in (root/"store").rglob("DONE")}
    command = ["reproduce", str(root/"study"/"shapes.ipynb"), "--out", str(root/"again"),
               "--store", str(root/"store"), "-p", "seeds=[0]", "-p", "portions=[1.0]"]
    assert cli.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in (root/"store").rglob("DONE")} == before
    again = pd.read_json(root/"again"/"study"/"shapes"/"records.jsonl", lines=True)
    assert again.key.tolist() == [records.loc["baseline"].key.iloc[0], records.loc[("random-words", 1.)].key]

def test_the_package_is_untouched(reproduced):
    "What the notebook has registered, it has registered in its own process."
    from diffda.data import list_tasks
    from diffda.filters import FILTERS
    from diffda.method import list_methods
    from diffda.utilize import STRATEGIES
    known = {*STRATEGIES.names(), *FILTERS.names(), *list_methods(), *list_tasks()}
    assert not known & {"first-images", "brightness", "random-words", "shapes-3"}
