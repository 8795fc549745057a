"The command line: what it prints, what it refuses, and its exit codes."
import io, json, os, signal, subprocess, sys

import nbformat, pytest
from nbformat.v4 import new_code_cell, new_notebook

import diffda
from diffda import cli
from diffda.data import list_tasks
from diffda.method import list_methods
from diffda.places import paper_files, paper_notebook


def call(*argv):
    "The exit code of `diffda` with these arguments."
    try: return cli.main([str(a) for a in argv])
    except SystemExit as e: return e.code


def reproduce(tmp_path, *more, item="toy/table01"):
    return call("reproduce", item, "--out", tmp_path/"out", "--store", tmp_path/"store", *more)


# list

@pytest.mark.parametrize("what, names", [("methods", list_methods), ("tasks", list_tasks)])
def test_list_shows_the_registry(what, names, capsys):
    assert call("list", what) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(names())
    assert call("list", what, "--json") == 0
    assert [r["name"] for r in json.loads(capsys.readouterr().out)] == list(names())


def test_list_tasks_of_one_scale(capsys):
    for scale in ("nano", "paper"):
        assert call("list", "tasks", "--scale", scale, "--json") == 0
        rows = json.loads(capsys.readouterr().out)
        assert [r["name"] for r in rows] == list_tasks(scale) and {r["scale"] for r in rows} == {scale}


def test_list_papers_gives_titles(capsys):
    assert call("list", "papers", "--json") == 0
    titles = {r["name"]: r["title"] for r in json.loads(capsys.readouterr().out)}
    assert "unidiffda/table02" in titles and all(titles.values())


def test_list_of_filters_and_strategies(capsys):
    assert call("list", "filters", "--json") == 0
    rows = {row["name"]: row["settings"] for row in json.loads(capsys.readouterr().out)}
    assert rows["safety"] == "tries=1" and "share=0.1" in rows["confidence"]
    assert call("list", "strategies", "--json") == 0
    rows = {row["name"]: row["settings"] for row in json.loads(capsys.readouterr().out)}
    assert rows["lrr"] == "p=0.5" and rows["fc"] == ""


def test_list_of_datasets_that_are_here(tmp_path, monkeypatch, capsys):
    (tmp_path/"CUB_200_2011").mkdir()
    monkeypatch.setenv("DIFFDA_DATA", str(tmp_path))
    assert call("list", "datasets", "--json") == 0
    found = {row["name"]: row["found"] for row in json.loads(capsys.readouterr().out)}
    assert found["birds"] == str(tmp_path/"CUB_200_2011") and found["cars"] is None


def test_columns_of_rows_with_other_keys():
    "A method with a filter has one key more."
    rows = [{"a": 1}, {"a": 22, "b": None}, {"b": "x"}]
    assert cli.columns(rows).splitlines() == ["a   b", "1", "22", "    x"]
    assert cli.columns([]) == "(none)"


_HELP = [["--help"], ["list", "--help"], ["reproduce", "--help"], ["build-nano", "--help"], ["--version"]]


@pytest.mark.parametrize("argv", _HELP)
def test_help_and_version(argv, capsys):
    assert call(*argv) == 0
    said = f"diffda {diffda.__version__}" if argv == ["--version"] else "usage: diffda"
    assert said in capsys.readouterr().out


LOADED = """
import resource, sys, types
from diffda.cli import main
try: main({argv!r})
except SystemExit: pass
heavy = ("torch", "torchvision", "pandas", "papermill", "diffusers", "transformers", "matplotlib", "scipy")
# a module that is only promised, by lazy_loader, has a type of its own
print([name for name in heavy if type(sys.modules.get(name)) is types.ModuleType], file=sys.stderr)
print(resource.getrusage(resource.RUSAGE_SELF).ru_utime, file=sys.stderr)
"""


@pytest.mark.parametrize("argv", [["--help"], *(["list", what] for what in cli.LISTS)], ids=" ".join)
def test_help_and_lists_load_nothing_heavy(argv):
    "They answer at once: in a fifth of a second of work, for which a busy machine is given two."
    argv = [sys.executable, "-c", LOADED.format(argv=argv)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    loaded, seconds = done.stderr.splitlines()[-2:]
    assert loaded == "[]" and float(seconds) < 2 and len(done.stdout) > 100


# what is refused, and with which code

_BAD = [[], ["reprodus", "x/y"], ["list", "tables"], ["list"], ["reproduce"],
        ["list", "tasks", "--scale", "huge"]]


@pytest.mark.parametrize("argv", _BAD)
def test_bad_arguments(argv, capsys):
    assert call(*argv) == 2
    assert "diffda" in capsys.readouterr().err


def test_unknown_item_lists_the_nearest(capsys):
    assert call("reproduce", "unidiffda/table2") == 2
    error = capsys.readouterr().err.strip()
    assert "unidiffda/table02" in error and "\n" not in error
    assert call("reproduce", "../../etc/passwd") == 2
    assert call("reproduce", "nowhere/mine.ipynb") == 2 and "There is no notebook" in capsys.readouterr().err


@pytest.mark.parametrize("param, hint", [
    ("seed=[0]", "did you mean seeds"), ("seeds=0", "takes a list; write -p 'seeds=[0]'"),
    ("seeds=[a]", "Each entry of seeds takes a whole number"), ("seeds=[0", "Cannot read"),
    ("seeds", "name=value"),
    ("strength=high", "a number"), ("strength=true", "a number"), ("num_copies=2.5", "a whole number"),
    ("num_copies=three", "num_copies takes a whole number such as 3; found three."),
    ("num_copies=true", "a whole number"), ("equal_steps=1", "true or false; found 1."),
    ("metric=[top1]", "text"), ("scale=paper", "--scale"), ("out=x", "--out")])
def test_wrong_parameters(toy, tmp_path, param, hint, capsys):
    assert reproduce(tmp_path, "-p", param) == 2
    error = capsys.readouterr().err.strip()
    assert hint in error and "\n" not in error
    assert not (tmp_path/"out").exists()


@pytest.mark.parametrize("param, hint", [
    ("methods=baseline", "methods takes a list; write -p 'methods=[baseline]'."),
    ("seeds=0", "write -p 'seeds=[0]'"),
    ("epochs=three", "epochs takes a whole number such as 3; found three."),
    ("methods=[basline]", "baseline"), ("tasks=[bird-5]", "birds-5"),
    ("executor=locale", "did you mean local")])
def test_wrong_parameters_of_a_paper(param, hint, capsys):
    assert call("plan", "unidiffda/table02", "-p", param) == 2
    error = capsys.readouterr().err.strip()
    assert hint in error and "\n" not in error


def test_an_executor_is_known_before_the_kernel_asks():
    notebook = paper_notebook("unidiffda/table02")
    for right in ("serial", "local", "local:2"):
        assert cli.read_params([f"executor={right}"], notebook) == {"executor": right}
    for wrong in ("locale", "local:0", "2"):
        with pytest.raises(cli.WrongUsage, match="executor"): cli.read_params([f"executor={wrong}"], notebook)


def test_right_parameters(toy):
    pairs = ["seeds=[3, 4]", "strength=1", "num_copies=2", "metric=top5", "equal_steps=false"]
    want = {"seeds": [3, 4], "strength": 1.0, "num_copies": 2, "metric": "top5", "equal_steps": False}
    assert cli.read_params(pairs, toy()) == want
    pairs = ["strength=1e-3", "metric=1", "seeds=[]"]
    assert cli.read_params(pairs, toy()) == {"strength": 0.001, "metric": "1", "seeds": []}
    assert cli.read_params(["metric=a=b"], toy()) == {"metric": "a=b"}


@pytest.mark.parametrize("option", ["--out", "--store"])
def test_unwritable_folder_is_found_before_anything_runs(toy, tmp_path, option, monkeypatch, capsys):
    monkeypatch.setattr(cli, "execute", lambda *a: pytest.fail("it ran"))
    (tmp_path/"file").write_text("")
    assert reproduce(tmp_path, option, tmp_path/"file") == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("diffda: Cannot write") and "\n" not in error


@pytest.mark.parametrize("option", ["--out", "--store"])
def test_nothing_is_written_into_a_dataset(toy, tmp_path, option, monkeypatch, capsys):
    "There it would be taken for a class."
    monkeypatch.setattr(cli, "execute", lambda *a: pytest.fail("it ran"))
    (tmp_path/"data"/"CUB_200_2011").mkdir(parents=True)
    monkeypatch.setenv("DIFFDA_DATA", str(tmp_path/"data"))
    assert reproduce(tmp_path, option, tmp_path/"data"/"CUB_200_2011"/"x") == 1
    error = capsys.readouterr().err
    assert "lies inside the data of birds" in error and "one of its classes" in error
    assert not list((tmp_path/"data"/"CUB_200_2011").iterdir())


def test_every_paper_notebook_has_the_common_parameters():
    from papermill import inspect_notebook
    for item, path in paper_files(".ipynb").items():
        assert {"scale", "store", "out"} <= set(inspect_notebook(str(path))), item
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert not any(cell.get("outputs") for cell in cells), f"{item} has outputs"


# runs

def test_reproduce(toy, tmp_path, capsys):
    assert reproduce(tmp_path, "-p", "seeds=[7]", "-p", "strength=0.25") == 0
    out, folder = capsys.readouterr().out, tmp_path/"out"/"toy"/"table01"
    assert "running 0.25" in out and "12.30" in out and "45.60 ± 0.70" in out and "nano scale" in out
    assert str(folder/"table.csv") in out and str(folder/"table01.ipynb") in out
    assert sorted(p.name for p in folder.iterdir()) == ["table.csv", "table01.ipynb"]


def test_a_known_problem_is_one_sentence(toy, tmp_path, capsys):
    toy("from diffda.core import DiffDAError\nraise DiffDAError('The box is empty; fill it.')")
    assert reproduce(tmp_path) == 1
    assert capsys.readouterr().err.strip() == "diffda: The box is empty; fill it."
    cells = nbformat.read(tmp_path/"out"/"toy"/"table01"/"table01.failed.ipynb", 4).cells
    assert any(o.output_type == "error" for c in cells for o in c.get("outputs", []))


def test_any_other_failure_names_the_notebook(toy, tmp_path, capsys):
    toy("1/0")
    assert reproduce(tmp_path) == 1
    error = capsys.readouterr().err.strip()
    kept = tmp_path/"out"/"toy"/"table01"/"table01.failed.ipynb"
    assert "ZeroDivisionError" in error and str(kept) in error and "\n" not in error


def test_a_failed_run_leaves_the_good_notebook(toy, tmp_path, capsys):
    good = tmp_path/"out"/"toy"/"table01"/"table01.ipynb"
    assert reproduce(tmp_path) == 0
    before = good.read_bytes()
    toy("1/0")
    assert reproduce(tmp_path) == 1 and good.read_bytes() == before
    assert good.with_name("table01.failed.ipynb").exists()
    toy()
    assert reproduce(tmp_path) == 0 and not good.with_name("table01.failed.ipynb").exists()


def test_the_process_dies(toy, tmp_path, capsys):
    toy("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert reproduce(tmp_path) == 1
    assert "resumes" in capsys.readouterr().err


def test_the_notebook_imports_the_same_package(toy, tmp_path, capsys, monkeypatch):
    (tmp_path/"diffda").mkdir()
    (tmp_path/"diffda"/"__init__.py").write_text("raise ImportError('the wrong diffda')")
    monkeypatch.chdir(tmp_path)
    toy("import diffda; print('from', diffda.__file__)")
    assert reproduce(tmp_path) == 0
    assert f"from {diffda.__file__}" in capsys.readouterr().out


SLEEPS = "import time\nprint('sleeping', flush=True)\ntime.sleep(60)"

# a job started in the background inherits that Ctrl-C is ignored
STOPPABLE = """
import signal, sys
from diffda.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main())
"""


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_ctrl_c_keeps_the_earlier_notebook(toy, tmp_path):
    notebook, folder = toy(SLEEPS), tmp_path/"out"/"toy"/"table01"
    folder.mkdir(parents=True)
    (folder/"table01.ipynb").write_text("the earlier one")
    options = ["--out", tmp_path/"out", "--store", tmp_path/"store"]
    argv = [sys.executable, "-c", STOPPABLE, "reproduce", notebook, *options]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    with subprocess.Popen(list(map(str, argv)), **pipes) as run:
        while "sleeping" not in run.stdout.readline(): assert run.poll() is None
        os.killpg(run.pid, signal.SIGINT)
        error = run.communicate(timeout=60)[1].strip()
    assert run.returncode == 130 and "the same command resumes" in error and "Traceback" not in error
    assert [path.name for path in folder.iterdir() if path.suffix == ".ipynb"] == ["table01.ipynb"]
    assert (folder/"table01.ipynb").read_text() == "the earlier one"


# a stranger's notebook

STRANGER = '''import dataclasses
import numpy as np
from diffda.jobs import plan
from diffda.utilize import STRATEGIES, FullReplacement

@STRATEGIES.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Every(FullReplacement):
    name, title = "every", "every n-th synthetic image"
    n: int = 2

    def positions(self, owners, n_real, seed, epoch, draws=0):
        return super().positions(owners, n_real, seed, epoch)[::self.n]

    def size(self, n_real, n_synthetic): return -(-n_synthetic//self.n)'''

GRID = '''few = dict(epochs=1, num_copies=1, strength=.5, num_inference_steps=2)
runs = plan(methods, ["nano-digits-1"], [0], utilize="every", **few)
more_runs = plan(methods, ["nano-digits-1"], [0], utilize=Every(n=1), **few) + runs
print(len(runs))'''

TOLD = '''import json, pathlib
keys = [job.train.key for job in (*runs, *more_runs)]
(pathlib.Path(out)/"mine"/"figure1"/"keys.json").write_text(json.dumps(keys))'''


@pytest.fixture
def stranger(tmp_path):
    "The path of a notebook outside the package that brings a strategy of its own."
    path = tmp_path/"mine"/"figure1.ipynb"
    path.parent.mkdir()
    texts = ('scale: str = "nano"', 'store: str = ""', 'out: str = ""')
    parameters = "\n".join(['methods: list = ["real-guidance"]', *texts])
    cells = [new_code_cell(parameters, metadata={"tags": ["parameters"]}), new_code_cell(STRANGER),
             new_code_cell(GRID, metadata={"tags": ["grid"]}), new_code_cell(TOLD)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), path)
    return path


def test_a_notebook_by_its_path(stranger, tmp_path, monkeypatch, capsys):
    "It has the name of its folder and file, and what is planned before has the keys of what is run."
    jobs = cli.planned_runs(stranger, {})
    assert [job.method.utilize.n for job in jobs] == [2, 1]
    monkeypatch.chdir(tmp_path)
    assert call("plan", "mine/figure1.ipynb", "--store", tmp_path/"store") == 0
    assert "mine/figure1 at nano scale\n2 classifiers" in capsys.readouterr().out
    assert reproduce(tmp_path, item="mine/figure1.ipynb") == 0
    assert "mine/figure1 at nano scale" in capsys.readouterr().out
    keys = json.loads((tmp_path/"out"/"mine"/"figure1"/"keys.json").read_text())
    assert list(dict.fromkeys(keys)) == [job.train.key for job in jobs]


def test_names_in_a_strangers_notebook_are_its_own(stranger):
    assert cli.read_params(["methods=[its-own]"], stranger) == {"methods": ["its-own"]}
    with pytest.raises(cli.WrongUsage, match="did you mean methods"):
        cli.read_params(["method=[gif]"], stranger)


@pytest.mark.parametrize("source", ["1/0", "%matplotlib inline"])
def test_a_strangers_cell_that_fails(stranger, source, capsys):
    notebook = nbformat.read(stranger, 4)
    notebook.cells[1].source = source
    nbformat.write(notebook, stranger)
    assert call("plan", stranger) == 1
    error = capsys.readouterr().err.strip()
    assert f"A cell of {stranger} failed with" in error and "\n" not in error


def test_results_do_not_overwrite_their_notebook(tmp_path, stranger, capsys):
    inside = tmp_path/"out"/"mine"/"mine"/"mine.ipynb"
    inside.parent.mkdir(parents=True)
    stranger.rename(inside)
    assert call("reproduce", inside, "--out", tmp_path/"out", "--store", tmp_path/"store") == 2
    assert "would be overwritten" in capsys.readouterr().err


def test_places_are_settled_before_the_kernel_starts_elsewhere(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("DATA", "CHECKPOINTS"): monkeypatch.setenv(f"DIFFDA_{name}", name.lower())
    (tmp_path/"checkpoints").mkdir()
    toy("from diffda.places import checkpoints_root, data_root\nprint(data_root(), checkpoints_root())")
    assert reproduce(tmp_path) == 0
    assert f"{tmp_path}/data {tmp_path}/checkpoints" in capsys.readouterr().out


# the stream that thins out progress bars

def test_screen_passes_everything_to_a_terminal():
    log = io.StringIO()
    cli.Screen(log, live=True).write("\r 10%|#   |")
    assert log.getvalue() == "\r 10%|#   |"


def test_screen_thins_out_bars_but_keeps_lines():
    from tqdm.std import tqdm
    log = io.StringIO()
    screen = cli.Screen(log, every_s=3600, live=False)
    screen.write("an estimate\n\n")
    for i in tqdm(range(3), file=screen, desc="outer", mininterval=0):
        for j in tqdm(range(50), file=screen, desc="inner", mininterval=0, leave=False): pass
        tqdm.write(f"word {i}", file=screen)
    screen.write("the end\n")
    lines = log.getvalue().splitlines()
    assert lines[0] == "an estimate" and lines[-1] == "the end"
    assert [line for line in lines if line.startswith("word")] == ["word 0", "word 1", "word 2"]
    assert not any("%|" in line for line in lines) and len(lines) < 12


# build-nano

def test_build_nano_without_sources(tmp_path, capsys):
    pytest.importorskip("mlxtend")
    options = ["--out", tmp_path/"world", "--sources", tmp_path, "--store", tmp_path/"store"]
    assert call("build-nano", *options) == 1
    error = capsys.readouterr().err.strip()
    assert "idx files" in error and "\n" not in error


# paths

def test_paths_in_parameters_count_from_where_the_command_was_given(tmp_path, monkeypatch):
    "The kernel starts in the folder of the results."
    monkeypatch.chdir(tmp_path)
    (tmp_path/"models"/"mine").mkdir(parents=True)
    (tmp_path/"ph.json").write_text("{}")
    (tmp_path/"class").mkdir()
    notebook = paper_notebook("unidiffda/table02")
    for given, read in (("models/mine@64", f"{tmp_path}/models/mine@64"), ("sd15@64", "sd15@64")):
        assert cli.read_params([f"backbone={given}"], notebook) == {"backbone": read}
    change = "change={TextualInversion.phrases: ph.json, prompt: class, strength: 0.5}"
    want = {"TextualInversion.phrases": f"{tmp_path}/ph.json", "prompt": "class", "strength": .5}
    assert cli.read_params([change], notebook) == {"change": want}
