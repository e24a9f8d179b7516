"""What to do when the memory does not hold a micro-batch: the same rows in smaller ones."""

from collections.abc import Mapping, Sequence

from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from fgpt_hf.runs import Run


def smaller(
    micro_batches: Sequence[Mapping[str, Tensor]], run: Run, accelerator: Accelerator
) -> list[Mapping[str, Tensor]]:
    """The same rows in halves, or in thirds where the number is odd and so on; `run` has it so from here on.

    Raises:
        ValueError: the micro-batches have one row already; or there are other processes, which wait for the gradients
            of this one and cannot be told.
    """
    rows = run.per_device_train_batch_size
    if rows == 1:
        raise ValueError("out of memory with a micro-batch of one row: try --gradient_checkpointing or --fsdp")
    parts = next(number for number in range(2, rows + 1) if rows % number == 0)
    if accelerator.num_processes > 1:
        raise ValueError(
            f"out of memory with micro-batches of {rows} rows: try --per_device_train_batch_size {rows // parts} "
            f"--gradient_accumulation_steps {parts * run.gradient_accumulation_steps}"
        )
    clear_device_cache(garbage_collection=True)
    run.divide_step(rows * run.gradient_accumulation_steps, rows // parts)
    accelerator.print(
        f"out of memory with micro-batches of {rows} rows: from here on they have {run.per_device_train_batch_size}, "
        f"{run.gradient_accumulation_steps} a step, so that the step stays what it was"
    )
    return [part for batch in micro_batches for part in _split(batch, rows // parts)]


def _split(batch: Mapping[str, Tensor], rows: int) -> list[dict[str, Tensor]]:
    pieces = zip(*(tensor.split(rows) for tensor in batch.values()), strict=True)
    return [dict(zip(batch, piece, strict=True)) for piece in pieces]
