"""A run that is killed with SIGKILL again and again ends like one that nobody disturbed.

A warm process imports everything once and says 'ready'; then it forks a worker for each try, and the test
kills the worker at moments from a seeded generator: some counted from its start, some from the first sign
that images, arrays or checkpoints are being written, so that each kind of stage is hit."""
import contextlib, json, os, signal, subprocess, sys, time
from pathlib import Path

import numpy as np, pytest

from diffda.generate import SyntheticPool

PROGRAM = '''
import dataclasses, functools, os, sys
import diffusers, transformers
from diffusers import DPMSolverMultistepScheduler, StableDiffusionImg2ImgPipeline
from diffda import finetune, pipeline, train
from diffda.data import get_task
# a checkpoint after every epoch, every step
train.resumable = finetune.resumable = functools.partial(train.resumable, every_s=0)
task = dataclasses.replace(get_task("nano-scans-25"), shots=15, val_per_class=5)
task = dataclasses.replace(task, training=dataclasses.replace(task.training, epochs=6, evaluations=3))
short = {"TextualInversion.steps": 12, "DreamBoothLoRA.steps": 12}

def work(store):
    jobs = pipeline.plan(["diff-mix"], [task], (0,), num_copies=2, strength=.5, num_inference_steps=4,
                         utilize="fc",
                         **short)
    pipeline.run_all(jobs, store, progress=False)

print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work(line.strip())
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
'''

@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    errors = open(tmp_path_factory.mktemp("worker")/"errors", "w+")
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    child = subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=errors, text=True, env=here)
    try:
        assert child.stdout.readline() == "ready\n", Path(errors.name).read_text()[-2000:]
        yield child, Path(errors.name)
    finally:
        child.kill()
        child.wait()
        errors.close()

def attempt(worker, store, when):
    "Start a try, kill it when `when()` is true; return its wait status: 0 finished, 9 killed."
    child, errors = worker
    child.stdin.write(f"{store}\n")
    child.stdin.flush()
    pid, end = int(child.stdout.readline()), time.time() + 300
    while time.time() < end:
        if when():
            # it may have finished just now
            with contextlib.suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
            break
        if not Path(f"/proc/{pid}").exists(): break
        time.sleep(.003)
    else:
        os.kill(pid, signal.SIGKILL)
        pytest.fail("a try took more than five minutes")
    status = int(child.stdout.readline())
    assert status in (0, 9), errors.read_text()[-3000:]
    return status

def after(seconds):
    "True once `seconds` have passed since the first question."
    began = []
    def when():
        if not began: began.append(time.time())
        return time.time() - began[0] >= seconds
    return when

def once(sign, seconds):
    "True `seconds` after `sign()` was first true."
    clock = after(seconds)
    seen = []
    def when():
        if not seen and sign(): seen.append(1)
        return bool(seen) and clock()
    return when

def never(): return False

# what tells where, when and by what a stage was made
ASIDE = {"result.json": ("environment",), "DONE": ("seconds", "resumed", "machine")}

def contents(store):
    "What a store holds, without what tells where and when it was made: {path: bytes or JSON}."
    out = {}
    for p in sorted(Path(store).rglob("*")):
        if p.is_dir() or p.name.startswith(".") or p.name == "checkpoint.pt": continue
        name = p.relative_to(store).as_posix()
        if p.name not in ASIDE: out[name] = p.read_bytes()
        else: out[name] = {k: v for k, v in json.loads(p.read_text()).items() if k not in ASIDE[p.name]}
    return out

@pytest.fixture(scope="module")
def undisturbed(worker, tmp_path_factory):
    store, began = tmp_path_factory.mktemp("undisturbed"), time.time()
    assert attempt(worker, store, never) == 0
    return store, contents(store), time.time() - began

def the(store, pattern):
    found = list(Path(store).glob(pattern))
    assert len(found) == 1, found
    return found[0]

def same(store, undisturbed):
    expected, got = undisturbed[1], contents(store)
    assert set(got) == set(expected)
    assert [name for name in expected if got[name] != expected[name]] == []
    pools = [SyntheticPool(the(s, "pool/*/pool")) for s in (store, undisturbed[0])]
    assert pools[0].digest() == pools[1].digest() and len(pools[0]) == 300
    result = json.loads(the(store, "train/*/result.json").read_text())
    assert result["n_synthetic"] == 300 and result["steps"] == 6*29

def test_undisturbed_run_is_whole(undisturbed):
    store, found, _ = undisturbed
    assert {name.split("/")[0] for name in found} == {"adaptation", "pool", "array", "train", "share"}
    assert sum(name.endswith("/DONE") for name in found) == 2 + 1 + 4 + 1 + 1

class Seen:
    "What can be seen of a run from outside, by the files in its store."
    def __init__(self, store): self.store = store

    def images(self):
        "{path: when it was written} of the finished images."
        paths = self.store.glob("pool/*/pool/images/**/*.png")
        return {p: p.stat().st_mtime_ns for p in paths if not p.name.startswith(".")}

    def unfinished(self, folders): return [d for d in self.store.glob(folders) if not (d/"DONE").exists()]

    def state(self):
        "The kind of stage that is being worked on, or None."
        tuned = self.unfinished("adaptation/*")
        if any(list(folder.glob("checkpoint*.pt")) for folder in tuned): return "tuning"
        if self.images() and not list(self.store.glob("pool/*/DONE")): return "generation"
        if self.unfinished("array/*"): return "decoding"
        if any((folder/"checkpoint.pt").exists() for folder in self.unfinished("train/*")): return "training"
        return None

def test_killed_in_every_stage(worker, undisturbed, tmp_path):
    rng, seen, hit, first = np.random.default_rng(0), Seen(tmp_path), [], {}
    signs = [(lambda: True, .5), ("tuning", .3), ("tuning", .3), ("generation", .3),
             (lambda: len(seen.images()) > 130, .2), ("decoding", .02), ("training", .3), ("training", .3)]
    for sign, wait in signs:
        moment = (lambda wanted=sign: seen.state() == wanted) if isinstance(sign, str) else sign
        status = attempt(worker, tmp_path, once(moment, rng.uniform(0, wait)))
        assert status == 9, f"finished before it could be killed in {sign}"
        hit.append(seen.state())
        if not first and list(tmp_path.glob("pool/*/DONE")): first = seen.images()
    assert {"tuning", "generation", "decoding", "training"} <= set(hit) and len(first) == 300
    assert attempt(worker, tmp_path, never) == 0
    same(tmp_path, undisturbed)
    # a finished pool is not touched again
    assert seen.images() == first
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"}
    assert attempt(worker, tmp_path, never) == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before

@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments(worker, undisturbed, tmp_path, seed):
    rng = np.random.default_rng(seed)
    moments = [rng.uniform(.05, undisturbed[2]) for _ in range(12)]
    assert [attempt(worker, tmp_path, after(moment)) for moment in moments].count(9) >= 4
    assert attempt(worker, tmp_path, never) == 0
    same(tmp_path, undisturbed)
