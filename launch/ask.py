"""Ask a trained model: `python launch/ask.py run=runs/demo [max_new_tokens=64] "a prompt" …`; prompts on stdin where none."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

# This clone, also where another one is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrator.errors import CheckpointError, Fault, OrchestratorError


def _export(run: Path) -> Path:
    """The export of the run folder `run`, or `run` itself where it is an export."""
    for folder in (run / "export", run):
        if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
            return folder
    problem = f"there is no folder {run}" if not run.is_dir() else f"{run} holds no export"
    raise CheckpointError(Fault("run", problem, "finish the run (resume=auto run.dir=…) with export.format=hf"))


def _prompts(given: list[str]) -> Iterable[str]:
    return given if given else (line.strip() for line in sys.stdin if line.strip())


def main(argv: list[str]) -> int:
    """Answer every prompt; the exit code."""
    from orchestrator.report.arguments import positive, read_arguments

    try:
        values, prompts = read_arguments(argv, {"run": "", "max_new_tokens": "64"})
        most = positive(values, "max_new_tokens")
        folder = _export(Path(values["run"]).expanduser())
        from orchestrator.train.reopen import answer, open_model

        model, tokenizer = open_model(folder)
        for prompt in _prompts(prompts):
            if len(prompts) != 1:
                print(f"> {prompt}")
            print(answer(model, tokenizer, prompt, most), flush=True)
    except OrchestratorError as error:
        print(error.report(), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
