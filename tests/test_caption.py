"Captioners and chat models in the real ones' formats, captions that survive a kill, and phrases in prompts."
import dataclasses, json, shutil

import numpy as np, pytest, torch
from PIL import Image

# makes its checkpoints known to tiny
import tiny_captioners  # noqa: F401
from diffda import caption as module
from diffda.backbone import get_backbone
from diffda.settings import settled
from diffda.caption import (CAPTIONERS, Captioner, SuffixedSDEdit, ask, caption, captioner_key, captions_file,
                            captions_of, dream, get_captioner, load_captioner, load_chat, phrases_in,
                            store_at, suffixed, write_suffixes)
from diffda.core import DiffDAError, canonical, read_json, seed_for
from diffda.data import get_task
from diffda.finetune import fine_tune
from diffda.generate import SDEdit, generate_pool
from diffda.method import Method, get_method
from diffda.models import load_pipeline
from diffda.methods.mvc import CAPTIONS, PREFIX, MVCGenerate, MVCTuning, caption_pool
from diffda.jobs import plan
from diffda.prompts import SUFFIX_POOLS, SUFFIXES
from pools import LEVELS, distance, some
from tiny import checkpoint, edit_json

def needs(kind):
    "Skip where the installed transformers does not have the architecture."
    import transformers
    if kind == "qwen3-vl" and not hasattr(transformers, "Qwen3VLForConditionalGeneration"):
        pytest.skip("this transformers has no Qwen3-VL")

@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("models"), {}
    def get(kind):
        needs(kind)
        if kind not in made: made[kind] = str(checkpoint(kind, root/kind))
        return made[kind]
    yield get
    for load in (load_captioner, load_chat): load.cache_clear()

@pytest.fixture
def copy(models, tmp_path): return lambda kind: shutil.copytree(models(kind), tmp_path/kind)

def pictures(sizes=((32, 32), (64, 48), (40, 40), (90, 50), (33, 70), (28, 28), (64, 64))):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)).resize(s) for s in sizes]

@pytest.fixture(scope="module")
def few(): return some((0, 1, 30, 26, 225, 249))

# captioners

@pytest.mark.parametrize("kind", ["blip2", "qwen3-vl"])
def test_captions_depend_on_the_image_alone(models, kind):
    whole = caption(pictures(), models(kind), batch_size=7)
    assert len(set(whole)) == 7 and all(whole)
    for size in (1, 2, 64): assert caption(pictures(), models(kind), batch_size=size) == whole
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert caption(pictures()[::-1], models(kind), batch_size=3) == whole[::-1]
    assert torch.equal(before, torch.get_rng_state())

def greedy(model, ids, n, ends, **given):
    "Token by token, the whole text anew each time."
    start = ids.shape[1]
    with torch.no_grad():
        while ids.shape[1] < start + n:
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **given).logits
            best = logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, best], 1)
            if int(best) in ends: break
    return ids[:, start:]

def test_blip2_by_hand(models, copy):
    c = get_captioner(models("blip2"))
    assert (c.kind, c.instruction, c.max_new_tokens) == ("blip2", None, 30)
    model, processor = load_captioner(c, "cpu")
    image = pictures()[1]
    pixels = torch.from_numpy(np.asarray(image.resize((28, 28), Image.BICUBIC))).permute(2, 0, 1)[None]/255
    looks = processor.image_processor
    mean, std = (torch.tensor(values)[:, None, None] for values in (looks.image_mean, looks.image_std))
    pixels = (pixels - mean)/std
    ids = torch.tensor([[model.config.image_token_index]*4 + [2]])
    said = greedy(model, ids, 30, {model.config.text_config.eos_token_id}, pixel_values=pixels)
    def words(tokens): return " ".join(processor.batch_decode(tokens, skip_special_tokens=True)[0].split())
    assert caption([image], models("blip2"))[0] == words(said)
    # its captions end where the language model's own mark stands
    short, end = copy("blip2"), int(said[0, 7])
    config = json.loads((short/"config.json").read_text())
    edit_json(short/"config.json", text_config={**config["text_config"], "eos_token_id": end})
    edit_json(short/"generation_config.json", eos_token_id=end)
    first = said[0].tolist().index(end) + 1
    assert caption([image], short)[0] == words(said[:, :first])

def test_an_instruction_is_read(models):
    c = get_captioner(models("qwen3-vl"))
    assert c.kind == "chat" and c.instruction == CAPTIONERS["qwen3-vl"].instruction
    other = dataclasses.replace(c, instruction="Which style?")
    assert caption(pictures(), c) != caption(pictures(), other)
    assert len({captioner_key(c), captioner_key(other), captioner_key(models("blip2"))}) == 3

def test_large_images_are_shrunk_and_stay_whole(models, monkeypatch):
    monkeypatch.setattr(module, "_SIDE", 64)
    large = Image.fromarray(np.random.default_rng(1).integers(0, 256, (90, 180, 3), dtype=np.uint8))
    small = large.copy()
    small.thumbnail((64, 64))
    assert caption([large], models("qwen3-vl")) == caption([small], models("qwen3-vl"))
    assert large.size == (180, 90) and small.size == (64, 32)

def test_grey_images_and_none(models):
    assert caption([], models("blip2")) == []
    grey = pictures()[0].convert("L")
    assert caption([grey], models("blip2")) == caption([grey.convert("RGB")], models("blip2"))

@pytest.mark.parametrize("kind", ["blip2", "qwen3-vl"])
def test_half_precision(models, kind, monkeypatch):
    monkeypatch.setattr(module, "precision", lambda device: torch.float16)
    monkeypatch.setattr(module, "_bfloat", lambda device: torch.bfloat16)
    load_captioner.cache_clear()
    try:
        assert all(caption(pictures()[:3], models(kind)))
        model, _ = load_captioner(get_captioner(models(kind)), "cpu")
        halves = {torch.float16, torch.bfloat16} & {p.dtype for p in model.parameters()}
        assert halves == {torch.float16 if kind == "blip2" else torch.bfloat16}
    finally: load_captioner.cache_clear()

def test_wrong_checkpoints(models, copy, tmp_path, monkeypatch):
    def refused(captioner, match):
        with pytest.raises(DiffDAError, match=match): caption(pictures(), captioner)
    blip, chat = models("blip2"), models("chat")
    refused(chat, "holds a Qwen2ForCausalLM; this captioner needs an image-text-to-text model")
    refused(Captioner(blip, instruction="What?"),
            "holds a Blip2ForConditionalGeneration; this captioner needs an image-text")
    refused(Captioner(chat, "blip2"), "holds a Qwen2ForCausalLM; this captioner needs BLIP-2")
    blip = copy("blip2")
    edit_json(blip/"config.json", architectures=["Blip2ForImageTextRetrieval"])
    refused(blip, "holds a Blip2ForImageTextRetrieval; this captioner needs BLIP-2 with a language model")
    edit_json(blip/"config.json", architectures=["Blip2ForConditionalGeneration"], image_token_index=None)
    refused(blip, "saved before transformers 4.46")
    (blip/"config.json").write_text("{")
    with pytest.raises(DiffDAError, match="config.json is damaged"): get_captioner(blip)
    (tmp_path/"empty").mkdir()
    with pytest.raises(DiffDAError, match="it has no config.json"): get_captioner(tmp_path/"empty")
    with pytest.raises(DiffDAError, match="Unknown captioner, and no folder: 'blip': did you mean blip2"):
        get_captioner("blip")
    with pytest.raises(DiffDAError, match="give the captioner x/y an instruction"): Captioner("x/y")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(Captioner("nobody/nothing", "blip2"),
            "nobody/nothing cannot be opened as a captioner: .* Check the connection, or give the folder")
    with pytest.raises(DiffDAError, match="nobody/nothing cannot be opened as a chat model"):
        ask(["?"], "nobody/nothing")

def test_damaged_weights_and_no_template(copy):
    blip = copy("blip2")
    (blip/"model.safetensors").write_bytes(b"damaged")
    with pytest.raises(DiffDAError, match="cannot be opened as a captioner"): caption(pictures(), blip)
    qwen = copy("qwen3-vl")
    (qwen/"chat_template.json").unlink()
    with pytest.raises(DiffDAError, match="has no chat template"): caption(pictures(), qwen)

# captions of a split

def test_captions_of_a_split(few, models, store):
    found = captions_of(few, models("blip2"), store, batch_size=4, progress=False)
    expected = caption([few.train.read(i) for i in range(6)], models("blip2"))
    assert list(found) == few.train.ids and list(found.values()) == expected
    assert captions_file(few, models("blip2"), store) == next((store.root/"captions").glob("*/captions.json"))
    stage = read_json(next((store.root/"captions").glob("*/stage.json")))
    # what it is counts, not where
    assert models("blip2") not in json.dumps(stage) and stage["inputs"] == [few.digest]
    next((store.root/"captions").glob("*/captions.json")).write_text("{")
    with pytest.raises(DiffDAError, match="missing or damaged; delete the folder"):
        captions_of(few, models("blip2"), store)

def test_killed_and_resumed(few, models, store, monkeypatch):
    class Killed(BaseException): pass
    made, real = [], module.caption
    def counted(images, *a, **k):
        if len(made) == 4: raise Killed
        made.extend(images)
        return real(images, *a, **k)
    monkeypatch.setattr(module, "caption", counted)
    with pytest.raises(Killed): captions_of(few, models("blip2"), store, batch_size=2, progress=False)
    path = next((store.root/"captions").glob("*/captions.json"))
    assert list(read_json(path)) == few.train.ids[:4] and not (path.parent/"DONE").exists()
    made.clear()
    # of another batch size
    found = captions_of(few, models("blip2"), store, batch_size=3, progress=False)
    expected = real([few.train.read(i) for i in range(6)], models("blip2"))
    assert len(made) == 2 and list(found.values()) == expected

def test_the_store_of_a_folder(store, tmp_path):
    from diffda.store import Stage
    folder = store.make(Stage("kind", {"a": 1}, work=lambda folder, store: {}))
    assert store_at(folder).root == store.root and store_at(tmp_path/"own").root == tmp_path/"own"

# MVC

TUNING = dict(steps=2, lr=1e-3, batch_size=4)

def test_mvc_with_a_captioner(few, models, store, monkeypatch, tmp_path):
    monkeypatch.setitem(CAPTIONERS, "blip2", dataclasses.replace(CAPTIONERS["blip2"], source=models("blip2")))
    method = Method("mvc-blip", "MVC", finetune=MVCTuning(**TUNING, captions="blip2"),
                    generate=MVCGenerate(num_copies=1, num_inference_steps=2))
    job, = plan([method], [few.task], [0])
    job = dataclasses.replace(job, read=lambda task, seed: few)
    folder = store.make(job.tuning[0])
    said, y = captions_of(few, "blip2", store, progress=False), few.train.labels
    pool = json.loads((folder/CAPTIONS).read_text())
    shirts = [few.train.ids[k] for k in range(6) if y[k] == 0]
    assert pool["t-shirt"] == [f"{PREFIX} t-shirt. {said[i]}" for i in shirts]
    assert sum(map(len, pool.values())) == 6
    made = generate_pool(job.method.generate, few, tmp_path/"pool", adaptation=str(folder))
    assert len(made) == 6 and made.rows.prompt[0] == f"{PREFIX} t-shirt"
    monkeypatch.setattr(module, "caption", lambda *a, **k: pytest.fail("the captions are in the store"))
    # another tuning finds them there
    assert caption_pool(few, "blip2", few.class_names, store) == pool

def test_mvc_outside_a_store(few, models, tmp_path):
    tuning = MVCTuning(**TUNING, captions=models("qwen3-vl"))
    fine_tune(tuning, few, tmp_path, progress=False)
    pool = json.loads((tmp_path/CAPTIONS).read_text())
    assert all(len(text) > len(f"{PREFIX} {name}. ") for name, texts in pool.items() for text in texts)
    assert next((tmp_path/"captions").glob("*/DONE"))

def test_who_captions_for_mvc(models, tmp_path):
    nano = get_backbone("nano")
    large = dataclasses.replace(nano, resolution=512)
    assert [settled(MVCTuning(), b).captions for b in (nano, large)] == ["attributes", "blip2"]
    assert settled(MVCTuning(captions="attributes"), large).captions == "attributes"
    assert settled(MVCTuning(), nano).captions_key is None
    assert settled(MVCTuning(), large).captions_key == captioner_key("blip2")
    part = settled(MVCTuning(), nano)
    # as ever: finished work keeps its key
    of_captions = {k: v for k, v in canonical(part).items() if k.startswith("captions")}
    assert of_captions == {"captions": "attributes", "captions_key": None}
    keys = {MVCTuning(captions=c).captions_key for c in ("blip2", "qwen3-vl", models("blip2"))}
    assert len(keys) == 3 and None not in keys
    says = "captions is 'attributes', a captioner .blip2, qwen3-vl.*there is no file blip3"
    with pytest.raises(DiffDAError, match=says): MVCTuning(captions="blip3")

def test_the_key_of_nano_mvc_has_not_changed():
    job, = plan(["mvc"], ["nano-fashion"], [0])
    config = canonical(job.tuning[0].config)["part"]
    assert config == {"class": "MVCTuning", "steps": 400, "lr": 3e-4, "batch_size": 32, "coarse": 2,
                      "fine": 4, "num_embeddings": 64, "dropped": .1, "captions": "attributes",
                      "captions_key": None}

# chat

def test_chat_by_hand(models):
    model, tokenizer = load_chat(models("chat"), "cpu")
    questions = ["Why?", "What is there to be seen in the middle of it?", "No"]
    text = f"<|im_start|>user\n{questions[0]}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, return_tensors="pt").input_ids
    said = greedy(model, ids, 12, set(model.generation_config.eos_token_id))
    whole = ask(questions, models("chat"), max_new_tokens=12)
    assert whole[0] == tokenizer.decode(said[0], skip_special_tokens=True).strip() and len(set(whole)) == 3
    for size in (1, 2): assert ask(questions, models("chat"), batch_size=size, max_new_tokens=12) == whole

def test_no_chat_model(copy):
    chat = copy("chat")
    config = json.loads((chat/"tokenizer_config.json").read_text())
    config.pop("chat_template")
    (chat/"tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DiffDAError, match="has no chat template; phrases are asked of a chat model"):
        ask(["?"], chat)

@pytest.mark.parametrize("reply, phrases", [
    ("on a branch\nin the water", ["on a branch", "in the water"]),
    ("Sure, here you are:\n\n1. on a branch.\n2) 'in the water'\n", ["on a branch", "in the water"]),
    ("<think>hm\n1. no</think>\n- **on a branch**\n• On a branch\n* 2 of them, flying",
     ["on a branch", "2 of them, flying"]),
    ("a line " + "that goes on and on "*5, []), ("", [])])
def test_phrases(reply, phrases):
    assert phrases_in(reply, 10) == phrases and phrases_in(reply, 1) == phrases[:1]

def test_suffixes_and_dreams(monkeypatch, models):
    asked = []
    def answer(questions, chat, **how):
        asked.extend(questions)
        return ["1. on a branch\n2. in the snow\n3. under water"]*len(questions)
    monkeypatch.setattr(module, "ask", answer)
    captions = {f"id{k}": f"caption number {k}." for k in range(1000)}
    assert write_suffixes(captions, "bird", n=2) == ["on a branch", "in the snow"]
    lines = [l for l in asked[0].splitlines() if l.startswith("caption number")]
    assert lines == [f"caption number {k}." for k in range(0, 1000, 5)]
    assert "at most 2 short phrases" in asked[0] and "a photo of a bird" in asked[0]
    assert write_suffixes(["one"], "bird") == ["on a branch", "in the snow", "under water"]
    asked.clear()
    dreams = {"Sooty_Albatross": ["on a branch"], "gull": ["on a branch"]}
    assert dream(["Sooty_Albatross", "gull"], "bird") == dreams
    assert '"a photo of a Sooty Albatross bird"' in asked[0] and '"a photo of a gull bird"' in asked[1]
    with pytest.raises(DiffDAError, match="condenses captions, and there are none"):
        write_suffixes({}, "bird")
    excuse = "I cannot help with that, since " + "so "*20
    monkeypatch.setattr(module, "ask", lambda questions, chat, **how: [excuse]*len(questions))
    says = "asked for phrases and wrote none; its reply begins 'I cannot help"
    with pytest.raises(DiffDAError, match=says): write_suffixes(["one"], "bird")

def test_pools_say_where_they_come_from():
    assert SUFFIXES == {metaclass: pool["phrases"] for metaclass, pool in SUFFIX_POOLS.items()}
    bird, aircraft, digit = (SUFFIX_POOLS[metaclass]["origin"] for metaclass in ("bird", "aircraft", "digit"))
    assert bird == aircraft and bird.startswith("published") and digit.startswith("ours")
    # those of the nano world say no word that its tokenizer has no token for
    tokenizer = load_pipeline(get_backbone("nano"), "cpu").tokenizer
    words = " ".join(SUFFIXES["digit"]).split()
    assert [token.removesuffix("</w>") for token in tokenizer.tokenize(" ".join(words))] == words

# prompts that end with a phrase

@pytest.fixture
def files(few, tmp_path):
    by_class = {name: ["on red checks", "on blue."] for name in few.class_names} | {"bag": "on pink spots"}
    (tmp_path/"classes.json").write_text(json.dumps(by_class))
    (tmp_path/"images.json").write_text(json.dumps({i: f"words of {i}" for i in few.train.ids}))
    return tmp_path

def part_for(files, pick, **more):
    settings = dict(strength=.5, num_copies=3, num_inference_steps=6) | more
    file = files/("classes.json" if pick == "class" else "images.json")
    return SuffixedSDEdit(**settings, phrases=str(file), pick=pick)

@pytest.mark.parametrize("pick", ["class", "own", "exchange"])
def test_phrases_by_hand(few, files, pick):
    b, ids = get_backbone("nano"), sorted(few.train.ids)
    rows = settled(part_for(files, pick, target="any", label="soft"), b).rows(few, b, 7)
    same = SDEdit(strength=.5, num_copies=3, num_inference_steps=6, target="any", label="soft")
    plain = settled(same, b).rows(few, b, 7)
    for r, p in zip(rows, plain, strict=True):
        def draw(purpose): return seed_for(7, r["source_id"], r["copy"], purpose)
        if pick == "class":
            of = few.class_names[r["target_label"]]
            said = "on pink spots" if of == "bag" else ("on red checks", "on blue")[draw("phrase") % 2]
        else:
            further = draw("exchange") % 5 + 1
            of = r["source_id"] if pick == "own" else (ids*2)[ids.index(r["source_id"]) + further]
            said = f"words of {of}"
        assert (r["phrase_of"], r["phrase"], r["prompt"]) == (of, said, f"{p['prompt']}, {said}")
        own, theirs = ({k: v for k, v in row.items() if k not in ("prompt", "phrase", "phrase_of", "method")}
                       for row in (r, p))
        assert own == theirs
    if pick == "exchange":
        assert all(r["phrase_of"] != r["source_id"] for r in rows) and len({r["phrase_of"] for r in rows}) > 3

@pytest.fixture(scope="module")
def pool(few, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    phrases = ("on red checks", "against plain blue", "on pink spots", "in front of green clouds",
               "yellow, on a cyan gradient", ["on purple slanted stripes"])
    (folder/"images.json").write_text(json.dumps(dict(zip(few.train.ids, phrases))))
    return folder, generate_pool(part_for(folder, "exchange"), few, folder/"64", batch_size=64)

@pytest.mark.parametrize("size", [1, 7])
def test_batch_size_does_not_matter(few, pool, tmp_path, size):
    other = generate_pool(part_for(pool[0], "exchange"), few, tmp_path, batch_size=size)
    assert other.rows.equals(pool[1].rows) and distance(other, pool[1]) <= LEVELS

def test_order_does_not_matter(pool, tmp_path):
    turned = some((249, 225, 26, 30, 1, 0))
    other = generate_pool(part_for(pool[0], "exchange"), turned, tmp_path, batch_size=7)
    assert distance(other, pool[1]) <= LEVELS
    prompts = [p.rows.set_index("file_name").prompt.to_dict() for p in (pool[1], other)]
    assert prompts[0] == prompts[1] and len(set(prompts[0].values())) > 6

def test_a_phrase_changes_the_image_and_an_empty_one_does_not(few, pool, files):
    plain = generate_pool(SDEdit(strength=.5, num_copies=3, num_inference_steps=6), few, files/"plain")
    assert distance(plain, pool[1]) > 20
    (files/"images.json").write_text(json.dumps({i: "" for i in few.train.ids}))
    empty = generate_pool(part_for(files, "own"), few, files/"empty")
    assert list(empty.rows.prompt) == list(plain.rows.prompt) and distance(empty, plain) <= LEVELS

def test_a_changed_file_is_another_setting(files):
    one = canonical(part_for(files, "class"))
    (files/"classes.json").write_text(json.dumps({"bag": ["on blue"]}))
    assert canonical(part_for(files, "class")) != one and one["phrases_key"]

def test_phrases_that_are_not_there(few, files, tmp_path):
    with pytest.raises(DiffDAError, match="there is no file none.json"): SuffixedSDEdit(phrases="none.json")
    with pytest.raises(DiffDAError, match="Unknown way to pick a phrase 'others'"): part_for(files, "others")
    b = get_backbone("nano")
    no_json = "is not a JSON file of the form"
    for pick, text, sentence in (
            ("own", "{}", "has no phrase for 6 of 6 training images, first 'fashion-pool"),
            ("class", '{"bag": [], "t-shirt": ["x"]}', "has no phrase for 9 of 10 classes, first 'trouser'"),
            ("own", "[1", no_json), ("own", "[1]", no_json), ("own", '{"a": 1}', no_json)):
        (files/("classes.json" if pick == "class" else "images.json")).write_text(text)
        with pytest.raises(DiffDAError, match=sentence): part_for(files, pick).rows(few, b, 0)
    (files/"images.json").write_text(json.dumps({i: "x" for i in few.train.ids}))
    with pytest.raises(DiffDAError, match="there is only one image; take pick='own'"):
        part_for(files, "exchange").rows(some((0,)), b, 0)

def test_a_method_with_phrases(files, few):
    base = get_method("diff-mix")
    m = suffixed(base, files/"classes.json", "class")
    assert (m.name, m.title) == ("diff-mix-suffix-dream", "Diff-Mix + suffix-dream")
    assert type(m.generate) is SuffixedSDEdit
    for t in ("nano-fashion", "nano-digits-1", "nano-scans-5"):
        ours, theirs = (x.at(get_task(t)) for x in (m, base))
        assert (ours.finetune, ours.utilize) == (theirs.finetune, theirs.utilize)
        for field in dataclasses.fields(SDEdit):
            assert getattr(ours.generate, field.name) == getattr(theirs.generate, field.name)
    assert suffixed(base, files/"images.json", "exchange").at(few.task, num_copies=2).generate.num_copies == 2
    with pytest.raises(DiffDAError, match="method 'mvc' has MVCGenerate"):
        suffixed(get_method("mvc"), files/"classes.json")
    enriched = suffixed(base, files/"images.json", "enrich")
    assert enriched.name == "diff-mix-suffix-enrich" and enriched.generate == base.generate
    assert [p.phrases for p in enriched.finetune.parts] == [str(files/"images.json")]*2
    with pytest.raises(DiffDAError, match="method 'real-guidance' has none"):
        suffixed(get_method("real-guidance"), files/"images.json", "enrich")
    with pytest.raises(DiffDAError, match="Unknown way to pick a phrase 'all'"):
        suffixed(base, files/"images.json", "all")
