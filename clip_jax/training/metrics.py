"""Where the numbers of a run go: a progress bar, metrics.jsonl and TensorBoard."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import tensorflow as tf
from etils import epath
from tqdm import tqdm

from clip_jax.chips import chip_of

FILE = "metrics.jsonl"
MUCH_WAITING = 0.05  # share of the time, from which on the log gives advice


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl, in the order of their steps.

    A last line that a killed run left unfinished is passed over.
    """
    path = epath.Path(workdir) / FILE
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class TrainLog:
    """The log of one run, written by the first host; the others only check that the loss is finite.

    Metrics are fetched a step late, so that the device always has the next step to work on.

    Args:
        workdir: local or gs://.
        step: where the run (re)starts; lines of later steps, written by a run that was killed, are
            dropped, so that each step is there once.
        steps: where the run ends, for the progress bar.
        every: steps between two lines of training metrics.
        batch_size: global, for examples a second.
        flops_per_example: of the model, for the share of the chips' peak that it reaches.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        step: int,
        steps: int,
        every: int,
        batch_size: int,
        flops_per_example: int,
    ):
        self._every = every
        self._batch_size = batch_size
        self._flops_per_example = flops_per_example
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
        self._faults: Mapping[str, int] = {}
        self._advised = False
        self._since: tuple[int, float, float] | None = None  # step, time, seconds waited for data
        self._active = jax.process_index() == 0
        if not self._active:
            return
        kept = [line for line in read_metrics(workdir) if line["step"] <= step]
        path = epath.Path(workdir) / FILE
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = tf.io.gfile.GFile(str(path), "a")
        self._tensorboard = tf.summary.create_file_writer(str(epath.Path(workdir) / "tensorboard"))
        self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, mininterval=1)

    def step(
        self,
        step: int,
        metrics: Mapping[str, jax.Array],
        waited: float,
        faults: Mapping[str, int] | None = None,
    ) -> None:
        """Takes the metrics of a step just dispatched, and logs those of the step before.

        Args:
            step: its number.
            metrics: scalars on the device, not yet waited for.
            waited: seconds that the run has waited for data so far.
            faults: bad records so far, by kind; logged under bad/KIND.

        Raises:
            FloatingPointError: the loss of the step before is not finite.
        """
        self.flush(waited)
        self._pending = (step, metrics)
        self._faults = faults or {}

    def flush(self, waited: float) -> None:
        """Waits for the metrics not yet logged, and logs them."""
        if self._pending is None:
            return
        (step, arrays), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(arrays).items()}
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(
                f"the loss is {values['loss']} at step {step}; go on from an older checkpoint with "
                "a lower config.optim.peak_lr or a longer config.optim.warmup_steps"
            )
        now = time.perf_counter()
        if self._since is None:  # the first step compiles: it says nothing about speed
            self._since = (step, now, waited)
        if not self._active:
            return
        if step % self._every == 0:
            first, then, waited_then = self._since
            if step > first:
                examples_per_second = (step - first) * self._batch_size / (now - then)
                values |= speed(examples_per_second, self._flops_per_example, jax.devices())
                values["data_wait"] = (waited - waited_then) / (now - then)
                self._advise(values["data_wait"])
            values |= {f"bad/{kind}": float(count) for kind, count in self._faults.items()}
            self._since = (step, now, waited)
            self.write(step, values)
            self._bar.set_postfix_str(_beside_the_bar(values), refresh=False)
        self._bar.update(step - self._bar.n)

    def _advise(self, data_wait: float) -> None:
        """Says once what to change when the device starves."""
        if data_wait <= MUCH_WAITING or self._advised:
            return
        self._advised = True
        self.say(
            f"the device waits for data {data_wait:.0%} of the time. Give the host more cores, or "
            "a smaller share of the batch; store smaller pictures; or read from nearer storage, "
            "with more config.data.streams"
        )

    def pause(self) -> None:
        """What happens until the next step (evaluation, say) does not count as training time."""
        self._since = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line; the keys become TensorBoard's tags."""
        if not self._active:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        with self._tensorboard.as_default(step=step):
            for name, value in values.items():
                tf.summary.scalar(name, value)

    def say(self, message: str) -> None:
        """Prints a line above the progress bar."""
        if self._active:
            self._bar.write(message)

    def close(self) -> None:
        """Writes what is left to disk."""
        if self._active:
            self._bar.close()
            self._file.close()
            self._tensorboard.close()


def speed(
    examples_per_second: float, flops_per_example: int, devices: Sequence[Any]
) -> dict[str, float]:
    """Examples a second, of all chips and of each, and model FLOPs utilisation.

    `mfu` is the model's own operations, recomputation left out, over the published bfloat16 peak of
    the chips; it is not there for a CPU, nor for chips that `chips.CHIPS` does not know.
    """
    each = examples_per_second / len(devices)
    values = {"examples_per_second": examples_per_second, "examples_per_second_per_chip": each}
    chip = chip_of(devices[0])
    return values | ({"mfu": each * flops_per_example / chip.peak_flops} if chip else {})


def _beside_the_bar(values: Mapping[str, float]) -> str:
    shown = f"loss {values['loss']:.3f}, scale {values['logit_scale']:.1f}"
    if "examples_per_second" in values:
        shown += f", {values['examples_per_second']:,.0f} examples/s"
        if "mfu" in values:
            shown += (
                f" ({values['examples_per_second_per_chip']:,.0f} a chip, MFU {values['mfu']:.1%})"
            )
        shown += f", {values['data_wait']:.0%} waiting for data"
    return shown
