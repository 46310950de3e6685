"""Copy batches to the device beside the computation."""

from dataclasses import fields

import torch

from dataset import Batch


class DeviceCopies:
    """Copies batches to a device; on a GPU by a stream of their own, so that no copy waits for the computation.

    The training loop does not wait for the GPU: when it asks for a batch, the GPU is still busy with what came before,
    and the copy is done before the computation comes to it. From pinned memory the loop does not wait for the copy
    either.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch on the device, ready for what is computed there from now on."""
        if self.stream is None:
            return batch.to(self.device)
        with torch.cuda.stream(self.stream):
            moved = batch.to(self.device)
        computation = torch.cuda.current_stream(self.device)
        computation.wait_stream(self.stream)
        for tensor in (getattr(moved, field.name) for field in fields(moved)):
            if isinstance(tensor, torch.Tensor):
                # The memory is the side stream's: without this it would copy the next batch over one still in use.
                tensor.record_stream(computation)
        return moved
