"""What comes from elsewhere must never be executed, followed out of its folder, or give a secret away.

Every case plants a canary: a file that the hostile thing would make, or a secret in the environment. The case says what is done
with the thing, and the words that a person must be told.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shlex
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from orchestrator import data, model
from orchestrator.cluster.slurm import Batch, options, render
from orchestrator.config import compose, compose_job, run_app
from orchestrator.config.catalog import CONF_DIR
from orchestrator.data.chat import BUILT_IN
from orchestrator.engine.protocol import Piece
from orchestrator.errors import OrchestratorError
from orchestrator.report.record import load
from orchestrator.spec import Data, Slurm, to_json
from orchestrator.train import checkpoint, commit, reopen, submission
from orchestrator.train.folder import checkpoints_at
from orchestrator.train.resume import Reader, first_sound
from orchestrator.train.world import World, join, leave

ROOT = Path(__file__).resolve().parents[2]
SECRET = "hf_4n7canary9Zq"
SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")


class Place:
    """A folder of one case. `executed` is the file that hostile code would make; it makes it through `command`."""

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.world = folder, world
        self.executed = folder / "executed"
        self.command = f"touch {self.executed}"
        self.precious = folder / "precious"
        self.precious.mkdir()
        (self.precious / "file").write_text("kept")

    @property
    def pickle(self) -> bytes:
        """A pickle that makes the canary when it is loaded."""
        return pickle.dumps(_Evil(self.command))

    def file(self, name: str, content: str | bytes | dict[str, Any]) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            content = json.dumps(content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path


class _Evil:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


Case = Callable[[Place], object]
CASES: dict[str, tuple[Case, tuple[str, ...]]] = {}


def case(name: str, *words: str) -> Callable[[Case], Case]:
    """Register a case under `name`; its refusal must hold all `words`. Without words it must succeed."""

    def take(function: Case) -> Case:
        assert name not in CASES
        CASES[name] = (function, words)
        return function

    return take


def typed(*overrides: str, conf_dir: Path = CONF_DIR) -> Case:
    """The overrides through the entry of a launch script; {command} stands for what makes the canary."""

    def act(place: Place) -> None:
        words = [word.replace("{command}", place.command) for word in overrides]

        def raising(error: OrchestratorError) -> int:
            raise error

        run_app(lambda composed: compose(composed, config_dir=conf_dir) and 0, words, report=raising, conf_dir=conf_dir)

    return act


# Overrides
OVERRIDES = {
    "_target_ in a new key": (("+model._target_=os.system",), ("no key model._target_",)),
    "_target_ in a group": (("model={_target_:os.system,command:'{command}'}",), ("model has no choice",)),
    "_target_ in a list": (("data.sources=[{_target_: os.system, command: '{command}'}]",), ("_target_", "data.sources")),
    "_target_ in a free value": (("tuning=lora", "tuning.targets={_target_: os.system}"), ("tuning.targets",)),
    "a callback of Hydra": (("+hydra.callbacks.x={_target_: os.system}",), ("Hydra's own settings",)),
    "a callback of Hydra, only shown": (("--cfg", "job", "+hydra.callbacks.x._target_=os.system"), ("Hydra's own settings",)),
    "a launcher of Hydra": (("hydra/launcher=evil",), ("Hydra's own settings",)),
    "a folder of configs": (("--config-dir=/tmp",), ("reads its own conf/",)),
    "a secret in a path": (("run.dir=runs/${oc.env:HF_TOKEN}",), ("${…} is not replaced",)),
    "a secret in a list": (("data.sources=[{path: '${oc.env:HF_TOKEN}'}]",), ("${…} is not replaced",)),
    "a secret, only shown": (("--cfg", "job", "--resolve", "data.path=${oc.env:HF_TOKEN}"), ("${…} is not replaced",)),
    "a resolver that makes things": (("data.path=${oc.create:{a: 1}}",), ("${…} is not replaced",)),
    "a tag of YAML": (("data.path=!!python/object/apply:os.system [touch x]",), ("no override",)),
    "a choice out of its folder": (("recipe=../../../etc/passwd",), ("recipe has no choice",)),
    "a model's name that is a path": (("model.path=../../etc/../etc",), ("config.json",)),
    "a checkpoint that is no checkpoint": (("resume=/etc/../nowhere",), ("no such path",)),
}
for _name, (_words, _told) in OVERRIDES.items():
    case(_name, *_told)(typed(*_words))


# Files of conf/
def choice(text: str | bytes) -> Case:
    """A file of the group `recipe` that holds `text`, chosen."""

    def act(place: Place) -> None:
        copied = place.folder / "conf"
        shutil.copytree(CONF_DIR, copied)
        content = text if isinstance(text, bytes) else text.replace("{command}", place.command).encode()
        (copied / "recipe" / "evil.yaml").write_bytes(b"# @package _global_\n" + content)
        typed("recipe=evil", conf_dir=copied)(place)

    return act


case("a YAML tag that calls", "recipe/evil")(choice("run: !!python/object/apply:os.system ['{command}']\n"))
case("a YAML tag that imports", "recipe/evil")(choice("run: {dir: !!python/name:os.system }\n"))
case("_target_ in a file", "_target_")(choice("model: {_target_: os.system, command: '{command}'}\n"))
case("a secret in a file", "data.path", "${…} is not replaced")(choice("data: {path: '${oc.env:HF_TOKEN}'}\n"))
case("a file of bytes", "conf: ", "utf-8")(choice(b"run: \xff\xfe\x00\n"))


# Words that reach a scheduler
@case(
    "a command in every word of a job", "slurm.name", "slurm.partition", "slurm.account", "slurm.qos", "slurm.gpu", "constraint"
)
def words_of_a_job(place: Place) -> None:
    evil = ["$(touch executed)", "a; touch executed", "`touch executed`", "a && touch executed", "--wrap=touch", "x$IFS"]
    names = ["name", "partition", "account", "qos", "gpu", "constraint"]
    quoted = [f"slurm.{name}='{word}'" for name, word in zip(names, evil, strict=True)]
    compose_job(["slurm=a10x4", "cluster=4xa10", "zero=stage2", *quoted])


@case("a directive of sbatch in a folder's name", "run.dir", "newline")
def directive_in_a_folder(place: Place) -> None:
    compose_job(["slurm=a10x4", "cluster=4xa10", "zero=stage2", 'run.dir="a\\n#SBATCH --wrap=touch executed"'])


@case("a command in the paths of a job's script")
def command_in_a_script(place: Place) -> None:
    evil = f"/x/$(touch {place.executed})`touch {place.executed}`'; touch {place.executed} #"
    batch = Batch(
        job=Slurm(8, 0, 60, 300, 3, setup=evil), name="$(touch executed)", folders=(Path(evil),),
        nodes=1, ranks_per_node=1, on_cards=False,
        python=evil, script=Path(evil),
    )  # fmt: skip
    script = render(ROOT / "launch" / "slurm", batch)
    line = next(line for line in script.splitlines() if line.startswith("source "))
    assert shlex.split(line) == ["source", evil]
    assert all(option.startswith("--") for option in options(batch))
    harmless = script.replace("srun ", "true srun ").replace("scontrol ", "true ")
    environment = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "a", "HOME": str(place.folder)}
    subprocess.run(["bash", "-c", harmless, "job", evil], env=environment, cwd=place.folder, capture_output=True, timeout=60)


# Checkpoints
def saved(place: Place, step: int = 1) -> Path:
    """A sound checkpoint of one tensor."""
    moment = checkpoint.Moment(step, 0, 1, "digest", {})
    pieces = iter([Piece("w", "weight", (4,), 0, torch.arange(4.0))])
    return checkpoint.save(place.folder / "checkpoints", moment, pieces, place.world, scalars={}, keep=2, expected_bytes=0)[0]


def commit_again(folder: Path, change: Callable[[dict[str, Any]], None] = lambda document: None) -> None:
    """Make digests of what lies in `folder` now, as somebody does who knows the format."""
    document = json.loads((folder / "checkpoint.json").read_text())
    for name in document["files"]:
        held = commit.stored(folder / name)
        document["files"][name] = {"bytes": held.bytes, "sha256": held.sha256}
    change(document)
    text = json.dumps(document)
    (folder / "checkpoint.json").write_text(text)
    (folder / "COMMITTED").write_text(hashlib.sha256(text.encode()).hexdigest() + "\n")


def resumed(place: Place, folder: Path) -> None:
    """What a resume reads of a checkpoint."""
    for path in checkpoints_at(folder):
        assert first_sound([path], place.world, print) == path
        reader = Reader(path)
        reader.read("w", "weight", 0, 4)
        reader.random_state(0, torch.device("cpu"))


def tampered(name: str, content: Callable[[Place], bytes], *, known: bool) -> Case:
    """A checkpoint with another file `name`; `known`: its digests were made anew."""

    def act(place: Place) -> None:
        folder = saved(place)
        (folder / name).write_bytes(content(place))
        if known:
            commit_again(folder)
        resumed(place, folder)

    return act


for _file in ("rank-00000-0000.safetensors", "rank-00000.rng.safetensors", "rank-00000.json"):
    case(f"a pickle as {_file}", _file, "were saved")(tampered(_file, lambda place: place.pickle, known=False))
    case(f"a pickle as {_file}, committed", _file)(tampered(_file, lambda place: place.pickle, known=True))
case("a pickle as the list of files", "checkpoint.json")(tampered("checkpoint.json", lambda place: place.pickle, known=False))


def listing(change: Callable[[dict[str, Any]], None]) -> Case:
    """A checkpoint whose list of files was changed and committed."""

    def act(place: Place) -> None:
        folder = saved(place)
        commit_again(folder, change)
        resumed(place, folder)

    return act


def _above(document: dict[str, Any]) -> None:
    document["files"]["../../precious/file"] = {"bytes": 4, "sha256": hashlib.sha256(b"kept").hexdigest()}


case("a listed file above its folder", "no file of its own folder")(listing(_above))
case("a list that is none", "does not list its files")(listing(lambda document: document.update(files=[1, 2])))
case("a checkpoint without a step", "step")(listing(lambda document: document.pop("step")))
case("scalars that are code", "checkpoint.json")(
    listing(lambda document: document.update(scalars={"loss_scale": "__import__('os').system('touch executed')"}))
)


@case("a piece in a file above its folder", "no file of its folder")
def piece_elsewhere(place: Place) -> None:
    folder = saved(place)
    save_file({"w|weight|0": torch.ones(4)}, place.precious / "x.safetensors")
    index = json.loads((folder / "rank-00000.json").read_text())
    index["pieces"][0]["file"] = "../../precious/x.safetensors"
    (folder / "rank-00000.json").write_text(json.dumps(index))
    commit_again(folder)
    resumed(place, folder)


@case("a file of a checkpoint that is a link", "no file of its own folder")
def linked_file(place: Place) -> None:
    folder = saved(place)
    weights = folder / "rank-00000-0000.safetensors"
    shutil.move(weights, place.precious / "w")
    weights.symlink_to(place.precious / "w")
    resumed(place, folder)


@case("links where a save makes and removes folders")
def linked_folders(place: Place) -> None:
    checkpoints = place.folder / "checkpoints"
    checkpoints.mkdir()
    for name in (".tmp-step-000001", ".removed-step-000000", "step-000000"):
        (checkpoints / name).symlink_to(place.precious, target_is_directory=True)
    for step in (1, 2, 3):
        assert saved(place, step).is_dir()
    assert (place.precious / "file").read_text() == "kept"


# Model folders
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32, "hidden_size": 8, "intermediate_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
EVIL_CODE = "import os\nos.system({command!r})\nclass C:\n    pass\n"


def opened_model(place: Place) -> None:
    spec = compose([f"model.path={place.folder / 'm'}", "tuning=full"], ranks=1)
    module = model.build(spec, torch.device("meta"))
    model.open_weights(spec, model.table_of(module))


def model_folder(config: dict[str, Any], *files: tuple[str, Callable[[Place], str | bytes]]) -> Case:
    def act(place: Place) -> None:
        place.file("m/config.json", {**LLAMA, **config})
        for name, content in files:
            place.file(f"m/{name}", content(place))
        opened_model(place)

    return act


def header(size: int, text: bytes) -> Callable[[Place], bytes]:
    return lambda place: struct.pack("<Q", size) + text


def code(place: Place) -> str:
    return EVIL_CODE.format(command=place.command)


INDEX = "model.safetensors.index.json"
case("pickled weights", "pickled weights (*.bin) are never opened")(
    model_folder({}, ("pytorch_model.bin", lambda place: place.pickle))
)
case("an index of pickles", "evil.bin", "no *.safetensors")(
    model_folder({}, (INDEX, lambda _: '{"weight_map": {"lm_head.weight": "evil.bin"}}'), ("evil.bin", lambda p: p.pickle))
)
case("an index of files elsewhere", "../precious/file.safetensors", "no *.safetensors of this folder")(
    model_folder({}, (INDEX, lambda _: '{"weight_map": {"lm_head.weight": "../precious/file.safetensors"}}'))
)
case("an index nested without end", "not an index")(model_folder({}, (INDEX, lambda _: '{"a":' * 100_000)))
case("a pickle by the name of safetensors", "damaged weights")(model_folder({}, ("model.safetensors", lambda p: p.pickle * 9)))
case("a header of 2^63 bytes", "damaged weights")(model_folder({}, ("model.safetensors", header(2**63, b"{}"))))
case("a header that is no JSON", "damaged weights")(model_folder({}, ("model.safetensors", header(4, b"!!py"))))
case("a tensor beyond its file", "damaged weights")(
    model_folder(
        {}, ("model.safetensors", header(74, b'{"lm_head.weight":{"dtype":"F32","shape":[9999,9999],"data_offsets":[0,9]}}   '))
    )
)
AUTO = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C", "AutoTokenizer": ["evil.C", None]}
case("code of an unknown family", "model.trust_remote_code", "read that code")(
    model_folder({"model_type": "evil", "auto_map": AUTO}, ("evil.py", code))
)
case("code of a known family", "no *.safetensors")(model_folder({"auto_map": AUTO}, ("evil.py", code)))
case("a config nested without end", "model.path", "readable JSON")(
    lambda place: (place.file("m/config.json", '{"a":' * 100_000), opened_model(place))
)
case("sizes that are words", "model.path", "intermediate_size is")(
    model_folder({"intermediate_size": "__import__('os')", "head_dim": "x"})
)


@case("a pickled adapter", "pickled adapters (*.bin) are never opened")
def pickled_adapter(place: Place) -> None:
    place.file("e/base/config.json", LLAMA)
    place.file("e/adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "base"})
    place.file("e/adapter_model.bin", place.pickle)
    reopen.open_model(place.folder / "e")


@case("an export of pickles", "cannot be opened")
def pickled_export(place: Place) -> None:
    place.file("e/config.json", LLAMA)
    place.file("e/pytorch_model.bin", place.pickle)
    place.file("e/training_args.bin", place.pickle)
    reopen.open_model(place.folder / "e")


# Tokenizers and templates
def tokenised(settings: dict[str, Any], text: str = '{"prompt": "a", "completion": "b"}') -> Case:
    """A tokenizer with these settings beside the built-in vocabulary, prepared on one row of a conversation."""

    def act(place: Place) -> None:
        folder = place.folder / "t"
        shutil.copytree(Path(data.__file__).parent / "sample", folder, ignore=shutil.ignore_patterns("*.py", "*.jsonl"))
        stated = json.loads((folder / "tokenizer_config.json").read_text())
        words = json.dumps({**stated, **settings}).replace("{command}", place.command)
        (folder / "tokenizer_config.json").write_text(words)
        place.file("t/evil.py", code(place))
        wanted = Data(path=str(place.file("rows.jsonl", text + "\n")), seq_len=64, tokenizer=str(folder))
        data.prepare(wanted, data.load_tokenizer(wanted, None), 0, place.folder / "cache")

    return act


ROW = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


def templated(text: str) -> Case:
    return tokenised({"chat_template": text}, ROW)


case("a tokenizer with code")(tokenised({"auto_map": {"AutoTokenizer": ["evil.C", "evil.C"]}}))
case("a template that looks for classes", "chat_template", "refuses")(
    templated("{{ ''.__class__.__mro__[1].__subclasses__() }}")
)
case("a template that reaches modules", "chat_template", "refuses")(
    templated("{{ cycler.__init__.__globals__.os.system('{command}') }}")
)
case("a template that reaches its loader", "chat_template", "refuses")(
    templated("{{ self.__init__.__globals__.__builtins__.__import__('os').system('{command}') }}")
)
case("a template that reads files", "chat_template", "refuses")(templated("{% include '/etc/passwd' %}"))
case("a template without end", "chat_template", "refuses")(templated("{% for i in range(10**9) %}x{% endfor %}"))
case("a template that calls itself", "chat_template", "refuses")(templated("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"))
case("a template that formats its way out", "chat_template", "refuses")(
    templated("{{ '{0.__class__.__mro__}'.format(1).x.y }}")
)


# Data
def prepared_rows(name: str, content: Callable[[Place], str | bytes]) -> Case:
    def act(place: Place) -> None:
        wanted = Data(path=str(place.file(name, content(place))), seq_len=64)
        data.prepare(wanted, data.load_tokenizer(wanted, None), 0, place.folder / "cache")

    return act


for _kind in ("json", "jsonl", "parquet", "arrow"):
    case(f"a pickle as .{_kind}", "data")(prepared_rows(f"rows.{_kind}", lambda place: place.pickle * 3))
case("lines nested without end", "none of the first 1 rows")(
    prepared_rows("rows.jsonl", lambda _: '{"text":' + "[" * 200_000 + "\n")
)
case("a list nested without end", "nested")(prepared_rows("rows.json", lambda _: "[" * 200_000))


@case("a type of Arrow that is a pickle", "data")
def pickled_type(place: Place) -> None:
    import pyarrow as pa

    evil = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": place.pickle}
    schema = pa.schema([pa.field("x", pa.int64(), metadata=evil)])
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch([pa.array([1])], schema=schema))
    prepared_rows("rows.arrow", lambda _: sink.getvalue())(place)


@case("a pipe as data", "data.path")
def pipe(place: Place) -> None:
    os.mkfifo(place.folder / "rows.jsonl")
    wanted = Data(path=str(place.folder / "rows.jsonl"), seq_len=64)
    data.prepare(wanted, data.load_tokenizer(wanted, None), 0, place.folder / "cache")


@case("a pickle in the prepared data", "damaged", "delete that folder")
def pickled_cache(place: Place) -> None:
    wanted = Data(path=str(place.file("rows.jsonl", '{"text": "a b"}\n')), seq_len=64)
    tokenizer = data.load_tokenizer(wanted, None)
    folder = place.folder / "cache" / data.prepare(wanted, tokenizer, 0, place.folder / "cache").digest
    (folder / "rows.arrow").write_bytes(place.pickle)
    data.prepare(wanted, tokenizer, 0, place.folder / "cache")


# Run folders
@case("a spec of a run with _target_", "run", "not written by this version")
def spec_of_a_run(place: Place) -> None:
    place.file("r/spec.json", {"_target_": "os.system", "command": place.command})
    place.file("r/metrics.jsonl", '{"step": 1, "loss": 1, "tokens_per_second": 1, "step_seconds": 1, "tokens": 1}\n')
    place.file("r/ledger.json", {"ranks": []})
    load(place.folder / "r")


@case("a job's spec that was changed", "changed since it was planned")
def changed_spec(place: Place) -> None:
    document = submission.document(compose([], ranks=1), {})
    document["spec"]["model"]["trust_remote_code"] = True
    submission.load(place.file("submitted.json", document), 1)


@case("a job's spec with _target_", "cannot be read")
def targeted_spec(place: Place) -> None:
    spec = {**to_json(compose([], ranks=1)), "_target_": "os.system"}
    submission.load(place.file("submitted.json", {"spec": spec, "digest": ""}), 1)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """This process alone; a world that other tests have made stays."""
    before, joined = dict(os.environ), dist.is_initialized()
    yield join("cpu")
    if not joined:
        leave()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("name", CASES)
def test_nothing_hostile_is_executed_and_the_refusal_is_clear(name, world, tmp_path, monkeypatch):
    for variable in SECRETS:
        monkeypatch.setenv(variable, SECRET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    place = Place(tmp_path, world)
    act, words = CASES[name]
    screen = io.StringIO()
    report = ""
    try:
        with redirect_stdout(screen), redirect_stderr(screen):
            act(place)
    except OrchestratorError as error:
        report = error.report()
    assert not list(tmp_path.rglob("executed")), "it was executed"
    assert SECRET not in report + screen.getvalue(), "a secret was given away"
    assert (place.precious / "file").read_text() == "kept"
    if not words:
        assert report == ""
    for word in words:
        assert word in report, report
    assert len(report.splitlines()) < 24


def test_there_are_cases_enough():
    assert len(CASES) >= 40 and set(BUILT_IN)
