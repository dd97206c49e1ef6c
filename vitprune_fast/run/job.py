"""A running run, as its steps see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from vitprune_fast import files
from vitprune_fast.batches import classes_of
from vitprune_fast.config.distill import DistillConfig
from vitprune_fast.config.run import RunConfig
from vitprune_fast.data import BadImage, ImageData
from vitprune_fast.distill.loop import DistillResult
from vitprune_fast.distill.teachers import must_learn
from vitprune_fast.ranks import Ranks
from vitprune_fast.run import actions, checks, training
from vitprune_fast.run.actions import OnEvent, Setting
from vitprune_fast.run.folder import Metrics, RunFolder, read_metrics
from vitprune_fast.run.profile import Profile
from vitprune_fast.run.step import RunStopped, Step
from vitprune_fast.run.tensorboard import Board
from vitprune_fast.run.together import Together
from vitprune_fast.saved_models import load, save
from vitprune_fast.scoring import ScoringStopped
from vitprune_fast.sealed import CheckpointRefused, fingerprint
from vitprune_fast.search import SearchStopped
from vitprune_fast.surgery import SweepStopped

SET_ASIDE = "set_aside.json"
"""The file that names the unreadable images."""


@dataclass
class Job:
    """The state of a run: its configuration, its folder, and what earlier steps left there.

    Attributes:
        config: the configuration as the current step sees it.
        recipe: name of the list of steps.
        steps: all of them, in order.
        skeleton: the dense model without its weights.
        folder: of the run; steps read and write by name in it.
        data: the images; it knows which could not be read so far.
        profile: where to compute.
        metrics: the curves.
        on_event: called with every event.
        stop: asked after every step of a training, and between steps of the run.
        processes: that do the run together.
        board: gets the curves too, or None.
        step: the current one.
        proofs: what the step was checked for before its model, until `keep` records it.
    """

    config: RunConfig
    recipe: str
    steps: tuple[Step, ...]
    skeleton: nn.Module
    folder: RunFolder
    data: ImageData
    profile: Profile
    metrics: Metrics
    on_event: OnEvent
    stop: Callable[[], bool]
    processes: Together
    board: Board | None = None
    step: Step = field(init=False)
    cut_back: set[str] = field(default_factory=set)
    proofs: list[checks.Check] = field(default_factory=list)

    @property
    def ranks(self) -> Ranks:
        """This process among those of the run."""
        return self.processes.ranks

    @property
    def setting(self) -> Setting:
        """Seed, device, loader processes and the like."""
        return Setting(self.config.seed, self.profile, self.config.data)

    def __post_init__(self) -> None:
        """Take up what an earlier attempt could not read, and write down what this one cannot."""
        aside, path = self.data.set_aside, self.folder / SET_ASIDE
        listed = files.read_json(path)["images"] if path.is_file() else None
        # one that was repaired meanwhile is an image like the others
        aside.add(self.data.still_bad(BadImage(**image) for image in listed or ()))
        if self.ranks.is_first:
            aside.on_change = lambda: self._list(aside)
            if listed != [asdict(image) for image in aside]:
                self._list(aside)

    def _list(self, aside: Sequence[BadImage]) -> None:
        self.write(SET_ASIDE, {"images": [asdict(image) for image in aside]})

    @cached_property
    def images(self) -> Any:
        """A few training images on which models are checked, on the device."""
        return actions.probe_images(self.data).to(self.profile.device)

    @property
    def checkpoints(self) -> Path:
        """Where the current step keeps its checkpoints."""
        return self.folder / "checkpoints" / self.step.name

    def load(self, name: str) -> nn.Module:
        """A model of the run folder, on the device, in evaluation mode."""
        return load(self.folder / name).to(self.profile.device).eval()

    def keep(
        self, model: nn.Module, name: str, proofs: Sequence[checks.Check] | None = None
    ) -> list[dict[str, Any]]:
        """Saves a finished model by that name, and checks that it reloads bit-equal.

        Args:
            model: goes to the device, in evaluation mode.
            name: of its folder.
            proofs: what was checked about it before; None checks that its logits are finite.

        Returns:
            All checks as plain values.

        Raises:
            StageFailed: one of them does not hold.
        """
        model = model.to(self.profile.device).eval()
        earlier, self.proofs = self.proofs, []
        if not self.ranks.is_first:
            return []
        own = [checks.finite(model, self.images)] if proofs is None else proofs
        proofs = [*earlier, *own]
        with self.folder.replacing(name) as fresh:
            save(model, fresh)
        proofs.append(checks.reloads(model, self.folder / name, self.images))
        return checks.require(self.step.name, proofs)

    def write(self, name: str, value: Any) -> None:
        """Writes what can `save` itself, tensors by name, or plain values as JSON."""
        path = self.folder / name
        if not self.ranks.is_first:
            return
        if hasattr(value, "save"):
            value.save(path)
        elif path.suffix == ".safetensors":
            files.write_tensors(path, value)
        else:
            files.write_json(path, value)

    def teachers(self, student: nn.Module, dense: str, trained: Mapping[str, str]) -> Any:
        """The teachers of a student: those that are named, or the dense model; None if none is
        asked.

        Args:
            student: as it will be trained.
            dense: folder of the dense model, which is `self` among the names.
            trained: `teacher_0` and so on -> weights that a step `teacher` left.
        """
        config = self.config
        if not config.distill.needs_teacher:
            return None
        whole = self.load(dense)
        if not config.teachers.names:
            return whole
        classes = classes_of(student)
        return [
            training.open_teacher(
                number,
                config.teachers,
                config.distill,
                student,
                self.data,
                self.setting,
                dense=whole,
                weights=self.folder / trained[f"teacher_{number}"]
                if config.teachers.is_of_timm(name)
                and name not in config.teachers.checkpoints
                and must_learn(name, classes, pretrained=config.teachers.pretrained)
                else None,
            )
            for number, name in enumerate(config.teachers.names)
        ]

    def training_facts(
        self, result: DistillResult, *, teachers: bool = False, dense: str = "dense"
    ) -> dict[str, Any]:
        """What a record says of a training, and of its teachers, of which ``dense`` is `self`."""
        epochs = len(result.history)
        return {
            "epochs": epochs,
            "skipped_steps": result.skipped_steps,
            "start": result.start,
            **({"teachers": training.described(self.config, dense)} if teachers else {}),
            "text": f"{epochs} epoch{'s' * (epochs != 1)}",
        }

    def facts(self, step: str) -> dict[str, Any]:
        """The facts that a finished step recorded; empty for one that is not finished."""
        record = self.folder.record_of(step)
        return record["facts"] if record else {}

    def note(self, text: str) -> None:
        """Reports something worth knowing."""
        self.on_event({"event": "note", "text": text})

    def train(
        self, student: nn.Module, teacher: Any, schedule: DistillConfig, **more: Any
    ) -> DistillResult:
        """The result of a training that can resume; its curves are kept.

        Args:
            student: trained in place.
            teacher: one, several, or None.
            schedule: losses and epochs.
            more: of `actions.train`.

        Raises:
            RunStopped: it was asked to stop, and wrote a checkpoint.
        """
        weights = _fingerprints(teacher)
        result = actions.train(
            student,
            teacher,
            self.data,
            schedule,
            self.setting,
            purpose=self.step.name,
            checkpoint_dir=self.checkpoints,
            on_event=lambda event: self._tell(event, schedule.epochs),
            stop=self.stop,
            **more,
        )
        if not result.finished:
            raise RunStopped
        if weights:
            self.proofs.append(checks.untouched(weights, _fingerprints(teacher)))
        return result

    def _tell(self, event: dict[str, Any], epochs: int) -> None:
        """Passes on an event of the training loop, and keeps the ones that make a curve."""
        kind, name = event["event"], self.step.name
        event = {**event, "stage": name}
        if name not in self.cut_back and kind != "damaged_checkpoint":
            # lines of an attempt that was killed, beyond the checkpoint the loop goes on from
            if self.ranks.is_first:
                self.metrics.cut([name], event["step"] if kind == "resume" else 0)
            self.cut_back.add(name)
            if self.board is not None:
                self.board.restart(name, read_metrics(self.metrics.path))
        if kind in ("start", "epoch", "skipped_step") and self.ranks.is_first:
            self.metrics.add(event)
            if self.board is not None:
                self.board.add(event)
        self.on_event({**event, "epochs": epochs})

    def resumable(
        self, what: str, file: str, work: Callable[..., Any], *arguments: Any, **more: Any
    ) -> Any:
        """What `work` returns; a checkpoint that it refuses is deleted, and it starts over.

        Args:
            what: for a note, should that happen.
            file: its checkpoint, among those of the step.
            work: takes the arguments, and `checkpoint`, `on_event` and `stop`.
            arguments: of it.
            more: arguments of it by name.

        Raises:
            RunStopped: it was asked to stop.
        """
        checkpoint, name = self.checkpoints / file, self.step.name
        options: dict[str, Any] = {
            **more,
            "checkpoint": checkpoint,
            "on_event": lambda event: self.on_event({**event, "stage": name}),
            "stop": self.stop,
        }
        files.make_folder(checkpoint.parent)
        try:
            try:
                return work(*arguments, **options)
            except CheckpointRefused as error:
                self.note(f"{what} starts over: {error}")
                # all have read it before it goes, and it is gone before any looks again
                ranks = Ranks.current()
                ranks.wait()
                if ranks.is_first:
                    checkpoint.unlink(missing_ok=True)
                ranks.wait()
                return work(*arguments, **options)
        except (ScoringStopped, SearchStopped, SweepStopped):
            raise RunStopped from None


def _fingerprints(teacher: nn.Module | Sequence[nn.Module] | None) -> dict[str, str]:
    """Fingerprint of the weights of every teacher, by its name."""
    several = [teacher] if isinstance(teacher, nn.Module) else teacher or ()
    return {getattr(each, "name", "self"): fingerprint(each) for each in several}
