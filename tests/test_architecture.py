"What holds of the whole package: no circles, one owner of a name, a quick start, settings resolved once."
import ast, collections, dataclasses, subprocess, sys
from pathlib import Path

import pytest

import diffda
from diffda import jobs
from diffda.backbone import BACKBONES, Backbone
from diffda.core import DiffDAError
from diffda.data import TASKS, get_task
from diffda.datasets.base import SOURCES
from diffda.filters import FILTERS
from diffda.method import METHODS, Method
from diffda.pipeline import run_all
from diffda.settings import Part, settled
from diffda.store import Store
from diffda.utilize import STRATEGIES, Strategy

PACKAGE = Path(diffda.__file__).parent

# the import graph

def modules():
    "{dotted name: path} of the modules of the package, without nbdev's index."
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.stem == "_modidx" or "papers" in path.parts: continue
        dotted = ".".join(["diffda", *path.relative_to(PACKAGE).with_suffix("").parts])
        found[dotted.removesuffix(".__init__")] = path
    return found

def absolute(node, module, is_package):
    "The dotted name of the module that the statement `from … import` names."
    if not node.level: return node.module or ""
    base = module.split(".")
    base = base[:len(base) - node.level + is_package]
    return ".".join([*base, *([node.module] if node.module else [])])

def imported(module, path, known):
    "The modules of the package that `module` imports anywhere, inside functions too."
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, module, path.stem == "__init__")
            # `from diffda import jobs` means the module
            names = [n if (n := f"{base}.{alias.name}") in known else base for alias in node.names]
        else: continue
        found |= {name for name in names if name in known and name != module}
    return found

def circle(graph):
    "The modules of one circle of `graph`, {name: names}, in order, or an empty list."
    state, path = {}, []
    def visit(name):
        state[name] = "open"
        path.append(name)
        for other in sorted(graph[name]):
            if state.get(other) == "open": return path[path.index(other):] + [other]
            if other not in state and (found := visit(other)): return found
        state[name] = "closed"
        path.pop()
        return []
    return next((found for name in graph if name not in state and (found := visit(name))), [])

def test_circles_are_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []

def test_the_import_graph_has_no_circle():
    known = modules()
    graph = {name: imported(name, path, known) for name, path in known.items()}
    assert len(graph) > 30 and "diffda.core" in graph["diffda.store"]
    assert " -> ".join(circle(graph)) == ""

def test_the_foundations_stand_on_nothing():
    "What everything imports imports nothing of the package itself but what lies below it."
    known = modules()
    below = {"core": set(), "places": {"core"}, "store": {"core", "places"}, "torch_core": {"core"},
             "settings": {"core", "places"}}
    for name, allowed in below.items():
        found = imported(f"diffda.{name}", known[f"diffda.{name}"], known) - {"diffda"}
        assert found <= {f"diffda.{other}" for other in allowed}, (name, found)

# a quick start

HEAVY = ("torch", "torchvision", "pandas", "diffusers", "transformers", "peft", "accelerate", "datasets",
         "matplotlib", "papermill")

LISTING = '''
import sys, types
from diffda.method import get_method, list_methods
from diffda.filters import FILTERS
from diffda.utilize import STRATEGIES
from diffda.data import list_tasks
titles = [get_method(name).title for name in list_methods()]
parts = [get_method(name).parts for name in list_methods()]
assert len(titles) > 10 and FILTERS.names() and STRATEGIES.names() and list_tasks()
# a lazy module is of another type until somebody asks it for something
print(*[name for name in HEAVY if type(sys.modules.get(name)) is types.ModuleType])
'''

def test_listing_methods_loads_nothing_heavy():
    source = f"HEAVY = {HEAVY!r}\n{LISTING}"
    run = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == []

# one owner of a name

def second(registry):
    "Something else under the first name that `registry` has."
    name = registry.names()[0]
    if registry in (FILTERS, STRATEGIES): return type("Other", (registry.get(name),), {"name": name})
    if registry is METHODS: return Method(name, "Another")
    if registry is BACKBONES: return Backbone(name, "somewhere/else")
    changed = {SOURCES: {"title": "x"}, TASKS: {"counterpart": "x"}}[registry]
    return dataclasses.replace(registry.get(name), **changed)

REGISTRIES = [METHODS, FILTERS, STRATEGIES, TASKS, SOURCES, BACKBONES]

@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.what)
def test_registries_refuse_a_second_owner(registry):
    name = registry.names()[0]
    before = registry.get(name)
    with pytest.raises(DiffDAError, match=f"The {registry.what} {name!r} is already registered, by diffda"):
        registry.register(second(registry))
    assert registry.get(name) is before and registry.names()[0] == name

def test_the_same_class_name_is_not_the_same_class():
    "A class of somebody else does not pass for the one that is registered because it is called the same."
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class FullConcatenation(Strategy):
        "Another strategy under the name of one that there is."
        name, title = "fc", "something else"
        def size(self, n_real, n_synthetic): return 1
    FullConcatenation.__qualname__ = "FullConcatenation"
    before = STRATEGIES.get("fc")
    try:
        with pytest.raises(DiffDAError, match="'fc' is already registered"):
            STRATEGIES.register(FullConcatenation)
    finally: STRATEGIES.known["fc"] = before

# resolved once

TINY = dataclasses.replace(get_task("nano-digits-1").training, epochs=1, evaluations=1)

@pytest.fixture
def counted(monkeypatch):
    "How often each of the functions that resolve names is called, wherever it is imported."
    calls = collections.Counter()
    def counting(name, function):
        def counted(*given, **named):
            part = type(given[0]).__name__ if name == "settled" else ""
            calls[f"{name} {part}".strip()] += 1
            return function(*given, **named)
        return counted
    for name in ("get_backbone", "get_split", "settled"):
        loaded = [module for key, module in sys.modules.items() if key.startswith("diffda")]
        original = next(vars(module)[name] for module in loaded if name in vars(module))
        wrapped = counting(name, original)
        for module in loaded:
            if vars(module).get(name) is original: monkeypatch.setattr(module, name, wrapped)
    return calls

SAID = dict(epochs=1, evaluations=1, num_copies=1, num_inference_steps=3, strength=.9)

def test_names_are_resolved_once_without_images(counted, tmp_path):
    "One job, planned and run: one generator looked up, one split drawn, nothing to settle."
    run_all(jobs.plan(["baseline"], ["nano-digits-1"], (0,), **SAID), tmp_path, progress=False)
    assert counted == {"get_backbone": 1, "get_split": 1}

@pytest.mark.parametrize("method, parts", [("real-guidance", ["SDEdit"]),
                                           ("da-fusion", ["SDEdit", "TextualInversion"])])
def test_names_are_resolved_once(method, parts, counted, tmp_path):
    "And each part is settled once, whatever key, pool and training ask for."
    short = {"TextualInversion.steps": 2}
    planned = jobs.plan([method], ["nano-digits-1"], (0,), **SAID, **(short if method == "da-fusion" else {}))
    run_all(planned, tmp_path, progress=False)
    assert counted == {"get_backbone": 1, "get_split": 1, **{f"settled {part}": 1 for part in parts}}

def test_a_grid_draws_a_split_once_for_each_task_and_seed(counted, tmp_path):
    methods = ["baseline", "mixup", "real-guidance"]
    planned = jobs.plan(methods, ["nano-digits-1"], (0, 1), vary={"lr": [.1, .2]})
    for job in planned: job.stages()
    assert len(planned) == 12 and counted["get_split"] == 2

def test_what_is_shown_before_a_run_does_not_read_the_data_again(counted, tmp_path):
    "The estimate, too, takes the splits that the jobs have."
    run_all(jobs.plan(["baseline"], ["nano-digits-1"], (0,), **SAID), tmp_path)
    assert counted["get_split"] == 1

# parts

def all_parts(cls=Part):
    for sub in cls.__subclasses__():
        if sub.__module__.startswith("diffda."): yield sub
        yield from all_parts(sub)

def test_a_part_comes_to_its_settings_in_one_way():
    "All of them by `settings.settled`: no part has a method of its own for it, and all check their fields."
    kinds = {part for part in all_parts() if part.__module__.startswith("diffda.")}
    assert len(kinds) > 12
    for kind in kinds:
        assert not {"at", "resolve", "settled", "resolved"} & set(vars(kind)), kind
        assert dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen, kind
    assert settled.__module__ == "diffda.settings"

def test_a_run_is_the_same_in_one_store_or_another(tmp_path):
    "Keys do not depend on where things are kept, nor on what was planned before."
    first = [job.train.key for job in jobs.plan(["real-guidance"], ["nano-digits-1"], (0,))]
    jobs.plan(["gif", "baseline"], ["nano-fashion"], (0,))
    assert [job.train.key for job in jobs.plan(["real-guidance"], ["nano-digits-1"], (0,))] == first
    job = jobs.plan(["baseline"], ["nano-digits-1"], (0,))[0]
    assert Store(tmp_path/"a").dir(job.train).name == Store(tmp_path/"b").dir(job.train).name
