"""What of a training goes into its checkpoints, and how it comes back."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from vitprune_fast.distill.checkpoints import Checkpoint, read_newest, tidy, write_checkpoint
from vitprune_fast.distill.optim import is_fused
from vitprune_fast.distill.progress import Progress
from vitprune_fast.distill.state import TrainingState
from vitprune_fast.errors import RunFolderError
from vitprune_fast.planning import Plan


def write(run: TrainingState, epoch: int) -> None:
    """Write a checkpoint, where the run has a folder; one process does."""
    if run.folder is None or not run.ranks.is_first:
        return
    tensors = {f"model.{name}": t for name, t in run.student.state_dict().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in run.best.items()}
    tensors |= {f"extras.{name}": t for name, t in run.task.extras.state_dict().items()}
    if run.average is not None:
        tensors |= {f"average.{n}": t for n, t in run.average.module.state_dict().items()}
    for name, parameter in _learning(run).items():
        for key, value in run.optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{key}.{name}"] = value
    state: dict[str, Any] = {
        "config": asdict(run.config),
        "steps_per_epoch": run.stream.steps_per_epoch,
        "world": run.ranks.world,
        "progress": asdict(run.progress),
        "told": _told(run),
    }
    if run.scaler.is_enabled():
        state["scaler"] = run.scaler.state_dict()
    if run.masked is not None:
        state["masks"] = {"plan": run.masked.plan.to_json(), "share": run.masked.share}
    # tied parameters and views share memory, which the file format takes once only
    write_checkpoint(run.folder, Checkpoint(run.progress.step, state, _unshared(tensors)))
    run.tell("checkpoint", epoch)


def read(run: TrainingState) -> Progress:
    """Load the newest whole checkpoint into the run, if there is one.

    Raises:
        RunFolderError: it is of another config, of other data or of another model.
    """
    if run.folder is None:
        return run.progress
    stored = read_newest(run.folder, run.tell_damage)
    if stored is None:
        return run.progress
    _check_same(run, stored.state)
    parts: dict[str, dict[str, Tensor]] = {
        part: {} for part in ("model", "best", "extras", "average", "optimizer")
    }
    for name, tensor in stored.tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    try:
        run.student.load_state_dict(parts["model"])
        run.task.extras.load_state_dict(parts["extras"])
        if run.average is not None:
            run.average.module.load_state_dict(parts["average"])
    except RuntimeError as error:
        raise RunFolderError(
            f"distill: student must have the shapes of the checkpoint in {run.folder}, "
            f"got others: {str(error).splitlines()[-1].strip()}"
        ) from None
    run.best = parts["best"]
    _load_optimizer(run, parts["optimizer"])
    if run.scaler.is_enabled():
        run.scaler.load_state_dict(stored.state["scaler"])
    if run.masked is not None:
        masks = stored.state["masks"]
        run.masked.set(Plan.from_json(masks["plan"]), masks["share"])
    progress = Progress(**stored.state["progress"])
    # a kill may have come between the newest checkpoint and the end of the oldest
    if run.ranks.is_first:
        tidy(run.folder, progress.step)
    run.progress = progress
    run.tell("resume", progress.step // run.stream.steps_per_epoch)
    return progress


def _check_same(run: TrainingState, state: dict[str, Any]) -> None:
    changed = run.config.differences(state["config"])
    steps = state["steps_per_epoch"]
    if state.get("world", 1) != run.ranks.world:
        changed = f"processes: {state.get('world', 1)} -> {run.ranks.world}"
    elif steps != run.stream.steps_per_epoch:
        changed = f"steps per epoch: {steps} -> {run.stream.steps_per_epoch}"
    told, stored = _told(run), state.get("told", {})
    for name in told:
        if not changed and told[name] != stored.get(name):
            changed = f"{name}: {stored.get(name)} -> {told[name]}"
    if changed:
        raise RunFolderError(
            f"distill: config and data must be those of the checkpoint in {run.folder}, "
            f"got others ({changed}); take another checkpoint_dir"
        )


def _told(run: TrainingState) -> dict[str, Any]:
    """What a run is told beside its config, as far as that is data."""
    told: dict[str, Any] = {"masks": run.masked is not None, "gates": run.gates is not None}
    told |= {f"teacher {name}": weights for name, weights in run.teacher_weights.items()}
    told["teachers"] = list(run.teacher_weights)
    for name in ("batch_size", "seed", "shuffle", "repeats", "augment"):
        if hasattr(run.stream.train, name):
            told[f"train.{name}"] = repr(getattr(run.stream.train, name))
    if run.masked is not None:
        schedule = vars(run.masked.schedule)
        told |= {f"masks.{name}": schedule[name] for name in schedule if name != "planner"}
        told["masks.units"] = list(run.masked.schedule.units)
    if run.gates is not None:
        for name in ("kind", "keep", "round_to", "penalties", "seed"):
            told[f"gates.{name}"] = getattr(run.gates, name)
    budget: Any = dict(run.task.extras).get("gate_budget")
    told["gate_budget"] = None if budget is None else budget.limit
    return told


def _load_optimizer(run: TrainingState, stored: dict[str, Tensor]) -> None:
    for name, parameter in _learning(run).items():
        state = run.optimizer.state[parameter]
        for key in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer"):
            value = stored.get(f"{key}.{name}")
            if value is not None:
                # AdamW that is not fused counts on the CPU
                counts = key == "step" and not is_fused(run.optimizer)
                state[key] = value if counts else value.to(parameter.device)


def _learning(run: TrainingState) -> dict[str, nn.Parameter]:
    """All that the optimizer moves, by the names it has in a checkpoint."""
    return {**run.named, **{f"extras.{name}": p for name, p in run.task.named_extras()}}


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        key = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if key in seen and key else tensor
        seen.add(key)
    return result
