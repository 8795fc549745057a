"The command line: what it prints, what it refuses, and its exit codes."
import io, json, os, signal, subprocess, sys, time
from pathlib import Path

import nbformat, pytest

import diffda
from diffda import cli
from diffda.core import DiffDAError
from diffda.data import list_tasks
from diffda.method import list_methods
from diffda.report import paper_notebook

COMMAND = [sys.executable, "-c", "import sys; from diffda.cli import main; sys.exit(main())"]


def call(*argv):
    "The exit code of `diffda` with these arguments."
    try: return cli.main([str(a) for a in argv])
    except SystemExit as e: return e.code


def reproduce(tmp_path, *more): return call("reproduce", "toy/table01", "--out", tmp_path/"out", "--store", tmp_path/"store", *more)


# list

@pytest.mark.parametrize("what, names", [("methods", list_methods), ("tasks", list_tasks)])
def test_list_shows_the_registry(what, names, capsys):
    assert call("list", what) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [l.split()[0] for l in lines[1:]] == list(names())
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


@pytest.mark.parametrize("argv", [["--help"], ["list", "--help"], ["reproduce", "--help"], ["build-nano", "--help"], ["--version"]])
def test_help_and_version(argv, capsys):
    assert call(*argv) == 0
    assert ("diffda " + diffda.__version__ if argv == ["--version"] else "usage: diffda") in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    code = "import sys; from diffda.cli import parser; parser().format_help(); print({'torch', 'pandas', 'papermill', 'diffusers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


# what is refused, and with which code

@pytest.mark.parametrize("argv", [[], ["reprodus", "x/y"], ["list", "tables"], ["list"], ["reproduce"], ["list", "tasks", "--scale", "huge"]])
def test_bad_arguments(argv, capsys):
    assert call(*argv) == 2
    assert "diffda" in capsys.readouterr().err


def test_unknown_item_lists_the_nearest(capsys):
    assert call("reproduce", "unidiffda/table2") == 2
    error = capsys.readouterr().err.strip()
    assert "unidiffda/table02" in error and "\n" not in error
    assert call("reproduce", "../../etc/passwd") == 2


@pytest.mark.parametrize("param, hint", [("seed=[0]", "did you mean seeds"), ("seeds=0", "takes a list"), ("seeds=[a]", "a whole number"),
    ("seeds=[0", "Cannot read"), ("seeds", "name=value"), ("strength=high", "a number"), ("num_copies=2.5", "a whole number"), ("num_copies=true", "a whole number"),
    ("equal_steps=1", "true or false"), ("metric=[top1]", "text"), ("scale=paper", "--scale"), ("out=x", "--out")])
def test_wrong_parameters(toy, tmp_path, param, hint, capsys):
    assert reproduce(tmp_path, "-p", param) == 2
    error = capsys.readouterr().err.strip()
    assert hint in error and "\n" not in error
    assert not (tmp_path/"out").exists()


def test_right_parameters(toy):
    pairs = ["seeds=[3, 4]", "strength=1", "num_copies=2", "metric=top5", "equal_steps=false"]
    assert cli.read_params(pairs, toy()) == {"seeds": [3, 4], "strength": 1.0, "num_copies": 2, "metric": "top5", "equal_steps": False}
    assert cli.read_params(["strength=1e-3", "metric=1", "seeds=[]"], toy()) == {"strength": 0.001, "metric": "1", "seeds": []}
    assert cli.read_params(["metric=a=b"], toy()) == {"metric": "a=b"}


@pytest.mark.parametrize("option", ["--out", "--store"])
def test_unwritable_folder_is_found_before_anything_runs(toy, tmp_path, option, monkeypatch, capsys):
    monkeypatch.setattr(cli, "execute", lambda *a: pytest.fail("it ran"))
    (tmp_path/"file").write_text("")
    assert reproduce(tmp_path, option, tmp_path/"file") == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("diffda: Cannot write") and "\n" not in error


def test_every_paper_notebook_has_the_common_parameters():
    from papermill import inspect_notebook
    from diffda.report import list_papers, paper_notebook
    for item in list_papers():
        assert {"scale", "store", "out"} <= set(inspect_notebook(str(paper_notebook(item)))), item
        cells = json.loads(paper_notebook(item).read_text(encoding="utf-8"))["cells"]
        assert not any(c.get("outputs") for c in cells), f"{item} has outputs"


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
    assert "ZeroDivisionError" in error and str(tmp_path/"out"/"toy"/"table01"/"table01.failed.ipynb") in error and "\n" not in error


def test_a_failed_run_leaves_the_good_notebook(toy, tmp_path, capsys):
    good = tmp_path/"out"/"toy"/"table01"/"table01.ipynb"
    assert reproduce(tmp_path) == 0
    before = good.read_bytes()
    toy("1/0")
    assert reproduce(tmp_path) == 1 and good.read_bytes() == before and good.with_name("table01.failed.ipynb").exists()
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


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_ctrl_c_keeps_the_earlier_notebook(toy, tmp_path):
    toy("import time\nprint('sleeping', flush=True)\ntime.sleep(60)")
    folder = tmp_path/"out"/"toy"/"table01"
    folder.mkdir(parents=True)
    (folder/"table01.ipynb").write_text("the earlier one")
    patched = ("import sys, pathlib, signal, diffda.report as r; from diffda.cli import main\n"
               "signal.signal(signal.SIGINT, signal.default_int_handler)\n"           # a job started in the background inherits that Ctrl-C is ignored
               f"r.papers_dir = lambda: pathlib.Path({str(toy().parents[1])!r})\ntoy = None\nsys.exit(main())")
    toy("import time\nprint('sleeping', flush=True)\ntime.sleep(60)")
    argv = [sys.executable, "-c", patched, "reproduce", "toy/table01", "--out", str(tmp_path/"out"), "--store", str(tmp_path/"store")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as run:
        while "sleeping" not in run.stdout.readline(): assert run.poll() is None
        os.killpg(run.pid, signal.SIGINT)
        error = run.communicate(timeout=60)[1].strip()
    assert run.returncode == 130 and "the same command resumes" in error and "Traceback" not in error
    assert [p.name for p in folder.iterdir() if p.suffix == ".ipynb"] == ["table01.ipynb"]
    assert (folder/"table01.ipynb").read_text() == "the earlier one"


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
    assert [l for l in lines if l.startswith("word")] == ["word 0", "word 1", "word 2"]
    assert not any("%|" in l for l in lines) and len(lines) < 12


# build-nano

def test_build_nano_without_sources(tmp_path, capsys):
    pytest.importorskip("mlxtend")
    assert call("build-nano", "--out", tmp_path/"world", "--sources", tmp_path, "--store", tmp_path/"store") == 1
    error = capsys.readouterr().err.strip()
    assert "idx files" in error and "\n" not in error


def test_paths_in_parameters_count_from_where_the_command_was_given(tmp_path, monkeypatch):
    "The kernel starts in the folder of the results."
    monkeypatch.chdir(tmp_path)
    (tmp_path/"models"/"mine").mkdir(parents=True); (tmp_path/"ph.json").write_text("{}"); (tmp_path/"class").mkdir()
    notebook = paper_notebook("unidiffda/table02")
    read = lambda *pairs: cli.read_params(list(pairs), notebook)
    assert read("backbone=models/mine@64") == {"backbone": f"{tmp_path}/models/mine@64"} and read("backbone=sd15@64") == {"backbone": "sd15@64"}
    assert read("change={TextualInversion.phrases: ph.json, prompt: class, strength: 0.5}") == {"change": {"TextualInversion.phrases": f"{tmp_path}/ph.json", "prompt": "class", "strength": .5}}
