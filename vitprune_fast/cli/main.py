"""`vitprune-fast`: finds the verb, runs it, turns our own errors into one sentence."""

from __future__ import annotations

import difflib
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from vitprune_fast._version import __version__
from vitprune_fast.cli.signals import Interrupted, listen
from vitprune_fast.cli.usage import UsageError, as_typed
from vitprune_fast.errors import VitpruneError

VERBS = {
    "run": "the whole chain in one resumable folder: score, plan, prune, sweep, distill, evaluate",
    "describe": "what can be removed from a model, and what it costs",
    "score": "measure the importance of heads, neurons and every other unit",
    "plan": "choose what to keep within a budget",
    "search": "find separate pruning ratios for heads and neurons, by evaluating candidates",
    "prune": "cut a plan out of a model, and refit what stays",
    "distill": "teach a pruned model with its dense teacher",
    "eval": "top-1, top-5 and agreement on a data set",
    "bench": "parameters, MACs and latency of a model",
    "export": "write a model as ONNX, pt2, or for transformers or timm, and check it",
    "report": "write the report of a run folder again, or compare several runs",
    "doctor": "versions, devices, compilers and the backend every op takes",
}
# what others call a verb whose name is not like it
_MEANT = {"compare": "report"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code: 0, 2 for bad input, 128 + signal when stopped."""
    _let_waiting_threads_sleep()
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    verb = words.pop(0)
    if verb not in VERBS:
        near = [_MEANT[verb]] if verb in _MEANT else difflib.get_close_matches(verb, VERBS, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(VERBS)}"
        return _fail(f"vitprune-fast: no verb {verb!r}; {hint}", "see vitprune-fast --help")
    try:
        listen()
        import_module(f"vitprune_fast.cli.{verb}").main(words)
    except UsageError as error:
        return _fail(str(error), f"see vitprune-fast {verb} --help")
    except VitpruneError as error:
        return _fail(as_typed(str(error), verb))
    except Interrupted as stop:
        # these resume wherever they were, also when they were ended at once
        resumes = verb in ("run", "search") or stop.resumes
        hint = "; the same command resumes the run" if resumes else ""
        print(f"stopped by {signal.Signals(stop.number).name}{hint}", file=sys.stderr)
        return 128 + stop.number
    except BrokenPipeError:
        # the reader of our output (head, less) went away: not our error, but not a success
        sys.stderr.close()
        return 128 + signal.SIGPIPE
    return 0


def _let_waiting_threads_sleep() -> None:
    """Has OpenMP's threads sleep soon while they wait for each other, unless the user chose.

    GNU's OpenMP, which comes with torch, looks 300,000 times (10 ms and more) whether the other
    threads are done before it sleeps. As soon as something else runs on the machine, a thread that
    looks has the core which the one it waits for needs. 3,000 looks take little longer than being
    woken does. Intel's OpenMP looks for 200 ms; a millisecond is the least that it takes before it
    sleeps at once, which is slow for small models. Results do not depend on either.
    """
    # the library reads the variables when torch loads it; after that they would only mislead
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
        os.environ.setdefault("KMP_BLOCKTIME", "1")


def _fail(*sentences: str) -> int:
    print(f"error: {' '.join(sentences[0].split())}", *sentences[1:], sep="\n", file=sys.stderr)
    return 2


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = "\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items())
    return (
        "usage: vitprune-fast VERB [options]\n\n"
        "Prune Vision Transformers to a budget, and distil what is left.\n\n"
        f"{lines}\n\n"
        "vitprune-fast VERB --help shows the options of a verb. Without data or GPU:\n"
        "vitprune-fast run"
    )


if __name__ == "__main__":
    sys.exit(main())
