"Several processes give what one gives, and what happens when one of them fails, dies or is killed."
import dataclasses, json, os, signal, subprocess, sys, time

import numpy as np, pandas as pd, pytest

from diffda import executors
from diffda.core import DiffDAError
from diffda.data import get_task
from diffda.executors import Local, Serial, get_executor, to_do
from diffda.generate import SDEdit, SyntheticPool
from diffda.jobs import plan
from diffda.method import Method
from diffda.pipeline import run_all
from diffda.store import Stage, Store

def brief(name):
    "A task that is trained for an epoch."
    task = get_task(name)
    return dataclasses.replace(task, training=dataclasses.replace(task.training, epochs=1, evaluations=1))

TASK, FEW = brief("nano-digits-5"), brief("nano-digits-1")
QUICK = dict(num_inference_steps=3, strength=.9)

# what is done, and in which order

def nothing(folder, store): return {}

def test_what_is_to_do(tmp_path):
    "What is finished, and what only finished work needs, is left out; the rest comes in an order that works."
    store = Store(tmp_path)
    data, other = Stage("array", 1, work=nothing), Stage("array", 2, work=nothing)
    pool = Stage("pool", 3, (data,), nothing)
    last, second = Stage("train", 4, (pool, "digest"), nothing), Stage("train", 5, (pool, other), nothing)
    assert list(to_do([last, second, last], store).values()) == [data, pool, last, other, second]
    store.make(pool)
    (store.dir(data)/"DONE").unlink()
    assert list(to_do([last, second], store).values()) == [last, other, second]
    store.make(last)
    assert to_do([last], store) == {}

def test_names_of_executors():
    assert isinstance(get_executor("serial"), Serial) and isinstance(get_executor("local"), Local)
    assert get_executor("local:3").workers == 3 and len(get_executor("local:3").environments()) == 3
    own = Local(2)
    assert get_executor(own) is own
    with pytest.raises(DiffDAError, match="Unknown executor 'locl'"): get_executor("locl")
    for wrong in ("local:0", "local:two", "serial:2", "local:-1"):
        with pytest.raises(DiffDAError, match=f"local:N with a number of processes; found '{wrong}'"):
            get_executor(wrong)

class Counting:
    "A worker that does its work at once, and remembers it."
    def __init__(self, done): self.done = done
    def submit(self, function, root, stage, shard):
        import concurrent.futures
        future = concurrent.futures.Future()
        self.done.append((stage.config, shard))
        try: future.set_result(function(root, stage, shard))
        except Exception as e: future.set_exception(e)
        return future

def shared(folder, store, shard=(0, 1)):
    "Work in shares: the last one to come finishes it."
    (folder/f"share-{shard[0]}").write_text("")
    return {"images": 1} if len(list(folder.glob("share-*"))) == shard[1] else None

def test_a_stage_that_can_be_cut_up_is_cut_up_for_free_workers(tmp_path):
    store, done, told = Store(tmp_path), [], []
    first, second = Stage("pool", 1, work=shared, shards=True), Stage("pool", 2, work=shared, shards=True)
    alone, last = Stage("train", 3, work=nothing), Stage("train", 4, (first, second), nothing)
    stages = to_do([first, last, alone], store)
    executors.walk(stages, store, [Counting(done) for _ in range(5)], told.append)
    assert done == [(1, (0, 1)), (2, (0, 2)), (2, (1, 2)), (3, (0, 1)), (4, (0, 1))]
    assert all(map(store.done, stages.values())) and {stage.key for stage in told} == set(stages)

# as many as you like

def same_records(a, b):
    "Two tables of records, but for where and how fast they were made, agree up to rounding."
    aside = ["pool", "environment", *(c for c in a if c.startswith("seconds_"))]
    a, b = a.drop(columns=aside), b.drop(columns=aside)
    pd.testing.assert_frame_equal(a, b, rtol=1e-6)

GRID = dict(num_copies=4, utilize="fc", vary={"lr": [.01, .1]}, **QUICK)

@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("serial"))
    return store, run_all(grid(), store, progress=False)

def grid(): return plan(["baseline", "real-guidance"], [TASK], (0,), **GRID)

@pytest.fixture(scope="module")
def local(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("local"))
    return store, run_all(grid(), store, "local:2", progress=False)

def test_two_processes_give_the_records_of_one(serial, local):
    assert len(serial[1]) == 4 and serial[1].top1.notna().all()
    same_records(serial[1], local[1])

def done_stages(store):
    return {f"{p.parent.parent.name}/{p.parent.name}" for p in store.root.glob("*/*/DONE")}

def test_two_processes_leave_the_same_stages(serial, local):
    assert done_stages(serial[0]) == done_stages(local[0]) and len(done_stages(serial[0])) > 8

def test_a_pool_is_cut_into_shards_with_the_same_bytes(serial, tmp_path):
    "100 images are two batches: each process draws one, and key and bytes are those of the serial pool."
    job = next(job for job in grid() if job.pool)
    store = Store(tmp_path)
    Local(2).run(to_do([job.pool], store), store)
    pools = [SyntheticPool(s.dir(job.pool)/"pool") for s in (serial[0], store)]
    assert len(pools[0]) == 100 and pools[0].digest() == pools[1].digest()
    assert store.counts(job.pool)["shares"] == 2 and "shares" not in serial[0].counts(job.pool)
    assert store.counts(job.pool)["digest"] == serial[0].counts(job.pool)["digest"]

def test_what_is_finished_is_not_begun_again(local, monkeypatch):
    def never(*given): pytest.fail("a process was started")
    monkeypatch.setattr(Local, "environments", never)
    same_records(run_all(grid(), local[0], "local:2", progress=False), local[1])

# faults

@dataclasses.dataclass(frozen=True, kw_only=True)
class Failing(SDEdit):
    "SDEdit that cannot draw."
    def draw(self, studio, rows): raise DiffDAError("The brush is broken; buy another one.")

@dataclasses.dataclass(frozen=True, kw_only=True)
class Dying(SDEdit):
    "SDEdit whose process is ended while it draws, as the system does where memory is short."
    def draw(self, studio, rows): os.kill(os.getpid(), signal.SIGKILL)

def with_a_fault(part):
    "The jobs of a baseline and of a method that cannot draw."
    faulty = Method("faulty", "Faulty", generate=part(num_copies=1, **QUICK))
    return plan(["baseline", faulty], [FEW], (0,))

@pytest.mark.parametrize("executor", ["serial", "local:2"])
def test_a_failing_stage_raises_its_sentence_and_keeps_what_was_finished(executor, tmp_path):
    store, planned = Store(tmp_path), with_a_fault(Failing)
    with pytest.raises(DiffDAError, match="^The brush is broken; buy another one.$"):
        run_all(planned, store, executor, progress=False)
    baseline, faulty = planned
    assert not store.done(faulty.pool) and not store.done(faulty.train)
    arrays = [stage for stage in baseline.train.before().values() if stage.kind == "array"]
    assert any(map(store.done, arrays))
    # whoever does without the faulty method goes on from there
    assert run_all([baseline], store, executor, progress=False).top1.notna().all()

def test_a_process_that_dies_is_one_sentence(tmp_path):
    says = "A process was ended from outside.*the same command resumes"
    with pytest.raises(DiffDAError, match=says) as said:
        run_all(with_a_fault(Dying), tmp_path, "local:2", progress=False)
    assert len(str(said.value).splitlines()) == 1 and "local:1" in str(said.value)

# killed

PROGRAM = '''
import dataclasses, sys
from diffda import pipeline
from diffda.data import get_task
task = get_task("nano-digits-5")
task = dataclasses.replace(task, training=dataclasses.replace(task.training, epochs=1, evaluations=1))
jobs = pipeline.plan(["baseline", "real-guidance"], [task], (0,), num_copies=4, utilize="fc",
                     vary={"lr": [.01, .1]}, num_inference_steps=3, strength=.9)
print("ready", flush=True)
pipeline.run_all(jobs, sys.argv[1], sys.argv[2], progress=False)
'''

def start(store):
    "A process that runs the grid with two workers, in a group of its own; it has begun when this returns."
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    child = subprocess.Popen([sys.executable, "-c", PROGRAM, str(store), "local:2"], stdout=subprocess.PIPE,
                             text=True, env=here, start_new_session=True)
    assert child.stdout.readline() == "ready\n"
    return child

def group_is_empty(group):
    try: os.killpg(group, 0)
    except ProcessLookupError: return True
    return False

def kill(child, all_of_them):
    "End the process, with all that it has started or alone; wait until none of them is left."
    if all_of_them: os.killpg(child.pid, signal.SIGKILL)
    else: child.kill()
    child.wait(30)
    end = time.time() + 60
    while not group_is_empty(child.pid):
        if time.time() > end:
            os.killpg(child.pid, signal.SIGKILL)
            pytest.fail("processes that nobody waits for went on for a minute")
        time.sleep(.1)

def when(seen, child, most=120):
    "Wait until `seen()`, or until the process has ended."
    end = time.time() + most
    while time.time() < end and child.poll() is None and not seen(): time.sleep(.01)

def test_a_run_that_is_killed_resumes_to_the_same_records(serial, tmp_path):
    """Once while images are drawn, only the process that was started: its workers do not outlive it; and once
    while classifiers are trained, all at once."""
    rng = np.random.default_rng(0)
    for sign, all_of_them in (("pool/*/pool/images/*/*.png", False), ("train/*/stage.json", True)):
        child = start(tmp_path)
        when(lambda pattern=sign: any(tmp_path.glob(pattern)), child)
        time.sleep(rng.uniform(0, .2))
        assert child.poll() is None, f"finished before it could be killed at {sign}"
        kill(child, all_of_them)
    assert not done_stages(serial[0]) <= done_stages(Store(tmp_path))
    same_records(run_all(grid(), tmp_path, progress=False), serial[1])
    assert done_stages(Store(tmp_path)) == done_stages(serial[0])

def test_marks_are_whole(local):
    "What several processes have written is JSON to the end."
    for path in local[0].root.rglob("DONE"): assert json.loads(path.read_text())["seconds"] >= 0
